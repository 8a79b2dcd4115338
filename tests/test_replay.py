"""Calls on a GPU that are made again by plans: the same bits and the same errors."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
from table import LAYOUTS, assert_same_bits, inputs, label, parts

import fastll
from fastll import adapted, calls, replay
from fastll import array_libraries as libraries
from fastll.operations import OPERATIONS

pytest.importorskip("numba_cuda")
device, launch, compiled = map(
    import_module, ("device", "fastll.backend.cuda.launch", "fastll.backend.cuda.calls")
)


class Counted:
    """How often a plan has made a call, and how often a call went the ordinary way."""

    def __init__(self, monkeypatch):
        self.replayed = self.ordinary = 0
        plan, begin = replay.Plan.__call__, calls.Call.__init__

        def made(*arguments):
            result = plan(*arguments)
            self.replayed += result is not None
            return result

        def begun(*arguments):
            self.ordinary += 1
            begin(*arguments)

        monkeypatch.setattr(replay.Plan, "__call__", made)
        monkeypatch.setattr(calls.Call, "__init__", begun)

    def of(self, call):
        """The result of a call, which a plan must have made."""
        before = self.replayed, self.ordinary
        result = call()
        assert (self.replayed, self.ordinary) == (before[0] + 1, before[1])
        return result


@pytest.fixture
def gpu(monkeypatch):
    made = device.Emulated()
    monkeypatch.setattr(launch, "gpu", lambda index: made)
    monkeypatch.setattr(adapted, "on_gpu", {})
    monkeypatch.setattr(replay, "_plans", {})
    return made


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


def on(gpu, value):
    return gpu.to_device(value) if isinstance(value, np.ndarray) else value


def moved(gpu, arrays, keywords):
    return [on(gpu, a) for a in arrays], {name: on(gpu, value) for name, value in keywords.items()}


def fetched(gpu, result):
    return tuple(np.array(gpu.contents(part)) for part in parts(result))


def settle(call):
    """Make a call until there is a plan for it: unknown type, unknown key, recorded."""
    for _ in range(3):
        call()


def logits_and_labels(gpu, rng, dtype=np.float32, shape=(5, 77)):
    x, y = rng.standard_normal(shape).astype(dtype), rng.integers(0, shape[1], shape[0])
    return gpu.to_device(x), gpu.to_device(y)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        pytest.param(name, option, id=f"{name}-{label(operation.options[option])}")
        for name, operation in OPERATIONS.items()
        for option in sorted({0, len(operation.options) - 1})
    ],
)
def test_bits(gpu, counted, rng, name, option):
    """Without options by a mean with its gradient, with all of them by each row's loss."""
    operation = OPERATIONS[name]
    function, options = operation.function, operation.options[option]
    way = {}
    if operation.gradient:
        way = {"return_grad": True} if option == 0 else {"reduction": "none"}

    def made():
        arrays, keywords = inputs(name, np.float32, (7, 40), 1, options, rng)
        return moved(gpu, arrays, keywords | way)

    arrays, keywords = made()
    settle(lambda: function(*arrays, **keywords))
    others, changed = made()
    expected = fetched(gpu, function.__wrapped__(*others, **changed))
    launches = len(gpu.launches)
    result = counted.of(lambda: function(*others, **changed))
    assert_same_bits(fetched(gpu, result), expected)
    done = [(launched.kernel, launched.stream) for launched in gpu.launches]
    count = len(done) - launches
    assert done[-count:] == done[-2 * count : -count]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "byte-swapped"])
def test_layouts(gpu, counted, rng, layout):
    x, y = rng.standard_normal((3, 5, 7)).astype(np.float16), rng.integers(0, 5, (3, 7))
    lay_out = LAYOUTS[layout]

    def call(x, y):
        return fastll.cross_entropy(
            gpu.to_device(lay_out(x)),
            gpu.to_device(lay_out(y)),
            axis=1,
            return_lse=True,
            return_grad=True,
        )

    settle(lambda: call(x, y))
    for part in (call(x, y)[2], counted.of(lambda: call(x, y))[2]):
        strides = fastll.softmax(lay_out(x), axis=1).strides
        assert part.geometry.strides == strides
    x = x[::-1].copy()
    loss, lse, grad = fetched(gpu, counted.of(lambda: call(x, y)))
    expected = fastll.cross_entropy(x, y, axis=1, return_lse=True, return_grad=True)
    for one, other in zip((loss, lse, grad), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-3)


def test_many_rows(gpu, counted, rng):
    """Sums in several steps, and scratch memory of several kinds."""
    x, y = logits_and_labels(gpu, rng, shape=(20000, 3))
    call = partial(fastll.cross_entropy, x, y, z_loss=0.1, return_grad=True)
    settle(call)
    expected = fetched(gpu, fastll.cross_entropy.__wrapped__(x, y, z_loss=0.1, return_grad=True))
    before = dict(gpu.memory.sizes)
    result = counted.of(call)
    assert_same_bits(fetched(gpu, result), expected)
    # the results; the rest was one block, and is given back
    assert len(gpu.memory.sizes) == len(before) + 2


def test_alignment(gpu, counted, rng):
    """Of the same shape and strides, an array at another address is taken by another kernel."""
    whole = gpu.to_device(rng.standard_normal(4 * 1024 + 8).astype(np.float32))

    def at(start):
        return gpu.array(whole.geometry[start : start + 4096].reshape(4, 1024), 0, None)

    for start, known in ((0, False), (1, False), (4, True), (5, True), (0, True)):
        x = at(start)
        expected = fetched(gpu, fastll.softmax.__wrapped__(x))
        if not known:
            settle(lambda x=x: fastll.softmax(x))
        assert_same_bits(fetched(gpu, counted.of(lambda x=x: fastll.softmax(x))), expected)
    assert len(replay._plans) == 2
    aligned, other = (gpu.launches[i].kernel for i in (0, 5))
    assert aligned is not other


def test_in_place(gpu, counted, rng):
    x, y = rng.standard_normal((2, 5, 77)).astype(np.float32), rng.integers(0, 77, (2, 5))
    expected = fastll.cross_entropy(x[1], y[1], return_grad=True)

    def call(x, y):
        return fastll.cross_entropy(x, y, return_grad=True, grad_out=x)

    a, b, c, d = (gpu.to_device(array) for array in (x[0], y[0], x[1], y[1]))
    settle(lambda: call(a, b))
    loss, grad = counted.of(lambda: call(c, d))
    assert grad is c
    np.testing.assert_allclose(gpu.contents(loss), expected[0], rtol=1e-6)
    np.testing.assert_allclose(gpu.contents(c), expected[1], atol=1e-7)
    # another output, of the same geometry
    x, out = gpu.to_device(x[1]), gpu.to_device(x[0])
    separate = partial(fastll.cross_entropy, x, d, return_grad=True, grad_out=out)
    settle(separate)
    assert counted.of(separate)[1] is out
    np.testing.assert_allclose(gpu.contents(out), expected[1], atol=1e-7)


def test_outputs_that_overlap(gpu, counted, rng):
    """They are checked whatever was made before."""
    memory = gpu.to_device(rng.standard_normal(6000).astype(np.float32))

    def at(start):
        return gpu.array(memory.geometry[start : start + 1000].reshape(10, 100), 0, None)

    settle(lambda: fastll.softmax(at(0), out=at(1000)))
    counted.of(lambda: fastll.softmax(at(2000), out=at(1000)))
    counted.of(lambda: fastll.softmax(at(2000), out=at(3000)))
    for start in (1004, 2996):
        with pytest.raises(ValueError, match="out shares memory with an input in another order"):
            fastll.softmax(at(2000), out=at(start))
    fastll.softmax(at(2000), out=at(2000))  # another object for the same memory
    assert counted.replayed == 2
    # arrays that overlap at first, so that whose an address is cannot be told
    x, y = at(0), at(500)
    for _ in range(4):
        fastll.kl_divergence_from_logits(x, y)
    assert counted.replayed == 2
    settle(lambda: fastll.kl_divergence_from_logits(at(0), at(1000)))
    result = counted.of(lambda: fastll.kl_divergence_from_logits(x, y))
    expected = fastll.kl_divergence_from_logits.__wrapped__(x, y)
    assert_same_bits(fetched(gpu, result), fetched(gpu, expected))


def test_an_array_twice(gpu, counted, rng):
    x = gpu.to_device(rng.random((4, 50)).astype(np.float32))
    other = gpu.to_device(rng.random((4, 50)).astype(np.float32))
    settle(lambda: fastll.kl_divergence(x, x))
    assert not gpu.contents(counted.of(lambda: fastll.kl_divergence(other, other))).any()
    assert gpu.contents(fastll.kl_divergence(x, other)).all()


ERRORS = {
    "shape": (ValueError, "target has shape", lambda c: c(y=c.moved(np.zeros(4, int)))),
    "dtype of labels": (
        TypeError,
        "target has dtype float32",
        lambda c: c(y=c.moved(np.zeros(5, "f4"))),
    ),
    "dtype": (TypeError, "logits has dtype complex64", lambda c: c(x=c.moved(np.zeros((5, 77), "c8")))),
    "dtype of an output": (TypeError, "grad_out", lambda c: c(grad_out=c.moved(np.zeros((5, 77))))),
    "read-only": (ValueError, "grad_out is read-only", lambda c: c(grad_out=c.read_only())),
    "reduction": (ValueError, "reduction is 'all'", lambda c: c(reduction="all")),
    "smoothing": (ValueError, "label_smoothing is 1.5", lambda c: c(label_smoothing=1.5)),
    "NaN": (ValueError, "label_smoothing is nan", lambda c: c(label_smoothing=float("nan"))),
    "softcap": (ValueError, "softcap is 0.0", lambda c: c(softcap=0.0)),
    "axis": (ValueError, "axis is 2", lambda c: c(axis=2)),
    "bool for an axis": (TypeError, "axis is True", lambda c: c(axis=True)),
    "float for an axis": (TypeError, "axis is 1.0", lambda c: c(axis=1.0)),
    "ignored": (TypeError, "ignore_index is -100.0", lambda c: c(ignore_index=-100.0)),
    "device": (ValueError, "target is on cpu", lambda c: c(y=np.zeros(5, int))),
    "list": (ValueError, "target is on cpu", lambda c: c(y=[0] * 5)),
    "keyword": (TypeError, "unexpected keyword", lambda c: c(reductions="sum")),
}


class Trial:
    """A call that has a plan, with some arguments replaced."""

    def __init__(self, gpu, rng):
        self.gpu = gpu
        self.x, self.y = logits_and_labels(gpu, rng)
        self.moved = gpu.to_device

    def __call__(self, **changed):
        arguments = {"x": self.x, "y": self.y, "axis": 1, "ignore_index": -100, "reduction": "mean"}
        arguments |= {"label_smoothing": 0.0, "softcap": None, "grad_out": None} | changed
        return fastll.cross_entropy(arguments.pop("x"), arguments.pop("y"), **arguments)

    def read_only(self):
        x = np.zeros((5, 77), np.float32)
        x.flags.writeable = False
        return self.moved(x)


@pytest.mark.parametrize("name", ERRORS)
def test_errors(gpu, counted, rng, name):
    """They are raised as if no such call had ever been made, each time."""
    error, message, call = ERRORS[name]
    trial = Trial(gpu, rng)
    out = gpu.to_device(np.zeros((5, 77), np.float32))
    settle(trial)
    settle(lambda: trial(grad_out=out))
    counted.of(trial)
    replayed = counted.replayed
    for _ in range(4):
        with pytest.raises(error, match=message):
            call(trial)
    assert counted.replayed == replayed
    counted.of(trial)


def test_settings(gpu, counted, rng):
    x, y = logits_and_labels(gpu, rng)
    bad = gpu.to_device(np.full(5, 77))
    call = partial(fastll.cross_entropy, x)
    settle(lambda: call(y))
    assert np.isnan(gpu.contents(counted.of(lambda: call(bad))))
    for _ in range(4):
        with fastll.debug_labels():
            call(y)
            with pytest.raises(IndexError, match=r"target has label 77 at \(0,\)"):
                call(bad)
        with (
            fastll.use_backend("numpy"),
            pytest.raises(NotImplementedError, match="'numpy' does not take arrays on cuda:0"),
        ):
            call(y)
    assert counted.replayed == 1
    counted.of(lambda: call(y))


def test_options_that_are_equal(gpu, counted, rng):
    """What == does not tell apart may be different to a function."""
    x, _ = logits_and_labels(gpu, rng)
    settle(lambda: fastll.logsumexp(x, 1))
    counted.of(lambda: fastll.logsumexp(x, 1))
    for other in (True, 1.0):
        with pytest.raises(TypeError, match=f"axis is {other}"):
            fastll.logsumexp(x, other)
    settle(lambda: fastll.logsumexp(x, (0, 1)))
    counted.of(lambda: fastll.logsumexp(x, (0, 1)))
    for other in ((False, True), (0.0, 1.0)):
        with pytest.raises(TypeError, match="axis is"):
            fastll.logsumexp(x, other)
    keys = set(replay._plans)
    for zero in (0.0, -0.0, 0, False):
        fastll.sigmoid_focal_loss(x, x, gamma=zero)
    assert len(set(replay._plans) - keys) == 4


def test_threads(gpu, rng):
    """Many threads make the same calls at once, each with arguments of its own."""
    pairs = [logits_and_labels(gpu, rng) for _ in range(4)]
    expected = [fetched(gpu, fastll.cross_entropy(*pair, return_grad=True)) for pair in pairs]
    for pair in pairs[:3]:
        fastll.cross_entropy(*pair, return_grad=True)
    (plan,) = (plan for plan in replay._plans.values() if plan)
    told, barrier, lock = plan.program, threading.Barrier(4), threading.Lock()
    start = gpu.start

    def together(stream, launches):
        barrier.wait(10)  # all have filled their arguments
        with lock:
            start(stream, launches)

    gpu.start = together
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda pair: fastll.cross_entropy(*pair, return_grad=True), pairs)
    gpu.start = start
    for result, other in zip(results, expected, strict=True):
        assert_same_bits(fetched(gpu, result), other)
    assert len(told._free) == 4
    fastll.cross_entropy(*pairs[0], return_grad=True)
    assert len(told._free) == 4


def test_number_of_plans_is_bounded(gpu, counted, rng, monkeypatch):
    monkeypatch.setattr(replay, "LIMIT", 8)
    x, _ = logits_and_labels(gpu, rng)
    for classes in range(33, 60):
        part = gpu.array(x.geometry[:, :classes], 0, None)
        for _ in range(3):
            fastll.logsumexp(part, 1)
        assert len(replay._plans) <= 8
    counted.of(lambda: fastll.logsumexp(part, 1))


def test_nothing_is_kept(gpu, rng):
    """A plan holds no array; scratch memory is given back with the call."""
    x, y = logits_and_labels(gpu, rng)
    before = len(gpu.memory.sizes)
    for _ in range(4):
        result = fastll.cross_entropy(x, y, return_grad=True)
    known = [weakref.ref(array) for array in (x, y, *result)]
    del x, y, result
    gc.collect()
    assert not any(array() for array in known)
    assert len(gpu.memory.sizes) <= before - 2


def test_what_has_no_plan(gpu, counted, rng):
    x, _ = logits_and_labels(gpu, rng)
    empty = gpu.to_device(np.zeros((0, 5), np.float32))
    for _ in range(5):
        fastll.softmax(empty)
        fastll.logsumexp(a=x, axis=1)  # by name
        fastll.logsumexp(x, np.int64(1))  # an option of no known type
        fastll.logsumexp(x, [0, 1])
    assert counted.replayed == 0
    # a call that does more than launch, or returns what it did not make
    prevented = gpu.launches.copy
    for result in (lambda: prevented() and None, lambda: x.geometry):

        def function(x, result=result):
            fastll.logsumexp.__wrapped__(x)
            return result()

        for _ in range(4):
            replay.call(function, (x,), {})
        key = next(key for key in replay._plans if key[0] is function)
        assert replay._plans[key] is False
    assert counted.replayed == 0


def test_calls_within_calls(gpu, counted, rng):
    """A call that makes others is recorded as a whole."""
    x, _ = logits_and_labels(gpu, rng)
    settle(lambda: fastll.softmax(x))

    def twice(x):
        return fastll.log_softmax(fastll.softmax(x))

    expected = fetched(gpu, twice(x))
    settle(lambda: replay.call(twice, (x,), {}))
    assert_same_bits(fetched(gpu, counted.of(lambda: replay.call(twice, (x,), {}))), expected)


def test_own_losses(gpu, counted, rng):
    @fastll.elementwise_loss
    def squared(x, t, *, factor=1.0):
        d = x - t
        return factor * d * d, 2 * factor * d

    x, t = (gpu.to_device(rng.standard_normal(300).astype(np.float32)) for _ in range(2))
    call = partial(squared, x, t, factor=3, return_grad=True)
    expected = fetched(gpu, call())
    settle(call)
    assert_same_bits(fetched(gpu, counted.of(call)), expected)
    with pytest.raises(TypeError, match="factor is 'a'"):
        squared(x, t, factor="a")


@pytest.fixture
def tensors(monkeypatch):
    """PyTorch, whose tensors on the CPU are taken for those on a GPU where nothing is computed."""
    torch = pytest.importorskip("torch")
    from bench import gpu_calls

    library, _ = gpu_calls.LIBRARIES["torch"]()
    with gpu_calls.stubbed():
        for kind in library.plain:
            monkeypatch.setitem(libraries._known, kind, library)
        yield torch


def test_tensors(tensors, counted):
    """PyTorch's own tensors and parameters have plans, in the order of their axes in memory."""
    torch = tensors
    x, y = torch.zeros(5, 77), torch.zeros(5, dtype=torch.long)
    call = partial(fastll.cross_entropy, x, y, return_grad=True)
    settle(call)
    loss, grad = counted.of(call)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert (grad.shape, grad.stride(), grad.dtype) == (x.shape, x.stride(), x.dtype)
    half = x.half().T
    settle(lambda: fastll.softmax(half, 0))
    probabilities = counted.of(lambda: fastll.softmax(half, 0))
    assert (probabilities.dtype, probabilities.stride()) == (torch.half, half.stride())
    parameter = torch.nn.Parameter(x)
    with torch.no_grad():
        settle(lambda: fastll.softmax(parameter))
        counted.of(lambda: fastll.softmax(parameter))
        version = parameter._version
        settle(lambda: fastll.softmax(parameter, out=parameter))
        assert counted.of(lambda: fastll.softmax(parameter, out=parameter)) is parameter
        assert parameter._version == version + 4  # for a backward pass that needs what was there
        weight = torch.nn.Parameter(torch.ones(77))
        settle(lambda: fastll.cross_entropy(x, y, weight=weight))
        counted.of(lambda: fastll.cross_entropy(x, y, weight=weight))
    with pytest.raises(RuntimeError, match="out requires a gradient"):
        fastll.softmax(x, out=parameter)


def test_tensors_that_are_more_than_their_memory(tensors, counted, monkeypatch):
    """Those that PyTorch records, batches or negates go the way they did."""
    torch = tensors
    x = torch.zeros(5, 77)
    settle(lambda: fastll.logsumexp(x, 1))
    counted.of(lambda: fastll.logsumexp(x, 1))
    negated = torch.complex(x, x).conj().imag
    with pytest.raises(TypeError, match="negated view"):
        fastll.logsumexp(negated, 1)
    taken = []
    adapter = SimpleNamespace(call=lambda function, args, kwargs: taken.append(function))
    monkeypatch.setattr(adapted, "import_module", lambda name: adapter)
    fastll.logsumexp(x.clone().requires_grad_(), 1)
    torch.func.vmap(lambda row: fastll.logsumexp(row, 0) or row)(x)
    assert taken == ["logsumexp"] * 2
    assert counted.replayed == 1


@pytest.mark.parametrize("name", ["plain", "torch"])
def test_measurement(name):
    """What `python -m bench gpu-calls` shows."""
    if name == "torch":
        pytest.importorskip("torch")
    from bench import gpu_calls

    plans = replay._plans
    records = list(gpu_calls.measure(name, 1))
    for record in records:
        assert 0 < record["microseconds"] < record["first_calls"]
    first, *rows, last = gpu_calls.lines(records)
    assert "target 10" in first
    assert len(rows) == len(records) + 1
    assert "__array_interface__" in last
    assert replay._plans is plans


class Driver:
    """The driver's functions that a launch calls; what they were told."""

    def __init__(self):
        self.context, self.launches = 3, []
        self.told = {
            "cuCtxGetCurrent": lambda: (0, self.context),
            "cuCtxSetCurrent": self.set_current,
            "cuLaunchKernel": self.launch,
            "CUstream": lambda handle: handle,
        }

    def __getattr__(self, name):
        return self.told[name]

    def set_current(self, context):
        self.context = context
        return (0,)

    def launch(self, function, *rest):
        *told, arguments, _ = rest
        self.launches.append((function, *told, self.context, device.words(arguments, "dfqq")))
        return (SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE"),) if function == "bad" else (0,)


def test_what_the_driver_is_told(monkeypatch):
    """The grid, the caller's stream, the arguments through pointers; in the device's own context."""
    driver = Driver()
    monkeypatch.setattr(launch, "driver", driver)
    monkeypatch.setattr(launch, "_stream", driver.CUstream)
    gpu = object.__new__(launch.Gpu)
    gpu._context = gpu._handle = 5
    gpu.function = lambda launch: launch.kernel
    words = [np.float64(0.5), np.float32(1.5), -3, 1 << 60]
    made = launch.Launch("kernel", 7, (32, 4), words, 128, 99)
    launch.start(gpu, made, 11)
    told = ("kernel", 7, 1, 1, 32, 4, 1, 99, 11, 5)
    assert driver.launches == [(*told, [0.5, 1.5, -3, 1 << 60])]
    assert driver.context == 3  # as before
    program = launch.Program(gpu, [made, made], [{3: 1}, {2: 0, 3: 1}], 2)
    program(12, [1 << 40, 1 << 41])
    told = (*told[:8], 12, 5)
    assert driver.launches[1:] == [
        (*told, [0.5, 1.5, -3, 1 << 41]),
        (*told, [0.5, 1.5, 1 << 40, 1 << 41]),
    ]
    with pytest.raises(RuntimeError, match="the CUDA driver says CUDA_ERROR_INVALID_VALUE"):
        launch.start(gpu, made._replace(kernel="bad"), 0)
    assert driver.context == 3


def test_addresses_are_told_from_numbers():
    """All members that hold addresses are marked."""
    row = compiled.Row(1 << 40, 8, 4)
    told = compiled.Map(10, 1, (row, row), row, row, row, row, (0.5,), 1.0)
    words = compiled.words(told, float)
    assert [w == 1 << 40 for w in words] == compiled.addresses(told)
