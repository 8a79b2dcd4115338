"""Which backend does a call: one table by device, a strict choice by the user, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import NamedTuple, cast

import fastll.backends  # noqa: F401  before the name becomes that of the function below
from fastll.contract import Backend

#: Candidates for arrays on a device: the first available one that is worth it does the call.
TABLE = {
    "cpu": ("numba", "cython", "numpy"),
    "cuda": ("cuda",),
}

#: What `backends` says a backend is built on.
_PACKAGES = {"numba": "numba", "cython": "fastll", "numpy": "numpy", "cuda": "numba-cuda"}
NAMES = tuple(_PACKAGES)

#: Elements of one call from which Numba's dearer launch (10 us) is lost in the work.
NUMBA_FROM = 1 << 20
#: Elements that an operation must have handled before its Numba kernel is worth compiling: 2 to 4 s,
#: against a gain of at most 0.2 ns an element. Both are measured by `python -m bench crossover`.
NUMBA_PAYS_AFTER = 1 << 34

_forced: ContextVar[str | None] = ContextVar("fastll_backend", default=None)
_environment = os.environ.get("FASTLL_BACKEND") or None
_handled: dict[tuple[str, Hashable], int] = {}


class Status(NamedTuple):
    """Availability of a backend."""

    available: bool
    reason: str | None  # why it is not available
    version: str | None  # of the package it is built on


def choose(operation: str, dtype: Hashable, elements: int) -> Backend:
    """The backend for a call on CPU arrays; `RuntimeError` where the one asked for is not available."""
    name = _forced.get() or _environment
    if name is not None:
        return _load_forced(name)
    return _first(elements >= NUMBA_FROM and _numba_pays(operation, dtype, elements))


@cache
def _first(numba_pays: bool) -> Backend:
    """The first backend of the table that is available, Cython before Numba until that pays."""
    for name in TABLE["cpu"] if numba_pays else ("cython", *TABLE["cpu"]):
        backend = _load(name)
        if not isinstance(backend, str):
            return backend
    raise RuntimeError("no backend is available")  # unreachable: numpy is a dependency


def _numba_pays(operation: str, dtype: Hashable, elements: int) -> bool:
    """Whether Numba is worth its launch, and by now its compilation, against Cython."""
    handled = _handled.get((operation, dtype), 0) + elements
    _handled[operation, dtype] = handled
    return handled >= NUMBA_PAYS_AFTER


def _load_forced(name: str) -> Backend:
    _check_name(name)
    if name not in TABLE["cpu"]:
        raise NotImplementedError(f"backend {name!r} does not take arrays on the CPU")
    backend = _load(name)
    if isinstance(backend, str):
        raise RuntimeError(f"backend {name!r} was asked for but is not available: {backend}")
    return backend


@cache
def _load(name: str) -> Backend | str:
    """The backend, or why it is not available."""
    module = f"fastll.backends.{name}"
    try:
        return cast(Backend, import_module(module).backend)
    except ImportError as error:
        return "this version of fastll has none" if error.name == module else str(error)


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
        if name in TABLE["cpu"]:
            _load_forced(name)
        yield
    finally:
        _forced.reset(token)


def backends() -> dict[str, Status]:
    """Every backend with its availability and, where not available, the reason.

    Returns
    -------
    dict
        Name to `Status`: ``available``, ``reason`` (None where available) and the ``version`` of the
        package the backend is built on (None where that is missing).

    Examples
    --------
    >>> import fastll
    >>> fastll.backends()["numpy"].available
    True
    """
    return {name: _status(name) for name in NAMES}


def _status(name: str) -> Status:
    from importlib.metadata import PackageNotFoundError, version  # 20 ms that calls never need

    backend = _load(name)
    try:
        package_version = version(_PACKAGES[name])
    except PackageNotFoundError:
        package_version = None
    reason = backend if isinstance(backend, str) else None
    return Status(reason is None, reason, package_version)
