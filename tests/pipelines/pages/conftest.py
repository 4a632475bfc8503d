"""A page opened in the real browser, and an audit made up to look like FER-2013's."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from models.schemes import EMOTIONS
from pipelines.checks import Finding

COLUMNS = list(Finding.__dataclass_fields__)


@pytest.fixture(scope="module")
def browse() -> Iterator[Callable]:
    """Open a file in headless Chromium at a width; returns the page and what it asked for.

    Of a module, not of the session: two Playwrights in one thread do not get on.
    """
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium on PATH")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def open_page(path: Path, width: int = 1280, **context):
            page = browser.new_context(
                viewport={"width": width, "height": 900}, **context
            ).new_page()
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(path.absolute().as_uri())
            return page, asked

        yield open_page
        browser.close()


@pytest.fixture(scope="session")
def make_audit() -> Callable[..., tuple[pd.DataFrame, pd.DataFrame]]:
    return _make_audit


def _make_audit(count: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A table and its findings as `filter` writes them."""
    rng = np.random.default_rng(count)
    share = np.array([0.14, 0.015, 0.14, 0.25, 0.17, 0.17, 0.115])
    emotion = rng.choice(7, count, p=share / share.sum())
    table = pd.DataFrame(
        {
            "id": [f"Training_{number:08d}" for number in range(count)],
            "class": np.array(EMOTIONS)[emotion],
            "label": emotion,
            "official_split": rng.choice(["train", "val", "test"], count, p=[0.8, 0.1, 0.1]),
            "person": [f"Jane Doe {number % 40}" for number in range(count)],
            "width": 48,
            "height": 48,
            "std": rng.gamma(20, 3, count),
            "brightness": rng.normal(129, 30, count).clip(0, 255),
            "blurred": rng.beta(8, 2, count),
            "face_size": 48.0,
            "yaw": np.nan,
            "haar": rng.random(count) < 0.4 + 0.06 * emotion,
            "cluster": "",
            "weight": 1.0,
            "reason": "",
        }
    )
    table["seed_kept"] = table["haar"]
    findings = []
    for number in range(0, count - 2, 17):
        first, second = table["id"][number], table["id"][number + 1]
        table.loc[[number, number + 1], "cluster"] = first
        if table["class"][number] == table["class"][number + 1]:
            words = f"same pixels as {first}"
            findings.append((second, "exact_duplicate", 1.0, 1.0, "drop", words, 1.0))
        else:
            words = "copies carry different labels"
            findings += [
                (id, "label_conflict", np.nan, np.nan, "drop", words, 1.0) for id in (first, second)
            ]
    for number in range(5, count, 23):
        score, words = float(rng.random() * 0.05), f"looks like {EMOTIONS[number % 7]}"
        findings.append((table["id"][number], "mislabelled", score, 0.05, "weight", words, 0.0))
    for number in range(3, count, 41):
        findings.append((table["id"][number], "dark", 0.1, 0.2, "flag", "dark", 1.0))
    found = pd.DataFrame(findings, columns=COLUMNS)
    dropped = found[found["action"] == "drop"].drop_duplicates("id").set_index("id")["check"]
    table["reason"] = table["id"].map(dropped).fillna("")
    table["kept"] = table["reason"] == ""
    return table, found
