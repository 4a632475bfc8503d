"""What training minimises and watches, where Keras does not have it.

Truth may carry a teacher's answers behind the labels, along the last axis (`pipelines.distill`):
then the loss is the labels' part and the teacher's part, weighed. Without, it is the labels' alone,
as on validation. Lengths are in crop units: 1 is the crop's side.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from models.schemes import SCHEMES

Loss = Callable[[Any, Any], Any]

GAMMA = 2.0  # of the focal loss, the paper's best
WIDTH, CURVATURE = 0.1, 0.02  # of wing and adaptive wing: their w or θ, and ε
EXPONENT = 1.1  # of the adaptive wing: the paper's α less 1
# Of the soft wing: the paper's 2, 20 and 0.5 pixels of its 256.
SOFT_START, SOFT_WIDTH, SOFT_CURVATURE = 2 / 256, 20 / 256, 0.5 / 256


def emotion_loss(
    kind: str, label_smoothing: float = 0.0, teacher_weight: float = 0.0, temperature: float = 1.0
) -> Loss:
    """Return the loss of a classifier.

    The teacher's part is the Kullback-Leibler divergence of the student's probabilities at the
    same temperature from the teacher's, times the temperature's square, which keeps its gradient
    as large whatever the temperature (Hinton et al. 2015, section 2).

    Args:
        kind: "cross_entropy", or "focal" (Lin et al. 2017, equation 4, γ 2; its α is left to class
            weights).
        label_smoothing: share of the labels that is spread over all classes (Szegedy et al. 2016,
            section 7).
        teacher_weight: share of the teacher's part.
        temperature: at which the teacher's probabilities were taken.

    Returns:
        A function of truth float (B, C), or (B, 2·C) with a teacher's probabilities behind, and
        predicted probabilities float (B, C), that returns the loss of each example, float (B,).
    """

    def labels_part(y_true: Any, y_pred: Any) -> Any:
        if kind == "focal":
            return keras.losses.categorical_focal_crossentropy(
                y_true, y_pred, alpha=1.0, gamma=GAMMA, label_smoothing=label_smoothing
            )
        return keras.losses.categorical_crossentropy(
            y_true, y_pred, label_smoothing=label_smoothing
        )

    def loss(y_true: Any, y_pred: Any) -> Any:
        classes = y_pred.shape[-1]
        if y_true.shape[-1] == classes:
            return labels_part(y_true, y_pred)
        taught = y_true[..., classes:]
        # A softmax of p^(1/T) is the softmax of logits / T.
        student = ops.log_softmax(ops.log(_positive(y_pred)) / temperature)
        divergence = ops.sum(taught * (ops.log(_positive(taught)) - student), axis=-1)
        hard = labels_part(y_true[..., :classes], y_pred)
        return (1 - teacher_weight) * hard + teacher_weight * temperature**2 * divergence

    return loss


def landmark_loss(kind: str, teacher_weight: float = 0.0) -> Loss:
    """Return the loss of a regressor of coordinates: a penalty, averaged over visible coordinates.

    The teacher's part is the same penalty of the distance to the teacher's coordinates (the
    regression of Hinton's idea), over every point that the teacher places inside the crop, be it
    labelled or not.

    Args:
        kind: a name in `PENALTIES`.
        teacher_weight: share of the teacher's part.

    Returns:
        A function of truth float (B, N, 3), that is x, y in crop coordinates, and 1 where visible,
        0 where not, or (B, N, 5) with a teacher's x and y behind, and predicted float (B, N, 2),
        that returns the loss of each example, float (B,); 0 where nothing is visible.
    """
    penalty = PENALTIES[kind]

    def masked_mean(target: Any, mask: Any, y_pred: Any) -> Any:
        loss = penalty(ops.abs(y_pred - target)) * mask
        return ops.sum(loss, axis=(1, 2)) / ops.maximum(2 * ops.sum(mask, axis=(1, 2)), 1)

    def loss(y_true: Any, y_pred: Any) -> Any:
        labelled = masked_mean(y_true[..., :2], y_true[..., 2:3], y_pred)
        if y_true.shape[-1] == 3:
            return labelled
        taught = y_true[..., 3:]
        inside = ops.all((taught >= 0) & (taught <= 1), axis=-1, keepdims=True)
        taught_part = masked_mean(taught, ops.cast(inside, y_pred.dtype), y_pred)
        return (1 - teacher_weight) * labelled + teacher_weight * taught_part

    return loss


def wing(error: Any) -> Any:
    """Wing loss (Feng et al. 2018, section 4, equation 5).

    Logarithmic near zero, so small errors still pull; linear beyond `WIDTH`, so outliers do not
    dominate.

    Args:
        error: float, of any shape, not negative.

    Returns:
        The penalty, of the same shape.
    """
    offset = WIDTH - WIDTH * math.log1p(WIDTH / CURVATURE)
    near = WIDTH * ops.log1p(error / CURVATURE)
    return ops.where(error < WIDTH, near, error - offset)


def adaptive_wing(error: Any) -> Any:
    """Adaptive wing loss (Wang, Bo and Fuxin 2019), carried over to coordinates.

    The paper's is for heat maps: its exponent α - y falls from 2.1 on the background (y = 0), where
    the loss is that of squared errors, to 1.1 on a landmark's peak (y = 1), where it is a wing.
    Coordinates have no background, so the exponent is that of the peak. What is left is a wing that
    is flat at zero and whose slope has no jump; its factor ω is such that the slope beyond `WIDTH`
    is 1, as in `wing`, so both go with the same learning rate.

    Args:
        error: float, of any shape, not negative.

    Returns:
        The penalty, of the same shape.
    """
    power = (WIDTH / CURVATURE) ** EXPONENT
    factor = WIDTH * (1 + power) / (EXPONENT * power)  # ω, from slope A = 1
    offset = WIDTH - factor * math.log1p(power)
    # Else the gradient of the power at 0, where it is not chosen, is not a number under some
    # backends.
    inside = ops.clip(error, 1e-9, WIDTH)
    near = factor * ops.log1p(ops.power(inside / CURVATURE, EXPONENT))
    return ops.where(error < WIDTH, near, error - offset)


def soft_wing(error: Any) -> Any:
    """Soft wing loss (Lin et al. 2021, Structure-Coherent Deep Feature Learning).

    Linear up to `SOFT_START`, so that what is nearly right is not chased through the noise of its
    label; then logarithmic, which pulls at medium errors most and least at large ones.

    Args:
        error: float, of any shape, not negative.

    Returns:
        The penalty, of the same shape.
    """
    offset = SOFT_START - SOFT_WIDTH * math.log1p(SOFT_START / SOFT_CURVATURE)
    return ops.where(
        error < SOFT_START, error, SOFT_WIDTH * ops.log1p(error / SOFT_CURVATURE) + offset
    )


PENALTIES: dict[str, Callable[[Any], Any]] = {
    "wing": wing,
    "adaptive_wing": adaptive_wing,
    "soft_wing": soft_wing,
    "mse": ops.square,
    "mae": lambda error: error,
}


def accuracy(y_true: Any, y_pred: Any) -> Any:
    """Return 1.0 for each example whose largest probability is its largest label's, float (B,).

    Args:
        y_true: float (B, C) or more, whose first C are the labels; they may be mixed ones.
        y_pred: float (B, C).
    """
    labels = y_true[..., : y_pred.shape[-1]]
    return ops.cast(ops.argmax(labels, axis=-1) == ops.argmax(y_pred, axis=-1), y_pred.dtype)


def _positive(probabilities: Any) -> Any:
    return ops.clip(probabilities, keras.backend.epsilon(), 1.0)


def nme(y_true: Any, y_pred: Any) -> Any:
    """Inter-ocular NME of a batch, for watching a training.

    Args:
        y_true: float (B, N, 3) or more: x, y, visible; N is the size of a scheme.
        y_pred: float (B, N, 2).

    Returns:
        float (B,). Examples whose two `eyes` coincide or are hidden count as 0; evaluation proper
        uses `metrics.interocular_errors`, which leaves them out.
    """
    mask = y_true[..., 2]
    distance = ops.norm(y_pred - y_true[..., :2], axis=-1) * mask
    mean = ops.sum(distance, axis=-1) / ops.maximum(ops.sum(mask, axis=-1), 1)
    left, right = SCHEMES[y_pred.shape[1]].eyes
    eyes = ops.norm(y_true[:, left, :2] - y_true[:, right, :2], axis=-1)
    valid = mask[:, left] * mask[:, right] * ops.cast(eyes > 1e-6, mask.dtype)
    return valid * mean / ops.maximum(eyes, 1e-6)
