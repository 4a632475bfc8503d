"""The demo on pictures, folders, videos and bad input, with the models that come along."""

import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pipelines import demo, lite, overlay, web
from pipelines.cli import GrimaceError
from pipelines.datasets.example import Box
from pipelines.datasets.faces import render
from pipelines.detectors import DETECTORS, Face, find_faces, overlap, squares
from pipelines.smoothing import Seen, one_euro, tracker

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "web" / "public" / "sample.jpg"
UNIT = Box(0.0, 0.0, 100.0, 100.0)
EYES = np.array([[30.0, 40.0], [70.0, 40.0]])


def drawn(index: int = 93, side: int = 400) -> Image.Image:
    face = Image.fromarray(render(7, index).image)
    return face.resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def models() -> dict[str, lite.Model]:
    return lite.open_models([])


@pytest.fixture
def main(monkeypatch, capfd) -> Callable[..., str]:
    """Run the demo in this process; gives what it said."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["demo", *map(str, arguments)])
        demo.main()
        return capfd.readouterr().err

    return run


# Faces


@pytest.mark.parametrize("detector", ["blazeface", "haar", "haar-alt2", "whole"])
def test_a_detectors_square_surrounds_the_points(detector):
    face = render(7, 77)
    (found, *_) = find_faces(np.asarray(drawn(77)), detector)
    points = (face.landmarks + 0.5) * 400 / 128 - 0.5
    (left, top), (right, bottom) = points.min(0), points.max(0)
    half = max(right - left, bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    shared = overlap(found.box, Box(x - half, y - half, x + half, y + half))
    assert shared > (0.2 if detector == "whole" else 0.6)


def test_ten_faces_a_half_one_and_none(models):
    sheet = Image.new("RGB", (1600, 640))
    for i, index in enumerate((93, 111, 43, 4, 42, 77, 93, 111, 43, 4)):
        sheet.paste(drawn(index, 320), (i % 5 * 320, i // 5 * 320))
    assert len(demo.analyse(demo.Frame(np.asarray(sheet)), models, "blazeface")) == 10
    half = np.asarray(drawn().crop((190, 0, 400, 400)))
    assert len(demo.analyse(demo.Frame(half), models, "blazeface")) <= 1
    for shape in ((1, 1, 3), (700, 3, 3), (300, 300, 3)):
        empty = demo.Frame(np.full(shape, 90, np.uint8))
        for detector in ("blazeface", "haar"):
            assert demo.analyse(empty, models, detector) == []


def test_where_blazeface_looks_covers_a_still_picture():
    assert len(squares(640, 480, still=False)) == 1
    parts = squares(1600, 900, still=True)[2:]
    for x, y in ((0, 0), (1599, 899), (800, 450)):
        assert any(p.left <= x <= p.right and p.top <= y <= p.bottom for p in parts)


def test_the_models_answer_on_drawn_faces(models):
    face = render(7, 93)
    (seen,) = demo.analyse(demo.Frame(np.asarray(drawn())), models, "blazeface")
    assert seen.probabilities.shape == (7,)
    assert seen.probabilities.sum() == pytest.approx(1, abs=0.02)
    points = (face.landmarks + 0.5) * 400 / 128 - 0.5
    eyes = np.linalg.norm(points[36] - points[45])
    assert np.linalg.norm(seen.points - points, axis=1).mean() / eyes < 0.12


def test_a_models_framing_is_applied(models):
    model = models["emotion"]
    looked_at = []
    runtime = Namespace(
        input_shape=(48, 48, 1),
        predict=lambda images: looked_at.append(images) or np.full((1, 7), 1 / 7),
    )
    raised = lite.Model("emotion", "int8", 0.25, 0.5, model.labels, runtime)
    ramp = np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 200, 3))
    raised.answer(ramp, Box(59.5, 59.5, 99.5, 99.5))
    # 40 wide, a quarter more on every side, half a side up: rows 29.5 to 89.5.
    rows = looked_at[0][0, :, 0, 0].astype(float)
    assert rows[0] == pytest.approx(29.5 + 60 / 96, abs=1)
    assert rows[-1] == pytest.approx(89.5 - 60 / 96, abs=1)


# Smoothing


def test_the_filter_is_the_papers():
    """Against Algorithm 1 of Casiez et al. 2012, written out for one value."""
    rng = np.random.default_rng(0)
    values = np.cumsum(rng.normal(0, 1, 60))
    smooth = one_euro(1.0, 0.5)

    def alpha(cutoff: float, rate: float) -> float:
        return 1 / (1 + rate / (2 * np.pi * cutoff))

    last, speed = values[0], 0.0
    for i, value in enumerate(values):
        got = smooth(np.array([value]), i / 30, 1.0)[0]
        if i:
            speed += alpha(1.0, 30) * ((value - last) * 30 - speed)
            last += alpha(1.0 + 0.5 * abs(speed), 30) * (value - last)
        assert got == pytest.approx(last, rel=1e-6)


def test_faces_are_followed_and_emotions_do_not_flicker():
    follow = tracker()
    wide = Box(300.0, 0.0, 400.0, 100.0)
    even = np.array([0.5, 0.5, 0, 0, 0, 0, 0])
    tremble = np.array([0.03, -0.03, 0, 0, 0, 0, 0])
    labels = set()
    for i in range(40):
        seen = [Seen(UNIT, EYES, None, even + tremble * (-1) ** i), Seen(wide, EYES + 300)]
        near, far = follow(seen if i % 2 else seen[::-1], i / 30)
        near, far = (near, far) if near.box.left < 150 else (far, near)
        labels.add(near.label)
        assert far.label is None
    assert len(labels) == 1
    assert follow([], 5.0) == []


# Pictures


def test_the_emoji_covers_the_face_and_nothing_else():
    picture = np.full((400, 400, 3), 30, np.uint8)
    box = Box(150.0, 150.0, 250.0, 250.0)
    overlay.draw_emoji(picture, "happy", box, EYES + 150)
    changed = (picture != 30).any(2)
    ys, xs = np.nonzero(changed)
    assert changed[200, 200] and changed[160, 200]
    assert xs.max() - xs.min() == pytest.approx(100 * overlay.EMOJI_SIZE * 122 / 128, abs=3)
    assert (xs.min() + xs.max()) / 2 == pytest.approx(200, abs=1)
    assert (ys.min() + ys.max()) / 2 == pytest.approx(200 - 0.07 * 150, abs=1.5)


@pytest.mark.parametrize("box", [Box(-80.0, -60.0, 20.0, 40.0), Box(900.0, 900.0, 950.0, 950.0)])
def test_an_emoji_at_the_edge_or_outside_is_cut(box):
    picture = np.zeros((100, 100, 3), np.uint8)
    for label in ("angry", "sad"):
        overlay.draw_emoji(picture, label, box, EYES)
    assert picture.any() == (box.right > 0 and box.left < 100)


def test_a_leaning_face_gets_a_leaning_emoji():
    upright, leaning = np.zeros((2, 300, 300, 3), np.uint8)
    box = Box(100.0, 100.0, 200.0, 200.0)
    overlay.draw_emoji(upright, "happy", box, EYES)
    turned = np.array([[40.0, 30.0], [40.0, 70.0]])  # its right eye below: a quarter turn
    overlay.draw_emoji(leaning, "happy", box, turned)
    middle = (149.5 + 0.5, 149.5 + 0.5 - 0.07 * 150)
    matrix = cv2.getRotationMatrix2D(middle, -90, 1.0)
    expected = cv2.warpAffine(upright, matrix, (300, 300))
    assert np.abs(expected.astype(int) - leaning).mean() < 3


def test_one_picture_and_what_is_shown(main, tmp_path):
    told = main("--image", SAMPLE, "--out", tmp_path / "out.png", "--show", "emoji", "box")
    assert "1 pictures, 6 faces" in told
    before = np.asarray(Image.open(SAMPLE).convert("RGB")).astype(int)
    after = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    assert after.shape == before.shape
    assert 0.2 < (np.abs(after - before).max(2) > 20).mean() < 0.9


def exif(path: Path) -> None:
    tag = Image.Exif()
    tag[0x0112] = 6
    drawn().rotate(90).save(path, exif=tag)


def gif(path: Path) -> None:
    frames = [drawn().convert("P"), drawn(111).convert("P")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def transparent(path: Path) -> None:
    face = drawn()
    face.putalpha(Image.new("L", face.size, 255))
    face.save(path)


ODD = {
    "grey.png": lambda path: drawn().convert("L").save(path),
    "alpha.png": transparent,
    "turned.jpg": exif,
    "print.jpg": lambda path: drawn().convert("CMYK").save(path),
    "animated.gif": gif,
    "tiny.png": lambda path: drawn(side=48).save(path),
}


def test_a_folder_of_odd_pictures(main, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, make in ODD.items():
        make(folder / name)
    (folder / "broken.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:900])
    (folder / "page.png").write_text("<html>Sign in</html>")
    (folder / "empty.png").touch()
    (folder / "notes.txt").write_text("not looked at")
    told = main("--folder", folder, "--out", tmp_path / "out")
    assert "6 pictures, 6 faces" in told
    assert told.count("left out:") == 3 and "broken.jpg" in told
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {Path(n).stem for n in ODD}


def test_a_folder_goes_round_and_round(tmp_path):
    drawn().save(tmp_path / "a.png")
    drawn(111).save(tmp_path / "b.png")
    frames = demo.pictures_of(tmp_path, once=False)
    assert [next(frames).name for _ in range(5)] == ["a.png", "b.png", "a.png", "b.png", "a.png"]


def test_a_hundred_megapixels(main, tmp_path):
    face = Image.new("L", (10_000, 10_000), 128)
    face.paste(drawn(side=5000).convert("L"), (2500, 2500))
    face.save(tmp_path / "huge.jpg")
    told = main("--image", tmp_path / "huge.jpg", "--out", tmp_path / "out.png")
    assert "1 faces" in told
    assert Image.open(tmp_path / "out.png").size == (2048, 2048)


def test_a_video(main, tmp_path):
    writer = cv2.VideoWriter(
        str(tmp_path / "in.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 24.0, (320, 240)
    )
    face = np.asarray(drawn(side=240))[..., ::-1]
    for i in range(20):
        frame = np.full((240, 320, 3), 120, np.uint8)
        frame[:, 2 * i : 2 * i + 240] = face
        writer.write(frame)
    writer.release()
    out = tmp_path / "out.mp4"
    told = main("--video", tmp_path / "in.mp4", "--out", out, "--frames", 15)
    assert "15 pictures, 15 faces" in told
    capture = cv2.VideoCapture(str(out))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 15
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(24)
    capture.release()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "nowhere.png"), "cannot be read"),
        (("--video", "nowhere.mp4"), "does not exist"),
        (("--video", __file__), "does not open"),
        (("--camera", "97"), "camera 97 does not open"),
        (("--folder", __file__), "is not a folder"),
        (("--image", str(SAMPLE), "--model", "int4"), "no TFLite model 'int4'"),
        (("--image", str(SAMPLE), "--model", "x.tflite"), "manifest.json does not exist"),
    ],
)
def test_what_cannot_be_done_is_said(main, tmp_path, arguments, message):
    with pytest.raises(GrimaceError, match=message):
        main(*arguments, "--out", tmp_path / "out.png")


def test_an_out_that_cannot_be_written_is_said(main, tmp_path):
    with pytest.raises(GrimaceError, match="cannot be written"):
        main("--image", SAMPLE, "--out", tmp_path / "no" / "out.png")
    with pytest.raises(GrimaceError, match="cannot be written"):
        main("--image", SAMPLE, "--out", tmp_path / "out.nothing")


def test_without_a_screen_the_demo_says_so(main, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(GrimaceError, match="no window can be opened"):
        main("--image", SAMPLE)


def test_keys():
    options = demo.Options()
    assert demo.press("h", options) and options.help
    assert demo.press("l", options) and options.landmarks
    for i, name in enumerate(DETECTORS):
        assert demo.press(str(i + 1), options) and options.detector == name
    assert not demo.press("x", options)
    help_shown = demo.drawn(np.zeros((480, 900, 3), np.uint8), [], (), options)
    assert help_shown.any()


def test_a_score_is_kept_and_eyes_stand_in_order():
    (face, *_) = find_faces(np.asarray(drawn()))
    assert isinstance(face, Face) and 0.5 <= face.score <= 1
    assert face.eyes[0, 0] < face.eyes[1, 0]


# Models


def test_a_bundle_beside_its_manifest_opens(tmp_path):
    index = web.publish(_deploy(tmp_path), tmp_path / "models")
    opened = lite.open_models([], tmp_path / "models")
    assert opened.keys() == {"emotion"} and opened["emotion"].margin == 0.06  # FER's own framing
    assert [entry["runtime"] for entry in index] == ["litert"]
    direct = lite.open_models([str(tmp_path / "deploy/emotion/tflite/int8.tflite")])
    assert direct["emotion"].up == 0.14


def test_a_changed_or_oversized_file_is_not_published(tmp_path, monkeypatch):
    deploy = _deploy(tmp_path)
    with pytest.raises(GrimaceError, match="of precision float32"):
        web.publish(deploy, tmp_path / "models", ["float32"])
    monkeypatch.setattr(web, "LARGEST", 1000)
    with pytest.raises(GrimaceError, match="more than"):
        web.publish(deploy, tmp_path / "models")
    monkeypatch.undo()
    file = deploy / "emotion/tflite/int8.tflite"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(GrimaceError, match="is not the file"):
        web.publish(deploy, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def _deploy(folder: Path) -> Path:
    """A deploy folder with the emotion model that comes along, as if trained on FER-2013."""
    import hashlib
    import json

    content = (lite.MODELS / "emotion/tflite/int8.tflite").read_bytes()
    entries = json.loads((lite.MODELS / "index.json").read_text())["models"]
    entry = next(e for e in entries if e["path"] == "emotion/tflite/int8.tflite")
    bundle = folder / "deploy" / "emotion" / "tflite"
    bundle.mkdir(parents=True)
    (bundle / "int8.tflite").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    manifest = {key: entry[key] for key in ("task", "input", "output")} | {
        "source": {"dataset": "fer2013"},
        "files": [{"path": "int8.tflite", "bytes": len(content), "sha256": digest}],
    }
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return folder / "deploy"


def test_the_demo_loads_nothing_heavy():
    code = (
        "import sys, pipelines.demo, pipelines.window; "
        "heavy = {'tensorflow', 'keras', 'pandas', 'mlflow', 'prefect', 'pydantic', 'yaml'}; "
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not shutil.which("Xvfb"), reason="a window needs a screen")
def test_the_window_passes_keys_on_and_closes(monkeypatch):
    import tkinter

    from pipelines.window import show_frames

    screen = subprocess.Popen(["Xvfb", "-displayfd", "1"], stdout=subprocess.PIPE, text=True)
    monkeypatch.setenv("DISPLAY", f":{screen.stdout.readline().strip()}")
    pressed = []

    def type_keys(root: tkinter.Tk) -> None:
        root.focus_force()
        root.update()
        for i, key in enumerate(("h", "f", "2", "Escape")):
            root.after(20 * i, lambda key=key: root.event_generate(f"<Key-{key}>"))

    def frames():
        for i in count():
            if i == 3:
                root = tkinter._default_root
                root.after(1, type_keys, root)
            yield demo.Frame(np.zeros((60, 80, 3), np.uint8))

    def failing():
        yield demo.Frame(np.zeros((60, 80, 3), np.uint8))
        raise GrimaceError("broken")

    try:
        show_frames(frames(), lambda key: pressed.append(key) or True, 0.01)
        assert pressed == ["h", "2"]  # full screen and the end are the window's own
        with pytest.raises(GrimaceError, match="broken"):
            show_frames(failing(), lambda key: True, 0.01)
    finally:
        screen.kill()
        screen.wait()
