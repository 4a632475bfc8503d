from dataclasses import replace

import numpy as np
import pytest

from models.schemes import IBUG_68, KAGGLE_15
from pipelines.checks.landmarks import implausible, measure_landmarks
from pipelines.datasets.example import Example, Pose
from pipelines.datasets.faces import render

SIDE = 128
FOUR = [0, 1, 10, 14]  # eye centres, nose, lower lip: all that most of Kaggle's rows have
JAW = list(range(17))
LEFT_EYE, RIGHT_EYE = list(range(36, 42)), list(range(42, 48))


@pytest.fixture(scope="module")
def faces() -> list[tuple[Example, float]]:
    """Drawn faces with all 68 points, and the yaw that they were drawn with."""
    drawn = [render(7, index) for index in range(60)]
    return [
        (Example("a", b"", landmarks=face.landmarks, visible=face.visible), face.yaw)
        for face in drawn
        if face.visible.all()
    ]


@pytest.fixture(scope="module")
def kaggle(faces: list[tuple[Example, float]]) -> list[Example]:
    """The same in Kaggle's 15 points."""
    groups: list[list[int]] = [RIGHT_EYE, LEFT_EYE, [42], [45], [39], [36], [22], [26], [21], [17]]
    groups += [[30], [54], [48], [51], [57]]
    return [
        with_points(np.stack([face.landmarks[group].mean(axis=0) for group in groups]))
        for face, _ in faces
    ]


def with_points(points: np.ndarray, visible: np.ndarray | None = None) -> Example:
    if visible is None:
        visible = np.ones(len(points), bool)
    points = np.where(visible[:, None], points, 0).astype(np.float32)
    return Example("a", b"", landmarks=points, visible=visible)


def only(face: Example, indices: list[int]) -> Example:
    return with_points(face.landmarks, np.isin(np.arange(len(face.landmarks)), indices))


def moved(face: Example, source: list[int], target: list[int]) -> Example:
    """Put the points `source` where the points `target` are."""
    points = face.landmarks.copy()
    points[source] = face.landmarks[target]
    return replace(face, landmarks=points)


def measured(face: Example) -> dict[str, float]:
    return measure_landmarks(face, (SIDE, SIDE, 3))


def head(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Turn an egg-shaped head that is not the module's own: 68 points, float (68, 2)."""
    rng = np.random.default_rng(5)
    flat = render(7, 0).landmarks.astype(float)
    x, y = (flat - flat[30]).T
    flat = np.stack([x, y], axis=1) + rng.normal(0, 0.3, flat.shape)
    flat = (flat + flat[list(IBUG_68.mirror)] * (-1, 1)) / 2
    radius = np.abs(flat[0, 0])
    depth = 1.1 * radius * (1 - np.sqrt(np.clip(1 - (flat[:, 0] / radius / 1.05) ** 2, 0, 1)))
    depth[27:36] -= 0.15 * radius
    points = np.column_stack([flat, depth])
    a, b, c = np.radians([yaw, pitch, roll])
    # The nose points to -z, and to +x after a positive yaw.
    turn = np.array([[np.cos(a), 0, -np.sin(a)], [0, 1, 0], [np.sin(a), 0, np.cos(a)]])
    nod = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    tilt = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return (points @ (tilt @ nod @ turn).T)[:, :2] + SIDE / 2


def test_good_faces_give_no_finding(
    faces: list[tuple[Example, float]], kaggle: list[Example]
) -> None:
    assert len(faces) > 40
    for face in [*(face for face, _ in faces), *kaggle, *(only(face, FOUR) for face in kaggle)]:
        found = measured(face)
        assert (found["landmarks_folded"], found["landmarks_mirrored"]) == (0, 0)


@pytest.mark.parametrize("yaw", [-90, -80, -60, -30, 0, 30, 60, 80, 90])
@pytest.mark.parametrize("pitch", [-30, 0, 30])
@pytest.mark.parametrize("roll", [-60, 0, 120])
def test_no_pose_is_folded_or_mirrored(yaw: float, pitch: float, roll: float) -> None:
    found = measured(with_points(head(yaw, pitch, roll)))

    assert (found["landmarks_folded"], found["landmarks_mirrored"]) == (0, 0)


@pytest.mark.parametrize("yaw", [-50, 0, 50])
@pytest.mark.parametrize("roll", [-60, 0, 120])
def test_exchanged_names_are_mirrored_in_any_pose(yaw: float, roll: float) -> None:
    found = measured(with_points(head(yaw, 0, roll)[list(IBUG_68.mirror)]))

    assert (found["landmarks_folded"], found["landmarks_mirrored"]) == (0, 1)


def test_mirrored_pixels_and_upside_down_rows_are_mirrored(
    faces: list[tuple[Example, float]],
) -> None:
    for axis in (0, 1):
        for face, _ in faces:
            points = face.landmarks.copy()
            points[:, axis] = SIDE - 1 - points[:, axis]
            found = measured(with_points(points))
            assert (found["landmarks_folded"], found["landmarks_mirrored"]) == (0, 1)


def test_exchanged_names_are_mirrored_in_15_and_in_4_points(kaggle: list[Example]) -> None:
    mirror = list(KAGGLE_15.mirror)
    for face in kaggle:
        swapped = replace(face, landmarks=face.landmarks[mirror])
        assert measured(swapped)["landmarks_mirrored"] == 1
        assert measured(only(swapped, FOUR))["landmarks_mirrored"] == 1


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (JAW, JAW[::-1]),
        ([*LEFT_EYE, *RIGHT_EYE], [*RIGHT_EYE, *LEFT_EYE]),
        ([37, 38, 40, 41], [41, 40, 38, 37]),  # lids of one eye
        ([17, 18, 19, 20, 21], [21, 20, 19, 18, 17]),  # one brow
        ([27, 28, 29, 30], [30, 29, 28, 27]),  # bridge of the nose
        ([*range(49, 54), *range(55, 60)], [*range(59, 54, -1), *range(53, 48, -1)]),  # lips
        ([48, 54, 60, 64], [54, 48, 64, 60]),  # corners of the mouth
    ],
    ids=["jaw", "eyes", "lids", "brow", "nose", "lips", "corners"],
)
def test_a_part_in_the_wrong_order_is_folded(
    faces: list[tuple[Example, float]], source: list[int], target: list[int]
) -> None:
    found = [measured(moved(face, source, target)) for face, _ in faces]

    assert np.mean([item["landmarks_folded"] for item in found]) > 0.9
    assert sum(item["landmarks_mirrored"] for item in found) == 0


@pytest.mark.parametrize("pair", [(2, 3), (6, 7), (11, 12), (13, 14), (10, 14)])
def test_two_of_15_points_exchanged_are_folded(
    kaggle: list[Example], pair: tuple[int, int]
) -> None:
    found = [measured(moved(face, list(pair), list(pair[::-1]))) for face in kaggle]

    assert np.mean([item["landmarks_folded"] for item in found]) > 0.9


def test_nose_and_lip_exchanged_are_folded_in_four_points(kaggle: list[Example]) -> None:
    for face in kaggle:
        assert measured(only(moved(face, [10, 14], [14, 10]), FOUR))["landmarks_folded"] == 1


def test_shuffled_points_are_folded(faces: list[tuple[Example, float]]) -> None:
    rng = np.random.default_rng(0)
    for face, _ in faces:
        shuffled = replace(face, landmarks=rng.permutation(face.landmarks))
        assert measured(shuffled)["landmarks_folded"] == 1


@pytest.mark.parametrize(
    ("points", "visible"),
    [
        (np.zeros((0, 2)), None),
        (np.ones((68, 2)), None),  # all in one place
        (np.ones((68, 2)), np.arange(68) < 3),
        (np.ones((15, 2)), np.zeros(15, bool)),
        (np.arange(10.0).reshape(5, 2), None),  # a scheme of one's own
    ],
    ids=["none", "collapsed", "three", "invisible", "unknown"],
)
def test_what_has_no_shape_gives_no_finding(points: np.ndarray, visible: np.ndarray | None) -> None:
    found = measured(with_points(points, visible))

    assert (found["landmarks_folded"], found["landmarks_mirrored"]) == (0, 0)
    assert found["landmarks_outside"] == 0


def test_points_outside_the_picture_are_counted() -> None:
    inside = [(-0.5, 0), (SIDE - 0.5, 5), (3, SIDE - 0.5), (60, 60), (60, 60)]
    outside = [(-0.6, 0), (5, SIDE - 0.4), (SIDE, 5)]
    points = np.array([*inside, *outside, (-9, -9), (-9, -9)])
    visible = np.array([True] * 8 + [False] * 2)

    assert measured(with_points(points, visible))["landmarks_outside"] == pytest.approx(3 / 8)


def test_a_wide_picture_is_wide_in_x() -> None:
    face = with_points(np.array([[90.0, 10.0], [10.0, 90.0]]))

    assert measure_landmarks(face, (50, 100, 3))["landmarks_outside"] == 0.5


def test_yaw_is_near_the_one_that_faces_were_drawn_with(
    faces: list[tuple[Example, float]],
) -> None:
    estimated = np.array([measured(face)["yaw"] for face, _ in faces])
    drawn = np.array([yaw for _, yaw in faces])

    assert drawn.min() < -15 and drawn.max() > 15
    assert np.abs(estimated - drawn).max() < 8


def test_yaw_of_the_mirrored_face_is_opposite(faces: list[tuple[Example, float]]) -> None:
    for face, _ in faces[:10]:
        points = face.landmarks[list(IBUG_68.mirror)] * (-1, 1) + (SIDE - 1, 0)
        there = measured(with_points(points))["yaw"]
        assert there == pytest.approx(-measured(face)["yaw"], abs=1e-3)


@pytest.mark.parametrize("yaw", [-75, -45, 0, 45, 75])
@pytest.mark.parametrize("roll", [0, 40])
def test_yaw_falls_into_its_bin_whatever_the_roll(yaw: float, roll: float) -> None:
    assert measured(with_points(head(yaw, 0, roll)))["yaw"] == pytest.approx(yaw, abs=14)


def test_the_sources_pose_goes_before_the_estimate(faces: list[tuple[Example, float]]) -> None:
    face, _ = faces[0]

    assert measured(replace(face, pose=Pose(1, -71, 2)))["yaw"] == -71


def test_yaw_is_unknown_where_it_cannot_be_told(
    faces: list[tuple[Example, float]], kaggle: list[Example]
) -> None:
    face, _ = faces[0]
    few = only(face, list(range(17, 40)))
    mirrored = replace(face, landmarks=face.landmarks[list(IBUG_68.mirror)])
    folded = moved(face, JAW, JAW[::-1])

    for unknown in (with_points(np.zeros((0, 2))), kaggle[0], few, mirrored, folded):
        assert np.isnan(measured(unknown)["yaw"])


@pytest.fixture(scope="module")
def shapes(faces: list[tuple[Example, float]]) -> np.ndarray:
    return np.stack([face.landmarks for face, _ in faces])


def everything(shapes: np.ndarray) -> np.ndarray:
    return np.ones(shapes.shape[:2], bool)


@pytest.mark.parametrize("kind", ["shuffled", "mirrored", "one point", "noise", "collapsed"])
def test_a_broken_shape_stands_out(shapes: np.ndarray, kind: str) -> None:
    rng = np.random.default_rng(0)
    eyes = np.linalg.norm(shapes[3, 36] - shapes[3, 45])
    broken = {
        "shuffled": rng.permutation(shapes[3]),
        "mirrored": shapes[3][list(IBUG_68.mirror)],
        "one point": shapes[3] + np.eye(68)[:, [5]] * (0.7 * eyes, 0),
        "noise": shapes[3] + rng.normal(0, 0.1 * eyes, (68, 2)),
        "collapsed": np.zeros((68, 2)),
    }[kind]

    shapes = shapes.copy()
    shapes[3] = broken
    scores = implausible(shapes, everything(shapes))

    assert np.argmax(scores) == 3
    assert scores[3] > 6 > np.median(scores)


def test_scores_do_not_depend_on_place_size_and_rotation(shapes: np.ndarray) -> None:
    turned = shapes.astype(float)
    turned[::2] = turned[::2] @ [[0.0, 3.0], [-3.0, 0.0]] + 500

    before = implausible(shapes.astype(float), everything(shapes))
    np.testing.assert_allclose(implausible(turned, everything(shapes)), before, atol=1e-3)


def test_a_fifth_of_broken_shapes_does_not_hide_them(shapes: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    shapes, broken = shapes.copy(), np.arange(0, len(shapes), 5)
    for index in broken:
        shapes[index] = rng.permutation(shapes[index])

    scores = implausible(shapes, everything(shapes))

    assert scores[broken].min() > np.delete(scores, broken).max()
    assert scores[broken].min() > 6


def test_a_shape_with_missing_points_is_judged_by_those_it_has(kaggle: list[Example]) -> None:
    points = np.stack([face.landmarks for face in kaggle])
    visible = everything(points)
    visible[10:] = np.isin(np.arange(15), FOUR)
    points[~visible] = 0
    points[20, 10] += (0, 40)  # the nose below the mouth

    scores = implausible(points, visible)

    assert np.argmax(scores) == 20
    assert scores[20] > 6
    # Fewer than twenty have all the points.
    assert (scores[:10] == 0).all()
    assert np.isfinite(scores).all()


def test_values_of_invisible_points_do_not_matter(kaggle: list[Example]) -> None:
    points = np.stack([face.landmarks for face in kaggle])
    visible = everything(points)
    visible[:, 6:10] = False
    other = np.where(visible[..., None], points, 77)

    np.testing.assert_array_equal(implausible(points, visible), implausible(other, visible))


def test_too_few_shapes_or_points_are_not_judged(shapes: np.ndarray) -> None:
    few = shapes[:19].copy()
    few[0] = few[0, ::-1]
    visible = everything(shapes) & (np.arange(68) < 3)

    assert (implausible(few, everything(few)) == 0).all()
    assert (implausible(shapes, visible) == 0).all()
    assert implausible(np.zeros((0, 68, 2)), np.zeros((0, 68), bool)).shape == (0,)


def test_copies_of_one_shape_are_all_plausible(shapes: np.ndarray) -> None:
    same = np.repeat(shapes[:1], 30, axis=0)

    assert (implausible(same, everything(same)) == 0).all()
