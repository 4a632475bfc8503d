import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flows.lock import WORKSPACE, BusyError, GivenUpError, alone, refuse_if_held
from flows.supervise import is_alive

ROOT = Path(__file__).parents[2]
# Holds the workspace, with a stage at work that does not end when it is asked to.
HOLDER = """
from flows.lock import alone
from flows.supervise import Lifeline, supervise
with alone("a retrain") as lock, Lifeline(lock) as lifeline:
    supervise(["sh", "-c", "trap '' TERM; echo $$ > stage; while :; do sleep 1; done"],
              lifeline, print)
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def holder() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        path = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
        started.append(subprocess.Popen([sys.executable, "-c", HOLDER], env=path))
        while not Path("stage").exists() or not Path("stage").read_text().endswith("\n"):
            assert started[-1].poll() is None
            time.sleep(0.02)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_second_is_told_who_holds_it_or_waits(
    holder: Callable[[], subprocess.Popen[bytes]],
) -> None:
    refuse_if_held()
    with alone("a"), pytest.raises(BusyError):
        refuse_if_held()
    refuse_if_held()
    first = holder()
    said = rf"{Path.cwd()} is held by a retrain \(process {first.pid} on \S+, since 20.* UTC\)"
    with pytest.raises(BusyError, match=said):
        refuse_if_held()
    with pytest.raises(BusyError, match=said), alone("a sweep"):
        pass
    told: list[str] = []
    asked = iter([False, True])
    with (
        pytest.raises(GivenUpError),
        alone("a sweep", wait=True, on_wait=told.append, given_up=lambda: next(asked)),
    ):
        pass
    assert len(told) == 1 and re.match(said, told[0])
    first.terminate()
    with alone("a sweep", wait=True):
        assert not stage_is_alive()
        with pytest.raises(BusyError, match="held by a sweep"), alone("another"):
            pass


def test_of_two_in_one_process_one_waits() -> None:
    order: list[str] = []

    def second() -> None:
        with alone("second", wait=True):
            order.append("second")

    with alone("first"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_of_a_killed_holder_it_is_free_when_the_last_of_its_processes_is_gone(
    holder: Callable[[], subprocess.Popen[bytes]],
) -> None:
    first = holder()
    first.kill()
    first.wait()
    assert stage_is_alive()  # for the seconds that it has to end by itself
    refuse_if_held()  # that is no reason to send anybody away
    with alone("the same again"):  # not told to wait
        assert not stage_is_alive()


def test_what_a_former_holder_left_is_no_lock() -> None:
    with alone("a"):
        pass
    assert WORKSPACE.read_text()
    with alone("b"):
        pass


def stage_is_alive() -> bool:
    pid = int(Path("stage").read_text())
    return psutil.pid_exists(pid) and is_alive(psutil.Process(pid))
