// The driver of element-wise operations: one unit is `CHUNK` elements of one outer row.

#pragma once

#include "call.hpp"

namespace {

// What a block of a map reads and writes; what is NULL is not there.
template <class T>
struct Elements {
    const T *inputs[4], *weight;
    T *value, *slope;
    T parameters[4], scale;
    bool streamed, summed;  // the values
};

// What a formula returns, as (value, e, slope) of `fastll.formulas.elements`, with 0 for what is missing.
template <class F, class V, class R>
INLINE Three<V, V, V> parts_of(R result) {
    if constexpr (F::log1p)
        return {spread<V>(result.a), spread<V>(result.b), spread<V>(result.c)};
    else if constexpr (F::slope)
        return {spread<V>(result.a), V(), spread<V>(result.b)};
    else
        return {spread<V>(result), V(), V()};
}

// Values and slopes of n elements, where they are asked for; returns the sum of the values.
//
// Where that sum is all, and nothing is weighted, the sum of log1p(e) is the log1p of one number a lane,
// q = prod (1 + e) - 1: at most 2**64 in float32 and 2**128 in float64, and it keeps all its digits
// where every e is tiny.
template <class F, class T>
double map_block(const Elements<T> at, Index n) {
    typedef Vec<T> V;
    const bool deferred = F::log1p && !at.value && !at.weight;
    V sums = {}, q = {};
    for (Index j = 0; j < n; j += lanes<T>) {  // one text for the last, partial vector too: it may be long
        const Index count = n - j;
        auto input = [&](int i) FORCED { return load_ahead(at.inputs[i] + j, count, T()); };
        auto parameter = [&](int i) FORCED { return at.parameters[i]; };
        auto [value, e, slope] = parts_of<F, V>(F::of(input, parameter));
        if (F::log1p && deferred) {
            if (count < lanes<T>)
                e = first_lanes(e, count);
            q = q + fma(q, e, e);
        } else if constexpr (F::log1p)
            value = value + log1p_fraction(e);
        if (at.weight) {
            V weight = load_ahead(at.weight + j, count, T());
            value = value * weight;
            slope = slope * weight;
        }
        if (at.summed)
            sums = sums + (count < lanes<T> ? first_lanes(value, count) : value);
        if (at.value && at.streamed && count >= lanes<T>)
            stream(at.value + j, lanes<T>, value);
        else if (at.value)
            store(at.value + j, count, value);
        if (F::slope && at.slope)
            store(at.slope + j, count, slope * at.scale);
    }
    return F::log1p ? total(sums) + total(log1p_sum(widen(q))) : total(sums);
}

template <class F, class T>
int map_units(const Call &call, Index start, Index stop) {
    Memory memory((F::inputs + 3) * BLOCK * sizeof(T));
    if (!memory.start)
        return -1;
    T *buffers = memory.take<T>(F::inputs * BLOCK), *weight_buffer = memory.take<T>(BLOCK);
    T *value_buffer = memory.take<T>(BLOCK), *slope_buffer = memory.take<T>(BLOCK);
    Elements<T> block = {};
    block.scale = (T) call.options.scale;
    block.streamed = call.value.streamed, block.summed = (bool) call.partial;
    for (int i = 0; i < F::parameters; i++)
        block.parameters[i] = (T) call.parameters[i];
    for (Index unit = start; unit < stop; unit++) {
        Index outer = unit / call.inner, j = unit % call.inner * CHUNK, n = 0;
        Index end = least(call.classes, j + CHUNK);
        char *values = call.value.row(outer, 0), *slopes = call.out.row(outer, 0);
        double sum = 0;
        if (call.value.streamed)  // a first block that ends at a line
            n = until_line((T *) (values + j * call.value.classes));
        for (; j < end; j += n, n = 0) {
            n = least(n ? n : BLOCK, end - j);
            for (int i = 0; i < F::inputs; i++)
                block.inputs[i] =
                    call.inputs[i].fetch(call.inputs[i].row(outer, 0), j, n, buffers + i * BLOCK);
            block.weight = call.weight.fetch(call.weight.row(outer, 0), j, n, weight_buffer);
            block.value = call.value.place(values, j, value_buffer);
            block.slope = call.out.place(slopes, j, slope_buffer);
            sum += map_block<F>(block, n);
            call.value.deliver(values, j, n, value_buffer);
            call.out.deliver(slopes, j, n, slope_buffer);
        }
        if (call.partial)
            memcpy(call.partial.row(outer, 0) + unit % call.inner * call.partial.classes, &sum, 8);
    }
    return 0;
}

}  // namespace
