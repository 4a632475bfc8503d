import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from models.losses import MaskedWing, nme
from models.metrics import interocular_errors
from models.schemes import IBUG_68, KAGGLE_15, Scheme

WIDTH, CURVATURE = 0.1, 0.02


def draw(batch: int = 5, points: int = 68) -> tuple[np.ndarray, np.ndarray]:
    """Truth with mask (B, N, 3) and predictions (B, N, 2): errors on both sides of the width."""
    rng = np.random.default_rng(3)
    visible = (rng.random((batch, points, 1)) < 0.7).astype(np.float32)
    truth = rng.random((batch, points, 2)).astype(np.float32)
    error = rng.normal(size=truth.shape) * rng.choice([0.01, 0.1, 1.0], size=(batch, points, 1))
    assert {True, False} == set((np.abs(error) < WIDTH).ravel().tolist())
    return np.concatenate([truth, visible], -1), (truth + error).astype(np.float32)


def by_hand(
    truth: np.ndarray, predicted: np.ndarray, width: float, curvature: float
) -> list[float]:
    """The paper's equation 5, coordinate by coordinate."""
    losses = []
    for example, answer in zip(truth.tolist(), predicted.tolist(), strict=True):
        terms = []
        for (x, y, visible), (x_answer, y_answer) in zip(example, answer, strict=True):
            for error in (abs(x - x_answer), abs(y - y_answer)) if visible else ():
                if error < width:
                    terms.append(width * math.log(1 + error / curvature))
                else:
                    terms.append(error - (width - width * math.log(1 + width / curvature)))
        losses.append(sum(terms) / len(terms) if terms else 0.0)
    return losses


@pytest.mark.parametrize(("width", "curvature"), [(WIDTH, CURVATURE), (0.3, 0.05)])
def test_wing_is_the_papers(width: float, curvature: float) -> None:
    truth, predicted = draw()
    loss = MaskedWing(width, curvature)
    expected = by_hand(truth, predicted, width, curvature)
    assert np.allclose(loss.call(truth, predicted), expected, rtol=1e-5)
    assert float(loss(truth, predicted)) == pytest.approx(np.mean(expected), rel=1e-5)


def test_what_is_hidden_costs_nothing() -> None:
    truth, predicted = draw(batch=2)
    truth[0, :, 2] = 0
    losses = np.asarray(MaskedWing().call(truth, predicted))
    assert losses[0] == 0.0 and losses[1] > 0
    hidden = truth[1, :, 2] == 0
    predicted[1, hidden] += 7
    assert np.asarray(MaskedWing().call(truth, predicted))[1] == losses[1]


def test_gradient() -> None:
    """Steep at small errors, 1 beyond the width, 0 at none and for what is hidden."""
    errors = np.array([0.0, 1e-6, 0.5, -0.5, 0.5], np.float32)
    truth = np.stack([errors * 0, errors * 0, [1, 1, 1, 1, 0]], -1)[None].astype(np.float32)
    predicted = tf.Variable(np.stack([errors, errors], -1)[None])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(MaskedWing(WIDTH, CURVATURE).call(truth, predicted))
    gradient = tape.gradient(loss, predicted).numpy()[0, :, 0] * 8  # times the visible coordinates
    assert np.allclose(gradient, [0, WIDTH / CURVATURE, 1, -1, 0], rtol=1e-3)


def test_an_example_where_nothing_is_seen_does_not_spoil_the_gradient() -> None:
    predicted = tf.Variable(np.ones((1, 68, 2), np.float32))
    with tf.GradientTape() as tape:
        loss = MaskedWing()(np.zeros((1, 68, 3), np.float32), predicted)
    assert float(loss) == 0 and not tape.gradient(loss, predicted).numpy().any()


def test_wing_is_saved_with_its_settings() -> None:
    truth, predicted = draw()
    loss = MaskedWing(0.3, 0.05, name="other")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert isinstance(again, MaskedWing) and again.name == "other"
    assert float(again(truth, predicted)) == float(loss(truth, predicted))
    assert float(again(truth, predicted)) != float(MaskedWing()(truth, predicted))


@pytest.mark.parametrize("scheme", [IBUG_68, KAGGLE_15], ids=lambda scheme: scheme.name)
def test_nme_is_the_metric_of_evaluation(scheme: Scheme) -> None:
    truth, predicted = draw(batch=6, points=scheme.size)
    eyes = list(scheme.eyes)
    truth[:, eyes, 2] = 1
    visible = truth[..., 2] > 0
    expected = interocular_errors(truth[..., :2], predicted, visible, scheme, inner=False)
    assert np.allclose(nme(truth, predicted), expected, rtol=1e-5)

    truth[0, eyes[0], 2] = truth[1, eyes[1], 2] = 0
    truth[2, eyes[0], :2] = truth[2, eyes[1], :2]
    left_out = interocular_errors(truth[..., :2], predicted, truth[..., 2] > 0, scheme, False)
    assert np.isnan(left_out).tolist() == [True] * 3 + [False] * 3
    assert np.allclose(nme(truth, predicted), np.nan_to_num(left_out), rtol=1e-5)
