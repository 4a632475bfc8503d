"""The fit loop: one job file plus one folder of shards in, one trained model out.

Keras and NumPy are all it imports, so the same job runs under any Keras backend and on a machine
without TensorFlow:

    KERAS_BACKEND=jax python -m pipelines.fit --job job.json --shards DIR --out DIR

After every epoch the whole state is saved; killed at any moment, the same command goes on from
there. The order of images follows from the seed and the epoch's number alone.
"""

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import keras
import numpy as np

from models import emotion, landmarks, losses
from pipelines.cli import GrimaceError, run
from pipelines.shards import View, read_meta, read_view

WARM_UP = 0.05  # share of all steps
BEST = "best.weights.h5"  # of the epoch that did best so far, in the checkpoint


@dataclass(frozen=True)
class Job:
    """One training, resolved: see `pipelines.params.TrainJob` for the shared fields.

    Attributes:
        epochs: passes over the training images, each over another augmented view.
        data_version: identifies the shards, so that a checkpoint of other data is not resumed.
    """

    task: str
    model: str
    widths: tuple[int, ...]
    dropout: float
    loss: str
    label_smoothing: float
    optimizer: str
    learning_rate: float
    weight_decay: float
    batch: int
    epochs: int
    precision: str
    seed: int
    data_version: str = ""


def main() -> None:
    """Run a job file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", type=Path, required=True, help="JSON with the fields of Job")
    parser.add_argument("--shards", type=Path, required=True, help="data/augment/TASK")
    parser.add_argument("--out", type=Path, required=True, help="where the model is to go")
    args = parser.parse_args()
    fit(read_job(args.job), args.shards, args.out, checkpoint=args.out / "checkpoint")


def read_job(path: Path) -> Job:
    """Read a job file.

    Raises:
        GrimaceError: a missing or an unknown field.
    """
    raw = json.loads(path.read_text())
    known = {field.name for field in fields(Job)}
    if unknown := sorted(set(raw) - known):
        raise GrimaceError(f"{path}: unknown field {unknown[0]!r}; known are {sorted(known)}")
    try:
        return Job(**{**raw, "widths": tuple(raw["widths"])})
    except (KeyError, TypeError) as error:
        raise GrimaceError(f"{path}: {error}") from None


def fit(
    job: Job,
    shards: Path,
    out: Path,
    checkpoint: Path,
    on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, row: None,
) -> keras.Model:
    """Train, or go on training, and write model.keras and history.csv.

    Args:
        job: what to train.
        shards: a folder as `pipelines.shards` describes.
        out: receives model.keras (float32, the epoch that was best on validation) and history.csv.
        checkpoint: holds the state between epochs; the caller removes it when all is done.
        on_epoch: called with the epoch's number from 0 and its figures, once an epoch.

    Returns:
        The model written.

    Raises:
        GrimaceError: the loss is no longer a number; the last good checkpoint is kept.
    """
    meta = read_meta(shards)
    keras.utils.set_random_seed(job.seed)
    keras.mixed_precision.set_global_policy(job.precision)
    validation = Batches(read_view(shards, "val"), job.batch)
    steps = math.ceil(meta["counts"]["train"] / job.batch)
    resumed = _resume(job, checkpoint)
    model, history = resumed or (_compiled(job, meta, steps), [])
    checkpoint.mkdir(parents=True, exist_ok=True)
    if not resumed:  # its files are about to be overwritten
        (checkpoint / "state.json").unlink(missing_ok=True)

    for epoch in range(len(history), job.epochs):
        start = time.perf_counter()
        view = read_view(shards, "train", epoch % meta["views"])
        order = np.random.default_rng([job.seed, epoch]).permutation(len(view.ids))
        print(f"epoch {epoch + 1}/{job.epochs}", flush=True)
        _seed_dropout(model, job.seed, epoch * steps)
        trained = model.fit(
            Batches(view, job.batch, order),
            shuffle=False,  # else Keras draws the batches' order again, from a global generator
            callbacks=[keras.callbacks.TerminateOnNaN()],
            verbose=1 if sys.stdout.isatty() else 0,
        )
        row = {name: float(values[-1]) for name, values in trained.history.items()}
        seconds = time.perf_counter() - start
        scores = model.evaluate(validation, verbose=0, return_dict=True)
        row |= {f"val_{name}": float(value) for name, value in scores.items()}
        _refuse_nan(row, epoch, job, checkpoint)
        row["images_per_second"] = round(len(view.ids) / seconds, 1)
        print("  " + ", ".join(f"{name} {value:.4f}" for name, value in row.items()), flush=True)
        history.append(row)
        on_epoch(epoch, row)  # before the state: killed in between, it is told twice, never not
        _save_state(model, history, checkpoint, job)

    keras.mixed_precision.set_global_policy("float32")
    final = build(job, meta)
    final.load_weights(checkpoint / BEST)
    out.mkdir(parents=True, exist_ok=True)
    final.save(out / "model.keras")
    _write_history(history, out / "history.csv")
    return final


def build(job: Job, meta: dict[str, Any]) -> keras.Model:
    """Build the job's untrained network under the global precision policy."""
    size, channels = meta["size"], meta["channels"]
    if job.task == "emotion":
        return emotion.build(job.model, job.widths, size, channels, job.dropout)
    return landmarks.build(
        job.model, job.widths, size, channels, job.dropout, points=meta["points"]
    )


def best_epoch(history: list[dict[str, float]], task: str) -> int:
    """Return the index of the epoch that did best on validation."""
    if task == "emotion":
        return max(range(len(history)), key=lambda epoch: history[epoch]["val_accuracy"])
    return min(range(len(history)), key=lambda epoch: history[epoch]["val_nme"])


class Batches(keras.utils.PyDataset):
    """One pass over a view, in a given order.

    Yields images float32 (B, S, S, C) in 0-255 with one-hot emotions float32 (B, 7), or with
    landmarks and mask float32 (B, N, 3); a third item, float32 (B,), weighs the loss of each
    where the examples of the view do not all have weight 1. Metrics stay unweighted.
    """

    def __init__(self, view: View, batch: int, order: np.ndarray | None = None) -> None:
        super().__init__()
        self.view, self.batch = view, batch
        self.weighted = bool((view.weights != 1).any())
        self.order = np.arange(len(view.ids)) if order is None else order

    def __len__(self) -> int:
        """Return the number of batches, the last of which may be short."""
        return math.ceil(len(self.order) / self.batch)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        """Return a batch."""
        # Ascending rows read the memory map forwards; the order within a batch does not matter.
        rows = np.sort(self.order[index * self.batch : (index + 1) * self.batch])
        batch = self.view.images[rows].astype(np.float32), self._labels(rows)
        return (*batch, self.view.weights[rows]) if self.weighted else batch

    def _labels(self, rows: np.ndarray) -> np.ndarray:
        if self.view.emotions is not None:
            return np.eye(7, dtype=np.float32)[self.view.emotions[rows]]
        assert self.view.landmarks is not None and self.view.visible is not None
        visible = self.view.visible[rows][..., None].astype(np.float32)
        return np.concatenate([self.view.landmarks[rows], visible], -1)


def _compiled(job: Job, meta: dict[str, Any], steps: int) -> keras.Model:
    total = steps * job.epochs
    warm_up = max(1, round(total * WARM_UP))
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, total - warm_up), warmup_target=job.learning_rate, warmup_steps=warm_up
    )
    if job.optimizer == "sgd":
        optimizer = keras.optimizers.SGD(
            schedule, momentum=0.9, nesterov=True, weight_decay=job.weight_decay
        )
    else:
        optimizer = keras.optimizers.AdamW(schedule, weight_decay=job.weight_decay)
    _spare_from_decay(optimizer)
    model = build(job, meta)
    if job.task == "emotion":
        loss = keras.losses.CategoricalCrossentropy(label_smoothing=job.label_smoothing)
        model.compile(optimizer, loss, metrics=["accuracy"])
    else:
        model.compile(optimizer, losses.MaskedWing(), metrics=[losses.nme])
    return model


def _spare_from_decay(optimizer: keras.optimizers.Optimizer) -> None:
    """Decay kernels only; Keras does not save this choice with the optimiser."""
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])


def _seed_dropout(model: keras.Model, seed: int, step: int) -> None:
    """Draw the masks that this step always has; Keras does not save where it had got to."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.seed_generator.state.assign([seed, step])


def _resume(job: Job, checkpoint: Path) -> tuple[keras.Model, list[dict[str, float]]] | None:
    """Return the model and history a checkpoint of this very job holds, if there is one."""
    state = checkpoint / "state.json"
    saved = json.loads(state.read_text()) if state.exists() else {}
    if saved.get("job") != _as_json(job):
        return None
    if not all((checkpoint / name).exists() for name in (saved["model"], BEST)):
        return None  # killed while it was being removed
    model = keras.models.load_model(checkpoint / saved["model"])
    _spare_from_decay(model.optimizer)
    print(f"resumed after epoch {len(saved['history'])} of {job.epochs}", flush=True)
    return model, saved["history"]


def _save_state(
    model: keras.Model, history: list[dict[str, float]], checkpoint: Path, job: Job
) -> None:
    """Save model and history so that a kill between any two writes leaves a whole state."""
    if best_epoch(history, job.task) == len(history) - 1:
        model.save_weights(checkpoint / "partial.weights.h5")
        (checkpoint / "partial.weights.h5").replace(checkpoint / BEST)
    name = f"epoch-{len(history):04d}.keras"
    model.save(checkpoint / name)
    partial = checkpoint / "state.json.partial"
    partial.write_text(json.dumps({"job": _as_json(job), "model": name, "history": history}))
    partial.replace(checkpoint / "state.json")
    for old in checkpoint.glob("epoch-*.keras"):
        if old.name != name:
            old.unlink()


def _as_json(job: Job) -> dict[str, Any]:
    return {**asdict(job), "widths": list(job.widths)}


def _refuse_nan(row: dict[str, float], epoch: int, job: Job, checkpoint: Path) -> None:
    if all(math.isfinite(value) for value in row.values()):
        return
    raise GrimaceError(
        f"training {job.task}-{job.model}: the loss is not a number in epoch {epoch + 1}. Lower "
        f"learning_rate (now {job.learning_rate}) or use precision float32 (now "
        f"{job.precision}). The state after epoch {epoch} is kept in {checkpoint}."
    )


def _write_history(history: list[dict[str, float]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", *history[0]])
        writer.writeheader()
        writer.writerows({"epoch": epoch + 1, **row} for epoch, row in enumerate(history))


if __name__ == "__main__":
    run(main)
