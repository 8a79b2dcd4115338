"""The adapters beside the frameworks' own functions: what is measured, and its table.

Results have the format of the other commands.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import report
from bench.adapters import FRAMEWORKS, PACKAGES, Target, Task, why_not
from bench.grid import FULL, QUICK, Effort, free_memory, in_turn, seconds_of_others
from bench.jobs import Settings, Workload
from bench.peers import disagreement
from bench.report import Record, ReportError, Results
from bench.rounds import TOLERANCE, Reports, Times, add_times, first_line, seconds
from bench.session import environment, progress_bar

#: Bytes per element that a task takes at most, as for the grid.
BYTES_PER_ELEMENT = 24
#: A call that takes longer than this, in seconds, is measured in fewer rounds.
LONG, FEWER_ROUNDS = 1.0, 3


def measure(only: tuple[str, ...], quick: bool, path: Path) -> int:
    """Measure the adapters and write all results; return an exit code."""
    effort = QUICK if quick else FULL
    names = only or tuple(FRAMEWORKS)
    missing = {name: reason for name in names if (reason := why_not(name)) is not None}
    tasks = [task for name in names if name not in missing for task in FRAMEWORKS[name](quick)]
    results: Results = {"benchmarks": [], "unmeasured": {}}
    results["environment"] = environment(Settings(against=(), rounds=effort.rounds))
    about = {"only": only, "quick": quick}
    results["environment"] |= {"peers": _versions(), "frameworks": about, "missing": missing}
    code, start, others = 0, perf_counter(), seconds_of_others()
    try:
        with progress_bar(Console(stderr=True)) as progress:
            bar = progress.add_task("", total=len(tasks))
            for task in tasks:
                progress.update(bar, description=escape(task.name), refresh=True)
                try:
                    results["benchmarks"].append(measured(task, effort))
                except Exception as error:  # the next task may work
                    results["unmeasured"][task.name] = f"{type(error).__name__}: {first_line(error)}"
                    code = 1
                progress.update(bar, advance=1)
            progress.refresh()
    except KeyboardInterrupt:
        code = 130
    if not results["benchmarks"]:
        reasons = (missing | results["unmeasured"]).items()
        raise ReportError("nothing was measured" + "".join(f"\n{name}: {why}" for name, why in reasons))
    about |= {"seconds": perf_counter() - start, "others": seconds_of_others() - others}
    path.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return code


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def measured(task: Task, effort: Effort) -> dict[str, Any]:
    """The record of a task, in the format of pytest-benchmark."""
    needed = BYTES_PER_ELEMENT * prod(task.shape)
    if needed > free_memory():
        raise MemoryError(
            f"up to {needed / 2**30:.1f} GiB, of which {free_memory() / 2**30:.1f} are there"
        )
    with warnings.catch_warnings(action="ignore"):
        call, rivals, count = task.make()
        expected = call()
        reports = _reports(task, expected, rivals)
        rivals = {name: rival for name, rival in rivals.items() if "failed" not in reports[name]}
        if seconds(call) > LONG:
            effort = effort._replace(rounds=FEWER_ROUNDS)
        every = in_turn(rivals, Workload(np.empty(0), (), call, None, 0), effort)
    times: Times = {name: [time / count for time in taken] for name, taken in every.items()}
    ours = times.pop("fastll")
    add_times(reports, times, ours)
    info = {
        name: getattr(task, name) for name in ("framework", "operation", "variant", "shape", "dtype")
    }
    info |= {"case": "x".join(map(str, task.shape)), "group": "frameworks", "targets": task.targets}
    info |= {"logits": "randn", "backend": "default", "times_the_floor": None, "peers": reports}
    stats = {"median": median(ours), "rounds": len(ours)}
    return {"name": task.name, "param": task.name, "stats": stats, "extra_info": info}


def _reports(task: Task, expected: Any, rivals: dict[str, Any]) -> Reports:
    """Warm the rivals up and compare their results with fastll's."""
    reports: Reports = {}
    tolerance = task.tolerance or TOLERANCE[np.dtype(task.dtype).itemsize]
    for name, rival in rivals.items():
        try:
            off = disagreement(expected, rival())
        except Exception as error:  # whatever goes wrong in a framework is a result
            reports[name] = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        else:
            reports[name] = {"off_by": off, "agrees": off <= tolerance}
    return reports


def is_frameworks(results: Results) -> bool:
    return "frameworks" in results["environment"]


def rows(results: Results) -> Iterator[tuple[str, ...]]:
    """For each rival, what `COLUMNS` says."""
    for record in report.records(results):
        case = f"{record['framework']}: {report.title(record)}, {record['case']}, {record['dtype']}"
        for rival, told in record["peers"].items():
            target = record["targets"].get(rival)
            taken = report.seconds(told["seconds"]) if "seconds" in told else ""
            said = _said(target) if target else ""
            judged = "" if target is None else "yes" if is_met(target, record, rival) else "no"
            time = report.seconds(record["seconds"])
            yield case, rival, time, taken, report.faster(record, rival), said, judged


COLUMNS = ("case", "beside", "fastll", "beside it", "ratio", "target", "met")


def is_met(target: Target, record: Record, rival: str) -> bool:
    """Whether a target is met; none is by a rival that failed, as nothing was compared."""
    kind, bound = target
    if kind == "seconds":
        return bool(record["seconds"] <= bound)
    told = record["peers"][rival]
    if "failed" in told:
        return False
    if kind == "faster":
        return bool(told["faster"] >= bound)
    return bool(record["seconds"] - told["seconds"] <= bound)


def _said(target: Target) -> str:
    kind, bound = target
    if kind == "faster":
        return f"ratio {report.multiple(bound)}"
    return f"{report.seconds(bound)}{' more' if kind == 'more' else ''}"


def table(results: Results) -> Table:
    """The table for the terminal."""
    result = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        right = name in ("fastll", "beside it", "ratio")
        result.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows(results):
        result.add_row(*map(escape, row))
    return result


def notes(results: Results) -> Iterator[str]:
    """The machine and versions, the targets missed, and what was not measured."""
    environment = results["environment"]
    yield (
        f"{report.machine(results)}; medians of {environment['rounds']} rounds, or {FEWER_ROUNDS} for "
        "slow calls. A ratio is the other's time divided by fastll's (! if its result differs)."
    )
    judged = [row[-1] for row in rows(results) if row[-1]]
    if judged:
        yield f"Targets met: {judged.count('yes')} of {len(judged)}."
    for name, reason in environment["missing"].items():
        yield f"Missing: {name}: {reason}"
    yield from report.of_peers(results)


def markdown(results: Results) -> str:
    """The table in Markdown."""
    lines = [*report.header(*COLUMNS), *(report.line(*row) for row in rows(results)), ""]
    return "\n".join((*lines, *notes(results)))
