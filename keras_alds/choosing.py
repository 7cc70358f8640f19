"""From checked options to a plan, with calibration statistics if there are examples."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from keras_alds._backend import wrappers
from keras_alds._backend.loops import unchanged
from keras_alds.methods import DEFAULT_WITHOUT_DATA, METHODS
from keras_alds.models.best import best_plan
from keras_alds.models.calibration import Calibration
from keras_alds.models.choices import check_kernels
from keras_alds.models.inventory import Inventory
from keras_alds.models.matching import match
from keras_alds.models.recompose import Request
from keras_alds.models.resources import Macs, Params, Resource
from keras_alds.models.selection import Selection, UnreachableError, candidates_of
from keras_alds.models.synthetic import synthetic_stats, unsuitable
from keras_alds.options import LEAST_CR, Options
from keras_alds.plan import CompressionPlan
from keras_alds.resources import RESOURCES
from keras_alds.targets import CPU

# With fewer examples, a plan on noise is tried too.
_FEW_EXAMPLES = 256


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A plan, the model's inventory, and the calibration statistics and examples, if any.

    A plan that does best without data has examples, but no statistics.
    """

    plan: CompressionPlan
    inventory: Inventory
    calibration: Calibration | None
    examples: Any = None


def make_choice(
    inventory: Inventory,
    request: Request,
    calibration_data: Any,
    sequential: bool | None = None,
    *,
    verbose: int = 1,
    stacklevel: int = 1,
) -> Chosen:
    """What a compression needs: a new plan or the given one, and the calibration statistics."""
    if isinstance(request, Options):
        return choose(
            inventory,
            request,
            calibration_data,
            sequential,
            verbose=verbose,
            stacklevel=stacklevel + 1,
        )
    match(inventory, request)
    calibration = None
    if calibration_data is None and _is_synthetic(request) and unsuitable(inventory) is None:
        check_kernels(inventory.candidates)
        stats = synthetic_stats(inventory, curves=False, verbose=verbose)
        calibration = Calibration(stats=stats)
    elif calibration_data is not None:
        calibration = Calibration.of(inventory, calibration_data, stacklevel=stacklevel + 1)
    return Chosen(request, inventory, calibration, calibration and calibration.examples)


def choose(
    inventory: Inventory,
    options: Options,
    calibration_data: Any = None,
    sequential: bool | None = None,
    *,
    verbose: int = 1,
    stacklevel: int = 1,
) -> Chosen:
    """`select` with checked options."""
    with unchanged(inventory.model):
        return _choose(
            inventory,
            options,
            calibration_data,
            sequential,
            verbose=verbose,
            stacklevel=stacklevel + 1,
        )


def _choose(
    inventory: Inventory,
    options: Options,
    calibration_data: Any,
    sequential: bool | None,
    *,
    verbose: int,
    stacklevel: int,
) -> Chosen:
    selection = selection_of(inventory, options, verbose=verbose, stacklevel=stacklevel + 1)
    inventory = selection.inventory
    selection, calibration = calibrated(
        selection, calibration_data, verbose=verbose, stacklevel=stacklevel + 1
    )
    if calibration is not None and selection.stats is not None:
        without = _without_data(selection, selection.stats.examples, verbose)
        plan = best_plan(
            selection, calibration, without, sequential, verbose=verbose, stacklevel=stacklevel + 1
        )
        used: Calibration | None = calibration
        if without is not None and plan.method == without.options.method:
            used = None if without.stats is None else Calibration(stats=without.stats)
        return Chosen(plan, inventory, used, calibration.examples)
    if selection.method.synthetic:
        reason = unsuitable(inventory)
        if reason is None:
            stats = synthetic_stats(inventory, verbose=verbose)
            calibration = Calibration(stats=stats)
            selection = _reachable(selection.calibrated(stats), stacklevel=stacklevel + 1)
        elif options.by_default:
            selection = selection.without_data()
        else:
            raise ValueError(
                f"Expected another method than 'synthetic' for the model '{inventory.model.name}': "
                f"{reason}. Received: method='synthetic'"
            )
    return Chosen(selection.plan(), inventory, calibration)


def calibrated(
    selection: Selection, calibration_data: Any, *, verbose: int = 1, stacklevel: int = 1
) -> tuple[Selection, Calibration | None]:
    """The selection problem with calibration statistics, if there are data, and the calibration.

    Raises:
        ValueError: If weights are not finite, or the data do not fit the model.
    """
    inventory = selection.inventory
    wrappers.apply_masks(inventory.pruning)
    if calibration_data is not None or selection.method.synthetic:
        check_kernels(inventory.candidates)
    if calibration_data is None:
        return selection, None
    calibration = Calibration.of(inventory, calibration_data, stacklevel=stacklevel + 1)
    stats = calibration.collected(inventory, verbose=verbose, stacklevel=stacklevel + 1)
    return _reachable(selection.calibrated(stats), stacklevel=stacklevel + 1), calibration


def _without_data(selection: Selection, examples: int, verbose: int) -> Selection | None:
    """The same selection as if there were no data, to see whether that is better.

    None if the user named the method. With few examples it is on noise, if that is possible.
    """
    if not selection.options.by_default:
        return None
    if examples < _FEW_EXAMPLES and unsuitable(selection.inventory) is None:
        stats = synthetic_stats(selection.inventory, verbose=verbose)
        options = dataclasses.replace(selection.options, method=DEFAULT_WITHOUT_DATA)
        return dataclasses.replace(selection, options=options).calibrated(stats)
    return selection.without_data()


def selection_of(
    inventory: Inventory, options: Options, *, verbose: int = 1, stacklevel: int = 1
) -> Selection:
    """Sets up the selection problem, without decomposing anything.

    Raises:
        ValueError: If the model cannot be compressed, or `cr` is out of reach for any weights.
    """
    inventory = candidates_of(inventory, options, stacklevel=stacklevel + 1)
    resources = _resources(inventory, options, verbose, stacklevel=stacklevel + 1)
    selection = Selection.of(inventory, resources, options)
    selection = _reachable(selection, stacklevel=stacklevel + 1)
    selection.warn_of_bounds(stacklevel=stacklevel + 1)
    return selection


def _reachable(selection: Selection, *, stacklevel: int) -> Selection:
    """The selection problem; without the default target if that is too strict.

    Raises:
        UnreachableError: If `cr` or a bound is out of reach.
    """
    options = selection.options
    try:
        selection.check()
    except UnreachableError:
        if not options.target_by_default:
            raise
    else:
        return selection
    free = dataclasses.replace(options, target=None, target_by_default=False)
    one_slice = selection.with_options(dataclasses.replace(free, max_slices=1))
    try:
        one_slice.check()
    except UnreachableError:
        any_slices = selection.with_options(free)
        any_slices.check()
        _warn_of_slow_forms(selection, "target='size'", stacklevel=stacklevel + 1)
        return any_slices
    accept = (
        "max_slices=1 to accept this, or target='size' for thin slices, which keep more accuracy "
        "and are slower still"
    )
    _warn_of_slow_forms(selection, accept, stacklevel=stacklevel + 1)
    return one_slice


def _warn_of_slow_forms(selection: Selection, accept: str, *, stacklevel: int) -> None:
    options = selection.options
    removed = " and ".join(
        f"{cr:.0%} of {RESOURCES[name].counted}" if cr > LEAST_CR else "anything"
        for name, cr in options.limits.items()
    )
    within = " within the bounds" if options.bounds else ""
    within += " within the limit of memory" if options.memory is not None else ""
    warnings.warn(
        f"Forms that run fast on common CPUs (target={CPU!r}) are not enough to remove {removed}"
        f"{within} from the model '{selection.inventory.model.name}'. So other forms are taken, "
        "also of narrow layers, which some processors run slower than the dense layers. Pass "
        f"{accept}.",
        stacklevel=stacklevel + 1,
    )


def _resources(
    inventory: Inventory, options: Options, verbose: int, *, stacklevel: int
) -> list[Resource]:
    """The resources that the options limit."""
    if options.objective == "latency":
        from keras_alds.litert.latency import measured_latency
        from keras_alds.litert.table import Settings

        settings = Settings(
            options.quantize,
            target=options.target or "litert",
            max_slices=options.max_slices,
            schemes=options.schemes_of(METHODS[options.method]),
        )
        table, more = options.latency_table, {"verbose": verbose, "stacklevel": stacklevel + 1}
        return [measured_latency(inventory, table, settings, **more)]
    known: dict[str, Resource] = {
        "params": Params(inventory, METHODS[options.method]),
        "macs": Macs(inventory, only=len(options.limits) == 1),
    }
    return [known[name] for name in options.limits]


def checked_options(cr: Any, given: Mapping[str, Any], *, has_data: bool, caller: str) -> Options:
    """Checks each option and their combination, and reads the latency table, if there is one.

    Raises:
        TypeError: If an option's name is unknown.
        ValueError: If an option is invalid; see `select`.
    """
    options = Options.checked(cr, given, has_data=has_data, caller=caller)
    if options.objective != "latency":
        return options
    from keras_alds.litert.latency import check_table

    table = check_table(options.latency_table, options.target, options.quantize)
    return dataclasses.replace(options, latency_table=table)


def _is_synthetic(plan: CompressionPlan) -> bool:
    """Whether a plan was chosen by a method that makes examples itself."""
    return plan.method in METHODS and METHODS[plan.method].synthetic


def wants_data(plan: CompressionPlan) -> bool:
    """Whether a plan was chosen by a method that uses calibration data."""
    return plan.method in METHODS and METHODS[plan.method].needs_data
