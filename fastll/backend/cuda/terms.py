"""Folds that are sums of terms: what takes the place of the texts of `rows`, `teams` and `threads`.

So is the loss of log-probabilities, whose terms are distances from 0.
"""

# mypy: ignore-errors
# ruff: noqa: F403, F405

from __future__ import annotations

from fastll.backend.cuda.teams import *
from fastll.backend.cuda.threads import TOGETHER


def finished(call, state, label, scale):
    value = state.below.high + state.below.low
    if not nll:
        return only(call.scale * value + c.zero, c.zero, c.zero, scale)  # a 0 without sign
    at_point, u_y, factor = c.zero, c.zero, c.zero
    if sparse:
        at_point, u_y = call.keep * label.weight, call.spread * label.weight
    value, at_label = nll_loss(at_point, label.logit, value), less_target(c.zero, u_y + at_point, scale)
    if sparse and label.number < 0:
        value, factor, at_label = c.nan, c.nan, c.nan
    return only(value, factor, at_label, scale)


def term(values, second, i):
    """That of an element which a thread holds."""
    if nll:
        return distance(values[i], second[i], c.zero)
    if paired:
        return formula(values[i], second[i])
    return formula(values[i])


def fold_part(call, part, x, u, lane, memory):
    """For teams: leave the sum of a chunk for `collected`."""
    at, step = first_of(part)
    while at < part.end:
        fetch_x(x, memory, at)
        if targets:
            find_targets(call, part, u, memory, at)
        elif paired:
            fetch_second(u, memory, np.int32(at + call.pitch))
        for i in range(lanes):
            lane[i] += term(x, u, i) if inside(at, i, part) else c.zero
        at = np.int32(at + step)
    post_lanes(lane, part, memory, SUMS)
    return reference(-c.infinity)


def collected(memory, member, ref):
    return State(-c.infinity, collect(memory, SUMS, member), c.zero, nothing, nothing)


def fold_nothing(call, place, values, second, memory):
    """For rows of which only the element at the label is read."""
    return State(-c.infinity, nothing, c.zero, nothing, nothing), reference(-c.infinity)


def fold_alone(call, place, held, second, memory):
    """For threads on their own."""
    total, stop = nothing, call.classes if place.live else 0
    for begin in range(place.lane, stop, call.lanes * TOGETHER):
        part = c.zero
        for i in range(TOGETHER):
            j = begin + i * call.lanes
            if j < stop:
                held[i] = element(call, place, memory, j)
                if targets:
                    second[i] = target_of(call, second_element(call, place, j) if dense else c.zero, j)
                elif paired:
                    second[i] = second_element(call, place, j)
                part += term(held, second, i)
        total = plus(total, part)
    return State(-c.infinity, total, c.zero, nothing, nothing), reference(-c.infinity)
