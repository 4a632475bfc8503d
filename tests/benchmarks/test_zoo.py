import json
import sys

import numpy as np
import pytest

from benchmarks import zoo
from pipelines.cli import GrimaceError

VARIANTS = {
    "tflite/float32",
    "tflite/float16",
    "tflite/dynamic",
    "tflite/int8",
    "tfjs/float32",
    "tfjs/float16",
    "tfjs/uint8",
    "tensorrt/float32",
    "tensorrt/float16",
    "tensorrt/int8",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("GRIMACE_TFJS_HOST", "node")  # starts quicker than Chromium


def test_every_network_has_a_setting():
    for name in zoo.NETWORKS:
        task, _, network = name.partition("-")
        assert zoo.SETTING.search(zoo.TASKS[task].NETWORKS[network].__doc__), name
    assert {"emotion-vgg19", "landmarks-vgg19"} < set(zoo.NETWORKS)


def test_a_transfer_network_exports_in_every_variant(monkeypatch):
    monkeypatch.setattr(zoo, "CALIBRATION", 8)
    rows = {row["variant"]: row for row in zoo.try_network("emotion-mobilenet_v2", ["sm89"])}
    assert rows.keys() == VARIANTS | {"tensorrt/int8.sm89"}
    assert all(row["passed"] for row in rows.values()), rows
    assert {row["parameters"] for row in rows.values()} == {2_266_951}
    for name in ("tflite/float32", "tfjs/float32", "tensorrt/float32"):
        assert rows[name]["difference"] < 1e-3 * rows[name]["spread"], name
        assert rows[name]["spread"] > 0.02
    for name in ("tflite/int8", "tfjs/uint8", "tensorrt/int8"):
        assert rows[name]["bytes"] < 0.4 * rows["tflite/float32"]["bytes"], name
    assert rows["tensorrt/int8.sm89"]["why"] == "built ahead of time, not run"


@pytest.mark.parametrize("name", ["emotion-emojify", "landmarks-simcc"])
def test_a_graph_that_tells_no_faces_apart_has_failed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "CALIBRATION", 8)
    built = zoo.build(name, tmp_path / "model.keras")
    assert built.answers.std(0).mean() > 0.02

    class Dull:
        name = "dull"

        def __init__(self, path):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def predict(self, images):
            return np.broadcast_to(built.answers.mean(0), built.answers.shape)

    monkeypatch.setattr(zoo, "load", Dull)
    (tmp_path / "float32.tflite").touch()
    row = zoo._compared(tmp_path / "float32.tflite", "float32", built)
    assert not row.get("passed") and "other answers than Keras gives" in row["why"]
    monkeypatch.setattr(Dull, "predict", lambda self, images: np.full(built.answers.shape, np.nan))
    row = zoo._compared(tmp_path / "float32.tflite", "int8", built)
    assert not row.get("passed") and row["why"] == "not all of its answers are numbers"


def test_what_fails_is_in_the_table_with_the_reason(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise GrimaceError("no such\noperation")

    def differing(trt, graph, target):
        raise GrimaceError("it cannot")

    monkeypatch.setattr(zoo.tfjs, "export", broken)
    monkeypatch.setattr(zoo.tensorrt, "build_engine", differing)
    monkeypatch.setattr(zoo, "machine", lambda: {"processor": "some"})
    real = zoo.tflite.export

    def swapped(path, folder, calibration):
        variants = real(path, folder, calibration)
        variants["int8"]["precision"] = "float32"  # asks more of it than it can keep
        return {"int8": variants["int8"]}

    monkeypatch.setattr(zoo.tflite, "export", swapped)
    out = tmp_path / "zoo"
    monkeypatch.setattr(
        sys,
        "argv",
        ["zoo", "--out", str(out), "--networks", "landmarks-plain", "--engines", "sm89"],
    )
    zoo.main()
    rows = {row["variant"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert rows["tfjs"]["why"] == "not exported: no such operation"
    assert rows["tensorrt/int8.sm89"]["why"] == "not built: it cannot"
    assert "asked" in rows["tflite/int8"]["why"]
    failed = {name for name, row in rows.items() if not row["passed"]}
    assert failed == {"tfjs", "tensorrt/int8.sm89", "tflite/int8"}
    text = (out / "README.md").read_text()
    assert "3 of 5 graphs were exported and run, and 1 of the 2 in float32 answer as Ke" in text
    assert "0 of 1 TensorRT engines were built" in text
    assert "FAILED not exported: no such operation" in text
    assert "FAILED not exported" in capsys.readouterr().out
    assert np.isfinite(rows["tensorrt/float32"]["difference"])
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(sys, "argv", ["zoo", "--out", str(tmp_path / "mine")])
    with pytest.raises(GrimaceError, match="holds no results"):
        zoo.main()
