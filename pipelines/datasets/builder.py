"""Store examples as a TFDS dataset of ArrayRecord shards, and read them back.

One set of features serves every dataset, so that `filter` and `split` treat all alike. The only
split is called "faces": which example trains and which tests is decided later, by `split`, and the
folders of a source are not to be mistaken for a protocol. Neither direction loads TensorFlow.
"""

import io
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.writer import ExampleWriter
from tensorflow_datasets.proto import tf_example_pb2

from pipelines.cli import GrimaceError, whole_folder
from pipelines.datasets.example import Affect, Box, Example, Pose

SPLIT = "faces"
TEXTS = ("id", "label", "person", "official_split", "defect")
# What `filter` adds later is no part of the raw data.
FROM_SOURCE = [name for name in Example.__dataclass_fields__ if name not in ("cluster", "weight")]


def write(folder: Path, examples: Iterable[Example], description: str) -> None:
    """Write examples as `folder/VERSION/`, whole or not at all.

    Equal examples give equal bytes, whatever order they come in. With `folder` = DIR/NAME,
    `tfds.load(NAME, data_dir=DIR)` finds it too.

    Args:
        folder: the dataset's own folder; its name is the dataset's.
        examples: with ids that come once.
        description: the data card that travels with the data.

    Raises:
        GrimaceError: there are no examples.
    """
    tfds.disable_progress_bar()
    with whole_folder(folder) as partial, TemporaryDirectory(dir=partial) as scratch:
        builder = BUILDERS[folder.name](
            examples=examples, description=description, data_dir=scratch, file_format="array_record"
        )
        # TFDS prints where it writes, which is not where the dataset ends up.
        with redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_dir=Path(scratch) / "downloads")
        builder.data_path.rename(partial / builder.data_path.name)


def read(folder: Path) -> Iterator[Example]:
    """Read the examples that `write` stored in `folder`, in an order that does not change.

    Raises:
        GrimaceError: there is no dataset in `folder`.
    """
    return map(_from_features, _open(folder).as_data_source(SPLIT))


def count(folder: Path) -> int:
    """Count the examples in `folder` without reading them.

    Raises:
        GrimaceError: there is no dataset in `folder`.
    """
    return int(_open(folder).info.splits[SPLIT].num_examples)


class FaceBuilder(tfds.core.GeneratorBasedBuilder):
    """A TFDS builder of labelled faces; its subclasses only add a name."""

    VERSION = tfds.core.Version("1.1.0")  # 1.1.0: label, pose and affect

    def __init__(
        self, *, examples: Iterable[Example] = (), description: str = "", **kwargs: Any
    ) -> None:
        self._examples = examples
        self._description = description
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "id": tfds.features.Text(),
                # Raw bytes rather than a decoded image: unreadable ones reach `filter` too.
                "image": tfds.features.Text(),
                "emotion": tfds.features.Scalar(np.int64),
                "label": tfds.features.Text(),
                "landmarks": tfds.features.Tensor(shape=(None, 2), dtype=np.float32),
                "visible": tfds.features.Tensor(shape=(None,), dtype=np.bool_),
                # None or one row each.
                "box": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
                "pose": tfds.features.Tensor(shape=(None, 3), dtype=np.float32),
                "affect": tfds.features.Tensor(shape=(None, 2), dtype=np.float32),
                "person": tfds.features.Text(),
                "official_split": tfds.features.Text(),
                "defect": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, description=self._description, features=features)

    def _split_generators(self, _: tfds.download.DownloadManager) -> dict[str, Any]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        example = None
        for example in self._examples:
            yield example.id, _to_features(example)
        if example is None:
            raise GrimaceError(f"{self.name} has no examples: nothing to write")

    def _example_writer(self) -> ExampleWriter:
        return _SameBytesWriter(self.info.file_format)


class Synthetic(FaceBuilder):
    """Faces that the project draws itself."""


class Fer2013(FaceBuilder):
    """FER-2013."""


class YtfKeypoints(FaceBuilder):
    """YouTube Faces frames with 68 landmarks."""


class KaggleKeypoints(FaceBuilder):
    """Kaggle's Facial Keypoints Detection, 15 points."""


class Affectnet(FaceBuilder):
    """AffectNet."""


class The300wLp(FaceBuilder):
    """300W-LP, 68 points in large poses."""


class Aflw2k3d(FaceBuilder):
    """AFLW2000-3D, for evaluation only."""


class Folder(FaceBuilder):
    """A user's own faces."""


BUILDERS: dict[str, type[FaceBuilder]] = {
    builder.name: builder
    for builder in (
        Synthetic,
        Fer2013,
        YtfKeypoints,
        KaggleKeypoints,
        Affectnet,
        The300wLp,
        Aflw2k3d,
        Folder,
    )
}


class _SameBytesWriter(ExampleWriter):
    """Writes the features of a record in one order; protobuf's own differs from run to run."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        sorted_examples = (
            (key, tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True))
            for key, record in examples
        )
        return super().write(path, sorted_examples)


def _open(folder: Path) -> tfds.core.DatasetBuilder:
    versions = sorted(folder.glob("*/dataset_info.json"))
    if len(versions) != 1:
        raise GrimaceError(f"{folder} holds no dataset; run the stage that makes it first")
    return tfds.builder_from_directory(versions[0].parent)


def _to_features(example: Example) -> dict[str, Any]:
    features = {name: getattr(example, name) for name in FROM_SOURCE}
    optional: dict[str, Any] = {}
    for name, width in (("box", 4), ("pose", 3), ("affect", 2)):
        value = getattr(example, name)
        optional[name] = np.array([value] if value else [], np.float32).reshape(-1, width)
    return features | optional


def _from_features(row: dict[str, Any]) -> Example:
    texts = {name: row[name].decode() for name in TEXTS}
    return Example(
        image=cast(bytes, row["image"]),
        emotion=int(row["emotion"]),
        landmarks=row["landmarks"],
        visible=row["visible"],
        box=Box(*row["box"][0].tolist()) if len(row["box"]) else None,
        pose=Pose(*row["pose"][0].tolist()) if len(row["pose"]) else None,
        affect=Affect(*row["affect"][0].tolist()) if len(row["affect"]) else None,
        **texts,
    )
