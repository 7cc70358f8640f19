"""Fold schemes of kernels in NumPy: unfoldings, spectra, tables, and the choice among all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_alds.core.choices import choice_table, join_tables
from keras_alds.core.costs import WeightCosts
from keras_alds.core.errors import ERRORS
from keras_alds.core.slicing import (
    SCHEMES,
    convolution_unfolding,
    decoder_axes,
    distinct_schemes,
    divisors,
    factor_weights,
    full_rank,
    weights,
)
from keras_alds.core.spectra import factorize, spectra
from keras_alds.methods import METHODS

# The paper's supplement, as einsum letters: rows × columns of the matrix of one slice.
MATRICES = {0: ("cab", "f"), 1: ("cb", "af"), 2: ("ca", "bf"), 3: ("c", "abf")}


def kernel_of(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def matrices_of(kernel, scheme, slices):
    """The unfolded slices of `[kh, kw, c, f]`, by the paper's definition."""
    rows, columns = MATRICES[scheme]
    found = []
    for part in np.split(kernel, slices, axis=2):
        sizes = dict(zip("abcf", part.shape, strict=True))
        matrix = np.einsum(f"abcf->{rows}{columns}", part)
        found.append(matrix.reshape(np.prod([sizes[a] for a in rows]), -1))
    return found


def tables_of(kernel, schemes=SCHEMES, *, units=None, **options):
    """One table a scheme; `units` are the costs of an encoder's weight, in scheme 0 of all."""
    read = {scheme: convolution_unfolding(2, scheme).read(kernel) for scheme in schemes}
    unit = {} if units is None else units
    forms = [(scheme, each.shape, unit.get(scheme, 1)) for scheme, each in read.items()]
    costs = WeightCosts(tuple(forms), unit.get(0, 1))
    return [
        choice_table(spectra(each), costs=[costs], kernel=each, scheme=scheme, **options)
        for scheme, each in read.items()
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("slices", [1, 2, 6])
def test_spectra_are_those_of_the_papers_matrices(scheme, slices):
    kernel = kernel_of((3, 2, 6, 5))
    found = spectra(convolution_unfolding(2, scheme).read(kernel))
    values = [np.linalg.svd(m, compute_uv=False) for m in matrices_of(kernel, scheme, slices)]
    spectrum = found.slices[slices]
    assert spectrum.rank == values[0].size == full_rank(found.kernel_shape, slices)
    largest = [max(v[j] for v in values) for j in range(values[0].size)]
    np.testing.assert_allclose(spectrum.residual_norm[:-1], largest, rtol=1e-6)
    dropped = [sum((v[j:] ** 2).sum() for v in values) for j in range(values[0].size)]
    np.testing.assert_allclose(spectrum.residual_energy[:-1], dropped, rtol=1e-6)
    whole = np.linalg.svd(matrices_of(kernel, scheme, 1)[0], compute_uv=False)
    np.testing.assert_allclose(found.norm, whole[0], rtol=1e-9)
    np.testing.assert_allclose(found.energy, (kernel**2).sum(), rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_factors_hold_the_best_approximation_of_every_slice(data):
    window = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    c, f = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    scheme = data.draw(st.sampled_from(SCHEMES))
    slices = data.draw(st.sampled_from(divisors(c)))
    kernel = kernel_of((*window, c, f), data.draw(st.integers(0, 99)))
    unfolding = convolution_unfolding(2, scheme)
    read = unfolding.read(kernel)
    rank = data.draw(st.integers(1, full_rank(read.shape, slices)))
    encoder, decoder = factorize(read, slices, rank)
    assert (encoder.size, decoder.size) == factor_weights(read.shape, slices, rank)
    assert encoder.size + decoder.size == weights(read.shape, slices, rank)
    moved = decoder_axes(scheme, 2)
    own = [1 if axis in moved else size for axis, size in enumerate(window)]
    theirs = [size if axis in moved else 1 for axis, size in enumerate(window)]
    left = encoder.reshape(*own, c // slices, slices, rank)
    right = unfolding.write_decoder(decoder, kernel.shape).reshape(*theirs, slices, rank, f)
    both = (
        np.broadcast_to(left, (*window, *left.shape[2:])),
        np.broadcast_to(right, (*window, *right.shape[2:])),
    )
    product = np.einsum("abckj,abkjf->abkcf", *both).reshape(kernel.shape)
    for part, want in zip(
        matrices_of(product, scheme, slices), matrices_of(kernel, scheme, slices), strict=True
    ):
        u, s, v = np.linalg.svd(want, full_matrices=False)
        np.testing.assert_allclose(part, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-6)


def test_schemes_that_coincide_count_once():
    """Two schemes are the same where their matrices are, whatever the kernel holds."""
    for window in itertools.product((1, 2, 3), repeat=2):
        kernel = kernel_of((*window, 2, 3))
        found = distinct_schemes(window)
        assert set(found) == set(SCHEMES)
        for scheme, first in found.items():
            assert first <= scheme
            assert found[first] == first
            a, b = (matrices_of(kernel, s, 1)[0] for s in (scheme, first))
            np.testing.assert_array_equal(a, b)
        shapes = [matrices_of(kernel, s, 1)[0].shape for s in set(found.values())]
        assert len(set(shapes)) == len(shapes) or window[0] == window[1] > 1
    assert set(distinct_schemes((3, 3, 3))) == {0, 3}
    with pytest.raises(ValueError, match=r"one of \(0, 3\). Received: scheme=1"):
        decoder_axes(1, 3)
    with pytest.raises(ValueError, match=r"one of \(0,\). Received: scheme=3"):
        decoder_axes(3, 0)


@pytest.mark.parametrize("error", ERRORS)
def test_one_table_holds_the_choices_of_all_schemes(error):
    kernel = kernel_of((3, 2, 4, 6))
    units = {0: 7, 1: 9, 2: 21, 3: 40}
    tables = tables_of(kernel, error_measure=error, units=units)
    table = join_tables(tables)
    rows = {(r.scheme, r.slices, r.rank): r for r in table}
    expected = {(0, 0, 0)}
    for scheme in SCHEMES:
        first = next(iter(matrices_of(kernel, scheme, 1)))
        sigma = np.linalg.svd(first, compute_uv=False)[0]
        for k in divisors(4):
            parts = matrices_of(kernel, scheme, k)
            values = np.stack([np.linalg.svd(m, compute_uv=False) for m in parts])
            for j in range(1, values.shape[1] + 1):
                encoder = parts[0].shape[0] * k * j
                decoder = k * j * parts[0].shape[1]
                cost = units[scheme] * encoder + 7 * decoder
                if encoder + decoder >= kernel.size or cost >= 7 * kernel.size:
                    continue
                expected.add((scheme, k, j))
                row = rows[scheme, k, j]
                assert (row.weights, row.cost) == (encoder + decoder, (cost,))
                dropped = (values[:, j:] ** 2).sum()
                top = values[:, j].max() if j < values.shape[1] else 0.0
                residual = np.concatenate(
                    [u[:, j:] * s[j:] @ v[j:] for u, s, v in map(_svd, parts)]
                )
                want = {
                    "slice": top / sigma,
                    "bound": np.sqrt(k) * top / sigma,
                    "spectral": np.linalg.norm(residual, 2) / sigma,
                    "energy": dropped / (kernel**2).sum(),
                    "residual": dropped,
                }[error]
                np.testing.assert_allclose(row.error, want, rtol=1e-5, atol=1e-7)
    assert set(rows) == expected
    assert len(table) == len(rows)
    assert (np.diff(table.cost[:, 0]) >= 0).all()
    assert join_tables(tables[:1]) is tables[0]


def _svd(matrix):
    return np.linalg.svd(matrix, full_matrices=False)


def test_equal_choices_are_taken_in_the_least_scheme():
    kernel = np.ones((3, 3, 2, 2))  # of rank one in every scheme
    table = join_tables(tables_of(kernel, schemes=(3, 2, 1, 0), error_measure="energy"))
    cheapest = table.front()[0]
    same = [r for r in table if (r.cost, r.error) == (cheapest.cost, cheapest.error)]
    assert len(same) > 1
    assert cheapest.scheme == min(row.scheme for row in same)


def test_tables_of_several_kernels_are_refused():
    with pytest.raises(ValueError, match="tables of one kernel"):
        join_tables([*tables_of(kernel_of((3, 3, 2, 2))), *tables_of(kernel_of((3, 3, 4, 2)))])
    with pytest.raises(ValueError, match="tables of one kernel"):
        join_tables([])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [0.5, 0.7, 0.9])
def test_the_best_of_all_schemes(seed, budget):
    """Both solvers against every combination of choices of two layers."""
    kernels = kernel_of((3, 2, 4, 6), seed), kernel_of((3, 3, 4, 5), seed + 50)
    units = {0: 3, 1: 4, 2: 5, 3: 9}
    limit = int(budget * 3 * sum(kernel.size for kernel in kernels))
    for name in ("energy", "alds"):
        method = METHODS[name]
        options = {"error_measure": method.error_measure, "units": units}
        tables = [join_tables(tables_of(kernel, **options)) for kernel in kernels]
        total = max if name == "alds" else sum
        best = min(
            total((a.error, b.error))
            for a, b in itertools.product(*tables)
            if a.cost[0] + b.cost[0] <= limit
        )
        solution = method.solve(tables, [limit])
        rows = [table[i] for table, i in zip(tables, solution.indices, strict=True)]
        assert sum(row.cost[0] for row in rows) <= limit
        np.testing.assert_allclose(total(row.error for row in rows), best, rtol=1e-9)
