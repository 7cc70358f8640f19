"""CP decompositions, which TensorLy computes."""

from __future__ import annotations

import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from keras_alds import extras
from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.chains import CP, chain_kernel, chain_ranks
from keras_alds.core.slicing import unfold
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


def test_the_outputs_are_fitted_to_data():
    pytest.importorskip("tensorly")
    rng = np.random.default_rng(2)
    kernel = rng.standard_normal((3, 2, 6, 8))
    x = rng.standard_normal((400, 36)) @ rng.standard_normal((36, 36))
    moment = SecondMoment((x.T @ x / 400)[None], 400)
    x = np.concatenate([x, np.sqrt(moment.ridge * 400) * np.eye(36)])  # ρI counts like more inputs
    y = x @ unfold(kernel, 1)[0]
    spectra = cp_spectra(kernel, moment)
    plain, fitted = (chain_kernel(cp(kernel, m, 1, 4), CP) for m in (None, moment))
    lost = [
        np.square(y - x @ unfold(found, 1)[0]).sum() / np.square(y).sum()
        for found in (plain, fitted)
    ]
    assert lost[1] < 0.9 * lost[0]
    assert lost[1] == pytest.approx(spectra.slices[1].residual_energy[4] / spectra.energy, rel=0.1)
    # The best for the other three: nothing is left in their outputs.
    c, h, w, decoder = cp(kernel, moment, 1, 4)
    seen = x @ np.einsum("cj,hj,wj->chwj", c, h, w).reshape(36, 4)
    np.testing.assert_allclose(
        seen @ decoder, seen @ np.linalg.lstsq(seen, y, rcond=None)[0], atol=1e-6
    )


def test_warnings_are_not_ignored_for_good(monkeypatch):
    """Two threads leave in the order in which they came."""
    inside, first_left = {1: threading.Event(), 2: threading.Event()}, threading.Event()

    def parafac(kernel, rank, **_):
        inside[rank].set()
        (inside[2] if rank == 1 else first_left).wait(20)
        return np.ones(rank), [np.ones((length, rank)) for length in kernel.shape]

    monkeypatch.setattr(extras, "imported", lambda *_: SimpleNamespace(parafac=parafac))
    with warnings.catch_warnings():
        before = list(warnings.filters)
        threads = [threading.Thread(target=cp, args=(made(1), None, 1, rank)) for rank in (1, 2)]
        for rank, thread in enumerate(threads, 1):
            thread.start()
            inside[rank].wait(20)
        threads[0].join()
        first_left.set()
        threads[1].join()
        assert warnings.filters == before


def test_tensorly_is_missed(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r'tensorly.*Remedy: pip install "keras_alds\[tensors\]"'):
        cp_spectra(made(1))
