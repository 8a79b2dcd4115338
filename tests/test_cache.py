"""Kernels on disk: found by the next process, never stale, and their failures are none of a call."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import fastll

numba = pytest.importorskip("numba")
config = numba.core.config
cache = import_module("fastll.backend.numba.cache")
disk = import_module("fastll.backend.disk")
folds = import_module("fastll.backend.numba.folds")

#: Calls the smallest kernel; prints whether it was compiled.
CHECK_LABELS = """
import numpy as np, fastll.backend.numba
from fastll.backend.numba.folds import check_labels
assert check_labels(np.arange(3), 2, -100, np.empty(0)) == (2, 0.0, 0.0)
print(not check_labels.stats.cache_hits)
"""


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Call a kernel as a new process would; whether it was compiled. An own, empty directory."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))

    def call():
        kernel = cache.cached(numba.njit(**folds.KERNEL)(folds.check_labels.py_func))
        assert kernel(np.arange(3), 2, -100, np.empty(0)) == (2, 0.0, 0.0)
        return not kernel.stats.cache_hits

    return call


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def start(code, folder, **options):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, "NUMBA_CACHE_DIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def output(process):
    printed, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "")
    return printed.strip()


def test_the_next_process_compiles_nothing():
    """Every kernel, and the conversions of float16. Nor does it load what Numba compiles with."""
    code = """
    import hashlib
    import numpy as np
    import fastll, fastll.operations

    rng, results = np.random.default_rng(0), []
    with fastll.use_backend("numba"):
        for dtype in (np.float32, np.float16):
            for axis in (0, 1):
                for o in fastll.operations.OPERATIONS.values():
                    arrays = o.make(rng, (40, 50), axis, dtype)
                    options = o.keywords(rng, (40, 50), axis, dtype, {})
                    results.append(o.function(*arrays, **options))
    digest = hashlib.sha256(b"".join(np.asarray(r).tobytes() for r in results)).hexdigest()
    """
    scope = {}
    exec(textwrap.dedent(code), scope)
    listen = """
    from numba.core import event
    passes = event.RecordingListener()
    event.register("numba:run_pass", passes)
    """
    report = """
    import sys
    print(len(passes.buffer), "numba.np.linalg" in sys.modules, digest)
    """
    script = "".join(map(textwrap.dedent, (listen, code, report)))
    assert output(start(script, config.CACHE_DIR)) == f"0 False {scope['digest']}"


def test_entries_of_several_processes_meet(tmp_path):
    """Functions that a factory makes first in their processes are one and the same to Numba."""
    code = """
    import sys, numpy as np
    from ctypes import CFUNCTYPE, c_int64
    import fastll.backend.numba
    from fastll.backend.numba.convert import reader
    source, results = np.array([-1]), np.empty(1)
    for code in {codes}:
        function = CFUNCTYPE(None, *[c_int64] * 5)(reader(code, False, "float64").address)
        function(source.ctypes.data, 8, results.ctypes.data, 8, 1)
        print(results[0], reader(code, False, "float64").cache_hits, end=" ")
    """
    assert output(start(code.format(codes=[5]), tmp_path)) == "-1.0 0"
    assert output(start(code.format(codes=[9]), tmp_path)) == "65535.0 0"
    assert output(start(code.format(codes=[5, 9]), tmp_path)) == "-1.0 1 65535.0 1"


def test_an_entry_is_found(compiled, tmp_path):
    assert [compiled(), compiled()] == [True, False]
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-100],
        lambda content: bytes(len(content)),
        lambda content: content[:5000] + b"?" + content[5001:],
        lambda content: disk.digest(b"no pickle") + b"no pickle",
    ],
    ids=["empty", "truncated", "zeros", "one byte", "another format"],
)
def test_a_damaged_entry_is_replaced(compiled, tmp_path, damage):
    compiled()
    (entry,) = files(tmp_path)
    entry.write_bytes(damage(entry.read_bytes()))
    assert [compiled(), compiled()] == [True, False]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users on this system")
def test_an_entry_of_someone_else_is_not_run(compiled, monkeypatch):
    compiled()
    theirs = os.stat_result([0] * 4 + [os.geteuid() + 12345] + [0] * 5)
    monkeypatch.setattr(os, "fstat", lambda handle: theirs)
    assert compiled()


def test_nowhere_to_write(compiled, tmp_path, monkeypatch):
    """A file where the directory is to be: unlike permissions, it stops the superuser too."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    assert [compiled(), compiled()] == [True, True]


def test_no_home(compiled, monkeypatch):
    def home():
        raise RuntimeError("no home")

    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    assert [compiled(), compiled()] == [True, True]


@pytest.mark.parametrize("function", ["replace", "utime"])
def test_a_full_or_read_only_disk(compiled, tmp_path, monkeypatch, function):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, function, fail)
    assert [compiled(), compiled()] == [True, function == "replace"]
    assert len(files(tmp_path)) == (function == "utime")


def test_processes_at_once(tmp_path, compiled):
    processes = [start(CHECK_LABELS, tmp_path) for _ in range(3)]
    assert all(output(process) in ("True", "False") for process in processes)
    assert len(files(tmp_path)) == 1
    assert not compiled()


def test_other_sources_other_entries(tmp_path):
    """A change in any file, here one that the kernel's own file does not even import."""
    source = Path(fastll.__file__).parent
    shutil.copytree(source, tmp_path / "fastll", ignore=shutil.ignore_patterns("__pycache__"))
    runs = [output(start(CHECK_LABELS, tmp_path / "cache", cwd=tmp_path)) for _ in range(2)]
    with open(tmp_path / "fastll/contract.py", "a") as file:
        file.write("# changed\n")
    runs.append(output(start(CHECK_LABELS, tmp_path / "cache", cwd=tmp_path)))
    assert runs == ["True", "False", "True"]


def test_sources_that_changed_since_their_import(compiled, tmp_path, monkeypatch):
    compiled()
    monkeypatch.setattr(cache, "_version", lambda: "0" * 32)
    assert [compiled(), compiled()] == [True, True]
    assert len(files(tmp_path)) == 1


def test_switched_off(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLL_CACHE", "0")
    assert [compiled(), compiled()] == [True, True]
    assert not files(tmp_path)


def test_old_versions_are_deleted(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "KEPT", 2)
    root = tmp_path / "fastll"
    for age, name in enumerate(["a" * 32, "b" * 32, "c" * 32, "not ours"]):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (10**9 - age, 10**9 - age))
    compiled()
    assert {p.name for p in root.iterdir()} == {"a" * 32, "not ours", cache._IMPORTED}


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the XDG directories")
def test_directory(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert disk.root() == Path("/home/me/.cache/fastll")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk.root() == tmp_path / "fastll"
