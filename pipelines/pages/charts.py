"""The charts that several pages show; each takes numbers and returns a figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from pipelines.pages import colour, figure, note

BINS = 32
MOST_BARS = 24
MOST_PATTERNS = 10
ROLES = ("pale", "main", "warm")
LINES = [  # enough for fifteen to be told apart
    (role, style) for style in ("-", "--", ":") for role in ("main", "warm", "gold", "ink", "soft")
]


def distribution(
    series: Mapping[str, np.ndarray], title: str, unit: str, shares: bool = False
) -> Markup:
    """Draw histograms over each other, on one scale; the outermost bars hold all beyond.

    Args:
        series: by name, finite numbers: one, or a whole and a part of it.
        title: what was measured.
        unit: below the axis.
        shares: draw each as shares of its own, for two that are no whole and part.
    """
    everything = np.concatenate(list(series.values()))
    low, high = (float(value) for value in np.quantile(everything, [0.005, 0.995]))
    if everything.min() == everything.max():
        return note(f"{title}: {low:g} everywhere ({unit}).")
    if high <= low:  # all but a few are the same
        low, high = float(everything.min()), float(everything.max())
    edges = np.linspace(low, high, BINS + 1)
    counted = {
        name: np.histogram(np.clip(values, low, high), edges)[0] / (len(values) if shares else 1)
        for name, values in series.items()
    }

    def draw(axes: Any) -> None:
        roles = ROLES if len(series) > 1 else ROLES[1:]
        for (name, counts), role in zip(counted.items(), roles, strict=False):
            fill = role == roles[0]
            axes.stairs(
                counts,
                edges,
                fill=fill,
                color=colour(role),
                linewidth=0 if fill else 1.6,
                label=name,
            )
        axes.set_title(title)
        axes.set_xlabel(unit)
        axes.set_ylim(bottom=0)
        if shares:
            axes.yaxis.set_major_formatter("{x:.0%}")
        if len(series) > 1:
            axes.legend()

    medians = ", ".join(
        f"{np.median(values):.3g}" + (f" ({name})" if len(series) > 1 else "")
        for name, values in series.items()
        if len(values)
    )
    return figure(draw, f"Histogram: {title}, {unit}. Median {medians}.", f"Median {medians}.")


def bars(counts: pd.DataFrame, title: str) -> Markup:
    """Draw one horizontal bar a row; the second column lies over the first, whose part it is.

    Args:
        counts: numbers, rows named by its index; what exceeds 24 rows is summed up as "others".
        title: what is counted.
    """
    if len(counts) > MOST_BARS:
        rest = counts.iloc[MOST_BARS - 1 :].sum().rename(f"{len(counts) - MOST_BARS + 1} others")
        counts = pd.concat([counts.iloc[: MOST_BARS - 1], rest.to_frame().T])
    names = [str(name) for name in counts.index]

    def draw(axes: Any) -> None:
        places = np.arange(len(names))
        roles = ROLES if counts.shape[1] > 1 else ROLES[1:]
        for number, ((name, values), role) in enumerate(zip(counts.items(), roles, strict=False)):
            axes.barh(places, values, 0.72 - 0.3 * number, color=colour(role), label=name)
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))
        axes.xaxis.set_major_locator(_few_ticks())
        axes.set_title(title)
        if counts.shape[1] > 1:
            axes.figure.legend(loc="outside lower center", ncols=2)

    said = "; ".join(
        f"{name}: " + ", ".join(f"{column} {value:,.0f}" for column, value in row.items())
        for name, row in zip(names, counts.to_dict("records"), strict=True)
    )
    return figure(draw, f"Bars: {title}. {said}.", size=(4.6, 1.1 + 0.32 * max(2, len(names))))


def shares(values: pd.DataFrame, title: str) -> Markup:
    """Draw shares (0 to 1) as dots, one line a row and one colour a column.

    Args:
        values: rows named by its index, up to three columns.
        title: what the shares are of.
    """
    names = [str(name) for name in values.index]

    def draw(axes: Any) -> None:
        places = np.arange(len(names))
        axes.hlines(
            places, values.min(axis=1), values.max(axis=1), color=colour("pale"), linewidth=2
        )
        for (name, column), role in zip(values.items(), ROLES[1:], strict=False):
            axes.plot(column, places, "o", color=colour(role), markersize=7, label=name)
        axes.set_yticks(places, names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.02)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.xaxis.set_major_locator(_few_ticks())
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))
        axes.set_title(title)
        axes.figure.legend(loc="outside lower center", ncols=2)

    said = "; ".join(
        f"{name}: " + ", ".join(f"{column} {value:.0%}" for column, value in row.items())
        for name, row in zip(names, values.to_dict("records"), strict=True)
    )
    return figure(draw, f"Dots: {title}. {said}.", size=(4.6, 1.1 + 0.32 * max(2, len(names))))


def intervals(values: pd.DataFrame, title: str) -> Markup:
    """Draw fractions as dots, each with its interval as a line.

    Args:
        values: columns value, low and high, rows named by its index; the first row on top.
        title: what was measured.
    """
    names = [str(name) for name in values.index]
    narrow = values["high"].max() - values["low"].min() < 0.06

    def draw(axes: Any) -> None:
        places = np.arange(len(names))
        axes.hlines(places, values["low"], values["high"], color=colour("pale"), linewidth=3)
        axes.plot(values["value"], places, "o", color=colour("main"), markersize=7)
        axes.set_yticks(places, names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.xaxis.set_major_formatter("{x:.1%}" if narrow else "{x:.0%}")
        axes.xaxis.set_major_locator(_few_ticks())
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))
        axes.set_title(title)

    said = "; ".join(
        f"{name} {row['value']:.2%} ({row['low']:.2%} to {row['high']:.2%})"
        for name, row in zip(names, values.to_dict("records"), strict=True)
    )
    return figure(
        draw,
        f"Dots with intervals: {title}. {said}.",
        size=(4.6, 0.9 + 0.32 * max(2, len(names))),
    )


def curves(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
    title: str,
    x: str,
    y: str,
    mark: float | None = None,
) -> Markup:
    """Draw rising lines of fractions against fractions, named in the order given.

    Args:
        lines: by name, x and y.
        title: above it.
        x: below the axis.
        y: beside it.
        mark: an x to draw an upright at, and to say the lines' values of.
    """

    def draw(axes: Any) -> None:
        for (name, (across, up)), (role, style) in zip(lines.items(), LINES * 9, strict=False):
            axes.plot(across, up, style, color=colour(role), linewidth=1.8, label=name)
        if mark is not None:
            axes.axvline(mark, color=colour("line"), linewidth=1.2, zorder=0)
        axes.set_xlim(0, max(across.max() for across, _ in lines.values()))
        axes.set_ylim(0, 1.01)
        axes.xaxis.set_major_locator(_few_ticks())
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set(xlabel=x, ylabel=y)
        axes.set_title(title)
        axes.figure.legend(loc="outside lower center", ncols=2)

    at = (
        ""
        if mark is None
        else f" At {mark:.0%}: "
        + ", ".join(f"{name} {np.interp(mark, *line):.1%}" for name, line in lines.items())
        + "."
    )
    rows = (len(lines) + 1) // 2
    return figure(draw, f"Curves: {title}, {y} by {x}.{at}", size=(5.2, 3.3 + 0.24 * rows))


def reliability(table: pd.DataFrame, title: str) -> Markup:
    """Draw how often answers of a confidence are right, and how many there are of each.

    Args:
        table: columns confidence, accuracy and share (of all answers), a row a bin.
        title: whose answers.
    """

    def draw(axes: Any) -> None:
        axes.bar(table["confidence"], table["share"], 0.045, color=colour("pale"))
        axes.plot([0, 1], [0, 1], color=colour("line"), linewidth=1.2)
        axes.plot(table["confidence"], table["accuracy"], "o-", color=colour("main"))
        axes.set(xlim=(0, 1.03), ylim=(0, 1.04), xlabel="confidence")
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set_title(title)

    said = "; ".join(
        f"{row['confidence']:.0%} sure, {row['accuracy']:.0%} right ({row['share']:.0%} of all)"
        for row in table.to_dict("records")
    )
    return figure(draw, f"Reliability of {title}: {said}.", size=(4.0, 3.2))


def confusion(counts: np.ndarray, names: Sequence[str], title: str) -> Markup:
    """Draw a confusion matrix, each row as shares of the true class.

    Args:
        counts: (C, C), rows are true classes.
        names: of the classes.
        title: above it.
    """
    from matplotlib.colors import LinearSegmentedColormap

    heat = LinearSegmentedColormap.from_list("heat", [(0.16, 0.6, 0.66, 0), (0.16, 0.6, 0.66, 0.8)])
    cells = counts / np.maximum(counts.sum(1, keepdims=True), 1)

    def draw(axes: Any) -> None:
        axes.imshow(cells, cmap=heat, vmin=0, vmax=1)
        for row, column in np.ndindex(cells.shape):
            if counts[row, column]:
                share = f"{100 * cells[row, column]:.0f}"
                axes.text(column, row, share, ha="center", va="center", fontsize=9)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="answered", ylabel="true")
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_title(title)

    said = "; ".join(
        f"{name}: " + ", ".join(f"{cells[row, k]:.0%} {names[k]}" for k in range(len(names)))
        for row, name in enumerate(names)
    )
    return figure(draw, f"Confusion matrix of {title}, by true class. {said}.", size=(4.2, 3.9))


def trade_off(points: pd.DataFrame, title: str, x: str, y: str) -> Markup:
    """Draw a fraction with its interval against a cost, on a logarithmic scale.

    Args:
        points: columns x (above 0), y, low and high, rows named by its index.
        title: above it.
        x: the cost, with its unit.
        y: the fraction.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    names = [str(name) for name in points.index]
    left, right = points["x"].min() / 2.5, points["x"].max() * 2.5

    def draw(axes: Any) -> None:
        axes.vlines(points["x"], points["low"], points["high"], color=colour("pale"), linewidth=3)
        axes.plot(points["x"], points["y"], "o", color=colour("main"), markersize=7)
        axes.set_xscale("log")
        axes.set_xlim(left, right)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter("{x:g}")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter("{x:.0%}" if high - low > 0.04 else "{x:.1%}")
        axes.yaxis.set_major_locator(_few_ticks())
        across = np.log(points["x"] / left) / np.log(right / left)
        places = (points[["y", "low", "high"]].to_numpy() - low) / (high - low)
        places = np.column_stack([across, places])
        for name, place, (dx, dy) in zip(names, places, _label_sides(places, names), strict=True):
            axes.annotate(
                name,
                place[:2],
                (8 * dx, 10 * dy),
                xycoords="axes fraction",
                textcoords="offset points",
                ha={1: "left", -1: "right", 0: "center"}[dx],
                va="center",
                fontsize=9,
            )
        axes.set(xlabel=x, ylabel=y)
        axes.set_title(title)

    said = "; ".join(
        f"{name} {row['y']:.2%} at {row['x']:.3g}"
        for name, row in zip(names, points.to_dict("records"), strict=True)
    )
    return figure(draw, f"Scatter: {y} against {x}. {said}.", size=(4.4, 3.2))


def _label_sides(places: np.ndarray, names: Sequence[str]) -> list[tuple[int, int]]:
    """Choose on which side of its dot each label stands, so that few lie on anything.

    Args:
        places: (n, 4), x and y of the dots and the ends of their intervals, in fractions of the
            chart.
        names: the labels.

    Returns:
        A direction (x, y) each: right, left, above or below.
    """
    taken = [(x - 0.02, x + 0.02, y - 0.03, y + 0.03) for x, y, *_ in places]
    taken += [(x - 0.005, x + 0.005, low, high) for x, _, low, high in places]
    sides = []
    for (x, y, *_), name in zip(places, names, strict=True):
        wide, found = 0.022 * len(name), []
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            middle = x + dx * (0.035 + wide / 2), y + dy * 0.07
            box = middle[0] - wide / 2, middle[0] + wide / 2, middle[1] - 0.03, middle[1] + 0.03
            outside = max(0, -box[0], box[1] - 1) + max(0, -box[2], box[3] - 1)
            found.append((sum(_overlap(box, other) for other in taken) + outside, (dx, dy), box))
        _, side, box = min(found, key=lambda item: item[0])
        sides.append(side)
        taken.append(box)
    return sides


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    wide = min(one[1], other[1]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[2], other[2])
    return min(wide, high) if wide > 0 and high > 0 else 0.0


def missing_points(patterns: Mapping[str, int], names: Sequence[str] = ()) -> Markup:
    """Draw which points are labelled together: a row a pattern, the most frequent on top.

    Args:
        patterns: how often each pattern comes, as a text of one "1" (labelled) or "0" a point.
        names: of the points, else they are numbered from 0.
    """
    ranked = sorted(patterns.items(), key=lambda item: (-item[1], item[0]))
    total, shown = sum(patterns.values()), ranked[:MOST_PATTERNS]
    grid = np.array([[bit == "1" for bit in pattern] for pattern, _ in shown])
    points = grid.shape[1]

    def draw(axes: Any) -> None:
        rows, columns = np.nonzero(grid)
        axes.plot(columns, rows, "s", color=colour("main"), markersize=min(9, 290 / points))
        rows, columns = np.nonzero(~grid)
        axes.plot(columns, rows, ".", color=colour("warm"), markersize=min(5, 150 / points))
        axes.set_yticks(range(len(shown)), [f"{count / total:.1%}" for _, count in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(-0.7, points - 0.3)
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_title("Points labelled together")
        if names:
            axes.set_xticks(range(points), names, rotation=55, ha="right", fontsize=9)
        else:
            axes.set_xlabel("point")

    said = "; ".join(
        f"{count:,} rows have {pattern.count('1')} of {points}" for pattern, count in shown
    )
    left = len(ranked) - len(shown)
    rest = f" {left} rarer patterns are not shown." if left else ""
    return figure(
        draw,
        f"Grid of landmark patterns: {said}.",
        f"A row is a pattern and its share of the {total:,} rows; a square is a labelled point, a "
        f"dot a missing one.{rest}",
        size=(5.2, 1.2 + 0.26 * len(shown) + (0.9 if names else 0)),
    )


def heat_map(counts: np.ndarray, title: str) -> Markup:
    """Draw how many points fall on each part of the pictures.

    Args:
        counts: (R, C), the top row first, over the whole of the picture.
        title: what is counted.
    """
    from matplotlib.colors import LinearSegmentedColormap

    # Seen on light and on dark paper alike, through which none shows.
    heat = LinearSegmentedColormap.from_list("heat", [(0.16, 0.6, 0.66, 0), (0.16, 0.6, 0.66, 1)])

    def draw(axes: Any) -> None:
        # The root shows the thinly covered parts too.
        axes.imshow(np.sqrt(counts), cmap=heat, extent=(0, 1, 1, 0), interpolation="nearest")
        axes.set_title(title)
        axes.set_xlabel("of the picture's width")
        axes.set_ylabel("of its height")
        axes.grid(visible=False)

    rows, columns = (np.arange(size) + 0.5 for size in counts.shape)
    y = float((counts.sum(1) * rows).sum() / counts.sum() / len(rows))
    x = float((counts.sum(0) * columns).sum() / counts.sum() / len(columns))
    return figure(
        draw,
        f"Heat map: {title}. Their centre lies at {x:.0%} of the width, {y:.0%} of the height.",
        f"{counts.sum():,.0f} points; the denser, the stronger the colour.",
        size=(4.0, 3.6),
    )


def mean_shape(mean: np.ndarray, spread: np.ndarray, title: str) -> Markup:
    """Draw points where they lie on average, each in an ellipse of one standard deviation.

    Args:
        mean: (N, 2), y down; NaN where there is none.
        spread: (N, 2), standard deviations along x and y.
        title: above it.
    """
    from matplotlib.patches import Ellipse

    def draw(axes: Any) -> None:
        for (x, y), (wide, high) in zip(mean, spread, strict=True):
            ellipse = Ellipse((x, y), 2 * wide, 2 * high, color=colour("pale"), linewidth=0)
            ellipse.set_alpha(0.6)
            axes.add_patch(ellipse)
        axes.plot(*mean.T, "o", color=colour("main"), markersize=3)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_axis_off()
        axes.set_title(title)

    widest = float(np.nanmean(spread))
    return figure(
        draw,
        f"{len(mean)} points of the mean face, scattered by {widest:.1%} of the distance between "
        "the eyes on average.",
        "Turned and scaled so that the eyes coincide; an ellipse is one standard deviation.",
        size=(4.0, 3.6),
    )


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5)
