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

    The mean distance of its visible points, over the distance of the two outer eye corners
    (300-W: Sagonas et al. 2013).

    Args:
        truth, predicted: (n, N, 2), any common unit.
        visible: bool (n, N).
        scheme: names the eye corners.
        inner: leave the face outline out.

    Returns:
        float64 (n,), a fraction; NaN where an eye corner or every point is invisible.
    """
    truth, predicted = truth.astype(np.float64), predicted.astype(np.float64)
    corners = [scheme.left_eye_outer, scheme.right_eye_outer]
    distance = np.linalg.norm(truth[:, corners[0]] - truth[:, corners[1]], axis=-1)
    distance = np.where(visible[:, corners].all(1) & (distance > 0), distance, np.nan)
    chosen = list(scheme.inner) if inner else list(range(scheme.size))
    error = np.linalg.norm(truth - predicted, axis=-1)[:, chosen]
    counts = visible[:, chosen].sum(1)
    total = (error * visible[:, chosen]).sum(1)
    return total / np.where(counts > 0, counts, np.nan) / distance


def landmark_metrics(
    errors: np.ndarray, inner_errors: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Summarise per-example errors.

    FR@10 is the share of examples whose 68-point error exceeds 0.10; AUC@10 is the area under the
    cumulative error distribution (CED) up to 0.10, divided by 0.10.

    Args:
        errors, inner_errors: (n,) from `interocular_errors`, without NaN.
        weights: (…, n).

    Returns:
        Arrays of shape (…), fractions: nme_interocular_68, nme_interocular_51, fr10, auc10.
    """
    total = weights.sum(-1)
    return {
        "nme_interocular_68": weights @ errors / total,
        "nme_interocular_51": weights @ inner_errors / total,
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
