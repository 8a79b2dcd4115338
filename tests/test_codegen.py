"""The machine code: vectors, no gather, and no double arithmetic in the float32 loops."""

import platform
import re
from importlib import import_module

import numpy as np
import pytest
from conftest import require

import fastll

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 mnemonics")


PACKED = r"\bv?(?:fn?m(?:add|sub)\d*|mul|add|sub|max)ps\b"
SCALAR = r"\bv?(?:fn?m(?:add|sub)\d*|mul|add|sub|max)ss\b"
DOUBLE = r"\bv?(?:fn?m(?:add|sub)\d*|mul|add|sub|max)[ps]d\b"


def exponentials(assembly):
    """The basic blocks that hold the exponential, as (label, code): they move bits to its exponent."""
    parts = re.split(r"^(\.?L[\w.$]+):", assembly, flags=re.M)[1:]
    blocks = zip(parts[::2], parts[1::2], strict=True)
    return [(name, code) for name, code in blocks if re.search(r"\bv?pslld\s+\$23,", code)]


def is_loop(name, code):
    """Whether a basic block jumps to itself."""
    return re.search(rf"\bj\w+\s+{re.escape(name)}\b", code)


@x86
@pytest.mark.parametrize("operation", ["logsumexp", "softmax", "cross_entropy"])
@pytest.mark.parametrize("family", ["rows", "columns"])
def test_numba_float32_loops(family, operation):
    require("numba")
    from llvmlite.binding import get_host_cpu_name
    from numba import njit

    from fastll.backend.numba.memory import KERNEL

    if family == "columns" and get_host_cpu_name() == "znver1":
        pytest.skip("for this CPU, LLVM joins the end of rows, in float64 by design, with a loop")

    fastll.warmup(["logsumexp", "softmax", "sparse_cross_entropy"], [np.float32])
    kernel = import_module(f"fastll.backend.numba.{family}").kernel(operation)
    (signature,) = [s for s in kernel.signatures if any(str(t) == "float32" for t in s)]
    if kernel.stats.cache_hits:  # a test's process was the first: what is loaded has no assembly
        kernel = njit(**KERNEL)(kernel.py_func)
        kernel.compile(signature)
    assembly = kernel.inspect_asm(signature)
    assert not re.search(r"\bv?p?gather\w+\s", assembly)
    blocks = exponentials(assembly)
    scalar = [(name, code) for name, code in blocks if re.search(SCALAR, code)]
    assert not [name for name, code in scalar if is_loop(name, code)]
    blocks = [(name, code) for name, code in blocks if (name, code) not in scalar]
    assert blocks
    assert all(len(re.findall(PACKED, code)) >= 10 for _, code in blocks)
    # sums with weights are float64 by design, as are the scalars of rows, outside of the loops
    weighted = [name for name, code in blocks if is_loop(name, code) and re.search(DOUBLE, code)]
    assert len(weighted) <= (operation == "logsumexp")
