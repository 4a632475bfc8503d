"""Promotion and rollback on a real store, and all that should not get through."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml

from pipelines import gate, registry
from pipelines.cli import GrimaceError
from pipelines.heldout import Faces, faces_of_side
from pipelines.params import Task, TaskName, load_params
from pipelines.registry import Registry

# Whatever is written to the store or beside it goes through one of these.
WRITES = (
    "create_registered_model",
    "create_model_version",
    "set_registered_model_tag",
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "set_model_version_tag",
    "update_model_version",
    "log_artifacts",
    "set_terminated",
)


def test_a_first_champion_a_better_one_and_the_way_back(shop):
    first = shop.candidate(0.6)
    store = shop.store()
    assert store.aliases() == {"candidate": first} and store.champion() is None
    event = store.promote(first, "Ada", "the first")
    assert (event.before, event.after, event.who, event.why) == (None, 1, "Ada", "the first")
    assert store.aliases() == {"candidate": 1, "champion": 1}
    assert store.blessing(1)["champion"] is None

    second = shop.candidate(0.8, 2)
    blessing = store.blessing(second)
    assert blessing["blessed"] and blessing["champion"]["version"] == 1
    assert {row["name"] for row in blessing["gates"]} >= {"against the champion", "bytes"}
    store.promote(second, "Ada", "better")
    assert store.aliases() == {"candidate": 2, "champion": 2, "previous": 1}
    assert store.promote(second, "Ada", "again") is None
    third = shop.candidate(0.9, 3)
    store.promote(third, "Ada", "better still")

    event = store.rollback(None, "Eve", "blinks")
    assert (event.before, event.after) == (3, 2)
    assert store.aliases() == {"candidate": 3, "champion": 2, "previous": 1}
    with pytest.raises(GrimaceError, match=r"version 3 was rolled back by Eve .*blinks.*--to 3"):
        store.promote(third, "retrain", "")
    store.rollback(None, "Eve", "further")
    assert store.aliases() == {"candidate": 3, "champion": 1}
    with pytest.raises(GrimaceError, match="no champion before version 1"):
        store.rollback(None, "Eve", "too far")
    with pytest.raises(GrimaceError, match="version 1 is the champion"):
        store.rollback(1, "Eve", "")
    with pytest.raises(GrimaceError, match=r"never was champion \(1, 2, 3 was\)"):
        store.rollback(7, "Eve", "")
    store.rollback(3, "Ada", "it was the phone")
    assert store.aliases() == {"candidate": 3, "champion": 3, "previous": 2}
    moves = [(e.action, e.before, e.after) for e in store.moves()]
    assert moves == [
        ("promote", None, 1),
        ("promote", 1, 2),
        ("promote", 2, 3),
        ("rollback", 3, 2),
        ("rollback", 2, 1),
        ("rollback", 1, 3),
    ]
    assert store.trail() == store.moves()


def test_a_version_has_all_that_it_takes(shop):
    number = shop.candidate(0.7)
    store = shop.store()
    version, folder = store.version(number), store.fetch(number)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "MLmodel",
        "data/model.keras",
        "bundles/tflite/int8.tflite",
        "MODEL_CARD.md",
        "blessing.json",
        "answers.npz",
        "reports/numerics.json",
        "lineage/dvc.lock",
        "lineage/params.yaml",
        "lineage/code.json",
    } <= files
    assert (folder / "data/model.keras").read_bytes() == Path(
        "deploy/candidate/emotion.keras"
    ).read_bytes()
    tags = version.tags
    assert tags["grimace.sha256"] == registry.digest(registry.bytes_of("emotion"))
    assert len(tags["grimace.git_commit"]) == 40 and tags["grimace.dataset"] == "folder"
    assert tags["grimace.blessed"] == "true"
    run = store.client.get_run(version.run_id)
    assert run.data.tags["grimace.model_sha256"] == tags["grimace.model_sha256"]
    judged = (folder / "blessing.json").read_bytes()
    shop.judge()
    assert (folder / "blessing.json").read_bytes() == judged
    # What is here already stays the version that it is.
    assert shop.register() == number and len(store.versions()) == 1


def test_the_page_of_a_version_is_a_model_card(shop):
    page = shop.store().version(shop.candidate(0.7)).description
    assert len(page) <= 5000
    titles = [line for line in page.splitlines() if line.startswith("#")]
    assert titles == [
        "# emotion: plain, trained on folder",
        "## Intended use",
        "## Data",
        "## Metrics",
        "## Slices, on validation",
        "## Runtimes, on test",
        "## Limits",
        "## How to reproduce",
        "## Gates",
    ]
    assert "Licence: Whatever you hold" in page
    scores = json.loads(Path("reports/verify/emotion/test.json").read_text())
    low, high = scores["ci95"]["accuracy"]
    assert f"{scores['accuracy']:.4f} ({low:.4f} – {high:.4f})" in page
    assert "| tflite/int8 | litert 2 |" in page
    assert "blessed on" in page
    whole = (shop.store().fetch(1) / "MODEL_CARD.md").read_text()
    assert whole.count("| class: ") == 7 > page.count("| class: ")


# What must not get through


def test_what_is_not_blessed_is_refused(shop):
    store = shop.store()
    shop.produce(0.3)
    number = shop.register()
    with pytest.raises(GrimaceError, match="version 1 was not judged yet"):
        store.promote(number, "Eve", "")
    assert shop.judge()["blessed"] is False
    with pytest.raises(GrimaceError, match="version 1 is not blessed: it fails floor: accuracy"):
        store.promote(number, "Eve", "")
    assert store.champion() is None and store.trail() == []
    with pytest.raises(GrimaceError, match="has no version 9; it has 1"):
        store.promote(9, "Eve", "")


def test_a_blessing_cannot_be_written_by_hand(shop):
    store = shop.store()
    number = shop.candidate(0.3)
    path = store.fetch(number) / "blessing.json"
    blessing = json.loads(path.read_text())
    path.write_text(json.dumps(blessing | {"blessed": True}))
    with pytest.raises(GrimaceError, match="not the one that the gate attached"):
        store.promote(number, "Eve", "")
    # Nor with the tag forged as well: the rows decide.
    store._tag(number, registry.BLESSING, registry.tracking.sha256(path))
    with pytest.raises(GrimaceError, match="not blessed: it fails floor"):
        store.promote(number, "Eve", "")


TAMPERED = {
    "changed": "bundles/tflite/int8.tflite",
    "gone": "bundles/tflite/int8.tflite",
    "added": "bundles/tflite/more.tflite",
    "model": "data/model.keras",
    "swapped": "bundles/model.keras, data/model.keras",
    "loader": "MLmodel, other/model.keras",
    "lineage": "lineage/code.json",
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_bundle_is_refused(shop, how):
    store = shop.store()
    number = shop.candidate(0.7)
    folder = store.fetch(number)
    bundle = folder / "bundles/tflite/int8.tflite"
    match how:
        case "changed":
            bundle.write_bytes(bundle.read_bytes() + b"!")
        case "gone":
            bundle.unlink()
        case "added":
            (folder / "bundles/tflite/more.tflite").write_bytes(b"!")
        case "model":
            (folder / "data/model.keras").write_bytes(b"!")
        case "swapped":  # the blessed bytes are there, under the name by which they are listed
            (folder / "data/model.keras").rename(folder / "bundles/model.keras")
            (folder / "data/model.keras").write_bytes(b"!")
        case "loader":  # MLflow is sent to another model
            (folder / "other").mkdir()
            (folder / "other/model.keras").write_bytes(b"!")
            told = folder / "MLmodel"
            told.write_text(told.read_text().replace("data: data", "data: other"))
        case "lineage":
            (folder / "lineage/code.json").write_text('{"commit": "another"}')
    with pytest.raises(GrimaceError, match=f"other bytes than it holds: {TAMPERED[how]} in "):
        store.promote(number, "Eve", "")
    # Nor with the list of files forged as well.
    listed = {**json.loads((folder / "files.json").read_text()), **registry._sums(folder)}
    (folder / "files.json").write_text(json.dumps(listed))
    with pytest.raises(GrimaceError, match="list of the files of grimace-emotion version 1 is"):
        store.promote(number, "Eve", "")
    assert store.champion() is None


def test_a_bundle_has_no_file_by_the_models_name(shop):
    shop.produce(0.7)
    Path("deploy/emotion/model.keras").write_bytes(b"!")
    with pytest.raises(GrimaceError, match="is no part of a bundle"):
        shop.register()


def test_what_a_stage_read_before_it_was_made_again_is_no_record(shop):
    """The split made anew, and the verification run by itself on the model of before."""
    number = shop.candidate(0.7)
    lock = yaml.safe_load(Path("dvc.lock").read_text())

    def stage(out: str, dep: str, md5: str) -> dict[str, Any]:
        return {
            "cmd": "true",
            "deps": [{"path": dep, "hash": "md5", "md5": md5}],
            "outs": [{"path": out, "hash": "md5", "md5": f"{out}.dir"}],
        }

    lock["stages"]["split@folder"] = stage("data/raw/one", "pipelines/split.py", "code")
    lock["stages"]["train@emotion-plain"] = stage("runs/plain", "data/raw/one", "data/raw/one.dir")
    lock["stages"]["verify@emotion"]["deps"] = [{"path": "runs/plain", "md5": "runs/plain.dir"}]
    lock["stages"]["split@folder"]["outs"][0]["md5"] = "another.dir"
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    (row,) = [row for row in shop.judge()["gates"] if row["name"] == "records"]
    assert not row["passed"]
    assert "data/raw/one as train@emotion-plain read it" in row["why"]
    assert "runs/plain as" not in row["why"] and "pipelines/split.py" not in row["why"]
    with pytest.raises(GrimaceError, match="not blessed: it fails records"):
        shop.store().promote(number, "Eve", "")


def test_a_network_that_was_rolled_back_stays_away_in_other_bundles(shop, noted):
    store = shop.store()
    store.promote(shop.candidate(0.6), "Ada", "")
    store.promote(shop.candidate(0.8, 2), "Ada", "")
    store.rollback(None, "Eve", "blinks")
    Path("deploy/emotion/tflite/int8.tflite").write_bytes(b"exported anew")
    path = Path("reports/verify/emotion/budgets.json")
    budgets = json.loads(path.read_text()) | {"files": registry.bytes_of("emotion")}
    path.write_text(json.dumps(budgets))
    noted("reports/verify", "reports/evaluate", "reports/select")
    number = shop.register()
    assert number == 3 and shop.judge()["blessed"]
    said = r"version 3 is the same network in other bundles, and version 2 was rolled back by Eve"
    with pytest.raises(registry.RefusedError, match=said):
        store.promote(number, "retrain", "", unattended=True)
    store.promote(number, "Ada", "the bundles were wrong")
    assert store.champion() == 3


def test_a_long_story_is_cut_to_what_the_trail_holds():
    override = {"gate": "size: tflite/int8", "who": "Ада", "reason": "ё" * 500}
    event = registry.Event("promote", 1, 2, "Ada", "now", "почему " * 200, [override] * 9)
    kept = registry.entry(event)
    assert len(kept) <= 5000 and "почему" in kept and kept.count("size: tflite/int8") == 9
    short = event._replace(why="blinks", overrides=[override])
    assert registry.Event(**json.loads(registry.entry(short))) == short


def test_bytes_changed_between_verification_and_gate(shop):
    shop.produce(0.7)
    Path("deploy/emotion/tflite/int8.tflite").write_bytes(b"another")
    shop.register()
    blessing = shop.judge()
    (row,) = [row for row in blessing["gates"] if not row["passed"]]
    assert row["why"] == "not as `verify` measured them: tflite/int8.tflite"


def test_reports_that_were_written_by_hand(shop):
    """A weak candidate with the answers and figures of a good one, which is the same otherwise."""
    shop.produce(0.3)
    shop.register()
    verify = Path("reports/verify/emotion")
    with np.load(verify / "predictions.npz") as saved:
        answers = dict(saved)
    answers["outputs"] = (0.01 + 0.93 * np.eye(7)[np.arange(240) % 7]).astype(np.float32)
    answers["outputs"][:60] = answers["outputs"][1:61]  # not too good to be true
    np.savez(verify / "predictions.npz", **answers)
    scores = Path("reports/evaluate/emotion/plain/scores.json")
    good = {"accuracy": 0.75, "ci95": {"accuracy": [0.7, 0.8]}}
    scores.write_text(json.dumps(json.loads(scores.read_text()) | good))
    blessing = shop.judge()
    failed = {row["name"]: row["why"] for row in blessing["gates"] if not row["passed"]}
    assert failed.keys() == {"records"}
    other = "reports/evaluate, reports/verify"
    assert f"not as dvc.lock has them: {other}; run `dvc" in failed["records"]
    shutil.rmtree("reports/select")
    (row,) = [row for row in shop.judge()["gates"] if row["name"] == "records"]
    assert "reports/evaluate, reports/select, reports/verify" in row["why"]
    Path("dvc.lock").unlink()
    (row,) = [row for row in shop.judge()["gates"] if row["name"] == "records"]
    assert row["passed"] is False and "dvc.lock has no record of it" in row["why"]


def test_a_champions_answers_that_were_rewritten_let_no_heir_through(shop):
    store = shop.store()
    store.promote(shop.candidate(0.8), "Ada", "")
    path = store.fetch(1) / "answers.npz"
    with np.load(path) as saved:
        answers = dict(saved)
    np.savez(path, **answers | {"outputs": np.roll(answers["outputs"], 1, axis=1)})
    number = shop.candidate(0.6, 2)
    blessing = store.blessing(number)
    failed = {row["name"]: row["why"] for row in blessing["gates"] if not row["passed"]}
    assert failed.keys() == {"against the champion", "slices against the champion"}
    assert "answers.npz was changed since it was blessed" in failed["against the champion"]
    np.savez(path, **answers)  # the same answers, in a file of other bytes
    (row,) = [row for row in shop.judge()["gates"] if row["name"] == "against the champion"]
    assert row["value"] == pytest.approx(-0.2, abs=0.005)


def test_one_that_was_trained_on_test_faces(shop):
    number = shop.candidate(0.7)
    for how in ("a face", "a person"):
        if how == "a face":
            ids = np.load("data/augment/emotion/train/ids.npy")
            np.save("data/augment/emotion/train/ids.npy", [*ids, "test-0-3"])
        else:
            shop.module.write_data()
            index = pd.read_parquet("data/split/folder/index.parquet")
            index.loc[index["id"] == "val-0-1", "group"] = "test-0-5"  # who is on that one
            index.to_parquet("data/split/folder/index.parquet")
        failed = [row for row in shop.judge()["gates"] if not row["passed"]]
        assert [(row["name"], row["value"]) for row in failed] == [("unseen faces", 1)]
    with pytest.raises(GrimaceError, match="not blessed: it fails unseen faces"):
        shop.store().promote(number, "Eve", "")


def test_an_older_version_is_refused(shop):
    store = shop.store()
    older = shop.candidate(0.7)
    newer = shop.candidate(0.8, 2)
    assert store.blessing(newer)["champion"] is None
    store.promote(newer, "Ada", "")
    with pytest.raises(GrimaceError, match=r"older than the champion.*only a rollback"):
        store.promote(older, "Eve", "")
    with pytest.raises(GrimaceError, match="never was champion"):
        store.rollback(older, "Eve", "")


def test_a_blessing_against_another_champion_is_refused(shop):
    store = shop.store()
    store.promote(shop.candidate(0.5), "Ada", "")
    late = shop.candidate(0.7, 2)  # judged against version 1
    soon = shop.candidate(0.9, 3)
    with pytest.raises(GrimaceError, match="older"):
        store.promote(soon, "Ada", "") and store.promote(late, "Eve", "")
    store.rollback(1, "Ada", "")
    last = shop.candidate(0.6, 4)
    store.rollback(soon, "Ada", "")
    with pytest.raises(
        GrimaceError, match=r"judged against version 1, and now version 3 is; judge"
    ):
        store.promote(last, "Eve", "")


@pytest.mark.parametrize("how", ["alias", "version", "files"])
def test_a_champion_that_vanished_is_no_first_champion(shop, how):
    store = shop.store()
    store.promote(shop.candidate(0.5), "Ada", "")
    match how:
        case "alias":
            store.client.delete_registered_model_alias(store.name, "champion")
        case "version":
            store.client.delete_model_version(store.name, "1")
        case "files":
            shutil.rmtree(store.fetch(1))
    number = shop.candidate(0.9, 2)
    blessing = store.blessing(number)
    failed = {row["name"]: row["why"] for row in blessing["gates"] if not row["passed"]}
    assert failed.keys() == {"against the champion", "slices against the champion"}
    assert "the champion is lost" in failed["against the champion"]
    with pytest.raises(GrimaceError):
        store.promote(number, "Eve", "")
    # Not even with both gates signed for.
    gates = [{"task": "emotion", "gate": name, "who": "Eve"} for name in failed]
    signed = [
        gate | {"candidate": blessing["sha256"][:12], "reason": "who needs a champion"}
        for gate in gates
    ]
    shop.change_params(lambda values: values["gate"].update(overrides=signed))
    assert shop.judge()["blessed"] is True
    with pytest.raises(GrimaceError):
        store.promote(number, "Eve", "")
    if how == "alias":
        store.rollback(1, "Ada", "the alias was deleted")
        assert store.champion() == 1
        assert [(e.action, e.before, e.after) for e in store.moves()] == [
            ("promote", None, 1),
            ("rollback", None, 1),
        ]


def test_one_made_champion_while_it_was_judged_again_keeps_its_blessing(shop, monkeypatch):
    store = shop.store()
    number = shop.candidate(0.7)
    read_champion = gate.read_champion

    def meanwhile(*args: Any) -> Any:
        found = read_champion(*args)
        shop.store().promote(number, "Ada", "from elsewhere")
        return found

    monkeypatch.setattr(gate, "read_champion", meanwhile)
    shop.change_params(lambda values: values["gate"]["emotion"]["mib"].update(default=1e-6))
    with pytest.raises(GrimaceError, match="made champion while it was judged again"):
        shop.judge()
    assert store.blessing(number)["blessed"] is True
    check_whole(store, number)


def test_an_override_lands_in_the_audit_trail(shop):
    store = shop.store()
    shop.candidate(0.7)
    shop.change_params(lambda values: values["gate"]["emotion"]["mib"].update(default=1e-6))
    blessing = shop.judge()
    (failed,) = [row["name"] for row in blessing["gates"] if not row["passed"]]
    override = {
        "task": "emotion",
        "gate": failed,
        "candidate": blessing["sha256"][:16],
        "who": "Ada",
        "reason": "the app has room for it",
    }
    shop.change_params(lambda values: values["gate"].update(overrides=[override]))
    shop.judge()
    store.promote(1, "Bob", "go")
    (event,) = store.moves()
    assert event.overrides == [{"gate": failed, "who": "Ada", "reason": "the app has room for it"}]


def test_a_champion_measured_on_other_faces_is_measured_anew(shop, monkeypatch):
    store = shop.store()
    store.promote(shop.candidate(0.6), "Ada", "")
    shop.module.write_data(seed=5)  # the same number of faces, other ones

    class Model:
        input_shape = (16, 16, 1)

        def __init__(self, path: Path) -> None:
            assert path.read_bytes() == (store.fetch(1) / registry.MODEL).read_bytes()

        def __enter__(self) -> "Model":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def predict(self, images: np.ndarray) -> np.ndarray:
            assert images.shape == (240, 16, 16, 1)
            return np.full((240, 7), 1 / 7, np.float32)  # right on every seventh

    # Whatever the candidate is cropped by, the champion is asked in its own way.
    asked: list[float] = []

    def noting(name: TaskName, task: Task, side: str) -> Faces:
        asked.append(task.margin)
        return faces_of_side(name, task, side)

    own = load_params().tasks.emotion.margin
    monkeypatch.setattr("pipelines.runtimes.load", Model)
    monkeypatch.setattr(gate, "faces_of_side", noting)
    shop.change_params(lambda values: values["tasks"]["emotion"].update(margin=0.4))
    shop.candidate(0.8, 2)
    assert asked == [0.4, own]
    (row,) = [row for row in store.blessing(2)["gates"] if row["name"] == "against the champion"]
    right = np.load("reports/verify/emotion/predictions.npz")["outputs"].argmax(1)
    gain = (right == np.arange(240) % 7).mean() - np.mean(np.arange(240) % 7 == 0)
    assert row["value"] == pytest.approx(gain)


def test_one_that_was_begun_and_judged_anew_is_no_way_back(shop):
    """Its promotion was cut short before the alias moved."""
    store, number = shop.store(), shop.candidate(0.7)
    begun = registry.Event("promote", None, number, "Ada", "now", "cut short", [])
    store.client.set_registered_model_tag(
        store.name, f"{registry.AUDIT}00001-abc", registry.entry(begun)
    )
    assert store.champion() is None  # and no lost one: others can be judged and promoted
    shop.change_params(lambda values: values["gate"]["emotion"]["mib"].update(default=1e-6))
    assert shop.judge()["blessed"] is False
    with pytest.raises(GrimaceError, match="version 1 is not blessed"):
        store.rollback(number, "Eve", "")
    shop.change_params(lambda values: values["gate"]["emotion"]["mib"].update(default=25))
    other = shop.candidate(0.8, 2)
    assert store.blessing(other)["champion"] is None
    store.promote(other, "Ada", "")
    assert [move.after for move in store.moves()] == [other]


# Killed at every step


def killed_at(step: int, work: Callable[[], Any]) -> bool:
    """Do the work in a process that is killed when it sets about its write number `step`.

    Returns:
        Whether it came so far.
    """

    def target() -> None:
        done = 0
        for name in WRITES:
            original = getattr(mlflow.MlflowClient, name)

            def counted(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
                nonlocal done
                done += 1
                if done == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return _original(*args, **kwargs)

            setattr(mlflow.MlflowClient, name, counted)
        work()
        os._exit(0)  # not by Prefect's handlers: the threads they wait for are not in a fork

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def copies(shop, number: int) -> None:
    """Go on in a copy of the store as it is now, at an address that nobody has open."""
    source = shop.root / "before.db"
    target = shop.root / f"copy-{number}.db"
    shutil.copy(source, target)
    shop.change_params(lambda values: values["tracking"].update(uri=f"sqlite:///{target}"))
    os.environ.pop("MLFLOW_TRACKING_URI", None)


def check_whole(store: Registry, number: int) -> None:
    blessing = store.blessing(number)
    assert blessing["blessed"]
    store.check_bytes(number, blessing)


def test_promotion_killed_at_every_step(shop):
    store = shop.store()
    store.promote(shop.candidate(0.5), "Ada", "")
    shop.candidate(0.7, 2)
    shutil.copy("mlflow.db", "before.db")
    ends, step = [], 0
    while True:
        step += 1
        copies(shop, step)
        if not killed_at(step, lambda: shop.store().promote(2, "Ada", "killed")):
            break
        store = shop.store()
        champion = store.champion()
        ends.append(champion)
        check_whole(store, champion)
        assert [e.after for e in store.moves()] == [1, 2][:champion]
        assert store.before(champion) == (None if champion == 1 else 1)
        assert store.aliases() == {"candidate": 2, "champion": champion}  # `previous` lags
        # The way back is open, and said again it comes to its end.
        store.promote(2, "Ada", "again")
        assert store.aliases() == {"candidate": 2, "champion": 2, "previous": 1}
        assert [e.after for e in store.moves()] == [1, 2]
        store.rollback(None, "Ada", "")
        assert store.champion() == 1
    assert ends == [1, 1, 2]  # before each of the trail, `champion`, `previous`
    assert shop.store().champion() == 2


def test_rollback_killed_at_every_step(shop):
    store = shop.store()
    for number, right in enumerate((0.5, 0.7, 0.9), 1):
        store.promote(shop.candidate(right, number), "Ada", "")
    shutil.copy("mlflow.db", "before.db")
    ends, step = [], 0
    while True:
        step += 1
        copies(shop, step)
        if not killed_at(step, lambda: shop.store().rollback(2, "Ada", "killed")):
            break
        store = shop.store()
        ends.append(store.champion())
        check_whole(store, store.champion())
        assert [e.after for e in store.moves()] == [1, 2, 3] + [2] * (ends[-1] == 2)
        assert store.aliases()["previous"] == 2  # as before, until the next says anything
        if ends[-1] == 3:
            store.rollback(2, "Ada", "again")
        else:
            with pytest.raises(GrimaceError, match="version 2 is the champion"):
                store.rollback(2, "Ada", "again")
        assert store.aliases() == {"candidate": 3, "champion": 2, "previous": 1}
        assert [e.after for e in store.moves()] == [1, 2, 3, 2]
    assert ends == [3, 3, 2]
    assert shop.store().champion() == 2


def test_registration_and_blessing_killed_at_every_step(shop):
    shutil.copy("mlflow.db", "before.db")
    shop.produce(0.7)

    def work() -> None:
        shop.register()
        shop.judge()

    step = 0
    while True:
        step += 1
        copies(shop, step)
        if not killed_at(step, work):
            break
        store = shop.store()
        for version in store.versions():  # none, or one that is whole but for its blessing
            folder = store.fetch(int(version.version))
            assert (folder / "bundles/tflite/int8.tflite").exists()
            assert (folder / "lineage/code.json").exists()
            with pytest.raises(GrimaceError, match="not judged yet"):
                store.promote(int(version.version), "Eve", "")
        work()
        assert [int(v.version) for v in store.versions()] == [1]
        store.promote(1, "Ada", "")
        check_whole(store, 1)
    assert step > 6
