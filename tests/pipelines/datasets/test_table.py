from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from pipelines.datasets import table
from pipelines.datasets.example import Box, Example
from pipelines.datasets.table import parts, read_examples, write_examples


def example(number: int) -> Example:
    """Examples of every kind in turn: bare, with points, with everything."""
    if number % 3 == 0:
        return Example(f"bare-{number}", b"")
    points = np.random.default_rng(number).uniform(-20, 300, (15, 2)).astype(np.float32)
    visible = np.arange(15) % 4 != number % 4
    points[~visible] = 0
    if number % 3 == 1:
        return Example(f"points-{number}", b"\xff\0\xd8", landmarks=points, visible=visible)
    return Example(
        f"é/full {number}.jpg",
        bytes(range(256)),
        emotion=number % 7,
        landmarks=points,
        visible=visible,
        box=Box(-1.5, 0.25, 100.75, 90.0),
        person="0a1b",
        official_split="val",
    )


def same(one: Example, other: Example) -> None:
    for field in fields(Example):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, np.ndarray):
            assert (left.dtype, left.shape) == (right.dtype, right.shape), field.name
            assert np.array_equal(left, right), field.name
        else:
            assert (type(left), left) == (type(right), right), field.name


def test_everything_comes_back_in_order(tmp_path: Path) -> None:
    examples = [example(number) for number in range(9)]
    assert write_examples(iter(examples), tmp_path) == 9
    back = list(read_examples(tmp_path))
    assert len(back) == 9
    for one, other in zip(examples, back, strict=True):
        same(one, other)


def test_without_images(tmp_path: Path) -> None:
    write_examples([example(2)], tmp_path)
    (bare,) = read_examples(tmp_path, images=False)
    assert bare.image == b""
    assert (bare.id, bare.emotion, bare.person) == ("é/full 2.jpg", 2, "0a1b")


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (3, [3]), (4, [3, 1]), (6, [3, 3])])
def test_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(table, "PART_ROWS", 3)
    assert write_examples((example(number) for number in range(count)), tmp_path) == count
    assert [path.name for path in parts(tmp_path)] == [
        f"part-{number:05d}.parquet" for number in range(len(sizes))
    ]
    assert [len(list(read_examples(part))) for part in parts(tmp_path)] == sizes
    ids = [row.id for row in read_examples(tmp_path)]
    assert ids == [example(number).id for number in range(count)]
