"""The structures that describe a call: a kernel takes one as an array, its fields a word each.

As arguments, fields would cost 0.1 us each.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import intrinsic, lower_getattr_generic, register_model
from numpy.typing import NDArray

from fastll.backend.numba.vector import Model

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
        """A function for kernels: the `_View` of an address, for a scalar of the compute dtype."""

        def unpack(typing_context: Any, address: Any, like: Any) -> Any:
            view = _numba_type(self._tree, like)
            return view(types.int64, like), lambda context, builder, signature, values: values[0]

        return intrinsic(unpack)


class _View(types.Type):  # type: ignore[misc]  # of a package without types
    """A named tuple in memory, as its address: a field is read where it is used."""

    ir = ir.IntType(64)

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.fields = fields
        super().__init__(name=f"View({name}, {fields})")


register_model(_View)(Model)


@infer_getattr
class _Fields(AttributeTemplate):  # type: ignore[misc]
    key = _View

    def generic_resolve(self, view: Any, name: str) -> Any:
        return view.fields.get(name)


@lower_getattr_generic(_View)  # type: ignore[untyped-decorator]
def _read_field(context: Any, builder: Any, view: Any, address: Any, name: str) -> Any:
    before = list(view.fields).index(name)
    word = sum(map(_words_of, list(view.fields.values())[:before]))
    return _read(context, builder, view.fields[name], builder.add(address, _View.ir(8 * word)))


def _words_of(kind: Any) -> int:
    if isinstance(kind, _View):
        return sum(map(_words_of, kind.fields.values()))
    return sum(map(_words_of, kind)) if isinstance(kind, types.BaseTuple) else 1


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
        if kind is tuple:
            return types.BaseTuple.from_types(kinds)
        return _View(kind.__qualname__, dict(zip(kind._fields, kinds, strict=True)))
    return {int: types.int64, bool: types.boolean, Number: compute}.get(tree, types.float64)


def _read(context: Any, builder: Any, kind: Any, address: Any) -> Any:
    """A value of a type at an address; nothing changes it as long as kernels run."""
    if isinstance(kind, _View):
        return address
    if isinstance(kind, types.BaseTuple):
        fields = []
        for field in kind:
            fields.append(_read(context, builder, field, address))
            address = builder.add(address, _View.ir(8 * _words_of(field)))
        return context.make_tuple(builder, kind, fields)
    stored = _View.ir if kind in (types.int64, types.boolean) else ir.DoubleType()
    word = builder.load(builder.inttoptr(address, stored.as_pointer()))
    word.set_metadata("invariant.load", builder.module.add_metadata([]))
    if kind == types.boolean:
        return builder.icmp_signed("!=", word, stored(0))
    return builder.fptrunc(word, ir.FloatType()) if kind == types.float32 else word
