import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from models.schemes import EMOTIONS
from pipelines.cli import GrimaceError
from pipelines.datasets.example import Example
from pipelines.datasets.table import write_examples
from pipelines.params import Split
from pipelines.split import SIDES, check, main, make_index, side_of

ROOT = Path(__file__).parents[2]
PARAMS = Split(seed=2026, val=0.15, test=0.2)


def people(count: int, start: int = 0) -> list[Example]:
    """Three pictures of each person, one of every emotion in turn."""
    return [
        Example(f"id-{person}-{shot}", b"", emotion=(person + shot) % 7, person=f"person-{person}")
        for person in range(start, start + count)
        for shot in range(3)
    ]


def strangers(count: int) -> list[Example]:
    return [Example(f"id-{number}", b"", emotion=number % 7) for number in range(count)]


def test_a_person_stands_on_one_side() -> None:
    examples = people(300)
    np.random.default_rng(0).shuffle(examples)
    index = make_index(examples, PARAMS)
    assert len(index) == 900 and set(index["split"]) == set(SIDES)
    person = index["id"].str.split("-").str[1]
    assert (index.groupby(person)["split"].nunique() == 1).all()
    check(index, "faces")


@pytest.mark.parametrize("examples", [people(4000), strangers(4000)], ids=["people", "strangers"])
def test_shares_are_about_right(examples: list[Example]) -> None:
    index = make_index(examples, PARAMS)
    shares = index.drop_duplicates("group")["split"].value_counts(normalize=True)
    assert shares["test"] == pytest.approx(0.2, abs=0.02)
    assert shares["val"] == pytest.approx(0.15, abs=0.02)


def test_added_data_moves_nobody() -> None:
    before = make_index(people(200), PARAMS).set_index("id")["split"]
    after = make_index(people(50, start=200) + people(200)[::-1], PARAMS).set_index("id")["split"]
    assert len(after) == 750
    assert (after[before.index] == before).all()


def test_a_larger_share_takes_from_training_alone() -> None:
    small = make_index(strangers(2000), PARAMS)["split"]
    large = make_index(strangers(2000), Split(seed=2026, val=0.3, test=0.2))["split"]
    assert (large[small != "train"] == small[small != "train"]).all()
    assert (large == "val").sum() > (small == "val").sum()


def test_the_seed_changes_the_draw() -> None:
    one = make_index(strangers(500), PARAMS)["split"]
    two = make_index(strangers(500), Split(seed=1, val=0.15, test=0.2))["split"]
    assert (one != two).mean() > 0.2


def test_sides_stay_what_they_once_were() -> None:
    """Pinned: another hash would move people between the sides of data already trained on."""
    sides = {number: side_of(f"person-{number}", PARAMS) for number in range(40)}
    assert {number: side for number, side in sides.items() if side != "train"} == {
        7: "test",
        10: "test",
        15: "test",
        16: "test",
        17: "test",
        21: "test",
        28: "val",
        29: "val",
        30: "val",
        37: "test",
        39: "test",
    }


def test_the_official_split_is_respected() -> None:
    examples = [
        Example(f"id-{number}", b"", official_split=SIDES[number % 3]) for number in range(300)
    ]
    index = make_index(examples, PARAMS)
    assert list(index["split"]) == [SIDES[number % 3] for number in range(300)]


def test_unlabelled_and_labelled() -> None:
    index = make_index([Example("a", b"", emotion=4), Example("b", b"")], PARAMS)
    assert list(index.columns) == ["id", "split", "group", "class"]
    assert list(index["class"]) == ["neutral", "unlabelled"]
    assert list(index["group"]) == ["a", "b"]


def on_each_side() -> list[Example]:
    """All classes on all sides, officially."""
    return [
        Example(f"{side}-{emotion}", b"", emotion=emotion, official_split=side)
        for side in SIDES
        for emotion in range(7)
    ]


def test_a_good_split_passes() -> None:
    check(make_index(on_each_side(), PARAMS), "faces")


def test_a_person_on_two_official_sides_is_refused() -> None:
    extra = [
        Example("x", b"", person="0a1b", official_split="train"),
        Example("y", b"", person="0a1b", official_split="test"),
    ]
    with pytest.raises(GrimaceError, match=r"faces: groups on more than one side .*0a1b"):
        check(make_index(on_each_side() + extra, PARAMS), "faces")


@pytest.mark.parametrize("side", SIDES)
def test_an_empty_side_is_refused(side: str) -> None:
    examples = [example for example in on_each_side() if example.official_split != side]
    with pytest.raises(GrimaceError, match=rf"faces: no example on the {side} side .*: .* 7"):
        check(make_index(examples, PARAMS), "faces")


def test_no_examples_at_all() -> None:
    with pytest.raises(GrimaceError, match="no example on the train side"):
        check(make_index([], PARAMS), "faces")


def test_a_class_without_training_examples_is_refused() -> None:
    examples = [example for example in on_each_side() if example.id not in ("train-1", "train-5")]
    with pytest.raises(GrimaceError, match=r"faces: no training example of class disgust, sad;"):
        check(make_index(examples, PARAMS), "faces")


def test_landmark_data_needs_no_classes() -> None:
    examples = [Example(side, b"", official_split=side) for side in SIDES]
    check(make_index(examples, PARAMS), "faces")


def test_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = tmp_path / "data/clean/fer2013"
    clean.mkdir(parents=True)
    write_examples(people(120), clean)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["split", "--dataset", "fer2013"])
    main()
    index = pd.read_parquet("data/split/fer2013/index.parquet")
    assert list(index["id"]) == [example.id for example in people(120)]
    counts = pd.read_csv("reports/split/fer2013/classes.csv").set_index("class")
    assert set(counts.index) == set(EMOTIONS) and counts.to_numpy().sum() == 360
    summary = json.loads(Path("reports/split/fer2013.json").read_text())
    assert summary["examples"] == index["split"].value_counts().to_dict()
    assert sum(summary["groups"].values()) == 120

    # A refused split leaves the old one.
    write_examples(people(1), clean)
    with pytest.raises(GrimaceError, match="no example on the"):
        main()
    assert len(pd.read_parquet("data/split/fer2013/index.parquet")) == 360
