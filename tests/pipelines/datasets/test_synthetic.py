"""The synthetic dataset: what its examples hold, and that processors do not change them."""

import os

import cv2
import numpy as np
import pytest

from models.schemes import EMOTIONS
from pipelines.cli import GrimaceError
from pipelines.datasets.faces import render
from pipelines.datasets.synthetic import examples


def test_examples_hold_what_was_rendered():
    for index, example in enumerate(examples(8, seed=2)):
        face = render(2, index)
        decoded = cv2.imdecode(np.frombuffer(example.image, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert np.abs(decoded.astype(int) - face.image).mean() < 6
        assert example.id == f"synthetic-{index:06d}"
        assert example.person == f"identity-{index // 5:05d}"
        assert example.emotion == face.emotion
        assert (example.official_split, example.box, example.defect) == ("", None, "")
        np.testing.assert_array_equal(example.visible, face.visible)


def test_points_outside_the_image_hold_zero():
    cut = [row for row in examples(120, seed=2) if not row.visible.all()]
    assert cut
    for row in cut:
        assert (row.landmarks[~row.visible] == 0).all()
        assert (row.landmarks[row.visible].min(axis=0) > -0.5).all()
        assert row.landmarks.dtype == np.float32


def test_more_faces_and_more_processors_change_nothing(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    parallel = list(examples(150, seed=9))  # two tasks, so two processes
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    alone = list(examples(140, seed=9))
    assert [row.id for row in parallel] == [f"synthetic-{index:06d}" for index in range(150)]
    for first, second in zip(alone, parallel, strict=False):
        assert first.image == second.image
        np.testing.assert_array_equal(first.landmarks, second.landmarks)


def test_emotions_are_balanced():
    counts = np.bincount([row.emotion for row in examples(72, seed=0)], minlength=len(EMOTIONS))
    assert counts.min() == 10
    assert counts.max() == 11


def test_a_negative_seed_is_refused_at_once():
    with pytest.raises(GrimaceError, match="seed"):
        examples(7, seed=-1)
