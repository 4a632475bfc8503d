import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipelines import verify
from pipelines.cli import GrimaceError
from pipelines.evaluate import crop_all
from pipelines.params import Verify
from pipelines.runtimes import load
from pipelines.split import side_of

RUNTIMES = {
    "tensorrt/float32": "onnxruntime",
    "tensorrt/int8": "onnxruntime",
    "tflite/float32": "litert",
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
    for name, file in (("tflite/int8", "int8.tflite"), ("tensorrt/int8", "int8.onnx")):
        figure, _, outputs = expected(verified, task, deploy / name.split("/")[0] / file)
        assert numerics[name][metric] == pytest.approx(figure, rel=1e-5)
        difference = np.abs(outputs - reference).max()
        assert numerics[name]["max_difference"] == pytest.approx(difference, rel=1e-5)
        assert difference > 1e-3
        if task == "emotion":
            same = (outputs.argmax(1) == reference.argmax(1)).mean()
            assert numerics[name]["agreement"] == pytest.approx(same)
    assert numerics["tflite/float32"]["max_difference"] < 1e-4


@pytest.mark.parametrize("task", METRIC)
def test_the_blessing_is_whole(verified, task):
    root = verified.root
    blessing, numerics = read(root, f"{task}/blessing.json"), read(root, f"{task}/numerics.json")
    candidate = (root / "deploy" / "candidate" / f"{task}.keras").read_bytes()
    engine = root / "deploy" / task / "tensorrt" / "int8.sm89.engine"
    assert (blessing["task"], blessing["blessed"]) == (task, True)
    assert blessing["model_sha256"] == hashlib.sha256(candidate).hexdigest()
    assert blessing["built_but_not_run"] == {engine.name: engine.stat().st_size}
    budgets = verified.params.verify
    bound = budgets.accuracy_points if task == "emotion" else budgets.nme_relative
    assert {gate["name"] for gate in blessing["gates"]} == set(RUNTIMES)
    for gate in blessing["gates"]:
        assert gate["passed"] is True
        assert (gate["value"], gate["bound"]) == (numerics[gate["name"]]["loss"], bound)
        assert f"on {numerics[gate['name']]['n']} faces" in gate["why"]
    summary = read(root, f"{task}.json")
    assert summary["blessed"] == 1
    assert summary["test"] == read(root, f"{task}/test.json")[METRIC[task]]
    assert all(summary[name] == numerics[name][METRIC[task]] for name in RUNTIMES)
    assert (root / "reports" / "verify" / task / "worst.png").stat().st_size > 1000


def test_the_run_of_the_training_is_told(verified):
    import mlflow

    with verified.inside():
        mlflow.set_tracking_uri(verified.params.tracking.uri)
        runs = mlflow.search_runs(experiment_names=["grimace-emotion"], output_format="list")
    (run,) = [run for run in runs if "grimace.blessed" in run.data.tags]
    blessing = read(verified.root, "emotion/blessing.json")
    assert run.data.tags["grimace.model_sha256"] == blessing["model_sha256"]
    assert run.data.tags["grimace.blessed"] == "True"
    numerics = read(verified.root, "emotion/numerics.json")
    told = run.data.metrics["deployed.tflite.int8.accuracy"]
    assert told == pytest.approx(numerics["tflite/int8"]["accuracy"])


# What goes wrong


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of the world as `export` left it, to break."""
    for name in ("params.yaml", "data/clean", "data/split", "deploy"):
        source = exported.root / name
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return type(exported)(tmp_path, exported.params, exported.faces)


def list_again(bundle: Path) -> None:
    """Make a manifest true again, as if `export` had written what is there now."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for file in manifest["files"]:
        content = (bundle / file["path"]).read_bytes()
        file |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


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
    list_again(tensorrt)
    with (tensorrt / "int8.sm89.engine").open("ab") as file:
        file.write(b"\0")
    shard = tfjs / "float16" / "group1-shard1of1.bin"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    (tfjs / "float32" / "group1-shard1of1.bin").unlink()
    (tflite / "float32.tflite").unlink()
    os.truncate(tflite / "int8.tflite", 500)
    with copy.inside():
        verify.verify("emotion", copy.params)

    blessing = read(copy.root, "emotion/blessing.json")
    assert blessing["blessed"] is False
    assert blessing["built_but_not_run"] == {}
    reasons = {gate["name"]: gate["why"] for gate in blessing["gates"] if not gate["passed"]}
    said = {
        "tensorrt/float32": "cannot reshape",
        "tensorrt/int8": "refused it",
        "tensorrt/int8.sm89": "int8.sm89.engine: its bytes are not those of",
        "tfjs/float16": "group1-shard1of1.bin: its bytes are not those of",
        "tfjs/float32": "group1-shard1of1.bin is in the manifest but not there",
        "tflite/float32": "float32.tflite is in the manifest but not there",
        "tflite/int8": "int8.tflite: its bytes are not those of",
    }
    assert reasons.keys() == said.keys()
    printed = capsys.readouterr().out
    for name, words in said.items():
        assert words in reasons[name]
        assert f"NOT BLESSED: {name}: {reasons[name]}" in printed
    (whole,) = [gate for gate in blessing["gates"] if gate["passed"]]
    assert whole["name"] == "tfjs/uint8"
    assert read(copy.root, "emotion/numerics.json").keys() == {"tfjs/uint8"}
    assert read(copy.root, "emotion.json")["blessed"] == 0


def test_a_loss_beyond_the_budget_is_not_blessed(copy):
    bundle = copy.root / "deploy" / "landmarks" / "tensorrt"
    save_constant(bundle / "int8.onnx", np.full((68, 2), 0.5))
    list_again(bundle)
    with copy.inside():
        verify.verify("landmarks", copy.params)
    blessing = read(copy.root, "landmarks/blessing.json")
    (failed,) = [gate for gate in blessing["gates"] if not gate["passed"]]
    assert blessing["blessed"] is False
    assert failed["name"] == "tensorrt/int8"
    before, _, _ = expected(copy, "landmarks", copy.root / "deploy/candidate/landmarks.keras")
    after, _, _ = expected(copy, "landmarks", bundle / "int8.onnx")
    assert failed["value"] == pytest.approx(after / before - 1, rel=1e-4)
    assert failed["bound"] == copy.params.verify.nme_relative < failed["value"]
    assert "loses" in failed["why"]
    assert "50.00% allowed" in failed["why"]


def test_each_task_has_its_own_budget():
    settings = Verify(accuracy_points=1.0, nme_relative=0.02, latency_runs=10)

    def passes(task: str, loss: float, n: int = 100) -> bool:
        scores = {"n": n, "loss": loss}
        return verify.judge(task, "x", scores, {"n": 100}, settings)["passed"]

    assert passes("emotion", 100 * (0.71 - 0.70))  # just the budget, but for the last bit
    assert passes("emotion", -3.0)
    assert not passes("emotion", 1.01)
    assert passes("landmarks", 0.02)
    assert not passes("landmarks", 0.021)
    assert not passes("emotion", 0.0, n=99)
    assert not passes("landmarks", float("nan"))


def test_nothing_passes_by_not_being_there(copy):
    deploy = copy.root / "deploy" / "emotion"
    candidate = deploy.parent / "candidate" / "emotion.keras"
    digest = hashlib.sha256(candidate.read_bytes()).hexdigest()

    def fails(name: str) -> str:
        with pytest.raises(GrimaceError) as raised:
            verify.check_manifest(verify.deployables(deploy)[name], digest)
        return str(raised.value)

    everything = verify.deployables(deploy)
    assert everything.keys() == {*RUNTIMES, "tensorrt/int8.sm89"}
    for path in everything.values():
        verify.check_manifest(path, digest)
    with pytest.raises(GrimaceError, match="made from another model"):
        verify.check_manifest(everything["tfjs/uint8"], "0" * 64)

    (deploy / "tfjs" / "uint8" / "more.bin").write_bytes(b"unlisted")
    assert "more.bin: its bytes are not those of" in fails("tfjs/uint8")
    shutil.rmtree(deploy / "tfjs" / "float16")
    assert "float16/group1-shard1of1.bin is in the manifest but not there" in fails("tfjs/float16")
    (deploy / "tflite" / "more.tflite").write_bytes(b"unlisted")
    assert "more.tflite: its bytes are not those of" in fails("tflite/more")
    (deploy / "tensorrt" / "manifest.json").write_text('{"files": [')
    assert "manifest.json is missing or damaged" in fails("tensorrt/int8")
    shutil.rmtree(deploy / "tflite")
    assert "tflite/manifest.json is missing or damaged" in fails("tflite")
    shutil.rmtree(deploy)
    with pytest.raises(GrimaceError, match="run `dvc repro export`"):
        verify.deployables(deploy)
