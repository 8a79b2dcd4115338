// Folds of rows whose class axis is the faster one in memory: row by row, block by block.
//
// A group of rows is small enough for the second-level cache, where folding leaves its exponentials for
// writing. Where nothing but a factor is missing from them, a group is written while the next one is
// folded, so that memory and arithmetic are both busy all the time.
//
// S is what logits and results are stored as: T, or 16 bits, if there are no options (`is_plain`). Other halves
// become T first.

#pragma once

#include "blocks.hpp"
#include "halves.hpp"

namespace {

constexpr Index GROUP_SIZE = 1 << 18;  // bytes of a group's rows, where they are written too
constexpr Index ROW_SIZE = 1 << 19;  // bytes of a row up to which its exponentials are kept

// Exponentials of a row that were kept, and what makes probabilities of them.
template <class T>
struct Kept {
    const T *terms;
    T peak, factor, scale;

    FORCED Vec<T> at(Index j, Index count) const {
        return probability(load(terms + j, count, T()), peak, factor, scale);
    }
};

// A row that has been folded and is being written.
template <class T, class S>
struct Pending {
    S *out;
    Index j, n;  // elements from j to n are left
    bool log, streamed;
    Away away;
    Kept<T> kept, target;
    const S *logits;  // of `log_probability` and `entropy_slope`
    T m, log_s, mean, tau;

    // Elements j to j + count, at most a vector.
    template <Away AWAY, bool TEMPERED>
    FORCED void write(Index j_, Index count) const {
        auto logit = [=]() FORCED { return load_from(logits + j_, count, T()); };
        Vec<T> x = AWAY == NOWHERE && log ? log_probability(logit(), m, log_s) : kept.at(j_, count);
        if constexpr (AWAY == ENTROPIC)
            x = entropy_slope(x, TEMPERED ? logit() * tau : logit(), m, mean);
        if constexpr (AWAY == DIVERGENT)
            x = x - target.at(j_, count);
        if (streamed)
            stream_to(out + j_, count, x);
        else
            store_to(out + j_, count, x);
    }

    // All up to element `end`.
    template <Away AWAY, bool TEMPERED = false>
    void write_until(Index end) {
        for (; j + lanes<T> <= end; j += lanes<T>)
            write<AWAY, TEMPERED>(j, lanes<T>);
        write<AWAY, TEMPERED>(j, end - j);
        j = end;
    }

    void write_until(Index end) {
        if (away == ENTROPIC)
            tau != 1 ? write_until<ENTROPIC, true>(end) : write_until<ENTROPIC>(end);
        else
            away == DIVERGENT ? write_until<DIVERGENT>(end) : write_until<NOWHERE>(end);
    }
};

// A row's blocks of logits, of which the next one is there while one is folded.
template <class S>
struct Ahead {
    S *buffer, *next;  // for those that are not in place: the one that is folded, and the next one
    const S *block;  // the next one, which after the last is empty
    Index count;
    double top;  // its maximum
};

template <class T, class S = T>
struct Rows {
    static constexpr bool has_options = std::is_same_v<S, T>;

    const Call &call;
    const Index arrays = call.divergent() ? 2 : 1;  // of logits
    const Index bytes = arrays * call.classes * (Index) sizeof(T);  // of a row
    // whether exponentials are kept for writing
    const bool keeps = call.out && !call.log() && !call.capped() && !call.state &&
                       call.operation != NLL_LOSS && bytes <= ROW_SIZE;
    // whether a group is written while the next one is folded
    const bool interleaves = call.out && call.out.lies_as<S>() && !call.state &&
                             (call.log() || (keeps && !call.spread())) &&
                             (call.x().lies_as<S>() || !(call.log() || call.entropic()));
    // rows in a group: as many as writing finds in the cache
    const Index most =
        call.out && bytes > 0 ? least(GROUP, GROUP_SIZE / bytes + (GROUP_SIZE < bytes)) : GROUP;
    const Index pitch = (call.classes + 31) / 32 * 32;  // elements from a row's exponentials to the next
    const Index blocks = call.classes / BLOCK + 1;
    const T tau = (T) call.options.inverse_temperature;
    Memory memory{(5 * BLOCK + arrays * (2 * keeps * most * pitch + 2 * blocks)) * (Index) sizeof(T)};
    // a block each
    S *x = memory.take<S>(BLOCK), *next = memory.take<S>(BLOCK), *out = memory.take<S>(BLOCK);
    T *u = memory.take<T>(BLOCK), *slope = memory.take<T>(BLOCK);
    // exponentials of the rows of two groups, and the reference exponent of each block of them
    T *const kept = keeps ? memory.take<T>(arrays * 2 * most * pitch) : nullptr;
    double *exponents = memory.take<double>(arrays * blocks);
    Group groups[2], of_targets[2];  // rows of the logits, and of the second logits
    Group *group = &groups[0], *before = &groups[1];
    Ahead<S> logits{x, next};
    Ahead<T> targets{u, slope};
    Pending<T, S> pending;

    explicit Rows(const Call &call_) : call(call_) { group->count = before->count = 0; }

    bool has_memory() const { return memory.start; }

    Group &current() { return *group; }
    Group &target() { return of_targets[group - groups]; }

    // Where the exponentials of row i are kept, or NULL; those of its target are `pitch` further on.
    T *kept_of(const Group &rows, Index i) const {
        return kept ? kept + ((&rows - groups) * most + i) * arrays * pitch : nullptr;
    }

    // Block of logits from j on, with the soft cap where there is one; its derivative into `slope_to`.
    template <class B>
    const B *fetch_capped(
        const Operand &of, const char *start, Index j, Index n, B *buffer, T *slope_to = nullptr
    ) const {
        const B *v = of.fetch(start, j, n, buffer);
        if constexpr (has_options)
            if (call.capped()) {
                cap_block(v, n, (T) call.options.softcap, buffer, slope_to);
                return buffer;
            }
        return v;
    }

    // The same times tau.
    template <class B>
    const B *fetch_logits(
        const Operand &of, const char *start, Index j, Index n, B *buffer, T *slope_to = nullptr
    ) const {
        const B *v = fetch_capped(of, start, j, n, buffer, slope_to);
        if constexpr (has_options)
            if (call.tempered()) {
                scale_block(v, n, tau, buffer);
                return buffer;
            }
        return v;
    }

    // A maximum of logits times tau, as rounded as these.
    double tau_times(double top) const { return (T) top * tau; }

    // u = w ((1 - eps) t + eps / C) of the contract, or without t, w eps / C.
    const T *fetch_target(const char *start, Index j, Index n) const {
        double eps = call.options.label_smoothing;
        const T *t = call.second().fetch(start, j, n, u);
        const T *w = call.weight ? (const T *) call.weight.address + j : nullptr;
        if (t && !w && eps == 0)
            return t;
        target_block(t, w, n, (T) (1 - eps), (T) (eps / (double) call.classes), u);
        return u;
    }

    // The block of logits from j on, not yet times tau, as the next one; the one before it stays where it is.
    template <class B>
    void fetch_next(const Operand &of, const char *start, Index j, Ahead<B> &ahead) const {
        std::swap(ahead.buffer, ahead.next);
        ahead.count = least(BLOCK, call.classes - j);
        ahead.block = fetch_capped(of, start, j, ahead.count, ahead.next);
        if (j == 0)
            ahead.top = tau_times(max_block(ahead.block, ahead.count));
    }

    // ---- Fold ----

    void fold() {
        for (Index i = 0; i < group->count; i++) {
            pending.j = pending.n = 0;
            if (i < before->count)
                begin_row(*before, i);
            if (group->sample[i] != 0 || call.lse)
                fold_row(i);
            if (i < before->count)
                write_row(*before, i);
        }
        write_rows(*before, group->count);
    }

    // A fold of log-probabilities: the distances alone.
    void fold_targets() {
        for (Index i = 0; i < group->count && call.spread(); i++) {
            const char *start = call.x().row(group->outer, group->inner + i);
            const char *second = call.second().row(group->outer, group->inner + i);
            for (Index j = 0; j < call.classes && group->sample[i] != 0; j += BLOCK) {
                Index n = least(BLOCK, call.classes - j);
                const T *v = fetch_logits(call.x(), start, j, n, slope);
                fold_target(i, v, fetch_target(second, j, n), n, group->m[i], group->m[i]);
            }
        }
    }

    // Add the elements of a row to its state; distances, mass and what is at the label.
    void fold_row(Index i) {
        const char *start = call.x().row(group->outer, group->inner + i);
        const char *second = call.second().row(group->outer, group->inner + i);
        T *terms = kept_of(*group, i);
        State row = state_of(*group, i), aim = {};
        fetch_next(call.x(), start, 0, logits);
        if (call.divergent()) {
            aim = state_of(target(), i);
            fetch_next(call.second(), second, 0, targets);
        }
        for (Index j = 0; j < call.classes; j += BLOCK) {
            const S *v = logits.block;
            const T *t = targets.block;
            const Index n = logits.count;
            const double m = row.m, top = logits.top, target_top = targets.top;
            T *kept_x = terms ? terms + j : nullptr, *kept_t = terms ? kept_x + pitch : nullptr;
            fetch_next(call.x(), start, j + n, logits);
            if constexpr (has_options)
                if (call.weighted()) {
                    fold_weighted_block(v, call.second().fetch(second, j, n, u), n, row);
                    continue;
                }
            if (top > row.m)
                raise_maximum(row, top, top - row.m);
            exponents[j / BLOCK] = row.n;
            if constexpr (!has_options) {
                fold_block<NOWHERE>(v, n, top, row, kept_x, logits);
                continue;
            } else {
                if (call.entropic())
                    fold_block<ENTROPIC>(v, n, top, row, kept_x, logits);
                else
                    fold_block<NOWHERE>(v, n, top, row, kept_x, logits);
                if (call.spread())
                    fold_target(i, v, fetch_target(second, j, n), n, m, row.m);
                if (call.divergent()) {
                    const double m_beside = finite_or_zero(row.m);
                    fetch_next(call.second(), second, j + n, targets);
                    raise_target(aim, target_top, m_beside - finite_or_zero(m));
                    fold_block<DIVERGENT>(t, n, target_top, aim, kept_t, targets, v, m_beside);
                    exponents[blocks + j / BLOCK] = aim.n;
                }
            }
        }
        set_state(*group, i, row);
        if (terms)
            merge_terms(terms, exponents, row.n);
        if (call.divergent()) {
            set_state(target(), i, aim);
            if (terms)
                merge_terms(terms + pitch, exponents + blocks, aim.n);
        }
        if (group->label[i] >= 0) {
            group->x_y[i] = fetch_logits(call.x(), start, group->label[i], 1, slope, u)[0];
            group->slope_y[i] = call.capped() ? u[0] : 1;
        }
    }

    // Add a block with maximum `top` to the state of a row, whose maximum is at least that. Leave its
    // exponentials in `terms` unless NULL. `beside` and its maximum are as for `sum_away_exactly`.
    template <Away AWAY, class B>
    void fold_block(
        const B *v, Index n, double top, State &row, T *terms, Ahead<B> &ahead, const T *beside = nullptr,
        double m_beside = 0
    ) {
        if (!usable(row.m)) {
            if (terms)
                memset(terms, 0, n * sizeof(T));  // correct for -inf; never read otherwise
            const T *numbers = numbers_of(v, n);
            sum_exactly(numbers, tau, 1, n, row);
            if (AWAY != NOWHERE)
                sum_away_exactly<AWAY>(numbers, beside, m_beside, tau, 1, n, row);
            ahead.top = tau_times(max_block(ahead.block, ahead.count));
        } else {  // by address, not inlined, so that each loop has all registers
            auto add = top < row.m ? &Rows::add_block<AWAY, false, false, B>
                                   : &Rows::add_block<AWAY, false, true, B>;
            if constexpr (has_options)
                if (call.tempered())
                    add = top < row.m ? &Rows::add_block<AWAY, true, false, B>
                                      : &Rows::add_block<AWAY, true, true, B>;
            (this->*add)(v, n, row, terms, ahead, beside, (T) m_beside);
        }
    }

    // Add the sum of exp(x) / 2**n over a block; AT_TOP: of the elements below m, and count those equal.
    // Meanwhile, write as much of the pending row, and find the maximum of the next block.
    template <Away AWAY, bool TEMPERED, bool AT_TOP, class B>
    void add_block(
        const B *v, Index n, State &row, T *terms, Ahead<B> &following, const T *beside, T m_beside
    ) {
        const T lowest = -(T) INFINITY, m = (T) row.m, tau = this->tau;
        const auto window = window_of<T>(row.n);
        auto times_tau = [=](Vec<T> x) FORCED { return TEMPERED ? x * tau : x; };
        const Pending<T, S> old = pending;
        const B *ahead = following.block;
        // what the sum's loop does not reach of the next block is at most a vector
        const Index whole_ahead = least(following.count, n) / lanes<T> * lanes<T>;
        // a gradient of two arrays is written while the second one is folded
        const bool writes = AWAY == DIVERGENT || !call.divergent();
        const Index ready = writes ? (old.n - old.j) / lanes<T> * lanes<T> : 0;
        Vec<T> counts = {}, away = {};
        Tops<B> tops;
        Vec<T> sums = sum_block<T>(n, [&](Index j, Index count) FORCED {
            if (j < whole_ahead) {
                prefetch_ahead(ahead + j);
                tops.raise(ahead + j);
            }
            Vec<T> x = times_tau(load_from(v + j, count, lowest)), e = window.terms(x);
            if (terms)
                store_all(terms + j, e);
            if (j < ready)
                old.template write<AWAY, TEMPERED>(old.j + j, lanes<T>);
            if constexpr (AWAY == ENTROPIC)
                away = away + window.away(x, e, splat(m));
            if constexpr (AWAY == DIVERGENT) {
                Vec<T> other = times_tau(load(beside + j, count, T()));
                away = away + product(e, excess(other, m_beside, x, m));
            }
            if constexpr (AT_TOP) {
                counts = counts + at_maximum(x, m, (T) 1);
                e = below_maximum(x, m, e);
            }
            return e;
        });
        pending.j += least(ready, (n + lanes<T> - 1) / lanes<T> * lanes<T>);
        const double rest = max_block(ahead + whole_ahead, following.count - whole_ahead);
        following.top = tau_times(std::max(rest, (double) largest(tops.in_lanes())));
        row.added += (double) narrow_total(sums) * Constants<double>::unshift;
        if (AWAY != NOWHERE)
            row.away_added += total(away) * Constants<double>::unshift;
        if (AT_TOP)
            row.k += (double) narrow_total(counts);
    }

    void fold_weighted_block(const T *v, const T *b, Index n, State &row) {
        mask_block(v, b, n, out);
        double top = max_block(out, n);
        if (top > row.m)
            raise_maximum(row, top, 0);
        if (!usable(row.m))
            return sum_weighted_exactly(out, b, 1, n, row);
        const Vec<T> m = splat((T) row.m);
        const T *masked = out;
        const auto window = window_of<T>(row.n);
        auto sums = sum_block<T>(n, [&](Index j, Index count) FORCED {
            Vec<T> x = load_ahead(masked + j, count, -(T) INFINITY);
            return weighted_terms(x, load_ahead(b + j, count, T()), m, window.terms(x));
        });
        const double added = total(sums.a), k = total(sums.b);
        if (!(std::fabs(added + k) < INFINITY))  // so it is where a weight is infinite or NaN
            return sum_weighted_exactly(masked, b, 1, n, row);
        row.added += added;
        row.k += k;
    }

    // Add a block to distances and mass; `before_m` is the maximum that the distances so far refer to.
    void fold_target(Index i, const T *v, const T *t, Index n, double before_m, double m) {
        const T top = (T) (m > -INFINITY ? m : 0);
        auto sums = sum_block<T>(n, [&](Index j, Index count) FORCED {
            Vec<T> u_ = load_ahead(t + j, count, T());
            return pack(distance(load_ahead(v + j, count, T()), u_, top), u_);
        });
        group->distances[i] += distance(before_m, group->mass[i], m) + total(sums.a);
        group->mass[i] += total(sums.b);
    }

    // Bring kept exponentials to the reference 2**n.
    void merge_terms(T *terms, const double *from, double n) const {
        for (Index j = 0; j < call.classes; j += BLOCK) {
            if (from[j / BLOCK] >= n)
                continue;
            const auto [upper, lower] = lift_of<T>(from[j / BLOCK], n);
            const Index end = least(j + BLOCK, call.classes);
            for (Index i = j; i < end; i++)
                terms[i] = terms[i] * upper * lower;
        }
    }

    // A fold that is a sum of terms, F of `fastll.formulas.TERMS`.
    template <class F>
    void fold_terms() {
        for (Index i = 0; i < group->count; i++) {
            group->value[i] = 0;
            for (Index j = 0; j < call.classes; j += BLOCK) {
                Index n = least(BLOCK, call.classes - j);
                const T *inputs[2];
                for (int k = 0; k < F::inputs; k++)
                    inputs[k] = call.inputs[k].fetch(
                        call.inputs[k].row(group->outer, group->inner + i), j, n, k ? u : slope
                    );
                auto sums = sum_block<T>(n, [&](Index at, Index count) FORCED {
                    auto input = [&](int k) FORCED { return load_ahead(inputs[k] + at, count, T()); };
                    return first_lanes(spread<Vec<T>>(F::of(input, nullptr)), count);
                });
                group->value[i] += total(sums);
            }
        }
    }

    // ---- Write ----

    // Write the group, or let it wait for the next one's fold if there is one.
    void write(bool last) {
        if (!interleaves) {
            if (call.out)
                write_rows(*group, 0);
            group->count = 0;  // nothing is left of it
        }
        std::swap(group, before);
        if (last)
            write_rows(*before, 0);
    }

    // A group's rows from `first_row` on.
    void write_rows(const Group &rows, Index first_row) {
        for (Index i = first_row; i < rows.count; i++) {
            begin_row(rows, i);
            write_row(rows, i);
        }
    }

    // A block as numbers of T, in place or in a buffer.
    const T *numbers_of(const T *v, Index) const { return v; }

    template <class B>
    const T *numbers_of(const B *v, Index n) const {
        for (Index j = 0; j < n; j++)
            slope[j] = number(v[j]);
        return slope;
    }

    // Whether the exponentials of row i that were kept do.
    bool take_kept(const Group &rows, Index i, const T *terms, Kept<T> &to) const {
        const bool taken = terms && usable(rows.m[i]) && is_moderate(call, rows, i);
        to.terms = terms, to.factor = (T) rows.factor[i], to.scale = (T) rows.scale[i];
        if (taken)
            to.peak = first(window_of<T>(rows.n[i]).terms(splat((T) rows.m[i])));
        return taken;
    }

    // Make row i the pending one; nothing of it (n = 0) if it takes new exponentials.
    void begin_row(const Group &rows, Index i) {
        Pending<T, S> &row = pending;  // a copy would wait for all of its fields
        row.j = row.n = 0;
        row.log = call.log(), row.streamed = false, row.away = call.away();
        row.out = (S *) call.out.row(rows.outer, rows.inner + i);
        row.m = (T) rows.m[i], row.log_s = (T) rows.log_s[i], row.mean = (T) rows.mean[i];
        row.logits = (const S *) call.x().row(rows.outer, rows.inner + i);
        row.tau = tau;
        const T *terms = kept_of(rows, i);
        if (row.log || (rows.sample[i] != 0 && take_kept(rows, i, terms, row.kept) &&
                        (!call.divergent() ||
                         take_kept(of_targets[&rows - groups], i, terms + pitch, row.target))))
            row.n = call.classes;
        if (interleaves && call.out.streamed) {  // what is left begins at a line
            row.write_until(least(row.n, until_line(row.out)));
            row.streamed = true;
        }
    }

    // What is left of the pending row, i, or if it does not wait for that, all of it, block by block.
    void write_row(const Group &rows, Index i) {
        const char *start = call.x().row(rows.outer, rows.inner + i);
        char *place = call.out.row(rows.outer, rows.inner + i);
        const Index y = rows.label[i];
        if (interleaves && pending.n > 0) {
            pending.write_until(pending.n);
            if (y >= 0)
                pending.out[y] = stored<S>((T) rows.g_y[i]);
            return;
        }
        for (Index j = 0; j < call.classes; j += BLOCK) {
            Index n = least(BLOCK, call.classes - j);
            S *to = call.out.place(place, j, out);
            if (rows.sample[i] == 0) {
                memset(to, 0, n * sizeof(S));
                call.out.deliver(place, j, n, out);
                continue;
            }
            const bool reads = call.log() || call.entropic() ||
                               (pending.n == 0 && call.operation != NLL_LOSS);
            const S *v = reads ? fetch_logits(call.x(), start, j, n, x, slope) : nullptr;
            if (pending.n > 0) {
                Pending<T, S> part = pending;
                part.kept.terms += j, part.target.terms += j;
                part.logits = v, part.tau = 1;
                part.out = to, part.n = n;
                part.write_until(n);
            } else if constexpr (has_options)
                write_block(rows, i, j, v, n, to);
            else
                write_block_anew(rows, i, v, n, to);
            if constexpr (has_options)
                change_block(rows, i, j, n, to);
            if (y >= j && y < j + n)
                to[y - j] = stored<S>((T) rows.g_y[i]);
            call.out.deliver(place, j, n, out);
        }
    }

    // Elements j to j + n of row i into `to` where no exponentials were kept: what is made of logits alone.
    void write_block(const Group &rows, Index i, Index j, const T *v, Index n, T *to) const {
        if (call.operation == NLL_LOSS)
            fill_block(to, n, (T) rows.factor[i], call.out.streamed);
        else if (call.entropic()) {  // p not to where the logits may still be
            write_block_anew(rows, i, v, n, out);
            slope_block(out, v, n, (T) rows.m[i], (T) rows.mean[i], to);
        } else
            write_block_anew(rows, i, v, n, to);
    }

    // What options make of it.
    void change_block(const Group &rows, Index i, Index j, Index n, T *to) const {
        const char *second = call.second().row(rows.outer, rows.inner + i);
        if (call.divergent() && pending.n == 0) {
            const T *t = fetch_logits(call.second(), second, j, n, u);
            write_block_anew(of_targets[&rows - groups], i, t, n, slope);
            subtract_block(to, slope, n, (T) 1);
        }
        if (call.spread())
            subtract_block(to, fetch_target(second, j, n), n, (T) rows.upstream[i]);
        if (call.capped())
            multiply_block(to, slope, n);
    }

    // factor exp(x - m) of logits, exactly `factor` where x is the maximum.
    template <class B, class To>
    void write_block_anew(const Group &rows, Index i, const B *v, Index n, To *to) const {
        if (!usable(rows.m[i]))
            return write_exactly(numbers_of(v, n), 1, n, rows.m[i], rows.factor[i], to);
        const auto window = window_of<T>(rows.n[i]);
        const T m = (T) rows.m[i], factor = (T) rows.factor[i];
        const T scale = (T) rows.scale[i], rest = (T) rows.rest[i];
        const Vec<T> peak = window.terms(splat(m));
        for (Index j = 0; j < n; j += lanes<T>) {
            prefetch_ahead(v + j);
            Vec<T> e = window.terms(load_from(v + j, n - j, m));
            Vec<T> p = probability(e, peak, factor, scale);
            if (rest != 1)
                p = where_eq(e, peak, factor, p * rest);
            store_to(to + j, n - j, p);
        }
    }
};

}  // namespace
