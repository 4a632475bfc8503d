import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from dvc.repo import Repo

from pipelines import select
from pipelines.cli import GrimaceError
from pipelines.heldout import Faces
from pipelines.measures import bootstrap_weights
from pipelines.params import Evaluate, SelectTask
from pipelines.split import side_of

ROOT = Path(__file__).parents[2]
ACCURACY = SelectTask(metric="accuracy", higher_is_better=True)
NME = SelectTask(metric="nme_interocular", higher_is_better=False)
SETTINGS = Evaluate(resamples=300, seed=1, gallery=1)


def scores(task: str = "emotion", **figures: float) -> dict:
    bounds = {name: [value - 0.1, value + 0.1] for name, value in figures.items()}
    return {"task": task, "n": 9, **figures, "ci95": bounds}


def test_highest_accuracy_is_first():
    found = select.rank(
        {"a": scores(accuracy=0.5), "b": scores(accuracy=0.7), "c": scores(accuracy=0.6)}, ACCURACY
    )
    assert list(found["model"]) == ["b", "c", "a"]
    assert list(found["accuracy"]) == [0.7, 0.6, 0.5]
    assert list(found["low"]) == pytest.approx([0.6, 0.5, 0.4])
    assert list(found["high"]) == pytest.approx([0.8, 0.7, 0.6])
    assert list(found["n"]) == [9, 9, 9]


def test_lowest_error_is_first():
    figures = {"a": 0.07, "b": 0.05, "c": 0.06}
    measured = {name: scores("landmarks", nme_interocular=value) for name, value in figures.items()}
    assert list(select.rank(measured, NME)["model"]) == ["b", "c", "a"]


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_equals_are_ordered_by_name(higher_is_better):
    settings = SelectTask(metric="accuracy", higher_is_better=higher_is_better)
    measured = {name: scores(accuracy=0.5) for name in ("c", "a", "b")}
    assert list(select.rank(measured, settings)["model"]) == ["a", "b", "c"]


@pytest.mark.parametrize("metric", ["acuracy", "n", "task", "ci95", "nme_box_yaw_mean"])
def test_what_is_not_measured_is_named_with_its_key(metric):
    settings = SelectTask(metric=metric, higher_is_better=True)
    with pytest.raises(GrimaceError) as raised:
        # The mean over bins of yaw has no interval.
        measured = scores(accuracy=0.5, macro_f1=0.4) | {"nme_box_yaw_mean": 0.1}
        select.rank({"a": measured}, settings)
    message = str(raised.value)
    assert message.startswith(f"params.yaml: select.emotion.metric: {metric!r} ")
    assert message.endswith("choose among accuracy, macro_f1")


def emotion_faces(truth: np.ndarray, groups: np.ndarray) -> Faces:
    images = np.zeros((len(truth), 1, 1, 1), np.uint8)
    ids = np.arange(len(truth)).astype(str)
    return Faces(ids, groups, images, truth, None, None, {})


def test_lead_in_accuracy_is_positive_for_the_better():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 7, 80)
    groups = rng.integers(0, 20, 80).astype(str)
    faces = emotion_faces(truth, groups)
    good, poor = (
        np.eye(7)[np.where(rng.random(80) < share, truth, (truth + 1) % 7)] for share in (0.9, 0.4)
    )
    low, high = select.lead(faces, good, poor, SETTINGS)
    assert 0 < low < high
    assert select.lead(faces, poor, good, SETTINGS) == pytest.approx([-high, -low])
    assert select.lead(faces, good, good, SETTINGS) == [0, 0]

    # Face by face, on the same resamples of people.
    right = [(a.argmax() == t, b.argmax() == t) for a, b, t in zip(good, poor, truth, strict=True)]
    drawn = []
    for weights in np.concatenate(list(bootstrap_weights(groups, SETTINGS))):
        leads = [w * (int(a) - int(b)) for w, (a, b) in zip(weights, right, strict=True)]
        drawn.append(sum(leads) / sum(weights))
    assert [low, high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1e-6)


def test_lead_in_error_is_negative_for_the_better():
    rng = np.random.default_rng(4)
    truth = rng.uniform(0.2, 0.8, (30, 68, 2)).astype(np.float32)
    truth[:, 36], truth[:, 45] = (0.3, 0.4), (0.7, 0.4)
    visible = np.ones((30, 68), bool)
    visible[0, 36] = False  # no inter-ocular distance: on neither side of the comparison
    ids = np.arange(30).astype(str)
    faces = Faces(ids, ids, np.zeros((30, 1, 1, 1), np.uint8), None, truth, visible, {})
    near, far = (truth + np.array([shift, 0]) for shift in (0.004, 0.02))
    low, high = select.lead(faces, near, far, SETTINGS)
    assert [low, high] == pytest.approx([-0.016 / 0.4] * 2, rel=1e-3)
    assert select.lead(faces, far, near, SETTINGS) == pytest.approx([-high, -low])


# The stage


@pytest.mark.parametrize("task", ["emotion", "landmarks"])
def test_the_better_model_becomes_the_candidate(selected, task):
    root = selected.root
    report = json.loads((root / "reports" / "select" / f"{task}.json").read_text())
    assert report["lead_metric"] == report["metric"]
    values = {
        name: json.loads((root / f"reports/evaluate/{task}/{name}/scores.json").read_text())
        for name in ("plain", "compact")
    }
    metric = {"emotion": "accuracy", "landmarks": "nme_interocular"}[task]
    best = (max if task == "emotion" else min)(values, key=lambda name: values[name][metric])
    assert best == "compact"
    assert (report["task"], report["candidate"], report["metric"]) == (task, best, metric)
    assert report["value"] == values[best][metric]
    assert [row["model"] for row in report["ranking"]] == ["compact", "plain"]
    assert report["lead_ci95"].keys() == {"plain"}
    sign = 1 if task == "emotion" else -1
    assert all(sign * bound > 0 for bound in report["lead_ci95"]["plain"])
    chosen = (root / "runs" / task / best / "model.keras").read_bytes()
    assert (root / "deploy" / "candidate" / f"{task}.keras").read_bytes() == chosen


def test_the_lead_says_what_it_is_in_whatever_decides(selected, tmp_path):
    here = copied(selected, tmp_path, "runs", "reports/evaluate", "data/augment", "data/split")
    raw = yaml.safe_load((tmp_path / "params.yaml").read_text())
    raw["select"]["emotion"]["metric"] = "macro_f1"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    here.call(select.main, "--task", "emotion")
    report = json.loads((tmp_path / "reports/select/emotion.json").read_text())
    before = json.loads((selected.root / "reports/select/emotion.json").read_text())
    assert (report["metric"], report["lead_metric"]) == ("macro_f1", "accuracy")
    assert report["lead_ci95"] == before["lead_ci95"]


def copied(world, folder: Path, *parts: str):
    for part in ("params.yaml", *parts):
        source, target = world.root / part, folder / part
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return type(world)(folder, world.params, world.faces)


def test_test_faces_are_not_needed_and_test_scores_not_read(selected, tmp_path):
    here = copied(selected, tmp_path, "runs", "reports/evaluate", "data/augment/emotion/val")
    whole = pd.read_parquet(selected.root / "data/split/synthetic/index.parquet")
    index = tmp_path / "data/split/synthetic/index.parquet"
    index.parent.mkdir(parents=True)
    whole[whole["split"] == "val"].to_parquet(index)
    assert {side_of(group, here.params.split) for group in whole["group"]} > {"val"}
    poison = tmp_path / "reports" / "verify" / "emotion"
    poison.mkdir(parents=True)
    (poison / "test.json").write_text("no JSON")
    here.call(select.main, "--task", "emotion")
    report = "reports/select/emotion.json"
    assert (tmp_path / report).read_text() == (selected.root / report).read_text()


def test_a_model_that_left_the_parameters_is_not_chosen(selected, tmp_path):
    here = copied(selected, tmp_path, "runs", "reports/evaluate", "data/augment", "data/split")
    former = tmp_path / "reports" / "evaluate" / "emotion" / "former"
    shutil.copytree(former.with_name("compact"), former)
    better = json.loads((former / "scores.json").read_text()) | {"accuracy": 1.0}
    (former / "scores.json").write_text(json.dumps(better))
    here.call(select.main, "--task", "emotion")
    report = json.loads((tmp_path / "reports" / "select" / "emotion.json").read_text())
    assert report["candidate"] == "compact"


@pytest.mark.parametrize("name", ["select", "compare"])
def test_dvc_runs_it_again_when_a_job_leaves_the_parameters(name, tmp_path, monkeypatch):
    """The stage is the real one of dvc.yaml, less what it depends on besides params.yaml."""
    monkeypatch.chdir(tmp_path)
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][name]
    stage["do"] |= {"deps": []}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {name: stage}}))
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump(params))
    for written in (*stage["do"]["outs"], *stage["do"].get("metrics", ())):
        path = Path(written.replace("${key}", "emotion"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    with Repo.init(no_scm=True) as repo:
        repo.commit(f"{name}@emotion", force=True)
        assert repo.status([f"{name}@emotion"]) == {}
    del params["train"]["jobs"]["emotion-plain"]
    Path("params.yaml").write_text(yaml.safe_dump(params))
    with Repo() as repo:
        (changed,) = repo.status([f"{name}@emotion"])[f"{name}@emotion"]
    assert "train.jobs" in changed["changed deps"]["params.yaml"]


def test_nothing_evaluated(selected, tmp_path):
    here = copied(selected, tmp_path)
    with pytest.raises(GrimaceError, match="no scores of compact, plain; run `dvc repro evaluate"):
        here.call(select.main, "--task", "emotion")
