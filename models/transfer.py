"""Feature extractors from `keras.applications`, and the two phases of training with them.

First the base is frozen and only the new layers learn, then all of it does, at a small learning
rate: `set_frozen(model, True)`, compile, fit; `set_frozen(model, False)`, compile, fit.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
from keras import layers, ops

SIDE = 96  # of the smallest image a base is given: both halve it five times
# The base's name in a model tells, after saving and loading too, whether it was pretrained.
PRETRAINED, UNTRAINED = "pretrained", "untrained"
SIDES = (96, 128, 160, 192, 224)  # for which there are ImageNet weights of MobileNetV2


class WeightsUnavailableError(OSError):
    """Pretrained weights cannot be had; the message says where they are looked for."""


def vgg19(images: keras.KerasTensor, weights: str | None) -> keras.KerasTensor:
    """Return the features of VGG19 (Simonyan and Zisserman 2015, table 1, column E).

    Args:
        images: float32 (N, S, S, 1 or 3), grey or RGB, 0 to 255.
        weights: None, "imagenet", or the path of a file with the weights of the base.

    Returns:
        (N, ⌊side / 32⌋, …, 512) with side = max(96, S). They are normalised, since VGG itself is
        not and its features run into the hundreds.

    Raises:
        WeightsUnavailableError: the weights cannot be had.
    """
    x = _colours(_large_enough(images), reverse=True)
    # keras.applications' preprocessing "caffe": BGR, less ImageNet's mean colour.
    x = layers.Rescaling(1.0, offset=[-103.939, -116.779, -123.68], dtype="float32")(x)
    file = "vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5"
    x = _base(keras.applications.VGG19, file, x, weights)
    return layers.BatchNormalization()(x)


def mobilenet_v2(images: keras.KerasTensor, weights: str | None) -> keras.KerasTensor:
    """Return the features of MobileNetV2 1.0 (Sandler et al. 2018, table 2).

    Of the mobile networks it is the one for eight bits: ReLU6 throughout, no squeeze-and-excite
    and no hard-swish.

    Args:
        images: float32 (N, S, S, 1 or 3), grey or RGB, 0 to 255.
        weights: None, "imagenet", or the path of a file with the weights of the base.

    Returns:
        (N, ⌈side / 32⌉, …, 1280) with side = max(96, S), from 0 to 6.

    Raises:
        WeightsUnavailableError: the weights cannot be had.
    """
    x = _colours(_large_enough(images), reverse=False)
    x = layers.Rescaling(1 / 127.5, offset=-1.0, dtype="float32")(x)
    side = x.shape[1] if x.shape[1] in SIDES else 224
    file = f"mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_{side}_no_top.h5"
    return _base(keras.applications.MobileNetV2, file, x, weights)


def set_frozen(model: keras.Model, frozen: bool) -> None:
    """Freeze or unfreeze the base of a transfer network; compile the model again afterwards.

    Batch normalisation of a pretrained base never learns and always uses the statistics it came
    with: those of a few batches of another kind of image would wreck what the layers after it
    have learnt (Keras's guide "Transfer learning & fine-tuning"). The guide's way, calling the
    base with `training=False`, has no effect on a nested model in Keras 3.15, where `fit`
    overrides it; not being trainable does (`keras.layers.BatchNormalization`, "About setting
    `layer.trainable = False`"). A base without pretrained weights is normalised as usual.

    Args:
        model: built with `vgg19` or `mobilenet_v2`, or loaded from a file.
        frozen: whether the base keeps its weights in training.

    Raises:
        ValueError: the model has no such base.
    """
    base = next((x for x in model.layers if x.name in (PRETRAINED, UNTRAINED)), None)
    if base is None:
        raise ValueError(f"{model.name} is no transfer network: it has no base to freeze")
    base.trainable = not frozen
    if base.name == PRETRAINED:
        for layer in base.layers:
            if isinstance(layer, layers.BatchNormalization):
                layer.trainable = False


def _large_enough(images: keras.KerasTensor) -> keras.KerasTensor:
    if images.shape[1] >= SIDE:
        return images
    # Not `layers.Resizing`: called without `training`, as by `model.export`, it takes it to be
    # True, and in Keras 3.15 so do all layers after it.
    return ops.image.resize(images, (SIDE, SIDE), interpolation="bilinear")


def _colours(images: keras.KerasTensor, reverse: bool) -> keras.KerasTensor:
    """Return three channels: grey three times, or RGB, `reverse`d to BGR."""
    if images.shape[-1] == 1:
        return layers.Concatenate(dtype="float32")([images] * 3)
    if not reverse:
        return images
    return layers.Concatenate(dtype="float32")([images[..., i : i + 1] for i in (2, 1, 0)])


def _base(
    application: Callable[..., Any], file: str, images: keras.KerasTensor, weights: str | None
) -> keras.KerasTensor:
    if weights not in (None, "imagenet") and not Path(weights).is_file():
        raise WeightsUnavailableError(f"{weights}: there is no such file of pretrained weights")
    name = UNTRAINED if weights is None else PRETRAINED
    shape = images.shape[1:]
    try:
        base = application(include_top=False, weights=weights, input_shape=shape, name=name)
    except Exception as error:  # Keras raises bare Exceptions, and h5py whatever it finds
        raise WeightsUnavailableError(
            _advice(application.__name__, file, weights, error)
        ) from error
    features = base(images)
    if weights is not None:
        for layer in base.layers:
            layer.trainable = not isinstance(layer, layers.BatchNormalization)
    return features


def _advice(application: str, file: str, weights: str | None, error: Exception) -> str:
    if weights != "imagenet":
        return f"{weights} does not hold the weights of {application} without its top: {error}"
    folder = Path(os.environ.get("KERAS_HOME", "~/.keras"), "models").expanduser()
    return (
        f"the ImageNet weights of {application} cannot be had: {error}. Keras looks for "
        f"{folder / file} and downloads it where it is missing. Put it there by hand, or give "
        "`weights` the path of a file with the weights of the base, or train from scratch with "
        "`weights: null`"
    )
