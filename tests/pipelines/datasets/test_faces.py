"""The drawn faces: repeatable, balanced, in iBUG order, with points that lie on the features."""

from collections import Counter

import numpy as np
import pytest

from models.schemes import EMOTIONS, IBUG_68
from pipelines.datasets.faces import IMAGES_PER_IDENTITY, SIZE, RenderedFace, render

SEED, COUNT = 5, 560


@pytest.fixture(scope="module")
def faces() -> list[RenderedFace]:
    return [render(SEED, index) for index in range(COUNT)]


def test_a_face_depends_on_seed_and_index_alone(faces):
    for index in (559, 0, 123):
        again = render(SEED, index)
        np.testing.assert_array_equal(again.image, faces[index].image)
        np.testing.assert_array_equal(again.landmarks, faces[index].landmarks)
        assert (again.emotion, again.identity) == (faces[index].emotion, faces[index].identity)


def test_no_two_faces_and_no_two_seeds_are_alike(faces):
    assert len({face.image.tobytes() for face in faces}) == COUNT
    assert not np.array_equal(render(SEED + 1, 0).landmarks, faces[0].landmarks)


def test_shapes_and_types_are_those_promised(faces):
    for face in faces[:20]:
        assert (face.image.shape, face.image.dtype) == ((SIZE, SIZE, 3), np.uint8)
        assert (face.landmarks.shape, face.landmarks.dtype) == ((68, 2), np.float32)
        assert (face.visible.shape, face.visible.dtype) == ((68,), bool)


def test_every_emotion_comes_once_in_each_seven(faces):
    for start in range(0, COUNT, 7):
        assert {face.emotion for face in faces[start : start + 7]} == set(range(len(EMOTIONS)))


def test_an_identity_has_its_share_of_images_with_different_emotions(faces):
    assert set(Counter(face.identity for face in faces).values()) == {IMAGES_PER_IDENTITY}
    emotions: dict[int, set[int]] = {}
    for face in faces:
        emotions.setdefault(face.identity, set()).add(face.emotion)
    assert np.mean([len(shown) for shown in emotions.values()]) > 3


def test_points_are_visible_where_they_lie_inside_the_image(faces):
    for face in faces:
        inside = (face.landmarks >= -0.5) & (face.landmarks <= SIZE - 0.5)
        np.testing.assert_array_equal(face.visible, inside.all(axis=1))
    cut = np.mean([not face.visible.all() for face in faces])
    assert 0.01 < cut < 0.08


def test_faces_fill_the_frame_as_promised(faces):
    fill = np.array([np.ptp(face.landmarks, axis=0).max() / SIZE for face in faces])
    assert fill.min() >= 0.449
    assert fill.max() <= 0.751
    assert np.ptp(fill) > 0.25


def test_points_are_in_ibug_order(faces):
    for points in eye_aligned(faces):
        assert_ibug_order(points)


def test_mirrored_and_permuted_points_are_in_ibug_order(faces):
    mirrored = eye_aligned(faces) * (-1, 1)
    with pytest.raises(AssertionError):
        assert_ibug_order(mirrored[0])
    for points in mirrored[:, IBUG_68.mirror]:
        assert_ibug_order(points)


def test_a_positive_yaw_moves_the_nose_to_the_right(faces):
    nose = eye_aligned(faces)[:, 30, 0]
    yaw = np.array([face.yaw for face in faces])
    assert np.corrcoef(nose, yaw)[0, 1] > 0.9


def test_eyes_are_darker_in_the_middle_than_the_cheeks_below(faces):
    darker = [
        grey(face, eye) < grey(face, below_the_eye(face, eye)) - 15
        for face in faces
        for eye in (range(36, 42), range(42, 48))
        if face.visible.all()
    ]
    assert np.mean(darker) > 0.8


def test_brows_are_drawn_at_their_points(faces):
    """The stroke of a brow, whether darker or lighter than the skin, is gone a little above."""
    contrasts = []
    for face in faces:
        points = face.landmarks
        up = points[27] - points[30]
        up = up / np.hypot(*up) * 0.16 * eye_distance(face)
        for brow in (19, 24):
            at, above = grey_at(face, points[brow]), grey_at(face, points[brow] + up)
            below = grey_at(face, points[brow] - up * 0.8)
            if face.visible.all():
                contrasts.append((above + below) / 2 - at)
    assert np.mean(np.array(contrasts) > 5) > 0.6


def test_lips_are_redder_than_cheeks(faces):
    redder = []
    for face in faces:
        colourful = np.ptp(face.image.astype(int), axis=2).mean() > 5
        if colourful and face.visible.all():
            lip = (face.landmarks[57] + face.landmarks[66]) / 2
            redder.append(redness(face, lip) > redness(face, below_the_eye(face, range(36, 42))))
    assert len(redder) > COUNT / 2
    assert np.mean(redder) > 0.75


def test_landmarks_tell_emotions_apart_but_not_perfectly(faces):
    """A ridge regression to one-hot targets, fitted on some persons and scored on others."""
    features = eye_aligned(faces).reshape(COUNT, -1)
    features = np.concatenate([features, np.ones((COUNT, 1))], axis=1)
    emotions = np.array([face.emotion for face in faces])
    train = np.arange(COUNT) < 400
    gram = features[train].T @ features[train] + 0.03 * np.eye(features.shape[1])
    weights = np.linalg.solve(gram, features[train].T @ np.eye(7)[emotions[train]])
    accuracy = np.mean((features[~train] @ weights).argmax(axis=1) == emotions[~train])
    assert 0.7 < accuracy < 0.98


def eye_aligned(faces: list[RenderedFace]) -> np.ndarray:
    """Turn and scale the points so that the outer eye corners lie at (±0.5, 0)."""
    z = np.stack([face.landmarks[:, 0] + 1j * face.landmarks[:, 1] for face in faces])
    left, right = z[:, 36:37], z[:, 45:46]
    z = (z - (left + right) / 2) / (right - left)
    return np.stack([z.real, z.imag], axis=-1)


def assert_ibug_order(points: np.ndarray) -> None:
    x, y = points.T
    assert (np.diff(x[[0, 8, 16]]) > 0).all(), "outline runs from left to right"
    assert y[8] > max(y[0], y[16]), "the chin is the lowest"
    assert (np.diff(x[17:27]) > 0).all(), "brows run from left to right"
    assert y[17:27].mean() < y[36:48].mean() < y[31:36].mean() < y[48:68].mean() < y[8]
    assert (np.diff(y[27:31]) > 0).all(), "the bridge runs down"
    assert (np.diff(x[31:36]) > 0).all(), "nostrils run from left to right"
    for eye in (36, 42):
        assert x[eye] < x[eye + 1] < x[eye + 2] < x[eye + 3], "upper lid from left to right"
        assert x[eye + 3] > x[eye + 4] > x[eye + 5] > x[eye], "lower lid back again"
        assert y[eye + 1] < y[eye + 5], "upper lid above the lower"
        assert y[eye + 2] < y[eye + 4], "upper lid above the lower"
    assert x[39] < x[42], "the left eye comes first"
    assert (np.diff(x[48:55]) > 0).all(), "upper lip from left to right"
    assert (np.diff(x[54:60]) < 0).all(), "lower lip back again"
    assert (np.diff(x[60:65]) > 0).all(), "inner upper lip from left to right"
    assert (np.diff(x[64:68]) < 0).all(), "inner lower lip back again"
    assert y[51] < y[62] < y[57], "lips from top to bottom"
    assert y[62] < y[66] + 0.01, "closed lips may touch, not cross"


def eye_distance(face: RenderedFace) -> float:
    return float(np.hypot(*(face.landmarks[45] - face.landmarks[36])))


def below_the_eye(face: RenderedFace, eye: range) -> np.ndarray:
    down = face.landmarks[30] - face.landmarks[27]
    return face.landmarks[eye].mean(axis=0) + down / np.hypot(*down) * 0.27 * eye_distance(face)


def grey(face: RenderedFace, place: range | np.ndarray) -> float:
    return grey_at(face, face.landmarks[place].mean(axis=0) if isinstance(place, range) else place)


def grey_at(face: RenderedFace, point: np.ndarray) -> float:
    return float(patch(face, point).mean())


def redness(face: RenderedFace, point: np.ndarray) -> float:
    colour = patch(face, point).mean(axis=(0, 1))
    return float(colour[0] / max(colour.sum(), 1.0))


def patch(face: RenderedFace, point: np.ndarray) -> np.ndarray:
    x, y = np.clip(np.rint(point).astype(int), 1, SIZE - 2)
    return face.image[y - 1 : y + 2, x - 1 : x + 2].astype(float)
