"""How many threads do what: every launch's shape, from the number of classes and the card alone.

So the order of a row's sums depends on nothing else. What the number of rows decides is how many
blocks there are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fastll.backend.cuda.primitives import VECTOR, WARP, lanes_of, size_of

#: Threads of a block of several short teams, and of kernels over rows of any strides.
BLOCK = 256
#: Most threads of a team, and vectors of a row that each takes.
TEAM, VECTORS = 320, 8
#: Threads of teams that must fit on a multiprocessor, which sets the registers of each.
RESIDENT = 1024
#: Blocks of a cluster, from compute capability 9 on: as many as every card has room for.
CLUSTERS = (1, 2, 4, 8)

#: Longer rows are taken in parts of so many classes, a thread block for each: where nothing is written
#: that needs the whole row, and where it is more than the chip holds.
LONG, PART = 1 << 18, 1 << 14

#: Up to this many classes, a row has one thread.
SHORT = 128
#: Bytes of shared memory that a block may use without asking.
SHARED = 48 * 1024
#: The most that it may ask for, by compute capability: 1 KB less than a multiprocessor has.
MOST_SHARED = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (12, 0): 99, (12, 1): 99}


class Team(NamedTuple):
    """The threads that share a row."""

    threads: int
    teams: int  # of a block
    cluster: int  # blocks that share a row
    segment: int  # classes of each of them
    capacity: int  # classes of a chunk
    chunked: bool  # whether a segment has several
    rows_at: int  # byte of shared memory where rows are
    pitch: int  # bytes of a chunk of one input
    shared: int  # of all


@lru_cache(1024)
def team(
    classes: int,
    name: str,
    inputs: int,
    scratch: int,
    capability: tuple[int, int],
    part: int | None = None,
) -> Team:
    """The team for rows of contiguous classes of a format, with one input or two, where a block needs
    `scratch` bytes of shared memory for other things; or that for parts of rows, of so many classes."""
    lanes, number = lanes_of(name), max(4, size_of(name))
    ragged = classes % lanes != 0
    most = most_shared(capability)

    def planned(cluster: int, capacity: int | None = None) -> Team:
        segment = _up(-(-classes // cluster), lanes) if cluster > 1 else part or classes
        taken = segment if capacity is None else capacity
        # a row that is no multiple of a vector may begin anywhere in one
        vectors = -(-(taken + (lanes - 1 if ragged else 0)) // lanes)
        threads = min(TEAM, _up(-(-vectors // VECTORS), WARP))
        teams = max(1, BLOCK // threads)
        exchanged = teams * threads * lanes * number if ragged else 0
        pitch = vectors * VECTOR
        shared = scratch + exchanged + teams * inputs * pitch
        chunked = taken < segment
        at = scratch + exchanged
        return Team(threads, teams, cluster, segment, taken, chunked, at, pitch, shared)

    clusters = CLUSTERS if capability >= (9, 0) and part is None else CLUSTERS[:1]
    # two blocks beside each other: one computes while the other one's row arrives
    for room in (_each(most, 2), most):
        for cluster in clusters:
            plan = planned(cluster)
            if plan.shared <= room:
                return plan
    room = _each(most, 2) - planned(clusters[-1], lanes * VECTORS * TEAM).rows_at
    return planned(clusters[-1], (room // inputs // VECTOR - 1) * lanes)


def most_shared(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may ask for."""
    return 1024 * MOST_SHARED.get(capability, 227) if capability >= (7, 5) else SHARED


def _each(most: int, blocks: int) -> int:
    """Bytes that each of several blocks of a multiprocessor may use."""
    return (most + 1024) // blocks - 1024


def lanes_of_row(classes: int) -> int:
    """Threads of a row of any strides."""
    if classes <= SHORT:
        return 1
    return 8 if classes <= 1024 else 32 if classes <= 16384 else BLOCK


def piece_of(row: int) -> tuple[int, int]:
    """Of short rows of that many bytes, the bytes of a piece, and of the pitch in shared memory."""
    width = VECTOR
    while row % width:
        width //= 2
    # of rows that are an even number of the widest pieces, threads would meet in few banks
    return width, row + (VECTOR if row % (2 * VECTOR) == 0 else 0)


def rows_together(pitch: int) -> int:
    """Short rows of a thread block."""
    return min(BLOCK, (SHARED - VECTOR) // pitch // WARP * WARP)


def _up(number: int, step: int) -> int:
    """The next multiple."""
    return -(-number // step) * step
