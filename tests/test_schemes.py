"""Fold schemes in layers and models: equality with the stock layers, budgets, what is written."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import keras_alds
from keras_alds import CompressionPlan, compress, count_macs, expand, select
from keras_alds._backend import backend_of
from keras_alds._backend.training import LINEAR, SQUARED
from keras_alds.cli import main
from keras_alds.core.slicing import convolution_unfolding, distinct_schemes, divisors, full_rank
from keras_alds.kinds.base import is_factorized, kernel_values
from keras_alds.models.inventory import Inventory, walk
from keras_alds.models.optimizer import carried
from keras_alds.models.ranges import equalize, find_pairs
from keras_alds.models.resources import Macs
from keras_alds.plan import LayerChoice

tf_keras = pytest.importorskip("tf_keras")
KERASES = {"keras": keras, "tf_keras": tf_keras}
FORMS = ("grouped", "split", "merged", "recomposed")


def choice_of(shape, scheme, slices, rank):
    return LayerChoice("layer", "Conv", shape, slices, rank, scheme, {}, 0.0, None)


def stock_layer(K, window, x_shape, seed=0, **options):
    """A built stock convolution with seeded weights, on inputs of `x_shape`."""
    layer = getattr(K.layers, f"Conv{len(window)}D")(5, window, **options)
    layer.build((None, *x_shape[1:]))
    rng = np.random.default_rng(seed)
    layer.set_weights([rng.standard_normal(weight.shape) for weight in layer.get_weights()])
    return layer


def folded(layer, window, scheme, slices, rank=None):
    """The factorized layer of a stock one, by default at full rank."""
    shape = convolution_unfolding(len(window), scheme).shape((*window, 4, 5))
    rank = full_rank(shape, slices) if rank is None else rank
    return zoo.factorized_layer(layer, choice_of(shape, scheme, slices, rank))


def factorized(model):
    return [layer for _, layer in walk(model) if is_factorized(layer)]


def schemes_of(plan):
    return {choice.layer: choice.scheme for choice in plan.factorized}


def in_every_scheme(model, cr=0.4, **options):
    """A plan in which every convolution has another scheme, as many as it has."""
    plan = select(model, cr, **options)
    layers = dict(walk(model))
    choices, count = [], itertools.count(1)
    for choice in plan.choices:
        layer = layers.get(choice.layer)  # a kernel of a cell is no layer
        window = tuple(getattr(layer, "kernel_size", ()))
        known = sorted(set(distinct_schemes(window).values()))
        if choice.kernel_shape and len(known) > 1:
            scheme = known[next(count) % len(known)]
            shape = convolution_unfolding(len(window), scheme).shape(choice.kernel_shape)
            slices = divisors(shape[-2])[1]
            rank = max(1, full_rank(shape, slices) // 2)
            choice = dataclasses.replace(
                choice, slices=slices, rank=rank, scheme=scheme, reason=None
            )
        choices.append(choice)
    assert any(choice.scheme for choice in choices)
    return dataclasses.replace(plan, choices=tuple(choices))


# Strides and dilations by axis; both are not allowed together.
SETTINGS = [((1, 1, 1), (1, 1, 1)), ((2, 1, 3), (1, 1, 1)), ((2, 2, 2), (1, 1, 1))]
DILATED = [((1, 1, 1), (2, 1, 3))]


class TestLayers:
    @pytest.mark.parametrize("module", KERASES)
    @pytest.mark.parametrize(
        ("dimensions", "scheme"), [(1, 3), (2, 1), (2, 2), (2, 3), (3, 3)], ids=str
    )
    def test_full_rank_is_the_stock_convolution(self, module, dimensions, scheme):
        K, window, sizes = KERASES[module], (3, 2, 3)[:dimensions], (11, 10, 9)[:dimensions]
        formats = ["channels_last"] + ["channels_first"] * (dimensions < 3)
        paddings = ["valid", "same"] + ["causal"] * (dimensions == 1)
        settings = SETTINGS + DILATED * (dimensions < 3)  # not in 3D on CPUs
        for data_format, padding, (strides, dilation) in itertools.product(
            formats, paddings, settings
        ):
            shape = (2, *sizes, 4) if data_format == "channels_last" else (2, 4, *sizes)
            x = np.random.default_rng(1).standard_normal(shape).astype("float32")
            layer = stock_layer(
                K,
                window,
                shape,
                strides=strides[:dimensions],
                dilation_rate=dilation[:dimensions],
                padding=padding,
                data_format=data_format,
                activation="tanh",
            )
            expected = np.array(layer(x))
            for slices in (1, 2, 4):
                made = folded(layer, window, scheme, slices)
                np.testing.assert_allclose(made.kernel, layer.kernel, atol=1e-5)
                assert tuple(made.compute_output_shape(shape)) == expected.shape
                for form in FORMS:
                    made.encoder_form = form
                    np.testing.assert_allclose(made(x), expected, atol=1e-4, err_msg=form)

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_any_window_any_rank(self, data):
        """Truncated: the stock convolution with the recomposed kernel, on sizes that may be odd."""
        K = KERASES[data.draw(st.sampled_from(list(KERASES)))]
        draw = data.draw
        window = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        strided = draw(st.booleans())
        steps = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        padding = draw(st.sampled_from(["valid", "same"]))
        sizes = [
            draw(st.integers(1 + (n - 1) * (1 if strided else d), 12))
            for n, d in zip(window, steps, strict=True)
        ]
        scheme = draw(st.sampled_from(sorted(set(distinct_schemes(window).values()))))
        slices = draw(st.sampled_from((1, 2, 4)))
        layer = stock_layer(
            K,
            window,
            (2, *sizes, 4),
            strides=steps if strided else 1,
            dilation_rate=1 if strided else steps,
            padding=padding,
        )
        shape = convolution_unfolding(2, scheme).shape((*window, 4, 5))
        rank = draw(st.integers(1, full_rank(shape, slices)))
        # oneDNN computes some strided convolutions of a single channel wrongly.
        assume(rank * slices > 1)
        made = folded(layer, window, scheme, slices, rank)
        x = np.random.default_rng(2).standard_normal((2, *sizes, 4)).astype("float32")
        layer.kernel.assign(np.array(made.kernel))
        form = draw(st.sampled_from(FORMS))
        made.encoder_form = form
        np.testing.assert_allclose(made(x), layer(x), atol=2e-4)

    @pytest.mark.parametrize("module", KERASES)
    def test_config_shapes_and_errors(self, module):
        K = KERASES[module]
        layers = keras_alds.layers if K is keras else keras_alds.tf_keras
        layer = layers.FactorizedConv2D(6, (3, 2), slices=2, rank=2, scheme=1, strides=(2, 1))
        x = np.ones((2, 7, 6, 4), "float32")
        y = layer(x)
        assert [tuple(w.shape) for w in layer.weights] == [(1, 2, 2, 4), (3, 1, 4, 6), (6,)]
        again = type(layer).from_config(layer.get_config())
        again.build(x.shape)
        again.set_weights(layer.get_weights())
        np.testing.assert_array_equal(again(x), y)
        assert "scheme" not in layers.FactorizedConv2DTranspose(4, 2, 1, 1).get_config()
        with pytest.raises(ValueError, match=r"`rank` to be at most 4, the full rank"):
            layers.FactorizedConv2D(6, (3, 2), slices=2, rank=5, scheme=1).build(x.shape)
        for cls, value, known in (
            (layers.FactorizedConv2D, 4, r"\(0, 1, 2, 3\)"),
            (layers.FactorizedConv2D, "3", r"\(0, 1, 2, 3\)"),
            (layers.FactorizedConv2D, True, r"\(0, 1, 2, 3\)"),
            (layers.FactorizedConv1D, 1, r"\(0, 3\)"),
            (layers.FactorizedConv3D, 2, r"\(0, 3\)"),
            (layers.FactorizedConv2DTranspose, 3, r"\(0,\)"),
            (layers.FactorizedSeparableConv2D, 3, r"\(0,\)"),
        ):
            with pytest.raises(ValueError, match=rf"one of {known}. Received: scheme={value!r}"):
                cls(4, 3, slices=1, rank=1, scheme=value)

    @pytest.mark.parametrize("scheme", [1, 3])
    def test_optimizer_state_follows_the_chain_rule(self, scheme):
        layer = stock_layer(keras, (3, 2), (2, 9, 8, 4))
        made = folded(layer, (3, 2), scheme, 2, 2)
        backend = backend_of(layer)
        state = np.random.default_rng(3).standard_normal((3, 2, 4, 5))
        with tf.GradientTape() as tape:
            product = tf.reduce_sum(tf.cast(made.kernel, tf.float64) * state)
        expected = tape.gradient(product, [made.encoder.value, made.decoder.value])
        for got, want in zip(carried(backend, LINEAR, state, made), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)
        for got in carried(backend, SQUARED, state**2, made):
            assert (got >= 0).all()


class TestPlans:
    @pytest.fixture
    def keras_module(self):
        """Keras 3: a plan does not depend on which Keras a model is of."""
        return keras

    @pytest.mark.parametrize("kind", ["functional", "nested", "shared", "temporal"])
    def test_budgets_are_exact(self, keras_module, kind):
        model = zoo.MODELS[kind](keras_module)
        before = model.count_params(), count_macs(model)
        for method, objective, schemes in (
            ("energy", "params", "all"),
            ("energy", "macs", (1, 2, 3)),
            ("alds", "macs", 3),
        ):
            plan = select(model, 0.3, method=method, objective=objective, schemes=schemes)
            small = compress(model, plan=plan)
            after = small.count_params(), count_macs(small)
            assert plan.cr >= 0.3
            assert (plan.params_before, plan.params_after) == (before[0], after[0])
            if objective == "macs":
                assert any(schemes_of(plan).values())
                assert plan.costs["macs"] == (before[1], after[1])
                inventory = Inventory.of(small)
                own = {record.path: Macs(inventory).of(record) for record in inventory.records}
                assert [own[choice.layer] for choice in plan.choices] == [
                    choice.costs["macs"].after for choice in plan.choices
                ]

    @pytest.mark.parametrize("padding", ["same", "valid"])
    def test_macs_of_the_two_factors(self, keras_module, padding):
        """Counted by hand: along its own axes a factor works on what it makes."""
        L = keras_module.layers
        model = keras_module.Sequential(
            [keras_module.Input((13, 10, 4)), L.Conv2D(6, (3, 5), strides=(2, 3), padding=padding)]
        )
        h, w = (7, 4) if padding == "same" else (6, 2)
        plan = select(model, 0.1, method="alds")
        for scheme, encoder, places, decoder in (
            (1, 5 * 2 * 4, 13 * w, 3 * 4 * 6),
            (2, 3 * 2 * 4, h * 10, 5 * 4 * 6),
            (3, 1 * 2 * 4, 13 * 10, 15 * 4 * 6),
        ):
            choice = dataclasses.replace(plan.choices[0], slices=2, rank=2, scheme=scheme)
            small = compress(model, plan=dataclasses.replace(plan, choices=(choice,)))
            assert count_macs(small) == encoder * places + decoder * h * w
            assert count_macs(expand(small)) == count_macs(small)

    @pytest.mark.parametrize("scheme", [1, 2, 3])
    def test_the_scheme_is_found(self, scheme):
        """A kernel that is of low rank in one scheme only; more choices are never worse."""
        model = zoo.functional(keras)
        layer = model.get_layer("down")
        axes = {1: "bcj,ajf->abcf", 2: "acj,bjf->abcf", 3: "cj,abjf->abcf"}[scheme]
        own, other = ((3,), (3,)) if scheme < 3 else ((), (3, 3))
        rng = np.random.default_rng(0)
        factors = rng.standard_normal((*own, 16, 2)), rng.standard_normal((*other, 2, 24))
        layer.kernel.assign(np.einsum(axes, *factors))
        for objective in ("params", "macs"):
            options = {"method": "alds", "error_measure": "energy", "objective": objective}
            own_scheme = select(model, 0.5, **options)
            every = select(model, 0.5, schemes="all", **options)
            assert every.max_error <= own_scheme.max_error
            if objective == "params":
                (choice,) = (c for c in every.choices if c.layer == "down")
                assert (choice.scheme, choice.slices, choice.rank) == (scheme, 1, 2)
                assert choice.error < 1e-9
        same = select(model, 0.5, method="alds", schemes=[0])
        assert same == select(model, 0.5, method="alds")
        # By the weights alone: scheme 0 with many slices, and all with one.
        same = select(model, 0.5, target="size", schemes=0)
        assert same == select(model, 0.5, target="size")
        every = select(model, 0.5, max_slices=1, schemes="all")
        assert every == select(model, 0.5, max_slices=1)

    def test_one_filter_is_cut_by_scheme_3(self, keras_module):
        """f = 1: scheme 0 cannot cut the kernel, which is a vector in it."""
        K = keras_module
        model = K.Sequential([K.Input((9, 9, 16)), K.layers.Conv2D(1, 3, name="out")])
        with pytest.raises(ValueError, match=r"no factorization of its kernel \(3, 3, 16, 1\)"):
            select(model, 0.3, schemes=0)
        plan = select(model, 0.3, max_slices=1)
        assert schemes_of(plan) == {"out": plan.choices[0].scheme}
        assert plan.choices[0].scheme in (1, 2, 3)
        assert compress(model, plan=plan).count_params() == plan.params_after

    def test_a_target_takes_one_slice(self):
        model = zoo.functional(keras)
        for method in ("energy", "alds"):
            plan = select(model, 0.2, method=method, schemes=(1, 2, 3), target="litert")
            chosen = [choice for choice in plan.factorized if choice.scheme]
            assert chosen
            for choice in chosen:
                assert choice.slices == 1
                assert choice.rank % 4 == 0

    def test_layers_without_the_schemes_asked_for(self, keras_module):
        model = zoo.temporal(keras_module)
        plan = select(model, 0.05, schemes=1, max_slices=1)
        assert schemes_of(plan) == {"head": 0}
        reasons = {choice.layer: choice.reason for choice in plan.choices}
        assert reasons["causal"] == "its kernel (5, 8, 16) cannot be unfolded in schemes=(1,)"

    def test_spectra_are_kept_by_scheme(self, monkeypatch):
        model = zoo.functional(keras)
        options = {"method": "energy", "max_slices": 1}
        first = select(model, 0.5, schemes="all", **options)
        monkeypatch.setattr(
            "keras_alds.models.choices.spectra_many", lambda kernels, slices: [][: len(kernels)]
        )
        assert select(model, 0.5, schemes="all", **options) == first
        assert select(model, 0.5, schemes=(0, 3), **options).cr >= 0.5

    def test_json_summary_and_match(self, tmp_path):
        model = zoo.functional(keras)
        plan = in_every_scheme(model)
        plan.save(tmp_path / "plan.json")
        assert CompressionPlan.load(tmp_path / "plan.json") == plan
        lines: list[str] = []
        plan.summary(print_fn=lines.append)
        assert "| Scheme |" in lines[0]
        select(model, 0.4, method="alds").summary(print_fn=lines.append)
        assert "Scheme" not in lines[1]
        data = plan.to_dict()
        for choice in data["choices"]:
            if choice["layer"] == "head":
                choice.update(slices=1, rank=1, scheme=3, reason=None)
        with pytest.raises(
            ValueError, match=r"kernel \(32, 10\) in fold scheme 3, where the model"
        ):
            compress(model, plan=CompressionPlan.from_dict(json.loads(json.dumps(data))))

    def test_errors(self):
        model = zoo.functional(keras)
        for schemes in ("some", 4, -1, (0, 5), (), True, [True], 1.5, "0"):
            with pytest.raises(ValueError, match="Expected `schemes` to be 'all', or one"):
                select(model, 0.5, schemes=schemes)
        for method in ("svd", "alds-error"):
            with pytest.raises(ValueError, match=f"`schemes` to be 0 with the method '{method}'"):
                select(model, 0.3, schemes="all", method=method)
        plan = in_every_scheme(model)
        with pytest.raises(ValueError, match=r"no options beside `plan`.*schemes='all'"):
            compress(model, plan=plan, schemes="all")
        assert not factorized(model)


class TestModels:
    @pytest.mark.parametrize("kind", ["functional", "wrapped", "temporal", "subclassed"])
    def test_compressed_saved_trained_and_expanded(self, keras_module, kind, tmp_path):
        model = zoo.MODELS[kind](keras_module)
        x = zoo.examples(model)
        small = compress(model, plan=in_every_scheme(model))
        assert sum(bool(getattr(layer, "scheme", 0)) for layer in factorized(small)) >= 1
        dense = dict(walk(model))
        for (_, layer), (path, _) in zip(walk(small), walk(model), strict=True):
            if getattr(layer, "scheme", 0):
                # Balanced, and the best of its rank in its own unfolding.
                read = kernel_values(dense[path], layer.scheme)
                kept = np.linalg.svd(_slices(read, layer.slices), compute_uv=False)[:, layer.rank :]
                rest = np.array(layer.kernel) - np.array(dense[path].kernel)
                np.testing.assert_allclose((rest**2).sum(), (kept**2).sum(), rtol=1e-3)
        if kind == "subclassed":
            small.save_weights(tmp_path / "small.weights.h5")
            again = zoo.MODELS[kind](keras_module)
            keras_alds.apply_plan(again, in_every_scheme(model))
            again.load_weights(tmp_path / "small.weights.h5")
        else:
            small.save(tmp_path / "small.keras")
            again = keras_module.models.load_model(tmp_path / "small.keras")
            stock = expand(small)
            assert not factorized(stock)
            assert stock.count_params() == small.count_params()
            np.testing.assert_allclose(
                zoo.outputs(stock, x), zoo.outputs(small, x), rtol=1e-4, atol=1e-5
            )
        np.testing.assert_allclose(zoo.outputs(again, x), zoo.outputs(small, x), atol=1e-6)
        small.compile("sgd", "mse")
        before = [np.array(w) for layer in factorized(small) for w in layer.trainable_weights]
        small.fit(x, np.zeros_like(small(x)), verbose=0)
        after = [np.array(w) for layer in factorized(small) for w in layer.trainable_weights]
        assert all((a != b).any() for a, b in zip(before, after, strict=True))

    def test_in_fit(self, keras_module):
        K = keras_module
        model = zoo.functional(K)
        model.compile(
            K.optimizers.Adam(1e-3), K.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        layer = model.get_layer("down")
        alds = keras_alds.ALDSCompress(cr=0.6, at_epoch=1, method="alds", schemes=3, verbose=0)
        x, y = zoo.images()
        history = model.fit(x, y, epochs=3, callbacks=[alds], verbose=0)
        assert alds.plan is not None
        assert schemes_of(alds.plan)["down"] == 3
        assert model.get_layer("down") is layer
        assert layer.scheme == 3
        assert model.count_params() == alds.plan.params_after
        assert np.isfinite(history.history["loss"]).all()

    def test_fresh_tf_keras_copy(self):
        """`to_tf_keras` of the compressed model and of its expansion."""
        model = zoo.functional(keras)
        small = compress(model, plan=in_every_scheme(model))
        x = zoo.examples(model)
        for source in (small, expand(small)):
            other = keras_alds.to_tf_keras(source)
            np.testing.assert_allclose(zoo.outputs(other, x), zoo.outputs(small, x), atol=1e-5)

    def test_batch_norm_is_folded_into_a_decoder_with_a_window(self, keras_module):
        L = keras_module.layers
        inputs = keras_module.Input(zoo.IMAGE)
        x = L.BatchNormalization(name="bn")(L.Conv2D(8, 3, name="conv")(inputs))
        model = keras_module.Model(inputs, L.GlobalAveragePooling2D()(x))
        rng = np.random.default_rng(0)
        norm = model.get_layer("bn")
        norm.set_weights([rng.uniform(0.5, 2, weight.shape) for weight in norm.get_weights()])
        small = compress(model, plan=in_every_scheme(model))
        stock = expand(small, fold_batch_norm=True)
        assert not any(isinstance(layer, L.BatchNormalization) for layer in stock.layers)
        x = zoo.examples(model)
        np.testing.assert_allclose(zoo.outputs(stock, x), zoo.outputs(small, x), atol=1e-4)

    @pytest.mark.parametrize("write", [False, True], ids=["factorized", "expanded"])
    def test_channels_between_the_factors_are_equalized(self, keras_module, write):
        """Padding with zeros commutes with a scale, so a decoder may have a window."""
        model = zoo.functional(keras_module)
        small = compress(model, plan=in_every_scheme(model))
        model = expand(small) if write else small
        x = zoo.images(16)[0]
        rng = np.random.default_rng(0)
        pairs = [p for p in find_pairs(model) if np.prod(p.decoder.shape[:-2]) > 1]
        assert len(pairs) == len([layer for layer in factorized(small) if layer.scheme])
        value = backend_of(model).value
        for pair in pairs:  # unbalanced by up to a thousand times
            middle = pair.decoder.shape[-2]
            scale = 10 ** rng.uniform(-1.5, 1.5, middle)
            encoder = value(pair.encoder)
            flat = encoder.reshape(-1, middle) * scale
            pair.encoder.assign(flat.reshape(encoder.shape))
            pair.decoder.assign(value(pair.decoder) / scale[:, None])
        before = zoo.outputs(model, x)
        originals = [value(pair.encoder) for pair in pairs]
        for batches in (None, [x]):
            undo = equalize(model, batches)
            np.testing.assert_allclose(zoo.outputs(model, x), before, rtol=1e-3, atol=1e-4)
            if batches is None:
                for pair in pairs:
                    middle = pair.decoder.shape[-2]
                    left = np.linalg.norm(value(pair.encoder).reshape(-1, middle), axis=0)
                    right = np.moveaxis(value(pair.decoder), -2, 0).reshape(middle, -1)
                    np.testing.assert_allclose(left, np.linalg.norm(right, axis=1), rtol=1e-3)
            undo()
        for pair, original in zip(pairs, originals, strict=True):
            np.testing.assert_array_equal(value(pair.encoder), original)


def _slices(read, slices):
    """`[*spatial, c, f]` as matrices by slice, spatial axes first: the order does not matter."""
    parts = np.stack(np.split(read, slices, axis=-2))
    return parts.reshape(slices, -1, read.shape[-1])


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_files_run(quantize):
    """Convolutions with windows in both factors convert and run, quantized too."""
    pytest.importorskip("ai_edge_litert")
    from keras_alds import litert
    from keras_alds.litert.runs import Runner

    model = zoo.functional(keras)
    small = compress(model, plan=in_every_scheme(model))
    x = zoo.images(32)[0]
    data = x if quantize else None
    content = litert.convert(small, quantize=quantize, representative_data=data, verbose=0)
    got = np.ravel(Runner(content).predict(x[:8]))
    want = zoo.outputs(small, x[:8])
    if quantize is None:
        np.testing.assert_allclose(got, want, atol=1e-4)
    else:
        assert np.corrcoef(got, want)[0, 1] > 0.99


@pytest.mark.slow
def test_pruned_and_expanded_for_quantization():
    tfmot = pytest.importorskip("tensorflow_model_optimization")
    from keras_alds.tfmot import prune_low_magnitude

    model = zoo.functional(tf_keras)
    small = compress(model, plan=in_every_scheme(model))
    S = tfmot.sparsity.keras
    pruned: Any = prune_low_magnitude(small, S.ConstantSparsity(0.5, 0, frequency=1))
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    pruned.compile("sgd", loss)
    pruned.fit(*zoo.images(), verbose=0, callbacks=[S.UpdatePruningStep()])
    stripped = S.strip_pruning(pruned)
    for layer in factorized(stripped):
        for factor in (layer.encoder, layer.decoder):
            assert abs((np.array(factor) == 0).mean() - 0.5) <= 0.5 / np.size(factor) + 0.01
    aware = tfmot.quantization.keras.quantize_model(expand(stripped))
    aware.compile("sgd", loss)
    assert np.isfinite(aware.fit(*zoo.images(), verbose=0).history["loss"]).all()


def test_command_line_and_sweep(tmp_path, capsys):
    model = zoo.functional(keras)
    model.save(tmp_path / "model.keras")
    output = tmp_path / "plan.json"
    for text, schemes in (("all", "all"), ("0,3", (0, 3))):
        arguments = ["plan", str(tmp_path / "model.keras"), "--schemes", text]
        assert main([*arguments, "--max-slices", "2", "--output", str(output), "--force"]) == 0
        assert CompressionPlan.load(output) == select(model, 0.5, schemes=schemes, max_slices=2)
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path / "model.keras"), "--schemes", "x"])
    assert "invalid fold_schemes value" in capsys.readouterr().err
    result = keras_alds.sweep(
        model,
        lambda candidate: float(sum(getattr(n, "scheme", 0) for n in factorized(candidate))),
        methods=["alds", "svd"],
        crs=[0.5],
        schemes=3,
        verbose=0,
    )
    scores = {row.method: row.score for row in result.rows}
    assert scores["alds"] > 0 == scores["svd"]
