"""The three ways of training, on a few drawn faces laid out as the benchmark does."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import train
from pipelines import fit
from pipelines.datasets import builder, synthetic
from pipelines.datasets.example import Example

LIMIT = 80


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")

    def drawn(_: Path) -> Iterator[Example]:
        return synthetic.examples(LIMIT + train.BATCH, 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "read", drawn)
        assert train.prepare(folder, folder / "work", LIMIT) == LIMIT
    return folder / "work"


def test_every_way_trains_on_the_same_images(work: Path) -> None:
    files = list((work / "folders").rglob("*.jpg"))
    assert len(files) == LIMIT
    for arm in train.ARMS:
        figures = train.ARM[arm](work, "float32")
        assert figures["images_per_second"] > 0
        assert ("waiting" in figures) == (arm not in ("generator", "dataset"))
        assert 0 < figures.get("waiting", 0.5) < 1


def test_a_step_of_each_job_is_timed_in_both_precisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "TIMED_STEPS", 2)
    monkeypatch.setattr(fit, "TIMED_ROUNDS", 1)
    for name in ("emotion-plain", "landmarks-plain"):
        seconds = train.step(name, tmp_path)
        assert seconds.keys() == {"float32", "mixed_bfloat16"}
        assert all(0 < taken < 60 for taken in seconds.values())


def test_the_page_compares_round_by_round() -> None:
    """Ours is twice and four times as fast as the generator in two rounds: 3 times, from 2 to 4."""

    def arms(ours: float, generator: float) -> dict[str, dict[str, float]]:
        speeds = {"ours": ours, "float32": 50.0, "generator": generator, "dataset": 100.0}
        speeds |= {"compact": 1000.0, "compact32": 500.0}
        own = {"waiting": 0.01, "multiply_adds": 1e9}
        return {arm: {"images_per_second": speed} | own for arm, speed in speeds.items()}

    rounds = [arms(200, 100), arms(200, 50)]
    results = {"command": "it", "date": "today", "images": 9, "precision": "float32"}
    results["steps"] = {"emotion-plain": {"float32": 0.03, "mixed_bfloat16": 0.02}}
    results["steps"]["emotion-plain"]["precision"] = "mixed_bfloat16"
    page = train.page(results | {"rounds": rounds, "peak": None})
    assert "| generator | 75 | 3.00 (2.00 – 4.00) | 0.75 (0.50 – 1.00) |" in page
    assert "| emotion-compact | 1,000 | 2.00 (2.00 – 2.00) | 1.0% | no GPU |" in page
    assert "| emotion-plain | 30.0 | 20.0 | 1.50 | mixed_bfloat16 |" in page
    assert "Every measurement has a process of its own" in page
    # 6 operations of each of 10⁹ multiply-adds, a thousand times a second, of 12 · 10¹² possible.
    page = train.page(results | {"rounds": rounds, "peak": 12.0})
    assert "| emotion-compact | 1,000 | 2.00 (2.00 – 2.00) | 1.0% | 50.0% |" in page
