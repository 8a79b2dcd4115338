"""Threads, forks, imports, read-only homes: what happens around a call, each in a fresh process."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import require

import fastll
from fastll import threads as pool


def run(code, *, backend=None, timeout=120, **environment):
    """Run code in a fresh interpreter; what it prints."""
    environment = {**os.environ, **environment}
    if backend is not None:
        environment["FASTLL_BACKEND"] = backend
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    heavy = run(
        """
        import sys, fastll
        names = ("numba", "llvmlite", "torch", "jax", "scipy", "click", "rich", "ml_dtypes")
        print([name for name in names if name in sys.modules])
        """
    )
    assert heavy == "[]"


def test_import_time(tmp_path):
    """At most 30 ms more than NumPy's own import: the median of several processes, in CPU time."""
    code = """
    import time, numpy
    start = time.process_time(); import fastll; print(time.process_time() - start)
    """
    # with bytecode on disk, as installers leave it: the first process compiles
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    times = sorted(float(run(code, **bytecode)) for _ in range(6))
    assert times[2] < 0.030


def test_small_calls_compile_nothing():
    require("cython")
    loaded = run(
        """
        import sys, numpy as np, fastll
        from fastll.operations import OPERATIONS
        rng = np.random.default_rng(0)
        for o in OPERATIONS.values():
            options = o.keywords(rng, (4, 10), 1, "f4", {})
            options |= {"return_grad": True} if o.gradient else {}
            o.function(*o.make(rng, (4, 10), 1, "f4"), **options)
        print("numba" in sys.modules)
        """
    )
    assert loaded == "False"


@pytest.mark.parametrize("missing", ["numba", "fastll.backend.cython", "both"])
def test_missing_packages(missing):
    names = ["numba", "fastll.backend.cython"] if missing == "both" else [missing]
    printed = run(
        f"""
        import sys
        for name in {names}: sys.modules[name] = None
        import numpy as np, fastll
        x = np.ones((600, 500))
        print(fastll.logsumexp(x) > 0, sorted(n for n, s in fastll.backends().items() if s.available))
        for name in {names}:
            try:
                with fastll.use_backend(name.rpartition(".")[2]): fastll.logsumexp(x)
            except RuntimeError as error: print(error)
        """
    )
    assert printed.startswith("True")
    assert "numpy" in printed
    assert printed.count("was asked for but is not available") == len(names)


def test_environment_chooses_strictly():
    assert run("import fastll; print(fastll.logsumexp([0.0]))", backend="numpy") == "0.0"
    code = """
    import fastll
    for call in (lambda: fastll.logsumexp([0.0]), lambda: fastll.softmax([1.0])):
        try: call()
        except (ValueError, NotImplementedError) as error: print(type(error).__name__, error)
    """
    assert run(code, backend="fast").count("ValueError backend is 'fast'; expected one of") == 2
    assert run(code, backend="cuda").count("NotImplementedError backend 'cuda'") == 2


def test_environment_sets_threads():
    assert run("import fastll; print(fastll.get_num_threads())", FASTLL_NUM_THREADS="3") == "3"
    code = """
    import fastll
    try: fastll.get_num_threads()
    except ValueError as error: print(error)
    """
    assert (
        run(code, FASTLL_NUM_THREADS="many")
        == "FASTLL_NUM_THREADS is 'many'; expected a positive integer"
    )


def test_threads_follow_affinity():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no CPU affinity on this system")
    code = """
    import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import fastll; print(fastll.get_num_threads())
    """
    environment = {"FASTLL_NUM_THREADS": ""}
    assert run(code, **environment) == "1"


PARALLEL = """
import os, threading, numpy as np, fastll
fastll.set_num_threads(4)
x = np.random.default_rng(0).standard_normal((512, 2048)).astype(np.float32)
expected = fastll.logsumexp(x.astype(np.float64), axis=1)
def right():
    return bool(np.allclose(fastll.logsumexp(x, axis=1), expected, rtol=1e-6))
"""


@pytest.mark.parametrize("backend", ["numba", "cython"])
def test_many_python_threads_at_once(backend):
    require(backend)
    code = """
    results = []
    def work():
        for _ in range(20):
            results.append(right())
    workers = [threading.Thread(target=work) for _ in range(8)]
    [w.start() for w in workers]; [w.join() for w in workers]
    print(len(results), all(results))
    """
    assert run(PARALLEL + textwrap.dedent(code), backend=backend) == "160 True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("backend", ["numba", "cython"])
def test_forked_child_after_parallel_use(backend):
    require(backend)
    code = """
    import warnings; warnings.simplefilter("ignore")
    assert right()
    for _ in range(3):
        child = os.fork()
        if child == 0:
            os._exit(0 if right() and right() else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end=" ")
    print(right())
    """
    assert run(PARALLEL + textwrap.dedent(code), backend=backend) == "0 0 0 True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_while_another_thread_calls():
    """The child's pool works even if the parent's lock was held at the fork."""
    code = """
    import warnings; warnings.simplefilter("ignore")
    stop = threading.Event()
    def work():
        while not stop.is_set(): right()
    worker = threading.Thread(target=work); worker.start()
    codes = []
    for _ in range(5):
        child = os.fork()
        if child == 0:
            os._exit(0 if right() else 1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    stop.set(); worker.join(); print(codes)
    """
    assert run(PARALLEL + textwrap.dedent(code), backend="numpy") == "[0, 0, 0, 0, 0]"


def test_read_only_everything(tmp_path):
    """No home, no cache directory, nothing that can be written."""
    require("numba")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    printed = run(
        "import numpy as np, fastll; print(fastll.logsumexp(np.zeros((1000, 1000)), axis=1)[0] > 6.9)",
        backend="numba",
        HOME=str(locked),
        XDG_CACHE_HOME=str(locked),
        NUMBA_CACHE_DIR=str(locked / "none"),
    )
    assert printed == "True"


def test_calls_at_exit():
    """The interpreter no longer starts threads then; the call runs on its own."""
    code = """
    import atexit
    atexit.register(lambda: print(right()))
    """
    assert run(PARALLEL + textwrap.dedent(code), backend="numpy") == "True"


def test_backend_choice_is_of_one_thread(rng):
    seen = {}

    def other():
        from fastll import dispatch

        seen["forced"] = dispatch._forced.get()

    with fastll.use_backend("numpy"), ThreadPoolExecutor(1) as executor:
        executor.submit(other).result()
    assert seen["forced"] is None


def test_backend_choice_is_of_one_task():
    import asyncio

    from fastll import dispatch

    async def task(name, first):
        if not first:
            await asyncio.sleep(0)
        with fastll.use_backend(name):
            await asyncio.sleep(0.01)
            return dispatch._forced.get()

    async def main():
        return await asyncio.gather(task("numpy", True), task("numpy", False), plain())

    async def plain():
        await asyncio.sleep(0.005)
        return dispatch._forced.get()

    assert asyncio.run(main()) == ["numpy", "numpy", None]


def test_an_error_in_a_part_reaches_the_caller(threads):
    threads(3, share_from=1)
    done = []

    def kernel(start, stop):
        done.append((start, stop))
        raise MemoryError("no memory")

    with pytest.raises(MemoryError, match="no memory"):
        pool.run(kernel, 1000, 1000)
    assert len(done) <= 3


def test_an_error_in_a_part_waits_for_the_others(threads):
    threads(3, share_from=1)
    caller, at_work = threading.current_thread(), []

    def kernel(start, stop):
        if threading.current_thread() is caller:
            time.sleep(0.05)  # until the others have begun
            return
        at_work.append(start)
        time.sleep(0.1 * len(at_work))
        at_work.remove(start)
        raise MemoryError("no memory")

    with pytest.raises(MemoryError, match="no memory"):
        pool.run(kernel, 3, 1000)
    assert not at_work


def test_the_number_of_threads_is_read_once(threads, monkeypatch):
    """Another thread may set it at any moment of a call."""
    read, hits = pool.get_num_threads, np.zeros(100, int)

    def read_before_it_is_set():
        count = read()
        monkeypatch.setattr(pool, "get_num_threads", read)
        fastll.set_num_threads(1)
        return count

    def kernel(start, stop):
        hits[start:stop] += 1

    threads(4, share_from=1)
    monkeypatch.setattr(pool, "get_num_threads", read_before_it_is_set)
    pool.run(kernel, 100, 10**6)
    assert (hits == 1).all()


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_threads_that_do_not_start(threads, monkeypatch, limit, error):
    """The others and the caller do the work, all of it before the call returns."""
    start, started, hits = threading.Thread.start, [], np.zeros(100, int)

    def start_some(thread):
        if len(started) == limit:
            raise error("can't start new thread")
        started.append(thread)
        start(thread)

    def kernel(start, stop):
        if threading.current_thread() in started:  # still at work when the caller has none left
            time.sleep(0.05)
        hits[start:stop] += 1

    threads(4, share_from=1)
    monkeypatch.setattr(threading.Thread, "start", start_some)
    pool.run(kernel, 100, 10**6)
    assert (hits == 1).all()
    assert len(started) == limit


def test_parts_cover_all_rows_once(threads):
    for n in (1, 2, 5):
        threads(n, share_from=1)
        for units in (1, 2, 3, 100):
            hits = np.zeros(units, int)

            def kernel(start, stop, hits=hits):
                hits[start:stop] += 1

            pool.run(kernel, units, 10**6)
            assert (hits == 1).all()
