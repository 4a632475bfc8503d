"""What the pages of MLflow and Prefect show of a retraining, in a real browser."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest
from mlflow import MlflowClient

SHOWN = {
    "grimace-stages": "td:has-text('register@emotion')",
    "grimace-gates-emotion": "td:has-text('against the champion')",
    "grimace-views-emotion": "img[src^='data:image/webp']",
}


@pytest.fixture(scope="module")
def told(service) -> dict[str, Any]:
    """Ids of two candidates' runs and of the flow run that retrained."""
    assert service.up()[0] == 0  # it may have been stopped by the tests of `flows.up`
    flow_run = service.retrained()
    client = MlflowClient(f"sqlite:///{service.root}/mlflow.db")
    runs = [client.get_model_version("grimace-emotion", number).run_id for number in ("1", "2")]
    experiment = client.get_run(runs[0]).info.experiment_id
    served = (service.api.removesuffix("/api"), service.mlflow)
    return {
        "flow_run": flow_run.id,
        "runs": runs,
        "experiment": experiment,
        "served": served,
    }


@pytest.fixture(scope="module")
def open_page(told, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Opens an address in headless Chromium and waits for a text; nothing is fetched elsewhere.

    Prefect is not to be called meanwhile: this thread has Playwright's event loop.
    """
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium on PATH")
    folder = tmp_path_factory.mktemp("pages")
    with sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=chromium, args=flags)
        context = browser.new_context(viewport={"width": 1400, "height": 1500})
        asked: list[str] = []
        context.on("request", lambda request: asked.append(request.url))

        def open_at(address: str, name: str, text: str) -> Any:
            page = context.new_page()
            page.goto(address)
            try:
                page.get_by_text(text).first.wait_for(timeout=30_000)
            finally:
                page.screenshot(path=folder / f"{name}.png")
            return page

        open_at.folder = folder
        yield open_at
        browser.close()
    assert not [url for url in asked if not url.startswith((*told["served"], "data:", "blob:"))]


def test_the_compare_page_shows_what_decides(service, told, open_page) -> None:
    runs, experiments = quote(json.dumps(told["runs"])), quote(json.dumps([told["experiment"]]))
    address = f"{service.mlflow}/#/compare-runs?runs={runs}&experiments={experiments}"
    page = open_page(address, "compare", "gate/floor.accuracy")
    # The table of metrics is a column of names and then the values, row by row.
    lines = page.inner_text("body").partition("\nMetrics\n")[2].splitlines()
    names = [line for line in lines if re.fullmatch(r"gate/[\w.]+", line)]
    values = lines[lines.index(names[-1]) + 1 :][: 2 * len(names)]
    shown = dict(zip(names, zip(values[::2], values[1::2], strict=True), strict=True))
    assert shown["gate/floor.accuracy"] == ("0.6", "0.8")
    assert shown["gate/against_the_champion"] == ("NaN", "0.2")  # the first had none
    assert shown["gate/against_the_champion.low"] == ("NaN", "0.15")
    assert {"gate/worst_slice", "gate/budget.tflite.int8", "gate/size.tflite.int8"} <= set(shown)
    tags = rows(page)
    assert tags["grimace.version"] == ["1", "2"]
    first, second = tags["grimace.gates"]
    assert first.startswith("blessed on 10 gates (absolute bounds alone")
    assert second.startswith("blessed on 12 gates (absolute bounds, and the champion, version 1")


def test_charts_are_grouped_by_what_they_measure(service, told, open_page) -> None:
    address = f"{service.mlflow}/#/experiments/{told['experiment']}/runs"
    address += "?workflowType=machine_learning&compareRunsMode=CHART"
    page = open_page(address, "charts", "Add chart")
    charts = re.findall(r"^gate\s*\((\d+)\)$", page.inner_text("body"), re.MULTILINE)
    assert charts == ["13"]  # as many as gates, and the lower end against the champion


def rows(page: Any) -> dict[str, list[str]]:
    """Rows of all tables, by their first cell."""
    cells = page.locator("tr").evaluate_all(
        "rows => rows.map(row => [...row.querySelectorAll('th, td')].map(c => c.innerText.trim()))"
    )
    return {first: others for first, *others in filter(None, cells)}


def test_the_registry_shows_aliases_and_card(service, told, open_page) -> None:
    page = open_page(f"{service.mlflow}/#/models/grimace-emotion", "model", "@ previous")
    text = page.inner_text("body")
    assert "The model that models:/grimace-emotion@champion loads." in text
    aliases = re.findall(r"Version (\d)|@\s+(\w+)", text)
    assert aliases == [("2", ""), ("", "candidate"), ("", "champion"), ("1", ""), ("", "previous")]

    address = f"{service.mlflow}/#/models/grimace-emotion/versions/2"
    page = open_page(address, "version", "@ champion")
    page.get_by_text("Intended use").first.wait_for()
    titles = page.locator("h1, h2").all_inner_texts()
    card = ["Intended use", "Data", "Metrics", "Runtimes, on test", "Limits", "How to reproduce"]
    assert [title for title in titles if title in [*card, "Gates"]] == [*card, "Gates"]
    assert rows(page)["against the champion"][:4] == ["0.2", "-0.02", "0.15 – 0.2583", "passed"]


@pytest.mark.parametrize(("key", "inside"), SHOWN.items(), ids=SHOWN)
def test_the_flow_run_shows_stages_sheet_and_gates(key, inside, service, told, open_page) -> None:
    prefect = service.api.removesuffix("/api")
    page = open_page(f"{prefect}/runs/flow-run/{told['flow_run']}", "run", "gate@emotion")
    page.get_by_text("new-data").first.wait_for()  # the deployment that started it
    page.get_by_text("Artifacts", exact=True).click()
    page.get_by_text(key).first.click()
    page.locator(inside).first.wait_for()
    page.screenshot(path=open_page.folder / f"{key}.png")
    if key.startswith("grimace-views"):
        assert page.locator(inside).evaluate("image => image.naturalWidth") > 500
