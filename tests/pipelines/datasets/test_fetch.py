import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines.cli import GrimaceError
from pipelines.datasets.fetch import fetch

ROOT = Path(__file__).parents[3]
PAGE = "https://example.org/dataset"

pytestmark = pytest.mark.usefixtures("elsewhere")


def start_of(request: dict[str, str]) -> int:
    return int(request["Range"].removeprefix("bytes=").removesuffix("-"))


def test_resumes_within_a_run_after_the_server_breaks_off(server):
    server.content = bytes(range(256)) * 20_000
    server.break_off_after = 3_000_000
    fetch(server.url, Path("big.bin"), PAGE)
    assert Path("big.bin").read_bytes() == server.content
    first, second = server.requests
    assert "Range" not in first
    # Whole blocks of the broken transfer are kept.
    assert start_of(second) >= 2_900_000


def test_resumes_what_an_earlier_run_left(server):
    server.content = bytes(range(256)) * 10
    Path("big.bin.part").write_bytes(server.content[:1000])
    fetch(server.url, Path("big.bin"), PAGE)
    assert Path("big.bin").read_bytes() == server.content
    assert [request["Range"] for request in server.requests] == ["bytes=1000-"]


def test_resumes_after_a_kill(server):
    server.content = bytes(range(256)) * 20_000
    server.stall_after = 3_000_000
    imports = "from pathlib import Path; from pipelines.datasets.fetch import fetch"
    call = f"fetch({server.url!r}, Path('big.bin'), {PAGE!r})"
    command = [sys.executable, "-c", f"{imports}; {call}"]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    try:
        part = Path("big.bin.part")
        for _ in range(300):
            if part.exists() and part.stat().st_size >= 2_900_000:
                break
            threading.Event().wait(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not Path("big.bin").exists()
    fetch(server.url, Path("big.bin"), PAGE)
    assert Path("big.bin").read_bytes() == server.content
    assert start_of(server.requests[1]) >= 2_900_000
    assert server.requests[1]["If-Range"] == '"one"'
    assert [path.name for path in Path().iterdir()] == ["big.bin"]


def test_starts_over_when_the_file_has_changed(server):
    server.content = b"old" * 1_000_000
    server.break_off_after = 2_500_000
    server.next_version = b"new" * 1_000_000, '"two"'
    fetch(server.url, Path("big.bin"), PAGE)
    assert server.requests[1]["If-Range"] == '"one"'
    assert Path("big.bin").read_bytes() == b"new" * 1_000_000
    assert [path.name for path in Path().iterdir()] == ["big.bin"]


def test_part_that_is_already_whole(server):
    server.content = b"everything"
    Path("big.bin.part").write_bytes(b"everything")
    fetch(server.url, Path("big.bin"), PAGE)
    assert Path("big.bin").read_bytes() == b"everything"


def test_part_longer_than_the_file_is_thrown_away(server):
    server.content = b"short"
    Path("big.bin.part").write_bytes(b"of another, longer file")
    fetch(server.url, Path("big.bin"), PAGE)
    assert Path("big.bin").read_bytes() == b"short"


def test_web_page_in_place_of_data(server):
    server.content = b"<html><head><title>Quota exceeded</title></head></html>"
    with pytest.raises(GrimaceError) as raised:
        fetch(f"{server.url}?signature=secret", Path("archives/big.bin"), PAGE)
    for part in ("'Quota exceeded'", PAGE, "archives/big.bin", "GRIMACE_ARCHIVES"):
        assert part in str(raised.value)
    assert "secret" not in str(raised.value)
    assert list(Path("archives").iterdir()) == []
    assert len(server.requests) == 1


def test_web_page_leaves_what_was_there(server):
    content = bytes(range(256)) * 10
    Path("big.bin.part").write_bytes(content[:1000])
    server.pages["/fer2013.zip"] = b"<!doctype html><title>Quota exceeded</title>"
    with pytest.raises(GrimaceError, match="Quota exceeded"):
        fetch(server.url, Path("big.bin"), PAGE)
    assert Path("big.bin.part").read_bytes() == content[:1000]
    server.pages.clear()
    server.content = content
    fetch(server.url, Path("big.bin"), PAGE)
    assert Path("big.bin").read_bytes() == content
    assert start_of(server.requests[-1]) == 1000


DRIVE_WARNING = b"""<!DOCTYPE html><html>
<head><title>Google Drive - Virus scan warning</title></head><body>
<form id="download-form" action="/download" method="get">
<input type="submit" value="Download anyway"/><input type="hidden" name="id" value="0B7">
<input type="hidden" name="export" value="download"><input type="hidden" name="confirm" value="t">
<input type="hidden" name="uuid" value="1-2-3"></form></body></html>"""


def test_drive_that_cannot_scan_is_told_to_send_it_anyway(server):
    server.content = bytes(range(256)) * 10
    server.pages["/uc?export=download&id=0B7"] = DRIVE_WARNING
    Path("big.bin.part").write_bytes(server.content[:1000])
    fetch(f"{server.root}/uc?export=download&id=0B7", Path("big.bin"), PAGE)
    assert Path("big.bin").read_bytes() == server.content
    assert server.paths[-1] == "/download?id=0B7&export=download&confirm=t&uuid=1-2-3"
    assert start_of(server.requests[-1]) == 1000


def test_drive_that_asks_again_is_refused(server):
    server.content = DRIVE_WARNING
    with pytest.raises(GrimaceError, match=rf"Virus scan warning.*{PAGE}.*big\.bin"):
        fetch(f"{server.root}/uc?id=0B7", Path("big.bin"), PAGE)
    assert len(server.requests) == 2


def test_log_in_form_is_not_filled_in(server):
    server.content = b"""<html><title>Log in</title><form action="/login">
        <input name="user"><input name="password"></form></html>"""
    with pytest.raises(GrimaceError, match="Log in"):
        fetch(server.url, Path("big.bin"), PAGE)
    assert server.paths == ["/fer2013.zip"]


def test_refusal_is_not_repeated_but_an_overloaded_server_is_asked_again(server):
    server.status = 403
    with pytest.raises(GrimaceError, match=f"403 Forbidden.*{PAGE}"):
        fetch(server.url, Path("big.bin"), PAGE)
    assert len(server.requests) == 1
    server.status = 503
    with pytest.raises(GrimaceError, match=r"503 Service Unavailable.*run the same again"):
        fetch(server.url, Path("big.bin"), PAGE)
    assert len(server.requests) > 2
