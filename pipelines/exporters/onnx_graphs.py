"""ONNX graphs in float32 and with explicit int8 quantisation, which TensorRT builds from."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pipelines.exporters.source import check_calibration, open_model, signature

OPSET = 17
CALIBRATION_BATCH = 32
QUANTISED = ["Conv", "Gemm", "MatMul"]


def write(model_path: Path, folder: Path, calibration: np.ndarray) -> None:
    """Write `folder/float32.onnx` and `folder/int8.onnx`, for any number of images at once.

    Args:
        model_path: the `.keras` file.
        folder: where to write.
        calibration: float32 (n, H, W, C), values 0–255, from the train split.

    Raises:
        GrimaceError: the model or the calibration cannot be used.
    """
    model = open_model(model_path)
    check_calibration(model, calibration)
    model.export(
        folder / "float32.onnx",
        format="onnx",
        input_signature=signature(model, batch=None),
        opset_version=OPSET,
        verbose=False,
    )
    _quantise(folder / "float32.onnx", folder / "int8.onnx", calibration)


def _quantise(source: Path, target: Path, calibration: np.ndarray) -> None:
    """Put quantise/dequantise pairs before every convolution and dense layer.

    The recipe that TensorRT reads: symmetric in weights and activations, biases in float. Only
    inputs are quantised. To quantise outputs as well would round values before ReLU6 has cut
    them to its range, which costs two to four times the accuracy.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.feeds = _feeds(name, calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    with TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            Batches(onnx.load(source).graph.input[0].name),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=QUANTISED,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": QUANTISED,
            },
        )


def _feeds(name: str, calibration: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(calibration), CALIBRATION_BATCH):
        yield {name: calibration[start : start + CALIBRATION_BATCH].astype(np.float32)}
