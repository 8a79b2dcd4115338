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
void gather(const Operand x, const Group &group, Index j, Index n, T *tile) {
    const bool whole = x.format == IN_PLACE && group.count == GROUP;
    const char *at = x.row(group.outer, group.inner) + j * x.classes;
    for (Index i = 0; i < n; i++, at += x.classes, tile += GROUP)
        if (!whole)
            read_block(x.format, x.swapped, at, x.inner, group.count, tile);
        else
            for (Index w = 0; w < GROUP; w += lanes<T>) {
                const T *from = (const T *) at + w;
                prefetch_vector((const char *) from + LINES_AHEAD * x.classes);
                store_all(tile + w, load_all(from));
            }
}

// A tile back into classes j to j + n of the rows.
template <class T>
void scatter(const Operand x, const Group &group, Index j, Index n, const T *tile) {
    const bool whole = x.format == IN_PLACE && group.count == GROUP;
    char *at = x.row(group.outer, group.inner) + j * x.classes;
    for (Index i = 0; i < n; i++, at += x.classes, tile += GROUP)
        if (!whole)
            write_block(x.format, tile, at, x.inner, group.count);
        else
            for (Index w = 0; w < GROUP; w += lanes<T>) {
                T *to = (T *) at + w;
                if (x.streamed && (size_t) to % 64 == 0)
                    stream(to, lanes<T>, load_all(tile + w));
                else {
                    prefetch_vector((const char *) to + LINES_AHEAD * x.classes);
                    store_all(to, load_all(tile + w));
                }
            }
}

// What makes results of a vector of rows of their exponentials or logits.
template <class T>
struct Scalars {
    Window<T, Vec<T>> window;
    Vec<T> m, log_s, factor, scale, rest, peak;
    bool tiny;  // whether any `rest` is not 1

    Scalars() = default;
    Scalars(const Group &group, Index w)
        : window(windows_of<T>(&group.n[w])), m(load_as<T>(&group.m[w])), log_s(load_as<T>(&group.log_s[w])),
          factor(load_as<T>(&group.factor[w])), scale(load_as<T>(&group.scale[w])),
          rest(load_as<T>(&group.rest[w])), peak(window.terms(m)),
          tiny(largest(where_eq(rest, (T) 1, (T) 0, splat((T) 1))) > 0) {}
};

template <class T>
struct Columns {
    static constexpr Index most = GROUP;
    static constexpr Index SUMS = 2 * lanes<T> * lanes<T>;  // the most numbers that accumulators hold

    const Call &call;
    const Index tile = GROUP * least(BLOCK, call.classes);
    Memory memory{2 * (tile + FEW * GROUP) * (Index) sizeof(T) + 2 * SUMS * (Index) sizeof(double)};
    T *v = memory.take<T>(tile), *u = memory.take<T>(tile);  // logits, capped; weights or targets
    // of FEW classes: derivatives of the soft cap, and what is written
    T *slope = memory.take<T>(FEW * GROUP), *out = memory.take<T>(FEW * GROUP);
    // terms of a vector of rows, for each lane that an element may go to; and their sums on the way to one
    double *accumulators = memory.take<double>(SUMS), *sums = memory.take<double>(SUMS);
    Group group, of_target;  // rows of the logits, and of the second logits

    explicit Columns(const Call &call_) : call(call_) {}

    Group &current() { return group; }
    Group &target() { return of_target; }

    // `sum_block` for a vector of rows: `terms(j)` of n classes, vectors of `Number`. Leaves the sums in
    // `sums`, one per row, then those of the second term.
    template <class Number, class F>
    FORCED void sum_tile(Index n, F terms) {
        typedef decltype(terms(n)) Terms;
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

    // What a tile of classes j to j + n has at the labels.
    void read_labels(Index j, Index n, const T *tile, double *to) const {
        for (Index i = 0; call.labels && i < group.count; i++) {
            Index y = group.label[i] - j;
            if (y >= 0 && y < n)
                to[i] = tile[y * GROUP + i];
        }
    }

    // Classes j to j + n of logits, times tau.
    void fetch_tempered(const Operand &of, Index j, Index n, T *to) const {
        gather(of, group, j, n, to);
        if (call.tempered())
            scale_block(to, n * GROUP, (T) call.options.inverse_temperature, to);
    }

    // The same of x, with the soft cap where there is one, and what is at the labels.
    void fetch_logits(Index j, Index n, T *to) {
        fetch_tempered(call.x(), j, n, to);
        for (Index part = 0; part < n && call.capped(); part += FEW) {
            Index few = least(FEW, n - part);
            T *at = to + part * GROUP;
            cap_block(at, few * GROUP, (T) call.options.softcap, at, slope);
            read_labels(j + part, few, slope, group.slope_y);
        }
        read_labels(j, n, to, group.x_y);
    }

    // Classes j to j + n of u, see `Rows::fetch_target`; or of the second logits.
    void fetch_target(Index j, Index n, T *to) {
        if (call.divergent())
            return fetch_tempered(call.second(), j, n, to);
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
                continue;
            }
            const bool fresh = j == 0 && !call.state;
            raise_maxima(n, fresh);
            call.entropic() ? fold_tile<ENTROPIC>(group, v, n) : fold_tile<NOWHERE>(group, v, n);
            if (call.spread() || call.divergent())
                fetch_target(j, n, u);
            if (call.spread())
                fold_target(n, before);
            if (call.divergent()) {
                raise_targets(n, fresh, before);
                fold_tile<DIVERGENT>(of_target, u, n);
            }
        }
    }

    // A fold of log-probabilities: the distances alone.
    void fold_targets() {
        for (Index j = 0; j < call.classes && call.spread(); j += BLOCK) {
            Index n = least(BLOCK, call.classes - j);
            fetch_logits(j, n, v);
            fetch_target(j, n, u);
            fold_target(n, group.m);
        }
    }

    // The maxima of a tile's rows, and if these are `fresh`, i.e. have none yet, of the group's.
    void find_maxima(Group &rows, const T *of, Index n, bool fresh, T *tops) const {
        for (Index w = 0; w < GROUP; w += lanes<T>) {
            Vec<T> top = splat(-(T) INFINITY);
            for (Index j = 0; j < n; j++)
                top = maximum(load_all(of + j * GROUP + w), top);
            store_all(tops + w, top);
        }
        for (Index i = 0; i < GROUP && fresh; i++) {
            rows.m[i] = tops[i];
            rows.n[i] = exponent_of(tops[i]);
        }
    }

    // The rows' maxima with those of a tile.
    void raise_maxima(Index n, bool fresh) {
        T tops[GROUP];
        find_maxima(group, v, n, fresh, tops);
        for (Index i = 0; i < group.count && !fresh; i++)
            if (tops[i] > group.m[i]) {
                State row = state_of(group, i);
                raise_maximum(row, tops[i], tops[i] - row.m);
                set_state(group, i, row);
            }
    }

    // Those of the targets, where those of the logits were the ones in `before`.
    void raise_targets(Index n, bool fresh, const double *before) {
        T tops[GROUP];
        find_maxima(of_target, u, n, fresh, tops);
        for (Index i = 0; i < group.count && !fresh; i++) {
            State row = state_of(of_target, i);
            raise_target(row, tops[i], finite_or_zero(group.m[i]) - finite_or_zero(before[i]));
            set_state(of_target, i, row);
        }
    }

    // Add the sums of a vector of rows from w on, or what `exactly` adds to rows without a usable maximum or
    // without finite sums, as those of infinite weights.
    template <Away AWAY, class A, class F>
    FORCED void add_sums(Group &rows, Index w, double unshift, const A *at_top, F exactly) {
        const double *below = sums, *away = sums + lanes<T>;
        auto sound = [&](Index i) FORCED {
            return usable(rows.m[w + i]) & (std::fabs(below[i] + at_top[i]) < INFINITY);
        };
        Index unusable = 0;
        for (Index i = 0; i < lanes<T>; i++)
            unusable += sound(i) ? 0 : 1;
        if (unusable == 0)
            for (Index i = 0; i < lanes<T>; i++) {
                rows.added[w + i] += below[i] * unshift;
                rows.k[w + i] += at_top[i];
                if (AWAY != NOWHERE)
                    rows.away_added[w + i] += away[i] * unshift;
            }
        else
            for (Index i = w; i < least(group.count, w + lanes<T>); i++) {
                State row = state_of(rows, i);
                if (!sound(i - w))
                    exactly(i, row);
                else {
                    row.added += below[i - w] * unshift, row.k += at_top[i - w];
                    if (AWAY != NOWHERE)
                        row.away_added += away[i - w] * unshift;
                }
                set_state(rows, i, row);
            }
    }

    // Add a tile to the states of rows, whose maxima are at least its own.
    template <Away AWAY>
    void fold_tile(Group &rows, const T *of, Index n) {
        for (Index w = 0; w < group.count; w += lanes<T>) {
            const auto window = windows_of<T>(&rows.n[w]);
            const Vec<T> m = load_as<T>(&rows.m[w]), m_of_x = load_as<T>(&group.m[w]);
            const Vec<T> m_beside = where_gt(m_of_x, -(T) INFINITY, m_of_x, (T) 0);
            const T *from = of + w, *beside = v + w;
            Vec<T> counts = {};
            sum_tile<T>(n, [&](Index j) FORCED {
                Vec<T> x = load_all(from + j * GROUP), e = window.terms(x);
                counts = counts + at_maximum(x, m, (T) 1);
                Vec<T> below = below_maximum(x, m, e);
                if constexpr (AWAY == ENTROPIC)
                    return pack(below, window.away(x, e, m));
                else if constexpr (AWAY == DIVERGENT)
                    return pack(below, product(e, excess(load_all(beside + j * GROUP), m_beside, x, m)));
                else
                    return below;
            });
            T equal[lanes<T>];
            store_all(equal, counts);
            add_sums<AWAY>(rows, w, Constants<double>::unshift, equal, [&](Index i, State &row) {
                sum_exactly(of + i, (T) 1, GROUP, n, row);
                if (AWAY != NOWHERE)
                    sum_away_exactly<AWAY>(
                        of + i, v + i, finite_or_zero(group.m[i]), (T) 1, GROUP, n, row
                    );
            });
        }
    }

    void fold_weighted_tile(Index n) {
        mask_block(v, u, n * GROUP, v);
        raise_maxima(n, false);
        for (Index w = 0; w < group.count; w += lanes<T>) {
            const auto window = windows_of<T>(&group.n[w]);
            const Vec<T> m = load_as<T>(&group.m[w]);
            const T *from = v + w, *weights = u + w;
            sum_tile<double>(n, [&](Index j) FORCED {
                Vec<T> x = load_all(from + j * GROUP);
                return weighted_terms(x, load_all(weights + j * GROUP), m, window.terms(x));
            });
            add_sums<NOWHERE>(group, w, 1, sums + lanes<T>, [&](Index i, State &row) {
                sum_weighted_exactly(v + i, u + i, GROUP, n, row);
            });
        }
    }

    // Add a tile to distances and mass; `before` has the maxima that the distances so far refer to.
    void fold_target(Index n, const double *before) {
        for (Index w = 0; w < group.count; w += lanes<T>) {
            const Vec<T> m = load_as<T>(&group.m[w]);
            const Vec<T> tops = where_gt(m, -(T) INFINITY, m, (T) 0);
            const T *from = v + w, *targets = u + w;
            sum_tile<T>(n, [&](Index j) FORCED {
                Vec<T> target = load_all(targets + j * GROUP);
                return pack(distance(load_all(from + j * GROUP), target, tops), target);
            });
            for (Index i = w; i < least(group.count, w + lanes<T>); i++) {
                group.distances[i] += distance(before[i], group.mass[i], group.m[i]) + sums[i - w];
                group.mass[i] += sums[i - w + lanes<T>];
            }
        }
    }

    // A fold that is a sum of terms, F of `fastll.formulas.TERMS`.
    template <class F>
    void fold_terms() {
        memset(group.value, 0, sizeof group.value);
        for (Index j = 0; j < call.classes; j += BLOCK) {
            Index n = least(BLOCK, call.classes - j);
            T *const tiles[] = {v, u};
            for (int k = 0; k < F::inputs; k++)
                gather(call.inputs[k], group, j, n, tiles[k]);
            for (Index w = 0; w < group.count; w += lanes<T>) {
                sum_tile<T>(n, [&](Index at) FORCED {
                    auto input = [&](int k) FORCED { return load_all(tiles[k] + at * GROUP + w); };
                    return spread<Vec<T>>(F::of(input, nullptr));
                });
                for (Index i = w; i < least(group.count, w + lanes<T>); i++)
                    group.value[i] += sums[i - w];
            }
        }
    }

    // ---- Write ----

    // What has the shape of the rows, a few classes at a time.
    void write(bool) {
        if (!call.out)
            return;
        Scalars<T> scalars[GROUP / lanes<T>], of_targets[GROUP / lanes<T>];
        for (Index w = 0; w < GROUP; w += lanes<T>) {
            scalars[w / lanes<T>] = Scalars<T>(group, w);
            if (call.divergent())
                of_targets[w / lanes<T>] = Scalars<T>(of_target, w);
        }
        // whether the tiles still hold what there is
        const bool whole =
            call.classes <= BLOCK && !call.capped() && !call.state && call.operation != NLL_LOSS;
        for (Index j = 0; j < call.classes; j += FEW) {
            const Index n = least(FEW, call.classes - j);
            T *logits = whole ? v + j * GROUP : v, *targets = whole ? u + j * GROUP : u;
            if (call.operation == NLL_LOSS)
                for (Index at = 0; at < n * GROUP; at += lanes<T>)
                    store_all(out + at, scalars[at % GROUP / lanes<T>].factor);
            else {
                if (!whole)
                    fetch_logits(j, n, logits);
                call.log() ? write_logarithms(scalars, logits, n)
                           : write_tile(group, scalars, logits, n, out);
            }
            if (call.entropic())
                make_slopes(logits, n);
            if (!whole && (call.spread() || call.divergent()))
                fetch_target(j, n, targets);
            if (call.spread())
                subtract_tile(targets, n);
            if (call.divergent()) {
                write_tile(of_target, of_targets, targets, n, slope);
                subtract_block(out, slope, n * GROUP, (T) 1);
            }
            if (call.capped())
                multiply_block(out, slope, n * GROUP);
            if (call.labels || call.sample)
                write_labels(j, n);
            scatter(call.out, group, j, n, out);
        }
    }

    // Gradients less those of the targets; see `subtract_block`.
    void subtract_tile(const T *target, Index n) {
        for (Index w = 0; w < group.count; w += lanes<T>) {
            const Vec<T> upstream = load_as<T>(&group.upstream[w]);
            for (Index at = w; at < n * GROUP; at += GROUP)
                store_all(out + at, less_target(load_all(out + at), load_all(target + at), upstream));
        }
    }

    // Gradients of entropies from probabilities; see `slope_block`.
    void make_slopes(const T *logits, Index n) {
        for (Index w = 0; w < group.count; w += lanes<T>) {
            const Vec<T> m = load_as<T>(&group.m[w]), mean = load_as<T>(&group.mean[w]);
            for (Index at = w; at < n * GROUP; at += GROUP)
                store_all(out + at, entropy_slope(load_all(out + at), load_all(logits + at), m, mean));
        }
    }

    // Logarithms of probabilities of n classes.
    void write_logarithms(const Scalars<T> *scalars, const T *logits, Index n) {
        for (Index j = 0; j < n * GROUP; j += GROUP)
            for (Index w = 0; w < GROUP; w += lanes<T>) {
                const Scalars<T> &of = scalars[w / lanes<T>];
                store_all(out + j + w, log_probability(load_all(logits + j + w), of.m, of.log_s));
            }
    }

    // Probabilities of n classes; see `Rows::write_block_anew`.
    void write_tile(
        const Group &rows, const Scalars<T> *scalars, const T *logits, Index n, T *results
    ) const {
        for (Index w = 0; w < group.count; w += lanes<T>, scalars++) {
            const auto [window, m, log_s, factor, scale, rest, peak, tiny] = *scalars;
            const T *from = logits + w;
            T *to = results + w;
            for (Index j = 0; j < n * GROUP; j += GROUP) {
                Vec<T> e = window.terms(load_all(from + j)), p = probability(e, peak, factor, scale);
                if (tiny)
                    p = where_eq(e, peak, factor, p * rest);
                store_all(to + j, p);
            }
        }
        for (Index i = 0; i < group.count; i++)
            if (!usable(rows.m[i]))
                write_exactly(logits + i, GROUP, n, rows.m[i], rows.factor[i], results + i);
    }

    // The gradients of dropped rows and at labels.
    void write_labels(Index j, Index n) {
        for (Index i = 0; i < group.count; i++) {
            Index y = group.label[i] - j;
            if (group.sample[i] == 0)
                for (Index c = 0; c < n; c++)
                    out[c * GROUP + i] = 0;
            else if (y >= 0 && y < n)
                out[y * GROUP + i] = (T) group.g_y[i];
        }
    }
};

}  // namespace
