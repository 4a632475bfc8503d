"""What opening a model takes, in a fresh process: `python -m pipelines.runtimes.probe MODEL`.

Prints JSON: `load_ms`, until the first answer is there, and `memory_mib`, by how much the process
has grown by then at most. The runtime's library is imported before, since a program does so once.
"""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from time import perf_counter

import psutil

from pipelines.cli import GrimaceError, run
from pipelines.runtimes import load

LIBRARIES = {".tflite": "ai_edge_litert.interpreter", ".onnx": "onnxruntime"}


def main() -> None:
    """Open the model that the command line names."""
    path = Path(sys.argv[1])
    import_module(LIBRARIES[path.suffix])
    before = psutil.Process().memory_info().rss
    start = perf_counter()
    with load(path, threads=1):
        seconds = perf_counter() - start
        peak = _peak()
    print(json.dumps({"load_ms": 1e3 * seconds, "memory_mib": max(0, peak - before) / 2**20}))


def _peak() -> int:
    """Return the largest resident set so far, in bytes.

    Not `getrusage`: what it gives starts with that of the process that started this one.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def probe(path: Path) -> dict[str, float]:
    """Open a `.tflite` or `.onnx` file in a process of its own.

    Returns:
        `load_ms` and `memory_mib`, see above.

    Raises:
        GrimaceError: it could not be opened.
    """
    process = subprocess.run(
        [sys.executable, "-m", "pipelines.runtimes.probe", path.resolve()],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise GrimaceError(f"{path} could not be opened: {process.stderr.strip()[-500:]}")
    return json.loads(process.stdout)


if __name__ == "__main__":
    run(main)
