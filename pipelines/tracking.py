"""MLflow: one experiment a task, one run a training, found again by the model's bytes.

`train` opens the run; `evaluate` and `verify`, which may run much later or elsewhere, find it by
the SHA-256 of the model file and add their figures.
"""

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipelines.cli import GrimaceError
from pipelines.params import Tracking

if TYPE_CHECKING:
    import mlflow

PACKAGES = ("tensorflow", "keras", "numpy", "albumentations", "opencv-python-headless", "mlflow")
MODEL_TAG = "grimace.model_sha256"


def connect(settings: Tracking, task: str) -> "mlflow.MlflowClient":
    """Point MLflow at the tracking store and at the task's experiment.

    The environment's MLFLOW_TRACKING_URI has precedence over params.yaml. Runs in a local sqlite
    file keep their artefacts in `mlartifacts/` beside it; a server decides for itself.

    Raises:
        GrimaceError: the store does not answer, or its experiment was deleted.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = os.environ.get("MLFLOW_TRACKING_URI") or settings.uri
    try:
        mlflow.set_tracking_uri(uri)
        _use_experiment(f"grimace-{task}", _artefacts_beside(uri))
    except MlflowException as error:
        raise GrimaceError(
            f"MLflow at {uri}: {error}. The address is tracking.uri of params.yaml, or "
            "MLFLOW_TRACKING_URI where that is set."
        ) from None
    return mlflow.MlflowClient()


@contextmanager
def training_run(
    settings: Tracking, task: str, name: str, tags: dict[str, str], memory: Path
) -> Iterator["mlflow.ActiveRun"]:
    """Open the run of a training, or the same one again when the training is resumed.

    Args:
        settings: the params' section.
        task: "emotion" or "landmarks".
        name: shown in the UI.
        tags: searchable facts.
        memory: a file that remembers the run's id between attempts; a run that was deleted since
            then is not opened again.
    """
    import mlflow

    client = connect(settings, task)
    run_id = memory.read_text() if memory.exists() else None
    if run_id and not _exists(client, run_id):
        run_id = None
    with mlflow.start_run(run_id=run_id, run_name=None if run_id else name, tags=tags) as run:
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(run.info.run_id)
        yield run


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
        with mlflow.start_run(run_name=f"{model.parent.name} (restored)", tags=tags) as run:
            yield run


def provenance(data: Path) -> dict[str, str]:
    """Return tags that say which code, data and machine made a run."""
    return {
        "grimace.git_commit": _git("rev-parse", "HEAD") or "no git",
        "grimace.git_dirty": str(bool(_git("status", "--porcelain", "--untracked-files=no"))),
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


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Return where a local store's artefacts go; None leaves it to the server."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()


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
    except MlflowException:
        return False
    return bool(run.info.lifecycle_stage == "active")  # a deleted run cannot be opened again


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else ""
