import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import keras
import numpy as np
import pandas as pd
import pytest
import yaml

from pipelines.cluster import _reason
from pipelines.job import sha256

ROOT = Path(__file__).parents[2]
EPOCHS = 8
SETTINGS = {
    "widths": [4],
    "dropout": 0.3,
    "batch": 8,
    "learning_rate": 0.05,
    "epochs": EPOCHS,
    "by_dataset": {},
    "precision": "float32",
}

CLUSTER = """
import fcntl, json, socket, struct, sys, time
from pathlib import Path
from threading import Thread
import psutil
from ray.cluster_utils import Cluster
from pipelines import train
from pipelines.cli import run

def raise_loopback():
    request = struct.pack("16sh", b"lo", 1)  # IFF_UP
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS

def workers():
    named = ((p, (p.info["cmdline"] or [""])[0]) for p in psutil.process_iter(["cmdline"]))
    return [process for process, name in named if "RayTrainWorker" in name]

def kill_one_at_work(killed):
    "The first that was started, after three epochs."
    while True:
        for state in Path("checkpoints").glob("*/state.json"):
            done = len(json.loads(state.read_text())["history"])
            if done >= 3 and len(workers()) == 2:
                workers()[0].kill()
                killed.append(done)
                return
        time.sleep(0.02)

def main():
    raise_loopback()
    cluster = Cluster(True, head_node_args={"num_cpus": 2, "object_store_memory": 2**27})
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("ADDRESS", cluster.address))
    killed = []
    Thread(target=kill_one_at_work, args=[killed], daemon=True).start()
    sys.argv = ["train", "--job", "emotion-plain"]
    train.main()
    print(json.dumps({"killed after": killed}))

if __name__ == "__main__":
    run(main)
"""


def prepare(root: Path, workers: int) -> Path:
    """A folder with params and shards; return the shards."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["tasks"]["emotion"] |= {"dataset": "synthetic", "size": 16, "channels": 1}
    values["tracking"]["uri"] = "sqlite:///mlflow.db"
    values["train"] |= {"workers": workers, "restarts": 1}
    inputs = keras.Input((16, 16, 1))
    answers = keras.layers.Dense(7, activation="softmax")(keras.layers.Flatten()(inputs))
    keras.Model(inputs, answers).save(root / "teacher.keras")
    taught = {"path": "teacher.keras", "sha256": sha256(root / "teacher.keras")}  # from the root
    values["train"]["jobs"]["emotion-plain"] |= SETTINGS | {"teachers": [taught]}
    values["cluster"]["address"] = "ADDRESS:1"
    text = yaml.safe_dump(values).replace("ADDRESS:1", "ADDRESS")
    (root / "params.yaml").write_text(text)
    shards, rng = root / "data/augment/emotion", np.random.default_rng(1)
    for side, number in (("train", 40), ("val", 16)):
        (shards / side).mkdir(parents=True)
        emotions = np.where(np.arange(number) % 2, 3, 5)
        bright = 100 * (emotions == 3)[:, None, None, None]
        images = rng.integers(0, 100, (number, 16, 16, 1)) + bright
        np.save(shards / side / "ids.npy", np.arange(number).astype(str))
        np.save(shards / side / "emotions.npy", emotions)
        np.save(shards / side / "images-00.npy", images.astype(np.uint8))
    meta = {"task": "emotion", "dataset": "synthetic", "size": 16, "channels": 1, "views": 1}
    (shards / "meta.json").write_text(json.dumps(meta | {"counts": {"train": 40, "val": 16}}))
    return shards


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_two_workers_one_killed_end_as_one_undisturbed(tmp_path: Path) -> None:
    """In name spaces of their own: Ray listens on all interfaces, and all of it must end here."""
    shards = prepare(tmp_path, workers=2)
    (tmp_path / "cluster.py").write_text(CLUSTER)
    own = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.getuid():
        own.append("--map-root-user")
    if subprocess.run([*own, "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not make name spaces")
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as sockets:  # whose paths must be short
        ray = {"RAY_TMPDIR": sockets, "RAY_USAGE_STATS_ENABLED": "0"}
        ended = subprocess.run(
            [*own, sys.executable, "cluster.py"],
            cwd=tmp_path,
            env=os.environ
            | ray
            | {"PYTHONPATH": str(ROOT), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    (killed,) = json.loads(ended.stdout.splitlines()[-1])["killed after"]
    starts = [line for line in ended.stdout.splitlines() if line.startswith("2 workers, the first")]
    first, second = (int(line.split()[-1]) for line in starts)
    assert first == 0 and second in (killed, killed + 1)  # one more may have ended before the kill
    assert sum(line.startswith("epoch ") for line in ended.stdout.splitlines()) == EPOCHS

    came = tmp_path / "runs/emotion/plain"
    machine = json.loads((came / "machine.json").read_text())
    assert (machine["backend"], machine["processes"]) == ("jax", "2")
    alone = tmp_path / "alone"
    command = [sys.executable, "-m", "pipelines.fit", "--job", came / "job.json"]
    jax = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [*command, "--shards", shards, "--out", alone],
        cwd=tmp_path,
        env=os.environ | jax | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    mine, single = (pd.read_csv(folder / "history.csv") for folder in (came, alone))
    assert list(mine["epoch"]) == list(range(1, EPOCHS + 1))
    columns = [name for name in single if name not in ("images_per_second", "seconds")]
    np.testing.assert_allclose(mine[columns], single[columns], rtol=1e-3, atol=1e-5)
    models = [keras.models.load_model(folder / "model.keras") for folder in (came, alone)]
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4)


def test_the_reason_that_is_told_is_the_last_one() -> None:
    told = """ray::_supervise() (pid=7)
ray.train.WorkerGroupError: Training failed due to worker errors:
[Rank 1 Error Snippet]:
Traceback (most recent call last):
jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory
The above exception was the direct cause of the following exception:
pipelines.fit.OutOfMemoryError: training emotion-plain: out of memory. Make batch smaller (now 64)
"""
    assert _reason(told).endswith("out of memory. Make batch smaller (now 64)")
    assert _reason("Killed\n") == "Killed"
