import zipfile
from pathlib import Path

import numpy as np

from pipelines import datasets
from pipelines.datasets.archive import open_archive
from pipelines.datasets.example import Example

HEADER = "," + ",".join(str(number) for number in range(136))
POINTS = [f"{number}.0" for number in range(136)]


def read(tmp_path: Path, members: dict[str, bytes]) -> list[Example]:
    path = tmp_path / "ytf_keypoints.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return list(datasets.examples("ytf_keypoints", open_archive(path)))


def table(*rows: list[str]) -> bytes:
    return "\n".join([HEADER, *(",".join(row) for row in rows)]).encode()


def read_row(tmp_path: Path, *cells: str) -> Example:
    members = {
        "training/A_B_01.jpg": b"image",
        "training_frames_keypoints.csv": table(["A_B_01.jpg", *cells]),
    }
    (example,) = read(tmp_path, members)
    return example


def test_landmarks_are_pixels_in_order(tmp_path: Path) -> None:
    example = read_row(tmp_path, *POINTS)
    assert example.image == b"image"
    assert example.landmarks.dtype == np.float32
    np.testing.assert_array_equal(example.landmarks, np.arange(136).reshape(68, 2))
    assert example.visible.dtype == bool
    assert example.visible.all()
    assert example.defect == ""
    assert example.emotion == -1


def test_missing_cells_hide_their_point_only(tmp_path: Path) -> None:
    cells = list(POINTS)
    cells[0], cells[3], cells[5], cells[6] = "", "nan", " ", "inf"
    example = read_row(tmp_path, *cells)
    assert list(np.flatnonzero(~example.visible)) == [0, 1, 2, 3]
    np.testing.assert_array_equal(example.landmarks[:4], 0)
    np.testing.assert_array_equal(example.landmarks[4], [8, 9])
    assert example.defect == ""


def test_unusable_rows_are_quarantined(tmp_path: Path) -> None:
    assert read_row(tmp_path, *[""] * 136).defect == "all landmarks are missing"
    assert read_row(tmp_path, *POINTS[:-1]).defect == "row has 135 coordinates instead of 136"
    assert read_row(tmp_path, *POINTS, "1").defect == "row has 137 coordinates instead of 136"
    assert read_row(tmp_path, "left", *POINTS[1:]).defect == "a coordinate is not a number"


def test_images_and_rows_without_each_other(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        {
            "top/test/A_B_01.jpg": b"image",
            "top/test_frames_keypoints.csv": table(["A_B_02.jpg", *POINTS]),
            "top/training/A_B_03.jpg": b"image",
        },
    )
    assert [(row.id[-2:], row.image, row.defect) for row in found] == [
        ("03", b"image", "no landmarks in training_frames_keypoints.csv"),
        ("02", b"", "its image is not in the archive"),
        ("01", b"image", "no landmarks in test_frames_keypoints.csv"),
    ]


def test_a_person_has_one_opaque_key_in_both_parts(tmp_path: Path) -> None:
    names = ["Ann_Lee_01.jpg", "Ann_Lee_02.jpg", "Ann_Lee_Ray_01.jpg"]
    members = {
        f"{part}_frames_keypoints.csv": table(*([name, *POINTS] for name in names))
        for part in ("training", "test")
    } | {f"{part}/{name}": b"x" for part in ("training", "test") for name in names}
    found = read(tmp_path, members)
    assert len({row.id for row in found}) == 6
    assert len({row.person for row in found}) == 2
    assert [row.person for row in found[:3]] == [row.person for row in found[3:]]
    assert found[0].person == found[1].person != found[2].person
    assert not any("Ann" in text or "Lee" in text for row in found for text in (row.id, row.person))
    assert {row.official_split for row in found} == {""}


def test_a_second_row_for_an_image_gets_an_id_of_its_own(tmp_path: Path) -> None:
    members = {
        "test/A_B_01.jpg": b"image",
        "test_frames_keypoints.csv": table(["A_B_01.jpg", *POINTS], ["A_B_01.jpg", *POINTS]),
    }
    first, second = read(tmp_path, members)
    assert second.id == f"{first.id}-2"
