"""Adapters: fastll in the words of other frameworks, one module for each, named after it.

``import fastll`` imports none of them; each imports its framework. Arrays of other libraries need no
adapter: `fastll` itself takes them.
"""

from __future__ import annotations

import re
from importlib import metadata


def require(package: str, least: str) -> None:
    """Check that a package is installed, and new enough.

    Raises
    ------
    ImportError
        If it is not; the message says what to install.
    """
    wanted = f'pip install "{package}>={least}"'
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"this adapter needs {package}, which is not installed: {wanted}") from None
    if _release(found) < _release(least):
        raise ImportError(f"this adapter needs {package} {least} or later, not {found}: {wanted}")


def _release(version: str) -> list[int]:
    """The numbers of a version up to the first thing that is none."""
    return [int(number) for number in re.match(r"[\d.]*", version)[0].strip(".").split(".")]  # type: ignore[index]
