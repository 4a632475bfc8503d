"""Stage `verify`: measure the candidate and its deployables on the held-out test side.

This is the one place where test faces are looked at. A bundle that is not as it was signed is
refused, with the reason. Every deployable runs in its own runtimes over the whole side; what it
loses against the Keras model in float32 is held against a budget. The verdict is `budgets.json`:
one row a gate, and a gate that could not be computed has failed. A runtime that this machine lacks
is named there with the reason; it fails nothing, unless no runtime at all is left for a graph.
A TensorRT engine is measured where its GPU and its TensorRT are, and said not to have been run
where they are not; the same Q/DQ graph runs in ONNX Runtime either way. Where a browser imitates a
GPU on the CPU, some faces alone are measured, and nothing is judged.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines import bundles, tracking
from pipelines.bundles import golden
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.evaluate import save_predictions
from pipelines.heldout import Faces, faces_of_side
from pipelines.measures import DECIDES, bootstrap_weights, headline, landmark_errors, measure
from pipelines.pages.verification import write_verification
from pipelines.params import Evaluate, Params, TaskName, load_params
from pipelines.plots import write_plots
from pipelines.registry import bytes_of
from pipelines.runtimes import UnavailableError, load, most_threads
from pipelines.runtimes.javascript import one_browser
from pipelines.runtimes.probe import probe

BUNDLES = ("tflite", "tfjs", "tensorrt")


class Deployable(NamedTuple):
    """One graph of a bundle: its file or folder, and what the manifest says of it."""

    path: Path
    facts: dict[str, Any]


class Test(NamedTuple):
    """What every deployable is measured on and against."""

    faces: Faces
    reference: np.ndarray  # what Keras answers in float32
    scores: dict[str, Any]  # and how good that is


def main() -> None:
    """Verify one task's bundles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=tuple(DECIDES))
    verify(parser.parse_args().task, load_params())


def verify(task: TaskName, params: Params) -> None:
    """Measure, judge, write reports/verify/TASK and add the figures to the MLflow run."""
    candidate = Path("deploy/candidate", f"{task}.keras")
    faces = faces_of_side(task, params.tasks.named(task), "test")
    with load(candidate) as model:
        reference = model.predict(faces.images)
    test = Test(faces, reference, measure(faces, reference, params.evaluate) | {"split": "test"})
    print(f"candidate: {headline(test.scores)}")

    files = bytes_of(task)  # what is measured from here on
    digest = files["model.keras"]
    budget = params.verify.budget(task, params.tasks.named(task).dataset)
    found, refused = deployables(Path("deploy", task), task, digest)
    with one_browser():
        measured = measure_all(found, test, params, budget)
    gates = [*refused, *measured.gates]
    kept = bool(gates) and all(gate["passed"] for gate in gates)
    budgets = {
        "task": task,
        "passed": kept,
        "model_sha256": digest,
        "files": files,
        "gates": gates,
        "built_but_not_run": measured.engines,
        "not_available": measured.absent,
        "left_out": params.verify.runtimes.left_out(),
    }
    out = Path("reports/verify", task)
    with whole_folder(out) as partial:
        for file, content in (
            ("test", test.scores),
            ("numerics", measured.numerics),
            ("perf", measured.perf),
            ("budgets", budgets),
        ):
            (partial / f"{file}.json").write_text(json.dumps(content, indent=2) + "\n")
        write_plots(faces, reference, params.evaluate, partial, f"{task} candidate, test")
        crop = params.tasks.named(task)
        save_predictions(partial, faces, reference, [candidate], crop)
        made = {name: deployable.facts for name, deployable in found.items()}
        page = write_verification(test.scores, measured.numerics, measured.perf, budgets, made)
        (partial / "index.html").write_text(page)
    summary = {
        "test": test.scores[DECIDES[task]],
        "within_budget": int(kept),
        **{name: row[DECIDES[task]] for name, row in measured.numerics.items()},
    }
    out.with_suffix(".json").write_text(json.dumps(summary, indent=2) + "\n")
    tell_run(task, params, candidate, test.scores, measured, kept, out)
    for gate in gates:
        if not gate["passed"]:
            print(f"FAILED: {gate['name']}: {gate['why']}")


class Measured(NamedTuple):
    """What came of all deployables, by the name of a row.

    A graph has its own name, such as "tfjs/uint8", in the first of its runtimes that is there, and
    in each other that of the runtime too: "tfjs/uint8:node".
    """

    numerics: dict[str, dict[str, Any]]
    perf: dict[str, dict[str, Any]]
    gates: list[dict[str, Any]]
    engines: dict[str, int]  # bytes, by file: built, but not for this machine to run
    absent: dict[str, str]  # why not, by target and runtime, "tfjs:webgl"; or "tensorrt/…engine"


def measure_all(
    found: dict[str, Deployable], test: Test, params: Params, budget: float
) -> Measured:
    """Run every deployable in each runtime that `verify.runtimes` names for it."""
    done = Measured({}, {}, [], {}, {})
    for name, deployable in found.items():
        target, taken, judged = name.partition("/")[0], False, False
        places = {runtime: f"{target}:{runtime}" for runtime in params.verify.runtimes.of(target)}
        if engine := deployable.path.suffix == ".engine":
            places = {"tensorrt": f"{target}/{deployable.path.name}"}  # each for a GPU of its own
        for runtime, place in places.items():
            if place in done.absent:
                continue
            row = f"{name}:{runtime}" if taken else name
            try:
                numerics, perf = try_out(deployable, runtime, test, params)
            except UnavailableError as error:
                done.absent[place] = " ".join(str(error).split())
                print(f"{place}: not available here: {done.absent[place]}")
                continue
            # Whatever a runtime raises: what could not be measured has failed, the others go on.
            except Exception as error:
                done.gates.append(failed(row, error))
                judged = True
            else:
                done.numerics[row], done.perf[row] = numerics, perf
                if not perf["software"]:
                    done.gates.append(judge(row, numerics, test.scores, budget))
                    judged = True
                print(f"{row}: {headline(numerics)}, {perf['p50_ms']:.2f} ms")
            taken = True
        if engine and not taken:
            done.engines[deployable.path.name] = deployable.path.stat().st_size
        elif not taken:
            reasons = "; ".join(done.absent[place] for place in places.values())
            nowhere = GrimaceError(f"no runtime of verify.runtimes is there: {reasons}")
            done.gates.append(failed(name, nowhere))
        elif not judged:
            imitated = GrimaceError(
                f"measured only where a GPU is imitated, on a part of the faces: add a runtime to "
                f"verify.runtimes.{target} that this machine has"
            )
            done.gates.append(failed(name, imitated))
    return done


def tell_run(
    task: TaskName,
    params: Params,
    candidate: Path,
    test: dict[str, Any],
    measured: "Measured",
    kept: bool,
    out: Path,
) -> None:
    """Add the figures to the MLflow run that trained the candidate."""
    import mlflow

    with tracking.run_of_model(params.tracking, task, candidate):
        compact = {key: value for key, value in test.items() if isinstance(value, int | float)}
        mlflow.log_metrics(tracking.flat(compact, "test/"))
        for name, row in measured.numerics.items():
            label = name.replace("/", ".").replace(":", ".")
            mlflow.log_metric(f"deployed/{label}.{DECIDES[task]}", row[DECIDES[task]])
            mlflow.log_metric(f"deployed/{label}.p50_ms", measured.perf[name]["p50_ms"])
        mlflow.set_tags({"grimace.candidate": "true", "grimace.within_budget": kept})
        mlflow.log_artifacts(str(out), "verification")


def deployables(
    folder: Path, task: str, model_sha256: str
) -> tuple[dict[str, Deployable], list[dict[str, Any]]]:
    """Find the graphs that are as they were signed.

    Args:
        folder: deploy/TASK.
        task: what the bundles have to be for.
        model_sha256: of the model they have to be made from.

    Returns:
        Graphs by a name such as "tflite/int8"; and a failed gate for each that is refused, or for
        a whole bundle. What a manifest names is named even where it is gone, and an absent bundle
        too, so that nothing passes by not being there.
    """
    if not folder.is_dir():
        raise GrimaceError(f"{folder} is missing; run `dvc repro export`")
    found, gates = {}, []
    for target in BUNDLES:
        bundle = folder / target
        try:
            manifest = open_bundle(bundle, task, target, model_sha256)
        except GrimaceError as error:
            gates.append(failed(target, error))
            continue
        for variant, facts in manifest["variants"].items():
            name, file = f"{target}/{variant}", facts["file"]
            try:
                bundles.check_files(bundle, manifest, file.__eq__)
                found[name] = Deployable(bundle / file, facts)
            except GrimaceError as error:
                gates.append(failed(name, error))
    return found, gates


def open_bundle(bundle: Path, task: str, target: str, model_sha256: str) -> dict[str, Any]:
    """Return a bundle's manifest once all but its graphs has been checked.

    Raises:
        GrimaceError: something is missing, damaged or changed; or it is another bundle than the
            one that belongs here.
    """
    manifest = bundles.read(bundle)
    for key, wanted in (("task", task), ("target", target)):
        if manifest[key] != wanted:
            raise GrimaceError(f"{bundle} holds a bundle for {manifest[key]}, not for {wanted}")
    if manifest["source"]["model_sha256"] != model_sha256:
        raise GrimaceError(f"{bundle} was made from another model; run `dvc repro export`")
    graphs = {facts["file"] for facts in manifest["variants"].values()}
    bundles.check_files(bundle, manifest, lambda part: part not in graphs)
    return manifest


def failed(name: str, error: Exception) -> dict[str, Any]:
    """Return the gate of what could not be measured."""
    why = " ".join(str(error).split()) or type(error).__name__
    return {"name": name, "value": None, "bound": None, "passed": False, "why": why}


def try_out(
    deployable: Deployable, runtime: str, test: Test, params: Params
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a deployable over all faces, its golden images, and one image many times.

    Where the runtime imitates a GPU, over `verify.software_faces` alone, evenly spaced.

    Returns:
        Numerics: the metrics of `measure`, `loss` against float32 (points of a hundred for
        accuracy, a fraction of the NME for landmarks; positive is worse) with `loss_ci95`,
        `max_difference` of any output, `agreement` with the Keras model (for emotion the share of
        equal decisions, for landmarks the median and the 95th percentile over faces of the mean
        distance between both models' points, as a share of the distance between the eyes), and
        `golden` as `golden.compare` gives it. Perf: `runtime`, whether it is `software`, `bytes`,
        `load_ms` until the first answer, `memory_mib` that this takes, `threads` (1) with `p50_ms`
        and `p95_ms` of one image, and the same three in `all_threads` where the runtime takes
        more than one.
    """
    path, facts = deployable
    images, wanted = golden.read(path.parent / "golden.json")
    runs = params.verify.latency_runs
    with load(path, 1, runtime) as model:
        if model.software:
            test = fewer(test, params.verify.software_faces, params.evaluate)
        outputs = model.predict(test.faces.images).reshape(test.reference.shape)
        compared = golden.compare(model.predict(images), wanted, facts["tolerance"])
        latency = model.latency(test.faces.images[0], runs)
        name, opening, software = model.name, model.opening, model.software
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    perf = {
        "runtime": name,
        "software": software,
        "bytes": sum(file.stat().st_size for file in files),
        **(opening or probe(path)),
        "threads": 1,
        **latency,
    }
    if (threads := most_threads(runtime)) > 1:
        with load(path, threads, runtime) as model:
            more = model.latency(test.faces.images[0], runs)
            perf["all_threads"] = {"threads": model.threads, **more}
    return compare(test, outputs, params.evaluate) | {"golden": compared}, perf


def fewer(test: Test, count: int, settings: Evaluate) -> Test:
    """Return the test on so many faces, evenly spaced; on all where there are no more."""
    faces, total = test.faces, len(test.faces.ids)
    places = np.linspace(0, total - 1, min(count, total)).astype(int)
    some = replace(
        faces,
        ids=faces.ids[places],
        groups=faces.groups[places],
        images=faces.images[places],
        emotions=None if faces.emotions is None else faces.emotions[places],
        landmarks=None if faces.landmarks is None else faces.landmarks[places],
        visible=None if faces.visible is None else faces.visible[places],
    )
    reference = test.reference[places]
    return Test(some, reference, measure(some, reference, settings))


def compare(test: Test, outputs: np.ndarray, settings: Evaluate) -> dict[str, Any]:
    """Return the metrics of a deployable's answers and what they lose, as `try_out` says."""
    scores = measure(test.faces, outputs, settings)
    before, after = (each[DECIDES[scores["task"]]] for each in (test.scores, scores))
    emotion = scores["task"] == "emotion"
    scores["loss"] = 100 * (before - after) if emotion else after / before - 1
    scores["loss_ci95"] = loss_interval(test.faces, test.reference, outputs, settings)
    scores["max_difference"] = float(np.abs(outputs - test.reference).max())
    scores["agreement"] = agreement(test, outputs)
    return scores


def agreement(test: Test, outputs: np.ndarray) -> float | list[float]:
    """Return how far answers are those of the Keras model, as `try_out` says."""
    if test.faces.emotions is not None:
        return float((outputs.argmax(-1) == test.reference.argmax(-1)).mean())
    theirs = replace(test.faces, landmarks=test.reference)
    apart = landmark_errors(theirs, outputs)[0]
    return [float(each) for each in np.nanpercentile(apart, [50, 95])]


def loss_interval(
    faces: Faces, reference: np.ndarray, outputs: np.ndarray, settings: Evaluate
) -> list[float]:
    """Return the 95 % interval of the loss, both models on the same resamples of the same faces."""
    pair = (reference, outputs)
    if faces.emotions is not None:
        before, after = ((each.argmax(-1) == faces.emotions).astype(float) for each in pair)
    else:
        before, after = (landmark_errors(faces, each)[0] for each in pair)
    valid = np.isfinite(before + after)
    drawn = []
    for weights in bootstrap_weights(faces.groups[valid], settings):
        first, second = weights @ before[valid], weights @ after[valid]
        if faces.emotions is not None:
            drawn.append(100 * (first - second) / weights.sum(-1))
        else:
            drawn.append(second / first - 1)
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return [float(low), float(high)]


def judge(name: str, scores: dict[str, Any], test: dict[str, Any], bound: float) -> dict[str, Any]:
    """Return the gate of one deployable: what it lost, and what it was allowed to lose."""
    # A loss of just the bound must not fail over the last bit: 0.71 - 0.70 is above 0.01.
    passed = bool(scores["n"] == test["n"] and scores["loss"] <= bound + 1e-9)
    task = scores["task"]
    unit = "points of accuracy" if task == "emotion" else "of the float32 NME"
    lost = f"{scores['loss']:.2f}" if task == "emotion" else f"{scores['loss']:.2%}"
    allowed = f"{bound:.2f}" if task == "emotion" else f"{bound:.2%}"
    why = f"loses {lost} {unit}, {allowed} allowed, on {scores['n']} faces"
    if not scores["golden"]["passed"]:
        passed = False
        why += (
            f"; its golden answers are {scores['golden']['difference']:.2g} off, "
            f"{scores['golden']['tolerance']:g} allowed"
        )
    return {"name": name, "value": scores["loss"], "bound": bound, "passed": passed, "why": why}


if __name__ == "__main__":
    run(main)
