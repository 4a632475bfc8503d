"""Stage `report`: what came of the run, as one table on the screen and in `reports/report/`.

With `--publish DIR --command "…"` it also writes a page to keep in git: the table, all figures as
JSON, the curves as small pictures, what each stage cost, the data's checksums, the code's commit
and the machine. No picture of a person is among them.
"""

import argparse
import json
import platform
from pathlib import Path
from shutil import copyfile
from textwrap import shorten
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from pipelines import tracking
from pipelines.cli import COSTS, GrimaceError, run, whole_folder
from pipelines.measures import DECIDES

COLUMNS = ("task", "what", "runs in", "metric", "95 % interval", "size", "latency", "verdict")


def main() -> None:
    """Collect both tasks' results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--publish", type=Path, help="folder for the page, as docs/results/default")
    parser.add_argument("--command", help="the command that made these results, to be quoted")
    args = parser.parse_args()
    if args.publish and not args.command:
        parser.error("--publish needs --command: a figure without its command is not reproducible")
    if args.publish and args.publish.exists() and not (args.publish / "results.json").exists():
        raise GrimaceError(
            f"{args.publish} would be replaced, and it holds no page of earlier results: name a "
            "folder of its own for the page"
        )
    rows = [row for task in DECIDES for row in task_rows(task)]
    with whole_folder(Path("reports/report")) as out:
        (out / "results.md").write_text(markdown(rows))
        pd.DataFrame(rows, columns=COLUMNS).to_csv(out / "results.csv", index=False)
    show(rows)
    if args.publish:
        with whole_folder(args.publish) as out:
            publish(rows, args.command, out)


def publish(rows: list[tuple[str, ...]], command: str, out: Path) -> None:
    """Write README.md, results.json and the plots of both tasks."""
    everything: dict[str, Any] = {"command": command, "machine": machine(), "costs": costs()}
    pictures = []
    for task in DECIDES:
        verify = Path("reports/verify", task)
        everything[task] = {
            "select": _read(f"reports/select/{task}.json"),
            **{path.stem: _read(path) for path in sorted(verify.glob("*.json"))},
            "validation": {
                path.parent.name: _read(path)
                for path in sorted(Path("reports/evaluate", task).glob("*/scores.json"))
            },
        }
        for path in [
            *sorted(Path("runs", task).glob("*/history.png")),
            *sorted(Path("reports/evaluate", task).glob("*/c*.png")),
            *sorted(verify.glob("c*.png")),
        ]:
            side = "test" if path.parent == verify else path.parent.name
            pictures.append(f"{task}-{side}-{path.name}")
            copyfile(path, out / pictures[-1])
    downloads = sorted(Path("reports/download").glob("*.json"))
    everything["data"] = {path.stem: _read(path) for path in downloads}
    (out / "results.json").write_text(json.dumps(everything, indent=2) + "\n")
    cost_rows: list[tuple[str, ...]] = [
        (c["command"], f"{c['seconds']:.0f} s", f"{c['peak_mib']} MiB") for c in costs()
    ]
    facts = "".join(f"- {name}: {value}\n" for name, value in everything["machine"].items())
    (out / "README.md").write_text(
        "# Results\n\nWritten by `python -m pipelines.report --publish DIR --command …`, after"
        f"\n\n```\n{command}\n```\n\n{markdown(rows)}\n"
        + "".join(numbers(task, everything[task]) for task in DECIDES)
        + f"## Where\n\n{facts}\n"
        f"## What each stage took\n\n{markdown(cost_rows, ('stage', 'time', 'peak memory'))}\n"
        f"## Curves\n\n" + "".join(f"![{name}]({name})\n" for name in pictures)
    )


def numbers(task: str, found: dict[str, Any]) -> str:
    """Return what deployables lose against Keras, and what they cost, as two Markdown tables.

    Args:
        task: "emotion" or "landmarks".
        found: `numerics` and `perf` as `verify` wrote them.
    """
    emotion = task == "emotion"
    losses: list[tuple[str, ...]] = []
    for name, row in found["numerics"].items():
        unit = (lambda loss: f"{loss:+.2f}") if emotion else (lambda loss: f"{loss:+.2%}")
        low, high = map(unit, row["loss_ci95"])
        same = (
            f"{row['agreement']:.1%} same decisions"
            if emotion
            else "{:.3%}, {:.3%}".format(*row["agreement"])
        )
        golden = f"{row['golden']['difference']:.1g} of {row['golden']['tolerance']:g}"
        losses.append((name, f"{row['n']:,}", unit(row["loss"]), f"{low} to {high}", same, golden))
    spent: list[tuple[str, ...]] = []
    for name, row in found["perf"].items():
        many = row.get("all_threads")
        latency = "{p50_ms:.2f}, {p95_ms:.2f} ms"
        more = f"{latency} ({{threads}})".format(**many) if many else ""
        load, memory = f"{row['load_ms']:.0f} ms", f"{row['memory_mib']:.1f} MiB"
        runtime = row["runtime"] + (", GPU in software" if row["software"] else "")
        spent.append((name, runtime, _mib(row["bytes"]), load, memory, latency.format(**row), more))
    lost = "points lost" if emotion else "rise of the NME"
    agree = "agrees with Keras" if emotion else "apart from Keras, median and 95 % of faces"
    heads = ("deployable", "faces", lost, "95 % interval", agree, "golden, off by")
    costs_head = ("deployable", "runs in", "size", "load", "memory", "p50, p95", "all threads")
    return (
        f"## {task.capitalize()}: what is lost\n\n{markdown(losses, heads)}\n"
        f"## {task.capitalize()}: what it costs\n\n{markdown(spent, costs_head)}\n"
    )


def machine() -> dict[str, str]:
    """Describe the machine and the software of this run."""
    info = Path("/proc/cpuinfo").read_text()
    names = [line.split(":")[1].strip() for line in info.splitlines() if "model name" in line]
    facts = tracking.provenance(Path("data/augment/emotion"))
    kept = {k.removeprefix("grimace."): v for k, v in facts.items() if "data_version" not in k}
    return {"processor": names[0] if names else platform.processor(), **kept}


def costs() -> list[dict[str, Any]]:
    """Return the last cost noted of every stage, in the order they ran."""
    if not COSTS.exists():
        raise GrimaceError(f"{COSTS} is missing: run `dvc repro` before publishing")
    last = {row["command"]: row for row in map(json.loads, COSTS.read_text().splitlines())}
    # What `export` and `verify` start is in their own time, and names files by absolute paths.
    parts = ("pipelines.exporters", "pipelines.runtimes")
    return [row for row in last.values() if not row["command"].startswith(parts)]


def task_rows(task: str) -> list[tuple[str, ...]]:
    """Return the table's rows of one task: validation, test, then each deployable on test."""
    select = _read(f"reports/select/{task}.json")
    verify = Path("reports/verify", task)
    test, numerics, perf, budgets = (
        _read(verify / f"{name}.json") for name in ("test", "numerics", "perf", "budgets")
    )
    val = _read(f"reports/evaluate/{task}/{select['candidate']}/scores.json")
    model = f"{select['candidate']} (of {len(select['ranking'])})"
    size = Path("deploy/candidate", f"{task}.keras").stat().st_size
    rows: list[tuple[str, ...]] = [
        (task, f"{model}, validation", "Keras", *_figure(val), _mib(size), "", ""),
        (task, f"{model}, test", "Keras", *_figure(test), "", "", ""),
    ]
    verdicts = {gate["name"]: "ok" if gate["passed"] else "FAILED" for gate in budgets["gates"]}
    for name in [*verdicts, *(name for name in numerics if name not in verdicts)]:
        if name not in numerics:
            rows.append((task, name, "", "", "", "", "", verdicts[name]))
            continue
        cost, found = perf[name], numerics[name]
        some = "" if found["n"] == test["n"] else f" on {found['n']} faces"
        figure, interval = _figure(found)
        latency = f"{cost['p50_ms']:.2f} ms"
        verdict = verdicts.get(name, "not judged")
        told = (cost["runtime"], figure + some, interval, _mib(cost["bytes"]), latency)
        rows.append((task, name, *told, verdict))
    unrun = {f"tensorrt/{file}": _mib(size) for file, size in budgets["built_but_not_run"].items()}
    for name, reason in budgets["not_available"].items():
        why = shorten(f"not available here: {reason}", 70, placeholder=" …").replace("|", "\\|")
        rows.append((task, name, why, "", "", unrun.get(name, ""), "", "not run"))
    return rows


def markdown(rows: list[tuple[str, ...]], columns: tuple[str, ...] = COLUMNS) -> str:
    """Format rows as a Markdown table."""
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(rows: list[tuple[str, ...]]) -> None:
    """Print rows as a table."""
    table = Table(title="Grimace: candidates and deployables")
    for name in COLUMNS:
        table.add_column(
            name,
            justify="right" if name in COLUMNS[3:7] else "left",
            no_wrap=name != "runs in",  # or why it does not
        )
    for before, row in zip([None, *rows], rows, strict=False):
        if before and before[0] != row[0]:
            table.add_section()
        table.add_row(*row, style="red" if row[-1] == "FAILED" else None)
    Console(width=150).print(table)


def _figure(scores: dict[str, Any]) -> tuple[str, str]:
    name = DECIDES[scores["task"]]
    low, high = scores["ci95"][name]
    label = "accuracy" if name == "accuracy" else "NME"
    return f"{label} {scores[name]:.2%}", f"{low:.2%} – {high:.2%}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


def _read(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise GrimaceError(f"{path} is missing; run `dvc repro verify` first") from None


if __name__ == "__main__":
    run(main)
