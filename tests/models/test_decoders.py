from pathlib import Path

import keras
import numpy as np
import pytest

from models import decoders, landmarks

IMAGES = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 1)).astype(np.float32)


def predict(model: keras.Model, inputs: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(model(inputs, training=False))


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sharp(name: str) -> keras.Model:
    """A small network whose scores differ as much as those of a trained one."""
    keras.utils.set_random_seed(1)
    model = landmarks.build(name, (8, 12), 32, 1, 0.0, points=5)
    logits = model.get_layer(decoders.LOGITS)
    logits.kernel.assign(keras.ops.convert_to_numpy(logits.kernel) * 20)
    return model


def test_bins_against_numpy() -> None:
    model = sharp("simcc")
    logits = predict(keras.Model(model.inputs, model.get_layer("logits").output), IMAGES)
    assert logits.shape == (3, 5, 2 * 48)  # a bin a pixel, half as many again for the margin
    places = (np.arange(48) + 0.5) / 32 - 0.25
    expected = [softmax(logits[..., :48]) @ places, softmax(logits[..., 48:]) @ places]
    answer = predict(model, IMAGES)
    assert np.ptp(answer) > 0.2
    assert np.allclose(answer, np.stack(expected, -1), atol=1e-6)


def test_bins_reach_outside_the_crop() -> None:
    inputs = keras.Input((2, 2, 3))
    model = keras.Model(inputs, decoders.one_dimensional(inputs, points=1, bins=12))
    bias = np.zeros(24, np.float32)
    bias[0] = bias[12 + 11] = 50  # the first bin of x, the last of y
    model.get_layer("logits").bias.assign(bias)
    [[[x, y]]] = predict(model, np.zeros((1, 2, 2, 3)))
    assert x == pytest.approx(-0.25 + 1.5 / 24) and y == pytest.approx(1.25 - 1.5 / 24)


def test_heat_maps_against_numpy() -> None:
    model = sharp("heatmap")
    logits = predict(keras.Model(model.inputs, model.get_layer("logits").output), IMAGES)
    assert logits.shape == (3, 16, 16, 5)
    shares = softmax(logits.transpose(0, 3, 1, 2).reshape(3, 5, -1)).reshape(3, 5, 16, 16)
    places = (np.arange(16) + 0.5) / 16
    expected = [shares.sum(2) @ places, shares.sum(3) @ places]
    answer = predict(model, IMAGES)
    assert np.ptp(answer) > 0.2
    assert np.allclose(answer, np.stack(expected, -1), atol=1e-6)


def test_a_heat_map_points_at_its_peak() -> None:
    inputs = keras.Input((8, 4, 1))
    model = keras.Model(inputs, decoders.two_dimensional(inputs, points=1))
    model.get_layer("logits").set_weights([np.full((1, 1, 1, 1), 50)])
    features = np.zeros((1, 8, 4, 1), np.float32)
    features[0, 6, 1] = 1  # row 6 of 8, column 1 of 4
    assert predict(model, features)[0, 0] == pytest.approx([1.5 / 4, 6.5 / 8])


@pytest.mark.parametrize("name", ["simcc", "heatmap"])
def test_untrained_it_says_the_middle(name: str) -> None:
    answer = predict(landmarks.build(name, (8, 12), 32, 1, 0.0, points=5), IMAGES)
    assert np.allclose(answer, 0.5, atol=0.15)


@pytest.mark.parametrize("name", ["simcc", "heatmap"])
def test_the_graph_can_be_cut_before_decoding(name: str) -> None:
    model = sharp(name)
    head = keras.Model(model.inputs, model.get_layer(decoders.LOGITS).output)
    tail = keras.Model(head.outputs, model.outputs)
    assert not tail.weights
    assert np.array_equal(predict(tail, predict(head, IMAGES)), predict(model, IMAGES))


@pytest.mark.parametrize("name", ["simcc", "heatmap"])
def test_it_converts_to_tflite(name: str, tmp_path: Path) -> None:
    import tensorflow as tf
    from ai_edge_litert.interpreter import Interpreter

    model = sharp(name)
    model.export(
        tmp_path,
        format="tf_saved_model",
        input_signature=[keras.InputSpec(shape=(1, 32, 32, 1), dtype="float32", name="image")],
        verbose=False,
    )
    flat = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path)).convert()
    interpreter = Interpreter(model_content=flat)
    run = interpreter.get_signature_runner()
    [answer] = run(image=IMAGES[:1]).values()
    assert np.allclose(answer, predict(model, IMAGES[:1]), atol=1e-3)
    # Nothing that only full TensorFlow could run.
    assert not [d["op_name"] for d in interpreter._get_ops_details() if "Flex" in d["op_name"]]
