import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipelines import datasets, download
from pipelines.datasets.archive import open_archive
from pipelines.datasets.builder import read as read_stored

PARAMS = Path(__file__).parents[3] / "params.yaml"


@pytest.fixture
def members(fitted, mat):
    def make(number: int = 2, **angles: float):
        stem = f"AFLW2000/image{number:05}"
        labels = fitted(**angles) | {"pt2d": np.full((2, 21), -1.0)}
        return {f"{stem}.jpg": b"picture %d" % number, f"{stem}.mat": mat(**labels)}

    return make


def pack(files: dict[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return path


@pytest.fixture
def read(tmp_path):
    def read_examples(files: dict[str, bytes]):
        archive = open_archive(pack(files, tmp_path / "AFLW2000-3D.zip"))
        return list(datasets.examples("aflw2k3d", archive))

    return read_examples


def test_face_comes_with_points_pose_and_split(read, members, fitted):
    files = members(4, pitch=-20, yaw=70, roll=3) | members(2)
    files |= {"AFLW2000/Code/Model_Shape.mat": b"x", "AFLW2000/Code/sample.jpg": b"x"}
    first, second = read(files)
    assert (first.id, second.id) == ("image00002", "image00004")
    assert second.image == b"picture 4"
    wanted = fitted(pitch=-20, yaw=70, roll=3)["pt3d_68"][:2].T - 1
    np.testing.assert_allclose(second.landmarks, wanted, atol=1e-3)
    assert second.landmarks.dtype == np.float32
    assert second.visible.all()
    # The nose points to the image's left, as the model's positive yaw does.
    assert second.landmarks[30, 0] < first.landmarks[30, 0] - 20
    np.testing.assert_allclose(second.pose, (-20, -70, 3), atol=1e-4)
    assert {first.official_split, second.official_split} == {"test"}
    assert {first.defect, second.defect, first.person} == {""}


def test_labels_that_are_missing_or_damaged(read, members, mat, fitted):
    def defect(content: bytes | None) -> str:
        files = members() | {"AFLW2000/image00002.mat": content}
        others = members(3, yaw=10)  # what comes after is not spoilt
        kept = {name: data for name, data in (files | others).items() if data is not None}
        first, second = read(kept)
        assert first.image == b"picture 2"
        assert first.official_split == "test"
        assert second.defect == ""
        return first.defect

    labels = fitted()
    assert defect(None) == "its .mat file is missing"
    assert "its labels cannot be read" in defect(b"x" * 500)
    assert "its labels cannot be read" in defect(mat(Pose_Para=labels["Pose_Para"]))
    labels["pt3d_68"] = labels["pt3d_68"][:, :60]
    assert defect(mat(**labels)) == "landmarks of shape (60, 2)"


def test_labels_without_their_picture_are_quarantined(read, members):
    files = members(2) | members(3)
    del files["AFLW2000/image00002.jpg"]
    lost, whole = read(files)
    assert (lost.id, lost.defect) == ("image00002", "its image is not in the archive")
    assert (lost.official_split, whole.defect) == ("test", "")


def test_points_without_a_pose(read, members, mat, fitted):
    labels = fitted()
    del labels["Pose_Para"]
    (example,) = read(members() | {"AFLW2000/image00002.mat": mat(**labels)})
    assert example.pose is None
    assert example.defect == ""


def test_stage_stores_it_from_an_unpacked_folder(elsewhere, members, monkeypatch):
    """As a user has it: the archive unpacked, in the folder that GRIMACE_ARCHIVES names."""
    for name, content in (members(2, yaw=45) | members(3)).items():
        path = elsewhere / "archives" / "AFLW2000-3D.zip" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setenv("GRIMACE_ARCHIVES", "archives")
    params = yaml.safe_load(PARAMS.read_text())
    Path("params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.setattr(sys, "argv", ["download", "--dataset", "aflw2k3d"])
    download.main()
    stored = {row.id: row for row in read_stored(Path("data/raw/aflw2k3d"))}
    assert stored["image00002"].pose.yaw == pytest.approx(-45, abs=1e-4)
    assert stored["image00002"].landmarks.shape == (68, 2)
    report = json.loads(Path("reports/download/aflw2k3d.json").read_text())
    assert report["official_splits"] == {"test": {"unlabelled": 2}}
    assert report["defects"] == {}


def test_stage_fetches_what_the_catalogue_lists(server, elsewhere, members, monkeypatch):
    import hashlib
    from types import SimpleNamespace

    from pipelines.datasets.catalogue import builder_class

    packed = pack(members(2) | members(3), elsewhere / "origin.zip")
    server.content = packed.read_bytes()
    server.break_off_after = 1000
    digest = hashlib.sha256(server.content).hexdigest()
    infos = {f"{server.root}/AFLW2000-3D.zip": SimpleNamespace(checksum=digest)}
    monkeypatch.setattr(builder_class("aflw2k3d"), "url_infos", infos)
    Path("params.yaml").write_text(PARAMS.read_text())
    monkeypatch.setattr(sys, "argv", ["download", "--dataset", "aflw2k3d"])
    download.main()
    assert [row.defect for row in read_stored(Path("data/raw/aflw2k3d"))] == ["", ""]
    report = json.loads(Path("reports/download/aflw2k3d.json").read_text())
    assert (report["archive"], report["sha256"]) == ("AFLW2000-3D.zip", digest)
