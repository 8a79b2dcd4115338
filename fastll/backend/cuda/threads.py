"""Rows of any strides, formats and operands: a few threads to a row, or one.

The threads of a row take its classes in turn, four at a time, each with a running state, and fold these
by halves; how many they are depends on the number of classes alone.

Texts, bound to the names of a variant: see `fastll.backend.cuda.folds`.
"""

# mypy: ignore-errors
# ruff: noqa: F403, F405

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fastll.backend.cuda.compiler import cuda
from fastll.backend.cuda.rows import *

#: Classes that a thread takes together.
TOGETHER = 4


class Place(NamedTuple):
    """Where a thread is."""

    outer: int  # the thread's row
    inner: int
    live: bool  # whether there is such a row
    lane: int  # of the threads that share it
    apart: int  # how far these are from each other


def locate(call, memory):
    """The `Place` of a thread."""
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
    apart = rows_of_block if call.across else 1
    return Place(outer, inner, row < call.rows, lane, apart)


def start_of(operand, place):
    """Address of the row, or of its entry, in an operand."""
    return operand.address + place.outer * operand.outer + place.inner * operand.inner


def divisor_of(call, place):
    """What the gradient of all rows is multiplied with besides their `scale`."""
    return read_divisor(call)


def label_of(call, place):
    """The label of the row, as it is stored."""
    return read_label(start_of(call.labels, place))


# access to the elements of a row


def element(call, place, memory, j):
    return read_x(start_of(call.x, place) + j * call.x.classes)


def second_element(call, place, j):
    return read_second(start_of(call.second, place) + j * call.second.classes)


# load and fold


def fold_in_turn(call, place, held, u, memory):
    """The state of a thread's elements, and their reference."""
    state, ref = identity, reference(-c.infinity)
    stop = call.classes if place.live and not whole_state else 0
    for begin in range(place.lane, stop, call.lanes * TOGETHER):
        top = load(call, place, begin, held, u, memory)
        if top > state.maximum:
            new = reference(top)
            state, ref = raised(state, ref, new), new
        state = folded(state, ref, held, u)
    at_maximum = state.at_maximum if state.maximum > -c.infinity else c.zero
    return State(state.maximum, settled(state, ref), at_maximum, state.distance, state.mass), ref


def load(call, place, begin, held, u, memory):
    """Load what a thread takes together: elements, -inf where there is none, and their weights or
    targets. The largest element is returned."""
    top = -c.infinity
    for i in range(TOGETHER):
        held[i], u[i] = -c.infinity, c.zero
        j = begin + i * call.lanes
        if j < call.classes:
            v = tempered_element(call, element(call, place, memory, j))
            if capped:
                v = softcap(v, call.softcap)[0]
            if weighted:
                u[i] = second_element(call, place, j)
                if u[i] == c.zero:
                    v = -c.infinity
            if targets:
                u[i] = target_of(call, second_element(call, place, j) if dense else c.zero, j)
            held[i] = v
            if v > top:
                top = v
    return top


def lead_of(ref):
    """The exponential of the maximum as it is in sums. Those of weighted elements are not scaled by
    2**SHIFT: weights may be enormous."""
    return ref.lead * c.unshift if weighted else ref.lead


def settled(state, ref):
    """The sum below the maximum as one of exp(x - maximum)."""
    return relative_to(lead_of(ref), state.below)


def raised(state, ref, new):
    """A state for a larger maximum."""
    below, distance_now = state.below, state.distance
    if entropic:
        before = State(state.maximum, settled(state, ref), state.at_maximum, distance_now, nothing)
        distance_now = weighted_from(before, new.maximum - state.maximum, new.maximum)
    if state.maximum > -c.infinity:
        rise = exp_minus_scaled(state.maximum, new.maximum) * (lead_of(new) * c.unshift)
        below = plus(settled(state, ref), state.at_maximum)
        below = Sum(below.high * rise, below.low * rise)
    if targets:
        distance_now = farther(distance_now, state.mass.high, state.maximum, new.maximum)
    return State(new.maximum, below, c.zero, distance_now, state.mass)


def folded(state, ref, held, u):
    """The state with further elements, none of them above its maximum."""
    part, equal, away, more = c.zero, c.zero, c.zero, c.zero
    m, distances, mass = ref.maximum, state.distance, state.mass
    for i in range(TOGETHER):
        if weighted:
            if m == -c.infinity:  # 0, or NaN for an infinite weight
                part += u[i] * c.zero
            elif held[i] == m:  # weights of both signs at an infinite maximum make NaN
                equal += u[i] * c.infinity if m == c.infinity and u[i] != c.zero else u[i]
            elif u[i] != c.zero:
                part += (relative(held[i], ref) * c.unshift) * u[i]
        elif held[i] == m:
            equal += c.one
        else:
            e = relative(held[i], ref)
            part += e
            if entropic:
                away += distance(held[i], e, m)
        if targets:
            away += distance(held[i], u[i], finite(m))
            more += u[i]
    if entropic:
        distances = plus(distances, away / ref.lead)
    if targets:
        distances, mass = plus(distances, away), plus(mass, more)
    return State(m, plus(state.below, part), state.at_maximum + equal, distances, mass)


# merge, finish


def merge(call, place, state, memory):
    """The state of a whole row, by halves, for all of its threads."""
    if call.lanes > 1:
        step, me, half = cuda.blockDim.x, cuda.threadIdx.x, call.lanes
        while half > 1:
            put(memory, me, step, state)
            cuda.syncthreads()
            half //= 2
            if place.lane < half:
                state = merged(state, take(memory, me + half * place.apart, step))
            cuda.syncthreads()
        put(memory, me, step, state)
        cuda.syncthreads()
        state = take(memory, me - place.lane * place.apart, step)  # the first one's
    return state


def finish(call, place, label, state, memory):
    if whole_state and place.live:
        at, step = start_of(call.state, place), call.state.classes
        below = Sum(read_state(at + step), c.zero)
        at_maximum = read_state(at + 2 * step)
        state = State(read_state(at), below, at_maximum, state.distance, state.mass)
    row = finished(call, state, label, gradient_scale(call, divisor_of(call, place), label))
    if place.live and place.lane == 0:
        store_results(call, place, label, row)
    if selected and place.live:
        places = start_of(call.x, place), start_of(call.choices, place), start_of(call.selected, place)
        select(call, places, row, place.lane, call.lanes)
    return row


def finish_exactly(call, place, label, state, memory):
    """Finish a log-sum-exp in float64, as running states are, with what is left where weights cancel;
    add it to the running state if there is one."""
    if place.live and place.lane == 0:
        below = np.float64(state.below.high) + np.float64(state.below.low)
        m, at_maximum = np.float64(state.maximum), np.float64(state.at_maximum)
        if running:
            at, step = start_of(call.state, place), call.state.classes
            before = read_double(at), read_double(at + step), read_double(at + 2 * step)
            m, below, at_maximum = joined(before, (m, below, at_maximum))
            write_state(at, m)
            write_state(at + step, below)
            write_state(at + 2 * step, at_maximum)
        if call.lse.address != 0:
            s = below + at_maximum
            result = m + log_of_sum(below, at_maximum) if m > -np.inf else m + below
            if signed:
                sign = (1.0 if s > 0.0 else -1.0) if s != 0.0 and s == s else s
                write_double(start_of(call.sign, place), sign)
            elif s < 0.0:
                result = np.nan
            write_double(start_of(call.lse, place), result)
    return only(c.zero, c.zero, c.zero, c.zero)


def log_of_sum(below, at_maximum):
    """log|below + at_maximum|, from whichever part dominates."""
    if abs(below) < abs(at_maximum):
        return math.log(abs(at_maximum)) + math.log1p(below / at_maximum)
    return math.log(abs(below + at_maximum)) if below + at_maximum != 0.0 else -np.inf


# write


def write(call, place, label, row, ref, held, u, memory):
    """Write what has the shape of a row."""
    if not written:
        return
    writer = writer_of(row, reference(row.maximum), c.one / c.unshift)
    for j in range(place.lane, call.classes if place.live else 0, call.lanes):
        x, u = c.zero, c.zero
        if not nll:
            x = element(call, place, memory, j)
        if targets or divergence:
            t = second_element(call, place, j) if dense or divergence else c.zero
            u = target_of(call, t, j)
        value = written_of(call, x, u, row, writer)
        if sparse and j == label.number:
            value = row.at_label
        if dropping and label.sample == c.zero:
            value = c.zero
        write_out(start_of(call.out, place) + j * call.out.classes, value)
