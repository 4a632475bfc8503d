"""Fetch archives from Kaggle through its own client library."""

from pathlib import Path

import requests

from pipelines.cli import GrimaceError
from pipelines.datasets.archive import web_page_notice
from pipelines.datasets.fetch import by_hand, fetch

_TOKEN = (
    "in your settings at https://www.kaggle.com/settings create an API token and save it as "
    "~/.kaggle/kaggle.json or ~/.kaggle/access_token, whichever you are given (or set "
    "KAGGLE_API_TOKEN, or KAGGLE_USERNAME and KAGGLE_KEY), then run the same again"
)


def fetch_from_kaggle(handle: str, target: Path, page: str) -> None:
    """Download the whole archive of a dataset or competition at Kaggle, as `fetch` does.

    Kaggle's client finds the credentials and asks for the archive's address in storage. The bytes
    are fetched here because the client, going on with a download, joins whatever it is sent, an
    error page included, and deletes the archive once it is unpacked.

    Args:
        handle: "OWNER/DATASET" or "competitions/NAME".
        target: where the archive goes.
        page: where a person gets the file, for error messages.

    Raises:
        GrimaceError: Kaggle refuses, has no such archive or cannot be reached, the credentials are
            damaged, or as `fetch`.
    """
    try:
        address = _address(handle)
    except requests.RequestException as error:
        problem = _problem(handle, page, error)
        raise GrimaceError(f"{problem}; or {by_hand(page, target)}") from None
    except ValueError as error:
        raise GrimaceError(f"{error}: {_TOKEN}") from None
    fetch(address, target, page)


def _address(handle: str) -> str:
    """Return the address in storage of an archive at Kaggle.

    Raises:
        ValueError: the file of credentials is damaged.
        requests.RequestException: Kaggle refuses or cannot be reached.
    """
    from kagglehub.clients import build_kaggle_client
    from kagglesdk.competitions.types.competition_api_service import ApiDownloadDataFilesRequest
    from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest

    owner, name = handle.split("/")
    with build_kaggle_client() as client:
        if owner == "competitions":
            files = ApiDownloadDataFilesRequest()
            files.competition_name = name
            reply = client.competitions.competition_api_client.download_data_files(files)
        else:
            dataset = ApiDownloadDatasetRequest()
            dataset.owner_slug, dataset.dataset_slug = owner, name
            reply = client.datasets.dataset_api_client.download_dataset(dataset)
        with reply:  # its body is the archive, but `fetch` may need less than all of it
            if not reply.history:  # Kaggle itself answered, rather than pass on to its storage
                notice = web_page_notice(next(reply.iter_content(1 << 16), b""))
                raise requests.HTTPError(f"a web page, {notice!r}", response=reply)
            return str(reply.url)


def _problem(handle: str, page: str, error: requests.RequestException) -> str:
    """Say why Kaggle gives no address, and what to do."""
    from kagglehub.config import get_kaggle_credentials

    if error.response is None:
        return f"Kaggle cannot be reached ({type(error).__name__}): run the same again later"
    status = error.response.status_code
    if status in (401, 403) and not get_kaggle_credentials():
        return f"Kaggle does not give {handle} to strangers ({status}): {_TOKEN}"
    if status == 401:
        return f"Kaggle does not accept your credentials ({status}): {_TOKEN}"
    if status in (200, 403):
        return (
            f"Kaggle refuses {handle} ({status}, {error}): open {page}, log in, accept its rules "
            "or terms and run the same again"
        )
    return f"Kaggle does not give {handle} ({status}, {error}): run the same again later"
