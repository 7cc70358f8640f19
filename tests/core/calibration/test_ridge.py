"""ρ of second moments of few inputs, in errors, factors and targets, against plain NumPy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from keras_alds.core.calibration import moments, regression
from keras_alds.core.calibration.accumulators import MomentAccumulator
from keras_alds.core.calibration.moments import FEW, MANY, RIDGE, FewInputs, default_ridge
from keras_alds.core.calibration.refit import factorize_outputs, output_error, refit_decoder
from keras_alds.core.calibration.regression import TARGET_RIDGES, PairAccumulator
from keras_alds.core.calibration.whitening import output_spectra
from keras_alds.core.slicing import recompose, unfold

N, FILTERS = 48, 20


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture(params=[True, False], ids=["inputs kept", "inputs added up"])
def wide(request, monkeypatch):
    """Whether layers of few inputs are kept as these inputs."""
    if request.param:
        monkeypatch.setattr(moments, "WIDE_SIDE", 2)
    return request.param


def seen(rng, count, n=N):
    """Inputs as after a ReLU, of which some directions matter more than others."""
    mixed = rng.standard_normal((n, n)) * 0.9 ** np.arange(n)
    return np.maximum(rng.standard_normal((count, n)) @ mixed.T, 0)


def moment_of(rows):
    accumulator = MomentAccumulator(rows.shape[1])
    accumulator.add(rows)
    return accumulator.moment()


def regularized(rows):
    """S + ρI by the definition."""
    S = rows.T @ rows / len(rows)
    return S + 0.2 * np.trace(S) / len(rows) * np.eye(len(S))


class TestDefault:
    @pytest.mark.parametrize("count", [8, 64, 320, 1599])
    def test_of_few_inputs(self, count):
        assert default_ridge(320, count) == pytest.approx(0.2 * 320 / count)

    @pytest.mark.parametrize("count", [2400, 5000, 10**7])
    def test_of_many_is_what_it_always_was(self, count):
        assert default_ridge(320, count) == RIDGE == 1e-5

    def test_never_jumps(self):
        side = 1000
        counts = np.linspace((FEW - 1) * side, (MANY + 1) * side, 500).astype(int)
        found = np.array([default_ridge(side, int(count)) for count in counts])
        steps = -np.diff(found)
        assert (steps >= 0).all()
        assert steps.max() < 3e-4  # of 0.04


class TestMoment:
    @pytest.mark.parametrize("count", [6, 24, 100, 239])
    def test_holds_it(self, rng, wide, count):
        rows = seen(rng, count)
        moment = moment_of(rows)
        assert isinstance(moment, FewInputs) == (wide and count <= 24)
        np.testing.assert_allclose(moment.slice_block(1, 0), regularized(rows), atol=1e-12)
        np.testing.assert_allclose(moment.times(np.eye(N)), regularized(rows), atol=1e-12)

    def test_is_that_of_the_layer_where_blocks_are_kept(self, rng, wide, monkeypatch):
        monkeypatch.setattr(moments, "MAX_SIDE", 16)
        rows = seen(rng, 6)
        moment = moment_of(rows)
        assert moment.block_count == 3
        expected = regularized(rows)[16:32, 16:32]
        np.testing.assert_allclose(moment.slice_block(3, 1), expected, atol=1e-12)


class TestTableAndFactors:
    @pytest.mark.parametrize("filters", [20, 100])
    @pytest.mark.parametrize("count", [6, 20, 100])
    def test_of_one_slice(self, rng, wide, count, filters):
        """The best error of every rank, and the factors that have it."""
        rows, W = seen(rng, count), rng.standard_normal((N, filters))
        moment, S = moment_of(rows), regularized(rows)
        singular = np.linalg.svd(np.linalg.cholesky(S).T @ W, compute_uv=False)
        spectra = output_spectra(W, moment, slices=[1])
        assert spectra.energy == pytest.approx(np.trace(W.T @ S @ W))
        lost = np.append(np.square(singular)[::-1].cumsum()[::-1], 0)
        np.testing.assert_allclose(spectra.slices[1].residual_energy, lost, rtol=1e-7, atol=1e-9)
        for rank in (1, 5, 15):
            R = W - recompose(*factorize_outputs(W, moment, 1, rank), 1)
            assert np.trace(R.T @ S @ R) == pytest.approx(lost[rank])

    @pytest.mark.parametrize("count", [6, 12, 100])
    @pytest.mark.parametrize("k", [2, 4])
    def test_of_several_slices(self, rng, wide, count, k):
        """Every rank, those above the number of inputs too."""
        rows, W = seen(rng, count), rng.standard_normal((N, 40))
        moment, S = moment_of(rows), regularized(rows)
        spectra = output_spectra(W, moment)
        for rank in range(1, (N * 40 - 1) // (k * 40 + N) + 1):
            R = W - recompose(*factorize_outputs(W, moment, k, rank, sweeps=0), k)
            lost = np.trace(R.T @ S @ R)
            assert spectra.slices[k].residual_energy[rank] == pytest.approx(lost, rel=1e-6)
            assert output_error(W, W - R, moment) == pytest.approx(lost / np.trace(W.T @ S @ W))

    def test_of_the_joint_refit(self, rng, wide):
        rows, W = seen(rng, 20), rng.standard_normal((N, FILTERS))
        E, S = rng.standard_normal((4, N // 4, 3)), regularized(rows)
        whole = np.zeros((4, N // 4, 4, 3))
        whole[range(4), :, range(4)] = E
        whole = whole.reshape(N, 12)
        expected = np.linalg.solve(whole.T @ S @ whole, whole.T @ S @ W)
        found = refit_decoder(E, unfold(W, 4), moment_of(rows))
        np.testing.assert_allclose(found.reshape(12, FILTERS), expected, atol=1e-9)


class TestTarget:
    @pytest.mark.parametrize("count", [6, 20, 100])
    @pytest.mark.parametrize("ridge", TARGET_RIDGES[:-1])
    def test_is_regression_with_no_less(self, rng, wide, pool, count, ridge):
        x, W = seen(rng, count), rng.standard_normal((N, FILTERS))
        x_hat = x + 0.3 * rng.standard_normal(x.shape)
        pairs = PairAccumulator(W)
        pairs.add_parts([([x_hat], [x])], pool)
        moment, target = pairs.result(ridge)
        S = x_hat.T @ x_hat / count
        rho = max(ridge, 0.2 * N / count) * np.trace(S) / N * np.eye(N)
        expected = np.linalg.solve(S + rho, (x_hat.T @ x / count + rho) @ W)
        np.testing.assert_allclose(target, expected, atol=1e-9)
        np.testing.assert_allclose(moment.slice_block(1, 0), regularized(x_hat), atol=1e-12)


@pytest.mark.parametrize("wide", [True, False], indirect=True, ids=["kept", "added up"])
def test_a_wide_layer_that_saw_64_rows_keeps_its_promise_on_others(rng, wide):
    """Without ρ the table promises a thousandth of what is lost."""
    n = 320
    rows, W = seen(rng, 64 + 500, n), rng.standard_normal((n, 250))
    moment, others = moment_of(rows[:64]), rows[64:]
    spectra = output_spectra(W, moment, slices=[1])
    outputs = others @ W
    for rank in (20, 60, 100):
        promised = spectra.slices[1].residual_energy[rank] / spectra.energy
        found = recompose(*factorize_outputs(W, moment, 1, rank), 1)
        lost = np.square(outputs - others @ found).sum() / np.square(outputs).sum()
        assert promised / 3 < lost < 3 * promised


@pytest.mark.parametrize("count", [int(MANY * N), 1000])
def test_many_rows_give_what_they_always_gave(rng, pool, monkeypatch, count):
    """Bit for bit: as if there were no other ρ."""
    rows, W = seen(rng, count), rng.standard_normal((N, FILTERS))
    x_hat = rows + 0.1 * rng.standard_normal(rows.shape)

    def results():
        moment = moment_of(rows)
        pairs = PairAccumulator(W)
        pairs.add_parts([([x_hat], [rows])], pool)
        errors = pairs.held_out_errors([([x_hat[:9]], [rows[:9]])], pool)
        again, target = pairs.result(1e-4)
        tables = [
            output_spectra(W, m).slices[k].residual_energy for m in (moment, again) for k in (1, 4)
        ]
        factors = [f for k in (1, 4) for f in factorize_outputs(target, again, k, 3)]
        return [moment.slice_block(2, 1), errors, target, *tables, *factors]

    found = results()
    for module in (moments, regression):
        monkeypatch.setattr(module, "default_ridge", lambda side, count: 1e-5)
    for one, other in zip(found, results(), strict=True):
        np.testing.assert_array_equal(one, other)
    rows, x_hat = rows[:200], x_hat[:200]
    one = results()
    monkeypatch.undo()
    assert not np.array_equal(one[0], results()[0])  # fewer rows do differ
