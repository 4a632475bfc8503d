"""What Prefect costs: `flows.retrain` beside bare `dvc repro`, and a hundred runs in a row.

    python -m benchmarks.flows --publish                  # all of it, about an hour
    python -m benchmarks.flows --parts nothing --rounds 3 # needs the results in DVC's cache here

Each way of running has its own clone of this repository at HEAD, with its own DVC cache and MLflow
store; the server and worker are those of `flows.up` in one of the clones, up before the clock
starts. Times are those of the whole command, from the start of Python to its end. With nothing to
do the ways take turns, so that what else the machine does falls on all alike; the run from nothing
is done once each way, one after the other. A flow does more than DVC: after `verify` it registers,
judges and promotes. What the first two took is told apart, from its own table of stages; the
promotion is counted as the flow's own. In the long row each run is started by the worker, one after
the other, and finds nothing to do; memory is the resident set of the server and of the worker
process without flow runs.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import Any

import psutil
import yaml

from benchmarks.publication import others_share, show
from flows.up import FOLDER as SERVICE
from pipelines.cli import GrimaceError, run

# After the imports of ours, which set what Prefect reads from the environment.
from prefect.client.orchestration import SyncPrefectClient, get_client  # isort: skip
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey  # isort: skip
from prefect.client.schemas.sorting import ArtifactSort  # isort: skip
from prefect.settings import PREFECT_API_URL, temporary_settings  # isort: skip

OUT = Path("docs/results/flows")
PORTS = {"prefect": 4390, "mlflow": 4391}
DEPLOYMENT = "retrain/nothing"
PARTS = ("full", "nothing", "row")
WAYS = ("dvc", "flow", "flow2")  # flow2: as it comes, two stages at a time
AFTER_DVC = ("register", "gate")
CLEAR_SECONDS = 20  # in which a run's process has to be gone after the run's end
MOST_SECONDS = 600  # that a run with nothing to do may take
LOCKED = re.compile("database is locked", re.IGNORECASE)


def main() -> None:
    """Measure what was asked for, print the page, and publish it when asked."""
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # stops the service
    work = args.work.absolute()
    rmtree(work, ignore_errors=True)
    ways = WAYS if "full" in args.parts else ("dvc", "flow")
    clones = {way: clone(work / way) for way in ways}
    results: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.flows", *sys.argv[1:]]),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "others_share": others_share(),
    }
    with service(clones["flow"]) as client:
        if "full" in args.parts:
            results["full"] = {way: timed(way, folder, client) for way, folder in clones.items()}
        else:
            for folder in clones.values():
                fill(folder, args.cache)
        if {"nothing", "row"} & set(args.parts):
            timed("flow", clones["flow"], client)  # registers and judges what was filled in
        if "nothing" in args.parts:
            results["nothing"] = [
                {way: timed(way, clones[way], client) for way in ("dvc", "flow")}
                for _ in range(args.rounds)
            ]
        if "row" in args.parts:
            results["row"] = in_a_row(clones["flow"], client, args.runs)
    results["left"] = left_in(work)
    show(results, page, OUT if args.publish else None)
    rmtree(work)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="full: the default run from nothing; nothing: one with nothing to do; row: many "
        "of those (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="of `nothing` (default: 5)")
    parser.add_argument("--runs", type=int, default=100, help="of `row` (default: 100)")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(".dvc/cache"),
        help="where the results come from without `full` (default: %(default)s)",
    )
    parser.add_argument("--publish", action="store_true", help=f"write {OUT}")
    parser.add_argument(
        "--work", type=Path, default=Path("data/benchmarks/flows"), help="scratch, some GB"
    )
    return parser.parse_args()


# Where it is measured


def clone(folder: Path) -> Path:
    """Clone this repository, with a prefect.yaml that starts nothing by itself."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    call(["git", "clone", "-q", "--local", str(Path.cwd()), str(folder)], Path.cwd())
    file = folder / "prefect.yaml"
    deployed = yaml.safe_load(file.read_text())
    nightly = next(row for row in deployed["deployments"] if row["name"] == "nightly")
    name = DEPLOYMENT.partition("/")[2]
    deployed["deployments"] = [{**nightly, "name": name, "schedules": []}]
    file.write_text(yaml.safe_dump(deployed, sort_keys=False))
    return folder


def fill(folder: Path, cache: Path) -> None:
    """Bring a clone up to date from a DVC cache; what is not there is made."""
    dvc = [sys.executable, "-m", "dvc"]
    call([*dvc, "remote", "add", "--local", "-d", "here", str(cache.absolute())], folder)
    call([*dvc, "pull", "-q", "--allow-missing"], folder, fails=True)
    call([*dvc, "repro"], folder)


@contextmanager
def service(folder: Path) -> Iterator[SyncPrefectClient]:
    """Prefect server, worker and MLflow UI in a clone, and a client of the server."""
    up = [sys.executable, "-m", "flows.up"]
    try:
        call([*up, *(f"--{name}-port={port}" for name, port in PORTS.items())], folder)
        with (
            temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{PORTS['prefect']}/api"}),
            get_client(sync_client=True) as client,
        ):
            yield client
    finally:
        call([*up, "--stop"], folder)


def call(command: list[str], folder: Path, fails: bool = False) -> None:
    """Run a command in a clone as a user would; its output is shown only if it fails."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    done = subprocess.run(
        command,
        cwd=folder,
        env={
            **inherited,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PREFECT_API_URL": f"http://127.0.0.1:{PORTS['prefect']}/api",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode and not fails:
        raise GrimaceError(f"{' '.join(command)} failed in {folder}:\n{done.stdout[-3000:]}")


# What is measured


def timed(way: str, folder: Path, client: SyncPrefectClient) -> dict[str, float]:
    """Run everything once; return `seconds`, and of a flow what it did `after` DVC's work."""
    command = {
        "dvc": ["dvc", "repro"],
        "flow": ["flows.retrain", "--workers", "1"],
        "flow2": ["flows.retrain"],
    }[way]
    began = time.perf_counter()
    call([sys.executable, "-m", *command], folder)
    figures = {"seconds": round(time.perf_counter() - began, 2)}
    if way != "dvc":
        figures["after"] = after_dvc(client)
    print(f"{way}: {figures}", flush=True)
    return figures


def after_dvc(client: SyncPrefectClient) -> float:
    """Seconds that the last flow run spent on what is no stage of DVC."""
    (artifact,) = client.read_artifacts(
        artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["grimace-stages"])),
        sort=ArtifactSort.CREATED_DESC,
        limit=1,
    )
    rows = [line.split("|")[1:-1] for line in str(artifact.data).splitlines() if "@" in line]
    return round(
        sum(float(row[2]) for row in rows if row[0].strip().partition("@")[0] in AFTER_DVC), 2
    )


def in_a_row(folder: Path, client: SyncPrefectClient, count: int) -> dict[str, Any]:
    """Start so many deployed runs, each after the end of the one before it."""
    parts = {row[0]: row[1] for row in json.loads((folder / SERVICE / "parts.json").read_text())}
    before = len(processes(parts))
    deployment = client.read_deployment_by_name(DEPLOYMENT)
    rows = []
    for number in range(count):
        began = time.perf_counter()
        flow_run = client.create_flow_run_from_deployment(deployment.id)
        while not (state := client.read_flow_run(flow_run.id).state) or not state.is_final():
            if time.perf_counter() - began > MOST_SECONDS:
                raise GrimaceError(f"run {number + 1} has not ended; see {folder / SERVICE}")
            time.sleep(0.5)
        seconds = time.perf_counter() - began
        clear_by = time.monotonic() + CLEAR_SECONDS
        while len(processes(parts)) > before and time.monotonic() < clear_by:
            time.sleep(0.5)
        row = {"state": state.name, "seconds": round(seconds, 1)}
        rows.append(row | {name: memory(parts[name]) for name in ("prefect", "worker")})
        print(f"{number + 1} of {count}: {rows[-1]}", flush=True)
    logs = "".join(path.read_text(errors="replace") for path in (folder / SERVICE).glob("*.log"))
    return {
        "runs": rows,
        "processes": [before, len(processes(parts))],
        "locked": len(LOCKED.findall(logs)),
    }


def processes(parts: dict[str, int]) -> list[psutil.Process]:
    """All processes of the service."""
    roots = [psutil.Process(pid) for pid in parts.values()]
    return [each for root in roots for each in (root, *root.children(recursive=True))]


def memory(pid: int) -> float:
    """Resident set of a part and its own children, in MiB."""
    root, total = psutil.Process(pid), 0
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return round(total / 2**20, 1)


def left_in(work: Path) -> list[str]:
    """Command lines of the processes that still work in the scratch folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(work):
                found.append(" ".join(process.cmdline())[:200])
    return found


# What came of it


def page(results: dict[str, Any]) -> str:
    """Write the figures as Markdown."""
    from pipelines.report import markdown

    text = f"# What Prefect costs\n\nWritten by\n\n```\n{results['command']}\n```\n\n"
    text += f"on {results['date']}.\n\n" + (__doc__ or "").split("\n\n")[2].strip() + "\n"
    if full := results.get("full"):
        bare = full["dvc"]["seconds"]
        rows: list[tuple[str, ...]] = [("dvc repro", f"{bare:.1f} s", "", "")]
        for way, name in (("flow", "retrain, a stage at a time"), ("flow2", "retrain, two")):
            own = full[way]["seconds"] - full[way]["after"]
            share = f"{own / bare - 1:+.1%}"
            rows.append(
                (name, f"{full[way]['seconds']:.1f} s", f"{full[way]['after']:.1f} s", share)
            )
        columns = ("way", "whole", "register, gate", "the rest, to dvc repro")
        text += "\n## The default run, from nothing\n\n" + markdown(rows, columns)
    if nothing := results.get("nothing"):
        each = {way: [row[way]["seconds"] for row in nothing] for way in ("dvc", "flow")}
        more = [row["flow"]["seconds"] - row["dvc"]["seconds"] for row in nothing]
        times = [row["flow"]["seconds"] / row["dvc"]["seconds"] for row in nothing]
        rows = [
            ("dvc repro", _range(each["dvc"], "{:.2f} s")),
            ("retrain", _range(each["flow"], "{:.2f} s")),
            ("more", _range(more, "{:.2f} s")),
            ("ratio", _range(times, "{:.2f}")),
        ]
        text += f"\n## Nothing to do, rounds: {len(nothing)}\n\n"
        text += markdown(rows, ("what", "median (range)"))
    if row := results.get("row"):
        text += in_words(row)
    left = results["left"]
    return text + f"\nProcesses left when all was down: {len(left)}.\n"


def in_words(row: dict[str, Any]) -> str:
    """The long row's section."""
    from pipelines.report import markdown

    runs = row["runs"]
    tenth = max(1, len(runs) // 10)
    done = sum(each["state"] == "Completed" for each in runs)
    parts: list[tuple[str, ...]] = []
    for name in ("prefect", "worker"):
        first, middle, last = (
            median(each[name] for each in some)
            for some in (
                runs[:tenth],
                runs[len(runs) // 2 :][:tenth],
                runs[-tenth:],
            )
        )
        parts.append((name, f"{first:.0f}", f"{middle:.0f}", f"{last:.0f}"))
    columns = ("MiB", f"first {tenth}", f"{tenth} from the middle on", f"last {tenth}")
    before, after = row["processes"]
    return (
        f"\n## {len(runs)} runs in a row\n\n{done} completed, a run in "
        f"{_range([each['seconds'] for each in runs], '{:.1f} s')}, the worker's polling included."
        f"\n\n{markdown(parts, columns)}\nProcesses of the service before and after: {before}, "
        f'{after}. "database is locked" in the logs: {row["locked"]} times.\n'
    )


def _range(values: list[float], form: str) -> str:
    low, middle, high = (form.format(f(values)) for f in (min, median, max))
    return f"{middle} ({low} – {high})"


if __name__ == "__main__":
    run(main)
