import csv
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from models import emotion, landmarks
from models.metrics import interocular_errors
from models.schemes import IBUG_68
from pipelines import batches, fit
from pipelines.checkpoint import saved_history
from pipelines.cli import GrimaceError
from pipelines.job import Job, Teacher, read_job, write_job
from pipelines.params import load_params
from pipelines.schedules import phase_at
from pipelines.shards import read_meta, read_view, version_of
from pipelines.tracking import sha256

ROOT = Path(__file__).parents[2]
TRAIN, VAL, VIEWS = 40, 16, 2
EXPLOSIVE = 100.0  # a learning rate

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
)
LANDMARKS = replace(
    EMOTION,
    task="landmarks",
    dropout=0.0,
    loss="wing",
    label_smoothing=0.0,
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
    """The rows of history.csv, without the figures that are the clock's."""
    rows = list(csv.DictReader((folder / "history.csv").open()))
    clock = ("images_per_second", "seconds")
    return [{name: row[name] for name in row if name not in clock} for row in rows]


def end_state(folder: Path) -> dict[str, np.ndarray]:
    """Every number of the last checkpoint (weights, statistics, optimiser) and of the result."""
    with zipfile.ZipFile(folder / "model.keras") as archive:
        result = io.BytesIO(archive.read("model.weights.h5"))
    last = max((folder / "checkpoint").glob("epoch-*.weights.h5"))
    return {
        f"{file} {name}": array
        for file, source in (("last", last), ("result", result))
        for name, array in arrays(source).items()
    }


def arrays(source: Any) -> dict[str, np.ndarray]:
    """All arrays of a weights file but the counters of dropout, which start anew each epoch."""
    found: dict[str, np.ndarray] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and "seed_generator" not in name:
            found[name] = item[()]

    with h5py.File(source) as file:
        file.visititems(note)
    return found


def differences(one: Path, other: Path) -> dict[str, float]:
    """The arrays that differ, with their largest difference."""
    first, second = end_state(one), end_state(other)
    assert first.keys() == second.keys() and len(first) > 20
    gaps = {name: float(np.abs(first[name] - second[name]).max()) for name in first}
    return {name: gap for name, gap in gaps.items() if gap > 0}


# as a command


def start(job: Path, shards: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.fit", "--job", job, "--shards", shards, *options],
        cwd=job.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def commanded(emotions: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the command makes of a job in bfloat16, and what it says."""
    folder = tmp_path_factory.mktemp("commanded")
    write_job(replace(EMOTION, precision="mixed_bfloat16", epochs=12), folder / "wish.json")
    ended = start(folder / "wish.json", emotions, "--out", str(folder))
    assert ended.returncode == 0, ended.stderr
    return folder, ended.stdout


def test_it_learns_and_keeps_the_best_epoch(commanded: tuple[Path, str], emotions: Path) -> None:
    folder, _ = commanded
    rows = history(folder)
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, 13)]
    figures = {"loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"}
    assert set(rows[0]) == {"epoch", *figures}
    assert float(rows[-1]["loss"]) < 0.7 * float(rows[0]["loss"])
    assert float(rows[-1]["learning_rate"]) < 1e-6 < float(rows[5]["learning_rate"])
    val = read_view(emotions, "val")
    model = keras.models.load_model(folder / "model.keras")
    assert model.dtype_policy.name == "float32"
    answer = model.predict(val.images.astype(np.float32), verbose=0)
    accuracy = (answer.argmax(1) == val.emotions).mean()
    # The best epoch, in float32 where training watched it in bfloat16.
    assert accuracy == pytest.approx(max(float(row["val_accuracy"]) for row in rows), abs=1 / VAL)
    assert accuracy > 0.9


def test_a_line_an_epoch(commanded: tuple[Path, str]) -> None:
    lines = commanded[1].splitlines()
    assert len(lines) == 12
    for number, line in enumerate(lines, 1):
        assert re.match(rf"epoch {number}/12: .*\bval_accuracy [\d.]+, .*learning_rate", line)


def test_the_result_says_what_it_is(commanded: tuple[Path, str]) -> None:
    folder, _ = commanded
    assert read_job(folder / "job.json") == read_job(folder / "wish.json")
    machine = json.loads((folder / "machine.json").read_text())
    assert (machine["backend"], machine["keras"]) == ("tensorflow", keras.__version__)
    assert "cpu" in machine["devices"].lower()


# killed for real

FULL = replace(
    EMOTION,
    loss="focal",
    learning_rate=0.03,
    class_weights="effective",
    schedule="plateau",
    clip_norm=0.5,
    ema=0.9,
    mixup=0.2,
    cutmix=1.0,
    erase=0.3,
    temperature=2.0,
    epochs=30,
)


@pytest.fixture(scope="module")
def taught(emotions: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job with every feature at once, a teacher among them."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.keras"
    keras.utils.set_random_seed(9)
    fit.build(EMOTION, read_meta(emotions)).save(path)
    return replace(FULL, teachers=(Teacher(str(path), sha256(path)),))


def begin(job: Job, shards: Path, out: Path) -> BaseProcess:
    """Train in a process of its own, forked from one that has imported all but run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.fit"])
    process = context.Process(target=fit.fit, args=(job, shards, out, out / "checkpoint"))
    process.start()
    return process


def done(out: Path) -> int:
    """The number of epochs whose state is saved."""
    with suppress(FileNotFoundError):
        return len(json.loads((out / "checkpoint/state.json").read_text())["history"])
    return 0


def test_killed_ten_times_at_random_it_ends_the_same(
    taught: Job, emotions: Path, tmp_path: Path
) -> None:
    undisturbed, disturbed = tmp_path / "one", tmp_path / "two"
    process = begin(taught, emotions, undisturbed)
    process.join()
    assert process.exitcode == 0
    rng, reached = random.Random(7), []
    for kill in range(10):
        before, process = done(disturbed), begin(taught, emotions, disturbed)
        # Half of the kills hit the start, which takes longer than some epochs.
        for _ in range(rng.choice([0, 1, 2]) if kill % 2 else 0):
            while done(disturbed) <= before and process.is_alive():
                time.sleep(0.01)
            before = done(disturbed)
        time.sleep(rng.uniform(0, 0.2 if kill % 2 else 4))
        process.kill()
        process.join()
        assert process.exitcode == -9, f"attempt {kill} had ended before it could be killed"
        reached.append(done(disturbed))
    assert 0 < reached[-1] < FULL.epochs and len(set(reached)) > 3
    process = begin(taught, emotions, disturbed)
    process.join()
    assert process.exitcode == 0
    assert len(history(undisturbed)) == FULL.epochs
    assert history(disturbed) == history(undisturbed)
    assert differences(disturbed, undisturbed) == {}
    rates = {row["learning_rate"] for row in history(undisturbed)}
    assert len(rates) > 1  # the plateau was felt


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
        save = self.wrapped(keras.Model.save_weights, writes=True)
        monkeypatch.setattr(keras.Model, "save_weights", save)

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

    class Watched(batches.Batches):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            epochs.append([])

        def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
            images, labels = super().__getitem__(index)
            epochs[-1] += [(int(image), int(view)) for image, view in images[:, 0, :2, 0]]
            del epochs[-1][:-TRAIN]  # Keras looks at some batches beforehand
            return images, labels

    patch.setattr(batches, "Batches", Watched)
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
    told: list[int] = []
    run(EMOTION, emotions, tmp_path, on_epoch=lambda epoch, row: told.append(epoch))
    assert seen == whole_order[2:]
    assert told == [0, 1, 2]  # the earlier ones again
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


@pytest.mark.parametrize(
    "other", [{"seed": 2, "epochs": 1}, {"data_version": "here", "epochs": 1}, {"batch": 40}]
)
def test_another_jobs_checkpoint_is_not_resumed(
    other: dict[str, Any], finished: Path, emotions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = replace(EMOTION, **other)
    if job.data_version:
        job = replace(job, data_version=version_of(emotions))
    run(job, emotions, finished)
    assert "resumed" not in capsys.readouterr().out
    assert len(history(finished)) == job.epochs


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


@pytest.mark.parametrize("gone", ["epoch-0003.weights.h5", "best.weights.h5"])
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


def test_a_loss_that_is_no_number_ends_it_and_its_advice_helps(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too high a rate: each step makes the error larger, until it has no number."""
    settings = {"loss": "mse", "optimizer": "sgd", "schedule": "plateau", "epochs": 3}
    job = replace(LANDMARKS, learning_rate=EXPLOSIVE, **settings)
    with pytest.raises(GrimaceError) as error:
        run(job, faces, tmp_path / "one")
    for part in (
        "landmarks-plain: the loss is not a number in epoch 2",
        f"Lower learning_rate (now {EXPLOSIVE})",
        "precision float32 (now float32)",
        f"The state after epoch 1 is kept in {tmp_path / 'one/checkpoint'}: the same command goes",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "one/model.keras").exists()
    shutil.copytree(tmp_path / "one", tmp_path / "two")

    gentle = replace(job, learning_rate=1e-6, clip_norm=1.0, batch=20)
    run(gentle, faces, tmp_path / "one")
    assert "resumed after epoch 1 of 3" in capsys.readouterr().out
    assert len(history(tmp_path / "one")) == 3
    machine = json.loads((tmp_path / "one/machine.json").read_text())
    changed = f"learning_rate {EXPLOSIVE} → 1e-06, clip_norm None → 1.0, batch 8 → 20"
    assert machine["changed"] == f"after epoch 1: {changed}"
    (steps,) = [x for name, x in end_state(tmp_path / "one").items() if "optimizer/vars/0" in name]
    assert steps == 3 * TRAIN / 20

    def stop(epoch: int, row: dict[str, float]) -> None:
        if epoch == 1:
            raise Killed

    with pytest.raises(Killed):  # and what goes on so is resumed as any other
        run(gentle, faces, tmp_path / "two", on_epoch=stop)
    run(gentle, faces, tmp_path / "two")
    assert history(tmp_path / "two") == history(tmp_path / "one")
    assert differences(tmp_path / "two", tmp_path / "one") == {}


def test_weights_decay_but_biases_do_not(faces: Path) -> None:
    keras.utils.set_random_seed(1)
    job = replace(EMOTION, learning_rate=0.1, weight_decay=0.5)
    model = fit.build(job, read_meta(faces))
    fit._compile(model, job, 0, steps=1)
    model.optimizer.build(model.trainable_variables)
    for variable in model.trainable_variables:
        variable.assign(np.ones(variable.shape))  # for biases begin at zero, where nothing decays
    before = [variable.numpy() for variable in model.trainable_variables]
    model.optimizer.iterations.assign(1)  # after the warm-up: lr > 0
    model.optimizer.apply_gradients(
        [(np.zeros_like(v), w) for v, w in zip(before, model.trainable_variables, strict=True)]
    )
    assert {"kernel", "bias", "gamma", "beta"} <= {v.name for v in model.trainable_variables}
    for variable in model.trainable_variables:
        shrunk = float(np.abs(variable.numpy()).mean()) < 0.99
        assert shrunk == (variable.name == "kernel"), variable.path


# shards that are not meant


def test_only_the_shards_that_the_job_was_written_for_are_trained_on(
    emotions: Path, faces: Path, tmp_path: Path
) -> None:
    with pytest.raises(GrimaceError, match=f"{faces} holds shards for landmarks"):
        run(EMOTION, faces, tmp_path)
    with pytest.raises(GrimaceError, match="holds no shards"):
        run(EMOTION, tmp_path, tmp_path)
    other = tmp_path / "other"
    shutil.copytree(emotions, other)
    images = np.load(other / "train/images-01.npy")
    images[3, 4, 4] += 1
    np.save(other / "train/images-01.npy", images)
    job = replace(EMOTION, epochs=1, data_version=version_of(emotions))
    with pytest.raises(GrimaceError, match="holds other shards"):
        run(job, other, tmp_path)
    assert not (tmp_path / "model.keras").exists()


def test_a_result_is_there_with_its_model_or_not_at_all(
    finished: Path, emotions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fit, "machine", die)
        run(EMOTION, emotions, finished)
    assert not (finished / "model.keras").exists()
    run(EMOTION, emotions, finished)
    assert (finished / "model.keras").exists() and not (finished / "partial.keras").exists()


# out of memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."),
    ],
    ids=["numpy", "tensorflow", "jax"],
)
def test_out_of_memory_ends_it_and_keeps_the_state(
    error: Exception, emotions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, epochs = keras.Model.fit, count(1)

    def full(*arguments: Any, **options: Any) -> Any:
        if next(epochs) == 2:
            raise error
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(GrimaceError) as told:
        patch.setattr(keras.Model, "fit", full)
        run(EMOTION, emotions, tmp_path)
    for part in (
        "training emotion-plain: out of memory",
        "Make batch smaller (now 8)",
        f"The state after epoch 1 is kept in {tmp_path / 'checkpoint'}",
    ):
        assert part in str(told.value)
    assert done(tmp_path) == 1
    assert len(saved_history(replace(EMOTION, batch=4), tmp_path / "checkpoint")) == 1


def test_other_errors_are_not_explained_away(
    emotions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(keras.Model, "fit", fails)
    with pytest.raises(RuntimeError, match="something else"):
        run(EMOTION, emotions, tmp_path)


# averaged weights


def test_averaged_weights_are_what_is_validated_and_saved(
    emotions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of the trained weights after each step, with its own batch statistics."""
    job = replace(EMOTION, ema=0.7, epochs=1, dropout=0.0)
    steps: list[list[np.ndarray]] = []
    fed = follow_steps(monkeypatch, steps)
    rows: list[dict[str, float]] = []
    model = run(job, emotions, tmp_path, on_epoch=lambda _, row: rows.append(row))
    average = steps[0]
    for step in steps[1:]:
        pairs = zip(average, step, strict=True)
        average = [0.7 * mean + np.float32(0.3) * new for mean, new in pairs]
    for got, mean, last in zip(model.trainable_weights, average, steps[-1], strict=True):
        np.testing.assert_allclose(got.numpy(), mean, rtol=1e-4, atol=1e-6)
        assert not np.allclose(got.numpy(), last, rtol=1e-4, atol=1e-6)

    (norm, *_) = (x for x in model.layers if isinstance(x, keras.layers.BatchNormalization))
    before = keras.Model(model.inputs, norm.input)
    inputs = [before.predict(fed[-1][index][0], verbose=0) for index in range(len(fed[-1]))]
    means = np.mean([batch.mean((0, 1, 2)) for batch in inputs], 0)
    variances = np.mean([batch.var((0, 1, 2)) for batch in inputs], 0)
    np.testing.assert_allclose(norm.moving_mean.numpy(), means, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(norm.moving_variance.numpy(), variances, rtol=1e-3, atol=1e-5)

    val = read_view(emotions, "val")
    answer = model.predict(val.images.astype(np.float32), verbose=0)
    assert rows[0]["val_accuracy"] == (answer.argmax(1) == val.emotions).mean()


def follow_steps(patch: pytest.MonkeyPatch, steps: list[list[np.ndarray]]) -> list[Any]:
    """Note the trained weights after each step; return the batches of each epoch."""
    real, fed = keras.Model.fit, []

    def watched(model: keras.Model, data: Any, callbacks: list[Any], **options: Any) -> Any:
        def note(batch: int, logs: Any) -> None:
            steps.append([weight.numpy() for weight in model.trainable_weights])

        fed.append(data)
        more = [*callbacks, keras.callbacks.LambdaCallback(on_train_batch_end=note)]
        return real(model, data, callbacks=more, **options)

    patch.setattr(keras.Model, "fit", watched)
    return fed


def test_training_goes_on_from_its_own_weights(
    emotions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Averaging watches; it does not change what is trained."""
    trained = []
    for ema in (None, 0.9):
        steps: list[list[np.ndarray]] = []
        with monkeypatch.context() as patch:
            follow_steps(patch, steps)
            run(replace(EMOTION, ema=ema, epochs=2), emotions, tmp_path / str(ema))
        trained.append(steps)
    for one, other in zip(*trained, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# when it ends, and its phases


def test_it_stops_when_nothing_is_gained(emotions: Path, tmp_path: Path) -> None:
    job = replace(EMOTION, patience=2, epochs=30)
    run(job, emotions, tmp_path)
    accuracies = [float(row["val_accuracy"]) for row in history(tmp_path)]
    assert len(accuracies) == accuracies.index(max(accuracies)) + 3 < 30
    (tmp_path / "model.keras").unlink()
    run(job, emotions, tmp_path)  # stays stopped
    assert len(history(tmp_path)) == len(accuracies)


def test_a_transfer_networks_head_is_trained_first_then_all(emotions: Path, tmp_path: Path) -> None:
    built = emotion.build("mobilenet_v2", (), 16, 1, 0.0)
    file = tmp_path / "base.weights.h5"
    next(x for x in built.layers if isinstance(x, keras.Model)).save_weights(file)
    job = replace(EMOTION, network="mobilenet_v2", widths=(), weights=str(file), batch=20)
    job = replace(job, frozen_epochs=1, fine_tune_rate=0.01, weights_sha256=sha256(file))
    before = base_arrays(file, "layers")
    states: list[dict[str, np.ndarray]] = []

    def note(epoch: int, row: dict[str, float]) -> None:
        saved = tmp_path / f"checkpoint/epoch-{epoch + 1:04d}.weights.h5"
        states.append(base_arrays(saved, "layers/functional/layers"))

    run(job, emotions, tmp_path, on_epoch=note)
    assert len(before) > 200 and all(state.keys() == before.keys() for state in states)
    first, second, _ = (
        {name for name in before if not np.array_equal(before[name], state[name])}
        for state in states
    )
    assert first == set()
    assert second == {name for name in before if "batch_normalization" not in name}
    rates = [float(row["learning_rate"]) for row in history(tmp_path)]
    assert rates[0] == pytest.approx(0, abs=1e-6) and 0 < rates[1] < 0.01
    assert phase_at(job, 1).rate == 0.01

    def stop(last: int) -> Callable[[int, dict[str, float]], None]:
        def killed(epoch: int, row: dict[str, float]) -> None:
            if epoch == last:
                raise Killed

        return killed

    again = tmp_path / "again"
    for last in (0, 1):  # at the border, and after it
        with pytest.raises(Killed):
            run(job, emotions, again, on_epoch=stop(last))
    run(job, emotions, again)
    assert history(again) == history(tmp_path)
    assert differences(again, tmp_path) == {}

    with pytest.raises(GrimaceError, match=f"weights {file} have SHA-256 .* not {'0' * 64}"):
        run(replace(job, weights_sha256="0" * 64), emotions, tmp_path / "other")


def base_arrays(file: Path, under: str) -> dict[str, np.ndarray]:
    """The arrays of a weights file that lie under a group."""
    found = arrays(file)
    return {name.removeprefix(under): found[name] for name in found if name.startswith(under)}


# teachers


def test_a_student_follows_its_teacher_where_that_alone_counts(
    emotions: Path, tmp_path: Path
) -> None:
    """The teacher takes bright faces for sad and dark ones for happy, and so does the student."""
    inputs = keras.Input((16, 16, 1))
    x = keras.layers.GlobalAveragePooling2D()(inputs)
    slopes, offsets = np.zeros((1, 7)), np.full(7, -20.0)
    slopes[0, [3, 5]], offsets[[3, 5]] = [-0.1, 0.1], [10, -10]  # even at a mean level of 100
    dense = keras.layers.Dense(7)
    teacher = keras.Model(inputs, keras.layers.Softmax()(dense(x)))
    dense.set_weights([slopes, offsets])
    teacher.save(tmp_path / "teacher.keras")
    file = Teacher(str(tmp_path / "teacher.keras"), sha256(tmp_path / "teacher.keras"))
    run(replace(EMOTION, teachers=(file,), teacher_weight=1.0, temperature=2.0), emotions, tmp_path)
    last = history(tmp_path)[-1]
    assert float(last["accuracy"]) < 0.2 and float(last["val_accuracy"]) < 0.2


# which is faster


def test_precisions_are_compared(emotions: Path, tmp_path: Path) -> None:
    said = fit.compare_precisions(replace(EMOTION, precision="mixed_bfloat16"), emotions)
    figure = r"([\d.]+) ms a step \(\d+ images/s\)"
    found = re.fullmatch(
        rf"emotion-plain under tensorflow: float32 {figure}, mixed_bfloat16 {figure}; "
        r"mixed_bfloat16 is ([\d.]+) times as fast",
        said,
    )
    assert found
    plain, mixed, ratio = map(float, found.groups())
    assert ratio == pytest.approx(plain / mixed, rel=0.05)
    assert keras.mixed_precision.dtype_policy().name == "float32"


# what the job asks for


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network": "plane"}, "emotion-plain: no network 'plane' for emotion; .*plain"),
        (
            {"weights": "imagenet"},
            "emotion-plain: network plain cannot be built: plain has no pretrained part",
        ),
    ],
)
def test_a_network_that_cannot_be_had(
    change: dict[str, Any], words: str, emotions: Path, tmp_path: Path
) -> None:
    with pytest.raises(GrimaceError, match=words):
        run(replace(EMOTION, **change), emotions, tmp_path)


def test_every_job_of_params_names_a_network() -> None:
    known = {"emotion": emotion.NETWORKS, "landmarks": landmarks.NETWORKS}
    for job in load_params(ROOT / "params.yaml").train.jobs.values():
        assert (job.network or job.model) in known[job.task]


# imports


def test_importing_needs_keras_and_what_that_needs() -> None:
    """Under Keras's NumPy backend, which itself wants JAX; an empty stand-in is enough for that."""
    code = """
import sys
from importlib.machinery import ModuleSpec
from pkgutil import walk_packages
from unittest.mock import MagicMock

missing = {
    *("tensorflow", "mlflow", "dvc", "prefect", "tensorflow_datasets", "albumentations", "cv2"),
    *("pandas", "pydantic", "yaml", "psutil", "tqdm", "requests", "sklearn", "matplotlib"),
}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(name)
class StandIn:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "jax" else None
    def create_module(self, spec):
        return MagicMock(__path__=[], __spec__=spec)
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Missing())
sys.meta_path.append(StandIn())
import models
for module in walk_packages(models.__path__, "models."):
    __import__(module.name)
import pipelines.fit
import keras
print(keras.backend.backend(), sorted(missing & set(sys.modules)), "models.losses" in sys.modules)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"KERAS_BACKEND": "numpy"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout.split("\n")[0] == "numpy [] True", ended.stderr
