import math
from dataclasses import replace

import numpy as np
import pytest

from pipelines.job import Job
from pipelines.schedules import (
    History,
    best_epoch,
    is_over,
    optimizer_of,
    phase_at,
    plateau_rate,
)

JOB = Job(
    task="emotion",
    model="plain",
    loss="cross_entropy",
    optimizer="sgd",
    learning_rate=0.1,
    epochs=10,
    batch=16,
    seed=7,
)
TWO = replace(JOB, frozen_epochs=4, fine_tune_rate=0.01)


def history(*accuracies: float) -> History:
    return [{"val_accuracy": accuracy} for accuracy in accuracies]


def rates(job: Job, epoch: int, steps: int) -> list[float]:
    """The learning rate of each step of a phase."""
    phase = phase_at(job, epoch)
    optimizer, found = optimizer_of(job, phase, steps), []
    for step in range(steps * (phase.end - phase.first) + 1):
        optimizer.iterations.assign(step)
        found.append(float(optimizer.learning_rate))
    return found


def test_a_cosine_after_a_warm_up() -> None:
    found = rates(JOB, 0, steps=20)
    expected = [0.1 * step / 10 for step in range(10)]
    expected += [0.05 * (1 + math.cos(math.pi * step / 190)) for step in range(191)]
    assert np.allclose(found, expected, atol=1e-7)


def test_each_phase_has_its_own_cosine() -> None:
    assert [phase_at(TWO, epoch).frozen for epoch in range(10)] == [True] * 4 + [False] * 6
    head, rest = rates(TWO, 3, steps=10), rates(TWO, 9, steps=10)
    assert (len(head), len(rest)) == (41, 61)
    assert max(head) == pytest.approx(0.1) and max(rest) == pytest.approx(0.01)
    for found in (head, rest):
        assert found[0] == 0 and found[-1] == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_optimiser_is_the_jobs(name: str) -> None:
    job = replace(
        JOB, optimizer=name, schedule="plateau", weight_decay=0.02, clip_norm=0.5, ema=0.9
    )
    optimizer = optimizer_of(job, phase_at(job, 0), 5)
    assert type(optimizer).__name__.lower() == name
    config = optimizer.get_config()
    for field, value in {
        "learning_rate": 0.1,
        "weight_decay": 0.02,
        "global_clipnorm": 0.5,
        "use_ema": True,
        "ema_momentum": 0.9,
    }.items():
        assert config[field] == pytest.approx(value)


def test_the_rate_falls_when_nothing_is_gained_for_five_epochs() -> None:
    job = replace(JOB, schedule="plateau", epochs=40)
    figures = [0.5, 0.6, *[0.55] * 4, 0.61, *[0.61] * 5, *[0.6] * 5, 0.7]
    found = [plateau_rate(job, history(*figures[:done])) for done in range(len(figures) + 1)]
    expected = [0.1] * 12 + [0.075] * 5 + [0.05625] * 2
    assert found == pytest.approx(expected)


def test_the_rate_of_landmarks_follows_their_error() -> None:
    job = replace(JOB, task="landmarks", loss="wing", schedule="plateau", epochs=40)
    falling = [{"val_nme": 1 / (epoch + 1)} for epoch in range(12)]
    assert plateau_rate(job, falling) == 0.1
    assert plateau_rate(job, falling[::-1]) == pytest.approx(0.1 * 0.75**2)


def test_a_plateau_begins_anew_with_the_second_phase() -> None:
    job = replace(TWO, schedule="plateau", frozen_epochs=7)
    worse = history(*np.linspace(0.9, 0.1, 10))
    assert plateau_rate(job, worse[:6]) == pytest.approx(0.075)
    assert [plateau_rate(job, worse[:done]) for done in (7, 8, 9)] == [0.01] * 3


def test_it_is_over_after_the_last_epoch() -> None:
    assert not is_over(JOB, history(*[0.5] * 9))
    assert is_over(JOB, history(*[0.5] * 10))


def test_it_is_over_when_patience_is() -> None:
    job = replace(JOB, patience=3)
    assert not is_over(job, [])
    assert not is_over(job, history(0.5, 0.6, 0.6, 0.5))
    assert is_over(job, history(0.5, 0.6, 0.6, 0.5, 0.4))
    assert not is_over(job, history(0.5, 0.6, 0.6, 0.5, 0.7))


def test_patience_is_with_the_last_phase_alone() -> None:
    job = replace(TWO, patience=2)
    worse = history(*np.linspace(0.9, 0.1, 10))
    assert [is_over(job, worse[:done]) for done in range(8)] == [False] * 7 + [True]


def test_the_best_epoch_is_the_first_of_the_best() -> None:
    assert best_epoch(history(0.1, 0.4, 0.3, 0.4), "emotion") == 1
    assert best_epoch([{"val_nme": error} for error in (0.3, 0.1, 0.2)], "landmarks") == 1
