"""The steps of `ALDSCompress`: what it asks for before which epochs."""

from __future__ import annotations

import dataclasses
import itertools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from keras_alds.choosing import checked_options
from keras_alds.models.recompose import Request
from keras_alds.options import Options, check_cr_or_plan
from keras_alds.plan import CompressionPlan

#: The `at_epoch` that leaves the epoch to the ranks.
AUTO = "auto"


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One compression.

    Attributes:
        at_epoch: The index of the epoch before which to compress.
        request: What to reach.
    """

    at_epoch: int
    request: Request

    @property
    def limits(self) -> dict[str, float]:
        """The fractions to remove."""
        if isinstance(self.request, Options):
            return dict(self.request.limits)
        return {name: cost.removed for name, cost in self.request.costs.items()}

    def asks_for(self, plan: CompressionPlan) -> bool:
        """Whether a plan was made for this request, or is it."""
        if isinstance(self.request, Options):
            return plan.requested == self.request.requested
        return plan == self.request

    def contradicts(self, earlier: Stage) -> bool:
        """Whether this stage removes no more than an earlier one, or comes in the same epoch."""
        before, after = earlier.limits, self.limits
        return self.at_epoch == earlier.at_epoch or any(
            after[name] <= before[name] for name in before.keys() & after.keys()
        )

    def __str__(self) -> str:
        asked = self.request.requested if isinstance(self.request, Options) else self.limits
        if len(asked) == 1:
            return f"cr={next(iter(asked.values())):g} at epoch {self.at_epoch}"
        limits = ", ".join(f"{name}={fraction:g}" for name, fraction in asked.items())
        return f"{limits} at epoch {self.at_epoch}"


class Course:
    """The stages of one `fit`: which are left to take, and which were taken, here or earlier.

    Args:
        stages: All of them, in the order of their epochs.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.left = [*stages]
        self._counted = [*stages]  # those that are taken in this training, or were before it
        self._first_epoch: int | None = None

    def due(self, epoch: int) -> list[Stage]:
        """The stages that are left to take before an epoch. Of several, the last one counts."""
        return [stage for stage in self.left if stage.at_epoch <= epoch]

    def missed(self, epoch: int) -> list[Stage]:
        """Those of `due` that an earlier run has passed, if the training starts at this epoch."""
        late = [stage for stage in self.due(epoch) if stage.at_epoch < epoch]
        return late if self._first_epoch is None else []

    def drop(self, count: int) -> None:
        """Takes the first stages that are left off the list."""
        del self.left[:count]

    def begin(self, epoch: int) -> None:
        """Notes that an epoch begins. Stages that the model met before do not count if later."""
        if self._first_epoch is None:
            self._first_epoch = epoch
            self._counted = [s for s in self._counted if s in self.left or s.at_epoch <= epoch]

    def is_first(self, epoch: int) -> bool:
        """Whether the training starts at an epoch."""
        return self._first_epoch is None or epoch <= self._first_epoch

    def count_at(self, epoch: int) -> int:
        """How many stages are taken just before an epoch."""
        return sum(stage.at_epoch == epoch for stage in self._counted)

    def count_until(self, epoch: int) -> int:
        """How many stages are taken up to the beginning of an epoch, in earlier runs too."""
        return sum(stage.at_epoch <= epoch for stage in self._counted)


def stages_of(
    cr: Any,
    at_epoch: Any,
    plan: CompressionPlan | None,
    options: Mapping[str, Any],
    *,
    has_data: bool,
) -> tuple[Stage, ...]:
    """The stages that the arguments of `ALDSCompress` stand for, in the order of their epochs.

    Raises:
        TypeError: If an option's name is unknown.
        ValueError: If an argument is invalid, or they do not fit each other.
    """
    check_cr_or_plan(cr, plan, options, "ALDSCompress")
    several = _is_list(cr), _is_list(at_epoch)
    if any(several) and not (all(several) and len(cr) == len(at_epoch) > 0):
        raise ValueError(
            "Expected one `cr` for one `at_epoch`, or lists of the same length. "
            f"Received: cr={'a plan' if plan is not None else repr(cr)}, at_epoch={at_epoch!r}"
        )
    found = []
    if at_epoch == AUTO:  # until the ranks are known
        at_epoch = 0
    for fraction, epoch in zip(cr, at_epoch, strict=True) if all(several) else [(cr, at_epoch)]:
        if isinstance(epoch, bool) or not isinstance(epoch, numbers.Integral) or epoch < 0:
            raise ValueError(
                "Expected `at_epoch`, the index of an epoch, to be an integer >= 0. "
                f"Received: at_epoch={at_epoch!r}"
            )
        request = plan or checked_options(
            fraction, options, has_data=has_data, caller="ALDSCompress"
        )
        found.append(Stage(int(epoch), request))
    for earlier, later in itertools.pairwise(found):
        if later.at_epoch < earlier.at_epoch or later.contradicts(earlier):
            raise ValueError(
                "Expected `cr` and `at_epoch` to grow from step to step. "
                f"Received: {earlier}, then {later}"
            )
    return tuple(found)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
