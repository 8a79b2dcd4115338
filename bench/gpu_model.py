"""What the GPU kernels cost, counted without a GPU: a model, nothing in it is measured.

Kernels are compiled as on an H200 and run on the emulator of the tests, which says how often each warp
executes each instruction of PTX; the machine code says which instructions these have become.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  NumPy then knows bfloat16
import numpy as np

import fastll
from bench import sass
from fastll.backend.cuda import compiler, launch
from fastll.backend.cuda.compiler import Kernel, core

# the emulator is part of the tests; the benchmark runs from the root of the repository
sys.path.append(str(Path(__file__).parents[1] / "tests"))
import device
import ptx

CAPABILITY = (9, 0)


class Case(NamedTuple):
    """A call of an operation on (rows, classes), or on so many elements."""

    operation: str
    shape: tuple[int, ...]
    dtype: str
    gradient: bool = False
    reduction: str | None = None

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape[1:] or self.shape))
        return " ".join((self.operation, *["gradient"] * self.gradient, shape, self.dtype))


class Launch(NamedTuple):
    """A kernel and how it was launched, with what the emulator counted."""

    kernel: Kernel
    text: str  # of PTX
    entry: str
    blocks: int
    threads: int
    bound: int
    shared: int
    stats: ptx.Stats


class Recorder(device.Emulated):
    """An emulated GPU that keeps what it has been asked to launch."""

    name = "recorder"

    def launch(
        self,
        kernel: Kernel,
        stream: int,
        blocks: int,
        block: tuple[int, int],
        arguments: list[Any],
        *,
        bound: int,
        shared: int = 0,
    ) -> None:
        text, entry, module = _compiled(kernel, bound)
        options = {"shared": shared, "cluster": kernel.cluster, "profile": True}
        stats = module.launch(None, blocks, block, list(arguments), self.memory, **options)
        self.launches.append(Launch(kernel, text, entry, blocks, prod(block), bound, shared, stats))


@cache
def _compiled(kernel: Kernel, bound: int) -> tuple[str, str, ptx.Module]:
    text, entry = compiler.ptx(kernel, CAPABILITY, bound)
    return text, entry, ptx.Module(text)


@contextmanager
def _instead_of_a_gpu(recorder: Recorder) -> Iterator[None]:
    before = launch.gpu, launch.count
    launch.gpu, launch.count = lambda index: recorder, lambda: 1
    try:
        with fastll.use_backend("cuda"):
            yield
    finally:
        launch.gpu, launch.count = before


def launched(case: Case) -> Launch:
    """The launch that does most of a call."""
    recorder, rng = Recorder(), np.random.default_rng(0)
    logits = (3 * rng.standard_normal(case.shape)).astype(case.dtype)
    arrays = [logits]
    if case.operation == "cross_entropy":
        arrays.append(rng.integers(0, case.shape[1], case.shape[0]))
    elif case.operation.startswith("binary"):
        arrays.append(rng.random(case.shape).astype(case.dtype))
    options: dict[str, Any] = {"axis": 1} if len(case.shape) == 2 else {}
    if case.reduction:
        options["reduction"] = case.reduction
    if case.gradient:
        options["return_grad"] = True
    with _instead_of_a_gpu(recorder):
        getattr(fastll, case.operation)(*map(recorder.to_device, arrays), **options)
    return max(recorder.launches, key=lambda found: found.stats.warp_instructions)


@cache
def machine_code(text: str, entry: str) -> tuple[bytes, sass.Code]:
    """Machine code of PTX, with the lines it comes from; the same instructions as without them."""
    options = core.ProgramOptions(arch="sm_{}{}".format(*CAPABILITY), fma=False, lineinfo=True)
    cubin = bytes(core.Program(text, "ptx", options).compile("cubin").code)
    return cubin, sass.disassembled(cubin, entry)


def ways(found: Launch, code: sass.Code) -> list[tuple[int, sass.Way]]:
    """The different ways of warps, and how many took each; the first warp's comes first."""
    lines = list(found.stats.executions)
    counts = np.array([found.stats.executions[line] for line in lines]).T
    different, first, number = np.unique(counts, axis=0, return_index=True, return_counts=True)
    return [
        (int(number[k]), code.way(dict(zip(lines, different[k].tolist(), strict=True))))
        for k in np.argsort(first)
    ]


def counted(case: Case) -> dict[str, Any]:
    found = launched(case)
    _, code = machine_code(found.text, found.entry)
    pipes, unexplained = Counter(), 0.0
    taken = ways(found, code)
    for number, way in taken:
        for instruction in way.instructions:
            pipes[instruction.pipe] += number
        unexplained += number * way.unexplained
    elements = prod(case.shape)
    return {
        "case": case.name,
        "instructions": 32 * pipes.total() / elements,
        "pipes": {pipe: 32 * n / elements for pipe, n in pipes.most_common()},
        "unexplained": unexplained / sum(n for n, _ in taken),
        "ways": len(taken),
        "conflicts": found.stats.shared_conflicts / found.blocks,
        "ptx": found.stats.warp_instructions * 32 / elements,
    }
