"""What the benchmark of the flows makes of figures, and how it finds processes."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks import flows

HOLDS = "held = bytearray(64 * 2**20); held[:] = b'x' * len(held); print('there', flush=True); "


@pytest.fixture
def family(tmp_path: Path) -> Any:
    """A process in a folder, with a child that holds 64 MiB."""
    child = f"{HOLDS}import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None and parent.stdout.readline() == "there\n"
    both = [psutil.Process(parent.pid), *psutil.Process(parent.pid).children()]
    yield parent
    for process in both:
        process.kill()
    parent.communicate()


def test_processes_are_counted_and_found_by_the_folder_they_are_in(family, tmp_path: Path) -> None:
    assert len(flows.processes({"worker": family.pid})) == 2
    assert 64 < flows.memory(family.pid) < 200
    found = flows.left_in(tmp_path)
    assert len(found) == 2 and all("import" in line for line in found)
    assert flows.left_in(tmp_path / "elsewhere") == []


def test_what_is_no_stage_of_dvc_is_told_apart() -> None:
    table = (
        "| stage | state | seconds |\n| --- | --- | ---: |\n| params | ran | 9.0 |\n"
        "| verify@emotion | ran | 30.5 |\n| register@emotion | ran | 4.0 |\n"
        "| gate@emotion | ran | 6.5 |\n| gate@landmarks | unchanged | 0.1 |"
    )
    client: Any = SimpleNamespace(read_artifacts=lambda **_: [SimpleNamespace(data=table)])
    assert flows.after_dvc(client) == 10.6


def test_the_page_tells_overhead_memory_and_what_was_left() -> None:
    runs = [
        {"state": "Completed", "seconds": 10.0 + n, "prefect": 200.0 + n, "worker": 100.0}
        for n in range(20)
    ]
    runs[3]["state"] = "Failed"
    page = flows.page(
        {
            "command": "python -m benchmarks.flows",
            "date": "2026-01-02",
            "full": {
                "dvc": {"seconds": 400.0},
                "flow": {"seconds": 430.0, "after": 18.0},
                "flow2": {"seconds": 330.0, "after": 18.0},
            },
            "nothing": [
                {"dvc": {"seconds": 3.0}, "flow": {"seconds": flow, "after": 0.0}}
                for flow in (9.0, 6.0, 7.5)
            ],
            "row": {"runs": runs, "processes": [7, 8], "locked": 2},
            "left": ["python -m prefect"],
        }
    )
    rows = {
        cells[0]: cells[1:]
        for line in page.splitlines()
        if (cells := [cell.strip() for cell in line.split("|")[1:-1]])
    }
    assert rows["retrain, a stage at a time"] == ["430.0 s", "18.0 s", "+3.0%"]
    assert rows["retrain, two"] == ["330.0 s", "18.0 s", "-22.0%"]
    assert rows["dvc repro"] == ["3.00 s (3.00 s – 3.00 s)"]
    assert rows["more"] == ["4.50 s (3.00 s – 6.00 s)"]
    assert rows["ratio"] == ["2.50 (2.00 – 3.00)"]
    assert rows["prefect"] == ["200", "210", "218"]  # medians of two
    assert "19 completed, a run in 19.5 s (10.0 s – 29.0 s)" in page
    assert "before and after: 7, 8" in page and "logs: 2 times" in page
    assert "Processes left when all was down: 1." in page
    assert "done once each way, one after the other" in page  # it says how it was measured
