import cv2
import numpy as np
import pytest

from models.schemes import EMOTIONS
from pipelines.checks.labels import gradient_histograms, out_of_fold, suspected
from pipelines.crops import crop, decode, face_box
from pipelines.datasets import synthetic
from pipelines.params import Mislabelled

LINEAR = Mislabelled(action="flag", estimator="linear", folds=4, epochs=1, threshold=0.3)
NETWORK = Mislabelled(action="flag", estimator="network", folds=2, epochs=6, threshold=0.3)

Faces = tuple[np.ndarray, np.ndarray, list[str]]


@pytest.fixture(scope="module")
def faces() -> Faces:
    """Six hundred drawn faces, their true emotions, and who they show."""
    images, labels, people = [], [], []
    for example in synthetic.examples(600, 11):
        image = decode(example.image, 1)
        images.append(crop(image, face_box(example, image.shape, 0.05), 48))
        labels.append(example.emotion)
        people.append(example.person)
    return np.stack(images), np.array(labels), people


def plant(labels: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Give a share of the labels another class; return the labels, and which are wrong."""
    rng = np.random.default_rng(3)
    wrong = rng.random(len(labels)) < share
    offset = rng.integers(1, len(EMOTIONS), len(labels))
    return np.where(wrong, (labels + offset) % len(EMOTIONS), labels), wrong


def texture(count: int) -> np.ndarray:
    coarse = np.random.default_rng(1).integers(0, 256, (count, 6, 6), np.uint8)
    return np.stack([cv2.resize(each, (48, 48)) for each in coarse])[..., None]


def test_planted_wrong_labels_are_found_among_drawn_faces(faces: Faces) -> None:
    images, truth, people = faces
    labels, wrong = plant(truth, 0.08)
    quality, doubted = suspected(images, labels, people, LINEAR, seed=1)
    found = doubted & (quality < LINEAR.threshold)
    # By chance both would be a twelfth.
    assert found[wrong].mean() > 0.4
    assert wrong[found].mean() > 0.4
    assert quality[wrong].mean() < 0.5 * quality[~wrong].mean()
    assert ((quality >= 0) & (quality <= 1)).all()


def test_an_answer_depends_on_the_seed_and_nothing_else(faces: Faces) -> None:
    images, labels, people = (part[:200] for part in faces)
    first, again, other = (
        suspected(images, labels, people, LINEAR, seed=seed)[0] for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_copy_gives_nothing_away_where_copies_share_a_group() -> None:
    """The labels of noise cannot be told, except by somebody who has seen its copy."""
    images = np.repeat(texture(80), 2, axis=0)
    labels = np.repeat(np.arange(80) % 2, 2)
    together = [f"cluster {row // 2}" for row in range(160)]
    apart = [str(row) for row in range(160)]
    kept, _ = suspected(images, labels, together, LINEAR, seed=1)
    leaked, _ = suspected(images, labels, apart, LINEAR, seed=1)
    assert (kept > 0.5).mean() < 0.6
    assert (leaked > 0.5).mean() > 0.7  # a quarter of the pairs share a fold by chance


def test_a_class_with_fewer_groups_than_folds_is_not_judged(faces: Faces) -> None:
    images, labels, people = faces
    happy = np.flatnonzero(labels == EMOTIONS.index("happy"))
    rare = happy[np.isin(np.array(people)[happy], np.array(people)[happy][:3])]
    rows = np.sort(np.concatenate([np.flatnonzero(labels != EMOTIONS.index("happy")), rare]))
    groups = [people[row] for row in rows]
    quality, doubted = suspected(images[rows], labels[rows], groups, LINEAR, seed=1)
    is_rare = np.isin(rows, rare)
    assert np.isnan(quality[is_rare]).all() and not doubted[is_rare].any()
    assert np.isfinite(quality[~is_rare]).all()


def test_nothing_is_doubted_where_there_is_one_class_to_tell() -> None:
    labels = np.array([3] * 12 + [5])
    quality, doubted = suspected(texture(13), labels, [str(n) for n in range(13)], LINEAR, seed=1)
    assert np.isnan(quality).all()
    assert not doubted.any()


def test_a_class_that_only_its_own_fold_holds_gets_no_answer() -> None:
    codes = np.array([0] * 20 + [1] * 20 + [2] * 5)
    groups = np.array([*(str(row) for row in range(40)), *["one person"] * 5])
    answers = out_of_fold(texture(45), codes, groups, LINEAR, seed=1)
    assert np.isnan(answers[codes == 2]).all()
    assert np.allclose(answers[codes < 2].sum(1), 1, atol=1e-5)


def test_the_network_finds_wrong_labels_and_answers_the_same_again() -> None:
    shades = texture(300)[:, ::2, ::2] // 4
    truth = np.arange(300) % 2
    images = (shades + 160 * truth[:, None, None, None]).astype(np.uint8)
    wrong = np.arange(300) % 50 < 2
    labels = np.where(wrong, 1 - truth, truth) * 4  # of seven classes, 0 and 4 occur
    groups = [str(row) for row in range(300)]
    quality, doubted = suspected(images, labels, groups, NETWORK, seed=4)
    again, _ = suspected(images, labels, groups, NETWORK, seed=4)
    assert quality[wrong].max() < quality[~wrong].mean() / 2
    assert doubted[wrong].all() and not doubted[~wrong].any()
    assert np.array_equal(quality, again)


def test_histograms_are_alike_for_a_face_of_any_size() -> None:
    ramp = np.tile(np.arange(96, dtype=np.uint8), (96, 1))[None, ..., None]
    large, small = gradient_histograms(ramp), gradient_histograms(ramp[:, ::2, ::2])
    assert large.shape == (1, 900) and large.dtype == np.float32
    assert np.abs(large - small).max() < 0.1
    assert large.max() > 0.2
