from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.schemes import IBUG_68, KAGGLE_15
from pipelines.averaging import five_crops, mean_answer, mirrored, predict
from pipelines.cli import GrimaceError
from pipelines.crops import crop
from pipelines.datasets.example import Box
from pipelines.runtimes import Runtime
from pipelines.runtimes.runtime import open_runtime

CORNERS = ("top left", "top right", "bottom left", "bottom right", "centre")


def model(run: Callable[[np.ndarray], np.ndarray], size: int) -> Runtime:
    return open_runtime(
        name="numpy",
        path=Path("model"),
        threads=1,
        input_shapes=[(None, size, size, 1)],
        output_count=1,
        run=run,
        batch_size=7,
    )


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 1)).astype(np.uint8)


# where the crops lie


def test_crops_of_a_face_in_a_picture_show_its_surroundings_at_the_same_size() -> None:
    image, size = noise(100, 120), 56
    box = Box(29.5, 19.5, 85.5, 75.5)  # a crop of 56 pixels, none of them resampled
    crops, places = five_crops(image, box, size)
    # The wider square has 64 pixels: four more on every side.
    for found, (top, left) in zip(
        crops, [(16, 26), (16, 34), (24, 26), (24, 34), (20, 30)], strict=True
    ):
        np.testing.assert_array_equal(found, image[top : top + size, left : left + size])
    np.testing.assert_array_equal(crops[CORNERS.index("centre")], crop(image, box, size))
    assert np.ptp(places[:, :2], 0) == pytest.approx([1 / 7, 1 / 7])
    assert places[:, 2] == pytest.approx(1)


def test_crops_of_a_picture_that_is_all_face_stay_inside_it() -> None:
    image = cv2.GaussianBlur(noise(48, 48), (0, 0), 2)[..., None]
    crops, places = five_crops(image, Box(-0.5, -0.5, 47.5, 47.5), 48)
    for found, (top, left) in zip(crops, [(0, 0), (0, 6), (6, 0), (6, 6), (3, 3)], strict=True):
        expected = cv2.resize(image[top : top + 42, left : left + 42], (48, 48))
        gap = np.abs(found[1:-1, 1:-1, 0].astype(int) - expected[1:-1, 1:-1])
        assert gap.max() <= 2
    assert places[:, 2] == pytest.approx(7 / 8)
    assert places[:, :2].min() == 0 and (places[:, :2] + 7 / 8).max() == 1


@pytest.mark.parametrize("box", [Box(-8.5, -0.5, 55.5, 63.5), Box(-0.5, -8.5, 63.5, 55.5)])
def test_a_square_around_an_oblong_picture_holds_all_of_it(box: Box) -> None:
    height, width = (64, 48) if box.left < -1 else (48, 64)
    assert five_crops(noise(height, width), box, 48)[1][0, 2] == pytest.approx(7 / 8)


@pytest.mark.parametrize("box", [Box(-4.5, 1.5, 51.5, 57.5), Box(1.5, -4.5, 57.5, 51.5)])
def test_a_square_that_leaves_something_out_keeps_its_size(box: Box) -> None:
    assert five_crops(noise(52, 48), box, 48)[1][0, 2] == pytest.approx(1)


# answers


def test_mirrored_points_change_sides_and_names() -> None:
    points = np.random.default_rng(1).random((3, 68, 2)).astype(np.float32)
    back = mirrored(points)
    assert back[:, 36] == pytest.approx(np.stack([1 - points[:, 45, 0], points[:, 45, 1]], 1))
    assert back[:, 8] == pytest.approx(np.stack([1 - points[:, 8, 0], points[:, 8, 1]], 1))
    np.testing.assert_allclose(mirrored(back), points, atol=1e-6)
    probabilities = np.random.default_rng(2).random((3, 7))
    assert mirrored(probabilities) is probabilities


def test_averaged_probabilities_are_the_mean_of_all_looks() -> None:
    weights = np.random.default_rng(3).normal(0, 0.01, (28 * 28, 7))

    def run(images: np.ndarray) -> np.ndarray:
        powers = np.exp(images.reshape(len(images), -1) @ weights)
        return (powers / powers.sum(1, keepdims=True)).astype(np.float32)

    faces = [noise(80, 80), noise(80, 80)[::-1]]
    boxes = [Box(20, 20, 48, 48), Box(-0.5, -0.5, 79.5, 79.5)]
    images = np.stack([crop(face, box, 28) for face, box in zip(faces, boxes, strict=True)])
    parts = [five_crops(face, box, 28) for face, box in zip(faces, boxes, strict=True)]
    five = np.stack([part[0] for part in parts]), np.stack([part[1] for part in parts])
    network = model(run, 28)
    plain, flip, ten = (predict(network, images, how, five) for how in ("none", "flip", "ten_crop"))

    def look(image: np.ndarray) -> np.ndarray:
        return run(image[None].astype(np.float32))[0]

    for row in range(2):
        assert plain[row] == pytest.approx(look(images[row]))
        both = [look(images[row]), look(images[row][:, ::-1])]
        assert flip[row] == pytest.approx(np.mean(both, 0))
        views = [view[:, ::step] for view in five[0][row] for step in (1, -1)]
        assert len(views) == 10
        assert ten[row] == pytest.approx(np.mean([look(view) for view in views], 0))
    assert np.abs(flip - plain).max() > 1e-3 and np.abs(ten - flip).max() > 1e-3


def seeing(names: list[int], size: int) -> Runtime:
    """Finds the pixel of grey level 10 · (point + 1), and names points as a network does.

    That is by what it sees: in a mirrored face the eye that looks like the left one is called left.
    """

    def run(images: np.ndarray) -> np.ndarray:
        answers = np.zeros((len(images), 15, 2), np.float32)
        for number, image in enumerate(images):
            if not image.any():
                continue
            for point in range(15):
                y, x = np.argwhere(np.abs(image[..., 0] - 10 * (point + 1)) < 1)[0]
                answers[number, point] = (x + 0.5) / size, (y + 0.5) / size
            if answers[number, 0, 0] < answers[number, 1, 0]:  # left eye on the picture's left
                answers[number] = answers[number][names]
        return answers

    return model(run, size)


@pytest.mark.parametrize("how", ["none", "flip", "ten_crop"])
def test_a_model_that_makes_no_mistake_makes_none_on_average(how) -> None:
    rng = np.random.default_rng(4)
    size, image = 56, np.zeros((100, 100, 1), np.uint8)
    places = rng.permutation(40 * 40)[:15]
    pixels = np.stack([places % 40, places // 40], 1) + 30
    if pixels[0, 0] < pixels[1, 0]:
        pixels[[0, 1]] = pixels[[1, 0]]
    for point, (x, y) in enumerate(pixels):
        image[y, x] = 10 * (point + 1)
    box = Box(21.5, 21.5, 77.5, 77.5)
    images = crop(image, box, size)[None]
    crops, where = five_crops(image, box, size)
    found = predict(seeing(list(KAGGLE_15.mirror), size), images, how, (crops[None], where[None]))
    expected = (pixels - 21.5) / 56
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_points_in_scaled_crops_come_back_to_where_they_are() -> None:
    y, x = np.mgrid[:64, :64]
    image = (200 * np.exp(-((x - 36) ** 2 + (y - 25) ** 2) / 18)).astype(np.uint8)[..., None]

    def run(images: np.ndarray) -> np.ndarray:
        """All points where the brightness is centred, 136 numbers in a row."""
        mass = images[..., 0] / np.maximum(images.sum((1, 2)), 1)[..., None]
        places = (np.arange(64) + 0.5) / 64
        centre = np.stack([(mass.sum(1) * places).sum(1), (mass.sum(2) * places).sum(1)], 1)
        return np.tile(centre, 68).astype(np.float32)

    box = Box(-0.5, -0.5, 63.5, 63.5)
    crops, where = five_crops(image, box, 64)
    five = crops[None], where[None]
    found = predict(model(run, 64), crop(image, box, 64)[None], "ten_crop", five)
    assert found.shape == (1, IBUG_68.size, 2)
    np.testing.assert_allclose(found[0], np.tile([[36.5 / 64, 25.5 / 64]], (68, 1)), atol=2e-3)


def test_an_ensemble_is_the_mean_of_its_members() -> None:
    first, second = np.random.default_rng(5).random((2, 4, 7)).astype(np.float32)
    np.testing.assert_allclose(mean_answer([first, second]), (first + second) / 2, rtol=1e-6)
    with pytest.raises(GrimaceError, match=r"\(15, 2\), \(68, 2\) cannot be averaged"):
        mean_answer([np.zeros((4, 68, 2)), np.zeros((4, 15, 2))])
