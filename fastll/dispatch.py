"""Selects the backend for a call: one table by device, and a strict choice by the user."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

from fastll import replay, takeover
from fastll.array_libraries import NEEDS_NUMBA_CUDA
from fastll.arrays import Place
from fastll.backend.host import crosses
from fastll.contract import Array, Backend, Fold, Kernel, Map
from fastll.dtypes import FORMATS, kind_of
from fastll.formulas import OWN

#: Kernels of the CPU: along rows, across rows that are neighbours or short, or element-wise.
Family = Literal["rows", "columns", "maps"]

#: Candidates by device: the first available one does the call.
TABLE = {
    "cpu": ("cython", "numba", "numpy"),
    "cuda": ("cuda",),
}

#: The same for users' formulas, which Cython cannot know.
FOR_FORMULAS = ("numba", "numpy")

#: The package that each backend is built on.
_PACKAGES = {"numba": "numba", "cython": "fastll", "numpy": "numpy", "cuda": "numba-cuda"}
NAMES = tuple(_PACKAGES)

#: Where Numba was measured to be faster than Cython, by `python -m bench crossover`: the number of
#: elements of a call from which it is, by the family of kernels and the dtype.
NUMBA_FROM: dict[tuple[Family, str], int] = {
    ("maps", "float16"): 1 << 22,
    ("maps", "bfloat16"): 1 << 22,
}
_LOOK_FROM = min(NUMBA_FROM.values(), default=sys.maxsize)
#: Elements that an operation must have handled there before Numba's kernel is made: seconds of work, as
#: long as to compile it takes.
NUMBA_PAYS_AFTER = 1 << 32

_forced: ContextVar[str | None] = ContextVar("fastll_backend", default=None)
_environment = os.environ.get("FASTLL_BACKEND") or None
_debugging: ContextVar[bool] = ContextVar(
    "fastll_debug_labels", default=os.environ.get("FASTLL_DEBUG_LABELS", "0") not in ("", "0")
)
replay.settings = _forced.get, _debugging.get
_handled: dict[tuple[str, Family, str], int] = {}


class Status(NamedTuple):
    """Availability of a backend."""

    available: bool
    reason: str | None  # why it is not available, or what of it failed
    version: str | None  # of the package it is built on


def choose(operation: str, elements: int, place: Place) -> Backend:
    """The backend for a call; `RuntimeError` where the one asked for is not available."""
    name = _forced.get() or _environment
    if not place.on_cpu:
        return _bind(name, place)
    if name is not None:
        return _load_forced(name)
    if operation in OWN:
        return _first(FOR_FORMULAS)
    return _first(TABLE["cpu"]) if elements < _LOOK_FROM else _first_of_large_calls()


@cache
def _first(names: tuple[str, ...]) -> Backend:
    """The first available backend of some."""
    for name in names:
        backend = _load(name)
        if not isinstance(backend, str):
            return backend
    raise RuntimeError("no backend is available")  # unreachable: numpy is a dependency


@cache
def _first_of_large_calls() -> Backend:
    first = _first(TABLE["cpu"])
    return cast(Backend, _Faster(first)) if first.name == "cython" else first


class _Faster:
    """Cython's backend, except for the kernels that are faster, and already there, in Numba's: they
    give the same bits."""

    def __init__(self, cython: Backend) -> None:
        self._cython = cython

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cython, name)

    def map(self, call: Map) -> Kernel:
        return self._numba("maps", call.inputs[0], call) or self._cython.map(call)

    def fold(self, call: Fold) -> Kernel:
        family: Family = "columns" if crosses(call.x)[1] else "rows"
        return self._numba(family, call.x, call) or self._cython.fold(call)

    def _numba(self, family: Family, x: Array, call: Map | Fold) -> Kernel | None:
        """Numba's kernel where it is faster. If it is not there, it is requested once that pays."""
        dtype = FORMATS[kind_of(x.dtype).code]
        if x.size < NUMBA_FROM.get((family, dtype), sys.maxsize):
            return None
        missing: list[takeover.Need] = []
        numba = takeover.loaded()
        if numba is None:
            missing.append(takeover.MODULE)
        else:
            kernel: Kernel = (numba.map if family == "maps" else numba.fold)(call, missing)
            if not missing:
                return kernel
        work = call.operation, family, dtype
        _handled[work] = handled = _handled.get(work, 0) + x.size
        if handled >= NUMBA_PAYS_AFTER:
            takeover.request(missing)
        return None


def _bind(forced: str | None, place: Place) -> Backend:
    """The backend of a GPU, for one device and stream."""
    device = place.device
    (name,) = TABLE[device.type]
    if forced is not None:
        _check_takes(forced, device.type, f"{device}")
    module = _import(name)
    if isinstance(module, str):
        raise RuntimeError(f"an array on {device} {module}")
    return cast(Backend, module.bind(device.index, place.stream, place.empty))


def _load_forced(name: str) -> Backend:
    _check_takes(name, "cpu", "the CPU")
    backend = _load(name)
    if isinstance(backend, str):
        _check_available(name)
    return cast(Backend, backend)


def _check_available(name: str) -> None:
    reason = why_not(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was asked for but is not available: {reason}")


def why_not(name: str) -> str | None:
    """Why a backend is not available, in a line; one of a GPU needs one."""
    module = _import(name)
    if isinstance(module, str):
        return module
    return None if name in TABLE["cpu"] else cast("str | None", module.why_not())


@cache
def _load(name: str) -> Backend | str:
    """The backend of the CPU, or why it is not available."""
    module = _import(name)
    return module if isinstance(module, str) else cast(Backend, module.backend)


@cache
def _import(name: str) -> ModuleType | str:
    """The module of a backend, or why it is not available."""
    path = f"fastll.backend.{name}"
    try:
        return import_module(path)
    except ImportError as error:
        if name in TABLE["cuda"]:
            return f"{NEEDS_NUMBA_CUDA} ({error})"
        return "this version of fastll has none" if error.name == path else str(error)


def _check_takes(name: str, device_type: str, where: str) -> None:
    _check_name(name)
    if name not in TABLE[device_type]:
        raise NotImplementedError(f"backend {name!r} does not take arrays on {where}")


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend is {name!r}; expected one of {', '.join(NAMES)}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for the calls in a ``with`` block, or fail.

    The choice is strict: a call that the backend cannot do raises and says why, and is never given to
    another. It holds for the current thread or asyncio task only. ``FASTLL_BACKEND`` makes the same
    choice for a whole process.

    Parameters
    ----------
    name : {"numba", "cython", "cuda", "numpy"}
        The backend; see `backends`.

    Raises
    ------
    ValueError
        If there is no such backend.
    RuntimeError
        If the backend is not available (its package is missing, or it was not built).

    Examples
    --------
    >>> import fastll
    >>> with fastll.use_backend("numpy"):
    ...     float(fastll.logsumexp([0.0, 0.0]))
    0.6931471805599453
    """
    _check_name(name)
    token = _forced.set(name)
    try:
        _check_available(name)
        yield
    finally:
        _forced.reset(token)


def debugging_labels() -> bool:
    """Whether labels on a GPU are checked."""
    return _debugging.get()


@contextmanager
def debug_labels() -> Iterator[None]:
    """Check labels on a GPU too, for the calls in a ``with`` block.

    On a GPU a row whose label is out of range has a loss and a gradient of NaN, as a check would have
    to wait for the device. In the block it does, and raises IndexError as on the CPU, where labels are
    always checked. It holds for the current thread or asyncio task only. ``FASTLL_DEBUG_LABELS=1`` does
    the same for a whole process.

    Examples
    --------
    >>> import fastll
    >>> with fastll.debug_labels():
    ...     float(fastll.cross_entropy([[0.0, 0.0]], [1]))
    0.6931471805599453
    """
    token = _debugging.set(True)
    try:
        yield
    finally:
        _debugging.reset(token)


def backends() -> dict[str, Status]:
    """Every backend with its availability and, where not available, the reason.

    Returns
    -------
    dict
        Name to `Status`: ``available``, ``reason`` (why it is not; None where it is, unless Numba could
        not compile beside the work) and the ``version`` of the package the backend is built on (None
        where that is missing).

    Examples
    --------
    >>> import fastll
    >>> fastll.backends()["numpy"].available
    True
    """
    return {name: _status(name) for name in NAMES}


def _status(name: str) -> Status:
    from importlib.metadata import PackageNotFoundError, version  # 20 ms that calls never need

    try:
        package_version = version(_PACKAGES[name])
    except PackageNotFoundError:
        package_version = None
    reason = why_not(name)
    available = reason is None
    if available and name == "numba" and (failed := takeover.why_not()) is not None:
        reason = f"nothing more is compiled beside the work after {failed}"
    return Status(available, reason, package_version)
