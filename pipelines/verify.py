"""Stage `verify`: measure the candidate and its deployables on the held-out test side.

This is the one place where test faces are looked at. Every deployable runs in its own runtime
over the whole side; what it loses against the Keras model in float32 is held against a budget. The
verdict is `blessing.json`: one row a gate, and a gate that could not be computed has failed.
TensorRT engines need their GPU; here the same Q/DQ graph runs in ONNX Runtime, and the figures
say so.
"""

import argparse
import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pipelines import tracking
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.evaluate import (
    DECIDES,
    Faces,
    faces_of_side,
    headline,
    measure,
    save_predictions,
    write_plots,
)
from pipelines.params import Params, TaskName, Verify, load_params
from pipelines.registry import bytes_of
from pipelines.runtimes import load

BUNDLES = ("tflite", "tfjs", "tensorrt")
FILES = (".tflite", ".onnx", ".engine")  # a TF.js model is a folder


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

    files = bytes_of(task)  # what is measured from here on
    digest = files["model.keras"]
    numerics, perf, gates, engines = {}, {}, [], {}
    for name, path in deployables(Path("deploy", task)).items():
        try:
            check_manifest(path, digest)
            if path.suffix == ".engine":
                engines[path.name] = path.stat().st_size
                continue
            numerics[name], perf[name] = try_out(path, faces, reference, test, params)
            gates.append(judge(task, name, numerics[name], test, params.verify))
            print(f"{name}: {headline(numerics[name])}, {perf[name]['p50_ms']:.2f} ms")
        # Whatever a runtime raises: what could not be measured has failed, and the others go on.
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            gates.append({"name": name, "value": None, "bound": None, "passed": False, "why": why})
    blessed = bool(gates) and all(gate["passed"] for gate in gates)
    blessing = {
        "task": task,
        "blessed": blessed,
        "model_sha256": digest,
        "files": files,
        "gates": gates,
        "built_but_not_run": engines,
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
        save_predictions(partial, faces, reference, [candidate])
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
    """Find what the bundles hold or should hold, by a name such as "tflite/int8".

    What a manifest lists is named even where it is gone, and an empty or absent bundle by its
    manifest, so that nothing passes by not being there.
    """
    if not folder.is_dir():
        raise GrimaceError(f"{folder} is missing; run `dvc repro export`")
    found = {}
    for bundle in (folder / name for name in BUNDLES):
        try:
            listed = [PurePosixPath(name).parts[0] for name in read_manifest(bundle)[0]]
        except GrimaceError:
            listed = []  # `check_manifest` will say so of each part
        parts = {*listed, *(path.name for path in bundle.glob("*"))} - {"manifest.json"}
        for path in (bundle / part for part in sorted(parts)):
            label = path.stem if path.suffix in FILES else path.name
            found[f"{bundle.name}/{label}"] = path
        if not parts:
            found[bundle.name] = bundle / "manifest.json"
    return found


def read_manifest(bundle: Path) -> tuple[dict[str, str], str]:
    """Return the SHA-256 of each file of a bundle, and of the model it was made from.

    Raises:
        GrimaceError: the manifest is missing or damaged.
    """
    path = bundle / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        files = {file["path"]: file["sha256"] for file in manifest["files"]}
        return files, manifest["source"]["model_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GrimaceError(f"{path} is missing or damaged ({error!r}); export again") from None


def check_manifest(path: Path, model_sha256: str) -> None:
    """Compare a deployable's files with the bundle's manifest.

    Raises:
        GrimaceError: a file is missing, of other bytes, or not listed; the manifest is damaged,
            or is of a bundle made from another model than the one with this SHA-256.
    """
    bundle = path.parent
    listed, source = read_manifest(bundle)
    if source != model_sha256:
        raise GrimaceError(f"{bundle} was made from another model; run `dvc repro export`")
    wanted = [bundle / name for name in listed if PurePosixPath(name).parts[0] == path.name]
    for file in wanted:
        if not file.is_file():
            raise GrimaceError(f"{file} is in the manifest but not there")
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        name = file.relative_to(bundle).as_posix()
        if file.is_file() and listed.get(name) != tracking.sha256(file):
            raise GrimaceError(f"{file}: its bytes are not those of {bundle}/manifest.json")


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
    # A loss of just the bound must not fail over the last bit: 0.71 - 0.70 is above 0.01.
    passed = bool(scores["n"] == test["n"] and scores["loss"] <= bound + 1e-9)
    unit = "points of accuracy" if task == "emotion" else "of the float32 NME"
    lost = f"{scores['loss']:.2f}" if task == "emotion" else f"{scores['loss']:.2%}"
    allowed = f"{bound:.2f}" if task == "emotion" else f"{bound:.2%}"
    why = f"loses {lost} {unit}, {allowed} allowed, on {scores['n']} faces"
    return {"name": name, "value": scores["loss"], "bound": bound, "passed": passed, "why": why}


if __name__ == "__main__":
    run(main)
