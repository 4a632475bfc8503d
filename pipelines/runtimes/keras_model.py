"""The trained model itself, in Keras: the reference that deployables are measured against."""

from pathlib import Path

import numpy as np

from pipelines.runtimes.runtime import Runtime, open_runtime, refused


def load(path: Path) -> Runtime:
    """Open a `.keras` file; see `pipelines.runtimes.load`.

    The backend's thread pool belongs to the whole process and is left as it is.
    """
    import keras

    name = f"keras {keras.__version__} ({keras.backend.backend()})"
    try:
        model = keras.saving.load_model(path, compile=False)
    except Exception as error:
        raise refused(name, path, error) from error

    def run(images: np.ndarray) -> np.ndarray:
        return np.asarray(model.predict_on_batch(images), np.float32)

    return open_runtime(
        name=name,
        path=path,
        threads=0,
        input_shapes=[tensor.shape for tensor in model.inputs],
        output_count=len(model.outputs),
        run=run,
        batch_size=256,
    )
