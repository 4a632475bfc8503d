import json
import re
from functools import cache

import numpy as np
import pandas as pd
import pytest

from models.schemes import EMOTIONS
from pipelines.compare import Answers, compare
from pipelines.heldout import Faces
from pipelines.pages.comparison import write_comparison
from pipelines.params import Evaluate

COUNT = 210
NAMES = ("compact <small>", "teacher", "ensemble-of-all-that-there-is", "base")


@cache
def made_up(task: str) -> dict:
    """A comparison of four models, as `compare` writes it."""
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 7, COUNT)
    groups = np.array([f"p{number // 3}" for number in range(COUNT)])
    ids = np.arange(COUNT).astype(str)
    traits = pd.DataFrame(
        {
            "class": np.array(EMOTIONS)[truth] if task == "emotion" else "unlabelled",
            "brightness": rng.random(COUNT),
            "yaw": rng.normal(0, 30, COUNT),
            "face_size": rng.gamma(8, 10, COUNT),
            "source": "faces",
        }
    )
    images = np.zeros((COUNT, 1, 1, 1), np.uint8)
    models = []
    points = np.broadcast_to(rng.uniform(0.2, 0.8, (68, 2)), (COUNT, 68, 2)).astype(np.float32)
    if task == "emotion":
        faces = Faces(ids, groups, images, truth, None, None, {}, traits)
    else:
        visible = np.ones((COUNT, 68), bool)
        faces = Faces(ids, groups, images, None, points, visible, {}, traits)
    for number, name in enumerate(NAMES):
        if task == "emotion":
            logits = rng.normal(0, 1, (COUNT, 7)) + 2 * np.eye(7)[truth]
            outputs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        else:
            outputs = points + rng.normal(0, 0.01 + 0.003 * number, points.shape)
        cost = {"bytes": 4_000_000 * (number + 1), "parameters": 1_000_000 * (number + 1)}
        how = "ten_crop" if number == 2 else "none"
        models.append(Answers(name, None, outputs, number > 0, how, cost, False))
    result = compare(faces, models, Evaluate(resamples=100, seed=1, gallery=1))
    result["models"][0]["latency"] = {"p50_ms": 0.5, "p95_ms": 0.7}
    result["models"][1]["latency"] = {"failed": "no kernel"}
    return {
        "task": task,
        "side": "val",
        "dataset": "faces",
        "command": "uv run python -m pipelines.compare --task it",
        "date": "2026-01-02 03:04 UTC",
        "machine": {"processor": "made-up"},
        "data_version": "0a1b.dir",
        "latency": {"runtime": "litert 2", "threads": 1, "images": 100, "load_average": 0.5},
        "deployables": {
            "candidate": "teacher",
            "rows": [
                {
                    "name": "tflite/int8",
                    "metric": 0.5,
                    "ci95": [0.4, 0.6],
                    "loss": 0.01,
                    "runtime": "litert 2",
                    "bytes": 2**20,
                    "p50_ms": 0.25,
                }
            ],
        },
        **result,
    }


@pytest.fixture(scope="module", params=["emotion", "landmarks"])
def written(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "compare.html"
    result = made_up(request.param)
    path.write_text(write_comparison(json.loads(json.dumps(result))))
    return path, result


def test_page_asks_for_nothing_and_fits_a_phone(written, browse):
    path, _ = written
    for scheme in ("light", "dark"):
        page, asked = browse(path, 390, color_scheme=scheme)
        assert [address for address in asked if not address.startswith("data:")] == [
            path.absolute().as_uri()
        ]
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        images = page.evaluate(
            "[...document.images].map(image => [image.alt.length, image.naturalWidth, "
            "image.getBoundingClientRect().right])"
        )
        assert all(alt > 5 and width > 0 and right <= 390 for alt, width, right in images)


def rows_of(page, caption: str) -> list[list[str]]:
    cells = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
    return page.locator(f"[aria-label^='{caption}'] tbody tr").evaluate_all(cells)


def test_tables_say_what_the_figures_say(written, browse):
    path, result = written
    page, _ = browse(path)
    metric, models = result["metric"], result["models"]
    best_first = rows_of(page, "Best first")
    names = [row["name"] for row in models]
    assert [row[0].split("\n")[0] for row in best_first] == names
    assert [row[1] for row in best_first] == [f"{row[metric]:.2%}" for row in models]
    assert f"{1e-6 * models[0]['cost']['parameters']:.2f} M" in best_first[0]
    assert [row[-1] for row in best_first] == ["0.50 ms", "–", "–", "–"]
    differences = rows_of(page, "Paired differences")
    assert [row[0].split("\n")[0] for row in differences] == names[1:]
    for row, model in zip(differences, models[1:], strict=True):
        against = model["against_best"]
        assert row[1] == f"{100 * against['difference']:+.2f}"
        value = against["p"]["sign_flip"]
        shown = row[-1].split("\n")[0]
        assert shown == ("< 0.001" if value < 0.001 else f"{value:.3f}")
    averaged = [row[0] for row in best_first if "averaged: ten crop" in row[0]]
    assert averaged == ["ensemble-of-all-that-there-is\naveraged: ten crop"]
    assert len(rows_of(page, "Deployables")) == 1


def test_page_has_its_tasks_charts_and_circumstances(written):
    path, result = written
    html = path.read_text()
    alts = re.findall(r'alt="([^":]+)', html)
    emotion = result["task"] == "emotion"
    assert sum(alt.startswith("Confusion matrix") for alt in alts) == 4 * emotion
    assert sum(alt.startswith("Reliability") for alt in alts) == 4 * emotion
    assert sum(alt.startswith("Curves") for alt in alts) == 1 - emotion
    assert sum(alt.startswith("Scatter") for alt in alts) == 3  # multiply-adds are not known
    for said in (
        "2026-01-02 03:04 UTC",
        "0a1b.dir",
        "made-up",
        "pipelines.compare --task it",
        "load average was 0.5",
        "could not be timed: no kernel",
    ):
        assert said in html
    assert "compact &lt;small&gt;" in html and "compact <small>" not in html
    captions = set(re.findall(r'aria-label="([^"]+)', html))
    assert any(caption.startswith("Recall by class") for caption in captions) == emotion
    assert any("by head yaw" in caption for caption in captions)
    assert not any("by source" in caption for caption in captions)  # there is one


def test_mcnemar_alone_is_shown_where_faces_are_independent():
    result = made_up("emotion")
    assert "p, groups permuted" in write_comparison(result)
    html = write_comparison(result | {"groups": result["n"]})
    assert "p, groups permuted" not in html and "p, McNemar" in html


def test_a_single_model_has_nothing_to_differ_from():
    result = made_up("landmarks")
    html = write_comparison(result | {"models": result["models"][:1], "deployables": None})
    assert "There is only one model" in html and "Deployables" not in html
