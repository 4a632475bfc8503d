"""Speed and memory of `filter` and `augment`, and what an addition costs.

    python -m benchmarks.data --archive fer2013.zip --publish

On FER-2013, one and two processes of each stage stand beside a straight loop, as one writes it in
a notebook: one process, one image at a time, the same checks or the same transforms. Every
measurement has a process of its own, and rounds are interleaved, so that what else the machine
does falls on all alike. Times are those of the work, without the start of Python and what it
imports: of two processes, their server's too, which a stage starts first of all, so that it imports
beside it. Two such loops side by side, each on half of the
images, show what the second core of the machine is worth. Of `filter`, this is the measuring of
every image; what it then does with the table of measures (comparing hashes, training for the check
of labels) no loop over images could do.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from itertools import islice
from pathlib import Path
from shutil import rmtree
from statistics import median
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from benchmarks.publication import others_share, show
from pipelines.cli import GrimaceError, run

if TYPE_CHECKING:
    import pandas as pd

    from pipelines.datasets.example import Example
    from pipelines.views import Recipe

DATASET = "fer2013"
OUT = Path("docs/results/data")
ADDED = 1000  # images, or a tenth where there are fewer than ten times as many

# Imported before the clock starts, in every measurement.
HEAVY = (
    "albumentations",
    "pipelines.augment",
    "pipelines.checks.duplicates",
    "pipelines.checks.image",
    "pipelines.checks.judge",
    "pipelines.checks.measures",
    "pipelines.filter",
)
STAGES = ("filter", "augment")
# A plain loop; two of them side by side, each on half: what the machine's second core can give;
# one and two processes of the stage.
WAYS = ("loop", "loops", "1", "2")
COMPARED = [f"{stage}-{way}" for stage in STAGES for way in WAYS]
# Once each: the seeds' sieve; half of the images; all but those that are added, then with them.
OTHERS = ["cascade-loop", *(f"{stage}-{what}" for stage in STAGES for what in ("half", "added"))]


def main() -> None:
    """Measure all, print the page, and publish it when asked."""
    args = _arguments()
    if args.measure:
        print(json.dumps(measured(args.measure, args.work, args.part)))
        return
    busy = others_share()
    total = prepare(args.archive, args.work, args.limit)
    rounds = [{arm: in_its_own_process(arm, args) for arm in COMPARED} for _ in range(args.repeats)]
    others = {arm: in_its_own_process(arm, args) for arm in OTHERS}
    results = {
        "command": f"python -m benchmarks.data --archive {args.archive.name}"
        + (f" --limit {args.limit}" if args.limit else "")
        + f" --repeats {args.repeats}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "others_share": busy,
        "images": total,
        "rounds": rounds,
        "others": others,
    }
    rmtree(args.work)
    show(results, page, OUT if args.publish else None)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, required=True, help="of FER-2013")
    parser.add_argument("--limit", type=int, help="only so many images, evenly spaced: a trial")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--publish", action="store_true", help=f"write {OUT}")
    parser.add_argument(
        "--work", type=Path, default=Path("data/benchmarks/data"), help="scratch, some 2 GB"
    )
    parser.add_argument("--measure", choices=[*COMPARED, *OTHERS], help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(archive: Path, work: Path, limit: int | None) -> int:
    """Lay the images out as `filter` leaves them, once for all; return their number."""
    import pandas as pd

    from pipelines.datasets import examples
    from pipelines.datasets.archive import open_archive
    from pipelines.datasets.table import read_examples, write_examples

    opened = open_archive(archive)
    total = sum(1 for _ in examples(DATASET, opened))
    step = max(1, total // limit) if limit else 1
    rmtree(work, ignore_errors=True)
    (work / "images").mkdir(parents=True)
    # FER-2013's own val and test images are for measuring; here a tenth of all is not augmented.
    usable = (row for row in examples(DATASET, opened) if not row.defect and row.emotion >= 0)
    sided = (
        replace(row, official_split="val" if number % 10 == 4 else "train")
        for number, row in enumerate(islice(usable, 0, None, step))
    )
    count = write_examples(sided, work / "images")
    np.save(work / "count.npy", count)
    sides = [(row.id, row.official_split) for row in read_examples(work / "images", images=False)]
    pd.DataFrame(sides, columns=["id", "split"]).to_parquet(work / "index.parquet")
    return count


def in_its_own_process(arm: str, args: argparse.Namespace) -> dict[str, float]:
    """Run this module for one measurement."""
    command = [sys.executable, "-m", "benchmarks.data", "--measure", arm]
    command += ["--archive", str(args.archive), "--work", str(args.work)]
    processes = [
        subprocess.Popen([*command, "--part", str(part)], stdout=subprocess.PIPE, text=True)
        for part in range(2 if arm.endswith("loops") else 1)
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise GrimaceError(f"{arm} failed: see above")
    each = [json.loads(text.splitlines()[-1]) for text in said]
    figures: dict[str, float] = {name: max(row[name] for row in each) for name in each[0]}
    figures["images"] = sum(row["images"] for row in each)
    print(f"{arm}: {figures}", flush=True)
    return figures


def measured(arm: str, work: Path, part: int) -> dict[str, float]:
    """Do one measurement; of the loops that run side by side, one.

    Returns:
        images, seconds, and the peak resident set of this process and of its largest worker, in
        MiB; the worker's is looked at once a second.
    """
    import cv2

    from pipelines.augment import WORKING
    from pipelines.fanout import fan_out, start_server
    from pipelines.filter import MEASURING

    for module in HEAVY:
        import_module(module)
    cv2.setNumThreads(1)
    stage, way = arm.split("-")
    total = int(np.load(work / "count.npy"))
    rows = np.arange(total)
    if way in ("half", "loops"):
        rows = rows[len(rows) // 2 :] if part else rows[: len(rows) // 2]
    do: Callable[..., None] = {
        "filter": filter_loop if "loop" in way else filter_stage,
        "augment": augment_loop if "loop" in way else augment_stage,
        "cascade": cascade_loop,
    }[stage]
    options = {} if "loop" in way else {"workers": 1 if way == "1" else 2}
    if way == "added":  # every so-many-th image; what there was before is laid unmeasured
        before = np.delete(rows, np.s_[:: max(10, total // ADDED)])
        do(work, before, **options, keep=True)
        options["previous"] = True
    if options.get("workers") == 2:
        modules = {"filter": MEASURING, "augment": WORKING}[stage]
        start_server(modules)
        list(fan_out(len, [[], []], 2))  # it serves when it has imported
    with largest_descendant() as largest:
        start = time.perf_counter()
        do(work, rows, **options)
        seconds = time.perf_counter() - start
    return {
        "images": len(rows),
        "seconds": round(seconds, 3),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "worker_peak_mib": round(max(largest) / 2**20),
    }


@contextmanager
def largest_descendant() -> Iterator[list[int]]:
    """Watch this process's descendants; yield a list that grows by their largest resident sets.

    They are watched because the kernel accounts for children only, and a pool's are another's.
    """
    sizes, done, this = [0], Event(), psutil.Process()

    def watch() -> None:
        while not done.wait(1):
            for process in this.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    sizes.append(process.memory_info().rss)

    thread = Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        done.set()
        thread.join()


# The stages


def filter_stage(
    work: Path, rows: np.ndarray, workers: int, keep: bool = False, previous: bool = False
) -> None:
    """Measure every image, as `filter` does before it judges the table that comes of it."""
    from pipelines.checks.judge import DERIVED
    from pipelines.filter import measure_all
    from pipelines.params import load_params

    earlier = work / "earlier.parquet"
    with TemporaryDirectory(dir=work) as scratch:
        table, _ = measure_all(
            lambda: read(work, rows),
            detectors=load_params().filter.checks_of(DATASET).no_face.detectors,
            workers=workers,
            address=None,
            previous=earlier if previous else work / "none",
            scratch=Path(scratch),
        )
    if keep:
        table.assign(**dict.fromkeys(DERIVED, 0)).to_parquet(earlier)


def augment_stage(
    work: Path, rows: np.ndarray, workers: int, keep: bool = False, previous: bool = False
) -> None:
    """Write the shards of the given images, as `augment` does."""
    from pipelines.augment import write_shards

    name = "earlier" if keep else "shards"
    out, digests = work / name, work / f"{name}-digests"
    out.mkdir()
    digests.mkdir()
    earlier = (work / "earlier", work / "earlier-digests") if previous else None
    write_shards(recipe(), index_of(work, rows), out, workers, digests=digests, previous=earlier)
    if not keep:
        rmtree(out)
        rmtree(digests)


# The same by a plain loop


def filter_loop(work: Path, rows: np.ndarray) -> None:
    """Make the same measures, one image after the other."""
    import cv2
    import pandas as pd

    from pipelines.checks import duplicates, faces, image, landmarks
    from pipelines.checks.measures import FACE_MARGIN, FACE_SIDE
    from pipelines.crops import crop, decode, face_box
    from pipelines.params import load_params

    detectors = load_params().filter.checks_of(DATASET).no_face.detectors
    table = []
    pictures: dict[str, list[np.ndarray]] = {"coarse": [], "details": [], "faces": []}
    for example in read(work, rows):
        rgb = decode(example.image, 3)  # refuses what is damaged, as a check of `filter`
        grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
        small = duplicates.small_version(grey)
        # What the search for near copies and the check of labels work on.
        pictures["coarse"].append(duplicates.coarse_version(small))
        pictures["details"].append(duplicates.details(small))
        box = face_box(example, grey.shape, FACE_MARGIN)
        pictures["faces"].append(crop(grey, box, FACE_SIDE))
        row: dict[str, Any] = {"id": example.id, "pixels": duplicates.pixel_digest(rgb)}
        row["hash"], row["mirror_hash"] = duplicates.perceptual_hashes(small)
        row |= image.measure_image(rgb) | faces.detect(rgb, detectors)
        row |= faces.box_measures(example, rgb.shape)
        row |= landmarks.measure_landmarks(example, rgb.shape)
        table.append(row)
    frame = pd.DataFrame(table)
    out = _own_folder(work)
    frame.join(image.score_images(frame)).to_parquet(out / "measures.parquet")
    for name, each in pictures.items():
        np.save(out / f"{name}.npy", np.stack(each))


def augment_loop(work: Path, rows: np.ndarray) -> None:
    """Make as many views with the same crops and transforms, one image after the other."""
    import cv2

    from pipelines.crops import crop, face_box, jitter_box
    from pipelines.datasets.example import Box
    from pipelines.views import CONTEXT, build_policy

    made = recipe()
    task, settings = made.task, made.settings
    policy, rng = build_policy(settings, task, made.name), np.random.default_rng(made.seed)
    wide = task.size + 2 * round(task.size * CONTEXT)
    images: list[list[np.ndarray]] = [[] for _ in range(settings.views)]
    held_out = []
    for example in read(work, rows):
        image = _picture(example, cv2.IMREAD_GRAYSCALE)[..., None]
        box = face_box(example, image.shape, task.margin)
        if example.official_split == "val":
            held_out.append(crop(image, box, task.size))
            continue
        for view in images:
            x0, y0, x1, y1 = jitter_box(box, settings.jitter_shift, settings.jitter_scale, rng)
            extra = (x1 - x0) * (wide / task.size - 1) / 2
            context = crop(image, Box(x0 - extra, y0 - extra, x1 + extra, y1 + extra), wide)
            view.append(policy(image=context)["image"])
    out = _own_folder(work)
    for number, view in enumerate([*images, held_out]):
        np.save(out / f"{number}.npy", np.stack(view))


def cascade_loop(work: Path, rows: np.ndarray) -> None:
    """Keep what the frontal cascade sees a face in: all that the projects before this one did."""
    import cv2

    from pipelines.checks.faces import seed_keeps

    kept = [seed_keeps(_picture(example, cv2.IMREAD_COLOR_RGB)) for example in read(work, rows)]
    np.save(_own_folder(work) / "kept.npy", kept)


def _own_folder(work: Path) -> Path:
    folder = work / f"loop-{os.getpid()}"
    folder.mkdir()
    return folder


def _picture(example: "Example", mode: int) -> np.ndarray:
    import cv2

    picture = cv2.imdecode(np.frombuffer(example.image, np.uint8), mode)
    assert picture is not None  # all of FER-2013 can be read
    return picture


# What they work on


def recipe() -> "Recipe":
    """Return how params.yaml augments FER-2013."""
    from pipelines.params import load_params
    from pipelines.views import Recipe

    params = load_params()
    task = params.tasks.emotion.model_copy(update={"dataset": DATASET})
    return Recipe("emotion", task, params.augment.emotion, params.augment.seed)


def read(work: Path, rows: np.ndarray) -> Iterator["Example"]:
    """Yield the images of the given numbers."""
    from pipelines.datasets.table import read_examples

    chosen = set(rows.tolist())
    stream = enumerate(read_examples(work / "images"))
    return (row for number, row in stream if number in chosen)


def index_of(work: Path, rows: np.ndarray) -> "pd.DataFrame":
    """Return the same for `augment`."""
    from pipelines.augment import usable

    return usable(work / "images", work / "index.parquet", "emotion").iloc[rows]


# What came of it


def page(results: dict[str, Any]) -> str:
    """Write the figures as Markdown."""
    from pipelines.report import markdown

    rounds, others = results["rounds"], results["others"]

    def middle(arm: str, name: str = "seconds") -> float:
        return median(row[arm][name] for row in rounds)

    def ratio(slow: str, fast: str) -> str:
        each = [row[slow]["seconds"] / row[fast]["seconds"] for row in rounds]
        return f"{median(each):.2f} ({min(each):.2f} – {max(each):.2f})"

    speeds: list[tuple[str, ...]] = []
    memory: list[tuple[str, ...]] = []
    additions: list[tuple[str, ...]] = []
    images = results["images"]
    for stage in STAGES:
        arms = [f"{stage}-{way}" for way in WAYS]
        rates = [f"{images / middle(arm):,.0f}" for arm in arms]
        loop, loops, one, two = arms
        speeds.append((stage, *rates, ratio(loop, one), ratio(one, two), ratio(loops, two)))
        half, added = others[f"{stage}-half"], others[f"{stage}-added"]
        for name, label in (("peak_mib", "parent"), ("worker_peak_mib", "largest worker")):
            memory.append((stage, label, f"{half[name]}", f"{middle(two, name):.0f}"))
        share = added["seconds"] / middle(two)
        additions.append(
            (stage, f"{middle(two):.1f} s", f"{added['seconds']:.1f} s", f"{share:.0%}")
        )
    cascade = images / others["cascade-loop"]["seconds"]
    how = (__doc__ or "").split("\n\n")[2]
    ratios = ("1 process to the loop", "2 processes to 1", "2 processes to two loops")
    return (
        f"# Speed of the data stages\n\nWritten by\n\n```\n{results['command']}\n```\n\n"
        f"on {results['date']}: {images:,} images of FER-2013, rounds: {len(rounds)}.\n\n"
        f"{how}\n"
        "## Images a second, medians; ratios with their range\n\n"
        + markdown(speeds, ("stage", "loop", "two loops", "1 process", "2 processes", *ratios))
        + f"\nThe cascade alone, as the projects before this one filtered: {cascade:,.0f}.\n\n"
        "## Peak memory in MiB, two processes\n\n"
        + markdown(memory, ("stage", "process", "half of the images", "all"))
        + f"\n## What {_added(images):,} more images cost, two processes\n\n"
        + markdown(additions, ("stage", "from nothing", "added to the rest", "share"))
    )


def _added(total: int) -> int:
    return len(range(0, total, max(10, total // ADDED)))


if __name__ == "__main__":
    run(main)
