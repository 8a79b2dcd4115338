"""Every gradient against central differences, on every backend."""

import numpy as np
import pytest
from table import all_options, inputs

import fastll
from fastll.operations import OPERATIONS
from fastll.testing import gradcheck

LOSSES = [name for name in OPERATIONS if OPERATIONS[name].gradient]


@pytest.mark.parametrize(("name", "option"), all_options(LOSSES))
@pytest.mark.parametrize(("shape", "axis"), [((3, 5), 1), ((5, 3), 0), ((2, 4, 2), 1), ((1, 40), 1)])
def test_gradients(backend, rng, name, option, shape, axis):
    operation = OPERATIONS[name]
    options = operation.options[option]
    (x, *others), keywords = inputs(name, np.float64, shape, axis, options, rng, spread=2)
    for reduction in ("mean", "sum", "none"):
        gradcheck(
            lambda x, reduction=reduction: operation.function(
                x, *others, **keywords, reduction=reduction, return_grad=True
            ),
            x,
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
