from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pytest

from models import emotion, landmarks
from pipelines.exporters.quantisation import Calibration
from pipelines.runtimes import load


@dataclass(frozen=True)
class Trained:
    path: Path
    images: np.ndarray  # float32 (24, 32, 32, C)
    outputs: np.ndarray  # what Keras makes of them
    calibration: Calibration  # that any graph keeps to

    def errors(self, artefact: Path) -> np.ndarray:
        with load(artefact) as runtime:
            return np.abs(runtime.predict(self.images) - self.outputs)


@pytest.fixture(scope="session")
def emotion_model(tmp_path_factory) -> Trained:
    keras.utils.set_random_seed(1)
    model = emotion.build("residual", widths=(8, 16), size=32, channels=1, dropout=0.2)
    return _trained(model, tmp_path_factory.mktemp("emotion") / "model.keras")


@pytest.fixture(scope="session")
def landmark_model(tmp_path_factory) -> Trained:
    keras.utils.set_random_seed(1)
    model = landmarks.build("plain", widths=(8, 16), size=32, channels=3, dropout=0.2, points=68)
    head = model.layers[-2]
    head.kernel.assign(0.1 * head.kernel)  # or else it puts points a whole crop away
    return _trained(model, tmp_path_factory.mktemp("landmarks") / "model.keras")


@pytest.fixture(scope="session")
def simcc_model(tmp_path_factory) -> Trained:
    """A network that decodes, with scores somewhat sharper than at first."""
    keras.utils.set_random_seed(1)
    model = landmarks.build("simcc", widths=(8, 16), size=32, channels=1, dropout=0.0, points=68)
    logits = model.get_layer("logits")
    logits.kernel.assign(2 * logits.kernel)
    return _trained(model, tmp_path_factory.mktemp("simcc") / "model.keras")


def _trained(model, path: Path) -> Trained:
    """Give batch normalisation statistics as training would: an untouched one hides errors."""
    rng = np.random.default_rng(3)
    pictures = _pictures(rng, 64, model.inputs[0].shape[-1])
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for norm in norms:
        norm.gamma.assign(rng.uniform(0.5, 1.5, norm.gamma.shape))
        norm.beta.assign(rng.normal(0, 0.3, norm.beta.shape))
        norm.momentum = 0.5
    for _ in range(8):
        model(pictures, training=True)
    model.save(path)
    images = _pictures(rng, 24, model.inputs[0].shape[-1])
    outputs = model.predict(images, verbose=0)
    calibration = judged_by_movement(pictures, images, outputs, bound=1.0)
    return Trained(path, images, outputs, calibration)


def judged_by_movement(pictures, images, outputs, bound: float) -> Calibration:
    """What is lost is the mean distance from what Keras answers."""

    def loss(answers: np.ndarray) -> float:
        return float(np.abs(answers.reshape(outputs.shape) - outputs).mean())

    return Calibration(pictures, images, loss, bound, "of the crop")


def _pictures(rng: np.random.Generator, count: int, channels: int) -> np.ndarray:
    """Blots on ramps under a little noise, over the full range of pixel values."""
    y, x = np.mgrid[:32, :32] / 31
    centre = rng.uniform(0.2, 0.8, (2, count, 1, 1, channels))
    blot = np.exp(-((x[..., None] - centre[0]) ** 2 + (y[..., None] - centre[1]) ** 2) / 0.05)
    ramp = x[..., None] * rng.uniform(-1, 1, (count, 1, 1, channels))
    values = 90 + 150 * blot + 60 * ramp + rng.normal(0, 8, blot.shape)
    return values.clip(0, 255).astype(np.float32)
