"""What the threads of a row find together: maxima and sums over a warp, a team, a thread block.

A team is the threads of a thread block with one `threadIdx.y`: one warp or several. A warp folds by
halves; what the warps of a team have found adds up in their order, in two parts. `memory` is shared
memory, and `at` a place in it.

Texts, bound to the names of a type; see `fastll.backend.cuda.variants`.
"""

# mypy: ignore-errors
# ruff: noqa: F403, F405

from __future__ import annotations

import numpy as np

from fastll.backend.cuda.compiler import cuda
from fastll.backend.cuda.maths import *
from fastll.backend.cuda.primitives import WARP, larger

#: Most warps of a thread block, and so the numbers of one kind that they leave in shared memory.
WARPS = 32


def warp_maximum(value):
    for mask in (16, 8, 4, 2, 1):
        value = larger(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, mask))
    return value


def warp_sum(value):
    for mask in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, mask)
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
    value = warp_sum(value)
    if lane_of_warp() == 0:
        memory[np.uint32(at + warp())] = value


def collect(memory, at, member):
    """The sum of a team, by its number in the thread block."""
    total = nothing
    first = np.uint32(at + member * warps_of_team())
    for i in range(warps_of_team()):
        total = plus(total, memory[np.uint32(first + i)])
    return total


def sum_of_block(value, memory):
    """The sum of a thread block, for its first thread."""
    post(value, memory, 0)
    cuda.syncthreads()
    total = nothing
    if cuda.threadIdx.x == 0:
        total = collect(memory, 0, 0)
    return total.high + total.low
