"""Figures by slice: how a model does on the parts of a dataset that the whole hides.

A face lies in one bin of every column: its class, the third of the set it belongs to by brightness,
how far the head is turned, how large the face is, and where it comes from.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models.schemes import EMOTIONS
from pipelines.crops import decode
from pipelines.datasets.example import Example
from pipelines.split import class_of, source_of

COLUMNS = ["class", "brightness", "yaw", "face_size", "source"]
FEWEST = 10  # pieces of evidence below which an interval would say more than is known

THIRDS = ("dark third", "middle third", "bright third")
# AFLW2000-3D's (Zhu et al. 2016), in degrees to either side.
YAW = (30, 60)
YAW_BINS = ("0-30", "30-60", "60-90")
SIZE = (32, 64, 128)  # pixels
SIZE_BINS = ("under 32", "32-64", "64-128", "128 or more")


def traits_of(example: Example, dataset: str) -> dict[str, Any]:
    """Measure what `filter` and `split` would write of an example, without them.

    Returns:
        The columns of `COLUMNS`.

    Raises:
        UnreadableImageError: the picture cannot be decoded.
    """
    from pipelines.checks.faces import box_measures
    from pipelines.checks.image import measure_image
    from pipelines.checks.landmarks import measure_landmarks

    rgb = decode(example.image, 3)
    return {
        "class": class_of(example),
        "brightness": measure_image(rgb)["brightness"],
        "yaw": measure_landmarks(example, rgb.shape)["yaw"],
        "face_size": box_measures(example, rgb.shape)["face_size"],
        "source": source_of(dataset, example.id),
    }


def bins_of(traits: pd.DataFrame) -> dict[str, np.ndarray]:
    """Put each face into one bin of every column.

    Args:
        traits: one row a face, the columns of `COLUMNS`; numbers may be NaN.

    Returns:
        The name of the bin, unicode (n,), by column; "" where a face is in none. Columns of which
        nothing is known are left out.
    """
    brightness, yaw, size = (
        traits[name].to_numpy(float) for name in ("brightness", "yaw", "face_size")
    )
    known = brightness[np.isfinite(brightness)]
    thirds = np.quantile(known, [1 / 3, 2 / 3]) if len(known) else np.zeros(2)
    classes = traits["class"].to_numpy(str)
    bins = {
        "class": np.where(classes == "unlabelled", "", classes),
        # Where most are equally bright there are no thirds.
        "brightness": _binned(
            brightness if np.ptp(thirds) else np.nan * brightness, thirds, THIRDS
        ),
        "yaw": _binned(np.abs(yaw), YAW, YAW_BINS, right=True),
        "face_size": _binned(size, SIZE, SIZE_BINS),
        "source": traits["source"].to_numpy(str),
    }
    return {column: names for column, names in bins.items() if (names != "").any()}


def _binned(
    values: np.ndarray, bounds: Iterable[float], names: tuple[str, ...], right: bool = False
) -> np.ndarray:
    place = np.digitize(values, list(bounds), right=right)
    return np.where(np.isfinite(values), np.array(names)[place], "")


def figures_by_slice(
    figures: dict[str, np.ndarray],
    bins: dict[str, np.ndarray],
    groups: np.ndarray,
    resamples: Iterable[np.ndarray],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Average figures over every bin, with 95 % bootstrap intervals.

    Args:
        figures: of each face, float (n,) by metric; NaN where a metric is not defined for it.
        bins: from `bins_of`.
        groups: (n,), what is one piece of evidence.
        resamples: batches (r, n) of how often each face is drawn.

    Returns:
        Column, then bin, then `n` (faces), the mean of each metric (None where it is not defined
        for any face) and `ci95`, [low, high] by metric, or None where the faces are fewer than ten
        pieces of evidence.
    """
    slices = [(column, name) for column in bins for name in _in_order(bins[column])]
    member = np.stack([bins[column] == name for column, name in slices], 1).astype(float)
    defined = {metric: np.isfinite(values) for metric, values in figures.items()}
    sums = {
        metric: member * np.where(defined[metric], values, 0)[:, None]
        for metric, values in figures.items()
    }
    counts = {metric: member * known[:, None] for metric, known in defined.items()}
    drawn: dict[str, list[np.ndarray]] = {metric: [] for metric in figures}
    for batch in resamples:
        weights = batch.astype(float)
        for metric in figures:
            drawn[metric].append(_ratio(weights @ sums[metric], weights @ counts[metric]))
    found: dict[str, dict[str, dict[str, Any]]] = {column: {} for column in bins}
    for index, (column, name) in enumerate(slices):
        inside = member[:, index] > 0
        row: dict[str, Any] = {"n": int(inside.sum())}
        intervals: dict[str, list[float]] = {}
        enough = len(np.unique(groups[inside])) >= FEWEST
        for metric in figures:
            total = counts[metric][:, index].sum()
            row[metric] = float(sums[metric][:, index].sum() / total) if total else None
            if total and enough:
                values = np.concatenate([batch[:, index] for batch in drawn[metric]])
                intervals[metric] = np.nanpercentile(values, [2.5, 97.5]).tolist()
        found[column][name] = row | {"ci95": intervals if enough else None}
    return found


def _in_order(names: np.ndarray) -> list[str]:
    order = [*EMOTIONS, *THIRDS, *YAW_BINS, *SIZE_BINS]
    present = set(names.tolist()) - {""}
    return [name for name in order if name in present] + sorted(present - set(order))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def plot_slices(
    slices: dict[str, dict[str, dict[str, Any]]],
    metric: str,
    overall: float,
    path: Path,
    title: str,
) -> None:
    """Draw one metric's mean and interval in every bin; a line marks the whole set's."""
    import matplotlib.pyplot as plt

    rows = [
        (f"{column}: {name} ({row['n']:,})", row[metric], (row["ci95"] or {}).get(metric))
        for column, names in slices.items()
        for name, row in names.items()
        if row[metric] is not None
    ]
    figure, axis = plt.subplots(figsize=(6.5, 1 + 0.24 * len(rows)))
    axis.axvline(overall, color="grey", linewidth=0.8, linestyle=":")
    for height, (_, value, interval) in enumerate(rows):
        axis.plot(value, height, "o", color="C0", markerfacecolor="C0" if interval else "white")
        if interval:
            axis.plot(interval, [height, height], color="C0", linewidth=1.2)
    axis.set_yticks(range(len(rows)), [label for label, *_ in rows], fontsize=7, parse_math=False)
    axis.invert_yaxis()
    axis.set(xlabel=f"{metric}, 95 % interval (hollow: too few faces for one)")
    axis.set_title(title, fontsize=9, parse_math=False)
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
