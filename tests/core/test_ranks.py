"""Stable, effective and energy ranks against singular values of NumPy, and when they settle."""

from __future__ import annotations

import numpy as np
import pytest

from keras_alds.core.ranks import Ranks, Settling, ranks_of
from keras_alds.core.spectra import spectra

RNG = np.random.default_rng(0)


def by_definition(matrix, share):
    """The ranks as the papers define them, one singular value after the other."""
    s = np.linalg.svd(matrix, compute_uv=False)
    p = s / s.sum()
    entropy = -sum(x * np.log(x) for x in p if x > 0)
    squares = s**2
    j = next(n for n in range(1, s.size + 1) if squares[:n].sum() >= share * squares.sum())
    stable = np.linalg.norm(matrix) ** 2 / np.linalg.norm(matrix, 2) ** 2
    return Ranks(min(matrix.shape), stable, np.exp(entropy), j)


@pytest.mark.parametrize(
    "matrix",
    [
        RNG.standard_normal((12, 7)),
        RNG.standard_normal((5, 9)) * 1e-170,  # whose squares are 0
        RNG.standard_normal((30, 3)) @ RNG.standard_normal((3, 20)),
        np.diag(0.5 ** np.arange(8)),
        RNG.standard_normal((6, 1)),
        np.eye(5),
    ],
    ids=["tall", "tiny", "rank 3", "decaying", "column", "identity"],
)
@pytest.mark.parametrize("share", [0.5, 0.99])
def test_ranks_are_those_of_the_definitions(matrix, share):
    found = ranks_of(np.linalg.svd(matrix, compute_uv=False), share)
    wanted = by_definition(matrix / np.abs(matrix).max(), share)
    assert (found.full, found.energy) == (wanted.full, wanted.energy)
    assert found.stable == pytest.approx(wanted.stable)
    assert found.effective == pytest.approx(wanted.effective, rel=1e-5)


def test_the_spectra_of_a_kernel_give_the_same():
    kernel = RNG.standard_normal((3, 3, 8, 16)).astype("float32")
    values = spectra(kernel, slices=[1]).slices[1].singular_values
    matrix = kernel.transpose(2, 0, 1, 3).reshape(72, 16)
    np.testing.assert_allclose(values, np.linalg.svd(matrix, compute_uv=False), rtol=1e-5)
    assert ranks_of(values).stable == pytest.approx(by_definition(matrix, 0.99).stable, rel=1e-5)


def test_zeros_have_rank_zero():
    assert ranks_of(np.zeros(4)) == Ranks(4, 0.0, 0.0, 0)
    assert ranks_of(np.ones(1)) == Ranks(1, 1.0, 1.0, 1)


def settled_at(**layers):
    """The first index at which the ranks of some layers have settled, or None."""
    settling = Settling()
    rows = (dict(zip(layers, row, strict=True)) for row in zip(*layers.values(), strict=True))
    return next((n for n, row in enumerate(rows) if settling.add(row)), None)


def test_ranks_settle_once_they_change_by_a_percent_per_epoch():
    falling = [8 * 0.98**n for n in range(20)]
    assert settled_at(a=falling) is None
    assert settled_at(a=[8 * 0.995**n for n in range(20)]) == 5
    # Five epochs after the last change; a layer that settled before may move again.
    assert settled_at(a=falling[:4] + [5.0] * 10) == 9
    assert settled_at(a=[5.0] * 6 + [9.0, 5.0] * 4, b=falling[:4] + [5.0] * 10) == 9
    assert settled_at(a=[5.0] * 20, b=falling) is None
    # A kernel of zeros has settled, but not one that has just left zero.
    assert settled_at(a=[0.0] * 6) == 5
    assert settled_at(a=[0.0] + [1.0] * 5) is None
