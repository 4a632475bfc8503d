"""FER-2013: 48×48 grey faces in seven expressions, from any of its three packings."""

import difflib
from collections.abc import Iterator
from pathlib import PurePosixPath

from models.schemes import EMOTIONS, FER2013_CSV_ORDER
from pipelines.datasets.archive import Archive
from pipelines.datasets.cells import encode_pixels
from pipelines.datasets.example import Example
from pipelines.datasets.folder import is_picture

EXPECTED = (
    "train/EMOTION/*.jpg and test/EMOTION/*.jpg, images/train/EMOTION/*.jpg and "
    "images/validation/EMOTION/*.jpg, or a CSV with columns emotion, pixels, Usage"
)
SIDE = 48

_SPLITS = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}
# Where the names do not tell, nothing may be chosen on what may be PrivateTest.
_PARTS = {"train": "train", "test": "test", "validation": "test"}


def recognises(archive: Archive) -> bool:
    """Whether the archive has one of the three layouts FER-2013 is published in."""
    return any(_is_known_class(name) for name in archive.names()) or _csv_name(archive) != ""


def examples(archive: Archive) -> Iterator[Example]:
    """Yield every image of the archive: 48×48 grey, with its emotion and official split.

    The folder layout is preferred where both are present, as they hold the same pictures. Its
    images are passed on as found; those of the CSV are encoded as PNG, which loses nothing. What
    cannot be used (an unknown class or part, a bad row, a damaged file) is yielded with its
    `defect`.

    The official split follows the file name's prefix (Training, PublicTest, PrivateTest). Where
    a repackaged archive lost the prefixes, PublicTest can no longer be told from PrivateTest, so
    all of `test/` or `validation/` counts as "test": nothing is ever chosen on what may be
    PrivateTest. None is "val" then; `split` draws that side from "train".

    Args:
        archive: `train/EMOTION/*` and `test/EMOTION/*` or `validation/EMOTION/*`, any of which
            may be missing, or `fer2013.csv`; all at any depth. `images/images/`, the second copy
            of everything that some archives carry, is passed over.
    """
    if any(_is_known_class(name) for name in archive.names()):
        yield from _from_folders(archive)
    else:
        yield from _from_csv(archive, _csv_name(archive))


def _from_folders(archive: Archive) -> Iterator[Example]:
    names = set(archive.names())
    # How deep pictures lie: one beside them is of a misspelt class, and what is not is no example.
    depths = {name.count("/") for name in names if _is_known_class(name)}
    for name in archive.names():
        path = PurePosixPath(name)
        *_, part, label, _ = ("", "", *path.parts)
        part, emotion = part.lower(), _emotion(label)
        beside = is_picture(name) and name.count("/") in depths
        if not (part in _PARTS or emotion >= 0 or beside) or _is_second_copy(name, names):
            continue
        image, defect = archive.read(name)
        official = _SPLITS.get(path.stem.split("_")[0], "")
        if emotion < 0:
            defect = _unknown_class(label)
        elif part not in _PARTS:  # a "val" of somebody's own making, say
            defect = f"its class folder is in none of {', '.join(_PARTS)}"
        yield Example(
            id=path.stem if official else f"{part}-{label.lower()}-{path.stem}",
            image=image,
            emotion=emotion,
            official_split=official or _PARTS.get(part, ""),
            defect=defect,
        )


def _from_csv(archive: Archive, name: str) -> Iterator[Example]:
    rows = archive.read_csv(name)
    header = [column.strip().lower() for column in next(rows)]
    wanted = [header.index(column) for column in ("emotion", "pixels", "usage")]
    for number, cells in enumerate(rows):
        id = f"fer2013-{number:05d}"
        if len(cells) != len(header):
            yield Example(id, b"", defect=f"row has {len(cells)} cells instead of {len(header)}")
            continue
        label, pixels, usage = (cells[index].strip() for index in wanted)
        emotion, bad_label = _parse_label(label)
        image, bad_pixels = encode_pixels(pixels, SIDE)
        official = _SPLITS.get(usage, "")
        yield Example(
            id=id,
            image=image,
            emotion=emotion,
            official_split=official,
            defect=bad_label or bad_pixels or ("" if official else f"unknown Usage {usage!r}"),
        )


def _is_in_class_folder(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return len(parts) >= 3 and parts[-3].lower() in _PARTS


def _is_second_copy(name: str, names: set[str]) -> bool:
    once = name.replace("images/images/", "images/", 1)
    return once != name and once in names


def _is_known_class(name: str) -> bool:
    return _is_in_class_folder(name) and _emotion(PurePosixPath(name).parts[-2]) >= 0


def _csv_name(archive: Archive) -> str:
    """Name of the CSV in the challenge's format, "" where there is none."""
    names = [name for name in archive.names() if name.lower().endswith(".csv")]
    # The challenge's own file first: its archive may carry derived ones beside it.
    for name in sorted(names, key=lambda name: PurePosixPath(name).name != "fer2013.csv"):
        header = {column.strip().lower() for column in next(archive.read_csv(name), [])}
        if header >= {"emotion", "pixels", "usage"}:
            return name
    return ""


def _emotion(label: str) -> int:
    return EMOTIONS.index(label.lower()) if label.lower() in EMOTIONS else -1


def _unknown_class(label: str) -> str:
    close = difflib.get_close_matches(label.lower(), EMOTIONS, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown class folder {label!r}{hint}"


def _parse_label(text: str) -> tuple[int, str]:
    """Turn the CSV's integer into an index into EMOTIONS, or -1 and what is wrong with it."""
    if not text:
        return -1, "no label"
    try:
        label = int(text)
    except ValueError:
        return -1, f"label {text[:20]!r} is not a number"
    if not 0 <= label < len(FER2013_CSV_ORDER):
        return -1, f"label {label} is outside 0-6"
    return EMOTIONS.index(FER2013_CSV_ORDER[label]), ""
