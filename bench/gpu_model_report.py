"""The table of `bench.gpu_model`, beside what is stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

PIPES = ("FMA", "ALU", "MUFU", "LSU", "FP64")
CAUSES = ("DRAM", "cluster", "shared", "arithmetic")


def table(records: dict[str, dict[str, Any]], old: dict[str, dict[str, Any]]) -> Table:
    """The cases; instructions are of one element, conflicts of 1000, changes beside what is stored."""
    result = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    result.add_column("model, not measured\nclasses, dtype", overflow="fold")
    names = ["registers\nblocks", "spills", "instruc-\ntions", *PIPES, "other", "con-\nflicts"]
    names += ["life-\ntime", *(f"waits:\n{cause}" for cause in CAUSES)]
    names += ["issue\nlimit", "latency\nlimit", "meas-\nured"]
    for name in names:
        result.add_column(name, justify="right", no_wrap=True)
    for name, record in records.items():
        before = old.get(name, {})
        if before.get("from") != record["from"]:
            before = {}
        result.add_row(*_cells(record, before))
    return result


def _cells(record: dict[str, Any], before: dict[str, Any]) -> Iterator[str]:
    gradient = ", gradient" if record["variant"] == "gradient" else ""
    yield escape(f"{record['operation']}{gradient}\n{record['classes']}, {record['dtype']}")
    yield f"{record['registers']}\n{record['resident_blocks']}"
    yield str(record.get("spills", ""))
    yield f"{record['instructions']:.1f}{_change(record, before, 'instructions')}"
    pipes = record["pipes"]
    known = record["from"] == "sass"
    for pipe in PIPES:
        yield f"{pipes.get(pipe, 0):.1f}" if known else ""
    yield f"{sum(n for pipe, n in pipes.items() if pipe not in PIPES):.1f}" if known else "PTX"
    yield f"{record['conflicts']:.0f}{_change(record, before, 'conflicts')}"
    yield f"{record['lifetime']}{_change(record, before, 'lifetime')}" if known else ""
    for cause in CAUSES:
        yield str(record["waits"].get(cause, "")) if known else ""
    yield f"{record['issue_limit']:.2f}"
    yield f"{record['latency_limit']:.2f}{_change(record, before, 'latency_limit')}" if known else ""
    share = record["measured"]["share_of_a_copy"]
    yield "" if share is None else f"{share:.2f}"


def _change(record: dict[str, Any], before: dict[str, Any], key: str) -> str:
    """By how much a number differs from the stored one, on a line of its own."""
    if not before.get(key) or round(100 * record[key] / before[key]) == 100:
        return ""
    return f"\n{record[key] / before[key] - 1:+.0%}"


def notes(
    records: dict[str, dict[str, Any]], old: dict[str, Any], versions: dict[str, str]
) -> Iterator[str]:
    """What the numbers are, and of which compilers."""
    yield (
        "A model of an H200; nothing was measured. Limits are shares of the bandwidth of a copy, about "
        "25% either way; instructions are for one element, conflicts for 1000, lifetime and waits in "
        "clocks of a thread block."
    )
    if any(record["from"] == "ptx" for record in records.values()):
        yield "There is no nvdisasm: instructions are those of PTX, and there is no model of latency."
    yield ", ".join(f"{package} {version}" for package, version in versions.items())
    others = {p: v for p, v in old["versions"].items() if versions.get(p) != v}
    if others:
        yield "Stored results are of " + ", ".join(f"{p} {v}" for p, v in others.items())
    unclear = max(record.get("unexplained", 0.0) for record in records.values())
    yield f"Of the executed lines of PTX, up to {unclear:.0%} are not where machine code was followed."
