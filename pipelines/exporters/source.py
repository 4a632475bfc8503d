"""The Keras model that every exporter starts from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.decoders import LOGITS
from pipelines.cli import GrimaceError
from pipelines.runtimes.runtime import refused

if TYPE_CHECKING:
    import keras

DECODED = rf"(^|[/;]){LOGITS}(_\d+)?[/;]"
"""Finds the layer whose output is decoded by the names that converters make of its own."""


def open_model(path: Path) -> keras.Model:
    """Load a `.keras` file for conversion.

    Raises:
        GrimaceError: it is missing or damaged, or Keras runs on another backend than TensorFlow,
            the only one whose graphs the converters read.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        raise GrimaceError(
            f"exporting needs Keras on TensorFlow, and it runs on {keras.backend.backend()}; unset "
            "KERAS_BACKEND. A model trained under another backend loads as it is"
        )
    if not path.is_file():
        raise GrimaceError(f"{path} does not exist; train a model first")
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:
        raise refused(f"keras {keras.__version__}", path, error) from error


def signature(model: keras.Model, batch: int | None) -> list[keras.InputSpec]:
    """Describe the model's input for `model.export`: `batch` images, any number where None."""
    import keras

    shape = (batch, *model.inputs[0].shape[1:])
    return [keras.InputSpec(shape=shape, dtype="float32", name="image")]


def check_calibration(model: keras.Model, calibration: np.ndarray) -> None:
    """Refuse calibration images from which an int8 model would come out wrong.

    Raises:
        GrimaceError: there are none, they have another shape, or they were rescaled.
    """
    wanted = tuple(model.inputs[0].shape[1:])
    if calibration.shape[1:] != wanted or not len(calibration):
        raise GrimaceError(
            f"calibration images have the shape {calibration.shape}; the model needs "
            f"(n, {', '.join(map(str, wanted))}) with n of at least 1, from the train split"
        )
    if not 1 < calibration.max() <= 255 or calibration.min() < 0:
        raise GrimaceError(
            f"calibration images range from {calibration.min():g} to {calibration.max():g}; the "
            "model takes raw pixels from 0 to 255, so pass them as they are"
        )
