"""Runs a converter without its chatter, and shows the end of it where it fails."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import IO

from pipelines.cli import GrimaceError


@contextmanager
def quiet(what: str) -> Iterator[None]:
    """Hold back what the block writes to stdout and stderr, C++ libraries included.

    Args:
        what: what the block does, for the message: "TFLite export of model.keras".

    Raises:
        GrimaceError: the block raised; the message carries the error and the last lines of what
            was held back. A GrimaceError passes through as it is.
    """
    with TemporaryFile() as output:
        try:
            with _redirected(output):
                yield
        except GrimaceError:
            raise
        except Exception as error:
            output.seek(0)
            said = output.read().decode(errors="replace")
            raise GrimaceError(failure(what, f"{said}\n{error}")) from error


def failure(what: str, said: str) -> str:
    """Say that `what` failed, with the last lines of what it said."""
    lines = [line.rstrip() for line in said.splitlines() if line.strip()]
    return "\n  ".join([f"the {what} failed; its last words:", *lines[-10:]])


@contextmanager
def _redirected(output: IO[bytes]) -> Iterator[None]:
    """Send file descriptors 1 and 2 to `output`: libraries write to them past `sys.stdout`."""
    streams = (sys.stdout, sys.stderr)
    saved = os.dup(1), os.dup(2)
    for stream, place in zip(streams, (1, 2), strict=True):
        stream.flush()
        os.dup2(output.fileno(), place)
    try:
        yield
    finally:
        for stream, place, original in zip(streams, (1, 2), saved, strict=True):
            stream.flush()
            os.dup2(original, place)
            os.close(original)
