"""Where Numba overtakes Cython, and when its compilation has paid for itself.

Prints what `NUMBA_FROM` and `NUMBA_PAYS_AFTER` in `fastll.dispatch` are set by.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np

import fastll
from bench.floors import median_time
from fastll.operations import OPERATIONS

COMPILE = """
import time, numpy as np, fastll
from fastll.operations import OPERATIONS
x = np.ones((2, 64), np.float32)
a = OPERATIONS["{name}"].arguments(np.random.default_rng(0), x, 1)
start = time.perf_counter()
with fastll.use_backend("numba"):
    OPERATIONS["{name}"].function(x, *a)
print(time.perf_counter() - start)
"""


def main() -> None:
    rng = np.random.default_rng(0)
    for name, operation in OPERATIONS.items():
        code = COMPILE.format(name=name)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        compilation = float(done.stdout)
        print(f"{name}: compiles in {compilation:.1f} s")
        for exponent in range(10, 27, 2):
            rows = max(1, 2**exponent // 1024)
            x = rng.standard_normal((rows, 2**exponent // rows), np.float32)
            arguments = operation.arguments(rng, x, 1)
            times = {}
            for backend in ("cython", "numba"):
                with fastll.use_backend(backend):
                    times[backend] = median_time(lambda: operation.function(x, *arguments), 15)  # noqa: B023
            gain = (times["cython"] - times["numba"]) / x.size
            pays = f"2**{np.log2(compilation / gain):.0f}" if gain > 0 else "never"
            cython, numba = (1e6 * times[b] for b in ("cython", "numba"))
            print(f"  2**{exponent}: cython {cython:9.1f} us, numba {numba:9.1f} us; pays after {pays}")


if __name__ == "__main__":
    main()
