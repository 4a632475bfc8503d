"""Metrics of answers to labelled faces, over all and by slice, with bootstrap intervals."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from models.metrics import (
    absolute_errors,
    box_errors,
    calibration,
    confusion,
    emotion_metrics,
    interocular_errors,
    landmark_metrics,
)
from models.schemes import EMOTIONS, SCHEMES
from pipelines.cli import GrimaceError
from pipelines.heldout import Faces
from pipelines.params import Evaluate
from pipelines.slices import (
    FEWEST,
    YAW_BINS,
    bins_of,
    figures_by_slice,
)

CHUNK = 100  # resamples held in memory at once
DECIDES = {"emotion": "accuracy", "landmarks": "nme_interocular"}


def measure(faces: Faces, outputs: np.ndarray, settings: Evaluate) -> dict[str, Any]:
    """Return the metrics of a task with their 95 % bootstrap intervals.

    Args:
        faces: what was asked.
        outputs: what was answered, (n, 7) probabilities or (n, N, 2) crop coordinates.
        settings: number of resamples, and their seed.

    Returns:
        Ready for JSON; fractions, not per cent. `ci95` holds [low, high] by metric.

    Raises:
        GrimaceError: an answer is not finite: left out or taken for a class it would flatter; or
            the points answered are not those of the faces' scheme.
    """
    finite = np.isfinite(outputs.reshape(len(outputs), -1)).all(1)
    if not finite.all():
        raise GrimaceError(
            f"the model answers with NaN or infinity on {(~finite).sum()} of {len(finite)} faces "
            f"(first: {faces.ids[~finite][0]}); train or export it again"
        )
    if faces.emotions is not None:
        return _measure_emotion(faces.emotions, faces.groups, outputs, settings)
    return _measure_landmarks(faces, outputs, settings)


def _measure_emotion(
    truth: np.ndarray, groups: np.ndarray, outputs: np.ndarray, settings: Evaluate
) -> dict[str, Any]:
    names = ("accuracy", "macro_f1", "balanced_accuracy", "ece", "brier", "nll")
    by_class = ("precision", "recall", "f1")
    answers = outputs.argmax(-1)

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        counts = confusion(truth, answers, weights, len(EMOTIONS))
        return emotion_metrics(counts.astype(np.float64)) | calibration(truth, outputs, weights)

    figures = statistic(np.ones(len(truth)))
    intervals = _intervals(statistic, (*names, *by_class), groups, settings)
    per_class = {}
    for index, emotion in enumerate(EMOTIONS):
        mine = truth == index
        enough = len(np.unique(groups[mine])) >= FEWEST
        per_class[emotion] = {
            **{name: float(figures[name][index]) for name in by_class},
            "n": int(mine.sum()),
            "ci95": {name: intervals[name][index] for name in by_class} if enough else None,
        }
    return {
        "task": "emotion",
        "n": len(truth),
        **{name: float(figures[name]) for name in names},
        "per_class": per_class,
        "reliability": reliability(truth, outputs).to_dict("list"),
        "ci95": {name: intervals[name] for name in names},
    }


def reliability(truth: np.ndarray, outputs: np.ndarray) -> pd.DataFrame:
    """Return the bins of `models.metrics.calibration` that hold a face, least confident first.

    Returns:
        Columns share (of the faces), confidence and accuracy.
    """
    found = calibration(truth, outputs, np.ones(len(truth)))
    columns = ("share", "confidence", "accuracy")
    table = pd.DataFrame({name: found[f"bin_{name}"] for name in columns})
    return table[table["share"] > 0].reset_index(drop=True)


def _measure_landmarks(faces: Faces, outputs: np.ndarray, settings: Evaluate) -> dict[str, Any]:
    assert faces.landmarks is not None
    assert faces.visible is not None
    own = landmark_errors(faces, outputs)
    predicted = outputs.reshape(faces.landmarks.shape)
    each = np.stack([*own, absolute_errors(faces.landmarks, predicted, faces.visible)])
    valid = np.isfinite(each).all(0)
    errors, inner, boxed, absolute = each[:, valid]
    if not valid.any():
        raise GrimaceError("no example shows both eyes: the inter-ocular error is not defined")

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        return landmark_metrics(errors, inner, boxed, absolute, weights)

    figures = statistic(np.ones(len(errors)))
    return {
        "task": "landmarks",
        "scheme": SCHEMES[faces.landmarks.shape[1]].name,
        "n": len(errors),
        **{name: float(value) for name, value in figures.items()},
        "without_eyes": int((~valid).sum()),
        "ci95": _intervals(statistic, tuple(figures), faces.groups[valid], settings),
    }


def landmark_errors(faces: Faces, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each example's inter-ocular NME over all and over inner points, and its box NME.

    Raises:
        GrimaceError: the answers have another number of points than the faces.
    """
    truth, visible = faces.landmarks, faces.visible
    assert truth is not None and visible is not None
    if outputs[0].size != truth[0].size:
        raise GrimaceError(
            f"the model answers {outputs[0].size // 2} points, the faces have {truth.shape[1]}: "
            "they follow different schemes"
        )
    predicted, scheme = outputs.reshape(truth.shape), SCHEMES[truth.shape[1]]
    return (
        interocular_errors(truth, predicted, visible, scheme, inner=False),
        interocular_errors(truth, predicted, visible, scheme, inner=True),
        box_errors(truth, predicted, visible),
    )


def by_slice(faces: Faces, outputs: np.ndarray, settings: Evaluate) -> dict[str, Any]:
    """Return a task's first metric by slice, and for landmarks the box NME beside it.

    Args:
        faces: with traits.
        outputs: as for `measure`.
        settings: number of resamples, and their seed.

    Returns:
        Ready for JSON: `slices` as `figures_by_slice` gives it; and `nme_box_yaw_mean`, the mean
        of the three yaw bins (AFLW2000-3D's headline), where all three have faces.
    """
    assert faces.traits is not None
    if faces.emotions is not None:
        right = outputs.argmax(-1) == faces.emotions
        figures = {"accuracy": right.astype(float)}
    else:
        errors, _, boxed = landmark_errors(faces, outputs)
        figures = {"nme_interocular": errors, "nme_box": boxed}
    slices = figures_by_slice(
        figures, bins_of(faces.traits), faces.groups, bootstrap_weights(faces.groups, settings)
    )
    found: dict[str, Any] = {"slices": slices}
    turned = [row["nme_box"] for row in slices.get("yaw", {}).values() if row.get("nme_box")]
    if len(turned) == len(YAW_BINS):
        found["nme_box_yaw_mean"] = float(np.mean(turned))
    return found


def bootstrap_weights(groups: np.ndarray, settings: Evaluate) -> Iterator[np.ndarray]:
    """Yield (r, n) counts of how often each example is drawn when whole groups are resampled.

    The cluster bootstrap (Davison and Hinkley 1997, section 3.8); with one example a group it is
    the ordinary one. Equal settings draw equal resamples, so figures of two models on the same
    examples can be compared pair by pair.
    """
    _, member = np.unique(groups, return_inverse=True)
    count = int(member.max()) + 1
    rng = np.random.default_rng(settings.seed)
    for start in range(0, settings.resamples, CHUNK):
        drawn = min(CHUNK, settings.resamples - start)
        yield rng.multinomial(count, np.full(count, 1 / count), drawn)[:, member]


def _intervals(
    statistic: Callable[[np.ndarray], dict[str, np.ndarray]],
    names: tuple[str, ...],
    groups: np.ndarray,
    settings: Evaluate,
) -> dict[str, list[Any]]:
    """Return [low, high] of each figure, a list of them where it is one by class."""
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for weights in bootstrap_weights(groups, settings):
        figures = statistic(weights)
        for name in names:
            drawn[name].append(figures[name])
    return {
        name: np.percentile(np.concatenate(values), [2.5, 97.5], axis=0).T.tolist()
        for name, values in drawn.items()
    }


def headline(scores: dict[str, Any]) -> str:
    """Return one line: the deciding metric with its interval, and how answers were averaged."""
    name = DECIDES[scores["task"]]
    low, high = scores["ci95"][name]
    how = scores.get("test_time", "none")
    averaged = "" if how == "none" else f"averaged by {how}: "
    return (
        f"{averaged}{name} {scores[name]:.2%} "
        f"(95 % interval {low:.2%} to {high:.2%}, n = {scores['n']})"
    )
