"""What GPU kernels cost, counted without a GPU: a model, nothing in it is measured.

Kernels are compiled as for an H200 and run on the emulator of the tests, which counts how often each
warp executes each instruction of PTX, and conflicts in shared memory. The machine code says what these
instructions have become, and assumed latencies (`bench.latency`) how long they take.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  NumPy then knows bfloat16
import numpy as np

import fastll
from bench import latency, sass
from fastll.backend.cuda import launch
from fastll.backend.cuda.compiler import core

# the emulator is part of the tests; the benchmark runs from the root of the repository
TESTS = str(Path(__file__).parents[1] / "tests")
if TESTS not in sys.path:
    sys.path.append(TESTS)
import device  # noqa: E402
import ptx  # noqa: E402

CAPABILITY = (9, 0)
STORED = Path(__file__).parent / "results" / "gpu-model.json"
#: By how much a kernel may get worse.
ALLOWED = 0.05
#: What is compared, and the least difference that matters: where more is better, a negative one.
COMPARED = {"instructions": 0.05, "conflicts": 1.0, "spills": 0.5}
COMPARED |= {"latency_limit": -0.005, "ptx_instructions": 0.05}
#: Packages whose versions PTX depends on, and machine code too.
OF_PTX = ("numba", "numba-cuda", "llvmlite", "nvidia-nvvm")
OF_SASS = (*OF_PTX, "nvidia-nvjitlink")

Record = dict[str, Any]
Results = dict[str, Any]


class Case(NamedTuple):
    """A call of an operation on (rows, classes), or on a number of elements."""

    operation: str
    shape: tuple[int, ...]
    dtype: str
    gradient: bool = False

    @property
    def name(self) -> str:
        label = " ".join((self.operation, *["gradient"] * self.gradient))
        return f"{label}, {self.shape[-1]}, {self.dtype}"

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays of this shape that a call reads and writes."""
        written = self.gradient or self.operation == "softmax"
        arrays = 1 + self.operation.startswith("binary") + written
        return arrays * prod(self.shape) * np.dtype(self.dtype).itemsize


def cases() -> Iterator[Case]:
    """Few rows of each kind: as many as fill whole thread blocks."""
    halves = "bfloat16", "float32"
    for classes in (4096, 32000, 50257, 128256):
        for dtype in halves:
            yield Case("logsumexp", (2, classes), dtype)
            yield Case("cross_entropy", (2, classes), dtype)
            yield Case("cross_entropy", (2, classes), dtype, gradient=True)
    yield Case("cross_entropy", (2, 50257), "float16", gradient=True)
    yield Case("softmax", (2, 4096), "float32")
    for rows, classes in ((512, 10), (512, 32), (384, 100)):
        for dtype in halves:
            yield Case("cross_entropy", (rows, classes), dtype)
            yield Case("cross_entropy", (rows, classes), dtype, gradient=True)
    for dtype in halves:
        yield Case("binary_cross_entropy_with_logits", (1 << 16,), dtype)
        yield Case("binary_cross_entropy_with_logits", (1 << 16,), dtype, gradient=True)


class Launch(NamedTuple):
    """A kernel and how it was launched, with what the emulator counted."""

    text: str  # PTX
    entry: str
    blocks: int
    threads: int
    shared: int
    stats: ptx.Stats


class Recorder(device.Emulated):
    """An emulated GPU that counts."""

    name = "recorder"

    def __init__(self) -> None:
        super().__init__()
        self.options = {"profile": True}

    def most(self) -> Launch:
        """The launch that does most."""
        found = max(self.launches, key=lambda launch: launch.stats.warp_instructions)
        text, entry, threads = found.module.text, found.module.kernel(None).name, prod(found.block)
        return Launch(text, entry, found.blocks, threads, found.shared, found.stats)


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
    arrays = [(3 * rng.standard_normal(case.shape)).astype(case.dtype)]
    options: dict[str, Any] = {}
    if case.operation.startswith("binary"):
        arrays.append(rng.random(case.shape).astype(case.dtype))
        options["reduction"] = "sum"
    else:
        options["axis"] = 1
    if case.operation == "cross_entropy":
        arrays.append(rng.integers(0, case.shape[1], case.shape[0]))
        options["reduction"] = "mean" if case.gradient else "none"
    if case.gradient:
        options["return_grad"] = True
    with _instead_of_a_gpu(recorder):
        getattr(fastll, case.operation)(*map(recorder.to_device, arrays), **options)
    return recorder.most()


def assembled(text: str) -> bytes:
    """A cubin as fastll makes it of PTX, and the lines its instructions are for."""
    options = core.ProgramOptions(arch="sm_{}{}".format(*CAPABILITY), fma=False, lineinfo=True)
    return bytes(core.Program(text, "ptx", options).compile("cubin").code)


def traces(found: Launch, code: sass.Code) -> list[tuple[int, sass.Trace]]:
    """The different traces of warps, and how many warps have each; the first warp's comes first."""
    lines = list(found.stats.executions)
    counts = np.array([found.stats.executions[line] for line in lines]).T
    different, first, number = np.unique(counts, axis=0, return_index=True, return_counts=True)
    return [
        (int(number[k]), code.trace(dict(zip(lines, different[k].tolist(), strict=True))))
        for k in np.argsort(first)
    ]


def model(case: Case) -> Record:
    """All that is said of a case; numbers of instructions are for one element."""
    found = launched(case)
    elements, stats = prod(case.shape), found.stats

    def each(counts: Counter[str]) -> dict[str, float]:
        return {key: round(32 * n / elements, 3) for key, n in counts.most_common()}

    cubin = assembled(found.text)
    needs = sass.resources(cubin)
    resident = latency.resident(found.threads, needs.registers, found.shared)
    by_class = each(stats.warps_by_class)
    record = {
        "operation": case.operation,
        "variant": "gradient" if case.gradient else "value",
        "classes": case.shape[-1],
        "dtype": case.dtype,
        "threads": found.threads,
        "bytes_of_a_block": case.nbytes // found.blocks,
        "registers": needs.registers,
        "stack": needs.stack,
        "shared": found.shared,
        "resident_blocks": resident,
        "conflicts": round(1000 * stats.shared_conflicts / elements, 1),  # for 1000 elements
        "wavefronts": round(1000 * stats.shared_wavefronts / elements, 1),
        "ptx_instructions": round(sum(by_class.values()), 3),
        "ptx_classes": by_class,
        "measured": {"share_of_a_copy": None, "instructions": None, "conflicts": None},
    }
    if sass.tool("nvdisasm") is None:
        record |= {"from": "ptx", "instructions": record["ptx_instructions"], "pipes": by_class}
    else:
        record |= {"from": "sass"} | _from_machine_code(found, cubin, each)
        limit = latency.latency_limit(resident, record["bytes_of_a_block"], record["lifetime"])
        record["latency_limit"] = round(limit, 3)
    limit = latency.issue_limit(record["instructions"] * elements, case.nbytes)
    return record | {"issue_limit": round(limit, 3)}


def _from_machine_code(found: Launch, cubin: bytes, each: Any) -> Record:
    """What nvdisasm makes possible."""
    code = sass.disassembled(cubin, found.entry)
    taken, pipes = traces(found, code), Counter[str]()
    for number, trace in taken:
        for pipe, count in Counter(i.pipe for i in trace.instructions).items():
            pipes[pipe] += number * count
    executions, conflicts = found.stats.executions, found.stats.conflicts_at
    warps = -(-found.threads // 32)

    @cache
    def warps_at(line: int) -> float:
        counts = executions.get(line)
        return counts[:warps].sum() / counts[0] if counts is not None and counts[0] else warps

    @cache
    def conflicts_at(line: int) -> float:
        return conflicts[line] / executions[line].sum() if conflicts[line] else 0.0

    life = latency.life(taken[0][1].instructions, warps_at, conflicts_at)
    unexplained = sum(n * trace.unexplained for n, trace in taken) / sum(n for n, _ in taken)
    by_pipe = each(pipes)
    return {
        "instructions": round(sum(by_pipe.values()), 3),
        "pipes": by_pipe,
        "spills": code.spills,
        "lifetime": round(life.clocks),
        "waits": {cause: round(clocks) for cause, clocks in life.waits.items()},
        "unexplained": round(unexplained, 4),
    }


def versions(packages: Iterable[str] = (*OF_SASS, "nvidia-cuda-nvdisasm")) -> dict[str, str]:
    """The versions of packages that are there."""
    found = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def results(chosen: list[Case]) -> Iterator[tuple[str, Record]]:
    """The records of cases by name, in their order, as processes beside each other have them."""
    count = max(1, min(len(os.sched_getaffinity(0)), len(chosen)))
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        yield from zip((case.name for case in chosen), pool.map(model, chosen), strict=True)


def save(records: dict[str, Record]) -> None:
    """Store what later results are compared with."""
    whole = {"model": "Nothing here was measured.", "versions": versions(), "cases": records}
    STORED.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def stored() -> Results:
    """What is compared with; empty if nothing is stored."""
    if not STORED.exists():
        return {"versions": {}, "cases": {}}
    found: Results = json.loads(STORED.read_text(encoding="utf-8"))
    return found


def comparable(old: Results) -> tuple[bool, bool]:
    """Whether PTX and machine code are made by the versions that the stored results are of."""
    now, before = versions(), old["versions"]
    ptx, machine_code = (
        all(now.get(package) == before.get(package) for package in packages)
        for packages in (OF_PTX, OF_SASS)
    )
    return ptx, machine_code


def worse(old: Record, new: Record, same: tuple[bool, bool] = (True, True)) -> list[str]:
    """In what a kernel got worse by more than is allowed; `same` is what `comparable` says."""
    of_ptx, of_sass = same
    said = []
    for key, least in COMPARED.items():
        if key in ("ptx_instructions", "conflicts"):
            known = of_ptx
        else:
            known = of_sass and old["from"] == new["from"] == "sass"
        if not known:
            continue
        before, after = old[key], new[key]
        more = before - after if least < 0 else after - before
        if more > max(abs(least), ALLOWED * before):
            said.append(f"{key.replace('_', ' ')}: {before:g} before, {after:g} now")
    return said
