"""Second moments, whitened spectra and factors, against plain NumPy on explicit inputs."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_alds.core.calibration import moments, patches
from keras_alds.core.calibration.accumulators import MomentAccumulator
from keras_alds.core.calibration.moments import FewInputs, SecondMoment, moment_blocks
from keras_alds.core.calibration.patches import patch_chunks
from keras_alds.core.calibration.refit import factorize_outputs, output_error, refit_decoder
from keras_alds.core.calibration.whitening import output_spectra, output_spectra_many
from keras_alds.core.choices import choice_table
from keras_alds.core.slicing import divisors, full_rank, recompose, unfold
from keras_alds.core.spectra import factorize
from keras_alds.methods import choose_method, get_method

CHANNELS, FILTERS, SIZE = 8, 10, (3, 2)
KAPPA = 6
N = CHANNELS * KAPPA


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def kernel_of(rng, size=SIZE):
    return rng.standard_normal((*size, CHANNELS, FILTERS))


def inputs_of(rng, count=400, n=N):
    """Correlated inputs with a mean, as rows in the order of `unfold`."""
    return rng.standard_normal((count, n)) @ rng.standard_normal((n, n)) + 0.5


def moment_of(rows):
    return SecondMoment((rows.T @ rows / len(rows))[None], len(rows))


def lost(kernel, encoder, decoder, slices, rows):
    """E‖x(W − Ŵ)‖² / E‖xW‖², straight from the inputs."""
    W = unfold(kernel, 1)[0]
    R = W - unfold(recompose(encoder, decoder, slices), 1)[0]
    return np.square(rows @ R).sum() / np.square(rows @ W).sum()


class TestPatches:
    @pytest.mark.parametrize("padding", ["valid", "same"])
    @pytest.mark.parametrize(
        ("strides", "dilation"), [((1, 1), (1, 1)), ((2, 1), (1, 1)), ((1, 1), (2, 3))]
    )
    def test_multiply_to_a_convolution(self, rng, padding, strides, dilation):
        x = rng.standard_normal((3, 9, 8, CHANNELS))
        kernel = kernel_of(rng)
        expected = tf.nn.convolution(x, kernel, list(strides), padding.upper(), dilations=dilation)
        rows = np.concatenate(
            list(patch_chunks(x, SIZE, strides=strides, dilation=dilation, padding=padding))
        )
        found = rows.reshape(len(rows), -1) @ kernel.reshape(-1, FILTERS)
        np.testing.assert_allclose(found, np.reshape(expected, (-1, FILTERS)), atol=1e-9)

    def test_causal(self, rng):
        x, kernel = rng.standard_normal((2, 11, 4)), rng.standard_normal((3, 4, 5))
        expected = tf.nn.conv1d(
            np.pad(x, ((0, 0), (4, 0), (0, 0))), kernel, 1, "VALID", dilations=2
        )
        (rows,) = patch_chunks(x, (3,), dilation=(2,), padding="causal")
        found = rows.reshape(22, -1) @ kernel.reshape(-1, 5)
        np.testing.assert_allclose(found, np.reshape(expected, (-1, 5)), atol=1e-9)

    def test_chunks_are_bounded_and_complete(self, rng, monkeypatch):
        x = rng.standard_normal((5, 9, 8, CHANNELS))
        whole = np.concatenate(list(patch_chunks(x, SIZE, padding="same")))
        monkeypatch.setattr(patches, "_CHUNK_BYTES", 1)
        monkeypatch.setattr(patches, "CHUNK_ROWS", 20)
        chunks = list(patch_chunks(x, SIZE, padding="same"))
        assert max(len(chunk) for chunk in chunks) <= 20
        assert len(chunks) > 5
        np.testing.assert_array_equal(np.concatenate(chunks), whole)

    def test_dense(self, rng):
        x = rng.standard_normal((5, 7))
        (rows,) = patch_chunks(x)
        np.testing.assert_array_equal(rows, x[:, None])

    def test_wrong_axes_and_padding(self, rng):
        with pytest.raises(ValueError, match=r"2 spatial axes.*Received: inputs.shape=\(5, 7\)"):
            list(patch_chunks(rng.standard_normal((5, 7)), (3, 3)))
        with pytest.raises(ValueError, match="Received: padding='full'"):
            list(patch_chunks(rng.standard_normal((5, 7, 3)), (3,), padding="full"))


class TestMoment:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_is_the_mean_outer_product_in_the_order_of_unfold(self, rng, dtype):
        rows = inputs_of(rng).astype(dtype)
        accumulator = MomentAccumulator(CHANNELS, KAPPA)
        position_major = rows.reshape(-1, CHANNELS, KAPPA).transpose(0, 2, 1)
        for start in range(0, 400, 70):
            accumulator.add(position_major[start : start + 70])
        moment = accumulator.moment()
        assert (moment.count, moment.side) == (400, N)
        exact = rows.astype("float64")
        scale = np.abs(exact.T @ exact / 400).max()
        tolerance = (1e-6 if dtype == "float32" else 1e-13) * scale
        np.testing.assert_allclose(moment.blocks[0], exact.T @ exact / 400, atol=tolerance)

    def test_threads_lose_nothing(self, rng):
        rows = inputs_of(rng, 6000, 16)
        accumulator = MomentAccumulator(16)
        accumulator.add(rows[:7])
        with ThreadPoolExecutor(4) as pool:
            accumulator.add_parts([np.array_split(p, 3) for p in np.array_split(rows, 20)], pool)
        together = np.concatenate([rows[:7], rows])
        moment = accumulator.moment()
        assert moment.count == 6007
        np.testing.assert_allclose(moment.blocks[0], together.T @ together / 6007)

    def test_rounding_does_not_grow_with_the_data(self):
        accumulator = MomentAccumulator(2)
        chunk = np.full((2048, 2), 0.1, "float32")
        for _ in range(200):
            accumulator.add(chunk)
        exact = float(np.float32(0.1)) ** 2
        np.testing.assert_allclose(accumulator.moment().blocks[0], exact, rtol=1e-6)

    def test_large_layers_keep_diagonal_blocks(self, rng, monkeypatch):
        monkeypatch.setattr(moments, "MAX_SIDE", 12)
        assert moment_blocks(CHANNELS, KAPPA) == 4
        rows = inputs_of(rng)
        accumulator = MomentAccumulator(CHANNELS, KAPPA)
        accumulator.add(rows.reshape(-1, CHANNELS, KAPPA).transpose(0, 2, 1))
        moment = accumulator.moment()
        assert moment.blocks.shape == (4, 12, 12)
        full = rows.T @ rows / 400
        for i in range(4):
            part = slice(12 * i, 12 * i + 12)
            np.testing.assert_allclose(moment.blocks[i], full[part, part])

    def test_large_layers_have_only_slices_that_fit(self, rng, monkeypatch):
        monkeypatch.setattr(moments, "MAX_SIDE", 12)
        rows, kernel = inputs_of(rng), kernel_of(rng)
        accumulator = MomentAccumulator(CHANNELS, KAPPA)
        accumulator.add(rows.reshape(-1, CHANNELS, KAPPA).transpose(0, 2, 1))
        moment = accumulator.moment()
        whole = output_spectra(kernel, moment_of(rows))
        found = output_spectra(kernel, moment)
        assert list(found.slices) == [4, 8]
        for k in (4, 8):
            np.testing.assert_allclose(
                found.slices[k].residual_norm,
                whole.slices[k].residual_norm,
                rtol=1e-3,
                atol=1e-9 * whole.norm,
            )
            encoder, decoder = factorize_outputs(kernel, moment, k, 3)
            assert encoder.shape == (*SIZE, CHANNELS // k, 3 * k)
            assert decoder.shape == (3 * k, FILTERS)
        with pytest.raises(ValueError, match=r"multiple of 4 slices.*Received: slices=2"):
            factorize_outputs(kernel, moment, 2, 3)

    def test_nothing_added(self):
        with pytest.raises(ValueError, match="at least one unfolded input"):
            MomentAccumulator(3).moment()


class TestSpectra:
    def test_of_white_inputs_are_those_of_the_kernel(self, rng):
        kernel = kernel_of(rng)
        found = output_spectra(kernel, SecondMoment(np.eye(N)[None], 100 * N))
        for k in divisors(CHANNELS):
            singular = np.linalg.svd(unfold(kernel, k), compute_uv=False)
            expected = np.append(np.square(singular).sum(0)[::-1].cumsum()[::-1], 0)
            np.testing.assert_allclose(found.slices[k].residual_energy, expected, rtol=1e-4)
        assert found.energy == pytest.approx(np.square(kernel).sum(), rel=1e-4)

    @pytest.mark.parametrize("k", divisors(CHANNELS))
    def test_are_those_of_the_whitened_slices(self, rng, k):
        kernel, rows = kernel_of(rng), inputs_of(rng)
        found = output_spectra(kernel, moment_of(rows)).slices[k]
        parts = np.split(rows, k, axis=1)
        singular = np.stack(
            [
                np.linalg.svd(part @ W / 20, compute_uv=False)[: found.rank]
                for part, W in zip(parts, unfold(kernel, k), strict=True)
            ]
        )
        np.testing.assert_allclose(found.residual_norm[:-1], singular.max(0), rtol=1e-3)

    @pytest.mark.parametrize("k", divisors(CHANNELS)[1:])
    def test_promise_the_error_after_the_joint_refit(self, rng, k):
        kernel, moment = kernel_of(rng), moment_of(inputs_of(rng))
        spectra = output_spectra(kernel, moment)
        for row in choice_table(spectra, error_measure="energy"):
            if row.slices == k and row.rank < spectra.slices[k].rank:
                factors = factorize_outputs(kernel, moment, k, row.rank, sweeps=0)
                error = output_error(kernel, recompose(*factors, k), moment)
                assert row.error == pytest.approx(error, rel=1e-5, abs=1e-9)

    @pytest.mark.parametrize(("channels", "filters"), [(60, 20), (24, 20), (60, 6)])
    def test_wide_slices_that_few_inputs_were_seen_of(self, rng, monkeypatch, channels, filters):
        """The low rank of S is used: the same as all of it, but for ρ."""
        kernel = rng.standard_normal((channels, filters))
        rows = inputs_of(rng, count=10, n=channels)
        moment, few = moment_of(rows), FewInputs(rows, 1)
        np.testing.assert_allclose(few.blocks, moment.blocks)
        usual = output_spectra(kernel, moment)
        factors = factorize_outputs(kernel, moment, 1, 5)
        monkeypatch.setattr(moments, "WIDE_SIDE", channels)
        for k in (1, 2):
            found = output_spectra(kernel, few).slices[k]
            np.testing.assert_allclose(
                found.residual_energy,
                usual.slices[k].residual_energy,
                atol=2e-3 * usual.energy,
            )
        again = factorize_outputs(kernel, few, 1, 5)
        errors = [output_error(kernel, recompose(*f, 1), moment) for f in (factors, again)]
        assert errors[1] == pytest.approx(errors[0], rel=1e-3)

    def test_many_are_the_same_bit_for_bit(self, rng):
        kernels = [kernel_of(rng), rng.standard_normal((CHANNELS, 5))]
        moments = [moment_of(inputs_of(rng)), moment_of(inputs_of(rng, n=CHANNELS))]
        for one, kernel, moment in zip(
            output_spectra_many(kernels, moments), kernels, moments, strict=True
        ):
            again = output_spectra(kernel, moment)
            for k in again.slices:
                np.testing.assert_array_equal(
                    one.slices[k].residual_energy, again.slices[k].residual_energy
                )

    def test_make_a_table_of_choices(self, rng):
        spectra = output_spectra(kernel_of(rng), moment_of(inputs_of(rng)))
        table = choice_table(spectra, error_measure="energy")
        assert {row.slices for row in table} >= {0, 1, 2, 4}
        assert all(0 <= row.error <= 1 + 1e-9 for row in table if row.slices == 1)


class TestFactors:
    @pytest.mark.parametrize("rank", [1, 3, 7])
    def test_one_slice_loses_what_its_spectrum_says(self, rng, rank):
        kernel, rows = kernel_of(rng), inputs_of(rng)
        moment = moment_of(rows)
        encoder, decoder = factorize_outputs(kernel, moment, 1, rank)
        spectra = output_spectra(kernel, moment)
        promised = spectra.slices[1].residual_energy[rank] / spectra.energy
        assert output_error(kernel, recompose(encoder, decoder, 1), moment) == pytest.approx(
            promised, rel=1e-6
        )
        assert lost(kernel, encoder, decoder, 1, rows) == pytest.approx(promised, rel=1e-3)

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 10**6), rank=st.integers(1, 9))
    def test_no_pair_of_that_rank_is_better_for_one_slice(self, seed, rank):
        rng = np.random.default_rng(seed)
        kernel, rows = kernel_of(rng), inputs_of(rng)
        moment = moment_of(rows)
        encoder, decoder = factorize_outputs(kernel, moment, 1, rank)
        best = output_error(kernel, recompose(encoder, decoder, 1), moment)
        for size in (1e-4, 1e-2, 1.0):
            moved = encoder + size * rng.standard_normal(encoder.shape)
            other = decoder + size * rng.standard_normal(decoder.shape)
            assert output_error(kernel, recompose(moved, other, 1), moment) >= best
            # A moved encoder with its own best decoder
            E = unfold(moved, 1)
            refitted = refit_decoder(E, unfold(kernel, 1), moment)[0]
            assert output_error(kernel, recompose(moved, refitted, 1), moment) >= best * (1 - 1e-9)

    @pytest.mark.parametrize(("k", "rank"), [(1, 4), (2, 1), (2, 4), (4, 2), (8, 2), (8, 5)])
    def test_refit_is_never_worse_than_the_slices_alone(self, rng, k, rank):
        kernel, rows = kernel_of(rng), inputs_of(rng)
        moment = moment_of(rows)
        encoder, decoder = factorize_outputs(kernel, moment, k, rank)
        alone = np.concatenate(
            [
                whitened_truncation(W, moment.slice_block(k, i), rank)
                for i, W in enumerate(unfold(kernel, k))
            ]
        )
        kept = np.moveaxis(alone.reshape(CHANNELS, *SIZE, FILTERS), 0, -2)
        found = output_error(kernel, recompose(encoder, decoder, k), moment)
        assert found <= output_error(kernel, kept, moment) * (1 + 1e-9)
        assert found <= output_error(kernel, recompose(*factorize(kernel, k, rank), k), moment)

    @pytest.mark.parametrize(("k", "rank"), [(2, 4), (4, 2), (8, 2)])
    def test_sweeps_lower_the_error(self, rng, k, rank):
        mixed = inputs_of(rng) @ rng.standard_normal((N, N)) ** 3
        kernel, moment = kernel_of(rng), moment_of(mixed)
        errors = [
            output_error(
                kernel,
                recompose(*factorize_outputs(kernel, moment, k, rank, sweeps=sweeps), k),
                moment,
            )
            for sweeps in (0, 1, 2, 8)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[2] < errors[0]

    def test_refit_is_least_squares(self, rng):
        kernel, rows = kernel_of(rng), inputs_of(rng)
        E = rng.standard_normal((4, N // 4, 2))
        D = refit_decoder(E, unfold(kernel, 4), moment_of(rows)).reshape(8, FILTERS)
        hidden = np.concatenate(
            [part @ e for part, e in zip(np.split(rows, 4, axis=1), E, strict=True)], axis=1
        )
        expected = np.linalg.lstsq(hidden, rows @ unfold(kernel, 1)[0], rcond=None)[0]
        np.testing.assert_allclose(D, expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())

    @pytest.mark.parametrize("k", divisors(CHANNELS))
    def test_full_rank_loses_nothing(self, rng, k):
        kernel = kernel_of(rng).astype("float32")
        moment = moment_of(inputs_of(rng))
        encoder, decoder = factorize_outputs(kernel, moment, k, full_rank(kernel.shape, k))
        assert encoder.dtype == decoder.dtype == np.float32
        np.testing.assert_allclose(recompose(encoder, decoder, k), kernel, atol=2e-4)

    @pytest.mark.parametrize("k", [1, 2, 8])
    def test_pairs_are_balanced(self, rng, k):
        rank = 3
        encoder, decoder = factorize_outputs(kernel_of(rng), moment_of(inputs_of(rng)), k, rank)
        left = unfold(encoder, 1)[0]
        for i in range(k):
            columns = left[:, i * rank : (i + 1) * rank]
            rows = decoder[i * rank : (i + 1) * rank]
            np.testing.assert_allclose(columns.T @ columns, rows @ rows.T, atol=1e-8)
            assert (columns[np.abs(columns).argmax(0), np.arange(rank)] > 0).all()


def whitened_truncation(W, S, rank):
    """The textbook way: eigenvectors of S, SVD of C W, and back by C⁻¹."""
    values, vectors = np.linalg.eigh(S)
    root = np.sqrt(values)[:, None] * vectors.T
    U, sigma, V = np.linalg.svd(root @ W, full_matrices=False)
    return np.linalg.solve(root, (U[:, :rank] * sigma[:rank]) @ V[:rank])


class TestRankDeficientMoments:
    CASES = (
        ("dead channels", lambda rng: inputs_of(rng) * np.repeat([1, 0, 0, 1, 1, 0, 1, 0], KAPPA)),
        ("constant inputs", lambda rng: np.full((300, N), 3.0)),
        ("fewer inputs than dimensions", lambda rng: inputs_of(rng, 9)),
        ("zeros", lambda rng: np.zeros((20, N))),
        ("relu", lambda rng: np.maximum(inputs_of(rng), 0)[:, :1] * np.ones(N)),
    )

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
    @pytest.mark.parametrize("k", divisors(CHANNELS))
    def test_give_finite_factors_that_keep_what_the_data_show(self, rng, case, k):
        rows, kernel = case[1](rng), kernel_of(rng)
        moment = moment_of(rows)
        spectra = output_spectra(kernel, moment)
        curve = spectra.slices[k].residual_energy
        assert np.isfinite(curve).all()
        assert (np.diff(curve) <= 0).all()
        for rank in (1, 4, full_rank(kernel.shape, k)):
            encoder, decoder = factorize_outputs(kernel, moment, k, rank)
            assert np.isfinite(encoder).all()
            assert np.isfinite(decoder).all()
        seen = min(np.linalg.matrix_rank(rows), rank)
        if 0 < seen <= 4:
            encoder, decoder = factorize_outputs(kernel, moment, k, min(4, rank))
            assert lost(kernel, encoder, decoder, k, rows) < 1e-3

    @pytest.mark.parametrize("k", divisors(CHANNELS))
    def test_kernel_of_zeros(self, rng, k):
        moment = moment_of(inputs_of(rng))
        kernel = np.zeros((*SIZE, CHANNELS, FILTERS))
        encoder, decoder = factorize_outputs(kernel, moment, k, 2)
        assert not encoder.any() or not decoder.any()
        assert np.isfinite(encoder).all()
        assert choice_table(output_spectra(kernel, moment), error_measure="energy").error.max() == 0


class TestArguments:
    def test_moment_of_another_layer(self, rng):
        for function in (
            lambda m: output_spectra(kernel_of(rng), m),
            lambda m: factorize_outputs(kernel_of(rng), m, 1, 1),
        ):
            with pytest.raises(ValueError, match=r"48 unfolded inputs.*Received: blocks.shape="):
                function(moment_of(inputs_of(rng, n=12)))

    def test_rank_and_shapes(self, rng):
        moment = moment_of(inputs_of(rng))
        for rank in (0, 11):
            with pytest.raises(ValueError, match=f"rank from 1 to 10.*Received: rank={rank}"):
                factorize_outputs(kernel_of(rng), moment, 1, rank)
        with pytest.raises(ValueError, match="blocks of a second moment"):
            SecondMoment(np.eye(3), 1)
        with pytest.raises(ValueError, match="approximation of shape"):
            output_error(kernel_of(rng), np.zeros((2, 2)), moment)

    def test_methods(self):
        assert choose_method(None, has_data=False) == "synthetic"
        assert choose_method(None, has_data=True) == "activation"
        for name, data in itertools.product(("alds", "energy", "activation"), (False, True)):
            if get_method(name).needs_data == data:
                assert choose_method(name, has_data=data) == name
                continue
            with pytest.raises(ValueError, match="calibration_data"):
                choose_method(name, has_data=data)
        with pytest.raises(ValueError, match="Received: error_measure='slice'"):
            get_method("activation", "slice")
