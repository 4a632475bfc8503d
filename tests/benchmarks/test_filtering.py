import copy
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml

from benchmarks import filtering
from pipelines.checks.faces import seed_keeps
from pipelines.cli import GrimaceError
from pipelines.crops import decode
from pipelines.datasets import synthetic
from pipelines.datasets.example import Example
from pipelines.datasets.table import write_examples
from pipelines.params import load_params

ROOT = Path(__file__).parents[2]
SEEDS = [1, 2]


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results as trainings leave them: 40 test faces, of which training holds copies of ten.

    Unfiltered is right on those ten and on every second other; cascade on every second face;
    audited on three of four, with its second seed on all.
    """
    work = tmp_path_factory.mktemp("work")
    ids = np.array([f"PrivateTest_{row}" for row in range(40)])
    truth, row = np.arange(40) % 7, np.arange(40)
    right = {"unfiltered": (row < 10) | (row % 2 == 0), "cascade": row % 2 == 0}
    training = {
        "unfiltered": np.arange(128),
        "cascade": np.arange(50),
        "audited": np.arange(10, 90),
    }
    for arm, rows in training.items():
        (work / arm / "shards/train").mkdir(parents=True)
        np.save(work / arm / "shards/train/ids.npy", np.array([f"Training_{n}" for n in rows]))
        meta = {"counts": {"train": len(rows), "val": 8}}
        (work / arm / "shards/meta.json").write_text(json.dumps(meta))
        for seed in SEEDS:
            hits = right.get(arm, (row % 4 > 0) | (seed == 2))
            answers = np.eye(7)[np.where(hits, truth, (truth + 1) % 7)]
            result = work / "results" / f"{arm}-{seed}.json"
            result.parent.mkdir(exist_ok=True)
            np.savez(result.with_suffix(".npz"), ids=ids, truth=truth, answers=answers)
            facts = {"arm": arm, "seed": seed, "training_images": len(rows), "steps": 30}
            facts |= {"epochs": 15, "best_epoch": 14, "val_accuracy": 0.5, "seconds": 90}
            result.write_text(json.dumps(facts))
    names = [*ids, *(f"Training_{n}" for n in range(128))]
    clusters = [
        "PrivateTest_" + id.split("_")[1] if int(id.split("_")[1]) < 10 else "" for id in names
    ]
    audit = work / "audited" / filtering.AUDIT
    audit.parent.mkdir(parents=True)
    pd.DataFrame({"id": names, "cluster": clusters}).to_parquet(audit)
    audit.parent.with_suffix(".json").write_text("{}")
    return work


def test_only_the_audited_arm_keeps_its_checks(given: dict[str, Any], tmp_path: Path) -> None:
    before = copy.deepcopy(given)
    arms = {arm: filtering.arm_params(given, arm) for arm in filtering.ARMS}
    assert given == before
    for arm, params in arms.items():
        path = tmp_path / f"{arm}.yaml"
        path.write_text(yaml.safe_dump(params))
        checks = load_params(path).filter.checks_of("fer2013").model_dump()
        on = {name for name, check in checks.items() if check["action"] != "off"}
        if arm != "audited":
            assert on == {"defect", "unreadable"}
    assert arms["audited"]["filter"] == given["filter"]
    assert arms["unfiltered"]["augment"] == arms["audited"]["augment"] == given["augment"]


def test_the_sieve_takes_training_images_without_a_face_and_no_others(tmp_path: Path) -> None:
    faces = list(synthetic.examples(12, 3))
    grey = cv2.imencode(".png", np.full((48, 48), 90, np.uint8))[1].tobytes()
    blank = [Example(f"blank-{n}", grey, emotion=1) for n in range(2)]
    rows = [*faces, *blank]
    (tmp_path / filtering.CLEAN).mkdir(parents=True)
    write_examples(rows, tmp_path / filtering.CLEAN)
    split = ["train"] * 8 + ["val"] * 2 + ["test"] * 2 + ["train", "test"]
    index = tmp_path / "index.parquet"
    pd.DataFrame({"id": [row.id for row in rows], "split": split}).to_parquet(index)
    filtering.sieve(index, tmp_path)
    after = pd.read_parquet(tmp_path / filtering.INDEX)["split"]
    seen = [seed_keeps(decode(row.image, 3)) for row in rows]
    expected = [
        "out" if side == "train" and not s else side for side, s in zip(split, seen, strict=True)
    ]
    assert list(after) == expected
    assert list(after[-2:]) == ["out", "test"]


def test_arms_train_for_the_same_number_of_steps(work: Path) -> None:
    job = load_params(ROOT / "params.yaml").train.jobs[filtering.JOB]
    epochs = job.at("fer2013").epochs
    small = job.model_copy(update={"batch": 2})
    jobs = {arm: filtering.resolve(arm, 3, small, None, work) for arm in filtering.ARMS}
    assert jobs["unfiltered"]["epochs"] == epochs
    for arm, images in (("unfiltered", 128), ("cascade", 50), ("audited", 80)):
        assert abs(jobs[arm]["epochs"] * images / 2 - epochs * 64) <= images / 4
        assert jobs[arm]["seed"] == 3
    assert filtering.resolve("cascade", 3, small, 100, work)["epochs"] == 4


def test_prepare_refuses_a_folder_of_other_parameters(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(given))
    (tmp_path / "work/unfiltered").mkdir(parents=True)
    settings = {"augment": {"seed": 1}}
    (tmp_path / "work/unfiltered/settings.json").write_text(json.dumps(settings))
    with pytest.raises(GrimaceError, match=r"unfiltered was prepared by other code, or"):
        filtering.prepare("unfiltered", Path("work"), threads=1, limit=None)


def test_faces_with_a_copy_in_training_have_a_column_without_them(work: Path) -> None:
    settings = load_params(ROOT / "params.yaml").evaluate
    results = filtering.compare(work, SEEDS, settings)
    assert results["faces"] == {"all": 40, "without_copies": 30}
    assert results["copied"] == {"unfiltered": 10, "cascade": 10, "audited": 0}
    means = {
        arm: [each["mean"] for each in columns.values()] for arm, columns in results["arms"].items()
    }
    assert means["unfiltered"] == [25 / 40, 15 / 30]
    assert means["cascade"] == [20 / 40, 15 / 30]
    assert means["audited"] == pytest.approx([35 / 40, (23 / 30 + 1) / 2])
    difference = results["differences"]["audited - unfiltered"]["all"]
    assert difference["mean"] == pytest.approx(10 / 40)
    assert difference["ci95"][0] < 10 / 40 < difference["ci95"][1]
    equal = results["differences"]["cascade - unfiltered"]["without_copies"]
    assert equal == {"mean": 0.0, "ci95": [0.0, 0.0]}


def test_the_page_holds_every_figure_and_no_face(work: Path, tmp_path: Path) -> None:
    settings = load_params(ROOT / "params.yaml").evaluate
    filtering.publish(filtering.compare(work, SEEDS, settings), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "results.json",
        "accuracy.png",
    }
    page = (tmp_path / "README.md").read_text()
    assert "| unfiltered | 128 | 10 | 30 (15) | 50.00% | 62.50% (" in page
    assert "| audited − unfiltered | +25.00 (" in page
    assert "| audited | 2 | 14 | 50.00% | 100.00% | 100.00% | 2 min |" in page
    assert str(work) not in page


def test_an_interval_heeds_faces_seeds_and_copies() -> None:
    settings = load_params(ROOT / "params.yaml").evaluate

    def width(values: np.ndarray, groups: np.ndarray) -> float:
        low, high = filtering.estimate(values, groups, settings)["ci95"]
        return high - low

    rng = np.random.default_rng(5)
    once = (rng.random((1, 1000)) < 0.7).astype(float)
    alone, twins = np.arange(1000), np.arange(1000) // 2
    expected = 2 * 1.96 * np.sqrt(0.7 * 0.3 / 1000)
    assert width(once, alone) == pytest.approx(expected, rel=0.15)
    assert width(np.repeat(once, 3, 0), alone) == pytest.approx(expected, rel=0.15)
    assert width(np.repeat(once[:, ::2], 2, 1), twins) > 1.25 * expected
    shifted = np.concatenate([once, np.clip(once + 0.2, 0, 1)])
    assert width(shifted, alone) > 1.25 * expected
