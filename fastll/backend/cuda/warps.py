"""What the threads of a row find together: maxima and sums over a warp, a team, a thread block.

A team is the threads of a thread block with one `threadIdx.y`: one warp or several. A warp folds by
halves; what the warps of a team have found adds up in their order, in two parts.
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np

from fastll.backend.cuda import maths
from fastll.backend.cuda.compiler import cuda, device
from fastll.backend.cuda.maths import Sum
from fastll.backend.cuda.primitives import WARP, larger, shuffle

#: Most warps of a thread block, and so the numbers of one kind that they leave in shared memory.
WARPS = 32


@functools.cache
def of(real):
    """The functions for numbers of the type `real`; `memory` is shared, and `at` a place in it."""
    add = maths.of(real).add
    infinity, zero = real(float("inf")), real(0)
    shuffled = device(shuffle)

    @device
    def warp_maximum(value):
        for mask in (16, 8, 4, 2, 1):
            value = larger(value, shuffled(value, mask))
        return value

    @device
    def warp_sum(value):
        for mask in (16, 8, 4, 2, 1):
            value += shuffled(value, mask)
        return value

    @device
    def warp():
        """Number of the warp in its thread block."""
        return np.uint32(cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x) >> np.uint32(5)

    @device
    def warps_of_team():
        return np.uint32(cuda.blockDim.x) >> np.uint32(5)

    @device
    def lane_of_warp():
        return np.uint32(cuda.threadIdx.x) & np.uint32(WARP - 1)

    @device
    def maximum(value, memory, at):
        """The largest of the team's numbers, for every member; NaN are passed over."""
        value = warp_maximum(value)
        warps = warps_of_team()
        if warps > 1:
            lane = lane_of_warp()
            if lane == 0:
                memory[np.uint32(at + warp())] = value
            cuda.syncthreads()
            value = -infinity
            if lane < warps:
                value = memory[np.uint32(at + cuda.threadIdx.y * warps + lane)]
            value = warp_maximum(value)
        return value

    @device
    def post(value, memory, at):
        """Leave the warp's sum for `collect`, after a barrier."""
        value = warp_sum(value)
        if lane_of_warp() == 0:
            memory[np.uint32(at + warp())] = value

    @device
    def collect(memory, at, member):
        """The sum of a team, by its number in the thread block."""
        total = Sum(zero, zero)
        first = np.uint32(at + member * warps_of_team())
        for i in range(warps_of_team()):
            total = add(total, Sum(memory[np.uint32(first + i)], zero))
        return total

    return SimpleNamespace(maximum=maximum, post=post, collect=collect)
