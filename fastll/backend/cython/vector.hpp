// Vectors of a fixed number of lanes: 128 bytes, i.e. 32 float32 or 16 float64, whatever the CPU has. So
// the order of every sum is the same on every machine. A vector is a pair of halves, down to what one
// register holds, and all of it stays in registers. All arithmetic is IEEE: the flags in setup.py let
// the compiler neither reorder nor contract it.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
  #include <immintrin.h>
#endif

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  #define FUSED 1
#else
  #define FUSED 0
#endif

#if defined(__GNUC__)
  #define INLINE static inline __attribute__((always_inline))
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
  #define INLINE static inline
  #define REGISTER_TYPE(T, bytes) T
  #define prefetch(address) ((void) (address))
  #define REGISTER(T) ((int) sizeof(T))
#endif

template <class T, int BYTES, bool FITS = (BYTES <= REGISTER(T))>
struct Lanes {
    static constexpr bool fits = false;
    Lanes<T, BYTES / 2> lo, hi;
};

template <class T, int BYTES>
struct Lanes<T, BYTES, true> {
    static constexpr bool fits = true;
    typedef REGISTER_TYPE(T, BYTES) type;
    type v;
};

template <class T>
using Vec = Lanes<T, 128>;

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

#define LANES_OF_VECTOR template <class T, int B> INLINE Lanes<T, B>

// What is done to a vector is done to its halves, and in the end to registers.
#define BINARY(name, on_register)                                                                   \
    LANES_OF_VECTOR name(Lanes<T, B> a, Lanes<T, B> b) {                                            \
        if constexpr (Lanes<T, B>::fits)                                                            \
            return {on_register};                                                                   \
        else                                                                                        \
            return {name(a.lo, b.lo), name(a.hi, b.hi)};                                            \
    }

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

// x where the comparison holds, else y; false for NaN.
#define WHERE(name, comparison)                                                                     \
    LANES_OF_VECTOR name(Lanes<T, B> a, Lanes<T, B> b, Lanes<T, B> x, Lanes<T, B> y) {              \
        if constexpr (Lanes<T, B>::fits)                                                            \
            return {a.v comparison b.v ? x.v : y.v};                                                \
        else                                                                                        \
            return {name(a.lo, b.lo, x.lo, y.lo), name(a.hi, b.hi, x.hi, y.hi)};                    \
    }

WHERE(where_eq, ==)
WHERE(where_gt, >)
WHERE(where_ge, >=)

template <class V, class T>
INLINE V splat_(T x) {
    if constexpr (V::fits) {
        V r = {};
        r.v = x - r.v;
        return r;
    } else
        return {splat_<decltype(V::lo)>(x), splat_<decltype(V::hi)>(x)};
}

template <class T>
INLINE Vec<T> splat(T x) {
    return splat_<Vec<T>>(x);
}

// The low bits of a number's representation as its sign and exponent, the rest zero.
template <class T> struct Bits;
template <> struct Bits<float> { typedef uint32_t type; static constexpr int mantissa = 23; };
template <> struct Bits<double> { typedef uint64_t type; static constexpr int mantissa = 52; };

LANES_OF_VECTOR exponent_bits(Lanes<T, B> z) {
    if constexpr (Lanes<T, B>::fits) {
        REGISTER_TYPE(typename Bits<T>::type, B) bits;
        memcpy(&bits, &z.v, B);
        bits <<= Bits<T>::mantissa;
        memcpy(&z.v, &bits, B);
        return z;
    } else
        return {exponent_bits(z.lo), exponent_bits(z.hi)};
}

LANES_OF_VECTOR absolute(Lanes<T, B> x) {
    if constexpr (Lanes<T, B>::fits) {
        REGISTER_TYPE(typename Bits<T>::type, B) bits;
        memcpy(&bits, &x.v, B);
        bits &= ~(typename Bits<T>::type) 0 >> 1;
        memcpy(&x.v, &bits, B);
        return x;
    } else
        return {absolute(x.lo), absolute(x.hi)};
}

template <class T, int B>
INLINE void load_(const char *v, Lanes<T, B> *to) {
    if constexpr (Lanes<T, B>::fits)
        memcpy(&to->v, v, B);
    else {
        load_(v, &to->lo);
        load_(v + B / 2, &to->hi);
    }
}

template <class T>
INLINE Vec<T> load_all(const T *v) {
    Vec<T> x;
    load_((const char *) v, &x);
    return x;
}

template <class T, int B>
INLINE void store_(char *v, const Lanes<T, B> &x) {
    if constexpr (Lanes<T, B>::fits)
        memcpy(v, &x.v, B);
    else {
        store_(v, x.lo);
        store_(v + B / 2, x.hi);
    }
}

template <class T>
INLINE void store_all(T *v, Vec<T> x) {
    store_((char *) v, x);
}

// Past the caches: that reads nothing, where a plain store reads the line first. v is aligned to a line.
template <class T, int B>
INLINE void stream_(char *v, const Lanes<T, B> &x) {
    if constexpr (!Lanes<T, B>::fits) {
        stream_(v, x.lo);
        stream_(v + B / 2, x.hi);
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

template <class T>
INLINE void stream_all(T *v, Vec<T> x) {
    stream_((char *) v, x);
}

// What was streamed is in memory before whatever is written next.
INLINE void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Numbers `step` bytes apart.
template <class T, int B>
INLINE Lanes<T, B> load_strided_(const char *v, int64_t step, Lanes<T, B>) {
    constexpr int lanes = B / (int) sizeof(T);
    if constexpr (!Lanes<T, B>::fits)
        return {
            load_strided_(v, step, Lanes<T, B / 2>()),
            load_strided_(v + lanes / 2 * step, step, Lanes<T, B / 2>()),
        };
#if defined(__AVX512F__)
    else if constexpr (sizeof(T) == 4) {
        __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return {_mm512_i32gather_ps(_mm512_mullo_epi32(at, _mm512_set1_epi32((int) step)), v, 1)};
    } else {
        __m512i at = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
        return {_mm512_i64gather_pd(_mm512_mullo_epi64(at, _mm512_set1_epi64(step)), v, 1)};
    }
#else
    else {
        Lanes<T, B> x;
        for (int l = 0; l < lanes; l++) {
            T lane;
            memcpy(&lane, v + l * step, sizeof lane);
            x.v[l] = lane;
        }
        return x;
    }
#endif
}

template <class T>
INLINE Vec<T> load_strided(const T *v, int64_t step) {
    return load_strided_((const char *) v, step, Vec<T>());
}

template <class T, int B>
INLINE void store_strided_(char *v, int64_t step, Lanes<T, B> x) {
    constexpr int lanes = B / (int) sizeof(T);
    if constexpr (!Lanes<T, B>::fits) {
        store_strided_(v, step, x.lo);
        store_strided_(v + lanes / 2 * step, step, x.hi);
    }
#if defined(__AVX512F__)
    else if constexpr (sizeof(T) == 4) {
        __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        _mm512_i32scatter_ps(v, _mm512_mullo_epi32(at, _mm512_set1_epi32((int) step)), x.v, 1);
    } else {
        __m512i at = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
        _mm512_i64scatter_pd(v, _mm512_mullo_epi64(at, _mm512_set1_epi64(step)), x.v, 1);
    }
#else
    else
        for (int l = 0; l < lanes; l++) {
            T lane = x.v[l];
            memcpy(v + l * step, &lane, sizeof lane);
        }
#endif
}

template <class T>
INLINE void store_strided(T *v, int64_t step, Vec<T> x) {
    store_strided_((char *) v, step, x);
}

// The first `count` numbers of v, then those of `pad`.
template <class T, int B>
INLINE Lanes<T, B> load_some_(const T *v, int64_t count, Lanes<T, B> pad) {
    constexpr int lanes = B / (int) sizeof(T);
    if constexpr (!Lanes<T, B>::fits)
        return {load_some_(v, count, pad.lo), load_some_(v + lanes / 2, count - lanes / 2, pad.hi)};
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

template <class T>
INLINE Vec<T> load_some(const T *v, int64_t count, Vec<T> pad) {
    return load_some_(v, count, pad);
}

template <class T, int B>
INLINE void store_some_(T *v, int64_t count, Lanes<T, B> x) {
    constexpr int lanes = B / (int) sizeof(T);
    if constexpr (!Lanes<T, B>::fits) {
        store_some_(v, count, x.lo);
        store_some_(v + lanes / 2, count - lanes / 2, x.hi);
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

template <class T>
INLINE void store_some(T *v, int64_t count, Vec<T> x) {
    store_some_(v, count, x);
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
INLINE T first_(Lanes<T, B> x) {
    if constexpr (B > sizeof(T))
        return first_(half<0>(x));
    else {
        T y;
        memcpy(&y, &x.v, B);
        return y;
    }
}

template <class T>
INLINE T first(Vec<T> x) {
    return first_(x);
}

// The same lanes in float64.
template <class T, int B>
INLINE Lanes<double, B * 8 / (int) sizeof(T)> widen_(Lanes<T, B> x) {
    if constexpr (sizeof(T) == 8)
        return x;
    else if constexpr (!Lanes<T, B>::fits)
        return {widen_(x.lo), widen_(x.hi)};
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

// The lower half of the lanes, and the upper one, or zeros where all lanes fit into the lower one.
template <class T>
INLINE Vec<double> widen_lower(Vec<T> x) {
    if constexpr (sizeof(T) == 8)
        return x;
    else
        return widen_(x).lo;
}

template <class T>
INLINE Vec<double> widen_upper(Vec<T> x) {
    if constexpr (sizeof(T) == 8)
        return splat(0.0);
    else
        return widen_(x).hi;
}

// The sum of the lanes, in float64, by halves.
template <int B>
INLINE double total_(Lanes<double, B> x) {
    if constexpr (B > 8)
        return total_(half<0>(x) + half<1>(x));
    else
        return first_(x);
}

template <class T>
INLINE double total(Vec<T> x) {
    return total_(widen_(x));
}

// The largest of the lanes, none of which is NaN.
template <class T, int B>
INLINE T largest_(Lanes<T, B> x) {
    if constexpr (B > sizeof(T))
        return largest_(maximum(half<0>(x), half<1>(x)));
    else
        return first_(x);
}

template <class T>
INLINE double largest(Vec<T> x) {
    return largest_(x);
}

INLINE double double_of(int64_t bits) {
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

// n, in float64, and 2**-n where x = 2**n f with sqrt(1/2) <= f < sqrt(2).
template <int B>
INLINE void exponents_(Lanes<double, B> x, Lanes<double, B> *n, Lanes<double, B> *down) {
    if constexpr (Lanes<double, B>::fits) {
        REGISTER_TYPE(int64_t, B) bits, e;
        memcpy(&bits, &x.v, B);
        e = (bits - 0x3fe6a09e667f3bcd) >> 52;
        bits = (1023 - e) << 52;
        memcpy(&down->v, &bits, B);
        // 1.5 * 2**52 and a whole number leave that number in the low bits
        bits = e + 0x4338000000000000;
        memcpy(&n->v, &bits, B);
        n->v = n->v - 0x1.8p52;
    } else {
        exponents_(x.lo, &n->lo, &down->lo);
        exponents_(x.hi, &n->hi, &down->hi);
    }
}

INLINE void exponents(Vec<double> x, Vec<double> *n, Vec<double> *down) {
    exponents_(x, n, down);
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

// float16 and float32, by the CPU where it can. Returns how many numbers it did.
INLINE int64_t from_halves(const void *source, float *to, int64_t n) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((__m256i *) source + i / 16)));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((__m128i *) source + i / 8)));
#endif
    return i;
}

INLINE int64_t to_halves(const float *source, void *to, int64_t n) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i *) to + i / 16, _mm512_cvtps_ph(_mm512_loadu_ps(source + i), 0));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *) to + i / 8, _mm256_cvtps_ph(_mm256_loadu_ps(source + i), 0));
#endif
    return i;
}
