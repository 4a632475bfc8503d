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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models.metrics import (
    absolute_errors,
    box_errors,
    calibration,
    ced_curve,
    confusion,
    emotion_metrics,
    interocular_errors,
    landmark_metrics,
)
from models.schemes import EMOTIONS, SCHEMES
from pipelines import tracking
from pipelines.averaging import PASSES, five_crops, mean_answer, predict
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.crops import UnreadableImageError, decode, face_box
from pipelines.datasets import DATASETS, GENERATED, examples, module_of
from pipelines.datasets.archive import open_archive
from pipelines.datasets.example import Example
from pipelines.datasets.table import read_examples
from pipelines.params import Evaluate, Params, Task, TaskName, TestTime, load_params
from pipelines.runtimes import Runtime, load
from pipelines.shards import read_view
from pipelines.sheets import contact_sheet
from pipelines.slices import (
    COLUMNS,
    FEWEST,
    YAW_BINS,
    bins_of,
    figures_by_slice,
    plot_slices,
    traits_of,
)
from pipelines.split import SIDES, choices_of, side_of
from pipelines.views import plain_view

CHUNK = 100  # resamples held in memory at once
DECIDES = {"emotion": "accuracy", "landmarks": "nme_interocular"}


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
            save_predictions(out, faces, outputs, args.model)
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


@dataclass(frozen=True, eq=False)
class Faces:
    """Labelled crops as a model takes them.

    Attributes:
        ids: (n,) unicode.
        groups: (n,) unicode; the person where known, else the cluster of copies, else the id.
            Intervals resample groups, since frames of one person are no independent evidence.
        images: uint8 (n, S, S, C).
        emotions: int64 (n,), or None for landmarks.
        landmarks: float32 (n, N, 2) in crop coordinates; None for emotion.
        visible: bool (n, N); None for emotion.
        unusable: how many rows were left out, by reason.
        traits: one row a face, the columns of `pipelines.slices`; None where not asked for.
        five: corner and centre crops and where they lie, as `averaging.five_crops` gives them:
            uint8 (n, 5, S, S, C), float32 (n, 5, 3); None where not asked for.
    """

    ids: np.ndarray
    groups: np.ndarray
    images: np.ndarray
    emotions: np.ndarray | None
    landmarks: np.ndarray | None
    visible: np.ndarray | None
    unusable: dict[str, int]
    traits: pd.DataFrame | None = None
    five: tuple[np.ndarray, np.ndarray] | None = None


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
        save_predictions(out, faces, outputs, [path])
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
        `val.METRIC`; the bounds of the deciding one's interval and of the calibration error's,
        `val.METRIC.low` and `.high`; `val.averaged.METRIC` where answers were averaged too; and
        parameters, multiply_adds and size_mib.
    """
    figures = tracking.flat(_compact(scores), "val.")
    for name in (DECIDES[scores["task"]], "ece"):
        if name in scores["ci95"]:
            low, high = scores["ci95"][name]
            figures |= {f"val.{name}.low": low, f"val.{name}.high": high}
    figures |= tracking.flat(_compact(scores.get("averaged", {})), "val.averaged.")
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
    files = [
        file
        for path in paths
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.is_file()
    ]
    cost = {"bytes": sum(file.stat().st_size for file in files)}
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


def save_predictions(out: Path, faces: Faces, outputs: np.ndarray, models: Sequence[Path]) -> None:
    """Write predictions.npz: `ids`, `outputs` in their order, and the SHA-256 of each `models`."""
    digests = [tracking.sha256(path) for path in models if path.is_file()]
    np.savez_compressed(out / "predictions.npz", ids=faces.ids, outputs=outputs, models=digests)


def faces_of_shards(name: TaskName, task: Task) -> Faces:
    """Load the validation side as `augment` cropped it."""
    view = read_view(Path("data/augment", name), "val")
    index = pd.read_parquet(Path("data/split", task.dataset, "index.parquet")).set_index("id")
    rows = index.loc[view.ids]
    return Faces(
        view.ids,
        rows["group"].to_numpy(str),
        view.images,
        view.emotions,
        view.landmarks,
        view.visible,
        unusable={},
        traits=rows[COLUMNS],
    )


def with_traits(faces: Faces, task: Task) -> Faces:
    """Add what the split's index knows of each face."""
    index = pd.read_parquet(Path("data/split", task.dataset, "index.parquet")).set_index("id")
    return replace(faces, traits=index.loc[faces.ids, COLUMNS])


def faces_of_side(
    name: TaskName,
    task: Task,
    side: str,
    limit: int | None = None,
    five: bool = False,
    balanced: bool = False,
) -> Faces:
    """Load one side of the task's clean dataset, cropped as in deployment.

    Of the train side, what training heeds: examples of weight 0 are left out. With `limit`, only
    so many, evenly spaced over the side; with `balanced` too, as many of each emotion as there
    can be. With `five`, corner crops too.
    """
    clean = Path("data/clean", task.dataset)
    index = pd.read_parquet(Path("data/split", task.dataset, "index.parquet"))
    there = set(index.loc[index["split"] == side, "id"])
    found = [
        row
        for row in read_examples(clean, images=False)
        if row.id in there and (side != "train" or row.weight > 0)
    ]
    if limit is not None and limit < len(found):
        found = _some(found, limit, balanced)
    wanted = {row.id for row in found}
    rows = (row for row in read_examples(clean) if row.id in wanted)
    return crop_all(rows, name, task, five=five)


def _some(rows: list[Example], limit: int, balanced: bool) -> list[Example]:
    """Pick `limit` rows; where `balanced`, what a small class lacks the larger ones make up for."""

    def spaced(among: list[Example], count: int) -> list[Example]:
        places = np.linspace(0, len(among) - 1, min(count, len(among))).astype(int)
        return [among[place] for place in places]

    if not balanced:
        return spaced(rows, limit)
    classes: dict[int, list[Example]] = {}
    for row in rows:
        classes.setdefault(row.emotion, []).append(row)
    picked: list[Example] = []
    for done, members in enumerate(sorted(classes.values(), key=len)):
        picked += spaced(members, (limit - len(picked)) // (len(classes) - done))
    return picked


def faces_of_archive(
    dataset: str,
    archive: Path | None,
    split: str,
    name: TaskName,
    task: Task,
    params: Params,
    five: bool = False,
) -> Faces:
    """Read an archive's side, cropped as `task` says, with traits, and with `five` corner crops.

    Raises:
        GrimaceError: the side is empty; says what there is.
    """
    if archive is None:
        source = params.download.synthetic
        rows = module_of(GENERATED).examples(source.count, source.seed)
    else:
        rows = examples(dataset, open_archive(archive))
    found: Counter[str] = Counter()

    def of_side() -> Iterator[Example]:
        for row in rows:
            lost = row.defect and not (row.official_split or row.person)
            # As if the source had all three: where a part of it is missing, what it calls train
            # must not be taken for a test of a model that was trained on it.
            among = choices_of(row.official_split, SIDES, dataset)
            side = side_of(row.person or row.id, params.split, among)
            found["unknown" if lost else side] += 1
            if lost or split in (side, "all"):
                yield row

    faces = crop_all(of_side(), name, task, partial(traits_of, dataset=dataset), five)
    if not len(faces.ids):
        there = ", ".join(f"{side} {count}" for side, count in sorted(found.items())) or "nothing"
        raise GrimaceError(
            f"{archive or dataset} has no usable {split} example for task {name} (rows found: "
            f"{there}; unusable: {faces.unusable or 'none'}); try --split all"
        )
    return faces


def crop_all(
    rows: Iterable[Example],
    name: TaskName,
    task: Task,
    traits: Callable[[Example], dict[str, Any]] | None = None,
    five: bool = False,
) -> Faces:
    """Decode and crop examples; what cannot be used is counted by reason.

    `traits`, where given, is asked for each face that is used; with `five`, each is cropped at the
    corners too.
    """
    unusable: Counter[str] = Counter()
    ids, groups, images, emotions, points, visible, found = [], [], [], [], [], [], []
    corners = []
    for row in rows:
        if row.defect or (row.emotion < 0 if name == "emotion" else not row.visible.any()):
            unusable[row.defect or f"no label for {name}"] += 1
            continue
        try:
            image = decode(row.image, task.channels)
        except UnreadableImageError as error:
            unusable[f"unreadable: {error}"] += 1
            continue
        crop, landmarks, mask = plain_view(row, image, task)
        ids.append(row.id)
        groups.append(row.person or row.cluster or row.id)
        images.append(crop)
        emotions.append(row.emotion)
        points.append(landmarks)
        visible.append(mask)
        if traits:
            found.append(traits(row))
        if five:
            box = face_box(row, image.shape, task.margin)
            corners.append(five_crops(image, box, task.size))
    is_emotion = name == "emotion"
    return Faces(
        ids=np.array(ids, str),
        groups=np.array(groups, str),
        images=np.array(images, np.uint8),
        emotions=np.array(emotions) if is_emotion else None,
        landmarks=None if is_emotion else np.array(points, np.float32),
        visible=None if is_emotion else np.array(visible, bool),
        unusable=dict(unusable),
        traits=pd.DataFrame(found, columns=COLUMNS) if traits else None,
        five=_stacked(corners) if five else None,
    )


def _stacked(corners: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    crops, places = zip(*corners, strict=True) if corners else ((), ())
    return np.array(crops, np.uint8), np.array(places, np.float32)


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


def measure(faces: Faces, outputs: np.ndarray, settings: Evaluate) -> dict[str, Any]:
    """Return the metrics of a task with their 95 % bootstrap intervals.

    Args:
        faces: what was asked.
        outputs: what was answered, (n, 7) probabilities or (n, N, 2) crop coordinates.
        settings: number of resamples, and their seed.

    Returns:
        Ready for JSON; fractions, not per cent. `ci95` holds [low, high] by metric.

    Raises:
        GrimaceError: an answer is not finite: left out or taken for a class it would flatter; or
            the points answered are not those of the faces' scheme.
    """
    finite = np.isfinite(outputs.reshape(len(outputs), -1)).all(1)
    if not finite.all():
        raise GrimaceError(
            f"the model answers with NaN or infinity on {(~finite).sum()} of {len(finite)} faces "
            f"(first: {faces.ids[~finite][0]}); train or export it again"
        )
    if faces.emotions is not None:
        return _measure_emotion(faces.emotions, faces.groups, outputs, settings)
    return _measure_landmarks(faces, outputs, settings)


def _measure_emotion(
    truth: np.ndarray, groups: np.ndarray, outputs: np.ndarray, settings: Evaluate
) -> dict[str, Any]:
    names = ("accuracy", "macro_f1", "balanced_accuracy", "ece", "brier", "nll")
    by_class = ("precision", "recall", "f1")
    answers = outputs.argmax(-1)

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        counts = confusion(truth, answers, weights, len(EMOTIONS))
        return emotion_metrics(counts.astype(np.float64)) | calibration(truth, outputs, weights)

    figures = statistic(np.ones(len(truth)))
    intervals = _intervals(statistic, (*names, *by_class), groups, settings)
    per_class = {}
    for index, emotion in enumerate(EMOTIONS):
        mine = truth == index
        enough = len(np.unique(groups[mine])) >= FEWEST
        per_class[emotion] = {
            **{name: float(figures[name][index]) for name in by_class},
            "n": int(mine.sum()),
            "ci95": {name: intervals[name][index] for name in by_class} if enough else None,
        }
    return {
        "task": "emotion",
        "n": len(truth),
        **{name: float(figures[name]) for name in names},
        "per_class": per_class,
        "reliability": reliability(truth, outputs).to_dict("list"),
        "ci95": {name: intervals[name] for name in names},
    }


def reliability(truth: np.ndarray, outputs: np.ndarray) -> pd.DataFrame:
    """Return the bins of `models.metrics.calibration` that hold a face, least confident first.

    Returns:
        Columns share (of the faces), confidence and accuracy.
    """
    found = calibration(truth, outputs, np.ones(len(truth)))
    columns = ("share", "confidence", "accuracy")
    table = pd.DataFrame({name: found[f"bin_{name}"] for name in columns})
    return table[table["share"] > 0].reset_index(drop=True)


def _measure_landmarks(faces: Faces, outputs: np.ndarray, settings: Evaluate) -> dict[str, Any]:
    assert faces.landmarks is not None
    assert faces.visible is not None
    own = landmark_errors(faces, outputs)
    predicted = outputs.reshape(faces.landmarks.shape)
    each = np.stack([*own, absolute_errors(faces.landmarks, predicted, faces.visible)])
    valid = np.isfinite(each).all(0)
    errors, inner, boxed, absolute = each[:, valid]
    if not valid.any():
        raise GrimaceError("no example shows both eyes: the inter-ocular error is not defined")

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        return landmark_metrics(errors, inner, boxed, absolute, weights)

    figures = statistic(np.ones(len(errors)))
    return {
        "task": "landmarks",
        "scheme": SCHEMES[faces.landmarks.shape[1]].name,
        "n": len(errors),
        **{name: float(value) for name, value in figures.items()},
        "without_eyes": int((~valid).sum()),
        "ci95": _intervals(statistic, tuple(figures), faces.groups[valid], settings),
    }


def landmark_errors(faces: Faces, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each example's inter-ocular NME over all and over inner points, and its box NME.

    Raises:
        GrimaceError: the answers have another number of points than the faces.
    """
    truth, visible = faces.landmarks, faces.visible
    assert truth is not None and visible is not None
    if outputs[0].size != truth[0].size:
        raise GrimaceError(
            f"the model answers {outputs[0].size // 2} points, the faces have {truth.shape[1]}: "
            "they follow different schemes"
        )
    predicted, scheme = outputs.reshape(truth.shape), SCHEMES[truth.shape[1]]
    return (
        interocular_errors(truth, predicted, visible, scheme, inner=False),
        interocular_errors(truth, predicted, visible, scheme, inner=True),
        box_errors(truth, predicted, visible),
    )


def by_slice(faces: Faces, outputs: np.ndarray, settings: Evaluate) -> dict[str, Any]:
    """Return a task's first metric by slice, and for landmarks the box NME beside it.

    Args:
        faces: with traits.
        outputs: as for `measure`.
        settings: number of resamples, and their seed.

    Returns:
        Ready for JSON: `slices` as `figures_by_slice` gives it; and `nme_box_yaw_mean`, the mean
        of the three yaw bins (AFLW2000-3D's headline), where all three have faces.
    """
    assert faces.traits is not None
    if faces.emotions is not None:
        right = outputs.argmax(-1) == faces.emotions
        figures = {"accuracy": right.astype(float)}
    else:
        errors, _, boxed = landmark_errors(faces, outputs)
        figures = {"nme_interocular": errors, "nme_box": boxed}
    slices = figures_by_slice(
        figures, bins_of(faces.traits), faces.groups, bootstrap_weights(faces.groups, settings)
    )
    found: dict[str, Any] = {"slices": slices}
    turned = [row["nme_box"] for row in slices.get("yaw", {}).values() if row.get("nme_box")]
    if len(turned) == len(YAW_BINS):
        found["nme_box_yaw_mean"] = float(np.mean(turned))
    return found


def bootstrap_weights(groups: np.ndarray, settings: Evaluate) -> Iterator[np.ndarray]:
    """Yield (r, n) counts of how often each example is drawn when whole groups are resampled.

    The cluster bootstrap (Davison and Hinkley 1997, section 3.8); with one example a group it is
    the ordinary one. Equal settings draw equal resamples, so figures of two models on the same
    examples can be compared pair by pair.
    """
    _, member = np.unique(groups, return_inverse=True)
    count = int(member.max()) + 1
    rng = np.random.default_rng(settings.seed)
    for start in range(0, settings.resamples, CHUNK):
        drawn = min(CHUNK, settings.resamples - start)
        yield rng.multinomial(count, np.full(count, 1 / count), drawn)[:, member]


def _intervals(
    statistic: Callable[[np.ndarray], dict[str, np.ndarray]],
    names: tuple[str, ...],
    groups: np.ndarray,
    settings: Evaluate,
) -> dict[str, list[Any]]:
    """Return [low, high] of each figure, a list of them where it is one by class."""
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for weights in bootstrap_weights(groups, settings):
        figures = statistic(weights)
        for name in names:
            drawn[name].append(figures[name])
    return {
        name: np.percentile(np.concatenate(values), [2.5, 97.5], axis=0).T.tolist()
        for name, values in drawn.items()
    }


def headline(scores: dict[str, Any]) -> str:
    """Return one line: the deciding metric with its interval, and how answers were averaged."""
    name = DECIDES[scores["task"]]
    low, high = scores["ci95"][name]
    how = scores.get("test_time", "none")
    averaged = "" if how == "none" else f"averaged by {how}: "
    return (
        f"{averaged}{name} {scores[name]:.2%} "
        f"(95 % interval {low:.2%} to {high:.2%}, n = {scores['n']})"
    )


def write_plots(
    faces: Faces, outputs: np.ndarray, settings: Evaluate, out: Path, title: str
) -> None:
    """Write plots (CSV and PNG) and a gallery of worst cases.

    For emotion confusion matrix and reliability curve, for landmarks the CED curve.
    """
    if faces.emotions is not None:
        _plot_confusion(faces.emotions, outputs.argmax(-1), out, title)
        _plot_reliability(faces.emotions, outputs, out, title)
        wrong = np.take_along_axis(outputs, faces.emotions[:, None], 1)[:, 0]
        worst = np.argsort(wrong, kind="stable")[: settings.gallery]
        captions = [
            f"{EMOTIONS[faces.emotions[row]]}, said {EMOTIONS[outputs[row].argmax()]}\n"
            f"{faces.ids[row][-20:]}"
            for row in worst
        ]
        images = [faces.images[row] for row in worst]
        contact_sheet(images, captions, out / "worst.png", f"{title}: least probable labels")
        return
    assert faces.landmarks is not None and faces.visible is not None
    errors, *_ = landmark_errors(faces, outputs)
    _plot_ced(errors[np.isfinite(errors)], out, title)
    worst = np.argsort(-np.nan_to_num(errors), kind="stable")[: settings.gallery]
    predicted = outputs.reshape(faces.landmarks.shape)
    contact_sheet(
        [faces.images[row] for row in worst],
        [f"NME {errors[row]:.1%}\n{faces.ids[row][-20:]}" for row in worst],
        out / "worst.png",
        f"{title}: largest errors (true green, predicted red)",
        points=[faces.landmarks[row][faces.visible[row]] for row in worst],
        more_points=[predicted[row] for row in worst],
    )


def draw_slices(scores: dict[str, Any], out: Path, title: str) -> None:
    """Write slices.png: the task's first metric in every slice."""
    name = DECIDES[scores["task"]]
    plot_slices(scores["slices"], name, scores[name], out / "slices.png", title)


def _plot_confusion(truth: np.ndarray, answers: np.ndarray, out: Path, title: str) -> None:
    import matplotlib.pyplot as plt
    from sklearn.metrics import ConfusionMatrixDisplay

    names = np.array(EMOTIONS)
    pd.DataFrame({"actual": names[truth], "predicted": names[answers]}).to_csv(
        out / "confusion.csv", index=False
    )
    figure, axis = plt.subplots(figsize=(6, 5))
    ConfusionMatrixDisplay.from_predictions(
        names[truth],
        names[answers],
        labels=EMOTIONS,
        normalize="true",
        values_format=".2f",
        cmap="Blues",
        ax=axis,
        xticks_rotation=45,
    )
    axis.set_title(title)
    figure.tight_layout()
    figure.savefig(out / "confusion.png", dpi=80)
    plt.close(figure)


def _plot_reliability(truth: np.ndarray, outputs: np.ndarray, out: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    table = reliability(truth, outputs)
    table.round(5).to_csv(out / "calibration.csv", index=False)
    gap = float((table["share"] * (table["confidence"] - table["accuracy"]).abs()).sum())
    figure, (curve, counts) = plt.subplots(
        2, figsize=(5, 5), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    curve.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    curve.plot(table["confidence"], table["accuracy"], "o-")
    curve.set(ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.03))
    curve.set_title(f"{title}: reliability, ECE {gap:.1%}", parse_math=False)
    counts.bar(table["confidence"], table["share"], width=0.04)
    counts.set(xlabel="confidence", ylabel="share of faces")
    for axis in (curve, counts):
        axis.grid(alpha=0.3)
    figure.savefig(out / "calibration.png", dpi=80)
    plt.close(figure)


def _plot_ced(errors: np.ndarray, out: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    bounds, share = ced_curve(errors, np.ones(len(errors)))
    pd.DataFrame({"nme": bounds.round(4), "share": share.round(5)}).to_csv(
        out / "ced.csv", index=False
    )
    figure, axis = plt.subplots(figsize=(6, 4))
    axis.plot(bounds, share)
    axis.axvline(0.1, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="inter-ocular NME", ylabel="share of faces", ylim=(0, 1))
    axis.set_title(f"{title}: cumulative error distribution")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "ced.png", dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
