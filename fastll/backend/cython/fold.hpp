// The driver of folds: load, fold, finish and write, a group of rows at a time.

#pragma once

#include "map.hpp"
#include "middle_rows.hpp"
#include "rows.hpp"

namespace {

// The same of value(i) for rows i to i + Wide::count.
template <class T, class F>
INLINE void put(const Operand &to, const Group &group, F value) {
    T numbers[GROUP];
    for (Index i = 0; to && i < group.count; i += Wide::count)
        store_all(numbers + i, narrow<T>(value(i)));
    put_numbers(to, group, numbers);
}

// Between the states in memory and those of a group: `copy(memory, member)` of m, e and k.
template <class F>
INLINE void for_states(const Operand &state, Group &group, F copy) {
    for (Index i = 0; i < group.count; i++) {
        char *at = state.row(group.outer, group.inner + i);
        copy(at, &group.m[i]);
        copy(at + state.classes, &group.e[i]);
        copy(at + 2 * state.classes, &group.k[i]);
        group.n[i] = exponent_of(group.m[i]);
    }
}

INLINE int64_t label_at(const Call &call, const Group &group, Index i, Index choice) {
    const char *at = call.labels.row(group.outer, group.inner + i);
    return element<int64_t>(at + choice * call.labels.classes, false);
}

constexpr Index WIDE = 8 * GROUP;  // columns from which on groups begin at lines of the cache

// The place of a new group, from `row` on; none without rows.
template <class T>
Place place_of(const Call &call, Index row, Index most) {
    if (most <= 0)
        return {0, 0, 0};
    Place place = {row / call.inner, row % call.inner, 0};
    place.count = least(most, call.inner - place.inner);
    // of columns, so many that the other groups begin at lines, where that pays
    const Operand &lines = call.out.streamed ? call.out : call.x();
    if (call.across && lines.format == IN_PLACE && call.inner >= WIDE) {
        Index head = until_line((T *) lines.row(place.outer, place.inner));
        place.count = least(place.count, head > 0 ? head : GROUP);
    }
    return place;
}

// Where the group after the current one will be: columns read it meanwhile.
template <class Pass>
INLINE void announce(Pass &, const Place &) {}

template <class T>
INLINE void announce(Columns<T> &pass, const Place &next) {
    pass.next = next;
}

template <class T>
INLINE void announce(ShortRows<T> &pass, const Place &next) {
    pass.columns.next = next;
}

// A new group as it is before its first element.
template <class T>
void load_group(const Call &call, Group &group) {
    begin(call, group);
    if (call.state)
        for_states(call.state, group, [](const char *at, double *x) { memcpy(x, at, sizeof *x); });
    if (call.labels && call.targeted())
        load_labels<T>(call, group, group.label, group.sample, group.w_y);
    else
        load_samples(call, group, group.sample);
}

// The element of class y, from memory.
template <class T>
T logit_at(const Call &call, const Group &group, Index i, Index y) {
    const Operand &x = call.x();
    const char *at = x.row(group.outer, group.inner + i) + y * x.classes;
    T logit;
    read_block(x.format, x.swapped, at, x.classes, 1, &logit);
    return logit * (T) call.options.inverse_temperature;
}

// The log-probabilities of some classes of each row; NaN for one that there is not.
template <class T>
void select(const Call &call, const Group &group) {
    for (Index i = 0; i < group.count; i++)
        for (Index choice = 0; choice < call.choices; choice++) {
            const int64_t y = label_at(call, group, i, choice);
            T selected = (T) NAN;
            if (y >= 0 && y < call.classes)
                selected = (T) log_probability(
                    (double) logit_at<T>(call, group, i, (Index) y), group.m[i], group.log_s[i]
                );
            char *at = call.selected.row(group.outer, group.inner + i);
            memcpy(at + choice * call.selected.classes, &selected, sizeof selected);
        }
}

// Scalars of the rows from their sums, and those that are asked for into memory.
template <class T>
void finish_group(const Call &call, Group &group, Group &target) {
    if (call.operation >= TERMS)  // without the sign that a scale gives a 0
        return put<T>(call.value, group, [&](Index i) FORCED {
            return call.options.scale * load_wide(group.value + i) + 0.0;
        });
    auto put_values = [&] {
        put<T>(call.value, group, [&](Index i) FORCED { return load_wide(group.value + i); });
    };
    if (call.operation == NLL_LOSS) {
        for (Index i = 0; i < group.count; i++)
            if (group.label[i] >= 0)
                group.x_y[i] = logit_at<T>(call, group, i, group.label[i]);
        finish_nll_loss(call, group);
        return put_values();
    }
    finish_states(group);
    if (call.operation == CROSS_ENTROPY) {
        finish_cross_entropy(call, group);
        put_values();
    } else if (call.entropic()) {
        finish_entropy(call, group);
        put_values();
    } else if (call.divergent()) {
        finish_states(target);
        finish_kl_divergence(call, group, target);
        put_values();
    } else if (call.operation != LOGSUMEXP) {
        for (Index i = 0; i < group.count; i += Wide::count)
            set_factors(call, group, i, 1.0 / (load_wide(&group.e[i]) + load_wide(&group.k[i])));
    } else {
        if (call.second())
            finish_weighted(call, group);
        if (call.state)
            for_states(call.state, group, [](char *at, const double *x) { memcpy(at, x, sizeof *x); });
        put<T>(call.sign, group, [&](Index i) FORCED {
            Wide s = load_wide(group.e + i) + load_wide(group.k + i);
            return where_gt(s, 0.0, 1.0, where_gt(0.0, s, -1.0, s));
        });
    }
    put<T>(call.lse, group, [&](Index i) FORCED {
        return load_wide(group.m + i) + load_wide(group.log_s + i);
    });
    if (call.selected)
        select<T>(call, group);
}

// A group that has its place.
template <class T, class Pass>
void fold_group(const Call &call, Pass &pass, bool last) {
    Group &group = pass.current();
    load_group<T>(call, group);
    if (call.divergent()) {
        begin(call, pass.target());
        pass.target().count = group.count;
    }
    if constexpr (!Pass::has_options)
        pass.fold();
    else if (call.operation >= TERMS)
        with_term(call.operation - TERMS, [&](auto term) {
            pass.template fold_terms<decltype(term)>();
            return 0;
        });
    else if (call.operation == NLL_LOSS)
        pass.fold_targets();
    else if (call.operation == LOGSUMEXP || !call.state)  // a softmax is given complete states
        pass.fold();
    finish_group<T>(call, group, pass.target());
    pass.write(last);
}

template <class T, class Pass>
int fold_groups(const Call &call, Index start, Index stop) {
    Pass pass(call);
    if (!pass.has_memory())
        return -1;
    Place place = place_of<T>(call, start, least(pass.most, stop - start));
    for (Index row = start; row < stop;) {
        (Place &) pass.current() = place;
        row += place.count;
        place = place_of<T>(call, row, least(pass.most, stop - row));
        announce(pass, place);
        fold_group<T>(call, pass, row == stop);
    }
    return 0;
}

// Rows without options, but for groups that are not as usual, which are what `Pass` is for.
template <class T, class Pass, class Rows>
int fold_one_block(const Call &call, Index start, Index stop) {
    Rows pass(call);
    if (!pass.has_memory())
        return -1;
    Place place = place_of<T>(call, start, least(pass.most, stop - start));
    for (Index row = start, next; row < stop; row = next) {
        (Place &) pass.rows.group = place;
        next = row + place.count;
        place = place_of<T>(call, next, least(pass.most, stop - next));
        announce(pass, place);
        if (!pass.run() && fold_groups<T, Pass>(call, row, next))
            return -1;
    }
    return 0;
}

// Rows that are stored as S.
template <class T, class S>
int fold_rows(const Call &call, Index start, Index stop) {
    return call.is_one_block() ? fold_one_block<T, Rows<T, S>, MiddleRows<T, S>>(call, start, stop)
                                               : fold_groups<T, Rows<T, S>>(call, start, stop);
}

// Any operation, on rows or units `start` to `stop`. Returns 0, or -1 without memory for its buffers.
template <class T>
int run_typed(const Call &call, Index start, Index stop) {
    if (call.operation >= ELEMENTS)
        return with_element(call.operation - ELEMENTS, [&](auto element) {
            return map_units<decltype(element), T>(call, start, stop);
        });
    if (call.across)
        return call.is_one_block() ? fold_one_block<T, Columns<T>, ShortRows<T>>(call, start, stop)
                                : fold_groups<T, Columns<T>>(call, start, stop);
    if constexpr (sizeof(T) == 4 && HAS_HALVES)
        if (call.is_plain() && (!call.out || call.out.format == call.x().format)) {
            if (call.x().format == BFLOAT16)
                return fold_rows<T, BFloat16>(call, start, stop);
            if (call.x().format == FLOAT16)
                return fold_rows<T, Float16>(call, start, stop);
        }
    return fold_rows<T, T>(call, start, stop);
}

INLINE int run(const Call &call, Index start, Index stop) {
    int status = call.single ? run_typed<float>(call, start, stop) : run_typed<double>(call, start, stop);
    stream_fence();
    return status;
}

// First position of a label outside [0, classes), or -1; the summed weight of the others, and their number.
Index scan_labels(
    const char *labels, Index count, Index classes, int64_t ignore_index, const char *weight, bool single,
    double *kept, double *rows
) {
    auto label = [=](Index i) { return element<int64_t>(labels + i * 8, false); };
    auto is_bad = [=](int64_t y) { return (y != ignore_index) & ((y < 0) | (y >= classes)); };
    int64_t ignored = 0, bad = 0;
    for (Index i = 0; i < count; i++) {  // no early exit, so that the loop vectorises
        ignored += label(i) == ignore_index;
        bad |= is_bad(label(i));
    }
    *rows = bad ? 0 : (double) (count - ignored);
    *kept = weight ? 0 : *rows;
    for (Index i = 0; i < count && (bad || weight); i++) {
        int64_t y = label(i);
        if (is_bad(y)) {
            *kept = 0;
            return i;
        }
        if (weight && y != ignore_index)
            *kept += single ? element<float>(weight + y * 4, false) : element<double>(weight + y * 8, false);
    }
    return -1;
}

}  // namespace
