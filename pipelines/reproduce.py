"""Make a registered model again, from raw data, and compare it with the registered one.

    python -m pipelines.reproduce --task emotion                # the champion
    python -m pipelines.reproduce --task emotion --version 3

The code comes from the version's commit and its patch, into a Git worktree beside this one where
nothing is taken over from the DVC cache here; archives are looked for where GRIMACE_ARCHIVES says,
and in data/archives here. Compared are the hashes of every stage's outputs and the test figure. Up
to `augment` data have to be the same to the byte. A training on several threads need not be, so of
what comes from `train` on, others are told of, and the test figure has to lie in the interval of
the registered one.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from pipelines import lineage, registry
from pipelines.cli import GrimaceError, run
from pipelines.download import ARCHIVES
from pipelines.measures import DECIDES
from pipelines.params import TaskName, load_params

DATA = ("download", "filter", "split", "augment")  # stages whose data are the same each time


def main() -> None:
    """Reproduce one version and say what is the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, choices=tuple(DECIDES))
    parser.add_argument("--version", type=int, help="in the registry; default: the champion")
    parser.add_argument("--sha256", help="its first digits, in place of a version")
    parser.add_argument("--into", type=Path, help="a folder that is not there; default: beside")
    args = parser.parse_args()
    store = registry.Registry(load_params().tracking, args.task)
    number = args.version or find(store, args.sha256)
    into = args.into or Path("..", f"{Path.cwd().name}-{store.name}-{number}")
    folder = store.fetch(number)
    restore(folder / lineage.FOLDER, into)
    make(into, f"verify@{args.task}")
    lines, wrong = compare(folder, into, args.task)
    print("\n".join(lines))
    if wrong:
        raise GrimaceError(f"version {number} was not reproduced in {into}: {'; '.join(wrong)}")


def find(store: registry.Registry, sha256: str | None) -> int:
    """Return the version of these bytes, or the champion.

    Raises:
        GrimaceError: there is none.
    """
    if sha256 is None:
        champion = store.champion()
        if champion is None:
            raise GrimaceError(f"{store.name} has no champion yet; name a --version")
        return champion
    tags = {int(v.version): v.tags.get(registry.SHA256, "") for v in store.versions()}
    found = [number for number, digest in tags.items() if digest.startswith(sha256)]
    if not found:
        raise GrimaceError(f"{store.name} has no version whose SHA-256 begins with {sha256}")
    return found[-1]


def restore(kept: Path, into: Path) -> None:
    """Put the code of a version into a new worktree, which finds the archives that are here.

    Raises:
        GrimaceError: the folder is there already, the commit is not, or the patch does not fit.
    """
    if into.exists():
        raise GrimaceError(f"{into} is there already; name another folder with --into")
    commit = json.loads((kept / "code.json").read_text())["commit"]
    _run(["git", "worktree", "add", "--detach", str(into), commit], Path())
    patch = kept / lineage.PATCH
    if patch.exists():
        _run(["git", "apply", "--whitespace=nowarn", str(patch.resolve())], into)
    if ARCHIVES.is_dir():
        (into / ARCHIVES).parent.mkdir(parents=True, exist_ok=True)
        (into / ARCHIVES).symlink_to(ARCHIVES.absolute(), target_is_directory=True)


def make(into: Path, stage: str) -> None:
    """Run everything that a stage stands on, in a worktree, with this Python."""
    python = Path(sys.executable).parent
    # A tracking store of its own: what is made again is no new training.
    environment = {
        **{name: text for name, text in os.environ.items() if "MLFLOW" not in name},
        "MLFLOW_TRACKING_URI": f"sqlite:///{into.resolve()}/mlflow.db",
        "PATH": os.pathsep.join([str(python), os.environ["PATH"]]),
    }
    if named := os.environ.get("GRIMACE_ARCHIVES"):
        environment["GRIMACE_ARCHIVES"] = str(Path(named).absolute())
    _run([sys.executable, "-m", "dvc", "repro", stage], into, environment)


def _run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    ended = subprocess.run(command, cwd=folder, env=environment, check=False)
    if ended.returncode:
        raise GrimaceError(f"{' '.join(command)} failed in {folder}; its words stand above")


def compare(folder: Path, into: Path, task: TaskName) -> tuple[list[str], list[str]]:
    """Hold what was made again against what was registered.

    Args:
        folder: the version's files.
        into: the worktree in which everything was made again.
        task: whose model.

    Returns:
        One line an output of each stage, "same" or "other" by its hash, and one on the test
        figure; and what is wrong: data that are others, or a figure outside of the registered
        interval. Pages and pictures about data may be others.
    """
    locks = [
        yaml.safe_load(path.read_text())
        for path in (folder / lineage.FOLDER / "dvc.lock", into / "dvc.lock")
    ]
    stages = locks[1]["stages"].values()
    now = {out["path"]: out["md5"] for row in stages for out in row.get("outs", [])}
    lines, wrong = [], []
    for stage in lineage.ancestry(locks[0], f"verify@{task}"):
        for out in locks[0]["stages"][stage].get("outs", []):
            path = Path(out["path"])
            same = now.get(out["path"]) == out["md5"]
            lines.append(f"{'same' if same else 'other':<5} {stage:<22} {path}")
            if not same and stage.partition("@")[0] in DATA and path.parts[0] == "data":
                wrong.append(f"{path} is not the same")
    metric = DECIDES[task]
    first, again = (
        json.loads(path.read_text())
        for path in (folder / "reports/test.json", into / "reports/verify" / task / "test.json")
    )
    low, high = first["ci95"][metric]
    lines.append(
        f"{metric} on test: {first[metric]:.4%} registered ({low:.2%} – {high:.2%}), "
        f"{again[metric]:.4%} made again"
    )
    if not low <= again[metric] <= high:
        wrong.append(f"{metric} on test lies outside of the registered interval")
    return lines, wrong


if __name__ == "__main__":
    run(main)
