# Blocks: the steps that kernels over rows are put together from, on contiguous memory.
#
# A row is handled in blocks of `BLOCK` elements, which stay in the first-level cache between steps. A
# block is read and written in place where its memory is contiguous and of the compute dtype, otherwise
# through a buffer.
#
# The order of a sum is part of the contract among rows, columns and backends: element j of a block
# goes to lane j modulo the number of lanes, in order; the lanes' sums fold by halves in float64; blocks
# add in float64.

cdef enum:
    BLOCK = 2048

cdef struct Operand:
    char* address  # NULL: there is no such operand
    Py_ssize_t outer  # strides in bytes
    Py_ssize_t classes
    Py_ssize_t inner
    Format format
    bint swapped
    bint native  # aligned and of the compute dtype, at any strides below 2**24
    bint streamed  # written past the caches


cdef inline Py_ssize_t blocks_of(Py_ssize_t n) noexcept nogil:
    """Number of blocks that hold n elements, the last one perhaps in part."""
    return (n + BLOCK - 1) // BLOCK


cdef inline char* start_of(const Operand* x, Py_ssize_t outer, Py_ssize_t inner) noexcept nogil:
    """The first element of a row."""
    return x.address + outer * x.outer + inner * x.inner


cdef inline const real* fetch(
    const Operand* x, const char* start, Py_ssize_t j, Py_ssize_t n, real* buffer
) noexcept nogil:
    """Elements j to j + n of the row that starts at `start`: in place or in the buffer."""
    cdef const char* source = start + j * x.classes
    if x.format == IN_PLACE:
        return <const real*> source
    read_block(x.format, x.swapped, source, x.classes, n, buffer)
    return buffer


cdef inline real* target_of(
    const Operand* x, char* start, Py_ssize_t j, real* buffer
) noexcept nogil:
    """Where to leave elements from j on: in place, or in the buffer for `deliver`."""
    return <real*> (start + j * x.classes) if x.format == IN_PLACE else buffer


cdef inline void deliver(
    const Operand* x, char* start, Py_ssize_t j, Py_ssize_t n, const real* buffer
) noexcept nogil:
    """Write the buffer out, if that is where they were left."""
    if x.format != IN_PLACE:
        write_block(x.format, buffer, start + j * x.classes, x.classes, n)


cdef inline Py_ssize_t until_line(const real* v) noexcept nogil:
    """Elements before the first line of the cache."""
    return (-<Py_ssize_t> v & 63) // <Py_ssize_t> sizeof(real)


cdef void cap_block(const real* v, Py_ssize_t n, real cap, real* out, real* slope) noexcept nogil:
    """softcap * tanh(x / softcap) into `out`; its derivative into `slope` unless that is NULL."""
    cdef Vec[real] x, derivative, caps = splat(cap)
    cdef Py_ssize_t b, j
    for b in range(vectors_of(v, n)):
        j = b * lanes_of(v)
        x = softcap(load_ahead(v + j, n - j, caps), caps, &derivative, cap)
        store(out + j, n - j, x)
        if slope != NULL:
            store(slope + j, n - j, derivative)


cdef double max_block(const real* v, Py_ssize_t n) noexcept nogil:
    """The maximum; NaN are passed over."""
    cdef Vec[real] lowest = splat(-<real> INFINITY)
    cdef Vec[real] top = lowest
    cdef Py_ssize_t b, j
    for b in range(vectors_of(v, n)):
        j = b * lanes_of(v)
        top = maximum(load_ahead(v + j, n - j, lowest), top)
    return largest(top)


cdef struct Pending:
    # A row that has been folded and is written while the next one is read, so that memory and arithmetic
    # both are busy all the time.
    void* source  # exponentials, or if `log`, logits
    void* out
    Py_ssize_t j  # the first element that is left
    Py_ssize_t n
    bint log
    bint streamed
    double scale  # of exponentials
    double same  # the exponential of the maximum: it gives `factor` exactly
    double factor
    double top  # subtracted from logits, and then `lowered`
    double lowered


cdef inline void write_vector(
    const Pending* row, Py_ssize_t j, Py_ssize_t count, real like
) noexcept nogil:
    """Elements j to j + count of a row, at most a vector; a whole one may be streamed."""
    cdef Vec[real] x = load(<const real*> row.source + j, count, splat(<real> 0))
    cdef real* out = <real*> row.out + j
    if row.log:  # both parts are at most 0, so that nothing cancels
        x = (x - splat(<real> row.top)) - splat(<real> row.lowered)
    else:
        x = where_eq(
            x, splat(<real> row.same), splat(<real> row.factor), x * splat(<real> row.scale)
        )
    if row.streamed and count >= lanes_of(out):
        stream_all(out, x)
    else:
        store(out, count, x)


cdef inline Py_ssize_t vectors_left(const Pending* row, real like) noexcept nogil:
    return (row.n - row.j) // lanes_of(&like)


cdef void write_rest(Pending* row, real like) noexcept nogil:
    """All that is left of a row."""
    cdef Py_ssize_t lanes = lanes_of(&like)
    while row.j + lanes <= row.n:
        write_vector(row, row.j, lanes, like)
        row.j += lanes
    write_vector(row, row.j, row.n - row.j, like)
    row.j = row.n


cdef struct Ahead:
    # What a pass over a block of a row does meanwhile, so that memory and arithmetic both are busy.
    Pending* pending  # a row to write
    void* next  # the row's next block, or NULL, whose maximum it finds
    Py_ssize_t n
    double top


cdef inline void add_block(
    const real* v, Py_ssize_t n, State* row, bint at_top, real* terms, Ahead* ahead
) noexcept nogil:
    """Add the sum of exp(x) / 2**n over a block; `at_top`: of the elements other than m, and count those."""
    cdef real floor, magic
    window(row.n, SUM_SHIFT, &floor, &magic)
    cdef Vec[real] x, term, zero = splat(<real> 0), one = splat(<real> 1), tops = splat(<real> row.m)
    cdef Vec[real] sums = zero, counts = zero, lowest = splat(-<real> INFINITY)
    cdef Vec[real] top = lowest
    cdef const real* next = <const real*> ahead.next
    cdef Pending old = ahead.pending[0]
    cdef Py_ssize_t b, j, ready = vectors_left(&old, <real> 0), further = vectors_of(next, ahead.n)
    for b in range(vectors_of(v, n)):
        j = b * lanes_of(v)
        if b < further:
            top = maximum(load_ahead(next + j, ahead.n - j, lowest), top)
        x = load(v + j, n - j, lowest)
        term = exponential(x, splat(floor), splat(magic), floor)
        if at_top:
            sums = sums + where_eq(x, tops, zero, term)
            counts = counts + where_eq(x, tops, one, zero)
        else:
            sums = sums + term
        if terms != NULL:
            store_all(terms + j, term)
        if b < ready:
            write_vector(&old, old.j + j, lanes_of(v), <real> 0)
    ahead.pending.j += min(ready, vectors_of(v, n)) * lanes_of(v)
    ahead.top = largest(top)
    row.added += total(sums) * SUM_UNSHIFT
    if at_top:
        row.k += total(counts)


cdef void sum_exact(const real* v, Py_ssize_t step, Py_ssize_t n, State* row) noexcept nogil:
    """`add_block` by the library's exp, for a maximum that is infinite or enormous.

    One term after the other, but with Kahan's compensation.
    """
    cdef double x, term, added, e = 0.0, k = 0.0, lost = 0.0
    cdef Py_ssize_t j
    for j in range(n):
        x = v[j * step]
        if x == row.m:
            k += 1.0
        else:
            term = exp(x - row.m) - lost
            added = e + term
            lost = (added - e) - term
            e = added
    row.e += e
    row.k += k


cdef void fold_block(
    const real* v, Py_ssize_t n, double top, State* row, real* terms, Ahead* ahead
) noexcept nogil:
    """Add a block with maximum `top` to the state of a row.

    Leave its terms, exp(x) / 2**(n - SUM_SHIFT), if they are not NULL.
    """
    if top > row.m:
        raise_maximum(row, top)
    if not usable(row.m):
        if terms != NULL:
            fill_block(terms, n, <real> 0)  # right for -inf; of others nobody asks
        sum_exact(v, 1, n, row)
        ahead.top = max_block(<const real*> ahead.next, ahead.n)
    elif top < row.m:
        add_block(v, n, row, False, terms, ahead)
    else:
        add_block(v, n, row, True, terms, ahead)


cdef void mask_block(const real* v, const real* b, Py_ssize_t n, real* out) noexcept nogil:
    """x where its weight is not 0, -inf elsewhere."""
    cdef Py_ssize_t j
    cdef real lowest = -<real> INFINITY, zero = 0
    for j in range(n):
        out[j] = lowest if b[j] == zero else v[j]


cdef inline void weigh_terms(
    Vec[real] x,
    Vec[real] weight,
    Vec[real] tops,
    Vec[real] floors,
    Vec[real] magics,
    double* sums,
    double* top_sums,
    real like,
) noexcept nogil:
    """Add b exp(x) / 2**n of the elements other than m to one sum a lane, b of those equal to another."""
    cdef Vec[real] zero = splat(<real> 0)
    cdef real[LANES] term, at_top, w
    cdef int l
    store_all(term, where_eq(x, tops, zero, exponential(x, floors, magics, like)))
    store_all(at_top, where_eq(x, tops, weight, zero))
    store_all(w, weight)
    for l in range(lanes_of(&like)):
        # scaled back before the weight comes in, which may be as large as a number can be
        sums[l] = sums[l] + (<double> term[l] * SUM_UNSHIFT) * <double> w[l]
        top_sums[l] = top_sums[l] + <double> at_top[l]


cdef double total_of(const double* sums, int lanes) noexcept nogil:
    """Of one sum a lane, by halves."""
    if lanes == LANES:
        return total(load_all(sums) + load_all(sums + LANES // 2))
    return total(load_all(sums))


cdef void weighted_sum_block(
    const real* v, const real* b, Py_ssize_t n, State* row
) noexcept nogil:
    """Add the sum of b exp(x) / 2**n over the elements other than m, and that of b over those equal."""
    cdef double[LANES] sums, top_sums
    cdef real floor, magic
    cdef Vec[real] zero = splat(<real> 0)
    cdef Py_ssize_t i, j
    if not usable(row.m):
        weighted_sum_exact(v, b, 1, n, row)
        return
    window(row.n, SUM_SHIFT, &floor, &magic)
    memset(sums, 0, sizeof(sums))
    memset(top_sums, 0, sizeof(top_sums))
    for i in range(vectors_of(v, n)):
        j = i * lanes_of(v)
        weigh_terms(
            load_ahead(v + j, n - j, splat(-<real> INFINITY)),
            load_ahead(b + j, n - j, zero),
            splat(<real> row.m),
            splat(floor),
            splat(magic),
            sums,
            top_sums,
            floor,
        )
    row.added += total_of(sums, lanes_of(v))
    row.k += total_of(top_sums, lanes_of(v))


cdef void weighted_sum_exact(
    const real* v, const real* b, Py_ssize_t step, Py_ssize_t n, State* row
) noexcept nogil:
    """`weighted_sum_block` likewise; weights of both signs at an infinite maximum make it NaN."""
    cdef double x, weight, e = 0.0, k = 0.0
    cdef Py_ssize_t j
    for j in range(n):
        x = v[j * step]
        weight = b[j * step]
        if x == row.m:
            k += weight * row.m if row.m == INFINITY and weight != 0.0 else weight
        elif weight != 0.0:
            e += weight * exp(x - row.m)
    row.e += e
    row.k += k


cdef void fold_weighted_block(
    const real* v, const real* b, Py_ssize_t n, State* row, real* buffer
) noexcept nogil:
    """`fold_block` with weights."""
    cdef double top
    mask_block(v, b, n, buffer)
    top = max_block(buffer, n)
    if top > row.m:
        raise_maximum(row, top)
    weighted_sum_block(buffer, b, n, row)


cdef void exp_block(
    const real* v, Py_ssize_t n, const Group* group, Py_ssize_t i, real* out
) noexcept nogil:
    """factor * exp(x - m) for row i of a group; exactly `factor` where the exponentials are equal."""
    cdef real floor, magic
    if not usable(group.m[i]):
        exp_exact(v, 1, n, group.m[i], group.factor[i], out)
        return
    window(group.n[i], OUT_SHIFT, &floor, &magic)
    cdef Vec[real] term, floors = splat(floor), magics = splat(magic), tops = splat(<real> group.m[i])
    cdef Vec[real] same = exponential(tops, floors, magics, floor)
    cdef Vec[real] factor = splat(<real> group.factor[i]), scale = splat(<real> group.scale[i])
    cdef Py_ssize_t b, j
    for b in range(vectors_of(v, n)):
        j = b * lanes_of(v)
        term = exponential(load_ahead(v + j, n - j, tops), floors, magics, floor)
        store(out + j, n - j, where_eq(term, same, factor, term * scale))


cdef void exp_exact(
    const real* v, Py_ssize_t step, Py_ssize_t n, double m, double factor, real* out
) noexcept nogil:
    """`exp_block` by the library's exp; NaN throughout where the maximum is infinite."""
    cdef Py_ssize_t j
    for j in range(n):
        out[j * step] = <real> (exp(v[j * step] - m) * factor if fabs(m) < INFINITY else NAN)


cdef void target_block(
    const real* t, const real* w, Py_ssize_t n, double keep, double spread, real* out
) noexcept nogil:
    """u = w (keep * t + spread), with t = 0 and w = 1 where they are NULL."""
    cdef Vec[real] u, zero = splat(<real> 0)
    cdef Py_ssize_t b, j
    for b in range(vectors_of(out, n)):
        j = b * lanes_of(out)
        u = splat(<real> spread)
        if t != NULL:
            u = fma(load_ahead(t + j, n - j, zero), splat(<real> keep), u)
        if w != NULL:
            u = u * load(w + j, n - j, zero)
        store(out + j, n - j, u)


cdef inline Vec[real] distances(Vec[real] x, Vec[real] u, Vec[real] tops, real like) noexcept nogil:
    """u (m - x), where a u of 0 annuls an infinite x."""
    cdef Vec[real] zero = splat(<real> 0)
    return where_eq(u, zero, zero, u * (tops - x))


cdef void linear_block(
    const real* v, const real* u, Py_ssize_t n, double m, double* distance, double* mass
) noexcept nogil:
    """Sum of u (m - x), and sum of u."""
    cdef real top = <real> (m if m > -INFINITY else 0.0)
    cdef Vec[real] weight, tops = splat(top), zero = splat(<real> 0)
    cdef Vec[real] sums = zero, weights = zero
    cdef Py_ssize_t b, j
    for b in range(vectors_of(v, n)):
        j = b * lanes_of(v)
        weight = load_ahead(u + j, n - j, zero)
        sums = sums + distances(load_ahead(v + j, n - j, zero), weight, tops, top)
        weights = weights + weight
    distance[0] = total(sums)
    mass[0] = total(weights)


cdef void subtract_block(real* out, const real* u, Py_ssize_t n, double factor) noexcept nogil:
    """out -= factor * u."""
    cdef Vec[real] zero = splat(<real> 0), negated = splat(<real> -factor)
    cdef Py_ssize_t b, j
    for b in range(vectors_of(out, n)):
        j = b * lanes_of(out)
        store(out + j, n - j, fma(load(u + j, n - j, zero), negated, load(out + j, n - j, zero)))


cdef void scale_block(real* out, Py_ssize_t n, real factor) noexcept nogil:
    """out *= factor."""
    cdef Py_ssize_t j
    for j in range(n):
        out[j] = out[j] * factor


cdef void multiply_block(real* out, const real* slope, Py_ssize_t n) noexcept nogil:
    """out *= slope."""
    cdef Py_ssize_t j
    for j in range(n):
        out[j] = out[j] * slope[j]


cdef void fill_block(real* out, Py_ssize_t n, real value) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(n):
        out[j] = value
