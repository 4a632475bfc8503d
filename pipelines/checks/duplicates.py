"""Which pictures are copies of others, to the pixel or nearly.

Nearly: the perceptual hashes of two pictures (or of one and the other's mirror image) differ in a
few bits, and their details correlate at some small shift. Details are what a blur takes away: face
crops are all alike from afar, so plain correlation confuses strangers before it misses copies. (On
YouTube Faces no two frames of different people reach 0.67; plain correlation takes some to 0.90.)
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import imagehash
import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SIDE = 32  # of the small versions
COARSE_SIDE = 8
BLUR = 2.5  # standard deviation in pixels of a small version
CONTRAST = 40  # standard deviation of the details as they are kept
SHIFT = 2  # pixels of a small version, each way
# Pairs that correlate less at 8 × 8 pixels and no shift are not looked at more closely. On FER-2013
# that spares four looks in five, and loses one copy in a hundred.
FROM_AFAR = 0.8

_ROWS = 16  # of the distance matrix at a time: its buffers then stay in the processor's cache


@dataclass(frozen=True, eq=False)
class NearCopies:
    """Pairs of near copies among n pictures.

    Attributes:
        pairs: int (k, 2), positions, the first below the second.
        mirrored: bool (k,), whether one is like the other's mirror image.
        correlations: float (k,), at most 1.
    """

    pairs: np.ndarray
    mirrored: np.ndarray
    correlations: np.ndarray


def pixel_digest(rgb: np.ndarray) -> str:
    """Return the SHA-256 of a picture's shape and pixels, whatever file they came in."""
    return hashlib.sha256(repr(rgb.shape).encode() + rgb.tobytes()).hexdigest()


def small_version(grey: np.ndarray) -> np.ndarray:
    """Shrink or stretch a picture, uint8 (H, W), to uint8 (32, 32)."""
    return cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def coarse_version(small: np.ndarray) -> np.ndarray:
    """Shrink a small version to uint8 (8, 8)."""
    return cv2.resize(small, (COARSE_SIDE, COARSE_SIDE), interpolation=cv2.INTER_AREA)


def details(small: np.ndarray) -> np.ndarray:
    """Take the blurred picture away from a small version, and even out the contrast.

    Returns:
        uint8 (32, 32) around 128; all 128 where there is none.
    """
    sharp = small.astype(np.float32)
    sharp -= cv2.GaussianBlur(sharp, (0, 0), BLUR)
    spread = float(sharp.std())
    scaled = sharp * (CONTRAST / spread) if spread > 1e-3 else np.zeros_like(sharp)
    return np.clip(scaled + 128.5, 0, 255).astype(np.uint8)


def perceptual_hashes(small: np.ndarray) -> tuple[int, int]:
    """Return the 64-bit pHash (imagehash) of a picture and of its mirror image.

    Args:
        small: uint8 (32, 32).
    """
    return _phash(small), _phash(small[:, ::-1])


def near_copies(
    hashes: np.ndarray,
    mirrored: np.ndarray,
    coarse: np.ndarray,
    sharp: np.ndarray,
    rows: np.ndarray,
    distance: int,
    least: float,
    workers: int = 1,
) -> NearCopies:
    """Find near copies: pairs with similar hashes whose details correlate.

    Args:
        hashes, mirrored: uint64 (n,) each, of the pictures and of their mirror images.
        coarse: uint8 (N, 8, 8), coarse versions; may be a memory map.
        sharp: uint8 (N, 32, 32), details; may be a memory map.
        rows: int (n,), where in `coarse` and `sharp` each of the n pictures stands.
        distance: of the hashes, in bits, at most.
        least: correlation.
        workers: threads.
    """
    pairs, flips = similar_hashes(hashes, mirrored, distance, workers)
    alike = _alike_from_afar(coarse[rows], pairs, flips)
    pairs, flips = pairs[alike], flips[alike]
    values = np.zeros(len(pairs))
    for index, ((first, second), flip) in enumerate(zip(rows[pairs], flips, strict=True)):
        other = sharp[second]
        values[index] = correlation(sharp[first], other[:, ::-1] if flip else other)
    copies = values >= least
    return NearCopies(pairs[copies], flips[copies], values[copies])


def similar_hashes(
    hashes: np.ndarray, mirrored: np.ndarray, distance: int, workers: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Find all pairs that differ in at most `distance` bits, comparing each with each.

    34,000 take about 2 seconds, and the time grows with the square; memory is linear.

    Args:
        hashes, mirrored: uint64 (n,) each, of the pictures and of their mirror images.
        distance: in bits.
        workers: threads; the result does not depend on it.

    Returns:
        int (k, 2), positions with the first below the second, sorted; and bool (k,), whether it
        is the second's mirror image that is like the first. A pair may come both ways.
    """
    n = len(hashes)

    def from_row(start: int) -> tuple[np.ndarray, np.ndarray]:
        rows = hashes[start : start + _ROWS, None]
        found, flips = [], []
        for flip, others in ((False, hashes), (True, mirrored)):
            near = np.bitwise_count(rows ^ others[start:]) <= distance
            pairs = np.argwhere(near) + start
            pairs = pairs[pairs[:, 0] < pairs[:, 1]]
            found.append(pairs)
            flips.append(np.full(len(pairs), flip))
        return np.concatenate(found), np.concatenate(flips)

    with ThreadPoolExecutor(workers) as pool:  # NumPy lets go of the interpreter's lock
        blocks = list(pool.map(from_row, range(0, n, _ROWS)))
    both = np.concatenate([pairs for pairs, _ in blocks] or [np.zeros((0, 2), np.int64)])
    flipped = np.concatenate([flips for _, flips in blocks] or [np.zeros(0, bool)])
    order = np.lexsort((flipped, both[:, 1], both[:, 0]))
    return both[order], flipped[order]


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return the best normalised correlation of two pictures' details over shifts of ±2 pixels.

    Args:
        first, second: uint8 (32, 32).

    Returns:
        0 to 1; 0 where either is flat.
    """
    core = first[SHIFT:-SHIFT, SHIFT:-SHIFT]
    if core.min() == core.max() or second.min() == second.max():
        return 0.0
    values = cv2.matchTemplate(second, core, cv2.TM_CCOEFF_NORMED)
    return float(np.clip(values[np.isfinite(values)], 0, 1).max(initial=0.0))


def _alike_from_afar(coarse: np.ndarray, pairs: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """Choose the pairs worth a closer look: bool (k,)."""
    units = coarse - coarse.mean((1, 2), keepdims=True, dtype=np.float32)
    units /= np.linalg.norm(units, axis=(1, 2), keepdims=True) + 1e-6
    alike = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), 2**16):
        part = np.s_[start : start + 2**16]
        first, second = units[pairs[part, 0]], units[pairs[part, 1]]
        second = np.where(flips[part, None, None], second[:, :, ::-1], second)
        alike[part] = np.einsum("kij,kij->k", first, second) >= FROM_AFAR
    return alike


def one_face(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Say of pairs of copies whether they show one face, not two faces of one photograph.

    Args:
        first, second: float (k, 4) each, boxes as left, top, right, bottom in shares of their
            pictures; NaN where the source does not say where the face is.

    Returns:
        bool (k,), whether the centre of one box lies in the other; true where either is unknown.
    """
    unknown = np.isnan(first).any(axis=1) | np.isnan(second).any(axis=1)
    return unknown | _around_centre(first, second) | _around_centre(second, first)


def _around_centre(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    centres = (others[:, :2] + others[:, 2:]) / 2
    return ((boxes[:, :2] <= centres) & (centres <= boxes[:, 2:])).all(axis=1)


def surplus(near: NearCopies) -> list[tuple[int, int, int]]:
    """Choose which near copies are surplus, where lower positions are the better ones.

    A picture is surplus when it is a near copy of one that is not; so of A like B like C, where A
    is not like C, only B is.

    Returns:
        For each: its position, that of the copy which stays and is most like it, and the index of
        that pair.
    """
    copies: dict[int, tuple[int, int]] = {}
    by_second = np.lexsort((-near.correlations, near.pairs[:, 1]))
    for index in by_second.tolist():
        first, second = near.pairs[index].tolist()
        if first not in copies and second not in copies:
            copies[second] = (first, index)
    return [(position, stays, index) for position, (stays, index) in copies.items()]


def clusters(ids: Sequence[str], pairs: np.ndarray) -> list[str]:
    """Name what hangs together: the smallest id of each connected component, "" if it is alone.

    Args:
        ids: n names.
        pairs: int (k, 2), indices of copies.
    """
    n = len(ids)
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    component = connected_components(graph, directed=False)[1]
    names: dict[int, str] = {}
    for id, number in zip(ids, component.tolist(), strict=True):
        names[number] = min(names.get(number, id), id)
    sizes = np.bincount(component, minlength=1)
    return [names[number] if sizes[number] > 1 else "" for number in component.tolist()]


def _phash(small: np.ndarray) -> int:
    bits = imagehash.phash(Image.fromarray(np.ascontiguousarray(small))).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
