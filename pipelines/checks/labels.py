"""Doubt labels that do not look like their class, judged by models that never saw them.

Confident learning (Northcutt et al. 2021, in their own library, cleanlab) compares the given labels
with predicted probabilities. Those are out of fold: whoever predicts has learnt from other people
and other pictures only.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from pipelines.params import Mislabelled


def suspected(
    images: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    settings: Mislabelled,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Judge every label by models trained on the other folds.

    Only classes with as many groups as there are folds take part: from fewer a model learns next
    to nothing, and would doubt every one of them.

    Args:
        images: uint8 (n, S, S, 1), face crops.
        labels: int (n,).
        groups: n names. A group (a person, copies of a picture) is never divided, since a copy
            in another fold would give the answer away.
        settings: estimator, folds and epochs; its threshold is the caller's business.
        seed: of the folds and the network.

    Returns:
        The quality of each label, float64 (n,): by how much the given label is likelier than every
        other, from 0 (another is certain) over 0.5 (a tie) to 1; NaN where it was not judged. It is
        a margin, not the label's own probability: of a rare class models are never sure, and they
        would doubt it wholesale. And bool (n,), which labels confident learning
        singles out as wrong.
    """
    quality, doubted = np.full(len(labels), np.nan), np.zeros(len(labels), bool)
    rows = _of_common_classes(labels, np.asarray(groups, str), settings.folds)
    classes, codes = np.unique(labels[rows], return_inverse=True)
    if len(classes) < 2:
        return quality, doubted
    probabilities = out_of_fold(images[rows], codes, np.asarray(groups, str)[rows], settings, seed)
    answered = np.isfinite(probabilities).all(1)
    rows, codes, probabilities = rows[answered], codes[answered], probabilities[answered]
    quality[rows] = get_label_quality_scores(codes, probabilities, method="normalized_margin")
    # What both of their pruning rules name: a wrong suspicion costs a good example.
    doubted[rows] = find_label_issues(codes, probabilities, filter_by="both", n_jobs=1)
    return quality, doubted


def _of_common_classes(labels: np.ndarray, groups: np.ndarray, folds: int) -> np.ndarray:
    enough = [label for label in np.unique(labels) if len(set(groups[labels == label])) >= folds]
    return np.flatnonzero(np.isin(labels, enough))


def out_of_fold(
    images: np.ndarray, codes: np.ndarray, groups: np.ndarray, settings: Mislabelled, seed: int
) -> np.ndarray:
    """Predict each example by a model that was trained on the other folds.

    Args:
        images: uint8 (n, S, S, 1).
        codes: int (n,), 0 to K - 1.
        groups: (n,) unicode, never divided.
        settings: estimator, folds and epochs.
        seed: of the folds and the network.

    Returns:
        Probabilities, float64 (n, K). NaN where the example's class lies in its own fold alone.
    """
    linear = settings.estimator == "linear"
    inputs = gradient_histograms(images) if linear else images
    answers = np.full((len(codes), int(codes.max()) + 1), np.nan)
    folds = StratifiedGroupKFold(settings.folds, shuffle=True, random_state=seed)
    divided = folds.split(inputs, codes, groups)
    for known, fold in tqdm(divided, "labels", settings.folds, unit="fold"):
        classes, targets = np.unique(codes[known], return_inverse=True)
        asked = fold[np.isin(codes[fold], classes)]
        if len(classes) < 2 or not len(asked):
            continue
        answers[asked] = 0
        answers[np.ix_(asked, classes)] = (
            _ask_linear(inputs[known], targets, inputs[asked])
            if linear
            else _ask_network(inputs[known], targets, inputs[asked], settings.epochs, seed)
        )
    return answers


def gradient_histograms(images: np.ndarray) -> np.ndarray:
    """Describe faces by histograms of oriented gradients (Dalal and Triggs 2005).

    Args:
        images: uint8 (n, S, S, 1).

    Returns:
        float32 (n, 900): nine directions in 5 × 5 overlapping blocks of 2 × 2 cells, each of 8
        pixels of the face at 48 × 48.
    """
    descriptor = cv2.HOGDescriptor((48, 48), (16, 16), (8, 8), (8, 8), 9)
    described = [descriptor.compute(cv2.resize(image, (48, 48))) for image in images]
    return np.stack(described).astype(np.float32)


def _ask_linear(known: np.ndarray, targets: np.ndarray, asked: np.ndarray) -> np.ndarray:
    # The products are small: on two threads they take longer, and many times so beside other work.
    with threadpool_limits(1):
        model = LogisticRegression(tol=1e-3, max_iter=1000).fit(known, targets)
        return model.predict_proba(asked)


def _ask_network(
    known: np.ndarray, targets: np.ndarray, asked: np.ndarray, epochs: int, seed: int
) -> np.ndarray:
    """Train a small network on mirrored and shifted faces; ask it about each face and its mirror.

    The first convolution halves the picture: four times as fast, and sharp enough to tell a wrong
    label.
    """
    import keras
    from keras import layers

    from models.backbones import plain

    keras.utils.set_random_seed(seed)
    size, batch, rate = known.shape[1], 64, 0.003
    inputs = keras.Input((size, size, 1))
    x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = layers.RandomFlip("horizontal")(x)
    x = layers.RandomTranslation(0.06, 0.06, fill_mode="nearest")(x)
    x = plain(x, (32, 64, 128), stem_stride=max(1, size // 24))
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, layers.Dense(int(targets.max()) + 1, activation="softmax")(x))
    steps = epochs * -(-len(known) // batch)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - steps // 20), warmup_target=rate, warmup_steps=max(1, steps // 20)
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.01)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.fit(known, targets, batch_size=batch, epochs=epochs, verbose=0)
    sides = np.concatenate([asked, asked[:, :, ::-1]])
    return model.predict(sides, batch_size=256, verbose=0).reshape(2, len(asked), -1).mean(0)
