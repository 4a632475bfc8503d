"""Engines without a GPU: what is said of them, and how they are run, on stand-ins.

The stand-in for the driver has host memory for the GPU's; that for TensorRT has an engine that
takes the mean colour of what it finds at the addresses it was given.
"""

import ctypes
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from pipelines.cli import GrimaceError
from pipelines.runtimes import UnavailableError, load, tensorrt

SHAPE = (6, 4, 3)


class Driver:
    """The calls of the CUDA driver API that are used, on the host's memory."""

    def __init__(self) -> None:
        self.memory: dict[int, ctypes.Array] = {}
        self.streams: set[int] = set()
        self.contexts = 0

    def cuInit(self, flags):
        return flags

    def cuDeviceGet(self, device, number):
        device._obj.value = number
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value, self.contexts = 77, self.contexts + 1
        return device.value

    def cuDevicePrimaryCtxRelease_v2(self, device):
        self.contexts -= 1
        return device.value

    def cuCtxSetCurrent(self, context):
        return int(context.value != 77)

    def cuMemGetInfo_v2(self, free, total):
        total._obj.value = 2**30
        free._obj.value = 2**30 - sum(map(len, self.memory.values()))
        return 0

    def cuStreamCreate(self, stream, flags):
        stream._obj.value = 5
        self.streams.add(5)
        return flags

    def cuStreamDestroy_v2(self, stream):
        self.streams.remove(stream.value)
        return 0

    def cuStreamSynchronize(self, stream):
        return int(stream.value not in self.streams)

    def cuMemAlloc_v2(self, pointer, size):
        block = (ctypes.c_char * size.value)()
        pointer._obj.value = ctypes.addressof(block)
        self.memory[pointer._obj.value] = block
        return 0

    def cuMemFree_v2(self, pointer):
        del self.memory[pointer.value]
        return 0

    def cuMemcpyHtoDAsync_v2(self, to, source, size, stream):
        return self.copy(to.value, source.value, size.value, self.memory[to.value], stream)

    def cuMemcpyDtoHAsync_v2(self, to, source, size, stream):
        return self.copy(to.value, source.value, size.value, self.memory[source.value], stream)

    def copy(self, to, source, size, block, stream):
        if stream.value not in self.streams or size > len(block):
            return 1
        ctypes.memmove(to, source, size)
        return 0


class Engine:
    """A network of TensorRT's, and its execution: the mean colour, for up to four pictures."""

    num_io_tensors = 2

    def get_tensor_name(self, place):
        return ("image", "mean")[place]

    def get_tensor_mode(self, name):
        return "IN" if name == "image" else "OUT"

    def get_tensor_dtype(self, name):
        return "FLOAT"

    def get_tensor_shape(self, name):
        many = getattr(self, "many", -1)
        return [many, *SHAPE] if name == "image" else [many, 3]

    def get_tensor_profile_shape(self, name, profile):
        return [[many, *SHAPE] for many in (1, 1, 4)]

    def create_execution_context(self):
        execution = Engine()
        execution.at = {}
        return execution

    def set_tensor_address(self, name, address):
        self.at[name] = address

    def set_input_shape(self, name, shape):
        self.many = shape[0]

    def execute_async_v3(self, stream):
        def values(name):
            count = int(np.prod(self.get_tensor_shape(name)))
            return np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.at[name]))

        values("mean")[:] = values("image").reshape(self.many, *SHAPE).mean((1, 2)).ravel()
        return stream == 5


class Logger:
    Severity = Namespace(ERROR=1, INTERNAL_ERROR=0)


def library(name: str, magic: bytes) -> Namespace:
    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, content):
            if content.startswith(magic):
                return Engine()
            self.logger.log(1, "the magic tag does not match")
            return None

    modes = Namespace(INPUT="IN", OUTPUT="OUT")
    parts = {"Runtime": Runtime, "TensorIOMode": modes, "float32": "FLOAT", "ILogger": Logger}
    return Namespace(__name__=name, __version__="1.2", **parts)


@pytest.fixture
def gpu(monkeypatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(tensorrt, "capability_here", lambda: "sm89")
    monkeypatch.setattr(tensorrt, "_library", lambda: driver)
    monkeypatch.setitem(sys.modules, "tensorrt", library("tensorrt", b"full"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library("tensorrt_rtx", b"rtx"))
    return driver


def engine(folder: Path, content: bytes, name: str = "int8.sm89.engine") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize(("content", "by"), [(b"full", "tensorrt 1"), (b"rtx", "tensorrt_rtx 1")])
def test_an_engine_is_run_by_the_library_that_built_it(gpu, tmp_path, content, by):
    with load(engine(tmp_path, content)) as runtime:
        assert runtime.name.startswith(by)
        assert (runtime.input_shape, runtime.output_shape) == (SHAPE, (3,))
        size = 4 * 4 * (6 * 4 * 3 + 3)  # four pictures and their answers, float32
        assert runtime.opening["memory_mib"] == size / 2**20 and runtime.opening["load_ms"] > 0
        for count in (0, 1, 4, 7):
            images = np.random.default_rng(count).uniform(0, 255, (count, *SHAPE))
            outputs = runtime.predict(images)
            np.testing.assert_allclose(outputs, images.mean((1, 2)), rtol=1e-5)
        assert runtime.latency(images[0], 5)["p50_ms"] > 0
    runtime.close()
    assert not gpu.memory and not gpu.streams and gpu.contexts == 0


def test_what_no_library_takes_is_refused_with_the_reasons(gpu, tmp_path):
    said = r"tensorrt 1.2: the magic tag does not match; tensorrt_rtx 1.2: the magic"
    with pytest.raises(GrimaceError, match=said) as caught:
        load(engine(tmp_path, b"other"))
    assert not isinstance(caught.value, UnavailableError)
    assert gpu.contexts == 0


def test_an_engine_for_another_gpu_is_told_from_a_bad_one(gpu, tmp_path, monkeypatch):
    with pytest.raises(UnavailableError, match=r"sm120 and this machine's is sm89; .*--onnx"):
        load(engine(tmp_path, b"rtx", "int8.sm120.engine"))
    with load(engine(tmp_path, b"rtx", "smile.engine")) as runtime:  # names no GPU
        assert runtime.output_shape == (3,)
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnavailableError, match=r"no TensorRT is installed. Install `pip"):
        load(engine(tmp_path, b"rtx"))


@pytest.mark.parametrize("call", ["cuInit", "cuMemAlloc_v2", "cuMemcpyDtoHAsync_v2"])
def test_a_failing_driver_is_named(gpu, tmp_path, monkeypatch, call):
    monkeypatch.setattr(gpu, call, lambda *given: 700)
    with pytest.raises(GrimaceError, match=rf"{call} failed with error 700"):
        load(engine(tmp_path, b"rtx"))
    assert not gpu.memory and gpu.contexts == 0


@pytest.mark.skipif(tensorrt.capability_here() is not None, reason="there is a GPU")
def test_without_a_gpu_that_is_the_reason(tmp_path):
    with pytest.raises(UnavailableError, match="has no NVIDIA GPU"):
        load(engine(tmp_path, b"rtx"), runtime="tensorrt")
