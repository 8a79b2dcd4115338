"""Memory of an emulated device: bytes, and for each byte whether it may be read or written."""

import numpy as np

FREE, RAW, READY = (
    0,
    1,
    3,
)  # not allocated; allocated, never written; written. Bits: 1 may write, 2 may read
GUARD = 256


class PTXError(Exception):
    """What a GPU would have done silently, or what the emulator does not know."""


class Fault(Exception):  # noqa: N818
    """A bad access by the lane at `position` among the active ones, of an instruction not yet known."""

    def __init__(self, reason, position, address):
        super().__init__(reason)
        self.reason, self.position, self.address = reason, position, address


class Space:
    """A state space: the bytes of all its threads in one array.

    A thread sees the addresses from `base` to `base + size`, size a power of two. `origin` says where
    in the array those of each lane start; None: all see the same bytes. `observe` hears of every access.
    """

    def __init__(self, name, data, shadow, size, base=0, origin=None):
        self.name, self.size, self.origin, self.observe = name, size, origin, None
        self.strict = True
        self.attach(data, shadow, base)

    def attach(self, data, shadow, base=0):
        self.data, self.shadow, self.base = data, shadow, np.uint64(base)
        self.views = {}

    def words(self, dtype, count=1):
        key = dtype, count
        if key not in self.views:
            wide = min(np.dtype(dtype).itemsize * count, 8)
            marks = self.shadow.view(f"u{wide}")
            both = self.data.view(dtype), marks
            if count > 1:
                rows = np.dtype(dtype).itemsize * count // wide
                both = both[0].reshape(-1, count), marks.reshape(-1, rows) if rows > 1 else marks
            state = np.full(8, 1, np.uint8).view(np.uint64)[0] >> np.uint64(64 - 8 * wide)
            self.views[key] = *both, marks.dtype.type(state)
        return self.views[key]

    def blame(self, reason, bad, address):
        position = int(np.argmax(bad.reshape(len(address), -1).any(axis=1)))
        raise Fault(reason, position, int(address[position]))

    def locate(self, address, index, width):
        """Offsets into the array, checked for alignment and range in one pass over their bits."""
        low = address - self.base
        bits = int(np.bitwise_or.reduce(low))
        if bits & (width - 1):
            self.blame("misaligned", low & np.uint64(width - 1) != 0, address)
        if bits >= self.size:
            low = self.foreign(low, address, index)
        elif self.origin is not None:
            low += self.origin[index]
        return low.view(np.int64)

    def foreign(self, low, address, index):
        self.blame(f"outside {self.name} memory", low >= np.uint64(self.size), address)

    def load(self, address, index, dtype, count=1):
        width = np.dtype(dtype).itemsize * count
        offset = self.locate(address, index, width)
        values, marks, one = self.words(dtype, count)
        at = offset >> (width.bit_length() - 1)
        found = marks[at]
        common = np.bitwise_and.reduce(found, axis=None)
        if common & one != one:
            self.blame("not allocated", found & one != one, address)
        if self.strict and common != 3 * one:
            self.blame("not initialised", found != 3 * one, address)
        if self.observe:
            self.observe("read", offset, index, width)
        return values[at]

    def store(self, address, index, dtype, values):
        """`values`: an array a lane, or a list of arrays, one for each element of a vector."""
        count = len(values)
        width = np.dtype(dtype).itemsize * count
        offset = self.locate(address, index, width)
        words, marks, one = self.words(dtype, count)
        at = offset >> (width.bit_length() - 1)
        found = marks[at]
        if np.bitwise_and.reduce(found, axis=None) & one != one:
            self.blame("not allocated", found & one != one, address)
        if self.observe:
            self.observe("write", offset, index, width)
        if count == 1:
            words[at] = values[0]
        else:
            for k, value in enumerate(values):
                words[at, k] = value
        marks[at] = 3 * one

    def exchange(self, address, index, dtype, function):
        """Atomics, lane after lane: function(position, old) gives the new value."""
        offset = self.locate(address, index, np.dtype(dtype).itemsize)
        words, marks, one = self.words(dtype)
        at = offset // words.itemsize
        if not (marks[at] == 3 * one).all():
            self.blame("not allocated or not initialised", marks[at] != 3 * one, address)
        if self.observe:
            self.observe("atomic", offset, index, words.itemsize)
        old = np.empty(len(at), dtype)
        for position, k in enumerate(at):
            old[position] = words[k]
            words[k] = function(position, old[position])
        return old


class Memory:
    """Device memory. A device address is the host address of a byte of the arena."""

    def __init__(self, nbytes=64 << 20):
        self.size = 1 << (nbytes - 1).bit_length()
        arena = np.zeros(self.size + 4096, np.uint8)  # pages that are never touched cost nothing
        skip = -arena.ctypes.data % 4096
        self.data = arena[skip : skip + self.size]
        self.shadow = np.zeros(self.size, np.uint8)
        self.base = self.data.ctypes.data
        self.sizes = {}  # address -> bytes
        self.cursor = self.base
        self.modules = {}  # what modules keep here: their .global variables

    def alloc(self, nbytes):
        """An address aligned to 256 bytes, with at least as many around it that nobody may touch."""
        room = -(-nbytes // GUARD) * GUARD + 2 * GUARD
        taken = sorted((a - GUARD, a + -(-n // GUARD) * GUARD + GUARD) for a, n in self.sizes.items())
        for start in (self.cursor, self.base):  # what was freed is used again as late as can be
            for low, high in taken:
                if start < high and low < start + room:
                    start = high
            if start + room <= self.base + self.size:
                break
        else:
            raise MemoryError(f"{nbytes} bytes do not fit in an arena of {self.size}")
        address = start + GUARD
        self.cursor = start + room
        self.sizes[address] = nbytes
        at = address - self.base
        self.data[at : at + nbytes] = 0xFF  # NaN in every format
        self.shadow[at : at + nbytes] = RAW
        return address

    def free(self, address):
        if address not in self.sizes:
            raise PTXError(f"free({address:#x}): not an allocation")
        at = address - self.base
        self.shadow[at : at + self.sizes.pop(address)] = FREE

    def _span(self, address, nbytes, state):
        at = address - self.base
        span = slice(at, at + nbytes)
        if not 0 <= at <= self.size - nbytes or (self.shadow[span] & state != state).any():
            what = "outside of an allocation" if state == RAW else "where nothing has been written"
            raise PTXError(f"{nbytes} bytes at {address:#x}: {what}")
        return span

    def view(self, address, dtype, shape):
        """The bytes there, without a look at what has been written."""
        dtype = np.dtype(dtype)
        nbytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        return self.data[self._span(address, nbytes, RAW)].view(dtype).reshape(shape)

    def write(self, address, array):
        array = np.ascontiguousarray(array)
        span = self._span(address, array.nbytes, RAW)
        self.data[span] = array.reshape(-1).view(np.uint8)
        self.shadow[span] = READY

    def read(self, address, dtype, shape):
        """A copy, every byte of which must have been written."""
        array = self.view(address, dtype, shape)
        self._span(address, array.nbytes, READY)
        return array.copy()
