import re
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.schemes import EMOTIONS, KAGGLE_15
from pipelines import explore
from pipelines.cli import GrimaceError
from pipelines.datasets import synthetic
from pipelines.datasets.example import Example
from pipelines.explore import SAMPLES, look, spread, write_page
from pipelines.params import load_params

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def faces() -> list[Example]:
    return list(synthetic.examples(35, 3))


@pytest.fixture
def inside(tmp_path, monkeypatch):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRIMACE_ARCHIVES", raising=False)

    def call(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["explore", *arguments])
        explore.main()

    return call


def _flat(id: str, level: int, emotion: int = -1, size: int = 8, **rest) -> Example:
    _, encoded = cv2.imencode(".png", np.full((size, size), level, np.uint8))
    return Example(id, encoded.tobytes(), emotion=emotion, **rest)


def _many(count: int) -> Iterator[Example]:
    """Every fiftieth is of class disgust, all others are happy."""
    for number in range(count):
        yield Example(
            f"e{number}", b"", emotion=EMOTIONS.index("happy" if number % 50 else "disgust")
        )


def test_spread_takes_from_all_over_whatever_the_order():
    chosen = [example.id for example in spread(_many(1000), 200)]
    assert len(set(chosen)) == 200
    reversed_order = spread(reversed(list(_many(1000))), 200)
    assert {example.id for example in reversed_order} == set(chosen)
    places = np.sort([int(id[1:]) for id in chosen])
    assert np.all(np.histogram(places, 5, range=(0, 1000))[0] > 25)


@pytest.mark.parametrize("limit", [2, 10, 60])
def test_spread_gives_every_class_its_place(limit):
    rare = [e for e in spread(_many(1000), limit) if e.emotion == EMOTIONS.index("disgust")]
    assert len(rare) >= min(limit // 2, SAMPLES)


def test_spread_of_fewer_than_the_limit_is_all():
    assert len(spread(_many(30), 100)) == 30


def test_memory_does_not_grow_with_the_pictures():
    alive: weakref.WeakSet[Example] = weakref.WeakSet()
    most = 0

    def stream() -> Iterator[Example]:
        nonlocal most
        for number in range(300):
            example = _flat(f"f{number}", number % 256, emotion=number % 7)
            alive.add(example)
            most = max(most, len(alive))
            yield example
            del example

    seen = look(stream())
    assert len(seen.measures) == 300
    assert most <= 7 * SAMPLES + 3


def test_mean_face_is_the_mean_of_the_class():
    seen = look([_flat("a", 40, 0), _flat("b", 80, 0), _flat("c", 200, 3)])
    assert set(seen.faces) == {"angry", "happy"}
    assert np.allclose(seen.faces["angry"].mean, 60) and np.allclose(seen.faces["happy"].mean, 200)


def _with_eyes(picture: np.ndarray, eyes: np.ndarray) -> Example:
    """A picture of one face whose eyes, ours left first, lie at these pixels."""
    points = np.full((15, 2), 20, np.float32)
    points[list(KAGGLE_15.eyes)] = eyes[::-1]
    _, encoded = cv2.imencode(".png", picture)
    return Example("a", encoded.tobytes(), landmarks=points, visible=np.ones(15, bool))


@pytest.mark.parametrize("scale", [1, 4])
def test_each_pixel_of_a_mean_face_is_the_mean_of_its_area(scale):
    """As where the eyes are in their place already, but for the scale."""
    size = 128 * scale
    picture = np.random.default_rng(1).integers(0, 256, (size, size), np.uint8)
    (found,) = look([_with_eyes(picture, explore.EYES * size - 0.5)]).faces.values()
    areas = picture.reshape(128, scale, 128, scale).mean((1, 3))
    np.testing.assert_allclose(found.mean, areas, atol=1)


@pytest.mark.parametrize("apart", [30, 77, 240])
@pytest.mark.parametrize("turn", [0.0, 0.5])
def test_mean_faces_have_the_eyes_where_they_are_said_to_be(apart, turn):
    middle, half = np.array([310.3, 290.8]), apart / 2 * np.array([np.cos(turn), np.sin(turn)])
    eyes = np.stack([middle - half, middle + half])
    y, x = np.mgrid[:600, :630]
    away = [np.hypot(x - eye[0], y - eye[1]) for eye in eyes]
    picture = sum(np.exp(-((8 * each / apart) ** 2)) for each in away) * 250
    (found,) = look([_with_eyes(picture.astype(np.uint8), eyes)]).faces.values()
    for number, half_face in enumerate((np.s_[:, :64], np.s_[:, 64:])):
        bright = found.mean[half_face]
        rows, columns = np.indices(bright.shape)
        place = np.array([(bright * columns).sum(), (bright * rows).sum()]) / bright.sum()
        place += [64 * number, 0]
        np.testing.assert_allclose(place, explore.EYES[number] * 128 - 0.5, atol=0.15)


def test_measures_and_labels_are_noted():
    examples = [
        _flat("a", 40, size=10, official_split="train", person="p"),
        Example("b", b"no picture", label="contempt", defect="torn"),
    ]
    seen = look(examples)
    assert seen.unreadable == 1
    assert list(seen.labels["class"]) == ["unlabelled", "contempt"]
    assert list(seen.labels["defect"]) == ["", "torn"]
    (row,) = seen.measures.to_dict("records")
    assert (row["width"], row["height"], row["brightness"], row["contrast"]) == (10, 10, 40, 0)


def test_limit_counts_all_but_measures_some(faces):
    seen = look(iter(faces), 14)
    assert (len(seen.labels), len(seen.measures)) == (35, 14)
    assert set(seen.samples) == set(EMOTIONS)


def test_shapes_that_differ_by_a_similarity_are_one_shape():
    rng = np.random.default_rng(0)
    base = rng.uniform(30, 60, (15, 2))
    base[list(KAGGLE_15.eyes)] = [[60, 40], [30, 40]]
    examples = []
    for number, (scale, turn) in enumerate([(1, 0), (0.5, 0.4), (1.3, -0.6)]):
        rotation = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        points = ((base - 45) @ rotation.T + 45).astype(np.float32)
        visible = np.ones(15, bool)
        visible[10] = number > 0
        points[~visible] = 0
        examples.append(_flat(f"s{number}", 9, size=96, landmarks=points, visible=visible))
    seen = look(examples)
    assert list(seen.shape.count[:, 0]) == [3] * 10 + [2] + [3] * 4
    assert np.all(seen.shape.deviation < 1e-4)
    left, right = sorted(seen.shape.mean[list(KAGGLE_15.eyes)].tolist())
    assert np.allclose([left, right], explore.EYES)


def test_heat_map_has_points_where_they_lie():
    points = np.array([[0, 0], [99, 49], [50, 20]], np.float32)
    _, encoded = cv2.imencode(".png", np.zeros((50, 100), np.uint8))
    seen = look(
        [Example("a", encoded.tobytes(), landmarks=points, visible=np.array([1, 1, 0], bool))]
    )
    assert seen.heat.sum() == 2
    assert seen.heat[0, 0] == 1 and seen.heat[-1, -1] == 1


def test_missing_labels_are_shown_by_name():
    visible = np.zeros(15, bool)
    visible[[0, 1, 10, 14]] = True
    few = _flat("few", 9, size=96, landmarks=np.ones((15, 2), np.float32) * 40, visible=visible)
    full = _flat(
        "all", 9, size=96, landmarks=np.full((15, 2), 40, np.float32), visible=visible | True
    )
    html = write_page("kaggle_keypoints", look([few, few, full]), load_params(), "", pictures=False)
    assert "1 of 3 examples have all 15 points" in html
    assert "2 rows have 4 of 15; 1 rows have 15 of 15" in html
    assert html.count("<td>mouth left corner</td>") == 1 and "<td>nose tip</td>" not in html


def test_page_shows_every_class_and_every_transform(inside, capsys):
    inside("--dataset", "synthetic", "--limit", "21")
    html = Path("reports/explore/synthetic/index.html").read_text()
    for emotion in EMOTIONS:
        assert f'alt="Mean face: {emotion}, 3 pictures"' in html
        assert f'alt="Example of {emotion}: synthetic-' in html
    params = load_params()
    for task in ("emotion", "landmarks"):
        assert f'alt="{task}: before"' in html
        for transform in params.augment.named(task).transforms:
            assert f'alt="{task}: {transform.transform}"' in html
    assert "uv run python -m pipelines.explore --dataset synthetic --limit 21" in html
    assert "identity-" not in html
    assert not re.search(r"(src|href)=\"(?!data:|#)", html.split("Data card</h2>")[0])
    assert "21 of 21 pictures looked at" in capsys.readouterr().out


def test_page_without_pictures_shows_no_face(inside, tmp_path):
    inside("--dataset", "synthetic", "--limit", "7", "--no-pictures", "--out", "looks/here")
    html = (tmp_path / "looks/here/index.html").read_text()
    assert "image/jpeg" not in html
    assert html.count("made without pictures") == 3
    assert "Where the landmarks lie" in html and "68" in html


def test_equal_data_gives_equal_bytes(faces):
    pages = {
        write_page("synthetic", look(faces[:7]), load_params(), "c", pictures=True)
        for _ in range(2)
    }
    assert len(pages) == 1


def test_archive_is_found_where_the_variable_says(inside, tmp_path, monkeypatch):
    folder = tmp_path / "archives" / "fer2013.zip" / "train"  # an unpacked folder serves too
    for emotion in ("happy", "sad"):
        (folder / emotion).mkdir(parents=True)
        for number in range(2):
            picture = _flat("x", 30 * number + 9, size=48).image
            (folder / emotion / f"Training_{number}{emotion}.jpg").write_bytes(picture)
    monkeypatch.setenv("GRIMACE_ARCHIVES", str(tmp_path / "archives"))
    inside("--dataset", "fer2013")
    html = Path("reports/explore/fer2013/index.html").read_text()
    assert "<dt>examples</dt><dd>4</dd>" in html


def test_raw_data_comes_before_the_archive(inside, faces, tmp_path):
    from pipelines.datasets import builder

    builder.write(tmp_path / "data/raw/synthetic", faces[:7], "card")
    inside("--dataset", "synthetic")
    assert "<dt>examples</dt><dd>7</dd>" in Path("reports/explore/synthetic/index.html").read_text()


def test_data_that_is_nowhere_is_an_error_to_act_on(inside):
    with pytest.raises(
        GrimaceError, match=r"data/raw/fer2013.*dvc repro download@fer2013.*--archive"
    ):
        inside("--dataset", "fer2013")
    assert not Path("reports").exists()


def test_drawn_faces_come_from_no_archive(inside, tmp_path):
    (tmp_path / "faces/sad").mkdir(parents=True)
    (tmp_path / "faces/sad/1.png").write_bytes(_flat("a", 9).image)
    with pytest.raises(GrimaceError, match=r"synthetic is drawn here.*leave .*faces out"):
        inside("--dataset", "synthetic", "--archive", str(tmp_path / "faces"))


def test_pictures_that_cannot_be_read_leave_a_page_that_says_so():
    seen = look([Example("a", b"", defect="torn"), Example("b", b"\xff\xd8torn")])
    html = write_page("aflw2k3d", seen, load_params(), "", pictures=True)
    assert "<dt>unreadable</dt><dd>2</dd>" in html
    assert "No picture could be read" in html and "nothing to average" in html
    assert "never trained on" in html
