import math
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from models.losses import accuracy, emotion_loss, landmark_loss, nme
from models.metrics import interocular_errors
from models.schemes import IBUG_68, KAGGLE_15, Scheme

# landmarks

W, EPSILON = 0.1, 0.02
POWER = 5**1.1
OMEGA = W * (1 + POWER) / (1.1 * POWER)


def wing(x: float) -> float:
    """Feng et al. 2018, equation 5."""
    if x < W:
        return W * math.log(1 + x / EPSILON)
    return x - (W - W * math.log(1 + W / EPSILON))


def adaptive_wing(x: float) -> float:
    """Wang et al. 2019, with the exponent α - y of a peak, 2.1 - 1, and ω for a slope A of 1."""
    a = OMEGA / (1 + POWER) * 1.1 * (W / EPSILON) ** 0.1 / EPSILON
    c = W * a - OMEGA * math.log(1 + (W / EPSILON) ** 1.1)
    return OMEGA * math.log(1 + (x / EPSILON) ** 1.1) if x < W else a * x - c


def soft_wing(x: float) -> float:
    """Lin et al. 2021, with its 2, 20 and 0.5 pixels of an image of 256."""
    pixels = 256 * x
    b = 2 - 20 * math.log(1 + 2 / 0.5)
    return (pixels if pixels < 2 else 20 * math.log(1 + pixels / 0.5) + b) / 256


PENALTIES: dict[str, Callable[[float], float]] = {
    "wing": wing,
    "adaptive_wing": adaptive_wing,
    "soft_wing": soft_wing,
    "mse": lambda x: x * x,
    "mae": lambda x: x,
}
KINDS = list(PENALTIES)


def draw(batch: int = 5, points: int = 68) -> tuple[np.ndarray, np.ndarray]:
    """Truth with mask (B, N, 3) and predictions (B, N, 2), with errors both small and large."""
    rng = np.random.default_rng(3)
    visible = (rng.random((batch, points, 1)) < 0.7).astype(np.float32)
    truth = rng.random((batch, points, 2)).astype(np.float32)
    error = rng.normal(size=truth.shape) * rng.choice([0.003, 0.1, 1], size=(batch, points, 1))
    for threshold in (W, 2 / 256):
        assert {True, False} == set((np.abs(error) < threshold).ravel().tolist())
    return np.concatenate([truth, visible], -1), (truth + error).astype(np.float32)


def by_hand(truth: np.ndarray, predicted: np.ndarray, kind: str) -> list[float]:
    """The mean penalty of each example, coordinate by coordinate."""
    losses = []
    for example, answer in zip(truth.tolist(), predicted.tolist(), strict=True):
        terms = [
            PENALTIES[kind](abs(value - wanted))
            for (*wanted_point, visible), point in zip(example, answer, strict=True)
            for value, wanted in zip(point, wanted_point, strict=True)
            if visible
        ]
        losses.append(sum(terms) / len(terms) if terms else 0.0)
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_landmark_losses_are_the_papers(kind: str) -> None:
    truth, predicted = draw()
    loss = np.asarray(landmark_loss(kind)(truth, predicted))
    assert np.allclose(loss, by_hand(truth, predicted, kind), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_hidden_costs_nothing(kind: str) -> None:
    truth, predicted = draw(batch=2)
    truth[0, :, 2] = 0
    losses = np.asarray(landmark_loss(kind)(truth, predicted))
    assert losses[0] == 0.0 and losses[1] > 0
    hidden = truth[1, :, 2] == 0
    predicted[1, hidden] += 7
    assert np.asarray(landmark_loss(kind)(truth, predicted))[1] == losses[1]


@pytest.mark.parametrize(
    ("kind", "slopes"),
    [  # at 0, 1e-6, 0.5 and -0.5
        ("wing", [0, W / EPSILON, 1, -1]),
        ("adaptive_wing", [0, 1.1 * OMEGA * (1e-6 / EPSILON) ** 0.1 / EPSILON, 1, -1]),
        ("soft_wing", [0, 1, 20 / 128.5, -20 / 128.5]),
        ("mse", [0, 2e-6, 1, -1]),
        ("mae", [0, 1, 1, -1]),
    ],
)
def test_gradient(kind: str, slopes: list[float]) -> None:
    """The slopes that give each loss its character; none for what is hidden, and all finite."""
    errors = np.array([0.0, 1e-6, 0.5, -0.5, 0.5], np.float32)
    truth = np.stack([errors * 0, errors * 0, [1, 1, 1, 1, 0]], -1)[None].astype(np.float32)
    predicted = tf.Variable(np.stack([errors, errors], -1)[None])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(landmark_loss(kind)(truth, predicted))
    gradient = tape.gradient(loss, predicted).numpy()[0, :, 0] * 8  # times the visible coordinates
    assert np.allclose(gradient, [*slopes, 0], rtol=1e-3, atol=1e-9)


def test_a_wing_without_a_jump() -> None:
    """Value and slope of the adaptive wing meet where its two parts do."""
    errors = np.array([W - 1e-4, W + 1e-4], np.float32)
    predicted = tf.Variable(np.stack([errors, errors], -1)[None])
    truth = np.array([[[0, 0, 1], [0, 0, 1]]], np.float32)
    with tf.GradientTape() as tape:
        loss = landmark_loss("adaptive_wing")(truth, predicted)
    slopes = tape.gradient(loss, predicted).numpy()[0, :, 0] * 4
    assert np.allclose(slopes, 1, atol=0.01)
    assert adaptive_wing(W - 1e-9) == pytest.approx(adaptive_wing(W))


def test_an_example_where_nothing_is_seen_does_not_spoil_the_gradient() -> None:
    predicted = tf.Variable(np.ones((1, 68, 2), np.float32))
    with tf.GradientTape() as tape:
        loss = landmark_loss("wing")(np.zeros((1, 68, 3), np.float32), predicted)
    assert float(loss[0]) == 0 and not tape.gradient(loss, predicted).numpy().any()


def test_a_landmark_teacher_teaches_what_it_sees_in_the_crop() -> None:
    truth, predicted = draw(batch=3)
    taught = np.random.default_rng(5).uniform(-0.2, 1.2, predicted.shape).astype(np.float32)
    inside = ((taught >= 0) & (taught <= 1)).all(-1, keepdims=True)
    assert inside.any() and not inside.all()
    loss = landmark_loss("wing", teacher_weight=0.3)(np.concatenate([truth, taught], -1), predicted)
    labels = np.array(by_hand(truth, predicted, "wing"))
    teacher = np.array(by_hand(np.concatenate([taught, inside], -1), predicted, "wing"))
    assert np.allclose(loss, 0.7 * labels + 0.3 * teacher, rtol=1e-5)
    # Validation has no teacher.
    assert np.allclose(landmark_loss("wing", 0.3)(truth, predicted), labels, rtol=1e-5)


# emotion


def probabilities(seed: int, batch: int = 6) -> np.ndarray:
    powers = np.exp(2 * np.random.default_rng(seed).normal(size=(batch, 7)))
    return (powers / powers.sum(-1, keepdims=True)).astype(np.float32)


LABELS = np.eye(7, dtype=np.float32)[[0, 3, 3, 6, 1, 2]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["cross_entropy", "focal"])
@pytest.mark.parametrize("labels", [LABELS, 0.3 * LABELS + 0.7 * LABELS[::-1]])
def test_emotion_losses_are_the_papers(kind: str, smoothing: float, labels: np.ndarray) -> None:
    """Szegedy et al. 2016, section 7; Lin et al. 2017, equation 4; on mixed labels too."""
    predicted = probabilities(1)
    smooth = (1 - smoothing) * labels + smoothing / 7
    focus = (1 - predicted) ** 2 if kind == "focal" else 1
    expected = -(smooth * focus * np.log(predicted)).sum(-1)
    assert np.allclose(emotion_loss(kind, smoothing)(labels, predicted), expected, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_an_emotion_teacher_softens_both_sides(temperature: float) -> None:
    """Hinton et al. 2015: the divergence at that temperature, times its square."""
    predicted, taught = probabilities(1), probabilities(2)
    logits = np.log(predicted) + 3  # the constant does not matter
    powers = np.exp(logits / temperature)
    student = powers / powers.sum(-1, keepdims=True)
    divergence = (taught * np.log(taught / student)).sum(-1)
    hard = -(LABELS * np.log(predicted)).sum(-1)
    loss = emotion_loss("cross_entropy", 0.0, 0.8, temperature)
    expected = 0.2 * hard + 0.8 * temperature**2 * divergence
    assert np.allclose(loss(np.concatenate([LABELS, taught], -1), predicted), expected, rtol=1e-4)
    assert np.allclose(loss(LABELS, predicted), hard, rtol=1e-4)


def test_a_student_that_knows_all_its_teacher_does_has_nothing_to_learn() -> None:
    predicted = tf.Variable(probabilities(1))
    truth = np.concatenate([LABELS, predicted.numpy()], -1)
    with tf.GradientTape() as tape:
        loss = emotion_loss("cross_entropy", 0.0, 1.0, 1.0)(truth, predicted)
    gradient = tape.gradient(loss, predicted).numpy()
    # Moving probability from class to class changes nothing, whatever the classes.
    assert np.allclose(loss, 0, atol=1e-6)
    assert np.ptp(gradient, axis=-1).max() < 1e-4


def test_certainty_is_no_trouble() -> None:
    predicted = tf.Variable(LABELS[::-1].copy())
    with tf.GradientTape() as tape:
        loss = emotion_loss("focal", 0.1, 0.5, 3.0)(np.concatenate([LABELS, LABELS], -1), predicted)
    assert np.isfinite(loss).all() and np.isfinite(tape.gradient(loss, predicted)).all()


def test_accuracy_heeds_the_labels_alone() -> None:
    predicted = probabilities(4)
    expected = predicted.argmax(-1) == LABELS.argmax(-1)
    for truth in (LABELS, np.concatenate([LABELS, predicted], -1)):
        assert np.array_equal(accuracy(truth, predicted), expected)


@pytest.mark.parametrize("scheme", [IBUG_68, KAGGLE_15], ids=lambda scheme: scheme.name)
def test_nme_is_the_metric_of_evaluation(scheme: Scheme) -> None:
    truth, predicted = draw(batch=6, points=scheme.size)
    eyes = list(scheme.eyes)
    truth[:, eyes, 2] = 1
    visible = truth[..., 2] > 0
    expected = interocular_errors(truth[..., :2], predicted, visible, scheme, inner=False)
    assert np.allclose(nme(truth, predicted), expected, rtol=1e-5)
    assert np.allclose(nme(np.concatenate([truth, predicted], -1), predicted), expected, rtol=1e-5)

    truth[0, eyes[0], 2] = truth[1, eyes[1], 2] = 0
    truth[2, eyes[0], :2] = truth[2, eyes[1], :2]
    left_out = interocular_errors(truth[..., :2], predicted, truth[..., 2] > 0, scheme, False)
    assert np.isnan(left_out).tolist() == [True] * 3 + [False] * 3
    assert np.allclose(nme(truth, predicted), np.nan_to_num(left_out), rtol=1e-5)
