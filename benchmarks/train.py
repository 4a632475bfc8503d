"""Speed of training: ours beside the two ways that people start with, on the same network.

    GRIMACE_ARCHIVES=DIR python -m pipelines.download --dataset fer2013
    python -m benchmarks.train --publish

The same network (the Emojify project's, `models.emotion`) learns from the same images of FER-2013:
  ours       `pipelines.fit` on shards that `augment` wrote, at the precision given
  float32    the same in float32
  generator  Emojify's way: Keras's ImageDataGenerator over folders of image files
  dataset    `keras.utils.image_dataset_from_directory` over the same folders, as it comes
and, for its own sake, the job emotion-compact of params.yaml learns from them too:
  compact    `pipelines.fit` with all that the job does to a batch: mixing, erasing, averaging
  compact32  the same in float32, which tells whether the job's precision pays
Last, a step of each job of params.yaml is timed in both precisions (`pipelines.fit --time`, on
images of noise), which its `precision` should follow.

Every measurement has a process of its own, and rounds are interleaved, so that what else the
machine does falls on all alike. Two epochs are trained and the second is timed. The time spent on
making its batches is taken within the loop. As TensorFlow prefetches, the loop waits for no more
than that share of its time. With --peak, the data sheet's figure for one GPU, the share of it that
training reaches is told: six floating-point operations for each multiply-add of the network, which
is two forwards and four backwards.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.publication import others_share, show
from pipelines.cli import GrimaceError, run
from pipelines.params import load_params

if TYPE_CHECKING:
    import numpy as np

    from pipelines.batches import Batches
    from pipelines.job import Job

DATASET, NETWORK, BATCH, SIZE = "fer2013", "emojify", 64, 48
OUT = Path("docs/results/train")
SAME = ("ours", "float32", "generator", "dataset")  # the network
COMPACT = "emotion-compact"
ARMS = (*SAME, "compact", "compact32")


def main() -> None:
    """Measure all, print the page, and publish it when asked."""
    args = _arguments()
    if args.measure:
        print(json.dumps(ARM[args.measure](args.work, args.precision)))
        return
    if args.step:
        print(json.dumps(step(args.step, args.work)))
        return
    busy = others_share()
    total = prepare(args.raw, args.work, args.limit)
    rounds = [{arm: in_its_own_process(arm, args) for arm in ARMS} for _ in range(args.repeats)]
    steps = {
        name: in_its_own_process(name, args, "--step") | {"precision": job.precision}
        for name, job in load_params().train.jobs.items()
    }
    results = {
        "command": f"python -m benchmarks.train --precision {args.precision} "
        f"--limit {args.limit} --repeats {args.repeats}"
        + (f" --peak {args.peak:g}" if args.peak else ""),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "others_share": busy,
        "images": total,
        "precision": args.precision,
        "peak": args.peak,
        "rounds": rounds,
        "steps": steps,
    }
    rmtree(args.work)
    show(results, page, OUT if args.publish else None)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--raw", type=Path, default=Path("data/raw", DATASET), help="what `download` made"
    )
    parser.add_argument("--limit", type=int, default=8192, help="images (default: 8192)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument(
        "--precision",
        choices=("mixed_bfloat16", "float32"),
        default="mixed_bfloat16",
        help="of our arm (default: mixed_bfloat16)",
    )
    parser.add_argument("--peak", type=float, help="TFLOP/s of the GPU at that precision")
    parser.add_argument("--publish", action="store_true", help=f"write {OUT}")
    parser.add_argument("--work", type=Path, default=Path("data/benchmarks/train"), help="scratch")
    parser.add_argument("--measure", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(raw: Path, work: Path, limit: int) -> int:
    """Lay the images out twice: in class folders, and as shards; return their number."""
    from pipelines.augment import usable, write_shards
    from pipelines.crops import crop, decode, face_box
    from pipelines.datasets import builder
    from pipelines.datasets.table import read_examples, write_examples
    from pipelines.views import Recipe

    if not raw.exists():
        raise GrimaceError(
            f"{raw} is missing: run `python -m pipelines.download --dataset {DATASET}`, with "
            "GRIMACE_ARCHIVES naming the folder of its archive"
        )
    import cv2
    import pandas as pd

    from models.schemes import EMOTIONS

    rmtree(work, ignore_errors=True)
    (work / "images").mkdir(parents=True)
    rows = (row for row in builder.read(raw) if not row.defect and row.emotion >= 0)
    write_examples(islice(rows, limit + BATCH), work / "images")
    sides = []
    for number, row in enumerate(read_examples(work / "images")):
        sides.append((row.id, "train" if number < limit else "val"))
        if number < limit:
            image = decode(row.image, 1)
            folder = work / "folders" / EMOTIONS[row.emotion]
            folder.mkdir(parents=True, exist_ok=True)
            face = crop(image, face_box(row, image.shape, 0.0), SIZE)
            cv2.imwrite(str(folder / f"{row.id}.jpg"), face)
    index = work / "index.parquet"
    pd.DataFrame(sides, columns=["id", "split"]).to_parquet(index)
    params = load_params()
    task = params.tasks.emotion.model_copy(update={"dataset": DATASET})
    settings = params.augment.emotion.model_copy(update={"views": 2})
    recipe = Recipe("emotion", task, settings, params.augment.seed)
    (work / "shards").mkdir()
    write_shards(recipe, usable(work / "images", index, "emotion"), work / "shards", workers=2)
    return min(limit, len(sides))


def in_its_own_process(
    arm: str, args: argparse.Namespace, what: str = "--measure"
) -> dict[str, float]:
    """Run this module for one measurement."""
    command = [sys.executable, "-m", "benchmarks.train", what, arm]
    command += ["--work", str(args.work), "--precision", args.precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise GrimaceError(f"{arm} failed: see above")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{arm}: {figures}", flush=True)
    return figures


def ours(work: Path, precision: str) -> dict[str, float]:
    """Train the same network as the others by `pipelines.fit`."""
    from pipelines.job import Job

    job = Job(
        task="emotion",
        model=NETWORK,
        widths=(),
        dropout=0.5,
        loss="cross_entropy",
        label_smoothing=0.0,
        optimizer="adamw",
        learning_rate=1e-4,
        weight_decay=0.0,
        batch=BATCH,
        epochs=2,
        precision=precision,
        seed=1,
    )
    return _by_fit(job, work)


def compact(work: Path, precision: str) -> dict[str, float]:
    """Train the job of params.yaml, which mixes, erases and averages."""
    job = load_params().train.jobs[COMPACT].resolved(DATASET, "")
    return _by_fit(replace(job, epochs=2, precision=precision), work)


def step(name: str, work: Path) -> dict[str, float]:
    """Return the seconds of a step of a job of params.yaml, by precision, on images of noise."""
    import numpy as np

    from pipelines.fit import step_seconds

    params, rng = load_params(), np.random.default_rng(1)
    job = params.train.jobs[name].resolved("default")
    task = params.tasks.named("emotion" if job.task == "emotion" else "landmarks")
    count, folder = 8 * job.batch, work / f"noise-{job.task}" / "train"
    rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shape = (count, task.size, task.size, task.channels)
    arrays = {
        "ids": np.arange(count).astype(str),
        "images-00": rng.integers(0, 256, shape, np.uint8),
        "emotions": rng.integers(0, 7, count),
    }
    if job.task == "landmarks":
        del arrays["emotions"]
        arrays["landmarks-00"] = rng.uniform(0, 1, (count, 68, 2)).astype(np.float32)
        arrays["visible-00"] = np.ones((count, 68), bool)
    for file, array in arrays.items():
        np.save(folder / f"{file}.npy", array)
    meta = {"task": job.task, "size": task.size, "channels": task.channels, "views": 1}
    (folder.parent / "meta.json").write_text(json.dumps(meta | {"points": 68}))
    return step_seconds(job, folder.parent)


def _by_fit(job: "Job", work: Path) -> dict[str, float]:
    import keras
    import pandas as pd

    from models.cost import multiply_adds
    from pipelines.batches import Batches
    from pipelines.fit import fit

    out, spent = work / "run", [0.0]
    rmtree(out, ignore_errors=True)
    with patch.object(Batches, "__getitem__", _timed(Batches.__getitem__, spent)):
        fit(job, work / "shards", out, out / "checkpoint")
    speed = float(pd.read_csv(out / "history.csv")["images_per_second"].iloc[-1])
    images = json.loads((work / "shards/meta.json").read_text())["counts"]["train"]
    model = keras.models.load_model(out / "model.keras", compile=False)
    return {
        "images_per_second": speed,
        "waiting": spent[0] * speed / images,
        "multiply_adds": multiply_adds(model),
    }


def _timed(
    made: Callable[["Batches", int], tuple["np.ndarray", ...]], spent: list[float]
) -> Callable[["Batches", int], tuple["np.ndarray", ...]]:
    """Add up what the batches of the second epoch take to make.

    The first time alone: averaged weights take their statistics from some of them again.
    """
    counted = 0

    def item(batches: "Batches", index: int) -> tuple["np.ndarray", ...]:
        nonlocal counted
        start = time.perf_counter()
        batch = made(batches, index)
        if batches.epoch == 1 and counted < len(batches):
            spent[0] += time.perf_counter() - start
            counted += 1
        return batch

    return item


def generator(work: Path, precision: str) -> dict[str, float]:
    """Train from folders through ImageDataGenerator, which Keras keeps for old code."""
    from tensorflow.keras.preprocessing.image import ImageDataGenerator

    del precision
    flow = ImageDataGenerator().flow_from_directory(
        work / "folders",
        target_size=(SIZE, SIZE),
        color_mode="grayscale",
        batch_size=BATCH,
        class_mode="categorical",
    )
    return _fitted(flow, flow.samples)


def dataset(work: Path, precision: str) -> dict[str, float]:
    """Train from folders through a tf.data pipeline."""
    import keras

    del precision
    images = keras.utils.image_dataset_from_directory(
        work / "folders",
        label_mode="categorical",
        color_mode="grayscale",
        image_size=(SIZE, SIZE),
        batch_size=BATCH,
    )
    return _fitted(images, len(images.file_paths))


def _fitted(data: Any, images: int) -> dict[str, float]:
    import keras

    from models import emotion

    keras.utils.set_random_seed(1)
    model = emotion.build(NETWORK, (), SIZE, 1, 0.5)
    model.compile(keras.optimizers.Adam(1e-4), "categorical_crossentropy", metrics=["accuracy"])
    model.fit(data, epochs=1, verbose=0)
    start = time.perf_counter()
    model.fit(data, epochs=1, verbose=0)
    return {"images_per_second": round(images / (time.perf_counter() - start), 1)}


ARM: dict[str, Callable[[Path, str], dict[str, float]]] = {
    "ours": ours,
    "float32": lambda work, _: ours(work, "float32"),
    "generator": generator,
    "dataset": dataset,
    "compact": compact,
    "compact32": lambda work, _: compact(work, "float32"),
}


def page(results: dict[str, Any]) -> str:
    """Write the figures as Markdown."""
    from pipelines.report import markdown

    rounds, peak = results["rounds"], results["peak"]

    def figures(arm: str, name: str) -> list[float]:
        return [row[arm][name] for row in rounds]

    def speeds(arm: str) -> list[float]:
        return figures(arm, "images_per_second")

    def ratio(one: str, other: str) -> str:
        each = [a / b for a, b in zip(speeds(one), speeds(other), strict=True)]
        return f"{median(each):.2f} ({min(each):.2f} – {max(each):.2f})"

    def by_fit(arm: str, what: str) -> tuple[str, ...]:
        waiting = f"{median(figures(arm, 'waiting')):.1%}"
        operations = 6 * rounds[0][arm]["multiply_adds"] * median(speeds(arm))
        share = f"{operations / (1e12 * peak):.1%}" if peak else "no GPU"
        gain = ratio(arm, "float32" if arm in SAME else "compact32")
        return what, f"{median(speeds(arm)):,.0f}", gain, waiting, share

    table: list[tuple[str, ...]] = [
        (arm, f"{median(speeds(arm)):,.0f}", ratio("ours", arm), ratio("float32", arm))
        for arm in SAME
    ]
    names = {"ours": NETWORK, "float32": f"{NETWORK}, float32"}
    names |= {"compact": COMPACT, "compact32": f"{COMPACT}, float32"}
    own = [by_fit(*arm) for arm in names.items()]
    steps: list[tuple[str, ...]] = [
        (
            name,
            f"{1e3 * row['float32']:.1f}",
            f"{1e3 * row['mixed_bfloat16']:.1f}",
            f"{row['float32'] / row['mixed_bfloat16']:.2f}",
            row["precision"],
        )
        for name, row in results["steps"].items()
    ]
    how = (__doc__ or "").split("\n\n", 2)[2]
    return (
        f"# Speed of training\n\nWritten by\n\n```\n{results['command']}\n```\n\n"
        f"on {results['date']}: {results['images']:,} images of FER-2013, batches of {BATCH}, "
        f"rounds: {len(rounds)}; ours at {results['precision']}.\n\n{how}\n\n"
        + markdown(
            table,
            ("way", "images a second, median", "ours to it, with range", "float32 to it"),
        )
        + "\n"
        + markdown(
            own,
            ("job", "images a second, median", "to float32", "waits at most", "share of the peak"),
        )
        + "\n"
        + markdown(
            steps,
            ("job", "float32, ms a step", "mixed_bfloat16", "times as fast", "what it trains in"),
        )
    )


if __name__ == "__main__":
    run(main)
