"""A training job: the one typed file that, with a folder of shards, says all a training needs.

`pipelines.params.TrainJob` is the same in params.yaml and documents the fields. The standard
library is all this module imports, so that params and the training core share it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from pipelines.cli import GrimaceError

EmotionLoss = Literal["cross_entropy", "focal"]
LandmarkLoss = Literal["wing", "adaptive_wing", "soft_wing", "mse", "mae"]
Loss = Literal[EmotionLoss, LandmarkLoss]
ClassWeights = Literal["balanced", "effective"]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "plateau"]
Precision = Literal["float32", "mixed_bfloat16"]

LOSSES = {"emotion": get_args(EmotionLoss), "landmarks": get_args(LandmarkLoss)}
CHOICES = {
    "optimizer": get_args(Optimizer),
    "schedule": get_args(Schedule),
    "precision": get_args(Precision),
    "class_weights": (None, *get_args(ClassWeights)),
}
# What has no meaning for landmarks, and why.
EMOTION_ONLY = {
    "label_smoothing": "they have no classes",
    "class_weights": "they have no classes",
    "mixup": "the points of two blended faces are those of neither",
    "cutmix": "the points of two pasted faces are those of neither",
}


@dataclass(frozen=True)
class Teacher:
    """A trained model that a student learns from: a .keras file and the SHA-256 it must have.

    By that it is known; it may lie elsewhere on another machine.
    """

    path: str = field(compare=False)
    sha256: str


@dataclass(frozen=True)
class Job:
    """One training, resolved: see `pipelines.params.TrainJob` for the fields it shares.

    Attributes:
        network: of `NETWORKS` in `models.emotion` or `models.landmarks`; the model's name where
            none is given.
        weights_sha256: that the file `weights` must have; None where it is no file, or any will do.
        epochs: passes over the training images, each over another augmented view.
        data_version: what `pipelines.shards.version_of` says of the shards that are meant; others
            are refused, and a checkpoint of others is not resumed. Empty: any will do.

    Raises:
        ValueError: fields that contradict each other.
    """

    task: str
    model: str
    loss: str
    optimizer: str
    learning_rate: float
    epochs: int
    batch: int
    seed: int
    network: str | None = None
    widths: tuple[int, ...] = ()
    dropout: float = 0.0
    weights: str | None = None
    weights_sha256: str | None = None
    frozen_epochs: int = 0
    fine_tune_rate: float | None = None
    label_smoothing: float = 0.0
    class_weights: str | None = None
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip_norm: float | None = None
    ema: float | None = None
    patience: int | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    erase: float = 0.0
    teachers: tuple[Teacher, ...] = ()
    teacher_weight: float = 0.5
    temperature: float = 1.0
    precision: str = "float32"
    data_version: str = ""

    def __post_init__(self) -> None:
        if self.network is None:
            object.__setattr__(self, "network", self.model)
        if self.task not in LOSSES:
            raise ValueError(f"task {self.task!r} is none of {', '.join(LOSSES)}")
        if self.loss not in LOSSES[self.task]:
            known = ", ".join(LOSSES[self.task])
            raise ValueError(f"loss {self.loss} does not fit task {self.task}, which has {known}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {choices}")
        if self.task == "landmarks":
            for name, reason in EMOTION_ONLY.items():
                if getattr(self, name):
                    raise ValueError(f"{name} is not for landmarks: {reason}")
            if self.temperature != 1:
                raise ValueError("temperature is not for landmarks: they have no probabilities")
        if self.frozen_epochs >= self.epochs:
            raise ValueError(
                f"frozen_epochs {self.frozen_epochs} leave none of {self.epochs} to fine-tune in"
            )
        if (self.frozen_epochs > 0) != (self.fine_tune_rate is not None):
            raise ValueError("frozen_epochs and fine_tune_rate go together: one is missing")

    @property
    def name(self) -> str:
        """TASK-MODEL, as params.yaml calls the job."""
        return f"{self.task}-{self.model}"

    @property
    def files(self) -> dict[str, str]:
        """The files that a training needs beside the shards, each with its SHA-256."""
        own = {self.weights: self.weights_sha256} if self.weights and self.weights_sha256 else {}
        return own | {teacher.path: teacher.sha256 for teacher in self.teachers}


def job_of(raw: dict[str, Any]) -> Job:
    """Make a job of plain values, as JSON or params.yaml hold them.

    Raises:
        ValueError: a missing or an unknown field, or fields that contradict each other.
    """
    known = {field.name for field in fields(Job)}
    if unknown := sorted(set(raw) - known):
        raise ValueError(f"unknown field {unknown[0]!r}; known are {sorted(known)}")
    try:
        teachers = tuple(Teacher(**teacher) for teacher in raw.get("teachers", ()))
        return Job(**{**raw, "widths": tuple(raw.get("widths", ())), "teachers": teachers})
    except TypeError as error:
        raise ValueError(str(error)) from None


def plain(job: Job) -> dict[str, Any]:
    """Return the job's fields as JSON gives them back, the inverse of `job_of`."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(job)))
    return values


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_job(path: Path) -> Job:
    """Read a job file.

    Raises:
        GrimaceError: it is missing or no job.
    """
    try:
        return job_of(json.loads(path.read_text()))
    except FileNotFoundError:
        raise GrimaceError(
            f"{path} is missing; `python -m pipelines.train --job NAME --write-job {path}` writes "
            "the job of that name in params.yaml"
        ) from None
    except ValueError as error:  # of JSON's too
        raise GrimaceError(f"{path}: {error}") from None


def write_job(job: Job, path: Path) -> None:
    """Write a job file."""
    path.write_text(json.dumps(plain(job), indent=2) + "\n")
