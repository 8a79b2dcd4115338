"""Short rows that lie one after the other: a thread for each, and the number of classes is known.

The rows of a thread block come and go through shared memory, so that memory sees whole vectors. A
thread reads and writes its row there in pieces, as wide as rows of that length are aligned; a pitch
that is an odd number of pieces keeps the threads of a warp in different banks.

Texts, which take the place of those of `threads`: see `fastll.backend.cuda.folds`.
"""

# mypy: ignore-errors
# ruff: noqa: F403, F405

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastll.backend.cuda.compiler import cuda
from fastll.backend.cuda.primitives import (
    VECTOR,
    copy_row,
    expect_copies,
    larger,
)
from fastll.backend.cuda.threads import *

#: The byte in shared memory where rows are; before them, the barrier that copies in bulk arrive at.
ROWS_AT = VECTOR
#: Numbers that are added up before the sum goes on in two parts.
ADDED = 16


class PlaceInShared(NamedTuple):
    """Where a thread is."""

    first_row: int  # of the thread block
    present: int  # its rows
    outer: int  # the thread's row
    inner: int
    live: bool  # whether there is such a row
    lane: int
    apart: int
    at: int  # byte of the row in shared memory
    label: int
    divisor: float


def locate(call, memory):
    """The place of a thread, when its row is in shared memory."""
    first_row = np.int64(cuda.blockIdx.x) * cuda.blockDim.x
    thread = np.int32(cuda.threadIdx.x)
    present = np.int32(min(np.int64(cuda.blockDim.x), call.rows - first_row))
    row, live, label, divisor = first_row + thread, thread < present, np.int64(-1), c.one
    if not label_alone:
        bring(call.x.address + first_row * row_bytes, present, memory)
    if sparse and live:  # on its way together with the row
        label = read_label(call.labels.address + row * call.labels.outer)
    if written:
        divisor = read_divisor(call)
    if not label_alone:
        arrive(memory, np.int32(0))
    at = np.int32(ROWS_AT + thread * pitch)
    zero, one = np.int64(0), np.int64(1)
    return PlaceInShared(first_row, present, row, zero, live, zero, one, at, label, divisor)


def label_of(call, place):
    """The label of the row, as it is stored."""
    return place.label


def divisor_of(call, place):
    return place.divisor


# between global and shared memory


def place_in_rows(offset):
    """The byte in shared memory of one of the thread block's rows."""
    if pitch == row_bytes:
        return np.int32(ROWS_AT + offset)
    row = np.uint32(offset) // np.uint32(row_bytes)
    return np.int32(ROWS_AT + offset + row * (pitch - row_bytes))


def bring(address, present, memory):
    """Start to copy rows to shared memory; `arrive` ends it."""
    if in_bulk and cuda.threadIdx.x == 0:
        expect_copies(memory, np.int32(0), np.int32(1))
        whole = whole_of(address, np.int32(present * row_bytes))
        copy_row(memory, np.int32(0), np.int32(ROWS_AT), address, whole)
    pass_rows(address, present, memory, not in_bulk, copy_vector, bring_element)


def take_away(address, present, memory):
    """Copy rows from shared memory."""
    cuda.syncthreads()
    pass_rows(address, present, memory, True, deliver_from, write_from)


def whole_of(address, end):
    """The bytes of rows that are whole vectors of the memory."""
    return np.int32(end & ~(VECTOR - 1)) if address & (VECTOR - 1) == 0 else np.int32(0)


def pass_rows(address, present, memory, vectors, pass_vector, pass_element):
    """Copy rows to or from shared memory, without their whole vectors if these are not asked for."""
    thread, end = np.int32(cuda.threadIdx.x), np.int32(present * row_bytes)
    whole = whole_of(address, end)
    if vectors:
        offset = np.int32(thread * VECTOR)
        while offset < whole:
            pass_vector(memory, place_in_rows(offset), address + offset)
            offset = np.int32(offset + cuda.blockDim.x * VECTOR)
    offset = np.int32(whole + thread * size)
    while offset < end:
        pass_element(memory, place_in_rows(offset), address + offset)
        offset = np.int32(offset + cuda.blockDim.x * size)


def bring_element(memory, at, address):
    copy_x(memory, at, address, True)


def element(call, place, memory, j):
    if label_alone:
        return read_x(start_of(call.x, place) + j * size)
    return read_shared(memory, np.int32(place.at + j * size))


# fold


def fold(call, place, values, second, memory):
    """The state of a row: its maximum first, then its exponentials."""
    x, top = cuda.local.array(piece, real), -c.infinity
    if place.live:
        for k in range(pieces):
            fetch_piece(x, memory, np.int32(place.at + k * width))
            for i in range(piece):
                top = larger(top, x[i])
    top = tempered_element(call, top)
    ref, total, equal, away = reference(top), nothing, c.zero, nothing
    if place.live:
        together, more = c.zero, c.zero
        for k in range(pieces):
            fetch_piece(x, memory, np.int32(place.at + k * width))
            for i in range(piece):
                v = tempered_element(call, x[i])
                e = relative(v, ref)
                if v == top:
                    equal += c.one
                else:
                    together += e
                if entropic:
                    more += distance(v, e, top)
                x[i] = e
            if held:
                put_piece(x, memory, np.int32(place.at + k * width))
            if k % flush == flush - 1:
                total, together = plus(total, together), c.zero
                if entropic:
                    away, more = plus(away, more), c.zero
        total, away = plus(total, together), plus(away, more)
    below, away = relative_to(ref.lead, total), relative_to(ref.lead, away)
    return State(top, below, equal if top > -c.infinity else c.zero, away, nothing), ref


def merge(call, place, state, memory):
    return state


# write


def write(call, place, label, row, ref, values, second, memory):
    """Write what has the shape of a row."""
    if not written:
        return
    if place.live:
        if dropping and label.sample == c.zero:
            x = cuda.local.array(piece, real)
            for i in range(piece):
                x[i] = c.zero
            for k in range(pieces):
                put_piece(x, memory, np.int32(place.at + k * width))
        else:
            write_row(call, place, row, ref, memory)
            if sparse and label.number >= 0:
                write_shared(memory, np.int32(place.at + label.number * size), row.at_label)
    take_away(call.out.address + place.first_row * row_bytes, place.present, memory)


def write_row(call, place, row, ref, memory):
    x, writer = cuda.local.array(piece, real), writer_of(row, ref, c.one / c.unshift)
    for k in range(pieces):
        if not label_alone:
            fetch_piece(x, memory, np.int32(place.at + k * width))
        for i in range(piece):
            t, j = call.spread, k * piece + i
            if dense or divergence:
                t = target_of(call, second_element(call, place, j), j)
            elif weighted_classes and targets:
                t = target_of(call, c.zero, j)
            x[i] = written_of(call, x[i], t, row, writer)
        put_piece(x, memory, np.int32(place.at + k * width))
