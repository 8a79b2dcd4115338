"""Races in shared memory: two accesses to a byte, one a store, by threads that no barrier orders."""

import numpy as np

from .memory import Fault


class Races:
    """For each byte who stored and who loaded it last, stamped by a clock of accesses.

    Two threads are ordered by a barrier of what contains both: their warp, their block, their cluster.
    """

    def __init__(self, machine):
        self.machine = machine

    def reset(self):
        m = self.machine
        n = len(m.spaces["shared"].data)
        self.clock = 1
        self.barrier = {scope: np.zeros(m.lanes, np.int64) for scope in ("warp", "block", "cluster")}
        # the last store; the last load by a warp, with its lanes; the last load by another warp
        self.writer, self.written = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.reader, self.lanes, self.read = (
            np.zeros(n, np.int64),
            np.zeros(n, np.uint32),
            np.zeros(n, np.int64),
        )
        self.other, self.other_read = np.zeros(n, np.int64), np.zeros(n, np.int64)

    def synchronised(self, scope, mask):
        self.clock += 1
        for inner in ("warp", "block", "cluster")[: ("warp", "block", "cluster").index(scope) + 1]:
            self.barrier[inner][mask] = self.clock

    def since(self, stamp, lane, warp):
        """Has there been no barrier for `lane` and for a thread of `warp` since then?"""
        m = self.machine
        same_block = m.block_of[32 * warp] == m.block_of[lane]
        outer = np.where(same_block, self.barrier["block"][lane], self.barrier["cluster"][lane])
        last = np.where(m.warp_of[lane] == warp, self.barrier["warp"][lane], outer)
        return (stamp > 0) & (stamp >= last)

    def observe(self, kind, offset, index, width):
        m = self.machine
        lane = np.repeat(np.arange(m.lanes)[index], width)
        at = (offset[:, None] + np.arange(width)).reshape(-1)
        warp = m.warp_of[lane]
        self.clock += 1
        if kind == "atomic":
            return  # atomics do not race with each other; with other accesses: not looked for
        bad = (self.writer[at] != lane) & self.since(self.written[at], lane, self.writer[at] >> 5)
        self.blame("race: stored by another thread", bad, at, width)
        if kind == "read":
            self.loaded(at, lane, warp)
            return
        others = self.lanes[at] & ~(np.uint32(1) << m.lane[lane])
        bad = np.where(self.reader[at] == warp, others != 0, True) & self.since(
            self.read[at], lane, self.reader[at]
        )
        bad |= (self.other[at] != warp) & self.since(self.other_read[at], lane, self.other[at])
        self.blame("race: loaded by another thread", bad, at, width)
        self.writer[at] = lane
        self.written[at] = self.clock
        self.blame("race: stored by two threads at once", self.writer[at] != lane, at, width)

    def loaded(self, at, lane, warp):
        before, stamp = self.reader[at], self.read[at]
        change = (before != warp) & (stamp > 0)
        self.other[at[change]], self.other_read[at[change]] = before[change], stamp[change]
        # lanes that loaded before a barrier of their warp no longer count
        fresh = (before != warp) | ~self.since(stamp, lane, warp)
        self.lanes[at[fresh]] = 0
        self.reader[at] = warp
        self.read[at] = self.clock
        last = self.reader[at] == warp
        self.other[at[~last]], self.other_read[at[~last]] = warp[~last], self.clock
        np.bitwise_or.at(self.lanes, at[last], np.uint32(1) << self.machine.lane[lane[last]])

    def blame(self, reason, bad, at, width):
        if bad.any():
            position = int(np.argmax(bad))
            extent = self.machine.spaces["shared"].size
            raise Fault(reason, position // width, at[position] % extent)
