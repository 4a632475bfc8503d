from collections.abc import Callable

import keras
import numpy as np
import pytest
from keras import layers

from models.backbones import plain, pyramid, residual, residual_full

Backbone = Callable[..., keras.KerasTensor]


def features(backbone: Backbone, size: int, widths: list[int], stem_stride: int = 1) -> keras.Model:
    inputs = keras.Input((size, size, 3))
    return keras.Model(inputs, backbone(inputs, widths, stem_stride=stem_stride))


@pytest.mark.parametrize("backbone", [plain, residual])
@pytest.mark.parametrize(
    ("size", "widths", "stem_stride", "side"),
    [(16, [4], 1, 8), (48, [4, 6, 8], 1, 6), (96, [4, 6, 8], 2, 6), (32, [4, 8], 2, 4)],
)
def test_each_block_halves(
    backbone: Backbone, size: int, widths: list[int], stem_stride: int, side: int
) -> None:
    model = features(backbone, size, widths, stem_stride)
    assert model.output_shape == (None, side, side, widths[-1])


@pytest.mark.parametrize(
    ("size", "widths", "stem_stride", "side"),
    [(16, [4], 1, 16), (48, [4, 6, 8], 1, 12), (96, [4, 6, 8], 2, 12)],
)
def test_the_first_stage_may_halve_nothing(
    size: int, widths: list[int], stem_stride: int, side: int
) -> None:
    model = features(residual_full, size, widths, stem_stride)
    assert model.output_shape == (None, side, side, widths[-1])


@pytest.mark.parametrize(
    ("size", "widths", "stem_stride", "side"),
    [(16, [4], 1, 8), (48, [4, 6, 8], 1, 24), (96, [4, 6, 8], 2, 24)],
)
def test_a_pyramid_is_as_large_as_its_first_stage(
    size: int, widths: list[int], stem_stride: int, side: int
) -> None:
    model = features(pyramid, size, widths, stem_stride)
    assert model.output_shape == (None, side, side, widths[-1] // 2)


@pytest.mark.parametrize("backbone", [plain, residual, residual_full, pyramid])
def test_it_keeps_to_what_int8_does_well(backbone: Backbone) -> None:
    model = features(backbone, 32, [4, 8])
    allowed = {
        "InputLayer",
        "Conv2D",
        "BatchNormalization",
        "ReLU",
        "MaxPooling2D",
        "Add",
        "UpSampling2D",
    }
    assert {type(layer).__name__ for layer in model.layers} <= allowed
    for layer in model.layers:
        if isinstance(layer, layers.Conv2D):
            assert not layer.use_bias  # the normalisation after it has one
        if isinstance(layer, layers.BatchNormalization):
            layer.gamma.assign(np.full(layer.gamma.shape, 1e4))
    answer = model.predict(np.random.default_rng(1).normal(size=(2, 32, 32, 3)), verbose=0)
    assert answer.min() >= 0 and answer.max() == 6


def test_a_residual_block_adds_to_its_input() -> None:
    """With its branch silenced the second block of a stage hands on what the first gave it."""
    inputs = keras.Input((16, 16, 1))
    model = keras.Model(inputs, residual(inputs, [4]))
    first, second = (
        layer
        for layer in model.layers
        if isinstance(layer, layers.ReLU) and isinstance(_source(layer), layers.Add)
    )
    branch, shortcut = _source(second).input
    last = next(layer for layer in model.layers if layer.output is branch)
    last.gamma.assign(np.zeros(4))
    assert shortcut is first.output
    both = keras.Model(inputs, [first.output, second.output])
    before, after = both.predict(np.random.default_rng(1).random((2, 16, 16, 1)), verbose=0)
    assert before.any() and np.array_equal(before, after)


def _source(layer: keras.Layer) -> keras.Layer:
    return layer.input._keras_history.operation
