import inspect
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from prefect import flow, get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import CronSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Running
from prefect.utilities.importtools import import_object

from flows.supervise import is_alive
from flows.up import POOL, QUEUE, beginning, prepare

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("row", DEPLOYMENTS, ids=lambda row: row["name"])
def test_what_is_deployed_is_there_and_takes_its_parameters(row: dict[str, Any]) -> None:
    module, _, name = row["entrypoint"].rpartition(".")
    deployed = import_object(f"{module}:{name}")
    inspect.signature(deployed.fn).bind(**row.get("parameters", {}))
    for schedule in row.get("schedules", []):
        if "cron" in schedule:
            CronSchedule(**schedule)
    assert row["work_pool"]["name"] == POOL
    assert row["work_pool"]["work_queue_name"] in (QUEUE, "default")


def runs_of(client: SyncPrefectClient, deployment: str) -> list[FlowRun]:
    only = DeploymentFilter(name=DeploymentFilterName(any_=[deployment]))
    return client.read_flow_runs(deployment_filter=only)


def wait_until(condition: Callable[[], Any], seconds: float, what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)
    return found


def test_an_event_of_new_data_retrains_and_no_other_does(service) -> None:
    run = service.retrained()
    assert run.state_name == "Completed", service.log()
    assert (run.state.message or "").splitlines() == [
        "4 stages: 4 ran",
        "emotion: grimace-emotion: champion is version 2, before: version 1",
    ]
    with (
        temporary_settings({PREFECT_API_URL: service.api}),
        get_client(sync_client=True) as client,
    ):
        assert len(client.read_automations()) == 2
        queue = client.read_work_queue_by_name(QUEUE, POOL)
        assert queue.concurrency_limit == 1
        nightly = client.read_deployment_by_name("retrain/nightly")
        assert nightly.schedules[0].schedule.cron == "0 2 * * *"
        planned = wait_until(lambda: runs_of(client, "nightly"), 30, service.log)
        hours = {run.expected_start_time.hour for run in planned if run.expected_start_time}
        assert hours == {2}
        assert len(runs_of(client, "new-data")) == 1
        assert runs_of(client, "drift") == []


def test_it_is_brought_up_once(service) -> None:
    before = json.loads((service.root / "runs/service/parts.json").read_text())
    code, output, errors = service.up()
    assert code == 0, errors
    assert output.startswith("It is up already.")
    assert f"Prefect   http://127.0.0.1:{service.prefect_port}\n" in output
    assert json.loads((service.root / "runs/service/parts.json").read_text()) == before


def test_everything_listens_on_loopback_alone(service) -> None:
    links = [link for process in family(service) for link in process.net_connections("inet")]
    listening = {link.laddr for link in links if link.status == psutil.CONN_LISTEN}
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert {service.prefect_port, service.mlflow_port} <= {a.port for a in listening}
    assert {link.raddr.ip for link in links if link.raddr} <= {"127.0.0.1"}


def test_a_port_that_is_taken_is_named(make_service, tmp_path: Path) -> None:
    other = make_service(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", other.mlflow_port))
        taken.listen()
        code, _, errors = other.up()
    assert code == 1
    assert f"error: port {other.mlflow_port} cannot be had (Address already in use by " in errors
    assert "choose another with --mlflow-port" in errors
    assert not (tmp_path / "runs/service/parts.json").exists()


@pytest.mark.parametrize("how", ["Ctrl-C", "a wrong database"])
def test_a_start_that_comes_to_nothing_leaves_nothing(how, make_service, tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # in which there can be no folder, whoever asks
    database = f"sqlite+aiosqlite:///{tmp_path}/file/a.db"
    other = make_service(tmp_path, PREFECT_SERVER_DATABASE_CONNECTION_URL=database)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    process = other.call("-m", "flows.up", *other.ports)
    parts = tmp_path / "runs/service/parts.json"
    wait_until(parts.exists, 60, process.poll)
    started = [psutil.Process(row[1]) for row in json.loads(parts.read_text())]
    if how == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if how == "Ctrl-C" else 1)
    if how != "Ctrl-C":
        assert "error: prefect does not start; runs/service/prefect.log ends with:" in errors
        assert "unable to open database file" in errors
    assert not any(map(is_alive, started))
    assert json.loads(parts.read_text()) == []


def test_runs_whose_worker_was_killed_do_not_hold_the_queue(service) -> None:
    @flow
    def lost() -> None: ...

    with (
        temporary_settings({PREFECT_API_URL: service.api}),
        get_client(sync_client=True) as client,
    ):
        prepare(client)
        run = client.create_flow_run(lost, work_pool_name=POOL, work_queue_name=QUEUE)
        client.set_flow_run_state(run.id, Running(), force=True)
        # While a worker elsewhere is at work it may be its run.
        client.send_worker_heartbeat(POOL, "elsewhere")
        prepare(client)
        assert client.read_flow_run(run.id).state_name == "Running"
        client.request("DELETE", f"/work_pools/{POOL}/workers/elsewhere")
        prepare(client)
        assert client.read_flow_run(run.id).state_name == "Crashed"
        assert client.read_work_queue_by_name(QUEUE, POOL).concurrency_limit == 1


def test_a_flow_whose_worker_was_killed_is_ended_too(make_service, tmp_path: Path) -> None:
    other = make_service(tmp_path)
    (tmp_path / "runs/service").mkdir(parents=True)
    left = [sys.executable, "-c", "import time; time.sleep(99)", "prefect.engine"]
    here = subprocess.Popen(left, cwd=tmp_path)
    elsewhere = subprocess.Popen(left)
    code, output, errors = other.up("--stop")
    assert (code, output.splitlines()[0]) == (0, "All is down."), errors
    assert here.wait(5) == -signal.SIGTERM and elsewhere.poll() is None
    elsewhere.kill()
    elsewhere.wait()
    _, output, _ = other.up("--stop")
    assert output.splitlines()[0] == f"Nothing is up in {tmp_path}."


def test_a_process_is_told_from_another_with_its_id() -> None:
    one = subprocess.Popen(["sleep", "60"])
    time.sleep(0.05)  # the kernel counts in hundredths of a second
    two = subprocess.Popen(["sleep", "60"])
    began = beginning(one.pid)
    assert began == beginning(one.pid) != beginning(two.pid)
    one.kill()
    two.kill()
    time.sleep(0.1)
    assert beginning(one.pid) is None  # dead, though nobody has asked how it ended
    one.wait()
    two.wait()
    assert beginning(one.pid) is None


def family(service) -> list[psutil.Process]:
    found = []
    for row in json.loads((service.root / "runs/service/parts.json").read_text()):
        process = psutil.Process(row[1])
        found += [process, *process.children(recursive=True)]
    return found


# The last that is done with the service.
def test_stopped_in_the_middle_of_a_run_it_leaves_no_process(service) -> None:
    endless = {"cmd": "setsid sleep 300 & echo $$ > pid; sleep 300", "outs": ["never"]}
    (service.root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"train": endless}}))
    service.emit("grimace.data.drift")
    pid = service.root / "pid"
    wait_until(
        lambda: pid.exists() and pid.read_text().endswith("\n"),
        90,
        service.log,
    )
    everything = family(service)
    assert int(pid.read_text()) in {process.pid for process in everything}
    began = time.monotonic()
    code, output, errors = service.up("--stop")
    assert (code, output) == (0, "All is down.\n"), errors
    assert time.monotonic() - began < 60
    assert [process for process in everything if is_alive(process)] == []
    with sqlite3.connect(service.root / "prefect.db") as database:
        ended = database.execute(
            "SELECT state_type FROM flow_run JOIN deployment ON deployment.id = deployment_id "
            "WHERE deployment.name = 'drift'"
        )
        assert ended.fetchall() == [("CRASHED",)]
    assert service.up("--stop")[1] == f"Nothing is up in {service.root}.\n"
