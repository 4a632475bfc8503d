"""TF.js: graph models for the browser, with weights as float32, float16 and uint8.

The converter runs in a process of its own, because it needs TensorFlow started without oneDNN
and a few modules replaced: `python -m pipelines.exporters.tfjs MODEL OUT`.
"""

import argparse
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.exporters.quiet import failure
from pipelines.exporters.source import open_model, signature

WEIGHTS: dict[str, dict[str, str]] = {
    "float32": {},
    "float16": {"float16": "*"},
    "uint8": {"uint8": "*"},
}
REPOSITORY = Path(__file__).parents[2]


def main() -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.exporters.tfjs", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", type=Path, help="the .keras file")
    parser.add_argument("out", type=Path, help="folder to write; what it holds is replaced")
    arguments = parser.parse_args()
    # With oneDNN the graph gets fused operations that the browser's backends do not know.
    os.environ.update(TF_ENABLE_ONEDNN_OPTS="0", KERAS_BACKEND="tensorflow")
    with whole_folder(arguments.out) as folder:
        _convert(arguments.model, folder)


def export(model_path: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Write `out/float32`, `out/float16` and `out/uint8`, each a TF.js graph model.

    Only the weights get smaller; the arithmetic stays float32, so nothing has to be calibrated.

    Args:
        model_path: the `.keras` file.
        out: folder to write, whole or not at all; what it holds is replaced.

    Returns:
        What there is, by variant: `file` (a folder), `precision` (of the weights), `versions`.

    Raises:
        GrimaceError: the model cannot be read, or the converter failed.
    """
    process = subprocess.run(
        [sys.executable, "-m", "pipelines.exporters.tfjs", model_path.resolve(), out.resolve()],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if process.returncode:
        raise GrimaceError(failure(f"TF.js export of {model_path}", process.stdout))
    versions = {"format": "graph-model", "converter": version("tensorflowjs")}
    return {name: {"file": name, "precision": name, "versions": versions} for name in WEIGHTS}


def _convert(model_path: Path, folder: Path) -> None:
    with TemporaryDirectory() as saved_model:
        model = open_model(model_path)
        model.export(
            saved_model,
            format="tf_saved_model",
            input_signature=signature(model, batch=None),
            verbose=False,
        )
        _stand_in_for_unused_imports()
        from tensorflowjs.converters.tf_saved_model_conversion_v2 import convert_tf_saved_model

        for name, quantization in WEIGHTS.items():
            convert_tf_saved_model(
                saved_model, str(folder / name), quantization_dtype_map=quantization
            )


def _stand_in_for_unused_imports() -> None:
    """Let the converter import what it never uses here; none of it is installed with Grimace."""
    modules = (
        "tensorflow_decision_forests",
        "tensorflow_hub",
        "tf_keras",
        "jax",
        "jax.experimental",
        "jax.experimental.jax2tf",
    )
    for name in modules:
        module = sys.modules.setdefault(name, ModuleType(name))
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


if __name__ == "__main__":
    run(main)
