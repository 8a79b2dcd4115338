"""The measurements, called jobs: which there are, and the arrays and calls of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  NumPy then knows bfloat16
import numpy as np

import fastll
from bench import floors
from bench.cases import CASES, CUDA_CASES, LOGITS, MAX_BYTES, Array, Case
from bench.peers import PEERS
from fastll.operations import OPERATIONS, Argument

LABELS = Argument("target", "labels", "rows")
VARIANTS = ("value", "gradient", "in-place")


@dataclass(frozen=True)
class Settings:
    """What the command line selects. Nothing selected means the quick set, or everything if `full`."""

    full: bool = False
    operations: tuple[str, ...] = ()
    cases: tuple[Case, ...] = ()
    dtypes: tuple[str, ...] = ()
    logits: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    against: tuple[str, ...] = tuple(PEERS)
    rounds: int = 7
    device: str = "cpu"
    seconds: float | None = None  # start no job after this time

    @property
    def known(self) -> dict[str, Case]:
        """The cases of the device."""
        return CUDA_CASES if self.device == "cuda" else CASES


class Job(NamedTuple):
    """One measurement."""

    operation: str
    variant: str
    case: Case
    dtype: str
    logits: str
    backend: str
    against: tuple[str, ...]
    rounds: int

    @property
    def name(self) -> str:
        parts = (self.operation, self.variant, self.case.name, self.dtype, self.logits, self.backend)
        return "-".join(parts)


def measures() -> list[str]:
    """Everything that can be measured, as `operation/variant`."""
    return [f"{name}/{variant}" for name in OPERATIONS for variant in VARIANTS if _has(name, variant)]


def _has(name: str, variant: str) -> bool:
    operation = OPERATIONS[name]
    return {"value": True, "gradient": operation.gradient, "in-place": operation.writes}[variant]


def _expand(names: Iterable[str]) -> set[str]:
    return {m for m in measures() for name in names if name in (m, m.partition("/")[0])}


def select(settings: Settings) -> list[Job]:
    """The jobs, in the order of the cases."""
    usual = ("cuda",) if settings.device == "cuda" else compiled_backends()
    backends = settings.backends or (usual if settings.full else usual[:1])
    return [
        Job(
            *measure.split("/"),
            case,
            dtype,
            logits,
            backend,
            _peers(settings, case, measure) if backend == backends[0] else (),
            settings.rounds,
        )
        for case in settings.cases or settings.known.values()
        for dtype, logits in _kinds(case, settings)
        for measure in _measures(case, settings)
        if LOGITS[logits].suits(measure.partition("/")[0])
        if settings.device == "cuda" or _size(case, dtype) <= MAX_BYTES
        for backend in backends
    ]


def compiled_backends() -> tuple[str, ...]:
    """The compiled backends of the CPU that are available; without any, the reference."""
    status = fastll.backends()
    return tuple(name for name in ("cython", "numba") if status[name].available) or ("numpy",)


def _size(case: Case, dtype: str) -> float:
    """Bytes of the logits."""
    return float(np.prod(case.shape, dtype=float) * np.dtype(dtype).itemsize)


def _peers(settings: Settings, case: Case, measure: str) -> tuple[str, ...]:
    """The peers that do the same as the measurement. Only Liger writes into the logits.

    On a GPU, peers that compile are compared only on losses with their gradient.
    """
    if case.group not in ("workloads", "calls"):
        return ()
    in_place = measure.endswith("/in-place")
    if settings.device != "cuda":
        return () if in_place else settings.against
    chosen = ("liger",) if in_place else ("torch",)
    return tuple(name for name in settings.against if measure.endswith("/gradient") or name in chosen)


def _measures(case: Case, settings: Settings) -> list[str]:
    everything = settings.full or settings.cases or (settings.operations and case.quick)
    wanted = _expand(case.operations if everything else case.quick)
    if settings.operations:
        wanted &= _expand(settings.operations)
    return [measure for measure in measures() if measure in wanted]


def _kinds(case: Case, settings: Settings) -> Iterator[tuple[str, str]]:
    """Pairs of dtype and logits. Unless both are selected, at most one of a pair is not the default."""
    dtypes = settings.dtypes or (case.dtypes if settings.full else case.dtypes[:1])
    kinds = settings.logits or (case.logits if settings.full else case.logits[:1])
    for i, dtype in enumerate(dtypes):
        for k, logits in enumerate(kinds):
            if not (i and k) or (settings.dtypes and settings.logits):
                yield dtype, logits


class Workload(NamedTuple):
    """The arrays of a job, the call of fastll on them, and its floor if it has one."""

    x: Array
    arguments: tuple[Array, ...]
    call: Callable[[], Any]
    floor: Callable[[], None] | None
    nbytes: int  # read and written by the floor


def workload(job: Job) -> Workload:
    """Allocate and fill the arrays of a job."""
    operation, (_, shape, axis, *_) = OPERATIONS[job.operation], job.case
    rng = np.random.default_rng(0)
    first, *others = operation.arguments
    x = first.make(rng, shape, axis, job.dtype)
    labels = LABELS.make(rng, shape, axis, job.dtype)
    LOGITS[job.logits].change(x, labels, axis)
    arguments = tuple(
        labels if other == LABELS else other.make(rng, shape, axis, job.dtype) for other in others
    )
    options = operation.keywords(rng, shape, axis, job.dtype, {})
    writes = job.variant != "value" or not (operation.reduces or operation.gradient)
    result = x
    if writes:
        result = np.zeros_like(x)
        # in place, the floor's copy also restores the logits
        source, target = (result, x) if job.variant == "in-place" else (x, result)
        source[...] = x
        options |= {"return_grad": True, "grad_out": target} if operation.gradient else {"out": target}
    call = partial(operation.function, x, *arguments, **options)

    full = [a for a in arguments if a.shape == x.shape]
    nbytes = (1 + writes + len(full)) * x.nbytes
    if job.case.group == "calls":
        return Workload(x, arguments, call, None, nbytes)
    read = floors.reader(*full, *(() if writes else (x,)))
    copy = floors.copier(source, target) if writes else None

    def floor() -> None:
        read()
        if copy is not None:
            copy()

    return Workload(x, arguments, call, floor, nbytes)
