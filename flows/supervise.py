"""Run a command so that nothing of it outlives this process, however this process ends.

Between this process and the command stands a supervisor: this same file, run as a script. It
holds one end of a pipe whose other end only this process has, so it learns that this process
has ended from the operating system, even after SIGKILL. It also adopts every orphan among the
command's descendants (a "child subreaper", see prctl(2)), so it finds and ends them all: those
that left the process group too, as browsers and daemons do. Linux only.
"""

import codecs
import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Literal, Self

import psutil

# How long the command may take to end on SIGTERM before it is killed.
GRACE_SECONDS = 3
# A progress bar redraws itself many times a second; a log wants to see it now and then.
BAR_SECONDS = 10
TAIL_LINES = 30


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        reason: "ok" for exit code 0, "failed" for any other, "killed" for a signal from
            elsewhere, "cancelled" where its lifeline was cut.
        code: the exit code, or the number of the signal where it was killed.
        lines: its last lines of output, at most `TAIL_LINES`.
    """

    reason: Literal["ok", "failed", "killed", "cancelled"]
    code: int
    lines: list[str]


class Lifeline:
    """What supervised commands hang on: they end when it is cut, or when this process ends.

    Any number of commands, in any number of threads, may hang on the same one. As a context
    manager it is cut at the end of the block.

    Args:
        kept: descriptors that every supervisor holds as well until all of its command has ended,
            of locks on what the command works on.
    """

    def __init__(self, *kept: int) -> None:
        self.held_by_supervisors, ours = os.pipe()
        self.kept = kept
        self._cut = threading.Event()
        # Left to the garbage collector: a thread may be handing it to a supervisor right now.
        weakref.finalize(self, os.close, self.held_by_supervisors)
        self._close = weakref.finalize(self, os.close, ours)

    def cut(self) -> None:
        """End every command that hangs on it, and any that is started on it later."""
        self._cut.set()
        self._close()

    def is_cut(self, within_seconds: float = 0) -> bool:
        """Whether it is cut now, or will have been before so many seconds have passed."""
        return self._cut.wait(within_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()


def supervise(
    command: Sequence[str],
    lifeline: Lifeline,
    on_line: Callable[[str], None],
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Run `command` to its end, in the current folder, and hand on its output while it runs.

    When this returns, every process that the command started has ended as well.

    Args:
        command: program and arguments; no shell is involved.
        lifeline: what ends it early.
        on_line: called in this thread for each line of stdout and stderr, as a terminal would
            show it: without escape codes, progress bars as their latest state.
        env: the whole environment of the command; that of this process by default.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    held = lifeline.held_by_supervisors
    # -P: the folder of this file is no place to import from. A session of its own: Ctrl-C in
    # the terminal reaches this process alone, which then decides.
    with subprocess.Popen(
        [sys.executable, "-P", __file__, str(held), *command],
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[held, *lifeline.kept],
        env=env,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in terminal_lines(decoded(process.stdout)):
                tail.append(line)
                on_line(line)
        except BaseException:
            process.terminate()
            raise
    code = process.returncode
    if code == 0:
        return Outcome("ok", 0, list(tail))
    if lifeline.is_cut():
        return Outcome("cancelled", abs(code), list(tail))
    return Outcome("killed" if code < 0 else "failed", abs(code), list(tail))


def decoded(stream: IO[bytes]) -> Iterator[str]:
    """Text as soon as it comes, unreadable bytes replaced."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while chunk := stream.read(65536):
        yield decoder.decode(chunk)


def terminal_lines(
    chunks: Iterable[str], clock: Callable[[], float] = time.monotonic
) -> Iterator[str]:
    """The lines of a stream of text; of a progress bar, its state every `BAR_SECONDS`."""
    line = ""
    bar_seen = clock()
    for chunk in chunks:
        *whole, line = (line + chunk).split("\n")
        yield from filter(None, map(displayed, whole))
        drawn, redrawn, rest = line.rpartition("\r")
        if redrawn and clock() - bar_seen >= BAR_SECONDS and displayed(drawn):
            yield displayed(drawn)
            bar_seen = clock()
        # Only the latest state matters: a bar may run for hours without a newline.
        line = displayed(drawn) + redrawn + rest
    if displayed(line):
        yield displayed(line)


def displayed(line: str) -> str:
    """What of a line stays on a terminal: the last text drawn over it, without escape codes."""
    texts = [ESCAPE_CODE.sub("", text).rstrip() for text in line.split("\r")]
    return next(filter(None, reversed(texts)), "")


ESCAPE_CODE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


# From here on: what runs in the supervisor's own process.


def main() -> None:
    """`supervise.py LIFELINE COMMAND…`: run the command, end it when the lifeline breaks.

    Ends as the command does: with its exit code, or by the signal that it died of.
    """
    lifeline, command = int(sys.argv[1]), sys.argv[2:]
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: end_descendants())
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        sys.exit(f"cannot start {command[0]}: {error.strerror}")

    def wait_for_break() -> None:
        os.read(lifeline, 1)
        end_descendants()

    threading.Thread(target=wait_for_break, daemon=True).start()
    code = child.wait()
    end_descendants()
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)  # adopted ones, dead by now
    if code < 0:
        die_of(-code)
    sys.exit(code)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    pr_set_child_subreaper = 36
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")


def descendants() -> list[psutil.Process]:
    """All living processes under this one."""
    # The dead among them wait for us to reap them; reaping here would rob `child.wait()`.
    return [child for child in psutil.Process().children(recursive=True) if is_alive(child)]


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still does anything; one that is dead but not reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_descendants() -> None:
    """SIGTERM to all of them, SIGKILL to those that are still there after the grace."""
    kill_at = time.monotonic() + GRACE_SECONDS
    asked: set[psutil.Process] = set()
    while processes := descendants():
        late = time.monotonic() >= kill_at
        for process in processes:
            if late or process not in asked:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL if late else signal.SIGTERM)
                asked.add(process)
        time.sleep(0.05)


def die_of(number: int) -> None:
    """End by a signal, so that the caller sees the command's end in ours."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    main()
