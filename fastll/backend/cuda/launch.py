"""Kernels on a GPU: loaded once, launched on the caller's stream."""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from cuda.bindings import driver
from numpy.typing import NDArray

from fastll.backend.cuda import compiler, geometry
from fastll.backend.cuda.compiler import Kernel, core


class Launch(NamedTuple):
    """A kernel, how it is launched, and with what arguments."""

    kernel: Kernel
    blocks: int  # thread blocks
    block: tuple[int, int]
    words: list[Any]
    bound: int  # the most threads the kernel is compiled for
    shared: int  # bytes of shared memory


#: A launch as the driver is told it: function, grid, block, shared memory, address of the arguments.
Told = tuple[Any, int, tuple[int, int], int, int]


class Gpu:
    """One device: what it can do, and the kernels it has."""

    def __init__(self, index: int) -> None:
        _checked(driver.cuInit(0))
        device = core.Device(index)
        self._device = _checked(driver.cuDeviceGet(index))
        major, minor = device.compute_capability
        self.capability: tuple[int, int] = (major, minor)
        before = _checked(driver.cuCtxGetCurrent())
        device.set_current()
        self._context = _checked(driver.cuCtxGetCurrent())
        self._handle = int(self._context)
        _checked(driver.cuCtxSetCurrent(before))
        self._loaded: list[Any] = []
        self._function = functools.cache(self._load)

    @contextmanager
    def current(self) -> Iterator[None]:
        """The calling thread's device for a while."""
        before = _checked(driver.cuCtxGetCurrent())
        if int(before) == self._handle:
            yield
            return
        _checked(driver.cuCtxSetCurrent(self._context))
        try:
            yield
        finally:
            _checked(driver.cuCtxSetCurrent(before))

    def _load(self, kernel: Kernel, threads: int) -> Any:
        code, entry = compiler.machine_code(kernel, self.capability, threads)
        with self.current():
            loaded = core.ObjectCode.from_cubin(code).get_kernel(entry)
            self._loaded.append(loaded)  # a handle does not keep it
            if kernel.roomy:
                self._make_room(driver.CUkernel(int(loaded._handle)))
            return driver.CUfunction(int(loaded._handle))

    def _make_room(self, kernel: Any) -> None:
        """Let a kernel have all of the shared memory, which then is as large as it can be."""
        attribute = driver.CUfunction_attribute
        most = geometry.most_shared(self.capability)
        for key, value in (
            (attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most),
            (attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),  # percent
        ):
            _checked(driver.cuKernelSetAttribute(key, value, kernel, self._device))

    def function(self, launch: Launch) -> Any:
        """The driver's handle of a kernel."""
        return self._function(launch.kernel, launch.bound)

    def start(self, stream: int, launches: Sequence[Told]) -> None:
        """Launch kernels one after the other."""
        error, context = driver.cuCtxGetCurrent()
        if error or int(context) != self._handle:
            with self.current():
                self.start(stream, launches)
            return
        queue, launch = _stream(stream), driver.cuLaunchKernel
        for function, blocks, (x, y), shared, arguments in launches:
            result = launch(function, blocks, 1, 1, x, y, 1, shared, queue, arguments, 0)
            if result[0]:
                _checked(result)

    def read(self, address: int, count: int, dtype: Any, stream: int) -> NDArray[Any]:
        """Numbers from the device's memory; waits for the stream."""
        result: NDArray[Any] = np.empty(count, dtype)
        with self.current():
            _checked(driver.cuMemcpyDtoHAsync(result.ctypes.data, address, result.nbytes, stream))
            _checked(driver.cuStreamSynchronize(stream))
        return result


class Program:
    """Launches to be made any number of times, each time with other addresses.

    `places` says, for each launch, which of the addresses of a call goes to which of its words.
    """

    def __init__(
        self, gpu: Gpu, launches: Sequence[Launch], places: Sequence[dict[int, int]], addresses: int
    ) -> None:
        self._gpu = gpu
        self._launches = [(launch, gpu.function(launch)) for launch in launches]
        self._places = places
        self._pack = struct.Struct(f"{addresses}q").pack_into
        self._addresses = addresses
        # blocks of arguments that no thread uses at the moment
        self._free: list[tuple[Any, list[Told]]] = []

    def __call__(self, stream: int, addresses: Sequence[int]) -> None:
        try:
            block = self._free.pop()
        except IndexError:
            block = self._block()
        memory, told = block
        self._pack(memory, 0, *addresses)
        self._gpu.start(stream, told)
        self._free.append(block)

    def _block(self) -> tuple[Any, list[Told]]:
        """Addresses, the other words, and pointers to both, which are what the driver takes."""
        memory = array("q", bytes(8 * self._addresses))
        for launch, _ in self._launches:
            memory.frombytes(_packed(launch.words))
        pointers = len(memory)
        memory.extend(bytes(pointers - self._addresses))
        base, _ = memory.buffer_info()
        told, word = [], self._addresses
        for (launch, function), places in zip(self._launches, self._places, strict=True):
            count = len(launch.words)
            at = base + 8 * word
            memory[pointers : pointers + count] = array("q", range(at, at + 8 * count, 8))
            for i, place in places.items():
                memory[pointers + i] = base + 8 * place
            told.append((function, launch.blocks, launch.block, launch.shared, base + 8 * pointers))
            word, pointers = word + count, pointers + count
        return memory, told


def start(gpu: Gpu, launch: Launch, stream: int) -> None:
    """Make one launch."""
    Program(gpu, [launch], [{}], 0)(stream, ())


def _packed(words: list[Any]) -> bytes:
    """Arguments, of 8 bytes each."""
    formats = [_FORMATS.get(type(word), "q") for word in words]
    return struct.pack(f"={''.join(formats)}", *words)


#: How numbers that are no integers are packed.
_FORMATS = {np.float32: "f4x", np.float64: "d"}


@functools.lru_cache(1024)
def _stream(handle: int) -> Any:
    """A stream by its handle, of which 0 is the default one, 1 by its older name."""
    return driver.CUstream(handle or 1)


@functools.cache
def gpu(index: int) -> Gpu:
    """The `Gpu` of a number."""
    return Gpu(index)


def count() -> int:
    """Number of devices; `RuntimeError` without a driver."""
    _checked(driver.cuInit(0))
    return int(_checked(driver.cuDeviceGetCount()))


def _checked(result: Any) -> Any:
    """The value of a call of the driver, or its error."""
    error, *values = result
    if error:
        raise RuntimeError(f"the CUDA driver says {error.name}")
    return values[0] if values else None
