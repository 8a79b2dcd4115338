"""One run of pytest on this folder: the progress display, and the machine's description in the JSON."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fastll
from bench.jobs import Settings
from bench.peers import PEERS
from bench.report import ReportError, describe

FOLDER = Path(__file__).parent
SETTINGS = pytest.StashKey[Settings]()


def progress_bar(console: Console) -> Progress:
    """A display that changes only when told to: a refresh would disturb the measurement."""
    return Progress(
        MofNCompleteColumn(),
        BarColumn(10),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        auto_refresh=False,
    )


class Session:
    """The pytest plugin of a run."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        self.unmeasured: dict[str, str] = {}
        self.progress = progress_bar(console)
        self.task = self.progress.add_task("preparing")

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[SETTINGS] = self.settings

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.progress.update(self.task, total=len(session.items), refresh=True)

    def pytest_runtest_setup(self, item: Any) -> None:
        job = item.callspec.params["job"]
        description = f"{job.operation}, {job.variant}, {job.case.name}"
        self.progress.update(self.task, description=escape(description), refresh=True)

    def pytest_runtest_makereport(self, item: Any, call: pytest.CallInfo[None]) -> None:
        if call.when != "call":
            return
        name = item.callspec.params["job"].name
        if call.excinfo is not None:
            self.unmeasured[name] = call.excinfo.exconly().partition("\n")[0]
            said = self.unmeasured[name]
        else:
            benchmark = item.funcargs["benchmark"]
            said = describe(benchmark.extra_info | {"seconds": benchmark.stats.stats.median})
        self.progress.console.print(f"{name}: {said}", soft_wrap=True, markup=False, highlight=False)
        self.progress.update(self.task, advance=1, refresh=True)

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        output_json["environment"] = environment(self.settings)
        output_json["unmeasured"] = self.unmeasured


def environment(settings: Settings) -> dict[str, Any]:
    """The machine, versions and threads; the version of a peer that is not installed is None."""
    info = subprocess.run(
        [sys.executable, "-m", "fastll", "info", "--json"], capture_output=True, text=True, check=True
    )
    found = json.loads(info.stdout)
    return {
        "cpu": found["cpu"],
        "instruction_set": found["instruction_set"],
        "threads": fastll.get_num_threads(),
        "device": settings.device,
        "rounds": settings.rounds,
        "versions": found["versions"],
        "peers": {name: PEERS[name].version for name in settings.against},
    }


def measure(settings: Settings, path: Path) -> int:
    """Run the jobs and write their results; return pytest's exit code."""
    session = Session(settings, Console(stderr=True))
    options = ["-o", "addopts=", "-o", "filterwarnings=ignore", "-p", "no:cacheprovider", "-s"]
    said = io.StringIO()
    with session.progress, redirect_stdout(said):
        code = pytest.main([str(FOLDER), *options, f"--benchmark-json={path}"], plugins=[session])
    if not path.exists():  # no job got as far as a result
        reasons = "".join(f"\n{name}: {reason}" for name, reason in session.unmeasured.items())
        raise ReportError(f"nothing was measured{reasons or said.getvalue()}")
    return code
