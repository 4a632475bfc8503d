"""Opens a model in the runtime it is meant for, so that what is verified is what is deployed."""

from pathlib import Path

from pipelines.cli import GrimaceError
from pipelines.runtimes.runtime import Runtime

__all__ = ["Runtime", "load"]


def load(path: Path, threads: int = 1) -> Runtime:
    """Open a model in the runtime that its name calls for.

    Args:
        path: a `.keras`, `.tflite` or `.onnx` file, or a folder that holds a TF.js graph model
            (`model.json` and its shards).
        threads: threads to compute with. LiteRT and ONNX Runtime take it exactly; TF.js always
            runs on one; Keras leaves it to its backend (`Runtime.threads` says what holds).

    Returns:
        The open model. Use it in a `with` block: TF.js runs in a process of its own.

    Raises:
        GrimaceError: nothing is there, it is no model, it is damaged, or it does not map one
            image to one output.
    """
    if not path.exists():
        raise GrimaceError(f"{path} does not exist; export the model first")
    # The libraries are heavy, so only the one that is needed gets imported.
    if path.is_dir():
        if not (path / "model.json").is_file():
            raise GrimaceError(
                f"{path} is a folder without a model.json, so it is no TF.js model; "
                "name the folder that holds model.json, or a .keras, .tflite or .onnx file"
            )
        from pipelines.runtimes import tfjs

        return tfjs.load(path)
    if path.suffix == ".keras":
        from pipelines.runtimes import keras_model

        return keras_model.load(path)
    if path.suffix == ".tflite":
        from pipelines.runtimes import litert

        return litert.load(path, threads)
    if path.suffix == ".onnx":
        from pipelines.runtimes import onnx_runtime

        return onnx_runtime.load(path, threads)
    raise GrimaceError(
        f"{path}: no runtime is known for '{path.suffix or path.name}'; give a .keras, .tflite or "
        ".onnx file, or a TF.js folder with a model.json"
    )
