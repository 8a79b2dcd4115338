// Vectors of a fixed number of lanes: VECTOR_BYTES, i.e. 32 float32 or 16 float64, whatever the CPU has.
// So the order of every sum is the same on every machine. A vector is a pair of halves, down to what one
// register holds, and all of it stays in registers. All arithmetic is IEEE: the flags in setup.py let the
// compiler neither reorder nor contract it.
//
// This is the vocabulary that `fastll.formulas` is written in, and what walks through memory by vectors.
// Everything has internal linkage, so that the builds for several instruction sets share nothing.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
  #include <immintrin.h>
#endif

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  #define FUSED 1
#else
  #define FUSED 0
#endif

#if defined(__GNUC__)
  #define FORCED __attribute__((always_inline))
  #define REGISTER_TYPE(T, bytes) T __attribute__((vector_size(bytes)))
  #define prefetch(address) __builtin_prefetch(address)
  #if defined(__AVX512F__)
    #define REGISTER(T) 64
  #elif defined(__AVX__)
    #define REGISTER(T) 32
  #else
    #define REGISTER(T) 16
  #endif
#else  // registers of one lane
  #define FORCED
  #define REGISTER_TYPE(T, bytes) T
  #define prefetch(address) ((void) (address))
  #define REGISTER(T) ((int) sizeof(T))
#endif

// What takes or returns vectors is inline, also members and lambdas (FORCED), as they must stay in registers.
#define INLINE static inline FORCED

namespace {

typedef std::ptrdiff_t Index;

template <class T, int BYTES, bool FITS = (BYTES <= REGISTER(T))>
struct Lanes {
    static constexpr bool fits = false;
    static constexpr int count = BYTES / (int) sizeof(T);
    typedef Lanes<T, BYTES / 2> Half;
    Half lo, hi;
};

template <class T, int BYTES>
struct Lanes<T, BYTES, true> {
    static constexpr bool fits = true;
    static constexpr int count = BYTES / (int) sizeof(T);
    typedef REGISTER_TYPE(T, BYTES) type;
    type v;
};

template <class T>
using Vec = Lanes<T, 128>;

template <class T>
constexpr int lanes = Vec<T>::count;

#define LANES_OF_VECTOR template <class T, int B> INLINE Lanes<T, B>

// Numbers and vectors mix: a number stands for a vector of it.

template <class... A> struct Joined_;
template <class T, int B, class... A> struct Joined_<Lanes<T, B>, A...> { typedef Lanes<T, B> type; };
template <class T, class... A> struct Joined_<T, A...> { typedef typename Joined_<A...>::type type; };

template <class... A>
using Joined = typename Joined_<A...>::type;  // the vector among the types

template <class V, class X>
INLINE V spread(X x) {
    if constexpr (std::is_same_v<V, X>)
        return x;
    else if constexpr (V::fits) {
        V r = {};
        r.v = x - r.v;
        return r;
    } else
        return {spread<typename V::Half>(x), spread<typename V::Half>(x)};
}

template <class T>
INLINE Vec<T> splat(T x) {
    return spread<Vec<T>>(x);
}

namespace on_register {

#if !FUSED
template <class R>
INLINE R fma(R a, R b, R c) {
    return a * b + c;
}
#elif defined(__SSE2__)
  #define FMA(T, bytes, instruction)                                                               \
      INLINE REGISTER_TYPE(T, bytes) fma(                                                          \
          REGISTER_TYPE(T, bytes) a, REGISTER_TYPE(T, bytes) b, REGISTER_TYPE(T, bytes) c          \
      ) { return instruction(a, b, c); }
  #if defined(__AVX512F__)
FMA(float, 64, _mm512_fmadd_ps)
FMA(double, 64, _mm512_fmadd_pd)
  #endif
FMA(float, 32, _mm256_fmadd_ps)
FMA(double, 32, _mm256_fmadd_pd)
#else
template <class R>
INLINE R fma(R a, R b, R c) {
    for (unsigned i = 0; i < sizeof a / sizeof a[0]; i++)
        a[i] = std::fma(a[i], b[i], c[i]);
    return a;
}
#endif

template <class R>
INLINE R maximum(R a, R b) {
    return a > b ? a : b;
}

// x86's maximum is that to the letter, which GCC does not always see.
#if defined(__SSE2__)
  #define MAXIMUM(T, bytes, instruction)                                                            \
      INLINE REGISTER_TYPE(T, bytes) maximum(                                                       \
          REGISTER_TYPE(T, bytes) a, REGISTER_TYPE(T, bytes) b                                      \
      ) { return instruction(a, b); }
  #if defined(__AVX512F__)
MAXIMUM(float, 64, _mm512_max_ps)
MAXIMUM(double, 64, _mm512_max_pd)
  #endif
  #if defined(__AVX__)
MAXIMUM(float, 32, _mm256_max_ps)
MAXIMUM(double, 32, _mm256_max_pd)
  #endif
MAXIMUM(float, 16, _mm_max_ps)
MAXIMUM(double, 16, _mm_max_pd)
#endif

}  // namespace on_register

// What is done to a vector is done to its halves, and in the end to registers.
#define BINARY(name, on_register)                                                                   \
    LANES_OF_VECTOR name(Lanes<T, B> a, Lanes<T, B> b) {                                            \
        if constexpr (Lanes<T, B>::fits)                                                            \
            return {on_register};                                                                   \
        else                                                                                        \
            return {name(a.lo, b.lo), name(a.hi, b.hi)};                                            \
    }                                                                                               \
    LANES_OF_VECTOR name(Lanes<T, B> a, T b) { return name(a, spread<Lanes<T, B>>(b)); }            \
    LANES_OF_VECTOR name(T a, Lanes<T, B> b) { return name(spread<Lanes<T, B>>(a), b); }

BINARY(operator+, a.v + b.v)
BINARY(operator-, a.v - b.v)
BINARY(operator*, a.v * b.v)
BINARY(operator/, a.v / b.v)
BINARY(maximum, on_register::maximum(a.v, b.v))  // the larger one; b where either is NaN

LANES_OF_VECTOR fma(Lanes<T, B> a, Lanes<T, B> b, Lanes<T, B> c) {
    if constexpr (Lanes<T, B>::fits)
        return {on_register::fma(a.v, b.v, c.v)};
    else
        return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}

template <class A, class B, class C>
INLINE auto fma(A a, B b, C c) {
    typedef Joined<A, B, C> V;
    return fma(spread<V>(a), spread<V>(b), spread<V>(c));
}

// x where the comparison holds, else y; false for NaN.
#define WHERE(name, comparison)                                                                     \
    LANES_OF_VECTOR name(Lanes<T, B> a, Lanes<T, B> b, Lanes<T, B> x, Lanes<T, B> y) {              \
        if constexpr (Lanes<T, B>::fits)                                                            \
            return {a.v comparison b.v ? x.v : y.v};                                                \
        else                                                                                        \
            return {name(a.lo, b.lo, x.lo, y.lo), name(a.hi, b.hi, x.hi, y.hi)};                    \
    }                                                                                               \
    template <class A, class B, class X, class Y>                                                   \
    INLINE auto name(A a, B b, X x, Y y) {                                                          \
        typedef Joined<A, B, X, Y> V;                                                               \
        return name(spread<V>(a), spread<V>(b), spread<V>(x), spread<V>(y));                        \
    }

WHERE(where_eq, ==)
WHERE(where_gt, >)
WHERE(where_ge, >=)

// The representation as integers. SPLIT is that of sqrt(1/2), rounded up.
template <class T> struct Bits;

template <> struct Bits<float> {
    typedef uint32_t type;
    typedef int32_t signed_type;
    static constexpr int mantissa = 23, bias = 127;
    static constexpr int32_t SPLIT = 0x3f3504f4, WHOLE = 0x4b400000;
};

template <> struct Bits<double> {
    typedef uint64_t type;
    typedef int64_t signed_type;
    static constexpr int mantissa = 52, bias = 1023;
    static constexpr int64_t SPLIT = 0x3fe6a09e667f3bcd, WHOLE = 0x4338000000000000;
};

#define BITWISE(name, bits_type, change)                                                            \
    LANES_OF_VECTOR name(Lanes<T, B> x) {                                                           \
        if constexpr (Lanes<T, B>::fits) {                                                          \
            REGISTER_TYPE(typename Bits<T>::bits_type, B) bits;                                     \
            memcpy(&bits, &x.v, B);                                                                 \
            change;                                                                                 \
            memcpy(&x.v, &bits, B);                                                                 \
            return x;                                                                               \
        } else                                                                                      \
            return {name(x.lo), name(x.hi)};                                                        \
    }

// The low bits of a number's representation as its sign and exponent, the rest zero.
BITWISE(exponent_bits, type, bits <<= Bits<T>::mantissa)
BITWISE(absolute, type, bits &= ~(typename Bits<T>::type) 0 >> 1)
// With x = 2**n f, sqrt(1/2) <= f < sqrt(2): 1.5 * 2**mantissa + n, and 2**-n.
BITWISE(whole, signed_type, bits = ((bits - Bits<T>::SPLIT) >> Bits<T>::mantissa) + Bits<T>::WHOLE)
BITWISE(
    downscale,
    signed_type,
    bits = (Bits<T>::bias - ((bits - Bits<T>::SPLIT) >> Bits<T>::mantissa)) << Bits<T>::mantissa
)

LANES_OF_VECTOR exponent(Lanes<T, B> x) {
    return whole(x) - (T) (1.5 * ((int64_t) 1 << Bits<T>::mantissa));
}

template <class T> struct Constants;  // see formulas.hpp

template <class T, int B>
INLINE Constants<T> constants(Lanes<T, B>) {
    return {};
}

template <class T, size_t N, class V>
INLINE V horner(const T (&coefficients)[N], V x) {
    V p = spread<V>(coefficients[0]);
    for (size_t i = 1; i < N; i++)
        p = fma(p, x, coefficients[i]);
    return p;
}

#if !FUSED
  // x - n ln 2 with ln 2 as a sum whose parts times n, up to 15 bits, are exact but for the last one's.
  #define OWN_reduced
LANES_OF_VECTOR reduced(Lanes<T, B> x, Lanes<T, B> n) {
    if constexpr (sizeof(T) == 4)
        for (float part : {0x1.63p-1f, -0x1.bdp-13f, -0x1.05c610ca86c39p-29f})
            x = x - n * (T) part;
    else
        for (double part : {0x1.62e42feep-1, 0x1.a39ef35793c76p-33})
            x = x - n * (T) part;
    return x;
}
#endif

// What a formula returns: several values.
template <class A, class B> struct Two { A a; B b; };
template <class A, class B, class C> struct Three { A a; B b; C c; };

template <class V> struct Number_;
template <class T, int B> struct Number_<Lanes<T, B>> { typedef T type; };
template <class A, class B> struct Number_<Two<A, B>> : Number_<A> {};

template <class V>
using NumberOf = typename Number_<V>::type;  // what vectors are made of

template <class A, class B>
INLINE Two<A, B> pack(A a, B b) {
    return {a, b};
}

template <class A, class B, class C>
INLINE Three<A, B, C> pack(A a, B b, C c) {
    return {a, b, c};
}

}  // namespace

#include "formulas.hpp"

namespace {

// Memory. Addresses need not be aligned.

template <class T, class V = Vec<T>>
INLINE V load_all(const T *v) {
    if constexpr (V::fits) {
        V x;
        memcpy(&x.v, v, sizeof x.v);
        return x;
    } else
        return {
            load_all<T, typename V::Half>(v),
            load_all<T, typename V::Half>(v + V::count / 2),
        };
}

template <class T, int B>
INLINE void store_all(T *v, const Lanes<T, B> &x) {
    if constexpr (Lanes<T, B>::fits)
        memcpy(v, &x.v, B);
    else {
        store_all(v, x.lo);
        store_all(v + Lanes<T, B>::count / 2, x.hi);
    }
}

// Non-temporal: that reads nothing, where a plain store reads the line first. v is aligned to a line.
template <class T, int B>
INLINE void stream_all(T *v, const Lanes<T, B> &x) {
    if constexpr (!Lanes<T, B>::fits) {
        stream_all(v, x.lo);
        stream_all(v + Lanes<T, B>::count / 2, x.hi);
    } else {
#if defined(__AVX512F__)
        _mm512_stream_si512((__m512i *) v, (__m512i) x.v);
#elif defined(__AVX__)
        _mm256_stream_si256((__m256i *) v, (__m256i) x.v);
#elif defined(__SSE2__)
        _mm_stream_si128((__m128i *) v, (__m128i) x.v);
#else
        memcpy(v, &x.v, B);
#endif
    }
}

// What was streamed is in memory before whatever is written next.
INLINE void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

#if defined(__AVX512F__)
  #define STEPS_OF(T, step)                                                                         \
      sizeof(T) == 4                                                                                \
          ? _mm512_mullo_epi32(                                                                     \
                _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),            \
                _mm512_set1_epi32((int) step)                                                       \
            )                                                                                       \
          : _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(step))
#endif

// Numbers `step` bytes apart.
template <class T, class V = Vec<T>>
INLINE V load_strided(const char *v, int64_t step) {
    if constexpr (!V::fits)
        return {
            load_strided<T, typename V::Half>(v, step),
            load_strided<T, typename V::Half>(v + V::count / 2 * step, step),
        };
#if defined(__AVX512F__)
    else if constexpr (sizeof(T) == 4)
        return {_mm512_i32gather_ps(STEPS_OF(T, step), v, 1)};
    else
        return {_mm512_i64gather_pd(STEPS_OF(T, step), v, 1)};
#else
    else {
        V x;
        for (int l = 0; l < V::count; l++) {
            T lane;
            memcpy(&lane, v + l * step, sizeof lane);
            x.v[l] = lane;
        }
        return x;
    }
#endif
}

template <class T, int B>
INLINE void store_strided(char *v, int64_t step, Lanes<T, B> x) {
    if constexpr (!Lanes<T, B>::fits) {
        store_strided(v, step, x.lo);
        store_strided(v + Lanes<T, B>::count / 2 * step, step, x.hi);
    }
#if defined(__AVX512F__)
    else if constexpr (sizeof(T) == 4)
        _mm512_i32scatter_ps(v, STEPS_OF(T, step), x.v, 1);
    else
        _mm512_i64scatter_pd(v, STEPS_OF(T, step), x.v, 1);
#else
    else
        for (int l = 0; l < Lanes<T, B>::count; l++) {
            T lane = x.v[l];
            memcpy(v + l * step, &lane, sizeof lane);
        }
#endif
}

// The first `count` numbers of v, then those of `pad`.
template <class T, int B>
INLINE Lanes<T, B> load_some(const T *v, Index count, Lanes<T, B> pad) {
    constexpr int lanes = Lanes<T, B>::count;
    if constexpr (!Lanes<T, B>::fits)
        return {load_some(v, count, pad.lo), load_some(v + lanes / 2, count - lanes / 2, pad.hi)};
    else {
        int few = count < 0 ? 0 : count > lanes ? lanes : (int) count;
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4)
            return {_mm512_mask_loadu_ps(pad.v, (__mmask16) ((1u << few) - 1), v)};
        else
            return {_mm512_mask_loadu_pd(pad.v, (__mmask8) ((1u << few) - 1), v)};
#else
        for (int l = 0; l < lanes; l++)
            pad.v[l] = l < few ? v[l] : pad.v[l];
        return pad;
#endif
    }
}

template <class T, int B>
INLINE void store_some(T *v, Index count, Lanes<T, B> x) {
    constexpr int lanes = Lanes<T, B>::count;
    if constexpr (!Lanes<T, B>::fits) {
        store_some(v, count, x.lo);
        store_some(v + lanes / 2, count - lanes / 2, x.hi);
    } else {
        int few = count < 0 ? 0 : count > lanes ? lanes : (int) count;
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4)
            _mm512_mask_storeu_ps(v, (__mmask16) ((1u << few) - 1), x.v);
        else
            _mm512_mask_storeu_pd(v, (__mmask8) ((1u << few) - 1), x.v);
#else
        for (int l = 0; l < few; l++)
            v[l] = x.v[l];
#endif
    }
}

// The first `count` numbers of v, then `pad`.
template <class T>
INLINE Vec<T> load(const T *v, Index count, T pad) {
    return count >= lanes<T> ? load_all(v) : load_some(v, count, splat(pad));
}

// Bytes from what is read or written to what is prefetched. The CPU's own prefetcher is late for us.
constexpr int AHEAD = 2048;

// Fetch two lines of the cache, which need not exist.
INLINE void prefetch_vector(const void *address) {
    prefetch((const char *) address);
    prefetch((const char *) address + 64);
}

// The same in a walk through memory.
template <class T>
INLINE Vec<T> load_ahead(const T *v) {
    prefetch_vector((const char *) v + AHEAD);
    return load_all(v);
}

template <class T>
INLINE Vec<T> load_ahead(const T *v, Index count, T pad) {
    prefetch_vector((const char *) v + AHEAD);
    return load(v, count, pad);
}

// Write the first `count` lanes.
template <class T>
INLINE void store(T *v, Index count, Vec<T> x) {
    if (count >= lanes<T>)
        store_all(v, x);
    else
        store_some(v, count, x);
}

// The first `count` lanes of x, then 0.
template <class T>
INLINE Vec<T> first_lanes(Vec<T> x, Index count) {
    if (count >= lanes<T>)
        return x;
    T memory[lanes<T>];
    store_all(memory, x);
    return load_some(memory, count, Vec<T>());
}

// Elements before the first line of the cache.
template <class T>
INLINE Index until_line(const T *v) {
    return (-(Index) v & 63) / (Index) sizeof(T);
}

// The lower or the upper half of the lanes. A copy through memory would keep all of a loop's vectors there.
#if defined(__AVX512F__)
INLINE __m256 lower(__m512 x) { return _mm512_castps512_ps256(x); }
INLINE __m256 upper(__m512 x) { return _mm512_extractf32x8_ps(x, 1); }
INLINE __m256d lower(__m512d x) { return _mm512_castpd512_pd256(x); }
INLINE __m256d upper(__m512d x) { return _mm512_extractf64x4_pd(x, 1); }
INLINE __m512d wide(__m256 x) { return _mm512_cvtps_pd(x); }
#endif
#if defined(__AVX__)
INLINE __m128 lower(__m256 x) { return _mm256_castps256_ps128(x); }
INLINE __m128 upper(__m256 x) { return _mm256_extractf128_ps(x, 1); }
INLINE __m128d lower(__m256d x) { return _mm256_castpd256_pd128(x); }
INLINE __m128d upper(__m256d x) { return _mm256_extractf128_pd(x, 1); }
INLINE __m256d wide(__m128 x) { return _mm256_cvtps_pd(x); }
#endif

template <int UPPER, class T, int B>
INLINE Lanes<T, B / 2> half(Lanes<T, B> x) {
    if constexpr (!Lanes<T, B>::fits) {
        if constexpr (UPPER)
            return x.hi;
        else
            return x.lo;
    }
#if defined(__AVX__)
    else if constexpr (B > 16 && UPPER)
        return {upper(x.v)};
    else if constexpr (B > 16)
        return {lower(x.v)};
#endif
    else {
        Lanes<T, B / 2> y;
        memcpy(&y.v, (const char *) &x.v + UPPER * B / 2, B / 2);
        return y;
    }
}

template <class T, int B>
INLINE T first(Lanes<T, B> x) {
    if constexpr (B > sizeof(T))
        return first(half<0>(x));
    else {
        T y;
        memcpy(&y, &x.v, B);
        return y;
    }
}

// The same lanes in float64.
template <class T, int B>
INLINE Lanes<double, B * 8 / (int) sizeof(T)> widen(Lanes<T, B> x) {
    if constexpr (sizeof(T) == 8)
        return x;
    else if constexpr (!Lanes<T, B>::fits)
        return {widen(x.lo), widen(x.hi)};
#if defined(__AVX__)
    else
        return {{wide(lower(x.v))}, {wide(upper(x.v))}};
#elif defined(__GNUC__)
    else {
        typedef typename Lanes<double, B>::type wide;
        return {
            {__builtin_convertvector(half<0>(x).v, wide)},
            {__builtin_convertvector(half<1>(x).v, wide)},
        };
    }
#else
    else
        return {x.v};
#endif
}

// The sum of the lanes, in float64, by halves.
template <class T, int B>
INLINE double total(Lanes<T, B> x) {
    if constexpr (sizeof(T) < 8)
        return total(widen(x));
    else if constexpr (B > 8)
        return total(half<0>(x) + half<1>(x));
    else
        return first(x);
}

// The largest of the lanes, none of which is NaN.
template <class T, int B>
INLINE T largest(Lanes<T, B> x) {
    if constexpr (B > sizeof(T))
        return largest(maximum(half<0>(x), half<1>(x)));
    else
        return first(x);
}

LANES_OF_VECTOR round_down(Lanes<T, B> x) {
    if constexpr (!Lanes<T, B>::fits)
        return {round_down(x.lo), round_down(x.hi)};
#if defined(__AVX512F__)
    else if constexpr (sizeof(T) == 8)
        return {_mm512_roundscale_pd(x.v, 0x09)};
#elif defined(__AVX__)
    else if constexpr (sizeof(T) == 8)
        return {_mm256_floor_pd(x.v)};
#endif
    else {
        T lanes[B / sizeof(T)];
        memcpy(lanes, &x.v, B);
        for (T &lane : lanes)
            lane = std::floor(lane);
        memcpy(&x.v, lanes, B);
        return x;
    }
}

// Sums over a block in the order of the contract: element j goes to lane j modulo their number. A term is
// a vector of `terms(j, n - j)`, or several.

template <class A, class B>
INLINE Two<A, B> operator+(Two<A, B> x, Two<A, B> y) {
    return {x.a + y.a, x.b + y.b};
}

template <class T, class F>
INLINE auto sum_block(Index n, F terms) {
    decltype(terms(n, n)) sums = {};
    for (Index j = 0; j < n; j += lanes<T>)
        sums = sums + terms(j, n - j);
    return sums;
}

// log(1 + r) in float64, r >= -1: with s = 1 + r = 2**n f, n ln 2 + log f.
template <int B>
INLINE Lanes<double, B> log1p_sum(Lanes<double, B> r) {
    Lanes<double, B> s = r + 1.0, back = s - 1.0;
    Lanes<double, B> error = (r - back) + (1.0 - (s - back));  // Knuth's two-sum
    Lanes<double, B> n = exponent(s), down = downscale(s);
    Lanes<double, B> log = series(fma(s, down, -1.0) + error * down);
    log = fma(n, LN2_HIGH, fma(n, LN2_LOW, log));
    log = where_gt(s, 0.0, log, -(double) INFINITY);
    return where_gt((double) INFINITY, s, log, s);  // a NaN stays
}

}  // namespace
