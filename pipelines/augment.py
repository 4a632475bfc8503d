"""Stage `augment`: turn the train side into augmented shards; validation is only cropped.

Parts are read and shards written here, one after the other; the work between is fanned out, and
the number of processes changes nothing. Rows that the last run made from the same things are taken
over from it.
"""

# A spawned worker imports this module too, so what only the parent needs is imported inside.
import argparse
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from io import BufferedWriter
from itertools import islice, tee
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import cv2
import numpy as np

from models.schemes import EMOTIONS, SCHEMES
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.crops import decode
from pipelines.datasets.example import Example
from pipelines.fanout import fan_out, start_server
from pipelines.params import TaskName, load_params
from pipelines.shards import read_view
from pipelines.views import Recipe, augmented_views, build_policy, plain_view, seed_of

if TYPE_CHECKING:
    import pandas as pd

CHUNK_BYTES = 2**22  # of results, made in one go

Side = Literal["train", "val"]
SIDES: tuple[Side, ...] = ("train", "val")

# What each view of each side is stored as.
KINDS = {"emotion": ("images",), "landmarks": ("images", "landmarks", "visible")}

Previous = tuple[Path, Path]  # shards and digests of an earlier run

# What `make_rows` needs; not this module, which a worker imports under another name.
WORKING = ("albumentations", "pipelines.params", "pipelines.views")

# What a row follows from besides its example and its recipe.
ROOT = Path(__file__).parents[1]
SOURCES = ("pipelines/augment.py", "pipelines/views.py", "pipelines/crops.py", "models/schemes.py")
LIBRARIES = ("albumentations", "opencv-python-headless", "numpy", "pillow")


def main() -> None:
    """Write the shards of one task, and a contact sheet to look at."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=("emotion", "landmarks"))
    args = parser.parse_args()
    params = load_params()
    workers = params.augment.workers or len(os.sched_getaffinity(0))
    if workers > 1 and params.cluster.address is None:
        start_server(WORKING)
    task = params.tasks.named(args.task)
    recipe = Recipe(args.task, task, params.augment.named(args.task), params.augment.seed)
    build_policy(recipe.settings, task, args.task)
    split = Path("data/split", task.dataset, "index.parquet")
    index = usable(Path("data/clean", task.dataset), split, args.task)
    _check_test_side(index, recipe)

    shards, digests = Path("data/augment", args.task), Path("data/digests", args.task)
    with whole_folder(digests) as own, whole_folder(shards) as out:
        address, previous = params.cluster.address, (shards, digests)
        taken_over = write_shards(recipe, index, out, workers, address, own, previous)
        rmtree(digests, ignore_errors=True)  # before the shards go that they are of
    print(f"{taken_over} rows taken over from the last run")
    with whole_folder(Path("reports/augment", args.task)) as report:
        draw_sheet(shards, recipe.settings.views, report / "views.png")


class Row(NamedTuple):
    """One row of the shards to be.

    Attributes:
        example: what it is made from.
        side: where it stands.
        copy: 0, or the number of the further copy that balancing asks for.
        digest: of all that it follows from.
        old: where the last run has it, None where it has not.
    """

    example: Example
    side: Side
    copy: int
    digest: bytes
    old: int | None


def usable(clean: Path, index_path: Path, name: TaskName) -> "pd.DataFrame":
    """Return the examples of the split index that carry a label for the task, in the clean order.

    Returns:
        Columns part (file), id, split, points (number of landmarks), emotion, weight.

    Raises:
        GrimaceError: no example has a label for the task.
    """
    import pandas as pd

    from pipelines.datasets.table import parts, read_examples

    split = pd.read_parquet(index_path).set_index("id")["split"].to_dict()
    rows = []
    for part in parts(clean):
        for example in read_examples(part, images=False):
            labelled = example.emotion >= 0 if name == "emotion" else example.visible.any()
            if labelled:
                points, side = len(example.landmarks), split[example.id]
                rows.append((part, example.id, side, points, example.emotion, example.weight))
    index = pd.DataFrame(rows, columns=["part", "id", "split", "points", "emotion", "weight"])
    if index.empty:
        raise GrimaceError(
            f"{clean.name} has no labels for task {name}: set tasks.{name}.dataset to one that has"
        )
    return index


def _check_test_side(index: "pd.DataFrame", recipe: Recipe) -> None:
    """Refuse what `verify` could not measure: here, and not after all training."""
    if not (index["split"] == "test").any():
        dataset = recipe.task.dataset
        raise GrimaceError(
            f"{dataset}: the test side has no labels for {recipe.name}, so no model could be "
            f"verified; label some of its examples, or set tasks.{recipe.name}.dataset to another"
        )


def write_shards(
    recipe: Recipe,
    index: "pd.DataFrame",
    out: Path,
    workers: int,
    address: str | None = None,
    digests: Path | None = None,
    previous: Previous | None = None,
) -> int:
    """Write `pipelines.shards` files for the train and val rows of an index.

    Args:
        recipe: how they are made.
        index: as `usable` gives it. Train rows of weight 0 are left out.
        out: an empty folder.
        workers: processes.
        address: of a Ray cluster to use instead.
        digests: an empty folder for {train,val}.npy, uint8 (n, 32): a digest of all that each row
            was made from. Apart from the shards, so that these are no others, and need not be
            trained on again, where only the code that makes them was edited.
        previous: shards and digests of an earlier run, whose rows are taken over where the same
            would be made again. The bytes written are the same with or without.

    Returns:
        Number of rows taken over.

    Raises:
        GrimaceError: a side has no examples; or as `fan_out` does.
    """
    from tqdm import tqdm

    unheeded = (index["split"] == "train") & (index["weight"] == 0)
    plan = index[index["split"].isin(SIDES) & ~unheeded]
    plan = plan.assign(copies=copies_of(plan, recipe.settings.balance, recipe.seed))
    for side in SIDES:
        if not (plan["split"] == side).any():
            dataset = recipe.task.dataset
            raise GrimaceError(f"{dataset}: the {side} side has no labels for {recipe.name}")
    _write_labels(recipe, plan, out, left_out=int(unheeded.sum()))

    make = partial(make_rows, recipe, build_policy(recipe.settings, recipe.task, recipe.name))
    ahead, behind = tee(_chunks(recipe, plan, previous))
    todo = ([row for row in chunk if row.old is None] for chunk in ahead)
    made = fan_out(make, todo, workers, address)
    taken_over = 0
    with (
        _npy_files(_shapes(recipe, plan, out, digests)) as files,
        tqdm(total=plan["copies"].sum(), desc=f"augment {recipe.name}", unit="img") as progress,
    ):
        for fresh, chunk in zip(made, behind, strict=True):
            for name, file in files.items():
                file.write(_completed(name, chunk, fresh, previous).data)
            taken_over += sum(row.old is not None for row in chunk)
            progress.update(len(chunk))
    return taken_over


def copies_of(plan: "pd.DataFrame", balance: dict[str, int] | str | None, seed: int) -> np.ndarray:
    """Say how often each row is to appear, so that the classes of the train side reach a count.

    The copies of a class are spread evenly; who gets one of the remainder is decided by a hash of
    the id, so that it changes little when images are added.

    Args:
        plan: columns id, split, emotion.
        balance: as in `pipelines.params.AugmentTask`.
        seed: changes who gets one of the remainder.

    Returns:
        int (n,), at least 1.

    Raises:
        GrimaceError: no training image has a class that is to be filled up.
    """
    copies = np.ones(len(plan), int)
    emotions = np.where(plan["split"] == "train", plan["emotion"], -1)
    if balance == "largest":
        largest = np.bincount(emotions[emotions >= 0]).max()
        balance = {EMOTIONS[emotion]: largest for emotion in np.unique(emotions[emotions >= 0])}
    elif not isinstance(balance, dict):
        return copies
    for name, count in balance.items():
        rows = np.flatnonzero(emotions == EMOTIONS.index(name))
        if not len(rows):
            raise GrimaceError(f"augment.emotion.balance: no training image is {name}")
        each, more = divmod(max(count, len(rows)), len(rows))
        order = sorted(rows, key=lambda row: seed_of(seed, plan["id"].iloc[row], copy=-1))
        copies[rows] = each
        copies[order[:more]] += 1
    return copies


def _write_labels(recipe: Recipe, plan: "pd.DataFrame", out: Path, left_out: int) -> None:
    """Write what is known before any work: meta.json, ids, weights and classes."""
    rows = plan.loc[plan.index.repeat(plan["copies"])]
    for side in SIDES:
        those = rows[rows["split"] == side]
        weights = those["weight"].to_numpy() if side == "train" else np.ones(len(those))
        (out / side).mkdir()
        np.save(out / side / "ids.npy", those["id"].to_numpy(str))
        np.save(out / side / "weights.npy", weights.astype(np.float32))
        if recipe.name == "emotion":
            np.save(out / side / "emotions.npy", those["emotion"].to_numpy(np.int64))
    meta: dict[str, Any] = {
        "task": recipe.name,
        "dataset": recipe.task.dataset,
        "size": recipe.task.size,
        "channels": recipe.task.channels,
        "margin": recipe.task.margin,
        "views": recipe.settings.views,
        "policy": recipe.settings.policy,
        "counts": {side: int((rows["split"] == side).sum()) for side in SIDES},
        "left_out_by_weight": left_out,
        "added_by_balance": len(rows) - len(plan),
    }
    if recipe.name == "emotion":
        meta["classes"] = EMOTIONS
    else:
        points = int(plan["points"].iloc[0])
        meta |= {"scheme": SCHEMES[points].name, "points": points}
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _views(recipe: Recipe, side: Side) -> int:
    return recipe.settings.views if side == "train" else 1


def _shapes(
    recipe: Recipe, plan: "pd.DataFrame", out: Path, digests: Path | None
) -> dict[str, tuple[Path, tuple[int, ...], type]]:
    """Return place, shape and type of every file that is written row by row."""
    size, channels, points = recipe.task.size, recipe.task.channels, int(plan["points"].iloc[0])
    of_one: dict[str, tuple[tuple[int, ...], type]] = {
        "images": ((size, size, channels), np.uint8),
        "landmarks": ((points, 2), np.float32),
        "visible": ((points,), np.bool_),
    }
    shapes: dict[str, tuple[Path, tuple[int, ...], type]] = {}
    for side in SIDES:
        count = int(plan.loc[plan["split"] == side, "copies"].sum())
        if digests:
            shapes[f"{side}/digests"] = digests / f"{side}.npy", (count, 32), np.uint8
        for view in range(_views(recipe, side)):
            for kind in KINDS[recipe.name]:
                shape, dtype = of_one[kind]
                name = f"{side}/{kind}-{view:02d}"
                shapes[name] = out / f"{name}.npy", (count, *shape), dtype
    return shapes


@contextmanager
def _npy_files(
    shapes: dict[str, tuple[Path, tuple[int, ...], type]],
) -> Iterator[dict[str, BufferedWriter]]:
    """Open .npy files for rows in their order, with the space for all of them reserved.

    Written, not mapped: the pages of a map would count as memory of this process.
    """
    with ExitStack() as stack:
        files = {}
        for name, (path, shape, dtype) in shapes.items():
            file = stack.enter_context(path.open("wb"))
            descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
            header = {"descr": descr, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            rest = int(np.prod(shape)) * np.dtype(dtype).itemsize
            os.posix_fallocate(file.fileno(), 0, file.tell() + rest)
            files[name] = file
        yield files


def _chunks(recipe: Recipe, plan: "pd.DataFrame", previous: Previous | None) -> Iterator[list[Row]]:
    """Yield the rows of the shards in order, some at a time."""
    stream = _rows(recipe, plan, previous)
    row_bytes = recipe.settings.views * recipe.task.size**2 * recipe.task.channels
    while chunk := list(islice(stream, max(1, CHUNK_BYTES // row_bytes))):
        yield chunk


def _rows(recipe: Recipe, plan: "pd.DataFrame", previous: Previous | None) -> Iterator[Row]:
    from pipelines.datasets.table import read_examples

    known = {side: _known_rows(previous, side) for side in SIDES}
    digest_of = _digest_of(recipe)
    for part, wanted in plan.groupby("part", sort=False):
        places = wanted.set_index("id")[["split", "copies"]].to_dict("index")
        for example in read_examples(Path(str(part))):
            place = places.get(example.id, {"split": "", "copies": 0})
            for copy in range(place["copies"]):
                side = place["split"]
                digest = digest_of(example, side, copy)
                yield Row(example, side, copy, digest, known[side].get(digest))


def _known_rows(previous: Previous | None, side: Side) -> dict[bytes, int]:
    if not previous:
        return {}
    shards, digests = previous[0] / side / "ids.npy", previous[1] / f"{side}.npy"
    if not (shards.exists() and digests.exists()):
        return {}
    known = np.load(digests)
    if len(known) != len(np.load(shards, mmap_mode="r")):  # not of these shards
        return {}
    return {digest.tobytes(): row for row, digest in enumerate(known)}


def _digest_of(recipe: Recipe) -> Callable[[Example, Side, int], bytes]:
    """Return a function that digests all that a row follows from."""
    for_both = [version(library) for library in LIBRARIES]
    for_both += [(ROOT / path).read_text() for path in SOURCES]
    for_both += [recipe.name, recipe.task.model_dump_json(exclude={"dataset"})]
    settings = recipe.settings.model_dump(exclude={"policies", "policy", "balance"})
    transforms = [transform.model_dump() for transform in recipe.settings.transforms]
    starts = {
        "train": hashlib.sha256(repr([for_both, recipe.seed, settings, transforms]).encode()),
        "val": hashlib.sha256(repr(for_both).encode()),
    }

    def digest(example: Example, side: Side, copy: int) -> bytes:
        sha = starts[side].copy()
        sizes = len(example.landmarks), len(example.image)
        sha.update(repr((example.id, copy, example.emotion, example.box, *sizes)).encode())
        for content in (example.landmarks.tobytes(), example.visible.tobytes(), example.image):
            sha.update(content)
        return sha.digest()

    return digest


def make_rows(recipe: Recipe, policy: Any, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Make some rows, in a worker.

    Returns:
        For "train/images-00" and every other file that these rows are in, but digests, what
        belongs there, in the order of the rows.
    """
    cv2.setNumThreads(1)  # there is a process for each core
    made: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    for row in rows:
        image = decode(row.example.image, recipe.task.channels)
        if row.side == "train":
            views = augmented_views(row.example, image, recipe, policy, row.copy)
        else:
            views = [plain_view(row.example, image, recipe.task)]
        for view, arrays in enumerate(views):
            for kind, array in zip(KINDS[recipe.name], arrays, strict=False):
                made[f"{row.side}/{kind}-{view:02d}"].append(array)
    return {name: np.stack(arrays) for name, arrays in made.items()}


def _completed(
    name: str,
    chunk: Sequence[Row],
    fresh: dict[str, np.ndarray],
    previous: Previous | None,
) -> np.ndarray:
    """Return a chunk's rows of one file: those made now, with those taken over between them."""
    rows = [row for row in chunk if name.startswith(row.side)]
    if name.endswith("digests"):
        return np.frombuffer(b"".join(row.digest for row in rows), np.uint8)
    old = [row.old for row in rows if row.old is not None]
    if not previous or not old:
        return fresh.get(name, np.empty(0))
    taken_over = np.load(previous[0] / f"{name}.npy", mmap_mode="r")[old]
    result = np.empty((len(rows), *taken_over.shape[1:]), taken_over.dtype)
    is_old = np.array([row.old is not None for row in rows])
    result[is_old] = taken_over
    if not is_old.all():
        result[~is_old] = fresh[name]
    return result


def draw_sheet(shards: Path, views: int, path: Path) -> None:
    """Draw up to eight views of six training images with their points.

    Where balancing made copies, half of the six are copies of one image.
    """
    import pandas as pd

    from pipelines.sheets import contact_sheet

    columns = min(8, views)
    images, captions, points = [], [], []
    each = [read_view(shards, "train", view) for view in range(columns)]
    ids = pd.Series(each[0].ids)
    copies = ids.groupby(ids).cumcount()
    copied = ids.index[(ids == ids[int(copies.to_numpy().argmax())]) & copies.any()][:3]
    others = ids.index[copies == 0].difference(copied)
    for row in [*others[: 6 - len(copied)], *copied]:
        for number, view in enumerate(each):
            images.append(view.images[row])
            name = f"{ids[row][-14:]} copy {copies[row]}" if copies[row] else ids[row][-14:]
            captions.append(f"{name} view {number}")
            if view.landmarks is None or view.visible is None:
                points.append(np.zeros((0, 2)))
            else:
                points.append(view.landmarks[row][view.visible[row]])
    title = f"{shards.name}: augmented views of training images"
    contact_sheet(images, captions, path, title, points=points, columns=columns)


if __name__ == "__main__":
    run(main)
