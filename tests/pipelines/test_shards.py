import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.cli import GrimaceError
from pipelines.shards import read_meta, read_view, version_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "meta.json").write_text(json.dumps({"task": "landmarks", "views": 2}))
    side = tmp_path / "train"
    side.mkdir()
    np.save(side / "ids.npy", np.array(["a", "ü"]))
    for view in range(2):
        np.save(side / f"images-{view:02d}.npy", np.full((2, 16, 16, 1), view, np.uint8))
        np.save(side / f"landmarks-{view:02d}.npy", np.full((2, 15, 2), view, np.float32))
        np.save(side / f"visible-{view:02d}.npy", np.ones((2, 15), bool))
    return tmp_path


def test_a_view_is_read(folder: Path) -> None:
    assert read_meta(folder) == {"task": "landmarks", "views": 2}
    view = read_view(folder, "train", 1)
    assert view.ids.tolist() == ["a", "ü"]
    assert (view.images == 1).all() and view.images.shape == (2, 16, 16, 1)
    assert view.landmarks is not None and (view.landmarks == 1).all()
    assert view.visible is not None and view.visible.all()
    assert view.emotions is None
    assert view.weights.tolist() == [1, 1] and view.weights.dtype == np.float32
    assert isinstance(view.images, np.memmap) and not view.images.flags.writeable


def test_weights_are_read(folder: Path) -> None:
    np.save(folder / "train" / "weights.npy", np.array([0.5, 1], np.float32))
    assert read_view(folder, "train", 1).weights.tolist() == [0.5, 1]


@pytest.mark.parametrize(("side", "view"), [("train", 2), ("val", 0), ("test", 0)])
def test_what_is_not_there(folder: Path, side: str, view: int) -> None:
    with pytest.raises(FileNotFoundError, match=f"{side} holds no view {view}; run"):
        read_view(folder, side, view)


def test_a_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(GrimaceError, match="holds no shards; run"):
        read_meta(tmp_path)


def test_other_bytes_names_or_facts_are_another_version(folder: Path) -> None:
    before = version_of(folder)
    assert version_of(folder) == before and len(before) == 64
    (folder / "train" / "notes.txt").touch()
    assert version_of(folder) == before
    seen = {before}
    images = np.load(folder / "train" / "images-01.npy")
    images[1, 5, 5] += 1
    np.save(folder / "train" / "images-01.npy", images)
    seen.add(version_of(folder))
    (folder / "train" / "images-01.npy").rename(folder / "train" / "images-02.npy")
    seen.add(version_of(folder))
    (folder / "meta.json").write_text(json.dumps({"task": "landmarks", "views": 3}))
    seen.add(version_of(folder))
    assert len(seen) == 4


def test_it_needs_numpy_alone(folder: Path) -> None:
    """So that a training machine with only JAX and Keras can read shards."""
    code = """
import sys
from pathlib import Path
from pipelines.shards import read_view
read_view(Path(sys.argv[1]), "train")
outside = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(sorted(name for name in outside if not name.startswith("_")))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "['numpy', 'pipelines']"
