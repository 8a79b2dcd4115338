"""What a call on a GPU costs in Python: with stubs for the driver's functions, so that it needs no GPU.

PyTorch's tensors on the CPU stand for those on a GPU, as their attributes cost the same. Everything is
counted but what the driver does in a launch; with and without the allocation of memory.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np

import fastll
from fastll import adapted, replay
from fastll import array_libraries as libraries
from fastll.array_libraries import Array, Device, Library, Shape

#: Microseconds that a call may take.
TARGET = 10
#: Rounds, of which the fastest counts, as other programs disturb a measurement; and calls in each.
ROUNDS, CALLS = 30, 200
ROWS, CLASSES = 1024, 1000

_DEVICE = Device("cuda", 0)


class Plain:
    """An array of no library: a NumPy array in the place of memory on a device."""

    def __init__(self, memory: Array) -> None:
        self.memory = memory
        self.address = memory.ctypes.data
        self.shape, self.strides, self.dtype = memory.shape, memory.strides, memory.dtype


class PlainLibrary(Library):
    name = "plain"
    plain = (Plain,)

    def device(self, x: Any) -> Device:
        return _DEVICE

    def view(self, x: Any, name: str) -> Array:
        return libraries.device_view(x.address, x.shape, x.strides, x.dtype, x)

    def facts(self, x: Any) -> tuple[int, Hashable]:
        return x.address, (x.shape, x.strides, x.dtype)

    def empty(self, shape: Shape, dtype: np.dtype[Any], device: Device, order: Shape | None) -> Array:
        return self.view(Plain(np.empty(shape, dtype)), "result")

    def stream(self, device: Device) -> int:
        return 7


def _torch() -> tuple[Library, Callable[[Array], Any]]:
    """PyTorch's library, for which tensors on the CPU are on a GPU."""
    import torch

    from fastll.array_libraries.torch import Torch

    class Standin(Torch):
        def device(self, x: Any) -> Device:
            return _DEVICE

        def are_plain(self, arrays: tuple[Any, ...]) -> bool:
            return False  # to be taken by the kernels of the CPU

        def view(self, x: Any, name: str) -> Array:
            array = super().view(x, name)
            address = array.__array_interface__["data"][0]
            return libraries.device_view(address, array.shape, array.strides, array.dtype, x)

        def facts(self, x: Any) -> tuple[int, Hashable]:
            if x.is_cuda or x.is_neg() or (x.requires_grad and torch.is_grad_enabled()):
                return 0, None
            return x.data_ptr(), (x.get_device(), x.dtype, x.shape, x.stride())

        def maker(
            self, shape: Shape, dtype: np.dtype[Any], order: Shape | None, device: Device
        ) -> Callable[[], Any]:
            return super().maker(shape, dtype, order, libraries.CPU)

        def stream(self, device: Device) -> int:
            return 7

    return Standin(), torch.from_numpy


def _plain() -> tuple[Library, Callable[[Array], Any]]:
    return PlainLibrary(), Plain


#: Libraries of stand-ins, and what makes one of their arrays.
LIBRARIES = {"torch": _torch, "plain": _plain}


def _calls(x: Any, labels: Any, target: Any) -> dict[str, Callable[[], Any]]:
    return {
        "logsumexp": lambda: fastll.logsumexp(x, 1),
        "cross_entropy, mean": lambda: fastll.cross_entropy(x, labels),
        "cross_entropy, mean, gradient": lambda: fastll.cross_entropy(x, labels, return_grad=True),
        "cross_entropy, mean, gradient in place": lambda: fastll.cross_entropy(
            x, labels, return_grad=True, grad_out=x
        ),
        "softmax": lambda: fastll.softmax(x),
        "binary_cross_entropy_with_logits, gradient": lambda: fastll.binary_cross_entropy_with_logits(
            x, target, return_grad=True
        ),
    }


@contextmanager
def stubbed() -> Iterator[None]:
    """The driver's functions without a driver."""
    from cuda.bindings import driver

    from fastll.backend.cuda import launch

    class Gpu(launch.Gpu):
        def __init__(self) -> None:
            self.capability, self._handle = (9, 0), 1

        def function(self, launch: launch.Launch) -> Any:
            return driver.CUfunction(1)

    before = launch.gpu, launch.driver, adapted.on_gpu, replay._plans, dict(libraries._known)
    gpu, current, launched = Gpu(), (0, driver.CUcontext(1)), (0,)
    stub: Any = SimpleNamespace(
        CUstream=driver.CUstream,
        cuCtxGetCurrent=lambda: current,
        cuLaunchKernel=lambda *arguments: launched,
    )
    launch.gpu, launch.driver = lambda index: gpu, stub  # type: ignore[assignment]
    adapted.on_gpu, replay._plans = {}, {}
    try:
        yield
    finally:
        launch.gpu, launch.driver, adapted.on_gpu, replay._plans, known = before
        libraries._known.clear()
        libraries._known.update(known)


def microseconds(call: Callable[[], Any], rounds: int, calls: int = CALLS) -> float:
    """The least of the rounds' medians."""
    medians = []
    for _ in range(rounds):
        times = []
        for _ in range(calls):
            start = perf_counter()
            call()
            times.append(perf_counter() - start)
        medians.append(median(times))
    return min(medians) * 1e6


def measure(name: str, rounds: int = ROUNDS) -> Iterator[dict[str, Any]]:
    """Times of calls with arrays of one of the `LIBRARIES`, one record per call."""
    rng = np.random.default_rng(0)
    library, make = LIBRARIES[name]()
    x = make(rng.standard_normal((ROWS, CLASSES), np.float32))
    target = make(rng.random((ROWS, CLASSES), np.float32))
    labels = make(rng.integers(0, CLASSES, ROWS))
    with stubbed():
        libraries._known[type(x)] = library
        for label, call in _calls(x, labels, target).items():
            call()
            ordinary = microseconds(lambda: _forgotten(call), max(1, rounds // 5))  # noqa: B023
            for _ in range(3):
                call()
            (plan,) = (plan for key, plan in replay._plans.items() if plan)
            whole = microseconds(call, rounds)
            allocated = [make() for make in plan.makers]
            replay._plans = {
                key: plan._replace(makers=[lambda array=array: array for array in allocated])
                for key in replay._plans
            }
            bare = microseconds(call, rounds)
            replay._plans = {}
            yield {
                "call": label,
                "library": name,
                "microseconds": bare,
                "with_allocation": whole,
                "first_calls": ordinary,
                "target": TARGET,
            }


def _forgotten(call: Callable[[], Any]) -> None:
    """A call that is not known."""
    replay._plans.clear()
    call()


def unit() -> float:
    """Microseconds for one read of ``__array_interface__``, by which machines can be compared."""
    x = np.zeros(3)
    count = 100
    return microseconds(lambda: [x.__array_interface__ for _ in range(count)], 20) / count


def lines(records: list[dict[str, Any]]) -> Iterator[str]:
    """The records as a table."""
    yield f"Microseconds in Python for a call on a GPU, without what the driver does; target {TARGET}."
    yield f"{'':44}{'library':>9}{'call':>8}{'with allocation':>17}{'first calls':>13}"
    for record in records:
        yield (
            f"{record['call']:44}{record['library']:>9}{record['microseconds']:8.1f}"
            f"{record['with_allocation']:17.1f}{record['first_calls']:13.1f}"
        )
    yield f"Python {platform.python_version()}; to read an __array_interface__ takes {unit():.2f} us."
