"""Emotion classifiers: a backbone, global average pooling, and a softmax over seven classes."""

from collections.abc import Sequence

import keras
from keras import layers

from models.backbones import BACKBONES
from models.schemes import EMOTIONS

NETWORKS = BACKBONES


def build(
    network: str,
    widths: Sequence[int],
    size: int,
    channels: int,
    dropout: float,
    weights: str | None = None,
) -> keras.Model:
    """Build a classifier.

    Global average pooling as in Lin et al. 2014 (Network in Network, section 3.2). Rescaling is
    part of the graph, so every runtime takes the same raw pixels.

    Args:
        network: a name in `NETWORKS`.
        widths: channels of the backbone's blocks.
        size: side of the input in pixels.
        channels: 1 grey, 3 RGB.
        dropout: share of pooled features dropped in training.
        weights: none of these networks has any to start from.

    Returns:
        float32 (N, size, size, channels), 0 to 255 → float32 (N, 7) probabilities in the order of
        `models.schemes.EMOTIONS`.

    Raises:
        ValueError: weights are asked for.
    """
    if weights is not None:
        raise ValueError(f"network {network} has no weights {weights!r} to start from")
    inputs = keras.Input((size, size, channels), name="image", dtype="float32")
    x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = NETWORKS[network](x, widths, stem_stride=max(1, size // 48))
    x = layers.GlobalAveragePooling2D()(x)
    if dropout:
        x = layers.Dropout(dropout)(x)
    x = layers.Dense(len(EMOTIONS), dtype="float32")(x)
    outputs = layers.Softmax(dtype="float32", name="probabilities")(x)
    return keras.Model(inputs, outputs, name=f"emotion_{network}")
