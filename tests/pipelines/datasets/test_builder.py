import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from pipelines.cli import GrimaceError
from pipelines.datasets.builder import BUILDERS, count, read, write
from pipelines.datasets.example import Box, Example

EXAMPLES = [
    Example("plain", b"\xff\xd8 not\0 decoded", emotion=3, official_split="val"),
    Example("unreadable", b"", defect="damaged in the archive: bad CRC-32"),
    Example(
        "pointed",
        b"image",
        landmarks=np.array([[0.5, -2], [0, 0], [3, 4]], np.float32),
        visible=np.array([True, False, True]),
        box=Box(0.5, -1.0, 20.25, 30.0),
        person="0a1b",
    ),
]


def content(examples: list[Example]) -> dict[str, dict[str, object]]:
    def plain(value: object) -> object:
        if isinstance(value, np.ndarray):
            return value.dtype, value.shape, value.tolist()
        return type(value), value

    return {
        example.id: {field.name: plain(getattr(example, field.name)) for field in fields(Example)}
        for example in examples
    }


def test_everything_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "fer2013", EXAMPLES, "a card")
    back = list(read(tmp_path / "fer2013"))
    assert count(tmp_path / "fer2013") == len(back) == 3
    assert content(back) == content(EXAMPLES)


@pytest.mark.parametrize("name", ["synthetic", "fer2013", "ytf_keypoints"])
def test_tfds_finds_the_dataset_by_name(tmp_path: Path, name: str) -> None:
    assert issubclass(BUILDERS[name], tfds.core.GeneratorBasedBuilder)
    write(tmp_path / name, EXAMPLES, "a card")
    builder = tfds.builder(name, data_dir=tmp_path)
    assert builder.info.description == "a card"
    assert list(builder.info.splits) == ["faces"]
    assert {row["id"] for row in builder.as_data_source("faces")} == {
        b"plain",
        b"unreadable",
        b"pointed",
    }


def test_equal_examples_give_equal_bytes_in_any_process(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from pipelines.datasets.builder import write, read\n"
        "from pipelines.datasets.example import Example\n"
        "rows = [Example(str(i), bytes([i]), person='p') for i in range(50)]\n"
        "write(Path(sys.argv[1]) / 'synthetic', rows[::int(sys.argv[2])], 'card')\n"
        "assert len(list(read(Path(sys.argv[1]) / 'synthetic'))) == 50\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    written = []
    for order in ("1", "-1"):
        folder = tmp_path / order
        subprocess.run([sys.executable, "-c", script, folder, order], check=True, timeout=120)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        written.append({str(path.relative_to(folder)): path.read_bytes() for path in files})
    assert len(written[0]) == 3
    assert written[0] == written[1]


def test_a_failure_half_way_leaves_the_old_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "fer2013"
    write(folder, EXAMPLES, "a card")

    def breaks():  # type: ignore[no-untyped-def]
        yield EXAMPLES[0]
        raise GrimaceError("the archive is damaged")

    with pytest.raises(GrimaceError, match="the archive is damaged"):
        write(folder, breaks(), "a card")
    assert count(folder) == 3
    assert list(tmp_path.iterdir()) == [folder]


def test_nothing_to_write_and_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(GrimaceError, match="no examples"):
        write(tmp_path / "fer2013", [], "a card")
    with pytest.raises(GrimaceError, match="holds no dataset"):
        read(tmp_path / "fer2013")
