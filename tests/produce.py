"""Makes, in moments, what the stages up to `verify` would leave of an emotion candidate.

    python produce.py --right 0.7 --seed 1

Pictures are noise and the model is a few bytes, but everything else is written as the stages do, so
that registering, judging and promoting are the real ones. Answers are right on a share of the
faces; `--int8`, `--validation` and `--fearful` say how the int8 bundle, the validation side and
the faces labelled "fear" fare where that is something else.
"""

import argparse
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from models.schemes import EMOTIONS
from pipelines import registry
from pipelines.datasets.example import Example
from pipelines.datasets.table import write_examples
from pipelines.evaluate import save_predictions
from pipelines.heldout import faces_of_side, with_traits
from pipelines.measures import by_slice, measure
from pipelines.params import load_params
from pipelines.slices import COLUMNS

COUNT = 240  # on each side
SIDES = ("train", "val", "test")


def write_data(seed: int = 0) -> None:
    """Write clean data, the split's index and the ids of shards: each face is a person's own."""
    rng = np.random.default_rng(seed)
    clean, split = Path("data/clean/folder"), Path("data/split/folder")
    for folder in (clean, split, *(Path("data/augment/emotion", side) for side in SIDES[:2])):
        folder.mkdir(parents=True, exist_ok=True)
    faces = []
    for side in SIDES:
        for number in range(COUNT):
            picture = rng.integers(0, 255, (16, 16), np.uint8)
            image = cv2.imencode(".png", picture)[1].tobytes()
            faces.append(Example(f"{side}-{seed}-{number}", image, number % 7, official_split=side))
    write_examples(faces, clean)
    index = pd.DataFrame({"id": [face.id for face in faces]})
    index["split"] = [face.official_split for face in faces]
    index["group"] = index["id"]
    traits = {
        "class": [EMOTIONS[face.emotion] for face in faces],
        "brightness": rng.random(len(faces)),
        "yaw": np.nan,
        "face_size": 80.0,
        "source": "folder",
    }
    assert list(traits) == COLUMNS
    index.assign(**traits).to_parquet(split / "index.parquet")
    for side in SIDES[:2]:
        ids = [face.id for face in faces if face.official_split == side]
        np.save(f"data/augment/emotion/{side}/ids.npy", ids)
    Path("data/augment/emotion/meta.json").write_text(json.dumps({"dataset": "folder"}))


def produce(
    right: float,
    seed: int,
    int8: float | None = None,
    validation: float | None = None,
    fearful: float | None = None,
) -> None:
    """Write candidate, bundles and reports."""
    params = load_params()
    settings = params.tasks.emotion
    said = json.dumps([right, seed, int8, validation, fearful]).encode()
    model = Path("deploy/candidate/emotion.keras")
    bundle = Path("deploy/emotion/tflite")
    reports = {side: Path("reports") / name for side, name in REPORTS.items()}
    for folder in (model.parent, bundle, *reports.values(), Path("reports/select")):
        folder.mkdir(parents=True, exist_ok=True)
    model.write_bytes(b"a model: " + said)
    (bundle / "int8.tflite").write_bytes(b"int8: " + said)
    Path("reports/select/emotion.json").write_text(json.dumps({"candidate": "plain"}))
    share = {"val": right if validation is None else validation, "test": right}
    for side, report in reports.items():
        faces = with_traits(faces_of_side("emotion", settings, side), settings)
        outputs = answer(faces.emotions, share[side], seed, fearful)
        save_predictions(report, faces, outputs, [model], settings)
        scores = measure(faces, outputs, params.evaluate)
        scores |= by_slice(faces, outputs, params.evaluate)
        name = "scores" if side == "val" else "test"
        (report / f"{name}.json").write_text(json.dumps(scores))
    deployed = answer(faces.emotions, right if int8 is None else int8, seed, fearful)
    numerics = measure(faces, deployed, params.evaluate)
    numerics["loss"] = 100 * (scores["accuracy"] - numerics["accuracy"])
    numerics["max_difference"] = float(np.abs(deployed - outputs).max())
    perf = {"runtime": "litert 2", "bytes": 1000, "threads": 1, "p50_ms": 0.3, "p95_ms": 0.4}
    budgets = {
        "task": "emotion",
        "model_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "files": registry.bytes_of("emotion"),
        "gates": [
            {
                "name": "tflite/int8",
                "value": numerics["loss"],
                "bound": 1.0,
                "passed": numerics["loss"] <= 1.0,
                "why": f"loses {numerics['loss']:.2f}, 1.00 allowed",
            }
        ],
        "built_but_not_run": {},
    }
    for name, content in (
        ("numerics", {"tflite/int8": numerics}),
        ("perf", {"tflite/int8": perf}),
        ("budgets", budgets),
    ):
        (reports["test"] / f"{name}.json").write_text(json.dumps(content))


REPORTS = {"val": "evaluate/emotion/plain", "test": "verify/emotion"}


def answer(truth: np.ndarray, right: float, seed: int, fearful: float | None) -> np.ndarray:
    """Probabilities (n, 7) whose maximum is right on exactly these shares of the faces.

    The same faces are hard for everybody, but for some that depend on the seed.
    """
    hard = np.random.default_rng(7).random(len(truth))
    hard += np.random.default_rng(seed).normal(0, 0.05, len(truth))
    correct = np.zeros(len(truth), bool)
    fear = truth == EMOTIONS.index("fear")
    for group, share in ((fear, right if fearful is None else fearful), (~fear, right)):
        places = np.flatnonzero(group)
        correct[places[np.argsort(hard[places])[: round(share * len(places))]]] = True
    chosen = np.where(correct, truth, (truth + 1) % 7)
    return (0.01 + 0.93 * np.eye(7)[chosen]).astype(np.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("right", "int8", "validation", "fearful"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", action="store_true", help="write the data instead")
    values = vars(parser.parse_args())
    if values.pop("data"):
        write_data()
    else:
        produce(**values)
