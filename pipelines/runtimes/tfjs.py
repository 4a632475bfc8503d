"""TF.js graph models: in headless Chromium on WebAssembly, WebGL or WebGPU, and in Node."""

import json
import os
from pathlib import Path
from typing import Literal

from pipelines.cli import GrimaceError
from pipelines.runtimes import javascript
from pipelines.runtimes.runtime import Runtime, refused

Backend = Literal["wasm", "node", "webgl", "webgpu"]


def load(path: Path, threads: int = 1, backend: Backend | None = None) -> Runtime:
    """Open a TF.js folder; see `pipelines.runtimes.load`.

    Args:
        path: holds a model.json and its shards.
        threads: of WebAssembly in Chromium; the others take no number.
        backend: "wasm", "webgl" and "webgpu" run in Chromium, "node" is WebAssembly in Node. Left
            out, it is "wasm" where a Chromium is on PATH, else "node"; the variable
            GRIMACE_TFJS_HOST, "node" or "chromium", decides otherwise.

    Raises:
        UnavailableError: this machine lacks what the backend needs.
        GrimaceError: the folder holds no whole model, or TF.js would not take it.
    """
    backend = backend or _chosen()
    _check_folder(path)
    return javascript.open_model(
        path,
        engine="tfjs",
        host="node" if backend == "node" else "chromium",
        backend="wasm" if backend == "node" else backend,
        threads=threads if backend == "wasm" else 1,
        files={file.name: file for file in path.iterdir()},
    )


def _chosen() -> Backend:
    host = os.environ.get("GRIMACE_TFJS_HOST") or ("chromium" if javascript.chromium() else "node")
    if host not in ("node", "chromium"):
        raise GrimaceError(f"GRIMACE_TFJS_HOST is '{host}'; set it to node or chromium")
    return "node" if host == "node" else "wasm"


def _check_folder(path: Path) -> None:
    """Look for what would reach TF.js as a page that is not there, and puzzle its user."""
    try:
        groups = json.loads((path / "model.json").read_bytes())["weightsManifest"]
        shards = [name for group in groups for name in group["paths"]]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"model.json is damaged or no graph model ({error!r})"
        raise refused("tfjs", path, reason) from error
    missing = [name for name in shards if not (path / name).is_file()]
    if missing:
        raise refused("tfjs", path, f"{', '.join(missing)} is missing")
