"""Runs a converter without its chatter, and shows the end of it where it fails."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
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
    """Send Python's streams and the descriptors 1 and 2, which libraries use, to `output`."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {place: os.dup(place) for place in (1, 2)}
    for place in saved:
        os.dup2(output.fileno(), place)
    try:
        with (
            open(output.fileno(), "w", buffering=1, closefd=False) as text,
            redirect_stdout(text),
            redirect_stderr(text),
        ):
            yield
    finally:
        for place, original in saved.items():
            os.dup2(original, place)
            os.close(original)
