import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipelines.runtimes import Runtime, UnavailableError, load

HEIGHT, WIDTH, CHANNELS = 6, 4, 3
# By the beginning of its name: what a runtime opens, and how it is asked for.
NAMES = {
    "keras": ("mean.keras", None),
    "litert ": ("mean.tflite", None),
    "litertjs-chromium (wasm)": ("mean.tflite", "litertjs"),
    "onnxruntime": ("mean.onnx", None),
    "tfjs-node (wasm)": ("mean_tfjs", "node"),
    "tfjs-chromium (wasm)": ("mean_tfjs", "wasm"),
    "tfjs-chromium (webgl": ("mean_tfjs", "webgl"),
    "tfjs-chromium (webgpu": ("mean_tfjs", "webgpu"),
}


@pytest.fixture(scope="session")
def mean_models(tmp_path_factory) -> Path:
    """The same small function in every format: the mean colour of a picture that is not square."""
    folder = tmp_path_factory.mktemp("models")
    _keras_and_tflite(folder)
    onnx.save(_onnx_graph(inputs=1), folder / "mean.onnx")
    onnx.save(_onnx_graph(inputs=2), folder / "two_inputs.onnx")
    _tfjs(folder / "mean_tfjs")
    return folder


@pytest.fixture(scope="session", params=NAMES)
def opened(request, mean_models) -> Iterator[tuple[str, Runtime]]:
    """Each runtime's expected name, with the function open in it."""
    name = request.param
    file, asked = NAMES[name]
    try:
        runtime = load(mean_models / file, runtime=asked)
    except UnavailableError as error:
        if shutil.which("chromium") and asked != "webgpu":
            raise
        pytest.skip(str(error))
    with runtime:
        yield name, runtime


@pytest.fixture(params=["node", "chromium"])
def host(request, monkeypatch) -> str:
    choose_host(request.param, monkeypatch)
    return request.param


def choose_host(name: str, patch: pytest.MonkeyPatch) -> None:
    if name == "chromium" and not shutil.which("chromium"):
        pytest.skip("no chromium on PATH")
    patch.setenv("GRIMACE_TFJS_HOST", name)


def _keras_and_tflite(folder: Path) -> None:
    import keras
    import tensorflow as tf

    image = keras.Input((HEIGHT, WIDTH, CHANNELS))
    model = keras.Model(image, keras.layers.GlobalAveragePooling2D()(image))
    model.save(folder / "mean.keras")

    @tf.function(input_signature=[tf.TensorSpec((1, HEIGHT, WIDTH, CHANNELS), tf.float32)])
    def mean(image):
        return tf.reduce_mean(image, (1, 2))

    graph = mean.get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([graph])
    (folder / "mean.tflite").write_bytes(converter.convert())


def _onnx_graph(inputs: int) -> onnx.ModelProto:
    shape = ["n", HEIGHT, WIDTH, CHANNELS]
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["image0"], ["mean"], axes=[1, 2], keepdims=0)],
        "mean",
        [
            helper.make_tensor_value_info(f"image{index}", TensorProto.FLOAT, shape)
            for index in range(inputs)
        ],
        [helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["n", CHANNELS])],
    )
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8)


def _tfjs(folder: Path) -> None:
    folder.mkdir()
    sizes = [{"size": str(size)} for size in (-1, HEIGHT, WIDTH, CHANNELS)]
    real, whole = {"type": "DT_FLOAT"}, {"type": "DT_INT32"}
    axes = {"dtype": "DT_INT32", "tensorShape": {"dim": [{"size": "2"}]}}
    nodes = [
        {
            "name": "image",
            "op": "Placeholder",
            "attr": {"dtype": real, "shape": {"shape": {"dim": sizes}}},
        },
        {
            "name": "axes",
            "op": "Const",
            "attr": {"dtype": whole, "value": {"tensor": axes}},
        },
        {
            "name": "mean",
            "op": "Mean",
            "input": ["image", "axes"],
            "attr": {"T": real, "Tidx": whole, "keep_dims": {"b": False}},
        },
    ]
    weights = [{"name": "axes", "shape": [2], "dtype": "int32"}]
    model = {
        "format": "graph-model",
        "modelTopology": {"node": nodes, "versions": {}},
        "weightsManifest": [{"paths": ["shard.bin"], "weights": weights}],
    }
    (folder / "model.json").write_text(json.dumps(model))
    (folder / "shard.bin").write_bytes(np.array([1, 2], np.int32).tobytes())
