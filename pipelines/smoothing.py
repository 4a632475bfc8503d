"""Faces followed through a video, their boxes and answers calmed: `web/src/smooth.js` in Python."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pipelines.datasets.example import Box
from pipelines.detectors import overlap

SAME = 0.2  # overlap from which a face is the one of the frame before
FORGET = 0.4  # seconds without being seen
TAKES_OVER = 0.08  # a new emotion must lead by so much: otherwise the emoji flickers
SETTLE = 0.18  # seconds, time constant of the probabilities

Filter = Callable[[np.ndarray, float, float], np.ndarray]


@dataclass(eq=False)
class Seen:
    """A face in one frame, or, from `update`, in all frames so far.

    Attributes:
        box: the square around its points, in pixels.
        eyes: (2, 2), in pixels.
        points: (N, 2), in pixels; None without a landmark model.
        probabilities: (7,); None without an emotion model.
        label: index of the emotion to show; None without an emotion model.
    """

    box: Box
    eyes: np.ndarray
    points: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    label: int | None = None


@dataclass(eq=False)
class _Track:
    shown: Seen
    raw: Box
    time: float
    filters: dict[str, Filter] = field(default_factory=dict)


def one_euro(cutoff: float, beta: float, speed_cutoff: float = 1.0) -> Filter:
    """The 1€ filter (Casiez, Roussel and Vogel 2012) over an array of values.

    A low pass whose cutoff rises with speed, so that a still face does not tremble and a quick
    one does not lag.

    Args:
        cutoff: in hertz, at rest.
        beta: how much the cutoff rises, per unit of speed.
        speed_cutoff: in hertz, for the speed itself.

    Returns:
        A function of values, time in seconds, and the length that speeds are measured in, to the
        filtered values.
    """
    last = speeds = np.zeros(0)
    before = 0.0

    def share(hertz: np.ndarray | float, seconds: float) -> np.ndarray | float:
        return 1 / (1 + 1 / (2 * np.pi * hertz * seconds))

    def filtered(values: np.ndarray, time: float, unit: float) -> np.ndarray:
        nonlocal last, speeds, before
        if last.shape != values.shape:
            last, speeds, before = values.astype(float), np.zeros(values.shape), time
        elif (seconds := time - before) > 0:
            speed = (values - last) / unit / seconds
            speeds = speeds + share(speed_cutoff, seconds) * (speed - speeds)
            last = last + share(cutoff + beta * np.abs(speeds), seconds) * (values - last)
            before = time
        return last.copy()

    return filtered


def tracker() -> Callable[[list[Seen], float], list[Seen]]:
    """Return a function that is told each frame's faces and its time, and gives them smoothed."""
    tracks: list[_Track] = []

    def update(faces: list[Seen], time: float) -> list[Seen]:
        nonlocal tracks
        pairs = [
            (overlap(t.raw, f.box), i, j) for i, t in enumerate(tracks) for j, f in enumerate(faces)
        ]
        free, idle = set(range(len(faces))), set(range(len(tracks)))
        for shared, i, j in sorted(pairs, reverse=True):
            if shared > SAME and i in idle and j in free:
                _follow(tracks[i], faces[j], time)
                idle.remove(i)
                free.remove(j)
        for j in sorted(free):
            filters = {
                "box": one_euro(1.2, 4),
                "eyes": one_euro(1.2, 4),
                "points": one_euro(1.5, 5),
            }
            track = _Track(Seen(faces[j].box, faces[j].eyes), faces[j].box, time, filters)
            _follow(track, faces[j], time)
            tracks.append(track)
        tracks = [track for track in tracks if time - track.time <= FORGET]
        return [track.shown for track in tracks]

    return update


def _follow(track: _Track, face: Seen, time: float) -> None:
    unit = (face.box.right - face.box.left) or 1.0
    smooth = track.filters
    shown = track.shown
    shown.box = Box(*smooth["box"](np.array(face.box), time, unit).tolist())
    shown.eyes = smooth["eyes"](face.eyes, time, unit)
    shown.points = None if face.points is None else smooth["points"](face.points, time, unit)
    _settle(shown, face.probabilities, time - track.time)
    track.raw, track.time = face.box, time


def _settle(shown: Seen, probabilities: np.ndarray | None, seconds: float) -> None:
    if probabilities is None:
        shown.probabilities = shown.label = None
        return
    if shown.probabilities is None:
        shown.probabilities = probabilities
    weight = 1 - np.exp(-seconds / SETTLE)
    shown.probabilities = shown.probabilities + weight * (probabilities - shown.probabilities)
    best = int(shown.probabilities.argmax())
    if (
        shown.label is None
        or shown.probabilities[best] - shown.probabilities[shown.label] > TAKES_OVER
    ):
        shown.label = best
