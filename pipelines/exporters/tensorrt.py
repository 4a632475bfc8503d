"""TensorRT: quantised ONNX graphs, and engines built from them ahead of time.

The command line turns such a graph into an engine where TensorRT is all there is, on a server or
a Jetson: `python -m pipelines.exporters.tensorrt --onnx int8.onnx`.
"""

import argparse
import ctypes
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.exporters.quiet import quiet

if TYPE_CHECKING:
    from pipelines.exporters.quantisation import Calibration

SERVER = "`pip install tensorrt` (10 or 11) on a server"
JETSON = "`sudo apt-get install python3-libnvinfer` on a Jetson, from its JetPack"
FULL = f"{SERVER}, {JETSON}"
RTX = "`pip install tensorrt-rtx-cu13`, TensorRT for RTX, which needs no GPU to build"
TARGETS = ("sm86", "sm89", "sm120")
LARGEST_BATCH = 32


def main() -> None:
    """Read the command line and build one engine."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.exporters.tensorrt",
        # Which breaks no package's name in two.
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Build a TensorRT engine from an ONNX graph that Grimace exported. An engine\n"
        "is for one generation of GPUs, and loads in the TensorRT that built it.",
        epilog="What has to be installed for the GPU of this machine:\n"
        f"  {SERVER},\n  {JETSON};\nfor another, or where there is none:\n  {RTX}.",
    )
    parser.add_argument("--onnx", type=Path, required=True, help="int8.onnx or float32.onnx")
    parser.add_argument(
        "--target",
        help="compute capability of the GPU that will run it, such as sm89; left out, the GPU of "
        "this machine. Another GPU than this machine's needs TensorRT for RTX",
    )
    parser.add_argument(
        "--out", type=Path, help="the engine file to write; default: GRAPH.TARGET.engine, here"
    )
    arguments = parser.parse_args()
    target = arguments.target or capability_here()
    if target is None:
        raise GrimaceError("this machine has no NVIDIA GPU to build for; name one with --target")
    out = arguments.out or Path(f"{arguments.onnx.stem}.{target}.engine")
    if (out.parent / "manifest.sig").exists():  # `pipelines.bundles` needs more than TensorRT
        raise GrimaceError(
            f"{out.parent.resolve()} is a signed bundle, and with a file more it would be refused; "
            "name another folder with --out"
        )
    trt = find_tensorrt(target)
    engine = build_engine(trt, arguments.onnx, target)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_bytes(engine)
    partial.replace(out)
    print(
        f"{out}: {len(engine) / 1e6:.1f} MB for {target}, built by "
        f"{trt.__name__} {trt.__version__}; it loads in that version"
    )


def export(
    model_path: Path, out: Path, calibration: "Calibration", targets: Sequence[str] = TARGETS
) -> dict[str, dict[str, Any]]:
    """Write `float32.onnx`, `float16.onnx`, `int8.onnx` and an `int8.TARGET.engine` per target.

    Args:
        model_path: the `.keras` file.
        out: folder to write, whole or not at all; what it holds is replaced.
        calibration: faces and bound of the int8 graph.
        targets: compute capabilities to build engines for, such as "sm89". No GPU is needed.

    Returns:
        What there is, by variant: `file`, `precision`, `versions`, and of int8 `quantisation`.

    Raises:
        GrimaceError: the model or the calibration cannot be used, a converter failed, or
            TensorRT for RTX is missing or cannot build for a target.
    """
    # Imported here so that the command line runs where only TensorRT is installed.
    from pipelines.exporters import onnx_graphs

    with quiet(f"TensorRT export of {model_path}"), whole_folder(out) as folder:
        variants = onnx_graphs.write(model_path, folder, calibration)
        for target in targets:
            trt = find_tensorrt(target)
            engine, file = build_engine(trt, folder / "int8.onnx", target), f"int8.{target}.engine"
            (folder / file).write_bytes(engine)
            variants[f"int8.{target}"] = {
                "file": file,
                "precision": "int8",
                "versions": {trt.__name__: trt.__version__, "compute_capability": target},
            }
    return variants


def find_tensorrt(target: str) -> ModuleType:
    """Import the TensorRT that can build for a GPU.

    The full TensorRT builds for the GPU it runs on; TensorRT for RTX also builds for others, and
    without any.

    Args:
        target: a compute capability such as "sm89".

    Raises:
        GrimaceError: none is installed that can; the message says which package to install.
    """
    here = target == capability_here()
    if here:
        full = imported("tensorrt")
        if full:
            return full
    rtx = imported("tensorrt_rtx")
    if rtx:
        return rtx
    advice = (
        f"the GPU of this machine. Install it: {FULL}; or {RTX}"
        if here
        else f"which is not this machine's GPU. Install {RTX}; or run this on its machine: {FULL}"
    )
    raise GrimaceError(f"no TensorRT is installed that can build for {target}, {advice}")


def build_engine(trt: ModuleType, onnx: Path, target: str) -> bytes:
    """Build an engine for batches of 1 to 32 images, tuned for single ones.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`, see `find_tensorrt`.
        onnx: a graph that `export` wrote.
        target: a compute capability such as "sm89".

    Returns:
        The serialised engine, which the same version of the same TensorRT loads.

    Raises:
        GrimaceError: the graph cannot be read, or TensorRT cannot build it for this target.
    """
    if not onnx.is_file():
        raise GrimaceError(f"{onnx} does not exist; export the model first")
    said: list[str] = []
    logger = recorder(trt, said)
    builder = trt.Builder(logger)
    # Types come from the graph alone, so int8 is where it was calibrated. TensorRT 11 knows no
    # other way and has dropped the flag.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx.read_bytes()):
        raise GrimaceError(f"{onnx}: {trt.__name__} cannot read it: {reason(said)}")
    config = builder.create_builder_config()
    _aim(trt, config, target)
    image = network.get_input(0)
    one, most = (1, *image.shape[1:]), (LARGEST_BATCH, *image.shape[1:])
    profile = builder.create_optimization_profile()
    profile.set_shape(image.name, min=one, opt=one, max=most)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise GrimaceError(
            f"{onnx}: {trt.__name__} {trt.__version__} cannot build it for {target}: {reason(said)}"
        )
    return bytes(engine)


def _aim(trt: ModuleType, config: Any, target: str) -> None:
    """Set the GPU to build for; the full TensorRT always takes the one it runs on."""
    capabilities = getattr(trt, "ComputeCapability", None)
    if capabilities is None:
        return
    known = [name.lower() for name in capabilities.__members__ if name.startswith("SM")]
    if target not in known:
        raise GrimaceError(
            f"{trt.__name__} {trt.__version__} does not build for '{target}'; choose from "
            f"{', '.join(known)}, or run this where that GPU is, with {FULL}"
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(capabilities.__members__[target.upper()], 0)


def recorder(trt: Any, said: list[str]) -> Any:
    """Return a logger for TensorRT that puts its errors into `said`, and drops the rest."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                said.append(message)

    return Logger()


def reason(said: list[str]) -> str:
    """Return the last of the errors that `recorder` put there."""
    return said[-1][:500] if said else "it does not say why"


def imported(name: str) -> ModuleType | None:
    """Return a module, or None where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        return None


def capability_here() -> str | None:
    """Ask the NVIDIA driver for this machine's first GPU: "sm89", or None where there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    # 75 and 76 are CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the driver API.
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    )
    return None if failed else f"sm{major.value}{minor.value}"


if __name__ == "__main__":
    run(main)
