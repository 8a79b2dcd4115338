// Folds of rows whose class axis is the slower one in memory: class by class, many rows at a time.
//
// A group of `GROUP` neighbouring rows makes a tile: a block of `BLOCK` classes of each, gathered so that
// the rows are contiguous, and handled with one row to a lane. Each row's sums keep the order of the
// contract (element j of a block in accumulator j modulo the lanes of a vector), so that a row has the same
// result, to the bit, in either layout.

#pragma once

#include "blocks.hpp"

namespace {

constexpr Index FEW = 32;  // classes that are written at a time
constexpr Index LINES_AHEAD = 8;  // classes from the one that is read or written to the one prefetched

// Classes j to j + n of a group's rows into a tile: class by class, GROUP rows apart.
template <class T>
void gather(const Operand &x, const Group &group, Index j, Index n, T *tile) {
    const char *source = x.row(group.outer, group.inner) + j * x.classes;
    const bool whole = group.count == GROUP;
    for (Index i = 0; i < n; i++, source += x.classes, tile += GROUP) {
        if (x.format != IN_PLACE && x.native && whole)
            for (Index w = 0; w < GROUP; w += lanes<T>)
                store_all(tile + w, load_strided<T>(source + w * x.inner, x.inner));
        else if (x.format != IN_PLACE)
            read_block(x.format, x.swapped, source, x.inner, group.count, tile);
        else if (whole) {
            for (Index w = 0; w < GROUP; w += lanes<T>)
                prefetch_vector(source + LINES_AHEAD * x.classes + w * (Index) sizeof(T));
            memcpy(tile, source, GROUP * sizeof(T));
        } else
            memcpy(tile, source, group.count * sizeof(T));
    }
}

// A tile back into classes j to j + n of the rows.
template <class T>
void scatter(const Operand &x, const Group &group, Index j, Index n, const T *tile) {
    char *target = x.row(group.outer, group.inner) + j * x.classes;
    const bool whole = group.count == GROUP;
    for (Index i = 0; i < n; i++, target += x.classes, tile += GROUP) {
        if (x.format != IN_PLACE && x.native && whole)
            for (Index w = 0; w < GROUP; w += lanes<T>)
                store_strided(target + w * x.inner, x.inner, load_all(tile + w));
        else if (x.format != IN_PLACE)
            write_block(x.format, tile, target, x.inner, group.count);
        else if (!whole)
            memcpy(target, tile, group.count * sizeof(T));
        else if (x.streamed && (size_t) target % 64 == 0)
            for (Index w = 0; w < GROUP; w += lanes<T>)
                stream_all((T *) target + w, load_all(tile + w));
        else {
            for (Index w = 0; w < GROUP; w += lanes<T>)
                prefetch_vector(target + LINES_AHEAD * x.classes + w * (Index) sizeof(T));
            memcpy(target, tile, GROUP * sizeof(T));
        }
    }
}

template <class T>
struct Columns {
    const Call &call;
    Memory memory;
    T *v, *u;  // tiles of BLOCK classes: logits, capped; weights or targets
    T *slope, *out;  // tiles of FEW classes: derivatives of the soft cap; what is written
    char *accumulators;  // terms of a vector of rows, for each lane that an element may go to
    double *sums;  // the accumulators on their way to one
    alignas(64) T m[GROUP], floors[GROUP], magics[GROUP];  // of the rows; see `aim`
    bool all_usable;  // whether all of them serve as references
    alignas(64) T factors[GROUP], scales[GROUP], rests[GROUP], logs[GROUP];
    Group group;
    static constexpr Index most = GROUP;

    static constexpr Index SUMS = 2 * lanes<T> * lanes<T>;  // the most numbers that accumulators hold

    explicit Columns(const Call &call_) : call(call_), memory(size(call_)) {
        if (!memory.start)
            return;
        Index tile = GROUP * least(BLOCK, call.classes);
        v = memory.take<T>(tile);
        u = memory.take<T>(call.spread() || call.second() ? tile : 0);
        slope = memory.take<T>(call.capped() ? FEW * GROUP : 0);
        out = memory.take<T>(FEW * GROUP);
        accumulators = (char *) memory.take<double>(SUMS);
        sums = memory.take<double>(SUMS);
    }

    static Index size(const Call &call) {
        Index tiles = 2 * GROUP * least(BLOCK, call.classes) + 2 * FEW * GROUP;
        return tiles * (Index) sizeof(T) + 2 * SUMS * (Index) sizeof(double);
    }

    Group &current() { return group; }

    // f(w) for each vector of rows, from w on.
    template <class F>
    FORCED void for_rows(F f) const {
        for (Index w = 0; w < group.count; w += lanes<T>)
            f(w);
    }

    // `sum_block` for a vector of rows: `terms(j)` of n classes. Leaves the sums in `sums`, one per row, then
    // those of the second term.
    template <class F>
    FORCED void sum_tile(Index n, F terms) {
        typedef decltype(terms(n)) Terms;
        typedef NumberOf<Terms> Number;
        constexpr Index width = sizeof(Terms) / sizeof(Number);
        Terms *at = (Terms *) accumulators;
        Index used = least(n, lanes<T>);
        memset((void *) at, 0, used * sizeof(Terms));
        for (Index j = 0; j < n; j++) {
            Terms &accumulator = at[j & (lanes<T> - 1)];
            accumulator = accumulator + terms(j);
        }
        const Number *numbers = (const Number *) at;
        double *to = sums;
        for (Index i = 0; i < used * width; i++)
            to[i] = (double) numbers[i];
        for (Index half = lanes<T> / 2; half > 0; half /= 2) {
            for (Index i = half * width; i < used * width; i++)
                to[i - half * width] = to[i - half * width] + to[i];
            used = least(used, half);
        }
    }

    // The references of the rows, as vectors have them.
    void aim() {
        all_usable = true;
        for (Index i = 0; i < group.count; i += lanes<double>) {
            Wide size = absolute(load_all(&group.m[i]));
            all_usable &= largest(where_gt(LARGEST, size, 0.0, splat(1.0))) == 0;
        }
        for (Index i = 0; i < GROUP; i++) {
            Window<T> window(group.n[i]);
            m[i] = (T) group.m[i], floors[i] = window.floor, magics[i] = window.magic;
        }
    }

    struct References {  // of a vector of rows
        Vec<T> m, floor, magic;

        FORCED Vec<T> terms(Vec<T> x) const { return exponential(x, floor, magic); }
    };

    FORCED References references(Index w) const {
        return {load_all(m + w), load_all(floors + w), load_all(magics + w)};
    }

    // Classes j to j + n of the logits, with the soft cap where there is one, and what is at the labels.
    void fetch_logits(Index j, Index n, T *to) {
        gather(call.x(), group, j, n, to);
        const Index labelled = call.labels ? group.count : 0;
        for (Index part = 0; part < n && call.capped(); part += FEW) {
            Index few = least(FEW, n - part);
            T *at = to + part * GROUP;
            cap_block(at, few * GROUP, (T) call.options.softcap, at, slope);
            for (Index i = 0; i < labelled; i++) {
                Index y = group.label[i] - j - part;
                if (y >= 0 && y < few)
                    group.slope_y[i] = slope[y * GROUP + i];
            }
        }
        for (Index i = 0; i < labelled; i++) {
            Index y = group.label[i] - j;
            if (y >= 0 && y < n)
                group.x_y[i] = to[y * GROUP + i];
        }
    }

    // Classes j to j + n of u; see `Rows::fetch_target`.
    void fetch_target(Index j, Index n, T *to) {
        const double eps = call.options.label_smoothing;
        const T *w = (const T *) call.weight.address;
        if (call.second())
            gather(call.second(), group, j, n, to);
        T keep = (T) (1 - eps), spread = (T) (eps / (double) call.classes);
        target_block(call.second() ? to : nullptr, (const T *) nullptr, n * GROUP, keep, spread, to);
        for (Index i = 0; i < n && w; i++)
            for (Index l = 0; l < GROUP; l++)
                to[i * GROUP + l] = to[i * GROUP + l] * w[j + i];
    }

    // ---- Fold ----

    void fold() {
        double before[GROUP];
        for (Index j = 0; j < call.classes; j += BLOCK) {
            Index n = least(BLOCK, call.classes - j);
            fetch_logits(j, n, v);
            memcpy(before, group.m, sizeof before);
            if (call.weighted()) {
                gather(call.second(), group, j, n, u);
                fold_weighted_tile(n);
            } else
                fold_tile(n, j == 0 && !call.state);
            if (call.spread()) {
                fetch_target(j, n, u);
                fold_target(n, before);
            }
        }
    }

    // The rows' maxima with those of a tile; `fresh` rows have none yet.
    void raise_maxima(Index n, bool fresh) {
        T tops[GROUP];
        for (Index w = 0; w < GROUP; w += lanes<T>) {
            Vec<T> top = splat(-(T) INFINITY);
            for (Index j = 0; j < n; j++)
                top = maximum(load_all(v + j * GROUP + w), top);
            store_all(tops + w, top);
        }
        if (fresh) {
            for (Index i = 0; i < GROUP; i++)
                group.m[i] = tops[i];
            for (Index i = 0; i < GROUP; i += lanes<double>)
                store_all(&group.n[i], exponent_of(load_all(&group.m[i])));
            return;
        }
        for (Index i = 0; i < group.count; i++)
            if (tops[i] > group.m[i]) {
                State row = state_of(group, i);
                raise_maximum(row, tops[i]);
                set_state(group, i, row);
            }
    }

    // Add the sums of a vector of rows from w on, or what `exactly` adds to rows without a usable maximum.
    template <class A, class F>
    FORCED void add_sums(Index w, double unshift, const A *at_top, F exactly) {
        const double *below = sums;
        if (all_usable)
            for (Index i = 0; i < lanes<T>; i++) {
                group.added[w + i] += below[i] * unshift;
                group.k[w + i] += at_top[i];
            }
        else
            for (Index i = w; i < least(group.count, w + lanes<T>); i++) {
                State row = state_of(group, i);
                if (usable(row.m))
                    row.added += below[i - w] * unshift, row.k += at_top[i - w];
                else
                    exactly(i, row);
                set_state(group, i, row);
            }
    }

    void fold_tile(Index n, bool fresh) {
        raise_maxima(n, fresh);
        aim();
        for_rows([&](Index w) FORCED {
            const References row = references(w);
            const T *from = v + w;
            Vec<T> counts = {};
            sum_tile(n, [&](Index j) FORCED {
                Vec<T> x = load_all(from + j * GROUP);
                counts = counts + at_maximum(x, row.m, (T) 1);
                return below_maximum(x, row.m, row.terms(x));
            });
            T equal[lanes<T>];
            store_all(equal, counts);
            add_sums(w, Constants<double>::unshift, equal, [&](Index i, State &row) {
                sum_exactly(v + i, GROUP, n, row);
            });
        });
    }

    void fold_weighted_tile(Index n) {
        mask_block(v, u, n * GROUP, v);
        raise_maxima(n, false);
        aim();
        for_rows([&](Index w) FORCED {
            const References row = references(w);
            const T *from = v + w, *weights = u + w;
            sum_tile(n, [&](Index j) FORCED {
                Vec<T> x = load_all(from + j * GROUP);
                return weighted_terms(x, load_all(weights + j * GROUP), row.m, row.terms(x));
            });
            add_sums(w, 1, sums + lanes<T>, [&](Index i, State &row) {
                sum_weighted_exactly(v + i, u + i, GROUP, n, row);
            });
        });
    }

    // Add a tile to distances and mass; `before` has the maxima that the distances so far refer to.
    void fold_target(Index n, const double *before) {
        for_rows([&](Index w) FORCED {
            T top[lanes<T>];
            for (Index i = 0; i < lanes<T>; i++)
                top[i] = (T) (group.m[w + i] > -INFINITY ? group.m[w + i] : 0);
            const Vec<T> tops = load_all((const T *) top);
            const T *from = v + w, *targets = u + w;
            sum_tile(n, [&](Index j) FORCED {
                Vec<T> target = load_all(targets + j * GROUP);
                return pack(distance(load_all(from + j * GROUP), target, tops), target);
            });
            for (Index i = w; i < least(group.count, w + lanes<T>); i++) {
                double lifted = group.m[i] - before[i], mass = group.mass[i];
                group.distances[i] += (mass != 0 ? mass * lifted : 0) + sums[i - w];
                group.mass[i] += sums[i - w + lanes<T>];
            }
        });
    }

    // A fold that is a sum of terms, F of `fastll.formulas.TERMS`.
    template <class F>
    void fold_terms() {
        for (Index j = 0; j < call.classes; j += BLOCK) {
            Index n = least(BLOCK, call.classes - j);
            T *const tiles[] = {v, u};
            for (int k = 0; k < F::inputs; k++)
                gather(call.inputs[k], group, j, n, tiles[k]);
            for_rows([&](Index w) FORCED {
                sum_tile(n, [&](Index at) FORCED {
                    auto input = [&](int k) FORCED { return load_all(tiles[k] + at * GROUP + w); };
                    return spread<Vec<T>>(F::of(input, nullptr));
                });
                for (Index i = w; i < least(group.count, w + lanes<T>); i++)
                    group.value[i] += sums[i - w];
            });
        }
    }

    // ---- Write ----

    // What has the shape of the rows, a few classes at a time.
    void write() {
        if (!call.out)
            return;
        // whether the tiles still hold what there is
        const bool whole = call.classes <= BLOCK && !call.capped() && !call.state;
        aim();
        for (Index i = 0; i < GROUP; i++) {
            factors[i] = (T) group.factor[i], scales[i] = (T) group.scale[i];
            rests[i] = (T) group.rest[i], logs[i] = (T) group.log_s[i];
        }
        for (Index j = 0; j < call.classes; j += FEW) {
            const Index n = least(FEW, call.classes - j);
            T *logits = whole ? v + j * GROUP : v, *target = whole ? u + j * GROUP : u;
            if (!whole)
                fetch_logits(j, n, logits);
            if (call.log())
                write_logarithms(logits, n);
            else
                write_probabilities(logits, n);
            if (call.spread()) {
                if (!whole)
                    fetch_target(j, n, target);
                subtract_block(out, target, n * GROUP, (T) call.options.scale);
            }
            if (call.capped())
                multiply_block(out, slope, n * GROUP);
            if (call.labels)
                write_labels(j, n);
            scatter(call.out, group, j, n, out);
        }
    }

    void write_logarithms(const T *logits, Index n) {
        for_rows([&](Index w) FORCED {
            const Vec<T> tops = load_all(m + w), log_s = load_all(logs + w);
            T *to = out;
            for (Index j = w; j < n * GROUP; j += GROUP)
                store_all(to + j, log_probability(load_all(logits + j), tops, log_s));
        });
    }

    // `Rows::write_block_anew` for a tile.
    void write_probabilities(const T *logits, Index n) {
        for_rows([&](Index w) FORCED {
            const References row = references(w);
            const Vec<T> factor = load_all(factors + w), scale = load_all(scales + w);
            const Vec<T> rest = load_all(rests + w), peak = row.terms(row.m);
            const bool tiny = group.tiny;
            T *to = out;
            for (Index j = w; j < n * GROUP; j += GROUP) {
                Vec<T> e = row.terms(load_all(logits + j)), p = probability(e, peak, factor, scale);
                if (tiny)
                    p = where_eq(e, peak, factor, p * rest);
                store_all(to + j, p);
            }
        });
        for (Index i = 0; i < group.count; i++)
            if (!usable(group.m[i]))
                write_exactly(logits + i, GROUP, n, group.m[i], group.factor[i], out + i);
    }

    void complete() const {}

    // The gradients of ignored rows and at labels.
    void write_labels(Index j, Index n) {
        for (Index i = 0; i < group.count; i++) {
            Index y = group.label[i] - j;
            if (group.kept[i] == 0)
                for (Index c = 0; c < n; c++)
                    out[c * GROUP + i] = 0;
            else if (y >= 0 && y < n)
                out[y * GROUP + i] = (T) group.g_y[i];
        }
    }
};

}  // namespace
