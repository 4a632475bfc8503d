"""A file server on loopback, and a place where nothing of the user's is found."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Server(ThreadingHTTPServer):
    """Serves `content` at any path, with byte ranges; remembers what it was asked."""

    daemon_threads = True
    content = b""
    etag = '"one"'
    status = 200
    break_off_after: int | None = None
    stall_after: int | None = None  # sends so much of a reply, then nothing more
    next_version: tuple[bytes, str] | None = None  # content and ETag after a break-off

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}  # in place of the content, by path and query
        self.posted: dict[str, tuple[int, dict[str, str], bytes]] = {}  # answers, by path
        self.requests: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.bodies: list[bytes] = []
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def url(self) -> str:
        return f"{self.root}/fer2013.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.requests.append(dict(self.headers))
        self.server.paths.append(self.path)
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        status, headers, body = self.server.posted[self.path]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.requests.append(dict(self.headers))
        self.server.paths.append(self.path)
        content, start = self.server.pages.get(self.path, self.server.content), 0
        if self.server.status != 200:
            self.send_response(self.server.status)
        elif (
            "Range" in self.headers
            and self.path not in self.server.pages
            and self.headers.get("If-Range", self.server.etag) == self.server.etag
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
        # Kaggle's client, unlike `fetch`, does not read what it asks for.
        read = self.headers["Accept-Encoding"] == "identity"
        if read and self.server.break_off_after is not None:
            body = body[: self.server.break_off_after]
            self.server.break_off_after = None
            if self.server.next_version:
                self.server.content, self.server.etag = self.server.next_version
        if self.server.stall_after is not None:
            self.wfile.write(body[: self.server.stall_after])
            self.server.stall_after = None
            self.server.closing.wait()
            return
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running server; nobody waits before asking it again."""
    monkeypatch.setattr("pipelines.datasets.fetch.time.sleep", lambda _: None)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.closing.set()
        server.shutdown()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own to work in, without the user's archives and proxies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRIMACE_ARCHIVES", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path
