"""Convolutional feature extractors shared by the emotion and the landmark heads.

Both keep to what int8 runtimes do well: ordinary 3×3 convolutions, batch normalisation (folded
away on export) and ReLU6, whose output range is bounded. There is no squeeze-and-excite and no
hard-swish: both lose accuracy when their wide-ranging products are rounded to eight bits.
"""

from collections.abc import Callable, Sequence

import keras
from keras import layers

# Keras's own 0.99 lags behind a training of a few hundred steps, and validation with it.
MOMENTUM = 0.9


def plain(x: keras.KerasTensor, widths: Sequence[int], stem_stride: int = 1) -> keras.KerasTensor:
    """Stack blocks of two 3×3 convolutions and a 2×2 max pooling.

    The shape of a small VGG (Simonyan and Zisserman 2015, section 2) with batch normalisation.

    Args:
        x: features, (N, H, W, C) float.
        widths: channels of each block; every block halves height and width.
        stem_stride: stride of the very first convolution, 2 for inputs twice as large.

    Returns:
        Features, (N, H / (stem_stride · 2^len(widths)), …, widths[-1]).
    """
    for index, width in enumerate(widths):
        x = _conv(x, width, strides=stem_stride if index == 0 else 1)
        x = _conv(x, width)
        x = layers.MaxPooling2D(2)(x)
    return x


def residual(
    x: keras.KerasTensor, widths: Sequence[int], stem_stride: int = 1
) -> keras.KerasTensor:
    """Stack residual blocks (He et al. 2016, section 3.3, option B shortcuts) after a 3×3 stem.

    Args:
        x: features, (N, H, W, C) float.
        widths: channels of each stage; every stage starts by halving height and width and holds
            two blocks, the first of which projects its shortcut.
        stem_stride: stride of the stem, 2 for inputs twice as large.

    Returns:
        Features, (N, H / (stem_stride · 2^len(widths)), …, widths[-1]).
    """
    x = _conv(x, widths[0] // 2, strides=stem_stride)
    for width in widths:
        x = _residual_block(x, width, strides=2)
        x = _residual_block(x, width, strides=1)
    return x


def _residual_block(x: keras.KerasTensor, width: int, strides: int) -> keras.KerasTensor:
    shortcut = x
    if strides != 1 or x.shape[-1] != width:
        shortcut = layers.Conv2D(width, 1, strides=strides, use_bias=False)(x)
        shortcut = layers.BatchNormalization(momentum=MOMENTUM)(shortcut)
    y = _conv(x, width, strides=strides)
    y = layers.Conv2D(width, 3, padding="same", use_bias=False)(y)
    y = layers.BatchNormalization(momentum=MOMENTUM)(y)
    return layers.ReLU(max_value=6.0)(layers.Add()([y, shortcut]))


def _conv(x: keras.KerasTensor, width: int, strides: int = 1) -> keras.KerasTensor:
    x = layers.Conv2D(width, 3, strides=strides, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization(momentum=MOMENTUM)(x)
    return layers.ReLU(max_value=6.0)(x)


BACKBONES: dict[str, Callable[..., keras.KerasTensor]] = {"plain": plain, "residual": residual}
