"""The GPU as the benchmark uses it: memory, copies, events, properties.

It goes through the driver, so that it works with arrays of torch, CuPy or Numba alike.
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

#: Array libraries in order of preference: the first one that finds the GPU is used.
LIBRARIES = ("torch", "cupy", "numba")
#: Size in bytes of the copy that everything is compared with.
COPY = 1 << 30
PACKAGES = ("numba-cuda", "cuda-core", "cuda-bindings", "numpy", "torch", "triton", "cupy-cuda13x")

Call = Callable[[], Any]


def why_not() -> str | None:
    """The reason, in one line, why no GPU can be measured; None if one can."""
    reason = fastll.backends()["cuda"].reason
    return None if reason is None else f"the cuda backend is not available: {' '.join(reason.split())}"


class Card:
    """The first GPU, with arrays of one library and its current stream."""

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
        """The dtype of that name as views of the library's arrays have it."""
        if name == "bfloat16":
            return BFLOAT16 if self.library.name == "torch" else np.dtype(ml_dtypes.bfloat16)
        return np.dtype(name)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """View of a new array; the array itself is the view's `owner`."""
        return self.library.empty(shape, dtype, self.place, None)

    def view(self, x: Any) -> Any:
        """View of an array."""
        return self.library.view(x, "x")

    def upload(self, view: Any, numbers: np.ndarray[Any, Any]) -> None:
        """Copy numbers from the host to a contiguous array of the same size."""
        numbers = np.ascontiguousarray(numbers)
        at = _span(view)[0]
        if numbers.size:
            self._checked(
                self.driver.cuMemcpyHtoDAsync(at, numbers.ctypes.data, numbers.nbytes, self.stream)
            )
        self.synchronize()

    def repeat(self, view: Any, block: Any) -> None:
        """Fill a contiguous array with repetitions of a block."""
        (address, size), (source, length) = _span(view), _span(block)
        done = min(size, length)
        self._copy(address, source, done)
        while done < size:
            part = min(done, size - done)
            self._copy(address + done, address, part)
            done += part

    def fetch(self, view: Any, start: int = 0, count: int | None = None) -> np.ndarray[Any, Any]:
        """Copy elements of a contiguous array to the host."""
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
        """Fill an array with NaN."""
        address, size = _span(view)
        self._checked(self.driver.cuMemsetD8Async(address, 0xFF, size, self.stream))

    def copy(self, target: Any, source: Any) -> None:
        """Copy the bytes of one array to another."""
        self._copy(_span(target)[0], *_span(source))

    def _copy(self, target: int, source: int, size: int) -> None:
        self._checked(self.driver.cuMemcpyDtoDAsync(target, source, size, self.stream))

    def free(self) -> int:
        """Free memory in bytes, after the libraries have released what they cache."""
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
        """Seconds that the calls take on the GPU, by events, and that the host takes to start them."""
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

    # properties

    def describe(self) -> dict[str, Any]:
        """Properties of the GPU, for the JSON."""
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
        """Return what a driver call returned, or raise its error."""
        error, *values = result
        if error != self.driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the CUDA driver reports {error.name}")
        return values[0] if len(values) == 1 else values


def versions() -> dict[str, str | None]:
    """Versions of the packages that matter on a GPU; None for a missing one."""
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
        except Exception as error:  # any error: another library may work
            reasons.append(f"{name}: {' '.join(str(error).split())}")
        else:
            return library
    raise ReportError(f"no library can make arrays on the GPU ({'; '.join(reasons)})")


def _span(view: Any) -> tuple[int, int]:
    """Address and size in bytes of a contiguous array."""
    return view.__array_interface__["data"][0], prod(view.shape) * view.dtype.itemsize


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.split("\n")[0].strip() or None
