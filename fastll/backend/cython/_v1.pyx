include "module.pxi"
include "cpu.pxi"
