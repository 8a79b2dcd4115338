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
    several: bool = False  # whether a thread block has several teams
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
    exact = v.operation == "logsumexp" and (weighted or running or v.signed)
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
    # whether exponentials are multiplied with more than 1 / s
    factored = cross_entropies or entropic or divergence
    # of short rows: whether the maximum comes first
    two_passes = v.classes > 0 and not (targets or v.capped or terms or divergence or nll)
    # whether exponentials take the place of a row's elements until they are written: where that is
    # cheaper than to compute them again, and nothing but exponentials is written (the slope of the cap
    # and the entropy are of the elements)
    plain = v.capped or logs or entropic or divergence or nll
    held = written and not (plain or approximate or v.chunked) and (v.team or two_passes)
    clustered = v.cluster > 1
    apart = clustered and held  # what is held is relative to the maximum of one thread block
    size, real_size = size_of(stored), np.dtype(real).itemsize  # bytes of an element, and of a number
    # readers take an address, writers an address and a number
    read_x, read_second = reader(stored, real), reader(v.second or stored, real)
    read_weight, read_sample = reader(v.weight or value, real), reader(v.sample or value, real)
    read_number = reader(value, real)
    read_label = primitives.integer_reader(v.labels or "int64")
    read_state, write_state = reader("float64", real), writer("float64")
    read_double, write_double = reader("float64"), writer(value, np.float64)
    write_out, write_value = writer(out, real, v.modern), writer(value, real)
    joined = shared(np.float64).joined
    f = vars(shared(real, approximate, v.modern, targets, entropic, v.several))
    if divergence:
        identity = pairs.Pair(f["identity"], f["identity"])
    if terms:
        formula = f[TERMS[v.operation].formula.__name__]
    known = v._asdict() | f | locals()
    return known | (_of_teams(v, known) if v.team else _of_short_rows(v) if v.classes else {})


def _of_teams(v, known):
    """Further names of variants for teams."""
    stored, real, modern = v.x, known["real"], v.modern
    lanes, inputs = lanes_of(stored), 2 if v.second is not None else 1  # of a vector; of a row
    parts = states.PARTS if known["targets"] or known["entropic"] else states.PARTS // 2
    parts = pairs.PARTS if known["divergence"] else parts  # numbers of a state
    in_bulk = v.newest and not v.chunked  # whether a whole row is copied at once
    # whether exponentials of halves are written, of one array
    on_line = known["written"] and known["approximate"] and not (known["divergence"] or known["nll"])
    on_line = on_line and not known["logs"]
    copy_vector = primitives.vector_copier(modern)
    copy_x = primitives.element_copier(stored, lowest=True)
    copy_second = primitives.element_copier(stored, lowest=known["divergence"])
    read_shared = primitives.shared_reader(stored)
    fetch_x = fetch_second = primitives.shared_vector_reader(stored)
    put_shared = primitives.shared_vector_writer(stored)
    write_peer = primitives.peer_writer(real)
    deliver = primitives.vector_writer(stored, modern)
    packable = primitives.is_half(stored) and modern  # whether a maximum is that of words of two halves
    if packable:
        larger_words, lowest = primitives.larger_words(stored), primitives.lowest_word(stored)
        lower_half, upper_half = (primitives.half_of_word(stored, upper) for upper in (False, True))
    return locals()


def _of_short_rows(v):
    """Further names of variants for short rows that lie one after the other."""
    stored, modern, row_bytes = v.x, v.modern, v.classes * size_of(v.x)
    width, pitch = geometry.piece_of(row_bytes)
    piece, pieces = width // size_of(stored), row_bytes // width  # elements of a piece; pieces of a row
    flush = max(1, short.ADDED // piece)
    in_bulk = v.newest and pitch == row_bytes  # whether all rows are copied at once
    copy_vector, copy_x = primitives.vector_copier(modern), primitives.element_copier(stored)
    read_shared = primitives.shared_reader(stored)
    write_shared = primitives.shared_writer(stored, modern)
    fetch_piece = primitives.shared_vector_reader(stored, width)
    put_piece = primitives.shared_vector_writer(stored, width, modern)
    deliver_from, write_from = primitives.vector_taker(), primitives.element_taker(stored)
    return locals()


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
