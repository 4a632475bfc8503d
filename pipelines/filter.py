"""Stage `filter`: audit a dataset; drop, flag or weigh down what cannot be trusted, and say why.

In the graph it reads data/raw/NAME, writes the examples that are kept to data/clean/NAME and the
audit to reports/filter/NAME. With --archive it audits any archive, and writes the audit alone:
  findings.parquet, .csv  one row a finding: id, check, score, threshold, action, evidence, weight
  examples.parquet        one row an example: all measures, its cluster, whether it is kept
  classes.csv             examples by class, before and after
  report.html             all of that to look at
The checks, and what each does, stand in params.yaml under `filter`.
"""

# A spawned worker imports this module too, so what only the parent needs is imported inside.
import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipelines.cli import GrimaceError, run, whole_folder

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from pipelines.checks import Finding
    from pipelines.checks.judge import Kept
    from pipelines.datasets.example import Example
    from pipelines.params import Checks

    Pictures = dict[str, list[tuple[str, np.ndarray]]]

CHUNK = 512  # examples a task: a second of work, far more than handing them over costs
SHEET = 48  # pictures shown for a check
SHOWN_SIDE = 112  # pixels of a shown picture, at most
COPIES = ("exact_duplicate", "near_duplicate")  # the checks that find clusters

# What `pipelines.checks.measures.measure` imports.
MEASURING = (
    "ai_edge_litert.interpreter",
    "pandas",
    "pipelines.checks.duplicates",
    "pipelines.checks.faces",
    "pipelines.checks.image",
    "pipelines.checks.landmarks",
    "pipelines.checks.measures",
)

Read = Callable[[], Iterator["Example"]]


def main() -> None:
    """Audit the dataset; in the graph, write the clean one."""
    from pipelines.fanout import start_server
    from pipelines.params import load_params

    args = _arguments()
    params = load_params()
    workers = params.filter.workers if args.workers is None else args.workers
    workers = workers or len(os.sched_getaffinity(0))
    if workers > 1 and params.cluster.address is None:
        start_server(MEASURING)
    from pipelines.checks.judge import judge

    checks = params.filter.checks_of(args.dataset)
    restore = params.filter.restore.get(args.dataset, ())
    report: Path = args.out or Path("reports/filter", args.dataset)
    read, total = _source(args.dataset, args.archive)
    _refuse_other_folder(report)

    previous = report / "examples.parquet"
    with TemporaryDirectory(prefix="grimace-filter-") as scratch:
        measures, kept = measure_all(
            read,
            detectors=checks.no_face.detectors,
            workers=workers,
            address=params.cluster.address,
            previous=previous,
            scratch=Path(scratch),
            total=total,
        )
        table, findings = judge(measures, kept, checks, restore, workers, _earlier_table(previous))

    _refuse_nothing_kept(table, findings, args.dataset)
    if not args.archive:  # which may be a part of the dataset, or another packing of it
        _refuse_unknown(restore, table, args.dataset)
        _refuse_unusable(table, args.dataset)
        write_clean(read, table, Path("data/clean", args.dataset))
    show = params.filter.pictures and not args.no_pictures
    command = shlex.join(["uv", "run", "python", "-m", "pipelines.filter", *sys.argv[1:]])
    pictures = collect_pictures(read, table, findings) if show else {}
    counts = summary(table, findings)
    with whole_folder(report) as partial_report:
        write_report(partial_report, args.dataset, table, findings, pictures, checks, command)
    if not args.archive:
        report.with_suffix(".json").write_text(json.dumps(counts, indent=2) + "\n")
    _print(counts, checks, report)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="its name, as under `download` in params")
    parser.add_argument("--archive", type=Path, help="zip, folder or CSV to audit, instead of raw")
    parser.add_argument("--out", type=Path, help="where the audit of --archive goes")
    parser.add_argument("--workers", type=int, help="processes (default: filter.workers)")
    parser.add_argument("--no-pictures", action="store_true", help="a report without any picture")
    args = parser.parse_args()
    if (args.archive is None) != (args.out is None):
        parser.error("--archive and --out go together")
    if args.workers is not None and args.workers < 0:
        parser.error("--workers must be 0 (every core) or more")
    return args


def _source(dataset: str, archive: Path | None) -> tuple[Read, int | None]:
    """Return what reads the examples anew, and their number where that is known beforehand."""
    if archive:
        from pipelines.datasets import examples
        from pipelines.datasets.archive import open_archive

        opened = open_archive(archive)
        return lambda: examples(dataset, opened), None
    from pipelines.datasets import builder

    raw = Path("data/raw", dataset)
    return lambda: builder.read(raw), builder.count(raw)


def measure_all(
    read: Read,
    *,
    detectors: tuple[str, ...],
    workers: int,
    address: str | None,
    previous: Path,
    scratch: Path,
    total: int | None = None,
) -> "tuple[pd.DataFrame, Kept]":
    """Measure every example once, and keep of its picture only what judging it needs.

    Args:
        read: yields the examples.
        detectors: of faces.
        workers: processes.
        address: of a Ray cluster, or None.
        previous: the table of an earlier audit; rows of unchanged examples are taken over.
        scratch: a folder for the small pictures, which are mapped, not loaded.
        total: number of examples, for the progress bar.

    Raises:
        GrimaceError: there are no examples, or their ids are not unique.
    """
    import numpy as np
    import pandas as pd
    from tqdm import tqdm

    from pipelines.checks import duplicates
    from pipelines.checks.faces import labelled_box
    from pipelines.checks.judge import DERIVED, Kept
    from pipelines.checks.measures import FACE_SIDE, digest, measure, settings_digest
    from pipelines.fanout import fan_out

    earlier = _earlier_table(previous)
    known = pd.DataFrame() if earlier is None else earlier.drop(columns=DERIVED)
    known.index = pd.Index([] if earlier is None else earlier["digest"].tolist())
    settings = settings_digest(detectors)
    ids: list[str] = []
    order: list[str] = []
    landmarks: list[np.ndarray] = []
    visible: list[np.ndarray] = []
    boxes: list[Sequence[float]] = []

    def keyed() -> Iterator[tuple["Example", str, bool]]:
        for example in read():
            key = digest(example, settings)
            ids.append(example.id)
            order.append(key)
            landmarks.append(example.landmarks)
            visible.append(example.visible)
            boxes.append(labelled_box(example) or (math.nan,) * 4)
            yield example, key, key in known.index

    chunks = _chunked(keyed())
    first = list(islice(chunks, 2))
    if len(first) < 2:
        workers = 1  # quicker done than another process is started
    results = fan_out(
        partial(measure, detectors=detectors),
        chain(first, chunks),
        workers,
        address,
    )
    frames = []
    sides = {"coarse": duplicates.COARSE_SIDE, "sharp": duplicates.SIDE, "faces": FACE_SIDE}
    with ExitStack() as stack:
        files = {name: stack.enter_context((scratch / name).open("wb")) for name in sides}
        progress = stack.enter_context(tqdm(total=total, desc="measuring", unit=" examples"))
        for result in results:
            frames.append(result.rows.set_index(result.rows["digest"].rename(None)))
            for name, file in files.items():
                file.write(getattr(result, name).tobytes())
            progress.update(len(result.faces))
    if not ids:
        raise GrimaceError("there is no example to filter: check the archive")
    if len(set(ids)) < len(ids):
        raise GrimaceError("ids are not unique; fetch the dataset anew")
    pictures = {
        name: np.memmap(scratch / name, np.uint8, "r", shape=(len(ids), side, side))
        for name, side in sides.items()
    }
    taken_over = known[known.index.isin(order)]
    rows = pd.concat([taken_over, *frames] if len(taken_over) else frames)
    return rows.loc[order].reset_index(drop=True), Kept(
        **pictures, landmarks=landmarks, visible=visible, boxes=np.array(boxes, np.float64)
    )


def _earlier_table(path: Path) -> "pd.DataFrame | None":
    """Return the table of an earlier audit, None where there is none of the present form."""
    import pandas as pd

    from pipelines.checks.judge import DERIVED

    if not path.exists():
        return None
    table = pd.read_parquet(path)
    return table if {"digest", *DERIVED} <= {*table.columns} else None


def _chunked(stream: Iterator[Any]) -> Iterator[list[Any]]:
    while chunk := list(islice(stream, CHUNK)):
        yield chunk


def write_clean(read: Read, table: "pd.DataFrame", folder: Path) -> None:
    """Write the examples that are kept, with their cluster and weight.

    Raises:
        GrimaceError: the data changed meanwhile.
    """
    from pipelines.datasets.table import write_examples

    kept = table[table["kept"]]
    fates = dict(zip(kept["id"], zip(kept["cluster"], kept["weight"], strict=True), strict=True))
    with whole_folder(folder) as clean:
        examples = (
            replace(example, cluster=fates[example.id][0], weight=fates[example.id][1])
            for example in read()
            if example.id in fates
        )
        if write_examples(examples, clean) != len(kept):
            raise GrimaceError(f"kept and dropped do not add up: the raw data of {folder} changed")


def collect_pictures(
    read: Read, table: "pd.DataFrame", findings: "Sequence[Finding]"
) -> "Pictures":
    """Collect small pictures of what each check found, at most 48 each.

    Returns:
        By check, captions (id, class, score, and whether it is dropped) and uint8 (H, W, 3)
        pictures of at most 112 pixels; landmarks are drawn where they are what was judged.
    """
    from pipelines.crops import UnreadableImageError, decode

    wanted: dict[str, list[tuple[str, int]]] = {}
    chosen = choose_pictures(table, findings)
    for check, ids in chosen.items():
        for place, id in enumerate(ids):
            wanted.setdefault(id, []).append((check, place))
    rows = table.set_index("id")[["class", "kept"]].to_dict("index")
    scores = {(finding.check, finding.id): finding.score for finding in findings}
    found: dict[str, dict[int, tuple[str, np.ndarray]]] = {check: {} for check in chosen}
    for example in read():
        if example.id not in wanted:
            continue
        try:
            rgb = decode(example.image, 3)
        except UnreadableImageError:
            continue
        for check, place in wanted[example.id]:
            drawn = check.startswith("landmarks")
            score = scores.get((check, example.id), math.nan)
            caption = _caption(example.id, rows[example.id], score)
            found[check][place] = (caption, _thumbnail(rgb, example if drawn else None))
    return {
        check: [pictures[place] for place in sorted(pictures)]
        for check, pictures in found.items()
        if pictures
    }


def choose_pictures(table: "pd.DataFrame", findings: "Sequence[Finding]") -> dict[str, list[str]]:
    """Choose what to show of each check: evenly from its lowest score to its highest.

    Copies stand beside each other, at most four of a kind.
    """
    import numpy as np

    by_check: dict[str, list[Finding]] = {}
    for finding in findings:
        by_check.setdefault(finding.check, []).append(finding)
    alike = {"exact_duplicate": "pixels", "near_duplicate": "cluster", "label_conflict": "cluster"}
    chosen: dict[str, list[str]] = {}
    for check, found in by_check.items():
        ids = [finding.id for finding in sorted(found, key=lambda finding: finding.score)]
        if check in alike:
            kind = table.set_index("id")[alike[check]]
            members = kind.groupby(kind).groups
            groups = [list(members[name])[:4] for name in kind[ids].unique()]
            even = np.linspace(0, len(groups) - 1, min(SHEET // 2, len(groups))).round().astype(int)
            ids = [id for place in even for id in groups[place]][:SHEET]
        even = np.linspace(0, len(ids) - 1, min(SHEET, len(ids))).round().astype(int)
        chosen[check] = [ids[place] for place in even]
    return chosen


def _caption(id: str, row: dict[Hashable, Any], score: float) -> str:
    label = "" if row["class"] == "unlabelled" else row["class"]
    shown = "" if math.isnan(score) else f"{score:.2f}"
    return " ".join(filter(None, [id, label, shown, "" if row["kept"] else "dropped"]))


def _thumbnail(rgb: "np.ndarray", drawn: "Example | None") -> "np.ndarray":
    import cv2

    scale = SHOWN_SIDE / max(rgb.shape[:2])
    if scale < 1 or drawn:  # points want room
        size = (max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale)))
        rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    if drawn:
        rgb = rgb.copy()
        for x, y in (drawn.landmarks[drawn.visible] + 0.5) * scale - 0.5:
            cv2.circle(rgb, (round(float(x)), round(float(y))), 1, (0, 255, 0), -1)
    return rgb


def summary(table: "pd.DataFrame", findings: "Sequence[Finding]") -> dict[str, Any]:
    """Return the counts that stand beside the report."""
    import pandas as pd

    def by_check(checks: "pd.Series[str]") -> dict[str, int]:
        return {str(name): int(number) for name, number in sorted(checks.value_counts().items())}

    return {
        "raw": len(table),
        "kept": int(table["kept"].sum()),
        "dropped": int((~table["kept"]).sum()),
        "weighted": int((table["kept"] & (table["weight"] < 1)).sum()),
        "seed_kept": int(table["seed_kept"].sum()),
        "dropped_by_check": by_check(table.loc[~table["kept"], "reason"]),
        "found_by_check": by_check(pd.Series([finding.check for finding in findings], dtype=str)),
    }


def write_report(
    folder: Path,
    dataset: str,
    table: "pd.DataFrame",
    findings: "Sequence[Finding]",
    pictures: "Pictures",
    checks: "Checks",
    command: str = "",
) -> None:
    """Write the tables and the page of an audit; the page quotes the command that made it."""
    import pandas as pd

    from pipelines.checks import Finding
    from pipelines.pages.audit import write_audit

    columns = list(Finding.__dataclass_fields__)
    numbers = dict.fromkeys(("score", "threshold", "weight"), "float64")
    listed = pd.DataFrame([asdict(finding) for finding in findings], columns=columns)
    listed = listed.astype(dict.fromkeys(columns, "str") | numbers)
    listed.to_parquet(folder / "findings.parquet", index=False)
    listed.to_csv(folder / "findings.csv", index=False)
    table.to_parquet(folder / "examples.parquet", index=False)
    classes = table.groupby("class").agg(raw=("id", "size"), kept=("kept", "sum"))
    classes.to_csv(folder / "classes.csv")
    write_audit(
        folder / "report.html",
        dataset=dataset,
        table=table,
        findings=listed,
        pictures=pictures,
        checks=checks,
        command=command,
    )


def _refuse_other_folder(folder: Path) -> None:
    """Keep a mistyped --out from replacing a folder that is no audit."""
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not (folder / "findings.parquet").exists():
        raise GrimaceError(f"{folder} is there and holds no audit: name a new folder")


def _refuse_nothing_kept(
    table: "pd.DataFrame", findings: "Sequence[Finding]", dataset: str
) -> None:
    if table["kept"].any():
        return
    first = next(finding for finding in findings if finding.action == "drop")
    raise GrimaceError(
        f"filter dropped every example of {dataset}; the first, {first.id}, as "
        f"{first.check}: {first.evidence}. Check the archive, and `filter` in params.yaml"
    )


def _refuse_unknown(restore: Sequence[str], table: "pd.DataFrame", dataset: str) -> None:
    if unknown := sorted(set(restore) - set(table["id"])):
        raise GrimaceError(
            f"params.yaml: filter.restore.{dataset} names ids that are not in it: "
            f"{', '.join(unknown[:5])}"
        )


def _refuse_unusable(table: "pd.DataFrame", dataset: str) -> None:
    """Refuse to pass on what no later stage can read."""
    unusable = table[table["kept"] & ((table["defect"] != "") | (table["unreadable"] != ""))]
    if len(unusable):
        first = unusable.iloc[0]
        raise GrimaceError(
            f"{dataset}: {first['id']} cannot be kept, no later stage can use it "
            f"({first['defect'] or first['unreadable']}). In params.yaml, let filter.checks.defect "
            "and unreadable drop, and take such ids out of filter.restore"
        )


def _print(counts: dict[str, Any], checks: "Checks", report: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    title = "{raw:,} examples: {kept:,} kept, {dropped:,} dropped, {weighted:,} weighed down; "
    title += "the cascade of the projects before this one would have kept {seed_kept:,}"
    print(title.format(**counts))
    shown = Table()
    for column in ("check", "action", "found", "dropped"):
        shown.add_column(column, justify="left" if column in ("check", "action") else "right")
    for name in type(checks).model_fields:
        found = counts["found_by_check"].get(name, 0)
        dropped = counts["dropped_by_check"].get(name, 0)
        shown.add_row(name, getattr(checks, name).action, f"{found:,}", f"{dropped:,}")
    Console().print(shown)
    print(f"the report: {report / 'report.html'}")
    off = [name for name in COPIES if getattr(checks, name).action == "off"]
    if off:
        print(
            f"warning: {' and '.join(off)} is off: such copies are not known to each other, so "
            "`split` cannot keep them on one side",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(main)
