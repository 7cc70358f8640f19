"""Settings of the whole process that threads change at the same time."""

from __future__ import annotations

import contextlib
import threading
import warnings

import pytest
import tensorflow as tf

from keras_alds._backend import backend_of
from keras_alds._backend.functions import run_as_code
from keras_alds._backend.quiet import ignored_warnings


def interleaved(context, check):
    """Enters in two threads, leaves in the order of entering, and checks in between."""
    inside, leave = threading.Event(), threading.Event()

    def second():
        with context():
            inside.set()
            leave.wait(20)
            results.append(check())

    results = []
    thread = threading.Thread(target=second)
    with context():
        thread.start()
        inside.wait(20)
        results.append(check())
    results.append(check())
    leave.set()
    thread.join()
    return [*results[:2], results[2], check()]


def is_ignored():
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn("that misleads", stacklevel=1)
    return not seen


def test_ignored_warnings_end_with_the_last_thread():
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = list(warnings.filters)
        assert interleaved(lambda: ignored_warnings("that"), is_ignored) == [
            True,
            True,
            True,
            False,
        ]
        assert warnings.filters == before
        with pytest.raises(KeyboardInterrupt), ignored_warnings():
            raise KeyboardInterrupt
        assert warnings.filters == before


def test_trials_leave_the_filters_when_threads_interleave(keras_module):
    backend = backend_of(keras_module.layers.Dense(1))

    @contextlib.contextmanager
    def trial():
        inside, leave = threading.Event(), threading.Event()
        make = lambda: (inside.set(), leave.wait(20))  # noqa: E731
        thread = threading.Thread(target=backend.trial, args=(make,))
        thread.start()
        inside.wait(20)
        yield
        leave.set()
        thread.join()

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert interleaved(trial, is_ignored) == [True, True, True, False]


@pytest.mark.parametrize("before", [False, True])
def test_functions_run_eagerly_until_the_last_thread_ends(keras_module, before):
    class Own(keras_module.layers.Layer):
        pass

    eagerly = tf.config.functions_run_eagerly
    tf.config.run_functions_eagerly(before)
    try:
        found = interleaved(lambda: run_as_code([Own()]), eagerly)
        assert found == [True, True, True, before]
        with pytest.raises(KeyboardInterrupt), run_as_code([Own()]):
            raise KeyboardInterrupt
        assert eagerly() == before
    finally:
        tf.config.run_functions_eagerly(False)
