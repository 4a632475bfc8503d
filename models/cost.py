"""What a network costs to run, counted from the shapes of its layers."""

import math
from typing import Any

import keras
from keras import layers


def multiply_adds(model: keras.Model) -> int:
    """Count the multiply-adds of one forward pass of one image.

    Counted are convolutions, dense layers and matrix products, those of nested models included.
    Biases, activations, pooling, resizing, softmax and batch normalisation, which exporters fold
    into the convolution before it, are not.

    Args:
        model: a functional model with fixed input height and width, each layer used once.

    Raises:
        ValueError: a layer has weights and is of a kind that this function does not know.
    """
    return sum(_of(operation) for operation in model.operations)


def _of(operation: Any) -> int:
    # Kernels: (height, width, in / groups, out); depthwise ones (height, width, in, multiplier).
    if isinstance(operation, keras.Model):
        return multiply_adds(operation)
    if isinstance(operation, layers.SeparableConv2D):
        kernels = operation.depthwise_kernel, operation.pointwise_kernel
        return _pixels(operation.output) * sum(math.prod(kernel.shape) for kernel in kernels)
    if isinstance(operation, layers.Conv2DTranspose):
        return _pixels(operation.input) * math.prod(operation.kernel.shape)
    if isinstance(operation, layers.Conv2D | layers.DepthwiseConv2D | layers.Dense):
        return _pixels(operation.output) * math.prod(operation.kernel.shape)
    if type(operation).__name__ == "Matmul":  # by a constant; Keras exports the function alone
        return math.prod(operation.output.shape[1:]) * operation.input.shape[-1]
    if isinstance(operation, keras.Layer) and operation.weights:
        if isinstance(operation, layers.BatchNormalization | layers.Dropout):
            return 0
        raise ValueError(f"the multiply-adds of {type(operation).__name__} are not known here")
    return 0


def _pixels(tensor: keras.KerasTensor) -> int:
    return math.prod(tensor.shape[1:-1])
