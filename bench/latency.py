"""How long a thread block lives: a model of a multiprocessor with assumed latencies.

Warps issue in order, and an instruction waits for its operands. All warps of a block are in step with
the one that is followed: while it waits for one result, the others ask for theirs. Blocks are not in
each other's way; what all of them issue together is another limit (`issue_limit`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

from bench.sass import Instruction

Event = tuple[float, str]  # a clock, and the kind of what is there from then on

#: Clocks from an instruction to its result, by the beginnings of names. The longest that fits counts.
LATENCIES = {
    "": 5,
    "ATOM": 300,  # the L2 cache
    "LDC": 30,
    "LDG": 800,  # DRAM
    "LDL": 30,
    "LDS": 30,
    "LD": 210,  # generic addresses are those of other blocks of the cluster
    "MUFU": 20,
    "F2": 20,
    "F2FP": 5,
    "FCHK": 20,
    "I2F": 20,
    "I2FP": 5,
    "R2UR": 10,
    "REDUX": 20,
    "S2": 20,
    "SHFL": 24,
    "ULDC": 10,
    **dict.fromkeys(("DADD", "DFMA", "DMUL", "DSETP"), 8),
}
#: Clocks until the next instruction of the warp.
PAUSES = {"BAR": 20, "CCTL": 100, "MEMBAR.ALL.GPU": 400, "MEMBAR.SC.GPU": 400}
#: Clocks until something arrives that a later instruction waits for.
ARRIVALS = {"LDGSTS": 800, "UBLKCP": 800, "STAS": 210, "UCGABAR_ARV": 190}
#: Warp instructions that a multiprocessor issues in a clock.
ISSUED = 4
#: Clocks of a multiprocessor that a warp's instruction takes, where it is more than one in ISSUED.
TAKEN = {"F2": 0.5, "LDS": 1.0, "MUFU": 0.5, "SHFL": 1.0, "STS": 1.0}
WIDE = {"64": 2, "128": 4, "256": 8}

#: Of an H200, for each multiprocessor: what a copy reads and writes in a clock, threads, registers,
#: bytes of shared memory, thread blocks.
BYTES, THREADS, REGISTERS, SHARED, BLOCKS = 18.6, 2048, 65536, 228 << 10, 32
RESERVED = 1024  # bytes of shared memory of each block


def fitting(table: dict[str, float], name: str, other: float = 0.0) -> float:
    """What a table says of the longest beginning of a name that it has."""
    found = [start for start in table if name.startswith(start)]
    return table[max(found, key=len)] if found else other


class Cost(NamedTuple):
    """What is assumed of an instruction."""

    results: list[str]
    sources: list[str]
    latency: float
    pause: float
    taken: float  # clocks of the multiprocessor for each warp, before conflicts
    shared: bool  # whether it is an access to shared memory
    kind: str


@cache
def cost(instruction: Instruction) -> Cost:
    name = instruction.name
    results, sources = operands(instruction)
    shared = name.startswith(("LDS", "STS"))
    taken = fitting(TAKEN, name, 1 / ISSUED) * (width(name) if shared else 1)
    latency, pause = fitting(LATENCIES, name), fitting(PAUSES, name)
    return Cost(results, sources, latency, pause, taken, shared, kind(name))


def resident(threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor has room for."""
    warps = -(-threads // 32)
    of_a_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // of_a_warp // warps
    return min(by_registers, THREADS // (32 * warps), SHARED // (shared + RESERVED), BLOCKS)


class Arrivals:
    """What arrives without a register that waits for it: in barriers, and in groups of copies.

    What a block sends to others of its cluster, it gets from them at the same time.
    """

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self.groups: list[float] = []

    def begin(self, instruction: Instruction, clock: float) -> None:
        if instruction.name.startswith("LDGDEPBAR"):
            self.groups.append(self.last.get("LDGSTS", 0.0))
        for start, clocks in ARRIVALS.items():
            if instruction.name.startswith(start):
                self.last[start] = clock + clocks

    def awaited(self, instruction: Instruction) -> list[Event]:
        """The clocks of what an instruction waits for, and their kinds."""
        name = instruction.name
        if name.startswith("DEPBAR.LE"):  # all but the last groups
            left = int(instruction.operands[-1], 0)
            return [(max(self.groups[: len(self.groups) - left], default=0.0), "DRAM")]
        starts = {"UCGABAR_WAIT": ["UCGABAR_ARV"], "SYNCS.PHASECHK": ["UBLKCP", "STAS"]}
        found = next((starts[start] for start in starts if name.startswith(start)), [])
        return [(self.last.get(start, 0.0), kind(start)) for start in found]


class Life(NamedTuple):
    """Clocks that a block lives, and those of them in which its first warp waits, by what for."""

    clocks: float
    waits: dict[str, float]


def life(
    trace: Iterable[Instruction],
    warps_at: Callable[[int], float],
    conflicts_at: Callable[[int], float],
) -> Life:
    """The life of a block whose first warp has that trace.

    `warps_at` and `conflicts_at` say of a line of PTX how many warps of the block are there too, and
    how many wavefronts of shared memory each takes beyond the least.
    """
    ready: dict[str, Event] = {}
    arrivals = Arrivals()
    clock, line, waits = 0.0, 0, Counter[str]()
    for instruction in trace:
        of, line = cost(instruction), instruction.line or line
        awaited = arrivals.awaited(instruction) + [ready[r] for r in of.sources if r in ready]
        # a result is not overtaken by a later one, which only loads could do
        awaited += [ready[r] for r in of.results if r in ready and ready[r][1] != "arithmetic"]
        until, cause = max(awaited, default=(0.0, ""))
        if until > clock:
            waits[cause] += until - clock
            clock = until
        taken = of.taken + (conflicts_at(line) if of.shared else 0.0)
        clock += max(1.0, taken * warps_at(line))
        if of.pause:
            waits[of.kind] += of.pause
            clock += of.pause
        arrivals.begin(instruction, clock)
        for register in of.results:
            ready[register] = clock + of.latency, of.kind
    return Life(clock, dict(waits.most_common()))


def kind(name: str) -> str:
    """What is waited for."""
    return next((k for k in KINDS if name.startswith(KINDS[k])), "arithmetic")


KINDS = {
    "DRAM": ("LDG", "UBLKCP"),
    "L2": ("ATOM",),
    "shared": ("LDS", "SHFL"),
    "cluster": ("LD.", "UCGABAR", "STAS", "MEMBAR", "CCTL"),
    "barrier": ("BAR",),
    "constants": ("LDC", "ULDC", "S2", "R2UR"),
    "local": ("LDL",),
}


def width(name: str) -> int:
    """Registers that a load or a store moves."""
    return next((WIDE[part] for part in name.split(".") if part in WIDE), 1)


_REGISTER = re.compile(r"\b(UR|UP|R|P)(\d+)\b(\.64)?")


def operands(instruction: Instruction) -> tuple[list[str], list[str]]:
    """The registers that an instruction writes and reads."""
    name, base = instruction.name, instruction.name.split(".")[0]
    given = list(instruction.operands)
    # the operands that are written come first: predicates, a register, or that and predicates
    is_predicate = [bool(re.fullmatch(r"!?U?P(\d+|T)", part)) for part in given]
    count = next((k for k, p in enumerate(is_predicate) if not p), len(given))
    if "SETP" in base or "PLOP3" in base:
        count = min(count, 2)
    elif count < len(given) and "[" not in given[count]:  # an address is only read
        count += 1
        while not is_predicate[0] and count < len(given) and is_predicate[count]:
            count += 1
    loads, double = base.startswith(("LD", "ULD")), base.startswith("D") or ".F64" in name
    results, sources = [], []
    for k, part in enumerate(given):
        for bank, number, long in _REGISTER.findall(part):
            size = 1
            if bank in ("R", "UR"):
                if k < count:
                    wide = ".WIDE" in name or double
                    size = width(name) if loads or base in ("CS2R", "ATOM") else 2 if wide else 1
                elif base.startswith("ST") and "[" not in part:
                    size = width(name)
                elif long or double or (".WIDE" in name and k == len(given) - 1):
                    size = 2
            named = [f"{bank}{int(number) + i}" for i in range(size)]
            (results if k < count else sources).extend(named)
    sources += [f"{bank}{number}" for bank, number, _ in _REGISTER.findall(instruction.guard)]
    return results, sources


def latency_limit(blocks: int, nbytes: float, clocks: float) -> float:
    """Share of a copy's bandwidth that so many blocks of so many bytes reach beside each other."""
    return blocks * nbytes / clocks / BYTES


def issue_limit(instructions: float, nbytes: float) -> float:
    """Share of a copy's bandwidth at which so many instructions of threads are issued per `nbytes`."""
    return nbytes / BYTES / (instructions / 32 / ISSUED)
