from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from pipelines.params import load_params
from pipelines.sweep import best_trial, make_plan, next_trial, open_study, suggest
from pipelines.trial import train_trial

TRIALS = 7


@pytest.fixture
def searched(searchable: Path) -> optuna.Study:
    """Trials in this process, one after the other, as `flows.sweep` would have run them."""
    plan = make_plan("emotion-plain", load_params())
    study = open_study(plan)
    for _ in range(TRIALS):
        train_trial(plan, next_trial(plan, study))
    return study


def test_the_search_finds_better_and_stops_what_is_bad(
    searched: optuna.Study, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan("emotion-plain", load_params())
    states = [trial.state for trial in searched.trials]
    assert len(states) == TRIALS and set(states) == {TrialState.COMPLETE, TrialState.PRUNED}
    # The job's own learning rate is far too low; the task is easy.
    first, best = searched.trials[0], best_trial(searched)
    assert best is not None and first.value is not None and best.value is not None
    assert best.value > first.value + 0.2
    assert suggest(best, plan.ranges)["learning_rate"] > 1e-3
    for trial in searched.trials:
        rows = trial.user_attrs["history"]
        reported = {epoch + 1: row["val_accuracy"] for epoch, row in enumerate(rows)}
        assert trial.intermediate_values == reported
        complete = trial.state == TrialState.COMPLETE
        assert len(rows) == 4 if complete else len(rows) < 4
        if complete:  # judged by its best epoch
            assert trial.value == max(reported.values())

    # One that was told already is not trained again.
    capsys.readouterr()
    train_trial(plan, 0)
    assert capsys.readouterr().out == ""
