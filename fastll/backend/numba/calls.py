"""The structures that describe a call: a kernel takes one as an array, its fields a word each.

As arguments, fields would cost 0.1 us each.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import chain, count
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

#: A field of the compute dtype.
Number = Annotated[float, "compute dtype"]


class Operand(NamedTuple):
    """A full or an element-wise array: where it is, its strides in bytes, who reads and writes it.

    `read` and `write` are addresses of functions of `convert`; 0 where the class axis (the only axis,
    for element-wise operations) is contiguous and in the compute dtype. `address` is 0 where there is
    no such operand.
    """

    address: int
    outer: int
    classes: int
    inner: int
    read: int
    write: int
    streamed: bool  # written by non-temporal stores


class RowOperand(NamedTuple):
    """An array with one entry per row, or with several, `step` bytes apart."""

    address: int
    outer: int
    inner: int
    step: int


NOTHING = Operand(0, 0, 0, 0, 0, 0, False)
NO_ROWS = RowOperand(0, 0, 0, 0)

_FORMATS = {int: "q", bool: "q", float: "d", Any: "d", Number: "d"}


class Layout:
    """A named tuple as words of 8 bytes; `lengths` has those of the fields that are tuples."""

    def __init__(self, structure: type[tuple[Any, ...]], **lengths: int) -> None:
        self._tree = _tree(structure, lengths)
        self._words = struct.Struct("".join(_formats(self._tree)))
        self.unpack = self._unpack()

    def pack(self, call: tuple[Any, ...]) -> NDArray[np.int64]:
        words: list[Any] = []
        for field in call:
            if not isinstance(field, tuple):
                words.append(field)
            elif field and isinstance(field[0], tuple):
                words.extend(chain.from_iterable(field))
            else:
                words.extend(field)
        return np.frombuffer(bytearray(self._words.pack(*words)), np.int64)

    def _unpack(self) -> Any:
        """A function for kernels: the named tuple at an address, for a scalar of the compute dtype."""

        def unpack(typing_context: Any, address: Any, like: Any) -> Any:
            structure = _numba_type(self._tree, like)

            def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                pointer = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
                return _read(context, builder, structure, pointer, count())

            return structure(types.int64, like), codegen

        return intrinsic(unpack)


def _tree(kind: Any, lengths: dict[str, int]) -> Any:
    """The type of a leaf, or the class of a tuple and the trees of its fields."""
    if kind in _FORMATS:
        return kind
    fields = []
    for name, field in get_type_hints(kind, include_extras=True).items():
        if name in lengths:
            fields.append((tuple, [_tree(get_args(field)[0], {})] * lengths[name]))
        else:
            fields.append(_tree(field, {}))
    return kind, fields


def _formats(tree: Any) -> Iterator[str]:
    if not isinstance(tree, tuple):
        yield _FORMATS[tree]
    else:
        for field in tree[1]:
            yield from _formats(field)


def _numba_type(tree: Any, compute: Any) -> Any:
    if isinstance(tree, tuple):
        kind, fields = tree
        kinds = [_numba_type(field, compute) for field in fields]
        return types.BaseTuple.from_types(kinds, None if kind is tuple else kind)
    return {int: types.int64, bool: types.boolean, Number: compute}.get(tree, types.float64)


def _read(context: Any, builder: Any, kind: Any, pointer: Any, words: Iterator[int]) -> Any:
    """A value of a type at the next words."""
    if isinstance(kind, types.BaseTuple):
        fields = [_read(context, builder, field, pointer, words) for field in kind]
        return context.make_tuple(builder, kind, fields)
    word = builder.load(builder.gep(pointer, [ir.IntType(64)(next(words))]))
    if kind == types.int64:
        return word
    if kind == types.boolean:
        return builder.icmp_signed("!=", word, word.type(0))
    number = builder.bitcast(word, ir.DoubleType())
    return number if kind == types.float64 else builder.fptrunc(number, ir.FloatType())
