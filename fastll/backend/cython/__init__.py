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
        baseline = import_module(f"{__name__}._v1")
    except ImportError as error:
        raise ImportError(_remedy(error)) from error
    for level in (4, 3):
        if baseline.level >= level:
            with suppress(ImportError):  # not compiled
                return import_module(f"{__name__}._v{level}")
    return baseline


def _remedy(error: ImportError) -> str:
    """Why the extension is missing and what to do, in one line."""
    where, command = "fastll is installed", "reinstall it"
    if Path(__file__).parents[3].joinpath("setup.py").exists():
        where, command = "this is a source tree", "run python -m pip install -e ."
    what = "without its compiled extension"
    if error.name != f"{__name__}._v1":
        what = f"with a compiled extension that does not load ({error})"
    return f"{where} {what}; {command} (needs a C++ compiler; FASTLL_REQUIRE_EXT=1 shows its errors)"


_module = _best()
backend: Backend = _module.backend
Direct = _module.Direct
#: Of C functions: see exported.hpp.
ADDRESSES: dict[str, int] = _module.ADDRESSES
Xla = _module.Xla
