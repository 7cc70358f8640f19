"""Examples in random minibatches, and images shifted and flipped."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf

from keras_alds.models.data import examples_at_once
from keras_alds.models.minibatches import (
    MOST_HELD_OUT,
    Split,
    flipped,
    image_axes,
    shifted,
)


def batches(count, size=32, width=2):
    rows = np.arange(count, dtype="float32")[:, None] * np.ones((1, width), "float32")
    return [
        (tf.constant(rows[i : i + size]), len(rows[i : i + size])) for i in range(0, count, size)
    ]


def held_of(split):
    return np.concatenate([np.asarray(batch)[:, 0] for batch in split.held])


@pytest.mark.parametrize(("count", "held"), [(8, 2), (100, 25), (512, 128), (2000, 125)])
def test_a_part_is_held_out_and_the_rest_comes_once_in_a_round(count, held):
    split = Split(batches(count), count, by_batch=False)
    out = held_of(split)
    assert len(out) == held <= MOST_HELD_OUT
    assert split.trained == count - held
    drawn, seen = split.drawn(np.random.default_rng(0), 16), []
    while len(seen) < split.trained:
        for batch, size in next(drawn):
            assert size == len(batch)
            seen += np.asarray(batch)[:, 0].tolist()
    round_ = seen[: split.trained]
    assert sorted([*round_, *out]) == list(range(count))
    assert round_ != sorted(round_)


def test_whole_batches_are_held_out():
    split = Split(batches(40, 4), 40, by_batch=True)
    assert len(held_of(split)) == 12
    for parts in itertools.islice(split.drawn(np.random.default_rng(0), 10), 5):
        assert [size for _, size in parts] == [4, 4, 4]
    with pytest.raises(ValueError, match="at least two batches"):
        Split(batches(16, 16), 16, by_batch=True)


def test_minibatches_of_large_examples_come_in_parts():
    assert examples_at_once(tf.zeros((1, 32, 32, 3))) == 512
    assert examples_at_once(tf.zeros((1, 224, 224, 3))) == 8
    assert examples_at_once(tf.zeros((1, 4000, 4000, 3))) == 1
    split = Split(batches(64, width=1 << 16), 64, by_batch=False)
    parts = next(split.drawn(np.random.default_rng(0), 64))
    assert [size for _, size in parts] == [32, 16]


def test_shifts_continue_the_image_mirrored():
    x = tf.constant(np.arange(16.0, dtype="float32").reshape(1, 16, 1, 1) * np.ones((64, 1, 16, 1)))
    found = np.asarray(shifted(x, np.random.default_rng(0)))
    assert found.dtype == np.float64
    columns = {tuple(image[:, 0, 0]) for image in found}
    row = np.arange(16)
    assert columns == {
        tuple(map(float, 15 - np.abs(15 - np.abs(row + by)))) for by in (-2, -1, 0, 1, 2)
    }


def test_flips():
    x = tf.constant(np.random.default_rng(0).normal(size=(32, 8, 8, 3)))
    np.testing.assert_array_equal(flipped(x), np.asarray(x)[:, :, ::-1])
    some = np.asarray(flipped(x, np.random.default_rng(0)))
    same = [np.array_equal(a, b) for a, b in zip(some, np.asarray(x), strict=True)]
    turned = [np.array_equal(a[:, ::-1], b) for a, b in zip(some, np.asarray(x), strict=True)]
    assert all(np.logical_xor(same, turned))
    assert 5 < sum(same) < 27


@pytest.mark.parametrize(
    ("shapes", "axes"),
    [
        ([(4, 32, 32, 3)], (1, 2)),
        ([(4, 3, 32, 32)], (2, 3)),
        ([(4, 32, 32, 3), (4, 7)], (1, 2)),  # beside other inputs
        ([(4, 32, 32, 3), (4, 32, 32, 3)], None),  # which of them goes with the other?
        ([(4, 32, 32, 16)], None),
        ([(4, 6, 32, 3)], None),
        ([(4, 32, 3)], None),
    ],
)
def test_what_counts_as_an_image(shapes, axes):
    assert image_axes([tf.zeros(shape) for shape in shapes]) == axes
