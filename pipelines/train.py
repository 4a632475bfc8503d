"""Stage `train`: run one job of `params.yaml` on its shards, watched by MLflow.

The fitting itself is `pipelines.fit`. Killed at any moment, the same command resumes after the
last whole epoch, in the same MLflow run. A job can be trained elsewhere, too:

    python -m pipelines.train --job emotion-plain --write-job job.json   # here
    python -m pipelines.fit --job job.json --shards DIR --out came       # there
    python -m pipelines.train --job emotion-plain --take came            # here again
"""

import argparse
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import copy, copytree, rmtree

import numpy as np
import pandas as pd

from pipelines import tracking
from pipelines.checkpoint import saved
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.job import Job, plain, read_job, write_job
from pipelines.params import Params, load_params
from pipelines.shards import read_meta, read_view, version_of

CHECKPOINTS = Path("checkpoints")
UNDELIVERED = CHECKPOINTS / "undelivered"  # what MLflow has still to be told of, a folder a run
RESULT = ("model.keras", "history.csv", "job.json", "machine.json")


def main() -> None:
    """Train one job, take in one that was trained elsewhere, or tell MLflow what it missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", help="a name under train.jobs, as emotion-plain")
    parser.add_argument("--shards", type=Path, help="default: data/augment/TASK")
    parser.add_argument("--out", type=Path, help="default: runs/TASK/MODEL")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--write-job", type=Path, metavar="FILE", help="write the job, and end")
    instead.add_argument("--take", type=Path, metavar="DIR", help="what `pipelines.fit` wrote")
    instead.add_argument(
        "--deliver", action="store_true", help="tell MLflow of trainings that ended without it"
    )
    args = parser.parse_args()
    params = load_params()
    if args.deliver:
        deliver(params)
        return
    if args.job not in params.train.jobs:
        names = ", ".join(params.train.jobs)
        raise GrimaceError(f"train.jobs has no {args.job!r}; --job can be {names}")
    settings = params.train.jobs[args.job]
    shards = args.shards or Path("data/augment", settings.task)
    out = args.out or Path("runs", settings.task, settings.model)
    if args.write_job:
        write_job(job := resolve(args.job, params, shards), args.write_job)
        print(_what_travels(job, args.write_job, shards))
    elif args.take:
        take(args.job, params, shards, out, args.take)
    else:
        train(args.job, params, shards, out)


def train(name: str, params: Params, shards: Path, out: Path) -> None:
    """Fit the job, log it, and write `out` whole: the files of `RESULT`, and history.png.

    Raises:
        GrimaceError: as `pipelines.fit.fit`; or MLflow does not answer before it has begun.
    """
    deliver(params)
    job = resolve(name, params, shards)
    folder = CHECKPOINTS / f"{name}-{_digest(job)}"
    _take_over(job, folder)
    with _run(job, params, shards, folder, tracking.provenance(shards)) as journal:
        if not (folder / "result").exists():
            with whole_folder(folder / "result") as partial:
                _fit(job, params, shards, partial, folder, journal)
        _hand_over(journal, shards, out)
    _clear(journal, out)


def _take_over(job: Job, folder: Path) -> None:
    """Go on with the checkpoint of a training that broke down, where the job may and has none.

    In a run of its own, which is told all epochs: MLflow's parameters cannot be changed.
    """
    if folder.exists():
        return
    others = [
        other
        for other in sorted(CHECKPOINTS.glob(f"{job.name}-*"))
        if (other / "state.json").exists() and not (other / "result").exists()
    ]
    for other in others:
        if saved(job, other):
            (other / "journal.json").unlink(missing_ok=True)  # of the other job's run
            other.rename(folder)
            return
    for other in others:
        print(f"{other} is not used: it is of the job before it, its shards or the code changed")


def _fit(
    job: Job, params: Params, shards: Path, out: Path, folder: Path, journal: tracking.Journal
) -> None:
    """Train here or on the cluster, as params say."""
    settings, address = params.train, params.cluster.address

    def on_epoch(epoch: int, row: dict[str, float]) -> None:
        journal.add(metrics=row, step=epoch)

    if settings.workers == 1 or address is None:
        from pipelines.fit import fit

        fit(job, shards, out, folder, on_epoch, settings.devices)
    else:
        from pipelines.cluster import fit_on_cluster

        group = settings.workers, settings.devices, settings.restarts
        fit_on_cluster(job, shards, out, folder, on_epoch, address, *group)


def take(name: str, params: Params, shards: Path, out: Path, came: Path) -> None:
    """Log and write what another machine made of a job, as if it had been trained here.

    Args:
        name: of the job.
        params: which have the job.
        shards: that it was to be trained on.
        out: written whole.
        came: the folder `pipelines.fit` wrote there.

    Raises:
        GrimaceError: a file is missing, or it is another job or was trained on other shards.
    """
    job = resolve(name, params, shards)
    _check_taken(job, came)
    folder = CHECKPOINTS / f"{name}-{_digest(job)}-taken"
    own = {"grimace.data_version": tracking.data_version(shards)}
    tags = own | {"grimace.origin": "trained elsewhere"}
    with _run(job, params, shards, folder, tags) as journal:
        with whole_folder(folder / "result") as partial:
            for file in RESULT:
                copy(came / file, partial / file)
        history = pd.read_csv(came / "history.csv", float_precision="round_trip")
        for epoch, row in enumerate(history.drop(columns="epoch").to_dict("records")):
            journal.add(metrics=row, step=epoch)
        _hand_over(journal, shards, out)
    _clear(journal, out)
    print(f"taken in; `uv run dvc commit -f train@{name}` tells DVC so")


def deliver(params: Params) -> None:
    """Tell MLflow of the trainings that ended while it was away."""
    if not UNDELIVERED.exists():
        return
    handle = os.open(UNDELIVERED, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # a training beside this one may be at it
        for file in sorted(UNDELIVERED.glob("*/journal.json")):
            if tracking.Journal(params.tracking, file.parent).deliver():
                _remove(file.parent)
    finally:
        os.close(handle)


def resolve(name: str, params: Params, shards: Path) -> Job:
    """Turn a job of params.yaml into one that stands alone.

    Raises:
        GrimaceError: the file with the weights it starts from is missing.
    """
    dataset = read_meta(shards)["dataset"]
    job = params.train.jobs[name].resolved(dataset, version_of(shards))
    if job.weights in (None, "imagenet"):
        return job
    if not Path(job.weights).is_file():
        raise GrimaceError(f"train.jobs.{name}.weights: there is no file {job.weights}")
    return replace(job, weights_sha256=tracking.sha256(Path(job.weights)))


def _what_travels(job: Job, file: Path, shards: Path) -> str:
    said = f"{file} and {shards} are what it takes to train {job.name}"
    if not job.files:
        return said
    others = "".join(f"\n  {path}  {sha256}" for path, sha256 in job.files.items())
    return (
        f"{said}, and these files, by path and SHA-256:{others}\nThere they lie under the same "
        f"paths, or under those that you put in {file}; other files are refused."
    )


@contextmanager
def _run(
    job: Job, params: Params, shards: Path, folder: Path, tags: dict[str, str]
) -> Iterator[tracking.Journal]:
    dataset = read_meta(shards)["dataset"]
    facts = {"job": job.name, "task": job.task, "model": job.model, "dataset": dataset}
    tags = {f"grimace.{key}": value for key, value in facts.items()} | tags
    title = f"{job.model} on {dataset}"
    with tracking.training_run(params.tracking, job.task, title, tags, folder) as journal:
        settings = {name: str(value) for name, value in plain(job).items() if name != "task"}
        journal.add(parameters=settings | {"dataset": dataset})
        yield journal


def _hand_over(journal: tracking.Journal, shards: Path, out: Path) -> None:
    """Write `out` and tell the run all that is known at the end."""
    import keras

    result = journal.folder / "result"
    job, model = read_job(result / "job.json"), result / "model.keras"
    draw_history(pd.read_csv(result / "history.csv"), result / "history.png", job.name)
    with whole_folder(out) as partial:
        copytree(result, partial, dirs_exist_ok=True)
    np.save(journal.folder / "example.npy", read_view(shards, "val").images[:2].astype("float32"))
    machine = json.loads((result / "machine.json").read_text())
    tags = {f"grimace.machine.{name}": value for name, value in machine.items()}
    journal.add(tags=tags | {tracking.MODEL_TAG: tracking.sha256(model)})
    size = keras.models.load_model(model, compile=False).count_params()
    journal.add(metrics={"parameters": size}, step=0)
    journal.add(files="result", place="training")
    journal.add(model="result/model.keras", example="example.npy")


def _clear(journal: tracking.Journal, out: Path) -> None:
    """Remove a training's folder; keep what of it MLflow has still to be told."""
    if not journal.pending:
        _remove(journal.folder)
        return
    UNDELIVERED.mkdir(parents=True, exist_ok=True)
    for path in journal.folder.iterdir():
        if path.name not in ("journal.json", "result", "example.npy"):
            rmtree(path) if path.is_dir() else path.unlink()
    journal.folder.rename(UNDELIVERED / str(journal.run_id))
    print(
        f"{out} is whole, but MLflow has not been told all of it. When it answers again, run "
        "`uv run python -m pipelines.train --deliver`; the next training does so too.",
        file=sys.stderr,
    )


def _remove(folder: Path) -> None:
    """Remove a folder at once: half of it would be gone on with after a kill.

    With it goes what earlier kills left, of this name or another.
    """
    gone = folder.with_name(f".{folder.name}.gone")
    for left in folder.parent.glob(".*.gone"):
        rmtree(left, ignore_errors=True)  # another process may be at it too
    folder.rename(gone)
    rmtree(gone)


def _check_taken(job: Job, came: Path) -> None:
    if missing := [file for file in RESULT if not (came / file).exists()]:
        raise GrimaceError(
            f"{came} lacks {', '.join(missing)}; it must be the folder that `python -m "
            "pipelines.fit --out` wrote, when it has ended"
        )
    theirs = read_job(came / "job.json")
    if theirs.weights_sha256 is not None and theirs.weights_sha256 == job.weights_sha256:
        theirs = replace(theirs, weights=job.weights)  # which may lie elsewhere there
    expected, found = plain(job), plain(theirs)
    other = [name for name in expected if getattr(job, name) != getattr(theirs, name)]
    if other == ["data_version"]:
        raise GrimaceError(
            f"{came} was trained on other shards ({found['data_version']}) than are here "
            f"({expected['data_version']}); train it on these, or bring those back"
        )
    if other:
        differences = ", ".join(f"{name} is {found[name]}, not {expected[name]}" for name in other)
        raise GrimaceError(f"{came} is not the job {job.name} of params.yaml: {differences}")


def _digest(job: Job) -> str:
    return hashlib.sha256(json.dumps(plain(job)).encode()).hexdigest()[:12]


def draw_history(history: pd.DataFrame, path: Path, title: str) -> None:
    """Plot training and validation curves of every quantity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [n for n in history.columns if f"val_{n}" in history.columns]
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 3.5), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        axis.plot(history["epoch"], history[name], label="train")
        axis.plot(history["epoch"], history[f"val_{name}"], label="validation")
        axis.set(xlabel="epoch", ylabel=name)
        axis.legend()
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
