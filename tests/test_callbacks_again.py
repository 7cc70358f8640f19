"""`ALDSCompress` for a model that is compressed already, and several of them in one `fit`."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import zoo
from fitting import EAGER, Spy, compiled, factorized, fit, value

from keras_alds import ALDSCompress, FactorizedDense, compress, select


def unchanged(model, callbacks, **options):
    """Whether `fit` raises before its first step, and changes nothing."""
    weights, steps = model.get_weights(), int(model.optimizer.iterations)
    with pytest.raises(ValueError, match=options.pop("match")):
        fit(model, callbacks, **options)
    assert int(model.optimizer.iterations) == steps
    return all(map(np.array_equal, weights, model.get_weights()))


class TestTheSameAgain:
    @pytest.mark.parametrize("new", [True, False])
    def test_the_cell_is_run_again(self, keras_module, new, capsys):
        model = compiled(keras_module, **EAGER)
        callback = ALDSCompress(cr=0.4, at_epoch=1)
        cr = fit(model, [callback], epochs=2).history["alds_cr"][-1]
        layers = [(layer, layer.encoder) for layer in factorized(model)]
        capsys.readouterr()
        again = ALDSCompress(cr=0.4, at_epoch=1) if new else callback
        history = fit(model, [again], epochs=3).history
        said = [line for line in capsys.readouterr().out.splitlines() if "ALDSC" in line]
        assert said == [f"ALDSCompress: already compressed to cr={cr:.2f}, training on"]
        assert history["alds_cr"] == [cr] * 3
        assert [(layer, layer.encoder) for layer in factorized(model)] == layers
        assert int(model.optimizer.iterations) == 10

    def test_the_plan_is_given_again(self, keras_module, capsys):
        model = compiled(keras_module, **EAGER)
        plan = select(model, 0.4)
        for _ in range(2):
            fit(model, [ALDSCompress(plan=plan, at_epoch=0)], epochs=1)
        assert "by this plan, training on" in capsys.readouterr().out
        smaller = select(zoo.functional(keras_module), 0.2)
        count = model.count_params()
        fit(model, [ALDSCompress(plan=smaller, at_epoch=0)], epochs=1)
        assert "as far as this plan asks, or further, training on" in capsys.readouterr().out
        assert model.count_params() == count

    def test_multiply_accumulates_are_counted(self, keras_module, capsys):
        model = compiled(keras_module, model=compress(compiled(keras_module), 0.6), **EAGER)
        fit(model, [ALDSCompress({"params": 0.5, "macs": 0.1}, at_epoch=0)], epochs=1)
        assert "already compressed to params=0.6" in capsys.readouterr().out
        macs = ALDSCompress(0.7, objective="macs", at_epoch=0)
        fit(model, [macs], epochs=1)
        assert macs.plan.cr >= 0.7


def test_layers_that_are_factorized_by_design_are_no_compression():
    K = keras
    model = K.Sequential(
        [K.Input((32,)), FactorizedDense(32, 1, 4), K.layers.Dense(48), K.layers.Dense(4)]
    )
    model.compile("sgd", "mse")
    x, y = np.ones((8, 32), "float32"), np.ones((8, 4), "float32")
    callback = ALDSCompress(0.3, at_epoch=1, exclude=[FactorizedDense], verbose=0)
    logs = model.fit(x, y, epochs=2, verbose=0, callbacks=[callback]).history
    assert logs["alds_cr"] == [0, callback.plan.cr]


class TestFurther:
    @pytest.mark.parametrize("fits", [1, 2])
    @pytest.mark.parametrize("plans", [False, True])
    def test_gradually(self, keras_module, fits, plans):
        options = {} if fits == 1 and not plans else EAGER
        model = compiled(keras_module, keras_module.optimizers.Adam(1e-3), **options)
        params, layers = model.count_params(), dict(enumerate(model.layers))
        requests = [{"plan": select(model, cr)} if plans else {"cr": cr} for cr in (0.3, 0.6)]
        callbacks = [
            ALDSCompress(**request, at_epoch=epoch, verbose=0)
            for request, epoch in zip(requests, (1, 3), strict=True)
        ]
        moved = Spy(keras_module, lambda m: [value(layer.decoder) for layer in factorized(m)])
        if fits == 1:
            logs = fit(model, [*callbacks, moved], epochs=4).history["alds_cr"]
        else:
            logs = fit(model, callbacks[:1], epochs=2).history["alds_cr"]
            second = [callbacks[1], moved]
            logs += fit(model, second, initial_epoch=2, epochs=4).history["alds_cr"]
        assert logs == [0.0, callbacks[0].plan.cr, callbacks[0].plan.cr, callbacks[1].plan.cr]
        assert logs[1] >= 0.3
        assert logs[3] >= 0.6
        assert callbacks[1].plan.params_before == params
        assert logs[3] == 1 - model.count_params() / params
        assert dict(enumerate(model.layers)) == layers
        assert int(model.optimizer.iterations) == 8
        for before, after in zip(*moved.seen[-2:], strict=True):
            assert np.abs(after - before).max() > 0

    def test_after_a_file(self, keras_module, tmp_path):
        model = compiled(keras_module, **EAGER)
        fit(model, [ALDSCompress(0.3, at_epoch=0, verbose=0)], epochs=1)
        model.save(tmp_path / "model.keras")
        loaded = keras_module.models.load_model(tmp_path / "model.keras")
        callback = ALDSCompress(0.6, at_epoch=1, verbose=0, method="activation")
        assert fit(loaded, [callback], epochs=2).history["alds_cr"][-1] >= 0.6

    def test_a_failure_leaves_the_smaller_model(self, keras_module, monkeypatch):
        model = compiled(keras_module, **EAGER)
        fit(model, [ALDSCompress(0.3, at_epoch=0, verbose=0)], epochs=1)
        weights = model.get_weights()

        def fail(*_, **__):
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr("keras_alds.callbacks.apply", fail)
            with pytest.raises(MemoryError):
                fit(model, [ALDSCompress(0.6, at_epoch=0, verbose=0)], epochs=1)
        for a, b in zip(weights, model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        fit(model, [], epochs=1)


class TestToldBeforeTheFirstStep:
    def test_contradictions(self, keras_module):
        model = compiled(keras_module, **EAGER)
        for first, second in (((0.5, 1), (0.4, 2)), ((0.5, 2), (0.6, 1)), ((0.5, 1), (0.6, 1))):
            callbacks = [ALDSCompress(cr, at_epoch=epoch) for cr, epoch in (first, second)]
            assert unchanged(model, callbacks, match="to remove more and more")
        plan = ALDSCompress(plan=select(model, 0.3), at_epoch=2)
        assert unchanged(model, [ALDSCompress(0.5, at_epoch=1), plan], match="cr=0.5 at epoch 1")

    def test_a_larger_cr_that_is_out_of_reach(self, keras_module):
        model = compiled(keras_module, model=compress(compiled(keras_module), 0.3), **EAGER)
        assert unchanged(model, [ALDSCompress(0.99, at_epoch=2)], match="not reachable")
        data = zoo.images(16)[0][:, :5]
        callback = ALDSCompress(0.6, at_epoch=2, calibration_data=data)
        assert unchanged(model, [callback], match=r"Received: shape=\(16, 5, 12, 3\)")
