"""What a plan can limit and report: parameters, multiply–accumulates, measured latency.

Here they have their names, and the words and units that tables print. `models.resources` counts
parameters and multiply–accumulates; `litert.latency` measures latency.
"""

from __future__ import annotations

import dataclasses
import decimal
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Cost(NamedTuple):
    """How much of a resource a layer or a model uses, before and after compression."""

    before: int
    after: int

    @property
    def saved(self) -> int:
        """What the compression removes."""
        return self.before - self.after

    @property
    def removed(self) -> float:
        """The fraction that it removes."""
        return removed_fraction(self.before, self.after)


def removed_fraction(before: int, after: int) -> float:
    """The fraction `cr` that was removed, 1 - after / before; 0 of nothing."""
    return 1 - after / before if before else 0.0


def rounded_down(fraction: float) -> str:
    """A fraction as a decimal number, rounded down, but not to 0."""
    if not fraction:
        return "0"
    exact, digits = decimal.Decimal(fraction), 4
    while not (rounded := exact.quantize(decimal.Decimal(1).scaleb(-digits), decimal.ROUND_FLOOR)):
        digits += 1
    return f"{rounded:f}"


def rounded_up(fraction: float) -> str:
    """A fraction with four decimals, rounded up."""
    exact = decimal.Decimal(fraction)
    return str(exact.quantize(decimal.Decimal("0.0001"), decimal.ROUND_CEILING))


def allowed_after(before: int, cr: float) -> int:
    """The largest count with which `removed_fraction` is still at least `cr`."""
    if not before:
        return -1 if cr else 0  # nothing can be removed of nothing
    after = int((1 - cr) * before)
    while removed_fraction(before, after) < cr:
        after -= 1
    while removed_fraction(before, after + 1) >= cr:
        after += 1
    return after


@dataclasses.dataclass(frozen=True)
class ResourceInfo:
    """The words for a resource.

    Attributes:
        name: Its name, as in `objective` and in the keys of `cr`.
        counted: What it counts, in a sentence.
        column: The head of its column in a table.
        total: The words before its total.
        scale: Number of its units in the unit that is printed.
        decimals: Digits after the decimal point.
        unit: Its unit, for error messages.
        better: What a choice has to be, for error messages.
        joint: Whether `cr` can limit it together with others. It has to order a layer's choices as
            parameters do.
        target: The target that it is measured for, if the user names none. None if it is counted,
            not measured.
    """

    name: str
    counted: str
    column: str
    total: str
    scale: int = 1
    decimals: int = 0
    unit: str = ""
    better: str = "smaller"
    joint: bool = True
    target: str | None = None

    @property
    def measured(self) -> bool:
        """Whether it is measured, and its table of choices already knows the target."""
        return self.target is not None

    def text(self, cost: Cost | None) -> str:
        """A cost in the printed unit, as in `"4,416 → 2,000"`."""
        if cost is None:
            return "–"
        before, after = (f"{count / self.scale:,.{self.decimals}f}" for count in cost)
        return before if cost.before == cost.after else f"{before} → {after}"


RESOURCES: Mapping[str, ResourceInfo] = MappingProxyType(
    {
        info.name: info
        for info in (
            ResourceInfo("params", "the parameters", "Params", "Total params"),
            ResourceInfo("macs", "the multiply–accumulates", "MACs", "Total MACs"),
            ResourceInfo(
                "latency",
                "the latency",
                "Latency, µs",
                "Predicted latency, µs",
                scale=1000,
                decimals=1,
                unit=" ns",
                better="smaller and faster",
                joint=False,
                target="litert",
            ),
        )
    }
)
#: What `cr` can limit beside a resource: the largest sum of feature maps that are live at once. It
#: is no resource, as it does not add up over the layers.
MEMORY = "memory"
#: The resources that `cr` can limit together.
JOINT = tuple(name for name, info in RESOURCES.items() if info.joint)
