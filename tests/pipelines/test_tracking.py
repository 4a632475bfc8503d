import os
import subprocess
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import mlflow
import pytest
import yaml

from pipelines import tracking
from pipelines.cli import GrimaceError
from pipelines.params import Tracking


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an MLflow store that the tests share; making one takes seconds."""
    folder, before = tmp_path_factory.mktemp("home"), mlflow.get_tracking_uri()
    with chdir(folder):
        yield folder
    mlflow.set_tracking_uri(before)


@pytest.fixture
def store(home: Path, monkeypatch: pytest.MonkeyPatch) -> Tracking:
    # MLflow sets the variable itself for its children, so it is there from the second use on.
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Tracking(uri=f"sqlite:///{home}/store/mlflow.db")


@pytest.fixture(autouse=True, scope="module")
def _folder(home: Path) -> None:
    (home / "store").mkdir()


def model_file(folder: Path, content: str) -> Path:
    path = folder / "plain" / "model.keras"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    return path


def train(store: Tracking, memory: Path, **tags: str) -> str:
    with tracking.training_run(store, "emotion", "plain on faces", tags, memory) as run:
        return str(run.info.run_id)


# where runs go


def test_each_task_has_its_experiment_and_artefacts_lie_beside_the_store(
    store: Tracking, home: Path
) -> None:
    for task in ("emotion", "landmarks"):
        tracking.connect(store, task)
        experiment = mlflow.get_experiment_by_name(f"grimace-{task}")
        assert experiment.artifact_location == (home / "store/mlartifacts").as_uri()


def test_the_environment_has_precedence(
    store: Tracking, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    tracking.connect(Tracking(uri=f"sqlite:///{home}/not-this.db"), "emotion")
    assert mlflow.get_tracking_uri() == store.uri
    assert not (home / "not-this.db").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    tracking.connect(store, "emotion")
    assert mlflow.get_tracking_uri() == store.uri


def test_a_server_that_does_not_answer(store: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(GrimaceError, match=r"MLflow at http://127\.0\.0\.1:9: .*tracking\.uri"):
        tracking.connect(Tracking(uri="http://127.0.0.1:9"), "emotion")


def test_an_experiment_that_was_deleted(store: Tracking) -> None:
    client = tracking.connect(store, "gone")
    experiment = client.get_experiment_by_name("grimace-gone")
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(GrimaceError, match="deleted experiment 'grimace-gone'"):
        tracking.connect(store, "gone")


def test_two_stages_may_make_the_experiment_at_once(
    store: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking.connect(store, "emotion")
    real, calls = mlflow.get_experiment_by_name, []

    def slow(name: str) -> object:
        calls.append(name)
        return real(name) if len(calls) > 1 else None  # the other stage makes it just now

    monkeypatch.setattr(mlflow, "get_experiment_by_name", slow)
    tracking.connect(store, "emotion")
    assert calls


# the run of a training


def test_a_resumed_training_goes_on_in_its_run(store: Tracking, tmp_path: Path) -> None:
    memory = tmp_path / "deep" / "mlflow_run"
    with (
        pytest.raises(KeyboardInterrupt),
        tracking.training_run(store, "emotion", "plain on faces", {"a": "1"}, memory) as run,
    ):
        raise KeyboardInterrupt
    client = mlflow.MlflowClient()
    assert client.get_run(run.info.run_id).info.status == "FAILED"
    assert train(store, memory, b="2") == run.info.run_id
    again = client.get_run(run.info.run_id)
    assert again.info.status == "FINISHED" and again.info.run_name == "plain on faces"
    assert again.data.tags["a"] == "1" and again.data.tags["b"] == "2"
    assert train(store, tmp_path / "other") != run.info.run_id


def test_a_run_that_is_gone_is_replaced(store: Tracking, tmp_path: Path) -> None:
    memory = tmp_path / "mlflow_run"
    memory.write_text("0" * 32)
    first = train(store, memory)
    assert memory.read_text() == first != "0" * 32
    mlflow.MlflowClient().delete_run(first)
    second = train(store, memory)
    assert second != first and memory.read_text() == second
    memory.write_text("")  # killed while writing
    assert train(store, memory) != second


# the run of a model


def test_the_run_is_found_by_the_models_bytes(store: Tracking, tmp_path: Path) -> None:
    model = model_file(tmp_path, "trained here")
    trained = train(store, tmp_path / "one", **{tracking.MODEL_TAG: tracking.sha256(model)})
    train(store, tmp_path / "two", **{tracking.MODEL_TAG: "another"})
    with tracking.run_of_model(store, "emotion", model) as run:
        assert run.info.run_id == trained
        mlflow.log_metric("val.accuracy", 0.5)
    found = mlflow.MlflowClient().get_run(trained)
    assert found.data.metrics == {"val.accuracy": 0.5} and found.info.status == "FINISHED"
    assert found.info.run_name == "plain on faces" and "grimace.origin" not in found.data.tags


def test_an_unknown_model_gets_one_run_that_says_so(store: Tracking, tmp_path: Path) -> None:
    model = model_file(tmp_path, "from the cache")
    with tracking.run_of_model(store, "emotion", model) as run:
        first = run.info.run_id
    with tracking.run_of_model(store, "emotion", model) as run:
        assert run.info.run_id == first
    found = mlflow.MlflowClient().get_run(first)
    assert found.data.tags[tracking.MODEL_TAG] == tracking.sha256(model)
    assert "restored by DVC" in found.data.tags["grimace.origin"]
    assert found.info.run_name == "plain (restored)"
    with tracking.run_of_model(store, "landmarks", model) as run:  # another task's experiment
        assert run.info.run_id != first


# facts about a run


def test_the_data_version_is_the_lock_files(tmp_path: Path) -> None:
    outs = [
        {"path": "data/augment/emotion", "hash": "md5", "md5": "abc.dir"},
        {"path": "reports/augment/emotion", "hash": "md5", "md5": "def.dir"},
    ]
    with chdir(tmp_path):
        assert tracking.data_version(Path("data/augment/emotion")) == "untracked"
        stages = {"params": {"cmd": "x"}, "augment@emotion": {"cmd": "x", "outs": outs}}
        Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
        assert tracking.data_version(Path("data/augment/emotion/")) == "abc.dir"
        assert tracking.data_version(Path("data/augment")) == "untracked"


def test_provenance(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = {
            f"GIT_{role}_{what}": "x"
            for role in ("AUTHOR", "COMMITTER")
            for what in ("NAME", "EMAIL")
        }
        return subprocess.run(
            ["git", *arguments], env=os.environ | who, capture_output=True, text=True, check=True
        ).stdout.strip()

    with chdir(tmp_path):
        assert tracking.provenance(Path("data"))["grimace.git_commit"] == "no git"
        git("init", "-q")
        Path("code.py").write_text("1")
        git("add", "code.py")
        git("commit", "-qm", "one")
        Path("untracked").touch()
        tags = tracking.provenance(Path("data"))
        assert tags["grimace.git_commit"] == git("rev-parse", "HEAD")
        assert tags["grimace.git_dirty"] == "False"
        assert tags["grimace.data_version"] == "untracked"
        assert tags["grimace.package.mlflow"] == mlflow.__version__
        assert {f"grimace.package.{name}" for name in tracking.PACKAGES} <= tags.keys()
        Path("code.py").write_text("2")
        assert tracking.provenance(Path("data"))["grimace.git_dirty"] == "True"


def test_flat() -> None:
    nested = {"a": {"b": 1, "c": {"d": 0.5}}, "e": 2, "text": "x", "yes": True, "list": [1]}
    assert tracking.flat(nested, "val.") == {"val.a.b": 1.0, "val.a.c.d": 0.5, "val.e": 2.0}


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert tracking.sha256(tmp_path / "file") == known
