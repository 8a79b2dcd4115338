"""The commands of ``python -m bench``, run from the root of the repository."""

from __future__ import annotations

import json
import os
from collections import ChainMap
from collections.abc import Callable, Collection
from math import prod
from pathlib import Path
from typing import Any

import click
import pytest
from rich.console import Console
from rich.progress import track

import fastll
from bench import (
    card,
    frameworks,
    gpu,
    gpu_calls,
    gpu_model_report,
    gpu_report,
    grid,
    grid_report,
    report,
)
from bench.adapters import FRAMEWORKS
from bench.cases import CALL_BELOW, CASES, CUDA_CASES, DTYPES, GROUPS, LOGITS, Case
from bench.crossover import crossover as crossover_lines
from bench.jobs import Settings, measures, select
from bench.peers import CUDA_PEERS, PEERS
from bench.plots import draw
from bench.session import measure
from fastll import dispatch
from fastll.cli import warn_without_extension
from fastll.operations import OPERATIONS

Results = click.Path(path_type=Path)
Folder = click.Path(path_type=Path, file_okay=False)


class _Failure(click.ClickException):
    exit_code = 2  # 1 means that something got slower


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except report.ReportError as error:
            raise _Failure(str(error)) from error


def _list_of(known: Collection[str], *others: str) -> Callable[[Any, Any, str | None], tuple[str, ...]]:
    """Callback for an option that takes a comma-separated list of names."""

    def split(ctx: Any, option: Any, value: str | None) -> tuple[str, ...]:
        names = tuple(name.strip() for name in value.split(",")) if value else ()
        for name in names:
            if name not in (*known, *others):
                raise click.BadParameter(f"{name!r} is none of {', '.join((*known, *others))}")
        return names

    return split


def _cases(value: str | None, axis: int, device: str) -> tuple[Case, ...]:
    """Look up cases by name or group, or make one from a shape such as 2048x50257."""
    cases: list[Case] = []
    of_device = (CUDA_CASES | CASES if device == "cuda" else CASES).values()
    for name in (part.strip() for part in value.split(",")) if value else ():
        known = [case for case in of_device if name in (case.name, case.group)]
        cases += known or [_custom(name, axis)]
    return tuple(cases)


def _custom(name: str, axis: int) -> Case:
    sizes = name.split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        known = ", ".join((*GROUPS, *(c.name for c in CASES.values() if c.group in GROUPS[:2])))
        raise click.BadParameter(
            f"{name!r} is not a shape such as 2048x50257 and none of {known}", param_hint="--shape"
        )
    shape = tuple(map(int, sizes))
    if not -len(shape) <= axis < len(shape):
        raise click.BadParameter(f"{axis} is not an axis of {name}", param_hint="--axis")
    group = "calls" if prod(shape) < CALL_BELOW else "workloads"
    axis %= len(shape)
    label = name if axis == len(shape) - 1 else f"{name}-axis{axis}"
    return Case(label, shape, axis, tuple(OPERATIONS), group=group)


@click.group(
    cls=_Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--full", is_flag=True, help="Measure everything instead of the quick set of 2 minutes.")
@click.option(
    "--op",
    "operations",
    callback=_list_of(OPERATIONS, *measures()),
    help="Operations, or OPERATION/VARIANT with the variant value, gradient or in-place.",
)
@click.option("--shape", help=f"Cases, groups ({', '.join(GROUPS)}) or shapes such as 2048x50257.")
@click.option("--axis", default=-1, show_default=True, help="Class axis of a shape given with --shape.")
@click.option("--dtype", "dtypes", callback=_list_of(DTYPES), help=", ".join(DTYPES))
@click.option("--logits", callback=_list_of(LOGITS), help=", ".join(LOGITS))
@click.option(
    "--backend",
    "backends",
    callback=_list_of(fastll.backends()),
    help="Default: cython, or else numba.",
)
@click.option(
    "--against",
    callback=_list_of(ChainMap(CUDA_PEERS, PEERS), "none"),
    help=f"{', '.join(PEERS)} (default: all) or none; on a GPU {', '.join(CUDA_PEERS)}.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of fastll and of every peer.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--seconds", type=click.FloatRange(0), help="On a GPU: start nothing after this time.")
@click.option("--output", type=Folder, default="results", show_default=True, help="Folder to write to.")
@click.pass_context
def main(
    ctx: click.Context,
    shape: str | None,
    axis: int,
    against: tuple[str, ...],
    threads: int | None,
    device: str,
    output: Path,
    **selected: Any,
) -> None:
    """Measure fastll against the limit set by memory bandwidth and against its peers."""
    if ctx.invoked_subcommand is not None:
        return
    peers = CUDA_PEERS if device == "cuda" else PEERS
    chosen = tuple(name for name in against or peers if name != "none")
    settings = Settings(cases=_cases(shape, axis, device), against=chosen, device=device, **selected)
    _check(settings, peers)
    if device == "cpu" and not settings.backends:
        warn_without_extension()
    if threads is not None:
        _limit(threads)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.json"
    path.unlink(missing_ok=True)
    code = (gpu.measure if device == "cuda" else measure)(settings, path)
    results = report.load(path)
    console = Console(highlight=False)
    words = gpu_report if device == "cuda" else report
    console.print(words.table(results), "")
    for note in words.notes(results):
        console.print(note, markup=False)
    for written in draw(results, output):
        click.echo(f"Wrote {written}", err=True)
    ctx.exit({pytest.ExitCode.OK: 0, pytest.ExitCode.INTERRUPTED: 130}.get(code, code and 1))


def _check(settings: Settings, peers: Collection[str]) -> None:
    """Raise an error if the selection leaves nothing to measure."""
    for name in settings.against:
        if name not in peers:
            raise click.BadParameter(f"{name!r} is none of {', '.join(peers)}", param_hint="--against")
    if settings.device == "cuda":
        if not {"randn"}.issuperset(settings.logits) or not {"cuda"}.issuperset(settings.backends):
            raise click.UsageError("on a GPU the only backend is cuda and the only logits are randn")
        reason = card.why_not()
        if reason is not None:
            raise _Failure(f"no GPU to measure: {reason}")
    if not select(settings):
        raise click.UsageError("nothing to measure: no case has such operations, dtypes and logits")


def _limit(threads: int) -> None:
    """Limit the process to as many CPUs, for libraries that have no setting for threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    fastll.set_num_threads(threads)


def _share(ctx: Any, option: Any, value: str) -> float:
    try:
        share = float(value.removesuffix("%")) / 100
    except ValueError:
        share = -1
    if not share >= 0:
        raise click.BadParameter(f"{value!r} is not a percentage such as 10%")
    return share


def _range(ctx: Any, option: Any, value: str | None) -> tuple[int, int] | None:
    """Callback for an option that takes a number, or a first and a last one."""
    if value is None:
        return None
    first, _, last = value.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal():
        raise click.BadParameter(f"{value!r} is not a range such as 8-31")
    return int(first), int(last or first)


@main.command("grid")
@click.option("--quick", is_flag=True, help="A thinned grid in 3 minutes, without torch.compile.")
@click.option("--minutes", type=click.FloatRange(0), help="Start no cell after this time.")
@click.option("--resume", is_flag=True, help="Keep the cells in OUTPUT/grid.json and add the others.")
@click.option("--draw", "drawn", type=Results, help="Measure nothing: show and draw these results.")
@click.option("--op", "measures", callback=_list_of(grid.MEASURES), help=", ".join(grid.MEASURES))
@click.option("--dtype", "dtypes", callback=_list_of(grid.DTYPES), help=", ".join(grid.DTYPES))
@click.option("--against", callback=_list_of(PEERS, "none"), help=f"Default: {', '.join(grid.RIVALS)}.")
@click.option(
    "--backend", type=click.Choice(dispatch.TABLE["cpu"]), help="Default: what fastll chooses."
)
@click.option("--classes", callback=_range, help="Only these numbers of classes, such as 8-31.")
@click.option("--exponents", callback=_range, help="Only 2**these numbers of elements, such as 12-22.")
@click.option("--memory", type=click.FloatRange(0), help="GiB a cell may take; default: what is free.")
@click.option("--threads", type=click.IntRange(1), help="Threads of fastll and of every peer.")
@click.option("--output", type=Folder, help="Folder to write to; default: results, or that of --draw.")
@click.pass_context
def measure_grid(
    ctx: click.Context,
    resume: bool,
    drawn: Path | None,
    minutes: float | None,
    against: tuple[str, ...],
    memory: float | None,
    threads: int | None,
    output: Path | None,
    **selected: Any,
) -> None:
    """Measure rows x classes beside the fastest peer and the floor, and draw heat maps."""
    if drawn is not None:
        code, path, output = 0, drawn, output or drawn.parent
    else:
        if threads is not None:
            _limit(threads)
        if selected["backend"] is None:
            warn_without_extension()
        quick = selected["quick"]
        rivals = [name for name in grid.RIVALS if not (quick and name == "torch.compile")]
        plan = grid.Plan(
            against=tuple(name for name in against or rivals if name != "none"),
            minutes=grid.QUICK_MINUTES if quick and minutes is None else minutes,
            memory=None if memory is None else memory * 2**30,
            **{name: value for name, value in selected.items() if value},
        )
        output = output or Path("results")
        output.mkdir(parents=True, exist_ok=True)
        path = output / "grid.json"
        before = grid_report.load(path) if resume and path.exists() else None
        code = grid.measure(plan, path, before)
    results = grid_report.load(path)
    console = Console(highlight=False)
    for summary in grid_report.tables(results):
        console.print(summary, "")
    for note in grid_report.notes(results):
        console.print(note, markup=False)
    for written in draw(results, output):
        click.echo(f"Wrote {written}", err=True)
    ctx.exit(code)


@main.command("frameworks")
@click.option("--only", callback=_list_of(FRAMEWORKS), help=", ".join(FRAMEWORKS))
@click.option("--quick", is_flag=True, help="Fewer shapes, rounds and rivals, in 2 minutes.")
@click.option("--threads", type=click.IntRange(1), help="Threads of fastll and of every framework.")
@click.option("--output", type=Folder, default="results", show_default=True, help="Folder to write to.")
@click.pass_context
def measure_frameworks(
    ctx: click.Context, only: tuple[str, ...], quick: bool, threads: int | None, output: Path
) -> None:
    """Measure the adapters for other frameworks beside the frameworks' own functions."""
    warn_without_extension()
    if threads is not None:
        _limit(threads)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "frameworks.json"
    path.unlink(missing_ok=True)
    code = frameworks.measure(only, quick, path)
    results = report.load(path)
    console = Console(highlight=False)
    console.print(frameworks.table(results), "")
    for note in frameworks.notes(results):
        console.print(note, markup=False)
    for written in draw(results, output):
        click.echo(f"Wrote {written}", err=True)
    ctx.exit(code)


@main.command()
@click.argument("old", type=Results)
@click.argument("new", type=Results)
@click.option(
    "--fail-over", callback=_share, default="10%", show_default=True, help="Allowed slowdown."
)
@click.pass_context
def compare(ctx: click.Context, old: Path, new: Path, fail_over: float) -> None:
    """Compare two files of results; exit with 1 if anything in NEW is slower than in OLD."""
    table, worse, only = report.compare(report.load(old), report.load(new), fail_over)
    console = Console(highlight=False)
    console.print(table, "")
    for line in only:
        console.print(line, markup=False)
    console.print(f"{len(worse)} of {table.row_count} got slower by more than {fail_over:.0%}")
    ctx.exit(1 if worse else 0)


@main.command()
@click.argument("results", type=Results)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def table(results: Path, device: str) -> None:
    """Print results as the Markdown tables of bench/README.md.

    With --device cuda, RESULTS need not exist: the table then lists the targets.
    """
    if device == "cuda" and not results.exists():
        click.echo(gpu_report.markdown(None))
        return
    found = report.load(results)
    on_gpu = found["environment"]["device"] == "cuda"
    words = gpu_report if on_gpu else grid_report if grid_report.is_grid(found) else report
    if frameworks.is_frameworks(found):
        words = frameworks
    click.echo(words.markdown(found))


@main.command()
@click.argument("output", type=Results)
@click.argument("results", type=Results, nargs=-1, required=True)
def merge(output: Path, results: tuple[Path, ...]) -> None:
    """Merge the results of several runs; of repeated measurements, the last one counts."""
    whole = report.merged([report.load(path) for path in results])
    output.write_text(json.dumps(whole, indent=1), encoding="utf-8")


@main.command()
@click.argument("results", type=Results)
@click.option("--output", type=Folder, help="Folder to write to; default: the folder of RESULTS.")
def plot(results: Path, output: Path | None) -> None:
    """Draw the plots of results."""
    for written in draw(report.load(results), output or results.parent):
        click.echo(f"Wrote {written}", err=True)


@main.command("gpu-model")
@click.option("--only", default="", help="Only the cases with this in their names.")
@click.option("--save", "saved", is_flag=True, help="Store the results, for later comparisons.")
@click.pass_context
def gpu_model(ctx: click.Context, only: str, saved: bool) -> None:
    """Count what GPU kernels cost, without a GPU; exit with 1 if one got worse by more than 5%.

    A model: instructions are counted, latencies assumed, and nothing is measured.
    """
    try:
        from bench import gpu_model as model
    except ImportError as error:
        raise _Failure(f"GPU kernels cannot be compiled: {error}") from error
    chosen = [case for case in model.cases() if only in case.name]
    if not chosen:
        raise click.BadParameter(f"no case has {only!r} in its name", param_hint="--only")
    if saved and only:
        raise click.UsageError("all cases are stored together: --save takes no --only")
    console, old = Console(highlight=False), model.stored()
    shown: dict[str, Any] = {"total": len(chosen), "console": Console(stderr=True), "transient": True}
    records = dict(track(model.results(chosen), "Compiling and emulating", **shown))
    console.print(gpu_model_report.table(records, old["cases"]), "")
    for note in gpu_model_report.notes(records, old, model.versions()):
        console.print(note, markup=False)
    same = model.comparable(old)
    said = {
        name: model.worse(old["cases"][name], record, same)
        for name, record in records.items()
        if name in old["cases"]
    }
    for name, reasons in said.items():
        for reason in reasons:
            console.print(f"Worse: {name}: {reason}", markup=False)
    if saved:
        model.save(records)
        click.echo(f"Wrote {model.STORED}", err=True)
    ctx.exit(1 if any(said.values()) and not saved else 0)


@main.command()
def crossover() -> None:
    """Show where Numba is faster than Cython, and from which size on."""
    reason = dispatch.why_not("cython")
    if reason is not None:
        raise _Failure(f"no cython backend: {reason}")
    for line in crossover_lines():
        click.echo(line)


@main.command("gpu-calls")
@click.option("--library", type=click.Choice(list(gpu_calls.LIBRARIES)), multiple=True)
@click.option("--rounds", type=click.IntRange(1), default=gpu_calls.ROUNDS, show_default=True)
@click.option("--output", type=Results, help="JSON file to write to.")
def measure_gpu_calls(library: tuple[str, ...], rounds: int, output: Path | None) -> None:
    """Measure what a call on a GPU costs in Python; needs numba-cuda and PyTorch, but no GPU."""
    try:
        names = library or tuple(gpu_calls.LIBRARIES)
        found = [record for name in names for record in gpu_calls.measure(name, rounds)]
    except ImportError as error:
        raise _Failure(f"{error}; try --library plain") from error
    for line in gpu_calls.lines(found):
        click.echo(line)
    if output is not None:
        output.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(prog_name="python -m bench")
