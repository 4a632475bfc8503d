"""The fit loop: one job file plus one folder of shards in, one trained model out.

Keras and NumPy are all it needs, so the same job runs under TensorFlow or JAX, and on a machine
that has only one of them:

    KERAS_BACKEND=jax python -m pipelines.fit --job job.json --shards DIR --out DIR

After every epoch the whole state is saved; killed at any moment, the same command goes on from
there. The order of images, dropout and mixing follow from the seed and the epoch's number alone.
"""

import argparse
import csv
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from models import emotion, landmarks, losses
from pipelines.batches import Batches, training_batches
from pipelines.checkpoint import (
    BEST,
    adopt,
    break_down,
    changes_of,
    forget,
    mend,
    saved,
    write_state,
)
from pipelines.cli import GrimaceError, run
from pipelines.distill import teacher_answers
from pipelines.job import Job, read_job, sha256, write_job
from pipelines.progress import progress
from pipelines.replicas import ALONE, Replicas, replicas_of
from pipelines.schedules import (
    History,
    best_epoch,
    is_over,
    optimizer_of,
    phase_at,
    plateau_rate,
)
from pipelines.shards import View, read_meta, read_view, version_of

TASKS = {"emotion": emotion, "landmarks": landmarks}
STATISTICS = 2048  # images from which the statistics of averaged weights are taken
TIMED_STEPS, TIMED_ROUNDS = 10, 3

OnEpoch = Callable[[int, dict[str, float]], None]


class OutOfMemoryError(GrimaceError):
    """Memory has run out, perhaps on one of several machines alone."""


def main() -> None:
    """Run a job file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", type=Path, required=True, help="JSON with the fields of a job")
    parser.add_argument("--shards", type=Path, required=True, help="data/augment/TASK")
    parser.add_argument("--out", type=Path, help="where the model is to go")
    parser.add_argument(
        "--devices", type=int, default=1, help="of this machine, under JAX; 0: all (default: 1)"
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="only time some steps in float32 and in mixed_bfloat16 on this machine",
    )
    args = parser.parse_args()
    job = read_job(args.job)
    if args.time:
        print(compare_precisions(job, args.shards))
    elif args.out is None:
        parser.error("--out is needed: where the model is to go")
    else:
        fit(job, args.shards, args.out, args.out / "checkpoint", devices=args.devices)


def fit(
    job: Job,
    shards: Path,
    out: Path,
    checkpoint: Path,
    on_epoch: OnEpoch = lambda epoch, row: None,
    devices: int = 1,
) -> keras.Model:
    """Train, or go on training, and write what comes of it.

    Processes that `keras.distribution.initialize` has joined train together when each calls this
    with the same arguments, which name folders on a disk that they share; the first one writes.

    Args:
        job: what to train.
        shards: a folder as `pipelines.shards` describes.
        out: receives model.keras (float32, the epoch that was best on validation), history.csv
            (a row an epoch; its `seconds` are since the epoch before was over or the start, so
            together all time but that of a last save and of what a kill threw away), job.json and
            machine.json (of the last attempt; and what was changed after a breakdown).
        checkpoint: holds the state between epochs (`pipelines.checkpoint`); the caller removes it
            when all is done.
        on_epoch: called with each epoch's number from 0 and its figures, when the epoch's state
            is saved; where a training is resumed, first with those of the epochs before.
        devices: of this process, which train together (`pipelines.replicas`); 0 for all.

    Returns:
        The model written.

    Raises:
        OutOfMemoryError: memory has run out.
        GrimaceError: the loss is no longer a number, the job does not fit the devices, is for other
            shards or names a network or file that is not there. The last good checkpoint is kept,
            and a job that is changed as the message says goes on from it.
    """
    begun = time.perf_counter()
    _check_network(job)
    _check_shards(job, shards)
    meta, replicas = read_meta(shards), replicas_of(devices, job.batch)
    with _explained(job, checkpoint):
        answers = teacher_answers(job, shards, checkpoint / "teachers")
        keras.utils.set_random_seed(job.seed)
        keras.mixed_precision.set_global_policy(job.precision)
        with replicas.scope():
            history = _train(job, meta, shards, checkpoint, on_epoch, answers, replicas, begun)
        replicas.agree(len(history), "the last epoch")  # and wait for the first, which saves it
        model = _best(job, meta, checkpoint)
        if replicas.writes:
            _write_result(model, job, history, out, checkpoint, replicas)
        return model


def _train(
    job: Job,
    meta: dict[str, Any],
    shards: Path,
    checkpoint: Path,
    on_epoch: OnEpoch,
    answers: list[Path],
    replicas: Replicas,
    begun: float,
) -> History:
    """Train all epochs that are left; return the figures of all."""
    steps = math.ceil(replicas.even(meta["counts"]["train"]) / job.batch)
    validation = read_view(shards, "val")
    model, history = _resume(job, meta, steps, checkpoint, replicas) or _begin(
        job, meta, checkpoint, replicas
    )
    for epoch, row in enumerate(history):
        on_epoch(epoch, row)
    while not is_over(job, history):
        epoch = len(history)
        if epoch == phase_at(job, epoch).first:
            _compile(model, job, epoch, steps)
        if job.schedule == "plateau":
            model.optimizer.learning_rate = plateau_rate(job, history)
        _seed_dropout(model, job.seed, epoch * steps)
        batches = _batches_of(job, meta, shards, epoch, answers, replicas)
        row, own = _fit_epoch(model, job, epoch, batches)
        scores = _validate(model, validation, job.batch, replicas)
        row |= {f"val_{name}": value for name, value in scores.items()}
        row["learning_rate"] = float(model.optimizer.learning_rate)
        begun, before = time.perf_counter(), begun
        row["seconds"] = round(begun - before, 2)
        _refuse_nan(row, epoch, job, checkpoint)
        history.append(row)
        _save_state(model, own, history, checkpoint, job, replicas)
        if replicas.writes:
            print(told(job, epoch, row), flush=True)
        on_epoch(epoch, row)
    return history


def told(job: Job, epoch: int, row: dict[str, float]) -> str:
    """Return the line that is printed of an epoch."""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
    return f"epoch {epoch + 1}/{job.epochs}: {figures}"


def build(job: Job, meta: dict[str, Any], weights: str | None = None) -> keras.Model:
    """Build the job's network under the global precision policy.

    Args:
        job: names it.
        meta: of the shards, which says how large images are.
        weights: to start from; at random by default.

    Raises:
        GrimaceError: it cannot be had in this size or with these weights, or these are not those
            that the job means.
    """
    _check_weights(job, weights)
    task = TASKS[job.task]
    points = {} if job.task == "emotion" else {"points": meta["points"]}
    shape = job.widths, meta["size"], meta["channels"], job.dropout
    try:
        return task.build(job.network, *shape, weights=weights, **points)
    except (ValueError, OSError) as error:
        raise GrimaceError(f"{job.name}: network {job.network} cannot be built: {error}") from None


def _check_weights(job: Job, weights: str | None) -> None:
    if weights is None or job.weights_sha256 is None or not Path(weights).is_file():
        return  # the network says what is missing
    if (found := sha256(Path(weights))) != job.weights_sha256:
        raise GrimaceError(
            f"{job.name}: the weights {weights} have SHA-256 {found}, not {job.weights_sha256}; "
            "bring the file with which the job was written, or write the job again"
        )


def _check_network(job: Job) -> None:
    networks = TASKS[job.task].NETWORKS
    if job.network not in networks:
        known = ", ".join(networks)
        raise GrimaceError(f"{job.name}: no network {job.network!r} for {job.task}; {known}")


def _check_shards(job: Job, shards: Path) -> None:
    if (task := read_meta(shards)["task"]) != job.task:
        raise GrimaceError(f"{job.name}: {shards} holds shards for {task}")
    if job.data_version and (found := version_of(shards)) != job.data_version:
        raise GrimaceError(
            f"{job.name}: {shards} holds other shards ({found[:12]}) than the job was written for "
            f"({job.data_version[:12]}); bring those here, or write the job again where these are"
        )


def _batches_of(
    job: Job,
    meta: dict[str, Any],
    shards: Path,
    epoch: int,
    answers: list[Path],
    replicas: Replicas = ALONE,
) -> Batches:
    number = epoch % meta["views"]
    answer = np.load(answers[number], mmap_mode="r") if answers else None
    return training_batches(job, read_view(shards, "train", number), epoch, answer, replicas)


def compare_precisions(job: Job, shards: Path) -> str:
    """Time some training steps in both precisions, in turns, and say which is faster here."""
    seconds = step_seconds(job, shards)
    figures = ", ".join(
        f"{precision} {1000 * taken:.1f} ms a step ({job.batch / taken:.0f} images/s)"
        for precision, taken in seconds.items()
    )
    ratio = seconds["float32"] / seconds["mixed_bfloat16"]
    where = f"{job.name} under {keras.backend.backend()}"
    return f"{where}: {figures}; mixed_bfloat16 is {ratio:.2f} times as fast"


def step_seconds(job: Job, shards: Path) -> dict[str, float]:
    """Return the seconds of a training step by precision, each the least of some rounds."""
    _check_network(job)
    meta, job = read_meta(shards), replace(job, teachers=(), ema=None)
    batches = _batches_of(job, meta, shards, 0, [])
    batches.order = batches.order[: TIMED_STEPS * job.batch]
    models: dict[str, keras.Model] = {}
    seconds: dict[str, float] = {}
    for precision in ("float32", "mixed_bfloat16"):
        keras.mixed_precision.set_global_policy(precision)
        models[precision] = build(job, meta)
        _compile(models[precision], job, job.epochs - 1, TIMED_STEPS)
        models[precision].fit(batches, shuffle=False, verbose=0)  # traced and compiled here
    for _ in range(TIMED_ROUNDS):
        for precision, model in models.items():
            start = time.perf_counter()
            model.fit(batches, shuffle=False, verbose=0)
            taken = (time.perf_counter() - start) / len(batches)
            seconds[precision] = min(taken, seconds.get(precision, taken))
    keras.mixed_precision.set_global_policy("float32")
    return seconds


def _begin(
    job: Job, meta: dict[str, Any], checkpoint: Path, replicas: Replicas
) -> tuple[keras.Model, History]:
    if replicas.writes:
        forget(checkpoint)
    return build(job, meta, job.weights), []


def _compile(model: keras.Model, job: Job, epoch: int, steps: int) -> None:
    """Give the model its loss and, for the phase the epoch belongs to, a fresh optimiser."""
    phase = phase_at(job, epoch)
    if job.frozen_epochs:
        from models.transfer import set_frozen

        set_frozen(model, phase.frozen)
    weight = job.teacher_weight if job.teachers else 0.0
    if job.task == "emotion":
        loss = losses.emotion_loss(job.loss, job.label_smoothing, weight, job.temperature)
        metric = losses.accuracy
    else:
        loss, metric = losses.landmark_loss(job.loss, weight), losses.nme
    model.compile(optimizer_of(job, phase, steps), loss, metrics=[metric])


def _seed_dropout(model: keras.Model, seed: int, step: int) -> None:
    """Draw the masks that this step always has; an epoch before it may have been another run's."""
    layers = [layer for layer in model._flatten_layers() if hasattr(layer, "seed_generator")]
    for number, layer in enumerate(layers):
        layer.seed_generator.state.assign([seed + number, step])


def _fit_epoch(
    model: keras.Model, job: Job, epoch: int, batches: Batches
) -> tuple[dict[str, float], list[Any]]:
    """Train for one epoch and leave in the model the weights that are to be validated.

    Returns:
        The epoch's figures; and the model's own weights, to be put back before it is trained
        further, where it was left with averaged ones, else none.
    """
    start, own = time.perf_counter(), []
    with progress(f"epoch {epoch + 1}/{job.epochs}", len(batches)) as advance:
        count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: advance(1))
        count.async_safe = True  # it looks at no figures, so nobody need wait for them
        callbacks = [count]
        if job.ema is not None:  # Keras puts the averages in their place when `fit` ends
            keep = lambda epoch, logs: own.extend(_copied_weights(model))  # noqa: E731
            callbacks.append(keras.callbacks.LambdaCallback(on_epoch_end=keep))
        # Shuffled here, Keras would draw the batches' order again, from a global generator.
        trained = model.fit(batches, shuffle=False, callbacks=callbacks, verbose=0)
    seconds = time.perf_counter() - start
    if job.ema is not None:
        # Under JAX they are still the optimiser's own arrays, which evaluation would give away.
        model.set_weights(_copied_weights(model))
        _take_statistics(model, batches)
    row = {name: float(values[-1]) for name, values in trained.history.items()}
    return row | {"images_per_second": round(len(batches.order) / seconds, 1)}, own


def _validate(model: keras.Model, view: View, batch: int, replicas: Replicas) -> dict[str, float]:
    """Return the loss and metrics, each the mean over all images of a view."""
    count = len(view.ids)
    even = replicas.even(count)
    # Those that cannot be dealt out evenly are asked apart, as often as there are devices, which
    # leaves their mean the same.
    rest = np.repeat(np.arange(even, count), replicas.devices)
    scores: dict[str, float] = {}
    for order, number in ((np.arange(even), even), (rest, count - even)):
        if number:
            batches = Batches(view, batch, order, replicas=replicas)
            means = model.evaluate(batches, verbose=0, return_dict=True)
            for name, mean in means.items():
                scores[name] = scores.get(name, 0.0) + number / count * float(mean)
    return scores


def _copied_weights(model: keras.Model) -> list[Any]:
    return [keras.ops.copy(weight) for weight in model.weights]  # on the devices that have them


def _take_statistics(model: keras.Model, batches: Batches) -> None:
    """Give batch normalisation the statistics that belong to averaged weights.

    The running ones are those of the weights as they were trained, and Keras averages only what is
    trained. So they are taken anew, as the plain mean over some batches of this epoch (Izmailov et
    al. 2018, on averaged weights; Wu and Johnson 2021, section 3).
    """
    layers = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    momenta = [layer.momentum for layer in layers]
    wanted = math.ceil(STATISTICS / batches.batch) if layers else 0
    for number in range(min(wanted, len(batches))):
        for layer in layers:
            layer.momentum = number / (number + 1)
        model(batches.replicas.spread(batches[number][0]), training=True)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def _resume(
    job: Job, meta: dict[str, Any], steps: int, checkpoint: Path, replicas: Replicas
) -> tuple[keras.Model, History] | None:
    """Return the model and history of the checkpoint from which the job goes on, if it does."""
    state = saved(job, checkpoint)
    history: History = state.get("history", [])
    replicas.agree(len(history), "the epoch from which to go on: is the checkpoint's disk shared?")
    if not state:
        return None
    if replicas.writes:
        adopt(job, checkpoint)
    # With its weights, though others replace them: by them a base is known as pretrained.
    model = build(job, meta, job.weights)
    _compile(model, job, len(history) - 1, steps)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(checkpoint / state["weights"])
    # As it is already, but where the batch has been changed since: the schedule counts steps.
    first = phase_at(job, len(history) - 1).first
    model.optimizer.iterations.assign(steps * (len(history) - first))
    if replicas.writes:
        print(f"resumed after epoch {len(history)} of {job.epochs}", flush=True)
    return model, history


def _save_state(
    model: keras.Model,
    own: list[Any],
    history: History,
    checkpoint: Path,
    job: Job,
    replicas: Replicas,
) -> None:
    """Save model and history so that a kill between any two writes leaves a whole state."""
    if replicas.writes and best_epoch(history, job.task) == len(history) - 1:
        with replicas.apart():
            model.save_weights(checkpoint / "partial.weights.h5")
        (checkpoint / "partial.weights.h5").replace(checkpoint / BEST)
    if own:
        model.set_weights(own)
    if not replicas.writes:
        return
    name = f"epoch-{len(history):04d}.weights.h5"
    with replicas.apart():
        model.save_weights(checkpoint / name)  # the optimiser's among them
    write_state(job, name, history, changes_of(checkpoint), checkpoint)
    mend(checkpoint)
    for old in checkpoint.glob("epoch-*.weights.h5"):
        if old.name != name:
            old.unlink()


def _best(job: Job, meta: dict[str, Any], checkpoint: Path) -> keras.Model:
    keras.mixed_precision.set_global_policy("float32")
    model = build(job, meta, job.weights)
    model.load_weights(checkpoint / BEST)
    return model


def _write_result(
    model: keras.Model,
    job: Job,
    history: History,
    out: Path,
    checkpoint: Path,
    replicas: Replicas,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "model.keras").unlink(missing_ok=True)
    model.save(out / "partial.keras")
    names = dict.fromkeys(name for row in history for name in row)
    with (out / "history.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", *names])
        writer.writeheader()
        writer.writerows({"epoch": epoch + 1, **row} for epoch, row in enumerate(history))
    write_job(job, out / "job.json")
    changed = {"changed": "; ".join(changes)} if (changes := changes_of(checkpoint)) else {}
    (out / "machine.json").write_text(json.dumps(machine(replicas) | changed, indent=2) + "\n")
    (out / "partial.keras").rename(out / "model.keras")  # last: where it is, all is


def machine(replicas: Replicas = ALONE) -> dict[str, str]:
    """Say on what a training ran; the devices are all that this process sees."""
    backend, devices = keras.backend.backend(), ["unknown"]
    if backend == "tensorflow":
        devices = keras.distribution.list_devices()
    elif backend == "jax":
        import jax

        devices = [device.device_kind for device in jax.local_devices()]
    return {
        "backend": backend,
        "devices": ", ".join(devices),
        "keras": keras.__version__,
        "python": platform.python_version(),
        "replicas": str(replicas.devices),
        "processes": str(replicas.processes),
    }


@contextmanager
def _explained(job: Job, checkpoint: Path) -> Iterator[None]:
    """Turn running out of memory, on whatever backend, into a message."""
    try:
        yield
    except Exception as error:
        named = isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"
        if not named and "RESOURCE_EXHAUSTED" not in str(error):  # JAX only says so
            raise
        raise OutOfMemoryError(
            f"training {job.name}: out of memory. Make batch smaller (now {job.batch}), use "
            f"precision mixed_bfloat16 (now {job.precision}), or leave more memory free; a smaller "
            f"network needs less, but begins anew. {break_down(checkpoint)}"
        ) from error


def _refuse_nan(row: dict[str, float], epoch: int, job: Job, checkpoint: Path) -> None:
    if all(math.isfinite(value) for value in row.values()):
        return
    phase = phase_at(job, epoch)
    rate = "fine_tune_rate" if job.frozen_epochs and not phase.frozen else "learning_rate"
    raise GrimaceError(
        f"training {job.name}: the loss is not a number in epoch {epoch + 1}. Lower {rate} (now "
        f"{phase.rate}), set clip_norm (now {job.clip_norm}) or use precision float32 (now "
        f"{job.precision}). {break_down(checkpoint)}"
    )


if __name__ == "__main__":
    run(main)
