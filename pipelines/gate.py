"""Judge a task's registered candidate against the champion; the verdict is `blessing.json`.

    python -m pipelines.gate --task emotion

One row a gate: name, value, bound, interval, whether it passed, and why. A gate that could not be
computed has failed. Judged are the faces of the test side, as `verify` has answered them; of the
champion's answers to the same faces those kept in the registry are taken, or where it was measured
on other faces its registered model is asked anew. The blessing holds for the bytes that it lists
and against the champion that it names, and goes to the candidate's version in the registry.

It is no DVC stage: the champion is not a file of the repository, so DVC would go on taking a
verdict for up to date after the champion has changed. Given candidate, champion, faces and
params, the blessing is the same to the byte.
"""

import argparse
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from pipelines import lineage, registry
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.compare import holm, sign_flip
from pipelines.datasets import GENERATED
from pipelines.heldout import Faces, faces_of_side, with_traits
from pipelines.measures import DECIDES, bootstrap_weights, landmark_errors, measure
from pipelines.params import (
    MOST_LOST,
    MOST_LOST_DRAWN,
    Evaluate,
    GateTask,
    Override,
    Params,
    Task,
    TaskName,
    load_params,
)
from pipelines.report import markdown
from pipelines.select import lead
from pipelines.slices import FEWEST, bins_of, figures_by_slice

SURE = 0.05  # level of the tests, after correction for their number
# Whose outputs are read here, or were to make those; `train` may go on changing its own.
RECORDED = ("filter", "split", "augment", "evaluate", "select", "export", "verify")
NOT_COMPUTED = "not computed"
HIGH_IS_GOOD = ("accuracy", "macro_f1", "balanced_accuracy", "auc10")

Row = dict[str, Any]


def main() -> None:
    """Judge one task's candidate and tell the registry."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, choices=tuple(DECIDES))
    task = parser.parse_args().task
    params = load_params()
    files = registry.bytes_of(task)
    store = registry.Registry(params.tracking, task)
    version = store.with_bytes(registry.digest(files))
    if version is None:
        raise GrimaceError(
            f"what deploy/ holds for {task} is not registered; run "
            f"`python -m pipelines.register --task {task}`"
        )
    if version in {move.after for move in store.moves()}:
        print(f"{store.name} version {version} was made champion on the blessing that it has")
        hand_back(store, version)
        return
    settings = params.tasks.named(task)
    faces = with_traits(faces_of_side(task, settings, "test"), settings)
    candidate = read_candidate(task, files, faces)
    champion = read_champion(store, faces, settings)
    rows = gates(task, candidate, champion, faces, params)
    blessing = bless(task, candidate, champion, faces, rows, params.gate.overrides)
    with whole_folder(folder_of(task)) as out:
        (out / "blessing.json").write_text(json.dumps(blessing, indent=2) + "\n")
        (out / "gates.md").write_text(table(blessing))
        if candidate.outputs is not None:
            save_answers(out / "answers.npz", faces, candidate.outputs, files["model.keras"])
    store.attach(version, folder_of(task))
    tell_run(store, version, blessing)
    print(f"{store.name} version {version}: {verdict(blessing)}")
    for row in rows:
        if not row["passed"]:
            print(f"{'OVERRIDDEN' if row['overridden'] else 'FAILED'}: {row['name']}: {row['why']}")


def hand_back(store: registry.Registry, version: int) -> None:
    """Write the blessing that a version has: what a champion was promoted on stays on record."""
    blessing = store.blessing(version)
    with whole_folder(folder_of(store.task)) as out:
        (out / "blessing.json").write_text(json.dumps(blessing, indent=2) + "\n")
        (out / "gates.md").write_text(table(blessing))


def tell_run(store: registry.Registry, version: int, blessing: Mapping[str, Any]) -> None:
    """Add what decided to the run that trained the candidate, for MLflow's compare page.

    Each gate's value is `gate/NAME`; of the one against the champion, the interval's lower end,
    which is what is judged there, is `gate/against_the_champion.low`.
    """
    from mlflow.entities import Metric, RunTag

    figures = {}
    for row in blessing["gates"]:
        name = "gate/" + re.sub(r": |/", ".", row["name"]).replace(" ", "_")
        figures[name] = row["value"]
        if row["name"] == "against the champion" and row["interval"]:
            figures[f"{name}.low"] = row["interval"][0]
    now = int(time.time() * 1000)
    metrics = [
        Metric(name, float(value), now, 0) for name, value in figures.items() if value is not None
    ]
    tags = [RunTag("grimace.gates", verdict(blessing)), RunTag("grimace.version", str(version))]
    store.client.log_batch(store.version(version).run_id, metrics=metrics, tags=tags)


def folder_of(task: str) -> Path:
    """Return where a task's blessing is written."""
    return Path("reports/gate", task)


@dataclass(frozen=True, eq=False)
class Candidate:
    """What is known of the model to be judged.

    Attributes:
        files: SHA-256 by path, as `registry.bytes_of` gives them.
        outputs: its answers to the test faces; None where there are none to exactly these.
        verification: what `verify` wrote, by file name; empty where it has not.
        validation: the scores of `evaluate`; empty where they are of another model.
        known: ids and groups of the faces that it was trained or chosen on.
        recorded: by path, checksums of what the stages have left: as dvc.lock has it, and of what
            is there now; and of what each has read: as it was then, and as it was made last. Empty
            where dvc.lock knows nothing of it.
    """

    files: Mapping[str, str]
    outputs: np.ndarray | None
    verification: Mapping[str, Any]
    validation: Mapping[str, Any]
    known: frozenset[str]
    recorded: Mapping[str, tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Champion:
    """Whom the candidate has to match.

    Attributes:
        version: in the registry.
        sha256: of all its files, as its blessing has it.
        outputs: its answers to the test faces; None where they cannot be had.
        wrong: why not, "" where they can.
    """

    version: int
    sha256: str
    outputs: np.ndarray | None
    wrong: str = ""


def read_candidate(task: TaskName, files: Mapping[str, str], faces: Faces) -> Candidate:
    """Collect what the stages before have left; what is missing fails its gates later."""
    folder, model = Path("reports/verify", task), files["model.keras"]
    verification = {
        name: json.loads(path.read_text())
        for name in ("test", "numerics", "perf", "budgets")
        if (path := folder / f"{name}.json").exists()
    }
    select = Path("reports/select", f"{task}.json")
    name = json.loads(select.read_text())["candidate"] if select.exists() else ""
    report = Path("reports/evaluate", task, name)
    validation = {}
    if name and (report / "predictions.npz").exists():
        with np.load(report / "predictions.npz") as saved:
            if saved["models"].tolist() == [model]:
                validation = json.loads((report / "scores.json").read_text())
    return Candidate(
        files=files,
        outputs=read_answers(folder / "predictions.npz", faces, model),
        verification=verification,
        validation=validation,
        known=_known(task),
        recorded=_recorded(task),
    )


def _known(task: TaskName) -> frozenset[str]:
    shards = Path("data/augment", task)
    meta = json.loads((shards / "meta.json").read_text())
    index = pd.read_parquet(Path("data/split", meta["dataset"], "index.parquet")).set_index("id")
    ids = {str(id) for side in ("train", "val") for id in np.load(shards / side / "ids.npy")}
    return frozenset(ids | set(index["group"].reindex(sorted(ids)).dropna()))


def _recorded(task: TaskName) -> dict[str, tuple[str, str]]:
    lock, last = lineage.read_lock(), f"verify@{task}"
    stages = lineage.ancestry(lock, last) if last in lock["stages"] else []
    made = {out["path"]: out["md5"] for stage in stages for out in _outs(lock, stage)}
    outputs = {
        out["path"]: (out["md5"], md5_of(Path(out["path"])))
        for stage in stages
        if stage.partition("@")[0] in RECORDED
        for out in _outs(lock, stage)
    }
    # A stage may have been run by itself on what others had left before they ran again.
    inputs = {
        f"{dep['path']} as {stage} read it": (
            dep["md5"],
            made.get(dep["path"]) or md5_of(Path(dep["path"])),
        )
        for stage in stages
        for dep in lock["stages"][stage].get("deps", [])
        if any(Path(dep["path"]).is_relative_to(path) for path in made)
    }
    return outputs | inputs


def _outs(lock: Mapping[str, Any], stage: str) -> list[dict[str, str]]:
    return lock["stages"][stage].get("outs", [])


def md5_of(path: Path) -> str:
    """Return the checksum that DVC has for a file or folder, "" where there is neither.

    A folder's is that of the list of its files, as `dvc_data.hashfile.tree.Tree` writes it.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    if not path.is_dir():
        return ""
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    listed = [{"md5": md5_of(files[name]), "relpath": name} for name in sorted(files)]
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"


def read_champion(store: registry.Registry, faces: Faces, task: Task) -> Champion | None:
    """Return the champion with its answers to these faces; None where there never was one.

    A champion that is lost is no reason to do without: it comes back as one without answers.
    """
    try:
        version = store.champion()
        if version is None:
            return None
        folder = store.fetch(version)
        blessing = store.blessing(version)
        store.check_bytes(version, blessing)
    except Exception as error:  # whatever a store raises
        return Champion(0, "", None, f"the champion is lost: {' '.join(str(error).split())}")
    model, digest = folder / registry.MODEL, blessing["files"]["model.keras"]
    answers, outputs = folder / "answers.npz", None
    try:
        if "answers" in blessing:
            outputs = read_answers(answers, faces, digest, digest_of(faces))
        if outputs is None:
            # Not by `load_params`: it may be of an earlier schema.
            then = yaml.safe_load((folder / lineage.FOLDER / "params.yaml").read_text())
            own = task.model_copy(update={"margin": then["tasks"][store.task]["margin"]})
            outputs = ask_anew(model, faces, task, own, store.task)
        elif digest_of_answers(outputs) != blessing["answers"]:
            raise GrimaceError(
                f"{answers} was changed since it was blessed; put it back, or remove it to have "
                "the model asked anew"
            )
        if not np.isfinite(outputs).all():
            raise GrimaceError("not all of its answers are numbers")
    except Exception as error:
        wrong = f"the champion does not answer: {' '.join(str(error).split())}"
        return Champion(version, blessing["sha256"], None, wrong)
    return Champion(version, blessing["sha256"], outputs)


def ask_anew(file: Path, faces: Faces, task: Task, own: Task, name: TaskName) -> np.ndarray:
    """Ask a registered model about the test faces, in crops such as it was trained on.

    Args:
        file: the model.
        faces: the test side as the task has it now.
        task: what they were cropped by.
        own: what the model's faces were cropped by, but for the shape, which it tells itself.
        name: of the task.
    """
    from pipelines.runtimes import load

    with load(file) as model:
        size, _, channels = model.input_shape
        images = faces.images
        own = own.model_copy(update={"size": size, "channels": channels})
        if own != task:
            images = faces_of_side(name, own, "test").images
        return model.predict(images)


def read_answers(
    path: Path, faces: Faces, model_sha256: str, faces_sha256: str | None = None
) -> np.ndarray | None:
    """Return saved answers if they are a model's to exactly these faces, else None."""
    if not path.exists():
        return None
    with np.load(path) as saved:
        if saved["models"].tolist() != [model_sha256]:
            return None
        if not np.array_equal(saved["ids"], faces.ids):
            return None
        if faces_sha256 is not None and str(saved["faces"]) != faces_sha256:
            return None
        return saved["outputs"]


def save_answers(path: Path, faces: Faces, outputs: np.ndarray, model_sha256: str) -> None:
    """Write a model's answers with the digests of model and faces, for the judge of its heir."""
    np.savez_compressed(
        path, ids=faces.ids, outputs=outputs, models=[model_sha256], faces=digest_of(faces)
    )


def digest_of_answers(outputs: np.ndarray) -> str:
    """Return the SHA-256 of a model's answers."""
    digest = hashlib.sha256(f"{outputs.shape} {outputs.dtype}".encode())
    digest.update(np.ascontiguousarray(outputs).tobytes())
    return digest.hexdigest()


def digest_of(faces: Faces) -> str:
    """Return the SHA-256 of all that a model is asked: ids, pictures and labels."""
    digest = hashlib.sha256(json.dumps(faces.ids.tolist()).encode())
    for array in (faces.images, faces.emotions, faces.landmarks, faces.visible):
        if array is not None:
            digest.update(f"{array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def gates(
    task: TaskName,
    candidate: Candidate,
    champion: Champion | None,
    faces: Faces,
    params: Params,
) -> list[Row]:
    """Return one row a gate, in a fixed order.

    Args:
        task: "emotion" or "landmarks".
        candidate: who is judged.
        champion: whom it has to match; None for the first.
        faces: the test side, with traits.
        params: bounds in `gate`, seed in `evaluate`.

    Returns:
        name, value, bound and interval ([low, high] or None), all ready for JSON, `passed`, `why`.
    """
    bounds = params.gate.named(task)
    paired = params.evaluate.model_copy(update={"resamples": params.gate.resamples})
    rows = [
        _attempt("bytes", 0, lambda: _same_bytes(candidate)),
        _attempt("records", 0, lambda: _as_recorded(candidate, task)),
        _attempt("unseen faces", 0, lambda: _unseen(candidate, faces)),
    ]
    metric = DECIDES[task]

    @cache
    def scores() -> dict[str, Any]:
        return measure(faces, _answered(candidate), params.evaluate)

    rows += [
        _attempt(f"floor: {name}", floor, partial(_floor, scores, name, floor))
        for name, floor in bounds.floors.items()
    ]
    rows += [
        _attempt(
            "validation and test",
            bounds.above_validation,
            lambda: _honest(scores(), candidate, metric, bounds),
        ),
        _attempt(
            "worst slice",
            bounds.slice_floor,
            lambda: _worst_slice(faces, _answered(candidate), metric, bounds, paired),
        ),
    ]
    if champion is not None:
        rows += [
            _attempt(
                "against the champion",
                -bounds.margin,
                lambda: _no_worse(
                    faces, _answered(candidate), _answers_of(champion), bounds, paired
                ),
            ),
            _attempt(
                "slices against the champion",
                SURE,
                lambda: _no_slice_worse(faces, _answered(candidate), _answers_of(champion), paired),
            ),
        ]
    drawn = params.tasks.named(task).dataset == GENERATED
    return rows + deployable_gates(candidate.verification, bounds, task, drawn)


def _attempt(name: str, bound: float, gate: Callable[[], Row]) -> Row:
    """Fill in a row; whatever goes wrong on the way has failed the gate, with the reason."""
    row: Row = {"name": name, "value": None, "bound": bound, "interval": None, "passed": False}
    try:
        row |= gate()
    except Exception as error:  # nothing passes by a mistake of ours either
        row["why"] = f"{NOT_COMPUTED}: {' '.join(str(error).split()) or type(error).__name__}"
    row["passed"] = bool(row["passed"])
    return row


def _answered(candidate: Candidate) -> np.ndarray:
    if candidate.outputs is None:
        raise GrimaceError(
            "`verify` has no answers of this model to these test faces; run `dvc repro verify`"
        )
    return candidate.outputs


def _answers_of(champion: Champion) -> np.ndarray:
    if champion.outputs is None:
        raise GrimaceError(champion.wrong)
    return champion.outputs


def _same_bytes(candidate: Candidate) -> Row:
    """What is blessed is what was measured, file by file."""
    measured = candidate.verification["budgets"]["files"]
    names = sorted({*measured, *candidate.files})
    other = [name for name in names if measured.get(name) != candidate.files.get(name)]
    why = f"all {len(names)} files are as `verify` measured them"
    if other:
        why = f"not as `verify` measured them: {', '.join(other)}"
    return {"value": len(other), "passed": not other, "why": why}


def _as_recorded(candidate: Candidate, task: TaskName) -> Row:
    """What is judged is what DVC's stages have left, faces and answers included."""
    if not candidate.recorded:
        raise GrimaceError(f"dvc.lock has no record of it; run `dvc repro verify@{task}`")
    other = sorted(path for path, (noted, now) in candidate.recorded.items() if noted != now)
    count = len(candidate.recorded)
    why = f"all {count} inputs and outputs of the stages before are as dvc.lock has them"
    if other:
        why = f"not as dvc.lock has them: {', '.join(other)}; run `dvc repro verify@{task}`"
    return {"value": len(other), "passed": not other, "why": why}


def _unseen(candidate: Candidate, faces: Faces) -> Row:
    """No test face, and nobody on it, was there in training or selection."""
    if not candidate.known:
        raise GrimaceError("nothing is known of what the model was trained on")
    known = sorted(candidate.known)
    seen = np.isin(faces.ids, known) | np.isin(faces.groups, known)
    count = int(seen.sum())
    why = f"none of {len(seen)} test faces, nor their people, is among training or validation"
    if count:
        first = faces.ids[seen][0]
        why = f"{count} of {len(seen)} test faces or their people were there in training: {first} …"
    return {"value": count, "passed": count == 0, "why": why}


def _floor(measured: Callable[[], dict[str, Any]], metric: str, floor: float) -> Row:
    scores = measured()
    if metric not in scores:
        raise GrimaceError(f"{metric!r} is not measured")
    value = scores[metric]
    high = metric in HIGH_IS_GOOD
    return {
        "value": value,
        "interval": scores["ci95"].get(metric),
        "passed": value >= floor if high else value <= floor,
        "why": f"{value:.2%}, at {'least' if high else 'most'} {floor:.2%} asked",
    }


def _honest(test: Mapping[str, Any], candidate: Candidate, metric: str, bounds: GateTask) -> Row:
    """A model may not be surely better on test than on validation: it would know the answers.

    The interval of the difference is built from those of both figures (Zou and Donner 2008).
    """
    if not candidate.validation:
        raise GrimaceError("`evaluate` has no scores of this model; run `dvc repro evaluate`")
    sign = _sign(metric)
    sides = [(side[metric], *side["ci95"][metric]) for side in (test, candidate.validation)]
    (here, here_low, here_high), (there, there_low, there_high) = (
        (value, low, high) if sign > 0 else (-value, -high, -low) for value, low, high in sides
    )
    better = here - there
    low = better - float(np.hypot(here - here_low, there_high - there))
    high = better + float(np.hypot(here_high - here, there - there_low))
    return {
        "value": better,
        "interval": [low, high],
        "passed": low <= bounds.above_validation,
        "why": f"better on test than on validation by {better:.2%}, at least {low:.2%}; up to "
        f"{bounds.above_validation:.2%} is taken for chance or an easier side",
    }


def per_face(faces: Faces, outputs: np.ndarray) -> np.ndarray:
    """Return each face's share in the deciding metric, (n,); NaN where it is not defined.

    1.0 for a right answer and 0.0 for a wrong one, or the inter-ocular NME.
    """
    if faces.emotions is not None:
        return (outputs.argmax(-1) == faces.emotions).astype(float)
    return landmark_errors(faces, outputs)[0]


def _sign(metric: str) -> int:
    return 1 if metric in HIGH_IS_GOOD else -1


def _judged_slices(faces: Faces, known: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """Masks (n,) of the slices that hold enough pieces of evidence to say anything of.

    Only faces that are `known`, (n,) bool, are evidence: those on which the metric is defined.
    """
    assert faces.traits is not None
    found = {}
    for column, names in bins_of(faces.traits).items():
        for name in sorted(set(names.tolist()) - {""}):
            inside = (names == name) & known
            if len(np.unique(faces.groups[inside])) >= FEWEST:
                found[column, name] = inside
    if not found:
        raise GrimaceError(f"no slice of the test side has {FEWEST} independent faces")
    return found


def _worst_slice(
    faces: Faces, outputs: np.ndarray, metric: str, bounds: GateTask, settings: Evaluate
) -> Row:
    sign, values = _sign(metric), per_face(faces, outputs)
    slices = _judged_slices(faces, np.isfinite(values))
    means = {key: float(values[inside].mean()) for key, inside in slices.items()}
    worst = min(means, key=lambda key: (sign * means[key], key))
    value = means[worst]
    return {
        "value": value,
        "interval": _slice_interval(faces, values, worst, settings),
        "passed": sign * value >= sign * bounds.slice_floor,
        "why": f"{' '.join(worst)}: {value:.2%} on {int(slices[worst].sum())} faces, at "
        f"{'least' if sign > 0 else 'most'} {bounds.slice_floor:.2%} asked; {len(slices)} slices",
    }


def _slice_interval(
    faces: Faces, values: np.ndarray, key: tuple[str, str], settings: Evaluate
) -> list[float] | None:
    column, name = key
    assert faces.traits is not None
    found = figures_by_slice(
        {"value": values},
        {column: bins_of(faces.traits)[column]},
        faces.groups,
        bootstrap_weights(faces.groups, settings),
    )
    intervals = found[column][name]["ci95"]
    return intervals["value"] if intervals else None


def _no_worse(
    faces: Faces, mine: np.ndarray, theirs: np.ndarray, bounds: GateTask, settings: Evaluate
) -> Row:
    """The paired cluster bootstrap: not worse than the champion by the margin, surely."""
    high = faces.emotions is not None
    interval = lead(faces, mine, theirs, settings)
    gained = per_face(faces, mine) - per_face(faces, theirs)
    gain = float(np.nanmean(gained)) * (1 if high else -1)
    low, up = interval if high else (-interval[1], -interval[0])
    return {
        "value": gain,
        "interval": [low, up],
        "passed": low > -bounds.margin,
        "why": f"gains {gain:+.2%} on the same {int(np.isfinite(gained).sum())} faces, surely no "
        f"less than {low:+.2%}; more than {-bounds.margin:.2%} asked",
    }


def _no_slice_worse(faces: Faces, mine: np.ndarray, theirs: np.ndarray, settings: Evaluate) -> Row:
    """No slice lost: permutation tests with Holm's correction for the number of slices."""
    sign = 1 if faces.emotions is not None else -1
    one, two = per_face(faces, mine), per_face(faces, theirs)
    slices = _judged_slices(faces, np.isfinite(one) & np.isfinite(two))
    gains = {
        key: sign * float((one[inside] - two[inside]).mean()) for key, inside in slices.items()
    }
    chances = [
        sign_flip(one[slices[key]], two[slices[key]], faces.groups[slices[key]], settings.seed)
        for key in gains
    ]
    adjusted = dict(zip(gains, holm(chances), strict=True))
    losses = [key for key in gains if gains[key] < 0]
    lost = [key for key in losses if adjusted[key] < SURE]
    worst = min(losses or gains, key=lambda key: (adjusted[key], gains[key], key))
    interval = _slice_interval(faces, sign * (one - two), worst, settings)
    which = ", ".join(f"{' '.join(key)} ({gains[key]:+.2%})" for key in lost)
    why = f"worse in {which}" if lost else f"no slice of {len(gains)} is surely worse"
    return {
        "value": adjusted[worst],
        "interval": interval,
        "passed": not lost,
        "why": f"{why}; {' '.join(worst)} gains {gains[worst]:+.2%}, corrected p "
        f"{adjusted[worst]:.4f} (value; the interval is the gain's)",
    }


def deployable_gates(
    verification: Mapping[str, Any], bounds: GateTask, task: TaskName, drawn: bool
) -> list[Row]:
    """Return budget, golden-input and size rows of every deployable that `verify` looked at.

    This is all that the gate knows of what `verify` writes: `budgets` with the `gates` it tried
    and the engines `built_but_not_run`; by deployable `numerics`, where `loss_ci95` and `golden`
    (difference, tolerance) may be, and `perf`; and `test`. A name such as "tfjs/uint8:node" is of
    a further runtime of a graph, whose size is judged once.
    """
    tried = verification.get("budgets", {}).get("gates", [])
    numerics, perf = verification.get("numerics", {}), verification.get("perf", {})
    engines = verification.get("budgets", {}).get("built_but_not_run", {})
    if not tried:
        reason = "`verify` has tried no deployable; run `dvc repro verify`"
        return [_row("deployables", None, 1, False, reason)]
    rows: list[Row] = []
    for gate in tried:
        name = gate["name"]
        graph = name.partition(":")[0]
        if gate["value"] is None or name not in numerics or name not in perf:
            rows.append(_row(f"budget: {name}", None, gate["bound"], False, gate["why"]))
            continue
        scores, test = numerics[name], verification.get("test", {})
        limit = bounds.mib.get(graph, bounds.mib["default"])
        rows += [
            _attempt(
                f"budget: {name}", gate["bound"], partial(_budget, gate, scores, test, task, drawn)
            ),
            _attempt(f"golden: {name}", 0.0, partial(_golden, name, scores, bounds)),
        ]
        if all(row["name"] != f"size: {graph}" for row in rows):
            size = partial(_size, perf[name]["bytes"], limit)
            rows.append(_attempt(f"size: {graph}", limit, size))
    for name, size in engines.items():
        limit = bounds.mib.get(f"tensorrt/{name}", bounds.mib["default"])
        rows.append(_attempt(f"size: tensorrt/{name}", limit, partial(_size, size, limit)))
    return rows


def _budget(
    gate: Mapping[str, Any],
    scores: Mapping[str, Any],
    test: Mapping[str, Any],
    task: TaskName,
    drawn: bool,
) -> Row:
    """The verdict of `verify`, and that its figures bear it out; whatever it was told to allow."""
    real = MOST_LOST[task]
    bound = min(gate["bound"], MOST_LOST_DRAWN[task] if drawn else real)
    why = gate["why"]
    if bound < gate["bound"]:
        why += f"; {bound:g} is the most that verify may be told to allow"
    if bound > real:
        why += f"; of drawn faces, {real:g} of real ones"
    # A loss of just the bound must not fail over the last bit.
    within = scores["loss"] <= bound + 1e-9 and scores["n"] == test["n"]
    return {
        "value": scores["loss"],
        "bound": bound,
        "interval": scores.get("loss_ci95"),
        "passed": gate["passed"] and within,
        "why": why,
    }


def _row(name: str, value: float | None, bound: Any, passed: bool, why: str) -> Row:
    return {
        "name": name,
        "value": value,
        "bound": bound,
        "interval": None,
        "passed": passed,
        "why": why,
    }


def _golden(name: str, scores: Mapping[str, Any], bounds: GateTask) -> Row:
    """Answers of its own runtime against the float32 model's: golden ones, or to all test faces."""
    precision = name.rpartition("/")[2].partition(":")[0]
    if "golden" in scores:
        value, bound = scores["golden"]["difference"], scores["golden"]["tolerance"]
    elif precision in bounds.answers:
        value, bound = scores["max_difference"], bounds.answers[precision]
    else:
        raise GrimaceError(f"params.yaml: gate.{scores['task']}.answers has no {precision!r}")
    return {
        "value": value,
        "bound": bound,
        "passed": value <= bound,
        "why": f"answers differ by {value:.2g} at most, {bound:.2g} allowed",
    }


def _size(size: int, limit: float) -> Row:
    mib = size / 2**20
    why = f"{mib:.2f} MiB, at most {limit:.2f} allowed"
    return {"value": mib, "passed": mib <= limit, "why": why}


def bless(
    task: TaskName,
    candidate: Candidate,
    champion: Champion | None,
    faces: Faces,
    rows: list[Row],
    overrides: tuple[Override, ...],
) -> dict[str, Any]:
    """Return the blessing; rows get `overridden`, None or who let them pass and why.

    Raises:
        GrimaceError: an override for this candidate names no gate, or one that was passed.
    """
    sha256 = registry.digest(candidate.files)
    mine = [o for o in overrides if o.task == task and sha256.startswith(o.candidate)]
    failed = {row["name"] for row in rows if not row["passed"]}
    for override in mine:
        if override.gate not in failed:
            raise GrimaceError(
                f"params.yaml: gate.overrides: {override.gate!r} is no gate that {sha256[:12]} "
                f"fails; it fails {', '.join(sorted(failed)) or 'none'}. Take the override out"
            )
    signed = {override.gate: override for override in mine}
    for row in rows:
        by = None if row["passed"] else signed.get(row["name"])
        row["overridden"] = by and {"who": by.who, "reason": by.reason}
    return {
        "schema": 1,
        "task": task,
        "blessed": bool(rows) and all(row["passed"] or row["overridden"] for row in rows),
        "sha256": sha256,
        "files": dict(sorted(candidate.files.items())),
        "answers": None if candidate.outputs is None else digest_of_answers(candidate.outputs),
        "champion": champion and {"version": champion.version, "sha256": champion.sha256},
        "basis": "absolute bounds alone: there was no champion to compare with"
        if champion is None
        else f"absolute bounds, and the champion, version {champion.version or 'unknown'}",
        "faces": {
            "side": "test",
            "n": len(faces.ids),
            "groups": len(np.unique(faces.groups)),
            "sha256": digest_of(faces),
        },
        "gates": rows,
    }


def is_final(row: Mapping[str, Any]) -> bool:
    """Whether a row would come out the same if the same candidate were judged again tomorrow.

    A gate that was not computed may be, and what dvc.lock does not bear out may be run again.
    """
    return row["name"] != "records" and not row["why"].startswith(NOT_COMPUTED)


def verdict(blessing: Mapping[str, Any]) -> str:
    """Return one line: blessed or not, and by what."""
    failed = [row for row in blessing["gates"] if not row["passed"]]
    signed = [row["name"] for row in failed if row["overridden"]]
    if blessing["blessed"]:
        over = f"; overridden: {', '.join(signed)}" if signed else ""
        return f"blessed on {len(blessing['gates'])} gates ({blessing['basis']}){over}"
    unsigned = [row["name"] for row in failed if not row["overridden"]]
    count = f"{len(unsigned)} of {len(blessing['gates'])} gates failed"
    return f"not blessed: {count}: {', '.join(unsigned)}"


def table(blessing: Mapping[str, Any]) -> str:
    """Return the gates as Markdown, failed ones first."""

    def text(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    rows: list[tuple[str, ...]] = []
    for row in sorted(blessing["gates"], key=lambda row: row["passed"]):
        interval = " – ".join(text(end) for end in row["interval"] or ())
        state = "passed" if row["passed"] else "FAILED"
        if signed := row.get("overridden"):
            state = f"overridden by {signed['who']}: {signed['reason']}"
        why = row["why"].replace("|", "\\|")
        rows.append((row["name"], text(row["value"]), text(row["bound"]), interval, state, why))
    columns = ("gate", "value", "bound", "95 % interval", "verdict", "why")
    return (
        f"**{verdict(blessing)}**\n\n{markdown(rows, columns)}\n"
        f"For the bytes `{blessing['sha256'][:12]}`, on {blessing['faces']['n']} test faces.\n"
    )


if __name__ == "__main__":
    run(main)
