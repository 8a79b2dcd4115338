"""The direct way of small calls, from a public function to the kernels of Cython.

`fold`, `loss` and `elementwise` take what a public function was given. They return its result, or None
for whatever is not plain or not right, before anything is written: such a call goes by `fastll.calls`.
They are those of ``backend/cython/direct.pxi``; where that is not compiled, they decline everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastll import array_libraries, dispatch


def _decline(*_: Any) -> None:
    return None


def _when_called(name: str) -> Callable[..., Any]:
    """A function that looks for the extension, which is not loaded before it is used."""

    def first(*arguments: Any) -> Any:
        global fold, loss, elementwise
        fold = loss = elementwise = _decline
        if not isinstance(dispatch._load("cython"), str):
            from fastll.backend.cython import Direct

            entry = Direct(dispatch._forced, dispatch._environment, array_libraries._known)
            fold, loss, elementwise = entry.fold, entry.loss, entry.elementwise
        return globals()[name](*arguments)

    return first


fold, loss = _when_called("fold"), _when_called("loss")
elementwise = _when_called("elementwise")
