"""Opens a model in the runtime it is meant for, so that what is verified is what is deployed."""

import os
from pathlib import Path
from typing import Any

from pipelines.cli import GrimaceError
from pipelines.runtimes.runtime import Runtime, UnavailableError

__all__ = ["RUNTIMES", "Runtime", "UnavailableError", "load", "most_threads"]

# By the target of a bundle, those that its graphs run in; engines, in the bundle "tensorrt" too,
# stand apart.
RUNTIMES = {
    "tflite": ("litert", "litertjs"),
    "tfjs": ("wasm", "node", "webgl", "webgpu"),
    "tensorrt": ("onnxruntime",),
    "engine": ("tensorrt",),
}
TARGETS = {".tflite": "tflite", ".onnx": "tensorrt", ".engine": "engine"}


def load(path: Path, threads: int = 1, runtime: str | None = None) -> Runtime:
    """Open a model in the runtime that its name calls for.

    Args:
        path: a `.keras`, `.tflite`, `.onnx` or `.engine` file, or a folder that holds a TF.js
            graph model (`model.json` and its shards).
        threads: threads to compute with. See `most_threads`; Keras leaves it to its backend
            (`Runtime.threads` says what holds).
        runtime: of those in `RUNTIMES` for such a file the one to open it in; by default LiteRT,
            ONNX Runtime, TensorRT, and TF.js in Chromium where there is one, else in Node.

    Returns:
        The open model. Use it in a `with` block: TF.js runs in a process of its own.

    Raises:
        UnavailableError: this machine lacks what the runtime needs.
        GrimaceError: nothing is there, it is no model, it is damaged, or it does not map one
            image to one output; or it is not for this runtime.
    """
    if not path.exists():
        raise GrimaceError(f"{path} does not exist; export the model first")
    target = "tfjs" if path.is_dir() else TARGETS.get(path.suffix, "")
    if runtime and runtime not in RUNTIMES.get(target, ()):
        raise GrimaceError(f"{path} does not run in {runtime}; it runs in {_known(target)}")
    # The libraries are heavy, so only the one that is needed gets imported.
    if path.is_dir():
        if not (path / "model.json").is_file():
            raise GrimaceError(
                f"{path} is a folder without a model.json, so it is no TF.js model; "
                "name the folder that holds model.json, or a .keras, .tflite or .onnx file"
            )
        from pipelines.runtimes import tfjs

        asked: Any = runtime
        return tfjs.load(path, threads, asked)
    if path.suffix == ".keras":
        from pipelines.runtimes import keras_model

        return keras_model.load(path)
    if runtime == "litertjs":
        from pipelines.runtimes import litertjs

        return litertjs.load(path, threads)
    if path.suffix == ".tflite":
        from pipelines.runtimes import litert

        return litert.load(path, threads)
    if path.suffix == ".onnx":
        from pipelines.runtimes import onnx_runtime

        return onnx_runtime.load(path, threads)
    if path.suffix == ".engine":
        from pipelines.runtimes import tensorrt

        return tensorrt.load(path, threads)
    raise GrimaceError(
        f"{path}: no runtime is known for '{path.suffix or path.name}'; give a .keras, .tflite, "
        ".onnx or .engine file, or a TF.js folder with a model.json"
    )


def _known(target: str) -> str:
    return ", ".join(RUNTIMES.get(target, ("Keras",)))


def most_threads(runtime: str) -> int:
    """Return how many threads a runtime of `RUNTIMES` can compute with on this machine.

    TF.js takes half of the logical cores at most, and in Node and on a GPU one.
    """
    cores = os.cpu_count() or 1
    if runtime == "wasm":
        return max(1, cores // 2)
    return cores if runtime in ("litert", "litertjs", "onnxruntime") else 1
