"""Narrower heads of attention, in closed form.

The heads of attention multiply a query q = W_qᵀ x and a key k = W_kᵀ y of the same head, and sum
values v = W_vᵀ y into a context c, which a part W_o of the output projection takes. Both products
have ranks at most as large as the head's width. Linear maps E within the heads lower them:

    qᵀ k ≈ (qᵀ E_q)(kᵀ E_k)ᵀ  (`Scores`),  cᵀ W_o ≈ (cᵀ E) D  (`Contexts`)

E becomes a part of the projection before, so the layer only gets narrower. The best maps need just
the second moments of q, k and c within a head: for every approximation of a smaller rank, the best
one in the norm of the inputs, C_x W_q W_kᵀ C_yᵀ with C_xᵀ C_x = E[x xᵀ], is of this form.

Several heads of queries may share a head of keys and values; these are a group.

Source: Wong et al., "A3: an Analytical Low-Rank Approximation Framework for Attention", 2025
(arXiv 2505.12942), sections 3.1 and 3.2.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from keras_alds.core.calibration.semidefinite import solve
from keras_alds.core.slicing import Array
from keras_alds.core.spectra import Float64

# Eigenvalues below this part of the largest one are rounding. What is divided by their roots is
# known to `_JITTER` of its size.
_RESOLUTION, _JITTER = 1e-9, 1e-7


class Scores:
    """The products of queries and keys, for all widths of the heads.

    Args:
        queries: Second moments of the queries of a head, `[g, n, n]` for g heads of keys of width
            n. Of several heads of queries for one of keys it is the sum.
        keys: Second moments of the keys, or better their covariances: a constant in all keys adds
            the same to all scores of a query, which softmax ignores. `[g, n, n]`.

    Attributes:
        errors: Relative squared error of the products for the widths 0 to n, `[n + 1]`.

    Example:
        >>> scores = Scores(np.diag([4.0, 1.0])[None], np.eye(2)[None])
        >>> scores.errors.round(3).tolist()
        [1.0, 0.2, 0.0]
    """

    def __init__(self, queries: Float64, keys: Float64) -> None:
        self._root, self._inverse = _roots(keys)
        squares, self._vectors = _leading(self._root @ queries @ self._root)
        self.errors = _tails(squares.sum(axis=0))
        least = np.maximum(squares.max(axis=-1, keepdims=True) * _RESOLUTION, np.finfo(float).tiny)
        self._scales = np.maximum(squares, least) ** 0.25

    def maps(self, width: int) -> tuple[Float64, Float64]:
        """The maps E_q and E_k, `[g, n, width]`. Both products have the same second moments."""
        vectors, scales = self._vectors[..., :width], self._scales[:, None, :width]
        return self._root @ vectors / scales, self._inverse @ vectors * scales


class Contexts:
    """The products of contexts and the output projection, for all widths of the heads.

    Args:
        moment: Second moment of the contexts of all h heads side by side, `[h·n, h·n]`.
        kernel: The output projection, `[h·n, f]`.
        heads: Number h of heads of contexts.
        groups: Number of heads of values; each serves h / groups heads of contexts in a row.

    Attributes:
        errors: Relative squared error of the outputs for the widths 0 to n, `[n + 1]`.

    Example:
        >>> contexts = Contexts(np.diag([4.0, 1.0]), np.eye(2), heads=1, groups=1)
        >>> contexts.errors.round(3).tolist()
        [1.0, 0.2, 0.0]
    """

    def __init__(self, moment: Float64, kernel: Array, heads: int, groups: int) -> None:
        n = len(kernel) // heads
        values, axes = np.linalg.eigh(moment)
        moment = axes * np.maximum(values, 0.0) @ axes.T  # of few inputs, sums are rounded
        blocks = moment.reshape(heads, n, heads, n)[np.arange(heads), :, np.arange(heads)]
        parts = kernel.reshape(heads, n, -1).astype(np.float64)
        root, inverse = _roots(blocks.reshape(groups, -1, n, n).mean(axis=1))
        grams = (parts @ parts.transpose(0, 2, 1)).reshape(groups, -1, n, n).sum(axis=1)
        squares, vectors = _leading(root @ grams @ root)
        self._heads, self._maps = heads, inverse @ vectors
        every = np.repeat(self._maps, heads // groups, axis=0)
        # Columns are ordered by rank, so that smaller widths are leading parts.
        side = moment.reshape(-1, heads, n)
        mixed = np.einsum("ihn,hnr->irh", side, every).reshape(len(moment), -1)
        self._gram = np.einsum("hni,hnr->rhi", mixed.reshape(heads, n, -1), every)
        self._gram = self._gram.reshape(mixed.shape[1], -1)
        self._gram[np.diag_indices(len(self._gram))] += _JITTER
        self._right = mixed.T @ kernel
        lower = np.linalg.cholesky(self._gram)
        explained = scipy.linalg.solve_triangular(lower, self._right, lower=True)
        squares = np.square(explained).reshape(n, -1).sum(axis=1)
        total = float(np.vdot(kernel, moment @ kernel))
        left = np.append(total, total - np.cumsum(squares)) / (total or 1.0)
        self.errors = np.maximum(left, 0.0)
        self.errors[-1] = 0.0

    def maps(self, width: int) -> tuple[Float64, Float64]:
        """The maps E, `[g, n, width]`, and the output projection D for them, `[h·width, f]`."""
        size = width * self._heads
        decoder = solve(self._gram[:size, :size], self._right[:size])
        decoder = decoder.reshape(width, self._heads, -1).transpose(1, 0, 2)
        groups = len(self._maps)
        grouped = decoder.reshape(groups, self._heads // groups, width, -1)
        norms = np.sqrt(np.square(grouped).sum(axis=(1, 3)))
        scales = np.sqrt(np.where(norms > 0, norms, 1.0))
        decoder = (grouped / scales[:, None, :, None]).reshape(self._heads * width, -1)
        return self._maps[..., :width] * scales[:, None], decoder


def _roots(matrices: Float64) -> tuple[Float64, Float64]:
    """The symmetric roots of positive semidefinite matrices, and their pseudoinverses."""
    values, vectors = np.linalg.eigh((matrices + np.swapaxes(matrices, -1, -2)) / 2)
    known = values > values.max(axis=-1, keepdims=True) * _RESOLUTION
    roots = np.sqrt(np.where(known, values, 0.0))[..., None, :]
    inverses = np.where(known[..., None, :], 1 / np.where(roots > 0, roots, 1.0), 0.0)
    turned = np.swapaxes(vectors, -1, -2)
    return vectors * roots @ turned, vectors * inverses @ turned


def _leading(matrices: Float64) -> tuple[Float64, Float64]:
    """Eigenvalues, descending and not negative, and eigenvectors."""
    values, vectors = np.linalg.eigh((matrices + np.swapaxes(matrices, -1, -2)) / 2)
    return np.maximum(values[..., ::-1], 0.0), vectors[..., ::-1]


def _tails(squares: Float64) -> Float64:
    """The part of a sum that is left after its first 0, 1, … terms."""
    sums = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return sums / (sums[0] or 1.0)
