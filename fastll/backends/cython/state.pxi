# The scalars of one row: its running state, and what becomes of it. See `fastll.contract`.
#
# Everything here is float64; rows and columns share it, which is why they agree to the bit.

from libc.math cimport exp, expm1, floor as round_down, log, log1p

cdef struct State:
    double m
    double e
    double k
    # the maximum m as exp(m) = 2**n lead, if it is a usable reference for `exponential`
    bint usable
    double n
    double lead

cdef struct Options:
    long long ignore_index
    double label_smoothing
    double z_loss
    double softcap
    double scale

cdef struct Outcome:
    double loss
    double factor  # of the row's probabilities in the gradient
    double g_y  # the gradient at the target


cdef inline void refer(State* row) noexcept nogil:
    """Bring the reference up to the maximum. One of `LIMIT` or more, or infinite, is not usable:
    up to there x - m is exact wherever exp(x - m) matters."""
    row.usable, row.n, row.lead = False, 0.0, 1.0
    if fabs(row.m) < LIMIT:
        row.usable = True
        row.n = round_down(row.m * LOG2E + 0.5)
        row.lead = exp_reduced((row.m - row.n * LN2_HIGH) - row.n * LN2_LOW)


cdef inline void raise_maximum(State* row, double top) noexcept nogil:
    """The state relative to a larger maximum `top`.

    The rounding error of m - top, found as in Knuth's two-sum, corrects the exponential: otherwise a
    difference of d would cost d roundoffs.
    """
    cdef double d = row.m - top, rounded = d - row.m, error = 0.0
    if row.m == -INFINITY:
        row.e *= 0.0
    else:
        if d > -INFINITY:
            error = (row.m - (d - rounded)) - (top + rounded)
        row.e = (row.e + row.k) * (exp(d) * (1.0 + error))
    row.m, row.k = top, 0.0
    refer(row)


cdef inline void settle(State* row) noexcept nogil:
    """A row without an element above -inf is the identity; a NaN stays."""
    if row.m == -INFINITY:
        row.e, row.k = row.e * 0.0, 0.0


cdef inline double log_sum(const State* row) noexcept nogil:
    """log(e + k) for k at least 1, or a row without elements."""
    return log1p(row.e + (row.k - 1.0))


cdef inline double sign_of(double s) noexcept nogil:
    return 1.0 if s > 0.0 else -1.0 if s < 0.0 else s


cdef inline double weighted_log_sum(const State* row) noexcept nogil:
    """log|e + k|, from whichever part dominates."""
    if fabs(row.e) < fabs(row.k):
        return log(fabs(row.k)) + log1p(row.e / row.k)
    return log(fabs(row.e + row.k))


cdef inline double times(double coefficient, double value) noexcept nogil:
    """The product, 0 where the coefficient is."""
    return coefficient * value if coefficient != 0.0 else 0.0


cdef inline Outcome finish(
    const State* row,
    Py_ssize_t classes,
    bint sparse,
    double x_y,
    double w_y,
    double distance,  # sum_j u_j (m - x_j)
    double mass,  # sum_j u_j
    const Options* options,
) noexcept nogil:
    """What becomes of a row.

    At the target the gradient is (c + excess) p - u_y - c, whose part c (p - 1) is computed as
    -c (1 - p): nothing cancels.
    """
    cdef Outcome result
    cdef double m = row.m, s = row.e + row.k, rest = row.e + (row.k - 1.0), log_s = log_sum(row)
    cdef double eps = options.label_smoothing, z = options.z_loss
    cdef double c = (1.0 - eps) * w_y if sparse else 0.0
    cdef double excess = mass, p_y, others
    result.loss = times(c, log_s + (m - x_y)) + times(mass, log_s) + distance
    if z != 0.0:
        result.loss += z * (m + log_s) * (m + log_s)
        excess += 2.0 * z * (m + log_s)
    if m == -INFINITY and classes > 0:
        result.loss = NAN
    result.g_y = NAN
    if sparse and fabs(m) < INFINITY:
        p_y = exp(x_y - m) / s
        others = (rest - expm1(x_y - m)) / s  # 1 - p_y
        result.g_y = options.scale * (excess * p_y - eps / classes * w_y - c * others)
    result.factor = options.scale * (c + excess) / s
    return result
