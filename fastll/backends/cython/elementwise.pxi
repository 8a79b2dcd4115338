# Kernels over elements: one unit is `CHUNK` elements of one outer row.

from fastll.contract import CHUNK as _CHUNK

cdef Py_ssize_t CHUNK = _CHUNK


cdef void sigmoid_block(const real* v, Py_ssize_t n, bint log, real* out) noexcept nogil:
    cdef real[LANES] rest, y
    cdef const real* x
    cdef Py_ssize_t i, j
    cdef int l
    for i in range(vectors_of(v, n)):
        j = i * lanes_of(v)
        x = load(v + j, n - j, <real> 0, rest)
        if log:
            for l in range(lanes_of(v)):
                y[l] = log_sigmoid(x[l])
        else:
            for l in range(lanes_of(v)):
                y[l] = sigmoid(x[l])
        store(out + j, n - j, y)


cdef int sigmoid_units(const Call* call, Py_ssize_t start, Py_ssize_t stop, real like) noexcept nogil:
    cdef void* memory = malloc(2 * BLOCK * sizeof(real) + 64)
    if memory == NULL:
        return -1
    cdef real* buffer = <real*> aligned(memory)
    cdef real* out_buffer = buffer + BLOCK
    cdef char* x_start
    cdef char* out_start
    cdef Py_ssize_t i, j, n, block, outer, first, end
    for i in range(start, stop):
        outer, first = i // call.inner, i % call.inner * CHUNK
        end = min(call.classes, first + CHUNK)
        x_start, out_start = start_of(&call.x, outer, 0), start_of(&call.out, outer, 0)
        for block in range(blocks_of(end - first)):
            j = first + block * BLOCK
            n = min(BLOCK, end - j)
            sigmoid_block(
                fetch(&call.x, x_start, j, n, buffer),
                n,
                call.log,
                target_of(&call.out, out_start, j, out_buffer),
            )
            deliver(&call.out, out_start, j, n, out_buffer)
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
    """Losses and gradients where they are not NULL; the sum of the losses."""
    cdef real[LANES] rest, t_rest, w_rest, p_rest, ones, values, slopes, sums
    cdef real value, slope, zero = 0, one = 1, factor = <real> scale
    cdef const real* x
    cdef const real* target
    cdef const real* weight = ones
    cdef const real* pos_weight = ones
    cdef Py_ssize_t i, j
    cdef int l
    fill(ones, one)
    fill(sums, zero)
    for i in range(vectors_of(v, n)):
        j = i * lanes_of(v)
        # with a target of 0, lanes beyond the end are 0
        x = load(v + j, n - j, -<real> INFINITY, rest)
        target = load(t + j, n - j, zero, t_rest)
        if w != NULL:
            weight = load(w + j, n - j, zero, w_rest)
        if p != NULL:
            pos_weight = load(p + j, n - j, one, p_rest)
        for l in range(lanes_of(v)):
            bce(x[l], target[l] * pos_weight[l], one - target[l], &value, &slope)
            values[l] = value * weight[l]
            slopes[l] = (slope * weight[l]) * factor
            sums[l] = sums[l] + values[l]
        if loss != NULL:
            store(loss + j, n - j, values)
        if grad != NULL:
            store(grad + j, n - j, slopes)
    return total(sums, lanes_of(v))


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
        loss_start, grad_start = start_of(&call.loss, outer, 0), start_of(&call.grad, outer, 0)
        result = 0.0
        for block in range(blocks_of(end - first)):
            j = first + block * BLOCK
            n = min(BLOCK, end - j)
            if loss_start != NULL:
                values = target_of(&call.loss, loss_start, j, loss_buffer)
            if grad_start != NULL:
                slopes = target_of(&call.grad, grad_start, j, grad_buffer)
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
                deliver(&call.grad, grad_start, j, n, grad_buffer)
        if call.partial.address != NULL:
            put(
                start_of(&call.partial, outer, 0) + i % call.inner * call.partial.classes,
                result,
                <double> 0,
            )
    free(memory)
    return 0
