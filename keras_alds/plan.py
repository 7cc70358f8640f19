"""`CompressionPlan`: the choice for every layer; the layers that were skipped, and why."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from keras_alds.core.slicing import SCHEMES
from keras_alds.tables import print_plan

PLAN_VERSION = 1


class Skip(str, enum.Enum):
    """Why a layer is skipped, in one word."""

    NO_KERNEL = "no_kernel"  # it has only vectors
    NO_FORM = "no_form"  # its class has no factorized form
    FACTORIZED = "factorized"  # it is already factorized
    OWN_CODE = "own_code"  # its class adds behaviour that a factorized layer would lose
    LORA = "lora"
    QUANTIZED = "quantized"
    SETTINGS = "settings"  # its arguments allow no factorized form
    CONSTRAINT = "constraint"
    TOO_SMALL = "too_small"  # no factorization is smaller
    HOLDER = "holder"  # the layer that contains it does not allow it
    WRAPPED = "wrapped"  # by TF-MOT
    SHARED = "shared"  # another layer uses the same kernel
    EXCLUDED = "excluded"
    NOT_COUNTED = "not_counted"  # it uses none of the limited resource, or this is not measured
    NO_DATA = "no_data"  # no calibration example reaches it
    METHOD = "method"  # the method cannot factorize it
    NO_CHOICE = "no_choice"  # no allowed choice is smaller
    BUDGET = "budget"  # staying dense fits the budget


class Skipped(NamedTuple):
    """Why a layer is skipped: a code for programs, and a detail for people."""

    code: Skip
    detail: str


@dataclasses.dataclass(frozen=True)
class LayerChoice:
    """The plan for one layer with weights.

    Attributes:
        layer: The layer's name, or its path `model/layer` inside nested models.
        kind: The layer's class name, such as `"Conv2D"`.
        kernel_shape: Shape of the dense kernel, `(*kernel_size, channels, filters)`, or None if
            the layer has no kernel to factorize.
        slices: Number of channel slices k, or None if the layer is skipped.
        rank: Rank j of every slice, or None if the layer is skipped.
        scheme: Fold scheme of the unfolding, or None if the layer is skipped. In scheme 0 the
            matrix is filters × (channels, window). In 1, 2 and 3 the height, the width and the
            whole window move to the filters' side.
        params_before: Parameters of the dense layer, biases included.
        params_after: Parameters of the layer after compression.
        macs_before: Multiply–accumulates of the dense layer in one forward pass of one example,
            summed over the calls of a shared layer; None unless the plan limits MACs.
        macs_after: Multiply–accumulates after compression.
        error: The error measure of the choice; 0 if the layer is skipped.
        reason: Why the layer is skipped, or None if it is factorized.
        note: A remark about the choice, or None.
        latency_before: Measured latency of the dense layer, in nanoseconds, summed over the calls
            of a shared layer; None unless the objective is `"latency"` and the layer was measured.
        latency_after: Latency after compression by the same measurements, in nanoseconds.
        reason_code: The reason in one word, one of `Skip`, or None if the layer is factorized.
    """

    layer: str
    kind: str
    kernel_shape: tuple[int, ...] | None
    slices: int | None
    rank: int | None
    scheme: int | None
    params_before: int
    params_after: int
    macs_before: int | None
    macs_after: int | None
    error: float
    reason: str | None
    note: str | None = None
    latency_before: int | None = None
    latency_after: int | None = None
    reason_code: str | None = None

    @property
    def factorized(self) -> bool:
        """Whether the plan factorizes this layer."""
        return self.reason is None

    @property
    def has_kernel(self) -> bool:
        """Whether the layer has a kernel, not only vectors."""
        return self.reason_code != Skip.NO_KERNEL.value


@dataclasses.dataclass(frozen=True)
class CompressionPlan:
    """The slices and rank of every layer of a model, as chosen by `keras_alds.select`.

    A plan contains no weights and can be saved as JSON. The same plan and weights always give the
    same model.

    Attributes:
        requested_cr: The requested fraction to remove.
        method: Name of the method, such as `"alds"`.
        error_measure: Name of the error measure, such as `"slice"`.
        objective: What `cr` counts: `"params"`, `"macs"` or `"latency"`.
        params_before: Parameters of the original model, as `model.count_params()`.
        params_after: Parameters after compression.
        macs_before: Multiply–accumulates of the original model; None unless MACs are limited.
        macs_after: Multiply–accumulates after compression.
        choices: One `LayerChoice` for every layer with weights, in the model's order.
        target: The runtime that constrains the choices, or None.
        output_error: With calibration data and a target, except for latency: the relative squared
            error of each layer's outputs on the original network's activations, summed over the
            layers. None otherwise.
        output_error_without_target: The same sum for the choices under the same budget without
            the target's constraints. None otherwise.
        requested_macs_cr: With limits on parameters and MACs: the requested fraction of MACs to
            remove. `requested_cr` and `cr` then count parameters, and `reduction("macs")` is at
            least this value. None otherwise.
        latency_before: Measured latency of the original model in nanoseconds, or the sum over its
            layers where that is larger; None unless the objective is `"latency"`.
        latency_after: Latency predicted from the measurements of the layers, in nanoseconds.
        latency_runtime: The measured configuration, such as `"int8, 1 thread"`. The ratios do not
            hold for other configurations. None unless the objective is `"latency"`.
        version: Version of the JSON format.

    Example:
    ```python
    plan = keras_alds.select(model, cr=0.5)
    plan.summary()
    plan.save("plan.json")
    small = keras_alds.compress(model, plan=keras_alds.CompressionPlan.load("plan.json"))
    ```
    """

    requested_cr: float
    method: str
    error_measure: str
    objective: str
    params_before: int
    params_after: int
    macs_before: int | None
    macs_after: int | None
    choices: tuple[LayerChoice, ...]
    target: str | None = None
    output_error: float | None = None
    output_error_without_target: float | None = None
    requested_macs_cr: float | None = None
    latency_before: int | None = None
    latency_after: int | None = None
    latency_runtime: str | None = None
    version: int = PLAN_VERSION

    @property
    def cr(self) -> float:
        """The removed fraction of what the objective counts; at least `requested_cr`."""
        return self.reduction(self.objective)

    def reduction(self, objective: str) -> float:
        """The fraction of `"params"`, `"macs"` or `"latency"` that the plan removes.

        Raises:
            ValueError: If the plan was not made with this objective.
        """
        before, after = {
            "params": (self.params_before, self.params_after),
            "macs": (self.macs_before, self.macs_after),
            "latency": (self.latency_before, self.latency_after),
        }[objective]
        if before is None or after is None:
            raise ValueError(
                f"Expected a plan that was made with objective={objective!r}. "
                f"Received: one made with objective={self.objective!r}"
            )
        return removed_fraction(before, after)

    @property
    def factorized(self) -> tuple[LayerChoice, ...]:
        """The choices of the layers that are factorized."""
        return tuple(choice for choice in self.choices if choice.factorized)

    @property
    def folded(self) -> tuple[LayerChoice, ...]:
        """The choices with a fold scheme other than 0."""
        return tuple(choice for choice in self.factorized if choice.scheme)

    @property
    def max_error(self) -> float:
        """The largest error of any layer, which the method `"alds"` minimises."""
        return max((choice.error for choice in self.choices), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """The plan as a dict that can be saved as JSON."""
        return {"format": "keras_alds.CompressionPlan", **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CompressionPlan:
        """The inverse of `to_dict`.

        Raises:
            ValueError: If `data` is not a plan, or has an unknown version.
        """
        if not isinstance(data, dict) or data.get("format") != "keras_alds.CompressionPlan":
            raise ValueError(
                "Expected the JSON of a keras_alds compression plan. "
                f"Received: format={data.get('format') if isinstance(data, dict) else data!r}"
            )
        if data.get("version") != PLAN_VERSION:
            raise ValueError(
                f"Expected a compression plan of version {PLAN_VERSION}. "
                f"Received: version={data.get('version')!r}. Make a new plan with `select`."
            )
        fields = {key: value for key, value in data.items() if key != "format"}
        try:
            fields["choices"] = tuple(
                LayerChoice(
                    **{
                        **choice,
                        "kernel_shape": choice["kernel_shape"] and tuple(choice["kernel_shape"]),
                    }
                )
                for choice in fields["choices"]
            )
            plan = cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(
                "Expected a compression plan with the fields of `CompressionPlan` and "
                f"`LayerChoice`. Received: other fields ({error})"
            ) from error
        schemes = {choice.scheme for choice in plan.factorized}
        if not schemes <= set(SCHEMES):
            raise ValueError(
                f"Expected the fold schemes of a plan to be among {SCHEMES}. "
                f"Received: schemes={sorted(map(str, schemes))}"
            )
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to `path` as JSON."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=1)
            file.write("\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CompressionPlan:
        """Reads a plan that `save` wrote.

        Raises:
            ValueError: If the file does not contain a plan.
        """
        with open(path, encoding="utf-8") as file:
            try:
                data = json.load(file)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"Expected the JSON of a compression plan in {os.fspath(path)!r}. "
                    f"Received: text that is not JSON ({error})"
                ) from error
        return cls.from_dict(data)

    def summary(
        self, print_fn: Callable[[str], object] | None = None, line_length: int | None = None
    ) -> None:
        """Prints a table of the choices, like Keras's `Model.summary()`.

        Args:
            print_fn: Called with the text; default: standard output, in colour on a terminal.
            line_length: Width of the table in characters; default: the terminal's.
        """
        print_plan(self, print_fn=print_fn, line_length=line_length)


def removed_fraction(before: int, after: int) -> float:
    """The fraction `cr` that was removed, 1 - after / before."""
    return 1 - after / before


def allowed_after(before: int, cr: float) -> int:
    """The largest count that `removed_fraction` still reports as at least `cr`."""
    after = int((1 - cr) * before)
    while removed_fraction(before, after) < cr:
        after -= 1
    while removed_fraction(before, after + 1) >= cr:
        after += 1
    return after


def check_plan(plan: Any) -> None:
    """Raises a ValueError unless `plan` is a `CompressionPlan`."""
    if not isinstance(plan, CompressionPlan):
        raise ValueError(
            "Expected `plan` to be a CompressionPlan (see `select` and `CompressionPlan.load`). "
            f"Received: plan={plan!r} of type {type(plan).__name__}"
        )
