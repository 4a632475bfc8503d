import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

from pipelines.cli import GrimaceError
from pipelines.exporters import tensorrt

MEAN_BOUND, LARGEST_BOUND = 0.01, 0.06
REPOSITORY = Path(tensorrt.__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(landmark_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "tensorrt"
    variants = tensorrt.export(landmark_model.path, out, landmark_model.calibration)
    assert {out / facts["file"] for facts in variants.values()} == set(out.iterdir())
    assert variants["int8"]["versions"] == {"ir": 8, "opset": 17}
    assert variants["int8.sm89"]["versions"]["compute_capability"] == "sm89"
    return out


def test_landmark_graphs_answer_as_keras_does(bundle, landmark_model):
    assert landmark_model.errors(bundle / "float32.onnx").max() < 1e-4
    assert 0 < landmark_model.errors(bundle / "float16.onnx").max() < 5e-3
    errors = landmark_model.errors(bundle / "int8.onnx")
    assert 0 < errors.mean() < MEAN_BOUND
    assert errors.max() < LARGEST_BOUND


@pytest.mark.parametrize("name", ["emotion_model", "simcc_model"])
def test_other_graphs_answer_as_keras_does(request, name, tmp_path, capfd):
    model, out = request.getfixturevalue(name), tmp_path / "out"
    capfd.readouterr()
    tensorrt.export(model.path, out, model.calibration, targets=())
    assert capfd.readouterr() == ("", "")  # the converters' chatter
    assert model.errors(out / "float32.onnx").max() < 1e-4
    assert 0 < model.errors(out / "float16.onnx").max() < 5e-3
    errors = model.errors(out / "int8.onnx")
    assert 0 < errors.mean() < MEAN_BOUND
    assert errors.max() < LARGEST_BOUND
    if name == "simcc_model":  # decoding stands outside the int8 part, and half precision
        nodes = onnx.load(out / "int8.onnx").graph.node
        softmax = [node.op_type for node in nodes].index("Softmax")
        assert not any("Linear" in node.op_type for node in nodes[softmax:])


@pytest.mark.parametrize("bound", [3e-3, 0.0])
def test_layers_stay_in_float_until_the_bound_is_kept(landmark_model, tmp_path, bound):
    strict = replace(landmark_model.calibration, bound=bound)
    variants = tensorrt.export(landmark_model.path, tmp_path / "out", strict, targets=())
    found = variants["int8"]["quantisation"]
    kept = set(found["float_layers"])
    assert set(found["loss_by_ranges"]) == {"minmax", "percentile", "entropy"}
    assert found["ranges"] == min(found["loss_by_ranges"], key=found["loss_by_ranges"].get)
    assert found["loss"] <= bound or len(kept) == found["layers"] - 1 or not bound
    assert found["loss"] < found["loss_all_int8"]
    errors = landmark_model.errors(tmp_path / "out" / "int8.onnx")
    assert errors.mean() == pytest.approx(found["loss"], rel=1e-3)
    graph = onnx.load(tmp_path / "out" / "int8.onnx").graph
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    in_float = {x.name for x in layers if made_by.get(x.input[0]) != "DequantizeLinear"}
    assert in_float == kept and 0 < len(kept) < len(layers)


def test_int8_graph_holds_to_what_tensorrt_takes(bundle):
    graph = onnx.load(bundle / "int8.onnx").graph
    made_by = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(layers) == 6
    for layer in layers:
        pairs = [made_by[name] for name in layer.input[:2]]
        assert [node.op_type for node in pairs] == ["DequantizeLinear"] * 2
        zero_points = [constants[node.input[2]] for node in pairs]
        assert all(zero.dtype == np.int8 and not zero.any() for zero in zero_points)
        assert constants[pairs[1].input[1]].size > 1  # a scale per channel
        assert all(constants[name].dtype == np.float32 for name in layer.input[2:])


def test_engines_are_built_for_the_named_targets(bundle):
    engines = {target: bundle / f"int8.{target}.engine" for target in tensorrt.TARGETS}
    assert set(engines) == {"sm86", "sm89", "sm120"}
    contents = {engine.read_bytes() for engine in engines.values()}
    assert len(contents) == 3
    assert all(len(content) > 10_000 for content in contents)


def test_the_command_builds_one_engine(bundle, tmp_path):
    graph = shutil.copy(bundle / "float32.onnx", tmp_path)
    out = tmp_path / "new" / "float32.engine"
    done = command("--onnx", graph, "--target", "sm89", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "sm89" in done.stdout and "tensorrt_rtx" in done.stdout
    assert list(out.parent.iterdir()) == [out]
    assert out.stat().st_size > (bundle / "int8.sm89.engine").stat().st_size


def test_a_damaged_graph_is_refused_and_leaves_nothing(bundle, tmp_path):
    graph = tmp_path / "cut.onnx"
    graph.write_bytes((bundle / "int8.onnx").read_bytes()[:9000])
    done = command("--onnx", graph, "--target", "sm89", "--out", tmp_path / "cut.engine")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {graph}: tensorrt_rtx cannot read it")
    assert list(tmp_path.iterdir()) == [graph]


def test_an_engine_lands_here_and_never_in_a_signed_bundle(bundle, tmp_path):
    graph = shutil.copy(bundle / "float32.onnx", tmp_path)
    signed = tmp_path / "signed"
    signed.mkdir()
    (signed / "manifest.sig").touch()
    done = command("--onnx", graph, "--target", "sm89", "--out", signed / "a.engine")
    assert done.returncode == 1 and "signed is a signed bundle" in done.stderr
    here = tmp_path / "here"
    here.mkdir()
    done = command("--onnx", graph, "--target", "sm89", cwd=here)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in here.iterdir()] == ["float32.sm89.engine"]


def command(*arguments, cwd=REPOSITORY) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "pipelines.exporters.tensorrt", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        run, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_an_unknown_target_is_answered_with_the_known_ones(bundle):
    trt = tensorrt.find_tensorrt("sm12345")
    with pytest.raises(GrimaceError, match=r"'sm12345'; choose from .*sm89"):
        tensorrt.build_engine(trt, bundle / "int8.onnx", "sm12345")


def test_without_tensorrt_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(tensorrt, "capability_here", lambda: "sm87")
    install = r"`pip install tensorrt` .*python3-libnvinfer` on a Jetson.*tensorrt-rtx-cu13`"
    with pytest.raises(GrimaceError, match=rf"for sm87, the GPU of this machine.*{install}"):
        tensorrt.find_tensorrt("sm87")
    with pytest.raises(
        GrimaceError, match=r"for sm89, which is not this.*install tensorrt-rtx-cu13`"
    ):
        tensorrt.find_tensorrt("sm89")


def test_help_says_what_to_install():
    said = " ".join(command("--help").stdout.split())
    for package in ("pip install tensorrt`", "python3-libnvinfer`", "install tensorrt-rtx-cu13`"):
        assert package in said


def test_full_tensorrt_is_left_alone_for_another_machines_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    assert tensorrt.find_tensorrt("sm12345").__name__ == "tensorrt_rtx"
