"""The edge every command line passes: one error type, one clear line, the right exit code."""

import errno
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

COSTS = Path("reports/costs.jsonl")


class GrimaceError(Exception):
    """Something the user can act on: the message says what is wrong, where, and what to do."""


def run(main: Callable[[], None]) -> None:
    """Run `main`; end with one line on stderr and exit code 1 where the user can act on it."""
    try:
        main()
        _tell_costs()
    except GrimaceError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if not is_disk_full(error):
            raise
        place = f" while writing {error.filename}" if error.filename else ""
        sys.exit(
            f"error: the disk is full{place}. Nothing half-written was kept; "
            "free some space (`uv run dvc gc -w` drops old versions) and run the same again."
        )
    except KeyboardInterrupt:
        sys.exit(130)


def is_disk_full(error: OSError) -> bool:
    """Tell a full disk or quota from other errors."""
    # `np.save` gives no number, only "1000 requested and 16 written".
    short_write = error.errno is None and str(error).endswith(" written")
    return short_write or error.errno in (errno.ENOSPC, errno.EDQUOT)


def _tell_costs() -> None:
    """Say what this process took, and note it in `reports/costs.jsonl` for `report --publish`.

    Memory is the largest resident set of this process or any one child that it waited for, which
    the workers of a pool are not. A machine that only trains may lack psutil: there nothing is
    said.
    """
    try:
        import psutil
    except ImportError:
        return
    seconds = time.time() - psutil.Process().create_time()
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024
    print(f"took {seconds:.1f} s, peak memory {peak:.0f} MiB", file=sys.stderr)
    if "DVC_STAGE" in os.environ and COSTS.parent.is_dir():  # a stage of the graph, not by hand
        module = sys.modules["__main__"].__spec__
        row = {
            "command": " ".join([module.name if module else sys.argv[0], *sys.argv[1:]]),
            "seconds": round(seconds, 1),
            "peak_mib": round(peak),
        }
        with COSTS.open("a") as file:
            file.write(json.dumps(row) + "\n")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` only when the block ends without an error.

    A stage that is killed or fails half-way therefore never leaves an output that a later run
    takes for whole.
    """
    partial = target.with_name(f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old")
    rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        rmtree(partial, ignore_errors=True)
        raise
    # Moved aside at once, because a kill while it is being removed would leave half of it.
    rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    rmtree(old, ignore_errors=True)
