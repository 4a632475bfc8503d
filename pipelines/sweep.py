"""The search for better parameters of one training job: an Optuna study, and what is made of it.

A study is told by its name from every other that would not compare with it: of another job, other
data, other ranges or other settings of the job. It lives in `sweeps/JOB/study.db`. Each trial is
trained by `pipelines.trial` in a process of its own, on a share of the job's epochs, and judged
by its best epoch on validation. `flows.sweep` runs the trials; nothing here trains.
"""

import hashlib
import json
import math
import os
import shlex
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import yaml
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import BaseModel, ConfigDict

from pipelines import tracking
from pipelines.cli import GrimaceError
from pipelines.params import (
    Params,
    Range,
    TaskName,
    edit_params,
    meant,
    number_type,
    varied,
)
from pipelines.shards import read_meta, version_of

if TYPE_CHECKING:
    import mlflow

# What training measures after every epoch, by the name that `evaluate` and `select` have for it.
BY_EPOCH = {"accuracy": "val_accuracy", "nme_interocular": "val_nme"}
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}
# What MLflow knows that is nearest.
RUN_STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
# Several processes write the study's file; each waits so long for the others.
BUSY_SECONDS = 120


class Plan(BaseModel):
    """What a study is about; all that a trial needs to know beside its number.

    Attributes:
        job: its name under `train.jobs`.
        params: with the job as trials train it: as it is, but for fewer epochs.
        dataset: that the shards were made of.
        shards: the folder that `augment` wrote.
        metric: by which an epoch is judged, a column of the training's history.
        study: the name of the study.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: str
    params: Params
    dataset: str
    shards: Path
    metric: str
    study: str

    @property
    def task(self) -> TaskName:
        """The job's task."""
        return self.params.train.jobs[self.job].task

    @property
    def higher_is_better(self) -> bool:
        """Which way the metric goes."""
        return self.params.select.named(self.task).higher_is_better

    @property
    def epochs(self) -> int:
        """How long a trial trains."""
        return self.params.train.jobs[self.job].epochs

    @property
    def ranges(self) -> dict[str, Range]:
        """What is tried, by field."""
        return self.params.sweep.jobs[self.job]

    @property
    def folder(self) -> Path:
        """Where the studies of this job are, and what came out of the latest."""
        return Path("sweeps", self.job)

    @property
    def file(self) -> Path:
        """Where this plan is written down for the trials."""
        return self.folder / self.study / "plan.json"

    def trial_folder(self, number: int) -> Path:
        """Where a trial works; gone when it is done."""
        return self.folder / self.study / f"{number:04d}"


def make_plan(job: str, params: Params) -> Plan:
    """Decide what a search for one job is about.

    Raises:
        GrimaceError: there is no such job, no ranges for it, no shards, or candidates are
            selected by what is not measured after every epoch.
    """
    if job not in params.sweep.jobs:
        what = "sweep" if job in params.train.jobs else "train"
        known = params.sweep.jobs if job in params.train.jobs else params.train.jobs
        raise GrimaceError(
            f"{what}.jobs of params.yaml has no {job!r}{meant(job, known)}; "
            f"it has {', '.join(known) or 'nothing'}"
        )
    settings = params.train.jobs[job]
    shards = Path("data/augment", settings.task)
    meta = read_meta(shards)
    decides = params.select.named(settings.task)
    if decides.metric not in BY_EPOCH:
        raise GrimaceError(
            f"select.{settings.task}.metric of params.yaml: {decides.metric!r} is not measured "
            f"after every epoch, so it cannot lead a search; {' and '.join(BY_EPOCH)} are"
        )
    own, overridden = settings.at(meta["dataset"]), settings.by_dataset.get(meta["dataset"], {})
    epochs = max(1, round(own.epochs * params.sweep.epochs))
    trained = with_job(params, job, {**overridden, "epochs": epochs, "by_dataset": {}})
    ranges = params.sweep.jobs[job]
    kept = trained.train.jobs[job].model_dump(mode="json", exclude=set(ranges))
    sweep = params.sweep.model_dump(mode="json", exclude={"jobs"})
    tried = {field: tried.model_dump(mode="json") for field, tried in ranges.items()}
    version = version_of(shards)
    digest = _digest([kept, sweep, tried, decides.model_dump(), meta, version])
    return Plan(
        job=job,
        params=trained,
        dataset=meta["dataset"],
        shards=shards,
        metric=BY_EPOCH[decides.metric],
        study=f"{job}-{version[:8]}-{digest}",
    )


def with_job(params: Params, name: str, values: Mapping[str, Any]) -> Params:
    """Return the parameters with other values for some fields of a job.

    Raises:
        GrimaceError: the job cannot have such values.
    """
    try:
        job = varied(params.train.jobs[name], values)
    except ValueError as error:
        raise GrimaceError(f"train.jobs.{name} cannot be so: {error}") from None
    train = params.train.model_copy(update={"jobs": {**params.train.jobs, name: job}})
    return params.model_copy(update={"train": train})


def open_study(plan: Plan) -> optuna.Study:
    """Open the plan's study, which is empty the first time."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    plan.file.parent.mkdir(parents=True, exist_ok=True)
    return optuna.create_study(
        study_name=plan.study,
        storage=optuna.storages.RDBStorage(
            f"sqlite:///{plan.folder / 'study.db'}",
            engine_kwargs={"connect_args": {"timeout": BUSY_SECONDS}},
        ),
        direction="maximize" if plan.higher_is_better else "minimize",
        pruner=optuna.pruners.MedianPruner(
            n_startup_trials=plan.params.sweep.startup,
            n_warmup_steps=max(1, math.ceil(plan.params.sweep.warm_up * plan.epochs)),
        ),
        load_if_exists=True,
    )


def next_trial(plan: Plan, study: optuna.Study) -> int:
    """Settle what to try next, and return the number of the trial.

    The first is the job as it is, where that is within the ranges. What a trial draws follows
    from the seed, its number and the trials done, so an interrupted search goes on as it would
    have; a sampler seeded once would start its draws over. (Killed in the very moment of a draw,
    half a trial is there: `sampler_of` draws the other half, and not as it would have been.)
    """
    if not study.trials and (own := own_values(plan)) is not None:
        study.enqueue_trial(own, user_attrs={"own": True})
    study.sampler = sampler_of(plan, len(asked_trials(study)))
    trial = study.ask()
    suggest(trial, plan.ranges)
    return trial.number


def sampler_of(plan: Plan, number: int) -> TPESampler:
    """Return what draws the values of a trial."""
    return TPESampler(
        n_startup_trials=plan.params.sweep.startup,
        seed=int(_digest([plan.params.sweep.seed, number]), 16),
    )


def trial_of(study: optuna.Study, number: int) -> Trial:
    """Return a trial that was asked for earlier, perhaps in another process."""
    return Trial(study, study.trials[number]._trial_id)


def asked_trials(study: optuna.Study) -> list[FrozenTrial]:
    """All trials of a study that were begun."""
    return [trial for trial in study.trials if trial.state != TrialState.WAITING]


def suggest(trial: Trial | FrozenTrial, ranges: Mapping[str, Range]) -> dict[str, Any]:
    """Return a trial's values by field, drawn now where they were not drawn before.

    Fractions have four significant digits, so that what is trained is what is printed.
    """
    return {field: _suggested(trial, field, tried) for field, tried in ranges.items()}


def _suggested(trial: Trial | FrozenTrial, field: str, tried: Range) -> Any:
    if tried.choices is not None:
        by_label = {_label(value): value for value in tried.choices}
        return by_label[trial.suggest_categorical(field, list(by_label))]
    assert tried.low is not None and tried.high is not None
    if number_type(field) is int:
        step = int(tried.step or 1)
        return trial.suggest_int(field, int(tried.low), int(tried.high), step=step, log=tried.log)
    drawn = trial.suggest_float(field, tried.low, tried.high, step=tried.step, log=tried.log)
    return min(max(float(f"{drawn:.{12 if tried.step else 4}g}"), tried.low), tried.high)


def _label(value: Any) -> Any:
    """What Optuna stores of a choice: itself where it is plain, else its JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def own_values(plan: Plan) -> dict[str, Any] | None:
    """Return the job's own values as Optuna stores them, None where one is outside its range."""
    own = plan.params.train.jobs[plan.job].model_dump(mode="json")
    values = {field: _label(own[field]) for field in plan.ranges}
    return values if all(_holds(plan.ranges[name], values[name]) for name in values) else None


def _holds(tried: Range, value: Any) -> bool:
    if tried.choices is not None:
        return value in [_label(choice) for choice in tried.choices]
    assert tried.low is not None and tried.high is not None
    if not isinstance(value, int | float) or not tried.low <= value <= tried.high:
        return False
    steps = (value - tried.low) / (tried.step or 1)
    return tried.step is None or math.isclose(steps, round(steps), abs_tol=1e-9)


def table(plan: Plan, study: optuna.Study) -> list[dict[str, Any]]:
    """Return one row a trial: its state, value (best epoch), epochs, seconds and values."""
    return [
        {
            "trial": trial.number,
            "state": STATES[trial.state],
            plan.metric: best_of(plan, trial),
            "epochs": len(trial.intermediate_values),
            "seconds": trial.duration and round(trial.duration.total_seconds()),
            **suggest(trial, plan.ranges),
            "reason": trial.user_attrs.get("reason", ""),
        }
        for trial in asked_trials(study)
        if trial.params.keys() == plan.ranges.keys()
    ]


def best_of(plan: Plan, trial: FrozenTrial) -> float | None:
    """Return what the best epoch of a trial reached so far."""
    values = trial.intermediate_values.values()
    return (max if plan.higher_is_better else min)(values, default=None)


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """Return the best trial that trained to its end."""
    done = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    return study.best_trial if done else None


# What is made of a study


def write_best(plan: Plan, study: optuna.Study) -> str:
    """Write `best.yaml`, an overlay of params.yaml; return how to take it over, for people.

    `trials.json`, a row a trial, is written beside it.
    """
    best = best_trial(study)
    assert best is not None
    values = suggest(best, plan.ranges)
    rows = table(plan, study)
    said = f"{plan.metric} {best.value:.4f} in trial {best.number} of {len(rows)}"
    first = study.trials[0]
    if first.user_attrs.get("own") and first.state == TrialState.COMPLETE and best.number:
        said += f", {first.value:.4f} with the values that the job had before"
    commands = take_over(plan.job, plan.dataset, values)
    header = f"Study {plan.study}, {plan.epochs} epochs a trial: {said}.\n{commands}"
    text = "".join(f"# {line}\n" for line in header.splitlines())
    overlay = {"train": {"jobs": {plan.job: {"by_dataset": {plan.dataset: values}}}}}
    (plan.folder / "best.yaml").write_text(text + yaml.safe_dump(overlay, sort_keys=False))
    (plan.folder / "trials.json").write_text(json.dumps(rows, indent=1) + "\n")
    return f"best: {said}\n{commands}"


def take_over(job: str, dataset: str, values: Mapping[str, Any]) -> str:
    """Return the two commands that train with a search's values on its dataset, one a line."""
    place = f"train.jobs.{job}.by_dataset.{dataset}"
    settings = [f"{place}.{field}={_hydra(value)}" for field, value in values.items()]
    overrides = " ".join(f"-S {shlex.quote('++' + setting)}" for setting in settings)
    return (
        f"into params.yaml: uv run python -m flows.sweep --job {job} --apply\n"
        f"as an experiment: uv run dvc exp run {overrides}"
    )


def _hydra(value: Any) -> str:
    """A value as DVC's `-S` takes it (Hydra's override grammar)."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_hydra(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_hydra, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def apply(overlay: Path, target: Path = Path("params.yaml")) -> dict[str, Any]:
    """Write the values of an overlay into params.yaml, and leave the rest of the text as it is.

    Returns:
        What was set, by dotted key.

    Raises:
        GrimaceError: there is no such overlay, or params.yaml would not be valid with it; then
            it stays as it was.
    """
    from ruamel.yaml.comments import CommentedSeq

    if not overlay.exists():
        raise GrimaceError(f"there is no {overlay}; search first")
    changed = {}

    def change(text: Any) -> None:
        for job, values in yaml.safe_load(overlay.read_text())["train"]["jobs"].items():
            if job not in text["train"]["jobs"]:
                raise GrimaceError(f"{overlay} is for the job {job}, which {target} does not have")
            by_dataset = text["train"]["jobs"][job].setdefault("by_dataset", {})
            for dataset, own in values["by_dataset"].items():
                place = by_dataset.setdefault(dataset, {})
                for field, value in own.items():
                    changed[f"train.jobs.{job}.by_dataset.{dataset}.{field}"] = value
                    place[field] = value
                    if isinstance(value, list):  # on one line
                        place[field] = listed = CommentedSeq(value)
                        listed.fa.set_flow_style()

    edit_params(change, target)
    return changed


def draw(plan: Plan, study: optuna.Study) -> None:
    """Plot how the search went, by Optuna's own plots, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as plots

    name = plan.metric
    kinds: dict[str, Callable[[optuna.Study], object]] = {
        "history": partial(plots.plot_optimization_history, target_name=name),
        "parallel": partial(plots.plot_parallel_coordinate, target_name=name),
        "epochs": plots.plot_intermediate_values,
        "importance": partial(plots.plot_param_importances, target_name=name),
    }
    reached = [trial.value for trial in study.trials if trial.state == TrialState.COMPLETE]
    if len(set(reached)) < 2:  # nothing varied that could have been important
        del kinds["importance"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib plots are "experimental"
        for kind, plot in kinds.items():
            plot(study)
            plt.gcf().set_size_inches(9, 5)
            plt.savefig(plan.folder / f"{kind}.png", bbox_inches="tight")
            plt.close("all")


# MLflow


def record(plan: Plan, study: optuna.Study, finished: bool = False) -> None:
    """Bring MLflow up to date: one run for the study, and within it one for each trial.

    Writes what is missing there and no more, so it may be called at any time: while trials run,
    after a tracking server was away, or again after a kill.

    Args:
        plan: what the study is about.
        study: what it has come to.
        finished: whether nothing runs any more; the study's own run is closed then, and gets the
            files that `write_best` left.

    Raises:
        GrimaceError: the tracking store does not answer.
    """
    client = tracking.connect(plan.params.tracking, plan.task)
    experiment = client.get_experiment_by_name(f"grimace-{plan.task}").experiment_id
    tags = {
        "grimace.study": plan.study,
        "grimace.job": plan.job,
        "grimace.task": plan.task,
        "grimace.dataset": plan.dataset,
    }
    known = study.user_attrs.get("mlflow_run")
    (parent,) = client.search_runs([experiment], f"attributes.run_id = '{known}'") or [None]
    if parent is None:  # the first time, or it was deleted, or the store is another
        parent = client.create_run(
            experiment,
            run_name=f"sweep of {plan.job} on {plan.dataset}",
            tags={**tags, **tracking.provenance(plan.shards)},
        )
        study.set_user_attr("mlflow_run", parent.info.run_id)
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([experiment], query, max_results=50_000)
    runs = {run.data.tags["grimace.trial"]: run for run in children}
    if parent.info.status != "RUNNING":
        client.update_run(parent.info.run_id, status="RUNNING")
    for trial in asked_trials(study):
        if trial.params.keys() != plan.ranges.keys():
            continue
        own = {"grimace.trial": str(trial.number), "grimace.state": "running"}
        run = runs.get(str(trial.number)) or client.create_run(
            experiment,
            start_time=_milliseconds(trial.datetime_start),
            run_name=f"{plan.job} trial {trial.number}",
            tags={**tags, **own, "mlflow.parentRunId": parent.info.run_id},
        )
        if run.info.status == "RUNNING":
            _record_trial(plan, trial, run, client)
    best, name = best_trial(study), f"best_{plan.metric}"
    if best and parent.data.metrics.get(name) != best.value:
        client.log_metric(parent.info.run_id, name, best.value, step=best.number)
        for field, value in {"trial": best.number, **suggest(best, plan.ranges)}.items():
            client.set_tag(parent.info.run_id, f"grimace.best.{field}", value)
    if finished:
        for path in sorted(plan.folder.iterdir()):
            if path.suffix in (".png", ".yaml", ".json"):
                client.log_artifact(parent.info.run_id, str(path), "sweep")
        client.set_terminated(parent.info.run_id)


def _record_trial(
    plan: Plan, trial: FrozenTrial, run: "mlflow.entities.Run", client: "mlflow.MlflowClient"
) -> None:
    """Write what MLflow does not have yet of a trial."""
    from mlflow.entities import Metric, Param

    told, now = run.info.run_id, round(time.time() * 1000)
    if not run.data.params:
        job = varied(plan.params.train.jobs[plan.job], suggest(trial, plan.ranges))
        values = job.model_dump(mode="json", exclude={"task", "by_dataset"})
        client.log_batch(told, params=[Param(name, str(value)) for name, value in values.items()])
    known = len(client.get_metric_history(told, plan.metric))
    rows = list(enumerate(trial.user_attrs.get("history", [])))[known:]
    figures = [(name, value, epoch) for epoch, row in rows for name, value in row.items()]
    client.log_batch(told, [Metric(name, value, now, epoch) for name, value, epoch in figures])
    state = STATES[trial.state]
    if state == "running":
        return
    client.set_tag(told, "grimace.state", state)
    if (best := best_of(plan, trial)) is not None:
        client.log_metric(told, f"best_{plan.metric}", best)
    if reason := trial.user_attrs.get("reason"):
        client.set_tag(told, "grimace.reason", reason)
    client.set_terminated(told, RUN_STATUS[state], _milliseconds(trial.datetime_complete))


def _milliseconds(moment: Any) -> int | None:
    return moment and round(moment.timestamp() * 1000)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def threads(parallel: int) -> dict[str, str]:
    """Return the environment that gives each of several trials its share of cores and GPU."""
    if parallel == 1:
        return {}
    cores = str(max(1, len(os.sched_getaffinity(0)) // parallel))
    return {
        "OMP_NUM_THREADS": cores,
        "TF_NUM_INTRAOP_THREADS": cores,
        "TF_NUM_INTEROP_THREADS": cores,
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
