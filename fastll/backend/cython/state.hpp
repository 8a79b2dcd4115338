// The scalars of rows: their running state, and what becomes of it. See `fastll.contract`.
//
// Everything here is float64. Rows and columns share it, which is why they agree to the bit. What is done
// once per row is done for a `Group` of rows, a few at a time.

#pragma once

#include "call.hpp"

namespace {

// Numbers of as many rows as a register has lanes of T.
template <class T>
using Doubles = Lanes<double, Register<T>::count * 8>;

typedef Doubles<float> Wide;

struct State {  // of a row that elements are being added to
    double m, e, k;
    double n;  // exponent of the reference of `exponential`
    double added;  // to e since, but in multiples of 2**n: so no exponential is needed on the way
    double away, away_added;  // likewise the sum of exp(x - m) times distances, if there is one
};

struct Place {  // rows inner to inner + count of an outer one
    Index outer, inner, count;
};

struct Group : Place {  // and what is known of each
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
template <class V>
INLINE V exponents_of(V m) {
    const V n = (m * Constants<double>::log2e + whole_at<double>) - whole_at<double>;
    return where_gt(LARGEST, absolute(m), n, 0.0);
}

INLINE double exponent_of(double m) {
    return first(exponents_of(spread<Lanes<double, 16>>(m)));
}

// exp(m) / 2**n, a number about 1, of a usable m.
template <class W>
INLINE W lead_of_usable(W m, W n) {
    return exp_fraction((m - n * LN2_HIGH) - n * LN2_LOW);
}

// The same; 1 where m is not usable.
template <class W>
INLINE W lead_of(W m, W n) {
    return where_gt(LARGEST, absolute(m), lead_of_usable(m, n), 1.0);
}

// What `exponential` needs of reference exponents, whole numbers, of one row or of several.
template <class T, class N>
struct Window {
    N floor, magic;

    // exp(x) 2**(SHIFT - n)
    template <class V>
    FORCED V terms(V x) const {
        return exponential(x, floor, magic);
    }

    // The term e of x times its distance from m. One below the window has the e 0 and a finite distance:
    // so this is `product`.
    template <class V>
    FORCED V away(V x, V e, V m) const {
        return e * (m - maximum(floor, x));
    }
};

template <class T>
INLINE Window<T, T> window_of(double n) {
    return {
        (T) ((n - Bits<T>::bias - SHIFT) * Constants<double>::ln2),
        Constants<T>::magic + (T) (SHIFT - n),
    };
}

// Numbers of rows: in float64, and in the compute dtype.
INLINE Wide load_wide(const double *values) {
    return load_vector<Wide>(values);
}

template <class T>
INLINE Doubles<T> load_doubles(const double *values) {
    return load_vector<Doubles<T>>(values);
}

template <class T>
INLINE Register<T> load_as(const double *values) {
    return narrow<T>(load_doubles<T>(values));
}

template <class T>
INLINE Window<T, Register<T>> windows_of(Doubles<T> n) {
    return {
        narrow<T>((n - (double) (Bits<T>::bias + SHIFT)) * Constants<double>::ln2),
        narrow<T>((double) SHIFT - n) + Constants<T>::magic,
    };
}

// Labels as numbers, -1 where they are no class; 1 where they are not ignored, else 0; and NaN where they are
// neither, else 1.
template <class W>
INLINE Three<W, W, W> classified(const int64_t *labels, int64_t ignored, int64_t classes) {
    if constexpr (!W::fits) {
        typedef typename W::Half Half;
        auto lo = classified<Half>(labels, ignored, classes);
        auto hi = classified<Half>(labels + Half::count, ignored, classes);
        return {{lo.a, hi.a}, {lo.b, hi.b}, {lo.c, hi.c}};
    } else {
        const W zero = {}, one = spread<W>(1.0);
        typename W::signed_bits y;
        memcpy(&y, labels, sizeof y);
        const auto none = y - y, some = none - 1;
        const auto kept = y != ignored ? some : none;
        const auto inside = kept & (y >= 0 ? some : none) & (y < classes ? some : none);
        const auto digits = bits_as<typename W::type>((y & inside) + bits_as<int64_t>(0x1p52));
        return {
            {inside != none ? digits - 0x1p52 : zero.v - 1.0},
            {kept != none ? one.v : zero.v},
            {(kept & ~inside) != none ? zero.v + (double) NAN : one.v},
        };
    }
}

// What sample weights multiply.
INLINE void load_samples(const Call &call, const Group &group, double *sample) {
    for (Index i = 0; i < group.count && call.sample; i++)
        sample[i] *= element<double>(call.sample.row(group.outer, group.inner + i), false);
}

// Labels, -1 where there is none that counts; sample weights, 0 of rows that are dropped; and class weights. A
// label that is out of range, as another thread changed it after the check, makes the row NaN.
template <class T, class Label>
void load_labels(const Call &call, const Group &group, Label *label, double *sample, double *w_y) {
    const T *weight = (const T *) call.weight.address;
    const char *at = call.labels.row(group.outer, group.inner);
    int64_t labels[GROUP];
    if (call.labels.inner == 8)
        memcpy(labels, at, group.count * 8);
    else
        for (Index i = 0; i < group.count; i++)
            labels[i] = element<int64_t>(at + i * call.labels.inner, false);
    std::fill(labels + group.count, labels + round_up(group.count, Wide::count), 0);
    for (Index i = 0; i < group.count; i += Wide::count) {
        auto [y, kept, factor] =
            classified<Wide>(labels + i, call.options.ignore_index, call.classes);
        if constexpr (std::is_same_v<Label, float>)
            store_all(label + i, narrow<float>(y));
        else {
            double numbers[Wide::count];
            store_all(numbers, y);
            std::transform(numbers, numbers + Wide::count, label + i, [](double number) { return (Label) number; });
        }
        store_all(sample + i, kept);
        store_all(w_y + i, factor);
    }
    load_samples(call, group, sample);
    for (Index i = 0; i < group.count && call.sample; i++)
        if (sample[i] == 0)
            label[i] = -1, w_y[i] = 1;
    for (Index i = 0; i < group.count && weight; i++)
        if (label[i] >= 0)
            w_y[i] = weight[(Index) label[i]];
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

// One number per row, where it is asked for.
template <class T>
INLINE void put_numbers(const Operand &to, const Group &group, const T *numbers) {
    if (!to)
        return;
    char *at = to.row(group.outer, group.inner);
    if (to.inner == sizeof(T))
        memcpy(at, numbers, group.count * sizeof(T));
    else
        for (Index i = 0; i < group.count; i++)
            memcpy(at + i * to.inner, &numbers[i], sizeof(T));
}

// Every row the identity, idle ones too, so that their lanes hold harmless numbers.
INLINE void begin(const Call &call, Group &group) {
    const bool targets = call.targeted();
    for (Index i = 0; i < GROUP; i += Wide::count) {
        // log-probabilities have been normalised: theirs stays 0
        store_all(group.m + i, spread<Wide>(call.operation == NLL_LOSS ? 0 : -(double) INFINITY));
        store_all(group.sample + i, spread<Wide>(1.0));
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
                store_all(ones + i, spread<Wide>(1.0));
    }
    for (Index &label : group.label)
        label = -1;
}

INLINE double lead_of(const State &row) {
    return first(lead_of(spread<Wide>(row.m), spread<Wide>(row.n)));
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

// Whether rows have usable maxima m and finite sums.
template <class T>
INLINE bool sound(Register<T> m, Doubles<T> sums) {
    return all_greater((T) LARGEST, absolute(m)) & all_greater((double) INFINITY, absolute(sums));
}

// The state of rows after their last element: its sum s in two parts, and more that follows from it.
template <class W>
struct Settled {
    W m, lead, e, k, log_s;
};

// A row without an element above -inf is the identity; a NaN stays.
template <class W>
INLINE Settled<W> settled(W m, W n, W e, W added, W k) {
    W lead = lead_of(m, n);
    e = e + added / lead;
    e = where_eq(m, -(double) INFINITY, e * 0.0, e);
    k = where_eq(m, -(double) INFINITY, 0.0, k);
    // for k of at least 1, or a row without elements
    return {m, lead, e, k, log1p_sum(e + (k - 1.0))};
}

// The same of new rows with usable maxima and finite sums.
template <class W>
INLINE Settled<W> settled_sound(W m, W n, W added, W k) {
    W lead = lead_of_usable(m, n), e = added / lead;
    return {m, lead, e, k, log1p_finite(e + (k - 1.0))};
}

void finish_states(Group &group) {
    for (Index i = 0; i < group.count; i += Wide::count) {
        auto of = [=](const double *values) FORCED { return load_wide(values + i); };
        auto row = settled(of(group.m), of(group.n), of(group.e), of(group.added), of(group.k));
        store_all(&group.lead[i], row.lead);
        store_all(&group.e[i], row.e);
        store_all(&group.k[i], row.k);
        store_all(&group.log_s[i], row.log_s);
    }
}

// What makes results of exponentials: `factor` of exp(x - m), and `scale` and `rest`, one after the other, of
// `exponential`.
template <class W>
struct Factors {
    W factor, scale, rest;
};

// The product factor / lead * 2**-SHIFT, or where terms times that would lose digits, one part of it after
// the other.
template <class W>
INLINE Factors<W> factors_of(const Call &call, W factor, W lead) {
    constexpr double unshift = Constants<double>::unshift;
    const double least = call.single ? 0x1p-100 : 0x1p-960;
    W part = factor / lead, scale = part * unshift, size = absolute(scale);
    return {factor, where_gt(size, least, scale, part), where_gt(size, least, 1.0, unshift)};
}

// Whether exponentials that were lifted to a row's last reference do for its results: for a factor of moderate
// size, so that what lifting lost is too small for these.
INLINE bool is_moderate(const Call &call, const Group &rows, Index i) {
    return rows.rest[i] == 1 && std::fabs(rows.scale[i]) < (call.single ? 0x1p-30 : 0x1p-60);
}

// What lifts exponentials from the reference 2**before to 2**n, one after the other, as the power of two need not
// be a number; 1 where that is the same, or nothing is above 0.
template <class T>
INLINE Two<T, T> lift_of(double before, double n) {
    const double rise = before - n;
    const int lift = rise < 0 ? (int) rise : 0, part = lift / 2;
    return {(T) std::ldexp(1.0, part), (T) std::ldexp(1.0, lift - part)};
}

INLINE void set_factors(const Call &call, Group &group, Index i, Wide factor) {
    auto [own, scale, rest] = factors_of(call, factor, load_wide(&group.lead[i]));
    store_all(&group.factor[i], own);
    store_all(&group.scale[i], scale);
    store_all(&group.rest[i], rest);
}

// What rows' gradients are multiplied by.
template <class W>
INLINE W upstream_of(const Call &call, W sample) {
    return sample * (call.options.scale * call.options.inverse_temperature);
}

INLINE Wide upstream_of(const Call &call, Group &group, Index i) {
    const Wide upstream = upstream_of(call, load_wide(group.sample + i));
    store_all(group.upstream + i, upstream);
    return upstream;
}

// What is known of rows' targets, as in `Group`.
template <class W>
struct Targets {
    W sample, x_y, w_y, slope_y, distances, mass;
};

template <class W>
INLINE W cross_entropy_of(const Call &call, const Settled<W> &row, const Targets<W> &of) {
    const Options &options = call.options;
    W c_y = of.w_y * (call.labels ? 1 - options.label_smoothing : 0.0), z_loss = spread<W>(options.z_loss);
    W loss = cross_entropy_loss(row.m, row.log_s, c_y, of.x_y, of.mass, of.distances, z_loss);
    if (call.classes > 0)
        loss = where_eq(row.m, -(double) INFINITY, (double) NAN, loss);
    return product(of.sample, loss);
}

// Factors of exp(x - m) in gradients, and gradients at the labels.
template <class W>
INLINE Two<W, W> cross_entropy_gradient_of(
    const Call &call, const Settled<W> &row, const Targets<W> &of, W upstream
) {
    const Options &options = call.options;
    const auto plain = window_of<double>(SHIFT);  // not shifted
    W c_y = of.w_y * (call.labels ? 1 - options.label_smoothing : 0.0), z_loss = spread<W>(options.z_loss);
    W u_y = of.w_y * (options.label_smoothing / (double) call.classes), s = row.e + row.k;
    auto [q, t] = split(of.x_y - row.m, plain.floor, plain.magic);
    auto [factor, g_y] = cross_entropy_gradient(
        row.m + row.log_s, s, row.e + (row.k - 1.0), c_y, u_y, of.mass, z_loss, fma(q, t, t),
        fma(q, t, t - 1.0)
    );
    g_y = (g_y * upstream) * of.slope_y;
    g_y = where_gt((double) INFINITY, absolute(row.m), g_y, (double) NAN);
    return {(factor * upstream) / s, g_y};
}

// Losses, gradients at the labels, and factors of the others.
void finish_cross_entropy(const Call &call, Group &group) {
    for (Index i = 0; i < group.count; i += Wide::count) {
        auto of = [=](const double *values) FORCED { return load_wide(values + i); };
        const Settled<Wide> row = {of(group.m), of(group.lead), of(group.e), of(group.k), of(group.log_s)};
        const Targets<Wide> targets = {
            of(group.sample),  of(group.x_y),       of(group.w_y),
            of(group.slope_y), of(group.distances), of(group.mass),
        };
        store_all(&group.value[i], cross_entropy_of(call, row, targets));
        if (!call.out)
            continue;
        auto [factor, g_y] = cross_entropy_gradient_of(call, row, targets, upstream_of(call, group, i));
        store_all(&group.g_y[i], g_y);
        set_factors(call, group, i, factor);
    }
}

// The same of log-probabilities, whose gradient depends on the targets alone: `factor` is a number that fills
// it, NaN where there is no such label.
void finish_nll_loss(const Call &call, Group &group) {
    const double eps = call.options.label_smoothing, share = eps / (double) call.classes;
    for (Index i = 0; i < group.count; i += Wide::count) {
        auto of = [=](const double *values) FORCED { return load_wide(values + i); };
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
    for (Index i = 0; i < group.count; i += Wide::count) {
        auto of = [=](const double *values) FORCED { return load_wide(values + i); };
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
    for (Index i = 0; i < group.count; i += Wide::count) {
        auto of = [=](const double *values) FORCED { return load_wide(values + i); };
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
