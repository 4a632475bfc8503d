"""Examples between `filter` and its readers: a folder of Parquet parts."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.datasets.example import Affect, Box, Example, Pose

PART_ROWS = 512

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image": pa.binary(),
        "emotion": pa.int8(),
        "label": pa.string(),
        "landmarks": pa.list_(pa.float32()),
        "visible": pa.list_(pa.bool_()),
        "box": pa.list_(pa.float32()),
        "pose": pa.list_(pa.float32()),
        "affect": pa.list_(pa.float32()),
        "person": pa.string(),
        "official_split": pa.string(),
        "cluster": pa.string(),
        "weight": pa.float32(),
    }
)
LABELS = [name for name in SCHEMA.names if name != "image"]


def write_examples(examples: Iterable[Example], folder: Path) -> int:
    """Write examples as `part-00000.parquet`, … of 512 rows each; return how many there were."""
    total = 0
    stream = iter(examples)
    for part in range(10**5):
        rows = [_row(example) for example in islice(stream, PART_ROWS)]
        if not rows:
            break
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        pq.write_table(table, folder / f"part-{part:05d}.parquet")
        total += len(rows)
    return total


def parts(folder: Path) -> list[Path]:
    """Return the part files of a folder, in order."""
    return sorted(folder.glob("part-*.parquet"))


def read_examples(path: Path, images: bool = True) -> Iterator[Example]:
    """Yield the examples of one part file or of a folder of parts, in the order written.

    Args:
        path: the part or the folder.
        images: without them `Example.image` is empty and reading is quicker.
    """
    for part in [path] if path.is_file() else parts(path):
        # Small parts are read quicker by one thread, the more so where every core has a worker.
        table = pq.ParquetFile(part).read(None if images else LABELS, use_threads=False)
        for row in table.to_pylist():
            yield Example(
                id=row["id"],
                image=row.get("image", b""),
                emotion=row["emotion"],
                label=row["label"],
                landmarks=np.asarray(row["landmarks"], np.float32).reshape(-1, 2),
                visible=np.asarray(row["visible"], bool),
                box=Box(*row["box"]) if row["box"] else None,
                pose=Pose(*row["pose"]) if row["pose"] else None,
                affect=Affect(*row["affect"]) if row["affect"] else None,
                person=row["person"],
                official_split=row["official_split"],
                cluster=row["cluster"],
                weight=row["weight"],
            )


def _row(example: Example) -> dict[str, object]:
    return {
        "id": example.id,
        "image": example.image,
        "emotion": example.emotion,
        "label": example.label,
        "landmarks": example.landmarks.reshape(-1),
        "visible": example.visible,
        "box": list(example.box or ()),
        "pose": list(example.pose or ()),
        "affect": list(example.affect or ()),
        "person": example.person,
        "official_split": example.official_split,
        "cluster": example.cluster,
        "weight": example.weight,
    }
