"""Search for better parameters of one training job, under Prefect: each trial is a task.

A trial trains in a process of its own (`pipelines.trial`), so that one which crashes is one
failed trial. Everything is in `sweeps/JOB/`; started again after whatever end, the search goes on
with the trials that were interrupted, each after its last whole epoch.
"""

import argparse
import os
import re
import signal
import sys
import threading
import time
from collections import Counter, deque
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from shutil import rmtree
from typing import Annotated, Any, Literal

import optuna
from optuna.trial import TrialState
from pydantic import Field

from flows.lock import BusyError, GivenUpError, refuse_if_held
from flows.retrain import in_workspace, is_cancelled_in_prefect, prefect_server, report_end
from flows.supervise import Lifeline, Outcome, supervise
from pipelines.cli import GrimaceError, run
from pipelines.params import load_params
from pipelines.sweep import (
    STATES,
    Plan,
    apply,
    asked_trials,
    best_of,
    best_trial,
    draw,
    make_plan,
    next_trial,
    open_study,
    own_values,
    record,
    table,
    threads,
    trial_of,
    write_best,
)

# After the imports of ours, which set what Prefect reads from the environment.
from prefect import flow, get_run_logger, task  # isort: skip
from prefect.artifacts import create_table_artifact  # isort: skip
from prefect.cache_policies import NO_CACHE  # isort: skip
from prefect.futures import PrefectFuture  # isort: skip
from prefect.states import Cancelled, Completed, Failed, State  # isort: skip
from flows.notify import tell_failure  # isort: skip

# How often MLflow is brought up to date while trials run, and a cancellation is looked for.
POLL_SECONDS = 5.0
# So many failed trials and not one that trained: the fault is not in the values tried.
GIVE_UP_AFTER = 3
# How Python names an exception, or a command of ours what is wrong.
ERROR = re.compile(r"error: |[\w.]+(Error|Exception)\b")

End = Literal["done", "timeout", "cut", "hopeless"]


def main() -> None:
    """Parse the command line and run the flow in this process."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.sweep",
        description="Search the ranges that sweep.jobs of params.yaml gives for a job, judged by "
        "validation alone. The same command goes on with a search that was ended early; "
        "what came out is in sweeps/JOB/.",
    )
    parser.add_argument("--job", required=True, help="a name under sweep.jobs of params.yaml")
    parser.add_argument(
        "--trials",
        type=int,
        default=20,
        metavar="N",
        help="how many the study is to have in all, earlier ones counted (default: %(default)s)",
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        metavar="N",
        help="trials at the same time, which share the cores (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="stop after so long; trials that run then go on the next time (default: never)",
    )
    parser.add_argument(
        "--wait",
        action="store_true",
        help="where another flow is at work here, wait for its end instead of saying so",
    )
    parser.add_argument(
        "--apply",
        action="store_true",
        help="do not search: write the values of sweeps/JOB/best.yaml into params.yaml",
    )
    arguments = parser.parse_args()
    if arguments.apply:
        for key, value in apply(Path("sweeps", arguments.job, "best.yaml")).items():
            print(f"{key}: {value}")
        return
    # Mistakes are told here, before a server is started.
    for name in ("trials", "parallel"):
        if getattr(arguments, name) < 1:
            raise GrimaceError(f"--{name} {getattr(arguments, name)}: has to be at least 1")
    make_plan(arguments.job, load_params())
    if not arguments.wait:
        refuse_if_held()

    # Left to itself SIGTERM would end us on the spot, without a word to Prefect.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with prefect_server():
        state = sweep(
            arguments.job,
            arguments.trials,
            arguments.parallel,
            arguments.timeout,
            arguments.wait,
            return_state=True,
        )
    if not state.is_completed():
        raise GrimaceError(state.message or f"the search ended as {state.name}")
    print(state.message)


@flow(
    name="sweep",
    flow_run_name="sweep of {job}",
    on_failure=[tell_failure],
    on_crashed=[tell_failure],
)
def sweep(
    job: str,
    trials: int = 20,
    parallel: Annotated[int, Field(ge=1)] = 1,
    timeout: float | None = None,
    wait: bool = False,
) -> State[Any]:
    """Search for better parameters of a job of the params.yaml in the current folder.

    Leaves a table artefact in Prefect, `grimace-sweep`: what became of each trial. Everything is
    in MLflow too, one run within the run of the study for each trial.

    Args:
        job: a name under `sweep.jobs`.
        trials: how many trials the study is to have in all.
        parallel: how many may run at the same time.
        timeout: seconds after which the search stops; it can go on later.
        wait: for the end of another flow that is at work in this folder; it fails otherwise.

    Raises:
        GrimaceError: there is nothing to search.
    """
    make_plan(job, load_params())  # mistakes are told before any wait
    try:
        with in_workspace(wait) as lock:
            return search(make_plan(job, load_params()), trials, parallel, timeout, lock)
    except BusyError as error:
        return Failed(name="Busy", message=str(error))
    except GivenUpError as error:
        return Cancelled(message=str(error))


def search(plan: Plan, trials: int, parallel: int, timeout: float | None, lock: int) -> State[Any]:
    """Go on with the study of a plan, or begin it; what runs holds the lock too."""
    study = open_study(plan)
    plan.file.write_text(plan.model_dump_json())
    record(plan, study)  # a store that does not answer is told before any work
    if own_values(plan) is None:
        get_run_logger().warning("the job as it is lies outside the ranges, so it is not tried")
    started = time.monotonic()
    with Lifeline(lock) as lifeline:
        timer = threading.Timer(timeout or 0, lifeline.cut)
        if timeout is not None:
            timer.start()
        try:
            why = run_trials(plan, study, trials, parallel, lifeline)
        finally:
            timer.cancel()
    if why == "cut" and timeout is not None and time.monotonic() - started >= timeout:
        why = "timeout"
    return conclude(plan, study, trials, why)


def run_trials(
    plan: Plan, study: optuna.Study, trials: int, parallel: int, lifeline: Lifeline
) -> End:
    """Run what was interrupted and then new trials; say why no more are run."""
    logger = get_run_logger()
    interrupted = deque[int]()
    for trial in study.trials:
        if trial.state == TrialState.RUNNING:
            interrupted.append(trial.number)
        else:
            rmtree(plan.trial_folder(trial.number), ignore_errors=True)
    futures: dict[str, PrefectFuture[Any]] = {}
    finished: SimpleQueue[str] = SimpleQueue()
    ended: list[TrialState] = []
    while True:
        hopeless = len(ended) >= GIVE_UP_AFTER and set(ended) == {TrialState.FAIL}
        while len(futures) < parallel and not (hopeless or lifeline.is_cut()):
            if interrupted:
                number = interrupted.popleft()
            elif len(asked_trials(study)) < trials:
                number = next_trial(plan, study)
            else:
                break
            name = str(number)
            futures[name] = run_trial.submit(
                plan.file, plan.trial_folder(number), number, study, threads(parallel), lifeline
            )
            futures[name].add_done_callback(partial(report_end, finished, name))
        if not futures:
            return "hopeless" if hopeless else "cut" if lifeline.is_cut() else "done"
        number = int(next_finished(finished, plan, study, lifeline))
        futures.pop(str(number)).wait()
        ended.append(study.trials[number].state)
        logger.info(progress(plan, study, number, trials))
        if best_trial(study):
            write_best(plan, study)


def next_finished(
    finished: SimpleQueue[str], plan: Plan, study: optuna.Study, lifeline: Lifeline
) -> str:
    """Wait for a trial to end; meanwhile show MLflow, and heed a cancellation in Prefect."""
    tracked = True
    while True:
        try:
            return finished.get(timeout=POLL_SECONDS)
        except Empty:
            if not lifeline.is_cut() and is_cancelled_in_prefect():
                lifeline.cut()
            tracked = tracked and try_to_record(plan, study)


def try_to_record(plan: Plan, study: optuna.Study, finished: bool = False) -> bool:
    """Bring MLflow up to date, or say that it has to wait; the search goes on without it."""
    from mlflow.exceptions import MlflowException

    try:
        record(plan, study, finished)
    except (GrimaceError, MlflowException) as error:
        get_run_logger().warning("MLflow is behind until it answers again: %s", error)
        return False
    return True


def progress(plan: Plan, study: optuna.Study, number: int, trials: int) -> str:
    """One line on a trial that has just ended, or was ended."""
    trial, best = study.trials[number], best_trial(study)
    ended = sum(other.state.is_finished() for other in study.trials)
    reached = best_of(plan, trial)
    state = "interrupted" if trial.state == TrialState.RUNNING else STATES[trial.state]
    said = [f"trial {number} {state}"]
    if reached is not None:
        said.append(f"{plan.metric} {reached:.4f} in {len(trial.intermediate_values)} epochs")
    if best is not None:
        said.append(f"best {best.value:.4f} in trial {best.number}")
    return f"{ended} of {trials} done | {', '.join(said)}"


@task(task_run_name="trial {number}", cache_policy=NO_CACHE)
def run_trial(
    plan: Path,
    folder: Path,
    number: int,
    study: optuna.Study,
    environment: dict[str, str],
    lifeline: Lifeline,
) -> State[None]:
    """Run one trial to its end; it tells the study itself, unless it fails."""
    logger = get_run_logger()
    outcome = supervise(
        [sys.executable, "-m", "pipelines.trial", "--plan", str(plan), "--number", str(number)],
        lifeline,
        lambda line: logger.info("trial %d | %s", number, line),
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )
    if outcome.reason == "cancelled":
        return Cancelled(message="interrupted; it goes on when the search does")
    state = study.trials[number].state
    if state == TrialState.RUNNING:  # it did not come to say so
        state = TrialState.FAIL
        trial_of(study, number).set_user_attr("reason", reason(outcome))
        study.tell(number, state=state)
    rmtree(folder, ignore_errors=True)
    if state == TrialState.FAIL:
        return Failed(message=study.trials[number].user_attrs["reason"])
    return Completed(name=STATES[state].capitalize())


def reason(outcome: Outcome) -> str:
    """Why a trial failed, in one line."""
    if outcome.reason == "killed":
        why = f"killed by {signal.Signals(outcome.code).name}"
        return f"{why}, most likely for want of memory" if outcome.code == signal.SIGKILL else why
    errors = [line for line in outcome.lines if ERROR.match(line)]
    return (errors or outcome.lines or [f"exit code {outcome.code}"])[-1]


def conclude(plan: Plan, study: optuna.Study, trials: int, why: End) -> State[Any]:
    """Write down what came out, and say how it ended."""
    rows = table(plan, study)
    create_table_artifact(rows, key="grimace-sweep", description=f"Trials of {plan.study}.")
    counts = Counter(row["state"] for row in rows)
    told = ", ".join(f"{counts[state]} {state}" for state in STATES.values() if counts[state])
    summary = f"{len(rows)} of {trials} trials: {told.replace('running', 'interrupted')}"
    if best_trial(study):
        summary += f"\n{write_best(plan, study)}"
        draw(plan, study)
    try_to_record(plan, study, finished=True)
    if why == "hopeless":
        last = next(row["reason"] for row in reversed(rows) if row["reason"])
        return Failed(message=f"every trial fails, the last with: {last}\n{summary}")
    if why == "cut":
        return Cancelled(message=f"cancelled; the same command goes on. {summary}")
    if why == "timeout":
        summary = f"stopped by --timeout; the same command goes on. {summary}"
    return Completed(message=summary)


if __name__ == "__main__":
    run(main)
