# The backend's whole source. It is compiled once for each instruction set, as _v1, _v3 and _v4.

include "vector.pxi"
include "maths.pxi"
include "state.pxi"
include "convert.pxi"
include "blocks.pxi"
include "call.pxi"
include "rows.pxi"
include "columns.pxi"
include "reductions.pxi"
include "elementwise.pxi"
include "module.pxi"
