import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import GrimaceError
from pipelines.job import Job, Teacher, job_of, plain, read_job, write_job

ROOT = Path(__file__).parents[2]
JOB = Job(
    task="emotion",
    model="small",
    network="plain",
    widths=(4, 8),
    loss="cross_entropy",
    optimizer="sgd",
    learning_rate=0.1,
    epochs=3,
    batch=16,
    seed=7,
    teachers=(Teacher("runs/emotion/vgg/model.keras", "0" * 64),),
)
LANDMARKS = {"task": "landmarks", "loss": "wing"}


def test_a_job_file_gives_its_job(tmp_path: Path) -> None:
    write_job(JOB, tmp_path / "job.json")
    assert read_job(tmp_path / "job.json") == JOB
    assert job_of(asdict(JOB)) == job_of(plain(JOB)) == JOB


def test_most_fields_can_be_left_out(tmp_path: Path) -> None:
    least = ("task", "model", "loss", "optimizer", "learning_rate", "epochs", "batch", "seed")
    raw = {name: plain(JOB)[name] for name in least}
    (tmp_path / "job.json").write_text(json.dumps(raw))
    job = read_job(tmp_path / "job.json")
    assert (job.network, job.widths, job.teachers, job.precision) == ("small", (), (), "float32")
    for name in least:
        some = {key: value for key, value in raw.items() if key != name}
        (tmp_path / "job.json").write_text(json.dumps(some))
        with pytest.raises(GrimaceError, match=rf"job\.json: .*{name}"):
            read_job(tmp_path / "job.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rat": 0.1}, r"unknown field 'learning_rat'; known are .*'learning_rate'"),
        ({"teachers": [{"path": "x"}]}, "sha256"),
        ({"task": "pose"}, "task 'pose' is none of emotion, landmarks"),
        ({"loss": "wing"}, "loss wing does not fit task emotion, which has cross_entropy, focal"),
        ({"optimizer": "adam"}, "optimizer 'adam' is none of"),
        ({"schedule": "linear"}, "schedule 'linear' is none of"),
        ({"precision": "float16"}, "precision 'float16' is none of"),
        ({"class_weights": "equal"}, "class_weights 'equal' is none of"),
        ({**LANDMARKS, "mixup": 0.2}, "mixup is not for landmarks: the points of two"),
        ({**LANDMARKS, "cutmix": 1.0}, "cutmix is not for landmarks: the points of two"),
        ({**LANDMARKS, "label_smoothing": 0.1}, "label_smoothing is not for landmarks"),
        ({**LANDMARKS, "class_weights": "balanced"}, "class_weights is not for landmarks"),
        ({**LANDMARKS, "temperature": 2.0}, "temperature is not for landmarks"),
        ({"frozen_epochs": 3, "fine_tune_rate": 0.1}, "frozen_epochs 3 leave none of 3"),
        ({"frozen_epochs": 1}, "frozen_epochs and fine_tune_rate go together"),
        ({"fine_tune_rate": 0.1}, "frozen_epochs and fine_tune_rate go together"),
    ],
)
def test_what_makes_no_sense(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps(plain(JOB) | change))
    with pytest.raises(GrimaceError, match=rf"job\.json: .*{words}"):
        read_job(tmp_path / "job.json")


def test_no_job_file(tmp_path: Path) -> None:
    with pytest.raises(GrimaceError, match=r"job\.json is missing; .*--write-job"):
        read_job(tmp_path / "job.json")
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(GrimaceError, match=r"job\.json: "):
        read_job(tmp_path / "job.json")


def test_erasing_is_for_landmarks_too() -> None:
    assert replace(JOB, **LANDMARKS, erase=0.5).name == "landmarks-small"


def test_params_can_check_a_job_without_keras() -> None:
    code = "import sys, pipelines.params; print('keras' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "False\n"
