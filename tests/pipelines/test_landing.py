import csv
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from pipelines import datasets, journal, landing
from pipelines.cli import GrimaceError
from pipelines.datasets.archive import Archive, open_archive
from pipelines.download import check_sum, find_or_fetch
from pipelines.params import Params, load_params

ROOT = Path(__file__).parents[2]
LABELLED, UNLABELLED = Path("data/landing/labelled"), Path("data/landing/unlabelled")
LATER = 3600.0
HEADER = ["image", *(f"{axis}{point}" for point in range(15) for axis in "xy")]
POINTS = [str(number) for number in range(30)]


@pytest.fixture(autouse=True)
def workspace(elsewhere: Path) -> Path:
    """A folder with params.yaml alone, in which three pictures are enough for a batch."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["watch"]["archive"] = {"mib": 1, "files": 20}
    text = yaml.safe_dump(values, sort_keys=False)
    Path("params.yaml").write_text("# a comment of mine\n" + text)
    return elsewhere


def picture(seed: int, side: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def drop(name: str, content: bytes | str, place: Path = LABELLED) -> Path:
    path = place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def look(later: float = LATER) -> landing.Look:
    return landing.look(load_params(), time.time() + later)


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(members: dict[str, bytes], mode: str = "w:gz", link: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    return buffer.getvalue()


def table(*rows: list[str], header: list[str] = HEADER) -> str:
    return "\n".join(",".join(row) for row in [header, *rows]) + "\n"


def quarantined() -> dict[str, dict[str, str]]:
    """Rows of the table by the name that the file landed with."""
    path = Path("data/quarantine/quarantine.csv")
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(list(row) == ["file", "reason", "time", "sha256"] for row in rows)
    named = {row["file"].split("/", 2)[2]: row for row in rows}
    assert len(named) == len(rows)
    return named


def landed() -> list[str]:
    return sorted(str(p.relative_to(LABELLED)) for p in LABELLED.rglob("*") if p.is_file())


def version(number: int) -> Path:
    return Path(f"data/archives/folder-versions/{number:04d}")


def examples() -> list[Any]:
    """What `download` would read of the dataset as params.yaml names it."""
    params = load_params()
    archive = find_or_fetch("folder", params.download.folder)
    assert check_sum("folder", archive, params.download.folder)["known"]
    return list(datasets.examples("folder", archive))


def test_good_pictures_make_a_version_and_bad_files_are_quarantined_with_reasons() -> None:
    drop("happy/1.png", picture(1))
    drop("some/where/Sadness/2.png", picture(2))
    drop("happy/copy.png", picture(1))
    drop("happy/torn.png", picture(3)[:200])
    drop("happy/blank.png", cv2.imencode(".png", np.full((24, 24), 9, np.uint8))[1].tobytes())
    drop("hapy/4.png", picture(4))
    drop("notes.txt", "read me")
    seen = look()
    assert (seen.version, seen.added, seen.quarantined) == (1, 2, 5)
    assert landed() == []
    reasons = {name: row["reason"] for name, row in quarantined().items()}
    assert reasons.pop("happy/torn.png").startswith("unreadable: ")
    assert reasons == {
        "happy/copy.png": "the same picture as happy/1.png, which landed with it",
        "happy/blank.png": "blank: grey levels vary by 0.00",
        "hapy/4.png": "unknown class folder 'hapy' (did you mean 'happy'?)",
        "notes.txt": "not a picture: known are .jpg, .jpeg, .png, .bmp, .webp, .tif, .tiff",
    }
    for row in quarantined().values():
        content = Path("data/quarantine", row["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
    record = json.loads(version(1).with_suffix(".json").read_text())
    assert [row["file"] for row in record["added"]] == [
        "batch-0001/happy/1.png",
        "batch-0001/some/where/Sadness/2.png",
    ]
    assert record["files"]["batch-0001/happy/1.png"] == hashlib.sha256(picture(1)).hexdigest()
    assert record["quarantined"] == 5
    text = Path("params.yaml").read_text()
    assert text.startswith("# a comment of mine\n")
    assert load_params().download.folder.archive == "folder-versions/0001"
    assert {row.label for row in examples()} == {"happy", "sad"}
    assert look() == landing.Look()


def test_later_versions_add_to_what_is_there_and_old_ids_stay() -> None:
    drop("faces/happy/1.png", picture(1), Path("data/archives"))
    drop("faces/sad/2.png", picture(2), Path("data/archives"))
    before = datasets.examples("folder", open_archive(Path("data/archives/faces")))
    ids = {row.id for row in before}
    drop("happy/1.png", picture(3))  # another picture of the same name
    drop("sad/old.png", picture(2))
    assert look()[:2] == (1, 1)
    first = {row.id for row in examples()}
    assert ids < first and len(first) == 3
    (row,) = quarantined().values()
    assert row["reason"] == "the data have the same picture already, sad/2.png"
    drop("happy/1.png", picture(4))
    assert look()[:2] == (2, 1)
    second = {row.id for row in examples()}
    assert first < second and len(second) == 4
    one, two = (version(number) / "batch-0001/happy/1.png" for number in (1, 2))
    assert one.samefile(two)  # takes no room
    assert not one.stat().st_mode & 0o222
    assert sorted(open_archive(version(1)).names()) == [
        "batch-0001/happy/1.png",
        "happy/1.png",
        "sad/2.png",
    ]
    assert Path("data/archives/faces/happy/1.png").read_bytes() == picture(1)


def test_an_older_version_can_be_continued() -> None:
    for number in (1, 2):
        drop(f"happy/{number}.png", picture(number))
        look()
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("folder-versions/0002", "folder-versions/0001"))
    drop("happy/3.png", picture(3))
    assert look().version == 3
    assert open_archive(version(3)).names() == ["batch-0001/happy/1.png", "batch-0003/happy/3.png"]
    (version(3) / "batch-0001/happy/1.png").unlink()
    drop("happy/4.png", picture(4))
    with pytest.raises(GrimaceError, match="versions are not to be changed"):
        look()
    assert landed() == ["happy/4.png"]


def test_what_is_still_written_waits_and_so_does_what_belongs_to_it() -> None:
    drop("happy/1.png", picture(1))
    drop("upload/1.png", picture(2))
    settle = load_params().watch.settle
    assert look(0).waiting == ("2 files have not settled yet, or cannot be looked at",)
    time.sleep(0.05)
    turning = time.time()
    time.sleep(0.05)
    drop("happy/2.png", picture(3))  # a class folder's pictures do not wait for each other
    drop("upload/landmarks.csv", table(["1.png", *POINTS]))  # but those of a table do
    old = drop("sad/moved.png", picture(4))
    os.utime(old, (1, 1))  # a copy that keeps its original's time is new here all the same
    seen = landing.look(load_params(), turning + settle)
    assert (seen.version, seen.added) == (1, 1)
    assert landed() == ["happy/2.png", "sad/moved.png", "upload/1.png", "upload/landmarks.csv"]
    assert look().added == 3
    assert landed() == [] and not quarantined()


def test_tables_are_merged_and_bad_rows_are_quarantined_as_a_table() -> None:
    drop("faces/in/landmarks.csv", table(["a.png", *POINTS]), Path("data/archives"))
    drop("faces/in/a.png", picture(1), Path("data/archives"))
    person = [HEADER[0], "person", *HEADER[1:]]
    drop(
        "set/landmarks.csv",
        table(
            ["b.png", "ann", *POINTS],
            ["c.png", "ann", "x", *POINTS[1:]],
            ["gone.png", "bob", *POINTS],
            ["short.png", "bob"],
            header=person,
        ),
    )
    for seed, name in ((2, "b.png"), (3, "c.png"), (4, "short.png")):
        drop(f"set/{name}", picture(seed))
    assert look()[:3] == (1, 1, 4)
    rows = {row.image: row for row in examples()}
    assert set(rows) == {picture(1), picture(2)}
    for row in rows.values():
        np.testing.assert_array_equal(row.landmarks, np.arange(30).reshape(15, 2))
        assert not row.defect
    assert rows[picture(2)].person == hashlib.sha256(b"ann").hexdigest()[:10]
    assert rows[picture(1)].person == ""
    reasons = {
        name: (row["reason"].split(":")[0], bool(row["sha256"]))
        for name, row in quarantined().items()
    }
    assert reasons == {
        "set/c.png": ("a coordinate is not a number", True),
        "set/gone.png": ("its image is not in the archive", False),
        "set/landmarks.csv/3": ("row has 2 cells instead of 32", False),
        "set/short.png": ("unknown class folder", True),
    }
    (kept,) = Path("data/quarantine").rglob("landmarks.csv")
    assert kept.with_name("c.png").exists()
    with kept.open(newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["image", "c.png", "gone.png", "short.png"]
    # Mended, the folder can be put back.
    drop("again/landmarks.csv", table(["c.png", *POINTS]))
    drop("again/c.png", picture(3))
    assert look()[:2] == (2, 1)
    assert len(examples()) == 3


def test_unusable_tables_refuse_all_that_came_with_them() -> None:
    drop("one/landmarks.csv", table(["a.png", *POINTS[:-2]], header=HEADER[:-2]))
    drop("one/a.png", picture(1))
    drop("two/landmarks.csv", table(["b.png", *POINTS]))
    drop("two/b.png", picture(2))
    drop("two/more/landmarks.csv", table(["b.png", *POINTS]))
    drop("happy/c.png", picture(3))
    assert look()[:3] == (1, 1, 5)
    reasons = {name: row["reason"] for name, row in quarantined().items()}
    assert "has 28 columns of coordinates" in reasons["one/a.png"]
    assert "has 2 tables" in reasons["two/b.png"]
    sixty_eight = ["image", *(f"{axis}{point}" for point in range(68) for axis in "xy")]
    drop("three/landmarks.csv", table(["d.png", *["1"] * 136], header=sixty_eight))
    drop("three/d.png", picture(4))
    drop("three/e/landmarks.csv", "")
    assert look().version == 0
    drop("four/landmarks.csv", table(["e.png", *POINTS]))
    drop("four/e.png", picture(5))
    assert look().version == 2
    drop("five/landmarks.csv", table(["d.png", *["1"] * 136], header=sixty_eight))
    drop("five/d.png", picture(6))
    assert look().version == 0
    reason = quarantined()["five/d.png"]["reason"]
    assert reason == "its table has 68 points, that of the data has 15"


@pytest.mark.parametrize("packed", ["zip", "tar", "tgz", "txz"])
def test_archives_are_unpacked_and_their_members_checked_one_by_one(packed: str) -> None:
    members = {
        "happy/1.png": picture(1),
        "set/landmarks.csv": table(["2.png", *POINTS]).encode(),
        "set/2.png": picture(2),
        "sad/torn.png": b"no picture",
        "__MACOSX/._1.png": b"junk",
    }
    modes = {"tar": "w", "tgz": "w:gz", "txz": "w:xz"}
    content = zipped(members) if packed == "zip" else tarred(members, modes[packed])
    drop(f"in/faces.{packed}", content)
    assert look()[:3] == (1, 2, 1)
    assert landed() == []
    assert [row.defect for row in examples()] == ["", ""]
    (name,) = quarantined()
    assert name == f"in/faces.{packed}!/sad/torn.png"
    assert open_archive(version(1)).names() == [
        f"batch-0001/in/faces.{packed}!/happy/1.png",
        f"batch-0001/in/faces.{packed}!/set/2.png",
        "landmarks.csv",
    ]


def test_bad_archives_are_quarantined_whole() -> None:
    good = zipped({"happy/1.png": picture(1)})
    outside = tarred({"happy/1.png": picture(1), "../../evil.png": picture(2)})
    bad = {
        "page.zip": (b"<!doctype html><title>Quota exceeded</title>", "a web page ('Quota exceed"),
        "cut.zip": (good[:-40], "ends early"),
        "cut.tar": (tarred({"a.png": picture(1, 200)}, "w")[:9000], "ends early or is damaged"),
        "bomb.zip": (zipped({"happy/1.png": bytes(2 << 20)}), "holds more than it may"),
        "bomb.tgz": (tarred({"happy/1.png": bytes(2 << 20)}), "holds more than it may"),
        "many.zip": (zipped({f"happy/{n}.png": b"x" for n in range(21)}), "more than 20 files"),
        "out.tgz": (outside, "would be written outside"),
        "root.zip": (zipped({"/etc/evil.png": picture(3)}), "would be written outside"),
        "faces.rar": (b"Rar!1234", "a RAR archive"),
        "stub.tgz": (tarred({"happy/1.png": picture(1)})[:60], "ends early or is damaged"),
        "name.zip": (
            zipped({"happy/é.png": picture(1)}).replace("é".encode(), b"\xc3\x28"),
            "has a damaged list of files",
        ),
        "empty.zip": (b"", "empty"),
    }
    for name, (content, _) in bad.items():
        drop(name, content)
    assert look()[:3] == (0, 0, len(bad))
    rows = quarantined()
    for name, (content, reason) in bad.items():
        assert reason in rows[name]["reason"]
        assert Path("data/quarantine", rows[name]["file"]).read_bytes() == content
    assert not list(Path().rglob("evil.png"))
    assert load_params().download.folder.archive == "faces"


def test_an_archive_of_which_a_part_is_damaged_is_kept_beside_what_was_taken() -> None:
    content = bytearray(zipped({"happy/1.png": picture(1), "happy/2.png": picture(2)}))
    content[content.rfind(picture(2)[100:120])] ^= 255
    drop("a.zip", bytes(content))
    drop("b.tgz", tarred({"sad/3.png": picture(3)}, link="sad/4.png"))
    assert look()[:3] == (1, 2, 4)
    reasons = {name: row["reason"] for name, row in quarantined().items()}
    assert reasons == {
        "a.zip!/happy/2.png": "cannot be unpacked: bad CRC-32",
        "a.zip": "1 of its members cannot be unpacked",
        "b.tgz!/sad/4.png": "cannot be unpacked: a link or device, not a file",
        "b.tgz": "1 of its members cannot be unpacked",
    }
    kept = Path("data/quarantine", quarantined()["a.zip"]["file"])
    assert kept.read_bytes() == bytes(content)


def test_names_that_are_no_text_or_too_long_hold_nothing_up() -> None:
    buffer = io.BytesIO()
    with tarfile.open(None, "w", buffer, format=tarfile.USTAR_FORMAT, encoding="latin-1") as old:
        info = tarfile.TarInfo("happy/José.png")
        info.size = len(picture(1))
        old.addfile(info, io.BytesIO(picture(1)))
    drop("old.tar", buffer.getvalue())
    drop("long.tar", tarred({f"happy/{'я' * 140}.png": picture(2), "sad/3.png": picture(3)}))
    raw = Path(os.fsdecode(b"sad/Ren\xe9.png"))
    drop(str(raw), picture(4))
    drop("sad/5.png", picture(5))
    seen = look()
    assert (seen.version, seen.added) == (1, 3)
    assert seen.waiting == ("1 files have not settled yet, or cannot be looked at",)
    assert landed() == ["sad/René.png"]
    reasons = {name: row["reason"] for name, row in quarantined().items()}
    assert reasons.pop("long.tar") == "1 of its members cannot be unpacked"
    (reason,) = reasons.values()
    assert reason.startswith("cannot be unpacked: ")
    assert look()[:2] == (2, 1)
    record = json.loads(version(2).with_suffix(".json").read_text())
    assert [row["file"] for row in record["added"]] == ["batch-0002/sad/René.png"]
    assert "batch-0001/old.tar!/happy/José.png" in record["files"]
    assert landed() == []


def test_a_file_that_may_not_be_moved_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    path = drop("happy/1.png", picture(1))
    unlink = Path.unlink

    def denied(self: Path, missing_ok: bool = False) -> None:
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        unlink(self, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(GrimaceError) as caught:
        patch.setattr(Path, "unlink", denied)
        look()
    said = "happy/1.png cannot be moved away (Permission denied): give whoever runs this the right"
    assert said in str(caught.value)
    assert look()[:2] == (1, 1)  # the next goes on


def test_what_holds_no_picture_without_a_label_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = Archive.read

    def noting(self: Archive, name: str) -> tuple[bytes, str]:
        assert not name.endswith("film.mp4"), "read whole, though it is no picture"
        return read(self, name)

    monkeypatch.setattr(Archive, "read", noting)
    drop("1.png", picture(1), UNLABELLED)
    drop("film.mp4", b"a long film", UNLABELLED)
    drop("none.zip", zipped({"a.txt": b"x", "torn.png": b"x"}), UNLABELLED)
    drop("some.zip", zipped({"2.png": picture(2), "b.txt": b"x"}), UNLABELLED)
    assert look().batch == ""
    assert sorted(quarantined()) == ["film.mp4", "none.zip!/a.txt", "none.zip!/torn.png"]
    left = sorted(path.name for path in UNLABELLED.rglob("*") if path.is_file())
    assert left == ["1.png", "some.zip"]


def test_pictures_without_labels_wait_until_there_are_enough() -> None:
    params = load_params()
    drift = params.watch.drift.model_copy(update={"minimum": 4})
    few = params.model_copy(update={"watch": params.watch.model_copy(update={"drift": drift})})

    def again(params: Params = few) -> landing.Look:
        return landing.look(params, time.time() + LATER)

    for seed in (1, 2):
        drop(f"day/{seed}.png", picture(seed), UNLABELLED)
    drop("torn.png", b"no picture", UNLABELLED)
    seen = again()
    assert seen.waiting == ("2 of 4 pictures without labels that a measurement takes",)
    assert (seen.batch, seen.quarantined) == ("", 1)  # what is bad need not wait
    drop("day/copy.png", picture(1), UNLABELLED)
    drop("night.zip", zipped({"3.png": picture(3), "4.png": picture(4)}), UNLABELLED)
    seen = again()
    assert seen.unlabelled == 4
    assert journal.pending_batches() == [seen.batch]
    kept = Path("data/unlabelled", seen.batch)
    assert sorted(str(path.relative_to(kept)) for path in kept.rglob("*.png")) == [
        "day/1.png" if (kept / "day/1.png").exists() else "day/copy.png",
        "day/2.png",
        "night.zip!/3.png",
        "night.zip!/4.png",
    ]
    assert not [path for path in UNLABELLED.rglob("*") if path.is_file()]
    journal.told_of_batch(seen.batch)
    assert journal.pending_batches() == []
    assert journal.pending_versions() == []


def test_one_look_at_a_time_and_no_version_under_the_feet_of_dvc() -> None:
    drop("happy/1.png", picture(1))
    with journal.alone(), pytest.raises(GrimaceError, match="another look is at work"):
        look()
    locks = Path(".dvc/tmp")
    locks.mkdir(parents=True)
    written = str(Path("reports/download/folder.json").absolute())
    by = {"pid": os.getpid(), "cmd": "dvc repro"}
    (locks / "rwlock").write_text(json.dumps({"write": {written: by}}))
    seen = look()
    assert seen.version == 0
    assert seen.waiting[0].startswith("version 1 waits: DVC is running download@folder")
    drop("happy/2.png", picture(2))
    assert look().version == 0 and landed() == ["happy/2.png"]
    assert load_params().download.folder.archive == "faces"
    (locks / "rwlock").write_text("{}")
    assert look()[:2] == (1, 1)
    assert load_params().download.folder.archive == "folder-versions/0001"
    assert look()[:2] == (2, 1)


KILLED = """
import json, os, signal, sys, time
from itertools import count
from pathlib import Path
import ruamel.yaml
from pipelines import journal, landing
from pipelines.params import load_params
sys.path.insert(0, {tests!r})
from test_landing import LABELLED, UNLABELLED, drop, picture, table, zipped, POINTS

def fill():
    drop("happy/1.png", picture(1))
    drop("happy/torn.png", b"torn")
    drop("set/landmarks.csv", table(["2.png", *POINTS], ["gone.png", *POINTS]))
    drop("set/2.png", picture(2))
    drop("in.zip", zipped({{"sad/3.png": picture(3), "sad/4.png": b"torn"}}))
    for seed in range(20, 23):
        drop(f"{{seed}}.png", picture(seed, 8), UNLABELLED)
    os.makedirs("data/archives/faces/sad")
    Path("data/archives/faces/sad/0.png").write_bytes(picture(0))

def look(kill_at):
    calls = count(1)
    def mortal(real):
        def call(*args, **kwargs):
            if next(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    if kill_at:
        for name in ("rename", "replace", "unlink", "rmdir", "link", "mkdir", "chmod", "utime"):
            setattr(os, name, mortal(getattr(os, name)))
    landing.look(asked, time.time() + 3600)

def child(work):
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

params, asked = Path("params.yaml").read_text(), load_params()
drift = asked.watch.drift.model_copy(update={{"minimum": 3}})
asked = asked.model_copy(update={{"watch": asked.watch.model_copy(update={{"drift": drift}})}})
for at in count(1, 3):
    root = Path(f"killed-{{at}}")
    root.mkdir()
    os.chdir(root)
    Path("params.yaml").write_text(params)
    fill()
    ended = child(lambda: look(at))
    assert ended in (0, signal.SIGKILL), ended
    assert child(lambda: look(0)) == 0
    os.chdir("..")
    if ended == 0:
        break
print(at)
"""  # Many moments are alike: one in three is tried.


def test_killed_at_any_moment_nothing_is_lost_or_taken_twice() -> None:
    script = KILLED.format(tests=str(Path(__file__).parent))
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENCV_FOR_THREADS_NUM": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    times = int(ended.stdout)
    assert times > 40  # so many moments were tried
    for at in range(1, times + 1, 3):
        os.chdir(f"killed-{at}")
        assert "archive: folder-versions/0001\n" in Path("params.yaml").read_text()
        found = datasets.examples("folder", open_archive(version(1)))
        assert [row.defect for row in found] == [""] * 4
        assert set(quarantined()) == {"happy/torn.png", "set/gone.png", "in.zip!/sad/4.png"}
        torn = list(Path("data/quarantine").rglob("*.png"))
        assert sorted(path.name for path in torn) == ["4.png", "torn.png"]
        assert len(list(Path("data/quarantine").rglob("landmarks.csv"))) == 1
        assert landed() == [] and not list(UNLABELLED.rglob("*.png"))
        assert len(list(Path("data/unlabelled").rglob("*.png"))) == 3
        assert [record["version"] for record in journal.pending_versions()] == [1]
        assert len(journal.pending_batches()) == 1
        versions = {path.name for path in Path("data/archives/folder-versions").iterdir()}
        assert versions == {".lock", "0001", "0001.json", "0001.pending"}
        os.chdir("..")
