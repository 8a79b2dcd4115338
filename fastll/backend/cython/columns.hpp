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
constexpr Index WHOLE_SIZE = 1 << 21;  // bytes of a group's rows up to which their tiles are kept

// What makes results of a vector of rows of their exponentials or logits.
template <class T>
struct Scalars {
    typedef Register<T> V;

    Window<T, V> window;
    V m, log_s, factor, scale, rest, peak;
    V upper, lower;  // to the references of these rows from others
    bool tiny;  // whether any `rest` is not 1

    Scalars() = default;
    Scalars(const Group &group, Index w)
        : window(windows_of<T>(load_doubles<T>(&group.n[w]))), m(load_as<T>(&group.m[w])),
          log_s(load_as<T>(&group.log_s[w])),
          factor(load_as<T>(&group.factor[w])), scale(load_as<T>(&group.scale[w])),
          rest(load_as<T>(&group.rest[w])), peak(window.terms(m)),
          upper(spread<V>((T) 1)), lower(spread<V>((T) 1)),
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
    using Tiles<T>::by_rows;

    const Index tile = GROUP * round_up(least(BLOCK, call.classes), piece<T>);
    const Index few = GROUP * round_up(least(FEW, call.classes), piece<T>);
    const Index blocks = (call.classes + BLOCK - 1) / BLOCK;
    // whether tiles may be kept until rows are written, and whether exponentials are
    const bool whole = call.out && blocks * tile * (Index) sizeof(T) <= WHOLE_SIZE && !call.capped() &&
                       !call.state && call.operation != NLL_LOSS;
    const bool keeps = whole && !call.log() && (are_short() || !(call.second() || call.spread()));
    // tiles of an array; whether they are all of a row's, until it is written
    const Index tiles = whole && (!keeps || call.entropic()) ? blocks + 1 : 2;
    const bool holds = whole && tiles > blocks;
    Memory memory{
        ((2 * tiles + blocks * keeps) * tile + 6 * few) * (Index) sizeof(T) + SUMS +
        blocks * GROUP * (Index) sizeof(double)
    };
    Feed<T> logits{call.x(), call.classes, tile, tiles, memory.take<T>(tiles * tile)};
    Feed<T> seconds{call.second(), call.classes, tile, tiles, memory.take<T>(tiles * tile)};
    Place next = {0, 0, 0};  // of the rows after the group's; none if there are none
    T *v = logits.tiles, *u = seconds.tiles;  // logits, capped; weights or targets
    // of FEW classes: derivatives of the soft cap, and what is written
    T *slope = memory.take<T>(few), *out = memory.take<T>(few);
    // exponentials, and those of short second rows
    T *kept = memory.take<T>(keeps ? blocks * tile : few), *kept_targets = memory.take<T>(few);
    double *references = memory.take<double>(blocks * GROUP);  // their exponents
    T *again = memory.take<T>(few), *targets_again = memory.take<T>(few);  // what is read once more
    T tops[GROUP];  // maxima of the rows of the tile that was read last
    // sums of the rows, of up to two terms in float64, for each lane that an element may go to
    static constexpr Index SUMS = lanes<T> * 2 * GROUP * (Index) sizeof(double);
    char *const sums = memory.take<char>(SUMS);
    Group of_target;  // rows of the second logits; those of the logits are `group`

    explicit Columns(const Call &call_) : Tiles<T>(call_) {}

    bool has_memory() const { return memory.start && Tiles<T>::has_memory(); }

    Group &current() { return group; }
    Group &target() { return of_target; }

    // ---- Sums, in the order of the contract ----

    // Bytes of the sums of a lane, of a term of a register or two of rows.
    template <class S>
    static constexpr Index LANE = GROUP / V::count * (Index) sizeof(S);

    // Sums over n classes of a tile of terms(j, w), an S for the rows of the register from w on. Exponentials
    // of short rows are ONE_LANE. Meanwhile, the next tiles are read: class by class, as the CPU looks no
    // further ahead.
    template <class S, bool ONE_LANE, class F>
    FORCED void sum_tile(Index n, F terms) {
        const Index count = group.count;
        char *const at = sums;
        memset(at, 0, lanes_of<ONE_LANE>(n) * LANE<S>);
        auto add = [&](Index j, auto classes) FORCED {
            char *const lane = at + (ONE_LANE ? 0 : j % lanes<T> * LANE<S>);
            for (Index w = 0; w < count; w += V::count)
                UNROLLED for (Index k = 0; k < classes; k++)
                    put(lane + k * LANE<S>, w, terms(j + k, w));
            logits.advance(j + classes, n);
            seconds.advance(j + classes, n);
        };
        const std::integral_constant<Index, ONE_LANE ? 1 : 2> some;
        Index j = 0;
        for (; j + some <= n; j += some)
            add(j, some);
        if (j < n)
            add(j, std::integral_constant<Index, 1>());
    }

    // A term into the sum of a lane.
    template <class W>
    static FORCED void put(char *lane, Index w, W term) {
        typename W::number *to = (typename W::number *) lane + w;
        store_all(to, load_vector<W>(to) + term);
    }

    template <class W>
    static FORCED void put(char *lane, Index w, Two<W, W> term) {
        put(lane, w, term.a);
        put(lane + LANE<W>, w, term.b);
    }

    // The sums of rows from w on in float64, of the lanes in use, folded by halves: the first ones in their
    // own type if NARROW.
    template <class S, bool NARROW>
    FORCED auto folded(Index w, Index used) const {
        if constexpr (std::is_same_v<S, V>)
            return fold<NARROW, V>(sums, LANE<S>, w, used);
        else {
            typedef decltype(S().a) W;
            return pack(
                fold<NARROW, W>(sums, LANE<S>, w, used), fold<false, W>(sums + LANE<W>, LANE<S>, w, used)
            );
        }
    }

    template <bool NARROW, class W>
    static FORCED auto fold(const char *sums, Index step, Index w, Index used) {
        auto sum = [=](Index lane) FORCED {
            return load_vector<W>((const typename W::number *) (sums + lane * step) + w);
        };
        auto wide = [=](Index lane) FORCED { return widen(sum(lane)); };
        if constexpr (NARROW)
            return widen(fold_halves<W>(sum, used));
        else
            return fold_halves<decltype(wide(0))>(wide, used);
    }

    template <class W, class F>
    static FORCED W fold_halves(F sum, Index used) {
        W at[lanes<T>];
        for (Index i = 0; i < used; i++)
            at[i] = sum(i);
        for (Index half = lanes<T> / 2; half > 0; half /= 2) {
            for (Index i = half; i < used; i++)
                at[i - half] = at[i - half] + at[i];
            used = least(used, half);
        }
        return at[0];
    }

    // Of how many lanes the sums of n classes are.
    template <bool ONE_LANE>
    static Index lanes_of(Index n) {
        return ONE_LANE ? 1 : least(n, lanes<T>);
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

    // The next tile of an operand, of classes from j on. After it, others are read.
    T *take(Feed<T> &feed, Index j) {
        if (by_rows(feed.of)) {
            fetch(feed.of, 0, call.classes, feed.tiles);
            find_tops(feed.tiles, call.classes);
            return feed.tiles;
        }
        T *taken = feed.take(group, j);
        memcpy(tops, feed.tops, sizeof tops);
        if (j + BLOCK < call.classes)
            feed.begin(group, j + BLOCK);
        else
            feed.begin(next, 0);
        return taken;
    }

    // Classes j to j + n of logits that were read, times tau.
    void temper(Index n, T *tile) const {
        if (call.tempered())
            scale_block(tile, n * GROUP, (T) call.options.inverse_temperature, tile);
    }

    // The same of x, with the soft cap where there is one, and what is at the labels.
    void cap(Index j, Index n, T *tile) {
        temper(n, tile);
        for (Index part = 0; part < n && call.capped(); part += FEW) {
            Index few = least(FEW, n - part);
            T *at = tile + part * GROUP;
            cap_block(at, few * GROUP, (T) call.options.softcap, at, slope);
            read_labels(j + part, few, slope, group.slope_y);
        }
        read_labels(j, n, tile, group.x_y);
    }

    void fetch_logits(Index j, Index n) {
        v = take(logits, j);
        cap(j, n, v);
        if (call.tempered() || call.capped())
            find_tops(v, n);
    }

    // The same once more, into a tile of their own.
    void fetch_anew(Index j, Index n, T *to) {
        fetch(call.x(), j, n, to);
        cap(j, n, to);
    }

    // Classes j to j + n of u, see `Rows::fetch_target`; or of the second logits.
    void fetch_target(Index j, Index n) {
        if (call.second())
            u = take(seconds, j);
        make_target(j, n, u);
        if (call.divergent() && call.tempered())
            find_tops(u, n);
    }

    // The same of what was read.
    void make_target(Index j, Index n, T *to) const {
        if (call.divergent())
            return temper(n, to);
        const double eps = call.options.label_smoothing;
        const T *w = (const T *) call.weight.address;
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
            fetch_logits(j, n);
            memcpy(before, group.m, sizeof before);
            if (call.weighted()) {
                u = take(seconds, j);
                fold_weighted_tile(n);
                continue;
            }
            const bool fresh = j == 0 && !call.state;
            raise_maxima(fresh);
            memcpy(references + j / BLOCK * GROUP, group.n, sizeof group.n);
            T *const terms = keeps ? kept + j / BLOCK * tile : kept;
            call.entropic() ? fold_tile<ENTROPIC>(group, v, n, terms)
                            : fold_tile<NOWHERE>(group, v, n, terms);
            if (call.spread() || call.divergent())
                fetch_target(j, n);
            if (call.spread())
                fold_target(n, before);
            if (call.divergent()) {
                raise_targets(fresh, before);
                fold_tile<DIVERGENT>(of_target, u, n, kept_targets);
            }
        }
    }

    // A fold of log-probabilities: the distances alone.
    void fold_targets() {
        for (Index j = 0; j < call.classes && call.spread(); j += BLOCK) {
            Index n = least(BLOCK, call.classes - j);
            fetch_logits(j, n);
            fetch_target(j, n);
            fold_target(n, group.m);
        }
    }

    // The maxima of a tile's rows.
    void find_tops(const T *of, Index n) {
        for (Index w = 0; w < group.count; w += V::count) {
            V top = spread<V>(-(T) INFINITY);
            UNROLLED for (Index j = 0; j < n; j++) top = maximum(load_vector<V>(of + j * GROUP + w), top);
            store_all(tops + w, top);
        }
    }

    // Those of the tile, as those of rows that have none yet.
    void set_maxima(Group &rows) const {
        for (Index w = 0; w < GROUP; w += V::count) {
            const Doubles<T> top = widen(load_vector<V>(tops + w));
            store_all(rows.m + w, top);
            store_all(rows.n + w, exponents_of(top));
        }
    }

    // The rows' maxima with those of a tile, which are `fresh` if they have none yet.
    void raise_maxima(bool fresh) {
        if (fresh)
            return set_maxima(group);
        for (Index i = 0; i < group.count; i++)
            if (tops[i] > group.m[i]) {
                State row = state_of(group, i);
                raise_maximum(row, tops[i], tops[i] - row.m);
                set_state(group, i, row);
            }
    }

    // Those of the targets, where those of the logits were the ones in `before`.
    void raise_targets(bool fresh, const double *before) {
        if (fresh)
            return set_maxima(of_target);
        for (Index i = 0; i < group.count; i++) {
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

    // What folding takes of the rows: their windows and maxima, those of the logits beside, and how many
    // elements are equal to the maximum.
    struct Maxima {
        T floor[GROUP], magic[GROUP], m[GROUP], beside[GROUP], counts[GROUP];
    };

    // Add a tile to the states of rows, whose maxima are at least its own. Leave the exponentials in `terms`
    // if they are kept.
    template <Away AWAY>
    void fold_tile(Group &rows, const T *of, Index n, T *terms) {
        if (are_short())
            keeps ? fold_tile<AWAY, true, true>(rows, of, n, terms)
                  : fold_tile<AWAY, true, false>(rows, of, n, terms);
        else
            keeps ? fold_tile<AWAY, false, true>(rows, of, n, terms)
                  : fold_tile<AWAY, false, false>(rows, of, n, terms);
    }

    template <Away AWAY, bool ONE_LANE, bool KEEPS>
    void fold_tile(Group &rows, const T *of, Index n, T *terms) {
        typedef std::conditional_t<AWAY == NOWHERE, V, Two<V, V>> Terms;
        constexpr double unshift = Constants<double>::unshift;
        const T *const logits_beside = v;
        Maxima of_rows;
        for (Index w = 0; w < group.count; w += V::count) {
            const auto window = windows_of<T>(load_doubles<T>(&rows.n[w]));
            const V m_of_x = load_as<T>(&group.m[w]);
            store_all(of_rows.floor + w, window.floor);
            store_all(of_rows.magic + w, window.magic);
            store_all(of_rows.m + w, load_as<T>(&rows.m[w]));
            store_all(of_rows.beside + w, where_gt(m_of_x, -(T) INFINITY, m_of_x, (T) 0));
            store_all(of_rows.counts + w, V());
        }
        sum_tile<Terms, ONE_LANE>(n, [&](Index j, Index w) FORCED {
            const V x = load_vector<V>(of + j * GROUP + w), m = load_vector<V>(of_rows.m + w);
            const V floor = load_vector<V>(of_rows.floor + w), magic = load_vector<V>(of_rows.magic + w);
            const Window<T, V> window = {floor, magic};
            const V e = window.terms(x), counts = load_vector<V>(of_rows.counts + w);
            store_all(of_rows.counts + w, counts + at_maximum(x, m, (T) 1));
            if (KEEPS)
                store_all(terms + j * GROUP + w, e);
            const V below = below_maximum(x, m, e);
            if constexpr (AWAY == ENTROPIC)
                return pack(below, window.away(x, e, m));
            else if constexpr (AWAY == DIVERGENT) {
                const V m_beside = load_vector<V>(of_rows.beside + w);
                const V other = load_vector<V>(logits_beside + j * GROUP + w);
                return pack(below, product(e, excess(other, m_beside, x, m)));
            } else
                return below;
        });
        for (Index w = 0; w < group.count; w += V::count) {
            const V m = load_vector<V>(of_rows.m + w);
            const auto sum = folded<Terms, true>(w, lanes_of<ONE_LANE>(n));
            Doubles<T> below, away = {}, equal = widen(load_vector<V>(of_rows.counts + w));
            if constexpr (AWAY == NOWHERE)
                below = sum * unshift;
            else
                below = sum.a * unshift, away = sum.b * unshift;
            if (!sound<T>(m, below)) {
                const Doubles<T> bad = unsound(m, below);
                add_exactly(rows, w, bad, [&](Index i, State &row) {
                    sum_exactly(of + i, (T) 1, GROUP, n, row);
                    if (AWAY != NOWHERE)
                        sum_away_exactly<AWAY>(
                            of + i, v + i, finite_or_zero(group.m[i]), (T) 1, GROUP, n, row
                        );
                });
                for (Doubles<T> *part : {&below, &equal, &away})
                    *part = where_eq(bad, 0.0, *part, 0.0);
            }
            add_to(rows.added + w, below);
            add_to(rows.k + w, equal);
            if (AWAY != NOWHERE)
                add_to(rows.away_added + w, away);
        }
    }

    void fold_weighted_tile(Index n) {
        are_short() ? fold_weighted_tile<true>(n) : fold_weighted_tile<false>(n);
    }

    template <bool ONE_LANE>
    void fold_weighted_tile(Index n) {
        typedef Two<Doubles<T>, Doubles<T>> Terms;
        mask_block(v, u, n * GROUP, v);
        find_tops(v, n);
        raise_maxima(false);
        sum_tile<Terms, ONE_LANE>(n, [&](Index j, Index w) FORCED {
            const Index at = j * GROUP + w;
            const auto window = windows_of<T>(load_doubles<T>(&group.n[w]));
            const V x = load_vector<V>(v + at), b = load_vector<V>(u + at);
            return weighted_terms(x, b, load_as<T>(&group.m[w]), window.terms(x));
        });
        for (Index w = 0; w < group.count; w += V::count) {
            const V m = load_as<T>(&group.m[w]);
            auto [below, equal] = folded<Terms, false>(w, lanes_of<ONE_LANE>(n));
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
        typedef Two<V, V> Terms;
        T highest[GROUP];
        for (Index w = 0; w < group.count; w += V::count) {
            const V m = load_as<T>(&group.m[w]);
            store_all(highest + w, where_gt(m, -(T) INFINITY, m, (T) 0));
        }
        sum_tile<Terms, false>(n, [&](Index j, Index w) FORCED {
            const Index at = j * GROUP + w;
            V target = load_vector<V>(u + at);
            return pack(distance(load_vector<V>(v + at), target, load_vector<V>(highest + w)), target);
        });
        for (Index w = 0; w < group.count; w += V::count) {
            auto [sums, mass] = folded<Terms, false>(w, lanes_of<false>(n));
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
            const T *inputs[] = {v, u};
            for (int k = 0; k < F::inputs; k++)
                inputs[k] = take(k == 0 ? logits : seconds, j);
            sum_tile<V, false>(n, [&](Index i, Index w) FORCED {
                auto input = [&](int k) FORCED { return load_vector<V>(inputs[k] + i * GROUP + w); };
                return spread<V>(F::of(input, nullptr));
            });
            for (Index w = 0; w < group.count; w += V::count)
                add_to(group.value + w, folded<V, false>(w, lanes_of<false>(n)));
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
        bool unusable = false, kept_do = keeps;
        for (Index i = 0; i < group.count; i++) {
            unusable |= !usable(group.m[i]);
            kept_do &= blocks == 1 || group.sample[i] == 0 || is_moderate(call, group, i);
        }
        for (Index j = 0; j < call.classes; j += FEW) {
            const Index n = least(FEW, call.classes - j);
            const Index block = j / BLOCK, at = j % BLOCK * GROUP;
            T *x = again, *targets = targets_again;
            if (holds)
                x = logits.block(j) + at, targets = (call.second() ? seconds.block(j) : u) + at;
            const T *terms = kept_do ? kept + block * tile + at : nullptr;
            if (call.operation == NLL_LOSS)
                for (Index to = 0; to < n * GROUP; to += V::count)
                    store_all(out + to, scalars[to % GROUP / V::count].factor);
            else {
                if (!holds && (!kept_do || unusable))
                    fetch_anew(j, n, x);
                if (kept_do && blocks > 1 && at == 0)
                    lift(block, scalars);
                call.log() ? write_logarithms(scalars, x, n) : write_tile(group, scalars, x, terms, n, out);
            }
            if (call.entropic())
                make_slopes(x, n);
            if (!holds && (call.spread() || call.divergent())) {
                if (call.second())
                    fetch(call.second(), j, n, targets);
                make_target(j, n, targets);
            }
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
            logits.advance(j + n, call.classes);
            seconds.advance(j + n, call.classes);
        }
    }

    // What brings kept exponentials of a block to the rows' last references.
    void lift(Index block, Scalars<T> *scalars) const {
        T uppers[GROUP], lowers[GROUP];
        for (Index i = 0; i < GROUP; i++) {
            auto [upper, lower] = lift_of<T>(references[block * GROUP + i], group.n[i]);
            uppers[i] = upper, lowers[i] = lower;
        }
        for (Index w = 0; w < GROUP; w += V::count) {
            scalars[w / V::count].upper = load_vector<V>(uppers + w);
            scalars[w / V::count].lower = load_vector<V>(lowers + w);
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
            auto write = [&](auto anew, auto lifted, auto tiny) FORCED {
                const auto [window, m, log_s, factor, scale, rest, peak, upper, lower, _] = of;
                const T *from = (anew ? logits : terms) + w;
                UNROLLED for (Index j = 0; j < n; j++) {
                    const V x = load_vector<V>(from + j * GROUP);
                    const V e = anew ? window.terms(x) : lifted ? x * upper * lower : x;
                    const V p = probability(e, peak, factor, scale);
                    store_all(results + w + j * GROUP, tiny ? where_eq(e, peak, factor, p * rest) : p);
                }
            };
            const std::true_type yes;
            const std::false_type no;
            if (!terms)
                of.tiny ? write(yes, no, yes) : write(yes, no, no);
            else if (of.tiny || blocks > 1)
                write(no, yes, yes);
            else
                write(no, no, no);
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
