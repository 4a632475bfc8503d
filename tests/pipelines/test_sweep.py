import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import optuna
import pytest
import yaml
from optuna.trial import TrialState

from pipelines.cli import GrimaceError
from pipelines.params import load_params
from pipelines.shards import version_of
from pipelines.sweep import (
    Plan,
    apply,
    draw,
    make_plan,
    next_trial,
    open_study,
    record,
    suggest,
    table,
    take_over,
    threads,
    trial_of,
    with_job,
    write_best,
)

ROOT = Path(__file__).parents[2]
SHARDS = Path("data/augment/emotion")
pytestmark = pytest.mark.usefixtures("searchable")


def plan(**changes: Any) -> Plan:
    """The plan for the file as it is, some dotted keys changed."""
    raw = yaml.safe_load(Path("params.yaml").read_text())
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = raw
        for part in parents:
            place = place[part]
        place[last] = value
    Path("params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return make_plan("emotion-plain", load_params())


def trained(plan: Plan, study: optuna.Study, *accuracies: float) -> int:
    """Stands in for a trial's training: its figures, and that it came to its end."""
    number = next_trial(plan, study)
    trial = trial_of(study, number)
    rows = [{"loss": 1.0, "val_accuracy": accuracy} for accuracy in accuracies]
    trial.set_user_attr("history", rows)
    for epoch, accuracy in enumerate(accuracies):
        trial.report(accuracy, epoch + 1)
    study.tell(number, max(accuracies))
    return number


def tried(plan: Plan, study: optuna.Study) -> list[dict[str, Any]]:
    return [suggest(trial, plan.ranges) for trial in study.trials]


# what a search is about


def test_a_plan_is_the_job_on_fewer_epochs_and_can_be_written_down() -> None:
    found = plan()
    assert (found.dataset, found.metric, found.higher_is_better) == (
        "synthetic",
        "val_accuracy",
        True,
    )
    assert found.epochs == 4
    assert found.params.train.jobs["emotion-plain"].epochs == 4
    assert Plan.model_validate_json(found.model_dump_json()) == found


def test_the_search_for_landmarks_is_for_the_smaller_error() -> None:
    Path("data/augment/landmarks").mkdir()
    meta = Path("data/augment/emotion/meta.json").read_text()
    Path("data/augment/landmarks/meta.json").write_text(meta)
    plan(**{"sweep.jobs.landmarks-plain": {"dropout": {"low": 0, "high": 0.5}}})
    found = make_plan("landmarks-plain", load_params())
    assert (found.metric, found.higher_is_better) == ("val_nme", False)
    study = open_study(found)
    for error in (0.3, 0.1, 0.2):
        trained(found, study, error)
    assert study.best_trial.number == 1


def test_mistakes_are_told() -> None:
    params = load_params()
    with pytest.raises(GrimaceError, match=r"train\.jobs .* no 'emotion-plane' \(did you mean"):
        make_plan("emotion-plane", params)
    with pytest.raises(GrimaceError, match=r"sweep\.jobs .* no 'emotion-compact'.*emotion-plain"):
        make_plan("emotion-compact", params)
    with pytest.raises(GrimaceError, match="cannot be so: dropout: input should be less than 1"):
        with_job(params, "emotion-plain", {"dropout": 1.5})
    with pytest.raises(GrimaceError, match="'macro_f1' is not measured after every epoch"):
        plan(**{"select.emotion.metric": "macro_f1"})
    Path("data/augment/emotion/meta.json").unlink()
    with pytest.raises(GrimaceError, match="data/augment/emotion holds no shards"):
        make_plan("emotion-plain", params)


def test_what_would_not_compare_is_another_study() -> None:
    job, studies = "train.jobs.emotion-plain", [plan().study]
    # What is searched starts elsewhere, but comes to the same.
    assert plan(**{f"{job}.learning_rate": 0.02, f"{job}.batch": 12}).study == studies[0]
    studies.append(plan(**{f"{job}.dropout": 0.1}).study)
    studies.append(plan(**{"sweep.jobs.emotion-plain.batch": {"choices": [8, 16]}}).study)
    studies.append(plan(**{"sweep.epochs": 0.25}).study)
    emotions = np.load(SHARDS / "train/emotions.npy")
    np.save(SHARDS / "train/emotions.npy", emotions[::-1])
    studies.append(plan().study)
    assert studies[-1].startswith(f"emotion-plain-{version_of(SHARDS)[:8]}-")
    assert len(set(studies)) == 5


# what is tried


def test_the_first_trial_is_the_job_as_it_is_and_the_others_keep_to_the_ranges() -> None:
    what = plan()
    study = open_study(what)
    for number in range(12):
        assert trained(what, study, number / 100) == number
    first, *others = tried(what, study)
    assert first == {"learning_rate": 1e-5, "widths": [4], "batch": 8}
    assert {str(values["widths"]) for values in others} == {"[4]", "[8]"}
    assert {values["batch"] for values in others} <= {8, 12, 16}
    assert all(1e-6 <= values["learning_rate"] <= 0.3 for values in others)
    assert len({values["learning_rate"] for values in others}) == 11
    for values in others:  # and can be trained
        assert values["learning_rate"] == float(f"{values['learning_rate']:.4g}")
        job = with_job(what.params, "emotion-plain", values).train.jobs["emotion-plain"]
        assert job.widths == tuple(values["widths"])


def test_a_job_outside_its_ranges_is_not_tried_itself() -> None:
    what = plan(**{"train.jobs.emotion-plain.batch": 10})
    study = open_study(what)
    next_trial(what, study)
    assert tried(what, study)[0]["batch"] in (8, 12, 16)


def test_a_search_that_was_interrupted_goes_on_as_it_would_have() -> None:
    what = plan()
    whole = open_study(what)
    for number in range(8):
        trained(what, whole, number / 10)
    expected = tried(what, whole)
    Path("sweeps/emotion-plain/study.db").unlink()
    for number in range(8):
        trained(what, open_study(what), number / 10)
    assert tried(what, open_study(what)) == expected


# what comes out


def test_the_best_values_go_into_params_and_nothing_else_changes() -> None:
    text = (ROOT / "params.yaml").read_text()
    lines = text.splitlines()
    assert sum("#" in line for line in lines) > 20
    Path("params.yaml").write_text(text)
    values = {"learning_rate": 1.25e-05, "widths": [8, 16], "optimizer": "adamw", "batch": 32}
    overlay = {"train": {"jobs": {"emotion-plain": {"by_dataset": {"synthetic": values}}}}}
    Path("best.yaml").write_text(yaml.safe_dump(overlay, sort_keys=False))
    changed = apply(Path("best.yaml"))
    place = "train.jobs.emotion-plain.by_dataset.synthetic"
    assert changed == {f"{place}.{field}": value for field, value in values.items()}
    after = Path("params.yaml").read_text().splitlines()
    assert len(after) == len(lines)
    (new,) = [after[i] for i in range(len(lines)) if after[i] != lines[i]]
    told = "learning_rate: 1.25e-05, widths: [8, 16], optimizer: adamw, batch: 32"
    assert new.strip() == "by_dataset: {synthetic: {epochs: 12, " + told + "}}"
    job = load_params().train.jobs["emotion-plain"]
    drawn, real = job.at("synthetic"), job.at("fer2013")
    assert (drawn.learning_rate, drawn.widths, drawn.batch) == (1.25e-05, (8, 16), 32)
    assert (real.learning_rate, real.batch, real.epochs) == (0.05, 64, 15)


@pytest.mark.parametrize(
    ("job", "value", "said"),
    [
        (
            "emotion-plain",
            1.5,
            r"params\.yaml would not .*: train\.jobs\.emotion-plain: .*dropout: ",
        ),
        ("emotion-gone", 0.1, "for the job emotion-gone, which params.yaml does not have"),
    ],
)
def test_params_stay_as_they_are_where_the_values_do_not_fit(
    job: str, value: float, said: str
) -> None:
    before = Path("params.yaml").read_bytes()
    overlay = {"train": {"jobs": {job: {"by_dataset": {"synthetic": {"dropout": value}}}}}}
    Path("best.yaml").write_text(yaml.safe_dump(overlay))
    with pytest.raises(GrimaceError, match=said):
        apply(Path("best.yaml"))
    assert Path("params.yaml").read_bytes() == before
    assert not list(Path().glob(".params*"))


def test_there_is_nothing_to_apply_before_a_search() -> None:
    with pytest.raises(GrimaceError, match=r"no sweeps/x/best\.yaml; search first"):
        apply(Path("sweeps/x/best.yaml"))


def test_the_command_for_dvc_sets_the_same_values() -> None:
    from dvc.utils.hydra import apply_overrides

    values = {"learning_rate": 1e-05, "widths": [8, 16], "optimizer": "adamw", "batch": 32}
    command = take_over("emotion-plain", "fer2013", values).splitlines()[1]
    words = [word.strip("'") for word in command.partition("dvc exp run ")[2].split(" ")]
    assert words[::2] == ["-S"] * 4
    overlay = {"train": {"jobs": {"emotion-plain": {"by_dataset": {"fer2013": values}}}}}
    Path("best.yaml").write_text(yaml.safe_dump(overlay))
    before = Path("params.yaml").read_bytes()
    apply(Path("best.yaml"))
    applied = load_params()
    Path("params.yaml").write_bytes(before)
    assert load_params() != applied
    apply_overrides("params.yaml", words[1::2])
    assert load_params() == applied


def test_the_overlay_says_what_it_stands_for() -> None:
    what = plan()
    study = open_study(what)
    for accuracies in ([0.2, 0.3], [0.5, 0.4], [0.1, 0.2]):
        trained(what, study, *accuracies)
    said = write_best(what, study)
    assert "val_accuracy 0.5000 in trial 1 of 3, 0.3000 with the values that the job had" in said
    text = Path("sweeps/emotion-plain/best.yaml").read_text()
    assert text.startswith(f"# Study {what.study}, 4 epochs a trial: val_accuracy 0.5000")
    best = tried(what, study)[1]
    found = {"by_dataset": {"synthetic": best}}
    assert yaml.safe_load(text) == {"train": {"jobs": {"emotion-plain": found}}}
    rows = json.loads(Path("sweeps/emotion-plain/trials.json").read_text())
    assert rows == table(what, study)
    assert [row["val_accuracy"] for row in rows] == [0.3, 0.5, 0.2]
    assert rows[1]["learning_rate"] == best["learning_rate"] and rows[1]["epochs"] == 2
    draw(what, study)
    for name in ("history", "parallel", "epochs", "importance"):
        picture = Path(f"sweeps/emotion-plain/{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")


# MLflow


@pytest.fixture
def runs() -> Callable[[], dict[str, mlflow.entities.Run]]:
    def runs() -> dict[str, mlflow.entities.Run]:
        client = mlflow.MlflowClient(load_params().tracking.uri)
        experiment = client.get_experiment_by_name("grimace-emotion")
        found = client.search_runs([experiment.experiment_id])
        assert len({run.info.run_name for run in found}) == len(found)
        return {run.info.run_name: run for run in found}

    return runs


def test_mlflow_has_a_run_for_the_study_and_one_within_for_each_trial(
    runs: Callable[[], dict[str, mlflow.entities.Run]],
) -> None:
    before = mlflow.get_tracking_uri()
    what = plan()
    study = open_study(what)
    trained(what, study, 0.2, 0.3)
    pruned, failed, running = (next_trial(what, study) for _ in range(3))
    history = [{"loss": 1.0, "val_accuracy": 0.1}]
    for number in (pruned, running):
        trial_of(study, number).set_user_attr("history", history)
        trial_of(study, number).report(0.1, 1)
    study.tell(pruned, state=TrialState.PRUNED)
    trial_of(study, failed).set_user_attr("reason", "no such face")
    study.tell(failed, state=TrialState.FAIL)
    for _ in range(2):  # the second time there is nothing to add
        record(what, study)
    found = runs()
    parent = found.pop("sweep of emotion-plain on synthetic")
    assert parent.info.status == "RUNNING" and parent.data.metrics == {"best_val_accuracy": 0.3}
    assert len(found) == 4
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent.info.run_id}
    trials = [found[f"emotion-plain trial {number}"] for number in range(4)]
    assert [run.info.status for run in trials] == ["FINISHED", "KILLED", "FAILED", "RUNNING"]
    states = [run.data.tags["grimace.state"] for run in trials]
    assert states == ["complete", "pruned", "failed", "running"]
    assert trials[2].data.tags["grimace.reason"] == "no such face"
    for run, values in zip(trials, tried(what, study), strict=True):
        assert run.data.params["learning_rate"] == str(values["learning_rate"])
        assert run.data.params["widths"] == str(values["widths"])
        assert run.data.params["epochs"] == "4" and run.data.params["dropout"] == "0.3"
    client = mlflow.MlflowClient(load_params().tracking.uri)

    def figures(run: mlflow.entities.Run) -> list[tuple[int, float]]:
        logged = client.get_metric_history(run.info.run_id, "val_accuracy")
        return [(metric.step, metric.value) for metric in logged]

    assert figures(trials[0]) == [(0, 0.2), (1, 0.3)]
    assert figures(trials[3]) == [(0, 0.1)]

    # Later, in another process: the same runs go on.
    trial_of(study, running).set_user_attr("history", [*history, {"loss": 1, "val_accuracy": 0.6}])
    trial_of(study, running).report(0.6, 2)
    study.tell(running, 0.6)
    write_best(what, study)
    record(what, open_study(what), finished=True)
    found = runs()
    assert len(found) == 5
    parent = found["sweep of emotion-plain on synthetic"]
    assert parent.info.status == "FINISHED" and parent.data.metrics["best_val_accuracy"] == 0.6
    assert parent.data.tags["grimace.best.trial"] == str(running)
    ended = found[f"emotion-plain trial {running}"]
    assert ended.info.status == "FINISHED" and figures(ended) == [(0, 0.1), (1, 0.6)]
    kept = {file.path for file in client.list_artifacts(parent.info.run_id, "sweep")}
    assert kept == {"sweep/best.yaml", "sweep/trials.json"}
    mlflow.set_tracking_uri(before)


def test_trials_side_by_side_share_the_cores() -> None:
    assert threads(1) == {}
    cores = len(os.sched_getaffinity(0))
    assert threads(cores)["TF_NUM_INTRAOP_THREADS"] == "1"
    assert threads(2 * cores)["OMP_NUM_THREADS"] == "1"
