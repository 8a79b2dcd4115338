"""The shared formulas: as plain Python, and their translation into C++."""

import shutil
import subprocess
from importlib import import_module

import numpy as np
import oracle
import pytest
from conftest import require

from fastll.contract import Map
from fastll.formulas import ELEMENTS, Element, Terms, cpp, maths, texts
from fastll.formulas.vocabulary import constants, fma, horner, where_gt


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_maths_as_plain_python(dtype, rng):
    eps = np.finfo(dtype).eps
    c = constants(dtype(0))
    x = np.concatenate([rng.uniform(-80, 0, 1000), np.linspace(-2, 0, 1000)]).astype(dtype)
    np.testing.assert_allclose(maths.exponential(x, c.floor, c.magic), np.exp(x), rtol=4 * eps)
    e = rng.uniform(0, 1, 1000).astype(dtype)
    np.testing.assert_allclose(maths.log1p(e), np.log1p(e), rtol=4 * eps)
    ends = [1.0, c.least, c.least / 8, np.finfo(dtype).max]
    y = np.concatenate([rng.lognormal(0, 9, 1000), ends]).astype(dtype)
    with np.errstate(over="ignore"):  # of the largest, in what is not selected
        np.testing.assert_allclose(maths.log(y), np.log(y), rtol=4 * eps)
    with np.errstate(all="ignore"):
        special = maths.log(np.array([0, -1, np.inf, np.nan], dtype))
        np.testing.assert_array_equal(special, [-np.inf, np.nan, np.inf, np.nan])
        capped, slope = maths.softcap(np.array([0.0, -0.0, 3.0, np.inf], dtype), dtype(2))
    np.testing.assert_array_equal(np.signbit(capped[:2]), [False, True])
    np.testing.assert_allclose(capped, 2 * np.tanh([0, 0, 1.5, np.inf]), rtol=8 * eps)
    np.testing.assert_allclose(slope, 1 - np.tanh([0, 0, 1.5, np.inf]) ** 2, rtol=8 * eps)


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_compiled_formulas_are_those_of_the_text(name, dtype, rng):
    require("cython")
    backend = import_module("fastll.backend.cython").backend
    element = ELEMENTS[name]
    inputs = [rng.uniform(0.1, 0.9, (1, 999)).astype(dtype) for _ in range(element.inputs)]
    inputs[0] = (4 * rng.standard_normal((1, 999))).astype(dtype)
    parameters = tuple(rng.uniform(1, 2, element.parameters))
    value = np.empty((1, 999), dtype)
    slope = np.empty((1, 999), dtype) if element.slope else None
    call = Map(name, tuple(inputs), value=value, slope=slope, parameters=parameters, scale=0.5)
    backend.map(call)(0, 1)
    result = element.formula(*inputs, *(dtype(p) for p in parameters))
    expected = result[0] if element.slope else result
    if element.log1p:
        expected = expected + maths.log1p_fraction(result[1])
    tolerance = {"rtol": 8 * np.finfo(dtype).eps, "atol": 2 * np.finfo(dtype).eps}
    np.testing.assert_allclose(value, expected, **tolerance)
    if element.slope:
        np.testing.assert_allclose(slope, 0.5 * result[-1], **tolerance)


def test_every_formula_is_translated():
    header = cpp.header()
    for function in texts():
        assert f"INLINE auto {function.__name__}(T_" in header
        assert f'#line {function.__code__.co_firstlineno} "fastll/formulas/' in header
    for code, name in enumerate(ELEMENTS):
        assert f"case {code}: return use(element_{name}());" in header
    assert "static constexpr float ln2 = (float) 0x1.62e4300000000p-1f;" in header
    assert "static constexpr double ln2 = (double) 0x1.62e42fefa39efp-1;" in header


def pair(x):
    """A docstring."""
    c = constants(x)
    a, _ = twice(x)
    return fma(a, -c.half, horner(c.exp, x)), a / c.two


def twice(x):
    return x + x, x


def test_translation():
    text = cpp.translate([twice, pair])
    assert "template <class T_x>" in text
    assert "return pack((x + x), x);" in text
    assert "[[maybe_unused]] auto c = constants(x);" in text
    assert "return pack(fma(a, -c.half, horner(c.exp, x)), (a / c.two));" in text
    line = pair.__code__.co_firstlineno + 2
    assert f'#line {line} "tests/test_formulas.py"\n[[maybe_unused]] auto c' in text
    assert text.index("auto twice") < text.index("auto pair")
    assert "#ifndef OWN_pair" in text


def test_tables():
    header = cpp.header(
        [twice, pair], {"one": Element(twice, inputs=2, parameters=1)}, {"two": Terms(pair, inputs=2)}
    )
    assert "return twice(x(0), x(1), parameter(0));" in header
    assert "return pair(x(0), x(1));" in header


def branch(x):
    if x:
        x = x + x
    return x


def loop(x):
    for _ in x:
        pass
    return x


def literal(x):
    return x * 2.0


def power(x):
    return x**x


def minus(x):
    return -x


def comparison(x):
    return x > x


def conditional(x):
    return x if x else x  # noqa: RUF034


def again(x):
    x = x + x
    return x  # noqa: RET504


def twice_assigned(x):
    y = x + x
    y = y + x
    return y  # noqa: RET504


def augmented(x):
    y = x + x
    y += x
    return y


def unknown_constant(x):
    c = constants(x)
    return c.three


def attribute(x):
    return x.real


def foreign(x):
    return np.exp(x)


def unknown(x):
    return oracle(x)


def keyword(x):
    return where_gt(x, x, x, y=x)


def starred(x):
    return where_gt(*x)


def default(x, y=None):
    return fma(x, y, x)


def variadic(*x):
    return fma(*x)


def subscript(x):
    return x[0]


def to_subscript(x):
    x[0] = x
    return x


def global_name(x):
    return fma(x, ELEMENTS, x)


def nothing(x):
    return


def endless(x):
    y = x + x  # noqa: F841


def early(x):
    return x
    return x + x


REFUSED = {
    branch: 1,
    loop: 1,
    literal: 1,
    power: 1,
    minus: 1,
    comparison: 1,
    conditional: 1,
    again: 1,
    twice_assigned: 2,
    augmented: 2,
    unknown_constant: 2,
    attribute: 1,
    foreign: 1,
    unknown: 1,
    keyword: 1,
    starred: 1,
    default: 0,
    variadic: 0,
    subscript: 1,
    to_subscript: 1,
    global_name: 1,
    nothing: 1,
    endless: 1,
    early: 1,
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_refusals_name_the_line(function):
    with pytest.raises(SyntaxError) as caught:
        cpp.translate([function])
    assert caught.value.filename == __file__
    assert caught.value.lineno == function.__code__.co_firstlineno + REFUSED[function]


def test_call_of_a_later_formula_is_refused():
    with pytest.raises(SyntaxError, match="a call of twice"):
        cpp.translate([pair, twice])


def test_builds_share_no_symbol():
    """A unique symbol is shared by the process: a build would use the constants of another."""
    require("cython")
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    module = import_module("fastll.backend.cython._v1").__file__
    symbols = subprocess.run(["nm", module], capture_output=True, text=True, check=True).stdout
    assert not [line for line in symbols.splitlines() if line.split()[-2] == "u"]
