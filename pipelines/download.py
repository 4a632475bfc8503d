"""Stage `download`: fetch a dataset, check it, and store it as TFDS shards in `data/raw/NAME`.

An archive is looked for in the folder that GRIMACE_ARCHIVES names, then in `data/archives/`, then
fetched from the `url` in params.yaml. Where a licence or a log-in stands in the way, the error says
which page to open and where to put the file. `synthetic` is drawn here and needs no archive.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from models.schemes import EMOTIONS
from pipelines import datasets
from pipelines.cli import GrimaceError, run
from pipelines.datasets.archive import Archive, open_archive, web_page_notice
from pipelines.datasets.example import Example
from pipelines.params import ArchiveSource, SyntheticSource, load_params

ARCHIVES = Path("data/archives")
RAW = Path("data/raw")
REPORTS = Path("reports/download")

_ATTEMPTS = 5
_TIMEOUT_S = 60
_BLOCK = 1 << 20


def main() -> None:
    """Make one raw dataset and its report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, choices=datasets.DATASETS)
    name = parser.parse_args().dataset
    source = getattr(load_params().download, name)
    if name == datasets.GENERATED:
        examples, origin, expected = _generate(source)
    else:
        archive = find_or_fetch(name, source)
        # A wrong archive is named as such before anybody worries about its sum.
        examples, expected = datasets.examples(name, archive), None
        origin = check_sum(name, archive, source)
    counted = _store(name, examples, expected)
    REPORTS.mkdir(parents=True, exist_ok=True)
    report = REPORTS / f"{name}.json"
    report.write_text(json.dumps({"dataset": name, **origin, **counted}, indent=2) + "\n")
    print(
        f"{RAW / name}: {counted['examples']:,} examples, "
        f"{sum(counted['defects'].values()):,} of them with a defect; see {report}"
    )


def find_or_fetch(name: str, source: ArchiveSource) -> Archive:
    """Open the dataset's archive from the first place that has it.

    Raises:
        GrimaceError: no place has it, it is not an archive, or its download failed.
    """
    named = os.environ.get("GRIMACE_ARCHIVES")
    if named and not Path(named).is_dir():
        raise GrimaceError(f"GRIMACE_ARCHIVES names {named}, which is not a folder; correct it")
    places = [*([Path(named)] if named else []), ARCHIVES]
    for place in places:
        if (place / source.archive).exists():
            return open_archive(place / source.archive)
    path = ARCHIVES / source.archive
    if source.url is None:
        looked = " and ".join(str(place) for place in places)
        raise GrimaceError(
            f"{source.archive} is not in {looked}, and {name} cannot be fetched without a person: "
            f"open {source.page}, accept its terms, download the archive, put it at {path} "
            "(or in the folder that GRIMACE_ARCHIVES names) and run the same again; the unpacked "
            f"folder serves too, if download.{name}.archive in params.yaml names it"
        )
    fetch(source.url, path, source.page)
    try:
        return open_archive(path)
    except GrimaceError:
        path.unlink()  # otherwise the next run would find it here rather than fetch it again
        raise


def check_sum(name: str, archive: Archive, source: ArchiveSource) -> dict[str, Any]:
    """Compare the archive's SHA-256 with the known ones.

    Returns:
        The report's lines on where the data came from.

    Raises:
        GrimaceError: the sum is not known and `require_known` is set.
    """
    size, digest = _measure(archive)
    known = digest in source.sha256
    if not known:
        listed = ", ".join(source.sha256) or "none"
        problem = f"{archive.path} has SHA-256 {digest}; known for {name}: {listed}."
        remedy = f"add the sum to download.{name}.sha256 in params.yaml"
        if source.require_known:
            raise GrimaceError(
                f"{problem} Get the archive again from {source.page}, or, if you trust this one, "
                f"{remedy}"
            )
        print(f"warning: {problem} If you trust it, {remedy}.", file=sys.stderr)
    return {
        "source": source.page,
        "archive": archive.path.name,
        "bytes": size,
        "sha256": digest,
        "known": known,
    }


def fetch(url: str, target: Path, page: str) -> None:
    """Download a file, going on from where an earlier attempt or run stopped.

    Args:
        url: what to fetch over HTTP.
        target: where the whole file goes; until then it is `target` with ".part" added.
        page: where a person gets the file, for error messages.

    Raises:
        GrimaceError: the server refuses, sends a web page, or keeps breaking off.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    problem = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(min(2 ** (attempt - 1), 8))
        try:
            if _fetch_rest(url, part, page):
                part.rename(target)
                return
            problem = "the server broke off"
        except requests.RequestException as error:
            problem = str(error) if isinstance(error, requests.HTTPError) else type(error).__name__
    done = part.stat().st_size if part.exists() else 0
    raise GrimaceError(
        f"{url} did not come whole in {_ATTEMPTS} attempts ({problem}, {done:,} bytes so far): "
        f"run the same again to go on from there, or get the file from {page} and put it at "
        f"{target}"
    )


def _fetch_rest(url: str, part: Path, page: str) -> bool:
    """Append what is missing to `part`; return whether it is whole now."""
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
            raise GrimaceError(_refusal(url, f"answers {reply.status_code} {reply.reason}", page))
        else:
            version.unlink(missing_ok=True)
            if reply.headers.get("ETag", "").startswith('"'):  # weak ones promise too little
                version.write_text(reply.headers["ETag"])
            resumed = reply.status_code == requests.codes.partial_content
            whole = _receive(reply, part, start=done if resumed else 0, page=page)
    if whole:
        version.unlink(missing_ok=True)
    return whole


def _receive(reply: requests.Response, part: Path, start: int, page: str) -> bool:
    """Write a reply's body to `part` from byte `start` on; return whether all of it came."""
    length = reply.headers.get("Content-Length")
    total = start + int(length) if length else None
    with (
        part.open("ab" if start else "wb") as file,
        tqdm(desc=part.stem, initial=start, total=total, unit="B", unit_scale=True) as bar,
    ):
        for block in reply.iter_content(_BLOCK):
            if file.tell() == 0 and (notice := web_page_notice(block)):
                raise GrimaceError(_refusal(reply.url, f"sends a web page ({notice!r})", page))
            file.write(block)
            bar.update(len(block))
    return total is None or part.stat().st_size == total


def _refusal(url: str, what: str, page: str) -> str:
    return (
        f"{url} {what} instead of data: open {page} in a browser, log in or accept the terms "
        f"there, download the archive and put it in {ARCHIVES}"
    )


def _generate(source: SyntheticSource) -> tuple[Iterator[Example], dict[str, Any], int]:
    module = datasets.module_of(datasets.GENERATED)
    examples = module.examples(count=source.count, seed=source.seed)
    return examples, {"source": f"drawn here, seed {source.seed}"}, source.count


def _measure(archive: Archive) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file, or of a folder's names and contents in their order."""
    sum_ = hashlib.sha256()
    size = 0
    if archive.path.is_file():
        size = archive.path.stat().st_size
        with (
            archive.path.open("rb") as file,
            tqdm(desc="checksum", total=size, unit="B", unit_scale=True, leave=False) as bar,
        ):
            while block := file.read(_BLOCK):
                sum_.update(block)
                bar.update(len(block))
        return size, sum_.hexdigest()
    for name in tqdm(archive.names(), desc="checksum", unit=" files", leave=False):
        content, _ = archive.read(name)
        size += len(content)
        sum_.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return size, sum_.hexdigest()


def _store(name: str, examples: Iterable[Example], expected: int | None) -> dict[str, Any]:
    """Write the examples to `data/raw/NAME` and count what they were."""
    from pipelines.datasets.builder import write

    sound: Counter[tuple[str, str]] = Counter()
    defects: Counter[str] = Counter()
    people: set[str] = set()

    def counted() -> Iterator[Example]:
        for example in tqdm(examples, desc=f"build {name}", total=expected, unit=" images"):
            if example.defect:
                defects[example.defect] += 1
            else:
                label = EMOTIONS[example.emotion] if example.emotion >= 0 else "unlabelled"
                sound[example.official_split or "none", label] += 1
            people.add(example.person)
            yield example

    write(RAW / name, counted(), description=datasets.card(name))
    splits: dict[str, dict[str, int]] = {}
    for (split, label), number in sorted(sound.items()):
        splits.setdefault(split, {})[label] = number
    return {
        "examples": sum(sound.values()) + sum(defects.values()),
        "people": len(people - {""}),
        "official_splits": splits,
        "defects": dict(sorted(defects.items())),
    }


if __name__ == "__main__":
    run(main)
