"""The page in a real browser: what it finds, what it says to bad input, what it sends."""

import io
import os
import re
import shutil
from itertools import pairwise

import cv2
import numpy as np
import psutil
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from models.schemes import EMOTIONS
from pipelines import demo, lite
from pipelines.datasets.faces import render
from tests.web.conftest import WEB, served

SAMPLE = WEB / "public" / "sample.jpg"
# GRIMACE_PAGE_MINUTES=10 uv run pytest -n 0 -s tests/web/test_page.py -k memory_stays
MINUTES = int(os.environ.get("GRIMACE_PAGE_MINUTES", "0"))


def faces(page: Page) -> list[dict]:
    """What the page found, as plain lists."""
    return page.evaluate(
        """() => grimace.faces().map(({ box, label, points, probabilities }) => ({
            box: [box.left, box.top, box.right, box.bottom], label,
            points: [...points], probabilities: [...probabilities] }))"""
    )


def show(page: Page, name: str, content: bytes) -> None:
    kind = {"jpg": "image/jpeg", "mp4": "video/mp4", "webm": "video/webm", "txt": "text/plain"}
    ending = name.rsplit(".", maxsplit=1)[-1]
    file = {"name": name, "mimeType": kind.get(ending, f"image/{ending}"), "buffer": content}
    page.evaluate("delete document.body.dataset.frames; delete document.body.dataset.source")
    page.set_input_files("#file", [file])
    page.wait_for_function(
        "document.body.dataset.frames > 0 || document.querySelector('#status.error')"
    )


def choose_tfjs(page: Page, task: str) -> None:
    """Select the task's model for TF.js; what is open from the start is LiteRT's."""
    names = page.locator(f"#{task}-model option").all_inner_texts()
    (place,) = (place for place, name in enumerate(names) if name.startswith("TF.js"))
    page.select_option(f"#{task}-model", index=place)


def shown_at(page: Page, x: int, y: int) -> list[int]:
    """The colour (RGBA) of a pixel of the stage."""
    return page.evaluate(
        """([x, y]) => [...document.getElementById("stage").getContext("2d")
            .getImageData(x, y, 1, 1).data]""",
        [x, y],
    )


def encoded(picture: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def drawn(index: int = 93, side: int = 400) -> Image.Image:
    face = Image.fromarray(render(7, index).image)
    return face.resize((side, side), Image.Resampling.BICUBIC)


def test_a_picture_gives_what_the_demo_gives(page):
    page.click(".welcome [data-do=sample]")
    page.wait_for_function("document.body.dataset.frames > 0")
    models = lite.open_models(["int8"])
    theirs = demo.analyse(demo.read_picture(SAMPLE), models, "blazeface")
    ours = faces(page)
    assert len(ours) == len(theirs) == 6
    for face in ours:
        twin = min(theirs, key=lambda seen: np.abs(np.subtract(seen.box, face["box"])).sum())
        side = twin.box.right - twin.box.left
        np.testing.assert_allclose(face["box"], twin.box, atol=0.02 * side)
        points = np.reshape(face["points"], (-1, 2))
        assert np.abs(points - twin.points).mean() < 0.02 * side
        assert np.abs(np.array(face["probabilities"]) - twin.probabilities).max() < 0.2
        assert sum(face["probabilities"]) == pytest.approx(1, abs=0.02)


def test_the_camera_is_followed(page, camera_face):
    page.click(".welcome [data-do=camera]")
    page.wait_for_function("document.body.dataset.frames > 20")
    (found,) = faces(page)
    face, scale = camera_face
    true = (face.landmarks + 0.5) * scale - 0.5
    eyes = np.linalg.norm(true[36] - true[45])
    error = np.linalg.norm(np.reshape(found["points"], (-1, 2)) - true, axis=1).mean() / eyes
    assert error < 0.12
    assert int(page.inner_text("#rate")) >= 1
    assert float(page.inner_text("#latency")) > 0
    shown = page.inner_text("#face-label").lower()
    assert shown == EMOTIONS[found["label"]]
    assert page.locator("#bars .best .name").inner_text().lower() == shown
    assert shown_at(page, 200, 200)[3] == 255
    # The phone is turned: nothing is squeezed into the old shape.
    width, height = page.evaluate("[stage.width, stage.height]")
    page.evaluate(
        """([width, height]) => {
            for (const [name, value] of [["videoWidth", width], ["videoHeight", height]])
                Object.defineProperty(HTMLVideoElement.prototype, name, { get: () => value });
        }""",
        [height, width],
    )
    page.wait_for_function(
        "([w, h]) => stage.width === w && stage.height === h", arg=[height, width]
    )
    page.click("#stop")
    expect(page.locator(".welcome h1")).to_be_visible()
    assert shown_at(page, 200, 200)[3] == 0  # of the face nothing stays
    assert page.inner_text("#stage-note") == ""


def test_a_model_that_does_not_open_is_named_and_the_next_one_is_taken(context, address):
    page = context.browser.new_page(service_workers="block")  # which has them already
    page.route("**/models/emotion/tflite/int8.tflite", lambda route: route.abort())
    page.route("**/models/landmarks/**", lambda route: route.abort())
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    said = page.inner_text("#status.error")
    landmarks = page.locator("#landmarks-model option").count() - 1  # but for "off"
    assert said.count("did not open: ") == 1 + landmarks
    assert page.input_value("#emotion-model") == "1"
    assert page.input_value("#landmarks-model") == ""
    page.click(".welcome [data-do=sample]")
    page.wait_for_function("document.body.dataset.frames > 0")
    assert page.evaluate("grimace.faces().length") == 6
    page.close()


def test_every_model_can_be_chosen_and_agrees(page):
    show(page, "face.png", encoded(drawn(), "PNG"))
    for task, told in (("emotion", "probabilities"), ("landmarks", "points")):
        answers = []
        options = page.locator(f"#{task}-model option")
        names = [name.rsplit(" · ", 1)[0] for name in options.all_inner_texts()[:-1]]
        assert names == ["LiteRT · int8", "LiteRT · float16", "TF.js · uint8"]
        for i in range(options.count() - 1):
            before = page.evaluate("Number(document.body.dataset.frames)")
            page.select_option(f"#{task}-model", index=i)
            page.wait_for_function(f"document.body.dataset.frames > {before}")
            answers.append(faces(page)[0])
        for one, two in pairwise(answers):
            assert one[told] != two[told]  # it was another one that answered
            assert np.abs(np.subtract(one["probabilities"], two["probabilities"])).max() < 0.3
            assert np.abs(np.subtract(one["points"], two["points"])).mean() < 400 * 0.02
    page.select_option("#emotion-model", "")
    page.wait_for_function("grimace.faces()[0].probabilities === null")
    expect(page.locator("#face-emoji")).to_be_hidden()


def test_the_emoji_covers_the_face(page):
    show(page, "face.png", encoded(drawn(), "PNG"))
    box = faces(page)[0]["box"]
    x, y = int((box[0] + box[2]) / 2), int(box[1] + (box[3] - box[1]) * 0.1)
    with_emoji = shown_at(page, x, y)
    page.click("label:has(#show-emoji)")
    assert np.abs(np.subtract(shown_at(page, x, y), with_emoji)).max() > 30


# Bad input: a right answer or a clear message


def exif(picture: Image.Image) -> bytes:
    """A picture stored lying on its side, to be turned upright."""
    tag = Image.Exif()
    tag[0x0112] = 6
    return encoded(picture.rotate(90), "JPEG", exif=tag, quality=92)


def crowd() -> bytes:
    sheet = Image.new("RGB", (1600, 640))
    for i, index in enumerate((93, 111, 43, 4, 42, 77, 93, 111, 43, 4)):
        sheet.paste(drawn(index, 320), (i % 5 * 320, i // 5 * 320))
    return encoded(sheet, "JPEG", quality=90)


def part_of_a_face(share: float, side: str) -> bytes:
    """So much of the face, by the square around its points, up to an edge of the picture."""
    points = (render(7, 93).landmarks + 0.5) * 400 / 128
    (left, top), (right, bottom) = points.min(0), points.max(0)
    edges = [0, 0, 400, 400]
    if side == "left":
        edges[0] = round(right - share * (right - left))
    elif side == "right":
        edges[2] = round(left + share * (right - left))
    else:
        edges[3] = round(top + share * (bottom - top))
    return encoded(drawn().crop(tuple(edges)), "PNG")


def animated() -> bytes:
    frames = [drawn().convert("P"), drawn(111).convert("P")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)


def cut_out() -> bytes:
    """A face whose surroundings are transparent, over black."""
    face = drawn()
    mask = np.zeros((400, 400), np.uint8)
    cv2.ellipse(mask, (250, 130), (130, 140), 0, 0, 360, 255, -1)
    pixels = np.where(mask[..., None] > 0, np.asarray(face), 0)
    return encoded(Image.fromarray(np.dstack([pixels, mask])), "PNG")


GOOD = {
    "grey.png": lambda: encoded(drawn().convert("L"), "PNG"),
    "alpha.png": cut_out,
    "turned.jpg": lambda: exif(drawn()),
    "print.jpg": lambda: encoded(drawn().convert("CMYK"), "JPEG"),
    "animated.gif": animated,
    "small.png": lambda: encoded(drawn(side=48), "PNG"),
}


def test_odd_pictures_are_read_right(page):
    for name, make in GOOD.items():
        show(page, name, make())
        assert page.evaluate("document.body.dataset.faces") == "1", name
        if name == "alpha.png":
            assert shown_at(page, 2, 2) == [255, 255, 255, 255]  # not the black that is behind
        if name == "turned.jpg":
            _, top, _, bottom = faces(page)[0]["box"]
            eyes = page.evaluate("[...grimace.faces()[0].eyes]")
            assert abs(eyes[1] - eyes[3]) < 0.3 * (bottom - top)  # side by side, not one above
        if name == "animated.gif":
            expect(page.locator("#status")).to_have_text(re.compile("first frame"))


def test_ten_faces(page):
    show(page, "crowd.jpg", crowd())
    assert len(faces(page)) == 10


def test_a_face_half_out_of_the_picture(page):
    true = (render(7, 93).landmarks + 0.5) * 400 / 128 - 0.5
    eyes = np.linalg.norm(true[36] - true[45])
    for side in ("left", "right", "bottom"):
        content = part_of_a_face(0.75, side)
        width, height = Image.open(io.BytesIO(content)).size
        show(page, "most.png", content)
        (found,) = faces(page)
        shift = 400 - width if side == "left" else 0
        points = np.reshape(found["points"], (-1, 2)) + np.array([shift, 0])
        inside = ((points >= [shift, 0]) & (points < [shift + width, height])).all(1)
        errors = np.linalg.norm(points - true, axis=1)[inside] / eyes
        assert 30 < inside.sum() < 68 and errors.mean() < 0.15, side
        show(page, "little.png", part_of_a_face(0.25, side))
        assert faces(page) == []
        expect(page.locator("#stage-note")).to_have_text("No face in view")


def test_pictures_without_a_face(page):
    for size in ((1, 1), (3, 700)):
        show(page, "none.png", encoded(Image.new("RGB", size, "teal"), "PNG"))
        expect(page.locator("#stage-note")).to_have_text("No face in view")


def test_what_is_cut_off_is_shown_and_said(page):
    show(page, "cut.jpg", encoded(drawn(), "JPEG")[:-500])
    expect(page.locator("#status")).to_have_text(re.compile("part of the picture is missing"))
    assert len(faces(page)) == 1


def test_a_hundred_megapixels(page):
    face = Image.new("L", (10_000, 10_000), 128)
    face.paste(drawn(side=5000).convert("L"), (2500, 2500))
    show(page, "huge.jpg", encoded(face, "JPEG"))
    assert page.evaluate("document.body.dataset.faces") == "1"
    expect(page.locator("#status")).to_have_text(re.compile("smaller size"))


UNREADABLE = {
    "empty.png": (b"", "is empty"),
    "page.txt": (b"<html>Sign in</html>", "cannot be read"),
    "broken.png": (b"\x89PNG" + b"\0" * 500, "cannot be read"),
    "broken.mp4": (b"\0" * 5000, "cannot be read"),
}


def test_what_cannot_be_read_is_said(page):
    page.click(".welcome [data-do=sample]")
    page.wait_for_function("document.body.dataset.frames > 0")
    page.evaluate(
        """() => { globalThis.kept = new Set();
            const { createObjectURL, revokeObjectURL } = URL;
            URL.createObjectURL = (file) => {
              const url = createObjectURL(file); kept.add(url); return url; };
            URL.revokeObjectURL = (url) => { kept.delete(url); revokeObjectURL(url); } }"""
    )
    for name, (content, message) in UNREADABLE.items():
        show(page, name, content)
        expect(page.locator("#status.error")).to_have_text(re.compile(f"{name} {message}"))
        assert len(faces(page)) == 6  # what was there stays
        assert page.evaluate("kept.size") == 0  # and nothing of what came


@pytest.mark.parametrize(
    ("flags", "message"),
    [((), "No camera was found"), (("--use-fake-device-for-media-stream",), "was not allowed")],
)
def test_without_a_camera_the_page_says_so(launch, address, flags, message):
    browser = launch(*flags)
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    page.click(".welcome [data-do=camera]")
    expect(page.locator("#status")).to_have_text(re.compile(message))
    browser.close()


def test_it_works_without_a_network(browser, built, tmp_path):
    context = browser.new_context()
    page = context.new_page()
    for name in ("one", "two"):
        shutil.copytree(built, tmp_path / name, copy_function=os.link)
    with served(tmp_path) as address:
        for place in ("one/", "two/"):  # each keeps its own
            page.goto(address + place)
            page.wait_for_selector("body[data-offline]")
            assert page.evaluate("document.body.dataset.offline") == "true"
    page.goto(address + "one/index.html")  # from a server that is gone
    page.wait_for_selector("body[data-ready]")
    page.wait_for_selector("body[data-offline]")
    assert page.evaluate("document.body.dataset.offline") == "true"
    expect(page.locator("#status")).to_be_hidden()  # nothing is missing: all is kept
    page.click(".welcome [data-do=sample]")
    page.wait_for_function("document.body.dataset.frames > 0")
    assert len(faces(page)) == 6
    choose_tfjs(page, "emotion")  # never opened while there was a network
    page.wait_for_function("document.body.dataset.frames > 1")
    expect(page.locator("#status")).to_be_hidden()
    context.close()


def test_it_works_where_no_service_worker_may_be(context, address):
    page = context.new_page()
    page.add_init_script(
        "navigator.serviceWorker.register = () => Promise.reject(new Error('forbidden'))"
    )
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector("body[data-offline=no]")
    assert errors == []
    page.close()


def test_what_cannot_be_kept_for_later_is_said(browser, built, tmp_path):
    shutil.copytree(built, tmp_path / "page", copy_function=os.link)
    (tmp_path / "page" / "models" / "landmarks" / "tfjs" / "uint8" / "model.json").unlink()
    page = browser.new_page()
    with served(tmp_path / "page") as address:
        page.goto(address)
        page.wait_for_selector("body[data-offline=partly]")
        expect(page.locator("#status.error")).to_have_text(
            re.compile("will be missing: .*/landmarks/tfjs/uint8/model.json$")
        )
    page.close()


def test_who_sees_nothing_is_told_what_is_there(page):
    mirror, call = (page.get_by_role("tab", name=name) for name in ("mirror", "call"))
    mirror.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-call"
    expect(call).to_have_attribute("aria-selected", "true")
    expect(page.get_by_role("tabpanel", name="Landmark call")).to_be_visible()
    page.keyboard.press("ArrowRight")  # round again
    expect(page.get_by_role("tabpanel", name="Emoji mirror")).to_be_visible()
    stage = page.locator("#mirror").get_by_role("img", name="Nothing is open")
    expect(stage).to_be_visible()
    page.click(".welcome [data-do=sample]")
    shown = re.compile(f"^The picture: 6 faces, the largest, ({'|'.join(EMOTIONS)})$")
    expect(page.locator("#mirror").get_by_role("img", name=shown)).to_be_visible()
    show(page, "wall.png", encoded(Image.new("RGB", (300, 200), "grey"), "PNG"))
    no_face = page.locator("#mirror").get_by_role("status").filter(has_text="No face in view")
    expect(no_face).to_be_visible()


def test_full_screen_is_offered_where_there_is_one(page, context, address):
    expect(page.get_by_role("button", name="Full screen")).to_be_visible()
    phone = context.new_page()
    phone.add_init_script("Object.defineProperty(document, 'fullscreenEnabled', { value: false })")
    phone.goto(address)
    phone.wait_for_selector("body[data-ready]")
    expect(phone.get_by_role("button", name="Full screen")).to_be_hidden()
    phone.close()


def test_nothing_sticks_out(page):
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        page.click("[data-tab=mirror]")
        for opened in (False, True):
            if opened:
                show(page, "face.png", encoded(drawn(), "PNG"))
            for tab in ("mirror", "call"):
                page.click(f"[data-tab={tab}]")
                where = (width, opened, tab)
                assert page.evaluate("document.documentElement.scrollWidth") <= width, where
                controls = page.locator(f"#{tab}").locator("button, select, label, summary")
                for control in controls.filter(visible=True).all():
                    box = control.bounding_box()
                    name = (*where, control.inner_text())
                    assert box["x"] >= 0 and box["x"] + box["width"] <= width, name
                    assert box["height"] >= 20, name
                    control.click(trial=True, timeout=2000)  # nothing lies over it


# Sources that come and go


def test_the_last_choice_counts_however_long_the_first_takes(page):
    page.evaluate(
        """() => { const { decode } = HTMLImageElement.prototype;
            HTMLImageElement.prototype.decode = async function () {
              HTMLImageElement.prototype.decode = decode;
              await new Promise((resolve) => setTimeout(resolve, 700));
              return decode.call(this); } }"""
    )
    files = [
        {"name": f"{side}.png", "mimeType": "image/png", "buffer": encoded(drawn(side=side), "PNG")}
        for side in (300, 200)
    ]
    for file in files:
        page.set_input_files("#file", [file])
    page.wait_for_function("document.body.dataset.frames > 0")
    page.wait_for_timeout(1000)
    assert page.evaluate("document.getElementById('stage').width") == 200
    page.set_input_files("#file", files[:1])
    page.wait_for_function("document.getElementById('stage').width === 300")


def test_a_camera_that_is_taken_away_is_named_and_let_go(page):
    page.evaluate(
        """() => { const devices = navigator.mediaDevices;
            const ask = devices.getUserMedia.bind(devices);
            devices.getUserMedia = async (wish) => (globalThis.stream = await ask(wish)); }"""
    )
    state = "stream.getVideoTracks()[0].readyState"
    page.click(".welcome [data-do=camera]")
    page.wait_for_function("document.body.dataset.frames > 0")
    page.evaluate("stream.getVideoTracks()[0].dispatchEvent(new Event('ended'))")
    expect(page.locator("#status.error")).to_have_text(re.compile("unplugged"))
    expect(page.locator(".welcome h1")).to_be_visible()
    assert page.evaluate(state) == "ended"
    page.evaluate(
        "() => { HTMLMediaElement.prototype.play = () => Promise.reject(new Error('no')); }"
    )
    page.click(".welcome [data-do=camera]")
    expect(page.locator("#status.error")).to_have_text("The camera gives no picture: no")
    assert page.evaluate(state) == "ended"


@pytest.mark.timeout(600 + 90 * MINUTES)
def test_a_video_is_played_again_and_again_and_memory_stays(context, address, tmp_path):
    """A video of half a second for some hundred frames, or minutes, in both kinds of runtime."""
    path = tmp_path / "face.webm"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"VP80"), 50.0, (400, 400))
    face = np.asarray(drawn())[..., ::-1]
    for _ in range(25):
        writer.write(face)
    writer.release()
    page = context.new_page()
    page.add_init_script(
        """globalThis.memories = [];
        for (const name of ["instantiate", "instantiateStreaming"]) {
          const begin = WebAssembly[name];
          WebAssembly[name] = async (...given) => {
            const result = await begin(...given);
            const { exports } = result.instance ?? result;
            const found = [exports, ...Object.values(given[1] ?? {})].flatMap(Object.values);
            memories.push(...found.filter((one) => one instanceof WebAssembly.Memory));
            return result;
          };
        }"""
    )
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    choose_tfjs(page, "landmarks")  # the emotion stays in LiteRT
    page.wait_for_selector("#landmarks-model:enabled")
    show(page, "face.webm", path.read_bytes())
    devtools = context.new_cdp_session(page)
    whole = context.browser.new_browser_cdp_session()

    def used() -> dict[str, float]:
        devtools.send("HeapProfiler.collectGarbage")
        heap = devtools.send("Runtime.getHeapUsage")
        inside = page.evaluate(
            """() => ({ tensors: _tfengine.memory().numTensors,
                wasm: memories.reduce((sum, { buffer }) => sum + buffer.byteLength, 0) })"""
        )
        return inside | {"heap": heap["usedSize"], "buffers": heap.get("backingStorageSize", 0)}

    def megabytes() -> int:
        """Of all of Chromium's processes, what several share counted once."""
        running = whole.send("SystemInfo.getProcessInfo")["processInfo"]
        return sum(psutil.Process(one["id"]).memory_full_info().pss for one in running) >> 20

    def play(frames: int) -> None:
        page.wait_for_function(f"document.body.dataset.frames > {frames}")

    play(40)
    before = used()
    play(240)
    sizes = []
    for minute in range(1, MINUTES + 1):
        page.wait_for_timeout(60_000)
        sizes.append(megabytes())
        frames = page.evaluate("document.body.dataset.frames")
        print(f"after {minute} min and {frames} frames {sizes[-1]} MiB, of it {used()}")
    after = used()
    assert len(faces(page)) == 1
    expect(page.locator("#stop")).to_be_visible()
    assert before["tensors"] > 0 and before["wasm"] > 2**20
    assert after["tensors"] == before["tensors"]
    assert after["wasm"] == before["wasm"]
    # One frame's pixels are 0.6 MB: a leak of them would be 120 MB by now.
    assert after["heap"] - before["heap"] < 2e6
    assert after["buffers"] - before["buffers"] < 8e6
    # Without a GPU Chromium takes 0.4 GiB more in the first minute, a frame's pixels a frame.
    assert not sizes or max(sizes) - sizes[0] < 50
    page.close()
