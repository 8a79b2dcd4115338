"""Compiled kernels on disk, so that a process need not compile what an earlier one did.

Numba's own cache notices changes in one source file only, and a bad file or directory fails the import
or the call. Here an entry is named after all that its code depends on, and whatever goes wrong, the
kernel is compiled as if there were no cache.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core import config, sigutils
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

from fastll.backend import disk
from fastll.backend.disk import digest


def cached(kernel: Any) -> Any:
    """A dispatcher that looks for its machine code on disk before it compiles."""
    kernel._cache = _Cache(kernel)
    return kernel


def cached_cfunc(signature: Any, name: str) -> Callable[[Any], Any]:
    """`numba.cfunc` that does so too.

    Code of several processes meets in one, linked by symbols. `name` becomes a part of them, as the
    functions that a factory makes are otherwise told apart by the order in which a process made them.
    """

    def compiled(function: Any) -> Any:
        function.__qualname__ = name
        options = {"error_model": "numpy"}
        made: Any = CFunc(function, sigutils.normalize_signature(signature), locals={}, options=options)
        made._cache = _Cache(function)
        made.compile()
        return made

    return compiled


class _Cache(NullCache):  # type: ignore[misc]  # of a package without types
    """The entries of one function, as Numba asks for them."""

    def __init__(self, function: Any) -> None:
        self.name = f"{function.__module__}.{function.__qualname__}"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            code = disk.read(_path(self.name, sig, target_context))
            # `target_context.refresh()` would do this, and spend 0.4 s on what only compiling needs
            rtsys.initialize(target_context)
            return CompileResult._rebuild(target_context, *pickle.loads(code))
        except Exception:
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            if not data.lifted and not data.library.has_dynamic_globals:
                disk.write(_path(self.name, sig, data.target_context), dumps(data._reduce()))
        except Exception:
            pass


def _path(name: str, sig: Any, target_context: Any) -> Path:
    """The entry of a function, by its dotted name, for a signature."""
    settings = (
        target_context.codegen().magic_tuple(),  # system, CPU and its features
        config.OPT,
        config.BOUNDSCHECK,
        config.DEBUGINFO_DEFAULT,
        config.LOOP_VECTORIZE,
        config.SLP_VECTORIZE,
    )
    return folder() / digest(repr((name, str(sig), settings)).encode()).hex()


def folder() -> Path:
    """Where entries are; `OSError` where none are kept."""
    if _IMPORTED is None:
        raise OSError("no compiled kernels are kept on disk")
    if _version() != _IMPORTED:
        raise OSError("the source files are no longer what was imported")
    return disk.root() / _IMPORTED


def holds(name: str, sig: Any) -> bool:
    """Whether there is an entry of a function, by its dotted name, for a signature."""
    return _path(name, sig, cpu_target.target_context).exists()


def probe() -> None:
    """`OSError` where no entry can be written."""
    entry = folder() / "probe"
    disk.write(entry, b"")
    entry.unlink(missing_ok=True)


def _version() -> str | None:
    """A name for these sources and the packages they are compiled by; None: no cache."""
    here = Path(__file__)
    folders = here.parent, here.parents[1], here.parents[2], here.parents[2] / "formulas"
    sources = [path for folder in folders for path in folder.glob("*.py")]
    versions = np.__version__, numba.__version__, llvmlite.__version__
    return disk.version(sources if here in sources else [], versions)


try:
    _IMPORTED = _version()  # before the kernels are imported, so that no older ones go by this name
except Exception:
    _IMPORTED = None
