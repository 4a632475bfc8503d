"""Bring everything up to date: the stages of dvc.yaml, in order and side by side, under Prefect.

Every stage is a Prefect task that runs `dvc repro` for that stage alone, once the stages it
needs are done. DVC decides what has changed; Prefect shows, retries, schedules and cancels. What
`verify` has measured is then registered, judged, and promoted if it is blessed.
"""

import argparse
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from base64 import b64encode
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from graphlib import TopologicalSorter
from io import BytesIO
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated, Any, Literal, NamedTuple, get_args

from PIL import Image
from pydantic import Field

from flows.lock import BusyError, GivenUpError, alone, refuse_if_held
from flows.supervise import Lifeline, Outcome, supervise
from pipelines import registry
from pipelines.cli import GrimaceError, run
from pipelines.params import TaskName, load_params

# A busy machine takes its time to start a server; Prefect reads this when imported.
SERVER_START_SECONDS = 120
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", str(SERVER_START_SECONDS))

import httpx  # noqa: E402
from prefect import flow, get_run_logger, runtime, task  # noqa: E402
from prefect.artifacts import create_image_artifact, create_markdown_artifact  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.orchestration import SyncPrefectClient  # noqa: E402
from prefect.client.schemas.objects import TaskRun  # noqa: E402
from prefect.context import FlowRunContext  # noqa: E402
from prefect.events.worker import EventsWorker  # noqa: E402
from prefect.exceptions import PrefectHTTPStatusError  # noqa: E402
from prefect.futures import PrefectFuture  # noqa: E402
from prefect.logging.handlers import APILogWorker  # noqa: E402
from prefect.settings import PREFECT_API_URL, temporary_settings  # noqa: E402
from prefect.states import Cancelled, Completed, Failed, State  # noqa: E402

from flows.notify import tell, tell_failure  # noqa: E402
from flows.promote import TASKS, promote  # noqa: E402

RESULTS = Path("reports/report/results.md")
# Not stages of DVC: they depend on the champion, which is no file of the repository.
AFTER_VERIFY = ("register", "gate")
RETRIES = 2
DOWNLOAD_RETRY_SECONDS = 20.0
BUSY_RETRY_SECONDS = 3.0
# How long a cancellation in Prefect may go unnoticed where no worker acts on it.
CANCEL_POLL_SECONDS = 2.0
SHOWN_LINES = 10


Ending = Literal["ran", "restored", "unchanged", "failed", "skipped", "cancelled"]


class StageRun(NamedTuple):
    """What became of a stage; one that was "restored" came out of DVC's cache of earlier runs."""

    stage: str
    state: Ending
    seconds: float
    message: str = ""


def main() -> None:
    """Parse the command line and run the flow in this process."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.retrain",
        description="Run the stages of dvc.yaml that are out of date, with Prefect: on the server "
        "that PREFECT_API_URL names, or on a temporary one.",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        metavar="STAGE",
        help="only these stages and what they need, e.g. `train@emotion-plain`, or `train` for "
        "every train stage (default: all)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="how many stages may run at the same time (default: %(default)s)",
    )
    parser.add_argument(
        "--wait",
        action="store_true",
        help="where another flow is at work here, wait for its end instead of saying so",
    )
    arguments = parser.parse_args()
    # Mistakes are told here, before a server is started.
    if arguments.workers < 1:
        raise GrimaceError(f"--workers {arguments.workers}: at least 1 stage has to run at a time.")
    stage_graph(arguments.targets)
    if not arguments.wait:
        refuse_if_held()

    # Left to itself SIGTERM would end us on the spot, without a word to Prefect.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with prefect_server():
        state = retrain(arguments.targets, arguments.workers, arguments.wait, return_state=True)
    if not state.is_completed():
        raise GrimaceError((state.message or f"the run ended as {state.name}").splitlines()[0])
    print(state.message)


@contextmanager
def prefect_server() -> Iterator[None]:
    """Use the server that PREFECT_API_URL names, or run a temporary one for the block.

    Prefect would start one by itself, but among the processes of this terminal: Ctrl-C would
    end it before us (who then call it in vain for two minutes), and SIGKILL would leave it
    running for ever.
    """
    if url := PREFECT_API_URL.value():
        if not answers(url):
            raise GrimaceError(
                f"PREFECT_API_URL names {url}, where no Prefect server answers; start it with "
                "`python -m flows.up`, or unset PREFECT_API_URL for a temporary one"
            )
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "flows.server", "--no-ui"]
    said: deque[str] = deque(maxlen=SHOWN_LINES)
    with Lifeline() as lifeline:
        server = threading.Thread(
            target=supervise,
            args=([*command, "--host", "127.0.0.1", "--port", str(port)], lifeline, said.append),
        )
        server.start()
        print("starting a temporary Prefect server", file=sys.stderr)
        give_up = time.monotonic() + SERVER_START_SECONDS
        while not answers(url):
            if not server.is_alive() or time.monotonic() > give_up:
                raise GrimaceError(f"no Prefect server could be started: {' '.join(said)}")
            time.sleep(0.3)
        with temporary_settings({PREFECT_API_URL: url}):
            try:
                yield
            finally:
                # What is still on its way to the server has to arrive before that goes.
                APILogWorker.drain_all(timeout=5)
                EventsWorker.drain_all(timeout=5)


def answers(url: str) -> bool:
    """Whether a Prefect server is up at this address."""
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False


@flow(name="retrain", on_failure=[tell_failure], on_crashed=[tell_failure])
def retrain(
    targets: list[str] | None = None,
    workers: Annotated[int, Field(ge=1)] = 2,
    wait: bool = False,
) -> State[Any]:
    """Run the stages of the dvc.yaml in the current folder that are out of date.

    A stage that fails fails the flow and skips what needs it; the others are still run. Each
    task's candidate is registered, judged, and promoted if it is blessed; one that is not fails
    nothing. Leaves artefacts in Prefect: `grimace-stages`, what became of each stage;
    `grimace-results`, the table that the stage `report` writes; `grimace-views-TASK`, the contact
    sheet of new shards; and `grimace-gates-TASK`.

    Args:
        targets: names of stages, or of groups of them (`train`), that are brought up to date
            together with everything they need; all by default.
        workers: how many stages may run at the same time.
        wait: for the end of another flow that is at work in this folder; it fails otherwise.

    Raises:
        GrimaceError: there is no dvc.yaml, or it cannot be read, or has no such target.
    """
    try:
        with in_workspace(wait) as lock:
            upstream = stage_graph(targets)  # whoever was waited for may have changed it
            with Lifeline(lock) as lifeline:
                runs = run_graph(upstream, workers, lifeline)
                cancelled = lifeline.is_cut()
            publish(runs)
            return verdict(runs, [] if cancelled else decide(runs))
    except BusyError as error:
        return Failed(name="Busy", message=str(error))
    except GivenUpError as error:
        return Cancelled(message=str(error))


def in_workspace(wait: bool) -> AbstractContextManager[int]:
    """Hold the workspace for the flow that calls this, as `alone` says."""
    what = f"{runtime.flow_run.flow_name} {runtime.flow_run.name!r}"
    say = get_run_logger().info
    return alone(
        what, wait, on_wait=lambda who: say("waiting: %s", who), given_up=is_cancelled_in_prefect
    )


def stage_graph(targets: Iterable[str] | None = None) -> dict[str, set[str]]:
    """Read dvc.yaml: each stage that the targets need, with the stages it needs itself.

    After each `verify@TASK` come `register@TASK` and `gate@TASK`.
    """
    if not Path("dvc.yaml").is_file():
        raise GrimaceError(
            f"there is no dvc.yaml in {Path.cwd()}. Run this in the root folder of the repository."
        )
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            graph = repo.index.graph
            upstream = {
                stage.addressing: {needed.addressing for needed in graph.successors(stage)}
                for stage in graph
            }
    except DvcException as error:
        raise GrimaceError(f"DVC cannot read dvc.yaml here: {error}") from error
    for stage in sorted(upstream):
        kind, _, task = stage.partition("@")
        if kind == "verify" and task:
            upstream[f"register@{task}"] = {stage}
            upstream[f"gate@{task}"] = {f"register@{task}"}
    return upstream if targets is None else needed_for(targets, upstream)


def needed_for(targets: Iterable[str], upstream: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The part of a graph that the targets stand on."""
    needed: set[str] = set()
    for target in targets:
        found = {stage for stage in upstream if target in (stage, stage.partition("@")[0])}
        if not found:
            raise GrimaceError(
                f"dvc.yaml has no stage {target!r}. It has: {', '.join(sorted(upstream))}."
            )
        needed |= found
    reached = deque(needed)
    while reached:
        new = upstream[reached.popleft()] - needed
        needed |= new
        reached.extend(new)
    return {stage: above for stage, above in upstream.items() if stage in needed}


def up_to_date(upstream: Mapping[str, set[str]]) -> set[str]:
    """Stages of DVC that are as dvc.lock has them, and so is all that they need.

    One look at the whole takes about as long as DVC takes to find that a single stage is so. It is
    no more than a short cut: without an answer each stage is asked by itself.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            changed = repo.status()
    except DvcException:  # locked, say
        return set()
    fresh: set[str] = set()
    for stage in TopologicalSorter(upstream).static_order():
        ours = stage.partition("@")[0] not in AFTER_VERIFY
        if ours and stage not in changed and upstream[stage] <= fresh:
            fresh.add(stage)
    return fresh


def run_graph(upstream: Mapping[str, set[str]], workers: int, lifeline: Lifeline) -> list[StageRun]:
    """Run every stage once, after those it needs, at most `workers` at a time."""
    fresh = up_to_date(upstream)
    sorter = TopologicalSorter(upstream)
    sorter.prepare()
    ready: deque[str] = deque()
    futures: dict[str, PrefectFuture[Any]] = {}
    finished: SimpleQueue[str] = SimpleQueue()
    runs: list[StageRun] = []
    running = 0
    while sorter.is_active():
        ready.extend(sorted(sorter.get_ready()))
        # Not left to the task runner: in its pool, tasks that only wait hold a place as well.
        while ready and running < workers:
            stage = ready.popleft()
            needed = [futures[above] for above in upstream[stage]]
            futures[stage] = run_stage.submit(
                stage, lifeline, stage in fresh, wait_for=needed, return_state=False
            )
            futures[stage].add_done_callback(partial(report_end, finished, stage))
            running += 1
        stage = next_finished(finished, lifeline)
        running -= 1
        futures[stage].wait()
        runs.append(stage_run(stage, futures[stage].state))
        sorter.done(stage)
    return runs


def report_end(finished: SimpleQueue[str], stage: str, _: PrefectFuture[Any]) -> None:
    """Called in the thread of a task when it ends."""
    finished.put(stage)


def next_finished(finished: SimpleQueue[str], lifeline: Lifeline) -> str:
    """Wait for a stage to end, and meanwhile for somebody to cancel the run in Prefect."""
    while True:
        try:
            return finished.get(timeout=CANCEL_POLL_SECONDS)
        except Empty:
            if not lifeline.is_cut() and is_cancelled_in_prefect():
                lifeline.cut()


def is_cancelled_in_prefect() -> bool:
    """Ask the server; the worker that runs a deployment does so itself, and sends us a signal."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.deployment_id is not None:
        return False
    assert isinstance(context.client, SyncPrefectClient)
    try:
        state = context.client.read_flow_run(context.flow_run.id).state
    except (httpx.HTTPError, PrefectHTTPStatusError):
        return False  # a server that is away for a moment stops nothing
    return state is not None and (state.is_cancelling() or state.is_cancelled())


def worth_retrying(_task: object, task_run: TaskRun, state: State[Any]) -> bool:
    """A download may do better later, and so may a stage that another DVC process was in."""
    return is_download(task_run.name) or "it is being blocked by" in (state.message or "")


def is_download(stage: str) -> bool:
    """Whether a stage depends on the network."""
    return stage.partition("@")[0] == "download"


@task(
    task_run_name="{stage}",
    retries=RETRIES,
    retry_condition_fn=worth_retrying,
    cache_policy=NO_CACHE,  # what has changed is for DVC to say
)
def run_stage(stage: str, lifeline: Lifeline, fresh: bool = False) -> State[StageRun]:
    """Bring one stage up to date, unless it is `fresh`; what it needs is.

    Registering and judging are commands of their own, with nothing to do where what is here was
    promoted or rejected before.

    DVC keeps the rest in order: it holds its repository lock while it reads and writes
    dvc.lock, and lets go of it while the stage's command runs, so several stages can run.
    """
    logger = get_run_logger()
    if retry := runtime.task_run.run_count - 1:
        # Waited for here and not by Prefect, whose wait could not be cancelled.
        pause = DOWNLOAD_RETRY_SECONDS if is_download(stage) else BUSY_RETRY_SECONDS
        lifeline.is_cut(within_seconds=retry * pause)
    started = time.monotonic()
    kind, _, name = stage.partition("@")
    if fresh:
        return Completed(name="Unchanged", data=StageRun(stage, "unchanged", 0.0))
    if kind in AFTER_VERIFY:
        if registry.is_settled(task_named(name), load_params()):
            seconds = time.monotonic() - started
            return Completed(name="Unchanged", data=StageRun(stage, "unchanged", seconds))
        command = ["-m", f"pipelines.{kind}", "--task", name]
    else:
        # Waiting for the lock: DVC would else give up after three seconds, even with the
        # hours of a training just behind it, when another stage is storing a large output.
        command = ["-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
    outcome = supervise(
        [sys.executable, *command],
        lifeline,
        lambda line: logger.info("%s | %s", stage, line),
        env={
            **os.environ,
            # `python` in dvc.yaml is the one that runs this flow, whoever started it.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONUNBUFFERED": "1",
        },
    )
    return prefect_state(stage, outcome, time.monotonic() - started)


def prefect_state(stage: str, outcome: Outcome, seconds: float) -> State[StageRun]:
    """What Prefect is told about a stage; the names of the states are ours."""
    if outcome.reason == "cancelled":
        return Cancelled(
            message=f"stage {stage!r} was cancelled",
            data=StageRun(stage, "cancelled", seconds),
        )
    if outcome.reason != "ok":
        return Failed(message=failure(stage, outcome), data=StageRun(stage, "failed", seconds))
    if f"Stage '{stage}' didn't change, skipping" in outcome.lines:
        return Completed(name="Unchanged", data=StageRun(stage, "unchanged", seconds))
    if any(line.startswith(f"Stage '{stage}' is cached") for line in outcome.lines):
        return Completed(name="Restored", data=StageRun(stage, "restored", seconds))
    return Completed(data=StageRun(stage, "ran", seconds))


def failure(stage: str, outcome: Outcome) -> str:
    """Why a stage failed, in one line, followed by its last lines of output."""
    output = "\n".join(outcome.lines)
    code = re.search(r"exited with (-?\d+)$", output, re.MULTILINE)
    if outcome.reason == "killed" or (code and int(code[1]) < 0):
        number = outcome.code if outcome.reason == "killed" else -int(code[1]) if code else 0
        why = f"killed by {signal.Signals(number).name}"
        if number == signal.SIGKILL:
            why += ", most likely for want of memory"
    else:
        # DVC's own last words only say that the command failed.
        own = [line for line in outcome.lines if not line.startswith("ERROR: failed to reproduce")]
        said = own if code and own else outcome.lines
        why = said[-1] if said else f"exit code {outcome.code}"
    last = "\n".join(outcome.lines[-SHOWN_LINES:])
    return f"stage {stage!r} failed: {why}\n{last}"


def stage_run(stage: str, state: State[Any]) -> StageRun:
    """Read back what a stage's task left in Prefect."""
    if state.name == "NotReady":
        return StageRun(stage, "skipped", 0.0)
    result = state.result(raise_on_failure=False)
    if not isinstance(result, StageRun):  # an exception that nobody foresaw
        return StageRun(stage, "failed", 0.0, f"stage {stage!r}: {state.message}")
    return result._replace(message=state.message or "") if result.state == "failed" else result


def publish(runs: list[StageRun]) -> None:
    """Leave the artefacts; the results only if they are this run's."""
    create_markdown_artifact(
        stages_table(runs), key="grimace-stages", description="What became of each stage."
    )
    reported = any(
        run.stage == "report" and run.state in ("ran", "unchanged", "restored") for run in runs
    )
    if reported and RESULTS.is_file():
        create_markdown_artifact(
            RESULTS.read_text(encoding="utf-8"),
            key="grimace-results",
            description="Every model, judged on data that it has not seen.",
        )
    for stage in (ended.stage for ended in runs if ended.state in ("ran", "restored")):
        kind, _, name = stage.partition("@")
        sheet = Path("reports/augment", name, "views.png")
        if kind == "augment" and sheet.is_file():
            create_image_artifact(
                inlined(sheet),
                key=f"grimace-views-{name}",
                description="What training sees: augmented views, with their points.",
            )


def inlined(picture: Path) -> str:
    """A picture as an address that holds it all, because Prefect keeps addresses alone."""
    packed = BytesIO()
    with Image.open(picture) as opened:
        opened.convert("RGB").save(packed, "WEBP", quality=80)
    return f"data:image/webp;base64,{b64encode(packed.getvalue()).decode()}"


def stages_table(runs: list[StageRun]) -> str:
    """A Markdown table of the stages in the order in which they ended."""
    rows = [f"| {run.stage} | {run.state} | {run.seconds:.1f} |" for run in runs]
    text = "\n".join(["| stage | state | seconds |", "| --- | --- | ---: |", *rows])
    details = "".join(f"\n\n```text\n{run.message}\n```" for run in runs if run.message)
    return text + details


class Decision(NamedTuple):
    """What came of a task's candidate; one that has `failed` is decided on by the next run."""

    said: str
    failed: bool = False


def decide(runs: list[StageRun]) -> list[Decision]:
    """Promote what the gate has blessed, tell of what it has not.

    What was promoted or refused is settled. Where the champion could not be asked or has changed
    since, or the store was away, nothing was decided, and the next run judges again.
    """
    from pipelines.gate import is_final

    decisions = []
    for stage in (ended.stage for ended in runs if ended.state == "ran"):
        kind, _, name = stage.partition("@")
        if kind != "gate":
            continue
        judged, folder = task_named(name), Path("reports/gate", name)
        params = load_params()
        blessing = json.loads((folder / "blessing.json").read_text())
        create_markdown_artifact(
            (folder / "gates.md").read_text(encoding="utf-8"),
            key=f"grimace-gates-{judged}",
            description=f"What the candidate for {judged} had to meet.",
        )
        if blessing["blessed"]:
            state = promote(
                judged,
                why="retrained and blessed",
                who="retrain",
                sha256=blessing["sha256"],
                return_state=True,
            )
            promoted, refused = state.is_completed(), state.name == "Refused"
            lost = not (promoted or refused or state.name == "Stale")
            decisions.append(Decision(f"{judged}: {state.message or state.name}", lost))
        else:
            failed = [row for row in blessing["gates"] if not (row["passed"] or row["overridden"])]
            why = "\n".join(f"{row['name']}: {row['why']}" for row in failed)
            tell("rejected", judged, f"{len(failed)} gates failed\n{why}")
            names = ", ".join(row["name"] for row in failed)
            decisions.append(Decision(f"{judged}: rejected, {names}"))
            promoted = False
            refused = all(is_final(row) for row in failed)
        if promoted or refused:
            champion = blessing["champion"]
            against = None if promoted else champion["version"] if champion else 0
            registry.settle(judged, params, against)
    return decisions


def task_named(name: str) -> TaskName:
    """A task by the name that it has in dvc.yaml."""
    for known in TASKS:
        if known == name:
            return known
    raise GrimaceError(f"dvc.yaml: verify@{name}: there is no task of this name")


def verdict(runs: list[StageRun], decisions: Sequence[Decision] = ()) -> State[None]:
    """The state of the flow: cancelled or failed where any of its stages or promotions is."""
    counts = Counter(run.state for run in runs)
    summary = ", ".join(f"{counts[state]} {state}" for state in get_args(Ending) if counts[state])
    if counts["cancelled"]:
        return Cancelled(message=f"the run was cancelled ({summary})")
    messages = [run.message.splitlines() for run in runs if run.state == "failed"]
    messages += [[f"promotion failed: {said}"] for said, failed in decisions if failed]
    told = [said for said, failed in decisions if not failed]
    if messages:
        reasons = "; ".join(first for first, *_ in messages)
        last_lines = [line for _, *lines in messages for line in lines]
        return Failed(message="\n".join([f"{reasons} ({summary})", *told, *last_lines]))
    if counts["unchanged"] == len(runs):
        return Completed(message=f"nothing changed ({len(runs)} stages)")
    return Completed(message="\n".join([f"{len(runs)} stages: {summary}", *told]))


if __name__ == "__main__":
    run(main)
