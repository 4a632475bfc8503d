"""Stage `download`: fetch a dataset, check it, and store it as TFDS shards in `data/raw/NAME`.

An archive is looked for in the folder that GRIMACE_ARCHIVES names, then in `data/archives/`. Where
neither has it, it is fetched into the latter from the first source of the dataset that answers, in
this order: the TFDS catalogue (`catalogue` in params.yaml), Kaggle (`kaggle`; its client finds the
credentials), plain HTTP (`url`). A download that was killed goes on where it stopped. Where only a
person can get further, at a licence or a log-in, the error says which page to open and where to put
the file. `synthetic` is drawn here and needs no archive.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from models.schemes import EMOTIONS
from pipelines import datasets
from pipelines.cli import GrimaceError, run
from pipelines.datasets.archive import Archive, open_archive
from pipelines.datasets.catalogue import fetch_listed
from pipelines.datasets.example import Example
from pipelines.datasets.fetch import by_hand, fetch, part_of
from pipelines.datasets.kaggle import fetch_from_kaggle
from pipelines.params import ArchiveSource, SyntheticSource, load_params

ARCHIVES = Path("data/archives")
RAW = Path("data/raw")
REPORTS = Path("reports/download")

_BLOCK = 1 << 20


def main() -> None:
    """Make one raw dataset and its report."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=_list_sources(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    for place in places():
        if (place / source.archive).exists():
            return open_archive(place / source.archive)
    path = ARCHIVES / source.archive
    fetchers = _fetchers(source, path)
    looked = " and ".join(str(place) for place in places())
    if not fetchers and name == datasets.OWN:
        raise GrimaceError(
            f"{source.archive} is not in {looked}: put your pictures at {path}, or name their "
            f"folder or zip file in params.yaml under download.{name}.archive; "
            f"pipelines/datasets/{name}.md says how to arrange them"
        )
    if not fetchers:
        raise GrimaceError(
            f"{source.archive} is not in {looked}, and {name} cannot be fetched without a person: "
            f"{by_hand(source.page, path)}; the unpacked folder serves too, if "
            f"download.{name}.archive in params.yaml names it"
        )
    _fetch_from_first(fetchers, path)
    try:
        return open_archive(path)
    except GrimaceError:
        path.unlink()  # otherwise the next run would find it here rather than fetch it again
        raise


def places() -> list[Path]:
    """Folders in which archives are looked for, in this order.

    Raises:
        GrimaceError: GRIMACE_ARCHIVES names no folder.
    """
    named = os.environ.get("GRIMACE_ARCHIVES")
    if named and not Path(named).is_dir():
        raise GrimaceError(f"GRIMACE_ARCHIVES names {named}, which is not a folder; correct it")
    return [*([Path(named)] if named else []), ARCHIVES]


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
        if source.sha256:  # nobody else knows the sum of a user's own pictures
            print(f"warning: {problem} If you trust it, {remedy}.", file=sys.stderr)
    return {
        "source": source.page,
        "archive": archive.path.name,
        "bytes": size,
        "sha256": digest,
        "known": known,
    }


def _list_sources() -> str:
    """Lines for `--help`: the datasets and what `find_or_fetch` tries for each."""
    try:
        download = load_params().download
    except GrimaceError as error:  # help must come also where nothing else works
        return f"the sources of the datasets stand in params.yaml, but {error}"
    lines = ["sources of the datasets, as params.yaml names them:"]
    for name in datasets.FROM_ARCHIVES:
        source: ArchiveSource = getattr(download, name)
        remote = {"TFDS": source.catalogue, "Kaggle": source.kaggle, "HTTP": source.url}
        tried = [f"{kind} {place}" for kind, place in remote.items() if place]
        lines.append(f"  {name}: {', '.join([source.archive, *tried, source.page])}")
    return "\n".join(lines)


def _fetchers(source: ArchiveSource, path: Path) -> list[Callable[[], None]]:
    """What fetches the archive to `path` without a person, in the order to try."""
    known = (
        (fetch_listed, source.catalogue),
        (fetch_from_kaggle, source.kaggle),
        (fetch, source.url),
    )
    return [partial(how, place, path, source.page) for how, place in known if place]


def _fetch_from_first(fetchers: list[Callable[[], None]], path: Path) -> None:
    """Fetch from the first source that can, and say why an earlier one could not."""
    *others, last = fetchers
    for fetcher in others:
        try:
            return fetcher()
        except GrimaceError as error:
            # What has begun is gone on with next time: another source's bytes may be others.
            if part_of(path).exists():
                raise
            print(f"warning: {error}. Now the next source is tried.", file=sys.stderr)
    return last()


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
    digests: dict[str, str] = {}
    for name in tqdm(archive.names(), desc="checksum", unit=" files", leave=False):
        content, _ = archive.read(name)
        size += len(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    return size, folder_sum(digests)


def folder_sum(digests: Mapping[str, str]) -> str:
    """Return the SHA-256 that stands for a folder, from those of its files by their names."""
    lines = "".join(f"{name}\0{digests[name]}\n" for name in sorted(digests))
    # Names need not be UTF-8; their bytes are what counts.
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


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
                word = example.label or "unlabelled"
                label = EMOTIONS[example.emotion] if example.emotion >= 0 else word
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
