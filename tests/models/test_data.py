"""Nets with wide layers and large images: bounded memory changes no result."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf

import keras_alds
from keras_alds.core.calibration.moments import FewInputs
from keras_alds.models import choices
from keras_alds.models.calibration import CalibrationStats
from keras_alds.models.data import Examples, is_iterator


@pytest.fixture
def model():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(24, activation="relu"), keras.layers.Dense(8)]
    return keras.Sequential([keras.Input((1024,)), *layers])


@pytest.fixture
def x():
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((40, 1024)) @ rng.standard_normal((1024, 1024)) / 32
    return mixed.astype("float32")


def test_few_inputs_are_kept_and_saved(model, x, tmp_path):
    stats = CalibrationStats.collect(model, x, verbose=0)
    few, usual = stats.moments.values()
    assert isinstance(few, FewInputs)
    assert not isinstance(usual, FewInputs)
    held_out = few.rows[-few.held_out.count :]  # the last ones
    assert 0 < len(held_out) < len(x)
    np.testing.assert_array_equal(np.unique(few.rows, axis=0), np.unique(x, axis=0))
    stats.save(tmp_path / "stats.npz")
    assert (tmp_path / "stats.npz").stat().st_size < 2 * x.nbytes
    loaded = CalibrationStats.load(tmp_path / "stats.npz")
    plans = [keras_alds.select(model, 0.5, calibration_data=s) for s in (stats, loaded)]
    assert plans[0] == plans[1]


def test_a_layer_that_few_inputs_were_seen_of_keeps_its_outputs(model, x):
    """What 40 inputs show still counts most."""
    small = keras_alds.compress(model, 0.3, calibration_data=x, target="size")
    expected = model.predict(x, verbose=0)
    lost = np.square(small.predict(x, verbose=0) - expected).sum() / np.square(expected).sum()
    assert lost < 0.1


def test_kernels_that_are_decomposed_in_turn_give_the_same_plan(model, x, monkeypatch):
    plan = keras_alds.select(model, 0.5, calibration_data=x)
    monkeypatch.setattr(choices, "KERNELS_AT_ONCE", 0)
    assert keras_alds.select(model, 0.5, calibration_data=x) == plan


def test_large_images_go_in_small_batches():
    net = keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(2, 1)])
    sizes = {32: 32, 256: 8, 512: 2}
    for side, count in sizes.items():
        images = np.zeros((max(count + 1, 9), side, side, 3), "float32")
        found = [n for _, n in Examples(net, images, None)]
        assert found == [count] * (len(images) // count) + [1]


def batches(net, data):
    return [batch for batch, _ in Examples(net, data, None)]


def sparse_net(K):
    return K.Sequential([K.Input((30,), sparse=True), K.layers.Dense(2)])


SPARSE = {
    "SparseTensor": tf.sparse.from_dense,
    "with labels": lambda x: (tf.sparse.from_dense(x), np.zeros(len(x))),
    "Dataset": lambda x: tf.data.Dataset.from_tensor_slices(tf.sparse.from_dense(x)).batch(7),
    "batches": lambda x: [tf.sparse.from_dense(x[:9]), scipy.sparse.csr_array(x[9:])],
    "csr_matrix": scipy.sparse.csr_matrix,
    "coo_array": scipy.sparse.coo_array,
    "dense": lambda x: x,
}


@pytest.mark.parametrize("given", SPARSE)
def test_sparse_data(keras_module, given):
    x = np.random.default_rng(0).random((40, 30)).astype("float32")
    x[x < 0.9] = 0
    net = sparse_net(keras_module)
    found = batches(net, SPARSE[given](x))
    assert all(isinstance(batch, tf.SparseTensor) for batch in found)
    np.testing.assert_array_equal(np.concatenate([tf.sparse.to_dense(b) for b in found]), x)
    plain = keras_module.Sequential([keras_module.Input((30,)), keras_module.layers.Dense(2)])
    np.testing.assert_array_equal(np.concatenate(batches(plain, SPARSE[given](x))), x)


@pytest.mark.parametrize("given", ["tensor", "Dataset", "batches"])
def test_ragged_data(keras_module, given):
    K = keras_module
    rows = np.random.default_rng(0).standard_normal((40, 3)).astype("float32")
    ragged = tf.RaggedTensor.from_row_lengths(rows, [1, 4, 0, 3, 2] * 4)
    data = {
        "tensor": ragged,
        "Dataset": tf.data.Dataset.from_tensor_slices(ragged).batch(3),
        "batches": [ragged[:7], ragged[7:]],
    }[given]
    inputs = K.Input((None, 3), ragged=True)
    lengths = K.layers.Lambda(lambda x: x.row_lengths(), output_shape=())(inputs)
    (found,) = batches(K.Model(inputs, lengths), data)
    assert found.to_list() == ragged.to_list()
    limited = Examples(K.Model(inputs, lengths), data, 8)
    assert sum(count for _, count in limited) == 8
    padded = K.Sequential([K.Input((None, 3)), K.layers.Dense(2)])  # as Keras 3 does
    np.testing.assert_array_equal(batches(padded, ragged)[0], ragged.to_tensor())


@pytest.mark.parametrize("inputs", ["dict", "list", "one"])
def test_dicts_may_hold_more_than_the_inputs(keras_module, inputs):
    K = keras_module
    a, b = K.Input((4,), name="a"), K.Input((3,), name="b")
    both = K.layers.Concatenate()([a, b])
    net = {"dict": K.Model({"a": a, "b": b}, both), "list": K.Model([a, b], both)}.get(
        inputs, K.Model(a, K.layers.Dense(2)(a))
    )
    x = {"a": np.ones((9, 4)), "b": np.zeros((9, 3)), "id": np.array(["no number"] * 9)}
    for data in (x, (x, np.zeros(9)), tf.data.Dataset.from_tensor_slices(x).batch(9)):
        (found,) = batches(net, data)
        used = [tensor.shape for tensor in tf.nest.flatten(found)]
        assert used == ([(9, 4)] if inputs == "one" else [(9, 4), (9, 3)])
    if inputs != "one":
        with pytest.raises(ValueError, match=r"for 2 inputs\. Received: 1, \['a'\]"):
            batches(net, {"a": x["a"]})


def test_examples_of_several_lengths_in_a_list_are_refused(keras_module):
    K = keras_module
    net = K.Sequential([K.Input((None, 3)), K.layers.Dense(2)])
    with pytest.raises(ValueError, match="Expected `calibration_data` of one shape"):
        batches(net, [np.zeros((length, 3)) for length in (2, 3, 2, 3, 2, 3, 2, 3)])


def test_batches_without_examples_are_passed_over(keras_module):
    K = keras_module
    net = K.Sequential([K.Input((3,)), K.layers.Dense(2)])
    empty, full = np.zeros((0, 3)), np.ones((9, 3))
    (found,) = batches(net, [empty, full, empty])
    np.testing.assert_array_equal(found, full)
    with pytest.raises(ValueError, match="at least 8 examples"):
        batches(net, [empty, empty])


RANKS = {  # the shape of an input and of examples that fit it, in Keras too
    "an axis for the channel": ((6, 6, 1), (20, 6, 6)),
    "any size": ((None, None, 1), (20, 6, 6)),
    "an axis too many": ((6, 6), (20, 6, 6, 1)),
    "a column": ((1,), (20,)),
    "numbers": ((), (20, 1)),
}
GIVEN = {
    "array": lambda x: x,
    "labelled": lambda x: (x, np.zeros(len(x))),
    "list": lambda x: [x],
    "batches": lambda x: [x[:9], x[9:]],
    "examples": list,
    "Dataset": lambda x: tf.data.Dataset.from_tensor_slices(x).batch(7),
}


def flat_net(K, shape):
    inputs = K.Input(shape)
    return K.Model(inputs, K.layers.Reshape((-1,))(inputs) if shape else inputs)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("shapes", RANKS)
def test_a_last_axis_of_size_1_may_be_missing_or_added(keras_module, shapes, given):
    shape, of_data = RANKS[shapes]
    x = np.random.default_rng(0).random(of_data).astype("float32")
    net = flat_net(keras_module, shape)
    assert len(net.predict(x, verbose=0)) == len(x)
    found = np.concatenate(batches(net, GIVEN[given](x)))
    assert len(found.shape) == len(shape) + 1
    np.testing.assert_array_equal(found.ravel(), x.ravel())


def test_columns_by_name_and_in_order(keras_module):
    K = keras_module
    user, item = K.Input((1,), name="user"), K.Input([1], name="item")
    net = K.Model([user, item], K.layers.Concatenate()([user, item]))
    columns = [np.arange(16.0), np.arange(16.0) + 1]
    for data in (columns, tuple(columns), dict(zip(("user", "item"), columns, strict=True))):
        (found,) = batches(net, data)
        shapes = [tensor.shape for tensor in tf.nest.flatten(found)]
        assert shapes == [(16, 1), (16, 1)]


@pytest.mark.parametrize(
    ("wanted", "shape", "single"),
    [
        ((6, 6, 3), (6, 6, 3), True),
        ((6, 6, 1), (6, 6, 1), True),
        ((6, 6, 1), (6, 6), True),
        ((6, 6, 3), (20, 6, 6), False),
        ((6, 6, 1), (20, 5, 5), False),
        ((6, 1), (20, 5), False),
        ((None, 1), (500, 1), True),
        ((None, None, 1), (28, 28, 1), True),
    ],
)
def test_only_one_example_is_called_one(keras_module, wanted, shape, single):
    with pytest.raises(ValueError, match="Expected batches") as error:
        batches(flat_net(keras_module, wanted), np.zeros(shape))
    assert str(error.value).endswith("a single example: batch the data") == single


def test_a_model_with_its_own_call_gets_the_rank_that_it_is_given(keras_module):
    class Own(keras_module.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras_module.layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    net = Own()
    net(np.zeros((9, 6, 6, 1), "float32"))
    with pytest.raises(ValueError, match=r"Received: shape=\(20, 6, 6\)$"):
        batches(net, np.zeros((20, 6, 6)))


def test_what_is_read_by_index_is_no_iterator():
    class Sequence:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return np.ones((9, 3))

    class Flow(Sequence):  # as of `ImageDataGenerator`, it never ends as an iterator
        def __iter__(self):
            return self

        def __next__(self):
            return self[0]

    x = np.ones((9, 3))
    given = [x, [x], Sequence(), Flow(), tf.data.Dataset.from_tensors(x), iter([x]), (x for _ in x)]
    assert [is_iterator(data) for data in given] == [False] * 5 + [True] * 2
