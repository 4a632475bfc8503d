"""AFLW2000-3D: faces in the wild with 68 points and head rotation, to measure on."""

import io
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

from pipelines.datasets.archive import Archive
from pipelines.datasets.catalogue import parse, read_member
from pipelines.datasets.example import Example, Pose
from pipelines.datasets.the300w_lp import pixels, pose

EXPECTED = "AFLW2000/image0*.jpg with a .mat file beside each"


def recognises(archive: Archive) -> bool:
    """Whether there is a label file of the published names."""
    return any(fnmatch(PurePosixPath(name).name, "image0*.mat") for name in archive.names())


def examples(archive: Archive) -> Iterator[Example]:
    """Yield every face with its 68 landmarks (`pt3d_68`: hidden ones too), all visible, and pose.

    The conventions are 300W-LP's. `official_split` is "test" for all. Pictures without readable
    labels, and labels without their picture, are yielded with their `defect`.

    Args:
        archive: `AFLW2000/` as published, at any depth.
    """
    names = set(archive.names())
    of_faces = (path for path in map(PurePosixPath, archive.names()) if _is_of_a_face(path))
    for picture in dict.fromkeys(path.with_suffix(".jpg") for path in of_faces):
        yield _example(archive, names, picture)


def _is_of_a_face(path: PurePosixPath) -> bool:
    return fnmatch(path.name, "image0*") and path.suffix in (".jpg", ".mat")


def _example(archive: Archive, names: set[str], picture: PurePosixPath) -> Example:
    id = picture.stem
    image, damage = read_member(archive, names, picture)
    labels, no_labels = read_member(archive, names, picture.with_suffix(".mat"))
    defect = damage or no_labels
    features: dict[str, Any] = {}
    if not defect:
        files = {f"{id}.jpg": b"", f"{id}.mat": labels}
        features, defect = parse("aflw2k3d", "AFLW2000", files)
    if defect:
        return Example(id, image, official_split="test", defect=defect)
    landmarks, visible, defect = pixels(features["landmarks_68_3d_xy_normalized"])
    return Example(
        id,
        image,
        landmarks=landmarks,
        visible=visible,
        pose=_pose(labels),
        official_split="test",
        defect=defect,
    )


def _pose(labels: bytes) -> Pose | None:
    """Read the head rotation, which the catalogue's parser leaves out."""
    from scipy.io import loadmat

    parameters = loadmat(io.BytesIO(labels), variable_names=["Pose_Para"]).get("Pose_Para")
    return None if parameters is None else pose(parameters)
