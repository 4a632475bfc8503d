"""What a benchmark found, printed and published in one shape."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from pipelines.cli import whole_folder


def others_share(seconds: float = 3.0) -> float:
    """Return what share of all processors, 0 to 1, others use: asked before anything is timed."""
    return float(psutil.cpu_percent(interval=seconds)) / 100


def show(results: dict[str, Any], page: Callable[[dict[str, Any]], str], out: Path | None) -> None:
    """Print the page of some results, and write it beside them.

    Args:
        results: ready for JSON; with `others_share` from before they were measured, the page says
            it.
        page: turns them into Markdown.
        out: folder of `results.json` and `README.md`, which then also say on what machine; it is
            replaced. None: only print.
    """
    print(page(results))
    if out is None:
        return
    from pipelines.report import machine

    results = results | {"machine": machine()}
    facts = "".join(f"- {name}: {text}\n" for name, text in results["machine"].items())
    if "others_share" in results:
        facts += f"- busy with other work just before: {results['others_share']:.0%}\n"
    with whole_folder(out) as folder:
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (folder / "README.md").write_text(f"{page(results)}\n## Where\n\n{facts}")
