# exp, log1p, tanh and the two losses of an element: the formulas of `fastll.backend.numba.maths`,
# where they are derived. Its constants stand here a second time; a test that compares the results of
# the two backends bit by bit keeps them equal.
#
# (`like` arguments tell Cython the type: it does not see it in that of a vector.)

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
      #define LN2_FLOAT {(float) LN2, (float) ((LN2_HIGH - (double) (float) LN2) + LN2_LOW)}
      #define LN2_DOUBLE {LN2, (LN2_HIGH - LN2) + LN2_LOW}
    #else
      #define LIMIT 0x1p14  /* n has 15 bits, which leaves 9 for each part */
      #define LN2_FLOAT {0x1.63p-1f, -0x1.bdp-13f, -0x1.05c610ca86c39p-29f}
      #define LN2_DOUBLE {LN2_HIGH, LN2_LOW}
    #endif

    template <class T> struct Constants;

    template <> struct Constants<float> {
        static constexpr float ln2[] = LN2_FLOAT;
        /* (exp(f) - 1 - f) / f**2 for |f| <= ln(2) / 2, from the lowest power */
        static constexpr float r[] = {
            0.5,
            0.16666577025255677587,
            0.041666554661622913223,
            0.0083631731335131513025,
            0.0013926176191150313267,
        };
        /* (atanh(z) / z - 1) / z**2 as a function of z**2, |z| <= 3 - 2 sqrt(2) */
        static constexpr float atanh[] = {
            0.33333342519814533154,
            0.19994390272121269827,
            0.14789975190232547312,
        };
    };

    template <> struct Constants<double> {
        static constexpr double ln2[] = LN2_DOUBLE;
        static constexpr double r[] = {
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
        static constexpr double atanh[] = {
            0.33333333333333348431,
            0.19999999999949751953,
            0.14285714312987874917,
            0.11111105567375917728,
            0.090914445642062292024,
            0.076658607479130060874,
            0.073082254897760543173,
        };
    };

    template <class T, int N>
    INLINE Vec<T> polynomial(const T (&coefficients)[N], Vec<T> x) {
        Vec<T> p = splat(coefficients[N - 1]);
        for (int i = N - 2; i >= 0; i--)
            p = fma(p, x, splat(coefficients[i]));
        return p;
    }

    template <class T>
    INLINE Vec<T> exp_series(Vec<T> f) {
        return polynomial(Constants<T>::r, f);
    }

    template <class T>
    INLINE Vec<T> atanh_series(Vec<T> w) {
        return polynomial(Constants<T>::atanh, w);
    }

    /* x - n ln 2 */
    template <class T>
    INLINE Vec<T> reduced(Vec<T> x, Vec<T> n) {
        for (T part : Constants<T>::ln2)
            x = fma(n, splat((T) -part), x);
        return x;
    }

    #define ROOT 0.41421356237309515  /* sqrt(2) - 1, from where log1p halves its argument */

    #define SUM_UNSHIFT 0x1p-64  /* 2**-SUM_SHIFT */
    #define OUT_UNSHIFT 0x1p-24  /* 2**-OUT_SHIFT */
    #define SMALL_SCALE 0x1p-100  /* a factor of terms that keeps its digits in float32 */
    """
    const double LOG2E, LN2, LN2_HIGH, LN2_LOW, LIMIT, ROOT, SUM_UNSHIFT, OUT_UNSHIFT
    const double SMALL_SCALE
    Vec[T] exp_series[T](Vec[T]) nogil
    Vec[T] atanh_series[T](Vec[T]) nogil
    Vec[T] reduced[T](Vec[T], Vec[T]) nogil

cdef enum:
    SUM_SHIFT = 64  # for sums: terms down to 2**-190 of the largest
    OUT_SHIFT = 24  # for elements: down to the smallest subnormal number


cdef inline double power(double n) noexcept nogil:
    """2**n for a whole number n <= 0; 0 or NaN where there is none."""
    return double_of(<int64_t> (n + 1023.0) << 52) if n > -1023.0 else n * 0.0


cdef inline void window(double n_ref, int shift, real* floor, real* magic) noexcept nogil:
    """Floor and magic of `exponential` for a reference exponent, a whole number."""
    if real is float:
        floor[0] = <real> ((n_ref - 127 - shift) * LN2)
        magic[0] = <real> (1.5 * (1 << 23) + 127) + <real> (shift - n_ref)
    else:
        floor[0] = (n_ref - 1023 - shift) * LN2
        magic[0] = (1.5 * (<long long> 1 << 52) + 1023) + (shift - n_ref)


cdef inline void split(
    Vec[real] x, Vec[real] floor, Vec[real] magic, Vec[real]* q, Vec[real]* s, real like
) noexcept nogil:
    """(q, s) with exp(x) 2**(shift - n_ref) = s (1 + q)."""
    cdef Vec[real] y = maximum(floor, x)  # a NaN in x stays
    cdef Vec[real] z = fma(y, splat(<real> LOG2E), magic)
    cdef Vec[real] f = reduced(y, z - magic)
    s[0] = exponent_bits(z)
    q[0] = fma(f * f, exp_series(f), f)


cdef inline Vec[real] exponential(
    Vec[real] x, Vec[real] floor, Vec[real] magic, real like
) noexcept nogil:
    """exp(x) 2**(shift - n_ref), for floor and magic of `window`; 0 below floor."""
    cdef Vec[real] q, s
    split(x, floor, magic, &q, &s, like)
    return fma(q, s, s)


cdef inline Vec[real] series(Vec[real] u, real like) noexcept nogil:
    """log(1 + u) for sqrt(1/2) <= 1 + u <= sqrt(2)."""
    cdef Vec[real] z = u / (u + splat(<real> 2)), w = z * z
    z = z + z
    return fma(z * w, atanh_series(w), z)


cdef inline Vec[double] log1p_sum(Vec[double] r) noexcept nogil:
    """log(1 + r) in float64, r >= -1: with s = 1 + r = 2**n f, n ln 2 + log f."""
    cdef Vec[double] one = splat(1.0), n, down
    cdef Vec[double] s = r + one, back = s - one
    cdef Vec[double] error = (r - back) + (one - (s - back))  # Knuth's two-sum
    exponents(s, &n, &down)
    cdef Vec[double] log = series(fma(s, down, splat(-1.0)) + error * down, 0.0)
    log = fma(n, splat(LN2_HIGH), fma(n, splat(LN2_LOW), log))
    log = where_gt(s, splat(0.0), log, splat(<double> -INFINITY))
    return where_gt(splat(<double> INFINITY), s, log, s)  # a NaN stays


cdef inline Vec[real] log1p_unit(Vec[real] e, real like) noexcept nogil:
    """log(1 + e), 0 <= e <= 1."""
    cdef Vec[real] root = splat(<real> ROOT)
    cdef Vec[real] half = (e - splat(<real> 1)) * splat(<real> 0.5)
    cdef Vec[real] log = series(where_gt(e, root, half, e), like)
    return where_gt(e, root, log + splat(<real> LN2), log)


cdef inline void tails(Vec[real] x, Vec[real]* scaled, Vec[real]* e, real like) noexcept nogil:
    """exp(-|x|) 2**OUT_SHIFT, exp(-|x|)."""
    cdef real floor, magic
    window(0.0, OUT_SHIFT, &floor, &magic)
    scaled[0] = exponential(splat(<real> 0) - absolute(x), splat(floor), splat(magic), like)
    e[0] = scaled[0] * splat(<real> OUT_UNSHIFT)


cdef inline Vec[real] sigmoid(Vec[real] x, real like) noexcept nogil:
    """1 / (1 + exp(-x)), by exp(-|x|), so that the lower tail is exp(x) to the last subnormal."""
    cdef Vec[real] scaled, e, one = splat(<real> 1)
    tails(x, &scaled, &e, like)
    cdef Vec[real] share = one / (e + one)
    return where_ge(x, splat(<real> 0), share, (scaled * share) * splat(<real> OUT_UNSHIFT))


cdef inline Vec[real] log_sigmoid(Vec[real] x, real like) noexcept nogil:
    """min(x, 0) - log1p(exp(-|x|))."""
    cdef Vec[real] scaled, e, zero = splat(<real> 0)
    tails(x, &scaled, &e, like)
    return where_gt(zero, x, x, zero) - log1p_unit(e, like)


cdef inline Vec[real] softcap(
    Vec[real] x, Vec[real] cap, Vec[real]* derivative, real like
) noexcept nogil:
    """cap tanh(x / cap) and its derivative, 1 - tanh(x / cap)**2."""
    cdef real floor, magic
    cdef Vec[real] q, s, zero = splat(<real> 0), one = splat(<real> 1), two = splat(<real> 2)
    cdef Vec[real] y = absolute(x / cap)
    window(0.0, 0, &floor, &magic)
    split(zero - (y + y), splat(floor), splat(magic), &q, &s, like)
    cdef Vec[real] e = fma(q, s, s), fall = fma(q, s, s - one)
    cdef Vec[real] share = one / (fall + two)
    cdef Vec[real] upper = (zero - fall) * share * cap, slope = two * share
    derivative[0] = e * (slope * slope)
    return where_gt(zero, x, zero - upper, upper)


cdef inline Vec[real] bce_parts(
    Vec[real] x, Vec[real] positive, Vec[real] negative, Vec[real]* e, Vec[real]* derivative, real like
) noexcept nogil:
    """The linear part of `bce`, exp(-|x|), and the derivative."""
    cdef Vec[real] scaled, zero = splat(<real> 0), one = splat(<real> 1)
    tails(x, &scaled, e, like)
    cdef Vec[real] slope = where_gt(x, zero, negative, positive)
    cdef Vec[real] share = one / (e[0] + one)
    cdef Vec[real] upper = where_ge(x, zero, share, e[0] * share)
    cdef Vec[real] lower = where_ge(x, zero, e[0] * share, share)
    derivative[0] = negative * upper - positive * lower
    return where_eq(slope, zero, zero, slope * absolute(x))


cdef inline Vec[real] bce(
    Vec[real] x, Vec[real] positive, Vec[real] negative, Vec[real]* derivative, real like
) noexcept nogil:
    """positive softplus(-x) + negative softplus(x), and its derivative.

    A coefficient of 0 annuls an infinite x.
    """
    cdef Vec[real] e
    cdef Vec[real] linear = bce_parts(x, positive, negative, &e, derivative, like)
    return linear + (positive + negative) * log1p_unit(e, like)
