# Vectors of a fixed number of lanes, as arrays and loops of constant length that the C compiler turns
# into vector instructions: 128 bytes, i.e. 32 float32 or 16 float64, whatever the CPU has. So the order
# of every sum is the same on every machine. All arithmetic is IEEE: the flags in setup.py let the
# compiler neither reorder nor contract it.

from libc.math cimport INFINITY, NAN, fabs, fabsf
from libc.string cimport memcpy, memset

ctypedef fused real:
    float
    double

cdef enum:
    LANES = 32  # the most a vector has; see lanes_of
    AHEAD = 1024  # bytes from what is read or written to what is prefetched

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    #if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
      #define FUSED 1
      #define fma_float(a, b, c) __builtin_fmaf(a, b, c)
      #define fma_double(a, b, c) __builtin_fma(a, b, c)
    #else
      #define FUSED 0
      #define fma_float(a, b, c) ((a) * (b) + (c))
      #define fma_double(a, b, c) ((a) * (b) + (c))
    #endif

    #ifdef __GNUC__
      #define prefetch(address) __builtin_prefetch(address)
    #else
      #define prefetch(address) ((void) (address))
    #endif

    static inline float exponent_bits_float(float z) {
        uint32_t bits;
        memcpy(&bits, &z, 4);
        bits <<= 23;
        memcpy(&z, &bits, 4);
        return z;
    }

    static inline double exponent_bits_double(double z) {
        uint64_t bits;
        memcpy(&bits, &z, 8);
        bits <<= 52;
        memcpy(&z, &bits, 8);
        return z;
    }
    """
    void prefetch(const void*) nogil
    float fma_float(float, float, float) nogil
    double fma_double(double, double, double) nogil
    float exponent_bits_float(float) nogil
    double exponent_bits_double(double) nogil


cdef inline real fma(real a, real b, real c) noexcept nogil:
    """a b + c, rounded once where the CPU has an instruction for it."""
    if real is float:
        return fma_float(a, b, c)
    else:
        return fma_double(a, b, c)


cdef inline real exponent_bits(real z) noexcept nogil:
    """The low bits of a number's representation as its sign and exponent, the rest zero."""
    if real is float:
        return exponent_bits_float(z)
    else:
        return exponent_bits_double(z)


cdef inline real absolute(real x) noexcept nogil:
    if real is float:
        return fabsf(x)
    else:
        return fabs(x)


cdef inline real maximum(real a, real b) noexcept nogil:
    """The larger one; `b` where either is NaN."""
    return a if a > b else b


cdef inline int lanes_of(const real* v) noexcept nogil:
    return 128 // sizeof(real)


cdef inline Py_ssize_t vectors_of(const real* v, Py_ssize_t n) noexcept nogil:
    """Number of vectors that hold n numbers, the last one perhaps in part."""
    return (n + lanes_of(v) - 1) // lanes_of(v)


cdef inline void fill(real* v, real value) noexcept nogil:
    cdef int l
    for l in range(lanes_of(v)):
        v[l] = value


cdef inline void prefetch_vector(const void* address) noexcept nogil:
    """Fetch two lines of the cache. The CPU's own prefetcher is too late for what we do to a line."""
    prefetch(<const char*> address)
    prefetch(<const char*> address + 64)


cdef inline const real* load(
    const real* v, Py_ssize_t count, real pad, real* memory
) noexcept nogil:
    """Vector of the first `count` numbers of v, then `pad`: v itself where it is whole, or `memory`."""
    cdef int l
    cdef int few = <int> count
    if count >= lanes_of(v):
        prefetch_vector(<const char*> v + AHEAD)
        return v
    for l in range(lanes_of(v)):
        memory[l] = v[l] if l < few else pad
    return memory


cdef inline void store(real* v, Py_ssize_t count, const real* lanes) noexcept nogil:
    """Write the first `count` lanes."""
    cdef int l
    cdef int few = <int> count
    if count >= lanes_of(v):
        prefetch_vector(<const char*> v + AHEAD)
        for l in range(lanes_of(v)):
            v[l] = lanes[l]
    else:
        for l in range(lanes_of(v)):
            if l < few:
                v[l] = lanes[l]


cdef inline void add_half(double* sums, int half) noexcept nogil:
    cdef int l
    for l in range(half):
        sums[l] = sums[l] + sums[l + half]


cdef inline double total(const real* v, int lanes) noexcept nogil:
    """The sum of the lanes, in float64, by halves."""
    cdef int l
    cdef double[LANES] sums
    for l in range(lanes):
        sums[l] = v[l]
    if lanes == LANES:
        add_half(sums, 16)
    add_half(sums, 8)
    add_half(sums, 4)
    add_half(sums, 2)
    add_half(sums, 1)
    return sums[0]


cdef inline void max_half(real* top, int half) noexcept nogil:
    cdef int l
    for l in range(half):
        top[l] = maximum(top[l], top[l + half])


cdef inline double largest(real* top) noexcept nogil:
    """The largest of the lanes, none of which is NaN; overwrites them."""
    if real is float:
        max_half(top, 16)
    max_half(top, 8)
    max_half(top, 4)
    max_half(top, 2)
    max_half(top, 1)
    return top[0]
