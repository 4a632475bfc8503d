from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from pipelines.cli import GrimaceError
from pipelines.datasets import synthetic
from pipelines.datasets.table import write_examples
from pipelines.heldout import faces_of_side
from pipelines.params import load_params

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")


@pytest.mark.parametrize(
    ("side", "limit", "expected"),
    [("train", None, [0, 4, 6, 8]), ("train", 2, [0, 8]), ("val", None, [1, 5]), ("test", 1, [3])],
)
def test_a_side_is_what_training_heeds_and_all_that_is_held_out(
    side, limit, expected, tmp_path, monkeypatch
):
    """Nothing that left the split is on it, nor is int8 calibrated on what is not trained on."""
    monkeypatch.chdir(tmp_path)
    sides = ["train", "val", "train", "test", "train", "val", "train", "test", "train", "out"]
    weights = [1, 0, 0, 1, 0.5, 1, 1, 0, 1, 1]
    faces = [
        replace(face, weight=weight)
        for face, weight in zip(synthetic.examples(10, 5), weights, strict=True)
    ]
    for folder in ("clean", "split"):
        Path("data", folder, "synthetic").mkdir(parents=True)
    write_examples(faces, Path("data/clean/synthetic"))
    index = pd.DataFrame({"id": [face.id for face in faces], "split": sides})
    index.to_parquet("data/split/synthetic/index.parquet")
    found = faces_of_side("emotion", PARAMS.tasks.emotion, side, limit)
    assert found.ids.tolist() == [faces[number].id for number in expected]


def test_a_side_without_labels_for_the_task_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    faces = [replace(face, emotion=-1) for face in synthetic.examples(3, 5)]
    for folder in ("clean", "split"):
        Path("data", folder, "synthetic").mkdir(parents=True)
    write_examples(faces, Path("data/clean/synthetic"))
    index = pd.DataFrame({"id": [face.id for face in faces], "split": "test"})
    index.to_parquet("data/split/synthetic/index.parquet")
    task = PARAMS.tasks.emotion.model_copy(update={"dataset": "synthetic"})
    said = r"synthetic has no usable test example for task emotion .*'no label for emotion': 3"
    with pytest.raises(GrimaceError, match=said):
        faces_of_side("emotion", task, "test")
    assert len(faces_of_side("landmarks", task, "test").ids) == 3
