"""One labelled face as every builder yields it."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Box(NamedTuple):
    """A rectangle in pixels of the image; the centre of the top-left pixel is (0, 0), y down."""

    left: float
    top: float
    right: float
    bottom: float


class Pose(NamedTuple):
    """Head rotation in degrees; all zero is a face that looks straight into the camera.

    Positive pitch looks up, positive yaw turns the nose and positive roll leans the head towards
    the image's right.
    """

    pitch: float
    yaw: float
    roll: float


class Affect(NamedTuple):
    """Russell's circumplex: valence and arousal, each in [-1, 1]."""

    valence: float
    arousal: float


@dataclass(frozen=True, eq=False)
class Example:
    """A face with what its source says of it.

    Attributes:
        id: unique within the dataset and stable between versions of it; never a person's name.
        image: the encoded picture exactly as found, readable or not; `filter` judges it.
        emotion: index into `models.schemes.EMOTIONS`, -1 where unknown or none of the seven.
        label: the source's own word for the class ("contempt"), "" where it has none.
        landmarks: float32 (N, 2), (x, y) in pixels of the image, the centre of the top-left
            pixel at (0, 0), x to the right and y down; (0, 2) where there are none. Rows that
            are not visible hold 0, never NaN.
        visible: bool (N,), which landmarks are labelled.
        box: the face, where the source gives one.
        pose: head rotation, where the source gives it.
        affect: valence and arousal, where the source gives them.
        person: opaque key shared by all images of one person, "" where unknown.
        official_split: "train", "val" or "test" as the source publishes it, "" where it does not.
        defect: why the source's row cannot be used ("label 9 is outside 0-6"), "" where it can.
            Such a row still travels to `filter`, which drops it with this reason.
        cluster: set by `filter`; key shared by all copies and near copies of one picture, ""
            where there is no other.
        weight: set by `filter`; in [0, 1], how much training heeds it. 0 is not trained on, but
            still counts where it stands in val or test.
    """

    id: str
    image: bytes
    emotion: int = -1
    label: str = ""
    landmarks: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    visible: np.ndarray = field(default_factory=lambda: np.zeros((0,), bool))
    box: Box | None = None
    pose: Pose | None = None
    affect: Affect | None = None
    person: str = ""
    official_split: str = ""
    defect: str = ""
    cluster: str = ""
    weight: float = 1.0
