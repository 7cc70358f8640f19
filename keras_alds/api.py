"""`select` makes a plan, `compress` and `apply_plan` follow it, `recompose` multiplies factors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, TypeVar

from keras_alds._backend import backend_of
from keras_alds._backend.layers import KerasModel
from keras_alds.choosing import Chosen, checked_options, choose, make_choice, wants_data
from keras_alds.kinds import holders
from keras_alds.methods import METHODS
from keras_alds.models.channels import find_channels
from keras_alds.models.choices import decomposing_on
from keras_alds.models.fit import check_sequential
from keras_alds.models.in_place import apply
from keras_alds.models.inventory import Inventory, check_is_model
from keras_alds.models.recompose import Request, already, inspected, recomposed, to_recompose
from keras_alds.models.submodels import frozen_part
from keras_alds.models.synthetic import unsuitable
from keras_alds.models.turns import alone
from keras_alds.naming import check_exclude
from keras_alds.options import Options, SelectOptions, check_cr_or_plan, takes_options
from keras_alds.plan import CompressionPlan, check_plan
from keras_alds.refinement import refined, steps_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model = TypeVar("Model", bound=KerasModel)

# The distance between outputs from which users are warned. Of classifiers that were compressed
# without retraining, those above it lost some ten points or more.
_FAR = 0.2
#: The fractions up to which a method without data lost little on all networks that were measured
#: (docs/results/methods.md).
SAFE = {"synthetic": 0.3, "energy": 0.1}


@takes_options()
def select(
    model: KerasModel,
    cr: float | Mapping[str, float],
    *,
    calibration_data: Any = None,
    executor: Executor | None = None,
    verbose: int = 1,
    **options: Unpack[SelectOptions],
) -> CompressionPlan:
    """Chooses slices and rank for all layers jointly, so that the fraction `cr` is removed.

    The model is not changed. The singular values of each kernel, and the statistics that stand in
    for data, are computed once and cached until the weights change. So without `calibration_data`,
    a second call for the same model takes milliseconds. The same weights always give exactly the
    same plan.

    The plan for a compressed model is chosen for its dense form, in which every kernel is the
    product of its factors. `cr` counts against the parameters of that form, so a larger `cr`
    compresses the model further.

    Args:
        model: A built `keras.Model` or `tf_keras.Model` of any kind: Functional, Sequential,
            nested, or subclassed.
        cr: Float, 0 < cr < 1, or dict. The fraction to remove. With `objective="params"` it counts
            all the model's parameters, BatchNormalization, biases and untouched layers included, so
            that `1 - compressed.count_params() / model.count_params() >= cr`. With
            `objective="macs"` it counts multiply–accumulates (see `count_macs`), with
            `objective="latency"` it counts latency measured layer by layer (see
            `keras_alds.litert.measure_latency`). More than `cr` is removed from rank-deficient
            kernels, where that adds no error. A dict limits both parameters and MACs:
            `{"params": 0.5, "macs": 0.4}` removes at least these fractions. The key `"memory"`
            beside them is the fraction by which the peak of the activation memory shrinks at least,
            0 <= memory < 1: with `{"params": 0.5, "memory": 0.0}` it does not grow; see
            `CompressionPlan.memory`.
        calibration_data: A calibration set: a few hundred unlabelled examples on which the error
            of every choice is measured. An array, a list or dict of arrays for several inputs, a
            batched `tf.data.Dataset`, a `keras.utils.PyDataset`, an iterable of batches, a
            function that returns one of these, or `CalibrationStats`. Labels are ignored, and at
            most 1024 examples are used. Every fourth batch is held out: errors are those on it, and
            of several plans the one with the nearest outputs is taken; see
            `CompressionPlan.trials`. Defaults to None: noise that fits the model's
            BatchNormalization, or the weights alone; see `method`.
        executor: Any `concurrent.futures.Executor` whose workers import this package, to decompose
            the layers. They need no TensorFlow, and get each kernel and its statistics once. The
            plan is the same. Defaults to None: threads of this process, which is faster on one
            machine.
        verbose: 0 for silence, else shows a progress bar on a terminal. Defaults to 1.
        {options}

    Returns:
        A `CompressionPlan`, which also lists the layers that were skipped, and why. A warning says
        if it changes the model's outputs on held-out examples much.

    Raises:
        TypeError: If an option's name is unknown.
        ValueError: If an argument is invalid; if the model is not built, has no layer that can be
            factorized, or has weights that are not finite; if the calibration data do not fit the
            model, contain NaN or infinity, have fewer than 8 different examples, or are not used by
            the method; if no choice for a layer satisfies its `bounds`; if `cr` is not reachable
            (the message says what is); or if the latency table belongs to another model.
        ImportError: If latency has to be measured and LiteRT is not installed.

    Example:
    ```python
    plan = keras_alds.select(model, cr=0.5)
    plan.summary()
    ```

    References:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal
        Layer-wise Decomposition", NeurIPS 2021, arXiv:2107.11442; Theorem 1 and Algorithm 1. The
        method `"alds"` solves its min–max problem exactly, where the paper searches.
    """
    has_data = calibration_data is not None
    checked = checked_options(cr, options, has_data=has_data, caller="select")
    with alone(model):
        inventory = inspected(model, checked)
        with recomposed(inventory, to_recompose(inventory, checked)) as dense:
            with decomposing_on(executor):
                chosen = choose(dense, checked, calibration_data, verbose=verbose, stacklevel=2)
            _warn_of_frozen(chosen, stacklevel=2)
            _warn_if_far(chosen, stacklevel=2)
        return chosen.plan


@takes_options()
def compress(
    model: Model,
    cr: float | Mapping[str, float] | None = None,
    *,
    plan: CompressionPlan | None = None,
    calibration_data: Any = None,
    sequential: bool | None = None,
    refine: bool | int = False,
    verbose: int = 1,
    **options: Unpack[SelectOptions],
) -> Model:
    """Returns a new, smaller model; `model` is not changed.

    Only examples can tell whether the accuracy holds, so pass `calibration_data` if you can.
    Without them, layers are chosen and fitted on noise that is made to fit the model's
    BatchNormalization, or by their weights alone if it has none; docs/how-to/calibrate.md says what
    to expect.

    The new model has the class, the layer names and the graph of `model`. The layers that the plan
    factorizes are replaced by those of `keras_alds.layers`, such as `FactorizedConv2D`. Inside
    attention and recurrent layers, the kernels are factorized. Frozen layers stay frozen. If
    `model` is compiled, so is the new one, with the same loss, metrics and optimizer settings and
    a fresh optimizer state.

    Functional and Sequential models are cloned. A subclassed model is copied with
    `from_config(get_config())`, and the copy's layers are factorized in place. A saved model loads
    as before, also with layers of your own that hold factorized ones: these and subclassed models
    get a subclass of their class, whose config has the factorized layers. To load weights only,
    apply the plan to a new instance first: `apply_plan(MyModel(), plan)`, then `load_weights`. A
    warning names the layers and models that cannot be made again from their config.

    A compressed model is compressed further if `cr` is larger; see `select`. If it is compressed
    already as asked or further, the new model is a copy, and a warning says so. Latency is always
    chosen anew.

    Args:
        model: A built `keras.Model` or `tf_keras.Model`.
        cr: Float, 0 < cr < 1, or dict. The fraction to remove; see `select`.
        plan: A `CompressionPlan` from `select` for this model or one of the same architecture.
            Replaces `cr` and the options of `select`.
        calibration_data: As for `select`. The factors then minimise the error of the layers'
            outputs on these examples. With `plan` the data affect the factors only, and the moving
            statistics of BatchNormalization if the plan says so (`CompressionPlan.normalized`;
            this needs examples). A plan that was chosen with data needs the same data or
            `CalibrationStats` again; without them a warning is issued.
        sequential: Boolean or None. Whether to compress the layers one after the other. Each layer
            is then fitted on the outputs of the compressed layers before it and corrects their
            errors. This needs examples (not `CalibrationStats`) and about two more forward passes.
            A subclassed model is run again for each of its layers. Defaults to None: what brings
            the outputs nearer to those of `model` on held-out examples. Both are tried, unless a
            subclassed model or layer holds more than 8 layers to compress, which gives a warning.
        refine: Boolean or integer. Whether to train the new model without labels, to be like
            `model` on the calibration examples; an integer is the largest number of steps. It
            takes minutes, and never makes outputs worse on examples held out. See `refine`, which
            also tells how far it came. Needs examples, not `CalibrationStats`. Defaults to False;
            True is 200 steps.
        verbose: 0 for silence, else shows a progress bar on a terminal. Defaults to 1.
        {options}

    Returns:
        A new model of the same class.

    Raises:
        TypeError: If an option's name is unknown.
        ValueError: As for `select`; if both or neither of `cr` and `plan` are given; if `plan` was
            made for another model, or keeps more parameters than a compressed model has left; or
            if a subclassed model cannot be made from its config.

    Example:
    ```python
    small = keras_alds.compress(model, cr=0.5)
    1 - small.count_params() / model.count_params()  # at least 0.5
    ```
    """
    return compressed_and_plan(
        model,
        cr,
        options,
        plan=plan,
        calibration_data=calibration_data,
        sequential=sequential,
        refine=refine,
        verbose=verbose,
        stacklevel=2,
    )[0]


def apply_plan(
    model: KerasModel,
    plan: CompressionPlan,
    *,
    calibration_data: Any = None,
    sequential: bool | None = None,
    verbose: int = 1,
) -> None:
    """Factorizes the layers of `model` **in place**, as `plan` says.

    The model, its layers and all variables that are not factorized stay the same objects. Built
    optimizers are rebuilt for the new variables. They keep their iterations, learning rate and the
    state of unchanged variables; see `ALDSCompress` for the rest. Compiled step functions are
    made again. If anything fails, the model is left unchanged.

    In a compressed model, the factorized layers become dense first. If they are factorized already
    as `plan` says, nothing changes, and a warning says so.

    Use this for a model that cannot be copied, or to load the weights of a compressed model into a
    new instance, whose code creates dense layers. Otherwise use `compress`, which returns a new
    model. Files are saved and loaded as after `compress`.

    Args:
        model: A built Keras 3 or tf_keras model.
        plan: A plan made for this model, or for one of the same architecture.
        calibration_data: As for `select`. The factors then minimise the error of the layers'
            outputs on these examples, and moving statistics follow as by `compress`. Defaults to
            None: the factors approximate the kernels, even if the plan was chosen with data.
        sequential: As for `compress`.
        verbose: 0 for silence, else shows a progress bar on a terminal. Defaults to 1.

    Raises:
        ValueError: If `plan` was made for another model, or keeps more parameters than a
            compressed model has left, a kernel is not finite, or the calibration data do not fit
            the model or `sequential`.

    Example:
    ```python
    model = MyModel()
    model(x[:1])  # makes its weights
    keras_alds.apply_plan(model, keras_alds.CompressionPlan.load("plan.json"))
    model.load_weights("compressed.weights.h5")
    ```
    """
    check_plan(plan)
    check_sequential(sequential, calibration_data, plan.method)
    with alone(model):
        inventory = inspected(model, plan)
        met = already(inventory, plan)
        if met is not None:
            warnings.warn(f"The model '{model.name}' is {met}: it is left as it is.", stacklevel=2)
            return
        with recomposed(inventory, to_recompose(inventory, plan), keep=True) as dense:
            chosen = make_choice(
                dense, plan, calibration_data, sequential, verbose=verbose, stacklevel=2
            )
            apply(
                chosen.inventory,
                plan,
                chosen.calibration,
                sequential,
                verbose=verbose,
                stacklevel=2,
            )


def recompose(model: Model, *, exclude: Any = ()) -> Model:
    """Returns a dense copy of a compressed model; `model` is not changed.

    Each factorized layer becomes the stock layer that it was made from, with the product of its
    factors as its kernel, W = E D. So the copy computes the same. It has the size of the model
    before the compression, and not the weights that it had then. Use it to train on without the
    limit of the ranks. To compress further, you need not call it: `select`, `compress` and
    `ALDSCompress` do this themselves.

    Layers that you wrote as factorized ones, such as a `FactorizedDense` in your code, become dense
    too. Name them in `exclude` to leave them as they are. The copy is made as by `compress`: with
    the same names and compile state, and a fresh optimizer.

    Args:
        model: A built `keras.Model` or `tf_keras.Model`.
        exclude: Layers to leave factorized; as for `select`. Defaults to none.

    Returns:
        A new model of the same class. A copy with a warning, if there is nothing to recompose.

    Raises:
        ValueError: If the model cannot be copied, see `compress`, or TF-MOT prunes its factors.

    Example:
    ```python
    small = keras_alds.compress(model, cr=0.5)
    dense = keras_alds.recompose(small)
    dense.count_params() == model.count_params()  # True
    ```
    """
    check_is_model(model)
    excluded = check_exclude(exclude)
    with alone(model):
        copy = _copy(model, stacklevel=2)
        inventory = Inventory.of(copy, excluded)
        inventory.warn_of_unmatched(stacklevel=2)
        records = [record for record in inventory.factorized if not record.excluded]
        if not records:
            warnings.warn(
                f"The model '{model.name}' has no factorized layer to recompose: a copy is "
                "returned.",
                stacklevel=2,
            )
        with recomposed(inventory, records, keep=True):
            pass
        for layer in (*(layer for _, layer in reversed(inventory.layers)), copy):
            holders.abandon(layer)
        return copy


def _compressed(
    model: Model,
    request: Request,
    data: Any,
    sequential: bool | None,
    verbose: int,
    *,
    stacklevel: int,
) -> tuple[Model, Chosen | None]:
    """A copy of a model, compressed as requested, and what was chosen, if anything was to do."""
    inventory = inspected(model, request)
    met = already(inventory, request)
    if met is not None:
        warnings.warn(
            f"The model '{model.name}' is {met}: a copy is returned.", stacklevel=stacklevel + 1
        )
        return _copy(model, stacklevel=stacklevel + 1), None
    if not to_recompose(inventory, request):
        # First, as it may fail; but calibration calls models that were not called yet.
        copy = _copy(model, stacklevel=stacklevel + 1) if model.built else None
        chosen = make_choice(
            inventory, request, data, sequential, verbose=verbose, stacklevel=stacklevel + 1
        )
        # Statistics collected here are not used again.
        last = chosen.calibration is not data
        copy = _copy(model, stacklevel=stacklevel + 1) if copy is None else copy
        carry_out(copy, chosen, sequential, last=last, verbose=verbose, stacklevel=stacklevel + 1)
    else:
        copy = _copy(model, stacklevel=stacklevel + 1)
        inventory = inspected(copy, request)
        with recomposed(inventory, to_recompose(inventory, request), keep=True) as dense:
            chosen = make_choice(
                dense, request, data, sequential, verbose=verbose, stacklevel=stacklevel + 1
            )
            apply(
                chosen.inventory,
                chosen.plan,
                chosen.calibration,
                sequential,
                verbose=verbose,
                stacklevel=stacklevel + 1,
            )
    if isinstance(request, Options):
        _warn_of_frozen(chosen, stacklevel=stacklevel + 1)
        _warn_of_no_data(chosen, request, data, stacklevel=stacklevel + 1)
        _warn_if_far(chosen, stacklevel=stacklevel + 1)
    return copy, chosen


def compressed_and_plan(
    model: Model,
    cr: Any,
    options: Mapping[str, Any],
    *,
    plan: CompressionPlan | None,
    calibration_data: Any,
    sequential: bool | None,
    refine: bool | int,
    verbose: int = 1,
    stacklevel: int,
) -> tuple[Model, CompressionPlan | None]:
    """`compress`, and the plan that it followed; None if the model is compressed so far already.

    Args:
        model: As for `compress`.
        cr: As for `compress`.
        options: The options of `select`.
        plan: As for `compress`.
        calibration_data: As for `compress`.
        sequential: As for `compress`.
        refine: As for `compress`.
        verbose: As for `compress`.
        stacklevel: The frame that warnings name; 1 is the caller of this function.
    """
    check_cr_or_plan(cr, plan, options, "compress")
    method = options.get("method") if plan is None else plan.method
    check_sequential(sequential, calibration_data, method)
    steps = steps_of(refine, calibration_data)
    has_data = calibration_data is not None
    if plan is None:
        request: Request = checked_options(cr, options, has_data=has_data, caller="compress")
    else:
        request = plan
        if not has_data and wants_data(plan):
            warnings.warn(
                "Expected `calibration_data` with a plan that was chosen with data (method "
                f"{plan.method!r}). Received: None. The factors approximate the kernels instead "
                "of the outputs, which costs accuracy. Pass the same data, or `CalibrationStats`.",
                stacklevel=stacklevel + 1,
            )
    check_is_model(model)
    with alone(model):
        small, chosen = _compressed(
            model, request, calibration_data, sequential, verbose, stacklevel=stacklevel + 1
        )
        if steps is not None and chosen is not None:
            _refine(small, model, chosen, steps, verbose, stacklevel=stacklevel + 1)
        return small, None if chosen is None else chosen.plan


def _refine(
    small: Any, model: Any, chosen: Chosen, steps: int, verbose: int, *, stacklevel: int
) -> None:
    result = refined(small, model, chosen.examples, steps, verbose=verbose)
    if not result.best_step:
        advice = " More examples may help." if result.steps else ""
        warnings.warn(f"The refinement was undone: {result}.{advice}", stacklevel=stacklevel + 1)


# -- Shared with `search` --------------------------------------------------------------------------


def carried_out(
    model: Model,
    chosen: Chosen,
    sequential: bool | None,
    *,
    last: bool,
    verbose: int = 1,
    stacklevel: int = 1,
) -> Model:
    """A copy of a dense model, compressed as chosen; see `carry_out`."""
    copy = _copy(model, stacklevel=stacklevel + 1)
    carry_out(copy, chosen, sequential, last=last, verbose=verbose, stacklevel=stacklevel + 1)
    return copy


def carry_out(
    copy: Model,
    chosen: Chosen,
    sequential: bool | None,
    *,
    last: bool,
    verbose: int = 1,
    stacklevel: int = 1,
) -> None:
    """Compresses the copy of a dense model as chosen for the model.

    Args:
        copy: The copy.
        chosen: What was chosen.
        sequential: As for `compress`.
        last: Whether the calibration statistics are not used again.
        verbose: As for `apply`.
        stacklevel: The frame that warnings name; 1 is the caller of this function.
    """
    apply(
        chosen.inventory.of_copy(copy),
        chosen.plan,
        chosen.calibration,
        sequential,
        fresh=True,
        last=last,
        verbose=verbose,
        stacklevel=stacklevel + 1,
    )


def _warn_if_far(chosen: Chosen, *, stacklevel: int) -> None:
    """Warns if a plan changes the outputs much."""
    plan = chosen.plan
    if plan.distance is None or plan.distance <= _FAR:
        return
    worst = sorted(plan.factorized, key=lambda choice: -(choice.divergence or 0.0))[:3]
    names = ", ".join(f"'{choice.layer}'" for choice in worst)
    warnings.warn(
        "Without retraining, the compressed model loses much: on held-out examples its outputs "
        f"are {plan.distance:.2f} away from the original's (total variation, or relative squared "
        f"error). Remove less, retrain, use more than {chosen.examples.total} examples, or spare "
        f"the layers that matter most with `bounds` or `exclude`: {names}."
        + _narrow_instead(chosen),
        stacklevel=stacklevel + 1,
    )


def _narrow_instead(chosen: Chosen) -> str:
    """What to say where fewer channels may lose less than factors."""
    inventory = chosen.inventory
    of_work = set(chosen.plan.requested) & {"macs", "latency"}
    if not of_work or not inventory.backend.has_graph(inventory.model):
        return ""
    effects = {choice.layer: choice.divergence or 0.0 for choice in chosen.plan.factorized}
    blocks = [block.path for block in find_channels(inventory)[0] if block.path in effects]
    if not blocks:
        return ""
    worst = max(blocks, key=lambda path: effects[path])
    return (
        " In blocks with depthwise convolutions, such as the one that "
        f"'{worst}' ends, fewer channels often lose less: see `keras_alds.narrow`, for models that "
        "are not compressed yet."
    )


def _warn_of_frozen(chosen: Chosen, *, stacklevel: int) -> None:
    """Warns if frozen models in a subclassed model are cut, such as a teacher."""
    inventory = chosen.inventory
    if inventory.backend.is_symbolic(inventory.model):
        return
    rows = zip(inventory.records, chosen.plan.choices, strict=True)
    found = frozen_part(inventory.model, [record for record, c in rows if c.factorized])
    if found is not None:
        warnings.warn(
            f"The plan factorizes {found}. To compress a model inside it only, pass that model. To "
            "leave the frozen part as it is, exclude it.",
            stacklevel=stacklevel + 1,
        )


def _warn_of_no_data(chosen: Chosen, options: Options, data: Any, *, stacklevel: int) -> None:
    """Warns if more is removed without data than networks are known to stand.

    Whoever names a method knows what it needs.
    """
    if data is not None or not options.by_default:
        return
    method = chosen.plan.method
    safe = SAFE.get(method)
    if safe is None or max(options.limits.values()) <= safe:
        return
    reason = "" if METHODS[method].synthetic else f", as {unsuitable(chosen.inventory)}"
    warnings.warn(
        f"Expected `calibration_data` to remove more than {safe:.0%} without retraining. Received: "
        f"none, and {max(options.limits.values()):.0%} to remove. The plan is made from "
        f"{'noise' if METHODS[method].synthetic else 'the weights alone'}{reason}, and only "
        "examples can tell whether the accuracy holds. Pass a few hundred unlabelled examples, or "
        f"method={method!r} to silence this warning.",
        stacklevel=stacklevel + 1,
    )


def _copy(model: Any, *, stacklevel: int) -> Any:
    backend = backend_of(model)
    with backend.creation_scope(model):
        return backend.copy_model(model, stacklevel=stacklevel + 1)
