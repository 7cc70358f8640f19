"""The memory that a network's feature maps take: what is live while each operator runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Node(NamedTuple):
    """An operator of a network.

    Attributes:
        inputs: The tensors that it reads.
        outputs: The tensors that it writes.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def live_sizes(
    nodes: Sequence[Node], sizes: Mapping[int, int], ends: Iterable[int] = ()
) -> list[int]:
    """The size of all tensors that are live while each operator runs, its own among them.

    A tensor is live from the operator that writes it to the last one that reads it. An input of
    the network is live from the start.

    Args:
        nodes: The operators in the order in which they run.
        sizes: The size of each tensor. Tensors without a size, such as weights, do not count.
        ends: The outputs of the network, which stay live.

    Returns:
        One size for each operator. The largest is the peak.

    Example:
        >>> nodes = [Node((0,), (1,)), Node((1,), (2,)), Node((0, 2), (3,))]
        >>> live_sizes(nodes, {0: 10, 1: 5, 2: 2, 3: 10}, ends=[3])
        [15, 17, 22]
    """
    changes = [0] * (len(nodes) + 1)
    for tensor, (first, last) in lifetimes(nodes, ends).items():
        changes[first] += sizes.get(tensor, 0)
        changes[last + 1] -= sizes.get(tensor, 0)
    return list(itertools.accumulate(changes[:-1]))


def lifetimes(nodes: Sequence[Node], ends: Iterable[int] = ()) -> dict[int, tuple[int, int]]:
    """The first and the last operator during which each tensor is live; see `live_sizes`."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for index, node in enumerate(nodes):
        for tensor in node.inputs:
            first.setdefault(tensor, 0)
            last[tensor] = index
        for tensor in node.outputs:
            first.setdefault(tensor, index)
            last.setdefault(tensor, index)
    last.update((tensor, len(nodes) - 1) for tensor in ends if tensor in last)
    return {tensor: (start, last[tensor]) for tensor, start in first.items()}


def arena_size(
    nodes: Sequence[Node], sizes: Mapping[int, int], ends: Iterable[int] = (), *, unit: int = 16
) -> int:
    """The memory in which LiteRT for Microcontrollers places the tensors.

    Its planner places the largest tensors first, each at the lowest offset where it fits between
    those that are live at the same time. Of equal ones the last comes first. Gaps may remain, so
    this is at least the largest of `live_sizes`.

    Args:
        nodes: As for `live_sizes`.
        sizes: As for `live_sizes`.
        ends: As for `live_sizes`.
        unit: Sizes are rounded up to multiples of this.

    Example:
        >>> nodes = [Node((0,), (1,)), Node((1,), (2,)), Node((0, 2), (3,))]
        >>> arena_size(nodes, {0: 160, 1: 80, 2: 32, 3: 160}, ends=[3])
        352
    """
    spans = lifetimes(nodes, ends)
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last
    for tensor in sorted(spans, key=lambda tensor: (-sizes.get(tensor, 0), -tensor)):
        size = -(-sizes.get(tensor, 0) // unit) * unit
        first, last = spans[tensor]
        offset = 0
        for start, end, begins, stops in sorted(placed):
            if begins <= last and first <= stops:
                if start - offset >= size:
                    break
                offset = max(offset, end)
        placed.append((offset, offset + size, first, last))
    return max((end for _, end, _, _ in placed), default=0)
