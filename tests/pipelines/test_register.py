"""Registering and judging what the stages really write."""

import json
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import mlflow
import numpy as np
import pytest
import yaml

from pipelines import gate, register, registry
from pipelines.cli import GrimaceError
from pipelines.heldout import faces_of_side
from pipelines.registry import Registry


@pytest.fixture
def workspace(verified, tmp_path, noted):
    """A copy of the world with what `verify` left, in a Git repository."""
    for name in ("params.yaml", "data", "deploy", "reports", "runs", "mlflow.db"):
        source = verified.root / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    params = yaml.safe_load((tmp_path / "params.yaml").read_text())
    params["tracking"]["uri"] = f"sqlite:///{tmp_path}/mlflow.db"
    params["gate"] |= {"resamples": 1000}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    with chdir(tmp_path):
        noted("reports/verify/emotion", "reports/evaluate/emotion", "data/clean/synthetic")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", "start"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    return type(verified)(tmp_path, register.load_params(tmp_path / "params.yaml"), verified.faces)


def test_from_verified_candidate_to_a_champion_that_mlflow_loads(workspace):
    workspace.call(register.main, "--task", "emotion")
    workspace.call(gate.main, "--task", "emotion")
    with workspace.inside():
        blessing = json.loads(Path("reports/gate/emotion/blessing.json").read_text())
        rows = {row["name"]: row for row in blessing["gates"]}
        for kind in ("budget", "golden", "size"):
            assert {name for name in rows if name.startswith(f"{kind}: t")} >= {
                f"{kind}: {name}" for name in ("tflite/int8", "tfjs/uint8", "tensorrt/int8")
            }
        assert "size: tensorrt/int8.sm89.engine" in rows
        not_computed = [row for row in rows.values() if "not computed" in row["why"]]
        # On a score of faces no slice is large enough to be judged.
        assert {row["name"] for row in not_computed} <= {"worst slice"}
        for name in ("bytes", "records", "unseen faces"):
            assert rows[name]["passed"]
        # The loosest that `verify` may be told, whatever this small world tells it.
        assert rows["budget: tflite/int8"]["bound"] == 1.5
        assert "of drawn faces, 1 of real ones" in rows["budget: tflite/int8"]["why"]
        scores = json.loads(Path("reports/verify/emotion/test.json").read_text())
        assert rows["floor: accuracy"]["value"] == pytest.approx(scores["accuracy"])

        store = Registry(workspace.params.tracking, "emotion")
        version = store.version(1)
        assert len(version.description) <= 5000
        assert "| tensorrt/int8 | onnxruntime" in version.description
        loaded = mlflow.keras.load_model("models:/grimace-emotion/1")
        settings = workspace.params.tasks.emotion
        faces = faces_of_side("emotion", settings, "test")
        saved = np.load(store.fetch(1) / "answers.npz")
        answers = loaded.predict(faces.images.astype(np.float32), verbose=0)
        assert answers == pytest.approx(saved["outputs"], abs=1e-5)
        assert saved["ids"].tolist() == faces.ids.tolist()
        asked = gate.ask_anew(store.fetch(1) / registry.MODEL, faces, settings, settings, "emotion")
        assert asked == pytest.approx(saved["outputs"], abs=1e-5)


def test_what_is_missing_is_named(workspace, monkeypatch):
    monkeypatch.chdir(workspace.root)
    monkeypatch.setattr(sys, "argv", ["gate", "--task", "landmarks"])
    with pytest.raises(GrimaceError, match=r"not registered; run `python -m pipelines\.register"):
        gate.main()
    shutil.rmtree("reports/verify/landmarks")
    with pytest.raises(GrimaceError, match=r"budgets\.json is missing; run `dvc repro verify`"):
        register.register("landmarks", workspace.params)
    shutil.rmtree("deploy/landmarks")
    with pytest.raises(GrimaceError, match="run `dvc repro export`"):
        register.register("landmarks", workspace.params)
    assert registry.bytes_of("emotion").keys() >= {"model.keras", "tflite/int8.tflite"}
