"""Reports of results of a GPU: shares of the card's copy bandwidth, with their targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from bench import report
from bench.cases import CALL_TARGET, PEER_TARGETS, Case
from bench.cases import target as target_of
from bench.jobs import Settings, select
from bench.report import Record, Results, header, line

NOT_MEASURED = "not measured"


def share(record: Record) -> float | None:
    """Share of the bandwidth of a copy."""
    return 1 / record["times_the_floor"] if record["times_the_floor"] else None


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"


def describe(record: Record) -> str:
    """One result in one line."""
    said = [report.seconds(record["seconds"])]
    if record["times_the_floor"]:
        aim = "" if record["target"] is None else f" (target {percent(record['target'])})"
        said.append(f"{percent(share(record))} of a copy{aim}")
    said += [f"{peer} {report.faster(record, peer)}" for peer in record["peers"]]
    if not record["agrees"]:
        said.append(f"WRONG by {record['off_by']:.0e}")
    return ", ".join(said)


def table(results: Results) -> Table:
    """All results, for the terminal."""
    peers = list(results["environment"]["peers"])
    result = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    result.add_column("operation, case, dtype", overflow="fold")
    for name in ("time", "start", "GB/s", "of a copy", "target", *peers):
        result.add_column(name, justify="right", no_wrap=True)
    for record in report.records(results):
        large = record["times_the_floor"] is not None
        aim = record["target"]
        result.add_row(
            escape(f"{report.title(record)}, {record['case']}, {record['dtype']}"),
            report.seconds(record["seconds"]) + ("" if record["agrees"] else " !"),
            report.seconds(record["host"]),
            f"{record['nbytes'] / record['seconds'] / 1e9:.0f}" if large else "",
            percent(share(record)) + (" <" if aim and share(record) < aim else ""),
            percent(aim) if large else report.seconds(CALL_TARGET),
            *(report.faster(record, peer) for peer in peers),
        )
    return result


def notes(results: Results) -> Iterator[str]:
    """The card and versions, then everything that was not measured, is wrong or disagrees."""
    environment = results["environment"]
    gpu = environment["gpu"]
    names = (
        {"fastll": environment["versions"]["fastll"]} | environment["versions"] | environment["peers"]
    )
    bandwidth = gpu["copy_bandwidth"]
    copied = "not measured" if bandwidth is None else f"{bandwidth / 1e12:.2f} TB/s, reads and writes"
    yield (
        f"{gpu['name']} (compute capability {'.'.join(map(str, gpu['capability']))}, "
        f"{gpu['multiprocessors']} multiprocessors, L2 of {gpu['l2'] / 1e6:.0f} MB, "
        f"driver {gpu['driver']}); bandwidth of a copy: {copied}; arrays of {gpu['arrays']}; "
        + ", ".join(f"{name} {version}" for name, version in names.items() if version)
        + f"; medians of {environment['rounds']} rounds, or at least 3 for slow peers. "
        "A peer's number is its time divided by fastll's (! if its result differs)."
    )
    missing = [name for name, version in environment["peers"].items() if version is None]
    if missing:
        yield f"Not installed: {', '.join(missing)}."
    for record in report.records(results):
        if record["shape"] != record["wanted_shape"]:
            shapes = (" x ".join(map(str, record[key])) for key in ("shape", "wanted_shape"))
            yield "{}: {} instead of {}, which does not fit into memory".format(record["name"], *shapes)
        if not record["agrees"]:
            yield f"fastll is off by {record['off_by']:.0e} in norm: {record['name']}"
    yield from report.of_peers(results)


def markdown(results: Results | None) -> str:
    """The tables of bench/README.md: results and targets; without results, the targets alone."""
    jobs = select(Settings(full=True, device="cuda"))
    if results is None:
        return "\n".join(_unmeasured(jobs))
    found = {r["name"]: r for r in report.records(results)}
    cells: dict[str, dict[str, str]] = {}
    for job in jobs:
        aim = _aim(job)
        if aim is not None:
            cells.setdefault(_label(job), {})[_heading(job.case)] = f"{_measured(found, job)} / {aim}"
    headings = list(dict.fromkeys(heading for row in cells.values() for heading in row))
    lines = [
        *header("share of a copy's bandwidth / target", *headings),
        *(line(label, *(row.get(heading, "") for heading in headings)) for label, row in cells.items()),
        "",
        *_rivals(found, jobs),
        "",
        *_calls(found, jobs),
        "",
        *notes(results),
    ]
    return "\n".join(lines)


def _unmeasured(jobs: list[Any]) -> Iterator[str]:
    """The targets, with the operations and logits each applies to."""
    wanted: dict[tuple[str, str], dict[str, None]] = {}
    for job in jobs:
        aim = _aim(job)
        if aim is not None and job.dtype == "float32":
            wanted.setdefault((_heading(job.case), aim), {})[_label(job).removesuffix(", float32")] = (
                None
            )
    yield from header("on a GPU, share of a copy's bandwidth", "operations", "target", "measured")
    for (heading, aim), labels in wanted.items():
        yield line(heading, "; ".join(labels), aim, NOT_MEASURED)
    for peer, times in PEER_TARGETS.items():
        yield line(
            "all of these", f"a loss with its gradient against {peer}", f"{times:g} x", NOT_MEASURED
        )
    for heading in {_heading(job.case): None for job in jobs if job.case.group == "calls"}:
        yield line(heading, "one call from Python", report.seconds(CALL_TARGET), NOT_MEASURED)


def _aim(job: Any) -> str | None:
    aim = target_of(f"{job.operation}/{job.variant}", job.case, job.dtype)
    return None if aim is None else percent(aim)


def _measured(found: dict[str, Record], job: Any) -> str:
    record = found.get(job.name)
    if record is None:
        return NOT_MEASURED
    return percent(share(record)) + ("" if record["agrees"] else " !")


def _rivals(found: dict[str, Record], jobs: list[Any]) -> Iterator[str]:
    """Losses with their gradient against the peers."""
    aims = [f"{peer} / {aim:g}" for peer, aim in PEER_TARGETS.items()]
    yield from header("times as fast as / target", "logits", "time", *aims)
    for job in jobs:
        if job.against and job.variant != "value" and job.case.group != "calls":
            record = found.get(job.name)
            cells = [NOT_MEASURED]
            if record:
                cells = [report.seconds(record["seconds"])]
                cells += [report.faster(record, peer) for peer in PEER_TARGETS]
            yield line(_label(job), _heading(job.case), *cells, *[""] * (4 - len(cells)))


def _calls(found: dict[str, Record], jobs: list[Any]) -> Iterator[str]:
    """Small calls: their time on the host."""
    aim = f"time / {report.seconds(CALL_TARGET)}"
    yield from header("one call from Python", "logits", aim, "with a wait")
    for job in (job for job in jobs if job.case.group == "calls"):
        record = found.get(job.name)
        cells = [NOT_MEASURED, ""]
        if record:
            waited = record["synchronized"]["fastll"]
            cells = [report.seconds(record["seconds"]), report.seconds(waited)]
        yield line(_label(job), _heading(job.case), *cells)


def _label(job: Any) -> str:
    other = [job.variant] if job.variant != "value" else []
    return ", ".join((f"`{job.operation}`", *other, job.dtype))


def _heading(case: Case) -> str:
    last = case.axis == len(case.shape) - 1
    return " x ".join(map(str, case.shape)) + ("" if last else f", axis {case.axis}")
