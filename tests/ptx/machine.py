"""Threads of a kernel as lanes of NumPy arrays, and the order in which they run."""

from collections import Counter
from functools import cached_property, partial

import numpy as np

from .banks import Banks
from .instructions import classify, decode, role
from .memory import RAW, Fault, PTXError, Space
from .parse import SIZES, Literal, Negated, Register, Special, Variable
from .races import Races

WINDOW = 56  # a generic address: the upper byte tells the window, the rest the address in it
WINDOWS = {"global": 0, "const": 0, "shared": 1, "local": 2, "param": 3}
RANK = 24  # a shared address in a cluster: its block's rank plus one; 0: one's own
NUMPY = {"pred": "?", "f16x2": "f2", "bf16x2": "u2", "bf16": "u2"}
NUMPY |= {k: {"b": "u", "s": "i"}.get(k[0], k[0]) + str(n) for k, n in SIZES.items() if k not in NUMPY}
POISON = {1: 0, 2: 0x7FED, 4: 0x7FEDCBA9, 8: 0x7FFDCBA987654321}  # of registers: a NaN in a float
ALL = np.uint32(0xFFFFFFFF)


class Active:
    """The lanes that execute; a mask of None: all."""

    def __init__(self, mask, count, lanes):
        self.mask, self.count, self.lanes = mask, count, lanes

    @property
    def full(self):
        return self.mask is None

    @cached_property
    def index(self):
        return slice(None) if self.mask is None else np.flatnonzero(self.mask)

    @cached_property
    def warps(self):
        if self.mask is None:
            return self.lanes // 32
        return int(np.count_nonzero(self.mask.reshape(-1, 32).any(axis=1)))

    @cached_property
    def ballots(self):
        """For each lane, the lanes of its warp that are here."""
        mask = np.ones(self.lanes, bool) if self.mask is None else self.mask
        return ballots(mask)


def ballots(mask):
    return np.repeat(np.packbits(mask.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32), 32)


class Stats:
    """What a launch did. Instructions are counted a warp, and a thread."""

    def __init__(self):
        self.warp_instructions = self.thread_instructions = self.threads = 0
        self.warps_by_class, self.threads_by_class = Counter(), Counter()
        self.bytes_read = self.bytes_written = 0  # asked of global memory
        self.sectors_read = self.sectors_written = 0  # 32 bytes each, distinct within a warp's request
        self.reads = self.writes = None  # how often each byte of the arena, if tracked
        self.end = 0  # of what has been touched
        # if profiled, of shared memory; conflicts are wavefronts that other addresses would not need
        self.shared_wavefronts = self.shared_conflicts = 0
        # and by the number of a line of PTX: conflicts, and how often each warp executed what is there
        self.conflicts_at, self.executions = Counter(), {}

    @property
    def max_reads(self):
        return int(self.reads[: self.end].max(initial=0))

    @property
    def max_writes(self):
        return int(self.writes[: self.end].max(initial=0))


class Block:
    """Instructions that are executed together: a basic block, or a part that synchronisation ends."""

    def __init__(self, code, start, stop):
        self.start, self.stop = start, stop
        self.last = code[stop - 1]
        self.role = role(self.last)
        self.gate = code[start] if role(code[start]) == "meet" else None
        self.classes = Counter(map(classify, code[start:stop]))
        self.body = (
            code[start : stop - 1] if self.role in ("branch", "exit", "wait") else code[start:stop]
        )
        places = enumerate(code[start:stop], start)
        self.lines = [ins.line for k, ins in places if not k or ins.line != code[k - 1].line]
        self.warps = self.threads = 0
        self.executions = None  # by each warp, if profiled
        self.full = self.masked = None


class Cluster(Space):
    """Shared memory as a cluster sees it."""

    def foreign(self, low, address, index, width):
        m = self.machine
        rank, low = low >> np.uint64(RANK), low & np.uint64((1 << RANK) - 1)
        bad = (low >= np.uint64(self.size)) | (rank > np.uint64(m.cluster_size))
        if bad.any():
            self.blame("outside shared memory of the cluster", bad, address, width)
        own = m.block_of[index]
        target = np.where(rank == 0, own, own - own % m.cluster_size + rank.astype(np.int64) - 1)
        gone = m.exited.reshape(m.blocks, -1).all(axis=1)[target]
        if gone.any():
            self.blame("shared memory of a block that has exited", gone, address, width)
        return low + (target * self.size).astype(np.uint64)


class Machine:
    """`blocks` blocks of a kernel: registers, memory, program."""

    rank_bit = RANK
    ballots = staticmethod(ballots)

    def __init__(self, kernel, shape, blocks, dynamic=0, cluster=(1, 1, 1)):
        self.kernel, self.shape, self.blocks, self.cluster = kernel, shape, blocks, cluster
        self.dynamic = dynamic
        self.threads = int(np.prod(shape))
        self.padded = -(-self.threads // 32) * 32  # a warp is 32 lanes, of which the last may be idle
        self.lanes = lanes = blocks * self.padded
        self.cluster_size = int(np.prod(cluster))
        lane = np.arange(lanes)
        self.warp_of, self.block_of = lane >> 5, lane // self.padded
        self.lane = (lane & 31).astype(np.uint32)
        self.thread = lane % self.padded
        self.warp_key = self.warp_of << 48
        self.whole = Active(None, lanes, lanes)
        self.storage, self.specials, self.symbols, self.scratches = {}, {}, {}, {}
        self.sink = {n: np.zeros(lanes, f"u{n}") for n in (2, 4, 8)} | {1: np.zeros(lanes, bool)}
        self.carry = np.zeros(lanes, bool)
        self.params = np.zeros(8192, np.uint8)
        self.program = {}
        self.perturb = 0
        self.memory = self.grid = None  # but during a launch
        self.layout(dynamic)
        code = kernel.code
        leaders = {0, len(code)}
        for k, ins in enumerate(code):
            for label in ins.operands:
                if getattr(label, "position", None) is not None:
                    leaders.update(target.position for target in label.targets or [label])
            if role(ins) == "meet":
                leaders.add(k)
            elif role(ins):
                leaders.add(k + 1)
        self.stops = dict(zip(sorted(leaders), sorted(leaders)[1:], strict=False))

    # memory

    def layout(self, dynamic):
        """Places of the shared and the local variables, with gaps to see who goes astray."""
        self.places = {}
        spaces = {}
        for name, start, gap in (("shared", 1024, 16), ("local", 64, 16)):
            found = [v for v in self.kernel.variables if v.space == name]
            end, spans = start, []
            for v in sorted(found, key=lambda v: v.extern):
                size = dynamic if v.extern else v.size
                begin = self.places.get("extern") if v.extern else None
                if begin is None:
                    begin = -(-end // max(v.align, 16)) * max(v.align, 16)
                if v.extern:
                    self.places["extern"] = begin
                self.places[v] = begin
                spans.append((begin, size))
                end = max(end, begin + size + gap)
            extent = 1 << (end + gap).bit_length()
            groups = self.blocks if name == "shared" else self.lanes
            data = np.zeros((2, groups * extent if found else extent), np.uint8)
            owner = self.block_of if name == "shared" else np.arange(self.lanes)
            origin = (owner * extent).astype(np.uint64) if found else np.zeros(self.lanes, np.uint64)
            spaces[name] = Space(name, *data, extent, origin=origin)
            spaces[name].spans = spans
            if name == "shared":
                self.shared_bytes = sum(size for _, size in spans)
                spaces["shared::cluster"] = Cluster("shared", *data, extent, origin=origin)
                spaces["shared::cluster"].machine = self
        empty = np.zeros((2, 8), np.uint8)
        spaces["global"] = spaces["const"] = Space("global", *empty, 8)
        spaces["param"] = Space("param", self.params, np.full_like(self.params, 3), len(self.params))
        spaces["shared::cta"] = spaces["shared"]
        self.spaces = spaces
        self.windows = [spaces[n] for n in ("global", "shared::cluster", "local", "param")]

    def grouped(self, address, index, access):
        """access(space, address, index, which of the lanes) for each window of generic addresses."""
        windows = address >> np.uint64(WINDOW)
        low = address & np.uint64((1 << WINDOW) - 1)
        lanes = np.arange(self.lanes)[index]
        for window in np.unique(windows):
            pick = np.flatnonzero(windows == window)
            if window >= len(self.windows):
                raise Fault("not a generic address", int(pick[0]), address[pick[0]])
            try:
                access(self.windows[int(window)], low[pick], lanes[pick], pick)
            except Fault as fault:
                position = int(pick[fault.position])
                raise Fault(fault.reason, position, address[position]) from None

    def load(self, space, address, index, dtype, count):
        if space:
            return self.spaces[space].load(address, index, dtype, count)
        if not np.bitwise_or.reduce(address) >> np.uint64(WINDOW):
            return self.windows[0].load(address, index, dtype, count)
        values = np.empty((len(address), count), dtype)

        def access(space, address, index, pick):
            values[pick] = space.load(address, index, dtype, count)

        self.grouped(address, index, access)
        return values

    def store(self, space, address, index, dtype, values):
        if space:
            return self.spaces[space].store(address, index, dtype, values)
        return self.grouped(
            address, index, lambda s, a, i, pick: s.store(a, i, dtype, [v[pick] for v in values])
        )

    def exchange(self, space, address, index, dtype, function):
        if space:
            return self.spaces[space].exchange(address, index, dtype, function)
        old = np.empty(len(address), dtype)

        def access(space, address, index, pick):
            old[pick] = space.exchange(address, index, dtype, lambda k, value: function(pick[k], value))

        self.grouped(address, index, access)
        return old

    # operands

    def raw(self, register):
        if register not in self.storage:
            size = SIZES[register.kind]
            dtype = bool if register.kind == "pred" else f"u{size}"
            self.storage[register] = np.full(self.lanes, POISON[size], dtype)
        return self.storage[register]

    def read(self, operand, kind):
        """The array of a source: a register seen as `kind`, or one value for all threads."""
        dtype = np.dtype(NUMPY[kind])
        if isinstance(operand, Register):
            raw = self.raw(operand)
            if (raw.dtype == bool) != (kind == "pred") or raw.itemsize < SIZES[kind]:
                raise TypeError(f"{operand.name} is no {kind}")
            if raw.itemsize == SIZES[kind]:
                return raw.view(dtype)
            return raw.view(dtype)[:: raw.itemsize // dtype.itemsize]  # the low part
        if isinstance(operand, Literal):
            if dtype.kind == "f":
                value = np.array(operand.value, dtype)
                if operand.width == dtype.itemsize:
                    value = np.array(operand.bits, f"u{operand.width}").view(dtype)
                return value
            if kind == "pred":
                return np.array(bool(operand.value))
            value = operand.value if operand.bits is None else operand.bits
            return np.array(value % 256**dtype.itemsize, f"u{dtype.itemsize}").view(dtype)
        if isinstance(operand, Special):
            if operand.name not in self.specials:
                self.specials[operand.name] = np.zeros(self.lanes, np.uint32)
                self.special(operand.name)
            return self.specials[operand.name].view(dtype)
        if isinstance(operand, Variable):
            return (
                self.symbol(operand).astype(dtype) if operand in self.places else self.symbol(operand)
            )
        raise TypeError(f"no source: {operand}")

    def symbol(self, variable):
        """The address of a variable in its space."""
        if variable in self.places:
            return np.array(self.places[variable], np.uint64)
        if variable not in self.symbols:
            self.symbols[variable] = np.array(variable.address, np.uint64)
            self.place(variable)
        return self.symbols[variable]

    def place(self, variable):
        if variable.space in ("global", "const") and self.memory:
            self.symbols[variable][...] = variable_address(self.memory, variable)

    def dtype(self, kind):
        return np.dtype(NUMPY[kind])

    def window(self, space):
        """What is added to an address of a space for a generic one."""
        return WINDOWS[space] << WINDOW

    def scratch(self, dtype):
        return self.scratches.setdefault(dtype, np.zeros(self.lanes, dtype))

    def target(self, operand, kind):
        """The array of a destination, and as it is written; None, a `_`, takes anything."""
        raw = self.sink[SIZES[kind]] if operand is None else self.raw(operand)
        dtype = np.dtype(NUMPY[kind])
        if raw.itemsize < SIZES[kind] or (raw.dtype == bool) != (kind == "pred"):
            raise TypeError(f"{operand.name} cannot hold a {kind}")
        if raw.itemsize > SIZES[kind]:  # a small integer fills a register, by its sign
            dtype = np.dtype(f"{dtype.kind if dtype.kind == 'i' else 'u'}{raw.itemsize}")
        return raw, raw.view(dtype)

    def alu(self, target, kind, function, *sources):
        """A step: function(*sources, out). Idle lanes are computed too, and thrown away."""
        raw, out = self.target(target, kind)
        scratch = self.scratch(raw.dtype)
        small = scratch.view(out.dtype)

        def masked(active):
            function(*sources, small)
            np.copyto(raw, scratch, where=active.mask)

        return partial(function, *sources, out), masked

    def stepwise(self, function, ins):
        """A step that needs to know the lanes: function(active)."""

        def masked(active):
            self.line = ins.line
            try:
                function(active)
            except Fault as fault:
                lane = np.arange(self.lanes)[active.index][fault.position]
                raise self.error(ins, str(fault), lane) from None

        return partial(masked, self.whole), masked

    def address(self, operand):
        """function(active): the addresses of its lanes."""
        base, offset = operand.base, operand.offset
        if isinstance(base, Register) and self.raw(base).itemsize == 8:
            raw, add = self.raw(base), np.uint64(offset % 2**64)
            return lambda active: raw[active.index] + add
        if isinstance(base, Register):
            raw, add = self.read(base, "u32"), np.uint32(offset % 2**32)
            return lambda active: (raw[active.index] + add).astype(np.uint64)
        start = self.read(base, "u64")
        return lambda active: np.full(active.count, start + np.uint64(offset % 2**64))

    # program

    def error(self, ins, reason, lane=None):
        where = f"{self.kernel.name}, line {ins.line}: {reason}: {ins.text}"
        if lane is not None:
            block = tuple(map(int, self.coordinates[:, self.block_of[lane]]))
            thread = tuple(map(int, coordinates(self.thread[lane], self.shape)))
            where += f" (block {block}, thread {thread})"
        return PTXError(where)

    def decode(self, block):
        steps = [step for ins in block.body for step in self.decoded(ins)]
        block.full, block.masked = zip(*steps, strict=True) if steps else ((), ())

    def decoded(self, ins):
        steps = decode(self, ins)
        if ins.guard is None:
            return steps
        if role(ins) in ("branch", "exit"):
            return steps
        if role(ins):
            raise self.error(ins, "not supported under a predicate")

        def masked(active):
            taken, _ = self.split(ins, active)
            if taken:
                for full, some in steps:
                    full() if taken.full else some(taken)

        return [(partial(masked, self.whole), masked)]

    def predicate(self, operand):
        """function(): the values of a predicate or its negation."""
        if isinstance(operand, Negated):
            values = self.read(operand.register, "pred")
            return lambda: ~values
        values = self.read(operand, "pred")
        return lambda: values

    def some(self, mask):
        count = int(np.count_nonzero(mask))
        if count == self.lanes:
            return self.whole
        return Active(mask, count, self.lanes) if count else None

    def split(self, ins, active):
        """Who executes an instruction under a predicate, and who does not."""
        if ins.guard is None:
            return active, None
        values = self.predicate(ins.guard)()
        taken = self.some(values & active.mask if active.mask is not None else values.copy())
        if taken is None:
            return None, active
        if taken.count == active.count:
            return active, None
        return taken, self.some(~values & active.mask if active.mask is not None else ~values)

    def start(self, memory, arguments, stats, *, limit, perturb, racecheck, strict, track, profile):
        """Prepare a launch."""
        self.stats, self.limit, self.perturb, self.profile = stats, limit, perturb, profile
        for register in self.storage:
            self.storage[register].fill(POISON[self.storage[register].itemsize])
        self.memory = memory
        for variable in self.symbols:
            self.place(variable)
        self.params[: len(arguments)] = arguments
        self.spaces["global"].attach(memory.data, memory.shadow, memory.base)
        self.spaces["global"].size = memory.size
        self.spaces["global"].observe = self.traffic
        for space in self.spaces.values():
            space.strict = strict
        self.races = Races(self) if racecheck else None
        watchers = [self.races.observe] if racecheck else []
        watchers += [Banks(self).observe] if profile else []

        def observe(*access):
            for watch in watchers:
                watch(*access)

        for name in ("shared", "shared::cluster"):
            self.spaces[name].observe = observe if watchers else None
        if track:
            stats.reads, stats.writes = np.zeros((2, memory.size), np.int32)

    def finish(self):
        """Hold on to nothing of the launch."""
        self.memory = self.stats = self.races = self.grid = None
        self.spaces["global"].attach(*np.zeros((2, 8), np.uint8))

    def traffic(self, kind, offset, index, width):
        stats = self.stats
        key = (offset >> 5) | self.warp_key[index]
        ahead, behind = key[1:], key[:-1]
        if (ahead >= behind).all():
            sectors = 1 + int(np.count_nonzero(ahead != behind))
        else:
            sectors = np.unique(key).size
        if kind != "write":
            stats.bytes_read += len(offset) * width
            stats.sectors_read += sectors
        if kind != "read":
            stats.bytes_written += len(offset) * width
            stats.sectors_written += sectors
        if stats.reads is not None:
            for counts in [stats.reads] * (kind != "write") + [stats.writes] * (kind != "read"):
                for k in range(width):
                    np.add.at(counts, offset + k, 1)
            stats.end = max(stats.end, int(offset.max()) + width)

    def run(self, first, grid):
        """Execute blocks `first` and on."""
        total = int(np.prod(grid))
        self.grid = grid
        cluster, self.rank = np.divmod(first + np.arange(self.blocks), self.cluster_size)
        clusters = [g // c for g, c in zip(grid, self.cluster, strict=True)]
        self.outer = np.array(coordinates(cluster, clusters))
        self.inner = np.array(coordinates(self.rank, self.cluster))
        self.coordinates = self.outer * np.reshape(self.cluster, (3, 1)) + self.inner
        for name in self.specials:
            self.special(name)
        for name in ("shared", "local"):
            space = self.spaces[name]
            if space.spans:
                space.data.fill(0xFF)
                rows = space.shadow.reshape(-1, space.size)
                rows.fill(0)
                for begin, size in space.spans:
                    rows[:, begin : begin + size] = RAW
        self.exited = (self.thread >= self.threads) | (self.block_of >= total - first)
        if self.races:
            self.races.reset()
        self.arrivals = np.zeros(self.lanes, np.int64)
        self.waits = np.zeros(self.lanes, np.int64)
        self.pending, self.stalled = {0: self.some(~self.exited)}, {}
        self.stats.threads += self.pending[0].count
        with np.errstate(all="ignore"):
            self.schedule()
        for block in self.program.values():
            for name, count in block.classes.items():
                self.stats.warps_by_class[name] += count * block.warps
                self.stats.threads_by_class[name] += count * block.threads
            if self.profile:
                self.count(block, first, total)
            block.warps = block.threads = 0
        self.stats.warp_instructions = sum(self.stats.warps_by_class.values())
        self.stats.thread_instructions = sum(self.stats.threads_by_class.values())

    def count(self, block, first, total):
        """Add the executions of a block of instructions to the profile."""
        found, block.executions = block.executions, None
        each = self.padded // 32
        if found is not None:
            for line in block.lines:
                counts = self.stats.executions.setdefault(line, np.zeros(total * each, np.int32))
                part = counts[first * each : (first + self.blocks) * each]
                part += found[: len(part)]  # the last of `blocks` may not exist

    def special(self, name):
        """Fill in what a special register holds."""
        if self.grid is None:  # decoded before a launch
            return
        base, _, axis = name.partition(".")
        k = "xyz".find(axis) if axis else 0
        bit = np.uint32(1) << self.lane
        below = bit - np.uint32(1)
        of_block = {"ctaid": self.coordinates[k], "cluster_ctarank": self.rank}
        of_block |= {"clusterid": self.outer[k], "cluster_ctaid": self.inner[k]}
        values = {name: value[self.block_of] for name, value in of_block.items()}
        values |= {"lanemask_eq": bit, "lanemask_lt": below, "lanemask_le": below | bit}
        values |= {"lanemask_ge": ~below, "lanemask_gt": ~below ^ bit, "laneid": self.lane}
        values |= {"tid": coordinates(self.thread, self.shape)[k], "ntid": self.shape[k]}
        values |= {"warpid": self.thread >> 5, "nwarpid": self.padded // 32}
        values |= {"nctaid": self.grid[k], "nclusterid": self.grid[k] // self.cluster[k]}
        values |= {"cluster_nctaid": self.cluster[k], "cluster_nctarank": self.cluster_size}
        values |= {"is_explicit_cluster": self.cluster_size > 1, "dynamic_smem_size": self.dynamic}
        values |= {"total_smem_size": self.shared_bytes, "nsmid": 1, "smid": 0, "gridid": 0}
        self.specials[name][...] = values[base]

    # order

    def merge(self, one, other):
        return other if one is None else one if other is None else self.some(one.mask | other.mask)

    def go(self, position, active):
        if active is not None:
            waiting = self.pending.get(position)
            self.pending[position] = active if waiting is None else self.merge(waiting, active)

    def schedule(self):
        """The lanes with the smallest program counter first: those that parted meet again."""
        end = len(self.kernel.code)
        while self.pending or self.release():
            position = min(self.pending)
            active = self.pending.pop(position)
            if position == end:
                self.leave(active)
                continue
            block = self.program.get(position)
            if block is None:
                block = Block(self.kernel.code, position, self.stops[position])
                self.program[position] = block
                self.decode(block)
            if block.gate:
                active = self.meet(block, active)
                if active is None:
                    continue
            block.warps += active.warps
            block.threads += active.count
            if self.profile:
                if block.executions is None:
                    block.executions = np.zeros(self.lanes // 32, np.int32)
                block.executions += True if active.full else active.mask.reshape(-1, 32).any(axis=1)
            self.limit -= block.stop - position
            if self.limit < 0:
                raise self.error(block.last, "too many instructions: a loop that does not end?")
            if active.mask is None:
                for step in block.full:
                    step()
            else:
                for step in block.masked:
                    step(active)
            if block.role is None or block.role == "meet":
                self.go(block.stop, active)
            elif block.role == "wait":
                self.wait(block, active)
            else:
                taken, rest = self.split(block.last, active)
                if taken is not None:
                    self.take(block.last, taken)
                self.go(block.stop, rest)

    def take(self, ins, active):
        if ins.base == "bra":
            self.go(ins.operands[-1].position, active)
        elif ins.base == "brx":
            choice = np.broadcast_to(self.read(ins.operands[0], "u32"), self.lanes)
            mask = ~self.exited if active.full else active.mask
            for k, label in enumerate(ins.operands[-1].targets):
                self.go(label.position, self.some(mask & (choice == k)))
            if (mask & (choice >= len(ins.operands[-1].targets))).any():
                raise self.error(ins, "no such branch target")
        elif ins.base == "trap":
            raise self.error(ins, "trap", np.arange(self.lanes)[active.index][0])
        else:
            self.leave(active)

    def leave(self, active):
        self.exited = self.exited | (True if active.full else active.mask)

    def wait(self, block, active):
        cluster = "cluster" in block.last.mods
        if cluster:
            early = np.flatnonzero((self.waits >= self.arrivals)[active.index])
            if early.size:
                lane = np.arange(self.lanes)[active.index][early[0]]
                raise self.error(block.last, "barrier.cluster.wait without arrive", lane)
        key = "cluster" if cluster else "block", block.stop
        if active.full and not cluster:
            self.synchronised("block", np.ones(self.lanes, bool))
            return self.go(block.stop, active)
        self.stalled[key] = self.merge(self.stalled.get(key), active)
        return None

    def synchronised(self, scope, mask):
        if self.races:
            self.races.synchronised(scope, mask)

    def release(self):
        """Nobody can run: let through the barriers that are complete. False: all have exited."""
        for scope in ("block", "cluster"):
            here = {k: a for k, a in self.stalled.items() if k[0] == scope}
            masks = {k: np.ones(self.lanes, bool) if a.full else a.mask for k, a in here.items()}
            waiting = np.logical_or.reduce([np.zeros(self.lanes, bool), *masks.values()])
            if scope == "block":
                ready = np.repeat(
                    (waiting | self.exited).reshape(self.blocks, -1).all(axis=1), self.padded
                )
                self.converged({k: m & ready for k, m in masks.items()})
            else:
                arrived = np.where(self.exited, np.iinfo(np.int64).max, self.arrivals)
                size = self.padded * self.cluster_size
                ready = np.repeat(arrived.reshape(-1, size).min(axis=1), size) >= self.arrivals
            for key, mask in masks.items():
                if (mask & ready).any():
                    self.stalled[key] = self.some(mask & ~ready)
                    if self.stalled[key] is None:
                        del self.stalled[key]
                    self.go(key[1], self.some(mask & ready))
            if scope == "cluster":
                self.waits += waiting & ready
            if (waiting & ready).any():
                self.synchronised(scope, waiting & ready)
        if not self.pending and self.stalled:
            (scope, position), active = next(iter(self.stalled.items()))
            ins = self.kernel.code[position - (scope != "warp")]
            lane = np.arange(self.lanes)[active.index][0]
            also = sorted({self.kernel.code[p - (s != "warp")].line for s, p in self.stalled})
            raise self.error(ins, f"deadlock: threads wait for each other at lines {also}", lane)
        return bool(self.pending)

    def converged(self, masks):
        """bar.sync is .aligned: the threads of a warp must be at the same one."""
        seen = np.zeros(self.lanes // 32, bool)
        for (_, position), mask in masks.items():
            warps = mask.reshape(-1, 32).any(axis=1)
            if (seen & warps).any():
                lane = 32 * int(np.argmax(seen & warps))
                raise self.error(self.kernel.code[position - 1], "a warp is divided at barriers", lane)
            seen |= warps

    def meet(self, block, active):
        """Who may execute a .sync instruction of warps: those whose mask names only who is here."""
        ins = block.gate
        active = self.merge(self.stalled.pop(("warp", block.start), None), active)
        members = np.broadcast_to(self.read(ins.operands[-1], "u32"), self.lanes)
        if active.full and np.bitwise_and.reduce(members) == ALL:
            return active
        here = active.index
        stranger = (members[here] >> self.lane[here]) & np.uint32(1) == 0
        missing = members[here] & ~active.ballots[here]
        gone = missing & ballots(self.exited)[here]
        for bad, reason in (
            (stranger, "a thread that its mask does not name"),
            (gone, "exited threads"),
        ):
            if bad.any():
                lane = np.arange(self.lanes)[here][np.argmax(bad != 0)]
                raise self.error(ins, f"the mask and who is there differ: {reason}", lane)
        if not missing.any():
            return active
        late = np.zeros(self.lanes, bool)
        late[here] = missing != 0
        self.stalled["warp", block.start] = self.some(late)
        return self.some(~late if active.full else active.mask & ~late)


def coordinates(number, shape):
    x, y, _ = shape
    return number % x, number // x % y, number // (x * y)


def variable_address(memory, variable):
    """A variable of a module is placed in a memory when a kernel that mentions it is first launched."""
    if variable not in memory.modules:
        memory.modules[variable] = address = memory.alloc(variable.size)
        values = np.zeros(variable.size, np.uint8)
        initial = np.frombuffer(variable.initial or b"", np.uint8)
        values[: len(initial)] = initial
        memory.write(address, values)
    return memory.modules[variable]
