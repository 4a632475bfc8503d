"""Drawn faces with exact labels: a 3-D point model, moved by facial action units, then painted.

`render` tells the whole story. A person is a variation of one 68-point template in face units:
half the width of an average face is 1, x to the image's right, y down, z towards the viewer. An
expression is a set of action units (Ekman and Friesen 1978, Facial Action Coding System), each
of which moves some of the points; which units make which emotion follows Ekman and Friesen's
EMFACS, with generous scatter so that the classes overlap at their edges. The points are rotated,
scaled and shifted into the image (weak perspective), and every feature is drawn through its
projected points: landmarks are exact because they come first.

The same seed and index give the same face on the same version of OpenCV and NumPy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from models.schemes import EMOTIONS, IBUG_68

SIZE = 128
"""Height and width of an image in pixels."""

IMAGES_PER_IDENTITY = 5
"""Consecutive images that show the same person."""

Colour = tuple[float, float, float]

_OVERSAMPLING = 2
_SUBPIXEL_BITS = 4
_CUT_OFF = 0.04  # share of faces that hang over the image's edge
_MARGIN = 3.0  # pixels between a face and the edge otherwise
# Separate random streams for the same seed: face 3 must not be drawn by the dice of person 3.
_PERSON_STREAM, _IMAGE_STREAM, _EMOTION_STREAM = 1, 2, 3


@dataclass(frozen=True, eq=False)
class RenderedFace:
    """A picture with everything that is known of it.

    Attributes:
        image: uint8 (128, 128, 3), RGB.
        landmarks: float32 (68, 2) in iBUG-68 order, (x, y) in pixels, the centre of the top-left
            pixel at (0, 0), x to the right and y down. Not rounded; outside the image where the
            face is cut off.
        visible: bool (68,), whether the point lies inside the image. A point behind glasses, hair
            or a hand counts as visible: its place is still known.
        emotion: index into `models.schemes.EMOTIONS`.
        identity: which synthetic person this is; several images share one.
        yaw: degrees the head is turned, positive towards the image's right.
    """

    image: np.ndarray
    landmarks: np.ndarray
    visible: np.ndarray
    emotion: int
    identity: int
    yaw: float


def render(seed: int, index: int) -> RenderedFace:
    """Draw face number `index` of the endless sequence that `seed` names.

    A face depends on nothing but these two, so a longer dataset starts with the shorter one.
    Every run of seven indices that starts at a multiple of seven holds each emotion once.

    Args:
        seed: which sequence, 0 or more.
        index: which face of it, 0 or more.
    """
    identity = index // IMAGES_PER_IDENTITY
    person = _person(np.random.default_rng([seed, _PERSON_STREAM, identity]))
    rng = np.random.default_rng([seed, _IMAGE_STREAM, index])
    emotion = _emotion(seed, index)

    units = _action_units(EMOTIONS[emotion], rng)
    shape = _expressive_shape(person.shape, units)
    yaw = float(rng.uniform(-30, 30) * rng.uniform(0.3, 1.0))
    pitch = float(rng.uniform(-20, 20) * rng.uniform(0.3, 1.0))
    roll = float(rng.uniform(-20, 20) * rng.uniform(0.3, 1.0))
    view = _view(shape, yaw, pitch, roll, rng)
    landmarks = view.project(shape)

    image = _photograph(_paint(_Scene(person, shape, units.mean(axis=1), view, rng)), rng)
    return RenderedFace(
        image=image,
        landmarks=landmarks.astype(np.float32),
        visible=np.all((landmarks >= -0.5) & (landmarks <= SIZE - 0.5), axis=1),
        emotion=emotion,
        identity=identity,
        yaw=yaw,
    )


def _emotion(seed: int, index: int) -> int:
    block, place = divmod(index, len(EMOTIONS))
    order = np.random.default_rng([seed, _EMOTION_STREAM, block]).permutation(len(EMOTIONS))
    return int(order[place])


# --- The template ---------------------------------------------------------------------------

# The image-left half and the midline of an average neutral face; the rest is their mirror image.
# The outline lies further forward than real jaws do: it stands for the visible contour, which
# slides along the cheek as a head turns.
_HALF_TEMPLATE = {
    0: (-1.00, -0.15, -0.30),
    1: (-0.99, 0.10, -0.30),
    2: (-0.96, 0.34, -0.29),
    3: (-0.90, 0.58, -0.27),
    4: (-0.79, 0.81, -0.22),
    5: (-0.63, 1.01, -0.14),
    6: (-0.44, 1.16, -0.04),
    7: (-0.23, 1.26, 0.06),
    8: (0.00, 1.29, 0.10),
    17: (-0.79, -0.36, -0.08),
    18: (-0.66, -0.46, 0.06),
    19: (-0.49, -0.49, 0.15),
    20: (-0.33, -0.47, 0.20),
    21: (-0.18, -0.42, 0.23),
    27: (0.00, -0.20, 0.24),
    28: (0.00, -0.03, 0.33),
    29: (0.00, 0.13, 0.43),
    30: (0.00, 0.29, 0.52),
    31: (-0.20, 0.37, 0.27),
    32: (-0.10, 0.405, 0.33),
    33: (0.00, 0.425, 0.37),
    36: (-0.64, -0.15, -0.02),
    37: (-0.53, -0.225, 0.08),
    38: (-0.38, -0.225, 0.09),
    39: (-0.26, -0.13, 0.07),
    40: (-0.38, -0.095, 0.08),
    41: (-0.53, -0.095, 0.07),
    48: (-0.36, 0.75, 0.18),
    49: (-0.23, 0.685, 0.27),
    50: (-0.09, 0.65, 0.33),
    51: (0.00, 0.665, 0.34),
    57: (0.00, 0.89, 0.31),
    58: (-0.11, 0.88, 0.30),
    59: (-0.24, 0.83, 0.26),
    60: (-0.31, 0.75, 0.20),
    61: (-0.10, 0.745, 0.29),
    62: (0.00, 0.75, 0.30),
    66: (0.00, 0.755, 0.30),
    67: (-0.10, 0.752, 0.29),
}
_MIRROR = np.array(IBUG_68.mirror)
_JAW = slice(0, 17)
_BROWS = (slice(17, 22), slice(22, 27))
_EYES = (slice(36, 42), slice(42, 48))
_MOUTH = slice(48, 68)


def _symmetric(half: dict[int, tuple[float, float, float]]) -> np.ndarray:
    """Complete image-left values (x, y, z) to all 68 points by mirroring x."""
    points = np.zeros((68, 3))
    for index, value in half.items():
        points[_MIRROR[index]] = np.multiply(value, (-1, 1, 1))
        points[index] = value
    return points


_TEMPLATE = _symmetric(_HALF_TEMPLATE)


# --- Persons --------------------------------------------------------------------------------

_SKIN_TONES = np.array(
    [
        (250, 220, 200),
        (240, 200, 168),
        (224, 176, 136),
        (196, 142, 100),
        (158, 104, 68),
        (116, 74, 48),
        (80, 52, 36),
    ],
    float,
)
_HAIR_COLOURS = np.array(
    [(28, 22, 20), (60, 40, 28), (104, 66, 36), (150, 102, 52), (206, 168, 104), (150, 72, 34)],
    float,
)
_GREY_HAIR = np.array((196, 194, 190), float)
_IRISES = ((70, 44, 26), (96, 66, 34), (104, 108, 60), (78, 116, 148), (96, 104, 110))
_HAIR_STYLES = ("bald", "receding", "short", "fringe", "parted", "long", "curly", "cap")
_BEARDS = ("none", "stubble", "moustache", "goatee", "full")


@dataclass(frozen=True, eq=False)
class _Person:
    """What stays the same in all images of one person; colours are RGB, 0–255."""

    shape: np.ndarray  # (68, 3), neutral, face units
    forehead: float  # height of the skull above the temples, face units
    skin: np.ndarray
    lips: np.ndarray
    hair: np.ndarray
    brows: np.ndarray
    iris: np.ndarray
    hair_style: str
    hair_volume: float
    brow_thickness: float  # face units
    beard: str
    age: float  # 0–1, how deep wrinkles are at rest
    lashes: float  # 0–1
    glasses: bool
    ear_size: float


def _person(rng: np.random.Generator) -> _Person:
    tone = rng.uniform(0, len(_SKIN_TONES) - 1)
    skin = _interpolate(_SKIN_TONES, tone) + rng.normal(0, 5, 3)
    age = rng.beta(1.3, 2.2)
    # Fair hair on dark skin exists, but is rare.
    hair = _HAIR_COLOURS[rng.integers(0, len(_HAIR_COLOURS) if tone < 3 else 3)]
    hair = hair + rng.normal(0, 8, 3)
    if rng.random() < age * 0.6:
        hair = _mix(hair, _GREY_HAIR, rng.uniform(0.4, 1.0))
    bearded = rng.random() < 0.35
    return _Person(
        shape=_neutral_shape(rng),
        forehead=rng.normal(1.18, 0.07),
        skin=skin,
        lips=_mix(skin, np.array((176, 52, 62)), rng.uniform(0.30, 0.62)) * rng.uniform(0.8, 0.98),
        hair=hair,
        brows=_mix(hair, np.array((24, 18, 16)), rng.uniform(0.2, 0.6)),
        iris=np.array(_IRISES[rng.integers(0, len(_IRISES) if tone < 3 else 2)], float),
        hair_style=str(rng.choice(_HAIR_STYLES, p=(0.1, 0.1, 0.2, 0.14, 0.14, 0.16, 0.1, 0.06))),
        hair_volume=rng.uniform(0.05, 0.16),
        brow_thickness=rng.uniform(0.045, 0.095),
        beard=str(rng.choice(_BEARDS[1:])) if bearded else "none",
        age=age,
        lashes=0.0 if bearded else rng.uniform(0, 1),
        glasses=bool(rng.random() < 0.2),
        ear_size=rng.uniform(0.85, 1.25),
    )


def _neutral_shape(rng: np.random.Generator) -> np.ndarray:
    """Vary the template in the ways in which faces differ; (68, 3), face units."""
    shape = _TEMPLATE.copy()
    side = np.sign(shape[:, 0])

    jaw = shape[_JAW]
    depth = np.clip(jaw[:, 1] / 1.29, 0, 1)
    jaw[:, 0] *= rng.normal(1.0, 0.05) + rng.normal(0, 0.09) * np.sin(np.pi * depth)
    jaw[:, 1] += rng.normal(0, 0.08) * depth**2

    height, tilt, arch = rng.normal(0, 0.035), rng.normal(0, 0.03), rng.normal(0, 0.02)
    for brow in _BROWS:
        shape[brow, 1] += height + tilt * np.linspace(-1, 1, 5)[:: -1 if brow.start == 17 else 1]
        shape[brow, 1] -= arch * np.sin(np.linspace(0, np.pi, 5))

    eye_size, eye_opening = rng.normal(1.0, 0.08), rng.normal(1.0, 0.14)
    eye_shift, eye_slant = rng.normal(0, 0.03), rng.normal(0, 0.06)
    for eye in _EYES:
        centre = shape[eye].mean(axis=0)
        offset = shape[eye] - centre
        outward = offset[:, 0] * np.sign(centre[0])
        offset[:, 1] = offset[:, 1] * eye_opening - eye_slant * outward
        shape[eye] = centre + offset * eye_size
    shape[36:48, 0] += eye_shift * side[36:48]

    shape[27:36, 1] = -0.2 + (shape[27:36, 1] + 0.2) * rng.normal(1.0, 0.07)
    shape[27:36, 2] = 0.24 + (shape[27:36, 2] - 0.24) * rng.normal(1.0, 0.15)
    shape[31:36, 0] *= rng.normal(1.0, 0.13)

    mouth = shape[_MOUTH]
    fullness = np.clip(rng.normal(1.0, 0.25), 0.45, 1.6)
    mouth[:, 0] *= rng.normal(1.0, 0.09)
    mouth[:, 1] = 0.75 + (mouth[:, 1] - 0.75) * fullness + rng.normal(0, 0.035)
    mouth[[0, 12, 6, 16], 1] += rng.normal(0, 0.015)  # resting corners differ: a confusion

    uneven = rng.normal(0, 0.007, (68, 3)) + _mirrored(rng.normal(0, 0.007, (68, 3)))
    return shape + uneven


def _mirrored(points: np.ndarray) -> np.ndarray:
    """Make offsets symmetric: the right half becomes the mirror image of the left."""
    result = points.copy()
    result[_MIRROR] = points * (-1, 1, 1)
    return (points + result) / 2


# --- Expressions ----------------------------------------------------------------------------


# How far full activation moves each point of the image-left half, (x, y) in face units.
_UNIT_MOVES: dict[str, dict[tuple[int, ...], tuple[float, float]]] = {
    "inner_brow_raise": {(21,): (0, -0.17), (20,): (0, -0.12), (19,): (0, -0.05)},
    "outer_brow_raise": {(17,): (0, -0.10), (18, 19): (0, -0.15), (20,): (0, -0.07)},
    "brow_lower": {(21,): (0.06, 0.15), (20,): (0.04, 0.13), (19,): (0.02, 0.08), (18,): (0, 0.03)},
    "lid_raise": {(37, 38): (0, -0.065), (40, 41): (0, 0.012)},
    "lid_tighten": {(40, 41): (0, -0.03), (37, 38): (0, 0.025)},
    "lid_droop": {(37, 38): (0, 0.05), (36,): (0, 0.015)},
    "cheek_raise": {(40, 41): (0, -0.045), (37, 38): (0, 0.015)},
    "nose_wrinkle": {
        (31,): (-0.025, -0.07),
        (30, 32, 33): (0, -0.05),
        (29,): (0, -0.025),
        (21,): (0.03, 0.07),
        (20,): (0.01, 0.06),
        (40, 41): (0, -0.02),
        (49, 50, 51): (0, -0.03),
    },
    "upper_lip_raise": {
        (49,): (-0.02, -0.09),
        (50, 51): (0, -0.11),
        (61, 62): (0, -0.085),
        (48, 60): (0, 0.01),
    },
    "corner_pull": {
        (48,): (-0.14, -0.13),
        (60,): (-0.13, -0.12),
        (49, 59): (-0.07, -0.05),
        (50, 58, 61, 67): (-0.025, 0),
        (57, 66): (0, 0.015),
        (4, 5): (-0.02, 0),
    },
    "corner_depress": {(48,): (0.01, 0.13), (60,): (0.01, 0.12), (49, 59): (0, 0.05)},
    "chin_raise": {
        (57, 58): (0, -0.06),
        (59, 66, 67): (0, -0.04),
        (50, 51, 61, 62): (0, -0.035),
        (7, 8): (0, -0.03),
    },
    "lip_stretch": {(48, 60): (-0.12, 0.05), (49, 59): (-0.06, 0.02)},
    "lip_press": {(49, 50, 51): (0.01, 0.05), (57, 58, 59): (0.01, -0.06), (48, 60): (0.03, 0)},
    "lips_part": {
        (49, 50, 51): (0, -0.015),
        (61, 62): (0, -0.035),
        (66, 67): (0, 0.075),
        (57, 58, 59): (0, 0.06),
    },
    "jaw_drop": {
        (66, 67, 57, 58): (0, 0.32),
        (59,): (0.02, 0.22),
        (48, 60): (0.06, 0.13),
        (49,): (0.03, 0.02),
        (61, 62): (0, -0.01),
        (7, 8): (0, 0.25),
        (6,): (0, 0.21),
        (5,): (0.01, 0.14),
        (4,): (0.01, 0.07),
    },
}
_UNITS = tuple(_UNIT_MOVES)
_MOVES = np.stack(
    [
        _symmetric({i: (*move, 0.0) for group, move in moves.items() for i in group})
        for moves in _UNIT_MOVES.values()
    ]
)

# Each emotion shows itself in one of these ways.
_EXPRESSIONS: dict[str, tuple[dict[str, float], ...]] = {
    "angry": (
        {"brow_lower": 1.0, "lid_raise": 0.3, "lid_tighten": 0.7, "lip_press": 0.9},
        {
            "brow_lower": 1.0,
            "lid_tighten": 0.6,
            "lips_part": 0.8,
            "lip_stretch": 0.4,
            "jaw_drop": 0.2,
        },
    ),
    "disgust": (
        {
            "nose_wrinkle": 1.0,
            "upper_lip_raise": 0.9,
            "lid_tighten": 0.7,
            "brow_lower": 0.3,
            "corner_depress": 0.4,
            "chin_raise": 0.4,
        },
        {
            "nose_wrinkle": 1.0,
            "upper_lip_raise": 1.0,
            "cheek_raise": 0.5,
            "lips_part": 0.5,
            "corner_depress": 0.3,
        },
    ),
    "fear": (
        {
            "inner_brow_raise": 1.0,
            "outer_brow_raise": 0.4,
            "brow_lower": 0.4,
            "lid_raise": 0.9,
            "lip_stretch": 1.0,
            "lips_part": 0.7,
        },
        {
            "inner_brow_raise": 0.9,
            "outer_brow_raise": 0.3,
            "lid_raise": 1.0,
            "lip_stretch": 0.8,
            "jaw_drop": 0.4,
        },
    ),
    "happy": (
        {"corner_pull": 1.0, "cheek_raise": 0.8},
        {"corner_pull": 1.0, "cheek_raise": 0.9, "lips_part": 1.0, "upper_lip_raise": 0.2},
        {"corner_pull": 0.9, "cheek_raise": 0.6, "lips_part": 0.7, "jaw_drop": 0.5},
    ),
    "neutral": ({}, {"lips_part": 0.3}),
    "sad": (
        {
            "inner_brow_raise": 0.9,
            "brow_lower": 0.3,
            "corner_depress": 0.9,
            "chin_raise": 0.5,
            "lid_droop": 0.5,
        },
        {"inner_brow_raise": 0.7, "corner_depress": 1.0, "lid_droop": 0.9},
    ),
    "surprise": (
        {
            "inner_brow_raise": 0.9,
            "outer_brow_raise": 1.0,
            "lid_raise": 0.9,
            "jaw_drop": 1.0,
            "lips_part": 0.4,
        },
        {"inner_brow_raise": 1.0, "outer_brow_raise": 1.0, "lid_raise": 0.7, "jaw_drop": 0.5},
    ),
}


def _action_units(emotion: str, rng: np.random.Generator) -> np.ndarray:
    """Draw activations for one face, (units, 2), image-left and image-right, 0 to about 1.3."""
    ways = _EXPRESSIONS[emotion]
    way = ways[rng.integers(len(ways))]
    intensity = rng.uniform(0.65, 1.15)
    base = np.array([way.get(unit, 0.0) for unit in _UNITS])
    base *= intensity * rng.uniform(0.6, 1.3, len(_UNITS))
    # Faces never rest entirely, and people talk whatever they feel.
    base += np.clip(rng.normal(-0.05, 0.15, len(_UNITS)), 0, None)
    if rng.random() < 0.1:
        base[_UNITS.index("lips_part")] += rng.uniform(0.2, 0.8)
        base[_UNITS.index("jaw_drop")] += rng.uniform(0.0, 0.35)
    sides = base[:, None] * rng.normal(1.0, 0.12, (len(_UNITS), 2)) * rng.normal(1.0, 0.07, 2)
    return np.clip(sides, 0, 1.4)


def _expressive_shape(neutral: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Move a neutral face, (68, 3), by its activations, (units, 2)."""
    weight = np.clip(0.5 + neutral[:, 0] / 0.3, 0, 1)  # image-right share of each point
    activation = units[:, :1] * (1 - weight) + units[:, 1:] * weight
    shape = neutral + np.einsum("up,upc->pc", activation, _MOVES)

    # Flesh does not pass through flesh: lids and lips meet at most. Pressed lips are kept apart
    # by moving the outer edge alone, so that the inner edges stay where they met.
    for upper, lower, gap, upper_share in (
        ((37, 38, 43, 44), (41, 40, 47, 46), 0.035, 0.5),
        ((61, 62, 63), (67, 66, 65), 0.006, 0.5),
        ((50, 51, 52), (61, 62, 63), 0.025, 1.0),
        ((67, 66, 65), (58, 57, 56), 0.035, 0.0),
        ((49, 53), (60, 64), 0.015, 1.0),
    ):
        above, below = shape[list(upper), 1], shape[list(lower), 1]
        overlap = np.clip(gap - (below - above), 0, None)
        shape[list(upper), 1] -= overlap * upper_share
        shape[list(lower), 1] += overlap * (1 - upper_share)
    return shape


# --- The camera -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _View:
    """A scaled orthographic camera from face units to image pixels."""

    rotation: np.ndarray  # (3, 3)
    scale: float  # pixels per face unit
    offset: np.ndarray  # (2,), pixels

    def project(self, points: np.ndarray) -> np.ndarray:
        """Map (..., 3) face units to (..., 2) pixels."""
        return points @ self.rotation[:2].T * self.scale + self.offset


def _view(
    shape: np.ndarray, yaw: float, pitch: float, roll: float, rng: np.random.Generator
) -> _View:
    """Place a face of 45–75 % of the frame somewhere in it, now and then over the edge."""
    rotation = _rotation(yaw, pitch, roll)
    flat = shape @ rotation[:2].T
    low, high = flat.min(axis=0), flat.max(axis=0)
    scale = rng.uniform(0.45, 0.75) * SIZE / (high - low).max()
    first = _MARGIN - low * scale
    last = SIZE - 1 - _MARGIN - high * scale
    offset = first + (last - first) * rng.beta(3, 3, 2)
    if rng.random() < _CUT_OFF:
        axis, beyond = rng.integers(2), rng.uniform(0.05, 0.25) * (high - low).max() * scale
        offset[axis] = first[axis] - beyond if rng.random() < 0.5 else last[axis] + beyond
    return _View(rotation, float(scale), offset)


def _rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Turn to the image's right, then nod down, then tilt clockwise, in degrees; (3, 3)."""
    (a, b, c), (d, e, f) = (fn(np.radians([yaw, pitch, roll])) for fn in (np.cos, np.sin))
    turn = np.array([[a, 0, d], [0, 1, 0], [-d, 0, a]])
    nod = np.array([[1, 0, 0], [0, b, e], [0, -e, b]])
    tilt = np.array([[c, -f, 0], [f, c, 0], [0, 0, 1]])
    return tilt @ nod @ turn


# --- Painting -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Scene:
    """Everything a brush needs."""

    person: _Person
    shape: np.ndarray  # (68, 3), face units
    units: np.ndarray  # (units,), mean activation of both sides
    view: _View
    rng: np.random.Generator

    def at(self, index: int | Sequence[int], x: float = 0, y: float = 0) -> np.ndarray:
        """Pixels of landmarks moved by (x, y) face units before projection."""
        return self.view.project(self.shape[index] + np.array((x, y, 0)))

    def place(self, points: Sequence[tuple[float, float, float]] | np.ndarray) -> np.ndarray:
        """Pixels of further points given in face units."""
        return self.view.project(np.asarray(points, float))

    def unit(self, name: str) -> float:
        """Mean activation of an action unit."""
        return float(self.units[_UNITS.index(name)])


def _paint(scene: _Scene) -> np.ndarray:
    """Paint back to front; RGB uint8, `_OVERSAMPLING` times the size of the image."""
    canvas = _background(scene.rng)
    _paint_back_hair(canvas, scene)
    _paint_body(canvas, scene)
    _paint_ears(canvas, scene)
    _fill(canvas, _face_outline(scene), scene.person.skin)
    _paint_beard(canvas, scene)
    _paint_nose(canvas, scene)
    _paint_mouth(canvas, scene)
    for eye in _EYES:
        _paint_eye(canvas, scene, eye)
    for brow in _BROWS:
        _paint_brow(canvas, scene, brow)
    canvas = _lit(canvas, scene)
    _paint_front_hair(canvas, scene)
    _paint_glasses(canvas, scene)
    _paint_occluder(canvas, scene)
    return canvas


def _background(rng: np.random.Generator) -> np.ndarray:
    side = SIZE * _OVERSAMPLING
    cells = int(rng.choice((2, 3, 6, 16)))
    spread = rng.uniform(5, 40)
    colours = _muted(rng) + rng.normal(0, spread, (cells, cells, 1))
    colours += rng.normal(0, spread / 4, (cells, cells, 3))
    smooth = cv2.INTER_LINEAR if rng.random() < 0.8 else cv2.INTER_NEAREST
    small = np.clip(colours, 0, 255).astype(np.uint8)
    canvas = cv2.resize(small, (side, side), interpolation=smooth)
    for _ in range(rng.integers(0, 5)):
        centre = rng.uniform(-10, SIZE + 10, 2)
        radius = rng.uniform(5, 40, 2)
        _fill(canvas, _ellipse(centre, radius[0], radius[1]), _muted(rng))
    return cv2.blur(canvas, (9, 9)) if rng.random() < 0.5 else canvas


def _skull(scene: _Scene, grow: float = 0.0, depth: float = -0.3, start: float = 0.0) -> np.ndarray:
    """The head above the temples, image-left to image-right, (n, 3) face units."""
    left, right = scene.shape[0], scene.shape[16]
    angle = np.linspace(start, np.pi - start, 11)
    half = (right[0] - left[0]) / 2 * (1 + grow)
    x = (left[0] + right[0]) / 2 - half * np.cos(angle)
    y = (left[1] + right[1]) / 2 - (scene.person.forehead + grow * 1.2) * _signed_power(
        np.sin(angle), 0.85
    )
    return np.stack([x, y, np.full_like(x, depth)], axis=1)


def _face_outline(scene: _Scene) -> np.ndarray:
    jaw = scene.at(range(17))
    skull = scene.place(_skull(scene)[1:-1])[::-1]
    return _curve(np.concatenate([jaw, skull]), closed=True)


def _paint_back_hair(canvas: np.ndarray, scene: _Scene) -> None:
    person = scene.person
    if person.hair_style == "long":
        length = scene.rng.uniform(0.9, 1.9)
        top = _skull(scene, 0.08 + person.hair_volume, depth=-0.6)
        sides = [(1.25, 0.5, -0.7), (1.2, length, -0.7), (-1.2, length, -0.7), (-1.25, 0.5, -0.7)]
        outline = np.concatenate([scene.place(top), scene.place(sides)])
        _fill(canvas, _curve(outline, closed=True), person.hair * 0.8)
    elif person.hair_style == "curly":
        outline = scene.place(_skull(scene, 0.22 + person.hair_volume, depth=-0.5, start=-0.35))
        for centre in _curve(outline, steps=3):
            radius = scene.view.scale * scene.rng.uniform(0.14, 0.24)
            _fill(canvas, _ellipse(centre, radius, radius), person.hair * 0.8)
        _fill(canvas, outline, person.hair * 0.85)


def _paint_body(canvas: np.ndarray, scene: _Scene) -> None:
    scale, rng = scene.view.scale, scene.rng
    # A body leans with its head, but less.
    x, y = scene.place([(0, 0.75, -0.6)])[0]
    foot = x + 0.35 * (x - scene.place([(0, -0.9, -0.6)])[0][0])
    half, bottom = rng.uniform(0.45, 0.58) * scale, SIZE + 30
    shoulder = max(y, scene.at(8)[1]) + rng.uniform(0.15, 0.4) * scale
    _fill(
        canvas,
        np.array([(x - half, y), (x + half, y), (foot + half, bottom), (foot - half, bottom)]),
        scene.person.skin * 0.72,
    )
    clothes = _muted(rng)
    wide = rng.uniform(1.5, 2.1) * scale
    outline = np.array(
        [
            (foot - wide * 1.3, bottom),
            (foot - wide, shoulder + 0.45 * scale),
            (foot - half * 1.15, shoulder),
            (foot, shoulder + rng.uniform(0.1, 0.5) * scale),
            (foot + half * 1.15, shoulder),
            (foot + wide, shoulder + 0.45 * scale),
            (foot + wide * 1.3, bottom),
        ]
    )
    _fill(canvas, _curve(outline), clothes)


def _paint_ears(canvas: np.ndarray, scene: _Scene) -> None:
    size = scene.person.ear_size
    angle = np.linspace(0, 2 * np.pi, 10, endpoint=False)
    for temple, side in ((scene.shape[0], -1), (scene.shape[16], 1)):
        ear = np.stack(
            [
                temple[0] + side * (0.04 + 0.13 * size * np.cos(angle)),
                temple[1] + 0.16 + 0.25 * size * np.sin(angle) - 0.04 * np.cos(angle),
                np.full(10, -0.42),
            ],
            axis=1,
        )
        outer = scene.place(ear)
        _fill(canvas, _curve(outer, closed=True), scene.person.skin * 0.9)
        inner = outer.mean(axis=0) + (outer - outer.mean(axis=0)) * 0.55
        _stroke(canvas, _curve(inner), scene.person.skin * 0.68, 0.03 * scene.view.scale)


def _paint_beard(canvas: np.ndarray, scene: _Scene) -> None:
    beard, rng = scene.person.beard, scene.rng
    if beard == "none":
        return
    density = {"stubble": 0.16, "moustache": 0.8, "goatee": 0.8, "full": 0.85}[beard]
    colour = _mix(scene.person.skin, scene.person.hair, density)
    if beard in ("stubble", "full"):
        cheek = [
            (-0.97, -0.05, -0.28),
            (-0.88, 0.34, -0.18),
            (-0.68, 0.68, 0.0),
            (-0.44, 0.68, 0.16),
        ]
        cheek += [(-0.22, 0.54, 0.26), (0.0, 0.5, 0.32)]
        line = np.array(cheek + [(-x, y, z) for x, y, z in cheek[-2::-1]])
        line[:, 0] *= scene.shape[16, 0]
        outline = np.concatenate([_curve(scene.at(range(17))), _curve(scene.place(line))[::-1]])
        _fill(canvas, outline, colour)
        if beard == "full":
            dots = outline.min(axis=0) + rng.random((50, 2)) * np.ptp(outline, axis=0)
            inside = [cv2.pointPolygonTest(outline.astype(np.float32), p, False) > 0 for p in dots]
            _strands(canvas, dots[inside], scene, colour)
    if beard in ("moustache", "goatee"):
        upper = [scene.at(48, -0.04, 0.02), scene.at(31, -0.02, 0.13), scene.at(33, 0, 0.09)]
        upper += [scene.at(35, 0.02, 0.13), scene.at(54, 0.04, 0.02)]
        lower = scene.at([54, 53, 52, 51, 50, 49, 48], 0, -0.01)
        _fill(canvas, np.concatenate([_curve(np.array(upper)), lower]), colour)
    if beard == "goatee":
        chin = [scene.at(48, -0.05, 0.04), *scene.at([6, 7, 8, 9, 10]), scene.at(54, 0.05, 0.04)]
        _fill(canvas, _curve(np.array(chin), closed=True), colour)


def _paint_nose(canvas: np.ndarray, scene: _Scene) -> None:
    scale, skin = scene.view.scale, scene.person.skin
    side = scene.at(range(27, 31)) * 0.6 + scene.at([27, 28, 31, 31]) * 0.4
    if scene.view.rotation[0, 2] > 0:  # the far side of the bridge is the one with an edge
        side = scene.at(range(27, 31)) * 0.6 + scene.at([27, 28, 35, 35]) * 0.4
    _stroke(canvas, _curve(side), skin * 0.86, 0.035 * scale)
    for wing, outward in ((31, -1), (35, 1)):
        alar = np.array(
            [
                scene.at(wing, outward * 0.01, -0.13),
                scene.at(wing, outward * 0.045, -0.06),
                scene.at(wing),
            ]
        )
        _stroke(canvas, _curve(alar), skin * 0.66, 0.03 * scale)
    _stroke(canvas, _curve(scene.at(range(31, 36))), skin * 0.62, 0.035 * scale)
    along = scene.at(35) - scene.at(31)
    tilt = float(np.arctan2(along[1], along[0]))
    for nostril in (scene.at(32, -0.015, -0.015), scene.at(34, 0.015, -0.015)):
        width = max(0.24 * float(np.hypot(*along)) / 2, 0.6)
        _fill(canvas, _ellipse(nostril, width, 0.028 * scale, tilt), skin * 0.3)


def _paint_mouth(canvas: np.ndarray, scene: _Scene) -> None:
    person, scale = scene.person, scene.view.scale
    lower_inner = _curve(scene.at([60, 67, 66, 65, 64]))
    upper_inner = _curve(scene.at([60, 61, 62, 63, 64]))
    upper_outer = _curve(scene.at([48, 49, 50, 51, 52, 53, 54]))
    lower_outer = _curve(scene.at([48, 59, 58, 57, 56, 55, 54]))
    _fill(canvas, np.concatenate([upper_outer, lower_outer[::-1]]), person.lips)
    _fill(canvas, np.concatenate([upper_outer, lower_inner[::-1]]), person.lips * 0.88)
    _fill(canvas, np.concatenate([upper_inner, lower_inner[::-1]]), np.array((58, 18, 20)))
    opening = float(np.abs(lower_inner - upper_inner).max())
    if opening > 0.085 * scale:
        share = min(0.62, 0.13 * scale / opening)
        edge = upper_inner + (lower_inner - upper_inner) * share
        inside = slice(2, -2)
        teeth = np.concatenate([upper_inner[inside], edge[inside][::-1]])
        _fill(canvas, teeth, np.array((232, 226, 212)))
        if opening > 0.22 * scale:
            tongue = upper_inner + (lower_inner - upper_inner) * 0.72
            middle = slice(5, -5)
            outline = np.concatenate([tongue[middle], lower_inner[middle][::-1]])
            _fill(canvas, outline, np.array((168, 74, 76)))
    else:
        _stroke(canvas, (upper_inner + lower_inner) / 2, person.lips * 0.45, 0.025 * scale)
    for corner in (48, 54):
        _fill(canvas, _ellipse(scene.at(corner), 0.022 * scale, 0.022 * scale), person.lips * 0.5)


def _paint_eye(canvas: np.ndarray, scene: _Scene, eye: slice) -> None:
    person, scale, rng = scene.person, scene.view.scale, scene.rng
    points = scene.at(range(eye.start, eye.stop))
    upper = _curve(points[:4])
    lower = _curve(points[[0, 5, 4, 3]])
    outline = np.concatenate([upper, lower[::-1]])
    width = float(np.hypot(*(points[3] - points[0])))

    # What shows of the eyeball is painted apart and let through the opening of the lids.
    low = np.floor(_to_canvas(outline.min(axis=0))).astype(int) - 2
    high = np.ceil(_to_canvas(outline.max(axis=0))).astype(int) + 3
    ball = np.full((high[1] - low[1], high[0] - low[0], 3), (228, 224, 220), np.uint8)
    opening = np.zeros(ball.shape[:2], np.uint8)
    origin = low / _OVERSAMPLING
    gaze = np.array((rng.normal(0, 0.035), 0.0)) * width
    iris = points.mean(axis=0) + gaze + scene.view.rotation[:2, 2] * 0.04 * scale - origin
    for radius, colour in (
        (0.225, person.iris * 0.5),
        (0.19, person.iris),
        (0.105, np.array((10, 8, 8))),
    ):
        _fill(ball, _ellipse(iris, radius * width, radius * width), colour)
    _fill(ball, _ellipse(iris - 0.07 * width, 0.035 * width, 0.035 * width), np.full(3, 250))
    _stroke(ball, upper - origin, np.array((150, 140, 136)), 0.05 * scale)  # the lid's shadow
    _fill(opening, outline - origin, np.array((255,)))
    _let_through(canvas, ball, opening, low)

    crease = upper + (scene.at(19) - scene.at(19, 0, 0.055 + 0.02 * person.lashes))
    _stroke(canvas, crease[3:-2], person.skin * 0.72, 0.022 * scale)
    lash = person.skin * (0.42 - 0.25 * person.lashes)
    _stroke(canvas, upper, lash, (0.035 + 0.03 * person.lashes) * scale)
    _stroke(canvas, lower, person.skin * 0.66, 0.02 * scale)


def _paint_brow(canvas: np.ndarray, scene: _Scene, brow: slice) -> None:
    line = _curve(scene.at(range(brow.start, brow.stop)))
    inner_first = line[::-1] if brow.start == 17 else line
    taper = np.interp(np.linspace(0, 1, len(line)), (0, 0.15, 0.5, 1), (0.7, 1.0, 0.95, 0.35))
    half = scene.person.brow_thickness * scene.view.scale * taper[:, None] * 0.75
    normal = _normals(inner_first)
    outline = np.concatenate([inner_first + normal * half, (inner_first - normal * half)[::-1]])
    _fill(canvas, outline, _mix(scene.person.skin, scene.person.brows, 0.85))


def _lit(canvas: np.ndarray, scene: _Scene) -> np.ndarray:
    """Multiply in the light: an ellipsoid under a lamp, soft hollows and bulges, fine wrinkles."""
    rng, view = scene.rng, scene.view
    lamp = np.array((rng.normal(0, 0.5), rng.normal(-0.35, 0.25), 1.0))
    lamp /= np.linalg.norm(lamp)
    contrast = rng.uniform(0.2, 0.8)

    half = SIZE // 2
    pixel = np.arange(half) * 2 + 0.5
    centre = scene.place([(0, 0.15, 0)])[0]
    u = ((pixel - centre[0]) / (1.3 * view.scale))[None, :]
    v = ((pixel - centre[1]) / (1.7 * view.scale))[:, None]
    square = u * u + v * v
    depth = np.sqrt(1 - 0.7 * np.minimum(square, 1.0))  # flatter than a ball towards the rim
    length = np.sqrt(np.maximum(square, 1.0))
    facing = (u * lamp[0] + v * lamp[1]) / length + depth * lamp[2]
    facing = 0.6 + (facing - 0.6) / length**3  # the room behind is lit evenly
    light = (1 - contrast + contrast * 1.15 * facing).astype(np.float32)

    # Eight bits, 128 for "as painted", keep the large arrays small and the multiplications fast.
    relief = _relief(scene, lamp[0]).astype(np.float32) / 2 - 64
    shade = cv2.convertScaleAbs(cv2.resize(light * 128, (SIZE, SIZE)) + relief)
    shade = cv2.resize(shade, canvas.shape[:2])
    shade = cv2.multiply(shade, _wrinkles(scene), scale=1 / 128)
    return np.asarray(cv2.multiply(canvas, cv2.merge([shade] * 3), scale=1 / 128))


def _relief(scene: _Scene, lamp_x: float) -> np.ndarray:
    """Hollows (below 128) and bulges (above) of a face, uint8 (SIZE, SIZE)."""
    relief = np.full((SIZE, SIZE), 128, np.uint8)
    scale = scene.view.scale

    def spot(centre: np.ndarray, width: float, height: float, level: float) -> None:
        outline = _ellipse(centre, width * scale, height * scale)
        _fill(relief, outline, np.array((level,)), oversampling=1)

    shadow_wing, lit_wing = (35, 31) if lamp_x < 0 else (31, 35)
    for eye, brow in zip(_EYES, _BROWS, strict=True):
        socket = scene.at(range(eye.start, eye.stop)).mean(axis=0)
        spot(_mix(socket, scene.at(brow.start + 2), 0.33), 0.3, 0.15, 108)
    cheek = 150 + 30 * scene.unit("cheek_raise")
    for corner, outward in ((48, -1), (54, 1)):
        x, y, z = scene.shape[corner] * 0.4 + scene.shape[36 if outward < 0 else 45] * 0.6
        spot(scene.place([(x * 1.05, y + 0.1, z)])[0], 0.2, 0.16, cheek)
    spot(scene.place([(0, -0.75, 0.1)])[0], 0.42, 0.2, 146)
    _fill(relief, scene.at([27, 28, 30, 33, shadow_wing]), np.array((92.0,)), oversampling=1)
    _fill(relief, scene.at([27, 28, 30, lit_wing]), np.array((140.0,)), oversampling=1)
    spot(scene.at(33, 0, 0.07), 0.2, 0.05, 88)
    spot(scene.at(57, 0, 0.1), 0.2, 0.05, 92)
    spot(scene.at(8, 0, -0.14), 0.16, 0.08, 146)
    relief = cv2.GaussianBlur(relief, (0, 0), 0.07 * scale)
    spot(scene.at(30, 0, -0.02), 0.07, 0.06, 168)
    return cv2.blur(relief, (5, 5))


def _wrinkles(scene: _Scene) -> np.ndarray:
    """Lines that expressions and years draw, below 128, uint8 of the canvas's size."""
    side = SIZE * _OVERSAMPLING
    lines = np.full((side, side), 128, np.uint8)
    scale, age = scene.view.scale, scene.person.age

    def crease(points: Sequence[np.ndarray], strength: float, width: float = 0.03) -> None:
        if strength > 0.08:
            level = 128 - 48 * min(strength, 1.0)
            _stroke(lines, _curve(np.array(points)), np.array((level,)), width * scale)

    smile = scene.unit("corner_pull")
    fold = 0.45 * age + 0.7 * smile + 0.6 * scene.unit("nose_wrinkle")
    frown = 0.25 * age + 0.8 * scene.unit("brow_lower") + 0.3 * scene.unit("nose_wrinkle")
    rise = 0.35 * age + 0.35 * scene.unit("inner_brow_raise") + 0.4 * scene.unit("outer_brow_raise")
    wrinkle = 0.9 * scene.unit("nose_wrinkle") - 0.1
    squint = 0.4 * age + 0.35 * scene.unit("cheek_raise") - 0.2
    droop = 0.2 * age + 0.5 * scene.unit("corner_depress")
    for wing, corner, brow, eye, out in ((31, 48, 21, 36, -1), (35, 54, 22, 45, 1)):
        crease(
            [
                scene.at(wing, out * 0.07, -0.06),
                (scene.at(wing, out * 0.16, 0.1) + scene.at(corner, out * 0.08, -0.12)) / 2,
                scene.at(corner, out * 0.11, 0.04),
            ],
            fold,
        )
        crease([scene.at(brow, -out * 0.1, 0.1), scene.at(brow, -out * 0.09, -0.1)], frown)
        crease([scene.at(corner, out * 0.02, 0.05), scene.at(corner, out * 0.04, 0.17)], droop)
        for y in (-0.03, 0.05):
            crease(
                [scene.at(eye, out * 0.06, y * 0.4), scene.at(eye, out * 0.16, y)], squint, 0.022
            )
        for y in (-0.08, 0.0):
            crease([scene.at(28, out * 0.04, y), scene.at(28, out * 0.11, y - 0.05)], wrinkle)
    for height in (-0.16, -0.27, -0.38):
        crease(
            [
                scene.at(19, -0.02, height),
                (scene.at(21, 0, height) + scene.at(22, 0, height)) / 2,
                scene.at(24, 0.02, height),
            ],
            rise - 0.15,
        )
    return cv2.blur(lines, (3, 3))


def _paint_front_hair(canvas: np.ndarray, scene: _Scene) -> None:
    person, rng = scene.person, scene.rng
    style = person.hair_style
    if style == "bald":
        return
    top = person.forehead
    level = {
        "receding": top * 0.97,
        "short": top * 0.76,
        "fringe": rng.uniform(0.44, 0.54) * top,
        "parted": top * 0.72,
        "long": top * 0.76,
        "curly": top * 0.74,
        "cap": top * 0.52,
    }[style]
    y = -0.15 - level
    part = rng.uniform(-0.4, 0.4)
    hairline = np.array(
        [
            (-0.99, -0.12, -0.28),
            (-0.93, -0.15 - 0.3 * level, -0.2),
            (-0.74, -0.15 - 0.72 * level, -0.04),
            (-0.4, y + 0.03, 0.06),
            (part, y - (0.14 * top if style == "parted" else 0.0), 0.06),
            (0.4, y + 0.03, 0.06),
            (0.74, -0.15 - 0.72 * level, -0.04),
            (0.93, -0.15 - 0.3 * level, -0.2),
            (0.99, -0.12, -0.28),
        ]
    )
    hairline[:, 0] *= scene.shape[16, 0]
    if style == "fringe":
        hairline[2:7, 1] += rng.normal(0, 0.03, 5)
    outer = _curve(scene.place(_skull(scene, 0.04 + person.hair_volume * 0.6)))
    inner = _curve(scene.place(hairline))
    if style == "cap":
        cloth = _muted(rng)
        _fill(canvas, np.concatenate([outer, inner[::-1]]), cloth)
        brim = inner - scene.view.rotation[:2, 1] * 0.16 * scene.view.scale
        _fill(canvas, np.concatenate([inner, brim[::-1]]), cloth * 0.7)
        return
    if style == "long":
        lock_end = rng.uniform(0.6, 1.3)
        for temple, out in ((-0.99, -1), (0.99, 1)):
            lock = [
                (temple * 0.8, -0.85, -0.1),
                (temple * 0.94, -0.2, -0.2),
                (temple * 0.99, 0.4, -0.28),
                (temple * 1.05, lock_end, -0.35),
                (temple * 1.22, lock_end - 0.1, -0.55),
                (temple * 1.24, 0.2, -0.55),
                (temple * 1.12, -0.7, -0.5),
            ]
            _fill(canvas, _curve(scene.place(lock), closed=True), person.hair * (0.88 + 0.04 * out))
    _fill(canvas, np.concatenate([outer, inner[::-1]]), person.hair)
    # Strands run from the hairline to the crown without crossing; both curves have points enough.
    for place in np.linspace(0.12, 0.88, 22) + rng.normal(0, 0.01, 22):
        root, tip = inner[int(place * len(inner))], outer[int(place * len(outer))]
        start, end = (
            _mix(root, tip, rng.uniform(0.03, 0.3)),
            _mix(root, tip, rng.uniform(0.6, 0.92)),
        )
        bent = (start + end) / 2 + rng.normal(0, 0.02, 2) * scene.view.scale
        shade = person.hair * rng.uniform(0.8, 1.18)
        _stroke(canvas, _curve(np.array([start, bent, end])), shade, 0.025 * scene.view.scale)


def _paint_glasses(canvas: np.ndarray, scene: _Scene) -> None:
    person, rng, scale = scene.person, scene.rng, scene.view.scale
    dark = rng.random() < 0.03
    if not (person.glasses or dark):
        return
    frame = np.array((26, 24, 26)) if dark else _muted(rng) * 0.5
    width, height, squareness = rng.uniform((0.27, 0.19, 0.5), (0.31, 0.27, 1.0))
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    rim = np.stack(
        [
            width * _signed_power(np.cos(angle), squareness),
            height * _signed_power(np.sin(angle), squareness),
            np.full(20, 0.12),
        ],
        axis=1,
    )
    # Glasses sit on the nose, whatever the lids do.
    y = person.shape[27, 1] + 0.06
    for x, temple, out in ((-0.44, 0, -1), (0.44, 16, 1)):
        lens = _curve(scene.place(rim + np.array((x, y, 0))), closed=True)
        if dark:
            _fill(canvas, lens, frame)
            shine = lens.mean(axis=0) + (lens - lens.mean(axis=0)) * 0.3 - 0.08 * scale
            _fill(canvas, shine, np.array((70, 72, 78)))
        _stroke(canvas, np.concatenate([lens, lens[:1]]), frame, rng.uniform(0.03, 0.06) * scale)
        hinge = scene.place([(x + out * width, y, 0.1)])[0]
        _stroke(canvas, np.array([hinge, scene.at(temple)]), frame, 0.04 * scale)
    bridge = [(-0.44 + width, y, 0.14), (0, y - 0.06, 0.36), (0.44 - width, y, 0.14)]
    _stroke(canvas, _curve(scene.place(bridge)), frame, 0.045 * scale)


def _paint_occluder(canvas: np.ndarray, scene: _Scene) -> None:
    rng, scale = scene.rng, scene.view.scale
    kind = rng.choice(("none", "hand", "mask", "thing"), p=(0.87, 0.06, 0.02, 0.05))
    if kind == "hand":
        skin = scene.person.skin * rng.uniform(0.85, 1.05)
        target = scene.at(int(rng.choice((4, 6, 8, 10, 12))))
        wrist = np.array((target[0] + rng.normal(0, 0.4) * scale, SIZE + 10.0))
        away = (wrist - target) / max(float(np.hypot(*(wrist - target))), 1e-6)
        across = np.array((-away[1], away[0]))
        palm = target + away * 0.5 * scale
        _stroke(canvas, np.array([palm, wrist]), skin, 0.7 * scale)
        for finger in range(4):
            base = palm + across * (finger - 1.5) * 0.2 * scale
            tip = base - away * (0.6 - 0.08 * abs(finger - 1.4)) * scale
            _stroke(canvas, np.array([base, tip]), skin * 0.7, 0.21 * scale)
            _stroke(canvas, np.array([base, tip]), skin, 0.17 * scale)
    elif kind == "mask":
        top = [scene.at(28, 0.2, 0.12), scene.at(28), scene.at(28, -0.2, 0.12)]
        edge = [*scene.at(range(2, 15)), *top]
        colour = _mix(_muted(rng), np.full(3, 235.0), 0.5)
        _fill(canvas, _curve(np.array(edge), closed=True), colour)
        for a, b in ((3, 13), (4, 12)):
            middle = (scene.at(a) + scene.at(b)) / 2 + (scene.at(33) - scene.at(30)) * 0.4
            fold = _curve(np.array([scene.at(a), middle, scene.at(b)]))
            _stroke(canvas, fold, colour * 0.8, 0.03 * scale)
    elif kind == "thing":
        centre = scene.at(int(rng.integers(68))) + rng.normal(0, 0.2, 2) * scale
        size = rng.uniform(0.12, 0.4, 2) * scale
        outline = _ellipse(centre, size[0], size[1], rng.uniform(0, np.pi))
        _fill(canvas, outline[::4] if rng.random() < 0.5 else outline, _muted(rng))


# --- From canvas to photograph --------------------------------------------------------------


def _photograph(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shrink, then spoil as cameras and archives do; uint8 (SIZE, SIZE, 3), RGB."""
    image = cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.3))
    if rng.random() < 0.1:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    gain = (rng.uniform(0.75, 1.15) * rng.normal(1.0, 0.04, 3)).astype(np.float32)
    noise = rng.standard_normal((SIZE, SIZE, 1), np.float32) * np.float32(rng.gamma(1.5, 2.2))
    spoiled = image * gain + (noise + np.float32(rng.normal(0, 12)))
    image = np.clip(spoiled, 0, 255).astype(np.uint8)
    quality = int(rng.integers(45, 97))
    _, packed = cv2.imencode(".jpg", image[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, quality))
    return np.asarray(cv2.imdecode(packed, cv2.IMREAD_COLOR_RGB))


# --- Brushes --------------------------------------------------------------------------------


def _fill(
    canvas: np.ndarray, outline: np.ndarray, colour: np.ndarray, oversampling: int = _OVERSAMPLING
) -> None:
    """Fill a polygon given in image pixels, (n, 2)."""
    points = _fixed(outline, oversampling)
    cv2.fillPoly(canvas, [points], colour.tolist(), cv2.LINE_AA, _SUBPIXEL_BITS)


def _stroke(canvas: np.ndarray, line: np.ndarray, colour: np.ndarray, width: float) -> None:
    """Draw a line of `width` image pixels through points given in image pixels, (n, 2)."""
    thickness = max(1, round(width * _OVERSAMPLING))
    points = _fixed(line, _OVERSAMPLING)
    cv2.polylines(canvas, [points], False, colour.tolist(), thickness, cv2.LINE_AA, _SUBPIXEL_BITS)


def _let_through(
    canvas: np.ndarray, patch: np.ndarray, opening: np.ndarray, corner: np.ndarray
) -> None:
    """Blend `patch` into the canvas, its top-left pixel at `corner`, where `opening` is 255."""
    first, last = np.maximum(corner, 0), np.maximum(corner + opening.shape[::-1], 0)
    window = canvas[first[1] : last[1], first[0] : last[0]]
    (left, top), (height, width) = first - corner, window.shape[:2]
    inside = np.s_[top : top + height, left : left + width]
    weight = opening[inside][..., None] / np.float32(255)
    window[:] = window + (patch[inside].astype(np.float32) - window) * weight


def _strands(canvas: np.ndarray, roots: np.ndarray, scene: _Scene, colour: np.ndarray) -> None:
    """Short hairs that hang down from `roots`, (n, 2) image pixels."""
    down = scene.view.rotation[:2, 1] * 0.09 * scene.view.scale
    for root in roots:
        _stroke(canvas, np.array([root, root + down]), colour * scene.rng.uniform(0.7, 1.3), 0.5)


def _to_canvas(points: np.ndarray, oversampling: int = _OVERSAMPLING) -> np.ndarray:
    """Image pixels to canvas pixels, both with the centre of the first pixel at 0."""
    return (points + 0.5) * oversampling - 0.5


def _fixed(points: np.ndarray, oversampling: int) -> np.ndarray:
    scaled = _to_canvas(points, oversampling) * (1 << _SUBPIXEL_BITS)
    return np.rint(scaled).astype(np.int32)


def _muted(rng: np.random.Generator) -> np.ndarray:
    """Draw a colour, RGB, mostly of little saturation, as walls and clothes are."""
    colour = rng.uniform(15, 240, 3)
    return _mix(np.full(3, colour.mean()), colour, float(rng.beta(1.2, 2.0)))


def _mix(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    return first + (second - first) * share


def _interpolate(table: np.ndarray, position: float) -> np.ndarray:
    index = min(int(position), len(table) - 2)
    return _mix(table[index], table[index + 1], position - index)


def _signed_power(values: np.ndarray, exponent: float) -> np.ndarray:
    return np.sign(values) * np.abs(values) ** exponent


def _ellipse(centre: np.ndarray, width: float, height: float, angle: float = 0.0) -> np.ndarray:
    """Points on an ellipse with half axes `width` and `height`, turned by `angle` radians."""
    x, y = _CIRCLE[0] * width, _CIRCLE[1] * height
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([x * c - y * s, x * s + y * c], axis=1) + centre


_CIRCLE = np.stack([f(np.linspace(0, 2 * np.pi, 20, endpoint=False)) for f in (np.cos, np.sin)])


def _normals(line: np.ndarray) -> np.ndarray:
    """Unit normals of a polyline, (n, 2)."""
    tangent = np.gradient(line, axis=0)
    tangent /= np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-9)
    return tangent[:, ::-1] * (-1, 1)


def _curve(points: np.ndarray, closed: bool = False, steps: int = 5) -> np.ndarray:
    """A Catmull–Rom spline through all points, (n, 2) or (n, 3), `steps` places per segment."""
    return _curve_weights(len(points), closed, steps) @ points


@cache
def _curve_weights(count: int, closed: bool, steps: int) -> np.ndarray:
    t = np.arange(steps) / steps
    basis = 0.5 * np.stack(
        [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3],
        axis=1,
    )
    segments = count if closed else count - 1
    weights = np.zeros((segments * steps + (not closed), count))
    for segment in range(segments):
        for k in range(4):
            place = segment + k - 1
            place = place % count if closed else min(max(place, 0), count - 1)
            weights[segment * steps : (segment + 1) * steps, place] += basis[:, k]
    if not closed:
        weights[-1, -1] = 1
    return weights
