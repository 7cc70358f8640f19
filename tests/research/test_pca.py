"""Principal components of outputs, against plain NumPy on explicit inputs and outputs."""

from __future__ import annotations

import numpy as np
import pytest

from keras_alds.core.calibration.accumulators import MomentAccumulator
from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.calibration.patches import patch_chunks
from keras_alds.core.slicing import recompose, unfold
from keras_alds.research.pca import centred_spectra, factorize_pca

CHANNELS, FILTERS, SIZE = 5, 8, (3, 2)
N = 30


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def problem(rng):
    kernel = rng.standard_normal((*SIZE, CHANNELS, FILTERS))
    x = rng.standard_normal((500, N)) @ rng.standard_normal((N, N)) + rng.standard_normal(N)
    bias = rng.standard_normal(FILTERS)
    return kernel, x, bias, SecondMoment((x.T @ x / 500)[None], 500, x.mean(0))


@pytest.mark.parametrize("rank", [1, 3, 7, 8])
@pytest.mark.parametrize("with_bias", [False, True])
def test_outputs_are_projected_on_their_principal_components(rng, rank, with_bias):
    kernel, x, bias, moment = problem(rng)
    y = x @ unfold(kernel, 1)[0] + bias * with_bias
    mean = y.mean(0)
    _, sigma, V = np.linalg.svd(y - mean, full_matrices=False)
    expected = mean + (y - mean) @ V[:rank].T @ V[:rank]
    encoder, decoder, shift = factorize_pca(kernel, moment, rank, bias if with_bias else None)
    found = x @ unfold(recompose(encoder, decoder, 1), 1)[0] + shift
    np.testing.assert_allclose(found, expected, atol=1e-8 * np.abs(y).max())
    spectra = centred_spectra(kernel, moment)
    assert spectra.energy == pytest.approx(np.square(sigma).sum() / 500)
    lost = np.square(found - y).sum() / np.square(y - mean).sum()
    dropped = spectra.slices[1].residual_energy[rank] / spectra.energy
    assert dropped == pytest.approx(lost, abs=1e-9)
    # Balanced: both factors have the same Gram matrix.
    left = unfold(encoder, 1)[0]
    np.testing.assert_allclose(left.T @ left, decoder @ decoder.T, atol=1e-8)


def test_constant_inputs_leave_only_the_bias(rng):
    kernel, _, bias, _ = problem(rng)
    x = np.full((40, N), 3.0)
    moment = SecondMoment((x.T @ x / 40)[None], 40, x.mean(0))
    assert centred_spectra(kernel, moment).energy == 0
    encoder, decoder, shift = factorize_pca(kernel, moment, 1, bias)
    found = x @ unfold(recompose(encoder, decoder, 1), 1)[0] + shift
    np.testing.assert_allclose(found, x @ unfold(kernel, 1)[0] + bias, atol=1e-8)


def test_the_mean_is_added_up_with_the_second_moment(rng):
    images = rng.standard_normal((6, 9, 8, CHANNELS)).astype("float32") + 1
    accumulator = MomentAccumulator(CHANNELS, 6)
    for part in np.split(images, 3):
        for chunk in patch_chunks(part, SIZE, padding="same"):
            accumulator.add(chunk)
    rows = np.concatenate(list(patch_chunks(images, SIZE, padding="same")))
    expected = rows.mean(axis=0, dtype=np.float64).T.ravel()
    np.testing.assert_allclose(accumulator.moment().mean, expected, rtol=1e-6)


def test_what_is_missing_is_said(rng):
    kernel, _, _, moment = problem(rng)
    without = SecondMoment(moment.blocks, 500)
    blocks = np.stack([moment.blocks[0][i : i + 6, i : i + 6] for i in range(0, N, 6)])
    for bad in (without, SecondMoment(blocks, 500, moment.mean)):
        with pytest.raises(ValueError, match=r"in one block, with the mean.*Received: [15] blocks"):
            factorize_pca(kernel, bad, 1)
    with pytest.raises(ValueError, match=r"mean of 30 unfolded inputs.*mean.shape=\(4,\)"):
        SecondMoment(moment.blocks, 500, np.zeros(4))
    with pytest.raises(ValueError, match=r"rank from 1 to 8.*Received: rank=9"):
        factorize_pca(kernel, moment, 9)
