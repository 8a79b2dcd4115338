"""What a row is folded into, and how the threads of a row fold together.

A team is the threads of a thread block with one `threadIdx.y`: one warp or several. A warp folds by
halves, and so does what the warps of a team, or the blocks of a cluster, have found, in two parts.
`memory` is shared memory, and `at` a place in it.

Texts, bound to the names of a type by `shared`, as formulas are to the operations of a target.
"""

# mypy: ignore-errors
# ruff: noqa: F403, F405

from __future__ import annotations

import sys
from functools import cache
from typing import NamedTuple

import numpy as np

from fastll.backend.cuda import maths
from fastll.backend.cuda.compiler import bound, cuda
from fastll.backend.cuda.maths import *
from fastll.backend.cuda.primitives import WARP, larger

#: Most warps of a thread block, and so the numbers of one kind that they leave in shared memory.
WARPS = 32
#: Most numbers of a state.
PARTS = 8
#: Most blocks of a cluster.
PEERS = 8


class State(NamedTuple):
    """The running state of a row, or of a part of it, with sums relative to the maximum.

    With r = below + (at_maximum - 1), the sum without one of the largest, log1p(r) keeps its digits
    when one element dominates. A sum of terms is `below`, and its maximum -inf.
    """

    maximum: float
    below: Sum  # of exp(x - maximum) over the elements below the maximum
    at_maximum: float  # number of elements at the maximum, or the sum of their weights
    distance: Sum  # of u (maximum - x), where u is a target that is more than a point; or of
    # exp(x - maximum) (maximum - x), where the entropy is asked for
    mass: Sum  # of u


def finite(m):
    """A maximum as what distances are measured from."""
    return m if m > -c.infinity else c.zero


def weighted_from(state, step, top):
    """Distances weighted by the exponentials of a state, each of them longer by `step`, when the
    exponentials are relative to `top` >= its maximum."""
    total = state.distance
    if state.maximum == -c.infinity:
        return nothing
    if step != c.zero:
        total = plus(total, product(plus(state.below, state.at_maximum).high, step))
    if state.maximum == top:
        return total
    fall = exp_minus_scaled(state.maximum, top)
    return Sum(product(fall, total.high) * c.unshift, product(fall, total.low) * c.unshift)


def farther(distance, mass, m, top):
    """Distances from a maximum m as those from another one, `top` >= m."""
    if mass != c.zero and m != top:
        return plus(distance, mass * (finite(top) - finite(m)))
    return distance


def sums_below(state, top):
    """(below, at_maximum) of a state, when exponentials are relative to `top` >= its maximum."""
    below, at_maximum = state.below, state.at_maximum
    # one without elements has nothing to move: 0, or a NaN
    if state.maximum < top and state.maximum > -c.infinity:
        # the product may be a normal number where the exponential is none
        fall = exp_minus_scaled(state.maximum, top)
        more = plus(below, at_maximum)
        below = Sum((more.high * fall) * c.unshift, (more.low * fall) * c.unshift)
    if state.maximum < top:
        at_maximum = c.zero
    return below, at_maximum


def lifted(state, top):
    """A state of the maximum `top` >= its own."""
    below, at_maximum = sums_below(state, top)
    distance = state.distance
    if entropic:
        distance = weighted_from(state, top - state.maximum, top)
    if targets:
        distance = farther(distance, state.mass.high, state.maximum, top)
    return State(top, below, at_maximum, distance, state.mass)


def together(a, b):
    """The state of two parts of a row that have one maximum, the same in either order."""
    distance, mass = nothing, nothing
    if targets or entropic:
        distance = add(a.distance, b.distance)
    if targets:
        mass = add(a.mass, b.mass)
    return State(a.maximum, add(a.below, b.below), a.at_maximum + b.at_maximum, distance, mass)


def merged(a, b):
    """The state of two parts of a row."""
    top = larger(a.maximum, b.maximum)
    return together(lifted(a, top), lifted(b, top))


def joined(a, b):
    """Two running states (m, e, k) together; in float64."""
    state = merged(
        State(a[0], Sum(a[1], c.zero), a[2], nothing, nothing),
        State(b[0], Sum(b[1], c.zero), b[2], nothing, nothing),
    )
    return state.maximum, state.below.high + state.below.low, state.at_maximum


def relative_to(lead, below):
    """A sum of `exponential` as one of exp(x - maximum)."""
    return Sum(below.high / lead, below.low / lead)


def leave(memory, at, step, numbers):
    """Leave four numbers in shared memory, `step` apart."""
    memory[np.uint32(at)], memory[np.uint32(at + step)] = numbers[0], numbers[1]
    memory[np.uint32(at + 2 * step)], memory[np.uint32(at + 3 * step)] = numbers[2], numbers[3]


def put(memory, at, step, state):
    """Leave a state in shared memory."""
    sums, distance, mass = state.below, state.distance, state.mass
    leave(memory, at, step, (state.maximum, state.at_maximum, sums.high, sums.low))
    if targets or entropic:
        leave(memory, at + 4 * step, step, (distance.high, distance.low, mass.high, mass.low))


def take(memory, at, step):
    """A state from shared memory."""
    numbers = taken(memory, at, step)
    below, distance, mass = Sum(numbers[2], numbers[3]), nothing, nothing
    if targets or entropic:
        sums = taken(memory, at + 4 * step, step)
        distance, mass = Sum(sums[0], sums[1]), Sum(sums[2], sums[3])
    return State(numbers[0], below, numbers[1], distance, mass)


def taken(memory, at, step):
    """Four numbers, as `leave` left them."""
    a, b = memory[np.uint32(at)], memory[np.uint32(at + step)]
    return a, b, memory[np.uint32(at + 2 * step)], memory[np.uint32(at + 3 * step)]


# the threads of a row


def warp_maximum(value):
    for mask in (16, 8, 4, 2, 1):
        value = larger(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, mask))
    return value


def warp():
    """Number of the warp in its thread block."""
    return np.uint32(cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x) >> np.uint32(5)


def warps_of_team():
    return np.uint32(cuda.blockDim.x) >> np.uint32(5)


def lane_of_warp():
    return np.uint32(cuda.threadIdx.x) & np.uint32(WARP - 1)


def maximum_of_team(value, memory, at):
    """The largest of the team's numbers, for every member; NaN are passed over."""
    value = warp_maximum(value)
    warps = warps_of_team()
    if warps > 1:
        lane = lane_of_warp()
        if lane == 0:
            memory[np.uint32(at + warp())] = value
        cuda.syncthreads()
        value = -c.infinity
        if lane < warps:
            value = memory[np.uint32(at + cuda.threadIdx.y * warps + lane)]
        value = warp_maximum(value)
    return value


def post(value, memory, at):
    """Leave the warp's sum for `collect`, after a barrier."""
    for mask in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, mask)
    if lane_of_warp() == 0:
        memory[np.uint32(at + warp())] = value


def collect(memory, at, member):
    """The sum of a team, by its number in the thread block; for the threads of the first warp."""
    warps = warps_of_team()
    if several:
        first, total = np.uint32(at + member * warps), nothing
        for i in range(np.uint32(warps)):
            total = plus(total, memory[np.uint32(first + i)])
        return total
    number, lane = c.zero, lane_of_warp()
    if lane < warps:
        number = memory[np.uint32(at + lane)]
    total = Sum(number, c.zero)
    for mask in (16, 8, 4, 2, 1):
        total = add(total, sum_across(total, mask))
    return total


def sum_of_block(value, memory):
    """The sum of a thread block, for its first thread."""
    post(value, memory, 0)
    cuda.syncthreads()
    total = nothing
    if warp() == 0:
        total = collect(memory, 0, 0)
    return total.high + total.low


def across(number, mask):
    """The number of another lane of the warp."""
    return cuda.shfl_xor_sync(0xFFFFFFFF, number, mask)


def sum_across(a, mask):
    return Sum(across(a.high, mask), across(a.low, mask))


def state_across(state, mask):
    """The state of another lane of the warp, which has the same maximum."""
    distance, mass = nothing, nothing
    if targets or entropic:
        distance = sum_across(state.distance, mask)
    if targets:
        mass = sum_across(state.mass, mask)
    below, at_maximum = sum_across(state.below, mask), across(state.at_maximum, mask)
    return State(state.maximum, below, at_maximum, distance, mass)


def lifted_to_warp(state):
    """A state for the largest maximum of the warp."""
    return lifted(state, warp_maximum(state.maximum))


# texts and names


@cache
def shared(real, approximate=False, modern=False, targets=False, entropic=False, several=False):
    """What many variants share: formulas, and the texts of `maths` and of this module."""
    zero = real(0)
    nothing = Sum(zero, zero)
    names = {
        "targets": targets,
        "entropic": entropic,
        "several": several,  # whether a thread block has more than one team
        "nothing": nothing,
        "identity": State(real(-np.inf), nothing, zero, nothing, nothing),
    }
    return bound(vars(maths.of(real, approximate, modern)) | names, sys.modules[__name__])
