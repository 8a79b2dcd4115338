# The direct way of a small call: from the arguments of a public function to its results in one step.
#
# It takes what needs no thought: contiguous NumPy arrays in the byte order of the CPU, or arrays that their library
# gives as such, reduced over one axis or all, on the default backend, with up to `LONG`
# elements. Everything else, and above all what is wrong, it declines: it returns None before anything is written, and
# the call goes by `fastll.calls`, where every error is raised. Both ways tell the same kernels the same, so that no
# bit depends on the way.

from cpython.contextvars cimport get_value
from cpython.long cimport PyLong_AsLongLongAndOverflow
from libc.math cimport INFINITY, NAN, isfinite


cdef extern from "numpy/arrayobject.h":
    object PyArray_Empty(int, cnp.npy_intp*, cnp.dtype, int)  # takes over a reference to the dtype
    object PyArray_Scalar(void*, cnp.dtype, object)

cdef enum:
    FEW = 128  # values up to which NumPy's order of sums is known and short; to call NumPy takes 1.4 us

cdef enum Reduction:
    MEAN, SUM, NONE, UNKNOWN

cdef cnp.dtype SINGLE = _np.dtype(_np.float32), DOUBLE = _np.dtype(_np.float64)
cdef object add_up = _np.add.reduce


cdef bint is_plain(a) noexcept:
    return cnp.PyArray_CheckExact(a) and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> a)


cdef bint is_known(cnp.ndarray a) except -1:
    """Whether the dtype is one that kernels read."""
    try:
        return format_of(a) >= 0
    except TypeError:
        return False


cdef bint is_like(a, cnp.ndarray x) except -1:
    """Whether another operand is plain too, and has the shape of the first one."""
    return is_plain(a) and cnp.PyArray_SAMESHAPE(<cnp.ndarray> a, x) and is_known(a)


cdef bint are_apart(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether contiguous arrays share no memory."""
    cdef char* first = cnp.PyArray_BYTES(a)
    cdef char* second = cnp.PyArray_BYTES(b)
    return first + cnp.PyArray_NBYTES(a) <= second or second + cnp.PyArray_NBYTES(b) <= first


cdef bint read_number(value, double* to) except -1:
    """A float or an int, but none of a subclass."""
    cdef int overflow = 0
    if type(value) is float:
        to[0] = <double> value
    elif type(value) is int:
        to[0] = <double> PyLong_AsLongLongAndOverflow(value, &overflow)
    else:
        return False
    return not overflow


cdef bint read_options(tuple options, temperature, Options* to) except -1:
    """Those of a loss of rows: ignore_index, label_smoothing, z_loss and softcap; and the temperature."""
    cdef int overflow = 0
    cdef double divisor
    ignore_index, smoothing, z_loss, softcap = options
    if type(ignore_index) is not int:
        return False
    to.ignore_index = PyLong_AsLongLongAndOverflow(ignore_index, &overflow)
    if overflow or not read_number(temperature, &divisor) or not 0 < divisor < INFINITY:
        return False
    to.inverse_temperature = 1 / divisor
    if not read_number(smoothing, &to.label_smoothing) or not 0 <= to.label_smoothing <= 1:
        return False
    if not read_number(z_loss, &to.z_loss) or not 0 <= to.z_loss < INFINITY:
        return False
    return softcap is None or (read_number(softcap, &to.softcap) and 0 < to.softcap < INFINITY)


cdef Reduction reduction_of(value) except? UNKNOWN:
    if type(value) is not str:
        return UNKNOWN
    return MEAN if value == "mean" else SUM if value == "sum" else NONE if value == "none" else UNKNOWN


cdef cnp.ndarray labels_of(cnp.ndarray target, cnp.ndarray x, int axis):
    """Labels in the shape of x without an axis as int64, or None."""
    cdef int i, ndim = cnp.PyArray_NDIM(target), number = cnp.PyArray_TYPE(target)
    if ndim != cnp.PyArray_NDIM(x) - 1:
        return None
    for i in range(ndim):
        if cnp.PyArray_DIM(target, i) != cnp.PyArray_DIM(x, i + (i >= axis)):
            return None
    if cnp.PyArray_ITEMSIZE(target) < 8:
        return cnp.PyArray_Cast(target, cnp.NPY_INT64)
    return target if cnp.PyTypeNum_ISSIGNED(number) else None


cdef double read(const void* numbers, Py_ssize_t i, bint single) noexcept:
    return (<const float*> numbers)[i] if single else (<const double*> numbers)[i]


cdef object scalar(double value, bint single):
    cdef float rounded = <float> value
    if not single:
        return PyArray_Scalar(&value, DOUBLE, None)
    if isfinite(value) and not isfinite(rounded):
        return _np.float32(value)  # which warns
    return PyArray_Scalar(&rounded, SINGLE, None)


cdef double sum_of(cnp.ndarray values) except? -1:
    """As NumPy adds float64: in eight lanes, which fold by pairs, and in order what is left over."""
    cdef Py_ssize_t i, lane, whole = 0, count = cnp.PyArray_SIZE(values)
    cdef double[FEW] x
    cdef double summed = 0
    if count > FEW:
        return add_up(values, None, DOUBLE)
    for i in range(count):
        x[i] = read(cnp.PyArray_BYTES(values), i, cnp.PyArray_TYPE(values) == cnp.NPY_FLOAT)
    if count >= 8:
        whole = count // 8 * 8
        for i in range(8, whole, 8):
            for lane in range(8):
                x[lane] += x[i + lane]
        summed += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))
    for i in range(whole, count):
        summed += x[i]
    return summed if isfinite(summed) else add_up(values, None, DOUBLE)  # which warns


cdef object total(cnp.ndarray values, double number, double divisor, bint single):
    """The sum of values, or if there are none the number, over a divisor."""
    if values is not None:
        number = sum_of(values)
    return scalar(number / divisor if divisor else NAN, single)


cdef class Small(Kernel):
    """A call on its direct way."""

    cdef tuple inputs  # as NumPy's arrays
    cdef object library  # whose arrays they were, if it is another one
    cdef cnp.ndarray x  # the first of them
    cdef Py_ssize_t length, units  # elements of a row, and the number of rows; or of all, and units of a map
    cdef Py_ssize_t inner  # from one element of a row to the next one
    cdef int axis  # of a row's elements

    cdef bint reduce_over(self, axis) except -1:
        """Take an axis, or with None all elements as one row; choose the kernels."""
        cdef int i, ndim = cnp.PyArray_NDIM(self.x)
        cdef cnp.npy_intp[3] shape
        cdef cnp.npy_intp[3] strides
        self.axis = ndim - 1
        if axis is None:
            self.length = cnp.PyArray_SIZE(self.x)
        elif type(axis) is int and (axis == -1 or axis == ndim - 1):
            self.length = cnp.PyArray_DIM(self.x, ndim - 1)
        elif type(axis) is int and -ndim <= axis < ndim:
            self.axis = axis if axis >= 0 else axis + ndim
            self.length = cnp.PyArray_DIM(self.x, self.axis)
            for i in range(self.axis + 1, ndim):
                self.inner *= cnp.PyArray_DIM(self.x, i)
        else:
            return False
        self.units = cnp.PyArray_SIZE(self.x) // self.length
        shape[0], shape[1], shape[2] = self.units // self.inner, self.length, self.inner
        self.find_strides(self.x, strides)
        self.walk(shape, strides)
        self.bind_like(&self.call.inputs[0], self.x)
        return True

    cdef bint map_over(self, tuple inputs, tuple parameters) except -1:
        """Take all elements of inputs in the shape of x."""
        cdef int i
        self.length = self.call.classes = cnp.PyArray_SIZE(self.x)
        self.units = self.call.inner = (self.length + CHUNK - 1) // CHUNK
        for i, a in enumerate(inputs):
            if not is_like(a, self.x):
                return False
            self.bind_like(&self.call.inputs[i], a)
        for i, parameter in enumerate(parameters):
            self.call.parameters[i] = parameter
        return True

    cdef void find_strides(self, cnp.ndarray a, cnp.npy_intp* strides) noexcept:
        strides[2] = cnp.PyArray_ITEMSIZE(a)
        strides[1] = self.inner * strides[2]
        strides[0] = self.length * strides[1]

    cdef int bind_like(self, Operand* operand, cnp.ndarray a) except -1:
        """Bind a contiguous array in the shape of x."""
        cdef cnp.npy_intp[3] strides
        self.find_strides(a, strides)
        return self.bind_strided(operand, a, strides)

    cdef cnp.ndarray bind_output(self, Operand* operand, out, tuple others):
        """The same of an output: x itself, or apart from all inputs, or a new one; None declines."""
        cdef cnp.dtype dtype = self.x.dtype
        cdef cnp.ndarray a
        if out is None:
            Py_INCREF(dtype)
            a = PyArray_Empty(cnp.PyArray_NDIM(self.x), cnp.PyArray_DIMS(self.x), dtype, 0)
        elif not is_plain(out) or not cnp.PyArray_ISWRITEABLE(<cnp.ndarray> out):
            return None
        else:
            a = out
            if a is not self.x and not (
                cnp.PyArray_SAMESHAPE(a, self.x) and a.dtype == dtype and are_apart(a, self.x)
            ):
                return None
            for other in others:
                if other is not None and not are_apart(a, other):
                    return None
        self.bind_like(operand, a)
        return a

    cdef cnp.ndarray bind_values(self, Operand* operand, double* number, int ndim):
        """Bind values in the shape of the first axes of x but the one of the rows' elements: in a new array, or in
        a number if there are none.
        """
        cdef cnp.ndarray a = None
        cdef cnp.npy_intp[MAX_AXES] shape
        cdef int i
        operand.inner = sizeof(float) if self.call.single else sizeof(double)
        operand.outer = self.inner * operand.inner
        operand.address = <char*> number
        if ndim:
            for i in range(ndim):
                shape[i] = cnp.PyArray_DIM(self.x, i + (i >= self.axis))
            dtype = cnp.NPY_FLOAT if self.call.single else cnp.NPY_DOUBLE
            a = cnp.PyArray_EMPTY(ndim, shape, dtype, 0)
            operand.address = cnp.PyArray_BYTES(a)
        return a

    cdef bint bind_labels(self, cnp.ndarray labels, double* kept) noexcept:
        """Bind labels, and count those that are not ignored; False if one is out of range."""
        self.call.labels.address = cnp.PyArray_BYTES(labels)
        self.call.labels.inner = 8
        self.call.labels.outer = self.inner * 8
        if self.units < RELEASE_FROM:
            return 0 > self.scan(kept)
        with nogil:
            return 0 > self.scan(kept)

    cdef Py_ssize_t scan(self, double* kept) noexcept nogil:
        cdef double rows
        cdef int64_t ignore_index = self.call.options.ignore_index
        return scan_labels(
            self.call.labels.address, self.units, self.length, ignore_index, NULL, True, kept, &rows
        )

    cdef cnp.ndarray bind_sums(self, double* number):
        """Bind the sum of each unit of a map: in a new array, or if there is one, in a number."""
        cdef cnp.ndarray a = None
        cdef cnp.npy_intp[2] shape
        self.call.partial.classes = sizeof(double)
        self.call.partial.address = <char*> number
        if self.units > 1:
            shape[0], shape[1] = 1, self.units
            a = cnp.PyArray_EMPTY(2, shape, cnp.NPY_DOUBLE, 0)
            self.call.partial.address = cnp.PyArray_BYTES(a)
        return a

    cdef object value_of(self, cnp.ndarray a, double* number):
        """What `bind_values` bound."""
        return scalar(read(number, 0, self.call.single), self.call.single) if a is None else a

    cdef object give(self, result):
        """A result, as an array of the caller's library."""
        return result if self.library is None else self.library.adopt(cnp.PyArray_FROM_O(result))

    cdef int work(self) except -1:
        return self.handle_all(self.units, cnp.PyArray_SIZE(self.x))


cdef class Direct:
    """The direct way, where `chosen`, a context variable, or else `environment` does not say otherwise.

    `libraries` has those of other arrays by the type of these.
    """

    cdef object chosen
    cdef bint by_default
    cdef dict libraries

    def __cinit__(self, chosen, environment, libraries):
        self.chosen, self.by_default = chosen, environment is None or environment == "cython"
        self.libraries = libraries

    cdef Small begin(self, dict codes, str operation, tuple inputs, out):
        """A call of some arrays, and perhaps an output, or None."""
        cdef Small call
        cdef object library = None
        name, code = get_value(self.chosen), codes.get(operation)
        if code is None or not (self.by_default if name is None else name == "cython"):
            return None
        if type(inputs[0]) is not cnp.ndarray:
            library = self.libraries.get(type(inputs[0]))
            if library is None or out is not None or not library.are_plain(inputs):
                return None
            inputs = tuple([exchanged(a) for a in inputs])
        x = inputs[0]
        if not is_plain(x) or not is_known(x) or format_of(x) > BFLOAT16:
            return None
        if cnp.PyArray_NDIM(x) == 0 or not 0 < cnp.PyArray_SIZE(x) <= LONG:
            return None
        call = Small.__new__(Small)
        call.inputs, call.library, call.x = inputs, library, x
        call.inner = 1
        call.axis = MAX_AXES  # none
        call.call.operation = code
        call.call.single = is_single(x)
        call.call.options.scale = call.call.options.inverse_temperature = 1
        return call

    def fold(self, str operation, tuple inputs, axis, double scale=1, out=None):
        """What is made of each row: a value, or for "softmax" and "log_softmax" something of its shape."""
        cdef Small call = self.begin(FOLDS, operation, inputs, out)
        cdef Operand* to
        cdef double number
        cdef cnp.ndarray result
        if call is None or not call.reduce_over(axis):
            return None
        if len(inputs) == 2:
            if not is_like(call.inputs[1], call.x):
                return None
            call.bind_like(&call.call.inputs[1], call.inputs[1])
        call.call.options.scale = scale
        if call.call.operation == SOFTMAX or call.call.operation == LOG_SOFTMAX:
            result = call.bind_output(&call.call.out, out, ())
            if result is None:
                return None
            call.work()
            return call.give(result)
        to = &call.call.lse if call.call.operation == LOGSUMEXP else &call.call.value
        result = call.bind_values(to, &number, 0 if axis is None else cnp.PyArray_NDIM(call.x) - 1)
        call.work()
        return call.give(call.value_of(result, &number))

    def loss(
        self,
        str operation,
        str kind,
        tuple inputs,
        axis,
        tuple options,
        temperature,
        reduction,
        tuple outputs,
    ):
        """A loss of rows, or of rows and a target that is "sparse", "dense" or of "any" of these kinds.

        `outputs` are return_lse, return_grad and grad_out.
        """
        cdef Small call = self.begin(FOLDS, operation, inputs, outputs[2])
        cdef Reduction how = reduction_of(reduction)
        cdef bint return_lse = outputs[0], return_grad = outputs[1]
        cdef int ndim
        cdef double value = 0, lse_value, kept
        cdef cnp.ndarray labels, values, lse = None, grad = None
        if call is None or axis is None or how == UNKNOWN or not call.reduce_over(axis):
            return None
        if not read_options(options, temperature, &call.call.options):
            return None
        kept = call.units
        if len(inputs) == 2:
            target = call.inputs[1]
            if not is_plain(target):
                return None
            if kind != "dense" and cnp.PyTypeNum_ISINTEGER(cnp.PyArray_TYPE(<cnp.ndarray> target)):
                labels = labels_of(target, call.x, call.axis)
                if labels is None or not call.bind_labels(labels, &kept):
                    return None
            elif kind == "sparse" or call.call.options.ignore_index >= 0 or not is_like(target, call.x):
                return None
            elif kind == "any" and format_of(target) > BFLOAT16:
                return None
            else:
                call.bind_like(&call.call.inputs[1], target)
        if how == MEAN:
            call.call.options.scale = 1 / kept if kept else NAN
        if return_grad or outputs[2] is not None:
            grad = call.bind_output(&call.call.out, outputs[2], call.inputs[1:])
            if grad is None:
                return None
        ndim = cnp.PyArray_NDIM(call.x) - 1
        values = call.bind_values(&call.call.value, &value, ndim if how == NONE or call.units > 1 else 0)
        if return_lse:
            lse = call.bind_values(&call.call.lse, &lse_value, ndim)
        call.work()
        if how == NONE:
            loss = call.value_of(values, &value)
        else:
            value = read(&value, 0, call.call.single)
            loss = total(values, value, kept if how == MEAN else 1, call.call.single)
        loss = call.give(loss)
        if return_lse:
            found = call.give(call.value_of(lse, &lse_value))
            return (loss, found, call.give(grad)) if return_grad else (loss, found)
        return (loss, call.give(grad)) if return_grad else loss

    def elementwise(
        self, str operation, tuple inputs, tuple parameters, tuple options, tuple domain=None
    ):
        """An element-wise operation; `domain` is (i, low, high) for an input i that must be in [low, high].

        `options` are reduction, return_grad and grad_out; or of an operation without a gradient, `out` alone.
        """
        cdef bint is_loss = len(options) == 3, return_grad = is_loss and options[1]
        cdef object out = options[2] if is_loss else options[0]
        cdef Small call = self.begin(MAPS, operation, inputs, out)
        cdef Reduction how = reduction_of(options[0]) if is_loss else NONE
        cdef double value
        cdef cnp.ndarray values, grad = None
        if how == UNKNOWN or call is None or not call.map_over(call.inputs, parameters):
            return None
        if domain is not None and not self.is_within(call.inputs[domain[0]], domain[1:]):
            return None
        if not is_loss:
            values = call.bind_output(&call.call.value, out, call.inputs[1:])
            if values is None:
                return None
            call.work()
            return call.give(values)
        if return_grad or out is not None:
            call.call.options.scale = 1 / <double> call.length if how == MEAN else 1
            grad = call.bind_output(&call.call.out, out, call.inputs[1:])
            if grad is None:
                return None
        if how == NONE:
            values = loss = call.bind_values(&call.call.value, &value, cnp.PyArray_NDIM(call.x))
            call.bind_like(&call.call.value, values)
            call.work()
        else:
            values = call.bind_sums(&value)
            call.work()
            loss = total(values, value, call.length if how == MEAN else 1, call.call.single)
        return (call.give(loss), call.give(grad)) if return_grad else call.give(loss)

    cdef bint is_within(self, x, tuple limits) except -1:
        """Whether no number is outside the limits."""
        cdef Small call = self.begin(MAPS, "outside", (x,), None)
        cdef double count
        cdef cnp.ndarray counts
        if call is None or not call.map_over(call.inputs, limits):
            return False
        counts = call.bind_sums(&count)
        call.work()
        return count == 0 if counts is None else not counts.any()
