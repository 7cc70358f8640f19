"""Pictures of plans: the bars are the numbers of the plan."""

from __future__ import annotations

import dataclasses

import keras
import pytest
import zoo

import keras_alds
from keras_alds import plots
from keras_alds.resources import Cost

pytest.importorskip("matplotlib")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure


@pytest.fixture(scope="module")
def plan():
    keras.utils.set_random_seed(0)
    limits = {"params": 0.4, "macs": 0.3}
    return keras_alds.select(zoo.functional(keras), limits, method="alds", target="size")


def bars(ax):
    """The lengths of the bars, one list for each colour."""
    return [[bar.get_width() for bar in container] for container in ax.containers]


def names(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def notes(ax):
    return [text.get_text() for text in ax.texts]


def test_ranks(plan):
    down = next(choice for choice in plan.choices if choice.layer == "down")
    folded = dataclasses.replace(down, scheme=3, slices=1, rank=5)
    stem = dataclasses.replace(plan.choices[0], reason="too small", rank=None, slices=None)
    plan = dataclasses.replace(plan, choices=(stem, down, folded, *plan.choices[3:]))
    given = Figure().subplots()
    ax = plots.ranks(plan, ax=given)
    assert ax is given
    assert names(ax) == ["stem", "down", "down", "hidden", "head"]
    full, chosen = bars(ax)
    # 3·3·3 × 16; 3·3·16 × 24 in scheme 0; 16 × 3·3·24 in scheme 3; 24 × 32; 32 × 10
    assert full == [16, 24, 16, 24, 10]
    assert chosen == [choice.rank or 0 for choice in plan.choices if choice.kernel_shape]
    slices = f"{down.slices} × " if down.slices > 1 else ""
    assert notes(ax)[:3] == ["dense", f"{slices}{down.rank}", "5"]
    assert plt.get_fignums() == []


@pytest.mark.parametrize("resource", [None, "macs"])
def test_costs(plan, resource):
    ax = plots.costs(plan, resource, most=2)
    name = resource or "params"
    costs = [(choice.layer, choice.costs[name]) for choice in plan.choices]
    costs.sort(key=lambda item: -item[1].before)
    assert names(ax) == [costs[0][0], costs[1][0], f"{len(costs) - 2} more"]
    before, after = bars(ax)
    assert before == [*(c.before for _, c in costs[:2]), sum(c.before for _, c in costs[2:])]
    assert after == [*(c.after for _, c in costs[:2]), sum(c.after for _, c in costs[2:])]
    total = plan.costs[name]
    assert sum(before) == total.before
    assert sum(after) == total.after
    assert notes(ax)[0] == f"−{costs[0][1].removed:.0%}"
    assert ax.get_xlabel().endswith(f"{total.removed:.0%} removed in all")


def test_latency_is_in_its_printed_unit(plan):
    costs = {"params": Cost(10, 5), "latency": Cost(30_000, 12_000)}
    layer = dataclasses.replace(plan.choices[0], costs=costs)
    unknown = dataclasses.replace(plan.choices[1], costs={"params": Cost(10, 5)})
    timed = dataclasses.replace(plan, objective="latency", costs=costs, choices=(layer, unknown))
    assert bars(plots.costs(timed)) == [[30], [12]]


def test_what_is_refused(plan):
    for draw in (plots.ranks, plots.costs):
        with pytest.raises(ValueError, match="Expected `plan` to be a CompressionPlan"):
            draw("plan.json")
    for other in ("latency", "memory"):
        with pytest.raises(ValueError, match=f"'params', 'macs'. Received: resource='{other}'"):
            plots.costs(plan, other)
    with pytest.raises(ValueError, match="Received: most=0"):
        plots.costs(plan, most=0)
