import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipelines import bundles, verify
from pipelines.cli import GrimaceError
from pipelines.heldout import crop_all
from pipelines.runtimes import javascript, load, onnx_runtime, tensorrt
from pipelines.split import side_of
from pipelines.tracking import sha256

RUNTIMES = {
    "tensorrt/float32": "onnxruntime",
    "tensorrt/float16": "onnxruntime",
    "tensorrt/int8": "onnxruntime",
    "tflite/float32": "litert",
    "tflite/float16": "litert",
    "tflite/dynamic": "litert",
    "tflite/int8": "litert",
    "tfjs/float16": "tfjs-node",
    "tfjs/float32": "tfjs-node",
    "tfjs/uint8": "tfjs-node",
}
METRIC = {"emotion": "accuracy", "landmarks": "nme_interocular"}


def read(root: Path, name: str):
    return json.loads((root / "reports" / "verify" / name).read_text())


def expected(world, task: str, model: Path) -> tuple[float, int, np.ndarray]:
    """The deciding figure of a model on the test side, face by face; faces; answers."""
    wanted = [face for face in world.faces if side_of(face.person, world.params.split) == "test"]
    faces = crop_all(wanted, task, world.params.tasks.named(task))
    with load(model) as opened:
        outputs = opened.predict(faces.images)
    if task == "emotion":
        right = [face.emotion == row.argmax() for face, row in zip(wanted, outputs, strict=True)]
        return float(np.mean(right)), len(right), outputs
    errors = []
    for truth, seen, points in zip(faces.landmarks, faces.visible, outputs, strict=True):
        distance = np.hypot(*(truth - points)[seen].T).mean()
        errors.append(distance / np.hypot(*(truth[36] - truth[45])))
    return float(np.mean(errors)), len(errors), outputs


@pytest.mark.parametrize("task", METRIC)
def test_every_deployable_is_measured_on_the_whole_test_side(verified, task):
    root, metric = verified.root, METRIC[task]
    deploy = root / "deploy" / task
    figure, count, reference = expected(verified, task, root / f"deploy/candidate/{task}.keras")
    test, numerics, perf = (read(root, f"{task}/{n}.json") for n in ("test", "numerics", "perf"))
    assert (test["split"], test["n"]) == ("test", count)
    assert test[metric] == pytest.approx(figure, rel=1e-5)
    assert numerics.keys() == perf.keys() == RUNTIMES.keys()
    for name, scores in numerics.items():
        assert scores["n"] == count
        assert set(scores["ci95"]) == set(test["ci95"])
        change = scores[metric] - test[metric]
        loss = -100 * change if task == "emotion" else change / test[metric]
        assert scores["loss"] == pytest.approx(loss, abs=1e-9)
        files = [*(deploy / name).rglob("*"), *deploy.glob(f"{name}.[to]*")]
        assert perf[name]["bytes"] == sum(path.stat().st_size for path in files)
        assert perf[name]["runtime"].startswith(RUNTIMES[name] + " ")
        assert perf[name]["threads"] == 1
        assert 0 < perf[name]["p50_ms"] <= perf[name]["p95_ms"]
        assert perf[name]["load_ms"] > 0
        assert 0 <= perf[name]["memory_mib"] < 200  # not what this process has, with TensorFlow
        many = perf[name].get("all_threads", {"threads": 1, "p50_ms": 1, "p95_ms": 1})
        assert many["threads"] == (1 if "tfjs" in name else os.cpu_count())
        assert 0 < many["p50_ms"] <= many["p95_ms"]
        low, high = scores["loss_ci95"]
        assert low <= scores["loss"] + 1e-9 and scores["loss"] - 1e-9 <= high
        assert scores["golden"]["passed"] is True
        assert scores["golden"]["difference"] <= scores["golden"]["tolerance"]
    for name, file in (("tflite/int8", "int8.tflite"), ("tensorrt/int8", "int8.onnx")):
        figure, _, outputs = expected(verified, task, deploy / name.split("/")[0] / file)
        assert numerics[name][metric] == pytest.approx(figure, rel=1e-5)
        difference = np.abs(outputs - reference).max()
        assert numerics[name]["max_difference"] == pytest.approx(difference, rel=1e-5)
        assert difference > 1e-3
        if task == "emotion":
            same = (outputs.argmax(1) == reference.argmax(1)).mean()
            assert numerics[name]["agreement"] == pytest.approx(same)
        else:
            ours, theirs = (each.reshape(count, 68, 2) for each in (outputs, reference))
            eyes = np.linalg.norm(theirs[:, 45] - theirs[:, 36], axis=-1)
            apart = np.linalg.norm(ours - theirs, axis=-1).mean(1) / eyes
            wanted = np.percentile(apart, [50, 95])  # of all points, seen or not
            assert numerics[name]["agreement"] == pytest.approx(wanted, rel=0.1)
    assert numerics["tflite/float32"]["max_difference"] < 1e-4


@pytest.mark.parametrize("task", METRIC)
def test_the_verdict_is_whole(verified, task):
    root = verified.root
    budgets, numerics = read(root, f"{task}/budgets.json"), read(root, f"{task}/numerics.json")
    candidate = (root / "deploy" / "candidate" / f"{task}.keras").read_bytes()
    engine = root / "deploy" / task / "tensorrt" / "int8.sm89.engine"
    assert budgets["not_available"].keys() == {"tensorrt/int8.sm89.engine"}
    assert "no NVIDIA GPU" in budgets["not_available"]["tensorrt/int8.sm89.engine"]
    assert budgets["left_out"] == ["tflite:litertjs", "tfjs:wasm", "tfjs:webgl", "tfjs:webgpu"]
    assert (budgets["task"], budgets["passed"]) == (task, True)
    assert budgets["model_sha256"] == hashlib.sha256(candidate).hexdigest()
    assert budgets["built_but_not_run"] == {engine.name: engine.stat().st_size}
    settings = verified.params.verify
    bound = settings.accuracy_points["default"] if task == "emotion" else settings.nme_relative
    assert {gate["name"] for gate in budgets["gates"]} == set(RUNTIMES)
    for gate in budgets["gates"]:
        assert gate["passed"] is True
        assert (gate["value"], gate["bound"]) == (numerics[gate["name"]]["loss"], bound)
        assert f"on {numerics[gate['name']]['n']} faces" in gate["why"]
    summary = read(root, f"{task}.json")
    assert summary["within_budget"] == 1
    assert summary["test"] == read(root, f"{task}/test.json")[METRIC[task]]
    assert all(summary[name] == numerics[name][METRIC[task]] for name in RUNTIMES)
    assert (root / "reports" / "verify" / task / "worst.png").stat().st_size > 1000


def test_the_run_of_the_training_is_told(verified):
    import mlflow

    with verified.inside():
        mlflow.set_tracking_uri(verified.params.tracking.uri)
        runs = mlflow.search_runs(experiment_names=["grimace-emotion"], output_format="list")
    (run,) = [run for run in runs if "grimace.within_budget" in run.data.tags]
    budgets = read(verified.root, "emotion/budgets.json")
    assert run.data.tags["grimace.model_sha256"] == budgets["model_sha256"]
    assert run.data.tags["grimace.within_budget"] == "True"
    numerics = read(verified.root, "emotion/numerics.json")
    told = run.data.metrics["deployed/tflite.int8.accuracy"]
    assert told == pytest.approx(numerics["tflite/int8"]["accuracy"])


# Other runtimes


def in_runtimes(world, tflite: list[str], tfjs: list[str]):
    """The world's parameters with these runtimes, and five faces for a GPU that is imitated."""
    runtimes = type(world.params.verify.runtimes)(tflite=tuple(tflite), tfjs=tuple(tfjs))
    changed = {"runtimes": runtimes, "software_faces": 5}
    settings = world.params.verify.model_copy(update=changed)
    return world.params.model_copy(update={"verify": settings})


def measured(world, task: str, names: list[str], params) -> tuple[verify.Test, verify.Measured]:
    with world.inside():
        model = Path("deploy/candidate", f"{task}.keras")
        found, _ = verify.deployables(Path("deploy", task), task, sha256(model))
        faces = verify.faces_of_side(task, params.tasks.named(task), "test")
        with load(model) as opened:
            reference = opened.predict(faces.images)
        test = verify.Test(faces, reference, verify.measure(faces, reference, params.evaluate))
        some = {name: found[name] for name in names}
        return test, verify.measure_all(some, test, params, budget=60.0)


def test_an_engine_has_a_row_where_its_gpu_is(exported, monkeypatch):
    def on_a_gpu(path: Path, threads: int):
        opened = onnx_runtime.load(path.with_name("int8.onnx"), threads)
        return dataclasses.replace(opened, opening={"load_ms": 3.0, "memory_mib": 2.0})

    monkeypatch.setattr(tensorrt, "load", on_a_gpu)
    _, done = measured(exported, "emotion", ["tensorrt/int8.sm89"], exported.params)
    assert done.absent == {} and done.engines == {}
    (gate,) = done.gates
    assert gate["name"] == "tensorrt/int8.sm89" and gate["passed"]
    assert done.numerics.keys() == {gate["name"]}
    assert done.perf[gate["name"]]["load_ms"] == 3.0


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH")
def test_each_runtime_of_a_graph_has_a_row(exported):
    params = in_runtimes(exported, ["litert", "litertjs"], ["wasm", "node", "webgl"])
    test, done = measured(exported, "emotion", ["tflite/int8", "tfjs/uint8"], params)
    assert done.absent == {} and done.engines == {}
    runs_in = {name: perf["runtime"].partition(" ")[0] for name, perf in done.perf.items()}
    assert runs_in == {
        "tflite/int8": "litert",
        "tflite/int8:litertjs": "litertjs-chromium",
        "tfjs/uint8": "tfjs-chromium",
        "tfjs/uint8:node": "tfjs-node",
        "tfjs/uint8:webgl": "tfjs-chromium",
    }
    total = len(test.faces.ids)
    for name, row in done.numerics.items():
        software = done.perf[name]["software"]
        assert row["n"] == (5 if software else total)
        assert (name in {gate["name"] for gate in done.gates}) != software
        assert row["golden"]["passed"] and row["agreement"] > 0.8
        assert done.perf[name]["p50_ms"] > 0 and done.perf[name]["load_ms"] > 0
        assert done.perf[name]["memory_mib"] >= 0
    threaded = {name for name, perf in done.perf.items() if "all_threads" in perf}
    if os.cpu_count() > 1:
        assert {"tflite/int8", "tflite/int8:litertjs"} <= threaded
    assert not threaded & {"tfjs/uint8:node", "tfjs/uint8:webgl"}
    assert all(gate["passed"] for gate in done.gates)
    own, other = (done.numerics[name] for name in ("tfjs/uint8", "tfjs/uint8:node"))
    assert own["accuracy"] == other["accuracy"]
    if done.perf["tfjs/uint8:webgl"]["software"]:  # evenly spaced faces, and the same for Keras
        places = np.linspace(0, total - 1, 5).astype(int)
        right = test.reference[places].argmax(1) == test.faces.emotions[places]
        webgl = done.numerics["tfjs/uint8:webgl"]
        assert webgl["accuracy"] + webgl["loss"] / 100 == pytest.approx(right.mean())


def test_a_runtime_that_is_not_there_is_named_and_fails_nothing(exported, monkeypatch):
    monkeypatch.setattr(javascript, "chromium", lambda: None)
    params = in_runtimes(exported, ["litert", "litertjs"], ["wasm", "node"])
    names = ["tflite/float32", "tflite/int8", "tfjs/uint8"]
    _, done = measured(exported, "emotion", names, params)
    assert set(done.absent) == {"tflite:litertjs", "tfjs:wasm"}
    assert all("no Chromium is on PATH" in reason for reason in done.absent.values())
    assert list(done.numerics) == names == [gate["name"] for gate in done.gates]
    assert done.perf["tfjs/uint8"]["runtime"].startswith("tfjs-node")
    assert all(gate["passed"] for gate in done.gates)


def test_a_graph_without_any_runtime_has_failed(exported, monkeypatch):
    monkeypatch.setattr(javascript, "chromium", lambda: None)
    params = in_runtimes(exported, ["litert"], ["wasm", "webgl"])
    _, done = measured(exported, "emotion", ["tflite/int8", "tfjs/uint8"], params)
    assert set(done.absent) == {"tfjs:wasm", "tfjs:webgl"}
    passed = {gate["name"]: gate["passed"] for gate in done.gates}
    assert passed == {"tflite/int8": True, "tfjs/uint8": False}
    assert "no runtime of verify.runtimes is there: no Chromium" in done.gates[-1]["why"]


def test_a_graph_that_only_an_imitated_gpu_ran_has_failed(exported, monkeypatch):
    try_out = verify.try_out

    def imitated(*asked):
        numerics, perf = try_out(*asked)
        return numerics, perf | {"software": True}

    monkeypatch.setattr(verify, "try_out", imitated)
    params = in_runtimes(exported, ["litert"], ["node"])
    _, done = measured(exported, "emotion", ["tfjs/uint8"], params)
    assert done.numerics.keys() == {"tfjs/uint8"}
    (gate,) = done.gates
    assert gate["passed"] is False and gate["value"] is None
    assert "add a runtime to verify.runtimes.tfjs" in gate["why"]


# What goes wrong


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of the world as `export` left it, to break."""
    for name in ("params.yaml", "data/clean", "data/split", "deploy", ".grimace"):
        source = exported.root / name
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return type(exported)(tmp_path, exported.params, exported.faces)


def list_again(copy, bundle: Path) -> None:
    """List and sign what is there now, as if `export` had written it."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    with copy.inside():
        bundles.seal(bundle, manifest)


def save_constant(path: Path, answer: np.ndarray) -> None:
    size = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    shape = ["n", *(dim.dim_value for dim in size[1:])]
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[1, 2, 3], keepdims=1),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Reshape", ["nothing", "shape"], ["column"]),
        helper.make_node("Add", ["column", "value"], ["answer"]),
    ]
    tensors = [
        numpy_helper.from_array(np.array(0, np.float32), "zero"),
        numpy_helper.from_array(np.array([-1, *[1] * answer.ndim]), "shape"),
        numpy_helper.from_array(answer.astype(np.float32)[None], "value"),
    ]
    graph = helper.make_graph(
        nodes,
        "constant",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("answer", TensorProto.FLOAT, ["n", *answer.shape])],
        tensors,
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)


def test_damage_fails_its_own_gate_with_the_reason(copy, capsys):
    deploy = copy.root / "deploy" / "emotion"
    tensorrt, tfjs, tflite = (deploy / name for name in ("tensorrt", "tfjs", "tflite"))
    save_constant(tensorrt / "float32.onnx", np.zeros(5))
    (tensorrt / "int8.onnx").write_bytes(b"not a graph")
    list_again(copy, tensorrt)
    with (tensorrt / "int8.sm89.engine").open("ab") as file:
        file.write(b"\0")
    shard = tfjs / "float16" / "group1-shard1of1.bin"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    (tfjs / "float32" / "group1-shard1of1.bin").unlink()
    (tflite / "float32.tflite").unlink()
    os.truncate(tflite / "int8.tflite", 500)
    with copy.inside():
        verify.verify("emotion", copy.params)

    budgets = read(copy.root, "emotion/budgets.json")
    assert budgets["passed"] is False
    assert budgets["built_but_not_run"] == {}
    reasons = {gate["name"]: gate["why"] for gate in budgets["gates"] if not gate["passed"]}
    said = {
        "tensorrt/float32": "cannot reshape",
        "tensorrt/int8": "refused it",
        "tensorrt/int8.sm89": "int8.sm89.engine has ",
        "tfjs/float16": "group1-shard1of1.bin: its bytes are not those of",
        "tfjs/float32": "group1-shard1of1.bin is in the manifest but not there",
        "tflite/float32": "float32.tflite is in the manifest but not there",
        "tflite/int8": "int8.tflite has 500 bytes, the manifest says",
    }
    assert reasons.keys() == said.keys()
    printed = capsys.readouterr().out
    for name, words in said.items():
        assert words in reasons[name]
        assert f"FAILED: {name}: {reasons[name]}" in printed
    whole = {"tfjs/uint8", "tflite/float16", "tflite/dynamic", "tensorrt/float16"}
    assert {gate["name"] for gate in budgets["gates"] if gate["passed"]} == whole
    assert read(copy.root, "emotion/numerics.json").keys() == whole
    assert read(copy.root, "emotion.json")["within_budget"] == 0


def test_a_loss_beyond_the_budget_fails(copy):
    bundle = copy.root / "deploy" / "landmarks" / "tensorrt"
    save_constant(bundle / "int8.onnx", np.full((68, 2), 0.5))
    list_again(copy, bundle)
    with copy.inside():
        verify.verify("landmarks", copy.params)
    budgets = read(copy.root, "landmarks/budgets.json")
    (failed,) = [gate for gate in budgets["gates"] if not gate["passed"]]
    assert budgets["passed"] is False
    assert failed["name"] == "tensorrt/int8"
    before, _, _ = expected(copy, "landmarks", copy.root / "deploy/candidate/landmarks.keras")
    after, _, _ = expected(copy, "landmarks", bundle / "int8.onnx")
    assert failed["value"] == pytest.approx(after / before - 1, rel=1e-4)
    assert failed["bound"] == copy.params.verify.nme_relative < failed["value"]
    assert "loses" in failed["why"]
    assert "50.00% allowed" in failed["why"]


def test_each_task_has_its_own_budget():
    def passes(task: str, loss: float, bound: float, n: int = 100, golden: bool = True) -> bool:
        compared = {"passed": golden, "difference": 0.1, "tolerance": 0.05}
        scores = {"task": task, "n": n, "loss": loss, "golden": compared}
        return verify.judge("x", scores, {"n": 100}, bound)["passed"]

    assert passes("emotion", 100 * (0.71 - 0.70), 1.0)  # just the budget, but for the last bit
    assert passes("emotion", -3.0, 1.0)
    assert not passes("emotion", 1.01, 1.0)
    assert passes("landmarks", 0.02, 0.02)
    assert not passes("landmarks", 0.021, 0.02)
    assert not passes("emotion", 0.0, 1.0, n=99)
    assert not passes("emotion", 0.0, 1.0, golden=False)
    assert not passes("landmarks", float("nan"), 0.02)


def test_the_interval_of_the_loss_is_of_the_difference(verified):
    task, settings = verified.params.tasks.landmarks, verified.params.evaluate
    faces = crop_all(verified.faces, "landmarks", task)
    shift = np.float32([0.01, 0])
    before, after = faces.landmarks + shift, faces.landmarks + 2 * shift
    low, high = verify.loss_interval(faces, before, after, settings)
    assert low == pytest.approx(1, rel=1e-4) and high == pytest.approx(1, rel=1e-4)
    other = faces.landmarks + shift * np.linspace(1, 2, len(faces.ids))[:, None, None]
    low, high = verify.loss_interval(faces, before, other, settings)
    assert 0.2 < low < 0.5 < high < 0.8


def test_the_page_shows_every_deployable_and_needs_nothing_else(verified):
    page = (verified.root / "reports/verify/landmarks/index.html").read_text()
    for name in RUNTIMES:
        assert name in page
    assert "int8.sm89.engine" in page and "Layers left in float" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)


def test_nothing_passes_by_not_being_there(copy):
    deploy = copy.root / "deploy" / "emotion"
    digest = sha256(deploy.parent / "candidate" / "emotion.keras")

    def found(model: str = digest, folder: Path = deploy) -> tuple[set[str], dict[str, str]]:
        with copy.inside():
            good, gates = verify.deployables(folder, "emotion", model)
        assert not any(gate["passed"] for gate in gates)
        return set(good), {gate["name"]: gate["why"] for gate in gates}

    everything = {*RUNTIMES, "tensorrt/int8.sm89"}
    assert found() == (everything, {})
    good, reasons = found(model="0" * 64)
    assert not good and set(reasons) == {"tflite", "tfjs", "tensorrt"}
    assert "made from another model" in reasons["tfjs"]
    good, reasons = found(folder=deploy.parent / "landmarks")
    assert not good and "a bundle for landmarks, not for emotion" in reasons["tflite"]

    (deploy / "tfjs" / "uint8" / "more.bin").write_bytes(b"unlisted")
    shutil.rmtree(deploy / "tfjs" / "float16")
    good, reasons = found()
    assert good == everything - {"tfjs/uint8", "tfjs/float16"}
    assert "more.bin is there but not in the manifest" in reasons["tfjs/uint8"]
    assert "float16/group1-shard1of1.bin is in the manifest but" in reasons["tfjs/float16"]

    (deploy / "tflite" / "more.tflite").write_bytes(b"unlisted")
    (deploy / "tensorrt" / "manifest.json").write_text('{"files": [')
    good, reasons = found()
    assert good == {"tfjs/float32"}
    assert "more.tflite is there but not in the manifest" in reasons["tflite"]
    assert "was changed after it was signed" in reasons["tensorrt"]
    for name in ("tflite", "tensorrt"):
        shutil.rmtree(deploy / name)
    shutil.copytree(deploy / "tfjs", deploy / "tflite")
    _, reasons = found()
    assert "a bundle for tfjs, not for tflite" in reasons["tflite"]
    assert "tensorrt/manifest.json is missing" in reasons["tensorrt"]
    shutil.rmtree(deploy)
    with pytest.raises(GrimaceError, match="run `dvc repro export`"):
        found()
