"""Calls that others take over: adapters of `fastll.interop` those that PyTorch records or traces, and
dask's; `fastll.replay` those on a GPU that were made before.

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

#: The library of each type of arrays of which one was met on a GPU, if its calls can be made again.
on_gpu: dict[type, Any] = {}
#: Makes a call whose first argument has such a type; set by `fastll.replay`.
replay: Any = None


class AdapterNeededError(TypeError):
    """An argument that no kernel takes, but an adapter does; with what to say where none is asked."""

    def __init__(self, adapter: str, message: str) -> None:
        super().__init__(message)
        self.adapter = adapter


def again(function: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    """A function's result, by `replay` if its first argument has a type that is in `on_gpu`."""
    if args and type(args[0]) in on_gpu:
        result: R = replay(function, args, kwargs)
        return result
    return function(*args, **kwargs)


def adapted(function: Callable[P, R]) -> Callable[P, R]:
    """A public function whose calls an adapter takes over where it has to."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        module: Any
        if torch is None or not torch.compiler.is_compiling():
            try:
                if on_gpu and args and type(args[0]) in on_gpu:
                    result: R = replay(function, args, kwargs)
                    return result
                return function(*args, **kwargs)
            except AdapterNeededError as needed:
                module = import_module(f"fastll.interop.{needed.adapter}")
        else:
            from fastll.interop import _torch_calls as module
        taken: R = module.call(function.__name__, args, kwargs)
        return taken

    return call
