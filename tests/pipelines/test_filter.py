import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from models.schemes import EMOTIONS
from pipelines import filter as stage
from pipelines.checks import Finding
from pipelines.checks.judge import DERIVED, Kept
from pipelines.cli import GrimaceError
from pipelines.datasets import builder, synthetic
from pipelines.datasets.example import Example
from pipelines.datasets.table import read_examples
from pipelines.filter import choose_pictures, main, measure_all

ROOT = Path(__file__).parents[2]


def picture(seed: int, format: str = "PNG", size: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), np.uint8)
    return encode(pixels, format)


def encode(pixels: np.ndarray, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {}
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


@cache
def faces(count: int) -> list[Example]:
    return list(synthetic.examples(count, seed=3))


@pytest.fixture
def measured(tmp_path: Path) -> Callable[..., tuple[pd.DataFrame, Kept]]:
    """Measure examples in this process; all is as for the stage, but no more."""

    def measured(
        examples: Sequence[Example], previous: Path | None = None, **settings: Any
    ) -> tuple[pd.DataFrame, Kept]:
        return measure_all(
            lambda: iter(examples),
            previous=previous or tmp_path / "none.parquet",
            scratch=tmp_path,
            **{"detectors": ("haar",), "workers": 1, "address": None} | settings,
        )

    return measured


# measures


def test_one_row_an_example_in_their_order(measured) -> None:
    examples = [faces(3)[2], Example("bad", b""), replace(faces(3)[0], defect="row"), faces(3)[1]]
    table, kept = measured(examples)
    assert table["id"].tolist() == [example.id for example in examples]
    assert table["unreadable"].tolist() == ["", "zero bytes", "", ""]
    assert table["defect"].tolist() == ["", "", "row", ""]
    assert table["std"].isna().tolist() == [False, True, True, False]
    assert table["class"].tolist()[::3] == [EMOTIONS[example.emotion] for example in examples[::3]]
    assert table["landmarks_visible"][0] == "".join("01"[int(v)] for v in examples[0].visible)
    assert (table["width"][0], table["height"][0]) == (128, 128)
    assert [points.shape for points in kept.landmarks] == [(68, 2), (0, 2), (68, 2), (68, 2)]
    assert kept.coarse.any(axis=(1, 2)).tolist() == [True, False, False, True]
    assert kept.sharp.any(axis=(1, 2)).tolist() == [True, False, False, True]
    assert kept.faces.any(axis=(1, 2)).tolist() == [True, False, False, True]


def test_the_face_crop_follows_the_landmarks(measured) -> None:
    face = faces(1)[0]
    everywhere = np.full((300, 300, 3), 90, np.uint8)
    everywhere[150:278, 20:148] = cv2.imdecode(np.frombuffer(face.image, np.uint8), 1)
    moved = replace(
        face,
        id="moved",
        image=cv2.imencode(".png", everywhere)[1].tobytes(),
        landmarks=face.landmarks + np.float32([20, 150]),
    )
    _, kept = measured([face, moved])
    difference = kept.faces[0].astype(int) - kept.faces[1]
    assert np.abs(difference).mean() < 4


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "TIFF"])
def test_equal_pixels_have_one_digest_whatever_their_encoding(format: str, measured) -> None:
    table, _ = measured([Example("a", picture(1)), Example("b", picture(1, format))])
    assert table["pixels"].nunique() == 1


def test_grey_stored_as_colour_is_the_same_picture(measured) -> None:
    grey = np.random.default_rng(1).integers(0, 256, (24, 24), np.uint8)
    colour = np.stack([grey] * 3, -1)
    table, _ = measured([Example("a", encode(grey)), Example("b", encode(colour))])
    measures = table.drop(columns=["id", "digest"])
    pd.testing.assert_series_equal(measures.iloc[0], measures.iloc[1], check_names=False)


def test_same_bytes_in_another_shape_are_another_picture(measured) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (12, 48), np.uint8)
    other = encode(pixels.reshape(48, 12))
    table, _ = measured([Example("a", encode(pixels)), Example("b", other)])
    assert table["pixels"].nunique() == 2


def test_what_the_seeds_would_have_kept_does_not_depend_on_the_detectors(measured) -> None:
    examples = faces(12)
    tables = [measured(examples, detectors=names)[0] for names in (("haar",), ("blazeface",))]
    pd.testing.assert_series_equal(tables[0]["seed_kept"], tables[1]["seed_kept"])
    assert (tables[0]["seed_kept"] == (tables[0]["haar"] > 0)).all()


def test_processes_make_no_difference(measured, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [*faces(11), Example("bad", b"")]
    alone, kept = measured(examples)
    names = ("coarse", "sharp", "faces")
    pictures = {name: np.array(getattr(kept, name)) for name in names}
    monkeypatch.setattr(stage, "CHUNK", 5)
    together, kept_too = measured(examples, workers=2)
    pd.testing.assert_frame_equal(alone, together)
    for name in names:
        assert np.array_equal(pictures[name], getattr(kept_too, name))


def test_a_worker_loads_no_tensorflow_and_no_tfds() -> None:
    code = (
        "import sys, pipelines.filter\n"
        "from pipelines.checks.measures import measure\n"
        "light = 'pandas' not in sys.modules\n"
        "from pipelines.datasets.example import Example\n"
        "measure([(Example('a', b''), '', False)], ('haar',))\n"
        "print(light, {'tensorflow', 'tensorflow_datasets', 'sklearn', 'keras'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True set()\n"


def test_ids_that_come_twice_are_refused(measured) -> None:
    with pytest.raises(GrimaceError, match="ids are not unique"):
        measured([Example("a", picture(1)), Example("a", picture(2))])


def test_no_examples(measured) -> None:
    with pytest.raises(GrimaceError, match="no example to filter"):
        measured([])


# what did not change is not measured again


@pytest.fixture
def marked(measured, tmp_path: Path) -> Path:
    """The table of an earlier audit, in which no measure of brightness is a true one."""
    table, _ = measured(faces(4))
    path = tmp_path / "examples.parquet"
    table.assign(**dict.fromkeys(DERIVED, 0), brightness=-1.0).to_parquet(path, index=False)
    return path


def taken_over(table: pd.DataFrame) -> list[bool]:
    return (table["brightness"] == -1).tolist()


def test_only_new_examples_are_measured(measured, marked: Path) -> None:
    table, kept = measured([faces(6)[5], *faces(4), faces(6)[4]], marked)
    assert taken_over(table) == [False, True, True, True, True, False]
    assert kept.sharp.any(axis=(1, 2)).all()


def test_what_left_the_source_leaves_the_table(measured, marked: Path) -> None:
    table, _ = measured(faces(4)[1:3], marked)
    assert table["id"].tolist() == [face.id for face in faces(4)[1:3]]
    assert taken_over(table) == [True, True]


@pytest.mark.parametrize(
    "change",
    [
        {"image": picture(7)},
        {"emotion": 6},
        {"label": "contempt"},
        {"landmarks": np.zeros((68, 2), np.float32)},
        {"visible": np.zeros(68, bool)},
        {"person": "someone"},
        {"official_split": "test"},
        {"defect": "bad row"},
    ],
)
def test_a_changed_example_is_measured_anew(change: dict[str, Any], measured, marked: Path) -> None:
    first, *others = faces(4)
    assert getattr(first, next(iter(change))) is not next(iter(change.values()))
    table, _ = measured([replace(first, **change), *others], marked)
    assert taken_over(table) == [False, True, True, True]


def test_a_table_of_another_form_is_not_taken_over(measured, marked: Path) -> None:
    pd.read_parquet(marked).drop(columns="label_key").to_parquet(marked)
    table, _ = measured(faces(4), marked)
    assert taken_over(table) == [False] * 4


def test_other_detectors_measure_anew(measured, marked: Path) -> None:
    table, _ = measured(faces(4), marked, detectors=("blazeface",))
    assert taken_over(table) == [False] * 4
    assert "haar" not in table


# pictures to show


def finding(id: str, check: str, score: float) -> Finding:
    return Finding(id, check, score, 0.0, "flag", "")


def test_pictures_are_chosen_from_the_lowest_score_to_the_highest() -> None:
    ids = [f"{number:03d}" for number in range(200)]
    table = pd.DataFrame({"id": ids, "pixels": ids, "cluster": ""})
    found = [finding(id, "dark", float(id)) for id in reversed(ids)]
    chosen = choose_pictures(table, found)["dark"]
    assert len(chosen) == 48
    assert chosen == sorted(chosen) and (chosen[0], chosen[-1]) == ("000", "199")


def test_copies_are_shown_beside_each_other() -> None:
    table = pd.DataFrame(
        {"id": list("abcdef"), "pixels": list("pqpqrr"), "cluster": [*"aaaa", "", ""]}
    )
    found = [finding("c", "exact_duplicate", 1.0), finding("b", "near_duplicate", 0.9)]
    chosen = choose_pictures(table, found)
    assert chosen == {"exact_duplicate": ["a", "c"], "near_duplicate": ["a", "b", "c", "d"]}


# the stage


Stage = Callable[..., None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the project's params, all detectors and labels aside."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["filter"]["checks"]["no_face"] |= {"detectors": ["haar"], "votes": 1}
    params["filter"]["overrides"] = {}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_params(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    change(params["filter"])
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def command(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["filter", *map(str, arguments)])
        main()

    return command


@pytest.fixture
def run_stage(command: Callable[..., None]) -> Stage:
    """Run the stage on a raw dataset of these examples."""

    def run_stage(examples: list[Example], *arguments: str) -> None:
        builder.write(Path("data/raw/fer2013"), examples, "a card")
        command("--dataset", "fer2013", *arguments)

    return run_stage


REPORT = Path("reports/filter/fer2013")


def test_the_stage(run_stage: Stage) -> None:
    points = np.array([[1, 2], [3, 4]], np.float32)
    good = Example(
        "good",
        picture(1),
        emotion=3,
        landmarks=points,
        visible=np.ones(2, bool),
        person="p",
        official_split="test",
    )
    raw = [
        good,
        Example("other", picture(2), emotion=3),
        Example("unlabelled", picture(3)),
        Example("copy", picture(1, "BMP"), emotion=3, official_split="train"),
        Example("broken", picture(4)[:200], emotion=0),
        Example("blank", encode(np.full((1, 1), 7, np.uint8)), emotion=0),
        Example("$bad$", picture(5), defect="label 9"),
    ]
    run_stage(raw)

    kept = {example.id: example for example in read_examples(Path("data/clean/fer2013"))}
    findings = pd.read_parquet(REPORT / "findings.parquet")
    dropped = findings[findings["action"] == "drop"]
    assert set(kept) == {"good", "other", "unlabelled"}
    assert {"id", "check", "score", "threshold", "action"} <= set(findings.columns)
    assert dict(zip(dropped["id"], dropped["check"], strict=True)) == {
        "copy": "exact_duplicate",
        "broken": "unreadable",
        "blank": "blank",
        "$bad$": "defect",
    }
    pd.testing.assert_frame_equal(pd.read_csv(REPORT / "findings.csv"), findings, check_dtype=False)

    back = kept["good"]
    assert (back.image, back.emotion, back.person) == (good.image, 3, "p")
    assert back.official_split == "test" and np.array_equal(back.landmarks, points)
    assert (back.cluster, back.weight) == ("copy", 1.0)
    assert kept["other"].cluster == ""

    table = pd.read_parquet(REPORT / "examples.parquet").set_index("id")
    assert set(table.index) == {example.id for example in raw}
    assert set(table.index[table["kept"]]) == set(kept)
    assert dict(table.loc[~table["kept"], "reason"]) == dict(
        zip(dropped["id"], dropped["check"], strict=True)
    )
    counts = json.loads(REPORT.with_suffix(".json").read_text())
    assert (counts["raw"], counts["kept"], counts["dropped"]) == (7, 3, 4)
    assert counts["dropped_by_check"] == {
        "blank": 1,
        "defect": 1,
        "exact_duplicate": 1,
        "unreadable": 1,
    }
    assert counts["found_by_check"] == findings["check"].value_counts().to_dict()
    classes = pd.read_csv(REPORT / "classes.csv").set_index("class")
    assert classes.loc["happy"].tolist() == [3, 2]
    page = (REPORT / "report.html").read_text()
    assert "Audit of fer2013" in page and "data:image" in page


def test_weights_reach_the_clean_data(folder: Path, run_stage: Stage) -> None:
    def weigh(params: dict[str, Any]) -> None:
        params["checks"]["dark"] = {"action": "weight", "weight": 0.25, "threshold": 0.5}

    with_params(folder, weigh)
    dark = np.random.default_rng(9).integers(0, 40, (24, 24), np.uint8)
    run_stage([Example("a", picture(1)), Example("b", encode(dark))])
    kept = {e.id: e.weight for e in read_examples(Path("data/clean/fer2013"))}
    assert kept == {"a": 1.0, "b": 0.25}
    assert json.loads(REPORT.with_suffix(".json").read_text())["weighted"] == 1


def test_a_second_run_gives_the_same_with_and_without_the_first(run_stage: Stage) -> None:
    examples = [Example(f"e{n}", picture(n), emotion=n % 2) for n in range(6)]
    run_stage(examples[:4])
    run_stage(examples)
    second = outputs()
    shutil.rmtree("reports")
    run_stage(examples)
    assert outputs() == second


def outputs() -> dict[str, bytes]:
    paths = [*Path("data/clean").rglob("*.parquet"), *Path("reports").rglob("*")]
    return {str(path): path.read_bytes() for path in sorted(paths) if path.is_file()}


def test_a_report_without_any_picture(folder: Path, run_stage: Stage) -> None:
    examples = [Example("a", picture(1)), Example("b", picture(1))]
    run_stage(examples, "--no-pictures")
    embedded = re.compile("data:image/(png|jpe?g|webp)")
    assert not embedded.search((REPORT / "report.html").read_text())
    with_params(folder, lambda params: params.update(pictures=False))
    run_stage(examples)
    assert not embedded.search((REPORT / "report.html").read_text())
    with_params(folder, lambda params: params.update(pictures=True))
    run_stage(examples)
    assert embedded.search((REPORT / "report.html").read_text())


def test_nothing_to_drop(folder: Path, run_stage: Stage) -> None:
    with_params(folder, lambda params: params["checks"]["no_face"].update(action="off"))
    run_stage([Example("a", picture(1)), Example("b", picture(2))])
    findings = pd.read_parquet(REPORT / "findings.parquet")
    assert len(findings) == 0
    assert findings["score"].dtype == float
    assert {"id", "check", "score", "threshold", "action"} <= set(findings.columns)
    assert len(list(read_examples(Path("data/clean/fer2013")))) == 2


def test_restored_ids_are_kept(folder: Path, run_stage: Stage) -> None:
    with_params(folder, lambda params: params.update(restore={"fer2013": ["b"]}))
    run_stage([Example("a", picture(1)), Example("b", picture(1)), Example("c", picture(1))])
    assert [e.id for e in read_examples(Path("data/clean/fer2013"))] == ["a", "b"]
    findings = pd.read_parquet(REPORT / "findings.parquet").query("check == 'exact_duplicate'")
    assert dict(zip(findings["id"], findings["action"], strict=True)) == {
        "b": "restored",
        "c": "drop",
    }


@pytest.mark.parametrize(
    ("restored", "words"),
    [
        ("nobody", r"filter\.restore\.fer2013 names ids that are not in it: nobody"),
        ("broken", r"broken cannot be kept, no later stage can use it \(zero bytes\)"),
        ("defective", r"defective cannot be kept, .* \(label 9\)"),
    ],
)
def test_what_cannot_be_restored(restored: str, words: str, folder: Path, run_stage: Stage) -> None:
    with_params(folder, lambda params: params.update(restore={"fer2013": [restored]}))
    examples = [Example("a", picture(1)), Example("broken", b"")]
    with pytest.raises(GrimaceError, match=words):
        run_stage([*examples, Example("defective", picture(2), defect="label 9")])
    assert not Path("data/clean").exists() and not REPORT.exists()


def test_dropping_everything_is_an_error_and_keeps_the_old(run_stage: Stage) -> None:
    run_stage([Example("a", picture(1))])
    before = outputs()
    with pytest.raises(GrimaceError, match=r"every example of fer2013.*b.*unreadable: zero bytes"):
        run_stage([Example("b", b"")])
    assert outputs() == before


def test_without_raw_data(command: Callable[..., None]) -> None:
    with pytest.raises(GrimaceError, match="data/raw/fer2013 holds no dataset"):
        command("--dataset", "fer2013")


# without the graph


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "faces.zip"
    with zipfile.ZipFile(path, "w") as file:
        for number in range(4):
            file.writestr(f"train/happy/Training_{number}.jpg", picture(number % 3))
        file.writestr("test/sad/PublicTest_9.jpg", picture(9))
    return path


def test_an_archive_is_audited_without_the_graph(
    command: Callable[..., None], archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("--dataset", "fer2013", "--archive", archive, "--out", "audit")
    findings = pd.read_parquet("audit/findings.parquet")
    assert {"id", "check", "score", "threshold", "action"} <= set(findings.columns)
    dropped = findings[findings["action"] == "drop"]
    assert list(zip(dropped["id"], dropped["check"], strict=True)) == [
        ("Training_3", "exact_duplicate")
    ]
    assert "Audit of fer2013" in Path("audit/report.html").read_text()
    assert not Path("data").exists() and not Path("reports").exists()
    said = capsys.readouterr().out
    assert "5 examples: 4 kept, 1 dropped" in said
    assert re.search(r"exact_duplicate .* drop .* 1 .* 1 ", said)


def test_an_audit_can_be_repeated_but_replaces_nothing_else(
    command: Callable[..., None], archive: Path
) -> None:
    for _ in range(2):
        command("--dataset", "fer2013", "--archive", archive, "--out", "audit")
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("do not lose")
    with pytest.raises(GrimaceError, match="mine is there and holds no audit: name a new folder"):
        command("--dataset", "fer2013", "--archive", archive, "--out", "mine")
    assert Path("mine/thesis.txt").read_text() == "do not lose"


def test_what_split_can_no_longer_do_is_told(
    command: Callable[..., None], archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--dataset", "fer2013", "--archive", archive, "--out", "audit")
    command(*given)
    assert "is off" not in capsys.readouterr().err
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["filter"]["checks"]["near_duplicate"]["action"] = "off"
    Path("params.yaml").write_text(yaml.safe_dump(params))
    command(*given)
    assert "warning: near_duplicate is off" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--archive", "x.zip"], ["--out", "x"]])
def test_archive_and_out_go_together(
    given: list[str], command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command("--dataset", "fer2013", *given)
    assert "--archive and --out go together" in capsys.readouterr().err


def test_the_wrong_archive(command: Callable[..., None], archive: Path) -> None:
    with pytest.raises(GrimaceError, match="does not hold ytf_keypoints"):
        command("--dataset", "ytf_keypoints", "--archive", archive, "--out", "audit")


def test_all_faces_of_one_picture_stay(command: Callable[..., None]) -> None:
    points = np.random.default_rng(5).integers(10, 50, (15, 2))
    names = [f"{axis}{number}" for number in range(15) for axis in "xy"]
    lines = [["image", *names, "person", "emotion"]]
    for right, *said in ((0, "Ann", "happy"), (60, "Bob", "sad"), (1, "Ann", "happy")):
        moved = points + np.array([right, 0])
        lines.append(["both.png", *map(str, moved.ravel()), *said])
    Path("faces").mkdir()
    Path("faces/both.png").write_bytes(picture(1, size=120))
    Path("faces/landmarks.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    command("--dataset", "folder", "--archive", "faces", "--out", "audit")
    table = pd.read_parquet("audit/examples.parquet")
    assert table["kept"].tolist() == [True, True, False]
    assert table["reason"].tolist() == ["", "", "exact_duplicate"]
    assert table["cluster"].nunique() == 1 and (table["cluster"] != "").all()


def test_the_projects_own_faces_are_good(measured) -> None:
    """What the default graph runs on loses nothing."""
    from pipelines.checks.judge import judge
    from pipelines.params import load_params

    checks = load_params(ROOT / "params.yaml").filter.checks
    measures, kept = measured(faces(120), detectors=checks.no_face.detectors)
    table, findings = judge(measures, kept, checks)
    assert table["kept"].all() and (table["weight"] == 1).all(), findings
