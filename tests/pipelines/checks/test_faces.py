import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipelines.checks.faces import box_measures, detect, seed_keeps
from pipelines.crops import decode
from pipelines.datasets import synthetic
from pipelines.datasets.example import Box, Example

ROOT = Path(__file__).parents[3]
BOTH = ("haar", "blazeface")


@pytest.fixture(scope="module")
def faces() -> list[Example]:
    return list(synthetic.examples(24, 7))


@pytest.fixture(scope="module")
def pictures(faces: list[Example]) -> list[np.ndarray]:
    return [decode(face.image, 3) for face in faces]


def not_faces() -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    text = np.full((48, 48, 3), 255, np.uint8)
    for row in range(6):
        place = (1, 8 + 8 * row)
        cv2.putText(text, "no picture", place, cv2.FONT_HERSHEY_PLAIN, 0.5, (0, 0, 0))
    sign = np.zeros((48, 48, 3), np.uint8)
    cv2.fillConvexPoly(sign, np.array([[24, 6], [44, 42], [4, 42]]), (255, 255, 255))
    slope = np.tile(np.linspace(0, 255, 48, dtype=np.uint8)[:, None, None], (1, 48, 3))
    board = np.kron(np.indices((6, 6)).sum(axis=0) % 2, np.ones((8, 8))).astype(np.uint8) * 255
    return {
        "black": np.zeros((48, 48, 3), np.uint8),
        "noise": noise,
        "text": text,
        "sign": sign,
        "slope": slope,
        "board": np.repeat(board[..., None], 3, axis=2),
    }


def tight(face: Example, picture: np.ndarray) -> np.ndarray:
    """Crop to brows, eyes, nose and mouth, closer than FER-2013's closest; 48 pixels wide."""
    points = face.landmarks[17:]
    left, top = np.maximum(points.min(axis=0), 0).astype(int)
    right, bottom = points.max(axis=0).astype(int) + 1
    return cv2.resize(picture[top:bottom, left:right], (48, 48), interpolation=cv2.INTER_AREA)


def test_blazeface_sees_one_face_in_each_drawing(pictures: list[np.ndarray]) -> None:
    assert [detect(picture, ("blazeface",)) for picture in pictures] == [{"blazeface": 1}] * 24


def test_blazeface_sees_a_face_that_fills_its_picture(
    faces: list[Example], pictures: list[np.ndarray]
) -> None:
    pairs = list(zip(faces, pictures, strict=True))
    crops = [tight(face, picture) for face, picture in pairs if face.visible.all()]

    assert len(crops) > 20
    assert all(detect(crop, ("blazeface",))["blazeface"] for crop in crops)


@pytest.mark.parametrize("factor", [0.4, 4.0])
def test_blazeface_does_not_mind_the_size_of_the_picture(
    pictures: list[np.ndarray], factor: float
) -> None:
    for picture in pictures[:6]:
        scaled = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        assert detect(scaled, ("blazeface",)) == {"blazeface": 1}


@pytest.mark.parametrize("stack", [np.hstack, np.vstack])
def test_blazeface_counts_faces(pictures: list[np.ndarray], stack: object) -> None:
    assert callable(stack)
    assert detect(stack(pictures[:2]), ("blazeface",)) == {"blazeface": 2}


@pytest.mark.parametrize("name", not_faces())
def test_neither_sees_a_face_where_there_is_none(name: str) -> None:
    assert detect(not_faces()[name], BOTH) == {"haar": 0, "blazeface": 0}


def test_the_cascade_sees_some_drawings_and_the_sieve_keeps_just_those(
    pictures: list[np.ndarray],
) -> None:
    seen = [detect(picture, BOTH)["haar"] for picture in pictures]

    assert 0 < sum(map(bool, seen)) < len(seen)
    assert [seed_keeps(picture) for picture in pictures] == [count > 0 for count in seen]


def test_only_the_detectors_asked_for_run(pictures: list[np.ndarray]) -> None:
    assert list(detect(pictures[0], ("haar",))) == ["haar"]
    assert list(detect(pictures[0], ("blazeface", "haar"))) == ["blazeface", "haar"]


def test_a_worker_that_detects_faces_does_not_load_tensorflow() -> None:
    code = (
        "import sys, numpy\n"
        "from pipelines.checks.faces import detect\n"
        "detect(numpy.zeros((48, 48, 3), numpy.uint8), ('haar', 'blazeface'))\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def with_points(*points: tuple[float, float], box: Box | None = None) -> Example:
    landmarks = np.array(points, np.float32).reshape(-1, 2)
    return Example("a", b"", landmarks=landmarks, visible=np.ones(len(points), bool), box=box)


def test_face_box_lies_around_the_landmarks() -> None:
    face = with_points((10, 20), (40, 30), (25, 80), box=Box(0, 0, 5, 5))

    assert box_measures(face, (100, 100, 3)) == {"face_size": 60, "cut_off": 0}


def test_invisible_landmarks_do_not_widen_the_box() -> None:
    landmarks = np.array([[10, 20], [40, 30], [0, 0]], np.float32)
    face = Example("a", b"", landmarks=landmarks, visible=np.array([True, True, False]))

    assert box_measures(face, (100, 100))["face_size"] == 30


def test_face_box_is_the_sources_where_there_are_no_landmarks() -> None:
    face = with_points(box=Box(79.5, 10, 119.5, 30))

    assert box_measures(face, (50, 100, 3)) == {"face_size": 40, "cut_off": 0.5}


def test_face_box_is_the_picture_where_the_source_gives_none() -> None:
    assert box_measures(with_points(), (48, 60, 3)) == {"face_size": 60, "cut_off": 0}


@pytest.mark.parametrize(
    ("box", "cut_off"),
    [
        (Box(-10.5, -10.5, 9.5, 9.5), 0.75),  # a quarter is left in the corner
        (Box(200, 200, 240, 240), 1),
        (Box(5, 5, 5, 5), 0),
    ],
)
def test_cut_off_is_the_share_outside(box: Box, cut_off: float) -> None:
    assert box_measures(with_points(box=box), (100, 100))["cut_off"] == pytest.approx(cut_off)
