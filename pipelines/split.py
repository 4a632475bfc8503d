"""Stage `split`: give every clean example a side, so that no person stands on two.

The source's official split is respected where there is one. Elsewhere the side follows from a
hash of the seed and the group alone, so that data added later moves no old example.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from models.schemes import EMOTIONS
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.datasets.example import Example
from pipelines.datasets.table import read_examples
from pipelines.params import Split, load_params

SIDES = ("train", "val", "test")


def main() -> None:
    """Index the clean dataset and count what lies where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True, help="a dataset that `filter` has cleaned")
    args = parser.parse_args()
    params = load_params().split

    index = make_index(read_examples(Path("data/clean", args.dataset), images=False), params)
    check(index, args.dataset)
    with whole_folder(Path("data/split", args.dataset)) as out:
        index.to_parquet(out / "index.parquet", index=False)
    counts = pd.crosstab(index["class"], index["split"])
    with whole_folder(Path("reports/split", args.dataset)) as out:
        counts.reset_index().to_csv(out / "classes.csv", index=False)
    report = Path("reports/split", f"{args.dataset}.json")
    report.write_text(json.dumps(summary(index), indent=2) + "\n")
    print(counts.to_string())


def make_index(examples: Iterable[Example], params: Split) -> pd.DataFrame:
    """Assign sides.

    Returns:
        One row an example: id, split ("train", "val" or "test"), group, class.
    """
    rows = []
    for example in examples:
        group = example.person or example.id
        side = example.official_split or side_of(group, params)
        label = EMOTIONS[example.emotion] if example.emotion >= 0 else "unlabelled"
        rows.append((example.id, side, group, label))
    return pd.DataFrame(rows, columns=["id", "split", "group", "class"])


def side_of(group: str, params: Split) -> str:
    """Return the side of a group without an official one: a pure function of seed and name."""
    digest = hashlib.sha256(f"{params.seed}/{group}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    if draw < params.test:
        return "test"
    return "val" if draw < params.test + params.val else "train"


def check(index: pd.DataFrame, dataset: str) -> None:
    """Refuse a split that leaks or that cannot be trained on.

    Raises:
        GrimaceError: a group on two sides, an empty side, or a class without training examples.
    """
    straddling = index.groupby("group")["split"].nunique()
    if (straddling > 1).any():
        names = ", ".join(straddling.index[straddling > 1][:3])
        raise GrimaceError(f"{dataset}: groups on more than one side of the split: {names}")
    for side in SIDES:
        if not (index["split"] == side).any():
            found = ", ".join(f"{k} {v}" for k, v in index["split"].value_counts().items())
            raise GrimaceError(
                f"{dataset}: no example on the {side} side (there are: {found}). Training needs "
                f"all three; an archive with a part missing can still be measured with "
                f"`python -m pipelines.evaluate --archive … --split all`."
            )
    if index["class"].isin(EMOTIONS).any():
        present = set(index.loc[index["split"] == "train", "class"])
        empty = [name for name in EMOTIONS if name not in present]
        if empty:
            raise GrimaceError(
                f"{dataset}: no training example of class {', '.join(empty)}; see "
                f"reports/filter/{dataset}/findings.csv for what was dropped, or complete the "
                f"archive."
            )


def summary(index: pd.DataFrame) -> dict[str, object]:
    """Return counts of examples and groups a side."""
    sides = index.groupby("split")
    return {
        "examples": {side: int(count) for side, count in sides.size().items()},
        "groups": {side: int(count) for side, count in sides["group"].nunique().items()},
    }


if __name__ == "__main__":
    run(main)
