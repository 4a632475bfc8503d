"""Data parallelism: which devices train together, and which part of each batch is whose.

Every device has the whole network and an equal part of each batch; gradients, the statistics of
batch normalisation and all figures are those of the whole batch, so that a training ends as it
would on one device, up to rounding. It is Keras's own `DataParallel` under JAX, on the devices of
this process, or of several that `keras.distribution.initialize` has joined (`pipelines.cluster`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from pipelines.cli import GrimaceError


@dataclass(frozen=True)
class Replicas:
    """Who trains together.

    Attributes:
        devices: in all.
        processes: that have them, equally many each.
        process: this one's number; the first writes what is to be kept.
    """

    devices: int = 1
    processes: int = 1
    process: int = 0

    @property
    def writes(self) -> bool:
        """Whether this process keeps the checkpoint and the result."""
        return self.process == 0

    def even(self, count: int) -> int:
        """Return how many of `count` images can be dealt out evenly."""
        return count - count % self.devices

    def own(self, count: int) -> slice:
        """Return which of a batch's `count` images are this process's."""
        share = count // self.processes
        return slice(self.process * share, (self.process + 1) * share)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Let Keras put all variables on every device, and deal out what `fit` is given."""
        if self.devices == 1:
            yield
            return
        names = keras.distribution.list_devices()
        chosen = names if self.processes > 1 else names[: self.devices]
        with keras.distribution.DataParallel(devices=chosen, auto_shard_dataset=False).scope():
            yield

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let this process do what the others do not: Keras makes variables even when it saves."""
        shared = keras.distribution.distribution()
        keras.distribution.set_distribution(None)
        try:
            yield
        finally:
            keras.distribution.set_distribution(shared)

    def spread(self, part: np.ndarray) -> Any:
        """Deal out this process's part of a batch, for a call of the model itself."""
        if self.devices == 1:
            return part
        import jax

        layout = keras.distribution.distribution().get_data_layout(part.shape)
        return jax.make_array_from_process_local_data(layout.backend_layout, part)

    def agree(self, number: int, what: str) -> None:
        """Stop where the processes have different numbers: they would wait for each other.

        Raises:
            AssertionError: this one's differs from the first one's.
        """
        if self.processes > 1:
            from jax.experimental import multihost_utils

            multihost_utils.assert_equal(np.int32(number), f"the workers disagree on {what}")


ALONE = Replicas()


def replicas_of(devices: int, batch: int) -> Replicas:
    """Return who trains with this process.

    Args:
        devices: of this process; 0 for all that the backend sees.
        batch: images a step, over all.

    Raises:
        GrimaceError: there are not so many devices, the backend cannot use them together, or the
            batch cannot be dealt out evenly.
    """
    backend, processes, process, here = keras.backend.backend(), 1, 0, 1
    if backend == "jax":
        import jax

        processes, process = jax.process_count(), jax.process_index()
        here = jax.local_device_count()
    elif devices != 1:
        raise GrimaceError(
            f"devices is {devices}, but the Keras backend is {backend}: several devices train "
            "together under JAX. Set KERAS_BACKEND=jax (`uv sync --extra jax`)."
        )
    used = devices or here
    if used > here:
        raise GrimaceError(
            f"devices is {devices}, but JAX sees {here}; set it to 0 for all of them"
        )
    total = used * processes
    if batch % total:
        raise GrimaceError(
            f"batch {batch} cannot be dealt out evenly to {total} devices; make it a multiple"
        )
    return Replicas(total, processes, process)
