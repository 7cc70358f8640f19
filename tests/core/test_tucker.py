"""Tucker-2 against plain NumPy on explicit inputs and outputs, and against TensorLy."""

from __future__ import annotations

import numpy as np
import pytest

from keras_alds.core.calibration.moments import FewInputs, SecondMoment
from keras_alds.core.chains import TUCKER, chain_kernel, chain_ranks, form_weights
from keras_alds.core.slicing import unfold
from keras_alds.core.tucker import tucker, tucker_spectra

CHANNELS, FILTERS, SIZE = 5, 7, (3, 2)
N = CHANNELS * 6


@pytest.fixture
def kernel():
    return np.random.default_rng(0).standard_normal((*SIZE, CHANNELS, FILTERS))


def inputs():
    rng = np.random.default_rng(1)
    return rng.standard_normal((500, N)) @ rng.standard_normal((N, N))


def moment_of(x):
    return SecondMoment((x.T @ x / len(x))[None], len(x))


def error_of(kernel, parts, x=None):
    """The squared error of the kernel, or of its outputs; relative."""
    rest = unfold(kernel - chain_kernel(parts, TUCKER), 1)[0]
    whole = unfold(kernel, 1)[0]
    if x is not None:
        rest, whole = x @ rest, x @ whole
    return np.square(rest).sum() / np.square(whole).sum()


@pytest.mark.parametrize("x", [None, inputs()], ids=["weights", "data"])
def test_the_errors_of_all_ranks_are_those_of_the_arrays(kernel, x):
    moment = None if x is None else moment_of(x)
    if moment is not None:  # ρI counts like as many more inputs
        x = np.concatenate([x, np.sqrt(moment.ridge * len(x)) * np.eye(N)])
    spectra = tucker_spectra(kernel, moment)
    assert spectra.slices.keys() == {*chain_ranks(kernel.shape, TUCKER), CHANNELS}
    for p, curve in spectra.slices.items():
        assert curve.rank == min(FILTERS, 6 * p)
        for j in range(1, curve.rank + 1):
            parts = tucker(kernel, moment, p, j, rounds=0)
            assert [part.shape for part in parts] == [(5, p), (*SIZE, p, j), (j, 7)]
            assert sum(part.size for part in parts) == form_weights(kernel.shape, p, j, TUCKER)
            expected = error_of(kernel, parts, x)
            found = curve.residual_energy[j] / spectra.energy
            assert found == pytest.approx(expected, abs=1e-6)
            better = error_of(kernel, tucker(kernel, moment, p, j), x)
            assert better <= expected + 1e-9


@pytest.mark.parametrize("channels", [96, 160, 192, 300])
def test_spectra_have_the_ranks_of_every_multiple(channels):
    shape = 3, 3, channels, channels
    known = chain_ranks(shape, TUCKER)
    assert len(known) <= 64
    for multiple in (2, 3, 4, 8):
        assert chain_ranks(shape, TUCKER, multiple).keys() <= known.keys()


def test_core_and_outputs_are_the_best_for_the_first_factor(kernel):
    """Against the rank-reduced regression of the outputs on what the first factor leaves."""
    x = inputs()
    encoder, core, decoder = tucker(kernel, moment_of(x), 2, 3)
    y = x @ unfold(kernel, 1)[0]
    seen = np.einsum("nck,cp->npk", x.reshape(len(x), CHANNELS, 6), encoder).reshape(len(x), -1)
    fitted = seen @ np.linalg.lstsq(seen, y, rcond=None)[0]
    left, values, right = np.linalg.svd(fitted, full_matrices=False)
    best = np.square(y - (left[:, :3] * values[:3]) @ right[:3]).sum()
    rest = x @ unfold(kernel - chain_kernel((encoder, core, decoder), TUCKER), 1)[0]
    assert np.square(rest).sum() == pytest.approx(best, rel=1e-6)


def test_rounds_reach_what_tensorly_finds(kernel):
    decomposition = pytest.importorskip("tensorly.decomposition")
    for p, j in ((1, 2), (3, 4)):
        _, errors = decomposition.partial_tucker(
            kernel, rank=[p, j], modes=[2, 3], init="svd", n_iter_max=200, tol=1e-10
        )
        found = error_of(kernel, tucker(kernel, None, p, j, rounds=30))
        assert found == pytest.approx(float(errors[-1]) ** 2, rel=1e-3)
        assert error_of(kernel, tucker(kernel, None, p, j)) <= 1.02 * float(errors[-1]) ** 2


def test_inputs_that_determine_little(kernel):
    """Few inputs, inputs in several blocks, and inputs that are all zero."""
    x = inputs()
    few = FewInputs(x[:10], 1)
    assert error_of(kernel, tucker(kernel, few, CHANNELS, FILTERS)) < 1e-9
    kept = error_of(kernel, tucker(kernel, few, 2, 3), x[:10])
    assert kept < error_of(kernel, tucker(kernel, None, 2, 3), x[:10])
    moment = moment_of(x).blocks[0]
    blocks = SecondMoment(np.stack([np.eye(6) * moment.trace() / N] * CHANNELS), 500)
    np.testing.assert_allclose(
        tucker_spectra(kernel, blocks).slices[2].residual_energy / blocks.blocks[0][0, 0],
        tucker_spectra(kernel).slices[2].residual_energy,
        rtol=1e-3,
    )
    nothing = SecondMoment(np.zeros((1, N, N)), 10)
    expected = error_of(kernel, tucker(kernel, None, 2, 3))
    assert error_of(kernel, tucker(kernel, nothing, 2, 3)) == pytest.approx(expected)


@pytest.mark.parametrize(("p", "j"), [(0, 1), (6, 1), (1, 7), (2, 0)])
def test_ranks_out_of_range(kernel, p, j):
    with pytest.raises(ValueError, match=f"from 1 to 5 .* Received: input_rank={p}, rank={j}"):
        tucker(kernel, None, p, j)


def test_a_kernel_that_is_not_finite(kernel):
    with pytest.raises(ValueError, match="finite kernel"):
        tucker_spectra(kernel * np.nan)
