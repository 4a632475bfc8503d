import hashlib
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.schemes import EMOTIONS
from pipelines import datasets
from pipelines.cli import GrimaceError
from pipelines.datasets.archive import open_archive
from pipelines.datasets.builder import read as read_store
from pipelines.datasets.builder import write
from pipelines.datasets.example import Example

POINTS = [str(number) for number in range(30)]
COLUMNS = ["image", *(f"{axis}{number}" for number in range(15) for axis in "xy")]


def key(path: str) -> str:
    return "folder-" + hashlib.sha256(path.encode()).hexdigest()[:10]


def read(tmp_path: Path, members: dict[str, bytes | str]) -> list[Example]:
    folder = tmp_path / "faces"
    for name, content in members.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    found = list(datasets.examples("folder", open_archive(folder)))
    assert len({example.id for example in found}) == len(found)
    return found


def by_image(found: list[Example]) -> dict[bytes, Example]:
    return {example.image: example for example in found}


def table(*rows: list[str], columns: list[str] = COLUMNS) -> str:
    return "\n".join(",".join(row) for row in [columns, *rows]) + "\n"


def test_class_folders_at_any_depth_and_their_splits(tmp_path: Path) -> None:
    found = by_image(
        read(
            tmp_path,
            {
                "angry/1.jpg": b"1",
                "Happy/some/where/2.PNG": b"2",
                "train/sad/3.webp": b"3",
                "mine/valid/fear/4.jpeg": b"4",
                "testing/neutral/5.bmp": b"5",
                "validation/Ann Lee/surprise/6.tif": b"6",
            },
        )
    )
    assert {
        image: (EMOTIONS[row.emotion], row.official_split, row.defect)
        for image, row in found.items()
    } == {
        b"1": ("angry", "", ""),
        b"2": ("happy", "", ""),
        b"3": ("sad", "train", ""),
        b"4": ("fear", "val", ""),
        b"5": ("neutral", "test", ""),
        b"6": ("surprise", "val", ""),
    }


def test_other_words_for_the_classes_and_contempt(tmp_path: Path) -> None:
    words = ["Anger", "happiness", "sadness", "surprised", "disgusted", "fearful", "contempt"]
    found = read(tmp_path, {f"{word}/1.jpg": word.encode() for word in words})
    labels = {row.image.decode(): (row.label, row.emotion) for row in found}
    expected = ["angry", "happy", "sad", "surprise", "disgust", "fear"]
    assert labels == {
        word: (label, EMOTIONS.index(label))
        for word, label in zip(words[:-1], expected, strict=True)
    } | {"contempt": ("contempt", -1)}
    assert not any(row.defect for row in found)


def test_unknown_folders_are_defects_and_repeated_only_if_misspelt(tmp_path: Path) -> None:
    members = {"happy/1.jpg": b"1", "hapy/2.jpg": b"2", "Ann Lee/3.jpg": b"3", "4.jpg": b"4"}
    found = by_image(read(tmp_path, members))
    assert found[b"2"].defect == "unknown class folder 'hapy' (did you mean 'happy'?)"
    assert found[b"3"].defect.startswith("unknown class folder: known are angry, disgust")
    assert found[b"4"].defect == "neither a class folder nor a row"
    assert {row.emotion for image, row in found.items() if image != b"1"} == {-1}


def test_a_person_called_joy_does_not_decide_the_class(tmp_path: Path) -> None:
    (row,) = read(tmp_path, {"angry/Joy/1.jpg": b"1"})
    assert row.defect == "below folders of more than one class: angry, happy"
    assert (row.emotion, row.label) == (-1, "")


def test_files_that_are_no_pictures_are_listed(tmp_path: Path) -> None:
    members = {"sad/1.jpg": b"1", "sad/notes.txt": b"x", "Dr. Ann Lee": b"y", ".hidden": b"z"}
    found = read(tmp_path, members)
    defect = "not a picture: known are .jpg, .jpeg, .png, .bmp, .webp, .tif, .tiff"
    assert sorted(row.defect for row in found) == ["", defect, defect]
    assert all(row.image == b"" for row in found if row.defect)


def test_ids_are_stable_hashes_that_tell_no_names(tmp_path: Path) -> None:
    first = read(tmp_path, {"sad/Ann_Lee.jpg": b"1"})
    again = read(tmp_path, {"sad/Aaron.jpg": b"0"})
    assert [row.id for row in first] == [key("sad/Ann_Lee.jpg")]
    assert by_image(again)[b"1"].id == first[0].id


def test_landmarks_with_missing_points_and_optional_columns(tmp_path: Path) -> None:
    blanks = ["", "7", *POINTS[2:]]
    found = read(
        tmp_path,
        {
            "set/landmarks.csv": table(
                ["./a.jpg", *POINTS, "Ann Lee", "training", "joy"],
                ["sub\\b.jpg", *blanks, "Ann Lee", "test", ""],
                ["sub/c.jpg", *POINTS, "", "", ""],
                columns=[*COLUMNS, "person", "split", "emotion"],
            ),
            "set/a.jpg": b"a",
            "set/sub/b.jpg": b"b",
            "set/sub/c.jpg": b"c",
        },
    )
    a, b, c = found
    assert not any(row.defect for row in found)
    assert [row.image for row in found] == [b"a", b"b", b"c"]
    np.testing.assert_array_equal(a.landmarks, np.arange(30).reshape(15, 2))
    assert list(np.flatnonzero(~b.visible)) == [0]
    np.testing.assert_array_equal(b.landmarks[0], 0)
    assert [row.official_split for row in found] == ["train", "test", ""]
    assert [row.label for row in found] == ["happy", "", ""]
    assert a.person == b.person != c.person == ""
    assert "Ann" not in a.person


def test_68_points_in_any_order_of_columns(tmp_path: Path) -> None:
    names = [f"{axis}{number}" for axis in "yx" for number in reversed(range(68))]
    cells = [str(2 * int(name[1:]) + (name[0] == "y")) for name in names]
    text = table([*cells, "a.jpg"], columns=[*names, "image"])
    (row,) = read(tmp_path, {"landmarks.csv": text, "a.jpg": b"a"})
    np.testing.assert_array_equal(row.landmarks, np.arange(136).reshape(68, 2))


def test_table_and_class_folders_together(tmp_path: Path) -> None:
    found = by_image(
        read(
            tmp_path,
            {
                "landmarks.csv": table(
                    ["train/sad/a.jpg", *POINTS], ["train/sad/c.jpg", *[""] * 30]
                ),
                "train/sad/a.jpg": b"a",
                "train/sad/b.jpg": b"b",
                "train/sad/c.jpg": b"c",
                "train/d.jpg": b"d",
            },
        )
    )
    assert {image: (row.label, len(row.landmarks)) for image, row in found.items()} == {
        b"a": ("sad", 15),
        b"b": ("sad", 0),
        b"c": ("sad", 0),
        b"d": ("", 0),
    }
    assert [image for image, row in found.items() if row.defect] == [b"d"]
    assert {row.official_split for row in found.values()} == {"train"}


@pytest.mark.parametrize(
    ("row", "defect"),
    [
        (["a.jpg", *POINTS[:-1], "low", ""], "a coordinate is not a number"),
        (["a.jpg", *[""] * 30, ""], "all landmarks are missing"),
        (["a.jpg", *POINTS], "row has 31 cells instead of 32"),
        (["b.jpg", *POINTS, ""], "its image is not in the archive"),
        (["../faces/a.jpg", *POINTS, ""], "its image is not in the archive"),
        (["a.jpg", *POINTS, "sadd"], "unknown emotion 'sadd' (did you mean 'sad'?)"),
    ],
)
def test_bad_row_is_quarantined_and_the_next_one_read(
    tmp_path: Path, row: list[str], defect: str
) -> None:
    text = table(row, ["good.jpg", *POINTS, "sad"], columns=[*COLUMNS, "emotion"])
    bad, good, *_ = read(tmp_path, {"landmarks.csv": text, "a.jpg": b"a", "good.jpg": b"g"})
    assert bad.defect == defect
    assert (good.image, good.defect) == (b"g", "")


def test_unknown_split_is_quarantined(tmp_path: Path) -> None:
    text = table(["a.jpg", *POINTS, "holdout"], columns=[*COLUMNS, "split"])
    (row,) = read(tmp_path, {"landmarks.csv": text, "a.jpg": b"a"})
    assert row.defect == "unknown split: it is train, val or test"


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (COLUMNS[1:], "has no column image"),
        ([*COLUMNS, "peron"], "has the unknown column 'peron'"),
        (COLUMNS[:-1], "has 29 columns of coordinates"),
        ([*COLUMNS, "x15", "y15"], "has 32 columns of coordinates"),
        ([*COLUMNS, "image"], "has two columns of one name"),
    ],
)
def test_table_with_another_header(tmp_path: Path, columns: list[str], problem: str) -> None:
    with pytest.raises(GrimaceError, match=problem) as raised:
        read(tmp_path, {"landmarks.csv": table(columns=columns)})
    assert "for 15 or 68 points" in str(raised.value)


def test_two_tables(tmp_path: Path) -> None:
    with pytest.raises(GrimaceError, match="has 2 tables"):
        read(tmp_path, {"a/landmarks.csv": table(), "b/landmarks.csv": table()})


def test_pictures_without_any_class_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GrimaceError, match="expected class folders of pictures"):
        read(tmp_path, {"holiday/1.jpg": b"1"})


def test_other_datasets_are_recognised_as_themselves(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("train/happy/Training_1.jpg", b"x")
    with pytest.raises(GrimaceError, match="This looks like fer2013"):
        datasets.examples("ytf_keypoints", open_archive(path))


def test_through_the_store_and_back(tmp_path: Path) -> None:
    picture = cv2.imencode(".png", np.full((4, 4), 9, np.uint8))[1].tobytes()
    text = table(["a.png", *POINTS, "ann"], columns=[*COLUMNS, "person"])
    found = read(tmp_path, {"landmarks.csv": text, "a.png": picture, "sad/b.png": picture})
    write(tmp_path / "store" / "folder", found, datasets.card("folder"))
    back = {row.id: row for row in read_store(tmp_path / "store" / "folder")}
    assert back[key("a.png")].person == found[0].person != ""
    assert back[key("a.png")].landmarks.shape == (15, 2)
    assert back[key("sad/b.png")].label == "sad"
    assert back[key("sad/b.png")].image == picture
