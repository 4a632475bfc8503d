from pathlib import Path

import keras
import numpy as np
import pytest

from models import landmarks
from pipelines.params import load_params

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")
JOBS = {name: job for name, job in PARAMS.train.jobs.items() if job.task == "landmarks"}
IMAGES = np.random.default_rng(1).integers(0, 256, (3, 48, 48, 1)).astype(np.float32)


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_every_job_places_its_points(name: str, precision: str) -> None:
    job, task = JOBS[name], PARAMS.tasks.landmarks
    keras.mixed_precision.set_global_policy(precision)
    try:
        network = job.network or job.model
        model = landmarks.build(
            network, job.widths, task.size, task.channels, job.dropout, points=68
        )
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert model.input_shape == (None, task.size, task.size, task.channels)
    images = np.random.default_rng(1).integers(0, 256, (3, *model.input_shape[1:]))
    answer = model.predict(images.astype(np.float32), verbose=0)
    assert answer.shape == (3, 68, 2) and answer.dtype == np.float32
    assert answer.mean() == pytest.approx(0.5, abs=0.1)  # untrained: the middle of the crop
    assert not np.allclose(answer[0], answer[1], atol=1e-6)


@pytest.mark.parametrize(
    ("model", "widths", "parameters"),
    [("plain", (16, 32, 64, 128), 338_200), ("residual", (32, 64, 96, 128), 1_089_496)],
)
def test_size(model: str, widths: tuple[int, ...], parameters: int) -> None:
    built = landmarks.build(model, widths, 96, 1, dropout=0.0, points=68)
    assert built.count_params() == parameters


def test_points_are_pairs_and_may_lie_outside_the_crop() -> None:
    model = landmarks.build("plain", [4], 48, 1, dropout=0.0, points=15)
    dense = model.layers[-2]
    dense.set_weights([np.zeros(dense.kernel.shape), np.arange(30) - 5.0])
    answer = model.predict(IMAGES, verbose=0)
    assert answer[0, :2].tolist() == [[-5, -4], [-3, -2]] and answer[0, 14].tolist() == [23, 24]


def test_raw_pixels_are_scaled_inside() -> None:
    model = landmarks.build("plain", [4], 48, 1, dropout=0.0, points=15)
    scaled = keras.Model(model.inputs, model.layers[1].output)
    pixels = np.broadcast_to(np.float32([0, 127.5, 255]).reshape(3, 1, 1, 1), (3, 48, 48, 1))
    assert scaled.predict(pixels, verbose=0)[:, 0, 0, 0].tolist() == [-1, 0, 1]


def test_where_a_feature_lies_matters() -> None:
    """The same spot at two places, far from the border: pooling would answer alike."""
    model = landmarks.build("plain", [4], 48, 1, dropout=0.0, points=15)
    images = np.zeros((2, 48, 48, 1), np.float32)
    images[0, 16:20, 16:20] = images[1, 28:32, 28:32] = 255
    here, there = model.predict(images, verbose=0)
    assert not np.allclose(here, there, atol=1e-4)
