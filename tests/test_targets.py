"""Targets as data: what they allow, against the rules written out one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_alds.core.choices import choice_table, offered_ranks
from keras_alds.core.slicing import divisors, full_rank, weights
from keras_alds.core.spectra import spectra
from keras_alds.targets import TARGETS, get_target

SHAPES = st.tuples(
    st.sampled_from([(), (1,), (3,), (1, 1), (3, 3), (2, 3), (3, 3, 3)]),
    st.sampled_from([1, 3, 8, 16, 24, 32, 48, 64, 128, 192]),
    st.sampled_from([1, 4, 10, 16, 33, 64, 96]),
).map(lambda parts: (*parts[0], *parts[1:]))


def expected(name, shape, k, j, depthwise):
    """The rules of docs/how-to/targets.md, by hand."""
    *spatial, c, f = shape
    if c % k or not 1 <= j <= full_rank(shape, k):
        return False
    lanes = j % (4 if c < 64 or f < 64 else 8) == 0
    if name == "cpu" and (min(c, f) < 32 or weights(shape, k, j) > 0.75 * np.prod(shape)):
        return False
    if k == 1:
        return lanes
    if len(spatial) not in (1, 2):
        return False
    if k == c and len(spatial) == 2 and depthwise:
        return c >= 32 and (j == 1 or (j == 2 and c >= 128 and name == "litert-reference"))
    if name in ("litert", "cpu"):
        return lanes and c // k >= (64 if name == "cpu" else 16)
    return name == "gpu-delegate" and lanes and c // k >= 16 and c // k % 4 == 0


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, depthwise=st.booleans())
def test_allowed_choices_are_those_of_the_rules(name, shape, depthwise):
    target = TARGETS[name]
    for k in divisors(shape[-2]):
        ranks = range(full_rank(shape, k) + 2)
        allowed = set(target.ranks(shape, k, depthwise=depthwise))
        assert allowed == {j for j in ranks if expected(name, shape, k, j, depthwise)}


@pytest.mark.parametrize("name", [None, *TARGETS])
@settings(max_examples=15, deadline=None)
@given(
    shape=st.sampled_from([(3, 3, 32, 24), (1, 1, 64, 64), (3, 32, 16), (48, 64), (2, 2, 16, 4)]),
    most=st.sampled_from([None, 1, 2, 40]),
    multiple=st.sampled_from([1, 2, 3, 12]),
)
def test_a_table_is_the_free_table_less_what_is_not_allowed(name, shape, most, multiple):
    found = spectra(np.random.default_rng(0).standard_normal(shape))
    target = get_target(name)
    free = choice_table(found)
    limits = {"rule": target and target.ranks, "max_slices": most, "rank_multiple": multiple}
    offered = offered_ranks(shape, **limits)
    table = choice_table(found, offered)
    kept = [
        row
        for row in free
        if row.keep
        or (
            (most is None or row.slices <= most)
            and row.rank % multiple == 0
            and (target is None or row.rank in target.ranks(shape, row.slices))
        )
    ]
    assert list(table) == kept
    cheapest = min(kept, key=lambda row: row.cost)
    costs = [r[0] * (k * shape[-1] + np.prod(shape[:-1])) for k, r in offered.items()]
    assert cheapest.cost == (min([*costs, np.prod(shape)]),)


def test_wide_layers_take_the_coarsest_slices_there_are():
    target = TARGETS["litert"]
    assert not target.ranks((512, 64), 4)
    assert target.ranks((512, 64), 4, blocks=4) == target.ranks((512, 64), 1)
    assert not target.ranks((512, 64), 8, blocks=4)


def test_shared_windows_and_strides_on_any_cpu():
    """16 channels are enough where both factors have a part of the window; strides cost work."""
    target = TARGETS["cpu"]
    split = (3, 16, 48)  # the scheme 1 of a 3×3 kernel of 16 channels and filters
    assert list(target.ranks(split, 1, positions=3)) == [4, 8, 12, 16]
    assert not target.ranks((3, 8, 24), 1, positions=3)
    assert not target.ranks((16, 144), 1, positions=9)  # scheme 3
    assert not target.ranks((3, 3, 16, 16), 1)
    assert list(target.ranks((32, 288), 1, positions=9)) == [4, 8, 12, 16, 20]
    assert list(target.ranks((32, 288), 1, positions=9, strides=4)) == [4, 8, 12, 16]


def test_targets_are_records():
    for name, target in TARGETS.items():
        assert target.name == name
        assert target is get_target(name)
        hash(target)
    with pytest.raises(AttributeError):
        TARGETS["litert"].rank_multiple = 1
    with pytest.raises(TypeError):
        TARGETS["mine"] = TARGETS["litert"]
    assert get_target(None) is None
    assert get_target("tflite") is get_target("litert")


@pytest.mark.parametrize("name", ["LiteRT", "gpu", "", 3, ["litert"], {}])
def test_an_unknown_target_lists_the_names(name):
    with pytest.raises(ValueError, match="'litert', 'litert-reference', 'gpu-delegate'"):
        get_target(name)


def test_limits_of_the_user_hold_beside_those_of_a_target():
    target = TARGETS["litert"]
    shape = (3, 3, 64, 64)
    for multiple, most in itertools.product((1, 3, 16), (None, 1, 2)):
        offered = offered_ranks(shape, rule=target.ranks, max_slices=most, rank_multiple=multiple)
        assert (2 in offered) == (most != 1)
        assert all(j % multiple == 0 and j % 8 == 0 for j in offered.get(2, ()))
    assert 64 not in offered_ranks(shape, rule=target.ranks, rank_multiple=2)
    assert list(offered_ranks(shape, rule=target.ranks)[64]) == [1]
