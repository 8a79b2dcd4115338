"""Every gradient against central differences, on every backend."""

import numpy as np
import pytest
from table import BINARY_OPTIONS, CROSS_ENTROPY_OPTIONS

import fastll
from fastll.testing import gradcheck


@pytest.mark.parametrize("options", CROSS_ENTROPY_OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize(("shape", "axis"), [((3, 5), 1), ((5, 3), 0), ((2, 4, 2), 1), ((1, 40), 1)])
def test_cross_entropy(backend, rng, shape, axis, kind, reduction, options):
    options = dict(options)
    if options.get("weight"):
        options["weight"] = rng.uniform(0.5, 2, shape[axis])
    kept = tuple(np.delete(shape, axis))
    target = rng.random(shape)
    if kind == "sparse":
        target = rng.integers(0, shape[axis], kept)
        target.flat[0] = -100 if target.size > 1 else 0
    gradcheck(
        lambda x: fastll.cross_entropy(
            x, target, axis=axis, reduction=reduction, return_grad=True, **options
        ),
        2 * rng.standard_normal(shape),
    )


@pytest.mark.parametrize("options", BINARY_OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_binary_cross_entropy(backend, rng, reduction, options):
    options = {name: rng.uniform(0.5, 2, (3, 1)) for name in options}
    target = rng.random((3, 4))
    gradcheck(
        lambda x: fastll.binary_cross_entropy_with_logits(
            x, target, reduction=reduction, return_grad=True, **options
        ),
        2 * rng.standard_normal((3, 4)),
    )


def test_gradcheck_sees_a_wrong_gradient(rng):
    x = rng.standard_normal((2, 3))

    def off_by_a_millionth(x):
        loss, grad = fastll.cross_entropy(x, [0, 1], return_grad=True)
        return loss, grad * (1 + 3e-6)

    with pytest.raises(AssertionError, match="central differences"):
        gradcheck(off_by_a_millionth, x)
    with pytest.raises(AssertionError, match="shape"):
        gradcheck(lambda x: (x.sum(), np.ones(3)), x)
    with pytest.raises(ValueError, match="x is not finite"):
        gradcheck(lambda x: (x.sum(), np.ones_like(x)), [np.nan])
