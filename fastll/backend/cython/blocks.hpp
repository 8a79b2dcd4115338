// The steps on a block that rows and tiles share, on contiguous memory.

#pragma once

#include "halves.hpp"
#include "state.hpp"

namespace {

// The maximum; NaN are passed over, or it is.
template <class S>
double max_block(const S *v, Index n) {
    Tops<S> tops;
    for (Index j = 0; j < n; j += lanes<Number<S>>) {
        prefetch_ahead(v + j);
        tops.raise(v + j, n - j);
    }
    return largest(tops.in_lanes());
}

template <class T>
void scale_block(const T *v, Index n, T scale, T *out) {
    for (Index j = 0; j < n; j++)
        out[j] = v[j] * scale;
}

// A block of one number; whole lines of it non-temporally if `streamed`.
template <class T>
void fill_block(T *out, Index n, T number, bool streamed) {
    Index j = streamed ? least(n, until_line(out)) : n;
    std::fill(out, out + j, number);
    for (; j < n; j += lanes<T>)
        stream(out + j, n - j, splat(number));
}

// A block of numbers of any kind; whole lines of it non-temporally.
template <class S>
void stream_block(const S *v, Index n, S *out) {
    constexpr Index line = 64 / (Index) sizeof(S);
    Index j = least(n, until_line(out));
    std::copy(v, v + j, out);
    for (; j + line <= n; j += line) {
        auto bits = load_vector<Lanes<float, 64>>((const float *) (v + j));
        for_registers(bits, [=](auto part, int lane) FORCED {
            on_register::stream((float *) (out + j) + lane, part);
        });
    }
    std::copy(v + j, v + n, out + j);
}

// The soft cap of v into `out`; its derivative into `slope` unless that is NULL.
template <class T>
void cap_block(const T *v, Index n, T cap, T *out, T *slope) {
    for (Index j = 0; j < n; j += lanes<T>) {
        auto [capped, derivative] = softcap(load_ahead(v + j, n - j, cap), cap);
        store(out + j, n - j, capped);
        if (slope)
            store(slope + j, n - j, derivative);
    }
}

// u = w (keep t + spread), with t = 0 and w = 1 where they are NULL.
template <class T>
void target_block(const T *t, const T *w, Index n, T keep, T spread, T *out) {
    for (Index j = 0; j < n; j += lanes<T>) {
        Vec<T> u = splat(spread);
        if (t)
            u = smoothed(load_ahead(t + j, n - j, T()), keep, spread);
        if (w)
            u = u * load(w + j, n - j, T());
        store(out + j, n - j, u);
    }
}

// x where its weight is not 0, -inf elsewhere.
template <class T>
void mask_block(const T *v, const T *b, Index n, T *out) {
    for (Index j = 0; j < n; j++)
        out[j] = b[j] == 0 ? -(T) INFINITY : v[j];
}

// out less `scale` u.
template <class T>
void subtract_block(T *out, const T *u, Index n, T scale) {
    for (Index j = 0; j < n; j += lanes<T>)
        store(out + j, n - j, less_target(load(out + j, n - j, T()), load(u + j, n - j, T()), scale));
}

// The gradient of an entropy from p, where `mean` is that of m - x.
template <class T>
void slope_block(const T *p, const T *v, Index n, T m, T mean, T *out) {
    for (Index j = 0; j < n; j += lanes<T>)
        store(out + j, n - j, entropy_slope(load(p + j, n - j, T()), load(v + j, n - j, T()), m, mean));
}

template <class T>
void multiply_block(T *out, const T *slope, Index n) {
    for (Index j = 0; j < n; j++)
        out[j] = out[j] * slope[j];
}

// b exp(x - m) of the elements below the maximum and b of those equal to it, in float64.
template <class V>
INLINE auto weighted_terms(V x, V b, V m, V e) {
    // scaled back before the weight comes in, which may be as large as a number can be
    auto below = (widen(below_maximum(x, m, e)) * Constants<double>::unshift) * widen(b);
    return pack(below, widen(at_maximum(x, m, b)));
}

// A row of a block of numbers times tau, `step` elements apart, by the library's exp: for a maximum that is
// infinite or enormous. One term after the other, but with Kahan's compensation.
template <class T>
void sum_exactly(const T *v, T tau, Index step, Index n, State &row) {
    double e = 0, k = 0, lost = 0;
    for (Index j = 0; j < n; j++) {
        double x = v[j * step] * tau;
        if (x == row.m)
            k += 1;
        else {
            double term = std::exp(x - row.m) - lost, added = e + term;
            lost = (added - e) - term;
            e = added;
        }
    }
    row.e += e;
    row.k += k;
}

// Add exp(x - m) times the distance of x likewise; `beside` are the logits that a target's x is compared
// with, and m_beside is their maximum.
template <Away AWAY, class T>
void sum_away_exactly(
    const T *v, const T *beside, double m_beside, T tau, Index step, Index n, State &row
) {
    double away = 0;
    for (Index j = 0; j < n; j++) {
        double x = v[j * step] * tau, distance = row.m - x;
        if constexpr (AWAY == DIVERGENT)
            distance = excess((double) (beside[j * step] * tau), m_beside, x, row.m);
        away += product(std::exp(x - row.m), distance);
    }
    row.away += away;
}

// The same with weights, of which those of both signs at an infinite maximum make it NaN, as does an
// infinite one at -inf.
template <class T>
void sum_weighted_exactly(const T *v, const T *b, Index step, Index n, State &row) {
    double e = 0, k = 0;
    for (Index j = 0; j < n; j++) {
        double x = v[j * step], weight = b[j * step];
        if (x == -INFINITY && weight != 0)
            e += weight * 0;
        else if (x == row.m)
            k += row.m == INFINITY && weight != 0 ? weight * row.m : weight;
        else if (weight != 0)
            e += weight * std::exp(x - row.m);
    }
    row.e += e;
    row.k += k;
}

// factor exp(x - m) likewise; NaN throughout where the maximum is infinite.
template <class T, class S>
void write_exactly(const T *v, Index step, Index n, double m, double factor, S *out) {
    for (Index j = 0; j < n; j++) {
        const double result = std::fabs(m) < INFINITY ? std::exp(v[j * step] - m) * factor : NAN;
        out[j * step] = stored<S>((T) result);
    }
}

}  // namespace
