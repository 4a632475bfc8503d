import json
import shutil

import pytest

from pipelines.cli import GrimaceError
from pipelines.exporters import tfjs

BOUNDS = {"float32": 1e-4, "float16": 2e-3, "uint8": 0.05}


@pytest.fixture(scope="module")
def bundle(emotion_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "tfjs"
    variants = tfjs.export(emotion_model.path, out)
    assert {out / facts["file"] for facts in variants.values()} == set(out.iterdir())
    assert {name: facts["precision"] for name, facts in variants.items()} == dict(
        zip(BOUNDS, BOUNDS, strict=True)
    )
    return out


@pytest.mark.parametrize("host", ["node", "chromium"])
def test_bundles_answer_as_keras_does(bundle, emotion_model, monkeypatch, host):
    if host == "chromium" and not shutil.which("chromium"):
        pytest.skip("no chromium on PATH")
    monkeypatch.setenv("GRIMACE_TFJS_HOST", host)
    errors = {}
    for name in BOUNDS:
        errors[name] = emotion_model.errors(bundle / name).max()
    assert all(errors[name] < bound for name, bound in BOUNDS.items()), errors
    assert errors["float32"] < errors["float16"] < errors["uint8"]  # so each is what it is called


def test_weights_shrink(bundle):
    sizes = {
        name: sum(shard.stat().st_size for shard in (bundle / name).glob("*.bin"))
        for name in BOUNDS
    }
    assert sizes["float16"] == pytest.approx(sizes["float32"] / 2, rel=0.05)
    assert sizes["uint8"] == pytest.approx(sizes["float32"] / 4, rel=0.1)


def test_graphs_hold_only_operations_that_browsers_know(bundle):
    nodes = json.loads((bundle / "float32" / "model.json").read_text())["modelTopology"]["node"]
    operations = {node["op"] for node in nodes}
    assert "_FusedConv2D" in operations  # batch normalisation and ReLU6 are folded in
    assert not {op for op in operations if op.startswith(("_Mkl", "_ITEX", "FusedBatchNorm"))}


def test_a_failing_converter_shows_its_last_words(emotion_model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(GrimaceError, match=r"(?s)TF.js export of .*last words.*Not a directory"):
        tfjs.export(emotion_model.path, tmp_path / "file" / "tfjs")
