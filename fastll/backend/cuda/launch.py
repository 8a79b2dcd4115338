"""Kernels on a GPU: loaded once, launched on the caller's stream through `cuda.core`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from cuda.bindings import driver
from numpy.typing import NDArray

from fastll.backend.cuda import compiler
from fastll.backend.cuda.compiler import Kernel, core


class Gpu:
    """One device: what it can do, and the kernels it has."""

    def __init__(self, index: int) -> None:
        _checked(driver.cuInit(0))
        device = core.Device(index)
        major, minor = device.compute_capability
        self.capability: tuple[int, int] = (major, minor)
        before = _checked(driver.cuCtxGetCurrent())
        device.set_current()
        self._context = _checked(driver.cuCtxGetCurrent())
        _checked(driver.cuCtxSetCurrent(before))
        self._function = functools.cache(self._load)

    @contextmanager
    def current(self) -> Iterator[None]:
        """The calling thread's device for a while."""
        before = _checked(driver.cuCtxGetCurrent())
        if int(before) == int(self._context):
            yield
            return
        _checked(driver.cuCtxSetCurrent(self._context))
        try:
            yield
        finally:
            _checked(driver.cuCtxSetCurrent(before))

    def _load(self, kernel: Kernel, threads: int) -> Any:
        code, entry = compiler.machine_code(kernel, self.capability, threads)
        return core.ObjectCode.from_cubin(code).get_kernel(entry)

    def launch(
        self,
        kernel: Kernel,
        stream: int,
        blocks: int,
        block: tuple[int, int],
        words: list[Any],
        *,
        bound: int,
        shared: int = 0,
    ) -> None:
        """Start a kernel of `blocks` thread blocks; `bound` is the most threads it is compiled for."""
        with self.current():
            function = self._function(kernel, bound)
            core.launch(_stream(stream), _config(blocks, block, shared), function, *words)

    def read(self, address: int, count: int, dtype: Any, stream: int) -> NDArray[Any]:
        """Numbers from the device's memory; waits for the stream."""
        result: NDArray[Any] = np.empty(count, dtype)
        with self.current():
            _checked(driver.cuMemcpyDtoHAsync(result.ctypes.data, address, result.nbytes, stream))
            _checked(driver.cuStreamSynchronize(stream))
        return result


@functools.lru_cache(1024)
def _config(blocks: int, block: tuple[int, int], shared: int) -> Any:
    return core.LaunchConfig(grid=blocks, block=block, shmem_size=shared)


@functools.lru_cache(1024)
def _stream(handle: int) -> Any:
    """A stream by its handle, of which 0 is the default one by its older name."""
    if handle:
        return core.Stream.from_handle(handle)
    return getattr(core, "LEGACY_DEFAULT_STREAM", None) or core.Device().default_stream


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
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver says {error.name}")
    return values[0] if values else None
