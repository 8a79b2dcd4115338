"""Rows over threads: one pool of the package's own, for kernels that release the GIL.

The pool is the standard library's. It starts with the first call worth sharing, serves any number of
callers at once (each works on its own call too, so a busy pool delays nobody), and is dropped in a
forked child, which starts its own.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fastll.contract import Kernel

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

#: Elements below which a call stays on its thread: a hand-over costs about as much as this many.
SHARE_FROM = 1 << 17
#: Parts per thread: enough that a thread that is held up is relieved by the others.
_PARTS = 4

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_threads: int | None = None


def run(kernel: Kernel, units: int, elements: int) -> None:
    """Run `kernel` over units 0 to `units`, which hold `elements` elements together."""
    if elements < SHARE_FROM or units < 2 or get_num_threads() == 1:
        if units:
            kernel(0, units)
        return
    parts = min(units, _PARTS * get_num_threads(), max(2, 2 * elements // SHARE_FROM))
    bounds = [units * i // parts for i in range(parts + 1)]
    todo = deque(pairwise(bounds))

    def work() -> None:
        while True:
            try:
                start, stop = todo.popleft()
            except IndexError:
                return
            kernel(start, stop)

    helpers = _start(work, min(parts, get_num_threads()) - 1)
    try:
        work()
    finally:
        todo.clear()  # after an error nobody starts another part
        for helper in helpers:
            if not helper.cancel():  # a helper that has not started by now has nothing left to do
                helper.result()


def _start(work: Any, count: int) -> list[Future[None]]:
    global _pool
    from concurrent.futures import ThreadPoolExecutor  # 5 ms that small calls never need

    try:
        with _lock:
            if _pool is None:
                _pool = ThreadPoolExecutor(get_num_threads() - 1, thread_name_prefix="fastll")
            return [_pool.submit(work) for _ in range(count)]
    except RuntimeError:  # no new threads: the interpreter is shutting down, or the system's limit
        return []


def get_num_threads() -> int:
    """Number of threads a call may use.

    Unless set by `set_num_threads` or the environment variable ``FASTLL_NUM_THREADS``: the CPUs this
    process may use, by its affinity mask and its control group's quota.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    ValueError
        If ``FASTLL_NUM_THREADS`` is not a positive integer.

    Examples
    --------
    >>> import fastll
    >>> fastll.get_num_threads() >= 1
    True
    """
    global _threads
    if _threads is None:
        _threads = _default_threads()
    return _threads


def set_num_threads(n: int | None) -> None:
    """Set the number of threads a call may use, for the whole process.

    Parameters
    ----------
    n : int or None
        At least 1; None returns to the default of `get_num_threads`.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is below 1.

    Examples
    --------
    >>> import fastll
    >>> fastll.set_num_threads(1)
    >>> fastll.get_num_threads()
    1
    >>> fastll.set_num_threads(None)
    """
    global _pool, _threads
    if n is not None:
        if not hasattr(n, "__index__") or isinstance(n, bool):
            raise TypeError(f"n is {n!r}; expected an integer or None")
        if n < 1:
            raise ValueError(f"n is {n}; expected at least 1")
        n = int(n)
    with _lock:
        pool, _pool, _threads = _pool, None, n
    if pool is not None:
        pool.shutdown(wait=False)  # calls in progress finish on it


def _default_threads() -> int:
    setting = os.environ.get("FASTLL_NUM_THREADS")
    if setting:
        if not setting.isdecimal() or int(setting) < 1:
            raise ValueError(f"FASTLL_NUM_THREADS is {setting!r}; expected a positive integer")
        return int(setting)
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cpus, math.ceil(_cgroup_quota())))


def _cgroup_quota() -> float:
    """CPUs that the control group grants, by version 2 (its own and those above it) or version 1."""
    from pathlib import Path

    root = Path("/sys/fs/cgroup")
    own = ""
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                own = line[3:].strip("/")
    except OSError:
        pass
    quotas = [1024.0]  # more CPUs than there are
    folders = [root / own, *(root / own).parents] if own else [root]
    for folder in folders:
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        except (OSError, ValueError):  # no such file, or "max"
            pass
    try:
        quota = (root / "cpu/cpu.cfs_quota_us").read_text()
        period = (root / "cpu/cpu.cfs_period_us").read_text()
        if int(quota) > 0:
            quotas.append(int(quota) / int(period))
    except (OSError, ValueError):
        pass
    return min(quotas)


def _forget() -> None:
    """In a forked child: the parent's pool has no threads here, and its lock may be held."""
    global _lock, _pool
    _lock = threading.Lock()
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
