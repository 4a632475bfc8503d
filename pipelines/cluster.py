"""One training on several machines: Ray Train places, watches and restarts its workers.

A worker is a process with devices of its own. `jax.distributed` joins them all, and each runs
`pipelines.fit` on its part of every batch. When one dies, Ray ends the others, which would wait for
it, and starts the group again, which goes on from the last checkpoint. The repository, shards,
checkpoint and result lie on a disk that all machines share under the same path.
"""

import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

from pipelines.checkpoint import saved_history
from pipelines.cli import GrimaceError
from pipelines.fanout import ray_cluster
from pipelines.job import Job, job_of, plain

POLL = 1.0  # seconds between looks at the checkpoint
WAITING = 30.0  # seconds without workers, after which it is said what they wait for
GIVE_UP = 10  # starts in vain, for want of machines; Ray waits a minute for each
STARTS = "starts.txt"  # in it: a line for each start of the workers


def fit_on_cluster(
    job: Job,
    shards: Path,
    out: Path,
    checkpoint: Path,
    on_epoch: Any,
    address: str,
    workers: int,
    devices: int,
    restarts: int,
) -> None:
    """Do what `pipelines.fit.fit` does, with several workers on a Ray cluster.

    Args:
        job: what to train; its batch is dealt out to all workers.
        shards: as there, on the shared disk, as all that follows.
        out: as there.
        checkpoint: as there.
        on_epoch: as there; called here, within seconds.
        address: of the cluster: HOST:PORT from one of its machines, ray://HOST:PORT from elsewhere.
        workers: how many.
        devices: GPUs of each, where the cluster has any; else a worker has one CPU device.
        restarts: of the group; after so many the next failure ends it.

    Raises:
        GrimaceError: as there; or the cluster cannot be used, or workers failed again and again.
    """
    from pipelines.fit import told

    paths = {"shards": shards, "out": out, "checkpoint": checkpoint}
    order = {
        "job": plain(job),
        "root": str(Path.cwd()),  # from which the job names teachers and weights
        "paths": {name: str(path.absolute()) for name, path in paths.items()},
        "workers": workers,
        "devices": devices,
        "restarts": restarts,
    }
    checkpoint.mkdir(parents=True, exist_ok=True)
    starts = checkpoint / STARTS
    starts.unlink(missing_ok=True)
    seen, epochs, told_at = 0, 0, time.monotonic()
    with ray_cluster(address):
        import ray

        # A task on the cluster, because from elsewhere Ray Train cannot be started.
        supervisor: Any = ray.remote(num_cpus=0, max_retries=0)(_supervise)
        ended = supervisor.remote(order)
        done: list[Any] = []
        while not done:
            done, _ = ray.wait([ended], timeout=POLL)
            lines = starts.read_text().splitlines() if starts.exists() else []
            for line in lines[seen:]:
                print(line, flush=True)
            seen = len(lines)
            if not seen and time.monotonic() - told_at > WAITING:
                told_at = time.monotonic()
                there = _amounts(ray.cluster_resources())
                print(f"waiting for {workers} workers; the cluster has {there}", flush=True)
            for row in saved_history(job, checkpoint)[epochs:]:
                print(told(job, epochs, row), flush=True)
                on_epoch(epochs, row)
                epochs += 1
        try:
            refused = ray.get(ended)
        except ray.exceptions.RayError as error:
            reason = _reason(str(error))
            raise GrimaceError(
                f"training {job.name} on the Ray cluster at {address} failed after {seen} starts "
                f"of its workers (train.restarts is {restarts}); the last time: {reason}. Logs of "
                "its workers are in /tmp/ray/session_latest/logs on their machines. The state "
                f"after epoch {epochs} is kept in {checkpoint}; the same command goes on from it."
            ) from None
    if refused:
        raise GrimaceError(refused)


def _supervise(order: dict[str, Any]) -> str | None:
    """Run the group of workers to its end; return what all of them refused to do, if anything."""
    import ray
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    gpus = ray.cluster_resources().get("GPU", 0) > 0
    resources = {"CPU": 1} | ({"GPU": order["devices"]} if gpus else {})
    variables = {"KERAS_BACKEND": "jax", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    settings: Any = RunConfig(
        storage_path=order["paths"]["checkpoint"] + "/ray",
        failure_config=FailureConfig(
            max_failures=order["restarts"], controller_failure_limit=GIVE_UP
        ),
        worker_runtime_env={"env_vars": variables | ({} if gpus else {"JAX_PLATFORMS": "cpu"})},
    )
    # Not Ray's JaxTrainer: on CPUs it does not join the workers, each of which would then train
    # alone and say nothing, and with GPUs it gives two workers of one machine the same ones.
    trainer = DataParallelTrainer(
        _work,
        train_loop_config=order,
        scaling_config=ScalingConfig(
            num_workers=order["workers"],
            use_gpu=gpus,
            resources_per_worker=resources,
            placement_strategy="PACK" if gpus else "SPREAD",
        ),
        run_config=settings,
    )
    result: Any = trainer.fit()
    refused: str | None = result.return_value  # of the first
    return refused


def _work(order: dict[str, Any]) -> str | None:
    """Train as one of the workers; return what all of them refuse alike, if anything.

    What one alone may meet is raised instead: then the others wait for it, and have to be ended.
    """
    import jax
    import keras
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    from pipelines.fit import OutOfMemoryError, fit

    job, root = job_of(order["job"]), Path(order["root"])
    shards, out, checkpoint = (Path(order["paths"][n]) for n in ("shards", "out", "checkpoint"))
    if not all(path.exists() for path in (root, shards / "meta.json", out)):
        raise FileNotFoundError(
            f"{root}, {shards} or {out} is not there on {socket.gethostname()}: all machines of "
            "the cluster must share the disk that they are on, under the same path"
        )
    os.chdir(root)  # Ray starts workers in folders of its own
    rank, workers = get_context().get_world_rank(), get_context().get_world_size()
    address = broadcast_from_rank_zero(_free_address() if rank == 0 else None)
    # Where TensorFlow is installed, Keras would load it here, which takes long, just to seed it.
    sys.modules["tensorflow"] = None  # type: ignore[assignment]
    keras.utils.set_random_seed(job.seed)
    del sys.modules["tensorflow"]
    keras.distribution.initialize(address, workers, rank)
    if jax.process_count() != workers:
        raise RuntimeError(f"{jax.process_count()} of {workers} workers have joined")
    if rank == 0:
        done = len(saved_history(job, checkpoint))
        with (checkpoint / STARTS).open("a") as file:
            file.write(f"{workers} workers, the first on {address}, begin after epoch {done}\n")
    try:
        fit(job, shards, out, checkpoint, devices=0)
    except OutOfMemoryError:
        raise
    except GrimaceError as error:
        return str(error)
    jax.distributed.shutdown()
    return None


def _reason(error: str) -> str:
    """Return the line of an error's text, tracebacks and all, that names the last exception."""
    lines = error.strip().splitlines()
    return ([line for line in lines if re.match(r"[\w.]*(Error|Exception):", line)] or lines)[-1]


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))


def _free_address() -> str:
    """Return an address of this machine on which nobody listens."""
    from ray.util import get_node_ip_address

    with socket.socket() as free:
        free.bind(("", 0))
        return f"{get_node_ip_address()}:{free.getsockname()[1]}"
