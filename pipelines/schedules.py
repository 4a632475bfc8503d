"""How the learning rate goes, when a training is over, and which of its epochs was best.

All of it follows from the job and the history so far, so a resumed training needs no further state.
"""

from dataclasses import dataclass

import keras

from pipelines.job import Job

WARM_UP = 0.05  # share of all steps of a phase
# Khaireddin and Chen 2021, who train VGG on FER-2013 by these.
PLATEAU_FACTOR, PLATEAU_PATIENCE = 0.75, 5

History = list[dict[str, float]]


@dataclass(frozen=True)
class Phase:
    """Epochs `first` to `end` (not included) at a peak `rate`, with the pre-trained part frozen."""

    first: int
    end: int
    rate: float
    frozen: bool


def phase_at(job: Job, epoch: int) -> Phase:
    """Return the phase to which an epoch belongs; most jobs have only one."""
    if epoch < job.frozen_epochs:
        return Phase(0, job.frozen_epochs, job.learning_rate, frozen=True)
    rate = job.learning_rate if job.fine_tune_rate is None else job.fine_tune_rate
    return Phase(job.frozen_epochs, job.epochs, rate, frozen=False)


def optimizer_of(job: Job, phase: Phase, steps: int) -> keras.optimizers.Optimizer:
    """Return a fresh optimiser for one phase.

    Args:
        job: names it and its settings.
        phase: gives the learning rate and, with a cosine (Loshchilov and Hutter 2017), its length.
        steps: of an epoch.
    """
    rate: float | keras.optimizers.schedules.LearningRateSchedule = phase.rate
    if job.schedule == "cosine":
        total = steps * (phase.end - phase.first)
        warm_up = max(1, round(total * WARM_UP))
        rate = keras.optimizers.schedules.CosineDecay(
            0.0, max(1, total - warm_up), warmup_target=phase.rate, warmup_steps=warm_up
        )
    options = {"weight_decay": job.weight_decay, "global_clipnorm": job.clip_norm}
    if job.ema is not None:
        options |= {"use_ema": True, "ema_momentum": job.ema}
    if job.optimizer == "sgd":
        optimizer = keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, **options)
    else:
        optimizer = keras.optimizers.AdamW(rate, **options)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    return optimizer


def plateau_rate(job: Job, history: History) -> float:
    """Return the rate of the epoch after `history` where the schedule is "plateau"."""
    phase = phase_at(job, len(history))
    rate, best, waited = phase.rate, None, 0
    for row in history[phase.first :]:
        figure = _merit(row, job.task)
        if best is None or figure > best:
            best, waited = figure, 0
        else:
            waited += 1
        if waited == PLATEAU_PATIENCE:
            rate, waited = rate * PLATEAU_FACTOR, 0
    return rate


def is_over(job: Job, history: History) -> bool:
    """Say whether all epochs are done, or the job's patience with the last phase is at its end."""
    phase = phase_at(job, len(history))
    since = history[phase.first :]
    if len(history) >= job.epochs:
        return True
    if job.patience is None or phase.frozen or not since:
        return False
    return len(since) - 1 - best_epoch(since, job.task) >= job.patience


def best_epoch(history: History, task: str) -> int:
    """Return the index of the epoch that did best on validation, the first of equals."""
    return max(range(len(history)), key=lambda epoch: _merit(history[epoch], task))


def _merit(row: dict[str, float], task: str) -> float:
    return row["val_accuracy"] if task == "emotion" else -row["val_nme"]
