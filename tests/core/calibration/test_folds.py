"""Fold schemes on data: errors and factors against the patches themselves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from keras_alds.core.calibration import moments
from keras_alds.core.calibration.accumulators import MomentAccumulator
from keras_alds.core.calibration.held_out import held_out_spectra_many
from keras_alds.core.calibration.moments import RIDGE, SecondMoment
from keras_alds.core.calibration.refit import factorize_outputs, output_error
from keras_alds.core.slicing import (
    convolution_unfolding,
    decoder_axes,
    full_rank,
    recompose,
    weights,
)

WINDOW, CHANNELS, FILTERS = (3, 2), 6, 5


@pytest.fixture(params=["sums", "few inputs", "blocks"])
def data(request, monkeypatch):
    """Patches `[m, κ, c]`, their moment with the last quarter held out, and a kernel."""
    kappa = WINDOW[0] * WINDOW[1]
    count = {"sums": 800, "few inputs": 24, "blocks": 800}[request.param]
    if request.param == "few inputs":
        monkeypatch.setattr(moments, "WIDE_SIDE", 2)
    if request.param == "blocks":
        monkeypatch.setattr(moments, "MAX_SIDE", 3 * kappa)
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((count, kappa, CHANNELS))
    patches += 0.8 * np.roll(patches, 1, axis=1) + patches.mean(axis=2, keepdims=True)
    parts = []
    for part in np.split(patches, [3 * count // 4]):
        accumulator = MomentAccumulator(CHANNELS, kappa)
        accumulator.add(part)
        parts.append(accumulator.moment())
    moment = parts[0].with_held_out(parts[1]).with_ridge(1e-2)
    assert moment.block_count == (2 if request.param == "blocks" else 1)
    assert isinstance(moment, moments.FewInputs) == (request.param == "few inputs")
    return patches, moment, rng.standard_normal((*WINDOW, CHANNELS, FILTERS))


def schemes():
    for scheme in (1, 2, 3):
        yield scheme, convolution_unfolding(2, scheme), decoder_axes(scheme, 2)


@pytest.mark.parametrize("held_out", [True, False])
def test_table_errors_are_those_of_the_factors(data, held_out):
    _, moment, kernel = data
    moment = moment if held_out else moment.without_held_out()
    compared = 0
    for _, unfolding, axes in schemes():
        read, folded = unfolding.read(kernel), moment.folded(WINDOW, axes)
        (found,) = held_out_spectra_many([read], [folded])
        judge = folded.held_out.with_ridge(RIDGE) if held_out else folded
        for k, curve in found.slices.items():
            for rank in range(full_rank(read.shape, k)):
                if rank and weights(read.shape, k, rank) >= read.size:
                    break
                approximation = np.zeros_like(read)
                if rank:
                    fit = folded.without_held_out()
                    factors = factorize_outputs(read, fit, k, rank, sweeps=0)
                    approximation = recompose(*factors, k)
                expected = output_error(read, approximation, judge)
                got = curve.residual_energy[rank] / found.energy
                assert got == pytest.approx(expected, rel=1e-6, abs=1e-9)
                compared += 1
    assert compared > 15


def test_output_errors_are_those_on_the_patches(data):
    """In every scheme, also where only blocks of the moment are known: then of the blocks."""
    patches, moment, kernel = data
    rng = np.random.default_rng(1)
    other = rng.standard_normal(kernel.shape)
    rows = patches.reshape(len(patches), *WINDOW, CHANNELS)
    wanted = 0.0, 0.0
    each = CHANNELS // moment.block_count
    for first in range(0, CHANNELS, each):
        part = slice(first, first + each)
        seen, inside = rows[..., part], (slice(None), slice(None), part)
        squares = [
            np.square(np.einsum("mabc,abcf->mf", seen, array[inside])).sum(axis=1).mean()
            + moment.ridge * np.square(array[inside]).sum()
            for array in (kernel - other, kernel)
        ]
        wanted = wanted[0] + squares[0], wanted[1] + squares[1]
    for _, unfolding, axes in schemes():
        folded = moment.folded(WINDOW, axes)
        error = output_error(unfolding.read(kernel), unfolding.read(other), folded)
        assert error == pytest.approx(wanted[0] / wanted[1], rel=1e-6)


def test_fitting_in_turn_lowers_the_error(data):
    _, moment, kernel = data
    for (_, unfolding, axes), slices in itertools.product(schemes(), (2, 6)):
        read, folded = unfolding.read(kernel), moment.folded(WINDOW, axes)
        if full_rank(read.shape, slices) == 1:
            continue

        def error(sweeps, read=read, folded=folded, slices=slices):
            factors = factorize_outputs(read, folded, slices, 1, sweeps=sweeps)
            return output_error(read, recompose(*factors, slices), folded)

        errors = [error(sweeps) for sweeps in (0, 1, 2, 30)]
        assert errors == sorted(errors, reverse=True)
        assert errors[1] < errors[0]


def test_the_best_factors_of_a_small_layer():
    """Against exact least squares in turn from many starts."""
    rng = np.random.default_rng(0)
    root = rng.standard_normal((8, 8))
    moment = SecondMoment((root @ root.T)[None], 100)
    kernel = rng.standard_normal((2, 2, 2, 3))
    unfolding = convolution_unfolding(2, 1)
    folded = moment.folded((2, 2), (0,))
    read = unfolding.read(kernel)
    factors = factorize_outputs(read, folded, 1, 1, sweeps=200)
    found = output_error(read, recompose(*factors, 1), folded)

    def alternated(E):
        """Decoder and encoder in turn, with the encoder's Kronecker product written out."""
        S = folded.matrix(0).part(0, 8) + folded.ridge * np.eye(8)
        C = np.linalg.cholesky(S).T
        W = np.moveaxis(read.reshape(2, 2, 2, 3), 2, 0)  # encoder axis, channel, decoder axis, f
        W = np.stack([np.moveaxis(W[p], 0, 1).reshape(4, 3) for p in range(2)]).reshape(8, 3)
        for _ in range(100):
            left = np.kron(np.eye(2), E[:, None])
            D = np.linalg.lstsq(C @ left, C @ W, rcond=None)[0]
            system = np.concatenate([C @ np.kron(D[:, [f]], np.eye(4)) for f in range(3)])
            E = np.linalg.lstsq(system, (C @ W).T.ravel(), rcond=None)[0]
        rest = C @ (W - np.kron(np.eye(2), E[:, None]) @ D)
        return np.square(rest).sum() / np.square(C @ W).sum()

    best = min(alternated(rng.standard_normal(4)) for _ in range(10))
    assert found == pytest.approx(best, rel=1e-4)


def test_scheme_0_and_bad_windows(data):
    _, moment, _ = data
    assert moment.folded(WINDOW, ()) is moment
    with pytest.raises(ValueError, match="blocks of a multiple of 35 rows"):
        moment.folded((5, 7), (0,))
    with pytest.raises(ValueError, match="Received: 3 positions"):
        moment.folded(WINDOW, (0,)).folded(WINDOW, (0,))
