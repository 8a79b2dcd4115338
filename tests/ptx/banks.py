"""Conflicts of the banks of shared memory: how often it is read or written to serve an instruction."""

import numpy as np

BANKS, BYTES = 32, 4  # words of as many bytes, one after the other, lie in different banks


class Banks:
    """Counts wavefronts: in one of them every bank gives or takes one word, which lanes may share.

    The lanes of a warp are served together for accesses of up to 4 bytes, 16 for 8 bytes and 8 for 16.
    What a block asks of another one's shared memory is left out.
    """

    def __init__(self, machine):
        self.machine = machine

    def observe(self, kind, offset, index, width):
        m = self.machine
        words = max(width // BYTES, 1)
        group = np.arange(m.lanes)[index] // (32 // words)
        own = offset // m.spaces["shared"].size == m.block_of[index]
        if not own.any():
            return
        word = offset[own][:, None] // BYTES + np.arange(words)
        # words of each group in order of their banks, every one once
        key = np.unique((group[own][:, None] << 40) + (word % BANKS << 32) + word)
        first = np.flatnonzero(np.diff(key >> 32, prepend=-1))  # of a bank
        depth = np.diff(first, append=len(key))
        start = np.flatnonzero(np.diff(key[first] >> 40, prepend=-1))  # of a group
        wavefronts = int(np.maximum.reduceat(depth, start).sum())
        m.stats.shared_wavefronts += wavefronts
        m.stats.shared_conflicts += wavefronts - len(start)
        m.stats.conflicts_at[m.line] += wavefronts - len(start)
