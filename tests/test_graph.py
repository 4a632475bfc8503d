"""The whole graph, on few faces and one epoch, in a repository of its own."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml

from models.schemes import EMOTIONS
from pipelines.datasets.synthetic import examples

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A fresh clone of what git tracks, with params that make a run short."""
    folder = tmp_path_factory.mktemp("graph")
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["download"]["synthetic"]["count"] = 210
    params["filter"]["overrides"] = {}  # FER-2013's own trains networks
    params["filter"]["workers"] = params["augment"]["workers"] = 1  # test_filter has more
    del params["train"]["jobs"]["landmarks-compact"], params["sweep"]["jobs"]["landmarks-compact"]
    for task in ("emotion", "landmarks"):
        params["augment"][task]["views"] = 2
    for job in params["train"]["jobs"].values():
        job |= {"epochs": 1, "widths": [8, 16], "batch": 32, "by_dataset": {}}
    params["evaluate"]["resamples"] = 100
    params["export"] |= {"calibration": 16, "trial": 16, "engines": ["sm89"]}
    params["verify"]["latency_runs"] = 10
    params["verify"]["runtimes"] = {"tflite": ["litert"], "tfjs": ["wasm"]}  # test_verify has more
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def first_run(workspace):
    """`dvc repro` from nothing."""
    return dvc(workspace, "repro")


def dvc(folder, *arguments, **environment):
    # MLflow leaves the store of an earlier test in this process's environment.
    inherited = {name: text for name, text in os.environ.items() if "MLFLOW" not in name}
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env=inherited
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | {"COLUMNS": "150", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )


@pytest.mark.timeout(1500)
def test_one_command_ends_with_a_table_of_measured_deployables(workspace, first_run):
    assert first_run.returncode == 0, first_run.stdout[-3000:] + first_run.stderr[-3000:]
    assert "candidates and deployables" in first_run.stdout
    table = pd.read_csv(workspace / "reports/report/results.csv", keep_default_na=False)
    for task in ("emotion", "landmarks"):
        rows = table[table["task"] == task].set_index("what")
        deployables = [name for name in rows.index if name.split("/")[0] in ("tflite", "tfjs")]
        assert {"tflite/float32", "tflite/int8", "tfjs/float16", "tfjs/uint8"} <= set(deployables)
        assert {"tensorrt/float32", "tensorrt/int8"} <= set(rows.index)
        for name in [*deployables, "tensorrt/int8"]:
            assert rows.loc[name, "metric"] and rows.loc[name, "size"] and rows.loc[name, "latency"]
        test = json.loads((workspace / f"reports/verify/{task}/test.json").read_text())
        numerics = json.loads((workspace / f"reports/verify/{task}/numerics.json").read_text())
        assert {row["n"] for row in numerics.values()} == {test["n"]}


def test_every_model_is_on_a_page_of_comparison(workspace, first_run):
    for task, models in (("emotion", {"plain", "compact"}), ("landmarks", {"plain"})):
        page = (workspace / f"reports/compare/{task}.html").read_text()
        found = json.loads((workspace / f"reports/compare/{task}.json").read_text())
        assert {row["name"] for row in found["models"]} == models
        assert {row["answers"] for row in found["models"]} == {"saved by evaluate"}
        assert all(row["latency"]["p50_ms"] > 0 for row in found["models"])
        assert "tflite/int8" in {row["name"] for row in found["deployables"]["rows"]}
        assert "Deployables" in page


def test_a_second_run_does_nothing(workspace, first_run):
    second = dvc(workspace, "repro")
    assert second.returncode == 0
    assert "Running stage" not in second.stdout
    assert "up to date" in second.stdout


def test_dvc_shows_something_worth_looking_at(workspace, first_run):
    metrics = json.loads(dvc(workspace, "metrics", "show", "--json").stdout)[""]["data"]
    assert "accuracy" in metrics["reports/evaluate/emotion/plain.json"]["data"]
    assert "test" in metrics["reports/verify/landmarks.json"]["data"]
    plots = dvc(workspace, "plots", "show", "--json")
    shown = json.loads(plots.stdout)["data"]
    assert {"emotion accuracy", "landmark error", "landmark CED"} <= set(shown)
    assert "train@emotion-compact" in dvc(workspace, "dag", "--dot").stdout


def test_training_and_verification_meet_in_one_mlflow_run(workspace, first_run):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    experiment = client.get_experiment_by_name("grimace-emotion")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags["grimace.model"] for run in runs} == {"plain", "compact"}
    assert all("val/accuracy" in run.data.metrics for run in runs)
    (candidate,) = [run for run in runs if run.data.tags.get("grimace.candidate") == "true"]
    assert "test/accuracy" in candidate.data.metrics
    assert "deployed/tflite.int8.accuracy" in candidate.data.metrics
    lock = yaml.safe_load((workspace / "dvc.lock").read_text())
    (output,) = [
        out
        for out in lock["stages"]["augment@emotion"]["outs"]
        if out["path"] == "data/augment/emotion"
    ]
    assert candidate.data.tags["grimace.data_version"] == output["md5"]


def test_a_bad_parameter_stops_before_any_work(workspace, first_run):
    path = workspace / "params.yaml"
    good = path.read_text()
    path.write_text(good.replace("std: 2.0", "sdt: 2.0"))
    try:
        result = dvc(workspace, "repro")
    finally:
        path.write_text(good)
    assert result.returncode != 0
    assert "filter.checks.blank.sdt: unknown key (did you mean 'std'?)" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout.count("Running stage") == 1  # `params` itself


@pytest.mark.timeout(900)
def test_real_data_by_one_switch(workspace, first_run, tmp_path):
    faces = list(examples(210, seed=5))
    write_fer2013(faces, tmp_path / "fer2013.zip")
    write_ytf(faces, tmp_path / "ytf_keypoints.zip")
    result = dvc(
        workspace,
        "exp",
        "run",
        "-S",
        "tasks.emotion.dataset=fer2013",
        "-S",
        "tasks.landmarks.dataset=ytf_keypoints",
        "augment@emotion",
        "augment@landmarks",
        GRIMACE_ARCHIVES=str(tmp_path),
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    meta = json.loads((workspace / "data/augment/emotion/meta.json").read_text())
    assert meta["dataset"] == "fer2013"
    assert meta["counts"] == {"train": 70, "val": 70}
    findings = pd.read_csv(workspace / "reports/filter/fer2013/findings.csv")
    assert list(findings.loc[findings["action"] == "drop", "check"]) == ["unreadable"]
    index = pd.read_parquet(workspace / "data/split/ytf_keypoints/index.parquet")
    assert index.groupby("group")["split"].nunique().max() == 1
    assert index["group"].nunique() == 42


def write_fer2013(faces, path):
    """The Kaggle folder archive: a third of the faces for each of the three official sides."""
    names = {0: "train/{}/Training_{}.jpg", 1: "test/{}/PublicTest_{}.jpg"}
    with zipfile.ZipFile(path, "w") as archive:
        for number, face in enumerate(faces):
            image = cv2.imdecode(np.frombuffer(face.image, np.uint8), cv2.IMREAD_GRAYSCALE)
            _, encoded = cv2.imencode(".jpg", cv2.resize(image, (48, 48)))
            name = names.get(number * 3 // len(faces), "test/{}/PrivateTest_{}.jpg")
            archive.writestr(name.format(EMOTIONS[face.emotion], number), encoded.tobytes())
        archive.writestr("train/happy/Training_999.jpg", encoded.tobytes()[:400])


def write_ytf(faces, path):
    """The two folders and CSV files of YouTube Faces, the same people in both."""
    with zipfile.ZipFile(path, "w") as archive:
        rows = {"training": [], "test": []}
        for number, face in enumerate(faces):
            part = "test" if number % 5 == 0 else "training"
            name = f"Person_{face.person.split('-')[1]}_{number:02d}.jpg"
            archive.writestr(f"{part}/{name}", face.image)
            rows[part].append([name, *face.landmarks.reshape(-1)])
        for part, table in rows.items():
            frame = pd.DataFrame(table, columns=["", *map(str, range(136))])
            archive.writestr(f"{part}_frames_keypoints.csv", frame.to_csv(index=False))
