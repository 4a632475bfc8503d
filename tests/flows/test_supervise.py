import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from flows.supervise import BAR_SECONDS, Lifeline, supervise, terminal_lines

ROOT = Path(__file__).parents[2]
# Have a child in a session of its own and write down both process ids; one ignores SIGTERM.
POLITE = "setsid sleep 300 & echo $! $$ > pids; echo up; sleep 300"
STUBBORN = "trap '' TERM; setsid sleep 300 & echo $! $$ > pids; echo up; sleep 300; sleep 300"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


def written_pids(path: Path = Path("pids")) -> list[int]:
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(pid) for pid in path.read_text().split()]


def assert_gone(pids: list[int], within_seconds: float = 5) -> None:
    assert pids
    deadline = time.monotonic() + within_seconds
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("script", "reason", "code"),
    [
        ("echo last", "ok", 0),
        ("echo last >&2; exit 3", "failed", 3),
        ("echo last; kill -SEGV $$", "killed", signal.SIGSEGV),
        ("echo last; kill -KILL $$", "killed", signal.SIGKILL),
    ],
)
def test_tells_how_a_command_ended(script: str, reason: str, code: int) -> None:
    heard: list[str] = []
    with Lifeline() as lifeline:
        outcome = supervise(shell(script), lifeline, heard.append)
    assert (outcome.reason, outcome.code) == (reason, code)
    assert outcome.lines == heard == ["last"]


def test_a_program_that_is_not_there_is_named() -> None:
    with Lifeline() as lifeline:
        outcome = supervise(["no-such-program"], lifeline, lambda _: None)
    assert outcome.reason == "failed"
    assert "no-such-program" in outcome.lines[-1]


def test_lines_arrive_while_the_command_runs() -> None:
    with Lifeline() as lifeline:
        outcome = supervise(
            shell(
                "echo ready; for i in $(seq 200); do [ -e go ] && exit 0; sleep 0.05; done; exit 1"
            ),
            lifeline,
            lambda _: Path("go").touch(),
        )
    assert outcome.reason == "ok"


def test_cutting_the_lifeline_ends_everything_the_command_started() -> None:
    with Lifeline() as lifeline:
        cut_at = []

        def cut(_: str) -> None:
            cut_at.append(time.monotonic())
            lifeline.cut()

        outcome = supervise(shell(STUBBORN), lifeline, cut)
        took = time.monotonic() - cut_at[0]
    assert outcome.reason == "cancelled"
    assert took < 5
    assert_gone(written_pids(), within_seconds=0)


def test_nothing_starts_on_a_lifeline_that_is_cut() -> None:
    lifeline = Lifeline()
    lifeline.cut()
    assert supervise(shell("sleep 20"), lifeline, lambda _: None).reason == "cancelled"


def test_what_a_finished_command_left_running_is_ended() -> None:
    with Lifeline() as lifeline:
        outcome = supervise(shell("setsid sleep 300 & echo $! > pids"), lifeline, lambda _: None)
    assert outcome.reason == "ok"
    assert_gone(written_pids(), within_seconds=0)


def test_a_listener_that_fails_ends_the_command() -> None:
    def fail(_: str) -> None:
        raise ValueError("listener")

    with Lifeline() as lifeline, pytest.raises(ValueError, match="listener"):
        supervise(shell(POLITE), lifeline, fail)
    assert_gone(written_pids(), within_seconds=0)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("thread", ["main", "other"])
def test_the_command_dies_with_this_process(end: signal.Signals, thread: str) -> None:
    call = f"supervise(['sh', '-c', {POLITE!r}], lifeline, print)"
    script = {
        "main": f"with Lifeline() as lifeline: {call}",
        "other": "with Lifeline() as lifeline:\n"
        f"    threading.Thread(target=lambda: {call}).start(); time.sleep(300)",
    }[thread]
    parent = run_script(f"import threading, time\nfrom flows.supervise import *\n{script}")
    pids = written_pids()
    assert all(map(is_alive, pids))
    os.kill(parent.pid, end)
    assert_gone([*pids, parent.pid])
    parent.wait()


def run_script(script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_commands_in_several_threads_hang_on_one_lifeline() -> None:
    reasons: list[str] = []
    with Lifeline() as lifeline:
        threads = [
            threading.Thread(
                target=lambda: reasons.append(
                    supervise(shell("echo up; sleep 300"), lifeline, up.append).reason
                )
            )
            for _ in range(3)
        ]
        up: list[str] = []
        for thread in threads:
            thread.start()
        while len(up) < 3:
            time.sleep(0.05)
        lifeline.cut()
        for thread in threads:
            thread.join(timeout=10)
    assert reasons == ["cancelled"] * 3


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        (["one\ntwo\n"], ["one", "two"]),
        (["o", "ne\n", "\n  \n", "no newline"], ["one", "no newline"]),
        (["dos\r\n"], ["dos"]),
        (["\r 10%", "\r 5", "0%\r100%", "\ndone\n"], ["100%", "done"]),
        (["\x1b[32mgreen\x1b[0m\x1b[K\n"], ["green"]),
        (["bar\r    \rafter\n"], ["after"]),
        (["left\r     \r\n"], ["left"]),
    ],
)
def test_lines_are_as_a_terminal_would_show_them(chunks: list[str], lines: list[str]) -> None:
    assert list(terminal_lines(chunks)) == lines


def test_a_progress_bar_is_shown_now_and_then() -> None:
    steps = 50
    times = iter(range(10_000))
    chunks = [f"\r{step:3d}%" for step in range(steps)]
    shown = list(terminal_lines(chunks, clock=lambda: float(next(times))))
    assert 2 <= len(shown) <= steps / BAR_SECONDS + 1
    assert shown[-1] == f"{steps - 1:3d}%"


def test_bytes_that_are_no_text_stop_nothing() -> None:
    with Lifeline() as lifeline:
        outcome = supervise(
            shell(r"printf 'a\377b \303'; sleep 0.2; printf '\251\n'"), lifeline, lambda _: None
        )
    assert outcome.lines == ["a\ufffdb é"]
