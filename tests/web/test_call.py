"""The landmark call between two pages of one browser."""

import re

from playwright.sync_api import expect

LIMIT = 60  # kbit/s


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


def test_a_face_travels_as_points_within_the_budget(context, address):
    one, other = open_call(context, address), open_call(context, address)
    # Only the page in front gets frames from its camera: it sends, the other receives.
    one.bring_to_front()
    one.click("#call [data-do=camera]")
    one.wait_for_function("document.body.dataset.frames > 3")
    one.click("#find-tab")
    for page in (one, other):
        page.wait_for_selector("body[data-call=connected]")
    other.wait_for_function("document.body.dataset.received > 40")
    one.wait_for_timeout(2100)  # two counts of a second
    wire = float(one.inner_text("#kbits-wire"))
    points = float(one.inner_text("#kbits-points"))
    frames = float(one.inner_text("#frames-out"))
    assert frames >= 1 and 0 < points < wire
    assert wire / frames * 30 < LIMIT
    assert other.evaluate(
        """() => { const { width, height } = document.getElementById("other");
            const data = document.getElementById('other').getContext('2d')
                .getImageData(0, 0, width, height).data;
            return data.some((value) => value > 0); }"""
    )
    one.click("#hang-up")
    expect(other.locator("#call-state")).to_have_text("The call has ended")
    one.close()
    other.close()


def test_two_texts_are_enough(context, address):
    one, other = open_call(context, address), open_call(context, address)
    connect_by_text(one, other)
    for page in (one, other):
        page.wait_for_selector("body[data-call=connected]")
    one.close()
    other.close()


def test_wrong_texts_are_named(context, address):
    page = open_call(context, address)
    page.click("summary")
    page.fill("#theirs", "hello")
    page.click("#use-theirs")
    expect(page.locator("#call-error")).to_have_text(re.compile("no invitation"))
    page.close()
