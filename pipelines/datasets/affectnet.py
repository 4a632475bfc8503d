"""AffectNet: faces from the web with expression, valence and arousal, boxes and 68 points."""

import io
import math
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np

from models.schemes import EMOTIONS, IBUG_68
from pipelines.cli import GrimaceError
from pipelines.datasets.archive import Archive
from pipelines.datasets.cells import no_points, parse_points
from pipelines.datasets.example import Affect, Box, Example

EXPECTED = (
    "training.csv and validation.csv with the column subDirectory_filePath beside "
    "Manually_Annotated_Images/N/*, or train_set and val_set with images/*.jpg and "
    "annotations/*_exp.npy"
)

# By the number that stands for them in both packings.
EXPRESSIONS = (
    "neutral",
    "happy",
    "sad",
    "surprise",
    "fear",
    "disgust",
    "anger",
    "contempt",
    "none",
    "uncertain",
    "no-face",
)

# The test set was never published, and the field reports on validation.
_LISTS = {"training.csv": "train", "validation.csv": "test"}
_SETS = {"train_set": "train", "val_set": "test"}
_COLUMNS = (
    "subdirectory_filepath",
    "face_x",
    "face_y",
    "face_width",
    "face_height",
    "facial_landmarks",
    "expression",
    "valence",
    "arousal",
)
_NOT_APPLICABLE = -2.0
_NO_IMAGE = "its image is not in the archive"


def recognises(archive: Archive) -> bool:
    """Whether the archive has a list of the full packing, or annotations of the smaller one."""
    return bool(_lists(archive)) or any(_is_annotation(name) for name in archive.names())


def examples(archive: Archive) -> Iterator[Example]:
    """Yield every row of the lists, or every picture and annotation of the smaller packing.

    `label` is the source's word. `emotion` is one of the seven, or -1 for contempt, none and
    uncertain; what annotators saw no face in is yielded with that `defect`, as are rows that
    cannot be read and rows without their picture. Points are iBUG-68, in pixels of the picture.
    `affect` is None where the source has no valence and arousal. The published training set is
    "train" and the validation set "test".

    Args:
        archive: either packing, at any depth, with one of the two sets or both. Lists are read as
            a stream; of pictures, only those that a list names.

    Raises:
        GrimaceError: one list has the columns and the other has not.
    """
    lists = _lists(archive)
    if lists:
        if others := [name for name in _named_lists(archive) if name not in lists]:
            raise GrimaceError(
                f"{archive.path}: {others[0]} lacks columns that {lists[0]} has; its first row "
                f"must name {', '.join(_COLUMNS)}: add them, or take the file out"
            )
        images = _images(archive)
        for name in lists:
            yield from _from_list(archive, name, images)
    else:
        yield from _from_annotations(archive)


def _from_list(archive: Archive, name: str, images: dict[str, str]) -> Iterator[Example]:
    official = _LISTS[PurePosixPath(name).name.lower()]
    rows = archive.read_csv(name)
    header = _header(next(rows))
    for number, cells in enumerate(rows):
        if len(cells) != len(header):
            yield Example(
                id=f"affectnet-{official}-row-{number:06d}",
                image=b"",
                official_split=official,
                defect=f"row has {len(cells)} cells instead of {len(header)}",
            )
            continue
        row = {key: cell.strip() for key, cell in zip(header, cells, strict=True)}
        yield _from_row(archive, row, images, official)


def _from_row(
    archive: Archive, row: dict[str, str], images: dict[str, str], official: str
) -> Example:
    path = PurePosixPath(row["subdirectory_filepath"])
    member = images.get(_key(path), "")
    image, damage = archive.read(member) if member else (b"", _NO_IMAGE)
    emotion, label, bad_label = _expression(row["expression"])
    affect, bad_affect = _affect(row["valence"], row["arousal"])
    box, bad_box = _box([row[name] for name in _COLUMNS[1:5]])
    # Without a box the detector failed, and the points are placeholders.
    landmarks, visible, bad_points = _points(row["facial_landmarks"] if box else "")
    return Example(
        # Files are named by a hash, of which the start identifies a picture just as well.
        id=f"affectnet-{path.stem[:16]}",
        image=image,
        emotion=emotion,
        label=label,
        landmarks=landmarks,
        visible=visible,
        box=box,
        affect=affect,
        official_split=official,
        defect=bad_label or damage or bad_affect or bad_box or bad_points,
    )


def _from_annotations(archive: Archive) -> Iterator[Example]:
    names = set(archive.names())
    pictures: dict[tuple[str, str], str] = {}  # by set and number, "" where there is none
    for name in archive.names():
        path = PurePosixPath(name)
        if _is_annotation(name):
            pictures.setdefault((str(path.parents[1]), path.stem.removesuffix("_exp")), "")
        elif path.parent.name == "images" and path.parent.parent.name in _SETS:
            pictures[str(path.parents[1]), path.stem] = name
    for (folder, stem), picture in sorted(pictures.items()):
        part = PurePosixPath(folder).name
        values = {
            key: _load(archive, f"{folder}/annotations/{stem}_{key}.npy", names)
            for key in ("exp", "val", "aro", "lnd")
        }
        image, damage = archive.read(picture) if picture else (b"", _NO_IMAGE)
        emotion, label, bad_label = _expression(values["exp"])
        affect, bad_affect = _affect(values["val"], values["aro"])
        landmarks, visible, bad_points = _points(values["lnd"])
        yield Example(
            id=f"affectnet-{part.removesuffix('_set')}-{stem}",
            image=image,
            emotion=emotion,
            label=label,
            landmarks=landmarks,
            visible=visible,
            affect=affect,
            official_split=_SETS[part],
            defect=bad_label or damage or bad_affect or bad_points,
        )


def _lists(archive: Archive) -> list[str]:
    """Names of the lists of the full packing; another dataset's training.csv is none."""
    return [
        name
        for name in _named_lists(archive)
        if {*_COLUMNS} <= {*_header(next(archive.read_csv(name), []))}
    ]


def _named_lists(archive: Archive) -> list[str]:
    return [name for name in archive.names() if PurePosixPath(name).name.lower() in _LISTS]


def _is_annotation(name: str) -> bool:
    path = PurePosixPath(name)
    in_set = path.parent.name == "annotations" and path.parent.parent.name in _SETS
    return in_set and name.endswith("_exp.npy")


def _images(archive: Archive) -> dict[str, str]:
    """Find pictures by folder number and file name, whatever folders are above."""
    return {_key(PurePosixPath(name)): name for name in archive.names()}


def _key(path: PurePosixPath) -> str:
    return f"{path.parent.name}/{path.name}"


def _header(cells: list[str]) -> list[str]:
    return [cell.strip().lower() for cell in cells]


def _load(archive: Archive, name: str, names: set[str]) -> str:
    """Read an annotation as the list would hold it: numbers joined by ";", "" where none is."""
    if name not in names:
        return ""
    content, _ = archive.read(name)
    try:
        values = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return "unreadable"
    return ";".join(str(value) for value in values.ravel())


def _expression(text: str) -> tuple[int, str, str]:
    """Return the index into EMOTIONS or -1, the source's word, and "" or what is wrong."""
    if not text:
        return -1, "", "no expression"
    text = text.removesuffix(".0")
    if not text.isdecimal() or int(text) >= len(EXPRESSIONS):
        return -1, "", f"expression {text[:20]!r} is not one of 0-{len(EXPRESSIONS) - 1}"
    label = EXPRESSIONS[int(text)]
    emotion = {"anger": "angry"}.get(label, label)
    return (
        EMOTIONS.index(emotion) if emotion in EMOTIONS else -1,
        label,
        "labelled as no face" if label == "no-face" else "",
    )


def _affect(valence: str, arousal: str) -> tuple[Affect | None, str]:
    try:
        values = [_number(valence), _number(arousal)]
    except ValueError:
        return None, "valence or arousal is not a number"
    if None in values or _NOT_APPLICABLE in values:
        return None, ""
    affect = Affect(*(value for value in values if value is not None))
    if not all(-1 <= value <= 1 for value in affect):
        return None, "valence or arousal is outside -1 to 1"
    return affect, ""


def _box(cells: list[str]) -> tuple[Box | None, str]:
    """Turn left, top, width and height in whole pixels into edges."""
    try:
        numbers = [_number(cell) for cell in cells]
    except ValueError:
        return None, "the face box is not made of numbers"
    known = [number for number in numbers if number is not None]
    if len(known) < 4 or known[2] <= 0 or known[3] <= 0:
        return None, ""
    x, y, width, height = known
    return Box(x - 0.5, y - 0.5, x + width - 0.5, y + height - 0.5), ""


def _points(text: str) -> tuple[np.ndarray, np.ndarray, str]:
    if text.lower() in ("", "null"):
        return *no_points(), ""
    cells = text.split(";")
    if len(cells) != 2 * IBUG_68.size:
        defect = f"{len(cells)} coordinates instead of {2 * IBUG_68.size}"
        return *no_points(), defect
    return parse_points(cells)


def _number(text: str) -> float | None:
    if text.lower() in ("", "null"):
        return None
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
