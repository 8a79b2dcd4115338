"""Cython kernels, compiled ahead of time for several instruction sets: the best one serves."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from types import ModuleType

from fastll.contract import Backend


def _best() -> ModuleType:
    """The module of the highest level that was built and that the CPU supports."""
    try:
        baseline = import_module("fastll.backend.cython._v1")
    except ImportError as error:
        raise ImportError(
            "fastll was installed without its cython backend, which needs a C++ compiler at install "
            "time; reinstall it with FASTLL_REQUIRE_EXT=1 in the environment to see what fails"
        ) from error
    for level in (4, 3):
        if baseline.level >= level:
            with suppress(ImportError):  # not built
                return import_module(f"fastll.backend.cython._v{level}")
    return baseline


backend: Backend = _best().backend
