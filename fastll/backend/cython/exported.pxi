# Addresses of the C functions of exported.hpp, for fastll/cython_kernels.pyx and fastll.interop.numba.

cdef extern from "exported.hpp" nogil:
    cdef struct Exported:
        const char* name
        void* address

    const Exported* exported


cdef dict addresses_of(const Exported* functions):
    cdef dict addresses = {}
    while functions.name != NULL:
        addresses[functions.name.decode()] = <size_t> functions.address
        functions += 1
    return addresses


ADDRESSES = addresses_of(exported)
