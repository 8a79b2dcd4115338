"""Compiled kernels on disk, so that a process need not compile what an earlier one did.

Numba's own cache notices changes in one source file only, and a bad file or directory fails the import
or the call. Here an entry is one file, named after all that its code depends on, and written whole or
not at all. Whatever goes wrong, the kernel is compiled as if there were no cache.
"""

# mypy: ignore-errors

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import llvmlite
import numba
import numpy as np
from numba.core import config, sigutils
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

#: Versions of fastll and the packages below it whose entries are kept, the last used ones: 3 MB each.
KEPT = 8

_DIGEST = hashlib.sha256().digest_size


def cached(kernel):
    """A dispatcher that looks for its machine code on disk before it compiles."""
    kernel._cache = _Cache(kernel)
    return kernel


def cached_cfunc(signature, name):
    """`numba.cfunc` that does so too.

    Code of several processes meets in one, linked by symbols. `name` becomes a part of them, as the
    functions that a factory makes are otherwise told apart by the order in which a process made them.
    """

    def compiled(function):
        function.__qualname__ = name
        options = {"error_model": "numpy"}
        made = CFunc(function, sigutils.normalize_signature(signature), locals={}, options=options)
        made._cache = _Cache(function)
        made.compile()
        return made

    return compiled


class _Cache(NullCache):
    """The entries of one function, as Numba asks for them."""

    def __init__(self, function):
        self._name = f"{function.__module__}.{function.__qualname__}"

    def load_overload(self, sig, target_context):
        try:
            code = _read(self._path(sig, target_context))
            # `target_context.refresh()` would do this, and spend 0.4 s on what only compiling needs
            rtsys.initialize(target_context)
            return CompileResult._rebuild(target_context, *pickle.loads(code))
        except Exception:
            return None

    def save_overload(self, sig, data):
        try:
            if not data.lifted and not data.library.has_dynamic_globals:
                _write(self._path(sig, data.target_context), dumps(data._reduce()))
        except Exception:
            pass

    def _path(self, sig, target_context):
        settings = (
            target_context.codegen().magic_tuple(),  # system, CPU and its features
            config.OPT,
            config.BOUNDSCHECK,
            config.DEBUGINFO_DEFAULT,
            config.LOOP_VECTORIZE,
            config.SLP_VECTORIZE,
        )
        if _IMPORTED is None or _version() != _IMPORTED:  # the files are no longer what was imported
            raise OSError
        return _root() / _IMPORTED / _hash(repr((self._name, str(sig), settings)).encode()).hex()


def _root():
    """Where Numba's user wants caches, or else where the system does."""
    if config.CACHE_DIR:
        return Path(config.CACHE_DIR, "fastll")
    if sys.platform == "win32":
        return Path(os.environ["LOCALAPPDATA"], "fastll", "Cache")
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/fastll"
    return Path.home() / (os.environ.get("XDG_CACHE_HOME") or ".cache") / "fastll"


def _version():
    """A name for these sources and the packages they are compiled by; None: no cache."""
    here = Path(__file__)
    sources = sorted((*here.parent.glob("*.py"), *here.parents[2].glob("*.py")))
    if os.environ.get("FASTLL_CACHE") == "0" or here not in sources:
        return None
    versions = sys.version, np.__version__, numba.__version__, llvmlite.__version__
    return _hash(repr((versions, [(p.name, p.read_bytes()) for p in sources])).encode()).hex()[:32]


def _hash(data):
    return hashlib.sha256(data).digest()


def _read(path):
    """The contents of an entry; `OSError` if they are damaged, or could be someone else's."""
    with open(path, "rb") as file:
        if hasattr(os, "geteuid") and os.fstat(file.fileno()).st_uid not in (0, os.geteuid()):
            raise PermissionError
        digest, data = file.read(_DIGEST), file.read()
    if digest != _hash(data):
        raise OSError
    with suppress(OSError):
        os.utime(path.parent)  # used last
    return data


def _write(path, data):
    """Make an entry. Whoever opens it finds all of it or none."""
    new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{uuid4().hex}.tmp")
    try:
        temporary.write_bytes(_hash(data) + data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if new:
        _prune(path.parents[1])


def _prune(root):
    """Delete the versions that were not used for the longest time."""
    folders = [f for f in root.iterdir() if len(f.name) == 32 and f.is_dir()]
    for folder in sorted(folders, key=lambda f: f.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)


try:
    _IMPORTED = _version()  # before the kernels are imported, so that no older ones go by this name
except Exception:
    _IMPORTED = None
