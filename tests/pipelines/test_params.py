import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipelines.cli import GrimaceError
from pipelines.datasets import LABELS
from pipelines.params import Params, load_params
from pipelines.views import build_policy

ROOT = Path(__file__).parents[2]
REAL = yaml.safe_load((ROOT / "params.yaml").read_text())


def changed(key: str, value: Any) -> dict[str, Any]:
    """The real parameters with one value set, at a dotted key."""
    raw = copy.deepcopy(REAL)
    place: Any = raw
    *parents, last = key.split(".")
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    place[int(last) if isinstance(place, list) else last] = value
    return raw


def without(key: str) -> dict[str, Any]:
    raw = copy.deepcopy(REAL)
    *parents, last = key.split(".")
    place = raw
    for part in parents:
        place = place[part]
    del place[last]
    return raw


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Any], Params]:
    def load(raw: Any) -> Params:
        path = tmp_path / "params.yaml"
        path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
        return load_params(path)

    return load


Load = Callable[[Any], Params]


def complaint(load: Load, raw: Any) -> str:
    """The one line, after the file's name, that a bad file gives."""
    with pytest.raises(GrimaceError) as error:
        load(raw)
    (line,) = str(error.value).splitlines()
    return line.partition("params.yaml")[2].removeprefix(": ")


def test_the_file_in_the_repository_is_valid(load: Load) -> None:
    params = load(REAL)
    assert params.tasks.named("landmarks").size == REAL["tasks"]["landmarks"]["size"]
    assert params.augment.named("emotion").transforms[1].transform == "Rotate"
    assert params.augment.named("emotion").transforms[1].arguments["border_mode"] == 1
    assert params.train.jobs["landmarks-plain"].widths == (16, 32, 64, 128)
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):  # they name what there is
        named = re.findall(r"(?:--job |\btrain@)(\w+-\w+)", page.read_text())
        assert set(named) <= params.train.jobs.keys(), page


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("filter.checks.blank.stdd", "std"),
        ("filter.checks.blankk", "blank"),
        ("filter.overrides.fer2013.mislabeled", "mislabelled"),
        ("splitt", "split"),
        ("tasks.emotion.chanels", "channels"),
        ("train.jobs.emotion-plain.learning_rat", "learning_rate"),
        ("download.fer2013.sha265", "sha256"),
    ],
)
def test_unknown_key(load: Load, key: str, meant: str) -> None:
    assert complaint(load, changed(key, 1)) == f"{key}: unknown key (did you mean {meant!r}?)"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("emotion.margin", 1, "margin is 1, 0.02 is the most"),
        ("landmarks.margin", 0.02, "margin is 0.02, 0.003 is the most"),
        ("emotion.floors", {"accuracy": 0}, "floors.accuracy is 0, 0.5 is the loosest"),
        ("emotion.floors", {"macro_f1": 0.5}, "floors has no accuracy"),
        (
            "landmarks.floors",
            {"nme_interocular": 0.5},
            "floors.nme_interocular is 0.5, 0.15 is the loosest",
        ),
        ("emotion.slice_floor", 0.1, "slice_floor is 0.1, 0.2 is the loosest"),
        ("landmarks.slice_floor", 0.3, "slice_floor is 0.3, 0.25 is the loosest"),
        ("emotion.above_validation", 0.5, "above_validation is 0.5, 0.05 is the most"),
        ("emotion.answers.int8", 1.0, "answers is 1, 0.4 is the most"),
        ("landmarks.mib", {"default": 1, "tflite/int8": 30}, "mib is 30, 25 is the most"),
    ],
)
def test_no_gate_is_loosened_without_a_signature(
    load: Load, key: str, value: Any, said: str
) -> None:
    wrong = complaint(load, changed(f"gate.{key}", value))
    task = key.partition(".")[0]
    signed = "a candidate that needs more is signed for in gate.overrides"
    assert wrong == f"gate: {task}.{said}; {signed}"


def test_unknown_key_like_no_other(load: Load) -> None:
    assert complaint(load, changed("filter.zzz", 1)) == "filter.zzz: unknown key"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("split.seed", "three"),
        ("split.seed", 1.5),
        ("split.seed", True),
        ("split.seed", date(2026, 1, 1)),  # YAML makes dates of its own accord
        ("split.seed", None),
        ("filter.pictures", "yes please"),
        ("filter", "all"),
        ("tasks.emotion.dataset", 3),
        ("train.jobs.emotion-plain.widths", 16),
        ("train.jobs.emotion-plain.learning_rate", "quick"),
        ("augment.emotion.policies.V4.1", "Rotate"),
        # impossible values
        ("split.val", 0),
        ("split.test", -0.1),
        ("watch.settle", -1),
        ("watch.drift.minimum", 5),
        ("watch.drift.auc", 0.4),
        ("filter.checks.blank.std", -1),
        ("filter.checks.blank.std", float("inf")),
        ("train.jobs.emotion-plain.learning_rate", float("nan")),
        ("train.jobs.emotion-plain.epochs", 0),
        ("train.jobs.emotion-plain.widths.1", -2),
        ("train.jobs.emotion-plain.network", "Res Net"),
        ("train.jobs.emotion-plain.loss", "hinge"),
        ("train.jobs.emotion-plain.ema", 1.0),
        ("train.jobs.emotion-plain.erase", 1.1),
        ("train.jobs.emotion-plain.teacher_weight", 0),
        ("tasks.emotion.size", 50),
        ("tasks.emotion.channels", 2),
        ("augment.workers", -1),
        ("cluster.address", "auto"),
        ("train.workers", 0),
        ("train.devices", -1),
        ("augment.landmarks.views", 0),
        ("augment.landmarks.jitter_scale", 1),
        ("download.fer2013.sha256.0", "26c5"),
        ("verify.runtimes.tfjs.0", "deno"),
        ("verify.software_faces", 0),
        ("evaluate.seed", -1),
    ],
)
def test_wrong_type_or_impossible_value(load: Load, key: str, value: Any) -> None:
    said = complaint(load, changed(key, value))
    assert said.startswith(f"{key}: ")
    shown = str(value) if isinstance(value, date) else value
    assert said.endswith(f", not {shown!r}")


@pytest.mark.parametrize(
    "key", ["verify", "split.seed", "train.jobs.emotion-plain.loss", "tasks.landmarks"]
)
def test_missing_key(load: Load, key: str) -> None:
    assert complaint(load, without(key)) == f"{key}: missing"


def test_missing_transform_name(load: Load) -> None:
    raw = changed("augment.emotion.policies.V4.0", {"p": 0.5})
    assert complaint(load, raw) == "augment.emotion.policies.V4.0.transform: missing"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tasks.emotion.dataset", "fer2031", "tasks.emotion.dataset: 'fer2031' is not a dataset"),
        ("split.val", 0.85, "split: val + test leave nothing for training"),
        (
            "watch.quarantine",
            "data/landing/labelled/bad",
            "watch: data/landing/labelled has to lie apart from the other folders",
        ),
        ("train.jobs.emotion-plain.loss", "wing", "train.jobs.emotion-plain: loss wing"),
        (
            "train.jobs.emotion-plain.by_dataset",
            {"fer2031": {"epochs": 5}},
            "train.jobs.emotion-plain: by_dataset names unknown datasets: fer2031",
        ),
        (
            "train.jobs.emotion-plain.by_dataset",
            {"fer2013": {"epoch": 5}},
            "train.jobs.emotion-plain: by_dataset.fer2013: epoch: unknown key",
        ),
        (
            "train.jobs.emotion-plain.by_dataset",
            {"fer2013": {"model": "other"}},
            "train.jobs.emotion-plain: by_dataset.fer2013 cannot change model",
        ),
        ("train.jobs.emotion-plain.task", "landmarks", "train.jobs.emotion-plain: loss"),
        (
            "filter.checks.no_face",
            {"action": "flag", "detectors": ["haar"], "votes": 2},
            "filter.checks.no_face: 2 votes, but 1 detectors",
        ),
        (
            "filter.checks.no_face",
            {"action": "flag", "detectors": ["haar", "haar"], "votes": 1},
            "filter.checks.no_face: a detector is named twice",
        ),
        ("filter.overrides", {"fer2031": {}}, "filter: overrides names unknown datasets: fer2031"),
        ("filter.restore", {"fer2031": []}, "filter: restore names unknown datasets: fer2031"),
        ("verify.runtimes.tfjs", ["node", "node"], "verify.runtimes: tfjs names a runtime twice"),
        ("train.workers", 2, "train.workers: 2 need a cluster; set cluster.address, or train.dev"),
        (
            "select.emotion.metric",
            "acuracy",
            "select: emotion.metric: 'acuracy' is not measured with an interval (did you mean "
            "'accuracy'?); choose among accuracy, macro_f1, ",
        ),
        (
            "select.landmarks.metric",
            "nme_box_yaw_mean",
            "select: landmarks.metric: 'nme_box_yaw_mean' is not measured with an interval",
        ),
        (
            "select.landmarks.higher_is_better",
            True,
            "select: landmarks.higher_is_better: has to be false for nme_interocular",
        ),
    ],
)
def test_values_that_do_not_fit_each_other(load: Load, key: str, value: Any, words: str) -> None:
    assert complaint(load, changed(key, value)).startswith(words)


def test_workers_say_how_many_devices_they_have(load: Load) -> None:
    raw = changed("cluster.address", "10.0.0.1:6379")
    raw["train"] |= {"workers": 4, "devices": 0}
    assert (
        complaint(load, raw) == "train.devices: on a cluster, say how many each worker is to have"
    )
    raw["train"]["devices"] = 8
    assert (load(raw).train.workers, load(raw).train.devices) == (4, 8)


@pytest.mark.parametrize(
    ("task", "dataset", "why"),
    [
        ("landmarks", "300w", "'300w' is not a dataset"),
        ("landmarks", "fer2013", "fer2013 has no labels for task landmarks"),
        ("emotion", "ytf_keypoints", "ytf_keypoints has no labels for task emotion"),
        ("landmarks", "aflw2k3d", "aflw2k3d is for evaluation only"),
        ("emotion", "aflw2k3d", "aflw2k3d has no labels for task emotion"),
    ],
)
def test_a_task_needs_a_dataset_that_serves_it(
    load: Load, task: str, dataset: str, why: str
) -> None:
    said = complaint(load, changed(f"tasks.{task}.dataset", dataset))
    assert said.startswith(f"tasks.{task}.dataset: {why}")
    serving = {
        "emotion": {"synthetic", "fer2013", "affectnet", "folder"},
        "landmarks": set(REAL["download"]) - {"fer2013", "aflw2k3d"},
    }
    listed = said.rpartition(f"{task} can be learnt from ")[2].split(", ")
    assert set(listed) == serving[task]


def test_every_dataset_that_serves_a_task_is_accepted(load: Load) -> None:
    for dataset in ("ytf_keypoints", "kaggle_keypoints", "affectnet", "the300w_lp", "folder"):
        assert load(changed("tasks.landmarks.dataset", dataset)).tasks.landmarks.dataset == dataset


def test_every_dataset_has_its_source_and_its_labels() -> None:
    assert set(REAL["download"]) == set(LABELS)


def test_a_job_is_called_by_what_it_trains(load: Load) -> None:
    raw = copy.deepcopy(REAL)
    raw["train"]["jobs"]["best"] = raw["train"]["jobs"].pop("emotion-plain")
    assert "job best must be called emotion-plain" in complaint(load, raw)


def test_a_job_has_its_own_name_beside_its_network_s(load: Load) -> None:
    raw = copy.deepcopy(REAL)
    raw["train"]["jobs"]["emotion-slow"] = raw["train"]["jobs"]["emotion-plain"] | {
        "model": "slow",
        "network": "plain",
    }
    jobs = load(raw).train.jobs
    slow, plain = (jobs[name].resolved("fer2013") for name in ("emotion-slow", "emotion-plain"))
    assert (slow.model, slow.network, slow.epochs) == ("slow", "plain", plain.epochs)
    assert plain.network == "plain"


@pytest.mark.parametrize(
    ("job", "change", "said"),
    [
        ("emotion-plain", {"loss": "mse"}, "loss mse does not fit task emotion"),
        ("landmarks-plain", {"cutmix": 1.0}, "cutmix is not for landmarks"),
        (
            "emotion-plain",
            {
                "epochs": 9,
                "frozen_epochs": 3,
                "fine_tune_rate": 0.1,
                "by_dataset": {"fer2013": {"epochs": 3}},
            },
            "frozen_epochs 3 leave none of 3",
        ),
    ],
)
def test_a_job_that_makes_no_sense(load: Load, job: str, change: dict[str, Any], said: str) -> None:
    key = f"train.jobs.{job}"
    raw = changed(key, REAL["train"]["jobs"][job] | change)
    assert complaint(load, raw).startswith(f"{key}: ") and said in complaint(load, raw)


def test_teachers_are_files_with_their_sums(load: Load) -> None:
    key = "train.jobs.emotion-plain"
    teacher = {"path": "runs/emotion/vgg/model.keras", "sha256": "a" * 64}
    job = load(changed(f"{key}.teachers", [teacher])).train.jobs["emotion-plain"]
    (found,) = job.resolved("synthetic").teachers
    assert (found.path, found.sha256) == (teacher["path"], teacher["sha256"])
    said = complaint(load, changed(f"{key}.teachers", [teacher | {"sha256": "a"}]))
    assert said.startswith(f"{key}.teachers.0.sha256: ")


def test_a_task_without_a_model_is_refused(load: Load) -> None:
    raw = copy.deepcopy(REAL)
    raw["train"]["jobs"] = {
        name: job for name, job in raw["train"]["jobs"].items() if job["task"] == "emotion"
    }
    assert complaint(load, raw) == "train.jobs has no model for task landmarks"


@pytest.mark.parametrize("text", ["1e-05", "1E-5", "+1e-5", "1.0e-05", "0.00001"])
def test_small_numbers_however_they_are_written(load: Load, text: str) -> None:
    raw = yaml.safe_dump(changed("train.jobs.emotion-plain.learning_rate", "HERE"))
    params = load(raw.replace("HERE", text))
    assert params.train.jobs["emotion-plain"].learning_rate == 1e-5


@pytest.mark.parametrize(
    ("field", "tried", "said"),
    [
        ("dropuot", {"low": 0, "high": 0.5}, "a job has no such field (did you mean 'dropout'?)"),
        ("seed", {"low": 0, "high": 9}, "this field is not searched"),
        ("loss", {"low": 0, "high": 9}, "this field takes no numbers; give choices"),
        ("widths", {"low": 4, "high": 9}, "this field takes no numbers; give choices"),
        ("batch", {"low": 8, "high": 64.5}, "this field takes whole numbers"),
        ("batch", {"low": 8, "high": 64, "step": 0.5}, "this field takes whole numbers"),
        (
            "dropout",
            {"low": 0, "high": 1},
            "the job cannot be trained so: dropout: input should be less than 1, not 1.0",
        ),
        (
            "weight_decay",
            {"low": -1, "high": 1},
            "the job cannot be trained so: weight_decay: "
            "input should be greater than or equal to 0, not -1.0",
        ),
        (
            "optimizer",
            {"choices": ["sgd", "adam"]},
            "the job cannot be trained so: optimizer: input should be 'sgd' or 'adamw', not 'adam'",
        ),
        (
            "loss",
            {"choices": ["cross_entropy", "wing"]},
            "the job cannot be trained so: loss wing does not fit task emotion",
        ),
        ("dropout", {"low": 0.5, "high": 0.5}, "low 0.5 is not below high 0.5"),
        ("dropout", {"low": 0}, "needs low and high, or choices"),
        ("dropout", {"low": 0, "high": 0.5, "log": True}, "log needs low above 0, and no step"),
        (
            "dropout",
            {"low": 0.1, "high": 0.5, "log": True, "step": 0.1},
            "log needs low above 0, and no step",
        ),
        (
            "batch",
            {"low": 8, "choices": [8, 16]},
            "choices stand alone, without low, high, log and step",
        ),
    ],
)
def test_bad_ranges(load: Load, field: str, tried: dict[str, Any], said: str) -> None:
    raw = changed("sweep.jobs.emotion-compact", {field: tried})
    assert complaint(load, raw).startswith(f"sweep.jobs.emotion-compact.{field}: {said}")


def test_ranges_are_for_a_job_that_is_there(load: Load) -> None:
    raw = changed("sweep.jobs", {"emotion-compct": {"dropout": {"low": 0, "high": 0.5}}})
    assert complaint(load, raw) == (
        "sweep.jobs.emotion-compct: train.jobs has no such job (did you mean 'emotion-compact'?)"
    )


def test_a_range_has_known_keys_and_more_than_one_choice(load: Load) -> None:
    key = "sweep.jobs.emotion-compact.batch"
    said = complaint(load, changed(key, {"low": 8, "hihg": 16}))
    assert said == f"{key}.hihg: unknown key (did you mean 'high'?)"
    assert complaint(load, changed(key, {"choices": [8]})).startswith(f"{key}.choices: ")


def test_every_error_has_its_own_line(load: Load) -> None:
    raw = changed("split.seed", "x") | {"nonsense": 1}
    with pytest.raises(GrimaceError) as error:
        load(raw)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    for start in ("split.seed: input should", "nonsense: unknown key"):
        assert any(f"params.yaml: {start}" in line for line in lines)


@pytest.mark.parametrize("text", ["a: [1\nb: 2", "? [a]\n: 1", "a: \x00", "{"])
def test_not_yaml(load: Load, text: str) -> None:
    assert complaint(load, text).startswith(" is not YAML: ")


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GrimaceError, match="is not YAML"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["", "- 1\n", "hello\n"])
def test_not_a_mapping(load: Load, text: str) -> None:
    assert complaint(load, text).startswith("the file: input should be an object")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(GrimaceError, match=r"params\.yaml is missing: run from the root"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "policy",
            "modren",
            "no policy 'modren' (did you mean 'modern'?); there are V2, V3, V4, modern",
        ),
        ("policy", "none", "no policy 'none'; there are V2, V3, V4, modern"),
        ("balance", "smallest", "null, largest or a count for each class, not 'smallest'"),
        ("balance", 4000, "null, largest or a count for each class, not 4000"),
        ("balance", {"hapy": 4000}, "unknown class 'hapy' (did you mean 'happy'?)"),
        ("balance", {"sad": "many"}, "sad needs a count above 0, not 'many'"),
        ("balance", {"sad": 0}, "sad needs a count above 0, not 0"),
    ],
)
def test_bad_policy_or_balance(load: Load, key: str, value: Any, said: str) -> None:
    key = f"augment.emotion.{key}"
    assert complaint(load, changed(key, value)) == f"{key}: {said}"


def test_only_emotion_has_classes_to_balance(load: Load) -> None:
    for balance in ("largest", {"sad": 40}):
        assert load(changed("augment.emotion.balance", balance)).augment.emotion.balance == balance
        raw = changed("augment.landmarks", REAL["augment"]["landmarks"] | {"balance": balance})
        assert complaint(load, raw) == (
            "augment: landmarks.balance: landmarks have no classes; only emotion has"
        )


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (
            {"transform": "Rotat"},
            r"policies\.V4\.1\.transform: .* has no .*'Rotat' \(did you mean 'Rotate'",
        ),
        ({"transform": "OneOf", "transforms": []}, r"policies\.V4\.1\.transform: .* no .*'OneOf'"),
        ({"transform": "os"}, r"policies\.V4\.1\.transform: .* has no .*'os'"),
        (
            {"transform": "Rotate", "limits": 3},
            r"policies\.V4\.1\.limits: unknown .* Rotate; .*limit",
        ),
        ({"transform": "Rotate", "limit": "far"}, r"policies\.V4\.1: Rotate .*limit.*'far'"),
        (
            {"transform": "Rotate", "p": 2},
            r"policies\.V4\.1: Rotate .*\bp\b.*less than or equal to 1",
        ),
        ({"transform": "DualTransform"}, r"policies\.V4\.1: DualTransform fails"),
        # These would work, and hand training something that is no picture.
        ({"transform": "Normalize"}, r"policies\.V4\.1: Normalize makes float32"),
        (
            {"transform": "Resize", "height": 20, "width": 20},
            r"policies\.V4\.1: Resize .*\(20, 20, 1\)",
        ),
        (
            {"transform": "RandomCrop", "height": 999, "width": 9},
            r"policies\.V4\.1: RandomCrop fails",
        ),
        ({"transform": "RandomSunFlare"}, r"policies\.V4\.1: RandomSunFlare fails: .*3-channel"),
    ],
)
def test_bad_transform(load: Load, item: dict[str, Any], words: str) -> None:
    params = load(changed("augment.emotion.policies.V4.1", item))
    with pytest.raises(GrimaceError, match=r"params\.yaml: augment\.emotion\." + words) as error:
        build_policy(params.augment.emotion, params.tasks.emotion, "emotion")
    assert len(str(error.value).splitlines()) == 1


def test_values_are_frozen(load: Load) -> None:
    params = load(REAL)
    job = params.train.jobs["emotion-plain"]
    for section, name in [
        (params, "split"),
        (params.split, "seed"),
        (params.tasks.emotion, "size"),
        (params.augment.emotion.transforms[0], "transform"),
        (job, "seed"),
    ]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, getattr(section, name))


def command(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.params"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump(changed("augment.landmarks.policies.V4.0.transform", "Flop")))
    bad = command(tmp_path)
    assert bad.returncode == 1
    (line,) = bad.stderr.splitlines()
    assert line.startswith("error: params.yaml: augment.landmarks.policies.V4.0.transform: ")
    schema = tmp_path / "reports/params/schema.json"
    assert not schema.exists()

    params.write_text(yaml.safe_dump(REAL))
    good = command(tmp_path)
    assert (good.returncode, good.stdout) == (0, "params.yaml is valid\n")
    assert set(json.loads(schema.read_text())["properties"]) == set(REAL)
