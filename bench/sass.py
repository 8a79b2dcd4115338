"""Machine code of a kernel, and the trace of a warp through it, from how often it executed the PTX.

No GPU is needed: the assembler notes the line of PTX that each instruction is for, and an emulator of
PTX knows how often each warp executed that line.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sysconfig
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

#: Where a warp goes: where there is something to do, before where nothing is known.
RANK = {True: 2, None: 1, False: 0}
#: More instructions of a warp are taken for a trace without an end.
LONGEST = 1_000_000

#: What executes instructions, by the beginnings of their names; the longest that fits counts.
PIPES = {
    "FMA": "FADD FFMA FMUL HADD HFMA HMUL IMAD IDP",
    "ALU": "BMSK F2FP FMNMX FSEL FSET FSETP FSWZ HMNMX HSET I2FP IABS IADD IMNMX ISETP LEA LOP MOV P2R "
    "PLOP PRMT R2P REDUX SEL SGXT SHF VABS VIADD VIMNMX",
    "MUFU": "BREV F2F F2I FCHK FLO FRND I2F MUFU POPC",
    "FP64": "DADD DFMA DMUL DMNMX DSETP DSET",
    "LSU": "ATOM CCTL LD RED SHFL ST SYNCS UBLKCP",
    "uniform": "R2UR S2UR U",
    "control": "BAR BMOV BRA BREAK BRX BSSY BSYNC CALL DEPBAR ERRBAR EXIT MEMBAR NOP RET UCGABAR "
    "ENDCOLLECTIVE WARPSYNC YIELD",
    "other": "CS2R LDC LEPC S2R VOTE",
}
_PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}

#: Sections of a cubin, their flags, and attributes of its functions.
NOTES, REGISTERS, STACK = 0x70000000, 0x2F, 0x11

_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\d+ )?\s*(\S+?)( [^;]*)?\s*;")
_LINE = re.compile(r'\s*//## File ".*", line (\d+)')
_LABEL = re.compile(r"(\.L_x_\d+):")


class Instruction(NamedTuple):
    """One instruction; `line` is that of the PTX it is for, 0 if there is none."""

    line: int
    guard: str  # a predicate
    name: str
    operands: tuple[str, ...]

    @property
    def pipe(self) -> str:
        return pipe(self.name)

    @property
    def target(self) -> str | None:
        """The label it names."""
        found = re.search(r"\.L_x_\d+", self.operands[-1]) if self.operands else None
        return found[0] if found else None


@cache
def pipe(name: str) -> str:
    """What executes an instruction of that name."""
    fitting = [start for start in _PIPE_OF if name.startswith(start)]
    return _PIPE_OF[max(fitting, key=len)] if fitting else "other"


def tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit: of `PATH`, or of a package of NVIDIA's."""
    folders = Path(sysconfig.get_path("purelib"), "nvidia").glob("c*/bin")
    return shutil.which(name) or next(filter(None, (shutil.which(name, path=f) for f in folders)), None)


def disassembled(cubin: bytes, entry: str) -> Code:
    """The machine code of a kernel, assembled with line information."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [str(tool("nvdisasm")), "--print-code", "--print-line-info-ptx", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    own = text[text.index(f"\n.text.{entry}:") :]
    return Code(own.partition("\n//---")[0].splitlines())


#: What sets registers.
_MOVES = ("CS2R", "MOV", "IMAD.MOV", "UMOV", "HFMA2.MMA")


class Block:
    """Instructions of which all are executed, or none."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        copies: dict[int, Counter[str]] = defaultdict(Counter)
        for instruction in code:
            if instruction.line and (instruction.pipe != "control" or instruction.name[:3] == "BAR"):
                copies[instruction.line][instruction.name] += 1
        # how often the block has what is one instruction of PTX: more than once in an unrolled loop.
        # One may take several of machine code, of which the rarest tells; but any number of registers
        # are set before a branch
        told = [
            Counter({n: k for n, k in names.items() if not n.startswith(_MOVES)})
            for names in copies.values()
        ]
        counts = sorted(min(names.values()) for names in told if names)
        self.copies = counts[len(counts) // 4] if counts else 1
        self.lines = list(copies)


class Code:
    """Instructions in basic blocks."""

    def __init__(self, text: list[str]) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        line = 0
        for row in text:
            if match := _LINE.match(row):
                line = int(match[1])
            elif match := _LABEL.match(row):
                self.labels[match[1]] = len(self.instructions)
                line = 0
            elif match := _INSTRUCTION.match(row):
                guard, name, rest = match.groups()
                operands = tuple(part.strip() for part in (rest or "").split(",") if part.strip())
                self.instructions.append(Instruction(line, (guard or "").strip(), name, operands))
        starts = {0, *self.labels.values()}
        starts |= {k + 1 for k, i in enumerate(self.instructions) if _leaves(i)}
        ends = sorted(starts | {len(self.instructions)})
        self.blocks = {a: Block(self.instructions[a:b]) for a, b in pairwise(ends)}
        #: How many blocks have an instruction for a line of PTX.
        self.lines = Counter(line for block in self.blocks.values() for line in block.lines)

    @property
    def spills(self) -> int:
        """Instructions that move registers to and from memory."""
        return sum(i.name.startswith(("LDL", "STL")) for i in self.instructions)

    def trace(self, executed: Mapping[int, int]) -> Trace:
        """The trace of a warp that has executed the lines of PTX so often."""
        return Trace(self, executed)


def _leaves(instruction: Instruction) -> bool:
    return instruction.name.split(".")[0] in ("BRA", "BRX", "EXIT", "RET", "BSYNC")


class Trace:
    """The instructions that a warp executes, in their order.

    At a branch it goes where more lines of PTX are left to be executed. Where both sides are, it goes
    back, as loops do, or through the nearer side first and, where the sides meet, through the other.
    """

    def __init__(self, code: Code, executed: Mapping[int, int]) -> None:
        self.code = code
        self.left = {line: n for line, n in executed.items() if line in code.lines}
        self.total = sum(self.left.values())
        self.instructions = [i for block in self._blocks() for i in block.code]

    @property
    def unexplained(self) -> float:
        """Share of the executed lines that the trace has too often or not often enough.

        Of those with one place in the machine code, as others may have been needed in one place only.
        """
        left = [abs(n) for line, n in self.left.items() if self.code.lines[line] == 1]
        return sum(left) / max(self.total, 1)

    def _blocks(self) -> Iterator[Block]:
        at: int | None = 0
        steps, sides = 0, [[]]  # sides that wait, of each place where sides meet
        while at in self.code.blocks:
            block = self.code.blocks[at]
            yield block
            steps += len(block.code)
            if steps > LONGEST:
                raise ValueError("a trace through machine code does not end")
            for line in block.lines:
                self.left[line] = self.left.get(line, 0) - block.copies
            sides += [[] for i in block.code if i.name == "BSSY"]
            at = self._next(at, block, sides)

    def _next(self, at: int, block: Block, sides: list[list[int]]) -> int | None:
        """Where the block after that is; None at the end."""
        last, following = block.code[-1], at + len(block.code)
        name, target = last.name, self.code.labels.get(last.target or "")
        if name == "BSYNC":
            waiting = [side for side in sides[-1] if self._wanted(side)]
            if waiting:
                sides[-1] = waiting[:-1]
                return waiting[-1]
            if len(sides) > 1:
                sides.pop()
        elif name == "EXIT":
            return following if last.guard and self._wanted(following) is not False else None
        elif name == "BRA.CONV" or (name == "BRA" and not last.guard and len(last.operands) == 1):
            return target
        elif name == "BRA" and target is not None:  # not BRA.DIV, for warps that are not together
            wanted, other = self._wanted(target), self._wanted(following)
            if wanted and other and at < target and not self._joins(target):
                sides[-1].append(target)
            if wanted == other:  # back, or on if there is something to do there
                return target if (target <= at) == bool(wanted) else following
            return target if RANK[wanted] > RANK[other] else following
        elif name.startswith(("BRX", "RET")):
            return None
        return following

    def _joins(self, at: int) -> bool:
        """Whether sides meet there."""
        return self.code.blocks[at].code[0].name == "BSYNC"

    def _wanted(self, at: int, depth: int = 4) -> bool | None:
        """Whether most lines of the block there are left to be executed; None: it has no line."""
        block = self.code.blocks.get(at)
        if block is None or any(i.name.startswith("CALL") for i in block.code):
            return False  # what is called are the rare cases of a division
        if block.lines:
            own = [line for line in block.lines if self.code.lines[line] == 1] or block.lines
            ready = sum(self.left.get(line, 0) >= block.copies for line in own)
            return 2 * ready > len(own)
        last = block.code[-1]
        if last.name == "EXIT" or not depth:
            return None
        onward = self.code.labels.get(last.target or "") if last.name == "BRA" else None
        return self._wanted(at + len(block.code) if onward is None else onward, depth - 1)


class Resources(NamedTuple):
    """What a kernel asks of a multiprocessor."""

    registers: int  # of a thread
    stack: int  # bytes of a thread


def resources(cubin: bytes) -> Resources:
    """The most of any function of a cubin, as its ELF sections say."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    (count,) = struct.unpack_from("<H", cubin, 0x3C)
    found = {REGISTERS: 0, STACK: 0}
    for k in range(count):
        _, kind, _, _, offset, size, _, info = struct.unpack_from("<IIQQQQII", cubin, start + 64 * k)
        if kind == NOTES and not info:
            for at in range(offset, offset + size - 11, 4):
                form, attribute, length, _, value = struct.unpack_from("<BBHII", cubin, at)
                if form == 4 and attribute in found and length == 8:
                    found[attribute] = max(found[attribute], value)
    return Resources(found[REGISTERS], found[STACK])
