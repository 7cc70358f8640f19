"""Models as lists of steps."""

from __future__ import annotations

import collections

import pytest

from keras_alds.models.program import Slot, _with_slots

Pair = collections.namedtuple("Pair", "first second")
A, B, OTHER = object(), object(), object()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (A, Slot(1)),
        (OTHER, OTHER),
        (None, None),
        ((A, [B, OTHER]), (Slot(1), [Slot(2), OTHER])),
        ({"b": B, "a": [A, {}]}, {"b": Slot(2), "a": [Slot(1), {}]}),
        (Pair(A, (B, None)), Pair(Slot(1), (Slot(2), None))),
        (collections.OrderedDict(b=A, a=OTHER), collections.OrderedDict(b=Slot(1), a=OTHER)),
    ],
    ids=["tensor", "other", "none", "plain", "dict", "namedtuple", "ordered"],
)
def test_known_tensors_become_slots(given, expected):
    found = _with_slots(given, {id(A): 1, id(B): 2})
    assert found == expected
    assert type(found) is type(expected)
