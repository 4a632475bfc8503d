"""Self-contained HTML pages: one file that opens anywhere, offline, and asks for nothing else.

A page is a title, a lead and sections; what stands in them is made by the functions below and is
already safe HTML. Plain strings are escaped wherever they come in. Equal input gives equal bytes:
no date, no random id.
"""

import base64
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from pandas.api.types import is_bool_dtype, is_numeric_dtype

COLOURS = {  # light, dark
    "paper": ("#fcfbf8", "#16191d"),
    "panel": ("#f3f1eb", "#1f2429"),
    "ink": ("#23272c", "#e4e1da"),
    "soft": ("#5e646b", "#a2a8ae"),
    "line": ("#d9d5cb", "#363c43"),
    "pale": ("#c3cdcf", "#4b575c"),
    "main": ("#1b6b76", "#58b4be"),
    "warm": ("#b5532c", "#e58b62"),
    "gold": ("#96700f", "#d9ae45"),
}
"""The palette, by role. Charts are drawn in the light ones, `colour("main")`."""

PICTURE_SIDE = 160  # pixels; what is larger is shrunk, to keep pages light


class Section(NamedTuple):
    """A part of a page, reached from its table of contents."""

    title: str
    blocks: Sequence[Markup | str]


def page(title: str, lead: Iterable[Markup | str], sections: Sequence[Section]) -> str:
    """Put a whole page together.

    Args:
        title: the heading, which is the browser's title too.
        lead: what stands above the table of contents.
        sections: in order; strings among their blocks become paragraphs.
    """
    anchors = [f"{number}-{_slug(section.title)}" for number, section in enumerate(sections, 1)]
    return _template("page.html").render(
        title=title,
        lead=_blocks(lead),
        sections=[
            (anchor, section.title, _blocks(section.blocks))
            for anchor, section in zip(anchors, sections, strict=True)
        ],
        style=Markup(Path(__file__).with_name("page.css").read_text()),
        palette=_palette(),
    )


def facts(numbers: Mapping[str, str]) -> Markup:
    """Show headline figures: what each is, and its value."""
    return _render("facts", numbers=numbers)


def command(line: str) -> Markup:
    """Show a command to copy."""
    return _render("command", line=line)


def note(text: str) -> Markup:
    """Show a quieter paragraph."""
    return _render("note", text=text)


def heading(text: str) -> Markup:
    """Begin a sub-section."""
    return _render("heading", text=text)


def side_by_side(*blocks: Markup) -> Markup:
    """Lay blocks out in columns where there is room, below each other on a phone."""
    return _render("side_by_side", blocks=blocks)


def markdown(text: str) -> Markup:
    """Render Markdown, its headings two levels deeper, below those of the page.

    HTML in the text is shown as text.
    """
    from markdown_it import MarkdownIt

    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = renderer.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 2)}"
    html = renderer.renderer.render(tokens, renderer.options, {})
    return _render("markdown", html=Markup(html))


def table(
    frame: pd.DataFrame,
    caption: str,
    formats: Mapping[str, str] | None = None,
    bars: Sequence[str] = (),
) -> Markup:
    """Show a table whose columns sort by a click.

    Args:
        frame: what to show, without its index. Missing values become a dash;
            what follows a line break in a text stands below it, smaller.
        caption: says what is counted.
        formats: by column, a format like "{:.1%}"; whole numbers get separators without one,
            others three digits.
        bars: numeric columns with a bar behind each figure, all to one scale.
    """
    given = formats or {}
    numeric = {
        name: is_numeric_dtype(column) and not is_bool_dtype(column)
        for name, column in frame.items()
    }
    longest = max((frame[name].max() for name in bars), default=0) or 1
    rows = [
        [_cell(value, given.get(str(name)), numeric[name]) for name, value in row.items()]
        for row in frame.to_dict("records")
    ]
    for row, record in zip(rows, frame.to_dict("records"), strict=True):
        for place, name in enumerate(frame.columns):
            if name in bars and not pd.isna(record[name]):
                row[place]["bar"] = f"{max(0.0, record[name] / longest):.1%}"
    columns = [(str(name), bool(numeric[name])) for name in frame.columns]
    return _render("table", columns=columns, rows=rows, caption=caption)


def figure(
    draw: Callable[[Any], None],
    alt: str,
    caption: str = "",
    size: tuple[float, float] = (4.6, 2.6),
) -> Markup:
    """Draw a chart that follows the reader's light or dark mode.

    Args:
        draw: draws into the matplotlib Axes it is given, in colours of `colour`.
        alt: what the chart shows, for those who cannot see it.
        caption: below it.
        size: in inches. Near five in width it stays legible on a phone.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = io.StringIO()
    with rc_context(_chart_style()):
        chart = Figure(figsize=size, layout="constrained")
        draw(chart.subplots())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        chart.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :].replace("'DejaVu Sans'", "system-ui, sans-serif")
    for name, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    svg = svg.replace("<defs>", f"<defs><style>{_palette()}</style>", 1)
    address = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    pixels = [round(inches * 96) for inches in size]
    return _render("figure", address=address, alt=alt, caption=caption, pixels=pixels)


def pictures(items: Sequence[tuple[str, np.ndarray]], alt: str, wide: bool = False) -> Markup:
    """Show a contact sheet.

    Args:
        items: caption and uint8 (H, W, 1 or 3) picture, grey or RGB, each.
        alt: what they are; each picture's text is this and its caption.
        wide: fewer and larger in a row.
    """
    shown = [
        (_breakable(caption), f"{alt}: {caption}", *_address(picture)) for caption, picture in items
    ]
    return _render("pictures", items=shown, wide=wide)


def colour(role: str) -> str:
    """Return the colour for a role of `COLOURS`, to draw charts in."""
    return COLOURS[role][0]


def _cell(value: Any, given: str | None, numeric: bool) -> dict[str, Any]:
    if not isinstance(value, str) and pd.isna(value):
        return {"text": "–", "key": "", "numeric": numeric, "bar": ""}
    if given:
        text = given.format(value)
    elif isinstance(value, float | np.floating):
        text = f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"
    elif numeric:
        text = f"{value:,}"
    else:
        first, *rest = str(value).split("\n")
        more = Markup("<br><small>{}</small>").format(" ".join(rest)) if rest else ""
        text = escape(first) + more
    return {"text": text, "key": float(value) if numeric else "", "numeric": numeric, "bar": ""}


def _address(picture: np.ndarray) -> tuple[str, int, int]:
    """Return a picture as a data address, and its width and height."""
    scale = min(1.0, PICTURE_SIDE / max(picture.shape[:2]))
    if scale < 1:
        size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    bgr = picture[..., ::-1] if picture.ndim == 3 and picture.shape[2] == 3 else picture
    _, encoded = cv2.imencode(".jpg", bgr, (cv2.IMWRITE_JPEG_QUALITY, 88))
    text = base64.b64encode(encoded.tobytes()).decode()
    return f"data:image/jpeg;base64,{text}", picture.shape[1], picture.shape[0]


def _breakable(caption: str) -> Markup:
    """Let long ids break after an underscore or hyphen only."""
    return Markup(re.sub(r"([_-])", r"\1<wbr>", str(escape(caption))))


def _blocks(blocks: Iterable[Markup | str]) -> list[Markup]:
    return [
        block if isinstance(block, Markup) else Markup("<p>{}</p>").format(block)
        for block in blocks
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _palette() -> Markup:
    """Return the colours as CSS variables."""
    light, dark = (
        "".join(f"--{name}:{pair[mode]};" for name, pair in COLOURS.items()) for mode in (0, 1)
    )
    return Markup(
        f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    )


def _chart_style() -> dict[str, Any]:
    ink, soft, line = colour("ink"), colour("soft"), colour("line")
    return {
        "svg.fonttype": "none",  # text stays text, in the reader's own font
        "svg.hashsalt": "grimace",
        "svg.id": None,
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "text.color": ink,
        "text.parse_math": False,  # a "$" in an id is no formula
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": line,
        "axes.labelcolor": soft,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": line,
        "grid.linewidth": 0.6,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": soft,
        "ytick.labelcolor": soft,
        "legend.frameon": False,
        "legend.fontsize": 10,
    }


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _template(name: str) -> Template:
    return _environment().get_template(name)


def _render(macro: str, **values: Any) -> Markup:
    """Call one macro of `parts.html`."""
    return Markup(getattr(_template("parts.html").module, macro)(**values))
