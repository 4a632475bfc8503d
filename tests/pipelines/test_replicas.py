"""Several devices, and several processes, against one: under JAX, each in processes of its own."""

import csv
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipelines.batches import Batches, training_batches
from pipelines.cli import GrimaceError
from pipelines.job import Job, write_job
from pipelines.replicas import Replicas, replicas_of
from pipelines.shards import View

ROOT = Path(__file__).parents[2]
TRAIN, VAL = 40, 15  # validation cannot be dealt out evenly to two

JOB = Job(
    task="emotion",
    model="plain",
    widths=(4,),
    dropout=0.3,
    loss="cross_entropy",
    label_smoothing=0.05,
    optimizer="sgd",
    learning_rate=0.05,
    weight_decay=0.01,
    clip_norm=1.0,
    ema=0.9,
    mixup=0.2,
    erase=0.3,
    batch=8,
    epochs=3,
    seed=1,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright images are happy, dark ones sad; they do not all weigh the same."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(1)
    for side, number in (("train", TRAIN), ("val", VAL)):
        (folder / side).mkdir()
        emotions = np.where(np.arange(number) % 2, 3, 5)
        images = (
            rng.integers(0, 100, (number, 16, 16, 1)) + 100 * (emotions == 3)[:, None, None, None]
        )
        np.save(folder / side / "ids.npy", np.arange(number).astype(str))
        np.save(folder / side / "weights.npy", rng.uniform(0.5, 1, number).astype(np.float32))
        np.save(folder / side / "emotions.npy", emotions)
        np.save(folder / side / "images-00.npy", images.astype(np.uint8))
    meta = {"task": "emotion", "size": 16, "channels": 1, "views": 1}
    (folder / "meta.json").write_text(json.dumps(meta | {"counts": {"train": TRAIN, "val": VAL}}))
    return folder


@pytest.fixture(scope="module")
def jax(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine without TensorFlow, and with two devices."""
    blocked = tmp_path_factory.mktemp("blocked")
    for package in ("tensorflow", "mlflow", "dvc", "prefect"):
        (blocked / f"{package}.py").write_text("raise ImportError('not on this machine')\n")
    return os.environ | {
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": f"{blocked}:{ROOT}",
    }


def trained(job: Path, shards: Path, out: Path, jax: dict[str, str], devices: int) -> None:
    command = ["-m", "pipelines.fit", "--job", job, "--shards", shards, "--out", out]
    ended = subprocess.run(
        [sys.executable, *command, "--devices", str(devices)],
        cwd=ROOT,
        env=jax,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def alone(shards: Path, jax: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one device makes of the job."""
    folder = tmp_path_factory.mktemp("alone")
    write_job(JOB, folder / "wish.json")
    trained(folder / "wish.json", shards, folder, jax, devices=1)
    return folder


def figures(folder: Path) -> list[dict[str, float]]:
    rows = list(csv.DictReader((folder / "history.csv").open()))
    clock = ("images_per_second", "seconds")
    return [{n: float(row[n]) for n in row if n not in clock} for row in rows]


def state(folder: Path) -> dict[str, np.ndarray]:
    """Every number of the last checkpoint and of the result."""
    with zipfile.ZipFile(folder / "model.keras") as archive:
        result = BytesIO(archive.read("model.weights.h5"))
    (last,) = (folder / "checkpoint").glob("epoch-*.weights.h5")
    found: dict[str, np.ndarray] = {}
    for file, source in (("last", last), ("result", result)):
        with h5py.File(source) as content:

            def note(name: str, item: object, file: str = file) -> None:
                if isinstance(item, h5py.Dataset):
                    found[f"{file} {name}"] = item[()]

            content.visititems(note)
    return found


def assert_same_training(one: Path, other: Path) -> None:
    """As far as the order of floating-point sums goes."""
    for mine, theirs in zip(figures(one), figures(other), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    first, second = state(one), state(other)
    assert first.keys() == second.keys() and len(first) > 40
    for name, array in first.items():
        np.testing.assert_allclose(array, second[name], rtol=2e-3, atol=2e-4, err_msg=name)


def test_two_devices_train_as_one(
    alone: Path, shards: Path, jax: dict[str, str], tmp_path: Path
) -> None:
    trained(alone / "wish.json", shards, tmp_path, jax, devices=2)
    assert_same_training(tmp_path, alone)
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert (machine["backend"], machine["replicas"], machine["processes"]) == ("jax", "2", "1")
    assert json.loads((alone / "machine.json").read_text())["replicas"] == "1"


# several processes

JOINED = """
import json, sys, time
from pathlib import Path
import jax, keras, numpy as np
from pipelines import fit
from pipelines.job import read_job

job, shards, out, address, process = sys.argv[1:]
keras.utils.set_random_seed(1)
keras.distribution.initialize(address, 2, int(process))
assert jax.process_count() == 2 and jax.local_device_count() == 1
kept, real = [], keras.Model.fit

def watched(model, *arguments, **options):
    kept[:] = [model]
    return real(model, *arguments, **options)

keras.Model.fit = watched
out = Path(out)
save, load, saved = keras.Model.save_weights, keras.Model.load_weights, []

def slow_save(model, path):
    time.sleep(0.5)  # the other one must wait for it
    save(model, path)

def load_noting(model, path):
    saved.append(len(json.loads((out / "checkpoint/state.json").read_text())["history"]))
    load(model, path)

keras.Model.save_weights, keras.Model.load_weights = slow_save, load_noting
rows = []
note = lambda epoch, row: rows.append((epoch, row))
fit.fit(read_job(Path(job)), Path(shards), out, out / "checkpoint", note, devices=0)
assert [epoch for epoch, _ in rows] == [0, 1, 2]
assert saved == [3]  # the best is loaded when the last epoch is saved
(model,) = kept
variables = enumerate([*model.variables, *model.optimizer.variables])
here = {str(number): variable.value.addressable_data(0) for number, variable in variables}
np.savez(out / f"process-{process}.npz", **here)
jax.distributed.shutdown()
"""

OWN_NETWORK = """
import fcntl, socket, struct, subprocess, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    request = struct.pack("16sh", b"lo", 1)  # IFF_UP
    fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS
both = [subprocess.Popen([sys.executable, *sys.argv[1:], number]) for number in "01"]
sys.exit(max(process.wait() for process in both))
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_two_processes_train_as_one_and_have_the_same_weights(
    alone: Path, shards: Path, jax: dict[str, str], tmp_path: Path
) -> None:
    """In a network of their own, because the first listens on all interfaces."""
    own = ["unshare", "--net", "--pid", "--fork", "--kill-child"]
    if os.getuid():
        own.append("--map-root-user")
    if subprocess.run([*own, "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not make name spaces")
    (tmp_path / "both.py").write_text(OWN_NETWORK)
    (tmp_path / "joined.py").write_text(JOINED)
    out = tmp_path / "out"
    arguments = [alone / "wish.json", shards, out, "127.0.0.1:29500"]
    ended = subprocess.run(
        [*own, sys.executable, tmp_path / "both.py", tmp_path / "joined.py", *arguments],
        cwd=ROOT,
        env=jax | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("epoch 2/3") == 1  # one of them speaks
    assert_same_training(out, alone)
    machine = json.loads((out / "machine.json").read_text())
    assert (machine["replicas"], machine["processes"]) == ("2", "2")
    first, second = (np.load(out / f"process-{process}.npz") for process in (0, 1))
    assert first.files == second.files and len(first.files) > 20
    for name in first.files:  # weights, statistics of batch normalisation, the optimiser's
        np.testing.assert_array_equal(first[name], second[name])


# whose images are whose


def a_view(number: int) -> View:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (number, 16, 16, 1)).astype(np.uint8)
    weights = rng.uniform(0.5, 1, number).astype(np.float32)
    return View(
        np.arange(number).astype(str), weights, images, rng.integers(0, 7, number), None, None
    )


@pytest.mark.parametrize("job", [JOB, replace(JOB, mixup=0.0, erase=0.0)], ids=["mixed", "plain"])
def test_the_parts_of_a_batch_are_the_batch(job: Job) -> None:
    view = a_view(40)
    whole = training_batches(job, view, 3, None)
    parts = [training_batches(job, view, 3, None, Replicas(4, 2, process)) for process in (0, 1)]
    assert [len(part) for part in parts] == [len(whole)] * 2
    for index in range(len(whole)):
        for both, items in zip(
            whole[index], zip(*(p[index] for p in parts), strict=True), strict=True
        ):
            assert len(items[0]) == len(items[1]) == 4
            np.testing.assert_array_equal(np.concatenate(items), both)


def test_what_cannot_be_dealt_out_evenly_waits_for_another_epoch() -> None:
    orders = [
        training_batches(JOB, a_view(39), epoch, None, Replicas(4)).order for epoch in range(9)
    ]
    assert {len(order) for order in orders} == {36}
    assert set(np.concatenate(orders)) == set(range(39))
    (images, *_) = Batches(a_view(39), 8, orders[0], replicas=Replicas(4, 2, 1))[4]
    assert len(images) == 2


def test_several_devices_need_jax() -> None:
    with pytest.raises(GrimaceError, match=r"devices is 2, but .* tensorflow: .*KERAS_BACKEND=jax"):
        replicas_of(2, 8)
    assert replicas_of(1, 7) == Replicas()


IMPOSSIBLE = """
from pipelines.cli import GrimaceError
from pipelines.replicas import replicas_of
for devices, batch in ((3, 9), (2, 7)):
    try:
        replicas_of(devices, batch)
    except GrimaceError as error:
        print(error)
print(replicas_of(0, 8).devices)
"""


def test_devices_that_are_not_there_and_batches_that_do_not_fit(jax: dict[str, str]) -> None:
    said = subprocess.check_output([sys.executable, "-c", IMPOSSIBLE], cwd=ROOT, env=jax, text=True)
    many, uneven, all_of_them = said.splitlines()
    assert many.startswith("devices is 3, but JAX sees 2")
    assert uneven.startswith("batch 7 cannot be dealt out evenly to 2 devices")
    assert all_of_them == "2"
