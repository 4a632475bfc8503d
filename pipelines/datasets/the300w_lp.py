"""300W-LP: photographs turned to large poses, with 68 points and head rotation.

Of the three sets of points in the archive this takes `pts_3d`: the fitted 3D model's points as they
fall on the picture, hidden ones too. AFLW2000-3D's `pt3d_68` are of the same kind, so a model
trained here is measured there on what it has learnt.
"""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from models.schemes import IBUG_68
from pipelines.datasets import cells
from pipelines.datasets.archive import Archive
from pipelines.datasets.catalogue import parse, read_member
from pipelines.datasets.example import Example, Pose

COLLECTIONS = ("AFW", "HELEN", "IBUG", "LFPW")
EXPECTED = (
    f"{{{','.join(COLLECTIONS)}}}/*.jpg with a .mat file beside each, and landmarks/{{…}}/*_pts.mat"
)

_PARSER_SCALE = 450  # pixels; the catalogue's parsers divide coordinates by it


def recognises(archive: Archive) -> bool:
    """Whether a folder named after one of the collections holds labels."""
    paths = map(PurePosixPath, archive.names())
    return any(path.suffix == ".mat" and path.parent.name in COLLECTIONS for path in paths)


def examples(archive: Archive) -> Iterator[Example]:
    """Yield every picture with its 68 landmarks, all visible, and its pose.

    `id` is the file's name, which begins with the collection and holds no person's name. `person`
    is the photograph: its faces (they can show each other) and all views turned from them share it.
    The mirrored copies in `*_Flip` are left out, as the catalogue does; `augment` mirrors.
    Pictures without readable labels, and labels without their picture, are yielded with their
    `defect`.

    Args:
        archive: `300W_LP/` as published, at any depth.
    """
    names = set(archive.names())
    of_faces = (path for path in map(PurePosixPath, archive.names()) if _is_of_a_face(path))
    for picture in dict.fromkeys(path.with_suffix(".jpg") for path in of_faces):
        yield _example(archive, names, picture)


def pixels(parsed: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Undo the scale of the catalogue's parsers, and count pixels from 0.

    The makers' MATLAB counts them from 1.

    Args:
        parsed: (68, 2), (x, y) as the parser returns them.

    Returns:
        float32 (68, 2) with 0 where a point is not finite, bool (68,), and ""; or (0, 2), (0,) and
        what is wrong.
    """
    points = (np.asarray(parsed, np.float64) * _PARSER_SCALE - 1).astype(np.float32)
    if points.shape != (IBUG_68.size, 2):
        return *cells.no_points(), f"landmarks of shape {points.shape}"
    visible = np.all(np.isfinite(points), axis=1)
    if not visible.any():
        return *cells.no_points(), "all landmarks are missing"
    points[~visible] = 0
    return points, visible, ""


def pose(parameters: np.ndarray) -> Pose | None:
    """Read the makers' `Pose_Para`, which begins with pitch, yaw and roll in radians.

    Their rotation is R_x(pitch) R_y(yaw) R_z(roll) in axes of which y points up and z towards the
    viewer; a positive yaw turns the nose to the image's left, so its sign changes here. Pitch is
    positive for a face that looks up, roll for a head that leans to the image's right.

    Returns:
        Degrees, or None where a number is missing.
    """
    radians = np.asarray(parameters, np.float64).reshape(-1)[:3]
    if len(radians) < 3 or not np.isfinite(radians).all():
        return None
    pitch, yaw, roll = np.degrees(radians)
    return Pose(pitch, -yaw, roll)


def _is_of_a_face(path: PurePosixPath) -> bool:
    in_collection = path.parent.name in COLLECTIONS and path.suffix in (".jpg", ".mat")
    return in_collection and path.parent.parent.name != "landmarks"


def _example(archive: Archive, names: set[str], picture: PurePosixPath) -> Example:
    collection, id = picture.parent.name, picture.stem
    person = _photograph(collection, id)
    points_file = picture.parents[1] / "landmarks" / collection / f"{id}_pts.mat"
    image, damage = read_member(archive, names, picture)
    parameters, no_parameters = read_member(archive, names, picture.with_suffix(".mat"))
    points, no_points = read_member(archive, names, points_file)
    defect = damage or no_parameters or no_points
    features: dict[str, Any] = {}
    if not defect:
        files = {
            f"{collection}/{id}.jpg": b"",
            f"{collection}/{id}.mat": parameters,
            f"landmarks/{collection}/{id}_pts.mat": points,
        }
        features, defect = parse("the300w_lp", "300W_LP", files)
    if defect:
        return Example(id, image, person=person, defect=defect)
    landmarks, visible, defect = pixels(features["landmarks_3d"])
    return Example(
        id,
        image,
        landmarks=landmarks,
        visible=visible,
        pose=pose(features["pose_params"]),
        person=person,
        defect=defect,
    )


def _photograph(collection: str, id: str) -> str:
    """Key of the photograph: AFW_134212_2_10 is view 10 of the second face in AFW_134212.

    LFPW has one face a photograph and does not number it: LFPW_image_train_0737_13.
    """
    numbers = 1 if collection == "LFPW" else 2
    return re.sub(rf"(_\d+){{1,{numbers}}}$", "", id)
