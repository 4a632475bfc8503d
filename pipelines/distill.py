"""What teachers answer on the training images: asked once, kept in small NumPy files.

Distillation (Hinton et al. 2015): the student learns the averaged answers of trained models beside
the labels; `models.losses` has its loss.
"""

import hashlib
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import keras
import numpy as np

from pipelines.cli import GrimaceError
from pipelines.job import Job, Teacher, read_job, sha256
from pipelines.progress import progress
from pipelines.shards import read_meta, read_view


def teacher_answers(job: Job, shards: Path, folder: Path) -> list[Path]:
    """Ask the job's teachers about every view that the job trains on, unless that was done.

    Killed at any moment, it goes on with the view it was at.

    Args:
        job: names the teachers.
        shards: a folder as `pipelines.shards` describes.
        folder: keeps the answers.

    Returns:
        For each view a .npy file, rows as in the view: float32 (n, 7), probabilities at the job's
        temperature, or float32 (n, N, 2), crop coordinates; the mean over all teachers. No file
        where the job has no teachers.

    Raises:
        GrimaceError: a teacher is missing, has another checksum, is for other images or labels, or
            is a result of the graph's own (runs/TASK/MODEL) that was trained on other shards.
    """
    if not job.teachers:
        return []
    identity = [teacher.sha256 for teacher in job.teachers], job.temperature, job.data_version
    folder = folder / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    views = min(read_meta(shards)["views"], job.epochs)
    paths = [folder / f"view-{view:02d}.npy" for view in range(views)]
    missing = [view for view, path in enumerate(paths) if not path.exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        models = [_load(teacher, job, read_meta(shards)) for teacher in job.teachers]
        images = read_meta(shards)["counts"]["train"] * len(missing)
        with progress("asking the teachers", images) as advance:
            for view in missing:
                answers = _ask(models, read_view(shards, "train", view).images, job, advance)
                # Of its own, because the workers of a cluster all ask, and all get the same.
                partial = paths[view].with_suffix(f".{uuid4().hex}.npy")
                np.save(partial, answers)
                partial.replace(paths[view])
    return paths


def soften(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return (n, C) probabilities at a temperature: the softmax of the logits over it."""
    logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny)) / temperature
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _ask(models: list[keras.Model], images: np.ndarray, job: Job, advance: Any) -> np.ndarray:
    parts = []
    for start in range(0, len(images), job.batch):
        batch = images[start : start + job.batch].astype(np.float32)
        answers = [np.asarray(model.predict_on_batch(batch)) for model in models]
        if job.task == "emotion":
            answers = [soften(answer, job.temperature) for answer in answers]
        parts.append(np.mean(answers, axis=0, dtype=np.float32))
        advance(len(batch))
    return np.concatenate(parts)


def _load(teacher: Teacher, job: Job, meta: dict[str, Any]) -> keras.Model:
    path = Path(teacher.path)
    if not path.exists():
        raise GrimaceError(f"{job.name}: the teacher {path} is missing; {_whence(path)}")
    _refuse_stale(path, job)
    if (found := sha256(path)) != teacher.sha256:
        raise GrimaceError(
            f"{job.name}: the teacher {path} has SHA-256 {found}, not {teacher.sha256}. If it is "
            f"the one that is meant, put its sum under train.jobs.{job.name}.teachers in "
            "params.yaml."
        )
    model = keras.models.load_model(path, compile=False)
    shape = (7,) if job.task == "emotion" else (meta["points"], 2)
    expected = (meta["size"], meta["size"], meta["channels"]), shape
    takes, answers = (tuple(side[1:]) for side in (model.input_shape, model.output_shape))
    if (takes, answers) != expected:
        raise GrimaceError(
            f"{job.name}: the teacher {path} takes {takes} and answers {answers}, where the shards "
            f"have {expected[0]} and {expected[1]}; choose one that was trained on such images"
        )
    return model


def _refuse_stale(path: Path, job: Job) -> None:
    """Refuse what the graph itself trained on other data than the student will see.

    DVC cannot see to it: the stage of a student does not depend on those of its teachers.
    """
    trained = path.with_name("job.json")
    if (stage := _stage(path)) is None or not trained.exists():
        return
    if (found := read_job(trained).data_version) != job.data_version:
        raise GrimaceError(
            f"{job.name}: the teacher {path} was trained on other shards ({found}) than the "
            f"student ({job.data_version}). Run `uv run dvc repro {stage}`, then put the new "
            f"file's SHA-256 under train.jobs.{job.name}.teachers in params.yaml; if other shards "
            "are meant, name a copy of it outside of runs/."
        )


def _whence(path: Path) -> str:
    if (stage := _stage(path)) is None:
        return "put the file there, or name another under `teachers`"
    return f"`uv run dvc repro {stage}` trains it"


def _stage(path: Path) -> str | None:
    """Return the stage that writes a teacher's file, None where it is not the graph's."""
    match path.parts[-4:]:
        case ("runs", task, model, "model.keras"):
            return f"train@{task}-{model}"
    return None
