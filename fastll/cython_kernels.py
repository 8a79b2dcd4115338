"""What is imported where cython_kernels.pyx was not compiled: extension modules come before sources."""

import fastll.backend.cython  # noqa: F401  # raises if nothing was compiled

raise ImportError(
    "fastll.cython_kernels was not compiled; reinstall fastll "
    "(needs a C++ compiler; FASTLL_REQUIRE_EXT=1 shows its errors)"
)
