"""What the demo draws over a picture: emoji, box and label, landmarks.

Colours are RGB, pictures are uint8 (H, W, 3), positions are in pixels of the picture with pixel
centres at whole numbers.
"""

from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipelines.datasets.example import Box

EMOJI = Path(__file__).parents[1] / "web" / "public" / "emoji"
EMOJI_SIZE = 1.5  # in sides of the square around the points: hair and chin are hidden too
SUN, INK = (255, 200, 61), (43, 32, 6)

# The parts of iBUG-68: first and last index, and whether they close.
_PARTS = (
    (0, 16, False),
    (17, 21, False),
    (22, 26, False),
    (27, 30, False),
    (31, 35, False),
    (36, 41, True),
    (42, 47, True),
    (48, 59, True),
    (60, 67, True),
)
_SHIFT = 4  # OpenCV draws at sixteenths of a pixel


def draw_emoji(picture: np.ndarray, label: str, box: Box, eyes: np.ndarray) -> None:
    """Cover a face with its emoji, leaning as the eyes do, in place.

    Args:
        picture: is drawn on.
        label: one of `models.schemes.EMOTIONS`.
        box: the square around the face's points.
        eyes: (2, 2), the left one in the picture first.
    """
    emoji = _emoji(label)
    side = (box.right - box.left) * EMOJI_SIZE
    dx, dy = eyes[1] - eyes[0]
    scale, angle = side / emoji.shape[0], np.arctan2(dy, dx)
    # The points end at the brows: the head reaches further up than down.
    x, y = (box.left + box.right) / 2, (box.top + box.bottom) / 2 - side * 0.07
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    middle = (emoji.shape[0] - 1) / 2
    left, top = max(0, int(x - side)), max(0, int(y - side))
    right, bottom = (
        min(picture.shape[1], int(x + side) + 1),
        min(picture.shape[0], int(y + side) + 1),
    )
    if right <= left or bottom <= top:
        return
    matrix = np.array(
        [
            [cos, -sin, x - left - cos * middle + sin * middle],
            [sin, cos, y - top - sin * middle - cos * middle],
        ]
    )
    # Premultiplied, so that the transparent surroundings lend no colour to the edge.
    drawn = cv2.warpAffine(
        _shrunk(label, scale), _rescaled(matrix, scale), (right - left, bottom - top)
    )
    part = picture[top:bottom, left:right]
    part[:] = np.clip(drawn[..., :3] + part * (1 - drawn[..., 3:] / 255) + 0.5, 0, 255)


def _rescaled(matrix: np.ndarray, scale: float) -> np.ndarray:
    """Adapt a transform to the emoji halved as often as `_shrunk` does it."""
    factor = 2.0 ** _halvings(scale)
    offset = (factor - 1) / 2  # of a pixel's centre
    result = matrix.copy()
    result[:, :2] *= factor
    result[:, 2] += matrix[:, :2] @ [offset, offset]
    return result


def _halvings(scale: float) -> int:
    return max(0, int(np.floor(-np.log2(max(scale, 1 / 64)))))


def _shrunk(label: str, scale: float) -> np.ndarray:
    emoji = _emoji(label)
    for _ in range(_halvings(scale)):
        emoji = cv2.resize(emoji, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return emoji


@cache
def _emoji(label: str) -> np.ndarray:
    """Float32 (256, 256, 4), 0–255, premultiplied."""
    with Image.open(EMOJI / f"{label}.png") as picture:
        pixels = np.asarray(picture.convert("RGBA"), np.float32)
    return np.dstack([pixels[..., :3] * pixels[..., 3:] / 255, pixels[..., 3]])


def draw_points(picture: np.ndarray, points: np.ndarray, box: Box) -> None:
    """Draw landmarks, (N, 2), and for iBUG-68 the lines along them, in place."""
    width = max(1, round((box.right - box.left) / 110))
    places = np.clip(np.rint(points * 2**_SHIFT), -(2**24), 2**24).astype(np.int32)
    if len(points) == 68:
        lines = [places[first : last + 1] for first, last, _ in _PARTS]
        for line, (_, _, closed) in zip(lines, _PARTS, strict=True):
            cv2.polylines(picture, [line], closed, (255, 255, 255), width, cv2.LINE_AA, _SHIFT)
    radius = round(1.5 * width * 2**_SHIFT)
    for x, y in places.tolist():
        cv2.circle(picture, (x, y), radius, SUN, cv2.FILLED, cv2.LINE_AA, _SHIFT)


def draw_box(picture: np.ndarray, box: Box, text: str) -> None:
    """Draw a box and, where there is a text, its label above it, in place."""
    width = max(1, round((box.right - box.left) / 70))
    left, top, right, bottom = (round(value) for value in np.clip(box, -(2**20), 2**20))
    cv2.rectangle(picture, (left, top), (right, bottom), SUN, width, cv2.LINE_AA)
    if text:
        write(picture, text, (left, top), (box.right - box.left) / 260)


def write(picture: np.ndarray, text: str, place: tuple[int, int], scale: float = 0.6) -> None:
    """Write a line on a yellow ground that ends above `place`, inside the picture, in place."""
    size = max(12, round(30 * scale))
    font = ImageFont.load_default(size)  # carried by Pillow itself
    pad = size // 3
    width = min(round(font.getlength(text)) + 2 * pad, picture.shape[1])
    height = min(size + 2 * pad, picture.shape[0])
    sign = Image.new("RGB", (width, height), SUN)
    ImageDraw.Draw(sign).text((pad, height // 2), text, INK, font, anchor="lm")
    left = max(0, min(place[0], picture.shape[1] - width))
    bottom = max(height, min(place[1], picture.shape[0]))
    picture[bottom - height : bottom, left : left + width] = np.asarray(sign)
