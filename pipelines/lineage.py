"""Where a registered model comes from, back to the checksums of raw data, and how to make it again.

What a version has to tell was kept beside it when it was registered: dvc.lock, which names every
stage's inputs and outputs by their hashes; the code's commit, with what was not committed as a
patch; and what `download` said of each archive.
"""

import json
import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from typing import Any

import yaml

from pipelines.cli import GrimaceError

FOLDER = Path("lineage")  # within a version's files
PATCH = "uncommitted.patch"
CODE = ("flows", "pipelines", "models")
# As `git apply` wants it, whatever the user likes to look at.
PLAIN = (
    "--binary",
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
    "--src-prefix=a/",
    "--dst-prefix=b/",
)


def keep(folder: Path) -> None:
    """Write what `lines_of` and `pipelines.reproduce` read later into a folder.

    Raises:
        GrimaceError: this is no Git repository, or DVC has no record of its stages.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _dvc_at_rest():
        for name in ("dvc.lock", "dvc.yaml", "params.yaml"):
            if not Path(name).is_file():
                raise GrimaceError(
                    f"{name} is missing in {Path.cwd()}; run `dvc repro` there first"
                )
            copyfile(name, folder / name)
        (folder / "dvc.lock").write_text(yaml.safe_dump(_lock(), sort_keys=False))
    for report in sorted(Path("reports/download").glob("*.json")):
        copyfile(report, folder / f"download-{report.name}")
    code = {"commit": _git("rev-parse", "HEAD").strip()}
    (folder / "code.json").write_text(json.dumps(code) + "\n")
    patch = _git("diff", *PLAIN, "HEAD")
    # A module that is imported counts, whether or not Git was told of it.
    for path in _git("ls-files", "-z", "--others", "--exclude-standard", "--", *CODE).split("\0"):
        if path:
            patch += _git("diff", *PLAIN, "--no-index", "--", "/dev/null", path, fine=1)
    if patch:
        (folder / PATCH).write_bytes(patch.encode(errors="surrogateescape"))


@contextmanager
def _dvc_at_rest() -> Iterator[None]:
    """Keep DVC from writing dvc.lock, which it does not do in one step; other stages may run."""
    if not Path(".dvc").is_dir():
        yield
        return
    from dvc.lock import Lock

    locks = Path(".dvc/tmp").absolute()
    locks.mkdir(exist_ok=True)
    with Lock(str(locks / "lock"), wait=True):
        yield


def read_lock() -> dict[str, Any]:
    """Return the stages of dvc.lock that there still are, none where there is no such file."""
    with _dvc_at_rest():
        return _lock() if Path("dvc.lock").is_file() else {"stages": {}}


def _lock() -> dict[str, Any]:
    """Without the stages of jobs and datasets that params.yaml has no more, which DVC keeps."""
    lock = dict(yaml.safe_load(Path("dvc.lock").read_text()))
    if Path(".dvc").is_dir():
        from dvc.repo import Repo

        with Repo() as repo:
            there = {stage.addressing for stage in repo.index.stages}
        lock["stages"] = {name: row for name, row in lock["stages"].items() if name in there}
    return lock


def _git(*arguments: str, fine: int = 0) -> str:
    """Return what Git says; it may end with the code `fine`."""
    answer = subprocess.run(["git", *arguments], capture_output=True, check=False)
    if answer.returncode not in (0, fine):
        raise GrimaceError(
            f"git {arguments[0]}: {answer.stderr.decode(errors='replace').strip()}. Without a "
            "commit a model cannot be made again: register from a Git repository"
        )
    return answer.stdout.decode(errors="surrogateescape")  # a file need not be UTF-8


def ancestry(lock: Mapping[str, Any], stage: str) -> list[str]:
    """Return a stage and all that it stands on, each after what it needs.

    Args:
        lock: the content of a dvc.lock.
        stage: its name there.

    Raises:
        GrimaceError: the lock has no such stage.
    """
    stages = lock["stages"]
    if stage not in stages:
        raise GrimaceError(f"dvc.lock has no stage {stage!r}; run `dvc repro {stage}`")
    makers = {out["path"]: name for name, row in stages.items() for out in row.get("outs", [])}
    found: list[str] = []

    def visit(name: str) -> None:
        for dependency in stages[name].get("deps", []):
            path = Path(dependency["path"])
            for out, maker in makers.items():
                made = Path(out)
                related = path == made or path in made.parents or made in path.parents
                if related and maker not in (name, *found):
                    visit(maker)
        if name not in found:
            found.append(name)

    visit(stage)
    return found


def lines_of(folder: Path, task: str) -> list[str]:
    """Tell a model's descent, one line a stage, from raw data to verification.

    Args:
        folder: a version's files.
        task: whose.

    Raises:
        GrimaceError: the folder does not hold what `keep` wrote.
    """
    kept = folder / FOLDER
    try:
        lock = yaml.safe_load((kept / "dvc.lock").read_text())
        code = json.loads((kept / "code.json").read_text())
    except OSError as error:
        raise GrimaceError(f"{kept} does not tell where the model comes from: {error}") from None
    dirty = f", with {PATCH}" if (kept / PATCH).exists() else ""
    lines = [f"code       commit {code['commit']}{dirty}"]
    for stage in ancestry(lock, f"verify@{task}"):
        kind, _, dataset = stage.partition("@")
        report = kept / f"download-{dataset}.json"
        if kind == "download" and report.exists():
            told = json.loads(report.read_text())
            names = ("source", "archive", "sha256", "examples")
            facts = ", ".join(f"{name} {told[name]}" for name in names if name in told)
            lines.append(f"raw data   {dataset}: {facts}")
        for out in lock["stages"][stage].get("outs", []):
            lines.append(f"{stage:<22} {out['path']}  md5 {out['md5']}")
    return lines


def command(task: str, number: int) -> str:
    """Return the one command that makes a registered model again and compares."""
    named = os.environ.get("GRIMACE_ARCHIVES")
    archives = f"GRIMACE_ARCHIVES={shlex.quote(str(Path(named).absolute()))} " if named else ""
    return f"{archives}uv run python -m pipelines.reproduce --task {task} --version {number}"
