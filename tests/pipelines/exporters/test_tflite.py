from dataclasses import replace

import numpy as np
import pytest

from pipelines.cli import GrimaceError
from pipelines.exporters import tflite

MEAN_BOUND, LARGEST_BOUND = 0.01, 0.06


@pytest.fixture(scope="module", params=["emotion_model", "landmark_model", "simcc_model"])
def exported(request, tmp_path_factory):
    model = request.getfixturevalue(request.param)
    out = tmp_path_factory.mktemp("export") / "tflite"
    variants = tflite.export(model.path, out, model.calibration)
    assert {out / facts["file"] for facts in variants.values()} == set(out.iterdir())
    return model, out, variants


def test_files_answer_as_keras_does(exported):
    model, out, _ = exported
    assert model.errors(out / "float32.tflite").max() < 1e-4
    assert 0 < model.errors(out / "float16.tflite").max() < 5e-3
    for name in ("dynamic", "int8"):
        errors = model.errors(out / f"{name}.tflite")
        assert 0 < errors.mean() < MEAN_BOUND, name
        assert errors.max() < LARGEST_BOUND, name
    sizes = {path.stem: path.stat().st_size for path in out.iterdir()}
    assert sizes["int8"] < 0.6 * sizes["float32"]
    assert sizes["dynamic"] < sizes["float16"] < 0.7 * sizes["float32"]


def test_versions_and_precisions_are_told(exported):
    _, _, variants = exported
    assert {name: facts["precision"] for name, facts in variants.items()} == {
        "float32": "float32",
        "float16": "float16",
        "dynamic": "dynamic int8",
        "int8": "int8",
    }
    for facts in variants.values():
        assert facts["versions"]["schema"] == 3
        assert facts["versions"]["oldest_runtime"].split(".")[0] in "12"


def test_int8_computes_in_eight_bits_between_its_first_and_its_last_layer(exported):
    _, out, variants = exported
    interpreter, kinds = operations(out / "int8.tflite")
    ends = [*interpreter.get_input_details(), *interpreter.get_output_details()]
    assert {end["dtype"] for end in ends} == {np.float32}
    first, last = kinds.index("QUANTIZE"), kinds.index("DEQUANTIZE")
    assert set(kinds[:first]) <= {"MUL", "ADD", "SUB"}  # rescaling
    weighted = {"CONV_2D", "FULLY_CONNECTED"}
    assert (
        sum(kind in weighted for kind in kinds[first:last])
        == (variants["int8"]["quantisation"]["layers"])
    )
    scales = [len(d["quantization_parameters"]["scales"]) for d in interpreter.get_tensor_details()]
    assert max(scales) >= 16  # one per channel of the widest layer


def test_decoding_stands_outside_the_int8_part(simcc_model, tmp_path):
    tflite.export(simcc_model.path, tmp_path / "out", simcc_model.calibration)
    _, kinds = operations(tmp_path / "out" / "int8.tflite")
    assert kinds.count("DEQUANTIZE") == 1
    assert kinds.index("DEQUANTIZE") < kinds.index("SOFTMAX")


def test_layers_stay_in_float_until_the_bound_is_kept(landmark_model, tmp_path):
    model, bound = landmark_model, 1e-3
    strict = replace(model.calibration, bound=bound)
    found = tflite.export(model.path, tmp_path / "out", strict)["int8"]["quantisation"]
    assert found["loss_all_int8"] > bound  # or else there is nothing to see here
    kept = found["float_layers"]
    assert 0 < len(kept) < found["layers"]
    assert found["loss"] <= bound or len(kept) == found["layers"] - 1
    errors = model.errors(tmp_path / "out" / "int8.tflite")
    assert errors.mean() == pytest.approx(found["loss"], rel=1e-3)
    assert found["steps"][-1]["moved"] < found["moved_all_int8"]


def operations(file):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(file))
    kinds = [detail["op_name"] for detail in interpreter._get_ops_details()]
    interpreter.allocate_tensors()
    return interpreter, [kind for kind in kinds if kind != "DELEGATE"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda images: images / 255, "raw pixels"),
        (lambda images: images[:0], "at least 1"),
        (lambda images: images[..., :2], r"needs \(n, 32, 32, 1\)"),
    ],
)
def test_unusable_calibration_leaves_no_output(emotion_model, tmp_path, spoil, message):
    calibration = emotion_model.calibration
    images = np.repeat(calibration.images, 3 if "needs" in message else 1, axis=-1)
    with pytest.raises(GrimaceError, match=message):
        tflite.export(
            emotion_model.path, tmp_path / "tflite", replace(calibration, images=spoil(images))
        )
    assert not list(tmp_path.iterdir())


def test_a_damaged_model_is_refused(emotion_model, tmp_path):
    cut = tmp_path / "cut.keras"
    cut.write_bytes(emotion_model.path.read_bytes()[:3000])
    with pytest.raises(GrimaceError, match=r"cut.keras: keras [\d.]+ refused it"):
        tflite.export(cut, tmp_path / "tflite", emotion_model.calibration)
