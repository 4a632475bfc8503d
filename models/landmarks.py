"""Landmark networks, by name: a baseline, compact networks and a transfer network.

The docstring of each says where it comes from and what it costs at the setting it is recommended
with. A builder takes the image and returns the coordinates; `build` does the rest.

Scores are means over seeds on real faces (inter-ocular NME of 68 points on YTF's test people), with
their intervals in docs/results/scores; the time is one training's. A job with that network is
trained and measured by

    python -m benchmarks.scores --task landmarks --archive ytf_keypoints.zip --jobs JOB
"""

from collections.abc import Sequence

import keras
from keras import layers

from models import backbones, decoders, transfer
from models.networks import construct


def build(
    network: str,
    widths: Sequence[int],
    size: int,
    channels: int,
    dropout: float,
    points: int,
    weights: str | None = None,
) -> keras.Model:
    """Build a network that places points.

    Rescaling is part of the graph, so every runtime takes the same raw pixels.

    Args:
        network: a name in `NETWORKS`.
        widths: channels of the network's stages; () for those of fixed shape.
        size: side of the input in pixels.
        channels: 1 grey, 3 RGB.
        dropout: share of the last features dropped in training. Where a network has more dropout
            than that, the other rates are its own.
        points: number of landmarks.
        weights: None; for a transfer network also "imagenet", or the path of a `.keras`,
            `.weights.h5` or `.h5` file with the weights of its base.

    Returns:
        float32 (N, size, size, channels), 0 to 255 → float32 (N, points, 2), (x, y) in crop
        coordinates, y down. A point outside the crop lies outside [0, 1], except with `heatmap`,
        whose points stay inside, and `simcc`, whose points stay within 0.25 of it.

    Raises:
        ValueError: no such network, or `widths` or `weights` that do not suit it.
        models.transfer.WeightsUnavailableError: the pretrained weights cannot be had.
    """
    image = keras.Input((size, size, channels), name="image", dtype="float32")
    places = construct(
        NETWORKS,
        network,
        image=image,
        widths=widths,
        dropout=dropout,
        points=points,
        weights=weights,
    )
    outputs = layers.Reshape((points, 2), dtype="float32", name="landmarks")(places)
    return keras.Model(image, outputs, name=f"landmarks_{network}")


def plain(
    image: keras.KerasTensor, widths: Sequence[int], dropout: float, points: int
) -> keras.KerasTensor:
    """Regress coordinates from the features of a small VGG: ReLU6, batch normalisation.

    The feature map is flattened, not pooled: where a feature lies is what is asked for. A 1×1
    convolution narrows it first, which keeps the dense layer small.

    Source: Simonyan and Zisserman 2015, section 2
    Input: float32 (N, 96, 96, 1), 0 to 255
    Output: float32 (N, 136), x and y in turn, in crop units, unbounded
    Setting: size 96, channels 1, widths (16, 32, 64, 128), points 68
    Parameters: 338,200
    Multiply-adds: 29,604,096
    Score: not measured
    Job: landmarks-plain
    """
    x = layers.Rescaling(1 / 127.5, offset=-1)(image)
    x = backbones.plain(x, widths, stem_stride=max(1, image.shape[1] // 48))
    return _regressed(_narrowed(x), dropout, points)


def residual(
    image: keras.KerasTensor, widths: Sequence[int], dropout: float, points: int
) -> keras.KerasTensor:
    """Regress coordinates from the features of a residual network, flattened as in `plain`.

    Source: He et al. 2016, section 3.3
    Input: float32 (N, 96, 96, 1), 0 to 255
    Output: float32 (N, 136), x and y in turn, in crop units, unbounded
    Setting: size 96, channels 1, widths (32, 64, 96, 128), points 68
    Parameters: 1,089,496
    Multiply-adds: 54,413,568
    Score: not measured
    Job: landmarks-residual
    """
    x = layers.Rescaling(1 / 127.5, offset=-1)(image)
    x = backbones.residual(x, widths, stem_stride=max(1, image.shape[1] // 48))
    return _regressed(_narrowed(x), dropout, points)


def simcc(
    image: keras.KerasTensor, widths: Sequence[int], dropout: float, points: int
) -> keras.KerasTensor:
    """Classify each point's x and y among bins of a pixel, and take the expectation.

    The cheapest of the precise heads: it needs no large feature map. Points come out within 0.25
    of the crop. The layer before decoding is called "logits", see `models.decoders`.

    Source: Li et al. 2022 (SimCC), section 3; backbone He et al. 2016, section 3.3
    Input: float32 (N, 96, 96, 1), 0 to 255
    Output: float32 (N, 68, 2), (x, y) in crop units, from -0.25 to 1.25
    Setting: size 96, channels 1, widths (32, 64, 96), points 68
    Parameters: 495,344
    Multiply-adds: 50,209,920
    Score: 5.13 %, 3 seeds
    Time: 33 min on one core of an AMD EPYC
    Job: landmarks-compact
    """
    size = image.shape[1]
    x = layers.Rescaling(1 / 127.5, offset=-1)(image)
    x = backbones.residual(x, widths, stem_stride=max(1, size // 48))
    if dropout:
        x = layers.Dropout(dropout)(x)
    bins = round(size * (1 + 2 * decoders.REACH))
    return decoders.one_dimensional(x, points, bins)


def heatmap(
    image: keras.KerasTensor, widths: Sequence[int], dropout: float, points: int
) -> keras.KerasTensor:
    """Draw a heat map for each point, at a quarter of 96 pixels, and take its mean.

    What it learns at one place it knows at every other, so it should need the least data; but it
    cannot place a point outside the crop. The layer before decoding is called "logits", see
    `models.decoders`. The size must be divisible by max(1, size // 48) · 2^len(widths).

    Source: Sun et al. 2018; backbone He et al. 2016, section 3.3; pyramid Lin et al. 2017
    Input: float32 (N, 96, 96, 1), 0 to 255
    Output: float32 (N, 68, 2), (x, y) in crop units, half a cell (1/48) inside [0, 1]
    Setting: size 96, channels 1, widths (32, 64, 96), points 68
    Parameters: 533,072
    Multiply-adds: 67,556,544
    Score: 5.09 %, 1 seed
    Time: 26 min on one core of an AMD EPYC
    Job: landmarks-heatmap
    """
    x = layers.Rescaling(1 / 127.5, offset=-1)(image)
    x = backbones.pyramid(x, widths, stem_stride=max(1, image.shape[1] // 48))
    if dropout:
        x = layers.Dropout(dropout)(x)
    return decoders.two_dimensional(x, points)


def coordinate_cnn(image: keras.KerasTensor, dropout: float, points: int) -> keras.KerasTensor:
    """Regress coordinates with the usual network for Kaggle's facial key points; a baseline.

    Five convolutions, three poolings and a dense layer, trained with a masked squared error. Its
    dropout is 0.4. Of the many variants in the line of Kaggle's competition and of Udacity's first
    computer-vision project this is one that was published with its masked loss and its TF.js page.
    It differs from the original only in that coordinates are in crop units, not pixels.

    Source: the script build_fkd_app.py of a public TF.js demonstration of Kaggle's "facial
        keypoints detection"; the line goes back to Agarwal et al. 2017 (NaimishNet)
    Input: float32 (N, 96, 96, 1), 0 to 255
    Output: float32 (N, 136), x and y in turn, in crop units, unbounded
    Setting: size 96, channels 1, widths (), points 68
    Parameters: 4,892,648
    Multiply-adds: 262,211,584
    Score: not measured
    Job: landmarks-coordinate_cnn
    """
    x = layers.Rescaling(1 / 255)(image)
    for width, convolutions, rate in ((32, 2, 0.1), (64, 2, 0.2), (128, 1, 0.3)):
        for _ in range(convolutions):
            x = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D(2)(x)
        x = layers.Dropout(rate)(x)
    x = layers.Flatten()(x)
    x = layers.Dense(256, activation="relu")(x)
    return _regressed(x, dropout, points)


def vgg19(
    image: keras.KerasTensor, dropout: float, points: int, weights: str | None
) -> keras.KerasTensor:
    """Regress coordinates from the flattened features of VGG19, pretrained on ImageNet.

    Source: Simonyan and Zisserman 2015, table 1, column E; `keras.applications.VGG19`
    Input: float32 (N, 96, 96, 1), 0 to 255
    Output: float32 (N, 136), x and y in turn, in crop units, unbounded
    Setting: size 96, channels 1, widths (), points 68
    Parameters: 20,653,256
    Multiply-adds: 3,583,807,488
    Score: not measured
    Job: landmarks-vgg19
    """
    return _regressed(layers.Flatten()(transfer.vgg19(image, weights)), dropout, points)


def _narrowed(x: keras.KerasTensor) -> keras.KerasTensor:
    x = layers.Conv2D(32, 1, use_bias=False)(x)
    x = layers.BatchNormalization(momentum=backbones.MOMENTUM)(x)
    x = layers.ReLU(max_value=6.0)(x)
    return layers.Flatten()(x)


def _regressed(features: keras.KerasTensor, dropout: float, points: int) -> keras.KerasTensor:
    if dropout:
        features = layers.Dropout(dropout)(features)
    # The middle of the crop is where an untrained network had best put every point.
    centre = keras.initializers.Constant(0.5)
    return layers.Dense(points * 2, bias_initializer=centre, dtype="float32")(features)


NETWORKS = {
    builder.__name__: builder
    for builder in (plain, residual, simcc, heatmap, coordinate_cnn, vgg19)
}
