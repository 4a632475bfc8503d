"""Kaggle's Facial Keypoints Detection: 96×96 grey faces with up to 15 points each."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from pipelines.datasets.archive import Archive, open_inner
from pipelines.datasets.cells import encode_pixels, parse_points
from pipelines.datasets.example import Example

EXPECTED = (
    "training.csv with 30 coordinate columns (left_eye_center_x, …) and Image, or training.zip "
    "with it inside"
)
SIDE = 96

# In the order of models.schemes.KAGGLE_15; left and right are the pictured person's own.
POINTS = (
    "left_eye_center",
    "right_eye_center",
    "left_eye_inner_corner",
    "left_eye_outer_corner",
    "right_eye_inner_corner",
    "right_eye_outer_corner",
    "left_eyebrow_inner_end",
    "left_eyebrow_outer_end",
    "right_eyebrow_inner_end",
    "right_eyebrow_outer_end",
    "nose_tip",
    "mouth_left_corner",
    "mouth_right_corner",
    "mouth_center_top_lip",
    "mouth_center_bottom_lip",
)
COLUMNS = tuple(f"{point}_{axis}" for point in POINTS for axis in "xy")


def recognises(archive: Archive) -> bool:
    """Whether the archive, or a `training.zip` in it, has the table of faces and points."""
    return _table(archive) is not None


def examples(archive: Archive) -> Iterator[Example]:
    """Yield every row of `training.csv`: a 96×96 grey picture and 15 points in its pixels.

    Columns are found by their names. Most rows label four points only: a point with a blank cell
    is invisible and 0, never filled in. Pictures are encoded as PNG, which loses nothing. Rows
    that cannot be used (a wrong number of cells or pixels, a text in place of a number, no point
    at all) are yielded with their `defect`. There is no official split: `test.csv` has no labels,
    so it is not read.

    Args:
        archive: as Kaggle serves it, with `training.zip` inside, or unpacked, at any depth.

    Raises:
        GrimaceError: the table or the inner zip file is damaged.
    """
    table = _table(archive)
    assert table is not None, "asked of an archive that is not recognised"
    rows = table[0].read_csv(table[1])
    header = _header(next(rows))
    columns = [header.index(column) for column in COLUMNS]
    for number, cells in enumerate(rows):
        id = f"kaggle-{number:05d}"
        if len(cells) != len(header):
            defect = f"row has {len(cells)} cells instead of {len(header)}"
            yield Example(id, b"", defect=defect)
            continue
        image, bad_pixels = encode_pixels(cells[header.index("image")], SIDE)
        landmarks, visible, bad_points = parse_points([cells[column] for column in columns])
        yield Example(
            id, image, landmarks=landmarks, visible=visible, defect=bad_pixels or bad_points
        )


def _table(archive: Archive) -> tuple[Archive, str] | None:
    """Find the table: the archive that holds it directly, and its name there."""
    for name in archive.names():
        path = PurePosixPath(name)
        if path.suffix.lower() == ".csv" and _has_points(archive, name):
            return archive, name
    for name in archive.names():
        if PurePosixPath(name).name.lower() == "training.zip":
            return _table(open_inner(archive, name))
    return None


def _has_points(archive: Archive, name: str) -> bool:
    return {*COLUMNS, "image"} <= set(_header(next(archive.read_csv(name), [])))


def _header(cells: list[str]) -> list[str]:
    return [cell.strip().lower() for cell in cells]
