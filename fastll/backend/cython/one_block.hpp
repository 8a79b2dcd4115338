// Rows of one block without options, from logits to results without a stop: as many rows at a time as a
// register has lanes, whose scalars never leave the registers. The results are those of columns.hpp and
// rows.hpp, to the bit, which also do what is not usual: rows without a usable maximum or a finite sum.

#pragma once

#include "columns.hpp"
#include "rows.hpp"

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

    static bool takes(const Call &call) {
        const bool usual = call.operation == LOGSUMEXP || call.operation == SOFTMAX ||
                           call.operation == LOG_SOFTMAX || call.operation == CROSS_ENTROPY;
        const bool more = call.state || call.second() || call.capped() || call.tempered() || call.spread() ||
                          call.sign || call.selected;
        return usual && !more && call.classes > 0 && call.classes <= (call.across ? SHORT - 1 : BLOCK);
    }

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

// Other rows: one after the other, but for their scalars.
template <class T>
struct MiddleRows {
    typedef Register<T> V;
    static constexpr Index width = V::count, parts = lanes<T> / width;  // registers of a vector

    const Call &call;
    const Index pitch = round_up(call.classes, lanes<T>);
    Memory memory{((2 * width + 1) * pitch + 2 * width * width) * (Index) sizeof(T)};
    T *kept = memory.take<T>(width * pitch), *buffers = memory.take<T>(width * pitch);  // of a row each
    T *out = memory.take<T>(pitch);
    // a register of each row, twice
    T *first = memory.take<T>(width * width), *second = memory.take<T>(width * width);
    Group group;
    OneBlock<T> rows{call, group};
    const T *logits[width];
    // rows in a group: so that none is written, perhaps over its own logits, before all are known to be usual
    static constexpr Index most = width;

    explicit MiddleRows(const Call &call_) : call(call_) {}

    bool has_memory() const { return memory.start; }

    bool run() {
        return with_kind(call, [&](auto labels, auto kind) {
            if (labels)
                load_labels<T>(call, rows.group, rows.label, rows.sample, rows.w_y);
            if (!run_register<labels, kind>())
                return false;
            rows.put_values();
            return true;
        });
    }

    // f(j, register, part of a vector) for the registers of n elements, of which the last may be partial:
    // it then gets what is left of `count`.
    template <class F>
    static FORCED void for_parts(Index n, F f) {
        Index j = 0;
        for (; j + lanes<T> <= n; j += lanes<T>)
            UNROLLED for (Index part = 0; part < parts; part++) f(j + part * width, part, width);
        UNROLLED for (Index part = 0; part < parts; part++, j += width)
            if (j < n)
                f(j, part, n - j);
    }

    static FORCED V load_part(const T *v, Index count, T pad) {
        const V x = spread<V>(pad);
        return count >= width ? load_vector<V>(v) : on_register::load_some(v, (int) count, x);
    }

    // A number of each row, by f from the numbers of its register.
    template <class F>
    static FORCED V fold_registers(const T *registers, F f) {
        V r[width];
        UNROLLED for (Index j = 0; j < width; j += piece<T>) turn_piece<V>(registers + j, width, r + j);
        UNROLLED for (Index half = width / 2; half > 0; half /= 2)
            UNROLLED for (Index k = 0; k < half; k++) r[k] = f(r[k], r[k + half]);
        return r[0];
    }

    // Logits of row k, and their maximum in lanes.
    void read_row(Index k) {
        const Operand &of = call.x();
        const T *x = of.fetch(of.row(group.outer, group.inner + k), 0, call.classes, buffers + k * pitch);
        V top = spread<V>(-(T) INFINITY);
        for_parts(call.classes, [&](Index j, Index, Index left) FORCED {
            top = maximum(load_part(x + j, left, -(T) INFINITY), top);
        });
        store_all(first + k * width, top);
        logits[k] = x;
    }

    // The sum of the row's exponentials below the maximum, and how many elements are equal to it, in lanes.
    template <bool KEEPS>
    void fold_row(Index k, T m, Window<T, T> window) {
        const T *x = logits[k];
        T *to = kept + k * pitch;
        const Index size = size_of(call.x().format == IN_PLACE ? format_of<T>() : call.x().format);
        const char *ahead = call.x().row(group.outer, group.inner + k + width);
        V sums[parts] = {}, counts = {};
        for_parts(call.classes, [&](Index j, Index part, Index left) FORCED {
            if (part == 0)
                prefetch_vector(ahead + j * size);
            const V x_j = load_part(x + j, left, -(T) INFINITY), e = window.terms(x_j);
            if (KEEPS)
                store_all(to + j, e);
            counts = counts + at_maximum(x_j, spread<V>(m), (T) 1);
            sums[part] = sums[part] + below_maximum(x_j, spread<V>(m), e);
        });
        UNROLLED for (Index half = parts / 2; half > 0; half /= 2)
            UNROLLED for (Index part = 0; part < half; part++) sums[part] = sums[part] + sums[part + half];
        store_all(first + k * width, sums[0]);
        store_all(second + k * width, counts);
    }

    template <bool LABELS, Kind KIND>
    bool run_register() {
        const Index count = group.count;
        auto plus = [](V a, V b) FORCED { return a + b; };
        T floor[width], magic[width], tops[width], x_y[width] = {};
        for (Index k = 0; k < count; k++)
            read_row(k);
        std::fill(first + count * width, first + width * width, (T) 0);  // idle ones: harmless numbers
        const V m = fold_registers(first, [](V a, V b) FORCED { return maximum(a, b); });
        const Doubles<T> n = exponents_of(widen(m));
        const auto window = windows_of<T>(n);
        store_all(floor, window.floor), store_all(magic, window.magic), store_all(tops, m);
        for (Index k = 0; k < count; k++) {
            fold_row<KIND == WRITES>(k, tops[k], {floor[k], magic[k]});
            if (LABELS && rows.label[k] >= 0)
                x_y[k] = logits[k][(Index) rows.label[k]];
        }
        std::fill(second + count * width, second + width * width, (T) 1);
        const V sum = fold_registers(first, plus), counts = fold_registers(second, plus);
        typename OneBlock<T>::Results results;
        if (!rows.template finish<LABELS, KIND>(0, m, n, window, sum, counts, load_vector<V>(x_y), results))
            return false;
        T factor[width], scale[width], peak[width], at_label[width], log_s[width];
        store_all(factor, results.factor), store_all(scale, results.scale), store_all(peak, results.peak);
        store_all(at_label, results.at_label), store_all(log_s, results.log_s);
        for (Index k = 0; k < count && KIND != READS; k++) {
            char *start = call.out.row(group.outer, group.inner + k);
            T *to = call.out.streamed ? out : call.out.place(start, 0, out);
            const T *from = KIND == LOGS ? logits[k] : kept + k * pitch;
            for_parts(call.classes, [&](Index j, Index, Index left) FORCED {
                V x = load_part(from + j, left, (T) 0);
                x = KIND == LOGS ? log_probability(x, tops[k], log_s[k])
                                 : probability(x, peak[k], factor[k], scale[k]);
                if (left >= width)
                    store_all(to + j, x);
                else
                    on_register::store_some(to + j, (int) left, x);
            });
            if (LABELS && rows.label[k] >= 0)
                to[(Index) rows.label[k]] = at_label[k];
            if (call.out.streamed)
                stream_block(out, call.classes, (T *) start);
            else
                call.out.deliver(start, 0, call.classes, out, true);
        }
        return true;
    }
};

}  // namespace
