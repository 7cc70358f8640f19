"""Multithreaded work: executors, a memory limit, and one BLAS thread per worker."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np  # noqa: F401 - its BLAS must be loaded before the controller looks for it
import threadpoolctl

#: Limit, in bytes, on the memory of all calls running at once.
BYTES_AT_ONCE = 3 << 27


@contextmanager
def threads(executor: Executor | None = None) -> Iterator[Executor]:
    """Yields the given executor, or a temporary pool with one thread per CPU.

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
    with _Pool(os.cpu_count() or 1, thread_name_prefix="keras_alds") as pool:
        yield pool


class _Pool(ThreadPoolExecutor):
    """A pool that works in the calling thread where Python starts no more threads.

    That is so at the end of the program, when only other threads still run, and where the
    system's limit is reached.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        result: Future[Any] = Future()
        once = threading.Lock()

        def run() -> None:
            # A pool that cannot start a thread may still have taken the call.
            if not once.acquire(blocking=False) or not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(fn(*args, **kwargs))
            except BaseException as error:
                result.set_exception(error)

        try:
            super().submit(run)
        except RuntimeError:
            run()
        return result


def map_within(
    executor: Executor,
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    sizes: Sequence[int] | None = None,
    *,
    limit: int = BYTES_AT_ONCE,
) -> list[Any]:
    """Calls a function in parallel; calls wait while memory use would exceed the limit.

    Args:
        executor: Any `concurrent.futures.Executor`.
        function: The function.
        calls: The arguments of each call. Calls start in this order.
        sizes: Bytes that each call takes. A call above the limit runs alone. Defaults to 0 each.
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

    def collect(when: str) -> None:
        nonlocal used
        done, _ = wait(running, return_when=when)
        for future in done:
            index = running.pop(future)
            used -= sizes[index]
            results[index] = future.result()

    try:
        for index, arguments in enumerate(calls):
            while running and used + sizes[index] > limit:
                collect(FIRST_COMPLETED)
            used += sizes[index]
            running[executor.submit(function, *arguments)] = index
        while running:
            collect(FIRST_EXCEPTION)  # one wait: each of them registers with all futures
    except BaseException:
        for future in running:
            future.cancel()
        raise
    return results


_lock = threading.Lock()
_users = 0
_limiter: Any = None


def _forget_threads() -> None:
    """Forgets the callers in the threads of a parent process."""
    global _lock, _users
    _lock = threading.Lock()
    if _users:
        _users = 0
        _leave()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


@cache
def _controller() -> threadpoolctl.ThreadpoolController:
    # Finding the loaded libraries takes milliseconds, and NumPy's BLAS no longer changes.
    return threadpoolctl.ThreadpoolController()


@cache
def _limit_is_per_thread() -> bool:
    """Whether BLAS limits its threads per calling thread, as OpenMP builds do."""
    return any(lib.get("threading_layer") == "openmp" for lib in _controller().info())


def _free_control() -> None:
    # Newer versions of threadpoolctl ignore all threads except the first that set a limit. We count
    # threads under a lock, and the last thread to leave need not be the first that entered.
    clear = getattr(threadpoolctl.OpenBLASController, "clear_controlling_thread", None)
    if clear is not None:
        clear(force=True)


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Limits BLAS to one thread while at least one caller is inside, then restores it.

    The number of BLAS threads decides how sums are split, and so the last bits of a result. It is
    a process-wide setting, so callers in several threads are counted: the first one to enter sets
    the limit. The last one to leave restores the old value, even after an error.

    Example:
        >>> with single_threaded_blas():
        ...     values = np.linalg.eigvalsh(np.eye(3))
    """
    global _users, _limiter
    if _limit_is_per_thread():
        with _controller().limit(limits=1, user_api="blas"):
            yield
        return
    inside = 0
    try:
        with _lock:
            if _users == 0:
                _free_control()
                _limiter = _controller().limit(limits=1, user_api="blas")
            inside = 1
            _users += 1
        yield
    finally:
        with _lock:
            _users -= inside
            if _users == 0:
                _leave()


def _leave() -> None:
    global _limiter
    if _limiter is not None:
        _free_control()
        _limiter.restore_original_limits()
        _free_control()
        _limiter = None
