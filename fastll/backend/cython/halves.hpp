// Registers from and to memory where numbers may have 16 bits.

#pragma once

#include "call.hpp"

namespace {

// What numbers that are stored as S are computed with.
template <class S>
using Number = std::conditional_t<is_half<S>, float, S>;

// A number as it is stored, and back. A NaN that is stored is the one that the CPU makes.
template <class S>
INLINE Number<S> number(S x) {
    if constexpr (std::is_same_v<S, BFloat16>)
        return from_bfloat(x.bits);
    else if constexpr (std::is_same_v<S, Float16>)
        return from_half(x.bits);
    else
        return x;
}

template <class S, class T>
INLINE S stored(T x) {
    if constexpr (std::is_same_v<S, BFloat16>)
        return {(uint16_t) to_bfloat_plainly(x)};
    else if constexpr (std::is_same_v<S, Float16>)
        return {(uint16_t) to_half(x)};
    else
        return x;
}

// What the CPU does by itself: half a register of numbers of 16 bits to a register of float32, and back.
#define X86_HALVES(type, bytes, prefix)                                                             \
    typedef type Halves;                                                                            \
    typedef Lanes<float, bytes> Widened;                                                            \
    INLINE Widened widened(Halves x, Float16) { return {prefix##_cvtph_ps(x)}; }                    \
    INLINE Widened widened(Halves x, BFloat16) {                                                    \
        return bits_as<Widened>(prefix##_slli_epi32(prefix##_cvtepu16_epi32(x), 16));               \
    }                                                                                               \
    INLINE Halves narrowed(Widened x, Float16) { return prefix##_cvtps_ph(x.v, 0); }

// And of two registers, to `Words`.
#if defined(__AVX512F__)
X86_HALVES(__m256i, 64, _mm512)
INLINE Halves narrowed(Widened x, BFloat16) {
    return _mm512_cvtepi32_epi16((__m512i) bfloat_of(bits_as<Widened::bits>(x)));
}
typedef __m512i Words;
typedef Lanes<float, 128> Pair;
template <class S>
INLINE Words packed(Pair x, S like) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrowed(x.lo, like)), narrowed(x.hi, like), 1);
}
#elif HAS_HALVES
X86_HALVES(__m128i, 32, _mm256)
INLINE Halves narrowed(Widened x, BFloat16) {
    const auto bits = (__m256i) bfloat_of(bits_as<Widened::bits>(x));
    return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
typedef __m256i Words;
typedef Lanes<float, 64> Pair;
INLINE Words packed(Pair x, Float16 like) { return _mm256_set_m128i(narrowed(x.hi, like), narrowed(x.lo, like)); }
INLINE Words packed(Pair x, BFloat16) {
    const auto lo = bfloat_of(bits_as<Widened::bits>(x.lo)), hi = bfloat_of(bits_as<Widened::bits>(x.hi));
    const __m256i turns = _mm256_packus_epi32((__m256i) lo, (__m256i) hi);  // of pieces of both
    return _mm256_permute4x64_epi64(turns, 0xD8);
}
#else  // nothing
struct Halves {};
struct Words {};
struct Pair {};
typedef Register<float> Widened;
#endif

template <class V, class S>
INLINE V load_stored(const S *v) {
    if constexpr (std::is_same_v<S, typename V::number>)
        return load_vector<V>(v);
    else if constexpr (!V::fits)
        return {load_stored<typename V::Half>(v), load_stored<typename V::Half>(v + V::count / 2)};
    else {
        Halves x;
        memcpy(&x, v, sizeof x);
        return widened(x, S());
    }
}

template <class S, class V>
INLINE void store_stored(S *v, V x) {
    if constexpr (std::is_same_v<S, typename V::number>)
        store_all(v, x);
    else if constexpr (std::is_same_v<V, Pair>) {
        const Words words = packed(x, S());
        memcpy(v, &words, sizeof words);
    }
    else if constexpr (!V::fits) {
        store_stored(v, x.lo);
        store_stored(v + V::count / 2, x.hi);
    } else {
        const Halves half = narrowed(x, S());
        memcpy(v, &half, sizeof half);
    }
}

// The first `count` numbers of v, then `pad`; and those of x into memory, also non-temporally. As `load`, `store`
// and `stream`.

template <class T, class S>
INLINE Vec<T> load_from(const S *v, Index count, T pad) {
    if constexpr (std::is_same_v<S, T>)
        return load(v, count, pad);
    else {
        if (count >= lanes<T>)
            return load_stored<Vec<T>>(v);
        S numbers[lanes<T>];
        std::fill(numbers, numbers + lanes<T>, stored<S>(pad));
        std::copy(v, v + (count > 0 ? count : 0), numbers);
        return load_stored<Vec<T>>(numbers);
    }
}

template <class T, class S>
INLINE void store_to(S *v, Index count, Vec<T> x) {
    if constexpr (std::is_same_v<S, T>)
        store(v, count, x);
    else if (count >= lanes<T>)
        store_stored(v, x);
    else {
        S numbers[lanes<T>];
        store_stored(numbers, x);
        std::copy(numbers, numbers + (count > 0 ? count : 0), v);
    }
}

template <class S, class V>
INLINE void stream_stored(S *v, V x) {
    if constexpr (std::is_same_v<V, Pair>)
        on_register::stream((float *) v, bits_as<Register<float>>(packed(x, S())));
    else {
        stream_stored(v, x.lo);
        stream_stored(v + V::count / 2, x.hi);
    }
}

template <class T, class S>
INLINE void stream_to(S *v, Index count, Vec<T> x) {
    if constexpr (std::is_same_v<S, T>)
        stream(v, count, x);
    else if (count < lanes<T>)
        store_to(v, count, x);
    else
        stream_stored(v, x);
}

// The largest of some vectors' numbers, lane by lane; NaN are passed over, or stay.
template <class S, bool WORDS = is_half<S> && (Register<float>::count > 1)>
struct Tops {
    typedef Register<Number<S>> V;
    V top = spread<V>(-(Number<S>) INFINITY);

    // Up to a vector.
    FORCED void raise(const S *v, Index count = lanes<Number<S>>) {
        const auto x = load_from(v, count, -(Number<S>) INFINITY);
        for_registers(x, [&](auto part, int) FORCED { top = maximum(part, top); });
    }

    FORCED V in_lanes() const { return top; }
};

// Of 16 bits, as integers: positive numbers are in order, and of negative ones the largest is the least.
template <class S>
struct Tops<S, true> {
    typedef Register<float> V;
    static constexpr int count = 2 * V::count;
    typedef REGISTER_TYPE(int16_t, sizeof(V)) signed_words;
    typedef REGISTER_TYPE(uint16_t, sizeof(V)) words;
    signed_words top = signed_words() + (int16_t) INT16_MIN;
    words least = words() + stored<S>(-INFINITY).bits;

    FORCED void raise(const S *v, Index few = lanes<float>) {
        S padded[lanes<float>];
        if (few < lanes<float>) {
            store_stored(padded, load_from(v, few, -INFINITY));
            v = padded;
        }
        UNROLLED for (int lane = 0; lane < lanes<float>; lane += count) {
            signed_words x;
            memcpy(&x, v + lane, sizeof x);
            top = x > top ? x : top, least = (words) x < least ? (words) x : least;
        }
    }

    FORCED V in_lanes() const {
        const signed_words tops = top < 0 ? (signed_words) least : top;
        S numbers[count];
        memcpy(numbers, &tops, sizeof tops);
        return maximum(load_stored<V>(numbers), load_stored<V>(numbers + V::count));
    }
};

}  // namespace
