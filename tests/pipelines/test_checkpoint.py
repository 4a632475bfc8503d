import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import checkpoint
from pipelines.checkpoint import adopt, break_down, changes_of, forget, saved, saved_history
from pipelines.job import Job, Teacher, plain

JOB = Job(
    task="emotion",
    model="small",
    loss="cross_entropy",
    optimizer="sgd",
    learning_rate=0.1,
    epochs=5,
    batch=16,
    seed=7,
    frozen_epochs=1,
    fine_tune_rate=0.01,
    teachers=(Teacher("runs/emotion/vgg/model.keras", "0" * 64),),
)
HISTORY = [{"loss": 2.0}, {"loss": 1.0}]
GENTLER = {
    "learning_rate": 0.05,
    "fine_tune_rate": 0.005,
    "clip_norm": 1.0,
    "precision": "mixed_bfloat16",
    "batch": 8,
}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """What two epochs of the job leave."""
    for name in ("epoch-0002.weights.h5", checkpoint.BEST):
        (tmp_path / name).touch()
    checkpoint.write_state(JOB, "epoch-0002.weights.h5", HISTORY, [], tmp_path)
    return tmp_path


def test_a_job_goes_on_from_its_own_state(kept: Path) -> None:
    assert saved_history(JOB, kept) == HISTORY
    adopt(JOB, kept)
    assert saved(JOB, kept)["weights"] == "epoch-0002.weights.h5" and changes_of(kept) == []
    forget(kept)
    assert saved(JOB, kept) == {} == saved(JOB, kept / "not there")


def test_its_teachers_may_lie_elsewhere(kept: Path) -> None:
    """By their sums they are known."""
    moved = replace(JOB, teachers=(Teacher("vgg.keras", "0" * 64),))
    other = replace(JOB, teachers=(Teacher("runs/emotion/vgg/model.keras", "1" * 64),))
    assert saved(moved, kept) and not saved(other, kept)


@pytest.mark.parametrize("change", [{name: value} for name, value in GENTLER.items()])
def test_a_gentler_job_goes_on_where_one_broke_down_and_only_there(
    change: dict[str, Any], kept: Path
) -> None:
    job = replace(JOB, **change)
    assert saved(job, kept) == {}
    said = break_down(kept)
    assert f"after epoch 2 is kept in {kept}" in said and next(iter(change)) in said
    assert saved_history(job, kept) == HISTORY == saved_history(JOB, kept)
    assert saved(replace(job, seed=8), kept) == {} == saved(replace(JOB, dropout=0.1), kept)
    adopt(job, kept)
    (name,) = change
    assert changes_of(kept) == [f"after epoch 2: {name} {getattr(JOB, name)} → {change[name]}"]
    assert json.loads((kept / "state.json").read_text())["job"] == plain(job)
    checkpoint.mend(kept)
    assert saved(job, kept) and saved(JOB, kept) == {}


def test_what_was_changed_twice_is_noted_twice(kept: Path) -> None:
    break_down(kept)
    adopt(replace(JOB, **GENTLER), kept)
    adopt(replace(JOB, **GENTLER | {"batch": 4}), kept)
    first, second = changes_of(kept)
    assert first.count("→") == len(GENTLER) and second == "after epoch 2: batch 8 → 4"


def test_the_state_of_an_older_version_is_still_its_jobs(kept: Path) -> None:
    """As files have it that know nothing of what was added since."""
    state = json.loads((kept / "state.json").read_text())
    del state["changes"], state["job"]["weights_sha256"]
    (kept / "state.json").write_text(json.dumps(state))
    assert saved_history(JOB, kept) == HISTORY and changes_of(kept) == []
    state["job"]["drop"] = state["job"].pop("dropout")
    (kept / "state.json").write_text(json.dumps(state))
    assert saved(JOB, kept) == {}


@pytest.mark.parametrize("gone", ["epoch-0002.weights.h5", checkpoint.BEST])
def test_half_a_state_is_none(gone: str, kept: Path) -> None:
    (kept / gone).unlink()
    assert saved(JOB, kept) == {}


def test_nothing_is_kept_of_a_first_epoch(tmp_path: Path) -> None:
    assert break_down(tmp_path / "not there") == "No epoch had ended yet."
