"""Work that is spread over an executor, with a bound on the memory of what runs at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from typing import Any

#: Bytes that the work running at once may take.
BYTES_AT_ONCE = 3 << 27


def map_within(
    executor: Executor,
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    sizes: Sequence[int],
    *,
    limit: int = BYTES_AT_ONCE,
) -> list[Any]:
    """Calls a function side by side; calls that together take more than a limit wait.

    Args:
        executor: Any `concurrent.futures.Executor`.
        function: The function.
        calls: The arguments of every call. They start in this order.
        sizes: Bytes that every call takes. One above the limit runs alone.
        limit: Bytes that all calls running at once may take.

    Returns:
        The results, in order.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> map_within(ThreadPoolExecutor(2), pow, [(2, 3), (3, 2)], [10, 10], limit=15)
        [8, 9]
    """
    results: list[Any] = [None] * len(calls)
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
