import io
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.schemes import EMOTIONS
from pipelines import datasets
from pipelines.cli import GrimaceError
from pipelines.datasets.archive import open_archive
from pipelines.datasets.example import Example

HEADER = "emotion,pixels,Usage\n"


def read_folders(tmp_path: Path, members: dict[str, bytes]) -> dict[str, Example]:
    path = tmp_path / "fer2013.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    found = list(datasets.examples("fer2013", open_archive(path)))
    assert len({example.id for example in found}) == len(found)
    return {example.id: example for example in found}


def read_rows(tmp_path: Path, *rows: str, header: str = HEADER) -> list[Example]:
    path = tmp_path / "fer2013.csv"
    path.write_text(header + "\n".join(rows) + "\n")
    return list(datasets.examples("fer2013", open_archive(path)))


def pixels(value: object = 7, number: int = 48 * 48) -> str:
    return " ".join([str(value)] * number)


@pytest.mark.parametrize("top", ["", "archive/fer/"])
def test_folders_give_class_and_official_split(tmp_path: Path, top: str) -> None:
    found = read_folders(
        tmp_path,
        {
            f"{top}train/happy/Training_1.jpg": b"one",
            f"{top}test/sad/PublicTest_2.png": b"two",
            f"{top}test/Neutral/PrivateTest_3.jpg": b"three",
            f"{top}README.txt": b"not an image",
        },
    )
    assert {
        id: (row.image, EMOTIONS[row.emotion], row.official_split, row.defect)
        for id, row in found.items()
    } == {
        "Training_1": (b"one", "happy", "train", ""),
        "PublicTest_2": (b"two", "sad", "val", ""),
        "PrivateTest_3": (b"three", "neutral", "test", ""),
    }


def test_archive_with_only_a_test_folder(tmp_path: Path) -> None:
    found = read_folders(tmp_path, {"test/fear/PublicTest_1.jpg": b"x"})
    assert [row.official_split for row in found.values()] == ["val"]


def test_lost_prefixes_never_turn_test_images_into_validation(tmp_path: Path) -> None:
    found = read_folders(
        tmp_path, {"train/happy/im0.png": b"", "train/sad/im0.png": b"", "test/sad/im0.png": b""}
    )
    assert {id: row.official_split for id, row in found.items()} == {
        "train-happy-im0": "train",
        "train-sad-im0": "train",
        "test-sad-im0": "test",
    }


def test_numbered_images_of_a_validation_folder_are_never_chosen_on(tmp_path: Path) -> None:
    found = read_folders(
        tmp_path,
        {
            "images/train/angry/0.jpg": b"a",
            "images/train/happy/7.jpg": b"h",
            "images/validation/angry/10052.jpg": b"v",
            # Some copies of this packing hold everything twice.
            "images/images/train/angry/0.jpg": b"a",
            "images/images/train/happy/8.jpg": b"only here",
            "images/images/validation/angry/10052.jpg": b"v",
        },
    )
    assert {id: (row.image, row.official_split, row.defect) for id, row in found.items()} == {
        "train-angry-0": (b"a", "train", ""),
        "train-happy-7": (b"h", "train", ""),
        "train-happy-8": (b"only here", "train", ""),
        "validation-angry-10052": (b"v", "test", ""),
    }


def test_one_name_for_two_pictures_gives_two_ids(tmp_path: Path) -> None:
    # The published archive has two such names.
    members = {"train/angry/Training_1.jpg": b"a", "train/surprise/Training_1.jpg": b"s"}
    found = read_folders(tmp_path, members)
    assert {id: (row.image, row.defect) for id, row in found.items()} == {
        "Training_1": (b"a", ""),
        "Training_1-2": (b"s", ""),
    }


def test_unknown_class_folder_is_quarantined_with_a_hint(tmp_path: Path) -> None:
    members = {"train/happy/Training_1.jpg": b"", "train/hapy/Training_2.jpg": b""}
    found = read_folders(tmp_path, members)
    assert found["Training_1"].defect == ""
    assert found["Training_2"].defect == "unknown class folder 'hapy' (did you mean 'happy'?)"
    assert found["Training_2"].emotion == -1


def test_pictures_of_an_unknown_part_are_quarantined_rather_than_lost(tmp_path: Path) -> None:
    members = {"train/happy/1.jpg": b"1", "val/happy/1.jpg": b"2", "sad/PublicTest_3.jpg": b"3"}
    found = read_folders(tmp_path, members)
    defect = "its class folder is in none of train, test, validation"
    assert {row.image: (row.official_split, row.defect) for row in found.values()} == {
        b"1": ("train", ""),
        b"2": ("", defect),
        b"3": ("val", defect),
    }


@pytest.mark.parametrize("top", ["", "fer/"])
def test_a_misspelt_class_of_an_unknown_part_is_quarantined_too(tmp_path: Path, top: str) -> None:
    members = {
        f"{top}train/happy/1.jpg": b"1",
        f"{top}val/hapy/2.PNG": b"2",
        f"{top}val/notes/read.txt": b"no picture",
        f"{top}logo.png": b"not where pictures lie",
        f"{top}docs/figures/old/logo.png": b"nor this",
    }
    found = read_folders(tmp_path, members)
    assert {row.image: row.defect for row in found.values()} == {
        b"1": "",
        b"2": "unknown class folder 'hapy' (did you mean 'happy'?)",
    }


def test_damaged_image_is_quarantined(tmp_path: Path) -> None:
    read_folders(tmp_path, {"train/happy/Training_1.jpg": b"picture"})
    path = tmp_path / "fer2013.zip"
    path.write_bytes(path.read_bytes().replace(b"picture", b"pictvre"))
    (row,) = datasets.examples("fer2013", open_archive(path))
    assert (row.image, row.defect) == (b"", "damaged in the archive: bad CRC-32")


def test_csv_rows_keep_label_split_and_every_pixel(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 256, (48, 48))
    text = " ".join(map(str, values.ravel()))
    first, second, third = read_rows(
        tmp_path, f"3,{text},Training", f"6,{pixels()},PublicTest", f"4,{pixels()},PrivateTest"
    )
    decoded = cv2.imdecode(np.frombuffer(first.image, np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(decoded, values)
    assert [row.id for row in (first, second, third)] == [
        "fer2013-00000",
        "fer2013-00001",
        "fer2013-00002",
    ]
    # 6 and 4 stand at other places in the alphabetical order.
    assert [EMOTIONS[row.emotion] for row in (first, second, third)] == ["happy", "neutral", "sad"]
    assert [row.official_split for row in (first, second, third)] == ["train", "val", "test"]
    assert not any(row.defect for row in (first, second, third))


@pytest.mark.parametrize(
    ("row", "defect"),
    [
        (f"9,{pixels()},Training", "label 9 is outside 0-6"),
        (f"-1,{pixels()},Training", "label -1 is outside 0-6"),
        (f",{pixels()},Training", "no label"),
        (f"x,{pixels()},Training", "label 'x' is not a number"),
        (f"0,{pixels(number=2303)},Training", "2303 pixels instead of 2304"),
        ("0,,Training", "0 pixels instead of 2304"),
        (f"0,{pixels('a')},Training", "a pixel is not a whole number"),
        (f"0,{pixels(9**30)},Training", "a pixel is not a whole number"),
        (f"0,{pixels(256)},Training", "a pixel is outside 0-255"),
        (f"0,{pixels()},Elsewhere", "unknown Usage 'Elsewhere'"),
        (f"0,{pixels()}", "row has 2 cells instead of 3"),
    ],
    ids=lambda text: text[:40],
)
def test_bad_row_is_quarantined_and_the_next_one_read(
    tmp_path: Path, row: str, defect: str
) -> None:
    bad, good = read_rows(tmp_path, row, f"0,{pixels()},Training")
    assert bad.defect == defect
    assert (good.id, good.defect) == ("fer2013-00001", "")


def test_csv_columns_are_found_by_name(tmp_path: Path) -> None:
    (row,) = read_rows(tmp_path, f"5,PublicTest,{pixels()}", header="emotion, Usage, pixels\n")
    assert (EMOTIONS[row.emotion], row.official_split, row.defect) == ("surprise", "val", "")


def test_zipped_csv_below_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "challenge.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("fer2013/fer2013.csv", f"{HEADER}0,{pixels()},Training\n")
        zipped.writestr("fer2013/README", "…")
        zipped.writestr("a_test.csv", "pixels\n1 2 3\n")
        zipped.writestr("derived.csv", f"{HEADER}1,,Training\n2,,Training\n")
    (row,) = datasets.examples("fer2013", open_archive(path))
    assert (row.id, row.defect) == ("fer2013-00000", "")


def test_rows_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "fer2013.csv"
    with path.open("w") as file:
        file.write(f"{HEADER}0,{pixels()},Training\n")
        file.write("x" * 10_000_000)  # a cell over the reader's limit, met only when asked for
    rows = datasets.examples("fer2013", open_archive(path))
    assert next(rows).defect == ""
    with pytest.raises(GrimaceError, match="damaged after row 2"):
        next(rows)


def test_archive_of_another_dataset_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "fer2013.zip"
    table = io.StringIO()
    table.write("," + ",".join(map(str, range(136))) + "\n")
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("training/Some_Body_01.jpg", b"x")
        zipped.writestr("training_frames_keypoints.csv", table.getvalue())
    with pytest.raises(GrimaceError) as raised:
        datasets.examples("fer2013", open_archive(path))
    message = str(raised.value)
    assert "looks like ytf_keypoints" in message
    assert "expected train/EMOTION/*.jpg" in message
    assert "training/*.jpg (1)" in message
    assert "Some_Body" not in message


def test_unknown_dataset_names_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n")
    with pytest.raises(GrimaceError, match="known are synthetic, fer2013, ytf_keypoints"):
        datasets.examples("fer2014", open_archive(path))
