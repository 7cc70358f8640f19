"""One thread for the linear-algebra library: the same bits in every process, and less overhead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np  # noqa: F401 - its BLAS must be loaded before the controller looks for it
import threadpoolctl

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
