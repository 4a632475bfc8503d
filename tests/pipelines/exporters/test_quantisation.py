from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipelines.exporters.quantisation import Calibration, spare_layers

LAYERS = ["a", "b", "c", "d", "e"]


def save(path: Path, error: float) -> Path:
    """A graph that answers the mean of the picture, and so much more."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["image"], ["mean"], axes=[1, 2], keepdims=0),
            helper.make_node("Add", ["mean", "error"], ["answer"]),
        ],
        "mean",
        [value("image", TensorProto.FLOAT, ["n", 4, 4, 1])],
        [value("answer", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(np.array([error], np.float32), "error")],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


@pytest.fixture
def search(tmp_path):
    """Search among graphs whose error is a function of the layers left in float."""
    images = np.random.default_rng(1).uniform(0, 255, (20, 4, 4, 1)).astype(np.float32)
    wanted = images.mean((1, 2))

    def search(error, bound: float):
        made = []

        def quantise(kept):
            made.append(save(tmp_path / f"{len(made)}.onnx", error(set(kept))))
            return made[-1]

        calibration = Calibration(
            images, images, lambda answers: float(np.abs(answers - wanted).mean()), bound, "grey"
        )
        best, found = spare_layers(LAYERS, quantise, save(tmp_path / "exact.onnx", 0), calibration)
        assert found["tried"] == len(made)
        constant = numpy_helper.to_array(onnx.load(best).graph.initializer[0])
        assert found["loss"] == pytest.approx(float(constant[0]), abs=1e-4)
        steps = found["steps"]
        assert [layer for step in steps for layer in step["layers"]] == found["float_layers"]
        return found["float_layers"], found

    return search


def test_nothing_is_left_in_float_where_nothing_is_lost(search):
    kept, found = search(lambda _: 0.1, bound=0.2)
    assert kept == [] and found["tried"] == 1
    assert found["loss"] == found["loss_all_int8"]


def test_the_most_sensitive_layers_go_first_and_no_more_than_needed(search):
    errors = {"a": 0.1, "b": 0.0, "c": 0.5, "d": 0.05, "e": 0.2}
    kept, found = search(lambda kept: sum(errors[x] for x in errors if x not in kept), bound=0.2)
    assert kept == ["c", "e"]
    assert found["loss"] == pytest.approx(0.15, abs=1e-4)
    assert [step["loss"] for step in found["steps"]] == pytest.approx([0.35, 0.15], abs=1e-4)
    alone = found["moved_alone"]
    for layer, error in errors.items():
        assert alone[layer] == pytest.approx(0.85 - error, abs=1e-4)


@pytest.mark.parametrize("pair", [{"d", "e"}, {"a", "b"}])
def test_what_only_two_layers_together_cure_is_found_at_the_ends(search, pair):
    def error(kept):
        return 0.4 * (not pair <= kept) + 0.1 * ("c" not in kept)

    kept, found = search(error, bound=0.15)
    assert set(kept) == pair
    assert found["loss"] <= 0.15


def test_one_layer_stays_in_eight_bits_and_the_best_is_kept(search):
    kept, found = search(lambda kept: 1.0 if len(kept) > 2 else 0.9 - 0.1 * len(kept), bound=0.1)
    assert len(kept) == 2
    assert found["loss"] == pytest.approx(0.7, abs=1e-4)
