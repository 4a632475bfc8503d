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


def _mean_distance(truth: np.ndarray, predicted: np.ndarray, visible: np.ndarray) -> np.ndarray:
    error = np.linalg.norm(truth - predicted, axis=-1)
    counts = visible.sum(1)
    return (error * visible).sum(1) / np.where(counts > 0, counts, np.nan)


def landmark_metrics(
    errors: np.ndarray, inner: np.ndarray, boxed: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Summarise per-example errors.

    FR@10 is the share of examples whose inter-ocular error over all points exceeds 0.10; AUC@10 is
    the area under the cumulative error distribution (CED) up to 0.10, divided by 0.10.

    Args:
        errors, inner: (n,) from `interocular_errors` over all and over inner points, without NaN.
        boxed: (n,) from `box_errors`, without NaN.
        weights: (…, n).

    Returns:
        Arrays of shape (…), fractions: nme_interocular (all labelled points),
        nme_interocular_inner, nme_box, fr10, auc10.
    """
    total = weights.sum(-1)
    return {
        "nme_interocular": weights @ errors / total,
        "nme_interocular_inner": weights @ inner / total,
        "nme_box": weights @ boxed / total,
        "fr10": weights @ (errors > 0.10).astype(float) / total,
        # Each example adds to the curve from its own error onwards.
        "auc10": weights @ np.clip(1 - errors / 0.10, 0, 1) / total,
    }


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


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part, dtype=float), where=whole > 0)


def _mean_over(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    return (values * present).sum(-1) / np.maximum(present.sum(-1), 1)
