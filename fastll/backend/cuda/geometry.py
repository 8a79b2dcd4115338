"""How many threads do what: every launch's shape, from the number of classes and the card alone.

So the order of a row's sums depends on nothing else. What the number of rows decides is how many
blocks there are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fastll.backend.cuda.primitives import WARP, lanes_of, size_of

#: Threads of a block of several short teams, and of kernels over rows of any strides.
BLOCK = 256
#: Threads of a team, by the bytes of an element, and the most there can be. Two blocks fit beside each
#: other, by their registers, so that one computes while the other one reads.
TEAM, LARGEST_TEAM = {2: 384, 4: 384, 8: 448}, 1024
#: Vectors that a thread holds of one input, by the bytes of an element, or half as many of each of two:
#: 32 numbers or 8 doubles.
VECTORS = {2: 4, 4: 8, 8: 4}
#: Blocks of a cluster, from compute capability 9 on: as many as every card has room for.
CLUSTERS = (1, 2, 4, 8)

#: Up to this many classes, a row has one thread.
SHORT = 128
#: Bytes of shared memory that a block may use without asking.
SHARED = 48 * 1024


class Team(NamedTuple):
    """The threads that share a row."""

    vectors: int  # that each holds
    threads: int
    teams: int  # of a block
    cluster: int  # blocks that share a row
    segment: int  # classes of each of them
    capacity: int  # classes of a chunk
    chunked: bool  # whether a segment has several
    bound: int  # threads that must fit on a multiprocessor, which sets the registers of each


@lru_cache(1024)
def team(classes: int, name: str, inputs: int, capability: tuple[int, int]) -> Team:
    """The team for rows of contiguous classes of a format, with one input or two."""
    lanes, usual = lanes_of(name), TEAM[size_of(name)]
    vectors = VECTORS[size_of(name)] // inputs
    # a row that is no multiple of a vector may begin anywhere in one
    slack = lanes if classes % lanes else 0
    clusters = CLUSTERS if capability >= (9, 0) else CLUSTERS[:1]

    def threads_for(elements: int) -> int:
        return _up(-(-(elements + slack) // (lanes * vectors)), WARP)

    while vectors > 1 and classes + slack <= WARP * lanes * vectors // 2:
        vectors //= 2
    threads = threads_for(classes)
    if threads <= BLOCK:  # a block of several teams: one warp finishes the rows of all
        return Team(vectors, threads, BLOCK // threads, 1, classes, classes, False, 2 * usual)
    for largest, blocks in [(usual, n) for n in clusters] + [(LARGEST_TEAM, clusters[-1])]:
        segment = _up(-(-classes // blocks), lanes)
        threads = threads_for(segment)
        if threads <= largest:
            bound = 2 * usual if threads <= usual else LARGEST_TEAM
            return Team(vectors, threads, 1, blocks, segment, segment, False, bound)
    segment = _up(-(-classes // clusters[-1]), lanes)
    capacity = lanes * vectors * usual - slack
    return Team(vectors, usual, 1, clusters[-1], segment, capacity, True, 2 * usual)


def lanes_of_row(classes: int) -> int:
    """Threads of a row of any strides."""
    if classes <= SHORT:
        return 1
    return 8 if classes <= 1024 else 32 if classes <= 16384 else BLOCK


def staged_rows(classes: int, size: int) -> int:
    """Rows of a block that go through shared memory together."""
    fitting = SHARED // ((classes | 1) * size) // WARP * WARP
    return min(BLOCK, fitting)


def _up(number: int, step: int) -> int:
    """The next multiple."""
    return -(-number // step) * step
