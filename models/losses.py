"""What training minimises and watches, where Keras does not have it."""

import math
from typing import Any

import keras
from keras import ops

from models.schemes import SCHEMES


@keras.saving.register_keras_serializable(package="grimace")
class MaskedWing(keras.losses.Loss):
    """Wing loss (Feng et al. 2018, section 4, equation 5) over the visible landmarks.

    Logarithmic near zero, so small errors still pull; linear beyond `width`, so outliers do not
    dominate.

    Args:
        width: error at which the loss becomes linear, in crop units.
        curvature: ε of the paper, in crop units.
    """

    def __init__(self, width: float = 0.1, curvature: float = 0.02, **kwargs: Any) -> None:
        super().__init__(**{"name": "masked_wing", **kwargs})
        self.width, self.curvature = width, curvature

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each example.

        Args:
            y_true: float (B, N, 3): x, y in crop coordinates, and 1 where visible, 0 where not.
            y_pred: float (B, N, 2).

        Returns:
            float (B,): mean over visible coordinates; 0 where nothing is visible.
        """
        mask = y_true[..., 2:]
        error = ops.abs(y_pred - y_true[..., :2])
        offset = self.width - self.width * math.log1p(self.width / self.curvature)
        near = self.width * ops.log1p(error / self.curvature)
        loss = ops.where(error < self.width, near, error - offset) * mask
        return ops.sum(loss, axis=(1, 2)) / ops.maximum(2 * ops.sum(mask, axis=(1, 2)), 1)

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {**super().get_config(), "width": self.width, "curvature": self.curvature}


@keras.saving.register_keras_serializable(package="grimace")
def nme(y_true: Any, y_pred: Any) -> Any:
    """Inter-ocular NME of a batch, for watching a training.

    Args:
        y_true: float (B, N, 3): x, y, visible; N is the size of a scheme.
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
