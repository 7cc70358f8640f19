"""Calls of layers that are replaced for one thread."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest

from keras_alds._backend.calls import replaced_calls, watched


def doubled(call, *args, **kwargs):
    return 2 * call(*args, **kwargs)


def in_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def layer(keras_module):
    layer = keras_module.layers.Dense(3)
    layer.build((None, 4))
    return layer


X = np.ones((2, 4), "float32")


def test_only_this_thread_sees_it(layer):
    right = np.asarray(layer(X))
    with replaced_calls({layer: doubled}):
        np.testing.assert_array_equal(layer(X), 2 * right)
        np.testing.assert_array_equal(in_thread(lambda: layer(X)), right)
    np.testing.assert_array_equal(layer(X), right)
    assert "call" not in vars(layer)


def test_a_graph_that_another_thread_traces_meanwhile_is_the_layer_s(keras_module, layer):
    model = keras_module.Sequential([keras_module.Input((4,)), layer])
    right = model(X)
    with replaced_calls({layer: doubled}):
        during = in_thread(lambda: model.predict(X, verbose=0))
        assert np.allclose(model(X), 2 * right)
    np.testing.assert_allclose(during, right, rtol=1e-6)
    np.testing.assert_allclose(model.predict(X, verbose=0), right, rtol=1e-6)


def test_later_replacements_are_around_earlier_ones(layer):
    order = []

    def noting(name):
        def note(call, *args, **kwargs):
            order.append(name)
            return call(*args, **kwargs)

        return note

    with replaced_calls({layer: noting("c")}, {layer: noting("b")}):
        with replaced_calls({layer: noting("a")}):
            layer(X)
        layer(X)
    assert order == ["a", "b", "c", "b", "c"]


def test_threads_may_leave_in_any_order(layer):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with replaced_calls({layer: doubled}):
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    right = np.asarray(layer(X))
    with replaced_calls({layer: doubled}):
        thread.start()
        inside.wait(20)
    np.testing.assert_array_equal(layer(X), right)
    leave.set()
    thread.join()
    assert "call" not in vars(layer)
    np.testing.assert_array_equal(layer(X), right)


@pytest.mark.parametrize("error", [ValueError, MemoryError, KeyboardInterrupt])
def test_it_ends_with_an_error(layer, error):
    own = layer.call
    layer.__dict__["call"] = lambda inputs: 3 * own(inputs)
    mine, right = layer.__dict__["call"], np.asarray(layer(X))

    def fail(*_):
        raise error

    with pytest.raises(error), replaced_calls({layer: doubled}, watched([layer], fail)):
        layer(X)
    assert layer.__dict__["call"] is mine  # the user's own
    np.testing.assert_array_equal(layer(X), right)


def test_a_copy_made_meanwhile_has_its_own_weights(layer):
    with replaced_calls({layer: doubled}):
        other = in_thread(lambda: copy.deepcopy(layer))
    other.set_weights([np.zeros_like(w) for w in other.get_weights()])
    assert not np.asarray(other(X)).any()
    assert np.asarray(layer(X)).any()
