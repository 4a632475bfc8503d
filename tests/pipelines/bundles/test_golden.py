import numpy as np
import pytest

from pipelines.bundles import golden
from pipelines.cli import GrimaceError
from pipelines.params import Task


def test_images_and_answers_come_back_as_they_were(tmp_path):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (3, 8, 8, 3), np.uint8)
    outputs = rng.normal(size=(3, 68, 2)).astype(np.float32)
    golden.write(tmp_path / "golden.json", images, outputs)
    same_images, same_outputs = golden.read(tmp_path / "golden.json")
    np.testing.assert_array_equal(same_images, images)
    np.testing.assert_array_equal(same_outputs, outputs)
    (tmp_path / "golden.json").write_text("{}")
    with pytest.raises(GrimaceError, match=r"golden.json is missing or damaged"):
        golden.read(tmp_path / "golden.json")


def test_faces_are_drawn_and_cropped_for_the_task():
    task = Task(dataset="fer2013", size=32, channels=1, margin=0.1)
    images = golden.draw(task, "emotion")
    assert images.shape == (4, 32, 32, 1) and images.dtype == np.uint8
    assert images.std((1, 2, 3)).min() > 10
    np.testing.assert_array_equal(images, golden.draw(task, "emotion"))


def test_the_worst_image_decides():
    wanted = np.zeros((2, 4), np.float32)
    outputs = np.array([[0, 0, 0, 0], [0.1, -0.1, 0, 0]], np.float32)
    found = golden.compare(outputs, wanted, tolerance=0.06)
    assert found == {"difference": pytest.approx(0.05), "tolerance": 0.06, "passed": True}
    assert not golden.compare(outputs, wanted, tolerance=0.04)["passed"]
    assert not golden.compare(outputs * np.nan, wanted, tolerance=0.06)["passed"]
