"""Run each family of GPU kernels once, against the reference: for compute-sanitizer and profilers.

python -m bench.families                    # every family, small arrays
python -m bench.families rows columns       # some of them
python -m bench.families --profile          # a few large calls between profiler start and stop
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import Any

import ml_dtypes
import numpy as np

import fastll
from bench.card import Card, why_not
from bench.cases import ELEMENTWISE, ROWWISE
from fastll.operations import OPERATIONS

Call = Callable[..., Any]
#: Numbers of classes: from rows of one thread to rows of eight thread blocks, aligned and ragged.
CLASSES = (
    1,
    10,
    100,
    128,
    300,
    1000,
    1001,
    4096,
    5003,
    12345,
    30000,
    50257,
    100003,
    128256,
    140001,
    300001,
)
ROWS = 5
#: Shapes of three axes, of which the middle one is the class axis.
COLUMNS = ((1, 300, 33), (2, 17, 100), (3, 2000, 7))
#: Largest relative error in norm, by the size of an element in bytes.
TOLERANCE = {2: 5e-3, 4: 1e-5, 8: 1e-12}

Calls = Iterator[tuple[str, Call, tuple[np.ndarray[Any, Any], ...]]]


#: The row-wise operations of the quick benchmark, which stand for the others.
USUAL = tuple(name for name in ROWWISE if OPERATIONS[name].measured != "full")


def calls(
    rng: np.random.Generator,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    options: Mapping[str, Any],
    axis: int = 1,
    **more: Any,
) -> Calls:
    """A call of an operation with some options; of a loss, with its gradient."""
    operation = OPERATIONS[name]
    first, *others = operation.make(rng, shape, axis, dtype)
    if operation.arguments[0].domain == "logits":
        first = (3 * first).astype(dtype)
    keywords = operation.keywords(rng, shape, axis, dtype, options) | more
    if operation.gradient:
        keywords |= dict.fromkeys(operation.extras, True) | {"return_grad": True}
    arrays = {key: value for key, value in keywords.items() if isinstance(value, np.ndarray)}

    def call(*given: Any) -> Any:
        moved = dict(zip(arrays, given[1 + len(others) :], strict=True))
        return operation.function(*given[: 1 + len(others)], **keywords | moved)

    what = " ".join((name, *options, "x".join(map(str, shape)), dtype))
    yield what, call, (first, *others, *arrays.values())


def rows() -> Calls:
    """Rows that are contiguous in memory."""
    rng = np.random.default_rng(0)
    for classes in CLASSES:
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            if dtype in ("float16", "float64") and classes not in (10, 1001, 50257):
                continue
            for name in USUAL:
                yield from calls(rng, name, (ROWS, classes), dtype, {})
                if OPERATIONS[name].gradient:
                    function = OPERATIONS[name].function
                    arrays = OPERATIONS[name].make(rng, (ROWS, classes), 1, dtype)
                    yield f"value of {name} {classes} {dtype}", function, arrays


def options() -> Calls:
    """Every row-wise operation with each of its options."""
    rng = np.random.default_rng(1)
    for classes in (10, 1001, 70001):
        for name in ROWWISE:
            for chosen in OPERATIONS[name].options:
                yield from calls(rng, name, (ROWS, classes), "float32", chosen)


def columns() -> Calls:
    """Class axes other than the last."""
    rng = np.random.default_rng(2)
    for shape in COLUMNS:
        for dtype in ("float32", "bfloat16"):
            for name in USUAL:
                yield from calls(rng, name, shape, dtype, {})


def elements() -> Calls:
    """Element-wise operations, of whole vectors and with a remainder."""
    rng = np.random.default_rng(3)
    for size in (1, 1000, 70_000, 70_001):
        for dtype in ("float32", "bfloat16"):
            for name in ELEMENTWISE:
                for chosen in OPERATIONS[name].options:
                    yield from calls(rng, name, (size,), dtype, chosen, axis=0)
                if OPERATIONS[name].gradient:
                    yield from calls(rng, name, (size,), dtype, {}, axis=0, reduction="none")


def totals() -> Calls:
    """Sums over many rows, weighted log-sum-exp, and log-sum-exp in parts."""
    rng = np.random.default_rng(4)
    x, y = numbers(rng, (70_000, 10), "float32"), rng.integers(0, 10, 70_000)
    y[::3] = -100
    yield "many rows", with_gradient(fastll.cross_entropy), (x, y)
    b = rng.random((40, 300)).astype(np.float32)
    a = numbers(rng, b.shape, "float32")
    yield "weighted logsumexp", lambda a, b: fastll.logsumexp(a, axis=1, b=b), (a, b)

    def parts(a: Any, b: Any) -> Any:
        first, second = fastll.LogSumExp(40, np.float32), fastll.LogSumExp(40, np.float32)
        return first.update(a).merge(second.update(b)).value

    yield "parts", parts, (a, b)


FAMILIES = {f.__name__: f for f in (rows, options, columns, elements, totals)}


def with_gradient(function: Call, **chosen: Any) -> Call:
    return lambda x, t: function(x, t, return_grad=True, **chosen)


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    return (3 * rng.standard_normal(shape)).astype(dtype)


def moved(card: Card, x: np.ndarray[Any, Any]) -> Any:
    """Copy an array to the GPU, as an array of the card's library."""
    name = "bfloat16" if x.dtype == ml_dtypes.bfloat16 else str(x.dtype)
    view = card.empty(x.shape, card.dtype(name))
    card.upload(view, x)
    return view.owner


def off_by(card: Card, call: Call, arrays: tuple[np.ndarray[Any, Any], ...]) -> float:
    """Largest error against the reference, as a multiple of the tolerance."""
    found = call(*(moved(card, a) for a in arrays))
    with fastll.use_backend("numpy"):
        expected = call(*arrays)
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True)
    worst = 0.0
    for result, wanted in pairs:
        wanted = np.asarray(wanted)
        actual = card.fetch(card.view(result)).astype(np.float64).reshape(wanted.shape)
        size = np.linalg.norm(wanted.astype(np.float64))
        off = np.linalg.norm(actual - wanted.astype(np.float64)) / (size or 1)
        worst = max(worst, off / TOLERANCE[wanted.dtype.itemsize]) if np.isfinite(off) else np.inf
    return float(worst)


def check(card: Card, names: list[str]) -> int:
    """Run families and print what is wrong; return the number of calls that were."""
    wrong = 0
    for name in names:
        start, done = perf_counter(), 0
        for what, call, arrays in FAMILIES[name]():
            done += 1
            try:
                off = off_by(card, call, arrays)
                said = "" if off <= 1 else f"off by {off:.3g} times the tolerance"
            except Exception as error:  # the next call may work
                said = f"{type(error).__name__}: {error}"
            if said:
                wrong += 1
                print(f"  {name}, {what}: {said}", flush=True)
        print(f"{name}: {done} calls in {perf_counter() - start:.1f} s", flush=True)
    print(f"{wrong} wrong", flush=True)
    return wrong


def profile(card: Card) -> None:
    """Make a few large calls between the start and stop of a profiler."""
    rng = np.random.default_rng(5)
    dtype = np.dtype(np.float32)
    block = card.empty((1 << 20,), dtype)
    card.upload(block, numbers(rng, (1 << 20,), "float32"))

    def filled(*shape: int) -> Any:
        view = card.empty(shape, dtype)
        card.repeat(view, block)
        return view.owner

    x, grad = filled(4096, 32000), filled(4096, 32000)
    ragged = filled(2048, 50257)
    y = moved(card, rng.integers(0, 32000, 4096))
    some = moved(card, rng.integers(0, 50257, 2048))

    def calls() -> None:
        fastll.logsumexp(x, axis=1)
        fastll.cross_entropy(x, y, return_grad=True, grad_out=grad)
        fastll.cross_entropy(ragged, some, return_grad=True, grad_out=ragged)
        fastll.binary_cross_entropy_with_logits(x, grad, return_grad=True, grad_out=grad)

    calls()
    card.synchronize()
    card.driver.cuProfilerStart()
    calls()
    card.synchronize()
    card.driver.cuProfilerStop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.families")
    parser.add_argument("families", nargs="*", help=f"some of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--arrays", choices=("torch", "cupy", "numba"), help="array library")
    chosen = parser.parse_args()
    unknown = set(chosen.families) - set(FAMILIES)
    if unknown:
        parser.error(f"{', '.join(unknown)}: not in {', '.join(FAMILIES)}")
    reason = why_not()
    if reason is not None:
        print(f"no GPU: {reason}", file=sys.stderr)
        return 2
    library = fastll.array_libraries.load(chosen.arrays) if chosen.arrays else None
    card = Card(library=library)
    if chosen.profile:
        profile(card)
        return 0
    return min(1, check(card, chosen.families or list(FAMILIES)))


if __name__ == "__main__":
    sys.exit(main())
