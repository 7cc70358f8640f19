import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_alds.core.choices import ChoiceTable, choice_table, offered_ranks
from keras_alds.core.costs import WeightCosts
from keras_alds.core.errors import ERRORS, error_curve
from keras_alds.core.slicing import divisors, full_rank, weights
from keras_alds.core.spectra import spectra


def kernel_of(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def table_of(rows):
    """A table of (cost, error, slices, rank) rows."""
    cost, error, slices, rank = (np.array(column) for column in zip(*rows, strict=True))
    return ChoiceTable(
        slices=slices,
        rank=rank,
        full_rank=rank,
        scheme=np.zeros(len(rows), np.int64),
        weights=cost,
        cost=cost[:, None],
        error=error.astype(float),
    )


@pytest.mark.parametrize("shape", [(3, 3, 12, 10), (20, 8), (6, 30), (5, 5, 3, 4)], ids=str)
@pytest.mark.parametrize("name", ERRORS)
def test_table_holds_every_smaller_choice(shape, name):
    kernel = kernel_of(shape)
    found = spectra(kernel)
    table = choice_table(found, error_measure=name, kernel=kernel)
    dense = int(np.prod(shape))
    expected = {(0, 0): (dense, 0.0)}
    for k in divisors(shape[-2]):
        curve = error_curve(found, name, k, kernel)
        for j in range(1, full_rank(shape, k) + 1):
            if weights(shape, k, j) < dense:
                expected[k, j] = (weights(shape, k, j), curve[j])
    assert len(table) == len(expected)
    for row in table:
        size, error = expected[row.slices, row.rank]
        assert (row.weights, row.cost) == (size, (size,))
        assert row.scheme == 0
        assert row.keep == (row.rank == 0)
        np.testing.assert_allclose(row.error, error, rtol=1e-9)
    assert (np.diff(table.cost[:, 0]) >= 0).all()
    assert table.cost.dtype == table.weights.dtype == np.int64


def test_the_unit_scales_the_cost_only():
    found = spectra(kernel_of((3, 3, 8, 6)))
    costs = WeightCosts(((0, (3, 3, 8, 6), 10**9),), 10**9)
    params, macs = choice_table(found), choice_table(found, costs=[costs])
    np.testing.assert_array_equal(macs.cost, params.cost * 10**9)
    np.testing.assert_array_equal(macs.weights, params.weights)
    np.testing.assert_array_equal(macs.rank, params.rank)


def test_constraints():
    found = spectra(kernel_of((3, 3, 16, 24)))

    def table(**limits):
        return choice_table(found, offered_ranks((3, 3, 16, 24), **limits))

    few = table(max_slices=3)
    assert set(few.slices.tolist()) == {0, 1, 2}
    aligned = table(rank_multiple=4)
    assert len(aligned) > 1
    assert not (aligned.rank % 4).any()
    both = {(row.slices, row.rank) for row in aligned}
    every = {(r.slices, r.rank) for r in choice_table(found) if r.rank % 4 == 0}
    assert both == every
    # Nothing fits: the layer can only be kept.
    assert [row.keep for row in table(rank_multiple=1000)] == [True]
    # Diagonal blocks of a second moment are not cut across.
    assert set(table(blocks=4).slices.tolist()) == {0, 4, 8, 16}


def test_a_layer_that_cannot_shrink_has_one_choice():
    assert [row.keep for row in choice_table(spectra(kernel_of((2, 2))))] == [True]
    assert [row.keep for row in choice_table(spectra(kernel_of((5, 1))))] == [True]


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.integers(0, 8), st.integers(1, 4), st.integers(1, 4)),
        min_size=1,
        max_size=30,
    )
)
def test_front(rows):
    table = table_of(rows)
    front = table.front()
    assert (np.diff(front.cost[:, 0]) > 0).all()
    assert (np.diff(front.error) < 0).all()
    for cost, error, slices, rank in rows:
        better = (front.cost[:, 0] <= cost) & (front.error <= error)
        assert better.any()
        for row in front:
            if (*row.cost, row.error) == (cost, error):
                # Ties: fewer slices, then the smaller rank.
                assert (row.slices, row.rank) <= (slices, rank)
    assert {
        tuple(r) for r in zip(front.cost[:, 0], front.error, front.slices, front.rank, strict=True)
    } <= {(c, float(e), k, j) for c, e, k, j in rows}


def test_keep_leaves_the_front_where_a_smaller_choice_is_exact():
    front = choice_table(spectra(np.ones((3, 3, 8, 8), np.float32))).front()
    assert front[-1].error == 0
    assert not front[-1].keep
    assert choice_table(spectra(kernel_of((3, 3, 8, 8)))).front()[-1].keep


def test_tables_cannot_be_changed():
    table = choice_table(spectra(kernel_of((6, 6))))
    with pytest.raises(ValueError, match="read-only"):
        table.cost[0] = 0
    with pytest.raises(AttributeError):
        table.cost = table.weights


@pytest.mark.parametrize("name", ["near_slices", "max_slices", "rank_multiple"])
@pytest.mark.parametrize("value", [0, -2, 1.5, "4", True])
def test_bad_options(name, value):
    with pytest.raises(ValueError, match=f"positive integer. Received: {name}="):
        offered_ranks((4, 4), **{name: value})


def test_bad_tables_and_errors():
    with pytest.raises(ValueError, match="Received: error_measure='nope'"):
        choice_table(spectra(kernel_of((2, 2))), error_measure="nope")
    column = np.zeros(2, np.int64)
    with pytest.raises(ValueError, match="one length"):
        ChoiceTable(column, column, column, column, column, column[:, None], np.zeros(3))
    with pytest.raises(ValueError, match=r"integer costs \[n, r\].*cost.dtype=float64"):
        ChoiceTable(column, column, column, column, column, np.zeros((2, 1)), np.zeros(2))
