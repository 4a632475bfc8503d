import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import cv2
import httpx
import numpy as np
import pandas as pd
import pytest
import yaml
from prefect import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    DeploymentFilter,
    DeploymentFilterId,
)
from prefect.events import Event, Resource
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.states import Cancelled, Failed

from flows.lock import alone
from flows.watch import DRIFT, NEW, Trigger, one_of_many, watch
from pipelines import journal, landing
from pipelines.datasets import synthetic
from pipelines.datasets.table import write_examples
from pipelines.params import load_params

ROOT = Path(__file__).parents[2]
LABELLED, UNLABELLED = Path("data/landing/labelled"), Path("data/landing/unlabelled")
pytestmark = pytest.mark.usefixtures("prefect_server", "workspace")


@pytest.fixture
def workspace(elsewhere: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to watch, where files settle at once, and emotion learns from `folder`."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["tasks"]["emotion"]["dataset"] = "folder"
    values["watch"]["settle"] = 0
    values["watch"]["drift"]["minimum"] = 20
    shutil.copy(empty_store, "mlflow.db")
    values["tracking"]["uri"] = f"sqlite:///{elsewhere}/mlflow.db"
    Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return elsewhere


def drop(name: str, content: bytes, place: Path = LABELLED) -> None:
    path = place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def picture(seed: int, side: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def look(trigger: Trigger = "event") -> str:
    state = watch(trigger, return_state=True)
    assert state.is_completed(), state.message
    return str(state.message)


def events(name: str) -> list[dict[str, Any]]:
    """Events on the versions and batches of this workspace, once Prefect has stored them."""
    own = {json.loads(path.read_text())["sha256"] for path in journal.VERSIONS.glob("0*.json")}
    own |= {path.name for path in journal.UNLABELLED.glob("2*")}
    assert own
    last = Event(event="test.last", resource=Resource({"prefect.resource.id": "test"}))
    with get_client(sync_client=True) as client:

        def stored(name: str) -> list[dict[str, Any]]:
            asked = {"filter": {"event": {"name": [name]}}, "limit": 50}
            return client.request("POST", "/events/filter", json=asked).json()["events"]

        client.request("POST", "/events", json=[last.model_dump(mode="json")])
        for _ in range(200):  # they are stored in the order in which they came
            if str(last.id) in {row["id"] for row in stored("test.last")}:
                break
            time.sleep(0.1)
        found = stored(name)
    return [row for row in found if {row["payload"].get(key) for key in ("sha256", "batch")} & own]


@pytest.fixture
def deployment() -> Iterator[UUID]:
    """A deployment that a new version starts, as a trigger in prefect.yaml makes one."""
    with get_client(sync_client=True) as client:
        flow = client.create_flow_from_name("retrained")
        deployment = client.create_deployment(flow_id=flow, name="new-data")
        trigger = EventTrigger(
            expect={NEW}, match={"prefect.resource.id": "grimace.data.*"}, posture=Posture.Reactive
        )
        action = RunDeployment(source="selected", deployment_id=deployment)
        automation = client.create_automation(
            AutomationCore(name="new data", trigger=trigger, actions=[action])
        )
        yield deployment
        client.request("DELETE", f"/automations/{automation}")
        client.delete_deployment(deployment)


def runs_of(deployment: UUID, wanted: int) -> bool:
    """Whether so many runs were started, and a moment later no more."""
    only = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    with get_client(sync_client=True) as client:
        for _ in range(100):
            if len(client.read_flow_runs(deployment_filter=only)) >= wanted:
                break
            time.sleep(0.1)
        time.sleep(1)
        return len(client.read_flow_runs(deployment_filter=only)) == wanted


def test_many_files_are_one_event_that_starts_a_deployment_once(deployment: UUID) -> None:
    for number in range(25):
        drop(f"{['happy', 'sad'][number % 2]}/{number}.png", picture(100 + number))
    drop("happy/torn.png", b"no picture")
    said = look()
    assert said.splitlines()[0] == "version 1 of folder: 25 new pictures; 1 quarantined"
    assert said.endswith(f"sent {NEW}")
    (event,) = events(NEW)
    record = json.loads(Path("data/archives/folder-versions/0001.json").read_text())
    assert event["resource"]["prefect.resource.id"] == "grimace.data.folder"
    assert event["payload"] == {
        "version": 1,
        "archive": "folder-versions/0001",
        "sha256": record["sha256"],
        "added": 25,
        "tasks": ["emotion"],
    }
    assert runs_of(deployment, 1)
    assert look() == "nothing new has landed"
    assert len(events(NEW)) == 1
    drop("happy/more.png", picture(200))
    look()
    assert sorted(row["payload"]["version"] for row in events(NEW)) == [1, 2]
    assert runs_of(deployment, 2)
    with get_client(sync_client=True) as client:
        only = ArtifactFilter(key=ArtifactFilterKey(any_=["grimace-watch"]))
        texts = [row.data for row in client.read_artifacts(artifact_filter=only)]
    assert any("25 new pictures" in str(text) for text in texts)


def test_what_nobody_could_be_told_of_is_told_later_and_once() -> None:
    drop("happy/1.png", picture(300))
    assert look("none") == "version 1 of folder: 1 new pictures"  # no server to tell
    drop("happy/2.png", picture(301))
    landing.look(load_params())  # and a look that was killed before it could tell
    assert look().count(f"sent {NEW}") == 2
    assert sorted(row["payload"]["version"] for row in events(NEW)) == [1, 2]
    assert look() == "nothing new has landed"


def test_without_a_task_that_learns_from_it_nothing_is_triggered() -> None:
    values = yaml.safe_load(Path("params.yaml").read_text())
    values["tasks"]["emotion"]["dataset"] = "synthetic"
    Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    drop("happy/1.png", picture(400))
    assert "no task learns from folder" in look("retrain")
    assert events(NEW) == []
    assert look() == "nothing new has landed"


def test_a_retrain_of_its_own_takes_the_version_for_a_changed_input() -> None:
    """The stage is the real one of dvc.yaml, less what it depends on besides params.yaml."""
    from dvc.repo import Repo

    subprocess.run(["git", "init", "-q"], check=True)
    Repo.init().close()
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["download"]
    stage = {"foreach": ["folder"], "do": stage["do"] | {"deps": []}}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"download": stage}}))
    for number in range(3):
        drop(f"happy/{number}.png", picture(500 + number))
    said = look("retrain")
    assert said.count("retrain: 1 stages: 1 ran") == 1
    report = json.loads(Path("reports/download/folder.json").read_text())
    assert (report["archive"], report["examples"], report["known"]) == ("0001", 3, True)
    assert look("retrain") == "nothing new has landed"
    drop("sad/4.png", picture(504))
    assert "retrain: 1 stages: 1 ran" in look("retrain")
    report = json.loads(Path("reports/download/folder.json").read_text())
    assert (report["archive"], report["examples"]) == ("0002", 4)
    assert events(NEW) == []  # or a deployment would retrain as well


def test_a_retrain_that_finds_the_workspace_held_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = [
        Failed(name="Busy", message="held by somebody"),
        Cancelled(message="cut"),
        Failed(message="a stage failed"),
    ]
    monkeypatch.setattr("flows.watch.retrain", lambda **_: states.pop(0))
    drop("happy/1.png", picture(700))
    assert look("retrain").endswith("retrain: held by somebody")
    assert look("retrain").endswith("retrain: cut")
    assert watch("retrain", return_state=True).is_failed()
    assert look("retrain") == "nothing new has landed"  # what failed is not tried for ever


def test_drift_of_pictures_without_labels_is_one_event_a_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faces = list(synthetic.examples(70, 5))
    write_faces(faces)
    for number, face in enumerate(list(synthetic.examples(70, 6))[:30]):
        image = cv2.imdecode(np.frombuffer(face.image, np.uint8), cv2.IMREAD_COLOR)
        dark = cv2.imencode(".png", (image * 0.3).astype(np.uint8))[1].tobytes()
        drop(f"{number}.png", dark, UNLABELLED)
    said = look()
    (batch,) = [path.name for path in journal.UNLABELLED.iterdir() if path.is_dir()]
    assert f"30 pictures without labels in data/unlabelled/{batch}" in said
    assert "drift for emotion could not be measured: data/clean/folder or" in said
    (event,) = events(DRIFT)
    payload = event["payload"]
    assert payload["images"] == 30 and payload["batch"] == batch
    assert "brightness" in payload["drift"]["landmarks"] and list(payload["drift"]) == ["landmarks"]
    assert Path(payload["reports"]["landmarks"], "index.html").is_file()
    result = json.loads(Path(payload["reports"]["landmarks"], "drift.json").read_text())
    assert result["statistics"][-1]["why"] == "there is no champion and no candidate yet"

    # What could not be measured is tried again, but not for ever, and told once.
    tried: list[str] = []

    def in_vain(batch: str, name: str, *_: object) -> str:
        tried.append(name)
        return "the disk is full"

    monkeypatch.setattr("flows.watch.measure_task", in_vain)
    assert said.endswith(f"{batch} will be measured again (1 of 3 tries)")
    assert "could not be measured: the disk is full" in look()
    assert tried == ["emotion"] and "again" not in look()
    assert look() == "nothing new has landed"
    assert tried == ["emotion"] * 2
    assert len(events(DRIFT)) == 1


def write_faces(faces: list[Any]) -> None:
    clean, split = Path("data/clean/synthetic"), Path("data/split/synthetic")
    clean.mkdir(parents=True)
    split.mkdir(parents=True)
    write_examples(faces, clean)
    sides = ["train", "val"] * (len(faces) // 2)
    index = pd.DataFrame({"id": [face.id for face in faces], "split": sides})
    index.to_parquet(split / "index.parquet")


def test_it_follows_until_it_is_stopped(prefect_server: str) -> None:
    drop("happy/1.png", picture(600))
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.watch", "--follow", "--every", "0.2"],
        env={**os.environ, "PREFECT_API_URL": prefect_server},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "version 1 of folder" in process.stdout.readline()
    assert f"sent {NEW}" in process.stdout.readline()
    drop("happy/2.png", picture(601))
    line = next(line for line in process.stdout if "nothing" not in line)
    assert "version 2 of folder" in line
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert len(events(NEW)) == 2


def test_a_server_that_is_away_for_a_while_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise httpx.ConnectError("connection refused")

    monkeypatch.setattr("flows.watch.watch", away)
    said = "this look came to nothing: ConnectError: connection refused"
    assert one_of_many("event") == said


def test_what_has_landed_waits_for_a_flow_that_is_at_work() -> None:
    drop("happy/one.png", picture(1))
    with alone("a retraining"):
        assert "what may have landed waits" in look("none")
        assert (LABELLED / "happy/one.png").exists()
    assert "version 1 of folder: 1 new pictures" in look("none")
