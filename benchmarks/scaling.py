"""How training should scale over machines: a model whose terms are measured here.

    python -m benchmarks.scaling --publish
    python -m benchmarks.scaling --predict --bandwidth 25 --latency 20 --faster 100

A step of N workers takes

    t(N) = c0 + c1 · B / N  +  K · 2 · ⌈log2 N⌉ · latency  +  2 · (N - 1) / N · bytes / bandwidth

B being the images of a step over all workers, c0 and c1 the time that one worker computes a step
and an image, K the number of collective operations of a step and `bytes` what they carry: gradients
and, because batch normalisation is over the whole batch, its statistics, forwards and backwards.
The two last terms are those of a tree for what is short and a ring for what is long (Thakur,
Rabenseifner and Gropp 2005), nothing of which is hidden behind computing.

Measured are c0 and c1 (one process on one core), K and bytes (read off the compiled step), the time
of an all-reduce between two processes on this machine against its bytes, and, to hold the model
against, the step of these two. Bandwidth and latency of another network are given, not measured,
and so is how much faster a worker there computes than one core here.
"""

import argparse
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.publication import others_share, show
from pipelines.cli import GrimaceError, run
from pipelines.job import Job

OUT = Path("docs/results/scaling")
SIZE, CHANNELS = 48, 1
BATCHES = (8, 16, 32, 64)  # images of a step of one worker
TOGETHER = (16, 32, 64)  # of a step of two
MESSAGES = tuple(4 * 4**power for power in range(12))  # bytes, 4 to 16 Mi
WARM_UPS, STEPS, EXCHANGES = 2, 7, 30
WORKERS = (1, 2, 8, 64, 512)
SHARE = 64  # images a worker has, where the batch grows with their number
FIXED = 4096  # images of a step, where it does not
ELEMENT = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


@dataclass(frozen=True)
class Costs:
    """What one worker computes, and what a step exchanges.

    Attributes:
        step: seconds a step, whatever its images.
        image: seconds an image.
        collectives: operations a step.
        bytes: that they carry.
    """

    step: float
    image: float
    collectives: int
    bytes: int


@dataclass(frozen=True)
class Network:
    """Between the workers: seconds that a message takes, and bytes a second."""

    latency: float
    bandwidth: float


def main() -> None:
    """Measure all, or take what was published; print the page, and publish it when asked."""
    args = _arguments()
    if args.measure:
        print(json.dumps(MEASURE[args.measure](args)))
        return
    if args.predict:
        published = OUT / "results.json"
        if not published.exists():
            raise GrimaceError(f"{published} is missing: run `python -m benchmarks.scaling`")
        results = json.loads(published.read_text())
    else:
        results = measure_all(args)
    results["networks"] = {
        "given on the command line": asdict(Network(args.latency / 1e6, args.bandwidth / 8 * 1e9)),
        **({} if args.predict else EXAMPLES),
    }
    results["faster"] = [args.faster] if args.predict else [1.0, 300.0]
    show(results, page, OUT if args.publish else None)


EXAMPLES = {
    "Ethernet, 10 Gbit/s, 50 µs": asdict(Network(50e-6, 10e9 / 8)),
    "InfiniBand, 200 Gbit/s, 3 µs": asdict(Network(3e-6, 200e9 / 8)),
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", default="emotion-compact", help="of params.yaml; task emotion")
    parser.add_argument("--publish", action="store_true", help=f"write {OUT}")
    parser.add_argument("--predict", action="store_true", help="from what was published")
    parser.add_argument("--bandwidth", type=float, default=100.0, help="Gbit/s (default: 100)")
    parser.add_argument("--latency", type=float, default=10.0, help="µs a message (default: 10)")
    parser.add_argument(
        "--faster", type=float, default=1.0, help="a worker than one core here (default: 1)"
    )
    parser.add_argument("--measure", choices=MEASURE, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--resolved", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each term in processes of its own."""
    from pipelines.job import write_job
    from pipelines.params import load_params

    jobs = load_params().train.jobs
    if args.job not in jobs or jobs[args.job].task != "emotion":
        raise GrimaceError(f"train.jobs of params.yaml has no {args.job!r} for task emotion")
    busy = others_share()
    with TemporaryDirectory() as folder:
        resolved = Path(folder, "job.json")
        write_job(jobs[args.job].resolved("default"), resolved)
        alone = _measured("compute", resolved)
        dump = Path(folder, "dump")
        devices = "--xla_force_host_platform_device_count=2"
        only = "--xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*train_step.*"
        _measured("compile", resolved, XLA_FLAGS=f"{devices} --xla_dump_to={dump} {only}")
        (text,) = dump.glob("*train_step*after_optimizations.txt")
        collectives, carried = exchanged(text.read_text())
        together = _measured("pair", resolved)
    step, image = line([int(b) for b in alone], list(alone.values()))
    latency, per_byte = line(
        [int(b) for b in together["exchange"]], list(together["exchange"].values())
    )
    return {
        "command": f"python -m benchmarks.scaling --job {args.job}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "others_share": busy,
        "job": args.job,
        "compute": alone,
        "costs": asdict(Costs(step, image, collectives, carried)),
        "exchange": together["exchange"],
        "here": asdict(Network(latency / 2, 1 / per_byte)),
        "together": together["step"],
    }


def _measured(what: str, job: Path, **variables: str) -> dict[str, Any]:
    """Run this module for one measurement, in a network of its own: JAX listens on all of them."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.scaling",
        "--measure",
        what,
        "--resolved",
        str(job),
    ]
    own = [
        "unshare",
        "--net",
        "--map-root-user",
        "sh",
        "-c",
        'ip link set lo up && exec "$@"',
        "sh",
    ]
    done = subprocess.run(
        [*own, *command], env=_jax() | variables, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise GrimaceError(f"measuring {what} failed: see above. It needs `unshare` and `ip`.")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{what}: {figures}", flush=True)
    return figures


def _jax() -> dict[str, str]:
    return os.environ | {
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }


def compute(args: argparse.Namespace) -> dict[int, float]:
    """Time steps of one process on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return step_seconds(args.resolved, BATCHES)


def compile_step(args: argparse.Namespace) -> dict[int, float]:
    """Let XLA write down the step of two devices."""
    import keras

    with keras.distribution.DataParallel(auto_shard_dataset=False).scope():
        return step_seconds(args.resolved, (16,), repeats=1)


def pair(args: argparse.Namespace) -> dict[str, Any]:
    """Time what two processes do together, each on a core of its own."""
    if len(os.sched_getaffinity(0)) < 2:
        raise GrimaceError("two processes need two cores")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.scaling", "--measure", "half"]
    command += ["--resolved", str(args.resolved), "--address", address]
    halves = [
        subprocess.Popen([*command, "--process", number], stdout=subprocess.PIPE, text=True)
        for number in "01"
    ]
    said = [half.communicate()[0] for half in halves]
    if any(half.returncode for half in halves):
        raise GrimaceError("one of two processes failed: see above")
    figures: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return figures


def half(args: argparse.Namespace) -> dict[str, Any]:
    """Be one of two processes."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[args.process]})
    import jax
    import keras

    keras.utils.set_random_seed(1)
    keras.distribution.initialize(args.address, 2, args.process)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("worker",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("worker"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    reduce = jax.jit(lambda array: array.sum(0), out_shardings=whole)
    exchange = {}
    for size in MESSAGES:
        mine = np.ones((1, size // 4), np.float32)
        array = jax.make_array_from_process_local_data(split, mine)
        exchange[size] = timed(lambda: reduce(array).block_until_ready(), EXCHANGES)  # noqa: B023
    with keras.distribution.DataParallel(auto_shard_dataset=False).scope():
        steps = step_seconds(args.resolved, TOGETHER, processes=2)
    jax.distributed.shutdown()
    return {"exchange": exchange, "step": steps}


MEASURE: dict[str, Callable[[argparse.Namespace], dict[Any, Any]]] = {
    "compute": compute,
    "compile": compile_step,
    "pair": pair,
    "half": half,
}


def step_seconds(
    resolved: Path, batches: tuple[int, ...], processes: int = 1, repeats: int = STEPS
) -> dict[int, float]:
    """Return the median seconds of a training step, by its images over all processes."""
    from models import losses
    from pipelines.fit import build
    from pipelines.job import read_job
    from pipelines.schedules import optimizer_of, phase_at

    job: Job = read_job(resolved)  # whose precision is left at float32, for CPUs
    model = build(job, {"size": SIZE, "channels": CHANNELS})
    optimizer = optimizer_of(job, phase_at(job, 0), steps=1000)
    model.compile(optimizer, losses.emotion_loss(job.loss, job.label_smoothing))
    rng, seconds = np.random.default_rng(1), {}
    for batch in batches:
        own = batch // processes
        images = rng.uniform(0, 255, (own, SIZE, SIZE, CHANNELS)).astype(np.float32)
        labels = np.eye(7, dtype=np.float32)[rng.integers(0, 7, own)]
        seconds[batch] = timed(lambda: model.train_on_batch(images, labels), repeats)  # noqa: B023
    return seconds


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds of a call, the first ones left out."""
    for _ in range(WARM_UPS):
        call()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return median(taken)


def exchanged(text: str) -> tuple[int, int]:
    """Return how many collective operations a compiled XLA module has, and the bytes they carry."""
    sizes = []
    for shapes in COLLECTIVE.findall(text):
        parts = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        sizes.append(
            sum(
                ELEMENT[kind] * math.prod(map(int, filter(None, dims.split(","))))
                for kind, dims in parts
            )
        )
    return len(sizes), sum(sizes)


def line(xs: list[int], ys: list[float]) -> tuple[float, float]:
    """Fit y = a + b · x by least squares of relative errors; return a and b, not below 0."""
    weights = 1 / np.array(ys)
    terms = np.stack([np.ones(len(xs)), np.array(xs, float)], 1)
    (a, b), *_ = np.linalg.lstsq(terms * weights[:, None], np.ones(len(xs)), rcond=None)
    return max(float(a), 0.0), max(float(b), 0.0)


def predicted(
    costs: Costs, network: Network, workers: int, batch: int, faster: float = 1.0
) -> tuple[float, float]:
    """Return the seconds that a step computes and communicates.

    Args:
        costs: of a worker, and of a step.
        network: between the workers.
        workers: how many.
        batch: images of the step, over all of them.
        faster: how many times so fast a worker computes as `costs` say.
    """
    computing = (costs.step + costs.image * batch / workers) / faster
    rounds = 2 * math.ceil(math.log2(workers))
    carrying = 2 * (workers - 1) / workers * costs.bytes / network.bandwidth
    return computing, costs.collectives * rounds * network.latency + carrying


def page(results: dict[str, Any]) -> str:
    """Write the figures as Markdown."""
    from pipelines.report import markdown

    costs, here = Costs(**results["costs"]), Network(**results["here"])
    steps: list[tuple[str, ...]] = [
        (batch, f"{1e3 * taken:.1f}", f"{1e3 * (costs.step + costs.image * int(batch)):.1f}")
        for batch, taken in results["compute"].items()
    ]
    exchange: list[tuple[str, ...]] = [
        (
            f"{int(size):,}",
            f"{1e3 * taken:.3f}",
            f"{1e3 * (2 * here.latency + int(size) / here.bandwidth):.3f}",
        )
        for size, taken in results["exchange"].items()
    ]
    check: list[tuple[str, ...]] = []
    for batch, taken in results["together"].items():
        computing, communicating = predicted(costs, here, 2, int(batch))
        check.append(
            (
                batch,
                f"{1e3 * taken:.1f}",
                f"{1e3 * (computing + communicating):.1f}",
                f"{1e3 * computing:.1f}",
                f"{1e3 * communicating:.1f}",
            )
        )
    how = (__doc__ or "").split("\n\n", 2)[2]
    return (
        f"# Scaling over machines\n\nWritten by\n\n```\n{results['command']}\n```\n\n"
        f"on {results['date']}, for the job {results['job']} in float32, images of {SIZE} × {SIZE}."
        f"\n\n{how}\n"
        "## Measured: one worker, one core, ms a step\n\n"
        f"c0 = {1e3 * costs.step:.1f} ms, c1 = {1e3 * costs.image:.2f} ms an image.\n\n"
        + markdown(steps, ("images", "measured", "c0 + c1 · images"))
        + "\n## Measured: an all-reduce between two processes, over loopback, ms\n\n"
        f"{1e6 * 2 * here.latency:.0f} µs and {here.bandwidth / 1e9:.2f} GB/s.\n\n"
        + markdown(exchange, ("bytes", "measured", "fitted"))
        + f"\n## Read off the compiled step: {costs.collectives} collective operations, "
        f"{costs.bytes / 1e6:.2f} MB\n\n## Held against it: two workers, ms a step\n\n"
        + markdown(check, ("images", "measured", "predicted", "computing", "communicating"))
        + "\n## Predicted, from assumed networks\n\nNo figure below was measured. Efficiency is "
        "images a second to as many single workers.\n" + "".join(_predictions(results, costs))
    )


def _predictions(results: dict[str, Any], costs: Costs) -> list[str]:
    from pipelines.report import markdown

    parts = []
    for faster in results["faster"]:
        for name, values in results["networks"].items():
            network, rows = Network(**values), []
            for workers in WORKERS:
                row = [f"{workers}"]
                for batch, single in ((SHARE * workers, SHARE), (FIXED, FIXED)):
                    total = sum(predicted(costs, network, workers, batch, faster))
                    speed = single / sum(predicted(costs, network, 1, single, faster))
                    row += [
                        f"{1e3 * total:.2f}",
                        f"{batch / total:,.0f}",
                        f"{batch / total / workers / speed:.0%}",
                    ]
                rows.append(tuple(row))
            facts = f"{network.bandwidth * 8 / 1e9:g} Gbit/s, {1e6 * network.latency:g} µs"
            columns = ("ms a step", "images/s", "efficiency")
            heads = ("workers", *(f"{SHARE} each: {c}" for c in columns))
            heads += tuple(f"{FIXED:,} in all: {c}" for c in columns)
            parts.append(
                f"\n### {name} ({facts}); a worker {faster:g} × one core here\n\n"
                + markdown(rows, heads)
            )
    return parts


if __name__ == "__main__":
    run(main)
