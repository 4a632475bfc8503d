"""A user's own faces: pictures in class folders, or with a table of landmarks, or both."""

import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

from models.schemes import EMOTIONS, SCHEMES
from pipelines.cli import GrimaceError
from pipelines.datasets.archive import Archive
from pipelines.datasets.cells import parse_points
from pipelines.datasets.example import Example

TABLE = "landmarks.csv"
EXPECTED = (
    f"class folders of pictures ({', '.join(EMOTIONS)}), or pictures and {TABLE} with the columns "
    "image, x0, y0, x1, y1, …"
)

_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

# Other words people use, by the label they stand for. Contempt is none of the seven.
_SYNONYMS = {
    "angry": ("anger",),
    "disgust": ("disgusted",),
    "fear": ("fearful", "afraid", "scared"),
    "happy": ("happiness", "joy", "joyful"),
    "neutral": (),
    "sad": ("sadness",),
    "surprise": ("surprised",),
    "contempt": ("contemptuous",),
}
_LABELS = {word: label for label, words in _SYNONYMS.items() for word in (label, *words)}
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_OPTIONAL = ("person", "split", "emotion")


@dataclass(frozen=True)
class Table:
    """Where the landmarks are, and which column holds what.

    Attributes:
        name: of the CSV in the archive.
        width: how many cells a row has.
        columns: place of each column by its name, in the order of the header.
        coordinates: places of x0, y0, x1, y1, …
    """

    name: str
    width: int
    columns: dict[str, int]
    coordinates: list[int]


class Row(NamedTuple):
    """A row of the table, or a file that no row names.

    Attributes:
        name: of the picture in the archive, whether it is there or not; of a row without the
            right number of cells, the table's and the row's number.
        cells: of the row; () for a file.
        example: what they say.
    """

    name: str
    cells: Sequence[str]
    example: Example


def recognises(archive: Archive) -> bool:
    """Whether the archive has the table, or a picture below a folder named after an expression."""
    return any(
        PurePosixPath(name).name == TABLE or (is_picture(name) and classes_of(name))
        for name in archive.names()
    )


def examples(archive: Archive) -> Iterator[Example]:
    """Yield every row of the table, then every file that no row names.

    The class is a folder named after an expression, or a common synonym; the split is a folder
    named train, val or test. What the table says goes before what folders say. Contempt is kept
    as `label` with emotion -1. Landmarks are in pixels of the upright picture, missing ones
    invisible and 0. `id` is a hash of the path and `person` one of the table's key, since file
    names and keys may be people's names.

    Pictures with neither class nor row, or below folders of two classes, rows without their
    picture or with cells that cannot be read, and files that are no pictures are yielded with
    their `defect`.

    Args:
        archive: class folders at any depth, or one `landmarks.csv` with paths as seen from it.

    Raises:
        GrimaceError: there are several tables, or the table's header is not as described in the
            data card.
    """
    return (row.example for row in rows(archive))


def rows(archive: Archive) -> Iterator[Row]:
    """Yield the same with the names of the pictures and the rows' own cells."""
    table = find_table(archive)
    files = set(archive.names())
    rest = dict.fromkeys(archive.names())
    if table:
        del rest[table.name]
        lines = archive.read_csv(table.name)
        next(lines)
        for number, cells in enumerate(lines):
            if len(cells) != table.width:
                defect = f"row has {len(cells)} cells instead of {table.width}"
                name = f"{table.name}/{number}"
                yield Row(name, cells, Example(id_of(name), b"", defect=defect))
                continue
            member = member_of(table, cells)
            rest.pop(member, None)
            example = _from_row(archive, table, cells, member, found=member in files)
            yield Row(member, cells, example)
    for name in rest:
        yield Row(name, (), _from_file(archive, name))


def _from_row(
    archive: Archive, table: Table, cells: list[str], member: str, *, found: bool
) -> Example:
    said = {
        name: cells[table.columns[name]].strip() if name in table.columns else ""
        for name in _OPTIONAL
    }
    label, bad_label = _label(said["emotion"]) if said["emotion"] else _label_of(member)
    split, bad_split = _split(said["split"]) if said["split"] else (_split_of(member), "")
    coordinates = [cells[column].strip() for column in table.coordinates]
    landmarks, visible, bad_points = parse_points(coordinates)
    if label and not any(coordinates):
        bad_points = ""  # a face for the emotion task only
    image, damage = archive.read(member) if found else (b"", "its image is not in the archive")
    return Example(
        id=id_of(member),
        image=image,
        emotion=_emotion(label),
        label=label,
        landmarks=landmarks,
        visible=visible,
        person=_hash(said["person"]) if said["person"] else "",
        official_split=split,
        defect=damage or bad_label or bad_split or bad_points,
    )


def _from_file(archive: Archive, name: str) -> Example:
    if not is_picture(name):
        # Its own ending is not repeated: of "Dr. Ann Lee" it is a name.
        return Example(id_of(name), b"", defect=f"not a picture: known are {', '.join(_PICTURES)}")
    label, bad_label = _label_of(name)
    image, damage = archive.read(name)
    return Example(
        id=id_of(name),
        image=image,
        emotion=_emotion(label),
        label=label,
        official_split=_split_of(name),
        defect=damage or bad_label or ("" if label else _no_class(name)),
    )


def find_table(archive: Archive) -> Table | None:
    """Read the header of the archive's table; None where there is no table.

    Raises:
        GrimaceError: there are several, or its header is not as described in the data card.
    """
    names = [name for name in archive.names() if PurePosixPath(name).name == TABLE]
    if not names:
        return None
    if len(names) > 1:
        raise GrimaceError(
            f"{archive.path} has {len(names)} tables ({', '.join(names[:3])}); make it one "
            f"{TABLE} with paths as seen from its folder"
        )
    header = [cell.strip().lower() for cell in next(archive.read_csv(names[0]), [])]
    columns = {name: index for index, name in enumerate(header)}
    numbered = [name for name in header if re.fullmatch(r"[xy]\d+", name)]
    size = len(numbered) // 2
    wanted = [f"{axis}{number}" for number in range(size) for axis in "xy"]
    sizes = " or ".join(str(known) for known in sorted(SCHEMES))
    problem = ""
    if "image" not in columns:
        problem = "has no column image"
    elif len(columns) != len(header):
        problem = "has two columns of one name"
    elif unknown := [name for name in header if name not in ("image", *_OPTIONAL, *numbered)]:
        problem = f"has the unknown column {unknown[0]!r}"
    elif size not in SCHEMES or {*wanted} != {*numbered}:
        problem = f"has {len(numbered)} columns of coordinates"
    if problem:
        raise GrimaceError(
            f"{archive.path}: {names[0]} {problem}; its columns are image, x0, y0, x1, y1 and so "
            f"on for {sizes} points, and if you like {', '.join(_OPTIONAL)}"
        )
    return Table(names[0], len(header), columns, [columns[name] for name in wanted])


def member_of(table: Table, cells: Sequence[str]) -> str:
    """Return the name in the archive of the picture that a row names."""
    picture = cells[table.columns["image"]].strip().replace("\\", "/")
    return str(PurePosixPath(table.name).parent / picture)


def classes_of(name: str) -> list[str]:
    """Labels that the folders above a file stand for."""
    words = [folder.lower() for folder in PurePosixPath(name).parts[:-1]]
    return sorted({_LABELS[word] for word in words if word in _LABELS})


def _label_of(name: str) -> tuple[str, str]:
    classes = classes_of(name)
    if len(classes) > 1:  # angry/joy/1.jpg: Joy may be a person
        return "", f"below folders of more than one class: {', '.join(classes)}"
    return classes[0] if classes else "", ""


def _split_of(name: str) -> str:
    words = [folder.lower() for folder in PurePosixPath(name).parts[:-1]]
    return next((_SPLITS[word] for word in words if word in _SPLITS), "")


def _label(word: str) -> tuple[str, str]:
    label = _LABELS.get(word.lower(), "")
    return label, "" if label else _unknown("emotion", [word])


def _split(word: str) -> tuple[str, str]:
    split = _SPLITS.get(word.lower(), "")
    return split, "" if split else "unknown split: it is train, val or test"


def _no_class(name: str) -> str:
    folders = PurePosixPath(name).parts[:-1]
    return _unknown("class folder", folders) if folders else "neither a class folder nor a row"


def _unknown(what: str, words: Sequence[str]) -> str:
    """Repeat a word only where it is plainly a misspelt class: others may be people's names."""
    for word in words:
        if close := difflib.get_close_matches(word.lower(), _LABELS, n=1, cutoff=0.75):
            return f"unknown {what} {word!r} (did you mean {close[0]!r}?)"
    return f"unknown {what}: known are {', '.join(_SYNONYMS)}"


def _emotion(label: str) -> int:
    return EMOTIONS.index(label) if label in EMOTIONS else -1


def is_picture(name: str) -> bool:
    """Whether a file is called as pictures are."""
    return PurePosixPath(name).suffix.lower() in _PICTURES


def id_of(name: str) -> str:
    """Return the id of a picture by its name in the archive."""
    return f"folder-{_hash(name)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:10]
