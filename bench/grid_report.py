"""Reports of a grid: ratios by ranges of classes and sizes, and what is missing."""

from __future__ import annotations

from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench import report
from bench.grid import DTYPES, MEASURES
from bench.report import Record, ReportError, Results, beside_the_fastest, exponent, multiple

#: Where the ranges of the summary begin: classes, and binary logarithms of elements.
CLASS_RANGES, EXPONENT_RANGES = (2, 8, 32, 128, 1000, 10000), (0, 12, 17, 22)


def is_grid(results: Results) -> bool:
    return "grid" in results["environment"]


def load(path: Path) -> Results:
    """Load the results of a grid from a file."""
    results = report.load(path)
    if not is_grid(results):
        raise ReportError(f"{path} has no grid")
    return results


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
