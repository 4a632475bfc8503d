"""Read a dataset's archive in place, whether it is a zip file, the unpacked folder or one CSV.

What comes from strangers is unpacked instead, by `unpack`, which trusts nothing that it says.
"""

import csv
import errno
import html
import io
import lzma
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple
from zipfile import BadZipFile, ZipFile

from pipelines.cli import GrimaceError

# What the zip reader raises on a member that is damaged, encrypted or packed by another method.
# ValueError: a name that is not in the encoding that it is said to be in.
_UNREADABLE = (
    BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)

_OTHER_KINDS = {
    b"\x1f\x8b": "a gzip file",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
}


class Archive:
    """The files of a dataset, by their names inside the archive.

    Attributes:
        path: the zip file, folder or CSV.
    """

    def __init__(self, path: Path, names: list[str], opener: Callable[[str], IO[bytes]]):
        self.path = path
        self._names = names
        self._open = opener

    def names(self) -> list[str]:
        """Names of all files, folders joined by "/", sorted; hidden and resource files left out."""
        return self._names

    def read(self, name: str) -> tuple[bytes, str]:
        """Read one file.

        Returns:
            Its bytes and "", or b"" and what is wrong with it: one bad member does not make the
            others worthless, so it is for the caller to quarantine that row.
        """
        try:
            with self._open(name) as file:
                return file.read(), ""
        except _UNREADABLE as error:
            return b"", f"damaged in the archive: {_reason(error)}"

    def open(self, name: str) -> IO[bytes]:
        """Open one file for reading bytes; its damage shows while it is read."""
        return self._open(name)

    def open_text(self, name: str) -> IO[str]:
        """Open one file as UTF-8 text; bytes that are not become U+FFFD, a byte-order mark goes."""
        return io.TextIOWrapper(self._open(name), "utf-8-sig", errors="replace", newline="")

    def read_csv(self, name: str) -> Iterator[list[str]]:
        """Stream the rows of a CSV file, blank lines left out.

        Raises:
            GrimaceError: the file is damaged: what follows the damage cannot be found again.
        """
        rows = 0
        try:
            with self.open_text(name) as file:
                for cells in csv.reader(file):
                    rows += 1
                    if cells:
                        yield cells
        except (csv.Error, *_UNREADABLE) as error:
            raise GrimaceError(
                f"{self.path}: {name} is damaged after row {rows} ({_reason(error)}); "
                "get the archive again"
            ) from None

    def layout(self) -> str:
        """Describe the content by folder and file type: "train/angry/*.jpg (3995), …"."""
        kinds = Counter(
            str(path.parent / f"*{path.suffix}") for path in map(PurePosixPath, self._names)
        )
        shown = [f"{kind} ({count})" for kind, count in kinds.most_common(4)]
        return ", ".join(shown + ["…"] * (len(kinds) > 4))


def open_archive(path: Path) -> Archive:
    """Open a zip file, a folder or a CSV file for reading.

    Raises:
        GrimaceError: it is missing, empty, cut short, a web page in place of data, or of another
            kind; or two of its files have one name.
    """
    if not path.exists():
        raise GrimaceError(f"{path} is missing; check the name, or get the archive again")
    archive = _open_folder(path) if path.is_dir() else _open_file(path)
    if not archive.names():
        raise GrimaceError(f"{path} holds no files; get the archive again")
    return archive


def open_inner(archive: Archive, name: str) -> Archive:
    """Open a zip file that lies in another archive, in place.

    Raises:
        GrimaceError: it is damaged or no zip file; or two of its files have one name.
    """
    path = archive.path / name
    try:
        zipped = ZipFile(archive.open(name))
    except _UNREADABLE as error:
        raise GrimaceError(
            f"{path} is no whole zip file ({_reason(error)}); get {archive.path} again"
        ) from None
    return _of_zip(path, zipped)


class Member(NamedTuple):
    """A file in an archive that is being unpacked.

    Attributes:
        name: as the archive has it, folders joined by "/".
        opened: opens it, or says in its error what is wrong.
    """

    name: str
    opened: Callable[[], IO[bytes]]


def unpack(path: Path, folder: Path, most_bytes: int, most_files: int) -> dict[str, str]:
    """Unpack a zip or tar file (plain, or packed by gzip, bzip2 or xz) into a folder.

    What is written is counted as it comes, for an archive's own figures may lie. Hidden files and
    what operating systems leave behind are written too; `open_archive` passes them over.

    Args:
        path: the archive.
        folder: is made, and has to be empty.
        most_bytes: that all members together may have, unpacked.
        most_files: that it may hold.

    Returns:
        By name, what is wrong with the members that could not be unpacked.

    Raises:
        GrimaceError: it is no such archive or ends early, a member's name leads out of the folder,
            or it holds more than it may. What was written by then is for the caller to remove.
    """
    folder.mkdir(parents=True, exist_ok=True)
    members = _tar_members(path) if _is_tar(path) else _zip_members(path)
    wrong: dict[str, str] = {}
    for number, member in enumerate(members, 1):
        inside = PurePosixPath(member.name)
        if inside.is_absolute() or ".." in inside.parts or re.match("[A-Za-z]:", member.name):
            raise GrimaceError(
                f"{path} has a member {member.name!r}, which would be written outside of its "
                "folder; do not trust whoever packed it"
            )
        if number > most_files:
            raise GrimaceError(f"{path} holds more than {most_files:,} files; split it up")
        target = folder / inside
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with member.opened() as source, target.open("xb") as out:
                while block := source.read(1 << 20):
                    most_bytes -= len(block)
                    if most_bytes < 0:
                        break
                    out.write(block)
        except (FileExistsError, NotADirectoryError):
            wrong[member.name] = "the archive has something else of this name"
        except (tarfile.TarError, lzma.LZMAError, *_UNREADABLE) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            wrong[member.name] = f"cannot be unpacked: {_reason(error)}"
            with suppress(OSError):  # a name that is too long cannot be removed either
                target.unlink()
        if most_bytes < 0:
            raise GrimaceError(
                f"{path} holds more than it may when unpacked (a zip bomb, or simply large); see "
                "`watch.archive` in params.yaml"
            )
    return wrong


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError):
        return True  # packed, and cut short before the first member; what opens it says so


def _zip_members(path: Path) -> Iterator[Member]:
    _open_file(path)  # says what it is instead, where it is no zip file
    with ZipFile(path) as zipped:
        for info in zipped.infolist():
            if not info.is_dir():
                name = info.filename.replace("\\", "/")
                yield Member(name, partial(zipped.open, info))


def _tar_members(path: Path) -> Iterator[Member]:
    try:
        with tarfile.open(path) as packed:
            for info in packed:
                if not info.isdir():
                    yield Member(readable(info.name), partial(_open_tarred, packed, info))
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise GrimaceError(
            f"{path} ends early or is damaged ({type(error).__name__}); get it again"
        ) from None


def readable(name: str) -> str:
    """Return a name as text: bytes that are no UTF-8 are taken for Latin-1."""
    try:
        name.encode()
    except UnicodeEncodeError:  # the system's way to keep such bytes in a str
        return os.fsencode(name).decode("latin-1")
    return name


def _open_tarred(packed: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = packed.extractfile(info) if info.isreg() else None
    if file is None:  # a link could point anywhere
        raise OSError(errno.EINVAL, "a link or device, not a file")
    return file


def web_page_notice(head: bytes) -> str:
    """Say what a web page in place of data announces itself as.

    Args:
        head: the first bytes of a file or of a download.

    Returns:
        The page's title, "untitled" where it has none, or "" where this is no web page.
    """
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if not re.match(r"<(!doctype\s+html|html|head|body|!--|\?xml)", text, re.IGNORECASE):
        return ""
    # Storage services answer with XML, whose <Message> says what a page's <title> does.
    title = re.search(r"<(title|message)\b[^>]*>(.*?)</\1>", text, re.IGNORECASE | re.DOTALL)
    words = html.unescape(title[2]).split() if title else []
    return " ".join(words)[:120] or "untitled"


def _open_folder(path: Path) -> Archive:
    found = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    return Archive(path, _shown(found), lambda name: (path / name).open("rb"))


def _open_file(path: Path) -> Archive:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(65536)
    if not head.strip(b"\0"):
        nothing = "empty" if size == 0 else f"{size} bytes of nothing but zeros at its start"
        raise GrimaceError(f"{path} is {nothing}; delete it and get it again")
    if notice := web_page_notice(head):
        raise GrimaceError(
            f"{path} is a web page ({notice!r}), not data: a log-in, a quota or an error stood in "
            "the way; delete it and get the archive again in a browser"
        )
    if head.startswith(b"PK"):
        return _open_zip(path, size)
    for magic, kind in _OTHER_KINDS.items():
        if head.startswith(magic):
            raise GrimaceError(
                f"{path} is {kind}, which is not read here; unpack it and name the folder instead"
            )
    if path.suffix.lower() != ".csv" or b"\0" in head:
        start = head[:60].decode("ascii", "replace").split("\n", 1)[0]
        raise GrimaceError(
            f"{path} is neither a zip file nor a CSV (it starts with {start!r}); "
            "delete it and get it again"
        )
    return Archive(path, [path.name], lambda _: path.open("rb"))


def _open_zip(path: Path, size: int) -> Archive:
    try:
        zipped = ZipFile(path)
    except (BadZipFile, OSError, NotImplementedError, ValueError) as error:
        # The list of members is a zip's last part, so a file that was cut short has none.
        cut = "not a zip file" in str(error)
        problem = f"ends early, after {size:,} bytes" if cut else "has a damaged list of files"
        raise GrimaceError(f"{path} {problem}; delete it and download it again") from None
    return _of_zip(path, zipped)


def _of_zip(path: Path, zipped: ZipFile) -> Archive:
    # Some packers write "./train/1.jpg", some of Windows "train\\1.jpg".
    named = ((member.filename.replace("\\", "/"), member) for member in zipped.infolist())
    found = [(str(PurePosixPath(name)), member) for name, member in named if name[-1:] != "/"]
    files, count = dict(found), Counter(name for name, _ in found)
    names = _shown([*files])
    # One would hide the other, and which of them a table's row or a label means cannot be told.
    if twice := [name for name in names if count[name] > 1]:
        more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise GrimaceError(
            f"{path} has several files of one name ({twice[0]}{more}); unpack it, see to it that "
            "each has a name of its own, and name the folder instead"
        )
    return Archive(path, names, lambda name: zipped.open(files[name]))


def _shown(names: list[str]) -> list[str]:
    """Sort, without what operating systems leave behind."""
    return sorted(
        name
        for name in set(names)
        if not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    )


def _reason(error: Exception) -> str:
    if "CRC" in str(error):
        return "bad CRC-32"
    if isinstance(error, OSError):
        return error.strerror or "unreadable"
    if isinstance(error, RuntimeError) and "encrypted" in str(error):
        return "encrypted"
    return f"unreadable ({type(error).__name__})"
