"""`Selection`: the allowed choices of the layers, the budgets, and the solution."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from keras_alds.core.calibration.moments import MANY
from keras_alds.core.chains import form_weights
from keras_alds.core.choices import ChoiceTable, offered_ranks
from keras_alds.core.costs import Costs
from keras_alds.core.methods import Method
from keras_alds.core.solvers import InfeasibleBudget, Solution
from keras_alds.kinds.base import factorizable_names, observable
from keras_alds.methods import DEFAULT, get_method
from keras_alds.models.calibration import CalibrationStats
from keras_alds.models.choices import choice_tables
from keras_alds.models.inventory import Inventory, LayerRecord, already_compressed
from keras_alds.models.memory import Memory
from keras_alds.models.resources import Params, Resource
from keras_alds.models.trials import EQUAL, WEIGHINGS, weighed
from keras_alds.naming import Bound
from keras_alds.options import Options
from keras_alds.plan import (
    CompressionPlan,
    LayerChoice,
    Skip,
    Skipped,
)
from keras_alds.resources import RESOURCES, Cost, allowed_after, rounded_down, rounded_up
from keras_alds.tables import counted
from keras_alds.targets import get_target


def candidates_of(inventory: Inventory, options: Options, *, stacklevel: int) -> Inventory:
    """The inventory with the layers that the options allow to be factorized.

    Raises:
        ValueError: If the model is already compressed, or no layer can be factorized.
    """
    if factorized := [record for record in inventory.factorized if not record.excluded]:
        raise already_compressed(factorized)
    schemes = options.schemes_of(get_method(options.method))
    inventory = inventory.without_assigned().map(lambda record: record.folded(schemes))
    if not inventory.candidates:
        reasons = skipped_parts([(record, record.params) for record in inventory.records])
        raise ValueError(
            f"Expected the model '{inventory.model.name}' to hold a layer that can be factorized "
            f"({', '.join(factorizable_names())}). "
            f"Received: none ({'; '.join(reasons) or 'no weights at all'})"
        )
    inventory.warn_of_unmatched(stacklevel=stacklevel + 1)
    return inventory


def skipped_parts(amounts: Iterable[tuple[LayerRecord, int]]) -> list[str]:
    """What is skipped and why, as in `"'head' (4,096): it is quantized (int8)"`.

    Args:
        amounts: Layers, and what each of them uses of a resource.

    Returns:
        The three reasons that hold for most of the resource, most first.
    """
    found: dict[str, list[tuple[str, int]]] = {}
    for record, amount in amounts:
        if record.skipped and amount:
            found.setdefault(record.skipped.detail, []).append((record.path, amount))
    parts = []
    for reason, layers in sorted(found.items(), key=lambda item: -sum(n for _, n in item[1])):
        names = f"'{layers[0][0]}'" + f" and {len(layers) - 1} more" * (len(layers) > 1)
        parts.append(f"{names} ({sum(amount for _, amount in layers):,}): {reason}")
    return parts[:3]


class UnreachableError(ValueError):
    """A limit or bound that no allowed choices meet."""


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """The selection problem: a model's layers, limits and options.

    Attributes:
        inventory: The model, with bounds, and with second moments if there is calibration data.
        resources: The limited resources; `cr` counts the first one.
        options: The options.
        stats: Calibration statistics, or None.
        memory: What is live at once, or None if this is unknown.
    """

    inventory: Inventory
    resources: tuple[Resource, ...]
    options: Options
    stats: CalibrationStats | None = None
    memory: Memory | None = None

    @classmethod
    def of(cls, inventory: Inventory, resources: Sequence[Resource], options: Options) -> Selection:
        """Skips layers as the resources require.

        Raises:
            ValueError: If memory is limited, and the model's is unknown.
        """

        def skipped(record: LayerRecord) -> LayerRecord:
            found = (resource.skipped(record) for resource in resources if not record.skipped)
            reason = next(filter(None, found), None)
            return record if reason is None else dataclasses.replace(record, skipped=reason)

        bounds = [Bound(inventory.meant(item), *limits) for item, *limits in options.bounds]
        inventory = inventory.map(skipped).map(lambda record: record.bounded(bounds))
        limited = options.memory is not None
        memory = Memory.of(inventory, trace=limited)
        if limited and memory is None:
            raise ValueError(
                "Expected a Functional or Sequential model whose feature maps have known sizes, to "
                f"limit memory. Received: the model '{inventory.model.name}', "
                f"cr={options.requested}"
            )
        return cls(inventory, tuple(resources), options, memory=memory)

    def check(self) -> None:
        """Checks that `cr` can be reached, whatever the weights are.

        Raises:
            UnreachableError: If it cannot, or no choice of a layer is within its bounds.
        """
        self.check_memory()
        for index, resource in enumerate(self.resources):
            required = sum(self.smallest_cost(r, resource) for r in self.inventory.candidates)
            if required > self.budget_of(resource):
                raise self.unreachable(required, index)

    def with_options(self, options: Options) -> Selection:
        """The same problem with other options of the same method."""
        schemes = options.schemes_of(get_method(options.method))
        inventory = self.inventory.map(lambda record: record.folded(schemes))
        return dataclasses.replace(self, options=options, inventory=inventory)

    @property
    def matched_bounds(self) -> tuple[Bound, ...]:
        """The bounds that name a layer that can be factorized."""
        named = {b: self.inventory.meant(b.item) for b in self.options.bounds}
        records = self.inventory.candidates
        return tuple(b for b, item in named.items() if any(r.is_named_by(item) for r in records))

    def warn_of_bounds(self, *, stacklevel: int) -> None:
        """Warns of bounds that match no layer that can be factorized."""
        for bound in self.options.bounds:
            if bound not in self.matched_bounds:
                warnings.warn(
                    f"`bounds` entry {bound.item!r} matches no layer of the model "
                    f"'{self.inventory.model.name}' that can be factorized"
                    f"{self.inventory.nearest(bound.item) or '.'}",
                    stacklevel=stacklevel + 1,
                )

    def calibrated(self, stats: CalibrationStats) -> Selection:
        """The same selection with calibration statistics.

        Layers that no example reached or that the method cannot factorize are skipped.
        """
        inventory = stats.match(self.inventory).map(self._measured)
        return dataclasses.replace(self, inventory=inventory, stats=stats)

    def _measured(self, record: LayerRecord) -> LayerRecord:
        if record.skipped:
            return record
        if self.method.factorize_with_bias is not None and not record.kind.principal:
            return record.skip(
                Skip.METHOD,
                f"the method {self.options.method!r} needs a bias for every column of the kernel, "
                f"and {record.class_name} has none",
            )
        if record.moment is not None:
            obstacle = self.method.obstacle(record.moment)
            return record if obstacle is None else record.skip(Skip.METHOD, obstacle)
        if observable(record.layer):
            return record.skip(Skip.NO_DATA, "no calibration example reaches it")
        return record

    @functools.cached_property
    def method(self) -> Method:
        """The method, with the chosen error measure."""
        return get_method(self.options.method, self.options.error_measure)

    @functools.cached_property
    def params(self) -> Params:
        """Parameters, which every plan reports."""
        return Params(self.inventory, self.method)

    # -- The memory --------------------------------------------------------------------------

    @functools.cached_property
    def allowed(self) -> int | None:
        """The largest peak of the memory that the limit allows; None without a limit."""
        if self.memory is None or self.options.memory is None:
            return None
        return allowed_after(self.memory.peak, self.options.memory)

    def check_memory(self) -> None:
        """Checks that every operator can be within the limit of the memory.

        Raises:
            UnreachableError: If one cannot.
        """
        if self.memory is None or self.allowed is None:
            return
        needs = [(self.least_memory(record), record.path) for record in self.inventory.records]
        least, where = max((self.memory.fixed, self.memory.where), *needs)
        if least <= self.allowed:
            return
        most = Cost(self.memory.peak, least).removed
        raise UnreachableError(
            f"memory={self.options.memory:g} is not reachable for the model "
            f"'{self.inventory.model.name}': expected 0 <= memory <= {rounded_down(most)}, as "
            f"at least {least:,} entries are live while layer '{where}' runs, and "
            f"{self.memory.peak:,} at the peak before ({self._limits}). "
            f"Received: cr={self.options.requested}"
        )

    def least_memory(self, record: LayerRecord) -> int:
        """The fewest entries that are live while a layer runs, in any of its forms."""
        assert self.memory is not None
        peaks = [self.memory.dense(record.layer)]
        if record.skipped is None:
            peaks += [
                self.memory.factorized(record.layer, (scheme, slices, ranks[0]))
                for scheme in record.schemes
                for slices, ranks in self._offered(record, scheme).items()
            ]
        return min(peaks)

    def keeps(self, record: LayerRecord) -> bool:
        """Whether a layer may stay as it is, by the limit of the memory."""
        if self.memory is None or self.allowed is None:
            return True
        return self.memory.dense(record.layer) <= self.allowed

    # -- The allowed choices of a layer ------------------------------------------------------

    def offered(self, record: LayerRecord, scheme: int) -> dict[int, range]:
        """The allowed ranks of a layer, by number of slices."""
        offered = self._offered(record, scheme)
        if self.memory is None or self.allowed is None:
            return offered
        within = {
            slices: self.memory.within(record.layer, scheme, slices, ranks, self.allowed)
            for slices, ranks in offered.items()
        }
        return {slices: ranks for slices, ranks in within.items() if ranks}

    def _offered(self, record: LayerRecord, scheme: int) -> dict[int, range]:
        """The same without a limit of the memory."""
        blocks = 1 if record.moment is None else record.moment.block_count
        target = get_target(self.options.target)
        limits = [self.options.max_slices]
        rule = None
        if target is not None:
            if scheme and blocks > 1:
                return {}  # targets know one slice only in these schemes
            rule = record.rule_of(target, scheme, blocks)
            # Targets know the sliced forms of plain convolutions in scheme 0 only.
            limits += [1] if scheme or not record.kind.measured else []
        most = _least(limits)
        if most is not None:  # a layer of which only blocks are known has at least as many slices
            most = max(most, blocks)
        counts_bias = self.resources[0].name == self.params.name
        return offered_ranks(
            record.shape_in(scheme),
            rule=rule,
            max_slices=_least([most, record.kind.max_slices]),
            near_slices=self.method.near_slices,
            rank_multiple=self.options.rank_multiple,
            blocks=blocks,
            added=self.params.added(record) if counts_bias else 0,
            scheme=scheme,
        )

    def smallest_cost(self, record: LayerRecord, resource: Resource) -> int:
        """The cost of a layer's kernel in its cheapest allowed form.

        Raises:
            ValueError: If the layer's bounds allow no form.
        """
        costs = resource.costs(record)
        forms = [
            (scheme, k, ranks)
            for scheme in record.schemes
            for k, ranks in self.offered(record, scheme).items()
        ]
        found = [costs.of(k, ranks, scheme) for scheme, k, ranks in forms]
        price = np.concatenate([[costs.dense], *found])
        if self._is_unlimited(record):
            return int(price.min())
        sizes = [
            form_weights(record.shape_in(scheme), k, np.array(ranks), scheme)
            for scheme, k, ranks in forms
        ]
        size = np.concatenate([[record.dense_weights], *sizes])
        size, price = size[price <= costs.dense], price[price <= costs.dense]
        within = self.is_within(record, size)
        if not within.any():
            raise self.nothing_within(record, size)
        return int(price[within].min())

    def _is_unlimited(self, record: LayerRecord) -> bool:
        """Whether a layer has no bounds, and may stay as it is."""
        return record.bounds == (0.0, 1.0) and self.keeps(record)

    def is_within(self, record: LayerRecord, sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether a layer is within its bounds, for each number of weights of its kernel.

        The layer as it is also has to be within the limit of the memory.
        """
        least, greatest = record.bounds
        removed = self.removed(record, sizes)
        kept = (sizes < record.dense_weights) | self.keeps(record)
        return (least <= removed) & (removed <= greatest) & kept

    def removed(self, record: LayerRecord, sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        """The fraction of a layer's own parameters that is gone, for each size of its kernel."""
        added = np.where(sizes < record.dense_weights, self.params.added(record), 0)
        after = record.params - record.dense_weights + sizes + added
        return 1 - after / record.params

    def nothing_within(self, record: LayerRecord, sizes: NDArray[np.int64]) -> UnreachableError:
        """The error for a layer without a choice within its bounds."""
        if not self.keeps(record):
            return UnreachableError(
                f"Expected layer '{record.path}' to have a choice within all limits. Received: "
                f"cr={self.options.requested}, {self._limits}, where it has none"
            )
        least, greatest = record.bounds
        fractions = np.sort(self.removed(record, sizes)).tolist()
        nearest = [
            *[rounded_down(fraction) for fraction in fractions if fraction < least][-1:],
            *[rounded_up(fraction) for fraction in fractions if fraction > greatest][:1],
        ]
        return UnreachableError(
            f"Expected the `bounds` of layer '{record.path}' to allow one of its choices. Received:"
            f" ({least:g}, {greatest:g}), where the nearest fractions of its parameters that the "
            f"method {self.options.method!r} can remove are " + " and ".join(nearest)
        )

    # -- Budgets -----------------------------------------------------------------------------

    def fixed_cost(self, resource: Resource) -> int:
        """The cost of everything except the candidates' kernels."""
        kernels = sum(resource.costs(record).dense for record in self.inventory.candidates)
        return resource.total - kernels

    def budget_of(self, resource: Resource) -> int:
        """The total budget for the candidates' kernels."""
        cr = self.options.limits[resource.name]
        return allowed_after(resource.total, cr) - self.fixed_cost(resource)

    def greatest(self, resource: Resource) -> float:
        """The fraction that is removed with the smallest allowed choice everywhere."""
        required = sum(self.smallest_cost(record, resource) for record in self.inventory.candidates)
        return Cost(resource.total, required + self.fixed_cost(resource)).removed

    def unreachable(self, required: int, index: int = 0) -> UnreachableError:
        """The error for a `cr` that is out of reach even with the smallest choice everywhere."""
        resource = self.resources[index]
        total, fixed = resource.total, self.fixed_cost(resource)
        cr = self.options.limits[resource.name]
        start = (
            f"cr={cr} is not reachable for the model '{self.inventory.model.name}' with "
            f"objective={resource.name!r}: "
        )
        best = Cost(total, required + fixed).removed
        left = skipped_parts((r, resource.of(r) or 0) for r in self.inventory.records)
        skipped = f" Skipped: {'; '.join(left)}." if left else ""
        if best <= 0:
            return UnreachableError(
                f"{start}expected an allowed choice that is {self._better} than its layer "
                f"({self._limits}). Received: none "
                f"({counted(len(self.inventory.candidates), 'layer')} can be factorized).{skipped}"
            )
        return UnreachableError(
            f"{start}expected 0 < cr <= {rounded_down(best)}, with the smallest allowed choice "
            f"everywhere ({self._limits}). Received: cr={cr}. Then, of "
            f"{total:,}{RESOURCES[resource.name].unit}, {required:,} remain in the "
            f"layers that can be factorized and {fixed:,} in everything else: biases, and layers "
            f"that are skipped.{skipped}"
        )

    @property
    def _better(self) -> str:
        """The required improvement of a choice, for messages."""
        return RESOURCES[self.resources[0].name].better

    @property
    def _limits(self) -> str:
        """The options that limit the choices, for messages."""
        options = self.options
        limits = f"max_slices={options.max_slices}, rank_multiple={options.rank_multiple}"
        limits += f", target={options.target!r}" if options.target else ""
        limits += f", schemes={options.schemes}" if options.schemes else ""
        limits += ", bounds" if options.bounds else ""
        limits += f", memory={options.memory:g}" if options.memory is not None else ""
        one = self.method.near_slices is not None
        return limits + (f", method={options.method!r}" if one else "")

    # -- The solution ------------------------------------------------------------------------

    def tables(self) -> list[ChoiceTable]:
        """The choices of every candidate within its bounds.

        Raises:
            ValueError: If a layer has no choice, or a kernel is not finite.
        """

        def offer(record: LayerRecord, scheme: int) -> tuple[Mapping[int, range], list[Costs]]:
            costs = [resource.costs(record) for resource in self.resources]
            return self.offered(record, scheme), costs

        records = self.inventory.candidates
        tables = choice_tables(records, self.method, offer, self.stats)
        return [self._within(record, t) for record, t in zip(records, tables, strict=True)]

    def _within(self, record: LayerRecord, table: ChoiceTable) -> ChoiceTable:
        if self._is_unlimited(record):
            return table
        within = self.is_within(record, table.weights)
        if not within.any():
            raise self.nothing_within(record, table.weights)
        return table.take(np.flatnonzero(within))

    def solve(self, tables: Sequence[ChoiceTable]) -> Solution:
        """Picks one choice per candidate within all budgets.

        Raises:
            ValueError: If even the cheapest choices exceed a budget.
        """
        budgets = [self.budget_of(resource) for resource in self.resources]
        try:
            return self.method.solve(tables, budgets)
        except InfeasibleBudget as infeasible:
            raise self.unreachable(infeasible.required, infeasible.resource) from None

    def plan(self) -> CompressionPlan:
        """Solves the selection problem and returns the plan.

        Errors are weighed by what they do to the model's outputs, as far as this was measured.

        Raises:
            ValueError: If `cr` is not reachable, or a kernel is not finite.
        """
        tables = self.tables()
        weighing = self.weighings[0]
        solution = self.solve(weighed(tables, self.inventory.candidates, weighing))
        return self.plan_of(tables, solution.indices, weighing)

    @property
    def weighings(self) -> list[str]:
        """The ways in which errors can be weighed, the best one first."""
        known = any(record.curve for record in self.inventory.candidates)
        if self.method.factorize_with_bias is None and known:
            return list(WEIGHINGS)
        return [EQUAL]

    def without_data(self) -> Selection:
        """The same selection without calibration data, by the default method for that."""
        inventory = self.inventory.map(
            lambda record: dataclasses.replace(record, moment=None, curve=None)
        )
        bare = dataclasses.replace(self, inventory=inventory, stats=None)
        return bare.with_options(dataclasses.replace(self.options, method=DEFAULT))

    def plan_of(
        self, tables: Sequence[ChoiceTable], chosen: Sequence[int], weighing: str = EQUAL
    ) -> CompressionPlan:
        """The plan of one row for each table."""
        rows = zip(tables, chosen, strict=True)
        choices = tuple(
            self.left(record) if record.skipped else self.choice(record, *next(rows))
            for record in self.inventory.records
        )
        errors: tuple[float | None, float | None] = (None, None)
        measured = [r.runtime for r in self.resources if r.runtime is not None]
        named = self.options.target and not self.options.target_by_default
        if self.stats is not None and named and not measured:
            errors = _total_error(tables, chosen), self._error_without_target(weighing)
        costs = {}
        for resource in self.reported:
            of_layers = [c.costs[resource.name] for c in choices if resource.name in c.costs]
            saved = sum(cost.saved for cost in of_layers)
            costs[resource.name] = Cost(resource.total, resource.total - saved)
        return CompressionPlan(
            requested=self.options.requested,
            method=self.options.method,
            error_measure=self.method.error_measure,
            objective=self.options.objective,
            costs=costs,
            choices=choices,
            target=self.options.target,
            output_error=errors[0],
            output_error_without_target=errors[1],
            runtime=next(iter(measured), None),
            memory=self._memory_with(choices),
        )

    def _memory_with(self, choices: Sequence[LayerChoice]) -> Cost | None:
        if self.memory is None:
            return None
        layers = (record.layer for record in self.inventory.records)
        return Cost(self.memory.peak, self.memory.after(zip(layers, choices, strict=True)))

    @property
    def reported(self) -> tuple[Resource, ...]:
        """The resources that the plan reports: parameters, and all that are limited."""
        return (self.params, *(r for r in self.resources if r.name != self.params.name))

    def _error_without_target(self, weighing: str) -> float:
        """The total output error without the target's constraints."""
        free = dataclasses.replace(self, options=dataclasses.replace(self.options, target=None))
        tables = free.tables()
        solution = free.solve(weighed(tables, self.inventory.candidates, weighing))
        return _total_error(tables, solution.indices)

    def left(self, record: LayerRecord, skipped: Skipped | None = None) -> LayerChoice:
        """The plan's entry for a layer that is skipped."""
        skipped = skipped or record.skipped
        counted = {resource.name: resource.of(record) for resource in self.reported}
        return LayerChoice(
            layer=record.path,
            kind=record.class_name,
            kernel_shape=record.kernel_shape,
            slices=None,
            rank=None,
            scheme=None,
            costs={name: Cost(cost, cost) for name, cost in counted.items() if cost is not None},
            error=0.0,
            reason=skipped and skipped.detail,
            reason_code=skipped and skipped.code.value,
        )

    def choice(self, record: LayerRecord, table: ChoiceTable, row: int) -> LayerChoice:
        """The plan's entry for a candidate, from the row that the solver took."""
        chosen = table[row]
        if chosen.keep:
            if len(table) > 1:
                return self.left(record, Skipped(Skip.BUDGET, "staying dense fits the budget"))
            detail = f"no allowed choice is {self._better} ({self._limits})"
            return self.left(record, Skipped(Skip.NO_CHOICE, detail))

        left = self.left(record)
        costs = {}
        for resource in self.reported:
            of_choices, before = resource.costs(record), left.costs[resource.name].before
            (after,) = of_choices.of(chosen.slices, [chosen.rank], chosen.scheme)
            costs[resource.name] = Cost(before, before - of_choices.dense + int(after))
        return dataclasses.replace(
            left,
            slices=chosen.channel_slices,
            rank=chosen.rank,
            scheme=chosen.scheme,
            input_rank=chosen.input_rank,
            costs=costs,
            error=chosen.error,
            divergence=float(record.curve(np.array(chosen.error))) if record.curve else None,
            note=self.note(record),
        )

    def note(self, record: LayerRecord) -> str | None:
        """A remark for the user about a choice, or None."""
        if record.moment is None and self.stats is not None:
            return "its inputs were not measured, and are assumed uncorrelated with equal variance"
        if record.moment is None:
            return None
        notes, moment = [], record.moment
        if moment.block_count > 1:
            notes.append(
                f"chosen with {moment.block_count} diagonal blocks of its inputs' second moment, "
                f"which has {moment.side} rows; the number of slices is a multiple of the blocks"
            )
        if moment.count < MANY * moment.side and self.method.factorize_with_bias is None:
            notes.append(
                f"regularized, as only {moment.count} unfolded inputs are available for the "
                f"{moment.side} rows of their second moment: use more examples"
            )
        return "; ".join(notes) or None


def _total_error(tables: Sequence[ChoiceTable], chosen: Sequence[int]) -> float:
    return sum(float(t.error[row]) for t, row in zip(tables, chosen, strict=True))


def _least(limits: Iterable[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
