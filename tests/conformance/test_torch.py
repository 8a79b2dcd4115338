"""The losses of torch.nn.functional on the same inputs: the same values and gradients, none less exact.

The exact results are the oracle's, in extended precision. Deliberate differences are at the end, each
with the words of the contract that it follows.
"""

from itertools import product

import numpy as np
import oracle
import pytest
from peers import DTYPES, assert_not_worse

import fastll

torch = pytest.importorskip("torch")
functional = torch.nn.functional

REDUCTIONS = ("none", "sum", "mean")
#: Rows and classes, and classes between other axes; torch's class axis is 1.
SHAPES = [(64, 10), (8, 1000), (2, 19, 5, 4)]


@pytest.fixture(params=DTYPES, autouse=True)
def dtype(request):
    return DTYPES[request.param]


def given(array):
    """An array as a tensor that shares no memory with it; of bfloat16 by its bits."""
    array = np.asarray(array)
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def taken(tensor):
    """A tensor as an array; halves as float32."""
    tensor = tensor.detach()
    return tensor.float().numpy() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.numpy()


def check(ours, peer, arrays, expected, reduction):
    """Value and gradient of both beside the oracle's, for the first of the arrays."""
    x, *others = arrays
    leaf = given(x).requires_grad_()
    other = peer(leaf, *map(given, others))
    other.sum().backward()
    value, grad = ours(x, *others)
    exact, slope = expected.value[0], expected.gradient[0]
    if reduction == "sum":
        exact = exact.sum()
    elif reduction == "mean" and expected.mean is not None:
        (exact, _), (slope, _) = expected.mean
    elif reduction == "mean":
        exact, slope = exact.mean(), slope / exact.size
    # a unit each for the sum of the losses, that of their weights, and the quotient or the reciprocal
    units = 1 if reduction == "none" else 3
    assert_not_worse(value, taken(other), exact, units)
    assert_not_worse(grad, taken(leaf.grad), slope, units)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "weighted", "smoothing"), [*product(["sparse", "dense"], [False, True], [0.0, 0.1])]
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy(rng, dtype, shape, kind, weighted, smoothing, reduction):
    x = (3 * rng.standard_normal(shape)).astype(dtype)
    classes = shape[1]
    if kind == "sparse":
        target = rng.integers(0, classes, (shape[0], *shape[2:]))
        target.flat[::5] = -100
    else:
        target = np.moveaxis(rng.dirichlet(np.ones(classes), (shape[0], *shape[2:])), -1, 1).astype(
            dtype
        )
    options = {"label_smoothing": smoothing}
    weight = rng.random(classes).astype(dtype) if weighted else None
    expected = oracle.cross_entropy(x, target, 1, weight=weight, **options)
    tensor = None if weight is None else given(weight)
    check(
        lambda x, t: fastll.cross_entropy(
            x, t, axis=1, weight=weight, reduction=reduction, return_grad=True, **options
        ),
        lambda x, t: functional.cross_entropy(x, t, weight=tensor, reduction=reduction, **options),
        (x, target),
        expected,
        reduction,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nll_loss(rng, dtype, shape, weighted, reduction):
    x = -rng.random(shape).astype(dtype)
    target = rng.integers(0, shape[1], (shape[0], *shape[2:]))
    target.flat[::5] = -100
    weight = rng.random(shape[1]).astype(dtype) if weighted else None
    tensor = None if weight is None else given(weight)
    check(
        lambda x, t: fastll.nll_loss(
            x, t, axis=1, weight=weight, reduction=reduction, return_grad=True
        ),
        lambda x, t: functional.nll_loss(x, t, weight=tensor, reduction=reduction),
        (x, target),
        oracle.nll_loss(x, target, 1, weight=weight),
        reduction,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("logits", [True, False])
def test_binary_cross_entropy(rng, dtype, reduction, weighted, logits):
    x, t = (3 * rng.standard_normal((40, 30))).astype(dtype), rng.random((40, 30)).astype(dtype)
    names = ("binary_cross_entropy_with_logits",) * 2
    if not logits:
        x = np.clip(fastll.sigmoid(x), dtype.type(0.01), dtype.type(0.99)).astype(dtype)
        names = ("binary_cross_entropy",) * 2
    keywords = {"weight": rng.random((1, 30)).astype(dtype)} if weighted else {}
    if weighted and logits:
        keywords["pos_weight"] = rng.random(30).astype(dtype)
    ours, peer = getattr(fastll, names[0]), getattr(functional, names[1])
    check(
        lambda x, t: ours(x, t, **keywords, reduction=reduction, return_grad=True),
        lambda x, t: peer(x, t, **{key: given(w) for key, w in keywords.items()}, reduction=reduction),
        (x, t),
        getattr(oracle, names[0])(x, t, **keywords),
        reduction,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("full", [False, True])
def test_gaussian_nll(rng, dtype, reduction, full):
    x, t = rng.standard_normal((2, 40, 30)).astype(dtype)
    v = (0.5 + rng.random((40, 30))).astype(dtype)
    check(
        lambda x, t, v: fastll.gaussian_nll(x, t, v, full=full, reduction=reduction, return_grad=True),
        lambda x, t, v: functional.gaussian_nll_loss(x, t, v, full=full, reduction=reduction),
        (x, t, v),
        oracle.gaussian_nll(x, t, v, full=full),
        reduction,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("log_input", "full"), [*product([False, True], repeat=2)])
def test_poisson_nll(rng, dtype, reduction, log_input, full):
    x = rng.standard_normal((40, 30)).astype(dtype)
    x = x if log_input else np.exp(x)
    t = rng.poisson(3, (40, 30)).astype(dtype)
    options = {"log_input": log_input, "full": full}
    check(
        lambda x, t: fastll.poisson_nll(x, t, **options, reduction=reduction, return_grad=True),
        lambda x, t: functional.poisson_nll_loss(x, t, **options, reduction=reduction),
        (x, t),
        oracle.poisson_nll(x, t, **options),
        reduction,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mse(rng, dtype, reduction):
    x, t = rng.standard_normal((2, 40, 30)).astype(dtype)
    check(
        lambda x, t: fastll.mse(x, t, reduction=reduction, return_grad=True),
        lambda x, t: functional.mse_loss(x, t, reduction=reduction),
        (x, t),
        oracle.mse(x, t),
        reduction,
    )


@pytest.mark.parametrize("shape", [(64, 10), (8, 1000)], ids=str)
def test_kl_divergence(rng, dtype, shape):
    """torch's is an element-wise loss of log q and p; the sum over a row is the divergence."""
    p, q = rng.dirichlet(np.ones(shape[1]), (2, shape[0])).astype(dtype)
    exact = oracle.kl_divergence(p, q, -1).value[0]
    other = functional.kl_div(given(q).log(), given(p), reduction="none").sum(-1)
    assert_not_worse(fastll.kl_divergence(p, q), taken(other), exact)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(64, 10), (8, 1000)], ids=str)
def test_folds_of_logits(rng, dtype, shape, temperature):
    """What eager torch takes a log-softmax for; gradients by its autograd."""
    x, t = (3 * rng.standard_normal((2, *shape))).astype(dtype)
    index = rng.integers(0, shape[1], shape[0])
    leaf, target = given(x).requires_grad_(), given(t)
    log_q, log_p = (torch.log_softmax(a / temperature, -1) for a in (leaf, target))
    options = {"temperature": temperature}

    selected = fastll.selective_log_softmax(x, index, **options)
    other = log_q.gather(-1, torch.from_numpy(index)[:, None])[:, 0]
    assert_not_worse(
        selected, taken(other), oracle.selective_log_softmax(x, index, -1, **options).value[0]
    )
    for peer, ours, expected in (
        (
            -(log_q.exp() * log_q).sum(-1),
            fastll.entropy_from_logits(x, **options, return_grad=True),
            oracle.entropy_from_logits(x, -1, **options),
        ),
        (
            functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1),
            fastll.kl_divergence_from_logits(x, t, **options, reduction="none", return_grad=True),
            oracle.kl_divergence_from_logits(x, t, -1, **options),
        ),
    ):
        leaf.grad = None
        peer.sum().backward(retain_graph=True)
        assert_not_worse(ours[0], taken(peer), expected.value[0])
        assert_not_worse(ours[1], taken(leaf.grad), expected.gradient[0])


@pytest.mark.parametrize("name", ["logsumexp", "softmax", "log_softmax"])
@pytest.mark.parametrize("axis", [0, 1])
def test_reductions(rng, dtype, name, axis):
    x = (5 * rng.standard_normal((60, 90))).astype(dtype)
    ours, peer = getattr(fastll, name)(x, axis=axis), getattr(torch, name)(given(x), axis)
    assert_not_worse(ours, taken(peer), getattr(oracle, name)(x, axis).value[0])


# deliberate differences


def test_a_loss_near_zero_keeps_its_digits(dtype):
    """Contract: "a near-zero loss keeps its digits (torch gives exactly 0 in float32 once the gap
    exceeds about 16)"."""
    x = np.array([[40.0, 0.0]], dtype)
    np.testing.assert_allclose(fastll.cross_entropy(x, [0]), np.exp(-40.0), rtol=1e-6)
    assert functional.cross_entropy(given(x), torch.tensor([0])) == 0


def test_a_target_of_zero_at_minus_infinity(dtype):
    """Contract: "a dense target of 0 at a logit of -inf contributes 0, not NaN"."""
    x, t = np.array([[0.0, -np.inf]], dtype), np.array([[1.0, 0.0]], dtype)
    assert fastll.cross_entropy(x, t) == 0
    assert torch.isnan(functional.cross_entropy(given(x), given(t)))


def test_values_of_halves_are_float32(dtype):
    """Contract: "values are float64 for float64 input and float32 for every other"."""
    x, y = np.zeros((2, 3), dtype), np.zeros(2, int)
    wide = np.float64 if dtype == np.float64 else np.float32
    assert fastll.cross_entropy(x, y).dtype == wide
    assert taken(functional.cross_entropy(given(x), given(y))).dtype == wide
    assert functional.cross_entropy(given(x), given(y)).dtype == given(x).dtype


def test_labels(dtype):
    """Contract: "targets may be any integer dtype"; "a label outside [0, C) ... raises IndexError"."""
    x = np.zeros((2, 3), dtype)
    np.testing.assert_allclose(fastll.cross_entropy(x, np.zeros(2, np.int8)), np.log(3), rtol=1e-6)
    with pytest.raises(RuntimeError):
        functional.cross_entropy(given(x), torch.zeros(2, dtype=torch.int8))
    for f, logits, labels in (
        (fastll.cross_entropy, x, [0, 3]),
        (functional.cross_entropy, given(x), torch.tensor([0, 3])),
    ):
        with pytest.raises(IndexError):
            f(logits, labels)


def test_domain_of_probabilities(dtype):
    """Contract: "probabilities outside [0, 1]: ValueError"."""
    p, t = np.array([1.5], dtype), np.array([1.0], dtype)
    with pytest.raises(ValueError, match=r"probs has 1.5 at \(0,\)"):
        fastll.binary_cross_entropy(p, t)
    with pytest.raises(RuntimeError):
        functional.binary_cross_entropy(given(p), given(t))
