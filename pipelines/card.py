"""The model card of a registered model: Markdown, from what the stages have measured.

Its sections follow Mitchell et al. 2019, "Model Cards for Model Reporting", as far as they can be
filled from what is known here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines import datasets
from pipelines.measures import DECIDES
from pipelines.params import TaskName
from pipelines.report import markdown

USE = {
    "emotion": "Tells which of seven expressions a cropped face shows. It says what a face looks "
    "like, not what a person feels, and is no ground for a decision about anybody.",
    "landmarks": "Finds facial landmarks in a cropped face: for effects, alignment and tracking. "
    "It does not tell who somebody is.",
}
LIMITS = {
    "emotion": "One label for a mixture of expressions; the labels are other people's opinions.",
    "landmarks": "Points hidden by hair, hands or glasses are guesses; far profiles are worse.",
}


@dataclass(frozen=True)
class Facts:
    """What a card is made of; figures as the stages wrote them.

    Attributes:
        task: "emotion" or "landmarks".
        dataset: it was trained and judged on.
        network: name of the job's model.
        sha256: of all registered files.
        test: scores on the test side, of `verify`.
        validation: scores on validation with slices, of `evaluate`.
        numerics: by deployable, of `verify`.
        perf: by deployable, of `verify`.
        code: tags of `tracking.provenance`.
    """

    task: TaskName
    dataset: str
    network: str
    sha256: str
    test: Mapping[str, Any]
    validation: Mapping[str, Any]
    numerics: Mapping[str, Any]
    perf: Mapping[str, Any]
    code: Mapping[str, str]


def card(facts: Facts, most_slices: int | None = None) -> str:
    """Return the card.

    Args:
        facts: what is known.
        most_slices: so many of the worst slices are listed; all by default.
    """
    about = _sections(datasets.card(facts.dataset))
    sections = {
        "Intended use": USE[facts.task],
        "Data": f"`{facts.dataset}`. Licence: {about['Licence']} Allowed use: "
        f"{about['Allowed use']}",
        "Metrics": _metrics(facts),
        "Slices, on validation": _slices(facts, most_slices),
        "Runtimes, on test": _runtimes(facts),
        "Limits": f"{LIMITS[facts.task]} Of the data: {about['Known bias']}",
        "How to reproduce": "`uv run python -m pipelines.reproduce --task "
        f"{facts.task} --sha256 {facts.sha256[:12]}`; code "
        f"{facts.code['grimace.git_commit'][:12]}, data {facts.code['grimace.data_version']}.",
    }
    text = "".join(f"\n## {title}\n\n{body.strip()}\n" for title, body in sections.items())
    return f"# {facts.task}: {facts.network}, trained on {facts.dataset}\n{text}"


def _sections(text: str) -> dict[str, str]:
    """Sections of a data card by title, each as one paragraph."""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)[1:]
    return {
        title: " ".join(body.split()) for title, body in zip(parts[::2], parts[1::2], strict=True)
    }


def _metrics(facts: Facts) -> str:
    names = list(facts.test["ci95"])
    sides = (facts.validation, facts.test)
    rows = [
        (name, *(f"{side[name]:.4f} ({_interval(side['ci95'][name], '.4f')})" for side in sides))
        for name in names
        if all(name in side["ci95"] for side in sides)
    ]
    columns = ("metric", f"validation, {sides[0]['n']} faces", f"test, {sides[1]['n']} faces")
    return markdown(rows, columns) + "\nIn brackets: 95 % bootstrap intervals over people.\n"


def _slices(facts: Facts, most: int | None) -> str:
    metric = DECIDES[facts.task]
    found = [
        (f"{column}: {name}", row)
        for column, names in facts.validation.get("slices", {}).items()
        for name, row in names.items()
        if row[metric] is not None
    ]
    worst = 1 if facts.task == "emotion" else -1
    if most is not None:
        found = sorted(found, key=lambda row: worst * row[1][metric])[:most]
    rows: list[tuple[str, ...]] = [
        (
            name,
            str(row["n"]),
            f"{row[metric]:.2%}",
            _interval(row["ci95"][metric], ".2%") if row["ci95"] else "too few",
        )
        for name, row in found
    ]
    return markdown(rows, ("slice", "faces", metric, "95 % interval"))


def _runtimes(facts: Facts) -> str:
    metric = DECIDES[facts.task]
    rows: list[tuple[str, ...]] = [
        (
            name,
            facts.perf[name]["runtime"],
            f"{row[metric]:.2%} ({_interval(row['ci95'][metric], '.2%')})",
            f"{facts.perf[name]['bytes'] / 2**20:.2f}",
            f"{facts.perf[name]['p50_ms']:.2f}",
        )
        for name, row in facts.numerics.items()
    ]
    return markdown(rows, ("deployable", "runs in", metric, "MiB", "ms a face"))


def _interval(ends: list[float], form: str) -> str:
    return " – ".join(f"{end:{form}}" for end in ends)
