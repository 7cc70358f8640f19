"""Models whose layers are factorized in place."""

from __future__ import annotations

import contextlib
import gc

import numpy as np
import pytest
import tensorflow as tf
import zoo

from keras_alds import ALDSCompress, apply_plan, compress, select
from keras_alds._backend import backend_of
from keras_alds._backend.live import empty
from keras_alds.kinds.base import is_factorized
from keras_alds.models.inventory import walk
from keras_alds.models.optimizer import carried


def factorized_layers(model):
    return [layer for _, layer in walk(model) if is_factorized(layer)]


def value(tensor):
    return np.asarray(tf.convert_to_tensor(tensor))


class TestSubclassed:
    def test_weights_load_after_the_plan_is_applied(self, keras_module, tmp_path):
        model = zoo.subclassed(keras_module)
        plan = select(model, 0.4)
        compressed = compress(model, plan=plan)
        path = tmp_path / "compressed.weights.h5"
        compressed.save_weights(path)
        fresh = zoo.subclassed(keras_module)
        apply_plan(fresh, plan)
        fresh.load_weights(path)
        inputs = zoo.examples(model)
        np.testing.assert_allclose(
            zoo.outputs(fresh, inputs), zoo.outputs(compressed, inputs), rtol=1e-6, atol=1e-6
        )

    def test_without_a_config_the_error_names_the_remedy(self, keras_module):
        K = keras_module

        class Opaque(K.Model):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer

            def call(self, x):
                return self.layer(x)

            def get_config(self):
                raise NotImplementedError("no config")

        model = Opaque(K.layers.Dense(16))
        model(np.zeros((2, 16), "float32"))
        weights = model.get_weights()
        with pytest.raises(ValueError, match="get_config"):
            compress(model, 0.3)
        np.testing.assert_array_equal(weights[0], model.get_weights()[0])
        apply_plan(model, select(model, 0.3))
        assert is_factorized(model.layer)


class TestInPlace:
    def test_references_names_and_bias_stay(self, small):
        layer, bias = small.get_layer("down"), small.get_layer("down").bias
        apply_plan(small, select(small, 0.4))
        assert small.get_layer("down") is layer
        assert layer.bias is bias
        assert [w.shape[-1] for w in layer.trainable_weights] == [layer.slices * layer.rank, 24, 24]

    def test_a_failure_leaves_everything_as_it_was(self, small, monkeypatch):
        from keras_alds.models import in_place

        inputs = zoo.examples(small)
        expected, weights = zoo.outputs(small, inputs), small.get_weights()
        layers = {path: (layer, type(layer)) for path, layer in walk(small)}

        def fail(*_):
            raise RuntimeError("no")

        monkeypatch.setattr(in_place, "carry_optimizers", fail)
        with pytest.raises(RuntimeError, match="no"):
            apply_plan(small, select(small, 0.4))
        for path, layer in walk(small):
            assert layers[path] == (layer, type(layer))
        np.testing.assert_array_equal(zoo.outputs(small, inputs), expected)
        for a, b in zip(weights, small.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


class Family:
    """An autoencoder of an encoder and a decoder, and other models round the same encoder."""

    def __init__(self, K, optimizer=None):
        self.K, L = K, K.layers
        K.utils.set_random_seed(0)
        self.x = np.random.default_rng(0).normal(size=(16, 32)).astype("float32")
        self.encoder = K.Sequential(
            [K.Input((32,)), L.Dense(48, "relu", name="wide"), L.Dense(24, name="code")]
        )
        self.decoder = K.Sequential([K.Input((24,)), L.Dense(48, "relu"), L.Dense(32)])
        image = K.Input((32,))
        self.whole = K.Model(image, self.decoder(self.encoder(image)))
        self.features = K.Model(self.encoder.inputs, self.encoder.layers[0].output)
        self.classifier = K.Model(image, L.Dense(3, name="head")(self.encoder(image)))
        self.classifier.compile(optimizer or K.optimizers.Adam(0.01), "mse")

        class Trainer(K.Model):
            """Holds a model and the layers of another one, in a list."""

            def __init__(self, model, layers):
                super().__init__()
                self.inner, self.parts = model, list(layers)

            def call(self, x):
                for layer in self.parts:
                    x = layer(x)
                return x + self.inner(tf.pad(x, [[0, 0], [0, 8]]))

        self.trainer = Trainer(self.encoder, self.encoder.layers)

    @property
    def others(self):
        return [self.encoder, self.features, self.classifier, self.trainer]

    def outputs(self):
        return [model.predict(self.x, verbose=0) for model in self.others]

    def train(self):
        self.classifier.train_on_batch(self.x, self.x[:, :3])


def state_of(optimizer):
    variables = optimizer.variables
    return [value(v) for v in (variables() if callable(variables) else variables)]


def scaled(K):
    module = K.optimizers if K.__name__ == "keras" else K.mixed_precision
    return module.LossScaleOptimizer(K.optimizers.Adam(0.01))


class TestOtherModels:
    """Models that hold the same layers as the compressed one follow it."""

    def test_outputs(self, keras_module):
        family = Family(keras_module)
        before = family.outputs()
        apply_plan(family.whole, select(family.whole, 0.4, method="alds"))
        assert len(factorized_layers(family.encoder)) == 2
        for model, old, new in zip(family.others, before, family.outputs(), strict=True):
            np.testing.assert_allclose(new, value(model(family.x)), atol=1e-5)
            assert np.abs(new - old).max() > 0.01

    @pytest.mark.parametrize(
        "optimizer",
        [
            lambda K: K.optimizers.Adam(0.01),
            lambda K: K.optimizers.SGD(0.01, momentum=0.9),
            scaled,
            lambda K: K.optimizers.legacy.Adam(0.01),
        ],
        ids=["adam", "momentum", "scaled", "legacy"],
    )
    def test_training(self, keras_module, optimizer, request):
        if "legacy" in request.node.name and keras_module.__name__ == "keras":
            pytest.skip("Keras 3 has no legacy optimizers")
        family = Family(keras_module, optimizer(keras_module))
        model, backend = family.classifier, backend_of(family.classifier)
        family.train()
        inner = backend.inner_optimizer(model.optimizer) or model.optimizer

        def slots():
            targets = backend.optimizer_targets(inner, model.trainable_variables)
            held = backend.slots(inner, targets).items()
            return {
                (name, id(target)): backend.value(slot)
                for name, found in held
                for target, slot in zip(targets, found, strict=True)
            }

        before, layer = slots(), family.encoder.get_layer("wide")
        kernel = layer.kernel
        apply_plan(family.whole, select(family.whole, 0.4))
        after = slots()
        names = {name for name, _ in before}
        assert names
        for key in before.keys() & after.keys():
            np.testing.assert_array_equal(before[key], after[key])
        for name in names & {"_momentums", "momentums", "momentum", "m"}:
            expected = carried(backend, "linear", before[name, id(kernel)], layer)
            for factor, state in zip((layer.encoder, layer.decoder), expected, strict=True):
                np.testing.assert_allclose(after[name, id(factor)], state, atol=1e-7)
        factors = [w for part in factorized_layers(model) for w in (part.encoder, part.decoder)]
        values = [value(factor) for factor in factors]
        family.train()
        assert all((value(new) != old).any() for new, old in zip(factors, values, strict=True))
        assert int(inner.iterations) == 2

    def test_graphs_that_cannot_be_traced_anew_fail(self, keras_module):
        family = Family(keras_module)
        run = tf.function(family.encoder)
        graph = run.get_concrete_function(tf.TensorSpec((None, 32)))
        data = tf.data.Dataset.from_tensor_slices(family.x).batch(4).map(family.encoder)
        list(data)
        apply_plan(family.whole, select(family.whole, 0.4))
        with pytest.raises(RuntimeError, match="Call `get_concrete_function` of its"):
            graph(family.x)
        with pytest.raises(tf.errors.InvalidArgumentError, match="not a matrix"):
            list(data)
        np.testing.assert_allclose(run(family.x), value(family.encoder(family.x)), atol=1e-5)

    def test_the_models_of_an_adversarial_net(self, keras_module):
        K, L = keras_module, keras_module.layers
        x, ones = np.ones((8, 32), "float32"), np.ones((8, 1), "float32")
        generator = K.Sequential([K.Input((32,)), L.Dense(48, "relu"), L.Dense(32)])
        critic = K.Sequential([K.Input((32,)), L.Dense(48, "relu"), L.Dense(1)])
        critic.compile(K.optimizers.Adam(), "mse")
        critic.train_on_batch(x, ones)
        noise = K.Input((32,))
        both = K.Model(noise, critic(generator(noise)))
        critic.trainable = False
        both.compile(K.optimizers.SGD(0.1, momentum=0.9), "mse")
        both.train_on_batch(x, ones)
        apply_plan(generator, select(generator, 0.3))
        made, judging = generator.get_weights(), critic.get_weights()
        both.train_on_batch(x, -ones)
        assert any((a != b).any() for a, b in zip(made, generator.get_weights(), strict=True))
        for before, after in zip(judging, critic.get_weights(), strict=True):
            np.testing.assert_array_equal(before, after)
        np.testing.assert_allclose(
            both.predict(x, verbose=0), value(critic(generator(x))), atol=1e-5
        )

    def test_a_loop_of_ones_own(self, keras_module):
        model = Family(keras_module).encoder
        optimizer, x = keras_module.optimizers.Adam(0.01), tf.ones((4, 32))

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x)))
            variables = model.trainable_variables
            gradients = tape.gradient(loss, variables)
            optimizer.apply_gradients(zip(gradients, variables, strict=True))

        step()
        apply_plan(model, select(model, 0.3))
        before = model.get_weights()
        step()
        assert all((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))

    @pytest.mark.both
    def test_variables_that_no_layer_holds(self, keras_module):
        # tf_keras's optimizers only keep keys of what they update.
        K = keras_module
        model, optimizer = Family(K).encoder, K.optimizers.Adam(0.01)
        other = K.Variable(1.0) if K.__name__ == "keras" else tf.Variable(1.0)
        variables = [*model.trainable_variables, other]
        optimizer.build(variables)
        optimizer.apply_gradients([(tf.ones(v.shape), v) for v in variables])
        before = np.array(optimizer._momentums[-1])
        assert before != 0
        apply_plan(model, select(model, 0.3))
        assert np.array(optimizer._momentums[-1]) == before
        variables = [*model.trainable_variables, other]
        old = np.array(other)
        optimizer.apply_gradients([(tf.ones(v.shape), v) for v in variables])
        assert np.array(other) != old

    @pytest.mark.both
    def test_variables_that_are_gone(self, keras_module):
        K = keras_module
        model, optimizer = Family(K).encoder, K.optimizers.Adam(0.01)
        other = K.Variable(1.0) if K.__name__ == "keras" else tf.Variable(1.0)
        optimizer.build([*model.trainable_variables, other])
        del other
        gc.collect()
        plan = select(model, 0.3)
        if K.__name__ == "keras":  # its optimizers hold what they update
            apply_plan(model, plan)
            return
        with pytest.raises(ValueError, match="also built for 1 other variables"):
            apply_plan(model, plan)
        assert not factorized_layers(model)

    def test_a_failure_at_the_end_leaves_them_as_they_were(self, keras_module, monkeypatch):
        from keras_alds.models import in_place

        family = Family(keras_module)
        family.train()
        before = family.outputs()
        weights = family.classifier.get_weights()
        state = state_of(family.classifier.optimizer)
        run = tf.function(family.encoder)
        graph = run.get_concrete_function(tf.TensorSpec((None, 32)))
        emptied = []

        def fail(kernel):
            if len(emptied) == 2:
                raise MemoryError
            emptied.append(kernel)
            return empty(kernel)

        monkeypatch.setattr(in_place, "empty", fail)
        with pytest.raises(MemoryError):
            apply_plan(family.whole, select(family.whole, 0.4, method="alds"))
        for old, new in zip(before, [*family.outputs()], strict=True):
            np.testing.assert_array_equal(old, new)
        np.testing.assert_allclose(graph(family.x), before[0], atol=1e-6)
        assert run.experimental_get_tracing_count() == 1
        for old, new in zip(weights, family.classifier.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
        after = state_of(family.classifier.optimizer)
        for old, new in zip(state, after, strict=True):
            np.testing.assert_array_equal(old, new)
        family.train()

    def test_a_kernel_that_another_layer_holds_stays(self, keras_module):
        class Tied(keras_module.layers.Layer):
            def __init__(self, layer):
                super().__init__(name="tied")
                self.w = layer.kernel

            def call(self, x):
                return tf.matmul(x, tf.convert_to_tensor(self.w), transpose_b=True)

        model = Family(keras_module).encoder
        tied, inputs = Tied(model.layers[0]), keras_module.Input((48,))
        other = keras_module.Model(inputs, tied(inputs))
        other.compile("adam", "mse")
        other.train_on_batch(np.ones((2, 48)), np.ones((2, 32)))
        with pytest.warns(UserWarning, match="'wide' is also a weight of the layer 'tied'"):
            apply_plan(model, select(model, 0.3))
        before = value(tied.w)
        other.train_on_batch(np.ones((2, 48)), np.ones((2, 32)))
        assert (value(tied.w) != before).any()

    def test_a_copy_leaves_the_original_and_its_graphs_alone(self, keras_module):
        family = Family(keras_module)
        before, weights = family.outputs(), family.classifier.get_weights()
        run = tf.function(family.encoder)
        run(family.x)
        small = compress(family.classifier, 0.4)
        assert factorized_layers(small)
        assert run.experimental_get_tracing_count() == 1
        for old, new in zip(before, family.outputs(), strict=True):
            np.testing.assert_array_equal(old, new)
        for old, new in zip(weights, family.classifier.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)

    def test_a_copy_that_holds_the_same_layers_is_refused(self, keras_module):
        class Sharing(keras_module.Model):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer

            def call(self, x):
                return self.layer(x)

            def get_config(self):
                return {"layer": self.layer}

            @classmethod
            def from_config(cls, config):
                return cls(**config)

        model = Sharing(keras_module.layers.Dense(16))
        model(np.zeros((2, 16), "float32"))
        with pytest.raises(ValueError, match="to have weights of its own"):
            compress(model, 0.3)
        assert not is_factorized(model.layer)


def tied(K, kernel):
    """An autoencoder whose last two layers use the kernels of its first two.

    Args:
        K: Keras 3 or tf_keras.
        kernel: A function that takes the kernel from a layer.
    """

    class Transposed(K.layers.Layer):
        def __init__(self, dense, **kwargs):
            super().__init__(**kwargs)
            self.dense = dense

        def call(self, x):
            return tf.matmul(x, kernel(self.dense), transpose_b=True)

        def get_config(self):
            return super().get_config()

    L = K.layers
    one, two, plain = (L.Dense(32, name=name) for name in ("one", "two", "plain"))
    last = Transposed(two, name="after"), Transposed(one, name="before")
    model = K.Sequential([K.Input((32,)), one, plain, two, *last])
    model.compile(K.optimizers.Adam(), "mse")
    return model


class TestCodeThatKnowsAWeight:
    x = np.random.default_rng(0).normal(size=(8, 32)).astype("float32")

    def fit(self, model, **options):
        alds = ALDSCompress(0.2, at_epoch=1, method="energy", verbose=0, **options)
        model.fit(self.x, self.x, epochs=3, verbose=0, callbacks=[alds])

    def test_an_error_names_the_layers_and_nothing_changes(self, keras_module):
        model = tied(keras_module, lambda dense: dense.weights[0])
        outputs = model.predict(self.x, verbose=0)
        classes = {path: type(layer) for path, layer in walk(model)}
        text = r"Expected the code of Transposed to work with factors.*exclude=\['one', 'two'\],"
        with pytest.raises(ValueError, match=text):
            apply_plan(model, select(model, 0.4, method="energy"))
        np.testing.assert_array_equal(model.predict(self.x, verbose=0), outputs)
        assert {path: type(layer) for path, layer in walk(model)} == classes
        model.fit(self.x, self.x, verbose=0)

    def test_training_ends_with_the_error_or_goes_on_without_the_layers(self, keras_module):
        model = tied(keras_module, lambda dense: dense.weights[0])
        with pytest.raises(ValueError, match="Expected the code of Transposed"):
            self.fit(model, bounds={"plain": (0, 0)})
        assert not factorized_layers(model)
        self.fit(model, exclude=["one", "two"])
        assert [layer.name for layer in factorized_layers(model)] == ["plain"]

    def test_reading_the_attribute_works(self, keras_module):
        model = tied(keras_module, lambda dense: dense.kernel)
        self.fit(model, bounds={"plain": (0, 0)})
        assert factorized_layers(model)

    def test_a_model_that_could_not_be_traced_before_is_compressed(self, keras_module):
        K = keras_module

        class InPython(K.layers.Layer):
            def call(self, x):
                return x * float(np.mean(x))

        net = K.Sequential([K.Input((32,)), K.layers.Dense(32)])

        class Own(K.Model):
            def __init__(self):
                super().__init__()
                self.net, self.scale = net, InPython()

            def call(self, x):
                return self.scale(self.net(x))

        model = Own()
        if K.__name__ == "keras":
            model.built = True
        apply_plan(model, select(model, 0.3, method="energy"))
        assert factorized_layers(model)

    def test_a_state_in_an_attribute_stays_usable(self, keras_module):
        """Code that runs eagerly may keep a tensor; tracing it would leave a symbolic one."""
        K = keras_module

        class Memory(K.Model):
            def __init__(self):
                super().__init__()
                self.first, self.head = K.layers.Dense(32), K.layers.Dense(32)
                self.memory = None

            def call(self, x):
                y = self.first(x)
                self.memory = y if self.memory is None else y + 0.5 * tf.stop_gradient(self.memory)
                return self.head(self.memory)

        model = Memory()
        with contextlib.suppress(Exception):  # Keras 3 traces the first call itself
            model(self.x)
        model.memory = None
        model(self.x)
        apply_plan(model, select(model, 0.3, method="energy"))
        model(self.x)
        assert len(factorized_layers(model)) == 2


def test_a_layer_of_layers_with_examples(keras_module):
    """A layer has no inputs of its own that Keras knows, as the networks of an agent have none."""
    K = keras_module

    class Block(K.layers.Layer):
        def __init__(self):
            super().__init__()
            self.hidden, self.last = K.layers.Dense(64, activation="relu"), K.layers.Dense(4)

        def call(self, x):
            return self.last(self.hidden(x))

    x = np.random.default_rng(0).normal(size=(64, 32)).astype("float32")
    block = Block()
    block(x)
    plan = select(block, 0.4, calibration_data=x, verbose=0)
    apply_plan(block, plan, calibration_data=x, verbose=0)
    assert plan.distance is not None
    assert len(factorized_layers(block)) == len(plan.factorized) > 0
    assert np.isfinite(value(block(x))).all()
