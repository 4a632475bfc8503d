import json
import sys
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.scaling import Costs, Network, exchanged, line, predicted
from pipelines.cli import GrimaceError

COSTS = Costs(step=0.010, image=0.002, collectives=30, bytes=5_000_000)
NETWORK = Network(latency=20e-6, bandwidth=1.25e9)


def test_a_step_as_worked_out_by_hand() -> None:
    computing, communicating = predicted(COSTS, NETWORK, workers=8, batch=512)
    assert computing == pytest.approx(0.010 + 64 * 0.002)
    # 30 trees of 3 levels up and down, and 14/8 of 5 MB.
    assert communicating == pytest.approx(30 * 6 * 20e-6 + 1.75 * 4e-3)
    assert predicted(COSTS, NETWORK, 1, 64) == (pytest.approx(0.138), 0)
    assert predicted(COSTS, NETWORK, 8, 512, faster=10)[0] == pytest.approx(0.0138)
    assert predicted(COSTS, NETWORK, 8, 512, faster=10)[1] == communicating


def test_a_line_is_found_and_never_falls() -> None:
    assert line([1, 2, 4, 64], [0.5 + 0.25 * x for x in (1, 2, 4, 64)]) == pytest.approx(
        (0.5, 0.25)
    )
    assert line([1, 2], [2.0, 1.0])[1] == 0


MODULE = """
  %sum = f32[3,3,1,48]{3,2,1,0} all-reduce(f32[3,3,1,48]{3,2,1,0} %x), channel_id=1
  %two = (f32[48]{0}, bf16[7]{0}) all-reduce(f32[48]{0} %a, bf16[7]{0} %b), channel_id=2
  %one = f32[] all-reduce-start(f32[] %loss), channel_id=3
  %end = f32[] all-reduce-done(f32[] %one)
  %all = s32[2,5]{1,0} all-gather(s32[1,5]{1,0} %i), dimensions={0}
  %add = f32[9]{0} add(f32[9]{0} %p, f32[9]{0} %q)
"""


def test_what_a_compiled_step_exchanges() -> None:
    assert exchanged(MODULE) == (4, 4 * 432 + 4 * 48 + 2 * 7 + 4 + 4 * 10)


RESULTS = {
    "command": "python -m benchmarks.scaling",
    "date": "2026-01-01",
    "job": "emotion-residual",
    "compute": {"8": 0.026, "64": 0.138},
    "costs": {"step": 0.010, "image": 0.002, "collectives": 30, "bytes": 5_000_000},
    "exchange": {"4": 1e-4, "1048576": 1e-3},
    "here": {"latency": 5e-5, "bandwidth": 1.2e9},
    "together": {"64": 0.09},
}


def test_a_prediction_is_made_from_what_was_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["scaling", "--predict", "--bandwidth", "10", "--latency", "20"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(GrimaceError, match=r"is missing: run `python -m benchmarks\.scaling"):
        scaling.main()
    scaling.OUT.mkdir(parents=True)
    (scaling.OUT / "results.json").write_text(json.dumps(RESULTS))
    scaling.main()
    said = capsys.readouterr().out
    (row,) = (text for text in said.splitlines() if text.startswith("| 8 | 148"))
    # t(8) = 138 + 10.6 ms for 512 images; alone 138 ms for 64.
    assert row.startswith("| 8 | 148.60 | 3,445 | 93% |")
    assert "No figure below was measured" in said
