"""Spread work on chunks of examples over processes; on a cluster, over its machines.

The chunks are read here and travel to the workers, and the results travel back, so workers need no
shared disk and write nothing: a worker that dies loses nothing but time.
"""

import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from socket import create_connection
from threading import Thread
from typing import Any, TypeVar

from pipelines.cli import GrimaceError

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

RETRIES = 2  # of the work that dead workers had in hand
ROOT = Path(__file__).parents[1]


def start_server(modules: Sequence[str]) -> None:
    """Start the process that worker processes are forked from, and return at once.

    It imports what their work needs while this process does what comes first; without this call it
    starts with the first pool, and each worker imports for itself. Unlike this process it has no
    threads, which a fork would break.

    Args:
        modules: that the work needs; slow ones are worth naming.
    """
    forkserver.set_forkserver_preload([*modules])
    forkserver.ensure_running()


def fan_out(
    work: Callable[[Chunk], Result],
    chunks: Iterable[Chunk],
    workers: int,
    address: str | None = None,
) -> Iterator[Result]:
    """Apply `work` to every chunk; yield the results in the order of the chunks.

    At most two chunks a worker are in flight, so memory does not grow with their number. What a
    killed worker had in hand is done again. When the caller stops early, so do the workers.

    Args:
        work: a picklable pure function (a module's function, or `functools.partial` of one).
        chunks: what it is applied to, one at a time; picklable.
        workers: processes; one means this one.
        address: of a Ray cluster, whose machines then take the place of the processes: HOST:PORT
            from one of them, ray://HOST:PORT from elsewhere.

    Raises:
        GrimaceError: workers were killed again and again; or the cluster cannot be used.
        Exception: what `work` raised, of the first chunk that failed.
    """
    if address is not None:
        return _on_cluster(work, chunks, address)
    if workers == 1:
        return map(work, chunks)
    return _in_processes(work, chunks, workers)


def _in_processes(
    work: Callable[[Chunk], Result], chunks: Iterable[Chunk], workers: int
) -> Iterator[Result]:
    """Fan out over a pool of this machine's processes."""
    stream = iter(chunks)
    todo: deque[Chunk] = deque()  # in flight, oldest first
    for retries_left in reversed(range(RETRIES + 1)):
        with _pool(workers) as pool:
            try:
                futures = deque(pool.submit(work, chunk) for chunk in todo)
                yield from _in_order(pool, work, stream, todo, futures, 2 * workers)
                return
            except BrokenProcessPool:
                if not retries_left:
                    raise GrimaceError(
                        f"a worker process was killed {RETRIES + 1} times, probably because the "
                        f"machine ran out of memory: lower `workers` (now {workers})"
                    ) from None


def _in_order(
    pool: ProcessPoolExecutor,
    work: Callable[[Chunk], Result],
    stream: Iterator[Chunk],
    todo: deque[Chunk],
    futures: deque[Future[Result]],
    in_flight: int,
) -> Iterator[Result]:
    """Keep the pool busy from `stream`; a chunk stays in `todo` until its result is there."""
    while True:
        for following in islice(stream, in_flight - len(todo)):
            todo.append(following)
            futures.append(pool.submit(work, following))
        if not todo:
            return
        result = futures.popleft().result()
        todo.popleft()
        yield result


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool whose processes end with this block, and with this process however it ends."""
    context = get_context("forkserver")
    watched, lifeline = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(watched,))
    try:
        yield pool
        pool.shutdown()
    finally:  # left early, the workers are in the midst of something nobody waits for
        lifeline.close()
        watched.close()
        pool.shutdown(cancel_futures=True)


def _start(watched: Connection) -> None:
    """Leave Ctrl-C to the parent, and end when it does: the lifeline's other end is then closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        watched.poll(None)  # true at the end of the file too
        os._exit(1)

    Thread(target=end_with_parent, daemon=True).start()


def _on_cluster(
    work: Callable[[Chunk], Result], chunks: Iterable[Chunk], address: str
) -> Iterator[Result]:
    """Fan out over a Ray cluster, which needs this environment's packages on its machines."""
    with ray_cluster(address):
        import ray

        try:
            task: Any = ray.remote(max_retries=RETRIES)(_call)
            shared = ray.put(work)
            waiting: deque[ray.ObjectRef] = deque()
            for chunk in chunks:
                waiting.append(task.remote(shared, chunk))
                # Asked each time, because machines come and go.
                while len(waiting) >= 2 * max(1, ray.cluster_resources().get("CPU", 1)):
                    yield ray.get(waiting.popleft())
            while waiting:
                yield ray.get(waiting.popleft())
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
            raise GrimaceError(
                f"the Ray cluster at {address} lost the same work {RETRIES + 1} times, probably "
                "because its machines ran out of memory: give each fewer CPUs "
                "(`ray start --num-cpus`)"
            ) from None


@contextmanager
def ray_cluster(address: str) -> Iterator[None]:
    """Join a Ray cluster, unless that was done, and bring it this code; leave it in the end.

    Args:
        address: HOST:PORT from one of its machines, ray://HOST:PORT from elsewhere.

    Raises:
        GrimaceError: Ray is not installed, or the cluster cannot be used.
    """
    try:
        import ray
    except ImportError:
        raise GrimaceError(
            "cluster.address is set, but Ray is not installed: run `uv sync --extra cluster`"
        ) from None
    ours = not ray.is_initialized()
    if ours:
        _connect(address)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _connect(address: str) -> None:
    """Join a cluster and bring it this code."""
    import ray

    code = {
        "py_modules": [str(ROOT / package) for package in ("pipelines", "models")],
        "excludes": ["node_modules", "__pycache__"],
    }
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        # Ray itself takes minutes to give up.
        create_connection((host, int(port)), timeout=10).close()
        ray.init(
            address=address, runtime_env=code, log_to_driver=False, logging_level=logging.WARNING
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise GrimaceError(
            f"cluster.address: no Ray cluster can be used at {address}: {reason}"
        ) from None


def _call(work: Callable[[Chunk], Result], chunk: Chunk) -> Result:
    return work(chunk)
