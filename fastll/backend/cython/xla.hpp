// Folds and maps for XLA: a handler of its foreign function interface, which runs without Python.
//
// The structures are those of xla/ffi/api/c_api.h, versions 0.1 to 0.3, as far as they are read here; XLA checks the
// version when the handler is registered, and the handler the sizes that XLA states. An array of XLA is contiguous, its last
// axis the fastest. What `vmap` adds are axes in front, one in each array for each `vmap`, of size 1 in those arrays
// that it leaves as they are: an "entry" is what one position in them has, a call as it was before `vmap`.

#pragma once

#include <cstdio>
#include <new>
#include <string>
#include <vector>

#if defined(__linux__)
  #include <sys/mman.h>
#endif

#include "pool.hpp"

namespace {
namespace xla {

struct Extension {
    size_t size;
    int type;
    Extension *next;
};

struct Version {
    size_t size;
    Extension *extensions;
    int major, minor;
};

struct Metadata {
    size_t size;
    Version version;
    uint32_t traits;
};

struct MetadataExtension {
    Extension base;
    Metadata *metadata;
};

struct Buffer {
    size_t size;
    Extension *extensions;
    int dtype;
    char *data;
    int64_t rank;
    int64_t *shape;
};

struct Buffers {  // arguments or results
    size_t size;
    Extension *extensions;
    int64_t count;
    int *types;
    Buffer **items;
};

struct Numbers {
    int dtype;
    size_t count;
    void *data;
};

struct Attributes {  // in the order of their names
    size_t size;
    Extension *extensions;
    int64_t count;
    int *types;
    void **names;
    Numbers **items;
};

struct Error;

struct NewError {
    size_t size;
    Extension *extensions;
    const char *message;
    int code;
};

struct Api {
    size_t size;
    Extension *extensions;
    Version version;
    void *internal;
    Error *(*create_error)(NewError *);
};

struct Frame {
    size_t size;
    Extension *extensions;
    const Api *api;
    void *context;
    int stage;
    Buffers arguments, results;
    Attributes attributes;
};

enum { METADATA = 1, EXECUTE = 3 };  // an extension, a stage
enum { INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8, FAILED_PRECONDITION = 9 };

// What a function of fastll may use, set from Python: threads, the elements from which on they share a call, and the
// bytes of an output from which on it is streamed.
std::atomic<int> most_threads{1};
std::atomic<Index> share_from{1 << 16}, stream_from{1 << 25};

std::atomic<int> minor_version{3};  // that XLA is told: it refuses one that is newer than its own

void configure(int threads, Index share, Index stream) {
    most_threads = threads, share_from = share, stream_from = stream;
}

void speak(int minor) {
    minor_version = minor;
}

Error *error_of(const Frame *frame, int code, const std::string &message) {
    NewError error = {sizeof error, nullptr, message.c_str(), code};
    return frame->api->create_error(&error);
}

// The format of a dtype of XLA; of those that no function of fastll is given, any.
// Digits of an integer. `std::to_string` would bring a table that all builds in a process share.
std::string text_of(int64_t number, bool is_unsigned = false) {
    char digits[24];
    std::snprintf(digits, sizeof digits, is_unsigned ? "%llu" : "%lld", (long long) number);
    return digits;
}

INLINE Format format_of_dtype(int dtype) {
    switch (dtype) {
        case 2: return INT8;
        case 3: return INT16;
        case 4: return INT32;
        case 5: return INT64;
        case 7: return UINT16;
        case 8: return UINT32;
        case 9: return UINT64;
        case 10: return FLOAT16;
        case 11: return FLOAT32;
        case 12: return FLOAT64;
        case 16: return BFLOAT16;
        default: return UINT8;  // and bool
    }
}

// Bits of operands and results that a call has, in their order; x is always there.
enum { SECOND = 1, THIRD = 2, LABELS = 4, WEIGHT = 8, SAMPLE = 16, UPSTREAM = 32 };
enum { VALUE = 1, LSE = 2, SIGN = 4, OUT = 8 };
enum Reduction { MEAN, SUM, NONE };

// The attributes, as fastll/interop/jax.py writes them: "integers" and "numbers".
struct Plan {
    int64_t operation, operands, results;
    int64_t axes, class_axis;  // of x without the axes of `vmap`; the class axis is not used by a map
    int64_t reduction, ignore_index;
    int64_t lenient;  // labels below 0 count from C, and rows with a label out of range are NaN
};

struct Scalars {  // as `fastll.contract.Options` has them
    double label_smoothing, z_loss, softcap;
    double scale;  // of gradients of what is not reduced
    double inverse_temperature;
};

// An argument or a result.
struct Array {
    char *data = nullptr;  // NULL: there is none
    Format format = FLOAT32;
    Index size = 0, length = 0, entries = 1;  // bytes of an element, elements of an entry, and entries
    const int64_t *shape = nullptr;

    explicit operator bool() const { return data != nullptr; }

    char *entry(Index i) const { return data ? data + i * length * size : nullptr; }

    // Numbers `from` to `from + n` of entries that lie one after the other.
    template <class T>
    void read(Index from, Index n, T *to) const {
        read_block(format, false, data + from * size, size, n, to);
    }
};

// The number of elements of some axes.
INLINE Index count_of(const int64_t *shape, Index axes) {
    Index count = 1;
    for (Index i = 0; i < axes; i++)
        count *= shape[i];
    return count;
}

// The sum in float64.
template <class T>
double sum_of(const T *values, Index n) {
    double sums[8] = {};
    for (Index i = 0; i < n; i++)
        sums[i % 8] += values[i];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Ask for huge pages, as NumPy does for its arrays: XLA's results are fresh memory, and the faults of its small pages
// take longer than the kernels.
INLINE void use_huge_pages(char *address, Index size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr Index PAGE = 1 << 12, FROM = 1 << 22;
    const Index skipped = (PAGE - (Index) ((size_t) address % PAGE)) % PAGE;
    if (size >= FROM)
        madvise(address + skipped, (size - skipped) / PAGE * PAGE, MADV_HUGEPAGE);
#endif
}

INLINE double quotient(double number, double divisor) {
    return divisor != 0 ? number / divisor : (double) NAN;
}

class Handler {
    const Frame *const frame;
    const Plan &plan;
    const Scalars &scalars;
    const bool is_map;
    Array x, second, third, labels, weight, sample, upstream, value, lse, sign, out;
    Index mapped, entries;  // axes that `vmap` added, and their elements
    const int64_t *entry_shape;
    bool single;
    Index outer, classes, inner, rows;  // of an entry

    // An array that has `axes` axes of its own.
    Array array_of(const Buffer *buffer, Index axes) {
        static char nothing[64];  // where an array has no elements, nor an address
        Array a;
        a.data = buffer->data ? buffer->data : nothing;
        a.format = format_of_dtype(buffer->dtype);
        a.size = size_of(a.format);
        a.shape = buffer->shape;
        a.entries = count_of(a.shape, buffer->rank - axes);
        a.length = count_of(a.shape + buffer->rank - axes, axes);
        return a;
    }

    // The entry of an array that belongs to entry i of the results.
    Index entry_of(const Array &a, Index i) const {
        if (!a || a.entries == 1)
            return 0;
        Index at = 0, step = 1;
        for (Index axis = mapped; axis-- > 0; i /= entry_shape[axis])
            if (a.shape[axis] != 1) {
                at += i % entry_shape[axis] * step;
                step *= a.shape[axis];
            }
        return at;
    }

    bool reduces() const { return plan.reduction != NONE; }

    // Whether one call does all entries.
    bool is_uniform() const {
        for (const Array *a : {&x, &second, &third, is_map ? &weight : &x})  // a map may have one for all
            if (*a && a->entries != entries && !(is_map && a->entries == 1))
                return false;
        if (is_map)
            return !reduces() || !upstream || has_one_upstream();
        // a fold has one weight of each class; and the mean of lse**2 is by another divisor than that of the rest
        return !weight || (weight.entries == 1 && !(plan.reduction == MEAN && scalars.z_loss != 0));
    }

    bool has_one_upstream() const {
        for (Index i = 1; i < upstream.entries; i++)
            if (memcmp(upstream.data, upstream.data + i * upstream.size, upstream.size))
                return false;
        return true;
    }

    // What an array has for the rows of some entries.
    template <class T>
    void read_rows(const Array &a, Index entry, Index count, T *to) const {
        if (a.entries == entries)
            return a.read(entry * rows, count * rows, to);
        for (Index i = 0; i < count; i++)
            a.read(entry_of(a, entry + i) * rows, rows, to + i * rows);
    }

    // An operand in the shape of x, from what it has for an entry on.
    void bind(const Call &call, Operand &to, const Array &a, Index entry, bool swap) const {
        if (!a)
            return;
        const Index strides[] = {classes * inner * a.size, inner * a.size, a.size};
        to.address = a.entry(entry_of(a, entry));
        to.outer = strides[2 * swap], to.classes = strides[1], to.inner = strides[2 - 2 * swap];
        to.format = a.format;
        if (is_native(a) && (call.across ? to.inner : to.classes) == a.size)
            to.format = IN_PLACE;
    }

    bool is_native(const Array &a) const { return a.format == (single ? FLOAT32 : FLOAT64); }

    void bind_row(Operand &to, char *address, Index size, bool swap) const {
        to.address = address;
        to.outer = swap ? size : inner * size;
        to.inner = swap ? inner * size : size;
    }

    void stream(const Call &call, Operand &to, const Array &a, Index count) const {
        if (a && count * a.length * a.size >= stream_from)
            to.streamed = call.may_stream(to, is_native(a), a.size);
    }

    Call new_call() const {
        Call call = {};
        call.operation = (int) plan.operation;
        call.single = single;
        call.options.ignore_index = plan.ignore_index;
        call.options.label_smoothing = scalars.label_smoothing;
        call.options.z_loss = scalars.z_loss;
        call.options.softcap = scalars.softcap;
        call.options.scale = scalars.scale;
        call.options.inverse_temperature = scalars.inverse_temperature;
        return call;
    }

    Error *start(const Call &call, Index units, Index elements) const {
        if (units > 0 && run_shared(call, units, elements, most_threads, share_from) < 0)
            throw std::bad_alloc();
        return nullptr;
    }

    // A number that a result has for an entry.
    void put(const Array &to, Index entry, double number) const {
        if (to.size == 4)
            ((float *) to.data)[entry] = (float) number;
        else
            ((double *) to.data)[entry] = number;
    }

    double upstream_of(Index entry) const {
        double g = 1;
        if (upstream)
            upstream.read(entry_of(upstream, entry), 1, &g);
        return g;
    }

    // The labels of some entries as int64.
    Error *read_labels(Index entry, Index count, std::vector<int64_t> &to) const {
        const Index n = count * rows;
        to.resize(n);
        read_rows(labels, entry, count, to.data());
        const int64_t beyond = plan.ignore_index == -1 ? -2 : -1;
        for (Index i = 0; i < n && labels.format == UINT64; i++)
            to[i] = to[i] < 0 ? beyond : to[i];  // of int64
        for (Index i = 0; i < n && plan.lenient; i++)
            to[i] += to[i] < 0 ? classes : 0;
        double kept, kept_rows;
        const Index bad = plan.lenient ? -1 : scan_labels(
            (const char *) to.data(), n, classes, plan.ignore_index, nullptr, true, &kept, &kept_rows
        );
        return bad < 0 ? nullptr : bad_label(entry_of(labels, entry + bad / rows) * rows + bad % rows);
    }

    // As `fastll.contract.bad_label` says it.
    Error *bad_label(Index position) const {
        Index axes = mapped + plan.axes - 1, rest = position;
        std::string at = axes == 1 ? "," : "";
        for (Index axis = axes; axis-- > 0; rest /= labels.shape[axis])
            at = (axis ? ", " : "") + text_of(rest % labels.shape[axis]) + at;
        int64_t label;
        labels.read(position, 1, &label);
        const std::string name = text_of(label, labels.format == UINT64);
        return error_of(
            frame, INVALID_ARGUMENT,
            "target has label " + name + " at (" + at + "); expected 0 <= label < " + text_of(classes) +
                " or ignore_index = " + text_of(plan.ignore_index)
        );
    }

    bool drops(const std::vector<int64_t> &y, const std::vector<double> &samples, Index row) const {
        return samples[row] == 0 || (!y.empty() && y[row] == plan.ignore_index);
    }

    // What a mean over rows divides by: the weight of the kept ones, and of lse**2 their number.
    Two<double, double> weigh(const int64_t *y, const double *samples, const char *weights) const {
        Two<double, double> kept = {(double) rows, (double) rows};
        if (!samples && y)
            scan_labels((const char *) y, rows, classes, plan.ignore_index, weights, single, &kept.a, &kept.b);
        if (!samples)
            return kept;
        kept = {0, 0};
        for (Index i = 0; i < rows; i++) {
            if ((y && y[i] == plan.ignore_index) || samples[i] == 0)
                continue;
            kept.b += samples[i];
            if (weights && y)
                kept.a += samples[i] * (single ? element<float>(weights + y[i] * 4, false)
                                               : element<double>(weights + y[i] * 8, false));
        }
        if (!weights || !y)
            kept.a = kept.b;
        return kept;
    }

    Error *fold(Index entry, Index count) {
        const Index all = count * rows;
        Call call = new_call();
        const Index shape[] = {count * outer, classes, inner};
        const Index strides[] = {classes * inner * x.size, inner * x.size, x.size};
        const bool swap = call.walk(shape, strides);
        bind(call, call.inputs[0], x, entry, swap);
        bind(call, call.inputs[1], second, entry, swap);
        if (weight)
            call.weight.address = weight.entry(entry_of(weight, entry));

        std::vector<int64_t> y;
        if (labels) {
            if (Error *error = read_labels(entry, count, y))
                return error;
            bind_row(call.labels, (char *) y.data(), 8, swap);
        }
        std::vector<double> samples;
        if (sample) {
            samples.resize(all);
            read_rows(sample, entry, count, samples.data());
        }
        // factors of gradients: of rows, of all of them, or where there are several entries, of those of each
        std::vector<double> divisors(plan.reduction == MEAN ? count : 0, 1.0);
        for (Index i = 0; i < (Index) divisors.size(); i++) {
            auto kept = weigh(
                labels ? y.data() + i * rows : nullptr, sample ? samples.data() + i * rows : nullptr,
                call.weight.address
            );
            divisors[i] = kept.a;
            if (scalars.z_loss != 0 && kept.a != kept.b)  // of one entry: see `is_uniform`
                call.options.z_loss *= quotient(kept.a, kept.b);
        }
        if (out && upstream && !reduces()) {
            std::vector<double> factors(all);
            read_rows(upstream, entry, count, factors.data());
            for (Index i = 0; i < all && sample; i++)
                factors[i] *= samples[i];
            samples.swap(factors);
        } else if (out && reduces()) {
            if (count > 1)
                samples.resize(all, 1.0);
            for (Index i = 0; i < count; i++) {
                double factor = upstream_of(entry + i);
                if (plan.reduction == MEAN)
                    factor = count > 1 ? quotient(factor, divisors[i]) : factor * quotient(1, divisors[i]);
                if (count == 1)
                    call.options.scale = factor;
                else
                    for (Index row = i * rows; row < (i + 1) * rows; row++)  // a dropped one even if that is NaN
                        samples[row] = drops(y, samples, row) ? 0 : samples[row] * factor;
            }
        }
        if (!samples.empty())
            bind_row(call.sample, (char *) samples.data(), 8, swap);

        const Index size = single ? 4 : 8;
        std::vector<char> values(value && reduces() ? all * size : 0);
        if (value)
            bind_row(call.value, reduces() ? values.data() : value.data + entry * rows * size, size, swap);
        if (lse)
            bind_row(call.lse, lse.data + entry * rows * size, size, swap);
        if (sign)
            bind_row(call.sign, sign.data + entry * rows * size, size, swap);
        bind(call, call.out, out, entry, swap);
        stream(call, call.out, out, count);
        start(call, all, all * std::max(classes, (Index) 1));
        for (Index i = 0; i < count && value && reduces(); i++) {
            const double total = single ? sum_of((const float *) values.data() + i * rows, rows)
                                        : sum_of((const double *) values.data() + i * rows, rows);
            if (plan.reduction != MEAN)
                put(value, entry + i, total);
            else  // which the factors of the rows have made of it, if there were any
                put(value, entry + i, out && count > 1 && divisors[i] != 0 ? total : quotient(total, divisors[i]));
        }
        return nullptr;
    }

    Error *map(Index entry, Index count) {
        Call call = new_call();
        bool apart = reduces();  // whether entries are rows of their own
        for (const Array *a : {&x, &second, &third, &weight})
            apart |= *a && a->entries != entries;
        const Index outer_rows = apart ? count : 1;
        classes = apart ? x.length : count * x.length;
        call.classes = classes, call.inner = (classes + CHUNK - 1) / CHUNK;
        auto bind_entries = [&](Operand &to, const Array &a) {
            bind(call, to, a, entry, false);
            if (a.entries == 1 && count > 1)
                to.outer = 0;
        };
        bind_entries(call.inputs[0], x);
        bind_entries(call.inputs[1], second);
        bind_entries(call.inputs[2], third);
        bind_entries(call.weight, weight);
        bind_entries(call.out, out);
        std::vector<double> sums;
        if (reduces() && value) {
            sums.resize(std::max(outer_rows * call.inner, (Index) 1));
            call.partial.address = (char *) sums.data();
            call.partial.outer = call.inner * 8, call.partial.classes = 8;
        } else {
            bind_entries(call.value, value);
            stream(call, call.value, value, count);
        }
        if (reduces() && out)
            call.options.scale = upstream_of(entry) * (plan.reduction == MEAN ? quotient(1, x.length) : 1);
        start(call, outer_rows * call.inner, count * x.length);
        for (Index i = 0; i < count && reduces() && value; i++) {
            const double total = sum_of(sums.data() + i * call.inner, call.inner);
            put(value, entry + i, plan.reduction == MEAN ? quotient(total, x.length) : total);
        }
        return nullptr;
    }

public:
    explicit Handler(const Frame *frame)
        : frame(frame), plan(*(const Plan *) frame->attributes.items[0]->data),
          scalars(*(const Scalars *) frame->attributes.items[1]->data), is_map(plan.operation >= ELEMENTS) {
        const Index axes = plan.axes, row_axes = is_map ? axes : axes - 1;
        const Index value_axes = reduces() ? 0 : row_axes;
        Buffer **argument = frame->arguments.items, **result = frame->results.items;
        const int64_t *shape = (*argument)->shape + ((*argument)->rank - axes);
        mapped = (*argument)->rank - axes;
        entry_shape = (*result)->shape;
        entries = count_of(entry_shape, mapped);
        x = array_of(*argument++, axes);
        auto take = [&](Array &a, int bit, Index own) {
            if (plan.operands & bit)
                a = array_of(*argument++, own);
        };
        take(second, SECOND, axes);
        take(third, THIRD, axes);
        take(labels, LABELS, row_axes);
        take(weight, WEIGHT, is_map ? axes : 1);
        take(sample, SAMPLE, row_axes);
        take(upstream, UPSTREAM, value_axes);
        auto give = [&](Array &a, int bit, Index own) {
            if (plan.results & bit)
                a = array_of(*result++, own);
        };
        give(value, VALUE, value_axes);
        give(lse, LSE, row_axes);
        give(sign, SIGN, row_axes);
        give(out, OUT, axes);
        for (const Array *a : {&value, &out})
            if (*a)
                use_huge_pages(a->data, a->entries * a->length * a->size);
        single = x.format != FLOAT64 && !(plan.operation == LOGSUMEXP && second && second.format == FLOAT64);
        outer = is_map ? 1 : count_of(shape, plan.class_axis);
        classes = is_map ? x.length : shape[plan.class_axis];
        inner = is_map ? 1 : count_of(shape + plan.class_axis + 1, axes - plan.class_axis - 1);
        rows = outer * inner;
    }

    Error *run() {
        const bool uniform = is_uniform();
        for (Index entry = 0; entry < entries; entry += uniform ? entries : 1) {
            Error *error = is_map ? map(entry, uniform ? entries : 1) : fold(entry, uniform ? entries : 1);
            if (error)
                return error;
        }
        return nullptr;
    }
};

// What is registered with XLA.
Error *handle(Frame *frame) {
    for (Extension *extension = frame->extensions; extension; extension = extension->next)
        if (extension->type == METADATA) {  // what is not written leaves a version that XLA refuses
            Metadata *metadata = ((MetadataExtension *) extension)->metadata;
            if (frame->size >= sizeof(Frame) && metadata->size >= offsetof(Metadata, traits) + sizeof(uint32_t))
                metadata->version.major = 0, metadata->version.minor = minor_version, metadata->traits = 0;
            return nullptr;
        }
    if (frame->stage != EXECUTE)
        return nullptr;
    const Attributes &attributes = frame->attributes;
    if (attributes.count != 2 || attributes.items[0]->count != sizeof(Plan) / 8 ||
        attributes.items[1]->count != sizeof(Scalars) / 8)
        return error_of(frame, FAILED_PRECONDITION, "this call is of another version of fastll");
    try {
        return Handler(frame).run();
    } catch (const std::bad_alloc &) {
        return error_of(frame, RESOURCE_EXHAUSTED, "fastll: no memory for the buffers of a kernel");
    }
}

}  // namespace xla
}  // namespace
