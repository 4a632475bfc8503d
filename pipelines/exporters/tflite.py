"""TFLite: float32 and fully int8 files for LiteRT on phones, boards and in the browser.

Both take one image at a time, in float32: fixed shapes let the runtime plan its memory and hand
the whole graph to its fast kernels, and callers need not know which of the two they hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from pipelines.cli import whole_folder
from pipelines.exporters.quiet import quiet
from pipelines.exporters.source import check_calibration, open_model, signature

if TYPE_CHECKING:
    import tensorflow as tf


def export(model_path: Path, out: Path, calibration: np.ndarray) -> list[Path]:
    """Write `out/float32.tflite` and `out/int8.tflite`.

    The int8 file computes in eight bits throughout (weights per channel, activations per tensor;
    Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference") between a float32 input and a float32 output.

    Args:
        model_path: the `.keras` file.
        out: folder to write, whole or not at all; what it holds is replaced.
        calibration: float32 (n, H, W, C), values 0–255, from the train split.

    Returns:
        The two files.

    Raises:
        GrimaceError: the model or the calibration cannot be used, or the converter failed.
    """
    with quiet(f"TFLite export of {model_path}"), whole_folder(out) as folder:
        model = open_model(model_path)
        check_calibration(model, calibration)
        with TemporaryDirectory() as saved_model:
            model.export(
                saved_model,
                format="tf_saved_model",
                input_signature=signature(model, batch=1),
                verbose=False,
            )
            (folder / "float32.tflite").write_bytes(_converter(saved_model).convert())
            (folder / "int8.tflite").write_bytes(_int8(saved_model, calibration))
    return [out / "float32.tflite", out / "int8.tflite"]


def _int8(saved_model: str, calibration: np.ndarray) -> bytes:
    import tensorflow as tf

    def representative() -> Iterator[list[np.ndarray]]:
        for image in calibration:
            yield [image[None].astype(np.float32)]

    converter = _converter(saved_model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = representative
    # Without this an operation that has no int8 kernel would quietly stay in float.
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    return converter.convert()


def _converter(saved_model: str) -> tf.lite.TFLiteConverter:
    import tensorflow as tf

    return tf.lite.TFLiteConverter.from_saved_model(saved_model)
