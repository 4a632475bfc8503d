"""Look at a dataset: `python -m pipelines.explore --dataset NAME` writes one page to read.

Samples and mean face of each class, class balance, picture sizes, brightness, head yaw, where the
landmarks lie and which are missing together, what each augmentation does, and the data card. Reads
`data/raw/NAME` where `download` has stored it, else the archive itself; draws `synthetic` here.
"""

import argparse
import hashlib
import heapq
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from markupsafe import Markup
from tqdm import tqdm

from models.schemes import SCHEMES
from pipelines import datasets, pages
from pipelines.checks.landmarks import measure_landmarks
from pipelines.cli import GrimaceError, run
from pipelines.crops import UnreadableImageError, crop, decode, face_box, to_crop
from pipelines.datasets.archive import Archive, open_archive
from pipelines.datasets.example import Example
from pipelines.datasets.kaggle_keypoints import POINTS as KAGGLE_POINTS
from pipelines.download import places
from pipelines.pages import Section, charts
from pipelines.params import Params, TaskName, load_params
from pipelines.split import class_of
from pipelines.views import Recipe, augmented_views, build_policy, plain_view, transform_view

RAW = Path("data/raw")
SAMPLES = 9  # shown of each class
FEW_CLASSES = 20  # more are counted, but not shown each
SIDE = 128  # of the faces shown, pixels
MARGIN = 0.15
EYES = np.array([[0.32, 0.38], [0.68, 0.38]])  # where mean faces have them, in crop coordinates
CELLS = 64  # of the heat map, each way
VIEWS = 4  # of the whole policy
GREEN = (96, 230, 120)


def main() -> None:
    """Read, measure, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, choices=sorted(datasets.LABELS))
    parser.add_argument("--archive", type=Path, help="read this rather than data/raw/NAME")
    parser.add_argument("--limit", type=int, help="look at so many pictures, spread over all")
    parser.add_argument("--out", type=Path, help="folder; default reports/explore/NAME")
    parser.add_argument("--no-pictures", action="store_true", help="a page that shows no face")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    params = load_params()
    total, examples = source(args.dataset, args.archive, params, args.limit)
    seen = look(tqdm(examples, desc=f"read {args.dataset}", total=total, unit="img"), args.limit)
    if seen.labels.empty:
        raise GrimaceError(f"{args.dataset} holds no examples: get it again with `download`")

    text = write_page(args.dataset, seen, params, _command(args), pictures=not args.no_pictures)
    out = (args.out or Path("reports/explore", args.dataset)) / "index.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)
    print(f"{out}: {len(seen.measures):,} of {len(seen.labels):,} pictures looked at")


def _command(args: argparse.Namespace) -> str:
    words = ["uv", "run", "python", "-m", "pipelines.explore", "--dataset", args.dataset]
    words += ["--archive", args.archive.name] if args.archive else []
    words += ["--limit", str(args.limit)] if args.limit else []
    return shlex.join(words + ["--no-pictures"] * args.no_pictures)


def source(
    name: str, archive: Path | None, params: Params, limit: int | None
) -> tuple[int | None, Iterator[Example]]:
    """Open a dataset where it is; return how many examples there are, if known, and those.

    Raises:
        GrimaceError: it is nowhere, or the archive cannot be read.
    """
    if archive is None and (RAW / name).is_dir():
        from pipelines.datasets import builder

        return builder.count(RAW / name), builder.read(RAW / name)
    if archive is None and name == datasets.GENERATED:
        from pipelines.datasets import synthetic

        settings = params.download.synthetic  # any beginning of the sequence is a fair sample
        count = min(limit or settings.count, settings.count)
        return count, synthetic.examples(count, settings.seed)
    return None, datasets.examples(name, open_archive(archive) if archive else _find(name, params))


def _find(name: str, params: Params) -> Archive:
    file = getattr(params.download, name).archive
    for place in places():
        if (place / file).exists():
            return open_archive(place / file)
    raise GrimaceError(
        f"{name} is neither in {RAW / name} nor, as {file}, in "
        f"{' or '.join(map(str, places()))}: run `uv run dvc repro download@{name}`, "
        "or name its archive with --archive"
    )


def spread(examples: Iterable[Example], limit: int) -> list[Example]:
    """Choose `limit` examples from all over a stream, of every class if there is room.

    The choice depends on the ids and classes only, not on the order. First come up to nine of
    each class, then whatever has the smallest hash. Memory grows with `limit`.
    """
    anywhere: list[tuple[int, str, Example]] = []
    by_class: dict[str, list[tuple[int, str, Example]]] = defaultdict(list)
    for example in examples:
        _keep_smallest(anywhere, example, limit)
        _keep_smallest(by_class[class_of(example)], example, min(limit, SAMPLES))
    in_turns = [
        (place, *item)
        for items in by_class.values()
        for place, item in enumerate(sorted(items, reverse=True))
    ]
    ranked = [item[3] for item in sorted(in_turns, key=lambda item: item[:3])]
    ranked += [example for *_, example in sorted(anywhere, reverse=True)]
    chosen = {example.id: example for example in ranked}
    return list(chosen.values())[:limit]


def _keep_smallest(heap: list[tuple[int, str, Example]], example: Example, size: int) -> None:
    """Keep in a heap the `size` examples whose ids hash to the smallest numbers."""
    rank = int.from_bytes(hashlib.sha256(example.id.encode()).digest()[:8], "big")
    if len(heap) < size:
        heapq.heappush(heap, (-rank, example.id, example))
    elif -rank > heap[0][0]:
        heapq.heapreplace(heap, (-rank, example.id, example))


@dataclass
class Mean:
    """A running mean and variance of arrays, in which some numbers may be missing."""

    count: Any = 0
    total: Any = 0.0
    squares: Any = 0.0

    def add(self, values: np.ndarray, known: np.ndarray | bool = True) -> None:
        """Take in one array; only where `known`."""
        values = np.where(known, values, 0.0)
        self.count = self.count + np.where(known, 1, np.zeros(np.shape(values), int))
        self.total = self.total + values
        self.squares = self.squares + values**2

    @property
    def mean(self) -> np.ndarray:
        """Mean where anything was known, else NaN."""
        return np.where(self.count > 0, self.total / np.maximum(self.count, 1), np.nan)

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation."""
        squares = self.squares / np.maximum(self.count, 1)
        return np.sqrt(np.maximum(squares - np.nan_to_num(self.mean) ** 2, 0))


@dataclass
class Seen:
    """What one pass over a dataset leaves: a few words and numbers of each example, no pictures.

    Attributes:
        labels: a row each example: class, official_split, person, defect, visible ("1" or "0" a
            landmark).
        measures: a row each picture looked at: class, width, height, brightness, contrast, yaw.
        unreadable: pictures that do not decode.
        faces: mean face of each class, float (128, 128), 0-255.
        shape: of the landmarks, turned and scaled so that the eyes lie at `EYES`.
        heat: (64, 64), landmarks by where they lie in the picture.
        samples: the nine of each class with the smallest hashes.
    """

    labels: pd.DataFrame = field(default_factory=pd.DataFrame)
    measures: pd.DataFrame = field(default_factory=pd.DataFrame)
    unreadable: int = 0
    faces: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))
    shape: Mean = field(default_factory=Mean)
    heat: np.ndarray = field(default_factory=lambda: np.zeros((CELLS, CELLS)))
    samples: dict[str, list[Example]] = field(default_factory=dict)


def look(examples: Iterable[Example], limit: int | None = None) -> Seen:
    """Note every example's labels, and measure the pictures of all or of `limit` of them."""
    seen = Seen()
    labels: list[dict[str, Any]] = []
    measures: list[dict[str, Any]] = []
    samples: dict[str, list[tuple[int, str, Example]]] = defaultdict(list)
    noted = _noted(examples, labels)
    chosen = noted if limit is None else tqdm(spread(noted, limit), desc="look", unit="img")
    for example in chosen:
        try:
            image = decode(example.image, 3)
        except UnreadableImageError:
            seen.unreadable += 1
            continue
        _keep_smallest(samples[class_of(example)], example, SAMPLES)
        measures.append(_measure(example, image))
        _accumulate(seen, example, image)
    seen.labels, seen.measures = pd.DataFrame(labels), pd.DataFrame(measures)
    seen.samples = {
        name: [example for *_, example in sorted(items, reverse=True)]
        for name, items in sorted(samples.items())
    }
    return seen


def _noted(examples: Iterable[Example], labels: list[dict[str, Any]]) -> Iterator[Example]:
    """Pass examples on, and write their labels down."""
    for example in examples:
        labels.append(
            {
                "class": class_of(example),
                "official_split": example.official_split,
                "person": example.person,
                "defect": example.defect,
                "visible": "".join("01"[int(seen)] for seen in example.visible),
            }
        )
        yield example


def _measure(example: Example, image: np.ndarray) -> dict[str, Any]:
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return {
        "class": class_of(example),
        "width": image.shape[1],
        "height": image.shape[0],
        "brightness": float(grey.mean()),
        "contrast": float(grey.std()),
        "yaw": measure_landmarks(example, image.shape)["yaw"],
    }


def _accumulate(seen: Seen, example: Example, image: np.ndarray) -> None:
    """Add one picture to the means and to the heat map."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    to_eyes = _eye_alignment(example)
    if to_eyes is not None:
        face = _aligned(grey, to_eyes)
        aligned = example.landmarks @ to_eyes[:, :2].T + to_eyes[:, 2]
        seen.shape.add(aligned, example.visible[:, None])
    elif example.visible.any():
        face = None  # two scales in one mean would blur it
    else:
        face = crop(grey, face_box(example, grey.shape, MARGIN), SIDE)[..., 0]
    if face is not None:
        seen.faces[class_of(example)].add(face.astype(float))
    if example.visible.any():
        x, y = (example.landmarks[example.visible] + 0.5).T
        cells = np.histogram2d(
            y / image.shape[0], x / image.shape[1], CELLS, range=((0, 1), (0, 1))
        )
        seen.heat += cells[0]


def _aligned(grey: np.ndarray, to_eyes: np.ndarray) -> np.ndarray:
    """Turn and scale a grey picture by a similarity from its pixels to crop coordinates.

    Shrinking averages areas, as `crop` does. Returns uint8 (128, 128).
    """
    matrix = SIDE * to_eyes
    matrix[:, 2] -= 0.5  # crop coordinates begin at the outer corner, pixels at a centre
    scale = float(np.hypot(*matrix[:, 0]))
    if scale < 1:
        height, width = grey.shape[:2]
        smaller = max(1, round(width * scale)), max(1, round(height * scale))
        grey = cv2.resize(grey, smaller, interpolation=cv2.INTER_AREA)
        # From pixels of the smaller picture to those of the picture, and from there as before.
        ratio = np.array([width / smaller[0], height / smaller[1]])
        matrix[:, 2] += matrix[:, :2] @ (0.5 * ratio - 0.5)
        matrix[:, :2] *= ratio
    return cv2.warpAffine(grey, matrix, (SIDE, SIDE), borderMode=cv2.BORDER_REPLICATE)


def _eye_alignment(example: Example) -> np.ndarray | None:
    """Return the (2, 3) similarity that brings the eyes to `EYES`, None where they are unknown."""
    scheme = SCHEMES.get(len(example.landmarks))
    if scheme is None or not example.visible[list(scheme.eyes)].all():
        return None
    eyes = example.landmarks[list(scheme.eyes)].astype(float)
    eyes = eyes[np.argsort(eyes[:, 0])]  # "left" is the person's in one scheme, ours in the other
    across = complex(*(eyes[1] - eyes[0]))
    if abs(across) < 2:
        return None
    turn = complex(*(EYES[1] - EYES[0])) / across
    matrix = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
    return np.column_stack([matrix, EYES.mean(0) - matrix @ eyes.mean(0)])


def write_page(dataset: str, seen: Seen, params: Params, command: str, pictures: bool) -> str:
    """Put the page together.

    Args:
        dataset: its name.
        seen: what `look` found.
        params: for the augmentation of the tasks that the dataset serves.
        command: what made the page.
        pictures: whether any face is shown, mean faces included.
    """
    labels, measures = seen.labels, seen.measures
    people = labels["person"].replace("", np.nan).nunique()
    points = labels["visible"].str.len().max()
    facts = {
        "examples": f"{len(labels):,}",
        "pictures looked at": f"{len(measures):,}",
        "classes": f"{labels['class'].nunique():,}",
        "people": f"{people:,}" if people else "unknown",
        "landmarks": f"{points}" if points else "none",
        "defects": f"{(labels['defect'] != '').sum():,}",
        "unreadable": f"{seen.unreadable:,}",
    }
    lead = [pages.facts(facts), pages.command(command)]
    if len(measures) + seen.unreadable < len(labels):
        lead.append(
            pages.note("Counts are of all examples; what is measured on pictures is of a sample.")
        )
    sections = [
        Section("Classes", _classes(labels, measures)),
        Section("Samples", _samples(seen, pictures)),
        Section("Mean faces", _mean_faces(seen, pictures)),
        Section("Pictures", _pictures(measures)),
        Section("Landmarks", _landmarks(seen)),
        Section("Missing labels", _missing(labels)),
        Section("Augmentation", _augmentation(dataset, seen, params, pictures)),
        Section("Data card", [pages.markdown(datasets.card(dataset))]),
    ]
    return pages.page(f"A look at {dataset}", lead, sections)


def _classes(labels: pd.DataFrame, measures: pd.DataFrame) -> list[Markup | str]:
    counts = labels["class"].value_counts().sort_index().rename("examples")
    if len(counts) == 1:
        return [f"All examples are of one class, {counts.index[0]}."]
    table = pd.DataFrame({"examples": counts, "share": counts / counts.sum()})
    if labels["official_split"].nunique() > 1:
        splits = labels["official_split"].replace("", "no split")
        table = table.join(pd.crosstab(labels["class"], splits))
    if len(measures):
        means = measures.groupby("class")[["brightness", "contrast"]].mean()
        table = table.join(means.add_prefix("mean "))
    formats = {"share": "{:.1%}", "mean brightness": "{:.0f}", "mean contrast": "{:.0f}"}
    shown = table.rename_axis("class").reset_index()
    return [
        charts.bars(table[["examples"]], "Examples by class"),
        pages.table(shown, "Class balance; grey levels from 0 to 255", formats),
    ]


def _samples(seen: Seen, pictures: bool) -> list[Markup | str]:
    if not pictures:
        return [_WITHOUT]
    blocks: list[Markup | str] = []
    for name, examples in _few(seen.samples).items():
        if len(seen.samples) > 1:
            blocks.append(pages.heading(name.capitalize()))
        shown = [(example.id, _face(example)) for example in examples]
        blocks.append(pages.pictures(shown, f"Example of {name}"))
    return blocks or ["No picture could be read."]


def _mean_faces(seen: Seen, pictures: bool) -> list[Markup | str]:
    if not pictures:
        return [_WITHOUT]
    means = {name: mean.mean for name, mean in _few(seen.faces).items()}
    if not means:
        return ["There is nothing to average: no face shows where its eyes are."]
    everything = np.stack(list(means.values()))
    low, high = everything.min(), everything.max()
    items = [
        (
            f"{name}, {int(np.max(seen.faces[name].count)):,} pictures",
            ((face - low) / max(high - low, 1) * 255).round().astype(np.uint8),
        )
        for name, face in means.items()
    ]
    said = "turned and scaled so that the eyes coincide" if np.any(seen.shape.count) else "cropped"
    return [
        f"The mean of the grey faces, {said}; then all are stretched alike, for contrast.",
        pages.pictures(items, "Mean face", wide=True),
    ]


def _pictures(measures: pd.DataFrame) -> list[Markup | str]:
    if measures.empty:
        return ["No picture could be read."]
    drawn = [
        charts.distribution({"pictures": values.to_numpy()}, title, unit)
        for column, title, unit in (
            ("width", "Width", "pixels"),
            ("height", "Height", "pixels"),
            ("brightness", "Brightness", "mean grey level"),
            ("contrast", "Contrast", "standard deviation of grey levels"),
            ("yaw", "Head yaw", "degrees, positive towards the picture's right"),
        )
        if len(values := measures[column].dropna())
    ]
    blocks: list[Markup | str] = [pages.side_by_side(*drawn)]
    sizes = measures[["width", "height"]].value_counts().head(5).rename("pictures").reset_index()
    blocks.append(pages.table(sizes, "The most frequent sizes", bars=["pictures"]))
    if measures["yaw"].isna().all():
        blocks.append("Head yaw is not known here.")
    return blocks


def _landmarks(seen: Seen) -> list[Markup | str]:
    if not seen.heat.any():
        return ["The examples carry no landmarks."]
    drawn = [charts.heat_map(seen.heat, "Where the landmarks lie")]
    if np.any(seen.shape.count):
        # In units of the distance between the eyes.
        scale = EYES[1, 0] - EYES[0, 0]
        mean, spread = seen.shape.mean / scale, seen.shape.deviation / scale
        drawn.append(charts.mean_shape(mean, spread, "Mean shape"))
    return [pages.side_by_side(*drawn)]


def _missing(labels: pd.DataFrame) -> list[Markup | str]:
    patterns = Counter(pattern for pattern in labels["visible"] if pattern)
    if not patterns:
        return ["The examples carry no landmarks."]
    size = Counter(map(len, patterns.elements())).most_common(1)[0][0]
    patterns = Counter({key: n for key, n in patterns.items() if len(key) == size})
    rows = np.array([[bit == "0" for bit in pattern] for pattern in patterns])
    missing = np.average(rows, axis=0, weights=list(patterns.values()))
    said = f"{patterns['1' * size]:,} of {patterns.total():,} examples have all {size} points."
    if not missing.any():
        return [said]
    named = [name.replace("_", " ") for name in KAGGLE_POINTS] if size == len(KAGGLE_POINTS) else []
    table = pd.DataFrame({"point": named or map(str, range(size)), "missing": missing})
    table = table[table["missing"] > 0].sort_values("missing", ascending=False, kind="stable")
    return [
        said,
        charts.missing_points(patterns, named),
        pages.table(
            table.head(20), "The points most often missing", {"missing": "{:.1%}"}, bars=["missing"]
        ),
    ]


def _augmentation(dataset: str, seen: Seen, params: Params, pictures: bool) -> list[Markup | str]:
    if dataset in datasets.EVALUATE_ONLY:
        return ["Only measured on, never trained on: not augmented."]
    if not pictures:
        return [_WITHOUT]
    blocks: list[Markup | str] = []
    for name in datasets.LABELS[dataset]:
        example = _labelled_for(name, seen)
        if example is not None:
            settings = params.augment.named(name)
            blocks.append(pages.heading(f"{name.capitalize()}, policy {settings.policy}"))
            blocks.append(pages.pictures(_transformed(example, name, params), name, wide=True))
    blocks.append(
        pages.note(
            "Each transform by itself, always applied, at a strength drawn from its range; then "
            "the whole policy with its probabilities, as training sees it."
        )
    )
    return blocks if len(blocks) > 1 else ["No example carries labels for a task."]


def _transformed(example: Example, name: TaskName, params: Params) -> list[tuple[str, np.ndarray]]:
    """Return one face before, after each transform of its task's policy, and after all."""
    task, settings = params.tasks.named(name), params.augment.named(name)
    image = decode(example.image, task.channels)
    views = [("before", plain_view(example, image, task))]
    for transform in settings.transforms:
        seed = params.augment.seed
        view = transform_view(example, image, task, name, transform, seed)
        views.append((transform.transform, view))
    recipe = Recipe(name, task, settings, params.augment.seed)
    policy = build_policy(settings, task, name)
    views += [
        (f"all, view {number}", view)
        for number, view in enumerate(augmented_views(example, image, recipe, policy)[:VIEWS])
    ]
    return [(caption, _with_points(*view)) for caption, view in views]


def _labelled_for(name: TaskName, seen: Seen) -> Example | None:
    """Return the sample with the most labels for a task, None where no sample has any."""
    samples = [example for examples in seen.samples.values() for example in examples]
    if name == "emotion":
        return next((example for example in samples if example.emotion >= 0), None)
    best = max(samples, key=lambda example: example.visible.sum(), default=None)
    return best if best is not None and best.visible.any() else None


def _face(example: Example) -> np.ndarray:
    """Return the cropped face with its landmarks, uint8 (128, 128, 3)."""
    image = decode(example.image, 3)
    box = face_box(example, image.shape, MARGIN)
    return _with_points(crop(image, box, SIDE), to_crop(example.landmarks, box), example.visible)


def _with_points(image: np.ndarray, points: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Draw points in crop coordinates on a picture of at least 128 pixels, in colour."""
    size = max(SIDE, image.shape[0])
    rgb = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC).reshape(size, size, -1)
    drawn = np.array(np.broadcast_to(rgb, (size, size, 3)))
    for x, y in points[visible]:
        place = (round(float(x) * size * 16 - 8), round(float(y) * size * 16 - 8))
        cv2.circle(drawn, place, 18, GREEN, -1, cv2.LINE_AA, shift=4)
    return drawn


def _few(by_class: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(by_class.items())[:FEW_CLASSES])


_WITHOUT = "This page was made without pictures."


if __name__ == "__main__":
    run(main)
