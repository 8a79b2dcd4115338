"""Calls that an adapter of `fastll.interop` takes over: where PyTorch records or traces, and dask's.

No framework is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

#: PyTorch, once it was met: before that, it traces nothing.
torch: Any = sys.modules.get("torch")


class AdapterNeededError(TypeError):
    """An argument that no kernel takes, but an adapter does; with what to say where none is asked."""

    def __init__(self, adapter: str, message: str) -> None:
        super().__init__(message)
        self.adapter = adapter


def adapted(function: Callable[P, R]) -> Callable[P, R]:
    """A public function whose calls an adapter takes over where it has to."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        module: Any
        if torch is None or not torch.compiler.is_compiling():
            try:
                return function(*args, **kwargs)
            except AdapterNeededError as needed:
                module = import_module(f"fastll.interop.{needed.adapter}")
        else:
            from fastll.interop import _torch_calls as module
        result: R = module.call(function.__name__, args, kwargs)
        return result

    return call
