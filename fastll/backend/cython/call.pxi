# What a kernel is told: its operands and options.

from libc.stdlib cimport free, malloc

cdef enum Operation:
    LOGSUMEXP
    SOFTMAX
    CROSS_ENTROPY
    SIGMOID
    BINARY_CROSS_ENTROPY

cdef struct Call:
    Operation operation
    bint single  # computed in float32
    bint across  # by the passes of columns.pxi
    bint log
    bint sparse  # a cross-entropy with labels
    bint spread  # a cross-entropy whose u is not 0
    bint capped
    Options options
    Py_ssize_t classes  # of element-wise operations: elements of an outer row
    Py_ssize_t inner  # of element-wise operations: units of an outer row
    Operand x
    Operand b  # weights of log-sum-exp
    Operand target
    Operand weight
    Operand pos_weight
    Operand labels
    Operand state
    Operand out  # in the shape of x
    Operand sign
    Operand loss
    Operand lse
    Operand partial


cdef char* aligned(void* memory) noexcept nogil:
    """The first address on a line of the cache, up to 63 bytes on."""
    return <char*> ((<size_t> memory + 63) // 64 * 64)
