"""Video frames of public figures with 68 landmarks each."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np

from models.schemes import IBUG_68
from pipelines.datasets.archive import Archive
from pipelines.datasets.cells import no_points, parse_points
from pipelines.datasets.example import Example

EXPECTED = "training/*.jpg and test/*.jpg with training_frames_keypoints.csv and the same for test"

_PARTS = ("training", "test")
_IMAGES = (".jpg", ".jpeg", ".png")


def recognises(archive: Archive) -> bool:
    """Whether the archive has at least one of the two tables of key points."""
    return any(_table(archive, part) for part in _PARTS)


def examples(archive: Archive) -> Iterator[Example]:
    """Yield every frame with its 68 landmarks in pixels, as found, first those with a row.

    `person` is a hash of the name, shared by all frames of a person in both parts; `id` is made
    of it, the part and the frame's number. `official_split` stays "": the archive's own split
    shows the same people on both sides. A point whose cells are blank or not finite is invisible
    and 0. Rows without an image, images without a row and rows of the wrong length are yielded
    with their `defect`.

    Args:
        archive: `training/` and `test/`, either of which may be missing, each with its
            `…_frames_keypoints.csv`; at any depth.
    """
    for part in _PARTS:
        table = _table(archive, part)
        images = {
            path.name: str(path)
            for path in map(PurePosixPath, archive.names())
            if path.parent.name == part and path.suffix.lower() in _IMAGES
        }
        labelled = set()
        for row in _rows(archive, table):
            labelled.add(row[0])
            yield _example(archive, part, images.get(row[0], ""), row)
        for name in sorted(images.keys() - labelled):
            id, person = _keys(name, part)
            image, _ = archive.read(images[name])
            defect = f"no landmarks in {part}_frames_keypoints.csv"
            yield Example(id, image, person=person, defect=defect)


def _example(archive: Archive, part: str, member: str, row: list[str]) -> Example:
    id, person = _keys(row[0], part)
    image, damage = archive.read(member) if member else (b"", "its image is not in the archive")
    landmarks, visible, bad_row = _points(row[1:])
    return Example(
        id=id,
        image=image,
        landmarks=landmarks,
        visible=visible,
        person=person,
        defect=bad_row or damage,
    )


def _table(archive: Archive, part: str) -> str:
    """Name of the part's table of key points, "" where there is none."""
    wanted = f"{part}_frames_keypoints.csv"
    found = (name for name in archive.names() if PurePosixPath(name).name == wanted)
    return next(found, "")


def _rows(archive: Archive, table: str) -> Iterator[list[str]]:
    if table:
        rows = archive.read_csv(table)
        next(rows, None)  # the header
        yield from rows


def _keys(file_name: str, part: str) -> tuple[str, str]:
    """Opaque id and person key of a frame "Person_Name_NN.jpg"."""
    stem = PurePosixPath(file_name).stem
    numbered = re.fullmatch(r"(.+)_(\d+)", stem)
    name, number = numbered.groups() if numbered else (stem, "0")
    person = hashlib.sha256(name.encode()).hexdigest()[:10]
    return f"ytf-{person}-{part}-{number}", person


def _points(cells: list[str]) -> tuple[np.ndarray, np.ndarray, str]:
    if len(cells) != 2 * IBUG_68.size:
        defect = f"row has {len(cells)} coordinates instead of {2 * IBUG_68.size}"
        return *no_points(), defect
    return parse_points(cells)
