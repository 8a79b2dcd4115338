"""The divergence of two arrays of logits: what takes the place of the texts of `rows`, `teams` and
`threads`.

Two states are folded side by side, and the distances (m - x) - (n - t) weighted by the exponentials of
the second.
"""

# mypy: ignore-errors
# ruff: noqa: F403, F405

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastll.backend.cuda.teams import *
from fastll.backend.cuda.threads import TOGETHER, raised, settled

#: Most numbers of a state.
PARTS = 12


class Pair(NamedTuple):
    """The running states of a row of logits x and of its target logits t.

    The `distance` of the second is the sum of exp(t - n) ((m - x) - (n - t)), where m and n are the
    maxima of both; for -inf they are 0.
    """

    logits: State
    targets: State


def moved(pair, m, n):
    """The distances of a pair when the maxima are m and n."""
    before, after = finite(pair.logits.maximum), finite(pair.targets.maximum)
    return weighted_from(pair.targets, excess(before, finite(m), after, finite(n)), n)


def lifted_both(pair, m, n):
    """A pair for the maxima m and n, which are at least its own."""
    below, at_maximum = sums_below(pair.logits, m)
    target_below, target_at_maximum = sums_below(pair.targets, n)
    return Pair(
        State(m, below, at_maximum, nothing, nothing),
        State(n, target_below, target_at_maximum, moved(pair, m, n), nothing),
    )


def together(a, b):
    """The states of two parts of a row that have the same maxima."""
    x, t, u, v = a.logits, a.targets, b.logits, b.targets
    distance = add(t.distance, v.distance)
    return Pair(
        State(x.maximum, add(x.below, u.below), x.at_maximum + u.at_maximum, nothing, nothing),
        State(t.maximum, add(t.below, v.below), t.at_maximum + v.at_maximum, distance, nothing),
    )


def merged(a, b):
    """The states of two parts of a row."""
    m = larger(a.logits.maximum, b.logits.maximum)
    n = larger(a.targets.maximum, b.targets.maximum)
    return together(lifted_both(a, m, n), lifted_both(b, m, n))


def lifted_to_warp(pair):
    """A pair for the largest maxima of the warp."""
    m, n = warp_maximum(pair.logits.maximum), warp_maximum(pair.targets.maximum)
    return lifted_both(pair, m, n)


def state_across(pair, mask):
    """The pair of another lane of the warp, which has the same maxima."""
    x, t = pair.logits, pair.targets
    return Pair(
        State(x.maximum, sum_across(x.below, mask), across(x.at_maximum, mask), nothing, nothing),
        State(
            t.maximum,
            sum_across(t.below, mask),
            across(t.at_maximum, mask),
            sum_across(t.distance, mask),
            nothing,
        ),
    )


def put(memory, at, step, pair):
    """Leave a state in shared memory."""
    x, t = pair.logits, pair.targets
    leave(memory, at, step, (x.maximum, x.at_maximum, x.below.high, x.below.low))
    leave(memory, at + 4 * step, step, (t.maximum, t.at_maximum, t.below.high, t.below.low))
    leave(memory, at + 8 * step, step, (t.distance.high, t.distance.low, c.zero, c.zero))


def take(memory, at, step):
    """A state from shared memory."""
    x, t = taken(memory, at, step), taken(memory, at + 4 * step, step)
    sums = taken(memory, at + 8 * step, step)
    return Pair(
        State(x[0], Sum(x[2], x[3]), x[1], nothing, nothing),
        State(t[0], Sum(t[2], t[3]), t[1], Sum(sums[0], sums[1]), nothing),
    )


def finished(call, pair, label, scale):
    x, t = pair.logits, pair.targets
    log_s, _, s = sums_of(x)
    log_u, _, u = sums_of(t)
    scale = tempered_element(call, scale)
    value = kl_divergence_of_sums(log_s, log_u, t.distance.high + t.distance.low, u)
    factor, target_factor = scale / s, scale / u
    if abs(x.maximum) == c.infinity or abs(t.maximum) == c.infinity:
        value, factor, target_factor = c.nan, c.nan, c.nan
    return Finished(value, x.maximum, log_s, factor, c.zero, scale, c.zero, t.maximum, target_factor)


def fold_part(call, part, x, t, lane, memory):
    """For teams: leave the sums of a chunk for `collected`."""
    zero, second = np.int32(0), np.int32(call.pitch)
    own = largest(part, x, memory, fetch_x, zero)
    top = maximum_of_team(own, memory, TOPS)
    among = has_maximum(own, top)
    target_top = maximum_of_team(largest(part, t, memory, fetch_second, second), memory, TARGET_TOPS)
    ref = reference(tempered_element(call, top))
    target = reference(tempered_element(call, target_top))
    if cuda.threadIdx.x == 0:
        numbers = ref.maximum, ref.lead, target.maximum, target.lead
        leave(memory, RESULTS + cuda.threadIdx.y, np.int64(SLOTS), numbers)
    post_exponentials(call, part, x, ref, among, lane, memory)
    away = cuda.local.array(lanes, real)
    clear(away)
    equal, m, n = c.zero, finite(ref.maximum), finite(target.maximum)
    at, step = first_of(part)
    while at < part.end:
        fetch_x(x, memory, at)
        find_targets(call, part, t, memory, at)
        for i in range(lanes):
            e = relative(t[i], target)
            if t[i] == target.maximum:
                equal += c.one
            else:
                lane[i] += e
            v = logit_of(call, x[i], at, i, part)
            away[i] += product(e, excess(v, m, t[i], n))
        at = np.int32(at + step)
    post_lanes(away, part, memory, DISTANCES)
    post_lanes(lane, part, memory, TARGET_SUMS)
    post(equal, memory, TARGET_EQUALS)
    return ref


def collected(memory, member, ref):
    """The state of a chunk."""
    x = of_chunk(memory, member, RESULTS, SUMS, EQUALS)
    t = of_chunk(memory, member, RESULTS + 2 * SLOTS, TARGET_SUMS, TARGET_EQUALS)
    lead = memory[np.uint32(RESULTS + 3 * SLOTS + member)]
    distance = relative_to(lead, collect(memory, DISTANCES, member))
    return Pair(x, State(t.maximum, t.below, t.at_maximum, distance, nothing))


def of_chunk(memory, member, tops, sums, equals):
    """The state of one of the two arrays, without distances."""
    m, lead = memory[np.uint32(tops + member)], memory[np.uint32(tops + SLOTS + member)]
    below, equal = collect(memory, sums, member), collect(memory, equals, member)
    at_maximum = equal.high if m > -c.infinity else c.zero
    return State(m, relative_to(lead, below), at_maximum, nothing, nothing)


def fold_alone(call, place, held, second, memory):
    """For threads on their own."""
    x, t = identity.logits, identity.targets
    ref, target, away = reference(-c.infinity), reference(-c.infinity), nothing
    for begin in range(place.lane, call.classes if place.live else 0, call.lanes * TOGETHER):
        top, target_top = load_both(call, place, begin, held, second, memory)
        m, n = larger(top, x.maximum), larger(target_top, t.maximum)
        if m > x.maximum or n > t.maximum:
            targets = State(t.maximum, settled(t, target), t.at_maximum, away, nothing)
            away = moved(Pair(x, targets), m, n)
            if m > x.maximum:
                new = reference(m)
                x, ref = raised(x, ref, new), new
            if n > t.maximum:
                new = reference(n)
                t, target = raised(t, target, new), new
        x, t = folded(x, ref, held, second), folded(t, target, second, held)
        more = c.zero
        for i in range(TOGETHER):
            ratio = excess(held[i], finite(m), second[i], finite(n))
            more += product(relative(second[i], target), ratio)
        away = plus(away, more / target.lead)
    return Pair(
        State(x.maximum, settled(x, ref), counted(x), nothing, nothing),
        State(t.maximum, settled(t, target), counted(t), away, nothing),
    ), ref


def counted(state):
    """The number of elements at the maximum; none is where it is -inf."""
    return state.at_maximum if state.maximum > -c.infinity else c.zero


def load_both(call, place, begin, held, second, memory):
    """Load what a thread takes together, -inf where there is nothing; the largest elements of both."""
    top, target_top = -c.infinity, -c.infinity
    for i in range(TOGETHER):
        held[i], second[i] = -c.infinity, -c.infinity
        j = begin + i * call.lanes
        if j < call.classes:
            held[i] = tempered_element(call, element(call, place, memory, j))
            second[i] = target_of(call, second_element(call, place, j), j)
            top, target_top = larger(top, held[i]), larger(target_top, second[i])
    return top, target_top
