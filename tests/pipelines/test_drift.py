import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import rankdata

from pipelines import drift
from pipelines.cli import GrimaceError
from pipelines.datasets import synthetic
from pipelines.datasets.folder import id_of
from pipelines.datasets.table import write_examples
from pipelines.params import Drift, load_params

ROOT = Path(__file__).parents[2]
SETTINGS = Drift(minimum=20, sample=70, alpha=0.01, distance=0.25, auc=0.75, seed=1)

Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="session")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with drawn faces on two sides, and a small network with random weights."""
    import keras
    from keras import layers

    from pipelines.checks.image import measure_image  # noqa: F401  CleanVision: seconds

    root = tmp_path_factory.mktemp("settled")
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["watch"]["drift"] = SETTINGS.model_dump()
    values["tracking"]["uri"] = f"sqlite:///{root}/mlflow.db"
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    faces = list(synthetic.examples(140, 5))
    clean, split = root / "data/clean/synthetic", root / "data/split/synthetic"
    clean.mkdir(parents=True)
    split.mkdir(parents=True)
    write_examples(faces, clean)
    rng = np.random.default_rng(3)
    sides = rng.permutation(["train", "val"] * 70)
    index = pd.DataFrame({"id": [face.id for face in faces], "split": sides})
    index.to_parquet(split / "index.parquet")
    keras.utils.set_random_seed(1)
    image = keras.Input((32, 32, 1), name="image")
    x = layers.Rescaling(1 / 255)(image)
    for width in (16, 32):
        x = layers.Conv2D(width, 3, strides=2, activation="relu")(x)
    x = layers.GlobalAveragePooling2D()(x)
    keras.Model(image, layers.Softmax()(layers.Dense(7)(x))).save(root / "model.keras")
    return root


@pytest.fixture
def workspace(settled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(settled)
    return settled


def drop(folder: Path, change: Change | None = None, count: int = 60) -> Path:
    """Write faces that nobody has seen, drawn from another seed, each changed."""
    folder.mkdir()
    for number, face in enumerate(list(synthetic.examples(70, 6))[:count]):
        image = cv2.imdecode(np.frombuffer(face.image, np.uint8), cv2.IMREAD_COLOR)
        cv2.imwrite(str(folder / f"{number}.png"), change(image) if change else image)
    return folder


def darker(image: np.ndarray) -> np.ndarray:
    return (image * 0.4).astype(np.uint8)


def blurred(image: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), 3)


def another_domain(image: np.ndarray) -> np.ndarray:
    """Noise, as broad as it is high twice over."""
    shape = (image.shape[0], image.shape[1] * 2, 3)
    return np.random.default_rng(int(image.sum())).integers(0, 255, shape, np.uint8)


def measured(images: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Any:
    arguments = ["--images", images, "--task", "emotion", "--out", out, "--model", "model.keras"]
    monkeypatch.setattr(sys, "argv", ["drift", *map(str, arguments), *more])
    drift.main()
    return json.loads((out / "drift.json").read_text())


def moved(result: dict[str, Any]) -> set[str]:
    return {row["name"] for row in result["statistics"] if row["drifted"]}


def test_new_pictures_of_the_same_kind_have_not_drifted(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = drop(tmp_path / "in")
    (images / "torn.png").write_bytes(b"no picture")
    (images / "notes.txt").write_text("no picture, and not called one")
    result = measured(images, tmp_path / "out", monkeypatch)
    assert not result["drifted"] and not moved(result)
    assert [row["name"] for row in result["statistics"]] == [*drift.STATISTICS, "features"]
    for row in result["statistics"]:
        assert 0 <= row["value"] <= 1 and row["p"] <= row["p_holm"] <= 1 and not row["why"]
        assert row["threshold"] == (0.75 if row["name"] == "features" else 0.25)
    assert (result["known"], result["unseen"], result["incoming"]) == (70, 70, 60)
    assert sum(result["skipped"].values()) == 1
    page = (tmp_path / "out/index.html").read_text()
    assert "no drift" in page and "data:image/jpeg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (darker, {"brightness", "contrast", "features"}),
        (blurred, {"sharpness", "features"}),
        (another_domain, {"sharpness", "aspect", "size", "features"}),
    ],
)
def test_what_has_drifted_is_named(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Change,
    named: set[str],
) -> None:
    images = drop(tmp_path / "in", change)
    result = measured(images, tmp_path / "out", monkeypatch, "--no-pictures")
    assert result["drifted"]
    assert named <= moved(result)
    if change is not another_domain:
        assert not moved(result) & {"size", "aspect"}
    medians = {row["name"]: (row["known"], row["incoming"]) for row in result["statistics"]}
    if change is darker:
        assert medians["brightness"][1] == pytest.approx(0.4 * medians["brightness"][0], rel=0.15)
    page = (tmp_path / "out/index.html").read_text()
    assert "DRIFT" in page and "data:image/jpeg" not in page


def test_the_most_unusual_picture_comes_first(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = drop(tmp_path / "in")
    (images / "sub").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    strange = cv2.resize(noise, (96, 96), interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(images / "sub/strange.png"), strange)
    result = measured(images, tmp_path / "out", monkeypatch)
    first, second, *_ = result["unusual"]
    assert first["id"] == id_of("sub/strange.png")
    assert first["distance"] > 2 * second["distance"]
    assert not result["drifted"]  # one is no distribution


def test_too_few_pictures_and_no_model_are_said_not_computed(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = drop(tmp_path / "in", darker, count=19)
    result = measured(images, tmp_path / "out", monkeypatch)
    assert not result["drifted"]
    why = "70 known and 19 incoming pictures; it takes 20"
    assert {(row["why"], row["value"], row["p_holm"]) for row in result["statistics"]} == {
        (why, None, None)
    }
    assert "not computed" in (tmp_path / "out/index.html").read_text()
    found = drift.measure_folder(images, "synthetic", "emotion", None, load_params())
    assert found.result["statistics"][-1]["why"] == "there is no champion and no candidate yet"
    with pytest.raises(GrimaceError, match="not a folder"):
        drift.measure_folder(tmp_path / "no", "synthetic", "emotion", None, load_params())
    with pytest.raises(GrimaceError, match="dvc repro split@fer2013"):
        drift.measure_folder(images, "fer2013", "emotion", None, load_params())
    (tmp_path / "bad.keras").write_bytes(b"no model")
    with pytest.raises(GrimaceError, match=r"bad\.keras is no model"):
        drift.measure_folder(images, "synthetic", "emotion", tmp_path / "bad.keras", load_params())


def test_the_champion_comes_before_the_candidate(shop: Any) -> None:
    assert drift.model_of("emotion", load_params()) == (None, "")
    number = shop.candidate(0.9)
    candidate = Path("deploy/candidate/emotion.keras")
    assert drift.model_of("emotion", load_params()) == (candidate, str(candidate))
    shop.store().promote(number, "Ada", "the first")
    path, name = drift.model_of("emotion", load_params())
    assert name == "grimace-emotion version 1"
    assert path is not None and path.read_bytes() == candidate.read_bytes()


def test_features_are_the_input_of_the_last_layer_that_has_weights(workspace: Path) -> None:
    network = drift._load(Path("model.keras"))
    images = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 1), np.uint8)
    features = drift._embed(network, images)
    assert features.shape == (5, 32)
    kernel, bias = network.layers[-2].get_weights()
    scores = np.exp(features @ kernel + bias)
    answers = network.predict_on_batch(images.astype(np.float32))
    np.testing.assert_allclose(scores / scores.sum(1, keepdims=True), answers, atol=1e-5)


def test_distances_and_areas_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(2)
    known, incoming = rng.normal(0, 1, 150), rng.normal(0.8, 1, 120)
    (row,) = drift.compare_statistics(
        pd.DataFrame({"x": known}), pd.DataFrame({"x": incoming}), SETTINGS
    )
    places = np.concatenate([known, incoming])
    gaps = (known[:, None] <= places).mean(0) - (incoming[:, None] <= places).mean(0)
    assert row["value"] == pytest.approx(np.abs(gaps).max())
    assert row["known"] == pytest.approx(np.median(known))

    old, new = rng.normal(0, 1, (90, 4)), rng.normal(0.7, 1, (80, 4))
    row, scores = drift.compare_features(old, new, SETTINGS)
    assert {side: len(values) for side, values in scores.items()} == {"known": 45, "incoming": 40}
    wins = scores["incoming"][:, None] > scores["known"]
    assert row["value"] == pytest.approx(wins.mean())
    ranks = rankdata(np.concatenate([scores["incoming"], scores["known"]]))[:40]
    spread = math.sqrt(45 * 40 * 86 / 12)
    z = (ranks.sum() - 40 * 41 / 2 - 45 * 40 / 2 - 0.5) / spread
    assert row["p"] == pytest.approx(math.erfc(z / math.sqrt(2)) / 2, rel=1e-6)
    assert row["p"] < 1e-6


def test_chance_alone_is_called_drift_as_rarely_as_promised() -> None:
    """Small differences need the p-value; so a bound of nothing is asked for here."""
    bare = SETTINGS.model_copy(update={"distance": 1e-9, "auc": 0.5, "alpha": 0.05})
    rng, called = np.random.default_rng(7), 0
    for _ in range(60):
        one, two = rng.normal(size=(60, 6)), rng.normal(size=(60, 6))
        rows = drift.compare_statistics(pd.DataFrame(one), pd.DataFrame(two), bare)
        row, _ = drift.compare_features(one, two, bare)
        called += any(row["drifted"] for row in drift.corrected([*rows, row], bare.alpha))
    assert called <= 8  # 3 are due; more than 8 come once in three hundred times


def test_large_and_certain_both_are_needed() -> None:
    rng = np.random.default_rng(4)
    slight = rng.normal(0, 1, (20000, 1)), rng.normal(0.08, 1, (20000, 1))
    (row,) = drift.compare_statistics(*map(pd.DataFrame, slight), SETTINGS)
    (row,) = drift.corrected([row], 0.01)
    assert row["p_holm"] < 1e-6 and row["value"] < 0.25 and not row["drifted"]
    few = np.arange(20.0)[:, None], np.arange(20.0)[:, None] + 6
    (row,) = drift.corrected(drift.compare_statistics(*map(pd.DataFrame, few), SETTINGS), 0.01)
    assert row["value"] >= 0.25 and row["p_holm"] > 0.01 and not row["drifted"]


def test_unusualness_is_the_mean_distance_to_the_nearest_five() -> None:
    rng = np.random.default_rng(5)
    known, incoming = rng.normal(3, 2, (40, 3)), rng.normal(3, 2, (6, 3))
    scaled = [(values - known.mean(0)) / known.std(0) for values in (known, incoming)]
    distances = np.linalg.norm(scaled[1][:, None] - scaled[0], axis=2)
    expected = np.sort(distances, axis=1)[:, :5].mean(1)
    np.testing.assert_allclose(drift.unusualness(known, incoming), expected)
    assert drift.unusualness(known[:0], incoming).tolist() == [0.0] * 6
