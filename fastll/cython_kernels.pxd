# Kernels of fastll for other Cython modules, to be called without the GIL:
#
#     from fastll.cython_kernels cimport logsumexp, softmax_rows
#
# They are those of the instruction set that was chosen at import, and give the bits of fastll's functions. Work
# is done in the calling thread. Numbers are float or double. Nothing raises. Where a label is no class, the loss
# and the gradient are NaN; where it is -100, fastll's `ignore_index`, they are 0. Where no memory is left for
# buffers, functions of one row give NaN, and those of rows return -1, else 0.
#
# Strides are in bytes, as `x.strides` of a memoryview. `out` may be x, with its strides; else it must be apart:
#
#     softmax_rows(&x[0, 0], x.shape[0], x.shape[1], x.strides[0], x.strides[1],
#                  &out[0, 0], out.strides[0], out.strides[1])

from libc.stdint cimport int64_t

ctypedef fused real:
    float
    double

# One row of n contiguous numbers

cdef real logsumexp(const real* x, Py_ssize_t n) noexcept nogil
cdef void softmax(const real* x, Py_ssize_t n, real* out) noexcept nogil
cdef void log_softmax(const real* x, Py_ssize_t n, real* out) noexcept nogil

# Returns the loss; leaves its gradient in `grad` unless that is NULL.
cdef real cross_entropy(const real* x, Py_ssize_t n, int64_t label, real* grad) noexcept nogil

# Rows of n numbers

cdef int logsumexp_rows(
    const real* x, Py_ssize_t rows, Py_ssize_t n, Py_ssize_t row_stride, Py_ssize_t stride,
    real* out, Py_ssize_t out_stride,
) noexcept nogil

cdef int softmax_rows(
    const real* x, Py_ssize_t rows, Py_ssize_t n, Py_ssize_t row_stride, Py_ssize_t stride,
    real* out, Py_ssize_t out_row_stride, Py_ssize_t out_stride,
) noexcept nogil

cdef int log_softmax_rows(
    const real* x, Py_ssize_t rows, Py_ssize_t n, Py_ssize_t row_stride, Py_ssize_t stride,
    real* out, Py_ssize_t out_row_stride, Py_ssize_t out_stride,
) noexcept nogil

# Losses of rows; `scale` times their gradients in `grad`, unless that is NULL.
cdef int cross_entropy_rows(
    const real* x, Py_ssize_t rows, Py_ssize_t n, Py_ssize_t row_stride, Py_ssize_t stride,
    const int64_t* labels, Py_ssize_t label_stride,
    real* loss, Py_ssize_t loss_stride,
    double scale, real* grad, Py_ssize_t grad_row_stride, Py_ssize_t grad_stride,
) noexcept nogil

# Numbers

cdef real sigmoid(real x) noexcept nogil
cdef real log_sigmoid(real x) noexcept nogil
