"""Read pictures and points that a table holds as text, and say what is wrong with them."""

from collections.abc import Sequence

import cv2
import numpy as np


def parse_points(cells: Sequence[str]) -> tuple[np.ndarray, np.ndarray, str]:
    """Parse the cells x0, y0, x1, y1 and so on.

    Returns:
        float32 (N, 2) with 0 where a point is missing (either cell blank or not finite),
        bool (N,), and ""; or (0, 2), (0,) and what is wrong: a text that is no number, or no
        point at all.
    """
    try:
        values = np.array([cell.strip() or "nan" for cell in cells], np.float32)
    except ValueError:
        return *no_points(), "a coordinate is not a number"
    points = values.reshape(-1, 2)
    visible = np.all(np.isfinite(points), axis=1)
    if not visible.any():
        return *no_points(), "all landmarks are missing"
    points[~visible] = 0
    return points, visible, ""


def no_points() -> tuple[np.ndarray, np.ndarray]:
    """Return the landmarks and visibility of a face that has none: (0, 2) and (0,)."""
    return np.zeros((0, 2), np.float32), np.zeros((0,), bool)


def encode_pixels(text: str, side: int) -> tuple[bytes, str]:
    """Encode side × side grey levels, row by row, as PNG, which loses nothing.

    Returns:
        The file's bytes and "", or b"" and what is wrong with the numbers.
    """
    values = text.split()
    if len(values) != side * side:
        return b"", f"{len(values)} pixels instead of {side * side}"
    try:
        pixels = np.array(values, np.int64)
    except (ValueError, OverflowError):
        return b"", "a pixel is not a whole number"
    if pixels.min() < 0 or pixels.max() > 255:
        return b"", "a pixel is outside 0-255"
    return cv2.imencode(".png", pixels.astype(np.uint8).reshape(side, side))[1].tobytes(), ""
