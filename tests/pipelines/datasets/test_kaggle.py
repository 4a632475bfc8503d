import base64
import json
from pathlib import Path

import pytest
from kagglesdk import kaggle_env

from pipelines.cli import GrimaceError
from pipelines.datasets.kaggle import fetch_from_kaggle

PAGE = "https://example.org/dataset"
TARGET = Path("archives/fer2013.zip")
DATASET = "/api/v1/datasets.DatasetApiService/DownloadDataset"
COMPETITION = "/api/v1/competitions.CompetitionApiService/DownloadDataFiles"
STORED = "/storage/archive.zip?signature=secret"


@pytest.fixture(autouse=True)
def kaggle(server, elsewhere, monkeypatch):
    """Kaggle's client asks the server of the test, and finds no credentials on this machine."""
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, server.root)
    monkeypatch.setenv("HOME", str(elsewhere))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(elsewhere / ".kaggle"))
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    server.content = bytes(range(256)) * 20_000
    server.posted[DATASET] = server.posted[COMPETITION] = (302, {"Location": STORED}, b"")


def credentials_file() -> None:
    Path(".kaggle").mkdir()
    Path(".kaggle/kaggle.json").write_text(json.dumps({"username": "ann", "key": "k"}))


def refuse(server, status: int, message: str) -> None:
    body = json.dumps({"code": status, "message": message}).encode()
    server.posted[DATASET] = server.posted[COMPETITION] = (
        status,
        {"Content-Type": "application/json"},
        body,
    )


def refusal(handle: str = "owner/faces") -> str:
    with pytest.raises(GrimaceError) as raised:
        fetch_from_kaggle(handle, TARGET, PAGE)
    assert not TARGET.exists()
    return str(raised.value)


def assert_says_what_to_do_by_hand(message: str) -> None:
    for part in (PAGE, str(TARGET), "GRIMACE_ARCHIVES"):
        assert part in message


def test_dataset_comes_whole_as_the_archive_it_is(server):
    credentials_file()
    fetch_from_kaggle("owner/faces", TARGET, PAGE)
    assert TARGET.read_bytes() == server.content
    assert [path.name for path in TARGET.parent.iterdir()] == [TARGET.name]
    assert server.paths[0] == DATASET
    assert json.loads(server.bodies[0]) == {"ownerSlug": "owner", "datasetSlug": "faces"}


def test_competition_is_asked_for_by_its_name(server):
    credentials_file()
    fetch_from_kaggle("competitions/keypoints", TARGET, PAGE)
    assert TARGET.read_bytes() == server.content
    assert server.paths[0] == COMPETITION
    assert json.loads(server.bodies[0]) == {"competitionName": "keypoints"}


def test_credentials_come_from_the_usual_places_and_go_to_kaggle_only(server, monkeypatch):
    basic = "Basic " + base64.b64encode(b"ann:k").decode()
    fetch_from_kaggle("owner/faces", TARGET, PAGE)  # without any, as for open datasets
    credentials_file()
    fetch_from_kaggle("owner/faces", TARGET, PAGE)
    Path(".kaggle/kaggle.json").unlink()
    monkeypatch.setenv("KAGGLE_USERNAME", "ann")
    monkeypatch.setenv("KAGGLE_KEY", "k")
    fetch_from_kaggle("owner/faces", TARGET, PAGE)
    monkeypatch.setenv("KAGGLE_API_TOKEN", "token")
    fetch_from_kaggle("owner/faces", TARGET, PAGE)
    asked = zip(server.paths, server.requests, strict=True)
    sent = [headers.get("Authorization") for path, headers in asked if path == DATASET]
    assert sent == [None, basic, basic, "Bearer token"]
    assert "Authorization" not in server.requests[-1]


def test_broken_off_transfer_goes_on_where_it_stopped(server):
    server.break_off_after = 3_000_000
    fetch_from_kaggle("owner/faces", TARGET, PAGE)
    assert TARGET.read_bytes() == server.content
    assert int(server.requests[-1]["Range"].removeprefix("bytes=").removesuffix("-")) > 2_900_000


def test_later_run_goes_on_from_what_a_killed_one_left(server):
    TARGET.parent.mkdir()
    Path(f"{TARGET}.part").write_bytes(server.content[:3_000_000])
    Path(f"{TARGET}.part.etag").write_text(server.etag)
    # The address in storage is signed anew each time.
    server.posted[DATASET] = (302, {"Location": "/storage/archive.zip?signature=other"}, b"")
    fetch_from_kaggle("owner/faces", TARGET, PAGE)
    assert TARGET.read_bytes() == server.content
    assert server.paths[-1] == "/storage/archive.zip?signature=other"
    assert server.requests[-1]["Range"] == "bytes=3000000-"
    assert server.requests[-1]["If-Range"] == server.etag


@pytest.mark.parametrize("status", [401, 403])
def test_without_credentials_it_says_how_to_make_a_token(server, status):
    refuse(server, status, "Unauthenticated")
    message = refusal("competitions/keypoints")
    for part in (
        "competitions/keypoints",
        "https://www.kaggle.com/settings",
        "kaggle.json",
        "KAGGLE_API_TOKEN",
    ):
        assert part in message
    assert_says_what_to_do_by_hand(message)


def test_credentials_that_are_not_accepted(server):
    credentials_file()
    refuse(server, 401, "Unauthenticated")
    message = refusal()
    assert "does not accept your credentials" in message
    assert "create an API token" in message
    assert_says_what_to_do_by_hand(message)


def test_rules_that_nobody_has_accepted(server):
    credentials_file()
    refuse(server, 403, "You must accept this competition's rules before you'll be able to go on.")
    message = refusal("competitions/keypoints")
    assert "You must accept this competition's rules" in message
    assert f"open {PAGE}, log in, accept its rules" in message
    assert "API token" not in message
    assert_says_what_to_do_by_hand(message)


def test_web_page_from_kaggle_itself(server):
    page = b"<html><head><title>Rules | Kaggle</title></head></html>"
    server.posted[DATASET] = (200, {"Content-Type": "text/html"}, page)
    message = refusal()
    assert "'Rules | Kaggle'" in message
    assert_says_what_to_do_by_hand(message)


def test_web_page_from_its_storage(server):
    server.content = b"<html><head><title>Login | Kaggle</title></head></html>"
    message = refusal()
    assert "'Login | Kaggle'" in message
    assert "secret" not in message
    assert_says_what_to_do_by_hand(message)
    assert list(TARGET.parent.iterdir()) == []


def test_dataset_that_is_not_there(server):
    credentials_file()
    refuse(server, 404, "Dataset not found")
    message = refusal()
    assert "404, Dataset not found" in message
    assert_says_what_to_do_by_hand(message)


def test_damaged_credentials(server):
    credentials_file()
    Path(".kaggle/kaggle.json").write_text("{")
    message = refusal()
    assert ".kaggle/kaggle.json" in message
    assert "create an API token" in message
    assert server.requests == []


def test_kaggle_out_of_reach(server, monkeypatch):
    endpoints = kaggle_env._env_to_endpoint
    monkeypatch.setitem(endpoints, kaggle_env.KaggleEnv.LOCAL, "http://127.0.0.1:1")
    message = refusal()
    assert "cannot be reached (ConnectionError)" in message
    assert_says_what_to_do_by_hand(message)
