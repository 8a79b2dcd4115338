"""Rows of any strides, formats and operands, and short rows: a few threads to a row, or one.

The threads of a row take its classes in turn, four at a time, each with a running state, and fold these
by halves; how many they are depends on the number of classes alone. Rows that lie one after the other
and are short come and go through shared memory, so that memory sees whole vectors.
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
import math

import numpy as np

from fastll.backend.cuda import maths
from fastll.backend.cuda import state as states
from fastll.backend.cuda.compiler import WORD, cuda, device, variants
from fastll.backend.cuda.primitives import (
    VECTOR,
    compute_type,
    fma,
    integer_reader,
    lanes_of,
    larger,
    numba_type,
    reader,
    size_of,
    vector_reader,
    vector_writer,
    writer,
)

#: Classes that a thread takes together.
TOGETHER = 4


@functools.cache
def _staging(name):
    """Functions to bring rows of x into shared memory, and to take those of the output from there."""
    real = compute_type(name)
    lanes, size = lanes_of(name), size_of(name)
    read, write = reader(name), writer(name)
    fetch, deliver = vector_reader(name, 0.0), vector_writer(name)

    @device
    def bring(tile, source, rows, classes, pitch):
        """Rows of x, one after the other in memory, into shared memory."""
        part = cuda.local.array(lanes, real)
        elements, width = np.uint32(rows * classes), np.uint32(classes)
        ready = (
            np.uint32(elements & ~np.uint32(lanes - 1)) if source & (VECTOR - 1) == 0 else np.uint32(0)
        )
        at = np.uint32(cuda.threadIdx.x * lanes)
        while at < ready:
            fetch(part, 0, source + at * size, True)
            i = np.uint32(at // width)
            j = np.uint32(at - i * width)
            for k in range(lanes):
                tile[np.uint32(i * pitch + j)] = part[k]
                j = np.uint32(j + 1)
                if j == width:
                    i, j = np.uint32(i + 1), np.uint32(0)
            at = np.uint32(at + cuda.blockDim.x * lanes)
        at = np.uint32(ready + cuda.threadIdx.x)
        while at < elements:
            i = np.uint32(at // width)
            tile[np.uint32(i * pitch + (at - i * width))] = read(source + at * size)
            at = np.uint32(at + cuda.blockDim.x)

    @device
    def take(tile, target, rows, classes, pitch):
        """Rows of the output from shared memory."""
        part = cuda.local.array(lanes, real)
        elements, width = np.uint32(rows * classes), np.uint32(classes)
        ready = (
            np.uint32(elements & ~np.uint32(lanes - 1)) if target & (VECTOR - 1) == 0 else np.uint32(0)
        )
        at = np.uint32(cuda.threadIdx.x * lanes)
        while at < ready:
            i = np.uint32(at // width)
            j = np.uint32(at - i * width)
            for k in range(lanes):
                part[k] = tile[np.uint32(i * pitch + j)]
                j = np.uint32(j + 1)
                if j == width:
                    i, j = np.uint32(i + 1), np.uint32(0)
            deliver(target + at * size, part, 0)
            at = np.uint32(at + cuda.blockDim.x * lanes)
        at = np.uint32(ready + cuda.threadIdx.x)
        while at < elements:
            i = np.uint32(at // width)
            write(target + at * size, tile[np.uint32(i * pitch + (at - i * width))])
            at = np.uint32(at + cuda.blockDim.x)

    return bring, take


@variants
def kernel(
    name,
    operation,
    labels=None,
    dense=None,
    factors=None,
    weights=None,
    running=False,
    written=None,
    smoothed=False,
    capped=False,
    staged=False,
):
    """The kernel for rows of the format `name`.

    `operation` is "logsumexp", "softmax", "log_softmax" or "cross_entropy". `labels`, `dense`,
    `factors` and `weights` are the formats of labels, of a dense target, of the weights of a
    log-sum-exp and of classes, or None; `running` whether there is a running state; `written` the
    format of an output in the shape of x, or None; `smoothed` and `capped` which options of a
    cross-entropy are in force; `staged` whether rows go through shared memory.
    """
    single = compute_type(name) is np.float32
    # weights may cancel, and what is left of a sum must not be its rounding errors
    real = np.float32 if single and factors is None else np.float64
    logs = operation == "log_softmax"
    sparse = labels is not None
    spread_out = dense is not None or smoothed
    weighted, number = weights is not None, "float32" if single else "float64"
    f = maths.of(real, approximate=size_of(name) == 2 and real is np.float32)
    value_type = np.float32 if single else np.float64
    zero, one, infinity, nan, unshift = f.zero, f.one, f.infinity, f.nan, f.unshift
    exponential, reference, window, exp_minus_scaled = (
        f.exponential,
        f.reference,
        f.window,
        f.exp_minus_scaled,
    )
    lead_of, two_part_sum, softcap = f.lead_of, f.add, f.softcap
    own = states.of(real, sparse, dense is not None, spread_out)
    merged, finite, rebased, finish = own.merged, own.finite, own.rebased, own.finish
    put, take_state = own.put, own.take
    join_doubles = states.of(np.float64).joined
    signed = factors is not None
    exact = operation == "logsumexp" and (signed or running)
    read, read_number = reader(name, real), reader(number, real)
    read_t = reader(dense or name, real)
    read_b = reader(factors or name, real)
    read_state, write_state = reader("float64"), writer("float64")
    write_number, read_weight = writer(number), reader(weights or number, real)
    write = writer(written or name)
    read_label = integer_reader(labels or "int64")
    out_type = compute_type(written or name)

    @device
    def log_of(e, k):
        """log|e + k|, from whichever part dominates, in float64."""
        if abs(e) < abs(k):
            return math.log(abs(k)) + math.log1p(e / k)
        return math.log(abs(e + k)) if e + k != 0.0 else -np.inf

    @device
    def target_of(t, w, w_step, j, t_classes, keep, spread):
        """u = w (keep t + spread) of class j."""
        u = fma(read_t(t + j * t_classes), keep, spread) if dense is not None else spread
        if weighted:
            u *= read_weight(w + j * w_step)
        return u

    # what is in shared memory is sooner read once more than its sum moved to each new maximum
    twice = staged and not (spread_out or capped)
    bring, take = _staging(name) if staged else (None, None)

    def reduce(
        rows,
        classes,
        inner,
        lanes_of_row,
        across,
        x,
        x_outer,
        x_classes,
        x_inner,
        out,
        out_outer,
        out_classes,
        out_inner,
        t,  # of a log-sum-exp: the weights
        t_outer,
        t_classes,
        t_inner,
        state,  # of a sparse cross-entropy: the labels
        state_outer,
        state_inner,
        state_part,
        value,
        value_outer,
        value_inner,
        other,  # the sign of a log-sum-exp, the lse of a cross-entropy
        other_outer,
        other_inner,
        weight,
        weight_step,
        divisor,
        ignore_index,
        keep,
        spread,
        z_loss,
        cap,
        scale,
    ):
        memory = cuda.shared.array(0, real)
        held = cuda.local.array(TOGETHER, real)
        u = cuda.local.array(TOGETHER, real)
        rows_of_block = cuda.blockDim.x // lanes_of_row
        first_row = np.int64(cuda.blockIdx.x) * rows_of_block
        if across:
            lane, local_row = cuda.threadIdx.x // rows_of_block, cuda.threadIdx.x % rows_of_block
        else:
            lane, local_row = cuda.threadIdx.x % lanes_of_row, cuda.threadIdx.x // lanes_of_row
        row = first_row + local_row
        live = row < rows
        o, i = row, np.int64(0)
        if inner != 1:  # a division takes as long as several elements
            o = row // inner
            i = row - o * inner
        source = x + o * x_outer + i * x_inner
        t_source = t + o * t_outer + i * t_inner
        pitch = classes | 1  # so that neighbouring rows are in different banks
        present = min(rows_of_block, rows - first_row)
        if staged:
            bring(memory, x + first_row * x_outer, present, classes, pitch)
            cuda.syncthreads()
        mine = local_row * pitch
        y, kept = np.int64(-1), True
        x_y, w_y, slope_y = zero, one, one
        if sparse and live:
            y = read_label(state + o * state_outer + i * state_inner)
            kept = y != ignore_index
            if y < 0 or y >= classes:
                y = np.int64(-1)
            else:
                x_y = memory[np.uint32(mine + y)] if staged else read(source + y * x_classes)
                if capped:
                    x_y, slope_y = softcap(x_y, cap)
                if weighted:
                    w_y = read_weight(weight + y * weight_step)

        m, e, low, k = -infinity, zero, zero, zero
        distance, distance_low, mass, mass_low = zero, zero, zero, zero
        n, offset = reference(m)
        floor, magic = window(n)
        lead = one
        stop = classes if live else 0
        if running and operation != "logsumexp":
            stop = 0  # the state is that of the whole row
        if twice:
            tile, width, j = np.uint32(mine), np.uint32(stop), np.uint32(0)
            while j < width:
                m = larger(m, memory[np.uint32(tile + j)])
                j = np.uint32(j + 1)
            n, offset = reference(m)
            floor, magic = window(n)
            lead = lead_of(m, offset, floor, magic)
            level, part = m - offset, zero
            j = np.uint32(0)
            while j < width:
                v = memory[np.uint32(tile + j)] - offset
                if v == level:
                    k += one
                else:
                    part += exponential(v, floor, magic)
                j = np.uint32(j + 1)
                if j & np.uint32(15) == 0:  # so often that nothing is lost
                    e, low = two_part_sum(e, low, part, zero)
                    part = zero
            e, low = two_part_sum(e, low, part, zero)
            stop = 0
        for begin in range(lane, stop, lanes_of_row * TOGETHER):
            top = -infinity
            for c in range(TOGETHER):
                held[c] = -infinity
                u[c] = zero
                j = begin + c * lanes_of_row
                if j < stop:
                    v = memory[np.uint32(mine + j)] if staged else read(source + j * x_classes)
                    if capped:
                        v = softcap(v, cap)[0]
                    if signed:
                        u[c] = read_b(t_source + j * t_classes)
                        if u[c] == zero:
                            v = -infinity
                    if spread_out:
                        u[c] = target_of(t_source, weight, weight_step, j, t_classes, keep, spread)
                    held[c] = v
                    if v > top:
                        top = v
            if top > m:
                n, offset = reference(top)
                floor, magic = window(n)
                before, lead = lead, lead_of(top, offset, floor, magic)
                if signed:
                    lead *= unshift
                if m > -infinity:
                    rise = exp_minus_scaled(m, top) * (lead if signed else lead * unshift)
                    if signed:
                        rise *= unshift
                    e, low = two_part_sum(e / before, low / before, k, zero)
                    e, low = e * rise, low * rise
                distance, distance_low = rebased(distance, distance_low, mass, m, top)
                m, k = top, zero
            sum_4, count_4, distance_4, mass_4 = zero, zero, zero, zero
            for c in range(TOGETHER):
                v = held[c]
                if signed:
                    # scaled back before the weight comes in, which may be as large as a number can be
                    if v == m:
                        count_4 += u[c] * infinity if m == infinity and u[c] != zero else u[c]
                    elif u[c] != zero:
                        sum_4 += (exponential(v - offset, floor, magic) * unshift) * u[c]
                elif v == m:
                    count_4 += one
                else:
                    sum_4 += exponential(v - offset, floor, magic)
                if spread_out and u[c] != zero:
                    distance_4 += u[c] * (finite(m) - v)
                    mass_4 += u[c]
            e, low = two_part_sum(e, low, sum_4, zero)
            k += count_4
            if spread_out:
                distance, distance_low = two_part_sum(distance, distance_low, distance_4, zero)
                mass, mass_low = two_part_sum(mass, mass_low, mass_4, zero)
        e, low = e / lead, low / lead
        if m == -infinity:
            k = zero

        row_state = m, e, low, k, distance, distance_low, mass, mass_low
        if lanes_of_row > 1:
            step, me = cuda.blockDim.x, cuda.threadIdx.x
            apart = rows_of_block if across else 1
            half = lanes_of_row
            while half > 1:
                put(memory, me, step, row_state)
                cuda.syncthreads()
                half //= 2
                if lane < half:
                    row_state = merged(row_state, take_state(memory, me + half * apart, step))
                cuda.syncthreads()
            put(memory, me, step, row_state)
            cuda.syncthreads()
            row_state = take_state(memory, me - lane * apart, step)  # the first one's, for all
        m, e, low, k, distance, distance_low, mass, mass_low = row_state

        place = state + o * state_outer + i * state_inner
        value_place = value + o * value_outer + i * value_inner
        other_place = other + o * other_outer + i * other_inner
        if exact:
            # in float64, as the state is, and what is left where weights cancel
            if live and lane == 0:
                m_2, e_2, k_2 = np.float64(m), np.float64(e) + np.float64(low), np.float64(k)
                if running:
                    m_2, e_2, low_2, k_2 = join_doubles(
                        read_state(place),
                        read_state(place + state_part),
                        0.0,
                        read_state(place + 2 * state_part),
                        m_2,
                        e_2,
                        0.0,
                        k_2,
                    )
                    e_2 += low_2
                    write_state(place, m_2)
                    write_state(place + state_part, e_2)
                    write_state(place + 2 * state_part, k_2)
                if value != 0:
                    s = e_2 + k_2
                    result = m_2 + e_2  # of no elements
                    if m_2 > -np.inf:
                        result = m_2 + log_of(e_2, k_2)
                    if other != 0:
                        sign = s
                        if s != 0.0 and s == s:
                            sign = 1.0 if s > 0.0 else -1.0
                        write_number(other_place, value_type(sign))
                    elif s < 0.0:
                        result = np.nan
                    write_number(value_place, value_type(result))
        else:
            if running and live:
                m, e = real(read_state(place)), real(read_state(place + state_part))
                low, k = zero, real(read_state(place + 2 * state_part))
            gradient = scale * read_number(divisor) if divisor != 0 else scale
            result, row_lse, log_s, factor, g_y = finish(
                (m, e, low, k, distance, distance_low, mass, mass_low),
                classes,
                y,
                kept,
                x_y,
                w_y,
                slope_y,
                keep,
                spread,
                z_loss,
                gradient,
            )
            if live and lane == 0:
                if value != 0:
                    write_number(value_place, value_type(result))
                if other != 0:
                    write_number(other_place, value_type(row_lse))
            if written is not None:
                n, offset = reference(m)
                floor, magic = window(n)
                lead = lead_of(m, offset, floor, magic)
                ratio = factor / lead
                if twice and not logs:
                    tile, width, j = np.uint32(mine), np.uint32(classes if live else 0), np.uint32(0)
                    while j < width:
                        term = exponential(memory[np.uint32(tile + j)] - offset, floor, magic)
                        v = factor if term == lead else term * ratio
                        memory[np.uint32(tile + j)] = v if kept else zero
                        j = np.uint32(j + 1)
                    if sparse and kept and y >= 0:
                        memory[np.uint32(mine + y)] = g_y
                elif live:
                    for j in range(lane, classes, lanes_of_row):
                        v = memory[np.uint32(mine + j)] if staged else read(source + j * x_classes)
                        slope = one
                        if logs:
                            # both parts are at most 0: nothing cancels
                            v = (v - m) - log_s
                            if abs(m) == infinity and (v > -infinity or m < zero):
                                v = nan
                        else:
                            if capped:
                                v, slope = softcap(v, cap)
                            term = exponential(v - offset, floor, magic)
                            v = factor if term == lead else term * ratio
                            if spread_out:
                                v -= gradient * target_of(
                                    t_source, weight, weight_step, j, t_classes, keep, spread
                                )
                            if capped:
                                v *= slope
                            if sparse and j == y:
                                v = g_y
                            if not kept:
                                v = zero
                        if staged:
                            memory[np.uint32(mine + j)] = v
                        else:
                            write(out + o * out_outer + i * out_inner + j * out_classes, out_type(v))
                if staged:
                    cuda.syncthreads()
                    take(memory, out + first_row * out_outer, present, classes, pitch)

    numbers = (numba_type(real),) * 5
    reduce.signature = (WORD,) * 31 + numbers
    reduce.real = real
    return reduce
