import numpy as np
import pytest

from pipelines.cli import GrimaceError
from pipelines.exporters import tflite

MEAN_BOUND, LARGEST_BOUND = 0.01, 0.06


@pytest.fixture(scope="module", params=["emotion_model", "landmark_model"])
def exported(request, tmp_path_factory):
    model = request.getfixturevalue(request.param)
    out = tmp_path_factory.mktemp("export") / "tflite"
    files = tflite.export(model.path, out, model.calibration)
    assert sorted(files) == sorted(out.iterdir())
    return model, files


def test_files_answer_as_keras_does(exported):
    model, (float32, int8) = exported
    assert model.errors(float32).max() < 1e-4
    errors = model.errors(int8)
    assert 0 < errors.mean() < MEAN_BOUND
    assert errors.max() < LARGEST_BOUND
    assert int8.stat().st_size < 0.6 * float32.stat().st_size


def test_int8_computes_in_eight_bits_between_float_ends(exported):
    from ai_edge_litert.interpreter import Interpreter

    _, (_, int8) = exported
    interpreter = Interpreter(model_path=str(int8))
    interpreter.allocate_tensors()
    ends = [*interpreter.get_input_details(), *interpreter.get_output_details()]
    assert {end["dtype"] for end in ends} == {np.float32}
    inner = [d for d in interpreter.get_tensor_details() if d["dtype"] == np.float32]
    assert {d["index"] for d in inner} <= {end["index"] for end in ends}
    scales = [len(d["quantization_parameters"]["scales"]) for d in interpreter.get_tensor_details()]
    assert max(scales) >= 16  # one per channel of the widest layer


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda images: images / 255, "raw pixels"),
        (lambda images: images[:0], "at least 1"),
        (lambda images: images[..., :2], r"needs \(n, 32, 32, 1\)"),
    ],
)
def test_unusable_calibration_leaves_no_output(emotion_model, tmp_path, spoil, message):
    images = np.repeat(emotion_model.calibration, 3, axis=-1) if "needs" in message else None
    images = emotion_model.calibration if images is None else images
    with pytest.raises(GrimaceError, match=message):
        tflite.export(emotion_model.path, tmp_path / "tflite", spoil(images))
    assert not list(tmp_path.iterdir())


def test_a_damaged_model_is_refused(emotion_model, tmp_path):
    cut = tmp_path / "cut.keras"
    cut.write_bytes(emotion_model.path.read_bytes()[:3000])
    with pytest.raises(GrimaceError, match=r"cut.keras: keras [\d.]+ refused it"):
        tflite.export(cut, tmp_path / "tflite", emotion_model.calibration)
