"""Threads that work on one model, or on models that share layers, take turns."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

from keras_alds._backend import layers_of

_changed = threading.Condition()
_owners: dict[Any, int] = {}  # the layers that are worked on, and by which thread


@contextlib.contextmanager
def alone(*models: Any) -> Iterator[None]:
    """Waits until no other thread works on a layer of `models`, and keeps others waiting.

    Contexts nest. But if two threads take the same models one by one, in another order, each waits
    for the other: take several models at once. A thread that only runs a model does not wait.
    """
    layers = [layer for model in models for layer in layers_of(model)]
    thread = threading.get_ident()
    mine: list[Any] = []
    try:
        with _changed:
            _changed.wait_for(lambda: all(_owners.get(x, thread) == thread for x in layers))
            mine += [layer for layer in layers if layer not in _owners]
            _owners.update(dict.fromkeys(mine, thread))
        yield
    finally:
        with _changed:
            for layer in mine:
                _owners.pop(layer, None)
            _changed.notify_all()


def _forget_others() -> None:
    """Frees what the threads of a parent process worked on."""
    global _changed
    _changed = threading.Condition()
    thread = threading.get_ident()
    for layer in [layer for layer, owner in _owners.items() if owner != thread]:
        del _owners[layer]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_others)
