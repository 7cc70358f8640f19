"""What `ALDSCompress` writes for TensorBoard, read back from the event files."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

import keras_alds
from keras_alds import ALDSCompress, boards
from keras_alds._backend import summaries

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
OPTIONS = {
    **{"method": "energy", "target": "size", "max_slices": 1, "schemes": 0, "verbose": 0},
    "bounds": {"hidden": (0.2, None)},
}


def read(folder):
    """`{tag: {step: value}}` of a run, in which no step may have two values."""
    found = accumulators.EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    events = {tag: found.Tensors(tag) for tag in found.Tags()["tensors"]}
    for some in events.values():
        steps = [event.step for event in some]
        assert len(set(steps)) == len(steps)
    return {
        tag: {event.step: tf.make_ndarray(event.tensor_proto) for event in some}
        for tag, some in events.items()
    }


def fit(K, model, callbacks, epochs):
    loss = K.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(K.optimizers.SGD(0.01), loss, run_eagerly=True)
    x, y = zoo.images(16)
    model.fit(x, y, epochs=epochs, verbose=0, callbacks=callbacks)


def test_each_folder_has_its_run(tmp_path):
    first = ALDSCompress(0.3, at_epoch=0, **OPTIONS, log_dir=tmp_path / "a")
    second = ALDSCompress(0.5, at_epoch=1, **OPTIONS, log_dir=tmp_path / "b")
    fit(keras, zoo.functional(keras), [first, second], epochs=2)
    assert [*read(tmp_path / "a" / "alds")["plan"]] == [0]
    assert [*read(tmp_path / "b" / "alds")["plan"]] == [1]


@pytest.mark.both
def test_a_training_beside_a_tensorboard_callback(keras_module, tmp_path):
    K, model = keras_module, zoo.functional(keras_module)
    board = K.callbacks.TensorBoard(str(tmp_path), write_graph=False)
    steps = {1: 0.3, 3: 0.5}
    if K is keras:
        compress = [ALDSCompress([*steps.values()], at_epoch=[*steps], **OPTIONS)]
    else:  # two callbacks share a run
        compress = [ALDSCompress(cr, at_epoch=epoch, **OPTIONS) for epoch, cr in steps.items()]
    macs, largest = [], []

    def look(epoch, logs):
        macs.append(keras_alds.count_macs(model))
        kernel = np.asarray(tf.convert_to_tensor(model.get_layer("hidden").kernel))
        largest.append(np.linalg.svd(kernel, compute_uv=False)[0])

    watch = K.callbacks.LambdaCallback(on_epoch_end=look)
    fit(K, model, [*compress, board, watch], epochs=4)
    values = read(tmp_path / "alds")
    logs = model.history.history
    assert [*values["model/cr"]] == [0, 1, 2, 3]
    assert [float(v) for v in values["model/cr"].values()] == pytest.approx(logs["alds_cr"])
    assert [int(v) for v in values["model/parameters"].values()] == logs["alds_params"]
    assert [int(v) for v in values["model/MACs"].values()] == macs

    plan = compress[-1].plan
    assert {"down", "hidden"} <= {choice.layer for choice in plan.factorized}
    for choice in plan.factorized:
        assert int(values[f"rank/{choice.layer}"][3]) == choice.rank
        assert float(values[f"error/{choice.layer}"][3]) == pytest.approx(choice.error)
        assert min(values[f"rank/{choice.layer}"]) == 1  # there is none before the compression

    assert [*values["plan"]] == [*steps]
    lines = values["plan"][3].item().decode().splitlines()
    cells = [line.split("|") for line in lines if line.startswith("| hidden (Dense)")]
    (rank,) = [choice.rank for choice in plan.factorized if choice.layer == "hidden"]
    assert [row[-4].strip() for row in cells] == [str(rank)]
    head = next(index for index, line in enumerate(lines) if line.startswith("| Layer"))
    assert (lines[head - 1], set(lines[head + 1])) == ("", set("| -:"))

    for name in ("stem", "down", "hidden", "head"):
        assert [*values[f"singular_values/{name}"]] == [1, 3, 4]
    for step, bins in values["singular_values/hidden"].items():
        _, right, number = bins.T
        assert number.sum() == 24
        assert right.max() == pytest.approx(largest[step - 1], rel=1e-3)


def test_a_folder_of_its_own_for_a_submodel(keras_module, tmp_path):
    K, model = keras_module, zoo.functional(keras_module)
    outer = K.Sequential([K.Input(zoo.IMAGE), model])
    compress = ALDSCompress(0.3, at_epoch=0, submodel=model, log_dir=tmp_path, **OPTIONS)
    fit(K, outer, [compress], epochs=1)
    assert [run.name for run in tmp_path.iterdir()] == ["alds"]
    assert int(read(tmp_path / "alds")["model/parameters"][0]) == model.count_params()


def test_weights_that_are_lost_end_no_training(tmp_path):
    model = zoo.functional(keras)
    kernel = model.get_layer("stem").kernel
    kernel.assign(np.full(kernel.shape, np.nan, "float32"))
    board = boards.Board(tmp_path, model)
    board.add_epoch(5, 0.0, None)
    board.close()
    board.close()
    assert [*read(tmp_path)] == ["model/cr", "model/parameters", "model/MACs"]


def test_nothing_is_written_unless_asked(tmp_path, monkeypatch):
    model = zoo.functional(keras)
    monkeypatch.chdir(tmp_path)
    fit(keras, model, [ALDSCompress(0.3, at_epoch=0, **OPTIONS)], epochs=1)
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(summaries.importlib.util, "find_spec", lambda name: None)
    found = boards.Board.of(None, [keras.callbacks.TensorBoard("logs")], model, model, "")
    assert found is None
    with pytest.raises(ImportError, match=r"tensorboard is needed for `log_dir`"):
        fit(keras, model, [ALDSCompress(0.4, at_epoch=0, log_dir="logs", **OPTIONS)], epochs=1)
