"""Reductions of rows: every kernel of them has the same phases, whatever the threads of a row are.

Threads find their place; load and fold their part of a row; merge what they have found; finish the row;
and write what has its shape. Rows of contiguous classes have a team of threads each (`teams`), others
and short ones a few threads or one (`threads`).
"""

# mypy: ignore-errors

from __future__ import annotations

from fastll.backend.cuda import calls, rows, teams, threads
from fastll.backend.cuda.compiler import Kernel, cuda, kernels


@kernels
def kernel(variant):
    """The kernel of a `rows.Variant`."""
    real = rows.kind(variant).real
    phases = (teams if variant.vectors else threads).phases(variant)
    locate, find_label, fold, merge = phases.locate, phases.find_label, phases.fold, phases.merge
    finish, write, held = phases.finish, phases.write, phases.held

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
