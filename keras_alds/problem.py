"""What is to be solved for a model: its layers, their choices and what they cost, the budgets."""

from __future__ import annotations

import dataclasses
import decimal
import hashlib
import math
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_alds import _backend
from keras_alds.core.choices import ChoiceTable, choice_table, join_tables
from keras_alds.core.errors import get_error
from keras_alds.core.methods import METHODS, Method
from keras_alds.core.moments import RIDGE, SecondMoment
from keras_alds.core.slicing import divisors, factor_weights, weights
from keras_alds.core.solvers import Solution
from keras_alds.core.spectra import Spectra, spectra_many
from keras_alds.core.targets import allowed_ranks, get_target
from keras_alds.options import LIMITS, Options
from keras_alds.plan import LayerChoice, allowed_after, removed_fraction
from keras_alds.rewrite import inspect
from keras_alds.rewrite.in_place import already_compressed
from keras_alds.rewrite.observe import CalibrationStats
from keras_alds.rewrite.recurrent import RECURRENT

if TYPE_CHECKING:
    from keras_alds.litert.latency import LayerLatencies


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model and what is to be removed of it, in integers.

    Attributes:
        name: The model's name.
        specs: The layers that hold weights.
        params: All parameters of the model.
        macs: Multiply–accumulates by layer id; None unless they are limited.
        options: The options.
        stats: Calibration statistics, None for a method without data.
        moments: The layers' second moments by layer id, from `stats`.
        latency: Measured latencies; None unless they are the objective.
        encoder_positions: How often the encoder of every scheme but 0 is applied, by layer id.
    """

    name: str
    specs: list[inspect.LayerSpec]
    params: int
    macs: dict[int, int] | None
    options: Options
    stats: CalibrationStats | None = None
    moments: dict[int, SecondMoment] = dataclasses.field(default_factory=dict)
    latency: LayerLatencies | None = None
    encoder_positions: Mapping[int, Mapping[int, int]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, options: Options, *, verbose: int = 1) -> Problem:
        """Inspects `model`; with `verbose`, a progress bar shows if latency is measured.

        Raises:
            ValueError: If `model` is not a built model that can be compressed, or if
                `options.cr` is not reachable whatever its weights are.
        """
        check_model(model)
        specs, unmatched = inspect.inspect_model(model, options.exclude)
        factorized = [
            spec for spec in specs if inspect.is_factorized(spec.layer) and not spec.excluded
        ]
        if factorized:
            raise ValueError(already_compressed(factorized))
        specs = [spec.folded(options.schemes) for spec in specs]
        if not any(spec.reason is None for spec in specs):
            reasons = "; ".join(f"'{spec.path}': {spec.reason}" for spec in specs[:5])
            raise ValueError(
                f"Expected the model '{model.name}' to hold a layer that can be factorized "
                f"({', '.join((*inspect.FACTORIZED_KINDS, *RECURRENT))}). "
                f"Received: none ({reasons or 'no weights at all'})"
            )
        inspect.warn_of_unmatched(model, unmatched, stacklevel=5)
        macs, latency = None, None
        positions: Mapping[int, Mapping[int, int]] = {}
        called: Mapping[int, Any] | None = None
        if options.objective == "macs" or options.macs_cr is not None:
            macs = inspect.layer_macs(model)
            if options.schemes != (0,):
                positions = inspect.encoder_positions(model)
        if macs is not None:  # a table in two factors takes more of them, not fewer
            specs = [
                dataclasses.replace(spec, reason=inspect.without_macs(spec))
                if spec.reason is None and spec.known_kind.lookup
                else spec
                for spec in specs
            ]
        if options.objective == "macs":
            called = macs
        elif options.objective == "latency":
            from keras_alds.litert.latency import MEASURED, layer_latencies

            specs = [
                spec
                if spec.reason or spec.known_kind.name in MEASURED
                else dataclasses.replace(spec, reason=f"latency is not measured of {spec.kind}")
                for spec in specs
            ]
            latency = layer_latencies(
                model,
                [spec for spec in specs if spec.reason is None],
                options.latency,
                target=options.target or "litert",
                max_slices=options.max_slices,
                complete=not any(spec.excluded for spec in specs),
                verbose=verbose,
            )
            called = latency.costs
        if called is not None:
            specs = [
                spec
                if spec.reason or called.get(id(spec.layer))
                else dataclasses.replace(spec, reason=inspect.without_macs(spec))
                for spec in specs
            ]
        params = inspect.count_params(model)
        problem = cls(
            model.name, specs, params, macs, options, latency=latency, encoder_positions=positions
        )
        problem = problem.bounded()
        for resource, name in enumerate(problem.resources):
            required = sum(problem.smallest_cost(spec, name) for spec in problem.candidates)
            if required > problem.budget_of(name):
                raise problem.unreachable(required, resource)
        return problem

    def bounded(self) -> Problem:
        """The same problem with the bounds of every layer; warns of those that no layer has."""
        bounds = self.options.bounds
        unmatched = dict(enumerate(bounds))
        specs = []
        for spec in self.specs:
            least, greatest = spec.bounds
            for index, bound in enumerate(bounds):
                if spec.reason is None and spec.is_named_by(bound.item):
                    unmatched.pop(index, None)
                    least, greatest = max(least, bound.least), min(greatest, bound.greatest)
            specs.append(dataclasses.replace(spec, bounds=(least, greatest)))
        for bound in unmatched.values():
            warnings.warn(
                f"`bounds` entry {bound.item!r} matches no layer of the model '{self.name}' that "
                "can be factorized.",
                stacklevel=5,
            )
        return dataclasses.replace(self, specs=specs)

    def calibrated(self, model: Any, stats: CalibrationStats) -> Problem:
        """The same problem with statistics; layers that no example reached are left alone."""
        found = stats.match(model)
        moments = {key: moment for key, moment in found.items() if moment is not None}
        specs = [
            spec
            if spec.reason or id(spec.layer) in moments or not inspect.observable(spec.layer)
            else dataclasses.replace(spec, reason="no calibration example reaches it")
            for spec in self.specs
        ]
        specs = [self.principal(spec, moments) for spec in specs]
        return dataclasses.replace(self, specs=specs, stats=stats, moments=moments)

    def principal(
        self, spec: inspect.LayerSpec, moments: dict[int, SecondMoment]
    ) -> inspect.LayerSpec:
        """A candidate, left alone if its principal components are wanted and not known.

        Raises:
            ValueError: If the statistics hold no means.
        """
        if spec.reason or not METHODS[self.options.method].centred:
            return spec
        if not spec.known_kind.principal:
            return dataclasses.replace(
                spec,
                reason=f"the method {self.options.method!r} needs a bias for every column of the "
                f"kernel, and {spec.kind} has none",
            )
        moment = moments[id(spec.layer)]
        if moment.mean is None:
            raise ValueError(
                f"Expected calibration statistics with means, for the method "
                f"{self.options.method!r}. Received: older ones without. Collect them anew."
            )
        if (count := moment.block_count) == 1:
            return spec
        return dataclasses.replace(
            spec,
            reason=f"its second moment is kept in {count} blocks, and the method "
            f"{self.options.method!r} needs all of it",
        )

    @property
    def candidates(self) -> list[inspect.LayerSpec]:
        """The layers that can be factorized."""
        return [spec for spec in self.specs if spec.reason is None]

    @property
    def resources(self) -> tuple[str, ...]:
        """What is limited: the objective, or both parameters and MACs."""
        return LIMITS if self.options.macs_cr is not None else (self.options.objective,)

    def total_of(self, resource: str) -> int:
        """All that the model has of a resource."""
        if resource == "latency" and self.latency is not None:
            return self.latency.total
        return sum((self.macs or {}).values()) if resource == "macs" else self.params

    def unit(self, spec: inspect.LayerSpec, resource: str) -> int:
        """What one kernel weight of a layer costs: 1, or its multiply–accumulates."""
        if resource != "macs":
            return 1
        weights = inspect.applied_weights(spec.layer)
        return (self.macs or {}).get(id(spec.layer), 0) // max(weights, 1)

    def encoder_unit(self, spec: inspect.LayerSpec, scheme: int, resource: str) -> int:
        """What one weight of a layer's encoder costs in a fold scheme."""
        if resource != "macs" or not scheme:
            return self.unit(spec, resource)
        return self.encoder_positions[id(spec.layer)][scheme]

    def factor_cost(
        self, spec: inspect.LayerSpec, scheme: int, slices: int, rank: int, resource: str
    ) -> int:
        """What the factors of a choice cost."""
        encoder, decoder = factor_weights(spec.shape_in(scheme), slices, rank)
        first = self.encoder_unit(spec, scheme, resource)
        return encoder * first + decoder * self.unit(spec, resource)

    def added_params(self, spec: inspect.LayerSpec) -> int:
        """Parameters that the method adds to a factorized layer: a bias that it has not."""
        adds = METHODS[self.options.method].centred and not getattr(spec.layer, "use_bias", True)
        return (spec.kernel_shape or (0,))[-1] if adds else 0

    def dense_cost(self, spec: inspect.LayerSpec, resource: str) -> int:
        """What a layer's kernel costs as it is."""
        if resource == "latency" and self.latency is not None:
            return self.latency.costs[id(spec.layer)].dense
        return self.unit(spec, resource) * math.prod(spec.kernel_shape or ())

    def smallest_cost(self, spec: inspect.LayerSpec, resource: str) -> int:
        """What a layer's kernel costs in its cheapest allowed form.

        Raises:
            ValueError: If the layer's bounds allow none.
        """
        costs = self.dense_cost(spec, resource)
        added = self.added_params(spec) if resource == "params" else 0
        sampled = None if self.latency is None else self.latency.costs[id(spec.layer)]
        found = [(math.prod(spec.kernel_shape or ()), costs)]
        for scheme in spec.schemes:
            for k, ranks in self.offered(spec, scheme).items():
                size = weights(spec.shape_in(scheme), k, 1)
                cost = self.factor_cost(spec, scheme, k, 1, resource)
                times = (
                    [j * cost + added for j in ranks] if sampled is None else sampled.of(k, ranks)
                )
                found += [(j * size, int(time)) for j, time in zip(ranks, times, strict=True)]
        within = [cost for size, cost in found if cost <= costs and self.is_within(spec, size)]
        if not within:
            raise self.nothing_within(spec, [size for size, cost in found if cost <= costs])
        return min(within)

    def offered(self, spec: inspect.LayerSpec, scheme: int) -> dict[int, list[int]]:
        """The ranks that each number of slices of a layer may have, for a kernel of full rank."""
        shape, limits = spec.shape_in(scheme), self.limits(spec, scheme)
        added = 0 if self.resources[0] == "macs" else self.added_params(spec)
        most, offered = math.prod(shape) - added, {}
        for k in divisors(shape[-2]):
            per_rank = weights(shape, k, 1)
            if ranks := [j for j in allowed_ranks(shape, k, **limits) if j * per_rank < most]:
                offered[k] = ranks
        near = METHODS[self.options.method].near_slices
        if near is None or not offered:
            return offered
        nearest = min(offered, key=lambda k: (abs(k - near), k))
        return {} if near == 1 != nearest else {nearest: offered[nearest]}

    def is_within(self, spec: inspect.LayerSpec, size: int) -> bool:
        """Whether a layer whose kernel weighs so much is within its bounds."""
        least, greatest = spec.bounds
        return least <= self.removed(spec, size) <= greatest

    def removed(self, spec: inspect.LayerSpec, size: int) -> float:
        """The fraction of a layer's own parameters that is gone if its kernel weighs so much."""
        dense = math.prod(spec.kernel_shape or ())
        added = self.added_params(spec) if size < dense else 0
        return removed_fraction(spec.params, spec.params - dense + size + added)

    def nothing_within(self, spec: inspect.LayerSpec, sizes: Iterable[int]) -> ValueError:
        """The error for a layer of which no choice is within its bounds."""
        least, greatest = spec.bounds
        fractions = sorted(self.removed(spec, size) for size in sizes)
        nearest = [
            *[fraction for fraction in fractions if fraction < least][-1:],
            *[fraction for fraction in fractions if fraction > greatest][:1],
        ]
        return ValueError(
            f"Expected the `bounds` of layer '{spec.path}' to hold one of its choices. Received: "
            f"({least:g}, {greatest:g}), where the nearest fractions of its parameters that the "
            f"method {self.options.method!r} can remove are "
            + " and ".join(f"{fraction:.4f}" for fraction in nearest)
        )

    def max_slices(self, spec: inspect.LayerSpec) -> int | None:
        """The largest number of slices of a layer."""
        limits = (self.options.max_slices, spec.known_kind.max_slices)
        return min((limit for limit in limits if limit is not None), default=None)

    def limits(self, spec: inspect.LayerSpec, scheme: int) -> dict[str, Any]:
        """What the options allow of a layer's slices and ranks, for `allowed_ranks`."""
        moment = self.moments.get(id(spec.layer))
        target, most = get_target(self.options.target), self.max_slices(spec)
        if target and (scheme or spec.kind not in ("Conv1D", "Conv2D", "Dense")):
            most = 1  # targets know the sliced forms of plain convolutions in scheme 0 only
        return {
            "max_slices": most,
            "rank_multiple": self.options.rank_multiple,
            "target": target,
            "depthwise": len(set(getattr(spec.layer, "strides", ()))) <= 1,
            "blocks": 1 if moment is None else moment.block_count,
        }

    def fixed_cost(self, resource: str) -> int:
        """What everything but the candidates' kernels costs."""
        kernels = sum(self.dense_cost(spec, resource) for spec in self.candidates)
        return self.total_of(resource) - kernels

    def budget_of(self, resource: str) -> int:
        """What the candidates' kernels may cost together."""
        cr = self.options.cr
        if resource == "macs" and self.options.macs_cr is not None:
            cr = self.options.macs_cr
        return allowed_after(self.total_of(resource), cr) - self.fixed_cost(resource)

    def solve(
        self, method: Method, tables: list[ChoiceTable]
    ) -> tuple[list[ChoiceTable], Solution]:
        """Picks one choice a candidate, within all budgets.

        Raises:
            InfeasibleBudget: If even the cheapest choices are above a budget.
        """
        first, *second = (self.budget_of(name) for name in self.resources)
        if not second:
            return method.solve(tables, first)
        units = [self.unit(spec, self.resources[1]) for spec in self.candidates]
        return method.solve_joint(tables, units, (first, second[0]))

    def unreachable(self, required: int, resource: int = 0) -> ValueError:
        """The error for a `cr` that even the smallest choice everywhere does not reach."""
        name = self.resources[resource]
        total, fixed = self.total_of(name), self.fixed_cost(name)
        cr = self.options.macs_cr if resource else self.options.cr
        start = f"cr={cr} is not reachable for the model '{self.name}' with objective={name!r}: "
        best = removed_fraction(total, required + fixed)
        if best <= 0:
            return ValueError(
                f"{start}expected an allowed choice that is {self.better} than its layer "
                f"({self.described_limits}). Received: none ({len(self.candidates)} layers can be "
                "factorized)"
            )
        return ValueError(
            f"{start}expected 0 < cr <= {_rounded_down(best)}, with the smallest allowed choice "
            f"everywhere ({self.described_limits}). Received: cr={cr}. Of "
            f"{total:,}{' ns' if name == 'latency' else ''} there remain then {required:,} in the "
            f"layers that can be factorized and {fixed:,} in what no choice changes: biases and "
            "layers left alone (see `select(…).summary()`)."
        )

    @property
    def better(self) -> str:
        """What a choice has to be to be of use, for texts."""
        return "smaller" if self.latency is None else "smaller and faster"

    @property
    def described_limits(self) -> str:
        """The options that allow no more choices, for texts."""
        limits = f"max_slices={self.options.max_slices}, rank_multiple={self.options.rank_multiple}"
        limits += f", target={self.options.target!r}" if self.options.target else ""
        limits += f", schemes={self.options.schemes}" if self.options.schemes != (0,) else ""
        limits += ", bounds" if self.options.bounds else ""
        one = METHODS[self.options.method].near_slices is not None
        return limits + (f", method={self.options.method!r}" if one else "")

    def tables(self, method: Method) -> list[ChoiceTable]:
        """The choices of every candidate."""
        error = method.error

        def options(spec: inspect.LayerSpec, scheme: int = 0) -> dict[str, Any]:
            return {
                "cost_per_weight": self.unit(spec, self.resources[0]),
                "encoder_cost_per_weight": self.encoder_unit(spec, scheme, self.resources[0]),
                "added_cost": 0 if self.resources[0] == "macs" else self.added_params(spec),
                "near_slices": method.near_slices,
                "costs": self.latency and self.latency.costs[id(spec.layer)],
                **self.limits(spec, scheme),
            }

        candidates = self.candidates
        measured = [spec for spec in candidates if id(spec.layer) in self.moments]
        others = [spec for spec in candidates if id(spec.layer) not in self.moments]
        tables = {
            spec.path: join_tables(
                [entry.table(error, scheme, **options(spec, scheme)) for scheme in spec.schemes]
            )
            for spec, entry in zip(others, _entries(others), strict=True)
        }
        if self.stats is not None:
            spectra: list[Spectra] = []
            for group in _together(measured):
                found = {
                    spec.path: (digest, kernel, self.moments[id(spec.layer)])
                    for spec, (digest, kernel) in zip(group, kernels(group), strict=True)
                }
                spectra += self.stats.spectra(found, centred=method.centred)
                del found  # before the next kernels are read
            for spec, values in zip(measured, spectra, strict=True):
                tables[spec.path] = choice_table(values, error=error, **options(spec))
        return [self.within_bounds(spec, tables[spec.path]) for spec in candidates]

    def within_bounds(self, spec: inspect.LayerSpec, table: ChoiceTable) -> ChoiceTable:
        """The choices of a candidate that are within its bounds."""
        if spec.bounds == (0.0, 1.0):
            return table
        sizes = table.weights.tolist()
        rows = [row for row, size in enumerate(sizes) if self.is_within(spec, size)]
        if not rows:
            raise self.nothing_within(spec, sizes)
        return table.take(np.array(rows))

    def choice(self, spec: inspect.LayerSpec, table: ChoiceTable, row: int) -> LayerChoice:
        """The record of a candidate for which the solver took row `row` of its table."""
        slices, rank = int(table.slices[row]), int(table.rank[row])
        if slices == 0:
            reason = (
                "the budget leaves it whole"
                if len(table) > 1
                else f"no allowed choice is {self.better} ({self.described_limits})"
            )
            return dataclasses.replace(self.left_alone(spec), reason=reason)
        scheme = int(table.scheme[row])
        factors = spec, scheme, slices, rank
        saved = math.prod(spec.kernel_shape or ()) - self.factor_cost(*factors, "params")
        added = self.added_params(spec)
        macs = None if self.macs is None else self.macs.get(id(spec.layer), 0)
        if macs is not None:
            macs -= self.dense_cost(spec, "macs") - self.factor_cost(*factors, "macs")
        return dataclasses.replace(
            self.left_alone(spec),
            slices=slices,
            rank=rank,
            scheme=scheme,
            params_after=spec.params - saved + added,
            macs_after=macs,
            error=float(table.error[row]),
            reason=None,
            note=self.note(spec),
            latency_after=None if self.latency is None else int(table.cost[row]),
        )

    def note(self, spec: inspect.LayerSpec) -> str | None:
        """What a user has to know of a choice."""
        moment = self.moments.get(id(spec.layer))
        if moment is None and self.stats is not None:
            return "its inputs are not measured: chosen as if they were uncorrelated and alike"
        if moment is None:
            return None
        notes = []
        if moment.block_count > 1:
            notes.append(
                f"chosen with {moment.block_count} diagonal blocks of its inputs' second moment, "
                f"which has {moment.side} rows; slices are a multiple of them"
            )
        if moment.relative_ridge > RIDGE and not METHODS[self.options.method].centred:
            notes.append(
                f"regularized, as only {moment.count} unfolded inputs were seen for the "
                f"{moment.side} rows of their second moment: more examples tell more"
            )
        return "; ".join(notes) or None

    def left_alone(self, spec: inspect.LayerSpec) -> LayerChoice:
        """The record of a layer that stays as it is."""
        macs = None if self.macs is None else self.macs.get(id(spec.layer), 0)
        costs = None if self.latency is None else self.latency.costs.get(id(spec.layer))
        latency = None if costs is None else costs.dense
        return LayerChoice(
            layer=spec.path,
            kind=spec.kind,
            kernel_shape=spec.kernel_shape,
            slices=None,
            rank=None,
            scheme=None,
            params_before=spec.params,
            params_after=spec.params,
            macs_before=macs,
            macs_after=macs,
            error=0.0,
            reason=spec.reason,
            latency_before=latency,
            latency_after=latency,
        )


def _rounded_down(fraction: float) -> str:
    """A fraction > 0 as a decimal number that is > 0 too and not larger."""
    exact, digits = decimal.Decimal(fraction), 4
    while not (rounded := exact.quantize(decimal.Decimal(1).scaleb(-digits), decimal.ROUND_FLOOR)):
        digits += 1
    return f"{rounded:f}"


def check_model(model: Any) -> None:
    """Raises a ValueError unless `model` is a model of either Keras whose weights are made.

    A model that trains in a `train_step` of its own need not be built, nor have a `call`.
    """
    backend = _backend.backend_of(model)
    if not backend.is_model(model):
        raise ValueError(
            f"Expected `model` to be a `{backend.name}.Model`. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )
    if not inspect.has_weights(model):
        raise ValueError(
            f"Expected the model '{model.name}' to be built. Received: a model without weights. "
            "Call it once on a batch, or `model.build(input_shape)`."
        )


@dataclasses.dataclass
class _Entry:
    """The spectra of one layer's kernel by fold scheme, and the tables made of them."""

    digest: bytes
    layer: weakref.ref[Any]
    spectra: dict[int, Spectra] = dataclasses.field(default_factory=dict)
    tables: dict[tuple, ChoiceTable] = dataclasses.field(default_factory=dict)

    def table(self, error: str, scheme: int, **options: Any) -> ChoiceTable:
        key = (error, scheme, *options.values())
        if key not in self.tables:
            self.tables[key] = choice_table(
                self.spectra[scheme],
                error=error,
                scheme=scheme,
                kernel=inspect.kernel_values(self.layer(), scheme)
                if get_error(error).needs_kernel
                else None,
                **options,
            )
        return self.tables[key]


#: Bytes of kernels that are decomposed together.
KERNELS_AT_ONCE = 1 << 27

# Layers of either Keras hash by identity, and an entry goes when its layer does.
_CACHE: weakref.WeakKeyDictionary[Any, _Entry] = weakref.WeakKeyDictionary()


def kernels(specs: list[inspect.LayerSpec]) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yields the kernel of every layer with its digest; an error if one is not finite."""
    for spec in specs:
        kernel = np.ascontiguousarray(inspect.kernel_values(spec.layer))
        if not np.isfinite(kernel).all():
            raise ValueError(
                f"Expected finite weights. Received: NaN or infinity in the kernel of layer "
                f"'{spec.path}'. Look for the step at which training diverged."
            )
        yield hashlib.sha256(kernel.data).digest(), kernel


def _together(specs: list[inspect.LayerSpec]) -> Iterator[list[inspect.LayerSpec]]:
    """Layers whose kernels are decomposed side by side: not too many large ones at once."""
    group: list[inspect.LayerSpec] = []
    held = 0
    for spec in specs:
        size = 4 * math.prod(spec.kernel_shape or ())
        if group and held + size > KERNELS_AT_ONCE:
            yield group
            group, held = [], 0
        group.append(spec)
        held += size
    if group:
        yield group


def _entries(specs: list[inspect.LayerSpec]) -> list[_Entry]:
    """The cached or new spectra of every layer's kernel, in its fold schemes."""
    return [entry for group in _together(specs) for entry in _entries_of(group)]


def _entries_of(specs: list[inspect.LayerSpec]) -> list[_Entry]:
    missing: list[tuple[_Entry, int, np.ndarray]] = []
    for spec, (digest, kernel) in zip(specs, kernels(specs), strict=True):
        entry = _CACHE.get(spec.layer)
        if entry is None or entry.digest != digest:
            entry = _CACHE[spec.layer] = _Entry(digest, weakref.ref(spec.layer))
        for scheme in spec.schemes:
            if scheme not in entry.spectra:
                read = inspect.kernel_values(spec.layer, scheme) if scheme else kernel
                missing.append((entry, scheme, read))
    found = spectra_many([kernel for *_, kernel in missing])
    for (entry, scheme, _), values in zip(missing, found, strict=True):
        entry.spectra[scheme] = values
    return [_CACHE[spec.layer] for spec in specs]
