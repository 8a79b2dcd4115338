"""Reductions of rows: every kernel of them has the same phases, whatever the threads of a row are.

Threads find their place; load and fold their part of a row; merge what they have found; finish the row;
and write what has its shape. Rows of contiguous classes have a team of threads each (`teams`), others
and short ones a few threads or one (`threads`).
"""

# mypy: ignore-errors

from __future__ import annotations

from fastll.backend.cuda import calls, rows, teams, terms, threads, variants
from fastll.backend.cuda.compiler import Kernel, cuda, kernels
from fastll.backend.cuda.variants import bound
from fastll.formulas import TERMS


@kernels
def kernel(variant):
    """The kernel of a `variants.Variant`."""
    alone, is_sum = not variant.vectors, variant.operation in TERMS
    names = variants.names(variant)
    f = bound(names, rows, threads if alone else teams, *([terms] if is_sum else []))
    locate, find_label, merge, write = f.locate, f.find_label, f.merge, f.write
    fold = f.fold_alone if alone and is_sum else f.fold
    finish = f.finish_exactly if names["exact"] else f.finish
    real, held = names["real"], names["count"] or threads.TOGETHER

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

    return Kernel(reduce, calls.Fold, real, cluster=variant.cluster)
