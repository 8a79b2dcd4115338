// Tiles of a group's rows: class by class, `GROUP` rows apart, and how they get there from memory and back.
// Short rows may lie one after the other: then they are transposed.

#pragma once

#include "state.hpp"
#include "transpose.hpp"

namespace {

constexpr Index CLASSES_AHEAD = 8;  // from the one that is read or written to the one prefetched

// Whether classes of these rows are in place, and of a size that is known when compiled.
INLINE bool is_whole(const Operand &x, const Place &place) {
    return x.format == IN_PLACE && place.count == GROUP;
}

INLINE void prefetch_bytes(const char *at, Index size) {
    UNROLLED for (Index i = 0; i < size; i += 64) prefetch(at + i);
    prefetch(at + size - 1);  // another line unless they begin at one
}

INLINE void prefetch_class(const Operand &x, const char *at, Index count) {
    if (x.inner <= 8)
        prefetch_bytes(at, count * x.inner);
}

// Tiles of an operand, one after the other. Each is read while there is work on the one before it, class by
// class, so that memory and arithmetic are both busy.
template <class T>
struct Feed {
    typedef Register<T> V;

    const Operand &of;
    const Index classes;  // of a row
    const Index size, count;  // of a tile, and tiles that are there at a time
    T *const tiles;
    Index first = 0, last = 0;  // number of the tile of the current rows' first block, of the one that is read
    Place place = {0, 0, 0};  // of the rows of the latter
    Index j = 0, n = 0, done = 0;  // its classes j to j + n, of which so many are there
    bool whole = false;  // whether classes are GROUP rows in place
    const char *at = nullptr;  // the class that is next
    T *to = tiles;  // where it goes
    T tops[GROUP] = {};  // maxima of the tile

    T *tile(Index number) const { return tiles + number % count * size; }

    // That of classes from j on, of the current rows.
    T *block(Index j) const { return tile(first + j / BLOCK); }

    // Read the classes from j on of some rows next.
    void begin(const Place &place_, Index j_) {
        place = place_, j = j_, done = 0, last++;
        n = place.count > 0 ? least(BLOCK, classes - j) : 0;
        whole = is_whole(of, place);
        at = of.row(place.outer, place.inner) + j * of.classes;
        to = tile(last);
        for (Index k = 0; k < least(n, CLASSES_AHEAD); k++)
            prefetch_class(of, at + k * of.classes, place.count);
        std::fill(tops, tops + GROUP, -(T) INFINITY);
    }

    // Go on until a part of the classes is there.
    FORCED void advance(Index part, Index parts) {
        if (done == n)
            return;
        const Index end = part >= parts ? n : parts == n ? part : n * part / parts;
        while (done < end)
            step();
    }

    // A class.
    void step() {
        if (whole) {  // of known size
            if (done + CLASSES_AHEAD < n)
                prefetch_bytes(at + CLASSES_AHEAD * of.classes, GROUP * (Index) sizeof(T));
            read((const T *) at, GROUP);
        } else
            convert();
        done++, to += GROUP, at += of.classes;
    }

    APART void convert() {
        if (done + CLASSES_AHEAD < n)
            prefetch_class(of, at + CLASSES_AHEAD * of.classes, place.count);
        read_block(of.format, of.swapped, at, of.inner, place.count, to);
        read(to, place.count);
    }

    FORCED void read(const T *from, Index number) {
        for (Index w = 0; w < number; w += V::count) {
            const V v = load_vector<V>(from + w);
            store_all(to + w, v);
            store_all(tops + w, maximum(v, load_vector<V>(tops + w)));
        }
    }

    // The tile of classes from j on of some rows.
    T *take(const Place &place_, Index j_) {
        if (n == 0 || j != j_ || place.inner != place_.inner || place.outer != place_.outer)
            begin(place_, j_);
        advance(n, n);
        if (j == 0)
            first = last;
        return tile(last);
    }
};

// Classes j to j + n of a group's rows into a tile: class by class, GROUP rows apart.
template <class T>
void gather(const Operand &x, Index classes, const Place &place, Index j, Index n, T *tile) {
    const char *at = x.row(place.outer, place.inner) + j * x.classes;
    for (Index i = 0; i < n; i++, at += x.classes, tile += GROUP) {
        if (j + i + CLASSES_AHEAD < classes)
            prefetch_class(x, at + CLASSES_AHEAD * x.classes, place.count);
        read_block(x.format, x.swapped, at, x.inner, place.count, tile);
    }
}

// A tile back into classes j to j + n of the rows.
template <class T>
void scatter(const Operand &x, Index classes, const Place &place, Index j, Index n, const T *tile) {
    typedef Register<T> V;
    const bool whole = is_whole(x, place);
    char *at = x.row(place.outer, place.inner) + j * x.classes;
    for (Index i = 0; i < n; i++, at += x.classes, tile += GROUP) {
        T *to = (T *) at;
        if (!whole)
            write_block(x.format, tile, at, x.inner, place.count);
        else if (x.streamed && (size_t) at % 64 == 0)
            UNROLLED for (Index w = 0; w < GROUP; w += V::count)
                on_register::stream(to + w, load_vector<V>(tile + w));
        else {
            if (j + i + CLASSES_AHEAD < classes)
                prefetch_bytes(at + CLASSES_AHEAD * x.classes, GROUP * (Index) sizeof(T));
            UNROLLED for (Index w = 0; w < GROUP; w += V::count)
                store_all(to + w, load_vector<V>(tile + w));
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
            gather(of, call.classes, group, j, n, to);
    }

    // The short rows of the group, one after the other, of GROUP rows; in place where there is more memory
    // behind them.
    const T *rows_of(const Operand &of) const {
        const char *at = of.row(group.outer, group.inner);
        // in place would be said of the rows' axis
        const Format format = of.format == IN_PLACE ? format_of<T>() : of.format;
        const Index n = call.classes, size = size_of(format);
        const bool packed = of.classes == size && of.inner == n * size;
        // the last row is read up to a piece
        const bool behind = (call.inner - group.inner - GROUP) * n >= piece<T> - 1;
        if (packed && format == format_of<T>() && !of.swapped && behind)
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
            return scatter(to, call.classes, group, j, n, tile);
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
