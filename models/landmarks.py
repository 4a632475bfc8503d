"""Landmark regressors: a backbone and a dense layer that places all points at once."""

from collections.abc import Sequence

import keras
from keras import layers

from models.backbones import BACKBONES, MOMENTUM

NETWORKS = BACKBONES


def build(
    network: str,
    widths: Sequence[int],
    size: int,
    channels: int,
    dropout: float,
    points: int,
    weights: str | None = None,
) -> keras.Model:
    """Build a coordinate regressor.

    The feature map is flattened, not pooled: where a feature lies is what is asked for. A 1×1
    convolution narrows it first, which keeps the dense layer small.

    Args:
        network: a name in `NETWORKS`.
        widths: channels of the backbone's blocks.
        size: side of the input in pixels.
        channels: 1 grey, 3 RGB.
        dropout: share of flattened features dropped in training.
        points: number of landmarks.
        weights: none of these networks has any to start from.

    Returns:
        float32 (N, size, size, channels), 0 to 255 → float32 (N, points, 2), (x, y) in crop
        coordinates, y down; a point outside the crop lies outside [0, 1].

    Raises:
        ValueError: weights are asked for.
    """
    if weights is not None:
        raise ValueError(f"network {network} has no weights {weights!r} to start from")
    inputs = keras.Input((size, size, channels), name="image", dtype="float32")
    x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = NETWORKS[network](x, widths, stem_stride=max(1, size // 48))
    x = layers.Conv2D(32, 1, use_bias=False)(x)
    x = layers.BatchNormalization(momentum=MOMENTUM)(x)
    x = layers.ReLU(max_value=6.0)(x)
    x = layers.Flatten()(x)
    if dropout:
        x = layers.Dropout(dropout)(x)
    # The middle of the crop is where an untrained network had best put every point.
    centre = keras.initializers.Constant(0.5)
    x = layers.Dense(points * 2, bias_initializer=centre, dtype="float32")(x)
    outputs = layers.Reshape((points, 2), dtype="float32", name="landmarks")(x)
    return keras.Model(inputs, outputs, name=f"landmarks_{network}")
