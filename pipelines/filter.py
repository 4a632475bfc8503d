"""Stage `filter`: drop what cannot be learnt from, and list every drop with its reason.

Checks, in this order, the first that fires giving the reason:
  defect      the source's own row is unusable (said by the dataset's builder)
  unreadable  the picture does not decode
  blank       its grey levels hardly vary
  exact_duplicate  its pixels equal those of an example that is kept
Of equal pictures the one in the official test split stays, else validation, else training; else
the one with the smallest id. So a training copy of a test image leaves, never the other way.
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from models.schemes import EMOTIONS
from pipelines.checks import Finding
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.crops import UnreadableImageError, decode
from pipelines.datasets.builder import count as number_of_examples
from pipelines.datasets.builder import read
from pipelines.datasets.example import Example
from pipelines.datasets.table import write_examples
from pipelines.params import Checks, load_params
from pipelines.sheets import contact_sheet

SPLIT_PRIORITY = {"test": 0, "val": 1, "train": 2, "": 3}


def main() -> None:
    """Audit the raw dataset, write the clean one and the findings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="a dataset that `download` has fetched")
    args = parser.parse_args()
    params = load_params().filter.checks_of(args.dataset)
    raw = Path("data/raw", args.dataset)

    findings = audit(read(raw), params)
    dropped = {finding.id for finding in findings}
    with whole_folder(Path("data/clean", args.dataset)) as clean:
        kept = (example for example in read(raw) if example.id not in dropped)
        count = write_examples(kept, clean)
        if count + len(findings) != number_of_examples(raw):
            raise GrimaceError(f"{raw}: kept and dropped do not add up; its ids are not unique")
        if not count:
            first = findings[0]
            raise GrimaceError(
                f"filter dropped every example of {args.dataset}; the first, {first.id}, as "
                f"{first.check}: {first.evidence}. Check the archive, and `filter` in params.yaml"
            )
    report = Path("reports/filter", args.dataset)
    with whole_folder(report) as partial:
        summary = write_report(findings, raw, count, partial)
    report.with_suffix(".json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


def audit(examples: Iterable[Example], params: Checks) -> list[Finding]:
    """Judge every example; memory grows with the number of examples, not with their pictures.

    Returns:
        Findings in the order of the examples, at most one for each.
    """
    findings: dict[str, Finding] = {}
    twins: dict[bytes, list[tuple[int, str]]] = {}
    order: list[str] = []
    for example in examples:
        order.append(example.id)
        finding, digest = _judge(example, params)
        if finding:
            findings[example.id] = finding
        elif params.exact_duplicate.action != "off":
            rank = SPLIT_PRIORITY[example.official_split]
            twins.setdefault(digest, []).append((rank, example.id))
    for group in twins.values():
        (_, kept), *others = sorted(group)
        for _, other in others:
            evidence = f"same pixels as {kept}, which is kept"
            findings[other] = Finding(other, "exact_duplicate", 1.0, 1.0, "drop", evidence)
    return [findings[id] for id in order if id in findings]


def _judge(example: Example, params: Checks) -> tuple[Finding | None, bytes]:
    """Return the finding that one example gives by itself, and a digest of its pixels."""
    nan = float("nan")
    if example.defect:
        return Finding(example.id, "defect", nan, nan, "drop", example.defect), b""
    try:
        pixels = decode(example.image, 3)
    except UnreadableImageError as error:
        return Finding(example.id, "unreadable", nan, nan, "drop", str(error)), b""
    spread = float(pixels.std(axis=(0, 1)).max())
    if spread < params.blank.std:
        evidence = f"grey levels vary by {spread:.2f} of 255"
        bound = params.blank.std
        return Finding(example.id, "blank", spread, bound, "drop", evidence), b""
    return None, hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()


def write_report(findings: list[Finding], raw: Path, kept: int, out: Path) -> dict[str, Any]:
    """Write findings, kept examples by class and one contact sheet a check; return counts."""
    columns = list(Finding.__dataclass_fields__)
    table = pd.DataFrame([asdict(finding) for finding in findings], columns=columns)
    table.to_parquet(out / "findings.parquet", index=False)
    table.to_csv(out / "findings.csv", index=False)
    reasons = Counter(finding.check for finding in findings)
    wanted = {f.id: f.check for f in findings if f.check not in ("defect", "unreadable")}
    shown: dict[str, list[Example]] = {}
    dropped = {finding.id for finding in findings}
    classes: Counter[str] = Counter()
    for example in read(raw):
        if example.id not in dropped:
            classes[EMOTIONS[example.emotion] if example.emotion >= 0 else "unlabelled"] += 1
        elif example.id in wanted and len(shown.setdefault(wanted[example.id], [])) < 48:
            shown[wanted[example.id]].append(example)
    for check, examples in shown.items():
        contact_sheet(
            [decode(example.image, 3) for example in examples],
            [example.id for example in examples],
            out / f"{check}.png",
            title=f"{raw.name}: {check}, {len(examples)} of {reasons[check]}",
        )
    by_class = pd.DataFrame(sorted(classes.items()), columns=["class", "kept"])
    by_class.to_csv(out / "classes.csv", index=False)
    return {
        "raw": kept + len(findings),
        "kept": kept,
        "dropped": len(findings),
        "dropped_by_check": dict(sorted(reasons.items())),
    }


if __name__ == "__main__":
    run(main)
