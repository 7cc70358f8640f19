"""Layers too wide for the plain way: half a matrix, few inputs, bounded work; against NumPy."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_alds.core.calibration import accumulators, moments, regression, symmetric
from keras_alds.core.calibration.accumulators import MomentAccumulator
from keras_alds.core.calibration.moments import FewInputs, SecondMoment, default_ridge
from keras_alds.core.calibration.refit import factorize_outputs, output_error
from keras_alds.core.calibration.regression import TARGET_RIDGES, PairAccumulator
from keras_alds.core.calibration.symmetric import SymmetricMatrix
from keras_alds.core.calibration.whitening import output_spectra
from keras_alds.core.parallel import map_within
from keras_alds.core.slicing import recompose, unfold


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(3) as executor:
        yield executor


@pytest.fixture
def strips(monkeypatch):
    """Strips of 5 rows, so that small matrices have several."""
    monkeypatch.setattr(symmetric, "STRIP", 5)


@pytest.fixture
def wide(monkeypatch, strips):
    """Layers of 12 inputs are wide."""
    monkeypatch.setattr(moments, "WIDE_SIDE", 12)


class TestSymmetricMatrix:
    @settings(max_examples=40, deadline=None)
    @given(side=st.integers(1, 23), seed=st.integers(0, 99), data=st.data())
    def test_is_the_whole_matrix(self, side, seed, data):
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((7, side))
        whole = rows.T @ rows
        start = data.draw(st.integers(0, side - 1))
        stop = data.draw(st.integers(start + 1, side))
        right = rng.standard_normal((stop - start, 3))
        order = rng.permutation(side)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(symmetric, "STRIP", 5)
            matrix = SymmetricMatrix(side)
            assert len(matrix) == (1 if side <= 10 else -(-side // 5))
            for strip in range(len(matrix)):
                matrix.add(strip, rows)
            assert matrix.trace() == pytest.approx(np.trace(whole))
            np.testing.assert_allclose(matrix.part(start, stop), whole[start:stop, start:stop])
            expected = whole[:, start:stop] @ right
            np.testing.assert_allclose(matrix.columns(start, right), expected, atol=1e-12)
            matrix.add_sum(SymmetricMatrix.of(whole))
            found = matrix.reordered(order, 0.5).part(0, side)
            np.testing.assert_allclose(found, whole[np.ix_(order, order)], atol=1e-12)

    def test_keeps_half(self):
        strips = SymmetricMatrix(4608)._strips
        assert sum(strip.nbytes for strip in strips) < 0.56 * 8 * 4608**2


class TestSecondMoment:
    def test_threads_lose_nothing(self, rng, pool, strips):
        rows = rng.standard_normal((300, 4, 6))  # 4 positions of 6 channels
        accumulator = MomentAccumulator(6, 4)
        accumulator.add(rows[:7])
        accumulator.add_parts([np.array_split(part, 3) for part in np.array_split(rows, 4)], pool)
        seen = np.concatenate([rows[:7], rows]).swapaxes(1, 2).reshape(307, 24)
        moment = accumulator.moment()
        assert moment.count == 307
        np.testing.assert_allclose(moment.blocks[0], seen.T @ seen / 307, atol=1e-12)
        np.testing.assert_allclose(moment.mean, seen.mean(0), atol=1e-12)

    def test_is_the_same_whatever_the_number_of_threads(self, rng, strips):
        rows = rng.standard_normal((300, 24)).astype("float32")
        found = []
        for workers in (1, 4):
            accumulator = MomentAccumulator(24)
            with ThreadPoolExecutor(workers) as executor:
                accumulator.add_parts([np.array_split(rows, 5)], executor)
            found.append(accumulator.moment().blocks)
        np.testing.assert_array_equal(*found)

    @pytest.mark.parametrize("count", [3, 6, 7, 40])
    def test_few_inputs_are_kept(self, rng, wide, count):
        rows = rng.standard_normal((count, 3, 4))
        accumulator = MomentAccumulator(4, 3)
        for start in range(0, count, 2):
            accumulator.add(rows[start : start + 2])
        moment = accumulator.moment()
        assert isinstance(moment, FewInputs) == (count <= 6)
        seen = rows.swapaxes(1, 2).reshape(count, 12)
        np.testing.assert_allclose(moment.blocks[0], seen.T @ seen / count, atol=1e-12)
        np.testing.assert_allclose(moment.mean, seen.mean(0), atol=1e-12)

    @pytest.mark.parametrize("blocks", [1, 3])
    def test_few_inputs_are_their_moment(self, rng, blocks):
        rows = rng.standard_normal((5, 24))
        few = FewInputs(rows, blocks)
        usual = SecondMoment(few.blocks, 5, rows.mean(0))
        assert few.ridge == pytest.approx(usual.ridge)
        assert (few.side, few.block_count) == (24, blocks)
        matrix = rng.standard_normal((24, 2))
        np.testing.assert_allclose(few.times(matrix), usual.times(matrix), atol=1e-12)
        part = matrix[: 24 // blocks]
        assert few.energy(0, part) == pytest.approx(usual.energy(0, part))
        np.testing.assert_allclose(few.slice_block(6, 4), usual.slice_block(6, 4), atol=1e-12)
        for ridged in (True, False):
            np.testing.assert_allclose(
                few.columns(6, 5, matrix[:4], ridged=ridged),
                usual.columns(6, 5, matrix[:4], ridged=ridged),
                atol=1e-12,
            )

    def test_few_zeros(self, wide):
        few = FewInputs(np.zeros((3, 12)), 1)
        np.testing.assert_array_equal(few.slice_block(1, 0), np.eye(12))
        assert few.thin_root(1, 0) is None
        kernel = np.diag([3.0, 2.0, 1.0, *[0.0] * 9])
        encoder, decoder = factorize_outputs(kernel, few, 1, 1)
        np.testing.assert_allclose(encoder @ decoder, np.diag([3.0, *[0.0] * 11]), atol=1e-12)

    @pytest.mark.parametrize("k", [2, 4])
    def test_choices_of_few_inputs_promise_the_error_of_the_joint_refit(self, rng, wide, k):
        few = FewInputs(rng.standard_normal((6, 48)), 1)
        kernel = rng.standard_normal((48, 40))
        spectra = output_spectra(kernel, few)
        for rank in range(1, (48 * 40 - 1) // (k * 40 + 48) + 1):
            factors = factorize_outputs(kernel, few, k, rank, sweeps=0)
            error = output_error(kernel, recompose(*factors, k), few)
            promised = spectra.slices[k].residual_energy[rank] / spectra.energy
            assert promised == pytest.approx(error, rel=1e-5, abs=1e-9)

    @pytest.mark.parametrize("blocks", [1, 3])
    @pytest.mark.parametrize("few", [True, False])
    def test_products_of_slices(self, rng, few, blocks):
        """What encoders see, and a product whose rows change, against all of S at once."""
        moment = FewInputs(rng.standard_normal((5, 24)), blocks)
        S = moment.times(np.eye(24))
        moment = moment if few else SecondMoment(moment.blocks, 5)
        E = rng.standard_normal((6, 4, 2))
        diagonal = np.zeros((6, 4, 6, 2))
        diagonal[range(6), :, range(6)] = E
        whole = diagonal.reshape(24, 12)
        each = 6 // blocks
        for first in range(0, 6, each):
            here, part = slice(4 * first, 4 * (first + each)), slice(first, first + each)
            expected = S[here] @ whole[:, 2 * first : 2 * (first + each)]
            np.testing.assert_allclose(moment.encoded(6, first, E[part]), expected, atol=1e-12)
            product = moment.product(6, first, E[part])
            change = rng.standard_normal((4, 2))
            product.subtract(each - 1, change)
            M = E[part].reshape(-1, 2)
            M = M - np.concatenate([np.zeros((4 * each - 4, 2)), change])
            found = np.concatenate([product.rows(i) for i in range(each)])
            np.testing.assert_allclose(found, S[here, here] @ M, atol=1e-12)
        if blocks == 1:
            ordered = whole.reshape(24, 6, 2).swapaxes(1, 2).reshape(24, 12)
            np.testing.assert_allclose(moment.gram(E), ordered.T @ S @ ordered, atol=1e-12)

    def test_few_inputs_are_not_read_anew_for_every_slice(self, rng, wide, monkeypatch):
        """With many slices that took longer than all of S."""
        few, entries = FewInputs(rng.standard_normal((6, 48)), 1), 0
        plain = FewInputs._inputs

        def counted(self, *place):
            nonlocal entries
            found = plain(self, *place)
            entries += found.size
            return found

        monkeypatch.setattr(FewInputs, "_inputs", counted)
        kernel, size = rng.standard_normal((48, 40)), few.rows.size
        for k in (4, 24):
            entries = 0
            output_spectra(kernel, few, slices=[k])
            spectra = entries
            factorize_outputs(kernel, few, k, 1)
            assert spectra <= 4 * size
            assert entries - spectra <= 12 * size

    @pytest.mark.parametrize("k", [3, 6])
    def test_blocks_are_compressed_one_by_one(self, rng, k):
        rows, kernel = rng.standard_normal((200, 24)), rng.standard_normal((24, 20))
        parts = np.split(rows, 3, axis=1)
        moment = SecondMoment(np.stack([part.T @ part / 200 for part in parts]), 200)
        encoder, decoder = factorize_outputs(kernel, moment, k, 2)
        found = recompose(encoder, decoder, k)
        for i, part in enumerate(parts):
            here = slice(8 * i, 8 * i + 8)
            alone = SecondMoment((part.T @ part / 200)[None], 200)
            own = recompose(*factorize_outputs(kernel[here], alone, k // 3, 2), k // 3)
            errors = [np.linalg.norm(part @ (kernel[here] - w)) for w in (found[here], own)]
            assert errors[0] == pytest.approx(errors[1], rel=1e-4)


class TestPairs:
    @pytest.mark.parametrize("size", [(), (3,)])
    @pytest.mark.parametrize("count", [6, 8, 60])
    def test_are_ridge_regression(self, rng, wide, pool, count, size):
        """Few inputs, inputs that are few at first, and many."""
        c, kappa = (6, 3) if size else (16, 1)
        kernel = rng.standard_normal((*size, c, 7))
        n = c * kappa
        x = rng.standard_normal((count, kappa, c))
        x_hat = x + 0.3 * rng.standard_normal(x.shape)
        pairs = PairAccumulator(kernel)
        pairs.add_parts([([x_hat[:5]], [x[:5]])], pool)
        pairs.add_parts([([x_hat[5:]], [x[5:]])], pool)
        W = unfold(kernel, 1)[0]
        X, X_hat = (a.swapaxes(1, 2).reshape(count, n) for a in (x, x_hat))
        S = X_hat.T @ X_hat / count
        held, held_hat = rng.standard_normal((2, 9, kappa, c))
        errors = pairs.held_out_errors([([held_hat], [held])], pool)
        H, H_hat = (a.swapaxes(1, 2).reshape(9, n) for a in (held, held_hat))
        for error, ridge in zip(errors, TARGET_RIDGES, strict=True):
            expected = W
            if np.isfinite(ridge):
                rho = ridge * np.trace(S) / n
                right = X_hat.T @ X @ W / count + rho * W
                expected = np.linalg.solve(S + rho * np.eye(n), right)
            assert error == pytest.approx(np.square(H @ W - H_hat @ expected).sum())
        rho = max(1e-2, default_ridge(n, count)) * np.trace(S) / n
        expected = np.linalg.solve(S + rho * np.eye(n), X_hat.T @ X @ W / count + rho * W)
        moment, target = pairs.result(1e-2)
        assert isinstance(moment, FewInputs) == (2 * count <= n)
        np.testing.assert_allclose(moment.blocks[0], S, atol=1e-12)
        np.testing.assert_allclose(unfold(target, 1)[0], expected, atol=1e-9)

    @pytest.mark.parametrize("count", [6, 60])
    def test_inputs_too_small_for_squares_leave_the_kernel(self, rng, wide, pool, count):
        x = 1e-21 * rng.standard_normal((count, 16)).astype("float32")
        kernel = rng.standard_normal((16, 3)).astype("float32")
        pairs = PairAccumulator(kernel)
        pairs.add_parts([([x], [2 * x])], pool)
        np.testing.assert_array_equal(pairs.result(1e-4)[1], kernel)

    def test_the_kernel_is_overwritten_only_on_request(self, rng, pool):
        x, kernel = rng.standard_normal((2, 20, 6)), rng.standard_normal((6, 4))
        found = []
        for overwrite in (False, True):
            own = kernel.copy()
            pairs = PairAccumulator(own, overwrite=overwrite)
            pairs.add_parts([([x[0]], [x[1]])], pool)
            found.append(pairs.result(1e-2)[1])
            assert overwrite or np.array_equal(own, kernel)
        np.testing.assert_array_equal(*found)

    def test_nothing_added(self):
        with pytest.raises(ValueError, match="at least one unfolded input"):
            PairAccumulator(np.eye(3)).result(1.0)

    def test_zeros_leave_the_kernel(self, wide, pool):
        pairs = PairAccumulator(np.eye(12))
        pairs.add_parts([([np.zeros((3, 12))], [np.ones((3, 12))])], pool)
        errors = pairs.held_out_errors([([np.zeros((2, 12))], [np.ones((2, 12))])], pool)
        np.testing.assert_allclose(errors, 24)
        np.testing.assert_array_equal(pairs.result(1e-2)[1], np.eye(12))


def test_every_thread_limits_its_own_blas(rng, strips, pool, monkeypatch):
    """Some libraries count BLAS threads by calling thread."""
    inside = threading.local()

    @contextlib.contextmanager
    def limit():
        before, inside.limited = getattr(inside, "limited", False), True
        yield
        inside.limited = before

    limited = []
    plain = SymmetricMatrix.add

    def add(self, strip, rows):
        limited.append(getattr(inside, "limited", False))
        plain(self, strip, rows)

    monkeypatch.setattr(accumulators, "single_threaded_blas", limit)
    monkeypatch.setattr(regression, "single_threaded_blas", limit)
    monkeypatch.setattr(SymmetricMatrix, "add", add)
    rows = rng.standard_normal((40, 24))
    accumulator, pairs = MomentAccumulator(24), PairAccumulator(np.eye(24))
    accumulator.add(rows)
    accumulator.add_parts([[rows]], pool)
    pairs.add_parts([([rows], [rows])], pool)
    assert limited
    assert all(limited)


class TestMapWithin:
    def test_bounds_what_runs_at_once(self):
        lock, used, peak = threading.Lock(), 0, 0
        together = threading.Barrier(2, timeout=5)

        def work(index, size):
            nonlocal used, peak
            with lock:
                used += size
                peak = max(peak, used)
            if index < 2:
                together.wait()  # these two fit, and run at once
            with lock:
                used -= size
            return index

        sizes = [5, 5, 9, 3, 3, 3, 30, 1]
        with ThreadPoolExecutor(8) as executor:
            found = map_within(executor, work, list(enumerate(sizes)), sizes, limit=10)
        assert found == list(range(8))
        assert peak == 30  # the one that is too large by itself runs alone

    def test_an_error_ends_it(self):
        with ThreadPoolExecutor(2) as executor, pytest.raises(ZeroDivisionError):
            map_within(executor, divmod, [(1, 1), (1, 0), (1, 1)], [1, 1, 1], limit=1)
