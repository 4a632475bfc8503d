"""A model's descent back to raw data, and the one command that makes it again."""

import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from pipelines import lineage, reproduce
from pipelines.cli import GrimaceError

ROOT = Path(__file__).parents[2]
PRODUCE = f"python {ROOT}/tests/produce.py"


@pytest.fixture
def registered(shop, monkeypatch: pytest.MonkeyPatch):
    """A champion made by DVC from code with a change that was not committed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    Repo.init()
    report = {"dataset": "folder", "archive": "faces.zip", "sha256": "ab" * 32, "examples": 720}
    Path("report.json").write_text(json.dumps(report))
    archive = Path("data/archives/folder-versions/0001/happy.txt")
    download = f"test -f {archive} && {PRODUCE} --data && mkdir -p reports/download"
    stages = {
        "download": {
            "foreach": ["folder"],
            "do": {
                "cmd": f"{download} && cp report.json reports/download/folder.json",
                "deps": ["report.json"],
                "outs": [
                    "data/clean",
                    "data/split",
                    "data/augment",
                    "reports/download/folder.json",
                ],
            },
        },
        "verify": {
            "foreach": ["emotion"],
            "do": {
                "cmd": f"{PRODUCE} --right $(cat right)",
                "deps": ["right", "data/clean/folder", "data/split"],
                "outs": ["deploy", "reports/verify", "reports/evaluate", "reports/select"],
            },
        },
    }
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    Path("right").write_text("0.6\n")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "stages"], check=True)
    Path("right").write_text("0.7\n")
    Path("pipelines").mkdir()
    Path("pipelines/untracked.py").write_text("NEW = True\n")
    archive.parent.mkdir(parents=True)
    archive.write_text("a version that `watch` has made\n")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True)
    number = shop.register()
    shop.judge()
    shop.store().promote(number, "Ada", "the first")
    return shop


def test_lineage_and_reproduction(registered, monkeypatch, capsys, tmp_path_factory):
    folder = registered.store().fetch(1)
    lines = lineage.lines_of(folder, "emotion")
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    assert lines[0] == f"code       commit {commit}, with uncommitted.patch"
    assert lines[1] == f"raw data   folder: archive faces.zip, sha256 {'ab' * 32}, examples 720"
    lock = yaml.safe_load(Path("dvc.lock").read_text())["stages"]
    outs = {out["path"]: out["md5"] for row in lock.values() for out in row["outs"]}
    told = [line.split() for line in lines[2:]]
    assert [words[0] for words in told] == ["download@folder"] * 4 + ["verify@emotion"] * 4
    assert {words[1]: words[3] for words in told} == outs

    # The printed command, as it stands but for where to.
    words = lineage.command("emotion", 1).split()
    assert words[:5] == ["uv", "run", "python", "-m", "pipelines.reproduce"]
    into = tmp_path_factory.mktemp("again") / "here"
    monkeypatch.setattr(sys, "argv", ["reproduce", *words[5:], "--into", str(into)])
    Path("right").write_text("0.9\n")  # what is here now does not matter
    reproduce.main()
    said = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in said if "@" in line.split()[1:2][0]} == {"same"}
    model = (into / "deploy/candidate/emotion.keras").read_bytes()
    assert model == (folder / "data/model.keras").read_bytes()
    assert hashlib.sha256(model).hexdigest() in registered.store().blessing(1)["files"].values()
    assert said[-1].startswith("accuracy on test: 70.") and said[-1].endswith("made again")
    assert (into / "pipelines/untracked.py").read_text() == "NEW = True\n"

    with pytest.raises(GrimaceError, match="is there already; name another folder"):
        reproduce.main()
    # What training may change, and what it may not.
    for path, wrong in (
        ("deploy", []),
        ("reports/download/folder.json", []),
        ("data/clean", ["data/clean is not the same"]),
    ):
        made = (into / "dvc.lock").read_text()
        (into / "dvc.lock").write_text(made.replace(outs[path], "0"))
        lines, found = reproduce.compare(folder, into, "emotion")
        assert [line.split()[2] for line in lines if line.startswith("other")] == [path]
        assert found == wrong
        (into / "dvc.lock").write_text(made)
    worse = json.loads((into / "reports/verify/emotion/test.json").read_text()) | {"accuracy": 0.2}
    (into / "reports/verify/emotion/test.json").write_text(json.dumps(worse))
    _, found = reproduce.compare(folder, into, "emotion")
    assert found == ["accuracy on test lies outside of the registered interval"]


def test_the_archive_folder_is_handed_on(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRIMACE_ARCHIVES", "my faces")
    words = shlex.split(lineage.command("emotion", 1))
    assert words[0] == f"GRIMACE_ARCHIVES={tmp_path}/my faces"
    (tmp_path / "dvc").mkdir()
    (tmp_path / "dvc/__init__.py").touch()
    (tmp_path / "dvc/__main__.py").write_text(
        "import os; open('seen', 'w').write(os.environ['GRIMACE_ARCHIVES'])"
    )
    (tmp_path / "into").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reproduce.make(Path("into"), "verify@emotion")  # a DVC that only looks around
    assert Path("into/seen").read_text() == f"{tmp_path}/my faces"


def test_which_version_is_meant(shop):
    store = shop.store()
    with pytest.raises(GrimaceError, match="no champion yet; name a --version"):
        reproduce.find(store, None)
    shop.produce(0.7)
    shop.register()
    sha256 = store.sha256(1)
    assert reproduce.find(store, sha256[:12]) == 1
    with pytest.raises(GrimaceError, match="no version whose SHA-256 begins with 000"):
        reproduce.find(store, "000")
    store.promote(1, "Ada", "") if shop.judge()["blessed"] else None
    assert reproduce.find(store, None) == 1


def test_ancestry_goes_from_raw_data_on():
    def stage(deps: list[str], outs: list[str]) -> dict:
        return {"deps": [{"path": p} for p in deps], "outs": [{"path": p} for p in outs]}

    lock = {
        "stages": {
            "verify@x": stage(["deploy/x", "data/split/a", "pipelines/verify.py"], ["reports/x"]),
            "export@x": stage(["deploy/candidate/x.keras"], ["deploy/x"]),
            "select@x": stage(["runs/x"], ["deploy/candidate/x.keras"]),
            "train@x-one": stage(["data/split"], ["runs/x/one"]),
            "train@x-two": stage(["data/split"], ["runs/x/two"]),
            "split@a": stage(["data/raw/a"], ["data/split/a"]),
            "download@a": stage([], ["data/raw/a"]),
            "train@y": stage(["data/raw/b"], ["runs/y/one"]),
        }
    }
    found = lineage.ancestry(lock, "verify@x")
    assert set(found) == set(lock["stages"]) - {"train@y"}
    for before, after in (
        ("download@a", "split@a"),
        ("split@a", "train@x-two"),
        ("train@x-one", "select@x"),
        ("select@x", "export@x"),
        ("export@x", "verify@x"),
    ):
        assert found.index(before) < found.index(after)
    with pytest.raises(GrimaceError, match="has no stage 'verify@z'"):
        lineage.ancestry(lock, "verify@z")
