"""Tiles of a group's rows: class by class, GROUP rows apart, and how they get there and back.

Short rows may lie one after the other in memory: then they are transposed.
"""

# mypy: ignore-errors

from __future__ import annotations

from fastll.backend.numba import vector
from fastll.backend.numba.maths import cast, zeros
from fastll.backend.numba.memory import start_of
from fastll.backend.numba.transpose import turn, turn_back
from fastll.backend.numba.vector import inline, lanes_of, load, read, shared, size_of, store, write
from fastll.contract import GROUP, SHORT

LINES_AHEAD = 8  # classes from the one that is read or written to the one that is prefetched

BEHIND = 3  # numbers that transposing reads and writes behind the last row


@inline
def at_of(tile, j, w, like):
    """Address of class j of row w."""
    return tile + (j * GROUP + w) * size_of(like)


@inline
def size_of_tile(classes, like):
    """Bytes of a tile of so many classes, up to a whole piece of them."""
    return (classes + 3) // 4 * 4 * GROUP * size_of(like)


@inline
def size_of_rows(call):
    """Bytes of the short rows of a group, one after the other."""
    return (GROUP * call.classes + BEHIND) * size_of(call.like) if call.classes < SHORT else 0


@inline
def by_rows(x, classes, inner):
    """Whether rows, not classes, are what lies together in memory, and are short."""
    return classes < SHORT and (abs(x.classes) < abs(x.inner) or inner == 1)


@inline
def _rows_of(x, inner, group, n, rows, like):
    """The short rows of the group, one after the other; in place where there is more memory behind."""
    count = group.count
    at, size = start_of(x, group.outer, group.inner), n * size_of(like)
    packed, in_place = x.inner == n * x.classes, x.read == 0
    if packed and in_place and group.inner + GROUP + BEHIND <= inner:
        return at
    for i in range(1 if packed else count):
        source, to, numbers = at + i * x.inner, rows + i * size, count * n if packed else n
        if in_place:
            vector.copy(source, to, numbers * size_of(like))
        else:
            vector.call(x.read, source, x.classes, to, size_of(like), numbers)
    _clear(rows + count * size, (until_register(count) - count) * n, like)
    return rows


@inline
def until_register(count):
    """The number of rows up to the end of the last register, whatever that holds."""
    return (count + 15) // 16 * 16


@inline
def _clear(at, n, like):
    """Idle lanes: harmless numbers."""
    for i in range(n):
        write(at + i * size_of(like), cast(0.0, like))


@shared
def gather(call, x, group, j, n, tile, rows):
    """Classes j to j + n of the rows into a tile; `rows` is memory for short ones."""
    vector.out_of_line()
    like, count, zero = call.like, group.count, zeros(call.like)
    if by_rows(x, call.classes, call.inner):
        turn(_rows_of(x, call.inner, group, n, rows, like), count, n, tile, like)
        return
    size, source = size_of(like), start_of(x, group.outer, group.inner) + j * x.classes
    for i in range(n):
        line = at_of(tile, i, 0, like)
        if x.read == 0:
            for w in range(0, count, lanes_of(like)):
                vector.prefetch_vector(source + LINES_AHEAD * x.classes + w * size)
                write(line + w * size, load(source + w * size, count - w, zero))
        else:
            vector.call(x.read, source, x.inner, line, size, count)
            _clear(line + count * size, until_register(count) - count, like)
        source += x.classes


@shared
def scatter(call, x, group, j, n, tile, rows):
    """A tile back into classes j to j + n of the rows."""
    vector.out_of_line()
    like, count, zero = call.like, group.count, zeros(call.like)
    size, target = size_of(like), start_of(x, group.outer, group.inner) + j * x.classes
    if by_rows(x, call.classes, call.inner):
        turn_back(tile, count, n, rows, like)
        packed = x.inner == n * x.classes
        for i in range(1 if packed else count):
            source, to, numbers = rows + i * n * size, target + i * x.inner, count * n if packed else n
            if x.write == 0:
                vector.copy(source, to, numbers * size)
            else:
                vector.call(x.write, source, size, to, x.classes, numbers)
        return
    for i in range(n):
        line = at_of(tile, i, 0, like)
        if x.write != 0:
            vector.call(x.write, line, size, target, x.inner, count)
        elif x.streamed and count == GROUP and target % 64 == 0:
            for w in range(0, GROUP, lanes_of(like)):
                vector.stream(target + w * size, read(line + w * size, zero))
        else:
            for w in range(0, count, lanes_of(like)):
                vector.prefetch_vector(target + LINES_AHEAD * x.classes + w * size)
                store(target + w * size, count - w, load(line + w * size, count - w, zero))
        target += x.classes
