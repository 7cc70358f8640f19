"""The named methods, and the defaults."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from keras_alds.core.checks import did_you_mean
from keras_alds.core.errors import get_error
from keras_alds.core.methods import ACTIVATION, ALDS, ENERGY, SYNTHETIC, Method

_methods = [ALDS, ENERGY, SYNTHETIC, ACTIVATION]
with contextlib.suppress(ModuleNotFoundError):  # the folder can be left out
    from keras_alds.research.baselines import BASELINES

    _methods += BASELINES

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _methods})

#: The default methods: without calibration data, with it, and without it for models for which no
#: synthetic examples can be made.
DEFAULT_WITHOUT_DATA = "synthetic"
DEFAULT = "energy"
DEFAULT_WITH_DATA = "activation"


def get_method(name: str, error_measure: str | None = None) -> Method:
    """Returns a method by its name, optionally with another error measure.

    Raises:
        ValueError: If the method or the error measure is unknown, or `error_measure` is given for a
            method that measures the error of outputs.

    Example:
        >>> get_method("alds", error_measure="spectral").error_measure
        'spectral'
    """
    try:
        method = METHODS[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"Expected a method, one of {sorted(METHODS)}. "
            f"Received: method={name!r}{did_you_mean(name, METHODS)}"
        ) from None
    if error_measure is None:
        return method
    if method.needs_data or method.synthetic or method.schemes:
        raise ValueError(
            f"Expected no `error_measure` with the method {name!r}, which has its own. "
            f"Received: error_measure={error_measure!r}"
        )
    return replace(method, error_measure=get_error(error_measure).name)


def choose_method(name: str | None, *, has_data: bool, error_measure: str | None = None) -> str:
    """Returns the name of the method to use, given whether there is calibration data.

    Args:
        name: One of the keys of `METHODS`, or None: `"activation"` with data, else
            `"synthetic"`. These did best in the measured tables (docs/results/methods.md).
        has_data: Whether there is calibration data.
        error_measure: The requested error measure, if any. With one, but no name and no data, the
            method is `"alds"`.

    Returns:
        A key of `METHODS`.

    Raises:
        ValueError: If the method is unknown, needs data that is missing, or cannot use the data.

    Example:
        >>> choose_method(None, has_data=True)
        'activation'
    """
    if name is None:
        if has_data:
            return DEFAULT_WITH_DATA
        return DEFAULT_WITHOUT_DATA if error_measure is None else "alds"
    method = get_method(name)
    if method.needs_data and not has_data:
        raise ValueError(
            f"Expected `calibration_data` for the method {name!r}. Received: calibration_data=None"
        )
    if has_data and not (method.needs_data or method.takes_data):
        users = [m.name for m in METHODS.values() if m.needs_data or m.takes_data]
        raise ValueError(
            f"Expected a method that uses `calibration_data`, one of {users}, or no data. "
            f"Received: method={name!r}"
        )
    return name
