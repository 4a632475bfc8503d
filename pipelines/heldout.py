"""Held-out faces: read, cropped as in deployment, with all that a measurement needs to know."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines.averaging import five_crops
from pipelines.cli import GrimaceError
from pipelines.crops import UnreadableImageError, decode, face_box
from pipelines.datasets import GENERATED, examples, module_of
from pipelines.datasets.archive import open_archive
from pipelines.datasets.example import Example
from pipelines.datasets.table import read_examples
from pipelines.params import Params, Task, TaskName
from pipelines.shards import read_view
from pipelines.slices import (
    COLUMNS,
    traits_of,
)
from pipelines.split import SIDES, choices_of, side_of
from pipelines.views import plain_view


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

    Raises:
        GrimaceError: no example of the side can be used; says why.
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
    faces = crop_all(rows, name, task, five=five)
    if not len(faces.ids):
        raise GrimaceError(
            f"{task.dataset} has no usable {side} example for task {name} (unusable: "
            f"{faces.unusable or 'none'}); set tasks.{name}.dataset to one that has"
        )
    return faces


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
