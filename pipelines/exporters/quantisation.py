"""What eight-bit graphs are fitted to and judged by, and which of their layers stay in float.

Every format has its own arithmetic, so each is searched by itself, in its own runtime: rounding
that one bears another does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipelines.runtimes import load

PROBES = 64  # images on which layers are compared with each other


@dataclass(frozen=True, eq=False)
class Calibration:
    """The faces of a quantisation, and what it may cost.

    Attributes:
        images: float32 (n, H, W, C), values 0–255, from the train split: ranges are taken from
            these alone.
        trial: float32 (m, H, W, C), values 0–255, from validation: recipes are compared on these,
            for a model answers its training faces too well to say what rounding costs it.
        loss: what is lost by answering so about `trial`; positive is worse.
        bound: how much of that is allowed.
        unit: of both.
    """

    images: np.ndarray
    trial: np.ndarray
    loss: Callable[[np.ndarray], float]
    bound: float
    unit: str


def answers(graph: Path, images: np.ndarray) -> np.ndarray:
    """Run a graph over images in its own runtime, on all cores."""
    with load(graph, threads=os.cpu_count() or 1) as runtime:
        return runtime.predict(images)


def spare_layers(
    layers: Sequence[str],
    quantise: Callable[[Sequence[str]], Path],
    exact: Path,
    calibration: Calibration,
) -> tuple[Path, dict[str, Any]]:
    """Leave as many layers in float as it takes to keep to the bound.

    First, of every layer, how far the outputs still move from those of the float graph when it
    alone is left in float (a leave-one-out sensitivity analysis on calibration images). Then
    layers are added one by one: of the first, the last and the most sensitive one that still
    compute in eight bits, the one that leaves the least movement. The ends are always asked, for
    what a layer loses often stands only in what the one before it gives out, and ends of networks
    are where this counts. It ends when the loss on the trial faces is within the bound, or when
    one layer is left: with none it would be the float graph.

    Args:
        layers: names of those that compute in eight bits, in the order of the graph.
        quantise: makes a graph with the given layers in float, and says where.
        exact: the graph in float32.
        calibration: faces and bound.

    Returns:
        The graph that keeps to the bound, or else loses least; and what was found, ready for
        JSON: `loss` and `bound` in `unit`, `loss_all_int8`, `float_layers` in the order they were
        added, each with the root mean square by which outputs then `moved` and the `loss` then,
        `moved_all_int8`, `moved_alone` by layer, and how many graphs were `tried`.
    """
    tried = 0

    def make(kept: Sequence[str]) -> tuple[Path, float]:
        nonlocal tried
        tried += 1
        graph = quantise(kept)
        return graph, calibration.loss(answers(graph, calibration.trial))

    best, loss = make(())
    found: dict[str, Any] = {
        "unit": calibration.unit,
        "bound": calibration.bound,
        "loss_all_int8": loss,
        "layers": len(layers),
        "float_layers": [],
    }
    if loss <= calibration.bound or len(layers) < 2:
        return best, found | {"loss": loss, "tried": tried}
    probes = calibration.images[:: max(1, len(calibration.images) // PROBES)]
    wanted = answers(exact, probes)

    def movement(kept: Sequence[str]) -> float:
        nonlocal tried
        tried += 1
        return float(np.sqrt(np.mean((answers(quantise(kept), probes) - wanted) ** 2)))

    found["moved_all_int8"] = movement(())
    progress = tqdm(layers, "layers", delay=3, leave=False, disable=None)
    alone = {layer: movement([layer]) for layer in progress}
    found["moved_alone"] = alone
    steps: list[dict[str, Any]] = []
    lost = loss
    while lost > calibration.bound and len(steps) < len(layers) - 1:
        kept = [step["layer"] for step in steps]
        left = [layer for layer in layers if layer not in kept]
        asked = dict.fromkeys((left[0], left[-1], min(left, key=alone.__getitem__)))
        moved = {layer: movement([*kept, layer]) if kept else alone[layer] for layer in asked}
        chosen = min(moved, key=moved.__getitem__)
        graph, lost = make([*kept, chosen])
        steps.append({"layer": chosen, "moved": moved[chosen], "loss": lost})
        if lost < loss:
            best, loss, found["float_layers"] = graph, lost, list(steps)
    return best, found | {"loss": loss, "tried": tried}
