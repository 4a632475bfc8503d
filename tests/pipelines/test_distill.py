import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from pipelines import distill
from pipelines.cli import GrimaceError
from pipelines.distill import soften, teacher_answers
from pipelines.job import Job, Teacher, write_job
from pipelines.shards import read_view
from pipelines.tracking import sha256

TRAIN, POINTS = 20, 5
JOB = Job(
    task="emotion",
    model="small",
    loss="cross_entropy",
    optimizer="sgd",
    learning_rate=0.1,
    epochs=2,
    batch=8,
    seed=7,
    temperature=3.0,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three views of twenty images, for either task."""
    folder = tmp_path_factory.mktemp("shards")
    meta = {"size": 6, "channels": 1, "views": 3, "points": POINTS, "counts": {"train": TRAIN}}
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "train").mkdir()
    np.save(folder / "train/ids.npy", np.arange(TRAIN).astype(str))
    for view in range(3):
        images = np.random.default_rng(view).integers(0, 256, (TRAIN, 6, 6, 1)).astype(np.uint8)
        np.save(folder / f"train/images-{view:02d}.npy", images)
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Teacher]]:
    """Two linear models a task."""
    folder, found = tmp_path_factory.mktemp("teachers"), {}
    for task, shape in (("emotion", (7,)), ("landmarks", (POINTS, 2))):
        found[task] = []
        for seed in range(2):
            keras.utils.set_random_seed(seed)
            inputs = keras.Input((6, 6, 1))
            x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
            x = keras.layers.Dense(int(np.prod(shape)))(x)
            last = keras.layers.Softmax() if task == "emotion" else keras.layers.Reshape(shape)
            path = folder / f"{task}-{seed}.keras"
            keras.Model(inputs, last(x)).save(path)
            found[task].append(Teacher(str(path), sha256(path)))
    return found


def taught(teachers: dict[str, list[Teacher]], **change: Any) -> Job:
    job = replace(JOB, **change)
    return replace(job, teachers=tuple(teachers[job.task]))


def answers_of(teacher: Teacher, shards: Path, view: int) -> np.ndarray:
    images = read_view(shards, "train", view).images.astype(np.float32)
    return np.asarray(keras.models.load_model(teacher.path).predict(images, verbose=0))


def test_answers_are_the_mean_of_softened_probabilities(
    shards: Path, teachers: dict[str, list[Teacher]], tmp_path: Path
) -> None:
    job = taught(teachers)
    paths = teacher_answers(job, shards, tmp_path)
    assert len(paths) == 2  # only two epochs
    for view, path in enumerate(paths):
        soft = []
        for teacher in job.teachers:
            powers = answers_of(teacher, shards, view).astype(np.float64) ** (1 / 3)
            soft.append(powers / powers.sum(-1, keepdims=True))
        answers = np.load(path)
        assert answers.dtype == np.float32
        assert np.allclose(answers, np.mean(soft, 0), atol=1e-5)


def test_landmarks_are_averaged_as_they_are(
    shards: Path, teachers: dict[str, list[Teacher]], tmp_path: Path
) -> None:
    change = {"task": "landmarks", "loss": "wing", "temperature": 1.0, "epochs": 9}
    job = taught(teachers, **change)
    paths = teacher_answers(job, shards, tmp_path)
    assert len(paths) == 3  # as many as there are
    expected = np.mean([answers_of(teacher, shards, 2) for teacher in job.teachers], 0)
    assert np.allclose(np.load(paths[2]), expected, atol=1e-5)


def test_no_teacher_no_answers(shards: Path, tmp_path: Path) -> None:
    assert teacher_answers(JOB, shards, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_teachers_are_asked_once(
    shards: Path,
    teachers: dict[str, list[Teacher]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a kill between two views, only about what is missing; and never again."""
    job = taught(teachers)
    first = [np.load(path) for path in teacher_answers(job, shards, tmp_path / "whole")]
    asked: list[np.ndarray] = []
    real = distill._ask

    def ask(models: Any, images: np.ndarray, *more: Any) -> np.ndarray:
        if len(asked) == 1:
            asked.clear()
            raise KeyboardInterrupt
        asked.append(images)
        return real(models, images, *more)

    monkeypatch.setattr(distill, "_ask", ask)
    with pytest.raises(KeyboardInterrupt):
        teacher_answers(job, shards, tmp_path)
    paths = teacher_answers(job, shards, tmp_path)
    (images,) = asked
    assert np.array_equal(images, read_view(shards, "train", 1).images)
    assert teacher_answers(job, shards, tmp_path) == paths and len(asked) == 1
    for path, answers in zip(paths, first, strict=True):
        assert np.array_equal(np.load(path), answers)


@pytest.mark.parametrize("change", [{"temperature": 1.0}, {"data_version": "two"}, {"one": True}])
def test_others_answers_are_not_taken(
    change: dict[str, Any], shards: Path, teachers: dict[str, list[Teacher]], tmp_path: Path
) -> None:
    job = taught(teachers)
    other = replace(job, teachers=job.teachers[:1]) if "one" in change else replace(job, **change)
    first, second = (teacher_answers(each, shards, tmp_path) for each in (job, other))
    assert not set(first) & set(second)


def test_softening() -> None:
    logits = np.array([[2.0, 0.0, -1.0], [80.0, -80.0, 0.0]])
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for temperature in (1.0, 4.0):
        expected = np.exp(logits / temperature)
        expected /= expected.sum(-1, keepdims=True)
        assert np.allclose(soften(probabilities, temperature)[0], expected[0])
    assert np.isfinite(soften(np.array([[1.0, 0.0, 0.0]]), 4.0)).all()


# what may be wrong with a teacher


def test_a_missing_teacher(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path, words in {
        "runs/emotion/vgg/model.keras": "`uv run dvc repro train@emotion-vgg` trains it",
        "elsewhere/vgg.keras": "put the file there",
    }.items():
        job = replace(JOB, teachers=(Teacher(path, "0" * 64),))
        with pytest.raises(GrimaceError, match=f"teacher {path} is missing; .*{words}"):
            teacher_answers(job, shards, tmp_path)


def test_a_teacher_of_the_graph_from_before_the_data_changed(
    shards: Path,
    teachers: dict[str, list[Teacher]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path, copied = (Path(name, "model.keras") for name in ("runs/emotion/vgg", "elsewhere/vgg"))
    job = replace(JOB, data_version="new", epochs=1)
    for version, place in (("old", path), ("old", copied), ("new", path)):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(Path(teachers["emotion"][0].path).read_bytes())
        write_job(replace(job, model="vgg", data_version=version), place.with_name("job.json"))
        student = replace(job, teachers=(Teacher(str(place), teachers["emotion"][0].sha256),))
        if (version, place) != ("old", path):
            assert teacher_answers(student, shards, tmp_path / version / place.parent)
            continue
        with pytest.raises(GrimaceError) as error:
            teacher_answers(student, shards, tmp_path)
        for part in (
            f"teacher {path} was trained on other shards (old) than the student (new)",
            "`uv run dvc repro train@emotion-vgg`",
            "train.jobs.emotion-small.teachers",
        ):
            assert part in str(error.value)


def test_another_teacher_than_meant(
    shards: Path, teachers: dict[str, list[Teacher]], tmp_path: Path
) -> None:
    (one, other) = teachers["emotion"]
    job = replace(JOB, teachers=(one, replace(other, sha256="0" * 64)))
    with pytest.raises(GrimaceError) as error:
        teacher_answers(job, shards, tmp_path)
    assert f"has SHA-256 {other.sha256}, not {'0' * 64}" in str(error.value)
    assert "train.jobs.emotion-small.teachers" in str(error.value)


def test_a_teacher_of_something_else(
    shards: Path, teachers: dict[str, list[Teacher]], tmp_path: Path
) -> None:
    job = replace(JOB, teachers=tuple(teachers["landmarks"]))
    words = r"takes \(6, 6, 1\) and answers \(5, 2\), where the shards have \(6, 6, 1\) and \(7,\)"
    with pytest.raises(GrimaceError, match=words):
        teacher_answers(job, shards, tmp_path)
