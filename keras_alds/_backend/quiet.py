"""Warnings of Keras and TensorFlow that would mislead users, ignored for a limited time."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

_lock = threading.Lock()
_users: set[object] = set()
_saved: warnings.catch_warnings | None = None


@contextlib.contextmanager
def ignored_warnings(message: str = "") -> Iterator[None]:
    """Ignores warnings that match a regular expression.

    The filters belong to the whole process. If threads leave `warnings.catch_warnings` in the
    order in which they entered it, the last one restores the filters of the first one: warnings
    stay ignored for good. So the first thread saves the filters, and the last one restores them.
    """
    global _saved
    user = object()
    try:
        with _lock:
            if not _users:
                _saved = warnings.catch_warnings()
                _saved.__enter__()
            _users.add(user)
            warnings.filterwarnings("ignore", message)
        yield
    finally:
        with _lock:
            _users.discard(user)
            if not _users and _saved is not None:
                _saved.__exit__(None, None, None)
                _saved = None
