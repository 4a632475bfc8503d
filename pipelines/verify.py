"""Stage `verify`: measure the candidate and its deployables on the held-out test side.

This is the one place where test faces are looked at. Every deployable runs in its own runtime
over the whole side; what it loses against the Keras model in float32 is held against a budget. The
verdict is `blessing.json`: one row a gate, and a gate that could not be computed has failed.
TensorRT engines need their GPU; here the same Q/DQ graph runs in ONNX Runtime, and the figures
say so.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import tracking
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.evaluate import Faces, faces_of_side, headline, measure, write_plots
from pipelines.params import Params, TaskName, Verify, load_params
from pipelines.runtimes import load

DECIDES = {"emotion": "accuracy", "landmarks": "nme_interocular_68"}


def main() -> None:
    """Verify one task's bundles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=tuple(DECIDES))
    verify(parser.parse_args().task, load_params())


def verify(task: TaskName, params: Params) -> None:
    """Measure, judge, write reports/verify/TASK and add the figures to the MLflow run."""
    import mlflow

    candidate = Path("deploy/candidate", f"{task}.keras")
    faces = faces_of_side(task, params.tasks.named(task), "test")
    with load(candidate) as model:
        reference = model.predict(faces.images)
    test = measure(faces, reference, params.evaluate) | {"split": "test"}
    print(f"candidate: {headline(test)}")

    numerics, perf, gates = {}, {}, []
    for name, path in deployables(Path("deploy", task)).items():
        try:
            check_manifest(path)
            numerics[name], perf[name] = try_out(path, faces, reference, test, params)
            gates.append(judge(task, name, numerics[name], test, params.verify))
            print(f"{name}: {headline(numerics[name])}, {perf[name]['p50_ms']:.2f} ms")
        except GrimaceError as error:
            gates.append(
                {"name": name, "value": None, "bound": None, "passed": False, "why": str(error)}
            )
    engines = sorted(Path("deploy", task, "tensorrt").glob("*.engine"))
    blessed = bool(gates) and all(gate["passed"] for gate in gates)
    blessing = {
        "task": task,
        "blessed": blessed,
        "model_sha256": tracking.sha256(candidate),
        "gates": gates,
        "built_but_not_run": {path.name: path.stat().st_size for path in engines},
    }
    out = Path("reports/verify", task)
    with whole_folder(out) as partial:
        for file, content in (
            ("test", test),
            ("numerics", numerics),
            ("perf", perf),
            ("blessing", blessing),
        ):
            (partial / f"{file}.json").write_text(json.dumps(content, indent=2) + "\n")
        write_plots(faces, reference, params.evaluate, partial, f"{task} candidate, test")
    summary = {
        "test": test[DECIDES[task]],
        "blessed": int(blessed),
        **{name: row[DECIDES[task]] for name, row in numerics.items()},
    }
    out.with_suffix(".json").write_text(json.dumps(summary, indent=2) + "\n")
    with tracking.run_of_model(params.tracking, task, candidate):
        compact = {key: value for key, value in test.items() if isinstance(value, int | float)}
        mlflow.log_metrics(tracking.flat(compact, "test."))
        for name, row in numerics.items():
            label = name.replace("/", ".")
            mlflow.log_metric(f"deployed.{label}.{DECIDES[task]}", row[DECIDES[task]])
            mlflow.log_metric(f"deployed.{label}.p50_ms", perf[name]["p50_ms"])
        mlflow.set_tags({"grimace.candidate": "true", "grimace.blessed": blessed})
        mlflow.log_artifacts(str(out), "verification")
    for gate in gates:
        if not gate["passed"]:
            print(f"NOT BLESSED: {gate['name']}: {gate['why']}")


def deployables(folder: Path) -> dict[str, Path]:
    """Find what a runtime can open, by a name such as "tflite/int8"."""
    found = [
        *folder.glob("tflite/*.tflite"),
        *(path.parent for path in folder.glob("tfjs/*/model.json")),
        *folder.glob("tensorrt/*.onnx"),
    ]
    if not found:
        raise GrimaceError(f"{folder} holds no deployable; run `dvc repro export`")
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(found)}


def check_manifest(path: Path) -> None:
    """Compare a deployable's files with the bundle's manifest.

    Raises:
        GrimaceError: a file is missing, of other bytes, or not listed.
    """
    bundle = path.parent
    manifest = json.loads((bundle / "manifest.json").read_text())
    listed = {file["path"]: file["sha256"] for file in manifest["files"]}
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        name = file.relative_to(bundle).as_posix()
        if listed.get(name) != hashlib.sha256(file.read_bytes()).hexdigest():
            raise GrimaceError(f"{file}: its bytes are not those of {bundle}/manifest.json")
    prefix = f"{path.name}/" if path.is_dir() else path.name
    missing = [n for n in listed if n.startswith(prefix) and not (bundle / n).exists()]
    if missing:
        raise GrimaceError(f"{bundle / missing[0]} is in the manifest but not there")


def try_out(
    path: Path, faces: Faces, reference: np.ndarray, test: dict[str, Any], params: Params
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a deployable over all faces.

    Returns:
        Numerics: the metrics of `measure`, `loss` against float32 (points of a hundred for
        accuracy, a fraction of the NME for landmarks; positive is worse), `max_difference` of any
        output, and for emotion `agreement`, the share of equal decisions. Perf: runtime, size,
        threads, and latency of one image in milliseconds.
    """
    with load(path, threads=1) as model:
        outputs = model.predict(faces.images).reshape(reference.shape)
        latency = model.latency(faces.images[0], params.verify.latency_runs)
        runtime = model.name
    scores = measure(faces, outputs, params.evaluate)
    task = scores["task"]
    before, after = test[DECIDES[task]], scores[DECIDES[task]]
    scores["loss"] = 100 * (before - after) if task == "emotion" else after / before - 1
    scores["max_difference"] = float(np.abs(outputs - reference).max())
    if task == "emotion":
        scores["agreement"] = float((outputs.argmax(-1) == reference.argmax(-1)).mean())
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    perf = {
        "runtime": runtime,
        "bytes": sum(file.stat().st_size for file in files),
        "threads": 1,
        **latency,
    }
    return scores, perf


def judge(
    task: TaskName, name: str, scores: dict[str, Any], test: dict[str, Any], settings: Verify
) -> dict[str, Any]:
    """Return the gate of one deployable: what it lost, and what it was allowed to lose."""
    bound = settings.accuracy_points if task == "emotion" else settings.nme_relative
    passed = bool(scores["n"] == test["n"] and scores["loss"] <= bound)
    unit = "points of accuracy" if task == "emotion" else "of the float32 NME"
    lost = f"{scores['loss']:.2f}" if task == "emotion" else f"{scores['loss']:.2%}"
    allowed = f"{bound:.2f}" if task == "emotion" else f"{bound:.2%}"
    why = f"loses {lost} {unit}, {allowed} allowed, on {scores['n']} faces"
    return {"name": name, "value": scores["loss"], "bound": bound, "passed": passed, "why": why}


if __name__ == "__main__":
    run(main)
