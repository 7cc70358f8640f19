"""`select` and `compress`: from a model to a plan, and from a plan to a smaller model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from keras_alds import _backend
from keras_alds.core.choices import ChoiceTable
from keras_alds.core.solvers import InfeasibleBudget, Solution
from keras_alds.methods import METHODS, choose_method
from keras_alds.options import Options, check_cr_or_plan
from keras_alds.plan import CompressionPlan
from keras_alds.problem import Problem, check_model, kernels
from keras_alds.models import wrappers
from keras_alds.models.in_place import (
    apply_calibrated,
    check_folded,
    check_sequential,
    match,
)
from keras_alds.models.observe import Calibration


def select(
    model: Any,
    cr: float | Mapping[str, float],
    *,
    method: str | None = None,
    objective: str = "params",
    error: str | None = None,
    calibration_data: Any = None,
    exclude: Any = (),
    max_slices: int | None = None,
    rank_multiple: int = 1,
    target: str | None = None,
    bounds: Mapping[Any, tuple[float | None, float | None]] | None = None,
    latency: Any = None,
    schemes: int | str | Sequence[int] = 0,
) -> CompressionPlan:
    """Chooses slices and rank for every layer, together, so that the fraction `cr` is removed.

    The model is not changed. Spectra are computed once for each kernel and kept as long as the
    layer and its values stay: a second call for the same model, with whatever `cr`, method or
    objective, takes only the solver's milliseconds. The same weights give the same plan, bit for
    bit, in any process.

    Args:
        model: A built `keras.Model` or `tf_keras.Model` of any kind: Functional, Sequential,
            nested, or subclassed.
        cr: Float, 0 < cr < 1, or dict. Fraction to remove: with `objective="params"` of all the
            model's parameters, BatchNormalization, biases and untouched layers included, so that
            `1 - compressed.count_params() / model.count_params() >= cr`; with
            `objective="macs"` of its multiply–accumulates (see `count_macs`); with
            `objective="latency"` of its latency, as measured layer by layer (see
            `keras_alds.litert.measure_latency`). Kernels whose rank is not full lose more than
            was asked for, since that costs no error. Or a dict of
            both limits, `{"params": 0.5, "macs": 0.4}`: at least so much of each is removed.
        method: String or None. `"energy"`: minimise the sum of the layers' relative squared
            errors; `"alds"`, the paper's: minimise the largest relative error of any layer,
            solved exactly; `"activation"`: the sum of the relative squared errors of the layers'
            outputs on `calibration_data`; and those that the paper compares with: `"svd"`,
            `"svd-energy"`, `"l-rank"`, `"pca"` (needs data), `"alds-error"`, `"alds-simple"`,
            `"alds-simple-5"`. Defaults to None: `"activation"` with calibration data, `"alds"`
            with an `error`, else `"energy"`.
        objective: String, `"params"`, `"macs"` or `"latency"`. Choices that are not faster than
            the dense layer are never taken with `"latency"`. Defaults to `"params"`.
        error: String or None. Another error measure for the method: `"slice"`, `"bound"`,
            `"spectral"`, `"energy"` or `"residual"`. Defaults to the method's own (`"slice"` for
            `"alds"`).
        calibration_data: Unlabelled examples, some hundreds, on which the error of every choice is
            measured: an array, a list or dict of arrays for several inputs, a batched
            `tf.data.Dataset`, a `keras.utils.PyDataset` or an iterable of batches (labels are
            ignored; at most 1024 examples are used), or `CalibrationStats`. Defaults to None.
        exclude: Layers to leave alone: a name, a path (`"encoder/conv1"`), a regular expression
            that matches one as a whole, a compiled pattern (searched), a layer class, or a list
            of these. What names a nested model, a wrapper or an attention layer names all that
            is in it. Defaults to none.
        max_slices: Integer or None. Largest number of slices k. Many slices keep more accuracy
            and run slower. Defaults to no limit.
        rank_multiple: Integer. Ranks j are multiples of it (4 or 8 fill vector lanes). Defaults
            to 1.
        target: String or None. The runtime that the model is for: `"litert"` (LiteRT on a CPU, by
            XNNPACK), `"litert-reference"` (its built-in kernels, microcontrollers) or
            `"gpu-delegate"`. Slices and ranks are then such as run there and are not slow there,
            besides `max_slices` and `rank_multiple`; with calibration data the plan says what
            that costs, unless the objective is `"latency"`. Defaults to None: no constraints, or
            `"litert"` with `objective="latency"`.
        bounds: Dict from layers, named as in `exclude`, to `(least, greatest)`: fractions of the
            layer's own parameters to remove, None for no bound, as in `{"stem": (None, 0.3),
            r"block3/.*": (0.4, 0.8)}`. Where several entries name a layer, all hold. Defaults to
            none.
        latency: With `objective="latency"`: a `keras_alds.litert.LatencyTable`, or the path of a
            CSV file that holds one, measured here or on a device. Defaults to None: measured here
            with LiteRT, in float32 on one thread, once a process.
        schemes: Integer, sequence of integers, or `"all"`. The fold schemes that a convolution's
            kernel may be unfolded in: 0 leaves its window to the encoder, 1 gives the height to
            the decoder, 2 the width, and 3 all of it; Conv1D and Conv3D have 0 and 3. With
            several the solver picks one a layer, together with slices and rank. A convolution
            that has none of them is left alone; dense layers, kernels of one position and all
            other layers have scheme 0 whatever is asked for. Of the methods `"energy"` and
            `"alds"` choose schemes; not on calibration data, with measured latency or two
            limits, and with a target only for one slice. Defaults to 0.

    Returns:
        A `CompressionPlan`. It names every layer that is left alone, and why.

    Raises:
        ValueError: If an argument is not as above; if the model is not built, holds no layer that
            can be factorized, is already compressed, or has weights that are not finite; if the
            calibration data do not fit the model, hold NaN or infinity or fewer than 8 examples,
            or the method uses none; if no choice of a layer is within its `bounds`; or if `cr` is
            not reachable: the text then says what is; or if the latency table is of another model.
        ImportError: If latency is to be measured and LiteRT is not installed.

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
    method = choose_method(method, has_data=calibration_data is not None, error=error)
    options = Options(
        cr,
        method,
        objective,
        error,
        exclude,
        max_slices,
        rank_multiple,
        target,
        bounds,
        latency=latency,
        schemes=schemes,
    )
    return select_with(model, options, calibration_data)[0]


def select_with(
    model: Any,
    options: Options,
    calibration_data: Any = None,
    *,
    keep: bool = False,
    verbose: int = 1,
) -> tuple[CompressionPlan, Calibration | None]:
    """`select` with options that are already checked; returns what it learnt of the data too.

    With `keep` the examples are kept, to be run again.
    """
    problem = Problem.of(model, options, verbose=verbose)
    wrappers.apply_masks(model)
    calibration = None
    if calibration_data is not None:
        for _ in kernels(problem.candidates):
            pass  # complains of weights that are not finite before the model is run
        calibration = Calibration.of(model, calibration_data, keep=keep, verbose=verbose)
        problem = problem.calibrated(model, calibration.collected(model, verbose=verbose))
    tables = problem.tables()
    try:
        solution = problem.solve(tables)
    except InfeasibleBudget as infeasible:
        raise problem.unreachable(infeasible.required, infeasible.resource) from None
    output_errors = _output_errors(problem, tables, solution) if calibration else (None, None)
    rows = zip(tables, solution.indices, strict=True)
    choices = tuple(
        problem.choice(spec, *next(rows)) if spec.reason is None else problem.left_alone(spec)
        for spec in problem.specs
    )
    saved = sum(choice.params_before - choice.params_after for choice in choices)
    saved_macs = sum((c.macs_before or 0) - (c.macs_after or 0) for c in choices)
    macs = None if problem.macs is None else sum(problem.macs.values())
    latency = None if problem.latency is None else problem.latency.total
    saved_latency = sum((c.latency_before or 0) - (c.latency_after or 0) for c in choices)
    plan = CompressionPlan(
        requested_cr=float(options.cr),
        method=options.method,
        error_measure=problem.method.error,
        objective=options.objective,
        params_before=problem.params,
        params_after=problem.params - saved,
        macs_before=macs,
        macs_after=None if macs is None else macs - saved_macs,
        choices=choices,
        target=options.target,
        output_error=output_errors[0],
        output_error_without_target=output_errors[1],
        requested_macs_cr=options.macs_cr,
        latency_before=latency,
        latency_after=None if latency is None else latency - saved_latency,
        latency_runtime=None if problem.latency is None else problem.latency.runtime,
    )
    return plan, calibration


def _output_errors(
    problem: Problem, tables: list[ChoiceTable], solution: Solution
) -> tuple[float | None, float | None]:
    """The total error of the layers' outputs with the target's constraints, and without them."""
    if problem.options.target is None or problem.latency is not None:
        return None, None  # latencies are known of the target's choices only
    free = dataclasses.replace(problem, options=dataclasses.replace(problem.options, target=None))
    free_tables = free.tables()
    solved = (tables, solution), (free_tables, free.solve(free_tables))
    constrained, unconstrained = (
        sum(float(table.error[row]) for table, row in zip(tables, found.indices, strict=True))
        for tables, found in solved
    )
    return constrained, unconstrained


def compress(
    model: Any,
    cr: float | Mapping[str, float] | None = None,
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
    bounds: Mapping[Any, tuple[float | None, float | None]] | None = None,
    latency: Any = None,
    schemes: int | str | Sequence[int] = 0,
    sequential: bool | None = None,
) -> Any:
    """Returns a new, smaller model; `model` is untouched.

    The new model has the class, the names and the graph of `model`; every layer that the plan
    factorizes is the factorized one of its kind in `keras_alds.layers`, such as
    `FactorizedConv2D` (attention layers: with some of their projections factorized). Frozen layers
    stay frozen. A compiled model comes back compiled, with an optimizer of the same class and
    settings (its state new), the same loss and metrics.

    Functional and Sequential models are cloned. A subclassed model is made again by
    `from_config(get_config())` and its layers are then factorized in place. Its code, and that of
    layers of your own in any model, goes on making the original layers, of which a warning tells:
    to load the saved weights later, apply the plan to a model that is newly made and built,
    `apply_plan(model, plan)`, then `load_weights`.

    Args:
        model: A built `keras.Model` or `tf_keras.Model`.
        cr: Float, 0 < cr < 1, or a dict of two. The fraction to remove; see `select`.
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
        bounds: As for `select`.
        latency: As for `select`.
        schemes: As for `select`.
        sequential: Boolean or None. With calibration data, whether the layers are compressed one
            after the other, each on what the compressed layers before it give, so that it makes
            up for their errors. It needs the examples themselves (not `CalibrationStats`) and
            takes about two more forward passes; what is Python code (a subclassed model) is run
            anew for every layer in it. Defaults to None: yes, if there are examples and no piece
            of code with more than 8 such layers; a warning tells if that is the obstacle.

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
        bounds=bounds,
        latency=latency,
        schemes=schemes,
    )
    check_sequential(sequential, calibration_data, method if plan is None else plan.method)
    keep = sequential is not False
    calibration = None
    if plan is None:
        method = choose_method(method, has_data=calibration_data is not None, error=error)
        options = Options(
            cr,
            method,
            objective,
            error,
            exclude,
            max_slices,
            rank_multiple,
            target,
            bounds,
            latency=latency,
            schemes=schemes,
        )
        plan, calibration = select_with(model, options, calibration_data, keep=keep)
    else:
        check_model(model)
        match(model, plan)
        check_folded(plan, calibration_data)
        if calibration_data is not None:
            calibration = Calibration.of(model, calibration_data, keep=keep)
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
    # Statistics that were collected here nobody sees again.
    last = calibration is not calibration_data
    apply_calibrated(copy, plan, calibration, sequential, last=last)
    return copy


def wants_data(plan: CompressionPlan) -> bool:
    """Whether a plan was chosen by a method that uses calibration data."""
    return plan.method in METHODS and METHODS[plan.method].needs_data
