"""Synthetic faces: 128×128 colour drawings with an emotion and 68 exact landmarks each."""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import cv2
import numpy as np

from pipelines.cli import GrimaceError
from pipelines.datasets.example import Example
from pipelines.datasets.faces import render

_CHUNK = 128  # faces per task: most of a second, far more than handing them over costs
_JPEG = (cv2.IMWRITE_JPEG_QUALITY, 95)


def examples(count: int, seed: int) -> Iterator[Example]:
    """Render faces 0 to `count` - 1 of the sequence `seed`, in order, on all processors.

    The examples do not depend on the number of processors. Images are JPEG of quality 95.

    Raises:
        GrimaceError: count or seed is negative; raised at once.
    """
    if count < 0 or seed < 0:
        raise GrimaceError(
            f"synthetic faces need a count and a seed of 0 or more, not {count} and {seed}: "
            "correct download.synthetic in params.yaml"
        )
    chunks = [range(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
    workers = min(len(os.sched_getaffinity(0)), len(chunks))
    return _in_parallel(seed, chunks, workers) if workers > 1 else _one_by_one(seed, chunks)


def _one_by_one(seed: int, chunks: list[range]) -> Iterator[Example]:
    for chunk in chunks:
        for index in chunk:
            yield _example(seed, index)


def _in_parallel(seed: int, chunks: list[range], workers: int) -> Iterator[Example]:
    # Spawned, not forked: the caller may have TensorFlow's threads running.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, cv2.setNumThreads, (1,)) as pool:
        # A few chunks ahead of the reader and no more, so that memory does not grow with `count`.
        ahead: deque[Future[list[Example]]] = deque()
        for chunk in chunks:
            ahead.append(pool.submit(_examples_of, seed, chunk))
            if len(ahead) > 2 * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def _examples_of(seed: int, chunk: range) -> list[Example]:
    return [_example(seed, index) for index in chunk]


def _example(seed: int, index: int) -> Example:
    face = render(seed, index)
    _, encoded = cv2.imencode(".jpg", face.image[..., ::-1], _JPEG)
    return Example(
        id=f"synthetic-{index:06d}",
        image=encoded.tobytes(),
        emotion=face.emotion,
        landmarks=np.where(face.visible[:, None], face.landmarks, np.float32(0)),
        visible=face.visible,
        person=f"identity-{face.identity:05d}",
    )
