"""What a look at the landing folders has decided, and how that is carried out.

`pipelines.landing` prepares everything in `.next`, with a journal of what is left to do; renaming
the folder to `.ready` decides. Each step of a journal can be done twice, so that whatever ends a
look, the next one finishes it.
"""

import csv
import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import copyfile, rmtree
from typing import Any

from pydantic import BaseModel

from pipelines.cli import GrimaceError
from pipelines.datasets import OWN
from pipelines.download import ARCHIVES, REPORTS
from pipelines.params import Watch, edit_params, load_params

VERSIONS = ARCHIVES / f"{OWN}-versions"
UNLABELLED = Path("data/unlabelled")
NEXT, READY = VERSIONS / ".next", VERSIONS / ".ready"
JOURNAL = "journal.json"
TABLE = "quarantine.csv"
PENDING = ".pending"  # marks a version or batch that nobody was told of yet


class Landed(BaseModel):
    """A file as it was seen; it may have been replaced since."""

    path: Path
    size: int
    mtime_ns: int

    def is_there(self) -> bool:
        """Whether the same file still lies there."""
        try:
            stat = self.path.lstat()
        except FileNotFoundError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


class Move(BaseModel):
    """A file to be moved; one from within `.ready` has no `landed`."""

    source: Path
    target: Path
    landed: Landed | None = None


class Refused(BaseModel):
    """A row of quarantine.csv; without a picture of its own `sha256` is empty."""

    file: str
    reason: str
    time: str
    sha256: str


class Journal(BaseModel):
    """All that a look has decided.

    Attributes:
        batch: its name, from the time in UTC.
        version: the new one, 0 where there is none; `base` and `archive` are what params.yaml
            names before and after, `sha256` is the sum of the latter.
        added: pictures new in the version.
        unlabelled: pictures without labels.
        moves: to the quarantine and to `data/unlabelled`.
        removals: what was taken over and can go from the landing folders.
        refused: rows for quarantine.csv.
    """

    batch: str
    version: int = 0
    base: str = ""
    archive: str = ""
    sha256: str = ""
    added: int = 0
    unlabelled: int = 0
    moves: list[Move] = []
    removals: list[Landed] = []
    refused: list[Refused] = []


class DatasetBusyError(GrimaceError):
    """DVC is at work on the dataset; the version can be published when it is done."""


@contextmanager
def alone() -> Iterator[None]:
    """Keep other looks out; the operating system lets go when this process ends."""
    VERSIONS.mkdir(parents=True, exist_ok=True)
    with (VERSIONS / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GrimaceError(
                f"another look is at work in {VERSIONS}; wait until it is done"
            ) from None
        yield


def finish(journal: Journal, settings: Watch) -> None:
    """Do all that the journal says; each step may have been done before.

    Raises:
        DatasetBusyError: the version has to wait; the next look goes on.
    """
    if journal.version:
        name = f"{journal.version:04d}"
        for source, target in (("version", name), ("record.json", f"{name}.json")):
            if (READY / source).exists():
                (READY / source).rename(VERSIONS / target)
    try:
        for move in journal.moves:
            if move.landed is None or move.landed.is_there():
                _move(move.source, move.target)
        for landed in journal.removals:
            if landed.is_there():
                landed.path.unlink()
    except PermissionError as error:
        raise GrimaceError(
            f"{error.filename} cannot be moved away ({error.strerror}): give whoever runs this the "
            "right to write in its folder; the next look goes on from here"
        ) from None
    if journal.refused:
        _list_refused(journal, settings.quarantine)
    if journal.version:
        _publish(journal)
        (VERSIONS / f"{journal.version:04d}{PENDING}").touch()
    if journal.unlabelled:
        (UNLABELLED / f"{journal.batch}{PENDING}").touch()
    for path in READY.iterdir():
        if path.name != JOURNAL:
            rmtree(path)
    (READY / JOURNAL).unlink()
    READY.rmdir()


def _move(source: Path, target: Path) -> None:
    """Move a file, to another file system too; one that is gone was moved before."""
    if not (source.exists() or source.is_symlink()):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError:  # another file system
        draft = target.with_name(f".{target.name}.partial")
        copyfile(source, draft, follow_symlinks=False)
        draft.replace(target)
        source.unlink()


def _list_refused(journal: Journal, quarantine: Path) -> None:
    """Add the journal's rows to quarantine.csv, in one step."""
    path = quarantine / TABLE
    rows: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if not _is_of(row, journal.batch)]
    rows += [row.model_dump() for row in journal.refused]
    quarantine.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{TABLE}.partial")
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Refused.model_fields))
        writer.writeheader()
        writer.writerows(rows)
    draft.replace(path)


def _is_of(row: Mapping[str, str], batch: str) -> bool:
    return row["file"].startswith(f"{batch}/")


def _publish(journal: Journal) -> None:
    """Have params.yaml name the version.

    Raises:
        DatasetBusyError: DVC is running `download` on the dataset; it would note what it took for
            made from what params.yaml says when it ends.
        GrimaceError: params.yaml names neither the version nor the one that it continues.
    """
    with _download_at_rest(journal.version):
        named = load_params().download.folder.archive
        if named == journal.archive:
            return
        if named != journal.base:
            raise GrimaceError(
                f"version {journal.version} continues {journal.base}, but params.yaml names {named}"
                f" as download.folder.archive by now; set it to {journal.base} or "
                f"{journal.archive}"
            )

        def change(text: Any) -> None:
            from ruamel.yaml.comments import CommentedSeq

            sums = CommentedSeq([journal.sha256])
            sums.fa.set_flow_style()
            text["download"][OWN]["archive"] = journal.archive
            text["download"][OWN]["sha256"] = sums

        edit_params(change)


@contextmanager
def _download_at_rest(version: int) -> Iterator[None]:
    """Keep DVC from running `download@folder`, by its own locks; nothing to do without DVC."""
    if not Path(".dvc").is_dir():
        yield
        return
    from dvc.fs import localfs
    from dvc.lock import LockError
    from dvc.rwlock import rwlock

    locks = Path(".dvc/tmp").absolute()
    locks.mkdir(exist_ok=True)
    written = (REPORTS / f"{OWN}.json").absolute()
    lock = rwlock(str(locks), localfs, "pipelines.landing", [], [str(written)], hardlink=False)
    with ExitStack() as held:
        try:
            held.enter_context(lock)
        except LockError:
            raise DatasetBusyError(
                f"version {version} waits: DVC is running download@{OWN}, whose input it changes"
            ) from None
        yield


def pending_versions() -> list[dict[str, Any]]:
    """Return the records of versions that nobody was told of yet, without their lists of files."""
    records = [
        json.loads(marker.with_suffix(".json").read_text())
        for marker in sorted(VERSIONS.glob(f"*{PENDING}"))
    ]
    return [
        {name: value for name, value in record.items() if name != "files"}
        | {"added": len(record["added"])}
        for record in records
    ]


def pending_batches() -> list[str]:
    """Return the batches of pictures without labels that were not measured yet."""
    return [marker.name.removesuffix(PENDING) for marker in sorted(UNLABELLED.glob(f"*{PENDING}"))]


def told_of_version(number: int) -> None:
    """Note that a version needs no more telling."""
    (VERSIONS / f"{number:04d}{PENDING}").unlink(missing_ok=True)


def tried(batch: str) -> int:
    """Note that a batch could not be measured; return how often by now, 0 if it needs no more."""
    marker = UNLABELLED / f"{batch}{PENDING}"
    if not marker.exists():  # another look has told of it
        return 0
    count = int(marker.read_text() or 0) + 1
    marker.write_text(str(count))
    return count


def told_of_batch(batch: str) -> None:
    """Note that a batch was measured, or never will be."""
    (UNLABELLED / f"{batch}{PENDING}").unlink(missing_ok=True)
