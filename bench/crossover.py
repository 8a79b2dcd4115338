"""From which size Numba beats Cython, and when its compilation pays for itself.

`NUMBA_FROM` and `NUMBA_PAYS_AFTER` in `fastll.dispatch` are set from these measurements.
"""

from __future__ import annotations

import subprocess
import sys
import timeit
from collections.abc import Iterator
from functools import partial
from math import log2
from statistics import median

import numpy as np

import fastll
from fastll.operations import OPERATIONS

COMPILE = """
import time, numpy as np, fastll
from fastll.operations import OPERATIONS
operation = OPERATIONS["{name}"]
arrays = operation.make(np.random.default_rng(0), (2, 64), 1, "f4")
start = time.perf_counter()
with fastll.use_backend("numba"):
    operation.function(*arrays)
print(time.perf_counter() - start)
"""


def crossover() -> Iterator[str]:
    """Measure, and yield one line per measurement."""
    rng = np.random.default_rng(0)
    for name, operation in OPERATIONS.items():
        code = COMPILE.format(name=name)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        compilation = float(done.stdout)
        yield f"{name}: compiles in {compilation:.1f} s"
        for exponent in range(10, 27, 2):
            rows = max(1, 2**exponent // 1024)
            arrays = operation.make(rng, (rows, 2**exponent // rows), 1, np.float32)
            call = partial(operation.function, *arrays)
            times = {}
            for backend in ("cython", "numba"):
                with fastll.use_backend(backend):
                    call()
                    times[backend] = median(timeit.repeat(call, repeat=15, number=1))
            gain = (times["cython"] - times["numba"]) / 2**exponent
            pays = f"2**{log2(compilation / gain):.0f}" if gain > 0 else "never"
            cython, numba = (1e6 * times[b] for b in ("cython", "numba"))
            yield f"  2**{exponent}: cython {cython:9.1f} us, numba {numba:9.1f} us; pays after {pays}"
