"""Convolutional feature extractors shared by the emotion and the landmark heads.

All keep to what int8 runtimes do well: ordinary 3×3 convolutions, batch
normalisation (folded away on export) and ReLU6, whose output range is bounded. There is no
squeeze-and-excite and no hard-swish: both lose accuracy when their wide-ranging products are
rounded to eight bits.
"""

from collections.abc import Sequence

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
    return _residual_stages(x, widths)[-1]


def pyramid(x: keras.KerasTensor, widths: Sequence[int], stem_stride: int = 1) -> keras.KerasTensor:
    """Add the later stages of `residual` to its first, as large as that one is.

    The top-down path of a feature pyramid (Lin et al. 2017, section 3), with a 3×3 convolution
    after every addition.

    Args:
        x: features, (N, H, W, C) float, with H and W divisible by stem_stride · 2^len(widths).
        widths: channels of each stage, as for `residual`.
        stem_stride: stride of the stem, 2 for inputs twice as large.

    Returns:
        Features, (N, H / (2 · stem_stride), …, widths[-1] / 2).
    """
    x = _conv(x, widths[0] // 2, strides=stem_stride)
    *earlier, x = _residual_stages(x, widths)
    x = _conv(x, widths[-1] // 2, size=1)
    for stage in reversed(earlier):
        # Not "nearest", which Keras builds of repetitions instead of one resizing operation.
        x = layers.UpSampling2D(2, interpolation="bilinear")(x)
        x = layers.Add()([x, _conv(stage, widths[-1] // 2, size=1)])
        x = _conv(x, widths[-1] // 2)
    return x


def residual_full(
    x: keras.KerasTensor, widths: Sequence[int], stem_stride: int = 1
) -> keras.KerasTensor:
    """Stack the blocks of `residual` with a wide stem and a first stage that halves nothing.

    The layout of ResNet-18 for small images: costlier by far, but no detail is given away before
    it has been looked at.

    Args:
        x: features, (N, H, W, C) float.
        widths: channels of each stage of two blocks; every stage but the first starts by halving
            height and width.
        stem_stride: stride of the stem, 2 for inputs twice as large.

    Returns:
        Features, (N, H / (stem_stride · 2^(len(widths) - 1)), …, widths[-1]).
    """
    x = _conv(x, widths[0], strides=stem_stride)
    return _residual_stages(x, widths, first_stride=1)[-1]


def _residual_stages(
    x: keras.KerasTensor, widths: Sequence[int], first_stride: int = 2
) -> list[keras.KerasTensor]:
    stages = []
    for index, width in enumerate(widths):
        x = _residual_block(x, width, strides=2 if index else first_stride)
        x = _residual_block(x, width, strides=1)
        stages.append(x)
    return stages


def _residual_block(x: keras.KerasTensor, width: int, strides: int) -> keras.KerasTensor:
    shortcut = x
    if strides != 1 or x.shape[-1] != width:
        shortcut = layers.Conv2D(width, 1, strides=strides, use_bias=False)(x)
        shortcut = layers.BatchNormalization(momentum=MOMENTUM)(shortcut)
    y = _conv(x, width, strides=strides)
    y = layers.Conv2D(width, 3, padding="same", use_bias=False)(y)
    y = layers.BatchNormalization(momentum=MOMENTUM)(y)
    return layers.ReLU(max_value=6.0)(layers.Add()([y, shortcut]))


def _conv(x: keras.KerasTensor, width: int, strides: int = 1, size: int = 3) -> keras.KerasTensor:
    x = layers.Conv2D(width, size, strides=strides, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization(momentum=MOMENTUM)(x)
    return layers.ReLU(max_value=6.0)(x)
