"""The rules, on measures that are made up: what fires, what it does, and in which order."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipelines.checks import FACTS, Finding
from pipelines.checks.duplicates import coarse_version, details
from pipelines.checks.judge import COMPARED, DERIVED, MARKED, Kept, judge
from pipelines.checks.measures import COLUMNS, FACE_SIDE
from pipelines.params import Checks, load_params

CHECKS = load_params(Path(__file__).parents[3] / "params.yaml").filter.checks

# A picture that gives no reason to complain.
GOOD: dict[str, Any] = {
    "class": "happy",
    "label": 3,
    "official_split": "",
    "person": "",
    "defect": "",
    "unreadable": "",
    "width": 48.0,
    "height": 48.0,
    "std": 60.0,
    "brightness": 0.5,
    "dark": 0.9,
    "bright": 0.1,
    "blurred": 0.5,
    "low_information": 0.7,
    "face_size": 48.0,
    "cut_off": 0.0,
    "landmarks_outside": 0.0,
    "landmarks_folded": 0.0,
    "landmarks_mirrored": 0.0,
    "landmarks_visible": "",
    "yaw": 0.0,
    "seed_kept": True,
    "haar": 1.0,
    "blazeface": 1.0,
}
UNREAD = {name: np.nan for name, kind in COLUMNS.items() if kind == "float64"} | {
    "pixels": "",
    "haar": np.nan,
    "blazeface": np.nan,
}


def row(id: str, **changes: Any) -> dict[str, Any]:
    return GOOD | {"id": id, "pixels": f"pixels of {id}", "digest": id} | changes


def only(**actions: Any) -> Checks:
    """All checks off but these: an action, or whatever else is to be set."""
    settings = CHECKS.model_dump()
    for check in settings.values():
        check["action"] = "off"
    for name, changes in actions.items():
        settings[name] |= changes if isinstance(changes, dict) else {"action": changes}
    return Checks.model_validate(settings)


def judged(
    checks: Checks,
    *rows: dict[str, Any],
    pictures: Sequence[np.ndarray] | None = None,
    restore: Sequence[str] = (),
    faces: np.ndarray | None = None,
    shapes: Sequence[np.ndarray] | None = None,
    earlier: pd.DataFrame | None = None,
    boxes: Sequence[Sequence[float] | None] | None = None,
) -> tuple[pd.DataFrame, list[Finding]]:
    n = len(rows)
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, (n, 2), np.uint64, endpoint=False)
    table = pd.DataFrame(rows).assign(hash=hashes[:, 0], mirror_hash=hashes[:, 1])
    small = rng.integers(0, 256, (n, 32, 32), np.uint8)
    if pictures is not None:
        small = np.stack(pictures)
    coarse = np.stack([coarse_version(each) for each in small])
    sharp = np.stack([details(each) for each in small])
    if pictures is not None:
        table[["hash", "mirror_hash"]] = np.uint64(0)  # every pair is worth comparing
    if faces is None:
        faces = np.zeros((n, FACE_SIDE, FACE_SIDE), np.uint8)
    if shapes is None:
        shapes = [np.zeros((0, 2), np.float32)] * n
    visible = [np.ones(len(points), bool) for points in shapes]
    places = np.array([box or (np.nan,) * 4 for box in boxes or [None] * n])
    kept = Kept(coarse, sharp, faces, shapes, visible, places)
    return judge(table, kept, checks, restore, earlier=earlier)


def by_id(findings: Sequence[Finding]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in findings:
        found.setdefault(finding.id, []).append(finding.check)
    return found


def test_a_good_picture_is_kept() -> None:
    table, findings = judged(CHECKS, row("a"), row("b"))
    assert findings == []
    assert table["kept"].all() and (table["weight"] == 1).all() and (table["reason"] == "").all()
    assert set(DERIVED) <= set(table.columns)


# each check


def test_defect_and_unreadable_say_what_is_wrong() -> None:
    table, findings = judged(
        CHECKS, row("a", **UNREAD, defect="label 9"), row("b", **UNREAD, unreadable="zero bytes")
    )
    assert [(f.id, f.check, f.evidence) for f in findings] == [
        ("a", "defect", "label 9"),
        ("b", "unreadable", "zero bytes"),
    ]
    assert np.isnan([f.score for f in findings]).all()
    assert not table["kept"].any()


def test_blank() -> None:
    bound = CHECKS.blank.std
    _, findings = judged(CHECKS, row("a", std=bound - 0.01), row("b", std=bound))
    assert by_id(findings) == {"a": ["blank"]}
    (finding,) = findings
    assert (finding.score, finding.threshold, finding.action) == (bound - 0.01, bound, "drop")


@pytest.mark.parametrize("name", sorted(COMPARED.keys() - {"landmarks_implausible"}))
def test_a_measure_is_compared_with_its_threshold(name: str) -> None:
    column, _ = COMPARED[name]
    rule = getattr(CHECKS, name)
    below = name in ("dark", "low_information", "blurred", "small_face")
    bad, good = (
        (rule.threshold - 0.01, rule.threshold)
        if below
        else (
            rule.threshold + 0.01,
            rule.threshold,
        )
    )
    rows = row("bad", **{column: bad}), row("good", **{column: good}), row("none", **UNREAD)
    table, findings = judged(only(**{name: "drop"}), *rows)
    (finding,) = findings
    assert (finding.id, finding.check, finding.action) == ("bad", name, "drop")
    assert (finding.score, finding.threshold) == (bad, rule.threshold)
    assert table["kept"].tolist() == [False, True, True]


def test_a_shape_is_held_against_the_others_of_its_scheme() -> None:
    """Of two schemes by turns, one broken shape each, and a wild one whose picture is unread."""
    rng = np.random.default_rng(3)
    usual = {size: rng.uniform(0, 90, (size, 2)) for size in (15, 68)}
    rows, shapes = [], []
    for number in range(60):
        size = (15, 68)[number % 2]
        shapes.append(usual[size] + rng.normal(0, 1, (size, 2)))
        rows.append(row(f"{size}-{number}"))
    broken = {"15-20", "68-31"}
    for number in (20, 31):
        shapes[number] = shapes[number][::-1]
    rows[7] = row("unread", **UNREAD, unreadable="zero bytes")
    shapes[7] = rng.uniform(0, 90, (68, 2))
    rows.append(row("no points"))
    shapes.append(np.zeros((0, 2)))

    checks = only(landmarks_implausible={"action": "drop", "threshold": 9.0})
    table, findings = judged(checks, *rows, shapes=shapes)
    assert by_id(findings) == {id: ["landmarks_implausible"] for id in broken}
    assert set(table["id"][~table["kept"]]) == broken
    scores = table.set_index("id")["landmarks_implausible"]
    assert set(scores.index[scores.isna()]) == {"unread", "no points"}
    assert {f.id: (f.score, f.threshold) for f in findings} == {
        id: (scores[id], 9.0) for id in broken
    }

    # The unread one has no part in what is usual.
    shapes[7] = usual[68]
    again, _ = judged(checks, *rows, shapes=shapes)
    pd.testing.assert_frame_equal(again, table)
    # More than the threshold, not as much.
    at = only(landmarks_implausible={"action": "drop", "threshold": scores[[*broken]].min()})
    assert len(judged(at, *rows, shapes=shapes)[1]) == 1
    assert judged(only(), *rows, shapes=shapes)[0]["landmarks_implausible"].isna().all()


@pytest.mark.parametrize("name", MARKED)
def test_a_mark_is_a_finding(name: str) -> None:
    _, findings = judged(only(**{name: "flag"}), row("a"), row("b", **{name: 1.0}))
    assert by_id(findings) == {"b": [name]}


@pytest.mark.parametrize(
    ("detectors", "votes", "found"),
    [
        (("haar",), 1, ["no haar", "neither"]),
        (("blazeface",), 1, ["no blazeface", "neither"]),
        (("haar", "blazeface"), 1, ["neither"]),
        (("haar", "blazeface"), 2, ["no haar", "no blazeface", "neither"]),
    ],
)
def test_detectors_vote(detectors: tuple[str, ...], votes: int, found: list[str]) -> None:
    rule = {"action": "flag", "detectors": detectors, "votes": votes}
    rows = [
        row("both", haar=3.0),
        row("no haar", haar=0.0),
        row("no blazeface", blazeface=0.0),
        row("neither", haar=0.0, blazeface=0.0),
        row("unreadable", **UNREAD),
    ]
    _, findings = judged(only(no_face=rule), *rows)
    assert [finding.id for finding in findings] == found
    assert all(finding.threshold == votes for finding in findings)


# copies


@pytest.mark.parametrize(
    ("splits", "kept"),
    [
        (("train", "val", "test"), "c"),
        (("test", "val", "train"), "a"),
        (("train", "val", ""), "b"),
        (("", "train", ""), "b"),
        (("train", "train", "train"), "a"),
        (("train", "test", "test"), "b"),
    ],
)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_test_copy_stays(
    splits: tuple[str, str, str], kept: str, order: tuple[int, ...]
) -> None:
    rows = [
        row(id, pixels="the same", official_split=split)
        for id, split in zip("abc", splits, strict=True)
    ]
    table, findings = judged(CHECKS, *(rows[i] for i in order))
    assert table.loc[table["kept"], "id"].tolist() == [kept]
    assert {finding.id for finding in findings} == set("abc") - {kept}
    assert {finding.check for finding in findings} == {"exact_duplicate"}
    assert all(finding.evidence == f"same pixels as {kept}" for finding in findings)
    assert set(table["cluster"]) == {"a"}


def test_blank_pictures_are_copies_too() -> None:
    rows = [
        row("a", pixels="p", std=0.0, official_split="test"),
        row("b", pixels="p", std=0.0, **{"class": "sad"}),
        row("c"),
    ]
    table, findings = judged(CHECKS, *rows)
    assert by_id(findings) == {
        "a": ["blank", "label_conflict"],
        "b": ["blank", "exact_duplicate", "label_conflict"],
    }
    assert table["reason"].tolist() == ["blank", "blank", ""]
    assert table["cluster"].tolist() == ["a", "a", ""]


def test_of_equal_pictures_the_best_labelled_stays() -> None:
    nothing = {"class": "unlabelled", "label": -1}
    rows = [
        row("a", pixels="p", **nothing, landmarks_visible="1111"),
        row("b", pixels="p", landmarks_visible="1000"),
        row("c", pixels="p", landmarks_visible="1110"),
        row("d", pixels="p", landmarks_visible="0111"),
        row("e", pixels="q", landmarks_visible="1111", official_split="train"),
        row("f", pixels="q", **nothing, official_split="test"),
    ]
    table, _ = judged(only(exact_duplicate="drop"), *rows)
    assert table.loc[table["kept"], "id"].tolist() == ["c", "f"]


def test_copies_may_stay() -> None:
    table, findings = judged(only(), row("a", pixels="p"), row("b", pixels="p"))
    assert findings == [] and table["kept"].all()


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32), np.uint8)


def mixed(one: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    return ((1 - share) * one + share * other).astype(np.uint8)


def test_near_copies_are_found_and_clustered_with_exact_ones() -> None:
    first = noise(1)
    pictures = [first, mixed(first, noise(2), 0.2), first[:, ::-1], noise(3), first]
    rows = [row(id, pixels="p" if id in "de" else id) for id in "dcbae"]
    rows[4]["pixels"] = rows[0]["pixels"] = "p"
    table, findings = judged(CHECKS, *rows, pictures=pictures)
    assert table["cluster"].tolist() == ["b", "b", "b", "", "b"]
    near = {f.id: f for f in findings if f.check == "near_duplicate"}
    assert set(near) == {"c", "d"}  # without an official split the smallest id stays
    assert near["d"].evidence == "mirror image of b"
    assert near["c"].evidence == "mirror image of b"
    assert all(0.78 <= finding.score <= 1 for finding in near.values())
    assert [f.id for f in findings if f.check == "exact_duplicate"] == ["e"]


def test_the_training_copy_of_a_test_picture_is_the_surplus_one() -> None:
    pictures = [noise(1), mixed(noise(1), noise(2), 0.2)]
    rows = row("a", official_split="train"), row("b", official_split="test")
    table, findings = judged(only(near_duplicate="drop"), *rows, pictures=pictures)
    assert table["kept"].tolist() == [False, True]
    assert findings[0].evidence == "near copy of b"


# several faces in one picture

LEFT, RIGHT = (2, 4, 20, 22), (26, 4, 44, 22)  # of 48 pixels
SAD = {"class": "sad", "label": 5}


def test_the_faces_of_one_picture_share_a_cluster_and_all_stay() -> None:
    rows = [
        row("a", pixels="p", person="x"),
        row("b", pixels="p", person="y", **SAD),
        row("c", pixels="p", person="x", official_split="train"),
        row("d", pixels="p", **SAD),
        row("e", pixels="p"),
        row("f"),
    ]
    boxes = [LEFT, RIGHT, (3, 3, 21, 23), (30, 8, 40, 18), None, LEFT]
    table, findings = judged(CHECKS, *rows, boxes=boxes)
    assert by_id(findings) == {id: ["exact_duplicate"] for id in "ade"}
    assert [f.evidence for f in findings] == [f"same pixels as {id}" for id in "cbc"]
    assert table["cluster"].tolist() == ["a", "a", "a", "a", "a", ""]


def test_one_face_with_two_labels_is_a_conflict_beside_another_face() -> None:
    rows = row("a", pixels="p"), row("b", pixels="p", **SAD), row("c", pixels="p", **SAD)
    table, findings = judged(CHECKS, *rows, boxes=[LEFT, RIGHT, LEFT])
    assert by_id(findings) == {"a": ["label_conflict"], "c": ["exact_duplicate", "label_conflict"]}
    assert table["kept"].tolist() == [False, True, False]
    assert set(table["cluster"]) == {"a"}


@pytest.mark.parametrize("exact", ["drop", "off"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_faces_of_near_copies_are_matched(exact: str, mirrored: bool) -> None:
    first, second = noise(1), mixed(noise(1), noise(2), 0.2)
    if mirrored:
        second = second[:, ::-1]
    rows = [
        row("a", pixels="p"),
        row("b", pixels="p", **SAD),
        row("c", pixels="q", width=96.0, height=96.0),
        row("d", pixels="q", width=96.0, height=96.0, **SAD),
    ]
    large = [tuple(2 * np.array(box)) for box in (LEFT, RIGHT)]
    boxes = [LEFT, RIGHT, *(large[::-1] if mirrored else large)]
    checks = only(exact_duplicate=exact, near_duplicate="drop", label_conflict="drop")
    table, findings = judged(checks, *rows, pictures=[first] * 2 + [second] * 2, boxes=boxes)
    assert by_id(findings) == {"c": ["near_duplicate"], "d": ["near_duplicate"]}
    kind = "mirror image" if mirrored else "near copy"
    assert [f.evidence for f in findings] == [f"{kind} of a", f"{kind} of b"]
    assert set(table["cluster"]) == {"a"}


# labels of copies


def test_all_copies_with_conflicting_labels_are_found() -> None:
    rows = [
        row("a", pixels="p", **{"class": "sad"}),
        row("b", pixels="p", **{"class": "sad"}),
        row("c", pixels="p"),
        row("d", pixels="q"),
        row("e", pixels="q"),
    ]
    table, findings = judged(CHECKS, *rows)
    conflicts = {f.id: f for f in findings if f.check == "label_conflict"}
    assert set(conflicts) == set("abc")
    assert conflicts["a"].evidence == "exact copies of it are labelled happy (1), sad (2)"
    assert conflicts["a"].score == pytest.approx(1 / 3)
    assert conflicts["c"].score == pytest.approx(2 / 3)
    assert table["kept"].tolist() == [False, False, False, True, False]
    assert table["reason"].tolist()[:3] == ["label_conflict", "exact_duplicate", "exact_duplicate"]


def test_near_copies_can_conflict_too() -> None:
    pictures = [noise(1), mixed(noise(1), noise(2), 0.2)]
    rows = row("a"), row("b", **{"class": "sad"})
    _, findings = judged(CHECKS, *rows, pictures=pictures)
    conflicts = [f for f in findings if f.check == "label_conflict"]
    assert [f.id for f in conflicts] == ["a", "b"]
    assert conflicts[0].evidence == "near copies of it are labelled happy (1), sad (1)"


def test_a_missing_label_is_no_other_label() -> None:
    rows = row("a", pixels="p"), row("b", pixels="p", label=-1, **{"class": "unlabelled"})
    _, findings = judged(CHECKS, *rows)
    assert by_id(findings) == {"b": ["exact_duplicate"]}


def test_a_held_out_member_of_a_conflict_stays() -> None:
    rows = [
        row("a", pixels="p", official_split="test"),
        row("b", pixels="p", official_split="train", **{"class": "sad"}),
    ]
    table, findings = judged(CHECKS, *rows)
    assert table["kept"].tolist() == [True, False]
    (flagged,) = [f for f in findings if f.id == "a"]
    assert (flagged.check, flagged.action) == ("label_conflict", "flag")


# actions


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("action", ["drop", "weight", "flag"])
def test_an_opinion_only_flags_what_is_held_out(split: str, action: str) -> None:
    rows = row("a", dark=0.0, official_split=split), row("b", dark=0.0, official_split="train")
    table, findings = judged(only(dark={"action": action, "weight": 0.0}), *rows)
    assert [finding.action for finding in findings] == ["flag", action]
    assert (f"official {split} split" in findings[0].evidence) == (action != "flag")
    assert table["kept"].tolist() == [True, action != "drop"]
    assert table["weight"].tolist() == [1.0, 0.0 if action == "weight" else 1.0]


@pytest.mark.parametrize("name", FACTS)
def test_a_fact_drops_from_the_test_split_too(name: str) -> None:
    bad = {
        "defect": UNREAD | {"defect": "label 9"},
        "unreadable": UNREAD | {"unreadable": "zero bytes"},
        "blank": {"std": 0.0},
        "exact_duplicate": {"pixels": "pixels of a"},
    }[name]
    rows = row("a", official_split="test"), row("b", official_split="test") | bad
    table, findings = judged(CHECKS, *rows)
    assert by_id(findings) == {"b": [name]}
    assert table["kept"].tolist() == [True, False]


def test_the_first_check_that_drops_is_the_reason() -> None:
    checks = only(dark="flag", bright="drop", blurred="drop", small_face={"action": "weight"})
    table, findings = judged(
        checks, row("a", dark=0.0, bright=1.0, blurred=0.0, face_size=1.0), row("b", blurred=0.0)
    )
    assert by_id(findings) == {"a": ["dark", "bright", "blurred", "small_face"], "b": ["blurred"]}
    assert table["reason"].tolist() == ["bright", "blurred"]


def test_the_smallest_weight_counts() -> None:
    checks = only(
        dark={"action": "weight", "weight": 0.5}, blurred={"action": "weight", "weight": 0.2}
    )
    rows = row("a", dark=0.0, blurred=0.0), row("b", dark=0.0), row("c")
    table, findings = judged(checks, *rows)
    assert table["weight"].tolist() == [0.2, 0.5, 1.0]
    assert [finding.weight for finding in findings] == [0.5, 0.5, 0.2]
    assert table["kept"].all()


def test_restored_ids_stay_with_full_weight() -> None:
    checks = only(
        dark="drop", blurred={"action": "weight", "weight": 0.2}, small_face={"action": "flag"}
    )
    rows = [row(id, dark=0.0, blurred=0.0, face_size=1.0) for id in "ab"]
    table, findings = judged(checks, *rows, restore=["a"])
    assert [(f.id, f.check, f.action, f.weight) for f in findings] == [
        ("a", "dark", "restored", 1.0),
        ("b", "dark", "drop", 1.0),
        ("a", "blurred", "restored", 1.0),
        ("b", "blurred", "weight", 0.2),
        ("a", "small_face", "flag", 1.0),
        ("b", "small_face", "flag", 1.0),
    ]
    assert table["kept"].tolist() == [True, False]
    assert table["reason"].tolist() == ["", "dark"]
    assert table["weight"].tolist() == [1.0, 0.2]


def test_what_is_restored_is_searched_for_near_copies() -> None:
    pictures = [noise(1), mixed(noise(1), noise(2), 0.2)]
    rows = row("a", std=1.0), row("b", std=1.0)
    table, findings = judged(CHECKS, *rows, pictures=pictures, restore=["a", "b"])
    assert table["cluster"].tolist() == ["a", "a"]
    assert by_id(findings) == {"a": ["blank"], "b": ["blank", "near_duplicate"]}


# labels that look wrong


LINEAR = {"action": "drop", "estimator": "linear", "folds": 4, "threshold": 0.3}


def two_classes(count: int, **changes: Any) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Faces that are bright above (happy) or on the left (sad), with a little noise."""
    faces = np.random.default_rng(5).integers(0, 60, (count, FACE_SIDE, FACE_SIDE), np.uint8)
    faces[::2, : FACE_SIDE // 2] += 150
    faces[1::2, :, : FACE_SIDE // 2] += 150
    rows = [
        row(f"{number:03d}", label=label, **{"class": name}, **changes)
        for number in range(count)
        for label, name in [((3, "happy"), (5, "sad"))[number % 2]]
    ]
    return rows, faces


def test_a_wrong_label_is_found_but_not_where_it_is_held_out() -> None:
    rows, faces = two_classes(80)
    for number, split in ((10, "train"), (20, "val"), (30, "test"), (40, "")):
        rows[number] |= {"label": 5, "class": "sad", "official_split": split}
    table, findings = judged(only(mislabelled=LINEAR), *rows, faces=faces)
    assert by_id(findings) == {"010": ["mislabelled"], "040": ["mislabelled"]}
    assert all(f.action == "drop" and f.score < f.threshold == 0.3 for f in findings)
    held_out = table["official_split"].isin(["val", "test"])
    assert (table["label_quality"].isna() == held_out).all()


def test_held_out_labels_teach_nothing() -> None:
    rows, faces = two_classes(80)
    for each in rows[40:]:
        each["official_split"] = "test"
    table, _ = judged(only(mislabelled=LINEAR), *rows, faces=faces)
    for each in rows[40:]:
        each |= {"label": 0, "class": "angry"}
    other, _ = judged(only(mislabelled=LINEAR), *rows, faces=faces)
    assert table["label_quality"].notna().sum() == 40
    pd.testing.assert_series_equal(table["label_quality"], other["label_quality"])


def test_labels_are_not_judged_again_for_another_threshold() -> None:
    rows, faces = two_classes(80)
    table, _ = judged(only(mislabelled=LINEAR), *rows, faces=faces)
    marked = table.assign(label_quality=0.125, label_doubted=True)
    other = only(mislabelled=LINEAR | {"threshold": 0.2, "action": "flag"})
    again, findings = judged(other, *rows, faces=faces, earlier=marked)
    assert (again["label_quality"] == 0.125).all() and len(findings) == 80


@pytest.mark.parametrize("change", ["face", "label", "group", "fewer", "setting"])
def test_labels_are_judged_again_when_anything_else_changed(change: str) -> None:
    rows, faces = two_classes(80)
    table, _ = judged(only(mislabelled=LINEAR), *rows, faces=faces)
    settings: dict[str, Any] = {}
    if change == "face":
        faces[5, 0, 0] += 1
    elif change == "label":
        rows[5] |= {"class": "happy", "label": 3}
    elif change == "group":
        rows[5]["person"] = rows[7]["person"] = "someone"
    elif change == "fewer":
        rows, faces = rows[:-1], faces[:-1]
    else:
        settings["folds"] = 5
    marked = table.assign(label_quality=0.125)
    again, _ = judged(only(mislabelled=LINEAR | settings), *rows, faces=faces, earlier=marked)
    assert not (again["label_quality"] == 0.125).any()


@pytest.mark.parametrize(
    ("action", "due"),
    [
        ("flag", ["p", "p", "p", "p", "e", "e", "g", "r"]),
        ("drop", ["p", "p", "p", "e", "g", "r"]),  # without c and f
    ],
)
def test_neither_a_person_nor_a_copy_stands_on_both_sides_of_a_fold(
    action: str, due: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def suspected(faces: np.ndarray, labels: np.ndarray, groups: list[str], *_: Any) -> Any:
        asked.append(groups)
        return np.ones(len(labels)), np.zeros(len(labels), bool)

    monkeypatch.setattr("pipelines.checks.labels.suspected", suspected)
    rows = [
        row("a", person="p"),
        row("b", person="p", pixels="x"),
        row("c", person="q", pixels="x"),
        row("d", person="q", label=5, **{"class": "sad"}),
        row("e", pixels="y"),
        row("f", pixels="y", label=5, **{"class": "sad"}),
        row("g"),
        row("h", person="r"),
    ]
    judged(only(mislabelled=LINEAR, exact_duplicate=action), *rows)
    (groups,) = asked
    assert groups == due


@pytest.mark.parametrize("name", [name for name in Checks.model_fields if name != "mislabelled"])
def test_every_check_can_be_off(name: str) -> None:
    bad = row(
        "a",
        dark=0.0,
        bright=1.0,
        low_information=0.0,
        blurred=0.0,
        face_size=1.0,
        cut_off=1.0,
        landmarks_outside=1.0,
        landmarks_folded=1.0,
        landmarks_mirrored=1.0,
        haar=0.0,
        blazeface=0.0,
        **{"class": "sad"},
    )
    rows = [bad, bad | {"id": "b", "class": "happy"}, bad | {"id": "n", "pixels": "q"}]
    rows += [row("c", std=0.0), row("d", **UNREAD, defect="x"), row("e", **UNREAD, unreadable="x")]
    pictures = [noise(1)] * 6
    settings = CHECKS.model_dump()
    settings["mislabelled"]["action"] = "off"
    for check in settings:
        if check != "mislabelled":
            settings[check]["action"] = "flag"
    settings["exact_duplicate"]["action"] = "flag"
    _, findings = judged(Checks.model_validate(settings), *rows, pictures=pictures)
    assert name in {f.check for f in findings} or name == "landmarks_implausible"
    settings[name]["action"] = "off"
    _, findings = judged(Checks.model_validate(settings), *rows, pictures=pictures)
    assert name not in {f.check for f in findings}
