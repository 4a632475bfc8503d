"""Stage `train`: run one job of `params.yaml` on its shards, watched by MLflow.

The fitting itself is `pipelines.fit`. Killed at any moment, the same command resumes after the
last whole epoch, in the same MLflow run.
"""

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING

import pandas as pd

from pipelines import tracking
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.params import Params, load_params
from pipelines.shards import read_meta, read_view

if TYPE_CHECKING:
    from pipelines.fit import Job


def main() -> None:
    """Train one job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True, help="a name under train.jobs, as emotion-plain")
    parser.add_argument("--shards", type=Path, help="default: data/augment/TASK")
    parser.add_argument("--out", type=Path, help="default: runs/TASK/MODEL")
    args = parser.parse_args()
    params = load_params()
    if args.job not in params.train.jobs:
        names = ", ".join(params.train.jobs)
        raise GrimaceError(f"train.jobs has no {args.job!r}; it has {names}")
    settings = params.train.jobs[args.job]
    shards = args.shards or Path("data/augment", settings.task)
    if not (shards / "meta.json").exists():
        raise GrimaceError(f"{shards} holds no shards; run `uv run dvc repro augment`")
    out = args.out or Path("runs", settings.task, settings.model)
    train(args.job, params, shards, out)


def train(name: str, params: Params, shards: Path, out: Path) -> None:
    """Fit the job, log it, and write `out` whole: model.keras, history.csv, job.json."""
    from pipelines.fit import fit

    job = resolve(name, params, shards)
    checkpoint = Path("checkpoints", f"{name}-{_digest(job)}")
    dataset = read_meta(shards)["dataset"]
    tags = {
        "grimace.job": name,
        "grimace.task": job.task,
        "grimace.model": job.model,
        "grimace.dataset": dataset,
        **tracking.provenance(shards),
    }
    with (
        tracking.training_run(
            params.tracking, job.task, f"{job.model} on {dataset}", tags, checkpoint / "mlflow_run"
        ),
        whole_folder(out) as partial,
    ):
        import mlflow

        mlflow.log_params({key: value for key, value in asdict(job).items() if key != "task"})
        mlflow.log_param("dataset", dataset)
        model = fit(
            job, shards, partial, checkpoint, lambda epoch, row: mlflow.log_metrics(row, step=epoch)
        )
        (partial / "job.json").write_text(json.dumps(asdict(job), indent=2) + "\n")
        draw_history(pd.read_csv(partial / "history.csv"), partial / "history.png", name)
        mlflow.log_artifacts(str(partial), "training")
        mlflow.set_tag(tracking.MODEL_TAG, tracking.sha256(partial / "model.keras"))
        mlflow.log_metrics({"parameters": model.count_params()})
        _log_model(model, shards)
    rmtree(checkpoint)


def resolve(name: str, params: Params, shards: Path) -> "Job":
    """Turn a job of params.yaml into one that stands alone."""
    from pipelines.fit import Job

    settings = params.train.jobs[name]
    dataset = read_meta(shards)["dataset"]
    values = settings.model_dump()
    values["epochs"] = settings.epochs.get(dataset, settings.epochs["default"])
    return Job(**values, data_version=tracking.data_version(shards))


def _digest(job: "Job") -> str:
    return hashlib.sha256(json.dumps(asdict(job)).encode()).hexdigest()[:12]


def _log_model(model: object, shards: Path) -> None:
    """Log the model with signature, example and the packages it needs to be loaded again."""
    import mlflow

    example = read_view(shards, "val").images[:2].astype("float32")
    answer = model.predict(example, verbose=0)  # type: ignore[attr-defined]
    requirements = [
        f"{name}=={tracking.version(name)}" for name in ("tensorflow", "keras", "numpy")
    ]
    mlflow.keras.log_model(
        model,
        name="model",
        signature=mlflow.models.infer_signature(example, answer),
        pip_requirements=requirements,
    )


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
