"""What the kernels of folds are made for, and the names that their texts are bound to.

The phases of a fold are plain functions, and so is what they call, in `maths`, `warps`, `states`,
`rows`, `teams`, `threads` and `terms`. Their texts are bound to the names of one variant, as formulas
are to the operations of one target: all of them, the formulas and what `names` has share one namespace.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from fastll.backend.cuda import maths, primitives, states, warps
from fastll.backend.cuda.compiler import device
from fastll.backend.cuda.primitives import compute_type, lanes_of, reader, size_of, writer
from fastll.formulas import TERMS, bind, texts


class Variant(NamedTuple):
    """The operation, and how its operands are stored (None: not there)."""

    operation: str
    x: str
    second: str | None = None  # weights of elements, a dense target or a second distribution
    labels: str | None = None
    weight: str | None = None  # of classes
    out: str | None = None
    state: bool = False  # whether there is a running state
    signed: bool = False  # whether the sign of a log-sum-exp is asked for
    smoothed: bool = False
    capped: bool = False
    modern: bool = False  # compute capability 8 or more
    staged: bool = False  # for threads on their own: whether rows go through shared memory
    # for teams, which have vectors:
    vectors: int = 0  # of a thread
    cluster: int = 1  # thread blocks that share a row
    chunked: bool = False  # whether a thread block takes its part of a row in chunks
    aligned: bool = False  # whether every row begins and ends with a vector


def bound(names, *modules):
    """The texts of modules bound to names. Of two texts of one name, the later module's is taken; what
    else the modules have goes by the earlier ones."""
    found = {text.__name__: text for module in modules for text in texts(module)}
    known = {name: value for module in reversed(modules) for name, value in vars(module).items()}
    known = {name: value for name, value in (known | names).items() if name not in found}
    return bind(known, device, list(found.values()))


@cache
def shared(real, approximate=False, modern=False, targets=False, clustered=False):
    """What many variants share: formulas, and the texts of `maths`, `warps` and `states`."""
    zero = real(0)
    nothing = maths.Sum(zero, zero)
    names = {
        "targets": targets,
        "clustered": clustered,
        "nothing": nothing,
        "identity": states.State(real(-np.inf), nothing, zero, nothing, nothing),
        "read_peer": primitives.peer_reader(real),
    }
    return bound(vars(maths.of(real, approximate, modern)) | names, warps, states)


def names(v):
    """The names of a variant: its own, those of what it shares, and what follows from it."""
    x, out, value = v.x, v.out or v.x, compute_type(v.x).__name__
    terms, weighted = v.operation in TERMS, v.operation == "logsumexp" and v.second is not None
    entropy = v.operation == "cross_entropy"
    dense, sparse = entropy and v.second is not None, entropy and v.labels is not None
    # `targets`: a cross-entropy with a target that is more than a point
    targets, logs = dense or v.smoothed, v.operation == "log_softmax"
    # weights may cancel, and what is left of a sum must not be its rounding errors
    real = np.float64 if weighted else compute_type(x)
    f = shared(real, size_of(x) == 2 and not weighted, v.modern, targets, v.cluster > 1)
    # the slope of the cap needs the elements themselves once more
    held = v.vectors > 0 and v.out is not None and not v.capped and not v.chunked
    floating = x if v.vectors or v.staged else "float32"
    return (
        v._asdict()
        | vars(f)
        | {
            "real": real,  # the type that is computed in
            "paired": v.second is not None,  # whether there is a second full operand
            "weighted": weighted,  # a log-sum-exp of weighted elements
            "entropy": entropy,
            "dense": dense,
            "sparse": sparse,
            "logs": logs,
            # a log-sum-exp that is finished in float64: weighted, or of a running state
            "exact": v.operation == "logsumexp" and (weighted or v.state or v.signed),
            "whole_state": v.state and v.operation != "logsumexp",  # the state is that of the whole row
            "weighted_classes": v.weight is not None,
            "running": v.state,
            "written": v.out is not None,
            "index": np.uint32 if v.staged else np.int64,  # type of the number of a class
            # rereading shared memory is cheaper than rescaling sums for each new maximum
            "two_passes": v.staged and not (targets or v.capped or terms),
            "held": held,  # exponentials stay in registers until they are written
            # what is held is relative to the maximum of one thread block of a cluster
            "apart": v.cluster > 1 and held and not logs,
            "lanes": lanes_of(floating),  # elements of a vector
            "size": size_of(x),  # bytes of an element
            "count": v.vectors * lanes_of(floating),  # elements that a thread of a team holds
            # readers take an address, writers an address and a number
            "read_x": reader(x, real),
            "read_second": reader(v.second or x, real),
            "read_weight": reader(v.weight or value, real),
            "read_number": reader(value, real),
            "read_label": primitives.integer_reader(v.labels or "int64"),
            "read_state": reader("float64", real),
            "read_double": reader("float64"),
            "write_out": writer(out, real),
            "write_value": writer(value, real),
            "write_double": writer(value, np.float64),  # the same of a double
            "write_state": writer("float64"),
            "joined": shared(np.float64).joined,
            "fetch_x": primitives.vector_reader(floating, lowest=v.vectors > 0),
            "fetch_second": primitives.vector_reader(floating),
            "deliver": primitives.vector_writer(floating, v.modern),
            "term": _term(f, v) if terms else None,  # (values, second, i): that of an element held
        }
    )


def _term(f, v):
    formula = getattr(f, TERMS[v.operation].formula.__name__)
    if v.second is None:
        return device(lambda values, second, i: formula(values[i]))
    return device(lambda values, second, i: formula(values[i], second[i]))
