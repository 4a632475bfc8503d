"""The datasets by name, and one way to read any of them.

To add one: write a module with a data card as its docstring, `EXPECTED`, `recognises(archive)` and
`examples(archive)`; name it here; give it a builder class in `builder`, a section in `params`
under `download`, and its name to the stages in `dvc.yaml`.
"""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from itertools import chain, count
from types import ModuleType

from pipelines.cli import GrimaceError
from pipelines.datasets.archive import Archive
from pipelines.datasets.example import Example

GENERATED = "synthetic"
FROM_ARCHIVES = ("fer2013", "ytf_keypoints")
DATASETS = (GENERATED, *FROM_ARCHIVES)


def module_of(name: str) -> ModuleType:
    """Import the module of one dataset.

    Raises:
        GrimaceError: there is no such dataset.
    """
    if name not in DATASETS:
        raise GrimaceError(f"there is no dataset {name!r}; known are {', '.join(DATASETS)}")
    return import_module(f"pipelines.datasets.{name}")


def examples(name: str, archive: Archive) -> Iterator[Example]:
    """Read a dataset from its archive; every id comes once.

    Raises:
        GrimaceError: there is no such dataset, or the archive holds something else; raised at
            once, before the first example is asked for.
    """
    module = module_of(name)
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
