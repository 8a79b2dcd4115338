// Tiles of a group's rows: class by class, `GROUP` rows apart, and how they get there from memory and back.
// Short rows may lie one after the other: then they are transposed.

#pragma once

#include "state.hpp"
#include "transpose.hpp"

namespace {

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

template <class T>
struct Tiles {
    typedef Register<T> V;

    const Call &call;
    Group group;
    Memory memory{(are_short() ? GROUP * call.classes + piece<T> : 0) * (Index) sizeof(T)};
    T *const rows = memory.take<T>(0);  // short ones, one after the other

    explicit Tiles(const Call &call_) : call(call_) {}

    bool has_memory() const { return memory.start; }

    bool are_short() const { return call.classes < SHORT; }

    // Whether rows, not classes, are what lies together in memory, and are short.
    bool by_rows(const Operand &x) const {
        return are_short() && (std::abs(x.classes) < std::abs(x.inner) || call.inner == 1);
    }

    // Classes j to j + n of an operand into a tile.
    void fetch(const Operand &of, Index j, Index n, T *to) const {
        if (by_rows(of))
            turn(rows_of(of), group.count, n, to);
        else
            gather(of, group, j, n, to);
    }

    // The short rows of the group, one after the other, of GROUP rows; in place where there is more memory
    // behind them.
    const T *rows_of(const Operand &of) const {
        const char *at = of.row(group.outer, group.inner);
        // in place would be said of the rows' axis
        const Format format = of.format == IN_PLACE ? format_of<T>() : of.format;
        const Index n = call.classes, size = size_of(format);
        const bool packed = of.classes == size && of.inner == n * size;
        if (packed && format == format_of<T>() && !of.swapped && group.inner + GROUP < call.inner)
            return (const T *) at;
        if (packed)
            read_block(format, of.swapped, at, size, group.count * n, rows);
        else
            for (Index i = 0; i < group.count; i++)
                read_block(format, of.swapped, at + i * of.inner, of.classes, n, rows + i * n);
        std::fill(rows + group.count * n, rows + round_up(group.count, V::count) * n, T());  // harmless
        return rows;
    }

    // A tile of classes j to j + n to where it belongs.
    void deliver(const Operand &to, Index j, Index n, const T *tile, bool plain = false) const {
        if (!by_rows(to))
            return scatter(to, group, j, n, tile);
        char *at = to.row(group.outer, group.inner);
        turn_back(tile, group.count, n, rows);
        if (to.streamed)
            stream_block(rows, group.count * n, (T *) at);
        else if (to.inner == n * to.classes)
            write_block(to.format, rows, at, to.classes, group.count * n, plain);
        else
            for (Index i = 0; i < group.count; i++)
                write_block(to.format, rows + i * n, at + i * to.inner, to.classes, n);
    }
};

}  // namespace
