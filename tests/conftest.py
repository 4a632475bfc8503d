"""A file server on loopback, and a place where nothing of the user's is found."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from xdist.scheduler import LoadFileScheduling

# Prefect is imported before anything else: importing it closes the log handlers there are, and
# of those that came before, absl's holds a stream of pytest's that pytest still needs.
import flows.retrain  # noqa: F401  not Prefect itself: sets what it reads from the environment

if TYPE_CHECKING:
    from pipelines.registry import Registry

ROOT = Path(__file__).parents[1]
# Or each of the many processes that tests start would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# What takes minutes goes first, so that no process is left with it when the other has finished.
LONGEST = (
    "tests/test_graph.py",
    "tests/flows",
    "tests/pipelines/test_cluster.py",
    "tests/pipelines/test_compare.py",
    "tests/pipelines/test_fit.py",
    "tests/web/test_page.py",
    "tests/benchmarks/test_zoo.py",
    "tests/benchmarks/test_scores.py",
)
# Files that a single process is given, because they share what is costly to make; and those of
# `flows`, which mostly wait and leave the cores to the other process.
TOGETHER = {
    f"tests/pipelines/test_{name}.py": "world"
    for name in ("compare", "evaluate", "export", "register", "report", "select", "verify")
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; within each, tests stay as they are."""
    items.sort(key=lambda item: _place(item.nodeid))


def _place(test: str) -> int:
    return next((i for i, start in enumerate(LONGEST) if test.startswith(start)), len(LONGEST))


class Together(LoadFileScheduling):
    """Hands out a file at a time, and some files together."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "flows" if file.startswith("tests/flows/") else TOGETHER.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """Replace what `--dist loadfile` does, as pyproject.toml has it."""
    return Together(config, log) if config.getoption("dist") == "loadfile" else None


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


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracking store without runs; making one takes MLflow seconds."""
    import mlflow

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def searchable(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in with shards of 40 + 16 pictures, easily told apart, and ranges.

    The job trains 8 epochs at a learning rate that is far too low, a trial 4.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    shutil.copy(empty_store, "mlflow.db")
    values["tracking"]["uri"] = f"sqlite:///{tmp_path}/mlflow.db"  # MLflow remembers stores
    job = {"widths": [4], "batch": 8, "learning_rate": 1e-5, "precision": "float32"}
    values["train"]["jobs"]["emotion-plain"] |= {**job, "epochs": 8, "by_dataset": {}}
    values["sweep"] |= {"seed": 1, "epochs": 0.5, "startup": 2, "warm_up": 0.25}
    values["sweep"]["jobs"] = {
        "emotion-plain": {
            "learning_rate": {"low": 1e-6, "high": 0.3, "log": True},
            "widths": {"choices": [[4], [8]]},
            "batch": {"low": 8, "high": 16, "step": 4},
        }
    }
    Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    shards, rng = Path("data/augment/emotion"), np.random.default_rng(1)
    for side, number in (("train", 40), ("val", 16)):
        (shards / side).mkdir(parents=True)
        emotions = np.where(np.arange(number) % 2, 3, 5)
        noise = rng.integers(0, 100, (number, 16, 16, 1))
        images = noise + 100 * (emotions == 3)[:, None, None, None]
        np.save(shards / side / "ids.npy", np.arange(number).astype(str))
        np.save(shards / side / "emotions.npy", emotions)
        np.save(shards / side / "images-00.npy", images.astype(np.uint8))
    meta = {"task": "emotion", "dataset": "synthetic", "size": 16, "channels": 1, "views": 1}
    (shards / "meta.json").write_text(json.dumps(meta | {"counts": {"train": 40, "val": 16}}))
    return tmp_path


@pytest.fixture(autouse=True, scope="module")
def own_tracking() -> Iterator[None]:
    """Let no module inherit the store of another: MLflow puts its address into the environment."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # of a fixture of the session, or the user's
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


class Shop:
    """A small repository whose emotion candidates are made in moments, by `tests/produce.py`."""

    def __init__(self, root: Path, module: ModuleType) -> None:
        self.root, self.module = root, module

    def produce(self, right: float, seed: int = 1, **changes: float) -> None:
        """Leave a candidate as the stages up to `verify` would, with DVC's record of it."""
        self.module.produce(right, seed, **{**DEFAULTS, **changes})
        note_in_dvc_lock("reports/verify", "reports/evaluate", "reports/select")

    def register(self) -> int:
        from pipelines.params import load_params
        from pipelines.register import register

        return register("emotion", load_params())

    def judge(self) -> dict[str, Any]:
        """Run the gate's own command line here; return the blessing."""
        from pipelines import gate

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["gate", "--task", "emotion"])
            gate.main()
        return json.loads(Path("reports/gate/emotion/blessing.json").read_text())

    def candidate(self, right: float, seed: int = 1, **changes: float) -> int:
        """Make, register and judge one; return its version."""
        self.produce(right, seed, **changes)
        number = self.register()
        self.judge()
        return number

    def store(self) -> "Registry":
        from pipelines.params import load_params
        from pipelines.registry import Registry

        return Registry(load_params().tracking, "emotion")

    def change_params(self, change: Callable[[dict[str, Any]], None]) -> None:
        values = yaml.safe_load(Path("params.yaml").read_text())
        change(values)
        Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def note_in_dvc_lock(*folders: str) -> None:
    """Write a dvc.lock in which `verify@emotion` has left these folders as they are."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    outs = []
    for folder in folders:
        tree = Tree()
        for file in Path(folder).rglob("*"):
            if file.is_file():
                md5 = hashlib.md5(file.read_bytes()).hexdigest()
                tree.add(file.relative_to(folder).parts, None, HashInfo("md5", md5))
        tree.digest()
        outs.append({"path": folder, "hash": "md5", "md5": tree.hash_info.value})
    lock = {"schema": "2.0", "stages": {"verify@emotion": {"cmd": "true", "outs": outs}}}
    Path("dvc.lock").write_text(yaml.safe_dump(lock))


DEFAULTS = dict.fromkeys(("int8", "validation", "fearful"))


@pytest.fixture
def noted() -> Callable[..., None]:
    return note_in_dvc_lock


@pytest.fixture(scope="session")
def furnish(empty_store: Path) -> Callable[[], Shop]:
    """Makes the current folder a `Shop`."""

    def make() -> Shop:
        root = Path.cwd()
        spec = spec_from_file_location("produce", ROOT / "tests/produce.py")
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        values = yaml.safe_load((ROOT / "params.yaml").read_text())
        shutil.copy(empty_store, "mlflow.db")
        values["tracking"]["uri"] = f"sqlite:///{root}/mlflow.db"
        values["tasks"]["emotion"] |= {"dataset": "folder", "size": 16}
        values["evaluate"]["resamples"] = 100
        values["gate"]["resamples"] = 1000
        Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        Path("dvc.yaml").write_text("stages: {}\n")
        Path("dvc.lock").write_text(
            yaml.safe_dump({"schema": "2.0", "stages": {"verify@emotion": {"cmd": "true"}}})
        )
        module.write_data()
        Path(".gitignore").write_text("/mlflow.db\n/mlartifacts\n/data\n/deploy\n/reports\n")
        git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
            subprocess.run([*git, *command], check=True)
        return Shop(root, module)

    return make


@pytest.fixture
def shop(tmp_path: Path, furnish: Callable[[], Shop], monkeypatch: pytest.MonkeyPatch) -> Shop:
    """The current folder: a Git repository with data, an empty registry and no candidate yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return furnish()
