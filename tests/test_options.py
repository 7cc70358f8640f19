"""The options of a compression: in signatures, in docstrings, and what they refuse."""

from __future__ import annotations

import inspect
import pydoc
import re

import pytest

import keras_alds
from keras_alds.options import OPTION_NAMES, Options, declared, documented

CALLERS = {
    "select": set(),
    "compress": set(),
    "ALDSCompress": set(),
    "sweep": {"method", "error_measure"},
}


@pytest.mark.parametrize("name", CALLERS)
def test_help_shows_every_option_with_its_default_and_its_paragraph(name):
    function = getattr(keras_alds, name)
    text = pydoc.plain(pydoc.render_doc(function))
    parameters = inspect.signature(function).parameters
    for option in OPTION_NAMES:
        if option in CALLERS[name]:
            assert option not in parameters
            continue
        assert parameters[option].default == declared(option).default
        assert re.search(rf"\b{option}: .*= {re.escape(repr(declared(option).default))}", text)
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
        paragraph = " ".join(declared(option).doc.split())
        assert f"{option}: {paragraph}" in " ".join(re.sub(r"^ \|", "", text, flags=re.M).split())
    assert "{options}" not in text
    assert "options" not in parameters


@pytest.mark.parametrize("name", CALLERS)
def test_an_option_that_is_none_names_the_nearest(name):
    arguments = {
        "select": (None, 0.5),
        "compress": (None, 0.5),
        "ALDSCompress": (0.5,),
        "sweep": (None, len),
    }[name]
    needed = {"at_epoch": 1} if name == "ALDSCompress" else {}
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected .*Did you mean 'max_sl"):
        getattr(keras_alds, name)(*arguments, max_slice=2, **needed)


@pytest.mark.parametrize(
    ("options", "near"),
    [
        ({"method": "SVD"}, "svd"),
        ({"method": "ALDS"}, "alds"),
        ({"objective": "param"}, "params"),
        ({"error_measure": "Spectral"}, "spectral"),
        ({"target": "gpu_delegate"}, "gpu-delegate"),
        ({"target": "TFLite"}, "tflite"),
    ],
)
def test_a_value_that_is_none_names_the_nearest(options, near):
    with pytest.raises(ValueError, match=rf"Received: .*\. Did you mean '{near}'\?$"):
        Options.checked(0.5, options, has_data=False)


@pytest.mark.parametrize("options", [{"objective": ["params"]}, {"max_slices": [2]}])
def test_a_list_is_no_value(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"Expected `{name}` to be .* Received: {name}=\["):
        Options.checked(0.5, options, has_data=False)


def test_the_key_of_a_limit_names_the_nearest():
    with pytest.raises(ValueError, match=r"Did you mean 'macs'\?$"):
        Options.checked({"params": 0.5, "mac": 0.4}, {}, has_data=False)


def test_tflite_is_litert():
    assert Options.checked(0.5, {"target": "tflite"}, has_data=False).target == "litert"


def test_nothing_near_is_not_guessed():
    with pytest.raises(TypeError, match=r"^select\(\) got an unexpected keyword argument 'zzz'\.$"):
        Options.checked(0.5, {"zzz": 1}, has_data=False)


def test_paragraphs_are_indented_like_their_line():
    lines = documented("Args:\n    {options}\n", ["rank_multiple"]).splitlines()
    assert lines[1].startswith("    rank_multiple: Integer.")
    assert all(line.startswith("        ") for line in lines[2:])
    assert all(len(line) <= 100 for line in lines)
