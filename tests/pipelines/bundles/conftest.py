import json
import os
from pathlib import Path

import pytest

from pipelines import bundles
from pipelines.bundles import card, sbom

META = {
    "emotion": {"task": "emotion", "size": 16, "channels": 1, "margin": 0.1},
    "landmarks": {"task": "landmarks", "size": 16, "channels": 3, "margin": 0.2},
}
for meta in META.values():
    meta["dataset"] = "synthetic"
META["emotion"]["classes"] = ["a", "b", "c", "d", "e", "f", "g"]
META["landmarks"] |= {"points": 15, "scheme": "kaggle-15"}
SOURCE = {
    "model": "plain",
    "model_sha256": "ab" * 32,
    "mlflow": {"experiment": "grimace-emotion", "tag": "grimace.model_sha256"},
    "dataset": "synthetic",
    "data_version": "0" * 32 + ".dir",
    "git_commit": "1" * 40,
    "validation": {"metric": "accuracy", "value": 0.75},
}
QUANTISATION = {"layers": 3, "float_layers": ["x"]}
VARIANTS = {
    "tflite": {
        "float32": {"file": "float32.tflite", "precision": "float32", "versions": {"schema": 3}},
        "int8": {
            "file": "int8.tflite",
            "precision": "int8",
            "versions": {"schema": 3},
            "quantisation": QUANTISATION,
        },
    },
    "tfjs": {"uint8": {"file": "uint8", "precision": "uint8", "versions": {}}},
    "tensorrt": {"int8": {"file": "int8.onnx", "precision": "int8", "versions": {"opset": 17}}},
}


@pytest.fixture(autouse=True)
def own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder that has no key yet, and none from the environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("GRIMACE_SIGNING_KEY", "GRIMACE_VERIFY_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make(tmp_path: Path):
    """Make a bundle whose graphs are a few random bytes."""

    def make(task: str = "emotion", target: str = "tflite", name: str = "bundle") -> Path:
        bundle = tmp_path / name
        bundle.mkdir()
        for facts in VARIANTS[target].values():
            file = bundle / facts["file"]
            if target == "tfjs":
                file.mkdir()
                file = file / "model.json"
            file.write_bytes(os.urandom(100))
        manifest = bundles.describe(target, VARIANTS[target], META[task], SOURCE)
        manifest["licence"] = {"code": "MIT", "training_data": "MIT.", "allowed_use": "Any."}
        sbom.write(bundle / manifest["sbom"], bundle, manifest)
        card.write(bundle / manifest["card"], manifest)
        (bundle / manifest["golden"]).write_text(json.dumps({}))
        bundles.seal(bundle, manifest)
        return bundle

    return make
