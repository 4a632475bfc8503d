import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipelines.cli import GrimaceError
from pipelines.datasets import builder
from pipelines.datasets.example import Example
from pipelines.datasets.table import read_examples
from pipelines.filter import Finding, audit, main
from pipelines.params import Filter

ROOT = Path(__file__).parents[2]
PARAMS = Filter(blank_std=2.0, exact_duplicates=True)


def picture(seed: int, format: str = "PNG", size: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), np.uint8)
    return encode(pixels, format)


def encode(pixels: np.ndarray, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {}
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def judged(*examples: Example, params: Filter = PARAMS) -> dict[str, Finding]:
    return {finding.id: finding for finding in audit(examples, params)}


def test_good_pictures_are_kept() -> None:
    assert judged(Example("a", picture(1)), Example("b", picture(2))) == {}


def test_defect() -> None:
    found = judged(Example("a", picture(1), defect="label 9 is outside 0-6"))["a"]
    assert (found.check, found.action) == ("defect", "drop")
    assert found.evidence == "label 9 is outside 0-6"
    assert np.isnan([found.score, found.threshold]).all()


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [(b"", "zero bytes"), (b"<html>", "cannot identify"), (picture(1)[:300], "truncated")],
)
def test_unreadable(encoded: bytes, reason: str) -> None:
    found = judged(Example("a", encoded))["a"]
    assert found.check == "unreadable"
    assert reason in found.evidence


@pytest.mark.parametrize(("spread", "dropped"), [(0, True), (3, True), (5, False)])
def test_blank(spread: int, dropped: bool) -> None:
    pixels = np.full((24, 24), 128, np.uint8)
    pixels[:, ::2] += spread  # standard deviation: half of it
    found = judged(Example("a", encode(pixels)))
    assert bool(found) == dropped
    if dropped:
        assert found["a"].check == "blank"
        assert found["a"].score == pytest.approx(spread / 2)
        assert found["a"].threshold == 2.0
        assert f"{spread / 2:.2f} of 255" in found["a"].evidence


def test_one_flat_colour_channel_does_not_make_a_picture_blank() -> None:
    pixels = np.zeros((24, 24, 3), np.uint8)
    pixels[:, ::2, 2] = 200
    assert judged(Example("a", encode(pixels))) == {}


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "TIFF"])
def test_duplicates_are_found_whatever_their_encoding(format: str) -> None:
    found = judged(Example("b", picture(1)), Example("a", picture(1, format)))
    assert list(found) == ["b"]  # without an official split the smallest id stays
    assert found["b"].check == "duplicate"
    assert found["b"].evidence == "same pixels as a, which is kept"


def test_grey_stored_as_colour_is_the_same_picture() -> None:
    grey = np.random.default_rng(1).integers(0, 256, (24, 24), np.uint8)
    found = judged(Example("a", encode(grey)), Example("b", encode(np.stack([grey] * 3, -1))))
    assert list(found) == ["b"]


def test_same_bytes_in_another_shape_are_no_duplicate() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (12, 48), np.uint8)
    other = encode(pixels.reshape(48, 12))
    assert judged(Example("a", encode(pixels)), Example("b", other)) == {}


@pytest.mark.parametrize(
    ("splits", "kept"),
    [
        (("train", "val", "test"), "c"),
        (("test", "val", "train"), "a"),
        (("train", "val", ""), "b"),
        (("", "train", ""), "b"),
        (("train", "train", "train"), "a"),
        (("train", "test", "test"), "b"),
    ],
)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_test_copy_stays(
    splits: tuple[str, str, str], kept: str, order: tuple[int, ...]
) -> None:
    examples = [
        Example(id, picture(1), official_split=split)
        for id, split in zip("abc", splits, strict=True)
    ]
    found = judged(*(examples[i] for i in order))
    assert set(found) == set("abc") - {kept}
    assert all(kept in finding.evidence for finding in found.values())


def test_a_dropped_copy_does_not_take_the_good_one_along() -> None:
    bad = Example("a", picture(1), official_split="test", defect="no label")
    found = judged(bad, Example("b", picture(1), official_split="train"))
    assert {id: finding.check for id, finding in found.items()} == {"a": "defect"}


def test_duplicates_may_stay() -> None:
    params = Filter(blank_std=2.0, exact_duplicates=False)
    assert judged(Example("a", picture(1)), Example("b", picture(1)), params=params) == {}


def test_first_check_gives_the_reason_and_order_is_kept() -> None:
    examples = [
        Example("z", encode(np.zeros((9, 9), np.uint8)), defect="bad row"),
        Example("y", b"", defect=""),
        Example("m", encode(np.zeros((9, 9), np.uint8))),
        Example("n", encode(np.zeros((9, 9), np.uint8))),
    ]
    found = audit(examples, PARAMS)
    assert [(finding.id, finding.check) for finding in found] == [
        ("z", "defect"),
        ("y", "unreadable"),
        ("m", "blank"),
        ("n", "blank"),
    ]


# the stage


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Example]], None]:
    """Run the stage on a raw dataset of these examples, in an empty working folder."""

    def stage(examples: list[Example]) -> None:
        shutil.copy(ROOT / "params.yaml", tmp_path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["filter", "--dataset", "fer2013"])
        builder.write(Path("data/raw/fer2013"), examples, "a card")
        main()

    return stage


def test_the_stage(stage: Callable[[list[Example]], None]) -> None:
    points = np.array([[1, 2], [3, 4]], np.float32)
    good = Example(
        "good",
        picture(1),
        emotion=3,
        landmarks=points,
        visible=np.ones(2, bool),
        person="p",
        official_split="test",
    )
    raw = [
        good,
        Example("other", picture(2), emotion=3),
        Example("unlabelled", picture(3)),
        Example("copy", picture(1, "BMP"), emotion=3, official_split="train"),
        Example("broken", picture(4)[:200], emotion=0),
        Example("blank", encode(np.full((1, 1), 7, np.uint8)), emotion=0),
        Example("$bad$", picture(5), defect="label 9"),
    ]
    stage(raw)

    kept = {example.id: example for example in read_examples(Path("data/clean/fer2013"))}
    reports = Path("reports/filter")
    findings = pd.read_parquet(reports / "fer2013/findings.parquet")
    assert set(kept) == {"good", "other", "unlabelled"}
    assert {*kept, *findings["id"]} == {example.id for example in raw}
    assert len(kept) + len(findings) == len(raw)
    assert {"id", "check", "score", "threshold", "action"} <= set(findings.columns)
    assert dict(zip(findings["id"], findings["check"], strict=True)) == {
        "copy": "duplicate",
        "broken": "unreadable",
        "blank": "blank",
        "$bad$": "defect",
    }
    assert set(findings["action"]) == {"drop"}
    pd.testing.assert_frame_equal(
        pd.read_csv(reports / "fer2013/findings.csv"), findings, check_dtype=False
    )

    back = kept["good"]
    assert (back.image, back.emotion, back.person) == (good.image, 3, "p")
    assert back.official_split == "test" and np.array_equal(back.landmarks, points)

    summary: dict[str, Any] = json.loads((reports / "fer2013.json").read_text())
    assert (summary["raw"], summary["kept"], summary["dropped"]) == (7, 3, 4)
    checks = {"blank": 1, "defect": 1, "duplicate": 1, "unreadable": 1}
    assert summary["dropped_by_check"] == checks
    classes = pd.read_csv(reports / "fer2013/classes.csv")
    assert dict(classes.itertuples(index=False)) == {"happy": 2, "unlabelled": 1}
    sheets = {path.name for path in (reports / "fer2013").glob("*.png")}
    assert sheets == {"blank.png", "duplicate.png"}


def test_nothing_to_drop(stage: Callable[[list[Example]], None]) -> None:
    stage([Example("a", picture(1)), Example("b", picture(2))])
    findings = pd.read_parquet("reports/filter/fer2013/findings.parquet")
    assert len(findings) == 0
    assert {"id", "check", "score", "threshold", "action"} <= set(findings.columns)
    assert len(list(read_examples(Path("data/clean/fer2013")))) == 2


def test_dropping_everything_is_an_error_and_keeps_the_old(
    stage: Callable[[list[Example]], None], tmp_path: Path
) -> None:
    stage([Example("a", picture(1))])
    with pytest.raises(GrimaceError, match=r"every example of fer2013.*b.*unreadable: zero bytes"):
        stage([Example("b", b"")])
    assert [example.id for example in read_examples(tmp_path / "data/clean/fer2013")] == ["a"]


def test_without_raw_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["filter", "--dataset", "fer2013"])
    with pytest.raises(GrimaceError, match="data/raw/fer2013 holds no dataset"):
        main()
