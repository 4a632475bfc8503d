import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from models.schemes import EMOTIONS, IBUG_68, KAGGLE_15, Scheme
from pipelines.augment import (
    Job,
    augmented_view,
    build_policy,
    main,
    plain_view,
    usable,
    write_shards,
)
from pipelines.cli import GrimaceError
from pipelines.crops import decode
from pipelines.datasets import table
from pipelines.datasets.example import Example
from pipelines.datasets.table import parts, write_examples
from pipelines.params import AugmentTask, Split, Task, Transform, load_params
from pipelines.shards import read_meta, read_view
from pipelines.split import make_index

ROOT = Path(__file__).parents[2]
DEFAULT = load_params(ROOT / "params.yaml").augment

# Kaggle-15 on a face that is nowhere symmetric, within 100 × 100.
FACE = np.array(
    [
        (69.1, 38.2), (29.7, 35.3), (60.4, 39.9), (79.8, 37.1), (38.6, 37.4), (20.3, 34.8),
        (57.7, 27.6), (87.2, 24.3), (41.3, 29.8), (12.9, 22.4),
        (46.2, 57.5), (66.6, 78.8), (31.1, 73.7), (50.4, 70.2), (48.5, 88.9),
    ]
)  # fmt: skip


def job(policy: tuple[Transform, ...], jitter: float = 0.06, **task: Any) -> Job:
    settings = AugmentTask(views=4, jitter_shift=jitter, jitter_scale=jitter * 2, policy=policy)
    crop = Task(**{"dataset": "synthetic", "size": 96, "channels": 1, "margin": 0.15} | task)
    return Job("landmarks", crop, settings, seed=2026, clean=Path(), out=Path())


def policy_of(job: Job) -> Any:
    return build_policy(job.settings, job.task, job.name)


def example_of(points: np.ndarray, visible: np.ndarray | None = None, id: str = "a") -> Example:
    visible = np.ones(len(points), bool) if visible is None else visible
    points = np.where(visible[:, None], points, 0).astype(np.float32)
    return Example(id, b"", landmarks=points, visible=visible)


# Landmarks stay on their pixels. Of each point a picture is made that shows a dot there and
# nothing else; all are augmented alike, because only the example's id decides how. Where the dots
# have gone is read from the pixels.


def dot(shape: tuple[int, int], at: np.ndarray, sigma: float) -> np.ndarray:
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]]
    squared = (x - at[0]) ** 2 + (y - at[1]) ** 2
    return np.rint(60 + 140 * np.exp(-squared / (2 * sigma**2))).astype(np.uint8)[..., None]


def position(image: np.ndarray) -> np.ndarray:
    """Centre of the dot in pixels, NaN where it is cut off by the frame or outside."""
    light = image[..., 0].astype(float)
    light -= np.median(light)
    light[light < 0.15 * max(light.max(), 60)] = 0
    rim = light.copy()
    rim[1:-1, 1:-1] = 0
    if not light.any() or rim.any():
        return np.full(2, np.nan)
    y, x = np.indices(light.shape)
    return np.array([(x * light).sum(), (y * light).sum()]) / light.sum()


def turn(points: np.ndarray) -> float:
    """Sign of the triangle of both eye centres and the nose: left or right handed."""
    a, b, c = points[[0, 1, 10]]
    return float(np.sign((b - a)[0] * (c - a)[1] - (b - a)[1] * (c - a)[0]))


def transform(name: str, **arguments: Any) -> tuple[Transform, ...]:
    return (Transform(transform=name, p=1.0, **arguments),)


POLICIES = {
    "default landmarks": DEFAULT.landmarks.policy,
    "default emotion": DEFAULT.emotion.policy,
    "nothing": (),
    "HorizontalFlip": transform("HorizontalFlip"),
    "VerticalFlip": transform("VerticalFlip"),
    "Transpose": transform("Transpose"),
    "D4": transform("D4"),
    "Rotate": transform("Rotate", limit=[-45, 45], border_mode=1),
    "RotateInsideOut": transform("Rotate", limit=[90, 180], border_mode=1),
    "SafeRotate": transform("SafeRotate", limit=[-30, 30], border_mode=1),
    "CropAndPad": transform("CropAndPad", percent=[-0.1, 0.1], keep_size=True, border_mode=1),
    "Perspective": transform("Perspective", scale=[0.03, 0.08], border_mode=1),
    "Affine": transform(
        "Affine", scale=[0.8, 1.2], rotate=[-20, 20], shear=[-10, 10], border_mode=1
    ),
}


@pytest.mark.parametrize(
    ("name", "scale"),
    [(name, 1.4) for name in POLICIES]
    # Pictures much smaller and much larger than the crop.
    + [(name, scale) for name in ("default landmarks", "CropAndPad") for scale in (0.5, 4.0)],
)
def test_landmarks_stay_on_their_pixels(name: str, scale: float) -> None:
    work = job(POLICIES[name], margin=0.3)
    policy = policy_of(work)
    points = FACE * scale + [20.3, 31.8]
    example = example_of(points)
    shape = (int(130 * scale + 40), int(120 * scale + 70))
    dots = [dot(shape, point, sigma=1.6 * scale * 1.3) for point in points]
    errors, mirrored = [], set()
    for view in range(10):
        views = [augmented_view(example, image, work, policy, view) for image in dots]
        landmarks, visible = views[0][1:]
        found = np.array([position(image) for image, *_ in views])
        assert all(np.array_equal(other, landmarks) for _, other, _ in views)
        assert np.isfinite(found[[0, 1, 10]]).all(), "the triangle left the frame"
        flipped = turn(found) != turn(points)
        mirrored.add(flipped)
        for number, at in enumerate(found):
            row = KAGGLE_15.mirror[number] if flipped else number
            if np.isfinite(at).all():
                assert visible[row]
                errors.append(np.abs(landmarks[row] * 96 - 0.5 - at).max())
    assert len(errors) > 100
    assert max(errors) < 0.25
    assert np.mean(errors) < 0.1
    if name in ("default landmarks", "default emotion", "D4"):
        assert mirrored == {False, True}


@pytest.mark.parametrize("scheme", [KAGGLE_15, IBUG_68], ids=lambda scheme: scheme.name)
def test_mirroring_twice_gives_the_picture_and_its_names_back(scheme: Scheme) -> None:
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (120, 120), np.uint8)
    image = cv2.GaussianBlur(noise, (0, 0), 3)[..., None]
    example = example_of(rng.uniform(10, 110, (scheme.size, 2)), rng.random(scheme.size) < 0.8)
    flop = job(transform("HorizontalFlip"), jitter=0)
    # Mirrored by hand: pixels, places, and the names of left and right.
    mirror = list(scheme.mirror)
    turned = example.landmarks * [-1, 1] + [119, 0]
    by_hand = example_of(turned[mirror], example.visible[mirror])
    policy = policy_of(flop)
    again = augmented_view(by_hand, image[:, ::-1].copy(), flop, policy, 0)
    once = augmented_view(example, image, flop, policy, 0)
    for found, expected in [
        (again, plain_view(example, image, flop.task)),
        (once, plain_view(by_hand, image[:, ::-1].copy(), flop.task)),
    ]:
        assert np.abs(found[0].astype(int) - expected[0]).max() <= 1
        np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
        assert np.array_equal(found[2], expected[2])
    assert not np.array_equal(once[2], again[2])


# Which points survive


def test_points_out_of_frame_become_invisible_and_keep_their_place() -> None:
    work = job((), jitter=0, margin=-0.2)  # cuts the outer points off
    example = example_of(FACE + 20)
    image = np.zeros((140, 140, 1), np.uint8)
    _, landmarks, visible = augmented_view(example, image, work, policy_of(work), 0)
    _, plain, _ = plain_view(example, image, work.task)
    inside = ((plain >= 0) & (plain <= 1)).all(1)
    assert 3 < inside.sum() < 12
    assert np.array_equal(visible, inside)
    np.testing.assert_allclose(landmarks[inside], plain[inside], atol=1e-5)
    assert (landmarks[~inside] == 0).all()
    assert landmarks.dtype == np.float32 and landmarks.shape == (15, 2) and visible.dtype == bool


class Recording:
    """The real policy, remembering the points it was given."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.given = policy, np.zeros((0, 2))

    def set_random_seed(self, seed: int) -> None:
        self.policy.set_random_seed(seed)

    def __call__(self, image: np.ndarray, keypoints: np.ndarray) -> Any:
        self.given = np.concatenate([self.given, keypoints])
        return self.policy(image=image, keypoints=keypoints)


@pytest.mark.parametrize("mirrored", [False, True])
def test_missing_landmarks_never_enter_the_policy_and_stay_missing(mirrored: bool) -> None:
    work = job(transform("HorizontalFlip") if mirrored else (), jitter=0)
    missing = np.arange(15) % 5 == 1
    example = example_of(FACE + 20, ~missing)
    # Were what is stored there taken for a place, this would be one within the frame.
    example.landmarks[missing] = [65, 65]
    policy = Recording(policy_of(work))
    image = np.zeros((140, 140, 1), np.uint8)
    _, landmarks, visible = augmented_view(example, image, work, policy, 0)
    assert len(policy.given) == 12 + 3  # and the three of the probe
    expected = missing[list(KAGGLE_15.mirror)] if mirrored else missing
    assert np.array_equal(visible, ~expected)
    assert (landmarks[expected] == 0).all() and (landmarks[~expected] != 0).all()


def test_a_picture_without_landmarks() -> None:
    work = job(DEFAULT.emotion.policy)
    image = np.zeros((48, 48, 1), np.uint8)
    for view in range(5):
        crop, landmarks, visible = augmented_view(
            Example("a", b""), image, work, policy_of(work), view
        )
        assert crop.shape == (96, 96, 1) and landmarks.shape == (0, 2) and visible.shape == (0,)


@pytest.mark.parametrize("name", ["CoarseDropout", "XYMasking", "GridDropout"])
def test_holes_in_the_picture_drop_no_point(name: str) -> None:
    arguments = {"num_masks_x": 3, "num_masks_y": 3, "mask_x_length": 20, "mask_y_length": 20}
    work = job(transform(name, **arguments if name == "XYMasking" else {}), jitter=0)
    policy = policy_of(work)
    image = np.full((140, 140, 1), 200, np.uint8)
    for view in range(10):
        _, _, visible = augmented_view(example_of(FACE + 20), image, work, policy, view)
        assert visible.all()


def test_a_policy_that_loses_points_is_refused() -> None:
    class Loses(Recording):
        def __call__(self, image: np.ndarray, keypoints: np.ndarray) -> Any:
            return super().__call__(image, keypoints[1:])

    work = job(())
    with pytest.raises(GrimaceError, match=r"dropped keypoints of a: .*augment\.landmarks\.policy"):
        augmented_view(
            example_of(FACE), np.zeros((99, 99, 1), np.uint8), work, Loses(policy_of(work)), 0
        )


# What decides a view


def test_views_differ_and_depend_on_seed_id_and_number_alone() -> None:
    work = job(DEFAULT.landmarks.policy)
    image = np.random.default_rng(0).integers(0, 256, (140, 140, 1), np.uint8)
    policy = policy_of(work)

    def view(number: int, id: str = "a", job: Job = work, policy: Any = policy) -> bytes:
        return augmented_view(example_of(FACE, id=id), image, job, policy, number)[0].tobytes()

    first = view(0)
    others = [view(1), view(2), view(0, id="b"), view(0, job=Job(**{**vars(work), "seed": 7}))]
    assert len({first, *others}) == 5
    assert view(0) == first
    assert view(0, policy=policy_of(work)) == first


@pytest.mark.parametrize("channels", [1, 3])
def test_plain_view(channels: int) -> None:
    task = Task(dataset="synthetic", size=96, channels=channels, margin=0.15)
    points = FACE + 20
    example = example_of(points, np.arange(15) != 4)
    image = np.repeat(dot((140, 140), points[10], 2.0), channels, 2)
    crop, landmarks, visible = plain_view(example, image, task)
    assert crop.shape == (96, 96, channels) and crop.dtype == np.uint8
    assert np.abs(position(crop) - (landmarks[10] * 96 - 0.5)).max() < 0.1
    assert np.array_equal(visible, example.visible) and (landmarks[4] == 0).all()
    assert landmarks.dtype == np.float32


# The stage


def faces(start: int, count: int) -> list[Example]:
    """Noise with points, now and then one missing, a class and an official side."""
    made = []
    for number in range(start, start + count):
        rng = np.random.default_rng(number)
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (70, 90), np.uint8)).save(file, "PNG")
        visible = rng.random(15) < 0.9
        made.append(
            Example(
                f"face-{number}",
                file.getvalue(),
                emotion=number % 7,
                landmarks=np.where(visible[:, None], FACE * 0.6 + 5, 0).astype(np.float32),
                visible=visible,
                official_split=("train", "train", "val", "test")[number % 4],
            )
        )
    return made


def prepare(root: Path, examples: list[Example], workers: int) -> None:
    """What the stages before leave: parameters, clean examples in parts of three, and the index."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["augment"]["workers"] = workers
    for task in ("emotion", "landmarks"):
        raw["tasks"][task] |= {"dataset": "synthetic", "size": 32}
        raw["augment"][task]["views"] = 3
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    clean, split = root / "data/clean/synthetic", root / "data/split/synthetic"
    clean.mkdir(parents=True)
    split.mkdir(parents=True)
    write_examples(examples, clean)
    params = Split(seed=0, val=0.2, test=0.2)
    make_index(examples, params).to_parquet(split / "index.parquet")


FACES = faces(0, 14)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which both tasks were augmented, by one process for landmarks."""
    root = tmp_path_factory.mktemp("stage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "PART_ROWS", 3)
        patch.chdir(root)
        prepare(root, FACES, workers=1)
        for task in ("landmarks", "emotion"):
            patch.setattr(sys, "argv", ["augment", "--task", task])
            main()
    return root


def job_of(root: Path, task: Any, out: Path) -> Job:
    params = load_params(root / "params.yaml")
    crop, settings = params.tasks.named(task), params.augment.named(task)
    clean = root / "data/clean" / crop.dataset
    return Job(task, crop, settings, params.augment.seed, clean, out)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_two_processes_write_the_same_bytes(stage: Path, tmp_path: Path) -> None:
    work = job_of(stage, "landmarks", tmp_path)
    assert len(parts(work.clean)) == 5
    index = usable(work.clean, stage / "data/split/synthetic/index.parquet", "landmarks")
    write_shards(work, index, workers=2)
    one, two = files(stage / "data/augment/landmarks"), files(tmp_path)
    assert one.keys() == two.keys() and len(one) == 1 + 1 + 3 * 3 + 1 + 3
    for name, content in one.items():
        assert content == two[name], name


@pytest.mark.parametrize("task", ["landmarks", "emotion"])
def test_every_view_is_what_the_image_alone_would_give(stage: Path, task: Any) -> None:
    """So that neither other images, nor their order, nor what a worker did before, change it."""
    work = job_of(stage, task, stage / "data/augment" / task)
    for view in range(3):
        shard = read_view(work.out, "train", view)
        for row, id in reversed(list(enumerate(shard.ids))):
            (example,) = (example for example in FACES if example.id == id)
            image = decode(example.image, 1)
            crop, landmarks, visible = augmented_view(example, image, work, policy_of(work), view)
            assert np.array_equal(shard.images[row], crop)
            if shard.landmarks is not None and shard.visible is not None:
                assert np.array_equal(shard.landmarks[row], landmarks)
                assert np.array_equal(shard.visible[row], visible)
            if shard.emotions is not None:
                assert shard.emotions[row] == example.emotion


@pytest.mark.parametrize("task", ["landmarks", "emotion"])
def test_validation_is_only_cropped_and_test_is_not_there(stage: Path, task: Any) -> None:
    work = job_of(stage, task, stage / "data/augment" / task)
    shard = read_view(work.out, "val")
    wanted = [example for example in FACES if example.official_split == "val"]
    assert shard.ids.tolist() == [example.id for example in wanted]
    for row, example in enumerate(wanted):
        crop, landmarks, visible = plain_view(example, decode(example.image, 1), work.task)
        assert np.array_equal(shard.images[row], crop)
        if shard.landmarks is not None and shard.visible is not None:
            assert np.array_equal(shard.landmarks[row], landmarks)
            assert np.array_equal(shard.visible[row], visible)
        if shard.emotions is not None:
            assert shard.emotions[row] == example.emotion
    assert {path.name for path in work.out.iterdir()} == {"train", "val", "meta.json"}
    with pytest.raises(FileNotFoundError):
        read_view(work.out, "val", 1)
    train = read_view(work.out, "train")
    assert train.ids.tolist() == [e.id for e in FACES if e.official_split == "train"]


def test_meta(stage: Path) -> None:
    meta = read_meta(stage / "data/augment/landmarks")
    assert (meta["task"], meta["dataset"], meta["size"]) == ("landmarks", "synthetic", 32)
    assert (meta["views"], meta["counts"]) == (3, {"train": 8, "val": 3})
    assert (meta["scheme"], meta["points"]) == ("kaggle-15", 15)
    assert read_meta(stage / "data/augment/emotion")["classes"] == list(EMOTIONS)


def test_a_sheet_to_look_at(stage: Path) -> None:
    for task in ("landmarks", "emotion"):
        assert Image.open(stage / "reports/augment" / task / "views.png").size[0] > 100


def test_unlabelled_examples_are_left_out(tmp_path: Path) -> None:
    bare = [
        Example(f"bare-{side}", FACES[0].image, official_split=side) for side in ("train", "val")
    ]
    prepare(tmp_path, bare + FACES[:8], workers=1)
    clean, split = tmp_path / "data/clean/synthetic", tmp_path / "data/split/synthetic"
    for task in ("emotion", "landmarks"):
        index = usable(clean, split / "index.parquet", task)  # type: ignore[arg-type]
        assert list(index["id"]) == [example.id for example in FACES[:8]]
        for _, rows in index.groupby("split"):
            assert list(rows["row"]) == list(range(len(rows)))


def test_a_dataset_without_labels_for_the_task(tmp_path: Path) -> None:
    prepare(tmp_path, [Example("a", b"", emotion=1, official_split="train")], workers=1)
    clean, split = tmp_path / "data/clean/synthetic", tmp_path / "data/split/synthetic"
    with pytest.raises(GrimaceError, match=r"no labels for task landmarks: set tasks\.landmarks"):
        usable(clean, split / "index.parquet", "landmarks")


def test_a_side_without_labels(tmp_path: Path) -> None:
    prepare(tmp_path, [FACES[0], FACES[1]], workers=1)
    work = job_of(tmp_path, "emotion", tmp_path)
    index = usable(work.clean, tmp_path / "data/split/synthetic/index.parquet", "emotion")
    with pytest.raises(GrimaceError, match="synthetic: the val side has no labels for emotion"):
        write_shards(work, index, workers=1)


FULL_DISK = """
from pathlib import Path
from pipelines.augment import Job, usable, write_shards
from pipelines.cli import run
from pipelines.params import load_params

def main():
    params = load_params()
    clean = Path("data/clean/synthetic")
    index = usable(clean, Path("data/split/synthetic/index.parquet"), "emotion")
    task = params.tasks.emotion.model_copy(update={"size": 128})  # 131 kB a view
    job = Job("emotion", task, params.augment.emotion, 1, clean, Path("tiny"))
    write_shards(job, index, workers=1)

if __name__ == "__main__":
    run(main)
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_a_full_disk_is_told_before_any_work(tmp_path: Path) -> None:
    """Not by a worker that dies of SIGBUS in the middle of it."""
    prepare(tmp_path, FACES, workers=1)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "full_disk.py").write_text(FULL_DISK)
    mount = "mount -t tmpfs -o size=256k none tiny"
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} && exec {sys.executable} full_disk.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare:" in result.stderr or "mount:" in result.stderr:
        pytest.skip("may not mount a file system of its own")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: the disk is full")


def test_a_bad_policy_stops_the_stage_before_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["augment"]["emotion"]["policy"][0]["transform"] = "Flop"
    (tmp_path / "params.yaml").write_text(json.dumps(raw))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["augment", "--task", "emotion"])
    with pytest.raises(GrimaceError, match=r"augment\.emotion\.policy\.0\.transform"):
        main()
