import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from prefect import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

ROOT = Path(__file__).parents[2]
SHEETS = "reports/augment/emotion"
DRAW = f"""
from pathlib import Path
import numpy as np
from pipelines.sheets import contact_sheet
Path({SHEETS!r}).mkdir(parents=True, exist_ok=True)
images = np.random.default_rng(0).integers(0, 255, (24, 16, 16, 1), np.uint8)
captions = [f"face {{number}}" for number in range(24)]
contact_sheet(images, captions, Path({SHEETS!r}, "views.png"), "emotion: views")
"""


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """The address of a Prefect server that all tests of flows share."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield PREFECT_API_URL.value()


@pytest.fixture(scope="session", autouse=True)
def _heeded_interrupt() -> None:
    """A shell starts background jobs deaf to Ctrl-C, and the programs under test inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Service:
    """A workspace in which `python -m flows.up` can be called as a user would."""

    root: Path
    prefect_port: int
    mlflow_port: int
    environment: dict[str, str]

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.prefect_port}/api"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def ports(self) -> list[str]:
        return [f"--prefect-port={self.prefect_port}", f"--mlflow-port={self.mlflow_port}"]

    def call(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start Python in the workspace."""
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.root,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def up(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, output and errors of `flows.up`."""
        process = self.call("-m", "flows.up", *self.ports, *arguments)
        output, errors = process.communicate(timeout=300)
        return process.returncode, output, errors

    def emit(self, event: str) -> None:
        """Send an event of the kind that `watch` sends."""
        code = (
            "from prefect.events import emit_event\n"
            f"emit_event({event!r}, {{'prefect.resource.id': 'grimace.data.landing'}})"
        )
        process = self.call("-c", code, PREFECT_API_URL=self.api)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors

    def log(self) -> str:
        """What the worker said last."""
        return (self.root / "runs/service/worker.log").read_text()[-3000:]

    def retrained(self) -> FlowRun:
        """The flow run that an event of new data has started; it has ended."""
        only = DeploymentFilter(name=DeploymentFilterName(any_=["new-data"]))
        sent, deadline = False, time.monotonic() + 150
        with (
            temporary_settings({PREFECT_API_URL: self.api}),
            get_client(sync_client=True) as client,
        ):
            while time.monotonic() < deadline:
                runs = client.read_flow_runs(deployment_filter=only)
                if runs and runs[0].state and runs[0].state.is_final():
                    return runs[0]
                if not (runs or sent):
                    self.emit("grimace.data.seen")  # nobody's business
                    self.emit("grimace.data.new")
                    sent = True
                time.sleep(0.3)
        raise AssertionError(self.log())


@pytest.fixture(scope="session")
def make_service() -> Callable[..., Service]:
    return _make_service


def _make_service(root: Path, **environment: str) -> Service:
    """Lay out a workspace with our retrain deployments; nothing runs there yet."""
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    deployed = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    deployed["deployments"] = [
        row for row in deployed["deployments"] if row["entrypoint"] == "flows.retrain.retrain"
    ]
    (root / "prefect.yaml").write_text(yaml.safe_dump(deployed, sort_keys=False))
    inherited = {k: v for k, v in os.environ.items() if "MLFLOW" not in k and "PREFECT" not in k}
    own = {
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(root / "home"),
        "PREFECT_WORKER_QUERY_SECONDS": "0.5",
    }
    return Service(root, *ports, {**inherited, **own, **environment})


@pytest.fixture(scope="session")
def service(
    tmp_path_factory: pytest.TempPathFactory, furnish: Callable[[], Any]
) -> Iterator[Service]:
    """All that `flows.up` starts, in a workspace with a champion, whose `verify` makes its heir."""
    root = tmp_path_factory.mktemp("service")
    with chdir(root):
        shop = furnish()
        shop.candidate(0.6)
        shop.store().promote(1, "Ada", "the first")
        Repo.init()
        (root / "made").write_text("--right 0.8 --seed 3")
        (root / "draw.py").write_text(DRAW)
        outs = ["deploy", "reports/verify", "reports/evaluate", "reports/select"]
        stages = {
            "augment": {"cmd": "python draw.py", "deps": ["draw.py"], "outs": [SHEETS]},
            "verify": {
                "cmd": f"python {ROOT}/tests/produce.py $(cat made)",
                "deps": ["made", SHEETS],
                "outs": outs,
            },
        }
        each = {name: {"foreach": ["emotion"], "do": do} for name, do in stages.items()}
        (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": each}))
    service = _make_service(root)
    code, _, errors = service.up()
    assert code == 0, errors
    yield service
    service.up("--stop")
