import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_alds.core import slicing

SHAPES = [(12, 5), (3, 12, 5), (3, 2, 12, 5), (2, 1, 3, 12, 5)]


@given(st.integers(1, 5000))
def test_divisors_are_all_of_them_in_order(n):
    assert slicing.divisors(n) == tuple(d for d in range(1, n + 1) if n % d == 0)


@pytest.mark.parametrize("n", [0, -4, 2.5, 12.0, True, "12", [12], None])
def test_divisors_are_of_positive_integers(n):
    assert slicing.divisors(np.int64(12)) == slicing.divisors(12)
    with pytest.raises(ValueError, match="positive integer"):
        slicing.divisors(n)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slices", [1, 2, 3, 12])
def test_unfold_is_channel_major(shape, slices):
    kernel = np.arange(np.prod(shape)).reshape(shape)
    matrices = slicing.unfold(kernel, slices)
    kappa = int(np.prod(shape[:-2]))
    width = 12 // slices
    flat = kernel.reshape(kappa, 12, 5)
    for i in range(slices):
        expected = [
            flat[position, channel]
            for channel in range(i * width, (i + 1) * width)
            for position in range(kappa)
        ]
        np.testing.assert_array_equal(matrices[i], expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_finer_slices_are_blocks_of_rows(shape):
    kernel = np.random.default_rng(0).standard_normal(shape)
    fine = slicing.unfold(kernel, 6)
    np.testing.assert_array_equal(
        slicing.unfold(kernel, 2), fine.reshape(2, 3 * fine.shape[1], shape[-1])
    )


@pytest.mark.parametrize("spatial", [(), (3,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("slices", [1, 2, 4])
def test_encoder_folds_and_unfolds(spatial, slices):
    kappa = int(np.prod(spatial))
    matrices = np.random.default_rng(0).standard_normal((slices, 8 // slices * kappa, 3))
    encoder = slicing.fold_encoder(matrices, spatial)
    assert encoder.shape == (*spatial, 8 // slices, slices * 3)
    # Slice i owns the output channels i·j … i·j+j−1.
    own = encoder[..., 3 * (slices - 1) :].reshape(kappa, 8 // slices, 3)
    np.testing.assert_array_equal(own.transpose(1, 0, 2).reshape(-1, 3), matrices[-1])
    np.testing.assert_array_equal(slicing.unfold_encoder(encoder, slices), matrices)


@pytest.mark.parametrize("spatial", [(), (3,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("slices", [1, 3])
def test_recompose_is_the_product_of_every_slice(spatial, slices):
    rng = np.random.default_rng(0)
    encoder = rng.standard_normal((*spatial, 6 // slices, slices * 2))
    decoder = rng.standard_normal((slices * 2, 5))
    dense = slicing.recompose(encoder, decoder, slices)
    assert dense.shape == (*spatial, 6, 5)
    width = 6 // slices
    for channel in range(6):
        i = channel // width
        expected = encoder[..., channel % width, 2 * i : 2 * i + 2] @ decoder[2 * i : 2 * i + 2]
        np.testing.assert_allclose(dense[..., channel, :], expected, rtol=1e-12)


@given(st.integers(1, 24), st.integers(1, 9), st.integers(1, 20), st.data())
def test_weights_count_what_the_factors_hold(c, kappa, f, data):
    k = data.draw(st.sampled_from(slicing.divisors(c)))
    j = data.draw(st.integers(1, slicing.full_rank((kappa, c, f), k)))
    encoder, decoder = np.zeros((kappa, c // k, k * j)), np.zeros((k * j, f))
    assert slicing.weights((kappa, c, f), k, j) == encoder.size + decoder.size


def test_errors_state_what_was_received():
    with pytest.raises(ValueError, match="Received: n=0"):
        slicing.divisors(0)
    with pytest.raises(ValueError, match=r"divisor of the 4 .* Received: slices=3"):
        slicing.unfold(np.zeros((4, 2)), 3)
    with pytest.raises(ValueError, match=r"Received: kernel_shape=\(3,\)"):
        slicing.kernel_sizes((3,))
    with pytest.raises(ValueError, match="multiple of the 9 spatial positions"):
        slicing.fold_encoder(np.zeros((1, 10, 2)), (3, 3))
    with pytest.raises(ValueError, match="decoder with 6 rows"):
        slicing.recompose(np.zeros((2, 6)), np.zeros((5, 3)), 2)
    with pytest.raises(ValueError, match="Received: slices=4"):
        slicing.unfold_encoder(np.zeros((2, 6)), 4)
