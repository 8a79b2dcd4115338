"""The extension modules of the cython backend. Everything else stands in pyproject.toml."""

import os
import sys
from pathlib import Path
from sysconfig import get_platform

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup

sys.path.insert(
    0, str(Path(__file__).parent)
)  # the formulas of these sources, not of an installed fastll

from fastll.formulas import cpp

FOLDER = Path("fastll/backend/cython")
FORMULAS = Path("build/formulas.hpp")

#: What of -O3 is of use: all of it makes twice the code, which executes more instructions. (Clang takes
#: these names too.)
FLAGS = ["-O2", "-ftree-vectorize", "-fvect-cost-model", "-fpeel-loops", "-g0"]
#: IEEE arithmetic: nothing is reordered or contracted.
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fno-strict-aliasing"]
FLAGS += ["-std=c++17", "-pthread", "-Wno-psabi", "-Wno-ignored-attributes"]
V3 = [*FLAGS, "-mavx2", "-mfma", "-mbmi2", "-mf16c"]
V4 = [*V3, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "cd")), "-mprefer-vector-width=512"]

#: What is small enough to be inline is so because its vectors must stay in registers.
INLINE = [("CYTHON_INLINE", "inline __attribute__((always_inline))")]

if get_platform().startswith("win"):
    modules, INLINE = {"_v1": ["/O2", "/std:c++17"]}, []
elif get_platform().endswith("x86_64"):
    modules = {"_v1": FLAGS, "_v3": V3, "_v4": V4}
else:
    modules = {"_v1": FLAGS}

FORMULAS.parent.mkdir(exist_ok=True)
formulas = cpp.header()
if not FORMULAS.exists() or FORMULAS.read_text() != formulas:  # a newer header means a new build
    FORMULAS.write_text(formulas)

extensions = [
    Extension(
        f"fastll.backend.cython.{name}",
        [f"{FOLDER}/{name}.pyx"],
        include_dirs=[np.get_include(), str(FOLDER), str(FORMULAS.parent)],
        depends=[str(FORMULAS), *(str(path) for path in FOLDER.glob("*.[hp][px][pi]"))],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION"), *INLINE],
        extra_compile_args=flags,
        language="c++",
    )
    for name, flags in modules.items()
]
# what other Cython modules cimport; it finds the best of the others when it is imported
extensions.append(Extension("fastll.cython_kernels", ["fastll/cython_kernels.pyx"]))
directives = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "freethreading_compatible": True,
}
extensions = cythonize(extensions, build_dir="build", compiler_directives=directives)
for extension in extensions:  # fastll works without them
    extension.optional = os.environ.get("FASTLL_REQUIRE_EXT") != "1"

setup(
    ext_modules=extensions,
    options={"build_ext": {"parallel": os.cpu_count()}},
)
