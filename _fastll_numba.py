"""What Numba loads in every process that compiles anything, be fastll used there or not.

It is no part of the package, whose import takes 50 ms: only where that is imported, before or after,
`fastll.interop.numba` is too.
"""

import sys
from contextlib import suppress

_asked = False


def init() -> None:
    """The entry point: Numba asks for extensions."""
    global _asked
    _asked = True
    if "fastll" in sys.modules:
        fastll_is_here()


def fastll_is_here() -> None:
    """What `fastll` calls when it has been imported."""
    if _asked:
        with suppress(ImportError):  # of a Numba that is too old
            import fastll.interop.numba  # noqa: F401
