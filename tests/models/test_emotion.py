from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from models import emotion
from pipelines.params import load_params

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")
JOBS = {name: job for name, job in PARAMS.train.jobs.items() if job.task == "emotion"}
IMAGES = np.random.default_rng(1).integers(0, 256, (3, 48, 48, 1)).astype(np.float32)


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_every_job_answers_with_probabilities(name: str, precision: str) -> None:
    job, task = JOBS[name], PARAMS.tasks.emotion
    keras.mixed_precision.set_global_policy(precision)
    try:
        network = job.network or job.model
        model = emotion.build(network, job.widths, task.size, task.channels, job.dropout)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert model.input_shape == (None, task.size, task.size, task.channels)
    images = np.random.default_rng(1).integers(0, 256, (3, *model.input_shape[1:]))
    answer = model.predict(images.astype(np.float32), verbose=0)
    assert answer.shape == (3, 7) and answer.dtype == np.float32
    assert (answer > 0).all() and np.allclose(answer.sum(1), 1, atol=1e-5)
    assert not np.allclose(answer[0], answer[1], atol=1e-6)


@pytest.mark.parametrize(
    ("model", "widths", "parameters"),
    [("plain", (16, 32, 64, 128), 295_575), ("residual", (48, 96, 160), 1_220_959)],
)
def test_size(model: str, widths: tuple[int, ...], parameters: int) -> None:
    assert emotion.build(model, widths, 48, 1, dropout=0.3).count_params() == parameters


def test_raw_pixels_are_scaled_inside() -> None:
    model = emotion.build("plain", [4], 48, 1, dropout=0.0)
    scaled = keras.Model(model.inputs, model.layers[1].output)
    pixels = np.broadcast_to(np.float32([0, 127.5, 255]).reshape(3, 1, 1, 1), (3, 48, 48, 1))
    assert scaled.predict(pixels, verbose=0)[:, 0, 0, 0].tolist() == [-1, 0, 1]


def test_dropout_is_for_training_alone() -> None:
    model = emotion.build("plain", [4], 48, 1, dropout=0.5)
    assert np.array_equal(model(IMAGES, training=False), model(IMAGES, training=False))
    assert not np.array_equal(model(IMAGES, training=True), model(IMAGES, training=True))
    without = emotion.build("plain", [4], 48, 1, dropout=0.0)
    assert not any(isinstance(layer, layers.Dropout) for layer in without.layers)
