"""Arrays of other libraries: taken as they are, and the result where and as the first one is."""

import copy
import pickle
import re
import sys
import weakref
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import fakes
import ml_dtypes
import numpy as np
import pytest
from fakes import CupyArray, Interface
from test_processes import run

import fastll
from fastll import LogSumExp, NegativeLogLikelihood, array_libraries, dispatch, layout
from fastll.array_libraries import CPU, Device, DeviceView, device_view
from fastll.arrays import HOST, place_of
from fastll.dtypes import BFLOAT16, as_floats, kind_of, rounded
from fastll.operations import OPERATIONS


@pytest.fixture
def gpu(monkeypatch):
    with fakes.installed(monkeypatch) as gpu:
        yield gpu


def call(name, rng, shape=(3, 7), axis=1, dtype=np.float32):
    """(function, arrays, options) of an operation, with all that it can return."""
    operation = OPERATIONS[name]
    options = operation.keywords(rng, shape, axis, dtype, {})
    if operation.gradient:
        options["return_grad"] = True
    return operation.function, operation.make(rng, shape, axis, dtype), options


def parts_of(result):
    return result if isinstance(result, tuple) else (result,)


def assert_same(results, expected, to_numpy, **tolerance):
    for result, value in zip(parts_of(results), parts_of(expected), strict=True):
        result = to_numpy(result)
        assert result.dtype == value.dtype
        assert result.shape == value.shape
        np.testing.assert_allclose(result.astype(float), np.asarray(value).astype(float), **tolerance)


# The CPU


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def jax():
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    return jax


def skip_integers(name, dtype):
    """A target of `nll_loss` that is not floating is one of labels."""
    if name == "dense_nll_loss" and dtype in ("int16", "int32", "bool"):
        pytest.skip("integers are labels")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "bool"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_torch(torch, rng, name, dtype):
    skip_integers(name, dtype)
    function, arrays, options = call(name, rng, dtype=dtype)
    result = function(*map(torch.from_numpy, arrays), **options)
    assert all(type(part) is torch.Tensor for part in parts_of(result))
    assert_same(result, function(*arrays, **options), lambda t: t.numpy(), rtol=0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_jax(jax, rng, name):
    function, arrays, options = call(name, rng)
    result = function(*map(jax.numpy.asarray, arrays), **options)
    assert all(isinstance(part, jax.Array) for part in parts_of(result))
    assert_same(result, function(*arrays, **options), np.asarray, rtol=0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_bfloat16(torch, backend, rng, name):
    """torch's, in a dtype of our own, and that of ml_dtypes come to the same bits."""
    function, arrays, options = call(name, rng, dtype=ml_dtypes.bfloat16)
    tensors = [
        torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        if a.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(a)
        for a in arrays
    ]
    result = parts_of(function(*tensors, **options))
    for part, value in zip(result, parts_of(function(*arrays, **options)), strict=True):
        assert str(part.dtype) == f"torch.{value.dtype}"
        np.testing.assert_array_equal(part.double().numpy(), value.astype(np.float64))


def test_jax_bfloat16(jax, rng):
    x = jax.numpy.asarray(rng.standard_normal((3, 8)), dtype=jax.numpy.bfloat16)
    result = fastll.softmax(x)
    assert result.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(result), fastll.softmax(np.asarray(x)))


def test_our_bfloat16_rounds_as_ml_dtypes_does(rng):
    x = np.concatenate([rng.standard_normal(1000) * 10.0 ** rng.integers(-45, 39, 1000)])
    x = np.concatenate([x, [0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45]])
    theirs = x.astype(ml_dtypes.bfloat16)
    with np.errstate(over="ignore"):
        ours = rounded(x, BFLOAT16)
    np.testing.assert_array_equal(as_floats(ours), theirs.astype(float))
    assert kind_of(BFLOAT16)._replace(element=theirs.dtype) == kind_of(theirs.dtype)
    with pytest.raises(TypeError, match="out has dtype bfloat16; expected float32"):
        fastll.softmax(np.zeros(3, np.float32), out=np.zeros(3, BFLOAT16))


def test_torch_outputs(torch, rng):
    x = torch.from_numpy(rng.standard_normal((3, 5)))
    y = torch.tensor([0, 4, -100])
    expected = fastll.softmax(x.numpy())
    assert fastll.softmax(x, out=x) is x
    np.testing.assert_array_equal(x.numpy(), expected)
    _, lse, grad = fastll.cross_entropy(x, y, return_lse=True, return_grad=True, grad_out=x)
    assert grad is x
    assert lse.dtype == torch.float64
    out = torch.empty((3, 1), dtype=torch.bfloat16)
    assert fastll.logsumexp(x, axis=1, keepdims=True, out=out) is out
    np.testing.assert_allclose(out[:, 0].double(), torch.logsumexp(x, 1), rtol=2**-8)
    with pytest.raises(ValueError, match="grad_out has several elements at one address"):
        fastll.cross_entropy(x, y, grad_out=torch.zeros(5, dtype=torch.float64).expand(3, 5))
    with pytest.raises(ValueError, match="out shares memory"):
        fastll.softmax(x, out=x.flatten()[:15].view(5, 3).T)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages"
)
def test_torch_results_in_huge_pages(torch):
    """Large results are asked for in huge pages, as NumPy's arrays are."""
    result = fastll.softmax(torch.zeros(1, 1 << 22))
    address = result.data_ptr() + (1 << 23)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            start, stop = (int(part, 16) for part in line.split()[0].split("-"))
        elif line.startswith("VmFlags:") and start <= address < stop:
            assert "hg" in line.split()
            break
    else:
        pytest.fail("the result is in no map")


def test_torch_tensors_that_autograd_knows(torch):
    x = torch.zeros(2, 3, requires_grad=True)  # see tests/interop/test_torch_adapter.py
    squared = (y := x * 1) * y
    with torch.no_grad():
        fastll.softmax(y, out=y)  # which the backward pass needs
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


def test_torch_layout(torch, rng):
    x = torch.from_numpy(rng.standard_normal((2, 6, 4))).permute(2, 0, 1)
    for result in (fastll.softmax(x), fastll.cross_entropy(x, x, return_grad=True)[1]):
        assert result.stride() == x.stride()
    np.testing.assert_array_equal(fastll.softmax(x, axis=0), fastll.softmax(x.numpy(), axis=0))


def test_torch_tensors_without_elements_to_read(torch):
    x = torch.zeros(2, 3)
    with pytest.raises(
        TypeError, match=r"x has dtype torch\.complex64; fastll takes float16, bfloat16"
    ):
        fastll.softmax(x.to(torch.complex64))
    with pytest.raises(TypeError, match=r"x has layout torch\.sparse_coo"):
        fastll.softmax(x.to_sparse())
    with pytest.raises(TypeError, match="meta"):
        fastll.softmax(x.to("meta"))
    with pytest.raises(TypeError, match="x is a negated view"):
        fastll.softmax(torch.zeros(2, dtype=torch.complex64).conj().imag)


def test_libraries_mix_on_the_cpu(torch, rng):
    x, y = rng.standard_normal((3, 5)), np.array([0, 4, 2])
    expected = fastll.cross_entropy(x, y)
    for target in (y, [0, 4, 2], torch.from_numpy(y)):
        result = fastll.cross_entropy(torch.from_numpy(x), target)
        assert isinstance(result, torch.Tensor)
        assert result == expected
    weight = torch.ones(5, dtype=torch.bfloat16)
    result = fastll.cross_entropy(x, torch.from_numpy(y), weight=weight)
    assert isinstance(result, np.float64)
    assert result == expected


def test_torch_scalars(torch):
    assert fastll.sigmoid(torch.tensor(0.0)).shape == ()
    assert fastll.logsumexp(torch.zeros(2, 2)).shape == ()
    loss, grad = fastll.binary_cross_entropy_with_logits(
        torch.tensor(0.0), torch.tensor(1.0), return_grad=True
    )
    assert (loss.shape, grad.shape) == ((), ())
    assert fastll.softmax(torch.zeros(0, 3)).shape == (0, 3)


def test_jax_arrays_are_not_written(jax):
    x = jax.numpy.zeros((2, 3))
    with pytest.raises(TypeError, match="out is an array of jax, which cannot be written"):
        fastll.softmax(x, out=x)
    with pytest.raises(TypeError, match="grad_out is an array of jax"):
        fastll.cross_entropy(x, [0, 1], grad_out=x)
    with pytest.raises(TypeError, match="traced array"):
        jax.jit(fastll.softmax)(x)


def test_results_are_handed_over_without_a_copy(jax, monkeypatch):
    given = []
    place = type(place_of(jax.numpy.zeros(3)))
    give = place.give
    monkeypatch.setattr(place, "give", lambda self, view: given.append(view) or give(self, view))
    result = fastll.softmax(jax.numpy.zeros((100, 100)))
    assert result.unsafe_buffer_pointer() == given[0].ctypes.data


def test_streaming_torch(torch, rng):
    x = torch.from_numpy(rng.standard_normal((3, 8)))
    acc = LogSumExp(3).update(x[:, :3]).update(x.numpy()[:, 3:])
    assert isinstance(acc.value, torch.Tensor)
    np.testing.assert_allclose(acc.value, torch.logsumexp(x, 1), rtol=1e-14)
    again = LogSumExp.from_state(acc.state)
    assert isinstance(again.value, torch.Tensor)
    np.testing.assert_array_equal(again.value, acc.value)
    merged = LogSumExp(3).merge(acc)
    assert isinstance(merged.value, torch.Tensor)
    assert isinstance(pickle.loads(pickle.dumps(acc)).value, np.ndarray)


def test_likelihoods_torch(torch, rng):
    x, y = rng.standard_normal((2, 3, 8)), rng.integers(0, 8, (2, 3))
    there = torch.from_numpy(x), torch.from_numpy(y)
    for function in (fastll.sequence_log_likelihood, fastll.perplexity):
        result = function(*there)
        assert isinstance(result, torch.Tensor)
        np.testing.assert_array_equal(result, function(x, y))
    mixed = NegativeLogLikelihood().update(there[0][:1], there[1][:1]).update(x[1:], y[1:])
    assert mixed.mean == NegativeLogLikelihood().update(x[:1], y[:1]).update(x[1:], y[1:]).mean


class OnCPU:
    """An array of an unknown library with DLPack."""

    def __init__(self, memory):
        self.memory = memory

    def __dlpack__(self, **options):
        return self.memory.__dlpack__(**options)

    def __dlpack_device__(self):
        return 1, 0


def test_dlpack(rng):
    x = rng.standard_normal((3, 5))
    np.testing.assert_array_equal(fastll.softmax(OnCPU(x)), fastll.softmax(x))
    assert fastll.softmax(OnCPU(x), out=OnCPU(x)).memory is x
    with pytest.raises(TypeError, match="x has dtype complex128"):
        fastll.softmax(OnCPU(x.astype(complex)))


def test_nothing_is_imported_for_numpy():
    loaded = run(
        """
        import sys, numpy as np, fastll
        x = np.zeros((4, 10), np.float32)
        fastll.cross_entropy(x, [1, 2, 3, 4], return_grad=True)
        fastll.LogSumExp().update([1.0]).value
        fastll.softmax(np.matrix(x)), fastll.sigmoid(np.float32(1))
        heavy = ("torch", "jax", "cupy", "numba", "cuda", "fastll.array_libraries.dlpack")
        print([name for name in heavy if name in sys.modules])
        """
    )
    assert loaded == "[]"


# A GPU that is not there


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    "dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64", "int16"], ids=str
)
def test_on_gpu(gpu, rng, name, dtype):
    skip_integers(name, dtype)
    for shape, axis in (((3, 7), 1), ((7, 3), 0), ((2, 5, 3), 1)):
        function, arrays, options = call(name, rng, shape, axis, dtype)
        with fastll.use_backend("numpy"):
            expected = function(*arrays, **options)
        result = function(*map(CupyArray, arrays), **options)
        assert all(type(part) is CupyArray for part in parts_of(result))
        assert_same(result, expected, lambda a: a.memory, rtol=1e-6)


def test_device_and_stream(gpu):
    gpu.stream = 7
    x = CupyArray(np.zeros((2, 3)), index=1)
    for result in parts_of(fastll.cross_entropy(x, x, reduction="none", return_grad=True)):
        assert result.device.id == 1
    assert gpu.bound == [(1, 107)]
    assert str(place_of(x).device) == "cuda:1"
    assert str(HOST.device) == "cpu"
    assert gpu.ordered == []


def test_arrays_on_different_devices(gpu):
    x = CupyArray(np.zeros((2, 3)))
    y = CupyArray(np.zeros(2, int), index=1)
    with pytest.raises(ValueError, match="target is on cuda:1; expected it on cuda:0"):
        fastll.cross_entropy(x, y)
    for labels in ([0, 1], np.zeros(2, int)):
        with pytest.raises(ValueError, match="target is on cpu; expected it on cuda:0"):
            fastll.cross_entropy(x, labels)
    with pytest.raises(ValueError, match="target is on cuda:1; expected it on cpu"):
        fastll.cross_entropy(np.zeros((2, 3)), y)
    with pytest.raises(ValueError, match="weight is on cpu"):
        fastll.cross_entropy(x, CupyArray(np.zeros(2, int)), weight=np.ones(3))
    with pytest.raises(ValueError, match="pos_weight is on cpu"):
        fastll.binary_cross_entropy_with_logits(x, x, pos_weight=2.0)
    with pytest.raises(ValueError, match="out is on cpu; expected it on cuda:0"):
        fastll.softmax(x, out=np.zeros((2, 3)))
    assert gpu.bound == []


def test_strict_choice(gpu):
    x = CupyArray(np.zeros((2, 3)))
    for name in ("numpy", "numba", "cython"):
        with (
            fastll.use_backend(name),
            pytest.raises(NotImplementedError, match=f"'{name}' does not take arrays on cuda:0"),
        ):
            fastll.softmax(x)
    with fastll.use_backend("cuda"):
        assert fastll.softmax(x).shape == (2, 3)
        with pytest.raises(NotImplementedError, match="'cuda' does not take arrays on the CPU"):
            fastll.softmax(np.zeros((2, 3)))


def test_outputs_on_gpu(gpu, rng):
    memory = rng.standard_normal((4, 6))
    x, y = CupyArray(memory.copy()), CupyArray(np.array([0, 5, -100, 3]))
    assert fastll.softmax(x, out=x) is x
    np.testing.assert_allclose(x.memory, fastll.softmax(memory), rtol=1e-15)
    assert fastll.cross_entropy(x, y, return_grad=True, grad_out=x)[1] is x
    wide = np.zeros((4, 2, 3))
    for keepdims, out in ((True, wide[:, :1, 0:1]), (False, wide[:, 0, 1]), (True, wide[::-1, 1:, 2:])):
        shape = (4, 1, 1) if keepdims else (4,)
        out = CupyArray(out.reshape(shape) if keepdims else out)
        a = CupyArray(memory.reshape(4, 2, 3))
        assert fastll.logsumexp(a, axis=(1, 2), keepdims=keepdims, out=out) is out
        np.testing.assert_allclose(out.memory.ravel(), fastll.logsumexp(memory, axis=1), rtol=1e-15)
    # over axes between which another one is, into an output with strides
    out = CupyArray(np.zeros((2, 5))[:, ::3])
    fastll.logsumexp(CupyArray(memory.reshape(2, 2, 2, 3)), axis=(1, 3), out=out)
    expected = fastll.logsumexp(memory.reshape(2, 2, 2, 3), axis=(1, 3))
    np.testing.assert_allclose(out.memory, expected, rtol=1e-15)
    with pytest.raises(TypeError, match="out has dtype float32; expected float64"):
        fastll.logsumexp(x, axis=1, out=CupyArray(np.zeros(4, np.float32)))
    with pytest.raises(TypeError, match="grad_out is a list; expected an array"):
        fastll.cross_entropy(np.zeros((2, 3)), [0, 1], grad_out=[1])
    with pytest.raises(ValueError, match="out shares memory"):
        fastll.softmax(x, out=CupyArray(x.memory[::-1]))


def test_options_on_gpu(gpu, rng):
    x, y = rng.standard_normal((6, 4)).astype(np.float32), np.array([0, 3, 9, 1, 2, 0], np.uint8)
    weight = rng.random(8)[::2]
    options = {"ignore_index": 9, "label_smoothing": 0.1, "return_lse": True, "return_grad": True}
    for reduction in ("mean", "sum", "none"):
        with fastll.use_backend("numpy"):
            expected = fastll.cross_entropy(x, y, weight=weight, reduction=reduction, **options)
        result = fastll.cross_entropy(
            *map(CupyArray, (x, y)), weight=CupyArray(weight), reduction=reduction, **options
        )
        assert_same(result, expected, lambda a: a.memory, rtol=1e-6)
    nothing = fastll.cross_entropy(CupyArray(x), CupyArray(np.full(6, -100)), return_grad=True)
    assert np.isnan(nothing[0].memory)
    with pytest.raises(
        ValueError, match=r"weight has shape \(3,\); expected one weight per class, \(4,\)"
    ):
        fastll.cross_entropy(CupyArray(x), CupyArray(y), weight=CupyArray(np.ones(3)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_binary_in_pieces_on_gpu(gpu, rng, reduction):
    x = rng.standard_normal((3, 4, 5, 6))[::2, ::3, ::2, ::-1]
    t = rng.random((3, 4, 5, 6))[::2, ::3, ::2]
    assert len(layout.elements((x, t), None, None, None)) > 1
    expected = fastll.binary_cross_entropy_with_logits(x, t, reduction=reduction, return_grad=True)
    result = fastll.binary_cross_entropy_with_logits(
        CupyArray(x), CupyArray(t), reduction=reduction, return_grad=True
    )
    assert_same(result, expected, lambda a: a.memory, rtol=1e-13)


def test_labels_on_gpu(gpu):
    x, y = CupyArray(np.zeros((2, 2, 3))), CupyArray(np.array([[0, 1], [5, -100]], np.int16).T)
    assert not dispatch.debugging_labels()
    with fastll.debug_labels():
        assert dispatch.debugging_labels()
        with pytest.raises(
            IndexError, match=r"target has label 5 at \(0, 1\); expected 0 <= label < 3"
        ):
            fastll.cross_entropy(x, y)
    assert not dispatch.debugging_labels()
    assert (
        run("from fastll import dispatch as d; print(d.debugging_labels())", FASTLL_DEBUG_LABELS="1")
        == "True"
    )


def test_debug_labels_is_of_one_task():
    import asyncio

    async def debugging():
        with fastll.debug_labels():
            await asyncio.sleep(0.01)
            return dispatch.debugging_labels()

    async def plain():
        await asyncio.sleep(0.005)
        return dispatch.debugging_labels()

    async def main():
        return await asyncio.gather(debugging(), plain())

    assert asyncio.run(main()) == [True, False]


def test_streaming_on_gpu(gpu, rng):
    x = rng.standard_normal((3, 8))
    whole = LogSumExp(3).update(CupyArray(x))
    parts = LogSumExp(3).update(CupyArray(x[:, :5])).merge(LogSumExp(3).update(CupyArray(x[:, 5:])))
    moved = LogSumExp.from_state(whole.state)
    for acc in (whole, parts, moved, LogSumExp(3).merge(parts), parts.merge(LogSumExp(3))):
        assert type(acc.value) is CupyArray
        np.testing.assert_allclose(acc.value.memory, fastll.logsumexp(x, axis=1), rtol=1e-14)
    m, s = moved.state
    np.testing.assert_array_equal(m.memory, x.max(axis=1))
    np.testing.assert_allclose(m.memory + np.log(s.memory), fastll.logsumexp(x, axis=1), rtol=1e-14)
    before = m.memory.copy()
    moved.update(CupyArray(x + 1))
    np.testing.assert_array_equal(m.memory, before)
    on_host = LogSumExp(3).update(x)
    with pytest.raises(ValueError, match="x is on cpu; expected it on cuda:0"):
        whole.update(x)
    with pytest.raises(ValueError, match="other is on cpu; expected it on cuda:0"):
        whole.merge(on_host)
    with pytest.raises(ValueError, match="other is on cuda:0; expected it on cpu"):
        on_host.merge(whole)
    with pytest.raises(TypeError, match="the state is on cuda:0; only one on the CPU can be pickled"):
        pickle.dumps(whole)


def test_likelihoods_on_gpu(gpu, rng, monkeypatch):
    x, y = rng.standard_normal((2, 3, 8)), rng.integers(0, 8, (2, 3))
    y[0, 1] = -100
    for function in (fastll.sequence_log_likelihood, fastll.perplexity):
        result = function(CupyArray(x), CupyArray(y))
        assert type(result) is CupyArray
        np.testing.assert_allclose(result.memory, function(x, y), rtol=1e-14)
    expected = NegativeLogLikelihood().update(x, y)

    def waits(self, a):
        raise AssertionError("an update waits")

    for second in (0, 1):  # on one device, and on two
        acc = NegativeLogLikelihood()
        with monkeypatch.context() as without:
            without.setattr(fakes.Backend, "read", waits)
            acc.update(CupyArray(x[:1]), CupyArray(y[:1]))
            acc.update(CupyArray(x[1:], second), CupyArray(y[1:], second))
        assert acc.count == expected.count == 5
        assert acc.mean == pytest.approx(expected.mean, rel=1e-14)
        assert pickle.loads(pickle.dumps(acc)).sum == acc.sum
        copied = copy.copy(acc).update(CupyArray(x), CupyArray(y)).update(x, y)
        assert (copied.count, acc.count) == (15, 5)
        assert NegativeLogLikelihood().update(x, y).merge(acc).count == 10
        assert acc.merge(acc).count == 10
    dense = NegativeLogLikelihood().update(CupyArray(x), CupyArray(x), weight=CupyArray(np.ones(8)))
    assert dense.count == 6


# Protocols


def test_cuda_array_interface(gpu, rng):
    x = rng.standard_normal((3, 4)).astype(np.float32)
    out = CupyArray(np.zeros((3, 4), np.float32))
    array = Interface(x[:, ::-1], stream=5)
    assert fastll.softmax(array, out=out) is out
    assert gpu.bound == [(0, 5)]
    np.testing.assert_allclose(out.memory, fastll.softmax(x[:, ::-1]), rtol=1e-6)
    assert gpu.ordered == [(0, 0, 5)]  # what was asked of the output before
    with pytest.raises(ValueError, match="out is read-only"):
        fastll.softmax(array, out=Interface(x.copy(), read_only=True))
    with pytest.raises(TypeError, match="x has a mask"):
        fastll.softmax(Interface(x, mask=array))
    with pytest.raises(TypeError, match="x has dtype complex64"):
        fastll.softmax(Interface(x.astype(complex).astype(np.complex64)))


def test_streams_of_two_libraries_are_ordered(gpu):
    gpu.stream = 3
    x, y = CupyArray(np.zeros((2, 3))), np.zeros(2, int)
    fastll.cross_entropy(x, Interface(y, stream=9))
    fastll.cross_entropy(x, Interface(y))
    fastll.cross_entropy(x, CupyArray(y))
    assert gpu.ordered == [(0, 9, 3)]
    fastll.softmax(Interface(np.zeros((2, 3)), stream=4), out=x)
    assert gpu.ordered == [(0, 9, 3), (0, 3, 4)]


class OnGPU(Interface):
    """An array on the fake GPU by DLPack, like one of JAX."""

    asked = ()

    def __array_namespace__(self):
        return SimpleNamespace(from_dlpack=lambda buffer: buffer)

    def __dlpack__(self, *, stream):
        self.asked = *self.asked, stream


@pytest.fixture
def dlpack(gpu, monkeypatch):
    """What `cuda.core` makes of such an array."""

    class StridedMemoryView:
        def __init__(self, x, stream):
            x.__dlpack__(stream=stream)
            self.exporting = x
            self.ptr, self.shape, self.dtype = x.memory.ctypes.data, x.memory.shape, x.memory.dtype
            self.strides, self.readonly = None, False

    utils = fakes.module("cuda.core.utils", StridedMemoryView=StridedMemoryView)
    for name in ("cuda", "cuda.core"):
        monkeypatch.setitem(sys.modules, name, fakes.module(name))
    monkeypatch.setitem(sys.modules, "cuda.core.utils", utils)


def test_dlpack_is_asked_to_order(gpu, dlpack):
    gpu.stream = 3
    y = OnGPU(np.zeros(2, int))
    fastll.cross_entropy(CupyArray(np.zeros((2, 3))), y)
    assert y.asked == (1, 3)


@pytest.mark.parametrize("kind", [OnGPU, Interface])
def test_memory_is_kept_while_work_is_queued(gpu, dlpack, kind):
    """Of an array that nobody else has any more, until its stream has come that far."""
    from fastll.array_libraries.dlpack import _waiting

    gpu.stream = 3
    x = CupyArray(np.zeros((2, 3)))

    def call():
        y = kind(np.zeros(2, int))
        fastll.cross_entropy(x, y)
        return weakref.ref(y)

    gpu.busy = True
    first, second = call(), call()
    assert gpu.submitted == [(0, 3)] * 2  # by the stream of the call
    assert first() is not None
    assert second() is not None
    gpu.busy = False
    third = call()
    assert not any((first(), second(), third()))
    assert not _waiting
    # of the first array, by its own; and outputs
    gpu.submitted.clear()
    fastll.logsumexp(kind(np.zeros((2, 3)), stream=5), 1, out=kind(np.zeros(2)))
    assert sorted(gpu.submitted) == [(0, 0 if kind is OnGPU else 5)] * 2


def test_what_cannot_be_asked_is_not_kept(gpu, dlpack, monkeypatch):
    """As while a graph is captured, or at the end of the process."""

    def broken(device, stream):
        raise RuntimeError("no driver")

    for submitted in (lambda device, stream: None, broken):
        monkeypatch.setattr(array_libraries, "submitted", submitted)
        y = OnGPU(np.zeros(2, int))
        known = weakref.ref(y)
        fastll.cross_entropy(CupyArray(np.zeros((2, 3))), y)
        del y
        assert known() is None


def test_asking_breaks_no_capture(monkeypatch):
    """The driver is told that the thread may ask while another one captures a graph."""
    pytest.importorskip("numba_cuda")
    from cuda.bindings import driver
    from numba import cuda

    modes, capturing, answers = ["strict"], 0, [False, True]
    event = SimpleNamespace(record=lambda stream: None, query=lambda: answers.pop(0))

    def exchanged(mode):
        modes.append(mode)
        return 0, modes[-2]

    monkeypatch.setattr(driver, "cuStreamIsCapturing", lambda stream: (0, capturing))
    monkeypatch.setattr(driver, "cuThreadExchangeStreamCaptureMode", exchanged)
    monkeypatch.setattr(cuda, "gpus", {1: nullcontext()})
    monkeypatch.setattr(cuda, "event", lambda timing: event)
    monkeypatch.setattr(cuda, "external_stream", lambda stream: stream)
    done = array_libraries.submitted(Device("cuda", 1), 7)
    assert (done(), done()) == (False, True)
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    assert modes == ["strict", relaxed, "strict", relaxed, "strict"]
    capturing = 1
    assert array_libraries.submitted(Device("cuda", 1), 7) is None


@pytest.mark.parametrize(("code", "name"), [(8, "metal:0"), (10, "rocm:0"), (99, "DLPack device 99:0")])
def test_other_devices(code, name):
    class Elsewhere:
        def __dlpack_device__(self):
            return code, 0

    with pytest.raises(NotImplementedError, match=f"is on {name}, which has no backend"):
        fastll.softmax(Elsewhere())


def test_without_numba_cuda(monkeypatch):
    advice = r'needs the package numba-cuda: pip install "fastll\[cuda12\]" or "fastll\[cuda13\]"'
    monkeypatch.setitem(sys.modules, "fastll.backend.cuda", None)
    monkeypatch.setattr(dispatch, "_import", cache(dispatch._import.__wrapped__))
    with pytest.raises(RuntimeError, match=f"an array on cuda:0 {advice}"):
        fastll.cross_entropy(Interface(np.zeros((2, 3))), Interface(np.zeros((2, 3))), reduction="sum")
    assert not fastll.backends()["cuda"].available
    monkeypatch.setitem(sys.modules, "cuda.core.utils", None)

    class WithoutDevice:
        __cuda_array_interface__ = None

    with pytest.raises(RuntimeError, match=f"WithoutDevice on a GPU {advice}"):
        fastll.softmax(WithoutDevice())


def test_availability_of_the_gpu(gpu):
    assert fastll.backends()["cuda"].available
    sys.modules["fastll.backend.cuda"].why_not = lambda: "no GPU is visible"
    assert fastll.backends()["cuda"][:2] == (False, "no GPU is visible")


def test_simulator():
    """Numba's device arrays by its simulator, also as the results for an unknown library."""
    pytest.importorskip("numba")
    printed = run(
        """
        import sys
        sys.path.insert(0, "tests")
        import fakes, numpy as np, fastll
        gpu = fakes.GPU()
        sys.modules["fastll.backend.cuda"] = fakes.module("fastll.backend.cuda", bind=gpu.bind)
        from numba import cuda
        x = np.arange(12.0).reshape(3, 4)
        for array in (cuda.to_device(x), fakes.Interface(x), cuda.to_device(x.T.copy()).transpose()):
            result = fastll.softmax(array)
            assert type(result).__name__ == "FakeCUDAArray", type(result)
            np.testing.assert_allclose(result.copy_to_host(), fastll.softmax(x), rtol=1e-14)
            if hasattr(array, "strides"):
                assert result.strides == array.strides
        print(gpu.bound)
        """,
        NUMBA_ENABLE_CUDASIM="1",
    )
    assert printed == "[(0, 0), (0, 0), (0, 0)]"


# The view of an array that is elsewhere


@pytest.fixture
def elsewhere():
    """The view of an address that nobody has."""
    return device_view(0x10, (3, 4), (32, 8), np.dtype(np.float64), None)


def test_device_views_touch_nothing(elsewhere):
    v = elsewhere
    for view in (
        v[1:, None],
        v[0],
        v[0, 1],
        v.T,
        v[:, :2],
        v.reshape(12),
        np.broadcast_to(v, (2, 3, 4), subok=True),
        layout._view(v, 0, [layout._Group(3, (32,))], 1),
    ):
        assert type(view) is DeviceView
        assert view.owner is None
    assert not np.may_share_memory(v, v[:0])
    assert np.shares_memory(v, v)
    assert repr(v) == f"{v}" == "DeviceView(shape=(3, 4), dtype=float64, address=0x10)"
    for touch in (
        lambda: v + 1,
        lambda: np.exp(v),
        lambda: v == v,
        lambda: np.add.reduce(v),
        lambda: v.sum(),
        lambda: np.sum(v),
        lambda: np.copyto(v, 0),
        lambda: np.concatenate([v, v]),
        lambda: v[v.shape[0] - 1, [0, 1]],
        lambda: v.__setitem__(0, 1),
        lambda: v.copy(),
        lambda: v.astype(np.float32),
        lambda: v.T.reshape(12),
        lambda: v.tolist(),
        lambda: float(v[0, 0]),
        lambda: list(v),
        lambda: pickle.dumps(v),
    ):
        with pytest.raises(TypeError):
            touch()


def test_geometry_of_device_views():
    read_only = device_view(0x40, (2, 3), (-8, 16), BFLOAT16, "owner", writeable=False)
    assert (read_only.strides, read_only.dtype, read_only.owner) == ((-8, 16), BFLOAT16, "owner")
    assert not read_only.flags.writeable
    assert device_view(0, (0, 3), None, np.dtype("f4"), None).shape == (0, 3)
    assert device_view(0x40, (), (), np.dtype("f4"), None).shape == ()
    assert Device("cpu") == CPU
