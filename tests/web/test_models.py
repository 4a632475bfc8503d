"""A small grey network, exported and published as the real ones are: on a GPU and in the page.

The models that come with the page are grey, and of their float variants only LiteRT's float16 is
there.
What other runtimes answer: `tests/pipelines/runtimes/test_photo.py`, with a network for colours.
"""

import math
import os
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from models import landmarks
from pipelines import bundles, web
from pipelines.crops import crop
from pipelines.datasets.example import Box
from pipelines.datasets.faces import render
from pipelines.exporters import tfjs, tflite
from pipelines.exporters.quantisation import Calibration
from pipelines.job import sha256
from pipelines.runtimes import load
from pipelines.runtimes.javascript import chromium
from tests.web.conftest import served

SIZE, MARGIN = 32, 0.15
META = {"task": "landmarks", "size": SIZE, "channels": 1, "margin": MARGIN, "points": 68}
META |= {"scheme": "iBUG-68", "dataset": "synthetic"}
# Largest difference of a coordinate from Keras's, in units of the crop.
TOLERANCES = {"float16": 4e-3, "int8": 0.06}
RUNS = [("tflite/int8.tflite", "litert"), ("tfjs/float16", "webgpu")]


def grey(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).convert("L"))[..., None]


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """A face in colours, so that it matters how they become grey; uint8 (400, 400, 3)."""
    tinted = np.clip(render(7, 93).image * [1.0, 0.8, 0.55], 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(tinted).resize((400, 400), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def deploy(tmp_path_factory) -> Path:
    """`deploy/landmarks` of a network with statistics of real faces, and its `model.keras`."""
    folder = tmp_path_factory.mktemp("models")
    keras.utils.set_random_seed(4)
    model = landmarks.build("plain", widths=(8, 16), size=SIZE, channels=1, dropout=0, points=68)
    model.layers[-2].kernel.assign(0.3 * model.layers[-2].kernel)
    faces = np.stack([grey(render(3, index).image[::4, ::4]) for index in range(24)])
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.5
    for _ in range(8):
        model(faces.astype(np.float32), training=True)
    model.save(folder / "model.keras")
    calibration = Calibration(faces.astype(np.float32), faces[:4], lambda _: 0.0, math.inf, "")
    deploy = folder / "landmarks"
    found = {
        "tflite": tflite.export(folder / "model.keras", deploy / "tflite", calibration),
        "tfjs": tfjs.export(folder / "model.keras", deploy / "tfjs"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # a signing key is made where one is
        for target, variants in found.items():
            source = META | {"model_sha256": sha256(folder / "model.keras")}
            bundles.seal(deploy / target, bundles.describe(target, variants, META, source))
    return folder


def answer(deploy: Path, crops: np.ndarray) -> np.ndarray:
    with load(deploy / "model.keras") as model:
        return model.predict(crops.astype(np.float32))


@pytest.mark.parametrize(("graph", "runtime"), RUNS)
def test_a_grey_face_is_answered_as_keras_does(deploy, picture, graph, runtime):
    if runtime != "litert" and not chromium():
        pytest.skip("no Chromium is on PATH")
    right = crop(grey(picture), Box(150.0, 20.0, 350.0, 220.0), SIZE)
    crops = np.stack([right, 255 - right]).astype(np.float32)
    with load(deploy / "landmarks" / graph, runtime=runtime) as opened:
        answers = opened.predict(crops)
    wanted = answer(deploy, crops)
    tolerance = TOLERANCES[Path(graph).stem]
    assert np.abs(answers - wanted).max() <= tolerance
    assert np.abs(answers[1] - wanted[0]).max() > 2 * tolerance


def test_the_page_offers_what_was_published_and_answers_as_keras_does(
    deploy, picture, built, browser, tmp_path, monkeypatch
):
    monkeypatch.chdir(deploy)  # where the key is
    page_folder = tmp_path / "page"
    shutil.copytree(built, page_folder, copy_function=os.link)
    web.publish(deploy, page_folder / "models", ["float16", "tfjs/float32"])
    file = tmp_path / "face.png"
    Image.fromarray(picture).save(file)
    page = browser.new_page()
    with served(page_folder) as address:
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        names = page.locator("#landmarks-model option").all_inner_texts()
        offered = ["LiteRT · float16", "TF.js · float16", "TF.js · float32"]
        assert [name.rsplit(" · ", 1)[0] for name in names[:-1]] == offered
        assert page.locator("#emotion-model option").all_inner_texts() == ["off"]
        page.set_input_files("#file", file)
        for i, name in enumerate(offered):
            page.select_option("#landmarks-model", index=i)
            page.wait_for_selector("#landmarks-model:enabled")
            expect(page.locator("#status")).to_be_hidden()
            page.wait_for_function("grimace.faces()[0]?.points")
            found = page.evaluate(
                """() => grimace.faces().map(({ box, points }) => ({
                    box: [box.left, box.top, box.right, box.bottom], points: [...points] }))[0]"""
            )
            left, top, right, bottom = found["box"]
            side = right - left
            wide = MARGIN * side
            square = Box(left - wide, top - wide, right + wide, bottom + wide)
            wanted = answer(deploy, crop(grey(picture), square, SIZE)[None]).reshape(68, 2)
            edge = square.right - square.left
            points = (np.reshape(found["points"], (-1, 2)) - [square.left, square.top]) / edge
            # One level of a pixel more or less may come of a box that is rounded to float32.
            assert np.abs(points - wanted).max() <= TOLERANCES["float16"], name
    page.close()
