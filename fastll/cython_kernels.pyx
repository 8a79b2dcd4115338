"""Kernels for other Cython modules to cimport and call without the GIL: see cython_kernels.pxd."""

from libc.stdint cimport int64_t

from fastll.backend.cython import ADDRESSES

# `PlainRows` of backend/cython/exported.hpp
cdef struct Rows:
    const void* x
    void* out
    void* value
    const void* labels
    int64_t outer, classes, inner
    int64_t[3] x_strides
    int64_t[3] out_strides
    int64_t[2] value_strides
    int64_t[2] label_strides
    int64_t ignore_index
    double scale

cdef enum:
    IGNORE_INDEX = -100

ctypedef int64_t (*OfRows)(const Rows*) noexcept nogil
ctypedef float (*FloatOfRow)(const float*, Py_ssize_t) noexcept nogil
ctypedef double (*DoubleOfRow)(const double*, Py_ssize_t) noexcept nogil
ctypedef void (*FloatRow)(const float*, Py_ssize_t, float*) noexcept nogil
ctypedef void (*DoubleRow)(const double*, Py_ssize_t, double*) noexcept nogil
ctypedef float (*FloatLoss)(const float*, Py_ssize_t, int64_t, float*) noexcept nogil
ctypedef double (*DoubleLoss)(const double*, Py_ssize_t, int64_t, double*) noexcept nogil
ctypedef float (*FloatOf)(float) noexcept nogil
ctypedef double (*DoubleOf)(double) noexcept nogil


cdef void* address(str name) except NULL:
    return <void*> <size_t> ADDRESSES[name]


cdef FloatOfRow logsumexp_float = <FloatOfRow> address("logsumexp_row_float")
cdef DoubleOfRow logsumexp_double = <DoubleOfRow> address("logsumexp_row_double")
cdef FloatRow softmax_float = <FloatRow> address("softmax_row_float")
cdef DoubleRow softmax_double = <DoubleRow> address("softmax_row_double")
cdef FloatRow log_softmax_float = <FloatRow> address("log_softmax_row_float")
cdef DoubleRow log_softmax_double = <DoubleRow> address("log_softmax_row_double")
cdef FloatLoss cross_entropy_float = <FloatLoss> address("cross_entropy_row_float")
cdef DoubleLoss cross_entropy_double = <DoubleLoss> address("cross_entropy_row_double")
cdef FloatOf sigmoid_float = <FloatOf> address("sigmoid_number_float")
cdef DoubleOf sigmoid_double = <DoubleOf> address("sigmoid_number_double")
cdef FloatOf log_sigmoid_float = <FloatOf> address("log_sigmoid_number_float")
cdef DoubleOf log_sigmoid_double = <DoubleOf> address("log_sigmoid_number_double")
# of float, of double
cdef OfRows[2] logsumexps, softmaxes, log_softmaxes, cross_entropies
for i, type_name in enumerate(("float", "double")):
    logsumexps[i] = <OfRows> address(f"logsumexp_rows_{type_name}")
    softmaxes[i] = <OfRows> address(f"softmax_rows_{type_name}")
    log_softmaxes[i] = <OfRows> address(f"log_softmax_rows_{type_name}")
    cross_entropies[i] = <OfRows> address(f"cross_entropy_rows_{type_name}")


cdef real logsumexp(const real* x, Py_ssize_t n) noexcept nogil:
    if real is float:
        return logsumexp_float(x, n)
    else:
        return logsumexp_double(x, n)


cdef void softmax(const real* x, Py_ssize_t n, real* out) noexcept nogil:
    if real is float:
        softmax_float(x, n, out)
    else:
        softmax_double(x, n, out)


cdef void log_softmax(const real* x, Py_ssize_t n, real* out) noexcept nogil:
    if real is float:
        log_softmax_float(x, n, out)
    else:
        log_softmax_double(x, n, out)


cdef real cross_entropy(const real* x, Py_ssize_t n, int64_t label, real* grad) noexcept nogil:
    if real is float:
        return cross_entropy_float(x, n, label, grad)
    else:
        return cross_entropy_double(x, n, label, grad)


cdef Rows rows_of(
    const void* x, Py_ssize_t rows, Py_ssize_t n, Py_ssize_t row_stride, Py_ssize_t stride
) noexcept nogil:
    cdef Rows to
    to.x, to.out, to.value, to.labels = x, NULL, NULL, NULL
    to.outer, to.classes, to.inner = rows, n, 1
    to.x_strides[0], to.x_strides[1], to.x_strides[2] = row_stride, stride, 0
    to.ignore_index, to.scale = IGNORE_INDEX, 1
    return to


cdef void set_out(
    Rows* to, void* out, Py_ssize_t row_stride, Py_ssize_t stride
) noexcept nogil:
    to.out = out
    to.out_strides[0], to.out_strides[1], to.out_strides[2] = row_stride, stride, 0


cdef void set_value(Rows* to, void* value, Py_ssize_t stride) noexcept nogil:
    to.value = value
    to.value_strides[0], to.value_strides[1] = stride, 0


cdef int logsumexp_rows(
    const real* x, Py_ssize_t rows, Py_ssize_t n, Py_ssize_t row_stride, Py_ssize_t stride,
    real* out, Py_ssize_t out_stride,
) noexcept nogil:
    cdef Rows to = rows_of(x, rows, n, row_stride, stride)
    set_value(&to, out, out_stride)
    return <int> logsumexps[real is double](&to)


cdef int softmax_rows(
    const real* x, Py_ssize_t rows, Py_ssize_t n, Py_ssize_t row_stride, Py_ssize_t stride,
    real* out, Py_ssize_t out_row_stride, Py_ssize_t out_stride,
) noexcept nogil:
    cdef Rows to = rows_of(x, rows, n, row_stride, stride)
    set_out(&to, out, out_row_stride, out_stride)
    return <int> softmaxes[real is double](&to)


cdef int log_softmax_rows(
    const real* x, Py_ssize_t rows, Py_ssize_t n, Py_ssize_t row_stride, Py_ssize_t stride,
    real* out, Py_ssize_t out_row_stride, Py_ssize_t out_stride,
) noexcept nogil:
    cdef Rows to = rows_of(x, rows, n, row_stride, stride)
    set_out(&to, out, out_row_stride, out_stride)
    return <int> log_softmaxes[real is double](&to)


cdef int cross_entropy_rows(
    const real* x, Py_ssize_t rows, Py_ssize_t n, Py_ssize_t row_stride, Py_ssize_t stride,
    const int64_t* labels, Py_ssize_t label_stride,
    real* loss, Py_ssize_t loss_stride,
    double scale, real* grad, Py_ssize_t grad_row_stride, Py_ssize_t grad_stride,
) noexcept nogil:
    cdef Rows to = rows_of(x, rows, n, row_stride, stride)
    to.labels, to.scale = labels, scale
    to.label_strides[0], to.label_strides[1] = label_stride, 0
    set_value(&to, loss, loss_stride)
    set_out(&to, grad, grad_row_stride, grad_stride)
    return <int> cross_entropies[real is double](&to)


cdef real sigmoid(real x) noexcept nogil:
    if real is float:
        return sigmoid_float(x)
    else:
        return sigmoid_double(x)


cdef real log_sigmoid(real x) noexcept nogil:
    if real is float:
        return log_sigmoid_float(x)
    else:
        return log_sigmoid_double(x)
