"""Export every network of the zoo in every variant, and compare each graph with Keras.

    uv run python -m benchmarks.zoo --out docs/results/zoo    # --networks emotion-vgg19 …

With `--networks` the rows of all others stay as they are in the folder.

Each network is built at the setting that its docstring gives, with random weights: ImageNet's are
not fetched, for what converters make of a layer does not depend on its values. They are scaled so
that over drawn faces each channel of each layer has mean 0 and variance 1 (as Mishkin and Matas
2016, section 3, do for layers), and batch normalisation takes its statistics from these; else an
untrained network would answer nearly the same to every face, and no fault of a graph would show.
Every graph is loaded in its runtime and asked about drawn faces that calibration has not seen. What
does not export or run, or in float32 answers otherwise than Keras does, stands in the table with
the reason. Of what rounds there is no more to ask than that it runs: untrained networks are chaotic
(Yang et al. 2019 on normalised ones), and amplify rounding as no trained one does.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from models import emotion, landmarks
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.datasets import synthetic
from pipelines.exporters import tensorrt, tfjs, tflite
from pipelines.exporters.quantisation import Calibration
from pipelines.heldout import crop_all
from pipelines.params import Task, TaskName
from pipelines.report import machine, markdown
from pipelines.runtimes import load

TASKS: dict[TaskName, ModuleType] = {"emotion": emotion, "landmarks": landmarks}
NETWORKS = [f"{task}-{name}" for task, module in TASKS.items() for name in module.NETWORKS]
CALIBRATION, COMPARED, SEED = 32, 8, 2026
EXACT = 0.01  # of the spread of answers over faces, how far those of a float32 graph may be off
SETTING = re.compile(r"Setting: size (\d+), channels (\d), widths \(([\d, ]*)\)(?:, points (\d+))?")
COLUMNS = (
    "network",
    "parameters",
    "variant",
    "size",
    "runs in",
    "mean difference",
    "spread of answers",
    "verdict",
)

Row = dict[str, Any]


class Built(NamedTuple):
    """A network of the zoo, ready for export.

    Attributes:
        path: its `.keras` file.
        parameters: how many it has.
        calibration: faces, and a loss that any eight-bit graph keeps to.
        images: float32 (n, S, S, C), values 0–255, to be compared on.
        answers: what Keras makes of them.
    """

    path: Path
    parameters: int
    calibration: Calibration
    images: np.ndarray
    answers: np.ndarray


def main() -> None:
    """Try the networks and write README.md and results.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the page and results")
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=NETWORKS, metavar="TASK-NETWORK"
    )
    parser.add_argument(
        "--engines", nargs="*", default=["sm89"], help="TensorRT targets; default: sm89"
    )
    args = parser.parse_args()
    if args.out.exists() and not (args.out / "results.json").exists():
        raise GrimaceError(f"{args.out} would be replaced, and holds no results: name another")
    where = machine()  # before the results are written, which Git sees as a change
    rows = [row for row in earlier(args.out) if row["network"] not in args.networks]
    for name in tqdm(args.networks, "networks", disable=None):
        rows += try_network(name, args.engines)
        rows.sort(key=lambda row: NETWORKS.index(row["network"]))  # a stable sort
        write(rows, args.out, where)  # at once: large networks take minutes
    print(markdown(table(rows), COLUMNS))


def earlier(folder: Path) -> list[Row]:
    """Return the rows of earlier runs: those of networks that are not asked for are kept."""
    path = folder / "results.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row["network"] in NETWORKS]


def write(rows: list[Row], folder: Path, where: dict[str, str]) -> None:
    """Write README.md and results.json."""
    with whole_folder(folder) as out:
        (out / "results.json").write_text(json.dumps({"machine": where, "rows": rows}, indent=2))
        (out / "README.md").write_text(page(rows, where))


def try_network(name: str, engines: list[str]) -> list[Row]:
    """Build a network, export it and compare.

    Args:
        name: of `NETWORKS`, such as "landmarks-vgg19".
        engines: TensorRT targets, such as "sm89".

    Returns:
        A row a variant, or a row a target where its exporter failed: `network`, `parameters`,
        `variant` ("tflite/int8"), `precision`, `bytes`, `runtime`, `difference` (the mean of
        outputs from Keras's), `spread` (standard deviation of Keras's answers over the faces),
        `passed` and `why`; what is not known is None.
    """
    with TemporaryDirectory() as scratch:
        built = build(name, Path(scratch, "model.keras"))
        return list(_rows(name, built, Path(scratch), engines))


def build(name: str, path: Path) -> Built:
    """Save a network of the zoo, with random weights, at the setting of its docstring."""
    import keras

    task, network = _named(name)
    builder = TASKS[task].NETWORKS[network]
    found = SETTING.search(builder.__doc__ or "")
    if not found:
        raise GrimaceError(f"the docstring of {name} gives no setting")
    size, channels, points = int(found[1]), int(found[2]), found[4]
    widths = tuple(int(width) for width in re.findall(r"\d+", found[3]))
    more = {"points": int(points)} if points else {}
    keras.utils.set_random_seed(SEED)
    model = TASKS[task].build(network, widths, size, channels, dropout=0.0, **more)
    crop = Task(dataset="synthetic", size=size, channels=channels, margin=0.1)  # type: ignore[arg-type]
    drawn = crop_all(synthetic.examples(CALIBRATION + COMPARED, SEED), task, crop).images
    images = drawn.astype(np.float32)
    seen, new = images[:CALIBRATION], images[CALIBRATION:]
    for layer in _layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # its statistics are those of the last images
    scale(model, seen)
    model(seen, training=True)
    model.save(path)
    answers = model.predict(new, verbose=0)

    def loss(outputs: np.ndarray) -> float:
        return float(np.abs(outputs.reshape(answers.shape) - answers).mean())

    calibration = Calibration(seen, new, loss, math.inf, "mean difference")
    return Built(path, model.count_params(), calibration, new, answers)


def scale(model: Any, images: np.ndarray) -> None:
    """Give each channel of each convolution and dense layer mean 0 and variance 1 over images.

    Layer by layer in one pass, each on what those before make of the images once they are scaled.
    A layer without a bias is left to the normalisation that follows it.
    """
    import keras
    from keras import ops

    layers = [x for x in _layers(model) if getattr(x, "use_bias", False) and hasattr(x, "kernel")]

    def scaling(layer: Any) -> Any:
        call = layer.call

        def once(x: Any, **more: Any) -> Any:
            activation, layer.activation = layer.activation, keras.activations.linear
            y = call(x, **more)
            mean, variance = ops.moments(y, axes=list(range(y.ndim - 1)))
            deviation = ops.maximum(ops.sqrt(variance), 1e-6)
            layer.kernel.assign(layer.kernel / deviation)
            layer.bias.assign((layer.bias - mean) / deviation)
            layer.activation, layer.call = activation, call
            return activation((y - mean) / deviation)

        return once

    for layer in layers:
        layer.call = scaling(layer)
    model(images, training=True)


def _layers(model: Any) -> Iterator[Any]:
    """All layers, those of a transfer network's base too."""
    for layer in model.layers:
        yield from _layers(layer) if hasattr(layer, "layers") else [layer]


def _named(name: str) -> tuple[TaskName, str]:
    task, _, network = name.partition("-")
    return ("emotion" if task == "emotion" else "landmarks"), network


def _rows(name: str, built: Built, out: Path, engines: list[str]) -> Iterator[Row]:
    exporters = {
        "tflite": lambda folder: tflite.export(built.path, folder, built.calibration),
        "tfjs": lambda folder: tfjs.export(built.path, folder),
        "tensorrt": lambda folder: tensorrt.export(built.path, folder, built.calibration, ()),
    }
    for target, export in exporters.items():
        empty = {"network": name, "parameters": built.parameters, "variant": target}
        empty |= dict.fromkeys(("precision", "bytes", "runtime", "difference", "spread"))
        empty |= {"passed": False, "why": ""}
        try:
            variants = export(out / target)
        # Whatever a converter raises belongs in the table, and the others go on.
        except Exception as error:
            yield empty | {"why": f"not exported: {_reason(error)}"}
            continue
        for variant, facts in variants.items():
            row = empty | {"variant": f"{target}/{variant}", "precision": facts["precision"]}
            yield row | _compared(out / target / facts["file"], facts["precision"], built)
        if target == "tensorrt":
            for engine in engines:
                row = empty | {"variant": f"tensorrt/int8.{engine}", "precision": "int8"}
                yield row | _engine(out / target / "int8.onnx", engine)


def _compared(graph: Path, precision: str, built: Built) -> Row:
    files = [graph] if graph.is_file() else [file for file in graph.rglob("*") if file.is_file()]
    row: Row = {"bytes": sum(file.stat().st_size for file in files)}
    try:
        with load(graph) as runtime:
            outputs = runtime.predict(built.images).reshape(built.answers.shape)
            row["runtime"] = runtime.name
    except Exception as error:
        return row | {"why": f"exported, but does not run: {_reason(error)}"}
    spread = float(built.answers.std(0).mean())
    row |= {"difference": float(np.abs(outputs - built.answers).mean()), "spread": spread}
    if not np.isfinite(outputs).all():
        return row | {"why": "not all of its answers are numbers"}
    if precision == "float32" and row["difference"] > EXACT * spread:
        return row | {"why": f"other answers than Keras gives: {EXACT * spread:.2g} asked"}
    return row | {"passed": True}


def _engine(graph: Path, target: str) -> Row:
    try:
        trt = tensorrt.find_tensorrt(target)
        size = len(tensorrt.build_engine(trt, graph, target))
    except Exception as error:
        return {"why": f"not built: {_reason(error)}"}
    return {"bytes": size, "passed": True, "why": "built ahead of time, not run"}


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[-300:]


def table(rows: list[Row]) -> list[tuple[str, ...]]:
    """Return the rows as text, in the order of `COLUMNS`."""

    def text(value: Any, form: str) -> str:
        return "" if value is None else form.format(value)

    return [
        (
            row["network"],
            f"{row['parameters']:,}",
            row["variant"],
            "" if row["bytes"] is None else f"{row['bytes'] / 2**20:.2f} MiB",
            row["runtime"] or "",
            text(row["difference"], "{:.2g}"),
            text(row["spread"], "{:.2g}"),
            " ".join(filter(None, ("ok" if row["passed"] else "FAILED", row["why"]))).replace(
                "|", "\\|"
            ),
        )
        for row in rows
    ]


def page(rows: list[Row], where: dict[str, str]) -> str:
    """Return the page of results, Markdown."""
    # An engine is built here and cannot be asked: it answers nothing, and is counted apart.
    engines = [row for row in rows if row["variant"].startswith("tensorrt/int8.")]
    graphs = [row for row in rows if row not in engines]
    exact = [row for row in graphs if row["precision"] == "float32"]
    built, ran, same = (sum(row["passed"] for row in some) for some in (engines, graphs, exact))
    networks = {row["network"] for row in rows}
    missing = [name for name in NETWORKS if name not in networks]
    unrun = f"Not run: {', '.join(missing)}.\n\n" if missing else ""
    facts = "".join(f"- {name}: {value}\n" for name, value in where.items())
    return (
        "# Does every network export?\n\nWritten by `python -m benchmarks.zoo --out "
        f"docs/results/zoo`: {len(networks)} of {len(NETWORKS)} networks. {ran} of {len(graphs)} "
        f"graphs were exported and run, and {same} of the {len(exact)} in float32 answer as Keras "
        f"does; {built} of {len(engines)} TensorRT engines were built, and not run.\n\n"
        "Weights are random (ImageNet's were not fetched for the transfer networks), scaled so "
        f"that over {CALIBRATION} drawn faces each channel has mean 0 and variance 1; on these "
        f"eight bits were calibrated, too. Compared on {COMPARED} others. The verdict says that a "
        "graph exports and runs in its runtime, and, in float32, that its answers differ from "
        f"Keras's by no more than {EXACT:.0%} of what they differ by between faces. Of the others "
        "the difference says little: untrained networks amplify rounding as no trained one does, "
        "of which `verify` measures what it costs. Eight-bit graphs are those with every layer in "
        "eight bits.\n\n"
        f"{unrun}{markdown(table(rows), COLUMNS)}\n## Where\n\n{facts}"
    )


if __name__ == "__main__":
    run(main)
