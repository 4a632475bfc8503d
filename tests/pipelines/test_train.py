import csv
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml

from pipelines import tracking, train
from pipelines.cli import GrimaceError
from pipelines.params import Params, load_params
from pipelines.shards import read_view

ROOT = Path(__file__).parents[2]
EPOCHS = 4
SHARDS = Path("data/augment/emotion")
LOCK = {"augment@emotion": {"outs": [{"path": SHARDS.as_posix(), "md5": "0a1b.dir"}]}}
SETTINGS = {
    "widths": [4],
    "dropout": 0.3,
    "batch": 8,
    "learning_rate": 0.1,
    "epochs": {"default": 9, "synthetic": EPOCHS},
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


def start(root: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
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
        if line.startswith("epoch 3/"):
            break
    killed.kill()
    killed.communicate()
    assert killed.returncode == -9 and not (root / "runs/emotion/plain").exists()
    (memory,) = root.glob("checkpoints/emotion-plain-*/mlflow_run")
    first_run = memory.read_text()
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
    names = {"model.keras", "history.csv", "history.png", "job.json"}
    assert {path.name for path in out.iterdir()} == names
    assert list(out.parent.iterdir()) == [out]
    assert not any((trained.root / "checkpoints").iterdir())
    assert (out / "history.png").read_bytes().startswith(b"\x89PNG")
    job = json.loads((out / "job.json").read_text())
    assert job["epochs"] == EPOCHS and job["data_version"] == "0a1b.dir" and job["widths"] == [4]


def test_the_run_knows_every_parameter(trained: Trained) -> None:
    job = json.loads((trained.root / "runs/emotion/plain/job.json").read_text())
    logged = trained.run.data.params
    assert logged.pop("dataset") == "synthetic"
    assert logged == {
        name: str(tuple(value) if isinstance(value, list) else value)
        for name, value in job.items()
        if name != "task"
    }


def test_the_run_has_each_epochs_figures_once(trained: Trained) -> None:
    rows = list(csv.DictReader((trained.root / "runs/emotion/plain/history.csv").open()))
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    client = mlflow.MlflowClient()
    for name in ("loss", "accuracy", "val_loss", "val_accuracy", "images_per_second"):
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


# without training


def test_a_job_names_its_data_and_its_epochs(tmp_path: Path) -> None:
    write_project(tmp_path)
    with chdir(tmp_path):
        params = load_params()
        job = train.resolve("emotion-plain", params, SHARDS)
        assert (job.epochs, job.data_version, job.widths) == (EPOCHS, "0a1b.dir", (4,))
        meta = json.loads((SHARDS / "meta.json").read_text())
        (SHARDS / "meta.json").write_text(json.dumps(meta | {"dataset": "fer2013"}))
        assert train.resolve("emotion-plain", params, SHARDS).epochs == 9


def test_an_unknown_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--job", "emotion-plane"])
    with pytest.raises(GrimaceError, match=r"no 'emotion-plane'; it has .*emotion-plain"):
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
