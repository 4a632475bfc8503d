"""TFLite files in a browser: LiteRT.js in headless Chromium, on WebAssembly."""

from pathlib import Path

from pipelines.runtimes import javascript
from pipelines.runtimes.runtime import Runtime


def load(path: Path, threads: int = 1) -> Runtime:
    """Open a `.tflite` file in LiteRT.js; see `pipelines.runtimes.load`.

    Raises:
        UnavailableError: there is no Chromium on PATH, or the package cannot be fetched.
        GrimaceError: LiteRT.js would not take the file.
    """
    return javascript.open_model(
        path,
        engine="litertjs",
        host="chromium",
        backend="wasm",
        threads=threads,
        files={"graph.tflite": path},
    )
