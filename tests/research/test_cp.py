"""CP decompositions, which TensorLy computes."""

from __future__ import annotations

import numpy as np
import pytest

from keras_alds import extras
from keras_alds.core.chains import CP, chain_kernel, chain_ranks
from keras_alds.research.cp import cp, cp_spectra


def made(rank, size=(3, 2), channels=6, filters=8):
    rng = np.random.default_rng(0)
    shapes = (channels, rank), (size[0], rank), (size[1], rank), (rank, filters)
    return chain_kernel([rng.standard_normal(shape) for shape in shapes], CP)


def test_a_sum_of_outer_products_is_found_and_balanced():
    pytest.importorskip("tensorly")
    kernel = made(3)
    parts = cp(kernel, None, 1, 3)
    assert [part.shape for part in parts] == [(6, 3), (3, 3), (2, 3), (3, 8)]
    np.testing.assert_allclose(chain_kernel(parts, CP), kernel, atol=1e-3 * np.abs(kernel).max())
    norms = [np.linalg.norm(part, axis=0) for part in (*parts[:-1], parts[-1].T)]
    np.testing.assert_allclose(norms, [norms[0]] * 4, rtol=1e-9)


def test_errors_of_all_smaller_ranks():
    pytest.importorskip("tensorly")
    kernel = made(3) + 0.1 * np.random.default_rng(1).standard_normal((3, 2, 6, 8))
    spectra = cp_spectra(kernel)
    errors = spectra.slices[1].residual_energy / spectra.energy
    assert spectra.slices[1].rank == chain_ranks(kernel.shape, CP)[1][-1] == 15
    assert chain_ranks((3, 3, 512, 512), CP)[1][-1] == 170  # limited by memory
    assert errors[0] == 1
    assert (np.diff(errors) <= 0).all()
    for rank in (1, 4, 8):  # known ranks; more rounds are a little better
        rest = kernel - chain_kernel(cp(kernel, None, 1, rank), CP)
        found = np.square(rest).sum() / spectra.energy
        assert 0.5 * errors[rank] <= found <= 1.01 * errors[rank]
    assert not cp_spectra(0 * kernel).slices[1].residual_energy.any()


def test_tensorly_is_missed(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r'tensorly.*Remedy: pip install "keras_alds\[tensors\]"'):
        cp_spectra(made(1))
