# Strided numbers of any dtype to contiguous ones of the compute dtype, and back, a block at a time.

from libc.stdint cimport (
    int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
)

cdef enum Format:
    IN_PLACE = -1  # needs no conversion: contiguous, aligned and in the compute dtype
    # in the order of `fastll.dtypes.FORMATS`
    FLOAT32
    FLOAT64
    FLOAT16
    BFLOAT16
    INT8
    INT16
    INT32
    INT64
    UINT8
    UINT16
    UINT32
    UINT64

ctypedef fused stored:
    float
    double
    int8_t
    int16_t
    int32_t
    int64_t
    uint8_t
    uint16_t
    uint32_t
    uint64_t

cdef extern from *:
    """
    static inline uint32_t bits_of(float value) {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        return bits;
    }

    static inline float float_of(uint32_t bits) {
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    """
    uint32_t bits_of(float) nogil
    float float_of(uint32_t) nogil


cdef inline stored element(const char* at, bint swapped, stored like) noexcept nogil:
    """The number at an address that need not be aligned, and in the other byte order if `swapped`."""
    cdef stored value = 0
    cdef char* to = <char*> &value
    cdef int i
    if swapped:
        for i in range(<int> sizeof(stored)):
            to[i] = at[<int> sizeof(stored) - 1 - i]
    else:
        memcpy(&value, at, sizeof(stored))
    return value


cdef inline float from_half(uint32_t bits) noexcept nogil:
    """float16. Subnormal: its 10 bits under the exponent of 2**-14, less 2**-14."""
    cdef uint32_t magnitude = (bits & 0x7FFF) << 13
    cdef uint32_t exponent = magnitude & 0x0F800000
    cdef uint32_t small = bits_of(float_of(magnitude | 0x38800000) - float_of(0x38800000))
    cdef uint32_t special = magnitude | 0x7F800000
    magnitude = special if exponent == 0x0F800000 else magnitude + (112 << 23)
    magnitude = small if exponent == 0 else magnitude
    return float_of((bits & 0x8000) << 16 | magnitude)


cdef inline uint32_t to_half(float value) noexcept nogil:
    """float16, to nearest even. Subnormal: the sum with 0.5 rounds at bit 2**-24."""
    cdef uint32_t bits = bits_of(value)
    cdef uint32_t magnitude = bits & 0x7FFFFFFF
    cdef uint32_t odd = (magnitude >> 13) & 1
    cdef uint32_t small = bits_of(float_of(magnitude) + <float> 0.5) - 0x3F000000
    cdef uint32_t special = 0x7E00 if magnitude > 0x7F800000 else 0x7C00
    cdef uint32_t rest = (magnitude - (112 << 23) + 0x0FFF + odd) >> 13
    rest = small if magnitude < 0x38800000 else rest  # below 2**-14
    rest = special if magnitude >= 0x47800000 else rest  # 2**16 and beyond
    return (bits >> 16) & 0x8000 | rest


cdef inline float from_bfloat(uint32_t bits) noexcept nogil:
    return float_of(bits << 16)


cdef inline uint32_t to_bfloat(float value) noexcept nogil:
    """bfloat16, to nearest even."""
    cdef uint32_t bits = bits_of(value)
    cdef uint32_t odd = (bits >> 16) & 1
    cdef uint32_t quiet = (bits >> 16) | 0x40
    return quiet if value != value else (bits + 0x7FFF + odd) >> 16


cdef void read_numbers(
    const char* source, Py_ssize_t step, Py_ssize_t n, bint swapped, real* out, stored like
) noexcept nogil:
    cdef Py_ssize_t i
    if step == sizeof(stored) and not swapped:
        for i in range(n):
            out[i] = <real> element(source + i * <Py_ssize_t> sizeof(stored), False, like)
    else:
        for i in range(n):
            out[i] = <real> element(source + i * step, swapped, like)


cdef void read_halves(
    const char* source, Py_ssize_t step, Py_ssize_t n, bint swapped, real* out, bint brain
) noexcept nogil:
    """float16, or bfloat16 if `brain`."""
    cdef Py_ssize_t i, done = 0
    cdef uint16_t bits
    if step == 2 and not swapped:
        if real is float and not brain:
            done = from_halves(source, out, n)
        for i in range(done, n):
            bits = element(source + i * 2, False, <uint16_t> 0)
            out[i] = from_bfloat(bits) if brain else from_half(bits)
    else:
        for i in range(n):
            bits = element(source + i * step, swapped, <uint16_t> 0)
            out[i] = from_bfloat(bits) if brain else from_half(bits)


cdef void write_numbers(
    const real* numbers, char* out, Py_ssize_t step, Py_ssize_t n
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        memcpy(out + i * step, numbers + i, sizeof(real))


cdef void write_halves(
    const float* numbers, char* out, Py_ssize_t step, Py_ssize_t n, bint brain
) noexcept nogil:
    cdef Py_ssize_t i, done
    cdef uint16_t bits
    if step == 2:
        done = 0 if brain else to_halves(numbers, out, n)
        for i in range(done, n):
            bits = <uint16_t> (to_bfloat(numbers[i]) if brain else to_half(numbers[i]))
            memcpy(out + i * 2, &bits, 2)
    else:
        for i in range(n):
            bits = <uint16_t> (to_bfloat(numbers[i]) if brain else to_half(numbers[i]))
            memcpy(out + i * step, &bits, 2)


cdef void read_block(
    Format format, bint swapped, const char* source, Py_ssize_t step, Py_ssize_t n, real* out
) noexcept nogil:
    """n numbers, `step` bytes apart, into the compute dtype."""
    if format == FLOAT32:
        read_numbers(source, step, n, swapped, out, <float> 0)
    elif format == FLOAT64:
        read_numbers(source, step, n, swapped, out, <double> 0)
    elif format == FLOAT16:
        read_halves(source, step, n, swapped, out, False)
    elif format == BFLOAT16:
        read_halves(source, step, n, swapped, out, True)
    elif format == INT8:
        read_numbers(source, step, n, swapped, out, <int8_t> 0)
    elif format == INT16:
        read_numbers(source, step, n, swapped, out, <int16_t> 0)
    elif format == INT32:
        read_numbers(source, step, n, swapped, out, <int32_t> 0)
    elif format == INT64:
        read_numbers(source, step, n, swapped, out, <int64_t> 0)
    elif format == UINT8:
        read_numbers(source, step, n, swapped, out, <uint8_t> 0)
    elif format == UINT16:
        read_numbers(source, step, n, swapped, out, <uint16_t> 0)
    elif format == UINT32:
        read_numbers(source, step, n, swapped, out, <uint32_t> 0)
    else:
        read_numbers(source, step, n, swapped, out, <uint64_t> 0)


cdef void write_block(
    Format format, const real* numbers, char* out, Py_ssize_t step, Py_ssize_t n
) noexcept nogil:
    """n numbers of the compute dtype to floating ones, `step` bytes apart."""
    if real is float:
        if format == FLOAT16:
            write_halves(numbers, out, step, n, False)
            return
        if format == BFLOAT16:
            write_halves(numbers, out, step, n, True)
            return
    write_numbers(numbers, out, step, n)
