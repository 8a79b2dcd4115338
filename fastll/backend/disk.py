"""Compiled code on disk, so that a process need not compile what an earlier one did.

An entry is one file, named after all that its code depends on, and written whole or not at all. Entries
of one version of fastll and the packages below it share a folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from numba.core import config

#: Versions of fastll and the packages below it whose entries are kept, the last used ones: 3 MB each.
KEPT = 8

_DIGEST = hashlib.sha256().digest_size


def root() -> Path:
    """Where Numba's user wants caches, or else where the system does."""
    if config.CACHE_DIR:
        return Path(config.CACHE_DIR, "fastll")
    if sys.platform == "win32":
        return Path(os.environ["LOCALAPPDATA"], "fastll", "Cache")
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/fastll"
    return Path.home() / (os.environ.get("XDG_CACHE_HOME") or ".cache") / "fastll"


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def read(path: Path) -> bytes:
    """The contents of an entry; `OSError` if they are damaged, or could be someone else's."""
    with open(path, "rb") as file:
        if hasattr(os, "geteuid") and os.fstat(file.fileno()).st_uid not in (0, os.geteuid()):
            raise PermissionError
        expected, data = file.read(_DIGEST), file.read()
    if expected != digest(data):
        raise OSError
    with suppress(OSError):
        os.utime(path.parent)  # used last
    return data


def write(path: Path, data: bytes) -> None:
    """Make an entry. Whoever opens it finds all of it or none."""
    new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{uuid4().hex}.tmp")
    try:
        temporary.write_bytes(digest(data) + data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if new:
        _prune(path.parents[1])


def _prune(root: Path) -> None:
    """Delete the versions that were not used for the longest time."""
    folders = [f for f in root.iterdir() if len(f.name) == 32 and f.is_dir()]
    for folder in sorted(folders, key=lambda f: f.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)


def version(sources: Collection[Path], packages: object) -> str | None:
    """A name for these source files and the packages they are compiled by; None: no cache."""
    if os.environ.get("FASTLL_CACHE") == "0" or not sources:
        return None
    contents = [(p.name, p.read_bytes()) for p in sorted(sources)]
    return digest(repr((sys.version, packages, contents)).encode()).hex()[:32]
