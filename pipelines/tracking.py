"""MLflow: one experiment a task, one run a training, found again by the model's bytes.

`train` opens the run and tells it by way of a journal; `evaluate` and `verify`, which may run much
later or elsewhere, find it by the SHA-256 of the model file and add their figures.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipelines.cli import GrimaceError
from pipelines.job import sha256
from pipelines.params import Tracking

if TYPE_CHECKING:
    import mlflow

PACKAGES = ("tensorflow", "keras", "numpy", "albumentations", "opencv-python-headless", "mlflow")
MODEL_TAG = "grimace.model_sha256"
# What was edited since the commit; dvc.lock is what a run itself writes.
CHANGED = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)dvc.lock")


def connect(settings: Tracking, task: str) -> "mlflow.MlflowClient":
    """Point MLflow at the tracking store and at the task's experiment.

    The environment's MLFLOW_TRACKING_URI has precedence over params.yaml. Runs in a local sqlite
    file keep their artefacts in `mlartifacts/` beside it, those in another database in that of the
    current folder; a server decides for itself.

    Raises:
        GrimaceError: the store does not answer, or its experiment was deleted.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = address(settings)
    try:
        mlflow.set_tracking_uri(uri)
        _use_experiment(f"grimace-{task}", _artefacts_beside(uri))
    except MlflowException as error:
        raise GrimaceError(
            f"MLflow at {uri}: {error}. The address is tracking.uri of params.yaml, or "
            "MLFLOW_TRACKING_URI where that is set."
        ) from None
    return mlflow.MlflowClient()


def address(settings: Tracking) -> str:
    """Return where MLflow keeps its records: MLFLOW_TRACKING_URI, or what params.yaml says."""
    return os.environ.get("MLFLOW_TRACKING_URI") or settings.uri


class Journal:
    """What the run of one training is to be told, kept on disk and told as far as MLflow answers.

    A server that goes away in mid-training does not stop it: what is added while it is away is
    told at the first addition at which it answers, or by a later `deliver`, in whatever process. A
    run that the server has lost is replaced by a new one, which is told all of it. Everything keeps
    the time of its addition, so that a figure told twice after a kill is one figure.

    Args:
        settings: the params' section.
        folder: holds the journal and all files that it names; one that is there is continued.
        task: "emotion" or "landmarks"; of a journal that is there, its own.
        name: of the run, shown in the UI.
    """

    def __init__(self, settings: Tracking, folder: Path, task: str = "", name: str = "") -> None:
        self.settings, self.folder, self.file = settings, folder, folder / "journal.json"
        self.state: dict[str, Any] = {"task": task, "name": name, "run": None, "told": 0}
        self.state["entries"] = []
        if self.file.exists():
            self.state = json.loads(self.file.read_text())
        self.opened = self.complained = False
        # A server that is away must not hold up each epoch by minutes of trying.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

    @property
    def run_id(self) -> str | None:
        """The run's id; None before the server has given one."""
        return self.state["run"]

    @property
    def pending(self) -> int:
        """How many entries the server has not been told yet."""
        return len(self.state["entries"]) - self.state["told"]

    def add(self, **entry: Any) -> None:
        """Add an entry, unless the same is there, and tell what is pending.

        Args:
            entry: `metrics`, figures by name, with the `step` they belong to; `parameters`, texts
                by name; `tags`, the same; `files`, a folder, with the `place` in the run where its
                content goes; `model`, a .keras file, with an `example` of its input as .npy; or
                `status`, as MLflow calls it. Paths start from the journal's folder.
        """
        there = ({**known, "time": None} for known in self.state["entries"])
        if "status" in entry or {**entry, "time": None} not in there:
            self.state["entries"].append({**entry, "time": int(time.time() * 1000)})
            self._save()
        self.deliver()

    def open(self) -> None:
        """Find the run, or make it.

        Raises:
            GrimaceError: as `connect`.
        """
        import mlflow

        client = connect(self.settings, self.state["task"])
        if self.run_id is None or not _exists(client, self.run_id):
            with mlflow.start_run(run_name=self.state["name"]) as run:  # tags it with user and such
                self.state |= {"run": run.info.run_id, "told": 0}
            self._save()
        client.update_run(self.run_id, status="RUNNING")
        self.opened = True

    def deliver(self) -> bool:
        """Tell what is pending; say whether all of it was taken."""
        from mlflow.exceptions import MlflowException
        from requests import RequestException

        if not self.pending:
            return True  # and the run, which may have ended, is left alone
        try:
            if not self.opened:
                self.open()
            while self.pending:
                self._tell(self.state["entries"][self.state["told"]])
                self.state["told"] += 1
                self._save()
        except (GrimaceError, MlflowException, RequestException, OSError) as error:
            if not self.complained:
                reason = " ".join(str(error).split())[:300]
                print(f"tracking: not delivered, tried again later: {reason}", file=sys.stderr)
            self.opened, self.complained = False, True
            return False
        if self.complained:
            print("tracking: all is delivered now", file=sys.stderr)
        self.complained = False
        return True

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.state))
        partial.replace(self.file)

    def _tell(self, entry: dict[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        client, run_id = MlflowClient(), self.state["run"]
        match entry:
            case {"metrics": values, "step": step, "time": moment}:
                metrics = [Metric(name, value, moment, step) for name, value in values.items()]
                client.log_batch(run_id, metrics=metrics)
            case {"parameters": values}:
                client.log_batch(run_id, params=[Param(*item) for item in values.items()])
            case {"tags": values}:
                client.log_batch(run_id, tags=[RunTag(*item) for item in values.items()])
            case {"files": source, "place": place}:
                client.log_artifacts(run_id, str(self.folder / source), place)
            case {"model": file, "example": example}:
                _log_model(run_id, self.folder / file, self.folder / example)
            case {"status": status}:
                client.set_terminated(run_id, status)


@contextmanager
def training_run(
    settings: Tracking, task: str, name: str, tags: dict[str, str], folder: Path
) -> Iterator[Journal]:
    """Open the run of a training, or the same one again when the training is resumed.

    Args:
        settings: the params' section.
        task: "emotion" or "landmarks".
        name: shown in the UI.
        tags: searchable facts.
        folder: the training's own, which remembers the run between attempts.

    Raises:
        GrimaceError: the store does not answer, and the training has not begun yet.
    """
    journal = Journal(settings, folder, task, name)
    if journal.run_id is None:
        journal.open()
    journal.add(tags=tags)
    try:
        yield journal
    except BaseException:
        with suppress(Exception):  # as well as it can; the exception tells what went wrong
            connect(settings, task).set_terminated(journal.run_id, "FAILED")
        raise
    journal.add(status="FINISHED")


def _log_model(run_id: str, model: Path, example: Path) -> None:
    """Log a model with signature, example and the packages it needs to be loaded again."""
    import keras
    import mlflow
    import numpy as np

    loaded, images = keras.models.load_model(model, compile=False), np.load(example)
    requirements = [f"{name}=={version(name)}" for name in ("tensorflow", "keras", "numpy")]
    with mlflow.start_run(run_id=run_id):
        # MLflow's Keras flavour writes the example into a folder that is not there yet (3.17).
        mlflow.tensorflow.log_model(
            loaded,
            name="model",
            signature=mlflow.models.infer_signature(images, loaded.predict(images, verbose=0)),
            input_example=images,
            pip_requirements=requirements,
        )


@contextmanager
def run_of_model(settings: Tracking, task: str, model: Path) -> Iterator["mlflow.ActiveRun"]:
    """Open the run that trained a model file; a new one, tagged so, where it is not known here.

    The latter happens when DVC brought the model from its cache or a remote.
    """
    import mlflow

    connect(settings, task)
    digest = sha256(model)
    found = mlflow.search_runs(
        filter_string=f"tags.`{MODEL_TAG}` = '{digest}'", max_results=1, output_format="list"
    )
    if found:
        with mlflow.start_run(run_id=found[0].info.run_id) as run:
            yield run
    else:
        tags = {MODEL_TAG: digest, "grimace.origin": "model restored by DVC, not trained here"}
        name = f"{model.parent.name} {digest[:8]} (restored)"
        with mlflow.start_run(run_name=name, tags=tags) as run:
            yield run


def provenance(data: Path) -> dict[str, str]:
    """Return tags that say which code, data and machine made a run."""
    return {
        "grimace.git_commit": _git("rev-parse", "HEAD") or "no git",
        "grimace.git_dirty": str(bool(_git(*CHANGED))),
        "grimace.data_version": data_version(data),
        "grimace.python": platform.python_version(),
        "grimace.machine": f"{os.cpu_count()} cores, {platform.machine()}",
        **{f"grimace.package.{name}": version(name) for name in PACKAGES},
    }


def data_version(path: Path) -> str:
    """Return the hash under which dvc.lock knows a stage's output, "untracked" if it does not."""
    lock = Path("dvc.lock")
    stages = yaml.safe_load(lock.read_text())["stages"] if lock.exists() else {}
    for stage in stages.values():
        for output in stage.get("outs", []):
            if output["path"] == path.as_posix():
                return str(output["md5"])
    return "untracked"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten nested figures to dotted names; what is not a number is left out."""
    result: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            result[prefix + name] = float(value)
    return result


def _artefacts_beside(uri: str) -> str | None:
    """Return where a database's artefacts go; None leaves it to the server."""
    if uri.startswith(("http://", "https://")):
        return None
    file = Path(uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else "mlflow.db")
    return (file.absolute().parent / "mlartifacts").as_uri()


def _use_experiment(name: str, place: str | None) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    if mlflow.get_experiment_by_name(name) is None:
        try:
            mlflow.create_experiment(name, artifact_location=place)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # by a stage beside this one
                raise
    mlflow.set_experiment(name)


def _exists(client: "mlflow.MlflowClient", run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise  # the server does not answer
        return False
    return bool(run.info.lifecycle_stage == "active")  # a deleted run cannot be opened again


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else ""
