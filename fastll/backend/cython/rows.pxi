# The two passes over rows whose class axis is the faster one in memory: row by row, block by block.
#
# `fold_rows` makes the state of a group of rows, `write_row` what has the shape of a row. A group is
# small enough for the second-level cache, where the first pass leaves its exponentials for the second
# one. Where nothing but a factor is missing from them, the second pass is part of the next group's first.

cdef enum:
    GROUP_SIZE = 1 << 18  # bytes of a group's rows, where there is a second pass
    ROW_SIZE = 1 << 19  # bytes of a row up to which its exponentials are kept


cdef bint keeps_terms(const Call* call, real like) noexcept nogil:
    """Whether the first pass leaves exponentials for the second."""
    if call.out.address == NULL or call.log or call.capped or call.state.address != NULL:
        return False
    return call.classes * <Py_ssize_t> sizeof(real) <= ROW_SIZE


cdef bint interleaves(const Call* call, real like) noexcept nogil:
    """Whether a group is written while the next one is read."""
    if call.out.address == NULL or call.out.format != IN_PLACE or call.state.address != NULL:
        return False
    if call.log:
        return call.x.format == IN_PLACE
    return keeps_terms(call, like) and not call.spread


cdef Py_ssize_t rows_of_group(const Call* call, real like) noexcept nogil:
    """As many rows as there may be, or as the second pass finds in the cache."""
    if call.across or call.out.address == NULL:
        return WIDTH
    return max(1, min(WIDTH, GROUP_SIZE // max(1, call.classes * <Py_ssize_t> sizeof(real))))


cdef struct Buffers:
    # BLOCK elements of the compute dtype
    void* x
    void* next
    void* u
    void* slope
    void* out
    void* terms  # of each row of two groups, or NULL
    Py_ssize_t pitch  # elements from a row's terms to the next one's
    double* exponents  # of the reference of each block of a row's terms


cdef Py_ssize_t lay_out_buffers(
    const Call* call, char* memory, Buffers* buffers, real like
) noexcept nogil:
    """Place buffers in memory; their size in bytes."""
    cdef Py_ssize_t rows = 2 * rows_of_group(call, like) if keeps_terms(call, like) else 0
    cdef char* at = memory
    buffers.x, at = at, at + BLOCK * sizeof(real)
    buffers.next, at = at, at + BLOCK * sizeof(real)
    buffers.u, at = at, at + BLOCK * sizeof(real)
    buffers.slope, at = at, at + BLOCK * sizeof(real)
    buffers.out, at = at, at + BLOCK * sizeof(real)
    buffers.pitch = (call.classes + LANES - 1) // LANES * LANES
    buffers.terms, at = (at if rows else NULL), at + rows * buffers.pitch * sizeof(real)
    buffers.exponents, at = <double*> at, at + blocks_of(call.classes) * sizeof(double)
    return at - memory


cdef inline real* terms_of(
    const Call* call, const Buffers* buffers, const Group* group, Py_ssize_t i, real like
) noexcept nogil:
    """Where the exponentials of row i of a group are; NULL where they are not kept."""
    if buffers.terms == NULL:
        return NULL
    return <real*> buffers.terms + (group.half * rows_of_group(call, like) + i) * buffers.pitch


cdef const real* fetch_capped(
    const Call* call, const char* start, Py_ssize_t j, Py_ssize_t n, real* buffer, real* slope
) noexcept nogil:
    """`fetch`, then the soft cap where there is one; its derivative into `slope` unless NULL."""
    cdef const real* v = fetch(&call.x, start, j, n, buffer)
    if not call.capped:
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


cdef Pending result_of(
    const Call* call, const Buffers* buffers, const Group* group, Py_ssize_t i, real like
) noexcept nogil:
    """Row i of a group as it is to be written; nothing of it if that takes new exponentials."""
    cdef Pending row
    cdef real floor, magic
    cdef double unshift = OUT_SHIFT - SUM_SHIFT
    row.j = row.n = 0
    row.log, row.streamed = call.log, call.out.streamed
    row.out = start_of(&call.out, group.outer, group.inner + i)
    row.factor, row.top, row.lowered = group.factor[i], group.m[i], group.log_s[i]
    row.scale = group.scale[i] * power(unshift)
    if call.log:
        row.source = start_of(&call.x, group.outer, group.inner + i)
        row.n = call.classes
    elif buffers.terms != NULL and usable(row.top) and fabs(row.scale) > SMALL_SCALE:
        row.source = terms_of(call, buffers, group, i, like)
        row.n = call.classes
        window(group.n[i], SUM_SHIFT, &floor, &magic)
        row.same = first(exponential(splat(<real> row.top), splat(floor), splat(magic), floor))
    return row


cdef Pending pending_row(
    const Call* call, const Buffers* buffers, const Group* group, Py_ssize_t i, real like
) noexcept nogil:
    """`result_of` a row that may be written while another one is read."""
    cdef Pending row = result_of(call, buffers, group, i, like)
    cdef Py_ssize_t head
    if not interleaves(call, like) or group.kept[i] == 0.0:
        row.n = 0
    elif row.streamed:
        head = min(row.n, until_line(<real*> row.out))
        write_vector(&row, 0, head, like)
        row.j = head
    return row


cdef void complete_row(
    const Call* call, Buffers* buffers, const Group* group, Py_ssize_t i, Pending* row, real like
) noexcept nogil:
    """What is left of row i of a group."""
    cdef real* out
    if i >= group.count:
        return
    if row.n == 0:
        write_row(call, buffers, group, i, like)
        return
    write_rest(row, like)
    if call.sparse:
        out = <real*> row.out
        out[group.y[i]] = <real> group.g_y[i]


cdef void write_rows(
    const Call* call, Buffers* buffers, const Group* group, Py_ssize_t first, real like
) noexcept nogil:
    """A group's rows from `first` on."""
    cdef Pending row
    cdef Py_ssize_t i
    for i in range(first, group.count):
        row = pending_row(call, buffers, group, i, like)
        complete_row(call, buffers, group, i, &row, like)


cdef inline void fetch_next(
    const Call* call, Buffers* buffers, char* start, Py_ssize_t j, Ahead* ahead, real like
) noexcept nogil:
    """The block of elements from j on; the one before it stays where it is."""
    buffers.x, buffers.next = buffers.next, buffers.x
    ahead.n = min(BLOCK, call.classes - j)
    ahead.next = NULL
    if ahead.n > 0:
        ahead.next = <void*> fetch_capped(
            call, start, j, ahead.n, <real*> buffers.next, <real*> NULL
        )


cdef void fold_rows(
    const Call* call, Buffers* buffers, Group* group, const Group* before, real like
) noexcept nogil:
    """Add the elements of each row to its state; distance, mass and what is at the label.

    Meanwhile, write the rows of the group before.
    """
    cdef real* other = <real*> buffers.u
    cdef real* terms
    cdef char* x_start
    cdef char* b_start
    cdef char* t_start
    cdef const real* v
    cdef const real* b
    cdef Py_ssize_t i, j, n, block
    cdef double m, top, added, weight
    cdef Pending pending
    cdef Ahead ahead
    cdef State row
    ahead.pending = &pending
    pending.j = pending.n = 0
    for i in range(group.count):
        if i < before.count:
            pending = pending_row(call, buffers, before, i, like)
        if group.kept[i] == 0.0 and call.lse.address == NULL:
            complete_row(call, buffers, before, i, &pending, like)
            continue
        x_start = start_of(&call.x, group.outer, group.inner + i)
        b_start = start_of(&call.b, group.outer, group.inner + i)
        t_start = start_of(&call.target, group.outer, group.inner + i)
        terms = terms_of(call, buffers, group, i, like)
        row = state_of(group, i)
        fetch_next(call, buffers, x_start, 0, &ahead, like)
        ahead.top = max_block(<const real*> ahead.next, ahead.n)
        for block in range(blocks_of(call.classes)):
            j = block * BLOCK
            v, n, top, m = <const real*> ahead.next, ahead.n, ahead.top, row.m
            fetch_next(call, buffers, x_start, j + n, &ahead, like)
            if call.b.address != NULL:
                b = fetch(&call.b, b_start, j, n, other)
                fold_weighted_block(v, b, n, &row, <real*> buffers.out)
            else:
                fold_block(v, n, top, &row, terms + j if terms != NULL else NULL, &ahead)
                buffers.exponents[block] = row.n
            if call.spread:
                b = fetch_target(call, t_start, j, n, other)
                linear_block(v, b, n, row.m, &added, &weight)
                group.distance[i] += times(group.mass[i], row.m - m) + added
                group.mass[i] += weight
        set_state(group, i, &row)
        if terms != NULL:  # all for one reference; what underflows here does so in the result
            for block in range(blocks_of(call.classes)):
                if buffers.exponents[block] != row.n:
                    j = block * BLOCK
                    n = min(BLOCK, call.classes - j)
                    scale_block(terms + j, n, <real> power(buffers.exponents[block] - row.n))
        if call.sparse and group.kept[i] != 0.0:
            group.x_y[i] = fetch_capped(call, x_start, group.y[i], 1, <real*> buffers.x, other)[0]
            group.slope_y[i] = other[0] if call.capped else 1.0
        complete_row(call, buffers, before, i, &pending, like)
    write_rows(call, buffers, before, group.count, like)


cdef void write_row(
    const Call* call, Buffers* buffers, const Group* group, Py_ssize_t i, real like
) noexcept nogil:
    """Probabilities, their logarithms or the gradient of row i of a group."""
    cdef real* out_buffer = <real*> buffers.out
    cdef char* x_start = start_of(&call.x, group.outer, group.inner + i)
    cdef char* t_start = start_of(&call.target, group.outer, group.inner + i)
    cdef char* start = start_of(&call.out, group.outer, group.inner + i)
    cdef const real* v
    cdef real* y
    cdef Pending part
    cdef Pending row = result_of(call, buffers, group, i, like)
    cdef Py_ssize_t j, n, block
    for block in range(blocks_of(call.classes)):
        j = block * BLOCK
        n = min(BLOCK, call.classes - j)
        y = target_of(&call.out, start, j, out_buffer)
        if group.kept[i] == 0.0:
            fill_block(y, n, <real> 0)
            deliver(&call.out, start, j, n, out_buffer)
            continue
        part = row
        if call.log:
            part.source = <void*> fetch(&call.x, x_start, j, n, <real*> buffers.x)
        elif row.n > 0:
            part.source = <real*> row.source + j
        else:
            v = fetch_capped(call, x_start, j, n, <real*> buffers.x, <real*> buffers.slope)
            exp_block(v, n, group, i, y)
        if row.n > 0:
            part.out, part.n, part.streamed = y, n, False
            write_rest(&part, like)
        if call.spread:
            v = fetch_target(call, t_start, j, n, <real*> buffers.u)
            subtract_block(y, v, n, call.options.scale)
        if call.capped:
            multiply_block(y, <real*> buffers.slope, n)
        if call.sparse and j <= group.y[i] < j + n:
            y[group.y[i] - j] = <real> group.g_y[i]
        deliver(&call.out, start, j, n, out_buffer)
