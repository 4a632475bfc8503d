"""Promote a blessed candidate, roll a champion back, show where the champion comes from.

    python -m flows.promote --show
    python -m flows.promote --task emotion --why "measured in the app, too"
    python -m flows.promote --task emotion --rollback --why "blinks on phones"

What is not blessed is refused, and there is no way round it but to sign for a gate in params.yaml
(`gate.overrides`). Where PREFECT_API_URL names a server these are flow runs there; without one they
are done all the same, at once.
"""

import argparse
from collections.abc import Sequence
from typing import Any, get_args

from pipelines import lineage, registry
from pipelines.cli import GrimaceError, run
from pipelines.params import TaskName, load_params

# After the imports of ours, which set what Prefect reads from the environment.
from prefect import flow  # isort: skip
from prefect.artifacts import create_markdown_artifact  # isort: skip
from prefect.client.schemas.objects import FlowRun  # isort: skip
from prefect.flows import Flow  # isort: skip
from prefect.settings import PREFECT_API_URL  # isort: skip
from prefect.states import Completed, Failed, State  # isort: skip

from flows.notify import What, tell, tell_failure  # isort: skip

TASKS: Sequence[TaskName] = get_args(TaskName)


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.promote",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", choices=TASKS, help="whose model; --show shows all by default")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--show", action="store_true", help="champion, blessing, lineage, history")
    what.add_argument("--rollback", action="store_true", help="back to the champion before")
    parser.add_argument("--version", type=int, help="to promote; default: the alias `candidate`")
    parser.add_argument("--to", type=int, metavar="VERSION", help="a former champion to go back to")
    parser.add_argument("--why", default="", help="for the audit trail; asked for, unless --show")
    args = parser.parse_args()
    if args.to is not None and not args.rollback:
        parser.error("--to says where --rollback goes; what is promoted is named by --version")
    if args.version is not None and (args.rollback or args.show):
        parser.error("--version says what to promote; a rollback goes --to a version")
    if args.show:
        for task in [args.task] if args.task else TASKS:
            print(show(task))
        return
    if not args.task or not args.why.strip():
        parser.error("--task and --why are needed: the audit trail keeps who, when and why")
    who = registry.whoami()
    served = bool(PREFECT_API_URL.value())
    if args.rollback:
        go_back = rollback if served else rollback.fn
        state = go_back(args.task, args.to, args.why, who, **_state_of(served))
    else:
        forward = promote if served else promote.fn
        state = forward(args.task, args.version, args.why, who, **_state_of(served))
    if not state.is_completed():
        raise GrimaceError(state.message or f"ended as {state.name}")
    print(state.message)


def _state_of(served: bool) -> dict[str, Any]:
    return {"return_state": True} if served else {}


def tell_unless_refused(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook for `on_failure`: of what was refused, the flow itself has told."""
    if state.name == "Failed":
        tell_failure(flow, flow_run, state)


@flow(
    name="promote",
    flow_run_name="promote {task}",
    on_failure=[tell_unless_refused],
    on_crashed=[tell_failure],
)
def promote(
    task: TaskName,
    version: int | None = None,
    why: str = "",
    who: str = "Prefect",
    sha256: str | None = None,
) -> State[Any]:
    """Make a blessed version of `grimace-TASK` the champion.

    What is refused ends Refused, or Stale where judging it anew may help; Failed tells that
    nothing was decided.

    Args:
        task: whose model.
        version: its number; by default the one with the alias `candidate`.
        why: for the audit trail.
        who: asks for it.
        sha256: of a blessing, in place of a version: what a flow has just had judged. Nobody looks
            on then, and a network that was rolled back stays away.
    """
    try:
        _ask_why(why)
        store = registry.Registry(load_params().tracking, task)
        if sha256 is not None:
            version = store.with_bytes(sha256)
        elif version is None:
            version = store.aliases().get("candidate")
        if version is None:
            raise GrimaceError(f"{store.name} has no candidate; register one first")
        event = store.promote(version, who, why, unattended=sha256 is not None)
    except (registry.RefusedError, registry.StaleBlessingError) as error:
        tell("rejected", task, str(error))
        stale = isinstance(error, registry.StaleBlessingError)
        return Failed(name="Stale" if stale else "Refused", message=str(error))
    except GrimaceError as error:
        return Failed(message=str(error))
    if event is None:
        return Completed(message=f"{store.name} version {version} is the champion already")
    return _moved(store, event)


@flow(
    name="rollback",
    flow_run_name="roll back {task}",
    on_failure=[tell_failure],
    on_crashed=[tell_failure],
)
def rollback(
    task: TaskName, to: int | None = None, why: str = "", who: str = "Prefect"
) -> State[Any]:
    """Make a former champion of `grimace-TASK` the champion again.

    Args:
        task: whose model.
        to: its version; by default the one that the champion took the place of.
        why: for the audit trail.
        who: asks for it.
    """
    try:
        _ask_why(why)
        store = registry.Registry(load_params().tracking, task)
        event = store.rollback(to, who, why)
    except GrimaceError as error:
        return Failed(message=str(error))
    return _moved(store, event)


def _ask_why(why: str) -> None:
    if not why.strip():
        raise GrimaceError("say why: the audit trail keeps who moved the champion, when and why")


def _moved(store: registry.Registry, event: registry.Event) -> State[Any]:
    done: What = "promoted" if event.action == "promote" else "rolled_back"
    before = f"version {event.before}" if event.before else "none"
    signed = "".join(
        f"\noverridden: {row['gate']}, by {row['who']}: {row['reason']}" for row in event.overrides
    )
    text = f"{store.name}: champion is version {event.after}, before: {before}"
    tell(done, store.task, f"{text}. {event.who}: {event.why}{signed}")
    if PREFECT_API_URL.value():
        create_markdown_artifact(
            f"{text}{signed}\n\n{history(store)}",
            key=f"grimace-champion-{store.task}",
            description="Every move of the champion.",
        )
    return Completed(message=text)


def show(task: TaskName) -> str:
    """Return the champion's record: blessing, lineage back to raw data, and every move.

    Raises:
        GrimaceError: the champion is lost, or its files or blessing are not whole.
    """
    store = registry.Registry(load_params().tracking, task)
    number = store.champion()
    if number is None:
        return f"{store.name}: no champion yet\n"
    blessing, folder = store.blessing(number), store.fetch(number)
    store.check_bytes(number, blessing)
    aliases = ", ".join(f"{alias} {on}" for alias, on in sorted(store.aliases().items()))
    signed = [row for row in blessing["gates"] if row["overridden"]]
    failed = [r["name"] for r in blessing["gates"] if not (r["passed"] or r["overridden"])]
    state = f"NOT BLESSED, fails {', '.join(failed)}" if failed else "blessed"
    trail = store.trail()
    by_hand = not trail or number not in (trail[-1].after, trail[-1].before)
    lines = [
        f"{store.name}: champion version {number} ({aliases})",
        *(
            ["moved      by hand: the audit trail knows nothing of this champion"]
            if by_hand
            else []
        ),
        f"{state:<10} {len(blessing['gates'])} gates, {blessing['basis']}",
        *(
            f"signed for {row['name']}, by {row['overridden']['who']}: "
            f"{row['overridden']['reason']}"
            for row in signed
        ),
        f"bytes      sha256 {blessing['sha256']}, {len(blessing['files'])} files, as blessed",
        *lineage.lines_of(folder, task),
        f"again      {lineage.command(task, number)}",
    ]
    return "\n".join([*lines, "", history(store)])


def history(store: registry.Registry) -> str:
    """Return every move of the champion that came to its end, as Markdown."""
    rows = [
        f"| {e.when} | {e.action} | {e.before or ''} | {e.after} | {e.who} | "
        f"{' '.join(e.why.split()).replace('|', chr(92) + '|')} |"
        for e in store.moves()
    ]
    return "\n".join(
        [
            "| when | what | from | to | who | why |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    run(main)
