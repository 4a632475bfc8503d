import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from dvc.repo import Repo
from mlflow.exceptions import MlflowException
from prefect import flow, get_client
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Failed, State

from flows import notify
from flows.notify import tell_failure
from flows.promote import main, promote, rollback, show
from flows.retrain import Decision, StageRun, decide, retrain, stage_graph, verdict
from pipelines import registry
from pipelines.cli import GrimaceError
from pipelines.params import load_params

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _tracking_as_before() -> Iterator[None]:
    before = mlflow.get_tracking_uri()
    yield
    mlflow.set_tracking_uri(before)


@pytest.fixture
def heard(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, str]]]:
    """What a webhook on loopback is told."""
    bodies: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/hook"
        monkeypatch.setattr(sys, "argv", ["notify", "--webhook", url])
        notify.main()
        yield bodies
        server.shutdown()
        CustomWebhookNotificationBlock.delete("grimace")


def last_flow_run(name: str) -> FlowRun:
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=10)
    return next(run for run in runs if run.name.startswith(name))


def artifacts(key: str, flow_run: FlowRun | None = None) -> list[str]:
    only: dict[str, Any] = {"key": ArtifactFilterKey(any_=[key])}
    if flow_run:
        only["flow_run_id"] = ArtifactFilterFlowRunId(any_=[flow_run.id])
    with get_client(sync_client=True) as client:
        return [str(a.data) for a in client.read_artifacts(artifact_filter=ArtifactFilter(**only))]


def test_promote_roll_back_show_and_who_is_told(shop, heard):
    assert show("emotion") == "grimace-emotion: no champion yet\n"
    assert promote("emotion", why=" ", return_state=True).message.startswith("say why")
    nobody = promote("emotion", why="go", return_state=True)
    assert nobody.message.endswith("register one first")
    shop.candidate(0.6)
    state = promote("emotion", why="the first", who="Ada", return_state=True)
    assert state.message == "grimace-emotion: champion is version 1, before: none"
    again = promote("emotion", why="once more", return_state=True)
    assert again.message.endswith("is the champion already")
    shop.candidate(0.5, 2)
    state = promote("emotion", why="please", who="Eve", return_state=True)
    assert (state.name, state.is_failed()) == ("Refused", True)
    assert "version 2 is not blessed" in state.message
    shop.candidate(0.8, 3)
    assert promote("emotion", why="better", who="Ada", return_state=True).is_completed()
    (table,) = artifacts("grimace-champion-emotion", last_flow_run("promote emotion"))
    assert "| promote | 1 | 3 | Ada | better |" in table

    shown = show("emotion")
    assert "champion version 3 (candidate 3, champion 3, previous 1)" in shown
    assert "absolute bounds, and the champion, version 1" in shown
    assert "again      uv run python -m pipelines.reproduce --task emotion --version 3" in shown

    began = time.monotonic()
    state = rollback("emotion", why="blinks", who="Eve", return_state=True)
    assert state.message == "grimace-emotion: champion is version 1, before: version 3"
    assert time.monotonic() - began < 20
    assert "| rollback | 3 | 1 | Eve | blinks |" in show("emotion")
    assert rollback("emotion", why="more", return_state=True).is_failed()
    assert [body["subject"] for body in heard] == [
        "grimace.failed promote",
        "grimace.failed promote",
        "grimace.promoted emotion",
        "grimace.rejected emotion",
        "grimace.promoted emotion",
        "grimace.rolled_back emotion",
        "grimace.failed rollback",
    ]
    assert "Eve: blinks" in heard[5]["text"]
    assert heard[6]["text"].startswith("roll back emotion: ")
    store = shop.store()
    store.client.set_registered_model_alias(store.name, "champion", "2")
    shown = show("emotion")
    assert "by hand: the audit trail knows nothing of this champion" in shown
    assert "NOT BLESSED, fails against the champion" in shown


def test_a_failed_flow_is_told_and_a_dead_webhook_stops_nothing(shop, heard, caplog):
    @flow(name="ill-fated", on_failure=[tell_failure])
    def ill_fated() -> None:
        raise ValueError("no luck")

    @flow(on_failure=[tell_failure])
    def busy() -> State[Any]:
        return Failed(name="Busy", message="another flow is at work")

    assert ill_fated(return_state=True).is_failed()
    assert busy(return_state=True).name == "Busy"  # which is nobody's failure
    assert heard[-1]["subject"] == "grimace.failed ill-fated"
    assert "no luck" in heard[-1]["text"]
    block = CustomWebhookNotificationBlock.load("grimace")
    block.url = "http://127.0.0.1:9/nobody"
    block.save("grimace", overwrite=True)
    shop.candidate(0.6)
    assert promote("emotion", why="all the same", return_state=True).is_completed()
    assert "nobody could be notified" in caplog.text
    assert "promoted emotion: grimace-emotion: champion is version 1" in caplog.text


def test_a_webhook_without_a_server_is_saved_nowhere(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notify", "--webhook", "http://127.0.0.1:9/hook"])
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(GrimaceError, match="PREFECT_API_URL is not set"),
    ):
        notify.main()


def command(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if "MLFLOW" not in k and "PREFECT" not in k}
    return subprocess.run(
        [sys.executable, "-m", "flows.promote", *arguments],
        env={**inherited, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_from_the_command_line_without_a_server(shop, tmp_path):
    home = {"PREFECT_HOME": str(tmp_path / "prefect")}
    shop.candidate(0.6)
    done = command("--task", "emotion", "--why", "the first", **home)
    assert done.stdout == "grimace-emotion: champion is version 1, before: none\n", done.stderr
    assert "promoted emotion" in done.stderr  # the line in the log
    refused = command("--task", "emotion", "--rollback", "--why", "x", **home)
    assert refused.returncode == 1
    assert "error: grimace-emotion has no champion before version 1" in refused.stderr


def test_mistakes_are_told_clearly(monkeypatch, capsys):
    for arguments, said in (
        (["--task", "emotion"], "--task and --why are needed"),
        (["--task", "emotion", "--why", " "], "--task and --why are needed"),
        (["--task", "emotion", "--why", "x", "--force"], "unrecognized arguments: --force"),
        (["--task", "emotion", "--why", "x", "--to", "1"], "--to says where --rollback goes"),
        (
            ["--task", "emotion", "--why", "x", "--rollback", "--version", "1"],
            "a rollback goes --to a version",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["promote", *arguments])
        with pytest.raises(SystemExit):
            main()
        assert said in capsys.readouterr().err


def repository(right: float, *more: str) -> None:
    """Stages of which `verify@emotion` makes a candidate."""
    text = " ".join(["--right", str(right), *more])
    Path("made").write_text(text)
    verify = {
        "foreach": ["emotion"],
        "do": {
            "cmd": f"python {ROOT}/tests/produce.py $(cat made)",
            "deps": ["made"],
            "outs": ["deploy", "reports/verify", "reports/evaluate", "reports/select"],
        },
    }
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"verify": verify}}))


def test_retrain_ends_with_register_gate_and_promotion(shop, heard, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shop.candidate(0.6)
    shop.store().promote(1, "Ada", "the first")
    Repo.init()
    repository(0.57, "--seed", "2")
    assert stage_graph() == {
        "verify@emotion": set(),
        "register@emotion": {"verify@emotion"},
        "gate@emotion": {"register@emotion"},
    }
    assert stage_graph(["verify"]).keys() == {"verify@emotion"}  # nothing is promoted then
    state = retrain(return_state=True)
    assert state.is_completed()
    assert state.message.splitlines() == [
        "3 stages: 3 ran",
        "emotion: rejected, against the champion",
    ]
    assert "| against the champion | -0.03333 | -0.02 |" in artifacts("grimace-gates-emotion")[0]
    assert retrain(return_state=True).message == "nothing changed (3 stages)"
    assert shop.store().aliases() == {"candidate": 2, "champion": 1}

    repository(0.8, "--seed", "3")
    state = retrain(return_state=True)
    assert state.message.splitlines()[1:] == [
        "emotion: grimace-emotion: champion is version 3, before: version 1"
    ]
    # Rolled back, it does not come back by itself.
    rollback("emotion", why="blinks", who="Eve", return_state=True)
    assert retrain(return_state=True).message == "nothing changed (3 stages)"
    assert shop.store().aliases() == {"candidate": 3, "champion": 1}
    assert [body["subject"] for body in heard] == [
        "grimace.rejected emotion",
        "grimace.promoted emotion",
        "grimace.rolled_back emotion",
    ]


@pytest.mark.usefixtures("prefect_server")
def test_what_is_decided_once_stays_decided(shop):
    @flow
    def deciding() -> list[Decision]:
        return decide([StageRun("verify@emotion", "ran", 1), StageRun("gate@emotion", "ran", 1)])

    def is_settled() -> bool:
        return registry.is_settled("emotion", load_params())

    shop.candidate(0.5)
    assert not is_settled()
    said = "emotion: grimace-emotion: champion is version 1, before: none"
    assert deciding() == [(said, False)]
    assert is_settled()
    shop.change_params(lambda values: values["gate"]["emotion"].update(margin=0.01))
    assert not is_settled()  # under other bounds it may be decided otherwise
    shop.candidate(0.7, 2)
    shop.candidate(0.9, 3)
    shop.store().promote(3, "Ada", "")
    shop.store().rollback(1, "Ada", "")
    assert "version 3 was rolled back by Ada" in deciding()[0].said
    assert is_settled()
    # Another champion since it was judged: to be judged again.
    shop.candidate(0.65, 4)
    shop.store().rollback(3, "Ada", "a mistake")
    assert "judged against version 1, and now version 3 is" in deciding()[0].said
    assert not is_settled()
    # Rejected beside one champion, it may be good enough for another.
    shop.judge()
    assert deciding()[0].said.startswith("emotion: rejected, against the champion")
    assert is_settled()
    shop.store().rollback(1, "Ada", "no mistake")
    assert not is_settled()
    shop.store().client.delete_registered_model_alias("grimace-emotion", "champion")
    shop.judge()
    lost = "emotion: rejected, against the champion, slices against the champion"
    assert deciding() == [(lost, False)]
    assert not is_settled()


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("how", ["no store", "no answer"])
def test_a_store_that_is_away_decides_nothing(shop, how, monkeypatch):
    shop.candidate(0.7)
    runs = [StageRun("gate@emotion", "ran", 1)]

    @flow
    def deciding() -> State[Any]:
        return verdict(runs, decide(runs))

    with monkeypatch.context() as patch:
        if how == "no store":
            Path("file").touch()  # in which there can be no folder, whoever asks
            patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shop.root}/file/mlflow.db")
        else:

            def away(*_: object) -> None:
                raise MlflowException("the server is away")

            patch.setattr(registry.Registry, "promote", away)
        state = deciding(return_state=True)
    assert state.is_failed() and state.message.startswith("promotion failed: emotion: ")
    assert not registry.is_settled("emotion", load_params())
    assert shop.store().champion() is None
    state = deciding(return_state=True)
    assert state.message.endswith("champion is version 1, before: none")
    assert registry.is_settled("emotion", load_params())
    # Another store has not heard of it; another password makes no other store.
    shutil.copy("mlflow.db", "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shop.root}/other.db")
    assert not registry.is_settled("emotion", load_params())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ada:old@db:5432/mlflow")
    registry.settle("emotion", load_params(), None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ada:new@db:5432/mlflow")
    assert registry.is_settled("emotion", load_params())
