"""Label conventions of the field: the seven FER expressions, iBUG-68 and Kaggle-15 points."""

from dataclasses import dataclass

EMOTIONS = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
"""FER-2013's seven classes, alphabetical; a label is an index into this tuple."""

FER2013_CSV_ORDER = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
"""The order behind the integers 0–6 of the original `fer2013.csv` (Goodfellow et al. 2013)."""


@dataclass(frozen=True)
class Scheme:
    """A landmark convention.

    Attributes:
        name: the convention's usual name.
        mirror: for each index, the index of the point that lands there in a mirrored image
            ("left" and "right" swapped); an involution.
        eyes: the two points whose distance normalises the inter-ocular NME: the outer eye corners
            of iBUG-68 (300-W, Sagonas et al. 2013); the eye centres of Kaggle-15, where most rows
            have no corners. The two distances differ, so errors compare within a scheme only.
        inner: indices without the face outline, the usual "inner 51" of iBUG-68; all of them
            where the scheme has no outline.
    """

    name: str
    mirror: tuple[int, ...]
    eyes: tuple[int, int]
    inner: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of points."""
        return len(self.mirror)

    @property
    def has_outline(self) -> bool:
        """Whether the points reach round the face, so that their extent is the face's."""
        return len(self.inner) < self.size


def _mirror_of(size: int, pairs: list[tuple[int, int]]) -> tuple[int, ...]:
    order = list(range(size))
    for left, right in pairs:
        order[left], order[right] = right, left
    return tuple(order)


_IBUG_PAIRS = (
    [(i, 16 - i) for i in range(8)]  # outline
    + [(17 + i, 26 - i) for i in range(5)]  # brows
    + [(31, 35), (32, 34)]  # nostrils
    + [(36, 45), (37, 44), (38, 43), (39, 42), (40, 47), (41, 46)]  # eyes
    + [(48, 54), (49, 53), (50, 52), (55, 59), (56, 58)]  # outer lips
    + [(60, 64), (61, 63), (65, 67)]  # inner lips
)

IBUG_68 = Scheme(
    name="ibug-68",
    mirror=_mirror_of(68, _IBUG_PAIRS),
    eyes=(36, 45),
    inner=tuple(range(17, 68)),
)

# Columns of Kaggle's training.csv: eye centres, four eye corners, four brow ends, nose tip,
# two mouth corners, two lip centres.
KAGGLE_15 = Scheme(
    name="kaggle-15",
    mirror=_mirror_of(15, [(0, 1), (2, 4), (3, 5), (6, 8), (7, 9), (11, 12)]),
    eyes=(0, 1),
    inner=tuple(range(15)),
)

SCHEMES = {scheme.size: scheme for scheme in (IBUG_68, KAGGLE_15)}
