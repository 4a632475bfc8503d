import re
from pathlib import Path

import pytest

from pipelines import datasets
from pipelines.cli import GrimaceError
from pipelines.datasets.builder import BUILDERS
from pipelines.params import Download

HEADINGS = [
    "Source",
    "Licence",
    "Allowed use",
    "How to get it",
    "People",
    "Consent",
    "Labels",
    "Known defects",
    "Known bias",
    "Protocol",
    "Used by Grimace as",
]


def test_every_dataset_is_named_everywhere() -> None:
    assert set(datasets.LABELS) == set(BUILDERS) == set(Download.model_fields)
    assert set(datasets.DATASETS) <= set(datasets.LABELS)
    assert set(datasets.EVALUATE_ONLY) <= set(datasets.LABELS)
    assert all(datasets.LABELS.values())


@pytest.mark.parametrize("name", datasets.LABELS)
def test_every_dataset_has_a_card_with_every_section_filled(name: str) -> None:
    card = datasets.card(name)
    title, *sections = re.split(r"^## (.+)\n", card, flags=re.MULTILINE)
    assert re.fullmatch(r"# \S.*\n\n\S[^#]+", title)
    assert sections[::2] == HEADINGS
    assert all(len(text.split()) >= 2 for text in sections[1::2])
    assert f"`{name}`" in sections[-1]


@pytest.mark.parametrize("name", datasets.FROM_ARCHIVES)
def test_card_of_a_fetched_dataset_says_where_its_archive_goes(name: str) -> None:
    assert "data/archives/" in datasets.card(name)


def test_card_of_an_unknown_dataset() -> None:
    with pytest.raises(GrimaceError, match="no dataset 'celeba'; known are synthetic"):
        datasets.card("celeba")


def test_no_card_is_left_over() -> None:
    found = {path.stem for path in Path(datasets.__file__).parent.glob("*.md")}
    assert found == set(datasets.LABELS)
