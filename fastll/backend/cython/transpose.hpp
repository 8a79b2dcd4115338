// Short rows, one after the other in memory, as a tile: class by class, `GROUP` rows apart. And back.
//
// Registers are transposed in pieces of 16 bytes: register i takes a piece of every fourth row from i on (of
// every second one in float64), and two rounds of unpacking leave a class in each.

#pragma once

#include "vector.hpp"

namespace {

template <class T>
constexpr Index piece = sizeof(T) < 16 ? 16 / (Index) sizeof(T) : 1;  // numbers in 16 bytes

#if defined(__GNUC__)

// A register of the pieces that are `step` bytes apart.
template <class V>
INLINE V load_pieces(const char *at, Index step) {
    V x;
    if constexpr (sizeof x == 16)
        memcpy(&x.v, at, 16);
  #if defined(__AVX__)
    else if constexpr (sizeof x == 32) {
        auto part = [=](Index i) FORCED { return _mm_loadu_pd((const double *) (at + i * step)); };
        x.v = (typename V::type) _mm256_insertf128_pd(_mm256_castpd128_pd256(part(0)), part(1), 1);
    }
  #endif
  #if defined(__AVX512F__)
    else {
        typedef Lanes<typename V::number, 32> Half;
        auto part = [=](Index i) FORCED { return (__m256d) load_pieces<Half>(at + i * step, step).v; };
        x.v = (typename V::type) _mm512_insertf64x4(_mm512_castpd256_pd512(part(0)), part(2), 1);
    }
  #endif
    return x;
}

// The pieces of some registers in the order of memory, `step` bytes apart.
template <class V, Index N>
INLINE void store_pieces(char *at, Index step, const V (&r)[N]) {
    if constexpr (sizeof(V) > 16) {
        decltype(half<0>(r[0])) lower[N], upper[N];
        UNROLLED for (Index k = 0; k < N; k++)
            lower[k] = half<0>(r[k]), upper[k] = half<1>(r[k]);
        store_pieces(at, step, lower);
        store_pieces(at + (Index) sizeof(V) / 32 * N * step, step, upper);
    } else
        UNROLLED for (Index k = 0; k < N; k++)
            memcpy(at + k * step, &r[k].v, 16);
}

// Of each piece of a and b the lower half (UPPER = 0) or the upper one, in turns of SIZE numbers.
template <int UPPER, int SIZE, class V, size_t... L>
INLINE V unpacked(V a, V b, std::index_sequence<L...>) {
    constexpr int n = 16 / (int) sizeof(typename V::number);
    return {__builtin_shufflevector(
        a.v, b.v,
        (L % n / SIZE % 2 * V::count + L / n * n + UPPER * n / 2 + L % n / SIZE / 2 * SIZE + L % SIZE)...
    )};
}

template <int UPPER, int SIZE, class V>
INLINE V unpacked(V a, V b) {
    return unpacked<UPPER, SIZE>(a, b, std::make_index_sequence<V::count>());
}

// Transposes the pieces, which is its own reverse.
template <class V>
INLINE void transpose(V (&r)[16 / sizeof(typename V::number)]) {
    if constexpr (sizeof(typename V::number) == 8) {
        V a = r[0];
        r[0] = unpacked<0, 1>(a, r[1]), r[1] = unpacked<1, 1>(a, r[1]);
    } else {
        V a = unpacked<0, 1>(r[0], r[1]), b = unpacked<1, 1>(r[0], r[1]);
        V c = unpacked<0, 1>(r[2], r[3]), d = unpacked<1, 1>(r[2], r[3]);
        r[0] = unpacked<0, 2>(a, c), r[1] = unpacked<1, 2>(a, c);
        r[2] = unpacked<0, 2>(b, d), r[3] = unpacked<1, 2>(b, d);
    }
}

// A piece of as many rows as a register has lanes, `pitch` numbers apart, to a register per class.
template <class V, class T>
INLINE void turn_piece(const T *rows, Index pitch, V *classes) {
    constexpr Index n = piece<T>;
    V r[n];
    UNROLLED for (Index k = 0; k < n; k++)
        r[k] = load_pieces<V>((const char *) (rows + k * pitch), n * pitch * (Index) sizeof(T));
    transpose(r);
    UNROLLED for (Index k = 0; k < n; k++)
        classes[k] = r[k];
}

// `count` rows or a few more into a tile. What is behind the last row is read up to a piece, what is behind
// the last class written.
template <class T>
void turn(const T *rows, Index count, Index classes, T *tile) {
    typedef Register<T> V;
    for (Index i = 0; i < count; i += V::count, rows += V::count * classes)
        for (Index j = 0; j < classes; j += piece<T>) {
            V r[piece<T>];
            turn_piece(rows + j, classes, r);
            UNROLLED for (Index k = 0; k < piece<T>; k++)
                store_all(tile + (j + k) * GROUP + i, r[k]);
        }
}

// A tile into `count` rows or a few more, the last pieces first, which reach into the next row. What is behind
// the last row is written, and what is behind the last class read, up to a piece.
template <class T>
void turn_back(const T *tile, Index count, Index classes, T *rows) {
    typedef Register<T> V;
    constexpr Index n = piece<T>;
    for (Index i = 0; i < count; i += V::count, rows += V::count * classes)
        for (Index j = (classes - 1) / n * n; j >= 0; j -= n) {
            V r[n];
            UNROLLED for (Index k = 0; k < n; k++)
                memcpy(&r[k].v, tile + (j + k) * GROUP + i, sizeof r[k].v);
            transpose(r);
            store_pieces((char *) (rows + j), (Index) sizeof(T) * classes, r);
        }
}

#else

template <class T>
void turn(const T *rows, Index count, Index classes, T *tile) {
    for (Index j = 0; j < classes; j++)
        for (Index i = 0; i < count; i++)
            tile[j * GROUP + i] = rows[i * classes + j];
}

template <class T>
void turn_back(const T *tile, Index count, Index classes, T *rows) {
    for (Index j = 0; j < classes; j++)
        for (Index i = 0; i < count; i++)
            rows[i * classes + j] = tile[j * GROUP + i];
}

#endif

}  // namespace
