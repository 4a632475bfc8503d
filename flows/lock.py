"""One flow at a time in a workspace: two would write the same files.

The lock is flock(2) on a file, so the operating system lets go of it when its holder ends, however
it ends. A holder hands its descriptor to what it supervises (`Lifeline`), so that the workspace of
a killed flow is free when the last of its processes is gone, and not before.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from pipelines.cli import GrimaceError

WORKSPACE = Path(".grimace/workspace.lock")
POLL_SECONDS = 1


class BusyError(GrimaceError):
    """Somebody else holds the lock: `holder` says who."""

    def __init__(self, holder: str) -> None:
        super().__init__(f"{holder}; --wait waits for its end")
        self.holder = holder


class GivenUpError(GrimaceError):
    """The wait for the lock was ended by whoever asked for it."""


@contextmanager
def alone(
    what: str,
    wait: bool = False,
    path: Path = WORKSPACE,
    on_wait: Callable[[str], None] = lambda _: None,
    given_up: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Hold a lock for the block.

    Args:
        what: who holds it, for those who find it taken.
        wait: for it to be free, however long. What is left of a killed holder is waited for
            in any case.
        path: the lock's file; by default that of the workspace in the current folder.
        on_wait: told once who holds it, if it has to be waited for.
        given_up: asked from time to time whether there is still somebody waiting.

    Yields:
        The descriptor of the open file; the lock is held until all copies of it are closed.

    Raises:
        BusyError: it is taken, and is not to be waited for.
        GivenUpError: `given_up` said so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        told = False
        while not _take(descriptor, fcntl.LOCK_EX):
            if not (wait or _is_ending(descriptor)):
                raise BusyError(holder(descriptor))
            if not told:
                on_wait(holder(descriptor))
                told = True
            if given_up():
                raise GivenUpError(f"no longer waited for: {holder(descriptor)}")
            time.sleep(POLL_SECONDS)
        record = {
            "what": what,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(record).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)  # and no LOCK_UN, which would take it from the copies too


def refuse_if_held(path: Path = WORKSPACE) -> None:
    """Look whether a lock could be had, without taking it.

    Raises:
        BusyError: somebody holds it.
    """
    if not path.exists():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not (_take(descriptor, fcntl.LOCK_SH) or _is_ending(descriptor)):
            raise BusyError(holder(descriptor))
    finally:
        os.close(descriptor)


def holder(descriptor: int) -> str:
    """Say in a line who holds the lock."""
    folder, record = Path.cwd(), _record(descriptor)
    if not record:
        return f"{folder} is held by somebody since a moment ago"
    return (
        f"{folder} is held by {record['what']} (process {record['pid']} on {record['host']}, since "
        f"{record['since']})"
    )


def _is_ending(descriptor: int) -> bool:
    """Whether only what a killed holder supervised is left, which takes seconds to end."""
    record = _record(descriptor)
    return record.get("host") == socket.gethostname() and not psutil.pid_exists(record["pid"])


def _record(descriptor: int) -> dict[str, Any]:
    try:
        return dict(json.loads(os.pread(descriptor, 4096, 0)))
    except ValueError:  # not written yet
        return {}


def _take(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
