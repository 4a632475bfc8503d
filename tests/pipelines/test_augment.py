import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from models.schemes import EMOTIONS, KAGGLE_15
from pipelines import augment
from pipelines.augment import copies_of, main, usable, write_shards
from pipelines.cli import GrimaceError
from pipelines.crops import decode
from pipelines.datasets import table
from pipelines.datasets.example import Example
from pipelines.datasets.table import parts, write_examples
from pipelines.params import load_params
from pipelines.shards import read_meta, read_view
from pipelines.views import Recipe, augmented_views, build_policy, plain_view

ROOT = Path(__file__).parents[2]
POINTS = np.random.default_rng(9).uniform(15, 60, (KAGGLE_15.size, 2))


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
                landmarks=np.where(visible[:, None], POINTS, 0).astype(np.float32),
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
    index = [(example.id, example.official_split) for example in examples]
    pd.DataFrame(index, columns=["id", "split"]).to_parquet(split / "index.parquet")


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


def recipe_of(root: Path, task: Any, **settings: Any) -> Recipe:
    params = load_params(root / "params.yaml")
    changed = params.augment.named(task).model_copy(update=settings)
    return Recipe(task, params.tasks.named(task), changed, params.augment.seed)


def index_of(root: Path, task: Any) -> pd.DataFrame:
    return usable(root / "data/clean/synthetic", root / "data/split/synthetic/index.parquet", task)


def written(root: Path, task: Any, out: Path, **options: Any) -> Path:
    """The shards of what `prepare` left in a folder, in another, with their digests in a third."""
    out.mkdir()
    digests = out.with_name(f"{out.name}-digests")
    digests.mkdir()
    settings = options.pop("settings", {})
    recipe = recipe_of(root, task, **settings)
    write_shards(recipe, index_of(root, task), out, 1, digests=digests, **options)
    return out


def of_the_stage(stage: Path, task: str) -> tuple[Path, Path]:
    """The shards and digests that the stage has left."""
    return stage / "data/augment" / task, stage / "data/digests" / task


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_two_processes_write_the_same_bytes(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment, "CHUNK_BYTES", 2 * 3 * 32 * 32)
    assert len(parts(stage / "data/clean/synthetic")) == 5
    write_shards(recipe_of(stage, "landmarks"), index_of(stage, "landmarks"), tmp_path, workers=2)
    one, two = files(stage / "data/augment/landmarks"), files(tmp_path)
    assert one.keys() == two.keys() and len(one) == 1 + 2 + 3 * 3 + 2 + 3
    for name, content in one.items():
        assert content == two[name], name


@pytest.mark.parametrize("task", ["landmarks", "emotion"])
def test_every_view_is_what_the_image_alone_would_give(stage: Path, task: Any) -> None:
    """So that neither other images, nor their order, nor what a worker did before, change it."""
    work = recipe_of(stage, task)
    policy = build_policy(work.settings, work.task, work.name)
    for view in range(3):
        shard = read_view(stage / "data/augment" / task, "train", view)
        for row, id in reversed(list(enumerate(shard.ids))):
            (example,) = (example for example in FACES if example.id == id)
            image = decode(example.image, 1)
            crop, landmarks, visible = augmented_views(example, image, work, policy)[view]
            assert np.array_equal(shard.images[row], crop)
            if shard.landmarks is not None and shard.visible is not None:
                assert np.array_equal(shard.landmarks[row], landmarks)
                assert np.array_equal(shard.visible[row], visible)
            if shard.emotions is not None:
                assert shard.emotions[row] == example.emotion


@pytest.mark.parametrize("task", ["landmarks", "emotion"])
def test_validation_is_only_cropped_and_test_is_not_there(stage: Path, task: Any) -> None:
    work, out = recipe_of(stage, task), stage / "data/augment" / task
    shard = read_view(out, "val")
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
    assert {path.name for path in out.iterdir()} == {"train", "val", "meta.json"}
    with pytest.raises(FileNotFoundError):
        read_view(out, "val", 1)
    train = read_view(out, "train")
    assert train.ids.tolist() == [e.id for e in FACES if e.official_split == "train"]


def test_meta(stage: Path) -> None:
    meta = read_meta(stage / "data/augment/landmarks")
    assert (meta["task"], meta["dataset"], meta["size"]) == ("landmarks", "synthetic", 32)
    assert (meta["views"], meta["counts"]) == (3, {"train": 8, "val": 3})
    assert (meta["policy"], meta["left_out_by_weight"], meta["added_by_balance"]) == ("V4", 0, 0)
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
    for task in ("emotion", "landmarks"):
        assert list(index_of(tmp_path, task)["id"]) == [example.id for example in FACES[:8]]


def test_a_dataset_without_labels_for_the_task(tmp_path: Path) -> None:
    prepare(tmp_path, [Example("a", b"", emotion=1, official_split="train")], workers=1)
    with pytest.raises(GrimaceError, match=r"no labels for task landmarks: set tasks\.landmarks"):
        index_of(tmp_path, "landmarks")


def test_a_side_without_labels(tmp_path: Path) -> None:
    prepare(tmp_path, [FACES[0], FACES[1]], workers=1)
    with pytest.raises(GrimaceError, match="synthetic: the val side has no labels for emotion"):
        written(tmp_path, "emotion", tmp_path / "out")


def test_a_test_side_without_labels_is_refused_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its examples are there, as `split` asks, but none has points."""
    bare = [
        replace(face, visible=np.zeros(15, bool)) if face.official_split == "test" else face
        for face in FACES
    ]
    prepare(tmp_path, bare, workers=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["augment", "--task", "landmarks"])
    with pytest.raises(GrimaceError, match="synthetic: the test side has no labels for landmarks"):
        main()
    assert not Path("data/augment/landmarks").exists()


# Weights


def test_weights_and_what_is_left_out(tmp_path: Path) -> None:
    weights = [0.0, 0.25, 0.0, 1.0] * 3  # sides: train, train, val, test
    faces_ = [replace(face, weight=w) for face, w in zip(FACES[:12], weights, strict=True)]
    faces_[4] = replace(faces_[4], weight=1.0)
    faces_[5] = replace(faces_[5], official_split="out")
    prepare(tmp_path, faces_, workers=1)
    out = written(tmp_path, "landmarks", tmp_path / "out")
    train, val = read_view(out, "train", 2), read_view(out, "val")
    assert train.ids.tolist() == ["face-1", "face-4", "face-9"]
    assert train.weights.tolist() == [0.25, 1, 0.25] and train.weights.dtype == np.float32
    assert val.ids.tolist() == ["face-2", "face-6", "face-10"]
    assert val.weights.tolist() == [1, 1, 1]
    meta = read_meta(out)
    assert (meta["counts"], meta["left_out_by_weight"]) == ({"train": 3, "val": 3}, 2)


# Balancing


def test_copies_fill_classes_up_and_change_nothing_else(stage: Path, tmp_path: Path) -> None:
    """Trained on are face-0, 1, 4, 5, 8, 9, 12, 13: two are 1 (disgust), two are 5 (sad)."""
    plain = stage / "data/augment/emotion"
    settings = {"balance": {"disgust": 5, "sad": 1}}
    out = written(stage, "emotion", tmp_path / "out", settings=settings)
    before, after = read_view(plain, "train", 1), read_view(out, "train", 1)
    assert before.emotions is not None and after.emotions is not None
    assert np.bincount(before.emotions, minlength=7).tolist() == [1, 2, 1, 0, 1, 2, 1]
    assert np.bincount(after.emotions, minlength=7).tolist() == [1, 5, 1, 0, 1, 2, 1]
    first = ~pd.Series(after.ids).duplicated().to_numpy()
    assert np.array_equal(after.ids[first], before.ids)
    assert np.array_equal(after.images[first], before.images)
    of_disgust = after.images[after.emotions == 1]
    assert len({image.tobytes() for image in of_disgust}) == 5
    assert sorted(pd.Series(after.ids[after.emotions == 1]).value_counts()) == [2, 3]
    assert read_meta(out)["added_by_balance"] == 3 and read_meta(out)["counts"]["train"] == 11
    for name, content in files(plain / "val").items():
        assert files(out / "val")[name] == content
    augment.draw_sheet(out, 3, tmp_path / "sheet.png")


def test_the_largest_class_is_what_the_others_are_filled_up_to(stage: Path) -> None:
    index = index_of(stage, "emotion")
    copies = copies_of(index, "largest", seed=1)
    train = (index["split"] == "train").to_numpy()
    total = np.bincount(index["emotion"][train], copies[train], minlength=7)
    assert total.tolist() == [2, 2, 2, 0, 2, 2, 2]  # one class is not there at all
    assert (copies[~train] == 1).all()


def test_who_is_copied_hardly_changes_when_images_are_added() -> None:
    def plan(ids: list[str]) -> pd.DataFrame:
        return pd.DataFrame({"id": ids, "split": "train", "emotion": 3})

    ids = [f"face-{number}" for number in range(200)]
    before = copies_of(plan(ids), {"happy": 500}, seed=1)
    assert before.sum() == 500 and set(before) == {2, 3}
    after = copies_of(plan(["new-0", *ids, "new-1"]), {"happy": 505}, seed=1)
    assert after.sum() == 505
    assert (before != after[1:-1]).sum() <= 3
    assert (copies_of(plan(ids), {"happy": 500}, seed=2) != before).any()


def test_a_class_without_images_cannot_be_filled_up(stage: Path, tmp_path: Path) -> None:
    with pytest.raises(GrimaceError, match="no training image is happy"):
        written(stage, "emotion", tmp_path / "out", settings={"balance": {"happy": 5}})


# What an earlier run left


def count_made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the ids of the rows that are made, not taken over."""
    made: list[str] = []

    def make(recipe: Recipe, policy: Any, rows: list[Any]) -> Any:
        made.extend(row.example.id for row in rows)
        return make_rows(recipe, policy, rows)

    make_rows = augment.make_rows
    monkeypatch.setattr(augment, "make_rows", make)
    return made


@pytest.mark.parametrize("task", ["landmarks", "emotion"])
def test_added_images_change_no_other_and_only_they_are_made(
    task: Any, stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "PART_ROWS", 3)
    monkeypatch.setattr(augment, "CHUNK_BYTES", 4 * 3 * 32 * 32)
    more = sorted([*FACES[:3], *FACES[4:], *faces(20, 6)], key=lambda face: face.id)
    prepare(tmp_path, more, workers=1)
    made = count_made(monkeypatch)
    old, digests = of_the_stage(stage, task)
    taken_over = written(tmp_path, task, tmp_path / "with", previous=(old, digests))
    new = [e.id for e in more if e.id in {f"face-{n}" for n in range(20, 26)}]
    assert made == [id for id in new if id not in ("face-23",)]  # which is for the test
    anew = written(tmp_path, task, tmp_path / "without")
    assert files(taken_over) == files(anew)
    assert files(tmp_path / "with-digests") == files(tmp_path / "without-digests")
    for side in ("train", "val"):
        for view in range(3 if side == "train" else 1):
            first, second = read_view(old, side, view), read_view(anew, side, view)
            where = [second.ids.tolist().index(id) for id in first.ids]
            assert np.array_equal(second.images[where], first.images)
            if first.landmarks is not None and second.landmarks is not None:
                assert np.array_equal(second.landmarks[where], first.landmarks)


@pytest.mark.parametrize(
    ("change", "remade"),
    [
        ({}, 0),
        ({"policy": "V3"}, 8),  # train only
        ({"jitter_shift": 0.01}, 8),
        ({"views": 2}, 8),
        ({"balance": {"disgust": 4}}, 2),
    ],
)
def test_what_makes_a_row_another(
    change: dict[str, Any],
    remade: int,
    stage: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = count_made(monkeypatch)
    old = of_the_stage(stage, "emotion")
    after = written(stage, "emotion", tmp_path / "out", settings=change, previous=old)
    assert len(made) == remade
    assert files(after) == files(written(stage, "emotion", tmp_path / "a", settings=change))


def test_changed_pixels_labels_or_code_make_a_row_another(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = list(FACES)
    changed[0] = replace(FACES[0], image=FACES[3].image)
    changed[1] = replace(FACES[1], landmarks=FACES[1].landmarks + 1)
    changed[2] = replace(FACES[2], emotion=3)
    changed[4] = replace(FACES[4], weight=0.5)  # which changes no pixel
    prepare(tmp_path, changed, workers=1)
    made = count_made(monkeypatch)
    old = of_the_stage(stage, "landmarks")
    out = written(tmp_path, "landmarks", tmp_path / "out", previous=old)
    assert made == ["face-0", "face-1", "face-2"]
    assert read_view(out, "train").weights.tolist() == [1, 1, 0.5, 1, 1, 1, 1, 1]
    made.clear()
    (tmp_path / "other.py").write_text("")
    monkeypatch.setattr(augment, "SOURCES", (*augment.SOURCES, str(tmp_path / "other.py")))
    again = written(stage, "landmarks", tmp_path / "all", previous=old)
    assert len(made) == 11
    assert files(again) == files(old[0])  # so nothing has to be trained again
    assert files(tmp_path / "all-digests") != files(old[1])


def test_a_killed_run_leaves_the_old_shards_and_the_next_the_same_bytes(
    stage: Path, tmp_path: Path
) -> None:
    root = tmp_path / "killed"
    shutil.copytree(stage, root)
    expected = files(root / "data/augment/landmarks")
    raw = yaml.safe_load((root / "params.yaml").read_text())
    raw["augment"]["landmarks"] |= {"views": 500, "jitter_shift": 0.01}
    raw["augment"]["workers"] = 2
    (root / "params.yaml").write_text(yaml.safe_dump(raw))

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pipelines.augment", "--task", "landmarks"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.DEVNULL)

    process = start()
    partial = root / "data/augment/.landmarks.partial"
    while not (partial / "val/images-00.npy").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert files(root / "data/augment/landmarks") == expected
    (root / "params.yaml").write_text((stage / "params.yaml").read_text())
    shutil.rmtree(root / "data/augment/landmarks")
    assert start().wait() == 0
    assert files(root / "data/augment/landmarks") == expected
    assert not partial.exists()


# On a cluster

CLUSTER = """
import fcntl, json, signal, socket, struct, sys, time
from multiprocessing import Process
from threading import Thread
import psutil
from ray.cluster_utils import Cluster
from pipelines import augment
from pipelines.cli import GrimaceError
from pipelines.fanout import fan_out

def raise_loopback():
    request = struct.pack("16sh", b"lo", 1)  # IFF_UP
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS

def kill_one_at_work(killed):
    while not killed:
        for process in psutil.process_iter(["cmdline"]):  # of this namespace: of this test
            if (process.info["cmdline"] or [""])[0].startswith("ray::_call"):
                process.kill()
                killed.append(process.pid)
                break
        time.sleep(0.05)

def refuse(number):
    raise GrimaceError(f"no {number}")

def main():
    raise_loopback()
    node = {"num_cpus": 1, "object_store_memory": 2**27}
    cluster = Cluster(True, head_node_args=node)
    cluster.add_node(**node)
    with open("params.yaml") as file:
        text = file.read()
    with open("params.yaml", "w") as file:
        file.write(text.replace("address: null", f"address: {cluster.address}"))
    killed = []
    Thread(target=kill_one_at_work, args=[killed], daemon=True).start()
    sys.argv = ["augment", "--task", "landmarks"]
    augment.main()
    try:
        list(fan_out(refuse, [1, 2], workers=1, address=cluster.address))
    except GrimaceError as error:
        refused = str(error)
    print(json.dumps({"killed": len(killed), "refused": refused}))

if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_two_ray_workers_one_killed_write_the_same_bytes(tmp_path: Path) -> None:
    """In name spaces of their own: Ray listens on all interfaces, and all of it must end here."""
    prepare(tmp_path, faces(0, 80), workers=1)
    raw = yaml.safe_load((tmp_path / "params.yaml").read_text())
    raw["augment"]["landmarks"]["views"] = 60
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    expected = files(written(tmp_path, "landmarks", tmp_path / "here"))
    (tmp_path / "cluster.py").write_text(CLUSTER)
    own = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.getuid():
        own.append("--map-root-user")
    if subprocess.run([*own, "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not make name spaces")
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as sockets:  # whose paths must be short
        result = subprocess.run(
            [*own, sys.executable, "cluster.py"],
            cwd=tmp_path,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": sockets, "RAY_USAGE_STATS_ENABLED": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == {"killed": 1, "refused": "no 1"}
    assert files(tmp_path / "data/augment/landmarks") == expected


# What cannot work


FULL_DISK = """
from pathlib import Path
from pipelines.augment import usable, write_shards
from pipelines.cli import run
from pipelines.params import load_params
from pipelines.views import Recipe

def main():
    params = load_params()
    clean = Path("data/clean/synthetic")
    index = usable(clean, Path("data/split/synthetic/index.parquet"), "emotion")
    task = params.tasks.emotion.model_copy(update={"size": 128})  # 131 kB a view
    recipe = Recipe("emotion", task, params.augment.emotion, 1)
    write_shards(recipe, index, Path("tiny"), workers=1)

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
    raw["augment"]["emotion"]["policies"]["V4"][0]["transform"] = "Flop"
    (tmp_path / "params.yaml").write_text(json.dumps(raw))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["augment", "--task", "emotion"])
    with pytest.raises(GrimaceError, match=r"augment\.emotion\.policies\.V4\.0\.transform"):
        main()
