"""Bring the service up on this machine: Prefect server, worker, MLflow UI, deployments.

    python -m flows.up            # a second time: says that it is up, or starts what has ended
    python -m flows.up --stop     # ends what it started, and the flows that run there

All of it listens on loopback alone and goes on in the background when this command has ended. Logs
are in runs/service/. Prefect keeps its history in prefect.db here, MLflow where `tracking.uri` of
params.yaml says; PREFECT_SERVER_DATABASE_CONNECTION_URL and MLFLOW_TRACKING_URI put them elsewhere.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console

from flows.lock import alone
from flows.retrain import SERVER_START_SECONDS, answers
from flows.supervise import is_alive
from pipelines import tracking
from pipelines.cli import GrimaceError, run
from pipelines.params import load_params

# After the imports of ours, which set what Prefect reads from the environment.
from prefect.client.orchestration import SyncPrefectClient, get_client  # isort: skip
from prefect.client.schemas.actions import WorkPoolCreate  # isort: skip
from prefect.client.schemas.filters import (  # isort: skip
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType, WorkerStatus  # isort: skip
from prefect.exceptions import ObjectAlreadyExists  # isort: skip
from prefect.settings import PREFECT_API_URL, temporary_settings  # isort: skip
from prefect.states import Crashed, State  # isort: skip

FOLDER = Path("runs/service")
POOL, QUEUE = "grimace", "workspace"  # as in prefect.yaml
# What is asked to end gets so long; flows end their stages in that time.
GRACE_SECONDS = 15
SHOWN_LINES = 10


class Part(NamedTuple):
    """A process of the service.

    Attributes:
        name: "prefect", "mlflow" or "worker"; its log is called so.
        pid: the process.
        began: tells it from a later process with the same id; see `beginning`.
        url: where it answers, "" for nowhere.
    """

    name: str
    pid: int
    began: str
    url: str


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.up",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stop", action="store_true", help="end it all")
    parser.add_argument(
        "--prefect-port", type=int, default=4200, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--mlflow-port", type=int, default=5000, metavar="N", help="default: %(default)s"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with alone("flows.up", wait=True, path=FOLDER / "lock"):
        if arguments.stop:
            stop()
        else:
            start(arguments.prefect_port, arguments.mlflow_port)


def start(prefect_port: int, mlflow_port: int) -> None:
    """Start what does not run yet, and print where everything is.

    Raises:
        GrimaceError: this is not the root of the repository, a port is taken, or something does
            not start; then what was started is ended again.
    """
    if not Path("prefect.yaml").is_file():
        raise GrimaceError(
            f"there is no prefect.yaml in {Path.cwd()}. Run this in the root of the repository."
        )
    parts = running()
    if set(parts) == set(wanted()):
        print(f"It is up already.\n{addresses(parts)}")
        return
    ports = {"prefect": prefect_port, "mlflow": mlflow_port}
    for name in wanted():
        if name in ports and name not in parts:
            refuse_if_taken(ports[name], f"--{name}-port")
    before = set(parts)
    try:
        if "prefect" not in parts:
            parts["prefect"] = launch("prefect", parts, prefect_port)
        if "mlflow" in wanted() and "mlflow" not in parts:
            parts["mlflow"] = launch("mlflow", parts, mlflow_port)  # meanwhile
        wait_for(parts["prefect"])
        if "worker" not in parts:
            if left := orphans():  # they would work beside what the new worker starts
                end_orphans(left)
            with server(parts["prefect"]) as client:
                prepare(client)
                deploy(api_of(parts["prefect"]))
                now = datetime.now(UTC)
                parts["worker"] = launch("worker", parts)
                wait_for_worker(client, parts["worker"], now)
        if "mlflow" in parts:
            wait_for(parts["mlflow"])
    except BaseException:
        for name in ("worker", "mlflow", "prefect"):
            if name in parts and name not in before:
                end(parts.pop(name))
        remember(parts)
        raise
    print(addresses(parts))


def stop() -> None:
    """End every part that runs, and the flow runs that are at work in it."""
    parts = running()
    left = [] if "worker" in parts else orphans()
    if not parts and not left:
        print(f"Nothing is up in {Path.cwd()}.")
        return
    if left:
        end_orphans(left)
    if "worker" in parts:
        with progress("ending the worker"):
            end(parts.pop("worker"))
        if "prefect" in parts:
            with server(parts["prefect"]) as client, suppress(Exception):  # `start` does it too
                release(client)
    for name in ("mlflow", "prefect"):
        if name in parts:
            with progress(f"ending {name}"):
                end(parts.pop(name))
    remember(parts)
    print("All is down.")


# Processes


def wanted() -> list[str]:
    """The parts that there should be; a tracking server elsewhere has its own UI."""
    elsewhere = tracking_uri().startswith(("http://", "https://"))
    return ["prefect", "worker"] if elsewhere else ["prefect", "mlflow", "worker"]


def tracking_uri() -> str:
    """Where MLflow keeps its records."""
    return tracking.address(load_params().tracking)


def launch(name: str, parts: Mapping[str, Part], port: int = 0) -> Part:
    """Start a part in a session of its own and write down what it is."""
    url = f"http://127.0.0.1:{port}" if port else ""
    listen = ["--host", "127.0.0.1", "--port", str(port)]
    command = {
        "prefect": ["flows.server", *listen],
        "mlflow": ["mlflow", "server", "--workers", "1", *listen],
        "worker": ["prefect", "worker", "start", "--pool", POOL, "--name", socket.gethostname()],
    }[name]
    api = f"{url}/api" if name == "prefect" else api_of(parts["prefect"])
    with (FOLDER / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(api),
            start_new_session=True,  # neither Ctrl-C nor the terminal's end reaches it
        )
    part = Part(name, process.pid, beginning(process.pid) or "", url)
    remember({**parts, name: part})
    return part


def environment(api: str) -> dict[str, str]:
    """What the parts, and the flows that the worker runs, are started with."""
    return {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{Path.cwd()}/prefect.db",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # The other one calls its makers' tracker even with analytics switched off (3.8.8).
        "PREFECT_SERVER_UI_V2_ENABLED": "false",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # jobs of its GenAI side
        **os.environ,
        "PREFECT_API_URL": api,
        "PREFECT_UI_API_URL": api,
        # In the environment, because it may hold a password, and a command line is seen by all.
        "MLFLOW_BACKEND_STORE_URI": tracking_uri(),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PWD": str(Path.cwd()),  # prefect.yaml refers to it
        "PYTHONUNBUFFERED": "1",
    }


def api_of(prefect: Part) -> str:
    """The address that Prefect's clients are given."""
    return f"{prefect.url}/api"


def beginning(pid: int) -> str | None:
    """When a living process began, in the kernel's own count, which no clock changes.

    Returns:
        Ticks since boot, and the boot's id; None where there is no such process.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, ticks = fields[0], fields[19]  # proc_pid_stat(5): fields 3 and 22
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None if state in "ZX" else f"{ticks} {boot}"


def running() -> dict[str, Part]:
    """The parts that were started and are alive, by name."""
    try:
        noted = [Part(*row) for row in json.loads((FOLDER / "parts.json").read_text())]
    except FileNotFoundError:
        return {}
    return {part.name: part for part in noted if part.began == beginning(part.pid)}


def remember(parts: Mapping[str, Part]) -> None:
    """Write down what runs; whole or not at all."""
    partial = FOLDER / "parts.json.partial"
    partial.write_text(json.dumps(list(parts.values())))
    partial.replace(FOLDER / "parts.json")


def end(part: Part) -> None:
    """End a part and all that it started; what does not end when asked to is killed.

    Of the worker, the flow runs are asked first: they tell Prefect of their end, and the worker
    would wait for theirs.
    """
    if part.began != beginning(part.pid):
        return
    root = psutil.Process(part.pid)
    flow_runs = {child for child in children(root) if is_flow_run(child)}
    end_family({root}, flow_runs if part.name == "worker" else set())


def end_orphans(flow_runs: list[psutil.Process]) -> None:
    """End flow runs whose worker was killed, and what they have started."""
    with progress("ending flows whose worker was killed"):
        end_family(set(flow_runs), set(flow_runs))


def end_family(roots: set[psutil.Process], first: set[psutil.Process]) -> None:
    """End processes and all their descendants: asked in turn, then killed."""
    family = roots | first

    def alive(processes: set[psutil.Process]) -> bool:
        for process in list(family):
            family.update(children(process))
        return any(map(is_alive, processes))

    asked = ((first, signal.SIGTERM), (roots, signal.SIGTERM))
    for processes, number in (*asked, (family, signal.SIGTERM), (family, signal.SIGKILL)):
        if alive(processes):
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        give_up = time.monotonic() + GRACE_SECONDS
        while alive(processes) and time.monotonic() < give_up:
            time.sleep(0.1)


def is_flow_run(process: psutil.Process) -> bool:
    """Whether a process is a flow run that a worker has started."""
    try:
        return "prefect.engine" in process.cmdline()
    except psutil.Error:  # it has ended meanwhile
        return False


def orphans() -> list[psutil.Process]:
    """Flow runs at work in this folder whose worker was killed."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if is_flow_run(process) and Path(process.cwd()) == Path.cwd():
                found.append(process)
    return found


def children(process: psutil.Process) -> list[psutil.Process]:
    """Every living descendant."""
    try:
        return [child for child in process.children(recursive=True) if is_alive(child)]
    except psutil.NoSuchProcess:
        return []


def refuse_if_taken(port: int, option: str) -> None:
    """Raise GrimaceError where another program listens at a port, and name it if possible."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise GrimaceError(
                f"port {port} cannot be had ({error.strerror}{owner(port)}); choose another with "
                f"{option}"
            ) from None


def owner(port: int) -> str:
    """Name the process that listens at a port, as far as the system tells."""
    with suppress(psutil.Error, OSError):
        for link in psutil.net_connections("tcp"):
            if link.status == psutil.CONN_LISTEN and link.laddr.port == port and link.pid:
                return f" by process {link.pid}, {psutil.Process(link.pid).name()}"
    return ""


# Waiting


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Say what is waited for, on a terminal in motion, and how long it took."""
    console, began = Console(stderr=True, highlight=False), time.monotonic()
    with console.status(f"{what} …"):
        yield
    console.print(f"{what}: {time.monotonic() - began:.0f} s")


def wait_for(part: Part) -> None:
    """Wait until a part answers; it has to be alive."""
    url = api_of(part) if part.name == "prefect" else part.url
    with progress(f"starting {part.name}"):
        give_up = time.monotonic() + SERVER_START_SECONDS
        while not answers(url):
            _refuse_if_ended(part, give_up)
            time.sleep(0.3)


def wait_for_worker(client: SyncPrefectClient, part: Part, since: datetime) -> None:
    """Wait until a new worker has reported to the server."""
    with progress(f"starting {part.name}"):
        give_up = time.monotonic() + SERVER_START_SECONDS
        while not any(
            worker.last_heartbeat_time and worker.last_heartbeat_time > since
            for worker in client.read_workers_for_work_pool(POOL)
        ):
            _refuse_if_ended(part, give_up)
            time.sleep(0.3)


def _refuse_if_ended(part: Part, give_up: float) -> None:
    if part.began == beginning(part.pid) and time.monotonic() < give_up:
        return
    log = FOLDER / f"{part.name}.log"
    last = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
    raise GrimaceError(f"{part.name} does not start; {log} ends with:\n{last}")


# Prefect


@contextmanager
def server(prefect: Part) -> Iterator[SyncPrefectClient]:
    """A client of the server, whichever the user's profile names."""
    with (
        temporary_settings({PREFECT_API_URL: api_of(prefect)}),
        get_client(sync_client=True) as client,
    ):
        yield client


def prepare(client: SyncPrefectClient) -> None:
    """Make the pool, and its queue in which one run works at a time; free it of dead runs."""
    with suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
    with suppress(ObjectAlreadyExists):
        client.create_work_queue(
            QUEUE,
            "For what writes in the workspace: one at a time.",
            concurrency_limit=1,
            work_pool_name=POOL,
        )
    release(client)


def release(client: SyncPrefectClient) -> None:
    """Tell Prefect of flow runs whose processes were killed: they would hold the queue for ever.

    Only for a time at which no worker runs here. Prefect does not tell which worker has a run, so
    where another machine's is at work, none is touched.
    """
    others = sorted(
        worker.name
        for worker in client.read_workers_for_work_pool(POOL)
        if worker.status == WorkerStatus.ONLINE and worker.name != socket.gethostname()
    )
    if others:
        print(f"Runs on the pool {POOL} are left as they are: {', '.join(others)} may have them.")
        return
    at_work = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    for dead in client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=at_work))
        ),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
    ):
        state: State[None] = Crashed(message="its worker was stopped or killed")
        client.set_flow_run_state(dead.id, state, force=True)


def deploy(api: str) -> None:
    """Apply prefect.yaml.

    Raises:
        GrimaceError: Prefect refuses it.
    """
    log = FOLDER / "deploy.log"
    with progress("applying prefect.yaml"), log.open("wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(api),
            check=False,
        )
    if done.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
        raise GrimaceError(f"prefect.yaml cannot be applied; {log} ends with:\n{last}")


def addresses(parts: Mapping[str, Part]) -> str:
    """What a person wants to know of a service that is up."""
    mlflow = parts["mlflow"].url if "mlflow" in parts else tracking_uri()
    return "\n".join(
        [
            f"Prefect   {parts['prefect'].url}",
            f"MLflow    {mlflow}/#/experiments?workflowType=machine_learning",
            f"Worker    process {parts['worker'].pid}, on the pool {POOL}",
            f"Logs      {FOLDER}/*.log",
            "Flows started by hand are seen there too after",
            f"          export PREFECT_API_URL={api_of(parts['prefect'])}",
            "Stop it   python -m flows.up --stop",
        ]
    )


if __name__ == "__main__":
    run(main)
