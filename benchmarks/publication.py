"""What a benchmark found, printed and published in one shape."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.cli import whole_folder


def show(results: dict[str, Any], page: Callable[[dict[str, Any]], str], out: Path | None) -> None:
    """Print the page of some results, and write it beside them.

    Args:
        results: ready for JSON.
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
    with whole_folder(out) as folder:
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (folder / "README.md").write_text(f"{page(results)}\n## Where\n\n{facts}")
