import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, chdir, suppress
from pathlib import Path
from urllib.request import urlopen

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


def train(store: Tracking, folder: Path, **tags: str) -> str:
    with tracking.training_run(store, "emotion", "plain on faces", tags, folder) as journal:
        return str(journal.run_id)


def logged(run_id: str, name: str) -> list[tuple[int, float]]:
    """Every figure of that name that the run shows, with its step."""
    found = mlflow.MlflowClient().get_metric_history(run_id, name)
    return sorted((metric.step, metric.value) for metric in found)


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
    folder = tmp_path / "deep" / "training"
    with (
        pytest.raises(KeyboardInterrupt),
        tracking.training_run(store, "emotion", "plain on faces", {"a": "1"}, folder) as journal,
    ):
        raise KeyboardInterrupt
    client, run_id = mlflow.MlflowClient(), str(journal.run_id)
    assert client.get_run(run_id).info.status == "FAILED"
    with tracking.training_run(store, "emotion", "plain on faces", {"b": "2"}, folder) as journal:
        assert journal.run_id == run_id
        assert client.get_run(run_id).info.status == "RUNNING"
    again = client.get_run(run_id)
    assert again.info.status == "FINISHED" and again.info.run_name == "plain on faces"
    assert again.data.tags["a"] == "1" and again.data.tags["b"] == "2"
    assert "mlflow.user" in again.data.tags
    assert train(store, tmp_path / "other") != run_id


def test_a_run_that_has_ended_and_was_told_all_is_left_alone(
    store: Tracking, tmp_path: Path
) -> None:
    """Killed between the delivery and the removal of its journal."""
    with tracking.training_run(store, "emotion", "plain on faces", {}, tmp_path) as journal:
        journal.add(metrics={"loss": 0.5}, step=0)
    assert tracking.Journal(store, tmp_path).deliver()
    assert mlflow.MlflowClient().get_run(str(journal.run_id)).info.status == "FINISHED"


def test_the_run_is_told_all_kinds_of_things(store: Tracking, tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    (tmp_path / "result/history.csv").write_text("epoch\n1\n")
    with tracking.training_run(store, "emotion", "plain on faces", {}, tmp_path) as journal:
        journal.add(parameters={"batch": "64"})
        for step, loss in ((0, 0.5), (1, 0.25), (0, 0.5)):  # the first again, as after a resume
            journal.add(metrics={"loss": loss}, step=step)
        journal.add(files="result", place="training")
        assert journal.pending == 0
    run_id = str(journal.run_id)
    assert mlflow.MlflowClient().get_run(run_id).data.params == {"batch": "64"}
    assert logged(run_id, "loss") == [(0, 0.5), (1, 0.25)]
    (file,) = mlflow.MlflowClient().list_artifacts(run_id, "training")
    assert file.path == "training/history.csv"


def test_told_twice_is_shown_once(store: Tracking, tmp_path: Path) -> None:
    """Killed between telling and noting that it was told."""
    with tracking.training_run(store, "emotion", "plain on faces", {}, tmp_path) as journal:
        journal.add(metrics={"loss": 0.5}, step=0)
        journal.state["told"] -= 1
        journal.add(metrics={"loss": 0.25}, step=1)
    assert logged(str(journal.run_id), "loss") == [(0, 0.5), (1, 0.25)]


def test_a_run_that_is_gone_is_replaced_and_told_all(store: Tracking, tmp_path: Path) -> None:
    with tracking.training_run(store, "emotion", "plain on faces", {"a": "1"}, tmp_path) as journal:
        journal.add(metrics={"loss": 0.5}, step=0)
    first = str(journal.run_id)
    mlflow.MlflowClient().delete_run(first)
    with tracking.training_run(store, "emotion", "plain on faces", {"a": "1"}, tmp_path) as journal:
        journal.add(metrics={"loss": 0.25}, step=1)
    second = str(journal.run_id)
    assert second != first
    assert logged(second, "loss") == [(0, 0.5), (1, 0.25)]
    assert mlflow.MlflowClient().get_run(second).data.tags["a"] == "1"


# a server that comes and goes


class Server:
    """A real MLflow server on loopback, with one worker and a store that outlives it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        artefacts = ["--artifacts-destination", str(self.folder / "artefacts")]
        inherited = {name: text for name, text in os.environ.items() if "MLFLOW" not in name}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *where, *store, *artefacts],
            env=inherited | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while True:
            with suppress(OSError), urlopen(f"{self.uri}/health", timeout=5):
                return
            assert self.process.poll() is None, "the server ended"
            time.sleep(0.1)

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End it and its worker as a crash would."""
        if self.process:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    server = Server(tmp_path)
    try:
        yield server
    finally:
        server.kill()


def test_training_outlives_its_tracking_server(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, settings = tmp_path / "training", Tracking(uri=server.uri)
    (folder / "result").mkdir(parents=True)
    (folder / "result/history.csv").write_text("epoch\n1\n")

    def run() -> AbstractContextManager[tracking.Journal]:
        return tracking.training_run(settings, "emotion", "plain on faces", {"a": "1"}, folder)

    with pytest.raises(GrimaceError, match="MLflow at"), run():
        pass  # it has not begun: an address that nobody answers at is an error
    server.start()
    with pytest.raises(KeyboardInterrupt), run() as journal:
        journal.add(metrics={"loss": 0.5}, step=0)
        assert journal.pending == 0
        server.signal(signal.SIGSTOP)
        journal.add(metrics={"loss": 0.4}, step=1)
        assert journal.pending == 1
        server.signal(signal.SIGCONT)  # and it reads what it was told before
        journal.add(metrics={"loss": 0.3}, step=2)
        assert journal.pending == 0
        server.kill()
        for step, loss in ((3, 0.2), (4, 0.15)):
            journal.add(metrics={"loss": loss}, step=step)
        assert journal.pending == 2
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert said.count("tracking: not delivered, tried again later") == 2
    assert said.count("tracking: all is delivered now") == 1

    with run() as journal:  # in another process, as it were; still nobody answers
        assert journal.pending == 2
        journal.add(files="result", place="training")
    assert journal.pending == 4  # with the status
    server.start()
    assert tracking.Journal(settings, folder).deliver()
    run_id = str(journal.run_id)
    assert logged(run_id, "loss") == [(0, 0.5), (1, 0.4), (2, 0.3), (3, 0.2), (4, 0.15)]
    found = mlflow.MlflowClient().get_run(run_id)
    assert found.info.status == "FINISHED" and found.data.tags["a"] == "1"
    (file,) = mlflow.MlflowClient().list_artifacts(run_id, "training")
    assert file.path == "training/history.csv"


# the run of a model


def test_the_run_is_found_by_the_models_bytes(store: Tracking, tmp_path: Path) -> None:
    model = model_file(tmp_path, "trained here")
    trained = train(store, tmp_path / "one", **{tracking.MODEL_TAG: tracking.sha256(model)})
    train(store, tmp_path / "two", **{tracking.MODEL_TAG: "another"})
    with tracking.run_of_model(store, "emotion", model) as run:
        assert run.info.run_id == trained
        mlflow.log_metric("val/accuracy", 0.5)
    found = mlflow.MlflowClient().get_run(trained)
    assert found.data.metrics == {"val/accuracy": 0.5} and found.info.status == "FINISHED"
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
    assert found.info.run_name == f"plain {tracking.sha256(model)[:8]} (restored)"
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
        Path("dvc.lock").write_text("stages: {}\n")
        git("add", "code.py", "dvc.lock")
        git("commit", "-qm", "one")
        Path("untracked").touch()
        Path("dvc.lock").write_text("stages: {}  # as a run leaves it\n")
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
