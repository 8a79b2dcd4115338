"""A GPU as the benchmark needs it: memory, copies, events, and what it is.

By the driver, so that arrays may be those of torch, CuPy or Numba, whichever is there.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from math import prod
from time import perf_counter
from typing import Any

import ml_dtypes
import numpy as np

import fastll
from bench.report import ReportError
from fastll import array_libraries as libraries
from fastll.dtypes import BFLOAT16

#: Array libraries, the first one of which that sees the GPU is used.
LIBRARIES = ("torch", "cupy", "numba")
#: Bytes of the copy that everything is compared with.
COPY = 1 << 30
PACKAGES = ("numba-cuda", "cuda-core", "cuda-bindings", "numpy", "torch", "triton", "cupy-cuda13x")

Call = Callable[[], Any]


def why_not() -> str | None:
    """Why no GPU can be measured, in a line; None if one can."""
    reason = fastll.backends()["cuda"].reason
    return None if reason is None else f"the backend cuda is not available: {' '.join(reason.split())}"


class Card:
    """The first GPU, with the arrays of one library on its current stream."""

    def __init__(self, driver: Any = None, library: Any = None) -> None:
        if driver is None:
            from cuda.bindings import driver
        self.driver = driver
        self._checked(driver.cuInit(0))
        self.device = self._checked(driver.cuDeviceGet(0))
        context = self._checked(driver.cuDevicePrimaryCtxRetain(self.device))
        self._checked(driver.cuCtxSetCurrent(context))
        self.library = library or _library()
        self.place = libraries.Device("cuda", 0)
        self.l2 = self._attribute("L2_CACHE_SIZE")
        self.copied = [self.empty((COPY,), np.dtype(np.uint8)) for _ in range(2)]
        self._events = [self._checked(driver.cuEventCreate(0)) for _ in range(2)]

    # memory

    def dtype(self, name: str) -> np.dtype[Any]:
        """As the library's arrays have it."""
        if name == "bfloat16":
            return BFLOAT16 if self.library.name == "torch" else np.dtype(ml_dtypes.bfloat16)
        return np.dtype(name)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """The view of a new array, which is its `owner`."""
        return self.library.empty(shape, dtype, self.place, None)

    def view(self, x: Any) -> Any:
        """The view of an array."""
        return self.library.view(x, "x")

    def upload(self, view: Any, numbers: np.ndarray[Any, Any]) -> None:
        """Numbers of the host, in C order, to a contiguous array of as many."""
        numbers = np.ascontiguousarray(numbers)
        at = _span(view)[0]
        if numbers.size:
            self._checked(
                self.driver.cuMemcpyHtoDAsync(at, numbers.ctypes.data, numbers.nbytes, self.stream)
            )
        self.synchronize()

    def repeat(self, view: Any, block: Any) -> None:
        """Copies of a block, one after the other, up to the end of a contiguous array."""
        (address, size), (source, length) = _span(view), _span(block)
        done = min(size, length)
        self._copy(address, source, done)
        while done < size:
            part = min(done, size - done)
            self._copy(address + done, address, part)
            done += part

    def fetch(self, view: Any, start: int = 0, count: int | None = None) -> np.ndarray[Any, Any]:
        """Elements of a contiguous array; a copy."""
        dtype = view.dtype if view.dtype != BFLOAT16 else np.dtype(ml_dtypes.bfloat16)
        result = np.empty(prod(view.shape) - start if count is None else count, dtype)
        at = _span(view)[0] + start * dtype.itemsize
        if result.size:
            self._checked(
                self.driver.cuMemcpyDtoHAsync(result.ctypes.data, at, result.nbytes, self.stream)
            )
        self.synchronize()
        return result

    def poison(self, view: Any) -> None:
        """NaN everywhere."""
        address, size = _span(view)
        self._checked(self.driver.cuMemsetD8Async(address, 0xFF, size, self.stream))

    def copy(self, target: Any, source: Any) -> None:
        """One array's bytes to another."""
        self._copy(_span(target)[0], *_span(source))

    def _copy(self, target: int, source: int, size: int) -> None:
        self._checked(self.driver.cuMemcpyDtoDAsync(target, source, size, self.stream))

    def free(self) -> int:
        """Bytes of memory that are left, once libraries have given back what they kept."""
        self.synchronize()
        gc.collect()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()
        if "cupy" in sys.modules:
            sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
        if self.library.name == "numba":
            from numba import cuda

            cuda.current_context().deallocations.clear()
        return int(self._checked(self.driver.cuMemGetInfo())[0])

    # time

    @property
    def stream(self) -> int:
        return self.library.stream(self.place)

    def synchronize(self) -> None:
        self._checked(self.driver.cuStreamSynchronize(self.stream))

    def seconds(self, calls: Iterable[Call]) -> tuple[float, float]:
        """From before to after what the calls start, by events; and those that starting it takes."""
        start, stop = self._events
        stream = self.stream
        self._checked(self.driver.cuEventRecord(start, stream))
        before = perf_counter()
        for call in calls:
            call()
        host = perf_counter() - before
        self._checked(self.driver.cuEventRecord(stop, stream))
        self._checked(self.driver.cuEventSynchronize(stop))
        return float(self._checked(self.driver.cuEventElapsedTime(start, stop))) / 1e3, host

    # what it is

    def describe(self) -> dict[str, Any]:
        """For the JSON."""
        name = self._checked(self.driver.cuDeviceGetName(256, self.device))
        capability = [self._attribute(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR")]
        free, total = self._checked(self.driver.cuMemGetInfo())
        return {
            "name": name.split(b"\0")[0].decode().strip(),
            "capability": capability,
            "multiprocessors": self._attribute("MULTIPROCESSOR_COUNT"),
            "l2": self.l2,
            "memory": int(total),
            "free": int(free),
            "driver": _driver_version(),
            "cuda": int(self._checked(self.driver.cuDriverGetVersion())),
            "arrays": self.library.name,
        }

    def _attribute(self, name: str) -> int:
        attribute = getattr(self.driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._checked(self.driver.cuDeviceGetAttribute(attribute, self.device)))

    def _checked(self, result: tuple[Any, ...]) -> Any:
        """The value or values of a call of the driver, or its error."""
        error, *values = result
        if error != self.driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the CUDA driver says {error.name}")
        return values[0] if len(values) == 1 else values


def versions() -> dict[str, str | None]:
    """Of the packages that matter on a GPU; None where one is missing."""
    return {name: version_of(name) for name in PACKAGES}


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _library() -> Any:
    reasons = []
    for name in LIBRARIES:
        try:
            library = libraries.load(name)
            library.empty((1,), np.dtype(np.float32), libraries.Device("cuda", 0), None)
        except Exception as error:  # of whatever kind: another library may do
            reasons.append(f"{name}: {' '.join(str(error).split())}")
        else:
            return library
    raise ReportError(f"no library has arrays on the GPU ({'; '.join(reasons)})")


def _span(view: Any) -> tuple[int, int]:
    """Address and bytes of a contiguous array."""
    return view.__array_interface__["data"][0], prod(view.shape) * view.dtype.itemsize


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.split("\n")[0].strip() or None
