// Rows of one block without options, from logits to results without a stop: as many rows at a time as a
// register has lanes, whose scalars never leave the registers. The results are those of columns.hpp and
// rows.hpp, to the bit, which also do what is not usual: rows without a usable maximum or a finite sum.

#pragma once

#include "columns.hpp"

namespace {

constexpr Index TILE_SIZE = 1 << 13;  // bytes of a tile of short rows

template <class T>
constexpr Index LINE = 64 / (Index) sizeof(T);  // numbers in a line of the cache

enum Kind { READS, WRITES, LOGS };  // what is left in `out`: nothing, exponentials by a factor, logarithms

template <class T>
struct OneBlock {
    typedef Register<T> V;
    typedef Doubles<T> W;
    static constexpr Index width = V::count;  // rows at a time

    // What writing takes: the factor of exp(x - m), what makes it of exponentials, and the gradient at the
    // label.
    struct Results {
        V factor, scale, peak, at_label, log_s;
    };

    const Call &call;
    Group &group;  // of which only the place is used
    T value[GROUP], lse[GROUP], label[GROUP];  // -1: none
    double sample[GROUP], w_y[GROUP];

    OneBlock(const Call &call_, Group &group_) : call(call_), group(group_) {}

    // Values of rows from i on, whose exponentials are those of `window`, from their sum, and what writing
    // takes; false for rows that are not usual.
    template <bool LABELS, Kind KIND>
    FORCED bool finish(
        Index i, V m, W n, Window<T, V> window, V sum, V counts, V x_y, Results &results
    ) {
        const W m_wide = widen(m), below = widen(sum) * Constants<double>::unshift;
        const W zero = {}, one = spread<W>(1.0);
        if (!sound<T>(m, below))
            return false;
        const auto row = settled_sound(m_wide, n, below, widen(counts));
        if (call.lse)
            store_all(lse + i, narrow<T>(m_wide + row.log_s));
        results.log_s = narrow<T>(row.log_s);
        W factor = one;
        if constexpr (LABELS) {
            const W samples = load_doubles<T>(sample + i);
            const Targets<W> targets = {samples, widen(x_y), load_doubles<T>(w_y + i), one, zero, zero};
            if (call.value)
                store_all(value + i, narrow<T>(cross_entropy_of(call, row, targets)));
            if (KIND == WRITES) {
                auto [others, at_label] =
                    cross_entropy_gradient_of(call, row, targets, upstream_of(call, samples));
                factor = where_eq(samples, 0.0, 0.0, others);
                results.at_label = narrow<T>(at_label);
            }
        } else if (KIND == WRITES)
            factor = one / (row.e + row.k);
        if (KIND != WRITES)
            return true;
        auto [_, scale, rest] = factors_of(call, factor, row.lead);
        results.factor = narrow<T>(factor), results.scale = narrow<T>(scale);
        results.peak = window.terms(m);
        return all_greater(where_eq(factor, 0.0, one, rest), 0.5);  // a scale without a second part
    }

    void put_values() const {
        put_numbers(call.value, group, value);
        put_numbers(call.lse, group, lse);
    }
};

// Calls use(whether there are labels, kind) with what is known of a call, as types.
template <class F>
INLINE bool with_kind(const Call &call, F use) {
    typedef std::integral_constant<Kind, READS> Reads;
    typedef std::integral_constant<Kind, WRITES> Writes;
    typedef std::integral_constant<Kind, LOGS> Logs;
    if (call.labels)
        return call.out ? use(std::true_type(), Writes()) : use(std::true_type(), Reads());
    if (call.log())
        return use(std::false_type(), Logs());
    return call.out ? use(std::false_type(), Writes()) : use(std::false_type(), Reads());
}

// Short rows: a row per lane, class by class.
template <class T>
struct ShortRows {
    typedef Register<T> V;

    const Call &call;
    Columns<T> columns{call};
    OneBlock<T> rows{call, columns.group};
    // rows in a group: as many as leave room in the first-level cache
    const Index most = least(GROUP, round_up(1 + TILE_SIZE / (call.classes * (Index) sizeof(T)), LINE<T>));

    explicit ShortRows(const Call &call_) : call(call_) {}

    bool has_memory() const { return columns.has_memory(); }

    // A group that has its place; false, and nothing is written, if a row is not usual.
    bool run() {
        return with_kind(call, [&](auto labels, auto kind) {
            columns.v = columns.take(columns.logits, 0);
            const Place &next = columns.next;
            if (labels) {
                load_labels<T>(call, rows.group, rows.label, rows.sample, rows.w_y);
                prefetch_class(call.labels, call.labels.row(next.outer, next.inner), next.count);
            }
            for (Index i = 0; i < rows.group.count; i += V::count) {
                if (!run_register<labels, kind>(i))
                    return false;
                columns.logits.advance(i + V::count, rows.group.count);
            }
            rows.put_values();
            if (kind != READS)
                columns.deliver(call.out, 0, call.classes, columns.out, true);
            return true;
        });
    }

    template <bool LABELS, Kind KIND>
    bool run_register(Index i) {
        const Index classes = call.classes;
        const T *x = columns.v + i;
        T *kept = columns.kept + i, *out = columns.out + i;
        V m = load_vector<V>(columns.tops + i), sum = {}, counts = {}, x_y = {}, j_of_lanes = {}, y = {};
        const Doubles<T> n = exponents_of(widen(m));
        const auto window = windows_of<T>(n);
        if (LABELS)
            y = load_vector<V>(rows.label + i);
        UNROLLED for (Index j = 0; j < classes; j++) {
            const V x_j = load_vector<V>(x + j * GROUP), e = window.terms(x_j);
            if (KIND == WRITES)
                store_all(kept + j * GROUP, e);
            if (LABELS) {
                x_y = where_eq(y, j_of_lanes, x_j, x_y);
                j_of_lanes = j_of_lanes + (T) 1;
            }
            counts = counts + at_maximum(x_j, m, (T) 1);
            sum = sum + below_maximum(x_j, m, e);
        }
        typename OneBlock<T>::Results results;
        if (!rows.template finish<LABELS, KIND>(i, m, n, window, sum, counts, x_y, results))
            return false;
        j_of_lanes = V();
        UNROLLED for (Index j = 0; j < classes && KIND == LOGS; j++)
            store_all(out + j * GROUP, log_probability(load_vector<V>(x + j * GROUP), m, results.log_s));
        UNROLLED for (Index j = 0; j < classes && KIND == WRITES; j++) {
            const V e = load_vector<V>(kept + j * GROUP);
            V p = probability(e, results.peak, results.factor, results.scale);
            if (LABELS) {
                p = where_eq(y, j_of_lanes, results.at_label, p);
                j_of_lanes = j_of_lanes + (T) 1;
            }
            store_all(out + j * GROUP, p);
        }
        return true;
    }
};

}  // namespace
