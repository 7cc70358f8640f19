"""`select`, `compress` and `apply_plan` on models of every kind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import sysconfig
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

from keras_alds import CalibrationStats, CompressionPlan, apply_plan, compress, count_macs, select
from keras_alds.kinds.base import is_factorized
from keras_alds.models.inventory import Inventory, walk
from keras_alds.models.matching import match
from keras_alds.models.recompose import recomposed
from keras_alds.resources import removed_fraction


def factorized_layers(model):
    return [layer for _, layer in walk(model) if is_factorized(layer)]


def value(tensor):
    return np.asarray(tf.convert_to_tensor(tensor))


def largest_step(model, plan):
    """The most that one more rank or the whole kernel would cost in any layer."""
    return max(
        (
            choice.params_before - choice.params_after
            if not choice.factorized
            else max(
                choice.slices * choice.kernel_shape[-1] + int(np.prod(choice.kernel_shape[:-1])),
                choice.params_before - choice.params_after,
            )
        )
        for choice in plan.choices
        if choice.kernel_shape
    )


def test_what_cannot_be_copied_is_told_before_the_calibration():
    class Own(keras.Model):
        def __init__(self, width):
            super().__init__()
            self.dense = keras.layers.Dense(width)

        def call(self, x):
            return self.dense(x)

    model, read = Own(24), []
    model(np.zeros((1, 32), "float32"))
    with pytest.raises(ValueError, match="could not be made from its config"):
        compress(model, 0.3, calibration_data=(read.append(x) for x in np.ones((4, 8, 32))))
    assert not read


def test_a_model_that_is_built_only_as_it_is_loaded(keras_module):
    K = keras_module

    class Held(K.Model):  # its code calls it with a key that no saved input has
        def __init__(self, units=24):
            super().__init__()
            self.units, self.dense = units, K.layers.Dense(units, name="dense")

        def build(self, input_shape=None):
            self.dense.build((None, 32))
            super().build((None, 32))

        def call(self, inputs, given=None):
            return self.dense(given["x"])

        def get_config(self):
            return {"units": self.units}

        def get_build_config(self):
            return {"input_shape": (None, 32)}

        def build_from_config(self, config):
            self.build(config["input_shape"])

    model, x = Held(), np.ones((2, 32), "float32")
    model.build()
    random = np.random.default_rng(0)
    model.dense.set_weights(
        [random.normal(size=(32, 4)) @ random.normal(size=(4, 24)), np.ones(24)]
    )
    small = compress(model, 0.3, method="energy")
    assert small.count_params() <= 0.7 * model.count_params()
    outputs = [value(net(x, given={"x": x})) for net in (small, model)]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-4)


def test_what_layers_count_stays(keras_module):
    K = keras_module

    class Counting(K.layers.Layer):
        def build(self, shape):
            self.seen = self.add_weight(shape=(2,), trainable=False, name="seen")

        def call(self, inputs):
            self.seen.assign(self.seen + 1.0)
            return inputs

    inputs = K.Input((32,))
    model = K.Model(inputs, K.layers.Dense(4)(K.layers.Dense(64)(Counting()(inputs))))
    before = model.get_weights()
    x = np.random.default_rng(0).normal(size=(64, 32)).astype("float32")
    select(model, 0.3, calibration_data=x)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


class Distribution:
    """An output like those of TensorFlow Probability: a tensor of it is a sample."""

    def __init__(self, **parameters):
        self.parameters = {"validate": False, "inner": abs, "axes": tf.constant(1), **parameters}

    def __array__(self, *args, **kwargs):
        raise AssertionError("a sample was drawn")


def test_outputs_that_are_distributions(keras_module):
    K = keras_module

    class Net(K.Model):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = K.layers.Dense(64, activation="relu"), K.layers.Dense(2)

        def call(self, x):
            found = self.head(self.hidden(x))
            return Distribution(inner=Distribution(loc=found[:, :1], scale=found[:, 1:]))

        def get_config(self):
            return {}

    x = np.random.default_rng(0).normal(size=(128, 32)).astype("float32")
    model = Net()
    model.hidden.build((None, 32))
    model.head.build((None, 64))
    model.built = True
    apply_plan(model, (plan := select(model, 0.4, calibration_data=x)), calibration_data=x)
    assert 0 < plan.distance < np.inf


class TestEveryKindOfModel:
    def test_removes_what_was_asked_for_and_leaves_the_model_alone(self, model):
        before = model.get_weights()
        inputs = zoo.examples(model)
        expected = zoo.outputs(model, inputs)
        config = json.dumps(model.get_config(), default=str)
        plan = select(model, 0.4)
        compressed = compress(model, 0.4)

        achieved = 1 - compressed.count_params() / model.count_params()
        assert achieved >= 0.4
        assert achieved == plan.cr
        assert plan.params_after == compressed.count_params()
        assert (achieved - 0.4) * model.count_params() <= largest_step(model, plan)
        assert isinstance(compressed, type(model))
        assert type(compressed).__name__ == type(model).__name__
        assert compressed is not model
        for old, new in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
        assert json.dumps(model.get_config(), default=str) == config
        assert not factorized_layers(model)
        np.testing.assert_array_equal(zoo.outputs(model, inputs), expected)

    def test_equals_the_model_with_recomposed_kernels(self, model, keras_module):
        compressed = compress(model, 0.4)
        reference = compress(model, plan=nothing(select(model, 0.4)))
        assert not factorized_layers(reference)
        kernels = {spec.path: spec.layer for spec in Inventory.of(reference).records}
        matched = 0
        for (path, layer), choice in pairs(compressed, select(model, 0.4)):
            if choice.factorized:
                dense = kernels.get(path) or by_position(reference, compressed, layer)
                dense.kernel.assign(value(layer.kernel))
                matched += 1
        assert matched == len(factorized_layers(compressed)) > 0
        inputs = zoo.examples(model)
        np.testing.assert_allclose(
            zoo.outputs(compressed, inputs), zoo.outputs(reference, inputs), rtol=1e-4, atol=1e-4
        )

    def test_macs_are_those_of_the_plan(self, model):
        plan = select(model, 0.4, objective="macs")
        compressed = compress(model, plan=plan)
        assert count_macs(model) == plan.costs["macs"].before
        assert count_macs(compressed) == plan.costs["macs"].after
        assert plan.cr == removed_fraction(count_macs(model), count_macs(compressed)) >= 0.4

    def test_plan_names_every_layer_with_weights(self, model):
        plan = select(model, 0.4)
        layers = [layer for _, layer in walk(model)]
        cells = sum("Cell" in type(layer).__name__ for layer in layers)  # of two kernels each
        with_weights = sum(1 for layer in layers if own_weights(layer)) + 2 * cells
        assert len(plan.choices) == with_weights
        assert len({choice.layer for choice in plan.choices}) == with_weights
        for choice in plan.choices:
            assert (choice.reason is None) == (choice.slices is not None)
            if choice.factorized:
                assert choice.params_after < choice.params_before
            else:
                assert choice.params_after == choice.params_before
                assert choice.reason
        assert sum(choice.params_before for choice in plan.choices) == model.count_params()

    def test_plan_round_trip_gives_the_same_model(self, model, tmp_path):
        plan = select(model, 0.4)
        plan.save(tmp_path / "plan.json")
        loaded = CompressionPlan.load(tmp_path / "plan.json")
        assert loaded == plan
        assert json.loads((tmp_path / "plan.json").read_text())["version"] == 2
        first, second = compress(model, 0.4), compress(model, plan=loaded)
        for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_plan_fits_a_second_instance(self, model, request, keras_module):
        kind = request.node.callspec.params["model"]
        other = zoo.MODELS[kind](keras_module)
        plan = select(model, 0.4)
        assert [spec.params for spec, _ in match(Inventory.of(other), plan)] == [
            choice.params_before for choice in plan.choices
        ]
        compressed = compress(other, plan=plan)
        assert compressed.count_params() == plan.params_after

    def test_saves_and_loads(self, model, request, keras_module, tmp_path):
        if "subclassed" in request.node.callspec.params["model"]:
            pytest.skip("a subclassed model makes its layers in code: see TestSubclassed")
        compressed = compress(model, 0.4)
        inputs = zoo.examples(model)
        compressed.save(tmp_path / "model.keras")
        loaded = keras_module.models.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(
            zoo.outputs(loaded, inputs), zoo.outputs(compressed, inputs), rtol=1e-5, atol=1e-6
        )


def nothing(plan):
    """The same plan with every layer left alone."""
    return dataclasses.replace(
        plan,
        choices=tuple(
            dataclasses.replace(choice, slices=None, rank=None, reason="left alone")
            for choice in plan.choices
        ),
    )


def pairs(model, plan):
    layers = [(spec.path, spec.layer) for spec in Inventory.of(model).records]
    return list(zip(layers, plan.choices, strict=True))


def by_position(reference, compressed, layer):
    """The layer of `reference` where `layer` is in `compressed`: names may be numbered anew."""
    index = [id(found) for _, found in walk(compressed)].index(id(layer))
    return [found for _, found in walk(reference)][index]


def own_weights(layer):
    return getattr(layer, "_trainable_variables", None) or getattr(layer, "_trainable_weights", [])


class TestOptions:
    def test_exclude(self, small, keras_module):
        def factorized(**options):
            return {choice.layer for choice in select(small, 0.2, **options).factorized}

        assert "down" not in factorized(exclude="down")
        assert "down" not in factorized(exclude=["d.*n"])
        assert "down" not in factorized(exclude=re.compile("ow"))
        assert factorized(exclude=keras_module.layers.Dense) <= {"stem", "down"}
        plan = select(small, 0.2, exclude=["down"])
        reasons = {choice.layer: choice.reason for choice in plan.choices}
        assert reasons["down"] == "excluded by exclude='down'"

    def test_exclude_that_matches_nothing_warns(self, small):
        with pytest.warns(UserWarning, match=r"'dwon' matches no layer .*\. Did you mean 'down'\?"):
            select(small, 0.2, exclude="dwon")

    def test_exclude_by_path_in_a_nested_model(self, keras_module):
        plan = select(zoo.nested(keras_module), 0.3, exclude="middle/inner/conv")
        excluded = {c.layer for c in plan.choices if (c.reason or "").startswith("excluded by")}
        assert excluded == {"middle/inner/conv"}

    def test_excluding_what_holds_layers_excludes_these(self, keras_module):
        L = keras_module.layers
        inputs = keras_module.Input((6, 16))
        x = L.MultiHeadAttention(4, 8, name="attention")(inputs, inputs)
        x = L.TimeDistributed(L.Dense(24, name="inner"), name="frames")(x)
        model = keras_module.Model(inputs, L.Dense(16, name="head")(x))
        nested = zoo.nested(keras_module)

        def left(model, exclude):
            plan = select(model, 0.05, exclude=exclude)
            return {c.layer for c in plan.choices if (c.reason or "").startswith("excluded by")}

        projections = {"query", "key", "value", "attention_output"}
        for exclude in ("attention", "att.*ion", L.MultiHeadAttention):
            assert left(model, exclude) == {f"attention/{name}" for name in projections}
        assert left(model, L.Wrapper) == {path for path in left(model, "frames")} != set()
        assert left(nested, "middle/inner") == {"middle/inner/conv", "middle/inner/conv_b"}
        assert left(nested, "middle") == {"middle/conv", *left(nested, "inner")}
        with pytest.warns(UserWarning, match="'relu' matches no layer with weights"):
            select(zoo.functional(keras_module), 0.2, exclude="relu")

    def test_options_beside_a_plan(self, small):
        plan = select(small, 0.4)
        for options in ({"max_slices": 1}, {"rank_multiple": 2}, {"bounds": {"stem": (0, 0)}}):
            with pytest.raises(ValueError, match="Expected no options beside `plan`"):
                compress(small, plan=plan, **options)
        for options in ({"exclude": []}, {"bounds": {}}, {"rank_multiple": 1}):
            assert compress(small, plan=plan, **options).count_params() == plan.params_after

    def test_max_slices_and_rank_multiple(self, small):
        plan = select(small, 0.4, max_slices=2, rank_multiple=2)
        assert plan.factorized
        for choice in plan.factorized:
            assert choice.slices <= 2
            assert choice.rank % 2 == 0

    @pytest.mark.parametrize("measure", ["slice", "bound", "spectral", "energy"])
    def test_error_measures(self, small, measure):
        plan = select(small, 0.4, error_measure=measure)
        assert plan.error_measure == measure
        assert plan.cr >= 0.4
        if measure != "slice":
            assert plan.max_error != select(small, 0.4).max_error

    def test_energy_beats_min_max_in_its_own_measure(self, small):
        total = {
            method: sum(
                choice.error
                for choice in select(small, 0.4, method=method, error_measure="energy").choices
            )
            for method in ("alds", "energy")
        }
        assert total["energy"] <= total["alds"]

    def test_deterministic(self, small):
        assert select(small, 0.4).to_dict() == select(small, 0.4).to_dict()

    def test_new_weights_give_new_spectra(self, small):
        before = select(small, 0.4)
        layer = small.get_layer("down")
        layer.kernel.assign(value(layer.kernel)[::-1, :, ::-1] * np.linspace(0.01, 2, 24))
        assert select(small, 0.4) != before


class TestCopies:
    def test_compile_state_carries_over(self, small, keras_module):
        K = keras_module
        loss = K.losses.SparseCategoricalCrossentropy(from_logits=True)
        small.compile(
            K.optimizers.SGD(0.037, momentum=0.8, nesterov=True),
            loss,
            metrics=["accuracy", K.metrics.SparseTopKCategoricalAccuracy(3, name="top3")],
        )
        x, y = zoo.images()
        small.fit(x, y, verbose=0)
        compressed = compress(small, 0.4)
        assert type(compressed.optimizer) is type(small.optimizer)
        assert compressed.optimizer is not small.optimizer
        for name in ("momentum", "nesterov"):
            assert compressed.optimizer.get_config()[name] == small.optimizer.get_config()[name]
        assert float(compressed.optimizer.learning_rate) == pytest.approx(0.037)
        result = compressed.evaluate(x, y, verbose=0, return_dict=True)
        assert set(result) == {"loss", "accuracy", "top3"}
        logits = value(compressed(x))
        assert result["accuracy"] == pytest.approx(np.mean(logits.argmax(1) == y), abs=1e-6)
        assert np.isfinite(compressed.fit(x, y, verbose=0).history["loss"][0])

    def test_adapted_normalization_carries_over(self, keras_module):
        L, K = keras_module.layers, keras_module
        x = np.random.default_rng(0).uniform(100, 200, (64, 8)).astype("float32")
        normalization = L.Normalization()
        normalization.adapt(x)
        model = K.Sequential([K.Input((8,)), normalization, L.Dense(32), L.Dense(4)])
        plan = select(model, 0.3)
        copy = compress(model, plan=plan)
        apply_plan(model, plan)
        np.testing.assert_allclose(value(copy(x)), value(model(x)), rtol=1e-5, atol=1e-6)

    def test_vocabularies_carry_over(self, keras_module):
        L, K = keras_module.layers, keras_module
        words = L.TextVectorization(output_mode="multi_hot", max_tokens=16)
        words.adapt(["red green blue", "red yellow violet black"])
        model = K.Sequential([K.Input((1,), dtype="string"), words, L.Dense(16), L.Dense(16)])
        text = tf.constant([["red blue"], ["green black"]])
        small = compress(model, plan=nothing(select(model, 0.2)))
        np.testing.assert_array_equal(value(small(text)), value(model(text)))

    @pytest.mark.both
    def test_what_cannot_be_serialized(self, keras_module):
        L, K = keras_module.layers, keras_module

        class Warmup(K.optimizers.schedules.LearningRateSchedule):
            def __call__(self, step):
                return 0.01 * tf.cast(step + 1, "float32")

        kwargs = {"kernel_initializer": lambda shape, dtype=None: tf.ones(shape) * 0.1}
        model = K.Sequential([K.Input((16,)), L.Dense(16, **kwargs), L.Dense(10)])
        schedule = Warmup()
        model.compile(K.optimizers.SGD(schedule), "mse")
        plan = select(model, 0.2)
        if K is keras:
            small = compress(model, plan=plan)
            assert small.optimizer._learning_rate is schedule
        apply_plan(model, plan)
        x = np.ones((4, 16), "float32")
        assert np.isfinite(model.fit(x, np.ones((4, 10)), verbose=0).history["loss"][0])

    def test_a_copy_that_cannot_be_made_names_the_remedy(self, keras_module, monkeypatch):
        L, K = keras_module.layers, keras_module

        class Odd(L.Dense):
            def __init__(self, units, *, secret, **kwargs):
                super().__init__(units, **kwargs)

        model = K.Sequential([K.Input((16,)), Odd(16, secret=1), L.Dense(10)])
        with pytest.raises(ValueError, match="Remedy: register your own"):
            compress(model, 0.1)
        installed = types.ModuleType("odd_layers")
        installed.__file__ = os.path.join(sysconfig.get_path("purelib"), "odd_layers.py")
        monkeypatch.setitem(sys.modules, "odd_layers", installed)
        Odd.__module__ = "odd_layers"
        text = "Received: Odd of the package odd_layers, which cannot be made from its config"
        with pytest.raises(ValueError, match=text):
            compress(model, 0.1)

    def test_an_uncompiled_model_comes_back_uncompiled(self, small, keras_module):
        compressed = compress(small, 0.4)
        with pytest.raises((RuntimeError, ValueError), match="compile"):
            compressed.fit(*zoo.images(), verbose=0)


class TestBadInput:
    @pytest.mark.parametrize("cr", [0, 1, -0.5, 1.5, "0.5", None, True, float("nan")])
    def test_cr(self, small, cr):
        with pytest.raises(ValueError, match=r"Expected .*`cr`.*Received: cr="):
            select(small, cr)

    def test_unreachable_cr_says_what_is_reachable(self, small):
        with pytest.raises(ValueError, match=r"0 < cr <= (0\.\d+)") as caught:
            select(small, 0.99)
        reachable = float(re.search(r"0 < cr <= (0\.\d+)", str(caught.value))[1])
        assert select(small, reachable).cr >= reachable
        with pytest.raises(ValueError, match="not reachable"):
            select(small, reachable + 2e-4)

    @pytest.mark.parametrize(
        "options",
        [
            {"method": "svd"},
            {"method": "alds-simple"},
            {"method": "alds-simple-5", "rank_multiple": 2},
            {"method": "pca", "calibration_data": np.ones((8, 6), "float32")},
            {"objective": "macs", "max_slices": 1},
            {"target": "litert"},
        ],
        ids=str,
    )
    def test_the_ratio_that_is_named_is_reachable(self, options):
        rng = np.random.default_rng(0)
        layers = [keras.layers.Dense(n, use_bias=n > 20) for n in (30, 17, 40)]
        model = keras.Sequential([keras.Input((6,)), *layers, keras.layers.BatchNormalization()])
        if "calibration_data" in options:
            options = {**options, "calibration_data": rng.standard_normal((64, 6))}
        with pytest.raises(ValueError, match=r"0 < cr <= (0\.\d+)") as caught:
            select(model, 0.99, **options)
        reachable = float(re.search(r"0 < cr <= (0\.\d+)", str(caught.value))[1])
        plan = select(model, reachable, **options)
        assert reachable <= plan.cr < reachable + 1e-3
        assert all(choice.reason != "staying dense fits the budget" for choice in plan.choices)
        total, *parts = re.search(
            r"of ([\d,]+), ([\d,]+) remain in .* ([\d,]+) in everything", str(caught.value)
        ).groups()
        remain = sum(int(part.replace(",", "")) for part in parts)
        assert 1 - remain / int(total.replace(",", "")) == pytest.approx(plan.cr)

    def test_nothing_is_reachable(self, small):
        with pytest.raises(
            ValueError, match=r"choice that is smaller.*rank_multiple=999\)"
        ) as info:
            select(small, 0.1, rank_multiple=999)
        assert "cr <=" not in str(info.value)

    def test_next_to_nothing_is_reachable(self):
        layers = [keras.layers.Dense(6), keras.layers.Dense(150_000, name="wide")]
        model = keras.Sequential([keras.Input((6,)), *layers])
        options = {"exclude": "wide", "method": "energy"}
        with pytest.raises(ValueError, match=r"0 < cr <= (0\.0000\d+)") as caught:
            select(model, 0.5, **options)
        reachable = float(re.search(r"0 < cr <= (0\.\d+)", str(caught.value))[1])
        assert select(model, reachable, **options).cr >= reachable > 0

    def test_not_a_model(self):
        for thing in ("model.keras", None, np.zeros(3), keras.layers.Dense(3)):
            with pytest.raises(ValueError, match=r"Expected `model`.*Received: model="):
                select(thing, 0.5)

    def test_unbuilt(self, keras_module):
        model = keras_module.Sequential([keras_module.layers.Dense(4)])
        with pytest.raises(ValueError, match=r"to be built\. Received"):
            select(model, 0.5)

    def test_nothing_to_compress(self, keras_module):
        K = keras_module
        model = K.Sequential([K.Input((4, 4, 3)), K.layers.BatchNormalization(name="bn")])
        with pytest.raises(
            ValueError, match=r"can be factorized.*'bn' .*: BatchNormalization has no"
        ):
            select(model, 0.5)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_weights_that_are_not_finite(self, small, bad):
        kernel = value(small.get_layer("down").kernel).copy()
        kernel[0, 0, 0, 0] = bad
        small.get_layer("down").kernel.assign(kernel)
        with pytest.raises(ValueError, match="NaN or infinity in the kernel of layer 'down'"):
            compress(small, 0.4)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"method": "magic"}, "Expected a method"),
            ({"objective": "size"}, "Expected `objective`"),
            ({"error_measure": "worst"}, "Expected an error measure"),
            ({"exclude": "("}, "regular expression"),
            ({"exclude": [3]}, "Expected `exclude`"),
            ({"max_slices": 0}, "Expected `max_slices`"),
            ({"max_slices": 2.0}, "Expected `max_slices`"),
            ({"rank_multiple": 0}, "Expected `rank_multiple`"),
            ({"rank_multiple": None}, "Expected `rank_multiple`"),
        ],
    )
    def test_options(self, small, options, text):
        with pytest.raises(ValueError, match=text) as caught:
            select(small, 0.4, **options)
        assert "Received" in str(caught.value)

    def test_a_plan_for_another_model(self, small, keras_module):
        plan = select(zoo.sequential(keras_module), 0.4)
        weights = small.get_weights()
        with pytest.raises(ValueError, match="Expected a plan made for the model"):
            compress(small, plan=plan)
        with pytest.raises(ValueError, match="Expected a plan made for the model"):
            apply_plan(small, plan)
        for a, b in zip(weights, small.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_a_plan_that_is_none(self, small):
        with pytest.raises(ValueError, match="to be a CompressionPlan"):
            apply_plan(small, {"cr": 0.5})
        with pytest.raises(ValueError, match="either `cr` or `plan`"):
            compress(small)
        with pytest.raises(ValueError, match="either `cr` or `plan`"):
            compress(small, 0.5, plan=select(small, 0.4))

    def test_factorized_layers_of_the_users_own_can_be_left_alone(self, small):
        compressed = compress(small, 0.2, exclude=["hidden", "head"])
        kinds = [type(layer) for layer in factorized_layers(compressed)]
        plan = select(compressed, 0.01, exclude=kinds)
        assert {choice.layer for choice in plan.factorized} <= {"hidden", "head", "stem"}
        assert compress(compressed, plan=plan).count_params() == plan.params_after

    def test_macs_of_an_unknown_input_size(self, keras_module):
        K = keras_module
        model = K.Sequential([K.Input((None, None, 8)), K.layers.Conv2D(16, 3, name="conv")])
        assert select(model, 0.3).cr >= 0.3
        with pytest.raises(ValueError, match=r"known input size.*'conv'"):
            select(model, 0.3, objective="macs")


# -- Compressed models -----------------------------------------------------------------------------


class TestCompressedModels:
    def test_are_compressed_further_against_the_original(self, small):
        compressed = compress(small, 0.3)
        x = zoo.examples(small)
        expected, weights = zoo.outputs(compressed, x), compressed.get_weights()
        plan = select(compressed, 0.6)
        smaller = compress(compressed, 0.6)
        assert plan.params_before == small.count_params()
        assert smaller.count_params() == plan.params_after <= 0.4 * small.count_params()
        inventory = Inventory.of(compressed)
        with recomposed(inventory, inventory.factorized):
            small.set_weights(compressed.get_weights())  # the products of the factors
        by_hand = compress(small, 0.6)
        for a, b in zip(smaller.get_weights(), by_hand.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(zoo.outputs(compressed, x), expected)
        for a, b in zip(weights, compressed.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        assert compress(smaller, {"params": 0.7, "macs": 0.4}).count_params() <= (
            0.3 * small.count_params()
        )

    def test_calibration_data_are_used_again(self, small):
        x = zoo.examples(small, 32)
        compressed = compress(small, 0.3, calibration_data=x)
        smaller = compress(compressed, 0.6, calibration_data=x)
        assert smaller.count_params() <= 0.4 * small.count_params()
        stats = CalibrationStats.collect(small, x, verbose=0)
        with pytest.warns(UserWarning, match="weights"):
            assert select(compressed, 0.6, calibration_data=stats).cr >= 0.6

    def test_a_compressed_model_is_copied_with_a_word(self, small):
        compressed, x = compress(small, 0.4), zoo.examples(small)
        for options in (
            {"cr": 0.2},
            {"cr": {"params": 0.4}},
            {"cr": 0.1, "objective": "macs"},
            {"plan": select(small, 0.4)},
        ):
            with pytest.warns(UserWarning, match=r"is already compressed to cr=0\.\d\d.*a copy"):
                again = compress(compressed, **options)
            assert again is not compressed
            np.testing.assert_array_equal(zoo.outputs(again, x), zoo.outputs(compressed, x))

    def test_plans_in_place(self, small):
        less, plan, more = (select(small, cr) for cr in (0.2, 0.4, 0.6))
        layer, bias = small.get_layer("down"), small.get_layer("down").bias
        dense = small.count_params()
        apply_plan(small, plan)
        weights = small.get_weights()
        with pytest.warns(UserWarning, match="already compressed to cr=.* left as it is"):
            apply_plan(small, plan)
        for apply in (apply_plan, lambda model, plan: compress(model, plan=plan)):
            with pytest.raises(ValueError, match="more than the model has lost already"):
                apply(small, less)
        for a, b in zip(weights, small.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        apply_plan(small, more)
        assert 1 - small.count_params() / dense == more.cr
        assert small.get_layer("down") is layer
        assert layer.bias is bias

    def test_layers_that_are_excluded_stay_factorized(self, small):
        compressed = compress(small, 0.3)
        (layer,) = factorized_layers(compressed)
        shape = layer.encoder.shape
        smaller = compress(compressed, 0.05, exclude=layer.name)
        assert smaller.get_layer(layer.name).encoder.shape == shape
        assert smaller.count_params() <= 0.95 * compressed.count_params()


# -- Warnings --------------------------------------------------------------------------------------


class Block(keras.layers.Layer):
    """A layer that cannot be made again from its config, once it has been copied."""

    made = 0

    def __init__(self, **options):
        super().__init__(**options)
        Block.made += 1
        if Block.made > 2:
            raise ValueError("too many")
        self.inner = keras.layers.Dense(16)

    def call(self, x):
        return self.inner(x)


@pytest.fixture(scope="module")
def warned():
    return zoo.functional(keras)


@pytest.fixture(scope="module")
def statistics(warned):
    stats = CalibrationStats.collect(warned, zoo.images(16)[0], verbose=0)
    bias = warned.get_layer("head").bias
    bias.assign(np.asarray(bias) + 1)  # no input of a kernel changes, and the weights do
    return stats


def unmatched(model, statistics):
    options = {"exclude": "nothing", "bounds": {"none": (None, 0.5)}}
    select(model, 0.4, **options)
    compress(model, 0.4, **options)


def other_weights(model, statistics):
    plan = select(model, 0.4, calibration_data=statistics)
    compress(model, 0.4, calibration_data=statistics)
    compress(model, plan=plan, calibration_data=statistics)


def no_data(model, statistics):
    plan = dataclasses.replace(select(model, 0.4), method="activation")
    compress(model, plan=plan)


def code(model, statistics):
    Block.made = 0
    coded = keras.Sequential([keras.Input((32,)), Block()])
    compress(coded, 0.4)
    apply_plan(coded, select(coded, 0.4))


@pytest.mark.parametrize(
    ("function", "text", "count"),
    [
        (unmatched, "entry .* matches no layer", 4),
        (other_weights, "have changed since", 3),
        (no_data, "approximate the kernels", 1),
        (code, "will not load", 2),
    ],
)
def test_warnings_name_the_callers_line(function, text, count, warned, statistics):
    with pytest.warns(UserWarning, match=text) as caught:
        function(warned, statistics)
    assert {warning.filename for warning in caught} == {__file__}
    assert sum(re.search(text, str(warning.message)) is not None for warning in caught) == count
