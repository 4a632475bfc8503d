"""Does filtering pay? One network on three versions of FER-2013, judged on the same test faces.

    GRIMACE_ARCHIVES=DIR python -m pipelines.download --dataset fer2013
    python -m benchmarks.filtering

Each arm is prepared by the real stages (`filter`, `split`, `augment`) in a folder of its own:
  unfiltered  everything that can be decoded and has a label
  cascade     of that, the training images in which the frontal Haar cascade finds a face: the sieve
              of the projects before this one
  audited     what `filter` leaves, with params.yaml as it stands
All arms train the same network for the same number of gradient steps, with the same seeds, and keep
the epoch that did best on the same validation faces (every readable PublicTest one). Nothing is
chosen on the test faces (every readable PrivateTest one).

Run the same again to go on: what is finished is not repeated, and an interrupted training resumes
after its last epoch. When all trainings are there, the page is written.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml
from tqdm import tqdm

from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.params import Evaluate, TaskName, TrainJob, load_params
from pipelines.shards import version_of

if TYPE_CHECKING:
    from pipelines.heldout import Faces

DATASET, JOB = "fer2013", "emotion-plain"
TASK: TaskName = "emotion"
ARMS = ("unfiltered", "cascade", "audited")
PAIRS = (("audited", "unfiltered"), ("cascade", "unfiltered"), ("audited", "cascade"))
NEEDED = ("defect", "unreadable")  # what no training can read is left out of every arm

ROOT = Path(__file__).parents[1]
CLEAN = Path("data/clean", DATASET)
INDEX = Path("data/split", DATASET, "index.parquet")
AUDIT = Path("reports/filter", DATASET, "examples.parquet")


def main() -> None:
    """Prepare the arms, train what is missing, and write the page when nothing is."""
    args = _arguments()
    os.environ |= {"TF_NUM_INTRAOP_THREADS": str(args.threads), "TF_NUM_INTEROP_THREADS": "1"}
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    params = load_params()
    lay_raw(args.raw, args.work, args.limit)
    for arm in dict.fromkeys(["unfiltered", *args.arms]):  # the others need parts of the first
        prepare(arm, args.work, args.threads, args.limit)

    # Seeds in turn, so that arms can be compared as early as possible.
    todo = [(arm, seed) for seed in args.seeds for arm in args.arms]
    for arm, seed in (progress := tqdm(todo, unit="training")):
        progress.set_description(f"{arm}, seed {seed}")
        job = resolve(arm, seed, params.train.jobs[JOB], args.steps, args.work)
        if not _is_done(arm, job, args.work):
            train(arm, job, args.work)

    if set(args.arms) != set(ARMS):
        print("no page yet: it takes all arms")
        return
    results = compare(args.work, args.seeds, params.evaluate)
    with whole_folder(args.out) as out:
        publish(results, out)
    print((args.out / "README.md").read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--steps",
        type=int,
        help="gradient steps of each training, to the nearest whole epoch of its arm (default: "
        "what params.yaml gives the unfiltered data)",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: every core")
    parser.add_argument(
        "--raw", type=Path, default=Path("data/raw", DATASET), help="what `download` made"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("data/benchmarks/filtering"),
        help="scratch, some 2 GB; gone on from when it exists",
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/filtering"), help="the page")
    parser.add_argument("--limit", type=int, help="only so many images, evenly spaced: a trial")
    return parser.parse_args()


def lay_raw(raw: Path, work: Path, limit: int | None) -> None:
    """Put the raw dataset, or a sample of it, where all arms find it."""
    target = work / "raw" / DATASET
    if target.exists():
        return
    if not raw.exists():
        raise GrimaceError(
            f"{raw} is missing: run `python -m pipelines.download --dataset {DATASET}`, with "
            "GRIMACE_ARCHIVES naming the folder of its archive"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    if limit is None:
        target.symlink_to(raw.resolve())
        return
    from pipelines.datasets import builder

    chosen = set(np.linspace(0, builder.count(raw) - 1, limit).astype(int).tolist())
    rows = (row for number, row in enumerate(builder.read(raw)) if number in chosen)
    builder.write(target, rows, description=f"{limit} images of {DATASET}")


def prepare(arm: str, work: Path, threads: int, limit: int | None) -> None:
    """Run the stages of an arm in its own folder, each once; lay its shards in `shards/`.

    Raises:
        GrimaceError: it was prepared with other parameters; or a stage failed.
    """
    folder = work / arm
    params = arm_params(yaml.safe_load(Path("params.yaml").read_text()), arm)
    _refuse_other_settings(folder, _settings(params, arm) | {"limit": limit})
    for section in ("filter", "augment"):
        params[section]["workers"] = threads
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    _link(folder / "data/raw", (work / "raw").resolve())
    if arm == "cascade":
        _link(folder / CLEAN, (work / "unfiltered" / CLEAN).resolve())
        _once(folder, "split", sieve, work / "unfiltered" / INDEX, folder)
    else:
        _once(folder, "filter", _stage, folder, "filter", "--dataset", DATASET)
        _once(folder, "split", _stage, folder, "split", "--dataset", DATASET)
    _once(folder, "augment", _stage, folder, "augment", "--task", TASK)
    _lay_shards(folder, work / "unfiltered")


def arm_params(params: dict[str, Any], arm: str) -> dict[str, Any]:
    """Return an arm's parameters: those given, for the audit; else with all checks off that can be.

    Args:
        params: params.yaml as parsed; not changed.
        arm: one of `ARMS`.
    """
    params = json.loads(json.dumps(params))
    params["tasks"][TASK]["dataset"] = DATASET
    if arm != "audited":
        for name, check in params["filter"]["checks"].items():
            check["action"] = "drop" if name in NEEDED else "off"
        params["filter"] |= {"overrides": {}, "restore": {}}
    return params


def sieve(index: Path, folder: Path) -> None:
    """Write a split index whose training side holds only what the cascade finds a face in."""
    from pipelines.checks.faces import seed_keeps
    from pipelines.crops import decode
    from pipelines.datasets.table import read_examples

    table = pd.read_parquet(index)
    train = set(table.loc[table["split"] == "train", "id"])
    rows = (row for row in read_examples(folder / CLEAN) if row.id in train)
    refused = {
        row.id
        for row in tqdm(rows, total=len(train), desc="cascade", unit="img")
        if not seed_keeps(decode(row.image, 3))
    }
    table.loc[table["id"].isin(refused), "split"] = "out"
    with whole_folder((folder / INDEX).parent) as out:
        table.to_parquet(out / INDEX.name, index=False)


def _settings(params: dict[str, Any], arm: str) -> dict[str, Any]:
    """Return the parameters and the code that the arm's shards depend on."""
    code = hashlib.sha256(b"".join(path.read_bytes() for path in _sources()))
    settings = {
        "code": code.hexdigest(),
        "task": params["tasks"][TASK],
        "split": params["split"],
        "augment": {name: params["augment"][name] for name in ("seed", TASK)},
    }
    if arm == "audited":
        settings["filter"] = {
            name: value
            for name, value in params["filter"].items()
            if name not in ("workers", "pictures")
        }
    return settings


def _sources() -> list[Path]:
    stages = ("filter", "split", "augment", "views", "crops", "families")
    modules = [ROOT / "pipelines" / f"{name}.py" for name in stages]
    return [*modules, *sorted((ROOT / "pipelines/checks").glob("*.py")), ROOT / "models/schemes.py"]


def _refuse_other_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise GrimaceError(
            f"{folder} was prepared by other code, or with other parameters than params.yaml and "
            f"the command line give now: restore what {path} says, or remove the folder to "
            "prepare it anew"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _once(folder: Path, step: str, work: Callable[..., None], *arguments: Any) -> None:
    done = folder / f"{step}.done"
    if not done.exists():
        work(*arguments)
        done.touch()


def _stage(folder: Path, stage: str, *arguments: str) -> None:
    print(f"{folder.name}: {stage}", flush=True)
    _python(folder, f"pipelines.{stage}", *arguments)


def _python(folder: Path, module: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    if code := subprocess.run(command, cwd=folder, env=environment, check=False).returncode:
        raise GrimaceError(
            f"`python -m {module} {' '.join(arguments)}` ended with code {code} in {folder}: see "
            "above; run the same again to go on from there"
        )


def _lay_shards(folder: Path, unfiltered: Path) -> None:
    """Join the arm's training side with the validation side that all arms share."""
    own, common = folder / "data/augment" / TASK, unfiltered / "data/augment" / TASK
    _link(folder / "shards/train", (own / "train").resolve())
    _link(folder / "shards/val", (common / "val").resolve())
    meta, shared = (json.loads((place / "meta.json").read_text()) for place in (own, common))
    meta["counts"]["val"] = shared["counts"]["val"]
    (folder / "shards/meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def train(arm: str, job: dict[str, Any], work: Path) -> None:
    """Train one arm with one seed and let it answer on the test faces."""
    seed = job["seed"]
    result = _run(work, arm, seed)
    folder = work / "runs" / f"{arm}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job, indent=2) + "\n")
    paths = {"job": folder / "job.json", "shards": work / arm / "shards", "out": folder}
    options = [text for name, path in paths.items() for text in (f"--{name}", str(path.resolve()))]
    print(f"{arm}, seed {seed}: {job['epochs']} epochs", flush=True)
    _python(ROOT, "pipelines.fit", *options)

    from pipelines.runtimes import load

    faces = test_faces(work)
    assert faces.emotions is not None
    with load(folder / "model.keras") as model:
        answers = model.predict(faces.images)
    result.parent.mkdir(exist_ok=True)
    np.savez(result.with_suffix(".npz"), ids=faces.ids, truth=faces.emotions, answers=answers)
    partial = result.with_suffix(".partial")
    partial.write_text(json.dumps(_facts(arm, job, folder, work), indent=2) + "\n")
    partial.replace(result)
    rmtree(folder / "checkpoint")


_version_of = cache(version_of)


def resolve(
    arm: str, seed: int, settings: TrainJob, steps: int | None, work: Path
) -> dict[str, Any]:
    """Return the fields of a `pipelines.fit.Job` that takes as many steps as every other arm's."""
    settings = settings.at(DATASET)
    steps = steps or settings.epochs * _steps_per_epoch("unfiltered", settings.batch, work)
    fields = settings.model_dump(mode="json", exclude={"by_dataset"})
    fields["epochs"] = max(1, round(steps / _steps_per_epoch(arm, settings.batch, work)))
    return {**fields, "seed": seed, "data_version": _version_of(work / arm / "shards")}


def _steps_per_epoch(arm: str, batch: int, work: Path) -> int:
    return math.ceil(_training_images(arm, work) / batch)


def _training_images(arm: str, work: Path) -> int:
    meta = json.loads((work / arm / "shards/meta.json").read_text())
    return int(meta["counts"]["train"])


@cache
def test_faces(work: Path) -> "Faces":
    """Load every readable PrivateTest face, cropped as in deployment."""
    from pipelines.heldout import faces_of_side

    params = load_params()
    task = params.tasks.emotion.model_copy(update={"dataset": DATASET})
    with chdir(work / "unfiltered"):
        return faces_of_side(TASK, task, "test")


def _is_done(arm: str, job: dict[str, Any], work: Path) -> bool:
    result = _run(work, arm, job["seed"])
    return result.exists() and json.loads(result.read_text())["job"] == job


def _run(work: Path, arm: str, seed: int) -> Path:
    return work / "results" / f"{arm}-{seed}.json"


def _facts(arm: str, job: dict[str, Any], folder: Path, work: Path) -> dict[str, Any]:
    history = pd.read_csv(folder / "history.csv")
    best = int(history["val_accuracy"].to_numpy().argmax())
    images = _training_images(arm, work)
    return {
        "arm": arm,
        "seed": job["seed"],
        "training_images": images,
        "epochs": job["epochs"],
        "steps": job["epochs"] * math.ceil(images / job["batch"]),
        "best_epoch": best + 1,
        "val_accuracy": float(history["val_accuracy"][best]),
        "seconds": round(float((images / history["images_per_second"]).sum())),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "job": job,
    }


def compare(work: Path, seeds: list[int], settings: Evaluate) -> dict[str, Any]:
    """Put all trainings side by side.

    Args:
        work: holds a result for each arm and seed.
        seeds: those compared.
        settings: number of bootstrap resamples, and their seed.

    Returns:
        Ready for JSON: `faces` (test faces by column), `copied` (those of them with a copy in an
        arm's training data), `arms` and `differences` (accuracies, as fractions, with 95 %
        intervals by column), `runs`, and `audit`, the counts of the audited arm.
    """
    answers = {
        (arm, s): np.load(_run(work, arm, s).with_suffix(".npz")) for arm in ARMS for s in seeds
    }
    first = answers[ARMS[0], seeds[0]]
    ids, truth = first["ids"], first["truth"]
    for each in answers.values():
        if not np.array_equal(each["ids"], ids):
            raise GrimaceError(f"{work}: trainings answered on different test faces; start again")
    right = {
        arm: np.stack([answers[arm, s]["answers"].argmax(1) == truth for s in seeds]).astype(float)
        for arm in ARMS
    }
    clusters = pd.read_parquet(work / "audited" / AUDIT).set_index("id")["cluster"]
    groups = groups_of(ids, clusters)
    copied = {
        arm: np.isin(groups, groups_of(np.load(work / arm / "shards/train/ids.npy"), clusters))
        for arm in ARMS
    }
    columns = {"all": np.full(len(ids), True), "without_copies": ~copied["unfiltered"]}

    def estimates(values: np.ndarray) -> dict[str, Any]:
        return {
            name: estimate(values[:, rows], groups[rows], settings)
            for name, rows in columns.items()
        }

    runs = [json.loads(_run(work, arm, s).read_text()) for arm in ARMS for s in seeds]
    for row in runs:
        hits = right[row["arm"]][seeds.index(row["seed"])]
        row |= {f"test_{name}": float(hits[rows].mean()) for name, rows in columns.items()}
    return {
        "command": " ".join(["python -m benchmarks.filtering", *sys.argv[1:]]),
        "faces": {name: int(rows.sum()) for name, rows in columns.items()},
        "copied": {arm: int(rows.sum()) for arm, rows in copied.items()},
        "arms": {arm: estimates(right[arm]) for arm in ARMS},
        "differences": {f"{a} - {b}": estimates(right[a] - right[b]) for a, b in PAIRS},
        "runs": runs,
        "audit": json.loads((work / "audited" / AUDIT.parent).with_suffix(".json").read_text()),
    }


def groups_of(ids: np.ndarray, clusters: pd.Series) -> np.ndarray:
    """Name the picture behind each id, the same for all its exact and near copies.

    Args:
        ids: unicode (n,).
        clusters: by id, the audit's name for all copies of one picture, "" where there is one.

    Returns:
        unicode (n,): the cluster, or else the id.
    """
    named = clusters.reindex(ids).fillna("").to_numpy(str)
    return np.where(named == "", ids, named)


def estimate(values: np.ndarray, groups: np.ndarray, settings: Evaluate) -> dict[str, Any]:
    """Average over seeds and faces; the interval resamples both (Owen 2007, pigeonhole bootstrap).

    Args:
        values: float (seeds, faces), 1 where the answer is right, or differences of such.
        groups: (faces,); whole groups are resampled.
        settings: number of resamples, and their seed.

    Returns:
        mean, and ci95 = [low, high].
    """
    from pipelines.measures import bootstrap_weights

    rng = np.random.default_rng(settings.seed)
    seeds, drawn = len(values), []
    for weights in bootstrap_weights(groups, settings):
        by_seed = weights @ values.T / weights.sum(1, keepdims=True)
        times = rng.multinomial(seeds, np.full(seeds, 1 / seeds), len(weights))
        drawn.append((by_seed * times).sum(1) / seeds)
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return {"mean": float(values.mean()), "ci95": [float(low), float(high)]}


def publish(results: dict[str, Any], out: Path) -> None:
    """Write README.md, results.json and accuracy.png."""
    from pipelines.report import machine, markdown

    results = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), **results}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results, out / "accuracy.png")
    faces, runs = results["faces"], results["runs"]
    columns = tuple(
        f"test, {text} (n = {faces[name]:,})"
        for name, text in (("all", "all faces"), ("without_copies", "faces without a copy"))
    )
    arms = []
    for arm, figures in results["arms"].items():
        own = [row for row in runs if row["arm"] == arm]
        data = f"{own[0]['training_images']:,}", str(results["copied"][arm])
        steps = f"{own[0]['steps']:,} ({own[0]['epochs']})"
        val = f"{np.mean([row['val_accuracy'] for row in own]):.2%}"
        arms.append((arm, *data, steps, val, *(_percent(figures[name]) for name in faces)))
    differences = [
        (pair.replace("-", "−"), *(_points(figures[name]) for name in faces))
        for pair, figures in results["differences"].items()
    ]
    each = [
        (
            row["arm"],
            str(row["seed"]),
            str(row["best_epoch"]),
            *(f"{row[name]:.2%}" for name in ("val_accuracy", *(f"test_{n}" for n in faces))),
            f"{row['seconds'] / 60:.0f} min",
        )
        for row in runs
    ]
    arm_columns = (
        "training data",
        "images",
        "test faces copied there",
        "steps (epochs)",
        "validation",
        *columns,
    )
    each_columns = ("training data", "seed", "best epoch", "validation", *columns, "training time")
    (out / "README.md").write_text(
        "# Does filtering pay?\n\n"
        f"Written by `{results['command']}` on {results['date']}. One network (job `{JOB}`), "
        f"{len(runs) // len(ARMS)} seeds for each version of the training data; accuracy on "
        "PrivateTest (as much of it as the archive has), mean over the seeds, with 95 % intervals "
        "over seeds and faces.\n\n"
        f"{markdown(arms, arm_columns)}\n"
        "Paired differences, in points of a hundred:\n\n"
        f"{markdown(differences, ('training data', *columns))}\n"
        "![accuracy](accuracy.png)\n\n"
        "## How to read it\n\n"
        f"- The last column is the honest one. {results['copied']['unfiltered']:,} of the "
        f"{faces['all']:,} test faces have an exact or near copy (by the audit's clusters) in the "
        "unfiltered training data: a network trained on it has seen them, mostly with their "
        f"label. The cascade leaves {results['copied']['cascade']:,} of them in training, the "
        f"audit {results['copied']['audited']:,}.\n"
        "- *unfiltered*: everything that can be decoded and has a label. *cascade*: of that, the "
        "training images in which OpenCV's frontal Haar cascade finds a face. *audited*: what "
        "`filter` and `split` leave with the project's params.yaml.\n"
        "- Equal compute: the same number of gradient steps, to the nearest whole epoch of the "
        "arm, on the same schedule; smaller sets are seen more often.\n"
        "- All are chosen on (the best epoch) and tested on the same faces, unfiltered, whatever "
        "their own filter says: every readable PublicTest and PrivateTest face of the archive. "
        "Nothing was chosen on test.\n"
        "- Intervals: pigeonhole bootstrap (Owen 2007) that draws seeds and faces, copies of one "
        "face together. So few seeds tell little of how much seeds differ.\n\n"
        f"## Every training\n\n{markdown(each, each_columns)}\n"
        "## Where\n\n"
        + "".join(f"- {name}: {value}\n" for name, value in results["machine"].items())
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the arms' accuracies with their intervals, and each seed as a dot."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5))
    places = np.arange(len(ARMS))
    for offset, (name, count) in zip((-0.12, 0.12), results["faces"].items(), strict=True):
        figures = [results["arms"][arm][name] for arm in ARMS]
        mean = np.array([100 * each["mean"] for each in figures])
        bounds = np.array([[100 * bound for bound in each["ci95"]] for each in figures]).T
        label = f"{name.replace('_', ' ')} (n = {count:,})"
        error = np.abs(bounds - mean)
        axis.errorbar(places + offset, mean, error, fmt="o", capsize=4, label=label)
        for row in results["runs"]:
            place = ARMS.index(row["arm"]) + offset + 0.06
            axis.plot(place, 100 * row[f"test_{name}"], ".", color="grey", markersize=4)
    axis.set_xticks(places, ARMS)
    axis.set(ylabel="test accuracy, %", xlim=(-0.5, len(ARMS) - 0.5))
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8, title="test faces")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _percent(figures: dict[str, Any]) -> str:
    low, high = figures["ci95"]
    return f"{figures['mean']:.2%} ({low:.2%} – {high:.2%})"


def _points(figures: dict[str, Any]) -> str:
    mean, low, high = (100 * value for value in (figures["mean"], *figures["ci95"]))
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


if __name__ == "__main__":
    run(main)
