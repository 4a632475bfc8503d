"""What every runtime offers once a model is open: predict, time, close."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np
from tqdm import tqdm

from pipelines.cli import GrimaceError

WARM_UP_RUNS = 10


class UnavailableError(GrimaceError):
    """A runtime is not there on this machine, whatever the model; the message says why."""


@dataclass(frozen=True)
class Runtime:
    """An open model; a context manager that frees it.

    Attributes:
        name: the runtime, where it runs, and its version: "litert 2.3.0".
        threads: how many threads it computes with; 0 where its library decides.
        input_shape: (H, W, C), C is 1 for grey or 3 for RGB.
        output_shape: without the batch: (7,) for emotion probabilities, (68, 2) for landmarks.
        run: one batch, float32 (n, H, W, C) with values 0–255, to float32 (n, *output_shape);
            n is at most `batch_size`.
        times: milliseconds of that many consecutive runs on one image of shape (1, H, W, C).
        batch_size: images that go through the model at once.
        stop: frees the model and whatever process runs it.
        opening: what the host of a model says that opening it took, as
            `pipelines.runtimes.probe` does of others; empty where it says nothing.
        software: whether it needs a GPU and runs on an imitation of one, which is slow.
    """

    name: str
    threads: int
    input_shape: tuple[int, int, int]
    output_shape: tuple[int, ...]
    run: Callable[[np.ndarray], np.ndarray]
    times: Callable[[np.ndarray, int], Sequence[float]]
    batch_size: int
    stop: Callable[[], object]
    opening: Mapping[str, float] = field(default_factory=dict)
    software: bool = False

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Run the model over any number of images.

        Args:
            images: (N, H, W, C), values 0–255.

        Returns:
            float32 (N, *output_shape).

        Raises:
            GrimaceError: the images are of another shape, or the runtime failed on them.
        """
        if images.shape[1:] != self.input_shape:
            raise GrimaceError(
                f"{self.name} holds a model for images of shape {self.input_shape} (height, "
                f"width, channels) and was given {images.shape[1:]}; prepare them in that shape"
            )
        outputs = np.empty((len(images), *self.output_shape), np.float32)
        starts = range(0, len(images), self.batch_size)
        progress = tqdm(starts, self.name, unit="batch", delay=3, leave=False, disable=None)
        for start in progress:
            batch = slice(start, start + self.batch_size)
            outputs[batch] = self.run(np.ascontiguousarray(images[batch], np.float32))
        return outputs

    def latency(self, image: np.ndarray, runs: int = 50) -> dict[str, float]:
        """Time single images after a warm-up, in the runtime's own process.

        Args:
            image: (H, W, C), values 0–255.
            runs: how many timed runs.

        Returns:
            `p50_ms` and `p95_ms`, the median and the 95th percentile, in milliseconds.
        """
        one = np.ascontiguousarray(image[None], np.float32)
        self.times(one, WARM_UP_RUNS)
        p50, p95 = np.percentile(self.times(one, runs), (50, 95))
        return {"p50_ms": float(p50), "p95_ms": float(p95)}

    def close(self) -> None:
        """Free the model; it cannot be used afterwards. Closing twice does nothing."""
        self.stop()

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_runtime(
    *,
    name: str,
    path: Path,
    threads: int,
    input_shapes: Sequence[Sequence[int | str | None]],
    output_count: int,
    run: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
    times: Callable[[np.ndarray, int], Sequence[float]] | None = None,
) -> Runtime:
    """Check that the model maps one image to one output, and try it once.

    `input_shapes` holds (N, H, W, C) of each input, where N is not looked at; the other arguments
    become the fields of the `Runtime`. Without `times`, `run` is timed in this process.

    Raises:
        GrimaceError: the model has another interface, or fails on a black image.
    """
    if len(input_shapes) != 1 or output_count != 1:
        raise GrimaceError(
            f"{path}: the model has {len(input_shapes)} inputs and {output_count} outputs; "
            "Grimace runs models with one image input and one output, so export such a one"
        )
    sizes = tuple(size for size in input_shapes[0][1:] if isinstance(size, int) and size > 0)
    if len(input_shapes[0]) != 4 or len(sizes) != 3:
        raise GrimaceError(
            f"{path}: the input has the shape {tuple(input_shapes[0])}; it must be (batch, height, "
            "width, channels) with fixed height, width and channels"
        )
    try:
        output = run(np.zeros((1, *sizes), np.float32))
    except Exception as error:
        raise refused(name, path, error) from error
    height, width, channels = sizes
    return Runtime(
        name=name,
        threads=threads,
        input_shape=(height, width, channels),
        output_shape=output.shape[1:],
        run=run,
        times=times or (lambda image, runs: [_milliseconds(run, image) for _ in range(runs)]),
        batch_size=batch_size,
        stop=lambda: None,
    )


def refused(name: str, path: Path, error: Exception | str) -> GrimaceError:
    """Say which runtime would not take a model, and why, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0][:300] if lines else type(error).__name__
    return GrimaceError(f"{path}: {name} refused it: {reason}. Export the model again")


def _milliseconds(run: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> float:
    start = perf_counter()
    run(image)
    return (perf_counter() - start) * 1e3
