import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from models.schemes import EMOTIONS, IBUG_68
from pipelines import bundles, export
from pipelines.bundles import golden
from pipelines.heldout import faces_of_side
from pipelines.runtimes import load
from pipelines.tracking import sha256

COMMON = {"README.md", "golden.json", "sbom.cdx.json"}
FILES = {
    "tflite": {f"{name}.tflite" for name in ("float32", "float16", "dynamic", "int8")},
    "tfjs": {
        f"{weights}/{name}"
        for weights in ("float32", "float16", "uint8")
        for name in ("model.json", "group1-shard1of1.bin")
    },
    "tensorrt": {"float32.onnx", "float16.onnx", "int8.onnx", "int8.sm89.engine"},
}


@pytest.mark.parametrize("task", ["emotion", "landmarks"])
@pytest.mark.parametrize("target", FILES)
def test_a_bundle_is_signed_and_whole(exported, task, target):
    bundle = exported.root / "deploy" / task / target
    with exported.inside():
        manifest = bundles.read(bundle)
    bundles.check_files(bundle, manifest)
    assert {file["path"] for file in manifest["files"]} == FILES[target] | COMMON
    assert {facts["file"] for facts in manifest["variants"].values()} == {
        name.split("/")[0] for name in FILES[target]
    }
    source = manifest["source"]
    selected = json.loads((exported.root / f"reports/select/{task}.json").read_text())
    assert source["model_sha256"] == sha256(exported.root / f"deploy/candidate/{task}.keras")
    assert (source["model"], source["dataset"]) == (selected["candidate"], "synthetic")
    assert source["validation"]["value"] == selected["value"]
    assert manifest["licence"]["training_data"] == "MIT, as this repository."
    assert manifest["licence"]["allowed_use"].startswith("Any,")


@pytest.mark.parametrize("task", ["emotion", "landmarks"])
def test_the_manifest_says_what_goes_in_and_comes_out(exported, task):
    bundle = exported.root / "deploy" / task / "tflite"
    manifest = json.loads((bundle / "manifest.json").read_text())
    taken, given = manifest["input"], manifest["output"]
    with load(bundle / "int8.tflite") as model:
        assert tuple(taken["shape"]) == model.input_shape
        assert tuple(given["shape"]) == model.output_shape
    settings = exported.params.tasks.named(task)
    assert taken["shape"] == [settings.size, settings.size, settings.channels]
    assert taken["crop"]["margin"] == settings.margin
    if task == "emotion":
        assert given["labels"] == list(EMOTIONS)
    else:
        assert given["scheme"] == "ibug-68"
        assert given["mirror"] == list(IBUG_68.mirror)


@pytest.mark.parametrize("task", ["emotion", "landmarks"])
def test_golden_answers_are_those_of_the_trained_model(exported, task):
    images, outputs = golden.read(exported.root / "deploy" / task / "tfjs" / "golden.json")
    with load(exported.root / f"deploy/candidate/{task}.keras") as model:
        np.testing.assert_allclose(outputs, model.predict(images), rtol=1e-5, atol=1e-6)


def test_ranges_come_from_training_and_choices_from_validation_as_deployment_crops(
    exported, monkeypatch
):
    seen = []

    def record(model: Path, out: Path, calibration, *_: object):
        seen.append(calibration)
        (out / "tflite").mkdir()
        (out / "tflite" / "x.tflite").write_text("graph")
        return {"tflite": {"x": {"file": "x.tflite", "precision": "float32"}}}

    monkeypatch.setattr(export, "convert", record)
    monkeypatch.setattr(export, "whole_folder", lambda _: scratch_folder(exported.root))
    exported.call(export.main, "--task", "emotion")

    monkeypatch.chdir(exported.root)
    task, settings = exported.params.tasks.emotion, exported.params.export
    sides = {side: faces_of_side("emotion", task, side) for side in ("train", "val", "test")}
    (calibration,) = seen
    assert calibration.images.dtype == np.float32
    assert len(calibration.images) == settings.calibration
    assert len(calibration.trial) == min(settings.trial, len(sides["val"].ids))

    def found(images, side: str) -> np.ndarray:
        among = sides[side].images
        return np.array([(among == image).all((1, 2, 3)).any() for image in images])

    assert found(calibration.images, "train").all() and found(calibration.trial, "val").all()
    for images, others in ((calibration.images, "val test"), (calibration.trial, "train test")):
        assert not any(found(images, side).any() for side in others.split())
    rows = [
        (sides["train"].images == image).all((1, 2, 3)).argmax() for image in calibration.images
    ]
    counts = np.bincount(sides["train"].emotions[rows], minlength=7)
    assert counts.max() - counts.min() <= 1
    assert calibration.bound == pytest.approx(0.5 * 60.0)


@contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    with TemporaryDirectory(dir=root) as folder:
        yield Path(folder)


def test_points_lost_are_those_expected_by_the_float_model():
    exact = np.array([[0.6, 0.4], [0.2, 0.8], [0.5, 0.5], [0.9, 0.1]], np.float32)
    same = exact + np.array([[0.05, -0.05]])
    assert export.points_lost(exact, same) == 0
    turned = np.array([[0.4, 0.6], [0.2, 0.8], [0.4, 0.6], [0.9, 0.1]], np.float32)
    assert export.points_lost(exact, turned) == pytest.approx(100 * 0.2 / 4)


def test_the_risen_nme_is_relative(exported, monkeypatch):
    monkeypatch.chdir(exported.root)
    faces = faces_of_side("landmarks", exported.params.tasks.landmarks, "val")
    shift = np.float32([0.01, 0])
    before, after = faces.landmarks + shift, faces.landmarks + 3 * shift
    assert export.nme_risen(faces, before, after) == pytest.approx(2, rel=1e-4)


def test_fewer_faces_than_asked_for_are_all_taken(exported, monkeypatch):
    monkeypatch.chdir(exported.root)
    task = exported.params.tasks.landmarks
    whole = faces_of_side("landmarks", task, "train")
    np.testing.assert_array_equal(
        faces_of_side("landmarks", task, "train", limit=10_000).ids, whole.ids
    )
    few = faces_of_side("landmarks", task, "train", limit=5)
    assert len(few.ids) == 5 and set(few.ids) <= set(whole.ids)
