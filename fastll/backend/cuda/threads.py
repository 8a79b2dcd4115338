"""Rows of any strides, formats and operands, and short rows: a few threads to a row, or one.

The threads of a row take its classes in turn, four at a time, each with a running state, and fold these
by halves; how many they are depends on the number of classes alone. Rows that lie one after the other
and are short come and go through shared memory, so that memory sees whole vectors.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from fastll.backend.cuda import rows
from fastll.backend.cuda.compiler import cuda, device
from fastll.backend.cuda.maths import Sum
from fastll.backend.cuda.primitives import (
    VECTOR,
    compute_type,
    lanes_of,
    larger,
    reader,
    size_of,
    value_format,
    vector_reader,
    vector_writer,
    writer,
)
from fastll.backend.cuda.rows import Finished, State

#: Classes that a thread takes together.
TOGETHER = 4


class Place(NamedTuple):
    """Where a thread is."""

    first_row: int  # of the thread block
    present: int  # its rows
    outer: int  # the thread's row
    inner: int
    live: bool  # whether there is such a row
    lane: int  # of the threads that share it
    apart: int  # how far these are from each other
    source: int  # address of the row in x
    tile: int  # place of the row in shared memory


def phases(variant):
    """The phases of `fastll.backend.cuda.folds` for rows of threads on their own."""
    k = rows.kind(variant)
    bring, take = _staging(variant) if variant.staged else (None, None)
    access = _access(variant)
    find = rows.labels(variant)(access.element)
    sparse, zero, one, at_row = k.sparse, k.f.constant.zero, k.f.constant.one, access.at_row

    @device
    def find_label(call, place, memory):
        if sparse and place.live:
            return find(call, at_row(call.labels, place), place, memory)
        return rows.Label(np.int64(-1), True, zero, one, one)

    # rereading shared memory is cheaper than rescaling sums for each new maximum
    twice = variant.staged and not (k.targets or variant.capped or k.terms)
    fold = _terms if k.terms else _two_passes if twice else _one_pass
    return SimpleNamespace(
        held=TOGETHER,
        locate=_places(variant, bring),
        find_label=find_label,
        fold=fold(variant, access),
        merge=_merge(variant),
        finish=(_finish_exactly if k.exact else _finish)(variant, access),
        write=_write(variant, access, take),
    )


def _places(variant, bring):
    """Function (call, memory) of a thread's `Place`; it also brings staged rows into shared memory."""
    staged = variant.staged

    @device
    def locate(call, memory):
        rows_of_block = cuda.blockDim.x // call.lanes
        first_row = np.int64(cuda.blockIdx.x) * rows_of_block
        if call.across:
            lane, local_row = cuda.threadIdx.x // rows_of_block, cuda.threadIdx.x % rows_of_block
        else:
            lane, local_row = cuda.threadIdx.x % call.lanes, cuda.threadIdx.x // call.lanes
        row = first_row + local_row
        outer, inner = row, np.int64(0)
        if call.inner != 1:  # a division takes as long as several elements
            outer = row // call.inner
            inner = row - outer * call.inner
        present = min(rows_of_block, call.rows - first_row)
        if staged:
            bring(memory, call.x.address + first_row * call.x.outer, present, call.classes)
            cuda.syncthreads()
        source = call.x.address + outer * call.x.outer + inner * call.x.inner
        apart = rows_of_block if call.across else 1
        tile = local_row * (call.classes | 1)
        return Place(first_row, present, outer, inner, row < call.rows, lane, apart, source, tile)

    return locate


def _access(variant):
    """Functions to read a row's elements, and to write those of its output."""
    k, staged = rows.kind(variant), variant.staged
    read, real = reader(variant.x, k.real), k.real
    out = variant.out or variant.x
    write, read_second = writer(out, real), reader(variant.second or variant.x, real)
    make_target, dense, zero = rows.target_maker(variant), k.dense, k.f.constant.zero

    @device
    def at_row(operand, place):
        """Address of the row, or of its entry, in an operand."""
        return operand.address + place.outer * operand.outer + place.inner * operand.inner

    @device
    def element(call, place, memory, j):
        if staged:
            return memory[np.uint32(place.tile + j)]
        return read(place.source + j * call.x.classes)

    @device
    def second(call, place, j):
        return read_second(at_row(call.second, place) + j * call.second.classes)

    @device
    def target(call, place, j):
        return make_target(call, second(call, place, j) if dense else zero, j)

    @device
    def put(call, place, memory, j, value):
        if staged:
            memory[np.uint32(place.tile + j)] = value
        else:
            write(at_row(call.out, place) + j * call.out.classes, value)

    return SimpleNamespace(at_row=at_row, element=element, second=second, target=target, put=put)


def _staging(variant):
    """Functions that bring rows of x into shared memory, and take those of the output from there."""
    name = variant.x
    real, lanes, size = compute_type(name), lanes_of(name), size_of(name)
    read, write = reader(name), writer(name)
    fetch, deliver = vector_reader(name, 0.0), vector_writer(name, variant.modern)

    @device
    def fetch_vector(memory, part, address, place):
        fetch(part, 0, address, True)
        i, j, width = place
        for k in range(lanes):
            memory[np.uint32(i * (width | 1) + j)] = part[k]
            j = np.uint32(j + 1)
            if j == width:
                i, j = np.uint32(i + 1), np.uint32(0)

    @device
    def deliver_vector(memory, part, address, place):
        i, j, width = place
        for k in range(lanes):
            part[k] = memory[np.uint32(i * (width | 1) + j)]
            j = np.uint32(j + 1)
            if j == width:
                i, j = np.uint32(i + 1), np.uint32(0)
        deliver(address, part, 0)

    @device
    def fetch_one(memory, address, at):
        memory[np.uint32(at)] = read(address)

    @device
    def deliver_one(memory, address, at):
        write(address, memory[np.uint32(at)])

    def mover(move_vector, move_one):
        @device
        def move(memory, address, count, classes):
            """`count` rows, one after the other in memory; in shared memory their pitch is odd, so that
            neighbouring rows are in different banks."""
            part = cuda.local.array(lanes, real)
            elements, width, ready = np.uint32(count * classes), np.uint32(classes), np.uint32(0)
            if address & (VECTOR - 1) == 0:
                ready = np.uint32(elements & ~np.uint32(lanes - 1))
            at = np.uint32(cuda.threadIdx.x * lanes)
            while at < ready:
                i = np.uint32(at // width)
                move_vector(memory, part, address + at * size, (i, np.uint32(at - i * width), width))
                at = np.uint32(at + cuda.blockDim.x * lanes)
            at = np.uint32(ready + cuda.threadIdx.x)
            while at < elements:
                i = np.uint32(at // width)
                move_one(memory, address + at * size, i * (width | 1) + (at - i * width))
                at = np.uint32(at + cuda.blockDim.x)

        return move

    return mover(fetch_vector, fetch_one), mover(deliver_vector, deliver_one)


def _two_passes(variant, access):
    """The fold of a staged row: its maximum first, then its exponentials."""
    k = rows.kind(variant)
    zero, one, infinity = k.f.constant.zero, k.f.constant.one, k.f.constant.infinity
    reference, exponential, add = k.f.reference, k.f.exponential, k.f.add

    @device
    def fold(call, place, held, u, memory):
        tile, width = np.uint32(place.tile), np.uint32(call.classes if place.live else 0)
        top, j = -infinity, np.uint32(0)
        while j < width:
            top = larger(top, memory[np.uint32(tile + j)])
            j = np.uint32(j + 1)
        ref = reference(top)
        level, part, count, total = top - ref.offset, zero, zero, Sum(zero, zero)
        j = np.uint32(0)
        while j < width:
            v = memory[np.uint32(tile + j)] - ref.offset
            if v == level:
                count += one
            else:
                part += exponential(v, ref.floor, ref.magic)
            j = np.uint32(j + 1)
            if j & np.uint32(15) == 0:  # so often that nothing is lost
                total, part = add(total, Sum(part, zero)), zero
        total = add(total, Sum(part, zero))
        if top == -infinity:
            count = zero
        nothing = Sum(zero, zero)
        below = Sum(total.high / ref.lead, total.low / ref.lead)
        return State(top, below, count, nothing, nothing), ref

    return fold


def _one_pass(variant, access):
    """The fold of a thread's elements, with sums that are rescaled at each new maximum."""
    k = rows.kind(variant)
    zero, infinity, targets = k.f.constant.zero, k.f.constant.infinity, k.targets
    add, reference = k.f.add, k.f.reference
    load, lead_of, raised, fold_held = (
        _loader(variant, access),
        *_rescaling(k),
        (_weighted if k.weighted else _plain)(k),
    )
    fold_targets = _target_sums(k)
    whole = variant.state and variant.operation != "logsumexp"  # the state is that of the whole row

    @device
    def fold(call, place, held, u, memory):
        nothing = Sum(zero, zero)
        state, ref = State(-infinity, nothing, zero, nothing, nothing), reference(-infinity)
        stop = call.classes if place.live and not whole else 0
        for begin in range(place.lane, stop, call.lanes * TOGETHER):
            top = load(call, place, begin, held, u, memory)
            if top > state.maximum:
                new = reference(top)
                state, ref = raised(state, ref, new), new
            part, count = fold_held(held, u, ref)
            distance, mass = state.distance, state.mass
            if targets:
                away, more = fold_targets(held, u, state.maximum)
                distance, mass = add(distance, Sum(away, zero)), add(mass, Sum(more, zero))
            below = add(state.below, Sum(part, zero))
            state = State(state.maximum, below, state.at_maximum + count, distance, mass)
        lead = lead_of(ref)
        below = Sum(state.below.high / lead, state.below.low / lead)
        count = state.at_maximum if state.maximum > -infinity else zero
        return State(state.maximum, below, count, state.distance, state.mass), ref

    return fold


def _loader(variant, access):
    """Function (call, place, begin, held, u, memory) that loads what a thread takes together: elements,
    -inf where there is none, and their weights or targets; the largest element is returned."""
    k, capped = rows.kind(variant), variant.capped
    zero, infinity, softcap = k.f.constant.zero, k.f.constant.infinity, k.f.softcap
    weighted, targets = k.weighted, k.targets
    element, second, target = access.element, access.second, access.target

    @device
    def load(call, place, begin, held, u, memory):
        top = -infinity
        for c in range(TOGETHER):
            held[c], u[c] = -infinity, zero
            j = begin + c * call.lanes
            if j < call.classes:
                v = element(call, place, memory, j)
                if capped:
                    v = softcap(v, call.softcap)[0]
                if weighted:
                    u[c] = second(call, place, j)
                    if u[c] == zero:
                        v = -infinity
                if targets:
                    u[c] = target(call, place, j)
                held[c] = v
                if v > top:
                    top = v
        return top

    return load


def _rescaling(k):
    """Functions (ref) of the exponential of a maximum in the sums, and (state, ref, new) of a state for
    a larger maximum. Sums of weighted elements are not scaled by 2**SHIFT: weights may be enormous."""
    zero, unshift, infinity = k.f.constant.zero, k.f.constant.unshift, k.f.constant.infinity
    add, exp_minus_scaled, weighted = k.f.add, k.f.exp_minus_scaled, k.weighted
    farther, targets = rows.states(k.real, k.targets).farther, k.targets

    @device
    def lead_of(ref):
        return ref.lead * unshift if weighted else ref.lead

    @device
    def raised(state, ref, new):
        below = state.below
        if state.maximum > -infinity:
            before, rise = lead_of(ref), exp_minus_scaled(state.maximum, new.maximum)
            rise *= lead_of(new) * unshift
            below = add(Sum(below.high / before, below.low / before), Sum(state.at_maximum, zero))
            below = Sum(below.high * rise, below.low * rise)
        distance = state.distance
        if targets:
            distance = farther(distance, state.mass.high, state.maximum, new.maximum)
        return State(new.maximum, below, zero, distance, state.mass)

    return lead_of, raised


def _plain(k):
    """Function (held, u, ref): the sum of the exponentials below the maximum, the number at it."""
    zero, one, relative = k.f.constant.zero, k.f.constant.one, k.f.relative

    @device
    def fold_held(held, u, ref):
        total, count = zero, zero
        for c in range(TOGETHER):
            if held[c] == ref.maximum:
                count += one
            else:
                total += relative(held[c], ref)
        return total, count

    return fold_held


def _weighted(k):
    """The same of weighted elements; weights of both signs at an infinite maximum make NaN."""
    zero, infinity, unshift = k.f.constant.zero, k.f.constant.infinity, k.f.constant.unshift
    relative = k.f.relative

    @device
    def fold_held(held, u, ref):
        total, count = zero, zero
        for c in range(TOGETHER):
            if held[c] == ref.maximum:
                count += u[c] * infinity if ref.maximum == infinity and u[c] != zero else u[c]
            elif u[c] != zero:
                total += (relative(held[c], ref) * unshift) * u[c]
        return total, count

    return fold_held


def _target_sums(k):
    """Function (held, u, m) of the sums of u (m - x) and of u."""
    zero, finite = k.f.constant.zero, rows.states(k.real, k.targets).finite

    @device
    def fold_targets(held, u, m):
        distance, mass = zero, zero
        for c in range(TOGETHER):
            if u[c] != zero:
                distance += u[c] * (finite(m) - held[c])
                mass += u[c]
        return distance, mass

    return fold_targets


def _terms(variant, access):
    """The fold of a sum of terms."""
    k = rows.kind(variant)
    zero, add, reference, infinity = k.f.constant.zero, k.f.add, k.f.reference, k.f.constant.infinity
    element, second, term = access.element, access.second, rows.term_maker(variant)
    two = variant.second is not None

    @device
    def fold(call, place, held, u, memory):
        total, stop = Sum(zero, zero), call.classes if place.live else 0
        for begin in range(place.lane, stop, call.lanes * TOGETHER):
            part = zero
            for c in range(TOGETHER):
                j = begin + c * call.lanes
                if j < stop:
                    held[c] = element(call, place, memory, j)
                    if two:
                        u[c] = second(call, place, j)
                    part += term(held, u, c)
            total = add(total, Sum(part, zero))
        return total, reference(-infinity)

    return fold


def _merge(variant):
    """Function (call, place, state, memory) of the state of a whole row, by halves, for all of it."""
    state_of = rows.folded_into(variant)
    merged, put, take = state_of.merged, state_of.put, state_of.take

    @device
    def merge(call, place, state, memory):
        if call.lanes > 1:
            step, me, half = cuda.blockDim.x, cuda.threadIdx.x, call.lanes
            while half > 1:
                put(memory, me, step, state)
                cuda.syncthreads()
                half //= 2
                if place.lane < half:
                    state = merged(state, take(memory, me + half * place.apart, step, 0))
                cuda.syncthreads()
            put(memory, me, step, state)
            cuda.syncthreads()
            state = take(memory, me - place.lane * place.apart, step, 0)  # the first one's
        return state

    return merge if not variant.staged else device(lambda call, place, state, memory: state)


def _finish(variant, access):
    """Function (call, place, label, state, memory) that finishes a row."""
    k, at_row, running = rows.kind(variant), access.at_row, variant.state
    finished, store = rows.finishes(variant), rows.results(variant)
    zero, gradient_scale = k.f.constant.zero, rows.gradient_scales(variant)
    read_state = reader("float64", k.real)

    @device
    def finish(call, place, label, state, memory):
        if running and place.live:  # that of the whole row
            at, step = at_row(call.state, place), call.state.classes
            below = Sum(read_state(at + step), zero)
            state = State(read_state(at), below, read_state(at + 2 * step), state.distance, state.mass)
        row = finished(call, state, label, gradient_scale(call))
        if place.live and place.lane == 0:
            store(call, at_row(call.value, place), at_row(call.lse, place), row)
        return row

    return finish


def _finish_exactly(variant, access):
    """The same of a log-sum-exp in float64, as running states are, with what is left where weights
    cancel; it is added to the running state if there is one."""
    k, at_row, running, signed = rows.kind(variant), access.at_row, variant.state, variant.signed
    read, write = reader("float64"), writer("float64")
    store = writer(value_format(compute_type(variant.x)), np.float64)
    merged, nothing = rows.states(np.float64, False).merged, k.f.constant.zero

    @device
    def log_of(below, count):
        """log|below + count|, from whichever part dominates."""
        if abs(below) < abs(count):
            return math.log(abs(count)) + math.log1p(below / count)
        return math.log(abs(below + count)) if below + count != 0.0 else -np.inf

    @device
    def continued(call, place, state):
        at, step, empty = at_row(call.state, place), call.state.classes, Sum(0.0, 0.0)
        before = State(read(at), Sum(read(at + step), 0.0), read(at + 2 * step), empty, empty)
        state = merged(before, state)
        write(at, state.maximum)
        write(at + step, state.below.high + state.below.low)
        write(at + 2 * step, state.at_maximum)
        return state

    @device
    def finish(call, place, label, state, memory):
        if place.live and place.lane == 0:
            below, empty = np.float64(state.below.high) + np.float64(state.below.low), Sum(0.0, 0.0)
            m, count = np.float64(state.maximum), np.float64(state.at_maximum)
            if running:
                row = continued(call, place, State(m, Sum(below, 0.0), count, empty, empty))
                m, below, count = row.maximum, row.below.high + row.below.low, row.at_maximum
            if call.lse.address != 0:
                s = below + count
                result = m + log_of(below, count) if m > -np.inf else m + below
                if signed:
                    sign = (1.0 if s > 0.0 else -1.0) if s != 0.0 and s == s else s
                    store(at_row(call.sign, place), sign)
                elif s < 0.0:
                    result = np.nan
                store(at_row(call.lse, place), result)
        return Finished(nothing, nothing, nothing, nothing, nothing, nothing, nothing)

    return finish


def _write(variant, access, take):
    """Function (call, place, label, row, ref, held, u, memory) that writes what has a row's shape."""
    if variant.out is None:
        return device(lambda call, place, label, row, ref, held, u, memory: None)
    k, put, staged = rows.kind(variant), access.put, variant.staged
    put_made, scales, reference = _made(variant, access), rows.writes(variant).scales, k.f.reference
    shifted, sparse = k.f.constant.one / k.f.constant.unshift, k.sparse
    index = np.uint32 if staged else np.int64

    @device
    def write(call, place, label, row, ref, held, u, memory):
        ref = reference(row.maximum)
        factors = scales(row.factor, shifted, ref.lead)
        j, stop, step = index(place.lane), index(call.classes if place.live else 0), index(call.lanes)
        while j < stop:
            put_made(call, place, label, row, ref, factors, memory, j)
            j = index(j + step)
        if staged:
            if sparse and label.kept and label.number >= 0:
                put(call, place, memory, label.number, row.at_label)
            cuda.syncthreads()
            target = call.out.address + place.first_row * call.out.outer
            take(memory, target, place.present, call.classes)

    return write


def _made(variant, access):
    """Function (call, place, label, row, ref, factors, memory, j) that writes element j; of a staged
    row, that of the label follows."""
    k, w, staged = rows.kind(variant), rows.writes(variant), variant.staged
    log_written, written, term, targets, sparse = w.log_written, w.written, w.term, k.targets, k.sparse
    element, target, put, zero = access.element, access.target, access.put, k.f.constant.zero

    @device
    def logs(call, place, label, row, ref, factors, memory, j):
        value = log_written(element(call, place, memory, j), row.maximum, row.log_s)
        put(call, place, memory, j, value)

    @device
    def products(call, place, label, row, ref, factors, memory, j):
        e, slope = term(element(call, place, memory, j), ref, call.softcap)
        value = written(e, slope, target(call, place, j) if targets else zero, ref, row, factors)
        if sparse:
            if not staged and j == label.number:
                value = row.at_label
            if not label.kept:
                value = zero
        put(call, place, memory, j, value)

    return logs if k.logs else products
