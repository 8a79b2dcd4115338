"""The grid: four measures over rows x classes, beside the fastest peer and beside the floor.

A cell is a number of classes and of elements. The order of the cells covers the whole range coarsely
and then refines it, so that a run may end at any time. Results have the format of the other commands.
"""

from __future__ import annotations

import json
import os
import random
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from timeit import timeit
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape

import fastll
from bench.cases import Case
from bench.jobs import Job, Settings, Workload, workload
from bench.peers import PEERS, Call, Peer, torch_of_rows
from bench.report import ReportError, Results
from bench.rounds import LEAST_ROUNDS, Times, bind_peers, first_line, record, seconds
from bench.session import environment, progress_bar

MEASURES = (
    "logsumexp/value",
    "softmax/value",
    "sparse_cross_entropy/value",
    "sparse_cross_entropy/gradient",
)
DTYPES = ("float32", "bfloat16")
RIVALS = ("torch", "torch.compile", "jax")

_POWERS = tuple(2**k for k in range(1, 19))
#: Numbers of classes, and binary logarithms of numbers of elements, in levels that refine each other.
CLASSES = (
    (2, 10, 32, 100, 1000, 10000, 50257, 262144),
    (4, 16, 31, 64, 256, 4096),
    (3, 8, 128, 32000, 128256),
    _POWERS,
    tuple(n for power in _POWERS for n in (power - 1, power + 1) if 2 <= n <= _POWERS[-1]),
)
EXPONENTS = ((6, 12, 18, 22, 27), (15,), (9, 20, 24), (8, 10, 14, 16, 26), tuple(range(6, 28)))
#: The quick grid has the first levels and at most 2**22 elements.
QUICK_LEVELS, QUICK_EXPONENT, QUICK_MINUTES = 2, 22, 2.25
#: Below two to this power elements, starting the threads takes longer than reading: no floor.
FLOOR_FROM = 16

#: Bytes that a cell takes at most, per element and per row: a quarter more than measured at 2**24
#: elements, where the gradients of PyTorch and JAX took most.
BYTES_PER_ELEMENT, BYTES_PER_ROW = 24, 52

#: For so many seconds, and no longer, the threads of PyTorch take CPUs after their last work.
SPINNING = 0.015

#: The results are written this often, in seconds.
SAVED_EVERY = 60


class Effort(NamedTuple):
    """How long to measure."""

    sample: float  # a sample is as many calls as take this many seconds
    rounds: int
    patience: float  # seconds after which a peer stops, but not before LEAST_ROUNDS


#: A peer that takes this many times as long as the fastest one stops after its first round.
HOPELESS = 4
QUICK, FULL = Effort(1e-3, 5, 0.02), Effort(4e-3, 9, 0.5)


@dataclass(frozen=True)
class Plan:
    """What the command line selects."""

    quick: bool = False
    measures: tuple[str, ...] = MEASURES
    dtypes: tuple[str, ...] = DTYPES
    against: tuple[str, ...] = RIVALS
    backend: str | None = None  # or the one that fastll chooses
    classes: tuple[int, int] = (2, 1 << 18)  # the least and the most
    exponents: tuple[int, int] = (6, 27)
    minutes: float | None = None  # start no cell after this time
    memory: float | None = None  # bytes; by default what is free

    @property
    def effort(self) -> Effort:
        return QUICK if self.quick else FULL


def cells(plan: Plan) -> list[Job]:
    """The cells in their order: level by level, and mixed within a level."""
    levels = QUICK_LEVELS if plan.quick else len(CLASSES)
    least, most = plan.exponents
    sizes = _levels(EXPONENTS[:levels], least, min(most, QUICK_EXPONENT) if plan.quick else most)
    shapes = defaultdict(list)
    for classes, level in _levels(CLASSES[:levels], *plan.classes).items():
        for size, other in sizes.items():
            if classes <= 1 << size:
                rows = (1 << size) // classes
                # a workload of small calls has no floor
                group = "calls" if size < FLOOR_FROM else "grid"
                case = Case(f"{rows}x{classes}", (rows, classes), 1, plan.measures, group=group)
                shapes[max(level, other)].append(case)
    for some in shapes.values():
        random.Random(0).shuffle(some)
    return [
        Job(
            *measure.split("/"),
            case,
            dtype,
            "randn",
            plan.backend or "default",
            plan.against,
            plan.effort.rounds,
        )
        for level in sorted(shapes)
        for case in shapes[level]
        for dtype in plan.dtypes
        for measure in plan.measures
    ]


def _levels(table: Iterable[Iterable[int]], least: int, most: int) -> dict[int, int]:
    """Numbers and the first level that each is in."""
    found: dict[int, int] = {}
    for level, numbers in enumerate(table):
        for number in numbers:
            if least <= number <= most:
                found.setdefault(number, level)
    return found


def measure(plan: Plan, path: Path, before: Results | None = None) -> int:
    """Measure the cells that `before` lacks and write all results; return an exit code."""
    start, code, saved = perf_counter(), 0, perf_counter()
    jobs = cells(plan)
    settings = Settings(against=plan.against, rounds=plan.effort.rounds)
    results: Results = {"benchmarks": [], "unmeasured": {}, "environment": environment(settings)}
    about = results["environment"]["grid"] = {"seconds": 0.0, "others": 0.0}
    if before is not None:
        _check_same_machine(before, results)
        results["benchmarks"] = before["benchmarks"]
        about |= before["environment"]["grid"]
    done = {benchmark["param"] for benchmark in results["benchmarks"]}
    left = [job for job in jobs if job.name not in done]
    peers = PEERS | {"torch.compile": Peer("torch", torch_of_rows)}

    def save() -> None:
        """Replace the file by a whole one: the run may end at any time."""
        measured_now = len(results["benchmarks"]) - len(done)
        about["not_reached"] = len(left) - measured_now - len(results["unmeasured"])
        new = path.with_suffix(".new")
        new.write_text(json.dumps(results), encoding="utf-8")
        new.replace(path)

    try:
        with progress_bar(Console(stderr=True)) as progress:
            task = progress.add_task("", total=len(jobs), completed=len(jobs) - len(left))
            for job in left:
                if plan.minutes is not None and perf_counter() - start > 60 * plan.minutes:
                    break
                said = f"{job.operation}, {job.variant}, {job.case.name}, {job.dtype}"
                progress.update(task, description=escape(said), refresh=True)
                began, others = perf_counter(), seconds_of_others()
                try:
                    _check_memory(job, plan.memory)
                    results["benchmarks"].append(measured(job, plan.effort, peers))
                except Exception as error:  # the next cell may work
                    results["unmeasured"][job.name] = f"{type(error).__name__}: {first_line(error)}"
                    code = code or int(not isinstance(error, MemoryError))
                about["seconds"] += perf_counter() - began
                about["others"] += seconds_of_others() - others
                progress.update(task, advance=1)
                if perf_counter() - saved > SAVED_EVERY:
                    save()
                    saved = perf_counter()
            progress.refresh()
    except KeyboardInterrupt:
        code = 130
    if not results["benchmarks"]:
        reasons = "".join(f"\n{name}: {reason}" for name, reason in results["unmeasured"].items())
        raise ReportError(f"nothing was measured{reasons}")
    save()
    return code


def _check_same_machine(before: Results, now: Results) -> None:
    for name in ("cpu", "instruction_set", "threads", "rounds", "peers", "versions"):
        old, new = (results["environment"].get(name) for results in (before, now))
        if old != new:
            raise ReportError(f"there are results with other {name}: {old}, not {new}")


def _check_memory(job: Job, limit: float | None) -> None:
    rows, classes = job.case.shape
    needed = rows * (classes * BYTES_PER_ELEMENT + BYTES_PER_ROW)
    free = free_memory() if limit is None else limit
    if needed > free:
        raise MemoryError(f"up to {needed / 2**30:.1f} GiB, of which {free / 2**30:.1f} are there")


def free_memory() -> float:
    """Bytes that can be allocated; where the system does not say, half of the memory."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kibibytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(kibibytes)
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2


def seconds_of_others() -> float:
    """CPU time that other processes have taken on our CPUs, except for an offset; 0 if unknown."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return 0.0
    taken = 0
    for name, *ticks in map(str.split, lines):
        if name in ours:
            user, nice, system, _idle, _disks, *interrupts_and_stolen = map(int, ticks[:8])
            taken += user + nice + system + sum(interrupts_and_stolen)
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return taken / os.sysconf("SC_CLK_TCK") - own


def measured(job: Job, effort: Effort, peers: Mapping[str, Peer] = PEERS) -> dict[str, Any]:
    """The record of a cell, in the format of pytest-benchmark."""
    work = workload(job)
    backend = nullcontext() if job.backend == "default" else fastll.use_backend(job.backend)
    with backend, _autograd(job, peers), warnings.catch_warnings(action="ignore"):
        rivals, reports = bind_peers(job, work, work.call(), peers)
        times = in_turn(rivals, work, effort)
    ours = times.pop("fastll")
    info = record(job, work, ours, times, reports) | {"group": "grid"}
    stats = {"median": median(ours), "rounds": len(ours)}
    return {"name": job.name, "param": job.name, "stats": _rounded(stats), "extra_info": _rounded(info)}


def _rounded(value: Any) -> Any:
    """With numbers of four digits: there are thousands of cells."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _autograd(job: Job, peers: Mapping[str, Peer]) -> AbstractContextManager[Any]:
    """PyTorch records nothing for a value."""
    if job.variant == "gradient" or "torch" not in {peers[name].package for name in job.against}:
        return nullcontext()
    if PEERS["torch"].version is None:
        return nullcontext()
    import torch

    return torch.no_grad()


def in_turn(rivals: dict[str, Call], work: Workload, effort: Effort) -> Times:
    """Seconds per call of each in rounds: the peers, the floor, fastll.

    Before each sample run, untimed, half as many of the same calls, or the floor before a single one:
    the caches are then in the same state for all. After a peer they run until its threads are at rest.
    """
    calls = dict(rivals)
    if work.floor is not None:
        calls["floor"] = work.floor
    calls["fastll"] = work.call
    numbers = {name: repetitions(call, effort.sample) for name, call in calls.items()}
    times: Times = defaultdict(list)
    for _ in range(effort.rounds):
        before = None
        for name, call in calls.items():
            if name in rivals and _enough(name, rivals, times, numbers[name], effort):
                continue
            if before in rivals:
                _warm_up(call)
            if numbers[name] > 1:
                timeit(call, number=numbers[name] // 2)
            elif work.floor is not None:
                work.floor()
            times[name].append(timeit(call, number=numbers[name]) / numbers[name])
            before = name
    return times


def _warm_up(call: Call) -> None:
    """Call until nobody else's threads are spinning. A pause would leave the CPUs asleep."""
    start = perf_counter()
    while perf_counter() - start < SPINNING:
        call()


def _enough(name: str, rivals: Iterable[str], times: Times, number: int, effort: Effort) -> bool:
    """Whether a slow peer has been measured well enough."""
    if sum(times[name]) * number <= effort.patience:
        return False
    fastest = min(times[rival][0] for rival in rivals if times[rival])
    return len(times[name]) >= LEAST_ROUNDS or times[name][0] > HOPELESS * fastest


def repetitions(call: Call, sample: float) -> int:
    """How many calls take that many seconds."""
    one = seconds(call)
    if one < 10 * sample:  # one call may have been interrupted
        one = min(one, seconds(call), seconds(call))
    return ceil(sample / one)
