"""`calibration_data=` on models of every kind, in Keras 3 and tf_keras, and `CalibrationStats`."""

from __future__ import annotations

import functools
import json
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

from keras_alds import ALDSCompress, CompressionPlan, apply_plan, compress, select
from keras_alds.core.calibration import moments
from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.calibration.refit import output_error
from keras_alds.core.calibration.whitening import output_spectra
from keras_alds.kinds.base import is_factorized, kernel_values, known_kind
from keras_alds.models.calibration import CalibrationStats
from keras_alds.models.choices import Seen
from keras_alds.models.data import Examples
from keras_alds.models.inventory import walk


def tflite_style(*inputs, names=None):
    """Yields examples one by one, as TFLite's `representative_dataset` does: lists or dicts."""
    for i in range(len(inputs[0])):
        example = [x[i : i + 1] for x in inputs]
        yield dict(zip(names, example, strict=True)) if names else example


def collect(model, data, **options):
    return CalibrationStats.collect(model, data, verbose=0, **options)


class TestMoments:
    def test_are_those_of_every_call_of_every_layer(self, model, request):
        if request.node.callspec.params["model"] == "wrapped":
            pytest.skip("layers run inside a graph: see test_time_distributed")
        inputs = zoo.examples(model, 12)
        stats = collect(model, inputs)
        rows = zoo.recorded_rows(model, inputs)
        assert set(stats.moments) == set(rows)
        for path, moment in stats.moments.items():
            expected = rows[path].astype("float64").T @ rows[path] / len(rows[path])
            assert moment.count == len(rows[path])
            np.testing.assert_allclose(
                moment.blocks[0], expected, atol=1e-5 * np.abs(expected).max()
            )

    def test_time_distributed(self, keras_module):
        model = zoo.wrapped(keras_module)
        inputs = zoo.examples(model, 12)
        stats = collect(model, inputs)
        frames = inputs.reshape(-1, *zoo.IMAGE)
        rows = tf.image.extract_patches(frames, [1, 3, 3, 1], [1] * 4, [1] * 4, "VALID").numpy()
        rows = rows.reshape(-1, 9, 3).transpose(0, 2, 1).reshape(-1, 27).astype("float64")
        moment = next(m for path, m in stats.moments.items() if path.startswith("frames"))
        assert moment.count == len(rows)
        expected = rows.T @ rows / len(rows)
        np.testing.assert_allclose(moment.blocks[0], expected, atol=1e-5 * np.abs(expected).max())

    def test_ragged_sequences_have_their_own_steps(self):
        K = pytest.importorskip("tf_keras")  # the recurrent layers of Keras 3 take no ragged ones
        inputs = K.Input((None, 3), ragged=True)
        x = K.layers.Dense(8, name="dense")(inputs)
        model = K.Model(inputs, K.layers.LSTM(8, name="lstm")(x))
        rows = np.random.default_rng(0).standard_normal((30, 3)).astype("float32")
        ragged = tf.RaggedTensor.from_row_lengths(rows, [3, 1, 5, 2, 4] * 2)
        moments = collect(model, ragged).moments
        assert {path: m.count for path, m in moments.items()} == dict.fromkeys(moments, 30)
        expected = rows.T.astype("float64") @ rows / 30
        np.testing.assert_allclose(moments["dense"].blocks[0], expected, rtol=1e-5)
        hidden = np.asarray(model.get_layer("dense")(rows), "float64")
        _, seen, _ = moments.values()  # of the input kernel
        np.testing.assert_allclose(seen.blocks[0], hidden.T @ hidden / 30, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        "options",
        [
            {"strides": 2, "padding": "same"},
            {"strides": 2, "padding": "valid"},
            {"dilation_rate": 2, "padding": "same"},
            {"dilation_rate": 2, "padding": "valid"},
        ],
    )
    def test_convolution_options(self, keras_module, options):
        L = keras_module.layers
        model = keras_module.Sequential(
            [keras_module.Input((13, 12, 6)), L.Conv2D(16, (3, 2), name="conv", **options)]
        )
        inputs = zoo.examples(model, 9)
        moment = collect(model, inputs).moments["conv"]
        rows = zoo.recorded_rows(model, inputs)["conv"].astype("float64")
        expected = rows.T @ rows / len(rows)
        np.testing.assert_allclose(moment.blocks[0], expected, atol=1e-5 * np.abs(expected).max())

    def test_channels_first_is_the_same(self):
        x = np.random.default_rng(0).standard_normal((9, 6, 8, 7)).astype("float32")
        layer = keras.layers.Conv2D(16, 3, padding="same", name="conv")
        model = keras.Sequential([keras.Input((8, 7, 6)), layer])
        expected = collect(model, np.moveaxis(x, 1, -1)).moments["conv"]
        layer.data_format = "channels_first"
        rows = np.concatenate(
            list(known_kind(layer).patches(layer, known_kind(layer).batches(layer, x)))
        )
        rows = rows.transpose(0, 2, 1).reshape(len(rows), -1).astype("float64")
        np.testing.assert_allclose(expected.blocks[0], rows.T @ rows / len(rows), atol=1e-5)

    @pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
    def test_mixed_precision_accumulates_finely(self, keras_module, policy):
        keras_module.mixed_precision.set_global_policy(policy)
        try:
            model = zoo.functional(keras_module)
        finally:
            keras_module.mixed_precision.set_global_policy("float32")
        inputs = 100 + zoo.examples(model, 64)  # sums that float16 could not hold
        moment = collect(model, inputs).moments["stem"]
        rows = zoo.recorded_rows(model, inputs)["stem"].astype("float64")
        np.testing.assert_allclose(moment.blocks[0], rows.T @ rows / len(rows), rtol=1e-5)
        assert compress(model, 0.4, calibration_data=inputs).count_params() < model.count_params()

    def test_collecting_changes_nothing(self, model):
        before = model.get_weights()
        collect(model, zoo.examples(model, 8))
        for old, new in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
        assert not any("call" in vars(layer) for _, layer in walk(model))


class TestEveryKindOfModel:
    def test_compresses_and_plan_and_statistics_give_the_same_model(self, model, tmp_path):
        inputs = zoo.examples(model, 24)
        found = collect(model, inputs)
        plan = select(model, 0.4, calibration_data=found)
        direct = compress(model, 0.4, calibration_data=found)
        assert (plan.method, plan.error_measure) == ("activation", "energy")
        assert 1 - direct.count_params() / model.count_params() == plan.cr >= 0.4
        assert direct.count_params() == plan.params_after

        plan.save(tmp_path / "plan.json")
        found.save(tmp_path / "stats.npz")
        stats = CalibrationStats.load(tmp_path / "stats.npz")
        again = compress(
            model, plan=CompressionPlan.load(tmp_path / "plan.json"), calibration_data=stats
        )
        for a, b in zip(direct.get_weights(), again.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        assert select(model, 0.4, calibration_data=stats) == plan

    @pytest.mark.parametrize("keras_module", [keras], ids=["keras"])
    def test_keeps_outputs_better_than_without_data(self, model):
        inputs = zoo.examples(model, 32)
        stats = collect(model, inputs)
        plan = select(model, 0.4, calibration_data=stats)
        kernels = {
            path: kernel_values(layer) for path, layer in walk(model) if path in stats.moments
        }
        errors = []
        for source in (stats, None):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                small = compress(model, plan=plan, calibration_data=source)
            layers = [layer for _, layer in walk(small)]
            found = {path: layer for path, layer in zip(dict(walk(model)), layers, strict=True)}
            errors.append(
                {
                    choice.layer: output_error(
                        kernels[choice.layer],
                        np.asarray(tf.convert_to_tensor(found[choice.layer].kernel)),
                        stats.moments[choice.layer],
                    )
                    for choice in plan.factorized
                }
            )
        assert errors[0]
        for path, error in errors[0].items():
            assert error <= errors[1][path] * 1.001 + 1e-6
        assert sum(errors[0].values()) < sum(errors[1].values())


class TestKindsOfData:
    def same(self, model, *sources):
        plans = [select(model, 0.4, calibration_data=source) for source in sources]
        chosen = [[(c.layer, c.scheme, c.slices, c.rank) for c in plan.choices] for plan in plans]
        assert chosen[1:] == chosen[:-1]
        for plan in plans[1:]:
            for one, other in zip(plan.choices, plans[0].choices, strict=True):
                assert one.error == pytest.approx(other.error, rel=1e-4, abs=1e-6)

    @pytest.mark.both
    def test_give_the_same_plan(self, small, keras_module):
        x, y = zoo.images(40)

        class Batches(
            keras_module.utils.Sequence if keras_module is not keras else keras.utils.PyDataset
        ):
            def __len__(self):
                return 5

            def __getitem__(self, i):
                return x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8]

        pairs = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
        plain = tf.data.Dataset.from_tensor_slices(x).batch(8)
        self.same(
            small,
            x,
            (x, y),
            [x],
            list(x),
            tf.constant(x),
            {small.inputs[0]._keras_history[0].name: x} if keras_module is keras else x,
            pairs,
            plain,
            Batches(),
            ((x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)),
            (x[i : i + 8] for i in range(0, 40, 8)),
            [x[i : i + 8] for i in range(0, 40, 8)],
            lambda: x,
            functools.partial(tflite_style, x),
            collect(small, x),
        )

    def test_several_inputs(self, keras_module):
        model = zoo.shared(keras_module)
        a, b = zoo.examples(model, 16)
        labels = np.zeros(16)
        self.same(
            model,
            [a, b],
            (a, b),
            ([a, b], labels),
            {"a": a, "b": b},
            lambda: tflite_style(a, b),
            lambda: tflite_style(b, a, names="ba"),
            tf.data.Dataset.from_tensor_slices(((a, b), labels)).batch(8),
            tf.data.Dataset.from_tensor_slices(({"b": b, "a": a}, labels)).batch(8),
        )

    def test_python_code_does_without_some_inputs_and_takes_other_sizes(self, keras_module):
        L = keras_module.layers

        class Net(keras_module.Model):
            def __init__(self):
                super().__init__()
                self.conv, self.head = L.Conv1D(32, 3, padding="same"), L.Dense(16)

            def call(self, inputs, training=False):
                x = self.conv(inputs["tokens"])
                if "mask" in inputs:
                    x = x * inputs["mask"][..., None]
                return self.head(tf.reduce_max(x, axis=1))

        model = Net()
        model({"tokens": np.zeros((2, 6, 8), "float32"), "mask": np.ones((2, 6), "float32")})
        x = np.random.default_rng(0).standard_normal((40, 9, 8)).astype("float32")
        names = np.array(["a"] * 40)
        self.same(
            model,
            {"tokens": x},
            {"tokens": x, "names": names},
            {"tokens": x, "mask": np.ones((40, 9), "float32"), "names": names},
        )
        for data, message in (
            (
                {"tokens": x[:, 0]},
                r"of shape \(batch, 6, 8\) for tokens. Received: shape=\(32, 8\)$",
            ),
            ({"tokens": x, "masks": names}, r"for 2 inputs.*'masks'.*Did you mean 'mask'\?"),
            (
                ({"tokens": x, "mask": x[:, :, 0]} if i else {"tokens": x} for i in range(2)),
                r"the same inputs in all batches.*\['mask', 'tokens'\] after \['tokens'\]",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                select(model, 0.4, calibration_data=data)

    def test_dicts_inside_dicts(self, keras_module):
        L = keras_module.layers

        class Net(keras_module.Model):
            def __init__(self):
                super().__init__()
                self.conv, self.head = L.Dense(32), L.Dense(16)

            def call(self, inputs, training=False):
                return self.head(self.conv(inputs["a"]["u"] + inputs["a"]["v"]) + inputs["b"])

        rows = np.random.default_rng(0).standard_normal((3, 40, 32)).astype("float32")
        data = {"a": {"u": rows[0], "v": rows[1]}, "b": rows[2]}
        model = Net()
        model(data)
        self.same(
            model,
            tf.data.Dataset.from_tensor_slices(data).batch(8),
            tf.data.Dataset.from_tensor_slices((data, np.zeros(40))).batch(20),
        )

    def test_integer_images_and_long_arrays(self, small):
        x = np.random.default_rng(0).integers(0, 255, (50, *zoo.IMAGE), dtype="uint8")
        self.same(small, x, x.astype("float32"))
        stats = collect(small, x, max_examples=10)
        assert stats.examples == 10
        evenly = collect(small, x[::5])
        for path, moment in stats.moments.items():
            np.testing.assert_array_equal(moment.blocks, evenly.moments[path].blocks)

    def test_endless_data_end(self, small):
        x, _ = zoo.images(16)

        def forever():
            while True:
                yield x

        assert collect(small, forever(), max_examples=20).examples == 20
        endless = tf.data.Dataset.from_tensor_slices(x).batch(8).repeat()
        assert collect(small, endless, max_examples=20).examples == 20

    def test_examples_of_different_sizes(self, keras_module):
        L = keras_module.layers
        model = keras_module.Sequential(
            [
                keras_module.Input((None, None, 3)),
                L.Conv2D(16, 3, padding="same", name="conv"),
                L.Conv2D(16, 3, name="last"),
            ]
        )
        batches = [np.ones((5, 6 + n // 2, 6, 3), "float32") for n in range(6)]
        for n, batch in enumerate(batches):
            batch += np.arange(5 * n, 5 * n + 5, dtype="float32").reshape(5, 1, 1, 1) / 30
        moment = collect(model, iter(batches), max_examples=28).moments["conv"]
        assert moment.count == 6 * (10 * 6 + 10 * 7 + 8 * 8)
        assert compress(model, 0.4, calibration_data=iter(batches)).count_params()

    def test_texts(self, keras_module):
        L = keras_module.layers
        texts = np.array([["the cat sat"], ["a dog ran far"], ["we eat the cat"]] * 8)
        words = L.TextVectorization(max_tokens=30, output_sequence_length=6)
        words.adapt(texts[:, 0])
        inputs = keras_module.Input((1,), dtype="string")
        x = L.Embedding(30, 16, name="embedding")(words(inputs))
        x = L.Dense(24, activation="relu", name="dense")(x)
        model = keras_module.Model(inputs, L.Dense(12, name="head")(x))
        assert collect(model, texts).moments["dense"].count == 24 * 6
        batches = tf.data.Dataset.from_tensor_slices(texts).batch(5)
        for data in (texts, batches):
            small = compress(model, 0.3, calibration_data=data)
            assert small.count_params() < model.count_params()
            assert small(tf.constant(texts[:2])).shape == (2, 6, 12)

    def test_inputs_of_a_fixed_batch_size(self, keras_module):
        L = keras_module.layers
        inputs = keras_module.Input(batch_shape=(3, 4, 12))
        x = L.Dense(24, name="dense")(L.LSTM(16, stateful=True, name="lstm")(inputs))
        model = keras_module.Model(inputs, x)
        x = zoo.examples(model, 20)
        assert collect(model, x).moments["dense"].count == 18  # six whole batches
        assert compress(model, 0.05, calibration_data=x).count_params() < model.count_params()

    def test_examples_that_belong_together(self, keras_module):
        """The nodes of a graph: each row is computed from all rows."""
        L, rng = keras_module.layers, np.random.default_rng(0)
        nodes = rng.standard_normal((40, 12)).astype("float32")
        edges = (rng.random((40, 40)) < 0.2).astype("float32")

        def model_of(batch_size):
            x = keras_module.Input((12,), batch_size=batch_size)
            a = keras_module.Input((40,), batch_size=batch_size)
            neighbours = L.Lambda(lambda parts: tf.matmul(*parts), output_shape=(12,))
            return keras_module.Model([x, a], L.Dense(24)(neighbours([a, x])))

        with pytest.raises(
            ValueError, match=r"any batch of examples\. Received: InvalidArg.*batch_size=n"
        ):
            compress(model_of(None), 0.05, calibration_data=[nodes, edges])
        stats = collect(model_of(40), [nodes, edges])
        assert [moment.count for moment in stats.moments.values()] == [40]
        several = (
            np.repeat(np.arange(30.0), 40)[:, None] + np.zeros((1, 12)),
            np.tile(edges, (30, 1)),
        )
        batches = [x for (x, _), _ in Examples(model_of(40), list(several), 1024)]
        assert len(batches) == 26  # whole graphs, and no fewer rows than asked for
        assert all(len(x) == 40 and len(np.unique(x)) == 1 for x in batches)


class TestBadData:
    X = np.ones((16, *zoo.IMAGE), "float32")
    X[:, 0, 0, 0] = np.arange(16) / 16

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (X[:5], r"at least 8 examples.*Received: 5"),
            (iter(()), r"at least 8 examples.*Received: 0 \(was a generator used up before\?\)"),
            (X[:0], r"at least 8 examples.*Received: 0"),
            (X[:, :5], r"shape \(batch, 12, 12, 3\) for input 0. Received: shape=\(16, 5, 12, 3\)"),
            (X[..., 0], r"shape \(batch, 12, 12, 3\).*Received: shape=\(16, 12, 12\)"),
            (
                np.where(X > 0, np.nan, X),
                "finite `calibration_data`. Received: NaN or infinity in input 0",
            ),
            (np.array(["a"] * 16), "`calibration_data` of numbers. Received: dtype=<U1"),
            ([X, X[:3]], "Received|Expected"),
            ({"a": X, "b": X}, r"for 1 inputs. Received: 2, \['a', 'b'\], where the model has \['"),
            ([[X, X]], r"Received: 2 in a list; labels go into a tuple, \(x, y\)"),
            (
                tf.data.Dataset.from_tensor_slices(X),
                r"Received: shape=\(12, 12, 3\), a single example: batch the data",
            ),
            ("train", "Received: str"),
            (7, "Received: int|examples"),
        ],
        ids=lambda value: None if isinstance(value, str) else type(value).__name__,
    )
    def test_is_refused_and_nothing_changed(self, data, message):
        model = zoo.functional(keras)
        before = model.get_weights()
        if message == "Received|Expected":
            # batches of different size are fine
            assert select(model, 0.4, calibration_data=data).cr >= 0.4
            return
        with pytest.raises(ValueError, match=message):
            compress(model, 0.4, calibration_data=data)
        with pytest.raises(ValueError, match=message):
            apply_plan(model, select(model, 0.4), calibration_data=data)
        for old, new in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
        assert not any("call" in vars(layer) for _, layer in walk(model))

    def test_used_up_generator(self, small):
        batches = iter([self.X])
        assert select(small, 0.4, calibration_data=batches).cr >= 0.4
        with pytest.raises(ValueError, match="was a generator used up before"):
            select(small, 0.4, calibration_data=batches)

    def test_inputs_of_different_length(self, keras_module):
        model = zoo.shared(keras_module)
        a, b = zoo.examples(model, 16)
        with pytest.raises(ValueError, match=r"equally many examples. Received: \[9, 16\]"):
            select(model, 0.4, calibration_data=[a, b[:9]])

    def test_overflow_inside_names_the_layer(self, small):
        layer = small.get_layer("bn")
        layer.gamma.assign(np.full(16, np.inf))
        with pytest.raises(ValueError, match="infinity in the input of layer 'down'"):
            select(small, 0.4, calibration_data=self.X)

    def test_squares_that_overflow(self, small):
        with pytest.raises(ValueError, match=r"Received: 1e\+18 in the input of layer 'stem'"):
            select(small, 0.4, calibration_data=self.X * 1e18)

    def test_nan_weights_are_found_first(self, small):
        kernel = np.array(kernel_values(small.get_layer("down")))
        kernel[0] = np.nan
        small.get_layer("down").kernel.assign(kernel)
        with pytest.raises(ValueError, match="kernel of layer 'down'"):
            select(small, 0.4, calibration_data=self.X)

    def test_methods_and_data_belong_together(self, small):
        with pytest.raises(ValueError, match="Expected `calibration_data` for the method"):
            select(small, 0.4, method="activation")
        with pytest.raises(ValueError, match="Received: method='alds'"):
            compress(small, 0.4, method="alds", calibration_data=self.X)
        with pytest.raises(ValueError, match="Received: error_measure='slice'"):
            select(small, 0.4, error_measure="slice", calibration_data=self.X)

    def test_max_examples(self, small):
        for value in (3, 20.5, "all"):
            with pytest.raises(ValueError, match=f"Received: max_examples={value!r}"):
                collect(small, self.X, max_examples=value)


class TestRankDeficientData:
    @pytest.mark.parametrize("value", [0.0, 2.5])
    def test_constant_inputs(self, small, value):
        data = np.full((8, *zoo.IMAGE), value, "float32")
        with pytest.raises(ValueError, match=r"8 different examples .* Received: 1 among 8"):
            compress(small, 0.4, calibration_data=data)
        data[:, 0, 0, 0] += 1e-6 * np.arange(8)
        compressed = compress(small, 0.4, calibration_data=data)
        assert all(np.isfinite(weight).all() for weight in compressed.get_weights())

    def test_dead_channels(self, keras_module):
        model = zoo.functional(keras_module)
        gamma = np.ones(16, "float32")
        gamma[::2] = 0
        model.get_layer("bn").gamma.assign(gamma)
        x, _ = zoo.images(16)
        compressed = compress(model, 0.4, calibration_data=x)
        assert all(np.isfinite(weight).all() for weight in compressed.get_weights())


class TestStats:
    def test_spectra_are_computed_again_for_more_ranks_or_another_kernel(self, small):
        stats, asked = collect(small, zoo.examples(small, 8)), []

        def decompose(kernels, moments, ranks):
            asked.extend(dict(some) for some in ranks)
            return [output_spectra(kernel, moments[0], slices=[1, 2]) for kernel in kernels]

        def spectra(kernel, ranks):
            seen = Seen(kernel.tobytes(), kernel, lambda: SecondMoment(np.eye(6)[None], 9), ranks)
            return stats.spectra({("layer", 0): seen}, decompose)[0]

        kernel = np.diag(np.arange(1.0, 7.0))
        first = spectra(kernel, {1: 3, 2: 2})
        assert spectra(kernel, {1: 3}) is first
        assert spectra(kernel, {1: 2, 2: 2}) is first
        assert asked == [{1: 3, 2: 2}]
        assert spectra(kernel, {1: 4}) is not first
        assert spectra(kernel, {1: 3, 2: 1}) is first
        other = spectra(2 * kernel, {1: 3})
        assert other.norm == pytest.approx(2 * first.norm)
        assert asked[1:] == [{1: 4}, {1: 3}]

    def test_of_another_model(self, small, keras_module):
        stats = collect(small, zoo.examples(small, 8))
        with pytest.raises(ValueError, match="statistics of the model"):
            select(zoo.sequential(keras_module), 0.4, calibration_data=stats)

    def test_of_a_larger_model(self, small, keras_module):
        stats = collect(small, zoo.examples(small, 8))
        part = keras_module.Model(small.inputs, small.get_layer("pool").output)
        with pytest.raises(ValueError, match="statistics of 4 layers, where the model has 2"):
            select(part, 0.2, calibration_data=stats)

    def test_of_other_weights_warns(self, small):
        stats = collect(small, zoo.examples(small, 8))
        small.get_layer("head").bias.assign(np.ones(10))
        with pytest.warns(UserWarning, match="have changed since the calibration"):
            select(small, 0.4, calibration_data=stats)

    def test_fit_a_second_instance_with_numbered_names(self, keras_module):
        first = zoo.sequential_built_by_a_call(keras_module)
        second = zoo.sequential_built_by_a_call(keras_module)
        second.set_weights(first.get_weights())
        stats = collect(first, zoo.examples(first, 8))
        a, b = (select(m, 0.4, calibration_data=stats) for m in (first, second))
        assert [c.rank for c in a.choices] == [c.rank for c in b.choices]

    def test_files_that_hold_none(self, tmp_path):
        small = zoo.functional(keras)
        collect(small, zoo.examples(small, 8)).save(tmp_path / "whole.npz")
        arrays = dict(np.load(tmp_path / "whole.npz"))
        del arrays["blocks_1"]
        np.savez(tmp_path / "d.npz", **arrays)
        (tmp_path / "e.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:5000])
        np.save(tmp_path / "f.npy", np.ones(3))
        (tmp_path / "a.npz").write_bytes(b"no archive")
        np.savez(tmp_path / "b.npz", x=np.ones(3))
        meta = {"format": "keras_alds.CalibrationStats", "version": 99}
        np.savez(tmp_path / "c.npz", meta=np.array(json.dumps(meta)))
        for name, message in (
            ("a.npz", "without them"),
            ("b.npz", "without them"),
            ("c.npz", "Received: version=99"),
            ("d.npz", "without them"),
            ("e.npz", "without them"),
            ("f.npy", "without them"),
        ):
            with pytest.raises(ValueError, match=message):
                CalibrationStats.load(tmp_path / name)

    def test_layers_that_no_example_reaches_are_left_alone(self, keras_module, tmp_path):
        L = keras_module.layers

        class Net(keras_module.Model):
            def __init__(self):
                super().__init__()
                self.used, self.unused = L.Dense(32), L.Dense(32)

            def build(self, shape):
                self.used.build(shape)
                self.unused.build(shape)
                self.built = True

            def call(self, x):
                return self.used(x)

        model = Net()
        model.build((None, 32))
        data = np.random.default_rng(0).standard_normal((16, 32)).astype("float32")
        plan = select(model, 0.2, calibration_data=data)
        assert [choice.reason for choice in plan.choices][1] == "no calibration example reaches it"
        stats = collect(model, data)
        stats.save(tmp_path / "stats.npz")
        loaded = CalibrationStats.load(tmp_path / "stats.npz")
        assert select(model, 0.2, calibration_data=loaded).choices == plan.choices

    def test_wide_layers_keep_blocks_and_the_plan_says_so(self, keras_module, monkeypatch):
        monkeypatch.setattr(moments, "MAX_SIDE", 400)
        model = zoo.sequential(keras_module)  # 1600 inputs of `hidden`
        x = zoo.examples(model, 16)
        stats = collect(model, x)
        assert stats.blocks == {"hidden": 4}
        plan = select(model, 0.5, calibration_data=stats)
        (hidden,) = (choice for choice in plan.choices if choice.layer == "hidden")
        assert hidden.slices % 4 == 0
        assert hidden.note.startswith("chosen with 4 diagonal blocks")
        assert CompressionPlan.from_dict(plan.to_dict()) == plan
        assert (
            compress(model, plan=plan, calibration_data=stats).count_params() == plan.params_after
        )

    def test_layers_that_saw_few_inputs_are_noted(self, small):
        x, _ = zoo.images(40)
        stats = collect(small, x)
        plan = select(small, 0.6, calibration_data=stats)
        counts = {path: m.count / m.side for path, m in stats.moments.items()}
        noted = {choice.layer for choice in plan.factorized if choice.note}
        assert noted == {c.layer for c in plan.factorized if counts[c.layer] < moments.MANY}
        assert 0 < len(noted) < len(plan.factorized)
        found = next(choice for choice in plan.factorized if choice.note)
        assert found.note.startswith(f"regularized, as only {stats.moments[found.layer].count} ")
        lines = []
        plan.summary(print_fn=lines.append)
        assert f"{found.layer}: regularized" in "\n".join(lines)
        pca = select(small, 0.1, calibration_data=stats, method="pca")
        assert not any(choice.note for choice in pca.choices)


class TestPlans:
    def test_chosen_with_data_and_applied_without_warns(self, small):
        x, _ = zoo.images(16)
        plan = select(small, 0.4, calibration_data=x)
        with pytest.warns(UserWarning, match="chosen with data"):
            compressed = compress(small, plan=plan)
        assert compressed.count_params() == plan.params_after

    def test_chosen_without_data_get_factors_from_data(self, small):
        x, _ = zoo.images(16)
        plan = select(small, 0.4)
        with_data, without = (
            compress(small, plan=plan, calibration_data=x),
            compress(small, plan=plan),
        )
        assert with_data.count_params() == without.count_params()
        expected = zoo.outputs(small, x)
        distances = [np.square(zoo.outputs(m, x) - expected).sum() for m in (with_data, without)]
        assert distances[0] < distances[1]


class TestInTraining:
    def model(self, K):
        K.utils.set_random_seed(0)
        model = zoo.functional(K)
        loss = K.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(K.optimizers.SGD(0.01, momentum=0.9), loss)
        return model

    @pytest.mark.parametrize("kind", ["given", "arrays", "dataset", "plan"])
    def test_calibrates_with_the_weights_of_the_moment(self, keras_module, kind):
        model = self.model(keras_module)
        x, y = zoo.images(64)
        options = {"cr": 0.4, "method": "activation"}
        if kind == "given":
            options = {"cr": 0.4, "calibration_data": x[:32]}
        if kind == "plan":
            options = {"plan": select(model, 0.4, calibration_data=x)}
        callback = ALDSCompress(at_epoch=1, verbose=0, **options)
        if kind == "dataset":
            data = {"x": tf.data.Dataset.from_tensor_slices((x, y)).batch(32)}
        else:
            data = {"x": x, "y": y, "batch_size": 32}
        weights = []

        class Spy(keras_module.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == 1:
                    weights.append(self.model.get_weights())

        model.fit(**data, epochs=2, shuffle=False, verbose=0, callbacks=[Spy(), callback])
        assert callback.plan.method == "activation"
        assert callback.plan.cr >= 0.4
        reference = self.model(keras_module)
        reference.set_weights(weights[0])
        if kind != "plan":
            used = options.get("calibration_data", x)
            again = select(reference, 0.4, calibration_data=used)
            assert callback.plan.choices == again.choices
        assert any(is_factorized(layer) for _, layer in walk(model))

    def test_generators_cannot_be_read_twice(self, keras_module):
        model = self.model(keras_module)
        x, y = zoo.images(32)

        def forever():
            while True:
                yield x, y

        before = model.get_weights()
        with pytest.raises(ValueError, match=r"can be read twice.*Received: .*generator"):
            model.fit(
                forever(),
                steps_per_epoch=1,
                epochs=2,
                verbose=0,
                callbacks=[ALDSCompress(0.4, at_epoch=1, method="activation")],
            )
        for old, new in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)

    @pytest.mark.parametrize("options", [{"method": "activation"}, {"distill": True}])
    def test_sequences_that_are_iterators_too(self, keras_module, options):
        """`ImageDataGenerator.flow` gives such an object: it ends as a Sequence only."""
        x, y = zoo.images(32)
        sequence = getattr(keras_module.utils, "PyDataset", keras_module.utils.Sequence)

        class Flow(sequence):
            def __len__(self):
                return 2

            def __getitem__(self, index):
                return x[16 * index :][:16], y[16 * index :][:16]

            def __iter__(self):
                return self

            def __next__(self):
                return self[0]

        model = self.model(keras_module)
        callback = ALDSCompress(0.4, at_epoch=1, verbose=0, **options)
        model.fit(Flow(), epochs=2, verbose=0, callbacks=[callback])
        assert callback.plan.cr >= 0.4

    def test_bad_data_stop_before_anything_changed(self, keras_module):
        model = self.model(keras_module)
        x, y = zoo.images(32)
        callback = ALDSCompress(
            0.4, calibration_data=np.full_like(x, np.nan), verbose=0, at_epoch=0
        )
        before = model.get_weights()
        with pytest.raises(ValueError, match="finite `calibration_data`"):
            model.fit(x, y, verbose=0, callbacks=[callback])
        for old, new in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)

    def test_methods_and_data_belong_together(self):
        with pytest.raises(ValueError, match="Received: method='energy'"):
            ALDSCompress(0.4, method="energy", calibration_data=np.ones((8, 4)), at_epoch=0)


@pytest.mark.slow
@pytest.mark.data
def test_resnet20_keeps_its_accuracy_without_retraining(data_dir):
    model = keras.models.load_model(data_dir / "resnet20_cifar10.keras", compile=False)
    with np.load(data_dir / "cifar10_dev.npz") as file:
        x = file["x_train"][:256].astype("float32")
        x_test, y_test = file["x_test"][:1000].astype("float32"), file["y_test"].ravel()[:1000]

    def accuracy(model):
        return np.mean(model.predict(x_test, batch_size=250, verbose=0).argmax(-1) == y_test)

    stats = collect(model, x)
    base = accuracy(model)
    for cr, drop in ((0.5, 0.04), (0.6, 0.07)):
        assert accuracy(compress(model, cr, calibration_data=stats)) > base - drop
