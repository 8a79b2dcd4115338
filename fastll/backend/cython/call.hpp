// What a kernel is told: its operands and options, as `fastll.contract` names them.
//
// A row is handled in blocks of `BLOCK` elements, which stay in the first-level cache between steps. A
// block is read and written in place where its memory is contiguous and of the compute dtype, otherwise
// through a buffer.

#pragma once

#include "convert.hpp"

namespace {

struct Operand {
    char *address;  // NULL: there is no such operand
    Index outer, classes, inner;  // strides in bytes
    Format format;
    bool swapped;
    bool streamed;  // written by non-temporal stores

    explicit operator bool() const { return address != nullptr; }

    // The first element of a row.
    char *row(Index outer_, Index inner_) const { return address + outer_ * outer + inner_ * inner; }

    // Whether a row's elements lie one after the other as T.
    template <class T>
    bool lies_as() const {
        return is_half<T> ? format == format_of<T>() && classes == sizeof(T) && !swapped : format == IN_PLACE;
    }

    // Elements j to j + n of the row at `start`, in place or in the buffer; NULL without operand.
    template <class T>
    const T *fetch(const char *start, Index j, Index n, T *buffer) const {
        if (!address || lies_as<T>())
            return address ? (const T *) (start + j * classes) : nullptr;
        read_block(format, swapped, start + j * classes, classes, n, buffer);
        return buffer;
    }

    // Where to leave elements from j on: in place, or in the buffer for `deliver`; NULL without operand.
    template <class T>
    T *place(char *start, Index j, T *buffer) const {
        return !address ? nullptr : lies_as<T>() ? (T *) (start + j * classes) : buffer;
    }

    // Write the buffer out, if that is where they were left.
    template <class T>
    void deliver(char *start, Index j, Index n, const T *buffer) const {
        if (address && !lies_as<T>())
            write_block(format, buffer, start + j * classes, classes, n);
    }
};

struct Options {
    int64_t ignore_index;
    double label_smoothing, z_loss, softcap, scale, inverse_temperature;
};

// Codes of operations: those of the tables of `fastll.formulas` follow, each table from its own on.
enum Operation {
    LOGSUMEXP, SOFTMAX, LOG_SOFTMAX, CROSS_ENTROPY, NLL_LOSS, ENTROPY, KL_DIVERGENCE,
    TERMS = 1000, ELEMENTS = 2000
};

// What the elements of a row's second sum are away from: nothing, the row's maximum (an entropy), or the
// maximum as much as another array's elements are away from theirs (a divergence).
enum Away { NOWHERE, ENTROPIC, DIVERGENT };

struct Call {
    int operation;
    bool single;  // computed in float32
    bool across;  // the class axis is the slower one: by columns.hpp
    Options options;
    double parameters[4];
    Index classes;  // of a map: elements of an outer row
    Index inner;  // of a map: units of an outer row
    Operand inputs[4];  // of a fold: x and `second`
    Index choices;  // labels of a row whose log-probabilities are `selected`
    Operand labels, weight, sample, state;
    Operand value, partial, lse, sign, selected;
    Operand out;  // in the shape of x; of a map: the slope

    // Choose the kernels that suit an array's shape and strides, (outer, classes, inner), and say whether its
    // outer axis takes the place of the inner one, as the faster one of the two.
    bool walk(const Index *shape, const Index *strides) {
        const bool swap = shape[2] == 1 || (shape[0] > 1 && std::abs(strides[0]) < std::abs(strides[2]));
        const int near = swap ? 0 : 2;
        classes = shape[1], inner = shape[near];
        across = (std::abs(strides[1]) > std::abs(strides[near]) && inner > 1) || classes < SHORT;
        return swap;
    }

    const Operand &x() const { return inputs[0]; }
    const Operand &second() const { return inputs[1]; }
    bool log() const { return operation == LOG_SOFTMAX; }
    bool capped() const { return options.softcap != 0; }
    bool tempered() const { return options.inverse_temperature != 1; }
    bool weighted() const { return operation == LOGSUMEXP && second(); }

    bool entropic() const { return operation == ENTROPY; }
    bool divergent() const { return operation == KL_DIVERGENCE; }
    Away away() const { return entropic() ? ENTROPIC : divergent() ? DIVERGENT : NOWHERE; }

    // Whether there is nothing to it but logits, labels and weights of rows and classes.
    bool is_plain() const {
        const bool usual = operation == LOGSUMEXP || operation == SOFTMAX || operation == LOG_SOFTMAX ||
                           operation == CROSS_ENTROPY;
        return usual && !(state || second() || capped() || tempered() || spread() || sign || selected);
    }
    // The same, and rows are of one block.
    bool is_one_block() const {
        return is_plain() && classes > 0 && classes <= (across ? SHORT - 1 : BLOCK);
    }

    // Whether rows of 16-bit numbers are written as they are, at once.
    bool writes_halves(const Operand &to) const {
        const bool half = to.lies_as<Float16>() || to.lies_as<BFloat16>();
        return HAS_HALVES && half && (size_t) to.address % 2 == 0 && is_plain();
    }

    // Whether there is a loss of targets, and whether it has a u that is not 0.
    bool targeted() const { return operation == CROSS_ENTROPY || operation == NLL_LOSS; }
    bool spread() const { return targeted() && (second() || options.label_smoothing != 0); }

    // Whether non-temporal stores pay for an output that is larger than the caches; `native` is one of the compute
    // dtype, aligned and in the byte order of the CPU, `size` bytes an element.
    bool may_stream(const Operand &to, bool native, Index size) const {
        const bool in_place = to.address == x().address;
        if (across && classes < SHORT && to.classes < to.inner)  // short rows are written as one piece
            return native && !in_place && to.classes == size && to.inner == classes * size;
        if (across)  // pieces of lines do not pay
            return to.format == IN_PLACE && (to.outer | to.classes) % 64 == 0;
        // nor what is in the cache: as the input, or because it is needed once more
        return (to.format == IN_PLACE || writes_halves(to)) && !in_place && classes >= STREAM_CLASSES &&
               !spread() && !capped();
    }
};

INLINE Index least(Index a, Index b) {
    return a < b ? a : b;
}

INLINE Index round_up(Index n, Index step) {
    return (n + step - 1) / step * step;
}

// Buffers on lines of the cache, cut from one piece of memory.
struct Memory {
    char *start, *at;

    explicit Memory(Index size) : start((char *) malloc(size + 64)) {
        at = (char *) (((size_t) start + 63) / 64 * 64);
    }
    Memory(const Memory &) = delete;
    ~Memory() { free(start); }

    template <class T>
    T *take(Index n) {
        T *taken = (T *) at;
        at += n * (Index) sizeof(T);
        return taken;
    }
};

}  // namespace
