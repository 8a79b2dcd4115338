# The scalars of rows: their running state, and what becomes of it. See `fastll.contract`.
#
# Everything here is float64. Rows and columns share it, which is why they agree to the bit. What is
# done once a row is done for a `Group` of rows, in loops that the compiler makes vectors of.

from libc.math cimport exp, log, log1p

cdef enum:
    WIDTH = 64  # the most rows a group has

cdef struct State:  # a row that elements are being added to
    double m
    double e
    double k
    double n  # exponent of the reference of `exponential`
    double added  # to e since, but in multiples of 2**n: so no exponential is needed on the way

cdef struct Options:
    long long ignore_index
    double label_smoothing
    double z_loss
    double softcap
    double scale

cdef struct Group:  # rows inner to inner + count of an outer one, and what is known of each
    Py_ssize_t outer
    Py_ssize_t inner
    Py_ssize_t count
    int half  # of the memory for two groups
    double[WIDTH] m  # these five as in `State`
    double[WIDTH] e
    double[WIDTH] k
    double[WIDTH] n
    double[WIDTH] added
    double[WIDTH] lead  # exp(m) / 2**n
    double[WIDTH] log_s  # log(e + k)
    int64_t[WIDTH] y  # the label
    double[WIDTH] kept  # 1, or 0 where the row is ignored
    double[WIDTH] x_y  # logit, weight and derivative of the soft cap at the label
    double[WIDTH] w_y
    double[WIDTH] slope_y
    double[WIDTH] distance  # sum_j u_j (m - x_j)
    double[WIDTH] mass  # sum_j u_j
    double[WIDTH] loss
    double[WIDTH] factor  # of exp(x - m) in the result
    double[WIDTH] scale  # of `exponential` in the result
    double[WIDTH] g_y  # the gradient at the label


cdef inline bint usable(double m) noexcept nogil:
    """Whether a maximum serves as a reference: up to LIMIT, x - m is exact wherever exp(x - m) matters."""
    return fabs(m) < LIMIT


cdef inline Vec[double] where_usable(
    Vec[double] m, Vec[double] x, Vec[double] otherwise
) noexcept nogil:
    return where_gt(splat(LIMIT), absolute(m), x, otherwise)


cdef inline Vec[double] exponent_of(Vec[double] m) noexcept nogil:
    """The exponent n of the reference for a maximum m; 0 where it is not usable."""
    return where_usable(m, round_down(m * splat(LOG2E) + splat(0.5)), splat(0.0))


cdef inline Vec[double] lead_of(Vec[double] m, Vec[double] n) noexcept nogil:
    """exp(m) / 2**n, a number about 1; 1 where m is not usable."""
    cdef Vec[double] f = (m - n * splat(LN2_HIGH)) - n * splat(LN2_LOW)
    return where_usable(m, splat(1.0) + fma(f * f, exp_series(f), f), splat(1.0))


cdef inline State state_of(const Group* group, Py_ssize_t i) noexcept nogil:
    cdef State row
    row.m, row.e, row.k = group.m[i], group.e[i], group.k[i]
    row.n, row.added = group.n[i], group.added[i]
    return row


cdef inline void set_state(Group* group, Py_ssize_t i, const State* row) noexcept nogil:
    group.m[i], group.e[i], group.k[i] = row.m, row.e, row.k
    group.n[i], group.added[i] = row.n, row.added


cdef inline void set_all(double* values, double value) noexcept nogil:
    cdef Py_ssize_t b
    for b in range(WIDTH // 16):
        store_all(values + 16 * b, splat(value))


cdef void begin(Group* group, bint targets) noexcept nogil:
    """Every row the identity, idle ones too, so that their lanes hold harmless numbers."""
    set_all(group.m, -INFINITY)
    set_all(group.e, 0.0)
    set_all(group.k, 0.0)
    set_all(group.n, 0.0)
    set_all(group.added, 0.0)
    set_all(group.kept, 1.0)
    if targets:
        set_all(group.x_y, 0.0)
        set_all(group.w_y, 1.0)
        set_all(group.slope_y, 1.0)
        set_all(group.distance, 0.0)
        set_all(group.mass, 0.0)


cdef void raise_maximum(State* row, double top) noexcept nogil:
    """The state relative to a larger maximum `top`.

    The rounding error of m - top, found as in Knuth's two-sum, corrects the exponential: otherwise a
    difference of d would cost d roundoffs.
    """
    cdef double d = row.m - top, rounded = d - row.m, error = 0.0
    if row.m == -INFINITY:
        row.e = (row.e + row.added) * 0.0
    else:
        if d > -INFINITY:
            error = (row.m - (d - rounded)) - (top + rounded)
        row.e += row.added / first(lead_of(splat(row.m), splat(row.n)))
        row.e = (row.e + row.k) * (exp(d) * (1.0 + error))
    row.m, row.k, row.n, row.added = top, 0.0, first(exponent_of(splat(top))), 0.0


cdef void settle(Group* group) noexcept nogil:
    """Nothing more is added. A row without an element above -inf is the identity; a NaN stays."""
    cdef Py_ssize_t b, i
    cdef Vec[double] m, e, k, lead, zero = splat(0.0), none = splat(<double> -INFINITY)
    for b in range(vectors_of(&group.m[0], group.count)):
        i = 16 * b
        m = load_all(&group.m[i])
        lead = lead_of(m, load_all(&group.n[i]))
        e = load_all(&group.e[i]) + load_all(&group.added[i]) / lead
        e = where_eq(m, none, e * zero, e)
        k = where_eq(m, none, zero, load_all(&group.k[i]))
        store_all(&group.lead[i], lead)
        store_all(&group.e[i], e)
        store_all(&group.k[i], k)
        # for k at least 1, or a row without elements
        store_all(&group.log_s[i], log1p_sum(e + (k - splat(1.0))))


cdef inline double sign_of(double s) noexcept nogil:
    return 1.0 if s > 0.0 else -1.0 if s < 0.0 else s


cdef inline double weighted_log_sum(double e, double k) noexcept nogil:
    """log|e + k|, from whichever part dominates."""
    if fabs(e) < fabs(k):
        return log(fabs(k)) + log1p(e / k)
    return log(fabs(e + k))


cdef inline double times(double coefficient, double value) noexcept nogil:
    """The product, 0 where the coefficient is."""
    return coefficient * value if coefficient != 0.0 else 0.0


cdef inline Vec[double] products(Vec[double] coefficient, Vec[double] value) noexcept nogil:
    cdef Vec[double] zero = splat(0.0)
    return where_eq(coefficient, zero, zero, coefficient * value)


cdef inline void set_factors(Group* group, Py_ssize_t i, Vec[double] factor) noexcept nogil:
    """Of a vector of rows from i on."""
    store_all(&group.factor[i], factor)
    store_all(&group.scale[i], factor / load_all(&group.lead[i]) * splat(OUT_UNSHIFT))


cdef void finish(
    Group* group, Py_ssize_t classes, bint sparse, const Options* options
) noexcept nogil:
    """What becomes of the rows of a cross-entropy.

    At the label the gradient is (c + excess) p - u_y - c, whose part c (p - 1) is computed as
    -c (1 - p), and 1 - p from expm1(x_y - m): nothing cancels.
    """
    cdef Py_ssize_t b, i
    cdef Vec[double] m, s, rest, log_s, lse, x_y, w_y, mass, loss, c, excess, q, t, p_y, others, g_y
    cdef Vec[double] one = splat(1.0), nan = splat(<double> NAN), infinity = splat(<double> INFINITY)
    cdef Vec[double] z = splat(options.z_loss), scale = splat(options.scale)
    cdef double floor, magic
    window(0.0, 0, &floor, &magic)
    for b in range(vectors_of(&group.m[0], group.count)):
        i = 16 * b
        m, log_s = load_all(&group.m[i]), load_all(&group.log_s[i])
        x_y, w_y, mass = load_all(&group.x_y[i]), load_all(&group.w_y[i]), load_all(&group.mass[i])
        s = load_all(&group.e[i]) + load_all(&group.k[i])
        rest = load_all(&group.e[i]) + (load_all(&group.k[i]) - one)
        c = splat(1.0 - options.label_smoothing if sparse else 0.0) * w_y
        lse = m + log_s
        loss = products(c, log_s + (m - x_y)) + products(mass, log_s)
        loss = (loss + load_all(&group.distance[i])) + products(z, lse * lse)
        if classes > 0:
            loss = where_eq(m, splat(<double> -INFINITY), nan, loss)
        store_all(&group.loss[i], products(load_all(&group.kept[i]), loss))
        excess = mass + products(z + z, lse)
        split(x_y - m, splat(floor), splat(magic), &q, &t, 0.0)
        p_y = fma(q, t, t) / s
        others = (rest - fma(q, t, t - one)) / s  # 1 - p_y
        g_y = (excess * p_y - splat(options.label_smoothing / classes) * w_y) - c * others
        g_y = (scale * g_y) * load_all(&group.slope_y[i])
        store_all(&group.g_y[i], where_gt(infinity, absolute(m), g_y, nan))
        set_factors(group, i, scale * (c + excess) / s)
