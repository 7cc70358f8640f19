"""Which layers can be factorized, and why the others stay as they are."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_alds import ALDSCompress, select


def near(K, start):
    """A regularizer that keeps a kernel near its start, as in transfer learning (L2-SP)."""

    class Near(K.regularizers.Regularizer):
        def __call__(self, x):
            assert hasattr(x, "name")  # Keras passes a variable
            return 1e-3 * tf.reduce_sum(tf.square(x - tf.constant(start, tf.float32)))

    return Near()


class TestLeftAlone:
    def reasons(self, model, **options):
        return {choice.layer: choice.reason for choice in select(model, 0.05, **options).choices}

    def test_reasons(self, keras_module):
        L, K = keras_module.layers, keras_module
        inputs = K.Input((12, 12, 8))
        x = L.DepthwiseConv2D(3, name="depthwise")(inputs)
        x = L.BatchNormalization(name="bn")(x)
        x = L.UpSampling2D(name="up")(x)
        x = L.Conv2DTranspose(8, 3, name="transposed", kernel_constraint="non_neg")(x)
        x = L.Conv2D(8, 3, kernel_constraint=K.constraints.NonNeg(), name="constrained")(x)
        x = L.Conv2D(8, 3, kernel_regularizer=near(K, np.ones((3, 3, 8, 8))), name="near")(x)
        x = L.Conv2D(2, (5, 3), padding="same", kernel_regularizer=near(K, 0.5), name="odd")(x)
        x = L.Conv2D(16, 3, kernel_regularizer=near(K, 0.5), name="conv")(x)
        x = L.Conv2D(1, 1, name="tiny")(x)
        model = K.Model(inputs, x)
        reasons = self.reasons(model)
        assert reasons["conv"] is None
        assert "filters each channel separately" in reasons["depthwise"]
        assert reasons["bn"] == "BatchNormalization has no kernel to factorize"
        assert "kernel_constraint NonNeg" in reasons["transposed"]
        assert "kernel_constraint NonNeg" in reasons["constrained"]
        assert "kernel_regularizer does not take arrays of other shapes" in reasons["near"]
        assert reasons["tiny"].startswith("no factorization of its kernel")

    @pytest.mark.both
    def test_kernels_that_a_layer_around_them_uses(self, keras_module):
        L, K = keras_module.layers, keras_module

        class HoldsKernel(L.Wrapper):
            keep = staticmethod(lambda kernel: kernel)

            def build(self, shape):
                super().build(shape)
                self.weight = self.keep(self.layer.kernel)

            def call(self, inputs):
                return self.layer(inputs)

        class HoldsList(HoldsKernel):
            keep = staticmethod(lambda kernel: [kernel])

        class HoldsDict(HoldsKernel):
            keep = staticmethod(lambda kernel: {"kernel": kernel})

        wrapped = {
            cls.__name__: cls(L.Conv2D(32, 3, name="conv"), name=cls.__name__)
            for cls in (HoldsKernel, HoldsList, HoldsDict)
        }
        if K is keras:  # with this TensorFlow, tf_keras's makes an `InputSpec` of Keras 3 and fails
            wrapped["spectral"] = L.SpectralNormalization(
                L.Conv2D(32, 3, name="conv"), name="spectral"
            )
        last = [L.Conv2D(32, 3, name="plain"), L.GlobalAveragePooling2D()]
        model = K.Sequential([K.Input((12, 12, 8)), *wrapped.values(), *last])
        reasons = self.reasons(model)
        for name in wrapped:
            assert reasons[f"{name}/conv"] == f"its kernel is shared with '{name}'"
        assert reasons["plain"] is None
        model.compile("sgd", "mse")
        alds = ALDSCompress(cr=0.05, at_epoch=1)
        x, y = np.ones((4, 12, 12, 8)), np.ones((4, 32))
        losses = model.fit(x, y, epochs=2, callbacks=[alds], verbose=0).history["loss"]
        assert np.isfinite(losses).all()
        assert [choice.layer for choice in alds.plan.factorized] == ["plain"]

    def test_kernels_that_other_layers_or_the_model_use(self, keras_module):
        L, K = keras_module.layers, keras_module

        class Holder(L.Layer):
            def __init__(self, inner):
                super().__init__(name="holder")
                self.inner = inner
                self.weight = inner.kernel

            def call(self, inputs):
                return self.inner(inputs)

        class Model(K.Model):
            def __init__(self):
                super().__init__(name="dense")  # like its layer
                self.dense, self.other, self.free = (
                    L.Dense(32, name=name) for name in ("dense", "other", "free")
                )
                self.cells = L.LSTM(32, name="lstm")

            def build(self, shape):
                for layer in (self.dense, self.other, self.free):
                    layer.build((None, 32))
                self.kernel = self.dense.kernel
                self.holder = Holder(self.other)  # after `other`: it is found there first
                self.built = True

            def call(self, inputs):
                x = self.holder(self.dense(self.free(inputs)))
                return self.cells(x[:, None])

        model = Model()
        model(np.ones((2, 32), "float32"))
        reasons = self.reasons(model)
        assert reasons["dense"] == "its kernel is shared with 'dense'"
        assert reasons["other"] == "its kernel is shared with 'holder'"
        shared = {path for path, reason in reasons.items() if "shared" in (reason or "")}
        assert shared == {"dense", "other"}
        assert "lstm/lstm_cell/kernel" in reasons

    @pytest.mark.parametrize("attribute", ["kernel", "cell.recurrent_kernel"])
    def test_a_kernel_that_a_wrapper_computes(self, keras_module, attribute):
        L, K = keras_module.layers, keras_module
        *to_owner, name = attribute.split(".")
        if name == "kernel" and K is keras:  # a property without a setter
            name = "_kernel"

        class Halved(L.Layer):
            def __init__(self, inner, **kwargs):
                super().__init__(**kwargs)
                self.inner = inner

            def build(self, shape):
                self.inner.build(shape)
                self.owner = self.inner.cell if to_owner else self.inner
                self.raw = getattr(self.owner, name)
                self.built = True

            def call(self, x):
                setattr(self.owner, name, tf.convert_to_tensor(self.raw) * 0.5)
                return self.inner(x)

        inner = L.LSTM(32, name="inner") if to_owner else L.Dense(32, name="inner")
        shape = (5, 32) if to_owner else (32,)
        last = [L.Dense(32, name="plain"), L.Dense(4)]
        model = K.Sequential([K.Input(shape), Halved(inner, name="halved"), *last])
        model.compile("sgd", "mse")
        x, y = np.ones((8, *shape), "float32"), np.ones((8, 4), "float32")
        model.fit(x, y, verbose=0)
        reason = "the code of 'halved' puts a tensor in the place of a kernel"
        assert list(self.reasons(model).values()).count(reason) == (2 if to_owner else 1)
        alds = ALDSCompress(cr=0.05, at_epoch=1, method="energy", verbose=0)
        losses = model.fit(x, y, epochs=2, callbacks=[alds], verbose=0).history["loss"]
        assert np.isfinite(losses).all()
        assert "plain" in [choice.layer for choice in alds.plan.factorized]

    @pytest.mark.parametrize("function", [lambda call: call, tf.function], ids=["code", "graph"])
    def test_a_kernel_that_code_assigns_to(self, keras_module, function):
        L, K = keras_module.layers, keras_module

        class Masked(L.Layer):
            """As in Keras's PixelCNN."""

            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.conv = L.Conv2D(32, 3, name="conv")

            def build(self, shape):
                self.conv.build(shape)
                self.built = True

            @function
            def call(self, x):
                self.conv.kernel.assign(self.conv.kernel * 0.5)
                return self.conv(x)

        inner = [L.Conv2D(32, 3, name="plain"), Masked(name="masked")]
        model = K.Sequential([K.Input((9, 9, 16)), *inner, L.GlobalAveragePooling2D(), L.Dense(4)])
        model.compile("sgd", "mse")
        x, y = np.ones((8, 9, 9, 16), "float32"), np.ones((8, 4), "float32")
        plan = select(model, 0.2, method="energy")
        choice = next(choice for choice in plan.choices if choice.layer == "masked/conv")
        assert choice.reason == "the code of 'masked' assigns to its kernel"
        alds = ALDSCompress(cr=0.2, at_epoch=1, method="energy", verbose=0)
        losses = model.fit(x, y, epochs=3, callbacks=[alds], verbose=0).history["loss"]
        assert np.isfinite(losses).all()
        assert [choice.layer for choice in alds.plan.factorized] == ["plain"]

    def test_grouped_convolution(self, keras_module):
        L, K = keras_module.layers, keras_module
        model = K.Sequential(
            [K.Input((8, 8, 8)), L.Conv2D(16, 3, groups=2, name="g"), L.Conv2D(16, 3, name="c")]
        )
        assert self.reasons(model)["g"] == "its convolution is already grouped (groups=2)"

    def test_a_subclass_with_a_forward_pass_of_its_own(self, keras_module):
        L, K = keras_module.layers, keras_module

        class Standardized(L.Conv2D):
            def call(self, inputs):
                return super().call(inputs) * 2.0

        class Renamed(L.Conv2D):
            pass

        model = K.Sequential(
            [K.Input((8, 8, 8)), Standardized(16, 3, name="own"), Renamed(16, 3, name="plain")]
        )
        reasons = self.reasons(model)
        assert reasons["own"] == "Standardized changes the forward pass of Conv2D"
        assert reasons["plain"] is None

    def test_a_subclass_with_attributes_or_methods_of_its_own(self, keras_module):
        L, K = keras_module.layers, keras_module

        class Tagged(L.Conv2D):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.tag = 3

        class Speaking(L.Conv2D):
            def speak(self):
                return "conv"

        class Preset(L.Conv2D):
            def __init__(self, filters, **kwargs):
                kwargs = {"kernel_size": 3, "padding": "same", **kwargs}
                super().__init__(filters, **kwargs)

        inputs = K.Input((8, 8, 8))
        x = Preset(16, name="preset")(Speaking(8, 3, name="own")(Tagged(8, 3, name="tag")(inputs)))
        reasons = self.reasons(K.Model(inputs, x))
        assert reasons["tag"] == "Tagged adds tag to Conv2D, which would be lost"
        assert reasons["own"] == "Speaking adds speak to Conv2D, which would be lost"
        assert reasons["preset"] is None

    def test_a_kernel_that_two_layers_hold(self, keras_module):
        L, K = keras_module.layers, keras_module

        class Decode(L.Layer):
            def __init__(self, dense, **kwargs):
                super().__init__(**kwargs)
                self.tied = dense.kernel

            def call(self, x):
                return tf.matmul(x, self.tied, transpose_b=True)

        inputs = K.Input((16,))
        dense = L.Dense(12, name="encode")
        hidden = L.Dense(32, name="more")(dense(inputs))
        x = L.Dense(12, name="back")(hidden)
        model = K.Model(inputs, Decode(dense, name="decode")(x))
        reasons = self.reasons(model)
        assert reasons["encode"] == "its kernel is shared with 'decode'"
        assert "shared with" not in (reasons["more"] or "")

    def test_what_the_budget_leaves_whole(self, small):
        plan = select(small, 0.05, target="size")
        assert "staying dense fits the budget" in {choice.reason for choice in plan.choices}
