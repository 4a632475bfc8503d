"""Look once at the landing folders: check what has landed, keep what is good, quarantine the rest.

Good pictures with labels become the next version of the dataset `folder`: a read-only folder
`data/archives/folder-versions/NNNN`, which holds the version before (by hard links, so it takes no
room) and the new pictures in `batch-NNNN/`, under the names that they landed with. Beside it,
`NNNN.json` records number, time, what is new, and the SHA-256 of every file. Then
`download.folder` of params.yaml names the version and its sum, so that `dvc repro` takes it for a
changed input. No old file is renamed, so no old id changes, and `split` moves nobody. Setting
`archive` in params.yaml back to an older version makes that the one to be continued.

Pictures without labels are kept in `data/unlabelled/BATCH` for `pipelines.drift`; they wait in the
landing folder until there are enough of them to measure.

What has changed within `watch.settle` seconds waits, as do all files under a `landmarks.csv`, or
in a folder of pictures without labels, until the last of them has settled. Pictures in class
folders and archives are taken one by one. What cannot be used goes to `watch.quarantine`/BATCH,
with its reason in `quarantine.csv` there: unreadable or blank pictures, copies of a picture that
the data have already, web pages in place of archives, archives that hold too much or would write
outside of their folder, whatever the dataset's own checks object to. Rows of a table are
quarantined as a table, so the whole folder can be mended and put back.

A look can be killed at any moment. All that it finds out is prepared in `.next`, whose renaming to
`.ready` decides; whatever is left to do then stands in a journal there, each step of which can be
done twice, and the next look begins with it.

    python -m pipelines.landing
"""

import argparse
import csv
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from shutil import copyfile, rmtree
from typing import NamedTuple

import cv2
from tqdm import tqdm

from pipelines.cli import GrimaceError, run
from pipelines.crops import UnreadableImageError, decode
from pipelines.datasets import OWN, folder
from pipelines.datasets.archive import Archive, open_archive, readable, unpack
from pipelines.download import ARCHIVES, folder_sum, places
from pipelines.journal import (
    JOURNAL,
    NEXT,
    READY,
    UNLABELLED,
    VERSIONS,
    DatasetBusyError,
    Journal,
    Landed,
    Move,
    Refused,
    alone,
    finish,
)
from pipelines.params import Params, Watch, load_params

# What is tried as an archive; of those that are not read, `unpack` says what they are.
_PACKED = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".rar", ".7z")


class Look(NamedTuple):
    """What a look has done.

    Attributes:
        version: the new version, 0 where there is none.
        added: pictures new in it.
        quarantined: files and rows that were quarantined.
        batch: name of the batch of pictures without labels, "" where there is none.
        unlabelled: pictures in it.
        waiting: what was left alone, and why.
    """

    version: int = 0
    added: int = 0
    quarantined: int = 0
    batch: str = ""
    unlabelled: int = 0
    waiting: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = []
        if self.version:
            said.append(f"version {self.version} of {OWN}: {self.added:,} new pictures")
        if self.batch:
            said.append(f"{self.unlabelled:,} pictures without labels in {UNLABELLED / self.batch}")
        if self.quarantined:
            said.append(f"{self.quarantined:,} quarantined")
        return "; ".join([*said, *self.waiting]) or "nothing new has landed"


class Base(NamedTuple):
    """The version to be continued: its name in params.yaml, and SHA-256 by file."""

    name: str
    files: dict[str, str]
    archive: Archive | None


class Intake(NamedTuple):
    """Files that are read together, as one small dataset.

    Attributes:
        archive: they themselves, by their names in the landing folder; members of `a.zip` are
            called `a.zip!/…`.
        files: where they lie, landed or unpacked.
        packed: the landed file that they were unpacked from.
        wrong: why members of that could not be unpacked.
    """

    archive: Archive
    files: Mapping[str, Landed | Path]
    packed: Landed | None
    wrong: Mapping[str, str]


def main() -> None:
    """Look once, and say what was done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print(look(load_params()))


def look(params: Params, now: float | None = None) -> Look:
    """Take what has settled in the landing folders, or finish what an earlier look had begun.

    Args:
        params: the whole; `watch`, `filter` and `download` are used.
        now: seconds since the epoch, by which files have settled or not; default: the clock.

    Raises:
        GrimaceError: another look is at work, the version to be continued is missing or was
            changed, or params.yaml names another one than when the look began.
    """
    with alone():
        waiting: list[str] = []
        if not (READY / JOURNAL).exists():
            rmtree(READY, ignore_errors=True)
            waiting = _collect(params, time.time() if now is None else now)
        if not READY.exists():
            return Look(waiting=tuple(waiting))
        journal = Journal.model_validate_json((READY / JOURNAL).read_text())
        try:
            finish(journal, params.watch)
        except DatasetBusyError as error:
            return Look(waiting=(*waiting, str(error)))
    return Look(
        version=journal.version,
        added=journal.added,
        quarantined=len(journal.refused),
        batch=journal.batch if journal.unlabelled else "",
        unlabelled=journal.unlabelled,
        waiting=tuple(waiting),
    )


# What has landed


def settled(
    place: Path, seconds: float, now: float, labelled: bool = True
) -> tuple[dict[str, Landed], int]:
    """List the files below a folder that are whole, without hidden ones.

    A file counts as changed when it is written, renamed or moved here (its ctime, which a copy that
    keeps the time of its original does not set back). One whose name is no UTF-8 is renamed, since
    no table could hold it, and waits once more.

    Args:
        place: the folder; it need not be there.
        seconds: for which a file has to be unchanged.
        now: seconds since the epoch.
        labelled: whether files wait for those that may tell their labels.

    Returns:
        The files by their names in the folder, sorted, and how many others have to wait; with them
        those that the system does not let us look at.
    """
    found: dict[str, Landed] = {}
    fresh: set[str] = set()
    denied = 0
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if any(part.startswith((".", "__MACOSX")) for part in name.split("/")):
            continue
        try:
            stat = path.lstat()
        except FileNotFoundError:  # gone again
            continue
        except PermissionError:  # in a folder that we may list, not enter
            denied += 1
            continue
        if readable(path.name) != path.name:
            if now - stat.st_ctime >= seconds:
                with suppress(PermissionError):  # it is counted, and the others go on
                    _rename(path)
            denied += 1
            continue
        if path.is_file() or path.is_symlink():
            found[name] = Landed(path=path, size=stat.st_size, mtime_ns=stat.st_mtime_ns)
            if now - stat.st_ctime < seconds:
                fresh.add(name)
    if labelled:
        tables = _tables(found)
        late = {_unit(name, tables) for name in fresh}
        fresh = {name for name in found if _unit(name, tables) in late}
    return {name: file for name, file in found.items() if name not in fresh}, len(fresh) + denied


def _rename(path: Path) -> None:
    """Give a file or folder a name that is text, and not that of another."""
    name, number = readable(path.name), 1
    while (target := path.with_name(name)).exists():
        number += 1
        name = f"{number}-{readable(path.name)}"
    path.rename(target)


def _tables(names: Iterable[str]) -> set[PurePosixPath]:
    """Folders that have a table."""
    paths = map(PurePosixPath, names)
    return {path.parent for path in paths if path.name == folder.TABLE}


def _unit(name: str, tables: set[PurePosixPath]) -> PurePosixPath:
    """Name what a landed file is part of: a table's folder, itself, or a folder without labels."""
    path = PurePosixPath(name)
    if _is_packed(name):
        return path
    for above in reversed(path.parents):
        if above in tables:
            return above
    if folder.classes_of(name):
        return path
    return PurePosixPath(path.parts[0]) if len(path.parts) > 1 else PurePosixPath()


def _is_packed(name: str) -> bool:
    return name.lower().endswith(_PACKED)


def _intakes(
    place: Path, landed: Mapping[str, Landed], settings: Watch, refuse: "Refuse"
) -> Iterator[Intake]:
    """Put files together that are read together; archives are unpacked, the bad ones refused."""
    tables = _tables(landed)
    loose: dict[PurePosixPath, dict[str, Landed | Path]] = {}
    for number, (name, file) in enumerate(landed.items()):
        if file.path.is_symlink():
            refuse(file, name, "a link, not a file")
        elif _is_packed(name):
            into = NEXT / "unpacked" / f"{place.name}-{number}"
            limits = settings.archive
            try:
                wrong = unpack(file.path, into, limits.mib << 20, limits.files)
                members = open_archive(into).names()
            except GrimaceError as error:
                rmtree(into, ignore_errors=True)
                refuse(file, name, str(error))
                continue
            inside = {f"{name}!/{member}": into / member for member in members}
            wrong = {f"{name}!/{member}": reason for member, reason in wrong.items()}
            yield Intake(_as_archive(place, inside), inside, file, wrong)
        else:
            unit = _unit(name, tables)
            loose.setdefault(unit if unit in tables else PurePosixPath(), {})[name] = file
    for files in loose.values():
        yield Intake(_as_archive(place, files), files, None, {})


def _as_archive(place: Path, files: Mapping[str, Landed | Path]) -> Archive:
    return Archive(place, sorted(files), lambda name: _path(files[name]).open("rb"))


def _path(file: Landed | Path) -> Path:
    return file.path if isinstance(file, Landed) else file


# What is decided


class Refuse:
    """Notes in a journal what is refused, and where it goes."""

    def __init__(self, journal: Journal, settings: Watch, kind: str) -> None:
        self.journal, self.kind = journal, kind
        self.place = settings.quarantine / journal.batch / kind
        self.moved: set[Path] = set()

    def __call__(self, file: Landed | Path | None, name: str, reason: str) -> None:
        """Refuse a file, landed or unpacked, or without one only a row."""
        path = None if file is None else _path(file)
        sha256 = _sha256(path) if path is not None and path.is_file() else ""
        self.journal.refused.append(
            Refused(
                file=str(Path(self.journal.batch, self.kind, name)),
                reason=reason,
                time=_now(),
                sha256=sha256,
            )
        )
        if file is not None and _path(file) not in self.moved:
            self.moved.add(_path(file))
            self.journal.moves.append(_move_of(file, self.place / name))


def _move_of(file: Landed | Path, target: Path) -> Move:
    if isinstance(file, Landed):
        return Move(source=file.path, target=target, landed=file)
    return Move(source=_once_ready(file), target=target)


def _collect(params: Params, now: float) -> list[str]:
    """Decide about all that has settled; leaves `.ready` where there is anything to do.

    Returns:
        What has to wait, and why.
    """
    settings = params.watch
    rmtree(NEXT, ignore_errors=True)
    for place in (settings.labelled, settings.unlabelled):
        place.mkdir(parents=True, exist_ok=True)
    labelled, late = settled(settings.labelled, settings.settle, now)
    unlabelled, later = settled(settings.unlabelled, settings.settle, now, labelled=False)
    late += later
    waiting = [f"{late:,} files have not settled yet, or cannot be looked at"] if late else []
    journal = Journal(batch=f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
    if labelled:
        _collect_labelled(labelled, params, journal)
    if unlabelled:
        waiting += _collect_unlabelled(unlabelled, params, journal)
    if journal.moves or journal.removals or journal.refused:
        NEXT.mkdir(exist_ok=True)
        (NEXT / JOURNAL).write_text(journal.model_dump_json(indent=1))
        NEXT.rename(READY)  # from here on it is decided
    rmtree(NEXT, ignore_errors=True)
    return waiting


def _collect_labelled(landed: Mapping[str, Landed], params: Params, journal: Journal) -> None:
    """Sort pictures with labels into good ones, which make a version, and refused ones."""
    base = _read_base(params)
    number = 1 + max((int(path.stem) for path in VERSIONS.glob("[0-9]*.json")), default=0)
    batch = PurePosixPath(f"batch-{number:04d}")
    refuse = Refuse(journal, params.watch, "labelled")
    known = {sha256: name for name, sha256 in base.files.items()}
    lines = _base_lines(base)
    points = (len(lines[0]) - len(lines[0].keys() & _WORDS)) // 2 if lines else 0
    before = len(lines)
    added: dict[str, str] = {}
    for intake in _intakes(params.watch.labelled, landed, params.watch, refuse):
        try:
            done = _sort(intake, batch, known, points, params)
        except GrimaceError as error:
            _refuse_whole(intake, params.watch.labelled, refuse, str(error))
            continue
        for name, reason in done.faults:
            refuse(None if name in done.kept else intake.files.get(name), name, reason)
        _quarantine_lines(done, refuse)
        for name, sha256 in done.kept.items():
            added[str(batch / name)] = sha256
            known[sha256] = str(batch / name)
        lines += done.lines
        points = points or done.points
        _let_go(intake, done.kept, params.watch.labelled, refuse)
    if not added:
        rmtree(NEXT / "version", ignore_errors=True)
        return
    files = _continue(base, NEXT / "version", with_table=len(lines) == before) | added
    if len(lines) > before:
        files[folder.TABLE] = _write_lines(lines, points, NEXT / "version" / folder.TABLE)
    journal.version, journal.added = number, len(added)
    journal.base, journal.archive = base.name, f"{VERSIONS.name}/{number:04d}"
    journal.sha256 = folder_sum(files)
    record = {
        "version": number,
        "time": _now(),
        "archive": journal.archive,
        "base": base.name,
        "sha256": journal.sha256,
        "quarantined": len(journal.refused),
        "added": [{"file": name, "sha256": sha256} for name, sha256 in sorted(added.items())],
        "files": dict(sorted(files.items())),
    }
    (NEXT / "record.json").write_text(json.dumps(record, indent=1) + "\n")


class Sorted(NamedTuple):
    """What became of an intake.

    Attributes:
        kept: SHA-256 of the pictures that are good, by name.
        lines: rows of the table for these, by column; `image` is the name in the version.
        points: how many landmarks they have, 0 without a table.
        faults: names and reasons; a name comes once for each bad row of its picture.
        table: the table's name, "" without one.
        header, bad: its header, and its bad rows as they were.
    """

    kept: dict[str, str]
    lines: list[dict[str, str]]
    points: int
    faults: list[tuple[str, str]]
    table: str
    header: list[str]
    bad: list[Sequence[str]]


def _sort(
    intake: Intake, batch: PurePosixPath, known: Mapping[str, str], points: int, params: Params
) -> Sorted:
    """Check every picture and row of an intake; good pictures are written into the version.

    Raises:
        GrimaceError: the table is unusable, or has another number of points than the data.
    """
    table = folder.find_table(intake.archive)
    size = len(table.coordinates) // 2 if table else 0
    if size and points and size != points:
        raise GrimaceError(f"its table has {size} points, that of the data has {points}")
    header = list(table.columns) if table else []
    done = Sorted({}, [], size, [*intake.wrong.items()], table.name if table else "", header, [])
    verdicts: dict[str, str] = {}
    mine: dict[str, str] = {}
    std = _blank_below(params)
    rows = tqdm(folder.rows(intake.archive), "check", unit=" pictures", leave=False, delay=3)
    try:
        for row in rows:
            reason = row.example.defect
            if not reason and row.name not in verdicts:
                sha256 = hashlib.sha256(row.example.image).hexdigest()
                verdicts[row.name] = _fault(row.example.image, sha256, known, mine, std)
                if not verdicts[row.name]:
                    done.kept[row.name] = sha256
                    mine[sha256] = row.name
                    target = NEXT / "version" / batch / row.name
                    _write(target, row.example.image)
            reason = reason or verdicts[row.name]
            if reason:
                done.faults.append((row.name, reason))
                if row.cells:
                    done.bad.append(row.cells)
            elif table and row.cells:
                line = {name: row.cells[place] for name, place in table.columns.items()}
                line["image"] = str(batch / row.name)
                done.lines.append(line)
    except GrimaceError:
        for name in done.kept:
            (NEXT / "version" / batch / name).unlink()
        raise
    return done


def _fault(
    image: bytes, sha256: str, known: Mapping[str, str], mine: Mapping[str, str], std: float
) -> str:
    """Say what is wrong with a picture, "" where nothing is."""
    if sha256 in known:
        return f"the data have the same picture already, {known[sha256]}"
    if sha256 in mine:
        return f"the same picture as {mine[sha256]}, which landed with it"
    try:
        rgb = decode(image, 3)
    except UnreadableImageError as error:
        return f"unreadable: {error}"
    varied = float(cv2.meanStdDev(rgb)[1].max())
    return f"blank: grey levels vary by {varied:.2f}" if varied < std else ""


def _refuse_whole(intake: Intake, place: Path, refuse: Refuse, reason: str) -> None:
    if intake.packed:
        refuse(intake.packed, intake.packed.path.relative_to(place).as_posix(), reason)
        return
    for name, file in intake.files.items():
        refuse(file, name, reason)


def _quarantine_lines(done: Sorted, refuse: Refuse) -> None:
    """Put the bad rows of a table beside their pictures in the quarantine."""
    if not done.bad:
        return
    drafts = NEXT / "tables"
    drafts.mkdir(parents=True, exist_ok=True)
    draft = drafts / f"{len([*drafts.iterdir()])}.csv"
    with draft.open("w", newline="") as file:
        csv.writer(file).writerows([done.header, *done.bad])
    refuse.journal.moves.append(_move_of(draft, refuse.place / done.table))


def _let_go(intake: Intake, kept: Iterable[str], place: Path, refuse: Refuse) -> None:
    """Have landed files removed of which all was taken over or refused by itself."""
    if intake.packed and intake.wrong:
        name = intake.packed.path.relative_to(place).as_posix()
        refuse(intake.packed, name, f"{len(intake.wrong)} of its members cannot be unpacked")
    elif intake.packed:
        refuse.journal.removals.append(intake.packed)
    else:
        tables = [name for name in intake.files if PurePosixPath(name).name == folder.TABLE]
        files = [intake.files[name] for name in (*kept, *tables)]
        refuse.journal.removals += [file for file in files if isinstance(file, Landed)]


def _collect_unlabelled(
    landed: Mapping[str, Landed], params: Params, journal: Journal
) -> list[str]:
    """Take pictures without labels once there are enough; bad files go to the quarantine at once.

    Returns:
        What has to wait, and why.
    """
    minimum, std = params.watch.drift.minimum, _blank_below(params)
    refuse = Refuse(journal, params.watch, "unlabelled")
    good: list[Move] = []
    bad: list[tuple[Landed | Path | None, str, str]] = []  # members of archives
    packed: list[Intake] = []
    mine: dict[str, str] = {}
    for intake in _intakes(params.watch.unlabelled, landed, params.watch, refuse):
        before, wrong = len(good), [(None, name, why) for name, why in intake.wrong.items()]
        faults: list[tuple[Landed | Path | None, str, str]] = [*wrong]
        names = tqdm(intake.archive.names(), "check", unit=" pictures", leave=False, delay=3)
        for name in names:
            file = intake.files[name]
            image, reason = b"", "not a picture"
            if folder.is_picture(name):  # asked first: a film may be larger than the memory
                image, reason = intake.archive.read(name)
            sha256 = hashlib.sha256(image).hexdigest()
            reason = reason or _fault(image, sha256, {}, mine, std)
            if not reason:
                mine[sha256] = name
                good.append(_move_of(file, UNLABELLED / journal.batch / name))
            elif intake.packed:
                faults.append((file, name, reason))
            else:
                refuse(file, name, reason)
        if intake.packed and len(good) == before:  # nothing to wait for
            for member, name, reason in faults:
                refuse(member, name, reason)
            _let_go(intake, (), params.watch.unlabelled, refuse)
        elif intake.packed:
            packed.append(intake)
            bad += faults
    if len(good) < minimum and (good or packed):
        return [f"{len(good):,} of {minimum:,} pictures without labels that a measurement takes"]
    for member, name, reason in bad:
        refuse(member, name, reason)
    for intake in packed:
        _let_go(intake, (), params.watch.unlabelled, refuse)
    journal.moves += good
    journal.unlabelled = len(good)
    return []


def _blank_below(params: Params) -> float:
    """Grey levels that vary by less are blank; 0 where `filter` would keep such pictures too."""
    check = params.filter.checks_of(OWN).blank
    return check.std if check.action == "drop" else 0.0


# The version


_WORDS = {"image", "person", "split", "emotion"}


def _read_base(params: Params) -> Base:
    """Read what params.yaml names for the dataset; nothing where there is none yet.

    Raises:
        GrimaceError: it is a version that is missing or was changed.
    """
    name = params.download.folder.archive
    found = [place / name for place in places() if (place / name).exists()]
    if not found and name.startswith(f"{VERSIONS.name}/"):
        raise GrimaceError(
            f"{ARCHIVES / name} is missing, which params.yaml names as download.folder.archive; "
            "bring it back, or name another version there"
        )
    if not found:
        return Base(name, {}, None)
    archive = open_archive(found[0])
    record = found[0].with_name(f"{found[0].name}.json")
    if found[0].parent.name == VERSIONS.name and record.exists():
        files = json.loads(record.read_text())["files"]
        if sorted(files) != archive.names():
            raise GrimaceError(
                f"{found[0]} does not hold the files that {record.name} lists; versions are not "
                "to be changed: bring them back, or name another version in params.yaml"
            )
        return Base(name, files, archive)
    names = tqdm(archive.names(), "checksum", unit=" files", leave=False, delay=3)
    files = {member: hashlib.sha256(archive.read(member)[0]).hexdigest() for member in names}
    return Base(name, files, archive)


def _base_lines(base: Base) -> list[dict[str, str]]:
    """Read the rows of the base's table, by column, with pictures as named from its root.

    Rows without the right number of cells name nothing, so they are left out.
    """
    table = folder.find_table(base.archive) if base.archive else None
    if table is None or base.archive is None:
        return []
    rows = base.archive.read_csv(table.name)
    next(rows)
    return [
        {name: cells[place] for name, place in table.columns.items()}
        | {"image": folder.member_of(table, cells)}
        for cells in rows
        if len(cells) == table.width
    ]


def _continue(base: Base, version: Path, *, with_table: bool) -> dict[str, str]:
    """Put the files of the base into a new version: links to an earlier one, else copies."""
    if base.archive is None:
        return {}
    files = {
        name: sha256
        for name, sha256 in base.files.items()
        if with_table or PurePosixPath(name).name != folder.TABLE
    }
    ours = base.archive.path.parent.name == VERSIONS.name
    for name in tqdm(files, "continue", unit=" files", leave=False, delay=3):
        target = version / name
        if not ours:
            _write(target, base.archive.read(name)[0])
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(base.archive.path / name, target)
        except OSError:  # a file system without links
            copyfile(base.archive.path / name, target)
            target.chmod(0o444)
    return files


def _write_lines(lines: Sequence[Mapping[str, str]], points: int, path: Path) -> str:
    """Write the table of a version; return its SHA-256."""
    said = set().union(*lines)
    columns = ["image", *(word for word in ("person", "split", "emotion") if word in said)]
    columns += [f"{axis}{point}" for point in range(points) for axis in "xy"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(lines)
    path.chmod(0o444)
    return _sha256(path)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o444)


def _once_ready(path: Path) -> Path:
    """Where a path in `.next` will be when that is `.ready`."""
    return READY / path.relative_to(NEXT)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError:  # that is what is wrong with it
        return ""


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


if __name__ == "__main__":
    run(main)
