"""The options of a compression, checked before anything is done."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from keras_alds.core.slicing import SCHEMES
from keras_alds.methods import DEFAULT, METHODS, get_method
from keras_alds.models import inspect
from keras_alds.models.in_place import check_plan
from keras_alds.targets import get_target

OBJECTIVES = ("params", "macs", "latency")
#: What `cr` can limit at once.
LIMITS = ("params", "macs")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that `select`, `compress` and `ALDSCompress` share, checked."""

    cr: Any
    method: str = DEFAULT
    objective: str = "params"
    error: str | None = None
    exclude: Any = ()
    max_slices: int | None = None
    rank_multiple: int = 1
    target: str | None = None
    bounds: Any = None
    #: With a limit on parameters and on MACs: the fraction of MACs; `cr` is that of parameters.
    macs_cr: float | None = None
    latency: Any = None
    schemes: Any = 0

    def __post_init__(self) -> None:
        if isinstance(self.cr, Mapping):
            self._set_limits(self.cr)
        check_cr(self.cr)
        get_method(self.method, self.error)
        get_target(self.target)
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"Expected `objective` to be one of {', '.join(map(repr, OBJECTIVES))}. "
                f"Received: objective={self.objective!r}"
            )
        if self.objective == "latency":
            from keras_alds.litert.latency import check_table

            object.__setattr__(self, "target", self.target or "litert")
            object.__setattr__(self, "latency", check_table(self.latency, self.target))
        elif self.latency is not None:
            raise ValueError(
                "Expected `latency` only with objective='latency'. "
                f"Received: latency={self.latency!r}, objective={self.objective!r}"
            )
        object.__setattr__(self, "schemes", check_schemes(self.schemes))
        if self.schemes != (0,):
            self._check_folding()
        object.__setattr__(self, "exclude", tuple(inspect.check_exclude(self.exclude)))
        object.__setattr__(self, "bounds", check_bounds(self.bounds))
        for name in ("max_slices", "rank_multiple"):
            value = getattr(self, name)
            if name == "max_slices" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(
                    f"Expected `{name}` to be a positive integer. Received: {name}={value!r}"
                )

    def _check_folding(self) -> None:
        """Raises a ValueError where only fold scheme 0 can be had."""
        remedy = "Leave `schemes` out, or "
        if not get_method(self.method).folds:
            able = ", ".join(repr(name) for name, method in METHODS.items() if method.folds)
            received, remedy = f"method={self.method!r}", f"{remedy}take a method of {able}"
            remedy += " without calibration data"
        elif self.objective == "latency":
            received, remedy = f"objective={self.objective!r}", f"{remedy}take another objective"
        elif self.macs_cr is not None:
            received, remedy = "limits on parameters and MACs", f"{remedy}limit one of the two"
        else:
            return
        raise ValueError(
            "Expected no other fold scheme than 0 in `schemes` with a method of the comparison, "
            "with calibration data, measured latency, or two limits. "
            f"Received: schemes={self.schemes}, {received}. {remedy}."
        )

    def _set_limits(self, limits: Mapping[Any, Any]) -> None:
        if not limits or not set(limits) <= set(LIMITS) or self.objective != "params":
            raise ValueError(
                "Expected the limits in `cr` to be of 'params', 'macs' or both, and no `objective` "
                f"beside them. Received: cr={dict(limits)!r}, objective={self.objective!r}"
            )
        for fraction in limits.values():
            check_cr(fraction)
        if len(limits) == 1:
            ((name, fraction),) = limits.items()
            object.__setattr__(self, "objective", name)
        else:
            fraction = limits["params"]
            object.__setattr__(self, "macs_cr", float(limits["macs"]))
        object.__setattr__(self, "cr", fraction)


class Bound(NamedTuple):
    """One entry of `bounds`: what names layers, and the fractions of their parameters."""

    item: Any
    least: float
    greatest: float


def check_bounds(bounds: Any) -> tuple[Bound, ...]:
    """Returns `bounds` as entries; those of options that were checked before as they are.

    Raises:
        ValueError: If they are no mapping from layers to pairs of fractions.
    """
    if bounds is None:
        return ()
    if isinstance(bounds, tuple) and all(isinstance(entry, Bound) for entry in bounds):
        return bounds
    if not isinstance(bounds, Mapping):
        raise ValueError(
            "Expected `bounds` to be a dict from layers to (least, greatest), fractions of their "
            f"parameters to remove. Received: bounds={bounds!r}"
        )
    inspect.check_exclude(list(bounds), "bounds")
    entries = []
    for item, pair in bounds.items():
        try:
            least, greatest = pair
            least = 0.0 if least is None else float(least)
            greatest = 1.0 if greatest is None else float(greatest)
        except (TypeError, ValueError):
            least = greatest = math.nan
        if not 0 <= least <= greatest <= 1:
            raise ValueError(
                "Expected the bounds of a layer to be (least, greatest) with 0 <= least <= "
                f"greatest <= 1, or None in place of one. Received: {item!r}: {pair!r}"
            )
        entries.append(Bound(item, least, greatest))
    return tuple(entries)


def check_schemes(schemes: Any) -> tuple[int, ...]:
    """Returns fold schemes as a tuple, ascending.

    Raises:
        ValueError: If they are none of 0 to 3, a sequence of them, or `"all"`.
    """
    if isinstance(schemes, str) and schemes == "all":
        return SCHEMES
    found = (schemes,) if isinstance(schemes, numbers.Integral) else schemes
    if (
        isinstance(found, Iterable)
        and not isinstance(found, str)
        and (items := list(found))
        and all(isinstance(item, numbers.Integral) for item in items)
        and not any(isinstance(item, bool) for item in items)
        and set(items) <= set(SCHEMES)
    ):
        return tuple(sorted({int(item) for item in items}))
    raise ValueError(
        f"Expected `schemes` to be 'all', or one or several of {SCHEMES}. "
        f"Received: schemes={schemes!r}"
    )


def check_cr(cr: Any) -> None:
    """Raises a ValueError unless `cr` is a number strictly between 0 and 1."""
    if isinstance(cr, bool) or not isinstance(cr, numbers.Real) or not 0 < float(cr) < 1:
        raise ValueError(
            "Expected `cr`, the fraction to remove, to be a number with 0 < cr < 1. "
            f"Received: cr={cr!r} of type {type(cr).__name__}"
        )


def check_cr_or_plan(cr: Any, plan: Any, *, schemes: Any = 0, **options: Any) -> None:
    """Raises a ValueError unless there is either a `cr`, or a plan with no option of `select`.

    Args:
        cr: The fraction to remove, or None.
        plan: A `CompressionPlan`, or None.
        schemes: Fold schemes; 0 is their default.
        **options: Options of `select` by name; their defaults and what is empty are none.
    """
    if (cr is None) == (plan is None):
        raise ValueError(
            f"Expected either `cr` or `plan`. Received: cr={cr!r}, "
            f"plan={'a plan' if plan is not None else None}"
        )
    if plan is None:
        return
    check_plan(plan)
    defaults = {"exclude": (), "rank_multiple": 1, "objective": "params"}
    given = {
        name: value
        for name, value in options.items()
        if value is not None
        and not (value == defaults.get(name) or (isinstance(value, (list, dict)) and not value))
    }
    if check_schemes(schemes) != (0,):
        given["schemes"] = schemes
    if given:
        raise ValueError(
            "Expected no options beside `plan`: it holds the choices that were made with them. "
            f"Received: {', '.join(f'{name}={value!r}' for name, value in given.items())}"
        )
