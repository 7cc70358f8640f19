import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_alds.core import errors
from keras_alds.core.errors import ERRORS, error_curve
from keras_alds.core.slicing import divisors, full_rank, recompose, unfold
from keras_alds.core.spectra import factorize, spectra

SHAPES = [(3, 3, 8, 16), (3, 3, 6, 9), (24, 10), (8, 40), (3, 6, 40), (12, 1), (2, 2, 2, 4, 7)]


def kernel_of(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def references(kernel, k, j):
    """The errors by their definition, from the residual of the truncated slices."""
    whole = unfold(kernel, 1)[0]
    matrices = unfold(kernel, k)
    u, s, vt = np.linalg.svd(matrices, full_matrices=False)
    residuals = (u[:, :, j:] * s[:, None, j:]) @ vt[:, j:]
    residual = residuals.reshape(whole.shape)
    largest = max(np.linalg.norm(r, 2) for r in residuals)
    norm = np.linalg.norm(whole, 2)
    return {
        "slice": largest / norm,
        "bound": np.sqrt(k) * largest / norm,
        "spectral": np.linalg.norm(residual, 2) / norm,
        "energy": np.linalg.norm(residual) ** 2 / np.linalg.norm(whole) ** 2,
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_equal_their_definition(shape):
    kernel = kernel_of(shape)
    found = spectra(kernel)
    for k in divisors(shape[-2]):
        rank = full_rank(shape, k)
        curves = {name: error_curve(found, name, k, kernel) for name in ERRORS}
        for j in range(rank):
            for name, expected in references(kernel, k, j).items():
                np.testing.assert_allclose(curves[name][j], expected, rtol=1e-6, err_msg=name)
        for curve in curves.values():
            assert curve.shape == (rank + 1,)
            assert curve[-1] == 0
            assert (np.diff(curve) <= 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 16), st.integers(1, 3), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_spectral_lies_between_slice_and_bound(c, kappa, f, seed):
    kernel = kernel_of((kappa, c, f), seed)
    found = spectra(kernel)
    for k in divisors(c):
        low, exact, high = (
            error_curve(found, name, k, kernel) for name in ("slice", "spectral", "bound")
        )
        assert (low <= exact * (1 + 1e-6) + 1e-7).all()
        assert (exact <= high * (1 + 1e-6) + 1e-7).all()


def test_spectral_of_large_kernels_uses_lanczos(monkeypatch):
    """The recomposed factors are the reference, and no full eigenvalue problem is solved."""
    kernel = kernel_of((3, 3, 32, 200))
    found = spectra(kernel)
    monkeypatch.setattr(errors, "_LANCZOS_RESTARTS", 50)
    sides = []
    solve = np.linalg.eigvalsh
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda a: sides.append(a.shape) or solve(a))
    curve = error_curve(found, "spectral", 4, kernel, max_rank=40)
    assert not sides
    for j in (1, 2, 17, 40):
        residual = unfold(kernel - recompose(*factorize(kernel, 4, j), 4), 1)[0]
        np.testing.assert_allclose(curve[j], np.linalg.norm(residual, 2) / found.norm, rtol=1e-6)


def test_largest_eigenvalue_despite_a_misleading_start():
    """The start is an eigenvector, of the second largest eigenvalue."""
    values = np.linspace(0, 1, 300)
    values[5], values[7] = 2.0, 2.1
    start = np.zeros(300)
    start[5] = 1.0
    value, _ = errors.largest_eigenvalue(np.diag(values), start=start)
    np.testing.assert_allclose(value, 2.1, rtol=1e-8)


@settings(max_examples=20, deadline=None)
@given(st.integers(165, 220), st.integers(1, 230), st.integers(0, 2**32 - 1))
def test_largest_eigenvalue_of_random_matrices(n, rank, seed):
    factor = kernel_of((n, rank), seed)
    gram = factor @ factor.T
    value, _ = errors.largest_eigenvalue(gram)
    np.testing.assert_allclose(value, np.linalg.eigvalsh(gram)[-1], rtol=1e-8)


@pytest.mark.parametrize("name", ERRORS)
def test_zero_and_deficient_kernels(name):
    zeros = np.zeros((3, 3, 4, 6))
    assert not error_curve(spectra(zeros), name, 2, zeros).any()
    ones = np.ones((3, 3, 4, 6), np.float32)
    curve = error_curve(spectra(ones), name, 2, ones)
    assert curve[0] > 0
    assert not curve[1:].any()


@pytest.mark.parametrize("name", ERRORS)
def test_max_rank_shortens_the_curve(name):
    kernel = kernel_of((3, 3, 8, 16))
    found = spectra(kernel)
    full = error_curve(found, name, 4, kernel)
    short = error_curve(found, name, 4, kernel, max_rank=5)
    np.testing.assert_allclose(short, full[:6], rtol=1e-9)


def test_errors_state_what_was_received():
    found = spectra(kernel_of((4, 6)))
    with pytest.raises(ValueError, match=r"\['bound', 'energy', .*Received: error_measure='l2'"):
        error_curve(found, "l2", 1)
    with pytest.raises(ValueError, match=r"\[1, 2, 4\]. Received: k=3"):
        error_curve(found, "slice", 3)
    with pytest.raises(ValueError, match="Received: kernel=None"):
        error_curve(found, "spectral", 2)
    with pytest.raises(ValueError, match=r"Received: kernel.shape=\(6, 4\)"):
        error_curve(found, "spectral", 2, np.zeros((6, 4)))
    with pytest.raises(ValueError, match="Received: max_rank=5"):
        error_curve(found, "slice", 1, max_rank=5)
