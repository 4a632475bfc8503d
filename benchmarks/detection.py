"""How sure further looks at a still picture must be: faces found, and finds that are none.

    GRIMACE_ARCHIVES=DIR python -m pipelines.download --dataset ytf_keypoints
    python -m benchmarks.detection

Every 25th frame of YouTube Faces, three times enlarged, so that BlazeFace looks at parts of it too:
is the labelled face found, and how much else (some of it people behind, whom nobody labelled)?
And 48 frames at a time as small pictures of one large one: how many of these faces are found?
"""

import argparse
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np

from pipelines import detectors
from pipelines.cli import GrimaceError, run
from pipelines.crops import decode
from pipelines.datasets import builder
from pipelines.datasets.example import Box

EVERY, LARGER = 25, 3
COLUMNS, ROWS, CELL = 8, 6, 120  # of the large picture, and a cell's side in pixels
BARS = (0.5, 0.6, 0.65, 0.7)

Pictures = list[tuple[np.ndarray, list[np.ndarray]]]


def main() -> None:
    """Print a line for each bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--raw", type=Path, default=Path("data/raw/ytf_keypoints"))
    raw = parser.parse_args().raw
    if not raw.exists():
        raise GrimaceError(f"{raw} is missing: run the first command of `--help`")
    rows = [row for row in builder.read(raw) if not row.defect and len(row.landmarks)]
    frames = [(decode(row.image, 3), row.landmarks) for row in islice(rows, 0, None, EVERY)]
    large, many = [enlarged(*frame) for frame in frames], mosaics(frames)
    for bar in BARS:
        with patch.object(detectors, "SURE_AGAIN", bar):
            for what, pictures in (("enlarged", large), ("small", many)):
                found, others = count(pictures)
                wanted = sum(len(faces) for _, faces in pictures)
                print(f"{bar:.2f}, {what}: {found} of {wanted} faces, {others} other finds")


def enlarged(image: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return a frame LARGER times as large, and the points of its one face."""
    larger = cv2.resize(image, None, fx=LARGER, fy=LARGER, interpolation=cv2.INTER_CUBIC)
    return larger, [points * LARGER]


def mosaics(frames: list[tuple[np.ndarray, np.ndarray]]) -> Pictures:
    """Return large pictures of COLUMNS by ROWS frames, and the points of each face."""
    pictures, many = [], COLUMNS * ROWS
    for start in range(0, len(frames) - many + 1, many):
        whole = np.zeros((ROWS * CELL, COLUMNS * CELL, 3), np.uint8)
        faces = []
        for place, (image, points) in enumerate(frames[start : start + many]):
            scale = CELL / max(image.shape[:2])
            small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            x, y = place % COLUMNS * CELL, place // COLUMNS * CELL
            height, width = small.shape[:2]
            whole[y : y + height, x : x + width] = small
            faces.append(points * scale + (x, y))
        pictures.append((whole, faces))
    return pictures


def count(pictures: Pictures) -> tuple[int, int]:
    """Return how many labelled faces are found, and how many finds are no labelled face."""
    found = others = 0
    for image, faces in pictures:
        hit = set()
        for find in detectors.find_faces(image, still=True):
            place = [place for place, points in enumerate(faces) if is_at(find.box, points)]
            others += not place
            hit.update(place[:1])
        found += len(hit)
    return found, others


def is_at(box: Box, points: np.ndarray) -> bool:
    """Say whether the centre of a box is that of a face, to a third of its size."""
    low, high = points.min(0), points.max(0)
    centre = np.array([box.left + box.right, box.top + box.bottom]) / 2
    return bool(np.abs(centre - (low + high) / 2).max() < (high - low).max() / 3)


if __name__ == "__main__":
    run(main)
