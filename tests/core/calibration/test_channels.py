"""Removal of input channels: against brute force over all subsets and direct least squares."""

from __future__ import annotations

import itertools

import numpy as np

from keras_alds.core.calibration.channels import channel_order, refitted
from keras_alds.core.calibration.moments import SecondMoment

RANDOM = np.random.default_rng(0)


def moment_of(x):
    return SecondMoment(x.T[None] @ x / len(x), len(x), x.mean(axis=0)).with_ridge(1e-9)


def test_the_refit_is_least_squares_with_a_bias():
    x = RANDOM.standard_normal((400, 5)) @ RANDOM.standard_normal((5, 5)) + 3
    kernel = RANDOM.standard_normal((5, 4))
    kept = np.array([0, 2, 3])
    small, bias = refitted(kernel, moment_of(x), kept)
    wanted, *_ = np.linalg.lstsq(np.c_[x[:, kept], np.ones(400)], x @ kernel, rcond=None)
    np.testing.assert_allclose(np.vstack([small, bias]), wanted, atol=1e-5)


def test_the_least_loss_goes_first_and_errors_are_those_of_the_refit():
    x = RANDOM.standard_normal((300, 40)) @ RANDOM.standard_normal((40, 40)) + 1
    kernel = RANDOM.standard_normal((40, 3))
    moment = moment_of(x)
    found = channel_order(kernel, moment)
    outputs = x @ kernel - (x @ kernel).mean(axis=0)

    def error(kept):
        small, bias = refitted(kernel, moment, np.asarray(kept))
        return ((x[:, kept] @ small + bias - x @ kernel) ** 2).sum() / (outputs**2).sum()

    best = min((error(np.delete(np.arange(40), n)), n) for n in range(40))[1]
    assert found.order[0] == best
    for count in (4, 8, 20, 39):  # before and after rows are dropped
        np.testing.assert_allclose(found.errors[count], error(found.kept(count)), rtol=1e-3)
    assert found.errors[40] == 0
    assert (np.diff(found.errors) <= 0).all()


def test_one_after_the_other_is_near_the_best_subset():
    x = RANDOM.standard_normal((300, 8)) @ RANDOM.standard_normal((8, 8))
    kernel = RANDOM.standard_normal((8, 2))
    moment = moment_of(x)
    found = channel_order(kernel, moment)
    outputs = x @ kernel - (x @ kernel).mean(axis=0)

    def error(kept):
        small, bias = refitted(kernel, moment, np.asarray(kept))
        return ((x[:, kept] @ small + bias - x @ kernel) ** 2).sum() / (outputs**2).sum()

    errors = [error(list(kept)) for kept in itertools.combinations(range(8), 4)]
    assert min(errors) * (1 - 1e-6) <= found.errors[4] <= np.quantile(errors, 0.2)
