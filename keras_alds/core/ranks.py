"""Ranks of a matrix that are not whole numbers, and when they have settled in training.

With the singular values σ_1 ≥ … ≥ σ_r of a matrix W:

| name | formula |
|---|---|
| stable rank | ‖W‖²_F / ‖W‖²_2 = Σ σ_i² / σ_1² |
| effective rank | exp(−Σ p_i ln p_i) with p_i = σ_i / Σ σ_m |
| energy rank | the smallest j with Σ_{i≤j} σ_i² ≥ share · Σ σ_i² |

None of them changes if W is scaled. All are between 1 and r, and 0 for a matrix of zeros.

Sources: Rudelson and Vershynin, "Sampling from large matrices", J. ACM 2007 (stable rank). Roy and
Vetterli, "The effective rank", EUSIPCO 2007: singular values that sum to 1, not their squares.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from keras_alds.core.spectra import Float64

#: How many epochs a rank is compared over, and how far it may change per epoch.
SETTLING_EPOCHS = 5
SETTLING_RATE = 0.01


@dataclass(frozen=True)
class Ranks:
    """The ranks of one matrix.

    Attributes:
        full: The smaller one of its sides.
        stable: Its stable rank.
        effective: Its effective rank.
        energy: Its energy rank.
    """

    full: int
    stable: float
    effective: float
    energy: int


def ranks_of(singular_values: Float64, share: float = 0.99) -> Ranks:
    """Returns the ranks of a matrix.

    Args:
        singular_values: Array `[r]`, descending, r being the smaller side of the matrix.
        share: The part of the energy that the energy rank holds, 0 < share < 1.

    Example:
        >>> ranks_of(np.array([1.0, 1.0, 0.0]))
        Ranks(full=3, stable=2.0, effective=2.0, energy=2)
    """
    values = np.asarray(singular_values, np.float64)
    if not values.size or values[0] == 0:
        return Ranks(values.size, 0.0, 0.0, 0)
    values = values / values[0]  # squares of tiny numbers would be 0
    p = values[values > 0] / values.sum()
    energy = np.cumsum(np.square(values))
    return Ranks(
        full=values.size,
        stable=float(energy[-1]),
        effective=float(np.exp(-(p * np.log(p)).sum())),
        energy=int(np.searchsorted(energy, share * energy[-1])) + 1,
    )


class Settling:
    """Watches stable ranks until those of all layers have settled.

    A layer's rank has settled once it has changed by at most 1 % per epoch, taken over 5 epochs:
    |ϱ_t − ϱ_{t−5}| ≤ 0.05 ϱ_{t−5}. A layer that has settled once counts as settled, since noise of
    the steps would move some layer of a deep network at any time.

    This is the rule by which Cuttlefish goes from dense to low-rank training: dϱ/dt ≤ ε for all
    layers. Its code takes the mean |dϱ/dt| of smoothed ranks over 11 epochs, from epoch 15 on, and
    ε = 0.1 in units of rank, which suits networks of one width; here the rate is relative.

    Example:
        >>> settling = Settling()
        >>> [settling.add({"conv": rank}) for rank in (8.0, 6.0, 5.0, 4.9, 4.9, 4.9, 4.9, 4.9)]
        [False, False, False, False, False, False, False, True]

    References:
        Wang et al., "Cuttlefish: Low-Rank Model Training without All the Tuning", MLSys 2023,
        arXiv:2305.02538.
    """

    def __init__(self) -> None:
        self._past: collections.deque[dict[str, float]] = collections.deque(
            maxlen=SETTLING_EPOCHS + 1
        )
        self._settled: set[str] = set()

    def add(self, stable_ranks: Mapping[str, float]) -> bool:
        """Adds the stable ranks of one more epoch.

        Returns:
            Whether all of them have settled.
        """
        self._past.append(dict(stable_ranks))
        if len(self._past) > SETTLING_EPOCHS:
            before = self._past[0]
            self._settled |= {
                name
                for name, rank in stable_ranks.items()
                if name in before
                and abs(rank - before[name]) <= SETTLING_EPOCHS * SETTLING_RATE * before[name]
            }
        return self._settled >= stable_ranks.keys()
