"""Engines on an NVIDIA GPU: by TensorRT, or TensorRT for RTX, whichever built them.

Memory on the GPU and the stream come from the driver's own library, which is there wherever a GPU
can be used; CUDA's Python packages are not needed. No GPU was at hand when this was written: the
tests run it on stand-ins for the driver and for TensorRT.
"""

import ctypes
import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np

from pipelines.exporters.tensorrt import FULL, RTX, capability_here, imported, reason, recorder
from pipelines.runtimes.runtime import Runtime, UnavailableError, open_runtime, refused

LIBRARIES = ("tensorrt", "tensorrt_rtx")


def load(path: Path, threads: int) -> Runtime:
    """Open an `.engine` file on this machine's first GPU; see `pipelines.runtimes.load`.

    What a batch takes includes its way to the GPU and back. `Runtime.opening` has the time until
    the engine is ready, the library being imported, and the memory of the GPU that it takes.

    Raises:
        UnavailableError: there is no GPU, it is another than a name such as `int8.sm89.engine`
            says, or no TensorRT is installed.
        GrimaceError: TensorRT or the driver refuses the file.
    """
    del threads
    here = capability_here()
    if here is None:
        raise UnavailableError("this machine has no NVIDIA GPU (or no driver)")
    target = path.stem.rpartition(".")[2]
    if re.fullmatch(r"sm\d+", target) and target != here:
        raise UnavailableError(
            f"{path.name} is for GPUs of the generation {target} and this machine's is {here}; "
            "`python -m pipelines.exporters.tensorrt --onnx int8.onnx` builds one for it"
        )
    libraries = [library for library in map(imported, LIBRARIES) if library]
    if not libraries:
        raise UnavailableError(f"no TensorRT is installed. Install {FULL}; or {RTX}")
    try:
        with ExitStack() as stack:
            opened = _opened(path, libraries, stack)
            return replace(opened, stop=stack.pop_all().close)
    except RuntimeError as error:
        raise refused("the CUDA driver", path, error) from error


def _opened(path: Path, libraries: list[ModuleType], stack: ExitStack) -> Runtime:
    driver = _driver()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    driver("cuInit", 0)
    driver("cuDeviceGet", ctypes.byref(device), 0)
    # The context that TensorRT works in too.
    driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    stack.callback(driver, "cuDevicePrimaryCtxRelease_v2", device)
    driver("cuCtxSetCurrent", context)
    start, before = perf_counter(), _free(driver)
    trt, engine, said = _deserialised(path, libraries)
    name = f"{trt.__name__} {trt.__version__}"
    tensors = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
    inputs, outputs = (
        [tensor for tensor in tensors if engine.get_tensor_mode(tensor) == mode]
        for mode in (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)
    )
    if any(engine.get_tensor_dtype(tensor) != trt.float32 for tensor in tensors):
        raise refused(name, path, "its input or output is not float32")
    execution = engine.create_execution_context()
    if execution is None:
        raise refused(name, path, reason(said))
    most = engine.get_tensor_profile_shape(inputs[0], 0)[2][0]
    stream, memory = ctypes.c_void_p(), {}
    driver("cuStreamCreate", ctypes.byref(stream), 0)
    stack.callback(driver, "cuStreamDestroy_v2", stream)
    for tensor in tensors:
        many = most * math.prod(tuple(engine.get_tensor_shape(tensor))[1:])
        memory[tensor] = ctypes.c_uint64()
        driver("cuMemAlloc_v2", ctypes.byref(memory[tensor]), ctypes.c_size_t(4 * many))
        stack.callback(driver, "cuMemFree_v2", memory[tensor])
        execution.set_tensor_address(tensor, memory[tensor].value)

    def run(images: np.ndarray) -> np.ndarray:
        taken, given = inputs[0], outputs[0]
        execution.set_input_shape(taken, images.shape)
        answers = np.empty(tuple(execution.get_tensor_shape(given)), np.float32)
        size, pointer = ctypes.c_size_t(images.nbytes), ctypes.c_void_p(images.ctypes.data)
        driver("cuMemcpyHtoDAsync_v2", memory[taken], pointer, size, stream)
        if not execution.execute_async_v3(stream.value):
            raise RuntimeError(reason(said))
        size, pointer = ctypes.c_size_t(answers.nbytes), ctypes.c_void_p(answers.ctypes.data)
        driver("cuMemcpyDtoHAsync_v2", pointer, memory[given], size, stream)
        driver("cuStreamSynchronize", stream)
        return answers

    opened = open_runtime(
        name=name,
        path=path,
        threads=1,
        input_shapes=[tuple(engine.get_tensor_shape(tensor)) for tensor in inputs],
        output_count=len(outputs),
        run=run,
        batch_size=most,
    )
    opening = {
        "load_ms": 1e3 * (perf_counter() - start),
        "memory_mib": max(0, before - _free(driver)) / 2**20,
    }
    return replace(opened, opening=opening)


def _deserialised(path: Path, libraries: list[ModuleType]) -> tuple[ModuleType, Any, list[str]]:
    """Return the library that takes an engine, the engine, and where the library's errors go."""
    reasons = []
    for trt in libraries:
        said: list[str] = []
        engine = trt.Runtime(recorder(trt, said)).deserialize_cuda_engine(path.read_bytes())
        if engine is not None:
            return trt, engine, said
        reasons.append(f"{trt.__name__} {trt.__version__}: {reason(said)}")
    raise refused("TensorRT", path, "; ".join(reasons))


def _driver() -> Callable[..., None]:
    """Return a function that calls the CUDA driver API by name, and raises where that fails."""
    library = _library()

    def call(name: str, *arguments: Any) -> None:
        status = getattr(library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with error {status}")

    return call


def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _free(driver: Callable[..., None]) -> int:
    """Bytes of the GPU's memory that nothing has taken."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    driver("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value
