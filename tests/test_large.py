"""Beyond 2**31 elements, by views that take no memory; and how much memory a call takes."""

import sys
from functools import partial

import numpy as np
import pytest
from table import inputs
from test_processes import run

import fastll
from fastll.backend.host import STREAM_FROM
from fastll.operations import OPERATIONS

ROWS, CLASSES = 66_000, 33_000  # 2.18e9 elements


def test_index_arithmetic_is_64_bit(compiled):
    """All rows are one row; the labels and results are those of each."""
    assert ROWS * CLASSES > 2**31
    row = np.zeros(CLASSES, np.float32)
    row[-1] = 5
    x = np.broadcast_to(row, (ROWS, CLASSES))
    expected = np.log(CLASSES - 1 + np.exp(5.0))
    lse = fastll.logsumexp(x, axis=1)
    np.testing.assert_allclose(lse, expected, rtol=1e-6)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_offsets_beyond_2_to_the_31(compiled, layout):
    """The ends of a view whose strides reach 9 GB further are the right elements."""
    try:
        memory = np.zeros((3 * 2**30 + 64,), np.uint8)  # pages that are never touched
    except MemoryError:
        pytest.skip("no address space")
    far = memory[: 3 * 2**30].view(np.float32).reshape(3, -1)
    far[0, :40] = 1
    far[1, :40] = 2
    far[2, :40] = 3
    x = far[:, :40] if layout == "rows" else far[:, :40].T
    axis = 1 if layout == "rows" else 0
    np.testing.assert_allclose(
        fastll.logsumexp(x, axis=axis), np.array([1, 2, 3]) + np.log(40), rtol=1e-6
    )


@pytest.mark.parametrize("classes", [10, 1000])
def test_a_large_output_that_is_not_aligned(compiled, rng, classes):
    """It cannot be written past the caches."""
    x = rng.standard_normal((STREAM_FROM // 4 // classes + 1, classes), np.float32)
    out = np.empty(x.nbytes + 2, np.uint8)[2:].view(np.float32).reshape(x.shape)
    assert not out.flags.aligned
    fastll.softmax(x, out=out)
    np.testing.assert_array_equal(out, fastll.softmax(x))


def call_of(name, rng, shape, out):
    """A call of an operation with all of its options, that writes to `out` where it can."""
    operation = OPERATIONS[name]
    arrays, options = inputs(name, out.dtype, shape, 1, operation.options[-1], rng)
    if operation.writes:
        options["grad_out" if operation.gradient else "out"] = out
    return partial(operation.function, *arrays, **options)


def test_extra_memory_is_of_the_order_of_rows(compiled):
    tracemalloc = pytest.importorskip("tracemalloc")
    shape = (200, 50_000)
    out, rng = np.empty(shape, np.float16), np.random.default_rng(0)
    made = [call_of(name, rng, shape, out) for name in OPERATIONS]
    x = made[0].args[0]

    def calls():
        for call in made:
            call()
        fastll.logsumexp(x.T, axis=0)
        fastll.logsumexp(x, axis=(0, 1))

    calls()  # compile first
    tracemalloc.start()
    calls()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # on each of two threads, in float32, exponentials of two rows of two arrays: 1.6 MB of 20
    assert peak < x.nbytes / 10


REDUCTIONS = """
import resource
import numpy as np
import fastll

def reductions(x):
    labels, likelihood = np.zeros(len(x), int), fastll.NegativeLogLikelihood()
    for start in range(0, len(x), 5000):
        rows = slice(start, start + 5000)
        likelihood.update(x[rows], labels[rows])
    losses = fastll.cross_entropy(x, labels, reduction="none")
    return fastll.logsumexp(x, axis=1), losses, fastll.entropy(x), likelihood.mean

reductions(np.zeros((8, 4096), np.float32))  # compile first
"""

LIMITED = """
x = np.memmap(path, np.float32, "r").reshape(-1, 4096)
used = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
limit = int(used.split()[1]) * 1024 + x.nbytes // 8
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
lse, losses, entropy, mean = reductions(x)
for value in (lse, losses, mean):
    np.testing.assert_allclose(value, np.log(4096), rtol=1e-6)
assert not entropy.any()
try:
    x.copy()
except MemoryError:
    print("limited")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's: of anonymous memory alone")
def test_files_larger_than_memory(compiled, tmp_path):
    """A file of logits is read where it is mapped: the limit leaves an eighth of its size free."""
    path = tmp_path / "logits"
    with open(path, "wb") as file:
        file.truncate(256 << 20)  # zeros that take no place on the disk
    exec(REDUCTIONS, {})  # what is compiled here is found there
    code = f"{REDUCTIONS}path = {str(path)!r}{LIMITED}"
    assert run(code, backend=compiled, FASTLL_NUM_THREADS="1") == "limited"
