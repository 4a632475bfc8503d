"""ONNX files in ONNX Runtime on the CPU: the graph that TensorRT builds its engines from."""

from pathlib import Path

import numpy as np

from pipelines.runtimes.runtime import Runtime, open_runtime, refused


def load(path: Path, threads: int) -> Runtime:
    """Open a `.onnx` file; see `pipelines.runtimes.load`."""
    import onnxruntime

    name = f"onnxruntime {onnxruntime.__version__}"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; what a user can act on comes as an exception
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise refused(name, path, error) from error
    inputs, outputs = session.get_inputs(), session.get_outputs()

    def run(images: np.ndarray) -> np.ndarray:
        return session.run(None, {inputs[0].name: images})[0]

    return open_runtime(
        name=name,
        path=path,
        threads=threads,
        input_shapes=[tensor.shape for tensor in inputs],
        output_count=len(outputs),
        run=run,
        batch_size=64,
    )
