// Rows in plain memory, for callers that hold no arrays: other Cython modules (fastll/cython_kernels.pyx) and
// code that Numba compiled (fastll.interop.numba). The calling thread does the work, and needs no GIL.
//
// A few short rows take the greater part of their time on the way to the kernels. They go from memory to results
// here, by registers on the stack, to the same bits.

#pragma once

#include "fold.hpp"

namespace {

// Rows of numbers of one type, and where results go; NULL is not there. Strides are in bytes, those of x and
// out of (outer, classes, inner), the others of (outer, inner). fastll.interop.numba writes the same words.
struct PlainRows {
    char *x, *out, *value;
    char *labels;  // int64; what is no class gives NaN
    int64_t outer, classes, inner;
    int64_t x_strides[3], out_strides[3], value_strides[2], label_strides[2];
    int64_t ignore_index;
    double scale;  // of the gradient
};

INLINE Options plain_options(int64_t ignore_index, double scale) {
    return {ignore_index, 0, 0, 0, scale, 1};
}

template <class T>
INLINE Operand plain_operand(char *address, const int64_t *strides, bool swap, bool across) {
    Operand of = {address, (Index) strides[2 * swap], (Index) strides[1], (Index) strides[2 - 2 * swap]};
    const Index step = across ? of.inner : of.classes, size = (Index) sizeof(T);
    const bool aligned = ((Index) address | of.outer | of.classes | of.inner) % size == 0;
    of.format = step == size && aligned ? IN_PLACE : format_of<T>();
    return of;
}

// Set what there is to a call of plain rows. The kernels read more: theirs is all 0 before.
template <class T>
void set_call(Call &call, int operation, const PlainRows &rows) {
    const Index shape[3] = {(Index) rows.outer, (Index) rows.classes, (Index) rows.inner};
    const Index strides[3] = {
        (Index) rows.x_strides[0], (Index) rows.x_strides[1], (Index) rows.x_strides[2]
    };
    call.operation = operation, call.single = sizeof(T) == 4;
    call.options = plain_options(rows.ignore_index, rows.scale);
    const bool swap = call.walk(shape, strides);
    auto row_operand = [=](char *address, const int64_t *strides) {
        return Operand{address, (Index) strides[swap], 0, (Index) strides[1 - swap]};
    };
    call.inputs[0] = plain_operand<T>(rows.x, rows.x_strides, swap, call.across);
    call.out = plain_operand<T>(rows.out, rows.out_strides, swap, call.across);
    call.value = call.lse = Operand();
    (operation == LOGSUMEXP ? call.lse : call.value) = row_operand(rows.value, rows.value_strides);
    call.labels = row_operand(rows.labels, rows.label_strides);
}

// Rows `start` to `stop`, by the kernels.
template <class T>
APART int run_plain(int operation, const PlainRows &rows, Index start, Index stop) {
    Call call = {};
    set_call<T>(call, operation, rows);
    return run(call, start, stop);
}

// What a label is to a row: as `classified` says, of one.
INLINE void set_label(const Call &call, int64_t label, double &sample, double &w_y, Index &y) {
    const bool kept = label != call.options.ignore_index, inside = label >= 0 && label < call.classes;
    y = kept && inside ? (Index) label : -1;
    sample = kept, w_y = kept && !inside ? NAN : 1;
}

// A register of short rows, or one of them. `run` returns false, and has written nothing, if one of them is
// not usual; results are in `value`.
template <class T>
struct FewRows {
    typedef Register<T> V;
    typedef typename OneBlock<T>::Results Results;

    const Call &call;
    OneBlock<T> rows;

    // Nothing is looked up in a group, as there are no operands but these.
    FewRows(const Call &call_, Group &group) : call(call_), rows(call_, group) {}

    const T *values() const { return call.lse ? rows.lse : rows.value; }

    template <Kind KIND>
    static FORCED V result(V x, V e, V m, const Results &of) {
        return KIND == LOGS ? log_probability(x, m, of.log_s) : probability(e, of.peak, of.factor, of.scale);
    }

    // One row, whose classes are contiguous, side by side in lanes; but they are summed in order.
    template <bool LABELS, Kind KIND>
    FORCED bool run_row(const T *x, Index classes, int64_t label, T *out) {
        T terms[SHORT + V::count], below[SHORT + V::count];
        const V none = spread<V>(-(T) INFINITY);
        auto load_at = [=](Index j) FORCED {
            const Index left = classes - j;
            return left >= V::count ? load_vector<V>(x + j) : on_register::load_some(x + j, (int) left, none);
        };
        V top = none, counts = {}, x_y = {};
        for (Index j = 0; j < classes; j += V::count)
            top = maximum(load_at(j), top);
        const V m = spread<V>(largest(top));
        const Doubles<T> n = exponents_of(widen(m));
        const auto window = windows_of<T>(n);
        for (Index j = 0; j < classes; j += V::count) {
            const V x_j = load_at(j), e = window.terms(x_j);
            if (KIND == WRITES)
                store_all(terms + j, e);
            counts = counts + at_maximum(x_j, m, (T) 1);
            store_all(below + j, below_maximum(x_j, m, e));
        }
        T sum = 0;
        for (Index j = 0; j < classes; j++)
            sum += below[j];
        Index y = -1;
        if constexpr (LABELS) {
            double sample, w_y;
            set_label(call, label, sample, w_y, y);
            std::fill(rows.sample, rows.sample + V::count, sample);
            std::fill(rows.w_y, rows.w_y + V::count, w_y);
            if (y >= 0)
                x_y = spread<V>(x[y]);
        }
        Results of;
        const V sums = spread<V>(sum), all = spread<V>(narrow_total(counts));
        if (!rows.template finish<LABELS, KIND>(0, m, n, window, sums, all, x_y, of))
            return false;
        for (Index j = 0; j < classes && KIND != READS; j += V::count) {
            const V p = result<KIND>(load_at(j), KIND == WRITES ? load_vector<V>(terms + j) : none, m, of);
            if (classes - j >= V::count)
                store_all(out + j, p);
            else
                on_register::store_some(out + j, (int) (classes - j), p);
        }
        if (LABELS && KIND == WRITES && y >= 0)
            out[y] = first(of.at_label);
        return true;
    }

    // Up to a register of neighbouring rows, a row per lane: a class of them is contiguous.
    template <bool LABELS, Kind KIND>
    FORCED bool run_columns(const char *x, char *out, const char *labels, Index count) {
        const Index classes = call.classes;
        V kept[SHORT];
        auto load_at = [=](Index j) FORCED {
            const T *at = (const T *) (x + j * call.x().classes);
            return count == V::count ? load_vector<V>(at) : on_register::load_some(at, (int) count, V());
        };
        V m = load_at(0), sum = {}, counts = {}, x_y = {};
        for (Index j = 1; j < classes; j++)
            m = maximum(load_at(j), m);
        const Doubles<T> n = exponents_of(widen(m));
        const auto window = windows_of<T>(n);
        for (Index j = 0; j < classes; j++) {
            const V x_j = load_at(j), e = window.terms(x_j);
            if (KIND == WRITES)
                kept[j] = e;
            counts = counts + at_maximum(x_j, m, (T) 1);
            sum = sum + below_maximum(x_j, m, e);
        }
        Index y[V::count];
        if constexpr (LABELS) {
            T logits[V::count] = {};
            for (Index i = 0; i < V::count; i++) {
                y[i] = -1, rows.sample[i] = rows.w_y[i] = 1;
                if (i < count)
                    set_label(
                        call, element<int64_t>(labels + i * call.labels.inner, false), rows.sample[i], rows.w_y[i], y[i]
                    );
                if (y[i] >= 0)
                    logits[i] = ((const T *) (x + y[i] * call.x().classes))[i];
            }
            x_y = load_vector<V>(logits);
        }
        Results of;
        if (!rows.template finish<LABELS, KIND>(0, m, n, window, sum, counts, x_y, of))
            return false;
        for (Index j = 0; j < classes && KIND != READS; j++) {
            const V p = result<KIND>(load_at(j), KIND == WRITES ? kept[j] : m, m, of);
            T *at = (T *) (out + j * call.out.classes);
            if (count == V::count)
                store_all(at, p);
            else
                on_register::store_some(at, (int) count, p);
        }
        if constexpr (LABELS && KIND == WRITES) {
            T at_label[V::count];
            store_all(at_label, of.at_label);
            for (Index i = 0; i < count; i++)
                if (y[i] >= 0)
                    ((T *) (out + y[i] * call.out.classes))[i] = at_label[i];
        }
        return true;
    }
};

constexpr Index FEW_ROWS = 16;  // up to which rows go this way: the kernels' tiles take 0.4 us

// Rows at a place, `beside` one another or one after the other; false, and nothing is written, if they are for the
// kernels to do.
template <class T>
bool run_few(FewRows<T> &few, const Place &place, bool beside) {
    const Call &call = few.call;
    const char *x = call.x().row(place.outer, place.inner);
    const char *labels = call.labels.row(place.outer, place.inner);
    char *out = call.out.row(place.outer, place.inner);
    return with_kind(call, [&](auto has_labels, auto kind) FORCED {
        if (beside)
            return few.template run_columns<has_labels, kind>(x, out, labels, place.count);
        const int64_t label = has_labels ? element<int64_t>(labels, false) : 0;
        return few.template run_row<has_labels, kind>((const T *) x, call.classes, label, (T *) out);
    });
}

template <class T>
int fold_few(const Call &call, const PlainRows &rows, bool beside) {
    Group group;
    FewRows<T> few(call, group);
    const Index total = (Index) (rows.outer * rows.inner), width = few.rows.width;
    Place &place = group;
    place = {0, 0, 1};
    for (Index row = 0; row < total; row += place.count) {
        if (beside)
            place.count = least(width, call.inner - place.inner);
        if (run_few<T>(few, place, beside))
            for (const Operand *to : {&call.value, &call.lse})
                put_numbers(*to, group, few.values());
        else if (run_plain<T>(call.operation, rows, row, row + place.count))
            return -1;
        place.inner += place.count;
        if (place.inner == call.inner)
            place.outer++, place.inner = 0;
    }
    return 0;
}

// Any rows. Returns 0, or -1 without memory for buffers.
template <class T>
int64_t fold_plain(Operation operation, const PlainRows *rows) {
    Call call;
    set_call<T>(call, operation, *rows);
    const Index total = (Index) (rows->outer * rows->inner), size = (Index) sizeof(T);
    auto lie = [&](Index step, Index out_step) {
        return step == size && (!call.out || out_step == size);
    };
    if (call.classes > 0 && call.classes < SHORT && total <= FEW_ROWS) {
        const bool beside = call.inner > 1 && lie(call.x().inner, call.out.inner);
        if (beside || lie(call.x().classes, call.out.classes))
            return fold_few<T>(call, *rows, beside);
    }
    return total == 0 ? 0 : run_plain<T>(operation, *rows, 0, total);
}

#define FOLDED(name, operation)                                                                     \
    template <class T>                                                                              \
    int64_t name##_rows(const PlainRows *rows) {                                                    \
        return fold_plain<T>(operation, rows);                                                      \
    }

FOLDED(logsumexp, LOGSUMEXP)
FOLDED(softmax, SOFTMAX)
FOLDED(log_softmax, LOG_SOFTMAX)
FOLDED(cross_entropy, CROSS_ENTROPY)

// One row whose classes are contiguous: its value, and what is written in its shape; NaN without memory.
template <class T, Operation OPERATION, bool WRITTEN>
T fold_row(const T *x, Index classes, int64_t label, T *out) {
    constexpr bool LABELS = OPERATION == CROSS_ENTROPY;
    constexpr Kind KIND = OPERATION == LOG_SOFTMAX ? LOGS : WRITTEN ? WRITES : READS;
    const int64_t size = sizeof(T);
    T value = (T) NAN;
    if (classes > 0 && classes < SHORT) {
        static const char there = 0;  // an address that says that an operand is there
        Call call;  // of which only this is read
        call.options = plain_options(-100, 1);
        call.single = size == 4, call.classes = classes;
        call.lse.address = OPERATION == LOGSUMEXP ? (char *) &there : nullptr;
        call.value.address = LABELS ? (char *) &there : nullptr;
        call.labels.address = LABELS ? (char *) &there : nullptr;
        Group group;
        FewRows<T> few(call, group);
        if (few.template run_row<LABELS, KIND>(x, classes, label, out))
            return few.values()[0];
    }
    const PlainRows rows = {
        (char *) x,
        WRITTEN ? (char *) out : nullptr,
        WRITTEN && !LABELS ? nullptr : (char *) &value,
        LABELS ? (char *) &label : nullptr,
        1, classes, 1, {0, size, 0}, {0, size, 0}, {0, 0}, {0, 0}, -100, 1
    };
    if (fold_plain<T>(OPERATION, &rows)) {
        std::fill(out, out + (WRITTEN ? classes : 0), (T) NAN);
        return (T) NAN;
    }
    return value;
}

template <class T>
T logsumexp_row(const T *x, Index classes) {
    return fold_row<T, LOGSUMEXP, false>(x, classes, 0, nullptr);
}

template <class T>
void softmax_row(const T *x, Index classes, T *out) {
    fold_row<T, SOFTMAX, true>(x, classes, 0, out);
}

template <class T>
void log_softmax_row(const T *x, Index classes, T *out) {
    fold_row<T, LOG_SOFTMAX, true>(x, classes, 0, out);
}

// The loss, and the gradient unless `grad` is NULL.
template <class T>
T cross_entropy_row(const T *x, Index classes, int64_t label, T *grad) {
    return grad ? fold_row<T, CROSS_ENTROPY, true>(x, classes, label, grad)
                : fold_row<T, CROSS_ENTROPY, false>(x, classes, label, nullptr);
}

template <class T>
T sigmoid_number(T x) {
    return first(sigmoid(spread<Lanes<T, 16>>(x)));
}

template <class T>
T log_sigmoid_number(T x) {
    return first(log_sigmoid(spread<Lanes<T, 16>>(x)));
}

struct Exported {
    const char *name;
    void *address;
};

#define OF_BOTH(name) {#name "_float", (void *) name<float>}, {#name "_double", (void *) name<double>}
const Exported exported[] = {
    OF_BOTH(logsumexp_row),
    OF_BOTH(logsumexp_rows),
    OF_BOTH(softmax_row),
    OF_BOTH(softmax_rows),
    OF_BOTH(log_softmax_row),
    OF_BOTH(log_softmax_rows),
    OF_BOTH(cross_entropy_row),
    OF_BOTH(cross_entropy_rows),
    OF_BOTH(sigmoid_number),
    OF_BOTH(log_sigmoid_number),
    {nullptr, nullptr},
};
#undef OF_BOTH

}  // namespace
