"""The CUDA backend without a GPU: what its kernels are compiled to, and do on the emulator."""

import re
import shutil
import subprocess
from functools import cache
from importlib import import_module
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import oracle
import pytest
from table import assert_close

import fastll
from fastll import formulas
from fastll.api import elementwise, losses, reductions
from fastll.contract import Fold, Map, Options
from fastll.formulas.maths import log
from fastll.formulas.rows import product
from fastll.formulas.vocabulary import constants, fma, where_gt

pytest.importorskip("numba_cuda")
device, ptx, cuda = map(import_module, ("device", "ptx", "fastll.backend.cuda"))
compiler, folds, geometry, launch, maps, primitives, states, teams = (
    import_module(f"fastll.backend.cuda.{name}")
    for name in (
        "compiler",
        "folds",
        "geometry",
        "launch",
        "maps",
        "primitives",
        "states",
        "teams",
    )
)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def gpu(monkeypatch):
    """The emulator, in the place of a GPU, with its launches forgotten."""
    gpu = device.Emulated()
    monkeypatch.setattr(device, "gpu", lambda: gpu)
    device.instead_of_host(monkeypatch)
    return gpu


def launched():
    """Kernels as they are launched, by name: (what each is made for, threads of a thread block)."""
    entropy, single = "cross_entropy", {"modern": True, "aligned": True, "team": True}
    half = maps.Operand("bfloat16", vectors=True)
    whole = maps.Operand("float32", vectors=True)
    rows_of = folds.Variant
    return {
        "softmax float32": (rows_of("softmax", "float32", out="float32", **single), geometry.RESIDENT),
        "softmax float32 of any length": (
            rows_of("softmax", "float32", out="float32", modern=True, team=True),
            geometry.RESIDENT,
        ),
        "logsumexp float32": (
            rows_of("logsumexp", "float32", aligned=True, team=True),
            geometry.RESIDENT,
        ),
        "labels float32 in a cluster": (
            rows_of(entropy, "float32", labels="int64", out="float32", cluster=8, **single),
            geometry.RESIDENT,
        ),
        "labels bfloat16": (
            rows_of(entropy, "bfloat16", labels="int64", out="bfloat16", **single),
            geometry.RESIDENT,
        ),
        "dense float16": (
            rows_of(entropy, "float16", second="float16", out="float16", **single),
            geometry.RESIDENT,
        ),
        "entropy float32": (
            rows_of("entropy_from_logits", "float32", out="float32", **single),
            geometry.RESIDENT,
        ),
        "divergence bfloat16": (
            rows_of(
                "kl_divergence_from_logits",
                "bfloat16",
                second="bfloat16",
                out="bfloat16",
                **single,
            ),
            geometry.RESIDENT,
        ),
        "short rows": (
            rows_of(entropy, "float32", labels="int64", out="float32", classes=10),
            geometry.BLOCK,
        ),
        "columns": (rows_of("softmax", "float32", out="float32"), geometry.BLOCK),
        "sigmoid": (maps.Variant("sigmoid", (whole,), value=whole, modern=True), maps.THREADS),
        "binary cross-entropy": (
            maps.Variant(
                "binary_cross_entropy_with_logits",
                (half, half),
                partial=True,
                slope=half,
                modern=True,
            ),
            maps.THREADS,
        ),
    }


def team_of(classes, name, inputs, capability):
    """The threads of a row."""
    scratch = teams.SCRATCH * (8 if name == "float64" else 4)
    return geometry.team(classes, name, inputs, scratch, capability)


def kernel_of(variant):
    return (folds if isinstance(variant, folds.Variant) else maps).kernel(variant)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("name", list(launched()))
def test_ptx(name, capability):
    """Vectors of 16 bytes, no double in float32 kernels, and no memory of a thread's own."""
    variant, threads = launched()[name]
    variant = variant._replace(modern=variant.modern and capability >= (8, 0))
    if isinstance(variant, folds.Variant):
        variant = variant._replace(newest=variant.team and capability >= (9, 0))
    kernel = kernel_of(variant)
    if capability < (9, 0) and kernel.cluster > 1:
        pytest.skip("cards before capability 9 have no clusters")
    code, _ = compiler.ptx(kernel, capability, threads)
    assert f".target sm_{capability[0]}{capability[1]}" in code
    assert_assembled(code, capability, "8.0" if capability == (9, 0) else "7.8")
    if name != "columns":
        assert re.search(r"ld\.global\.v4\.[bfu]32|cp\.async\.(cg|bulk)", code)
        assert "st.global.v4" in code or "logsumexp" in name
    assert ".f64" not in code
    assert ".local" not in code
    module = ptx.Module(code)
    assert not module.uses_local
    if shutil.which("ptxas"):
        report = _ptxas(code, capability)
        spilled = max(map(int, re.findall(r"(\d+) bytes spill", report)))
        assert spilled == 0
        registers = int(re.search(r"Used (\d+) registers", report)[1])
        assert registers * max(threads, 2 * geometry.BLOCK) <= 65536


@pytest.mark.parametrize(("capability", "version"), [((10, 0), "8.6"), ((12, 0), "8.7")], ids=str)
def test_ptx_of_newer_cards(capability, version):
    variant, threads = launched()["logsumexp float32"]
    code, _ = compiler.ptx(kernel_of(variant), capability, threads)
    assert_assembled(code, capability, version)


def assert_assembled(code, capability, version):
    """PTX states the first version that has its card and its instructions, as drivers refuse newer ones
    than their own."""
    assert re.search(r"^\.version (.*)$", code, re.MULTILINE)[1] == version
    assert compiler.assembled(code, capability).startswith(b"\x7fELF")


def _ptxas(code, capability):
    """What ptxas says of a kernel; it is of CUDA 11.8 or newer."""
    command = ["ptxas", "-v", f"-arch=sm_{capability[0]}{capability[1]}", "-o", "/dev/null", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(1000, np.float32), (4097, np.float32), (20000, np.float32), (9001, BFLOAT16), (1024, np.float64)],
    ids=str,
)
def test_a_row_is_read_once(gpu, rng, classes, dtype):
    """Forward and gradient: one read and one write, in a team, a ragged row, a cluster."""
    x = rng.standard_normal((3, classes)).astype(dtype)
    y = rng.integers(0, classes, 3)
    fastll.cross_entropy(x, y, reduction="none", return_grad=True)
    (only,) = gpu.launches
    plan = team_of(classes, x.dtype.name, 1, gpu.capability)
    assert only.kernel.cluster == plan.cluster
    assert only.stream == 7
    rest = 64 * plan.cluster * len(y) + 64 * plan.threads * plan.teams * plan.cluster
    assert x.nbytes <= only.stats.bytes_read <= x.nbytes + rest
    assert x.nbytes <= only.stats.bytes_written <= x.nbytes + rest


@pytest.mark.parametrize(
    ("dtype", "classes"),
    [(np.float32, 131), (np.float32, 4097), (BFLOAT16, 1001), (np.float32, 40003), (np.float64, 515)],
    ids=str,
)
def test_bits_depend_on_the_row_alone(gpu, rng, dtype, classes):
    """Wherever a row begins in memory, whatever is beside it: the same bits, loss and gradient."""
    row = (5 * rng.standard_normal(classes)).astype(dtype)
    label = classes // 3

    def results(x, i):
        y = np.full(len(x), label)
        out = fastll.cross_entropy(
            x, y, reduction="none", label_smoothing=0.1, return_lse=True, return_grad=True
        )
        return [np.asarray(part[i]).tobytes() for part in out]

    alone = results(row[None], 0)
    batch = (5 * rng.standard_normal((6, classes))).astype(dtype)
    for i in range(6):  # the beginning of a row moves by an element each
        batch[i] = row
    for i in (1, 2, 3, 5):
        assert results(batch, i) == alone
    wide = np.zeros((2, classes + 3), dtype)
    wide[1, 1:-2] = row
    assert results(wide[:, 1:-2], 1) == alone


def test_no_races(gpu, rng, monkeypatch):
    """Every family of kernels under the check of shared memory that a GPU's tools have too."""
    monkeypatch.setattr(gpu, "options", {"racecheck": True, "perturb": 3})
    for shape, axis in (((3, 130), 1), ((9, 40), 1), ((300, 3), 0), ((2, 9001), 1)):
        x = rng.standard_normal(shape).astype(np.float32)
        y = rng.integers(0, shape[axis], shape[1 - axis])
        loss, grad = fastll.cross_entropy(x, y, axis=axis, return_grad=True)
        expected = oracle.cross_entropy(x, y, axis)
        assert_close(loss, (expected[0][0].mean(), expected[0][1].mean()), np.float32, factor=12)
        assert_close(grad, (expected[2][0] / len(y), expected[2][1] / len(y)), np.float32)
    fastll.binary_cross_entropy_with_logits(x, np.zeros_like(x))
    fastll.kl_divergence_from_logits(x, x[::-1].copy(), return_grad=True)


@pytest.mark.parametrize(
    "operation", ["sparse", "dense", "softmax", "log_softmax", "entropy", "kl_divergence"]
)
@pytest.mark.parametrize("cluster", [1, 4])
def test_rows_in_chunks(gpu, rng, monkeypatch, operation, cluster):
    """Rows beyond what a block holds, on a card of little memory; the least and the largest in
    different chunks."""
    monkeypatch.setattr(geometry, "TEAM", 64)
    monkeypatch.setattr(geometry, "BLOCK", 32)
    monkeypatch.setattr(geometry, "MOST_SHARED", {gpu.capability: 11})
    monkeypatch.setattr(geometry, "CLUSTERS", (1, cluster))
    monkeypatch.setattr(geometry, "team", geometry.team.__wrapped__)
    classes = 9003
    x = (5 * rng.standard_normal((3, classes))).astype(np.float32)
    x[0, 7000] = 30
    x[1, :2500] = -1e4  # and a chunk without any other
    if operation in ("softmax", "log_softmax"):
        result = getattr(fastll, operation)(x)
        with np.errstate(invalid="ignore"):
            assert_close(result, getattr(oracle, operation)(x, 1), np.float32)
    elif operation in ("entropy", "kl_divergence"):
        name = f"{operation}_from_logits"
        others = [3 * x[::-1]] if operation == "kl_divergence" else []
        value, grad = getattr(fastll, name)(x, *others, reduction="none", return_grad=True)
        expected = getattr(oracle, name)(x, *others, 1)
        assert_close(value, expected.value, np.float32)
        assert_close(grad, expected.gradient, np.float32)
    else:
        target = np.array([7000, 4000, -100])
        if operation == "dense":
            target = rng.random(x.shape).astype(np.float32)
            target[1, :2500] = 0
            target /= target.sum(axis=1, keepdims=True)
        loss, grad = fastll.cross_entropy(x, target, reduction="none", z_loss=1e-3, return_grad=True)
        with np.errstate(invalid="ignore"):
            expected = oracle.cross_entropy(x, target, 1, z_loss=1e-3)
        assert_close(loss, expected[0], np.float32)
        assert_close(grad, expected[2], np.float32)
    kernel = gpu.launches[0].kernel
    assert kernel.cluster == cluster
    assert "chunked=True" in kernel.key


@pytest.mark.parametrize("capability", [(7, 5), (8, 6)], ids=str)
def test_older_cards(gpu, rng, monkeypatch, capability):
    monkeypatch.setattr(gpu, "capability", capability)
    x = rng.standard_normal((2, 40000)).astype(BFLOAT16)
    x[0, 5] = np.nan
    y = np.array([3, 39999])
    loss, grad = fastll.cross_entropy(x, y, reduction="none", return_grad=True)
    expected = oracle.cross_entropy(x[1:], y[1:], 1)
    assert np.isnan(loss[0])
    assert np.isnan(grad[0].astype(float)).all()
    assert_close(loss[1:], expected[0], np.float32)
    assert_close(grad[1:], expected[2], np.float32)


def test_labels_out_of_range(gpu, rng):
    """Their rows are NaN, with nothing waited for; who debugs is told."""
    for shape in ((4, 10), (4, 700)):
        x = rng.standard_normal(shape).astype(np.float32)
        y = np.array([0, shape[1], -100, 1])
        loss, grad = fastll.cross_entropy(x, y, reduction="none", return_grad=True)
        assert np.isnan(loss[1])
        assert np.isnan(grad[1]).all()
        assert loss[2] == 0
        assert not grad[2].any()
        assert np.isfinite(loss[[0, 3]]).all()
        assert np.isnan(fastll.cross_entropy(x, y))
        with fastll.debug_labels(), pytest.raises(IndexError, match=rf"label {shape[1]} at \(1,\)"):
            fastll.cross_entropy(x, y)


def test_integers_of_two_bytes(gpu):
    """They are computed in float64, although they have the size of half precision."""
    x = (np.arange(400) % 7).astype(np.int16).reshape(2, 200)
    assert_close(fastll.softmax(x), oracle.softmax(x, 1), np.float64)
    assert_close(fastll.sigmoid(x), oracle.sigmoid(x), np.float64)


def test_ignored_rows_do_not_leak(gpu):
    for classes in (5, 600):
        x = np.full((3, classes), np.nan, np.float32)
        x[1] = 0
        loss, grad = fastll.cross_entropy(x, np.array([-100, 2, -100]), return_grad=True)
        np.testing.assert_allclose(loss, np.log(classes), rtol=1e-6)
        assert not grad[[0, 2]].any()
        loss, grad = fastll.cross_entropy(x, np.array([-100] * 3), return_grad=True)
        assert np.isnan(loss)
        assert not grad.any()


def test_mean_of_many_rows(gpu, rng):
    """More rows than a block adds up, so that sums are a tree; weights of another dtype."""
    x = rng.standard_normal((40000, 3)).astype(np.float32)
    y = rng.integers(0, 3, 40000)
    y[::7] = -100
    weight = np.array([0.5, 1, 2])
    loss, grad = fastll.cross_entropy(x, y, weight=weight, return_grad=True)
    value, gradient = oracle.cross_entropy(x, y, 1, weight=weight).mean
    np.testing.assert_allclose(loss, float(value[0]), rtol=3e-7)
    assert_close(grad, gradient, np.float32, factor=8)
    assert len(gpu.launches) == 5  # weights and losses in two steps each, and the rows


def test_mean_of_squares(gpu, rng):
    """That of lse**2 is over the rows, weighed on the device too; operands of any strides."""
    x = rng.standard_normal((40, 3)).astype(np.float32)
    y = rng.integers(0, 3, (40, 2))[:, 0]
    y[::7] = -100
    sample = rng.integers(0, 3, (40, 3)).astype(np.float16)[::-1, 1]
    options = {"weight": np.array([0.5, 1, 2]), "z_loss": 0.5, "sample_weight": sample}
    loss, grad = fastll.cross_entropy(x, y, **options, return_grad=True)
    value, gradient = oracle.cross_entropy(x, y, 1, **options).mean
    # 6 roundoffs, and the division, the factor of the squares and the division in it
    assert_close(loss, value, np.float32, factor=9)
    assert_close(grad, gradient, np.float32, factor=9)
    assert len(gpu.launches) == 4
    loss, grad = fastll.cross_entropy(x, y, **options | {"sample_weight": 0 * sample}, return_grad=True)
    assert np.isnan(loss)
    assert not grad.any()


@pytest.mark.parametrize("classes", [100, 5000])
def test_only_elements_at_labels_are_read(gpu, rng, classes):
    """By the loss of log-probabilities without smoothing; its gradient is written once."""
    x, y = rng.standard_normal((64, classes)).astype(np.float32), rng.integers(0, classes, 64)
    plan = team_of(classes, "float32", 1, gpu.capability)
    for return_grad in (False, True):
        gpu.launches.clear()
        fastll.nll_loss(x, y, reduction="none", return_grad=return_grad)
        (only,) = gpu.launches
        # a label and an element per row; the threads of a team read its label once more to write
        again = plan.threads if return_grad and classes > geometry.SHORT else 0
        assert only.stats.bytes_read <= len(y) * (4 + 8 + 8 * again)
        assert only.stats.bytes_written <= 2 * 4 * len(y) + return_grad * x.nbytes


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=str)
def test_very_long_rows(gpu, rng, monkeypatch, dtype):
    """Every part of a row has a thread block; the bits are the row's, whatever is beside it."""
    monkeypatch.setattr(geometry, "LONG", 3000)
    monkeypatch.setattr(geometry, "PART", 1024)
    monkeypatch.setattr(geometry, "BLOCK", 32)
    monkeypatch.setattr(geometry, "TEAM", 64)
    monkeypatch.setattr(geometry, "CLUSTERS", (1,))
    monkeypatch.setattr(geometry, "MOST_SHARED", {gpu.capability: 11})
    monkeypatch.setattr(geometry, "team", geometry.team.__wrapped__)
    x = (5 * rng.standard_normal((3, 9001))).astype(dtype)
    x[0, 7000], x[1, :2048], x[2] = 30, -np.inf, -np.inf
    gpu.launches.clear()
    lse = fastll.logsumexp(x, axis=1)
    with np.errstate(invalid="ignore"):
        assert_close(lse, oracle.logsumexp(x, 1)[0], np.float32)
        assert_close(fastll.logsumexp(x[:2]), oracle.logsumexp(x[:2].reshape(-1), 0)[0], np.float32)
    first, second, *_ = gpu.launches
    assert "in_parts=True" in first.kernel.key
    assert "merge_parts" in second.kernel.key
    assert x.nbytes <= first.stats.bytes_read <= 1.01 * x.nbytes
    for i in (0, 1):
        assert fastll.logsumexp(x[i]).tobytes() == lse[i].tobytes()
    for operation in ("softmax", "log_softmax"):
        result = getattr(fastll, operation)(x[:1])
        assert_close(result, getattr(oracle, operation)(x[:1], 1), np.float32)


def test_streaming(gpu, rng):
    """Running states on the device: updated, merged, finished there."""
    x = rng.standard_normal((5, 300)).astype(np.float32)
    first, second = fastll.LogSumExp((5,), np.float32), fastll.LogSumExp((5,), np.float32)
    first.update(x[:, :100]).update(x[:, 100:150])
    second.update(x[:, 150:])
    assert_close(first.merge(second).value, oracle.logsumexp(x, 1)[0], np.float32)
    assert {launched.kernel.key.split(".")[3] for launched in gpu.launches} == {"folds", "totals"}
    everything = fastll.logsumexp(x[:, ::-1], axis=(0, 1))
    assert_close(everything, oracle.logsumexp(x.reshape(-1), 0)[0], np.float32)


def test_streaming_likelihood(gpu, rng, monkeypatch):
    """Sums on the device, which an update does not wait for, and the exponential of a mean there."""
    x = rng.standard_normal((2, 9, 50)).astype(np.float32)
    y = rng.integers(0, 50, (2, 9))
    y[0, :3] = -100
    expected = oracle.cross_entropy(x, y, 2)
    total, count = expected.value[0].sum(), np.sum(y != -100)
    acc = fastll.NegativeLogLikelihood()
    with monkeypatch.context() as without:
        without.delattr(device.Emulated, "read")
        acc.update(x[0], y[0]).update(x[1], y[1])
    # a roundoff of float32 for each loss, and what the tests of operations allow its value
    np.testing.assert_allclose([acc.sum, acc.mean], [float(total), float(total / count)], rtol=3e-7)
    assert acc.count == 15
    assert acc.merge(fastll.NegativeLogLikelihood().update(x[1], x[1])).count == 24
    perplexity = float(np.exp(total / count))
    np.testing.assert_allclose(
        fastll.perplexity(x.astype(np.float64), y), perplexity, rtol=60 * np.finfo(float).eps
    )


class TestGeometry:
    @pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
    @pytest.mark.parametrize("inputs", [1, 2])
    @pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
    def test_every_class_has_a_thread(self, name, inputs, capability):
        lanes, size = primitives.lanes_of(name), primitives.size_of(name)
        for classes in (129, 500, 1000, 4096, 4097, 32000, 50257, 128256, 262144, 10**6 + 1):
            plan = team_of(classes, name, inputs, capability)
            assert plan.threads % 32 == 0
            assert plan.threads * plan.teams <= geometry.RESIDENT
            assert plan.threads // 32 <= teams.SLOTS
            assert plan.segment * plan.cluster >= classes
            assert plan.cluster == 1 or capability >= (9, 0)
            slack = lanes - 1 if classes % lanes else 0
            assert (plan.capacity + slack) * size <= plan.pitch
            assert plan.chunked == (plan.capacity < plan.segment)
            assert plan.segment % lanes == 0 or plan.cluster == 1
            assert plan.shared <= (227 if capability >= (9, 0) else 163) * 1024

    def test_what_stays_on_the_chip(self):
        """A row is read once up to these lengths, and two blocks of a multiprocessor have room."""
        for name, size in (("float32", 4), ("bfloat16", 2)):
            for most, capability in ((227 * 8, (9, 0)), (163, (8, 0)), (99, (8, 9)), (64, (7, 5))):
                room = most * 1024 // size
                assert not team_of(room * 15 // 16, name, 1, capability).chunked
                assert team_of(room, name, 1, capability).chunked
                plan = team_of(room * 7 // 16, name, 1, capability)
                assert (
                    2 * (plan.shared + 1024) <= (most // plan.cluster + 1) * 1024 or plan.cluster == 8
                )


def test_machine_code_on_disk(monkeypatch, tmp_path):
    """Compiled once, found again, and compiled anew where the file is damaged."""
    from numba.core import config

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    variant, threads = launched()["sigmoid"]
    kernel = kernel_of(variant)
    first = compiler.machine_code(kernel, (9, 0), threads)
    assert first[0].startswith(b"\x7fELF")
    (entry,) = tmp_path.rglob("*.cubin")
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_compiled", lambda *_: pytest.fail("compiled again"))
        assert compiler.machine_code(kernel, (9, 0), threads) == first
    entry.write_bytes(b"damaged")
    assert compiler.machine_code(kernel, (9, 0), threads)[0].startswith(b"\x7fELF")


def test_without_a_gpu(monkeypatch):
    """One line that says what is missing, of whatever is asked for."""
    monkeypatch.setattr(launch, "count", lambda: 0)
    status = fastll.backends()["cuda"]
    assert not status.available
    assert "\n" not in status.reason
    assert "GPU" in status.reason
    with pytest.raises(RuntimeError, match=r"'cuda' was asked for but is not available: .*GPU"):
        fastll.warmup(backend="cuda")


def trial_value(x, t, w, a, b):
    """An element-wise formula of three inputs and two parameters."""
    return fma(x, t, a) * b + w, where_gt(x, t, a, b) * x


def trial_terms(p):
    return constants(p).zero - product(p, log(p))


def trial_pairs(p, q):
    return product(p, log(p) - log(q))


@pytest.fixture
def trial(monkeypatch, gpu):
    """Rows of the tables of formulas that nobody else knows, and a backend for them."""
    maths = import_module("fastll.backend.cuda.maths")
    added = {
        "trial_value": (
            formulas.ELEMENTS,
            formulas.elements,
            formulas.Element(trial_value, 3, 2, True),
        ),
        "trial_terms": (formulas.TERMS, formulas.rows, formulas.Terms(trial_terms)),
        "trial_pairs": (formulas.TERMS, formulas.rows, formulas.Terms(trial_pairs, 2)),
    }
    for name, (table, module, row) in added.items():
        monkeypatch.setattr(row.formula, "__module__", module.__name__)
        monkeypatch.setattr(module, name, row.formula, raising=False)
        monkeypatch.setitem(table, name, row)
    # what was bound before the rows were there is bound anew
    monkeypatch.setattr(maths, "of", cache(maths.of.__wrapped__))
    monkeypatch.setattr(states, "shared", cache(states.shared.__wrapped__))
    monkeypatch.setattr(folds, "shared", states.shared)
    return SimpleNamespace(
        gpu=gpu,
        backend=cuda.Backend(gpu, 7, None),
        there=lambda x: gpu.view(gpu.to_device(x), "x"),
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16], ids=str)
def test_a_new_element_wise_row(trial, rng, dtype):
    """Values, sums, slopes and a weight, in vectors and one by one."""
    for lay_out in (np.ascontiguousarray, lambda x: np.repeat(x, 2, axis=1)[:, ::2]):
        x, t, w, weight = (lay_out(rng.standard_normal((2, 9001)).astype(dtype)) for _ in range(4))
        value, slope = np.empty(x.shape, "f4" if dtype != np.float64 else "f8"), np.empty_like(x)
        partial = np.empty((2, -(-x.shape[1] // cuda.Backend.unit)), value.dtype)
        there = [trial.there(a) for a in (x, t, w, weight, value, slope, partial)]
        call = Map(
            "trial_value",
            tuple(there[:3]),
            weight=there[3],
            value=there[4],
            slope=there[5],
            partial=there[6],
            parameters=(0.5, 3.0),
            scale=2.0,
        )
        trial.backend.run(trial.backend.map(call), partial.size, x.size)
        value, slope, partial = (trial.gpu.contents(a.owner) for a in there[4:])
        x, t, w, weight = (a.astype(float) for a in (x, t, w, weight))
        expected = ((x * t + 0.5) * 3 + w) * weight
        tolerance = (
            {"rtol": 1e-5, "atol": 1e-5} if dtype != np.float64 else {"rtol": 1e-13, "atol": 1e-13}
        )
        np.testing.assert_allclose(value, expected, **tolerance)
        sums = [
            row[i : i + cuda.Backend.unit].sum() for row in expected for i in (0, cuda.Backend.unit)
        ]
        np.testing.assert_allclose(partial.reshape(-1), sums, rtol=1e-3)
        expected = 2 * np.where(x > t, 0.5, 3) * x * weight
        np.testing.assert_allclose(
            slope.astype(float), expected, rtol=1e-2 if dtype == BFLOAT16 else tolerance["rtol"]
        )


@pytest.mark.parametrize(
    ("dtype", "shape", "plan"),
    [
        (np.float32, (3, 1000, 1), "team"),
        (BFLOAT16, (2, 1001, 1), "team"),
        (np.float32, (2, 40000, 1), "cluster"),
        (np.float64, (40, 7, 1), "thread"),
        (np.float32, (3, 300, 5), "threads"),
    ],
    ids=str,
)
def test_a_new_sum_of_terms(trial, rng, dtype, shape, plan):
    """One input or two, in teams, in clusters, by threads alone; a 0 is no NaN."""
    p, q = (rng.random(shape).astype(dtype) for _ in range(2))
    p[:, ::7] = 0
    exact_p, exact_q = p.astype(float), q.astype(float)
    with np.errstate(all="ignore"):
        log_p = np.where(exact_p > 0, np.log(exact_p), 0)
        entropies = -(exact_p * log_p).sum(axis=1)
        divergences = (exact_p * (log_p - np.log(exact_q))).sum(axis=1)
    for name, second, expected in (
        ("trial_terms", None, entropies),
        ("trial_pairs", trial.there(q), divergences),
    ):
        value = trial.there(np.empty(expected.shape, "f8" if dtype == np.float64 else "f4"))
        call = Fold(name, trial.there(p), second=second, value=value, options=Options(scale=0.5))
        trial.backend.run(trial.backend.fold(call), value.size, p.size)
        tolerance = 1e-13 if dtype == np.float64 else 2e-6
        np.testing.assert_allclose(
            trial.gpu.contents(value.owner), 0.5 * expected, rtol=tolerance, atol=tolerance
        )
        kernel = trial.gpu.launches[-1].kernel
        assert ("team=False" in kernel.key) == plan.startswith("thread")
        assert (kernel.cluster > 1) == (plan == "cluster")


def test_elements_equal_those_of_the_cpu(gpu, rng):
    """To the bit: the formulas are the same, and nothing is fused that they do not fuse."""
    tiny = np.finfo(np.float32).smallest_subnormal
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, tiny, -tiny, 1e-40, -1e-40, 3e38, -3e38]
    edges = np.concatenate([np.linspace(-120, 120, 481), special])
    x = np.concatenate([edges, 6 * rng.standard_normal(2000), rng.uniform(-110, 110, 800)])
    x = x.astype(np.float32)
    t = rng.choice([0, 1, 0.5, 0.1, 0.9, 1e-30], x.size).astype(np.float32)

    pos_weight = np.linspace(0.1, 3, x.size).astype(np.float32)
    finite = x[np.isfinite(x)][:, None]
    labels = np.zeros(len(finite), int)

    def results(sigmoid, log_sigmoid, bce, cross_entropy):
        options = {"reduction": "none", "return_grad": True}
        _, *capped = cross_entropy(
            finite, labels, softcap=30.0, z_loss=0.25, return_lse=True, **options
        )
        weighted = bce(x, t, pos_weight=pos_weight, **options)
        return [sigmoid(x), log_sigmoid(x), *bce(x, t, **options), *weighted, *capped]

    found = results(
        fastll.sigmoid,
        fastll.log_sigmoid,
        fastll.binary_cross_entropy_with_logits,
        fastll.cross_entropy,
    )
    with fastll.use_backend("numba"):
        expected = results(
            reductions.sigmoid,
            reductions.log_sigmoid,
            elementwise.binary_cross_entropy_with_logits,
            losses.cross_entropy,
        )
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == wanted.dtype == np.float32
        actual, wanted = (np.where(np.isnan(a), np.nan, a).reshape(-1) for a in (actual, wanted))
        np.testing.assert_array_equal(actual.view(np.uint32), wanted.view(np.uint32))
