"""Emotion classifiers, by name: baselines, compact networks, a teacher and transfer networks.

The docstring of each says where it comes from and what it costs at the setting it is recommended
with. A builder takes the image and returns one score a class; `build` does the rest.

Scores are means over seeds on real faces (FER-2013's PrivateTest, one crop a face), with
their intervals in docs/results/scores; the time is one training's. A job with that network is
trained and measured by

    python -m benchmarks.scores --task emotion --archive fer2013.zip --jobs JOB
"""

from collections.abc import Sequence

import keras
from keras import layers

from models import backbones, transfer
from models.networks import construct
from models.schemes import EMOTIONS


def build(
    network: str,
    widths: Sequence[int],
    size: int,
    channels: int,
    dropout: float,
    weights: str | None = None,
) -> keras.Model:
    """Build a classifier.

    Rescaling is part of the graph, so every runtime takes the same raw pixels.

    Args:
        network: a name in `NETWORKS`.
        widths: channels of the network's stages; () for those of fixed shape.
        size: side of the input in pixels.
        channels: 1 grey, 3 RGB.
        dropout: share of the last features dropped in training. Where a network has more dropout
            than that, the other rates are its own.
        weights: None; for a transfer network also "imagenet", or the path of a `.keras`,
            `.weights.h5` or `.h5` file with the weights of its base.

    Returns:
        float32 (N, size, size, channels), 0 to 255 → float32 (N, 7) probabilities in the order of
        `models.schemes.EMOTIONS`.

    Raises:
        ValueError: no such network, or `widths` or `weights` that do not suit it.
        models.transfer.WeightsUnavailableError: the pretrained weights cannot be had.
    """
    image = keras.Input((size, size, channels), name="image", dtype="float32")
    scores = construct(
        NETWORKS, network, image=image, widths=widths, dropout=dropout, weights=weights
    )
    outputs = layers.Softmax(dtype="float32", name="probabilities")(scores)
    return keras.Model(image, outputs, name=f"emotion_{network}")


def plain(image: keras.KerasTensor, widths: Sequence[int], dropout: float) -> keras.KerasTensor:
    """Classify with a small VGG: ReLU6, batch normalisation, global average pooling.

    Source: Simonyan and Zisserman 2015, section 2; pooling as Lin et al. 2014, section 3.2
    Input: float32 (N, 48, 48, 1), 0 to 255
    Output: float32 (N, 7), scores
    Setting: size 48, channels 1, widths (16, 32, 64, 128)
    Parameters: 295,575
    Multiply-adds: 29,528,960
    Score: not measured
    Job: emotion-plain
    """
    x = layers.Rescaling(1 / 127.5, offset=-1)(image)
    x = backbones.plain(x, widths, stem_stride=max(1, image.shape[1] // 48))
    return _classified(layers.GlobalAveragePooling2D()(x), dropout)


def residual(image: keras.KerasTensor, widths: Sequence[int], dropout: float) -> keras.KerasTensor:
    """Classify with a compact residual network made for eight bits: ReLU6, no squeeze-and-excite.

    Source: He et al. 2016, section 3.3
    Input: float32 (N, 48, 48, 1), 0 to 255
    Output: float32 (N, 7), scores
    Setting: size 48, channels 1, widths (48, 96, 160)
    Parameters: 1,220,959
    Multiply-adds: 115,846,240
    Score: 65.68 %, 3 seeds
    Time: 80 min on one core of an AMD EPYC
    Job: emotion-compact
    """
    x = layers.Rescaling(1 / 127.5, offset=-1)(image)
    x = backbones.residual(x, widths, stem_stride=max(1, image.shape[1] // 48))
    return _classified(layers.GlobalAveragePooling2D()(x), dropout)


def teacher(image: keras.KerasTensor, widths: Sequence[int], dropout: float) -> keras.KerasTensor:
    """Classify with a large residual network, to be distilled into smaller ones.

    ResNet-18 with a 3×3 stem and a first stage at full resolution. With this layout the source
    reports 73.70 % on PrivateTest (ten crops of 40 pixels a face, mixup, label smoothing, 300
    epochs).

    Source: He et al. 2016, table 1; github.com/LetheSec/Fer2013-Facial-Emotion-Recognition-Pytorch
    Input: float32 (N, 48, 48, 1), 0 to 255
    Output: float32 (N, 7), scores
    Setting: size 48, channels 1, widths (64, 128, 256, 512)
    Parameters: 11,180,871
    Multiply-adds: 1,247,038,976
    Score: not measured
    Job: emotion-teacher
    """
    x = layers.Rescaling(1 / 127.5, offset=-1)(image)
    x = backbones.residual_full(x, widths, stem_stride=max(1, image.shape[1] // 48))
    return _classified(layers.GlobalAveragePooling2D()(x), dropout)


def vgg(image: keras.KerasTensor, dropout: float) -> keras.KerasTensor:
    """Classify with the VGG that was tuned for FER-2013 from end to end.

    The paper reports 73.28 % on PrivateTest, from ten crops of 40 pixels a face; its dropout is
    0.2. Here the network sees the whole face, so its first dense layer is larger.

    Source: Khaireddin and Chen 2021, arXiv 2105.03588, and their code, github.com/usef-kh/fer
    Input: float32 (N, 48, 48, 1), 0 to 255
    Output: float32 (N, 7), scores
    Setting: size 48, channels 1, widths ()
    Parameters: 40,380,359
    Multiply-adds: 504,147,968
    Score: not measured
    Job: emotion-vgg
    """
    x = layers.Rescaling(1 / 127.5, offset=-1)(image)
    for width in (64, 128, 256, 512):
        for _ in range(2):
            x = layers.Conv2D(width, 3, padding="same")(x)
            x = layers.BatchNormalization()(x)
            x = layers.ReLU()(x)
        x = layers.MaxPooling2D(2)(x)
    x = layers.Flatten()(x)
    x = layers.Dense(4096, activation="relu")(x)
    x = layers.Dropout(0.2)(x)
    x = layers.Dense(4096, activation="relu")(x)
    return _classified(x, dropout)


def emojify(image: keras.KerasTensor, dropout: float) -> keras.KerasTensor:
    """Classify with the network of Emojify and its many copies ("emoji creator"); a baseline.

    No padding and no normalisation; its dropout is 0.5.

    Source: the tutorial project "Emojify", as hundreds of public repositories carry it
    Input: float32 (N, 48, 48, 1), 0 to 255
    Output: float32 (N, 7), scores
    Setting: size 48, channels 1, widths ()
    Parameters: 2,345,607
    Multiply-adds: 77,326,464
    Score: 59.31 %, 1 seed
    Time: 31 min on one core of an AMD EPYC
    Job: emotion-emojify
    """
    x = layers.Rescaling(1 / 255)(image)
    x = layers.Conv2D(32, 3, activation="relu")(x)
    x = layers.Conv2D(64, 3, activation="relu")(x)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Dropout(0.25)(x)
    x = layers.Conv2D(128, 3, activation="relu")(x)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Conv2D(128, 3, activation="relu")(x)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Dropout(0.25)(x)
    x = layers.Flatten()(x)
    x = layers.Dense(1024, activation="relu")(x)
    return _classified(x, dropout)


def four_block(image: keras.KerasTensor, dropout: float) -> keras.KerasTensor:
    """Classify with the base network of the 28,821/7,066 re-upload's notebooks; a baseline.

    Its dropout is 0.25. The notebooks feed it raw pixels: the first normalisation takes up the
    factor.

    Source: the notebooks of Kaggle's "face expression recognition dataset" (images/train,
        images/validation) and the repositories that carry them
    Input: float32 (N, 48, 48, 1), 0 to 255
    Output: float32 (N, 7), scores
    Setting: size 48, channels 1, widths ()
    Parameters: 4,478,727
    Multiply-adds: 290,475,520
    Score: not measured
    Job: emotion-four_block
    """
    x = layers.Rescaling(1 / 255)(image)
    for width, size in ((64, 3), (128, 5), (512, 3), (512, 3)):
        x = _normalised(layers.Conv2D(width, size, padding="same")(x))
        x = layers.MaxPooling2D(2)(x)
        x = layers.Dropout(0.25)(x)
    x = layers.Flatten()(x)
    x = _normalised(layers.Dense(256)(x))
    x = layers.Dropout(0.25)(x)
    x = _normalised(layers.Dense(512)(x))
    return _classified(x, dropout)


def emoji_swap(image: keras.KerasTensor, dropout: float) -> keras.KerasTensor:
    """Classify with the network of the emoji-swap demonstrator for the Jetson TX2; a baseline.

    Established: the layers, the input scaled to [0, 1], the dropout of 0.5, and training on the
    14,018 faces of FER-2013 in which a Haar cascade sees one, all from the published notebook,
    whose printed summary counts the same 1,376,167 parameters. Assumed: that the file the authors
    offer ("EP35-ACC0.68") is of this network. The repository also has an older and larger one,
    which its readme says the notebook replaced.

    Source: "ML² Face Emoji Swap", Hochschule Offenburg 2019,
        github.com/reisman234/ml2_face_emoji_swap, model_trainig.ipynb, `vgg_like`
    Input: float32 (N, 48, 48, 1), 0 to 255
    Output: float32 (N, 7), scores
    Setting: size 48, channels 1, widths ()
    Parameters: 1,376,167
    Multiply-adds: 72,440,448
    Score: 61.04 %, 1 seed
    Time: 26 min on one core of an AMD EPYC
    Job: emotion-emoji_swap
    """
    x = layers.Rescaling(1 / 255)(image)
    for _ in range(2):
        x = layers.Conv2D(32, 3, activation="relu")(x)
    x = layers.MaxPooling2D(3, strides=2, padding="same")(x)
    x = layers.BatchNormalization()(x)
    for _ in range(3):
        x = layers.Conv2D(64, 3, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D(3, strides=2, padding="same")(x)
    x = layers.Conv2D(128, 3, activation="relu")(x)
    x = layers.Conv2D(128, 3, strides=2, activation="relu")(x)
    x = layers.Flatten()(x)
    if dropout:
        x = layers.Dropout(dropout)(x)
    x = layers.Dense(512, activation="relu")(x)
    return _classified(x, dropout=0.0)


def vgg19(image: keras.KerasTensor, dropout: float, weights: str | None) -> keras.KerasTensor:
    """Classify with VGG19, pretrained on ImageNet; the face is enlarged to 96 pixels.

    Source: Simonyan and Zisserman 2015, table 1, column E; `keras.applications.VGG19`
    Input: float32 (N, 48, 48, 1), 0 to 255
    Output: float32 (N, 7), scores
    Setting: size 48, channels 1, widths ()
    Parameters: 20,030,023
    Multiply-adds: 3,583,184,384
    Score: not measured
    Job: emotion-vgg19
    """
    x = transfer.vgg19(image, weights)
    return _classified(layers.GlobalAveragePooling2D()(x), dropout)


def mobilenet_v2(
    image: keras.KerasTensor, dropout: float, weights: str | None
) -> keras.KerasTensor:
    """Classify with MobileNetV2, pretrained on ImageNet; the face is enlarged to 96 pixels.

    Source: Sandler et al. 2018, table 2; `keras.applications.MobileNetV2`
    Input: float32 (N, 48, 48, 1), 0 to 255
    Output: float32 (N, 7), scores
    Setting: size 48, channels 1, widths ()
    Parameters: 2,266,951
    Multiply-adds: 55,018,112
    Score: not measured
    Job: emotion-mobilenet_v2
    """
    x = transfer.mobilenet_v2(image, weights)
    return _classified(layers.GlobalAveragePooling2D()(x), dropout)


def _normalised(x: keras.KerasTensor) -> keras.KerasTensor:
    return layers.ReLU()(layers.BatchNormalization()(x))


def _classified(features: keras.KerasTensor, dropout: float) -> keras.KerasTensor:
    if dropout:
        features = layers.Dropout(dropout)(features)
    return layers.Dense(len(EMOTIONS), dtype="float32")(features)


NETWORKS = {
    builder.__name__: builder
    for builder in (
        plain,
        residual,
        teacher,
        vgg,
        emojify,
        four_block,
        emoji_swap,
        vgg19,
        mobilenet_v2,
    )
}
