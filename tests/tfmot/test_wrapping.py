"""Pruning, clustering and quantization-aware training with TF-MOT, beside compression."""

from __future__ import annotations

import sys

import keras
import numpy as np
import pytest
import zoo

import keras_alds
from keras_alds._backend import wrappers
from keras_alds.kinds.base import is_factorized
from keras_alds.models.inventory import count_params, walk
from keras_alds.tfmot import cluster_weights, prune_low_magnitude

K = pytest.importorskip("tf_keras")
tfmot = pytest.importorskip("tensorflow_model_optimization")
S = tfmot.sparsity.keras


def zeros(variable):
    return float((np.asarray(variable) == 0).mean())


def compiled(model, optimizer=None):
    model.compile(
        optimizer or K.optimizers.SGD(0.01, momentum=0.9),
        K.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def pruned(model, schedule, **options):
    return compiled(S.prune_low_magnitude(model, schedule, **options))


def fit(model, callbacks, epochs, **options):
    x, y = zoo.images()
    options = {"verbose": 0, "batch_size": 32, "shuffle": False, **options}
    return model.fit(x, y, epochs=epochs, callbacks=callbacks, **options)


def factorized(model):
    return [layer for _, layer in walk(model) if is_factorized(layer)]


def factors(model):
    return [factor for layer in factorized(model) for factor in (layer.encoder, layer.decoder)]


@pytest.fixture(scope="module")
def model():
    """Wrapped, and pruned for an epoch."""
    model = pruned(zoo.functional(K), S.ConstantSparsity(0.6, 0, frequency=1))
    fit(model, [S.UpdatePruningStep()], epochs=1)
    return model


@pytest.fixture(scope="module")
def small():
    small = keras_alds.compress(zoo.functional(K), 0.4, method="alds", max_slices=2)
    assert len(factorized(small)) >= 2
    return small


@pytest.fixture(scope="module")
def stock():
    L = K.layers
    model = K.Sequential(
        [
            K.Input(zoo.IMAGE),
            L.Conv2D(16, 3, strides=2, activation="relu", name="conv"),
            L.Conv2D(16, 3, strides=2, name="conv_b"),
            L.BatchNormalization(),
            L.ReLU(),
            L.Flatten(),
            L.Dense(10, name="head"),
        ]
    )
    small = keras_alds.compress(model, 0.3, max_slices=2, exclude="head")
    assert {layer.slices for layer in factorized(small)} >= {2}
    return keras_alds.expand(small)


class TestCompressWhilePruning:
    """`ALDSCompress` in the `fit` in which `UpdatePruningStep` prunes."""

    @pytest.mark.parametrize(
        ("make", "compress_first"), [(zoo.functional, False), (zoo.sequential, True)]
    )
    def test_both_factors_reach_the_final_sparsity(self, make, compress_first, tmp_path):
        model = pruned(make(K), S.PolynomialDecay(0.0, 0.5, 0, 8, frequency=1))
        before, params = wrappers.pruning(model), count_params(model)
        update = S.UpdatePruningStep()
        alds = keras_alds.ALDSCompress(0.3, at_epoch=2, verbose=0)
        summaries = S.PruningSummaries(str(tmp_path), write_graph=False)
        fit(model, [*([alds, update] if compress_first else [update, alds]), summaries], epochs=6)

        assert wrappers.pruning(model) == before == update.prunable_layers
        assert {int(wrapper.pruning_step) for wrapper in before} == {12}
        assert int(model.optimizer.iterations) == 12
        layers = factorized(model)
        assert [layer.name for layer in layers] == [c.layer for c in alds.plan.factorized] != []
        assert count_params(model) == alds.plan.params_after < alds.plan.params_before == params
        stripped = S.strip_pruning(model)
        assert factorized(stripped) == layers
        assert stripped.count_params() == alds.plan.params_after
        for factor in factors(stripped):
            assert abs(zeros(factor) - 0.5) <= 0.01

        x, _ = zoo.images(8)
        expected = model.predict(x, verbose=0)
        for name in ("model.keras", "model.h5", "model"):
            for saved in (model, stripped):
                saved.save(tmp_path / name)
                with S.prune_scope():
                    loaded = K.models.load_model(tmp_path / name, compile=False)
                np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, atol=1e-6)
        names = [mask.name for wrapper in before for _, mask, _ in wrapper.pruning_vars]
        assert len(set(names)) == len(names)  # or summaries and HDF5 files would mix them up

    def test_the_schedule_decides_what_is_masked(self):
        """Nothing before it begins; at once, and for good, after it has ended."""
        never, over = S.ConstantSparsity(0.5, 100), S.PolynomialDecay(0.2, 0.6, 0, 3, frequency=1)
        for schedule, sparsity in ((never, 0.0), (over, 0.6)):
            model = pruned(zoo.sequential(K), schedule)
            fit(model, [S.UpdatePruningStep()], epochs=2)
            keras_alds.apply_plan(model, keras_alds.select(model, 0.3))
            (layer,) = factorized(model)
            (wrapper,) = (w for w in wrappers.pruning(model) if w.layer is layer)
            masks = [np.array(mask) for _, mask, _ in wrapper.pruning_vars]
            for mask, factor in zip(masks, factors(model), strict=True):
                assert abs(zeros(mask) - sparsity) <= 0.01
                assert (np.asarray(factor)[mask == 0] == 0).all()
            fit(model, [S.UpdatePruningStep()], epochs=1)
            for mask, (factor, now, _) in zip(masks, wrapper.pruning_vars, strict=True):
                np.testing.assert_array_equal(mask, now)
                assert (np.asarray(factor)[mask == 0] == 0).all()

    def test_masks_keep_the_largest_weights(self):
        model = pruned(zoo.sequential(K), S.ConstantSparsity(0.75, 0, frequency=1))
        fit(model, [S.UpdatePruningStep()], epochs=1)
        plan = keras_alds.select(model, 0.3)
        unmasked = keras_alds.compress(S.strip_pruning(model), plan=plan)
        keras_alds.apply_plan(model, plan)
        for full, masked in zip(factors(unmasked), factors(model), strict=True):
            full, masked = np.asarray(full), np.asarray(masked)
            kept = masked != 0
            np.testing.assert_array_equal(masked[kept], full[kept])
            assert np.abs(full[kept]).min() >= np.abs(full[~kept]).max()

    def test_two_of_four_zeros_stay(self):
        model = pruned(zoo.sequential(K), S.ConstantSparsity(0.5, 0), sparsity_m_by_n=(2, 4))
        fit(
            model,
            [S.UpdatePruningStep(), keras_alds.ALDSCompress(0.3, at_epoch=1, verbose=0)],
            epochs=2,
        )
        for factor in factors(S.strip_pruning(model)):
            rows = np.asarray(factor).T
            fours = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4))).reshape(-1, 4)
            assert ((fours != 0).sum(1) <= 2).all()

    def test_only_some_layers_are_wrapped(self):
        L = K.layers
        first, second = L.Dense(24, "relu", name="first"), L.Dense(300, name="second")
        wrapper = S.prune_low_magnitude(first, S.ConstantSparsity(0.5, 0, frequency=1))
        model = compiled(K.Sequential([K.Input(zoo.IMAGE), L.Flatten(), wrapper, second]))
        alds = keras_alds.ALDSCompress(0.6, at_epoch=1, verbose=0)
        fit(model, [S.UpdatePruningStep(), alds], epochs=2)
        assert [choice.layer for choice in alds.plan.factorized] == ["first", "second"]
        assert abs(zeros(first.encoder) - 0.5) <= 0.01
        assert zeros(second.encoder) < 0.01

    def test_failure_leaves_the_training_as_it_was(self, monkeypatch):
        model = pruned(zoo.sequential(K), S.ConstantSparsity(0.5, 0, frequency=1))
        fit(model, [S.UpdatePruningStep()], epochs=1)
        plan = keras_alds.select(model, 0.3)

        def state():
            held = [(w, w.layer, w.pruning_obj, *sum(w.pruning_vars, ())) for w in before]
            variables = [*model.variables, *model.optimizer.variables]
            return [id(part) for parts in held for part in parts] + [*map(id, variables)], [
                np.array(variable) for variable in variables
            ]

        before = wrappers.pruning(model)
        objects, values = state()

        def fail(*_):
            raise RuntimeError("while the optimizer is built anew")

        monkeypatch.setattr("keras_alds.models.in_place.carry_optimizers", fail)
        with pytest.raises(RuntimeError, match="anew"):
            fit(
                model,
                [S.UpdatePruningStep(), keras_alds.ALDSCompress(plan=plan, at_epoch=0)],
                epochs=1,
            )
        monkeypatch.undo()
        assert not factorized(model)
        assert state()[0] == objects
        for old, new in zip(values, state()[1], strict=True):
            np.testing.assert_array_equal(old, new)
        fit(
            model,
            [S.UpdatePruningStep(), keras_alds.ALDSCompress(plan=plan, verbose=0, at_epoch=0)],
            epochs=1,
        )
        assert len(factorized(model)) == 1


class TestWrappedModels:
    def test_plan_is_that_of_the_stripped_model(self, model):
        stripped = S.strip_pruning(model)
        stripped.compile(loss=model.loss)  # tells what the outputs are
        x, _ = zoo.images(16)
        for options in ({}, {"objective": "macs"}, {"calibration_data": x}):
            plan = keras_alds.select(model, 0.3, exclude="head", **options)
            assert plan == keras_alds.select(stripped, 0.3, exclude="head", **options)
        assert {choice.layer for choice in plan.choices} == {"stem", "bn", "down", "hidden", "head"}

    def test_spectra_are_those_of_the_masked_kernel(self, model):
        wrapper = next(w for w in wrappers.pruning(model) if w.layer.name == "down")
        expected = keras_alds.select(model, 0.3)
        kernel, mask, _ = wrapper.pruning_vars[0]
        kernel.assign_add(5 * (1 - mask))  # as if a step of training had just moved them
        assert keras_alds.select(model, 0.3) == expected

    def test_compress_makes_a_wrapped_model(self, model):
        small = keras_alds.compress(model, 0.3)
        assert not factorized(model)
        plan = keras_alds.select(model, 0.3)
        assert [layer.name for layer in factorized(small)] == [c.layer for c in plan.factorized]
        assert count_params(small) == plan.params_after < small.count_params()
        for factor in factors(small):
            assert abs(zeros(factor) - 0.6) <= 0.01

    def test_expand_names_the_remedy(self, model):
        with pytest.raises(ValueError, match=r"of type PruneLowMagnitude\. Remedy: `strip_pruning"):
            keras_alds.expand(keras_alds.compress(model, 0.3))

    def test_clustered_and_quantized_layers_are_refused(self):
        clustered = cluster_weights(zoo.functional(K), 8)
        with pytest.raises(ValueError, match=r"'cluster_stem' and .* ClusterWeights; strip the"):
            keras_alds.select(clustered, 0.3)
        quantized = tfmot.quantization.keras.quantize_model(zoo.sequential(K))
        with pytest.raises(ValueError, match=r"QuantizeWrapper.*; compress and `expand` the model"):
            keras_alds.select(quantized, 0.3)


class TestHelpers:
    """`prune_low_magnitude` and `cluster_weights`, on factors and after `expand`."""

    @pytest.mark.parametrize("expanded", [False, True])
    def test_prune_the_factors(self, small, expanded):
        model = keras_alds.expand(small) if expanded else small
        before = model.get_weights()
        schedule = S.ConstantSparsity(0.75, 0, frequency=1)
        training = compiled(prune_low_magnitude(model, schedule, exclude="head(_encoder)?"))
        fit(training, [S.UpdatePruningStep()], epochs=1)
        for old, new in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
        stripped = S.strip_pruning(training)
        assert [layer.name for layer in stripped.layers] == [layer.name for layer in model.layers]
        for layer in stripped.layers:
            for weight in layer.weights:
                if len(weight.shape) > 1:
                    expected = 0.0 if layer.name.startswith("head") else 0.75
                    assert abs(zeros(weight) - expected) <= 0.01

    def test_the_toolkit_wraps_factorized_layers_by_itself(self, small):
        wrapped = S.prune_low_magnitude(keras_alds.compress(zoo.functional(K), 0.4))
        for wrapper in wrappers.pruning(wrapped):
            if is_factorized(wrapper.layer):
                weights = [weight for weight, _, _ in wrapper.pruning_vars]
                assert weights == [wrapper.layer.encoder, wrapper.layer.decoder]

    @pytest.mark.parametrize("expanded", [False, True])
    def test_cluster_the_factors(self, small, expanded):
        model = keras_alds.expand(small) if expanded else small
        before = model.get_weights()
        training = compiled(cluster_weights(model, 6))
        fit(training, [], epochs=1)
        for old, new in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
        stripped = tfmot.clustering.keras.strip_clustering(training)
        x, _ = zoo.images(8)
        np.testing.assert_allclose(
            stripped.predict(x, verbose=0), training.predict(x, verbose=0), atol=1e-6
        )
        kernels = [weight for weight in stripped.weights if len(weight.shape) > 1]
        assert len(kernels) >= 6
        counts = [len(np.unique(weight)) for weight in kernels]
        assert max(counts) == 6
        assert min(counts) > 1  # training may leave a centroid without weights

    def test_says_what_is_left(self):
        L = K.layers
        model = K.Sequential(
            [
                K.Input((8, 8, 4)),
                L.Resizing(6, 6),  # which TF-MOT's own function refuses
                L.DepthwiseConv2D(3, name="depthwise"),
                L.Conv2D(2, 1, name="few"),
                L.Flatten(),
                L.Dense(10, name="head"),
            ]
        )
        with pytest.raises(ValueError, match="supported layer"):
            S.prune_low_magnitude(model)
        with pytest.warns(UserWarning, match=r"skips these .*: 'depthwise' \(DepthwiseConv2D\)\."):
            wrapped = prune_low_magnitude(model)
        assert [wrapper.layer.name for wrapper in wrappers.pruning(wrapped)] == ["few", "head"]
        with pytest.warns(UserWarning, match=r"'depthwise' \(D.*\), 'few' \(Conv2D\)\. It does"):
            cluster_weights(model, 16)

    def test_wrong_options(self):
        with pytest.raises(ValueError, match="Expected `pruning_schedule` to be a `PruningSched"):
            prune_low_magnitude(zoo.sequential(K), 0.5)
        for number in (1, 2.5, "8"):
            with pytest.raises(ValueError, match="Expected `number_of_clusters` to be an integer"):
                cluster_weights(zoo.sequential(K), number)

    @pytest.mark.parametrize("quantize", [None, "dynamic", "int8"])
    def test_no_file_of_a_wrapped_model(self, quantize):
        quantization = tfmot.quantization.keras
        model = zoo.sequential(K)
        for wrapped, remedy in (
            (prune_low_magnitude(model), r"strip_pruning\(model\)"),
            (cluster_weights(model, 2), r"strip_clustering\(model\)"),
            (quantization.quantize_annotate_model(model), r"quantize_apply\(model\)"),
        ):
            with pytest.raises(ValueError, match=f"for `litert.convert`.*Remedy: `{remedy}`"):
                keras_alds.litert.convert(wrapped, quantize=quantize, verbose=0)

    @pytest.mark.filterwarnings("ignore:`exclude` entry")
    @pytest.mark.parametrize("wrap", [prune_low_magnitude, cluster_weights])
    def test_errors_name_the_remedy(self, wrap, monkeypatch):
        options = (8,) if wrap is cluster_weights else ()
        with pytest.raises(ValueError, match=r"of Keras 3\. Remedy: keras_alds\.to_tf_keras"):
            wrap(zoo.sequential(keras), *options)
        with pytest.raises(ValueError, match="Functional or Sequential"):
            wrap(zoo.subclassed(K), *options)
        with pytest.raises(ValueError, match="Remedy: `strip_pruning"):
            wrap(S.prune_low_magnitude(zoo.sequential(K)), *options)
        with pytest.raises(ValueError, match=r"outside of `exclude`\. Received: none"):
            wrap(zoo.sequential(K), *options, exclude=".*")
        monkeypatch.setitem(sys.modules, "tensorflow_model_optimization", None)
        with pytest.raises(ImportError, match=r'pip install "keras_alds\[tfmot\]"'):
            wrap(zoo.sequential(K), *options)


@pytest.mark.slow
class TestQuantizationAwareTraining:
    """What was pruned or clustered still is, after QAT and in the int8 file."""

    def quantized(self, model, scheme):
        """Trained with a scheme of TF-MOT's, and the kernels of its int8 file by channel."""
        Q = tfmot.quantization.keras
        training = compiled(Q.quantize_apply(Q.quantize_annotate_model(model), scheme))
        fit(training, [], epochs=1)
        content = keras_alds.litert.convert(training, quantize="int8", verbose=0)
        file = keras_alds.litert.read_file(content)
        kernels = [operator.weights for operator in file.operators if operator.weighted]
        values = [file.values(kernel) for kernel in kernels]
        assert {value.dtype for value in values} == {np.dtype("int8")}
        return [value.reshape(len(value), -1) for value in values]

    def test_sparsity(self, stock):
        training = compiled(prune_low_magnitude(stock, S.ConstantSparsity(0.5, 0, frequency=1)))
        fit(training, [S.UpdatePruningStep()], epochs=1)
        scheme = tfmot.experimental.combine.Default8BitPrunePreserveQuantizeScheme()
        kernels = self.quantized(S.strip_pruning(training), scheme)
        assert len(kernels) == 4
        for kernel in kernels:
            assert 0.49 <= zeros(kernel) <= 0.56  # some small weights are rounded to zero

    def test_clusters(self, stock):
        training = compiled(cluster_weights(stock, 5))
        fit(training, [], epochs=1)
        scheme = tfmot.experimental.combine.Default8BitClusterPreserveQuantizeScheme(False)
        kernels = self.quantized(tfmot.clustering.keras.strip_clustering(training), scheme)
        assert len(kernels) == 4
        for kernel in kernels:
            assert 1 < max(len(np.unique(channel)) for channel in kernel) <= 5
