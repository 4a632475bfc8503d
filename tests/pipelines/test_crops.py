import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipelines.crops import (
    UnreadableImageError,
    crop,
    decode,
    face_box,
    from_crop,
    jitter_box,
    to_crop,
)
from pipelines.datasets.example import Box, Example


def encode(pixels: np.ndarray, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def save(picture: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


@pytest.fixture
def rgb() -> np.ndarray:
    """Smooth, with no symmetry: red grows to the right, green downwards."""
    y, x = np.mgrid[0:24, 0:40]
    return np.stack([x * 6, y * 10, np.full_like(x, 77)], -1).astype(np.uint8)


# decode


def test_rgb_is_exact(rgb: np.ndarray) -> None:
    assert np.array_equal(decode(encode(rgb), 3), rgb)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_grey_is_exact_in_any_lossless_format(format: str) -> None:
    grey = np.arange(48 * 48, dtype=np.uint32).reshape(48, 48).astype(np.uint8)
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(decode(encode(grey, format, **options), 1), grey[..., None])
    assert np.array_equal(decode(encode(grey, format, **options), 3), grey[..., None].repeat(3, 2))


def test_colour_to_grey_is_itu_601_luma(rgb: np.ndarray) -> None:
    grey = decode(encode(rgb), 1)
    assert grey.shape == (24, 40, 1) and grey.dtype == np.uint8
    assert np.abs(grey[..., 0] - rgb @ [0.299, 0.587, 0.114]).max() <= 1


def test_jpeg_comes_close(rgb: np.ndarray) -> None:
    back = decode(encode(rgb, "JPEG", quality=95), 3)
    assert np.abs(back.astype(int) - rgb).mean() < 3


def test_what_is_transparent_is_white_whatever_hides_there() -> None:
    hidden = np.zeros((4, 4, 4), np.uint8)
    hidden[1:3, 1:3] = (200, 30, 90, 255)
    picture = Image.fromarray(hidden)
    shown = decode(save(picture, "PNG"), 3)
    assert (shown[0] == 255).all() and (shown[1:3, 1:3] == (200, 30, 90)).all()
    palette = Image.fromarray(np.eye(4, dtype=np.uint8), "P")
    palette.putpalette([0, 0, 0, 10, 20, 30])
    shown = decode(save(palette, "PNG", transparency=0), 3)
    assert (shown[0, 0] == (10, 20, 30)).all() and (shown[0, 1] == 255).all()
    assert (decode(save(palette, "PNG", transparency=0), 1)[0, 1:] == 255).all()


def test_alpha_is_left_out(rgb: np.ndarray) -> None:
    opaque = np.concatenate([rgb, np.full((24, 40, 1), 255, np.uint8)], -1)
    assert np.array_equal(decode(encode(opaque), 3), rgb)
    grey = Image.fromarray(rgb[..., 0])
    with_alpha = Image.merge("LA", [grey, Image.new("L", grey.size, 255)])
    assert np.array_equal(decode(save(with_alpha, "PNG"), 1), rgb[..., :1])


def test_cmyk(rgb: np.ndarray) -> None:
    printed = Image.fromarray(rgb).convert("CMYK")
    assert np.abs(decode(save(printed, "TIFF"), 3).astype(int) - rgb).max() <= 1
    back = decode(save(printed, "JPEG", quality=98), 3)
    assert np.abs(back.astype(int) - rgb).mean() < 4


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_grey_keeps_its_range(format: str, channels: int) -> None:
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = decode(encode(levels, format), channels)
    assert pixels.dtype == np.uint8 and pixels.shape == (64, 64, channels)
    assert np.abs(pixels[..., 0] - levels / 257).max() <= 1


def test_palette_and_bilevel(rgb: np.ndarray) -> None:
    few = (rgb // 128) * 128
    palette = Image.fromarray(few).quantize(8)
    assert palette.mode == "P"
    assert np.array_equal(decode(save(palette, "PNG"), 3), few)
    bilevel = Image.fromarray(rgb[..., 0]).point(lambda level: 255 * (level > 99)).convert("1")
    expected = np.where(rgb[..., :1] > 99, 255, 0)
    assert np.array_equal(decode(save(bilevel, "PNG"), 1), expected)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda stored: stored),
        (2, lambda stored: stored[:, ::-1]),
        (3, lambda stored: stored[::-1, ::-1]),
        (6, lambda stored: np.rot90(stored, -1)),
        (8, lambda stored: np.rot90(stored, 1)),
    ],
)
def test_exif_rotation_is_applied(
    rgb: np.ndarray, orientation: int, upright: Callable[[np.ndarray], np.ndarray]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = save(Image.fromarray(rgb), "PNG", exif=exif)
    assert np.array_equal(decode(encoded, 3), upright(rgb))


@pytest.mark.parametrize("channels", [1, 3])
def test_one_pixel(channels: int) -> None:
    pixel = decode(encode(np.array([[200]], np.uint8)), channels)
    assert pixel.tolist() == [[[200] * channels]]


def damaged_png() -> bytes:
    return encode(np.zeros((30, 30), np.uint8))[:-20] + b"\0" * 20


def bomb() -> bytes:
    """A PNG header that promises 60000 × 60000 pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


NOISE = np.random.default_rng(0).integers(0, 255, (90, 90), np.uint8)
UNREADABLE = {
    "nothing": (b"", "zero bytes"),
    "zeros": (b"\0" * 100, "cannot identify image file"),
    "a web page": (b"<html>Sign in to continue</html>", "cannot identify image file"),
    "half a JPEG": (encode(NOISE, "JPEG")[:3000], "truncated"),
    "start of a JPEG": (encode(NOISE, "JPEG")[:10], "[a-z]"),
    "half a PNG": (encode(NOISE)[:4000], "truncated"),
    "PNG overwritten at its end": (damaged_png(), "[a-z]"),
    "bomb": (bomb(), "too large: more than"),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("channels", [1, 3])
def test_unreadable(case: str, channels: int) -> None:
    encoded, reason = UNREADABLE[case]
    with pytest.raises(UnreadableImageError, match=reason) as error:
        decode(encoded, channels)
    assert "0x" not in str(error.value)  # an address says nothing, and differs from run to run


# geometry: a blob drawn where it is known to be, found again by its centroid


def blob(shape: tuple[int, int], at: tuple[float, float], sigma: float) -> np.ndarray:
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]]
    squared = (x - at[0]) ** 2 + (y - at[1]) ** 2
    return np.rint(230 * np.exp(-squared / (2 * sigma**2))).astype(np.uint8)[..., None]


def centroid(image: np.ndarray) -> np.ndarray:
    light = image[..., 0].astype(float)
    y, x = np.mgrid[0 : light.shape[0], 0 : light.shape[1]]
    return np.array([(x * light).sum(), (y * light).sum()]) / light.sum()


@pytest.mark.parametrize("size", [24, 48, 96, 300])
@pytest.mark.parametrize(
    ("shape", "at", "box"),
    [
        ((160, 200), (100.0, 80.0), Box(50.0, 30.0, 150.0, 130.0)),
        ((160, 200), (93.3, 71.8), Box(45.6, 28.1, 142.9, 125.4)),
        ((157, 211), (60.25, 110.6), Box(12.3, 60.7, 110.8, 159.2)),  # odd sides, out at the bottom
        ((113, 91), (30.7, 40.2), Box(-45.5, -30.25, 100.0, 115.25)),  # out on every side
        ((160, 200), (170.4, 20.9), Box(115.5, -40.5, 240.5, 84.5)),  # out at the right and the top
    ],
)
def test_a_point_stays_on_its_pixel(
    shape: tuple[int, int], at: tuple[float, float], box: Box, size: int
) -> None:
    scale = size / (box.right - box.left)
    image = blob(shape, at, sigma=max(2.5, 0.8 / scale))
    cut = crop(image, box, size)
    assert cut.shape == (size, size, 1) and cut.dtype == np.uint8
    expected = to_crop(np.array([at]), box)[0] * size - 0.5
    assert np.abs(centroid(cut) - expected).max() < 0.1


def test_crop_corners_are_the_outer_corners_of_pixels() -> None:
    box = Box(9.5, 4.5, 19.5, 14.5)  # pixels 10 to 19, and 5 to 14
    image = np.zeros((30, 30, 1), np.uint8)
    image[5:15, 10:20] = 200
    assert (crop(image, box, 10) == 200).all()
    assert to_crop(np.array([[9.5, 4.5], [19.5, 14.5], [10, 5]]), box).tolist() == [
        [0, 0],
        [1, 1],
        pytest.approx([0.05, 0.05]),
    ]


def test_outside_the_image_its_edge_repeats() -> None:
    image = np.full((20, 20, 3), (10, 20, 30), np.uint8)
    assert (crop(image, Box(-30, -30, 40, 40), 48) == (10, 20, 30)).all()


def test_shrinking_averages() -> None:
    checkers = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    cut = crop(checkers, Box(-0.5, -0.5, 127.5, 127.5), 16)
    assert np.abs(cut.astype(int) - 127.5).max() < 8


def test_a_square_face_crop_of_the_right_size_is_left_alone() -> None:
    face = np.random.default_rng(0).integers(0, 256, (48, 48, 1), np.uint8)
    box = face_box(Example("fer", b""), face.shape, margin=0.3)
    assert np.array_equal(crop(face, box, 48), face)


def test_to_crop_and_from_crop_undo_each_other() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(-50, 300, (68, 2))
    box = Box(-12.5, 33.25, 140.75, 186.5)
    inside = to_crop(points, box)
    assert inside.dtype == np.float32
    np.testing.assert_allclose(from_crop(inside, box), points, atol=1e-3)
    np.testing.assert_allclose(to_crop(from_crop(inside, box), box), inside, atol=1e-5)


# the box


def example(points: list[list[float]], size: int, box: Box | None = None) -> Example:
    """Give a face of `size` points, of which only the first few are labelled."""
    landmarks = np.zeros((size, 2), np.float32)
    landmarks[: len(points)] = points
    return Example("a", b"", landmarks=landmarks, visible=np.arange(size) < len(points), box=box)


def test_box_around_the_visible_landmarks() -> None:
    face = example([[30, 40], [70, 60]], 68, Box(0, 0, 5, 5))
    box = face_box(face, (100, 100, 1), margin=0.25)
    assert box == pytest.approx((50 - 30, 50 - 30, 50 + 30, 50 + 30))


def test_points_without_an_outline_make_no_box() -> None:
    shape = (96, 96, 1)
    assert face_box(example([[30, 40], [70, 60]], 15), shape, 0.2) == (-0.5, -0.5, 95.5, 95.5)
    boxed = example([[30, 40], [70, 60]], 15, Box(10, 20, 30, 60))
    assert face_box(boxed, shape, margin=0) == pytest.approx((0, 20, 40, 60))


def test_box_of_the_source_without_landmarks() -> None:
    bare = Example("a", b"", box=Box(10, 20, 30, 60))
    assert face_box(bare, (100, 100, 1), margin=0) == pytest.approx((0, 20, 40, 60))
    assert face_box(bare, (100, 100, 1), margin=0.5) == pytest.approx((-20, 0, 60, 80))


def test_whole_image_without_either() -> None:
    assert face_box(Example("a", b""), (48, 48, 1), 0.2) == (-0.5, -0.5, 47.5, 47.5)
    # A square around the longer side, so that the face keeps its proportions.
    assert face_box(Example("a", b""), (40, 60, 1), 0.2) == (-0.5, -10.5, 59.5, 49.5)


def test_a_single_point_makes_no_box() -> None:
    assert face_box(example([[7, 7]], 68), (48, 48, 1), 0) == (-0.5, -0.5, 47.5, 47.5)


def test_points_on_one_spot_still_make_a_box() -> None:
    box = face_box(example([[9, 9], [9, 9]], 68), (48, 48, 1), 0)
    assert box.right > box.left and crop(np.zeros((48, 48, 1), np.uint8), box, 16).shape[0] == 16


def test_jitter_stays_within_its_bounds_and_square() -> None:
    rng = np.random.default_rng(0)
    start = Box(10, 20, 110, 120)
    moved = np.array([jitter_box(start, 0.1, 0.2, rng) for _ in range(2000)])
    sides = moved[:, 2:] - moved[:, :2]
    centres = (moved[:, 2:] + moved[:, :2]) / 2 - [60, 70]
    np.testing.assert_allclose(sides[:, 0], sides[:, 1])
    assert 80 <= sides.min() < 81 and 119 < sides.max() <= 120
    assert (centres.min(0) >= -10).all() and (centres.min(0) < -9.5).all()
    assert (centres.max(0) <= 10).all() and (centres.max(0) > 9.5).all()
    assert jitter_box(start, 0, 0, rng) == start
