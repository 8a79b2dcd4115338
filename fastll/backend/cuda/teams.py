"""Rows whose classes are contiguous, each read once: a team of threads holds a row in its registers.

A thread holds a few vectors of 16 bytes. A row longer than what a team holds is shared by the blocks
of a cluster, each with a segment; or a thread block takes it in chunks, and reads it once more to
write. If a row's length is no multiple of a vector, vectors are aligned to memory, not to the row: the
first and the last one are then read and written element by element.

The order of a sum depends on the number of classes alone. Element j of a chunk is in lane j modulo
(lanes of a vector x threads), wherever the chunk begins in memory: lanes that a shift has moved to
another thread are exchanged before they fold.

Texts, bound to the names of a variant: see `fastll.backend.cuda.folds`.
"""

# mypy: ignore-errors
# ruff: noqa: F403, F405

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastll.backend.cuda.compiler import cuda
from fastll.backend.cuda.primitives import VECTOR, cluster_barrier, cluster_rank, larger
from fastll.backend.cuda.rows import *

#: Places in shared memory: what the warps and then the teams have found, and what became of it. (Each
#: Python integer would make further versions of the functions that take it.)
TOPS, SUMS, EQUALS, DISTANCES, MASSES, RESULTS = (np.int64(WARPS * i) for i in range(6))
FINISHED = RESULTS + 4 * WARPS
#: And those of a second array of logits.
TARGET_TOPS, TARGET_SUMS, TARGET_EQUALS = (FINISHED + np.int64(WARPS * i) for i in range(8, 11))
#: Numbers before those by which lanes are exchanged.
SCRATCH = int(TARGET_EQUALS) + WARPS


class Place(NamedTuple):
    """Where a thread is. One thread per team, all of them of one warp, finishes the team's row."""

    row: int  # of the thread's team
    first: int  # class of the thread block, and the end of its classes
    last: int
    ragged: bool  # whether rows are no multiple of a vector
    shift: int  # elements from the vector in memory that the row begins in to its beginning
    rank: int  # of the thread block in its cluster
    member: int  # the team whose row the thread finishes
    own_row: int  # that row
    live: bool  # whether there is one


class Part(NamedTuple):
    """A chunk of a row."""

    begin: int
    length: int
    shift: int
    ragged: bool


def locate(call, memory):
    """The `Place` of a thread."""
    teams = cuda.blockDim.y
    rank, group = 0, np.int64(cuda.blockIdx.x)
    if clustered:
        rank, group = cluster_rank(), group // cluster
    row, shift = group * teams + cuda.threadIdx.y, np.int32(0)
    ragged = not aligned and (call.classes & (lanes - 1)) != 0
    if ragged:
        shift = np.int32(((call.x.address + row * call.x.outer) & (VECTOR - 1)) // size)
    first = rank * call.segment
    last = min(call.classes, first + call.segment) if row < call.rows else first
    member = cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    own_row = group * teams + member
    live = member < teams and own_row < call.rows
    return Place(row, first, last, ragged, shift, rank, member, own_row, live)


def row_of(operand, place):
    """Address of the row of the thread's team, or of its entry."""
    return operand.address + place.row * operand.outer


def start_of(operand, place):
    """The same of the row that the thread finishes."""
    return operand.address + place.own_row * operand.outer


def element(call, place, memory, j):
    return read_x(start_of(call.x, place) + j * size)


def part_of(call, place, begin):
    length = np.int32(min(call.capacity, place.last - begin))
    return Part(begin, length, place.shift, place.ragged)


# load


def nth(i, shift):
    """Number in the chunk of the first element of the vector that the thread holds from its i-th number
    on; below 0 before the chunk."""
    return np.int32(np.int32(cuda.threadIdx.x + i // lanes * cuda.blockDim.x) * lanes - shift)


def inside(i, part):
    """Whether the thread's i-th number is an element of the chunk."""
    return np.uint32(nth(i, part.shift) + i % lanes) < np.uint32(part.length)


def whole_below(address, part):
    """The number below which vectors are whole, in memory as well; 0 if the memory's are others."""
    if not aligned and (address - part.shift * size) & (VECTOR - 1) != 0:
        return np.uint32(0)
    return np.uint32(max(part.length - (lanes - 1), 0))


def load(fetch, values, row, part):
    """The thread's elements of a chunk; others are as `fetch` leaves what is not wanted."""
    source = row + part.begin * size
    limit = whole_below(source, part)
    for i in range(0, count, lanes):
        j = nth(i, part.shift)
        fetch(values, i, source + j * size, np.uint32(j) < limit)  # nor one below 0
    if not aligned:
        for i in range(0, count, lanes):
            j = nth(i, part.shift)
            if j < part.length and not np.uint32(j) < limit:
                for k in range(lanes):
                    if np.uint32(j + k) < np.uint32(part.length):
                        values[i + k] = read_x(source + (j + k) * size)


def find_targets(call, place, part, u):
    """The thread's targets u, 0 where it has none; or its target logits, -inf there."""
    if dense or divergence:
        load(fetch_second, u, row_of(call.second, place), part)
    if divergence:
        change(call, part, u)
        return
    for i in range(count):
        value = c.zero
        if inside(i, part):
            value = target_of(call, u[i], part.begin + nth(i, part.shift) + i % lanes)
        u[i] = value


# fold


def fold(call, place, values, second, memory):
    """The state of the thread block's part of a row, for who finishes it; the reference of its last
    chunk."""
    lane = cuda.local.array(lanes, real)
    clear(lane)
    state, ref, begin = identity, reference(-c.infinity), np.int64(place.first)
    while True:
        part = part_of(call, place, begin)
        load(fetch_x, values, row_of(call.x, place), part)
        ref = fold_part(call, place, part, values, second, lane, memory)
        cuda.syncthreads()
        if place.live:
            found = collected(memory, place.member, ref)
            state = merged(state, found) if chunked else found
        begin += call.capacity
        if not chunked or begin >= place.last:
            break
    return state, ref


def fold_part(call, place, part, values, u, lane, memory):
    """Leave the sums of a chunk for `collected`; its reference."""
    change(call, part, values)
    ref = reference(maximum_of_team(largest(values), memory, TOPS))
    if targets:
        find_targets(call, place, part, u)
        base = finite(ref.maximum)
        for i in range(count):
            lane[i % lanes] += distance(values[i], u[i], base)
        post_lanes(lane, part, memory, DISTANCES)
        for i in range(count):
            lane[i % lanes] += u[i]
        post_lanes(lane, part, memory, MASSES)
    post_exponentials(part, values, ref, lane, memory)
    if cuda.blockDim.y > 1 and cuda.threadIdx.x == 0:
        memory[np.uint32(RESULTS + cuda.threadIdx.y)] = ref.maximum
        memory[np.uint32(RESULTS + WARPS + cuda.threadIdx.y)] = ref.lead
    return ref


def change(call, part, values):
    """Make of elements what the formulas take."""
    if capped or tempered:
        for i in range(count):
            if inside(i, part):
                values[i] = tempered_element(call, values[i])
                if capped:
                    values[i] = softcap(values[i], call.softcap)[0]


def largest(values):
    top = values[0]
    for i in range(1, count):
        top = larger(top, values[i])
    return top


def post_exponentials(part, values, ref, lane, memory):
    equal, level = c.zero, ref.maximum
    away = cuda.local.array(lanes, real)
    clear(away)
    if ref.offset != c.zero:
        level = ref.maximum - ref.offset
        if not plain:
            for i in range(count):
                values[i] -= ref.offset
    for i in range(count):
        v = values[i] - ref.offset if plain else values[i]
        e = exponential(v, ref.floor, ref.magic)
        if v == level:  # not by selects: with these it takes 8 registers more
            equal += c.one
        else:
            lane[i % lanes] += e
        if entropic:
            away[i % lanes] += distance(v, e, level)
        if held:
            values[i] = e
    if entropic:
        post_lanes(away, part, memory, DISTANCES)
    post_lanes(lane, part, memory, SUMS)
    post(equal, memory, EQUALS)


def clear(lane):
    for i in range(lanes):
        lane[i] = c.zero


def post_lanes(lane, part, memory, at):
    """Leave the sum of the team's lanes for `collect`, and them empty."""
    if part.ragged:
        in_order(lane, part.shift, memory)
    value = lane[0]
    for i in range(1, lanes):
        value += lane[i]
    clear(lane)
    post(value, memory, at)


def in_order(lane, shift, memory):
    """Lanes as they are without a shift, by way of shared memory."""
    together = lanes * cuda.blockDim.x
    at, first = SCRATCH + cuda.threadIdx.y * together, lanes * cuda.threadIdx.x
    for i in range(lanes):
        moved = first + i - shift
        memory[np.uint32(at + (moved if moved >= 0 else moved + together))] = lane[i]
    cuda.syncthreads()
    for i in range(lanes):
        lane[i] = memory[np.uint32(at + first + i)]
    cuda.syncthreads()


def collected(memory, member, ref):
    """The state of a chunk."""
    top, lead = ref.maximum, ref.lead
    if cuda.blockDim.y > 1:
        top = memory[np.uint32(RESULTS + member)]
        lead = memory[np.uint32(RESULTS + WARPS + member)]
    below, equal = collect(memory, SUMS, member), collect(memory, EQUALS, member)
    away, mass = nothing, nothing
    if targets:
        away, mass = collect(memory, DISTANCES, member), collect(memory, MASSES, member)
    if entropic:
        away = relative_to(lead, collect(memory, DISTANCES, member))
    at_maximum = equal.high if top > -c.infinity else c.zero
    return State(top, relative_to(lead, below), at_maximum, away, mass)


# merge, finish


def merge(call, place, state, memory):
    """The state of a whole row, for who finishes it."""
    if clustered:
        if place.live:
            put(memory, RESULTS, np.int64(1), state)
        cluster_barrier()
        if place.live:
            state = take(memory, RESULTS, np.int64(1), np.int64(0))
            for peer in range(np.int64(1), np.int64(cluster)):
                state = merged(state, take(memory, RESULTS, np.int64(1), peer))
    return state


def finish(call, place, label, state, memory):
    """Finish rows, and tell every thread what became of its own."""
    scale, at = gradient_scale(call, label), FINISHED + cuda.threadIdx.y
    if place.live:
        row = finished(call, state, label, scale)
        if place.rank == 0:
            store_results(call, place, label, row)
        if written or selected:
            numbers = row.maximum, row.log_s, row.factor, row.at_label
            leave(memory, FINISHED + place.member, np.int64(WARPS), numbers)
            numbers = row.scale, row.mean, row.target_maximum, row.target_factor
            if sampled or entropic or divergence:
                leave(memory, FINISHED + 4 * WARPS + place.member, np.int64(WARPS), numbers)
    if clustered:
        cluster_barrier()  # before a block is gone whose memory another one reads
    elif written or selected:
        cuda.syncthreads()
    m, log_s, factor, at_label = c.zero, c.zero, c.zero, c.zero
    mean, target_maximum, target_factor = c.zero, c.zero, c.zero
    if (written or selected) and place.row < call.rows:
        m, log_s = memory[np.uint32(at)], memory[np.uint32(at + WARPS)]
        factor, at_label = memory[np.uint32(at + 2 * WARPS)], memory[np.uint32(at + 3 * WARPS)]
        if sampled or entropic or divergence:
            scale, mean = memory[np.uint32(at + 4 * WARPS)], memory[np.uint32(at + 5 * WARPS)]
            target_maximum = memory[np.uint32(at + 6 * WARPS)]
            target_factor = memory[np.uint32(at + 7 * WARPS)]
    row = Finished(c.zero, m, log_s, factor, at_label, scale, mean, target_maximum, target_factor)
    if selected and place.row < call.rows and place.rank == 0:
        places = row_of(call.x, place), row_of(call.choices, place), row_of(call.selected, place)
        select(call, places, row, cuda.threadIdx.x, cuda.blockDim.x)
    return row


# write


def write(call, place, label, row, ref, values, second, memory):
    """Write what has the shape of a row."""
    if not written or place.row >= call.rows:
        return
    y, counts, begin = np.int64(-1), True, np.int64(place.first)
    if sparse:
        y, counts = label_within(call, row_of(call.labels, place))
    if sampled:
        counts = row.scale != c.zero
    fall = c.one / c.unshift
    if apart:
        fall = exp_minus_scaled(ref.maximum, row.maximum)
    if not held:
        ref = reference(row.maximum)
    writer = writer_of(row, ref, fall)
    while True:
        part = part_of(call, place, begin)
        if not kept:
            if not nll:
                load(fetch_x, values, row_of(call.x, place), part)
            if targets or divergence:
                find_targets(call, place, part, second)
        for i in range(count):
            u = call.spread  # which takes no register
            if dense or weighted_classes or divergence:
                u = second[i]
            values[i] = written_of(call, values[i], u, row, writer)
        if dropping and not counts:
            for i in range(count):
                values[i] = c.zero
        store(row_of(call.out, place), values, part)
        if sparse and counts and 0 <= y - begin < part.length:
            for i in range(0, count, lanes):  # by the thread that has stored this element
                j = nth(i, part.shift)
                if j <= np.int32(y - begin) and np.int32(y - begin) < j + lanes:
                    write_out(row_of(call.out, place) + y * size, row.at_label)
        begin += call.capacity
        if not chunked or begin >= place.last:
            break


def store(row, values, part):
    target = row + part.begin * size
    limit = whole_below(target, part)
    for i in range(0, count, lanes):
        j = nth(i, part.shift)
        if np.uint32(j) < limit:
            deliver(target + j * size, values, i)
        elif not aligned and j < part.length:
            for k in range(lanes):
                if np.uint32(j + k) < np.uint32(part.length):
                    write_out(target + (j + k) * size, values[i + k])
