"""The edge every command line passes: one error type, one clear line, the right exit code."""

import errno
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

# Libraries that would reach for the network, or chat, when they are imported.
QUIET_ENVIRONMENT = {
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GIT_PYTHON_REFRESH": "quiet",
}


class GrimaceError(Exception):
    """Something the user can act on: the message says what is wrong, where, and what to do."""


def run(main: Callable[[], None]) -> None:
    """Run `main`; end with one line on stderr and exit code 1 where the user can act on it."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    start = time.perf_counter()
    try:
        main()
        print(_costs(time.perf_counter() - start), file=sys.stderr)
    except GrimaceError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f" while writing {error.filename}" if error.filename else ""
        sys.exit(
            f"error: the disk is full{place}. Nothing half-written was kept; "
            "free some space (`uv run dvc gc -w` drops old versions) and run the same again."
        )
    except KeyboardInterrupt:
        sys.exit(130)


def _costs(seconds: float) -> str:
    """Say what the command took; the largest of its child processes counts as memory too."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024
    return f"took {seconds:.1f} s, peak memory {peak:.0f} MiB"


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` only when the block ends without an error.

    A stage that is killed or fails half-way therefore never leaves an output that a later run
    takes for whole.
    """
    partial = target.with_name(f".{target.name}.partial")
    rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        rmtree(partial, ignore_errors=True)
        raise
    rmtree(target, ignore_errors=True)
    partial.rename(target)
