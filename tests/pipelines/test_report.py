import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from pipelines import report
from pipelines.cli import COSTS, GrimaceError

DEPLOYABLES = [
    "tflite/float32",
    "tflite/float16",
    "tflite/dynamic",
    "tflite/int8",
    "tfjs/float16",
    "tfjs/float32",
    "tfjs/uint8",
    "tensorrt/float32",
    "tensorrt/float16",
    "tensorrt/int8",
]


@pytest.fixture
def copy(verified, tmp_path):
    for name in ("params.yaml", "reports", "deploy/candidate"):
        source = verified.root / name
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return type(verified)(tmp_path, verified.params, [])


def rows_of(root: Path) -> list[dict[str, str]]:
    with (root / "reports" / "report" / "results.csv").open() as file:
        return list(csv.DictReader(file))


def table_of(text: str) -> list[dict[str, str]]:
    """Read a Markdown table."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert len({text.count("|") for text in text.splitlines() if text.startswith("|")}) == 1
    return [dict(zip(cells[0], row, strict=False)) for row in cells[2:]]


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_one_row_for_each_result(copy, capsys):
    copy.call(report.main)
    rows = rows_of(copy.root)
    for task in ("emotion", "landmarks"):
        mine = {row["what"]: row for row in rows if row["task"] == task}
        assert list(mine) == [
            "compact (of 2), validation",
            "compact (of 2), test",
            *[row for row in mine if row in DEPLOYABLES],
            "tensorrt/int8.sm89.engine",
        ]
        assert set(DEPLOYABLES) < set(mine)
        assert mine["tensorrt/int8.sm89.engine"]["verdict"] == "not run"
        assert all(mine[name]["verdict"] == "ok" for name in DEPLOYABLES)
    printed = capsys.readouterr().out
    for name in (*DEPLOYABLES, "compact (of 2), validation", "tensorrt/int8.sm89.engine"):
        assert name in printed  # not cut off


def test_figures_are_those_of_their_side(copy):
    reports = copy.root / "reports"
    change(
        reports / "evaluate" / "emotion" / "compact" / "scores.json",
        accuracy=0.51236,
        ci95={"accuracy": [0.4, 0.6]},
    )
    change(
        reports / "verify" / "landmarks" / "test.json",
        nme_interocular=0.0711,
        ci95={"nme_interocular": [0.07, 0.08]},
    )
    perf = json.loads((reports / "verify" / "emotion" / "perf.json").read_text())
    perf["tflite/int8"] |= {"bytes": 3 * 2**19, "p50_ms": 1.234, "runtime": "litert 9"}
    change(reports / "verify" / "emotion" / "perf.json", **perf)
    copy.call(report.main)
    table = table_of((reports / "report" / "results.md").read_text())
    found = {(row["task"], row["what"]): row for row in table}
    validation = found["emotion", "compact (of 2), validation"]
    assert validation["metric"] == "accuracy 51.24%"
    assert validation["95 % interval"] == "40.00% – 60.00%"
    test = found["landmarks", "compact (of 2), test"]
    assert test["metric"] == "NME 7.11%"
    assert test["95 % interval"] == "7.00% – 8.00%"
    int8 = found["emotion", "tflite/int8"]
    assert (int8["runs in"], int8["size"], int8["latency"]) == ("litert 9", "1.50 MiB", "1.23 ms")


def test_a_failed_gate_is_said(copy):
    folder = copy.root / "reports" / "verify" / "emotion"
    budgets = json.loads((folder / "budgets.json").read_text())
    gates = {gate["name"]: gate for gate in budgets["gates"]}
    gates["tflite/int8"]["passed"] = False
    gates["tfjs/uint8"] |= {"passed": False, "value": None, "bound": None}
    change(folder / "budgets.json", gates=list(gates.values()), passed=False)
    numerics = json.loads((folder / "numerics.json").read_text())
    del numerics["tfjs/uint8"]  # could not be computed
    (folder / "numerics.json").write_text(json.dumps(numerics))
    copy.call(report.main)
    verdicts = {row["what"]: row for row in rows_of(copy.root) if row["task"] == "emotion"}
    assert verdicts["tflite/int8"]["verdict"] == "FAILED"
    assert verdicts["tflite/int8"]["metric"].startswith("accuracy ")
    assert verdicts["tfjs/uint8"]["verdict"] == "FAILED"
    assert verdicts["tfjs/uint8"]["metric"] == ""
    assert verdicts["tfjs/float32"]["verdict"] == "ok"


def test_what_was_not_measured_or_not_judged_is_said(copy):
    folder = copy.root / "reports" / "verify" / "emotion"
    for file in ("numerics", "perf"):
        rows = json.loads((folder / f"{file}.json").read_text())
        change(folder / f"{file}.json", **{"tfjs/uint8:webgl": {**rows["tfjs/uint8"], "n": 5}})
    why = "this browser offers no WebGPU adapter here"
    change(folder / "budgets.json", not_available={"tfjs:webgpu": why})
    copy.call(report.main)
    found = {row["what"]: row for row in rows_of(copy.root) if row["task"] == "emotion"}
    webgl, webgpu = found["tfjs/uint8:webgl"], found["tfjs:webgpu"]
    assert webgl["verdict"] == "not judged" and webgl["metric"].endswith(" on 5 faces")
    assert webgpu["verdict"] == "not run"
    assert webgpu["runs in"] == f"not available here: {why}"
    assert not found["tfjs/uint8"]["metric"].endswith("faces")


def test_results_that_are_not_there_yet(copy):
    (copy.root / "reports" / "verify" / "landmarks" / "numerics.json").unlink()
    with pytest.raises(GrimaceError, match=r"numerics.json is missing; run `dvc repro verify`"):
        copy.call(report.main)
    assert not (copy.root / "reports" / "report").exists()


# The page


@pytest.fixture
def costs(copy) -> Path:
    path = copy.root / COSTS
    rows = [
        {"command": "pipelines.train --job emotion-plain", "seconds": 99.0, "peak_mib": 10},
        {"command": "pipelines.exporters.tfjs /home/me/m.keras", "seconds": 5.0, "peak_mib": 30},
        {"command": "pipelines.runtimes.probe /home/me/m.onnx", "seconds": 1.0, "peak_mib": 40},
        {"command": "pipelines.export --task emotion", "seconds": 7.0, "peak_mib": 20},
        {"command": "pipelines.train --job emotion-plain", "seconds": 55.0, "peak_mib": 50},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.usefixtures("costs")
def test_the_page_has_everything_but_faces(copy):
    copy.call(report.main, "--publish", "docs/results/small", "--command", "uv run dvc repro")
    page = copy.root / "docs" / "results" / "small"
    text = (page / "README.md").read_text()
    assert (copy.root / "reports" / "report" / "results.md").read_text() in text
    assert "uv run dvc repro" in text
    assert "| pipelines.train --job emotion-plain | 55 s | 50 MiB |" in text
    assert "99 s" not in text  # an earlier run of the same
    assert "/home/me" not in text + (page / "results.json").read_text()
    everything = json.loads((page / "results.json").read_text())
    assert everything["emotion"]["budgets"]["passed"] is True
    assert everything["landmarks"]["validation"].keys() == {"plain", "compact"}
    for task in ("emotion", "landmarks"):
        numerics, perf = (everything[task][name] for name in ("numerics", "perf"))
        lost, costs = (
            text.partition(f"## {task.capitalize()}: {what}\n")[2].partition("\n## ")[0]
            for what in ("what is lost", "what it costs")
        )
        for name, row in numerics.items():
            (told,) = re.findall(rf"^\| {name} \| {row['n']} \| (\S+) \|", lost, re.MULTILINE)
            loss = float(told) if task == "emotion" else float(told.rstrip("%")) / 100
            assert loss == pytest.approx(row["loss"], abs=0.005 if task == "emotion" else 5e-5)
            (told,) = re.findall(rf"^\| {name} \| (.+) \|$", costs, re.MULTILINE)
            assert f"{perf[name]['p50_ms']:.2f}, {perf[name]['p95_ms']:.2f} ms |" in told
            assert perf[name]["runtime"] in told
    pictures = {path.name for path in page.glob("*.png")}
    assert {"emotion-test-confusion.png", "landmarks-plain-ced.png"} <= pictures
    assert not any("worst" in name for name in pictures)
    copy.call(report.main, "--publish", "docs/results/small", "--command", "again")
    assert "again" in (page / "README.md").read_text()


@pytest.mark.usefixtures("costs")
def test_a_folder_with_other_things_is_not_replaced(copy):
    mine = copy.root / "docs" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(GrimaceError, match="holds no page of earlier results"):
        copy.call(report.main, "--publish", "docs", "--command", "x")
    assert mine.read_text() == "mine"


def test_a_page_needs_its_command_and_its_costs(copy, capsys):
    with pytest.raises(SystemExit) as stop:
        copy.call(report.main, "--publish", "page")
    assert stop.value.code == 2
    assert "--publish needs --command" in capsys.readouterr().err
    (copy.root / COSTS).unlink(missing_ok=True)
    with pytest.raises(GrimaceError, match=r"costs.jsonl is missing: run `dvc repro`"):
        copy.call(report.main, "--publish", "page", "--command", "x")
    assert not (copy.root / "page").exists()
