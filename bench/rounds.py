"""What measurements on the CPU and on a GPU share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bench.jobs import Job, Workload
from bench.peers import PEERS, Call, Peer, disagreement

Times = dict[str, list[float]]
#: What is said of each peer: how it failed, or how far its result is off and its times.
Reports = dict[str, dict[str, Any]]

#: Number of calls per round when a small call is timed.
CALLS = 200
#: A slow peer is dropped after this many seconds, but not before this many rounds.
PATIENCE, LEAST_ROUNDS = 1.5, 3
#: Tolerance for peers, relative to the largest value, by the size of an element in bytes. Peers may
#: sum in the dtype of the logits.
TOLERANCE = {2: 0.05, 4: 1e-3, 8: 1e-9}


def ratio(above: list[float], below: list[float]) -> float:
    """Median ratio over the rounds that both have."""
    n = min(len(above), len(below))
    return float(np.median(np.divide(above[:n], below[:n])))


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def seconds(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def bind_peers(
    job: Job, work: Workload, result: Any, peers: Mapping[str, Peer] = PEERS
) -> tuple[dict[str, Call], Reports]:
    """Make the calls of the peers, warm them up and compare their results; return calls and reports."""
    calls: dict[str, Call] = {}
    reports: Reports = {}
    for name in filter(lambda name: peers[name].version, job.against):
        try:
            call = peers[name].bind(
                job.operation, job.variant == "gradient", work.x, job.case.axis, work.arguments
            )
            if call is None:
                continue
            off = disagreement(result, call())
        except Exception as error:  # whatever goes wrong in a peer is a result
            reports[name] = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        else:
            calls[name] = call
            agrees = off <= TOLERANCE[work.x.itemsize]
            reports[name] = {"off_by": off, "agrees": agrees}
    return calls, reports


def add_times(reports: Reports, times: Times, ours: list[float]) -> None:
    """Add the times of the peers to their reports."""
    for name, theirs in times.items():
        rounds = {"seconds": median(theirs), "rounds": len(theirs)}
        reports[name] |= rounds | {"faster": ratio(theirs, ours)}


def record(
    job: Job, work: Workload, ours: list[float], times: Times, reports: Reports
) -> dict[str, Any]:
    """What a file of results says of a measurement beside its own times; `times` has the others'."""
    floors = times.pop("floor", None)
    add_times(reports, times, ours)
    fields = ("operation", "variant", "dtype", "logits", "backend")
    return {name: getattr(job, name) for name in fields} | {
        "case": job.case.name,
        "group": job.case.group,
        "shape": job.case.shape,
        "axis": job.case.axis,
        "nbytes": work.nbytes,
        "floor": median(floors) if floors else None,
        "times_the_floor": ratio(ours, floors) if floors else None,
        "peers": reports,
    }
