import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from models.schemes import EMOTIONS
from pipelines import datasets
from pipelines.cli import GrimaceError
from pipelines.datasets.archive import open_archive
from pipelines.datasets.builder import read as read_store
from pipelines.datasets.builder import write
from pipelines.datasets.example import Affect, Box, Example

COLUMNS = (
    "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,"
    "valence,arousal"
)
POINTS = ";".join(str(number / 2) for number in range(136))
HASHES = [f"{number:056x}" for number in range(0x5C991A, 0x5C9930)]


def row(number: int = 0, **changed: str) -> str:
    cells = {
        "path": f"{number}/{HASHES[number][::-1]}.jpg",
        "x": "35",
        "y": "30",
        "width": "236",
        "height": "200",
        "points": POINTS,
        "expression": "1",
        "valence": "0.8",
        "arousal": "-0.25",
    }
    return ",".join((cells | changed).values())


def pack(tmp_path: Path, members: dict[str, bytes | str]) -> Path:
    path = tmp_path / "affectnet.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return path


def read(tmp_path: Path, members: dict[str, bytes | str]) -> list[Example]:
    return list(datasets.examples("affectnet", open_archive(pack(tmp_path, members))))


def read_rows(tmp_path: Path, *rows: str, header: str = COLUMNS) -> list[Example]:
    images: dict[str, bytes | str] = {
        f"Manually_Annotated/Manually_Annotated_Images/{line.split(',')[0]}": b"image"
        for line in rows
        if "," in line
    }
    table = "\n".join([header, *rows]) + "\n"
    return read(tmp_path, {**images, "Manually_Annotated_file_lists/training.csv": table})


def npy(value: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(value))
    return buffer.getvalue()


def test_a_row_gives_all_its_labels(tmp_path: Path) -> None:
    (example,) = read_rows(tmp_path, row())
    assert example.defect == ""
    assert example.image == b"image"
    assert (EMOTIONS[example.emotion], example.label) == ("happy", "happy")
    assert example.affect == Affect(0.8, -0.25)
    # The rectangle's edges, where the centre of the top-left pixel is (0, 0).
    assert example.box == Box(34.5, 29.5, 270.5, 229.5)
    np.testing.assert_array_equal(example.landmarks, np.arange(136).reshape(68, 2) / 2)
    assert example.visible.all()
    assert example.official_split == "train"


def test_numbers_of_expressions(tmp_path: Path) -> None:
    found = read_rows(tmp_path, *(row(number, expression=str(number)) for number in range(11)))
    words = [EMOTIONS[example.emotion] if example.emotion >= 0 else "" for example in found]
    assert words == [
        *("neutral", "happy", "sad", "surprise", "fear", "disgust", "angry"),
        *("", "", "", ""),
    ]
    labels = [example.label for example in found]
    assert labels[6:] == ["anger", "contempt", "none", "uncertain", "no-face"]
    assert [example.defect for example in found] == [""] * 10 + ["labelled as no face"]


def test_validation_is_what_the_field_tests_on(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {
        "training.csv": f"{COLUMNS}\n{row(0)}\n",
        "validation.csv": f"{COLUMNS}\n{row(1)}\n",
        f"Manually_Annotated_Images/{row(0).split(',')[0]}": b"zero",
        f"Manually_Annotated_Images/{row(1).split(',')[0]}": b"one",
        "Manually_Annotated_Images/9/unlisted.jpg": b"nobody labelled it",
    }
    found = {example.image: example.official_split for example in read(tmp_path, members)}
    assert found == {b"zero": "train", b"one": "test"}


def test_what_does_not_apply_is_absent_rather_than_a_number(tmp_path: Path) -> None:
    uncertain, no_face = read_rows(
        tmp_path,
        row(0, expression="9", valence="-2", arousal="-2"),
        row(1, expression="10", valence="-2", arousal="-2", width="-1", height="-1", points="NULL"),
    )
    assert (uncertain.affect, uncertain.defect, uncertain.emotion) == (None, "", -1)
    assert (no_face.affect, no_face.box, no_face.landmarks.shape) == (None, None, (0, 2))


@pytest.mark.parametrize(
    ("changed", "defect"),
    [
        ({"expression": "11"}, "expression '11' is not one of 0-10"),
        ({"expression": "-1"}, "expression '-1' is not one of 0-10"),
        ({"expression": "happy"}, "expression 'happy' is not one of 0-10"),
        ({"expression": ""}, "no expression"),
        ({"valence": "1.2"}, "valence or arousal is outside -1 to 1"),
        ({"arousal": "nan"}, "valence or arousal is not a number"),
        ({"arousal": "calm"}, "valence or arousal is not a number"),
        ({"x": "left"}, "the face box is not made of numbers"),
        ({"points": "1;2;3"}, "3 coordinates instead of 136"),
        ({"points": POINTS.replace("67.5", "x")}, "a coordinate is not a number"),
    ],
)
def test_bad_row_is_quarantined_and_the_next_one_read(
    tmp_path: Path, changed: dict[str, str], defect: str
) -> None:
    bad, good = read_rows(tmp_path, row(0, **changed), row(1))
    assert bad.defect == defect
    assert good.defect == ""


def test_row_of_another_length_and_row_without_its_picture(tmp_path: Path) -> None:
    short, lost = read(tmp_path, {"training.csv": f"{COLUMNS}\n{row(0)},1,2\n{row(1)}\n"})
    assert short.defect == "row has 11 cells instead of 9"
    assert lost.defect == "its image is not in the archive"


def test_ids_follow_the_picture_and_not_its_place(tmp_path: Path) -> None:
    first = read_rows(tmp_path, row(0), row(1))
    again = read_rows(tmp_path, row(1), row(0))
    assert [example.id for example in first] == [example.id for example in reversed(again)]
    assert first[0].id == f"affectnet-{HASHES[0][::-1][:16]}"


def test_lists_are_streamed(tmp_path: Path) -> None:
    folder = tmp_path / "affectnet"
    folder.mkdir()
    with (folder / "training.csv").open("w") as file:
        file.write(f"{COLUMNS}\n{row(0)}\n" + "x" * 10_000_000)  # a cell over the reader's limit
    found = datasets.examples("affectnet", open_archive(folder))
    assert next(found).label == "happy"
    with pytest.raises(GrimaceError, match="damaged after row 2"):
        next(found)


def smaller_packing() -> dict[str, bytes | str]:
    members: dict[str, bytes | str] = {
        "train_set/images/5.jpg": b"five",
        "val_set/images/5.jpg": b"another five",
    }
    for part, expression in (("train_set", "7"), ("val_set", "6")):
        for name, value in (
            ("exp", expression),
            ("val", "-0.5"),
            ("aro", "0.5"),
            ("lnd", np.arange(136.0)),
        ):
            members[f"{part}/annotations/5_{name}.npy"] = npy(value)
    return members


def test_smaller_packing(tmp_path: Path) -> None:
    contempt, angry = read(tmp_path, smaller_packing())
    assert (contempt.id, contempt.image, contempt.official_split) == (
        "affectnet-train-5",
        b"five",
        "train",
    )
    assert (contempt.emotion, contempt.label, contempt.defect) == (-1, "contempt", "")
    assert contempt.affect == Affect(-0.5, 0.5)
    np.testing.assert_array_equal(contempt.landmarks, np.arange(136).reshape(68, 2))
    assert contempt.box is None
    assert (angry.id, angry.image, angry.official_split) == (
        "affectnet-val-5",
        b"another five",
        "test",
    )
    assert (EMOTIONS[angry.emotion], angry.label) == ("angry", "anger")


def test_smaller_packing_with_numbers_for_texts_and_parts_missing(tmp_path: Path) -> None:
    members = {
        "a/train_set/images/1.jpg": b"one",
        "a/train_set/annotations/1_exp.npy": npy(3.0),
        "a/train_set/images/2.jpg": b"two",
        "a/train_set/images/3.jpg": b"three",
        "a/train_set/annotations/3_exp.npy": b"\x93NUMPY cut",
    }
    one, two, three = read(tmp_path, members)
    assert (one.label, one.affect, one.landmarks.shape, one.defect) == (
        "surprise",
        None,
        (0, 2),
        "",
    )
    assert two.defect == "no expression"
    assert three.defect == "expression 'unreadable' is not one of 0-10"


def test_smaller_packing_with_labels_whose_picture_is_lost(tmp_path: Path) -> None:
    members = smaller_packing()
    del members["val_set/images/5.jpg"]
    whole, lost = read(tmp_path, members)
    assert (whole.id, whole.defect) == ("affectnet-train-5", "")
    assert (lost.id, lost.label, lost.official_split) == ("affectnet-val-5", "anger", "test")
    assert lost.defect == "its image is not in the archive"


def test_list_without_its_header_is_not_passed_over(tmp_path: Path) -> None:
    lists: dict[str, bytes | str] = {
        "training.csv": f"{COLUMNS}\n{row(0)}\n",
        "validation.csv": f"{row(1)}\n",
    }
    with pytest.raises(GrimaceError, match=r"validation\.csv lacks columns that training\.csv has"):
        read(tmp_path, lists)


def test_another_training_csv_is_not_taken_for_it(tmp_path: Path) -> None:
    path = pack(tmp_path, {"training.csv": "left_eye_center_x,Image\n1,2\n"})
    with pytest.raises(GrimaceError, match="does not hold affectnet: expected training"):
        datasets.examples("affectnet", open_archive(path))


def test_through_the_store_and_back(tmp_path: Path) -> None:
    found = read(tmp_path, smaller_packing())
    write(tmp_path / "affectnet", found, datasets.card("affectnet"))
    back = {example.id: example for example in read_store(tmp_path / "affectnet")}
    assert {id: (example.label, example.affect) for id, example in back.items()} == {
        "affectnet-train-5": ("contempt", Affect(-0.5, 0.5)),
        "affectnet-val-5": ("anger", Affect(-0.5, 0.5)),
    }
