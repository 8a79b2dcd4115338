# The handler that XLA calls, for `fastll.interop.jax`.

from cpython.pycapsule cimport PyCapsule_New


cdef extern from "xla.hpp" nogil:
    cdef struct XlaError "xla::Error":
        pass
    cdef struct XlaFrame "xla::Frame":
        pass
    XlaError* xla_handle "xla::handle"(XlaFrame*)
    void xla_speak "xla::speak"(int)
    void xla_configure "xla::configure"(int, Py_ssize_t, Py_ssize_t)


class Xla:
    """Kernels for XLA: what is registered, how it names operations, and what it may use."""

    @staticmethod
    def handler(int major, int minor):
        """A handler for XLA's interface in this version."""
        if major != 0 or minor < 1:
            raise ImportError(f"fastll speaks versions 0.1 to 0.3 of XLA's interface, not {major}.{minor}")
        xla_speak(min(minor, 3))
        return PyCapsule_New(<void*> xla_handle, NULL, NULL)

    @staticmethod
    def code_of(operation):
        return MAPS[operation] if operation in MAPS else code_of(FOLDS, operation)

    @staticmethod
    def use(int threads):
        """Use up to so many threads for a call."""
        xla_configure(threads, (SHARING["SHARE_FROM"] + 1) // 2, stream_from)
