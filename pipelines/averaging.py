"""Answers averaged over mirrored and shifted crops of one face, and over several models.

For measuring what a model can do; what is deployed answers a single crop. `flip` is the crop and
its mirror image. `ten_crop` follows Krizhevsky et al. 2012 (section 4.1): four corners and the
centre of a square 8/7 as wide as what the model takes, and the mirror images of these five.
"""

from collections.abc import Sequence

import numpy as np

from models.schemes import EMOTIONS, SCHEMES
from pipelines.cli import GrimaceError
from pipelines.crops import crop
from pipelines.datasets.example import Box
from pipelines.params import TestTime
from pipelines.runtimes import Runtime

SHARE = 7 / 8  # of the wider square's side, as 224 of 256 pixels
PLACES = ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5))
PASSES: dict[TestTime, int] = {"none": 1, "flip": 2, "ten_crop": 10}


def five_crops(image: np.ndarray, box: Box, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the corner and centre crops of a face.

    Where the picture shows more than the face box, the crops keep its size and stand at the
    corners and in the centre of a square 8/7 as wide, so that the face is as large as in training
    and its surroundings are real. Where the box holds the whole picture (FER-2013's are face crops
    already) there is nothing outside but repeated edge pixels; then the five are squares of 7/8 of
    its side, scaled up, as a picture of 256 pixels gives crops of 224.

    Args:
        image: uint8 (H, W, C).
        box: the square that is cropped otherwise, in pixels.
        size: side of a crop in pixels.

    Returns:
        Crops uint8 (5, size, size, C), and where they lie, float32 (5, 3): left, top and side in
        coordinates of the plain crop.
    """
    height, width = image.shape[:2]
    whole = (
        max(box.left, box.top) <= -0.5 and box.right >= width - 0.5 and box.bottom >= height - 0.5
    )
    side = SHARE if whole else 1.0
    around = side / SHARE  # the wider square's side
    start, room = (1 - around) / 2, around - side
    places = [(start + x * room, start + y * room, side) for x, y in PLACES]
    unit = box.right - box.left
    crops = []
    for left, top, _ in places:
        x, y = box.left + left * unit, box.top + top * unit
        crops.append(crop(image, Box(x, y, x + side * unit, y + side * unit), size))
    return np.stack(crops), np.array(places, np.float32)


def mirrored(outputs: np.ndarray) -> np.ndarray:
    """Turn answers to mirrored crops into answers to the crops themselves.

    Args:
        outputs: (n, 7) probabilities, which stay; or (n, N, 2) points of a known scheme, which
            are mirrored and change left and right names.
    """
    if outputs.ndim == 2:
        return outputs
    swapped = outputs[:, list(SCHEMES[outputs.shape[1]].mirror)]
    return np.stack([1 - swapped[..., 0], swapped[..., 1]], -1)


def predict(
    model: Runtime,
    images: np.ndarray,
    how: TestTime,
    five: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Run a model over faces, averaged as asked.

    Args:
        model: for emotion or landmarks.
        images: uint8 (n, S, S, C), plain crops.
        how: "none", "flip" or "ten_crop".
        five: for "ten_crop", what `five_crops` gives of each face: uint8 (n, 5, S, S, C) and
            float32 (n, 5, 3).

    Returns:
        float32 (n, 7) mean probabilities, or (n, N, 2) mean points in plain crop coordinates.
    """
    if how == "none":
        return _answers(model, images)
    if how == "flip":
        return _both_ways(model, images)
    assert five is not None
    crops, places = five
    answers = []
    for number in range(len(PLACES)):
        outputs = _both_ways(model, crops[:, number])
        if outputs.ndim == 3:
            start, side = places[:, number, None, :2], places[:, number, None, 2:]
            outputs = start + outputs * side
        answers.append(outputs)
    return mean_answer(answers)


def _both_ways(model: Runtime, images: np.ndarray) -> np.ndarray:
    return (_answers(model, images) + mirrored(_answers(model, images[:, :, ::-1]))) / 2


def _answers(model: Runtime, images: np.ndarray) -> np.ndarray:
    outputs = model.predict(images)
    emotion = model.output_shape == (len(EMOTIONS),)
    return outputs if emotion else outputs.reshape(len(outputs), -1, 2)  # some answer N · 2 numbers


def mean_answer(answers: Sequence[np.ndarray]) -> np.ndarray:
    """Average several models' answers to the same faces: probabilities or coordinates, (n, …).

    Raises:
        GrimaceError: they follow different schemes.
    """
    if len({answer.shape for answer in answers}) > 1:
        shapes = ", ".join(sorted({str(answer.shape[1:]) for answer in answers}))
        raise GrimaceError(f"models that answer {shapes} cannot be averaged with each other")
    return np.stack(answers).mean(0)
