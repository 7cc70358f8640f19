"""The progress bar of everything that takes long."""

from __future__ import annotations

import importlib.util

import rich
from rich.progress import Progress


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
    shown = not rich.get_console().is_jupyter or importlib.util.find_spec("ipywidgets")
    return Progress(transient=True, disable=not (verbose and shown))
