"""fastll by PyTorch's names: its own samples and checks, the graph, and what traces and batches it."""

import math
import threading

import numpy as np
import pytest
from conftest import require

torch = pytest.importorskip("torch", reason="torch is not installed")

import fastll  # noqa: E402
import fastll.interop.torch as ours  # noqa: E402
from fastll import direct  # noqa: E402
from fastll.interop import _torch_calls as calls  # noqa: E402
from fastll.interop import _torch_graph as graph  # noqa: E402
from fastll.interop._torch_rules import RULES, THEIRS  # noqa: E402

F = torch.nn.functional
REDUCTIONS = ("none", "sum", "mean")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def close(found, expected, scale=1.0):
    """Within 16 roundoffs of the dtype, of the larger one of the value and a scale: sums of both."""
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(
        found, expected, rtol=16 * eps, atol=16 * eps * scale, check_stride=False, equal_nan=True
    )


def gradient(function, x, upstream=None):
    """The value, and its gradient for an upstream one."""
    leaf = x.detach().clone().requires_grad_()
    value = function(leaf)
    upstream = torch.ones_like(value) if upstream is None else upstream(value)
    return value.detach(), torch.autograd.grad(value, leaf, upstream)[0]


def waves(value):
    """An upstream gradient of both signs."""
    return torch.arange(value.numel(), dtype=torch.float64).cos().reshape(value.shape).to(value.dtype)


LOGITS = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([[0, 1, 2], [3, 4, -100], [1, -100, 0], [2, 2, 2]])
SHARES = torch.softmax(LOGITS.flip(0), 1)
CLASSES = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.25], dtype=torch.float64)
TOKENS = LABELS[:, [0] * 5].clamp(0, 2)
SOME = torch.sigmoid(LOGITS.flip(2))

#: Every function: its name, its first tensor, and the call of either library's with that.
CALLS = {
    "cross_entropy": (LOGITS, lambda f, x, r: f(x, LABELS, reduction=r)),
    "cross_entropy, options": (
        LOGITS,
        lambda f, x, r: f(
            x, LABELS.clamp(0), CLASSES.to(x.dtype), ignore_index=2, reduction=r, label_smoothing=0.1
        ),
    ),
    "cross_entropy, dense": (
        LOGITS,
        lambda f, x, r: f(x, SHARES.to(x.dtype), CLASSES.to(x.dtype), reduction=r, label_smoothing=0.2),
    ),
    "nll_loss": (
        torch.log_softmax(LOGITS, 1),
        lambda f, x, r: f(x, LABELS, CLASSES.to(x.dtype), reduction=r),
    ),
    "binary_cross_entropy_with_logits": (
        LOGITS,
        lambda f, x, r: f(x, SHARES.to(x.dtype), reduction=r),
    ),
    "binary_cross_entropy_with_logits, weights": (
        LOGITS,
        lambda f, x, r: f(
            x, SHARES.to(x.dtype), SOME.to(x.dtype), pos_weight=SOME[0].to(x.dtype), reduction=r
        ),
    ),
    "binary_cross_entropy": (
        torch.sigmoid(LOGITS),
        lambda f, x, r: f(x, SHARES.to(x.dtype), SOME.to(x.dtype), reduction=r),
    ),
    "kl_div": (
        torch.log_softmax(LOGITS, 1),
        lambda f, x, r: f(x, SHARES.to(x.dtype), reduction="batchmean" if r == "mean" else r),
    ),
    "kl_div, log_target": (
        torch.log_softmax(LOGITS, 1),
        lambda f, x, r: f(
            x,
            SHARES.log().to(x.dtype),
            reduction="batchmean" if r == "mean" else r,
            log_target=True,
        ),
    ),
    "gaussian_nll_loss": (
        LOGITS,
        lambda f, x, r: f(x, SHARES.to(x.dtype), SOME.to(x.dtype), full=True, reduction=r),
    ),
    "gaussian_nll_loss, per row": (
        LOGITS,
        lambda f, x, r: f(x, SHARES.to(x.dtype), SOME[..., 0].to(x.dtype), reduction=r),
    ),
    "poisson_nll_loss": (LOGITS, lambda f, x, r: f(x, SOME.to(x.dtype), full=True, reduction=r)),
    "poisson_nll_loss, rate": (
        SOME + 1,
        lambda f, x, r: f(x, SOME.to(x.dtype), log_input=False, reduction=r),
    ),
    "logsumexp": (LOGITS, lambda f, x, r: f(x, 1, keepdim=r == "sum")),
    "softmax": (LOGITS, lambda f, x, r: f(x, 1)),
    "log_softmax": (LOGITS, lambda f, x, r: f(x, 1)),
}


def both(name):
    """The call by fastll, by PyTorch, and the first tensor."""
    x, call = CALLS[name]
    function = name.partition(",")[0]
    mine, theirs = getattr(ours, function), THEIRS[function]
    return (lambda x, r="mean": call(mine, x, r)), (lambda x, r="mean": call(theirs, x, r)), x


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name, dtype):
    mine, theirs, x = both(name)
    x = x.to(getattr(torch, dtype))
    for reduction in REDUCTIONS:
        value, grad = gradient(lambda x, r=reduction: mine(x, r), x, waves)
        expected, slope = gradient(lambda x, r=reduction: theirs(x, r), x, waves)
        assert value.dtype == expected.dtype
        close(value, expected, 4.0)
        close(grad, slope, 4.0)


@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_do_the_work(name, monkeypatch):
    """No call above was PyTorch's own."""
    mine, _, x = both(name)

    def refuse(*_, **__):
        raise AssertionError("PyTorch's function was called")

    monkeypatch.setattr(ours, "THEIRS", dict.fromkeys(THEIRS, refuse))
    for reduction in REDUCTIONS:
        gradient(lambda x, r=reduction: mine(x, r), x)


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name):
    mine, _, x = both(name)
    x = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(mine, x)
    assert torch.autograd.gradgradcheck(mine, x)


@pytest.mark.parametrize("name", CALLS)
def test_twice_through_one_graph(name):
    mine, _, x = both(name)
    x = x.clone().requires_grad_()
    value = mine(x, "sum").sum()
    (once,) = torch.autograd.grad(value, x, retain_graph=True)
    (again,) = torch.autograd.grad(value, x)
    assert torch.equal(once, again)


@pytest.mark.parametrize("name", CALLS)
def test_compiled(name):
    mine, _, x = both(name)
    torch._dynamo.reset()
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    for reduction in REDUCTIONS:
        value, grad = gradient(lambda x, r=reduction: compiled(x, r), x, waves)
        expected, slope = gradient(lambda x, r=reduction: mine(x, r), x, waves)
        close(value, expected)
        close(grad, slope)


@pytest.mark.filterwarnings("ignore")
def test_compiled_by_inductor():
    """Once, as its C++ compiler takes seconds."""
    x, y = torch.randn(64, 100), torch.randint(100, (64,))

    def loss(x):
        return ours.cross_entropy(2 * x, y) + fastll.logsumexp(x, 1).mean()

    value, grad = gradient(torch.compile(loss, fullgraph=True), x)
    expected, slope = gradient(loss, x)
    close(value, expected)
    close(grad, slope)


def test_compiled_transformation():
    x, y = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    for function in (ours.cross_entropy, lambda x, y: ours.softmax(x, 1)[0, 0]):
        for call in (torch.func.vmap(function), torch.func.vmap(torch.func.grad(function))):
            torch._dynamo.reset()
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
            close(compiled(x, y), call(x, y))


@pytest.mark.parametrize("name", CALLS)
def test_transformed(name):
    mine, _, x = both(name)
    batch = torch.stack([x, 0.5 * x, x.clamp(0.1, 0.9)])

    def total(x):
        return mine(x, "mean").sum()

    slopes = torch.stack([gradient(total, x)[1] for x in batch])
    close(torch.func.grad(total)(x), slopes[0])
    close(torch.func.vmap(total)(batch), torch.stack([total(x) for x in batch]))
    close(torch.func.vmap(torch.func.grad(total))(batch), slopes)
    last = torch.func.vmap(lambda x: mine(x, "none"), in_dims=x.ndim)(batch.movedim(0, -1))
    close(last, torch.stack([mine(x, "none") for x in batch]))


def test_batches_of_class_weights():
    weights = torch.stack([CLASSES, CLASSES.flip(0)])

    def loss(weight):
        return ours.cross_entropy(LOGITS, LABELS, weight)

    close(torch.func.vmap(loss)(weights), torch.stack([loss(w) for w in weights]))


OPTIONS = {
    "cross_entropy": (-1.0, -100.0, 0.0, 0.0, math.nan, 1.0),
    "nll_loss": (-1.0, -100.0, 0.0, 0.0, math.nan, 1.0),
    "selective_log_softmax": (-1.0, 0.7),
    "entropy_from_logits": (-1.0, 0.7),
    "kl_divergence_from_logits": (-1.0, 0.7),
    "gaussian_nll": (1.0, 1e-6),
    "poisson_nll": (1.0, 1.0, 1e-8),
    "sigmoid_focal_loss": (0.25, 2.0),
    "kl_div": (0.0,),
    "logsumexp": (-1.0,),
    "softmax": (-1.0,),
    "log_softmax": (-1.0,),
}
OTHERS = {
    "cross_entropy": (torch.tensor([0, 4, 2]), CLASSES, None),
    "nll_loss": (torch.tensor([0, 4, 2]), CLASSES, torch.rand(3, dtype=torch.float64)),
    "selective_log_softmax": (torch.tensor([0, 4, 2]),),
    "entropy_from_logits": (None,),
    "kl_divergence_from_logits": (torch.randn(3, 5, dtype=torch.float64), None),
    "binary_cross_entropy_with_logits": (torch.rand(3, 5, dtype=torch.float64), None, None),
    "binary_cross_entropy": (torch.rand(3, 5, dtype=torch.float64), None),
    "gaussian_nll": (torch.rand(3, 5, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)),
}


def tensors_of(rule):
    x = torch.rand(3, 5, dtype=torch.float64)
    one = rule in ("logsumexp", "softmax", "log_softmax", "sigmoid", "log_sigmoid")
    others = OTHERS.get(rule, () if one else (torch.rand(3, 5, dtype=torch.float64),))
    return [x, *others], list(OPTIONS.get(rule, ()))


@pytest.mark.parametrize("rule", RULES)
def test_operators(rule):
    tensors, options = tensors_of(rule)
    x = tensors[0].requires_grad_()
    given = [t is not None for t in tensors]
    tensors = [t for t in tensors if t is not None]
    call = rule, given, tensors, options or [0.0]
    torch.library.opcheck(torch.ops.fastll.value.default, call)
    with torch.no_grad():
        value = torch.ops.fastll.value(*call)
    of = x.detach(), *tensors[1:]
    if RULES[rule].by_result:
        given, of = [True], (value,)
    call = rule, torch.ones_like(value), given, list(of), options or [0.0]
    torch.library.opcheck(torch.ops.fastll.slope.default, call)


@pytest.mark.parametrize("rule", RULES)
def test_formulas(rule):
    """What PyTorch's own operations make of a rule is what fastll computes."""
    tensors, options = tensors_of(rule)
    x = tensors[0].requires_grad_()
    for reduction in REDUCTIONS if RULES[rule].divisor else ("none",):
        values = [way(rule, tensors, options, reduction) for way in (graph.run, graph.by_formula)]
        slopes = [torch.autograd.grad(value.sum(), x)[0] for value in values]
        close(values[0], values[1])
        close(slopes[0], slopes[1])


# PyTorch's own samples

OP_INFOS = {
    "nn.functional.cross_entropy": "cross_entropy",
    "nn.functional.nll_loss": "nll_loss",
    "nn.functional.binary_cross_entropy": "binary_cross_entropy",
    "nn.functional.binary_cross_entropy_with_logits": "binary_cross_entropy_with_logits",
    "nn.functional.kl_div": "kl_div",
    "nn.functional.gaussian_nll_loss": "gaussian_nll_loss",
    "nn.functional.poisson_nll_loss": "poisson_nll_loss",
    "logsumexp": "logsumexp",
    "softmax": "softmax",
    "log_softmax": "log_softmax",
}


@pytest.fixture(scope="module")
def op_db():
    pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db if op.name in OP_INFOS]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_samples(op_db, dtype):
    """Values and gradients of PyTorch's samples are PyTorch's."""
    assert {op.name for op in op_db} == set(OP_INFOS)
    for op in op_db:
        if dtype not in op.dtypes:
            continue
        mine = getattr(ours, OP_INFOS[op.name])
        for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
            given = [sample.input, *sample.args, *sample.kwargs.values()]
            leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
            results = []
            for function in (op.op, mine):
                value = function(sample.input, *sample.args, **sample.kwargs)
                total = (value * waves(value)).sum()
                grads = torch.autograd.grad(total, leaves, allow_unused=True) if leaves else ()
                results.append([value.detach(), *grads])
            for expected, found in zip(*results, strict=True):
                assert (expected is None) == (found is None)
                if expected is not None:
                    # sums of as many terms as there are elements, and of the magnitude of the largest
                    scale = (
                        4.0 + float(expected.nan_to_num(0, 0, 0).abs().max())
                        if expected.numel()
                        else 1.0
                    )
                    close(found, expected, scale)


@pytest.mark.filterwarnings("ignore")
def test_errors_of_samples(op_db):
    """What PyTorch refuses is refused in its words."""
    for op in op_db:
        if op.error_inputs_func is None:
            continue
        mine = getattr(ours, OP_INFOS[op.name])
        for error in op.error_inputs("cpu"):
            sample = error.sample_input
            with pytest.raises(error.error_type, match=error.error_regex):
                mine(sample.input, *sample.args, **sample.kwargs)


def test_errors():
    x = torch.randn(2, 3)
    for call in (
        lambda f: f.cross_entropy(x, torch.tensor([0, 3])),
        lambda f: f.cross_entropy(x, torch.tensor([0, 1, 2])),
        lambda f: f.cross_entropy(x, torch.tensor([0, 1], dtype=torch.int32)),
        lambda f: f.cross_entropy(x, torch.tensor([0, 1]), torch.ones(4)),
        lambda f: f.cross_entropy(x, torch.tensor([0, 1]), label_smoothing=2.0),
        lambda f: f.cross_entropy(x, torch.tensor([0, 1]), reduction="total"),
        lambda f: f.nll_loss(x, torch.tensor([0, -5])),
        lambda f: f.binary_cross_entropy(x + 5, x),
        lambda f: f.binary_cross_entropy_with_logits(x, x[:1]),
        lambda f: f.gaussian_nll_loss(x, x, -x.abs() - 1),
        lambda f: f.softmax(x, 2),
        lambda f: f.softmax(x.to(torch.complex64).to_sparse(), 3),
    ):
        with pytest.raises((RuntimeError, ValueError, IndexError, TypeError)) as theirs:
            call(F)
        with pytest.raises(theirs.type) as mine:
            call(ours)
        assert str(mine.value) == str(theirs.value)


# Where else PyTorch has a say


@pytest.mark.parametrize("name", CALLS)
def test_autocast(name):
    mine, theirs, x = both(name)
    x = x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mine(x, "sum").dtype == theirs(x, "sum").dtype


@pytest.mark.parametrize("name", [name for name in CALLS if "gaussian" not in name])
def test_meta(name):
    mine, theirs, x = both(name)
    meta = torch.device("meta")
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for constant in ("LABELS", "SHARES", "CLASSES", "SOME"):
            patch.setitem(globals(), constant, globals()[constant].to(meta))
        found, expected = mine(x.to(meta)), theirs(x.to(meta))
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)


def test_legacy_arguments():
    x, y = LOGITS, LABELS
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        found = ours.cross_entropy(x, y, size_average=False)
    close(found, F.cross_entropy(x, y, reduction="sum"))


def test_gradients_of_targets():
    for call in (
        lambda f, t: f.cross_entropy(LOGITS, t, CLASSES, label_smoothing=0.1),
        lambda f, t: f.binary_cross_entropy_with_logits(LOGITS, t),
        lambda f, t: f.kl_div(torch.log_softmax(LOGITS, 1), t, reduction="sum"),
        lambda f, t: f.gaussian_nll_loss(LOGITS, t, SOME),
        lambda f, t: f.gaussian_nll_loss(LOGITS, SOME, t),
        lambda f, t: f.poisson_nll_loss(LOGITS, t),
    ):
        found = gradient(lambda t, c=call: c(ours, t), SHARES)
        expected = gradient(lambda t, c=call: c(F, t), SHARES)
        for one, other in zip(found, expected, strict=True):
            close(one, other)


def test_patch():
    before = {name: getattr(F, name) for name in THEIRS if hasattr(F, name)}
    loss = torch.nn.CrossEntropyLoss()

    def use():
        with ours.patch():
            assert F.cross_entropy is ours.cross_entropy
            with ours.patch():
                pass
            assert F.softmax is ours.softmax
            assert torch.equal(loss(LOGITS, LABELS), ours.cross_entropy(LOGITS, LABELS))
            raise KeyError

    with pytest.raises(KeyError):
        use()
    with ours.patch():  # a derivative that takes PyTorch's own operations
        share = SHARES.clone().requires_grad_()
        F.kl_div(LOGITS, share, reduction="sum").backward()
    assert before == {name: getattr(F, name) for name in before}


@pytest.mark.parametrize(
    ("name", "options", "target"),
    [
        ("CrossEntropyLoss", {"weight": CLASSES, "label_smoothing": 0.1}, LABELS),
        ("NLLLoss", {"weight": CLASSES, "ignore_index": 2, "reduction": "sum"}, LABELS.clamp(0)),
        ("BCEWithLogitsLoss", {"pos_weight": SOME[0]}, SHARES),
        ("KLDivLoss", {"reduction": "batchmean", "log_target": True}, SHARES.log()),
    ],
)
def test_modules(name, options, target):
    mine, theirs = getattr(ours, name)(**options), getattr(torch.nn, name)(**options)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    close(mine(LOGITS, target), theirs(LOGITS, target))


def test_training():
    """A small language model has the losses that it has with PyTorch's own, step by step."""
    text = torch.randint(0, 50, (8, 33), generator=torch.Generator().manual_seed(0))

    def losses(cross_entropy, softmax):
        torch.manual_seed(0)
        embedding, head = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50)
        mix = torch.nn.Linear(16, 48)
        optimizer = torch.optim.AdamW(
            [*embedding.parameters(), *head.parameters(), *mix.parameters()], lr=0.01
        )
        mask = torch.full((32, 32), -math.inf).triu(1)
        for _ in range(20):
            x = embedding(text[:, :-1])
            q, k, v = mix(x).chunk(3, -1)
            x = x + softmax(q @ k.mT / 4 + mask, -1) @ v
            loss = cross_entropy(head(x).flatten(0, 1), text[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    mine = list(losses(ours.cross_entropy, ours.softmax))
    theirs = list(losses(F.cross_entropy, F.softmax))
    assert mine[-1] < mine[0] - 0.5
    # Adam divides by the root of a mean of squares: roundoffs of small gradients grow from step to step
    np.testing.assert_allclose(mine, theirs, rtol=1e-4)


def test_threads():
    """Several threads record and go back at once."""
    x = torch.randn(200, 1000)
    y = torch.randint(1000, (200,))
    expected, failed = gradient(lambda x: ours.cross_entropy(x, y), x), []

    def work():
        for _ in range(20):
            found = gradient(lambda x: ours.cross_entropy(x, y), x)
            if not all(map(torch.equal, found, expected)):
                failed.append(found)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed


# fastll's own functions in the graph

OWN = {
    "logsumexp": lambda x: fastll.logsumexp(x, (0, 2), keepdims=True),
    "logsumexp, weights": lambda x: fastll.logsumexp(x, 1, b=SOME - 0.2, return_sign=True)[0],
    "softmax": lambda x: fastll.softmax(x, axis=0),
    "log_softmax": lambda x: fastll.log_softmax(x, axis=None),
    "entropy": lambda x: fastll.entropy(x.sigmoid(), base=2),
    "kl_divergence": lambda x: fastll.kl_divergence(x.sigmoid(), SOME, axis=1),
    "distribution_cross_entropy": lambda x: fastll.distribution_cross_entropy(x.sigmoid(), SOME),
    "sigmoid": fastll.sigmoid,
    "log_sigmoid": fastll.log_sigmoid,
    "cross_entropy": lambda x: fastll.cross_entropy(
        x, LABELS, axis=1, weight=CLASSES, z_loss=0.1, softcap=3.0, sample_weight=SOME[:, 0]
    ),
    "sparse_cross_entropy": lambda x: fastll.sparse_cross_entropy(x, LABELS, axis=1, reduction="sum"),
    "dense_cross_entropy": lambda x: fastll.dense_cross_entropy(x, SHARES, axis=1),
    "nll_loss": lambda x: fastll.nll_loss(x, LABELS, axis=1),
    "lse": lambda x: sum(
        fastll.cross_entropy(x, LABELS, axis=1, softcap=c, return_lse=True)[1].sum()
        for c in (None, 2.0)
    ),
    "selective_log_softmax": lambda x: sum(
        r.sum()
        for r in fastll.selective_log_softmax(
            x, LABELS.clamp(0), axis=1, temperature=0.5, return_entropy=True, return_lse=True
        )
    ),
    "selective_log_softmax, several": lambda x: fastll.selective_log_softmax(
        x, torch.stack([LABELS.clamp(0), LABELS.clamp(1)], -1), axis=1, temperature=0.5
    ),
    "entropy_from_logits": lambda x: fastll.entropy_from_logits(
        x, axis=1, temperature=2.0, sample_weight=SOME[:, 0], reduction="mean"
    ),
    "kl_divergence_from_logits": lambda x: fastll.kl_divergence_from_logits(x, SHARES, axis=1),
    "binary_cross_entropy_with_logits": lambda x: fastll.binary_cross_entropy_with_logits(x, SHARES),
    "binary_cross_entropy": lambda x: fastll.binary_cross_entropy(x.sigmoid(), SHARES),
    "gaussian_nll": lambda x: fastll.gaussian_nll(x, SHARES, SOME, full=True),
    "mse": lambda x: fastll.mse(x, SHARES[0]),
    "poisson_nll": lambda x: fastll.poisson_nll(x, SHARES, reduction="none"),
    "sigmoid_focal_loss": lambda x: fastll.sigmoid_focal_loss(x, SHARES, alpha=-1.0),
    "sequence_log_likelihood": lambda x: fastll.sequence_log_likelihood(x, TOKENS),
    "perplexity": lambda x: fastll.perplexity(x, TOKENS),
}


@pytest.mark.parametrize("name", OWN)
def test_own_functions(name):
    """Their values are those outside the graph, and their gradients right."""
    function = OWN[name]
    value = function(LOGITS.clone().requires_grad_())
    assert value.requires_grad
    close(value.detach(), torch.as_tensor(function(LOGITS)))
    assert torch.autograd.gradcheck(function, LOGITS.clone().requires_grad_())


def test_every_own_function_is_here():
    assert calls._CALLS.keys() - {"sparse_cross_entropy"} <= {name.partition(",")[0] for name in OWN}
    public = {name for name in fastll.__all__ if hasattr(getattr(fastll, name), "__wrapped__")}
    assert calls._CALLS.keys() == public - {"use_backend", "debug_labels"}


def test_a_loss_beside_another():
    """The penalty is not trained alone."""
    x = LOGITS.clone().requires_grad_()
    (fastll.cross_entropy(x, LABELS, axis=1) + x.square().sum()).backward()
    expected = gradient(lambda x: F.cross_entropy(x, LABELS) + x.square().sum(), LOGITS)[1]
    close(x.grad, expected)


def test_what_has_no_part_in_a_graph():
    """Nothing is silently outside."""
    x = LOGITS.clone().requires_grad_()

    @fastll.elementwise_loss
    def square(x):
        return x * x, x + x

    for call in (
        lambda: fastll.LogSumExp().update(x),
        lambda: fastll.NegativeLogLikelihood().update(x, LABELS, axis=1),
        lambda: square(x),
    ):
        with pytest.raises(TypeError, match=r"is in PyTorch's graph.*; expected \w+\.detach\(\)"):
            call()


def test_outputs():
    x = LOGITS.clone().requires_grad_()
    loss, lse, grad = fastll.cross_entropy(x, LABELS, axis=1, return_lse=True, return_grad=True)
    assert loss.requires_grad
    assert lse.requires_grad
    assert not grad.requires_grad
    close(grad, torch.autograd.grad(loss, x)[0])
    with pytest.raises(RuntimeError, match="out is given"):
        fastll.softmax(x, out=torch.empty_like(LOGITS))
    with pytest.raises(RuntimeError, match="grad_out requires a gradient"):
        fastll.cross_entropy(LOGITS, LABELS, axis=1, grad_out=x)
    with torch.no_grad():
        assert not fastll.softmax(x).requires_grad


@pytest.mark.parametrize("name", ["softmax", "cross_entropy", "entropy_from_logits"])
def test_own_functions_traced_and_batched(name):
    function = OWN[name]
    value, grad = gradient(torch.compile(function, backend="aot_eager"), LOGITS)
    expected, slope = gradient(function, LOGITS)
    close(value, expected)
    close(grad, slope)
    batch = torch.stack([LOGITS, -LOGITS])
    close(torch.func.vmap(function)(batch), torch.stack([function(x) for x in batch]))


# The direct way


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_go_the_direct_way(dtype):
    """To the bits of the long way, which strided logits go."""
    x = torch.randn(6, 5).to(getattr(torch, dtype))
    labels = torch.tensor([0, 1, 2, 3, 4, -100])
    strided = torch.stack([x, x], -1)[..., 0]

    def directly(x, *outputs):
        options = (-100, 0.0, 0.0, None), 1.0, "mean", (False, *outputs)
        return direct.loss("cross_entropy", "any", (x, labels), -1, *options)

    require("cython")
    fastll.softmax(x)  # PyTorch is met
    loss, grad = directly(x, True, None)
    assert (loss.dtype, grad.dtype) == (torch.promote_types(x.dtype, torch.float32), x.dtype)
    assert directly(strided, True, None) is None
    for found, expected in zip(
        (loss, grad), fastll.cross_entropy(strided, labels, return_grad=True), strict=True
    ):
        assert torch.equal(found, expected)
    assert torch.equal(direct.fold("softmax", (x,), -1), fastll.softmax(strided))


@pytest.mark.parametrize(
    "x",
    [
        torch._neg_view(torch.randn(2, 3)),
        torch.randn(2, 3, requires_grad=True),
        torch.randn(2, 3).to_sparse(),
        torch.randn(2, 3, device="meta"),
        torch._efficientzerotensor((2, 3)),
        torch.zeros(2, 3, dtype=torch.complex64),
    ],
    ids=["negated", "recorded", "sparse", "meta", "zeros", "complex"],
)
def test_what_the_direct_way_leaves(x):
    fastll.softmax(torch.ones(3))
    assert direct.fold("softmax", (x,), -1) is None


def test_transformed_tensors_are_left():
    found = []
    torch.func.vmap(lambda x: found.append(direct.fold("softmax", (x,), -1)) or x)(torch.randn(2, 3))
    assert found == [None]


@pytest.mark.parametrize("rows", [4, 40000], ids=["at once", "again"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_found_at_once_and_again(rows, reduction):
    """Twice by one graph, whatever was done to the first gradient; and times another upstream one."""
    x = torch.randn(rows, 8, dtype=torch.float64)
    labels = torch.arange(rows) % 8
    value, grad = fastll.cross_entropy(x, labels, reduction=reduction, return_grad=True)
    leaf = x.clone().requires_grad_()
    loss = ours.cross_entropy(leaf, labels, reduction=reduction)
    assert torch.equal(loss, value)
    for _ in range(2):
        (found,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert torch.equal(found, grad)
        found.zero_()
    loss.backward(retain_graph=True)
    leaf.grad.zero_()
    (3 * loss).backward()
    torch.testing.assert_close(leaf.grad, 3 * grad, rtol=1e-14, atol=1e-300)
