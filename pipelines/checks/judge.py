"""Turn measures into findings: which examples to drop, flag or weigh down, and why.

What needs the whole dataset is done here: copies, the shape model, out-of-fold predictions.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from pipelines.checks import FACTS, Finding, duplicates
from pipelines.checks.landmarks import implausible
from pipelines.families import families
from pipelines.params import Above, Below, Check, Checks, Mislabelled

NAN = float("nan")
SEED = 2026  # of the folds

# What doubting labels depends on besides the examples.
LABEL_SOURCES = ("pipelines/checks/labels.py", "models/backbones.py")
LABEL_LIBRARIES = (
    "cleanlab",
    "keras",
    "numpy",
    "opencv-python-headless",
    "scikit-learn",
    "tensorflow",
)

# The columns that judging adds to the measures.
LABEL_COLUMNS = ["label_quality", "label_doubted", "label_key"]
DERIVED = ["landmarks_implausible", *LABEL_COLUMNS, "cluster", "kept", "weight", "reason"]

# Of equal pictures the one in the official test split stays, else validation, else training.
PRIORITY = {"test": 0, "val": 1, "train": 2, "": 3}
HELD_OUT = ("test", "val")

# Checks that compare a column with their threshold, and what the evidence says of its value.
COMPARED = {
    "dark": ("dark", "its brightest parts reach {:.2f} of 1"),
    "bright": ("bright", "its darkest parts reach {:.2f} of 1"),
    "low_information": ("low_information", "holds {:.2f} of the information a picture can"),
    "blurred": ("blurred", "sharpness {:.2f} of 1"),
    "small_face": ("face_size", "the face is {:.0f} pixels long"),
    "cut_off": ("cut_off", "{:.0%} of the face box lies outside the picture"),
    "landmarks_outside": ("landmarks_outside", "{:.0%} of the points lie outside the picture"),
    "landmarks_implausible": (
        "landmarks_implausible",
        "{:.1f} robust standard deviations from the usual shapes",
    ),
}
# Checks that are 1 in a column of their own name where they fire.
MARKED = {
    "landmarks_folded": "the landmarks fold over each other",
    "landmarks_mirrored": "left and right landmarks are swapped",
}


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of n examples besides their measures, in the same order.

    Attributes:
        coarse: uint8 (n, 8, 8), the whole pictures in grey.
        sharp: uint8 (n, 32, 32), their details.
        faces: uint8 (n, S, S), the face crops in grey.
        landmarks: float (N, 2) each, pixels.
        visible: bool (N,) each.
        boxes: float (n, 4), where the sources say the faces are: left, top, right, bottom in
            pixels; NaN where they do not.
    """

    coarse: np.ndarray
    sharp: np.ndarray
    faces: np.ndarray
    landmarks: Sequence[np.ndarray]
    visible: Sequence[np.ndarray]
    boxes: np.ndarray


def judge(
    measures: pd.DataFrame,
    kept: Kept,
    checks: Checks,
    restore: Sequence[str] = (),
    workers: int = 1,
    earlier: pd.DataFrame | None = None,
) -> tuple[pd.DataFrame, list[Finding]]:
    """Judge all examples of a dataset.

    Args:
        measures: n rows, as `pipelines.checks.measures` makes them.
        kept: of the same examples.
        checks: what to look for, and what to do about it.
        restore: ids that stay, with full weight.
        workers: threads; the result does not depend on it.
        earlier: what an earlier call returned first, or its `id` and `LABEL_COLUMNS`. Labels are
            not judged again where all that this depends on is the same.

    Returns:
        The measures with more columns: `landmarks_implausible`; `label_quality`, `label_doubted`
        (bool) and `label_key`, which stands for all that the two depend on; `cluster`,
        `kept` (bool), `weight`, and `reason` (the first check that drops it, else ""); and the
        findings, in the order of the checks and then of the examples.
    """
    table = measures.reset_index(drop=True)
    findings = [*_unusable(table, checks), *_blank(table, checks)]
    readable = table[table["std"].notna()]
    sound = readable[~readable["id"].isin(_dropped(findings, restore))]
    copies, table["cluster"] = _copies(table, readable, sound, kept, checks, workers)
    findings += copies
    findings += _no_face(table, checks)
    table["landmarks_implausible"] = _implausible(table, kept, checks)
    for name, (column, words) in COMPARED.items():
        findings += _beyond(table, name, getattr(checks, name), column, words)
    for name, words in MARKED.items():
        marked = table[table[name] == 1]
        findings += _found(marked, name, getattr(checks, name), [words] * len(marked))
    candidates = sound[~sound["id"].isin(_dropped(findings, restore))]
    table[LABEL_COLUMNS] = _label_columns(table, candidates, kept, checks, earlier)
    findings += _mislabelled(table, checks)
    findings = _restored(findings, restore)
    return _decided(table, findings), _in_order(findings, table)


def _found(
    rows: pd.DataFrame,
    check: str,
    rule: Check,
    evidence: Sequence[str],
    score: Sequence[float] | None = None,
    threshold: float = NAN,
) -> list[Finding]:
    """Make one finding a row; none where the check is off."""
    if rule.action == "off":
        return []
    scores = [NAN] * len(rows) if score is None else score
    findings = []
    for id, split, value, words in zip(
        rows["id"], rows["official_split"], scores, evidence, strict=True
    ):
        action, text = rule.action, words
        if split in HELD_OUT and check not in FACTS and action != "flag":
            action, text = "flag", f"{words} (only flagged: in the official {split} split)"
        weight = rule.weight if action == "weight" else 1.0
        findings.append(Finding(id, check, float(value), threshold, action, text, weight))
    return findings


def _dropped(findings: Sequence[Finding], restore: Sequence[str]) -> set[str]:
    return {finding.id for finding in findings if finding.action == "drop"} - set(restore)


def _unusable(table: pd.DataFrame, checks: Checks) -> list[Finding]:
    defects = table[table["defect"] != ""]
    unreadable = table[table["unreadable"] != ""]
    return [
        *_found(defects, "defect", checks.defect, defects["defect"].tolist()),
        *_found(unreadable, "unreadable", checks.unreadable, unreadable["unreadable"].tolist()),
    ]


def _blank(table: pd.DataFrame, checks: Checks) -> list[Finding]:
    rule = checks.blank
    blank = table[table["std"] < rule.std]
    evidence = [f"grey levels vary by {std:.2f} of 255" for std in blank["std"]]
    return _found(blank, "blank", rule, evidence, blank["std"].tolist(), rule.std)


def _copies(
    table: pd.DataFrame,
    readable: pd.DataFrame,
    sound: pd.DataFrame,
    kept: Kept,
    checks: Checks,
    workers: int,
) -> tuple[list[Finding], list[str]]:
    """Find copies among the readable pictures, and near copies among those of them that are sound.

    Of equal pictures on one official side, that with the most labels is the original. Rows of one
    picture, or of near copies, that name different faces share a cluster, as all must stand on one
    side; but neither is a copy of the other.
    """
    boxes = _relative(kept.boxes, table)
    ordered = readable.assign(
        rank=readable["official_split"].map(PRIORITY),
        unlabelled=readable["class"] == "unlabelled",
        points=-readable["landmarks_visible"].str.count("1"),
    ).sort_values(["rank", "unlabelled", "points", "id"], kind="stable")
    findings: list[Finding] = []
    pairs = [np.zeros((0, 2), np.int64)]
    photographs = pairs.copy()  # of rows with different faces
    distinct = ordered
    if checks.exact_duplicate.action != "off":
        original = _originals(ordered, boxes)
        distinct = ordered[original == ordered.index]
        pictures = ordered.drop_duplicates("pixels")
        first = ordered["pixels"].map(pd.Series(pictures.index, pictures["pixels"]))
        photographs.append(np.column_stack([first, ordered.index]))
        copies = readable[original.loc[readable.index] != readable.index]
        originals = original[copies.index]
        evidence = [f"same pixels as {id}" for id in table["id"][originals]]
        scores = [1.0] * len(copies)
        findings += _found(copies, "exact_duplicate", checks.exact_duplicate, evidence, scores, 1.0)
        pairs.append(np.column_stack([originals, copies.index]))
    rule = checks.near_duplicate
    if rule.action != "off":
        distinct = distinct[distinct.index.isin(sound.index)]
        rows = distinct.index.to_numpy()
        near = duplicates.near_copies(
            distinct["hash"].to_numpy(),
            distinct["mirror_hash"].to_numpy(),
            kept.coarse,
            kept.sharp,
            rows,
            rule.distance,
            rule.correlation,
            workers,
        )
        photographs.append(rows[near.pairs])
        near = _of_one_face(near, boxes[rows])
        pairs.append(rows[near.pairs])
        surplus = duplicates.surplus(near)
        copies = table.loc[[rows[position] for position, _, _ in surplus]]
        kinds = np.where(near.mirrored, "mirror image", "near copy")
        evidence = [f"{kinds[pair]} of {table['id'][rows[stays]]}" for _, stays, pair in surplus]
        scores = [float(near.correlations[pair]) for _, _, pair in surplus]
        findings += _found(copies, "near_duplicate", rule, evidence, scores, rule.correlation)
    ids = table["id"].tolist()
    alike = duplicates.clusters(ids, np.concatenate(pairs))
    findings += _conflicts(table.assign(cluster=alike), checks)
    return findings, duplicates.clusters(ids, np.concatenate([*pairs, *photographs]))


def _relative(boxes: np.ndarray, table: pd.DataFrame) -> np.ndarray:
    """Turn boxes in pixels into shares of their pictures, which may come in several sizes."""
    size = table[["width", "height"]].to_numpy(float)
    return (boxes + 0.5) / np.hstack([size, size])


def _originals(ordered: pd.DataFrame, boxes: np.ndarray) -> pd.Series:
    """Return for each row the first with its pixels and its face, by index; the best come first."""
    originals = {row: row for row in ordered.index}
    alike = ordered[ordered.duplicated("pixels", keep=False)]
    for _, rows in alike.groupby("pixels"):
        stay: list[int] = []
        for row in rows.index:
            same = duplicates.one_face(boxes[stay], np.broadcast_to(boxes[row], (len(stay), 4)))
            if same.any():
                originals[row] = stay[int(same.argmax())]
            else:
                stay.append(row)
    return pd.Series(originals, ordered.index, dtype=ordered.index.dtype)


def _of_one_face(near: duplicates.NearCopies, boxes: np.ndarray) -> duplicates.NearCopies:
    """Leave out the pairs that show different faces."""
    first, second = boxes[near.pairs[:, 0]], boxes[near.pairs[:, 1]]
    flipped = np.column_stack([1 - second[:, 2], second[:, 1], 1 - second[:, 0], second[:, 3]])
    same = duplicates.one_face(first, np.where(near.mirrored[:, None], flipped, second))
    return duplicates.NearCopies(near.pairs[same], near.mirrored[same], near.correlations[same])


def _conflicts(table: pd.DataFrame, checks: Checks) -> list[Finding]:
    """Find the clusters of copies that carry different labels; every member is a finding."""
    labelled = table[(table["cluster"] != "") & (table["class"] != "unlabelled")]
    clusters = labelled.groupby("cluster")["class"]
    rows = labelled[clusters.transform("nunique") > 1]
    counts = rows.groupby("cluster")["class"].value_counts()
    exact = rows.groupby(["cluster", "pixels"])["class"].transform("nunique") > 1
    scores, evidence = [], []
    for name, given, is_exact in zip(rows["cluster"], rows["class"], exact, strict=True):
        members = counts[name].sort_index()
        listed = ", ".join(f"{label} ({number})" for label, number in members.items())
        evidence.append(f"{'exact' if is_exact else 'near'} copies of it are labelled {listed}")
        scores.append(1 - members[given] / members.sum())
    return _found(rows, "label_conflict", checks.label_conflict, evidence, scores, 0.0)


def _no_face(table: pd.DataFrame, checks: Checks) -> list[Finding]:
    rule = checks.no_face
    counts = table[list(rule.detectors)]
    votes = (counts > 0).sum(axis=1)
    faceless = table[counts.notna().all(axis=1) & (votes < rule.votes)]
    names = ", ".join(rule.detectors)
    evidence = [f"{votes[row]} of {names} see a face" for row in faceless.index]
    scores = votes[faceless.index].tolist()
    return _found(faceless, "no_face", rule, evidence, scores, float(rule.votes))


def _implausible(table: pd.DataFrame, kept: Kept, checks: Checks) -> np.ndarray:
    """Score every shape against all with as many points; NaN where there are none."""
    scores = np.full(len(table), NAN)
    if checks.landmarks_implausible.action == "off":
        return scores
    sizes = np.array([len(points) for points in kept.landmarks]) * table["std"].notna()
    for size in np.unique(sizes[sizes > 0]):
        rows = np.flatnonzero(sizes == size).tolist()
        landmarks = np.stack([kept.landmarks[row] for row in rows])
        scores[rows] = implausible(landmarks, np.stack([kept.visible[row] for row in rows]))
    return scores


def _beyond(
    table: pd.DataFrame, name: str, rule: Below | Above, column: str, words: str
) -> list[Finding]:
    values = table[column]
    beyond = values < rule.threshold if isinstance(rule, Below) else values > rule.threshold
    rows = table[beyond]
    scores = rows[column].tolist()
    evidence = [words.format(score) for score in scores]
    return _found(rows, name, rule, evidence, scores, rule.threshold)


def _label_columns(
    table: pd.DataFrame,
    candidates: pd.DataFrame,
    kept: Kept,
    checks: Checks,
    earlier: pd.DataFrame | None,
) -> pd.DataFrame:
    """Doubt labels by the other examples'.

    What is held out officially is neither doubted nor learnt from: the test labels must not
    decide which training labels count.
    """
    unjudged = {"label_quality": NAN, "label_doubted": False, "label_key": ""}
    columns = pd.DataFrame(unjudged, index=table.index)
    rule = checks.mislabelled
    rows = candidates[(candidates["label"] >= 0) & ~candidates["official_split"].isin(HELD_OUT)]
    if rule.action == "off" or rows["label"].nunique() < 2:
        return columns
    # A person's pictures, and copies of a picture, must not be on both sides of a fold. A copy
    # that is dropped ties two persons no less.
    names = rows["person"].where(rows["person"] != "", table["cluster"][rows.index])
    names = names.where(names != "", rows["id"])
    family = families(table["person"].tolist(), table["cluster"].tolist())
    groups = names.groupby(family[rows.index]).transform("min")
    faces, codes = kept.faces[rows.index], rows["label"].to_numpy()
    key = _label_key(rows["id"].tolist(), faces, codes, groups.tolist(), rule)
    if earlier is not None and key in set(earlier["label_key"]):
        judged = earlier[earlier["label_key"] == key].set_index("id").loc[rows["id"]]
        quality = judged["label_quality"].to_numpy()
        doubted = judged["label_doubted"].to_numpy()
    else:
        from pipelines.checks.labels import suspected  # loads scikit-learn, cleanlab and more

        quality, doubted = suspected(faces[..., None], codes, groups.tolist(), rule, SEED)
    columns.loc[rows.index, "label_quality"] = quality
    columns.loc[rows.index, "label_doubted"] = doubted
    columns.loc[rows.index, "label_key"] = key
    return columns


def _label_key(
    ids: list[str], faces: np.ndarray, codes: np.ndarray, groups: list[str], rule: Mislabelled
) -> str:
    """Return the SHA-256 of all that judging labels depends on."""
    root = Path(__file__).parents[2]
    sources = [root.joinpath(name).read_text() for name in LABEL_SOURCES]
    settings = rule.model_dump(exclude={"action", "weight", "threshold"})
    versions = [version(name) for name in LABEL_LIBRARIES]
    named = (sources, versions, settings, SEED, ids, groups, codes.tolist())
    key = hashlib.sha256(repr(named).encode())
    for start in range(0, len(faces), 4096):
        key.update(faces[start : start + 4096].tobytes())
    return key.hexdigest()


def _mislabelled(table: pd.DataFrame, checks: Checks) -> list[Finding]:
    rule = checks.mislabelled
    wrong = table[table["label_doubted"] & (table["label_quality"] < rule.threshold)]
    scores = wrong["label_quality"].tolist()
    evidence = [
        f"labelled {given}, but another class is likelier by {1 - 2 * score:.0%}"
        for given, score in zip(wrong["class"], scores, strict=True)
    ]
    return _found(wrong, "mislabelled", rule, evidence, scores, rule.threshold)


def _restored(findings: Sequence[Finding], restore: Sequence[str]) -> list[Finding]:
    """Bring back what was dropped, or left out of training by its weight."""
    ids = set(restore)
    return [
        replace(finding, action="restored", weight=1.0)
        if finding.id in ids and finding.action in ("drop", "weight")
        else finding
        for finding in findings
    ]


def _decided(table: pd.DataFrame, findings: Sequence[Finding]) -> pd.DataFrame:
    """Fill in what the findings mean for each example."""
    order = list(Checks.model_fields)
    reasons: dict[str, str] = {}
    weights: dict[str, float] = {}
    for finding in sorted(findings, key=lambda finding: order.index(finding.check)):
        if finding.action == "drop":
            reasons.setdefault(finding.id, finding.check)
        weights[finding.id] = min(weights.get(finding.id, 1.0), finding.weight)
    reason = table["id"].map(reasons).fillna("")
    weight = table["id"].map(weights).fillna(1.0)
    return table.assign(kept=reason == "", weight=weight, reason=reason)


def _in_order(findings: Sequence[Finding], table: pd.DataFrame) -> list[Finding]:
    checks = {name: number for number, name in enumerate(Checks.model_fields)}
    rows = {id: number for number, id in enumerate(table["id"])}
    return sorted(findings, key=lambda finding: (checks[finding.check], rows[finding.id]))
