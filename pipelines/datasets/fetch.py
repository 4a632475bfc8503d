"""Fetch a file over HTTP: whole, resumed after a kill, and never a web page in place of data."""

import time
from collections.abc import Iterable
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from urllib.parse import urlencode, urljoin

import requests
from tqdm import tqdm

from pipelines.cli import GrimaceError
from pipelines.datasets.archive import web_page_notice

_ATTEMPTS = 5
_TIMEOUT_S = 60
_BLOCK = 1 << 16  # what a kill may lose; holds the whole of a page that is no data


def fetch(url: str, target: Path, page: str) -> None:
    """Download a file, going on from where an earlier attempt or run stopped.

    A drive's question whether a file too large to scan for viruses is wanted is answered yes.

    Args:
        url: what to fetch over HTTP.
        target: where the whole file goes; until then it is `target` with ".part" added.
        page: where a person gets the file, for error messages.

    Raises:
        GrimaceError: the server refuses, sends a web page, or keeps breaking off.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(target)
    problem = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(min(2 ** (attempt - 1), 8))
        try:
            if _fetch_rest(url, part):
                part.rename(target)
                return
            problem = "the server broke off"
        except _Refused as refusal:
            raise GrimaceError(
                f"{_without_query(url)} {refusal} instead of data: {by_hand(page, target)}"
            ) from None
        except requests.RequestException as error:
            problem = str(error) if isinstance(error, requests.HTTPError) else type(error).__name__
    done = part.stat().st_size if part.exists() else 0
    raise GrimaceError(
        f"{_without_query(url)} did not come whole in {_ATTEMPTS} attempts ({problem}, {done:,} "
        f"bytes so far): run the same again to go on from there, or {by_hand(page, target)}"
    )


def part_of(target: Path) -> Path:
    """Where the file grows until it is whole."""
    return target.with_name(f"{target.name}.part")


def by_hand(page: str, target: Path) -> str:
    """Tell a person how to get the file in a browser: the end of an error message."""
    return (
        f"open {page} in a browser, log in or accept the terms there, download the archive, put it "
        f"at {target} (or, as {target.name}, in the folder that GRIMACE_ARCHIVES names) and run "
        "the same again"
    )


class _Refused(Exception):
    """The server will not send the file, however often it is asked; says what it does instead."""


def _fetch_rest(url: str, part: Path, may_confirm: bool = True) -> bool:
    """Append what is missing to `part`; return whether it is whole now.

    Raises:
        _Refused: the server answers with an error or a web page. What was there stays.
        requests.RequestException: what another attempt may mend.
    """
    version = part.with_name(f"{part.name}.etag")
    done = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
        if version.exists():  # start over rather than join the halves of two versions
            headers["If-Range"] = version.read_text()
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as reply:
        if reply.status_code == requests.codes.requested_range_not_satisfiable:
            # Either nothing is missing any more, or the file at the server is another one.
            whole = reply.headers.get("Content-Range", "").rpartition("/")[2] == str(done)
            if not whole:
                part.unlink()
        elif reply.status_code == requests.codes.too_many_requests or reply.status_code >= 500:
            raise requests.HTTPError(f"{reply.status_code} {reply.reason}")
        elif not reply.ok:
            raise _Refused(f"answers {reply.status_code} {reply.reason}")
        else:
            start = done if reply.status_code == requests.codes.partial_content else 0
            blocks = reply.iter_content(_BLOCK)
            first = next(blocks, b"")
            if start == 0 and (notice := web_page_notice(first)):
                confirmed = _confirmed(reply.url, first)
                if confirmed and may_confirm:
                    return _fetch_rest(confirmed, part, may_confirm=False)
                raise _Refused(f"sends a web page ({notice!r})")
            version.unlink(missing_ok=True)
            if reply.headers.get("ETag", "").startswith('"'):  # weak ones promise too little
                version.write_text(reply.headers["ETag"])
            whole = _receive(reply, chain([first], blocks), part, start)
    if whole:
        version.unlink(missing_ok=True)
    return whole


def _receive(reply: requests.Response, blocks: Iterable[bytes], part: Path, start: int) -> bool:
    """Write a reply's body to `part` from byte `start` on; return whether all of it came."""
    length = reply.headers.get("Content-Length")
    total = start + int(length) if length else None
    with (
        part.open("ab" if start else "wb") as file,
        tqdm(desc=part.stem, initial=start, total=total, unit="B", unit_scale=True) as bar,
    ):
        for block in blocks:
            file.write(block)
            bar.update(len(block))
    return total is None or part.stat().st_size == total


def _confirmed(url: str, page: bytes) -> str:
    """Where a drive's "too large to scan for viruses" page leads to, "" for any other page."""
    form = _Form()
    form.feed(page.decode("utf-8", "replace"))
    if "confirm" not in form.fields:
        return ""
    return f"{urljoin(url, form.action)}?{urlencode(form.fields)}"


class _Form(HTMLParser):
    """The fields of a web page's form, and the address that they are to be sent to."""

    def __init__(self) -> None:
        super().__init__()
        self.action = ""
        self.fields: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.action = values.get("action", "")
        elif tag == "input" and "name" in values:
            self.fields[values["name"]] = values.get("value", "")


def _without_query(url: str) -> str:
    """The address without what may be a signature that lets anybody in."""
    return url.partition("?")[0]
