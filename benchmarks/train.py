"""Speed of training: ours beside the two ways that people start with, on the same network.

    GRIMACE_ARCHIVES=DIR python -m pipelines.download --dataset fer2013
    python -m benchmarks.train --publish

The same network (the Emojify project's, `models.emotion`) learns from the same images of FER-2013:
  ours       `pipelines.fit` on shards that `augment` wrote, at the precision given
  float32    the same in float32
  generator  Emojify's way: Keras's ImageDataGenerator over folders of image files
  dataset    `keras.utils.image_dataset_from_directory` over the same folders, as it comes
Every measurement has a process of its own, and rounds are interleaved, so that what else the
machine does falls on all alike. Two epochs are trained and the second is timed. The share of time
that the loop waits for data is that of preparing all batches without training, to that of training.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import Any

import numpy as np

from benchmarks.publication import show
from pipelines.cli import GrimaceError, run

DATASET, NETWORK, BATCH, SIZE = "fer2013", "emojify", 64, 48
OUT = Path("docs/results/train")
ARMS = ("ours", "float32", "generator", "dataset")


def main() -> None:
    """Measure all, print the page, and publish it when asked."""
    args = _arguments()
    if args.measure:
        print(json.dumps(ARM[args.measure](args.work, args.precision)))
        return
    total = prepare(args.raw, args.work, args.limit)
    rounds = [{arm: in_its_own_process(arm, args) for arm in ARMS} for _ in range(args.repeats)]
    results = {
        "command": f"python -m benchmarks.train --precision {args.precision} "
        f"--limit {args.limit} --repeats {args.repeats}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "images": total,
        "precision": args.precision,
        "rounds": rounds,
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
    parser.add_argument("--publish", action="store_true", help=f"write {OUT}")
    parser.add_argument("--work", type=Path, default=Path("data/benchmarks/train"), help="scratch")
    parser.add_argument("--measure", choices=ARMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(raw: Path, work: Path, limit: int) -> int:
    """Lay the images out twice: in class folders, and as shards; return their number."""
    from pipelines.augment import usable, write_shards
    from pipelines.crops import crop, decode, face_box
    from pipelines.datasets import builder
    from pipelines.datasets.table import read_examples, write_examples
    from pipelines.params import load_params
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


def in_its_own_process(arm: str, args: argparse.Namespace) -> dict[str, float]:
    """Run this module for one measurement."""
    command = [sys.executable, "-m", "benchmarks.train", "--measure", arm]
    command += ["--work", str(args.work), "--precision", args.precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise GrimaceError(f"{arm} failed: see above")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{arm}: {figures}", flush=True)
    return figures


def ours(work: Path, precision: str) -> dict[str, float]:
    """Train by `pipelines.fit`."""
    import pandas as pd

    from pipelines.batches import Batches
    from pipelines.fit import fit
    from pipelines.job import Job
    from pipelines.shards import read_view

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
    out = work / "run"
    rmtree(out, ignore_errors=True)
    fit(job, work / "shards", out, out / "checkpoint")
    speed = float(pd.read_csv(out / "history.csv")["images_per_second"].iloc[-1])
    view = read_view(work / "shards", "train", 1)
    batches = Batches(view, BATCH, np.random.default_rng(1).permutation(len(view.ids)))
    start = time.perf_counter()
    for index in range(len(batches)):
        batches[index]
    waiting = (time.perf_counter() - start) * speed / len(view.ids)
    return {"images_per_second": speed, "waiting": waiting}


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
}


def page(results: dict[str, Any]) -> str:
    """Write the figures as Markdown."""
    from pipelines.report import markdown

    rounds = results["rounds"]

    def speeds(arm: str) -> list[float]:
        return [row[arm]["images_per_second"] for row in rounds]

    def ratio(other: str) -> str:
        each = [a / b for a, b in zip(speeds("ours"), speeds(other), strict=True)]
        return f"{median(each):.2f} ({min(each):.2f} – {max(each):.2f})"

    table: list[tuple[str, ...]] = [
        (arm, f"{median(speeds(arm)):,.0f}", ratio(arm)) for arm in ARMS
    ]
    waiting = median(row["ours"]["waiting"] for row in rounds)
    how = (__doc__ or "").split("\n\n")[2]
    return (
        f"# Speed of training\n\nWritten by\n\n```\n{results['command']}\n```\n\n"
        f"on {results['date']}: {results['images']:,} images of FER-2013, batches of {BATCH}, "
        f"rounds: {len(rounds)}; ours at {results['precision']}.\n\n{how}\n\n"
        + markdown(table, ("way", "images a second, median", "ours to it, with range"))
        + f"\nOur loop waits for data {waiting:.1%} of its time.\n"
    )


if __name__ == "__main__":
    run(main)
