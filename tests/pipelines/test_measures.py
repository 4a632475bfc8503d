"""Bootstrap intervals and figures by slice, on made-up answers."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipelines.heldout import Faces
from pipelines.measures import by_slice, measure
from pipelines.params import METRICS, load_params

SETTINGS = load_params(Path(__file__).parents[2] / "params.yaml").evaluate


def emotion_faces(truth: np.ndarray, groups: np.ndarray | None = None) -> Faces:
    ids = np.array([f"id-{number}" for number in range(len(truth))])
    images = np.zeros((len(truth), 2, 2, 1), np.uint8)
    return Faces(ids, ids if groups is None else groups, images, truth, None, None, {})


def answers(rng: np.random.Generator, truth: np.ndarray, accuracy: float) -> np.ndarray:
    wrong = (truth + rng.integers(1, 7, len(truth))) % 7
    return np.eye(7)[np.where(rng.random(len(truth)) < accuracy, truth, wrong)]


def test_interval_of_independent_faces_is_the_textbook_one():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 7, 900)
    scores = measure(emotion_faces(truth), answers(rng, truth, 0.7), SETTINGS)
    share = scores["accuracy"]
    half = 1.96 * np.sqrt(share * (1 - share) / 900)
    low, high = scores["ci95"]["accuracy"]
    assert (share - low, high - share) == pytest.approx((half, half), rel=0.12)


def test_intervals_are_seeded():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 7, 60)
    outputs = answers(rng, truth, 0.5)
    first, again = (measure(emotion_faces(truth), outputs, SETTINGS) for _ in range(2))
    other = measure(
        emotion_faces(truth), outputs, SETTINGS.model_copy(update={"seed": SETTINGS.seed + 1})
    )
    assert first == again
    assert other["accuracy"] == first["accuracy"]
    assert other["ci95"] != first["ci95"]


def test_people_are_drawn_not_pictures():
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 7, 30)
    outputs = answers(rng, truth, 0.6)
    people = np.array([f"person-{number}" for number in range(30)])
    once = measure(emotion_faces(truth, people), outputs, SETTINGS)["ci95"]["accuracy"]
    nine = np.repeat(np.arange(30), 9)
    by_person = measure(emotion_faces(truth[nine], people[nine]), outputs[nine], SETTINGS)
    by_picture = measure(emotion_faces(truth[nine]), outputs[nine], SETTINGS)
    assert by_person["ci95"]["accuracy"] == pytest.approx(once)
    width = np.ptp(by_picture["ci95"]["accuracy"])
    assert width == pytest.approx(np.ptp(once) / 3, rel=0.25)


def test_the_mean_over_yaw_bins_weighs_each_bin_alike():
    rng = np.random.default_rng(12)
    truth = rng.random((60, 68, 2)).astype(np.float32)
    yaw = np.array([10] * 40 + [-50] * 15 + [80] * 5)
    off = np.where(yaw == 80, 0.3, np.where(yaw == -50, 0.1, 0.02))[:, None, None]
    ids = np.arange(60).astype(str)
    columns = {"class": "unlabelled", "brightness": np.nan, "face_size": 50.0, "source": "aflw2k3d"}
    traits = pd.DataFrame({"yaw": yaw}).assign(**columns)
    images = np.zeros((60, 2, 2, 1), np.uint8)
    visible = np.ones((60, 68), bool)
    faces = Faces(ids, ids, images, None, truth, visible, {}, traits)
    found = by_slice(faces, truth + off, SETTINGS)
    bins = found["slices"]["yaw"]
    assert [(name, row["n"]) for name, row in bins.items()] == [
        *(("0-30", 40), ("30-60", 15), ("60-90", 5))
    ]
    assert bins["60-90"]["ci95"] is None
    boxes = [row["nme_box"] for row in bins.values()]
    assert boxes == pytest.approx([0.02 * 2**0.5, 0.1 * 2**0.5, 0.3 * 2**0.5], rel=0.1)
    assert found["nme_box_yaw_mean"] == pytest.approx(sum(boxes) / 3)
    assert found["nme_box_yaw_mean"] > 2 * measure(faces, truth + off, SETTINGS)["nme_box"]
    frontal = by_slice(
        Faces(ids, ids, images, None, truth, visible, {}, traits.assign(yaw=5.0)), truth, SETTINGS
    )
    assert "nme_box_yaw_mean" not in frontal


@pytest.mark.parametrize("task", ["emotion", "landmarks"])
def test_what_select_may_decide_by_has_an_interval_and_the_direction_said(task):
    rng = np.random.default_rng(13)
    if task == "emotion":
        truth = rng.integers(0, 7, 60)
        faces = emotion_faces(truth)
        good, poor = np.eye(7)[truth], answers(rng, truth, 0.4)
    else:
        points = rng.random((60, 68, 2)).astype(np.float32)
        ids, visible = np.arange(60).astype(str), np.ones((60, 68), bool)
        faces = Faces(ids, ids, np.zeros((60, 2, 2, 1), np.uint8), None, points, visible, {})
        good, poor = points, points + 0.2
    best, worst = (measure(faces, outputs, SETTINGS) for outputs in (good, poor))
    assert list(METRICS[task]) == list(best["ci95"])
    for metric, higher_is_better in METRICS[task].items():
        assert (best[metric] > worst[metric]) == higher_is_better, metric
        assert best[metric] != worst[metric], metric
