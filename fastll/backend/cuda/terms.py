"""Folds that are sums of terms: what takes the place of the texts of `rows`, `teams` and `threads`."""

# mypy: ignore-errors
# ruff: noqa: F403, F405

from __future__ import annotations

from fastll.backend.cuda.teams import *
from fastll.backend.cuda.threads import TOGETHER


def identity():
    return Sum(c.zero, c.zero)


def merged(a, b):
    return add(a, b)


def put(memory, at, step, state):
    put_sum(memory, at, step, state)


def take(memory, at, step, peer):
    return take_sum(memory, at, step, peer)


def finished(call, state, label, scale):
    value = call.scale * (state.high + state.low)
    return Finished(value, c.zero, c.zero, c.zero, c.zero, c.zero, scale)


def fold_part(call, place, part, values, second, lane, memory):
    """For teams: leave the sum of a chunk for `collected`."""
    if paired:
        load_second(second, start_of(call.second, place.row), part)
    clear(lane)
    for q in range(vectors):
        j = nth(q, part.shift)
        for i in range(lanes):
            found = term(values, second, q * lanes + i)
            lane[i] += found if 0 <= j + i < part.length else c.zero
    post_lanes(lane, part, memory, SUMS)
    return reference(-c.infinity)


def collected(memory, member, ref):
    return collect(memory, SUMS, member)


def fold_alone(call, place, held, second, memory):
    """For threads on their own."""
    total, stop = Sum(c.zero, c.zero), call.classes if place.live else 0
    for begin in range(place.lane, stop, call.lanes * TOGETHER):
        part = c.zero
        for i in range(TOGETHER):
            j = begin + i * call.lanes
            if j < stop:
                held[i] = element(call, place, memory, j)
                if paired:
                    second[i] = second_element(call, place, j)
                part += term(held, second, i)
        total = plus(total, part)
    return total, reference(-c.infinity)
