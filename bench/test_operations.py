"""Measure each job in rounds of the peers, the floor and fastll. Results go to `extra_info`."""

from __future__ import annotations

import timeit
import warnings
from collections import defaultdict
from typing import Any

import pytest

import fastll
from bench.jobs import Job, Settings, Workload, select, workload
from bench.peers import Call
from bench.rounds import CALLS, LEAST_ROUNDS, PATIENCE, Times, bind_peers, record, seconds
from bench.session import SETTINGS

#: Below this many elements rounds are short and noisy, so there are this many times as many.
SMALL, MORE_ROUNDS = 1 << 22, 10


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    jobs = select(metafunc.config.stash.get(SETTINGS, Settings()))
    metafunc.parametrize("job", jobs, ids=lambda job: job.name)


def test_operation(benchmark: Any, job: Job) -> None:
    status = fastll.backends()[job.backend]
    if not status.available:
        pytest.skip(f"backend {job.backend}: {status.reason}")
    work = workload(job)
    with fastll.use_backend(job.backend), warnings.catch_warnings(action="ignore"):
        rivals, reports = bind_peers(job, work, work.call())
        measure = in_calls if work.floor is None else in_rounds
        times = measure(benchmark, job, work, rivals)
    benchmark.extra_info |= record(job, work, benchmark.stats.stats.data, times, reports)


def in_calls(benchmark: Any, job: Job, work: Workload, rivals: dict[str, Call]) -> Times:
    """Time fastll and each peer over many consecutive calls; return the peers' seconds per call."""
    benchmark.pedantic(work.call, rounds=job.rounds, iterations=CALLS, warmup_rounds=1)
    return {
        name: [t / CALLS for t in timeit.repeat(call, repeat=job.rounds, number=CALLS)]
        for name, call in rivals.items()
    }


def in_rounds(benchmark: Any, job: Job, work: Workload, rivals: dict[str, Call]) -> Times:
    """Time fastll, last in each round; return the seconds of the peers and of the floor."""
    times: Times = defaultdict(list)

    def before_each() -> None:
        for name, call in rivals.items():
            if sum(times[name]) < PATIENCE or len(times[name]) < LEAST_ROUNDS:
                floor()
                times[name].append(seconds(call))
        floor()
        times["floor"].append(seconds(floor))

    floor = work.floor  # also run before each timing, so that all find the caches in the same state
    rounds = job.rounds * (MORE_ROUNDS if work.x.size < SMALL else 1)
    benchmark.pedantic(work.call, setup=before_each, rounds=rounds)
    return times
