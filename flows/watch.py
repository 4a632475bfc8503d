"""Look for new data and for drift, and have the models retrained: once a batch, not once a file.

    python -m flows.watch                          # one look, on the server of PREFECT_API_URL
    python -m flows.watch --retrain                # one look; retrains here and now where needed
    python -m flows.watch --follow --every 60      # a look a minute

What lands where, and what is checked, is told by `pipelines.landing`; what drift is, by
`pipelines.drift`. The folders and bounds stand in params.yaml under `watch`.

Events, for the triggers of deployments (`type: event` in prefect.yaml; `expect` takes the name,
`match` the resource, and parameters may use the payload, as in `{{ event.payload.version }}`):

- `grimace.data.new`, of the resource `grimace.data.folder`: a new version of the dataset `folder`
  was made, and a task learns from it. Payload: `version` (number), `archive` (its name in
  params.yaml), `sha256`, `added` (pictures), `tasks` (names of those that learn from it).
- `grimace.data.drift`, of the resource `grimace.data.unlabelled`: pictures without labels are no
  longer like those that a task was trained on. Payload: `batch` (its name), `images` (how many),
  `drift` (by task, the names of what has drifted), `reports` (by task, the folder with drift.json
  and index.html).

Each is sent once for each version or batch. A look that is killed just after sending sends it again
with the same id, which Prefect keeps once; at worst another retrain finds that nothing changed.
What could not be measured of a batch is tried again by later looks, three times in all; drift that
is found then is an event of its own.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import NAMESPACE_URL, uuid5

from flows.lock import BusyError, alone
from flows.retrain import TASKS, prefect_server, retrain
from flows.supervise import Lifeline, supervise
from pipelines import journal, landing
from pipelines.cli import GrimaceError, run
from pipelines.datasets import OWN
from pipelines.params import Params, TaskName, load_params

# After the imports of ours, which set what Prefect reads from the environment.
from prefect import flow, get_client, get_run_logger, task  # isort: skip
from prefect.artifacts import create_markdown_artifact  # isort: skip
from prefect.cache_policies import NO_CACHE  # isort: skip
from prefect.events import Event, Resource  # isort: skip
from prefect.settings import PREFECT_API_URL  # isort: skip
from prefect.states import Completed, Failed, State  # isort: skip
from flows.notify import tell, tell_failure  # isort: skip

REPORTS = Path("reports/drift")
NEW, DRIFT = "grimace.data.new", "grimace.data.drift"
TRIES = 3  # of a batch whose drift cannot be measured

Trigger = Literal["event", "retrain", "none"]


class Measured(NamedTuple):
    """What came of a batch: the reason to retrain, a line a task, whether all were measured."""

    reason: "Reason | None"
    lines: Sequence[str]
    whole: bool


class Reason(NamedTuple):
    """Why the models are to be retrained: an event, its resource, and what it says."""

    event: str
    resource: str
    key: str
    payload: dict[str, Any]


def main() -> None:
    """Parse the command line and look, once or again and again."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.watch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--retrain",
        action="store_true",
        help="run the flow `retrain` here where there is reason to, rather than send an event",
    )
    parser.add_argument("--follow", action="store_true", help="look again and again, until stopped")
    parser.add_argument(
        "--every",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="with --follow, from the end of a look to the next (default: %(default)s)",
    )
    arguments = parser.parse_args()
    load_params()  # mistakes are told here, before a server is started
    trigger: Trigger = "retrain" if arguments.retrain else "event"
    if trigger == "event" and not PREFECT_API_URL.value():
        trigger = "none"
        print(
            "no server hears of new data here: set PREFECT_API_URL, or retrain here with --retrain",
            file=sys.stderr,
        )
    # Left to itself SIGTERM would end us on the spot, without a word to Prefect.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with prefect_server():
        while True:
            if arguments.follow:
                print(one_of_many(trigger), flush=True)
                time.sleep(arguments.every)
                continue
            state = watch(trigger, return_state=True)
            if not state.is_completed():
                raise GrimaceError(state.message or f"the look ended as {state.name}")
            print(state.message)
            return


def one_of_many(trigger: Trigger) -> str:
    """Look, and say what came of it; a server that is away for a while ends nothing."""
    try:
        state = watch(trigger, return_state=True)
    except Exception as error:  # of Prefect's own, which has no run yet to fail
        return f"this look came to nothing: {type(error).__name__}: {error}"
    return state.message or str(state.name)


@flow(name="watch", on_failure=[tell_failure], on_crashed=[tell_failure])
def watch(trigger: Trigger = "event") -> State[Any]:
    """Look once at the landing folders named in params.yaml of the current folder.

    Where anything was found, leaves the artefact `grimace-watch` in Prefect: what was taken, what
    waits, and which drift was measured.

    Args:
        trigger: what new data and drift bring about: "event" sends events, "retrain" runs that
            flow here, "none" leaves both to a later look.

    Raises:
        GrimaceError: as `pipelines.landing.look`.
    """
    params = load_params()
    seen = look(params)
    said = [str(seen)]
    batches = journal.pending_batches()
    with Lifeline() as lifeline:
        drifts = [measure(batch, params, lifeline) for batch in batches]
    said += [told for drift in drifts for told in drift.lines]
    reasons = [drift.reason for drift in drifts if drift.reason]
    records = journal.pending_versions()
    learning = [name for name in TASKS if params.tasks.named(name).dataset == OWN]
    if records and not learning:
        said.append(f"no task learns from {OWN}: name it as dataset under `tasks` in params.yaml")
    elif records:
        reasons += [new_data(record, learning) for record in records]
    failed, settled = False, trigger != "none"
    if trigger == "event":
        send(reasons)
        said += [f"sent {reason.event}" for reason in reasons]
    elif trigger == "retrain" and reasons:
        state = retrain(return_state=True)
        said.append(f"retrain: {state.message or state.name}")
        # Where it did not come to work, a later look asks for it again.
        settled = state.name != "Busy" and not state.is_cancelled()
        failed = settled and not state.is_completed()
    if settled or not learning:
        for record in records:
            journal.told_of_version(record["version"])
    if settled:
        for batch, drift in zip(batches, drifts, strict=True):
            if drift.whole or (tries := journal.tried(batch)) >= TRIES:
                journal.told_of_batch(batch)
            elif tries:
                said.append(f"{batch} will be measured again ({tries} of {TRIES} tries)")
    if seen.version or seen.batch or seen.quarantined or drifts or records:
        create_markdown_artifact(
            "\n".join(f"- {line}" for line in said),
            key="grimace-watch",
            description="What has landed, and what came of it.",
        )
    message = "\n".join(said)
    return Failed(message=message) if failed else Completed(message=message)


@task(cache_policy=NO_CACHE)
def look(params: Params) -> landing.Look:
    """Take what has landed, unless a flow is at work on the data as they are."""
    try:
        with alone("a look at what has landed"):
            seen = landing.look(params)
    except BusyError as error:
        seen = landing.Look(waiting=(f"what may have landed waits: {error.holder}",))
    get_run_logger().info("%s", seen)
    return seen


def measure(batch: str, params: Params, lifeline: Lifeline) -> Measured:
    """Measure the drift of a batch for each task, unless it was measured before."""
    moved: dict[str, list[str]] = {}
    reports: dict[str, str] = {}
    images, lines, whole = 0, [], True
    for name in TASKS:
        out = REPORTS / name / batch
        wrong = ""
        if not (out / "drift.json").exists():
            wrong = measure_task(batch, name, out, lifeline)
        if wrong:
            tell("failed", f"drift of {batch}", f"{name}: {wrong}")
            lines.append(f"drift for {name} could not be measured: {wrong}")
            whole = False
            continue
        result = json.loads((out / "drift.json").read_text())
        names = [row["name"] for row in result["statistics"] if row["drifted"]]
        images, reports[name] = result["incoming"], str(out)
        if names:
            moved[name] = names
        uncomputed = next((row["why"] for row in result["statistics"] if row["why"]), "")
        said = ", ".join(names) or uncomputed or "none"
        lines.append(f"drift of {batch} from what {name} was trained on: {said} ({out})")
    payload = {"batch": batch, "images": images, "drift": moved, "reports": reports}
    key = "/".join([batch, *moved])
    reason = Reason(DRIFT, "grimace.data.unlabelled", key, payload) if moved else None
    return Measured(reason, lines, whole)


@task(task_run_name="drift {name} {batch}", cache_policy=NO_CACHE)
def measure_task(batch: str, name: TaskName, out: Path, lifeline: Lifeline) -> str:
    """Run `pipelines.drift` for one task; return what went wrong, "" where nothing did."""
    logger = get_run_logger()
    images = str(journal.UNLABELLED / batch)
    outcome = supervise(
        [
            *(sys.executable, "-m", "pipelines.drift", "--task", name),
            *("--images", images, "--out", str(out)),
        ],
        lifeline,
        lambda line: logger.info("drift %s | %s", name, line),
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    if outcome.reason == "ok":
        return ""
    errors = [line for line in outcome.lines if line.startswith("error: ")]
    return (errors or outcome.lines or [f"exit code {outcome.code}"])[-1].removeprefix("error: ")


def new_data(record: Mapping[str, Any], tasks: Sequence[TaskName]) -> Reason:
    """Say that there is a new version."""
    payload = {name: record[name] for name in ("version", "archive", "sha256", "added")}
    key = f"{record['version']}/{record['sha256']}/{record['time']}"
    return Reason(NEW, f"grimace.data.{OWN}", key, payload | {"tasks": [*tasks]})


def send(reasons: Sequence[Reason]) -> None:
    """Send the events to Prefect, and return when it has them.

    `emit_event` would leave that to a thread, which cannot say that the server was away.
    """
    if not reasons:
        return
    events = [
        Event(
            id=uuid5(NAMESPACE_URL, f"{reason.event}/{reason.key}"),
            event=reason.event,
            resource=Resource(
                {
                    "prefect.resource.id": reason.resource,
                    "prefect.resource.name": reason.resource,
                }
            ),
            payload=reason.payload,
        ).model_dump(mode="json")
        for reason in reasons
    ]
    with get_client(sync_client=True) as client:
        client.request("POST", "/events", json=events)


if __name__ == "__main__":
    run(main)
