"""Kernels over elements: a block takes `UNIT` of them, of one outer row, in vectors where it can."""

# mypy: ignore-errors

from __future__ import annotations

import functools

import numpy as np

from fastll.backend.cuda import maths, team
from fastll.backend.cuda.compiler import WORD, cuda, device, variants
from fastll.backend.cuda.primitives import (
    compute_type,
    fma,
    lanes_of,
    numba_type,
    reader,
    size_of,
    vector_reader,
    vector_writer,
    writer,
)

THREADS = 256
#: Elements that a thread holds at a time, and how often it does.
HELD, ROUNDS = 8, 4
#: Elements of a unit, whose losses add up to one number.
UNIT = THREADS * HELD * ROUNDS


def _lanes(name, whole):
    """Elements next to each other that a thread takes."""
    return lanes_of(name) if whole else 4


@functools.cache
def _access(name, target, whole, lanes=None):
    """Functions to load and store the thread's elements from one on, of a format.

    `whole`: they are neighbours in memory, at an address for vectors.
    """
    real = compute_type(name)
    lanes, size = lanes or _lanes(name, whole), size_of(target)
    read, write = reader(target, real), writer(target)
    fetch = vector_reader(target, 0.0) if whole else None
    deliver = vector_writer(target) if whole else None

    if whole:

        @device
        def load(values, at, source, step, left):
            fetch(values, at, source, left >= lanes)
            if left < lanes:
                for i in range(lanes):
                    if i < left:
                        values[at + i] = read(source + i * size)

        @device
        def store(destination, step, left, values, at):
            if left >= lanes:
                deliver(destination, values, at)
            else:
                for i in range(lanes):
                    if i < left:
                        write(destination + i * size, values[at + i])

    else:

        @device
        def load(values, at, source, step, left):
            for i in range(lanes):
                values[at + i] = read(source + i * step) if i < left else real(0)

        @device
        def store(destination, step, left, values, at):
            for i in range(lanes):
                if i < left:
                    write(destination + i * step, values[at + i])

    return load, store


@variants
def sigmoid(name, written, log, whole):
    """The kernel of sigmoid and log-sigmoid from one format to another."""
    real = compute_type(name)
    lanes = _lanes(name, whole)
    f = maths.of(real, approximate=size_of(name) == 2)
    function = f.log_sigmoid if log else f.sigmoid
    load, _ = _access(name, name, whole)
    _, store = _access(name, written, whole)
    vectors = HELD // lanes

    def kernel(length, units, x, x_outer, x_step, out, out_outer, out_step):
        values = cuda.local.array(HELD, real)
        unit = np.int64(cuda.blockIdx.x)
        outer = np.int64(np.uint32(unit) // np.uint32(units))
        first = (unit - outer * units) * UNIT
        x += outer * x_outer
        out += outer * out_outer
        mine = first + cuda.threadIdx.x * lanes
        for _ in range(ROUNDS):
            for q in range(vectors):
                j = mine + q * (THREADS * lanes)
                load(values, q * lanes, x + j * x_step, x_step, length - j)
            for i in range(HELD):
                values[i] = function(values[i])
            for q in range(vectors):
                j = mine + q * (THREADS * lanes)
                store(out + j * out_step, out_step, length - j, values, q * lanes)
            mine += THREADS * HELD

    kernel.signature = (WORD,) * 8
    return kernel


@variants
def binary_cross_entropy(name, target, weight, pos_weight, written, whole, summed):
    """The kernel of the binary cross-entropy with logits.

    Formats of the logits, the target, both weights and the gradient; None for one that is not there.
    `summed`: the losses of a unit add up to one number; else each is left.

    Where they add up and nothing is weighted, the sum of a thread's log1p(e) is the log1p of one
    number, q = prod (1 + e) - 1: at most 2**32, and it keeps all its digits where every e is tiny.
    """
    real = compute_type(name)
    lanes = _lanes(name, whole)
    f, group = maths.of(real, approximate=size_of(name) == 2), team.of(real)
    zero, one = f.zero, f.one
    bce, bce_parts, log1p_sum = f.bce, f.bce_parts, f.log1p_sum
    post, collect = group.post, group.collect
    value_name = "float32" if real is np.float32 else "float64"
    load, _ = _access(name, name, whole)
    load_t, _ = _access(name, target, whole)
    load_w, _ = _access(name, weight or name, False, lanes)
    load_p, _ = _access(name, pos_weight or name, False, lanes)
    _, store_loss = _access(name, value_name, False, lanes)
    _, store = _access(name, written or name, whole)
    write_sum = writer(value_name)
    together = summed and weight is None and pos_weight is None
    vectors = HELD // lanes

    def kernel(
        length,
        units,
        x,
        x_outer,
        x_step,
        t,
        t_outer,
        t_step,
        w,
        w_outer,
        w_step,
        p,
        p_outer,
        p_step,
        loss,  # or the sums
        loss_outer,
        loss_step,
        grad,
        grad_outer,
        grad_step,
        scale,
    ):
        memory = cuda.shared.array(0, real)
        logits = cuda.local.array(HELD, real)
        targets = cuda.local.array(HELD, real)
        factors = cuda.local.array(lanes, real)
        positives = cuda.local.array(lanes, real)
        losses = cuda.local.array(lanes, real)
        unit = np.int64(cuda.blockIdx.x)
        outer = np.int64(np.uint32(unit) // np.uint32(units))
        first = (unit - outer * units) * UNIT
        x += outer * x_outer
        t += outer * t_outer
        mine = first + cuda.threadIdx.x * lanes
        total, product = zero, zero
        for _ in range(ROUNDS):
            for q in range(vectors):
                j = mine + q * (THREADS * lanes)
                load(logits, q * lanes, x + j * x_step, x_step, length - j)
                load_t(targets, q * lanes, t + j * t_step, t_step, length - j)
            for q in range(vectors):
                j = mine + q * (THREADS * lanes)
                if weight is not None:
                    load_w(factors, 0, w + outer * w_outer + j * w_step, w_step, length - j)
                if pos_weight is not None:
                    load_p(positives, 0, p + outer * p_outer + j * p_step, p_step, length - j)
                for i in range(lanes):
                    v, positive = logits[q * lanes + i], targets[q * lanes + i]
                    negative = one - positive
                    if together:
                        value, e, slope = bce_parts(v, positive, negative)
                        if j + i < length:
                            total += value
                            product += fma(product, e, e)
                    else:
                        if pos_weight is not None:
                            positive *= positives[i]
                        value, slope = bce(v, positive, negative)
                        if weight is not None:
                            value, slope = value * factors[i], slope * factors[i]
                        losses[i] = value
                        if j + i < length:
                            total += value
                    logits[q * lanes + i] = slope * scale
                if not summed:
                    at = loss + outer * loss_outer + j * loss_step
                    store_loss(at, loss_step, length - j, losses, 0)
            if written is not None:
                for q in range(vectors):
                    j = mine + q * (THREADS * lanes)
                    at = grad + outer * grad_outer + j * grad_step
                    store(at, grad_step, length - j, logits, q * lanes)
            mine += THREADS * HELD
        if summed:
            post(total + log1p_sum(product, zero), memory, 0)
            cuda.syncthreads()
            if cuda.threadIdx.x == 0:
                total, low = collect(memory, 0, 0)
                write_sum(loss + outer * loss_outer + (unit - outer * units) * loss_step, total + low)

    kernel.real = real
    kernel.signature = (WORD,) * 20 + (numba_type(real),)
    return kernel
