"""Reductions of rows: every kernel of them has the same phases, whatever the threads of a row are.

Threads find their place; load and fold their part of a row; merge what they have found; finish the row;
and write what has its shape. Rows of contiguous classes have a team of threads each (`teams`), others
and short ones a few threads or one (`threads`).
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import cache

from fastll.backend.cuda import calls, rows, teams, terms, threads, variants, warps
from fastll.backend.cuda.compiler import Kernel, cuda, device, kernels
from fastll.formulas import TERMS, bind, texts


def bound(names, *modules):
    """The texts of modules bound to names. Of two texts of one name, the later module's is taken; what
    else the modules have goes by the earlier ones."""
    found = {text.__name__: text for module in modules for text in texts(module)}
    known = {name: value for module in reversed(modules) for name, value in vars(module).items()}
    known = {name: value for name, value in known.items() if name not in found}
    return bind(known | names, device, list(found.values()))


@cache
def doubles():
    """The texts of `rows` and `warps` for sums and running states in float64."""
    return bound(variants.names(variants.Variant("logsumexp", "float64")), warps, rows)


@kernels
def kernel(variant):
    """The kernel of a `variants.Variant`."""
    alone, is_sum = not variant.vectors, variant.operation in TERMS
    names = variants.names(variant)
    modules = [warps, rows, threads if alone else teams, *([terms] if is_sum else [])]
    f = bound(names | {"joined": doubles().joined} if alone else names, *modules)
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
