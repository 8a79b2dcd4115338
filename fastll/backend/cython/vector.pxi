# The vectors of vector.hpp, and loops over memory by them.

from libc.math cimport INFINITY, NAN, fabs
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

ctypedef fused real:
    float
    double

cdef enum:
    LANES = 32  # the most a vector has; see lanes_of
    AHEAD = 2048  # bytes from what is read or written to what is prefetched

cdef extern from "vector.hpp" nogil:
    cdef cppclass Vec[T]:
        Vec operator+(Vec)
        Vec operator-(Vec)
        Vec operator*(Vec)
        Vec operator/(Vec)

    Vec[T] splat[T](T)
    Vec[T] fma[T](Vec[T], Vec[T], Vec[T])
    Vec[T] maximum[T](Vec[T], Vec[T])
    Vec[T] where_eq[T](Vec[T], Vec[T], Vec[T], Vec[T])
    Vec[T] where_gt[T](Vec[T], Vec[T], Vec[T], Vec[T])
    Vec[T] where_ge[T](Vec[T], Vec[T], Vec[T], Vec[T])
    Vec[T] absolute[T](Vec[T])
    Vec[T] exponent_bits[T](Vec[T])
    Vec[T] load_all[T](const T*)
    Vec[T] load_some[T](const T*, int64_t, Vec[T])
    void store_all[T](T*, Vec[T])
    void store_some[T](T*, int64_t, Vec[T])
    void stream_all[T](T*, Vec[T])
    Vec[T] load_strided[T](const T*, int64_t)
    void store_strided[T](T*, int64_t, Vec[T])
    void stream_fence()
    Vec[double] widen_lower[T](Vec[T])
    Vec[double] widen_upper[T](Vec[T])
    double total[T](Vec[T])
    double largest[T](Vec[T])
    void prefetch(const void*)
    T first[T](Vec[T])
    Vec[T] round_down[T](Vec[T])
    void exponents(Vec[double], Vec[double]*, Vec[double]*)
    double double_of(int64_t)
    int64_t from_halves(const void*, float*, int64_t)
    int64_t to_halves(const float*, void*, int64_t)


cdef inline int lanes_of(const real* v) noexcept nogil:
    return 128 // sizeof(real)


cdef inline Py_ssize_t vectors_of(const real* v, Py_ssize_t n) noexcept nogil:
    """Number of vectors that hold n numbers, the last one perhaps in part."""
    return (n + lanes_of(v) - 1) // lanes_of(v)


cdef inline void prefetch_vector(const void* address) noexcept nogil:
    """Fetch two lines of the cache, which need not exist. The CPU's own prefetcher is late for us."""
    prefetch(<const char*> address)
    prefetch(<const char*> address + 64)


cdef inline Vec[real] load(const real* v, Py_ssize_t count, Vec[real] pad) noexcept nogil:
    """The first `count` numbers of v, then `pad`."""
    return load_all(v) if count >= lanes_of(v) else load_some(v, count, pad)


cdef inline Vec[real] load_ahead(const real* v, Py_ssize_t count, Vec[real] pad) noexcept nogil:
    """`load` in a walk through memory."""
    prefetch_vector(<const char*> v + AHEAD)
    return load(v, count, pad)


cdef inline void store(real* v, Py_ssize_t count, Vec[real] x) noexcept nogil:
    """Write the first `count` lanes."""
    if count >= lanes_of(v):
        store_all(v, x)
    else:
        store_some(v, count, x)
