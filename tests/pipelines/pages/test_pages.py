import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pandas as pd
import pytest
from markupsafe import Markup

from pipelines import pages
from pipelines.pages import Section


class _Tags(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def named(self, name: str) -> list[dict]:
        return [attrs for tag, attrs in self.tags if tag == name]


def _svg(html: str) -> str:
    return base64.b64decode(re.search(r"svg\+xml;base64,([^\"]+)", html)[1]).decode()


def _line(axes):
    axes.plot([0, 1], [1, 3], color=pages.colour("main"))
    axes.set_title("costs $5 and $6")


def test_page_leads_to_its_sections_and_escapes_plain_text():
    html = pages.page("A & B", ["<lead>"], [Section("One", ["<b>x</b>"]), Section("One", [])])
    tags = _Tags(html)
    targets = [a["href"].removeprefix("#") for a in tags.named("a")]
    assert len(set(targets)) == 2
    assert targets == [section["id"] for section in tags.named("section")]
    assert "<title>A &amp; B</title>" in html
    assert "<p>&lt;lead&gt;</p>" in html
    assert "<p>&lt;b&gt;x&lt;/b&gt;</p>" in html


def test_markup_is_not_escaped_twice():
    assert "<p><b>x</b></p>" in pages.page("t", [], [Section("s", [Markup("<p><b>x</b></p>")])])


def test_table_formats_numbers_and_marks_what_is_missing():
    frame = pd.DataFrame(
        {
            "name": ["a<b", "c\nsmaller"],
            "count": [12345, 0],
            "share": [0.25, np.nan],
            "score": [0.123456, 2.0],
            "kept": [True, False],
        }
    )
    html = pages.table(frame, "Counts", {"share": "{:.1%}"}, bars=["count"])
    cells = re.findall(r"<td[^>]*>(.*?)</td>", html)
    assert cells == [
        *("a&lt;b", "12,345", "25.0%", "0.123", "True"),
        *("c<br><small>smaller</small>", "0", "–", "2", "False"),
    ]
    assert re.findall(r"--bar:([\d.]+)%", html) == ["100.0", "0.0"]


def test_empty_table_is_a_table():
    assert "<th" in pages.table(pd.DataFrame({"a": [], "b": []}), "None", bars=["b"])


def test_figure_has_a_text_and_follows_the_colour_scheme():
    html = pages.figure(_line, "A <line>", "below")
    assert 'alt="A &lt;line&gt;"' in html
    svg = _svg(html)
    assert "var(--main)" in svg and pages.colour("main") not in svg.split("</style>")[1]
    assert "prefers-color-scheme:dark" in svg
    assert "costs $5 and $6" in svg


def test_equal_figures_have_equal_bytes():
    assert pages.figure(_line, "a") == pages.figure(_line, "a")


@pytest.mark.parametrize("shape", [(48, 48, 1), (600, 300, 3), (7, 900, 3), (40, 40)])
def test_pictures_are_shrunk_not_grown_and_described(shape):
    html = pages.pictures([("Training_1-2", np.full(shape, 90, np.uint8))], "blank")
    (image,) = _Tags(html).named("img")
    assert image["alt"] == "blank: Training_1-2"
    scale = min(1, pages.PICTURE_SIDE / max(shape[:2]))
    assert int(image["width"]) == max(1, round(shape[1] * scale))
    assert int(image["height"]) == max(1, round(shape[0] * scale))


def test_pictures_keep_their_colours():
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 255
    html = pages.pictures([("r", red)], "red")
    encoded = base64.b64decode(re.search(r"jpeg;base64,([^\"]+)", html)[1])
    blue, green, red_again = cv2.imdecode(np.frombuffer(encoded, np.uint8), 1)[8, 8]
    assert red_again > 200 and blue < 60 and green < 60


def test_markdown_goes_below_the_pages_headings_and_shows_html_as_text():
    html = pages.markdown("# T\n\n## U\n\n| a | b |\n| - | - |\n| 1 | <script>x</script> |\n")
    assert "<h3>T</h3>" in html and "<h4>U</h4>" in html and "<table>" in html
    assert "<script>" not in html


def test_columns_sort_by_a_click(browse, tmp_path):
    frame = pd.DataFrame({"name": ["b", "a", "c"], "n": [10, 9, 100], "x": [np.nan, 2.0, 1.0]})
    path = tmp_path / "t.html"
    path.write_text(pages.page("t", [], [Section("s", [pages.table(frame, "c")])]))
    page, _ = browse(path)

    def order() -> str:
        return "".join(page.locator("tbody td:first-child").all_inner_texts())

    def click(column: str) -> str:
        page.get_by_role("button", name=column, exact=True).click()
        return order()

    assert order() == "bac"
    assert click("name") == "abc"
    assert click("n") == "abc" and click("n") == "cba"
    assert click("x") == "bca"
    assert page.locator("th[aria-sort]").count() == 1


def test_dark_mode_reaches_the_charts_and_the_printer_gets_none_of_it(browse, tmp_path):
    path = tmp_path / "t.html"
    path.write_text(pages.page("t", [], [Section("s", [pages.figure(_line, "a line")])]))

    def paper(page) -> tuple[float, float]:
        """Grey level of the chart's background, and how far its ink stands out from it."""
        chart = cv2.imdecode(np.frombuffer(page.locator("figure img").screenshot(), np.uint8), 0)
        return float(np.median(chart)), float(np.abs(chart.astype(int) - np.median(chart)).max())

    light, dark = browse(path, color_scheme="light")[0], browse(path, color_scheme="dark")[0]
    assert dark.evaluate("document.querySelector('figure img').naturalWidth") > 100
    assert paper(light)[0] > 240 and paper(dark)[0] < 40
    assert min(paper(light)[1], paper(dark)[1]) > 120, "nothing stands out from the paper"
    dark.emulate_media(media="print", color_scheme="dark")
    assert paper(dark)[0] > 240 and paper(dark)[1] > 200
