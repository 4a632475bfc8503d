"""From scores over places to coordinates, inside the graph and in float32.

The layer whose output is decoded is called "logits" in every network that decodes. What comes
after it has no weights, so an exporter can cut the graph there and leave the decoding, which
eight bits would blur, to float arithmetic:

    head = keras.Model(model.inputs, model.get_layer(decoders.LOGITS).output)
    tail = keras.Model(head.outputs, model.outputs)

A place is the expectation under the softmax of the logits, which has no factor β. The layer before
it is linear and learns its own scale, so that β would only scale that layer's first weights and its
steps. At β = 1, which Sun et al. take too, the untrained distribution is nearly even and its mean
near the middle of the crop, and every cell gets a gradient; at a large β only those near the
highest do. What an even background adds, a pull towards the middle (Gu et al. 2021), the loss sees
and training corrects, since it acts on the mean itself.
"""

import keras
import numpy as np
from keras import layers, ops

LOGITS = "logits"
REACH = 0.25  # how far outside the crop `one_dimensional` can put a point, in crop units


def one_dimensional(x: keras.KerasTensor, points: int, bins: int) -> keras.KerasTensor:
    """Place points by two classifications each, of x and of y (SimCC, Li et al. 2022).

    As in its section 3 a 1×1 convolution gives every point a map, which is flattened, and dense
    layers shared by all points turn it into scores of bins along x and along y. Two things differ:
    the bins also cover a margin of `REACH` around the crop, so that points outside it can be
    placed, and the place is the expectation instead of the highest bin, which needs no finer bins
    than one a pixel and is trained by the same losses as any other network here.

    Args:
        x: features, (N, H, W, C) float.
        points: number of landmarks.
        bins: number of bins along each axis.

    Returns:
        float32 (N, points, 2), (x, y) in crop units, within `REACH` of the crop.
    """
    height, width = x.shape[1:3]
    x = layers.Conv2D(points, 1, use_bias=False)(x)
    x = layers.Reshape((height * width, points))(x)
    x = layers.Permute((2, 1))(x)
    x = layers.Dense(2 * bins, dtype="float32", name=LOGITS)(x)
    x = layers.Reshape((2 * points, bins), dtype="float32")(x)
    shares = layers.Softmax(dtype="float32")(x)
    x = ops.matmul(shares, _column(_centres(bins) * (1 + 2 * REACH) - REACH))
    return layers.Reshape((points, 2), dtype="float32")(x)


def two_dimensional(x: keras.KerasTensor, points: int) -> keras.KerasTensor:
    """Place points at the mean of a heat map each (integral regression, Sun et al. 2018).

    Args:
        x: features, (N, H, W, C) float, that cover the crop.
        points: number of landmarks.

    Returns:
        float32 (N, points, 2), (x, y) in crop units. A mean of cell centres stays half a cell
        inside the crop's edge, from 1 / 2W to 1 - 1 / 2W: a point outside comes out at the edge.
    """
    height, width = x.shape[1:3]
    # Without a bias, which the softmax would cancel.
    x = layers.Conv2D(points, 1, use_bias=False, dtype="float32", name=LOGITS)(x)
    x = layers.Reshape((height * width, points), dtype="float32")(x)
    x = layers.Permute((2, 1), dtype="float32")(x)
    shares = layers.Softmax(dtype="float32")(x)
    shares = layers.Reshape((points, height, width), dtype="float32")(shares)
    # By columns and by rows: of a matrix of all cells' places, converters would take the
    # entries for weights, and round the coordinates to eight bits.
    x = ops.matmul(ops.sum(shares, axis=2), _column(_centres(width)))
    y = ops.matmul(ops.sum(shares, axis=3), _column(_centres(height)))
    return layers.Concatenate(axis=-1, dtype="float32")([x, y])


def _column(places: np.ndarray) -> np.ndarray:
    return places.astype(np.float32)[:, None]


def _centres(cells: int) -> np.ndarray:
    return (np.arange(cells) + 0.5) / cells
