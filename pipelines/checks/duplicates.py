"""Which pictures are copies of others, to the pixel or nearly.

Nearly: the perceptual hashes of two pictures (or of one and the other's mirror image) differ in a
few bits, and their small grey versions correlate at some small shift.
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
SHIFT = 2  # pixels of a small version, each way
# By how much less copies may correlate at 8 × 8 pixels and no shift: on FER-2013 that spares four
# close looks in five, and loses two copies in a thousand.
MARGIN = 0.1

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


def perceptual_hashes(small: np.ndarray) -> tuple[int, int]:
    """Return the 64-bit pHash (imagehash) of a picture and of its mirror image.

    Args:
        small: uint8 (32, 32).
    """
    return _phash(small), _phash(small[:, ::-1])


def near_copies(
    hashes: np.ndarray,
    mirrored: np.ndarray,
    small: np.ndarray,
    rows: np.ndarray,
    distance: int,
    least: float,
    workers: int = 1,
) -> NearCopies:
    """Find near copies: pairs with similar hashes whose small versions correlate.

    Args:
        hashes, mirrored: uint64 (n,) each, of the pictures and of their mirror images.
        small: uint8 (N, 32, 32), small versions; may be a memory map.
        rows: int (n,), where in `small` each of the n pictures stands.
        distance: of the hashes, in bits, at most.
        least: correlation.
        workers: threads.
    """
    pairs, flips = similar_hashes(hashes, mirrored, distance, workers)
    alike = _alike_from_afar(small[rows], pairs, flips, least - MARGIN)
    pairs, flips = pairs[alike], flips[alike]
    values = np.zeros(len(pairs))
    for index, ((first, second), flip) in enumerate(zip(rows[pairs], flips, strict=True)):
        other = small[second]
        values[index] = correlation(small[first], other[:, ::-1] if flip else other)
    copies = values >= least
    return NearCopies(pairs[copies], flips[copies], values[copies])


def similar_hashes(
    hashes: np.ndarray, mirrored: np.ndarray, distance: int, workers: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Find all pairs that differ in at most `distance` bits, comparing each with each.

    34,000 take 2 seconds, and the time grows with the square; memory is linear.

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
    """Return the best normalised correlation of two small versions over shifts of ±2 pixels.

    Args:
        first, second: uint8 (32, 32).

    Returns:
        -1 to 1; 0 where either is flat.
    """
    core = first[SHIFT:-SHIFT, SHIFT:-SHIFT]
    if core.min() == core.max() or second.min() == second.max():
        return 0.0
    values = cv2.matchTemplate(second, core, cv2.TM_CCOEFF_NORMED)
    return float(np.clip(values[np.isfinite(values)], -1, 1).max(initial=0.0))


def _alike_from_afar(
    small: np.ndarray, pairs: np.ndarray, flips: np.ndarray, least: float
) -> np.ndarray:
    """Choose the pairs worth a closer look: bool (k,), whether they correlate at 8 × 8 pixels."""
    coarse = small.reshape(-1, 8, SIDE // 8, 8, SIDE // 8).mean((2, 4), dtype=np.float32)
    coarse -= coarse.mean((1, 2), keepdims=True)
    coarse /= np.linalg.norm(coarse, axis=(1, 2), keepdims=True) + 1e-6
    alike = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), 2**16):
        part = np.s_[start : start + 2**16]
        first, second = coarse[pairs[part, 0]], coarse[pairs[part, 1]]
        second = np.where(flips[part, None, None], second[:, :, ::-1], second)
        alike[part] = np.einsum("kij,kij->k", first, second) >= least
    return alike


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
