# Kernels over elements: one unit is `CHUNK` elements of one outer row.

from fastll.contract import CHUNK as _CHUNK

cdef Py_ssize_t CHUNK = _CHUNK


cdef void sigmoid_block(
    const real* v, Py_ssize_t n, bint log, real* out, bint streamed
) noexcept nogil:
    cdef Vec[real] x
    cdef Py_ssize_t b, j
    for b in range(vectors_of(v, n)):
        j = b * lanes_of(v)
        x = load_ahead(v + j, n - j, splat(<real> 0))
        x = log_sigmoid(x, v[0]) if log else sigmoid(x, v[0])
        if streamed and n - j >= lanes_of(v):
            stream_all(out + j, x)
        else:
            store(out + j, n - j, x)


cdef int sigmoid_units(const Call* call, Py_ssize_t start, Py_ssize_t stop, real like) noexcept nogil:
    cdef void* memory = malloc(2 * BLOCK * sizeof(real) + 64)
    if memory == NULL:
        return -1
    cdef real* buffer = <real*> aligned(memory)
    cdef real* out_buffer = buffer + BLOCK
    cdef char* x_start
    cdef char* out_start
    cdef Py_ssize_t i, j, n, outer, end
    for i in range(start, stop):
        outer, j = i // call.inner, i % call.inner * CHUNK
        end = min(call.classes, j + CHUNK)
        x_start, out_start = start_of(&call.x, outer, 0), start_of(&call.out, outer, 0)
        n = 0
        if call.out.streamed:
            n = until_line(<real*> (out_start + j * call.out.classes))
        while j < end:
            n = min(n if n > 0 else BLOCK, end - j)
            sigmoid_block(
                fetch(&call.x, x_start, j, n, buffer),
                n,
                call.log,
                target_of(&call.out, out_start, j, out_buffer),
                call.out.streamed,
            )
            deliver(&call.out, out_start, j, n, out_buffer)
            j, n = j + n, 0
    if call.out.streamed:
        stream_fence()
    free(memory)
    return 0


cdef double bce_block(
    const real* v,
    const real* t,
    const real* w,
    const real* p,
    Py_ssize_t n,
    double scale,
    real* loss,
    real* grad,
) noexcept nogil:
    """Losses and gradients where they are not NULL; the sum of the losses.

    Where that is all, and nothing is weighted, the sum of log1p(e) is the log1p of one number a lane,
    q = prod (1 + e) - 1: at most 2**64 in float32 and 2**128 in float64, and it keeps all its digits
    where every e is tiny.
    """
    cdef Vec[real] target, weight, pos_weight, value, slope, e
    cdef Vec[real] zero = splat(<real> 0), one = splat(<real> 1)
    cdef Vec[real] sums = zero, q = zero
    cdef bint together = w == NULL and p == NULL and loss == NULL
    cdef Py_ssize_t b, j
    weight = pos_weight = one
    for b in range(vectors_of(v, n)):
        j = b * lanes_of(v)
        target = load_ahead(t + j, n - j, zero)
        # with a target of 0, lanes beyond the end are 0
        value = load_ahead(v + j, n - j, splat(-<real> INFINITY))
        if together:
            sums = sums + bce_parts(value, target, one - target, &e, &slope, v[0])
            q = q + fma(q, e, e)
        else:
            if w != NULL:
                weight = load_ahead(w + j, n - j, zero)
            if p != NULL:
                pos_weight = load_ahead(p + j, n - j, one)
            value = bce(value, target * pos_weight, one - target, &slope, v[0]) * weight
            sums = sums + value
            slope = slope * weight
        if loss != NULL:
            store(loss + j, n - j, value)
        if grad != NULL:
            store(grad + j, n - j, slope * splat(<real> scale))
    return total(sums) + total(log1p_sum(widen_lower(q)) + log1p_sum(widen_upper(q)))


cdef const real* fetch_unit(
    const Operand* x, Py_ssize_t outer, Py_ssize_t j, Py_ssize_t n, real* buffer
) noexcept nogil:
    """`fetch` of an element-wise operand, NULL where there is none."""
    return fetch(x, start_of(x, outer, 0), j, n, buffer) if x.address != NULL else NULL


cdef int bce_units(const Call* call, Py_ssize_t start, Py_ssize_t stop, real like) noexcept nogil:
    cdef void* memory = malloc(6 * BLOCK * sizeof(real) + 64)
    if memory == NULL:
        return -1
    cdef real* buffer = <real*> aligned(memory)
    cdef real* loss_buffer = buffer + 4 * BLOCK
    cdef real* grad_buffer = buffer + 5 * BLOCK
    cdef real* values = NULL
    cdef real* slopes = NULL
    cdef char* loss_start
    cdef char* grad_start
    cdef Py_ssize_t i, j, n, block, outer, first, end
    cdef double result
    for i in range(start, stop):
        outer, first = i // call.inner, i % call.inner * CHUNK
        end = min(call.classes, first + CHUNK)
        loss_start, grad_start = start_of(&call.loss, outer, 0), start_of(&call.out, outer, 0)
        result = 0.0
        for block in range(blocks_of(end - first)):
            j = first + block * BLOCK
            n = min(BLOCK, end - j)
            if loss_start != NULL:
                values = target_of(&call.loss, loss_start, j, loss_buffer)
            if grad_start != NULL:
                slopes = target_of(&call.out, grad_start, j, grad_buffer)
            result += bce_block(
                fetch_unit(&call.x, outer, j, n, buffer),
                fetch_unit(&call.target, outer, j, n, buffer + BLOCK),
                fetch_unit(&call.weight, outer, j, n, buffer + 2 * BLOCK),
                fetch_unit(&call.pos_weight, outer, j, n, buffer + 3 * BLOCK),
                n,
                call.options.scale,
                values,
                slopes,
            )
            if values != NULL:
                deliver(&call.loss, loss_start, j, n, loss_buffer)
            if slopes != NULL:
                deliver(&call.out, grad_start, j, n, grad_buffer)
        if call.partial.address != NULL:
            memcpy(
                start_of(&call.partial, outer, 0) + i % call.inner * call.partial.classes, &result, 8
            )
    free(memory)
    return 0
