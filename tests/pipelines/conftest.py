"""A small world for the stages after training: drawn faces, two models a task, exported once.

Each fixture runs one stage for both tasks and hands on the same folder; tests that change
something work on a copy. Stages are imported in the fixtures, because the other tests here need
none of them.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import yaml

from models.schemes import EMOTIONS
from pipelines.datasets import synthetic
from pipelines.datasets.example import Example
from pipelines.datasets.table import write_examples
from pipelines.params import Params, load_params

if TYPE_CHECKING:
    from pipelines.heldout import Faces

ROOT = Path(__file__).parents[2]
TASKS = ("emotion", "landmarks")


@dataclass(frozen=True)
class World:
    root: Path
    params: Params
    faces: list[Example]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Work in its folder. TF.js runs in Node, which starts quicker than Chromium."""
        with chdir(self.root), pytest.MonkeyPatch.context() as patch:
            patch.setenv("GRIMACE_TFJS_HOST", "node")
            yield

    def call(self, main: Callable[[], None], *arguments: str) -> None:
        with self.inside(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["stage", *arguments])
            main()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Data on three sides, shards, and of each task a weak model "plain", a better "compact"."""
    from pipelines import augment
    from pipelines.heldout import crop_all
    from pipelines.split import make_index
    from pipelines.views import Recipe

    root = tmp_path_factory.mktemp("world")
    (root / "params.yaml").write_text(yaml.safe_dump(_small_params(root)))
    params = load_params(root / "params.yaml")
    faces = list(synthetic.examples(70, 5))
    world = World(root, params, faces)
    with world.inside():
        clean, split = Path("data/clean/synthetic"), Path("data/split/synthetic")
        clean.mkdir(parents=True)
        write_examples(faces, clean)
        split.mkdir(parents=True)
        measured = pd.DataFrame(
            {
                "id": [face.id for face in faces],
                "person": [face.person for face in faces],
                "cluster": "",
                "brightness": np.linspace(0, 1, len(faces)),
                "yaw": np.linspace(-60, 60, len(faces)),
                "face_size": 80.0,
            }
        )
        make_index(faces, "synthetic", params.split, measured).to_parquet(split / "index.parquet")
        for task in TASKS:
            shards = Path("data/augment", task)
            shards.mkdir(parents=True)
            index = augment.usable(clean, split / "index.parquet", task)
            settings = params.tasks.named(task), params.augment.named(task)
            augment.write_shards(Recipe(task, *settings, seed=1), index, shards, workers=1)
        for task in TASKS:
            crops = crop_all(faces, task, params.tasks.named(task))
            for model, ridge in (("plain", 1e9), ("compact", 5.0)):
                path = Path("runs", task, model, "model.keras")
                path.parent.mkdir(parents=True)
                _fit(crops, ridge, path)
    return world


@pytest.fixture(scope="session")
def evaluated(world: World) -> World:
    from pipelines import evaluate

    with world.inside():
        for job in world.params.train.jobs:
            evaluate.evaluate_job(job, world.params)
    return world


@pytest.fixture(scope="session")
def selected(evaluated: World) -> World:
    from pipelines import select

    for task in TASKS:
        evaluated.call(select.main, "--task", task)
    return evaluated


@pytest.fixture(scope="session")
def exported(selected: World) -> World:
    from pipelines import export

    for task in TASKS:
        selected.call(export.main, "--task", task)
    return selected


@pytest.fixture(scope="session")
def verified(exported: World) -> World:
    from pipelines import verify

    with exported.inside():
        for task in TASKS:
            verify.verify(task, exported.params)
    return exported


def _small_params(root: Path) -> dict:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for task, channels in (("emotion", 1), ("landmarks", 3)):
        params["tasks"][task] |= {"dataset": "synthetic", "size": 16, "channels": channels}
        params["augment"][task] |= {"views": 1, "policies": {"none": []}, "policy": "none"}
    params["tracking"]["uri"] = f"sqlite:///{root}/mlflow.db"
    params["download"]["synthetic"] = {"count": 70, "seed": 5}
    params["split"] |= {"seed": 10, "val": 0.25, "test": 0.25}  # 6, 4 and 4 people
    params["evaluate"] |= {"resamples": 200, "gallery": 4}
    params["export"] = {"calibration": 16, "trial": 16, "aim": 0.5, "engines": ["sm89"]}
    # On twenty faces one changed answer is five points.
    budgets = {"accuracy_points": {"default": 60.0}, "nme_relative": 0.5}
    runtimes = {"tflite": ["litert"], "tfjs": ["node"]}  # those that start quickest
    params["verify"] |= budgets | {"latency_runs": 10, "runtimes": runtimes}
    return params


def _fit(faces: "Faces", ridge: float, path: Path) -> None:
    """Save a linear model by ridge regression on all faces, with no time spent on training.

    At 5 it is right on most faces of any side but not on all; a huge ridge answers the mean.
    """
    import keras
    from keras import layers

    pixels = faces.images.reshape(len(faces.images), -1) / 255.0
    landmarks = faces.landmarks is not None
    shape = faces.landmarks.shape[1:] if landmarks else (len(EMOTIONS),)
    target = faces.landmarks if landmarks else 4 * np.eye(len(EMOTIONS))[faces.emotions]
    target = target.reshape(len(target), -1)
    mean, offset = pixels.mean(0), target.mean(0)
    centred = pixels - mean
    kernel = centred @ centred.T + ridge * np.eye(len(centred))
    weights = centred.T @ np.linalg.solve(kernel, target - offset)
    inputs = keras.Input(faces.images.shape[1:], name="image")
    x = layers.Flatten()(layers.Rescaling(1 / 255)(inputs))
    dense = layers.Dense(weights.shape[1])
    x = dense(x)
    dense.set_weights([weights, offset - mean @ weights])
    outputs = layers.Reshape(shape)(x) if landmarks else layers.Softmax()(x)
    keras.Model(inputs, outputs).save(path)
