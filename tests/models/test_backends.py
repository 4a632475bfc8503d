"""What two of Keras's backends make of the same weights, images and labels, each in a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from models import losses
from tests.models.test_networks import small

ROOT = Path(__file__).parents[2]
NETWORKS = [
    *(("emotion", name) for name in ("residual", "emojify")),
    *(("landmarks", name) for name in ("plain", "simcc", "heatmap")),
]
EMOTION_LOSSES = ("cross_entropy", "focal")


def ask(folder: Path) -> dict[str, dict[str, float]]:
    """Load the networks, answer, and take a step with each loss; return the losses by network.

    Before a step, so that each is of the same weights; after the last, whether all is finite.
    """
    rng, found = np.random.default_rng(4), {}
    for task, name in NETWORKS:
        model = small(task, name)
        model.load_weights(folder / f"{task}-{name}.weights.h5")
        images = rng.uniform(0, 255, (6, *model.input_shape[1:])).astype(np.float32)
        if task == "emotion":
            labels = np.eye(7, dtype=np.float32)[rng.integers(0, 7, 6)]
            kinds = {kind: losses.emotion_loss(kind, 0.1) for kind in EMOTION_LOSSES}
        else:
            labels = rng.uniform(0, 1, (6, 15, 3)).astype(np.float32)
            labels[..., 2] = labels[..., 2] > 0.2
            kinds = {kind: losses.landmark_loss(kind) for kind in losses.PENALTIES}
        np.save(
            folder / f"{task}-{name}-{keras.backend.backend()}.npy",
            model.predict(images, verbose=0),
        )
        rows = {}
        for kind, loss in kinds.items():
            rows[kind] = float(np.mean(loss(labels, keras.ops.convert_to_tensor(model(images)))))
        model.compile("sgd", loss)
        model.train_on_batch(images, labels)
        rows["finite"] = float(all(np.isfinite(weight).all() for weight in model.get_weights()))
        found[f"{task}-{name}"] = rows
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict]:
    folder = tmp_path_factory.mktemp("backends")
    for task, name in NETWORKS:
        keras.utils.set_random_seed(3)
        small(task, name).save_weights(folder / f"{task}-{name}.weights.h5")
    code = (
        "import json, sys; from pathlib import Path; from tests.models import test_backends;"
        "print(json.dumps(test_backends.ask(Path(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        cwd=ROOT,
        env=os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, ask(folder), json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("task", "name"), NETWORKS)
def test_the_same_weights_answer_the_same(task: str, name: str, found) -> None:
    folder, *_ = found
    here, there = (np.load(folder / f"{task}-{name}-{kind}.npy") for kind in ("tensorflow", "jax"))
    assert np.ptp(here, 0).max() > 1e-4  # images differ
    np.testing.assert_allclose(there, here, atol=1e-5)


@pytest.mark.parametrize(("task", "name"), NETWORKS)
def test_losses_are_the_same_and_a_step_leaves_numbers(task: str, name: str, found) -> None:
    _, here, there = found
    one, other = here[f"{task}-{name}"], there[f"{task}-{name}"]
    assert one["finite"] == other["finite"] == 1
    assert one.keys() == other.keys() and len(one) > 2
    assert other == pytest.approx(one, rel=1e-4)
