import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn import metrics

from models.schemes import EMOTIONS
from pipelines import evaluate
from pipelines.cli import GrimaceError, run
from pipelines.datasets import examples, synthetic
from pipelines.datasets.archive import open_archive
from pipelines.datasets.table import write_examples
from pipelines.params import load_params
from pipelines.split import side_of

ROOT = Path(__file__).parents[2]
PARAMS = load_params(ROOT / "params.yaml")
SETTINGS = PARAMS.evaluate
PREFIX = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}
CSV_ORDER = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
POINT_NAMES = "," + ",".join(str(number) for number in range(136))

Score = Callable[..., dict]


@pytest.fixture
def score(tmp_path, monkeypatch, capsys) -> Score:
    """The command, in this process and in an empty folder with the real parameters."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)

    def score(*arguments: object) -> dict:
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
        capsys.readouterr()
        run(evaluate.main)
        return json.loads(capsys.readouterr().out)

    return score


def complaint(score: Score, *arguments: object) -> str:
    """The one line with which the command ends, at exit code 1."""
    with pytest.raises(SystemExit) as stop:
        score(*arguments)
    assert isinstance(stop.value.code, str), "not exit code 1"
    assert stop.value.code.startswith("error: ")
    assert "\n" not in stop.value.code
    return stop.value.code


# Models whose answers are known


def save_onnx(
    path: Path, nodes: list, constants: dict[str, np.ndarray], out: list[int], side: int = 48
) -> Path:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", side, side, 1])
    answer = helper.make_tensor_value_info("answer", TensorProto.FLOAT, ["n", *out])
    mean = helper.make_node("ReduceMean", ["image"], ["mean"], axes=[1, 2, 3], keepdims=1)
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([mean, *nodes], "known", [image], [answer], tensors)
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


def grey_of(answer: int) -> int:
    return 20 + 35 * answer


@pytest.fixture
def reader(tmp_path) -> Path:
    """Reads its answer off the grey level of the picture, see `grey_of`."""
    nodes = [
        helper.make_node("Squeeze", ["mean", "axes"], ["flat"]),
        helper.make_node("Sub", ["flat", "greys"], ["off"]),
        helper.make_node("Mul", ["off", "off"], ["square"]),
        helper.make_node("Neg", ["square"], ["negative"]),
        helper.make_node("Softmax", ["negative"], ["answer"]),
    ]
    greys = np.array([[grey_of(answer) for answer in range(7)]], np.float32)
    constants = {"axes": np.array([2, 3]), "greys": greys}
    return save_onnx(tmp_path / "reader.onnx", nodes, constants, [7])


def constant(path: Path, answer: np.ndarray, side: int = 48) -> Path:
    """Always gives the same answer."""
    nodes = [
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Reshape", ["nothing", "shape"], ["column"]),
        helper.make_node("Add", ["column", "value"], ["answer"]),
    ]
    constants = {
        "zero": np.zeros(1, np.float32),
        "shape": np.array([-1, *[1] * answer.ndim]),
        "value": answer.astype(np.float32)[None],
    }
    return save_onnx(path, nodes, constants, list(answer.shape), side)


# Archives in the layouts in which the datasets are published


def picture(grey: np.ndarray, format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(grey.astype(np.uint8)).save(file, format, quality=95)
    return file.getvalue()


def flat(answer: int, format: str = "JPEG") -> bytes:
    return picture(np.full((48, 48), grey_of(answer)), format)


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def fer_row(label: object, answer: int, usage: str) -> str:
    return f"{label},{' '.join([str(grey_of(answer))] * 48 * 48)},{usage}"


def fer_archive(layout: str, folder: Path, rows: list[tuple[str, int, int]]) -> Path:
    """FER-2013 of flat pictures; rows hold side, true class, class that `reader` will answer."""
    members = {
        f"{'train' if side == 'train' else 'test'}/{EMOTIONS[label]}/{PREFIX[side]}_{n}.jpg": flat(
            answer
        )
        for n, (side, label, answer) in enumerate(rows)
    }
    table = "emotion,pixels,Usage\n" + "".join(
        fer_row(CSV_ORDER.index(EMOTIONS[label]), answer, PREFIX[side]) + "\n"
        for side, label, answer in rows
    )
    if layout == "zip":
        return zipped(folder / "fer2013.zip", members)
    if layout == "zipped csv":
        return zipped(folder / "challenge.zip", {"fer2013/fer2013.csv": table.encode()})
    if layout == "csv":
        (folder / "fer2013.csv").write_text(table)
        return folder / "fer2013.csv"
    for name, content in members.items():
        (folder / "fer" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "fer" / name).write_bytes(content)
    return folder / "fer"


@pytest.fixture(scope="module")
def frames() -> list[tuple[str, bytes, np.ndarray]]:
    """File name, picture and 68 points (NaN where unlabelled) of 36 frames of 18 people."""
    found = []
    for number, face in enumerate(synthetic.examples(36, seed=9)):
        points = np.where(face.visible[:, None], face.landmarks, np.nan).astype(np.float64).round(1)
        found.append((f"Given_{number // 2:02d}_Family_{number % 2:02d}.jpg", face.image, points))
    found[3][2][7] = np.nan  # a blank point
    found[5][2][36] = np.nan  # a blank eye corner: no inter-ocular distance
    return found


def ytf_archive(part: str, frames: list) -> dict[str, bytes]:
    rows = [POINT_NAMES]
    for name, _, points in frames:
        cells = ["" if np.isnan(value) else str(value) for value in points.ravel()]
        rows.append(",".join([name, *cells]))
    members = {f"{part}/{name}": image for name, image, _ in frames}
    return members | {f"{part}_frames_keypoints.csv": "\n".join(rows).encode()}


def person_of(name: str) -> str:
    return hashlib.sha256(name.rpartition("_")[0].encode()).hexdigest()[:10]


# What is expected, worked out without the code under test


def expected_emotion(pairs: list[tuple[int, int]]) -> dict:
    truth, answers = zip(*pairs, strict=True)
    labels = range(7)
    each = metrics.precision_recall_fscore_support(truth, answers, labels=labels, zero_division=0)
    return {
        "accuracy": metrics.accuracy_score(truth, answers),
        "macro_f1": metrics.f1_score(truth, answers, average="macro"),
        "balanced_accuracy": np.mean(
            [np.mean([a == t for t, a in pairs if t == c]) for c in sorted(set(truth))]
        ),
        "per_class": {
            EMOTIONS[c]: dict(
                zip(("precision", "recall", "f1", "n"), (column[c] for column in each), strict=True)
            )
            for c in labels
        },
    }


def expected_landmarks(labelled: list[np.ndarray], answer: np.ndarray) -> dict:
    """Crop around the visible points, then error by error."""
    whole, inner, boxed, absolute = [], [], [], []
    for points in labelled:
        seen = [i for i in range(68) if np.isfinite(points[i]).all()]
        if not {36, 45} <= set(seen):
            continue
        low, high = points[seen].min(0), points[seen].max(0)
        side = (high - low).max() * (1 + 2 * PARAMS.tasks.landmarks.margin)
        truth = (points - ((low + high) / 2 - side / 2)) / side
        eyes = np.hypot(*(truth[36] - truth[45]))
        error = {i: np.hypot(*(truth[i] - answer[i])) / eyes for i in seen}
        width, height = (high - low) / side
        boxed.append(np.mean(list(error.values())) * eyes / np.sqrt(width * height))
        whole.append(np.mean(list(error.values())))
        absolute.append(np.mean([np.abs(truth[i] - answer[i]) for i in seen]))
        inner.append(np.mean([error[i] for i in seen if i >= 17]))
    bounds = (np.arange(20_000) + 0.5) / 20_000 * 0.1
    return {
        "n": len(whole),
        "nme_interocular": np.mean(whole),
        "nme_interocular_inner": np.mean(inner),
        "nme_box": np.mean(boxed),
        "mae": np.mean(absolute),
        "fr10": np.mean([error > 0.1 for error in whole]),
        "auc10": np.mean([np.mean([error <= bound for error in whole]) for bound in bounds]),
    }


def mean_face(frames: list) -> np.ndarray:
    """An answer that is off by a tenth or so: nearer for some faces, farther for others."""
    boxes = []
    for _, _, points in frames:
        low, high = np.nanmin(points, 0), np.nanmax(points, 0)
        side = (high - low).max() * (1 + 2 * PARAMS.tasks.landmarks.margin)
        boxes.append((points - ((low + high) / 2 - side / 2)) / side)
    return np.nanmean(boxes, 0)


# Emotion


@pytest.mark.parametrize("layout", ["zip", "folder", "csv", "zipped csv"])
def test_emotion_figures_in_every_layout(score, reader, tmp_path, layout):
    rng = np.random.default_rng(4)
    rows = [
        (side, int(label), int(answer) if rng.random() < 0.5 else int(label))
        for side, count in (("train", 9), ("val", 16), ("test", 25))
        for label, answer in rng.integers(0, 7, (count, 2))
    ]
    archive = fer_archive(layout, tmp_path, rows)
    for split in ("test", "val", "train", "all"):
        found = score(
            "--model", reader, "--dataset", "fer2013", "--archive", archive, "--split", split
        )
        pairs = [row[1:] for row in rows if split in (row[0], "all")]
        assert (found["task"], found["n"], found["split"]) == ("emotion", len(pairs), split)
        assert found["unusable"] == {}
        expected = expected_emotion(pairs)
        for name in ("accuracy", "macro_f1", "balanced_accuracy"):
            assert found[name] == pytest.approx(expected[name], abs=1e-12)
            low, high = found["ci95"][name]
            assert 0 <= low <= found[name] <= high <= 1
            assert low < high
        assert found["per_class"].keys() == expected["per_class"].keys()
        for emotion, figures in expected["per_class"].items():
            row = found["per_class"][emotion]
            assert {name: row[name] for name in figures} == pytest.approx(figures, abs=1e-12)
            assert row["ci95"] is None or row["n"] >= 10
        # `reader` is always certain.
        wrong = 1 - expected["accuracy"]
        assert found["reliability"] == {"share": [1], "confidence": [1], "accuracy": [1 - wrong]}
        for name, value in (("ece", wrong), ("brier", 2 * wrong), ("nll", 7 * np.log(10) * wrong)):
            assert found[name] == pytest.approx(value)
            low, high = found["ci95"][name]
            assert low <= found[name] <= high


def test_test_is_the_default_side_and_json_the_same_as_printed(score, reader, tmp_path):
    archive = fer_archive("zip", tmp_path, [("test", 3, 3), ("test", 3, 4), ("val", 1, 1)])
    out = tmp_path / "new" / "scores.json"
    printed = score("--model", reader, "--dataset", "fer2013", "--archive", archive, "--json", out)
    assert json.loads(out.read_text()) == printed
    assert (printed["n"], printed["accuracy"], printed["split"]) == (2, 0.5, "test")
    assert printed["runtime"].startswith("onnxruntime ")
    assert printed["dataset"] == "fer2013"


def test_only_a_part_of_the_archive(score, reader, tmp_path):
    archive = zipped(
        tmp_path / "part.zip",
        {
            "test/happy/PublicTest_1.jpg": flat(3),
            "test/happy/PublicTest_2.jpg": flat(0),
            "test/sad/PublicTest_3.jpg": flat(5),
        },
    )
    command = ("--model", reader, "--dataset", "fer2013", "--archive", archive)
    found = score(*command, "--split", "all")
    assert (found["n"], found["accuracy"]) == (3, pytest.approx(2 / 3))
    line = complaint(score, *command, "--split", "test")
    assert "no usable test example" in line
    assert "rows found: val 3;" in line
    assert "--split all" in line


def test_bad_pictures_are_counted_by_reason(score, reader, tmp_path):
    whole = flat(3)
    archive = zipped(
        tmp_path / "fer2013.zip",
        {
            "test/happy/PrivateTest_1.jpg": whole,
            "test/happy/PrivateTest_2.jpg": flat(3, "PNG"),  # readable, whatever it is called
            "test/happy/PrivateTest_3.jpg": b"",
            "test/happy/PrivateTest_4.jpg": whole[:200],
            "test/happy/PrivateTest_5.jpg": b"<html>Too many requests</html>",
            "test/hapy/PrivateTest_6.jpg": whole,
            "test/happy/PublicTest_7.jpg": b"",  # of another side
        },
    )
    found = score("--model", reader, "--dataset", "fer2013", "--archive", archive)
    assert (found["n"], found["accuracy"]) == (2, 1.0)
    reasons = dict(found["unusable"])
    assert reasons.pop("unreadable: zero bytes") == 1
    assert reasons.pop("unknown class folder 'hapy' (did you mean 'happy'?)") == 1
    assert reasons.pop("unreadable: cannot identify image file") == 1
    ((truncated, count),) = reasons.items()
    assert truncated.startswith("unreadable: ")
    assert count == 1


def test_bad_rows_of_the_table_are_counted_by_reason(score, reader, tmp_path):
    path = tmp_path / "fer2013.csv"
    rows = [
        fer_row(3, 3, "PrivateTest"),
        fer_row(9, 3, "PrivateTest"),
        fer_row("", 3, "PrivateTest"),
        "3,1 2 3,PrivateTest",
        "3,,PrivateTest",
        # Without a side of its own it counts on every one, rather than on one drawn by lot.
        *(["3"] * 12),
        fer_row(3, 3, "Unheard"),
        fer_row(3, 0, "Training"),
    ]
    path.write_text("emotion,pixels,Usage\n" + "\n".join(rows) + "\n")
    command = ("--model", reader, "--dataset", "fer2013", "--archive", path)
    lost = {"row has 1 cells instead of 3": 12, "unknown Usage 'Unheard'": 1}
    found = score(*command)
    assert (found["n"], found["accuracy"]) == (1, 1.0)
    assert found["unusable"] == lost | {
        "label 9 is outside 0-6": 1,
        "no label": 1,
        "3 pixels instead of 2304": 1,
        "0 pixels instead of 2304": 1,
    }
    assert score(*command, "--split", "train")["unusable"] == lost
    everything = score(*command, "--split", "all")
    assert everything["n"] + sum(everything["unusable"].values()) == len(rows)


def test_drawn_faces_need_no_archive(score, reader, tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["download"]["synthetic"] = {"count": 70, "seed": 3}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    found = score("--model", reader, "--dataset", "synthetic")
    drawn = [face.person for face in synthetic.examples(70, 3)]
    assert found["n"] == sum(side_of(person, PARAMS.split) == "test" for person in drawn) > 0


# Landmarks


def test_landmark_figures_by_person(score, tmp_path, frames):
    members = ytf_archive("training", frames[:20]) | ytf_archive("test", frames[20:])
    archive = zipped(tmp_path / "ytf.zip", members)
    answer = mean_face(frames).astype(np.float32)
    model = constant(tmp_path / "mean.onnx", answer)
    command = ("--model", model, "--dataset", "ytf_keypoints", "--archive", archive)
    people = {person_of(name): side_of(person_of(name), PARAMS.split) for name, _, _ in frames}
    assert set(people.values()) == {"train", "val", "test"}
    total = 0
    for split in ("test", "val", "train", "all"):
        of_side = [row for row in frames if split in (people[person_of(row[0])], "all")]
        found = score(*command, "--split", split)
        expected = expected_landmarks([points for _, _, points in of_side], answer)
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
        assert found["task"] == "landmarks"
        assert found["n"] + found["without_eyes"] == len(of_side)
        assert found["unusable"] == {}
        for name in ("nme_interocular", "nme_interocular_inner", "fr10", "auc10", "mae"):
            low, high = found["ci95"][name]
            assert low <= found[name] <= high
        total += found["n"]
    assert found["without_eyes"] == 1
    assert 0 < found["fr10"] < 1
    assert total == 2 * found["n"]  # each person on one side


def test_a_flat_answer_of_136_numbers_is_points_too(score, tmp_path, frames):
    archive = zipped(tmp_path / "ytf.zip", ytf_archive("test", frames))
    answer = mean_face(frames).astype(np.float32)
    first, second = (
        score(
            *("--model", constant(tmp_path / "mean.onnx", value)),
            *("--dataset", "ytf_keypoints", "--archive", archive, "--split", "all"),
        )
        for value in (answer, answer.ravel())
    )
    assert first == second


def test_frames_of_one_person_do_not_narrow_the_interval(score, tmp_path, frames):
    few = [row for row in frames if row[0].endswith("_00.jpg")]
    many = [
        (name.replace("_00.jpg", f"_{copy:02d}.jpg"), image, points)
        for name, image, points in few
        for copy in range(4)
    ]
    model = constant(tmp_path / "mean.onnx", mean_face(frames).astype(np.float32))
    first, second = (
        score(
            *("--model", model, "--dataset", "ytf_keypoints", "--split", "all", "--archive"),
            zipped(tmp_path / f"{len(rows)}.zip", ytf_archive("test", rows)),
        )
        for rows in (few, many)
    )
    assert second["n"] == 4 * first["n"]
    for name, bounds in first["ci95"].items():
        assert second["ci95"][name] == pytest.approx(bounds, rel=1e-9)


def test_unlabelled_frames_and_rows_without_frames(score, tmp_path, frames):
    members = ytf_archive("test", frames[:4])
    del members["test/" + frames[0][0]]
    members["test/" + frames[1][0]] = b"no picture"
    members["test/Some_Body_01.jpg"] = frames[0][1]
    model = constant(tmp_path / "mean.onnx", mean_face(frames).astype(np.float32))
    found = score(
        *("--model", model, "--dataset", "ytf_keypoints", "--split", "all", "--archive"),
        zipped(tmp_path / "ytf.zip", members),
    )
    assert found["n"] == 2
    assert found["unusable"] == {
        "its image is not in the archive": 1,
        "unreadable: cannot identify image file": 1,
        "no landmarks in test_frames_keypoints.csv": 1,
    }


def test_a_model_of_another_scheme_is_refused(score, tmp_path, frames):
    archive = zipped(tmp_path / "ytf.zip", ytf_archive("test", frames[:4]))
    model = constant(tmp_path / "fifteen.onnx", np.full((15, 2), 0.5))
    command = ("--model", model, "--dataset", "ytf_keypoints", "--archive", archive)
    line = complaint(score, *command, "--split", "all")
    assert "answers 15 points, the faces have 68" in line


# Slices


def test_emotion_figures_by_slice(score, reader, tmp_path):
    rng = np.random.default_rng(8)
    rows = [("test", int(label), int(answer)) for label, answer in rng.integers(0, 7, (60, 2))]
    rows += [("test", 2, 2)] * 20
    archive = fer_archive("zip", tmp_path, rows)
    plots = tmp_path / "plots"
    found = score(
        *("--model", reader, "--dataset", "fer2013", "--archive", archive, "--plots", plots)
    )
    slices = found["slices"]
    assert list(slices) == ["class", "brightness", "face_size", "source"]  # no yaw known
    assert list(slices["class"]) == list(EMOTIONS)
    for emotion, row in slices["class"].items():
        assert row["n"] == found["per_class"][emotion]["n"]
        assert row["accuracy"] == pytest.approx(found["per_class"][emotion]["recall"])
        assert (row["ci95"] is None) == (row["n"] < 10)
        assert (found["per_class"][emotion]["ci95"] is None) == (row["n"] < 10)
        if row["ci95"]:
            by_class = found["per_class"][emotion]["ci95"]["recall"]
            assert row["ci95"]["accuracy"] == pytest.approx(by_class, abs=1e-6)
    low, high = slices["class"]["fear"]["ci95"]["accuracy"]
    assert low < slices["class"]["fear"]["accuracy"] < high
    for column in ("brightness", "face_size", "source"):
        assert sum(row["n"] for row in slices[column].values()) == len(rows)
    assert slices["face_size"]["32-64"]["accuracy"] == pytest.approx(found["accuracy"])
    assert slices["source"]["fer2013"]["ci95"]["accuracy"] == found["ci95"]["accuracy"]
    # The flat pictures are as bright as the answer that `reader` will give.
    order = np.argsort([answer for _, _, answer in rows], kind="stable")
    third = [rows[number] for number in order[: slices["brightness"]["dark third"]["n"]]]
    share = np.mean([label == answer for _, label, answer in third])
    assert slices["brightness"]["dark third"]["accuracy"] == pytest.approx(share)
    assert is_picture(plots / "slices.png")


def test_landmark_figures_by_slice(score, tmp_path, frames):
    answer = mean_face(frames).astype(np.float32)
    found = score(
        *("--model", constant(tmp_path / "mean.onnx", answer), "--dataset", "ytf_keypoints"),
        *("--archive", zipped(tmp_path / "ytf.zip", ytf_archive("test", frames))),
        *("--split", "all"),
    )
    assert "class" not in found["slices"]  # none has one
    sizes: dict[str, list] = {}
    for _, _, points in frames:
        longer = np.ptp(points[np.isfinite(points).all(1)], 0).max()
        name = next(
            (
                f"{low}-{low * 2}" if low else "under 32"
                for low in (0, 32, 64)
                if longer < (low or 16) * 2
            ),
            "128 or more",
        )
        sizes.setdefault(name, []).append(points)
    assert found["slices"]["face_size"].keys() == sizes.keys()
    for name, labelled in sizes.items():
        row = found["slices"]["face_size"][name]
        expected = expected_landmarks(labelled, answer)
        assert row["n"] == len(labelled)  # the one without eyes has a box
        assert row["nme_interocular"] == pytest.approx(expected["nme_interocular"], abs=1e-5)
    whole = found["slices"]["source"]["ytf_keypoints"]
    assert whole["nme_interocular"] == pytest.approx(found["nme_interocular"])
    assert whole["nme_box"] == pytest.approx(found["nme_box"], rel=0.05)
    assert sum(row["n"] for row in found["slices"]["yaw"].values()) <= 36


# The same model in every runtime


def test_every_runtime_gives_the_same_emotion_figures(score, exported, tmp_path):
    members = {
        f"test/{EMOTIONS[face.emotion]}/PrivateTest_{number}.jpg": face.image
        for number, face in enumerate(exported.faces)
    }
    archive = zipped(tmp_path / "fer2013.zip", members)
    found = in_every_runtime(score, exported, "emotion", "fer2013", archive)
    for name in ("accuracy", "macro_f1", "balanced_accuracy"):
        assert len({round(scores[name], 9) for scores in found}) == 1
    assert 1 / 7 < found[0]["accuracy"] < 1
    assert found[0]["n"] == len(exported.faces)


def test_every_runtime_gives_the_same_landmark_figures(score, exported, tmp_path, frames):
    archive = zipped(tmp_path / "ytf.zip", ytf_archive("test", frames))
    found = in_every_runtime(score, exported, "landmarks", "ytf_keypoints", archive)
    for name in ("nme_interocular", "nme_interocular_inner", "fr10", "auc10"):
        assert [scores[name] for scores in found] == pytest.approx([found[0][name]] * 4, abs=1e-4)
    assert found[0]["n"] == 35


def in_every_runtime(score, exported, task: str, dataset: str, archive: Path) -> list[dict]:
    deploy = exported.root / "deploy"
    models = {
        "keras": deploy / "candidate" / f"{task}.keras",
        "litert": deploy / task / "tflite" / "float32.tflite",
        "onnxruntime": deploy / task / "tensorrt" / "float32.onnx",
        "tfjs-chromium" if shutil.which("chromium") else "tfjs-node": (
            deploy / task / "tfjs" / "float32"
        ),
    }
    found = []
    for runtime, model in models.items():
        found.append(
            score("--model", model, "--dataset", dataset, "--archive", archive, "--split", "all")
        )
        assert found[-1]["runtime"].startswith(f"{runtime} ")
    return found


# What cannot be measured is said in one line


def test_archives_that_are_none(score, reader, tmp_path, frames):
    fer = fer_archive("zip", tmp_path, [("test", 0, 0)] * 3)
    ytf = zipped(tmp_path / "ytf.zip", ytf_archive("test", frames[:2]))
    page, cut = tmp_path / "page.zip", tmp_path / "cut.zip"
    page.write_text("<!DOCTYPE html><html><title>Quota exceeded</title></html>")
    cut.write_bytes(fer.read_bytes()[:-30])
    for archive, dataset, said in (
        (ytf, "fer2013", "This looks like ytf_keypoints"),
        (fer, "ytf_keypoints", "This looks like fer2013"),
        (page, "fer2013", "is a web page ('Quota exceeded')"),
        (cut, "fer2013", "ends early"),
        (tmp_path / "absent.zip", "fer2013", "is missing"),
    ):
        line = complaint(score, "--model", reader, "--dataset", dataset, "--archive", archive)
        assert said in line
        assert archive.name in line


def test_models_that_are_none(score, tmp_path, frames):
    archive = fer_archive("zip", tmp_path, [("test", 0, 0), ("test", 1, 1)])
    command = ("--dataset", "fer2013", "--archive", archive)
    five = constant(tmp_path / "five.onnx", np.arange(5))
    line = complaint(score, "--model", five, *command)
    assert "(5,)" in line
    assert "(7,)" in line
    assert "(68, 2) or (15, 2)" in line
    line = complaint(score, "--model", tmp_path / "absent.tflite", *command)
    assert "absent.tflite does not exist" in line
    points = constant(tmp_path / "points.onnx", mean_face(frames))
    line = complaint(score, "--model", points, *command)
    assert "no usable test example for task landmarks" in line
    assert "{'no label for landmarks': 2}" in line


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_answer_that_is_no_number_is_not_left_out(score, tmp_path, frames, value):
    answer = mean_face(frames)
    answer[12, 1] = value
    archive = zipped(tmp_path / "ytf.zip", ytf_archive("test", frames[:4]))
    model = constant(tmp_path / "broken.onnx", answer)
    command = ("--model", model, "--dataset", "ytf_keypoints", "--archive", archive)
    assert "NaN or infinity on 4 of 4 faces" in complaint(score, *command, "--split", "all")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "m.onnx"], "--dataset"),
        (["--model", "m.onnx"], "--out"),
        (["--model", "m.onnx", "--out", "o", "--archive", "x"], "--archive needs --dataset"),
        (["--model", "m.onnx", "--out", "o", "--side", "train"], "invalid choice: 'train'"),
        (["--model", "m.onnx", "--dataset", "fer2013", "--test-time", "five"], "'ten_crop'"),
        (["--model", "m.onnx", "--dataset", "fer2013"], "--archive is needed"),
        (["--model", "m.onnx", "--dataset", "synthetic", "--archive", "x"], "leave --archive out"),
        (["--model", "m.onnx", "--dataset", "mnist", "--archive", "x"], "invalid choice: 'mnist'"),
    ],
)
def test_a_wrong_command_is_explained(score, capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        score(*arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_from_the_shell(reader, tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    archive = fer_archive("zip", tmp_path, [("test", 2, 2), ("test", 2, 3)])
    command = [sys.executable, "-m", "pipelines.evaluate", "--model", reader]

    def shell(archive: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, "--dataset", "fer2013", "--archive", archive],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    good, bad = shell(archive), shell("no.zip")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["accuracy"] == 0.5
    assert bad.returncode == 1
    assert bad.stdout == ""
    (line,) = bad.stderr.splitlines()
    assert line.startswith("error: no.zip is missing")


# Plots


def test_emotion_plots(score, reader, tmp_path):
    rows = [("test", 0, 0), ("test", 0, 3), ("test", 5, 5), ("val", 1, 1)]
    archive = fer_archive("zip", tmp_path, rows)
    plots = tmp_path / "plots"
    plots.mkdir()
    (plots / "notes.txt").write_text("mine")
    score(
        *("--model", reader, "--dataset", "fer2013", "--archive", archive),
        *("--plots", plots),
    )
    with (plots / "confusion.csv").open() as file:
        table = sorted((row["actual"], row["predicted"]) for row in csv.DictReader(file))
    assert table == [("angry", "angry"), ("angry", "happy"), ("sad", "sad")]
    assert is_picture(plots / "confusion.png")
    assert is_picture(plots / "calibration.png")
    curve = pd.read_csv(plots / "calibration.csv")
    assert curve.to_dict("list") == {
        "share": [1],
        "confidence": [1],
        "accuracy": [pytest.approx(2 / 3, abs=1e-5)],
    }
    assert is_picture(plots / "worst.png")
    assert (plots / "notes.txt").read_text() == "mine"


def test_landmark_plots(score, tmp_path, frames):
    archive = zipped(tmp_path / "ytf.zip", ytf_archive("test", frames))
    answer = mean_face(frames).astype(np.float32)
    found = score(
        *("--model", constant(tmp_path / "mean.onnx", answer), "--dataset", "ytf_keypoints"),
        *("--archive", archive, "--split", "all", "--plots", tmp_path / "plots"),
    )
    with (tmp_path / "plots" / "ced.csv").open() as file:
        curve = {float(row["nme"]): float(row["share"]) for row in csv.DictReader(file)}
    assert curve[0.0] == 0
    assert curve[0.1] == pytest.approx(1 - found["fr10"], abs=1e-5)
    assert np.mean([curve[bound] for bound in curve if bound <= 0.1]) == pytest.approx(
        found["auc10"], abs=0.02
    )
    assert is_picture(tmp_path / "plots" / "ced.png")
    assert is_picture(tmp_path / "plots" / "worst.png")


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return min(image.size) > 100 and len(set(image.convert("L").getdata())) > 10


# Within the graph


def test_a_job_is_measured_on_validation_only(evaluated):
    import keras
    import mlflow

    sides = {face.id: side_of(face.person, evaluated.params.split) for face in evaluated.faces}
    wanted = [face for face in evaluated.faces if sides[face.id] == "val"]
    root = evaluated.root
    report = root / "reports" / "evaluate" / "emotion"
    scores = json.loads((report / "compact" / "scores.json").read_text())
    assert (scores["split"], scores["n"]) == ("val", len(wanted))
    images = np.load(root / "data" / "augment" / "emotion" / "val" / "images-00.npy")
    path = root / "runs" / "emotion" / "compact" / "model.keras"
    outputs = keras.saving.load_model(path).predict(images, verbose=0)
    with np.load(report / "compact" / "predictions.npz") as saved:
        np.testing.assert_allclose(saved["outputs"], outputs, atol=1e-6)
        assert saved["ids"].tolist() == [face.id for face in wanted]
        assert saved["models"].tolist() == [hashlib.sha256(path.read_bytes()).hexdigest()]
    right = [face.emotion == row.argmax() for face, row in zip(wanted, outputs, strict=True)]
    assert scores["accuracy"] == pytest.approx(np.mean(right))
    assert is_picture(report / "compact" / "worst.png")
    assert is_picture(report / "compact" / "slices.png")
    assert is_picture(report / "compact" / "calibration.png")
    assert (scores["test_time"], "averaged" in scores) == ("none", False)
    slices = scores["slices"]
    assert list(slices) == ["class", "brightness", "yaw", "face_size", "source"]
    assert sum(row["n"] for row in slices["yaw"].values()) == len(wanted)
    whole = slices["source"]["synthetic"]
    assert (whole["n"], whole["accuracy"]) == (len(wanted), pytest.approx(scores["accuracy"]))
    compact = json.loads((report / "compact.json").read_text())
    assert compact["accuracy"] == scores["accuracy"]
    assert all(isinstance(value, int | float) for value in compact.values())

    with evaluated.inside():
        mlflow.set_tracking_uri(evaluated.params.tracking.uri)
        runs = mlflow.search_runs(experiment_names=["grimace-emotion"], output_format="list")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (run,) = [run for run in runs if run.data.tags["grimace.model_sha256"] == digest]
        logged = run.data.metrics
        assert logged["val/accuracy"] == pytest.approx(scores["accuracy"])
        assert logged["val/ece"] == pytest.approx(scores["ece"])
        for name in ("accuracy", "ece"):
            bounds = [logged[f"val/{name}.low"], logged[f"val/{name}.high"]]
            assert bounds == pytest.approx(scores["ci95"][name])
        assert logged["parameters"] == keras.saving.load_model(path).count_params()
        assert logged["size_mib"] == pytest.approx(path.stat().st_size / 2**20)
        files = mlflow.MlflowClient().list_artifacts(run.info.run_id, "validation")
    assert "validation/scores.json" in [file.path for file in files]


def test_an_unknown_job_names_the_known_ones(world):
    with world.inside(), pytest.raises(GrimaceError, match="it has emotion-compact, "):
        evaluate.evaluate_job("emotion-vgg", world.params)


# Averaged answers, for measuring alone


@pytest.fixture
def here(world, tmp_path, score) -> Path:
    """The small world's data and models, in the folder where `score` works."""
    for part in ("params.yaml", "runs", "data"):
        source, target = world.root / part, tmp_path / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return tmp_path


def answers_of(path: Path, images: np.ndarray) -> np.ndarray:
    import keras

    return keras.saving.load_model(path).predict(images.astype(np.float32), verbose=0)


def saved(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "predictions.npz") as file:
        return dict(file)


def test_an_ensemble_on_the_graphs_own_validation_side(score, here, world):
    models = [here / f"runs/emotion/{name}/model.keras" for name in ("plain", "compact")]
    found = score("--model", *models, "--out", here / "both")
    images = np.load(here / "data/augment/emotion/val/images-00.npy")
    mean = np.mean([answers_of(path, images) for path in models], 0)
    predicted = saved(here / "both")
    np.testing.assert_allclose(predicted["outputs"], mean, atol=1e-6)
    sides = {face.id: side_of(face.person, world.params.split) for face in world.faces}
    assert {sides[id] for id in predicted["ids"]} == {"val"}
    emotions = {face.id: face.emotion for face in world.faces}
    right = [emotions[id] == row.argmax() for id, row in zip(predicted["ids"], mean, strict=True)]
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert (found["split"], found["test_time"], found["n"]) == ("val", "none", len(images))
    assert found["model"] == " + ".join(map(str, models))
    assert found["cost"]["bytes"] == sum(path.stat().st_size for path in models)
    assert found["slices"]["source"]["synthetic"]["n"] == len(images)
    assert json.loads((here / "both/scores.json").read_text()) == found
    assert predicted["files"].tolist() == [str(path) for path in models]
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in models]
    assert predicted["models"].tolist() == sums
    task = world.params.tasks.emotion
    assert predicted["crop"].tolist() == [task.size, task.channels, task.margin]
    assert is_picture(here / "both/confusion.png")


def test_the_test_side_is_looked_at_on_request_alone(score, here, world):
    model = here / "runs/landmarks/compact/model.keras"
    score("--model", model, "--out", here / "out", "--side", "test")
    sides = {face.id: side_of(face.person, world.params.split) for face in world.faces}
    assert {sides[id] for id in saved(here / "out")["ids"]} == {"test"}


def test_members_of_an_ensemble_may_take_other_shapes(score, reader, tmp_path):
    archive = fer_archive("zip", tmp_path, [("test", 3, 3), ("test", 4, 3), ("test", 4, 4)])
    always = np.eye(7)[3] * 0.9 + 0.1 / 7
    small = constant(tmp_path / "small.onnx", always, side=20)
    found = score(
        *("--model", reader, small, "--dataset", "fer2013", "--archive", archive),
        *("--out", tmp_path / "out"),
    )
    expected = (np.eye(7)[[3, 3, 4]] + always) / 2
    outputs = saved(tmp_path / "out")["outputs"]
    np.testing.assert_allclose(np.sort(outputs, 0), np.sort(expected, 0), atol=1e-5)
    assert found["n"] == 3
    assert "parameters" not in found["cost"]


def test_models_of_two_tasks_are_no_ensemble(score, reader, tmp_path, frames):
    archive = fer_archive("zip", tmp_path, [("test", 0, 0)])
    points = constant(tmp_path / "points.onnx", mean_face(frames))
    command = ("--dataset", "fer2013", "--archive", archive)
    line = complaint(score, "--model", reader, points, *command)
    assert "models for emotion and landmarks cannot be averaged" in line


@pytest.mark.parametrize("task", ["emotion", "landmarks"])
def test_averaging_over_the_mirror_image(score, here, task):
    model = here / f"runs/{task}/compact/model.keras"
    found = score("--model", model, "--out", here / "out", "--test-time", "flip")
    images = np.load(here / f"data/augment/{task}/val/images-00.npy")
    plain, flipped = answers_of(model, images), answers_of(model, images[:, :, ::-1])
    if task == "landmarks":
        flipped[..., 0] = 1 - flipped[..., 0]
        for left, right in ((36, 45), (39, 42), (48, 54), (31, 35), (0, 16), (17, 26)):
            flipped[:, [left, right]] = flipped[:, [right, left]]
        chosen = [36, 45, 39, 42, 48, 54, 31, 35, 0, 16, 17, 26, 8, 27, 33, 51, 57]
        plain, flipped = plain[:, chosen], flipped[:, chosen]
    outputs = saved(here / "out")["outputs"]
    outputs = outputs if task == "emotion" else outputs[:, chosen]
    np.testing.assert_allclose(outputs, (plain + flipped) / 2, atol=1e-5)
    assert np.abs(plain - flipped).max() > 0.01
    assert found["test_time"] == "flip"


def test_ten_crops_of_an_archive(score, tmp_path):
    """A model that sees the two columns on the left, of a picture with five bright ones there."""
    bright = np.where(np.arange(48) < 5, 255, 0) * np.ones((48, 1))
    archive = zipped(tmp_path / "fer.zip", {"test/happy/PrivateTest_1.jpg": picture(bright, "PNG")})
    nodes = [
        helper.make_node("Slice", ["image", "start", "end", "axes"], ["left"]),
        helper.make_node("ReduceMean", ["left"], ["grey"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["grey", "last"], ["column"]),
        helper.make_node("Mul", ["column", "weights"], ["answer"]),
    ]
    constants = {
        "start": np.array([0]),
        "end": np.array([2]),
        "axes": np.array([2]),
        "last": np.array([1]),
        "weights": np.eye(7, dtype=np.float32)[[3]] / 255,
    }
    model = save_onnx(tmp_path / "left.onnx", nodes, constants, [7])
    command = ("--model", model, "--dataset", "fer2013", "--archive", archive)
    # Of the crops of 42 pixels, two start at column 0, one at 3, and two at 6, which is dark.
    for how, expected in (("none", 1), ("flip", 1 / 2), ("ten_crop", 3 / 5 / 2)):
        score(*command, "--out", tmp_path / how, "--test-time", how)
        assert saved(tmp_path / how)["outputs"][0, 3] == pytest.approx(expected, abs=1e-3)


def test_a_job_keeps_the_single_crop_first_and_says_what_averaging_gives(score, here, world):
    for how in ("flip", "ten_crop"):
        params = yaml.safe_load((here / "params.yaml").read_text())
        params["evaluate"]["test_time"] = how
        (here / "params.yaml").write_text(yaml.safe_dump(params))
        evaluate.evaluate_job("emotion-compact", load_params(here / "params.yaml"), how)
        report = here / "reports/evaluate/emotion/compact"
        scores = json.loads((report / "scores.json").read_text())
        images = np.load(here / "data/augment/emotion/val/images-00.npy")
        plain = answers_of(here / "runs/emotion/compact/model.keras", images)
        np.testing.assert_allclose(saved(report)["outputs"], plain, atol=1e-6)
        assert (scores["test_time"], scores["averaged"]["test_time"]) == ("none", how)
        assert scores["averaged"]["n"] == scores["n"]
        assert scores["averaged"]["ece"] != scores["ece"]
        assert json.loads(report.with_suffix(".json").read_text())["ece"] == scores["ece"]
        logged = evaluate.charted(scores)
        assert logged["val/averaged.ece"] == scores["averaged"]["ece"]


def test_what_is_no_evaluation_is_not_replaced(score, reader, tmp_path):
    archive = fer_archive("zip", tmp_path, [("test", 2, 2)])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    command = ("--model", reader, "--dataset", "fer2013", "--archive", archive, "--out")
    assert "mine would be replaced" in complaint(score, *command, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").exists()
    score(*command, tmp_path / "new")
    score(*command, tmp_path / "new")


# Kaggle's fifteen points as means of iBUG's, in Kaggle's own column order (left is the person's).
FIFTEEN = {
    "left_eye_center": range(42, 48),
    "right_eye_center": range(36, 42),
    "left_eye_inner_corner": [42],
    "left_eye_outer_corner": [45],
    "right_eye_inner_corner": [39],
    "right_eye_outer_corner": [36],
    "left_eyebrow_inner_end": [22],
    "left_eyebrow_outer_end": [26],
    "right_eyebrow_inner_end": [21],
    "right_eyebrow_outer_end": [17],
    "nose_tip": [30],
    "mouth_left_corner": [54],
    "mouth_right_corner": [48],
    "mouth_center_top_lip": [51],
    "mouth_center_bottom_lip": [57],
}
MOSTLY_KNOWN = ("left_eye_center", "right_eye_center", "nose_tip", "mouth_center_bottom_lip")


def kaggle_archive(path: Path, count: int) -> Path:
    """Two rows in three label four points, every tenth lacks an eye."""
    lines = [",".join([*(f"{name}_{axis}" for name in FIFTEEN for axis in "xy"), "Image"])]
    for number, face in enumerate(synthetic.examples(count, 4)):
        picture = Image.open(io.BytesIO(face.image)).convert("L").resize((96, 96))
        cells = []
        for name, members in FIFTEEN.items():
            x, y = (face.landmarks[list(members)].mean(0) + 0.5) * 0.75 - 0.5
            blank = number % 3 and name not in MOSTLY_KNOWN
            blank = blank or (number % 10 == 0 and name == "right_eye_center")
            cells += ["", ""] if blank else [f"{x:.3f}", f"{y:.3f}"]
        lines.append(",".join([*cells, " ".join(map(str, np.asarray(picture).ravel()))]))
    return zipped(path, {"training.csv": "\n".join(lines).encode()})


def test_fifteen_points_from_split_to_scores(tmp_path, monkeypatch, score):
    """The stages as the graph runs them, on Kaggle's format."""
    from pipelines import augment, split, train

    name, count = "kaggle_keypoints", 120
    archive = kaggle_archive(tmp_path / f"{name}.zip", count)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["tasks"]["landmarks"] |= {"dataset": name, "size": 16}
    params["tracking"]["uri"] = f"sqlite:///{tmp_path}/mlflow.db"
    params["augment"] |= {"workers": 1}
    params["augment"]["landmarks"] |= {"views": 2}
    params["evaluate"] |= {"resamples": 100, "gallery": 4}
    params["train"]["jobs"]["landmarks-plain"] |= {"widths": [4, 8], "epochs": 2}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    faces = list(examples(name, open_archive(archive)))
    for folder in (f"data/clean/{name}", f"reports/filter/{name}"):
        Path(folder).mkdir(parents=True)
    write_examples(faces, Path("data/clean", name))
    measured = pd.DataFrame({"id": [face.id for face in faces], "cluster": ""})
    measured["person"] = [face.person for face in faces]
    measured.assign(brightness=range(count), yaw=np.nan, face_size=50.0).to_parquet(
        f"reports/filter/{name}/examples.parquet"
    )

    for stage, *arguments in (
        (split, "--dataset", name),
        (augment, "--task", "landmarks"),
        (train, "--job", "landmarks-plain"),
        (evaluate, "--job", "landmarks-plain"),
    ):
        monkeypatch.setattr(sys, "argv", ["stage", *arguments])
        stage.main()

    found = json.loads(Path("reports/evaluate/landmarks/plain/scores.json").read_text())
    index = pd.read_parquet(f"data/split/{name}/index.parquet").set_index("id")
    val = [face for face in faces if index["split"][face.id] == "val"]
    blind = sum(not face.visible[:2].all() for face in val)
    assert (found["scheme"], found["n"], found["without_eyes"]) == (
        *("kaggle-15", len(val) - blind),
        blind,
    )
    assert blind > 0 and 0 < found["nme_interocular"] < 1
    # The same model by itself, on the same archive: the same faces and figures.
    model = Path("runs/landmarks/plain/model.keras")
    again = score("--model", model, "--dataset", name, "--archive", archive, "--split", "val")
    for metric in ("n", "nme_interocular", "nme_box", "auc10"):
        assert again[metric] == pytest.approx(found[metric], rel=1e-3)
