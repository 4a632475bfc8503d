import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.cli import GrimaceError, run, whole_folder

ROOT = Path(__file__).parents[2]


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_error_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    result = python(
        "from pipelines.cli import GrimaceError, run\n"
        "def main(): raise GrimaceError('no such face; feed me')\n"
        "run(main)",
        tmp_path,
    )
    assert (result.returncode, result.stderr) == (1, "error: no such face; feed me\n")
    assert result.stdout == ""


def test_success_says_and_notes_what_it_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(lambda: print("done"))
    captured = capsys.readouterr()
    assert captured.out == "done\n"
    assert captured.err.startswith("took ")
    assert list(tmp_path.iterdir()) == []  # no reports, nothing to add to

    Path("reports").mkdir()
    run(lambda: None)
    assert list(Path("reports").iterdir()) == []  # by hand, not by DVC
    monkeypatch.setenv("DVC_STAGE", "split@synthetic")
    for _ in range(2):
        run(lambda: None)
    rows = [json.loads(line) for line in Path("reports/costs.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0]["seconds"] > 0 and rows[0]["peak_mib"] > 0


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda: print(1 / 0))
    with pytest.raises(FileNotFoundError):
        run(lambda: print(Path("/nowhere/at/all").read_text()))


def test_interrupted() -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 130


def write_bytes() -> None:
    Path("/dev/full").write_bytes(b"face")


def over_quota() -> None:
    raise OSError(errno.EDQUOT, "Disk quota exceeded", "shards/images-00.npy")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("main", [write_bytes, over_quota])
def test_full_disk(main: Callable[[], None]) -> None:
    with pytest.raises(SystemExit) as end:
        run(main)
    assert str(end.value.code).startswith("error: the disk is full")
    assert "free some space" in str(end.value.code)
    assert len(str(end.value.code).splitlines()) == 1


def test_full_disk_names_the_file() -> None:
    with pytest.raises(SystemExit, match=r"while writing shards/images-00\.npy"):
        run(over_quota)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else {}


OLD, NEW = {"a": "old", "b": "old"}, {"a": "new", "c": "new"}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    target = tmp_path / "reports" / "stage"
    target.mkdir(parents=True)
    for name, text in OLD.items():
        (target / name).write_text(text)
    return target


def test_a_whole_folder_replaces_the_old_one(target: Path) -> None:
    with whole_folder(target) as out:
        assert content(out) == {}
        for name, text in NEW.items():
            (out / name).write_text(text)
        assert content(target) == OLD
    assert content(target) == NEW
    assert [path.name for path in target.parent.iterdir()] == ["stage"]


def test_its_parents_are_made(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a/b/c") as out:
        (out / "x").write_text("y")
    assert content(tmp_path / "a/b/c") == {"x": "y"}


@pytest.mark.parametrize("error", [GrimaceError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_the_old(target: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), whole_folder(target) as out:
        (out / "a").write_text("half")
        raise error
    assert content(target) == OLD
    assert [path.name for path in target.parent.iterdir()] == ["stage"]


def test_failure_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(GrimaceError), whole_folder(tmp_path / "stage") as out:
        (out / "a").write_text("half")
        raise GrimaceError
    assert list(tmp_path.iterdir()) == []


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("while_writing", "while_removing", "left"),
    [(KILL, "pass", [OLD]), ("pass", KILL, [OLD, {}, NEW])],
)
def test_killed(target: Path, while_writing: str, while_removing: str, left: list) -> None:
    result = python(
        f"""
import os, signal
from pathlib import Path
import pipelines.cli

def removed_half(folder, **_):
    if folder.exists():
        (folder / "a").unlink()
        {while_removing}

pipelines.cli.rmtree = removed_half
with pipelines.cli.whole_folder(Path("stage")) as out:
    (out / "a").write_text("new")
    {while_writing}
    (out / "c").write_text("new")
""",
        target.parent,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert content(target) in left
    # And what the kill left lying about does not disturb the next run.
    with whole_folder(target) as out:
        assert content(out) == {}
        (out / "a").write_text("again")
    assert content(target) == {"a": "again"}
    assert [path.name for path in target.parent.iterdir()] == ["stage"]


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
@pytest.mark.parametrize(
    "write",
    [
        "(out / 'b').write_bytes(bytes(10**6))",
        # NumPy's own error carries no number.
        "import numpy; numpy.save(out / 'b.npy', numpy.zeros(10**6, numpy.uint8))",
    ],
)
def test_a_disk_that_fills_up(tmp_path: Path, write: str) -> None:
    """A real file system of 256 KiB, of which nothing half-written is left."""
    code = f"""
from pathlib import Path
from pipelines.cli import run, whole_folder
def main():
    with whole_folder(Path("stage")) as out:
        (out / "a").write_bytes(bytes(1000))
        {write}
try:
    run(main)
finally:
    print([str(path) for path in Path(".").iterdir()])
"""
    mount = f'mount -t tmpfs -o size=256k none "{tmp_path}" && cd "{tmp_path}" && exec "$@"'
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare:" in result.stderr or "mount:" in result.stderr:
        pytest.skip("may not mount a file system of its own")
    assert result.returncode == 1
    assert result.stdout == "[]\n"
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: the disk is full. Nothing half-written was kept")
