"""Rows whose classes are contiguous, each read once: a team of threads holds a row in its registers.

A thread holds a few vectors of 16 bytes. A row longer than what a team holds is shared by the blocks
of a cluster, each with a segment; or a thread block takes it in chunks, and reads it once more to
write. If a row's length is no multiple of a vector, vectors are aligned to memory, not to the row: the
first and the last one are then read and written element by element.

The order of a sum depends on the number of classes alone. Element j of a chunk is in lane j modulo
(lanes of a vector x threads), wherever the chunk begins in memory: lanes that a shift has moved to
another thread are exchanged before they fold.
"""

# mypy: ignore-errors

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from fastll.backend.cuda import rows, warps
from fastll.backend.cuda.compiler import cuda, device
from fastll.backend.cuda.primitives import (
    VECTOR,
    cluster_barrier,
    cluster_rank,
    integer_reader,
    lanes_of,
    larger,
    reader,
    size_of,
    vector_reader,
    vector_writer,
    writer,
)
from fastll.backend.cuda.rows import Finished, State, Sum

WARPS = warps.WARPS
#: Places in shared memory: what the warps and then the teams have found, and what became of it.
TOPS, SUMS, EQUALS, DISTANCES, MASSES, RESULTS = (WARPS * i for i in range(6))
FINISHED = RESULTS + 2 * WARPS
#: Numbers before those by which lanes are exchanged.
SCRATCH = FINISHED + 4 * WARPS


class Place(NamedTuple):
    """Where a thread is. One thread per team, all of them of one warp, finishes the team's row."""

    row: int  # of the thread's team
    first: int  # class of the thread block, and the end of its classes
    last: int
    shift: int  # elements from the vector in memory that the row begins in to its beginning
    rank: int  # of the thread block in its cluster
    member: int  # the team whose row the thread finishes
    own_row: int  # that row
    finisher: bool


class Part(NamedTuple):
    """A chunk of a row."""

    begin: int
    length: int
    shift: int


def phases(variant):
    """The phases of `fastll.backend.cuda.folds` for rows in teams."""
    k, lanes = rows.kind(variant), lanes_of(variant.x)
    vectors = _vectors(variant)
    locate, find_label = _places(variant)
    fold_part, collected = (_terms if k.terms else _exponentials)(variant, vectors)
    return SimpleNamespace(
        held=variant.vectors * lanes,
        locate=locate,
        find_label=find_label,
        fold=_fold(variant, vectors, fold_part, collected),
        merge=_merge(variant),
        finish=_finish(variant),
        write=_write(variant, vectors),
    )


def _vectors(variant):
    """Access to a thread's elements of a chunk, and the exchange of its lanes."""
    lanes, size, aligned, vectors = (
        lanes_of(variant.x),
        size_of(variant.x),
        variant.aligned,
        variant.vectors,
    )
    read, write = reader(variant.x), writer(variant.x)
    deliver = vector_writer(variant.x, variant.modern)

    @device
    def place(q, shift):
        """Number in the chunk of the first element of the thread's vector q; below 0 before it."""
        return np.int32(np.int32(cuda.threadIdx.x + q * cuda.blockDim.x) * lanes - shift)

    @device
    def whole_below(address, part):
        """The place below which vectors are whole, in memory as well; 0 if the memory's are others."""
        if not aligned and (address - part.shift * size) & (VECTOR - 1) != 0:
            return np.uint32(0)
        return np.uint32(max(part.length - (lanes - 1), 0))

    def loader(pad):
        fetch = vector_reader(variant.x, pad)

        @device
        def load(values, row_address, part):
            """The thread's part of a chunk, and `pad` where it has none."""
            source = row_address + part.begin * size
            limit = whole_below(source, part)
            for q in range(vectors):
                j = place(q, part.shift)
                fetch(values, q * lanes, source + j * size, np.uint32(j) < limit)  # nor one below 0
            if not aligned:
                for q in range(vectors):
                    j = place(q, part.shift)
                    if j < part.length and not np.uint32(j) < limit:
                        for i in range(lanes):
                            if np.uint32(j + i) < np.uint32(part.length):
                                values[q * lanes + i] = read(source + (j + i) * size)

        return load

    @device
    def store(row_address, values, part):
        target = row_address + part.begin * size
        limit = whole_below(target, part)
        for q in range(vectors):
            j = place(q, part.shift)
            if np.uint32(j) < limit:
                deliver(target + j * size, values, q * lanes)
            elif not aligned and j < part.length:
                for i in range(lanes):
                    if np.uint32(j + i) < np.uint32(part.length):
                        write(target + (j + i) * size, values[q * lanes + i])

    return SimpleNamespace(
        place=place,
        load=loader(-np.inf),
        load_second=loader(0.0),
        store=store,
        post_lanes=_lanes(variant),
    )


def _lanes(variant):
    """Function (lane, part, ragged, memory, at): the team's sum of its lanes, for `collect`."""
    lanes, real = lanes_of(variant.x), rows.kind(variant).real
    post = warps.of(real).post

    @device
    def in_order(lane, shift, memory):
        """Lanes as they are without a shift, by way of shared memory."""
        together = lanes * cuda.blockDim.x
        at = SCRATCH + cuda.threadIdx.y * together
        first = lanes * cuda.threadIdx.x
        for i in range(lanes):
            moved = first + i - shift
            memory[np.uint32(at + (moved if moved >= 0 else moved + together))] = lane[i]
        cuda.syncthreads()
        for i in range(lanes):
            lane[i] = memory[np.uint32(at + first + i)]
        cuda.syncthreads()

    @device
    def post_lanes(lane, call, shift, memory, at):
        if not variant_aligned and (call.classes & (lanes - 1)) != 0:
            in_order(lane, shift, memory)
        value = lane[0]
        for i in range(1, lanes):
            value += lane[i]
        post(value, memory, at)

    variant_aligned = variant.aligned
    return post_lanes


def _places(variant):
    """Functions (call) of a thread's `Place`, and (call, place, memory) of the label of a row."""
    k, size, lanes, cluster = (
        rows.kind(variant),
        size_of(variant.x),
        lanes_of(variant.x),
        variant.cluster,
    )
    aligned, clustered, sparse = variant.aligned, cluster > 1, k.sparse
    read, zero, one = reader(variant.x), k.f.constant.zero, k.f.constant.one

    @device
    def locate(call, memory):
        teams = cuda.blockDim.y
        rank, group = 0, np.int64(cuda.blockIdx.x)
        if clustered:
            rank, group = cluster_rank(), group // cluster
        row = group * teams + cuda.threadIdx.y
        shift = np.int32(0)
        if not aligned and (call.classes & (lanes - 1)) != 0:
            shift = np.int32(((call.x.address + row * call.x.outer) & (VECTOR - 1)) // size)
        first = rank * call.segment
        last = min(call.classes, first + call.segment) if row < call.rows else first
        member = cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        own_row = group * teams + member
        finisher = member < teams and own_row < call.rows
        return Place(row, first, last, shift, rank, member, own_row, finisher)

    @device
    def logit(call, place, memory, y):
        return read(call.x.address + place.own_row * call.x.outer + y * size)

    find = rows.labels(variant)(logit)

    @device
    def find_label(call, place, memory):
        if sparse and place.finisher:
            return find(call, call.labels.address + place.own_row * call.labels.outer, place, memory)
        return rows.Label(np.int64(-1), True, zero, one, one)

    return locate, find_label


def _fold(variant, vectors, fold_part, collected):
    """Function (call, place, values, second, memory) of the state of a row's chunks, for who finishes
    it, and the reference of the last one."""
    k, chunked = rows.kind(variant), variant.chunked
    state_of = rows.folded_into(variant)
    identity, merged, reference = state_of.identity, state_of.merged, k.f.reference
    load, infinity = vectors.load, k.f.constant.infinity
    real, lanes = k.real, lanes_of(variant.x)

    @device
    def fold(call, place, values, second, memory):
        lane = cuda.local.array(lanes, real)
        state, ref, begin = identity(), reference(-infinity), np.int64(place.first)
        while True:
            length = np.int32(min(call.capacity, place.last - begin))
            part = Part(begin, length, place.shift)
            load(values, call.x.address + place.row * call.x.outer, part)
            ref = fold_part(call, place, part, values, second, lane, memory)
            cuda.syncthreads()
            if place.finisher:
                found = collected(memory, place.member, ref)
                state = merged(state, found) if chunked else found
            if not chunked:
                break
            begin += call.capacity
            if begin >= place.last:
                break
        return state, ref

    return fold


def _targets(variant, vectors):
    """Function (call, place, part, u) that finds the thread's targets u, 0 where it has none."""
    k, lanes, count = rows.kind(variant), lanes_of(variant.x), variant.vectors
    dense, target, zero = k.dense, rows.target_maker(variant), k.f.constant.zero
    place_of, load_second = vectors.place, vectors.load_second

    @device
    def find_targets(call, place, part, u):
        if dense:
            load_second(u, call.second.address + place.row * call.second.outer, part)
        for q in range(count):
            j = place_of(q, part.shift)
            for i in range(lanes):
                value = zero
                if 0 <= j + i < part.length:
                    value = target(call, u[q * lanes + i], part.begin + (j + i))
                u[q * lanes + i] = value

    return find_targets


def _exponentials(variant, vectors):
    """Functions that fold the elements of a chunk into sums, and collect these."""
    k, lanes = rows.kind(variant), lanes_of(variant.x)
    count, targets, logs, held = variant.vectors * lanes, k.targets, k.logs, _held(variant)
    f, zero, one, infinity = k.f, k.f.constant.zero, k.f.constant.one, k.f.constant.infinity
    states, group = rows.states(k.real, targets), warps.of(k.real)
    maximum, post, collect = group.maximum, group.post, group.collect
    reference, exponential, distance, finite = f.reference, f.exponential, f.distance, states.finite
    find_targets, post_lanes = _targets(variant, vectors), vectors.post_lanes
    cap_all = _cap(variant, vectors)

    @device
    def post_targets(call, part, values, u, top, lane, memory):
        for i in range(lanes):
            lane[i] = zero
        base = finite(top)
        for i in range(count):
            lane[i % lanes] += distance(values[i], u[i], base)
        post_lanes(lane, call, part.shift, memory, DISTANCES)
        for i in range(lanes):
            lane[i] = zero
        for i in range(count):
            lane[i % lanes] += u[i]
        post_lanes(lane, call, part.shift, memory, MASSES)

    @device
    def post_exponentials(call, part, values, ref, lane, memory):
        equal, level = zero, ref.maximum
        if ref.offset != zero:
            level = ref.maximum - ref.offset
            if not logs:
                for i in range(count):
                    values[i] -= ref.offset
        for i in range(lanes):
            lane[i] = zero
        for i in range(count):
            v = values[i] - ref.offset if logs else values[i]
            e = exponential(v, ref.floor, ref.magic)
            if v == level:  # not by selects: with these it takes 8 registers more
                equal += one
            else:
                lane[i % lanes] += e
            if held and not logs:
                values[i] = e
        post_lanes(lane, call, part.shift, memory, SUMS)
        post(equal, memory, EQUALS)

    @device
    def fold_part(call, place, part, values, u, lane, memory):
        cap_all(values, part, call.softcap)
        top = values[0]
        for i in range(1, count):
            top = larger(top, values[i])
        ref = reference(maximum(top, memory, TOPS))
        if targets:
            find_targets(call, place, part, u)
            post_targets(call, part, values, u, ref.maximum, lane, memory)
        post_exponentials(call, part, values, ref, lane, memory)
        if cuda.blockDim.y > 1 and cuda.threadIdx.x == 0:
            memory[np.uint32(RESULTS + cuda.threadIdx.y)] = ref.maximum
            memory[np.uint32(RESULTS + WARPS + cuda.threadIdx.y)] = ref.lead
        return ref

    @device
    def collected(memory, member, ref):
        top, lead = ref.maximum, ref.lead
        if cuda.blockDim.y > 1:
            top = memory[np.uint32(RESULTS + member)]
            lead = memory[np.uint32(RESULTS + WARPS + member)]
        below, equal = collect(memory, SUMS, member), collect(memory, EQUALS, member)
        away, mass = Sum(zero, zero), Sum(zero, zero)
        if targets:
            away, mass = collect(memory, DISTANCES, member), collect(memory, MASSES, member)
        count_at = equal.high if top > -infinity else zero
        return State(top, Sum(below.high / lead, below.low / lead), count_at, away, mass)

    return fold_part, collected


def _terms(variant, vectors):
    """Functions that fold the terms of a chunk, and collect their sum."""
    k, lanes, count = rows.kind(variant), lanes_of(variant.x), variant.vectors
    term, zero = rows.term_maker(variant), k.f.constant.zero
    two, infinity = variant.second is not None, k.f.constant.infinity
    place_of, load_second, post_lanes = vectors.place, vectors.load_second, vectors.post_lanes
    reference, collect = k.f.reference, warps.of(k.real).collect

    @device
    def fold_part(call, place, part, values, second, lane, memory):
        if two:
            load_second(second, call.second.address + place.row * call.second.outer, part)
        for i in range(lanes):
            lane[i] = zero
        for q in range(count):
            j = place_of(q, part.shift)
            for i in range(lanes):
                found = term(values, second, q * lanes + i)
                lane[i] += found if 0 <= j + i < part.length else zero
        post_lanes(lane, call, part.shift, memory, SUMS)
        return reference(-infinity)

    return fold_part, device(lambda memory, member, ref: collect(memory, SUMS, member))


def _cap(variant, vectors):
    """Function (values, part, cap) that caps what is within a chunk."""
    lanes, count, place_of = lanes_of(variant.x), variant.vectors, vectors.place
    softcap = rows.kind(variant).f.softcap

    @device
    def cap_all(values, part, cap):
        for q in range(count):
            j = place_of(q, part.shift)
            for i in range(lanes):
                if 0 <= j + i < part.length:
                    values[q * lanes + i] = softcap(values[q * lanes + i], cap)[0]

    return cap_all if variant.capped else device(lambda values, part, cap: None)


def _held(variant):
    """Whether exponentials stay in registers until they are written: the slope of the cap needs the
    elements themselves once more."""
    return variant.out is not None and not variant.capped and not variant.chunked


def _merge(variant):
    """Function (call, place, state, memory) of the state of a whole row, for who finishes it."""
    state_of, cluster = rows.folded_into(variant), variant.cluster
    merged, put, take_from_peer = state_of.merged, state_of.put, state_of.take_from_peer

    @device
    def merge(call, place, state, memory):
        if place.finisher:
            put(memory, RESULTS, 1, state)
        cluster_barrier()
        if place.finisher:
            state = take_from_peer(memory, RESULTS, 1, np.int64(0))
            for peer in range(np.int64(1), np.int64(cluster)):
                state = merged(state, take_from_peer(memory, RESULTS, 1, peer))
        return state

    return merge if cluster > 1 else device(lambda call, place, state, memory: state)


def _finish(variant):
    """Function (call, place, label, state, memory) that finishes rows, for every thread."""
    finished, store = rows.finishes(variant), rows.results(variant)
    clustered, written = variant.cluster > 1, variant.out is not None
    zero, gradient_scale = rows.kind(variant).f.constant.zero, rows.gradient_scales(variant)

    @device
    def finish(call, place, label, state, memory):
        scale = gradient_scale(call)
        if place.finisher:
            row = finished(call, state, label, scale)
            if place.rank == 0:
                value = call.value.address + place.own_row * call.value.outer
                store(call, value, call.lse.address + place.own_row * call.lse.outer, row)
            if written:
                at = FINISHED + place.member
                memory[np.uint32(at)], memory[np.uint32(at + WARPS)] = row.maximum, row.factor
                memory[np.uint32(at + 2 * WARPS)] = row.log_s
                memory[np.uint32(at + 3 * WARPS)] = row.at_label
        if clustered:
            cluster_barrier()  # before a block is gone whose memory another one reads
        elif written:
            cuda.syncthreads()
        if not written or place.row >= call.rows:
            return Finished(zero, zero, zero, zero, zero, zero, scale)
        at = FINISHED + cuda.threadIdx.y
        m, factor = memory[np.uint32(at)], memory[np.uint32(at + WARPS)]
        log_s, at_label = memory[np.uint32(at + 2 * WARPS)], memory[np.uint32(at + 3 * WARPS)]
        return Finished(zero, zero, m, log_s, factor, at_label, scale)

    return finish


def _write(variant, vectors):
    """Function (call, place, label, row, ref, values, second, memory) that writes a row's output."""
    if variant.out is None:
        return device(lambda call, place, label, row, ref, values, second, memory: None)
    k, chunked, held, size = rows.kind(variant), variant.chunked, _held(variant), size_of(variant.x)
    make, load, store, sparse = _made(variant), vectors.load, vectors.store, k.sparse
    read_label, scales = integer_reader(variant.labels or "int64"), rows.writes(variant).scales
    put_label, targets = _label_writer(variant, vectors), k.targets
    find_targets = _targets(variant, vectors)
    exp_minus_scaled, reference = k.f.exp_minus_scaled, k.f.reference
    shifted = k.f.constant.one / k.f.constant.unshift
    apart = variant.cluster > 1 and held and not k.logs  # relative to the block's own maximum

    @device
    def write(call, place, label, row, ref, values, second, memory):
        if place.row >= call.rows:
            return
        y, kept = np.int64(-1), True
        if sparse:
            y = read_label(call.labels.address + place.row * call.labels.outer)
            kept = y != call.ignore_index
        fall = shifted
        if apart:
            fall = exp_minus_scaled(ref.maximum, row.maximum)
        if not held:
            ref = reference(row.maximum)
        factors = scales(row.factor, fall, ref.lead)
        begin = np.int64(place.first)
        while True:
            length = np.int32(min(call.capacity, place.last - begin))
            part = Part(begin, length, place.shift)
            if not held:
                load(values, call.x.address + place.row * call.x.outer, part)
                if targets:
                    find_targets(call, place, part, second)
            make(values, second, call.softcap, ref, row, factors, kept)
            target = call.out.address + place.row * call.out.outer
            store(target, values, part)
            if sparse and kept and 0 <= y - begin < length:
                put_label(target + y * size, np.int32(y - begin), part.shift, row.at_label)
            if not chunked:
                break
            begin += call.capacity
            if begin >= place.last:
                break

    return write


def _made(variant):
    """Function that makes of the elements a thread holds, or of their exponentials, what is written."""
    k, w, held = rows.kind(variant), rows.writes(variant), _held(variant)
    count, zero, one = variant.vectors * lanes_of(variant.x), k.f.constant.zero, k.f.constant.one
    log_written, written, term, sparse = w.log_written, w.written, w.term, k.sparse

    @device
    def logs(values, u, cap, ref, row, factors, kept):
        for i in range(count):
            values[i] = log_written(values[i], row.maximum, row.log_s)

    @device
    def products(values, u, cap, ref, row, factors, kept):
        for i in range(count):
            e, slope = values[i], one
            if not held:
                e, slope = term(e, ref, cap)
            values[i] = written(e, slope, u[i], ref, row, factors)
        if sparse and not kept:
            for i in range(count):
                values[i] = zero

    return logs if k.logs else products


def _label_writer(variant, vectors):
    """Function (address, place in the chunk, shift, value) that stores the element of the label."""
    lanes, count, place_of = lanes_of(variant.x), variant.vectors, vectors.place
    write = writer(variant.x)

    @device
    def put_label(address, at, shift, value):
        for q in range(count):
            j = place_of(q, shift)
            if j <= at and at < j + lanes:
                write(address, value)

    return put_label
