"""What brings the tests' arrays to a GPU and back, with the emulator's memory behind the driver."""

import gc

import ml_dtypes
import numpy as np
import pytest
from conftest import require_numba_cuda
from table import LAYOUTS

import fastll


@pytest.fixture
def real(monkeypatch):
    """A `Real` device whose driver and kernels are the emulator's."""
    require_numba_cuda()
    import device

    from fastll.backend.cuda import launch

    emulated = device.emulated()
    made = device.Real(device.Driver(emulated.memory))
    monkeypatch.setattr(launch, "gpu", lambda index: emulated)
    monkeypatch.setattr(device, "gpu", lambda: made)
    before = set(emulated.memory.sizes)
    yield device
    if not before.issuperset(emulated.memory.sizes):
        gc.collect()  # compiling leaves cycles that hold the arrays of the call
    assert before.issuperset(emulated.memory.sizes)  # all is given back


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(real, rng, layout, dtype):
    x = LAYOUTS[layout](rng.standard_normal((5, 7)).astype(dtype))
    before = x.copy()
    memory = real.gpu()
    if x.dtype.isnative:
        there = memory.to_device(x)
        assert there.geometry.strides == x.strides
        np.testing.assert_array_equal(memory.contents(there), x)
    result = real.on_device(fastll.logsumexp)(x, axis=1)
    expected = fastll.logsumexp(x.astype(np.float64), axis=1)
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    np.testing.assert_array_equal(x, before)


def test_outputs(real, rng):
    x, grad = rng.standard_normal((2, 5, 7))
    y = np.arange(5)
    loss, returned = real.on_device(fastll.cross_entropy)(x, y, return_grad=True, grad_out=grad)
    expected, slope = fastll.cross_entropy(x, y, return_grad=True)
    assert returned is grad
    np.testing.assert_allclose([loss], [expected])
    np.testing.assert_allclose(grad, slope, atol=1e-15)


def test_new_memory_is_nan(real):
    memory = real.gpu()
    new = memory.empty((3, 4), np.dtype(np.float32), memory.device(None), (1, 0))
    assert new.strides == (4, 12)
    assert np.isnan(memory.contents(memory.give(new))).all()
    assert memory.contents(memory.to_device(np.empty((3, 0)))).shape == (3, 0)
