import cv2
import imagehash
import numpy as np
import pytest
from PIL import Image

from pipelines.checks.duplicates import (
    NearCopies,
    clusters,
    coarse_version,
    correlation,
    details,
    near_copies,
    one_face,
    perceptual_hashes,
    pixel_digest,
    similar_hashes,
    small_version,
    surplus,
)
from pipelines.datasets.faces import render


def face(number: int, side: int = 96) -> np.ndarray:
    """A drawn face, uint8 (side, side)."""
    return cv2.resize(cv2.cvtColor(render(3, number).image, cv2.COLOR_RGB2GRAY), (side, side))


def moved(grey: np.ndarray, x: int, y: int) -> np.ndarray:
    matrix = np.array([[1, 0, x], [0, 1, y]], np.float32)
    return cv2.warpAffine(grey, matrix, grey.shape[::-1], borderMode=cv2.BORDER_REPLICATE)


def rough(grey: np.ndarray, quality: int) -> np.ndarray:
    encoded = cv2.imencode(".jpg", grey, (cv2.IMWRITE_JPEG_QUALITY, quality))[1]
    return cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE)


def found(*pictures: np.ndarray, distance: int = 14, least: float = 0.78) -> NearCopies:
    return found_among(np.arange(len(pictures)), *pictures, distance=distance, least=least)


def found_among(
    rows: np.ndarray, *pictures: np.ndarray, distance: int = 14, least: float = 0.78
) -> NearCopies:
    small = [small_version(picture) for picture in pictures]
    hashes = np.array([perceptual_hashes(small[row]) for row in rows], np.uint64)
    coarse = np.stack([coarse_version(each) for each in small])
    sharp = np.stack([details(each) for each in small])
    return near_copies(hashes[:, 0], hashes[:, 1], coarse, sharp, rows, distance, least)


# hashes


def test_the_hash_is_imagehashs() -> None:
    small = small_version(face(1))
    ours = [f"{value:016x}" for value in perceptual_hashes(small)]
    pictures = [Image.fromarray(small), Image.fromarray(small).transpose(0)]
    assert ours == [str(imagehash.phash(picture)) for picture in pictures]


def test_pixels_and_shape_make_the_digest() -> None:
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert pixel_digest(picture) == pixel_digest(picture.copy())
    assert pixel_digest(picture) != pixel_digest(picture.reshape(4, 2, 3))
    assert pixel_digest(picture) != pixel_digest(picture + 1)


def bits(value: int, *flipped: int) -> int:
    return value ^ sum(1 << bit for bit in flipped)


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 70])
@pytest.mark.parametrize("distance", [0, 3, 28])
def test_similar_hashes_are_those_of_every_pair_compared(n: int, distance: int) -> None:
    rng = np.random.default_rng(n)
    hashes, mirrored = rng.integers(0, 2**64, (2, n), np.uint64, endpoint=False)
    hashes[n // 2 :] = [bits(int(h), 5, 63) for h in hashes[: n - n // 2]]
    pairs, flips = similar_hashes(hashes, mirrored, distance)
    expected = [
        (i, j, flip)
        for i in range(n)
        for j in range(i + 1, n)
        for flip, others in ((False, hashes), (True, mirrored))
        if int(hashes[i] ^ others[j]).bit_count() <= distance
    ]
    assert [(*pair, flip) for pair, flip in zip(pairs.tolist(), flips.tolist(), strict=True)] == (
        expected
    )
    assert n < 15 or distance == 0 or expected


# near copies


@pytest.mark.parametrize(
    ("change", "mirrored"),
    [
        (lambda grey: rough(grey, 30), False),
        (lambda grey: moved(grey, 3, -1), False),
        (lambda grey: cv2.resize(grey, (48, 48), interpolation=cv2.INTER_AREA), False),
        (lambda grey: cv2.convertScaleAbs(grey, alpha=0.7, beta=40), False),
        (lambda grey: np.ascontiguousarray(grey[:, ::-1]), True),
        (lambda grey: rough(moved(grey[:, ::-1], 2, 1), 50), True),
    ],
)
def test_a_changed_copy_is_found(change, mirrored: bool) -> None:
    for number in range(6):
        near = found(face(number), change(face(number)))
        assert near.pairs.tolist() == [[0, 1]]
        assert near.mirrored.tolist() == [mirrored]
        assert 0.78 <= near.correlations[0] <= 1


def test_different_faces_are_no_copies() -> None:
    assert found(*map(face, range(40))).pairs.tolist() == []


def test_the_correlation_decides() -> None:
    pictures = [face(1), rough(moved(face(1), 3, 0), 40)]
    score = found(*pictures).correlations[0]
    assert len(found(*pictures, least=score - 1e-6).pairs) == 1
    assert len(found(*pictures, least=score + 1e-6).pairs) == 0


def test_the_distance_decides() -> None:
    pictures = [face(1), moved(face(1), 4, 4)]
    (one, _), (other, _) = (perceptual_hashes(small_version(picture)) for picture in pictures)
    distance = (one ^ other).bit_count()
    assert distance > 0
    assert len(found(*pictures, distance=distance).pairs) == 1
    assert len(found(*pictures, distance=distance - 1).pairs) == 0


def test_only_the_named_rows_are_compared() -> None:
    near = found_among(np.array([2, 0]), face(1), face(2), face(1))
    assert near.pairs.tolist() == [[0, 1]]


def test_correlation_looks_two_pixels_around() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    assert correlation(picture, picture) == pytest.approx(1)
    assert correlation(picture, np.roll(picture, (2, -2), (0, 1))) == pytest.approx(1)
    assert correlation(picture, np.roll(picture, 3, 0)) < 0.3
    assert correlation(picture, 255 - picture) < 0.3


def test_details_do_not_depend_on_light_and_contrast() -> None:
    small = small_version(face(1))
    weaker = (small * 0.4 + 60).round().astype(np.uint8)
    assert correlation(details(small), details(weaker)) > 0.95
    slope = np.linspace(-40, 40, 32)
    lit = np.clip(small + slope, 0, 255).astype(np.uint8)
    assert correlation(details(small), details(lit)) > 0.95


def test_what_is_alike_from_afar_alone_is_no_copy() -> None:
    """Two faces under the same strong light from one side: only details tell them apart."""
    light = np.linspace(-1, 1, 96) * 110 + 128
    pictures = [np.clip(light + (face(n) - 128.0) * 0.2, 0, 255).astype(np.uint8) for n in (3, 4)]
    plain = correlation(*map(small_version, pictures))
    assert plain > 0.95
    assert found(*pictures, distance=32).pairs.tolist() == []


def test_a_flat_picture_has_no_details() -> None:
    assert (details(np.full((32, 32), 200, np.uint8)) == 128).all()


@pytest.mark.parametrize("flat", ["first", "second", "both", "core"])
def test_flat_pictures_do_not_correlate(flat: str) -> None:
    plain = np.full((32, 32), 90, np.uint8)
    framed = plain.copy()
    framed[0] = 0
    picture = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    pair = {
        "first": (plain, picture),
        "second": (picture, plain),
        "both": (plain, plain),
        "core": (framed, picture),
    }[flat]
    assert correlation(*pair) == 0


# what stays


@pytest.mark.parametrize(
    ("second", "one"),
    [
        ((0.1, 0.1, 0.5, 0.5), True),
        ((0.25, 0.2, 0.35, 0.4), True),  # fewer points of the same face
        ((0.0, 0.3, 0.6, 0.3), True),  # two points on a line
        ((0.45, 0.1, 0.85, 0.5), False),  # side by side
        ((np.nan,) * 4, True),
    ],
)
def test_boxes_tell_faces_apart(second: tuple[float, ...], one: bool) -> None:
    boxes = np.array([(0.1, 0.1, 0.5, 0.5), second])
    assert one_face(boxes, boxes[::-1]).tolist() == [one, one]


def copies(*pairs: tuple[int, int, float]) -> NearCopies:
    table = np.array(pairs, float).reshape(-1, 3)
    return NearCopies(table[:, :2].astype(int), np.zeros(len(table), bool), table[:, 2])


def test_the_better_of_two_stays() -> None:
    assert surplus(copies((3, 5, 0.95))) == [(5, 3, 0)]


def test_nothing_leaves_for_a_copy_that_leaves_too() -> None:
    """0 is like 1, 1 is like 2, but 0 is not like 2: so 2 stays."""
    assert surplus(copies((0, 1, 0.95), (1, 2, 0.99))) == [(1, 0, 0)]


def test_the_most_similar_copy_that_stays_is_named() -> None:
    near = copies((0, 2, 0.93), (1, 2, 0.97))
    assert surplus(near) == [(2, 1, 1)]


def test_what_leaves_is_like_something_that_stays() -> None:
    rng = np.random.default_rng(1)
    pairs = sorted({tuple(sorted(rng.choice(30, 2, replace=False))) for _ in range(60)})
    near = copies(*((a, b, rng.uniform(0.9, 1)) for a, b in pairs))
    leaving = surplus(near)
    gone = {position for position, _, _ in leaving}
    assert gone and all(stays not in gone for _, stays, _ in leaving)
    assert all(set(near.pairs[index]) == {gone, stays} for gone, stays, index in leaving)
    assert all({a, b} & gone for a, b in pairs)


def test_clusters_are_named_by_their_smallest_id() -> None:
    ids = ["d", "c", "b", "a", "e"]
    pairs = np.array([[0, 1], [1, 2]])
    assert clusters(ids, pairs) == ["b", "b", "b", "", ""]


def test_a_cluster_keeps_its_name_when_others_come() -> None:
    before = clusters(["m", "n"], np.array([[0, 1]]))
    after = clusters(["x", "m", "a", "n"], np.array([[1, 3], [0, 1]]))
    assert after == ["m", "m", "", "m"] and before == ["m", "m"]


def test_no_copies_no_clusters() -> None:
    assert clusters(["a", "b"], np.zeros((0, 2), int)) == ["", ""]
