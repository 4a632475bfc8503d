"""One trial of a search, in a process of its own: train, tell the study each epoch, stop if told.

`flows.sweep` starts it. Killed at any moment, the same command goes on after the last whole epoch.
"""

import argparse
from pathlib import Path

import optuna
from optuna.trial import TrialState

from pipelines.cli import run
from pipelines.sweep import Plan, open_study, sampler_of, suggest, trial_of, with_job


def main() -> None:
    """Train one trial of a study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, required=True, help="sweeps/JOB/STUDY/plan.json")
    parser.add_argument("--number", type=int, required=True, help="of the trial")
    args = parser.parse_args()
    plan = Plan.model_validate_json(args.plan.read_text())
    train_trial(plan, args.number)


def train_trial(plan: Plan, number: int) -> None:
    """Train, and leave in the study the figures of each epoch and how it ended."""
    study = open_study(plan)
    trial = trial_of(study, number)
    if study.trials[number].state != TrialState.RUNNING:
        return
    study.sampler = sampler_of(plan, number)
    values = suggest(trial, plan.ranges)
    print(", ".join(f"{field} {value}" for field, value in values.items()), flush=True)
    from pipelines.fit import fit
    from pipelines.train import resolve

    def on_epoch(epoch: int, row: dict[str, float]) -> None:
        history = trial.user_attrs.get("history", [])
        if epoch < len(history):  # told before a kill
            return
        trial.report(row[plan.metric], step=epoch + 1)
        trial.set_user_attr("history", [*history, row])
        if epoch + 1 < plan.epochs and trial.should_prune():
            raise optuna.TrialPruned

    job = resolve(plan.job, with_job(plan.params, plan.job, values), plan.shards)
    folder = plan.trial_folder(number)
    try:
        fit(job, plan.shards, folder, folder / "checkpoint", on_epoch)
    except optuna.TrialPruned:
        study.tell(number, state=TrialState.PRUNED)
        print("pruned", flush=True)
        return
    reached = study.trials[number].intermediate_values.values()
    study.tell(number, (max if plan.higher_is_better else min)(reached))


if __name__ == "__main__":
    run(main)
