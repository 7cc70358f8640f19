"""Narrower heads against singular values of whole products."""

from __future__ import annotations

import numpy as np
import pytest

from keras_alds.core.heads import Contexts, Scores

rng = np.random.default_rng(0)


def root(side):
    """C of a second moment CᵀC."""
    return rng.standard_normal((2 * side, side)) * np.linspace(0.1, 2, side)


@pytest.mark.parametrize("repeats", [1, 3])
def test_scores_are_the_best_of_their_rank(repeats):
    """Of one head of keys, and several of queries, that see inputs of different sizes."""
    width = 4
    query, key = rng.standard_normal((repeats, 7, width)), rng.standard_normal((5, width))
    c_query, c_key = root(7), root(5)
    products = np.concatenate([c_query @ q @ key.T @ c_key.T for q in query])
    squares = np.linalg.svd(products, compute_uv=False) ** 2
    queries = sum(q.T @ c_query.T @ c_query @ q for q in query)
    scores = Scores(queries[None], (key.T @ c_key.T @ c_key @ key)[None])
    for rank in range(width + 1):
        of_query, of_key = (maps[0] for maps in scores.maps(rank))
        mine = np.concatenate([c_query @ q @ of_query @ (key @ of_key).T @ c_key.T for q in query])
        error = np.square(products - mine).sum() / np.square(products).sum()
        assert error == pytest.approx(squares[rank:].sum() / squares.sum(), abs=1e-12)
        assert scores.errors[rank] == pytest.approx(error, abs=1e-12)


def test_scores_of_heads_that_are_narrower_already():
    """Fewer inputs than columns: the second moments are singular."""
    key = rng.standard_normal((2, 4))
    queries = rng.standard_normal((3, 4))
    scores = Scores((queries.T @ queries)[None], (key.T @ key)[None])
    assert scores.errors[2:] == pytest.approx(0, abs=1e-12)
    of_query, of_key = (maps[0] for maps in scores.maps(2))
    np.testing.assert_allclose(queries @ of_query @ (key @ of_key).T, queries @ key.T, atol=1e-9)
    assert Scores(np.zeros((1, 2, 2)), np.zeros((1, 2, 2))).errors.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 3), (4, 2)])
def test_contexts(heads, groups):
    """One head is the best of its rank; D is that of least squares for all heads together."""
    width, outputs = 4, 6
    c, kernel = root(heads * width), rng.standard_normal((heads * width, outputs))
    contexts = Contexts(c.T @ c, kernel, heads, groups)
    whole = c @ kernel
    squares = np.linalg.svd(whole, compute_uv=False) ** 2
    for rank in range(1, width + 1):
        maps, decoder = contexts.maps(rank)
        assert maps.shape == (groups, width, rank)
        encoder = np.zeros((heads * width, heads * rank))
        for head in range(heads):
            rows, columns = (slice(head * n, (head + 1) * n) for n in (width, rank))
            encoder[rows, columns] = maps[head * groups // heads]
        least = np.linalg.lstsq(c @ encoder, whole, rcond=None)[0]
        np.testing.assert_allclose(encoder @ decoder, encoder @ least, atol=2e-3)
        error = np.square(whole - c @ encoder @ decoder).sum() / squares.sum()
        assert contexts.errors[rank] == pytest.approx(error, abs=1e-6)
        if heads == 1:
            assert error == pytest.approx(squares[rank:].sum() / squares.sum(), abs=1e-6)
    assert contexts.errors[0] == 1
