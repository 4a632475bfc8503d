r"""Hold all models of a task against each other: one HTML page, and its figures as JSON.

    python -m pipelines.compare --task emotion --out compare.html
    python -m pipelines.compare --task emotion --runs runs/emotion/plain ensemble/ --out few.html

Compared are the models under runs/TASK that are jobs in params.yaml, or those in the folders
given: such as hold a model.keras, or what `evaluate --out` wrote (an ensemble, averaged answers,
another runtime). Answers that `evaluate` has saved for the same crops of the same faces and the
same model files are read, others are computed, or refused where the folder holds no model. All see
the same faces; intervals resample whole groups (people, copies of one picture), as there. Latency
is measured on this machine, all models by turns.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from models.metrics import ced_curve, confusion
from models.schemes import EMOTIONS
from pipelines import tracking
from pipelines.cli import GrimaceError, run
from pipelines.evaluate import costs_of, crop_of
from pipelines.heldout import Faces, faces_of_shards, faces_of_side, with_traits
from pipelines.measures import DECIDES, by_slice, landmark_errors, measure
from pipelines.params import Evaluate, Params, Task, TaskName, load_params
from pipelines.report import machine
from pipelines.select import lead

ROUNDS, RUNS = 20, 5  # single images timed: so often all models by turns, so many in a row
PERMUTATIONS = 9999


def main() -> None:
    """Collect answers, compare, write the page."""
    args = _arguments()
    params = load_params()
    faces = reference_faces(args.task, params, args.side)
    folders = args.runs or folders_of_jobs(args.task, params)
    models = [
        answers_of(folder, name, faces, args.task, args.side, params)
        for name, folder in names_of(folders).items()
    ]
    result = {
        "task": args.task,
        "side": args.side,
        "dataset": params.tasks.named(args.task).dataset,
        **circumstances(args.task),
        **compare(faces, models, params.evaluate),
    }
    if args.latency != "none":
        add_latency(result, models, args.latency)
        _log_latency(result, models, params)
    if not args.runs:
        result["deployables"] = deployables_of(args.task)
    write(result, args.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, choices=tuple(DECIDES))
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="folders with a model.keras, or written by `evaluate --out`; default: the jobs' own",
    )
    parser.add_argument(
        "--side",
        choices=("val", "test"),
        default="val",
        help="test is for the last word on models that were chosen on val",
    )
    parser.add_argument(
        "--latency",
        choices=("litert", "keras", "none"),
        default="litert",
        help="where single images are timed; litert converts each model to float32 TFLite first",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the page, as compare.html; compare.json beside it"
    )
    args = parser.parse_args()
    if args.out.suffix != ".html":
        parser.error("--out must end in .html")
    return args


@dataclass(frozen=True, eq=False)
class Answers:
    """What one model answers to the faces.

    Attributes:
        name: unique among those compared.
        file: the model's own; None for an ensemble, or what is not at hand.
        outputs: (n, 7) or (n, N, 2), in the order of the faces.
        saved: whether `evaluate` had saved them.
        test_time: what they are averaged over.
        cost: as `evaluate.costs_of` gives it.
        tracked: whether `evaluate` has logged the model to MLflow.
    """

    name: str
    file: Path | None
    outputs: np.ndarray
    saved: bool
    test_time: str
    cost: dict[str, int]
    tracked: bool


def folders_of_jobs(task: TaskName, params: Params) -> list[Path]:
    """Return the folders of the task's trained jobs; say which other models lie beside them.

    Raises:
        GrimaceError: no job is trained.
    """
    jobs = {job.model for job in params.train.jobs.values() if job.task == task}
    found = sorted(path.parent for path in Path("runs", task).glob("*/model.keras"))
    former = [folder.name for folder in found if folder.name not in jobs]
    if former:
        print(
            f"warning: runs/{task}: passed over {', '.join(former)}: no job in params.yaml; to "
            "compare them too, name all folders with --runs",
            file=sys.stderr,
        )
    folders = [folder for folder in found if folder.name in jobs]
    if not folders:
        raise GrimaceError(
            f"runs/{task} holds no model of {', '.join(sorted(jobs))}; run `dvc repro train` or "
            "name --runs"
        )
    return folders


def names_of(folders: Sequence[Path]) -> dict[str, Path]:
    """Name folders by their own name, by their whole path where two have the same."""
    own = [folder.resolve().name for folder in folders]
    return {
        name if own.count(name) == 1 else str(folder): folder
        for name, folder in zip(own, folders, strict=True)
    }


def reference_faces(task: TaskName, params: Params, side: str) -> Faces:
    """Load the faces that all models are asked about, with groups and traits."""
    settings = params.tasks.named(task)
    if side == "val":
        return faces_of_shards(task, settings)
    return with_traits(faces_of_side(task, settings, side), settings)


def answers_of(
    folder: Path, name: str, faces: Faces, task: TaskName, side: str, params: Params
) -> Answers:
    """Read a model's answers where `evaluate` has saved them, else ask the model.

    Saved ones count if they are to the same crops of the same faces, by the folder's model or,
    where it holds none, by models that have not changed since.

    Raises:
        GrimaceError: the folder holds neither a model nor such answers; says which.
    """
    file: Path | None = folder / "model.keras"
    assert file is not None
    digest = tracking.sha256(file) if file.exists() else None
    own = Path("reports/evaluate", task, folder.name)
    in_graph = folder.resolve() == Path("runs", task, folder.name).resolve()
    settings, refused = params.tasks.named(task), ""
    for report in (folder, *([own] if in_graph else [])):
        outputs, why = _saved(report, faces, digest, settings)
        refused = refused or why
        if outputs is not None:
            scores = json.loads((report / "scores.json").read_text())
            how, cost = scores.get("test_time", "none"), scores.get("cost", {})
            return Answers(name, file if digest else None, outputs, True, how, cost, in_graph)
    if digest is None:
        wanted = f"answers to the {len(faces.ids)} {side} faces of {settings.dataset}"
        found = f"{wanted} that are out of date: {refused}" if refused else ""
        raise GrimaceError(
            f"{folder} holds {found or f'neither a model.keras nor {wanted}'}; write them with "
            f"`python -m pipelines.evaluate --model … --side {side} --out {folder}`"
        )
    outputs = _predicted(file, faces, task, side, params)
    return Answers(name, file, outputs, False, "none", costs_of([file]), False)


def _saved(
    report: Path, faces: Faces, digest: str | None, task: Task
) -> tuple[np.ndarray | None, str]:
    """Return a folder's answers; or None and, of answers to these faces, why they do not count."""
    path = report / "predictions.npz"
    if not path.exists():
        return None, ""
    with np.load(path) as saved:
        if not np.array_equal(saved["ids"], faces.ids):
            return None, ""
        if "crop" not in saved.files or saved["crop"].tolist() != crop_of(task):
            return None, "the crops had another size, margin or channels, or they do not say which"
        if digest:
            same = saved["models"].tolist() == [digest]
            return (saved["outputs"], "") if same else (None, "another model gave them")
        for file, before in zip(saved["files"], saved["models"], strict=True):
            # What is gone has not changed: answers may come from where the models are.
            if Path(file).exists() and tracking.sha256(Path(file)) != before:
                return None, f"{file} has changed since"
        return saved["outputs"], ""


def _predicted(file: Path, faces: Faces, task: TaskName, side: str, params: Params) -> np.ndarray:
    from pipelines.runtimes import load

    with load(file) as model:
        images = faces.images
        if model.input_shape != images.shape[1:]:
            size, _, channels = model.input_shape
            settings = params.tasks.named(task)
            settings = settings.model_copy(update={"size": size, "channels": channels})
            images = faces_of_side(task, settings, side).images
        return model.predict(images)


def compare(faces: Faces, models: Sequence[Answers], settings: Evaluate) -> dict[str, Any]:
    """Measure all models and hold each against the best.

    Args:
        faces: with traits.
        models: their answers to these faces.
        settings: number of resamples, and their seed.

    Returns:
        Ready for JSON: `n` faces in `groups` groups; `metric`, which decides; `best`, its best
        model; `models`, best first. Each has what `evaluate` tells of a model, `confusion` counts
        (rows true) or the `ced` shares at `ced_thresholds`, and `against_best`, None for the best:
        `difference` in the metric, its paired `ci95`, `p` by test, and those values after Holm's
        correction (1979) for the number of models compared.
    """
    rows = []
    for model in tqdm(models, "compare", unit="model", delay=3, leave=False, disable=None):
        scores = measure(faces, model.outputs, settings)
        row = {
            "name": model.name,
            "test_time": model.test_time,
            "answers": "saved by evaluate" if model.saved else "computed here",
            "cost": model.cost,
            **scores,
            **by_slice(faces, model.outputs, settings),
            **_curve(faces, model.outputs),
        }
        rows.append(row)
    metric = DECIDES[rows[0]["task"]]
    sign = 1 if faces.emotions is None else -1  # a low error, a high accuracy is good
    order = sorted(
        range(len(rows)), key=lambda place: (sign * rows[place][metric], rows[place]["name"])
    )
    best = models[order[0]]
    ranked = [rows[place] for place in order]
    ranked[0]["against_best"] = None
    for place, row in zip(order[1:], ranked[1:], strict=True):
        row["against_best"] = {
            "difference": row[metric] - ranked[0][metric],
            "ci95": lead(faces, models[place].outputs, best.outputs, settings),
            "p": paired_tests(faces, models[place].outputs, best.outputs, settings.seed),
        }
    rest = [row["against_best"] for row in ranked[1:]]
    for test in rest[0]["p"] if rest else ():
        for against, adjusted in zip(rest, holm([row["p"][test] for row in rest]), strict=True):
            against.setdefault("p_holm", {})[test] = adjusted
    return {
        "n": ranked[0]["n"],
        "groups": len(np.unique(faces.groups)),
        "metric": metric,
        "best": best.name,
        "models": ranked,
    }


def _curve(faces: Faces, outputs: np.ndarray) -> dict[str, Any]:
    if faces.emotions is not None:
        counts = confusion(faces.emotions, outputs.argmax(-1), np.ones(len(outputs)), len(EMOTIONS))
        return {"confusion": counts.astype(int).tolist()}
    errors = landmark_errors(faces, outputs)[0]
    errors = errors[np.isfinite(errors)]
    thresholds, shares = ced_curve(errors, np.ones(len(errors)))
    return {"ced": {"thresholds": thresholds.round(4).tolist(), "shares": shares.tolist()}}


def paired_tests(
    faces: Faces, first: np.ndarray, second: np.ndarray, seed: int
) -> dict[str, float]:
    """Test whether two models differ on the same faces; two-sided.

    Returns:
        p-values. `sign_flip`, a permutation test (Good 2005, section 3.2): under the null
        hypothesis the two may change places in any group, all faces of a group together; of the
        difference of the accuracies or of the inter-ocular errors. For emotion also `mcnemar`, the
        exact test of McNemar (1947), which takes faces for independent of each other.
    """
    if faces.emotions is not None:
        values = [
            (outputs.argmax(-1) == faces.emotions).astype(float) for outputs in (first, second)
        ]
    else:
        values = [landmark_errors(faces, outputs)[0] for outputs in (first, second)]
    known = np.isfinite(values[0]) & np.isfinite(values[1])
    one, two = values[0][known], values[1][known]
    found = {"sign_flip": sign_flip(one, two, faces.groups[known], seed)}
    if faces.emotions is not None:
        found["mcnemar"] = mcnemar(one, two)
    return found


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Return McNemar's exact two-sided p for paired answers, 1.0 right and 0.0 wrong, (n,)."""
    from scipy.stats import binomtest

    wins, losses = int((first > second).sum()), int((first < second).sum())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def sign_flip(first: np.ndarray, second: np.ndarray, groups: np.ndarray, seed: int) -> float:
    """Return the two-sided p of a paired permutation test in which groups change places whole.

    All permutations are gone through where they are fewer than 10,000.

    Args:
        first, second: (n,) figures of two models on the same faces.
        groups: (n,), what is one piece of evidence.
        seed: of the permutations.
    """
    from scipy.stats import permutation_test

    member = np.unique(groups, return_inverse=True)[1]
    sums = [np.bincount(member, values) for values in (first, second)]
    differing = sums[0] != sums[1]  # the others change nothing, whichever way
    if not differing.any():
        return 1.0
    pair = [values[differing] for values in sums]
    if len(pair[0]) == 1:  # scipy asks for two
        return 1.0
    tested = permutation_test(
        pair,
        lambda one, two, axis: np.sum(one - two, axis),
        permutation_type="samples",
        n_resamples=PERMUTATIONS,
        batch=max(1, 2**21 // len(pair[0])),
        rng=np.random.default_rng(seed),
    )
    return float(tested.pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number: Holm 1979, step down."""
    p = np.asarray(values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1).tolist()


def circumstances(task: TaskName) -> dict[str, Any]:
    """Say by what command, when, where and on which data the comparison was made."""
    return {
        "command": shlex.join(["uv", "run", "python", "-m", "pipelines.compare", *sys.argv[1:]]),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": machine(),
        "data_version": tracking.data_version(Path("data/augment", task)),
    }


def add_latency(result: dict[str, Any], models: Sequence[Answers], runtime: str) -> None:
    """Time single images in every model that has a file, all by turns; note it in the result.

    By turns, because a machine that is busy for a minute would else slow one model alone. What
    cannot be opened or converted gets the reason in place of figures.
    """
    from pipelines.runtimes import load

    load_before = os.getloadavg()[0]
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    with TemporaryDirectory(prefix="grimace-compare-") as scratch, ExitStack() as opened:
        ready = {}
        for number, model in enumerate(tqdm(models, "open", unit="model", disable=None)):
            if model.file is None:
                continue
            try:
                file = model.file
                if runtime == "litert":
                    file = _to_litert(file, Path(scratch, f"{number}.tflite"))
                ready[model.name] = opened.enter_context(load(file, threads=1))
            # Whatever a converter raises: the others can still be timed.
            except Exception as error:
                failed[model.name] = " ".join(str(error).split())[:300] or type(error).__name__
        images = {
            name: np.full((1, *open_model.input_shape), 128, np.float32)
            for name, open_model in ready.items()
        }
        for turn in tqdm(range(ROUNDS + 1), "latency", unit="round", disable=None):
            for name, open_model in ready.items():
                taken = open_model.times(images[name], RUNS)
                if turn:  # the first warms up
                    times.setdefault(name, []).extend(taken)
        names = sorted({open_model.name for open_model in ready.values()})
    result["latency"] = {
        "runtime": ", ".join(names),
        "threads": 1 if runtime == "litert" else "left to Keras",
        "images": ROUNDS * RUNS,
        "load_average": round(load_before, 2),
    }
    for row in result["models"]:
        if row["name"] in times:
            p50, p95 = np.percentile(times[row["name"]], (50, 95))
            row["latency"] = {"p50_ms": float(p50), "p95_ms": float(p95)}
        elif row["name"] in failed:
            row["latency"] = {"failed": failed[row["name"]]}


def _to_litert(file: Path, target: Path) -> Path:
    from pipelines.exporters.quiet import quiet
    from pipelines.exporters.source import open_model, signature

    with quiet(f"TFLite export of {file}"):
        model = open_model(file)
        model.export(target, format="litert", input_signature=signature(model, batch=1))
    return target


def _log_latency(result: dict[str, Any], models: Sequence[Answers], params: Params) -> None:
    """Add `latency_ms` to the MLflow runs of the graph's own models."""
    import mlflow

    rows = {row["name"]: row.get("latency", {}) for row in result["models"]}
    for model in models:
        if model.tracked and model.file and "p50_ms" in rows[model.name]:
            with tracking.run_of_model(params.tracking, result["task"], model.file):
                mlflow.log_metric("latency_ms", rows[model.name]["p50_ms"])


def deployables_of(task: TaskName) -> dict[str, Any] | None:
    """Return what `verify` measured of the candidate's deployables on test, None before it has."""
    folder = Path("reports/verify", task)
    paths = [Path(f"reports/select/{task}.json"), folder / "numerics.json", folder / "perf.json"]
    if not all(path.exists() for path in paths):
        return None
    select, numerics, perf = (json.loads(path.read_text()) for path in paths)
    rows = [
        {
            "name": name,
            "metric": row[DECIDES[task]],
            "ci95": row["ci95"][DECIDES[task]],
            "loss": row["loss"],
            **{key: perf[name][key] for key in ("runtime", "bytes", "p50_ms")},
        }
        for name, row in numerics.items()
    ]
    return {"candidate": select["candidate"], "rows": rows}


def write(result: dict[str, Any], out: Path) -> None:
    """Write the page, and the figures as JSON beside it."""
    from pipelines.pages.comparison import write_comparison

    out.parent.mkdir(parents=True, exist_ok=True)
    figures = out.with_suffix(".json")
    for path, text in (
        (figures, json.dumps(result, indent=2) + "\n"),
        (out, write_comparison(result)),
    ):
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    print(f"{out}: {len(result['models'])} models, best on {result['side']}: {result['best']}")


if __name__ == "__main__":
    run(main)
