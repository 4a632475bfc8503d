"""Stage `augment`: turn the train side into augmented shards; validation is only cropped.

Every view of every image is drawn from a seed made of the stage's seed, the image's id and the
view's number, so neither the number of processes nor other images change it. Processes write
straight into their own rows of the shared files.
"""

import argparse
import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from numpy.lib.format import open_memmap
from tqdm import tqdm

from models.schemes import EMOTIONS, SCHEMES
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.crops import crop, decode, face_box, jitter_box, to_crop
from pipelines.datasets.example import Box, Example
from pipelines.datasets.table import parts, read_examples
from pipelines.params import AugmentTask, Task, TaskName, load_params
from pipelines.shards import read_view
from pipelines.sheets import contact_sheet

# Rotations and perspectives are drawn on a crop this much wider and trimmed afterwards, so that
# their corners show the picture's surroundings rather than a repeated edge.
CONTEXT = 1 / 8

# A triangle that travels with the landmarks: when its orientation turns, the picture was mirrored
# and left and right points must swap names, whichever transform did it.
PROBE = np.array([[0.4, 0.4], [0.6, 0.4], [0.4, 0.6]])


def main() -> None:
    """Write the shards of one task, and a contact sheet to look at."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=("emotion", "landmarks"))
    args = parser.parse_args()
    params = load_params()
    task = params.tasks.named(args.task)
    settings = params.augment.named(args.task)
    build_policy(settings, task, args.task)
    clean = Path("data/clean", task.dataset)
    index = usable(clean, Path("data/split", task.dataset, "index.parquet"), args.task)

    with whole_folder(Path("data/augment", args.task)) as out:
        job = Job(args.task, task, settings, params.augment.seed, clean, out)
        write_shards(job, index, params.augment.workers or os.cpu_count() or 1)
    with whole_folder(Path("reports/augment", args.task)) as report:
        draw_sheet(Path("data/augment", args.task), settings.views, report / "views.png")


@dataclass(frozen=True)
class Job:
    """All that a worker process needs to know."""

    name: TaskName
    task: Task
    settings: AugmentTask
    seed: int
    clean: Path
    out: Path


def usable(clean: Path, index_path: Path, name: TaskName) -> pd.DataFrame:
    """Return the rows of the split index that carry a label for the task, in the clean order.

    Returns:
        Columns part (file), id, split, row (position within its side).
    """
    split = pd.read_parquet(index_path).set_index("id")["split"]
    rows = []
    for part in parts(clean):
        for example in read_examples(part, images=False):
            labelled = example.emotion >= 0 if name == "emotion" else example.visible.any()
            if labelled:
                rows.append((part, example.id, split[example.id], len(example.landmarks)))
    index = pd.DataFrame(rows, columns=["part", "id", "split", "points"])
    if index.empty:
        raise GrimaceError(
            f"{clean.name} has no labels for task {name}: set tasks.{name}.dataset to one that has"
        )
    index["row"] = index.groupby("split").cumcount()
    return index


def write_shards(job: Job, index: pd.DataFrame, workers: int) -> None:
    """Write `pipelines.shards` files for the train and val rows of an index."""
    points = int(index["points"].iloc[0])
    counts = {}
    for side, views in (("train", job.settings.views), ("val", 1)):
        rows = index[index["split"] == side]
        counts[side] = len(rows)
        if rows.empty:
            raise GrimaceError(f"{job.clean.name}: the {side} side has no labels for {job.name}")
        _allocate(job, side, list(rows["id"]), views, points)
    todo = index[index["split"].isin(["train", "val"])]
    chunks = [(Path(str(part)), rows) for part, rows in todo.groupby("part")]
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(todo), desc=f"augment {job.name}", unit="img") as progress,
    ):
        for done in as_completed([pool.submit(_write_chunk, job, *chunk) for chunk in chunks]):
            progress.update(done.result())
    meta: dict[str, Any] = {
        "task": job.name,
        "dataset": job.task.dataset,
        "size": job.task.size,
        "channels": job.task.channels,
        "margin": job.task.margin,
        "views": job.settings.views,
        "counts": counts,
    }
    if job.name == "emotion":
        meta["classes"] = EMOTIONS
    else:
        meta |= {"scheme": SCHEMES[points].name, "points": points}
    (job.out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _allocate(job: Job, side: str, ids: list[str], views: int, points: int) -> None:
    folder = job.out / side
    folder.mkdir()
    np.save(folder / "ids.npy", np.array(ids))
    count, size = len(ids), job.task.size
    arrays: dict[str, tuple[tuple[int, ...], type]] = {}
    if job.name == "emotion":
        arrays["emotions"] = ((count,), np.int64)
    for view in range(views):
        arrays[f"images-{view:02d}"] = ((count, size, size, job.task.channels), np.uint8)
        if job.name == "landmarks":
            arrays[f"landmarks-{view:02d}"] = ((count, points, 2), np.float32)
            arrays[f"visible-{view:02d}"] = ((count, points), np.bool_)
    for name, (shape, dtype) in arrays.items():
        path = folder / f"{name}.npy"
        open_memmap(path, "w+", dtype, shape).flush()
        # Reserved at once: a disk that fills up under a memory map kills the process unheard.
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _write_chunk(job: Job, part: Path, rows: pd.DataFrame) -> int:
    """Fill the rows of one part file; runs in a worker process."""
    cv2.setNumThreads(1)
    place = {
        str(id): (str(side), int(row))
        for id, side, row in zip(rows["id"], rows["split"], rows["row"], strict=True)
    }
    policy = build_policy(job.settings, job.task, job.name)
    files: dict[str, np.ndarray] = {}

    def put(name: str, row: int, value: Any) -> None:
        if name not in files:
            files[name] = np.load(job.out / f"{name}.npy", mmap_mode="r+")
        files[name][row] = value

    for example in read_examples(part):
        if example.id not in place:
            continue
        side, row = place[example.id]
        image = decode(example.image, job.task.channels)
        if job.name == "emotion":
            put(f"{side}/emotions", row, example.emotion)
        for view in range(job.settings.views if side == "train" else 1):
            if side == "train":
                result = augmented_view(example, image, job, policy, view)
            else:
                result = plain_view(example, image, job.task)
            put(f"{side}/images-{view:02d}", row, result[0])
            if job.name == "landmarks":
                put(f"{side}/landmarks-{view:02d}", row, result[1])
                put(f"{side}/visible-{view:02d}", row, result[2])
    return len(place)


def plain_view(
    example: Example, image: np.ndarray, task: Task
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Crop an example without augmentation, as validation, test and deployment do.

    Args:
        example: with landmarks in pixels.
        image: its decoded picture, uint8 (H, W, C).
        task: crop size and margin.

    Returns:
        The crop uint8 (S, S, C), landmarks float32 (N, 2) in crop coordinates (0 where not
        visible), visible bool (N,).
    """
    box = face_box(example, image.shape, task.margin)
    points = np.where(example.visible[:, None], to_crop(example.landmarks, box), 0)
    return crop(image, box, task.size), points.astype(np.float32), example.visible


def augmented_view(
    example: Example, image: np.ndarray, job: Job, policy: Any, view: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Jitter the face box, crop with some context, apply the policy and trim the context.

    Landmarks stay on their pixels; a mirrored picture swaps left and right names; a point that
    leaves the crop becomes invisible and 0, none is lost or reordered.

    Returns:
        As `plain_view`.
    """
    seed = _seed_of(job.seed, example.id, view)
    rng = np.random.default_rng(seed)
    tight = face_box(example, image.shape, job.task.margin)
    tight = jitter_box(tight, job.settings.jitter_shift, job.settings.jitter_scale, rng)
    size, wide_size = job.task.size, _wide(job.task.size)
    extra = (tight.right - tight.left) * (wide_size - size) / size / 2
    box = Box(tight.left - extra, tight.top - extra, tight.right + extra, tight.bottom + extra)
    wide = crop(image, box, wide_size)

    labelled = np.flatnonzero(example.visible)
    points = np.concatenate([PROBE, to_crop(example.landmarks[labelled], box)])
    policy.set_random_seed(int(seed % 2**32))
    result = policy(image=wide, keypoints=points * wide_size - 0.5)
    moved = (np.asarray(result["keypoints"], np.float32) + 0.5) / size
    if len(moved) != len(points):
        raise GrimaceError(
            f"the policy dropped keypoints of {example.id}: a transform in "
            f"augment.{job.name}.policy removes points; choose another"
        )
    probe, moved = moved[:3], moved[3:]
    landmarks = np.zeros_like(example.landmarks)
    visible = np.zeros_like(example.visible)
    inside = ((moved >= 0) & (moved <= 1)).all(1)
    landmarks[labelled[inside]], visible[labelled[inside]] = moved[inside], True
    if np.linalg.det(probe[1:] - probe[0]) < 0 and len(landmarks):
        mirror = list(SCHEMES[len(landmarks)].mirror)
        landmarks, visible = landmarks[mirror], visible[mirror]
    return result["image"].reshape(size, size, -1), landmarks, visible


def build_policy(settings: AugmentTask, task: Task, name: TaskName) -> Any:
    """Make the albumentations pipeline of a task, which takes a wide crop and trims it at its end.

    Each transform is tried on an empty picture, so that one that cannot work is named before any
    work.

    Raises:
        GrimaceError: a transform that albumentations does not have, arguments it rejects, or a
            result that is no picture for the task (other type or channels, too small).
    """
    import albumentations

    transforms = []
    trial = np.zeros((_wide(task.size), _wide(task.size), task.channels), np.uint8)
    for position, item in enumerate(settings.policy):
        where = f"params.yaml: augment.{name}.policy.{position}"
        kind = getattr(albumentations, item.transform, None)
        if not (isinstance(kind, type) and issubclass(kind, albumentations.BasicTransform)):
            raise GrimaceError(
                f"{where}.transform: albumentations {albumentations.__version__} has no "
                f"transform {item.transform!r}"
            )
        known = kind.InitSchema.model_fields if hasattr(kind, "InitSchema") else {}
        for argument in item.arguments:
            if known and argument not in {*known, "p"}:
                raise GrimaceError(
                    f"{where}.{argument}: unknown argument of {item.transform}; it takes "
                    f"{', '.join(sorted({*known, 'p'} - {'strict'}))}"
                )
        try:
            transforms.append(kind(**item.arguments))
            trial = kind(**item.arguments | {"p": 1.0})(image=trial)["image"]
        # Whatever albumentations' own checks and filters raise.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise GrimaceError(f"{where}: {item.transform} fails: {reason}") from None
        height, width, channels = trial.shape
        if min(height, width) < task.size or channels != task.channels or trial.dtype != np.uint8:
            raise GrimaceError(
                f"{where}: {item.transform} makes {trial.dtype} {trial.shape} of the crop, which "
                f"must stay uint8 with {task.channels} channels and at least {task.size} pixels"
            )
    transforms.append(albumentations.CenterCrop(task.size, task.size))
    keypoints = albumentations.KeypointParams(format="xy", remove_invisible=False)
    return albumentations.Compose(transforms, keypoint_params=keypoints)


def _wide(size: int) -> int:
    return size + 2 * round(size * CONTEXT)


def _seed_of(seed: int, id: str, view: int) -> int:
    digest = hashlib.sha256(f"{seed}/{id}/{view}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def draw_sheet(shards: Path, views: int, path: Path) -> None:
    """Draw up to eight views of the first six training images, with their points."""
    columns = min(8, views)
    images, captions, points = [], [], []
    each = [read_view(shards, "train", view) for view in range(columns)]
    for row in range(min(6, len(each[0].ids))):
        for number, view in enumerate(each):
            images.append(view.images[row])
            captions.append(f"{view.ids[row][-14:]} view {number}")
            if view.landmarks is None or view.visible is None:
                points.append(np.zeros((0, 2)))
            else:
                points.append(view.landmarks[row][view.visible[row]])
    title = f"{shards.name}: augmented views of six training images"
    contact_sheet(images, captions, path, title, points=points, columns=columns)


if __name__ == "__main__":
    run(main)
