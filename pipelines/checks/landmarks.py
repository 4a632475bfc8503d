"""Judge whether landmarks lie where a face can have them.

What one face shows by itself is compared with a template, a face of average shape in three
dimensions; `implausible` compares each shape with all others of its dataset.
"""

from collections.abc import Iterable

import numpy as np

from models.schemes import IBUG_68, KAGGLE_15, SCHEMES
from pipelines.datasets.example import Example

# Fewer points than this have no shape, and fewer shapes than this no distribution.
FEWEST_POINTS = 4
FEWEST_SHAPES = 20
ENOUGH_SHAPES = 600  # with the same points and more

# A part is folded when its order is reversed by this share of its usual length.
REVERSED = 0.5

# A cloud of points whose spread across is less than this part of that along it is a face seen from
# the side (some 75 degrees), which has no left and right to be exchanged.
NARROW = 0.35

# The same of its agreement with the template; with less, nothing is said about mirroring.
VAGUE = 0.2

# The shape model is learnt from this share of the shapes, the most usual ones, found in so many
# rounds; in each, a shape is judged by a model of the other folds.
USUAL = 0.9
ROUNDS = 3
FOLDS = 5

# Differences smaller than this, relative to the size of the shape, do not count.
PRECISION = 1e-4

# The iBUG-68 points of an average face from the image's left to its middle, in millimetres: x to
# the image's right, y down, z away from the camera, 0 at the tip of the nose. Factorised from the
# landmarks of YouTube Faces (Tomasi and Kanade 1992), made symmetric, and scaled to a distance of
# 90 between the outer corners of the eyes.
# fmt: off
_HALF = {
    # outline
    0: (-78, -32, 56), 1: (-77, -14, 53), 2: (-73, 3, 52), 3: (-70, 18, 51), 4: (-63, 36, 48),
    5: (-52, 51, 42), 6: (-40, 61, 34), 7: (-24, 70, 24), 8: (0, 75, 21),
    # brow
    17: (-59, -49, 30), 18: (-50, -55, 23), 19: (-39, -57, 18), 20: (-28, -56, 15),
    21: (-19, -54, 14),
    # nose
    27: (0, -34, 12), 28: (0, -21, 7), 29: (0, -10, 1), 30: (0, 0, 0),
    31: (-13, 7, 12), 32: (-7, 9, 10), 33: (0, 10, 9),
    # eye
    36: (-45, -35, 26), 37: (-38, -37, 21), 38: (-28, -37, 21), 39: (-20, -34, 22),
    40: (-28, -31, 21), 41: (-38, -31, 23),
    # lips, outer and inner
    48: (-27, 30, 20), 49: (-18, 25, 13), 50: (-6, 22, 9), 51: (0, 23, 8),
    57: (0, 43, 11), 58: (-9, 42, 12), 59: (-17, 38, 15),
    60: (-25, 30, 20), 61: (-8, 28, 12), 62: (0, 28, 11), 66: (0, 34, 12), 67: (-8, 34, 13),
}
# fmt: on


def _template_68() -> np.ndarray:
    template = np.zeros((68, 3))
    for index, (x, y, z) in _HALF.items():
        template[index] = x, y, z
        template[IBUG_68.mirror[index]] = -x, y, z
    return template


_TEMPLATE_68 = _template_68()
# Kaggle's "left" is the person's own, on the right of the image.
_KAGGLE_AS_IBUG = [
    *(range(42, 48), range(36, 42), [42], [45], [39], [36]),  # eyes
    *([22], [26], [21], [17], [30], [54], [48], [51], [57]),  # brows, nose, mouth
]
_TEMPLATES = {
    IBUG_68.size: _TEMPLATE_68,
    KAGGLE_15.size: np.stack([_TEMPLATE_68[list(them)].mean(axis=0) for them in _KAGGLE_AS_IBUG]),
}

# Pairs of points, or of groups of points, of which the second lies to the right of the first or
# below it in every pose: the two ends of what is as deep on both sides, or of one part.
_CHORDS: dict[int, list[tuple[Iterable[int], Iterable[int]]]] = {
    IBUG_68.size: [
        *(([left], [16 - left]) for left in range(7)),  # outline, from side to side
        *(([0], [8]), ([16], [8]), ([2], [6]), ([14], [10])),  # and downwards
        *(([17], [26]), ([21], [22]), ([17], [21]), ([22], [26])),  # brows
        *(([36], [45]), ([39], [42]), ([36], [39]), ([42], [45])),  # eyes
        *(([37, 38], [40, 41]), ([43, 44], [46, 47])),  # lids
        *((range(17, 22), range(36, 42)), (range(22, 27), range(42, 48))),  # brow, eye
        *(([27], [30]), ([31], [35]), ([27], [33])),  # nose
        *(([48], [54]), (range(49, 54), range(55, 60)), ([60], [64])),  # lips
        *((range(36, 48), range(31, 36)), (range(31, 36), range(48, 60))),  # eyes, nose, mouth
        (range(48, 60), [8]),  # mouth, chin
    ],
    KAGGLE_15.size: [
        *(([1], [0]), ([5], [3]), ([4], [2]), ([5], [4]), ([2], [3])),  # eyes
        *(([9], [7]), ([8], [6]), ([9], [8]), ([6], [7])),  # brows
        *(([8, 9], [1]), ([6, 7], [0])),  # brow, eye
        *(([12], [11]), ([13], [14])),  # lips
        *(([0, 1], [10]), ([10], [13]), ([10], [14])),  # eyes, nose, mouth
    ],
}


def _differences(size: int) -> np.ndarray:
    """Matrix (chords, size) that takes points to the chords from group to group."""
    matrix = np.zeros((len(_CHORDS[size]), size))
    for row, (first, second) in zip(matrix, _CHORDS[size], strict=True):
        row[list(first)] = -1 / len(list(first))
        row[list(second)] = 1 / len(list(second))
    return matrix


_DIFFERENCES = {size: _differences(size) for size in _CHORDS}


def measure_landmarks(example: Example, shape: tuple[int, ...]) -> dict[str, float]:
    """Measure one example's landmarks.

    Folded: in some part the order of the points is reversed (a lower lip above the upper one, a
    jaw read backwards), as the face lies in the picture. Mirrored: the whole shape is, as when left
    and right have been exchanged in the names but not in the picture, or the other way round. Both
    are known for iBUG-68 and Kaggle-15, from four visible points on.

    Args:
        example: gives landmarks in pixels, and pose.
        shape: of its picture, (H, W) or (H, W, channels).

    Returns:
        `landmarks_outside` (share of the visible points outside the picture, 0-1),
        `landmarks_folded` and `landmarks_mirrored` (1 or 0), and `yaw` (degrees, positive towards
        the image's right): the source's, else estimated where most of 68 points are visible and
        well ordered, else NaN. All but `yaw` are 0 without landmarks.
    """
    points, visible = example.landmarks.astype(float), example.visible
    # Pixel centres are whole numbers, so the picture reaches half a pixel beyond the outer ones.
    edge = np.array([shape[1], shape[0]]) - 0.5
    outside = np.any((points < -0.5) | (points > edge), axis=1)[visible]
    folded, mirrored = _disorder(points, visible)
    if example.pose:
        yaw = example.pose.yaw
    elif folded or mirrored:
        yaw = float("nan")
    else:
        yaw = _yaw(points, visible)
    return {
        "landmarks_outside": float(outside.mean()) if len(outside) else 0.0,
        "landmarks_folded": float(folded),
        "landmarks_mirrored": float(mirrored),
        "yaw": yaw,
    }


def implausible(landmarks: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Score how unlike the others each shape is.

    A point distribution model (Cootes et al. 1995): shapes, freed of position, size and rotation,
    follow a normal distribution, whose covariance (shrunk, Ledoit and Wolf 2004) is learnt from
    the most usual of the other shapes. Where points are missing, a shape is compared with those
    that have its visible points, by these alone.

    Args:
        landmarks: float (n, N, 2), one scheme; what is not visible is not read.
        visible: bool (n, N).

    Returns:
        float (n,): Mahalanobis distance from the mean shape, as robust standard deviations above
        the median one. 0 where a shape has too few points, or there are too few like it to judge.
    """
    from threadpoolctl import threadpool_limits

    scores = np.zeros(len(landmarks))
    patterns, which = np.unique(visible, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        peers = np.all(visible[:, pattern], axis=1)
        if pattern.sum() >= FEWEST_POINTS and peers.sum() >= FEWEST_SHAPES:
            mine = which.ravel() == number
            # There may be nearly as many patterns as shapes: compare each with some others only.
            others = np.flatnonzero(peers & ~mine)
            spread = np.linspace(0, len(others) - 1, min(len(others), ENOUGH_SHAPES))
            peers = np.union1d(np.flatnonzero(mine), others[spread.astype(int)])
            mine = mine[peers]
            # Many small matrices: threads wait for each other rather than share the work.
            with threadpool_limits(1):
                distances = _distances(landmarks[peers][:, pattern])
            scores[peers[mine]] = _robust_z(distances)[mine]
    return scores


def _disorder(points: np.ndarray, visible: np.ndarray) -> tuple[bool, bool]:
    """Whether some part is folded, and whether the whole is mirrored."""
    template = _TEMPLATES.get(len(points))
    if template is None:
        return False, False
    # The outline is left out: where it is wrong, it would outweigh all else.
    inner = np.intersect1d(SCHEMES[len(points)].inner, np.flatnonzero(visible))
    if len(inner) < FEWEST_POINTS or np.ptp(points[inner], axis=0).max() < 1:
        return False, False
    # The orthogonal map of the template that fits best (Schönemann 1966).
    there = points[inner] - points[inner].mean(axis=0)
    here = template[inner, :2] - template[inner, :2].mean(axis=0)
    u, (along, across), v = np.linalg.svd(here.T @ there)
    chirality = np.linalg.det(u @ v)
    mirrored = chirality < 0 and across > VAGUE * along
    turn = u @ v if chirality > 0 or mirrored else u @ np.diag([1, -1]) @ v
    scale = np.sum((here @ turn) * there) / np.sum(here**2)
    long, short = np.linalg.svd(there, compute_uv=False)
    differences = _DIFFERENCES[len(points)]
    usual = differences @ template[:, :2]
    found = differences @ points @ turn.T
    backwards = np.sum(found * usual, axis=1) < -REVERSED * scale * np.sum(usual**2, axis=1)
    judged = ~np.any(differences[:, ~visible] != 0, axis=1)
    if short < NARROW * long:
        judged &= np.abs(usual[:, 1]) > np.abs(usual[:, 0])
    return bool(np.any(backwards & judged)), bool(mirrored)


def _yaw(points: np.ndarray, visible: np.ndarray) -> float:
    """Estimate yaw from 68 points by the affine camera that maps the template to them best."""
    if len(points) != len(_TEMPLATE_68) or visible.mean() < 0.5:
        return float("nan")
    template = np.column_stack([_TEMPLATE_68[visible], np.ones(visible.sum())])
    camera = np.linalg.lstsq(template, points[visible], rcond=None)[0][:3].T
    # The nearest rotation; its third row is the viewing direction.
    u, _, v = np.linalg.svd(camera, full_matrices=False)
    right, down = u @ v
    away = np.cross(right, down)
    # The nose points to -z of the face.
    return float(np.degrees(np.arctan2(-right[2], away[2])))


def _distances(shapes: np.ndarray) -> np.ndarray:
    """Mahalanobis distances (n,) of shapes (n, K, 2), each in a model of the others."""
    # Imported here: it takes seconds, which the workers that only measure need not spend.
    from sklearn.covariance import ledoit_wolf
    from sklearn.model_selection import KFold

    aligned = _aligned(shapes)
    rows = np.hstack([aligned.real, aligned.imag])
    distances = np.linalg.norm(rows - np.median(rows, axis=0), axis=1)
    # Concentrate (Rousseeuw and Van Driessen 1999): what is unusual must not shape the model.
    for _ in range(ROUNDS):
        usual = distances <= np.quantile(distances, USUAL)
        # Its own part in the model would make a shape look usual, the more so the fewer there are.
        for others, these in KFold(FOLDS).split(rows):
            usual_others = rows[others][usual[others]]
            mean = usual_others.mean(axis=0)
            covariance, _ = ledoit_wolf(usual_others - mean, assume_centered=True)
            covariance += PRECISION**2 * np.eye(len(covariance))
            away = (rows[these] - mean).T
            distances[these] = np.sqrt(np.sum(away * np.linalg.solve(covariance, away), axis=0))
    return distances


def _aligned(shapes: np.ndarray) -> np.ndarray:
    """Remove position, size and rotation from shapes (n, K, 2); points become complex (n, K)."""
    points = shapes[..., 0] + 1j * shapes[..., 1].astype(float)
    points = points - points.mean(axis=1, keepdims=True)
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), np.finfo(float).tiny)
    for _ in range(5):
        mean = np.median(points.real, axis=0) + 1j * np.median(points.imag, axis=0)
        turn = np.conj(points) @ mean
        points = points * np.exp(1j * np.angle(turn))[:, None]
    return points


def _robust_z(values: np.ndarray) -> np.ndarray:
    """Standard deviations above the median, by the median absolute deviation."""
    above = values - np.median(values)
    spread = 1.4826 * np.median(np.abs(above))
    return above / spread if spread > PRECISION else np.zeros_like(values)
