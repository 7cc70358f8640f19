"""Pruning, clustering and quantization-aware training with TF-MOT, beside compression."""

from __future__ import annotations

import numpy as np
import pytest
import zoo

import keras_alds
from keras_alds.rewrite import wrappers
from keras_alds.rewrite.inspect import count_params, is_factorized, walk

K = pytest.importorskip("tf_keras")
tfmot = pytest.importorskip("tensorflow_model_optimization")
S = tfmot.sparsity.keras

FACTORS = ("encoder", "decoder")


def zeros(variable):
    return float((np.asarray(variable) == 0).mean())


def compiled(model, optimizer=None):
    model.compile(
        optimizer or K.optimizers.SGD(0.01, momentum=0.9),
        K.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def pruned(model, schedule=None, **options):
    schedule = schedule or S.PolynomialDecay(0.0, 0.5, 0, 8, frequency=1)
    return compiled(S.prune_low_magnitude(model, schedule, **options))


def fit(model, callbacks, epochs=4, **options):
    x, y = zoo.images()
    options = {"verbose": 0, "batch_size": 32, "shuffle": False, **options}
    return model.fit(x, y, epochs=epochs, callbacks=callbacks, **options)


def factorized(model):
    return [layer for _, layer in walk(model) if is_factorized(layer)]


class TestCompressWhilePruning:
    @pytest.mark.parametrize("make", [zoo.functional, zoo.sequential])
    @pytest.mark.parametrize("compress_first", [False, True])
    def test_both_factors_reach_the_final_sparsity(self, make, compress_first):
        model = pruned(make(K))
        update = S.UpdatePruningStep()
        alds = keras_alds.ALDSCompress(0.3, at_epoch=2, verbose=0)
        before = wrappers.pruning(model)
        params = count_params(model)
        fit(model, [alds, update] if compress_first else [update, alds], epochs=6)

        assert wrappers.pruning(model) == before == update.prunable_layers
        assert {int(wrapper.pruning_step) for wrapper in before} == {12}
        layers = factorized(model)
        assert [layer.name for layer in layers] == [c.layer for c in alds.plan.factorized] != []
        assert count_params(model) == alds.plan.params_after < alds.plan.params_before == params
        stripped = S.strip_pruning(model)
        assert factorized(stripped) == layers
        assert stripped.count_params() == alds.plan.params_after
        for layer in layers:
            for factor in (layer.encoder, layer.decoder):
                assert abs(zeros(factor) - 0.5) <= 0.01
