"""From an encoded picture to the square face crop every model takes, and back.

Two coordinate conventions meet here. *Pixels*: the centre of the top-left pixel is (0, 0), as in
OpenCV. *Crop*: (0, 0) and (1, 1) are the outer corners of the crop. Both have x to the right and
y down. A point p in pixels of a crop of side S has crop coordinate (p + 0.5) / S.
"""

import io

import cv2
import numpy as np
from PIL import Image, ImageOps

from models.schemes import SCHEMES
from pipelines.datasets.example import Box, Example

# How a frame lies to the square around the face's points, in datasets whose pictures are taken
# whole: margin and rise, see `placing`. Medians over 300 training images, that square as BlazeFace
# and `detectors.BOXES` give it.
FRAMES = {"fer2013": (0.06, 0.14)}


class UnreadableImageError(Exception):
    """The bytes are not a whole picture; the message says in what way."""


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """Decode a picture of any common format, whatever its file was called.

    What is transparent shows white, and not the colour that may hide there.

    Args:
        encoded: the file's bytes.
        channels: 1 for grey (ITU-R 601 luma), 3 for RGB.

    Returns:
        uint8 (H, W, channels).

    Raises:
        UnreadableImageError: nothing there, unknown format, damaged, or with more pixels than
            twice what Pillow is told to take.
    """
    if not encoded:
        raise UnreadableImageError("zero bytes")
    try:
        with Image.open(io.BytesIO(encoded)) as picture:
            ImageOps.exif_transpose(picture, in_place=True)
            upright: Image.Image = picture
            if upright.mode.startswith("I;16"):  # Pillow would cut off at 255, not scale
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            if upright.has_transparency_data:
                upright = _on_white(upright.convert("RGBA"))
            mode = "L" if channels == 1 else "RGB"
            pixels = np.asarray(upright if upright.mode == mode else upright.convert(mode))
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise UnreadableImageError(f"too large: more than {most} million pixels") from None
    # Pillow's decoders raise whatever their format's parser meets.
    except Exception as error:
        text = str(error).split(" <")[0] or type(error).__name__
        raise UnreadableImageError(text) from None
    return pixels.reshape(*pixels.shape[:2], channels)


def _on_white(picture: Image.Image) -> Image.Image:
    paper = Image.new("RGB", picture.size, "white")
    paper.paste(picture, mask=picture)
    return paper


def face_box(example: Example, shape: tuple[int, ...], margin: float) -> Box:
    """Return the square that is cropped for an example, in pixels of its image.

    Around the visible landmarks of a scheme with an outline, else around the source's box, each
    widened by `margin` of its longer side on every side; else the whole image, taken to be a face
    crop already (FER-2013). Kaggle-15 has no outline: its points end at brows and lips, and which
    of them are labelled differs from row to row.

    Args:
        example: the labelled face.
        shape: of its decoded image, (H, W, …).
        margin: fraction of the longer side.
    """
    scheme = SCHEMES.get(len(example.landmarks))
    if scheme and scheme.has_outline and example.visible.sum() >= 2:
        points = example.landmarks[example.visible]
        (left, top), (right, bottom) = points.min(0), points.max(0)
    elif example.box is not None:
        left, top, right, bottom = example.box
    else:
        left, top, right, bottom = -0.5, -0.5, shape[1] - 0.5, shape[0] - 0.5
        margin = 0.0
    half = max(right - left, bottom - top, 2.0) * (0.5 + margin)
    x, y = (left + right) / 2, (top + bottom) / 2
    return Box(float(x - half), float(y - half), float(x + half), float(y + half))


def placing(dataset: str, margin: float) -> tuple[float, float]:
    """Return where the crops of a model's training data lie around a face, for those who find one.

    Args:
        dataset: that the model was trained on.
        margin: of its task, as `face_box` takes it.

    Returns:
        Margin on every side, and by how much the crop's centre lies above the face box's, both as
        fractions of the longer side of the box around the visible landmarks.
    """
    return FRAMES.get(dataset, (margin, 0.0))


def jitter_box(box: Box, shift: float, scale: float, rng: np.random.Generator) -> Box:
    """Move a square by up to `shift` of its side each way and resize it by up to `scale`."""
    side = box.right - box.left
    dx, dy = rng.uniform(-shift, shift, 2) * side
    half = side / 2 * (1 + rng.uniform(-scale, scale))
    x, y = (box.left + box.right) / 2 + dx, (box.top + box.bottom) / 2 + dy
    return Box(x - half, y - half, x + half, y + half)


def crop(image: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Resample a square of an image to `size` × `size`.

    Shrinking averages areas, so fine texture does not alias; outside the image its edge pixels
    repeat.

    Args:
        image: uint8 (H, W, C).
        box: a square in pixels, possibly reaching beyond the image.
        size: side of the result in pixels.

    Returns:
        uint8 (size, size, C).
    """
    scale = size / (box.right - box.left)
    x_scale = y_scale = scale
    if scale < 1:
        height, width = image.shape[:2]
        smaller = (max(1, round(width * scale)), max(1, round(height * scale)))
        reduced = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
        # Rounding to whole pixels leaves a little scaling for the warp to do.
        x_scale, y_scale = scale * width / smaller[0], scale * height / smaller[1]
        left = (box.left + 0.5) * smaller[0] / width - 0.5
        top = (box.top + 0.5) * smaller[1] / height - 0.5
        image = reduced
    else:
        left, top = box.left, box.top
    offset = np.array([-left * x_scale - 0.5, -top * y_scale - 0.5])
    matrix = np.array([[x_scale, 0, offset[0]], [0, y_scale, offset[1]]])
    result = cv2.warpAffine(
        image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return result.reshape(size, size, -1)


def to_crop(points: np.ndarray, box: Box) -> np.ndarray:
    """Turn (N, 2) points from pixels of the image into crop coordinates, float32."""
    side = box.right - box.left
    return ((points - [box.left, box.top]) / side).astype(np.float32)


def from_crop(points: np.ndarray, box: Box) -> np.ndarray:
    """Turn (N, 2) points from crop coordinates into pixels of the image, float32."""
    side = box.right - box.left
    return (points * side + [box.left, box.top]).astype(np.float32)
