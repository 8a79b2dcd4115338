"""Rows divided among threads: fastll's own thread pool, for kernels that release the GIL.

The pool is a `ThreadPoolExecutor`, started by the first call that is large enough. It serves any number
of callers at once: each caller also works on its own call, so a busy pool delays nobody. A forked child
drops it and starts its own.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING

from fastll.contract import Kernel

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

#: A call with fewer elements stays on the caller's thread: handing over costs as much as this many. The
#: threads of Cython take half as long, and much less while they are awake (see its pool.hpp).
SHARE_FROM = 1 << 17
#: Parts per thread: enough for the other threads to take over from one that is held up.
_PARTS = 4

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_threads: int | None = None
_followers: list[Callable[[int], None]] = []


def run(kernel: Kernel, units: int, elements: int) -> None:
    """Run `kernel` over units 0 to `units`, which have `elements` elements in total."""
    threads = get_num_threads()  # once: another thread may set it
    parts = _parts_of(units, elements, threads)
    if parts < 2:
        if units:
            kernel(0, units)
        return
    bounds = [units * i // parts for i in range(parts + 1)]
    todo = deque(pairwise(bounds))
    helpers: list[Future[None]] = []

    def work() -> None:
        while True:
            try:
                start, stop = todo.popleft()
            except IndexError:
                return
            kernel(start, stop)

    try:
        _start(work, min(parts, threads) - 1, threads, helpers)
        work()
    finally:
        todo.clear()  # after an error, no thread starts another part
        # one that has not started yet has nothing left to do; the others are waited for
        errors = [helper.exception() for helper in helpers if not helper.cancel()]
    for error in filter(None, errors):
        raise error


def _parts_of(units: int, elements: int, threads: int) -> int:
    """The number of parts of a call; fewer than 2 if it stays on the caller's thread."""
    if elements < SHARE_FROM or threads == 1:
        return 1
    return min(units, _PARTS * threads, max(2, 2 * elements // SHARE_FROM))


def _start(work: Callable[[], None], count: int, threads: int, helpers: list[Future[None]]) -> None:
    """Have others do `work` too: up to `count` of them, which are added to `helpers`."""
    global _pool
    from concurrent.futures import Future, ThreadPoolExecutor  # takes 5 ms, which small calls can save

    # no new threads: at interpreter shutdown, at the system's limit, without memory
    with suppress(RuntimeError, MemoryError), _lock:
        if _pool is None and threads == get_num_threads():
            _pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="fastll")
        if _pool is None:  # the count was set a moment ago
            return
        for _ in range(count):
            helper: Future[None] = Future()
            helpers.append(helper)  # first: `submit` may queue the work and then raise
            _pool.submit(_help, helper, work)


def _help(helper: Future[None], work: Callable[[], None]) -> None:
    """Do `work` unless its future was cancelled."""
    if not helper.set_running_or_notify_cancel():
        return
    try:
        work()
    except BaseException as error:
        helper.set_exception(error)
    else:
        helper.set_result(None)


def get_num_threads() -> int:
    """Number of threads a call may use.

    It is set by `set_num_threads` or the environment variable ``FASTLL_NUM_THREADS``. The default is
    the number of CPUs the process may use, by its affinity mask and its control group's quota.

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
        At least 1; None restores the default of `get_num_threads`.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an integer, or below 1.

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
        pool.shutdown(wait=False)  # calls in progress still finish on it
    for follower in _followers:
        follower(get_num_threads())


def follow(follower: Callable[[int], None]) -> None:
    """Call a function with the number of threads, now and when it is set: for code without Python."""
    _followers.append(follower)
    follower(get_num_threads())


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
    """CPUs allowed by the control group: version 2, its own and its parents', or version 1."""
    from pathlib import Path

    root = Path("/sys/fs/cgroup")
    group = root
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                group = root / line[3:].strip("/")
    limits = [[folder / "cpu.max"] for folder in (group, *group.parents)]
    limits.append([root / "cpu/cpu.cfs_quota_us", root / "cpu/cpu.cfs_period_us"])
    quotas = [1024.0]  # no limit
    for files in limits:
        with suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = map(int, " ".join(file.read_text() for file in files).split())
            if quota > 0:
                quotas.append(quota / period)
    return min(quotas)


def _forget() -> None:
    """Reset a forked child: the parent's pool has no threads there, and its lock may be held."""
    global _lock, _pool
    _lock = threading.Lock()
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
