"""What only a real GPU can show: libraries, streams, graphs, memory, sizes beyond 2**31, bits."""

import os
from time import perf_counter

import ml_dtypes
import numpy as np
import pytest
from conftest import why_no_gpu

import fastll

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX shares the card
pytestmark = pytest.mark.skipif(bool(why_no_gpu()), reason=f"no GPU: {why_no_gpu()}")

BCE = fastll.binary_cross_entropy_with_logits
#: Norm of a difference over the norm: rounding to the dtype, and a few roundoffs of float32.
TOLERANCE = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 4e-3}


@pytest.fixture
def torch():
    found = pytest.importorskip("torch")
    if not found.cuda.is_available():
        pytest.skip("this torch sees no GPU")
    return found


def host(x):
    """An array of any library as float64 on the host."""
    if type(x).__module__ == "torch":
        return x.detach().cpu().double().numpy()
    if hasattr(x, "copy_to_host"):
        x = x.copy_to_host()
    return np.asarray(x.get() if type(x).__module__.startswith("cupy") else x).astype(np.float64)


def assert_close(actual, expected, dtype="float32"):
    actual, expected = host(actual), host(expected)
    assert actual.shape == expected.shape
    off = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert off < TOLERANCE[dtype], off


def logits_and_labels(rng, dtype, rows=33, classes=1001):
    x = (3 * rng.standard_normal((rows, classes))).astype(dtype)
    return x, rng.integers(0, classes, rows)


def to_torch(torch, x):
    x = np.ascontiguousarray(x)
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).cuda()
    return torch.from_numpy(x).cuda()


# libraries


def moved_by_torch(x):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch sees no GPU")
    return to_torch(torch, x)


def moved_by_cupy(x):
    return pytest.importorskip("cupy").asarray(x)


def moved_by_numba(x):
    from numba import cuda

    return cuda.to_device(x)


def moved_by_jax(x):
    jax = pytest.importorskip("jax")
    try:
        gpus = jax.devices("gpu")
    except RuntimeError as error:
        pytest.skip(f"JAX sees no GPU: {error}")
    return jax.device_put(x, gpus[0])


LIBRARIES = {
    "torch": moved_by_torch,
    "cupy": moved_by_cupy,
    "numba": moved_by_numba,
    "jax": moved_by_jax,
}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_same_library_in_and_out(rng, library, dtype):
    """Values are those of the reference; every result is an array of the library of the logits."""
    move = LIBRARIES[library]
    x, y = logits_and_labels(rng, dtype)
    t = rng.random(x.shape).astype(dtype)
    y = y.astype(np.int32)  # which JAX has without its 64 bits
    there, labels, target = move(x), move(y), move(t)
    calls = {
        "logsumexp": lambda x, y, t: fastll.logsumexp(x, axis=1),
        "softmax": lambda x, y, t: fastll.softmax(x, axis=1),
        "columns": lambda x, y, t: fastll.logsumexp(x, axis=0),
        "sigmoid": lambda x, y, t: fastll.sigmoid(x),
        "sparse": lambda x, y, t: fastll.cross_entropy(x, y, return_grad=True, return_lse=True),
        "dense": lambda x, y, t: fastll.cross_entropy(x, t, return_grad=True, reduction="sum"),
        "binary": lambda x, y, t: BCE(x, t, return_grad=True, reduction="none"),
    }
    for name, call in calls.items():
        result = call(there, labels, target)
        with fastll.use_backend("numpy"):
            expected = call(x, y, t)
        results = result if isinstance(result, tuple) else (result,)
        wanted = expected if isinstance(expected, tuple) else (expected,)
        assert len(results) == len(wanted)
        for actual, value in zip(results, wanted, strict=True):
            assert type(actual) is type(there) or library == "jax", name
            assert type(actual).__module__.split(".")[0] == type(there).__module__.split(".")[0]
            assert_close(actual, value, dtype)
    assert_close(there, x, dtype)


def test_bfloat16_of_torch(torch, rng):
    x, y = logits_and_labels(rng, ml_dtypes.bfloat16)
    loss, grad = fastll.cross_entropy(to_torch(torch, x), to_torch(torch, y), return_grad=True)
    with fastll.use_backend("numpy"):
        expected, slope = fastll.cross_entropy(x, y, return_grad=True)
    assert (loss.dtype, grad.dtype) == (torch.float32, torch.bfloat16)
    assert_close(loss, expected)
    assert_close(grad, slope, "bfloat16")


def test_an_input_that_requires_a_gradient(torch, rng):
    x, y = logits_and_labels(rng, "float32")
    there = to_torch(torch, x).requires_grad_()
    loss, grad = fastll.cross_entropy(there, to_torch(torch, y), return_grad=True)
    assert grad.device == there.device
    expected = torch.nn.functional.cross_entropy(there.double(), to_torch(torch, y))
    (slope,) = torch.autograd.grad(expected, there)
    assert_close(loss.detach(), expected)
    assert_close(grad, slope)
    assert_close(torch.autograd.grad(loss, there)[0], slope)


def test_libraries_mix(torch, rng):
    cupy = pytest.importorskip("cupy")
    x, y = logits_and_labels(rng, "float32")
    result = fastll.cross_entropy(to_torch(torch, x), cupy.asarray(y))
    assert isinstance(result, torch.Tensor)
    with fastll.use_backend("numpy"):
        assert_close(result, fastll.cross_entropy(x, y))


def test_arrays_of_the_host_beside_those_of_a_gpu(torch, rng):
    x, y = logits_and_labels(rng, "float32")
    with pytest.raises(ValueError, match="target is on cpu; expected it on cuda:0"):
        fastll.cross_entropy(to_torch(torch, x), y)


def test_a_second_device(torch, rng):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    x, y = (to_torch(torch, a).to("cuda:1") for a in logits_and_labels(rng, "float32"))
    loss, grad = fastll.cross_entropy(x, y, return_grad=True)
    assert (loss.device, grad.device) == (x.device, x.device)
    assert torch.cuda.current_device() == 0
    assert_close(loss, torch.nn.functional.cross_entropy(x.double(), y))
    with pytest.raises(ValueError, match="target is on cuda:0; expected it on cuda:1"):
        fastll.cross_entropy(x, y.to("cuda:0"))


# streams


def losses(x, y, t, grad):
    """Every kind of call: rows, columns, elements, totals; all results."""
    return (
        fastll.logsumexp(x, axis=1),
        fastll.logsumexp(x, axis=0),
        *fastll.cross_entropy(x, y, return_grad=True, return_lse=True),
        *BCE(x, t, return_grad=True, grad_out=grad),
    )


def sleep(torch):
    """Keep the current stream busy for about half a second."""
    torch.cuda._sleep(1_000_000_000)


def test_the_current_stream_is_honoured(torch, rng):
    """The logits arrive late, and the results are copied at once: only their order makes them right."""
    x, y = (to_torch(torch, a) for a in logits_and_labels(rng, "float32"))
    t, late = torch.rand_like(x), torch.zeros_like(x)
    expected = [a.clone() for a in losses(x, y, t, torch.empty_like(x))]
    grad = torch.empty_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        losses(late, y, t, grad)  # torch then has memory for this stream
        sleep(torch)
        late.copy_(x)
        results = [a.clone() for a in losses(late, y, t, grad)]
        arrived = torch.cuda.Event()
        arrived.record()
    assert not arrived.query(), "the call waited for the stream"
    stream.synchronize()
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_device(torch, rng):
    x, y = (to_torch(torch, a) for a in logits_and_labels(rng, "float32"))
    t, grad = torch.rand_like(x), torch.empty_like(x)
    losses(x, y, t, grad)  # compiles, and loads
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        start = perf_counter()
        sleep(torch)
        losses(x, y, t, grad)
        seconds = perf_counter() - start
        done.record()
        early = not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert early
    assert seconds < 0.2


def replayed(torch, call, x, late):
    """Results of a call captured with some logits and replayed with late ones, and of a plain one."""
    for _ in range(3):  # on a side stream, as graphs want it
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
    before = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    x.copy_(late)
    graph.replay()
    found = [a.clone() for a in results]
    x.copy_(late)
    expected = [a.clone() for a in call()]
    x.copy_(before)
    return found, expected


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("classes", [10, 1001, 60_000])
def test_cuda_graphs_of_cross_entropy(torch, rng, classes, in_place):
    x, y = (to_torch(torch, a) for a in logits_and_labels(rng, "float32", 33, classes))
    late, grad = torch.randn_like(x), x if in_place else torch.empty_like(x)
    found, expected = replayed(
        torch,
        lambda: fastll.cross_entropy(x, y, return_lse=True, return_grad=True, grad_out=grad),
        x,
        late,
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_cuda_graphs_of_binary_cross_entropy(torch, rng):
    x, _ = (to_torch(torch, a) for a in logits_and_labels(rng, "float32", 3000))
    t, late, grad = torch.rand_like(x), torch.randn_like(x), torch.empty_like(x)
    found, expected = replayed(torch, lambda: BCE(x, t, return_grad=True, grad_out=grad), x, late)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


# memory


@pytest.mark.parametrize("classes", [10, 5000, 200_003])
def test_extra_memory_is_of_the_order_of_rows(torch, classes):
    rows = max(64, 20_000_000 // classes)
    x = torch.randn(rows, classes, device="cuda")
    y = torch.randint(classes, (rows,), device="cuda")
    extra(torch, lambda: fastll.logsumexp(x, axis=1), 64 * rows)
    extra(torch, lambda: fastll.logsumexp(x.T, axis=0), 64 * rows)
    extra(torch, lambda: fastll.cross_entropy(x, y, return_grad=True, grad_out=x), 64 * rows)
    extra(torch, lambda: fastll.softmax(x, axis=1, out=x), 64 * rows)
    t = torch.rand_like(x)
    extra(torch, lambda: BCE(x, t, return_grad=True, grad_out=x), x.numel() // 100)


def extra(torch, call, limit):
    """Check the most bytes that a call takes for a while, beside what there was before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= limit + (64 << 10), (peak, limit)  # blocks are rounded up


def test_in_place(torch, rng):
    x, y = (to_torch(torch, a) for a in logits_and_labels(rng, "float32"))
    loss, grad = fastll.cross_entropy(x, y, return_grad=True)
    version, kept = x._version, x.clone()
    again, given = fastll.cross_entropy(x, y, return_grad=True, grad_out=x)
    assert given is x
    assert x._version > version
    assert torch.equal(loss, again)
    assert torch.equal(grad, x)
    x.copy_(kept)
    t = torch.rand_like(x)
    _, grad = BCE(x, t, return_grad=True)
    BCE(x, t, return_grad=True, grad_out=x)
    assert torch.equal(grad, x)


# sizes


def need(torch, size):
    if torch.cuda.mem_get_info()[0] < size:
        pytest.skip(f"there are no {size / 1e9:.0f} GB free")


def filled(torch, *shape, dtype=None):
    x = torch.empty(shape, dtype=dtype or torch.bfloat16, device="cuda")
    return x.normal_()


def test_rows_beyond_2_to_the_31(torch):
    """The last rows have the results that they have alone."""
    need(torch, 14e9)
    x = filled(torch, 65_600, 32_768)
    assert x.numel() > 2**31
    y = torch.randint(32_768, (len(x),), device="cuda")
    last = slice(len(x) - 5, None)
    kept = x[last].clone()
    options = {"reduction": "none", "return_lse": True, "return_grad": True}
    expected = fastll.cross_entropy(kept, y[last], **options)
    lse = fastll.logsumexp(x, axis=1)
    loss, lse_too, grad = fastll.cross_entropy(x, y, grad_out=x, **options)
    assert torch.equal(lse, lse_too)
    for a, b in zip((loss[last], lse[last], grad[last]), expected, strict=True):
        assert torch.equal(a, b)
    assert_close(expected[1], torch.logsumexp(kept.double(), 1))


def test_elements_beyond_2_to_the_31(torch):
    need(torch, 14e9)
    x = filled(torch, 2**31 + 12_345)
    t = torch.rand(4096, device="cuda").to(x.dtype)
    target = t.repeat(-(-len(x) // len(t)))[: len(x)]
    kept = x[-4096:].clone()
    loss, grad = BCE(x, target, reduction="sum", return_grad=True, grad_out=x)
    _, expected = BCE(kept, target[-4096:].clone(), reduction="sum", return_grad=True)
    assert torch.isfinite(loss)
    assert torch.equal(grad[-4096:], expected)


def test_one_row_beyond_2_to_the_31(torch):
    need(torch, 6e9)
    x = torch.zeros(1, 2**31 + 7, dtype=torch.bfloat16, device="cuda")
    x[0, -1] = 30
    expected = np.log(x.shape[1] - 1 + np.exp(30.0))
    assert_close(fastll.logsumexp(x, axis=1), [expected])


def test_columns_beyond_2_to_the_31(torch):
    need(torch, 6e9)
    x = torch.zeros(70_000, 31_000, dtype=torch.bfloat16, device="cuda")
    x[-1] = 20
    expected = np.full(31_000, np.log(69_999 + np.exp(20.0)))
    assert_close(fastll.logsumexp(x, axis=0), expected)


# bits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("classes", [10, 300, 1001, 12_345, 50_257, 140_000, 300_001])
def test_bits_do_not_depend_on_the_batch(torch, classes, dtype):
    x = filled(torch, 70, classes, dtype=getattr(torch, dtype))
    y = torch.randint(classes, (70,), device="cuda")
    options = {"reduction": "none", "return_lse": True, "return_grad": True}
    whole = fastll.cross_entropy(x, y, **options)
    for part in (slice(0, 1), slice(13, 14), slice(3, 40), slice(0, 70)):
        for a, b in zip(whole, fastll.cross_entropy(x[part], y[part], **options), strict=True):
            assert torch.equal(a[part], b)
        assert torch.equal(fastll.logsumexp(x[part], axis=1), whole[1][part])
    mean = fastll.cross_entropy(x, y)
    assert all(torch.equal(mean, fastll.cross_entropy(x, y)) for _ in range(5))
    assert_close(whole[1], torch.logsumexp(x.double(), 1))


# labels


def test_labels_out_of_range(torch, rng):
    x, y = (to_torch(torch, a) for a in logits_and_labels(rng, "float32"))
    y[3], y[5] = 1001, -100
    loss, grad = fastll.cross_entropy(x, y, reduction="none", return_grad=True)
    assert torch.isnan(loss).nonzero().tolist() == [[3]]
    assert torch.isnan(grad).any(1).nonzero().tolist() == [[3]]
    assert loss[5] == 0
    assert not grad[5].any()
    assert torch.isnan(fastll.cross_entropy(x, y))
    with (
        fastll.debug_labels(),
        pytest.raises(IndexError, match=r"label 1001 at \(3,\); expected 0 <= label < 1001"),
    ):
        fastll.cross_entropy(x, y)


# the speed of a call


def test_a_small_call_is_launched_quickly(torch, rng):
    """Far from the 15 us that `python -m bench` looks for, and far below what compiling would take."""
    x = to_torch(torch, logits_and_labels(rng, "float32", 32, 1000)[0])
    fastll.logsumexp(x, axis=1)
    torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(100):
        fastll.logsumexp(x, axis=1)
    seconds = (perf_counter() - start) / 100
    torch.cuda.synchronize()
    assert seconds < 2e-4
