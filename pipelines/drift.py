"""Tell whether pictures without labels are still like those that a model was trained on.

Two kinds of test, as Rabanser et al. 2019 ("Failing Loudly", section 3) compare them:

- Statistics of the pictures themselves, each against the training side of the dataset by the
  two-sample test of Kolmogorov and Smirnov (SciPy).
- The features that the model's last layer is given: a classifier learns on one half of the pictures
  to tell incoming from known ones, and its scores of the other half are compared (a classifier
  two-sample test: Lopez-Paz and Oquab 2017, section 3). That half had no part in the learning, so
  the rank test of Mann and Whitney, whose statistic is the area under the ROC curve (AUC), holds
  whatever was learnt. The known ones are of the validation side: a network has its training
  pictures by heart, and even new ones of the same kind are not like these to it.

All p-values are corrected for their number (Holm 1979). Something has drifted if chance does not
explain it and it is large: with many pictures the slightest difference is certain. Pictures of one
film or person resemble each other, which no test here knows of; the bounds on size are for that
as well.

Faces are found by BlazeFace on either side, whatever labels there are, and the whole picture is
taken where it sees none; so both sides are cropped alike.

    python -m pipelines.drift --images DIR --dataset folder --task emotion --out reports/drift/mine

Writes drift.json and index.html. The bounds stand in params.yaml, under `watch.drift`.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from pipelines import registry
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.compare import holm
from pipelines.crops import UnreadableImageError, crop, decode, face_box
from pipelines.datasets import LABELS, folder
from pipelines.datasets.example import Example
from pipelines.datasets.table import read_examples
from pipelines.params import Drift, Params, Task, TaskName, load_params

STATISTICS = {
    "brightness": "mean, 0 to 1",
    "contrast": "standard deviation of the grey levels, 0 to 255",
    "sharpness": "CleanVision's blurriness value, low is blurred",
    "information": "entropy, bits",
    "colour": "mean difference of the channels, 0 to 255",
    "size": "geometric mean of the sides, pixels",
    "aspect": "width by height",
    "face": "probability of the surest face, 0 without any",
}
"""What is measured of a picture, and its unit."""

FEATURES = "features"
NEIGHBOURS = 5
SHOWN = 24
SHOWN_SIDE = 112  # pixels


def main() -> None:
    """Measure a folder of pictures against a dataset, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder with the pictures")
    parser.add_argument("--task", required=True, choices=("emotion", "landmarks"))
    parser.add_argument("--dataset", choices=LABELS, help="default: the task's")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--model",
        type=Path,
        help="a .keras file whose features are compared; default: the champion, else the candidate",
    )
    parser.add_argument("--no-pictures", action="store_true", help="leave them out of the page")
    args = parser.parse_args()
    params = load_params()
    dataset = args.dataset or params.tasks.named(args.task).dataset
    check(args.images, dataset)  # before the registry and the model are loaded, which takes long
    model, model_name = (args.model, str(args.model)) if args.model else model_of(args.task, params)
    found = measure_folder(args.images, dataset, args.task, model, params)
    result = {"dataset": dataset, "task": args.task, "model": model_name, **found.result}
    write(result, found, args.out, pictures=not args.no_pictures)
    print(f"{verdict(result)}; see {args.out / 'index.html'}")


@dataclass(frozen=True, eq=False)
class Sample:
    """Pictures of one side.

    Attributes:
        ids: of n pictures; of incoming ones a hash of their place in the folder.
        table: (n, len(STATISTICS)), finite.
        crops: uint8 (n, S, S, C), the model's input.
        shown: for each, the whole picture, uint8 (H, W, 3), at most 112 pixels wide or high.
        skipped: how many could not be read, by reason.
    """

    ids: list[str]
    table: pd.DataFrame
    crops: np.ndarray
    shown: list[np.ndarray]
    skipped: dict[str, int]


class Found(NamedTuple):
    """The result for drift.json, and what is drawn besides.

    Attributes:
        result: without dataset, task and model.
        known, unseen, incoming: pictures of train, of validation, and the new ones.
        scores: by side, what the classifier says of the half that it did not learn from: the
            probability of having come in. Empty where it was not asked.
        unusual: positions of incoming pictures, the most unusual first.
    """

    result: dict[str, Any]
    known: Sample
    unseen: Sample
    incoming: Sample
    scores: dict[str, np.ndarray]
    unusual: list[int]


def model_of(task: TaskName, params: Params) -> tuple[Path | None, str]:
    """Return the task's champion, else its candidate, else none; and what it is called."""
    store = registry.Registry(params.tracking, task)
    try:
        number = store.champion()
        if number is not None:
            return store.fetch(number) / registry.MODEL, f"{store.name} version {number}"
    except GrimaceError:  # a lost champion stops `promote`, not this
        pass
    candidate = Path("deploy/candidate", f"{task}.keras")
    return (candidate, str(candidate)) if candidate.exists() else (None, "")


def measure_folder(
    images: Path, dataset: str, task: TaskName, model: Path | None, params: Params
) -> Found:
    """Compare the pictures in a folder with a dataset that `filter` and `split` have seen.

    Args:
        images: the folder; pictures at any depth count, other files do not.
        dataset: its name.
        task: whose model it is, and whose crops are made.
        model: a .keras file; None: its features are not compared.
        params: the whole; `tasks` and `watch.drift` are used.

    Raises:
        GrimaceError: there is no such folder or dataset, or the model cannot be read.
    """
    settings = params.watch.drift
    check(images, dataset)
    network = _load(model) if model else None
    shape = params.tasks.named(task)
    if network is not None:
        _, size, _, channels = network.input_shape
        shape = shape.model_copy(update={"size": size, "channels": channels})
    known = examine(_side(dataset, "train", settings), shape, "known")
    unseen = examine(_side(dataset, "val", settings), shape, "unseen")
    incoming = examine(_files(images, settings), shape, "incoming")
    rows = compare_statistics(known.table, incoming.table, settings)
    features: tuple[np.ndarray, np.ndarray] | None = None
    scores: dict[str, np.ndarray] = {}
    if network is not None:
        old, new = (_embed(network, sample.crops) for sample in (unseen, incoming))
        row, scores = compare_features(old, new, settings)
        features = old, new
    else:
        row = _uncomputed(FEATURES, settings.auc, "there is no champion and no candidate yet")
    rows = corrected([*rows, row], settings.alpha)
    near = features or (known.table.to_numpy(), incoming.table.to_numpy())
    distances = unusualness(*near)
    unusual = np.argsort(-distances, kind="stable").tolist()
    result = {
        "known": len(known.ids),
        "unseen": len(unseen.ids),
        "incoming": len(incoming.ids),
        "skipped": incoming.skipped,
        "alpha": settings.alpha,
        "statistics": rows,
        "drifted": any(row["drifted"] for row in rows),
        "unusual": [
            {"id": incoming.ids[place], "distance": round(float(distances[place]), 4)}
            for place in unusual[:SHOWN]
        ],
    }
    return Found(result, known, unseen, incoming, scores, unusual)


def check(images: Path, dataset: str) -> None:
    """Refuse what cannot be compared.

    Raises:
        GrimaceError: there is no such folder, or the dataset has not been split yet.
    """
    if not images.is_dir():
        raise GrimaceError(f"{images} is not a folder; --images names the folder of new pictures")
    clean, index = Path("data/clean", dataset), Path("data/split", dataset, "index.parquet")
    if not clean.is_dir() or not index.exists():
        raise GrimaceError(
            f"{clean} or {index} is missing, so there is nothing to compare with; run "
            f"`dvc repro split@{dataset}`"
        )


def verdict(result: dict[str, Any]) -> str:
    """Say in one line what has drifted."""
    moved = [row["name"] for row in result["statistics"] if row["drifted"]]
    without = [row["why"] for row in result["statistics"] if row["why"]]
    about = f"{result['incoming']:,} pictures against {result['dataset']}, {result['task']}"
    if moved:
        return f"{about}: drift of {', '.join(moved)}"
    if len(without) == len(result["statistics"]):
        return f"{about}: not computed, {without[0]}"
    return f"{about}: no drift"


# The two sides


def _side(dataset: str, side: str, settings: Drift) -> list[tuple[str, bytes]]:
    """Draw pictures of one side of a dataset, of those that training heeds."""
    clean, index = Path("data/clean", dataset), Path("data/split", dataset, "index.parquet")
    sides = pd.read_parquet(index, columns=["id", "split"])
    there = set(sides.loc[sides["split"] == side, "id"])
    heeded = (row for row in read_examples(clean, images=False) if row.weight > 0)
    chosen = set(_some(sorted(row.id for row in heeded if row.id in there), settings))
    return [(row.id, row.image) for row in read_examples(clean) if row.id in chosen]


def _files(images: Path, settings: Drift) -> Iterator[tuple[str, bytes]]:
    """Draw pictures of a folder, hidden ones left out."""
    names = (path.relative_to(images).as_posix() for path in images.rglob("*") if path.is_file())
    shown = (name for name in names if not any(part[0] == "." for part in name.split("/")))
    chosen = _some(sorted(name for name in shown if folder.is_picture(name)), settings)
    return ((folder.id_of(name), (images / name).read_bytes()) for name in chosen)


def _some(names: Sequence[str], settings: Drift) -> list[str]:
    rng = np.random.default_rng(settings.seed)
    chosen = rng.permutation(len(names))[: settings.sample]
    return [names[place] for place in sorted(chosen)]


def examine(pictures: Iterable[tuple[str, bytes]], task: Task, what: str) -> Sample:
    """Measure pictures, and crop them for a model.

    Args:
        pictures: ids and encoded pictures.
        task: the shape of the crops and their margin.
        what: for the progress bar.
    """
    from pipelines.checks.image import measure_image
    from pipelines.detectors import find_faces

    ids, rows, crops, shown = [], [], [], []
    skipped: Counter[str] = Counter()
    for id, image in tqdm(pictures, what, unit=" pictures", leave=False):
        try:
            rgb = decode(image, 3)
        except UnreadableImageError as error:
            skipped[f"unreadable: {error}"] += 1
            continue
        measures = measure_image(rgb)
        faces = find_faces(rgb)
        height, width = rgb.shape[:2]
        spread = rgb.max(2).astype(int) - rgb.min(2)
        rows.append(
            (
                measures["brightness"],
                measures["std"],
                measures["blurriness"],
                measures["entropy"],
                float(spread.mean()),
                float(np.sqrt(height * width)),
                width / height,
                faces[0].score if faces else 0.0,
            )
        )
        box = face_box(
            Example("", b"", box=faces[0].box if faces else None), rgb.shape, task.margin
        )
        pixels = rgb if task.channels == 3 else cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)[..., None]
        crops.append(crop(pixels, box, task.size))
        scale = min(1.0, SHOWN_SIDE / max(height, width))
        small = max(1, round(width * scale)), max(1, round(height * scale))
        shown.append(cv2.resize(rgb, small, interpolation=cv2.INTER_AREA))
        ids.append(id)
    table = pd.DataFrame(rows, columns=list(STATISTICS), dtype=float)
    shape = (len(ids), task.size, task.size, task.channels)
    return Sample(ids, table, np.array(crops, np.uint8).reshape(shape), shown, dict(skipped))


# The model


def _load(path: Path) -> Any:
    import keras

    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # Keras raises whatever it meets
        said = " ".join(str(error).split())[:300]
        raise GrimaceError(f"{path} is no model that Keras can read: {said}") from None


def _embed(network: Any, crops: np.ndarray) -> np.ndarray:
    """Return what the last layer with weights is given, averaged over places: float32 (n, D)."""
    import keras

    last = [layer for layer in network.layers if layer.weights][-1]
    inner = keras.Model(network.inputs, last.input)
    starts = range(0, len(crops), 256)
    parts = [inner.predict_on_batch(crops[at : at + 256].astype(np.float32)) for at in starts]
    width = int(last.input.shape[-1])
    features = np.concatenate([np.zeros((0, width), np.float32), *map(_pooled, parts)])
    return np.asarray(features, np.float32)


def _pooled(features: np.ndarray) -> np.ndarray:
    return np.asarray(features, np.float32).reshape(len(features), -1, features.shape[-1]).mean(1)


# The tests


def compare_statistics(
    known: pd.DataFrame, incoming: pd.DataFrame, settings: Drift
) -> list[dict[str, Any]]:
    """Test each column of two tables.

    Args:
        known, incoming: of the same columns.
        settings: `minimum` and `distance` are used.

    Returns:
        A row a column: `name`, `value` (Kolmogorov's D), `p`, `threshold`, the medians `known` and
        `incoming`, and `why`: "", or why it could not be computed; then the figures are None.
    """
    from scipy.stats import ks_2samp

    few = _too_few(len(known), len(incoming), settings)
    if few:
        return [_uncomputed(name, settings.distance, few) for name in known.columns]
    rows = []
    for name in known.columns:
        test = ks_2samp(known[name], incoming[name])
        medians = {"known": float(known[name].median()), "incoming": float(incoming[name].median())}
        rows.append(_row(name, test.statistic, test.pvalue, settings.distance) | medians)
    return rows


def compare_features(
    known: np.ndarray, incoming: np.ndarray, settings: Drift
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Test whether a classifier can tell features of two sides apart.

    Args:
        known, incoming: float (n, D) and (m, D).
        settings: `minimum`, `auc` and `seed` are used.

    Returns:
        A row as `compare_statistics` gives, its `value` the AUC on the half that was not learnt
        from; and the scores of that half, by side.
    """
    from scipy.stats import mannwhitneyu
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    few = _too_few(len(known), len(incoming), settings)
    if few:
        return _uncomputed(FEATURES, settings.auc, few), {}
    features = np.concatenate([known, incoming]).astype(np.float64)
    side = np.repeat([0, 1], [len(known), len(incoming)])
    learn, test, side_learn, side_test = train_test_split(
        features, side, test_size=0.5, stratify=side, random_state=settings.seed
    )
    # Features are many and pictures few: strong regularisation.
    judge = LogisticRegression(C=0.1, max_iter=1000, class_weight="balanced")
    classifier = make_pipeline(StandardScaler(), judge).fit(learn, side_learn)
    scores = classifier.predict_proba(test)[:, 1]
    by_side = {"known": scores[side_test == 0], "incoming": scores[side_test == 1]}
    ranks = mannwhitneyu(by_side["incoming"], by_side["known"], alternative="greater")
    auc = ranks.statistic / (len(by_side["incoming"]) * len(by_side["known"]))
    return _row(FEATURES, auc, ranks.pvalue, settings.auc), by_side


def corrected(rows: Sequence[dict[str, Any]], alpha: float) -> list[dict[str, Any]]:
    """Add `p_holm`, the p-value corrected for the number of rows computed, and `drifted`."""
    computed = [row for row in rows if not row["why"]]
    adjusted = dict(
        zip(
            [row["name"] for row in computed],
            holm([row["p"] for row in computed]) if computed else [],
            strict=True,
        )
    )
    return [
        row
        | {
            "p_holm": adjusted.get(row["name"]),
            "drifted": not row["why"]
            and adjusted[row["name"]] < alpha
            and row["value"] >= row["threshold"],
        }
        for row in rows
    ]


def unusualness(known: np.ndarray, incoming: np.ndarray) -> np.ndarray:
    """Return how far each incoming picture lies from the known ones.

    The mean distance to the nearest five of them, in standard deviations of the known (distance to
    neighbours as by Sun et al. 2022, section 3).

    Args:
        known, incoming: float (n, D) and (m, D).

    Returns:
        float (m,); all 0 where there are no known ones.
    """
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import StandardScaler

    if not len(known) or not len(incoming):
        return np.zeros(len(incoming))
    scaler = StandardScaler().fit(known)
    near = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(known))).fit(scaler.transform(known))
    return near.kneighbors(scaler.transform(incoming))[0].mean(1)


def _too_few(known: int, incoming: int, settings: Drift) -> str:
    if min(known, incoming) >= settings.minimum:
        return ""
    return f"{known:,} known and {incoming:,} incoming pictures; it takes {settings.minimum:,}"


def _row(name: str, value: float, p: float, threshold: float) -> dict[str, Any]:
    figures = {"value": float(value), "p": float(p), "threshold": threshold}
    return {"name": name, **figures, "known": None, "incoming": None, "why": ""}


def _uncomputed(name: str, threshold: float, why: str) -> dict[str, Any]:
    figures = {"value": None, "p": None, "threshold": threshold}
    return {"name": name, **figures, "known": None, "incoming": None, "why": why}


def write(result: dict[str, Any], found: Found, out: Path, pictures: bool) -> None:
    """Write drift.json and index.html into a folder, whole or not at all."""
    from pipelines.pages.drift import write_drift

    shown = found.unusual[:SHOWN] if pictures else []
    unusual = [(found.incoming.ids[at], found.incoming.shown[at]) for at in shown]
    usual = list(zip(found.known.ids, found.known.shown, strict=True))[: SHOWN if pictures else 0]
    page = write_drift(
        result, found.known.table, found.incoming.table, STATISTICS, found.scores, unusual, usual
    )
    with whole_folder(out) as partial:
        (partial / "drift.json").write_text(json.dumps(result, indent=2) + "\n")
        (partial / "index.html").write_text(page)


if __name__ == "__main__":
    run(main)
