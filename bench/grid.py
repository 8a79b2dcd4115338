"""The grid: four measures over rows x classes, beside the fastest peer and beside the floor.

A cell is a number of classes and of elements. The order of the cells covers the whole range coarsely
and then refines it, so that a run may end at any time. Results have the format of the other commands.
"""

from __future__ import annotations

import json
import os
import random
import warnings
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from timeit import timeit
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fastll
from bench import report
from bench.cases import Case
from bench.jobs import Job, Settings, Workload, workload
from bench.peers import PEERS, Call, Peer, torch_of_rows
from bench.report import Record, ReportError, Results, beside_the_fastest, exponent, multiple
from bench.rounds import LEAST_ROUNDS, Times, add_times, bind_peers, first_line, ratio, seconds
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

#: The results are written this often, in seconds.
SAVED_EVERY = 60

#: Where the ranges of the summary begin: classes, and binary logarithms of elements.
CLASS_RANGES, EXPONENT_RANGES = (2, 8, 32, 128, 1000, 10000), (0, 12, 17, 22)


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
            taken += (
                sum(map(int, ticks[:8])) - int(ticks[3]) - int(ticks[4])
            )  # not idle, no wait for disks
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
    ours, floors = times.pop("fastll"), times.pop("floor", None)
    add_times(reports, times, ours)
    info = {name: getattr(job, name) for name in ("operation", "variant", "dtype", "logits", "backend")}
    info |= {
        "case": job.case.name,
        "group": "grid",
        "shape": job.case.shape,
        "axis": job.case.axis,
        "nbytes": work.nbytes,
        "floor": median(floors) if floors else None,
        "times_the_floor": ratio(ours, floors) if floors else None,
        "peers": reports,
    }
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
    the caches are then in the same state for all, and threads of the one before have gone to sleep.
    """
    calls = dict(rivals)
    if work.floor is not None:
        calls["floor"] = work.floor
    calls["fastll"] = work.call
    numbers = {name: repetitions(call, effort.sample) for name, call in calls.items()}
    times: Times = defaultdict(list)
    for _ in range(effort.rounds):
        for name, call in calls.items():
            if name in rivals and _enough(name, rivals, times, numbers[name], effort):
                continue
            if numbers[name] > 1:
                timeit(call, number=numbers[name] // 2)
            elif work.floor is not None:
                work.floor()
            times[name].append(timeit(call, number=numbers[name]) / numbers[name])
    return times


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


def is_grid(results: Results) -> bool:
    return "grid" in results["environment"]


def tables(results: Results) -> Iterator[Table | str]:
    """The summaries for the terminal: what they show, and a table per operation and dtype."""
    for title, columns, rows in summaries(results):
        yield f"[bold]{title}"
        for heading, some in groupby(rows, lambda row: row[0]):
            result = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title_justify="left")
            result.title = heading
            for column in columns[1:]:
                result.add_column(column, no_wrap=True, min_width=9 if column == "classes" else 15)
            for row in some:
                result.add_row(*row[1:])
            yield result


def markdown(results: Results) -> str:
    """The summaries in Markdown."""
    lines = []
    for title, columns, rows in summaries(results):
        lines += [f"{title}:", "", *report.header(*columns), *(report.line(*row) for row in rows), ""]
    return "\n".join((*lines, *notes(results)))


def summaries(results: Results) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows: an operation and dtype, a range of classes, ratios by range of sizes."""
    sizes = [f"from 2^{low}" if low else f"below 2^{EXPONENT_RANGES[1]}" for low in EXPONENT_RANGES]
    for title, value, lost in (
        ("Time over the fastest peer's: median, worst, cells lost", beside_the_fastest, True),
        ("Time over the floor: median, worst", lambda record: record["times_the_floor"], False),
    ):
        found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for record in sorted(report.records(results), key=_order):
            ratio = value(record)
            if ratio is not None:
                low = CLASS_RANGES[bisect(CLASS_RANGES, record["shape"][1]) - 1]
                size = bisect(EXPONENT_RANGES, exponent(record["shape"])) - 1
                key = (f"{report.title(record)}, {record['dtype']}", _classes(low))
                found[key][size].append(ratio)
        used = sorted({size for ratios in found.values() for size in ratios})
        rows = [
            [*key, *(_said(ratios.get(size, []), lost) for size in used)]
            for key, ratios in found.items()
        ]
        if rows:
            yield title, ["operation, dtype", "classes", *(sizes[size] for size in used)], rows


def _order(record: Record) -> tuple[int, int, int]:
    measure = f"{record['operation']}/{record['variant']}"
    return MEASURES.index(measure), DTYPES.index(record["dtype"]), record["shape"][1]


def _classes(low: int) -> str:
    following = CLASS_RANGES[CLASS_RANGES.index(low) + 1 :]
    return f"{low}-{following[0] - 1}" if following else f"{low}-"


def _said(ratios: list[float], lost: bool) -> str:
    if not ratios:
        return ""
    said = f"{multiple(median(ratios))} {multiple(max(ratios))}"
    return f"{said} {sum(r > 1 for r in ratios)}/{len(ratios)}" if lost else said


def notes(results: Results) -> Iterator[str]:
    """The machine, what was measured, and how much is missing, failed or differs."""
    about, records = results["environment"]["grid"], list(report.records(results))
    rounds = results["environment"]["rounds"]
    yield f"{report.machine(results)}; medians of {rounds} rounds, or fewer of slow peers."
    missing = [name for name, version in results["environment"]["peers"].items() if version is None]
    if missing:
        yield f"Not installed: {', '.join(missing)}."
    if report.taken_by_others(results) > report.IDLE and results["environment"]["threads"] > 1:
        yield (
            "Threads that wait for each other, those of PyTorch most, wait for other processes too: "
            "measure again on an idle machine, or with --threads 1."
        )
    if "torch.compile" not in results["environment"]["peers"]:
        yield "Without torch.compile, which takes seconds to compile for each number of classes."
    yield f"{len(records)} cells; {about['not_reached']} more were not reached."
    yield from counted("Left out", results["unmeasured"].values())
    for peer in results["environment"]["peers"]:
        reports = [record["peers"][peer] for record in records if peer in record["peers"]]
        yield from counted(f"{peer} failed", (said["failed"] for said in reports if "failed" in said))
        off = [said["off_by"] for said in reports if not said.get("agrees", True)]
        if off:
            yield f"{peer} differs in {len(off)} cells, by up to {max(off):.0e} of the largest value."


def counted(what: str, reasons: Iterable[str]) -> Iterator[str]:
    """One line per reason; those of one kind of error together."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for reason in reasons:
        kinds[reason.partition(":")[0]].append(reason)
    for several in kinds.values():
        (reason, _), *others = Counter(several).most_common()
        yield f"{what} in {len(several)} cells: {reason}{' and similar' if others else ''}"
