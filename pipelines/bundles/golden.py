"""Golden inputs and outputs: a few images and what the trained model makes of them.

The faces are drawn, so that they can go wherever a bundle goes. The answers are the Keras model's
in float32; how far a graph may be from them its manifest says, by its precision.
"""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.cli import GrimaceError

COUNT, SEED = 4, 20


def draw(task: Any, name: Any) -> np.ndarray:
    """Return uint8 (4, S, S, C), drawn faces cropped as a task takes them."""
    from pipelines.datasets import synthetic
    from pipelines.heldout import crop_all

    return crop_all(synthetic.examples(COUNT, SEED), name, task).images


def write(path: Path, images: np.ndarray, outputs: np.ndarray) -> None:
    """Write the images, uint8 (n, S, S, C), and the model's answers, float32 (n, …)."""
    content = {
        "input": {
            "shape": list(images.shape),
            "dtype": "uint8",
            "base64": base64.b64encode(images.tobytes()).decode(),
        },
        "output": {"shape": list(outputs.shape), "values": outputs.ravel().tolist()},
    }
    path.write_text(json.dumps(content) + "\n")


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return what `write` was given.

    Raises:
        GrimaceError: the file is missing or damaged.
    """
    try:
        content = json.loads(path.read_bytes())
        pixels = base64.b64decode(content["input"]["base64"], validate=True)
        images = np.frombuffer(pixels, np.uint8).reshape(content["input"]["shape"])
        values = np.array(content["output"]["values"], np.float32)
        return images, values.reshape(content["output"]["shape"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GrimaceError(f"{path} is missing or damaged ({error!r}); export again") from None


def compare(outputs: np.ndarray, wanted: np.ndarray, tolerance: float) -> dict[str, float | bool]:
    """Return how far answers are from the golden ones.

    Returns:
        `difference`, the mean over an answer's numbers, of the worst image; `tolerance`;
        `passed`.
    """
    apart = np.abs(outputs.reshape(wanted.shape) - wanted).reshape(len(wanted), -1).mean(1).max()
    passed = bool(apart <= tolerance)
    return {"difference": float(apart), "tolerance": tolerance, "passed": passed}
