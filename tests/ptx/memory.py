"""Memory of an emulated device: bytes, and for each byte whether it may be read or written."""

import numpy as np

FREE, RAW, READY = (
    0,
    1,
    3,
)  # not allocated; allocated, never written; written. Bits: 1 may write, 2 may read
GUARD = 256
MARKS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "u8", 32: "u8"}  # how those of a word are looked at


class PTXError(Exception):
    """What a GPU would have done silently, or what the emulator does not know."""


class Fault(Exception):  # noqa: N818
    """A bad access by the lane at `position` among the active ones, of an instruction not yet known."""

    def __init__(self, reason, position, address=None):
        super().__init__(reason if address is None else f"{reason} at {int(address):#x}")
        self.reason, self.position = reason, position


class Space:
    """A state space: the bytes of all its threads in one array.

    A thread sees the addresses from `base` to `base + size`, size a power of two. `origin` says where
    in the array those of each lane start; None: all see the same. `observe` hears of every access.
    """

    def __init__(self, name, data, shadow, size, base=0, origin=None):
        self.name, self.size, self.origin, self.observe = name, size, origin, None
        self.strict = True
        self.attach(data, shadow, base)

    def attach(self, data, shadow, base=0):
        self.data, self.shadow, self.base = data, shadow, np.uint64(base)
        self.views = {}

    def words(self, width):
        """Bytes and marks by words of a width; the marks of a word that is allocated, or written."""
        if width not in self.views:
            # a type of that size, of which only the bits matter: rows of an array are gathered slowly
            word = {16: "c16", 32: "V32"}.get(width, f"u{width}")
            one, ready = np.full((2, width), [[RAW], [READY]], np.uint8)
            views = self.data.view(word), self.shadow.view(word)
            self.views[width] = *views, one.view(MARKS[width])[0], ready.view(word)[0]
        return self.views[width]

    def check(self, marks, at, address, strict):
        found = marks[at].view(MARKS[marks.itemsize])
        one = self.views[marks.itemsize][2]
        common = np.bitwise_and.reduce(found)
        if common & one != one:
            self.blame("not allocated", found & one != one, address, marks.itemsize)
        if strict and common != 3 * one:
            self.blame("not initialised", found != 3 * one, address, marks.itemsize)

    def blame(self, reason, bad, address, width):
        position = int(np.argmax(bad.reshape(len(address), -1).any(axis=1)))
        raise Fault(f"{reason}, {width} bytes", position, address[position])

    def locate(self, address, index, width):
        """Offsets into the array, checked for alignment and range in one pass over their bits."""
        low = address - self.base
        bits = int(np.bitwise_or.reduce(low))
        if bits & (width - 1):
            self.blame("misaligned", low & np.uint64(width - 1) != 0, address, width)
        if bits >= self.size:
            low = self.foreign(low, address, index, width)
        elif self.origin is not None:
            low += self.origin[index]
        return low.view(np.int64)

    def foreign(self, low, address, index, width):
        self.blame(f"outside {self.name} memory", low >= np.uint64(self.size), address, width)

    def load(self, address, index, dtype, count=1):
        """An array of a row for each address."""
        width = np.dtype(dtype).itemsize * count
        words, marks, *_ = self.words(width)
        offset = self.locate(address, index, width)
        at = offset >> (width.bit_length() - 1)
        self.check(marks, at, address, self.strict)
        if self.observe:
            self.observe("read", offset, index, width)
        return words[at].view(dtype).reshape(-1, count)

    def store(self, address, index, dtype, values):
        """`values`: the array of each element of a vector."""
        width = np.dtype(dtype).itemsize * len(values)
        words, marks, _, ready = self.words(width)
        offset = self.locate(address, index, width)
        at = offset >> (width.bit_length() - 1)
        self.check(marks, at, address, False)
        if self.observe:
            self.observe("write", offset, index, width)
        values = values[0] if len(values) == 1 else np.stack(values, axis=1).reshape(-1)
        words[at] = values.view(words.dtype)
        marks[at] = ready

    def exchange(self, address, index, dtype, function):
        """Atomics, lane after lane: function(position, old) gives the new value."""
        words, marks, *_ = self.words(np.dtype(dtype).itemsize)
        words = words.view(dtype)
        offset = self.locate(address, index, words.itemsize)
        at = offset // words.itemsize
        self.check(marks, at, address, True)
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
