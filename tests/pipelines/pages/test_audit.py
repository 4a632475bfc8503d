from dataclasses import fields

import numpy as np
import pandas as pd
import pytest

from pipelines.checks import Finding
from pipelines.pages.audit import MEANINGS, write_audit
from pipelines.params import Checks, load_params

CHECKS = load_params().filter.checks_of("fer2013")
NOTHING = pd.DataFrame(columns=[field.name for field in fields(Finding)])


def _write(path, table, findings, pictures=None):
    write_audit(
        path,
        dataset="fer2013",
        table=table,
        findings=findings,
        pictures=pictures or {},
        checks=CHECKS,
    )
    return path.read_text()


def _pictures(table, seed=0):
    rng = np.random.default_rng(seed)
    noise = [
        rng.integers(0, 256, (48, 48, 1), np.uint8),
        rng.integers(0, 256, (300, 200, 3), np.uint8),
    ]
    return {
        check: [(id, noise[n % 2]) for n, id in enumerate(table["id"][:12])]
        for check in ("exact_duplicate", "mislabelled")
    }


@pytest.fixture(scope="module")
def audit(make_audit):
    return make_audit(900)


@pytest.fixture(scope="module")
def written(audit, tmp_path_factory):
    table, findings = audit
    path = tmp_path_factory.mktemp("audit") / "report.html"
    _write(path, table, findings, _pictures(table))
    return path


def test_page_asks_for_nothing_and_fits_a_phone(browse, written):
    page, asked = browse(written, width=390)
    assert [address for address in asked if not address.startswith(("file:", "data:"))] == []
    assert len([address for address in asked if address.startswith("file:")]) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    heights = "[...document.querySelectorAll('td')].map(cell => cell.offsetHeight)"
    assert max(page.evaluate(heights)) < 200, "a column is squeezed"
    images = page.evaluate(
        "[...document.images].map(image => [image.alt.length, image.naturalWidth, "
        "image.getBoundingClientRect().right])"
    )
    assert len(images) > 24
    assert all(alt > 5 and width > 0 and right <= 390 for alt, width, right in images)


def test_page_says_what_the_table_says(audit, written):
    table, findings = audit
    html = written.read_text()
    kept = int(table["kept"].sum())
    assert f"Of 900 examples {kept:,} are kept and {900 - kept:,} dropped" in html
    flagged = set(findings.loc[findings["action"] == "flag", "id"]) & set(
        table.loc[table["kept"], "id"]
    )
    assert f"<dt>flagged, kept</dt><dd>{len(flagged)} " in html
    assert f"it would keep {table['seed_kept'].mean():.1%}" in html
    conflicts = table.loc[table["reason"] == "label_conflict", "cluster"].nunique()
    assert f"Clusters whose copies carry different labels: {conflicts}<" in html


def test_reasons_and_classes_are_the_tables_own(audit, written, browse):
    table, _ = audit
    page, _ = browse(written)

    def rows(caption: str) -> list[list[str]]:
        cells = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
        return page.locator(f"[aria-label*='{caption}'] tbody tr").evaluate_all(cells)

    dropped = table.loc[~table["kept"], "reason"].str.replace("_", " ").value_counts()
    assert {row[0]: int(row[-1]) for row in rows("Dropped, by reason")} == dropped.to_dict()
    by_class = table.groupby("class")["kept"].agg(["size", "sum"])
    assert [row[:3] for row in rows("Class balance")] == [
        [str(name), str(raw), str(kept)] for name, raw, kept in by_class.itertuples()
    ]


def test_page_shows_ids_and_no_person(written):
    html = written.read_text()
    assert "Training_<wbr>00000003" in html
    assert "Jane Doe" not in html


def test_page_without_pictures_holds_none(audit, tmp_path):
    html = _write(tmp_path / "report.html", *audit)
    assert "image/jpeg" not in html and "image/png" not in html
    assert "made without pictures" in html


def test_equal_input_gives_equal_bytes(audit, written, tmp_path):
    table, findings = audit
    assert _write(tmp_path / "again.html", table, findings, _pictures(table)) == written.read_text()


def test_nothing_found(make_audit, tmp_path):
    table, _ = make_audit(50)
    table = table.assign(kept=True, reason="", cluster="")
    html = _write(tmp_path / "report.html", table, NOTHING)
    assert "Of 50 examples 50 are kept and 0 dropped" in html
    for sentence in ("Nothing was dropped", "No two examples", "No check found anything to show"):
        assert sentence in html
    assert "made without pictures" not in html


def test_a_single_example(make_audit, tmp_path):
    table, _ = make_audit(1)
    html = _write(tmp_path / "report.html", table.assign(kept=True, reason=""), NOTHING)
    assert "All examples are of one class" in html


def test_a_single_example_that_is_dropped_unmeasured(tmp_path):
    table = pd.DataFrame(
        {
            "id": ["x"],
            "class": [""],
            "kept": [False],
            "reason": ["defect"],
            "weight": [1.0],
            "brightness": [np.nan],
            "seed_kept": [None],
        }
    )
    findings = pd.DataFrame([Finding("x", "defect", np.nan, np.nan, "drop", "row is short")])
    html = _write(tmp_path / "report.html", table, findings)
    assert "Of 1 examples 0 are kept and 1 dropped" in html
    assert "was not measured" in html and "carry no landmarks" in html
    assert "Not known here: brightness," in html


def test_landmark_patterns_are_counted(make_audit, tmp_path):
    table, _ = make_audit(40)
    table = table.assign(landmarks_visible=["1111"] * 10 + ["1001"] * 29 + [""])
    html = _write(tmp_path / "report.html", table, NOTHING)
    assert "10 of 39 examples with landmarks have all 4 points" in html
    assert "29 rows have 2 of 4; 10 rows have 4 of 4" in html


def test_a_hundred_thousand_rows_make_a_small_page(make_audit, tmp_path):
    table, findings = make_audit(2000)
    many = pd.concat([table.assign(id=table["id"] + f"-{n}", cluster="") for n in range(50)])
    found = pd.concat([findings.assign(id=findings["id"] + f"-{n}") for n in range(50)])
    html = _write(tmp_path / "report.html", many.reset_index(drop=True), found)
    assert "Of 100,000 examples" in html
    assert len(html) < 400_000


def test_every_check_is_explained():
    assert list(MEANINGS) == list(Checks.model_fields)
