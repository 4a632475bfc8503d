"""Look for faces: whether there is one, how large it is, and whether all of it is in the picture.

Two detectors stand behind one interface:
  haar       OpenCV's cascade of Haar features (Viola and Jones 2001), as the projects before this
             one used it. Fast, and blind to faces that are turned, dark or fill the picture.
  blazeface  MediaPipe's short-range network (Bazarevsky et al. 2019), which sees those as well.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from pipelines.datasets.example import Box, Example
from pipelines.detectors import SIDE, blazeface_network

# BlazeFace's logits: faces are counted from SURE on (a probability of one half, as in MediaPipe);
# where there is none, the likeliest find is one from FAINT on. A face without hair or chin rarely
# gets less, a picture of something else rarely more. Boxes that overlap by more than OVERLAP
# (intersection over union) are one face.
SURE = 0.0
FAINT = -1.0
OVERLAP = 0.3

# Of the longer side, added all around: a face that fills its picture is seen only with a border.
BORDER = 0.25

_CASCADE = Path(cv2.__file__).parent / "data/haarcascade_frontalface_default.xml"


def detect(rgb: np.ndarray, detectors: tuple[str, ...]) -> dict[str, int]:
    """Count the faces that each detector sees.

    The detectors are built at the first call in a process and use one thread.

    Args:
        rgb: uint8 (H, W, 3).
        detectors: names of `DETECTORS`.

    Returns:
        The number of faces, by detector.
    """
    return {name: DETECTORS[name](rgb) for name in detectors}


def seed_keeps(rgb: np.ndarray) -> bool:
    """Whether the sieve of the projects before this one would have kept the picture.

    It kept what the frontal cascade, with OpenCV's default arguments, finds a face in: 37 % of
    FER-2013.

    Args:
        rgb: uint8 (H, W, 3).
    """
    return _haar(rgb) > 0


def labelled_box(example: Example) -> Box | None:
    """Return where its source says the face is: around the landmarks, else the source's box.

    In pixels of the picture; None where the source does not say.
    """
    points = example.landmarks[example.visible]
    if len(points) > 1:
        return Box(*points.min(axis=0).tolist(), *points.max(axis=0).tolist())
    return example.box


def box_measures(example: Example, shape: tuple[int, ...]) -> dict[str, float]:
    """Measure the face's box: around the landmarks, else the source's, else the whole picture.

    Args:
        example: gives landmarks and box, in pixels.
        shape: of its picture, (H, W) or (H, W, channels).

    Returns:
        `face_size`, the box's longer side in pixels, and `cut_off`, the share of its area that
        lies outside the picture, 0-1.
    """
    # Pixel centres are whole numbers, so the picture reaches half a pixel beyond the outer ones.
    right, bottom = shape[1] - 0.5, shape[0] - 0.5
    box = labelled_box(example) or Box(-0.5, -0.5, right, bottom)
    width, height = box.right - box.left, box.bottom - box.top
    inside_width = min(box.right, right) - max(box.left, -0.5)
    inside_height = min(box.bottom, bottom) - max(box.top, -0.5)
    inside = max(inside_width, 0.0) * max(inside_height, 0.0)
    return {
        "face_size": float(max(width, height)),
        "cut_off": 1 - inside / (width * height) if width > 0 and height > 0 else 0.0,
    }


def _haar(rgb: np.ndarray) -> int:
    return len(_cascade().detectMultiScale(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)))


@cache
def _cascade() -> cv2.CascadeClassifier:
    return cv2.CascadeClassifier(str(_CASCADE))


def _blazeface(rgb: np.ndarray) -> int:
    height, width = rgb.shape[:2]
    side = round(max(height, width) * (1 + 2 * BORDER))
    top, left = (side - height) // 2, (side - width) // 2
    # Mirrored pixels, because a plain border makes any square look like a face.
    framed = cv2.copyMakeBorder(
        rgb, top, side - height - top, left, side - width - left, cv2.BORDER_REFLECT_101
    )
    small = cv2.resize(
        framed, (SIDE, SIDE), interpolation=cv2.INTER_AREA if side > SIDE else cv2.INTER_LINEAR
    )
    boxes, _, logits = blazeface_network()(small)
    boxes = boxes / SIDE
    # What is seen in the border is a mirror image, not another face.
    x, y = (boxes[:, :2] + boxes[:, 2:] / 2).T * side
    inside = (x > left) & (x < left + width) & (y > top) & (y < top + height)
    boxes, logits = boxes[inside], logits[inside]
    sure = logits > SURE
    faces = len(cv2.dnn.NMSBoxes(boxes[sure].tolist(), logits[sure].tolist(), SURE, OVERLAP))
    return faces or int(np.any(logits > FAINT))


DETECTORS: dict[str, Callable[[np.ndarray], int]] = {"haar": _haar, "blazeface": _blazeface}
