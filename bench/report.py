"""Reports of results: lines, tables for the terminal and in Markdown, comparisons of two files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

Results = dict[str, Any]
Record = dict[str, Any]


class ReportError(Exception):
    """An error in a file or in a run, in words for the user."""


def load(path: Path) -> Results:
    """Load the results from a file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        list(records(results)), results["environment"]["peers"], results["unmeasured"]
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ReportError(f"{path} is not a file of results from python -m bench: {error!r}") from error
    return results


def records(results: Results) -> Iterator[Record]:
    """Yield the record of each measurement."""
    for benchmark in results["benchmarks"]:
        if benchmark["extra_info"]:  # otherwise it was interrupted
            median = {"name": benchmark["param"], "seconds": benchmark["stats"]["median"]}
            yield benchmark["extra_info"] | median


def seconds(value: float) -> str:
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if value * factor < 1000:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} s"


def multiple(value: float | None) -> str:
    """Format a ratio with two or three digits; more would not be reproducible on a shared machine."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 9.995 else f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def beside_the_fastest(record: Record) -> float | None:
    """The time divided by that of the fastest peer: above 1, fastll loses."""
    ratios = [report["faster"] for report in record["peers"].values() if "faster" in report]
    return 1 / min(ratios) if ratios else None


def exponent(shape: Iterable[int]) -> int:
    """Of the power of two that the elements of a cell fill as far as whole rows do."""
    return (prod(shape) - 1).bit_length()


def faster(record: Record, peer: str) -> str:
    """The peer's time divided by fastll's, in words."""
    report = record["peers"].get(peer, {})
    if "failed" in report:
        return "failed"
    return multiple(report.get("faster")) + ("" if report.get("agrees", True) else " !")


def describe(record: Record) -> str:
    """One result in one line."""
    said = [seconds(record["seconds"])]
    if record["times_the_floor"]:
        said.append(f"{multiple(record['times_the_floor'])} x floor")
    said += [f"{peer} {faster(record, peer)}" for peer in record["peers"]]
    return ", ".join(said)


def title(record: Record) -> str:
    """Operation and variant."""
    return record["operation"] + ("" if record["variant"] == "value" else f", {record['variant']}")


def place(record: Record) -> str:
    """Case, and the kind of logits if it is not the default."""
    return record["case"] + ("" if record["logits"] == "randn" else f", {record['logits']}")


def _peers(results: Results) -> list[str]:
    """The peers that have at least one result."""
    said = {peer for record in records(results) for peer in record["peers"]}
    return [peer for peer in results["environment"]["peers"] if peer in said]


def table(results: Results) -> Table:
    """All results but the sweeps, which are for the plots."""
    peers = _peers(results)
    result = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    result.add_column("operation\ncase, dtype, backend", overflow="fold")
    for name in ("time", "GB/s", "x floor", *peers):
        result.add_column(name.replace(".", "\n."), justify="right", no_wrap=True, overflow="fold")
    for record in records(results):
        if record["group"] in ("workloads", "calls"):
            large = record["times_the_floor"] is not None
            result.add_row(
                escape(f"{title(record)}\n{place(record)}, {record['dtype']}, {record['backend']}"),
                seconds(record["seconds"]),
                f"{record['nbytes'] / record['seconds'] / 1e9:.1f}" if large else "",
                multiple(record["times_the_floor"]),
                *(faster(record, peer) for peer in peers),
            )
    return result


#: A machine is idle if other processes take less than this many CPUs.
IDLE = 0.1


def taken_by_others(results: Results) -> float:
    """The number of CPUs that other processes took on average, where that was measured."""
    environment = results["environment"]
    about = environment.get("grid") or environment.get("frameworks", {})
    return float(about["others"] / about["seconds"]) if about.get("seconds") else 0.0


def machine(results: Results) -> str:
    """The machine and versions."""
    environment = results["environment"]
    versions = {"fastll": environment["versions"]["fastll"]} | environment["peers"]
    others = taken_by_others(results)
    return (
        f"{environment['threads']} threads, {environment['cpu']}, "
        f"{environment['instruction_set'] or 'no cython backend'}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        + (f"; not idle, other processes took {others:.1f} CPUs" if others > IDLE else "")
    )


def notes(results: Results) -> Iterator[str]:
    """The machine and versions, then everything that was not measured or disagrees."""
    environment = results["environment"]
    yield (
        f"{machine(results)}; medians of at least {environment['rounds']} rounds, or 3 for slow peers. "
        "A peer's number is its time divided by fastll's (! if its result differs)."
    )
    missing = [name for name, version in environment["peers"].items() if version is None]
    if missing:
        yield f"Not installed: {', '.join(missing)}."
    yield from of_peers(results)


def of_peers(results: Results) -> Iterator[str]:
    """What was not measured, which peers failed, and which differ."""
    for name, reason in results["unmeasured"].items():
        yield f"Not measured: {name}: {reason}"
    for record in records(results):
        for peer, report in record["peers"].items():
            if "failed" in report:
                yield f"{peer} failed: {record['name']}: {report['failed']}"
            elif not report["agrees"]:
                yield f"{peer} differs by {report['off_by']:.0e} of the largest value: {record['name']}"


def markdown(results: Results) -> str:
    """The tables of bench/README.md: multiples of the floor; times and ratios to each peer."""
    usual = [r for r in records(results) if r["group"] in ("workloads", "calls")]
    large = [r for r in usual if r["times_the_floor"] is not None]
    cases = list(dict.fromkeys(_heading(r) for r in large))
    multiples = {(_label(r), _heading(r)): multiple(r["times_the_floor"]) for r in large}
    labels = dict.fromkeys(label for label, _ in multiples)
    peers = _peers(results)
    lines = [
        *header("multiples of the floor", *cases),
        *(line(label, *(multiples.get((label, case), "") for case in cases)) for label in labels),
        "",
        *header("times as fast as", "logits", "time", *peers),
    ]
    for r in usual:
        if r["peers"]:
            ratios = (faster(r, peer) for peer in peers)
            lines.append(line(_label(r), _heading(r), seconds(r["seconds"]), *ratios))
    return "\n".join((*lines, "", *notes(results)))


def _label(record: Record) -> str:
    name, _, variant = title(record).partition(", ")
    other = [variant] if variant else []
    other += [record["dtype"]] if record["dtype"] != "float32" else []
    return ", ".join((f"`{name}`", *other, record["backend"]))


def _heading(record: Record) -> str:
    shape = " x ".join(map(str, record["shape"]))
    last = record["axis"] == len(record["shape"]) - 1
    unusual = "" if record["logits"] == "randn" else f", {record['logits']}"
    return shape + ("" if last else f", axis {record['axis']}") + unusual


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def header(*cells: str) -> tuple[str, str]:
    return line(*cells), line(*("---" for _ in cells))


def merged(several: list[Results]) -> Results:
    """Merge results of several runs on one device; of repeated measurements, the last one counts."""
    devices = {results["environment"]["device"] for results in several}
    if len(devices) > 1:
        raise ReportError(f"the results are of different devices: {', '.join(sorted(devices))}")
    found = {
        benchmark["param"]: benchmark for results in several for benchmark in results["benchmarks"]
    }
    missing = {name: reason for results in several for name, reason in results["unmeasured"].items()}
    unmeasured = {name: reason for name, reason in missing.items() if name not in found}
    return several[-1] | {"benchmarks": list(found.values()), "unmeasured": unmeasured}


def compare(old: Results, new: Results, fail_over: float) -> tuple[Table, list[str], list[str]]:
    """Compare two runs: a table, the names of what got slower by more than `fail_over`, and notes."""
    before, after = ({r["name"]: r for r in records(results)} for results in (old, new))
    result = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    result.add_column("measurement", overflow="fold")
    for name in ("old", "new", "new / old"):
        result.add_column(name, justify="right")
    worse = []
    for name in (name for name in before if name in after):
        pair = (before[name], after[name])
        # multiples of the floor if both have them: they do not depend on how busy the machine was
        measure = "times_the_floor" if all(r["times_the_floor"] for r in pair) else "seconds"
        shown = [multiple(r[measure]) if measure != "seconds" else seconds(r[measure]) for r in pair]
        change = pair[1][measure] / pair[0][measure]
        if change > 1 + fail_over:
            worse.append(name)
        result.add_row(escape(name), *shown, f"{change:.2f}{' worse' if name in worse else ''}")
    only = [f"Only in the old file: {name}" for name in before if name not in after]
    only += [f"Only in the new file: {name}" for name in after if name not in before]
    return result, worse, only
