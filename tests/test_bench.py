"""The benchmark: it runs, names what it cannot run, compares, and is honest about its peers."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import fastll
from bench import cases, jobs, peers
from bench.__main__ import main
from fastll.operations import OPERATIONS

SHAPE = (60, 2000)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "200"})


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
        (["--shape", "2048xmany"], "'2048xmany' is no shape"),
        (["--shape", "20x0"], "'20x0' is no shape"),
        (["--shape", "20x10", "--axis", "2"], "2 is no axis of 20x10"),
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
    assert "'much' is no percentage" in invoke("compare", "a", "b", "--fail-over", "much").stderr


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
        if variant == "in-place" or operation not in cases.LOGITS[logits][1]:
            continue
        this = job(operation, variant, logits=logits)
        work = jobs.workload(this)
        call = peer.bind(operation, variant == "gradient", work.x, this.case.axis, work.arguments)
        if call is not None:
            with fastll.use_backend("numpy"):
                assert peers.disagreement(work.call(), call()) < 1e-3, measure
