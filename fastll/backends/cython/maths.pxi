# exp, log1p, tanh and the two losses of an element: the formulas of `fastll.backends.numba.maths`,
# where they are derived. Its constants stand here a second time; a test that compares the results of
# the two backends bit by bit keeps them equal.

cdef extern from *:
    """
    #define LOG2E 1.4426950408889634
    #define LN2 0.6931471805599453
    #define LN2_HIGH 0x1.62e42feep-1  /* 32 bits */
    #define LN2_LOW 0x1.a39ef35793c76p-33

    /* ln 2 as a sum, so that n ln 2 is right for every n that a maximum below LIMIT brings about:
       by fused operations, or by products that are exact but for the last part's. */
    #if FUSED
      #define LIMIT 0x1p20
      static const float LN2_FLOAT[] = {
          (float) LN2, (float) ((LN2_HIGH - (double) (float) LN2) + LN2_LOW)};
      static const double LN2_DOUBLE[] = {LN2, (LN2_HIGH - LN2) + LN2_LOW};
    #else
      #define LIMIT 0x1p14  /* n has 15 bits, which leaves 9 for each part */
      static const float LN2_FLOAT[] = {0x1.63p-1f, -0x1.bdp-13f, -0x1.05c610ca86c39p-29f};
      static const double LN2_DOUBLE[] = {LN2_HIGH, LN2_LOW};
    #endif
    #define LN2_FLOAT_PARTS ((int) (sizeof LN2_FLOAT / sizeof *LN2_FLOAT))

    /* (exp(f) - 1 - f) / f**2 for |f| <= ln(2) / 2, from the lowest power */
    static const float R_FLOAT[] = {
        0.5,
        0.16666577025255677587,
        0.041666554661622913223,
        0.0083631731335131513025,
        0.0013926176191150313267,
    };
    static const double R_DOUBLE[] = {
        0.50000000000000010211,
        0.16666666666666667452,
        0.041666666666624161578,
        0.0083333333333300644245,
        0.001388888891719688114,
        0.000198412698630406699,
        0.000024801521322116824174,
        2.755726848011633485e-6,
        2.7620075999810651055e-7,
        2.5100375924709716851e-8,
    };

    /* (atanh(z) / z - 1) / z**2 as a function of z**2, |z| <= 3 - 2 sqrt(2) */
    static const float ATANH_FLOAT[] = {
        0.33333342519814533154,
        0.19994390272121269827,
        0.14789975190232547312,
    };
    static const double ATANH_DOUBLE[] = {
        0.33333333333333348431,
        0.19999999999949751953,
        0.14285714312987874917,
        0.11111105567375917728,
        0.090914445642062292024,
        0.076658607479130060874,
        0.073082254897760543173,
    };
    #define ROOT 0.41421356237309515  /* sqrt(2) - 1, from where log1p halves its argument */

    #define SUM_UNSHIFT 0x1p-64  /* 2**-SUM_SHIFT */
    #define OUT_UNSHIFT 0x1p-24  /* 2**-OUT_SHIFT */
    """
    const double LOG2E, LN2, LN2_HIGH, LN2_LOW, LIMIT, ROOT, SUM_UNSHIFT, OUT_UNSHIFT
    const float LN2_FLOAT[3]
    const double LN2_DOUBLE[2]
    const int LN2_FLOAT_PARTS
    const float R_FLOAT[5]
    const double R_DOUBLE[10]
    const float ATANH_FLOAT[3]
    const double ATANH_DOUBLE[7]

cdef enum:
    SUM_SHIFT = 64  # for sums: terms down to 2**-190 of the largest
    OUT_SHIFT = 24  # for elements: down to the smallest subnormal number


cdef inline real polynomial(const real* coefficients, int count, real x) noexcept nogil:
    cdef int i
    cdef real p = coefficients[count - 1]
    for i in range(count - 2, -1, -1):
        p = fma(p, x, coefficients[i])
    return p


cdef inline void window(double n_ref, int shift, real* floor, real* magic) noexcept nogil:
    """Floor and magic of `exponential` for a reference exponent, a whole number."""
    if real is float:
        floor[0] = <real> ((n_ref - 127 - shift) * LN2)
        magic[0] = <real> (1.5 * (1 << 23) + 127) + <real> (shift - n_ref)
    else:
        floor[0] = (n_ref - 1023 - shift) * LN2
        magic[0] = (1.5 * (<long long> 1 << 52) + 1023) + (shift - n_ref)


cdef inline void split(real x, real floor, real magic, real* q, real* s) noexcept nogil:
    """(q, s) with exp(x) 2**(shift - n_ref) = s (1 + q)."""
    cdef int i
    cdef real f = maximum(floor, x)  # a NaN in x stays
    cdef real z = fma(f, <real> LOG2E, magic)
    cdef real n = z - magic
    s[0] = exponent_bits(z)
    if real is float:
        for i in range(LN2_FLOAT_PARTS):
            f = fma(n, -LN2_FLOAT[i], f)
        q[0] = fma(f * f, polynomial(R_FLOAT, 5, f), f)
    else:
        for i in range(2):
            f = fma(n, -LN2_DOUBLE[i], f)
        q[0] = fma(f * f, polynomial(R_DOUBLE, 10, f), f)


cdef inline real exponential(real x, real floor, real magic) noexcept nogil:
    """exp(x) 2**(shift - n_ref), for floor and magic of `window`; 0 below floor."""
    cdef real q, s
    split(x, floor, magic, &q, &s)
    return fma(q, s, s)


cdef inline double exp_reduced(double f) noexcept nogil:
    """exp(f), |f| <= ln(2) / 2."""
    cdef int i
    cdef double r = R_DOUBLE[9]
    for i in range(8, -1, -1):
        r = r * f + R_DOUBLE[i]
    return 1.0 + (f + (f * f) * r)


cdef inline real log1p_unit(real e) noexcept nogil:
    """log(1 + e), 0 <= e <= 1."""
    cdef real one = 1, half = <real> 0.5
    cdef real u = (e - one) * half if e > <real> ROOT else e
    cdef real z = u / (u + (one + one))
    cdef real w = z * z
    cdef real p
    z = z + z
    if real is float:
        p = polynomial(ATANH_FLOAT, 3, w)
    else:
        p = polynomial(ATANH_DOUBLE, 7, w)
    cdef real log = fma(z * w, p, z)
    cdef real doubled = log + <real> LN2
    # not e > ROOT once more: GCC would merge the two, and compute all in between for either case
    return log if u == e else doubled


cdef inline void tails(real x, real* scaled, real* e) noexcept nogil:
    """exp(-|x|) 2**OUT_SHIFT, exp(-|x|)."""
    cdef real floor, magic, zero = 0
    window(0.0, OUT_SHIFT, &floor, &magic)
    scaled[0] = exponential(zero - absolute(x), floor, magic)
    e[0] = scaled[0] * <real> OUT_UNSHIFT


cdef inline real sigmoid(real x) noexcept nogil:
    """1 / (1 + exp(-x)), by exp(-|x|), so that the lower tail is exp(x) to the last subnormal."""
    cdef real scaled, e, zero = 0, one = 1
    tails(x, &scaled, &e)
    cdef real share = one / (e + one)
    cdef real lower = (scaled * share) * <real> OUT_UNSHIFT
    return share if x >= zero else lower


cdef inline real log_sigmoid(real x) noexcept nogil:
    """min(x, 0) - log1p(exp(-|x|))."""
    cdef real scaled, e, zero = 0
    tails(x, &scaled, &e)
    return (x if zero > x else zero) - log1p_unit(e)


cdef inline void softcap(real x, real cap, real* capped, real* derivative) noexcept nogil:
    """cap tanh(x / cap) and its derivative, 1 - tanh(x / cap)**2."""
    cdef real floor, magic, q, s, zero = 0, one = 1, two = 2
    cdef real y = absolute(x / cap)
    window(0.0, 0, &floor, &magic)
    split(zero - (y + y), floor, magic, &q, &s)
    cdef real e = fma(q, s, s)
    cdef real fall = fma(q, s, s - one)
    cdef real share = one / (fall + two)
    cdef real upper = (zero - fall) * share * cap
    cdef real lower = zero - upper
    cdef real slope = two * share
    capped[0] = lower if zero > x else upper
    derivative[0] = e * (slope * slope)


cdef inline void bce(
    real x, real positive, real negative, real* loss, real* derivative
) noexcept nogil:
    """positive softplus(-x) + negative softplus(x), and its derivative.

    A coefficient of 0 annuls an infinite x.
    """
    cdef real scaled, e, zero = 0, one = 1
    tails(x, &scaled, &e)
    cdef real slope = negative if x > zero else positive
    cdef real linear = slope * absolute(x)
    loss[0] = (zero if slope == zero else linear) + (positive + negative) * log1p_unit(e)
    cdef real share = one / (e + one)
    cdef real rest = e * share
    cdef real upper = share if x >= zero else rest
    cdef real lower = rest if x >= zero else share
    derivative[0] = negative * upper - positive * lower
