// Registers from and to memory where numbers may have 16 bits.

#pragma once

#include "call.hpp"

namespace {

// A number as it is stored, and back. A NaN that is stored is the one that the CPU makes.
template <class T, class S>
INLINE T number(S x) {
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
#if defined(__AVX512F__)
typedef __m256i Halves;
typedef Lanes<float, 64> Widened;
INLINE Widened widened(Halves x, Float16) { return {_mm512_cvtph_ps(x)}; }
INLINE Widened widened(Halves x, BFloat16) { return {(__m512) _mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)}; }
INLINE Halves narrowed(Widened x, Float16) { return _mm512_cvtps_ph(x.v, 0); }
INLINE Halves narrowed(Widened x, BFloat16) {
    return _mm512_cvtepi32_epi16((__m512i) bfloat_of(bits_as<Widened::bits>(x)));
}
#elif defined(__AVX2__) && defined(__F16C__)
typedef __m128i Halves;
typedef Lanes<float, 32> Widened;
INLINE Widened widened(Halves x, Float16) { return {_mm256_cvtph_ps(x)}; }
INLINE Widened widened(Halves x, BFloat16) { return {(__m256) _mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)}; }
INLINE Halves narrowed(Widened x, Float16) { return _mm256_cvtps_ph(x.v, 0); }
INLINE Halves narrowed(Widened x, BFloat16) {
    const auto bits = (__m256i) bfloat_of(bits_as<Widened::bits>(x));
    return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
#else
struct Halves;
struct Widened;
#endif

template <class V, class S>
INLINE V load_stored(const S *v) {
    if constexpr (std::is_same_v<S, typename V::number>)
        return load_vector<V>(v);
    else if constexpr (!V::fits)
        return {load_stored<typename V::Half>(v), load_stored<typename V::Half>(v + V::count / 2)};
    else if constexpr (std::is_same_v<V, Widened>) {
        Halves x;
        memcpy(&x, v, sizeof x);
        return widened(x, S());
    } else {
        typename V::number numbers[V::count];
        for (int l = 0; l < V::count; l++)
            numbers[l] = number<typename V::number>(v[l]);
        return load_vector<V>(numbers);
    }
}

template <class S, class V>
INLINE void store_stored(S *v, V x) {
    if constexpr (std::is_same_v<S, typename V::number>)
        store_all(v, x);
#if defined(__AVX2__) && !defined(__AVX512F__)
    else if constexpr (std::is_same_v<V, Lanes<float, 64>> && std::is_same_v<S, BFloat16>) {
        const auto lo = bfloat_of(bits_as<Widened::bits>(x.lo)), hi = bfloat_of(bits_as<Widened::bits>(x.hi));
        const __m256i turns = _mm256_packus_epi32((__m256i) lo, (__m256i) hi);  // of pieces of both
        _mm256_storeu_si256((__m256i *) v, _mm256_permute4x64_epi64(turns, 0xD8));
    }
#endif
    else if constexpr (!V::fits) {
        store_stored(v, x.lo);
        store_stored(v + V::count / 2, x.hi);
    } else if constexpr (std::is_same_v<V, Widened>) {
        const Halves half = narrowed(x, S());
        memcpy(v, &half, sizeof half);
    } else {
        typename V::number numbers[V::count];
        store_all(numbers, x);
        for (int l = 0; l < V::count; l++)
            v[l] = stored<S>(numbers[l]);
    }
}

// A register of the maxima of the numbers in each of its lanes; of at least as many as a vector has. NaN are
// passed over.
template <class V, class S>
INLINE V largest_of(const S *v, Index n) {
    constexpr Index block = 128 / (Index) sizeof(typename V::number);
    auto for_blocks = [=](auto f) FORCED {
        for (Index j = 0; j + block < n; j += block)
            f(v + j);
        f(v + n - block);  // also some that have been seen
    };
    if constexpr (is_half<S> && V::count > 1) {
        // As integers, positive numbers are in order, and of negative ones the least is the largest.
        constexpr Index both = 2 * V::count;
        typedef REGISTER_TYPE(int16_t, sizeof(V)) signed_words;
        typedef REGISTER_TYPE(uint16_t, sizeof(V)) words;
        signed_words top;
        words least;
        memcpy(&top, v, sizeof top), memcpy(&least, v, sizeof least);
        for_blocks([&](const S *at) FORCED {
            UNROLLED for (Index lane = 0; lane < block; lane += both) {
                signed_words x;
                memcpy(&x, at + lane, sizeof x);
                top = x > top ? x : top, least = (words) x < least ? (words) x : least;
            }
        });
        top = top < 0 ? (signed_words) least : top;
        S largest[both];
        memcpy(largest, &top, sizeof top);
        return maximum(load_stored<V>(largest), load_stored<V>(largest + V::count));
    } else {
        V top = load_stored<V>(v);
        for_blocks([&](const S *at) FORCED {
            UNROLLED for (Index lane = 0; lane < block; lane += V::count)
                top = maximum(load_stored<V>(at + lane), top);
        });
        return top;
    }
}

}  // namespace
