"""What outputs are, how far they are from others, and running a model with other kernels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
import zoo
from scipy.special import rel_entr, softmax

from keras_alds.core.slicing import recompose
from keras_alds.core.spectra import factorize
from keras_alds.kinds.base import kernel_values, known_kind
from keras_alds.models.inventory import Inventory
from keras_alds.models.outputs import OutputKind, Reference, kind_of_output
from keras_alds.models.probes import Prober

rng = np.random.default_rng(0)
SCORES = 3 * rng.standard_normal((40, 10))


class TestKinds:
    @pytest.mark.parametrize(
        ("output", "expected"),
        [
            (softmax(SCORES, -1).astype("float32"), OutputKind.PROBABILITIES),
            (softmax(SCORES, -1).astype("float16"), OutputKind.PROBABILITIES),
            (1 / (1 + np.exp(-SCORES)), OutputKind.BINARY),
            (1 / (1 + np.exp(-SCORES[:, :1])), OutputKind.BINARY),
            (SCORES, OutputKind.SCORES),
            (np.maximum(SCORES, 0), OutputKind.SCORES),
            (rng.standard_normal((4, 8, 8, 21)), OutputKind.SCORES),
            (rng.standard_normal((4, 8, 8, 3)), OutputKind.VALUES),
            (rng.standard_normal((40, 4)), OutputKind.VALUES),
            (100 * np.arange(20) + rng.standard_normal((40, 20)), OutputKind.VALUES),
            (SCORES.argmax(-1), OutputKind.LABELS),
            (np.zeros((40, 1)), OutputKind.VALUES),
            (rng.standard_normal(40), OutputKind.VALUES),
        ],
    )
    def test_by_values(self, output, expected):
        assert kind_of_output(output) is expected

    @pytest.mark.parametrize(
        ("loss", "expected"),
        [
            ("sparsecategoricalcrossentropy", OutputKind.SCORES),
            ("categoricalcrossentropy", OutputKind.SCORES),
            ("meansquarederror", OutputKind.VALUES),
            ("binarycrossentropy", OutputKind.VALUES),
        ],
    )
    def test_by_the_loss(self, loss, expected):
        assert kind_of_output(SCORES, loss) is expected
        assert kind_of_output(SCORES[:, :3], loss) is expected

    def test_of_compiled_models(self, keras_module):
        K = keras_module
        inputs = K.Input((4,))
        ends = {"boxes": K.layers.Dense(12, name="boxes")(inputs)}
        ends["classes"] = K.layers.Dense(12, name="classes")(inputs)
        model = K.Model(inputs, ends)
        cross = K.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss={"boxes": "mse", "classes": cross})
        outputs = model.predict(rng.standard_normal((30, 4)), verbose=0)
        found = Reference(model, [outputs[name] for name in model.output_names]).kinds
        expected = {"boxes": OutputKind.VALUES, "classes": OutputKind.SCORES}
        assert [expected[name] for name in model.output_names] == list(found)


class TestDivergence:
    def test_of_scores_and_probabilities_is_that_of_kullback_and_leibler(self):
        other = SCORES + 0.3 * rng.standard_normal(SCORES.shape)
        p, q = softmax(SCORES, -1), softmax(other, -1)
        expected = rel_entr(p, q).sum(-1).mean()
        assert Reference(None, [SCORES]).divergence([other + 7.0]) == pytest.approx(expected)
        assert Reference(None, [p]).divergence([q]) == pytest.approx(expected, rel=1e-3)

    def test_of_independent_probabilities(self):
        p, q = (1 / (1 + np.exp(-s)) for s in (SCORES, SCORES + 0.5))
        expected = (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).mean()
        assert Reference(None, [p]).divergence([q]) == pytest.approx(expected)

    def test_of_values_is_relative_to_their_variance(self):
        values = 50 + rng.standard_normal((40, 4))
        other = values + 0.1
        expected = 0.01 / values.var(axis=0).mean()
        assert Reference(None, [values]).divergence([other]) == pytest.approx(expected)
        constant = np.full((40, 4), 5.0)
        assert Reference(None, [constant]).divergence([constant + 1]) == pytest.approx(1 / 25)

    def test_the_error_is_that_of_logits(self):
        """However sure the scores are, and whatever is added to all of them."""
        other = SCORES + 0.3 * rng.standard_normal(SCORES.shape)
        mine, theirs = (s - s.mean(axis=-1, keepdims=True) for s in (SCORES, other))
        expected = np.square(mine - theirs).mean() / mine.var(axis=0).mean()
        assert Reference(None, [SCORES]).error([other + 7.0]) == pytest.approx(expected)
        assert Reference(None, [9 * SCORES]).error([9 * other]) == pytest.approx(expected)
        p, q = (1 / (1 + np.exp(-s)) for s in (SCORES, SCORES + 0.5))
        assert Reference(None, [p]).error([q]) == pytest.approx(0.25 / SCORES.var(axis=0).mean())
        assert Reference(None, [SCORES[:, :3]]).error([1.1 * SCORES[:, :3]]) > 0

    def test_plans_are_compared_by_two_measures(self):
        """By the scores, and by the probabilities that go to other classes."""
        other = SCORES + 0.3 * rng.standard_normal(SCORES.shape)
        reference = Reference(None, [SCORES])
        moved = np.abs(softmax(SCORES, -1) - softmax(other, -1)).sum(-1).mean() / 2
        mine, theirs = (s - s.mean(axis=-1, keepdims=True) for s in (SCORES, other))
        scale, *_ = np.linalg.lstsq(theirs.reshape(-1, 1), mine.ravel(), rcond=None)
        error = np.square(mine - scale * theirs).mean() / mine.var(axis=0).mean()
        assert reference.discrepancy([other]) ** 2 == pytest.approx(moved * error)
        values = Reference(None, [SCORES[:, :3]])
        assert values.discrepancy([other[:, :3]]) == pytest.approx(
            values.divergence([other[:, :3]])
        )
        assert reference.discrepancy([np.where(SCORES > 0, np.nan, 0)]) == np.inf

    @pytest.mark.parametrize("masked", [-np.inf, -1.7e38, -1e9])
    def test_classes_that_a_mask_rules_out_do_not_count(self, masked):
        other = SCORES + 0.3 * rng.standard_normal(SCORES.shape)
        model = SimpleNamespace(loss="sparse_categorical_crossentropy")
        mine, theirs = (
            [np.pad(s, ((0, 0), (0, 3)), constant_values=masked)] for s in (SCORES, other)
        )
        expected = Reference(model, [SCORES]).discrepancy([other])
        assert Reference(model, mine).discrepancy(theirs) == pytest.approx(expected, rel=0.2)
        assert Reference(model, mine).discrepancy(mine) < 1e-6

    def test_of_labels_is_the_rate_of_others(self):
        labels = SCORES.argmax(-1)
        other = np.where(np.arange(40) < 10, labels + 1, labels)
        assert Reference(None, [labels]).divergence([other]) == 0.25

    def test_of_several_outputs_is_the_sum(self):
        values = rng.standard_normal((40, 3))
        both = Reference(None, [SCORES, values]).divergence([SCORES + 1.0, values * 1.1])
        assert both == pytest.approx(Reference(None, [values]).divergence([values * 1.1]))

    def test_of_outputs_that_are_not_finite_is_infinite(self):
        assert Reference(None, [SCORES]).divergence([np.where(SCORES > 0, np.nan, 0)]) == np.inf

    def test_of_another_shape(self):
        with pytest.raises(ValueError, match=r"Received: \(40, 10\) and \(40, 9\)"):
            Reference(None, [SCORES]).divergence([SCORES[:, :9]])


class TestProber:
    def test_is_a_run_with_other_kernels(self, model):
        """One at a time and all at once, from a prefix and from the start."""
        inputs = zoo.examples(model, 6)
        records = Inventory.of(model).candidates
        before = model.get_weights()
        probers = [
            Prober(model, [r.layer for r in records], [inputs], keep=keep) for keep in (True, False)
        ]
        kernels = {}
        for record in records:
            factors = factorize(kernel_values(record.layer), 1, 1)
            kind, layer = record.kind, record.layer
            kernel = kind.unfolding(layer).write(recompose(*factors, 1), kind.shape(layer))
            kernels[layer] = kernel
        for some in (*({layer: kernel} for layer, kernel in kernels.items()), kernels):
            old = {layer: np.array(values(layer)) for layer in some}
            for layer, kernel in some.items():
                variable(layer).assign(kernel)
            expected = flat_outputs(model, inputs)
            for layer, kernel in old.items():
                variable(layer).assign(kernel)
            divergence = Reference(model, flat_outputs(model, inputs)).divergence(expected)
            for prober in probers:
                assert prober.divergence(some) == pytest.approx(divergence, rel=1e-3, abs=1e-7)
            assert divergence > 0
        for old, new in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)

    def test_without_changes(self, model):
        inputs = zoo.examples(model, 6)
        layers = [record.layer for record in Inventory.of(model).candidates]
        assert Prober(model, layers, [inputs]).divergence({}) == 0

    def test_sees_the_masks_of_the_model(self, keras_module):
        """Attention layers of Keras 3 take masks away, so that later layers do without them."""
        L = keras_module.layers
        inputs = keras_module.Input((6,), dtype="int32")
        x = L.Embedding(20, 8, mask_zero=True)(inputs)
        for width in (4, 3):  # of three readers of a tensor, the last one finds no mask
            x = L.Add()([L.MultiHeadAttention(2, width)(x, x), L.Dense(8, "relu")(x), x])
        x = L.GlobalAveragePooling1D()(L.Dense(8)(x))
        model = keras_module.Model(inputs, L.Dense(3)(x))
        batch = np.where(np.arange(6) < np.arange(2, 7)[:, None], 1 + np.arange(6), 0)
        kernels = {record.layer: values(record.layer) for record in Inventory.of(model).candidates}
        prober = Prober(model, kernels, [batch.astype("int32")])
        for _ in range(2):
            for layer, kernel in kernels.items():
                assert prober.divergence({layer: kernel}) == pytest.approx(0, abs=1e-9), layer.name


def flat_outputs(model, inputs):
    return [np.asarray(output) for output in tf.nest.flatten(model(inputs, training=False))]


def variable(layer):
    return known_kind(layer).variable(layer)


def values(layer):
    return variable(layer).numpy()
