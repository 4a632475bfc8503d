import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from models.schemes import EMOTIONS
from pipelines import compare, evaluate
from pipelines.cli import GrimaceError
from pipelines.compare import Answers, holm, mcnemar, names_of, sign_flip
from pipelines.heldout import Faces
from pipelines.measures import bootstrap_weights
from pipelines.params import Evaluate
from pipelines.split import side_of

SETTINGS = Evaluate(resamples=200, seed=1, gallery=1)

# tests, against their definitions


def draw_right(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (rng.random(count) < 0.8).astype(float), (rng.random(count) < 0.6).astype(float)


@pytest.mark.parametrize(("count", "seed"), [(10, 0), (40, 1), (200, 2)])
def test_mcnemar_is_the_binomial_test_of_the_pairs_that_differ(count: int, seed: int) -> None:
    first, second = draw_right(count, seed)
    wins, losses = int((first > second).sum()), int((first < second).sum())
    both = wins + losses
    tail = sum(math.comb(both, k) for k in range(min(wins, losses) + 1)) / 2**both
    assert mcnemar(first, second) == pytest.approx(min(1, 2 * tail))
    assert mcnemar(first, first) == 1


def flipped_sums(first: np.ndarray, second: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The sum of differences under every exchange of whole groups."""
    names = sorted(set(groups))
    sums = [sum((first - second)[groups == name]) for name in names]
    return np.array([np.dot(signs, sums) for signs in itertools.product((1, -1), repeat=len(sums))])


def test_sign_flip_goes_through_all_exchanges_of_groups() -> None:
    rng = np.random.default_rng(3)
    groups = np.array([f"p{number}" for number in rng.integers(0, 9, 60)])
    first = rng.gamma(3, 0.02, 60)
    second = first + rng.normal(0.008, 0.02, 60)
    every = flipped_sums(first, second, groups)
    observed = (first - second).sum()
    expected = 2 * min(np.mean(every <= observed + 1e-12), np.mean(every >= observed - 1e-12))
    assert sign_flip(first, second, groups, seed=1) == pytest.approx(expected)
    assert 0.002 < expected < 0.5


def test_sign_flip_of_single_faces_is_mcnemar() -> None:
    first, second = draw_right(20, 4)
    faces = np.arange(20).astype(str)
    assert 0 < np.abs(first - second).sum() <= 13  # so that no permutation is drawn by lot
    assert sign_flip(first, second, faces, 1) == pytest.approx(mcnemar(first, second))


def test_drawn_permutations_come_near_to_all() -> None:
    first, second = draw_right(400, 5)
    second[:300] = first[:300]
    faces = np.arange(400).astype(str)
    assert (first != second).sum() > 20
    assert sign_flip(first, second, faces, 1) == pytest.approx(mcnemar(first, second), abs=0.01)


def test_one_persons_frames_prove_nothing() -> None:
    right, wrong = np.ones(50), np.zeros(50)
    assert mcnemar(right, wrong) < 1e-9
    assert sign_flip(right, wrong, np.full(50, "p1"), 1) == 1
    assert sign_flip(right, right, np.arange(50), 1) == 1


def test_holm_steps_down() -> None:
    values = [0.01, 0.04, 0.03, 0.005]
    # 4 · 0.005; 3 · 0.01; 2 · 0.03; and 0.04, which may not be below the one before.
    assert holm(values) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


# the comparison


def emotion_faces(truth: np.ndarray, groups: np.ndarray) -> Faces:
    columns = {"brightness": np.linspace(0, 1, len(truth)), "yaw": np.nan, "face_size": 48.0}
    traits = pd.DataFrame({"class": np.array(EMOTIONS)[truth], "source": "s", **columns})
    ids = np.array([f"face-{number}" for number in range(len(truth))])
    images = np.zeros((len(truth), 1, 1, 1), np.uint8)
    return Faces(ids, groups, images, truth, None, None, {}, traits)


def answers(name: str, outputs: np.ndarray) -> Answers:
    return Answers(name, None, outputs, True, "none", {"bytes": 9}, False)


def test_models_are_held_against_the_best_on_the_same_faces() -> None:
    rng = np.random.default_rng(6)
    truth, groups = rng.integers(0, 7, 90), np.repeat(np.arange(45), 2).astype(str)
    faces = emotion_faces(truth, groups)

    def outputs(accuracy: float) -> np.ndarray:
        wrong = (truth + rng.integers(1, 7, 90)) % 7
        return np.eye(7)[np.where(rng.random(90) < accuracy, truth, wrong)] * 0.9 + 0.1 / 7

    given = {"weak": outputs(0.3), "strong": outputs(0.9), "middling": outputs(0.8)}
    result = compare.compare(faces, [answers(*item) for item in given.items()], SETTINGS)
    assert [row["name"] for row in result["models"]] == ["strong", "middling", "weak"]
    assert (result["best"], result["metric"]) == ("strong", "accuracy")
    assert (result["n"], result["groups"]) == (90, 45)
    right = {name: (answer.argmax(1) == truth).astype(float) for name, answer in given.items()}
    p = {name: mcnemar(right[name], right["strong"]) for name in ("middling", "weak")}
    for row in result["models"]:
        assert row["accuracy"] == pytest.approx(right[row["name"]].mean())
        counts = np.zeros((7, 7), int)
        np.add.at(counts, (truth, given[row["name"]].argmax(1)), 1)
        assert row["confusion"] == counts.tolist()
        against = row["against_best"]
        if row["name"] == "strong":
            assert against is None
            continue
        gap = right[row["name"]] - right["strong"]
        assert against["difference"] == pytest.approx(gap.mean())
        drawn = [
            (w @ gap) / w.sum() for batch in bootstrap_weights(groups, SETTINGS) for w in batch
        ]
        assert against["ci95"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1e-6)
        assert against["p"]["mcnemar"] == pytest.approx(p[row["name"]])
        assert against["p_holm"]["mcnemar"] == pytest.approx(
            holm(list(p.values()))[list(p).index(row["name"])]
        )
        assert 0 < against["p"]["sign_flip"] <= against["p_holm"]["sign_flip"]
    assert json.loads(json.dumps(result)) == result


def test_the_lowest_error_is_best() -> None:
    rng = np.random.default_rng(7)
    truth = rng.uniform(0.2, 0.8, (40, 68, 2)).astype(np.float32)
    truth[:, 36], truth[:, 45] = (0.3, 0.4), (0.7, 0.4)
    visible = np.ones((40, 68), bool)
    visible[0, 36] = False
    names = np.arange(40).astype(str)
    traits = emotion_faces(np.zeros(40, int), names).traits
    faces = Faces(names, names, np.zeros((40, 1, 1, 1), np.uint8), None, truth, visible, {}, traits)
    near, far = (truth + np.array([shift, 0]) for shift in (0.004, 0.02))
    result = compare.compare(faces, [answers("far", far), answers("near", near)], SETTINGS)
    best, other = result["models"]
    assert (best["name"], result["n"]) == ("near", 39)
    assert other["against_best"]["difference"] == pytest.approx(0.016 / 0.4, rel=1e-3)
    assert other["against_best"]["ci95"] == pytest.approx([0.016 / 0.4] * 2, rel=1e-3)
    assert other["against_best"]["p"]["sign_flip"] < 0.001
    assert "mcnemar" not in other["against_best"]["p"]
    curve = dict(zip(best["ced"]["thresholds"], best["ced"]["shares"], strict=True))
    assert (curve[0.0], curve[0.008], curve[0.012]) == (0, 0, 1)


def test_folders_of_one_name_are_told_apart_by_their_paths() -> None:
    folders = [Path("a/plain"), Path("b/plain"), Path("b/other")]
    assert list(names_of(folders)) == ["a/plain", "b/plain", "other"]


# the command


@pytest.fixture
def here(evaluated, tmp_path):
    for part in ("params.yaml", "runs", "data", "reports/evaluate"):
        source, target = evaluated.root / part, tmp_path / part
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return type(evaluated)(tmp_path, evaluated.params, evaluated.faces)


def compared(here, *arguments: str) -> dict:
    here.call(compare.main, *arguments, "--out", "pages/compare.html")
    return json.loads((here.root / "pages/compare.json").read_text())


@pytest.mark.parametrize("task", ["emotion", "landmarks"])
def test_what_evaluate_has_saved_is_compared(here, task, monkeypatch):
    monkeypatch.setattr("pipelines.runtimes.load", None)  # no model is opened
    result = compared(here, "--task", task, "--latency", "none")
    rows = {row["name"]: row for row in result["models"]}
    assert rows.keys() == {"plain", "compact"}
    for name, row in rows.items():
        scores = json.loads((here.root / f"reports/evaluate/{task}/{name}/scores.json").read_text())
        for figure in (result["metric"], "ci95", "slices", "n", "cost"):
            assert row[figure] == scores[figure]
        assert row["answers"] == "saved by evaluate"
    page = (here.root / "pages/compare.html").read_text()
    assert "compact" in page and result["date"] in page
    assert f"--task {task} --latency none --out pages/compare.html" in page


def test_a_model_that_left_the_parameters_is_passed_over(here, capsys):
    runs = here.root / "runs/emotion"
    shutil.copytree(runs / "compact", runs / "former")
    result = compared(here, "--task", "emotion", "--latency", "none")
    assert [row["name"] for row in result["models"]] == ["compact", "plain"]
    assert "warning: runs/emotion: passed over former:" in capsys.readouterr().err
    named = ("--runs", *(f"runs/emotion/{name}" for name in ("former", "plain")))
    result = compared(here, "--task", "emotion", "--latency", "none", *named)
    assert [row["name"] for row in result["models"]] == ["former", "plain"]
    assert capsys.readouterr().err.count("passed over") == 0
    for name in ("plain", "compact"):
        shutil.rmtree(runs / name)
    with pytest.raises(GrimaceError, match="runs/emotion holds no model of compact, plain; run"):
        compared(here, "--task", "emotion", "--latency", "none")


def test_a_model_trained_again_is_asked_again(here):
    shutil.copy(
        here.root / "runs/emotion/compact/model.keras",
        here.root / "runs/emotion/plain/model.keras",
    )
    rows = {
        row["name"]: row
        for row in compared(here, "--task", "emotion", "--latency", "none")["models"]
    }
    assert (rows["plain"]["answers"], rows["compact"]["answers"]) == (
        "computed here",
        "saved by evaluate",
    )
    assert rows["plain"]["accuracy"] == rows["compact"]["accuracy"]
    assert rows["plain"]["cost"]["parameters"] == rows["compact"]["cost"]["parameters"]


def test_latency_is_measured_and_kept_with_the_run(here):
    import mlflow

    result = compared(here, "--task", "landmarks")
    assert result["latency"]["runtime"].startswith("litert ")
    for row in result["models"]:
        assert 0 < row["latency"]["p50_ms"] <= row["latency"]["p95_ms"]
    with here.inside():
        mlflow.set_tracking_uri(here.params.tracking.uri)
        runs = mlflow.search_runs(experiment_names=["grimace-landmarks"], output_format="list")
        logged = [
            run.data.metrics["latency_ms"] for run in runs if "latency_ms" in run.data.metrics
        ]
    assert sorted(logged) == sorted(row["latency"]["p50_ms"] for row in result["models"])
    assert all("val/nme_interocular" in run.data.metrics for run in runs)


def test_what_cannot_be_converted_is_said_and_the_others_are_timed(here, monkeypatch):
    real = compare._to_litert

    def fails_once(file: Path, target: Path) -> Path:
        if file.parent.name == "plain":
            raise GrimaceError("no kernel\nfor it")
        return real(file, target)

    monkeypatch.setattr(compare, "_to_litert", fails_once)
    rows = {row["name"]: row for row in compared(here, "--task", "emotion")["models"]}
    assert rows["plain"]["latency"] == {"failed": "no kernel for it"}
    assert rows["compact"]["latency"]["p50_ms"] > 0
    assert (
        "plain could not be timed: no kernel for it"
        in (here.root / "pages/compare.html").read_text()
    )


def test_given_folders_an_ensemble_and_a_model_of_another_shape(here):
    import keras

    image = keras.Input((20, 20, 3))
    wide = keras.Model(image, keras.layers.Dense(7, "softmax")(keras.layers.Flatten()(image)))
    (here.root / "elsewhere").mkdir()
    wide.save(here.root / "elsewhere/model.keras")
    members = [f"runs/emotion/{name}/model.keras" for name in ("plain", "compact")]
    here.call(
        evaluate.main, "--model", *members, "--out", "both", "--test-time", "flip", "--side", "val"
    )
    result = compared(
        here,
        *("--task", "emotion", "--latency", "none"),
        *("--runs", "runs/emotion/compact", "both", "elsewhere"),
    )
    rows = {row["name"]: row for row in result["models"]}
    scores = json.loads((here.root / "both/scores.json").read_text())
    assert rows["both"]["accuracy"] == scores["accuracy"]
    assert rows["both"]["test_time"] == "flip" and rows["both"]["cost"] == scores["cost"]
    assert rows["elsewhere"]["cost"]["parameters"] == wide.count_params()
    assert rows["elsewhere"]["n"] == rows["both"]["n"]
    assert "averaged: flip" in (here.root / "pages/compare.html").read_text()


@pytest.fixture
def both(here):
    """Where `evaluate` has saved what an ensemble answers."""
    members = [f"runs/emotion/{name}/model.keras" for name in ("plain", "compact")]
    here.call(evaluate.main, "--model", *members, "--out", "both", "--side", "val")
    return here


ENSEMBLE = ("--task", "emotion", "--latency", "none", "--runs", "both")


def test_answers_of_an_ensemble_count_where_its_members_are_not_at_hand(both):
    shutil.rmtree(both.root / "runs/emotion/plain")
    (row,) = compared(both, *ENSEMBLE)["models"]
    assert row["answers"] == "saved by evaluate"


def test_an_ensemble_of_which_a_member_was_trained_again_is_refused(both):
    trained = both.root / "runs/emotion/compact/model.keras"
    shutil.copy(trained, both.root / "runs/emotion/plain/model.keras")
    said = r"both holds answers .* out of date: runs/emotion/plain/model\.keras has changed since;"
    with pytest.raises(GrimaceError, match=said):
        compared(both, *ENSEMBLE)


@pytest.mark.parametrize(("key", "value"), [("size", 64), ("channels", 3), ("margin", 0.4)])
def test_answers_to_other_crops_do_not_count(both, key, value):
    path = both.root / "params.yaml"
    raw = yaml.safe_load(path.read_text())
    assert raw["tasks"]["emotion"][key] != value
    raw["tasks"]["emotion"][key] = value
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(GrimaceError, match=r"both holds answers .* the crops had another size"):
        compared(both, *ENSEMBLE)
    (row,) = compared(both, *ENSEMBLE[:-1], "runs/emotion/plain")["models"]
    assert row["answers"] == "computed here"


def test_the_test_side_is_looked_at_on_request_alone(here):
    sides = {face.id: side_of(face.person, here.params.split) for face in here.faces}
    result = compared(here, "--task", "emotion", "--latency", "none", "--side", "test")
    assert result["n"] == list(sides.values()).count("test")
    assert {row["answers"] for row in result["models"]} == {"computed here"}
    assert compared(here, "--task", "emotion", "--latency", "none")["n"] == list(
        sides.values()
    ).count("val")


def test_what_cannot_be_compared_is_named(here):
    (here.root / "empty").mkdir()
    with pytest.raises(GrimaceError, match=r"empty holds neither .*--side val --out empty"):
        compared(here, "--task", "emotion", "--runs", "empty")
    shutil.rmtree(here.root / "runs/emotion")
    with pytest.raises(GrimaceError, match="runs/emotion holds no model"):
        compared(here, "--task", "emotion")
