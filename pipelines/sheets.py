"""Contact sheets: a grid of small pictures with a line of text under each."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def contact_sheet(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    path: Path,
    title: str,
    points: Sequence[np.ndarray] | None = None,
    more_points: Sequence[np.ndarray] | None = None,
    columns: int = 8,
) -> None:
    """Draw pictures in a grid and write it as an image.

    Args:
        images: uint8 (H, W, 1 or 3) each, grey or RGB.
        captions: one for each picture.
        path: where to write; its suffix decides the format.
        title: over the whole sheet.
        points: for each picture (K, 2) in crop coordinates (0 to 1), drawn in green; true ones.
        more_points: likewise in red; predicted ones.
        columns: pictures in a row.
    """
    import matplotlib.pyplot as plt

    rows = max(1, math.ceil(len(images) / columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * 1.5, rows * 1.75 + 0.4), squeeze=False, dpi=80
    )
    for axis in axes.flat:
        axis.axis("off")
    for index, (axis, image, caption) in enumerate(zip(axes.flat, images, captions, strict=False)):
        side = np.array([image.shape[1], image.shape[0]])
        grey = image.shape[2] == 1
        axis.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=255)
        for set_of_points, colour in ((points, "lime"), (more_points, "red")):
            if set_of_points is not None:
                x, y = (set_of_points[index] * side - 0.5).T
                axis.plot(x, y, ".", color=colour, markersize=1.5)
        # A "$" in an id is no formula.
        axis.set_title(caption, fontsize=6, pad=2, parse_math=False)
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
