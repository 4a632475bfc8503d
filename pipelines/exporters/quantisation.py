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
    layers are added: of the last, the last two, the first, the first two and the most sensitive
    that still compute in eight bits, those that take away the most movement a layer. Two at the
    ends, for what a layer loses may stand in what the one before it gives out, so that one of
    them alone cures nothing. It ends when the loss on the trial faces is within the bound, or when
    one layer is left: with none it would be the float graph.

    Args:
        layers: names of those that compute in eight bits, in the order of the graph.
        quantise: makes a graph with the given layers in float, and says where.
        exact: the graph in float32.
        calibration: faces and bound.

    Returns:
        The graph that keeps to the bound, or else loses least; and what was found, ready for
        JSON: `loss` and `bound` in `unit`, `loss_all_int8`, `float_layers`, the `steps` that led
        to them, each with the root mean square by which outputs then `moved` and the `loss` then,
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
        "steps": [],
    }
    if loss <= calibration.bound or len(layers) < 2:
        return best, found | {"loss": loss, "tried": tried}
    probes = calibration.images[:: max(1, len(calibration.images) // PROBES)]
    wanted = answers(exact, probes)

    def movement(kept: Sequence[str]) -> float:
        nonlocal tried
        tried += 1
        return float(np.sqrt(np.mean((answers(quantise(kept), probes) - wanted) ** 2)))

    now = found["moved_all_int8"] = movement(())
    progress = tqdm(layers, "layers", delay=3, leave=False, disable=None)
    alone = found["moved_alone"] = {layer: movement([layer]) for layer in progress}
    kept: list[str] = []
    steps: list[dict[str, Any]] = []
    lost = loss
    while lost > calibration.bound and len(kept) < len(layers) - 1:
        left = [layer for layer in layers if layer not in kept]
        sensitive = min(left, key=alone.__getitem__)
        asked = [left[-1:], left[-2:], left[:1], left[:2], [sensitive]]
        moved = {
            tuple(more): alone[more[0]] if not kept and len(more) == 1 else movement(kept + more)
            for more in asked
            if len(more) < len(left)
        }
        gain = {more: (now - then) / len(more) for more, then in moved.items()}
        chosen = max(gain, key=gain.__getitem__)
        now, kept = moved[chosen], [*kept, *chosen]
        graph, lost = make(kept)
        steps.append({"layers": list(chosen), "moved": now, "loss": lost})
        if lost < loss:
            best, loss = graph, lost
            found |= {"float_layers": kept, "steps": list(steps)}
    return best, found | {"loss": loss, "tried": tried}
