"""TFLite: float32, float16, dynamic and full int8 files for LiteRT on phones, boards and browsers.

All take one image at a time, in float32: fixed shapes let the runtime plan its memory and hand
the whole graph to its fast kernels, and callers need not know which of them they hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from shutil import move
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipelines.cli import whole_folder
from pipelines.exporters.quantisation import Calibration, spare_layers
from pipelines.exporters.quiet import quiet
from pipelines.exporters.source import DECODED, check_calibration, open_model, signature

WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL")


def export(model_path: Path, out: Path, calibration: Calibration) -> dict[str, dict[str, Any]]:
    """Write `out/float32.tflite`, `float16.tflite`, `dynamic.tflite` and `int8.tflite`.

    float16 halves the weights. dynamic has them in int8 and rounds activations as they come, each
    image with its own ranges; convolutions and dense layers only. int8 computes in eight bits
    throughout, with weights per channel and activations per tensor (Jacob et al. 2018,
    "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference"), but for what comes before the first and after the last layer with weights, and
    for layers that `spare_layers` finds too sensitive.

    Args:
        model_path: the `.keras` file.
        out: folder to write, whole or not at all; what it holds is replaced.
        calibration: faces and bound of the int8 file.

    Returns:
        What there is, by variant: `file`, `precision`, `versions`, and of int8 `quantisation`.

    Raises:
        GrimaceError: the model or the calibration cannot be used, or the converter failed.
    """
    with quiet(f"TFLite export of {model_path}"), whole_folder(out) as folder:
        import tensorflow as tf

        model = open_model(model_path)
        check_calibration(model, calibration.images)
        with TemporaryDirectory() as saved_model:
            model.export(
                saved_model,
                format="tf_saved_model",
                input_signature=signature(model, batch=1),
                verbose=False,
            )
            converter = tf.lite.TFLiteConverter.from_saved_model(saved_model)
            (folder / "float32.tflite").write_bytes(converter.convert())
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            (folder / "dynamic.tflite").write_bytes(converter.convert())
            converter.target_spec.supported_types = [tf.float16]
            (folder / "float16.tflite").write_bytes(converter.convert())
            found = _int8(saved_model, folder, calibration)
        variants: dict[str, dict[str, Any]] = {
            name: {
                "file": f"{name}.tflite",
                "precision": "dynamic int8" if name == "dynamic" else name,
                "versions": _versions(folder / f"{name}.tflite"),
            }
            for name in ("float32", "float16", "dynamic", "int8")
        }
    variants["int8"]["quantisation"] = found
    return variants


def _int8(saved_model: str, folder: Path, calibration: Calibration) -> dict[str, Any]:
    """Write `folder/int8.tflite`; return what `spare_layers` found."""
    import tensorflow as tf

    def representative() -> Iterator[list[np.ndarray]]:
        for image in calibration.images:
            yield [image[None].astype(np.float32)]

    converter = tf.lite.TFLiteConverter.from_saved_model(saved_model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = representative
    # The debugger takes the ranges once; then each set of layers left in float is made in a moment.
    debugger = tf.lite.experimental.QuantizationDebugger(
        converter=converter, debug_dataset=representative
    )
    layers, ends = _parts(debugger.calibrated_model)
    with TemporaryDirectory() as scratch:
        made: list[Path] = []

        def quantise(kept: Sequence[str]) -> Path:
            debugger.options = tf.lite.experimental.QuantizationDebugOptions(
                denylisted_nodes=[*ends, *(name for layer in kept for name in layers[layer])]
            )
            made.append(Path(scratch, f"{len(made)}.tflite"))
            made[-1].write_bytes(debugger.get_nondebug_quantized_model())
            return made[-1]

        best, found = spare_layers(list(layers), quantise, folder / "float32.tflite", calibration)
        move(best, folder / "int8.tflite")
    return {"weights": "per channel", "activations": "per tensor", "ranges": "minmax", **found}


def _parts(content: bytes) -> tuple[dict[str, list[str]], list[str]]:
    """Name the operations that compute in eight bits, by layer, and those at both ends.

    A layer is one with weights and what follows up to the next, such as a pooling, which would
    otherwise round what the layer gives out. What comes before the first rescales the pixels,
    which in eight bits would round them twice. What comes after the last decodes. The last is the
    one called "logits" where there is one, for a decoding that takes expectations multiplies by
    constants too. Operations go by the names of their outputs.
    """
    from tensorflow.lite.tools import flatbuffer_utils

    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))
    graph = model.subgraphs[0]
    names = [graph.tensors[operator.outputs[0]].name.decode() for operator in graph.operators]
    weighted = [
        place
        for place, operator in enumerate(graph.operators)
        if flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex) in WEIGHTED
    ]
    decoded = [place for place in weighted if re.search(DECODED, names[place])]
    last = max(decoded or weighted)
    starts = [place for place in weighted if place <= last]
    layers = {
        names[start]: names[start:end]
        for start, end in zip(starts, [*starts[1:], last + 1], strict=True)
    }
    return layers, [*names[: starts[0]], *names[last + 1 :]]


def _versions(file: Path) -> dict[str, Any]:
    """Return the version of the file's schema, and the oldest runtime that takes its operations."""
    from tensorflow.lite.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(file))
    found: dict[str, Any] = {"schema": model.version}
    for entry in model.metadata or []:
        if entry.name == b"min_runtime_version":
            data = bytes(model.buffers[entry.buffer].data).rstrip(b"\0")
            found["oldest_runtime"] = data.decode()
    return found
