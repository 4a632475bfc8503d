"""Candidates that try to talk past the gates, as tables of answers."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from models.schemes import EMOTIONS
from pipelines import gate
from pipelines.cli import GrimaceError
from pipelines.gate import Candidate, Champion
from pipelines.heldout import Faces
from pipelines.params import Override, Params, load_params

ROOT = Path(__file__).parents[2]
COUNT = 700
FILES = {"model.keras": "a" * 64, "tflite/int8.tflite": "b" * 64}
DEPLOYABLES = ("tflite/float32", "tflite/int8")
GATE = {"value": 0.2, "bound": 1.0, "passed": True, "why": "loses 0.20, 1.00 allowed"}
ALWAYS = [
    "bytes",
    "records",
    "unseen faces",
    "floor: accuracy",
    "floor: macro_f1",
    "validation and test",
    "worst slice",
]
AGAINST = ["against the champion", "slices against the champion"]
OF_DEPLOYABLES = [
    f"{kind}: {name}" for name in DEPLOYABLES for kind in ("budget", "golden", "size")
]


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Params:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["evaluate"]["resamples"] = 200
    values["gate"]["resamples"] = 2000
    path = tmp_path_factory.mktemp("params") / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_params(path)


@pytest.fixture(scope="module")
def faces() -> Faces:
    """Two faces a person; every class, and a brightness for each."""
    return Faces(
        ids=np.array([f"test-{n}" for n in range(COUNT)]),
        groups=np.array([f"person-{n // 2}" for n in range(COUNT)]),
        images=np.zeros((COUNT, 1, 1, 1), np.uint8),
        emotions=np.arange(COUNT) % 7,
        landmarks=None,
        visible=None,
        unusable={},
        traits=pd.DataFrame(
            {
                "class": [EMOTIONS[n % 7] for n in range(COUNT)],
                "brightness": np.linspace(0, 1, COUNT),
                "yaw": np.nan,
                "face_size": 80.0,
                "source": "folder",
            }
        ),
    )


def said(faces: Faces, right: np.ndarray) -> np.ndarray:
    """Answers (n, 7), right where asked to be."""
    assert faces.emotions is not None
    return (
        0.01 + 0.93 * np.eye(7)[np.where(right, faces.emotions, (faces.emotions + 1) % 7)]
    ).astype(np.float32)


def some(share: float, seed: int = 0) -> np.ndarray:
    """Which faces are answered rightly; what is hard for one seed is hard for another too."""
    hard = np.random.default_rng(0).random(COUNT)
    hard += np.random.default_rng(seed).normal(0, 0.05, COUNT)
    return hard <= np.quantile(hard, share)


def candidate_of(outputs: np.ndarray | None, accuracy: float, **changes: Any) -> Candidate:
    """One that `verify` found nothing wrong with."""
    numerics = {
        name: {"task": "emotion", "n": COUNT, "loss": 0.2, "max_difference": 0.0005}
        for name in DEPLOYABLES
    }
    values: dict[str, Any] = {
        "files": FILES,
        "outputs": outputs,
        "verification": {
            "test": {"n": COUNT},
            "numerics": numerics,
            "perf": {name: {"bytes": 2**20} for name in DEPLOYABLES},
            "budgets": {
                "files": dict(FILES),
                "gates": [dict(GATE, name=name) for name in DEPLOYABLES],
                "built_but_not_run": {},
            },
        },
        "validation": {
            "accuracy": accuracy,
            "ci95": {"accuracy": [accuracy - 0.03, accuracy + 0.03]},
        },
        "known": frozenset({"train-1", "train-2", "somebody"}),
        "recorded": {"reports/verify/emotion": ("d.dir", "d.dir")},
    }
    return Candidate(**(values | changes))


@pytest.fixture
def judged(faces: Faces, params: Params) -> Callable[..., dict[str, Any]]:
    def judge(
        candidate: Candidate, champion: Champion | None = None, *overrides: Override
    ) -> dict[str, Any]:
        rows = gate.gates("emotion", candidate, champion, faces, params)
        blessing = gate.bless("emotion", candidate, champion, faces, rows, overrides)
        json.dumps(blessing, allow_nan=False)
        for row in rows:
            assert {"name", "value", "bound", "interval", "passed", "why"} <= row.keys()
            assert isinstance(row["passed"], bool) and row["why"]
        return blessing

    return judge


def failed(blessing: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["why"] for row in blessing["gates"] if not row["passed"]}


def row_of(blessing: dict[str, Any], name: str) -> dict[str, Any]:
    (row,) = [row for row in blessing["gates"] if row["name"] == name]
    return row


def test_the_first_passes_absolute_bounds_alone_and_the_record_says_so(judged, faces):
    blessing = judged(candidate_of(said(faces, some(0.7)), 0.68))
    assert blessing["blessed"] is True and failed(blessing) == {}
    assert blessing["champion"] is None
    assert blessing["basis"] == "absolute bounds alone: there was no champion to compare with"
    assert [row["name"] for row in blessing["gates"]] == [*ALWAYS, *OF_DEPLOYABLES]
    assert blessing["files"] == FILES
    wanted = hashlib.sha256(json.dumps(FILES, sort_keys=True).encode()).hexdigest()
    assert blessing["sha256"] == wanted
    assert row_of(blessing, "floor: accuracy")["value"] == pytest.approx(0.7, abs=0.002)


def test_a_better_one_passes_on_the_same_faces(judged, faces, params):
    mine, theirs = some(0.75, 1), some(0.70, 2)
    champion = Champion(3, "c" * 64, said(faces, theirs))
    blessing = judged(candidate_of(said(faces, mine), 0.74), champion)
    assert failed(blessing) == {}
    assert blessing["champion"] == {"version": 3, "sha256": "c" * 64}
    assert [row["name"] for row in blessing["gates"]] == [*ALWAYS, *AGAINST, *OF_DEPLOYABLES]
    row = row_of(blessing, "against the champion")
    gained = mine.astype(float) - theirs
    assert row["value"] == pytest.approx(gained.mean())
    assert row["bound"] == -params.gate.emotion.margin
    # A bootstrap over people, drawn otherwise: pairs of faces go together.
    pairs = gained.reshape(-1, 2).sum(1)
    drawn = np.random.default_rng(9).choice(pairs, (20_000, len(pairs))).sum(1) / COUNT
    assert row["interval"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.004)


def test_one_that_is_not_shown_to_be_as_good_is_refused(judged, faces):
    champion = Champion(3, "c" * 64, said(faces, some(0.72, 2)))
    worse = judged(candidate_of(said(faces, some(0.69, 1)), 0.7), champion)
    assert "against the champion" in failed(worse)
    low, high = row_of(worse, "against the champion")["interval"]
    assert low < -0.02 < high  # worse by chance, perhaps: it is for the candidate to show
    same = judged(candidate_of(said(faces, some(0.72, 2)), 0.7), champion)
    assert failed(same) == {} and row_of(same, "against the champion")["interval"] == [0, 0]


def test_one_that_knows_the_test_faces_by_heart(judged, faces):
    by_heart = judged(candidate_of(said(faces, np.ones(COUNT, bool)), 0.66))
    assert failed(by_heart).keys() == {"validation and test"}
    row = row_of(by_heart, "validation and test")
    # Zou and Donner's interval: the test side's has no width here.
    assert row["value"] == pytest.approx(0.34)
    assert row["interval"] == pytest.approx([0.34 - 0.03, 0.34 + 0.03])

    trained = candidate_of(said(faces, some(0.7)), 0.68, known=frozenset({"test-5", "test-6"}))
    assert failed(judged(trained)).keys() == {"unseen faces"}
    assert row_of(judged(trained), "unseen faces")["value"] == 2
    people = candidate_of(said(faces, some(0.7)), 0.68, known=frozenset({"person-9"}))
    assert row_of(judged(people), "unseen faces")["value"] == 2
    unknown = candidate_of(said(faces, some(0.7)), 0.68, known=frozenset())
    assert "not computed" in failed(judged(unknown))["unseen faces"]


def test_one_that_is_better_on_average_and_worse_on_a_slice(judged, faces):
    fear = faces.emotions == EMOTIONS.index("fear")
    theirs = some(0.7, 2)
    mine = np.where(fear, theirs & some(0.45, 1), some(0.85, 1))
    assert mine.mean() > theirs.mean() + 0.05
    champion = Champion(3, "c" * 64, said(faces, theirs))
    blessing = judged(candidate_of(said(faces, mine), mine.mean()), champion)
    assert failed(blessing).keys() == {"slices against the champion"}
    row = row_of(blessing, "slices against the champion")
    assert "worse in class fear" in row["why"]
    lost = mine[fear].mean() - theirs[fear].mean()
    assert row["interval"][0] < lost < row["interval"][1] < 0
    assert row["value"] < row["bound"] == 0.05

    blind = np.where(fear, some(0.1, 1), some(0.85, 1))
    assert failed(judged(candidate_of(said(faces, blind), blind.mean()))).keys() == {"worst slice"}


def test_chance_alone_makes_no_slice_worse(judged, faces):
    """Uncorrected, eleven tests at 5 % would refuse many a good candidate."""
    refused = 0
    for seed in range(5):
        champion = Champion(3, "c" * 64, said(faces, some(0.7, 100 + seed)))
        blessing = judged(candidate_of(said(faces, some(0.7, 200 + seed)), 0.7), champion)
        refused += "slices against the champion" in failed(blessing)
    assert refused <= 1


def test_one_whose_int8_collapsed(judged, faces):
    candidate = candidate_of(said(faces, some(0.7)), 0.68)
    candidate.verification["numerics"]["tflite/int8"] |= {"loss": 31.0, "max_difference": 0.9}
    blessing = judged(candidate)
    assert failed(blessing).keys() == {"budget: tflite/int8", "golden: tflite/int8"}
    assert row_of(blessing, "budget: tflite/int8")["value"] == 31.0
    assert row_of(blessing, "golden: tflite/int8")["bound"] == 0.4

    candidate = candidate_of(said(faces, some(0.7)), 0.68)
    golden = {"difference": 0.2, "tolerance": 0.05, "passed": False}
    candidate.verification["numerics"]["tflite/int8"]["golden"] = golden
    assert failed(judged(candidate)).keys() == {"golden: tflite/int8"}
    candidate = candidate_of(said(faces, some(0.7)), 0.68)
    candidate.verification["budgets"]["gates"][1]["passed"] = False  # whatever the figures say
    assert failed(judged(candidate)).keys() == {"budget: tflite/int8"}

    candidate = candidate_of(said(faces, some(0.7)), 0.68)
    candidate.verification["numerics"]["tflite/int8"]["n"] = COUNT - 1  # judged on fewer faces
    assert failed(judged(candidate)).keys() == {"budget: tflite/int8"}
    candidate = candidate_of(said(faces, some(0.7)), 0.68)
    candidate.verification["perf"]["tflite/int8"]["bytes"] = 30 * 2**20
    candidate.verification["budgets"]["built_but_not_run"]["int8.sm89"] = 40 * 2**20
    oversize = {"size: tflite/int8", "size: tensorrt/int8.sm89"}
    assert failed(judged(candidate)).keys() == oversize


def test_what_verify_is_told_to_allow_has_an_end(faces, params):
    def budget(dataset: str, loss: float, allowed: float) -> dict[str, Any]:
        tasks = params.tasks.model_dump(mode="json")
        tasks["emotion"]["dataset"] = dataset
        told = params.model_copy(update={"tasks": type(params.tasks)(**tasks)})
        candidate = candidate_of(said(faces, some(0.7)), 0.68)
        candidate.verification["numerics"]["tflite/int8"] |= {"loss": loss}
        candidate.verification["budgets"]["gates"][1] |= {"bound": allowed}
        rows = gate.gates("emotion", candidate, None, faces, told)
        return next(row for row in rows if row["name"] == "budget: tflite/int8")

    drawn = budget("synthetic", 1.16, 1.5)
    assert drawn["passed"] and drawn["bound"] == 1.5
    assert "of drawn faces, 1 of real ones" in drawn["why"]
    real = budget("fer2013", 1.16, 100.0)
    assert not real["passed"] and real["bound"] == 1.0
    assert "1 is the most that verify may be told to allow" in real["why"]
    assert not budget("synthetic", 1.6, 100.0)["passed"]
    assert budget("fer2013", 0.4, 0.5)["bound"] == 0.5
    assert not budget("fer2013", 0.6, 0.5)["passed"]


def test_one_that_did_not_run_or_was_not_there(judged, faces):
    candidate = candidate_of(said(faces, some(0.7)), 0.68)
    del candidate.verification["numerics"]["tflite/int8"]
    candidate.verification["budgets"]["gates"][1]["why"] = "the runtime refused it"
    assert failed(judged(candidate)) == {"budget: tflite/int8": "the runtime refused it"}
    candidate.verification["budgets"]["gates"].clear()
    assert failed(judged(candidate)).keys() == {"deployables"}


def test_a_graph_that_only_an_imitated_gpu_ran(judged, faces):
    """It has figures, of some faces, and no verdict of its own; what a further runtime ran has."""
    candidate = candidate_of(said(faces, some(0.7)), 0.68)
    candidate.verification["budgets"]["gates"][1] |= {
        "value": None,
        "bound": None,
        "passed": False,
        "why": "measured only where a GPU is imitated",
    }
    wanted = {"budget: tflite/int8": "measured only where a GPU is imitated"}
    assert failed(judged(candidate)) == wanted
    for kind in ("numerics", "perf"):
        of = candidate.verification[kind]
        of["tflite/int8:litertjs"] = of["tflite/int8"] | {"bytes": 30 * 2**20}
    candidate.verification["budgets"]["gates"][1] = dict(GATE, name="tflite/int8:litertjs")
    assert failed(judged(candidate)).keys() == {"size: tflite/int8"}


def test_a_slice_counts_only_faces_that_it_has_figures_of(params):
    """Without the corners of its eyes a face has no inter-ocular NME."""
    visible = np.ones((COUNT, 68), bool)
    visible[5 * 2 : COUNT : 2, 36] = False  # but for five, all of source "a"
    faces = with_landmarks(np.random.default_rng(3), visible)
    outputs = faces.landmarks.copy()
    outputs[: 5 * 2 : 2] += 0.5
    one = Candidate(FILES, outputs, {}, {}, frozenset({"x"}), {})
    rows = {row["name"]: row for row in gate.gates("landmarks", one, None, faces, params)}
    assert rows["worst slice"]["passed"] and "source a" not in rows["worst slice"]["why"]
    visible[10:40:2, 36] = True  # twenty
    outputs[:40:2] += 0.5
    rows = {row["name"]: row for row in gate.gates("landmarks", one, None, faces, params)}
    assert not rows["worst slice"]["passed"]
    assert rows["worst slice"]["why"].startswith("source a: ")


def with_landmarks(rng: np.random.Generator, visible: np.ndarray) -> Faces:
    """Faces of two sources in turn, whose eyes are 0.6 of the crop apart."""
    truth = rng.random((COUNT, 68, 2)).astype(np.float32)
    truth[:, 36], truth[:, 45] = (0.2, 0.4), (0.8, 0.4)
    return Faces(
        ids=np.array([f"test-{n}" for n in range(COUNT)]),
        groups=np.array([f"test-{n}" for n in range(COUNT)]),
        images=np.zeros((COUNT, 1, 1, 1), np.uint8),
        emotions=None,
        landmarks=truth,
        visible=visible,
        unusable={},
        traits=pd.DataFrame(
            {
                "class": "unlabelled",
                "brightness": np.linspace(0, 1, COUNT),
                "yaw": 0.0,
                "face_size": 80.0,
                "source": ["a", "b"] * (COUNT // 2),
            }
        ),
    )


def test_a_tampered_bundle(judged, faces):
    other = FILES | {"tflite/int8.tflite": "e" * 64, "tflite/more.tflite": "f" * 64}
    blessing = judged(candidate_of(said(faces, some(0.7)), 0.68, files=other))
    assert failed(blessing) == {
        "bytes": "not as `verify` measured them: tflite/int8.tflite, tflite/more.tflite"
    }


def test_a_champion_that_vanished(judged, faces):
    lost = Champion(0, "", None, "the champion is lost: its files are gone")
    blessing = judged(candidate_of(said(faces, some(0.99)), 0.98), lost)
    assert failed(blessing).keys() == set(AGAINST)
    assert "its files are gone" in failed(blessing)["against the champion"]
    assert blessing["blessed"] is False
    assert blessing["champion"] == {"version": 0, "sha256": ""}


def test_what_could_not_be_computed_has_failed(judged, faces):
    champion = Champion(3, "c" * 64, said(faces, some(0.6)))
    missing = Candidate(FILES, None, {}, {}, frozenset(), {})
    blessing = judged(missing, champion)
    names = [*ALWAYS, *AGAINST, "deployables"]
    assert list(failed(blessing)) == [row["name"] for row in blessing["gates"]] == names
    broken = said(faces, some(0.9))
    broken[3] = np.nan
    assert "NaN" in failed(judged(candidate_of(broken, 0.9)))["floor: accuracy"]
    unknown = candidate_of(said(faces, some(0.7)), 0.68)
    unknown.verification["numerics"]["tflite/int4"] = {"loss": 0.0, "n": COUNT, "task": "emotion"}
    unknown.verification["perf"]["tflite/int4"] = {"bytes": 1}
    unknown.verification["budgets"]["gates"].append(dict(GATE, name="tflite/int4"))
    assert "answers has no 'int4'" in failed(judged(unknown))["golden: tflite/int4"]


def test_an_override_is_for_one_gate_and_one_candidate_and_signed(judged, faces):
    candidate = candidate_of(said(faces, some(0.7)), 0.68)
    candidate.verification["perf"]["tflite/int8"]["bytes"] = 30 * 2**20
    sha256 = judged(candidate)["sha256"]

    def signed(**changes: str) -> Override:
        values = {
            "task": "emotion",
            "gate": "size: tflite/int8",
            "candidate": sha256[:12],
            "who": "Ada",
            "reason": "the app has room for it",
        }
        return Override(**(values | changes))

    assert failed(judged(candidate)).keys() == {"size: tflite/int8"}
    blessing = judged(candidate, None, signed())
    assert blessing["blessed"] is True
    row = row_of(blessing, "size: tflite/int8")
    assert row["passed"] is False
    assert row["overridden"] == {"who": "Ada", "reason": "the app has room for it"}
    assert "overridden: size: tflite/int8" in gate.verdict(blessing)
    assert "overridden by Ada: the app has room for it" in gate.table(blessing)

    others = (signed(candidate="0" * 12), signed(task="landmarks"))
    assert judged(candidate, None, *others)["blessed"] is False
    with pytest.raises(GrimaceError, match=r"'size: all' is no gate that .* fails; it fails size"):
        judged(candidate, None, signed(gate="size: all"))


def test_landmarks_are_better_where_the_error_is_lower(params):
    rng = np.random.default_rng(3)
    faces = with_landmarks(rng, np.ones((COUNT, 68), bool))
    truth = faces.landmarks
    # Off by a known length, to one side: the NME is that over the distance of the eyes.
    off = rng.uniform(0.03, 0.05, COUNT).astype(np.float32)
    theirs = truth + np.stack([off, 0 * off], 1)[:, None]
    mine = truth + np.stack([0.9 * off, 0 * off], 1)[:, None]
    validation = {"nme_interocular": 0.06, "ci95": {"nme_interocular": [0.058, 0.062]}}

    def judge(outputs: np.ndarray, champion: np.ndarray) -> list[dict[str, Any]]:
        one = Candidate(FILES, outputs, {}, validation, frozenset({"x"}), {})
        return gate.gates("landmarks", one, Champion(1, "", champion), faces, params)

    rows = {row["name"]: row for row in judge(mine, theirs)}
    gain = (0.1 * off / 0.6).mean()
    assert rows["against the champion"]["value"] == pytest.approx(gain, rel=1e-3)
    assert rows["against the champion"]["passed"] and rows["slices against the champion"]["passed"]
    assert rows["floor: nme_interocular"]["value"] == pytest.approx(
        (0.9 * off / 0.6).mean(), rel=1e-3
    )
    assert rows["floor: nme_interocular"]["passed"] and rows["worst slice"]["passed"]
    assert rows["validation and test"]["passed"]
    rows = {row["name"]: row for row in judge(theirs, mine)}
    assert not rows["against the champion"]["passed"]
    assert not rows["slices against the champion"]["passed"]
    worst = truth + np.float32(0.3)
    rows = {row["name"]: row for row in judge(worst, mine)}
    assert not rows["floor: nme_interocular"]["passed"] and not rows["worst slice"]["passed"]
    by_heart = {row["name"]: row for row in judge(truth, mine)}
    assert not by_heart["validation and test"]["passed"]


def test_checksums_are_those_of_dvc(noted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one.json", "one/two", "one-two/a", "z/y/x", "é"):  # DVC's order is of whole names
        path = Path("out", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    noted("out")
    lock = yaml.safe_load(Path("dvc.lock").read_text())
    assert gate.md5_of(Path("out")) == lock["stages"]["verify@emotion"]["outs"][0]["md5"]
    assert gate.md5_of(Path("out/one.json")) == hashlib.md5(b"one.json").hexdigest()
    assert gate.md5_of(Path("nothing")) == ""


def test_answers_count_only_for_their_model_and_faces(faces, tmp_path):
    outputs = said(faces, some(0.7))
    gate.save_answers(tmp_path / "answers.npz", faces, outputs, "m")
    digest = gate.digest_of(faces)
    found = gate.read_answers(tmp_path / "answers.npz", faces, "m", digest)
    assert np.array_equal(found, outputs)
    assert gate.read_answers(tmp_path / "answers.npz", faces, "other", digest) is None
    assert gate.read_answers(tmp_path / "none.npz", faces, "m", digest) is None
    changed = Faces(**{**vars(faces), "images": faces.images + np.uint8(1)})
    assert gate.digest_of(changed) != digest
    assert (
        gate.read_answers(tmp_path / "answers.npz", changed, "m", gate.digest_of(changed)) is None
    )
    relabelled = Faces(**{**vars(faces), "emotions": (faces.emotions + 1) % 7})
    assert gate.digest_of(relabelled) != digest
