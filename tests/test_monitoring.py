"""`RankMonitor` and `at_epoch="auto"`, in Keras 3 and tf_keras."""

from __future__ import annotations

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

from keras_alds import ALDSCompress, RankMonitor
from keras_alds.core.ranks import ranks_of
from keras_alds.kinds.base import is_factorized

LAYERS = ["stem", "down", "hidden", "head"]
RANKS = ("stable_rank", "effective_rank", "energy_rank")


def compiled(K, rate=0.01):
    K.utils.set_random_seed(0)
    model = zoo.functional(K)
    loss = K.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(K.optimizers.SGD(rate), loss, run_eagerly=True)
    return model


def fit(model, callbacks, epochs, **options):
    options = {"verbose": 0, "callbacks": callbacks, **options}
    return model.fit(*zoo.images(16), epochs=epochs, **options).history


def matrix_of(layer):
    """The kernel, dense or in two factors, as a matrix; ranks do not depend on the rows' order."""
    kernel = np.asarray(tf.convert_to_tensor(layer.kernel))
    return kernel.reshape(-1, kernel.shape[-1])


def least_weights(layer, error):
    """The weights of the smallest kernel whose error is at most `error`."""
    if is_factorized(layer):
        return np.size(layer.encoder) + np.size(layer.decoder)
    matrix = matrix_of(layer)
    s = np.linalg.svd(matrix, compute_uv=False)
    rank = next(j for j in range(1, s.size + 1) if j == s.size or s[j] <= error * s[0])
    return min(rank * sum(matrix.shape), matrix.size)


def test_numbers_in_a_training_with_a_compression(keras_module, tmp_path):
    model, error = compiled(keras_module), 0.5
    layers = [model.get_layer(name) for name in LAYERS]
    params = model.count_params()
    others = params - sum(matrix_of(layer).size for layer in layers)
    spectra, reachable = [], []

    def look(epoch, logs):
        spectra.append([np.linalg.svd(matrix_of(la), compute_uv=False) for la in layers])
        reachable.append(1 - (others + sum(least_weights(la, error) for la in layers)) / params)

    monitor = RankMonitor(error=error, energy=0.9, log_dir=tmp_path / "ranks")
    alds = ALDSCompress(cr=0.4, at_epoch=2, max_slices=1, verbose=0)
    log = keras_module.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    watch = keras_module.callbacks.LambdaCallback(on_epoch_end=look)
    logs = fit(model, [alds, monitor, log, watch], epochs=3)

    assert 0 < len(alds.plan.factorized) < len(LAYERS)
    expected = [(epoch, name) for epoch in range(3) for name in LAYERS]
    assert [(row["epoch"], row["layer"]) for row in monitor.history] == expected
    for row, values in zip(monitor.history, (s for some in spectra for s in some), strict=True):
        wanted = ranks_of(values, 0.9)
        assert (row["full_rank"], row["energy_rank"]) == (wanted.full, wanted.energy)
        assert row["stable_rank"] == pytest.approx(wanted.stable, rel=1e-4)
        assert row["effective_rank"] == pytest.approx(wanted.effective, rel=1e-3)
        factorized = row["epoch"] == 2 and is_factorized(model.get_layer(row["layer"]))
        assert (row["removable"] is None) == factorized
    assert logs["alds_reachable_cr"] == pytest.approx(reachable)
    assert reachable[0] > 0.01
    for name in RANKS:
        parts = [row[name] / row["full_rank"] for row in monitor.history]
        means = np.reshape(parts, (3, -1)).mean(axis=1)
        np.testing.assert_allclose(logs[f"alds_{name}"], means)
    with open(tmp_path / "log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    np.testing.assert_allclose([float(r["alds_reachable_cr"]) for r in rows], reachable)
    written = b"".join(path.read_bytes() for path in (tmp_path / "ranks").iterdir())
    assert written.count(b"hidden/stable_rank") == 3


def test_epochs_without_a_measurement_table_and_plot(tmp_path):
    model = compiled(keras)
    monitor = RankMonitor(every=3, exclude="head", max_slices=None)
    logs = fit(model, [monitor], epochs=5)
    measured = sorted({row["epoch"] for row in monitor.history})
    assert measured == [0, 3, 4]
    assert {row["layer"] for row in monitor.history} == {"stem", "down", "hidden"}
    first, *middle, last, end = logs["alds_stable_rank"]
    assert middle == [first, first]
    assert len({first, last, end}) == 3
    monitor.to_csv(tmp_path / "ranks.csv")
    with open(tmp_path / "ranks.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["effective_rank"]) for r in rows] == [
        row["effective_rank"] for row in monitor.history
    ]
    pytest.importorskip("matplotlib")
    lines = monitor.plot("stable_rank").lines
    assert [line.get_label() for line in lines] == ["stem", "down", "hidden"]
    assert list(lines[1].get_xdata()) == measured
    parts = [r["stable_rank"] / r["full_rank"] for r in monitor.history if r["layer"] == "down"]
    assert list(lines[1].get_ydata()) == parts
    with pytest.raises(ValueError, match="Did you mean 'stable_rank'"):
        monitor.plot("stable_ranks")


def test_auto_compresses_when_the_ranks_have_settled(keras_module, capsys):
    K = keras_module
    model = compiled(K, rate=0.0)
    down = model.get_layer("down").kernel

    def change(epoch, logs):
        if epoch < 3:  # one filter grows: the rank falls
            values = np.array(tf.convert_to_tensor(down))
            values[..., 0] *= 2
            down.assign(values)

    move = K.callbacks.LambdaCallback(on_epoch_end=change)
    alds = ALDSCompress(cr=0.4, at_epoch="auto")
    with pytest.warns(UserWarning, match="No factor has changed"):
        logs = fit(model, [alds, move], epochs=18)
    # The last change is seen before epoch 3; 5 epochs later nothing has changed.
    assert np.flatnonzero(logs["alds_cr"])[0] == alds.at_epoch == 8
    assert "epoch 8: the ranks of all layers have settled" in capsys.readouterr().out


def test_auto_waits_no_longer_than_half_of_the_epochs(capsys):
    model = compiled(keras)
    alds = ALDSCompress(cr=0.4, at_epoch="auto")
    logs = fit(model, [alds], epochs=5)
    assert np.flatnonzero(logs["alds_cr"])[0] == alds.at_epoch == 2
    assert "epoch 2: the latest epoch; not all ranks have settled" in capsys.readouterr().out
    # A model that is compressed already is trained on.
    fit(model, [ALDSCompress(cr=0.4, at_epoch="auto")], epochs=3)
    assert "have settled" not in capsys.readouterr().out
    # A training that goes on later is compressed before its first epoch.
    model = compiled(keras)
    logs = fit(model, [ALDSCompress(cr=0.4, at_epoch="auto", verbose=0)], epochs=6, initial_epoch=4)
    assert min(logs["alds_cr"]) >= 0.4


def test_what_is_refused():
    for options, message in [
        ({"error": 0}, "Expected `error` of RankMonitor .* Received: error=0"),
        ({"energy": 1}, "Received: energy=1"),
        ({"energy": "all"}, "Received: energy='all'"),
        ({"every": 0}, "Received: every=0"),
        ({"max_slices": 0}, "Received: max_slices=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            RankMonitor(**options)
    for at_epoch in ("Auto", -1, True, None):
        with pytest.raises(ValueError, match="Expected `at_epoch`, the index of an epoch"):
            ALDSCompress(cr=0.4, at_epoch=at_epoch)
    model = compiled(keras)
    before = [np.array(tf.convert_to_tensor(v)) for v in model.weights]
    auto = ALDSCompress(cr=0.4, at_epoch="auto")
    with pytest.raises(ValueError, match=r"at least 2 epochs .* Received: epochs=1"):
        fit(model, [auto], epochs=1)
    for both in ([auto, ALDSCompress(0.6, at_epoch=3)], [ALDSCompress(0.3, at_epoch=1), auto]):
        with pytest.raises(ValueError, match=r"Expected no other ALDSCompress .* cr=0.4"):
            fit(model, both, epochs=4)
    with pytest.raises(ValueError, match="to hold a layer that can be factorized"):
        fit(model, [RankMonitor(exclude=LAYERS)], epochs=1)
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, new)
