"""The memory that a file's activations take, in a runtime that plans it ahead."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from keras_alds.core.memory import Node, arena_size, live_sizes
from keras_alds.litert.files import LiteRTFile, Tensor

# Operators whose output is their input. LiteRT leaves it where it is, LiteRT for Microcontrollers
# copies it.
_SAME = frozenset({"RESHAPE", "SQUEEZE", "EXPAND_DIMS"})


class ActivationMemory(NamedTuple):
    """Bytes of activations.

    Attributes:
        peak: The most that is live at once: while an operator runs, all that it or a later one
            uses.
        arena: What LiteRT for Microcontrollers places the activations in. Its own records of
            tensors and operators take more.
    """

    peak: int
    arena: int


def activation_memory(file: LiteRTFile) -> ActivationMemory:
    """Counts the activations of a file's main subgraph, its inputs and outputs included."""
    operators = [o for o in file.operators if o.subgraph == 0 and not file.is_constant(o)]
    computed = {t.index: t for t in (*file.inputs, *(t for o in operators for t in o.outputs))}
    sizes = {index: _bytes(tensor) for index, tensor in computed.items()}
    place = {index: index for index in computed}
    in_place, nodes = [], []
    for operator in operators:
        reads = tuple(t.index for t in operator.inputs if t is not None and t.index in place)
        writes = tuple(tensor.index for tensor in operator.outputs)
        nodes.append(Node(reads, writes))
        if operator.name in _SAME and reads:
            place[writes[0]] = place[reads[0]]
        else:
            in_place.append(Node(tuple(map(place.__getitem__, reads)), writes))
    ends = [tensor.index for tensor in file.outputs if tensor.index in place]
    live = live_sizes(in_place, sizes, map(place.__getitem__, ends))
    return ActivationMemory(max(live, default=0), arena_size(nodes, sizes, ends))


def _bytes(tensor: Tensor) -> int:
    try:
        size = np.dtype(tensor.dtype).itemsize
    except TypeError:
        size = 2 if tensor.dtype == "bfloat16" else 1
    return math.prod(tensor.shape) * size
