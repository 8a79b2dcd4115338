// Vectors of a fixed number of lanes: VECTOR_BYTES, i.e. 32 float32 or 16 float64, whatever the CPU has.
// So the order of every sum is the same on every machine. A vector is a pair of halves, down to what one
// register holds, and all of it stays in registers. All arithmetic is IEEE: the flags in setup.py let the
// compiler neither reorder nor contract it.
//
// This is the vocabulary that `fastll.formulas` is written in, and what walks through memory by vectors.
// Everything has internal linkage, so that the builds for several instruction sets share nothing.

#pragma once

#include <algorithm>
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
  #define APART __attribute__((noinline))  // large and seldom
  #define REGISTER_TYPE(T, bytes) T __attribute__((vector_size(bytes)))
  #define UNROLLED _Pragma("GCC unroll 4")  // a loop over registers
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
  #define APART
  #define REGISTER_TYPE(T, bytes) T
  #define UNROLLED
  #define prefetch(address) ((void) (address))
  #define REGISTER(T) ((int) sizeof(T))
#endif

// What takes or returns vectors is inline, also members and lambdas (FORCED), as they must stay in registers.
#define INLINE static inline FORCED

namespace {

typedef std::ptrdiff_t Index;

template <class To, class From>
INLINE To bits_as(From value) {
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}

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

// Added to a number, this rounds it to a whole one, which is then in the low bits.
template <class T>
constexpr T whole_at = (T) (1.5 * ((int64_t) 1 << Bits<T>::mantissa));

template <class T, int BYTES, bool FITS = (BYTES <= REGISTER(T))>
struct Lanes {
    static constexpr bool fits = false;
    static constexpr int count = BYTES / (int) sizeof(T);
    typedef T number;
    typedef Lanes<T, BYTES / 2> Half;
    Half lo, hi;
};

template <class T, int BYTES>
struct Lanes<T, BYTES, true> {
    static constexpr bool fits = true;
    static constexpr int count = BYTES / (int) sizeof(T);
    typedef T number;
    typedef REGISTER_TYPE(T, BYTES) type;
    typedef REGISTER_TYPE(typename Bits<T>::type, BYTES) bits;
    typedef REGISTER_TYPE(typename Bits<T>::signed_type, BYTES) signed_bits;
    type v;
};

template <class T>
using Vec = Lanes<T, 128>;

template <class T>
constexpr int lanes = Vec<T>::count;

template <class T>
using Register = Lanes<T, REGISTER(T)>;

// Numbers and vectors mix: a number stands for a vector of it.
template <class... A> struct Joined_ {};
template <class T, int B, class... A> struct Joined_<Lanes<T, B>, A...> { typedef Lanes<T, B> type; };
template <class T, class... A> struct Joined_<T, A...> : Joined_<A...> {};

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

// Operations on one register: in general, then by the instructions of x86.
namespace on_register {

template <class V>
INLINE V maximum(V a, V b) {
    return {a.v > b.v ? a.v : b.v};
}

template <class V>
INLINE bool all_greater(V a, V b) {
    bool all = true;
    for (int l = 0; l < V::count; l++)
        all &= ((const typename V::number *) &a.v)[l] > ((const typename V::number *) &b.v)[l];
    return all;
}

// Counters of lanes where a == b, raised.
template <class V>
INLINE typename V::signed_bits count_equal(typename V::signed_bits counts, V a, V b) {
    if constexpr (V::count > 1)
        return counts - (a.v == b.v);  // which is -1 where it holds
    else
        return counts + (a.v == b.v);
}

template <class V>
INLINE V fma(V a, V b, V c) {
#if FUSED
    for (int l = 0; l < V::count; l++)
        a.v[l] = std::fma(a.v[l], b.v[l], c.v[l]);
    return a;
#else
    return {a.v * b.v + c.v};
#endif
}

template <class T, class V>
INLINE void stream(T *v, V x) {
    memcpy(v, &x.v, sizeof x.v);
}

template <class T, class V>
INLINE V load_some(const T *v, int few, V x) {
    for (int l = 0; l < V::count; l++)
        ((T *) &x.v)[l] = l < few ? v[l] : ((T *) &x.v)[l];
    return x;
}

template <class T, class V>
INLINE void store_some(T *v, int few, V x) {
    for (int l = 0; l < few; l++)
        v[l] = ((T *) &x.v)[l];
}

#if defined(__GNUC__)
template <int B>
INLINE Lanes<double, 2 * B> widen(Lanes<float, B> x) {
    return {__builtin_convertvector(x.v, typename Lanes<double, 2 * B>::type)};
}

template <int B>
INLINE Lanes<float, B / 2> narrow(Lanes<double, B> x) {
    return {__builtin_convertvector(x.v, typename Lanes<float, B / 2>::type)};
}
#endif

#if defined(__SSE2__)
  #if FUSED
    #define FMA(V, instruction) INLINE V fma(V a, V b, V c) { return {instruction(a.v, b.v, c.v)}; }
  #else
    #define FMA(V, instruction)
  #endif

  // x86's maximum is the one above to the letter, which GCC does not always see.
  #define X86(V, T, bytes, prefix, suffix)                                                          \
      typedef Lanes<T, bytes> V;                                                                    \
      INLINE V maximum(V a, V b) { return {prefix##_max_##suffix(a.v, b.v)}; }                      \
      INLINE void stream(T *v, V x) { prefix##_stream_##suffix(v, x.v); }                           \
      FMA(V, prefix##_fmadd_##suffix)

X86(Float128, float, 16, _mm, ps)
X86(Double128, double, 16, _mm, pd)
#endif
#if defined(__AVX__)
X86(Float256, float, 32, _mm256, ps)
X86(Double256, double, 32, _mm256, pd)
INLINE bool all_greater(Float256 a, Float256 b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) == 0xff;
}
INLINE bool all_greater(Double256 a, Double256 b) {
    return _mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)) == 0xf;
}
INLINE Double256 widen(Float128 x) { return {_mm256_cvtps_pd(x.v)}; }
INLINE Float128 narrow(Double256 x) { return {_mm256_cvtpd_ps(x.v)}; }
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
// A window on these begins with as many ones as there are numbers.
const int32_t ones_then_zeros[] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

INLINE Float256 load_some(const float *v, int few, Float256 x) {
    const __m256i mask = _mm256_loadu_si256((const __m256i *) (ones_then_zeros + 8 - few));
    return {_mm256_blendv_ps(x.v, _mm256_maskload_ps(v, mask), (__m256) mask)};
}

INLINE Double256 load_some(const double *v, int few, Double256 x) {
    const __m256i mask = _mm256_loadu_si256((const __m256i *) (ones_then_zeros + 8 - 2 * few));
    return {_mm256_blendv_pd(x.v, _mm256_maskload_pd(v, mask), (__m256d) mask)};
}

// By halves: a masked store takes AMD's CPUs dozens of cycles.
INLINE void store_some(float *v, int few, Float256 x) {
    __m128 part = _mm256_castps256_ps128(x.v);
    if (few & 4) {
        _mm_storeu_ps(v, part);
        part = _mm256_extractf128_ps(x.v, 1);
    }
    if (few & 2) {
        _mm_storel_pi((__m64 *) (v + (few & 4)), part);
        part = _mm_movehl_ps(part, part);
    }
    if (few & 1)
        _mm_store_ss(v + (few & 6), part);
    if (few & 8)
        _mm256_storeu_ps(v, x.v);
}

INLINE void store_some(double *v, int few, Double256 x) {
    __m128d part = _mm256_castpd256_pd128(x.v);
    if (few & 2) {
        _mm_storeu_pd(v, part);
        part = _mm256_extractf128_pd(x.v, 1);
    }
    if (few & 1)
        _mm_store_sd(v + (few & 2), part);
    if (few & 4)
        _mm256_storeu_pd(v, x.v);
}
#endif
#if defined(__AVX512F__)
X86(Float512, float, 64, _mm512, ps)
X86(Double512, double, 64, _mm512, pd)
INLINE bool all_greater(Float512 a, Float512 b) {
    return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) == 0xffff;
}
INLINE bool all_greater(Double512 a, Double512 b) {
    return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ) == 0xff;
}
INLINE Double512 widen(Float256 x) { return {_mm512_cvtps_pd(x.v)}; }
INLINE Float256 narrow(Double512 x) { return {_mm512_cvtpd_ps(x.v)}; }

  #define AVX512(V, T, suffix)                                                                      \
      INLINE V load_some(const T *v, int few, V x) {                                                \
          return {_mm512_mask_loadu_##suffix(x.v, (1u << few) - 1, v)};                             \
      }                                                                                             \
      INLINE void store_some(T *v, int few, V x) {                                                  \
          _mm512_mask_storeu_##suffix(v, (1u << few) - 1, x.v);                                     \
      }

AVX512(Float512, float, ps)
AVX512(Double512, double, pd)
#endif

}  // namespace on_register

// What is done to a vector is done to its halves, and in the end to registers.
template <class F, class V, class... A>
INLINE V lifted(F f, V x, A... others) {
    if constexpr (V::fits)
        return f(x, others...);
    else
        return {lifted(f, x.lo, others.lo...), lifted(f, x.hi, others.hi...)};
}

// f(register, its first lane) for those of a vector, one after the other.
template <class V, class F>
INLINE void for_registers(V &x, F f, int lane = 0) {
    if constexpr (V::fits)
        f(x, lane);
    else {
        for_registers(x.lo, f, lane);
        for_registers(x.hi, f, lane + V::count / 2);
    }
}

#define BINARY(name, result)                                                                        \
    template <class A, class B>                                                                     \
    INLINE auto name(A x, B y) -> Joined<A, B> {                                                    \
        typedef Joined<A, B> V;                                                                     \
        auto f = [](auto a, auto b) FORCED -> decltype(a) { return result; };                       \
        return lifted(f, spread<V>(x), spread<V>(y));                                               \
    }

BINARY(operator+, {a.v + b.v})
BINARY(operator-, {a.v - b.v})
BINARY(operator*, {a.v * b.v})
BINARY(operator/, {a.v / b.v})
BINARY(maximum, on_register::maximum(a, b))  // the larger one; b where either is NaN

template <class A, class B, class C>
INLINE auto fma(A x, B y, C z) -> Joined<A, B, C> {
    typedef Joined<A, B, C> V;
    auto f = [](auto a, auto b, auto c) FORCED { return on_register::fma(a, b, c); };
    return lifted(f, spread<V>(x), spread<V>(y), spread<V>(z));
}

// x where the comparison holds, else y; false for NaN.
#define WHERE(name, comparison)                                                                     \
    template <class A, class B, class X, class Y>                                                   \
    INLINE auto name(A a, B b, X x, Y y) -> Joined<A, B, X, Y> {                                    \
        typedef Joined<A, B, X, Y> V;                                                               \
        auto f = [](auto a, auto b, auto x, auto y) FORCED -> decltype(x) {                         \
            return {a.v comparison b.v ? x.v : y.v};                                                \
        };                                                                                          \
        return lifted(f, spread<V>(a), spread<V>(b), spread<V>(x), spread<V>(y));                   \
    }

WHERE(where_eq, ==)
WHERE(where_gt, >)
WHERE(where_ge, >=)

// Whether a > b in all lanes.
template <class A, class B>
INLINE bool all_greater(A x, B y) {
    typedef Joined<A, B> V;
    const V a = spread<V>(x), b = spread<V>(y);
    if constexpr (V::fits)
        return on_register::all_greater(a, b);
    else
        return all_greater(a.lo, b.lo) & all_greater(a.hi, b.hi);
}

#define BITWISE(name, bits_type, change)                                                            \
    template <class T, int B>                                                                       \
    INLINE Lanes<T, B> name(Lanes<T, B> x) {                                                        \
        auto f = [](auto part) FORCED {                                                             \
            auto bits = bits_as<typename decltype(part)::bits_type>(part.v);                        \
            change;                                                                                 \
            return bits_as<decltype(part)>(bits);                                                   \
        };                                                                                          \
        return lifted(f, x);                                                                        \
    }

// The low bits of a number's representation as its sign and exponent, the rest zero.
BITWISE(exponent_bits, bits, bits <<= Bits<T>::mantissa)
BITWISE(absolute, bits, bits &= ~(typename Bits<T>::type) 0 >> 1)
// With x = 2**n f, sqrt(1/2) <= f < sqrt(2): 1.5 * 2**mantissa + n, and 2**-n.
BITWISE(whole, signed_bits, bits = ((bits - Bits<T>::SPLIT) >> Bits<T>::mantissa) + Bits<T>::WHOLE)
BITWISE(
    downscale,
    signed_bits,
    bits = (Bits<T>::bias - ((bits - Bits<T>::SPLIT) >> Bits<T>::mantissa)) << Bits<T>::mantissa
)

template <class T, int B>
INLINE Lanes<T, B> exponent(Lanes<T, B> x) {
    return whole(x) - whole_at<T>;
}

template <class T> struct Constants;  // see formulas.hpp

template <class T, int B>
INLINE Constants<T> constants(Lanes<T, B>) {
    return {};
}

// What formulas need of a single number.
template <class T, std::enable_if_t<std::is_arithmetic_v<T>, int> = 0>
INLINE Constants<T> constants(T) {
    return {};
}

INLINE double where_eq(double a, double b, double x, double y) {
    return a == b ? x : y;
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
template <class T, int B>
INLINE Lanes<T, B> reduced(Lanes<T, B> x, Lanes<T, B> n) {
    if constexpr (sizeof(T) == 4)
        for (float part : {0x1.63p-1f, -0x1.bdp-13f, -0x1.05c610ca86c39p-29f})
            x = x - n * (T) part;
    else
        for (double part : {0x1.62e42feep-1, 0x1.a39ef35793c76p-33})
            x = x - n * (T) part;
    return x;
}
#endif

#if defined(__GNUC__)
  // The element where it is not equal to m, as one operation on its bits.
  #define OWN_below_maximum
template <class V, class M>
INLINE V below_maximum(V x, M m, V e) {
    auto f = [](auto x, auto m, auto e) FORCED {
        typedef typename decltype(e)::signed_bits bits;
        return bits_as<decltype(e)>(bits_as<bits>(e) & ~(bits) (x.v == m.v));
    };
    return lifted(f, x, spread<V>(m), e);
}
#endif

// What a formula returns: several values.
template <class A, class B> struct Two { A a; B b; };
template <class A, class B, class C> struct Three { A a; B b; C c; };

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

template <class V>
INLINE V load_vector(const typename V::number *v) {
    V x;
    for_registers(x, [=](auto &to, int lane) FORCED { memcpy(&to.v, v + lane, sizeof to.v); });
    return x;
}

template <class T>
INLINE Vec<T> load_all(const T *v) {
    return load_vector<Vec<T>>(v);
}

template <class T, int B>
INLINE void store_all(T *v, Lanes<T, B> x) {
    for_registers(x, [=](auto from, int lane) FORCED { memcpy(v + lane, &from.v, sizeof from.v); });
}

// What was streamed is in memory before whatever is written next.
INLINE void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// How many of the lanes of a register are among the first `count` of its vector.
template <class V>
INLINE int few_of(V, Index count) {
    return count < 0 ? 0 : count > V::count ? V::count : (int) count;
}

// The first `count` numbers of v, then those of `x`.
template <class T>
INLINE Vec<T> load_some(const T *v, Index count, Vec<T> x) {
    for_registers(x, [=](auto &to, int lane) FORCED {
        to = on_register::load_some(v + lane, few_of(to, count - lane), to);
    });
    return x;
}

template <class T>
INLINE void store_some(T *v, Index count, Vec<T> x) {
    for_registers(x, [=](auto from, int lane) FORCED {
        const int few = few_of(from, count - lane);
        if (few > 0)  // a store of nothing would fetch its line all the same
            on_register::store_some(v + lane, few, from);
    });
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

// In a walk through memory.
INLINE void prefetch_ahead(const void *address) {
    prefetch_vector((const char *) address + AHEAD);
}

template <class T>
INLINE Vec<T> load_ahead(const T *v, Index count = lanes<T>, T pad = T()) {
    prefetch_ahead(v);
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

// The same non-temporally: that reads nothing, where a plain store reads the line first. v is aligned to a
// line; the line that is written in part is stored.
template <class T>
INLINE void stream(T *v, Index count, Vec<T> x) {
    for_registers(x, [=](auto from, int lane) FORCED {
        const int few = few_of(from, count - lane);
        if (few == from.count)
            on_register::stream(v + lane, from);
        else if (few > 0)
            on_register::store_some(v + lane, few, from);
    });
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
template <int UPPER, class T, int B>
INLINE Lanes<T, B / 2> half(Lanes<T, B> x) {
    if constexpr (!Lanes<T, B>::fits)
        return UPPER ? x.hi : x.lo;
#if defined(__AVX512F__)
    else if constexpr (B == 64)
        return {(typename Lanes<T, B / 2>::type) _mm512_extractf64x4_pd((__m512d) x.v, UPPER)};
#endif
#if defined(__AVX__)
    else if constexpr (B == 32)
        return {(typename Lanes<T, B / 2>::type) _mm256_extractf128_pd((__m256d) x.v, UPPER)};
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
    else
        return bits_as<T>(x.v);
}

// The same lanes in float64.
template <class T, int B>
INLINE Lanes<double, B * 8 / (int) sizeof(T)> widen(Lanes<T, B> x) {
    if constexpr (sizeof(T) == 8)
        return x;
    else if constexpr (!Lanes<T, B>::fits)
        return {widen(x.lo), widen(x.hi)};
#if defined(__GNUC__)
    else
        return {on_register::widen(half<0>(x)), on_register::widen(half<1>(x))};
#else
    else
        return {x.v};
#endif
}

// The two halves of the lanes as one vector.
template <class V>
INLINE Lanes<typename V::number, 2 * (int) sizeof(V)> joined(V lo, V hi) {
    typedef Lanes<typename V::number, 2 * (int) sizeof(V)> Whole;
    if constexpr (!Whole::fits)
        return {lo, hi};
#if defined(__AVX512F__)
    else if constexpr (sizeof(Whole) == 64)
        return {(typename Whole::type
        ) _mm512_insertf64x4(_mm512_castpd256_pd512((__m256d) lo.v), (__m256d) hi.v, 1)};
#endif
#if defined(__AVX__)
    else if constexpr (sizeof(Whole) == 32)
        return {(typename Whole::type) _mm256_set_m128d((__m128d) hi.v, (__m128d) lo.v)};
#endif
    else {
        Whole x;
        memcpy(&x.v, &lo.v, sizeof lo.v);
        memcpy((char *) &x.v + sizeof lo.v, &hi.v, sizeof hi.v);
        return x;
    }
}

// The same lanes, of float64, in T.
template <class T, int B>
INLINE Lanes<T, B * (int) sizeof(T) / 8> narrow(Lanes<double, B> x) {
    if constexpr (sizeof(T) == 8)
        return x;
    else if constexpr (!Lanes<double, B>::fits)
        return joined(narrow<T>(x.lo), narrow<T>(x.hi));
#if defined(__GNUC__)
    else
        return on_register::narrow(x);
#else
    else
        return {(T) x.v};
#endif
}

// The lanes as one number, folded by halves.
template <class V, class F>
INLINE auto fold_lanes(V x, F f) {
    if constexpr (V::count > 1)
        return fold_lanes(f(half<0>(x), half<1>(x)), f);
    else
        return first(x);
}

// The sum of the lanes, in float64.
template <class V>
INLINE double total(V x) {
    return fold_lanes(widen(x), [](auto a, auto b) FORCED { return a + b; });
}

// The same in their own type: of exponentials, which are no infinite sum.
template <class V>
INLINE auto narrow_total(V x) {
    return fold_lanes(x, [](auto a, auto b) FORCED { return a + b; });
}

// The largest of the lanes, none of which is NaN.
template <class V>
INLINE auto largest(V x) {
    return fold_lanes(x, [](auto a, auto b) FORCED { return maximum(a, b); });
}

// Sums over a block in the order of the contract: element j goes to lane j modulo their number. A term is
// a vector, `terms(j, count)` of up to as many elements as it has lanes, or several.

template <class A, class B>
INLINE Two<A, B> operator+(Two<A, B> x, Two<A, B> y) {
    return {x.a + y.a, x.b + y.b};
}

template <class T, class F>
INLINE auto sum_block(Index n, F terms) {
    const Index whole = n / lanes<T> * lanes<T>;
    decltype(terms(n, n)) sums = {};
    for (Index j = 0; j < whole; j += lanes<T>)  // a count that is known when compiled: no lanes are masked
        sums = sums + terms(j, lanes<T>);
    if (whole < n)
        sums = sums + terms(whole, n - whole);
    return sums;
}

// log(1 + r) in float64 of a finite r > -1: with s = 1 + r = 2**n f, n ln 2 + log f.
template <int B>
INLINE Lanes<double, B> log1p_finite(Lanes<double, B> r) {
    Lanes<double, B> s = r + 1.0, back = s - 1.0;
    Lanes<double, B> error = (r - back) + (1.0 - (s - back));  // Knuth's two-sum
    Lanes<double, B> n = exponent(s), down = downscale(s);
    Lanes<double, B> log = series(fma(s, down, -1.0) + error * down);
    return fma(n, LN2_HIGH, fma(n, LN2_LOW, log));
}

// The same for r >= -1; a NaN stays.
template <int B>
INLINE Lanes<double, B> log1p_sum(Lanes<double, B> r) {
    Lanes<double, B> s = r + 1.0, log = where_gt(s, 0.0, log1p_finite(r), -(double) INFINITY);
    return where_gt((double) INFINITY, s, log, s);
}

}  // namespace
