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


@dataclass(frozen=True, eq=False)
class Example:
    """A face with what its source says of it.

    Attributes:
        id: unique within the dataset and stable between versions of it; never a person's name.
        image: the encoded picture exactly as found, readable or not; `filter` judges it.
        emotion: index into `models.schemes.EMOTIONS`, -1 where unknown.
        landmarks: float32 (N, 2), (x, y) in pixels of the image, the centre of the top-left
            pixel at (0, 0), x to the right and y down; (0, 2) where there are none. Rows that
            are not visible hold 0, never NaN.
        visible: bool (N,), which landmarks are labelled.
        box: the face, where the source gives one.
        person: opaque key shared by all images of one person, "" where unknown.
        official_split: "train", "val" or "test" as the source publishes it, "" where it does not.
        defect: why the source's row cannot be used ("label 9 is outside 0-6"), "" where it can.
            Such a row still travels to `filter`, which drops it with this reason.
    """

    id: str
    image: bytes
    emotion: int = -1
    landmarks: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    visible: np.ndarray = field(default_factory=lambda: np.zeros((0,), bool))
    box: Box | None = None
    person: str = ""
    official_split: str = ""
    defect: str = ""
