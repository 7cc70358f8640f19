"""Work on several threads: who runs it, how much memory it takes, and one BLAS thread each."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np  # noqa: F401 - its BLAS must be loaded before the controller looks for it
import threadpoolctl

#: Bytes that the work running at once may take.
BYTES_AT_ONCE = 3 << 27


@contextmanager
def threads(executor: Executor | None = None) -> Iterator[Executor]:
    """Yields an executor; without one a pool of a thread for each CPU, as long as it is used.

    Args:
        executor: Any `concurrent.futures.Executor`.

    Yields:
        The executor.

    Example:
        >>> with threads() as executor:
        ...     list(executor.map(abs, [-1, 2]))
        [1, 2]
    """
    if executor is not None:
        yield executor
        return
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="keras_alds") as pool:
        yield pool


def map_within(
    executor: Executor,
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    sizes: Sequence[int] | None = None,
    *,
    limit: int = BYTES_AT_ONCE,
) -> list[Any]:
    """Calls a function side by side; calls that together take more than a limit wait.

    Args:
        executor: Any `concurrent.futures.Executor`.
        function: The function.
        calls: The arguments of every call. They start in this order.
        sizes: Bytes that every call takes. One above the limit runs alone. Defaults to none.
        limit: Bytes that all calls running at once may take.

    Returns:
        The results, in order.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> map_within(ThreadPoolExecutor(2), pow, [(2, 3), (3, 2)], [10, 10], limit=15)
        [8, 9]
    """
    results: list[Any] = [None] * len(calls)
    sizes = [0] * len(calls) if sizes is None else sizes
    running: dict[Future[Any], int] = {}
    used = 0

    def collect() -> None:
        nonlocal used
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            index = running.pop(future)
            used -= sizes[index]
            results[index] = future.result()

    try:
        for index, arguments in enumerate(calls):
            while running and used + sizes[index] > limit:
                collect()
            used += sizes[index]
            running[executor.submit(function, *arguments)] = index
        while running:
            collect()
    except BaseException:
        for future in running:
            future.cancel()
        raise
    return results


_lock = threading.Lock()
_users = 0
_limiter: Any = None


@cache
def _controller() -> threadpoolctl.ThreadpoolController:
    # Finding the loaded libraries takes milliseconds; NumPy's own does not change any more.
    return threadpoolctl.ThreadpoolController()


@cache
def _limit_is_per_thread() -> bool:
    """Whether the BLAS counts threads per calling thread, as those on OpenMP do."""
    return any(lib.get("threading_layer") == "openmp" for lib in _controller().info())


def _free_control() -> None:
    # Newer versions of threadpoolctl ignore all threads but the first one that set a limit. Ours
    # are counted under a lock, and the last one out need not be the first one in.
    clear = getattr(threadpoolctl.OpenBLASController, "clear_controlling_thread", None)
    if clear is not None:
        clear(force=True)


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Limits BLAS to one thread while at least one caller is inside, then restores it.

    The number of BLAS threads decides how sums are split and so the last bits of a result. It
    belongs to the process, hence callers in several threads are counted: the first one in sets
    the limit and the last one out restores what was there, also after an error.

    Example:
        >>> with single_threaded_blas():
        ...     values = np.linalg.eigvalsh(np.eye(3))
    """
    global _users, _limiter
    if _limit_is_per_thread():
        with _controller().limit(limits=1, user_api="blas"):
            yield
        return
    with _lock:
        if _users == 0:
            _free_control()
            _limiter = _controller().limit(limits=1, user_api="blas")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _free_control()
                _limiter.restore_original_limits()
                _free_control()
                _limiter = None
