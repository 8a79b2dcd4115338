"""Numba kernels, compiled when first used, run over rows on the package's threads.

A call's code is its kernel, compiled for one compute dtype, and the conversions of its arrays. Each has
a name, a `Need`, by which `fastll.takeover` has those made that are missing: calls need not wait.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numba import types
from numba.core import config

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set, and interpreted kernels have no vectors")

from fastll.backend.host import STREAM_FROM, Host, crosses
from fastll.backend.numba import (
    cache,  # before the kernels: see its end
    columns,
    convert,
    folds,
    maps,
    rows,
)
from fastll.backend.numba.calls import NO_ROWS, NOTHING, Operand, RowOperand
from fastll.contract import SHORT, STREAM_CLASSES, Array, Fold, Kernel, Map, units_of
from fastll.dtypes import kind_of

#: ("rows", "columns" or "maps", operation, compute dtype), or ("reader" or "writer", *its arguments).
Need = tuple[Any, ...]
#: Where it is noted what code of a call is not there; None: then it is compiled.
Missing = list[Need] | None


class Backend(Host):
    """See `fastll.contract.Backend`.

    With `missing`, `map` and `fold` note there what they would have to compile; if anything is noted,
    the kernel is of no use.
    """

    name = "numba"

    def map(self, call: Map, missing: Missing = None) -> Kernel:
        x = call.inputs[0]
        like = _like(x)
        value = _operand(call.value, like, 1, missing)
        if call.value is not None and call.partial is None and call.slope is None:
            value = _streamed(value, call.value.ctypes.data != x.ctypes.data, call.value)
        mapped = maps.Call(
            tuple(_operand(a, like, 1, missing) for a in call.inputs),
            call.parameters,
            _operand(call.weight, like, 1, missing),
            value,
            _operand(call.partial, None, 1, missing),
            _operand(call.slope, like, 1, missing),
            call.scale,
            x.shape[1],
            units_of(x.shape[1]),
            like,
        )
        kernel, layout = maps.kernel(call.operation)
        _note(("maps", call.operation, type(like).__name__), missing)
        return partial(kernel, layout.pack(mapped), like)

    def fold(self, call: Fold, missing: Missing = None) -> Kernel:
        weights = call.second if call.operation == "logsumexp" else None
        layout = _Layout(call.x, weights, missing)
        options = call.options
        simple = call.second is None and options.label_smoothing == options.softcap == 0.0
        folded = folds.Call(
            layout.full(call.x),
            layout.full(call.second),
            layout.row(call.labels),
            layout.row(call.sample),
            0 if call.weight is None else call.weight.ctypes.data,
            options,
            layout.row(call.state),
            layout.row(call.value),
            layout.row(call.lse),
            layout.row(call.sign),
            layout.row(call.selected),
            layout.output(call.out, call.x, simple),
            layout.classes,
            0 if call.selected is None else call.selected.shape[2],
            layout.inner,
            layout.like,
        )
        family = "columns" if layout.across else "rows"
        _note((family, call.operation, type(layout.like).__name__), missing)
        return partial(_kernel(family, call.operation), folds.LAYOUT.pack(folded), layout.like)

    def scan_labels(
        self, labels: Array, classes: int, ignore_index: int, weight: Array | None
    ) -> tuple[int, float, float]:
        ones = np.empty(0) if weight is None else weight
        found: tuple[int, float, float] = folds.check_labels(
            labels.reshape(-1), classes, ignore_index, ones
        )
        return found


class _Layout:
    """The family of kernels that suits an array's strides, and operands as it takes them."""

    def __init__(self, x: Array, weights: Array | None, missing: Missing) -> None:
        self.missing = missing
        self.like = _like(x)
        if weights is not None:  # they lose nothing
            self.like = self.like + _like(weights)
        self.swap, self.across = crosses(x)
        outer, self.classes, inner = x.shape
        self.inner = outer if self.swap else inner

    def full(self, a: Array | None) -> Operand:
        if a is None:
            return NOTHING
        a = a.transpose(2, 1, 0) if self.swap else a
        _, step, inner = (abs(s) for s in a.strides)
        # see `tiles.by_rows`
        by_rows = not self.across or (self.classes < SHORT and (step < inner or self.inner == 1))
        return _operand(a, self.like, 1 if by_rows else 2, self.missing)

    def output(self, a: Array | None, x: Array, simple: bool) -> Operand:
        """An operand that is written in the shape of x, by non-temporal stores where that pays.

        It is `simple` where it is made of exponentials by one factor.
        """
        out = self.full(a)
        if a is None:
            return out
        if self.across:  # parts of cache lines do not pay
            pays = (out.outer | out.classes) % 64 == 0
        else:  # nor what is in the cache: as the input, or because it is needed once more
            pays = simple and a.ctypes.data != x.ctypes.data and a.shape[1] >= STREAM_CLASSES
        return _streamed(out, pays, a)

    def row(self, a: Array | None) -> RowOperand:
        if a is None:
            return NO_ROWS
        outer, inner = a.strides[:2]
        if self.swap:
            outer, inner = inner, outer
        return RowOperand(a.ctypes.data, outer, inner, a.strides[2] if a.ndim == 3 else 0)


def _like(x: Array) -> Any:
    """A scalar of the dtype to compute in: kernels are compiled for its type."""
    return kind_of(x.dtype).compute.type(0)


def _operand(a: Array | None, like: Any, axis: int, missing: Missing) -> Operand:
    """An array as an `Operand`; `axis` is the one that is contiguous where no conversion is needed."""
    if a is None:
        return NOTHING
    address, (outer, step), inner = a.ctypes.data, a.strides[:2], a.strides[2] if a.ndim == 3 else 0
    if like is None or (a.dtype == like.dtype and a.strides[axis] == a.itemsize and a.flags.aligned):
        return Operand(address, outer, step, inner, 0, 0, False)
    kind = kind_of(a.dtype)
    read, write = _conversion(("reader", kind.code, kind.swapped, type(like).__name__), missing), 0
    if a.flags.writeable and kind.element == a.dtype:
        write = _conversion(("writer", kind.code), missing)
    return Operand(address, outer, step, inner, read, write, False)


def _streamed(out: Operand, pays: bool, a: Array) -> Operand:
    """The operand for non-temporal stores, where they pay."""
    return out._replace(streamed=pays and out.write == 0 and a.nbytes >= STREAM_FROM)


# Code by its names. A kernel is also compiled by a call to it.

_kernels: set[Need] = set()  # compiled
_conversions: dict[Need, int] = {}  # addresses


def _kernel(family: str, operation: str) -> Any:
    if family == "maps":
        return maps.kernel(operation)[0]
    return (columns if family == "columns" else rows).kernel(operation)


def _signature(dtype: str) -> tuple[Any, ...]:
    """What a kernel is called with: the words of a call, a scalar, start and stop."""
    return types.int64[::1], getattr(types, dtype), types.int64, types.int64


def _note(need: Need, missing: Missing) -> None:
    """Note a kernel that is not compiled."""
    if missing is None or need in _kernels:
        return
    family, operation, dtype = need
    if _signature(dtype) in _kernel(family, operation).overloads:
        _kernels.add(need)
    else:
        missing.append(need)


def _conversion(need: Need, missing: Missing) -> int:
    """Address of a conversion, compiled here unless that is to be noted."""
    address = _conversions.get(need, 0)
    if address == 0:
        if missing is None:
            make(need)
            return _conversions[need]
        missing.append(need)
    return address


def make(need: Need) -> None:
    """Compile code, or load it from disk."""
    what, *of = need
    if what == "reader":
        _conversions[need] = convert.reader(*of).address
    elif what == "writer":
        _conversions[need] = convert.writer(*of).address
    else:
        operation, dtype = of
        _kernel(what, operation).compile(_signature(dtype))
        _kernels.add(need)


def stored(need: Need) -> bool:
    """Whether code is compiled, here or on disk. `OSError` where none is kept on disk."""
    if need in _kernels or need in _conversions:
        return True
    what, *of = need
    if what in ("reader", "writer"):
        return cache.holds(f"{convert.__name__}.{'_'.join(map(str, need))}", convert.SIGNATURE)
    operation, dtype = of
    return cache.holds(_kernel(what, operation)._cache.name, _signature(dtype))


backend = Backend()  # at the end: a call may look for it while another thread imports this module
