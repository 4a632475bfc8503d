r"""Stage `evaluate`: measure a model on labelled faces, with 95 % intervals.

Within the graph it takes one trained job and the validation side:

    python -m pipelines.evaluate --job emotion-compact

By itself it measures any model file on any dataset's archive (or part of one):

    python -m pipelines.evaluate --model deploy/emotion/tflite/int8.tflite \
        --dataset fer2013 --archive fer2013.zip --split test --json scores.json --plots plots/

or on the graph's own data, of which it takes validation unless told otherwise:

    python -m pipelines.evaluate --model A.keras B.keras --test-time flip --out ensemble/

A model may be a .keras, .tflite or .onnx file or a TF.js folder (run in headless Chromium where
there is one, else in Node; the output says which). Several are an ensemble: their probabilities or
coordinates are averaged. `--test-time` averages over the mirror image or ten crops as well; of a
job, which may be deployed, the figures of the single crop stay the first and what averaging gives
stands apart, under "averaged".
Sides follow the dataset's protocol: FER-2013's own, people apart for YTF; official train stays
train, even where `split` draws a side from it. Every readable labelled example counts, duplicates
too; rows that cannot be used are counted under "unusable" with their reasons, on every side where a
row has lost its own. Figures come over all faces and by slice: class, brightness, yaw, face size
and source.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from models.schemes import EMOTIONS, SCHEMES
from pipelines import tracking
from pipelines.averaging import PASSES, mean_answer, predict
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.datasets import DATASETS, GENERATED
from pipelines.heldout import Faces, faces_of_archive, faces_of_shards, faces_of_side, with_traits
from pipelines.measures import DECIDES, by_slice, headline, measure
from pipelines.params import Evaluate, Params, Task, TaskName, TestTime, load_params
from pipelines.plots import draw_slices, write_plots
from pipelines.runtimes import Runtime, load
from pipelines.split import SIDES


def main() -> None:
    """Measure a job of the graph, or any model or ensemble on any archive or the graph's data."""
    args = _arguments()
    params = load_params()
    how = args.test_time or params.evaluate.test_time
    if args.job:
        evaluate_job(args.job, params, how)
        return
    side = args.split if args.dataset else args.side
    with ExitStack() as opened:
        models = [opened.enter_context(load(path)) for path in args.model]
        task = task_of(models)
        settings = params.tasks.named(task)

        def read(shaped: Task) -> Faces:
            if args.dataset:
                archive = args.dataset, args.archive, side
                return faces_of_archive(*archive, task, shaped, params, how == "ten_crop")
            return with_traits(faces_of_side(task, shaped, side, five=how == "ten_crop"), shaped)

        faces, outputs = ask(models, settings, read, how)
    scores = measure(faces, outputs, params.evaluate) | by_slice(faces, outputs, params.evaluate)
    scores |= {
        "model": " + ".join(map(str, args.model)),
        "runtime": " + ".join(sorted({model.name for model in models})),
        "dataset": args.dataset or settings.dataset,
        "split": side,
        "test_time": how,
        "unusable": faces.unusable,
    }
    title = f"{' + '.join(path.name for path in args.model)}, {side}"
    if args.out:
        scores["cost"] = costs_of(args.model, PASSES[how])
        with whole_folder(args.out) as out:
            write_report(faces, outputs, scores, params.evaluate, out, title)
            save_predictions(out, faces, outputs, args.model, settings)
    if args.plots:
        # Not `whole_folder`: what else the user keeps in that folder stays.
        args.plots.mkdir(parents=True, exist_ok=True)
        write_plots(faces, outputs, params.evaluate, args.plots, title)
        draw_slices(scores, args.plots, title)
    text = json.dumps(scores, indent=2)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", help="a name under train.jobs; the graph's own call")
    parser.add_argument(
        "--model",
        type=Path,
        nargs="+",
        help=".keras, .tflite, .onnx, or a TF.js folder; several are averaged",
    )
    parser.add_argument("--dataset", choices=DATASETS, help="whose layout the archive has")
    parser.add_argument("--archive", type=Path, help="zip, folder or csv; none for synthetic")
    parser.add_argument("--split", choices=(*SIDES, "all"), default="test", help="of the archive")
    parser.add_argument(
        "--side", choices=("val", "test"), default="val", help="of the graph's data, with --out"
    )
    parser.add_argument(
        "--test-time",
        choices=tuple(PASSES),
        help="average over the mirror image or ten crops; default: evaluate.test_time in params",
    )
    parser.add_argument("--json", type=Path, help="write the scores here too")
    parser.add_argument(
        "--plots", type=Path, help="folder for confusion matrix or CED, slices, worst cases"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for scores, plots and each face's answer; is replaced"
    )
    args = parser.parse_args()
    if not args.job:
        if not args.model or not (args.dataset or args.out):
            parser.error(
                "give either --job, or --model with --dataset (and --archive), or --model with "
                "--out for the graph's own data"
            )
        if args.dataset and not args.archive and args.dataset != GENERATED:
            parser.error(f"--archive is needed for {args.dataset}")
        if args.archive and args.dataset == GENERATED:
            parser.error(f"{GENERATED} faces are drawn, not read: leave --archive out")
        if args.archive and not args.dataset:
            parser.error("--archive needs --dataset: whose layout it has")
    if args.out and args.out.exists() and not (args.out / "scores.json").exists():
        raise GrimaceError(
            f"{args.out} would be replaced, and it holds no scores of an earlier evaluation: name "
            "a folder of its own"
        )
    return args


def evaluate_job(name: str, params: Params, how: TestTime = "none") -> None:
    """Measure a trained job on validation; write its report and add it to its MLflow run."""
    import mlflow

    if name not in params.train.jobs:
        raise GrimaceError(f"train.jobs has no {name!r}; it has {', '.join(params.train.jobs)}")
    job = params.train.jobs[name]
    path = Path("runs", job.task, job.model, "model.keras")
    report = Path("reports/evaluate", job.task, job.model)
    task = params.tasks.named(job.task)
    faces = faces_of_shards(job.task, task)
    with load(path) as model:
        outputs = predict(model, faces.images, "none")
        scores = measure(faces, outputs, params.evaluate)
        scores |= {"split": "val", "test_time": "none", "cost": costs_of([path])}
        scores |= by_slice(faces, outputs, params.evaluate)
        if how != "none":
            ten = how == "ten_crop"  # which shows more of the pictures than shards hold
            seen = faces_of_side(job.task, task, "val", five=True) if ten else faces
            averaged = predict(model, seen.images, how, seen.five)
            scores["averaged"] = measure(seen, averaged, params.evaluate) | {"test_time": how}
    with whole_folder(report) as out:
        write_report(faces, outputs, scores, params.evaluate, out, f"{name}, validation")
        save_predictions(out, faces, outputs, [path], task)
    report.with_suffix(".json").write_text(json.dumps(_compact(scores), indent=2) + "\n")
    with tracking.run_of_model(params.tracking, job.task, path):
        mlflow.log_metrics(charted(scores))
        mlflow.log_artifacts(str(report), "validation")
    print(headline(scores))
    if how != "none":
        print(headline(scores["averaged"]))


def charted(scores: dict[str, Any]) -> dict[str, float]:
    """Return what MLflow's compare page and charts show of a model.

    Returns:
        `val/METRIC`; the bounds of the deciding one's interval and of the calibration error's,
        `val/METRIC.low` and `.high`; `val/averaged.METRIC` where answers were averaged too; and
        parameters, multiply_adds and size_mib.
    """
    figures = tracking.flat(_compact(scores), "val/")
    for name in (DECIDES[scores["task"]], "ece"):
        if name in scores["ci95"]:
            low, high = scores["ci95"][name]
            figures |= {f"val/{name}.low": low, f"val/{name}.high": high}
    figures |= tracking.flat(_compact(scores.get("averaged", {})), "val/averaged.")
    cost = dict(scores["cost"])
    return figures | {"size_mib": cost.pop("bytes") / 2**20} | tracking.flat(cost)


def _compact(scores: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in scores.items() if isinstance(value, int | float)}


def costs_of(paths: Sequence[Path], passes: int = 1) -> dict[str, int]:
    """Return what answering about one face takes.

    Args:
        paths: a model, or the members of an ensemble.
        passes: how often each looks, mirrored or shifted.

    Returns:
        bytes of the files; and where all are Keras models, parameters, and multiply_adds of all
        passes where `models.cost` can count them.
    """
    cost = {"bytes": sum(file.stat().st_size for file in _files_of(paths))}
    if any(path.suffix != ".keras" for path in paths):
        return cost
    import keras

    from models.cost import multiply_adds

    models = [keras.saving.load_model(path, compile=False) for path in paths]
    cost["parameters"] = sum(model.count_params() for model in models)
    with suppress(ValueError):  # a layer of another's that it does not know
        cost["multiply_adds"] = passes * sum(multiply_adds(model) for model in models)
    return cost


def ask(
    models: Sequence[Runtime], task: Task, read: Callable[[Task], Faces], how: TestTime
) -> tuple[Faces, np.ndarray]:
    """Average the answers of all models, each to crops of the size and channels it takes.

    Args:
        models: one, or an ensemble of one task.
        task: its dataset and margin.
        read: gives the faces, the same for every shape.
        how: what each model's own answers are averaged over.

    Returns:
        The faces as the first model takes them, and the answers.
    """
    shapes = list(dict.fromkeys(model.input_shape for model in models))
    answers: dict[int, np.ndarray] = {}
    first = None
    for size, height, channels in shapes:
        faces = read(task.model_copy(update={"size": size, "channels": channels}))
        first = first or faces
        for number, model in enumerate(models):
            if model.input_shape == (size, height, channels):
                answers[number] = predict(model, faces.images, how, faces.five)
    assert first is not None
    return first, mean_answer([answers[number] for number in range(len(models))])


def write_report(
    faces: Faces,
    outputs: np.ndarray,
    scores: dict[str, Any],
    settings: Evaluate,
    out: Path,
    title: str,
) -> None:
    """Write scores.json and all plots."""
    write_plots(faces, outputs, settings, out, title)
    draw_slices(scores, out, title)
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")


def save_predictions(
    out: Path, faces: Faces, outputs: np.ndarray, models: Sequence[Path], task: Task
) -> None:
    """Write predictions.npz: answers, and what tells whether they would be the same today.

    That is `ids`; `outputs` in their order; `files`, those of the models, and `models`, the
    SHA-256 of each; and `crop`, as `crop_of` gives it.
    """
    files = _files_of(models)
    np.savez_compressed(
        out / "predictions.npz",
        ids=faces.ids,
        outputs=outputs,
        files=[str(file) for file in files],
        models=[tracking.sha256(file) for file in files],
        crop=crop_of(task),
    )


def crop_of(task: Task) -> list[float]:
    """Return what determines a task's crops: size, channels and margin."""
    return [task.size, task.channels, task.margin]


def _files_of(models: Sequence[Path]) -> list[Path]:
    return [
        file
        for path in models
        for file in ([path] if path.is_file() else sorted(path.rglob("*")))
        if file.is_file()
    ]


def task_of(models: Sequence[Runtime]) -> TaskName:
    """Tell models' task from the shape of their outputs.

    Raises:
        GrimaceError: neither seven probabilities nor the points of a known scheme; or not all
            models have the same task.
    """
    tasks = sorted({_task_of(model) for model in models})
    if len(tasks) > 1:
        raise GrimaceError(f"models for {' and '.join(tasks)} cannot be averaged with each other")
    return tasks[0]


def _task_of(model: Runtime) -> TaskName:
    if model.output_shape == (len(EMOTIONS),):
        return "emotion"
    if int(np.prod(model.output_shape)) in [2 * size for size in SCHEMES]:
        return "landmarks"
    points = " or ".join(f"({scheme.size}, 2)" for scheme in SCHEMES.values())
    raise GrimaceError(
        f"the model's output has shape {model.output_shape}; expected (7,) probabilities for "
        f"emotion, or {points} points for landmarks"
    )


if __name__ == "__main__":
    run(main)
