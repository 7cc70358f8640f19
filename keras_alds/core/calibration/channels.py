r"""Removes input channels of a linear layer and lets the others make up for them.

A layer computes Wᵀ x + b. If only the channels K of x are left, the nearest outputs are those of
the least-squares kernel

    W_K = (S_KK + ρI)⁻¹ (S + ρI)_K W,  b_K = b + E[x]ᵀ W − E[x_K]ᵀ W_K,

with S the covariance of x. Which channels to remove is decided one after the other. With H the
inverse of S + ρI and W the kernel that is fitted so far, the removal of channel i adds exactly

    |W_i|² / H_ii

to the squared error (optimal brain surgeon, Hassibi and Stork, NeurIPS 1992), and the least one is
taken. Channels that are the same for all inputs add nothing, whatever ρ is: the bias makes up for
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg

from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.slicing import Array
from keras_alds.core.spectra import Float64

# After so many removals, the rows of removed channels are dropped from the matrices.
_DROP_EVERY = 32
# Channels vary if their variance is more than this part of the mean square of all. The rest is
# rounding.
_VARIES = 1e-7


@dataclass(frozen=True, eq=False)
class ChannelOrder:
    """The input channels of a layer in the order in which they are removed.

    Attributes:
        order: The channels, the first to be removed first.
        errors: Relative squared error of the outputs if n channels are kept, for n = 0, 1, …
    """

    order: Array
    errors: Float64

    def kept(self, count: int) -> Array:
        """The channels that are left if `count` are kept, ascending."""
        return np.sort(self.order[len(self.order) - count :])


def channel_order(kernel: Array, moment: SecondMoment) -> ChannelOrder:
    """Orders the input channels by what their removal costs.

    Args:
        kernel: Array `[channels, outputs]`.
        moment: The second moment of the channels, in one block.

    Example:
        >>> x = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
        >>> moment = SecondMoment(x.T[None] @ x / 4, 4, x.mean(axis=0))
        >>> found = channel_order(np.ones((3, 1)), moment)  # the second one is always zero
        >>> found.order.tolist()[0], float(found.errors[2])
        (1, 0.0)
    """
    covariance = _covariance(moment)
    variance = np.diag(covariance) - (moment.ridge or 1.0)
    silent = variance <= _VARIES * (variance + _mean(moment) ** 2).mean()
    fitted = np.asarray(kernel, np.float64).copy()
    total = float(np.vdot(fitted, covariance @ fitted))
    inverse = linalg.inv(covariance)
    alive = np.arange(len(fitted))
    there = np.ones(len(fitted), bool)
    order, losses = [], []
    for count in range(1, len(fitted) + 1):
        diagonal = np.maximum(np.diag(inverse), np.finfo(float).tiny)
        loss = np.where(silent[alive], 0.0, (fitted**2).sum(axis=1) / diagonal)
        loss[~there] = np.inf
        i = int(loss.argmin())
        order.append(alive[i])
        losses.append(loss[i])
        column = inverse[:, i] / inverse[i, i]
        fitted -= np.outer(column, fitted[i])
        inverse -= np.outer(column, inverse[i])
        there[i] = False
        if count % _DROP_EVERY == 0:
            fitted, inverse, alive = fitted[there], inverse[np.ix_(there, there)], alive[there]
            there = np.ones(len(fitted), bool)
    errors = np.append(np.cumsum(losses)[::-1], 0.0) / (total or 1.0)
    return ChannelOrder(np.array(order), np.minimum(errors, 1.0))


def refitted(kernel: Array, moment: SecondMoment, kept: Array) -> tuple[Float64, Float64]:
    """The kernel of the kept channels with the nearest outputs, and what the bias gains.

    Args:
        kernel: Array `[channels, outputs]`.
        moment: The second moment of the channels, in one block.
        kept: Indices of the kept channels, ascending.

    Returns:
        Arrays `[kept, outputs]` and `[outputs]`.
    """
    kernel = np.asarray(kernel, np.float64)
    covariance = _covariance(moment)
    small = linalg.solve(covariance[np.ix_(kept, kept)], covariance[kept] @ kernel, assume_a="pos")
    mean = _mean(moment)
    return small, mean @ kernel - mean[kept] @ small


def _mean(moment: SecondMoment) -> Float64:
    return np.zeros(moment.side) if moment.mean is None else moment.mean


def _covariance(moment: SecondMoment) -> Float64:
    """The covariance + ρI of the inputs."""
    mean = _mean(moment)
    return moment.slice_block(1, 0) - np.outer(mean, mean)
