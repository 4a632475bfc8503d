"""Stage `split`: give every clean example a side, so that nothing seen in training is tested on.

Whose side:
- The source's official split is respected. A side that the source lacks is drawn from its train:
  with train and test alone, val takes val / (1 - test) of train; with train and val alone, test
  takes test / (1 - val) of it, and what the source calls val stays val. (Where the field reports
  on what a source calls validation, as on AffectNet's, its builder already calls that test.)
- Every other side is drawn by a hash of the seed and the person, or of the example's own id where
  no person is known, and of nothing else.
- A dataset that is for evaluation only is all test.

Who leaves: where examples of one person, or copies and near copies of one picture (the clusters
that `filter` found), stand on different sides, the highest side keeps its own and the others
leave, with split "out" and the reason; test is above val, val above train. So do those that a
chain of persons and copies leads there: a copy of somebody's picture shows that person too, and
ties them where `filter` has dropped it as well. Nobody is moved. So an old id keeps its side or
leaves, whatever is added later. (The one exception is a source that comes back with an official
side it lacked before: its word then replaces the draw.)

Why classes are not divided by quota: to keep an old id on its side under every addition, its side
must be what it would be with that id alone in the dataset, so it can depend on nothing but the
example itself; and a function of single examples cannot count. What a hash does give is the right
share of every class in expectation. Whether chance was kind is checked: a class whose drawn share
of a side is beyond what the binomial distribution explains is refused, a class that is missing
from val or test is told, and all counts are in the report.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from models.schemes import EMOTIONS
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.datasets import EVALUATE_ONLY
from pipelines.datasets.example import Example
from pipelines.datasets.table import read_examples
from pipelines.families import families
from pipelines.params import Split, load_params

SIDES = ("train", "val", "test")  # a group stays on the last of these that it reaches
OUT = "out"
MEASURED = ["brightness", "yaw", "face_size"]
COLUMNS = ["id", "split", "reason", "group", "cluster", "class", *MEASURED, "source"]
IMPROBABLE = 1e-6
COLOURS = ["#4878a8", "#e8a33d", "#6aa84f", "#bbbbbb"]  # train, val, test, out

# The collections that 300W-LP was made of; they differ in difficulty.
PARTS = {"the300w_lp": re.compile("^(AFW|HELEN|IBUG|LFPW)")}


def main() -> None:
    """Index the clean dataset and count what lies where."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="a dataset that `filter` has cleaned")
    dataset = parser.parse_args().dataset
    examples = read_examples(Path("data/clean", dataset), images=False)
    measured = pd.read_parquet(Path("reports/filter", dataset, "examples.parquet"))

    params = load_params()
    index = make_index(examples, dataset, params.split, measured)
    check(index, dataset, for_emotion=params.tasks.emotion.dataset == dataset)
    with whole_folder(Path("data/split", dataset)) as out:
        index.to_parquet(out / "index.parquet", index=False)
    report = Path("reports/split", dataset)
    with whole_folder(report) as out:
        counts = write_report(index, dataset, out)
    report.with_suffix(".json").write_text(json.dumps(summary(index), indent=2) + "\n")
    print(counts.to_string())
    for line in absent(index):
        print(f"warning: {dataset}: {line}", file=sys.stderr)


def make_index(
    examples: Iterable[Example], dataset: str, params: Split, measured: pd.DataFrame
) -> pd.DataFrame:
    """Assign sides.

    Args:
        examples: as `filter` left them, with their clusters.
        dataset: their dataset's name.
        params: seed and shares.
        measured: columns id, person, cluster, brightness, yaw and face_size, also of what
            `filter` dropped, whose ties count too; ids that are not among them get NaN.

    Returns:
        One row an example, in the order given: id; split ("train", "val", "test" or "out");
        reason, why it is out, else ""; group, what counts as one piece of evidence: the person,
        else the cluster, else the id; cluster, "" where there is none; class, "unlabelled" where
        there is none; and to slice an evaluation by: brightness, yaw, face_size, and source, the
        dataset or the part of it.

    Raises:
        GrimaceError: chance does not explain how a class was divided.
    """
    rows = [
        (e.id, e.official_split, e.person or e.id, e.person, e.cluster, class_of(e))
        for e in examples
    ]
    columns = ["id", "official", "key", "person", "cluster", "class"]
    table = pd.DataFrame(rows, columns=columns, dtype=str)
    table["among"] = _choices(table["official"], dataset)
    table["split"] = [
        side_of(key, params, among) for key, among in zip(table["key"], table["among"], strict=True)
    ]
    _check_draw(table, dataset, params)
    table["reason"] = _why_out(table, measured)
    table.loc[table["reason"] != "", "split"] = OUT
    table["group"] = table["person"].where(table["person"] != "", table["cluster"])
    table["group"] = table["group"].where(table["group"] != "", table["id"])
    table["source"] = [source_of(dataset, id) for id in table["id"]]
    return table.merge(measured[["id", *MEASURED]], "left", on="id", validate="1:1")[COLUMNS]


def choices_of(official: str, given: Iterable[str], dataset: str) -> tuple[str, ...]:
    """Return the sides on which an example may stand.

    Args:
        official: the example's own official side, "" where it has none.
        given: the official sides that occur in its source.
        dataset: its name.
    """
    if dataset in EVALUATE_ONLY:
        return ("test",)
    if official == "train":
        return tuple(side for side in SIDES if side == "train" or side not in given)
    return (official,) if official else SIDES


def side_of(key: str, params: Split, among: tuple[str, ...] = SIDES) -> str:
    """Draw a side: a pure function of the seed, the key and the sides to choose among.

    Args:
        key: the person, or the example's id.
        params: seed and shares.
        among: shares of the sides that are not among these go to those that are, in proportion.
    """
    if len(among) == 1:
        return among[0]
    digest = hashlib.sha256(f"{params.seed}/{key}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    for side, share in _shares(params, among).items():
        if draw < share:
            return side
        draw -= share
    return "train"


def _shares(params: Split, among: tuple[str, ...]) -> dict[str, float]:
    shares = {"test": params.test, "val": params.val, "train": 1 - params.test - params.val}
    total = sum(shares[side] for side in among)
    return {side: share / total for side, share in shares.items() if side in among}


def _choices(official: pd.Series, dataset: str) -> list[tuple[str, ...]]:
    given = set(official)
    known = {side: choices_of(side, given, dataset) for side in given}
    return [known[side] for side in official]


def class_of(example: Example) -> str:
    """Return the emotion, else the source's own word for the class, else "unlabelled"."""
    return EMOTIONS[example.emotion] if example.emotion >= 0 else example.label or "unlabelled"


def source_of(dataset: str, id: str) -> str:
    """Return the dataset's name, with the part of it that an id tells."""
    part = PARTS[dataset].search(id) if dataset in PARTS else None
    return f"{dataset} {part.group()}" if part else dataset


def _check_draw(table: pd.DataFrame, dataset: str, params: Split) -> None:
    """Refuse a draw that gives a class more or less of a side than chance explains.

    What is drawn is a person (or an example without one), so a person's many pictures of a class
    count once; then the number on a side is binomial.
    """
    from scipy.stats import binomtest

    drawn = table[table["among"].map(len) > 1].drop_duplicates(["key", "class"])
    for (_, name), rows in drawn.groupby(["among", "class"]):
        for side, share in _shares(params, rows["among"].iloc[0]).items():
            count = int((rows["split"] == side).sum())
            if binomtest(count, len(rows), share).pvalue < IMPROBABLE:
                raise GrimaceError(
                    f"{dataset}: {count} of {len(rows)} draws of class {name} fell on {side}, "
                    f"where {share:.0%} were due; chance alone does that less than once in a "
                    f"million times. Choose another split.seed in params.yaml"
                )


def _why_out(table: pd.DataFrame, measured: pd.DataFrame) -> pd.Series:
    """Say of each example why it must leave its side, "" where it need not."""
    rank = table["split"].map(SIDES.index)
    reason = pd.Series("", table.index)
    # A dropped copy still says that its person is the one whose picture it copies.
    persons, clusters = ([*table[kind], *measured[kind]] for kind in ("person", "cluster"))
    family = families(persons, clusters)[: len(table)]
    table = table.assign(family=family.astype(str))
    kinds = ("cluster", "copy of"), ("person", "same person as"), ("family", "linked by copies to")
    for kind, words in kinds:
        grouped = table[kind] != ""
        highest = rank.groupby(table[kind]).transform("max")
        # One of those who stay, to name.
        stays = table[grouped & (rank == highest)].groupby(kind).agg({"id": "min", "split": "min"})
        leaves = grouped & (rank < highest) & (reason == "")
        named = stays.loc[table.loc[leaves, kind]]
        said = [f"{words} {id} on the {side} side" for id, side in named.itertuples(index=False)]
        reason[leaves] = pd.Series(said, table.index[leaves], dtype=str)
    return reason


def check(index: pd.DataFrame, dataset: str, for_emotion: bool = True) -> None:
    """Refuse a split that leaks or that is of no use.

    Args:
        index: as `make_index` gives it.
        dataset: its name.
        for_emotion: whether emotions are learnt from it; landmarks are learnt of any face.

    Raises:
        GrimaceError: a group or cluster on two sides, an empty side, or, where emotions are learnt,
            a class without training examples.
    """
    inside = index[index["split"] != OUT]
    for kind in ("group", "cluster"):
        sides = inside[inside[kind] != ""].groupby(kind)["split"].nunique()
        if (sides > 1).any():
            names = ", ".join(sides.index[sides > 1][:3])
            raise GrimaceError(f"{dataset}: {kind}s on more than one side of the split: {names}")
    for side in ("test",) if dataset in EVALUATE_ONLY else SIDES:
        if not (index["split"] == side).any():
            found = ", ".join(f"{k} {v}" for k, v in index["split"].value_counts().items())
            raise GrimaceError(
                f"{dataset}: no example on the {side} side (there are: {found}). Training needs "
                f"all three; an archive with a part missing can still be measured with "
                f"`python -m pipelines.evaluate --archive … --split all`."
            )
    learnt = for_emotion and dataset not in EVALUATE_ONLY
    if learnt and index["class"].isin(EMOTIONS).any():
        present = set(index.loc[index["split"] == "train", "class"])
        empty = [name for name in EMOTIONS if name not in present]
        if empty:
            raise GrimaceError(
                f"{dataset}: no training example of class {', '.join(empty)}; see "
                f"reports/filter/{dataset}/findings.csv and reports/split/{dataset}/out.csv for "
                f"what was left out, or complete the archive."
            )


def absent(index: pd.DataFrame) -> list[str]:
    """Say which classes cannot be chosen or tested on, because a side has none of them."""
    lines = []
    for side in ("val", "test"):
        present = set(index.loc[index["split"] == side, "class"])
        missing = sorted(set(index["class"]) - present)
        if present and missing:
            lines.append(f"no example of class {', '.join(missing)} on the {side} side")
    return lines


def write_report(index: pd.DataFrame, dataset: str, out: Path) -> pd.DataFrame:
    """Write classes.csv, its plot, and out.csv; return the counts of classes by side."""
    counts = pd.crosstab(index["class"], index["split"])
    counts = counts.reindex(columns=[*SIDES, OUT], fill_value=0)
    counts.reset_index().to_csv(out / "classes.csv", index=False)
    leaving = index[index["split"] == OUT]
    leaving[["id", "class", "cluster", "reason"]].to_csv(out / "out.csv", index=False)
    _plot_classes(counts, dataset, out / "classes.png")
    return counts


def _plot_classes(counts: pd.DataFrame, dataset: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    totals = counts.sum(axis=1)
    names = [f"{name} ({total:,})" for name, total in totals.items()]
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.35 * len(names)))
    left = 0 * totals
    for side, colour in zip(counts.columns, COLOURS, strict=True):
        share = counts[side] / totals
        bars = axis.barh(names, share, left=left, color=colour, label=side)
        wide = [f"{part:.1%}" if part > 0.04 else "" for part in share]
        axis.bar_label(bars, wide, label_type="center", fontsize=7)
        left = left + share
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="share of the class", title=f"{dataset}: sides by class")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)


def summary(index: pd.DataFrame) -> dict[str, object]:
    """Return counts of examples and groups a side, and of those out by what they share."""
    sides = index.groupby("split")
    kinds = index.loc[index["split"] == OUT, "reason"].str.split(" ").str[0]
    return {
        "examples": {side: int(count) for side, count in sides.size().items()},
        "groups": {side: int(count) for side, count in sides["group"].nunique().items()},
        "out": {
            "copies": int((kinds == "copy").sum()),
            "same_person": int((kinds == "same").sum()),
            "linked": int((kinds == "linked").sum()),
        },
    }


if __name__ == "__main__":
    run(main)
