"""Numba's code, made beside the work: calls that want it do without until it is there.

A thread has a process of its own compile into the cache on disk, at a low priority, and then loads what
it made. Compiling in the thread itself would slow all others down: for 5 to 10 s per kernel it would
want the interpreter's lock, which takes 5 ms each time, and at times keep it for 0.4 s. A child forked
meanwhile would find the locks of Numba and LLVM taken for ever, and the end of the process would have
to wait. To import Numba takes 0.5 s, once, and to load a kernel 30 ms: only for these a fork or the end
of the process wait.

Numba is given up, for the rest of the process, when something fails: what is there stays in use.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections import deque
from collections.abc import Collection, Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

#: The name of code, as `fastll.backend.numba` has it, or of that module.
Need = tuple[Any, ...]
MODULE: Need = ()

_MODULE = "fastll.backend.numba"

_lock = threading.Lock()  # of what follows
_queue: deque[list[Need]] = deque()
_requested: set[Need] = set()
_worker: threading.Thread | None = None
_given_up: str | None = None

_numba = threading.RLock()  # held while the thread is inside Numba
_ending = False


def loaded() -> Any:
    """Numba's backend, if it is imported."""
    return getattr(sys.modules.get(_MODULE), "backend", None)


def why_not() -> str | None:
    """Why nothing more is compiled; None if that is not so."""
    return _given_up


def request(needs: Collection[Need]) -> None:
    """Have code made, unless it was requested before; returns at once."""
    global _worker, _given_up
    if _requested.issuperset(needs):
        return
    with _lock:
        if _given_up is not None or _ending:
            return
        added = [need for need in dict.fromkeys(needs) if need not in _requested]
        if added:
            _requested.update(added)
            _queue.append(added)
        if _queue and _worker is None:
            # at the end of the process nobody waits for it, except as `_end` does
            _worker = threading.Thread(target=_work, name="fastll-takeover", daemon=True)
            try:
                _worker.start()
            except (RuntimeError, MemoryError) as error:
                _worker, _given_up = None, str(error)


def _work() -> None:
    """Serve requests until there are none."""
    global _worker, _given_up
    while True:
        with _lock:
            if not _queue or _given_up is not None:
                _worker = None
                return
            needs = _queue.popleft()
        try:
            _make(needs)
        except Exception as error:
            what = " ".join(map(str, needs[-1])) or "import"
            _given_up = f"{what}: {error or type(error).__name__}"


def _make(needs: Iterable[Need]) -> None:
    """Have what is missing compiled, and load it."""
    with _numba:
        if _ending:
            return
        numba = import_module(_MODULE)
        needs = [need for need in needs if need != MODULE]
        missing = [need for need in needs if not numba.stored(need)]
    if missing:
        _compile(missing)
    with _numba:
        if _ending:
            return
        for need in needs:
            if not numba.stored(need):
                raise OSError("what was compiled is not found on disk")
            numba.make(need)


def _compile(needs: Collection[Need]) -> None:
    """Have a process compile into the cache on disk."""
    import json  # this and the next are 14 ms that most processes can save
    from subprocess import DEVNULL, PIPE, Popen

    if getattr(sys, "frozen", False) or "python" not in Path(sys.executable or "").name.lower():
        raise OSError("there is no interpreter for another process")
    asked = json.dumps([[folder for folder in sys.path if isinstance(folder, str)], list(needs)])
    with Popen(
        [sys.executable, "-P", "-c", _CODE],
        bufsize=0,
        stdin=PIPE,  # stays open: when it ends, and so with this process at the latest, the other ends
        stdout=DEVNULL,
        stderr=PIPE,
        start_new_session=True,  # an interrupt from the terminal is not meant for it
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        with suppress(BrokenPipeError):
            process.stdin.write(f"{asked}\n".encode())
        error = process.stderr.read().decode(errors="replace").strip()
    if process.returncode != 0:
        raise RuntimeError(error.rpartition("\n")[2] or f"exit code {process.returncode}")


#: What the process that compiles runs.
_CODE = """
import json, sys
sys.path[:], needs = json.loads(sys.stdin.readline())
from fastll.takeover import serve
serve(needs)
"""


def serve(needs: list[list[Any]]) -> None:
    """Compile into the cache on disk, as long as there is a process that waits for it."""

    def follow() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(10)
    with suppress(OSError):  # when memory is short, rather this process than the one that waits
        Path("/proc/self/oom_score_adj").write_text("1000")
    numba = import_module(_MODULE)
    numba.cache.probe()
    for need in needs:
        numba.make(tuple(need))


def _end() -> None:
    """At the end of the process the thread must not be inside LLVM, whose memory goes."""
    global _ending
    with _numba:
        _ending = True


def _before_fork() -> None:
    _numba.acquire()
    _lock.acquire()


def _after_fork() -> None:
    _lock.release()
    _numba.release()


def _forget() -> None:
    """A child has what was loaded, and no thread to load more."""
    global _worker
    _queue.clear()
    _requested.clear()
    _worker = None
    _after_fork()


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_forget)
