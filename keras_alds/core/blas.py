"""One thread for the linear-algebra library: the same bits in every process, and less overhead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np  # noqa: F401 - its BLAS must be loaded before the controller looks for it
from threadpoolctl import ThreadpoolController

_lock = threading.Lock()
_users = 0
_limiter: Any = None


@cache
def _controller() -> ThreadpoolController:
    # Finding the loaded libraries takes milliseconds; NumPy's own does not change any more.
    return ThreadpoolController()


def limit_this_thread() -> None:
    """Limits BLAS for the calling thread, for worker threads that end with their pool.

    Some BLAS libraries (those on OpenMP) keep the number of threads per calling thread.
    """
    _controller().limit(limits=1, user_api="blas")


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
    with _lock:
        if _users == 0:
            _limiter = _controller().limit(limits=1, user_api="blas")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _limiter.restore_original_limits()
                _limiter = None
