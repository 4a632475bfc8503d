"""TFLite files in LiteRT, one image at a time: the way a phone runs them."""

from importlib.metadata import version
from pathlib import Path

import numpy as np

from pipelines.runtimes.runtime import Runtime, open_runtime, refused


def load(path: Path, threads: int) -> Runtime:
    """Open a `.tflite` file; see `pipelines.runtimes.load`."""
    from ai_edge_litert.interpreter import Interpreter

    name = f"litert {version('ai-edge-litert')}"
    try:
        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
    except Exception as error:
        raise refused(name, path, error) from error
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def run(images: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(inputs[0]["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(outputs[0]["index"])

    return open_runtime(
        name=name,
        path=path,
        threads=threads,
        input_shapes=[detail["shape"].tolist() for detail in inputs],
        output_count=len(outputs),
        run=run,
        batch_size=1,
    )
