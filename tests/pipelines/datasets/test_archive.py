import struct
import zipfile
from pathlib import Path

import pytest

from pipelines.cli import GrimaceError
from pipelines.datasets.archive import open_archive, open_inner, web_page_notice


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return path


def flip_a_byte_of(path: Path, content: bytes) -> None:
    raw = path.read_bytes()
    at = raw.index(content)
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 255]) + raw[at + 1 :])


def test_zip_and_folder_read_alike(tmp_path: Path) -> None:
    members = {"top/b.txt": b"bee", "top/a/c.txt": b"sea", "top/.hidden": b"", "__MACOSX/x": b""}
    zipped = open_archive(make_zip(tmp_path / "data.zip", members))
    folder = tmp_path / "data"
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    unpacked = open_archive(folder)
    assert zipped.names() == unpacked.names() == ["top/a/c.txt", "top/b.txt"]
    for archive in (zipped, unpacked):
        assert archive.read("top/b.txt") == (b"bee", "")


def test_zips_of_other_packers_name_their_files_alike(tmp_path: Path) -> None:
    members = {"./": b"", "./a/b.txt": b"bee", "a\\c.txt": b"sea", "empty\\": b"", "./.hidden": b""}
    archive = open_archive(make_zip(tmp_path / "data.zip", members))
    assert archive.names() == ["a/b.txt", "a/c.txt"]
    assert [archive.read(name) for name in archive.names()] == [(b"bee", ""), (b"sea", "")]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["sad/1.jpg", "./sad/1.jpg", "sad\\1.jpg"])
def test_no_file_hides_another_of_its_name(tmp_path: Path, second: str) -> None:
    path = make_zip(tmp_path / "data.zip", {"sad/1.jpg": b"one", "sad/2.jpg": b"two"})
    with zipfile.ZipFile(path, "a") as zipped:
        zipped.writestr(second, b"three")
    with pytest.raises(GrimaceError, match=r"several files of one name \(sad/1\.jpg\); unpack"):
        open_archive(path)
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as outer:
        outer.write(path, "inner.zip")
    with pytest.raises(GrimaceError, match=r"inner\.zip has several files of one name"):
        open_inner(open_archive(tmp_path / "outer.zip"), "inner.zip")


def test_hidden_files_may_share_a_name(tmp_path: Path) -> None:
    members = {"a.txt": b"a", ".hidden": b"", "./.hidden": b""}
    assert open_archive(make_zip(tmp_path / "data.zip", members)).names() == ["a.txt"]


def test_single_csv_is_an_archive_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xef\xbb\xbfname,value\r\na,1\r\n\r\nb,\xff\r\n")
    archive = open_archive(path)
    assert archive.names() == ["table.csv"]
    rows = list(archive.read_csv("table.csv"))
    assert rows == [["name", "value"], ["a", "1"], ["b", "\ufffd"]]


def test_damaged_member_leaves_the_others_readable(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "data.zip", {"a": b"first member", "b": b"second member"})
    flip_a_byte_of(path, b"first member")
    archive = open_archive(path)
    assert archive.read("a") == (b"", "damaged in the archive: bad CRC-32")
    assert archive.read("b") == (b"second member", "")


def test_encrypted_member_is_named_so(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "data.zip", {"a": b"secret"})
    raw = bytearray(path.read_bytes())
    raw[6] |= 1  # the local header's and
    directory = raw.index(b"PK\x01\x02")
    raw[directory + 8] |= 1  # the directory's flag for encryption
    path.write_bytes(raw)
    assert open_archive(path).read("a") == (b"", "damaged in the archive: encrypted")


def test_damaged_csv_member_says_where(tmp_path: Path) -> None:
    text = b"".join(b"row %d,x\n" % number for number in range(2000))
    path = make_zip(tmp_path / "data.zip", {"table.csv": text})
    flip_a_byte_of(path, b"row 1999")
    with pytest.raises(GrimaceError, match=r"table\.csv is damaged .*bad CRC-32.*get the archive"):
        list(open_archive(path).read_csv("table.csv"))


def test_truncated_zip_says_how_much_came(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "data.zip", {"a": b"x" * 5000})
    path.write_bytes(path.read_bytes()[:4321])
    with pytest.raises(GrimaceError, match=r"data\.zip ends early, after 4,321 bytes.*again"):
        open_archive(path)


def test_damaged_list_of_files_is_not_taken_for_a_short_file(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "data.zip", {"a": b"x" * 5000})
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x07"))
    with pytest.raises(GrimaceError, match=r"data\.zip has a damaged list of files.*again"):
        open_archive(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty; delete it"),
        (b"\0" * 100, r"nothing but zeros"),
        (
            b"<!DOCTYPE html><html><head><title>Google Drive -\n Quota &amp; exceeded</title>",
            r"web page \('Google Drive - Quota & exceeded'\)",
        ),
        (b"\n <HTML><body>no title", r"web page \('untitled'\)"),
        (b"<?xml version='1.0'?><Error><Message>Denied</Message>", r"web page \('Denied'\)"),
        (b'{"code": 403, "message": "Permission denied"}', r"neither a zip file nor a CSV"),
        (b"\x1f\x8b\x08rest", r"a gzip file.*unpack it"),
        (b"Too many users have viewed this file", r"neither a zip file nor a CSV.*Too many users"),
        (struct.pack("<IQ", 7, 1 << 40), r"neither a zip file nor a CSV"),
        (b"PK\x05\x06" + bytes(18), r"holds no files"),
    ],
)
def test_what_is_no_archive_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.zip"
    path.write_bytes(content)
    with pytest.raises(GrimaceError, match=message) as raised:
        open_archive(path)
    assert str(path) in str(raised.value)


def test_missing_archive_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(GrimaceError, match=r"nowhere\.zip is missing"):
        open_archive(tmp_path / "nowhere.zip")
    with pytest.raises(GrimaceError, match="holds no files"):
        open_archive(tmp_path)


def test_web_page_notice_leaves_data_alone() -> None:
    assert web_page_notice(b"PK\x03\x04<html>") == ""
    assert web_page_notice(b"emotion,pixels,Usage\n") == ""


def test_layout_counts_by_folder_and_type(tmp_path: Path) -> None:
    members = {"train/a.jpg": b"", "train/b.jpg": b"", "x.csv": b""}
    layout = open_archive(make_zip(tmp_path / "data.zip", members)).layout()
    assert layout == "train/*.jpg (2), *.csv (1)"
