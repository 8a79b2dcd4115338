"""Measurements on a GPU, timed by events.

As on the CPU, a round runs each peer, then the floor (here a copy on the card), then fastll, and ratios
are medians over the rounds. A sample is as many consecutive calls as take two milliseconds. They cycle
over several sets of arrays, which together are far larger than the L2 cache.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import cycle, islice
from math import ceil, prod
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

import fastll
from bench import gpu_report
from bench.card import Card, version_of, versions
from bench.cases import Array, target
from bench.jobs import Job, Settings, select
from bench.peers import CUDA_PEERS, disagreement, torch
from bench.report import ReportError
from bench.rounds import CALLS, LEAST_ROUNDS, PATIENCE, TOLERANCE, Times, add_times, first_line, ratio
from fastll.operations import OPERATIONS, Argument

#: Length of a sample in seconds, and the most calls in it: a stream queues about a thousand launches.
SAMPLE, MOST_CALLS = 2e-3, 200
#: Rounds for each requested round: they are short.
MORE_ROUNDS = 3
#: Total size of the sets of arrays, as a multiple of the L2 cache.
SETS = 4
#: Number of random numbers; larger arrays repeat them.
BLOCK = 1 << 24
#: Arrays of the shape of the logits that a peer may allocate, and the share of free memory to use.
PEER_ARRAYS, SHARE = 3, 0.9
#: Tolerance for the rows that are checked: norm of the difference over the norm.
ROW_TOLERANCE = {"float16": 2e-3, "bfloat16": 4e-3, "float32": 1e-5, "float64": 1e-12}
#: Number of elements in each part of an element-wise result that is checked.
CHECKED = 4096

Call = Callable[[], Any]


class Set(NamedTuple):
    """The arrays of one call, as views."""

    x: Any
    arguments: tuple[Any, ...]
    out: Any  # of the shape of x, or None


class Workload(NamedTuple):
    job: Job
    shape: tuple[int, ...]  # that of the case, with fewer rows if they do not fit into memory
    sets: list[Set]
    calls: list[Call]
    restore: Call  # restores the logits
    overwrites: bool
    nbytes: int  # to read and to write

    @property
    def losses(self) -> int:
        """Number of losses that the mean is over."""
        if OPERATIONS[self.job.operation].elementwise:
            return prod(self.shape)
        return prod(self.shape) // self.shape[self.job.case.axis]


def measure(settings: Settings, path: Path, card: Card | None = None) -> int:
    """Run the jobs and write the results after each; return 1 if one failed, 2 if interrupted."""
    console = Console(stderr=True, highlight=False)
    card = card or Card()
    results: dict[str, Any] = {"benchmarks": [], "unmeasured": {}}
    bandwidths: list[float] = []
    jobs, start, code = select(settings), perf_counter(), 0
    for number, job in enumerate(jobs, 1):
        late = settings.seconds is not None and perf_counter() - start > settings.seconds
        try:
            if late:
                raise TimeoutError(f"the {settings.seconds:g} s are over")
            record = measured(card, job, bandwidths)
            results["benchmarks"].append(record)
            said = gpu_report.describe(record["extra_info"] | {"seconds": record["stats"]["median"]})
            code = code or int(not record["extra_info"]["agrees"])
        except KeyboardInterrupt:
            return 2  # as pytest does
        except Exception as error:  # the next job may work
            said = results["unmeasured"][job.name] = f"{type(error).__name__}: {first_line(error)}"
            code = code or int(not late)
        console.print(f"{number}/{len(jobs)} {job.name}: {said}", soft_wrap=True, markup=False)
        results["environment"] = environment(settings, card, bandwidths)
        path.write_text(json.dumps(results, indent=1), encoding="utf-8")
    if not results["benchmarks"]:
        reasons = "".join(f"\n{name}: {reason}" for name, reason in results["unmeasured"].items())
        raise ReportError(f"nothing was measured{reasons}")
    return code


def environment(settings: Settings, card: Card, bandwidths: list[float]) -> dict[str, Any]:
    """The card, the versions, and the bandwidth of a copy: the median over all rounds."""
    bandwidth = median(bandwidths) if bandwidths else None
    return {
        "device": settings.device,
        "gpu": card.describe() | {"copy_bandwidth": bandwidth},
        "rounds": settings.rounds * MORE_ROUNDS,
        "versions": {"fastll": fastll.__version__} | versions(),
        "peers": {name: version_of(CUDA_PEERS[name].package) for name in settings.against},
    }


def measured(card: Card, job: Job, bandwidths: list[float]) -> dict[str, Any]:
    """The record of a job, in the format of pytest-benchmark."""
    work = workload(card, job)
    off = off_by(card, work)
    work.restore()
    rivals, reports = bind_peers(card, work)
    time = in_calls if job.case.group == "calls" else in_rounds
    times, details = time(card, work, rivals)
    ours, copies = times.pop("fastll"), times.pop("copy", None)
    add_times(reports, times, ours)
    floors = None
    if copies:
        bandwidths += copies
        floors = [work.nbytes / copied for copied in copies]
    fields = ("operation", "variant", "dtype", "logits", "backend")
    info = {name: getattr(job, name) for name in fields} | {
        "case": job.case.name,
        "group": job.case.group,
        "shape": list(work.shape),
        "wanted_shape": list(job.case.shape),
        "axis": job.case.axis,
        "nbytes": work.nbytes,
        "sets": len(work.sets),
        "floor": median(floors) if floors else None,
        "times_the_floor": ratio(ours, floors) if floors else None,
        "target": target(f"{job.operation}/{job.variant}", job.case, job.dtype),
        "off_by": off,
        "agrees": off <= ROW_TOLERANCE[job.dtype],
        "peers": reports,
    }
    return {
        "name": job.name,
        "param": job.name,
        "stats": statistics(ours),
        "extra_info": info | details,
    }


def statistics(times: list[float]) -> dict[str, Any]:
    low, high = np.percentile(times, [25, 75])
    return {
        "median": median(times),
        "min": min(times),
        "max": max(times),
        "q1": float(low),
        "q3": float(high),
        "iqr": float(high - low),
        "rounds": len(times),
        "data": times,
    }


# arrays


def workload(card: Card, job: Job) -> Workload:
    """Make the arrays of a job and the calls of fastll on them."""
    operation, axis = OPERATIONS[job.operation], job.case.axis
    first, *others = operation.arguments
    writes = job.variant != "value" or not (operation.reduces or operation.gradient)
    in_place = job.variant == "in-place"
    full = sum(argument.shape == "full" for argument in others)
    dtype = card.dtype(job.dtype)
    kept = 1 + full + (writes and not in_place)
    shape, count = fit(card, job, dtype.itemsize, kept)
    if job.case.group == "calls":
        count = 1

    @cache
    def block(domain: str) -> Any:
        """Numbers of a domain, which arrays repeat."""
        numbers = values(domain, job.dtype, shape[axis])
        found = card.empty((min(BLOCK, prod(shape)),), dtype)
        card.upload(found, numbers[: found.size])
        return found

    def new(argument: Argument) -> Any:
        if argument.shape == "full":
            array = card.empty(shape, dtype)
            card.repeat(array, block(argument.domain))
            return array
        made = argument.make(np.random.default_rng(1), shape, axis, job.dtype)
        array = card.empty(made.shape, made.dtype)
        card.upload(array, made)
        return array

    small = {a: new(a) for a in others if a.shape != "full"}
    sets = []
    for _ in range(count):
        x = new(first)
        out = x if in_place else card.empty(shape, dtype) if writes else None
        sets.append(Set(x, tuple(small[a] if a in small else new(a) for a in others), out))

    overwrites = in_place or "liger" in job.against

    def restore() -> None:
        for arrays in sets if overwrites else ():
            card.repeat(arrays.x, block(first.domain))

    calls = [partial(operation.function, *owners(arrays), **options(job, arrays)) for arrays in sets]
    nbytes = (1 + full + writes) * prod(shape) * dtype.itemsize
    return Workload(job, shape, sets, calls, restore, overwrites, nbytes)


def owners(arrays: Set) -> list[Any]:
    return [view.owner for view in (arrays.x, *arrays.arguments)]


def options(job: Job, arrays: Set) -> dict[str, Any]:
    operation = OPERATIONS[job.operation]
    chosen: dict[str, Any] = {} if operation.elementwise else {"axis": job.case.axis}
    if arrays.out is not None:
        grad = operation.gradient
        chosen |= (
            {"return_grad": True, "grad_out": arrays.out.owner} if grad else {"out": arrays.out.owner}
        )
    return chosen


def fit(card: Card, job: Job, itemsize: int, kept: int) -> tuple[tuple[int, ...], int]:
    """The shape, with fewer rows if memory is too small, and the number of sets."""
    shape, rows = job.case.shape, 0 if len(job.case.shape) == 1 or job.case.axis else 1
    space = SHARE * card.free()
    while True:
        nbytes = prod(shape) * itemsize
        least = max(1, ceil(SETS * card.l2 / nbytes))
        for sets in (max(2, least), least):
            arrays = sets * kept + (PEER_ARRAYS if job.against else 1)
            if arrays * nbytes + min(nbytes, BLOCK * itemsize) <= space:
                return shape, sets
        if shape[rows] == 1:
            raise MemoryError(f"{space / 1e9:.1f} GB is too little for one row")
        shape = (*shape[:rows], shape[rows] // 2, *shape[rows + 1 :])


@cache
def normal(dtype: str) -> Array:
    if dtype == "float64":
        return np.random.default_rng(0).standard_normal(BLOCK)
    if dtype == "float32":
        return np.random.default_rng(0).standard_normal(BLOCK, np.float32)
    return normal("float32").astype(dtype)


@cache
def values(domain: str, dtype: str, classes: int) -> Array:
    """A block of numbers of a domain; those of a distribution sum to about 1 over the classes."""
    if domain in ("logits", "real"):
        return normal(dtype)
    found = np.random.default_rng(2).random(BLOCK, np.float32)
    if domain == "distribution":
        found *= 2 / classes
    if domain == "inside":
        found = 1 / 16 + 14 / 16 * found
    if domain == "positive":
        found = 0.5 + 1.5 * found
    return found.astype(normal(dtype).dtype)


# correctness


def off_by(card: Card, work: Workload) -> float:
    """Error of fastll against float64 in a few rows: the largest relative norm.

    Outputs are filled with NaN first, so that an element that is never written is detected.
    """
    job, arrays = work.job, work.sets[0]
    operation = OPERATIONS[job.operation]
    pick = partial(picked, card, work)
    inputs = list(zip(*(pick(view) for view in (arrays.x, *arrays.arguments)), strict=True))
    losses = None
    if operation.gradient:
        axis = {} if operation.elementwise else {"axis": job.case.axis}
        losses = card.view(operation.function(*owners(arrays), reduction="none", **axis))
        values = pick(losses)
        mean = card.fetch(losses).mean(dtype=np.float64)
    if arrays.out is not None and job.variant != "in-place":
        card.poison(arrays.out)
    result = work.calls[0]()
    found = [0.0]
    if operation.gradient:
        loss = result[0] if isinstance(result, tuple) else result
        found.append(distance(card.fetch(card.view(loss)), mean))
    elif operation.reduces:
        values = pick(card.view(result))
    if arrays.out is not None:
        written = pick(arrays.out)
    for i, (x, *others) in enumerate(inputs):
        value, matrix = reference(job.operation, arrays.out is not None, x, others)
        if operation.gradient:
            found.append(distance(np.mean(values[i], dtype=np.float64), value))
            # the mean of the reference is over fewer losses
            scale = work.losses / (x.size if operation.elementwise else 1)
            found += (
                [distance(written[i].astype(np.float64) * scale, matrix)] if matrix is not None else []
            )
        else:
            found.append(distance(values[i] if operation.reduces else written[i], value))
    return max(found)


def picked(card: Card, work: Workload, view: Any) -> list[Array]:
    """A few rows of an array of the shape of the logits, or the entries of an array of the rows."""
    axis, shape = work.job.case.axis, work.shape
    if OPERATIONS[work.job.operation].elementwise:
        size = prod(shape)
        length = min(CHECKED, size)
        return [card.fetch(view, at, length) for at in (0, (size - length) // 2, size - length)]
    count = prod(shape) // shape[axis]
    rows = sorted({0, count // 3, count - 1})
    if len(view.shape) < len(shape):
        return [card.fetch(view, row, 1) for row in rows]
    if axis == len(shape) - 1:
        return [card.fetch(view, row * shape[axis], shape[axis]) for row in rows]
    whole = np.moveaxis(card.fetch(view).reshape(shape), axis, -1).reshape(count, -1)
    return [whole[row] for row in rows]


def reference(name: str, gradient: bool, x: Array, others: list[Array]) -> tuple[Any, Any]:
    """Value of one row, or mean over elements, and its gradient, in float64 on the CPU."""
    operation = OPERATIONS[name]
    lead = (slice(None),) if operation.elementwise else (None,)
    x = x.astype(np.float64)[lead]
    t = tuple(a if a.dtype == np.int64 else a.astype(np.float64)[lead] for a in others)
    axis = x.ndim - 1
    gradient = gradient and operation.gradient
    call = torch(name, gradient, x, axis, t) if version_of("torch") else None
    if call is not None:
        result = call()
    else:
        chosen: dict[str, Any] = {} if operation.elementwise else {"axis": axis}
        chosen |= {"return_grad": True} if gradient else {}
        with fastll.use_backend("numpy"):
            result = operation.function(x, *t, **chosen)
    value, matrix = result if gradient else (result, None)
    return np.asarray(value).reshape(-1), None if matrix is None else np.asarray(matrix).reshape(-1)


def distance(actual: Any, expected: Any) -> float:
    """Norm of the difference over the norm; infinite for NaN."""
    a, b = (np.asarray(value, np.float64).reshape(-1) for value in (actual, expected))
    size = float(np.linalg.norm(b))
    off = float(np.linalg.norm(a - b)) / size if size else float(np.linalg.norm(a))
    return off if np.isfinite(off) else float("inf")


# time


def bind_peers(card: Card, work: Workload) -> tuple[dict[str, list[Call]], dict[str, dict[str, Any]]]:
    """Make the calls of the peers and compare their results with fastll's; return calls and reports."""
    job = work.job
    calls: dict[str, list[Call]] = {}
    reports: dict[str, dict[str, Any]] = {}
    if card.library.name != "torch":
        return calls, reports
    for name in (name for name in job.against if version_of(CUDA_PEERS[name].package)):
        try:
            binder = CUDA_PEERS[name].bind(job.operation, work.job.variant != "value")
            if binder is None:
                continue
            theirs = [binder(*owners(arrays), axis=job.case.axis) for arrays in work.sets]
            result = theirs[0]()
            off = compared(work, result)
        except Exception as error:  # whatever goes wrong in a peer is a result
            reports[name] = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        else:
            calls[name] = theirs
            reports[name] = {"off_by": off, "agrees": off <= TOLERANCE[work.sets[0].x.itemsize]}
        result = None
        card.free()
        work.restore()
    return calls, reports


def compared(work: Workload, theirs: Any) -> float:
    """Difference between a peer's result and fastll's. The peer's, perhaps in the logits, is copied."""
    if isinstance(theirs, tuple):
        theirs = tuple(part.detach().reshape(-1)[: 1 << 20].clone() for part in theirs)
    work.restore()
    ours = work.calls[0]()
    if isinstance(ours, tuple):
        ours = tuple(part.reshape(-1)[: 1 << 20] for part in ours)
    off = disagreement(ours, theirs)
    work.restore()
    return off


class Sampler:
    """Calls that cycle over the sets."""

    def __init__(self, card: Card, calls: list[Call], restore: Call | None) -> None:
        self.card, self.restore = card, restore
        self.calls: Iterator[Call] = cycle(calls)
        self.count = max(3, len(calls))
        self.sample()  # compiles and allocates
        each, _ = self.sample()
        self.count = min(MOST_CALLS, max(1, ceil(SAMPLE / each)))

    def sample(self) -> tuple[float, float]:
        """Seconds per call on the GPU, and on the host to start it."""
        if self.restore is not None:
            self.restore()
            self.card.synchronize()
        device, host = self.card.seconds(islice(self.calls, self.count))
        return device / self.count, host / self.count


def in_rounds(
    card: Card, work: Workload, rivals: dict[str, list[Call]]
) -> tuple[Times, dict[str, Any]]:
    """Seconds of fastll and of each peer, the bandwidth of the copy, and details."""
    restore = work.restore if work.overwrites else None
    samplers = {name: Sampler(card, calls, restore) for name, calls in rivals.items()}
    ours = Sampler(card, work.calls, restore)
    copier = Sampler(card, [partial(card.copy, *card.copied)], None)
    copied = 2 * prod(card.copied[0].shape)
    times, hosts, spent = defaultdict(list), [], defaultdict(float)
    for _ in range(work.job.rounds * MORE_ROUNDS):
        for name, sampler in samplers.items():
            if spent[name] < PATIENCE or len(times[name]) < LEAST_ROUNDS:
                times[name].append(sampler.sample()[0])
                spent[name] += times[name][-1] * sampler.count
        times["copy"].append(copied / copier.sample()[0])
        device, host = ours.sample()
        times["fastll"].append(device)
        hosts.append(host)
    return dict(times), {"host": median(hosts), "calls": ours.count}


def in_calls(card: Card, work: Workload, rivals: dict[str, list[Call]]) -> tuple[Times, dict[str, Any]]:
    """Seconds per call on the host, without waiting for the GPU and with a wait after each call."""
    times: Times = defaultdict(list)
    waited: Times = defaultdict(list)
    everyone = {name: calls[0] for name, calls in rivals.items()} | {"fastll": work.calls[0]}
    for _ in range(work.job.rounds * MORE_ROUNDS):
        for name, call in everyone.items():
            times[name].append(host_seconds(card, call, lambda: None))
            waited[name].append(host_seconds(card, call, card.synchronize))
    synchronized = {name: median(seconds) for name, seconds in waited.items()}
    return dict(times), {"host": median(times["fastll"]), "synchronized": synchronized}


def host_seconds(card: Card, call: Call, after: Call) -> float:
    """Seconds per call, over as many calls as a stream queues without making the host wait."""
    card.synchronize()
    start = perf_counter()
    for _ in range(CALLS):
        call()
        after()
    seconds = (perf_counter() - start) / CALLS
    card.synchronize()
    return seconds
