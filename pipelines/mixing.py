"""What is done to a batch of training images beyond their augmented views: erased, then mixed.

Each batch's draws follow from the generator it is given and nothing else.
"""

import math

import numpy as np

# Zhong et al. 2020, section 4.2: bounds of the erased share, and of height over width.
AREA, RATIO = (0.02, 0.4), (0.3, 1 / 0.3)


def erase(images: np.ndarray, probability: float, rng: np.random.Generator) -> None:
    """Fill a random rectangle of some images with noise (Zhong et al. 2020, algorithm 1).

    Args:
        images: float32 (B, H, W, C), 0 to 255; changed in place.
        probability: with which each image is.
        rng: source of the draws.
    """
    _, height, width, channels = images.shape
    for index in np.flatnonzero(rng.random(len(images)) < probability):
        rows = columns = max(height, width) + 1
        while rows > height or columns > width:
            area, ratio = rng.uniform(*AREA) * height * width, rng.uniform(*RATIO)
            rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
        noise = rng.integers(0, 256, (rows, columns, channels))
        images[index, top : top + rows, left : left + columns] = noise


def mix(
    images: np.ndarray, mixup: float, cutmix: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, float]:
    """Mix each image of a batch with another one of it.

    Mixup (Zhang et al. 2018, equation 1) blends them, CutMix (Yun et al. 2019, section 3.1) pastes
    a rectangle of the other; where both are on, a coin decides for the batch.

    Args:
        images: float32 (B, H, W, C).
        mixup: α of the Beta(α, α) that the share is drawn from; 0 is off.
        cutmix: the same; 0 is off.
        rng: source of the draws.

    Returns:
        The mixed images; int (B,), each one's partner; and the share that an image keeps of
        itself, the partner having the rest.
    """
    partner = rng.permutation(len(images))
    pasting = bool(cutmix) and (not mixup or rng.random() < 0.5)
    alpha = cutmix if pasting else mixup
    share = float(rng.beta(alpha, alpha)) if alpha else 1.0
    if not pasting:
        return blend(images, partner, share), partner, share
    _, height, width, _ = images.shape
    side = math.sqrt(1 - share)
    (top, bottom), (left, right) = (
        _cut(length, side, int(rng.integers(length))) for length in (height, width)
    )
    mixed = images.copy()
    mixed[:, top:bottom, left:right] = images[partner, top:bottom, left:right]
    return mixed, partner, 1 - (bottom - top) * (right - left) / (height * width)


def blend(values: np.ndarray, partner: np.ndarray, share: float) -> np.ndarray:
    """Return float32 share · values + (1 - share) · their partners'."""
    return (share * values + (1 - share) * values[partner]).astype(np.float32)


def _cut(length: int, side: float, centre: int) -> tuple[int, int]:
    """Return where a cut of `side` of the length, about its centre, begins and ends."""
    half = int(length * side) // 2
    return max(centre - half, 0), min(centre + half, length)
