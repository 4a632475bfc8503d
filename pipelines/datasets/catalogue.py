"""Datasets of the TFDS catalogue: where it fetches them from, and its own parsers of their files.

The catalogue's download manager begins anew after a kill, and its parsers want the unpacked archive
on disk. So its address and sum go to `fetch`, which resumes, and its parsers are handed one
picture's files at a time.
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.cli import GrimaceError
from pipelines.datasets.archive import Archive
from pipelines.datasets.fetch import by_hand, fetch

_MEMORY = "ram://grimace"


def fetch_listed(name: str, target: Path, page: str) -> None:
    """Download the one archive that the catalogue lists for a dataset, as `fetch` does.

    Args:
        name: the dataset's name in the catalogue.
        target: where the archive goes.
        page: where a person gets the file, for error messages.

    Raises:
        GrimaceError: as `fetch`, or what came is not what the catalogue lists; it is not kept.
    """
    ((url, listed),) = builder_class(name).url_infos.items()
    fetch(url, target, page)
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != listed.checksum:
        target.unlink()
        raise GrimaceError(
            f"what came for {name} has SHA-256 {digest}, but the TFDS catalogue lists "
            f"{listed.checksum}: run the same again, or {by_hand(page, target)}"
        )


def read_member(archive: Archive, names: set[str], member: PurePosixPath) -> tuple[bytes, str]:
    """Read a picture or .mat file of the archive, whose `names()` are given as a set.

    Returns:
        Its bytes and "", or b"" and what is wrong with it.
    """
    if str(member) not in names:
        if member.suffix != ".mat":
            return b"", "its image is not in the archive"
        kind = "_pts.mat" if member.stem.endswith("_pts") else ".mat"
        return b"", f"its {kind} file is missing"
    return archive.read(str(member))


def parse(name: str, folder: str, files: Mapping[str, bytes]) -> tuple[dict[str, Any], str]:
    """Have the catalogue's parser read one picture and its labels.

    Args:
        name: the dataset's name in the catalogue.
        folder: what the original archive calls the folder that the parser is given.
        files: contents by name below `folder`. A picture's may be empty: the parsers only name it.

    Returns:
        The features and "", or {} and what is wrong.
    """
    import tensorflow as tf

    # The parsers open files by `gfile`, to which memory is a file system.
    gfile = tf.io.gfile
    builder = _builder(name)
    try:
        for file, content in files.items():
            path = f"{_MEMORY}/{folder}/{file}"
            gfile.makedirs(path.rpartition("/")[0])
            with gfile.GFile(path, "wb") as opened:
                opened.write(content)
        rows = list(builder._generate_examples(f"{_MEMORY}/{folder}"))
    except Exception as error:  # a damaged .mat can make its reader raise anything
        return {}, f"its labels cannot be read ({type(error).__name__})"
    finally:
        gfile.rmtree(_MEMORY)
    return (rows[0][1], "") if rows else ({}, "the catalogue's parser leaves it out")


@cache
def builder_class(name: str) -> Any:
    """Import the catalogue's own builder of a dataset.

    TFDS knows every builder by its name, and `pipelines.datasets.builder` has one of the same name
    for what is made of this one's data, so this one stays unknown to it.
    """
    from tensorflow_datasets.core.registered import skip_registration

    with skip_registration():
        return import_module(f"tensorflow_datasets.datasets.{name}.{name}_dataset_builder").Builder


@cache
def _builder(name: str) -> Any:
    return builder_class(name)()
