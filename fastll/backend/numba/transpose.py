"""Rows in memory to registers of a class each, and back.

Registers are transposed in pieces of 16 bytes: register i takes a piece of every fourth row from i on
(of every second one in float64), and two rounds of unpacking leave a class in each.
"""

# mypy: ignore-errors

from __future__ import annotations

from llvmlite import ir

from fastll.backend.numba import vector
from fastll.backend.numba.vector import (
    emitted,
    inline,
    lanes_in_register,
    pointer,
    register_of,
    shared,
    size_of,
)
from fastll.contract import GROUP

_I64 = ir.IntType(64)


def _size(element):
    return 4 if element == ir.FloatType() else 8


def _at(builder, address, step, i):
    """address + i * step, for a number i."""
    return builder.add(address, builder.mul(step, _I64(i)))


def _unpacked(builder, upper, size, a, b):
    """Of each piece of a and b the lower half or the upper one, in turns of `size` numbers."""
    count, n = a.type.count, 16 // _size(a.type.element)
    lanes = [
        i % n // size % 2 * count + i // n * n + upper * n // 2 + i % n // size // 2 * size + i % size
        for i in range(count)
    ]
    return vector.shuffled(builder, a, b, lanes)


def _transposed(builder, r):
    """The transposes of the pieces of registers, which is its own reverse."""
    if len(r) == 2:
        return [_unpacked(builder, upper, 1, *r) for upper in (0, 1)]
    pairs = [_unpacked(builder, upper, 1, *r[i : i + 2]) for i in (0, 2) for upper in (0, 1)]
    return [_unpacked(builder, u, 2, pairs[i], pairs[i + 2]) for i in (0, 1) for u in (0, 1)]


def _joined(builder, pieces):
    """Vectors, a power of two, as one."""
    while len(pieces) > 1:
        count = 2 * pieces[0].type.count
        pairs = zip(pieces[::2], pieces[1::2], strict=True)
        pieces = [vector.shuffled(builder, a, b, range(count)) for a, b in pairs]
    return pieces[0]


def _piece_turned(builder, address, pitch, element):
    """A piece of as many rows as a register has lanes, `pitch` bytes apart, to a register per class."""
    n, count = 16 // _size(element), lanes_in_register(element)
    kind = ir.VectorType(element, n)
    rows = [
        builder.load(pointer(builder, _at(builder, address, pitch, i), kind), align=1)
        for i in range(count)
    ]
    return _transposed(builder, [_joined(builder, rows[k::n]) for k in range(n)])


@emitted(None)
def _turn_piece(builder, rows, pitch, to, like):
    line = _I64(GROUP * _size(like.type))
    for k, r in enumerate(_piece_turned(builder, rows, pitch, like.type)):
        builder.store(r, pointer(builder, _at(builder, to, line, k), r.type), align=1)


@emitted(None)
def _turn_piece_back(builder, tile, rows, pitch, like):
    n, count = 16 // _size(like.type), lanes_in_register(like.type)
    line, kind = _I64(GROUP * _size(like.type)), ir.VectorType(like.type, count)
    lines = [
        builder.load(pointer(builder, _at(builder, tile, line, k), kind), align=1) for k in range(n)
    ]
    turned = _transposed(builder, lines)
    for i in range(count):
        part = vector.shuffled(builder, turned[i % n], turned[i % n], range(i // n * n, i // n * n + n))
        builder.store(part, pointer(builder, _at(builder, rows, pitch, i), part.type), align=1)


@inline
def _piece(like):
    return 16 // size_of(like)


@shared
def turn(rows, count, classes, tile, like):
    """`count` rows, one after the other, or a few more into a tile: class by class, GROUP rows apart.

    What is behind the last row is read up to a piece, what is behind the last class written.
    """
    vector.out_of_line()
    size, width, piece = size_of(like), vector.lanes_of(vector.in_register(like)), _piece(like)
    pitch = classes * size
    for i in range(0, count, width):
        for j in range(0, classes, piece):
            _turn_piece(rows + i * pitch + j * size, pitch, tile + (j * GROUP + i) * size, like)


@shared
def turn_back(tile, count, classes, rows, like):
    """A tile into `count` rows or a few more, the last pieces first, which reach into the next row.

    What is behind the last row is written, and what is behind the last class read, up to a piece.
    """
    vector.out_of_line()
    size, width, piece = size_of(like), vector.lanes_of(vector.in_register(like)), _piece(like)
    pitch = classes * size
    for i in range(0, count, width):
        for j in range((classes - 1) // piece * piece, -1, -piece):
            _turn_piece_back(tile + (j * GROUP + i) * size, rows + i * pitch + j * size, pitch, like)


def _folded(combine):
    """A function that returns a number of each row, folded by halves from the numbers of its register.

    As many registers as one has lanes are at `address`, one after the other.
    """

    def fold(builder, address, like):
        element, count = like.type, lanes_in_register(like.type)
        n, size, pitch = 16 // _size(element), _size(element), _I64(count * _size(element))
        r = []
        for j in range(0, count, n):
            r += _piece_turned(builder, builder.add(address, _I64(j * size)), pitch, element)
        while len(r) > 1:
            half = len(r) // 2
            r = [combine(builder, a, b) for a, b in zip(r[:half], r[half:], strict=True)]
        return r[0]

    return emitted(lambda address, like: register_of(like))(fold)


total_of_registers, largest_of_registers = _folded(ir.IRBuilder.fadd), _folded(vector.larger)
