from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from models.schemes import EMOTIONS
from pipelines.checks.image import measure_image
from pipelines.crops import decode
from pipelines.datasets import synthetic
from pipelines.datasets.example import Pose
from pipelines.slices import COLUMNS, bins_of, figures_by_slice, plot_slices, traits_of


def traits(**columns: object) -> pd.DataFrame:
    """A table with these columns, and of the others what stands for unknown."""
    unknown = {
        "class": "unlabelled",
        "brightness": np.nan,
        "yaw": np.nan,
        "face_size": np.nan,
        "source": "",
    }
    count = len(next(iter(columns.values())))  # type: ignore[arg-type]
    return pd.DataFrame(unknown | columns, index=range(count))[COLUMNS]


def test_yaw_bins_are_those_of_aflw() -> None:
    degrees = [0, -30, 30.1, -59, 60, 61, -89, 95, np.nan]
    found = bins_of(traits(yaw=degrees))
    bins = ["0-30", "0-30", "30-60", "30-60", "30-60", "60-90", "60-90", "60-90", ""]
    assert {name: list(values) for name, values in found.items()} == {"yaw": bins}


def test_face_size_bins() -> None:
    found = bins_of(traits(face_size=[10, 31.9, 32, 63, 64, 127, 128, 900, np.nan]))["face_size"]
    assert list(found) == [
        *("under 32", "under 32", "32-64", "32-64", "64-128", "64-128"),
        *("128 or more", "128 or more", ""),
    ]


def test_brightness_is_in_thirds_of_what_is_known() -> None:
    values = np.append(np.random.default_rng(0).permutation(90) / 100, np.nan)
    found = bins_of(traits(brightness=values))["brightness"]
    for name, low, high in (("dark", 0, 0.3), ("middle", 0.3, 0.6), ("bright", 0.6, 0.9)):
        inside = {value for value in values if low <= value < high}
        assert set(values[found == f"{name} third"]) == inside and len(inside) == 30
    assert found[-1] == ""
    assert "brightness" not in bins_of(traits(brightness=[0.5] * 9))


def test_classes_and_sources() -> None:
    found = bins_of(
        traits(**{"class": ["sad", "unlabelled", "contempt"], "source": ["a", "b", "a"]})
    )
    assert {name: list(values) for name, values in found.items()} == {
        "class": ["sad", "", "contempt"],
        "source": ["a", "b", "a"],
    }


def test_means_agree_with_a_loop_and_intervals_with_the_textbook() -> None:
    rng = np.random.default_rng(1)
    count = 3000
    bins = {
        "class": rng.choice([*EMOTIONS, ""], count),
        "yaw": rng.choice(["60-90", "0-30"], count),
    }
    error = rng.gamma(2, 0.03, count)
    error[rng.random(count) < 0.1] = np.nan
    right = (rng.random(count) < 0.7).astype(float)
    ones = rng.multinomial(count, np.full(count, 1 / count), 1000)
    batches = np.split(ones, 10)
    found = figures_by_slice({"error": error, "right": right}, bins, np.arange(count), batches)
    assert list(found["class"]) == list(EMOTIONS)
    assert list(found["yaw"]) == ["0-30", "60-90"]
    for column, names in bins.items():
        for name, row in found[column].items():
            inside = [number for number in range(count) if names[number] == name]
            known = [error[number] for number in inside if not np.isnan(error[number])]
            assert row["n"] == len(inside)
            assert row["error"] == pytest.approx(sum(known) / len(known))
            share = sum(right[number] for number in inside) / len(inside)
            assert row["right"] == pytest.approx(share)
            low, high = row["ci95"]["right"]
            half = 1.96 * np.sqrt(share * (1 - share) / len(inside))
            assert (share - low, high - share) == pytest.approx((half, half), rel=0.2)
            low, high = row["ci95"]["error"]
            assert high - low == pytest.approx(
                2 * 1.96 * np.std(known) / np.sqrt(len(known)), rel=0.15
            )


def test_too_little_evidence_gets_no_interval() -> None:
    bins = {
        "source": np.array(["few"] * 9 + ["one person"] * 40 + ["enough"] * 10 + ["blind"] * 12)
    }
    groups = np.array([*range(9), *[100] * 40, *range(200, 222)])
    error = np.linspace(0, 1, 71)
    error[-12:] = np.nan
    batches = [np.ones((200, 71), int)]
    found = figures_by_slice({"error": error}, bins, groups, batches)["source"]
    assert {name: row["n"] for name, row in found.items()} == {
        "few": 9,
        "one person": 40,
        "enough": 10,
        "blind": 12,
    }
    assert found["few"]["ci95"] is None and found["one person"]["ci95"] is None
    assert found["few"]["error"] == pytest.approx(error[:9].mean())
    assert found["enough"]["ci95"]["error"] == pytest.approx([found["enough"]["error"]] * 2)
    assert found["blind"]["error"] is None


def test_traits_of_an_example() -> None:
    face = next(iter(synthetic.examples(1, 3)))
    found = traits_of(face, "synthetic")
    assert list(found) == COLUMNS
    assert found["class"] == EMOTIONS[face.emotion] and found["source"] == "synthetic"
    rgb = decode(face.image, 3)
    assert found["brightness"] == measure_image(rgb)["brightness"]
    assert found["face_size"] == pytest.approx(np.ptp(face.landmarks[face.visible], 0).max())
    assert -90 < found["yaw"] < 90
    object.__setattr__(face, "pose", Pose(0, 71, 0))
    assert traits_of(face, "synthetic")["yaw"] == 71


def test_the_plot(tmp_path: Path) -> None:
    slices = {
        "class": {
            "happy $x": {"n": 1200, "accuracy": 0.9, "ci95": {"accuracy": [0.88, 0.92]}},
            "sad": {"n": 3, "accuracy": 0.3, "ci95": None},
            "none": {"n": 2, "accuracy": None, "ci95": None},
        }
    }
    plot_slices(slices, "accuracy", 0.8, tmp_path / "slices.png", "model $y")
    with Image.open(tmp_path / "slices.png") as picture:
        assert min(picture.size) > 100 and len(set(picture.convert("L").getdata())) > 10
