"""Reductions of rows: every kernel of them has the same phases, whatever the threads of a row are.

Threads find their place; load and fold their part of a row; merge what they have found; finish the row;
and write what has its shape. Rows of contiguous classes have a team of threads each (`teams`), others
and short ones a few threads or one (`threads`).

The phases are plain functions, and so is what they call, in `maths`, `states`, `rows`, `teams`,
`threads` and `terms`. Their texts are bound to the names of one variant: all of them, the formulas and
what `names` has share one namespace.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastll.backend.cuda import (
    calls,
    geometry,
    pairs,
    primitives,
    rows,
    short,
    states,
    teams,
    terms,
    threads,
)
from fastll.backend.cuda.compiler import Kernel, bound, cuda, kernels
from fastll.backend.cuda.primitives import compute_type, lanes_of, reader, size_of, writer
from fastll.backend.cuda.states import shared
from fastll.formulas import TERMS


class Variant(NamedTuple):
    """The operation, and how its operands are stored (None: not there)."""

    operation: str
    x: str
    second: str | None = None  # weights of elements, a dense target or a second distribution
    labels: str | None = None
    weight: str | None = None  # of classes
    sample: str | None = None  # weights
    out: str | None = None
    state: bool = False  # whether there is a running state
    signed: bool = False  # whether the sign of a log-sum-exp is asked for
    selected: bool = False  # whether log-probabilities are, of several labels of each row
    smoothed: bool = False
    capped: bool = False
    tempered: bool = False  # whether elements are multiplied by the inverse temperature
    averaged: bool = False  # whether the mean of lse**2 is over another weight than the rest
    modern: bool = False  # compute capability 8 or more
    newest: bool = False  # 9 or more
    classes: int = 0  # of short rows that lie one after the other, which go through shared memory
    team: bool = False  # whether a row has a team of threads; for these:
    cluster: int = 1  # thread blocks that share a row
    chunked: bool = False  # whether a thread block takes its part of a row in chunks
    in_parts: bool = False  # whether any number of thread blocks leave states, of a part of a row each
    aligned: bool = False  # whether every row begins and ends with a vector


def names(v):
    """The names of a variant: its own, those of what it shares, and these, which follow from it."""
    stored, out = v.x, v.out or v.x
    terms, formula = v.operation in TERMS, None
    paired, running, written = v.second is not None, v.state, v.out is not None
    weighted_classes, sampled = v.weight is not None, v.sample is not None
    weighted = v.operation == "logsumexp" and paired  # a log-sum-exp of weighted elements
    # one that is finished in float64: weighted, or of a running state
    exact = v.operation == "logsumexp" and (weighted or running or v.signed) and not v.in_parts
    whole_state = running and v.operation != "logsumexp"  # the state is that of the whole row
    logs, cross_entropies = v.operation == "log_softmax", v.operation == "cross_entropy"
    entropic = v.operation == "entropy_from_logits"
    divergence = v.operation == "kl_divergence_from_logits"
    nll = v.operation == "nll_loss"  # as a cross-entropy of the maximum 0 and log s = 0
    losses = cross_entropies or nll
    dense, sparse = losses and paired, losses and v.labels is not None
    targets = dense or v.smoothed  # a loss with a target that is more than a point
    label_alone = nll and not targets  # nothing is read but the element at the label
    dropping = sparse or sampled  # whether there may be rows that do not count
    wide = weighted and compute_type(stored) is np.float32
    value = compute_type(v.second if wide else stored).__name__
    # weights may cancel, and what is left of a sum must not be its rounding errors
    real = np.float64 if weighted else compute_type(stored)
    approximate = primitives.is_half(stored) and not weighted
    # exponentials take the place of a row's elements until they are written, where that is cheaper
    # than to compute them again, and nothing but exponentials is written: the slope of the cap and the
    # entropy are of the elements
    held = v.team and written and not (approximate or v.chunked or v.capped or logs)
    held = held and not (divergence or entropic or nll)
    # whether exponentials are multiplied with more than 1 / s
    factored = cross_entropies or entropic or divergence
    # what is held is relative to the maximum of one thread block of a cluster
    apart = v.cluster > 1 and held
    # of short rows: whether the maximum comes first, and the exponentials stay until they are written
    two_passes = v.classes > 0 and not (targets or v.capped or terms or divergence or nll)
    held_here = two_passes and written and not (approximate or logs or entropic)
    held = held or held_here
    clustered, inputs, parts = v.cluster > 1, 2 if paired else 1, states.PARTS
    parts = pairs.PARTS if divergence else parts if targets or entropic else parts // 2
    in_bulk, real_size = v.newest and not v.chunked, np.dtype(real).itemsize
    vector = stored if v.team else "float32"
    size, lanes = size_of(stored), lanes_of(vector)  # bytes of an element, elements of a vector
    packable = v.team and approximate and v.modern  # whether a maximum is that of words of two halves
    # readers take an address, writers an address and a number
    read_x, read_second = reader(stored, real), reader(v.second or stored, real)
    read_weight, read_sample = reader(v.weight or value, real), reader(v.sample or value, real)
    read_number = reader(value, real)
    read_label = primitives.integer_reader(v.labels or "int64")
    read_state, write_state = reader("float64", real), writer("float64")
    read_double, write_double = reader("float64"), writer(value, np.float64)
    write_out, write_value = writer(out, real, v.modern), writer(value, real)
    fetch_x = fetch_second = primitives.vector_reader(vector)
    if v.team:
        fetch_x = fetch_second = primitives.shared_vector_reader(vector)
        read_shared, put_shared = primitives.shared_reader(stored), None
        if not approximate:
            put_shared = primitives.shared_vector_writer(stored)
        copy_vector = primitives.vector_copier(v.modern)
        copy_x = primitives.element_copier(stored, lowest=True)
        copy_second = primitives.element_copier(stored, lowest=divergence)
        write_peer = primitives.peer_writer(real)
    if v.classes:
        row_bytes = v.classes * size_of(stored)
        width, pitch = geometry.piece_of(row_bytes)
        piece, in_bulk = width // size_of(stored), v.newest and pitch == row_bytes
        pieces, flush = row_bytes // width, short.ADDED // piece
        read_shared = primitives.shared_reader(stored)
        write_shared = primitives.shared_writer(stored, v.modern)
        fetch_piece = primitives.shared_vector_reader(stored, width)
        put_piece = primitives.shared_vector_writer(stored, width, v.modern)
        copy_vector, copy_x = primitives.vector_copier(v.modern), primitives.element_copier(stored)
        deliver_from = primitives.vector_taker()
        write_from = primitives.element_taker(stored)
    if packable:
        larger_words, lowest = primitives.larger_words(stored), primitives.lowest_word(stored)
        lower_half, upper_half = (primitives.half_of_word(stored, u) for u in (False, True))
    deliver = primitives.vector_writer(vector, v.modern)
    joined = shared(np.float64).joined
    f = vars(shared(real, approximate, v.modern, targets, entropic))
    if divergence:
        identity = pairs.Pair(f["identity"], f["identity"])
    if terms:
        formula = f[TERMS[v.operation].formula.__name__]
    return v._asdict() | f | locals()


@kernels
def kernel(variant):
    """The kernel of a `Variant`."""
    known, alone = names(variant), not variant.team
    is_sum = variant.operation in TERMS or known["nll"]
    own = [terms] if is_sum else [pairs] if known["divergence"] else []
    ways = [teams] if variant.team else [threads, short] if variant.classes else [threads]
    f = bound(known, rows, *ways, *own)
    locate, find_label, merge, write = f.locate, f.find_label, f.merge, f.write
    fold = f.fold_in_turn if alone and not known["two_passes"] else f.fold
    if known["label_alone"]:
        fold = f.fold_nothing
    elif alone and own:
        fold = f.fold_alone
    finish = f.finish_exactly if known["exact"] else f.finish_part if variant.in_parts else f.finish
    real, held = known["real"], threads.TOGETHER if alone else known["lanes"]

    def reduce(call):
        memory = cuda.shared.array(0, real)
        values = cuda.local.array(held, real)
        second = cuda.local.array(held, real)  # targets, weights, or elements of a second input
        place = locate(call, memory)
        label = find_label(call, place, memory)
        state, reference = fold(call, place, values, second, memory)
        state = merge(call, place, state, memory)
        row = finish(call, place, label, state, memory)
        write(call, place, label, row, reference, values, second, memory)

    return Kernel(
        reduce,
        calls.Fold,
        real,
        cluster=variant.cluster,
        approximate=known["approximate"],
        roomy=variant.team,
    )
