include "kernels.pxi"
include "cpu.pxi"
