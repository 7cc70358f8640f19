"""`CompressionPlan`: the choice for every layer; the layers that were skipped, and why."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from keras_alds.core.chains import CP, TUCKER
from keras_alds.core.slicing import SCHEMES
from keras_alds.resources import MEMORY, RESOURCES, Cost
from keras_alds.tables import Tabular, TextTable, plan_table

PLAN_VERSION = 2


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
    SHARED = "shared"  # another layer or the model uses its kernel too
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


@dataclasses.dataclass(frozen=True, repr=False)
class LayerChoice:
    """The plan for one layer with weights, as `select` chooses it.

    Attributes:
        layer: The layer's name, or its path `model/layer` inside nested models.
        kind: The layer's class name, such as `"Conv2D"`.
        kernel_shape: Shape of the dense kernel, `(*kernel_size, channels, filters)`, or None if
            the layer has no kernel to factorize.
        slices: Number of channel slices k, or None if the layer is skipped.
        rank: Rank j of every slice, or None if the layer is skipped.
        scheme: Fold scheme of the unfolding, or None if the layer is skipped. In scheme 0 the
            matrix is filters × (channels, window). In 1, 2 and 3 the height, the width and the
            whole window move to the filters' side. 4 is Tucker-2, 5 is CP; see the methods
            `"tucker"` and `"cp"`.
        costs: What the layer uses of each resource, as `Cost(before, after)`. `"params"` are
            always there, biases included. If the plan limits them, so are `"macs"` in one
            forward pass of one example, and measured `"latency"` in nanoseconds, both summed over
            the calls of a shared layer. `"latency"` is missing for layers that are not measured.
        error: The error measure of the choice; 0 if the layer is skipped.
        reason: Why the layer is skipped, or None if it is factorized.
        note: A remark about the choice, or None.
        reason_code: The reason in one word, one of `Skip`, or None if the layer is factorized.
        divergence: An estimate of what the choice does to the model's outputs while all other
            layers stay as they are: the Kullback–Leibler divergence in nats of probabilities, and
            of scores before softmax; for other outputs, the squared error relative to their
            variance. None without calibration data.
        input_rank: In Tucker-2, the rank of the input channels; `rank` is that of the output
            channels. None otherwise.
    """

    layer: str
    kind: str
    kernel_shape: tuple[int, ...] | None
    slices: int | None
    rank: int | None
    scheme: int | None
    costs: Mapping[str, Cost] = dataclasses.field(hash=False)
    error: float
    reason: str | None
    note: str | None = None
    reason_code: str | None = None
    divergence: float | None = None
    input_rank: int | None = None

    def __repr__(self) -> str:
        choice = f"skipped: {self.reason}"
        if self.factorized:
            choice = f"slices={self.slices}, rank={self.rank}, error={self.error:.4f}"
        params = RESOURCES["params"].text(self.costs.get("params"))
        return f"<LayerChoice {self.layer!r} ({self.kind}): {params} params, {choice}>"

    @property
    def params_before(self) -> int:
        """Parameters of the dense layer."""
        return self.costs["params"].before

    @property
    def params_after(self) -> int:
        """Parameters of the layer after compression."""
        return self.costs["params"].after

    @property
    def factorized(self) -> bool:
        """Whether the plan factorizes this layer."""
        return self.reason is None

    @property
    def has_kernel(self) -> bool:
        """Whether the layer has a kernel, not only vectors."""
        return self.reason_code != Skip.NO_KERNEL.value


@dataclasses.dataclass(frozen=True, repr=False)
class CompressionPlan(Tabular):
    """The slices and rank of every layer of a model, as chosen by `keras_alds.select`.

    A plan contains no weights and can be saved as JSON. The same plan and weights always give the
    same model.

    Attributes:
        requested: The requested fraction to remove of each limited resource, such as
            `{"params": 0.5}`.
        method: Name of the method, such as `"alds"`.
        error_measure: Name of the error measure, such as `"slice"`.
        objective: What `cr` counts: `"params"`, `"macs"` or `"latency"`.
        costs: What the model uses of each resource, as `Cost(before, after)`: always `"params"`,
            as `model.count_params()`, and all that is limited. The `"latency"` is in nanoseconds;
            before, it is measured, or the sum over the layers where that is larger; after, it is
            predicted from the measurements of the layers.
        choices: One `LayerChoice` for every layer with weights, in the model's order.
        target: The runtime that constrains the choices, or None.
        output_error: With calibration data and a target, except for latency: the relative squared
            error of each layer's outputs on the original network's activations, summed over the
            layers. None otherwise.
        output_error_without_target: The same sum for the choices under the same budget without
            the target's constraints. None otherwise.
        runtime: The measured configuration, such as `"int8, 1 thread"`. The ratios do not hold for
            other configurations. None unless the objective is `"latency"`.
        sequential: Whether `compress` should fit the layers one after the other. None if no
            other plan was tried.
        normalized: Whether `compress` should correct the moving statistics of BatchNormalization,
            by the difference that the compression makes to them on the examples. None if no
            other plan was tried.
        distance: How far the outputs on held-out examples are from the original's. For
            probabilities, and scores before softmax, it is the total variation distance: the
            probability, from 0 to 1, that is given to other classes. For other outputs, it is the
            squared error relative to their variance. The factors are fitted without the held-out
            examples. None if that was not measured.
        trials: The `distance` of each plan that was tried. The names say how errors are weighed: by
            what they do to the `"outputs"`, by a power of that, or `"equal"`; whether the layers
            exchanged cost by what whole plans do to the outputs, `", exchanged"`; whether they are
            fitted one after the other, `", sequential"`; and whether the moving statistics are
            corrected, `", normalized"`. For `"no data"`, the data only measured the distance. For
            scores and probabilities, their relative squared error counts as much as the distance,
            so the least distance need not win. In a near tie it is the plan with equal weights,
            then the sequential one, then the one with corrected statistics. None without examples.
        memory: The peak of the activation memory for one example, as `Cost(before, after)`: how
            many entries of feature maps are live at once. In int8 it is as many bytes, in float32
            four times as many. None for a subclassed model, or if a size is unknown. If memory is
            not limited, it is also None if layers inside others can be compressed, as in attention.
        version: Version of the JSON format.

    Example:
    ```python
    plan = keras_alds.select(model, cr=0.5)
    plan.summary()
    plan.save("plan.json")
    small = keras_alds.compress(model, plan=keras_alds.CompressionPlan.load("plan.json"))
    ```
    """

    requested: Mapping[str, float] = dataclasses.field(hash=False)
    method: str
    error_measure: str
    objective: str
    costs: Mapping[str, Cost] = dataclasses.field(hash=False)
    choices: tuple[LayerChoice, ...]
    target: str | None = None
    output_error: float | None = None
    output_error_without_target: float | None = None
    runtime: str | None = None
    sequential: bool | None = None
    normalized: bool | None = None
    distance: float | None = None
    trials: Mapping[str, float] | None = dataclasses.field(default=None, hash=False)
    memory: Cost | None = None
    version: int = PLAN_VERSION

    def __repr__(self) -> str:
        removed = ", ".join(f"{cost.removed:.2%} of {name}" for name, cost in self.costs.items())
        return (
            f"<CompressionPlan by method {self.method!r}: removes {removed}; "
            f"{len(self.factorized)} of {len(self.choices)} layers factorized. "
            "summary() shows them>"
        )

    @property
    def requested_cr(self) -> float:
        """The requested fraction to remove of what the objective counts."""
        return self.requested[self.objective]

    @property
    def cr(self) -> float:
        """The removed fraction of what the objective counts; at least `requested_cr`."""
        return self.reduction(self.objective)

    @property
    def params_before(self) -> int:
        """Parameters of the original model."""
        return self.costs["params"].before

    @property
    def params_after(self) -> int:
        """Parameters after compression."""
        return self.costs["params"].after

    def reduction(self, objective: str) -> float:
        """The fraction of `"params"`, `"macs"`, `"latency"` or `"memory"` that the plan removes.

        Raises:
            ValueError: If the plan was not made with this objective, or does not know the memory.
        """
        if objective == MEMORY:
            if self.memory is None:
                raise ValueError("Expected a plan that knows the memory. Received: memory=None")
            return self.memory.removed
        if objective not in self.costs:
            raise ValueError(
                f"Expected a plan that was made with objective={objective!r}. "
                f"Received: one made with objective={self.objective!r}"
            )
        return self.costs[objective].removed

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
                        "costs": _costs(choice["costs"]),
                    }
                )
                for choice in fields["choices"]
            )
            fields["costs"] = _costs(fields["costs"])
            fields["memory"] = Cost(*fields["memory"]) if fields.get("memory") else None
            plan = cls(**fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                "Expected a compression plan with the fields of `CompressionPlan` and "
                f"`LayerChoice`. Received: other fields ({error})"
            ) from error
        schemes = {choice.scheme for choice in plan.factorized}
        known = (*SCHEMES, TUCKER, CP)
        if not schemes <= set(known):
            raise ValueError(
                f"Expected the fold schemes of a plan to be among {known}. "
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
            except ValueError as error:  # also of what is no text
                raise ValueError(
                    f"Expected the JSON of a compression plan in {os.fspath(path)!r}. "
                    f"Received: a file that is not JSON ({error})"
                ) from error
        return cls.from_dict(data)

    def summary(
        self,
        print_fn: Callable[[str], object] | None = None,
        line_length: int | None = None,
        show_skipped: bool = False,
    ) -> None:
        """Prints a table of the choices, like Keras's `Model.summary()`.

        Args:
            print_fn: Called with the text; default: standard output, in colour on a terminal.
            line_length: Width in characters; default: the terminal's, else 100.
            show_skipped: Boolean. Whether skipped layers have rows of their own. Defaults to
                False: one line below the table for each reason.
        """
        plan_table(self, show_skipped=show_skipped).print(print_fn, line_length)

    def to_rows(self) -> list[dict[str, Any]]:
        """The choices of all layers as dicts; skipped layers have a reason and no rank."""
        return [self._row(choice) for choice in self.choices]

    def _row(self, choice: LayerChoice) -> dict[str, Any]:
        row = {name: getattr(choice, name) for name in _FIRST}
        for name in self.costs:
            cost = choice.costs.get(name)
            row |= {f"{name}_before": cost and cost.before, f"{name}_after": cost and cost.after}
        return row | {name: getattr(choice, name) for name in _LAST}

    def _table(self) -> TextTable:
        return plan_table(self)


# The columns of `to_rows` before and after the costs.
_FIRST = ("layer", "kind", "kernel_shape", "slices", "rank", "input_rank", "scheme")
_LAST = ("error", "divergence", "reason_code", "reason", "note")


def _costs(costs: Mapping[str, Any]) -> dict[str, Cost]:
    return {name: Cost(*cost) for name, cost in costs.items()}


def check_plan(plan: Any) -> None:
    """Raises a ValueError unless `plan` is a `CompressionPlan`."""
    if not isinstance(plan, CompressionPlan):
        raise ValueError(
            "Expected `plan` to be a CompressionPlan (see `select` and `CompressionPlan.load`). "
            f"Received: plan={reprlib.repr(plan)} of type {type(plan).__name__}"
        )
