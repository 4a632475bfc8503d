"""Prefect and MLflow on a real PostgreSQL, by two addresses in the environment."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import httpx
import psutil
import pytest
import yaml
from dvc.repo import Repo

ROOT = Path(__file__).parents[2]
PASSWORD = "not-to-be-seen"


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """User, password, host and port of a server with the empty databases `prefect` and `mlflow`."""
    pytest.importorskip("psycopg2", reason="the extra `postgres` is not installed")
    packaged = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = shutil.which("initdb") or (packaged[-1] if packaged else None)
    if found is None:
        pytest.skip("no PostgreSQL here; Debian has it in the package `postgresql`")
    tools = Path(found).resolve().parent
    folder = Path(mkdtemp(prefix="postgres-"))
    owner: dict[str, Any] = {}
    if os.geteuid() == 0:  # for whom PostgreSQL does not work
        owner = {"user": "postgres", "group": "postgres", "extra_groups": []}
        shutil.chown(folder, "postgres", "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def call(name: str, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [tools / name, *arguments],
            cwd=folder,
            env={"PATH": os.environ["PATH"], "PGPASSWORD": PASSWORD},
            stdout=subprocess.DEVNULL,
            **owner,
        )

    (folder / "password").write_text(PASSWORD)
    login = ["-h", "127.0.0.1", "-p", port, "-U", "grimace"]
    new = ["-D", "data", "-U", "grimace", "--pwfile", "password", "-A", "scram-sha-256"]
    text = ["--encoding", "UTF8", "--no-locale"]
    assert call("initdb", *new, *text, "--no-sync").wait() == 0
    listen = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
    server = call("postgres", "-D", "data", "-p", port, *listen, "-c", "log_min_messages=fatal")
    try:
        while call("pg_isready", *login, "-d", "postgres").wait() != 0:
            assert server.poll() is None
            time.sleep(0.1)
        for name in ("prefect", "mlflow"):
            assert call("createdb", *login, name).wait() == 0
        yield f"grimace:{PASSWORD}@127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
        shutil.rmtree(folder)


def test_two_addresses_are_all_it_takes(
    postgres: str, furnish, make_service, tmp_path: Path
) -> None:
    import psycopg2

    with chdir(tmp_path):
        furnish()
        Repo.init()
    outs = ["deploy", "reports/verify", "reports/evaluate", "reports/select"]
    verify = {"cmd": f"python {ROOT}/tests/produce.py --right 0.6", "outs": outs}
    stages = {"stages": {"verify": {"foreach": ["emotion"], "do": verify}}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(stages))
    before = (tmp_path / "mlflow.db").read_bytes()
    service = make_service(
        tmp_path,
        PREFECT_SERVER_DATABASE_CONNECTION_URL=f"postgresql+asyncpg://{postgres}/prefect",
        MLFLOW_TRACKING_URI=f"postgresql://{postgres}/mlflow",
    )
    code, output, errors = service.up()
    try:
        assert code == 0, errors
        run = service.retrained()
        assert run.state_name == "Completed", service.log()
        seen = httpx.get(
            f"{service.mlflow}/api/2.0/mlflow/registered-models/get",
            params={"name": "grimace-emotion"},
        ).json()["registered_model"]
        assert {row["alias"]: row["version"] for row in seen["aliases"]} == {
            "candidate": "1",
            "champion": "1",
        }
        everything = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
        assert not [line for line in everything if PASSWORD in " ".join(line)]
        assert PASSWORD not in output + errors
    finally:
        service.up("--stop")
    with psycopg2.connect(f"postgresql://{postgres}/prefect") as link, link.cursor() as cursor:
        cursor.execute(
            "SELECT state_name FROM flow_run WHERE parent_task_run_id IS NULL "
            "AND state_type != 'SCHEDULED'"
        )
        assert cursor.fetchall() == [("Completed",)]
    with psycopg2.connect(f"postgresql://{postgres}/mlflow") as link, link.cursor() as cursor:
        cursor.execute("SELECT source FROM model_versions")
        ((place,),) = cursor.fetchall()
    assert place.startswith((tmp_path / "mlartifacts").as_uri())
    assert (tmp_path / "mlflow.db").read_bytes() == before
    assert not (tmp_path / "prefect.db").exists()
