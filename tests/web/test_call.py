"""The landmark call between two pages of one browser."""

import io
import re

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.web.conftest import WEB, showing

LIMIT = 60  # kbit/s
SAMPLE = WEB / "public" / "sample.jpg"
BLANK = io.BytesIO()
Image.new("RGB", (64, 64), "teal").save(BLANK, "PNG")


def open_call(context, address):
    page = context.new_page()
    page.goto(f"{address}#call")
    page.wait_for_selector("body[data-ready]")
    return page


def connect_by_text(one, other):
    """Carry the invitation and the reply over, as people would."""
    for page in (one, other):
        page.click("summary")
    one.click("#create-invitation")
    one.wait_for_function("document.getElementById('mine').value")
    other.fill("#theirs", one.input_value("#mine"))
    other.click("#use-theirs")
    other.wait_for_function("document.getElementById('mine').value")
    one.fill("#theirs", other.input_value("#mine"))
    one.click("#use-theirs")


def press_at_once(pages):
    """Press Call in both windows, in the second as soon as it hears of the first."""
    first, second = pages
    second.evaluate(
        """() => { const go = new BroadcastChannel("go");
            go.onmessage = () => document.getElementById("find-tab").click(); }"""
    )
    first.evaluate(
        """() => { new BroadcastChannel("go").postMessage(0);
            document.getElementById("find-tab").click(); }"""
    )


def wait_until_connected(*pages):
    for page in pages:
        page.wait_for_selector("body[data-call=connected]")


def canvas_is_empty(page):
    return page.evaluate(
        """() => { const { width, height } = document.getElementById("other");
            const data = document.getElementById('other').getContext('2d')
                .getImageData(0, 0, width, height).data;
            return !data.some((value) => value > 0); }"""
    )


@pytest.fixture(scope="module")
def moving(launch, moving_camera):
    return launch(*showing(moving_camera)).new_context(permissions=["camera"])


def test_a_moving_face_stays_within_the_budget(moving, address, capsys):
    """What WebRTC counts as sent, over what arrives, for four seconds of a head in motion."""
    one, other = open_call(moving, address), open_call(moving, address)
    one.bring_to_front()  # only the page in front gets frames from its camera
    one.click("#call [data-do=camera]")
    one.wait_for_function("document.body.dataset.frames > 3")
    one.click("#find-tab")
    wait_until_connected(one, other)
    other.wait_for_function("document.body.dataset.received > 30")
    before, arrived = one.evaluate("grimace.traffic()"), other.evaluate("grimace.traffic()")
    places = []
    for _ in range(16):
        one.wait_for_timeout(250)
        places += one.evaluate("grimace.faces().map(({ box }) => box.left)")
    after, arriving = one.evaluate("grimace.traffic()"), other.evaluate("grimace.traffic()")
    frames = arriving["framesIn"] - arrived["framesIn"]
    wire, points = (
        (after[name] - before[name]) * 8 / frames * 30 / 1000 for name in ("wireOut", "bytesOut")
    )
    with capsys.disabled():
        print(
            f"\nlandmark call: {frames / 4:.0f} frames/s came; for 30 frames/s: {wire:.1f} kbit/s "
            f"on the wire, headers and acknowledgements included, {points:.1f} of it points"
        )
    assert len(places) >= 12 and max(places) - min(places) > 100  # it was seen, and it moved
    assert frames > 20 and 0 < points < wire < LIMIT
    assert float(one.inner_text("#kbits-wire")) < LIMIT
    assert not canvas_is_empty(other)

    expect(other.locator("#other-emoji")).to_be_visible()
    one.evaluate("""() => { const list = document.getElementById("emotion-model");
        list.value = ""; list.dispatchEvent(new Event("change")); }""")
    expect(other.locator("#other-emoji")).to_be_hidden()  # no model, no emotion: not an angry one
    assert not canvas_is_empty(other)
    hide = (
        "(hidden) => Object.defineProperty(document, 'hidden', { value: hidden, writable: true })"
    )
    one.evaluate(hide, True)  # its camera would give no more frames: no face may freeze in view
    expect(other.locator("#other-note")).to_have_text("The other side shows no face")
    one.evaluate(hide, False)
    expect(other.locator("#other-note")).to_have_text("")
    one.click("#call [data-do=stop]")
    expect(other.locator("#other-note")).to_have_text("The other side shows no face")
    assert canvas_is_empty(other)
    one.click("#hang-up")
    expect(other.locator("#call-state")).to_have_text("The call has ended")
    one.close()
    other.close()


def test_a_picture_crosses_and_its_emoji_goes_with_it(context, address):
    one, other = open_call(context, address), open_call(context, address)
    one.set_input_files("#file", [SAMPLE])
    one.wait_for_function("document.body.dataset.frames > 0")
    one.click("#find-tab")
    other.wait_for_function("document.body.dataset.received > 1")  # sent anew every second
    expect(other.locator("#other-emoji")).to_be_visible()
    assert other.locator("#other-emoji").get_attribute("data-label") == "angry"  # the largest face
    expect(one.locator("#other-note")).to_have_text("The other side shows no face")
    one.set_input_files(
        "#file", [{"name": "no.png", "mimeType": "image/png", "buffer": BLANK.getvalue()}]
    )
    expect(other.locator("#other-note")).to_have_text("The other side shows no face")
    expect(other.locator("#other-emoji")).to_be_hidden()
    one.close()
    other.close()


def test_two_windows_may_call_at_once(context, address):
    pages = [open_call(context, address), open_call(context, address)]
    for _ in range(2):
        press_at_once(pages)
        wait_until_connected(*pages)
        pages[0].click("#hang-up")
        pages[1].wait_for_selector("body[data-call=closed]")
    third = open_call(context, address)  # both others are there, one is taken
    third.click("#find-tab")
    wait_until_connected(third)
    for page in pages:
        page.wait_for_selector("body:is([data-call=connected], [data-call=idle])")
    assert len({page.evaluate("document.body.dataset.call") for page in pages}) == 2
    for page in (*pages, third):
        page.close()


def test_who_calls_alone_is_told_and_may_cancel(browser, address):
    context = browser.new_context()
    page = context.new_page()
    page.clock.install()
    page.goto(f"{address}#call")
    page.clock.resume()
    page.wait_for_selector("body[data-ready]")
    page.click("#find-tab")
    expect(page.locator("#hang-up")).to_have_text("Cancel")
    expect(page.locator("#find-tab")).to_be_disabled()
    page.click("#hang-up")
    expect(page.locator("#call-state")).to_have_text("Not connected")
    expect(page.locator("#hang-up")).to_be_hidden()
    page.click("#find-tab")
    page.clock.fast_forward(10_000)
    expect(page.locator("#call-error")).to_have_text(re.compile("No other window answered"))
    expect(page.locator("#find-tab")).to_be_enabled()
    context.close()


def test_two_texts_are_enough(context, address):
    one, other = open_call(context, address), open_call(context, address)
    connect_by_text(one, other)
    wait_until_connected(one, other)
    one.close()
    other.close()


def test_wrong_texts_are_named(context, address):
    page = open_call(context, address)
    page.click("summary")
    page.fill("#theirs", "hello")
    page.click("#use-theirs")
    expect(page.locator("#call-error")).to_have_text(re.compile("no invitation"))
    page.close()
