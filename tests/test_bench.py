"""The benchmark: it runs, names what it cannot run, compares, and is honest about its peers."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import require_numba_cuda
from source_tree import make_tree, run_in

import fastll
from bench import (
    adapters,
    card,
    cases,
    crossover,
    families,
    frameworks,
    gpu,
    gpu_report,
    grid,
    grid_report,
    jobs,
    peers,
    plots,
    report,
)
from bench.__main__ import main
from fastll import dispatch
from fastll.operations import OPERATIONS

SHAPE = (60, 2000)
BCE = "binary_cross_entropy_with_logits"


def invoke(*arguments: str | Path) -> Result:
    # without the name of a worker of pytest-xdist, where pytest-benchmark measures nothing
    environment = {"COLUMNS": "200", "PYTEST_XDIST_WORKER": None}
    return CliRunner().invoke(main, [str(a) for a in arguments], env=environment)


def job(
    operation: str, variant: str = "value", dtype: str = "float32", logits: str = "randn"
) -> jobs.Job:
    case = cases.Case("tiny", (6, 120), 1, tuple(OPERATIONS))
    return jobs.Job(operation, variant, case, dtype, logits, "numpy", (), 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A run against a peer that works, one that is not installed, one that fails, one that is wrong."""

    def fails(*arguments: Any) -> None:
        raise MemoryError("no room [here]")

    def wrong(name: str, gradient: bool, x: Any, *others: Any) -> Any:
        return lambda: np.zeros(len(x))

    there = "numpy"
    table = {
        "numpy": peers.PEERS["numpy"],
        "abacus": peers.Peer("no-such-package", fails),
        "broken": peers.Peer(there, fails),
        "wrong": peers.Peer(there, wrong),
    }
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        for name, peer in table.items():
            patch.setitem(peers.PEERS, name, peer)
        done = invoke(
            *("--shape", "60x2000,5x10", "--op", "logsumexp,sparse_cross_entropy/gradient"),
            *("--backend", "numpy", "--against", ",".join(table), "--rounds", "2", "--output", folder),
        )
    return done, folder


@pytest.fixture
def results(run: tuple[Result, Path]) -> dict[str, Any]:
    return json.loads((run[1] / "results.json").read_text())


def test_run(run: tuple[Result, Path]) -> None:
    done, folder = run
    assert done.exit_code == 0, done.output
    assert {path.name for path in folder.iterdir()} == {"results.json", "peers.png", "peers.svg"}
    assert (folder / "peers.png").read_bytes().startswith(b"\x89PNG")
    assert "4/4" in done.stderr
    for expected in ("logsumexp", "sparse_cross_entropy, gradient", "60x2000, float32, numpy", "us"):
        assert expected in done.stdout


def test_peers_are_named_whatever_happens(run: tuple[Result, Path]) -> None:
    said = run[0].stdout
    assert "Not installed: abacus." in said
    assert "MemoryError: no room [here]" in said
    assert "wrong differs by" in said


def test_json(results: dict[str, Any]) -> None:
    environment = results["environment"]
    assert environment["threads"] == fastll.get_num_threads()
    assert environment["cpu"]
    assert environment["versions"]["fastll"] == fastll.__version__
    assert environment["peers"]["numpy"] == np.__version__
    assert environment["peers"]["abacus"] is None
    large, _, small, _ = (benchmark["extra_info"] for benchmark in results["benchmarks"])
    assert large["shape"] == list(SHAPE)
    assert large["nbytes"] == 4 * SHAPE[0] * SHAPE[1]
    assert large["times_the_floor"] > 0
    assert large["peers"]["numpy"]["faster"] > 0
    assert large["peers"]["numpy"]["agrees"]
    assert "abacus" not in large["peers"]
    assert "failed" in large["peers"]["broken"]
    assert not large["peers"]["wrong"]["agrees"]
    assert small["floor"] is None
    assert small["peers"]["numpy"]["seconds"] < 0.01


def test_table_in_markdown(run: tuple[Result, Path]) -> None:
    lines = invoke("table", run[1] / "results.json").output.splitlines()
    assert lines[0] == "| multiples of the floor | 60 x 2000 |"
    assert lines[2].startswith("| `logsumexp`, numpy | ")
    assert "| times as fast as | logits | time | numpy | broken | wrong |" in lines
    assert any("Not installed: abacus" in line for line in lines)


def test_tables_in_the_documentation() -> None:
    folder = Path(jobs.__file__).parent
    tables = invoke("table", folder / "results/cpu.json").output
    assert tables in (folder / "README.md").read_text(encoding="utf-8")


def test_plots_of_sweeps(results: dict[str, Any], tmp_path: Path) -> None:
    for group in ("sizes", "rows", "classes"):
        for benchmark in results["benchmarks"][:2]:
            swept = deepcopy(benchmark)
            swept["extra_info"]["group"] = group
            results["benchmarks"].append(swept)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    done = invoke("plot", file)
    assert done.exit_code == 0, done.output
    plots = {path.name for path in tmp_path.iterdir()} - {"results.json"}
    assert plots == {
        f"{name}.{kind}" for name in ("peers", "sizes", "scaling") for kind in ("png", "svg")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "logsumexp,abacus"], "'abacus' is none of logsumexp, softmax"),
        (["--dtype", "float8"], "'float8' is none of float16"),
        (["--logits", "odd"], "'odd' is none of randn"),
        (["--backend", "abacus"], "'abacus' is none of numba"),
        (["--against", "abacus"], "'abacus' is none of numpy, scipy"),
        (["--shape", "2048xmany"], "'2048xmany' is not a shape"),
        (["--shape", "20x0"], "'20x0' is not a shape"),
        (["--shape", "20x10", "--axis", "2"], "2 is not an axis of 20x10"),
        (["--shape", "criteo", "--op", "softmax"], "nothing to measure"),
    ],
)
def test_unknown_names(arguments: list[str], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


def test_nothing_measured(tmp_path: Path) -> None:
    done = invoke("--shape", "5x10", "--backend", "cuda", "--op", "softmax/value", "--output", tmp_path)
    assert done.exit_code == 2
    assert "nothing was measured" in done.stderr
    assert "backend cuda: " in done.stderr


def test_source_tree_without_extension(tmp_path: Path) -> None:
    """One line says so, and the next backend that is available is measured instead."""
    (tmp_path / "numba.py").write_text("raise ImportError")  # nothing needs to be compiled then
    options = ("--shape", "5x10", "--op", "sigmoid/value", "--against", "none", "--rounds", "1")
    done = run_in(make_tree(tmp_path), "bench", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cython") == 1
    assert "python -m pip install -e ." in done.stderr
    assert "sigmoid-value-5x10-float32-randn-numpy: " in done.stderr
    assert "Not measured" not in done.stdout


def test_backends_that_are_missing_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*missing: str, **selected: Any) -> set[str]:
        status = {name: dispatch.Status(name not in missing, None, None) for name in dispatch.NAMES}
        monkeypatch.setattr(fastll, "backends", lambda: status)
        return {job.backend for job in jobs.select(jobs.Settings(**selected))}

    assert measured() == {"cython"}
    assert measured(full=True) == {"cython", "numba"}
    assert measured("cython") == measured("cython", full=True) == {"numba"}
    assert measured("cython", "numba") == {"numpy"}
    assert measured("cython", backends=("cython",)) == {"cython"}  # asked for by name


def changed(results: dict[str, Any], path: Path, factor: float) -> Path:
    """The results with everything slower by a factor."""
    results = deepcopy(results)
    for benchmark in results["benchmarks"]:
        benchmark["stats"]["median"] *= factor
        if benchmark["extra_info"]["times_the_floor"]:
            benchmark["extra_info"]["times_the_floor"] *= factor
    path.write_text(json.dumps(results))
    return path


@pytest.mark.parametrize(
    ("factor", "fail_over", "code"), [(1.05, "10%", 0), (1.2, "10", 1), (1.2, "25%", 0), (0.5, "0%", 0)]
)
def test_compare(
    results: dict[str, Any], tmp_path: Path, factor: float, fail_over: str, code: int
) -> None:
    old = changed(results, tmp_path / "old.json", 1)
    new = changed(results, tmp_path / "new.json", factor)
    done = invoke("compare", old, new, "--fail-over", fail_over)
    assert done.exit_code == code, done.output
    assert f"{4 * code} of 4 got slower" in done.output
    assert done.output.count(f"{factor:.2f}") >= 4


def test_compare_goes_by_the_floor(results: dict[str, Any], tmp_path: Path) -> None:
    """A busy machine slows the floor down too."""
    old = changed(results, tmp_path / "old.json", 1)
    slow = deepcopy(results)
    for benchmark in slow["benchmarks"]:
        benchmark["stats"]["median"] *= 2
    new = changed(slow, tmp_path / "new.json", 1)
    assert "2 of 4 got slower" in invoke("compare", old, new).output  # the small calls


def test_compare_lists_what_only_one_has(results: dict[str, Any], tmp_path: Path) -> None:
    old = changed(results, tmp_path / "old.json", 1)
    gone = results["benchmarks"].pop(0)["param"]
    new = changed(results, tmp_path / "new.json", 1)
    assert f"Only in the old file: {gone}" in invoke("compare", old, new).output
    assert f"Only in the new file: {gone}" in invoke("compare", new, old).output


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"benchmarks": [{}]}'])
def test_broken_files_are_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    for command in (["compare", path, path], ["table", path], ["plot", path]):
        done = invoke(*command)
        assert done.exit_code == 2
        assert str(path) in done.stderr


def test_compare_refuses_a_share() -> None:
    assert "'much' is not a percentage" in invoke("compare", "a", "b", "--fail-over", "much").stderr


def test_cases_name_operations() -> None:
    known = {*OPERATIONS, *jobs.measures()}
    for case in cases.CASES.values():
        assert known.issuperset((*case.operations, *case.quick))
        everything, quick = (
            {job.name for job in jobs.select(jobs.Settings(cases=(c,)))}
            for c in (case, case._replace(operations=case.quick))
        )
        assert everything >= quick
        assert set(cases.LOGITS).issuperset(case.logits)
        assert 4 * np.prod(case.shape, dtype=float) <= cases.MAX_BYTES


def test_crossover(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba is fast on rows of float32 that are large, and on columns that are not the largest."""
    made = []

    def workload(job: jobs.Job) -> Any:
        made.append(job.case.shape)
        return SimpleNamespace(call=job)

    def compare(job: jobs.Job) -> float:
        size, short = np.prod(job.case.shape), job.case.shape[-1] == 10
        fast = 1 << 19 < size < 1 << 23 if short else size > 1 << 19
        return 0.9 if fast and job.dtype == "float32" else 1.1

    monkeypatch.setattr(crossover, "workload", workload)
    monkeypatch.setattr(crossover, "_compare", compare)
    monkeypatch.setattr(crossover, "CLASSES", ((10, 1), (1000, 1)))
    *_, rows = (line for line in invoke("crossover").output.splitlines() if "rows float32: " in line)
    assert rows == 'rows float32: 1.10 1.10 0.90 0.90 0.90; ("rows", "float32"): 1 << 20'
    lines = invoke("crossover").output.splitlines()
    assert "columns float32: 1.10 1.10 0.90 0.90 1.10; never" in lines
    assert "maps float64: 1.10 1.10 1.10 1.10 1.10; never" in lines
    assert {len(shape) for shape in made} == {1, 2}


def test_full_covers_every_operation() -> None:
    measured = {f"{j.operation}/{j.variant}" for j in jobs.select(jobs.Settings(full=True))}
    assert measured == set(jobs.measures())


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("measure", jobs.measures())
def test_floor_restores_the_logits(measure: str, dtype: str) -> None:
    work = jobs.workload(job(*measure.split("/"), dtype=dtype))
    before = work.x.copy()
    with fastll.use_backend("numpy"):
        work.call()
    assert np.array_equal(work.x, before) == (not measure.endswith("/in-place"))
    work.floor()
    np.testing.assert_array_equal(work.x, before)


@pytest.mark.parametrize("logits", cases.LOGITS)
@pytest.mark.parametrize("name", ["numpy", "scipy", "torch", "jax"])
def test_peers_agree(name: str, logits: str) -> None:
    peer = peers.PEERS[name]
    if peer.version is None:
        pytest.skip(f"{name} is not installed")
    for measure in jobs.measures():
        operation, variant = measure.split("/")
        if variant == "in-place" or not cases.LOGITS[logits].suits(operation):
            continue
        this = job(operation, variant, logits=logits)
        work = jobs.workload(this)
        call = peer.bind(operation, variant == "gradient", work.x, this.case.axis, work.arguments)
        if call is not None:
            with fastll.use_backend("numpy"):
                assert peers.disagreement(work.call(), call()) < 1e-3, measure


GRID_RUN = ("grid", "--against", "numpy", "--backend", "numpy", "--dtype", "float32", "--output")


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five shapes of two sizes, the larger one with a floor; 5000 classes have only one of them."""
    monkeypatch.setattr(grid, "CLASSES", ((2, 5000), (31,)))
    monkeypatch.setattr(grid, "EXPONENTS", ((6, 16),))
    monkeypatch.setattr(grid, "FULL", grid.Effort(1e-5, 2, 0))


def test_grid(small_grid: None, tmp_path: Path) -> None:
    done = invoke(*GRID_RUN, tmp_path)
    assert done.exit_code == 0, done.output
    pictures = {f"grid-{name}.{kind}" for name in ("peers", "floor") for kind in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == {"grid.json", *pictures}
    assert "20 cells; 0 more were not reached." in done.stdout
    assert "Without torch.compile" in done.stdout

    file = tmp_path / "grid.json"
    found = {record["name"]: record for record in report.records(report.load(file))}
    large, small = (found[f"softmax-value-{n}x31-float32-randn-numpy"] for n in (2114, 2))
    assert large["nbytes"] == 2 * 4 * 2114 * 31
    assert large["times_the_floor"] == pytest.approx(large["seconds"] / large["floor"], rel=0.9)
    assert small["floor"] is None
    assert report.beside_the_fastest(small) == 1 / small["peers"]["numpy"]["faster"]
    assert small["peers"]["numpy"]["agrees"]
    # NumPy has no gradients
    assert (
        report.beside_the_fastest(found["sparse_cross_entropy-gradient-13x5000-float32-randn-numpy"])
        is None
    )

    # from the file alone
    before = {name: (tmp_path / name).read_bytes() for name in pictures if name.endswith("svg")}
    again = invoke("grid", "--draw", file, "--output", tmp_path / "again")
    assert again.stdout == done.stdout
    assert all((tmp_path / "again" / name).read_bytes() == drawn for name, drawn in before.items())
    assert invoke("compare", file, file).output.count("0 of 20 got slower") == 1
    assert "| softmax, float32 | 8-31 |" in invoke("table", file).output
    assert invoke("plot", file).exit_code == 0


def test_grid_says_that_the_machine_was_not_idle(run: tuple[Result, Path], tmp_path: Path) -> None:
    results = json.loads((run[1] / "results.json").read_text())
    results["benchmarks"] = []
    results["environment"] |= {"threads": 2, "grid": {"seconds": 10, "others": 15, "not_reached": 3}}
    file = tmp_path / "grid.json"
    file.write_text(json.dumps(results))
    said = " ".join(invoke("grid", "--draw", file).stdout.split())
    assert "not idle, other processes took 1.5 CPUs" in said
    assert "or with --threads 1" in said
    results["environment"]["grid"]["others"] = 0.1
    file.write_text(json.dumps(results))
    assert "idle" not in invoke("grid", "--draw", file).stdout


def test_cpu_time_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPUs of this process: not idle, not waiting for disks, and not its own."""
    lines = (
        "cpu 900 9 9 9 9 9 9 9 0 0\ncpu0 800 9 9 9 9 9 9 9 0 0\ncpu1 100 50 30 900 7 2 1 10 0 0\nintr 5"
    )
    monkeypatch.setattr(grid.Path, "read_text", lambda path, encoding: lines)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    monkeypatch.setattr(os, "times", lambda: os.times_result((1.0, 0.3, 0.2, 0.0, 99.0)))
    assert grid.seconds_of_others() == pytest.approx(1.93 - 1.5)


def test_grid_is_interrupted_and_resumed(
    small_grid: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured, names = grid.measured, []

    def some(job: jobs.Job, *others: Any) -> dict[str, Any]:
        names.append(job.name)
        if len(names) == 4:
            raise KeyboardInterrupt
        if len(names) == 2:
            raise ArithmeticError("wrong")
        return measured(job, *others)

    monkeypatch.setattr(grid, "measured", some)
    done = invoke(*GRID_RUN, tmp_path)
    assert done.exit_code == 130
    assert "2 cells; 17 more were not reached." in done.stdout
    assert "Left out in 1 cells: ArithmeticError: wrong" in done.stdout
    done = invoke(*GRID_RUN, tmp_path, "--resume")
    assert done.exit_code == 0
    assert "20 cells; 0 more" in done.stdout
    assert sorted(names[4:]) == sorted({job.name for job in _grid_jobs()} - {names[0], names[2]})

    done = invoke(*GRID_RUN, tmp_path, "--resume", "--against", "none")
    assert done.exit_code == 2
    assert "there are results with other peers" in done.stderr


def _grid_jobs() -> list[jobs.Job]:
    return grid.cells(grid.Plan(dtypes=("float32",), against=("numpy",), backend="numpy"))


def test_grid_within_limits(small_grid: None, tmp_path: Path) -> None:
    done = invoke(*GRID_RUN, tmp_path, "--memory", "1e-4", "--op", "logsumexp/value")
    assert done.exit_code == 0, done.output
    assert "2 cells; 0 more were not reached." in done.stdout  # of 2**6 elements
    assert "Left out in 3 cells: MemoryError: up to 0.0 GiB" in done.stdout
    assert not (tmp_path / "grid-floor.png").exists()
    assert "nothing was measured" in invoke(*GRID_RUN, tmp_path, "--minutes", "0").stderr
    assert "'few' is not a range" in invoke(*GRID_RUN, tmp_path, "--classes", "few").stderr


def test_grid_refuses_other_results(run: tuple[Result, Path]) -> None:
    done = invoke("grid", "--draw", run[1] / "results.json")
    assert done.exit_code == 2
    assert "has no grid" in done.stderr


@pytest.mark.parametrize("quick", [True, False])
def test_order_of_the_grid(quick: bool) -> None:
    """Each level refines the one before, and the first one has the whole range."""
    plan = grid.Plan(quick=quick)
    ordered = list(dict.fromkeys(job.case.shape for job in grid.cells(plan)))
    assert len(grid.cells(plan)) == 8 * len(ordered) == len({job.name for job in grid.cells(plan)})
    least, most, top = 2, 1 << 18, 22 if quick else 27
    sizes = {6, 12, 18, 22, top}
    first = [(c, e) for c in grid.CLASSES[0] for e in sizes if c <= 1 << e]
    assert sorted(first) == sorted((c, report.exponent((n, c))) for n, c in ordered[: len(first)])
    assert {(least, 6), (least, top), (most, 18), (most, top)} <= set(first)
    if not quick:
        wanted = {2**k + d for k in range(1, 19) for d in (-1, 0, 1)} - {1, most + 1}
        wanted |= {10, 100, 1000, 10000, 32000, 50257, 128256}
        assert {c for _, c in ordered} == wanted
        assert {report.exponent(shape) for shape in ordered} == set(range(6, 28))
    assert all(0 <= 2 ** report.exponent((n, c)) - n * c < c for n, c in ordered)


def grid_record(classes: int, exponent: int, faster: float | None) -> report.Record:
    torch = {"failed": "no room"} if faster is None else {"faster": faster}
    return {
        "operation": "softmax",
        "variant": "value",
        "dtype": "bfloat16",
        "shape": [2**exponent // classes, classes],
        "times_the_floor": 1.5 if exponent > 15 else None,
        "peers": {"jax": {"faster": 9.0}, "torch": torch},
    }


def test_lost_cells_are_outlined_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [grid_record(8, 6, 2), grid_record(8, 20, 0.5), grid_record(16, 6, 0.8)]
    records += [grid_record(1000, 20, None), grid_record(1000, 21, 1)]
    figure = plots._heat_map(records, plots.HEAT_MAPS["grid-peers"], "")
    panel = figure.axes[0]
    (outlines,) = panel.collections
    corners = {tuple(path.get_extents().min.round(2)) for path in outlines.get_paths()}
    assert corners == {(-0.42, 0.58), (0.58, -0.42)}  # 8 classes, 2**20; 16 classes, 2**6
    assert {text.get_text() for text in panel.texts} == {".50", "2.0", "1.2", ".11", "1.0"}
    assert figure._suptitle.get_text().startswith(
        "Time of fastll over that of the fastest of jax, torch"
    )

    monkeypatch.setattr(report, "records", lambda results: iter(results["benchmarks"]))
    (_, columns, rows), (_, _, floors) = grid_report.summaries({"benchmarks": records})
    assert columns == ["operation, dtype", "classes", "below 2^12", "from 2^17"]
    assert rows == [
        ["softmax, bfloat16", "8-31", "0.88 1.25 1/2", "2.00 2.00 1/1"],
        ["softmax, bfloat16", "1000-9999", "", "0.56 1.00 0/2"],
    ]
    assert floors[0] == ["softmax, bfloat16", "8-31", "1.50 1.50"]


def test_slow_peers_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first round if they are hopeless, else after three; fastll and the floor do not."""
    clock = [0.0]

    def takes(duration: float) -> Any:
        def call() -> None:
            clock[0] += duration

        return call

    def timed(call: Any, number: int = 1) -> float:
        start = clock[0]
        for _ in range(number):
            call()
        return clock[0] - start

    monkeypatch.setattr(grid, "timeit", timed)
    monkeypatch.setattr(grid, "seconds", timed)
    work = jobs.Workload(np.empty(0), (), takes(1), takes(20), 0)
    rivals = {"fast": takes(2), "slow": takes(5), "hopeless": takes(9.5)}
    times = grid.in_turn(rivals, work, grid.Effort(0.5, 5, 9))
    rounds = {name: len(found) for name, found in times.items()}
    assert rounds == {"fast": 5, "slow": 3, "hopeless": 1, "floor": 5, "fastll": 5}


@pytest.mark.filterwarnings("ignore")
def test_compiled_for_any_number_of_rows() -> None:
    """One compilation for the first shape, one for any number of rows."""
    torch = pytest.importorskip("torch")
    counters = torch._dynamo.utils.counters["stats"]
    compiled = []
    for rows in (3, 5, 8, 300):
        x = np.random.default_rng(rows).standard_normal((rows, 7), np.float32)
        call = peers.torch_of_rows("logsumexp", False, x, 1, ())
        assert peers.disagreement(fastll.logsumexp(x, axis=1), call()) < 1e-6  # some roundings of 6e-8
        compiled.append(counters["unique_graphs"])
    assert compiled[1] == compiled[3]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> card.Card:
    """A card that takes a millisecond for whatever it is asked."""
    require_numba_cuda()
    import device

    from fastll.backend.cuda import launch

    found = device.emulated()
    monkeypatch.setattr(launch, "gpu", lambda index: found)
    monkeypatch.setattr(card, "COPY", 1 << 10)
    monkeypatch.setattr(gpu, "SAMPLE", 1e-4)
    monkeypatch.setattr(gpu, "MORE_ROUNDS", 1)
    monkeypatch.setattr(gpu, "CALLS", 2)
    monkeypatch.setattr(card, "why_not", lambda: None)
    made = card.Card(device.Driver(found.memory), found)
    monkeypatch.setattr(gpu, "Card", lambda: made)
    return made


GPU_RUN = ("--device", "cuda", "--rounds", "2")


def test_gpu_run(emulated: card.Card, tmp_path: Path) -> None:
    done = invoke(
        *GPU_RUN,
        *("--shape", "1000x101,call", "--op", "logsumexp,sparse_cross_entropy/in-place"),
        *("--dtype", "float32", "--output", tmp_path),
    )
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["environment"]["gpu"]["name"] == "emulated"
    assert results["environment"]["gpu"]["copy_bandwidth"] > 0
    lse, in_place, call = (benchmark["extra_info"] for benchmark in results["benchmarks"])
    size = 4 * 1000 * 101
    assert (lse["nbytes"], in_place["nbytes"]) == (size, 2 * size)
    assert (lse["target"], in_place["target"], call["target"]) == (0.75, 0.75, None)
    assert call["floor"] is None
    assert call["synchronized"]["fastll"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "gpu.png", "gpu.svg"}
    assert "emulated (compute capability 9.0" in done.stdout
    assert "logsumexp, 1000x101, float32" in done.stdout
    assert "Not measured" not in done.stdout


@pytest.mark.parametrize(
    "measure", ["softmax/value", "sparse_cross_entropy/gradient", f"{BCE}/gradient"]
)
def test_gpu_results_are_checked(
    emulated: card.Card, monkeypatch: pytest.MonkeyPatch, measure: str
) -> None:
    """Against float64, in a few rows; one that is wrong is said to be."""
    shape, axis = ((37, 5), 0) if measure.startswith("softmax") else ((6, 21), 1)
    case = cases.Case("small", shape, axis, (measure,))
    this = jobs.Job(*measure.split("/"), case, "bfloat16", "randn", "cuda", (), 1)
    work = gpu.workload(emulated, this)
    assert len(work.sets) == 2
    assert work.nbytes == 2 * (3 if measure.startswith(BCE) else 2) * np.prod(shape)
    assert gpu.off_by(emulated, work) < gpu.ROW_TOLERANCE["bfloat16"]
    calls = [lambda: work.calls[1]()]  # another one's results
    assert gpu.off_by(emulated, work._replace(calls=calls)) == float("inf")


def test_gpu_without_room(emulated: card.Card) -> None:
    emulated.driver.free = 60_000_000
    case = cases.Case("large", (1 << 20, 8), 1, ())
    this = jobs.Job("softmax", "value", case, "float32", "randn", "cuda", (), 1)
    # 8.4 MB each: two of x, two of the result, one to spare, and the numbers
    assert gpu.fit(emulated, this, 4, 2) == ((1 << 18, 8), 2)
    emulated.driver.free = 0
    with pytest.raises(MemoryError, match="too little for one row"):
        gpu.fit(emulated, this, 4, 2)


def test_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "why_not", lambda: "the driver says no")
    done = invoke("--device", "cuda")
    assert done.exit_code == 2
    assert done.stderr == "Error: no GPU to measure: the driver says no\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "scipy"], "'scipy' is none of torch, torch.compile, liger"),
        (["--logits", "peaked"], "on a GPU the only backend is cuda and the only logits are randn"),
        (["--backend", "numba"], "on a GPU the only backend is cuda and the only logits are randn"),
    ],
)
def test_unknown_names_on_a_gpu(arguments: list[str], message: str) -> None:
    done = invoke("--device", "cuda", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


def test_gpu_targets() -> None:
    def targets(name: str, dtype: str = "float32") -> dict[str, float | None]:
        case = cases.CUDA_CASES[name]
        chosen = jobs.Settings(full=True, device="cuda", cases=(case,), dtypes=(dtype,))
        measures = [f"{job.operation}/{job.variant}" for job in jobs.select(chosen)]
        return {measure: cases.target(measure, case, dtype) for measure in measures}

    assert targets("8192x50257")["logsumexp/value"] == 0.9
    assert targets("8192x262144")["sparse_cross_entropy/value"] == 0.9
    assert targets("8192x128256")["sparse_cross_entropy/gradient"] == 0.85
    assert targets("8192x262144")["sparse_cross_entropy/gradient"] == 0.75
    assert targets("8192x262144", "bfloat16")["softmax/value"] == 0.85
    assert set(targets("short10").values()) == {0.75}
    assert targets("elements")[f"{BCE}/gradient"] == 0.9
    assert set(targets("call").values()) == {None}


def fake_gpu_results(path: Path) -> report.Results:
    """Of everything there is to measure, at half of the copy's speed and twice that of the peers."""
    benchmarks = []
    for job in jobs.select(jobs.Settings(full=True, device="cuda", against=tuple(peers.CUDA_PEERS))):
        large = job.case.group != "calls"
        info = {
            name: getattr(job, name) for name in ("operation", "variant", "dtype", "logits", "backend")
        }
        info |= {"case": job.case.name, "group": job.case.group, "axis": job.case.axis}
        info |= {"shape": job.case.shape, "wanted_shape": job.case.shape, "nbytes": 8}
        info |= {"floor": 1e-3 if large else None, "times_the_floor": 2.0 if large else None}
        info |= {"target": 0.9, "off_by": 1e-7, "agrees": True, "host": 1e-5, "sets": 2}
        info |= {"synchronized": {"fastll": 3e-5}} if not large else {}
        info["peers"] = {peer: {"faster": 2.0, "seconds": 4e-3, "agrees": True} for peer in job.against}
        benchmarks.append({"param": job.name, "stats": {"median": 2e-3}, "extra_info": info})
    described = {"name": "A card", "capability": [9, 0], "multiprocessors": 132, "l2": 50_000_000}
    described |= {"driver": "580", "copy_bandwidth": 3e12, "arrays": "torch"}
    environment = {"device": "cuda", "gpu": described, "rounds": 21, "versions": {"fastll": "0"}}
    environment["peers"] = {"torch": "2.11", "torch.compile": "2.11", "liger": None}
    results = {"benchmarks": benchmarks, "environment": environment, "unmeasured": {}}
    path.write_text(json.dumps(results))
    return results


def test_gpu_tables(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    results = fake_gpu_results(file)
    lines = invoke("table", file).output.splitlines()
    assert lines[0].startswith("| share of a copy's bandwidth / target | 8192 x 4096 | 8192 x 32000 |")
    assert any(line.startswith("| `logsumexp`, float32 | 50% / 90% |") for line in lines)
    assert any("| 8192 x 50257 | 2 ms | 2.00 | 2.00 | 2.00 |" in line for line in lines)
    assert "| `logsumexp`, float32 | 32 x 1000 | 2 ms | 30 us |" in lines
    assert "not measured" not in " ".join(lines)
    assert "Not installed: liger." in lines
    results["benchmarks"] = results["benchmarks"][1:]
    results["benchmarks"][0]["extra_info"] |= {"agrees": False, "shape": (4096, 4096)}
    said = gpu_report.markdown(results)
    assert "| not measured / 90% |" in said
    assert "50% ! / " in said
    assert "4096 x 4096 instead of 8192 x 4096, which does not fit into memory" in said
    assert invoke("plot", file).exit_code == 0
    assert invoke("compare", file, file).exit_code == 0


def test_gpu_targets_without_results(tmp_path: Path) -> None:
    lines = invoke("table", "--device", "cuda", tmp_path / "none.json").output.splitlines()
    assert lines[0] == "| on a GPU, share of a copy's bandwidth | operations | target | measured |"
    assert len(lines) > 10
    assert all(line.endswith("| not measured |") for line in lines[2:])


def test_gpu_results_merge(tmp_path: Path) -> None:
    results = fake_gpu_results(tmp_path / "whole.json")
    first, second = deepcopy(results), deepcopy(results)
    missing = first["benchmarks"].pop(0)["param"]
    first["unmeasured"] = {missing: "TimeoutError"}
    second["benchmarks"] = second["benchmarks"][:2]
    for name, part in (("a", first), ("b", second)):
        (tmp_path / name).write_text(json.dumps(part))
    whole = tmp_path / "merged.json"
    assert invoke("merge", whole, tmp_path / "a", tmp_path / "b").exit_code == 0
    merged = json.loads(whole.read_text())
    assert {b["param"] for b in merged["benchmarks"]} == {b["param"] for b in results["benchmarks"]}
    assert merged["unmeasured"] == {}


def test_families_of_kernels(emulated: card.Card, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def some() -> Any:
        calls = {call[0]: call for call in families.totals()}
        return iter([calls["weighted logsumexp"], calls["parts"]])

    monkeypatch.setitem(families.FAMILIES, "some", some)
    assert families.check(emulated, ["some"]) == 0
    assert "0 wrong" in capsys.readouterr().out
    monkeypatch.setattr(families, "off_by", lambda card, call, arrays: 3.0)
    assert families.check(emulated, ["some"]) == 2
    assert "weighted logsumexp: off by 3 times the tolerance" in capsys.readouterr().out


def tasks(quick: bool) -> Any:
    """A sum beside others that are slow, broken, wrong, or the same; and a task that fails."""
    x = np.arange(20000.0)
    rivals = {
        "slow": lambda: sum(x),
        "broken": lambda: [][0],
        "wrong": lambda: x.sum() + 1e6,
        "plain": x.sum,
    }
    targets = {
        "slow": ("faster", 3.0),
        "broken": ("faster", 0.0),
        "wrong": ("seconds", 1e-9),
        "plain": ("more", 1.0),
    }

    def fails() -> Any:
        raise AttributeError("no such [function]")

    made = adapters.Made(x.sum, rivals, 2)
    yield adapters.Task("scipy", "total", "value", x.shape, "float64", lambda: made, targets)
    yield adapters.Task("scipy", "nothing", "value", x.shape, "float64", fails)


def test_frameworks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adapters.FRAMEWORKS, "scipy", tasks)
    monkeypatch.setitem(adapters.FRAMEWORKS, "abacus", tasks)
    run = ("frameworks", "--output", tmp_path, "--only", "scipy,abacus", "--quick")
    done = invoke(*run)
    assert done.exit_code == 1, done.output  # a task failed
    assert "2/2" in done.stderr
    file = tmp_path / "frameworks.json"
    assert {path.name for path in tmp_path.iterdir()} == {
        f"frameworks.{kind}" for kind in ("json", "png", "svg")
    }
    results = json.loads(file.read_text())
    (record,) = report.records(results)
    assert record["peers"]["slow"]["rounds"] >= 3
    # a time is that of one of the two: of 20000 additions by NumPy
    assert 0 < record["seconds"] < record["peers"]["slow"]["seconds"] < 0.1
    judged = {row[1]: row[4:] for row in frameworks.rows(results)}
    assert judged["slow"][1:] == ("ratio 3.00", "yes")
    assert judged["broken"] == ("failed", "ratio 0.00", "no")
    assert judged["wrong"][0].endswith(" !")
    assert judged["wrong"][1:] == ("0.001 us", "no")
    assert judged["plain"][1:] == ("1 s more", "yes")
    for said in (
        "scipy: total, 20000, float64",
        "Targets met: 2 of 4.",
        "Missing: abacus: No module named 'fastll.interop.abacus'",
        "Not measured: scipy-nothing-value-20000-float64: AttributeError: no such [function]",
        "broken failed: scipy-total-value-20000-float64: IndexError: list index out of range",
        "wrong differs by 5e-03 of the largest value",
    ):
        assert said in done.stdout
    lines = invoke("table", file).output.splitlines()
    assert lines[0] == "| case | beside | fastll | beside it | ratio | target | met |"
    assert "Targets met: 2 of 4." in lines
    assert invoke("compare", file, file).exit_code == 0
    missed = results | {"benchmarks": [_missed(results)]}
    assert [row[-1] for row in frameworks.rows(missed)] == ["no"] * 4


def _missed(results: dict[str, Any]) -> dict[str, Any]:
    """The record with targets out of reach."""
    benchmark = deepcopy(results["benchmarks"][0])
    benchmark["extra_info"]["targets"] = {
        name: (kind, bound * 1e9 if kind == "faster" else -bound)
        for name, (kind, bound) in benchmark["extra_info"]["targets"].items()
    }
    return benchmark


def test_frameworks_without_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adapters.FRAMEWORKS, "abacus", tasks)
    done = invoke("frameworks", "--output", tmp_path, "--only", "abacus")
    assert done.exit_code == 2
    assert "nothing was measured" in done.stderr
    assert "abacus: No module named 'fastll.interop.abacus'" in done.stderr
