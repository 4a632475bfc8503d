"""What `augment` hands to training: plain NumPy files in one folder, readable without TensorFlow.

    meta.json                     task, crop, classes or landmark scheme, counts
    {train,val}/ids.npy           (n,)           unicode; balancing repeats some in train
    {train,val}/weights.npy       (n,)           float32 in (0, 1]; 1 where the file is absent
    {train,val}/emotions.npy      (n,)           int64, task emotion
    {train,val}/images-VV.npy     (n, S, S, C)   uint8, one file a view
    {train,val}/landmarks-VV.npy  (n, N, 2)      float32, crop coordinates, task landmarks
    {train,val}/visible-VV.npy    (n, N)         bool, task landmarks

`val` has the single view 00, never augmented. NumPy is all this module needs, so that it also
serves a training machine that has only JAX and Keras.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.cli import GrimaceError
from pipelines.job import sha256


@dataclass(frozen=True, eq=False)
class View:
    """One side of the data as the model sees it, memory-mapped.

    Attributes:
        ids: (n,) unicode.
        weights: float32 (n,), how much training heeds each.
        images: uint8 (n, S, S, C).
        emotions: int64 (n,), or None for landmarks.
        landmarks: float32 (n, N, 2) in crop coordinates, 0 where not visible; None for emotion.
        visible: bool (n, N); None for emotion.
    """

    ids: np.ndarray
    weights: np.ndarray
    images: np.ndarray
    emotions: np.ndarray | None
    landmarks: np.ndarray | None
    visible: np.ndarray | None


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the folder's meta.json.

    Raises:
        GrimaceError: there is none.
    """
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    except FileNotFoundError:
        raise GrimaceError(f"{folder} holds no shards; run `uv run dvc repro augment`") from None
    return meta


def version_of(folder: Path) -> str:
    """Return the SHA-256, in hex, of the names and bytes of all that a folder of shards holds."""
    files = [folder / "meta.json", *folder.glob("train/*.npy"), *folder.glob("val/*.npy")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()


def read_view(folder: Path, side: str, view: int = 0) -> View:
    """Map one view of one side.

    Args:
        folder: a folder as described above.
        side: "train" or "val".
        view: number of the augmented version.
    """

    def array(name: str) -> np.ndarray | None:
        path = folder / side / f"{name}.npy"
        return np.load(path, mmap_mode="r") if path.exists() else None

    ids, images = array("ids"), array(f"images-{view:02d}")
    if ids is None or images is None:
        raise FileNotFoundError(f"{folder}/{side} holds no view {view}; run `dvc repro augment`")
    weights = array("weights")
    return View(
        ids=ids,
        weights=np.ones(len(ids), np.float32) if weights is None else weights,
        images=images,
        emotions=array("emotions"),
        landmarks=array(f"landmarks-{view:02d}"),
        visible=array(f"visible-{view:02d}"),
    )
