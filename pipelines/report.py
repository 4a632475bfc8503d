"""Stage `report`: what came of the run, as one table on the screen and in `reports/report/`."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from pipelines.cli import run, whole_folder
from pipelines.verify import DECIDES

COLUMNS = ("task", "what", "runs in", "metric", "95 % interval", "size", "latency", "verdict")


def main() -> None:
    """Collect both tasks' results."""
    rows = [row for task in DECIDES for row in task_rows(task)]
    with whole_folder(Path("reports/report")) as out:
        (out / "results.md").write_text(markdown(rows))
        pd.DataFrame(rows, columns=COLUMNS).to_csv(out / "results.csv", index=False)
    show(rows)


def task_rows(task: str) -> list[tuple[str, ...]]:
    """Return the table's rows of one task: validation, test, then each deployable on test."""
    select = _read(f"reports/select/{task}.json")
    verify = Path("reports/verify", task)
    test, numerics, perf, blessing = (
        _read(verify / f"{name}.json") for name in ("test", "numerics", "perf", "blessing")
    )
    val = _read(f"reports/evaluate/{task}/{select['candidate']}/scores.json")
    model = f"{select['candidate']} (of {len(select['ranking'])})"
    size = Path("deploy/candidate", f"{task}.keras").stat().st_size
    rows: list[tuple[str, ...]] = [
        (task, f"{model}, validation", "Keras", *_figure(val), _mib(size), "", ""),
        (task, f"{model}, test", "Keras", *_figure(test), "", "", ""),
    ]
    for gate in blessing["gates"]:
        name, verdict = gate["name"], "ok" if gate["passed"] else "FAILED"
        if name in numerics:
            cost = perf[name]
            rows.append(
                (
                    task,
                    name,
                    cost["runtime"],
                    *_figure(numerics[name]),
                    _mib(cost["bytes"]),
                    f"{cost['p50_ms']:.2f} ms",
                    verdict,
                )
            )
        else:
            rows.append((task, name, "", "", "", "", "", verdict))
    for name, size in blessing["built_but_not_run"].items():
        rows.append((task, f"tensorrt/{name}", "needs its GPU", "", "", _mib(size), "", "not run"))
    return rows


def markdown(rows: list[tuple[str, ...]]) -> str:
    """Format rows as a Markdown table."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(rows: list[tuple[str, ...]]) -> None:
    """Print rows as a table."""
    table = Table(title="Grimace: candidates and deployables")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in COLUMNS[3:7] else "left", no_wrap=True)
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
    return json.loads(Path(path).read_text())


if __name__ == "__main__":
    run(main)
