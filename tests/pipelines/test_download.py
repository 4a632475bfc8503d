import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pipelines import datasets, download
from pipelines.cli import GrimaceError
from pipelines.datasets.archive import open_archive
from pipelines.datasets.builder import read
from pipelines.datasets.catalogue import builder_class
from pipelines.params import ArchiveSource

PAGE = "https://example.org/dataset"
PARAMS = Path(__file__).parents[2] / "params.yaml"

pytestmark = pytest.mark.usefixtures("elsewhere")


def make_archive(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as zipped:
        for name in ("train/happy/Training_1", "train/hapy/Training_2", "test/sad/PublicTest_3"):
            zipped.writestr(f"{name}.jpg", name.encode())
    return path


def source(**changes: object) -> ArchiveSource:
    fields = {"archive": "fer2013.zip", "url": None, "page": PAGE, "sha256": ()}
    return ArchiveSource.model_validate(fields | {"require_known": False} | changes)


def list_in_catalogue(monkeypatch: pytest.MonkeyPatch, name: str, url: str, checksum: str) -> None:
    """Have the catalogue's own class name another address and sum."""
    infos = {url: SimpleNamespace(checksum=checksum)}
    monkeypatch.setattr(builder_class(name), "url_infos", infos)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the stage on the repository's own parameters with some settings changed."""

    def run_stage(dataset: str, **changes: object) -> None:
        params = yaml.safe_load(PARAMS.read_text())
        params["download"][dataset] |= changes
        Path("params.yaml").write_text(yaml.safe_dump(params))
        monkeypatch.setattr(sys, "argv", ["download", "--dataset", dataset])
        download.main()

    return run_stage


def test_stage_stores_the_archive_and_reports_what_it_found(stage: Callable[..., None]) -> None:
    archive = make_archive(Path("data/archives/fer2013.zip"))
    stage("fer2013", page=PAGE, sha256=[sha256(archive)], require_known=True)
    stored = {row.id: row for row in read(Path("data/raw/fer2013"))}
    assert stored["Training_1"].image == b"train/happy/Training_1"
    defect = "unknown class folder 'hapy' (did you mean 'happy'?)"
    assert stored["Training_2"].defect == defect
    assert json.loads(Path("reports/download/fer2013.json").read_text()) == {
        "dataset": "fer2013",
        "source": PAGE,
        "archive": "fer2013.zip",
        "bytes": archive.stat().st_size,
        "sha256": sha256(archive),
        "known": True,
        "examples": 3,
        "people": 0,
        "official_splits": {"train": {"happy": 1}, "val": {"sad": 1}},
        "defects": {defect: 1},
    }


def test_named_folder_comes_before_data_archives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_archive(Path("data/archives/fer2013.zip"))
    monkeypatch.setenv("GRIMACE_ARCHIVES", str(tmp_path / "mine"))
    with pytest.raises(GrimaceError, match="mine, which is not a folder"):
        download.find_or_fetch("fer2013", source())
    (tmp_path / "mine").mkdir()
    found = download.find_or_fetch("fer2013", source())
    assert found.path == Path("data/archives/fer2013.zip")
    mine = make_archive(tmp_path / "mine" / "fer2013.zip")
    assert download.find_or_fetch("fer2013", source()).path == mine


def test_login_wall_is_answered_with_page_file_and_place() -> None:
    with pytest.raises(GrimaceError) as raised:
        download.find_or_fetch("fer2013", source())
    for part in (PAGE, "fer2013.zip", "data/archives/fer2013.zip", "GRIMACE_ARCHIVES"):
        assert part in str(raised.value)


def test_own_pictures_are_asked_for_rather_than_a_download() -> None:
    with pytest.raises(GrimaceError) as raised:
        download.find_or_fetch("folder", source(archive="faces", page="README.md"))
    for part in ("put your pictures at data/archives/faces", "download.folder.archive"):
        assert part in str(raised.value)
    assert "browser" not in str(raised.value)


def test_report_counts_classes_that_are_no_emotion_by_their_own_word(
    stage: Callable[..., None],
) -> None:
    for name in ("sad/1.jpg", "contempt/2.jpg"):
        path = Path("data/archives/faces", name)
        path.parent.mkdir(parents=True)
        path.write_bytes(name.encode())
    stage("folder")
    report = json.loads(Path("reports/download/folder.json").read_text())
    assert report["official_splits"] == {"none": {"contempt": 1, "sad": 1}}


def test_unknown_sum_warns_or_stops(capsys: pytest.CaptureFixture[str]) -> None:
    archive = open_archive(make_archive(Path("fer2013.zip")))
    digest, listed = sha256(archive.path), "0" * 64
    report = download.check_sum("fer2013", archive, source(sha256=[listed]))
    assert report["known"] is False
    assert report["sha256"] == digest
    warning = capsys.readouterr().err
    assert "warning:" in warning
    assert "download.fer2013.sha256" in warning
    with pytest.raises(GrimaceError) as raised:
        download.check_sum("fer2013", archive, source(sha256=[listed], require_known=True))
    for part in (digest, listed, "download.fer2013.sha256"):
        assert part in str(raised.value)


def test_where_no_sum_is_listed_none_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    archive = open_archive(make_archive(Path("mine.zip")))
    report = download.check_sum("folder", archive, source(sha256=[]))
    assert (report["known"], report["sha256"]) == (False, sha256(archive.path))
    assert "warning" not in capsys.readouterr().err
    with pytest.raises(GrimaceError):
        download.check_sum("folder", archive, source(sha256=[], require_known=True))


def test_folder_has_a_sum_of_names_and_contents(tmp_path: Path) -> None:
    def digest() -> str:
        return str(download.check_sum("x", open_archive(folder), source())["sha256"])

    folder = tmp_path / "unpacked"
    folder.mkdir()
    (folder / "a").write_bytes(b"one")
    first = digest()
    (folder / "a").write_bytes(b"two")
    second = digest()
    (folder / "a").rename(folder / "b")
    assert len({first, second, digest()}) == 3


def test_sum_of_a_folder_takes_the_bytes_of_names_that_are_no_text(tmp_path: Path) -> None:
    sums = []
    for name in (b"caf\xe9.jpg", "café.jpg".encode()):  # Latin-1, UTF-8
        folder = tmp_path / str(len(sums))
        folder.mkdir()
        (folder / os.fsdecode(name)).write_bytes(b"one")
        found = download.check_sum("x", open_archive(folder), source())["sha256"]
        line = name + b"\0" + hashlib.sha256(b"one").hexdigest().encode() + b"\n"
        assert found == hashlib.sha256(line).hexdigest()
        sums.append(found)
    assert len(set(sums)) == 2


def test_wrong_dataset_is_named_before_its_sum(stage: Callable[..., None]) -> None:
    make_archive(Path("data/archives/ytf_keypoints.zip"))
    with pytest.raises(GrimaceError, match=r"looks like fer2013") as raised:
        stage("ytf_keypoints", require_known=True)
    assert "SHA-256" not in str(raised.value)
    assert not Path("data/raw/ytf_keypoints").exists()


def test_fetches_what_no_folder_has(server) -> None:
    server.content = make_archive(Path("origin.zip")).read_bytes()
    archive = download.find_or_fetch("fer2013", source(url=server.url))
    assert archive.path.read_bytes() == server.content
    assert [path.name for path in Path("data/archives").iterdir()] == ["fer2013.zip"]


def test_fetched_file_that_is_no_archive_is_not_kept(server) -> None:
    server.content = make_archive(Path("origin.zip")).read_bytes()[:-30]
    with pytest.raises(GrimaceError, match="ends early"):
        download.find_or_fetch("fer2013", source(url=server.url))
    assert list(Path("data/archives").iterdir()) == []


def test_archive_of_the_catalogue_comes_with_its_sum_checked(
    server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content = make_archive(Path("origin.zip")).read_bytes()
    list_in_catalogue(monkeypatch, "the300w_lp", server.url, sha256(Path("origin.zip")))
    archive = download.find_or_fetch("the300w_lp", source(catalogue="the300w_lp"))
    assert archive.path.read_bytes() == server.content
    archive.path.unlink()
    list_in_catalogue(monkeypatch, "the300w_lp", server.url, "0" * 64)
    with pytest.raises(GrimaceError) as raised:
        download.find_or_fetch("the300w_lp", source(catalogue="the300w_lp"))
    for part in (sha256(Path("origin.zip")), "0" * 64, PAGE, "data/archives/fer2013.zip"):
        assert part in str(raised.value)
    assert list(Path("data/archives").iterdir()) == []


def test_drive_without_quota_is_answered_with_page_file_and_place(
    server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content = b"<html><title>Google Drive - Quota exceeded</title></html>"
    list_in_catalogue(monkeypatch, "the300w_lp", server.url, "0" * 64)
    wanted = source(archive="300W-LP.zip", catalogue="the300w_lp")
    with pytest.raises(GrimaceError) as raised:
        download.find_or_fetch("the300w_lp", wanted)
    for part in ("Quota exceeded", PAGE, "data/archives/300W-LP.zip", "GRIMACE_ARCHIVES"):
        assert part in str(raised.value)


def test_sums_in_params_are_those_of_the_catalogue() -> None:
    listed = yaml.safe_load(PARAMS.read_text())["download"]
    for name in ("the300w_lp", "aflw2k3d"):
        (info,) = builder_class(listed[name]["catalogue"]).url_infos.values()
        assert listed[name]["sha256"] == [info.checksum]
        assert listed[name]["archive"] == info.filename


def test_sources_are_tried_in_their_order(
    server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content = make_archive(Path("origin.zip")).read_bytes()
    asked = []

    def refuse(place: str, target: Path, page: str) -> None:
        asked.append((place, target, page))
        raise GrimaceError(f"{place} is closed")

    monkeypatch.setattr(download, "fetch_listed", refuse)
    monkeypatch.setattr(download, "fetch_from_kaggle", refuse)
    remotes = {"catalogue": "aflw2k3d", "kaggle": "owner/faces", "url": server.url}
    archive = download.find_or_fetch("fer2013", source(**remotes))
    path = Path("data/archives/fer2013.zip")
    assert asked == [("aflw2k3d", path, PAGE), ("owner/faces", path, PAGE)]
    assert archive.path.read_bytes() == server.content
    warnings = capsys.readouterr().err
    assert "warning: aflw2k3d is closed" in warnings
    assert "warning: owner/faces is closed" in warnings
    # What lies here comes before them all.
    asked.clear()
    download.find_or_fetch("fer2013", source(**remotes))
    assert asked == []


def test_begun_download_is_not_gone_on_with_from_another_source(
    server, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = Path("data/archives/fer2013.zip.part")

    def break_off(_: str, target: Path, __: str) -> None:
        target.parent.mkdir(parents=True)
        part.write_bytes(b"half")
        raise GrimaceError("broke off")

    monkeypatch.setattr(download, "fetch_from_kaggle", break_off)
    with pytest.raises(GrimaceError, match="broke off"):
        download.find_or_fetch("fer2013", source(kaggle="owner/faces", url=server.url))
    assert part.read_bytes() == b"half"
    assert server.requests == []


def test_help_lists_the_sources(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["download", "--help"])
    with pytest.raises(SystemExit):
        download.main()
    assert "params.yaml is missing" in capsys.readouterr().out
    Path("params.yaml").write_text(PARAMS.read_text())
    with pytest.raises(SystemExit):
        download.main()
    shown = capsys.readouterr().out
    for name in datasets.FROM_ARCHIVES:
        assert f"  {name}: " in shown
    for part in ("fer2013.zip, Kaggle msambare/fer2013", "TFDS aflw2k3d", "GRIMACE_ARCHIVES"):
        assert part in shown


def test_synthetic_needs_no_archive(stage: Callable[..., None]) -> None:
    stage("synthetic", count=70, seed=5)
    report = json.loads(Path("reports/download/synthetic.json").read_text())
    assert report["examples"] == 70
    assert "seed 5" in report["source"]
    assert len(list(read(Path("data/raw/synthetic")))) == 70
