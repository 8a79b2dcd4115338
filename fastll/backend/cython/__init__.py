"""Cython kernels, compiled ahead of time for several instruction sets, of which the best is used."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

from fastll.contract import Backend


def _best() -> ModuleType:
    """The module for the highest instruction set that was compiled and that the CPU supports."""
    try:
        baseline = import_module("fastll.backend.cython._v1")
    except ModuleNotFoundError as error:
        raise ImportError(_remedy()) from error
    for level in (4, 3):
        if baseline.level >= level:
            with suppress(ImportError):  # not compiled
                return import_module(f"fastll.backend.cython._v{level}")
    return baseline


def _remedy() -> str:
    """What to do where the extension was not compiled, in one line."""
    what, command = "fastll was installed without its compiled extension", "reinstall fastll"
    if Path(__file__).parents[3].joinpath("setup.py").exists():
        what = "the extension is not compiled in this source tree"
        command = "run python -m pip install -e ."
    return f"{what}; {command} (needs a C++ compiler; FASTLL_REQUIRE_EXT=1 shows its errors)"


backend: Backend = _best().backend
