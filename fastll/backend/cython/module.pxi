# The Python side: a `Backend` that binds arrays to kernels, as `fastll.contract` has it.

cimport numpy as cnp

from fastll.backend.host import Host as _Host
from fastll.backend.shim import Old as _Old
from fastll.contract import SHORT as _SHORT, STREAM_CLASSES as _STREAM_CLASSES
from fastll.contract import STREAM_FROM as _STREAM_FROM
from fastll.dtypes import kind_of

cnp.import_array()

cdef Py_ssize_t SHORT = _SHORT, STREAM_FROM = _STREAM_FROM, STREAM_CLASSES = _STREAM_CLASSES

cdef extern from *:
    """
    #if defined(__AVX512F__)
      #define INSTRUCTION_SET "x86-64-v4"
    #elif defined(__AVX2__)
      #define INSTRUCTION_SET "x86-64-v3"
    #else
      #define INSTRUCTION_SET "baseline"
    #endif
    """
    const char* INSTRUCTION_SET


cdef int run(const Call* call, Py_ssize_t start, Py_ssize_t stop, real like) noexcept nogil:
    if call.operation == SIGMOID:
        return sigmoid_units(call, start, stop, like)
    if call.operation == BINARY_CROSS_ENTROPY:
        return bce_units(call, start, stop, like)
    return reduce(call, start, stop, like)


cdef Format format_of(cnp.ndarray a) except? IN_PLACE:
    cdef int number = cnp.PyArray_TYPE(a)
    if number == cnp.NPY_FLOAT:
        return FLOAT32
    if number == cnp.NPY_DOUBLE:
        return FLOAT64
    return kind_of(a.dtype).code


cdef bint is_single(cnp.ndarray x) except -1:
    """Whether an array is computed with in float32."""
    return format_of(x) in (FLOAT32, FLOAT16, BFLOAT16)


cdef class Kernel:
    """An operation bound to its arrays: see `fastll.contract.Kernel`."""

    cdef Call call
    cdef tuple arrays  # kept alive
    cdef bint swap  # the outer axis is the faster one of the two row axes: they change places

    def __call__(self, Py_ssize_t start, Py_ssize_t stop):
        cdef int status
        with nogil:
            if self.call.single:
                status = run(&self.call, start, stop, <float> 0)
            else:
                status = run(&self.call, start, stop, <double> 0)
        if status < 0:
            raise MemoryError("fastll: no memory for the buffers of a kernel")

    cdef int walk_rows(self, cnp.ndarray x) except -1:
        """Choose the kernels that suit an array's strides, and the order of its row axes."""
        cdef cnp.npy_intp* shape = cnp.PyArray_DIMS(x)
        cdef cnp.npy_intp* strides = cnp.PyArray_STRIDES(x)
        cdef Py_ssize_t inner = shape[2], step = abs(strides[2])
        self.swap = inner == 1 or (shape[0] > 1 and abs(strides[0]) < step)
        if self.swap:
            inner, step = shape[0], abs(strides[0])
        self.call.single = is_single(x)
        self.call.classes = shape[1]
        self.call.inner = inner
        self.call.across = inner > 1 and (abs(strides[1]) > step or shape[1] < SHORT)
        return 0

    cdef int walk_units(self, cnp.ndarray x) except -1:
        """Cut the outer rows of an array of elements into units."""
        self.call.single = is_single(x)
        self.call.classes = cnp.PyArray_DIM(x, 1)
        self.call.inner = (self.call.classes + CHUNK - 1) // CHUNK
        return 0

    cdef int bind_full(self, Operand* operand, cnp.ndarray a) except -1:
        if a is None:
            return 0
        operand.address = cnp.PyArray_BYTES(a)
        operand.outer = cnp.PyArray_STRIDE(a, 2 if self.swap else 0)
        operand.classes = cnp.PyArray_STRIDE(a, 1)
        operand.inner = cnp.PyArray_STRIDE(a, 0 if self.swap else 2)
        return self.bind_format(operand, a, operand.inner if self.call.across else operand.classes)

    cdef int bind_elements(self, Operand* operand, cnp.ndarray a) except -1:
        if a is None:
            return 0
        operand.address = cnp.PyArray_BYTES(a)
        operand.outer = cnp.PyArray_STRIDE(a, 0)
        operand.classes = cnp.PyArray_STRIDE(a, 1)
        return self.bind_format(operand, a, operand.classes)

    cdef int bind_format(self, Operand* operand, cnp.ndarray a, Py_ssize_t step) except -1:
        """`step` is the stride of the axis that must be contiguous to be read in place."""
        operand.format = format_of(a)
        operand.swapped = cnp.PyArray_ISBYTESWAPPED(a)
        operand.native = (
            operand.format == (FLOAT32 if self.call.single else FLOAT64)
            and not operand.swapped
            and abs(step) < 1 << 24
            and cnp.PyArray_ISALIGNED(a)
        )
        if operand.native and step == cnp.PyArray_ITEMSIZE(a):
            operand.format = IN_PLACE
        return 0

    cdef int bind_output(self, cnp.ndarray a) except -1:
        """Write what is larger than the caches past them."""
        cdef Operand* out = &self.call.out
        cdef bint pays
        if a is None:
            return 0
        if self.call.across:  # pieces of lines do not pay
            pays = (out.outer | out.classes) % 64 == 0
        else:  # nor what is in the cache: as the input, or because it is needed once more
            pays = out.address != self.call.x.address and self.call.classes >= STREAM_CLASSES
            pays = pays and not (self.call.spread or self.call.capped)
        out.streamed = pays and out.format == IN_PLACE and cnp.PyArray_NBYTES(a) >= STREAM_FROM
        return 0

    cdef int bind_row(self, Operand* operand, cnp.ndarray a) except -1:
        """An array with one entry, or one state, a row."""
        if a is None:
            return 0
        operand.address = cnp.PyArray_BYTES(a)
        operand.outer = cnp.PyArray_STRIDE(a, 1 if self.swap else 0)
        operand.inner = cnp.PyArray_STRIDE(a, 0 if self.swap else 1)
        if cnp.PyArray_NDIM(a) == 3:
            operand.classes = cnp.PyArray_STRIDE(a, 2)
        return 0


cdef Kernel kernel_of(Operation operation, tuple arrays):
    cdef Kernel kernel = Kernel.__new__(Kernel)
    kernel.call.operation = operation
    kernel.arrays = arrays
    return kernel


class Backend(_Old, _Host):
    """See `fastll.contract.Backend`."""

    name = "cython"
    instruction_set = INSTRUCTION_SET.decode()

    def _logsumexp(
        self, cnp.ndarray x, cnp.ndarray b, cnp.ndarray state, cnp.ndarray out, cnp.ndarray sign
    ):
        cdef Kernel kernel = kernel_of(LOGSUMEXP, (x, b, state, out, sign))
        kernel.walk_rows(x)
        kernel.bind_full(&kernel.call.x, x)
        kernel.bind_full(&kernel.call.b, b)
        kernel.bind_row(&kernel.call.state, state)
        kernel.bind_row(&kernel.call.lse, out)
        kernel.bind_row(&kernel.call.sign, sign)
        return kernel

    def _softmax(self, cnp.ndarray x, cnp.ndarray state, cnp.ndarray out, bint log):
        cdef Kernel kernel = kernel_of(SOFTMAX, (x, state, out))
        kernel.walk_rows(x)
        kernel.call.log = log
        kernel.bind_full(&kernel.call.x, x)
        kernel.bind_row(&kernel.call.state, state)
        kernel.bind_full(&kernel.call.out, out)
        kernel.bind_output(out)
        return kernel

    def _cross_entropy(
        self,
        cnp.ndarray x,
        cnp.ndarray target,
        cnp.ndarray labels,
        cnp.ndarray weight,
        options,
        cnp.ndarray loss,
        cnp.ndarray lse,
        cnp.ndarray grad,
    ):
        if weight is not None and not cnp.PyArray_ISALIGNED(weight):
            weight = weight.copy()
        cdef Kernel kernel = kernel_of(CROSS_ENTROPY, (x, target, labels, weight, loss, lse, grad))
        cdef Options* to = &kernel.call.options
        to.ignore_index, to.label_smoothing, to.z_loss, to.softcap, to.scale = options
        kernel.call.sparse = labels is not None
        kernel.call.spread = target is not None or to.label_smoothing != 0.0
        kernel.call.capped = to.softcap != 0.0
        kernel.walk_rows(x)
        kernel.bind_full(&kernel.call.x, x)
        kernel.bind_full(&kernel.call.target, target)
        kernel.bind_row(&kernel.call.labels, labels)
        if weight is not None:
            kernel.call.weight.address = cnp.PyArray_BYTES(weight)
        kernel.bind_row(&kernel.call.loss, loss)
        kernel.bind_row(&kernel.call.lse, lse)
        kernel.bind_full(&kernel.call.out, grad)
        kernel.bind_output(grad)
        return kernel

    def scan_labels(
        self, cnp.ndarray labels, Py_ssize_t classes, long long ignore_index, cnp.ndarray weight
    ):
        cdef const char* first = cnp.PyArray_BYTES(labels)
        cdef const char* weights = NULL
        cdef Py_ssize_t count = cnp.PyArray_SIZE(labels), position
        cdef bint single = True
        cdef double total_weight
        if weight is not None:
            weights = cnp.PyArray_BYTES(weight)
            single = is_single(weight)
        with nogil:
            position = check_labels(
                first, count, classes, ignore_index, weights, single, &total_weight
            )
        return position, total_weight

    def _sigmoid(self, cnp.ndarray x, cnp.ndarray out, bint log):
        cdef Kernel kernel = kernel_of(SIGMOID, (x, out))
        kernel.walk_units(x)
        kernel.call.log = log
        kernel.bind_elements(&kernel.call.x, x)
        kernel.bind_elements(&kernel.call.out, out)
        kernel.bind_output(out)
        return kernel

    def _binary_cross_entropy(
        self,
        cnp.ndarray x,
        cnp.ndarray target,
        cnp.ndarray weight,
        cnp.ndarray pos_weight,
        double scale,
        cnp.ndarray loss,
        cnp.ndarray partial,
        cnp.ndarray grad,
    ):
        cdef Kernel kernel = kernel_of(
            BINARY_CROSS_ENTROPY, (x, target, weight, pos_weight, loss, partial, grad)
        )
        kernel.walk_units(x)
        kernel.call.options.scale = scale
        kernel.bind_elements(&kernel.call.x, x)
        kernel.bind_elements(&kernel.call.target, target)
        kernel.bind_elements(&kernel.call.weight, weight)
        kernel.bind_elements(&kernel.call.pos_weight, pos_weight)
        kernel.bind_elements(&kernel.call.loss, loss)
        kernel.bind_elements(&kernel.call.partial, partial)
        kernel.bind_elements(&kernel.call.out, grad)
        return kernel


backend = Backend()
