"""The datasets by name, and one way to read any of them.

To add one: write a module with `EXPECTED`, `recognises(archive)` and `examples(archive)` and a data
card `NAME.md` beside it; name it here; give it a builder class in `builder` and a section in
`params` under `download`.
"""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from itertools import chain, count
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pipelines.cli import GrimaceError
from pipelines.datasets.archive import Archive
from pipelines.datasets.example import Example

if TYPE_CHECKING:  # `params` asks this module what a dataset serves
    from pipelines.params import TaskName

GENERATED = "synthetic"
OWN = "folder"
# `folder` last: many an archive looks like class folders.
FROM_ARCHIVES = (
    "fer2013",
    "ytf_keypoints",
    "kaggle_keypoints",
    "affectnet",
    "the300w_lp",
    "aflw2k3d",
    OWN,
)
DATASETS = (GENERATED, *FROM_ARCHIVES)

LABELS: dict[str, tuple["TaskName", ...]] = {
    "synthetic": ("emotion", "landmarks"),
    "fer2013": ("emotion",),
    "ytf_keypoints": ("landmarks",),
    "kaggle_keypoints": ("landmarks",),
    "affectnet": ("emotion", "landmarks"),
    "the300w_lp": ("landmarks",),
    "aflw2k3d": ("landmarks",),
    "folder": ("emotion", "landmarks"),
}
"""Which tasks each dataset carries labels for."""

EVALUATE_ONLY = ("aflw2k3d",)
"""Published to measure on: nothing may be trained or chosen on them."""


def module_of(name: str) -> ModuleType:
    """Import the module of one dataset.

    Raises:
        GrimaceError: there is no such dataset.
    """
    if name not in DATASETS:
        raise GrimaceError(f"there is no dataset {name!r}; known are {', '.join(DATASETS)}")
    return import_module(f"pipelines.datasets.{name}")


def card(name: str) -> str:
    """Return the data card of one dataset: Markdown, a title and one section a question.

    Raises:
        GrimaceError: there is no such dataset.
    """
    if name not in LABELS:
        raise GrimaceError(f"there is no dataset {name!r}; known are {', '.join(LABELS)}")
    return Path(__file__).with_name(f"{name}.md").read_text()


def examples(name: str, archive: Archive) -> Iterator[Example]:
    """Read a dataset from its archive; every id comes once.

    Raises:
        GrimaceError: there is no such dataset, it is drawn rather than read, or the archive holds
            something else; raised at once, before the first example is asked for.
    """
    module = module_of(name)
    if name == GENERATED:
        raise GrimaceError(f"{name} is drawn here and has no archive: leave {archive.path} out")
    if not module.recognises(archive):
        others = [other for other in FROM_ARCHIVES if module_of(other).recognises(archive)]
        looks = f" This looks like {others[0]}." if others else ""
        raise GrimaceError(
            f"{archive.path} does not hold {name}: expected {module.EXPECTED}; "
            f"found {archive.layout()}.{looks} Put the right archive in its place, or name it in "
            f"params.yaml under download.{name}.archive"
        )
    return _with_unique_ids(module.examples(archive))


def _with_unique_ids(rows: Iterator[Example]) -> Iterator[Example]:
    """Number ids that come again: FER-2013 gives two names to two different pictures each."""
    seen: set[str] = set()
    for row in rows:
        numbered = (f"{row.id}-{number}" for number in count(2))
        id = next(name for name in chain([row.id], numbered) if name not in seen)
        seen.add(id)
        yield row if id == row.id else replace(row, id=id)
