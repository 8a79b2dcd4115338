// The scalars of rows: their running state, and what becomes of it. See `fastll.contract`.
//
// Everything here is float64. Rows and columns share it, which is why they agree to the bit. What is done
// once per row is done for a `Group` of rows, 16 at a time.

#pragma once

#include "call.hpp"

namespace {

typedef Vec<double> Wide;

struct State {  // of a row that elements are being added to
    double m, e, k;
    double n;  // exponent of the reference of `exponential`
    double added;  // to e since, but in multiples of 2**n: so no exponential is needed on the way
    double away, away_added;  // likewise the sum of exp(x - m) times distances, if there is one
};

struct Group {  // rows inner to inner + count of an outer one, and what is known of each
    Index outer, inner, count;
    double m[GROUP], e[GROUP], k[GROUP], n[GROUP], added[GROUP], away[GROUP], away_added[GROUP];  // `State`
    double lead[GROUP];  // exp(m) / 2**n
    double log_s[GROUP];  // log(e + k)
    Index label[GROUP];  // -1: none that exists
    double sample[GROUP];  // its weight, 0 where the row is dropped
    double x_y[GROUP], w_y[GROUP], slope_y[GROUP];  // logit, class weight, soft cap's slope at the label
    double distances[GROUP];  // sum_j u_j (m - x_j)
    double mass[GROUP];  // sum_j u_j
    double mean[GROUP];  // of the distances
    double value[GROUP];  // the loss, the entropy, or the sum of terms
    double upstream[GROUP];  // factor of the row's gradient
    double factor[GROUP];  // of exp(x - m) in the result
    double scale[GROUP], rest[GROUP];  // of `exponential` in the result, one after the other
    double g_y[GROUP];  // the gradient at the label
};

// Up to here x - m is exact wherever exp(x - m) matters, and n ln 2 in `reduced`.
constexpr double LARGEST = FUSED ? LIMIT : LIMIT_UNFUSED;

// Whether a maximum serves as a reference.
INLINE bool usable(double m) {
    return std::fabs(m) < LARGEST;
}

// The exponent n of the reference for a maximum m; 0 where it is not usable.
INLINE double exponent_of(double m) {
    return usable(m) ? std::floor(m * Constants<double>::log2e + 0.5) : 0;
}

// exp(m) / 2**n, a number about 1; 1 where m is not usable.
INLINE Wide lead_of(Wide m, Wide n) {
    Wide lead = exp_fraction((m - n * LN2_HIGH) - n * LN2_LOW);
    return where_gt(LARGEST, absolute(m), lead, 1.0);
}

// What `exponential` needs of reference exponents, whole numbers, of one row or of a vector of rows.
template <class T, class N>
struct Window {
    N floor, magic;

    // exp(x) 2**(SHIFT - n)
    FORCED Vec<T> terms(Vec<T> x) const { return exponential(x, floor, magic); }

    // The term e of x times its distance from m. One below the window has the e 0 and a finite distance:
    // so this is `product`.
    FORCED Vec<T> away(Vec<T> x, Vec<T> e, Vec<T> m) const { return e * (m - maximum(floor, x)); }
};

template <class T>
INLINE Window<T, T> window_of(double n) {
    return {
        (T) ((n - Bits<T>::bias - SHIFT) * Constants<double>::ln2),
        Constants<T>::magic + (T) (SHIFT - n),
    };
}

// A vector of f(l) for each lane l.
template <class T, class F>
INLINE Vec<T> each_lane(F f) {
    T numbers[lanes<T>];
    for (Index l = 0; l < lanes<T>; l++)
        numbers[l] = f(l);
    return load_all(numbers);
}

template <class T>
INLINE Window<T, Vec<T>> windows_of(const double *n) {
    return {
        each_lane<T>([=](Index l) FORCED { return window_of<T>(n[l]).floor; }),
        each_lane<T>([=](Index l) FORCED { return window_of<T>(n[l]).magic; }),
    };
}

// Numbers of a vector of rows, in the compute dtype.
template <class T>
INLINE Vec<T> load_as(const double *values) {
    return each_lane<T>([=](Index l) FORCED { return (T) values[l]; });
}

INLINE State state_of(const Group &group, Index i) {
    return {group.m[i],     group.e[i],    group.k[i],         group.n[i],
            group.added[i], group.away[i], group.away_added[i]};
}

INLINE void set_state(Group &group, Index i, const State &row) {
    group.m[i] = row.m, group.e[i] = row.e, group.k[i] = row.k;
    group.n[i] = row.n, group.added[i] = row.added;
    group.away[i] = row.away, group.away_added[i] = row.away_added;
}

// Every row the identity, idle ones too, so that their lanes hold harmless numbers.
INLINE void begin(const Call &call, Group &group) {
    const bool targets = call.targeted();
    for (Index i = 0; i < GROUP; i += lanes<double>) {
        // log-probabilities have been normalised: theirs stays 0
        store_all(group.m + i, splat(call.operation == NLL_LOSS ? 0 : -(double) INFINITY));
        store_all(group.sample + i, splat(1.0));
        for (double *zeros : {group.e, group.k, group.n, group.added})
            store_all(zeros + i, Wide());
        for (double *zeros : {group.away, group.away_added})
            if (call.away() != NOWHERE)
                store_all(zeros + i, Wide());
        for (double *zeros : {group.x_y, group.distances, group.mass})
            if (targets)
                store_all(zeros + i, Wide());
        for (double *ones : {group.w_y, group.slope_y})
            if (targets)
                store_all(ones + i, splat(1.0));
    }
    for (Index &label : group.label)
        label = -1;
}

INLINE double lead_of(const State &row) {
    return first(lead_of(splat(row.m), splat(row.n)));
}

// The state relative to a larger maximum `top`, which makes all distances larger by `lift`.
//
// The rounding error of m - top, found as in Knuth's two-sum, corrects the exponential: otherwise a
// difference of d would cost d roundoffs.
void raise_maximum(State &row, double top, double lift) {
    double d = row.m - top, rounded = d - row.m, error = 0;
    if (row.m == -INFINITY)
        row.e = (row.e + row.added) * 0, row.away = 0;
    else {
        if (d > -INFINITY)
            error = (row.m - (d - rounded)) - (top + rounded);
        const double lead = lead_of(row), fall = std::exp(d) * (1 + error);
        row.e += row.added / lead;
        const double s = row.e + row.k, away = row.away + row.away_added / lead;
        row.e = s * fall;
        row.away = product(fall, away + product(s, lift));
    }
    row = {top, row.e, 0, exponent_of(top), 0, row.away, 0};
}

// The same of a target's row, whose distances became larger by `rise`, that of the other array's maximum.
void raise_target(State &row, double top, double rise) {
    if (top > row.m)
        raise_maximum(row, top, rise - (top - row.m));
    else if (rise != 0)
        row.away += product((row.e + row.added / lead_of(row)) + row.k, rise);
}

// A maximum as distances have it.
INLINE double finite_or_zero(double m) {
    return m > -INFINITY ? m : 0;
}

// The states after the last element. A row without one above -inf is the identity; a NaN stays.
void finish_states(Group &group) {
    for (Index i = 0; i < group.count; i += lanes<double>) {
        Wide m = load_all(&group.m[i]), lead = lead_of(m, load_all(&group.n[i]));
        Wide e = load_all(&group.e[i]) + load_all(&group.added[i]) / lead;
        e = where_eq(m, -(double) INFINITY, e * 0.0, e);
        Wide k = where_eq(m, -(double) INFINITY, 0.0, load_all(&group.k[i]));
        store_all(&group.lead[i], lead);
        store_all(&group.e[i], e);
        store_all(&group.k[i], k);
        // for k of at least 1, or a row without elements
        store_all(&group.log_s[i], log1p_sum(e + (k - 1.0)));
    }
}

// The factor of exp(x - m) in the result of 16 rows, and those of `exponential`: the product
// factor / lead * 2**-SHIFT, or where terms times that would lose digits, one part of it after the other.
INLINE void set_factors(const Call &call, Group &group, Index i, Wide factor) {
    constexpr double unshift = Constants<double>::unshift;
    const double least = call.single ? 0x1p-100 : 0x1p-960;
    Wide part = factor / load_all(&group.lead[i]), scale = part * unshift, size = absolute(scale);
    store_all(&group.factor[i], factor);
    store_all(&group.scale[i], where_gt(size, least, scale, part));
    store_all(&group.rest[i], where_gt(size, least, 1.0, unshift));
}

// What a row's gradient is multiplied by: 16 of them.
INLINE Wide upstream_of(const Call &call, Group &group, Index i) {
    Wide sample = load_all(group.sample + i);
    Wide upstream = sample * (call.options.scale * call.options.inverse_temperature);
    store_all(group.upstream + i, upstream);
    return upstream;
}

// Losses, gradients at the labels, and factors of the others.
void finish_cross_entropy(const Call &call, Group &group) {
    const Options &options = call.options;
    const auto plain = window_of<double>(SHIFT);  // not shifted
    for (Index i = 0; i < group.count; i += lanes<double>) {
        auto of = [=](const double *values) FORCED { return load_all(values + i); };
        Wide m = of(group.m), e = of(group.e), k = of(group.k), log_s = of(group.log_s);
        Wide x_y = of(group.x_y), w_y = of(group.w_y), mass = of(group.mass), s = e + k;
        Wide c_y = w_y * (call.labels ? 1 - options.label_smoothing : 0.0);
        Wide loss =
            cross_entropy_loss(m, log_s, c_y, x_y, mass, of(group.distances), splat(options.z_loss));
        if (call.classes > 0)
            loss = where_eq(m, -(double) INFINITY, (double) NAN, loss);
        store_all(&group.value[i], product(of(group.sample), loss));
        if (!call.out)
            continue;
        Wide upstream = upstream_of(call, group, i);
        auto [q, t] = split(x_y - m, plain.floor, plain.magic);
        Wide u_y = w_y * (options.label_smoothing / (double) call.classes);
        auto [factor, g_y] = cross_entropy_gradient(
            m + log_s, s, e + (k - 1.0), c_y, u_y, mass, splat(options.z_loss), fma(q, t, t),
            fma(q, t, t - 1.0)
        );
        g_y = (g_y * upstream) * of(group.slope_y);
        store_all(&group.g_y[i], where_gt((double) INFINITY, absolute(m), g_y, (double) NAN));
        set_factors(call, group, i, (factor * upstream) / s);
    }
}

// The same of log-probabilities, whose gradient depends on the targets alone: `factor` is a number that fills
// it, NaN where there is no such label.
void finish_nll_loss(const Call &call, Group &group) {
    const double eps = call.options.label_smoothing, share = eps / (double) call.classes;
    for (Index i = 0; i < group.count; i += lanes<double>) {
        auto of = [=](const double *values) FORCED { return load_all(values + i); };
        Wide w_y = of(group.w_y), c_y = w_y * (call.labels ? 1 - eps : 0.0);
        Wide loss = nll_loss(c_y, of(group.x_y), of(group.distances));
        store_all(&group.value[i], product(of(group.sample), loss));
        store_all(&group.g_y[i], (w_y * share + c_y) * (0.0 - upstream_of(call, group, i)));
    }
    for (Index i = 0; i < group.count; i++)
        group.factor[i] = call.labels && group.label[i] < 0 ? NAN : 0;
}

// Entropies; the means of the distances and factors of exponentials.
void finish_entropy(const Call &call, Group &group) {
    for (Index i = 0; i < group.count; i += lanes<double>) {
        auto of = [=](const double *values) FORCED { return load_all(values + i); };
        Wide away = of(group.away) + of(group.away_added) / of(group.lead);
        Wide s = of(group.e) + of(group.k), value = softmax_entropy(of(group.log_s), away, s);
        value = where_gt((double) INFINITY, absolute(of(group.m)), value, (double) NAN);
        store_all(&group.value[i], product(of(group.sample), value));
        store_all(&group.mean[i], away / s);
        set_factors(call, group, i, upstream_of(call, group, i) / s);
    }
}

// Divergences of the rows from those of `target`; factors of the exponentials of both.
void finish_kl_divergence(const Call &call, Group &group, Group &target) {
    for (Index i = 0; i < group.count; i += lanes<double>) {
        auto of = [=](const double *values) FORCED { return load_all(values + i); };
        Wide away = of(target.away) + of(target.away_added) / of(target.lead);
        Wide s = of(group.e) + of(group.k), u = of(target.e) + of(target.k);
        Wide value = kl_divergence_of_sums(of(group.log_s), of(target.log_s), away, u);
        for (const double *m : {group.m, target.m})
            value = where_gt((double) INFINITY, absolute(of(m)), value, (double) NAN);
        store_all(&group.value[i], product(of(group.sample), value));
        Wide upstream = upstream_of(call, group, i);
        set_factors(call, group, i, upstream / s);
        set_factors(call, target, i, upstream / u);
    }
}

// log_s of weighted sums, which are of any sign, from whichever part dominates: a negative sum is NaN unless
// signs are asked for.
void finish_weighted(const Call &call, Group &group) {
    for (Index i = 0; i < group.count; i++) {
        double e = group.e[i], k = group.k[i], log_s = std::log(std::fabs(e + k));
        if (std::fabs(e) < std::fabs(k))
            log_s = std::log(std::fabs(k)) + std::log1p(e / k);
        if (group.m[i] == -INFINITY && e == e)
            log_s = -INFINITY;
        else if (!call.sign && e + k < 0)
            log_s = NAN;
        group.log_s[i] = log_s;
    }
}

}  // namespace
