r"""Stage `evaluate`: measure a model on labelled faces, with 95 % intervals.

Within the graph it takes one trained job and the validation side:

    python -m pipelines.evaluate --job emotion-residual

By itself it measures any model file on any dataset's archive (or part of one):

    python -m pipelines.evaluate --model deploy/emotion/tflite/int8.tflite \
        --dataset fer2013 --archive fer2013.zip --split test --json scores.json --plots plots/

The model may be a .keras, .tflite or .onnx file or a TF.js folder (run in headless Chromium where
there is one, else in Node; the output says which). Sides follow the dataset's protocol: FER-2013's
own, people apart for YTF; official train stays train, even where `split` draws a side from it.
Every readable labelled example counts, duplicates too; rows that cannot be used are counted under
"unusable" with their reasons, on every side where a row has lost its own. Figures come over all
faces and by slice: class, brightness, yaw, face size and source.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models.metrics import (
    box_errors,
    confusion,
    emotion_metrics,
    interocular_errors,
    landmark_metrics,
)
from models.schemes import EMOTIONS, SCHEMES
from pipelines import tracking
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.crops import UnreadableImageError, decode
from pipelines.datasets import DATASETS, GENERATED, examples, module_of
from pipelines.datasets.archive import open_archive
from pipelines.datasets.example import Example
from pipelines.datasets.table import read_examples
from pipelines.params import Evaluate, Params, Task, TaskName, load_params
from pipelines.runtimes import Runtime, load
from pipelines.shards import read_view
from pipelines.sheets import contact_sheet
from pipelines.slices import (
    COLUMNS,
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
    """Measure a job of the graph, or any model on any archive."""
    args = _arguments()
    params = load_params()
    if args.job:
        evaluate_job(args.job, params)
        return
    with load(args.model) as model:
        task = task_of(model)
        faces = faces_of_archive(args.dataset, args.archive, args.split, model, task, params)
        outputs = model.predict(faces.images)
        scores = measure(faces, outputs, params.evaluate)
        scores |= by_slice(faces, outputs, params.evaluate)
        context = {"model": str(args.model), "runtime": model.name}
    scores |= context | {"dataset": args.dataset, "split": args.split, "unusable": faces.unusable}
    if args.plots:
        # Not `whole_folder`: what else the user keeps in that folder stays.
        args.plots.mkdir(parents=True, exist_ok=True)
        title = f"{args.model.name}, {args.split}"
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
    parser.add_argument("--model", type=Path, help=".keras, .tflite, .onnx, or a TF.js folder")
    parser.add_argument("--dataset", choices=DATASETS, help="whose layout the archive has")
    parser.add_argument("--archive", type=Path, help="zip, folder or csv; none for synthetic")
    parser.add_argument("--split", choices=(*SIDES, "all"), default="test")
    parser.add_argument("--json", type=Path, help="write the scores here too")
    parser.add_argument(
        "--plots", type=Path, help="folder for confusion matrix or CED, slices, worst cases"
    )
    args = parser.parse_args()
    if not args.job:
        if not (args.model and args.dataset):
            parser.error("give either --job, or --model and --dataset (and --archive)")
        if not args.archive and args.dataset != GENERATED:
            parser.error(f"--archive is needed for {args.dataset}")
        if args.archive and args.dataset == GENERATED:
            parser.error(f"{GENERATED} faces are drawn, not read: leave --archive out")
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
    """

    ids: np.ndarray
    groups: np.ndarray
    images: np.ndarray
    emotions: np.ndarray | None
    landmarks: np.ndarray | None
    visible: np.ndarray | None
    unusable: dict[str, int]
    traits: pd.DataFrame | None = None


def evaluate_job(name: str, params: Params) -> None:
    """Measure a trained job on validation; write its report and add it to its MLflow run."""
    import mlflow

    if name not in params.train.jobs:
        raise GrimaceError(f"train.jobs has no {name!r}; it has {', '.join(params.train.jobs)}")
    job = params.train.jobs[name]
    path = Path("runs", job.task, job.model, "model.keras")
    report = Path("reports/evaluate", job.task, job.model)
    faces = faces_of_shards(job.task, params.tasks.named(job.task))
    with load(path) as model:
        outputs = model.predict(faces.images)
    scores = measure(faces, outputs, params.evaluate) | {"split": "val"}
    scores |= by_slice(faces, outputs, params.evaluate)
    with whole_folder(report) as out:
        write_plots(faces, outputs, params.evaluate, out, f"{name}, validation")
        draw_slices(scores, out, f"{name}, validation")
        np.save(out / "outputs.npy", outputs)
        (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    compact = {name: value for name, value in scores.items() if isinstance(value, int | float)}
    report.with_suffix(".json").write_text(json.dumps(compact, indent=2) + "\n")
    with tracking.run_of_model(params.tracking, job.task, path):
        mlflow.log_metrics(tracking.flat(compact, "val."))
        mlflow.log_artifacts(str(report), "validation")
    print(headline(scores))


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


def faces_of_side(name: TaskName, task: Task, side: str, limit: int | None = None) -> Faces:
    """Load one side of the task's clean dataset, cropped as in deployment.

    Of the train side, what training heeds: examples of weight 0 are left out. With `limit`, only
    so many, evenly spaced over the side.
    """
    clean = Path("data/clean", task.dataset)
    index = pd.read_parquet(Path("data/split", task.dataset, "index.parquet"))
    there = set(index.loc[index["split"] == side, "id"])
    ids = [
        row.id
        for row in read_examples(clean, images=False)
        if row.id in there and (side != "train" or row.weight > 0)
    ]
    if limit is not None and limit < len(ids):
        ids = [ids[place] for place in np.linspace(0, len(ids) - 1, limit).astype(int)]
    wanted = set(ids)
    rows = (row for row in read_examples(clean) if row.id in wanted)
    return crop_all(rows, name, task)


def faces_of_archive(
    dataset: str, archive: Path | None, split: str, model: Runtime, task: TaskName, params: Params
) -> Faces:
    """Read an archive's side in the shape a model takes, with traits.

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

    size, _, channels = model.input_shape
    settings = params.tasks.named(task).model_copy(update={"size": size, "channels": channels})
    faces = crop_all(of_side(), task, settings, partial(traits_of, dataset=dataset))
    if not len(faces.ids):
        there = ", ".join(f"{side} {count}" for side, count in sorted(found.items())) or "nothing"
        raise GrimaceError(
            f"{archive or dataset} has no usable {split} example for task {task} (rows found: "
            f"{there}; unusable: {faces.unusable or 'none'}); try --split all"
        )
    return faces


def crop_all(
    rows: Iterable[Example],
    name: TaskName,
    task: Task,
    traits: Callable[[Example], dict[str, Any]] | None = None,
) -> Faces:
    """Decode and crop examples; what cannot be used is counted by reason.

    `traits`, where given, is asked for each face that is used.
    """
    unusable: Counter[str] = Counter()
    ids, groups, images, emotions, points, visible, found = [], [], [], [], [], [], []
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
    )


def task_of(model: Runtime) -> TaskName:
    """Tell a model's task from the shape of its output.

    Raises:
        GrimaceError: neither seven probabilities nor the points of a known scheme.
    """
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
    names = ("accuracy", "macro_f1", "balanced_accuracy")
    answers = outputs.argmax(-1)

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        counts = confusion(truth, answers, weights, len(EMOTIONS))
        return emotion_metrics(counts.astype(np.float64))

    figures = statistic(np.ones(len(truth)))
    counts = np.bincount(truth, minlength=len(EMOTIONS))
    per_class = {
        emotion: {
            **{name: float(figures[name][index]) for name in ("precision", "recall", "f1")},
            "n": int(counts[index]),
        }
        for index, emotion in enumerate(EMOTIONS)
    }
    return {
        "task": "emotion",
        "n": len(truth),
        **{name: float(figures[name]) for name in names},
        "per_class": per_class,
        "ci95": _intervals(statistic, names, groups, settings),
    }


def _measure_landmarks(faces: Faces, outputs: np.ndarray, settings: Evaluate) -> dict[str, Any]:
    assert faces.landmarks is not None
    each = np.stack(landmark_errors(faces, outputs))
    valid = np.isfinite(each).all(0)
    errors, inner, boxed = each[:, valid]
    if not valid.any():
        raise GrimaceError("no example shows both eyes: the inter-ocular error is not defined")

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        return landmark_metrics(errors, inner, boxed, weights)

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
) -> dict[str, list[float]]:
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for weights in bootstrap_weights(groups, settings):
        figures = statistic(weights)
        for name in names:
            drawn[name].append(figures[name])
    bounds = {name: np.percentile(np.concatenate(drawn[name]), [2.5, 97.5]) for name in names}
    return {name: [float(low), float(high)] for name, (low, high) in bounds.items()}


def headline(scores: dict[str, Any]) -> str:
    """Return one line: the deciding metric with its interval."""
    name = DECIDES[scores["task"]]
    low, high = scores["ci95"][name]
    return f"{name} {scores[name]:.2%} (95 % interval {low:.2%} to {high:.2%}, n = {scores['n']})"


def write_plots(
    faces: Faces, outputs: np.ndarray, settings: Evaluate, out: Path, title: str
) -> None:
    """Write the confusion matrix or the CED curve (CSV and PNG), and a gallery of worst cases."""
    if faces.emotions is not None:
        _plot_confusion(faces.emotions, outputs.argmax(-1), out, title)
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


def _plot_ced(errors: np.ndarray, out: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    bounds = np.linspace(0, 0.2, 101)
    share = (errors[:, None] <= bounds).mean(0)
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
