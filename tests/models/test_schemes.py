import numpy as np
import pytest

from models.schemes import EMOTIONS, FER2013_CSV_ORDER, IBUG_68, KAGGLE_15, SCHEMES, Scheme

BOTH = pytest.mark.parametrize("scheme", [IBUG_68, KAGGLE_15], ids=lambda scheme: scheme.name)

# A frontal face seen from in front, drawn by hand from the published figures: x, y of each point.
# The person's left is on the picture's right.
KAGGLE_FACE = np.array(
    [
        (66, 37), (30, 37), (60, 37), (73, 37), (36, 37), (23, 37),  # eyes
        (56, 29), (80, 29), (40, 29), (16, 29),  # brows
        (48, 57), (64, 76), (32, 76), (48, 73), (48, 84),  # nose, mouth
    ]
)  # fmt: skip
IBUG_FACE = np.array(
    [
        (10, 40), (11, 50), (12, 60), (14, 70), (20, 80), (28, 88), (36, 94), (43, 98),
        (50, 100), (57, 98), (64, 94), (72, 88), (80, 80), (86, 70), (88, 60), (89, 50), (90, 40),
        (15, 28), (22, 22), (29, 21), (36, 23), (43, 27), (57, 27), (64, 23), (71, 21), (78, 22),
        (85, 28),
        (50, 38), (50, 45), (50, 52), (50, 59), (42, 65), (46, 66), (50, 67), (54, 66), (58, 65),
        (22, 38), (27, 35), (33, 35), (38, 39), (33, 41), (27, 41),
        (62, 39), (67, 35), (73, 35), (78, 38), (73, 41), (67, 41),
        (33, 80), (40, 77), (46, 75), (50, 76), (54, 75), (60, 77), (67, 80),
        (60, 86), (54, 89), (50, 90), (46, 89), (40, 86),
        (36, 80), (46, 79), (50, 80), (54, 79), (64, 80), (54, 83), (50, 84), (46, 83),
    ]
)  # fmt: skip


@BOTH
def test_mirror_is_an_involution(scheme: Scheme) -> None:
    mirror = np.array(scheme.mirror)
    assert sorted(mirror) == list(range(scheme.size))
    assert np.array_equal(mirror[mirror], np.arange(scheme.size))


@pytest.mark.parametrize(
    ("scheme", "face", "axis"), [(IBUG_68, IBUG_FACE, 50), (KAGGLE_15, KAGGLE_FACE, 48)]
)
def test_mirroring_a_symmetric_face_gives_it_back(
    scheme: Scheme, face: np.ndarray, axis: int
) -> None:
    assert face.shape == (scheme.size, 2)
    mirrored = np.stack([2 * axis - face[:, 0], face[:, 1]], 1)
    assert np.array_equal(mirrored[list(scheme.mirror)], face)


def test_eyes_of_ibug_are_the_outer_corners() -> None:
    left, right = IBUG_68.eyes
    assert IBUG_68.mirror[left] == right
    at_eye_height = np.flatnonzero(np.abs(IBUG_FACE[:, 1] - IBUG_FACE[left, 1]) <= 3)
    at_eye_height = at_eye_height[at_eye_height >= 17]  # the outline passes there too
    assert {left, right} == {
        at_eye_height[IBUG_FACE[at_eye_height, 0].argmin()],
        at_eye_height[IBUG_FACE[at_eye_height, 0].argmax()],
    }


def test_eyes_of_kaggle_are_the_centres() -> None:
    first, second = KAGGLE_15.eyes
    assert KAGGLE_15.mirror[first] == second
    for eye in (first, second):
        # On the eye's own side, between its two corners.
        side = np.sign(KAGGLE_FACE[eye, 0] - 48)
        corners = [i for i in range(2, 6) if np.sign(KAGGLE_FACE[i, 0] - 48) == side]
        x = sorted(KAGGLE_FACE[corners, 0])
        assert len(x) == 2 and x[0] < KAGGLE_FACE[eye, 0] < x[1]


def test_inner_51_leaves_out_the_outline() -> None:
    assert IBUG_68.inner == tuple(range(17, 68))
    assert len(KAGGLE_15.inner) == 15


def test_a_scheme_is_found_by_its_size() -> None:
    assert {68: IBUG_68, 15: KAGGLE_15} == SCHEMES


def test_emotions() -> None:
    assert list(EMOTIONS) == sorted(EMOTIONS) and len(EMOTIONS) == 7
    assert set(FER2013_CSV_ORDER) == set(EMOTIONS)
    # Goodfellow et al. 2013: 0 angry, 3 happy, 4 sad, 6 neutral.
    assert [FER2013_CSV_ORDER[i] for i in (0, 3, 4, 6)] == ["angry", "happy", "sad", "neutral"]
