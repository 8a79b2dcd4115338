"""What `bench/gpu.sh` prints: versions, one line per result, and a profiler's metrics.

python -m bench.summary versions
python -m bench.summary results FILE.json
python -m bench.summary profile FILE.csv
"""

from __future__ import annotations

import csv
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = """
    numpy ml_dtypes numba llvmlite numba-cuda cuda-core cuda-bindings cuda-pathfinder cuda-toolkit
    nvidia-nvvm nvidia-nvjitlink nvidia-cuda-nvrtc nvidia-cuda-runtime torch triton liger-kernel
    cupy-cuda13x jax pytest pytest-benchmark pytest-xdist hypothesis mpmath scipy matplotlib rich
    click cython
"""
#: The profiler's columns to print, and their names.
COLUMNS = {
    "Kernel Name": "kernel",
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
}


def versions() -> Iterator[str]:
    """Versions of all packages involved, and whether each part works: an installed one may not."""
    yield f"python {platform.python_version()}, {platform.platform()}"
    found = []
    for name in PACKAGES.split():
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} -")
    yield ", ".join(found)
    for what, works in (
        ("libnvvm", _nvvm),
        ("nvJitLink", _linker),
        ("fastll", _fastll),
        ("torch", _torch),
    ):
        try:
            yield f"{what}: {works()}"
        except Exception as error:  # errors are what this reports
            yield f"{what}: {type(error).__name__}: {' '.join(str(error).split())}"


def _nvvm() -> str:
    from numba import cuda, types

    code, _ = cuda.compile_ptx(lambda: None, types.void(), cc=(9, 0))
    return "compiles, " + ", ".join(
        line for line in code.splitlines() if line.startswith((".ver", ".tar"))
    )


def _linker() -> str:
    from cuda.core import Program, ProgramOptions
    from numba import cuda, types

    code, _ = cuda.compile_ptx(lambda: None, types.void(), cc=(9, 0))
    return (
        f"links, {len(Program(code, 'ptx', ProgramOptions(arch='sm_90')).compile('cubin').code)} bytes"
    )


def _fastll() -> str:
    import fastll

    said = {name: status.reason or "available" for name, status in fastll.backends().items()}
    return f"{fastll.__version__}, {said}"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}"


def results(path: Path) -> Iterator[str]:
    """One line per measurement."""
    from bench import gpu_report, report

    found = report.load(path)
    for record in report.records(found):
        name = f"{report.title(record)}, {record['case']}, {record['dtype']}"
        yield f"{name:52} {gpu_report.describe(record)}, started in {report.seconds(record['host'])}"
    yield from gpu_report.notes(found)


def profile(path: Path) -> Iterator[str]:
    """One line per kernel, from the CSV of Nsight Compute."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        yield from lines[-20:]  # they say why there are no kernels
        return
    units, *rows = csv.DictReader(lines[start:])
    for row in rows:
        said = (
            f"{name} {row[key][:48]} {units[key]}".strip()
            for key, name in COLUMNS.items()
            if key in row
        )
        yield ", ".join(said)


def main() -> None:
    what, *paths = sys.argv[1:]
    commands = {"versions": versions, "results": results, "profile": profile}
    for line in commands[what](*map(Path, paths)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
