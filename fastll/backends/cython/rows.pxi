# Kernels over rows whose class axis is the faster one in memory: one row at a time, block by block.
#
# The second pass over a row, where there is one, finds the row in the second-level cache.
#
# A kernel takes a `Call` and returns 0, or -1 where there is not enough memory for its buffers.

from libc.stdlib cimport free, malloc

cdef enum Operation:
    LOGSUMEXP
    SOFTMAX
    CROSS_ENTROPY
    SIGMOID
    BINARY_CROSS_ENTROPY

cdef struct Call:
    Operation operation
    bint single  # computed in float32
    bint across  # by the kernels of columns.pxi
    bint log
    Options options
    Py_ssize_t classes  # of element-wise operations: elements of an outer row
    Py_ssize_t inner  # of element-wise operations: units of an outer row
    Operand x
    Operand b  # weights of log-sum-exp
    Operand target
    Operand weight
    Operand pos_weight
    Operand labels
    Operand state
    Operand out
    Operand sign
    Operand loss
    Operand lse
    Operand partial
    Operand grad


cdef Operand NOTHING  # zero throughout, as C initialises it


cdef void* aligned(void* memory) noexcept nogil:
    """The first address on a line of the cache, up to 63 bytes on."""
    return <void*> ((<size_t> memory + 63) // 64 * 64)


cdef State begin(const Operand* state, Py_ssize_t outer, Py_ssize_t inner) noexcept nogil:
    """The state a row starts from; the identity where there is none."""
    cdef State row
    cdef const char* at
    row.m, row.e, row.k = -INFINITY, 0.0, 0.0
    if state.address != NULL:
        at = start_of(state, outer, inner)
        memcpy(&row.m, at, 8)
        memcpy(&row.e, at + state.classes, 8)
        memcpy(&row.k, at + 2 * state.classes, 8)
    refer(&row)
    return row


cdef void store_state(
    const Operand* state, Py_ssize_t outer, Py_ssize_t inner, const State* row
) noexcept nogil:
    cdef char* at = start_of(state, outer, inner)
    memcpy(at, &row.m, 8)
    memcpy(at + state.classes, &row.e, 8)
    memcpy(at + 2 * state.classes, &row.k, 8)


cdef void store_lse(
    const Call* call, Py_ssize_t outer, Py_ssize_t inner, const State* row, real like
) noexcept nogil:
    """The log-sum-exp of a state, and the sign of the sum where it is asked for."""
    cdef double log_s, sign = sign_of(row.e + row.k)
    if call.b.address != NULL:
        log_s = weighted_log_sum(row)
        if row.m == -INFINITY and row.e == row.e:
            log_s = -INFINITY
        if call.sign.address == NULL and sign < 0.0:
            log_s = NAN
    else:
        log_s = log_sum(row)
    if call.sign.address != NULL:
        put(start_of(&call.sign, outer, inner), sign, like)
    put(start_of(&call.out, outer, inner), row.m + log_s, like)


cdef int logsumexp_rows(const Call* call, Py_ssize_t start, Py_ssize_t stop, real like) noexcept nogil:
    cdef void* memory = malloc(3 * BLOCK * sizeof(real) + 64)
    if memory == NULL:
        return -1
    cdef real* buffer = <real*> aligned(memory)
    cdef const real* v
    cdef const real* b
    cdef Py_ssize_t i, j, n, block, outer, inner
    cdef State row
    for i in range(start, stop):
        outer, inner = i // call.inner, i % call.inner
        row = begin(&call.state, outer, inner)
        for block in range(blocks_of(call.classes)):
            j = block * BLOCK
            n = min(BLOCK, call.classes - j)
            v = fetch(&call.x, start_of(&call.x, outer, inner), j, n, buffer)
            if call.b.address == NULL:
                fold_block(v, n, &row)
            else:
                b = fetch(&call.b, start_of(&call.b, outer, inner), j, n, buffer + BLOCK)
                fold_weighted_block(v, b, n, &row, buffer + 2 * BLOCK)
        settle(&row)
        if call.state.address != NULL:
            store_state(&call.state, outer, inner, &row)
        if call.out.address != NULL:
            store_lse(call, outer, inner, &row, like)
    free(memory)
    return 0


cdef int softmax_rows(const Call* call, Py_ssize_t start, Py_ssize_t stop, real like) noexcept nogil:
    cdef void* memory = malloc(2 * BLOCK * sizeof(real) + 64)
    if memory == NULL:
        return -1
    cdef real* buffer = <real*> aligned(memory)
    cdef real* out_buffer = buffer + BLOCK
    cdef const real* v
    cdef real* y
    cdef char* x_start
    cdef char* out_start
    cdef Py_ssize_t i, j, n, block, outer, inner
    cdef double log_s
    cdef State row
    for i in range(start, stop):
        outer, inner = i // call.inner, i % call.inner
        row = begin(&call.state, outer, inner)
        x_start, out_start = start_of(&call.x, outer, inner), start_of(&call.out, outer, inner)
        if call.state.address == NULL:
            for block in range(blocks_of(call.classes)):
                j = block * BLOCK
                n = min(BLOCK, call.classes - j)
                fold_block(fetch(&call.x, x_start, j, n, buffer), n, &row)
        log_s = log_sum(&row)
        for block in range(blocks_of(call.classes)):
            j = block * BLOCK
            n = min(BLOCK, call.classes - j)
            v = fetch(&call.x, x_start, j, n, buffer)
            y = target_of(&call.out, out_start, j, out_buffer)
            if call.log:
                log_block(v, n, row.m, log_s, y)
            else:
                exp_block(v, n, &row, 1.0 / (row.e + row.k), y)
            deliver(&call.out, out_start, j, n, out_buffer)
    free(memory)
    return 0


cdef const real* fetch_capped(
    const Call* call, const char* start, Py_ssize_t j, Py_ssize_t n, real* buffer, real* slope
) noexcept nogil:
    """`fetch`, then the soft cap where there is one; its derivative into `slope` unless NULL."""
    cdef const real* v = fetch(&call.x, start, j, n, buffer)
    if call.options.softcap == 0.0:
        return v
    cap_block(v, n, <real> call.options.softcap, buffer, slope)
    return buffer


cdef const real* fetch_target(
    const Call* call, const char* start, Py_ssize_t j, Py_ssize_t n, real* buffer
) noexcept nogil:
    """u = w ((1 - eps) t + eps / C) of the contract, or without t, w eps / C."""
    cdef double eps = call.options.label_smoothing
    cdef const real* t = NULL
    cdef const real* w = NULL
    if call.target.address != NULL:
        t = fetch(&call.target, start, j, n, buffer)
    if call.weight.address != NULL:
        w = <const real*> call.weight.address + j
    if t != NULL and w == NULL and eps == 0.0:
        return t
    target_block(t, w, n, 1.0 - eps, eps / call.classes, buffer)
    return buffer


cdef int cross_entropy_rows(
    const Call* call, Py_ssize_t start, Py_ssize_t stop, real like
) noexcept nogil:
    cdef void* memory = malloc(4 * BLOCK * sizeof(real) + 64)
    if memory == NULL:
        return -1
    cdef real* buffer = <real*> aligned(memory)
    cdef real* t_buffer = buffer + BLOCK
    cdef real* slope = buffer + 2 * BLOCK
    cdef real* out_buffer = buffer + 3 * BLOCK
    cdef bint capped = call.options.softcap != 0.0
    cdef bint sparse = call.labels.address != NULL
    # whether u is anything but 0
    cdef bint spread = not sparse or call.options.label_smoothing != 0.0
    cdef bint kept
    cdef char* x_start
    cdef char* t_start
    cdef char* grad_start
    cdef const real* v
    cdef real* g
    cdef Py_ssize_t i, j, n, block, outer, inner
    cdef int64_t y
    cdef double distance, mass, added, weight, before, x_y, w_y, slope_y
    cdef State row
    cdef Outcome result
    for i in range(start, stop):
        outer, inner = i // call.inner, i % call.inner
        x_start, t_start = start_of(&call.x, outer, inner), start_of(&call.target, outer, inner)
        grad_start = start_of(&call.grad, outer, inner)
        y = 0
        if sparse:
            memcpy(&y, start_of(&call.labels, outer, inner), 8)
        kept = not sparse or y != call.options.ignore_index
        row = begin(&NOTHING, 0, 0)
        distance = mass = 0.0  # sum of u (m - x), sum of u
        if kept or call.lse.address != NULL:
            for block in range(blocks_of(call.classes)):
                j = block * BLOCK
                n = min(BLOCK, call.classes - j)
                v = fetch_capped(call, x_start, j, n, buffer, <real*> NULL)
                before = row.m
                fold_block(v, n, &row)
                if spread and kept:
                    linear_block(
                        v, fetch_target(call, t_start, j, n, t_buffer), n, row.m, &added, &weight
                    )
                    distance += times(mass, row.m - before) + added
                    mass += weight
            settle(&row)
        if call.lse.address != NULL:
            put(start_of(&call.lse, outer, inner), row.m + log_sum(&row), like)
        if not kept:
            put(start_of(&call.loss, outer, inner), 0.0, like)
            if call.grad.address != NULL:
                for block in range(blocks_of(call.classes)):
                    j = block * BLOCK
                    n = min(BLOCK, call.classes - j)
                    fill_block(target_of(&call.grad, grad_start, j, out_buffer), n, <real> 0)
                    deliver(&call.grad, grad_start, j, n, out_buffer)
            continue
        x_y, w_y, slope_y = 0.0, 1.0, 1.0
        if sparse:
            x_y = fetch_capped(call, x_start, y, 1, buffer, slope)[0]
            slope_y = slope[0] if capped else 1.0
            w_y = (<const real*> call.weight.address)[y] if call.weight.address != NULL else 1.0
        result = finish(&row, call.classes, sparse, x_y, w_y, distance, mass, &call.options)
        put(start_of(&call.loss, outer, inner), result.loss, like)
        if call.grad.address == NULL:
            continue
        for block in range(blocks_of(call.classes)):
            j = block * BLOCK
            n = min(BLOCK, call.classes - j)
            v = fetch_capped(call, x_start, j, n, buffer, slope)
            g = target_of(&call.grad, grad_start, j, out_buffer)
            exp_block(v, n, &row, result.factor, g)
            if spread:
                subtract_block(
                    g, fetch_target(call, t_start, j, n, t_buffer), n, call.options.scale
                )
            if capped:
                multiply_block(g, slope, n)
            if sparse and j <= y < j + n:
                g[y - j] = <real> (result.g_y * slope_y)
            deliver(&call.grad, grad_start, j, n, out_buffer)
    free(memory)
    return 0


cdef Py_ssize_t check_labels(
    const char* labels,
    Py_ssize_t count,
    Py_ssize_t classes,
    long long ignore_index,
    const char* weight,  # or NULL
    bint single,
    double* kept,
) noexcept nogil:
    """First position of a label outside [0, classes), or -1; the summed weight of the others."""
    cdef Py_ssize_t i
    cdef int64_t y
    kept[0] = 0.0
    for i in range(count):
        y = element(labels + i * 8, False, <int64_t> 0)
        if y == ignore_index:
            continue
        if y < 0 or y >= classes:
            kept[0] = 0.0
            return i
        if weight == NULL:
            kept[0] += 1.0
        elif single:
            kept[0] += element(weight + y * 4, False, <float> 0)
        else:
            kept[0] += element(weight + y * 8, False, <double> 0)
    return -1
