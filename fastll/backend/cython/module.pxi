# The Python side: a `Backend` that binds arrays to the kernels of the headers, as `fastll.contract` has
# it. It is compiled once for each instruction set, as _v1, _v3 and _v4.

from libc.stdint cimport int64_t

cimport numpy as cnp

from fastll import threads as _threads
from fastll.backend.host import STREAM_FROM as _STREAM_FROM, Host as _Host
from fastll.dtypes import BFLOAT16 as _BFLOAT16, kind_of

cnp.import_array()

cdef extern from "pool.hpp" nogil:
    const Py_ssize_t CHUNK, LONG

    enum Format:
        IN_PLACE, FLOAT32, FLOAT64, FLOAT16, BFLOAT16

    enum Operation:
        LOGSUMEXP, SOFTMAX, LOG_SOFTMAX, CROSS_ENTROPY, NLL_LOSS, ENTROPY, KL_DIVERGENCE,
        TERMS, ELEMENTS

    cdef struct Operand:
        char* address
        Py_ssize_t outer, classes, inner
        Format format
        bint swapped, streamed

    cdef struct Options:
        int64_t ignore_index
        double label_smoothing, z_loss, softcap, scale, inverse_temperature

    cdef cppclass Call:
        int operation
        bint single, across
        Options options
        double[4] parameters
        Py_ssize_t classes, inner, choices
        Operand[4] inputs
        Operand labels, weight, sample, state, value, partial, lse, sign, selected, out
        bint walk(const cnp.npy_intp*, const cnp.npy_intp*)
        bint may_stream(const Operand&, bint, Py_ssize_t)

    const char** element_names
    const char** term_names
    int run(const Call&, Py_ssize_t, Py_ssize_t)
    int run_shared(const Call&, Py_ssize_t, Py_ssize_t, int, Py_ssize_t)
    Py_ssize_t scan_labels(
        const char*, Py_ssize_t, Py_ssize_t, int64_t, const char*, bint, double*, double*
    )


cdef enum:
    RELEASE_FROM = 1 << 12  # elements of a call that lets other Python threads run, which takes 0.1 us

cdef cnp.dtype BFLOAT16_DTYPE = _BFLOAT16
cdef int bfloat16_number = -1  # of that of ml_dtypes, once it is known
cdef Py_ssize_t stream_from = _STREAM_FROM
cdef dict SHARING = vars(_threads)  # whose SHARE_FROM may change


cdef dict names(const char** table, int first):
    cdef dict codes = {}
    while table[len(codes)] != NULL:
        codes[table[len(codes)].decode()] = first + <int> len(codes)
    return codes


cdef dict MAPS = names(element_names, ELEMENTS)
cdef dict FOLDS = names(term_names, TERMS)
FOLDS.update(
    logsumexp=LOGSUMEXP,
    softmax=SOFTMAX,
    log_softmax=LOG_SOFTMAX,
    cross_entropy=CROSS_ENTROPY,
    nll_loss=NLL_LOSS,
    entropy_from_logits=ENTROPY,
    kl_divergence_from_logits=KL_DIVERGENCE,
)


cdef int code_of(dict codes, operation) except -1:
    code = codes.get(operation)
    if code is None:
        raise NotImplementedError(
            f"the cython backend was built without {operation}: it has {', '.join(codes)}"
        )
    return code


cdef int format_of(cnp.ndarray a) except -2:
    cdef int number = cnp.PyArray_TYPE(a)
    if number == cnp.NPY_FLOAT:
        return FLOAT32
    if number == cnp.NPY_DOUBLE:
        return FLOAT64
    if number == cnp.NPY_FLOAT16:
        return FLOAT16
    if number == bfloat16_number or a.dtype is BFLOAT16_DTYPE:
        return BFLOAT16
    return find_format(a.dtype)


cdef int find_format(cnp.dtype dtype) except -2:
    global bfloat16_number
    cdef int code = kind_of(dtype).code
    if code == BFLOAT16 and dtype.type_num > cnp.NPY_VOID:  # that of ml_dtypes
        bfloat16_number = dtype.type_num
    return code


cdef int is_single(cnp.ndarray x) except -1:
    """Whether an array is computed with in float32."""
    return format_of(x) in (FLOAT32, FLOAT16, BFLOAT16)


cdef int check_memory(int status) except -1:
    if status < 0:
        raise MemoryError("fastll: no memory for the buffers of a kernel")
    return 0


cdef class Kernel:
    """An operation bound to its arrays: see `fastll.contract.Kernel`."""

    cdef Call call
    cdef object arrays  # kept alive
    cdef bint swap  # the outer axis is the faster one of the two row axes: they change places

    def __call__(self, Py_ssize_t start, Py_ssize_t stop):
        self.handle(start, stop, True)

    cdef int handle(self, Py_ssize_t start, Py_ssize_t stop, bint release) except -1:
        """Do the work, and let other Python threads run meanwhile if it is worth their while."""
        cdef int status
        if release:
            with nogil:
                status = run(self.call, start, stop)
        else:
            status = run(self.call, start, stop)
        return check_memory(status)

    cdef int handle_all(self, Py_ssize_t units, Py_ssize_t elements) except -1:
        """The same of all units, on several threads if they have enough elements."""
        cdef int status, threads
        cdef Py_ssize_t share_from = (SHARING["SHARE_FROM"] + 1) // 2
        if units < 2 or elements < min(RELEASE_FROM, share_from):
            return self.handle(0, units, elements >= RELEASE_FROM) if units else 0
        threads = _threads.get_num_threads()
        with nogil:
            status = run_shared(self.call, units, elements, threads, share_from)
        return check_memory(status)

    cdef int walk_rows(self, cnp.ndarray x) except -1:
        self.call.single = is_single(x)
        self.walk(cnp.PyArray_DIMS(x), cnp.PyArray_STRIDES(x))
        return 0

    cdef void walk(self, const cnp.npy_intp* shape, const cnp.npy_intp* strides) noexcept:
        """Choose the kernels that suit an array's strides, and the order of its row axes."""
        self.swap = self.call.walk(shape, strides)

    cdef int bind_full(self, Operand* operand, cnp.ndarray a) except -1:
        """An array in the shape of x: (outer, classes, inner), or (outer, n) of a map."""
        cdef cnp.npy_intp[3] strides
        if a is None:
            return 0
        strides[0], strides[1] = cnp.PyArray_STRIDE(a, 0), cnp.PyArray_STRIDE(a, 1)
        strides[2] = cnp.PyArray_STRIDE(a, 2) if cnp.PyArray_NDIM(a) == 3 else 0
        return self.bind_strided(operand, a, strides)

    cdef int bind_strided(
        self, Operand* operand, cnp.ndarray a, const cnp.npy_intp* strides
    ) except -1:
        """An array of any shape as one of these strides."""
        cdef Py_ssize_t step
        operand.address = cnp.PyArray_BYTES(a)
        operand.outer = strides[2 * self.swap]
        operand.classes = strides[1]
        operand.inner = strides[2 - 2 * self.swap]
        # the stride of the axis that must be contiguous to be read in place
        step = operand.inner if self.call.across else operand.classes
        operand.format = <Format> format_of(a)
        operand.swapped = cnp.PyArray_ISBYTESWAPPED(a)
        if step == cnp.PyArray_ITEMSIZE(a) and self.is_native(operand, a):
            operand.format = IN_PLACE
        return 0

    cdef bint is_native(self, Operand* operand, cnp.ndarray a) noexcept:
        """Whether numbers are as they are computed with, and aligned."""
        cdef Format native = FLOAT32 if self.call.single else FLOAT64
        return operand.format == native and not operand.swapped and cnp.PyArray_ISALIGNED(a)

    cdef int bind_row(self, Operand* operand, cnp.ndarray a) except -1:
        """An array with one entry per row, or several."""
        if a is None:
            return 0
        operand.address = cnp.PyArray_BYTES(a)
        operand.outer = cnp.PyArray_STRIDE(a, self.swap)
        operand.inner = cnp.PyArray_STRIDE(a, 1 - self.swap)
        if cnp.PyArray_NDIM(a) == 3:
            operand.classes = cnp.PyArray_STRIDE(a, 2)
        return 0

    cdef int stream(self, Operand* operand, cnp.ndarray a) except -1:
        """Use non-temporal stores for an output that is larger than the caches."""
        if a is not None and cnp.PyArray_NBYTES(a) >= stream_from:
            operand.streamed = self.call.may_stream(
                operand[0], self.is_native(operand, a), cnp.PyArray_ITEMSIZE(a)
            )
        return 0


class Backend(_Host):
    """See `fastll.contract.Backend`."""

    name = "cython"
    instruction_set = {"_v3": "x86-64-v3", "_v4": "x86-64-v4"}.get(__name__[-3:], "baseline")

    def map(self, call):
        cdef Kernel kernel = Kernel.__new__(Kernel)
        cdef Call* to = &kernel.call
        cdef int i
        kernel.arrays = call
        operation, inputs, value, partial, slope, weight, parameters, scale = <tuple> call
        to.operation = code_of(MAPS, operation)
        to.options.scale = scale
        to.single = is_single(inputs[0])
        to.classes = inputs[0].shape[1]
        to.inner = (to.classes + CHUNK - 1) // CHUNK
        for i, a in enumerate(inputs):
            kernel.bind_full(&to.inputs[i], a)
        for i, parameter in enumerate(parameters):
            to.parameters[i] = parameter
        kernel.bind_full(&to.weight, weight)
        kernel.bind_full(&to.value, value)
        kernel.bind_full(&to.partial, partial)
        kernel.bind_full(&to.out, slope)
        if partial is None:  # whose sums begin where units do, not where lines do
            kernel.stream(&to.value, value)
        return kernel

    def fold(self, call):
        cdef Kernel kernel = Kernel.__new__(Kernel)
        cdef Call* to = &kernel.call
        cdef cnp.ndarray weights = None
        operation, x, second, labels, weight, sample, options, state, *results = <tuple> call
        value, lse, sign, selected, out = results
        to.operation = code_of(FOLDS, operation)
        ignore_index, label_smoothing, z_loss, softcap, scale, tau = <tuple> options
        to.options = Options(ignore_index, label_smoothing, z_loss, softcap, scale, tau)
        kernel.walk_rows(x)
        if to.operation == LOGSUMEXP and second is not None:  # weights lose nothing
            to.single &= is_single(second)
        kernel.bind_full(&to.inputs[0], x)
        kernel.bind_full(&to.inputs[1], second)
        kernel.bind_row(&to.labels, labels)
        if weight is not None:
            weights = weight if weight.flags.aligned else weight.copy()
            to.weight.address = cnp.PyArray_BYTES(weights)
        kernel.bind_row(&to.sample, sample)
        kernel.bind_row(&to.state, state)
        kernel.bind_row(&to.value, value)
        kernel.bind_row(&to.lse, lse)
        kernel.bind_row(&to.sign, sign)
        kernel.bind_row(&to.selected, selected)
        to.choices = 0 if selected is None else selected.shape[2]
        kernel.bind_full(&to.out, out)
        kernel.stream(&to.out, out)
        kernel.arrays = call, weights
        return kernel

    @staticmethod
    def run(kernel, Py_ssize_t units, Py_ssize_t elements):
        if isinstance(kernel, Kernel):
            (<Kernel> kernel).handle_all(units, elements)
        else:  # of another backend that took over
            _threads.run(kernel, units, elements)

    def scan_labels(
        self, cnp.ndarray labels, Py_ssize_t classes, int64_t ignore_index, cnp.ndarray weight
    ):
        cdef const char* first = cnp.PyArray_BYTES(labels)
        cdef const char* weights = <const char*> NULL if weight is None else cnp.PyArray_BYTES(weight)
        cdef Py_ssize_t count = cnp.PyArray_SIZE(labels), position
        cdef bint single = weight is None or is_single(weight)
        cdef double kept, rows
        with nogil:
            position = scan_labels(first, count, classes, ignore_index, weights, single, &kept, &rows)
        return position, kept, rows


backend = Backend()

include "exchange.pxi"
include "direct.pxi"
include "exported.pxi"
include "xla.pxi"
