import keras
import numpy as np
import pytest
from keras import layers, ops

from models.cost import multiply_adds


def model(*chain: keras.Layer, shape: tuple[int, ...] = (8, 6, 3)) -> keras.Model:
    x = inputs = keras.Input(shape)
    for layer in chain:
        x = layer(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (layers.Conv2D(5, 3, padding="same"), 8 * 6 * 3 * 3 * 3 * 5),
        (layers.Conv2D(5, (3, 2)), 6 * 5 * 3 * 2 * 3 * 5),
        (layers.Conv2D(4, 1, strides=2), 4 * 3 * 3 * 4),
        (layers.Conv2D(6, 3, padding="same", groups=3), 8 * 6 * 3 * 3 * 1 * 6),
        (layers.DepthwiseConv2D(3, depth_multiplier=2), 6 * 4 * 3 * 3 * 3 * 2),
        (layers.SeparableConv2D(5, 3), 6 * 4 * (3 * 3 * 3 + 3 * 5)),
        (layers.Conv2DTranspose(5, 2, strides=2), 8 * 6 * 2 * 2 * 3 * 5),
        (layers.Dense(7), 8 * 6 * 3 * 7),
        (layers.BatchNormalization(), 0),
        (layers.MaxPooling2D(2), 0),
        (layers.UpSampling2D(2), 0),
    ],
)
def test_one_layer_against_a_count_by_hand(layer: keras.Layer, expected: int) -> None:
    assert multiply_adds(model(layer)) == expected


def test_a_product_with_a_constant_counts() -> None:
    inputs = keras.Input((4, 9))
    product = keras.Model(inputs, ops.matmul(inputs, np.ones((9, 2))))
    assert multiply_adds(product) == 4 * 9 * 2


def test_nested_models_count_too() -> None:
    inner = model(layers.Conv2D(4, 3, padding="same"), layers.ReLU())
    outer = model(inner, layers.Flatten(), layers.Dense(10), layers.Softmax())
    assert multiply_adds(outer) == 8 * 6 * 9 * 3 * 4 + 8 * 6 * 4 * 10


def test_what_it_cannot_count_is_not_passed_over() -> None:
    with pytest.raises(ValueError, match="GRU"):
        multiply_adds(model(layers.GRU(2), shape=(8, 3)))
