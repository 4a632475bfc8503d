"""Open TFLite bundles with nothing installed but LiteRT: what the demo runs on a small machine."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipelines import runtimes
from pipelines.cli import GrimaceError
from pipelines.crops import crop, from_crop
from pipelines.datasets.example import Box
from pipelines.runtimes import Runtime

MODELS = Path(__file__).parents[1] / "web" / "public" / "models"


@dataclass(frozen=True)
class Model:
    """An open model and what its bundle says of it.

    Attributes:
        task: "emotion" or "landmarks".
        precision: "int8".
        margin: that its crop leaves around the face, in sides of the square around the points.
        up: how far the crop's centre lies above that square's, in its sides.
        labels: of the emotions; () for landmarks.
        runtime: runs it.
    """

    task: str
    precision: str
    margin: float
    up: float
    labels: tuple[str, ...]
    runtime: Runtime

    def answer(self, rgb: np.ndarray, box: Box) -> np.ndarray:
        """Run the model on one face.

        Args:
            rgb: uint8 (H, W, 3).
            box: the square around the face's points, in pixels.

        Returns:
            Probabilities, (7,), or points in pixels of the picture, (N, 2).
        """
        size, _, channels = self.runtime.input_shape
        side = box.right - box.left
        wide, up = side * self.margin, side * self.up
        square = Box(box.left - wide, box.top - wide - up, box.right + wide, box.bottom + wide - up)
        picture = rgb if channels == 3 else cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)[..., None]
        output = self.runtime.predict(crop(picture, square, size)[None])[0]
        return output if self.task == "emotion" else from_crop(output, square)


def open_models(names: list[str], folder: Path = MODELS, threads: int = 1) -> dict[str, Model]:
    """Open one model a task.

    Args:
        names: `.tflite` files with their bundle's manifest.json beside them; or one precision of
            the models in `folder` ("int8"); or nothing, which takes the first listed there.
        folder: as `python -m pipelines.web` writes it.
        threads: that each model computes with.

    Returns:
        The models by task.

    Raises:
        GrimaceError: a file, a manifest or the precision is not there, two files are for one task,
            or a model does not open.
    """
    files = [Path(name) for name in names if name.endswith(".tflite")]
    if files and len(files) != len(names):
        raise GrimaceError("--model takes .tflite files or one precision, not both")
    if len(names) > 1 and not files:
        raise GrimaceError("--model takes one precision, or .tflite files with a manifest.json")
    chosen: dict[str, dict[str, Any]] = {}
    for entry in [_described(file) for file in files] or _listed(folder, *names):
        first = chosen.setdefault(entry["task"], entry)
        if files and first is not entry:
            raise GrimaceError(
                f"{first['file']} and {entry['file']} are both for {entry['task']}; --model takes "
                "one file a task"
            )
    return {task: _open(entry, threads) for task, entry in chosen.items()}


def _listed(folder: Path, precision: str = "") -> list[dict[str, Any]]:
    index = folder / "index.json"
    if not index.is_file():
        raise GrimaceError(
            f"{index} does not exist; run `python -m pipelines.web` to copy bundles from deploy/, "
            "or name .tflite files with --model"
        )
    listed = json.loads(index.read_text())["models"]
    entries = [entry for entry in listed if entry["runtime"] == "litert"]
    chosen = [entry for entry in entries if precision in ("", entry["precision"])]
    if not chosen:
        known = ", ".join(sorted({entry["precision"] for entry in entries})) or "none"
        raise GrimaceError(f"{index} lists no TFLite model '{precision}'; it has: {known}")
    return [{**entry, "file": folder / entry["path"]} for entry in chosen]


def _described(file: Path) -> dict[str, Any]:
    manifest = file.with_name("manifest.json")
    if not manifest.is_file():
        raise GrimaceError(
            f"{manifest} does not exist; a model is used as its manifest says, so keep both in "
            "one folder, as `export` writes them"
        )
    try:
        entry = {**json.loads(manifest.read_text()), "file": file, "precision": file.stem}
        assert {"task", "input", "output"} <= entry.keys() and "crop" in entry["input"]
    except (ValueError, TypeError, AssertionError):
        raise GrimaceError(
            f"{manifest} is damaged, or no manifest as `export` writes them; export the model again"
        ) from None
    return entry


def _open(entry: dict[str, Any], threads: int) -> Model:
    placed = entry["input"]["crop"]
    if "up" not in placed:
        raise GrimaceError(
            f"the manifest of {entry['file']} is of an earlier schema and does not say how high "
            "the crop lies; export the model again"
        )
    return Model(
        task=entry["task"],
        precision=entry["precision"],
        margin=placed["margin"],
        up=placed["up"],
        labels=tuple(entry["output"].get("labels", ())),
        runtime=runtimes.load(entry["file"], threads),
    )
