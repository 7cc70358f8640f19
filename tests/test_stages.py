"""Several steps of one `ALDSCompress`: lists as `cr` and `at_epoch`."""

from __future__ import annotations

import numpy as np
import pytest
from fitting import EAGER, compiled, fit
from test_callbacks_again import unchanged

from keras_alds import ALDSCompress, compress, select


class TestSeveralSteps:
    def test_equal_several_callbacks(self, keras_module):
        models = []
        for lists in (True, False):
            model = compiled(keras_module, **EAGER)
            params = model.count_params()
            if lists:
                callbacks = [ALDSCompress(cr=[0.3, 0.6], at_epoch=[1, 2], verbose=0)]
            else:
                steps = ((0.3, 1), (0.6, 2))
                callbacks = [ALDSCompress(cr, at_epoch=e, verbose=0) for cr, e in steps]
            logs = fit(model, callbacks, epochs=4).history["alds_cr"]
            assert all(cr >= least for cr, least in zip(logs, (0, 0.3, 0.6, 0.6), strict=True))
            assert callbacks[-1].plan.params_before == params
            assert callbacks[-1].plan.cr == logs[-1] == 1 - model.count_params() / params
            models.append(model)
        for a, b in zip(*(model.get_weights() for model in models), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_a_late_start_takes_the_last_step_that_is_due(self, keras_module, capsys):
        model = compiled(keras_module, **EAGER)
        steps = ALDSCompress(cr=(0.3, 0.5, 0.6), at_epoch=(1, 2, 4))
        with pytest.warns(UserWarning, match="starts at epoch 3, after at_epoch=2"):
            logs = fit(model, [steps], initial_epoch=3, epochs=5).history["alds_cr"]
        assert 0.5 <= logs[0] < 0.6 <= logs[1]
        assert capsys.readouterr().out.count("ALDSCompress:") == 2
        small = compiled(keras_module, model=compress(compiled(keras_module), 0.5), **EAGER)
        logs = fit(small, [steps], epochs=5).history["alds_cr"]
        assert logs[0] == logs[3] >= 0.5
        assert logs[4] >= 0.6
        lines = [li for li in capsys.readouterr().out.splitlines() if "ALDSCompress:" in li]
        assert "already compressed to cr=0.5" in lines[0]
        assert "epoch 4:" in lines[1]

    def test_a_training_that_ends_between_two_steps(self, keras_module):
        model = compiled(keras_module, **EAGER)
        steps = ALDSCompress(cr=[0.3, 0.5], at_epoch=[0, 2], verbose=0)
        with pytest.warns(UserWarning, match="not be compressed further.*at_epoch=2"):
            fit(model, [steps], epochs=1)


class TestToldAtOnce:
    @pytest.mark.parametrize(
        ("cr", "at_epoch", "text"),
        [
            ([0.3, 0.5], [1], "lists of the same length"),
            ([0.3, 0.5], 1, "lists of the same length"),
            (0.3, [1, 2], "lists of the same length"),
            ([], [], "lists of the same length"),
            ([0.5, 0.3], [1, 2], "to grow .* cr=0.5 at epoch 1, then cr=0.3 at epoch 2"),
            ([0.3, 0.5], [2, 1], "to grow"),
            ([0.3, 0.5], [1, 1], "to grow"),
            ([0.3, 1.5], [1, 2], "0 < cr < 1"),
            ([0.3, 0.5], [1, 2.0], "an integer >= 0"),
        ],
    )
    def test_arguments(self, cr, at_epoch, text):
        with pytest.raises(ValueError, match=text):
            ALDSCompress(cr, at_epoch=at_epoch)

    def test_every_step_is_checked_before_the_first(self, keras_module):
        model = compiled(keras_module, **EAGER)
        assert unchanged(model, [ALDSCompress([0.3, 0.99], at_epoch=[1, 2])], match="not reachable")
        with pytest.raises(ValueError, match="cr=a plan, at_epoch"):
            ALDSCompress(plan=select(model, 0.3), at_epoch=[1, 2])
        two = [ALDSCompress([0.3, 0.5], at_epoch=[1, 3]), ALDSCompress(0.4, at_epoch=4)]
        assert unchanged(model, two, match="cr=0.5 at epoch 3, then cr=0.4 at epoch 4")


def test_all_steps_are_checked_as_soon_as_there_are_weights(keras_module):
    K = keras_module
    model = K.Sequential([K.layers.Flatten(), K.layers.Dense(64), K.layers.Dense(10)])
    compiled(K, model=model, **EAGER)
    steps = ALDSCompress(cr=[0.3, 0.999], at_epoch=[3, 4], verbose=0)
    with pytest.raises(ValueError, match="not reachable"):
        fit(model, [steps], epochs=5)
    assert int(model.optimizer.iterations) in (0, 2)  # tf_keras builds the model in the first step
