"""Rows whose classes are contiguous, each read once: a team of threads copies a row to shared memory.

There the team reads it as often as a formula needs: for its maximum, its sums, and what is written. A
row longer than what a thread block holds is shared by the blocks of a cluster, each with a segment; or
a thread block takes it in chunks, and copies it once more to write. If a row's length is no multiple of
a vector, vectors are aligned to memory, not to the row: the first and the last one are then copied and
written element by element, and hold -inf where they are not the row's.

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
from fastll.backend.cuda.primitives import (
    VECTOR,
    cluster_barrier,
    cluster_rank,
    cluster_started,
    cluster_wait,
    copy_row,
    expect_copies,
    larger,
    shared_words,
)
from fastll.backend.cuda.rows import *

#: Numbers of a kind that a thread block leaves in shared memory: one for each warp, or for each team.
SLOTS = 16
#: Places there: what the warps and then the teams have found, and what became of it. (Each
#: Python integer would make further versions of the functions that take it.)
TOPS, SUMS, EQUALS, DISTANCES, MASSES, RESULTS = (np.int64(SLOTS * i) for i in range(6))
FINISHED = RESULTS + 4 * SLOTS
#: And those of a second array of logits.
TARGET_TOPS, TARGET_SUMS, TARGET_EQUALS = (FINISHED + np.int64(SLOTS * i) for i in range(8, 11))
#: Of halves, what exponentials take to become what is written.
WRITER = TARGET_EQUALS + SLOTS
#: The state of this block, and those of all blocks of its cluster: of a number, one after the other.
OWN = WRITER + np.int64(3 * SLOTS)
OF_PEERS = OWN + np.int64(2 * PARTS)
#: The barrier that copies in bulk arrive at.
ARRIVALS = OF_PEERS + np.int64(2 * PARTS * PEERS)
#: Numbers before those by which lanes are exchanged, which are before the rows.
SCRATCH = int(ARRIVALS) + 4


class Place(NamedTuple):
    """Where a thread is. One thread per team, all of the first warp, finishes the team's row; the
    others of that warp do the same as the last of them."""

    row: int  # of the thread's team
    first: int  # class of the thread block, and the end of its classes
    last: int
    ragged: bool  # whether rows are no multiple of a vector
    shift: int  # elements from the vector in memory that the row begins in to its beginning
    rank: int  # of the thread block in its cluster
    member: int  # the team whose row the thread finishes
    own_row: int  # that row
    live: bool  # whether there is one
    label: int  # of the team's row, and of the row that the thread finishes
    own_label: int
    divisor: float


class Part(NamedTuple):
    """A chunk of a row."""

    begin: int
    length: int
    shift: int
    ragged: bool
    at: int  # byte in shared memory, and the end of its vectors
    end: int


def locate(call, memory):
    """The `Place` of a thread, when the first chunk of its row is in shared memory."""
    teams = cuda.blockDim.y
    rank, group = 0, np.int64(cuda.blockIdx.x)
    if clustered:
        cluster_started()
        rank, group = cluster_rank(), group // cluster
    elif in_parts:
        group, rank = group // call.parts, group % call.parts
    row = group * teams + cuda.threadIdx.y
    ragged = not aligned and (call.classes & (lanes - 1)) != 0
    first = rank * call.segment
    last = min(call.classes, first + call.segment) if row < call.rows else first
    number = np.int64(cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x)
    member = min(number, np.int64(teams - 1))
    own_row = group * teams + member
    live = number < teams and own_row < call.rows
    shift = shift_of(call, row)
    label, own_label, divisor = np.int64(-1), np.int64(-1), c.one
    # on their way together with the row: nothing here waits for them
    if sparse and written and row < call.rows:
        label = read_label(call.labels.address + row * call.labels.outer)
    if sparse and live:
        own_label = read_label(call.labels.address + own_row * call.labels.outer)
    if written and (live or targets):
        divisor = read_divisor(call)
    place = Place(
        row, first, last, ragged, shift, rank, member, own_row, live, label, own_label, divisor
    )
    if not label_alone:
        bring(call, place, part_of(call, place, first), memory)
        arrive(memory, np.int32(ARRIVALS * real_size))
    return place


def shift_of(call, row):
    """Elements from the vector in memory that a row begins in to its beginning."""
    if aligned or call.classes & (lanes - 1) == 0:
        return np.int32(0)
    return np.int32(((call.x.address + row * call.x.outer) & (VECTOR - 1)) // size)


def row_of(operand, place):
    """Address of the row of the thread's team, or of its entry."""
    return operand.address + place.row * operand.outer


def start_of(operand, place):
    """The same of the row that the thread finishes."""
    return operand.address + place.own_row * operand.outer


def label_of(call, place):
    """The label of the row that the thread finishes, as it is stored."""
    return place.own_label


def element(call, place, memory, j):
    """An element of the row that the thread finishes. Another team may be changing its row already."""
    here = not (clustered or in_parts) or (place.first <= j and j < place.first + call.segment)
    if chunked or label_alone or several or not here:
        return read_x(start_of(call.x, place) + j * size)
    at = start_of_rows(call, np.int32(place.member))
    return read_shared(memory, np.int32(at + (j - place.first + shift_of(call, place.own_row)) * size))


def start_of_rows(call, team):
    """The byte in shared memory where a team has its row, which its second input follows."""
    return np.int32(call.rows_at + team * (call.pitch * inputs))


def part_of(call, place, begin):
    length = np.int32(max(min(call.capacity, place.last - begin), 0))
    vectors = np.int32(np.uint32(length + place.shift + (lanes - 1)) // np.uint32(lanes))
    at = start_of_rows(call, np.int32(cuda.threadIdx.y))
    return Part(begin, length, place.shift, place.ragged, at, np.int32(at + vectors * VECTOR))


# load


def bring(call, place, part, memory):
    """Start to copy a chunk to shared memory; `arrive` ends it."""
    if in_bulk:
        bring_rows(call, place, memory)
    copy_part(row_of(call.x, place), part, memory, part.at, copy_x)
    if paired:
        at = np.int32(part.at + call.pitch)
        copy_part(row_of(call.second, place), part, memory, at, copy_second)


def bring_rows(call, place, memory):
    """Start to copy the whole vectors of all rows of a thread block, a thread for each."""
    arrivals, teams = np.int32(ARRIVALS * real_size), np.int32(cuda.blockDim.y)
    thread = np.int32(cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x)
    if thread < WARP:
        if thread == 0:
            expect_copies(memory, arrivals, np.int32(teams * inputs))
        cuda.syncwarp()
        if thread < teams:
            last = min(call.classes, place.first + call.segment)
            length = np.int32(max(last - place.first, 0) if place.live else 0)
            shift, at = shift_of(call, place.own_row), start_of_rows(call, thread)
            copy_vectors(call.x, place, length, shift, memory, arrivals, at)
            if paired:
                copy_vectors(call.second, place, length, shift, memory, arrivals, at + call.pitch)


def copy_vectors(operand, place, length, shift, memory, arrivals, at):
    """Start to copy the whole vectors of a row, if there are any, for the thread that finishes it."""
    source = start_of(operand, place) + place.first * size - shift * size
    first, whole = whole_vectors(length, shift)
    if not aligned and source & (VECTOR - 1) != 0:
        whole = np.int32(0)
    copy_row(memory, arrivals, np.int32(at + first), source + first, max(whole - first, 0))


def whole_vectors(length, shift):
    """The bytes from the vector that a chunk begins in to its first whole one, and to their end."""
    whole = np.int32(np.uint32(length + shift) // np.uint32(lanes) * VECTOR)
    return np.int32(VECTOR if shift != 0 else 0), whole


def copy_part(row, part, memory, at, copy_element):
    """Start to copy a chunk of a row; if rows come in bulk, what is not their whole vectors."""
    thread, team = np.int32(cuda.threadIdx.x), np.int32(cuda.blockDim.x)
    # a vector of the memory, if these are those of the first input
    source = row + part.begin * size - part.shift * size
    end = np.int32(at + (part.end - part.at))
    first, whole = whole_vectors(part.length, part.shift)
    first, whole = np.int32(at + first), np.int32(at + whole)
    if not aligned:
        if source & (VECTOR - 1) != 0:
            for to in range(at + thread * size, end, team * size):
                copy_edge(part, memory, np.int32(to), source, np.int32(to - at), copy_element)
            return
        if thread < 2 * lanes:  # the vectors that only in part are the row's
            edge, wanted = np.int32(at), part.shift != 0 and whole > at
            if thread >= lanes:
                edge, wanted = whole, whole < end
            if wanted:
                to = np.int32(edge + (thread & (lanes - 1)) * size)
                copy_edge(part, memory, to, source, np.int32(to - at), copy_element)
    if not in_bulk:
        step, to = np.int32(team * VECTOR), np.int32(first + thread * VECTOR)
        source += to - at
        while to < whole:
            copy_vector(memory, to, source)
            to, source = np.int32(to + step), source + step


def copy_edge(part, memory, to, source, offset, copy_element):
    """Copy an element if it is of the chunk."""
    j = np.int32(np.uint32(offset) // np.uint32(size) - part.shift)
    copy_element(memory, to, source + offset, np.uint32(j) < np.uint32(part.length))


def first_of(part):
    """The byte of the thread's first vector, and the step to its next one."""
    return np.int32(part.at + cuda.threadIdx.x * VECTOR), np.int32(cuda.blockDim.x * VECTOR)


def nth(at, i, part):
    """Number in the chunk of element i of the vector at a byte; below 0 before the chunk."""
    return np.int32(np.uint32(at - part.at) // np.uint32(size) + i - part.shift)


def inside(at, i, part):
    """Whether element i of a vector is one of the chunk."""
    return aligned or np.uint32(nth(at, i, part)) < np.uint32(part.length)


def logit_of(call, x, at, i, part):
    """What formulas take of an element; -inf where there is none."""
    x = tempered_element(call, x)
    if capped:
        x = softcap(x, call.softcap)[0]
        if not inside(at, i, part):
            x = -c.infinity
    return x


def find_targets(call, part, u, memory, at):
    """The targets of a vector, 0 where there are none; or its target logits, -inf there."""
    if dense or divergence:
        fetch_second(u, memory, np.int32(at + call.pitch))
    for i in range(lanes):
        if divergence:
            u[i] = target_of(call, u[i], np.int64(0))
        else:
            value = c.zero
            if inside(at, i, part):
                value = target_of(call, u[i], part.begin + nth(at, i, part))
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
        ref = fold_part(call, part, values, second, lane, memory)
        cuda.syncthreads()
        if warp() == 0:
            found = collected(memory, place.member, ref)
            state = merged(state, found) if chunked else found
        begin += call.capacity
        if not chunked or begin >= place.last:
            break
        bring(call, place, part_of(call, place, begin), memory)
        arrive(memory, np.int32(ARRIVALS * real_size))
    return state, ref


def fold_part(call, part, x, u, lane, memory):
    """Leave the sums of a chunk for `collected`; its reference."""
    own = largest(part, x, memory, fetch_x, np.int32(0))
    top = maximum_of_team(own, memory, TOPS)
    among = has_maximum(own, top)
    if capped or tempered:
        top = tempered_element(call, top)
        if capped:
            top = softcap(top, call.softcap)[0] if part.length > 0 else top
    ref = reference(top)
    if targets:
        post_distances(call, part, x, u, finite(top), lane, memory)
    post_exponentials(call, part, x, ref, among, lane, memory)
    if several and cuda.threadIdx.x == 0:
        memory[np.uint32(RESULTS + cuda.threadIdx.y)] = ref.maximum
        memory[np.uint32(RESULTS + SLOTS + cuda.threadIdx.y)] = ref.lead
    return ref


def largest(part, x, memory, fetch, offset):
    """The largest of the thread's elements; NaN are passed over."""
    at, step = first_of(part)
    top = -c.infinity
    if packable:
        words, most = cuda.local.array(4, np.int32), cuda.local.array(4, np.int32)
        for k in range(4):
            most[k] = lowest
        while at + step < part.end:
            for i in range(2):
                raise_words(most, words, memory, np.int32(at + offset + i * step))
            at = np.int32(at + 2 * step)
        if at < part.end:
            raise_words(most, words, memory, np.int32(at + offset))
        word = larger_words(larger_words(most[0], most[1]), larger_words(most[2], most[3]))
        top = larger(lower_half(word), upper_half(word))
    else:
        while at < part.end:
            fetch(x, memory, np.int32(at + offset))
            for i in range(lanes):
                top = larger(top, x[i])
            at = np.int32(at + step)
    return top


def raise_words(most, words, memory, at):
    """The larger halves of words and of those of a vector."""
    shared_words(words, memory, at)
    for k in range(4):
        most[k] = larger_words(words[k], most[k])


def has_maximum(own, top):
    """Whether a thread of the warp has the maximum of the team."""
    return cuda.any_sync(0xFFFFFFFF, not own < top)


def post_distances(call, part, x, u, base, lane, memory):
    """Leave the sums of the targets and of their distances from the maximum."""
    masses = cuda.local.array(lanes, real)
    clear(masses)
    at, step = first_of(part)
    while at < part.end:
        fetch_x(x, memory, at)
        find_targets(call, part, u, memory, at)
        for i in range(lanes):
            lane[i] += distance(logit_of(call, x[i], at, i, part), u[i], base)
            masses[i] += u[i]
        at = np.int32(at + step)
    post_lanes(lane, part, memory, DISTANCES)
    post_lanes(masses, part, memory, MASSES)


def post_exponentials(call, part, x, ref, among, lane, memory):
    """Leave the sum of the exponentials below the maximum, the number of elements there, and the
    distances that the entropy takes. Only the warps `among` whose elements the maximum is compare."""
    away, equal = cuda.local.array(lanes, real), c.zero
    clear(away)
    at, step = first_of(part)
    if among or offset_of(ref) != c.zero:
        while at < part.end:
            equal += exponentials_of(call, part, x, ref, True, lane, away, memory, at)
            at = np.int32(at + step)
    else:
        while at + step < part.end:
            exponentials_of(call, part, x, ref, False, lane, away, memory, at)
            exponentials_of(call, part, x, ref, False, lane, away, memory, np.int32(at + step))
            at = np.int32(at + 2 * step)
        if at < part.end:
            exponentials_of(call, part, x, ref, False, lane, away, memory, at)
    if entropic:
        post_lanes(away, part, memory, DISTANCES)
    post_lanes(lane, part, memory, SUMS)
    post(equal, memory, EQUALS)


def exponentials_of(call, part, x, ref, compared, lane, away, memory, at):
    """Add those of a vector; the number of elements at the maximum, if they are compared."""
    equal = c.zero
    fetch_x(x, memory, at)
    for i in range(lanes):
        v = logit_of(call, x[i], at, i, part)
        if compared:
            e = relative(v, ref)
            if v == ref.maximum:
                equal += c.one
            else:
                lane[i] += e
        else:
            e = relative_near(v, ref)
            lane[i] += e
        if entropic:
            away[i] += distance(v, e, ref.maximum)
        x[i] = e
    if held:
        put_shared(x, memory, at)
    return equal


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
    """Lanes as they are without a shift, by way of shared memory: those of one number in their vector
    are neighbours there, so that threads meet different banks."""
    team, thread = np.int32(cuda.blockDim.x), np.int32(cuda.threadIdx.x)
    at = np.int32(SCRATCH + cuda.threadIdx.y * (lanes * team) + thread)
    for i in range(lanes):
        moved = np.int32(i - shift)  # of the whole team the same
        to = np.int32(at + (moved & (lanes - 1)) * team)
        if moved < 0:  # that of the thread before; the first one's is the last one's
            to = np.int32(to + (team - 1 if thread == 0 else -1))
        memory[np.uint32(to)] = lane[i]
    cuda.syncthreads()
    for i in range(lanes):
        lane[i] = memory[np.uint32(at + i * team)]
    cuda.syncthreads()


def collected(memory, member, ref):
    """The state of a chunk."""
    top, lead = ref.maximum, ref.lead
    if several:
        top = memory[np.uint32(RESULTS + member)]
        lead = memory[np.uint32(RESULTS + SLOTS + member)]
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
    """The state of a whole row, for who finishes it: each block writes its own to all of them."""
    if clustered:
        lane, step = np.int64(lane_of_warp()), np.int64(PEERS)
        if warp() == 0 and lane == 0:
            put(memory, OWN, np.int64(1), state)
        cluster_wait()  # a block that has not started has no memory
        if warp() == 0:
            cuda.syncwarp()
            if lane < cluster:
                for i in range(parts):
                    number = memory[np.uint32(OWN + i)]
                    write_peer(memory, np.int32(OF_PEERS + i * step + place.rank), lane, number)
        cluster_barrier()
        if warp() == 0:
            state = identity
            if lane < cluster:
                state = take(memory, OF_PEERS + lane, step)
            state = lifted_to_warp(state)
            for mask in (4, 2, 1):
                if mask < cluster:
                    state = together(state, state_across(state, mask))
    return state


def finish(call, place, label, state, memory):
    """Finish rows, and tell every thread what became of its own."""
    scale, at = gradient_scale(call, place.divisor, label), FINISHED + cuda.threadIdx.y
    if place.live:
        row = finished(call, state, label, scale)
        if place.rank == 0:
            store_results(call, place, label, row)
        if written or selected:
            numbers = row.maximum, row.log_s, row.factor, row.at_label
            leave(memory, FINISHED + place.member, np.int64(SLOTS), numbers)
            numbers = row.scale, row.mean, row.target_maximum, row.target_factor
            if sampled or entropic or divergence:
                leave(memory, FINISHED + 4 * SLOTS + place.member, np.int64(SLOTS), numbers)
            if on_line:
                line, first = lifted_line(reference(row.maximum), row.factor)
                at_writer = WRITER + place.member
                memory[np.uint32(at_writer)] = line.slope
                memory[np.uint32(at_writer + SLOTS)] = line.intercept
                memory[np.uint32(at_writer + 2 * SLOTS)] = first
    if written or selected:
        cuda.syncthreads()
    m, log_s, factor, at_label = c.zero, c.zero, c.zero, c.zero
    mean, target_maximum, target_factor = c.zero, c.zero, c.zero
    if (written or selected) and place.row < call.rows:
        m, log_s = memory[np.uint32(at)], memory[np.uint32(at + SLOTS)]
        factor, at_label = memory[np.uint32(at + 2 * SLOTS)], memory[np.uint32(at + 3 * SLOTS)]
        if sampled or entropic or divergence:
            scale, mean = memory[np.uint32(at + 4 * SLOTS)], memory[np.uint32(at + 5 * SLOTS)]
            target_maximum = memory[np.uint32(at + 6 * SLOTS)]
            target_factor = memory[np.uint32(at + 7 * SLOTS)]
    row = Finished(c.zero, m, log_s, factor, at_label, scale, mean, target_maximum, target_factor)
    if selected and place.row < call.rows and place.rank == 0:
        places = row_of(call.x, place), row_of(call.choices, place), row_of(call.selected, place)
        select(call, places, row, cuda.threadIdx.x, cuda.blockDim.x)
    return row


def finish_part(call, place, label, state, memory):
    """Leave the state of a part of a row, in float64, for `totals.merge_parts`."""
    if place.live:
        at = call.state.address + (place.own_row * call.parts + place.rank) * 24
        write_state(at, state.maximum)
        write_state(at + 8, np.float64(state.below.high) + np.float64(state.below.low))
        write_state(at + 16, state.at_maximum)
    return only(c.zero, c.zero, c.zero, c.zero)


# write


def write(call, place, label, row, ref, values, second, memory):
    """Write what has the shape of a row."""
    if not written or place.row >= call.rows:
        return
    y, counts, begin = np.int64(-1), True, np.int64(place.first)
    if sparse:
        y, counts = label_within(call, place.label)
    if sampled:
        counts = counts and row.scale != c.zero
    writer = writer_of_team(row, ref, memory)
    while True:
        part = part_of(call, place, begin)
        if chunked and not label_alone:
            cuda.syncthreads()
            bring(call, place, part, memory)
            arrive(memory, np.int32(ARRIVALS * real_size))
        write_part(call, row_of(call.out, place), part, counts, row, writer, values, second, memory)
        if sparse and counts and 0 <= y - begin < part.length:
            # by the thread that has stored the vector of this element
            vector = np.uint32(y - begin + part.shift) // np.uint32(lanes)
            if np.int32(vector % np.uint32(cuda.blockDim.x)) == cuda.threadIdx.x:
                write_out(row_of(call.out, place) + y * size, row.at_label)
        begin += call.capacity
        if not chunked or begin >= place.last:
            break


def writer_of_team(row, ref, memory):
    """The `Writer` of the team's row, where `ref` is what held exponentials are relative to."""
    if on_line:
        at = WRITER + cuda.threadIdx.y
        slope, intercept = memory[np.uint32(at)], memory[np.uint32(at + SLOTS)]
        line = Line(row.maximum, slope, intercept, c.zero)
        scales = Scales(c.zero, memory[np.uint32(at + 2 * SLOTS)], c.one)
        return Writer(line, scales, line, scales)
    fall = c.one / c.unshift
    if apart:
        fall = exp_minus_scaled(ref.maximum, row.maximum)
    return writer_of(row, ref if held else reference(row.maximum), fall)


def write_part(call, out, part, counts, row, writer, x, u, memory):
    at, step = first_of(part)
    target = out + part.begin * size - part.shift * size
    # the vectors that are whole, in the memory as well
    first, whole = whole_vectors(part.length, part.shift)
    if not aligned and target & (VECTOR - 1) != 0:
        whole = first
    first, whole = np.int32(part.at + first), np.uint32(max(whole - first, 0))
    target += at - part.at
    if dropping and not counts:
        clear(x)
        while at < part.end:
            store(target, first, whole, x, at, part)
            at, target = np.int32(at + step), target + step
    while at < part.end:
        if not nll:
            fetch_x(x, memory, at)
        if dense or weighted_classes or divergence:
            find_targets(call, part, u, memory, at)
        for i in range(lanes):
            t = call.spread  # which takes no register
            if dense or weighted_classes or divergence:
                t = u[i]
            x[i] = written_of(call, x[i], t, row, writer)
        store(target, first, whole, x, at, part)
        at, target = np.int32(at + step), target + step


def store(target, first, whole, x, at, part):
    """Write a vector, element by element if it is none of the `whole` bytes from `first` on."""
    if aligned or np.uint32(at - first) < whole:
        deliver(target, x, 0)
    else:
        j = nth(at, 0, part)
        for i in range(lanes):
            if np.uint32(j + i) < np.uint32(part.length):
                write_out(target + i * size, x[i])
