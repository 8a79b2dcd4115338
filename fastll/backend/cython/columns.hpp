// Folds of many rows at a time: those whose class axis is the slower one in memory, and short ones.
//
// A group of `GROUP` neighbouring rows makes a tile: a block of `BLOCK` classes of each, brought together so
// that a class of all rows is contiguous, and handled with one row to a lane. Each row's sums keep the order
// of the contract (element j of a block in accumulator j modulo the lanes of a vector), so that a row has the
// same result, to the bit, in either layout.

#pragma once

#include "blocks.hpp"
#include "tiles.hpp"

namespace {

constexpr Index FEW = SHORT;  // classes that are written at a time

// What makes results of a vector of rows of their exponentials or logits.
template <class T>
struct Scalars {
    typedef Register<T> V;

    Window<T, V> window;
    V m, log_s, factor, scale, rest, peak;
    bool tiny;  // whether any `rest` is not 1

    Scalars() = default;
    Scalars(const Group &group, Index w)
        : window(windows_of<T>(load_doubles<T>(&group.n[w]))), m(load_as<T>(&group.m[w])),
          log_s(load_as<T>(&group.log_s[w])),
          factor(load_as<T>(&group.factor[w])), scale(load_as<T>(&group.scale[w])),
          rest(load_as<T>(&group.rest[w])), peak(window.terms(m)),
          tiny(largest(where_eq(rest, (T) 1, (T) 0, spread<V>((T) 1))) > 0) {}
};

template <class T>
struct Columns : Tiles<T> {
    static constexpr Index most = GROUP;
    static constexpr bool has_options = true;
    typedef Register<T> V;

    using Tiles<T>::call;
    using Tiles<T>::group;
    using Tiles<T>::fetch;
    using Tiles<T>::deliver;
    using Tiles<T>::are_short;

    const Index tile = GROUP * round_up(least(BLOCK, call.classes), piece<T>);
    const Index few = GROUP * round_up(least(FEW, call.classes), piece<T>);
    Memory memory{(2 * tile + 4 * few) * (Index) sizeof(T) + 2 * ACCUMULATORS};
    T *v = memory.take<T>(tile), *u = memory.take<T>(tile);  // logits, capped; weights or targets
    // of FEW classes: derivatives of the soft cap, and what is written
    T *slope = memory.take<T>(few), *out = memory.take<T>(few);
    // exponentials of short rows, and those of second ones
    T *kept = memory.take<T>(few), *kept_targets = memory.take<T>(few);
    // terms of a vector of rows, for each lane that an element may go to: of two sums
    static constexpr Index ACCUMULATORS = lanes<T> * (Index) sizeof(Doubles<T>);
    void *const first = memory.take<char>(ACCUMULATORS), *const second = memory.take<char>(ACCUMULATORS);
    Group of_target;  // rows of the second logits; those of the logits are `group`

    explicit Columns(const Call &call_) : Tiles<T>(call_) {}

    bool has_memory() const { return memory.start && Tiles<T>::has_memory(); }

    Group &current() { return group; }
    Group &target() { return of_target; }

    // ---- Sums, in the order of the contract ----

    // The sums of terms(j), a register of rows or two, over n classes of a tile, in float64. Those of
    // EXPONENTIALS are one lane in a short row. The lanes of the first term are folded in its own type if NARROW.
    template <bool EXPONENTIALS, bool NARROW, class F>
    FORCED auto sum_tile(Index n, F terms) {
        decltype(terms(n)) sums = {};
        if (EXPONENTIALS && are_short()) {
            UNROLLED for (Index j = 0; j < n; j++) sums = sums + terms(j);
            return widened(sums);
        }
        const Index used = least(n, lanes<T>);
        for (Index j = 0; j < used; j++)
            put<true>(j, terms(j));
        for (Index j = used; j < n; j++)
            put<false>(j & (lanes<T> - 1), terms(j));
        return folded<NARROW>(sums, used);
    }

    template <class W>
    static FORCED auto widened(W x) {
        return widen(x);
    }

    template <class W>
    static FORCED auto widened(Two<W, W> x) {
        return pack(widen(x.a), widen(x.b));
    }

    // A term into the accumulators of a lane, or to what is there unless it is NEW.
    template <bool NEW, class W>
    FORCED void put(Index lane, W term) const {
        put<NEW>(first, lane, term);
    }

    template <bool NEW, class W>
    FORCED void put(Index lane, Two<W, W> term) const {
        put<NEW>(first, lane, term.a);
        put<NEW>(second, lane, term.b);
    }

    template <bool NEW, class W>
    static FORCED void put(void *sums, Index lane, W term) {
        W &to = ((W *) sums)[lane];
        to = NEW ? term : to + term;
    }

    // The lanes in use, folded by halves; the first argument says what they hold.
    template <bool NARROW, class W>
    FORCED auto folded(W, Index used) const {
        return fold<NARROW, W>(first, used);
    }

    template <bool NARROW, class W>
    FORCED auto folded(Two<W, W>, Index used) const {
        return pack(fold<NARROW, W>(first, used), fold<false, W>(second, used));
    }

    template <bool NARROW, class W>
    static FORCED auto fold(void *sums, Index used) {
        typedef decltype(widen(W())) Wider;
        if constexpr (NARROW)
            return widen(fold_halves((W *) sums, used));
        Wider *to = (Wider *) sums;
        for (Index i = used; i-- > 0;)  // from the last one, as these are larger
            to[i] = widen(((W *) sums)[i]);
        return fold_halves(to, used);
    }

    template <class W>
    static FORCED W fold_halves(W *at, Index used) {
        for (Index half = lanes<T> / 2; half > 0; half /= 2) {
            for (Index i = half; i < used; i++)
                at[i - half] = at[i - half] + at[i];
            used = least(used, half);
        }
        return at[0];
    }

    // Numbers of a vector of rows in float64, plus those of x.
    static FORCED void add_to(double *values, Doubles<T> x) {
        store_all(values, load_doubles<T>(values) + x);
    }

    // ---- Read ----

    // What a tile of classes j to j + n has at the labels.
    void read_labels(Index j, Index n, const T *tile, double *to) const {
        for (Index i = 0; call.labels && i < group.count; i++) {
            const Index y = group.label[i] - j;
            if (y >= 0 && y < n)
                to[i] = tile[y * GROUP + i];
        }
    }

    // Classes j to j + n of logits, times tau.
    void fetch_tempered(const Operand &of, Index j, Index n, T *to) const {
        fetch(of, j, n, to);
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
            fetch(call.second(), j, n, to);
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
                fetch(call.second(), j, n, u);
                fold_weighted_tile(n);
                continue;
            }
            const bool fresh = j == 0 && !call.state;
            raise_maxima(n, fresh);
            call.entropic() ? fold_tile<ENTROPIC>(group, v, n, kept)
                            : fold_tile<NOWHERE>(group, v, n, kept);
            if (call.spread() || call.divergent())
                fetch_target(j, n, u);
            if (call.spread())
                fold_target(n, before);
            if (call.divergent()) {
                raise_targets(n, fresh, before);
                fold_tile<DIVERGENT>(of_target, u, n, kept_targets);
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
        for (Index w = 0; w < GROUP; w += V::count) {
            V top = spread<V>(-(T) INFINITY);
            for (Index j = 0; j < n; j++)
                top = maximum(load_vector<V>(of + j * GROUP + w), top);
            store_all(tops + w, top);
        }
        for (Index w = 0; w < GROUP && fresh; w += V::count) {
            const Doubles<T> top = widen(load_vector<V>(tops + w));
            store_all(rows.m + w, top);
            store_all(rows.n + w, exponents_of(top));
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

    // 0 for rows that are `sound`, 1 for the others.
    static FORCED Doubles<T> unsound(V m, Doubles<T> sums) {
        const Doubles<T> one = spread<Doubles<T>>(1.0);
        const Doubles<T> unusable = where_gt(LARGEST, absolute(widen(m)), 0.0, one);
        return where_gt((double) INFINITY, absolute(sums), unusable, one);
    }

    // Calls exactly(i, state) for those of the group.
    template <class F>
    void add_exactly(Group &rows, Index w, Doubles<T> unsound, F exactly) const {
        double flags[V::count];
        store_all(flags, unsound);
        for (Index i = w; i < least(group.count, w + V::count); i++)
            if (flags[i - w] != 0) {
                State row = state_of(rows, i);
                exactly(i, row);
                set_state(rows, i, row);
            }
    }

    // Add a tile to the states of rows, whose maxima are at least its own. Leave the exponentials of short
    // rows in `terms`.
    template <Away AWAY>
    void fold_tile(Group &rows, const T *of, Index n, T *terms) {
        are_short() && call.out ? fold_tile<AWAY, true>(rows, of, n, terms)
                             : fold_tile<AWAY, false>(rows, of, n, terms);
    }

    template <Away AWAY, bool KEEPS>
    void fold_tile(Group &rows, const T *of, Index n, T *terms) {
        constexpr double unshift = Constants<double>::unshift;
        for (Index w = 0; w < group.count; w += V::count) {
            const auto window = windows_of<T>(load_doubles<T>(&rows.n[w]));
            const V m = load_as<T>(&rows.m[w]), m_of_x = load_as<T>(&group.m[w]);
            const V m_beside = where_gt(m_of_x, -(T) INFINITY, m_of_x, (T) 0);
            const T *from = of + w, *beside = v + w;
            T *keep = terms + w;
            V counts = {};
            auto term = [&](Index j) FORCED {
                V x = load_vector<V>(from + j * GROUP), e = window.terms(x);
                counts = counts + at_maximum(x, m, (T) 1);
                if (KEEPS)
                    store_all(keep + j * GROUP, e);
                V below = below_maximum(x, m, e);
                if constexpr (AWAY == ENTROPIC)
                    return pack(below, window.away(x, e, m));
                else if constexpr (AWAY == DIVERGENT) {
                    V other = load_vector<V>(beside + j * GROUP);
                    return pack(below, product(e, excess(other, m_beside, x, m)));
                } else
                    return below;
            };
            Doubles<T> below, away = {};
            if constexpr (AWAY == NOWHERE)
                below = sum_tile<true, true>(n, term) * unshift;
            else {
                auto [sum, other] = sum_tile<true, true>(n, term);
                below = sum * unshift, away = other * unshift;
            }
            Doubles<T> equal = widen(counts);
            if (!sound<T>(m, below)) {
                const Doubles<T> bad = unsound(m, below);
                add_exactly(rows, w, bad, [&](Index i, State &row) {
                    sum_exactly(of + i, (T) 1, GROUP, n, row);
                    if (AWAY != NOWHERE)
                        sum_away_exactly<AWAY>(
                            of + i, v + i, finite_or_zero(group.m[i]), (T) 1, GROUP, n, row
                        );
                });
                for (Doubles<T> *sums : {&below, &equal, &away})
                    *sums = where_eq(bad, 0.0, *sums, 0.0);
            }
            add_to(rows.added + w, below);
            add_to(rows.k + w, equal);
            if (AWAY != NOWHERE)
                add_to(rows.away_added + w, away);
        }
    }

    void fold_weighted_tile(Index n) {
        mask_block(v, u, n * GROUP, v);
        raise_maxima(n, false);
        for (Index w = 0; w < group.count; w += V::count) {
            const auto window = windows_of<T>(load_doubles<T>(&group.n[w]));
            const V m = load_as<T>(&group.m[w]);
            const T *from = v + w, *weights = u + w;
            auto [below, equal] = sum_tile<true, false>(n, [&](Index j) FORCED {
                V x = load_vector<V>(from + j * GROUP);
                return weighted_terms(x, load_vector<V>(weights + j * GROUP), m, window.terms(x));
            });
            if (!sound<T>(m, below + equal)) {
                const Doubles<T> bad = unsound(m, below + equal);
                add_exactly(group, w, bad, [&](Index i, State &row) {
                    sum_weighted_exactly(v + i, u + i, GROUP, n, row);
                });
                below = where_eq(bad, 0.0, below, 0.0), equal = where_eq(bad, 0.0, equal, 0.0);
            }
            add_to(group.added + w, below);
            add_to(group.k + w, equal);
        }
    }

    // Add a tile to distances and mass; `before` has the maxima that the distances so far refer to.
    void fold_target(Index n, const double *before) {
        for (Index w = 0; w < group.count; w += V::count) {
            const V m = load_as<T>(&group.m[w]);
            const V tops = where_gt(m, -(T) INFINITY, m, (T) 0);
            const T *from = v + w, *targets = u + w;
            auto [sums, mass] = sum_tile<false, false>(n, [&](Index j) FORCED {
                V target = load_vector<V>(targets + j * GROUP);
                return pack(distance(load_vector<V>(from + j * GROUP), target, tops), target);
            });
            const Doubles<T> moved = distance(
                load_doubles<T>(before + w), load_doubles<T>(&group.mass[w]), load_doubles<T>(&group.m[w])
            );
            add_to(group.distances + w, moved + sums);
            add_to(group.mass + w, mass);
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
                fetch(call.inputs[k], j, n, tiles[k]);
            for (Index w = 0; w < group.count; w += V::count)
                add_to(group.value + w, sum_tile<false, false>(n, [&](Index i) FORCED {
                    auto input = [&](int k) FORCED {
                        return load_vector<V>(tiles[k] + i * GROUP + w);
                    };
                    return spread<V>(F::of(input, nullptr));
                }));
        }
    }

    // ---- Write ----

    // What has the shape of the rows, a few classes at a time.
    void write(bool) {
        if (!call.out)
            return;
        Scalars<T> scalars[GROUP / V::count], of_targets[GROUP / V::count];
        for (Index w = 0; w < GROUP; w += V::count) {
            scalars[w / V::count] = Scalars<T>(group, w);
            if (call.divergent())
                of_targets[w / V::count] = Scalars<T>(of_target, w);
        }
        // whether the tiles still hold what there is
        const bool whole =
            call.classes <= BLOCK && !call.capped() && !call.state && call.operation != NLL_LOSS;
        for (Index j = 0; j < call.classes; j += FEW) {
            const Index n = least(FEW, call.classes - j);
            T *logits = whole ? v + j * GROUP : v, *targets = whole ? u + j * GROUP : u;
            const bool keeps = whole && are_short();
            if (call.operation == NLL_LOSS)
                for (Index at = 0; at < n * GROUP; at += V::count)
                    store_all(out + at, scalars[at % GROUP / V::count].factor);
            else {
                if (!whole)
                    fetch_logits(j, n, logits);
                call.log() ? write_logarithms(scalars, logits, n)
                           : write_tile(group, scalars, logits, keeps ? kept : nullptr, n, out);
            }
            if (call.entropic())
                make_slopes(logits, n);
            if (!whole && (call.spread() || call.divergent()))
                fetch_target(j, n, targets);
            if (call.spread())
                subtract_tile(targets, n);
            if (call.divergent()) {
                write_tile(of_target, of_targets, targets, keeps ? kept_targets : nullptr, n, slope);
                subtract_block(out, slope, n * GROUP, (T) 1);
            }
            if (call.capped())
                multiply_block(out, slope, n * GROUP);
            if (call.labels || call.sample)
                write_labels(j, n);
            deliver(call.out, j, n, out);
        }
    }

    // Gradients less those of the targets; see `subtract_block`.
    void subtract_tile(const T *target, Index n) {
        for (Index w = 0; w < group.count; w += V::count) {
            const Register<T> upstream = load_as<T>(&group.upstream[w]);
            for (Index at = w; at < n * GROUP; at += GROUP)
                store_all(
                    out + at, less_target(load_vector<V>(out + at), load_vector<V>(target + at), upstream)
                );
        }
    }

    // Gradients of entropies from probabilities; see `slope_block`.
    void make_slopes(const T *logits, Index n) {
        for (Index w = 0; w < group.count; w += V::count) {
            const Register<T> m = load_as<T>(&group.m[w]), mean = load_as<T>(&group.mean[w]);
            for (Index at = w; at < n * GROUP; at += GROUP)
                store_all(
                    out + at, entropy_slope(load_vector<V>(out + at), load_vector<V>(logits + at), m, mean)
                );
        }
    }

    // Logarithms of probabilities of n classes.
    void write_logarithms(const Scalars<T> *scalars, const T *logits, Index n) {
        for (Index j = 0; j < n * GROUP; j += GROUP)
            for (Index w = 0; w < GROUP; w += V::count) {
                const Scalars<T> &of = scalars[w / V::count];
                store_all(out + j + w, log_probability(load_vector<V>(logits + j + w), of.m, of.log_s));
            }
    }

    // Probabilities of n classes; see `Rows::write_block_anew`. Of exponentials in `terms` unless NULL.
    void write_tile(
        const Group &rows, const Scalars<T> *scalars, const T *logits, const T *terms, Index n, T *results
    ) const {
        for (Index w = 0; w < group.count; w += V::count) {
            const Scalars<T> &of = scalars[w / V::count];
            auto write = [&](auto anew, auto tiny) FORCED {
                const auto [window, m, log_s, factor, scale, rest, peak, _] = of;
                const T *from = (anew ? logits : terms) + w;
                UNROLLED for (Index j = 0; j < n; j++) {
                    const V x = load_vector<V>(from + j * GROUP), e = anew ? window.terms(x) : x;
                    const V p = probability(e, peak, factor, scale);
                    store_all(results + w + j * GROUP, tiny ? where_eq(e, peak, factor, p * rest) : p);
                }
            };
            const std::true_type yes;
            const std::false_type no;
            if (terms)
                of.tiny ? write(no, yes) : write(no, no);
            else
                of.tiny ? write(yes, yes) : write(yes, no);
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
