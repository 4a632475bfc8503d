import os
import signal
import subprocess
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
import zc.lockfile
from dvc.repo import Repo
from PIL import Image
from prefect import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    LogFilter,
    LogFilterFlowRunId,
    TaskRunFilter,
    TaskRunFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

from flows import retrain as module
from flows.retrain import failure, needed_for, retrain, stage_graph
from flows.supervise import Outcome
from pipelines.cli import GrimaceError

ROOT = Path(__file__).parents[2]
Stages = dict[str, Any]
# Ends only when four of its kind are running at the same time.
MEET = (
    "mkdir -p started && touch started/{name} && for i in $(seq 600); do "
    '[ "$(ls started | wc -l)" = 4 ] && echo {name} > {name} && exit 0; sleep 0.05; done; exit 1'
)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Stages], None]:
    """Makes the current folder a DVC repository with these stages."""
    monkeypatch.chdir(tmp_path)

    def make(stages: Stages) -> None:
        subprocess.run(["git", "init", "-q"], check=True)
        Repo.init()
        Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))

    return make


def stage(cmd: str, outs: list[str], deps: list[str] | None = None) -> dict[str, Any]:
    return {"cmd": cmd, "outs": outs, "deps": deps or []}


def download(cmd: str) -> dict[str, Any]:
    return {"foreach": ["synthetic"], "do": stage(cmd, ["raw"])}


def last_flow_run() -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]


def task_states(flow_run: FlowRun) -> dict[str, str]:
    """What Prefect shows for each task run, once the events have arrived there."""
    only = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[flow_run.id]))
    with get_client(sync_client=True) as client:
        for _ in range(100):
            states = {
                run.name: run.state_name for run in client.read_task_runs(task_run_filter=only)
            }
            if "Running" not in states.values():
                break
            time.sleep(0.1)
    return states


def artifact(flow_run: FlowRun, key: str) -> str | None:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(
                key=ArtifactFilterKey(any_=[key]),
                flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run.id]),
            )
        )
    return str(found[0].data) if found else None


def dvc_status() -> dict[str, Any]:
    with Repo() as repo:
        return repo.status()


@pytest.mark.usefixtures("prefect_server")
def test_runs_the_graph_side_by_side_and_leaves_it_up_to_date(
    repository: Callable[[Stages], None],
) -> None:
    branches = ["a", "b", "c", "d"]
    repository(
        {
            "download": download("echo raw > raw"),
            **{name: stage(MEET.format(name=name), [name], ["raw"]) for name in branches},
            "report": stage(
                "mkdir -p reports/report && (echo '| model |'; cat a b c d) "
                "> reports/report/results.md",
                ["reports/report"],
                branches,
            ),
        }
    )
    state = retrain(workers=4, return_state=True)
    assert state.is_completed(), state.message
    assert state.message == "6 stages: 6 ran"
    assert dvc_status() == {}
    run = last_flow_run()
    names = {"download@synthetic", *branches, "report"}
    assert task_states(run) == dict.fromkeys(names, "Completed")
    assert artifact(run, "grimace-results") == "| model |\na\nb\nc\nd\n"
    stages = artifact(run, "grimace-stages") or ""
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in stages.splitlines()[2:]]
    assert {row[0] for row in rows} == names
    assert [rows[0][0], rows[-1][0]] == ["download@synthetic", "report"]
    assert {row[1] for row in rows} == {"ran"}
    assert all(float(row[2]) > 0 for row in rows)
    locked = Path("dvc.lock").read_bytes()

    state = retrain(workers=4, return_state=True)
    assert state.message == "nothing changed (6 stages)"
    assert Path("dvc.lock").read_bytes() == locked
    run = last_flow_run()
    assert task_states(run) == dict.fromkeys(names, "Unchanged")
    assert (artifact(run, "grimace-stages") or "").count(
        "| unchanged | 0.0 |"
    ) == 6  # DVC was not asked

    # An output that was deleted comes back from DVC's cache, and only what is asked for is run.
    Path("a").unlink()
    state = retrain(targets=["a"], return_state=True)
    assert state.message == "2 stages: 1 restored, 1 unchanged"
    assert Path("a").read_text() == "a\n"
    assert artifact(last_flow_run(), "grimace-results") is None


@pytest.mark.usefixtures("prefect_server")
def test_a_failed_stage_fails_the_flow_and_stops_only_what_needs_it(
    repository: Callable[[Stages], None],
) -> None:
    repository(
        {
            "bad": stage("echo x >> tries; echo 'error: no such face'; exit 3", ["bad"]),
            "after": stage("touch after", ["after"], ["bad"]),
            "good": stage("sleep 0.5; touch good", ["good"]),
            "better": stage("cp good better", ["better"], ["good"]),
        }
    )
    state = retrain(return_state=True)
    assert state.is_failed()
    first, *rest = (state.message or "").splitlines()
    assert first == "stage 'bad' failed: error: no such face (2 ran, 1 failed, 1 skipped)"
    assert any("exited with 3" in line for line in rest)
    assert Path("tries").read_text() == "x\n"  # nothing gained by doing the same again
    run = last_flow_run()
    assert task_states(run) == {
        "bad": "Failed",
        "after": "NotReady",
        "good": "Completed",
        "better": "Completed",
    }
    stages = artifact(run, "grimace-stages") or ""
    assert "| bad | failed |" in stages
    assert "| after | skipped |" in stages
    assert "error: no such face" in stages
    assert set(dvc_status()) == {"bad", "after"}

    only = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
    with get_client(sync_client=True) as client:
        for _ in range(100):
            logged = [log.message for log in client.read_logs(log_filter=only)]
            if "bad | error: no such face" in logged:
                break
            time.sleep(0.1)
    assert "bad | error: no such face" in logged


@pytest.mark.usefixtures("prefect_server")
def test_a_download_is_tried_three_times(
    repository: Callable[[Stages], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DOWNLOAD_RETRY_SECONDS", 0.1)
    repository({"download": download('echo x >> tries; [ "$(wc -l < tries)" = 3 ] && touch raw')})
    state = retrain(return_state=True)
    assert state.is_completed(), state.message
    assert Path("tries").read_text() == "x\n" * 3


@pytest.mark.usefixtures("prefect_server")
def test_a_stage_that_another_dvc_is_in_is_tried_again(
    repository: Callable[[Stages], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUSY_RETRY_SECONDS", 0.1)
    repository({"a": stage("touch a", ["a"])})
    blocker = subprocess.Popen(["sleep", "300"])
    locks = Path(".dvc/tmp/rwlock")
    locks.parent.mkdir(exist_ok=True)
    locks.write_text(
        '{"write": {"%s": {"pid": %d, "cmd": "dvc repro"}}}' % (Path("a").absolute(), blocker.pid)  # noqa: UP031
    )
    outcomes: list[Outcome] = []

    def then_let_go(*args: Any, **kwargs: Any) -> Outcome:
        outcomes.append(module_supervise(*args, **kwargs))
        if blocker.poll() is None:
            blocker.kill()
            blocker.wait()
        return outcomes[-1]

    module_supervise = module.supervise
    monkeypatch.setattr(module, "supervise", then_let_go)
    state = retrain(return_state=True)
    assert state.is_completed(), state.message
    assert [outcome.reason for outcome in outcomes] == ["failed", "ok"]


@pytest.mark.usefixtures("prefect_server")
def test_a_stage_that_ends_while_dvc_is_locked_is_not_lost(
    repository: Callable[[Stages], None],
) -> None:
    repository({"a": stage("echo x >> tries; touch started; sleep 1; touch a", ["a"])})

    def hold_the_lock() -> None:
        while not Path("started").exists():
            time.sleep(0.02)
        lock = zc.lockfile.LockFile(".dvc/tmp/lock")
        time.sleep(6)  # longer than DVC would wait if it were left to itself
        lock.close()

    holder = threading.Thread(target=hold_the_lock)
    holder.start()
    state = retrain(return_state=True)
    holder.join()
    assert state.message == "1 stages: 1 ran"
    assert Path("tries").read_text() == "x\n"
    assert dvc_status() == {}


@pytest.fixture
def start_flow(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python -m flows.retrain` in the current folder, as a user would."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **env: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.retrain", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_from_the_command_line(
    repository: Callable[[Stages], None],
    start_flow: Callable[..., subprocess.Popen[str]],
    prefect_server: str,
) -> None:
    repository({"a": stage("touch a", ["a"]), "bad": stage("echo 'error: why'; exit 1", ["bad"])})
    bad = start_flow("--targets", "bad", PREFECT_API_URL=prefect_server)
    _, errors = bad.communicate(timeout=60)
    assert bad.returncode == 1
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == [
        "error: stage 'bad' failed: error: why (1 failed)"
    ]
    good = start_flow("--targets", "a", PREFECT_API_URL=prefect_server)
    output, errors = good.communicate(timeout=60)
    assert good.returncode == 0, errors
    assert "1 stages: 1 ran" in output.splitlines()


def test_two_at_once_do_not_get_in_each_others_way(
    repository: Callable[[Stages], None],
    start_flow: Callable[..., subprocess.Popen[str]],
    prefect_server: str,
) -> None:
    wait_for_go = "touch started; while [ ! -e go ]; do sleep 0.05; done"
    repository({"a": stage(f"echo x >> tries; {wait_for_go}; touch a", ["a"])})

    def start(*arguments: str) -> subprocess.Popen[str]:
        return start_flow(*arguments, PREFECT_API_URL=prefect_server)

    def at_work() -> list[FlowRun]:
        with get_client(sync_client=True) as client:
            runs = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=3)
        return [run for run in runs if run.state_name == "Running"]

    first = start()
    wait_until(lambda: Path("started").exists(), 60)
    second, waiting = start(), start("--wait")
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"held by retrain '{at_work()[-1].name}' (process {first.pid} on " in errors
    assert "--wait waits for its end" in errors

    wait_until(lambda: len(at_work()) == 2, 60)
    unwanted = start("--wait")
    wait_until(lambda: len(at_work()) == 3, 60)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(at_work()[0].id, Cancelling())
    _, errors = unwanted.communicate(timeout=30)
    assert unwanted.returncode == 1 and "no longer waited for" in errors

    Path("go").touch()
    output, errors = first.communicate(timeout=60)
    assert "1 stages: 1 ran" in output.splitlines(), errors
    output, errors = waiting.communicate(timeout=60)
    assert "nothing changed (1 stages)" in output.splitlines(), errors
    assert "waiting: " in errors
    assert Path("tries").read_text() == "x\n"


@pytest.mark.usefixtures("prefect_server")
def test_new_shards_leave_their_contact_sheet(repository: Callable[[Stages], None]) -> None:
    draw = (
        "mkdir -p reports/augment/emotion && python -c 'from PIL import Image; "
        'Image.new("RGB", (40, 30), "red").save("reports/augment/emotion/views.png")\''
    )
    augment = {"foreach": ["emotion"], "do": stage(draw, ["reports/augment/emotion"])}
    repository({"augment": augment})
    assert retrain(return_state=True).message == "1 stages: 1 ran"
    address = artifact(last_flow_run(), "grimace-views-emotion") or ""
    kind, _, data = address.partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(BytesIO(b64decode(data))) as picture:
        assert picture.size == (40, 30)
        red, green, blue = picture.convert("RGB").getpixel((20, 15))
    assert red > 200 and green < 50 and blue < 50
    assert retrain(return_state=True).message == "nothing changed (1 stages)"
    assert artifact(last_flow_run(), "grimace-views-emotion") is None


def test_a_stage_that_was_killed_is_told_from_one_that_failed() -> None:
    def why(reason: str, code: int, *lines: str) -> str:
        return failure("b", Outcome(reason, code, list(lines))).splitlines()[0]

    killed = "stage 'b' failed: killed by SIGKILL, most likely for want of memory"
    last = "ERROR: failed to reproduce 'b': failed to run: python b.py, exited with"
    assert why("killed", 9) == killed
    assert why("failed", 255, "loss 0.3", f"{last} -9") == killed
    assert why("failed", 255, f"{last} -11") == "stage 'b' failed: killed by SIGSEGV"
    assert why("failed", 255, "no such file", f"{last} 1") == "stage 'b' failed: no such file"


ENDLESS = "setsid sleep 300 & sleep 300 & echo $! $$ > pids; sleep 300"


@pytest.mark.parametrize("how", ["Prefect", "SIGINT", "SIGTERM", "SIGKILL"])
def test_cancelling_leaves_nothing_behind(
    how: str,
    repository: Callable[[Stages], None],
    start_flow: Callable[..., subprocess.Popen[str]],
    prefect_server: str,
    tmp_path: Path,
) -> None:
    endless = f"[ -e go ] || {{ {ENDLESS}; }}; touch b"
    repository(
        {
            "a": stage("echo x >> tries; touch a", ["a"]),
            "b": stage(endless, ["b"], ["a"]),
            "c": stage("touch c", ["c"], ["b"]),
        }
    )
    # Ctrl-C and SIGKILL with a temporary server, which has to go as well, and not too early.
    if temporary := how in ("SIGINT", "SIGKILL"):
        process = start_flow(PREFECT_API_URL="", PREFECT_HOME=str(tmp_path / "prefect"))
    else:
        process = start_flow(PREFECT_API_URL=prefect_server)
    wait_until(lambda: Path("pids").exists() and Path("pids").read_text().endswith("\n"), 90)
    flow = psutil.Process(process.pid)
    everything = [flow, *flow.children(recursive=True)]
    assert {int(pid) for pid in Path("pids").read_text().split()} <= {p.pid for p in everything}

    if how == "Prefect":
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(last_flow_run().id, Cancelling())
    elif how == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does on Ctrl-C
    else:
        os.kill(process.pid, signal.Signals[how])
    wait_until(
        lambda: not any(map(is_alive, everything)), 6, lambda: list(filter(is_alive, everything))
    )

    process.communicate(timeout=10)
    assert process.returncode == {"Prefect": 1, "SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}[how]
    if not temporary:
        states = {"Prefect": "Cancelled", "SIGTERM": "Crashed"}
        assert last_flow_run().state_name == states[how]
    assert not Path("c").exists()
    assert set(dvc_status()) == {"b", "c"}  # nothing corrupt, the rest still to be done
    if how in ("Prefect", "SIGKILL"):
        Path("go").touch()
        assert retrain(return_state=True).message == "3 stages: 2 ran, 1 unchanged"
        assert Path("tries").read_text() == "x\n"


def wait_until(
    condition: Callable[[], bool], seconds: float, what: Callable[[], object] = lambda: ""
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_mistakes_are_told_clearly(repository: Callable[[Stages], None], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    with pytest.raises(GrimaceError, match=r"no dvc\.yaml"):
        stage_graph()
    os.chdir(tmp_path)
    repository({"a": stage("touch a", ["a"])})
    with pytest.raises(GrimaceError, match="no stage 'b'"):
        stage_graph(["b"])
    Path("dvc.yaml").write_text("stages: [")
    with pytest.raises(GrimaceError, match=r"dvc\.yaml"):
        stage_graph()


def test_no_workers_at_all_or_no_server_is_told_at_once(repository, prefect_server: str) -> None:
    repository({"a": stage("touch a", ["a"])})
    state = retrain(workers=0, return_state=True)
    assert state.is_failed() and "greater than or equal to 1" in str(state.message)
    nobody = {PREFECT_API_URL: "http://127.0.0.1:9/api"}
    with (
        temporary_settings(nobody),
        pytest.raises(GrimaceError, match=r"127\.0\.0\.1:9/api, where no Prefect server answers"),
        module.prefect_server(),
    ):
        pass


def test_targets_bring_what_they_need() -> None:
    graph = {
        "split@x": set[str](),
        "train@x": {"split@x"},
        "train@y": {"split@x"},
        "report": {"train@x", "train@y"},
    }
    assert set(needed_for(["train@x"], graph)) == {"train@x", "split@x"}
    assert set(needed_for(["train"], graph)) == {"train@x", "train@y", "split@x"}
    assert needed_for(["report"], graph) == graph
