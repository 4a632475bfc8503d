from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks import data
from pipelines.datasets import synthetic
from pipelines.datasets.table import read_examples, write_examples

COUNT = 30


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty drawn faces as the benchmark lays out its images; three are held out."""
    work = tmp_path_factory.mktemp("work")
    (work / "images").mkdir()
    sides = ["val" if number % 10 == 4 else "train" for number in range(COUNT)]
    drawn = synthetic.examples(COUNT, 5)
    rows = (replace(row, official_split=side) for row, side in zip(drawn, sides, strict=True))
    write_examples(rows, work / "images")
    ids = [row.id for row in read_examples(work / "images", images=False)]
    pd.DataFrame({"id": ids, "split": sides}).to_parquet(work / "index.parquet")
    return work


def loop_folder(work: Path) -> Path:
    (folder,) = work.glob("loop-*")
    return folder.rename(work / f"done-{len(list(work.glob('done-*')))}")


def test_loop_and_filter_measure_the_same(work: Path) -> None:
    rows = np.arange(COUNT)
    data.filter_loop(work, rows)
    loop = pd.read_parquet(loop_folder(work) / "measures.parquet").set_index("id")
    data.filter_stage(work, rows, workers=1, keep=True)
    stage = pd.read_parquet(work / "earlier.parquet").set_index("id")
    assert len(loop) == len(stage) == COUNT
    shared = [name for name in loop.columns if name in stage.columns]
    assert {"pixels", "hash", "std", "dark", "blurred", "face_size", "haar"} <= set(shared)
    pd.testing.assert_frame_equal(
        loop[shared], stage.loc[loop.index, shared], check_dtype=False, check_names=False
    )


def test_loop_and_augment_make_as_many_views_and_the_same_plain_crops(work: Path) -> None:
    rows = np.arange(COUNT)
    data.augment_loop(work, rows)
    loop = loop_folder(work)
    data.augment_stage(work, rows, workers=1, keep=True)
    stage = work / "earlier"
    views = sorted((stage / "train").glob("images-*.npy"))
    for number, view in enumerate(views):
        made, theirs = np.load(loop / f"{number}.npy"), np.load(view)
        assert made.shape == theirs.shape == (COUNT - 3, 48, 48, 1)
        assert made.dtype == theirs.dtype == np.uint8
    held_out, theirs = np.load(loop / f"{len(views)}.npy"), np.load(stage / "val/images-00.npy")
    # Two decoders' luma differs by rounding.
    np.testing.assert_allclose(held_out.astype(int), theirs.astype(int), atol=1)


def results(**seconds: float) -> dict[str, Any]:
    figures = {"images": 100, "peak_mib": 300, "worker_peak_mib": 200}
    default = dict.fromkeys(data.COMPARED, 10.0) | {
        name.replace("_", "-"): value for name, value in seconds.items()
    }
    rounds = [
        {arm: figures | {"seconds": value * slow} for arm, value in default.items()}
        for slow in (1.0, 1.5, 2.0)
    ]
    others = {arm: figures | {"seconds": 2.0} for arm in data.OTHERS}
    return {
        "command": "python -m benchmarks.data --archive fer2013.zip",
        "date": "2026-01-02",
        "images": 3000,
        "rounds": rounds,
        "others": others,
    }


def test_page_gives_medians_and_paired_ratios() -> None:
    text = data.page(results(filter_loop=9.0, filter_1=10.0, filter_2=5.0))
    (row,) = [line for line in text.splitlines() if line.startswith("| filter | 222 ")]
    # 3,000 images in 1.5 times 9, 10, 10 and 5 seconds; ratios do not feel the slower rounds.
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:5] == ["222", "200", "200", "400"]
    assert cells[5:7] == ["0.90 (0.90 – 0.90)", "2.00 (2.00 – 2.00)"]
    assert "| filter | 7.5 s | 2.0 s | 27% |" in text
    assert "The cascade alone, as the projects before this one filtered: 1,500." in text
