import hashlib
import json
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from pipelines import download
from pipelines.cli import GrimaceError
from pipelines.datasets.archive import open_archive
from pipelines.datasets.builder import read
from pipelines.params import ArchiveSource

PAGE = "https://example.org/dataset"
PARAMS = Path(__file__).parents[2] / "params.yaml"


class Server(ThreadingHTTPServer):
    """Serves `content` at any path, with byte ranges; remembers what it was asked."""

    daemon_threads = True
    content = b""
    etag = '"one"'
    status = 200
    break_off_after: int | None = None
    next_version: tuple[bytes, str] | None = None  # content and ETag after a break-off

    def __init__(self) -> None:
        self.requests: list[dict[str, str]] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/fer2013.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(dict(self.headers))
        content, start = self.server.content, 0
        if self.server.status != 200:
            self.send_response(self.server.status)
        elif "Range" in self.headers and self.headers.get("If-Range", self.server.etag) == (
            self.server.etag
        ):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                content = b""
            else:
                self.send_response(206)
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("ETag", self.server.etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.break_off_after is not None:
            body = body[: self.server.break_off_after]
            self.server.break_off_after = None
            if self.server.next_version:
                self.server.content, self.server.etag = self.server.next_version
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in a folder of its own, and waits for no server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRIMACE_ARCHIVES", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download.time, "sleep", lambda _: None)


def make_archive(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as zipped:
        for name in ("train/happy/Training_1", "train/hapy/Training_2", "test/sad/PublicTest_3"):
            zipped.writestr(f"{name}.jpg", name.encode())
    return path


def source(**changes: object) -> ArchiveSource:
    fields = {"archive": "fer2013.zip", "url": None, "page": PAGE, "sha256": ()}
    return ArchiveSource.model_validate(fields | {"require_known": False} | changes)


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


def test_wrong_dataset_is_named_before_its_sum(stage: Callable[..., None]) -> None:
    make_archive(Path("data/archives/ytf_keypoints.zip"))
    with pytest.raises(GrimaceError, match=r"looks like fer2013") as raised:
        stage("ytf_keypoints", require_known=True)
    assert "SHA-256" not in str(raised.value)
    assert not Path("data/raw/ytf_keypoints").exists()


def test_fetches_what_no_folder_has(server: Server) -> None:
    server.content = make_archive(Path("origin.zip")).read_bytes()
    archive = download.find_or_fetch("fer2013", source(url=server.url))
    assert archive.path.read_bytes() == server.content
    assert [path.name for path in Path("data/archives").iterdir()] == ["fer2013.zip"]


def test_resumes_within_a_run_after_the_server_breaks_off(server: Server) -> None:
    server.content = bytes(range(256)) * 20_000
    server.break_off_after = 3_000_000
    download.fetch(server.url, Path("big.bin"), PAGE)
    assert Path("big.bin").read_bytes() == server.content
    first, second = server.requests
    assert "Range" not in first
    # Whole blocks of the broken transfer are kept.
    assert int(second["Range"].removeprefix("bytes=").removesuffix("-")) >= 2 << 20


def test_resumes_what_an_earlier_run_left(server: Server) -> None:
    server.content = bytes(range(256)) * 10
    Path("big.bin.part").write_bytes(server.content[:1000])
    download.fetch(server.url, Path("big.bin"), PAGE)
    assert Path("big.bin").read_bytes() == server.content
    assert [request["Range"] for request in server.requests] == ["bytes=1000-"]


def test_starts_over_when_the_file_has_changed(server: Server) -> None:
    server.content = b"old" * 1_000_000
    server.break_off_after = 2_500_000
    server.next_version = b"new" * 1_000_000, '"two"'
    download.fetch(server.url, Path("big.bin"), PAGE)
    assert server.requests[1]["If-Range"] == '"one"'
    assert Path("big.bin").read_bytes() == b"new" * 1_000_000
    assert [path.name for path in Path().iterdir()] == ["big.bin"]


def test_part_that_is_already_whole(server: Server) -> None:
    server.content = b"everything"
    Path("big.bin.part").write_bytes(b"everything")
    download.fetch(server.url, Path("big.bin"), PAGE)
    assert Path("big.bin").read_bytes() == b"everything"


def test_part_longer_than_the_file_is_thrown_away(server: Server) -> None:
    server.content = b"short"
    Path("big.bin.part").write_bytes(b"of another, longer file")
    download.fetch(server.url, Path("big.bin"), PAGE)
    assert Path("big.bin").read_bytes() == b"short"


def test_web_page_in_place_of_data(server: Server) -> None:
    server.content = b"<html><head><title>Quota exceeded</title></head></html>"
    with pytest.raises(GrimaceError) as raised:
        download.find_or_fetch("fer2013", source(url=server.url))
    assert "'Quota exceeded'" in str(raised.value)
    assert PAGE in str(raised.value)
    assert not Path("data/archives/fer2013.zip").exists()
    # Nothing of the page is taken for the archive's beginning later.
    server.content = make_archive(Path("origin.zip")).read_bytes()
    archive = download.find_or_fetch("fer2013", source(url=server.url))
    assert archive.path.read_bytes() == server.content


def test_refusal_is_not_repeated_but_an_overloaded_server_is_asked_again(server: Server) -> None:
    server.status = 403
    with pytest.raises(GrimaceError, match=f"403 Forbidden.*{PAGE}"):
        download.fetch(server.url, Path("big.bin"), PAGE)
    assert len(server.requests) == 1
    server.status = 503
    with pytest.raises(GrimaceError, match=r"503 Service Unavailable.*run the same again"):
        download.fetch(server.url, Path("big.bin"), PAGE)
    assert len(server.requests) > 2


def test_fetched_file_that_is_no_archive_is_not_kept(server: Server) -> None:
    server.content = make_archive(Path("origin.zip")).read_bytes()[:-30]
    with pytest.raises(GrimaceError, match="ends early"):
        download.find_or_fetch("fer2013", source(url=server.url))
    assert list(Path("data/archives").iterdir()) == []


def test_synthetic_needs_no_archive(stage: Callable[..., None]) -> None:
    stage("synthetic", count=70, seed=5)
    report = json.loads(Path("reports/download/synthetic.json").read_text())
    assert report["examples"] == 70
    assert "seed 5" in report["source"]
    assert len(list(read(Path("data/raw/synthetic")))) == 70
