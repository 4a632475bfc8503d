from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.sheets import contact_sheet


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def count(path: Path, colour: tuple[int, int, int]) -> int:
    return int((np.abs(pixels(path) - colour).max(-1) < 60).sum())


RED, LIME, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def test_every_picture_is_drawn(tmp_path: Path) -> None:
    blue = np.full((20, 20, 3), BLUE, np.uint8)
    contact_sheet([blue], ["one"], tmp_path / "1.png", "title", columns=4)
    contact_sheet([blue] * 6, list("abcdef"), tmp_path / "6.png", "title", columns=4)
    one, six = count(tmp_path / "1.png", BLUE), count(tmp_path / "6.png", BLUE)
    assert one > 1000 and six == pytest.approx(6 * one, rel=0.3)


def test_grey_levels_are_not_stretched(tmp_path: Path) -> None:
    contact_sheet([np.full((20, 20, 1), 90, np.uint8)], ["a"], tmp_path / "a.png", "t", columns=1)
    assert count(tmp_path / "a.png", (90, 90, 90)) > 1000


def test_points_lie_on_their_pixels(tmp_path: Path) -> None:
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[10:20, 30:40] = BLUE
    middle = np.array([[35, 15]]) / 40
    path = tmp_path / "a.png"
    contact_sheet([picture], ["a"], path, "t", points=[middle], more_points=[1 - middle], columns=1)
    shown = pixels(path)
    where = {
        name: np.argwhere(np.abs(shown - colour).max(-1) < 100).mean(0)
        for name, colour in {"lime": LIME, "red": RED, "blue": BLUE}.items()
    }
    np.testing.assert_allclose(where["lime"], where["blue"], atol=1.5)
    assert (where["red"] - where["lime"])[0] > 10 and (where["lime"] - where["red"])[1] > 10


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 1, 1), (9, 1, 1), (1, 9, 1), (60, 20, 3)])
def test_any_shape(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    contact_sheet([np.zeros(shape, np.uint8)], ["a"], tmp_path / "a.png", "t", columns=1)
    assert count(tmp_path / "a.png", (0, 0, 0)) > 100


def test_captions_are_no_formulas(tmp_path: Path) -> None:
    contact_sheet([np.zeros((9, 9, 1), np.uint8)], [r"a$\b$_c"], tmp_path / "a.png", r"$\z$")
    assert (tmp_path / "a.png").exists()
