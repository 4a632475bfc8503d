"""The field's metrics, in NumPy over whole prediction arrays.

Functions take `weights`, how often each example counts, with any leading axes: one row of ones
gives the figure itself, rows of bootstrap counts give its resamples in one product.
"""

import numpy as np

from models.schemes import Scheme


def interocular_errors(
    truth: np.ndarray, predicted: np.ndarray, visible: np.ndarray, scheme: Scheme, inner: bool
) -> np.ndarray:
    """Return each example's normalised mean error.

    The mean distance of its visible points, over the distance of the scheme's two `eyes`.

    Args:
        truth, predicted: (n, N, 2), any common unit.
        visible: bool (n, N).
        scheme: names the eyes.
        inner: leave the face outline out.

    Returns:
        float64 (n,), a fraction; NaN where an eye or every point is invisible.
    """
    truth, predicted = truth.astype(np.float64), predicted.astype(np.float64)
    eyes = list(scheme.eyes)
    distance = np.linalg.norm(truth[:, eyes[0]] - truth[:, eyes[1]], axis=-1)
    distance = np.where(visible[:, eyes].all(1) & (distance > 0), distance, np.nan)
    chosen = list(scheme.inner) if inner else list(range(scheme.size))
    return _mean_distance(truth[:, chosen], predicted[:, chosen], visible[:, chosen]) / distance


def box_errors(truth: np.ndarray, predicted: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Return each example's mean error over the size of its true points' box, √(width · height).

    The measure of AFLW2000-3D (Zhu et al. 2016; Bulat and Tzimiropoulos 2017): in profile the two
    eyes nearly coincide, and their distance says nothing of the face's size.

    Args:
        truth, predicted: (n, N, 2), any common unit.
        visible: bool (n, N).

    Returns:
        float64 (n,), a fraction; NaN where the visible points span no area.
    """
    truth, predicted = truth.astype(np.float64), predicted.astype(np.float64)
    low = np.where(visible[..., None], truth, np.inf).min(1)
    high = np.where(visible[..., None], truth, -np.inf).max(1)
    size = np.sqrt(np.clip(high - low, 0, None).prod(-1))
    return _mean_distance(truth, predicted, visible) / np.where(size > 0, size, np.nan)


def absolute_errors(truth: np.ndarray, predicted: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Return each example's mean absolute error over both coordinates of its visible points.

    Args:
        truth, predicted: (n, N, 2), crop coordinates.
        visible: bool (n, N).

    Returns:
        float64 (n,), in units of the crop's side; NaN where no point is visible.
    """
    error = np.abs(truth.astype(np.float64) - predicted.astype(np.float64)).mean(-1)
    return _mean_of_visible(error, visible)


def _mean_distance(truth: np.ndarray, predicted: np.ndarray, visible: np.ndarray) -> np.ndarray:
    return _mean_of_visible(np.linalg.norm(truth - predicted, axis=-1), visible)


def _mean_of_visible(error: np.ndarray, visible: np.ndarray) -> np.ndarray:
    counts = visible.sum(1)
    total = np.where(visible, error, 0).sum(1)  # what is stored for the others may be anything
    return total / np.where(counts > 0, counts, np.nan)


def landmark_metrics(
    errors: np.ndarray,
    inner: np.ndarray,
    boxed: np.ndarray,
    absolute: np.ndarray,
    weights: np.ndarray,
) -> dict[str, np.ndarray]:
    """Summarise per-example errors.

    FR@10 is the share of examples whose inter-ocular error over all points exceeds 0.10; AUC@10 is
    the area under the cumulative error distribution (CED) up to 0.10, divided by 0.10.

    Args:
        errors, inner: (n,) from `interocular_errors` over all and over inner points, without NaN.
        boxed: (n,) from `box_errors`, without NaN.
        absolute: (n,) from `absolute_errors`, without NaN.
        weights: (…, n).

    Returns:
        Arrays of shape (…), fractions: nme_interocular (all labelled points),
        nme_interocular_inner, nme_box, fr10, auc10, and mae (of the crop's side). Every example
        counts alike in all of them, however many of its points are labelled.
    """
    total = weights.sum(-1)
    return {
        "nme_interocular": weights @ errors / total,
        "nme_interocular_inner": weights @ inner / total,
        "nme_box": weights @ boxed / total,
        "fr10": weights @ (errors > 0.10).astype(float) / total,
        # Each example adds to the curve from its own error onwards.
        "auc10": weights @ np.clip(1 - errors / 0.10, 0, 1) / total,
        "mae": weights @ absolute / total,
    }


def ced_curve(
    errors: np.ndarray, weights: np.ndarray, limit: float = 0.2, steps: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cumulative error distribution: the share of examples up to each error.

    Args:
        errors: (n,), without NaN.
        weights: (…, n).
        limit: the largest threshold.
        steps: equal steps from 0 to it.

    Returns:
        Thresholds (steps + 1,), and shares (…, steps + 1) of the examples whose error does not
        exceed them.
    """
    thresholds = np.linspace(0, limit, steps + 1)
    below = (errors[:, None] <= thresholds).astype(float)
    return thresholds, weights @ below / weights.sum(-1)[..., None]


def confusion(
    truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray, classes: int
) -> np.ndarray:
    """Count (…, classes, classes): rows are true classes, columns predicted ones.

    Args:
        truth, predicted: int (n,).
        weights: (…, n).
        classes: how many there are.
    """
    cells = np.zeros((len(truth), classes * classes), np.float32)
    cells[np.arange(len(truth)), truth * classes + predicted] = 1
    return (weights.astype(np.float32) @ cells).reshape(*weights.shape[:-1], classes, classes)


def emotion_metrics(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Summarise confusion matrices (…, C, C).

    Returns:
        Arrays of shape (…): accuracy, macro_f1 and balanced_accuracy; and of shape (…, C):
        precision, recall and f1. Means are over the classes that occur (in truth or prediction
        for F1, in truth for recall), as scikit-learn does.
    """
    right = np.diagonal(matrix, axis1=-2, axis2=-1)
    true, predicted = matrix.sum(-1), matrix.sum(-2)
    f1 = _ratio(2 * right, true + predicted)
    recall = _ratio(right, true)
    return {
        "accuracy": right.sum(-1) / matrix.sum((-1, -2)),
        "macro_f1": _mean_over(f1, true + predicted > 0),
        "balanced_accuracy": _mean_over(recall, true > 0),
        "precision": _ratio(right, predicted),
        "recall": recall,
        "f1": f1,
    }


def calibration(
    truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, bins: int = 15
) -> dict[str, np.ndarray]:
    """Hold a classifier's confidence against how often it is right.

    The expected calibration error (ECE; Guo et al. 2017, section 2): by the probability of the
    class answered, examples fall into bins of equal width, each open at its lower and closed at
    its upper end; the gap between mean confidence and accuracy of a bin, averaged over examples.
    The Brier score (Brier 1950) is the squared distance from the one-hot truth, summed over
    classes, 0 to 2. The negative log-likelihood takes probabilities below 1e-7 for 1e-7.

    Args:
        truth: int (n,).
        probabilities: (n, C).
        weights: (…, n).
        bins: how many there are.

    Returns:
        Arrays of shape (…): ece, brier, nll; and of shape (…, bins), the reliability curve:
        bin_share, the share of examples in a bin, their mean bin_confidence and their bin_accuracy
        (both 0 where there are none).
    """
    probabilities = probabilities.astype(np.float64)
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == truth
    own = probabilities[np.arange(len(truth)), truth]
    brier = (probabilities**2).sum(-1) - 2 * own + 1
    place = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    member = np.eye(bins)[place]
    parts = [member, member * confidence[:, None], member * right[:, None]]
    single = np.stack([brier, -np.log(np.maximum(own, 1e-7))], 1)
    means = weights @ np.concatenate([*parts, single], 1) / weights.sum(-1)[..., None]
    share, confident, correct = (means[..., k * bins : (k + 1) * bins] for k in range(3))
    return {
        "ece": np.abs(confident - correct).sum(-1),
        "brier": means[..., -2],
        "nll": means[..., -1],
        "bin_share": share,
        "bin_confidence": _ratio(confident, share),
        "bin_accuracy": _ratio(correct, share),
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part, dtype=float), where=whole > 0)


def _mean_over(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    return (values * present).sum(-1) / np.maximum(present.sum(-1), 1)
