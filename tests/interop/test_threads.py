"""fastll called from the threads of other libraries, while their pools run and the process forks."""

import importlib
import os
import textwrap

import pytest
from conftest import require
from test_processes import run

#: What runs beside fastll's own calls: `partner` returns whether its results are right, and `PARTNERS`
#: threads call it at once.
PARTNER = {
    "numba": """
        import numba, fastll.interop.numba
        PARTNERS = 1 if os.environ["NUMBA_THREADING_LAYER"] == "workqueue" else 2  # it allows one

        @numba.njit(parallel=True)
        def of_rows(x):
            found = np.empty(len(x), x.dtype)
            for i in numba.prange(len(x)):
                found[i] = fastll.logsumexp(x[i])
            return found

        def partner():
            return np.array_equal(of_rows(x), lse)
    """,
    "torch": """
        import torch
        import fastll.interop.torch
        PARTNERS = 2
        torch.set_num_threads(2)
        square = torch.ones(300, 300)

        def partner():
            square @ square
            leaf = torch.from_numpy(x).requires_grad_()
            loss = fastll.interop.torch.cross_entropy(leaf, torch.from_numpy(labels))
            loss.backward()
            return loss.item() == value and np.array_equal(leaf.grad, grad)
    """,
    "jax": """
        import jax
        from fastll.interop import jax as fj
        PARTNERS = 2
        both = jax.jit(jax.value_and_grad(lambda x: fj.cross_entropy(x, labels)))
        first = both(x)

        def partner():
            found = both(x)
            return found[0] == first[0] and np.array_equal(found[1], first[1])
    """,
    "dask": """
        import dask, dask.array as da
        PARTNERS = 2
        chunks = da.from_array(x, chunks=(50, -1))

        def partner():
            with dask.config.set(scheduler="threads", num_workers=2):
                found = dask.compute(*fastll.cross_entropy(chunks, labels, return_grad=True))
            return found[0] == value and np.array_equal(found[1], grad)
    """,
}

SETTING = """
    import os, signal, threading, warnings
    import numpy as np, fastll
    warnings.simplefilter("ignore")  # of forks
    fastll.set_num_threads(3)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((250, 1000)).astype(np.float32)
    wide = rng.standard_normal((400, 2000)).astype(np.float32)
    labels = rng.integers(0, 1000, 250)

    def calls():
        return (fastll.logsumexp(x, axis=1), fastll.logsumexp(wide, axis=1),
                *fastll.cross_entropy(x, labels, return_grad=True))

    expected = lse, _, value, grad = calls()

    def right():
        return all(map(np.array_equal, calls(), expected))
"""

STRESS = """
    import sys; sys.setswitchinterval(1e-4)
    wrong, stop = [], threading.Event()

    def repeat(is_right):
        try:
            count = 0
            while count < 3 or not stop.is_set():
                count += 1
                if not is_right():
                    wrong.append(is_right.__name__)
        except BaseException as error:
            wrong.append(repr(error))

    checks = [right] * 3 + [p for p, count in partners for _ in range(count)]
    workers = [threading.Thread(target=repeat, args=(check,)) for check in checks]
    for worker in workers:
        worker.start()
    codes = []
    for _ in range(5):
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # a child that hangs dies of it
            os._exit(0 if right() and right() else 1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    stop.set()
    for worker in workers:
        worker.join()
    print(wrong, codes)
"""


def stress(partners, **environment):
    """Calls of fastll and of partners, each on several threads, and forks among them: what failed."""
    pieces = [SETTING, "partners = []"]
    for name in partners:
        pieces += [PARTNER[name], "partners.append((partner, PARTNERS))"]
    code = "\n".join(map(textwrap.dedent, [*pieces, STRESS]))
    return run(code, timeout=300, PYTHONFAULTHANDLER="1", **environment)


def has_layer(layer):
    module = {"omp": "omppool", "tbb": "tbbpool", "workqueue": "workqueue"}[layer]
    try:
        importlib.import_module(f"numba.np.ufunc.{module}")
    except ImportError:
        return False
    return True


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.mark.parametrize("layer", ["workqueue", "omp", "tbb"])
@pytest.mark.parametrize("backend", ["cython", "numba"])
def test_threading_layers_of_numba(layer, backend):
    require("cython")
    require("numba")
    if not has_layer(layer):
        pytest.skip(f"Numba's threading layer {layer} is not installed")
    found = stress(["numba"], backend=backend, NUMBA_THREADING_LAYER=layer)
    assert found == "[] [0, 0, 0, 0, 0]"


@pytest.mark.parametrize("partners", [["torch"], ["jax"], ["dask"], ["torch", "jax", "dask"]])
def test_pools_of_frameworks(partners):
    require("cython")
    for name in partners:
        pytest.importorskip(name, reason=f"{name} is not installed")
    assert stress(partners) == "[] [0, 0, 0, 0, 0]"
