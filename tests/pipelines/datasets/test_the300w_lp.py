import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipelines import datasets
from pipelines.cli import GrimaceError
from pipelines.datasets.archive import open_archive

PICTURE = "300W_LP/AFW/AFW_134212_1_0"
POINTS = "300W_LP/landmarks/AFW/AFW_134212_1_0_pts.mat"


@pytest.fixture
def members(fitted, mat):
    """The files of one picture in the original layout, by name."""

    def make(collection: str = "AFW", stem: str = "AFW_134212_1_0", **angles: float):
        labels = fitted(**angles)
        points = labels.pop("pt3d_68")[:2]
        return {
            f"300W_LP/{collection}/{stem}.jpg": stem.encode(),
            f"300W_LP/{collection}/{stem}.mat": mat(pt2d=points + 7, **labels),
            f"300W_LP/landmarks/{collection}/{stem}_pts.mat": mat(
                pts_2d=points.T + 3, pts_3d=points.T
            ),
        }

    return make


@pytest.fixture
def read(tmp_path):
    def read_examples(files: dict[str, bytes]):
        path = tmp_path / "300W-LP.zip"
        with zipfile.ZipFile(path, "w") as zipped:
            for name, content in files.items():
                zipped.writestr(name, content)
        return list(datasets.examples("the300w_lp", open_archive(path)))

    return read_examples


def test_picture_comes_with_the_points_of_the_3d_model(read, members, fitted):
    (example,) = read(members(pitch=10, yaw=-40, roll=5))
    assert example.id == "AFW_134212_1_0"
    assert example.image == b"AFW_134212_1_0"
    assert example.landmarks.dtype == np.float32
    # MATLAB's first pixel is 1.
    wanted = fitted(pitch=10, yaw=-40, roll=5)["pt3d_68"][:2].T - 1
    np.testing.assert_allclose(example.landmarks, wanted, atol=1e-3)
    assert example.visible.shape == (68,)
    assert example.visible.all()
    np.testing.assert_allclose(example.pose, (10, 40, 5), atol=1e-4)
    assert (example.official_split, example.defect, example.emotion) == ("", "", -1)


def test_signs_of_the_pose(read, members):
    (right,) = read(members(yaw=-50))
    (up,) = read(members(pitch=30))
    (leaning,) = read(members(roll=20))
    (straight,) = read(members())
    forehead, tip, chin = 27, 30, 8
    assert straight.pose == (0, 0, 0)
    assert right.pose.yaw > 0
    assert right.landmarks[tip, 0] > straight.landmarks[tip, 0] + 20
    assert up.pose.pitch > 0
    assert up.landmarks[tip, 1] < straight.landmarks[tip, 1] - 20
    assert leaning.pose.roll > 0
    assert leaning.landmarks[forehead, 0] > leaning.landmarks[chin, 0] + 20


def test_all_views_of_a_photograph_share_one_person(read, members):
    stems = {
        "AFW_134212_1_0": "AFW",
        "AFW_134212_1_12": "AFW",
        "AFW_134212_2_3": "AFW",
        "AFW_1342121_1_0": "AFW",
        "HELEN_232194_1_0": "HELEN",
        "HELEN_232194_1_16": "HELEN",
        "IBUG_image_014_01_2": "IBUG",
        "IBUG_image_014_01_0": "IBUG",
        "IBUG_image_015_1_0": "IBUG",
        "LFPW_image_train_0737_0": "LFPW",
        "LFPW_image_train_0737_13": "LFPW",
        "LFPW_image_train_0738_0": "LFPW",
        "LFPW_image_test_0737_0": "LFPW",
    }
    found = read(
        {
            name: content
            for stem, folder in stems.items()
            for name, content in members(folder, stem).items()
        }
    )
    assert {example.id for example in found} == set(stems)
    groups: dict[str, list[str]] = {}
    for example in found:
        groups.setdefault(example.person, []).append(example.id)
    assert sorted(map(sorted, groups.values())) == [
        ["AFW_1342121_1_0"],
        ["AFW_134212_1_0", "AFW_134212_1_12", "AFW_134212_2_3"],
        ["HELEN_232194_1_0", "HELEN_232194_1_16"],
        ["IBUG_image_014_01_0", "IBUG_image_014_01_2"],
        ["IBUG_image_015_1_0"],
        ["LFPW_image_test_0737_0"],
        ["LFPW_image_train_0737_0", "LFPW_image_train_0737_13"],
        ["LFPW_image_train_0738_0"],
    ]


def test_mirrored_copies_and_code_are_left_out(read, members):
    files = members() | members("AFW_Flip", "AFW_134212_1_0")
    files |= {"300W_LP/Code/Mex/sample.jpg": b"x", "300W_LP/Code/model.mat": b"x"}
    assert [example.id for example in read(files)] == ["AFW_134212_1_0"]


def test_unpacked_folder_at_any_depth(tmp_path, members):
    for name, content in members(yaw=-30).items():
        path = tmp_path / "mine" / "jpg" / name.removeprefix("300W_LP/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (example,) = datasets.examples("the300w_lp", open_archive(tmp_path / "mine"))
    assert example.pose.yaw == pytest.approx(30, abs=1e-4)
    assert example.defect == ""


def test_pictures_without_readable_labels_are_quarantined(read, members, mat):
    def defect(changed: str, content: bytes | None) -> str:
        files = members() | {changed: content}
        (example,) = read({name: data for name, data in files.items() if data is not None})
        assert example.image == (b"" if changed.endswith(".jpg") else b"AFW_134212_1_0")
        assert example.person == "AFW_134212"
        return example.defect

    whole = members()[f"{PICTURE}.mat"]
    assert defect(f"{PICTURE}.jpg", None) == "its image is not in the archive"
    assert defect(f"{PICTURE}.mat", None) == "its .mat file is missing"
    assert defect(POINTS, None) == "its _pts.mat file is missing"
    for content in (b"", b"not MATLAB's", whole[:300], mat(pt2d=np.zeros((2, 68)))):
        assert "its labels cannot be read" in defect(f"{PICTURE}.mat", content)
    few = mat(pts_2d=np.zeros((68, 2)), pts_3d=np.zeros((67, 2)))
    assert defect(POINTS, few) == "landmarks of shape (67, 2)"
    none = mat(pts_2d=np.zeros((68, 2)), pts_3d=np.full((68, 2), np.nan))
    assert defect(POINTS, none) == "all landmarks are missing"


def test_a_damaged_picture_does_not_spoil_the_next(read, members):
    damaged = members("AFW", "AFW_1_1_0") | {"300W_LP/AFW/AFW_1_1_0.mat": b"x"}
    first, second = read(damaged | members("AFW", "AFW_2_1_0", yaw=-20))
    assert first.defect != ""
    assert (second.id, second.defect) == ("AFW_2_1_0", "")
    assert second.pose.yaw == pytest.approx(20, abs=1e-4)


def test_point_that_is_no_number_is_hidden(read, members, mat, fitted):
    points = fitted()["pt3d_68"][:2].T
    points[4, 1] = np.nan
    (example,) = read(members() | {POINTS: mat(pts_2d=points, pts_3d=points)})
    assert list(np.flatnonzero(~example.visible)) == [4]
    np.testing.assert_array_equal(example.landmarks[4], 0)
    assert example.defect == ""


def test_other_archives_are_not_taken_for_it(tmp_path: Path):
    folder = tmp_path / "faces"
    (folder / "AFW").mkdir(parents=True)
    (folder / "AFW" / "AFW_1_1_0.jpg").write_bytes(b"x")
    with pytest.raises(GrimaceError, match=r"does not hold the300w_lp: expected .*_pts\.mat"):
        datasets.examples("the300w_lp", open_archive(folder))
