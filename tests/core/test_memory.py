"""What is live at once, and where the planner of LiteRT for Microcontrollers puts it."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from keras_alds.core.memory import Node, arena_size, live_sizes


@st.composite
def graphs(draw: Any) -> tuple[list[Node], dict[int, int], list[int]]:
    """Operators that read any earlier tensors, sizes, and outputs."""
    nodes, known = [], draw(st.integers(1, 2))
    for _ in range(draw(st.integers(1, 7))):
        inputs = draw(st.lists(st.integers(0, known - 1), min_size=1, max_size=3))
        outputs = range(known, known + draw(st.integers(1, 2)))
        known += len(outputs)
        nodes.append(Node(tuple(inputs), tuple(outputs)))
    sizes = {tensor: draw(st.integers(0, 5)) for tensor in range(known)}
    return nodes, sizes, draw(st.lists(st.integers(0, known - 1), max_size=2))


def simulated(nodes: list[Node], ends: list[int]) -> list[set[int]]:
    """The tensors that a runtime holds at each operator, which frees what nobody reads any more."""
    written = {tensor for node in nodes for tensor in node.outputs}
    read = {tensor for node in nodes for tensor in node.inputs}
    held, steps = read - written, []
    for index, node in enumerate(nodes):
        held |= set(node.outputs)
        steps.append(set(held))
        later = {tensor for other in nodes[index + 1 :] for tensor in other.inputs} | set(ends)
        held &= later
    return steps


@given(graphs())
def test_live_sizes_are_those_of_a_simulation(graph: Any):
    nodes, sizes, ends = graph
    expected = [sum(map(sizes.get, held)) for held in simulated(nodes, ends)]
    assert live_sizes(nodes, sizes, ends) == expected


@given(graphs())
def test_the_arena_places_each_tensor_at_the_lowest_free_offset(graph: Any):
    nodes, sizes, ends = graph
    steps = simulated(nodes, ends)
    times = {t: {i for i, held in enumerate(steps) if t in held} for t in set().union(*steps)}
    used: list[tuple[set[int], set[int]]] = []  # when, and which bytes
    for tensor in sorted(times, key=lambda tensor: (sizes[tensor], tensor), reverse=True):
        taken = set().union(*(where for when, where in used if when & times[tensor]))
        start = next(
            start
            for start in itertools.count()
            if not taken & set(range(start, start + sizes[tensor]))
        )
        used.append((times[tensor], set(range(start, start + sizes[tensor]))))
    end = max(set().union(*(where for _, where in used)), default=-1) + 1
    assert arena_size(nodes, sizes, ends, unit=1) == end >= max(live_sizes(nodes, sizes, ends))


def test_equal_tensors_leave_a_gap():
    """Of equal tensors the last is placed first, as by `tflite-micro`, which this was read from."""
    nodes = [Node((index,), (index + 1,)) for index in range(6)]
    sizes = {0: 3, **dict.fromkeys((1, 2, 3), 230), **dict.fromkeys((4, 5, 6), 200)}
    assert max(live_sizes(nodes, sizes, [6])) == 460
    assert arena_size(nodes, sizes, [6], unit=1) == 600
    assert arena_size(nodes, sizes, [6]) == 3 * 208
