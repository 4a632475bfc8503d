import io
import os
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.schemes import KAGGLE_15
from pipelines import datasets
from pipelines.cli import GrimaceError
from pipelines.datasets.archive import open_archive
from pipelines.datasets.builder import read, write
from pipelines.datasets.example import Example
from pipelines.datasets.kaggle_keypoints import COLUMNS, POINTS

REAL = Path(os.environ.get("GRIMACE_ARCHIVES", "data/archives"), "kaggle_keypoints.zip")
IMAGE = " ".join(str(index % 256) for index in range(96 * 96))
HEADER = [*COLUMNS, "Image"]
FULL = [f"{index}.25" for index in range(30)]


def table(*rows: list[str], header: list[str] = HEADER) -> str:
    return "\n".join(",".join(row) for row in [header, *rows]) + "\n"


def read_rows(tmp_path: Path, *rows: list[str], header: list[str] = HEADER) -> list[Example]:
    path = tmp_path / "training.csv"
    path.write_text(table(*rows, header=header))
    return list(datasets.examples("kaggle_keypoints", open_archive(path)))


def as_served(tmp_path: Path, inner: bytes) -> Path:
    path = tmp_path / "facial-keypoints-detection.zip"
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr("IdLookupTable.csv", "RowId,ImageId,FeatureName,Location\n1,1,nose_tip_x,\n")
        outer.writestr("test.zip", zipped("test.csv", f"ImageId,Image\n1,{IMAGE}\n"))
        outer.writestr("training.zip", inner)
    return path


def zipped(name: str, text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as inner:
        inner.writestr(name, text)
    return buffer.getvalue()


def test_points_and_pixels(tmp_path: Path) -> None:
    (row,) = read_rows(tmp_path, [*FULL, IMAGE])
    assert (row.id, row.defect, row.official_split, row.emotion) == ("kaggle-00000", "", "", -1)
    assert row.landmarks.dtype == np.float32
    np.testing.assert_array_equal(row.landmarks, np.arange(30).reshape(15, 2) + 0.25)
    assert row.visible.all()
    decoded = cv2.imdecode(np.frombuffer(row.image, np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(decoded.ravel(), np.arange(96 * 96) % 256)


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    order = np.random.default_rng(3).permutation(31)
    cells = [*FULL, IMAGE]
    (row,) = read_rows(tmp_path, [cells[i] for i in order], header=[HEADER[i] for i in order])
    np.testing.assert_array_equal(row.landmarks, np.arange(30).reshape(15, 2) + 0.25)


def test_points_stand_in_the_order_of_the_scheme() -> None:
    # The mirror image of a left feature is the right one; each stands for itself otherwise.
    for index, point in enumerate(POINTS):
        swapped = {"left": "right", "right": "left"}
        words = [swapped.get(word, word) for word in point.split("_")]
        assert POINTS[KAGGLE_15.mirror[index]] == "_".join(words)


def test_missing_cells_are_masked_and_never_filled(tmp_path: Path) -> None:
    cells = [""] * 30
    cells[0:2] = "66.5", "39"
    cells[2] = "30.1"  # a point with only one of its two coordinates
    cells[20:22] = "44", "57.25"
    row, bare = read_rows(tmp_path, [*cells, IMAGE], [*[""] * 30, IMAGE])
    assert list(np.flatnonzero(row.visible)) == [0, 10]
    np.testing.assert_array_equal(row.landmarks[[0, 10]], [[66.5, 39], [44, 57.25]])
    np.testing.assert_array_equal(row.landmarks[~row.visible], 0)
    assert row.defect == ""
    assert bare.defect == "all landmarks are missing"


@pytest.mark.parametrize(
    ("cells", "defect"),
    [
        ([*FULL[:-1], "low", IMAGE], "a coordinate is not a number"),
        ([*FULL, IMAGE[:-4]], "9215 pixels instead of 9216"),
        ([*FULL, ""], "0 pixels instead of 9216"),
        ([*FULL, IMAGE.replace("255", "256")], "a pixel is outside 0-255"),
        ([*FULL, IMAGE.replace("17", "x")], "a pixel is not a whole number"),
        (FULL, "row has 30 cells instead of 31"),
    ],
)
def test_bad_row_is_quarantined_and_the_next_one_read(
    tmp_path: Path, cells: list[str], defect: str
) -> None:
    bad, good = read_rows(tmp_path, cells, [*FULL, IMAGE])
    assert bad.defect == defect
    assert (good.id, good.defect) == ("kaggle-00001", "")


def test_archive_as_kaggle_serves_it(tmp_path: Path) -> None:
    inner = zipped("training.csv", table([*FULL, IMAGE], [*FULL, IMAGE]))
    rows = list(datasets.examples("kaggle_keypoints", open_archive(as_served(tmp_path, inner))))
    assert [row.id for row in rows] == ["kaggle-00000", "kaggle-00001"]
    assert rows[1].visible.all()


def test_damaged_inner_zip_is_named(tmp_path: Path) -> None:
    inner = zipped("training.csv", table([*FULL, IMAGE]))
    with pytest.raises(GrimaceError, match=r"training\.zip is no whole zip file"):
        datasets.examples("kaggle_keypoints", open_archive(as_served(tmp_path, inner[:-30])))


def test_the_table_without_points_is_not_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text(f"ImageId,Image\n1,{IMAGE}\n")
    with pytest.raises(GrimaceError, match="with 30 coordinate columns"):
        datasets.examples("kaggle_keypoints", open_archive(path))


def test_through_the_store_and_back(tmp_path: Path) -> None:
    rows = read_rows(tmp_path, [*FULL, IMAGE], [*FULL[:2], *[""] * 28, IMAGE])
    folder = tmp_path / "kaggle_keypoints"
    write(folder, rows, datasets.card("kaggle_keypoints"))
    back = {row.id: row for row in read(folder)}
    assert back.keys() == {"kaggle-00000", "kaggle-00001"}
    for row in rows:
        np.testing.assert_array_equal(back[row.id].landmarks, row.landmarks)
        np.testing.assert_array_equal(back[row.id].visible, row.visible)
        assert back[row.id].image == row.image


@pytest.mark.skipif(not REAL.exists(), reason="needs kaggle_keypoints.zip in GRIMACE_ARCHIVES")
def test_real_archive() -> None:
    rows = list(datasets.examples("kaggle_keypoints", open_archive(REAL)))
    assert len(rows) == 1200
    assert not any(row.defect for row in rows)
    labelled = np.array([row.visible.sum() for row in rows])
    assert (labelled == 15).sum() == 346
    assert (labelled <= 4).mean() > 0.65
    full = np.stack([row.landmarks for row in rows if row.visible.all()])
    assert ((full > 0) & (full < 96)).all()
    # Left is the pictured person's own, so in almost every picture further to the right.
    assert (full[:, 0, 0] > full[:, 1, 0]).mean() > 0.99
