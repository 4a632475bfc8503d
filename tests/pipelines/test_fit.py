import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from models.metrics import interocular_errors
from models.schemes import IBUG_68
from pipelines import fit
from pipelines.cli import GrimaceError
from pipelines.fit import Job
from pipelines.shards import View, read_meta, read_view

ROOT = Path(__file__).parents[2]
TRAIN, VAL, VIEWS = 40, 16, 2

# Said of `_eager` below.
pytestmark = pytest.mark.filterwarnings("ignore:Even though the .*run_functions_eagerly")

EMOTION = Job(
    task="emotion",
    model="plain",
    widths=(4,),
    dropout=0.3,
    loss="cross_entropy",
    label_smoothing=0.05,
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=0.01,
    batch=8,
    epochs=3,
    precision="float32",
    seed=1,
    data_version="one",
)
LANDMARKS = replace(
    EMOTION,
    task="landmarks",
    dropout=0.0,
    loss="wing",
    optimizer="adamw",
    learning_rate=0.003,
    epochs=6,
)


@pytest.fixture(scope="module")
def emotions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright images are happy, dark ones sad; pixels 0 and 1 tell the image and the view."""
    return write_shards(tmp_path_factory.mktemp("emotions"), "emotion")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bright square lies where the 68 points lie."""
    return write_shards(tmp_path_factory.mktemp("landmarks"), "landmarks")


def write_shards(folder: Path, task: str) -> Path:
    meta = {"task": task, "size": 16, "channels": 1, "views": VIEWS, "points": 68}
    counts = {"train": TRAIN, "val": VAL}
    (folder / "meta.json").write_text(json.dumps(meta | {"counts": counts}))
    shape = np.random.default_rng(5).uniform(-0.2, 0.2, (68, 2))
    shape[[*IBUG_68.eyes]] = [[0.2, 0], [-0.2, 0]]
    for seed, (side, number, views) in enumerate([("train", TRAIN, VIEWS), ("val", VAL, 1)]):
        rng = np.random.default_rng(seed)
        (folder / side).mkdir()
        np.save(folder / side / "ids.npy", np.array([f"{side}-{n}" for n in range(number)]))
        if task == "emotion":
            np.save(folder / side / "emotions.npy", np.where(np.arange(number) % 2, 3, 5))
        for view in range(views):
            images = rng.integers(0, 100, (number, 16, 16, 1))
            corners = rng.integers(0, 12, (number, 2))
            if task == "emotion":
                images[np.arange(number) % 2 == 1] += 100
                images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(number), view
            else:
                for image, (x, y) in zip(images, corners, strict=True):
                    image[y : y + 4, x : x + 4] = 255
                places = (corners[:, None] + 2) / 16 + shape
                visible = rng.random((number, 68)) < 0.9
                visible[:, [*IBUG_68.eyes]] = True
                places[~visible] = 0
                np.save(folder / side / f"landmarks-{view:02d}.npy", places.astype(np.float32))
                np.save(folder / side / f"visible-{view:02d}.npy", visible)
            np.save(folder / side / f"images-{view:02d}.npy", images.astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def _whole(emotions: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, "Epochs"]:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        order = watch(patch)
        run(EMOTION, emotions, folder)
    return folder, order


@pytest.fixture(scope="module")
def whole(_whole: tuple[Path, "Epochs"]) -> Path:
    """What a training in one go leaves."""
    return _whole[0]


@pytest.fixture(scope="module")
def whole_order(_whole: tuple[Path, "Epochs"]) -> "Epochs":
    """The order in which it saw its images."""
    return _whole[1]


@pytest.fixture(autouse=True, scope="module")
def _eager() -> Iterator[None]:
    """A network this small takes longer to trace than to train."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    yield
    keras.mixed_precision.set_global_policy("float32")


def run(job: Job, shards: Path, folder: Path, **options: Any) -> keras.Model:
    return fit.fit(job, shards, folder, folder / "checkpoint", **options)


def history(folder: Path) -> list[dict[str, str]]:
    """The rows of history.csv, without the one figure that is the clock's."""
    rows = list(csv.DictReader((folder / "history.csv").open()))
    return [{name: row[name] for name in row if name != "images_per_second"} for row in rows]


def end_state(folder: Path) -> dict[str, np.ndarray]:
    """Every number of the last checkpoint (weights, statistics, optimiser) and of the result."""
    last = keras.models.load_model(max((folder / "checkpoint").glob("epoch-*.keras")))
    final = keras.models.load_model(folder / "model.keras")
    variables = [*last.variables, *last.optimizer.variables, *final.variables]
    # The counter behind dropout masks is not in the file, nor needed once all is done.
    return {
        f"{number} {variable.path}": keras.ops.convert_to_numpy(variable)
        for number, variable in enumerate(variables)
        if "seed_generator" not in variable.path
    }


def differences(one: Path, other: Path) -> dict[str, float]:
    """The variables that differ, with their largest difference."""
    first, second = end_state(one), end_state(other)
    gaps = {
        name: float(np.abs(first[name] - value).max())
        for name, value in zip(first, second.values(), strict=True)
    }
    return {name: gap for name, gap in gaps.items() if gap > 0}


# as a command, killed for real


def start(job: Path, shards: Path, out: Path) -> subprocess.Popen[str]:
    where = ["--job", str(job), "--shards", str(shards), "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.fit", *where],
        cwd=job.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "job.json"
    path.write_text(json.dumps(asdict(replace(EMOTION, precision="mixed_bfloat16", epochs=12))))
    return path


@pytest.fixture(scope="module")
def undisturbed(job_file: Path, emotions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the job leaves when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    tf.config.run_functions_eagerly(False)
    run(fit.read_job(job_file), emotions, folder)
    tf.config.run_functions_eagerly(True)
    return folder


def test_it_learns_and_keeps_the_best_epoch(undisturbed: Path, emotions: Path) -> None:
    rows = history(undisturbed)
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, 13)]
    assert set(rows[0]) == {"epoch", "loss", "accuracy", "val_loss", "val_accuracy"}
    assert float(rows[-1]["loss"]) < 0.7 * float(rows[0]["loss"])
    val = read_view(emotions, "val")
    model = keras.models.load_model(undisturbed / "model.keras")
    assert model.dtype_policy.name == "float32"
    answer = model.predict(val.images.astype(np.float32), verbose=0)
    accuracy = (answer.argmax(1) == val.emotions).mean()
    # The best epoch, in float32 where training watched it in bfloat16.
    assert accuracy == pytest.approx(max(float(row["val_accuracy"]) for row in rows), abs=1 / VAL)
    assert accuracy > 0.9


def test_killed_again_and_again_it_ends_the_same(
    undisturbed: Path, job_file: Path, emotions: Path, tmp_path: Path
) -> None:
    rng = random.Random(7)
    for kill in range(2):
        process = start(job_file, emotions, tmp_path)
        assert process.stdout is not None
        begun = 0
        for line in process.stdout:
            begun += line.startswith("epoch ")
            if begun == 3:
                break
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert process.returncode == -9, f"attempt {kill} had ended before it could be killed"
    process = start(job_file, emotions, tmp_path)
    said, _ = process.communicate()
    assert process.returncode == 0 and "resumed after epoch" in said
    assert history(tmp_path) == history(undisturbed)
    assert differences(tmp_path, undisturbed) == {}


# killed at each single step of saving


class Killed(BaseException):
    pass


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> "Killer":
    return Killer(monkeypatch)


class Killer:
    """Ends a training at its n-th change of the checkpoint folder, leaving rubbish half-written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        for kind, names in {Path: ("replace", "unlink", "write_text")}.items():
            for name in names:
                monkeypatch.setattr(kind, name, self.wrapped(getattr(kind, name), writes=False))
        for name in ("save", "save_weights"):
            monkeypatch.setattr(
                keras.Model, name, self.wrapped(getattr(keras.Model, name), writes=True)
            )

    def wrapped(self, function: Any, writes: bool) -> Any:
        def step(target: Any, *arguments: Any, **options: Any) -> Any:
            place = Path(arguments[0]) if writes else target
            if self.left is not None and "checkpoint" in place.parts:
                self.left -= 1
                if self.left < 0:
                    if writes:
                        place.write_bytes(b"half")
                    raise Killed
            return function(target, *arguments, **options)

        return step


def test_a_kill_at_any_step_of_saving_leaves_a_whole_state(
    killer: Killer, whole: Path, emotions: Path, tmp_path: Path
) -> None:
    for number in count():
        killer.left = number
        try:
            run(EMOTION, emotions, tmp_path)
        except Killed:
            continue
        break
    assert number > 6  # more steps than one epoch's saving has
    assert history(tmp_path) == history(whole)
    assert differences(tmp_path, whole) == {}


# order

Epochs = list[list[tuple[int, int]]]


def watch(patch: pytest.MonkeyPatch) -> Epochs:
    """Collect, for each epoch, the (image, view) pairs the network is given, in their order."""
    epochs: Epochs = []

    class Watched(fit.Batches):
        def __init__(self, view: View, batch: int, order: np.ndarray | None = None) -> None:
            super().__init__(view, batch, order)
            self.training = order is not None
            if self.training:
                epochs.append([])

        def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
            images, labels = super().__getitem__(index)
            if self.training:
                epochs[-1] += [(int(image), int(view)) for image, view in images[:, 0, :2, 0]]
                del epochs[-1][:-TRAIN]  # Keras looks at some batches beforehand
            return images, labels

    patch.setattr(fit, "Batches", Watched)
    return epochs


def test_order_follows_from_seed_and_epoch_alone(
    whole_order: Epochs, emotions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [{view for _, view in epoch} for epoch in whole_order] == [{0}, {1}, {0}]
    for epoch in whole_order:
        assert sorted(image for image, _ in epoch) == list(range(TRAIN))
    assert whole_order[0] != whole_order[2]

    def stop(epoch: int, row: dict[str, float]) -> None:
        if epoch == 1:
            raise Killed

    seen = watch(monkeypatch)
    with pytest.raises(Killed):
        run(EMOTION, emotions, tmp_path, on_epoch=stop)
    seen.clear()
    run(EMOTION, emotions, tmp_path)
    assert seen in (whole_order[1:], whole_order[2:])
    seen.clear()
    run(replace(EMOTION, seed=2, epochs=1), emotions, tmp_path / "other")
    assert seen[0] != whole_order[0]


# weights


def weighted(shards: Path, folder: Path, weights: np.ndarray) -> Path:
    """A copy of the shards whose training images have these weights."""
    shutil.copytree(shards, folder)
    np.save(folder / "train/weights.npy", weights.astype(np.float32))
    return folder


@pytest.mark.parametrize("task", ["emotions", "faces"])
def test_weights_travel_with_their_images(
    task: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    plain, weights = request.getfixturevalue(task), np.linspace(0.1, 1, TRAIN)
    view = read_view(weighted(plain, tmp_path / "shards", weights), "train", 1)
    order = np.random.default_rng(0).permutation(TRAIN)
    batches = fit.Batches(view, 16, order)
    got = [batches[index] for index in range(len(batches))]
    assert [len(batch) for batch in got] == [3, 3, 3]
    rows = np.concatenate([np.sort(order[start : start + 16]) for start in (0, 16, 32)])
    np.testing.assert_allclose(np.concatenate([w for *_, w in got]), weights[rows], rtol=1e-6)
    whole = fit.Batches(read_view(plain, "train", 1), 16, order)
    for index, (images, labels, _) in enumerate(got):
        expected = whole[index]
        assert len(expected) == 2
        assert np.array_equal(images, expected[0]) and np.array_equal(labels, expected[1])


@pytest.mark.parametrize("task", ["emotions", "faces"])
def test_what_weighs_next_to_nothing_teaches_nothing_and_still_counts(
    task: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Its labels right or wrong, the model comes out the same; the metric of training does not."""
    job = replace(EMOTION if task == "emotions" else LANDMARKS, dropout=0.0, epochs=1)
    heeded = np.arange(TRAIN) % 8 < 4
    right = weighted(request.getfixturevalue(task), tmp_path / "a", np.where(heeded, 1, 1e-9))
    wrong = Path(shutil.copytree(right, tmp_path / "b"))
    path = wrong / "train" / ("emotions.npy" if task == "emotions" else "landmarks-00.npy")
    labels = np.load(path)
    labels[~heeded] = 8 - labels[~heeded]  # happy is sad and sad is happy; points are far away
    np.save(path, labels)
    rows: list[dict[str, float]] = []
    one, two = (
        run(job, shards, shards, on_epoch=lambda _, row: rows.append(row)).get_weights()
        for shards in (right, wrong)
    )
    for first, second in zip(one, two, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)
    metric = "accuracy" if task == "emotions" else "nme"
    assert rows[0][metric] != pytest.approx(rows[1][metric], abs=0.1)
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)


# which checkpoint is resumed


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A folder in which the job has run to its end."""
    return Path(shutil.copytree(whole, tmp_path / "finished"))


def test_a_finished_job_is_not_trained_again(
    finished: Path, whole: Path, emotions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "model.keras").unlink()
    run(EMOTION, emotions, finished)
    assert capsys.readouterr().out == "resumed after epoch 3 of 3\n"
    assert differences(finished, whole) == {}


@pytest.mark.parametrize("other", [{"seed": 2}, {"data_version": "two"}])
def test_another_jobs_checkpoint_is_not_resumed(
    other: dict[str, Any], finished: Path, emotions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(replace(EMOTION, epochs=1, **other), emotions, finished)
    assert "resumed" not in capsys.readouterr().out
    assert len(history(finished)) == 1


def test_nor_after_a_kill_in_the_first_epoch(
    finished: Path,
    emotions: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The other job has been begun, but has saved no state yet, when it is killed."""

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    other = replace(EMOTION, seed=2, epochs=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(keras.Model, "fit", die)
        run(other, emotions, finished)
    run(other, emotions, finished)
    assert "resumed" not in capsys.readouterr().out
    assert len(history(finished)) == 1


def test_nor_one_that_another_version_of_the_code_left(
    finished: Path, emotions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (finished / "checkpoint").glob("*.json"):
        path.write_text(path.read_text().replace('"dropout"', '"drop"'))
    run(replace(EMOTION, epochs=1), emotions, finished)
    assert "resumed" not in capsys.readouterr().out


@pytest.mark.parametrize("gone", ["epoch-0003.keras", "best.weights.h5"])
def test_nor_one_that_was_half_removed(
    gone: str, finished: Path, emotions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by a kill while `train` removes what it no longer needs."""
    (finished / "checkpoint" / gone).unlink()
    run(EMOTION, emotions, finished)
    assert "resumed" not in capsys.readouterr().out


# landmarks


def test_landmarks_learn_and_the_best_epoch_is_kept(faces: Path, tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    model = run(LANDMARKS, faces, tmp_path, on_epoch=lambda epoch, row: rows.append(row))
    assert len(rows) == LANDMARKS.epochs
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]
    best = min(rows, key=lambda row: row["val_nme"])
    val = read_view(faces, "val")
    answer = model.predict(val.images.astype(np.float32), verbose=0)
    assert val.landmarks is not None and val.visible is not None
    errors = interocular_errors(val.landmarks, answer, val.visible, IBUG_68, inner=False)
    assert errors.mean() == pytest.approx(best["val_nme"], rel=1e-4)
    again = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(again.predict(val.images.astype(np.float32), verbose=0), answer)


def test_a_loss_that_is_no_number_ends_it_and_keeps_the_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shards").mkdir()
    shards = write_shards(tmp_path / "shards", "landmarks")
    second = shards / "train/landmarks-01.npy"
    good = np.load(second)
    np.save(second, np.full_like(good, np.nan))
    job = replace(LANDMARKS, model="plain", epochs=2)
    with pytest.raises(GrimaceError) as error:
        run(job, shards, tmp_path)
    for part in (
        "landmarks-plain: the loss is not a number in epoch 2",
        "learning_rate (now 0.003)",
        "precision float32 (now float32)",
        f"The state after epoch 1 is kept in {tmp_path / 'checkpoint'}",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "model.keras").exists()
    np.save(second, good)
    run(job, shards, tmp_path)
    assert "resumed after epoch 1 of 2" in capsys.readouterr().out
    assert len(history(tmp_path)) == 2


def test_weights_decay_but_biases_do_not(faces: Path) -> None:
    keras.utils.set_random_seed(1)
    job = replace(EMOTION, learning_rate=0.1, weight_decay=0.5)
    model = fit._compiled(job, read_meta(faces), steps=1)
    model.optimizer.build(model.trainable_variables)
    before = [variable.numpy() for variable in model.trainable_variables]
    model.optimizer.iterations.assign(1)  # after the warm-up: lr > 0
    model.optimizer.apply_gradients(
        [(np.zeros_like(v), w) for v, w in zip(before, model.trainable_variables, strict=True)]
    )
    for variable, old in zip(model.trainable_variables, before, strict=True):
        if old.any():
            shrunk = np.abs(variable.numpy()).sum() < 0.99 * np.abs(old).sum()
            assert shrunk == (variable.name == "kernel"), variable.path


# job files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 0.1}, "unknown field 'learning_rat'; known are .*'learning_rate'"),
        ({"seed": None}, "seed"),
        ({"widths": None}, "widths"),
    ],
)
def test_a_field_that_is_unknown_or_missing(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    raw = {name: value for name, value in (asdict(EMOTION) | change).items() if value is not None}
    path = tmp_path / "job.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(GrimaceError, match=f"job.json: .*{message}"):
        fit.read_job(path)


def test_a_job_file_gives_its_job(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(asdict(LANDMARKS)))
    assert fit.read_job(path) == LANDMARKS


# imports


def test_importing_needs_keras_and_no_framework() -> None:
    """Under Keras's NumPy backend, which itself wants JAX; an empty stand-in is enough for that."""
    code = """
import sys
from importlib.machinery import ModuleSpec
from pkgutil import walk_packages
from unittest.mock import MagicMock

class StandIn:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "jax" else None
    def create_module(self, spec):
        return MagicMock(__path__=[], __spec__=spec)
    def exec_module(self, module):
        pass

sys.meta_path.append(StandIn())
import models
for module in walk_packages(models.__path__, "models."):
    __import__(module.name)
import pipelines.fit
import keras
heavy = {"tensorflow", "mlflow", "dvc", "prefect", "tensorflow_datasets"}
print(keras.backend.backend(), sorted(heavy & set(sys.modules)), "models.losses" in sys.modules)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"KERAS_BACKEND": "numpy"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.split("\n")[0] == "numpy [] True"
