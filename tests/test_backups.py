"""`BackupAndRestore` beside `ALDSCompress`, in Keras 3 and tf_keras."""

from __future__ import annotations

import functools
import shutil

import numpy as np
import pytest
import zoo
from fitting import EAGER, compiled, fit

from keras_alds import ALDSCompress, CompressionPlan, apply_plan, backups, select


class KilledError(Exception):
    """What stands for the end of a process."""


def run(K, folder, *, first=True, killed_at=None, model=None, **options):
    """Trains for 5 epochs with a backup; returns the model, the callback and the epochs begun."""
    model = compiled(K, K.optimizers.Adam(0.01), **EAGER) if model is None else model
    begun = []

    def begin(epoch, logs):
        if epoch == killed_at:
            raise KilledError
        begun.append(epoch)

    double = {"double_checkpoint": True} if options.pop("double_checkpoint", False) else {}
    compress = ALDSCompress(**{"cr": 0.4, "at_epoch": 2, "verbose": 0, **options})
    callbacks = [compress, K.callbacks.BackupAndRestore(str(folder), **double)]
    callbacks = callbacks if first else callbacks[::-1]
    try:
        fit(model, [*callbacks, K.callbacks.LambdaCallback(on_epoch_begin=begin)], epochs=5)
    except KilledError:
        assert killed_at is not None
    return model, compress, begun


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of a backup of the compressed model and its plan, made once for each Keras."""

    @functools.cache
    def backup(K):
        folder = tmp_path_factory.mktemp("backup")
        _, callback, _ = run(K, folder, killed_at=4)
        return folder, callback.plan

    return backup


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The model of a training that went on to its end, made once for each Keras."""

    @functools.cache
    def whole(K):
        model, _, _ = run(K, tmp_path_factory.mktemp("whole"))
        return model

    return whole


def same(model, other):
    assert int(model.optimizer.iterations) == int(other.optimizer.iterations)
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    return True


def other(K):
    """A model of another structure."""
    layers = [K.layers.Flatten(), K.layers.Dense(24), K.layers.Dense(10)]
    return K.Sequential([K.Input((12, 12, 3)), *layers])


class TestBackups:
    """`BackupAndRestore` in the list; a restart has a new model and new callbacks."""

    @pytest.mark.parametrize("first", [True, False])
    def test_training_goes_on_from_a_backup_after_the_compression(
        self, keras_module, interrupted, uninterrupted, tmp_path, first
    ):
        folder, plan = interrupted(keras_module)
        shutil.copytree(folder, tmp_path / "b")
        model, callback, begun = run(keras_module, tmp_path / "b", first=first)
        assert begun == [4]
        assert callback.plan == plan
        assert same(model, uninterrupted(keras_module))
        assert not [*tmp_path.glob("b/**/*")]  # Keras deletes the backup, and the plan with it

    def test_a_backup_of_the_original_model_makes_a_compressed_one_dense(
        self, keras_module, uninterrupted, tmp_path
    ):
        run(keras_module, tmp_path / "b", killed_at=2)
        model = compiled(keras_module, keras_module.optimizers.Adam(0.01), **EAGER)
        apply_plan(model, select(model, 0.3))
        _, _, begun = run(keras_module, tmp_path / "b", model=model)
        assert begun == [2, 3, 4]
        assert same(model, uninterrupted(keras_module))

    @pytest.mark.parametrize("first", [True, False])
    def test_training_goes_on_from_a_backup_before_the_compression(
        self, keras_module, uninterrupted, tmp_path, first
    ):
        run(keras_module, tmp_path / "b", first=first, killed_at=1)
        model, callback, begun = run(keras_module, tmp_path / "b", first=first)
        assert begun == [1, 2, 3, 4]
        assert model.count_params() == callback.plan.params_after
        whole = uninterrupted(keras_module)
        for a, b in zip(whole.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    def test_the_saved_plan_is_the_remedy(self, keras_module, interrupted, uninterrupted, tmp_path):
        folder, plan = interrupted(keras_module)
        shutil.copytree(folder, tmp_path / "b")
        plan.save(tmp_path / "plan.json")
        model = compiled(keras_module, keras_module.optimizers.Adam(0.01), **EAGER)
        apply_plan(model, CompressionPlan.load(tmp_path / "plan.json"))
        _, _, begun = run(keras_module, tmp_path / "b", model=model)
        assert begun == [4]
        whole = uninterrupted(keras_module)
        assert same(model, whole)

    def test_the_teacher_of_several_steps_comes_back(self, keras_module, tmp_path):
        K = keras_module
        options = {"cr": [0.2, 0.4], "at_epoch": [1, 2], "distill": True}
        whole, _, _ = run(K, tmp_path / "a", **options)
        run(K, tmp_path / "b", killed_at=3, **options)  # with two compressions in the backup
        model, _, begun = run(K, tmp_path / "b", **options)
        assert begun == [3, 4]
        assert same(model, whole)

    @pytest.mark.parametrize(
        "options",
        [
            {"cr": [0.2, 0.4], "at_epoch": [1, 2], "method": "pca"},  # gives layers a bias
            {"cr": {"params": 0.4, "memory": 0.0}},
        ],
        ids=["pca", "memory"],
    )
    def test_with_other_options(self, keras_module, tmp_path, options):
        data = {"calibration_data": zoo.images()[0]} if "method" in options else {}
        options = {**options, **data}
        whole, plan, _ = run(keras_module, tmp_path / "a", **options)
        run(keras_module, tmp_path / "b", killed_at=3, **options)
        model, callback, begun = run(keras_module, tmp_path / "b", **options)
        assert begun == [3, 4]
        assert callback.plan == plan.plan
        assert same(model, whole)

    def test_a_layer_more_is_refused(self, keras_module, interrupted, tmp_path):
        K = keras_module
        shutil.copytree(interrupted(K)[0], tmp_path / "b")
        model = compiled(K, **EAGER)
        scaled = K.layers.LayerNormalization(name="metric_head")(model.outputs[0])
        model = compiled(K, model=K.Model(model.inputs, scaled), **EAGER)
        weights = model.get_weights()
        with pytest.raises(ValueError, match="Expected a plan made for the model"):
            run(K, tmp_path / "b", model=model)
        for a, b in zip(weights, model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_an_interruption_leaves_the_model_dense(
        self, keras_module, interrupted, tmp_path, monkeypatch
    ):
        K, calls = keras_module, []
        shutil.copytree(interrupted(K)[0], tmp_path / "b")
        model = compiled(K, **EAGER)
        weights = model.get_weights()

        def stopped(found, wanted):
            calls.append(wanted)
            if len(calls) == 3:  # the plan is applied
                raise KeyboardInterrupt
            return missing(found, wanted)

        missing = backups._missing
        monkeypatch.setattr(backups, "_missing", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(K, tmp_path / "b", model=model)
        assert calls[2] != calls[1]
        for a, b in zip(weights, model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_a_deleted_folder_is_the_remedy(self, keras_module, interrupted, tmp_path):
        shutil.copytree(interrupted(keras_module)[0], tmp_path / "b")
        shutil.rmtree(tmp_path / "b")
        assert run(keras_module, tmp_path / "b")[2] == [0, 1, 2, 3, 4]

    def test_a_broken_backup_gives_way_to_the_one_before(self, tmp_path):
        K = pytest.importorskip("keras")
        run(K, tmp_path, killed_at=4, double_checkpoint=True)
        (tmp_path / "latest.weights.h5").write_bytes(b"cut off")
        model, callback, begun = run(K, tmp_path)
        assert begun == [3, 4]
        assert model.count_params() == callback.plan.params_after

    def test_what_cannot_be_resumed_is_told_before_the_first_step(
        self, keras_module, interrupted, tmp_path
    ):
        K, folder = keras_module, tmp_path / "b"
        shutil.copytree(interrupted(K)[0], folder)
        (plans,) = folder.glob("**/keras_alds.json")

        def refused(text, model=None):
            model = compiled(K, **EAGER) if model is None else model
            weights = model.get_weights()
            with pytest.raises(ValueError, match=text):
                run(K, folder, model=model)
            for a, b in zip(weights, model.get_weights(), strict=True):
                np.testing.assert_array_equal(a, b)

        refused("Expected a plan made for the model", compiled(K, model=other(K), **EAGER))
        whole = plans.read_text()
        plans.write_text(whole[:1000])
        refused("Expected the plans of version 1 .* Received: .* line 1 column")
        plans.write_text(whole.replace('"version": 1, "stages"', '"version": 0, "stages"'))
        refused("Received: format='keras_alds.backup', version=0")
        plans.unlink()
        refused(r"weights are those of another model, without '.*' of shape \(3, 3, 16, 24\)")
        if K.__name__ == "keras":
            (folder / "latest.weights.h5").write_bytes(b"cut off")
            refused("Expected a complete backup. Received: the incomplete file")
