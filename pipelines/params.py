"""Stage `params`: validate `params.yaml` once, before any work, into frozen typed objects.

Every other stage asks `load_params()` for its section and never reads the file by hand. The
stage's output is the JSON schema of the file, which stays the same whatever the values, so a
changed value re-runs only the stages that use it.
"""

import argparse
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from models.schemes import EMOTIONS
from pipelines.cli import GrimaceError, run
from pipelines.datasets import EVALUATE_ONLY, LABELS
from pipelines.job import (
    ClassWeights,
    Job,
    Loss,
    Optimizer,
    Precision,
    Schedule,
    job_of,
)
from pipelines.runtimes import RUNTIMES

TaskName = Literal["emotion", "landmarks"]
TestTime = Literal["none", "flip", "ten_crop"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]


def main() -> None:
    """Validate the parameters and write their JSON schema."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("reports/params/schema.json"))
    args = parser.parse_args()
    params = load_params()
    _check_policies(params)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(Params.model_json_schema(), indent=2) + "\n")
    print("params.yaml is valid")


def load_params(path: Path = Path("params.yaml")) -> "Params":
    """Read and validate the parameter file.

    Raises:
        GrimaceError: the file is missing or not YAML, or has an unknown key, a wrong type or an
            impossible value; one line for each, naming the key.
    """
    try:
        raw = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        raise GrimaceError(
            f"{path} is missing: run from the root of the Grimace repository"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GrimaceError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        # JSON mode, because strict validation then still takes a list for a tuple. What JSON does
        # not have (YAML's dates) becomes a text, which no number or section accepts.
        return Params.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        lines = [_explain(item, raw) for item in error.errors()]
        raise GrimaceError("\n       ".join(f"{path}: {line}" for line in lines)) from None


def edit_params(change: Callable[[Any], None], target: Path = Path("params.yaml")) -> None:
    """Change values in the parameter file, and leave the rest of its text as it is.

    Args:
        change: is given what ruamel.yaml has loaded, and changes that.
        target: the file; replaced in one step.

    Raises:
        GrimaceError: the file would not be valid; then it stays as it was.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import RoundTripRepresenter

    class Representer(RoundTripRepresenter):
        """Writes null as params.yaml does."""

    Representer.add_representer(
        type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    editor = YAML()
    editor.Representer = Representer
    editor.preserve_quotes, editor.width = True, 10**6
    editor.indent(mapping=2, sequence=4, offset=2)
    text = editor.load(target.read_text())
    change(text)
    draft = target.with_name(f".{target.name}.partial")
    try:
        with draft.open("w") as file:
            editor.dump(text, file)
        load_params(draft)
        draft.replace(target)
    except GrimaceError as error:
        said = str(error).replace(f"{draft}: ", "")
        raise GrimaceError(f"{target} would not be valid: {said}") from None
    finally:
        draft.unlink(missing_ok=True)


class _Loader(yaml.SafeLoader):
    """Takes 1e-05 for a number, as YAML 1.2 does and `dvc exp run -S` writes it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Task(_Section):
    """What one task learns from, and the face crop that is its model's input.

    Attributes:
        dataset: a name under `download`.
        size: side of the square crop in pixels.
        channels: 1 for grey, 3 for RGB.
        margin: added on every side of the face box, as a fraction of its longer side.
    """

    dataset: str
    size: Annotated[int, Field(ge=16, le=512, multiple_of=16)]
    channels: Literal[1, 3]
    margin: Annotated[float, Field(ge=-0.25, le=1.0)]


class Tasks(_Section):
    """The two tasks."""

    emotion: Task
    landmarks: Task

    def named(self, task: TaskName) -> Task:
        """Return the section of one task."""
        return self.emotion if task == "emotion" else self.landmarks


class SyntheticSource(_Section):
    """How many faces the built-in generator renders, and from which seed."""

    count: Annotated[int, Field(ge=70)]
    seed: int


class ArchiveSource(_Section):
    """Where an archive comes from.

    Attributes:
        archive: file or folder name looked for in `GRIMACE_ARCHIVES`, then in `data/archives/`.
        catalogue: its name in the TFDS catalogue, where that fetches one archive, or null.
        kaggle: where Kaggle's client finds it, "OWNER/DATASET" or "competitions/NAME", or null.
        url: where it can be fetched over HTTP without a person, or null.
        page: where a person gets it.
        sha256: sums of known versions of the archive.
        require_known: refuse an archive whose sum is not listed, rather than warn.
    """

    archive: str
    catalogue: Literal["the300w_lp", "aflw2k3d"] | None = None
    kaggle: Annotated[str, Field(pattern="^[^/]+/[^/]+$")] | None = None
    url: str | None
    page: str
    sha256: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...]
    require_known: bool


class Download(_Section):
    """One source for each dataset."""

    synthetic: SyntheticSource
    fer2013: ArchiveSource
    ytf_keypoints: ArchiveSource
    kaggle_keypoints: ArchiveSource
    affectnet: ArchiveSource
    the300w_lp: ArchiveSource
    aflw2k3d: ArchiveSource
    folder: ArchiveSource


Action = Literal["off", "drop", "flag", "weight"]


class Check(_Section):
    """One check of `filter`.

    Attributes:
        action: "off": not run. "drop": the example leaves. "flag": it is only listed. "weight":
            training heeds it by `weight`. What a source has put into its official val or test
            split is not dropped for an opinion (of a detector, a shape model, a classifier), only
            flagged: else the test would grow easier. Where a source publishes no split, `split`
            draws the test from what is left: there an opinion had better weigh than drop.
        weight: for the action "weight"; 0 keeps it out of training, but not out of val and test.
    """

    action: Action
    weight: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5


class Blank(Check):
    """Grey levels (0-255) vary less than the standard deviation `std`."""

    std: NonNegative


class NearDuplicate(Check):
    """Perceptual hashes (64 bits) differ in at most `distance` bits, and the details correlate.

    Attributes:
        distance: Hamming distance that makes a pair worth comparing.
        correlation: of the details of their 32 × 32 versions, best over small shifts, from which
            they are copies.
    """

    distance: Annotated[int, Field(ge=0, le=32)]
    correlation: Share


class Below(Check):
    """The score is less than `threshold`; each check says what its score is."""

    threshold: float


class Above(Check):
    """The score is more than `threshold`; each check says what its score is."""

    threshold: float


class NoFace(Check):
    """Fewer than `votes` of the `detectors` see a face."""

    detectors: Annotated[tuple[Literal["haar", "blazeface"], ...], Field(min_length=1)]
    votes: PositiveInt

    @model_validator(mode="after")
    def _votes_can_be_cast(self) -> Self:
        if len(set(self.detectors)) < len(self.detectors):
            raise ValueError("a detector is named twice")
        if self.votes > len(self.detectors):
            raise ValueError(f"{self.votes} votes, but {len(self.detectors)} detectors")
        return self


class Mislabelled(Check):
    """Confident learning (Northcutt et al. 2021) on out-of-fold predictions.

    Attributes:
        estimator: "linear" (histogram of gradients, logistic regression: seconds) or "network" (a
            small convolutional network: minutes).
        folds: the predictions on each come from a model trained on the others.
        epochs: of the network.
        threshold: label quality below which a label that confident learning singles out is a
            finding: the margin by which it is predicted over every other, from 0 (another class is
            certain) over 0.5 (a tie) to 1.
    """

    estimator: Literal["linear", "network"]
    folds: Annotated[int, Field(ge=2, le=20)]
    epochs: PositiveInt
    threshold: Fraction


class Checks(_Section):
    """Every check of `filter`, in the order in which they give the reason for a drop."""

    defect: Check
    unreadable: Check
    blank: Blank
    exact_duplicate: Check
    label_conflict: Check
    near_duplicate: NearDuplicate
    no_face: NoFace
    dark: Below
    bright: Above
    low_information: Below
    blurred: Below
    small_face: Below
    cut_off: Above
    landmarks_outside: Above
    landmarks_folded: Check
    landmarks_mirrored: Check
    landmarks_implausible: Above
    mislabelled: Mislabelled


# The same checks, each optional.
CheckOverrides: type[_Section] = create_model(
    "CheckOverrides",
    __base__=_Section,
    **{name: (field.annotation | None, None) for name, field in Checks.model_fields.items()},  # type: ignore[call-overload, operator]
)


class Filter(_Section):
    """The audit of every dataset.

    Attributes:
        workers: processes; 0 for every core. The result does not depend on it.
        pictures: whether the report shows any.
        checks: for every dataset.
        overrides: by dataset, checks that replace the above there.
        restore: by dataset, ids that stay, with full weight, whatever a check says.
    """

    workers: Annotated[int, Field(ge=0)]
    pictures: bool
    checks: Checks
    overrides: dict[str, CheckOverrides]  # type: ignore[valid-type]
    restore: dict[str, tuple[str, ...]]

    @model_validator(mode="after")
    def _datasets_are_known(self) -> Self:
        for key in ("overrides", "restore"):
            if unknown := getattr(self, key).keys() - Download.model_fields.keys():
                raise ValueError(f"{key} names unknown datasets: {', '.join(sorted(unknown))}")
        return self

    def checks_of(self, dataset: str) -> Checks:
        """Return the checks as they hold for one dataset."""
        changed = self.overrides.get(dataset)
        names = [name for name in Checks.model_fields if getattr(changed, name, None) is not None]
        return self.checks.model_copy(update={name: getattr(changed, name) for name in names})


class Split(_Section):
    """How examples without an official split are divided.

    Attributes:
        seed: changes the draw.
        val, test: shares of the groups (people); the rest is for training.
    """

    seed: int
    val: Share
    test: Share

    @model_validator(mode="after")
    def _leave_something_to_train_on(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError("val + test leave nothing for training")
        return self


class Transform(BaseModel):
    """One albumentations transform: its name, and its arguments by their own names."""

    model_config = ConfigDict(frozen=True, extra="allow")
    transform: str

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the transform."""
        return dict(self.model_extra or {})


class AugmentTask(_Section):
    """How one task's training set is multiplied.

    Attributes:
        views: augmented versions of each training image; epoch e trains on view e mod views.
        jitter_shift: the face box moves by up to this fraction of its side, each way.
        jitter_scale: the face box grows or shrinks by up to this fraction.
        policies: by name, albumentations transforms that are applied in order.
        policy: the one in use.
        balance: training images by class, or "largest" for as many as the largest class has. A
            class with fewer is filled up with further augmented copies, one with more stays.
            Emotion only.
    """

    views: PositiveInt
    jitter_shift: Fraction
    jitter_scale: Annotated[float, Field(ge=0.0, lt=1.0)]
    policies: dict[str, tuple[Transform, ...]]
    policy: str
    balance: dict[str, PositiveInt] | Literal["largest"] | None = None

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """The policy in use."""
        return self.policies[self.policy]

    @field_validator("policy")
    @classmethod
    def _policy_is_there(cls, policy: str, info: ValidationInfo) -> str:
        policies = list(info.data.get("policies", [policy]))
        if policy not in policies:
            known = ", ".join(policies)
            raise ValueError(f"no policy {policy!r}{meant(policy, policies)}; there are {known}")
        return policy

    @field_validator("balance", mode="before")
    @classmethod
    def _classes_are_known(cls, balance: Any) -> Any:
        if balance is None or balance == "largest":
            return balance
        if not isinstance(balance, dict):
            raise ValueError(f"null, largest or a count for each class, not {balance!r}")
        for name, count in balance.items():
            if name not in EMOTIONS:
                raise ValueError(f"unknown class {name!r}{meant(name, EMOTIONS)}")
            if type(count) is not int or count < 1:
                raise ValueError(f"{name} needs a count above 0, not {count!r}")
        return balance


class Cluster(_Section):
    """Where `filter` and `augment` fan out, and `train` with several workers.

    Attributes:
        address: of a Ray cluster; null for here.
    """

    address: Annotated[str, Field(pattern=r"^(ray://)?[^/:]+:[0-9]+$")] | None


class Augment(_Section):
    """Augmentation of both tasks; `workers: 0` uses every core."""

    seed: int
    workers: Annotated[int, Field(ge=0)]
    emotion: AugmentTask
    landmarks: AugmentTask

    @model_validator(mode="after")
    def _only_classes_are_balanced(self) -> Self:
        if self.landmarks.balance is not None:
            raise ValueError("landmarks.balance: landmarks have no classes; only emotion has")
        return self

    def named(self, task: TaskName) -> AugmentTask:
        """Return the section of one task."""
        return self.emotion if task == "emotion" else self.landmarks


class TeacherModel(_Section):
    """A trained model, `runs/TASK/MODEL/model.keras` or any .keras file, and its SHA-256.

    DVC does not know that a student depends on it: train a teacher of the graph's first (`dvc repro
    train@TASK-MODEL`), then put its sum here. A student refuses a teacher that is missing, has
    another sum, or is one of `runs/` that was trained on other shards than are there now.
    """

    path: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class TrainJob(_Section):
    """One training.

    Attributes:
        task: what is learnt.
        model: the job's own name; its results go to runs/TASK/MODEL.
        network: architecture, a name in `NETWORKS` of `models.emotion` or `models.landmarks`;
            null: the one called as the model.
        widths: channels of the network's blocks, where it takes any.
        dropout: before the last dense layer.
        weights: what the network starts from: null (at random), "imagenet" or a file.
        frozen_epochs: at first, in which a network that starts from weights trains its head
            alone; then the whole is trained, with a new optimiser.
        fine_tune_rate: peak learning rate from then on.
        loss: emotion: "cross_entropy" or "focal"; landmarks: "wing", "adaptive_wing",
            "soft_wing", "mse" or "mae". `models.losses` gives the papers.
        label_smoothing: of the labels; emotion only.
        class_weights: how much each class counts, times the weights `filter` gives images: null,
            "balanced" (inversely to its number of images) or "effective" (Cui et al. 2019);
            emotion only.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw".
        learning_rate: at its peak.
        schedule: "cosine": to zero, after a linear warm-up over the first twentieth of the steps;
            "plateau": constant, times 0.75 whenever five epochs bring nothing new on validation.
        weight_decay: of kernels, decoupled from the gradient (Loshchilov and Hutter 2019).
        clip_norm: the gradient's global norm is cut to it; null: never.
        ema: decay a step of the exponential moving average of the weights, which is then what is
            validated and saved; null: none.
        patience: stop when so many epochs bring nothing new on validation; null: never.
        mixup: α of the Beta distribution from which the shares of two blended images are drawn
            (Zhang et al. 2018), 0: off; emotion only.
        cutmix: the same for images pasted into each other (Yun et al. 2019); where both are on,
            each batch takes one of them.
        erase: probability that a random rectangle of an image is erased (Zhong et al. 2020).
        teachers: models whose averaged answers the student learns too (Hinton et al. 2015).
        teacher_weight: of their part of the loss; the labels have the rest.
        temperature: that softens both their probabilities; emotion only.
        batch: images a step.
        epochs: passes over the training images, frozen ones included.
        precision: "float32" or "mixed_bfloat16"; `pipelines.fit --time` says which is faster.
        seed: of the initial weights, the order of images, dropout, mixing and erasing.
        by_dataset: other values of these fields for a dataset: what suits a thousand drawn faces
            need not suit thirty thousand real ones.
    """

    task: TaskName
    model: Annotated[str, Field(pattern="^[a-z0-9][a-z0-9_-]*$")]
    network: Annotated[str, Field(pattern="^[a-z0-9][a-z0-9_-]*$")] | None = None
    widths: tuple[PositiveInt, ...] = ()
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    weights: str | None = None
    frozen_epochs: Annotated[int, Field(ge=0)] = 0
    fine_tune_rate: Positive | None = None
    loss: Loss
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    class_weights: ClassWeights | None = None
    optimizer: Optimizer
    learning_rate: Positive
    schedule: Schedule = "cosine"
    weight_decay: NonNegative = 0.0
    clip_norm: Positive | None = None
    ema: Share | None = None
    patience: PositiveInt | None = None
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    erase: Fraction = 0.0
    teachers: tuple[TeacherModel, ...] = ()
    teacher_weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    temperature: Positive = 1.0
    batch: PositiveInt
    epochs: PositiveInt
    precision: Precision = "float32"
    seed: Annotated[int, Field(ge=0)]
    by_dataset: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if unknown := self.by_dataset.keys() - set(Download.model_fields):
            raise ValueError(f"by_dataset names unknown datasets: {', '.join(sorted(unknown))}")
        job_of(self.model_dump(exclude={"by_dataset"}))
        for dataset, values in self.by_dataset.items():
            if fixed := values.keys() & {"task", "model", "by_dataset"}:
                raise ValueError(f"by_dataset.{dataset} cannot change {', '.join(sorted(fixed))}")
            try:
                self.at(dataset)
            except ValueError as error:
                raise ValueError(f"by_dataset.{dataset}: {error}") from None
        return self

    def at(self, dataset: str) -> "TrainJob":
        """Return the job with its values for one dataset, and for no other."""
        return varied(self, {**self.by_dataset.get(dataset, {}), "by_dataset": {}})

    def resolved(self, dataset: str, data_version: str = "") -> Job:
        """Return the job that stands alone, as it is on one dataset."""
        own = self.at(dataset).model_dump(exclude={"by_dataset"})
        return job_of(own | {"data_version": data_version})


class Train(_Section):
    """All trainings, and on how many devices each runs. These do not change what comes of it.

    Attributes:
        jobs: by name, TASK-MODEL.
        devices: of this machine, or of each worker, that train together, under JAX; 0 for all of
            this machine's.
        workers: processes that train together, one or more a machine of the cluster at
            `cluster.address`; 1 for this process.
        restarts: of the workers, after one of them failed, before the training is given up.
    """

    jobs: dict[str, TrainJob]
    devices: Annotated[int, Field(ge=0)] = 1
    workers: PositiveInt = 1
    restarts: Annotated[int, Field(ge=0)] = 3

    @model_validator(mode="after")
    def _names_say_what_is_trained(self) -> Self:
        for name, job in self.jobs.items():
            if name != f"{job.task}-{job.model}":
                raise ValueError(f"job {name} must be called {job.task}-{job.model}")
        return self


class Range(_Section):
    """What a search may try of one field of a job: numbers from `low` to `high`, or `choices`.

    Attributes:
        low, high: the least and the largest.
        log: draw the order of magnitude evenly, not the number.
        step: try only low, low + step, and so on.
        choices: values of the field, at least two.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    step: Positive | None = None
    choices: Annotated[tuple[Any, ...], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _numbers_or_choices(self) -> Self:
        if self.choices is not None:
            if self.log or (self.low, self.high, self.step) != (None, None, None):
                raise ValueError("choices stand alone, without low, high, log and step")
            return self
        if self.low is None or self.high is None:
            raise ValueError("needs low and high, or choices")
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0, and no step")
        return self


class Sweep(_Section):
    """Hyperparameter search, by `flows.sweep`.

    Attributes:
        seed: of what is tried.
        epochs: of a trial, as a share of the job's own.
        startup: trials drawn at random before the search learns from those done, and that have
            to be complete before any is pruned.
        warm_up: share of its epochs after which a trial may be pruned.
        jobs: by job, the fields that are searched.
    """

    seed: Annotated[int, Field(ge=0)]
    epochs: Annotated[float, Field(gt=0.0, le=1.0)]
    startup: PositiveInt
    warm_up: Fraction
    jobs: dict[str, dict[str, Range]]


class Evaluate(_Section):
    """How models are measured.

    Attributes:
        resamples: behind the 95 % intervals.
        seed: of the resamples.
        gallery: worst cases shown.
        test_time: what answers are averaged over beside the single crop that is deployed: "none",
            "flip" (and its mirror image) or "ten_crop".
    """

    resamples: Annotated[int, Field(ge=100)]
    seed: Annotated[int, Field(ge=0)]
    gallery: PositiveInt
    test_time: TestTime = "none"


# What `evaluate` gives an interval of, and whether more of it is better.
METRICS: dict[TaskName, dict[str, bool]] = {
    "emotion": {
        "accuracy": True,
        "macro_f1": True,
        "balanced_accuracy": True,
        "ece": False,
        "brier": False,
        "nll": False,
    },
    "landmarks": {
        "nme_interocular": False,
        "nme_interocular_inner": False,
        "nme_box": False,
        "fr10": False,
        "auc10": True,
        "mae": False,
    },
}


class SelectTask(_Section):
    """The validation metric that decides, and whether more of it is better."""

    metric: str
    higher_is_better: bool


class Select(_Section):
    """How each task's candidate is chosen, by one of the task's `METRICS`."""

    emotion: SelectTask
    landmarks: SelectTask

    @model_validator(mode="after")
    def _metrics_are_measured(self) -> Self:
        for task, metrics in METRICS.items():
            metric, higher = self.named(task).metric, self.named(task).higher_is_better
            if metric not in metrics:
                raise ValueError(
                    f"{task}.metric: {metric!r} is not measured with an interval"
                    f"{meant(metric, metrics)}; choose among {', '.join(metrics)}"
                )
            if higher != metrics[metric]:
                said = "true" if metrics[metric] else "false"
                raise ValueError(f"{task}.higher_is_better: has to be {said} for {metric}")
        return self

    def named(self, task: TaskName) -> SelectTask:
        """Return the section of one task."""
        return self.emotion if task == "emotion" else self.landmarks


class Export(_Section):
    """How deployables are made.

    Attributes:
        calibration: images of the train split, of all classes alike, that the ranges of int8
            activations are taken from.
        trial: images of validation on which recipes are compared.
        aim: share of what `verify` allows that int8 may lose on these before its most sensitive
            layers are left in float.
        engines: TensorRT targets to build engines for.
    """

    calibration: Annotated[int, Field(ge=16)]
    trial: Annotated[int, Field(ge=16)]
    aim: Annotated[float, Field(gt=0.0, le=1.0)]
    engines: tuple[Annotated[str, Field(pattern="^sm[0-9]{2,3}$")], ...]


class VerifyRuntimes(_Section):
    """Where graphs are measured; the first of each that is there gives a graph's own row.

    Attributes:
        tflite: "litert", LiteRT in Python; "litertjs", LiteRT.js in Chromium.
        tfjs: "wasm", "webgl" and "webgpu", TF.js in Chromium; "node", its WebAssembly in Node.
    """

    tflite: Annotated[tuple[Literal["litert", "litertjs"], ...], Field(min_length=1)]
    tfjs: Annotated[tuple[Literal["wasm", "node", "webgl", "webgpu"], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for name, runtimes in self:
            if len(set(runtimes)) < len(runtimes):
                raise ValueError(f"{name} names a runtime twice")
        return self

    def of(self, target: str) -> tuple[str, ...]:
        """Return the runtimes of a bundle; those without a choice have but one."""
        return getattr(self, target, RUNTIMES[target])

    def left_out(self) -> list[str]:
        """Return what could be measured too, as "tfjs:webgl"."""
        return [
            f"{target}:{runtime}"
            for target, runtimes in RUNTIMES.items()
            for runtime in runtimes
            if runtime not in self.of(target)
        ]


class Verify(_Section):
    """What a deployable may lose against float32, and where and how it is measured.

    Attributes:
        accuracy_points: most that emotion accuracy may fall, in points of a hundred, by dataset;
            "default" for those not named. A small test side needs more, for its loss is to a
            large part chance: decisions that were as good as even fall either way.
        nme_relative: most that the NME may rise, as a fraction of the float32 NME.
        latency_runs: single-image calls that are timed.
        runtimes: what graphs are measured in.
        software_faces: how many faces are measured where a browser imitates a GPU on the CPU.
    """

    accuracy_points: dict[str, NonNegative]
    nme_relative: NonNegative
    latency_runs: Annotated[int, Field(ge=10)]
    runtimes: VerifyRuntimes
    software_faces: PositiveInt

    @model_validator(mode="after")
    def _has_a_default(self) -> Self:
        if "default" not in self.accuracy_points:
            raise ValueError("accuracy_points needs a 'default' beside the datasets it names")
        if unknown := self.accuracy_points.keys() - {"default", *Download.model_fields}:
            named = ", ".join(sorted(unknown))
            raise ValueError(f"accuracy_points names unknown datasets: {named}")
        return self

    def budget(self, task: TaskName, dataset: str) -> float:
        """Return what a deployable of a task may lose on a dataset, in the task's unit."""
        if task == "landmarks":
            return self.nme_relative
        return self.accuracy_points.get(dataset, self.accuracy_points["default"])


class GateTask(_Section):
    """What a candidate for one task has to meet before it may be promoted.

    Metrics are as `evaluate` names them, fractions and not per cent, on the test side.

    Attributes:
        floors: by metric, the worst value that is good enough.
        margin: how far the deciding metric may lie below the champion's: the lower end of the
            paired 95 % interval of the gain has to be above minus this (Piaggio et al. 2012 on
            non-inferiority). The fewer the faces, the wider the interval: a margin much narrower
            than it asks for a candidate that is plainly better.
        slice_floor: the worst value of the deciding metric that is good enough in any slice.
        above_validation: how much better than on validation the model may be on test; what is
            surely better by more has most likely seen the test faces.
        answers: by precision, how far any answer of a deployable may be from the float32 model's,
            where its bundle has no golden answers with a tolerance of their own.
        mib: size of a deployable in MiB, by its name, or `default`.
    """

    floors: Annotated[dict[str, float], Field(min_length=1)]
    margin: NonNegative
    slice_floor: NonNegative
    above_validation: NonNegative
    answers: Annotated[dict[str, NonNegative], Field(min_length=1)]
    mib: dict[str, Positive]

    @field_validator("mib")
    @classmethod
    def _mib_has_default(cls, value: dict[str, float]) -> dict[str, float]:
        if "default" not in value:
            raise ValueError("needs a `default`")
        return value


# The loosest that params.yaml may be; a candidate that needs more is signed for, by an override.
LOOSEST: dict[TaskName, dict[str, Any]] = {
    "emotion": {
        "floors": {"accuracy": 0.5, "macro_f1": 0.4},
        "slice_floor": 0.2,
        "margin": 0.02,
        "above_validation": 0.05,
        "answers": 0.4,
        "mib": 25,
    },
    "landmarks": {
        "floors": {"nme_interocular": 0.15},
        "slice_floor": 0.25,
        "margin": 0.003,
        "above_validation": 0.01,
        "answers": 0.4,
        "mib": 25,
    },
}
# The same of what a deployable may lose: points of accuracy, a fraction of the NME.
MOST_LOST: dict[TaskName, float] = {"emotion": 1.0, "landmarks": 0.02}
MOST_LOST_DRAWN: dict[TaskName, float] = {"emotion": 1.5, "landmarks": 0.02}


class Override(_Section):
    """A gate that a person lets one candidate pass, and answers for.

    It holds for the bytes it names and no others, and stands in the blessing and in the registry's
    audit trail.

    Attributes:
        task: of the candidate.
        gate: the name of its row in blessing.json.
        candidate: the first 12 or more hex digits of the `sha256` in blessing.json.
        who: signs for it.
        reason: why the gate is wrong here.
    """

    task: TaskName
    gate: str
    candidate: Annotated[str, Field(pattern="^[0-9a-f]{12,64}$")]
    who: Annotated[str, StringConstraints(strip_whitespace=True, min_length=2)]
    reason: Annotated[str, StringConstraints(strip_whitespace=True, min_length=10, max_length=500)]


class Gate(_Section):
    """What stands between a candidate and the alias `champion`.

    No bound may be looser than `LOOSEST`: who needs that signs for it, with an override.

    Attributes:
        resamples: behind the paired intervals; their seed is evaluate.seed.
        emotion, landmarks: each task's bounds.
        overrides: signed for by a person, each for one gate and one candidate.
    """

    resamples: Annotated[int, Field(ge=1000)]
    emotion: GateTask
    landmarks: GateTask
    overrides: tuple[Override, ...] = ()

    @model_validator(mode="after")
    def _as_strict_as_it_has_to_be(self) -> Self:
        tasks: tuple[TaskName, ...] = ("emotion", "landmarks")
        for task in tasks:
            if wrong := _too_loose(self.named(task), LOOSEST[task], 1 if task == "emotion" else -1):
                raise ValueError(
                    f"{task}.{wrong}; a candidate that needs more is signed for in gate.overrides"
                )
        return self

    def named(self, task: TaskName) -> GateTask:
        """Return the section of one task."""
        return self.emotion if task == "emotion" else self.landmarks


class Notify(_Section):
    """Who hears of promotions, rejections, rollbacks and failures, beside the log.

    Attributes:
        block: a notification block in Prefect, as TYPE/NAME; where Prefect has none of this name,
            nobody does. `python -m flows.notify --webhook URL` makes one.
    """

    block: Annotated[str, Field(pattern="^[a-z0-9-]+/[a-z0-9-]+$")]


class ArchiveLimits(_Section):
    """The most that an archive may hold when unpacked: MiB in all, and files."""

    mib: PositiveInt
    files: PositiveInt


class Drift(_Section):
    """When pictures without labels are no longer like those that the model was trained on.

    Attributes:
        minimum: pictures on either side, below which nothing is computed.
        sample: pictures that are looked at on either side, at most.
        alpha: p-value, corrected for the number of tests, below which a difference is no chance.
        distance: largest difference of the cumulative distributions (Kolmogorov's D, 0 to 1) from
            which a statistic has drifted.
        auc: area under the ROC curve of a classifier that tells incoming pictures from known ones
            by the model's features, from which these have drifted; 0.5 is guessing.
        seed: of the samples and of the classifier's split.
    """

    minimum: Annotated[int, Field(ge=20)]
    sample: Annotated[int, Field(ge=20)]
    alpha: Share
    distance: Share
    auc: Annotated[float, Field(ge=0.5, lt=1.0)]
    seed: Annotated[int, Field(ge=0)]


class Watch(_Section):
    """What `flows.watch` looks for, and where.

    Attributes:
        labelled: folder in which new pictures with labels land, arranged as the dataset `folder`
            wants them (pipelines/datasets/folder.md), or zip or tar files of the same.
        unlabelled: folder in which pictures without labels land, or archives of them.
        quarantine: folder to which goes what cannot be used, with `quarantine.csv`.
        settle: seconds for which a file must not have changed to be taken for whole.
        archive: bounds on what may be unpacked.
        drift: when pictures without labels tell of a changed world.
    """

    labelled: Path
    unlabelled: Path
    quarantine: Path
    settle: NonNegative
    archive: ArchiveLimits
    drift: Drift

    @model_validator(mode="after")
    def _folders_are_apart(self) -> Self:
        folders = [self.labelled, self.unlabelled, self.quarantine]
        for one in folders:
            if any(one == other or one in other.parents for other in folders if other is not one):
                raise ValueError(f"{one} has to lie apart from the other folders")
        return self


class Tracking(_Section):
    """Where MLflow keeps runs; the environment's MLFLOW_TRACKING_URI has precedence."""

    uri: str


class Params(_Section):
    """The whole of `params.yaml`, one attribute a section."""

    tasks: Tasks
    tracking: Tracking
    cluster: Cluster
    download: Download
    filter: Filter
    split: Split
    augment: Augment
    train: Train
    sweep: Sweep
    evaluate: Evaluate
    select: Select
    export: Export
    verify: Verify
    gate: Gate
    notify: Notify
    watch: Watch

    @model_validator(mode="after")
    def _tasks_have_data_and_models(self) -> Self:
        tasks: tuple[TaskName, ...] = ("emotion", "landmarks")
        for task in tasks:
            if wrong := _unfit(self.tasks.named(task).dataset, task):
                raise ValueError(f"tasks.{task}.dataset: {wrong}")
            if not any(job.task == task for job in self.train.jobs.values()):
                raise ValueError(f"train.jobs has no model for task {task}")
        return self

    @model_validator(mode="after")
    def _workers_have_a_cluster(self) -> Self:
        if self.train.workers > 1 and self.cluster.address is None:
            raise ValueError(
                f"train.workers: {self.train.workers} need a cluster; set cluster.address, or "
                "train.devices for several devices of this machine"
            )
        if self.train.workers > 1 and self.train.devices == 0:
            raise ValueError("train.devices: on a cluster, say how many each worker is to have")
        return self

    @model_validator(mode="after")
    def _sweeps_try_what_jobs_can_be(self) -> Self:
        for name, ranges in self.sweep.jobs.items():
            if name not in self.train.jobs:
                near = meant(name, self.train.jobs)
                raise ValueError(f"sweep.jobs.{name}: train.jobs has no such job{near}")
            for field, tried in ranges.items():
                if wrong := _untriable(self.train.jobs[name], field, tried):
                    raise ValueError(f"sweep.jobs.{name}.{field}: {wrong}")
        return self


def _too_loose(bounds: GateTask, loosest: Mapping[str, Any], sign: int) -> str:
    """Say which bound is looser than it may be, "" where none is; sign: 1 where high is good."""
    for name, limit in loosest["floors"].items():
        if name not in bounds.floors:
            return f"floors has no {name}"
        if sign * bounds.floors[name] < sign * limit:
            return f"floors.{name} is {bounds.floors[name]:g}, {limit:g} is the loosest"
    if sign * bounds.slice_floor < sign * loosest["slice_floor"]:
        return f"slice_floor is {bounds.slice_floor:g}, {loosest['slice_floor']:g} is the loosest"
    widths = {name: getattr(bounds, name) for name in ("margin", "above_validation")}
    largest = {name: max(getattr(bounds, name).values()) for name in ("answers", "mib")}
    for name, value in {**widths, **largest}.items():
        if value > loosest[name]:
            return f"{name} is {value:g}, {loosest[name]:g} is the most"
    return ""


def varied(job: TrainJob, values: Mapping[str, Any]) -> TrainJob:
    """Return a job with other values for some fields, held to what holds for params.yaml.

    Raises:
        ValueError: the job cannot have such a value.
    """
    raw = {**job.model_dump(mode="json"), **values}
    try:
        return TrainJob.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(item, raw) for item in error.errors())) from None


def number_type(field: str) -> type[float] | type[int] | None:
    """Return which numbers a field of a job takes: float, int, or None for neither."""
    types = _numbers_in(TrainJob.model_fields[field].annotation)
    return float if float in types else int if int in types else None


def _numbers_in(annotation: Any) -> set[Any]:
    """The number types that an annotation admits itself, not as items: {float} for float | None."""
    if annotation in (float, int):
        return {annotation}
    if getattr(annotation, "__origin__", None) in (tuple, list, dict):
        return set()
    return set[Any]().union(*map(_numbers_in, get_args(annotation)))


def _untriable(job: TrainJob, field: str, tried: Range) -> str:
    """Say why a field cannot be searched in a range, "" where it can."""
    if field not in TrainJob.model_fields:
        return f"a job has no such field{meant(field, TrainJob.model_fields)}"
    if field in ("task", "model", "epochs", "seed", "by_dataset"):
        return "this field is not searched"
    values: Iterable[Any] = tried.choices or ()
    if tried.choices is None:
        kind = number_type(field)
        given = [n for n in (tried.low, tried.high, tried.step) if n is not None]
        if kind is None:
            return "this field takes no numbers; give choices"
        if kind is int and not all(number.is_integer() for number in given):
            return "this field takes whole numbers"
        values = map(kind, given[:2])
    for value in values:
        try:
            varied(job, {field: value})
        except ValueError as error:
            return f"the job cannot be trained so: {error}"
    return ""


def _unfit(dataset: str, task: TaskName) -> str:
    """Say why a task cannot be learnt from a dataset, "" where it can."""
    if task in LABELS.get(dataset, ()) and dataset not in EVALUATE_ONLY:
        return ""
    if dataset not in LABELS:
        why = f"{dataset!r} is not a dataset"
    elif task not in LABELS[dataset]:
        why = f"{dataset} has no labels for task {task}"
    else:
        why = f"{dataset} is for evaluation only (`python -m pipelines.evaluate`)"
    fit = [name for name, served in LABELS.items() if task in served and name not in EVALUATE_ONLY]
    return f"{why}; {task} can be learnt from {', '.join(fit)}"


def _explain(error: Any, raw: Any) -> str:
    """One line for one pydantic error: the key as it stands in the file, and what is wrong."""
    key = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden":
        parent = error["loc"][:-1]
        return f"{key}: unknown key{meant(str(error['loc'][-1]), _known_keys(parent))}"
    if error["type"] == "missing":
        return f"{key}: missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message if key == "the file" else f"{key}: {message}"
    return f"{key}: {message[0].lower()}{message[1:]}, not {error['input']!r}"


def meant(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean …?)" with the nearest known name, "" where none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Keys the schema allows at a location of the file."""
    model: Any = Params
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[str(part)].annotation
        else:  # dict[str, Section]: any name leads to the section
            model = model.__args__[1]
    return list(model.model_fields) if hasattr(model, "model_fields") else []


def _check_policies(params: Params) -> None:
    """Build every augmentation policy, so that a bad transform is named before any work."""
    from pipelines.views import build_policy

    tasks: tuple[TaskName, ...] = ("emotion", "landmarks")
    for task in tasks:
        settings = params.augment.named(task)
        for policy in settings.policies:
            used = settings.model_copy(update={"policy": policy})
            build_policy(used, params.tasks.named(task), task)


if __name__ == "__main__":
    run(main)
