"""The progress bar of everything that takes long."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import sys
import time
from collections.abc import Iterator
from typing import Any

import rich
from rich.progress import Progress, TaskID

#: Seconds between two lines that stand for a bar.
SECONDS = 10.0

# Where lines are printed: the start, and the time of the last line.
_lines: contextvars.ContextVar[list[float] | None] = contextvars.ContextVar("lines", default=None)


def progress_bar(verbose: int) -> Progress:
    """A progress bar on a terminal or in a notebook, which vanishes at its end.

    In a notebook without ipywidgets there is none: rich would issue a warning for every step.

    Args:
        verbose: 0 for no progress bar.

    Example:
        >>> with progress_bar(verbose=0) as progress:
        ...     sum(progress.track([1, 2, 3], description="counting"))
        6
    """
    console = rich.get_console()
    if verbose and (times := _lines.get()) and not console.is_terminal and not console.is_jupyter:
        return _Lines(times)
    shown = not console.is_jupyter or importlib.util.find_spec("ipywidgets")
    return Progress(transient=True, disable=not (verbose and shown))


@contextlib.contextmanager
def lines_without_terminal() -> Iterator[None]:
    """Lets progress bars inside print plain lines where there is no terminal, as in a log file."""
    token = _lines.set([time.monotonic()] * 2)
    try:
        yield
    finally:
        _lines.reset(token)


class _Lines(Progress):
    """Progress as a line every ten seconds.

    Args:
        times: When the first progress began, and when the last line was printed.
    """

    def __init__(self, times: list[float]) -> None:
        super().__init__(disable=True)
        self._times = times

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        start, last = self._times
        now = time.monotonic()
        if now - last < SECONDS:
            return
        self._times[1] = now
        task = next(task for task in self.tasks if task.id == task_id)
        total = "" if task.total is None else f" of {task.total:,.0f}"
        line = f"{task.description}: {task.completed:,.0f}{total}, {now - start:.0f} s"
        print(line, file=sys.stderr, flush=True)
