import math

import numpy as np
import pytest
from sklearn import metrics as reference

from models.metrics import (
    absolute_errors,
    box_errors,
    calibration,
    ced_curve,
    confusion,
    emotion_metrics,
    interocular_errors,
    landmark_metrics,
)
from models.schemes import IBUG_68, KAGGLE_15, Scheme

# emotion, against scikit-learn


def draw(present: list[int], guessed: list[int], count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    truth, guess = rng.choice(present, count), rng.choice(guessed, count)
    return truth, np.where(rng.random(count) < 0.5, truth, guess)


ALL = list(range(7))
CASES = {
    "all classes": draw(ALL, ALL),
    "class 1 in neither": draw([0, 2, 3, 4, 5, 6], [0, 2, 3, 4, 5, 6]),
    "class 1 only predicted": draw([0, 2, 3, 4, 5, 6], ALL),
    "class 1 never predicted": (draw(ALL, ALL)[0], draw(ALL, ALL)[1] * (draw(ALL, ALL)[1] != 1)),
    "all right": draw(ALL, ALL)[:1] * 2,
    "all wrong": (np.zeros(9, int), np.ones(9, int)),
    "one example": (np.array([3]), np.array([3])),
}


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label")
@pytest.mark.parametrize("case", CASES)
def test_emotion_metrics_agree_with_scikit_learn(case: str) -> None:
    truth, guess = CASES[case]
    matrix = confusion(truth, guess, np.ones(len(truth)), 7)
    assert np.array_equal(matrix, reference.confusion_matrix(truth, guess, labels=ALL))
    found = emotion_metrics(matrix)
    precision, recall, f1, _ = reference.precision_recall_fscore_support(
        truth, guess, labels=ALL, zero_division=0
    )
    expected = {
        "accuracy": reference.accuracy_score(truth, guess),
        "macro_f1": reference.f1_score(truth, guess, average="macro", zero_division=0),
        "balanced_accuracy": reference.balanced_accuracy_score(truth, guess),
        "precision": precision,
        "recall": recall,
        "f1": f1,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-9, err_msg=name)


def test_weights_count_examples_as_often_as_they_are_drawn() -> None:
    truth, guess = CASES["all classes"]
    rng = np.random.default_rng(2)
    draws = rng.integers(0, len(truth), (5, len(truth)))
    weights = np.stack([np.bincount(row, minlength=len(truth)) for row in draws])
    together = emotion_metrics(confusion(truth, guess, weights, 7))
    assert together["accuracy"].shape == (5,) and together["f1"].shape == (5, 7)
    for row, drawn in enumerate(draws):
        alone = emotion_metrics(confusion(truth[drawn], guess[drawn], np.ones(len(drawn)), 7))
        for name, value in alone.items():
            np.testing.assert_allclose(together[name][row], value, rtol=1e-6, err_msg=name)


# calibration, against scikit-learn and a loop over bins


def draw_probabilities(count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(8)
    logits = rng.normal(0, 2, (count, 7))
    truth = np.array([rng.choice(7, p=np.exp(row) / np.exp(row).sum()) for row in logits])
    sharp = np.exp(1.7 * logits)  # surer than it may be
    return truth, (sharp / sharp.sum(1, keepdims=True)).astype(np.float32)


def loop_ece(truth: np.ndarray, probabilities: np.ndarray, bins: int) -> float:
    """Equation 3 of Guo et al., bin by bin: (m - 1) / M < confidence <= m / M."""
    total = 0.0
    confidence = [float(row.max()) for row in probabilities]
    right = [int(row.argmax()) == label for row, label in zip(probabilities, truth, strict=True)]
    for m in range(1, bins + 1):
        inside = [i for i, c in enumerate(confidence) if (m - 1) / bins < c <= m / bins]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            sure = sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(truth) * abs(accuracy - sure)
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_agrees_with_a_loop_and_with_scikit_learn(bins: int) -> None:
    truth, probabilities = draw_probabilities()
    found = calibration(truth, probabilities, np.ones(len(truth)), bins)
    assert found["ece"] == pytest.approx(loop_ece(truth, probabilities, bins), abs=1e-9)
    assert found["ece"] > 0.02
    exact = probabilities.astype(np.float64)
    assert found["nll"] == pytest.approx(
        reference.log_loss(truth, exact / exact.sum(1, keepdims=True), labels=ALL), abs=1e-5
    )
    expected = ((np.eye(7)[truth] - exact) ** 2).sum(1).mean()
    assert found["brier"] == pytest.approx(expected)
    assert found["bin_share"].sum() == pytest.approx(1)
    right = probabilities.argmax(1) == truth
    assert found["bin_share"] @ found["bin_accuracy"] == pytest.approx(right.mean())
    assert found["bin_share"] @ found["bin_confidence"] == pytest.approx(exact.max(1).mean())


def test_a_confidence_on_a_bound_belongs_to_the_bin_below() -> None:
    probabilities = np.array([[0.6, 0.4], [0.8, 0.2], [1.0, 0.0]])
    found = calibration(np.array([0, 1, 0]), probabilities, np.ones(3), bins=5)
    assert found["bin_share"] == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])
    assert found["bin_accuracy"] == pytest.approx([0, 0, 1, 0, 1])
    assert found["bin_confidence"] == pytest.approx([0, 0, 0.6, 0.8, 1])
    assert found["ece"] == pytest.approx((0.4 + 0.8 + 0) / 3)


def test_certainty_that_is_wrong_has_a_finite_likelihood() -> None:
    found = calibration(np.array([1]), np.array([[1.0, 0.0]]), np.ones(1))
    assert (found["ece"], found["brier"]) == (1, 2)
    assert found["nll"] == pytest.approx(-math.log(1e-7))


def test_resamples_of_calibration() -> None:
    truth, probabilities = draw_probabilities(60)
    rng = np.random.default_rng(9)
    draws = rng.integers(0, 60, (4, 60))
    weights = np.stack([np.bincount(row, minlength=60) for row in draws])
    together = calibration(truth, probabilities, weights)
    for row, drawn in enumerate(draws):
        alone = calibration(truth[drawn], probabilities[drawn], np.ones(60))
        for name, value in alone.items():
            np.testing.assert_allclose(together[name][row], value, atol=1e-12, err_msg=name)


# landmarks, against loops and a curve that is integrated


def loop_errors(
    truth: np.ndarray, guess: np.ndarray, visible: np.ndarray, eyes: list[int], chosen: range
) -> list[float]:
    errors = []
    for true, guessed, seen in zip(truth, guess, visible, strict=True):
        points = [i for i in chosen if seen[i]]
        if not (points and seen[eyes[0]] and seen[eyes[1]]):
            errors.append(math.nan)
            continue
        normaliser = math.dist(true[eyes[0]], true[eyes[1]])
        distances = [math.dist(true[i], guessed[i]) for i in points]
        errors.append(sum(distances) / len(distances) / normaliser)
    return errors


@pytest.mark.parametrize(
    ("scheme", "eyes", "inner", "chosen"),
    [
        (IBUG_68, [36, 45], False, range(68)),
        (IBUG_68, [36, 45], True, range(17, 68)),
        (KAGGLE_15, [0, 1], False, range(15)),
        (KAGGLE_15, [0, 1], True, range(15)),
    ],
)
def test_errors_agree_with_a_loop(
    scheme: Scheme, eyes: list[int], inner: bool, chosen: range
) -> None:
    rng = np.random.default_rng(3)
    truth = rng.random((40, scheme.size, 2)).astype(np.float32)
    guess = truth + rng.normal(0, 0.03, truth.shape).astype(np.float32)
    visible = rng.random((40, scheme.size)) < 0.8
    visible[:20, eyes] = True
    # What is predicted for an invisible point, and its stored 0, are nobody's business.
    truth[~visible], guess[~visible] = 0, 99
    visible[0, chosen[0] :] = False
    found = interocular_errors(truth, guess, visible, scheme, inner)
    expected = loop_errors(truth, guess, visible, eyes, chosen)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float64
    assert np.isnan(found[0]) and np.isfinite(found[1:20]).all() and np.isnan(found).sum() > 5


def test_error_has_no_unit() -> None:
    rng = np.random.default_rng(4)
    truth, guess = rng.random((2, 3, 15, 2))
    visible = np.ones((3, 15), bool)
    once = interocular_errors(truth, guess, visible, KAGGLE_15, inner=False)
    scaled = interocular_errors(truth * 96, guess * 96, visible, KAGGLE_15, inner=False)
    np.testing.assert_allclose(once, scaled)


def test_eyes_on_one_spot_give_no_error() -> None:
    truth = np.zeros((1, 15, 2))
    found = interocular_errors(truth, truth + 1, np.ones((1, 15), bool), KAGGLE_15, inner=False)
    assert np.isnan(found).all()


def test_box_errors_agree_with_a_loop() -> None:
    rng = np.random.default_rng(7)
    truth = rng.random((30, 68, 2)) * [3, 1]  # a wide box: the root of its area is not its side
    guess = truth + rng.normal(0, 0.05, truth.shape)
    visible = rng.random((30, 68)) < 0.5
    truth[~visible], guess[~visible] = 99, -99
    visible[0], visible[1, 1:] = False, False
    visible[1, 0] = True  # one point spans no area
    expected = []
    for true, guessed, seen in zip(truth, guess, visible, strict=True):
        points = [i for i in range(68) if seen[i]]
        if len(points) < 2:
            expected.append(math.nan)
            continue
        x, y = [true[i][0] for i in points], [true[i][1] for i in points]
        size = math.sqrt((max(x) - min(x)) * (max(y) - min(y)))
        distances = [math.dist(true[i], guessed[i]) for i in points]
        expected.append(sum(distances) / len(distances) / size)
    found = box_errors(truth, guess, visible)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.isnan(found).sum() == 2


def test_absolute_errors_agree_with_a_loop() -> None:
    rng = np.random.default_rng(10)
    truth = rng.random((20, 15, 2)).astype(np.float32)
    guess = truth + rng.normal(0, 0.05, truth.shape).astype(np.float32)
    visible = rng.random((20, 15)) < 0.5
    truth[~visible], guess[~visible] = 0, np.inf
    visible[0], guess[0] = False, 0
    expected = []
    for true, guessed, seen in zip(truth, guess, visible, strict=True):
        gaps = [
            abs(float(true[i, k]) - float(guessed[i, k]))
            for i in range(15)
            for k in (0, 1)
            if seen[i]
        ]
        expected.append(sum(gaps) / len(gaps) if gaps else math.nan)
    found = absolute_errors(truth, guess, visible)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.isnan(found[0]) and np.isfinite(found[1:]).all()


def test_the_curve_agrees_with_counting() -> None:
    rng = np.random.default_rng(11)
    errors = rng.gamma(3, 0.02, 80)
    errors[0] = 0.05  # on a threshold: not beyond it
    thresholds, shares = ced_curve(errors, np.ones(80), limit=0.1, steps=20)
    assert thresholds == pytest.approx([0.005 * step for step in range(21)])
    for threshold, share in zip(thresholds, shares, strict=True):
        assert share == pytest.approx(sum(error <= threshold for error in errors) / 80)
    draws = rng.integers(0, 80, (3, 80))
    weights = np.stack([np.bincount(row, minlength=80) for row in draws])
    _, together = ced_curve(errors, weights, limit=0.1, steps=20)
    for row, drawn in enumerate(draws):
        alone = ced_curve(errors[drawn], np.ones(80), limit=0.1, steps=20)[1]
        np.testing.assert_allclose(together[row], alone)


def test_summary_agrees_with_the_integrated_curve() -> None:
    rng = np.random.default_rng(5)
    errors, inner = rng.gamma(3, 0.02, 500), rng.gamma(2, 0.02, 500)
    found = landmark_metrics(errors, inner, errors / 2, errors / 3, np.ones(500))
    levels = np.linspace(0, 0.10, 20001)
    curve = [(errors <= level).mean() for level in levels]
    assert found["auc10"] == pytest.approx(np.trapezoid(curve, levels) / 0.10, abs=1e-4)
    assert found["fr10"] == pytest.approx(1 - curve[-1])
    assert 0 < found["fr10"] < 0.5
    assert found["nme_interocular"] == pytest.approx(sum(errors) / 500)
    assert found["nme_interocular_inner"] == pytest.approx(sum(inner) / 500)
    assert found["nme_box"] == pytest.approx(sum(errors) / 1000)
    assert found["mae"] == pytest.approx(sum(errors) / 1500)
    curve = ced_curve(errors, np.ones(500))
    assert 1 - found["fr10"] == pytest.approx(np.interp(0.1, *curve))


def test_extremes_and_the_bound_itself() -> None:
    def metrics(*errors: float) -> dict[str, float]:
        values = np.array(errors)
        summary = landmark_metrics(*[values] * 4, np.ones(len(values)))
        return {name: float(value) for name, value in summary.items()}

    names = ("nme_interocular", "nme_interocular_inner", "nme_box", "mae", "fr10")
    nothing = dict.fromkeys(names, 0)
    assert metrics(0.0) == nothing | {"auc10": 1}
    assert metrics(5.0)["fr10"] == 1 and metrics(5.0)["auc10"] == 0
    assert metrics(0.10)["fr10"] == 0  # a failure exceeds the bound
    assert metrics(0.05)["auc10"] == pytest.approx(0.5)


def test_resamples_of_landmarks() -> None:
    rng = np.random.default_rng(6)
    errors = rng.gamma(3, 0.02, 50)
    draws = rng.integers(0, 50, (4, 50))
    weights = np.stack([np.bincount(row, minlength=50) for row in draws])
    together = landmark_metrics(errors, errors * 2, errors / 2, errors / 3, weights)
    for row, drawn in enumerate(draws):
        chosen = errors[drawn]
        alone = landmark_metrics(chosen, chosen * 2, chosen / 2, chosen / 3, np.ones(50))
        for name, value in alone.items():
            assert together[name].shape == (4,)
            np.testing.assert_allclose(together[name][row], value, err_msg=name)
