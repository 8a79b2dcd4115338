"""The commands of ``python -m fastll``. They need click and rich, which the extra ``cli`` installs."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

import fastll
from fastll import demo as model
from fastll import dispatch

DEFAULT_STEPS, QUICK_STEPS = 300, 50
#: Limit of the training time on a slow machine: with the rest of the demo, it takes under a minute.
DEFAULT_SECONDS = 30.0
#: Largest number of steps that the numpy backend repeats for comparison.
COMPARED_STEPS, QUICK_COMPARED_STEPS = 20, 5


class _Failure(click.ClickException):
    """An error in the arguments or the environment, reported in one sentence."""

    exit_code = 2


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)  # as shells do; click would exit with 1


def warn_without_extension() -> None:
    """Print one line, with the remedy, if the compiled extension is missing."""
    reason = dispatch.why_not("cython")
    if reason is not None:
        click.echo(f"No cython backend: {reason}", err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fastll.__version__, prog_name="fastll")
def main() -> None:
    """Log-sum-exp, softmax, cross-entropy and their gradients at the speed of memory."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # never fail on a name that the terminal cannot show
            stream.reconfigure(errors="replace")


@main.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(min=1), help=f"Training steps. Default {DEFAULT_STEPS}.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="Longest training time; without --steps, the training time (not reproducible then). "
    f"Default {DEFAULT_SECONDS:g}.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--quick", is_flag=True, help=f"Take only a few seconds: {QUICK_STEPS} steps.")
def demo(file: Path | None, steps: int | None, seconds: float | None, seed: int, quick: bool) -> None:
    """Fit a next-token model to a text by maximum likelihood.

    FILE is any text of 20 kB or more. The default is the documentation that ships with CPython.
    """
    if steps is None and (quick or seconds is None):
        steps = QUICK_STEPS if quick else DEFAULT_STEPS
    if seconds is None:
        seconds = DEFAULT_SECONDS
    console = Console(highlight=False)
    laps = {"start": time.perf_counter()}
    warn_without_extension()
    with _failures():
        corpus = model.make_corpus(model.default_text() if file is None else model.read_text(file))
        laps["reading"] = time.perf_counter()
        # fail now if FASTLL_BACKEND or FASTLL_NUM_THREADS would make every call fail
        fastll.get_num_threads()
        fastll.cross_entropy(np.zeros((1, 2), np.float32), [0])
        trained = model.Model(len(corpus.vocabulary), seed)
        run = model.train(trained, corpus, steps=steps, seconds=seconds, seed=seed)
    console.print(_describe(file, corpus))
    scores = {"uniform": model.uniform(corpus), "unigram": model.unigram(corpus)}
    scores["before training"] = model.evaluate(trained, corpus)
    laps["scores before training (and compilation)"] = time.perf_counter()
    with model.backends_used() as backends:
        taken = list(_show(run))
    laps["training"] = time.perf_counter()
    scores["after training"] = model.evaluate(trained, corpus)
    laps["score after training"] = time.perf_counter()
    fresh = model.Model(len(corpus.vocabulary), seed)
    run = model.train(fresh, corpus, steps=steps, seconds=seconds, seed=seed)
    with fastll.use_backend("numpy"):
        compared = list(islice(run, QUICK_COMPARED_STEPS if quick else COMPARED_STEPS))
    laps["numpy backend"] = time.perf_counter()

    console.print(_score_table(scores), "")
    if taken[-1].progress < 1:
        console.print(
            f"Training stopped after {seconds:g} s, at step {len(taken)} of {steps}. Scores depend on "
            "the speed of this machine, and more steps would improve them.\n"
        )
    console.print(_time_table((", ".join(backends), taken), ("numpy", compared)), "")
    console.print(_verdict(taken, compared, reproducible=steps is not None))
    seconds_of = (f"{name} {end - start:.1f}" for (_, start), (name, end) in pairwise(laps.items()))
    console.print(f"\nSeconds: {', '.join(seconds_of)}.")


@contextmanager
def _failures() -> Iterator[None]:
    """Report errors in the arguments and the environment in one sentence."""
    try:
        yield
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise _Failure(str(error)) from error


def _describe(file: Path | None, corpus: model.Corpus) -> str:
    name = "the documentation of CPython" if file is None else click.format_filename(file)
    if file is not None and file.stat().st_size > model.MAX_BYTES:
        name = f"the first {model.MAX_BYTES >> 20} MiB of {name}"
    tokens = len(corpus.train) + len(corpus.heldout)
    return (
        f"Text: {escape(name)}, {tokens:,} tokens, {len(corpus.heldout):,} of them held out "
        f"({corpus.heldout_bytes:,} bytes).\n"
        f"Model: from {model.CONTEXT} tokens to a softmax over {len(corpus.vocabulary):,} tokens.\n"
    )


def _show(steps: Iterator[model.Step]) -> Iterator[model.Step]:
    """Pass the steps on, with a progress bar if stderr is a terminal."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("training"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        smooth = 0.0
        task = bar.add_task("", total=1.0, loss="")
        for step in steps:
            smooth = step.loss if step.number == 1 else 0.95 * smooth + 0.05 * step.loss
            bar.update(task, completed=step.progress, loss=f"NLL {smooth:.2f}")
            yield step


def _table(title: str, *columns: str) -> Table:
    """A table of numbers after the first column. On a narrow terminal it wraps and cuts nothing off."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    return table


def _score_table(scores: dict[str, model.Score]) -> Table:
    title = "Held-out negative log-likelihood"
    table = _table(title, "", "nats per token", "bits per byte", "perplexity")
    for name, (nll, bits, perplexity) in scores.items():
        table.add_row(name, f"{nll:.3f}", f"{bits:.3f}", f"{perplexity:,.1f}")
    return table


def _time_table(*runs: tuple[str, list[model.Step]]) -> Table:
    title = "Time in the likelihood and its gradient"
    table = _table(title, "backend", "steps", "median ms", "slowest ms", "total s")
    for name, steps in runs:
        spent = [step.likelihood_seconds for step in steps]
        numbers = 1e3 * statistics.median(spent), 1e3 * max(spent), sum(spent)
        table.add_row(escape(name), f"{len(steps):,}", *(f"{number:.2f}" for number in numbers))
    return table


def _verdict(taken: list[model.Step], compared: list[model.Step], reproducible: bool) -> str:
    ours = sum(step.likelihood_seconds for step in taken)
    theirs = statistics.median(step.likelihood_seconds for step in compared) * len(taken)
    text = (
        f"Likelihood of all {len(taken):,} steps: {ours:.2f} s; "
        f"on the numpy backend (the float64 reference) {theirs:.2f} s, "
        f"{theirs / ours:.1f} times as long"
    )
    if len(compared) < len(taken):
        text += f" (extrapolated from the median of the first {len(compared)} steps)"
    if reproducible:  # otherwise the learning rates of the two runs differ
        worst = max(abs(a.loss - b.loss) for a, b in zip(taken, compared, strict=False))
        text += f". Their losses agree {f'to {worst:.0e} nats' if worst else 'exactly'}"
    return text + "."


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """Show backends, versions, threads and hardware."""
    report = _report()
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    warn_without_extension()
    console = Console(highlight=False)
    backends = _table("Backends", "backend", "version", "available")
    backends.columns[-1].justify = "left"
    for name, status in report["backends"].items():
        reason = "" if name == "cython" else f": {status['reason']}"  # the warning gives cython's
        available = "yes" if status["available"] else f"no{reason}"
        backends.add_row(name, escape(status["version"] or ""), escape(available))
    console.print(backends, "")
    settings = [f"{name}={value}" for name, value in report["environment"].items()]
    facts = {name: found or "not installed" for name, found in report["versions"].items()} | {
        "threads": str(report["threads"]),
        "CPU": report["cpu"],
        "instruction set": report["instruction_set"] or "unknown (no cython backend)",
        "GPU": ", ".join(report["gpu"]) or "none",
        "environment": ", ".join(settings) or "no FASTLL_* variable set",
    }
    grid = Table.grid("", Column(overflow="fold"), padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(name, escape(value))
    console.print(grid)


def _report() -> dict[str, Any]:
    with _failures():
        threads, backends = fastll.get_num_threads(), fastll.backends()
    instruction_set = None
    if backends["cython"].available:
        instruction_set = importlib.import_module("fastll.backend.cython").backend.instruction_set
    versions = {"fastll": fastll.__version__, "Python": platform.python_version()}
    packages: dict[str, str | None] = dict.fromkeys(("numpy", "numba", "llvmlite"))
    for name in packages:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    # "GPU 0: NVIDIA H100 (UUID: GPU-...)": names without loading CUDA
    gpus = re.findall(r"^GPU \d+: (.+?)(?: \(UUID|$)", _output("nvidia-smi", "-L"), re.MULTILINE)
    return {
        "versions": versions | packages,
        "backends": {name: status._asdict() for name, status in backends.items()},
        "threads": threads,
        "cpu": _cpu(),
        "instruction_set": instruction_set,
        "gpu": gpus,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("FASTLL_")},
    }


def _cpu() -> str:
    """Model name of the CPU, or its architecture if the system does not report the model."""
    name = ""
    if sys.platform == "darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
    else:
        with suppress(OSError):
            text = Path("/proc/cpuinfo").read_text(errors="replace")
            name = "".join(re.findall("^model name.*?:(.+)", text, re.MULTILINE)[:1])
    return " ".join(name.split()) or platform.processor() or platform.machine()


def _output(*command: str) -> str:
    """What a program prints; nothing if it is missing or fails."""
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
