"""Plots of a measurement, and its worst cases."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models.metrics import (
    ced_curve,
)
from models.schemes import EMOTIONS
from pipelines.heldout import Faces
from pipelines.measures import DECIDES, landmark_errors, reliability
from pipelines.params import Evaluate
from pipelines.sheets import contact_sheet
from pipelines.slices import (
    plot_slices,
)


def write_plots(
    faces: Faces, outputs: np.ndarray, settings: Evaluate, out: Path, title: str
) -> None:
    """Write plots (CSV and PNG) and a gallery of worst cases.

    For emotion confusion matrix and reliability curve, for landmarks the CED curve.
    """
    if faces.emotions is not None:
        _plot_confusion(faces.emotions, outputs.argmax(-1), out, title)
        _plot_reliability(faces.emotions, outputs, out, title)
        wrong = np.take_along_axis(outputs, faces.emotions[:, None], 1)[:, 0]
        worst = np.argsort(wrong, kind="stable")[: settings.gallery]
        captions = [
            f"{EMOTIONS[faces.emotions[row]]}, said {EMOTIONS[outputs[row].argmax()]}\n"
            f"{faces.ids[row][-20:]}"
            for row in worst
        ]
        images = [faces.images[row] for row in worst]
        contact_sheet(images, captions, out / "worst.png", f"{title}: least probable labels")
        return
    assert faces.landmarks is not None and faces.visible is not None
    errors, *_ = landmark_errors(faces, outputs)
    _plot_ced(errors[np.isfinite(errors)], out, title)
    worst = np.argsort(-np.nan_to_num(errors), kind="stable")[: settings.gallery]
    predicted = outputs.reshape(faces.landmarks.shape)
    contact_sheet(
        [faces.images[row] for row in worst],
        [f"NME {errors[row]:.1%}\n{faces.ids[row][-20:]}" for row in worst],
        out / "worst.png",
        f"{title}: largest errors (true green, predicted red)",
        points=[faces.landmarks[row][faces.visible[row]] for row in worst],
        more_points=[predicted[row] for row in worst],
    )


def draw_slices(scores: dict[str, Any], out: Path, title: str) -> None:
    """Write slices.png: the task's first metric in every slice."""
    name = DECIDES[scores["task"]]
    plot_slices(scores["slices"], name, scores[name], out / "slices.png", title)


def _plot_confusion(truth: np.ndarray, answers: np.ndarray, out: Path, title: str) -> None:
    import matplotlib.pyplot as plt
    from sklearn.metrics import ConfusionMatrixDisplay

    names = np.array(EMOTIONS)
    pd.DataFrame({"actual": names[truth], "predicted": names[answers]}).to_csv(
        out / "confusion.csv", index=False
    )
    figure, axis = plt.subplots(figsize=(6, 5))
    ConfusionMatrixDisplay.from_predictions(
        names[truth],
        names[answers],
        labels=EMOTIONS,
        normalize="true",
        values_format=".2f",
        cmap="Blues",
        ax=axis,
        xticks_rotation=45,
    )
    axis.set_title(title)
    figure.tight_layout()
    figure.savefig(out / "confusion.png", dpi=80)
    plt.close(figure)


def _plot_reliability(truth: np.ndarray, outputs: np.ndarray, out: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    table = reliability(truth, outputs)
    table.round(5).to_csv(out / "calibration.csv", index=False)
    gap = float((table["share"] * (table["confidence"] - table["accuracy"]).abs()).sum())
    figure, (curve, counts) = plt.subplots(
        2, figsize=(5, 5), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    curve.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    curve.plot(table["confidence"], table["accuracy"], "o-")
    curve.set(ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.03))
    curve.set_title(f"{title}: reliability, ECE {gap:.1%}", parse_math=False)
    counts.bar(table["confidence"], table["share"], width=0.04)
    counts.set(xlabel="confidence", ylabel="share of faces")
    for axis in (curve, counts):
        axis.grid(alpha=0.3)
    figure.savefig(out / "calibration.png", dpi=80)
    plt.close(figure)


def _plot_ced(errors: np.ndarray, out: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    bounds, share = ced_curve(errors, np.ones(len(errors)))
    pd.DataFrame({"nme": bounds.round(4), "share": share.round(5)}).to_csv(
        out / "ced.csv", index=False
    )
    figure, axis = plt.subplots(figsize=(6, 4))
    axis.plot(bounds, share)
    axis.axvline(0.1, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="inter-ocular NME", ylabel="share of faces", ylim=(0, 1))
    axis.set_title(f"{title}: cumulative error distribution")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "ced.png", dpi=80)
    plt.close(figure)
