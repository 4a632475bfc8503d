import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from models.schemes import EMOTIONS, IBUG_68
from pipelines import export
from pipelines.runtimes import load

FILES = {
    "tflite": {"float32.tflite", "int8.tflite"},
    "tfjs": {
        f"{weights}/{name}"
        for weights in ("float32", "float16", "uint8")
        for name in ("model.json", "group1-shard1of1.bin")
    },
    "tensorrt": {"float32.onnx", "int8.onnx", "int8.sm89.engine"},
}


@pytest.mark.parametrize("task", ["emotion", "landmarks"])
@pytest.mark.parametrize("target", FILES)
def test_the_manifest_lists_every_file(exported, task, target):
    bundle = exported.root / "deploy" / task / target
    manifest = json.loads((bundle / "manifest.json").read_text())
    listed = {file["path"]: file for file in manifest["files"]}
    there = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(listed) == there - {"manifest.json"} == FILES[target]
    for name, file in listed.items():
        content = (bundle / name).read_bytes()
        assert file["bytes"] == len(content) > 0
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
    candidate = exported.root / "deploy" / "candidate" / f"{task}.keras"
    assert manifest["source"] == {
        "model_sha256": hashlib.sha256(candidate.read_bytes()).hexdigest(),
        "dataset": "synthetic",
    }
    assert (manifest["schema"], manifest["task"], manifest["target"]) == (1, task, target)


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
    assert (taken["dtype"], taken["range"]) == ("float32", [0, 255])
    assert taken["crop"]["margin"] == settings.margin
    if task == "emotion":
        assert taken["colour"].startswith("grey")
        assert given["meaning"] == "probabilities"
        assert given["labels"] == list(EMOTIONS)
    else:
        assert taken["colour"] == "RGB"
        assert "[0, 1] of the crop" in given["meaning"]
        assert given["scheme"] == "ibug-68"
        assert given["mirror"] == list(IBUG_68.mirror)


def test_a_scheme_of_fewer_points_has_its_own_mirror(tmp_path):
    meta = {"task": "landmarks", "size": 16, "channels": 1, "margin": 0.1, "dataset": "kaggle"}
    output = export.describe(
        tmp_path, "tflite", meta | {"points": 15, "scheme": "kaggle-15"}, "0" * 64
    )["output"]
    assert output["shape"] == [15, 2]
    assert len(output["mirror"]) == 15


def test_calibration_sees_training_images_only(exported, tmp_path, monkeypatch):
    """The whole stage, but for the converters, on a machine that has no other side."""
    shards = tmp_path / "data" / "augment" / "emotion"
    shutil.copytree(exported.root / "data" / "augment" / "emotion", shards)
    shutil.rmtree(shards / "val")
    shutil.copytree(exported.root / "deploy" / "candidate", tmp_path / "deploy" / "candidate")
    shutil.copy(exported.root / "params.yaml", tmp_path)
    seen = []

    def record(model: Path, bundle: Path, calibration: np.ndarray, *_: object) -> None:
        seen.append(calibration)
        (bundle / "file").write_text(bundle.name)

    monkeypatch.setattr(export, "TARGETS", dict.fromkeys(FILES, record))
    monkeypatch.setattr(export.tensorrt, "export", record)
    type(exported)(tmp_path, exported.params, []).call(export.main, "--task", "emotion")

    train = np.load(shards / "train" / "images-00.npy")
    assert len(seen) == 3
    for calibration in seen:
        assert calibration.dtype == np.float32
        assert calibration.shape == (exported.params.export.calibration, *train.shape[1:])
        rows = [np.flatnonzero((train == image).all((1, 2, 3)))[0] for image in calibration]
        assert rows == sorted(rows)
        assert (rows[0], rows[-1]) == (0, len(train) - 1)  # from one end to the other
        assert max(np.diff(rows)) <= np.ceil(len(train) / len(rows))
    manifests = sorted((tmp_path / "deploy" / "emotion").glob("*/manifest.json"))
    assert [json.loads(path.read_text())["files"][0]["path"] for path in manifests] == ["file"] * 3


def test_fewer_images_than_asked_for_are_all_taken(exported):
    shards = exported.root / "data" / "augment" / "landmarks"
    train = np.load(shards / "train" / "images-00.npy")
    np.testing.assert_array_equal(export.calibration_images(shards, 10_000), train)
