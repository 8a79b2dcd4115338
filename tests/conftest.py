"""What every test shares: the backends, and a seeded generator."""

import os
import re
import tempfile
import zlib

import numpy as np
import oracle
import pytest
from table import LAYOUTS

import fastll
from fastll.dispatch import TABLE

collect_ignore = ["conformance/as_scipy.py"]  # a plugin of other tests

BACKENDS = (*TABLE["cpu"], "cuda")

#: Of so many tests one runs on the emulator of a GPU; all do with FASTLL_EMULATE=all, or on a GPU.
EMULATED = 80

#: An own cache, empty at first: the processes that tests start find what this one has compiled. On a
#: GPU thousands of kernels are, which FASTLL_TEST_CACHE keeps.
_kernels = tempfile.TemporaryDirectory(prefix="fastll-")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share that of the process that started them
    os.environ["NUMBA_CACHE_DIR"] = os.environ.get("FASTLL_TEST_CACHE") or _kernels.name


def require(name):
    """Skip without the backend, or fail where everything is meant to be there."""
    status = fastll.backends()[name]
    if not status.available:
        if os.environ.get("FASTLL_REQUIRE_EXT") == "1":
            pytest.fail(f"backend {name} is not available: {status.reason}")
        pytest.skip(f"backend {name}: {status.reason}")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Each backend in turn, in force during the test."""
    oracle.SUBTRACTED = int(request.param == "numpy")
    yield from in_force(request.param, monkeypatch)
    oracle.SUBTRACTED = 0


@pytest.fixture(params=[name for name in TABLE["cpu"] if name != "numpy"])
def compiled(request, monkeypatch):
    """Each compiled backend of the CPU in turn, in force during the test."""
    yield from in_force(request.param, monkeypatch)


def in_force(name, monkeypatch):
    """A backend during a test; of a GPU, by functions that take arrays there and back."""
    if name == "cuda":
        require_numba_cuda()
        import device

        device.instead_of_host(monkeypatch)
    else:
        require(name)
    with fastll.use_backend(name), fastll.debug_labels():  # on a GPU labels are not checked otherwise
        yield name


def pytest_collection_modifyitems(config, items):
    """On the emulator one test in `EMULATED`, by its name, of those that run on every backend.

    All layouts of a test are run, or none: most share kernels, and to compile these takes the time.
    """
    if os.environ.get("FASTLL_EMULATE") == "all" or not why_no_gpu():
        return
    skipped = [
        item
        for item in items
        if getattr(item, "callspec", None) is not None
        and item.callspec.params.get("backend") == "cuda"
        and (_without_layout(item.nodeid) % EMULATED or "test_gradients" in item.nodeid)
    ]
    config.hook.pytest_deselected(items=skipped)
    left = set(items) - set(skipped)
    items[:] = [item for item in items if item in left]


def _without_layout(name):
    """A number that the layouts of one test have in common."""
    return zlib.crc32(re.sub("|".join(LAYOUTS), "", name).encode())


def why_no_gpu():
    """Why tests run on the emulator; None if there is a GPU."""
    if os.environ.get("FASTLL_TEST_DEVICE") == "emulator":
        return "it was asked for"
    return fastll.backends()["cuda"].reason


def require_numba_cuda():
    """Skip without the compiler of CUDA kernels, or fail where everything is meant to be there."""
    try:
        import numba_cuda  # noqa: F401
    except ImportError:
        if os.environ.get("FASTLL_REQUIRE_EXT") == "1":
            pytest.fail("numba-cuda is not installed")
        pytest.skip("numba-cuda is not installed")


@pytest.fixture
def rng():
    return np.random.default_rng(20261120)


@pytest.fixture
def threads():
    """Set the number of threads and the size of a call worth sharing; put back after the test."""
    from fastll import threads

    before = threads.SHARE_FROM

    def set_threads(n, share_from=before):
        fastll.set_num_threads(n)
        threads.SHARE_FROM = share_from

    yield set_threads
    fastll.set_num_threads(None)
    threads.SHARE_FROM = before
