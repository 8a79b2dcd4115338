# Blocks: the steps that kernels over rows are put together from, on contiguous memory.
#
# A row is handled in blocks of `BLOCK` elements, which stay in the first-level cache between steps. A
# block is read in place where its memory already is contiguous and of the compute dtype, otherwise
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


cdef inline void put(char* at, double value, real like) noexcept nogil:
    """Write a value in the compute dtype to an address that need not be aligned."""
    cdef real number = <real> value
    memcpy(at, &number, sizeof(real))


cdef void cap_block(const real* v, Py_ssize_t n, real cap, real* out, real* slope) noexcept nogil:
    """softcap * tanh(x / softcap) into `out`; its derivative into `slope` unless that is NULL."""
    cdef real[LANES] rest, capped, derivative
    cdef const real* x
    cdef Py_ssize_t i, j
    cdef int l
    for i in range(vectors_of(v, n)):
        j = i * lanes_of(v)
        x = load(v + j, n - j, <real> 0, rest)
        for l in range(lanes_of(v)):
            softcap(x[l], cap, &capped[l], &derivative[l])
        store(out + j, n - j, capped)
        if slope != NULL:
            store(slope + j, n - j, derivative)


cdef double max_block(const real* v, Py_ssize_t n) noexcept nogil:
    """The maximum; NaN are passed over."""
    cdef real[LANES] rest, top
    cdef const real* x
    cdef Py_ssize_t i, j
    cdef int l
    fill(top, -<real> INFINITY)
    for i in range(vectors_of(v, n)):
        j = i * lanes_of(v)
        x = load(v + j, n - j, -<real> INFINITY, rest)
        for l in range(lanes_of(v)):
            top[l] = maximum(x[l], top[l])
    return largest(top)


cdef double scan_block(const real* v, Py_ssize_t n, const State* row, double* highest) noexcept nogil:
    """Sum of exp(x - m), and the maximum, in one pass, for a block below the maximum m of `row`."""
    cdef real[LANES] rest, top, sums
    cdef real floor, magic
    cdef const real* x
    cdef Py_ssize_t i, j
    cdef int l
    window(row.n, SUM_SHIFT, &floor, &magic)
    fill(top, -<real> INFINITY)
    fill(sums, <real> 0)
    for i in range(vectors_of(v, n)):
        j = i * lanes_of(v)
        x = load(v + j, n - j, -<real> INFINITY, rest)
        for l in range(lanes_of(v)):
            top[l] = maximum(x[l], top[l])
            sums[l] = sums[l] + exponential(x[l], floor, magic)
    highest[0] = largest(top)
    return total(sums, lanes_of(v)) * SUM_UNSHIFT / row.lead


cdef void sum_block(const real* v, Py_ssize_t n, State* row) noexcept nogil:
    """Add the sum of exp(x - m) over the elements other than m, and the number of those equal to m."""
    cdef real[LANES] rest, sums, counts
    cdef real floor, magic, term, zero = 0, one = 1, top = <real> row.m
    cdef const real* x
    cdef Py_ssize_t i, j
    cdef int l
    if not row.usable:
        sum_exact(v, 1, n, row)
        return
    window(row.n, SUM_SHIFT, &floor, &magic)
    fill(sums, zero)
    fill(counts, zero)
    for i in range(vectors_of(v, n)):
        j = i * lanes_of(v)
        x = load(v + j, n - j, -<real> INFINITY, rest)
        for l in range(lanes_of(v)):
            term = exponential(x[l], floor, magic)
            sums[l] = sums[l] + (zero if x[l] == top else term)
            counts[l] = counts[l] + (one if x[l] == top else zero)
    row.e += total(sums, lanes_of(v)) * SUM_UNSHIFT / row.lead
    row.k += total(counts, lanes_of(v))


cdef void sum_exact(const real* v, Py_ssize_t step, Py_ssize_t n, State* row) noexcept nogil:
    """`sum_block` by the library's exp, for a maximum that is infinite or enormous.

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


cdef void fold_block(const real* v, Py_ssize_t n, State* row) noexcept nogil:
    """Add a block to the state of a row."""
    cdef double below, top
    if row.usable:
        below = scan_block(v, n, row, &top)
        if top < row.m:
            row.e += below
            return
    else:
        top = max_block(v, n)
    if top > row.m:
        raise_maximum(row, top)
    sum_block(v, n, row)


cdef void mask_block(const real* v, const real* b, Py_ssize_t n, real* out) noexcept nogil:
    """x where its weight is not 0, -inf elsewhere."""
    cdef Py_ssize_t j
    cdef real lowest = -<real> INFINITY, zero = 0
    for j in range(n):
        out[j] = lowest if b[j] == zero else v[j]


cdef void weighted_sum_block(
    const real* v, const real* b, Py_ssize_t n, State* row
) noexcept nogil:
    """Add the sum of b exp(x - m) over the elements other than m, and that of b over those equal."""
    cdef real[LANES] rest, b_rest
    cdef double[LANES] sums, top_sums
    cdef real floor, magic, term, weight, zero = 0, top = <real> row.m
    cdef const real* x
    cdef const real* w
    cdef Py_ssize_t i, j
    cdef int l
    if not row.usable:
        weighted_sum_exact(v, b, 1, n, row)
        return
    window(row.n, SUM_SHIFT, &floor, &magic)
    for l in range(LANES):
        sums[l] = top_sums[l] = 0.0
    for i in range(vectors_of(v, n)):
        j = i * lanes_of(v)
        x = load(v + j, n - j, -<real> INFINITY, rest)
        w = load(b + j, n - j, zero, b_rest)
        for l in range(lanes_of(v)):
            term = exponential(x[l], floor, magic)
            term = zero if x[l] == top else term
            weight = w[l] if x[l] == top else zero
            # scaled back before the weight comes in, which may be as large as a number can be
            sums[l] = sums[l] + (<double> term * SUM_UNSHIFT) * <double> w[l]
            top_sums[l] = top_sums[l] + <double> weight
    row.e += total(sums, lanes_of(v)) / row.lead
    row.k += total(top_sums, lanes_of(v))


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
    const real* v, Py_ssize_t n, const State* row, double factor, real* out
) noexcept nogil:
    """factor * exp(x - m); exactly `factor` where x is m."""
    cdef real[LANES] rest, y
    cdef real floor, magic, top = <real> row.m, top_value = <real> factor, value
    cdef real scale = <real> (factor / row.lead * OUT_UNSHIFT)
    cdef const real* x
    cdef Py_ssize_t i, j
    cdef int l
    if not row.usable:
        exp_exact(v, 1, n, row.m, factor, out)
        return
    window(row.n, OUT_SHIFT, &floor, &magic)
    for i in range(vectors_of(v, n)):
        j = i * lanes_of(v)
        x = load(v + j, n - j, top, rest)
        for l in range(lanes_of(v)):
            value = exponential(x[l], floor, magic) * scale
            y[l] = top_value if x[l] == top else value
        store(out + j, n - j, y)


cdef void exp_exact(
    const real* v, Py_ssize_t step, Py_ssize_t n, double m, double factor, real* out
) noexcept nogil:
    """`exp_block` by the library's exp; NaN throughout where the maximum is infinite."""
    cdef Py_ssize_t j
    for j in range(n):
        out[j * step] = <real> (exp(v[j * step] - m) * factor if fabs(m) < INFINITY else NAN)


cdef void log_block(const real* v, Py_ssize_t n, double m, double log_s, real* out) noexcept nogil:
    """(x - m) - log s: both parts are at most 0, so that nothing cancels."""
    cdef real[LANES] rest, y
    cdef real top = <real> m, lowered = <real> log_s
    cdef const real* x
    cdef Py_ssize_t i, j
    cdef int l
    for i in range(vectors_of(v, n)):
        j = i * lanes_of(v)
        x = load(v + j, n - j, top, rest)
        for l in range(lanes_of(v)):
            y[l] = (x[l] - top) - lowered
        store(out + j, n - j, y)


cdef void target_block(
    const real* t, const real* w, Py_ssize_t n, double keep, double spread, real* out
) noexcept nogil:
    """u = w (keep * t + spread), with t = 0 and w = 1 where they are NULL."""
    cdef real kept = <real> keep, share = <real> spread
    cdef Py_ssize_t j
    for j in range(n):
        out[j] = fma(t[j], kept, share) if t != NULL else share
    if w != NULL:
        multiply_block(out, w, n)


cdef void linear_block(
    const real* v, const real* u, Py_ssize_t n, double m, double* distance, double* mass
) noexcept nogil:
    """Sum of u (m - x), where a u of 0 annuls an infinite x, and sum of u."""
    cdef real[LANES] rest, u_rest, sums, weights
    cdef real term, zero = 0, top = <real> (m if m > -INFINITY else 0.0)
    cdef const real* x
    cdef const real* weight
    cdef Py_ssize_t i, j
    cdef int l
    fill(sums, zero)
    fill(weights, zero)
    for i in range(vectors_of(v, n)):
        j = i * lanes_of(v)
        x = load(v + j, n - j, zero, rest)
        weight = load(u + j, n - j, zero, u_rest)
        for l in range(lanes_of(v)):
            term = weight[l] * (top - x[l])
            sums[l] = sums[l] + (zero if weight[l] == zero else term)
            weights[l] = weights[l] + weight[l]
    distance[0] = total(sums, lanes_of(v))
    mass[0] = total(weights, lanes_of(v))


cdef void subtract_block(real* out, const real* u, Py_ssize_t n, double factor) noexcept nogil:
    """out -= factor * u."""
    cdef real negated = <real> -factor
    cdef Py_ssize_t j
    for j in range(n):
        out[j] = fma(u[j], negated, out[j])


cdef void multiply_block(real* out, const real* slope, Py_ssize_t n) noexcept nogil:
    """out *= slope."""
    cdef Py_ssize_t j
    for j in range(n):
        out[j] = out[j] * slope[j]


cdef void fill_block(real* out, Py_ssize_t n, real value) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(n):
        out[j] = value
