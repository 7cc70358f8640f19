"""Errors on held-out inputs, their ridge, and curves, against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from keras_alds.core.calibration import held_out, moments
from keras_alds.core.calibration.accumulators import MomentAccumulator
from keras_alds.core.calibration.curves import Curve
from keras_alds.core.calibration.held_out import RIDGES, best_ridge, held_out_spectra_many
from keras_alds.core.calibration.moments import RIDGE, FewInputs, SecondMoment
from keras_alds.core.calibration.refit import factorize_outputs, output_error
from keras_alds.core.calibration.whitening import output_spectra
from keras_alds.core.slicing import full_rank, recompose, weights


def moment_of(rows, kappa=1):
    sums = MomentAccumulator(rows.shape[1] // kappa, kappa)
    sums.add(rows.reshape(len(rows), -1, kappa).swapaxes(1, 2))
    return sums.moment()


def split(rng, n, fit, judge, kappa=1):
    """Rows like those behind a ReLU, and their moment with the last ones held out."""
    mixed = rng.standard_normal((n, n)) * 0.9 ** np.arange(n)
    rows = np.maximum(rng.standard_normal((fit + judge, n)) @ mixed.T, 0)
    both = moment_of(rows[:fit], kappa).with_held_out(moment_of(rows[fit:], kappa))
    return rows, both


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("few", [False, True], ids=["added up", "inputs kept"])
class TestSplit:
    def test_sums_and_parts(self, rng, few, monkeypatch):
        monkeypatch.setattr(moments, "WIDE_SIDE", 2 if few else 1024)
        rows, both = split(rng, 40, 12, 4)
        assert isinstance(both, FewInputs) == few
        np.testing.assert_allclose(both.blocks[0], rows.T @ rows / 16, atol=1e-12)
        np.testing.assert_allclose(both.mean, rows.mean(0))
        parts = {12: both.without_held_out(), 4: both.held_out}
        for count, part in parts.items():
            own = rows[:12] if count == 12 else rows[12:]
            assert part.count == count
            np.testing.assert_allclose(part.blocks[0], own.T @ own / count, atol=1e-12)

    def test_ridge_is_kept(self, rng, few, monkeypatch):
        monkeypatch.setattr(moments, "WIDE_SIDE", 2 if few else 1024)
        _, both = split(rng, 40, 12, 4)
        ridged = both.with_ridge(0.3)
        assert ridged.without_held_out().relative_ridge == ridged.relative_ridge == 0.3
        assert ridged.held_out is both.held_out
        assert both.relative_ridge != 0.3

    @pytest.mark.parametrize("shape", [(24, 10), (2, 12, 9), (36, 40)])
    def test_errors_are_those_of_the_factors(self, rng, few, monkeypatch, shape):
        monkeypatch.setattr(moments, "WIDE_SIDE", 2 if few else 1024)
        kernel = rng.standard_normal(shape)
        n = int(np.prod(shape[:-1]))
        _, both = split(rng, n, n // 3, n // 4, kappa=n // shape[-2])
        both = both.with_ridge(0.1)
        (found,) = held_out_spectra_many([kernel], [both])
        judge = both.held_out.with_ridge(RIDGE)
        compared = 0
        for k, curve in found.slices.items():
            relative = curve.residual_energy / found.energy
            assert relative[0] == pytest.approx(1)
            for rank in range(1, full_rank(shape, k)):
                if weights(shape, k, rank) >= kernel.size:
                    break
                factors = factorize_outputs(kernel, both.without_held_out(), k, rank, sweeps=0)
                expected = output_error(kernel, recompose(*factors, k), judge)
                assert relative[rank] == pytest.approx(expected, rel=1e-6, abs=1e-9)
                compared += 1
        assert compared > 5


def test_diagonal_blocks(rng, monkeypatch):
    monkeypatch.setattr(moments, "MAX_SIDE", 12)
    kernel = rng.standard_normal((24, 30))
    _, both = split(rng, 24, 400, 100)
    assert both.block_count == 2
    (found,) = held_out_spectra_many([kernel], [both])
    assert set(found.slices) == {2, 4, 6, 8, 12}
    factors = factorize_outputs(kernel, both.without_held_out(), 4, 2, sweeps=0)
    expected = output_error(kernel, recompose(*factors, 4), both.held_out.with_ridge(RIDGE))
    assert found.slices[4].residual_energy[2] / found.energy == pytest.approx(expected, rel=1e-6)


def test_with_nothing_held_out_errors_are_those_on_the_fitted_inputs(rng):
    kernel, moment = rng.standard_normal((12, 8)), moment_of(rng.standard_normal((50, 12)))
    (found,) = held_out_spectra_many([kernel], [moment])
    expected = output_spectra(kernel, moment)
    for k, curve in expected.slices.items():
        np.testing.assert_array_equal(found.slices[k].residual_energy, curve.residual_energy)


def test_errors_on_few_fitted_inputs_are_too_small_and_held_out_ones_are_not(rng):
    """A layer with one input an example, as a classifier has."""
    kernel = rng.standard_normal((96, 40))
    rows, both = split(rng, 96, 48, 400)
    (honest,) = held_out_spectra_many([kernel], [both.with_ridge(RIDGE)])
    fitted = output_spectra(kernel, moment_of(rows[:48]).with_ridge(RIDGE))
    k, rank = 12, 4
    assert weights(kernel.shape, k, rank) < kernel.size
    own = fitted.slices[k].residual_energy[rank] / fitted.energy
    other = honest.slices[k].residual_energy[rank] / honest.energy
    assert other > 10 * own


class TestBestRidge:
    def test_has_the_least_held_out_error(self, rng):
        kernel = rng.standard_normal((96, 40))
        _, both = split(rng, 96, 48, 400)
        best = best_ridge(kernel, both)
        assert best in RIDGES
        judge = both.held_out.with_ridge(RIDGE)

        def error(ridge):
            fit = both.with_ridge(ridge).without_held_out()
            factors = factorize_outputs(kernel, fit, 12, 3, sweeps=0)
            return output_error(kernel, recompose(*factors, 12), judge)

        errors = {ridge: error(ridge) for ridge in RIDGES}
        assert errors[best] <= 1.05 * min(errors.values())
        assert errors[best] < 0.6 * errors[RIDGE]

    def test_needs_held_out_inputs(self, rng):
        moment = moment_of(rng.standard_normal((50, 24)))
        assert best_ridge(rng.standard_normal((24, 12)), moment) == moment.relative_ridge

    def test_does_not_matter_for_plenty_of_inputs(self, rng):
        _, both = split(rng, 8, 1600, 400)
        assert best_ridge(rng.standard_normal((8, 8)), both) == both.relative_ridge == RIDGE

    @pytest.mark.parametrize("kernel", [np.zeros((24, 12)), np.ones((24, 12)), np.ones((24, 1))])
    def test_of_degenerate_kernels(self, rng, kernel):
        _, both = split(rng, 24, 12, 6)
        assert best_ridge(kernel, both) > 0

    def test_of_inputs_that_are_all_zero(self):
        moment = SecondMoment(np.zeros((1, 24, 24)), 12)
        moment = moment.with_held_out(SecondMoment(np.zeros((1, 24, 24)), 4))
        assert best_ridge(np.ones((24, 12)), moment) > 0


class TestCurve:
    def test_passes_through_its_points_and_rises(self):
        curve = Curve.of([0.1, 0.02, 0.3], [0.5, 0.1, 0.4])
        assert curve.errors == (0.02, 0.1, 0.3)
        np.testing.assert_allclose(curve(np.array([0.02, 0.1, 0.3])), [0.1, 0.5, 0.5])
        values = curve(np.geomspace(1e-4, 2, 50))
        assert (np.diff(values) >= 0).all()
        assert (values > 0).all()

    def test_is_zero_without_error(self):
        found = Curve((0.1,), (3.0,))(np.array([0.0, 0.1, 0.2]))
        assert found[0] == 0
        np.testing.assert_allclose(found, [0, 3, 6])

    def test_interpolates_powers_exactly(self):
        errors = np.array([0.01, 0.04, 0.2])
        curve = Curve.of(errors, 5 * errors**1.5)
        x = np.array([0.001, 0.02, 0.1, 0.9])
        np.testing.assert_allclose(curve(x), 5 * x**1.5)

    def test_takes_no_errors_of_zero_and_no_infinite_divergence(self):
        assert Curve.of([0.0, 0.1], [0.2, np.inf]) is None
        assert Curve.of([0.0, 0.1], [0.2, -1e-12]).divergences == (1e-9,)


def test_of_a_wide_layer_only_some_numbers_of_slices_are_looked_at():
    found = held_out._ranks((1440, 1000), 1, 1)
    assert held_out._FEWEST <= len(found) < 20
    assert 1 in found
    wanted = {2: 1000, 3: 20, 1440: 1}
    assert held_out._ranks((1440, 1000), 1, 1, wanted) == {2: 418, 3: 20}


def test_errors_of_the_wanted_ranks_do_not_depend_on_larger_ones(rng):
    kernel = rng.standard_normal((24, 30))
    _, both = split(rng, 24, 400, 100)
    (every,) = held_out_spectra_many([kernel], [both])
    (some,) = held_out_spectra_many([kernel], [both], [{1: 5, 24: 1}])
    assert set(some.slices) == {1}  # one rank of 24 slices is as large as the kernel
    expected = every.slices[1].residual_energy[:6]
    np.testing.assert_allclose(some.slices[1].residual_energy[:6], expected, rtol=1e-9)


def test_a_gram_matrix_that_rounding_made_indefinite():
    gram = np.diag([1.0, -1e-15])
    triangle = held_out._triangle(gram)
    np.testing.assert_allclose(triangle @ triangle.T, gram, atol=1e-12)
    with pytest.raises(np.linalg.LinAlgError):
        held_out._triangle(np.diag([1.0, -0.5]))
