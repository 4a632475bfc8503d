import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from pipelines.cli import GrimaceError
from pipelines.fanout import fan_out

ROOT = Path(__file__).parents[2]


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def slow_at_first(number: int) -> int:
    time.sleep(0.3 if number == 0 else 0)
    return number


def dies_once(marker: Path, number: int) -> int:
    """As when the machine runs out of memory."""
    if number == 5 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def dies(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fails(number: int) -> int:
    if number == 3:
        raise GrimaceError(f"no {number}")
    return number


def sleeps(number: int) -> int:
    time.sleep(60 if number else 0)
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_chunks(workers: int) -> None:
    results = list(fan_out(square, range(20), workers))
    assert [result for result, _ in results] == [number * number for number in range(20)]
    processes = {process for _, process in results}
    assert processes == {os.getpid()} if workers == 1 else os.getpid() not in processes
    assert list(fan_out(slow_at_first, range(9), workers)) == list(range(9))
    assert list(fan_out(square, [], workers)) == []


def test_chunks_are_read_only_as_they_are_needed() -> None:
    """Else memory would grow with their number."""
    read = 0

    def chunks():  # type: ignore[no-untyped-def]
        nonlocal read
        for number in range(30):
            read += 1
            yield number

    for taken, _ in enumerate(fan_out(slow_at_first, chunks(), 2)):
        assert read <= taken + 2 * 2
    assert read == 30


def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    work = partial(dies_once, tmp_path / "marker")
    assert list(fan_out(work, range(12), 2)) == list(range(12))
    assert (tmp_path / "marker").exists()


def test_workers_killed_again_and_again() -> None:
    got = []
    with pytest.raises(GrimaceError, match=r"killed 3 times, .*memory: lower `workers` \(now 2\)"):
        for result in fan_out(dies, range(8), 2):
            got.append(result)
    assert set(got) <= {0, 1, 2}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_the_work_is_the_callers(workers: int) -> None:
    got = []
    with pytest.raises(GrimaceError, match=r"^no 3$"):
        for result in fan_out(fails, range(8), workers):
            got.append(result)
    assert got == [0, 1, 2]


def test_left_early_it_stops_at_once() -> None:
    results = fan_out(sleeps, range(8), 2)
    assert next(results) == 0
    start, workers = time.perf_counter(), multiprocessing.active_children()
    assert len(workers) == 2
    results.close()  # type: ignore[attr-defined]
    assert time.perf_counter() - start < 5
    assert not any(worker.is_alive() for worker in workers)


SERVED = """
from pipelines.fanout import fan_out, start_server
from tests.pipelines.test_fanout import has_colorsys

if __name__ == "__main__":
    start_server(["colorsys"])
    print(list(fan_out(has_colorsys, range(3), 2)))
"""


def has_colorsys(number: int) -> bool:
    return "colorsys" in sys.modules


def test_workers_start_with_what_their_server_has_imported(tmp_path: Path) -> None:
    """In a program of its own: a process has one fork server."""
    (tmp_path / "script.py").write_text(SERVED)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.check_output(
        [sys.executable, "script.py"], cwd=tmp_path, env=env, text=True, timeout=60
    )
    assert said == "[True, True, True]\n"


SCRIPT = """
import signal, sys, time
from pathlib import Path
from pipelines.cli import run
from pipelines.fanout import fan_out
from tests.pipelines.test_fanout import sleeps

def main():
    # Heeded, also where the shell that started the tests in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    results = fan_out(sleeps, range(8), 2)
    for number in results:
        Path("going").touch()
        time.sleep(60 * (sys.argv[1] == "busy"))

if __name__ == "__main__":
    run(main)
"""


@pytest.mark.parametrize(
    ("parent", "how"),
    [
        ("waiting", signal.SIGINT),
        ("busy", signal.SIGINT),
        ("waiting", signal.SIGTERM),
        ("busy", signal.SIGKILL),
    ],
)
def test_no_worker_outlives_its_parent(tmp_path: Path, parent: str, how: signal.Signals) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "script.py", parent],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "going").exists():
        assert process.poll() is None
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    start = time.perf_counter()
    process.send_signal(how)
    _, said = process.communicate(timeout=20)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert time.perf_counter() - start < 6
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert said == ""


def test_an_address_where_nobody_answers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(GrimaceError, match=f"no Ray cluster can be used at {address}: .*refus"):
            list(fan_out(square, range(3), 1, address))


def test_without_ray_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(GrimaceError, match="run `uv sync --extra cluster`"):
        list(fan_out(square, range(3), 1, address="127.0.0.1:6379"))
