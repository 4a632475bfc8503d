import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import optuna
import psutil
import pytest
import yaml
from optuna.trial import TrialState
from prefect import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    TaskRunFilter,
    TaskRunFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Cancelling

from flows import sweep as module
from flows.lock import BusyError, alone
from flows.supervise import Lifeline, Outcome
from flows.sweep import sweep
from pipelines.cli import GrimaceError
from pipelines.params import load_params
from pipelines.sweep import Plan, make_plan, open_study

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("prefect_server", "searchable")


@pytest.fixture(autouse=True)
def _tracking_as_before() -> Iterator[None]:
    before = mlflow.get_tracking_uri()
    yield
    mlflow.set_tracking_uri(before)


def study_of() -> optuna.Study:
    return open_study(make_plan("emotion-plain", load_params()))


def states() -> list[str]:
    return [trial.state.name for trial in study_of().trials]


def wait_until(condition: Callable[[], Any], seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def last_flow_run() -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]


def artifact(flow_run: FlowRun) -> str:
    only = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run.id]))
    with get_client(sync_client=True) as client:
        (found,) = client.read_artifacts(artifact_filter=only)
    assert found.key == "grimace-sweep"
    return str(found.data)


def task_states(flow_run: FlowRun) -> dict[str, str]:
    only = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[flow_run.id]))
    with get_client(sync_client=True) as client:
        for _ in range(100):  # the events take a moment to arrive
            found = {
                run.name: run.state_name for run in client.read_task_runs(task_run_filter=only)
            }
            if "Running" not in found.values():
                break
            time.sleep(0.1)
    return found


# with trainings


def start(server: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.sweep", "--job", "emotion-plain", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_API_URL": server},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def process_of(flow: subprocess.Popen[str], number: int) -> psutil.Process | None:
    """The process that trains a trial."""
    for child in psutil.Process(flow.pid).children(recursive=True):
        words = child.cmdline()
        if words[1:3] == ["-m", "pipelines.trial"] and words[-1] == str(number):
            return child
    return None


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_killed_it_goes_on_and_a_trial_that_dies_is_one_failed_trial(prefect_server: str) -> None:
    values = yaml.safe_load(Path("params.yaml").read_text())
    values["train"]["jobs"]["emotion-plain"]["epochs"] = 40
    values["sweep"]["startup"] = 9  # none is pruned
    Path("params.yaml").write_text(yaml.safe_dump(values))
    arguments = ("--trials", "2", "--parallel", "2")

    flow = start(prefect_server, *arguments)
    try:
        wait_until(lambda: process_of(flow, 1)).kill()  # as the system does for want of memory
        wait_until(lambda: "FAIL" in states())
        wait_until(lambda: len(study_of().trials[0].intermediate_values) >= 2)
        everything = psutil.Process(flow.pid).children(recursive=True)
    finally:
        flow.kill()
        flow.communicate()
    wait_until(lambda: not any(map(is_alive, everything)), 8)
    trial, failed = study_of().trials
    assert trial.state == TrialState.RUNNING and len(trial.intermediate_values) < 20
    assert failed.user_attrs["reason"] == "killed by SIGKILL, most likely for want of memory"

    flow = start(prefect_server, *arguments)
    output, _ = flow.communicate(timeout=300)
    assert flow.returncode == 0, output
    assert "2 of 2 trials: 1 complete, 1 failed" in output
    assert "trial 0 | resumed after epoch" in output
    assert states() == ["COMPLETE", "FAIL"]
    resumed = study_of().trials[0]
    assert resumed.params == trial.params
    assert list(resumed.intermediate_values) == list(range(1, 21))
    assert len(resumed.user_attrs["history"]) == 20
    # Of the trials nothing is left but what is in the study.
    assert [path.name for path in Path("sweeps/emotion-plain").glob("*/*")] == ["plan.json"]
    best = yaml.safe_load(Path("sweeps/emotion-plain/best.yaml").read_text())
    found = best["train"]["jobs"]["emotion-plain"]["by_dataset"]["synthetic"]
    assert set(found) == {"learning_rate", "widths", "batch"}
    assert Path("sweeps/emotion-plain/history.png").exists()

    client = mlflow.MlflowClient(load_params().tracking.uri)
    experiment = client.get_experiment_by_name("grimace-emotion").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert {name: run.info.status for name, run in runs.items()} == {
        "sweep of emotion-plain on synthetic": "FINISHED",
        "emotion-plain trial 0": "FINISHED",
        "emotion-plain trial 1": "FAILED",
    }
    logged = client.get_metric_history(runs["emotion-plain trial 0"].info.run_id, "val_accuracy")
    assert [metric.step for metric in logged] == list(range(20))

    # Enough trials are there: nothing is trained, and it says the same.
    state = sweep("emotion-plain", trials=2, return_state=True)
    assert state.is_completed() and (state.message or "").splitlines()[-3:] == [
        line for line in output.splitlines() if line.startswith(("best: ", "into ", "as an "))
    ]
    assert len(study_of().trials) == 2
    table = artifact(last_flow_run())
    assert table.count("complete") == 1 and "most likely for want of memory" in table


# without


class Trainer:
    """Stands in for the supervised process of a trial; counts how many run at once."""

    def __init__(self, ends: Callable[[Plan, int, Lifeline], Outcome]) -> None:
        self.ends = ends
        self.running, self.most, self.lock = 0, 0, threading.Lock()
        self.environments: list[dict[str, str]] = []

    def __call__(
        self, command: list[str], lifeline: Lifeline, on_line: Callable[[str], None], env: Any
    ) -> Outcome:
        assert command[1:3] == ["-m", "pipelines.trial"]
        plan = Plan.model_validate_json(Path(command[4]).read_text())
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.environments.append(env)
        on_line("epoch 1/4")
        outcome = self.ends(plan, int(command[6]), lifeline)
        with self.lock:
            self.running -= 1
        return outcome


OK = Outcome("ok", 0, [])


def trains(plan: Plan, number: int, lifeline: Lifeline) -> Outcome:
    lifeline.is_cut(within_seconds=0.3)
    open_study(plan).tell(number, number / 10)
    return OK


def fails(plan: Plan, number: int, lifeline: Lifeline) -> Outcome:
    lines = ["Traceback:", "  at", "pkg.BadError: no such face", "    see the manual"]
    return Outcome("failed", 1, lines)


def lasts(plan: Plan, number: int, lifeline: Lifeline) -> Outcome:
    assert lifeline.is_cut(within_seconds=60)
    return Outcome("cancelled", 15, [])


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    trainer = Trainer(trains)
    monkeypatch.setattr(module, "supervise", trainer)
    monkeypatch.setattr(module, "draw", lambda *_: None)
    return trainer


def test_side_by_side_and_more_trials_later(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.2)
    trainer.ends = lambda plan, number, lifeline: (
        fails(plan, number, lifeline) if number == 1 else trains(plan, number, lifeline)
    )
    state = sweep("emotion-plain", trials=4, parallel=2, return_state=True)
    assert state.is_completed(), state.message
    assert trainer.most == 2
    cores = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert {env["TF_NUM_INTRAOP_THREADS"] for env in trainer.environments} == {cores}
    complete = dict.fromkeys([f"trial {number}" for number in range(4)], "Complete")
    assert task_states(last_flow_run()) == complete | {"trial 1": "Failed"}
    state = sweep("emotion-plain", trials=5, return_state=True)
    assert (state.message or "").startswith("5 of 5 trials: 4 complete, 1 failed\nbest: ")
    assert list(task_states(last_flow_run())) == ["trial 4"]


def test_where_every_trial_fails_it_gives_up_and_says_why(trainer: Trainer) -> None:
    trainer.ends = fails
    state = sweep("emotion-plain", trials=20, return_state=True)
    assert state.is_failed()
    first, second = (state.message or "").splitlines()
    assert first == "every trial fails, the last with: pkg.BadError: no such face"
    assert second == "3 of 20 trials: 3 failed"
    assert Counter(task_states(last_flow_run()).values()) == {"Failed": 3}
    # With what was wrong put right, the same command goes on.
    trainer.ends = trains
    state = sweep("emotion-plain", trials=5, return_state=True)
    assert (state.message or "").startswith("5 of 5 trials: 2 complete, 3 failed\n")


def test_out_of_time_it_stops_and_goes_on_later(trainer: Trainer) -> None:
    trainer.ends = lasts
    state = sweep("emotion-plain", trials=3, timeout=1, return_state=True)
    assert state.is_completed()
    assert state.message == (
        "stopped by --timeout; the same command goes on. 1 of 3 trials: 1 interrupted"
    )
    assert task_states(last_flow_run()) == {"trial 0": "Cancelled"}
    values = study_of().trials[0].params
    trainer.ends = trains
    state = sweep("emotion-plain", trials=3, return_state=True)
    assert (state.message or "").startswith("3 of 3 trials: 3 complete\n")
    assert study_of().trials[0].params == values


def test_cancelled_in_prefect_it_stops_and_can_go_on(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.2)

    def cancelled(plan: Plan, number: int, lifeline: Lifeline) -> Outcome:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(last_flow_run().id, Cancelling())
        return lasts(plan, number, lifeline)

    trainer.ends = cancelled
    state = sweep("emotion-plain", trials=3, return_state=True)
    assert state.is_cancelled()
    assert state.message == "cancelled; the same command goes on. 1 of 3 trials: 1 interrupted"
    assert states() == ["RUNNING"]


def test_the_search_goes_on_without_mlflow_and_catches_up(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, calls = module.record, []

    def away(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 1:
            raise GrimaceError("MLflow is away")
        record(*args)

    monkeypatch.setattr(module, "record", away)
    assert sweep("emotion-plain", trials=1, return_state=True).is_completed()
    monkeypatch.setattr(module, "record", record)
    assert sweep("emotion-plain", trials=1, return_state=True).is_completed()
    client = mlflow.MlflowClient(load_params().tracking.uri)
    experiment = client.get_experiment_by_name("grimace-emotion").experiment_id
    assert [run.info.status for run in client.search_runs([experiment])] == ["FINISHED"] * 2


def test_mistakes_are_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, said in {
        ("--job", "emotion-plane"): "did you mean 'emotion-plain'",
        ("--job", "emotion-plain", "--trials", "0"): "--trials 0: has to be at least 1",
        ("--job", "emotion-plain", "--parallel", "0"): "--parallel 0: has to be at least 1",
        ("--job", "emotion-plain", "--apply"): "no sweeps/emotion-plain/best.yaml; search first",
    }.items():
        monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
        with pytest.raises(GrimaceError, match=said):
            module.main()
    with alone("a retrain"):
        state = sweep("emotion-plain", return_state=True)
        with pytest.raises(BusyError, match="held by a retrain"):
            monkeypatch.setattr(sys, "argv", ["sweep", "--job", "emotion-plain"])
            module.main()
    assert (state.name, state.is_failed()) == ("Busy", True)
    assert not Path("sweeps/emotion-plain/study.db").exists()


def test_apply(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sweeps/emotion-plain").mkdir(parents=True)
    overlay = {"train": {"jobs": {"emotion-plain": {"by_dataset": {"synthetic": {"batch": 16}}}}}}
    Path("sweeps/emotion-plain/best.yaml").write_text(yaml.safe_dump(overlay))
    monkeypatch.setattr(sys, "argv", ["sweep", "--job", "emotion-plain", "--apply"])
    module.main()
    assert capsys.readouterr().out == "train.jobs.emotion-plain.by_dataset.synthetic.batch: 16\n"
    assert load_params().train.jobs["emotion-plain"].at("synthetic").batch == 16


def test_how_a_process_ended() -> None:
    assert module.reason(Outcome("failed", 3, [])) == "exit code 3"
    assert module.reason(Outcome("failed", 1, ["error: why", "then"])) == "error: why"
    assert module.reason(Outcome("failed", 1, ["this", "that"])) == "that"
    assert module.reason(Outcome("killed", signal.SIGSEGV, [])) == "killed by SIGSEGV"
