import numpy as np
import pandas as pd
import pytest
from cleanvision.imagelab import Imagelab
from PIL import Image

from pipelines.checks.image import measure_image, score_images


def scores(rgb: np.ndarray) -> pd.Series:
    return score_images(pd.DataFrame([measure_image(rgb)])).iloc[0]


def noise(low: int, high: int, seed: int = 0, size: int = 48) -> np.ndarray:
    grey = np.random.default_rng(seed).integers(low, high, (size, size, 1), np.uint8)
    return np.repeat(grey, 3, axis=2)


def blurred(times: int) -> np.ndarray:
    picture = noise(0, 256).astype(float)
    for _ in range(times):
        for axis in (0, 1):
            picture = (picture + np.roll(picture, 1, axis) + np.roll(picture, -1, axis)) / 3
    return picture.astype(np.uint8)


def test_as_cleanvision_itself_scores(tmp_path) -> None:
    pictures = [noise(0, 256), noise(0, 30), noise(240, 256), blurred(3), blurred(20)]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture[..., 0]).save(tmp_path / f"{number}.png")
    lab = Imagelab(data_path=str(tmp_path))
    lab.find_issues({name: {} for name in ("dark", "light", "low_information", "blurry")}, n_jobs=1)
    theirs = lab.issues.sort_index()
    ours = pd.DataFrame([scores(picture) for picture in pictures])
    np.testing.assert_allclose(ours["dark"], theirs["dark_score"], atol=1e-6)
    np.testing.assert_allclose(1 - ours["bright"], theirs["light_score"], atol=1e-6)
    np.testing.assert_allclose(ours["low_information"], theirs["low_information_score"], atol=1e-6)
    np.testing.assert_allclose(ours["blurred"], theirs["blurry_score"], atol=1e-6)


def test_std_is_that_of_the_most_varied_channel() -> None:
    picture = np.zeros((24, 24, 3), np.uint8)
    picture[:, ::2, 2] = 200
    assert measure_image(picture)["std"] == pytest.approx(100)


def test_brightness_is_the_mean() -> None:
    assert measure_image(np.full((9, 9, 3), 51, np.uint8))["brightness"] == pytest.approx(0.2)


def test_a_large_picture_scores_like_a_small_one() -> None:
    small = blurred(6)
    large = np.repeat(np.repeat(small, 20, axis=0), 20, axis=1)
    measured, expected = scores(large), scores(small)
    for name in ("dark", "bright", "low_information"):
        assert measured[name] == pytest.approx(expected[name], abs=0.05)
    assert measure_image(large)["std"] == pytest.approx(measure_image(small)["std"])


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 500, 3), (300, 2, 3)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert np.isfinite(list(scores(np.full(shape, 7, np.uint8)))).all()


def test_what_could_not_be_measured_has_no_score() -> None:
    raw = pd.DataFrame([measure_image(noise(0, 256)), {}])
    assert score_images(raw).iloc[1].isna().all()
