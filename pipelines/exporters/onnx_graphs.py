"""ONNX graphs for ONNX Runtime and TensorRT: float32, float16 and explicit int8 quantisation."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from shutil import move
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipelines.exporters.quantisation import Calibration, answers, spare_layers
from pipelines.exporters.source import DECODED, check_calibration, open_model, signature

OPSET = 17
CALIBRATION_BATCH = 32
QUANTISED = ["Conv", "Gemm", "MatMul"]
# By ONNX Runtime's name, the cheapest first: its settings, and of how many images it takes one.
# Histograms hold every activation, so that an eighth of the images fills them well.
RANGES: dict[str, tuple[dict[str, Any], int]] = {
    "MinMax": ({}, 1),
    "Percentile": ({"percentile": 99.99}, 8),
    "Entropy": ({}, 8),
}


def write(model_path: Path, folder: Path, calibration: Calibration) -> dict[str, dict[str, Any]]:
    """Write `float32.onnx`, `float16.onnx` and `int8.onnx`, for any number of images at once.

    All take and give float32.

    Args:
        model_path: the `.keras` file.
        folder: where to write.
        calibration: faces and bound of the int8 graph.

    Returns:
        What there is, by variant: `file`, `precision`, `versions`, and of int8 `quantisation`.

    Raises:
        GrimaceError: the model or the calibration cannot be used.
    """
    import onnx

    model = open_model(model_path)
    check_calibration(model, calibration.images)
    model.export(
        folder / "float32.onnx",
        format="onnx",
        input_signature=signature(model, batch=None),
        opset_version=OPSET,
        verbose=False,
    )
    _halve(folder / "float32.onnx", folder / "float16.onnx")
    found = _quantise(folder / "float32.onnx", folder / "int8.onnx", calibration)
    variants: dict[str, dict[str, Any]] = {}
    for name in ("float32", "float16", "int8"):
        graph = onnx.load(folder / f"{name}.onnx")
        opsets = {entry.domain or "ai.onnx": entry.version for entry in graph.opset_import}
        versions = {"ir": graph.ir_version, "opset": opsets["ai.onnx"]}
        variants[name] = {"file": f"{name}.onnx", "precision": name, "versions": versions}
    variants["int8"]["quantisation"] = found
    return variants


def _halve(source: Path, target: Path) -> None:
    """Compute in float16, but for the decoding: half a unit of it is a thousandth of the crop."""
    import onnx
    from onnxconverter_common.float16 import convert_float_to_float16
    from onnxruntime.quantization.onnx_model import ONNXModel

    graph = onnx.load(source)
    half = ONNXModel(
        convert_float_to_float16(
            graph, keep_io_types=True, node_block_list=_decoding(graph.graph.node)
        )
    )
    half.topological_sort()  # casts were appended at the end
    half.save_model_to_file(str(target))


def _quantise(source: Path, target: Path, calibration: Calibration) -> dict[str, Any]:
    """Put quantise/dequantise pairs before convolutions and dense layers; say which and how.

    The recipe that TensorRT reads: symmetric in weights and activations, biases in float. Only
    inputs are quantised. To quantise outputs as well would round values before ReLU6 has cut
    them to its range, which costs two to four times the accuracy.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory() as scratch:
        prepared = Path(scratch, "prepared.onnx")
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        nodes = onnx.load(prepared).graph.node
        decoding = _decoding(nodes)
        layers = [n.name for n in nodes if n.op_type in QUANTISED and n.name not in decoding]
        made: list[Path] = []

        def quantise(method: str, kept: Sequence[str]) -> Path:
            made.append(Path(scratch, f"{len(made)}.onnx"))
            _insert_pairs(prepared, made[-1], [*decoding, *kept], method, scratch)
            return made[-1]

        losses: dict[str, float] = {}
        for tried in RANGES:
            _take_ranges(prepared, tried, calibration.images, scratch)
            losses[tried] = calibration.loss(answers(quantise(tried, ()), calibration.trial))
            if losses[tried] <= calibration.bound:
                break
        method = min(losses, key=losses.__getitem__)
        best, found = spare_layers(layers, partial(quantise, method), source, calibration)
        move(best, target)
    return {
        "weights": "per channel, symmetric",
        "activations": "per tensor, symmetric",
        "ranges": method.lower(),
        "loss_by_ranges": {name.lower(): loss for name, loss in losses.items()},
        **found,
    }


def _decoding(nodes: Sequence[Any]) -> list[str]:
    """Name the nodes after the layer called "logits"; none where there is no such layer."""
    places = [place for place, node in enumerate(nodes) if re.search(DECODED, node.name)]
    return [node.name for node in nodes[places[-1] + 1 :]] if places else []


def _take_ranges(prepared: Path, method: str, images: np.ndarray, scratch: str) -> None:
    """Take the activations' ranges once, for all graphs that are made of them."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator, save_tensors_data

    class Batch(CalibrationDataReader):
        def __init__(self, feed: dict[str, np.ndarray]) -> None:
            self.feeds = iter([feed])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    settings, stride = RANGES[method]
    calibrator = create_calibrator(
        prepared,
        QUANTISED,
        augmented_model_path=str(Path(scratch, "augmented.onnx")),
        calibrate_method=CalibrationMethod[method],
        extra_options={"symmetric": True, **settings},
    )
    # A histogram holds all activations of what it is given at once: hence batch by batch.
    for feed in _feeds(onnx.load(prepared).graph.input[0].name, images[::stride]):
        calibrator.collect_data(Batch(feed))
    save_tensors_data(calibrator.compute_data(), Path(scratch, f"{method}.json"))


def _insert_pairs(
    prepared: Path, target: Path, excluded: list[str], method: str, scratch: str
) -> None:
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    quantize_static(
        prepared,
        target,
        None,
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=QUANTISED,
        nodes_to_exclude=excluded,
        calibrate_method=CalibrationMethod[method],
        calibration_cache_path=Path(scratch, f"{method}.json"),
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": QUANTISED,
        },
    )


def _feeds(name: str, images: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(images), CALIBRATION_BATCH):
        yield {name: images[start : start + CALIBRATION_BATCH].astype(np.float32)}
