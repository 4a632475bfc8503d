"""Register a task's verified candidate as a version of `grimace-TASK` in MLflow.

    python -m pipelines.register --task emotion

The version holds model, bundles, reports, model card and lineage. What is registered already, file
for file, stays the version it is.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from shutil import copy, copytree
from tempfile import TemporaryDirectory
from typing import Any

from pipelines import lineage, registry, tracking
from pipelines.card import Facts, card
from pipelines.cli import GrimaceError, run
from pipelines.measures import DECIDES
from pipelines.params import Params, TaskName, load_params

WORST_SLICES = 6  # on the version's page, which is short; the file has them all


def main() -> None:
    """Register one task's candidate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, choices=tuple(DECIDES))
    register(parser.parse_args().task, load_params())


def register(task: TaskName, params: Params) -> int:
    """Register what deploy/ holds, unless it is; return the version.

    Raises:
        GrimaceError: a stage has not written what a version has to hold, or wrote it of another
            model; or MLflow does not answer.
    """
    files = registry.bytes_of(task)
    sha256 = registry.digest(files)
    store = registry.Registry(params.tracking, task)
    number = store.with_bytes(sha256)
    if number is not None:
        if store.aliases().get("candidate") != number:
            store.make_candidate(number)
        print(f"{store.name} version {number} is what is here already")
        return number
    facts = gather(task, params, files["model.keras"], sha256)
    with TemporaryDirectory() as name:
        folder = Path(name)
        assemble(folder, task, facts)
        # Not the packages, which hide the others on the model's page; the run has them.
        kept = ("grimace.git_commit", "grimace.git_dirty", "grimace.data_version")
        tags = {
            **{name: facts.code[name] for name in kept},
            "grimace.task": task,
            "grimace.model": facts.network,
            "grimace.dataset": facts.dataset,
            registry.NETWORK: files["model.keras"],
            f"grimace.test.{DECIDES[task]}": f"{facts.test[DECIDES[task]]:.6f}",
        }
        page = card(facts, WORST_SLICES)
        model = Path("deploy/candidate", f"{task}.keras")
        number = store.register(folder, model, sha256, tags, page)
    print(f"{store.name} version {number}: {facts.network} on {facts.dataset}, {sha256[:12]}")
    return number


def gather(task: TaskName, params: Params, model_sha256: str, sha256: str) -> Facts:
    """Read what the stages have measured of the candidate."""
    select = _read(Path("reports/select", f"{task}.json"))
    verify = Path("reports/verify", task)
    if _read(verify / "budgets.json")["model_sha256"] != model_sha256:
        raise GrimaceError(f"{verify} is of another model; run `dvc repro verify@{task}`")
    return Facts(
        task=task,
        dataset=params.tasks.named(task).dataset,
        network=select["candidate"],
        sha256=sha256,
        test=_read(verify / "test.json"),
        validation=_read(Path("reports/evaluate", task, select["candidate"], "scores.json")),
        numerics=_read(verify / "numerics.json"),
        perf=_read(verify / "perf.json"),
        code=tracking.provenance(Path("data/augment", task)),
    )


def assemble(folder: Path, task: TaskName, facts: Facts) -> None:
    """Put together a version's files, which MLflow can load as a Keras model."""
    (folder / registry.MODEL).parent.mkdir()
    copy(Path("deploy/candidate", f"{task}.keras"), folder / registry.MODEL)
    copytree(Path("deploy", task), folder / registry.BUNDLES)
    copytree(Path("reports/verify", task), folder / "reports")
    (folder / "MODEL_CARD.md").write_text(card(facts))
    lineage.keep(folder / lineage.FOLDER)
    _describe_to_mlflow(folder)


def _describe_to_mlflow(folder: Path) -> None:
    """Write the MLmodel file, so that the very bytes that were judged are what MLflow loads."""
    from mlflow import pyfunc
    from mlflow.models import Model

    model = Model()
    model.add_flavor(
        "keras",
        data=registry.MODEL.parent.as_posix(),
        keras_version=version("keras"),
        keras_backend="tensorflow",
        save_exported_model=False,
    )
    (folder / "requirements.txt").write_text(
        "".join(f"{name}=={version(name)}\n" for name in ("tensorflow", "keras", "numpy"))
    )
    pyfunc.add_to_model(model, loader_module="mlflow.keras")
    model.save(folder / "MLmodel")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise GrimaceError(f"{path} is missing; run `dvc repro verify`") from None


if __name__ == "__main__":
    run(main)
