"""The demo's PNGs are the page's SVGs."""

import io

import numpy as np
from PIL import Image

from models.schemes import EMOTIONS
from tests.web.conftest import WEB

EMOJI = WEB / "public" / "emoji"


def test_each_emotion_has_both_and_they_are_one_picture(browser):
    page = browser.new_page(viewport={"width": 256, "height": 256})
    for name in EMOTIONS:
        svg = (EMOJI / f"{name}.svg").read_text().replace('width="512" height="512"', "")
        page.set_content(f'<body style="margin: 0">{svg}</body>')
        drawn = page.screenshot(omit_background=True)
        pixels, kept = (
            np.asarray(Image.open(source).convert("RGBA")).astype(int)
            for source in (io.BytesIO(drawn), EMOJI / f"{name}.png")
        )
        assert np.abs(pixels - kept).mean() < 1, f"draw {name}.png again: see web/README.md"
    page.close()
