"""Numba's code is made beside the work: no call waits for it, and it is used when it is there."""

import os
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import require
from test_processes import run

import fastll
from fastll import dispatch, takeover

X = np.random.default_rng(0).standard_normal((257, 1024), np.float32)  # no small call


class Fake(ModuleType):
    """As much of `fastll.backend.numba` as is asked for: kernels are Cython's."""

    def __init__(self):
        super().__init__("fake_numba")
        self.backend, self.makes, self.calls = self, [], 0
        self.allowed = threading.Event()  # to make code
        self.error = None

    def fold(self, call, missing):
        need = "rows", call.operation, str(call.x.dtype)
        if need not in self.makes:
            missing.append(need)
        else:
            self.calls += 1
        return dispatch._first(dispatch.TABLE["cpu"]).fold(call)

    def stored(self, need):
        return True

    def make(self, need):
        assert threading.current_thread() is not threading.main_thread()
        assert self.allowed.wait(10)
        if self.error is not None:
            raise self.error
        self.makes.append(need)


def prefer(monkeypatch, families=("rows",)):
    """Numba from the first element on."""
    require("cython")
    monkeypatch.setattr(dispatch, "NUMBA_FROM", {(family, "float32"): 1 for family in families})
    monkeypatch.setattr(dispatch, "_LOOK_FROM", 1)
    monkeypatch.setattr(dispatch, "NUMBA_PAYS_AFTER", 1)
    monkeypatch.setattr(dispatch, "_handled", {})
    monkeypatch.setattr(takeover, "_requested", set())
    monkeypatch.setattr(takeover, "_given_up", None)


@pytest.fixture
def fake(monkeypatch):
    prefer(monkeypatch)
    module = Fake()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(takeover, "_MODULE", module.__name__)
    yield module
    module.allowed.set()
    finish()


def finish():
    """Wait until no request is left."""
    worker = takeover._worker
    if worker is not None:
        worker.join(60)
        assert not worker.is_alive()


def test_cython_serves_until_the_kernel_is_there(fake):
    expected = fastll.softmax(X)
    np.testing.assert_array_equal(fastll.softmax(X), expected)
    assert (fake.makes, fake.calls) == ([], 0)
    fake.allowed.set()
    finish()
    np.testing.assert_array_equal(fastll.softmax(X), expected)
    assert (fake.makes, fake.calls) == ([("rows", "softmax", "float32")], 1)
    fastll.softmax(X.astype(np.float64))  # not in the table
    assert (len(fake.makes), fake.calls) == (1, 1)


def test_the_module_is_imported_beside_the_work(fake, monkeypatch):
    imported = []

    def import_fake(name):
        imported.append((name, threading.current_thread() is threading.main_thread()))
        sys.modules[name] = fake
        return fake

    fake.allowed.set()
    del sys.modules[fake.__name__]
    monkeypatch.setattr(takeover, "import_module", import_fake)
    for calls in (0, 0, 1):
        fastll.softmax(X)
        assert fake.calls == calls
        finish()
    assert set(imported) == {(fake.__name__, False)}


def test_calls_at_once_make_a_kernel_once(fake):
    together = threading.Barrier(8)

    def work():
        together.wait()
        for _ in range(10):
            fastll.softmax(X)

    workers = [threading.Thread(target=work) for _ in range(8)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    fake.allowed.set()
    finish()
    assert fake.makes == [("rows", "softmax", "float32")]


def test_small_and_first_calls_ask_for_nothing(fake, monkeypatch):
    cython = dispatch._first(dispatch.TABLE["cpu"])
    monkeypatch.setattr(dispatch, "_LOOK_FROM", X.size + 1)
    assert dispatch.choose("softmax", X.size, fastll.arrays.HOST) is cython
    fastll.softmax(X)
    monkeypatch.setattr(dispatch, "_LOOK_FROM", 1)
    monkeypatch.setattr(dispatch, "NUMBA_FROM", {("rows", "float32"): X.size + 1})
    fastll.softmax(X)
    assert not dispatch._handled
    monkeypatch.setattr(dispatch, "NUMBA_FROM", {("rows", "float32"): X.size})
    monkeypatch.setattr(dispatch, "NUMBA_PAYS_AFTER", 3 * X.size)
    for asked in (0, 0, 1):
        fastll.softmax(X)
        assert len(takeover._requested) == asked


def test_a_failure_is_the_last(fake):
    fake.error = RuntimeError("no code today")
    fake.allowed.set()
    expected = fastll.softmax(X)
    finish()
    for _ in range(3):
        np.testing.assert_array_equal(fastll.softmax(X), expected)
        fastll.log_softmax(X)
    assert (fake.makes, fake.calls, takeover._worker) == ([], 0, None)
    status = fastll.backends()["numba"]
    assert "rows softmax float32: no code today" in (status.reason or "")


def test_what_was_there_before_a_failure_is_used(fake):
    fake.allowed.set()
    fastll.softmax(X)
    finish()
    fake.error = RuntimeError("no code today")
    fastll.log_softmax(X)
    finish()
    fastll.softmax(X)
    assert fake.calls == 1
    assert takeover.why_not() == "rows log_softmax float32: no code today"


def test_no_thread_can_be_started(fake, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    fastll.softmax(X)
    fastll.softmax(X)
    assert takeover.why_not() == "can't start new thread"


@pytest.mark.parametrize("interpreter", ["", "/usr/sbin/server"])
def test_no_interpreter(fake, monkeypatch, interpreter):
    """Where Python is embedded, the program must not be started once more."""
    monkeypatch.setattr(fake, "stored", lambda need: False)
    monkeypatch.setattr(sys, "executable", interpreter)
    fastll.softmax(X)
    finish()
    assert "there is no interpreter for another process" in takeover.why_not()


def test_after_warmup_the_first_call_uses_numba(monkeypatch):
    require("numba")
    prefer(monkeypatch, ["maps"])
    fastll.warmup("mse", ["float32"])
    numba, used = takeover.loaded(), []

    def spy(call, missing):
        kernel = type(numba).map(numba, call, missing)
        used.append(list(missing))
        return kernel

    monkeypatch.setattr(numba, "map", spy)
    fastll.mse(X, X)
    assert used == [[]]
    assert not takeover._requested


def test_the_process_says_what_went_wrong():
    require("numba")
    with pytest.raises(RuntimeError, match=r"^KeyError: 'no operation'$"):
        takeover._compile([("maps", "no operation", "float32")])


PREFER = """
import os, sys, threading, time, numpy as np, fastll
from fastll import dispatch, takeover
kinds = [("maps", "float16"), ("maps", "float32"), ("rows", "float32")]
dispatch.NUMBA_FROM = dict.fromkeys(kinds, 1)
dispatch._LOOK_FROM = dispatch.NUMBA_PAYS_AFTER = 1
x = np.random.default_rng(0).standard_normal((1 << 18) + 1).astype({dtype!r})  # no small call
def finish():
    while takeover._worker is not None: time.sleep(0.01)
"""


def run_preferring(code, dtype="float32", beside="", **environment):
    """What code prints in a process that prefers Numba."""
    return run(PREFER.format(dtype=dtype) + beside + textwrap.dedent(code), **environment)


def test_real_kernels_take_over(tmp_path):
    """Compiled by another process, conversions too, and loaded here: to the same bits."""
    require("numba")
    require("cython")
    code = """
    results = [fastll.sigmoid(x).tobytes()]
    finish()  # the import
    results.append(fastll.sigmoid(x).tobytes())
    finish()
    results.append(fastll.sigmoid(x).tobytes())
    from fastll.backend import numba
    (kernel, _) = numba.maps.kernel("sigmoid")
    reader = numba.convert.reader(2, False, "float32")
    print(len(set(results)), takeover.why_not(), len(takeover._requested))
    print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()), end=" ")
    print(reader.cache_hits)
    """
    printed = run_preferring(code, "float16", NUMBA_CACHE_DIR=str(tmp_path))
    # requested: the module, the kernel, a reader and a writer
    assert printed.split("\n") == ["1 None 4", "1 0 1"]


@pytest.mark.parametrize("environment", [{"FASTLL_CACHE": "0"}, {"NUMBA_CACHE_DIR": os.devnull}])
def test_nowhere_to_keep_code(environment):
    require("numba")
    require("cython")
    code = """
    for _ in range(3):
        fastll.mse(x, x)
        finish()
    print(fastll.backends()["numba"].reason)
    """
    printed = run_preferring(code, **environment)
    assert printed.startswith("nothing more is compiled beside the work after maps mse float32: ")
    assert "no compiled kernels are kept" in printed or "NotADirectoryError" in printed


def test_numba_is_missing():
    require("cython")
    code = """
    sys.modules["numba"] = None
    for _ in range(3):
        fastll.mse(x, x)
        finish()
    print(fastll.backends()["numba"].available, takeover.why_not())
    """
    printed = run_preferring(code)
    assert printed.startswith("False import: ")


def test_interpreted_numba_is_not_available():
    printed = run(
        """
        import fastll
        print(fastll.logsumexp([0.0]), fastll.backends()["numba"])
        """,
        NUMBA_DISABLE_JIT="1",
    )
    assert printed.startswith("0.0 Status(available=False, reason='NUMBA_DISABLE_JIT is set")


SLOW = """
class Slow(type(os)):
    def stored(self, need):
        return made_elsewhere
    def make(self, need):
        print("making", flush=True)
        time.sleep(0.5)
        print("made", flush=True)
    def map(self, call, missing):
        missing.append(("maps", call.operation, "float32"))
sys.modules["slow"] = slow = Slow("slow")
slow.backend, takeover._MODULE, made_elsewhere = slow, "slow", True
takeover._compile = lambda needs: (print("compiling", flush=True), time.sleep(60))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("loading", [True, False])
def test_fork_beside_the_work(loading):
    """A fork waits for loading, and not for compilation; the child can begin anew."""
    require("cython")
    code = f"""
    import warnings; warnings.simplefilter("ignore")
    made_elsewhere = {loading}
    fastll.mse(x, x)
    time.sleep(0.1)
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        assert takeover._worker is None and not takeover._queue
        made_elsewhere = True
        fastll.mse(x, x)
        assert takeover._worker is not None
        finish()
        os._exit(0)
    print(time.perf_counter() - start < 5, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    printed = run_preferring(code, beside=SLOW).split("\n")
    expected = ["making", "made"] if loading else ["compiling"]
    assert [line for line in printed if line[:4] != "True"] == [*expected, "making", "made"]
    assert "True 0" in printed


@pytest.mark.parametrize("loading", [True, False])
def test_the_end_beside_the_work(loading):
    """The process ends as soon as the thread is not inside Numba."""
    require("cython")
    code = f"""
    made_elsewhere = {loading}
    fastll.mse(x, x)
    time.sleep(0.1)
    """
    start = time.perf_counter()
    printed = run_preferring(code, beside=SLOW).split("\n")
    assert time.perf_counter() - start < 30
    assert printed == (["making", "made"] if loading else ["compiling"])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc on this system")
def test_the_process_that_compiles_does_not_outlive_this_one(tmp_path):
    require("numba")
    require("cython")
    code = """
    from pathlib import Path
    import fastll.backend.numba
    fastll.logsumexp(x)
    children = ""
    while not children:
        children = "".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))
    time.sleep(0.5)
    print(children)
    """
    code = PREFER.format(dtype="float32") + textwrap.dedent(code)
    child = Path("/proc", run(code, NUMBA_CACHE_DIR=str(tmp_path)), "stat")
    end = time.monotonic() + 60
    # gone, or a zombie where nobody looks after orphans
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.05)
    entries = [path for path in tmp_path.rglob("*") if len(path.name) == 64]
    assert not entries  # it has not compiled to the end, which takes seconds
