import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml

from pipelines import fit, tracking, train
from pipelines.cli import GrimaceError
from pipelines.params import Params, load_params
from pipelines.shards import read_view, version_of

ROOT = Path(__file__).parents[2]
EPOCHS = 4
SHARDS = Path("data/augment/emotion")
LOCK = {"augment@emotion": {"outs": [{"path": SHARDS.as_posix(), "md5": "0a1b.dir"}]}}
SETTINGS = {
    "widths": [4],
    "dropout": 0.3,
    "batch": 8,
    "learning_rate": 0.1,
    "epochs": 9,
    "by_dataset": {"synthetic": {"epochs": EPOCHS}},
    "precision": "float32",
}


def write_project(root: Path) -> None:
    """A repository with a commit, params, a lock file and shards of 40 + 16 tiny images."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["tasks"]["emotion"] |= {"dataset": "synthetic", "size": 16, "channels": 1}
    values["tracking"]["uri"] = "sqlite:///mlflow.db"
    values["train"]["jobs"]["emotion-plain"] |= SETTINGS
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": LOCK}))
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        identity = ["-c", "user.name=x", "-c", "user.email=x"]
        subprocess.run(["git", *identity, *arguments], cwd=root, check=True)
    shards, rng = root / SHARDS, np.random.default_rng(1)
    for side, number in (("train", 40), ("val", 16)):
        (shards / side).mkdir(parents=True)
        emotions = np.where(np.arange(number) % 2, 3, 5)
        images = (
            rng.integers(0, 100, (number, 16, 16, 1)) + 100 * (emotions == 3)[:, None, None, None]
        )
        np.save(shards / side / "ids.npy", np.arange(number).astype(str))
        np.save(shards / side / "emotions.npy", emotions)
        np.save(shards / side / "images-00.npy", images.astype(np.uint8))
    meta = {"task": "emotion", "dataset": "synthetic", "size": 16, "channels": 1, "views": 1}
    (shards / "meta.json").write_text(json.dumps(meta | {"counts": {"train": 40, "val": 16}}))


def start(root: Path, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.train", "--job", "emotion-plain"],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@dataclass(frozen=True)
class Trained:
    root: Path
    params: Params
    first_run: str
    run: mlflow.entities.Run
    said: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """A training that was killed in its third epoch and then ended by the same command."""
    root, before = tmp_path_factory.mktemp("project"), mlflow.get_tracking_uri()
    write_project(root)
    killed = start(root)
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("epoch 2/"):
            break
    killed.kill()
    killed.communicate()
    assert killed.returncode == -9 and not (root / "runs/emotion/plain").exists()
    (journal,) = root.glob("checkpoints/emotion-plain-*/journal.json")
    first_run = json.loads(journal.read_text())["run"]
    for name in (journal.parent.name, "another"):  # whose removals were killed
        (root / f"checkpoints/.{name}.gone/half").mkdir(parents=True)
    ended = start(root)
    said, errors = ended.communicate()
    assert ended.returncode == 0, errors
    with chdir(root), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        params = load_params()
        client = tracking.connect(params.tracking, "emotion")
        runs = mlflow.search_runs(output_format="list")
        assert len(runs) == 1
        yield Trained(root, params, first_run, client.get_run(runs[0].info.run_id), said)
    mlflow.set_tracking_uri(before)


def test_a_killed_training_goes_on_in_the_same_run(trained: Trained) -> None:
    assert "resumed after epoch 2 of 4" in trained.said
    assert trained.run.info.run_id == trained.first_run
    assert trained.run.info.status == "FINISHED"
    assert trained.run.info.run_name == "plain on synthetic"


def test_the_output_is_whole_and_the_checkpoint_gone(trained: Trained) -> None:
    out = trained.root / "runs/emotion/plain"
    names = {"model.keras", "history.csv", "history.png", "job.json", "machine.json"}
    assert {path.name for path in out.iterdir()} == names
    assert list(out.parent.iterdir()) == [out]
    assert list((trained.root / "checkpoints").iterdir()) == []
    assert (out / "history.png").read_bytes().startswith(b"\x89PNG")
    job = json.loads((out / "job.json").read_text())
    assert job["epochs"] == EPOCHS and job["widths"] == [4]
    assert job["data_version"] == version_of(trained.root / SHARDS)


def test_the_run_knows_every_parameter(trained: Trained) -> None:
    job = json.loads((trained.root / "runs/emotion/plain/job.json").read_text())
    logged = dict(trained.run.data.params)
    assert logged.pop("dataset") == "synthetic"
    assert logged == {name: str(value) for name, value in job.items() if name != "task"}


def test_the_run_has_each_epochs_figures_once(trained: Trained) -> None:
    rows = list(csv.DictReader((trained.root / "runs/emotion/plain/history.csv").open()))
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    client = mlflow.MlflowClient()
    for name in set(rows[0]) - {"epoch"}:
        logged = client.get_metric_history(trained.run.info.run_id, name)
        figures = sorted((metric.step, metric.value) for metric in logged)
        assert figures == [(epoch, float(row[name])) for epoch, row in enumerate(rows)]


def test_the_run_says_what_made_it(trained: Trained) -> None:
    tags = trained.run.data.tags
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, cwd=trained.root, capture_output=True, text=True, check=True)
    model = (trained.root / "runs/emotion/plain/model.keras").read_bytes()
    expected = {
        "job": "emotion-plain",
        "task": "emotion",
        "model": "plain",
        "dataset": "synthetic",
        "git_commit": commit.stdout.strip(),
        "git_dirty": "False",
        "data_version": "0a1b.dir",
        "model_sha256": hashlib.sha256(model).hexdigest(),
        "machine.backend": "tensorflow",
        **{f"package.{name}": version(name) for name in ("tensorflow", "keras", "mlflow")},
    }
    assert {name: tags[f"grimace.{name}"] for name in expected} == expected


def test_the_logged_model_answers_as_the_file_does(trained: Trained) -> None:
    import keras

    images = read_view(trained.root / SHARDS, "val").images.astype(np.float32)
    logged = mlflow.pyfunc.load_model(f"runs:/{trained.run.info.run_id}/model")
    schema = logged.metadata.signature
    (given,), (answered,) = schema.inputs.inputs, schema.outputs.inputs
    assert (given.shape, given.type) == ((-1, 16, 16, 1), np.dtype("float32"))
    assert (answered.shape, answered.type) == ((-1, 7), np.dtype("float32"))
    assert np.array_equal(logged.input_example, images[:2])
    model = keras.models.load_model(trained.root / "runs/emotion/plain/model.keras")
    assert np.array_equal(logged.predict(images), model.predict(images, verbose=0))
    assert trained.run.data.metrics["parameters"] == model.count_params()


def test_the_files_are_kept_with_the_run(trained: Trained) -> None:
    files = mlflow.MlflowClient().list_artifacts(trained.run.info.run_id, "training")
    names = {f"training/{name}" for name in ("model.keras", "history.csv", "job.json")}
    assert names <= {file.path for file in files}
    assert (trained.root / "mlartifacts").is_dir()


def test_the_run_is_found_by_its_model(trained: Trained) -> None:
    model = trained.root / "runs/emotion/plain/model.keras"
    with tracking.run_of_model(trained.params.tracking, "emotion", model) as run:
        assert run.info.run_id == trained.run.info.run_id


def test_the_stage_trains_under_jax_on_as_many_devices_as_params_say(tmp_path: Path) -> None:
    write_project(tmp_path)
    values = yaml.safe_load((tmp_path / "params.yaml").read_text())
    values["train"]["devices"] = 2
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    two = "--xla_force_host_platform_device_count=2"
    jax = start(tmp_path, KERAS_BACKEND="jax", JAX_PLATFORMS="cpu", XLA_FLAGS=two)
    _, errors = jax.communicate()
    assert jax.returncode == 0, errors
    out, store = tmp_path / "runs/emotion/plain", f"sqlite:///{tmp_path}/mlflow.db"
    machine = json.loads((out / "machine.json").read_text())
    assert (machine["backend"], machine["devices"]) == ("jax", "cpu, cpu")
    client = mlflow.MlflowClient(tracking_uri=store)
    (experiment,) = (each for each in client.search_experiments() if "emotion" in each.name)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.tags["grimace.machine.backend"] == "jax"
    model = keras.models.load_model(out / "model.keras")  # by TensorFlow, as all that comes after
    images = read_view(tmp_path / SHARDS, "val").images.astype(np.float32)
    (logged,) = (tmp_path / "mlartifacts").rglob("MLmodel")
    answers = mlflow.pyfunc.load_model(str(logged.parent)).predict(images)
    np.testing.assert_allclose(answers, model.predict(images, verbose=0), atol=1e-6)


# trained elsewhere


def command(root: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.chdir(root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sys, "argv", ["train", "--job", "emotion-plain", *arguments])
    train.main()


@pytest.fixture
def came(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `pipelines.fit` makes of the job under JAX, where the rest is not installed."""
    job, folder, blocked = (tmp_path / name for name in ("job.json", "came", "blocked"))
    command(trained.root, monkeypatch, "--write-job", str(job))
    blocked.mkdir()
    for package in ("tensorflow", "mlflow", "dvc", "prefect", "pandas", "pydantic", "psutil"):
        (blocked / f"{package}.py").write_text("raise ImportError('not on this machine')\n")
    jax = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{blocked}:{ROOT}"}
    there = ["--job", job, "--shards", SHARDS, "--out", folder]
    subprocess.run(
        [sys.executable, "-m", "pipelines.fit", *there], env=os.environ | jax, check=True
    )
    return folder


def test_what_comes_back_is_taken_in_as_if_trained_here(
    trained: Trained,
    came: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command(trained.root, monkeypatch, "--take", str(came), "--out", str(out))
    assert "uv run dvc commit -f train@emotion-plain" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {*train.RESULT, "history.png"}
    for name in train.RESULT:
        assert (out / name).read_bytes() == (came / name).read_bytes()
    assert not any((trained.root / "checkpoints").iterdir())
    with tracking.run_of_model(trained.params.tracking, "emotion", out / "model.keras") as run:
        found = mlflow.get_run(run.info.run_id)
    assert found.info.run_id != trained.run.info.run_id
    tags = found.data.tags
    assert tags["grimace.origin"] == "trained elsewhere"
    assert tags["grimace.machine.backend"] == "jax"
    assert tags["grimace.job"] == "emotion-plain" and tags["grimace.data_version"] == "0a1b.dir"
    assert found.data.params == trained.run.data.params
    rows = list(csv.DictReader((came / "history.csv").open()))
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "val_loss")
    assert [metric.value for metric in history] == [float(row["val_loss"]) for row in rows]
    logged = mlflow.pyfunc.load_model(f"runs:/{found.info.run_id}/model")
    images = read_view(trained.root / SHARDS, "val").images.astype(np.float32)
    assert logged.predict(images).shape == (16, 7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 16, "seed": 3}, "not the job emotion-plain .*: .*batch is 16, not 8, seed is 3"),
        ({"data_version": "ffff"}, r"other shards \(ffff\) than are here \([0-9a-f]{64}\)"),
    ],
)
def test_another_jobs_result_is_not_taken(
    change: dict[str, Any],
    words: str,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    came = Path(shutil.copytree(trained.root / "runs/emotion/plain", tmp_path / "came"))
    job = json.loads((came / "job.json").read_text())
    (came / "job.json").write_text(json.dumps(job | change))
    with pytest.raises(GrimaceError, match=words):
        command(trained.root, monkeypatch, "--take", str(came))


def test_files_that_a_job_needs_travel_with_it_and_are_known_by_their_sums(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What comes back may have had them elsewhere, but no others."""
    weights, teacher = tmp_path / "base.weights.h5", tmp_path / "teacher.keras"
    sums = {}
    for file in (weights, teacher):
        file.write_text(file.name)
        sums[file] = hashlib.sha256(file.read_bytes()).hexdigest()
    change = {
        "weights": str(weights),
        "teachers": [{"path": str(teacher), "sha256": sums[teacher]}],
    }
    with changed_job(trained.root, change):
        command(trained.root, monkeypatch, "--write-job", str(tmp_path / "job.json"))
        said = capsys.readouterr().out
        assert all(f"  {file}  {sums[file]}" in said for file in sums)
        written = json.loads((tmp_path / "job.json").read_text())
        assert written["weights_sha256"] == sums[weights]
        came = Path(shutil.copytree(trained.root / "runs/emotion/plain", tmp_path / "came"))
        there = {"weights": "/there/base.h5", "teachers": [{"path": "t", "sha256": sums[teacher]}]}
        (came / "job.json").write_text(json.dumps(written | there))
        command(trained.root, monkeypatch, "--take", str(came), "--out", str(tmp_path / "out"))
        for other in ({"weights_sha256": "0" * 64}, {"teachers": [{"path": "t", "sha256": "1"}]}):
            (came / "job.json").write_text(json.dumps(written | there | other))
            with pytest.raises(GrimaceError, match=f"came is not the job .*{next(iter(other))} is"):
                command(trained.root, monkeypatch, "--take", str(came))
        weights.unlink()
        with pytest.raises(GrimaceError, match="weights: there is no file"):
            command(trained.root, monkeypatch, "--write-job", str(tmp_path / "job.json"))


@contextmanager
def changed_job(root: Path, change: dict[str, Any]) -> Iterator[None]:
    """Other settings of the job in params.yaml, for a while."""
    before = (root / "params.yaml").read_text()
    values = yaml.safe_load(before)
    values["train"]["jobs"]["emotion-plain"] |= change
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    yield
    (root / "params.yaml").write_text(before)


def test_half_a_result_is_not_taken(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came = Path(shutil.copytree(trained.root / "runs/emotion/plain", tmp_path / "came"))
    (came / "model.keras").unlink()
    with pytest.raises(GrimaceError, match=r"came lacks model\.keras; it must be the folder"):
        command(trained.root, monkeypatch, "--take", str(came))


# after a breakdown


def test_the_advice_after_a_breakdown_goes_on_from_its_checkpoint(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a run of its own, which has all epochs."""
    import keras

    out, real, epochs = tmp_path / "out", keras.Model.fit, []

    def full(*arguments: Any, **options: Any) -> Any:
        epochs.append(1)
        if len(epochs) == 2:
            raise MemoryError
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(GrimaceError, match="Make batch smaller"):
        patch.setattr(keras.Model, "fit", full)
        command(trained.root, patch, "--out", str(out))
    assert not out.exists()
    with changed_job(trained.root, {"batch": 4}):
        command(trained.root, monkeypatch, "--out", str(out))
    assert "resumed after epoch 1 of 4" in capsys.readouterr().out
    assert not list((trained.root / "checkpoints").glob("emotion-*"))
    with tracking.run_of_model(trained.params.tracking, "emotion", out / "model.keras") as run:
        found = mlflow.get_run(run.info.run_id)
    assert found.data.params["batch"] == "4"
    assert found.data.tags["grimace.machine.changed"] == "after epoch 1: batch 8 → 4"
    logged = mlflow.MlflowClient().get_metric_history(found.info.run_id, "loss")
    assert [metric.step for metric in logged] == list(range(EPOCHS))


def test_a_checkpoint_that_a_changed_job_leaves_behind_is_named(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The kernel killed the training, so nobody knows that it was for want of memory."""
    killed = RuntimeError("killed")

    def die(epoch: int, row: dict[str, float]) -> None:
        raise killed

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        real = fit.fit
        patch.setattr(fit, "fit", lambda *given: real(*given[:4], die, *given[5:]))
        command(trained.root, patch, "--out", str(tmp_path / "out"))
    (left,) = (trained.root / "checkpoints").glob("emotion-*")
    with changed_job(trained.root, {"batch": 4}):
        command(trained.root, monkeypatch, "--out", str(tmp_path / "out"))
    said = capsys.readouterr().out
    assert f"checkpoints/{left.name} is not used: it is of the job before" in said
    assert "resumed" not in said
    shutil.rmtree(left)


# while MLflow is away


def test_a_training_that_ends_without_mlflow_is_kept_and_told_later(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The address stops answering after two epochs; `test_tracking` has a real server."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    root, out, real = trained.root, tmp_path / "out", fit.fit

    def leaves(*arguments: Any) -> Any:
        *rest, on_epoch, devices = arguments

        def told(epoch: int, row: dict[str, float]) -> None:
            if epoch == 2:
                monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
                mlflow.set_tracking_uri("http://127.0.0.1:9")
            on_epoch(epoch, row)

        return real(*rest, told, devices)

    with monkeypatch.context() as patch:
        patch.setattr(fit, "fit", leaves)
        command(root, monkeypatch, "--out", str(out))
    said = capsys.readouterr().err
    assert f"{out} is whole, but MLflow has not been told all of it" in said
    assert "uv run python -m pipelines.train --deliver" in said
    assert {path.name for path in out.iterdir()} == {*train.RESULT, "history.png"}
    (left,) = (root / "checkpoints/undelivered").iterdir()
    client = mlflow.MlflowClient(trained.params.tracking.uri)
    assert len(client.get_metric_history(left.name, "loss")) == 2

    digest = tracking.sha256(out / "model.keras")
    shutil.rmtree(out)  # as DVC does before it runs a stage again
    command(root, monkeypatch, "--deliver")
    assert not any((root / "checkpoints/undelivered").iterdir())
    found = client.get_run(left.name)
    assert found.info.status == "FINISHED" and found.data.tags[tracking.MODEL_TAG] == digest
    assert len(client.get_metric_history(left.name, "loss")) == EPOCHS
    assert mlflow.pyfunc.load_model(f"runs:/{left.name}/model")


# without training


def test_a_job_names_its_data_and_its_epochs(tmp_path: Path) -> None:
    write_project(tmp_path)
    with chdir(tmp_path):
        params = load_params()
        job = train.resolve("emotion-plain", params, SHARDS)
        assert (job.epochs, job.data_version, job.widths) == (EPOCHS, version_of(SHARDS), (4,))
        meta = json.loads((SHARDS / "meta.json").read_text())
        (SHARDS / "meta.json").write_text(json.dumps(meta | {"dataset": "fer2013"}))
        assert train.resolve("emotion-plain", params, SHARDS).epochs == 9


def test_an_unknown_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--job", "emotion-plane"])
    with pytest.raises(GrimaceError, match=r"no 'emotion-plane'; --job can be .*emotion-plain"):
        train.main()


def test_shards_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--job", "emotion-plain", "--shards", "nowhere"])
    with pytest.raises(GrimaceError, match="nowhere"):
        train.main()


def test_curves_are_drawn(tmp_path: Path) -> None:
    history = pd.DataFrame({"epoch": [1, 2], "loss": [2, 1], "val_loss": [3, 2], "speed": [9, 9]})
    train.draw_history(history, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
