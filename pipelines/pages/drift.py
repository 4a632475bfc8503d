"""The page of `drift`: how new pictures differ from those that a model was trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from pipelines import pages
from pipelines.pages import Section, charts

Pictures = Sequence[tuple[str, np.ndarray]]


def write_drift(
    result: dict[str, Any],
    known: pd.DataFrame,
    incoming: pd.DataFrame,
    units: Mapping[str, str],
    scores: Mapping[str, np.ndarray],
    unusual: Pictures,
    usual: Pictures,
) -> str:
    """Put the page together.

    Args:
        result: as in drift.json.
        known, incoming: a row a picture and a column a statistic.
        units: of the statistics.
        scores: by side, what the classifier says of the pictures that it has not learnt from.
        unusual: incoming pictures with their ids, the most unusual first.
        usual: some of the training side.
    """
    moved = [row["name"] for row in result["statistics"] if row["drifted"]]
    computed = [row for row in result["statistics"] if not row["why"]]
    said = f"drift of {', '.join(moved)}" if moved else "no drift" if computed else "not computed"
    lead = [
        f"{result['incoming']:,} incoming pictures against {result['known']:,} of the training "
        f"side of {result['dataset']}: {said}.",
        pages.facts(
            {
                "incoming": f"{result['incoming']:,}",
                "known": f"{result['known']:,}",
                "drifted": f"{len(moved)} of {len(computed)}",
                "unreadable": f"{sum(result['skipped'].values()):,}",
            }
        ),
    ]
    sections = [
        Section("What has moved", _tests(result)),
        Section("Distributions", _distributions(result, known, incoming, units)),
        Section("The model's features", _features(result, scores)),
        Section("The most unusual", _pictures(result, unusual, usual)),
    ]
    return pages.page(f"Drift, {result['dataset']}, {result['task']}", lead, sections)


def _tests(result: dict[str, Any]) -> list[Markup | str]:
    rows = result["statistics"]
    table = pd.DataFrame(
        {
            "statistic": [row["name"] for row in rows],
            "median, known": [row["known"] for row in rows],
            "median, incoming": [row["incoming"] for row in rows],
            "difference": [row["value"] for row in rows],
            "bound": [row["threshold"] for row in rows],
            "p": [_p(row["p"]) for row in rows],
            "p, corrected": [_p(row["p_holm"]) for row in rows],
            "verdict": [row["why"] or ("DRIFT" if row["drifted"] else "ok") for row in rows],
        }
    )
    numbers = ["median, known", "median, incoming", "difference", "bound"]
    table[numbers] = table[numbers].astype(float)
    formats = {"difference": "{:.3f}", "bound": "{:.3f}"}
    return [
        pages.table(table, "One row a test", formats),
        pages.note(
            "The difference of a statistic is the largest one of the two cumulative distributions "
            "(Kolmogorov and Smirnov), that of the features the AUC of a classifier that tells the "
            "sides apart, where 0.5 is guessing. Something has drifted if its p-value, corrected "
            f"for the number of tests (Holm), is below {result['alpha']:g} and the difference "
            "reaches its bound."
        ),
    ]


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _distributions(
    result: dict[str, Any], known: pd.DataFrame, incoming: pd.DataFrame, units: Mapping[str, str]
) -> list[Markup | str]:
    if known.empty or incoming.empty:
        return ["There is nothing to draw."]
    drifted = {row["name"] for row in result["statistics"] if row["drifted"]}
    order = sorted(known.columns, key=lambda name: name not in drifted)
    drawn = [
        charts.distribution(
            {"known": known[name].to_numpy(), "incoming": incoming[name].to_numpy()},
            f"{name} – drift" if name in drifted else name,
            units[name],
            shares=True,
        )
        for name in order
    ]
    return [pages.side_by_side(*drawn)]


def _features(result: dict[str, Any], scores: Mapping[str, np.ndarray]) -> list[Markup | str]:
    row = result["statistics"][-1]
    if not scores:
        return [f"Not computed: {row['why']}."]
    halves = " and ".join(f"{len(values):,} {name}" for name, values in scores.items())
    return [
        f"What the last layer of {result['model']} is given, of {halves} pictures that the "
        "classifier has not learnt from; the known ones are of the validation side, which the "
        "network was not trained on.",
        charts.distribution(scores, "taken for incoming", "probability", shares=True),
    ]


def _pictures(result: dict[str, Any], unusual: Pictures, usual: Pictures) -> list[Markup | str]:
    if not unusual:
        return ["No pictures are shown."]
    by = "the model's features" if result["model"] else "the statistics"
    distances = {row["id"]: row["distance"] for row in result["unusual"]}
    captions = [(f"{id} {distances[id]:.2f}", picture) for id, picture in unusual]
    return [
        f"Incoming pictures that lie farthest from known ones, by {by}: the mean distance to the "
        "nearest five, in standard deviations of the known.",
        pages.pictures(captions, "incoming"),
        pages.heading("Known ones, beside them"),
        pages.pictures(usual, "known"),
        pages.note(
            "Ids stand for names of files, which may be people's: "
            "pipelines/datasets/folder.md says how to find a picture by its id."
        ),
    ]
