"""What the folds of logits take beside the operations whose reads and writes they share.

python -m bench.logits              # every operation, float32 and bfloat16
python -m bench.logits --rounds 50 --threads 1

A line has the median over the rounds of the ratio of two times, taken one after the other. Entropy and
selected log-probabilities are measured by `logsumexp`, with a gradient by `cross_entropy` of labels and
its gradient. The divergence reads two arrays: it is measured by one `logsumexp` more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import ml_dtypes
import numpy as np

import fastll

#: Rows of a language model, of a classifier of many classes, and rows that stay in the cache.
SHAPES = ((2048, 50257), (65536, 1000), (2048, 1000))
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
#: The most that they may take.
TARGET = 1.15

Call = Callable[[], Any]


def pairs(shape: tuple[int, int], dtype: np.dtype[Any]) -> dict[str, tuple[Call, ...]]:
    """Operations: a call, and the calls that it is measured by."""
    rng = np.random.default_rng(0)
    x, t = (3 * rng.standard_normal(shape, np.float32)).astype(dtype), rng.random(shape, np.float32)
    t = t.astype(dtype)
    y, grad = rng.integers(0, shape[1], shape[0]), np.empty_like(x)
    lse = partial(fastll.logsumexp, x, axis=1)
    out = {"return_grad": True, "grad_out": grad}
    loss = partial(fastll.cross_entropy, x, y, **out)
    selected = partial(fastll.selective_log_softmax, x, y)
    entropy, divergence = fastll.entropy_from_logits, fastll.kl_divergence_from_logits
    return {
        "selected": (selected, lse),
        "selected, temperature": (partial(selected, temperature=0.7), lse),
        "selected, entropy": (partial(selected, return_entropy=True), lse),
        "entropy": (partial(entropy, x), lse),
        "divergence": (partial(divergence, x, t), lse, lse),
        "entropy, gradient": (partial(entropy, x, **out), loss),
        "divergence, gradient": (partial(divergence, x, t, **out), loss, lse),
        "sample weights, gradient": (partial(loss, sample_weight=np.ones(shape[0])), loss),
    }


def seconds(*calls: Call) -> float:
    start = perf_counter()
    for call in calls:
        call()
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.logits")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    chosen = parser.parse_args()
    if chosen.threads:
        fastll.set_num_threads(chosen.threads)
    print(f"{fastll.get_num_threads()} threads; at most {TARGET} is the target")
    for shape in SHAPES:
        for name, dtype in DTYPES.items():
            for what, (call, *others) in pairs(shape, dtype).items():
                seconds(call, *others)
                ratios = [seconds(call) / seconds(*others) for _ in range(chosen.rounds)]
                ratio = median(ratios)
                over = "" if ratio <= TARGET else "  over"
                print(
                    f"{'x'.join(map(str, shape)):>12} {name:>8} {what:<25} {ratio:5.2f}{over}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
