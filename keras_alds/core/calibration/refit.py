"""The factors that minimize the error of a layer's outputs.

With all encoders E fixed, least squares gives the best decoder of all slices together,
D = (Eᵀ S E)⁻¹ Eᵀ S W, and an SVD of every E_i D_i gives both factors the same scale. Before that,
every slice is refitted, by the SVD of `whitening`, to the residual of all others. In the fold
schemes 1 to 3, where one encoder serves several positions, encoders and decoders are fitted in turn
instead: the encoders by preconditioned conjugate gradients.

Sources: BALF (arXiv 2509.25136) for the whitening; Zhang et al., "Accelerating Very Deep
Convolutional Networks", TPAMI 2016 (arXiv 1505.06798), for reconstructing outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from keras_alds.core.calibration.moments import (
    SecondMoment,
    at_positions,
    check_moment,
    rows_by_position,
)
from keras_alds.core.calibration.semidefinite import Solver, solve, solver
from keras_alds.core.calibration.whitening import seen_basis, slice_spectrum
from keras_alds.core.parallel import single_threaded_blas
from keras_alds.core.slicing import Array, check_slices, fold_encoder, full_rank, unfold
from keras_alds.core.spectra import Float64

#: How often every slice's factors are refitted, given those of all other slices.
SWEEPS = 2
# Conjugate gradients: the most steps, and fewer for wide layers, by floating-point operations; and
# the part of the gradient's square that is left.
_STEPS, _MOST_WORK, _TOLERANCE = 15, 1e11, 1e-8


def factorize_outputs(
    kernel: Array, moment: SecondMoment, slices: int, rank: int, *, sweeps: int = SWEEPS
) -> tuple[Array, Array]:
    """Returns the factors of a choice (k, j) that minimize the error of a layer's outputs.

    Encoders are first fitted to every slice separately, then to every slice given the others. Then
    the decoder is refitted to all slices jointly, and every pair is balanced; see the module's
    docstring.

    Args:
        kernel: Array `[*spatial, c, f]` of floating-point numbers, as it is read in a fold scheme.
        moment: Second moment of the layer's unfolded inputs, folded in the same way.
        slices: Number of channel slices k, a divisor of c.
        rank: Rank j of every slice, from 1 to min((c/k)·κ, f).
        sweeps: How often every slice is refitted, given all others; or how often encoders and
            decoders are fitted in turn. Defaults to 2.

    Returns:
        `(encoder, decoder)` in the kernel's dtype: `[*spatial, c/k, k·j]` and `[k·j, f]`.

    Raises:
        ValueError: If `slices` does not divide c or is not a multiple of the moment's blocks,
            `rank` is out of range, or the kernel holds NaN or infinity.

    Example:
        >>> moment = SecondMoment(np.diag([4.0, 1.0, 1.0, 0.0])[None], 100)
        >>> encoder, decoder = factorize_outputs(np.eye(4), moment, 2, 1)
        >>> encoder.shape, decoder.shape
        ((2, 2), (2, 4))
    """
    kernel = check_moment(kernel, moment)
    check_slices(slices, kernel.shape[-2])
    if slices % moment.block_count:
        raise ValueError(
            f"Expected a multiple of {moment.block_count} slices, the blocks of the second "
            f"moment. Received: slices={slices}"
        )
    most = full_rank(kernel.shape, slices)
    if not 1 <= rank <= most:
        raise ValueError(
            f"Expected a rank from 1 to {most}, the full rank of a slice of a kernel of shape "
            f"{kernel.shape} in {slices} slices. Received: rank={rank}"
        )
    dtype = kernel.dtype if kernel.dtype.kind not in "biu" else np.dtype(np.float64)
    matrices = unfold(kernel, slices)
    encoder = np.empty((slices, matrices.shape[1], rank), dtype)
    decoder = np.empty((slices, rank, matrices.shape[2]), dtype)
    each = slices // moment.block_count
    with single_threaded_blas():
        # Blocks are independent, so a wide layer is never held whole in float64.
        for first in range(0, slices, each):
            part = slice(first, first + each)
            W = matrices[part].astype(np.float64)
            E = np.stack([seen_basis(w, moment, slices, first + i, rank) for i, w in enumerate(W)])
            if moment.positions > 1:
                E = _alternated(E, W, moment, first, sweeps)
            elif each > 1:
                E = _refined(E, W, moment, first, sweeps)
            encoder[part], decoder[part] = balance(E, refit_decoder(E, W, moment, first))
    return fold_encoder(encoder, kernel.shape[:-2]), decoder.reshape(slices * rank, -1)


def _refined(
    encoders: Float64, matrices: Float64, moment: SecondMoment, first: int, sweeps: int
) -> Float64:
    """The best encoders of every slice, given the factors of all others.

    Block coordinate descent on ‖C (W − E D)‖²: the target of slice i is
    T_i = W_i + S_ii⁻¹ Σ_m S_im (W_m − E_m D_m) over the other slices m, and its best
    approximation of rank j follows from the SVD of C_i T_i. The error never grows.

    Args:
        encoders: The encoders of all slices of one block of the moment, `[k/b, n/k, j]`.
        matrices: These slices, `[k/b, n/k, f]`.
        moment: Second moment of the layer's unfolded inputs.
        first: Number of the first of these slices.
        sweeps: How often every slice is refitted.
    """
    count, rows, rank = encoders.shape
    slices = moment.side // rows
    if sweeps < 1:
        return encoders
    E = encoders.copy()
    products = E @ refit_decoder(E, matrices, moment, first)
    blocks = [moment.slice_block(slices, first + i) for i in range(count)]
    rest = moment.product(slices, first, matrices - products)
    for _ in range(sweeps):
        for i, block in enumerate(blocks):
            target = products[i] + solve(block, rest.rows(i))
            E[i] = slice_spectrum(target, block, rank)[1]
            weighted = E[i].T @ block
            product = E[i] @ solve(weighted @ E[i], weighted @ target)
            rest.subtract(i, product - products[i])
            products[i] = product
    return E


def _alternated(
    encoders: Float64, matrices: Float64, moment: SecondMoment, first: int, rounds: int
) -> Float64:
    """The encoders after some rounds in which encoders and decoders are fitted in turn.

    With fixed decoders D_p of all positions p, the error is quadratic in the encoders, and its
    gradient is zero for Σ_p (S E D)_p D_pᵀ = Σ_p (S W)_p D_pᵀ. Conjugate gradients solve this
    from the present encoders on, so the error never grows. The preconditioner is the inverse of
    E ↦ S̄ E Σ_p D_p D_pᵀ with the mean S̄ of the positions' own blocks.

    Args:
        encoders: The encoders of all slices of one block of the moment, `[k/b, n/(k·p), j]`.
        matrices: These slices, `[k/b, n/(k·p), p·f]`.
        moment: Folded second moment of the layer's unfolded inputs.
        first: Number of the first of these slices.
        rounds: How many rounds.
    """
    if rounds < 1:
        return encoders
    count, positions = len(encoders), moment.positions
    slices = moment.block_count * count
    block = first // count
    rows = rows_by_position(matrices, positions)
    weighted = moment.columns(moment.block_count, block, rows)
    every, rank = positions * count, encoders.shape[-1]
    work = 2.0 * len(rows) * rank * (len(rows) + every * rank)
    steps = int(np.clip(_MOST_WORK / work, 1, _STEPS))
    solve_own = [solver(moment.encoder_block(slices, first + i)) for i in range(count)]

    def split(rows: Float64) -> Float64:
        return rows.reshape(positions, count, -1, rows.shape[-1])

    for _ in range(rounds):
        D = refit_decoder(encoders, matrices, moment, first)
        D = np.moveaxis(D.reshape(*D.shape[:2], positions, -1), 2, 0)
        transposed = D.swapaxes(-1, -2)
        solve_decoders = [solver(gram) for gram in (D @ transposed).sum(axis=0)]
        # Of each decoder with those of all positions and slices: S E comes first, as an encoder
        # has fewer columns than E D has filters.
        grams = D.reshape(every * rank, -1) @ transposed

        def image(E: Float64, grams: Float64 = grams) -> Float64:
            columns = moment.encoded(
                slices * positions, first * positions, at_positions(E, positions)
            )
            return (split(columns) @ grams).sum(0)

        def preconditioned(
            E: Float64, solve_decoders: Sequence[Solver] = solve_decoders
        ) -> Float64:
            solvers = zip(solve_own, solve_decoders, E, strict=True)
            return np.stack([decoder(own(part).T).T for own, decoder, part in solvers])

        right = (split(weighted) @ transposed).sum(0)
        solution = _conjugate_gradients(image, right, encoders, preconditioned, steps)
        encoders = np.linalg.qr(solution)[0]
    return encoders


def _conjugate_gradients(
    image: Callable[[Float64], Float64],
    right: Float64,
    start: Float64,
    preconditioned: Callable[[Float64], Float64],
    steps: int,
) -> Float64:
    """An approximate solution of image(x) = right."""
    x, rest = start, right - image(start)
    size = float(np.vdot(right, preconditioned(right)))
    direction, last = np.zeros_like(right), 0.0
    for _ in range(steps):
        improved = preconditioned(rest)
        now = float(np.vdot(rest, improved))
        if now <= _TOLERANCE * size:
            break
        direction = improved + (now / last if last else 0.0) * direction
        moved = image(direction)
        curvature = float(np.vdot(direction, moved))
        if curvature <= 0:
            break
        x = x + now / curvature * direction
        rest = rest - now / curvature * moved
        last = now
    return x


def refit_decoder(
    encoders: Float64, matrices: Float64, moment: SecondMoment, first: int = 0
) -> Float64:
    """Returns the best decoders for given encoders, fitted jointly over all slices.

    D = (Eᵀ S E)⁻¹ Eᵀ S W with the block-diagonal E of all slices: least squares on the outputs.
    Blocks of the moment are independent: all slices belong to one block. For a folded moment, the
    filters are those of all its p positions.

    Args:
        encoders: Array `[k/b, (c/k)·κ, j]` of float64.
        matrices: The unfolded kernel, `[k/b, (c/k)·κ, f]` of float64.
        moment: Second moment of the layer's unfolded inputs, in b blocks.
        first: Number of the first of these slices.

    Returns:
        Array `[k/b, j, f]`.

    Example:
        >>> moment = SecondMoment(np.eye(4)[None], 100)
        >>> basis = np.eye(4)[:, :2].reshape(1, 4, 2)
        >>> refit_decoder(basis, np.eye(4)[None], moment)[0].round(6).tolist()
        [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    """
    each, positions = len(encoders), moment.positions
    every = at_positions(encoders, positions)
    count, rows, rank = every.shape
    columns = moment.encoded(moment.side // rows, first * positions, every)
    gram = every.transpose(0, 2, 1) @ columns.reshape(count, rows, -1)
    right = columns.T @ rows_by_position(matrices, positions)
    solution = solve(gram.reshape(count * rank, -1), right)
    parts = solution.reshape(positions, each, rank, -1)
    return np.moveaxis(parts, 0, 2).reshape(each, rank, -1)


def balance(encoders: Float64, decoders: Float64) -> tuple[Float64, Float64]:
    """Gives √σ of every product E_i D_i to both factors; the product does not change.

    Args:
        encoders: Array `[k, (c/k)·κ, j]`.
        decoders: Array `[k, j, f]`.

    Returns:
        The balanced encoders and decoders; signs are fixed as in `spectra.factorize`.
    """
    left, right = np.empty_like(encoders), np.empty_like(decoders)
    for i, (encoder, decoder) in enumerate(zip(encoders, decoders, strict=True)):
        basis, triangle = np.linalg.qr(encoder)
        inner, sigma, outer = np.linalg.svd(triangle @ decoder, full_matrices=False)
        columns = basis @ inner
        peak = columns[np.abs(columns).argmax(axis=0), np.arange(sigma.size)]
        root = np.sqrt(sigma) * np.where(peak < 0, -1.0, 1.0)
        left[i], right[i] = columns * root, outer * root[:, None]
    return left, right


def output_error(kernel: Array, approximation: Array, moment: SecondMoment) -> float:
    """Returns the expected squared error of a layer's output, relative to the output's square.

    Args:
        kernel: Array `[*spatial, c, f]`.
        approximation: Array of the same shape.
        moment: Second moment of the layer's unfolded inputs.

    Returns:
        tr(Rᵀ S R) / tr(Wᵀ S W) with R = W − Ŵ and ρI in S; 0 for a kernel of zeros.

    Raises:
        ValueError: If the shapes do not match.

    Example:
        >>> moment = SecondMoment(np.diag([3.0, 1.0])[None], 100)
        >>> round(output_error(np.eye(2), np.diag([1.0, 0.0]), moment), 4)
        0.25
    """
    kernel = check_moment(kernel, moment)
    if approximation.shape != kernel.shape:
        raise ValueError(
            f"Expected an approximation of shape {kernel.shape}. "
            f"Received: approximation.shape={approximation.shape}"
        )
    rows, found = (
        np.concatenate(
            [
                rows_by_position(part[None].astype(np.float64), moment.positions)
                for part in unfold(array, moment.block_count)
            ]
        )
        for array in (kernel, approximation)
    )
    rest = rows - found
    total = float(np.vdot(rows, moment.times(rows)))
    return float(np.vdot(rest, moment.times(rest))) / total if total > 0 else 0.0
