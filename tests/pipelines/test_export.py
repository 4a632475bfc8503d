import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from models.schemes import EMOTIONS, IBUG_68
from pipelines import export
from pipelines.evaluate import faces_of_side
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


def test_calibration_sees_training_faces_only_as_deployment_crops_them(exported, monkeypatch):
    seen = []

    def record(model: Path, bundle: Path, calibration: np.ndarray, *_: object) -> None:
        seen.append(calibration)
        (bundle / "file").write_text(bundle.name)

    monkeypatch.setattr(export, "TARGETS", dict.fromkeys(FILES, record))
    monkeypatch.setattr(export.tensorrt, "export", record)
    monkeypatch.setattr(export, "whole_folder", lambda _: scratch_folder(exported.root))
    exported.call(export.main, "--task", "emotion")

    monkeypatch.chdir(exported.root)
    task = exported.params.tasks.emotion
    train = faces_of_side("emotion", task, "train").images
    others = [faces_of_side("emotion", task, side).images for side in ("val", "test")]
    assert len(seen) == 3
    for calibration in seen:
        assert calibration.dtype == np.float32
        assert calibration.shape == (exported.params.export.calibration, *train.shape[1:])
        assert all((train == image).all((1, 2, 3)).any() for image in calibration)
        assert not any(
            (other == image).all((1, 2, 3)).any() for other in others for image in calibration
        )


@contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    with TemporaryDirectory(dir=root) as folder:
        yield Path(folder)


def test_fewer_faces_than_asked_for_are_all_taken(exported, monkeypatch):
    monkeypatch.chdir(exported.root)
    task = exported.params.tasks.landmarks
    whole = faces_of_side("landmarks", task, "train")
    np.testing.assert_array_equal(
        faces_of_side("landmarks", task, "train", limit=10_000).ids, whole.ids
    )
    few = faces_of_side("landmarks", task, "train", limit=5)
    assert len(few.ids) == 5 and set(few.ids) <= set(whole.ids)
