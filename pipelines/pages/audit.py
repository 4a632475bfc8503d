"""The page of `filter`: what was found in a dataset, what left, what is left, and why."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from markupsafe import Markup

from pipelines import datasets, pages
from pipelines.pages import Section, charts
from pipelines.params import Checks

ACTIONS = ("drop", "weight", "flag", "restored")
MOST_ROWS = 60
SUSPECTS_PER_CLASS = 5

MEANINGS = {
    "defect": "the source's own row cannot be used",
    "unreadable": "the picture does not decode",
    "blank": "its grey levels hardly vary",
    "exact_duplicate": "its pixels equal those of another",
    "label_conflict": "copies of one picture carry different labels",
    "near_duplicate": "nearly the same picture as another: similar hash, and it correlates",
    "no_face": "too few detectors see a face",
    "dark": "its brightest parts (99th percentile, 0 to 1) are below the threshold",
    "bright": "its darkest parts (5th percentile, 0 to 1) are above the threshold",
    "low_information": "CleanVision's score of information, 0 to 1, is below the threshold",
    "blurred": "CleanVision's score of sharpness, 0 to 1, is below the threshold",
    "small_face": "the longer side of the face is below so many pixels",
    "cut_off": "more than this share of the face box lies outside the picture",
    "landmarks_outside": "more than this share of the points lies outside the picture",
    "landmarks_folded": "the points cross where no face can",
    "landmarks_mirrored": "left and right points have changed places",
    "landmarks_implausible": "no such shape by a model of all others, in robust deviations",
    "mislabelled": "predictions by models that never saw it contradict the label",
}

MEASURES = (  # column, title, unit
    ("brightness", "Brightness", "mean, 0 black to 1 white"),
    ("blurred", "Sharpness", "CleanVision score, 0 blurred to 1 sharp"),
    ("std", "Contrast", "standard deviation of grey levels"),
    ("face_size", "Face size", "longer side, pixels"),
    ("width", "Picture width", "pixels"),
    ("yaw", "Head yaw", "degrees, positive towards the picture's right"),
)


def write_audit(
    path: Path,
    *,
    dataset: str,
    table: pd.DataFrame,
    findings: pd.DataFrame,
    pictures: Mapping[str, list[tuple[str, np.ndarray]]],
    checks: Checks,
    command: str = "",
) -> None:
    """Write the report of one audit as a self-contained HTML page.

    What the table does not measure is left out, with a sentence.

    Args:
        path: the file.
        dataset: its name; its card is part of the page.
        table: a row a raw example: id, class, kept, reason ("" where kept), weight, and whichever
            of official_split, cluster, seed_kept, landmarks_visible ("1" or "0" a point) and
            the columns of `MEASURES` there are. No other column is shown, so no person either.
        findings: id, check, score, threshold, action, evidence.
        pictures: by check, captions and uint8 (H, W, 1 or 3) pictures; without any, the page
            shows none.
        checks: the settings.
        command: what made the page; by default `filter` in the graph.
    """
    table = table.reset_index(drop=True).assign(
        **{"class": table["class"].replace("", "unlabelled")}
    )
    findings = findings.reset_index(drop=True)
    line = command or f"uv run python -m pipelines.filter --dataset {dataset}"
    raw, kept = len(table), int(table["kept"].sum())
    lead = [
        f"Of {raw:,} examples {kept:,} are kept and {raw - kept:,} dropped. Nothing vanishes: each "
        "drop is listed in findings.parquet with its reason, and its id under filter.restore in "
        "params.yaml brings it back.",
        pages.facts(_headline(table, findings)),
        pages.command(line),
    ]
    sections = [
        Section("Findings", _found(table, findings, checks)),
        Section("Reasons", _reasons(table)),
        Section("Classes", _classes(table)),
        Section("Distributions", _distributions(table)),
        Section("Duplicates", _duplicates(table, findings)),
        Section("The cascade's choice", _seed(table)),
        Section("Suspected labels", _suspects(table, findings, checks)),
        Section("Missing landmarks", _landmarks(table)),
        Section("Pictures", _sheets(findings, pictures)),
        Section("Data card", [pages.markdown(datasets.card(dataset))]),
    ]
    path.write_text(pages.page(f"Audit of {dataset}", lead, sections), encoding="utf-8")


def _headline(table: pd.DataFrame, findings: pd.DataFrame) -> dict[str, str]:
    raw, kept = len(table), table[table["kept"].astype(bool)]
    numbers = {
        "raw": raw,
        "kept": len(kept),
        "dropped": raw - len(kept),
        "flagged, kept": kept["id"].isin(_ids(findings, "flag")).sum(),
        "weighted, kept": kept["id"].isin(_ids(findings, "weight")).sum(),
        "restored": len(_ids(findings, "restored")),
    }
    shares = {"kept", "dropped", "flagged, kept", "weighted, kept"}
    return {
        name: f"{number:,}" + (f" ({number / max(1, raw):.1%})" if name in shares else "")
        for name, number in numbers.items()
    }


def _found(table: pd.DataFrame, findings: pd.DataFrame, checks: Checks) -> list[Markup | str]:
    counts = pd.crosstab(findings["check"], findings["action"])
    order = [name for name in Checks.model_fields if name in counts.index]
    counts = counts.reindex(order, columns=[a for a in ACTIONS if a in counts.columns])
    blocks: list[Markup | str] = []
    if len(counts):
        hit = findings.groupby("check")["id"].nunique().reindex(order)
        shown = counts.rename_axis("check").reset_index()
        shown["check"] = shown["check"].map(_words)
        shown["share of raw"] = (hit / max(1, len(table))).to_numpy()
        blocks.append(
            pages.table(
                shown,
                "Findings by check and action. An example may have several; the first check that "
                "drops it, in this order, is its reason.",
                {"share of raw": "{:.2%}"},
                bars=["share of raw"],
            )
        )
    else:
        blocks.append("No check found anything.")
    return [*blocks, pages.heading("Checks and their settings"), _settings(findings, checks)]


def _settings(findings: pd.DataFrame, checks: Checks) -> Markup:
    found = findings.groupby("check")["id"].nunique()
    rows = []
    for name, check in checks:
        settings = [
            f"{key} {' and '.join(value) if isinstance(value, tuple) else value}"
            for key, value in check.model_dump(exclude={"action", "weight"}).items()
        ]
        rows.append(
            (
                f"{_words(name)}\n{MEANINGS[name]}",
                check.action + (f" to {check.weight:g}" if check.action == "weight" else ""),
                ", ".join(settings) or "–",
                found.get(name, 0),
            )
        )
    columns = ["check", "action", "settings", "examples"]
    return pages.table(pd.DataFrame(rows, columns=columns), "Every check, in the order they decide")


def _reasons(table: pd.DataFrame) -> list[Markup | str]:
    dropped = table[~table["kept"].astype(bool)]
    if dropped.empty:
        return ["Nothing was dropped."]
    counts = pd.crosstab(dropped["reason"].map(_words), dropped["class"])
    total = counts.sum(axis=1)
    counts = counts.assign(all=total) if counts.shape[1] > 1 else total.to_frame("examples")
    counts = counts.loc[total.sort_values(ascending=False, kind="stable").index].reset_index()
    blocks: list[Markup | str] = [pages.table(counts, "Dropped, by reason and class")]
    splits = table.get("official_split", pd.Series("", index=table.index)).replace("", "none")
    if splits.nunique() > 1:
        by_split = _before_and_after(table.assign(split=splits), "split")
        blocks.append(
            pages.table(
                by_split.drop(columns=["share before", "share after"]),
                "By the source's own split. Opinions drop nothing from val and test.",
                {"kept share": "{:.1%}"},
            )
        )
    return blocks


def _classes(table: pd.DataFrame) -> list[Markup | str]:
    if table["class"].nunique() < 2:
        return [f"All examples are of one class, {table['class'].iloc[0]}."]
    counts = _before_and_after(table, "class")
    formats = dict.fromkeys(("kept share", "share before", "share after"), "{:.1%}")
    return [
        charts.bars(counts.set_index("class")[["raw", "kept"]], "Examples before and after"),
        pages.table(counts, "Class balance: the shares are of all raw and of all kept", formats),
    ]


def _before_and_after(table: pd.DataFrame, column: str) -> pd.DataFrame:
    grouped = table["kept"].astype(bool).groupby(table[column])
    counts = pd.DataFrame({"raw": grouped.size(), "kept": grouped.sum()})
    counts["kept share"] = counts["kept"] / counts["raw"]
    counts["share before"] = counts["raw"] / counts["raw"].sum()
    counts["share after"] = counts["kept"] / max(1, counts["kept"].sum())
    return counts.reset_index()


def _distributions(table: pd.DataFrame) -> list[Markup | str]:
    kept = table["kept"].astype(bool)
    drawn, absent = [], []
    for column, title, unit in MEASURES:
        values = _numbers(table, column)
        if values.empty:
            absent.append(title.lower())
            continue
        chosen = values[kept[values.index]]
        series = {"raw": values.to_numpy(), "kept": chosen.to_numpy()}
        drawn.append(charts.distribution(series, title, unit))
    blocks: list[Markup | str] = []
    if drawn:
        blocks.append(pages.side_by_side(*drawn))
        blocks.append(pages.note("The outermost bars hold what lies beyond them as well."))
    if absent:
        blocks.append(f"Not known here: {', '.join(absent)}.")
    return blocks


def _duplicates(table: pd.DataFrame, findings: pd.DataFrame) -> list[Markup | str]:
    if "cluster" not in table or not (in_one := table["cluster"].fillna("") != "").any():
        return ["No two examples were found to show the same picture."]
    groups = table[in_one].groupby("cluster")
    sizes = groups.size()
    counts = sizes.clip(upper=10).value_counts().sort_index()
    examples = sizes.groupby(sizes.clip(upper=10)).sum()
    shown = pd.DataFrame(
        {
            "copies": [f"{size}" if size < 10 else "10 or more" for size in counts.index],
            "clusters": counts.to_numpy(),
            "examples": examples.reindex(counts.index).to_numpy(),
        }
    )
    said = f"{len(sizes):,} clusters of copies and near copies hold {sizes.sum():,} examples."
    if table["class"].nunique() > 1:
        mixed = int((groups["class"].nunique() > 1).sum())
        said += f" {mixed:,} of them carry more than one class."
    if "official_split" in table and table["official_split"].nunique() > 1:
        spanning = int((groups["official_split"].nunique() > 1).sum())
        said += f" {spanning:,} span the source's own splits; the split stage takes their training "
        said += "copies out."
    blocks: list[Markup | str] = [said]
    blocks.append(pages.table(shown, "Clusters by size", bars=["clusters", "examples"]))
    blocks.append(pages.heading("Label conflicts"))
    conflicts = table[table["id"].isin(findings.loc[findings["check"] == "label_conflict", "id"])]
    if conflicts.empty:
        return [*blocks, "No copies were found to contradict each other."]
    clusters = table[in_one & table["cluster"].isin(conflicts["cluster"])].groupby("cluster")
    listed = pd.DataFrame(
        [
            (
                ", ".join(f"{n}\u00a0{name}" for name, n in _counted(group["class"])),
                ", ".join(sorted(group["id"])[:6]) + (" …" if len(group) > 6 else ""),
                len(group),
            )
            for _, group in clusters
        ],
        columns=["classes", "ids", "examples"],
    )
    caption = _first_rows("Clusters whose copies carry different labels", len(listed))
    return [*blocks, pages.table(listed.head(MOST_ROWS), caption)]


def _seed(table: pd.DataFrame) -> list[Markup | str]:
    seen = _numbers(table, "seed_kept") > 0
    if seen.empty:
        return ["What the seed projects' filter would have kept was not measured."]
    judged = table.loc[seen.index].assign(
        audit=table["kept"].astype(bool).astype(float), cascade=seen.astype(float)
    )
    blocks: list[Markup | str] = [
        "The seed projects kept what one Haar cascade saw a face in. Of "
        f"{len(judged):,} examples it would keep {judged['cascade'].mean():.1%}, the audit keeps "
        f"{judged['audit'].mean():.1%}. Of what the audit keeps, the cascade would have thrown "
        f"away {int(((judged['audit'] > 0) & (judged['cascade'] == 0)).sum()):,}."
    ]
    if judged["class"].nunique() < 2:
        return blocks
    shares = judged.groupby("class")[["audit", "cascade"]].mean()
    by_class = shares.rename(columns={"audit": "audit keeps", "cascade": "cascade keeps"})
    ranked = shares["cascade"].sort_values().items()
    said = [f"{share:.1%} of {name}" for name, share in ranked]
    after = judged[judged["cascade"] > 0]["class"].value_counts(normalize=True)
    by_class["share of the cascade's set"] = after.reindex(by_class.index).fillna(0)
    by_class["share of raw"] = judged["class"].value_counts(normalize=True)
    blocks.append(
        f"It is not even-handed: it keeps {said[0]} and {said[-1]}, and so changes the balance "
        "of the classes."
    )
    dots = charts.shares(by_class[["audit keeps", "cascade keeps"]], "Share kept, by class")
    formats = dict.fromkeys(by_class.columns, "{:.1%}")
    caption = "What each keeps of a class, and the class's share"
    return [*blocks, dots, pages.table(by_class.reset_index(), caption, formats)]


def _suspects(table: pd.DataFrame, findings: pd.DataFrame, checks: Checks) -> list[Markup | str]:
    if checks.mislabelled.action == "off":
        return ["The check for wrong labels is off."]
    found = findings[findings["check"] == "mislabelled"]
    if found.empty:
        return ["No label is suspected to be wrong."]
    known = found.merge(table[["id", "class"]], on="id").sort_values(["score", "id"])
    per_class = known.groupby("class")["id"].size()
    total = table.groupby("class")["id"].size()
    counts = pd.DataFrame({"suspected": per_class, "of class": per_class / total}).dropna()
    worst = known.groupby("class").head(SUSPECTS_PER_CLASS).sort_values(["class", "score", "id"])
    columns = ["class", "id", "score", "action"]
    return [
        f"{len(known):,} labels contradict predictions by models that were trained without them. "
        "The score is the margin of the label over every other class: 0 means that another is "
        "certain, 0.5 a tie.",
        pages.table(
            counts.reset_index(),
            "Suspected labels by class",
            {"of class": "{:.1%}"},
            bars=["of class"],
        ),
        pages.table(
            worst[columns],
            f"The {SUSPECTS_PER_CLASS} most suspected of each class",
            {"score": "{:.4f}"},
        ),
    ]


def _landmarks(table: pd.DataFrame) -> list[Markup | str]:
    if "landmarks_visible" not in table:
        return ["The examples carry no landmarks."]
    patterns = table["landmarks_visible"].fillna("")
    patterns = patterns[patterns != ""]
    if patterns.empty:
        return ["The examples carry no landmarks."]
    size = patterns.str.len().mode().iloc[0]
    patterns = patterns[patterns.str.len() == size]
    whole = int((~patterns.str.contains("0")).sum())
    said = f"{whole:,} of {len(patterns):,} examples with landmarks have all {size} points."
    if whole == len(patterns):
        return [said]
    return [said, charts.missing_points(dict(_counted(patterns)))]


def _sheets(
    findings: pd.DataFrame, pictures: Mapping[str, list[tuple[str, np.ndarray]]]
) -> list[Markup | str]:
    if findings.empty:
        return ["No check found anything to show."]
    if not pictures:
        return ["This page was made without pictures."]
    blocks: list[Markup | str] = []
    for check in [name for name in Checks.model_fields if pictures.get(name)]:
        found = findings.loc[findings["check"] == check, "id"].nunique()
        shown = pictures[check]
        title = _words(check).capitalize()
        plural = "s" * (len(shown) != 1)
        blocks.append(pages.heading(f"{title}: {found:,} found, {len(shown)} picture{plural}"))
        blocks.append(pages.pictures(shown, _words(check)))
    return blocks


def _ids(findings: pd.DataFrame, action: str) -> set[str]:
    return set(findings.loc[findings["action"] == action, "id"])


def _numbers(table: pd.DataFrame, column: str) -> pd.Series:
    """Return the finite numbers of a column, none where there is no such column."""
    if column not in table:
        return pd.Series(dtype=float)
    values = pd.to_numeric(table[column], errors="coerce").astype(float)
    return values[np.isfinite(values)]


def _counted(values: pd.Series) -> list[tuple[str, int]]:
    return sorted((str(name), int(n)) for name, n in values.value_counts().items())


def _first_rows(caption: str, count: int) -> str:
    more = count > MOST_ROWS
    return f"{caption}: the first {MOST_ROWS} of {count:,}" if more else f"{caption}: {count:,}"


def _words(name: str) -> str:
    return name.replace("_", " ")
