"""`select` and `compress`: from a model to a plan, and from a plan to a smaller model."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import numbers
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds.core.calibration import SecondMoment
from keras_alds.core.choices import ChoiceTable, choice_table
from keras_alds.core.errors import get_error
from keras_alds.core.methods import METHODS, Method, choose_method, get_method
from keras_alds.core.slicing import divisors, weights
from keras_alds.core.solvers import InfeasibleBudget, Solution
from keras_alds.core.spectra import Spectra, spectra_many
from keras_alds.core.targets import allowed_ranks, get_target
from keras_alds.plan import CompressionPlan, LayerChoice, allowed_after, removed_fraction
from keras_alds.rewrite import inspect, wrappers
from keras_alds.rewrite.in_place import already_compressed, apply_plan, check_plan, match
from keras_alds.rewrite.observe import CalibrationStats, calibration_stats

OBJECTIVES = ("params", "macs")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that `select`, `compress` and `ALDSCompress` share, checked."""

    cr: float
    method: str = "alds"
    objective: str = "params"
    error: str | None = None
    exclude: Any = ()
    max_slices: int | None = None
    rank_multiple: int = 1
    target: str | None = None

    def __post_init__(self) -> None:
        check_cr(self.cr)
        get_method(self.method, self.error)
        get_target(self.target)
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"Expected `objective` to be one of {', '.join(map(repr, OBJECTIVES))}. "
                f"Received: objective={self.objective!r}"
            )
        object.__setattr__(self, "exclude", tuple(inspect.check_exclude(self.exclude)))
        for name in ("max_slices", "rank_multiple"):
            value = getattr(self, name)
            if name == "max_slices" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(
                    f"Expected `{name}` to be a positive integer. Received: {name}={value!r}"
                )


def check_cr(cr: Any) -> None:
    """Raises a ValueError unless `cr` is a number strictly between 0 and 1."""
    if isinstance(cr, bool) or not isinstance(cr, numbers.Real) or not 0 < float(cr) < 1:
        raise ValueError(
            "Expected `cr`, the fraction to remove, to be a number with 0 < cr < 1. "
            f"Received: cr={cr!r} of type {type(cr).__name__}"
        )


def check_cr_or_plan(cr: Any, plan: Any, **options: Any) -> None:
    """Raises a ValueError unless there is either a `cr`, or a plan with no option of `select`.

    Args:
        cr: The fraction to remove, or None.
        plan: A `CompressionPlan`, or None.
        **options: Options of `select` by name; None, `()`, 1 and `"params"` are their defaults.
    """
    if (cr is None) == (plan is None):
        raise ValueError(
            f"Expected either `cr` or `plan`. Received: cr={cr!r}, "
            f"plan={'a plan' if plan is not None else None}"
        )
    if plan is None:
        return
    check_plan(plan)
    given = {name: value for name, value in options.items() if value not in (None, (), 1, "params")}
    if given:
        raise ValueError(
            "Expected no options beside `plan`: it holds the choices that were made with them. "
            f"Received: {', '.join(f'{name}={value!r}' for name, value in given.items())}"
        )


def select(
    model: Any,
    cr: float,
    *,
    method: str | None = None,
    objective: str = "params",
    error: str | None = None,
    calibration_data: Any = None,
    exclude: Any = (),
    max_slices: int | None = None,
    rank_multiple: int = 1,
    target: str | None = None,
) -> CompressionPlan:
    """Chooses slices and rank for every layer, together, so that the fraction `cr` is removed.

    The model is not changed. Spectra are computed once for each kernel and kept as long as the
    layer and its values stay: a second call for the same model, with whatever `cr`, method or
    objective, takes only the solver's milliseconds. The same weights give the same plan, bit for
    bit, in any process.

    Args:
        model: A built `keras.Model` or `tf_keras.Model` of any kind: Functional, Sequential,
            nested, or subclassed.
        cr: Float, 0 < cr < 1. Fraction to remove: with `objective="params"` of all the model's
            parameters, BatchNormalization, biases and untouched layers included, so that
            `1 - compressed.count_params() / model.count_params() >= cr`; with
            `objective="macs"` of its multiply–accumulates (see `count_macs`). Kernels whose rank
            is not full lose more than was asked for, since that costs no error.
        method: String or None. `"alds"`, the paper's: minimise the largest relative error of any
            layer, solved exactly; `"energy"`: minimise the sum of the layers' relative squared
            errors; `"activation"`: the sum of the relative squared errors of the layers' outputs
            on `calibration_data`. Defaults to None: `"activation"` with calibration data, else
            `"alds"`.
        objective: String, `"params"` or `"macs"`. Defaults to `"params"`.
        error: String or None. Another error measure for the method: `"slice"`, `"bound"`,
            `"spectral"` or `"energy"`. Defaults to the method's own (`"slice"` for `"alds"`).
        calibration_data: Unlabelled examples, some hundreds, on which the error of every choice is
            measured: an array, a list or dict of arrays for several inputs, a batched
            `tf.data.Dataset`, a `keras.utils.PyDataset` or an iterable of batches (labels are
            ignored; at most 1024 examples are used), or `CalibrationStats`. Defaults to None.
        exclude: Layers to leave alone: a name, a path (`"encoder/conv1"`), a regular expression
            that matches one as a whole, a compiled pattern (searched), a layer class, or a list
            of these. Defaults to none.
        max_slices: Integer or None. Largest number of slices k. Many slices keep more accuracy
            and run slower. Defaults to no limit.
        rank_multiple: Integer. Ranks j are multiples of it (4 or 8 fill vector lanes). Defaults
            to 1.
        target: String or None. The runtime that the model is for: `"litert"` (LiteRT on a CPU, by
            XNNPACK), `"litert-reference"` (its built-in kernels, microcontrollers) or
            `"gpu-delegate"`. Slices and ranks are then such as run there and are not slow there,
            besides `max_slices` and `rank_multiple`; with calibration data the plan says what
            that costs. Defaults to None: no constraints.

    Returns:
        A `CompressionPlan`. It names every layer that is left alone, and why.

    Raises:
        ValueError: If an argument is not as above; if the model is not built, holds no layer that
            can be factorized, is already compressed, or has weights that are not finite; if the
            calibration data do not fit the model, hold NaN or infinity or fewer than 8 examples,
            or the method uses none; or if `cr` is not reachable: the text then says what is.

    Example:
    ```python
    plan = keras_alds.select(model, cr=0.5)
    plan.summary()
    ```

    References:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal
        Layer-wise Decomposition", NeurIPS 2021, arXiv:2107.11442; Theorem 1 and Algorithm 1, whose
        search the exact min–max solver replaces.
    """
    method = choose_method(method, has_data=calibration_data is not None)
    options = Options(cr, method, objective, error, exclude, max_slices, rank_multiple, target)
    return select_with(model, options, calibration_data)[0]


def select_with(
    model: Any, options: Options, calibration_data: Any = None, *, verbose: int = 1
) -> tuple[CompressionPlan, CalibrationStats | None]:
    """`select` with options that are already checked; returns the statistics that it used too."""
    problem = Problem.of(model, options)
    wrappers.apply_masks(model)
    stats = None
    if calibration_data is not None:
        for _ in _kernels(problem.candidates):
            pass  # complains of weights that are not finite before the model is run
        stats = calibration_stats(model, calibration_data, verbose=verbose)
        problem = problem.calibrated(model, stats)
    method = get_method(options.method, options.error)
    tables = problem.tables(method)
    try:
        candidates, solution = method.solve(tables, problem.budget)
    except InfeasibleBudget as infeasible:
        raise ValueError(problem.unreachable(infeasible.required)) from None
    output_errors = _output_errors(problem, candidates, solution) if stats else (None, None)
    rows = zip(candidates, solution.indices, strict=True)
    choices = tuple(
        problem.choice(spec, *next(rows)) if spec.reason is None else problem.left_alone(spec)
        for spec in problem.specs
    )
    saved = sum(choice.params_before - choice.params_after for choice in choices)
    saved_macs = sum((c.macs_before or 0) - (c.macs_after or 0) for c in choices)
    macs = None if problem.macs is None else sum(problem.macs.values())
    plan = CompressionPlan(
        requested_cr=float(options.cr),
        method=options.method,
        error_measure=method.error,
        objective=options.objective,
        params_before=problem.params,
        params_after=problem.params - saved,
        macs_before=macs,
        macs_after=None if macs is None else macs - saved_macs,
        choices=choices,
        target=options.target,
        output_error=output_errors[0],
        output_error_without_target=output_errors[1],
    )
    return plan, stats


def _output_errors(
    problem: Problem, candidates: list[ChoiceTable], solution: Solution
) -> tuple[float | None, float | None]:
    """The total error of the layers' outputs with the target's constraints, and without them."""
    if problem.options.target is None:
        return None, None
    free = dataclasses.replace(problem, options=dataclasses.replace(problem.options, target=None))
    method = get_method(problem.options.method, problem.options.error)
    solved = (candidates, solution), method.solve(free.tables(method), problem.budget)
    constrained, unconstrained = (
        sum(float(table.error[row]) for table, row in zip(tables, found.indices, strict=True))
        for tables, found in solved
    )
    return constrained, unconstrained


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model and what is to be removed of it, in integers.

    Attributes:
        name: The model's name.
        specs: The layers that hold weights.
        params: All parameters of the model.
        macs: Multiply–accumulates by layer id; None unless they are the objective.
        options: The options.
        stats: Calibration statistics, None for a method without data.
        moments: The layers' second moments by layer id, from `stats`.
    """

    name: str
    specs: list[inspect.LayerSpec]
    params: int
    macs: dict[int, int] | None
    options: Options
    stats: CalibrationStats | None = None
    moments: dict[int, SecondMoment] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, options: Options) -> Problem:
        """Inspects `model`.

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
        if not any(spec.reason is None for spec in specs):
            reasons = "; ".join(f"'{spec.path}': {spec.reason}" for spec in specs[:5])
            raise ValueError(
                f"Expected the model '{model.name}' to hold a layer that can be factorized "
                f"({', '.join(inspect.FACTORIZED_KINDS)}). "
                f"Received: none ({reasons or 'no weights at all'})"
            )
        for item in unmatched:
            warnings.warn(
                f"`exclude` entry {item!r} matches no layer with weights of the model "
                f"'{model.name}'.",
                stacklevel=4,
            )
        macs = None
        if options.objective == "macs":
            macs = inspect.layer_macs(model)
            specs = [
                spec
                if spec.reason or macs.get(id(spec.layer))
                else dataclasses.replace(spec, reason="the forward pass does not call it")
                for spec in specs
            ]
        problem = cls(model.name, specs, inspect.count_params(model), macs, options)
        required = sum(problem.smallest_cost(spec) for spec in problem.candidates)
        if required > problem.budget:
            raise ValueError(problem.unreachable(required))
        return problem

    def calibrated(self, model: Any, stats: CalibrationStats) -> Problem:
        """The same problem with statistics; layers that no example reached are left alone."""
        found = stats.match(model)
        moments = {key: moment for key, moment in found.items() if moment is not None}
        specs = [
            spec
            if spec.reason or id(spec.layer) in moments
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
        moment = moments[id(spec.layer)]
        if moment.mean is None:
            raise ValueError(
                f"Expected calibration statistics with means, for the method "
                f"{self.options.method!r}. Received: older ones without. Collect them anew."
            )
        if (count := moment.blocks.shape[0]) == 1:
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
    def total(self) -> int:
        """What the objective counts, of the whole model."""
        return self.params if self.macs is None else sum(self.macs.values())

    def cost_per_weight(self, spec: inspect.LayerSpec) -> int:
        """What one kernel weight of a layer costs: 1, or its multiply–accumulates."""
        if self.macs is None:
            return 1
        return self.macs.get(id(spec.layer), 0) // math.prod(spec.kernel_shape or ())

    def added_params(self, spec: inspect.LayerSpec) -> int:
        """Parameters that the method adds to a factorized layer: a bias that it has not."""
        adds = METHODS[self.options.method].centred and not spec.layer.use_bias
        return (spec.kernel_shape or (0,))[-1] if adds else 0

    def dense_cost(self, spec: inspect.LayerSpec) -> int:
        """What a layer's kernel costs as it is."""
        return self.cost_per_weight(spec) * math.prod(spec.kernel_shape or ())

    def smallest_cost(self, spec: inspect.LayerSpec) -> int:
        """What a layer's kernel costs in its smallest allowed form."""
        shape = spec.kernel_shape or ()
        limits = self.limits(spec)
        sizes = [
            weights(shape, k, ranks[0])
            for k in divisors(shape[-2])
            if (ranks := allowed_ranks(shape, k, **limits))
        ]
        return self.cost_per_weight(spec) * min([*sizes, math.prod(shape)])

    def limits(self, spec: inspect.LayerSpec) -> dict[str, Any]:
        """What the options allow of a layer's slices and ranks, for `allowed_ranks`."""
        moment = self.moments.get(id(spec.layer))
        return {
            "max_slices": self.options.max_slices,
            "rank_multiple": self.options.rank_multiple,
            "target": get_target(self.options.target),
            "depthwise": len(set(getattr(spec.layer, "strides", ()))) <= 1,
            "blocks": 1 if moment is None else moment.blocks.shape[0],
        }

    @property
    def fixed_cost(self) -> int:
        """What everything else costs."""
        return self.total - sum(map(self.dense_cost, self.candidates))

    @property
    def budget(self) -> int:
        """What the candidates' kernels may cost together."""
        return allowed_after(self.total, self.options.cr) - self.fixed_cost

    def unreachable(self, required: int) -> str:
        """The error text for a `cr` that even the smallest choice everywhere does not reach."""
        best = removed_fraction(self.total, required + self.fixed_cost)
        return (
            f"cr={self.options.cr} is not reachable for the model '{self.name}' with "
            f"objective={self.options.objective!r}: expected 0 < cr <= "
            f"{math.floor(best * 1e4) / 1e4:.4f}, with the smallest allowed choice everywhere "
            f"({self.described_limits}). Received: "
            f"cr={self.options.cr}. A larger part of it lies in what is left alone: "
            f"{self.fixed_cost:,} of {self.total:,} (see `select(…).summary()`)."
        )

    @property
    def described_limits(self) -> str:
        """The options that allow no more choices, for texts."""
        limits = f"max_slices={self.options.max_slices}, rank_multiple={self.options.rank_multiple}"
        return limits + (f", target={self.options.target!r}" if self.options.target else "")

    def tables(self, method: Method) -> list[ChoiceTable]:
        """The choices of every candidate."""
        error = method.error

        def options(spec: inspect.LayerSpec) -> dict[str, Any]:
            return {
                "cost_per_weight": self.cost_per_weight(spec),
                "added_cost": self.added_params(spec) if self.macs is None else 0,
                "near_slices": method.near_slices,
                **self.limits(spec),
            }

        candidates = self.candidates
        if self.stats is None:
            entries = zip(candidates, _entries(candidates), strict=True)
            return [entry.table(error, **options(spec)) for spec, entry in entries]
        kernels = zip(candidates, _kernels(candidates), strict=True)
        spectra = self.stats.spectra(
            {
                spec.path: (digest, kernel, self.moments[id(spec.layer)])
                for spec, (digest, kernel) in kernels
            },
            centred=method.centred,
        )
        return [
            choice_table(found, error=error, **options(spec))
            for spec, found in zip(candidates, spectra, strict=True)
        ]

    def choice(self, spec: inspect.LayerSpec, table: ChoiceTable, row: int) -> LayerChoice:
        """The record of a candidate for which the solver took row `row` of its table."""
        slices, rank = int(table.slices[row]), int(table.rank[row])
        if slices == 0:
            reason = (
                "the budget leaves it whole"
                if len(table) > 1
                else f"no allowed choice is smaller ({self.described_limits})"
            )
            return dataclasses.replace(self.left_alone(spec), reason=reason)
        shape = spec.kernel_shape or ()
        saved = math.prod(shape) - weights(shape, slices, rank)
        added = self.added_params(spec)
        macs = None if self.macs is None else self.macs.get(id(spec.layer), 0)
        return dataclasses.replace(
            self.left_alone(spec),
            slices=slices,
            rank=rank,
            scheme=int(table.scheme[row]),
            params_after=spec.params - saved + added,
            macs_after=None if macs is None else macs - saved * self.cost_per_weight(spec),
            error=float(table.error[row]),
            reason=None,
            note=self.note(spec),
        )

    def note(self, spec: inspect.LayerSpec) -> str | None:
        """What a user has to know of a choice."""
        moment = self.moments.get(id(spec.layer))
        if moment is None or moment.blocks.shape[0] == 1:
            return None
        return (
            f"chosen with {moment.blocks.shape[0]} diagonal blocks of its inputs' second moment, "
            f"which has {moment.side} rows; slices are a multiple of them"
        )

    def left_alone(self, spec: inspect.LayerSpec) -> LayerChoice:
        """The record of a layer that stays as it is."""
        macs = None if self.macs is None else self.macs.get(id(spec.layer), 0)
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
        )


def check_model(model: Any) -> None:
    """Raises a ValueError unless `model` is a built model of either Keras."""
    backend = _backend.backend_of(model)
    if not backend.is_model(model):
        raise ValueError(
            f"Expected `model` to be a `{backend.name}.Model`. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )
    if not model.built or not model.weights:
        raise ValueError(
            f"Expected the model '{model.name}' to be built. Received: a model without weights. "
            "Call it once on a batch, or `model.build(input_shape)`."
        )


@dataclasses.dataclass
class _Entry:
    """The spectra of one layer's kernel, and the tables made of them."""

    digest: bytes
    spectra: Spectra
    layer: weakref.ref[Any]
    tables: dict[tuple, ChoiceTable] = dataclasses.field(default_factory=dict)

    def table(self, error: str, **options: Any) -> ChoiceTable:
        key = (error, *options.values())
        if key not in self.tables:
            self.tables[key] = choice_table(
                self.spectra,
                error=error,
                kernel=inspect.kernel_values(self.layer())
                if get_error(error).needs_kernel
                else None,
                **options,
            )
        return self.tables[key]


# Layers of either Keras hash by identity, and an entry goes when its layer does.
_CACHE: weakref.WeakKeyDictionary[Any, _Entry] = weakref.WeakKeyDictionary()


def _kernels(specs: list[inspect.LayerSpec]) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yields the kernel of every layer with its digest; an error if one is not finite."""
    for spec in specs:
        kernel = np.ascontiguousarray(inspect.kernel_values(spec.layer))
        if not np.isfinite(kernel).all():
            raise ValueError(
                f"Expected finite weights. Received: NaN or infinity in the kernel of layer "
                f"'{spec.path}'. Look for the step at which training diverged."
            )
        yield hashlib.sha256(kernel.data).digest(), kernel


def _entries(specs: list[inspect.LayerSpec]) -> list[_Entry]:
    """The cached or new spectra of every layer's kernel."""
    stale: list[tuple[inspect.LayerSpec, bytes, np.ndarray]] = []
    for spec, (digest, kernel) in zip(specs, _kernels(specs), strict=True):
        entry = _CACHE.get(spec.layer)
        if entry is None or entry.digest != digest:
            stale.append((spec, digest, kernel))
    spectra = spectra_many([kernel for _, _, kernel in stale])
    for (spec, digest, _), found in zip(stale, spectra, strict=True):
        _CACHE[spec.layer] = _Entry(digest, found, weakref.ref(spec.layer))
    return [_CACHE[spec.layer] for spec in specs]


def compress(
    model: Any,
    cr: float | None = None,
    *,
    plan: CompressionPlan | None = None,
    method: str | None = None,
    objective: str = "params",
    error: str | None = None,
    calibration_data: Any = None,
    exclude: Any = (),
    max_slices: int | None = None,
    rank_multiple: int = 1,
    target: str | None = None,
) -> Any:
    """Returns a new, smaller model; `model` is untouched.

    The new model has the class, the names and the graph of `model`; every layer that the plan
    factorizes is a `FactorizedConv2D`, `FactorizedDense` or `FactorizedConv1D`. Frozen layers stay
    frozen. A compiled model comes back compiled, with an optimizer of the same class and
    settings (its state new), the same loss and metrics.

    Functional and Sequential models are cloned. A subclassed model is made again by
    `from_config(get_config())` and its layers are then factorized in place; its code goes on
    making the original layers, so to load its saved weights later, apply the plan to a fresh
    instance first: `apply_plan(MyModel(), plan)`, then `load_weights`.

    Args:
        model: A built `keras.Model` or `tf_keras.Model`.
        cr: Float, 0 < cr < 1. The fraction to remove; see `select`.
        plan: A `CompressionPlan` made by `select` for this model or one of the same
            architecture, instead of `cr` and the options below.
        method: As for `select`.
        objective: As for `select`.
        error: As for `select`.
        calibration_data: As for `select`; the factors then keep the layers' outputs on these
            examples best. With `plan` they give the factors only; a plan that was chosen with
            data wants the same data or `CalibrationStats` again, and warns without.
        exclude: As for `select`.
        max_slices: As for `select`.
        rank_multiple: As for `select`.
        target: As for `select`.

    Returns:
        A new model of the same Keras.

    Raises:
        ValueError: As `select`; if both or neither of `cr` and `plan` are given; if `plan` was
            made for another model; or if a subclassed model cannot be made from its config.

    Example:
    ```python
    small = keras_alds.compress(model, cr=0.5)
    1 - small.count_params() / model.count_params()  # at least 0.5
    ```
    """
    check_cr_or_plan(
        cr,
        plan,
        method=method,
        objective=objective,
        error=error,
        exclude=exclude,
        max_slices=max_slices,
        rank_multiple=rank_multiple,
        target=target,
    )
    if plan is None:
        method = choose_method(method, has_data=calibration_data is not None)
        options = Options(
            cr,  # type: ignore[arg-type]
            method,
            objective,
            error,
            exclude,
            max_slices,
            rank_multiple,
            target,
        )
        plan, stats = select_with(model, options, calibration_data)
    else:
        check_model(model)
        match(model, plan)
        stats = None
        if calibration_data is not None:
            stats = calibration_stats(model, calibration_data)
        elif wants_data(plan):
            warnings.warn(
                f"The plan was chosen with calibration data (method {plan.method!r}), and there "
                "are none to make the factors with: they are those nearest to the kernels, which "
                "costs accuracy. Pass the same `calibration_data`, or `CalibrationStats`.",
                stacklevel=2,
            )
    backend = _backend.backend_of(model)
    with backend.creation_scope(model):
        copy = backend.copy_model(model)
    apply_plan(copy, plan, calibration_data=stats)
    return copy


def wants_data(plan: CompressionPlan) -> bool:
    """Whether a plan was chosen by a method that uses calibration data."""
    return plan.method in METHODS and METHODS[plan.method].needs_data
