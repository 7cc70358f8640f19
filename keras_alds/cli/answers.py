"""What a command found out: for programs as JSON, for people as text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Answer(NamedTuple):
    """The result of a command.

    Attributes:
        document: What `--json` prints: dicts, lists, strings and numbers.
        show: Prints the same for people.
    """

    document: Mapping[str, Any]
    show: Callable[[], object]


def as_json(document: Mapping[str, Any]) -> str:
    """One JSON document. What JSON cannot express, NaN and infinity, becomes null."""
    return json.dumps(_plain(document), indent=1, allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
