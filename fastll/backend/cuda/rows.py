"""Rows whose classes are contiguous, each read once: a team of threads holds a row in its registers.

A thread holds a few vectors of 16 bytes. A row longer than what a team holds is shared by the blocks
of a cluster, each with a segment, or goes through a block in chunks, and is read once more to be
written. Of a row whose length is no multiple of a vector, the vectors are those of the memory: the
first and the last one are then read and written number by number.

The order of a sum depends on the number of classes alone. Element j of a chunk is in lane j modulo
(lanes of a vector x threads), wherever the chunk begins in memory: lanes that a shift has moved to
another thread are exchanged before they fold.
"""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from fastll.backend.cuda import maths, state, team
from fastll.backend.cuda.compiler import WORD, cuda, device, variants
from fastll.backend.cuda.primitives import (
    VECTOR,
    cluster_barrier,
    cluster_rank,
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

WARPS = team.WARPS
#: Places in shared memory: what the warps and then the teams have found, and what became of it.
TOPS, SUMS, EQUALS, DISTANCES, MASSES, RESULTS = (WARPS * i for i in range(6))
FINISHED = RESULTS + 2 * WARPS
#: Numbers before those by which lanes are exchanged.
SCRATCH = FINISHED + 4 * WARPS


@variants
def kernel(
    name,
    vectors,
    operation,
    labels=None,
    weights=None,
    written=False,
    smoothed=False,
    capped=False,
    cluster=1,
    chunked=False,
    aligned=False,
    modern=False,
):
    """The kernel for rows of the format `name`, `vectors` to a thread.

    `operation` is "logsumexp", "softmax", "log_softmax", "sparse" or "dense". `labels` and `weights`
    are the formats of the labels of a sparse one and of class weights, or None; `written` whether there
    is an output in the shape of x (the gradient of a cross-entropy); `smoothed` and `capped` which of
    its options are in force; `cluster` how many blocks share a row, `chunked` whether a block has more
    than one chunk; `aligned` whether every row begins and ends with a vector; `modern` as in
    `maths.of`.
    """
    real = compute_type(name)
    lanes, size = lanes_of(name), size_of(name)
    number = "float32" if real is np.float32 else "float64"  # format of a value
    count = vectors * lanes
    sparse, dense, logs = operation == "sparse", operation == "dense", operation == "log_softmax"
    spread_out = dense or smoothed  # whether targets are more than a point
    # the slope of the cap needs the numbers themselves once more
    held = written and not capped and not chunked
    clustered, weighted = cluster > 1, weights is not None
    f, group = maths.of(real, approximate=size == 2, modern=modern), team.of(real)
    zero, one, infinity, nan, unshift = f.zero, f.one, f.infinity, f.nan, f.unshift
    exponential, reference, window, exp_minus_scaled = (
        f.exponential,
        f.reference,
        f.window,
        f.exp_minus_scaled,
    )
    lead_of, softcap = f.lead_of, f.softcap
    states = state.of(real, sparse, dense, spread_out)
    identity, merged, finite, finish = states.identity, states.merged, states.finite, states.finish
    put, take_from_peer = states.put, states.take_from_peer
    maximum, post, collect = group.maximum, group.post, group.collect
    read, write, read_number = reader(name), writer(name), reader(number)
    write_number, read_weight = writer(number), reader(weights or number, real)
    read_label = integer_reader(labels or "int64")
    fetch_x, fetch_t = vector_reader(name, -np.inf), vector_reader(name, 0.0)
    deliver = vector_writer(name, modern)

    @device
    def place(q, shift):
        """Number in the chunk of the first element of the thread's vector q; below 0 before it."""
        return np.int32(np.int32(cuda.threadIdx.x + q * cuda.blockDim.x) * lanes - shift)

    @device
    def whole_below(address, length, shift):
        """The place below which vectors are whole, in memory as well; 0 if the memory's are others."""
        if not aligned and (address - shift * size) & (VECTOR - 1) != 0:
            return np.uint32(0)
        return np.uint32(max(length - (lanes - 1), 0))

    @device
    def load(values, source, length, shift, target):
        """The thread's part of a chunk; -inf, or of a target 0, where it has none."""
        limit = whole_below(source, length, shift)
        for q in range(vectors):
            j = place(q, shift)
            whole = np.uint32(j) < limit  # nor is one below 0
            if target:
                fetch_t(values, q * lanes, source + j * size, whole)
            else:
                fetch_x(values, q * lanes, source + j * size, whole)
        if not aligned:
            for q in range(vectors):
                j = place(q, shift)
                if j < length and not np.uint32(j) < limit:
                    for i in range(lanes):
                        if np.uint32(j + i) < np.uint32(length):
                            values[q * lanes + i] = read(source + (j + i) * size)

    @device
    def store(target, values, length, shift):
        limit = whole_below(target, length, shift)
        for q in range(vectors):
            j = place(q, shift)
            if np.uint32(j) < limit:
                deliver(target + j * size, values, q * lanes)
            elif not aligned and j < length:
                for i in range(lanes):
                    if np.uint32(j + i) < np.uint32(length):
                        write(target + (j + i) * size, values[q * lanes + i])

    @device
    def in_order(lane, shift, memory, at):
        """Lanes as they are without a shift, by way of shared memory."""
        together = lanes * cuda.blockDim.x
        first = lanes * cuda.threadIdx.x
        for i in range(lanes):
            moved = first + i - shift
            memory[np.uint32(at + (moved if moved >= 0 else moved + together))] = lane[i]
        cuda.syncthreads()
        for i in range(lanes):
            lane[i] = memory[np.uint32(at + first + i)]
        cuda.syncthreads()

    @device
    def folded(lane):
        """The sum of a thread's lanes."""
        value = lane[0]
        for i in range(1, lanes):
            value += lane[i]
        return value

    @device
    def cap_all(values, length, shift, cap):
        for q in range(vectors):
            j = place(q, shift)
            for i in range(lanes):
                if 0 <= j + i < length:
                    values[q * lanes + i] = softcap(values[q * lanes + i], cap)[0]

    @device
    def find_targets(u, source, weight, weight_step, length, shift, keep, spread):
        """The thread's targets u = w (keep t + spread), 0 where it has none.

        `source` and `weight` are those of the chunk's first element.
        """
        if dense:
            load(u, source, length, shift, True)
        for q in range(vectors):
            j = place(q, shift)
            for i in range(lanes):
                value = zero
                if 0 <= j + i < length:
                    value = fma(u[q * lanes + i], keep, spread) if dense else spread
                    if weighted:
                        value *= read_weight(weight + (j + i) * weight_step)
                u[q * lanes + i] = value

    def reduce(
        x,
        x_step,
        rows,
        classes,
        segment,
        capacity,
        value,
        value_step,
        lse,
        lse_step,
        out,
        out_step,
        target,
        target_step,
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
        values = cuda.local.array(count, real)
        u = cuda.local.array(count, real)
        lane = cuda.local.array(lanes, real)
        exchange = SCRATCH + cuda.threadIdx.y * lanes * cuda.blockDim.x
        teams = cuda.blockDim.y
        rank, group = 0, np.int64(cuda.blockIdx.x)
        if clustered:
            rank, group = cluster_rank(), group // cluster
        row = group * teams + cuda.threadIdx.y
        source = x + row * x_step
        ragged = not aligned and (classes & (lanes - 1)) != 0
        shift = np.int32((source & (VECTOR - 1)) // size) if ragged else np.int32(0)
        first = rank * segment
        last = min(classes, first + segment) if row < rows else first

        # one thread a team, all of them of one warp, keeps its state and finishes it
        member = cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        own_row = group * teams + member
        finisher = member < teams and own_row < rows
        y, kept = np.int64(-1), True
        x_y, w_y, slope_y = zero, one, one
        if sparse and finisher:
            y = read_label(target + own_row * target_step)
            kept = y != ignore_index
            if y < 0 or y >= classes:
                y = np.int64(-1)
            else:
                x_y = read(x + own_row * x_step + y * size)
                if capped:
                    x_y, slope_y = softcap(x_y, cap)
                if weighted:
                    w_y = read_weight(weight + y * weight_step)

        row_state = identity()
        top, lead = -infinity, zero
        begin = first
        while True:
            length = np.int32(min(capacity, last - begin))
            load(values, source + begin * size, length, shift, False)
            if capped:
                cap_all(values, length, shift, cap)
            top = values[0]
            for i in range(1, count):
                top = larger(top, values[i])
            top = maximum(top, memory, TOPS)
            n, offset = reference(top)
            floor, magic = window(n)
            lead = lead_of(top, offset, floor, magic)
            if spread_out:
                t = target + row * target_step + begin * size if dense else np.int64(0)
                find_targets(
                    u, t, weight + begin * weight_step, weight_step, length, shift, keep, spread
                )
                for i in range(lanes):
                    lane[i] = zero
                base = finite(top)
                for i in range(count):
                    lane[i % lanes] += zero if u[i] == zero else u[i] * (base - values[i])
                if ragged:
                    in_order(lane, shift, memory, exchange)
                post(folded(lane), memory, DISTANCES)
                for i in range(lanes):
                    lane[i] = zero
                for i in range(count):
                    lane[i % lanes] += u[i]
                if ragged:
                    in_order(lane, shift, memory, exchange)
                post(folded(lane), memory, MASSES)
            equal, level = zero, top
            if offset != zero:
                level = top - offset
                if not logs:
                    for i in range(count):
                        values[i] -= offset
            for i in range(lanes):
                lane[i] = zero
            for i in range(count):
                v = values[i] - offset if logs else values[i]
                term = exponential(v, floor, magic)
                if v == level:
                    equal += one
                else:
                    lane[i % lanes] += term
                if held and not logs:
                    values[i] = term
            if ragged:
                in_order(lane, shift, memory, exchange)
            post(folded(lane), memory, SUMS)
            post(equal, memory, EQUALS)
            if teams > 1 and cuda.threadIdx.x == 0:
                memory[np.uint32(RESULTS + cuda.threadIdx.y)] = top
                memory[np.uint32(RESULTS + WARPS + cuda.threadIdx.y)] = lead
            cuda.syncthreads()
            if finisher:
                part_top, part_lead = top, lead
                if teams > 1:
                    part_top = memory[np.uint32(RESULTS + member)]
                    part_lead = memory[np.uint32(RESULTS + WARPS + member)]
                e, low = collect(memory, SUMS, member)
                k, _ = collect(memory, EQUALS, member)
                if part_top == -infinity:
                    k = zero
                d, d_low, w, w_low = zero, zero, zero, zero
                if spread_out:
                    d, d_low = collect(memory, DISTANCES, member)
                    w, w_low = collect(memory, MASSES, member)
                part = part_top, e / part_lead, low / part_lead, k, d, d_low, w, w_low
                row_state = merged(row_state, part)
            if not chunked:
                break
            begin += capacity
            if begin >= last:
                break

        if clustered:
            if finisher:
                put(memory, RESULTS, 1, row_state)
            cluster_barrier()
            if finisher:
                row_state = identity()
                for peer in range(np.int64(cluster)):
                    row_state = merged(row_state, take_from_peer(memory, RESULTS, peer))

        gradient = scale * read_number(divisor) if divisor != 0 else scale
        if finisher:
            m = row_state[0]
            result, row_lse, log_s, factor, g_y = finish(
                row_state,
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
            if rank == 0:
                if value != 0:
                    write_number(value + own_row * value_step, result)
                if lse != 0:
                    write_number(lse + own_row * lse_step, row_lse)
            if written:
                at = FINISHED + member
                memory[np.uint32(at)], memory[np.uint32(at + WARPS)] = m, factor
                memory[np.uint32(at + 2 * WARPS)], memory[np.uint32(at + 3 * WARPS)] = log_s, g_y
        if clustered:
            cluster_barrier()  # before a block is gone whose memory another one reads
        if not written:
            return
        if not clustered:
            cuda.syncthreads()

        if row >= rows:
            return
        at = FINISHED + cuda.threadIdx.y
        m, factor = memory[np.uint32(at)], memory[np.uint32(at + WARPS)]
        log_s, g_y = memory[np.uint32(at + 2 * WARPS)], memory[np.uint32(at + 3 * WARPS)]
        if sparse:
            y = read_label(target + row * target_step)
            kept = y != ignore_index
        destination = out + row * out_step
        # what the block's largest becomes, and for a block of a cluster that times 2**SHIFT
        peak = factor
        if clustered and held and not logs:
            factor *= exp_minus_scaled(top, m)
            peak = factor * unshift
        begin = first
        while True:
            length = np.int32(min(capacity, last - begin))
            if not held:
                load(values, source + begin * size, length, shift, False)
                n, offset = reference(m)
                floor, magic = window(n)
                lead = lead_of(m, offset, floor, magic)
                if spread_out:
                    t = target + row * target_step + begin * size if dense else np.int64(0)
                    find_targets(
                        u, t, weight + begin * weight_step, weight_step, length, shift, keep, spread
                    )
            if logs:
                for i in range(count):
                    # both parts are at most 0: nothing cancels
                    values[i] = (values[i] - m) - log_s
                    if abs(m) == infinity and (values[i] > -infinity or m < zero):
                        values[i] = nan
            else:
                ratio = factor / lead
                if clustered and held:
                    ratio = factor / (lead * unshift)
                for i in range(count):
                    v, slope = values[i], one
                    if not held:
                        if capped:
                            v, slope = softcap(v, cap)
                        v = exponential(v - offset, floor, magic)
                    g = v * ratio
                    if clustered and held:  # in two steps: the ratio may be no normal number
                        g *= unshift * unshift
                    if v == lead:
                        g = peak
                    if spread_out:
                        g -= gradient * u[i]
                    if capped:
                        g *= slope
                    values[i] = g
                if sparse and not kept:
                    for i in range(count):
                        values[i] = zero
            store(destination + begin * size, values, length, shift)
            if sparse and kept and 0 <= y - begin < length:
                at_label = np.int32(y - begin)
                for q in range(vectors):
                    j = place(q, shift)
                    if j <= at_label and at_label < j + lanes:
                        write(destination + y * size, g_y)
            if not chunked:
                break
            begin += capacity
            if begin >= last:
                break

    reduce.cluster = cluster
    numbers = (numba_type(real),) * 5
    reduce.signature = (WORD,) * 18 + numbers
    reduce.real = real
    return reduce
