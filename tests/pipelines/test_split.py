import hashlib
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from models.schemes import EMOTIONS
from pipelines import filter
from pipelines.checks import duplicates
from pipelines.checks.faces import labelled_box
from pipelines.checks.judge import Kept, judge
from pipelines.checks.measures import COLUMNS as MEASURES
from pipelines.cli import GrimaceError
from pipelines.crops import decode
from pipelines.datasets import builder
from pipelines.datasets import examples as read_archive
from pipelines.datasets.archive import open_archive
from pipelines.datasets.example import Example
from pipelines.datasets.table import write_examples
from pipelines.params import Split, load_params
from pipelines.split import COLUMNS, OUT, SIDES, absent, check, main, make_index, side_of

ROOT = Path(__file__).parents[2]
REAL_DATA = ROOT.parent / "shared/datasets"
PARAMS = Split(seed=2026, val=0.15, test=0.2)
NOTHING = pd.DataFrame(columns=["id", "person", "cluster", "brightness", "yaw", "face_size"])


def index_of(
    examples: Iterable[Example], params: Split = PARAMS, dataset: str = "faces"
) -> pd.DataFrame:
    return make_index(examples, dataset, params, NOTHING)


def people(count: int, start: int = 0) -> list[Example]:
    """Three pictures of each person, one of every emotion in turn."""
    return [
        Example(f"id-{person}-{shot}", b"", emotion=(person + shot) % 7, person=f"person-{person}")
        for person in range(start, start + count)
        for shot in range(3)
    ]


def strangers(count: int) -> list[Example]:
    return [Example(f"id-{number}", b"", emotion=number % 7) for number in range(count)]


# The draw


def test_a_person_stands_on_one_side() -> None:
    examples = people(300)
    np.random.default_rng(0).shuffle(examples)
    index = index_of(examples)
    assert len(index) == 900 and set(index["split"]) == set(SIDES)
    person = index["id"].str.split("-").str[1]
    assert (index.groupby(person)["split"].nunique() == 1).all()
    check(index, "faces")


@pytest.mark.parametrize("examples", [people(4000), strangers(4000)], ids=["people", "strangers"])
def test_shares_are_about_right_in_every_class(examples: list[Example]) -> None:
    index = index_of(examples)
    overall = index["split"].value_counts(normalize=True)
    assert overall["test"] == pytest.approx(0.2, abs=0.02)
    assert overall["val"] == pytest.approx(0.15, abs=0.02)
    by_class = pd.crosstab(index["class"], index["split"], normalize="index")
    assert len(by_class) == 7
    # Four standard deviations of 571 draws.
    assert by_class["test"].to_numpy() == pytest.approx([0.2] * 7, abs=0.067)
    assert by_class["val"].to_numpy() == pytest.approx([0.15] * 7, abs=0.06)


def test_added_data_moves_nobody() -> None:
    before = index_of(people(200)).set_index("id")["split"]
    after = index_of(people(50, start=200) + people(200)[::-1]).set_index("id")["split"]
    assert len(after) == 750
    assert (after[before.index] == before).all()


def test_another_label_moves_nobody() -> None:
    examples = strangers(300)
    corrected = [replace(example, emotion=(example.emotion + 1) % 7) for example in examples]
    assert list(index_of(corrected)["split"]) == list(index_of(examples)["split"])


def test_a_larger_share_takes_from_training_alone() -> None:
    small = index_of(strangers(2000))["split"]
    large = index_of(strangers(2000), Split(seed=2026, val=0.3, test=0.2))["split"]
    assert (large[small != "train"] == small[small != "train"]).all()
    assert (large == "val").sum() > (small == "val").sum()


def test_the_seed_changes_the_draw() -> None:
    one = index_of(strangers(500))["split"]
    two = index_of(strangers(500), Split(seed=1, val=0.15, test=0.2))["split"]
    assert (one != two).mean() > 0.2


def test_sides_stay_what_they_once_were() -> None:
    """Pinned: another hash would move people between the sides of data already trained on."""
    sides = {number: side_of(f"person-{number}", PARAMS) for number in range(40)}
    assert {number: side for number, side in sides.items() if side != "train"} == {
        7: "test",
        10: "test",
        15: "test",
        16: "test",
        17: "test",
        21: "test",
        28: "val",
        29: "val",
        30: "val",
        37: "test",
        39: "test",
    }


def test_a_draw_beyond_chance_is_refused() -> None:
    # Only strangers who fall on the test side are surprised.
    lot = [Example(f"id-{number}", b"", emotion=3) for number in range(300)]
    unlucky = [f"x-{number}" for number in range(99) if side_of(f"x-{number}", PARAMS) == "test"]
    said = r"faces: (\d+) of \1 draws of class surprise fell on test, where 20% .*split\.seed"
    with pytest.raises(GrimaceError, match=said):
        index_of([*lot, *(Example(id, b"", emotion=6) for id in unlucky)])
    # A person's many pictures are one draw.
    person = next(f"p{n}" for n in range(99) if side_of(f"p{n}", PARAMS) == "test")
    shots = [Example(f"shot-{number}", b"", emotion=6, person=person) for number in range(50)]
    index_of([*lot, *shots])
    # Nor is an official side a draw.
    index_of([Example(f"o-{n}", b"", emotion=1, official_split="test") for n in range(300)])


# Official sides


def official(sides: dict[str, int]) -> list[Example]:
    return [
        Example(f"{side}-{number}", b"", emotion=number % 7, official_split=side)
        for side, count in sides.items()
        for number in range(count)
    ]


def test_the_official_split_is_respected() -> None:
    examples = official(dict.fromkeys(SIDES, 100))
    index = index_of(examples)
    assert list(index["split"]) == [example.official_split for example in examples]


@pytest.mark.parametrize(
    ("given", "due"),
    [
        ({"train": 4000, "test": 500}, {"val": 0.15 / 0.8, "train": 0.65 / 0.8}),
        ({"train": 4000, "val": 500}, {"test": 0.2 / 0.85, "train": 0.65 / 0.85}),
        ({"train": 4000}, {"val": 0.15, "test": 0.2, "train": 0.65}),
    ],
    ids=["no val", "no test", "train alone"],
)
def test_a_side_that_the_source_lacks_is_drawn_from_its_train(
    given: dict[str, int], due: dict[str, float]
) -> None:
    index = index_of(official(given)).set_index("id")["split"]
    of_train = index[index.index.str.startswith("train")].value_counts(normalize=True)
    assert dict(of_train) == pytest.approx(due, abs=0.02)
    for side in given.keys() - {"train"}:
        assert (index[index.index.str.startswith(side)] == side).all()
    # More of the same moves nobody.
    more = index_of(official({side: count + 50 for side, count in given.items()})).set_index("id")
    assert (more.loc[index.index, "split"] == index).all()


def test_people_stay_together_where_a_side_is_drawn_from_train() -> None:
    trained = [replace(example, official_split="train") for example in people(300)]
    index = index_of(trained + official({"test": 50}))
    assert set(index["split"]) == set(SIDES)
    assert (index.groupby("group")["split"].nunique() == 1).all()


def test_what_is_for_evaluation_only_is_all_test() -> None:
    examples = [Example(f"aflw2k3d-{number}", b"") for number in range(30)]
    index = index_of(examples, dataset="aflw2k3d")
    assert set(index["split"]) == {"test"}
    check(index, "aflw2k3d")
    with pytest.raises(GrimaceError, match="no example on the test side"):
        check(index[:0], "aflw2k3d")


# Copies


def test_a_training_image_that_copies_a_test_image_leaves_training() -> None:
    examples = [
        Example("a", b"", official_split="train", cluster="a"),
        Example("b", b"", official_split="val", cluster="a"),
        Example("c", b"", official_split="test", cluster="a"),
        Example("d", b"", official_split="test", cluster="a"),
        Example("e", b"", official_split="train", cluster="e"),
        Example("f", b"", official_split="val", cluster="e"),
        Example("g", b"", official_split="train", cluster="g"),
        Example("h", b"", official_split="train", cluster="g"),
        Example("i", b"", official_split="train"),
    ]
    index = index_of(examples).set_index("id")
    assert dict(index["split"]) == {
        **{"a": OUT, "b": OUT, "c": "test", "d": "test", "e": OUT, "f": "val"},
        **{"g": "train", "h": "train", "i": "train"},
    }
    assert dict(index["reason"][index["reason"] != ""]) == {
        "a": "copy of c on the test side",
        "b": "copy of c on the test side",
        "e": "copy of f on the val side",
    }
    assert list(index["group"]) == ["a", "a", "a", "a", "e", "e", "g", "g", "i"]


def test_a_person_on_two_official_sides_leaves_the_lesser() -> None:
    examples = [
        Example("x", b"", person="0a1b", official_split="train"),
        Example("y", b"", person="0a1b", official_split="test"),
        Example("z", b"", official_split="train"),
        Example("v", b"", official_split="val"),
    ]
    index = index_of(examples).set_index("id")
    assert list(index["split"]) == [OUT, "test", "train", "val"]
    assert index.loc["x", "reason"] == "same person as y on the test side"
    check(index.reset_index(), "faces")


def test_a_copy_brings_its_person_along() -> None:
    """x and y are one picture, so whoever they show, it is on the test side with z."""
    examples = [
        Example("w", b"", person="p", official_split="train"),
        Example("x", b"", person="p", official_split="train", cluster="x"),
        Example("y", b"", person="q", official_split="train", cluster="x"),
        Example("z", b"", person="q", official_split="test"),
        Example("v", b"", official_split="val"),
    ]
    index = index_of(examples).set_index("id")
    assert dict(index["split"]) == {"w": OUT, "x": OUT, "y": OUT, "z": "test", "v": "val"}
    assert list(index["reason"][:3]) == [
        "linked by copies to z on the test side",
        "linked by copies to z on the test side",
        "same person as z on the test side",
    ]


# Properties, over many random datasets


def random_faces(seed: int) -> tuple[list[Example], list[tuple[int, int]]]:
    """Some with persons, some with official sides, each among the first; and pairs of copies."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(8, 120))
    given = [SIDES, ("train", "test"), ("train", "val"), ("train",), ("",), (*SIDES, "")][seed % 6]
    known = rng.random() if seed % 2 else 0.0  # how many have a person
    faces = [
        Example(
            f"face-{number:03d}",
            b"",
            emotion=int(rng.integers(-1, 7)),
            person=f"person-{rng.integers(20)}" if rng.random() < known else "",
            official_split=given[number] if number < len(given) else str(rng.choice(given)),
        )
        for number in range(count)
    ]
    pairs = [tuple(rng.integers(0, count, 2)) for _ in range(int(rng.integers(0, count)))]
    return faces, [(int(a), int(b)) for a, b in pairs]


def clustered(faces: list[Example], pairs: list[tuple[int, int]], upto: int) -> list[Example]:
    """The first faces, with clusters as those pairs give that lie among them."""
    root = list(range(upto))
    for a, b in pairs:
        if max(a, b) < upto:
            old, new = sorted((root[a], root[b]))[::-1]
            root = [new if r == old else r for r in root]
    names = [faces[r].id if root.count(r) > 1 else "" for r in root]
    return [replace(face, cluster=name) for face, name in zip(faces[:upto], names, strict=True)]


def tied(a: Example, b: Example) -> bool:
    return bool((a.person and a.person == b.person) or (a.cluster and a.cluster == b.cluster))


def family_of(number: int, faces: list[Example]) -> list[int]:
    """All whom a chain of persons and copies leads to."""
    found, ahead = {number}, [number]
    while ahead:
        face = faces[ahead.pop()]
        new = {other for other in range(len(faces)) if tied(face, faces[other])} - found
        found |= new
        ahead.extend(new)
    return sorted(found)


@pytest.mark.parametrize("seed", range(60))
def test_nobody_and_no_copy_straddles(seed: int) -> None:
    faces, pairs = random_faces(seed)
    faces = clustered(faces, pairs, len(faces))
    index = index_of(faces)
    assert list(index["id"]) == [face.id for face in faces]
    alone = index_of([replace(face, cluster="", person="") for face in faces])
    sides, reasons = list(index["split"]), list(index["reason"])
    place = {face.id: number for number, face in enumerate(faces)}
    for a, face in enumerate(faces):
        family = family_of(a, faces)
        if sides[a] == OUT:
            named, side = reasons[a].split(" ")[-5], reasons[a].split(" ")[-2]
            assert place[named] in family and SIDES.index(side) > 0
        else:
            assert reasons[a] == ""
            assert {sides[b] for b in family} <= {sides[a], OUT}
            if face.official_split in ("val", "test"):
                assert sides[a] == face.official_split
            if not face.person:
                assert sides[a] == alone["split"][a], "moved"
        if family == [a]:
            assert sides[a] != OUT
    inside = index[index["split"] != OUT]
    assert inside.empty or inside.groupby("group")["split"].nunique().max() == 1


@pytest.mark.parametrize("seed", range(60))
def test_under_additions_an_old_id_keeps_its_side_or_leaves(seed: int) -> None:
    faces, pairs = random_faces(seed)
    old = clustered(faces, pairs, len(faces) // 2)
    before = index_of(old).set_index("id")["split"]
    new = clustered(faces, pairs, len(faces))
    np.random.default_rng(seed).shuffle(new)
    after = index_of(new).set_index("id").loc[before.index, "split"]
    assert ((after == before) | (after == OUT)).all()


# The index


def test_columns_and_classes() -> None:
    examples = [
        Example("a", b"", emotion=4),
        Example("b", b""),
        Example("c", b"", label="contempt", person="p"),
    ]
    measured = pd.DataFrame(
        {
            "id": ["c", "gone", "a"],
            "person": ["p", "", ""],
            "cluster": "",
            "brightness": [0.5, 0.1, 0.25],
            "yaw": [np.nan, 1.0, -30.0],
            "face_size": [48.0, 2.0, 96.0],
            "std": [1.0, 2.0, 3.0],
        }
    )
    index = make_index(examples, "affectnet", PARAMS, measured)
    slices = ["class", "brightness", "yaw", "face_size", "source"]
    assert list(index.columns) == ["id", "split", "reason", "group", "cluster", *slices]
    assert list(index["class"]) == ["neutral", "unlabelled", "contempt"]
    assert list(index["group"]) == ["a", "b", "p"]
    assert list(index["source"]) == ["affectnet"] * 3
    np.testing.assert_array_equal(index["brightness"].astype(float), [0.25, np.nan, 0.5])
    np.testing.assert_array_equal(index["yaw"].astype(float), [-30, np.nan, np.nan])
    np.testing.assert_array_equal(index["face_size"].astype(float), [96, np.nan, 48])


def test_the_collections_of_300w_lp_are_sources() -> None:
    examples = [Example(f"{name}_0001_3", b"") for name in ("AFW", "HELEN", "IBUG", "LFPW", "X")]
    sources = index_of(examples, dataset="the300w_lp")["source"]
    assert list(sources) == [
        *[f"the300w_lp {name}" for name in ("AFW", "HELEN", "IBUG", "LFPW")],
        "the300w_lp",
    ]


# What is refused


def on_each_side() -> list[Example]:
    """All classes on all sides, officially."""
    return official(dict.fromkeys(SIDES, 7))


def test_a_good_split_passes() -> None:
    index = index_of(on_each_side())
    check(index, "faces")
    assert absent(index) == []


@pytest.mark.parametrize("kind", ["group", "cluster"])
def test_a_leak_is_refused(kind: str) -> None:
    index = index_of(on_each_side())
    index[kind] = [f"g{number % 7}" if number in (2, 9) else "" for number in range(21)]
    with pytest.raises(GrimaceError, match=rf"faces: {kind}s on more than one side .*: g2"):
        check(index, "faces")
    index.loc[9, "split"] = OUT
    check(index, "faces")


@pytest.mark.parametrize("side", SIDES)
def test_an_empty_side_is_refused(side: str) -> None:
    index = index_of(on_each_side())
    with pytest.raises(GrimaceError, match=rf"faces: no example on the {side} side .*: .* 7"):
        check(index[index["split"] != side], "faces")


def test_no_examples_at_all() -> None:
    with pytest.raises(GrimaceError, match="no example on the train side"):
        check(index_of([]), "faces")


def test_a_class_without_training_examples_is_refused() -> None:
    examples = [example for example in on_each_side() if example.id not in ("train-1", "train-5")]
    with pytest.raises(GrimaceError, match=r"faces: no training example of class disgust, sad;"):
        check(index_of(examples), "faces")


def test_a_class_without_test_examples_is_told() -> None:
    examples = [example for example in on_each_side() if example.id not in ("test-1", "val-5")]
    index = index_of(examples)
    check(index, "faces")
    assert absent(index) == [
        "no example of class sad on the val side",
        "no example of class disgust on the test side",
    ]


def test_landmark_data_needs_no_classes() -> None:
    examples = [Example(side, b"", official_split=side) for side in SIDES]
    check(index_of(examples), "faces")


# The stage


@pytest.mark.parametrize("task", ["landmarks", "emotion"])
def test_all_classes_are_asked_of_what_emotions_are_learnt_from(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A landmark dataset of which some folders are named after an emotion is as good as any."""
    clean, filtered = tmp_path / "data/clean/folder", tmp_path / "reports/filter/folder"
    clean.mkdir(parents=True)
    filtered.mkdir(parents=True)
    examples = [e for e in on_each_side() if e.emotion < 3]
    write_examples(examples, clean)
    measured = {"id": [e.id for e in examples], "brightness": 0.5, "yaw": 0.0, "face_size": 9.0}
    ties = {"person": [e.person for e in examples], "cluster": [e.cluster for e in examples]}
    pd.DataFrame(measured | ties).to_parquet(filtered / "examples.parquet")
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["tasks"][task]["dataset"] = "folder"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["split", "--dataset", "folder"])
    if task == "emotion":
        with pytest.raises(GrimaceError, match="folder: no training example of class "):
            main()
    else:
        main()
        assert len(pd.read_parquet("data/split/folder/index.parquet")) == len(examples)


def test_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    clean, filtered = tmp_path / "data/clean/fer2013", tmp_path / "reports/filter/fer2013"
    clean.mkdir(parents=True)
    filtered.mkdir(parents=True)
    faces = people(120)
    first, other = (
        next(e for e in faces if side_of(e.person, PARAMS) == side) for side in ("train", "test")
    )
    copies = [replace(e, cluster=first.id) if e in (first, other) else e for e in faces]
    write_examples(copies, clean)
    ids = [face.id for face in faces]
    sizes = np.arange(360.0)
    measured = {"id": ids, "brightness": 0.5, "yaw": np.nan, "face_size": sizes}
    ties = {name: [getattr(face, name) for face in copies] for name in ("person", "cluster")}
    pd.DataFrame(measured | ties).to_parquet(filtered / "examples.parquet")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["split", "--dataset", "fer2013"])
    main()
    index = pd.read_parquet("data/split/fer2013/index.parquet")
    assert list(index["id"]) == ids and list(index.columns) == COLUMNS
    assert list(index["face_size"]) == list(sizes)
    report = Path("reports/split/fer2013")
    counts = pd.read_csv(report / "classes.csv").set_index("class")
    assert list(counts.columns) == [*SIDES, OUT]
    assert set(counts.index) == set(EMOTIONS) and counts.to_numpy().sum() == 360
    leaving = pd.read_csv(report / "out.csv").set_index("id")["reason"]
    assert list(leaving.index) == [e.id for e in faces if e.person == first.person]
    assert leaving[first.id] == f"copy of {other.id} on the test side"
    assert set(leaving[1:]) == {f"linked by copies to {other.id} on the test side"}
    with Image.open(report / "classes.png") as picture:
        assert min(picture.size) > 200
    summary = json.loads(Path("reports/split/fer2013.json").read_text())
    assert summary["examples"] == index["split"].value_counts().to_dict()
    assert sum(summary["groups"].values()) == 120
    assert summary["out"] == {"copies": 1, "same_person": 0, "linked": 2}

    # A refused split leaves the old one.
    write_examples(people(1), clean)
    with pytest.raises(GrimaceError, match="no example on the"):
        main()
    assert len(pd.read_parquet("data/split/fer2013/index.parquet")) == 360


@pytest.mark.parametrize("kind", ["exact copy", "label conflict"])
def test_a_dropped_copy_brings_its_person_along(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """a1 and b1 are one picture; whether b1 or both are dropped, b2 shows whom a2 shows."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["filter"]["checks"]["no_face"] |= {"detectors": ["haar"], "votes": 1}
    params["filter"]["checks"]["mislabelled"]["action"] = "off"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    drawn = {side_of(f"p{n}", load_params().split): f"p{n}" for n in range(50)}
    assert set(drawn) == set(SIDES)

    def face(id: str, side: str, emotion: int = 3, picture: str = "") -> Example:
        pixels = np.random.default_rng([*(picture or id).encode()]).integers(0, 256, (24, 24, 3))
        png = cv2.imencode(".png", pixels.astype(np.uint8))[1].tobytes()
        return Example(id, png, emotion=emotion, person=drawn[side])

    trained = [replace(face(f"t{n}", "train", n), person="") for n in range(99)]
    trained = [e for e in trained if side_of(e.id, load_params().split) == "train"][:14]
    trained = [replace(e, emotion=n % 7) for n, e in enumerate(trained)]
    faces = [
        face("a1", "test", picture="one"),
        face("a2", "test"),
        face("b1", "train", 4 if kind == "label conflict" else 3, picture="one"),
        face("b2", "train"),
        face("c", "val"),
        *trained,
    ]
    builder.write(Path("data/raw/folder"), faces, "a card")
    for stage in (filter.main, main):
        monkeypatch.setattr(sys, "argv", ["stage", "--dataset", "folder"])
        stage()
    index = pd.read_parquet("data/split/folder/index.parquet").set_index("id")
    stays = {"a2": "test", "b2": OUT, "c": "val", **{e.id: "train" for e in trained}}
    assert dict(index["split"]) == stays | ({"a1": "test"} if kind == "exact copy" else {})
    named = "a1" if kind == "exact copy" else "a2"
    assert index.loc["b2", "reason"] == f"linked by copies to {named} on the test side"


# Real data: the filter's own search for copies, then the split, then a search that shares nothing


def found_by_filter(faces: list[Example]) -> list[Example]:
    """What the copy checks of `filter` leave, with clusters; every other check is off."""
    rows, coarse, sharp = [], [], []
    for face in faces:
        rgb = decode(face.image, 3)
        small = duplicates.small_version(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))
        coarse.append(duplicates.coarse_version(small))
        sharp.append(duplicates.details(small))
        hash, mirrored = duplicates.perceptual_hashes(small)
        rows.append(
            {
                "id": face.id,
                "class": EMOTIONS[face.emotion] if face.emotion >= 0 else "unlabelled",
                "label": face.emotion,
                "official_split": face.official_split,
                "person": face.person,
                "width": rgb.shape[1],
                "height": rgb.shape[0],
                "std": rgb.std(),
                "pixels": duplicates.pixel_digest(rgb),
                "hash": hash,
                "mirror_hash": mirrored,
            }
        )
    checks = load_params(ROOT / "params.yaml").filter.checks
    off = {
        name: getattr(checks, name).model_copy(update={"action": "off"})
        for name in type(checks).model_fields
        if name not in ("exact_duplicate", "near_duplicate")
    }
    texts = {"defect": "", "unreadable": "", "landmarks_visible": ""}
    measures = pd.DataFrame(rows).assign(**texts).reindex(columns=[*MEASURES, "haar", "blazeface"])
    kept = Kept(
        np.stack(coarse),
        np.stack(sharp),
        np.zeros((len(faces), 48, 48), np.uint8),
        [face.landmarks for face in faces],
        [face.visible for face in faces],
        np.array([labelled_box(face) or (np.nan,) * 4 for face in faces]),
    )
    table, _ = judge(measures, kept, checks.model_copy(update=off))
    cluster = dict(zip(table["id"], table["cluster"], strict=True))
    stays = set(table["id"][table["kept"]])
    return [replace(face, cluster=cluster[face.id]) for face in faces if face.id in stays]


def decoded(image: bytes) -> tuple[bytes, np.ndarray]:
    """Digest of the pixels, and a grey 24x24 version; without the project's code."""
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    digest = hashlib.md5(repr(picture.size).encode() + picture.tobytes()).digest()
    return digest, np.asarray(picture.convert("L").resize((24, 24), Image.Resampling.BOX))


def patterns(small: Iterable[np.ndarray]) -> np.ndarray:
    """Rows of which products are correlations."""
    flat = np.stack([picture.ravel() for picture in small]).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    return flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-6)


def alike(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """For each of the first, the highest correlation with any of the second."""
    blocks = [first[start : start + 512] @ second.T for start in range(0, len(first), 512)]
    return np.concatenate([block.max(1) for block in blocks])


@pytest.fixture(scope="module")
def ytf() -> Path:
    path = REAL_DATA / "ytf_keypoints.zip"
    if not path.exists():
        pytest.skip(f"{path.name} is not in shared/datasets beside the repository")
    return path


@pytest.fixture(scope="module")
def fer() -> Path:
    path = REAL_DATA / "fer2013.zip"
    if not path.exists():
        pytest.skip(f"{path.name} is not in shared/datasets beside the repository")
    return path


def test_nobody_straddles_in_ytf(ytf: Path) -> None:
    faces = [face for face in read_archive("ytf_keypoints", open_archive(ytf)) if not face.defect]
    index = index_of(found_by_filter(faces), dataset="ytf_keypoints")
    check(index, "ytf_keypoints")
    sides = dict(zip(index["id"], index["split"], strict=True))
    by_name: dict[str, set[str]] = {}
    by_pixels: dict[bytes, set[str]] = {}
    held, small = [], []
    with zipfile.ZipFile(ytf) as archive:
        for member in archive.namelist():
            path = PurePosixPath(member)
            if path.suffix != ".jpg":
                continue
            name, _, number = path.stem.rpartition("_")
            key = hashlib.sha256(name.encode()).hexdigest()[:10]
            side = sides.get(f"ytf-{key}-{path.parent.name}-{number}", OUT)
            if side == OUT:
                continue
            pixels, picture = decoded(archive.read(member))
            held.append(side != "train")
            small.append(picture)
            by_name.setdefault(name, set()).add(side)
            by_pixels.setdefault(pixels, set()).add(side)
    assert len(held) == (index["split"] != OUT).sum() > 3000
    assert len(by_name) > 300
    assert [name for name, found in by_name.items() if len(found) > 1] == []
    assert max(map(len, by_pixels.values())) == 1
    assert 0.2 < np.mean(held) < 0.5
    look = patterns(small)
    assert alike(look[np.array(held)], look[~np.array(held)]).max() < 0.985


def test_no_copy_straddles_in_fer2013(fer: Path) -> None:
    """All of the held-out sides, and of training what is like one of them, and every 30th more."""
    everything = list(read_archive("fer2013", open_archive(fer)))
    digests, small = zip(*(decoded(face.image) for face in everything), strict=True)
    look = patterns(small)
    held = np.array([face.official_split != "train" for face in everything])
    likeness = np.ones(len(everything))
    likeness[~held] = alike(look[~held], look[held])
    chosen = (likeness > 0.9) | (np.arange(len(everything)) % 30 == 0)
    assert (likeness[~held] > 0.985).sum() > 500 and chosen.sum() < 10_000

    faces = [face for face, wanted in zip(everything, chosen, strict=True) if wanted]
    cleaned = found_by_filter(faces)
    index = index_of(cleaned, dataset="fer2013").set_index("id")
    check(index.reset_index(), "fer2013")
    assert len(cleaned) < len(faces)  # copies to the pixel
    assert (index["split"] == OUT).sum() > 300  # near copies
    assert not index["reason"].str.endswith("train side").any()

    sides = index["split"].to_dict()
    official = {face.id: face.official_split for face in everything}
    assert all(side in (official[id], OUT) for id, side in sides.items())
    by_pixels: dict[bytes, set[str]] = {}
    rows: dict[str, list[int]] = {side: [] for side in SIDES}
    for number, face in enumerate(everything):
        side = sides.get(face.id, OUT)
        if side != OUT:
            rows[side].append(number)
            by_pixels.setdefault(digests[number], set()).add(side)
    assert max(map(len, by_pixels.values())) == 1
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert alike(look[rows[one]], look[rows[other]]).max() < 0.97
