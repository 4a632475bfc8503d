from dataclasses import replace

import numpy as np
import pytest

from pipelines.batches import Batches, class_weights, training_batches
from pipelines.job import Job
from pipelines.shards import View

TRAIN = 40
EMOTIONS = np.array([3] * 24 + [5] * 12 + [0] * 4)
JOB = Job(
    task="emotion",
    model="plain",
    loss="cross_entropy",
    optimizer="sgd",
    learning_rate=0.1,
    epochs=3,
    batch=16,
    seed=7,
)


@pytest.fixture
def faces() -> View:
    """Image n is n all over, and weighs (n + 1) / 40."""
    levels = np.arange(TRAIN, dtype=np.uint8)[:, None, None, None]
    return View(
        ids=np.arange(TRAIN).astype(str),
        weights=((np.arange(TRAIN) + 1) / TRAIN).astype(np.float32),
        images=np.broadcast_to(levels, (TRAIN, 8, 8, 1)),
        emotions=EMOTIONS,
        landmarks=None,
        visible=None,
    )


@pytest.fixture
def points() -> View:
    rng = np.random.default_rng(0)
    return View(
        ids=np.arange(TRAIN).astype(str),
        weights=np.ones(TRAIN, np.float32),
        images=np.zeros((TRAIN, 8, 8, 1), np.uint8),
        emotions=None,
        landmarks=rng.random((TRAIN, 68, 2)).astype(np.float32),
        visible=rng.random((TRAIN, 68)) < 0.5,
    )


def whole(batches: Batches) -> list[np.ndarray]:
    parts = [batches[index] for index in range(len(batches))]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def test_every_image_comes_once_with_what_belongs_to_it(faces: View) -> None:
    orders = []
    for epoch in range(2):
        images, labels, weights = whole(training_batches(JOB, faces, epoch, None))
        numbers = images[:, 0, 0, 0].astype(int)
        assert sorted(numbers) == list(range(TRAIN))
        assert np.array_equal(labels.argmax(-1), EMOTIONS[numbers])
        assert np.allclose(weights, (numbers + 1) / TRAIN)
        orders.append(numbers.tolist())
    assert orders[0] != orders[1]
    again = whole(training_batches(JOB, faces, 1, None))[0][:, 0, 0, 0]
    assert again.tolist() == orders[1]


def test_images_that_all_weigh_the_same_need_no_weights(faces: View) -> None:
    view = replace(faces, weights=np.ones(TRAIN, np.float32))
    assert len(training_batches(JOB, view, 0, None)[0]) == 2


def test_teachers_answers_stand_behind_the_labels(faces: View, points: View) -> None:
    answers = np.arange(TRAIN * 7, dtype=np.float32).reshape(TRAIN, 7)
    images, labels, _ = whole(training_batches(JOB, faces, 0, answers))
    numbers = images[:, 0, 0, 0].astype(int)
    assert np.array_equal(labels[:, :7], np.eye(7)[EMOTIONS[numbers]])
    assert np.array_equal(labels[:, 7:], answers[numbers])

    job = replace(JOB, task="landmarks", loss="wing")
    taught = np.random.default_rng(1).random((TRAIN, 68, 2)).astype(np.float32)
    order = training_batches(job, points, 0, taught).order
    _, labels = whole(training_batches(job, points, 0, taught))
    rows = np.concatenate([np.sort(order[start : start + 16]) for start in (0, 16, 32)])
    assert labels.shape == (TRAIN, 68, 5)
    assert points.landmarks is not None and points.visible is not None
    assert np.array_equal(labels[..., :2], points.landmarks[rows])
    assert np.array_equal(labels[..., 2], points.visible[rows])
    assert np.array_equal(labels[..., 3:], taught[rows])


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}])
def test_all_that_belongs_to_an_image_is_mixed_with_its_share(
    options: dict[str, float], faces: View
) -> None:
    """Weights, and answers times weights, are linear in the image's number, so they mix as it."""
    numbers = np.arange(TRAIN, dtype=np.float32)
    answers = np.stack([numbers / faces.weights] * 7, -1)
    images, labels, weights = whole(training_batches(replace(JOB, **options), faces, 0, answers))
    mixed = images.mean((1, 2, 3))  # of pasted images as of blended ones
    assert not np.allclose(mixed, np.round(mixed))
    assert np.allclose(labels[:, 7] * weights, mixed, atol=1e-4)
    assert np.allclose(weights, (mixed + 1) / TRAIN, atol=1e-6)
    assert np.allclose(labels[:, :7].sum(-1), 1)
    assert ((labels[:, :7] > 0).sum(-1) <= 2).all()


def test_what_is_drawn_follows_from_seed_epoch_and_batch(faces: View) -> None:
    job = replace(JOB, mixup=0.3, cutmix=1.0, erase=0.5)
    first, second = (training_batches(job, faces, 4, None) for _ in range(2))
    # In whatever order the batches are asked for, as several workers do, or after a kill.
    backwards = [second[index] for index in (2, 1, 0)][::-1]
    for index in range(3):
        for one, other in zip(first[index], backwards[index], strict=True):
            assert np.array_equal(one, other)
    for changed in (replace(job, seed=8), job):
        other = training_batches(changed, faces, 5, None)
        assert not np.array_equal(first[0][0], other[0][0])


def test_erasing_leaves_labels_and_landmarks(points: View) -> None:
    job = replace(JOB, task="landmarks", loss="wing", erase=1.0)
    images, labels = whole(training_batches(job, points, 0, None))
    assert (images > 0).any((1, 2, 3)).all()
    _, untouched = whole(training_batches(replace(job, erase=0.0), points, 0, None))
    assert np.array_equal(labels, untouched)


@pytest.mark.parametrize("kind", ["balanced", "effective"])
def test_class_weights(kind: str) -> None:
    """Cui et al. 2019, equation 2; images weigh 1 on average."""
    expected = np.zeros(7)
    for label, count in ((3, 24), (5, 12), (0, 4)):
        effective = sum(0.999**power for power in range(count))
        expected[label] = 1 / (count if kind == "balanced" else effective)
    expected *= TRAIN / sum(expected[label] for label in EMOTIONS)
    weights = class_weights(EMOTIONS, kind)
    assert np.allclose(weights, expected, rtol=1e-5)
    assert weights[[1, 2, 4, 6]].tolist() == [0, 0, 0, 0]


def test_balanced_classes_count_the_same_in_all() -> None:
    many = np.array([0] * 5000 + [1] * 500 + [2] * 50)
    balanced, effective = class_weights(many, "balanced"), class_weights(many, "effective")
    assert np.allclose(balanced[:3] * [5000, 500, 50], len(many) / 3)
    assert 1 < effective[2] / effective[0] < balanced[2] / balanced[0]


def test_class_weights_multiply_those_of_the_images(faces: View) -> None:
    job = replace(JOB, class_weights="balanced")
    images, _, weights = whole(training_batches(job, faces, 0, None))
    numbers = images[:, 0, 0, 0].astype(int)
    expected = (numbers + 1) / TRAIN * class_weights(EMOTIONS, "balanced")[EMOTIONS[numbers]]
    assert np.allclose(weights, expected)
