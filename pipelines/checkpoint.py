"""What of a training is kept between its epochs, and which job may go on from it.

A folder with `state.json` (the job, the figures of its epochs, the file with its weights, and what
was changed on the way), that file, and the weights of the best epoch. The standard library is all
this module imports: whoever asks how far a training is needs no Keras.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.job import Job, job_of, plain

BEST = "best.weights.h5"  # of the epoch that did best so far
# What is advised to change when a training breaks down. None of it is in the weights or in the
# optimiser's state, so a job that differs in nothing else can go on from them.
REMEDIES = ("learning_rate", "fine_tune_rate", "clip_norm", "precision", "batch")
_STATE, _BROKE = "state.json", "broke"


def saved(job: Job, checkpoint: Path) -> dict[str, Any]:
    """Return the whole state from which a job goes on, {} where there is none.

    It is the job's own; or, since a training broke down there, that of a job that differs in
    `REMEDIES` alone. A training that was stopped is not continued by another job: what comes of a
    job would depend on what was tried before.
    """
    state = _read(checkpoint)
    if not state or _changed(job, state, (checkpoint / _BROKE).exists()) is None:
        return {}
    if not all((checkpoint / name).exists() for name in (state["weights"], BEST)):
        return {}  # killed while it was being removed
    return state


def saved_history(job: Job, checkpoint: Path) -> list[dict[str, float]]:
    """Return the figures of the epochs from which a job goes on, if any."""
    history: list[dict[str, float]] = saved(job, checkpoint).get("history", [])
    return history


def adopt(job: Job, checkpoint: Path) -> None:
    """Make the state that `saved` returns the job's own, and note in it what is changed."""
    state = _read(checkpoint)
    if changed := _changed(job, state, broke=True):
        note = f"after epoch {len(state['history'])}: {', '.join(changed)}"
        write_state(
            job, state["weights"], state["history"], [*changes_of(checkpoint), note], checkpoint
        )


def changes_of(checkpoint: Path) -> list[str]:
    """Return what was changed on the way, each with the epoch after which it was."""
    found: list[str] = _read(checkpoint).get("changes", [])
    return found


def write_state(
    job: Job, weights: str, history: list[dict[str, float]], changes: list[str], checkpoint: Path
) -> None:
    """Write the state in one step."""
    state = {"job": plain(job), "weights": weights, "history": history, "changes": changes}
    partial = checkpoint / f"{_STATE}.partial"
    partial.write_text(json.dumps(state))
    partial.replace(checkpoint / _STATE)


def mend(checkpoint: Path) -> None:
    """Note that the training has got further since it broke down, if it did."""
    (checkpoint / _BROKE).unlink(missing_ok=True)


def forget(checkpoint: Path) -> None:
    """Make the folder ready for a training from the start, whatever it held."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / _STATE).unlink(missing_ok=True)  # first: its files are about to be overwritten
    mend(checkpoint)


def break_down(checkpoint: Path) -> str:
    """Note that the training broke down, and return what is kept and how to go on."""
    done = len(_read(checkpoint).get("history", []))
    if not done:
        return "No epoch had ended yet."
    (checkpoint / _BROKE).touch()
    return (
        f"The state after epoch {done} is kept in {checkpoint}: the same command goes on from it "
        f"if nothing of the job is changed but {', '.join(REMEDIES[:-1])} or {REMEDIES[-1]}."
    )


def _read(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / _STATE
    state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return state


def _changed(job: Job, state: dict[str, Any], broke: bool) -> list[str] | None:
    """Say in what a job differs from the state's; None where that is more than it may."""
    try:
        other = job_of(state["job"])
        alike = replace(other, **{name: getattr(job, name) for name in REMEDIES}) == job
    except ValueError:  # of another version of the code, or no job
        return None
    if not alike:
        return None
    pairs = {name: (getattr(other, name), getattr(job, name)) for name in REMEDIES}
    changed = [f"{name} {old} → {new}" for name, (old, new) in pairs.items() if old != new]
    return changed if broke or not changed else None
