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


def distribution(series: Mapping[str, np.ndarray], title: str, unit: str) -> Markup:
    """Draw histograms over each other, on one scale; the outermost bars hold all beyond.

    Args:
        series: by name, finite numbers: one, or a whole and a part of it.
        title: what was measured.
        unit: below the axis.
    """
    everything = np.concatenate(list(series.values()))
    low, high = (float(value) for value in np.quantile(everything, [0.005, 0.995]))
    if everything.min() == everything.max():
        return note(f"{title}: {low:g} everywhere ({unit}).")
    if high <= low:  # all but a few are the same
        low, high = float(everything.min()), float(everything.max())
    edges = np.linspace(low, high, BINS + 1)
    counted = {
        name: np.histogram(np.clip(values, low, high), edges)[0] for name, values in series.items()
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
