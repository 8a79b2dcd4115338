"""A plugin for pytest: SciPy's tests run fastll's functions in place of SciPy's own."""

from functools import wraps

import scipy.special.tests.test_logsumexp as tests

import fastll


def _over_all_axes(function):
    """SciPy's default axis."""

    @wraps(function)
    def call(x, axis=None):
        return function(x, axis=axis)

    return call


tests.logsumexp = fastll.logsumexp
tests.softmax = _over_all_axes(fastll.softmax)
tests.log_softmax = _over_all_axes(fastll.log_softmax)


def _left_out(item):
    """What is of complex numbers, or of SciPy's own helper for them."""
    call = getattr(item, "callspec", None)
    values = call.params.values() if call else ()
    of_complex = any(isinstance(v, complex) or "complex" in str(v) for v in values)
    names = "complex", "imaginary", "test_wrap_radians"
    return of_complex or any(name in item.name for name in names)


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if _left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
