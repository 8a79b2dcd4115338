// Strided numbers of any dtype to contiguous ones of the compute dtype, and back, a block at a time.

#pragma once

#include "vector.hpp"

namespace {

enum Format {
    IN_PLACE = -1,  // needs no conversion: contiguous, aligned and in the compute dtype
    // in the order of `fastll.dtypes.FORMATS`
    FLOAT32, FLOAT64, FLOAT16, BFLOAT16, INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32, UINT64
};

// Whether registers are read from 16-bit numbers and written to them: by halves.hpp. Otherwise these become the
// compute dtype, and it them, a block at a time.
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
  #define HAS_HALVES 1
#else
  #define HAS_HALVES 0
#endif

struct Float16 { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

template <class S>
constexpr bool is_half = sizeof(S) == 2;

template <class S>
constexpr Format format_of() {
    if constexpr (is_half<S>)
        return std::is_same_v<S, Float16> ? FLOAT16 : BFLOAT16;
    else
        return sizeof(S) == 4 ? FLOAT32 : FLOAT64;
}

INLINE Index size_of(Format format) {
    switch (format) {
        case INT8: case UINT8: return 1;
        case FLOAT16: case BFLOAT16: case INT16: case UINT16: return 2;
        case FLOAT32: case INT32: case UINT32: return 4;
        default: return 8;
    }
}

// The number at an address that need not be aligned, and in the other byte order if `swapped`.
template <class S>
INLINE S element(const char *at, bool swapped) {
    S value;
    memcpy(&value, at, sizeof value);
    if (swapped)
        for (size_t i = 0; i < sizeof value; i++)
            ((char *) &value)[i] = at[sizeof value - 1 - i];
    return value;
}

// float16. Subnormal: its 10 bits under the exponent of 2**-14, less 2**-14.
INLINE float from_half(uint32_t bits) {
    uint32_t magnitude = (bits & 0x7FFF) << 13, exponent = magnitude & 0x0F800000;
    float small = bits_as<float>(magnitude | 0x38800000) - bits_as<float>(0x38800000);
    uint32_t special = magnitude | 0x7F800000;
    magnitude = exponent == 0x0F800000 ? special : magnitude + (112 << 23);
    magnitude = exponent == 0 ? bits_as<uint32_t>(small) : magnitude;
    return bits_as<float>((bits & 0x8000) << 16 | magnitude);
}

// float16, to nearest even. Subnormal: the sum with 0.5 rounds at bit 2**-24.
INLINE uint32_t to_half(float value) {
    uint32_t bits = bits_as<uint32_t>(value), magnitude = bits & 0x7FFFFFFF, odd = magnitude >> 13 & 1;
    uint32_t small = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000;
    uint32_t special = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
    uint32_t rest = (magnitude - (112 << 23) + 0x0FFF + odd) >> 13;
    rest = magnitude < 0x38800000 ? small : rest;  // below 2**-14
    rest = magnitude >= 0x47800000 ? special : rest;  // 2**16 and beyond
    return (bits >> 16 & 0x8000) | rest;
}

INLINE float from_bfloat(uint32_t bits) {
    return bits_as<float>(bits << 16);
}

// bfloat16, to nearest even, from the bits of numbers, of which none is NaN, but for the one that the CPU makes.
template <class B>
INLINE B bfloat_of(B bits) {
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

INLINE uint32_t to_bfloat_plainly(float value) {
    return bfloat_of(bits_as<uint32_t>(value));
}

// The same of any number.
INLINE uint32_t to_bfloat(float value) {
    return value != value ? bits_as<uint32_t>(value) >> 16 | 0x40 : to_bfloat_plainly(value);
}

// By the CPU where it can, from float32 that is not contiguous, and from and to float16. These return
// how many numbers they did.
INLINE Index from_strided(const char *source, Index step, float *to, Index n) {
    Index i = 0;
#if defined(__AVX512F__)
    const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i steps = _mm512_mullo_epi32(places, _mm512_set1_epi32((int) step));
    // into a register of zeros, so that none waits for the one before
    for (; i + 16 <= n && step != sizeof(float) && std::abs(step) < 1 << 24; i += 16)
        _mm512_storeu_ps(
            to + i, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xFFFF, steps, source + i * step, 1)
        );
#endif
    return i;
}

INLINE Index from_halves(const char *source, float *to, Index n) {
    Index i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((__m256i *) source + i / 16)));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((__m128i *) source + i / 8)));
#endif
    return i;
}

INLINE Index to_halves(const float *source, char *to, Index n) {
    Index i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i *) to + i / 16, _mm512_cvtps_ph(_mm512_loadu_ps(source + i), 0));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *) to + i / 8, _mm256_cvtps_ph(_mm256_loadu_ps(source + i), 0));
#endif
    return i;
}

// f(i, bytes to number i, swapped) from `done` on. Where numbers are contiguous, and known not to be swapped,
// the loop makes vectors of them.
template <class S, class F>
INLINE void for_numbers(Index done, Index n, Index step, bool swapped, F f) {
    if (step == sizeof(S) && !swapped)
        UNROLLED for (Index i = done; i < n; i++) f(i, i * (Index) sizeof(S), false);
    else
        for (Index i = done; i < n; i++)
            f(i, i * step, swapped);
}

// Numbers stored as S.
template <class S, class T, class F>
INLINE void read_numbers(
    const char *source, Index step, Index n, bool swapped, T *out, F converted, Index done = 0
) {
    for_numbers<S>(done, n, step, swapped, [=](Index i, Index at, bool other_order) FORCED {
        out[i] = converted(element<S>(source + at, other_order));
    });
}

template <class S, class T, class F>
INLINE void write_numbers(const T *numbers, char *out, Index step, Index n, F converted, Index done = 0) {
    for_numbers<S>(done, n, step, false, [=](Index i, Index at, bool) FORCED {
        S number = (S) converted(numbers[i]);
        memcpy(out + at, &number, sizeof number);
    });
}

// Numbers from `done` on, by whatever instructions the compiler finds.
template <class T>
void read_rest(Format format, bool swapped, const char *source, Index step, Index n, T *out, Index done) {
    auto read = [=](auto like) {
        read_numbers<decltype(like)>(source, step, n, swapped, out, [](auto x) { return (T) x; }, done);
    };
    switch (format) {
        case FLOAT16: return read_numbers<uint16_t>(source, step, n, swapped, out, from_half, done);
        case BFLOAT16: return read_numbers<uint16_t>(source, step, n, swapped, out, from_bfloat);
        case FLOAT32: return read(float());
        case FLOAT64: return read(double());
        case INT8: return read(int8_t());
        case INT16: return read(int16_t());
        case INT32: return read(int32_t());
        case INT64: return read(int64_t());
        case UINT8: return read(uint8_t());
        case UINT16: return read(uint16_t());
        case UINT32: return read(uint32_t());
        default: return read(uint64_t());
    }
}

// n numbers, `step` bytes apart, into the compute dtype.
template <class T>
INLINE void read_block(Format format, bool swapped, const char *source, Index step, Index n, T *out) {
    Index done = 0;
    if constexpr (is_half<T>)  // as they are
        return read_numbers<uint16_t>(source, step, n, swapped, out, [](uint16_t bits) { return T{bits}; });
    else {
        if (format == IN_PLACE)
            memcpy(out, source, (done = n) * sizeof(T));
        if constexpr (sizeof(T) == 4) {
            if (format == FLOAT16 && step == 2 && !swapped)
                done = from_halves(source, out, n);
            if (format == FLOAT32 && !swapped)
                done = from_strided(source, step, out, n);
        }
        if (done < n)
            read_rest(format, swapped, source, step, n, out, done);
    }
}

// n numbers of the compute dtype to floating ones, `step` bytes apart; `plain` ones are not NaN but for the
// one that the CPU makes.
template <class T>
void write_block(Format format, const T *numbers, char *out, Index step, Index n, bool plain = false) {
    if constexpr (is_half<T>)  // as they are
        return write_numbers<uint16_t>(numbers, out, step, n, [](T x) { return x.bits; });
    if constexpr (sizeof(T) == 4) {
        if (format == FLOAT16) {
            Index done = step == 2 ? to_halves(numbers, out, n) : 0;
            return write_numbers<uint16_t>(numbers, out, step, n, to_half, done);
        }
        if (format == BFLOAT16)
            return plain ? write_numbers<uint16_t>(numbers, out, step, n, to_bfloat_plainly)
                         : write_numbers<uint16_t>(numbers, out, step, n, to_bfloat);
    }
    if (step == sizeof(T))
        memcpy(out, numbers, n * sizeof(T));
    else
        write_numbers<T>(numbers, out, step, n, [](T x) { return x; });
}

}  // namespace
