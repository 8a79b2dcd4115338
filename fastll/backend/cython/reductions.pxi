# Reductions: what is done with a group of rows between and after its passes.
#
# A kernel takes a `Call` and returns 0, or -1 where there is not enough memory for its buffers.

cdef void load_states(const Call* call, Group* group) noexcept nogil:
    """The states the rows start from."""
    cdef Py_ssize_t i
    cdef const char* at
    for i in range(group.count):
        at = start_of(&call.state, group.outer, group.inner + i)
        memcpy(&group.m[i], at, 8)
        memcpy(&group.e[i], at + call.state.classes, 8)
        memcpy(&group.k[i], at + 2 * call.state.classes, 8)
        group.n[i] = first(exponent_of(splat(group.m[i])))


cdef void store_states(const Call* call, const Group* group) noexcept nogil:
    cdef Py_ssize_t i
    cdef char* at
    for i in range(group.count):
        at = start_of(&call.state, group.outer, group.inner + i)
        memcpy(at, &group.m[i], 8)
        memcpy(at + call.state.classes, &group.e[i], 8)
        memcpy(at + 2 * call.state.classes, &group.k[i], 8)


cdef void put_rows(
    const Operand* x, const Group* group, const double* values, real like
) noexcept nogil:
    """One number a row, where it is asked for."""
    cdef Py_ssize_t i
    cdef char* at = start_of(x, group.outer, group.inner)
    cdef real number
    if x.address == NULL:
        return
    for i in range(group.count):
        number = <real> values[i]
        memcpy(at + i * x.inner, &number, sizeof(real))


cdef void weigh(const Call* call, Group* group) noexcept nogil:
    """log_s of weighted sums, which are of any sign: a negative one is NaN unless signs are asked for."""
    cdef Py_ssize_t i
    cdef double e, k
    for i in range(group.count):
        e, k = group.e[i], group.k[i]
        group.log_s[i] = weighted_log_sum(e, k)
        if group.m[i] == -INFINITY and e == e:
            group.log_s[i] = -INFINITY
        elif call.sign.address == NULL and e + k < 0.0:
            group.log_s[i] = NAN


cdef void read_labels(const Call* call, Group* group, real like) noexcept nogil:
    """Labels and their weights."""
    cdef Py_ssize_t i
    cdef const char* at = start_of(&call.labels, group.outer, group.inner)
    cdef const real* w = <const real*> call.weight.address
    for i in range(group.count):
        memcpy(&group.y[i], at + i * call.labels.inner, 8)
        group.kept[i] = group.y[i] != call.options.ignore_index
        if w != NULL and group.kept[i] != 0.0:
            group.w_y[i] = w[group.y[i]]


cdef void conclude(const Call* call, Group* group, real like) noexcept nogil:
    """What becomes of a group between its two passes."""
    cdef double[WIDTH] values
    cdef Vec[double] s
    cdef Py_ssize_t i
    settle(group)
    if call.operation == LOGSUMEXP:
        if call.b.address != NULL:
            weigh(call, group)
        if call.state.address != NULL:
            store_states(call, group)
        if call.sign.address != NULL:
            for i in range(group.count):
                values[i] = sign_of(group.e[i] + group.k[i])
            put_rows(&call.sign, group, values, like)
    elif call.operation == CROSS_ENTROPY:
        finish(group, call.classes, call.sparse, &call.options)
        put_rows(&call.loss, group, group.loss, like)
    else:
        for i in range(vectors_of(&group.m[0], group.count)):
            s = load_all(&group.e[16 * i]) + load_all(&group.k[16 * i])
            set_factors(group, 16 * i, splat(1.0) / s)
    for i in range(group.count):
        values[i] = group.m[i] + group.log_s[i]
    put_rows(&call.lse, group, values, like)


cdef int reduce(const Call* call, Py_ssize_t start, Py_ssize_t stop, real like) noexcept nogil:
    """Log-sum-exp, softmax or cross-entropy of rows."""
    cdef Group[2] groups  # this one and the one before
    cdef Group* group
    cdef Group* before
    cdef Buffers buffers
    cdef Tile tile
    cdef int half = 0
    cdef bint folded = call.operation == SOFTMAX and call.state.address != NULL
    cdef Py_ssize_t row = start, most = rows_of_group(call, like), size, head
    if call.across:
        size = lay_out_tile(call, NULL, &tile, like)
    else:
        size = lay_out_buffers(call, NULL, &buffers, like)
    cdef void* memory = malloc(size + 64)
    if memory == NULL:
        return -1
    if call.across:
        lay_out_tile(call, aligned(memory), &tile, like)
    else:
        lay_out_buffers(call, aligned(memory), &buffers, like)
    groups[0].count = groups[1].count = 0
    while row < stop:
        group, before = &groups[half], &groups[1 - half]
        group.half = half
        group.outer, group.inner = row // call.inner, row % call.inner
        group.count = min(most, min(call.inner - group.inner, stop - row))
        if call.across and call.out.streamed:  # so that the other groups begin at lines
            head = until_line(<real*> start_of(&call.out, group.outer, group.inner))
            group.count = min(group.count, head if head > 0 else WIDTH)
        row += group.count
        begin(group, call.operation == CROSS_ENTROPY)
        if call.state.address != NULL:
            load_states(call, group)
        if call.sparse:
            read_labels(call, group, like)
        if call.across:
            if not folded:
                fold_columns(call, &tile, group, like)
            conclude(call, group, like)
            if call.out.address != NULL:
                write_columns(call, &tile, group, like)
        else:
            if not folded:
                fold_rows(call, &buffers, group, before, like)
            conclude(call, group, like)
            if not interleaves(call, like):
                if call.out.address != NULL:
                    write_rows(call, &buffers, group, 0, like)
                group.count = 0  # nothing is left of it
            half = 1 - half
    if not call.across:
        write_rows(call, &buffers, &groups[1 - half], 0, like)
    if call.out.streamed:
        stream_fence()
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
    cdef Py_ssize_t i, ignored = 0
    cdef int64_t y, bad = 0
    for i in range(count):  # without a way out, so that it is vectors that are compared
        memcpy(&y, labels + i * 8, 8)
        ignored += y == ignore_index
        bad |= (y != ignore_index) & ((y < 0) | (y >= classes))
    kept[0] = <double> (count - ignored)
    if not bad and weight == NULL:
        return -1
    kept[0] = 0.0
    for i in range(count):
        memcpy(&y, labels + i * 8, 8)
        if y == ignore_index:
            continue
        if y < 0 or y >= classes:
            kept[0] = 0.0
            return i
        if weight == NULL:
            continue
        if single:
            kept[0] += element(weight + y * 4, False, <float> 0)
        else:
            kept[0] += element(weight + y * 8, False, <double> 0)
    return -1
