// Rows of one block that are not short: one after the other, but for their scalars, which share a register.

#pragma once

#include "halves.hpp"
#include "one_block.hpp"

namespace {

// S is what logits are stored as: T, or 16 bits, which become T where they are read.
template <class T, class S = T>
struct MiddleRows {
    typedef Register<T> V;
    typedef typename Bits<T>::signed_type integer;
    typedef Lanes<T, lanes<T> * (int) sizeof(S)> End;  // a vector of what is stored
    static constexpr Index width = V::count, block = lanes<T>;

    const Call &call;
    const Index classes = call.classes, whole = classes / block * block, rest = classes - whole;
    const Index pitch = round_up(classes, block);
    Memory memory{
        (width * pitch + 2 * width * width) * (Index) sizeof(T) +
        (width * (pitch + 2 * block) + pitch) * (Index) sizeof(S)
    };
    T *const kept = memory.take<T>(width * pitch);  // exponentials of a row each
    // of a row each: a register of maxima, then of sums, and one of counters
    T *const first = memory.take<T>(width * width);
    integer *const second = memory.take<integer>(width * width);
    // of a row each: where logits are brought together, and a copy of the last ones (`end_of`)
    S *const buffers = memory.take<S>(width * pitch), *const ends = memory.take<S>(width * 2 * block);
    S *const out = memory.take<S>(pitch);
    Group group;
    OneBlock<T> rows{call, group};
    const S *logits[width];
    // rows in a group: so that none is written, perhaps over its own logits, before all are known to be usual
    static constexpr Index most = width;

    explicit MiddleRows(const Call &call_) : call(call_) {
        if (memory.start)
            std::fill(ends, ends + width * 2 * block, stored<S>(-(T) INFINITY));
    }

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

    // The last vector of logits of row k, as they were when it was read: with what is left over from whole
    // vectors at its end, behind which there is -inf.
    S *end_of(Index k) const { return ends + k * 2 * block + rest; }

    // A number of each row, by f from the numbers of its register.
    template <class F>
    static FORCED V fold_registers(const T *registers, F f) {
        V r[width];
        UNROLLED for (Index j = 0; j < width; j += piece<T>) turn_piece<V>(registers + j, width, r + j);
        UNROLLED for (Index half = width / 2; half > 0; half /= 2)
            UNROLLED for (Index k = 0; k < half; k++) r[k] = f(r[k], r[k + half]);
        return r[0];
    }

    // The sum of each row's counters.
    FORCED V fold_counters() const {
        auto bits = [](V x) FORCED { return bits_as<typename V::signed_bits>(x); };
        const V one = spread<V>((T) ((int64_t) 1 << Bits<T>::mantissa));  // has n in its last bits if that is added
        const V sums = fold_registers((const T *) second, [=](V a, V b) FORCED {
            return bits_as<V>(bits(a) + bits(b));
        });
        return bits_as<V>(bits(one) + bits(sums)) - one;
    }

    // Logits of row k: where they are, their maximum in lanes, and the last ones.
    FORCED void read_row(Index k, const char *at) {
        const S *x = call.x().fetch(at, 0, classes, buffers + k * pitch);
        Tops<S> tops;
        for (Index j = 0; j < whole; j += block)
            tops.raise(x + j);
        if (rest > 0)
            tops.raise(x + classes - block);  // also some that have been seen
        store_all(first + k * width, tops.in_lanes());
        store_all((T *) end_of(k), load_vector<End>((const T *) (x + classes - block)));  // as it is
        logits[k] = x;
    }

    // The sum of the row's exponentials below the maximum, and how many elements are equal to it, in lanes.
    template <bool KEEPS>
    FORCED void fold_row(Index k, T m, Window<T, T> window, const char *ahead) {
        const S *x = logits[k];
        T *to = kept + k * pitch;
        Vec<T> sums = {};
        const V top = spread<V>(m);
        typename V::signed_bits counts = {};
        auto add = [&](V &sum, V x_j, Index j) FORCED {
            const V e = window.terms(x_j);
            if (KEEPS)
                store_all(to + j, e);
            counts = on_register::count_equal(counts, x_j, top);
            sum = sum + below_maximum(x_j, top, e);
        };
        for (Index j = 0; j < whole; j += block) {
            prefetch_vector(ahead + j * (Index) sizeof(S));
            for_registers(sums, [&](V &sum, int lane) FORCED {
                add(sum, load_stored<V>(x + j + lane), j + lane);
            });
        }
        const S *end = end_of(k) + block - rest;
        for_registers(sums, [&](V &sum, int lane) FORCED {
            if (lane < rest)
                add(sum, load_stored<V>(end + lane), whole + lane);
        });
        store_all(first + k * width, fold_to_register(sums));
        memcpy(second + k * width, &counts, sizeof counts);
    }

    // The lanes of a vector folded by halves, down to a register.
    template <class W>
    static FORCED V fold_to_register(W x) {
        if constexpr (W::fits)
            return x;
        else
            return fold_to_register(x.lo + x.hi);
    }

    template <bool LABELS, Kind KIND>
    bool run_register() {
        const Index count = group.count;
        auto plus = [](V a, V b) FORCED { return a + b; };
        T floor[width], magic[width], tops[width], x_y[width] = {};
        const Operand &x = call.x();
        const char *at = x.row(group.outer, group.inner);
        for (Index k = 0; k < count; k++)
            read_row(k, at + k * x.inner);
        std::fill(first + count * width, first + width * width, (T) 0);  // idle ones: harmless numbers
        const V m = fold_registers(first, [](V a, V b) FORCED { return maximum(a, b); });
        const Doubles<T> n = exponents_of(widen(m));
        const auto window = windows_of<T>(n);
        store_all(floor, window.floor), store_all(magic, window.magic), store_all(tops, m);
        for (Index k = 0; k < count; k++) {
            fold_row<KIND == WRITES>(k, tops[k], {floor[k], magic[k]}, at + (k + width) * x.inner);
            if (LABELS && rows.label[k] >= 0)
                x_y[k] = number(logits[k][(Index) rows.label[k]]);
        }
        std::fill(second + count * width, second + width * width, (integer) 1);
        const V sum = fold_registers(first, plus), counts = fold_counters();
        typename OneBlock<T>::Results results;
        if (!rows.template finish<LABELS, KIND>(0, m, n, window, sum, counts, load_vector<V>(x_y), results))
            return false;
        if (KIND != READS)
            write<LABELS, KIND>(tops, results);
        return true;
    }

    template <bool LABELS, Kind KIND>
    void write(const T *tops, const typename OneBlock<T>::Results &results) {
        T factor[width], scale[width], peak[width], at_label[width], log_s[width];
        store_all(factor, results.factor), store_all(scale, results.scale), store_all(peak, results.peak);
        store_all(at_label, results.at_label), store_all(log_s, results.log_s);
        for (Index k = 0; k < group.count; k++) {
            char *start = call.out.row(group.outer, group.inner + k);
            S *to = call.out.streamed ? out : call.out.place(start, 0, out);
            auto put = [&](const auto *from, Index j) FORCED {
                const Vec<T> x = load_stored<Vec<T>>(from);
                store_stored(to + j, KIND == LOGS ? log_probability(x, tops[k], log_s[k])
                                                  : probability(x, peak[k], factor[k], scale[k]));
            };
            auto put_all = [&](const auto *from, const auto *last) FORCED {
                for (Index j = 0; j < whole; j += block)
                    put(from + j, j);
                if (rest > 0)
                    put(last, classes - block);  // once more what lies before the rest
            };
            const T *terms = kept + k * pitch;
            if constexpr (KIND == LOGS)
                put_all(logits[k], end_of(k));
            else
                put_all(terms, terms + classes - block);
            if (LABELS && rows.label[k] >= 0)
                to[(Index) rows.label[k]] = stored<S>(at_label[k]);
            if (call.out.streamed)
                stream_block(out, classes, (S *) start);
            else
                call.out.deliver(start, 0, classes, out);
        }
    }
};

}  // namespace
