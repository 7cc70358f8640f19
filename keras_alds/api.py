"""`select`, `compress` and `apply_plan`: from a model to a plan, and from a plan to a model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from keras_alds._backend import wrappers
from keras_alds._backend.layers import KerasModel
from keras_alds.methods import METHODS
from keras_alds.models.calibration import Calibration
from keras_alds.models.choices import kernels
from keras_alds.models.in_place import apply, check_folded, check_sequential
from keras_alds.models.inventory import Inventory
from keras_alds.models.matching import match
from keras_alds.models.resources import Macs, Params, Resource
from keras_alds.models.selection import Selection, candidates_of
from keras_alds.options import Options, SelectOptions, check_cr_or_plan, takes_options
from keras_alds.plan import CompressionPlan, check_plan

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model = TypeVar("Model", bound=KerasModel)


@takes_options()
def select(
    model: KerasModel,
    cr: float | Mapping[str, float],
    *,
    calibration_data: Any = None,
    **options: Unpack[SelectOptions],
) -> CompressionPlan:
    """Chooses slices and rank for every layer, together, so that the fraction `cr` is removed.

    The model is not changed. Spectra are computed once for each kernel and kept as long as the
    layer and its values stay. A second call for the same model, with any `cr`, method or
    objective, takes only the solver's milliseconds. The same weights give the same plan, bit for
    bit, in any process.

    Args:
        model: A built `keras.Model` or `tf_keras.Model` of any kind: Functional, Sequential,
            nested, or subclassed.
        cr: Float, 0 < cr < 1, or dict. The fraction to remove. With `objective="params"` it counts
            all the model's parameters, BatchNormalization, biases and untouched layers included, so
            that `1 - compressed.count_params() / model.count_params() >= cr`. With
            `objective="macs"` it counts multiply–accumulates (see `count_macs`), with
            `objective="latency"` the latency that was measured layer by layer (see
            `keras_alds.litert.measure_latency`). Kernels whose rank is not full lose more than was
            asked for, since that costs no error. A dict sets both limits, as in
            `{"params": 0.5, "macs": 0.4}`: at least so much of each is removed.
        calibration_data: Unlabelled examples, some hundreds, on which the error of every choice is
            measured: an array, a list or dict of arrays for several inputs, a batched
            `tf.data.Dataset`, a `keras.utils.PyDataset` or an iterable of batches (labels are
            ignored; at most 1024 examples are used), or `CalibrationStats`. Defaults to None.
        {options}

    Returns:
        A `CompressionPlan`. It names every layer that stays as it is, and why.

    Raises:
        TypeError: If there is no option of such a name.
        ValueError: If an argument is not as above; if the model is not built, holds no layer that
            can be factorized, is already compressed, or has weights that are not finite; if the
            calibration data do not fit the model, hold NaN or infinity or fewer than 8 examples,
            or the method uses none; if a layer has no choice within its `bounds`; if `cr` is not
            reachable: the text then says what is; or if the latency table is of another model.
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
    has_data = calibration_data is not None
    checked = checked_options(cr, options, has_data=has_data, caller="select")
    return choose(model, checked, calibration_data, stacklevel=2).plan


@takes_options()
def compress(
    model: Model,
    cr: float | Mapping[str, float] | None = None,
    *,
    plan: CompressionPlan | None = None,
    calibration_data: Any = None,
    sequential: bool | None = None,
    **options: Unpack[SelectOptions],
) -> Model:
    """Returns a new, smaller model; `model` is untouched.

    The new model has the class, the names and the graph of `model`. Every layer that the plan
    factorizes is the factorized one of its kind in `keras_alds.layers`, such as
    `FactorizedConv2D`. Attention and recurrent layers get factorized parts. Frozen layers stay
    frozen. A compiled model comes back compiled, with an optimizer of the same class and settings
    (its state new), the same loss and metrics.

    Functional and Sequential models are cloned. A subclassed model is made again by
    `from_config(get_config())`, and its layers are then factorized in place. Its code goes on
    making the original layers. To load its saved weights later, apply the plan to a fresh instance
    first: `apply_plan(MyModel(), plan)`, then `load_weights`.

    Args:
        model: A built `keras.Model` or `tf_keras.Model`.
        cr: Float, 0 < cr < 1, or a dict of two. The fraction to remove; see `select`.
        plan: A `CompressionPlan` made by `select` for this model or one of the same
            architecture, instead of `cr` and the options of `select`.
        calibration_data: As for `select`. The factors then keep the layers' outputs on these
            examples best. With `plan` they give the factors only; a plan that was chosen with
            data wants the same data or `CalibrationStats` again, and warns without.
        sequential: Boolean or None. With calibration data, whether the layers are compressed one
            after the other, each on what the compressed layers before it give, so that it makes
            up for their errors. It needs the examples themselves (not `CalibrationStats`) and
            takes about two more forward passes. Python code (a subclassed model) is run anew for
            every layer in it. Defaults to None: yes, if there are examples and no piece of code
            with more than 8 such layers; a warning tells if that is the obstacle.
        {options}

    Returns:
        A new model of the same class.

    Raises:
        TypeError: If there is no option of such a name.
        ValueError: As `select`; if both or neither of `cr` and `plan` are given; if `plan` was
            made for another model; or if a subclassed model cannot be made from its config.

    Example:
    ```python
    small = keras_alds.compress(model, cr=0.5)
    1 - small.count_params() / model.count_params()  # at least 0.5
    ```
    """
    check_cr_or_plan(cr, plan, options, "compress")
    method = options.get("method") if plan is None else plan.method
    check_sequential(sequential, calibration_data, method)
    keep, has_data = sequential is not False, calibration_data is not None
    if plan is None:
        checked = checked_options(cr, options, has_data=has_data, caller="compress")
        chosen = choose(model, checked, calibration_data, keep=keep, stacklevel=2)
    else:
        inventory = Inventory.of(model)
        match(inventory, plan)
        check_folded(plan, calibration_data)
        calibration = None
        if has_data:
            calibration = Calibration.of(inventory, calibration_data, keep=keep, stacklevel=2)
        if calibration is None and wants_data(plan):
            warnings.warn(
                f"The plan was chosen with calibration data (method {plan.method!r}), and there "
                "are none to make the factors with: they are those nearest to the kernels, which "
                "costs accuracy. Pass the same `calibration_data`, or `CalibrationStats`.",
                stacklevel=2,
            )
        chosen = Chosen(plan, inventory, calibration)
    backend = chosen.inventory.backend
    with backend.creation_scope(model):
        copy = backend.copy_model(model)
    apply(
        chosen.inventory.of_copy(copy),
        chosen.plan,
        chosen.calibration,
        sequential,
        # Nobody sees statistics again that were collected here.
        last=chosen.calibration is not calibration_data,
        stacklevel=2,
    )
    return copy


def apply_plan(
    model: KerasModel,
    plan: CompressionPlan,
    *,
    calibration_data: Any = None,
    sequential: bool | None = None,
) -> None:
    """Factorizes the layers of `model` **in place**, as `plan` says.

    The model and its layers stay the same objects, and so do the variables of everything that
    stays as it is. Built optimizers are built anew on the new variables: iterations, learning rate
    and the state of untouched variables carry on; see `ALDSCompress` for the rest. Compiled step
    functions are made anew. If anything fails, the model is left as it was.

    Use it to load the saved weights of a compressed *subclassed* model, which makes its original
    layers in code. Everywhere else `compress`, which returns a new model, is what you want.

    Args:
        model: A built Keras 3 or tf_keras model.
        plan: A plan made for this model, or for one of the same architecture.
        calibration_data: Examples or `CalibrationStats` as for `select`: the factors then keep
            the layers' outputs on them best. Defaults to None: the factors are nearest to the
            kernels, also for a plan that was chosen with data.
        sequential: As for `compress`.

    Raises:
        ValueError: If `plan` was made for another model, a kernel is not finite, or the
            calibration data do not fit the model or `sequential`.

    Example:
    ```python
    model = MyModel()
    model.build((None, 32, 32, 3))
    keras_alds.apply_plan(model, keras_alds.CompressionPlan.load("plan.json"))
    model.load_weights("compressed.weights.h5")
    ```
    """
    check_plan(plan)
    check_sequential(sequential, calibration_data, plan.method)
    check_folded(plan, calibration_data)
    inventory = Inventory.of(model)
    match(inventory, plan)
    calibration = None
    if calibration_data is not None:
        keep = sequential is not False
        calibration = Calibration.of(inventory, calibration_data, keep=keep, stacklevel=2)
    apply(inventory, plan, calibration, sequential, stacklevel=2)


# -- What the callback and `sweep` use too ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A plan, the model as it was inspected, and what was learnt of the calibration data."""

    plan: CompressionPlan
    inventory: Inventory
    calibration: Calibration | None


def choose(
    model: KerasModel,
    options: Options,
    calibration_data: Any = None,
    *,
    keep: bool = False,
    verbose: int = 1,
    stacklevel: int = 1,
) -> Chosen:
    """`select` with checked options; with `keep` the examples are kept, to be run again."""
    selection = selection_of(model, options, verbose=verbose, stacklevel=stacklevel + 1)
    inventory = selection.inventory
    wrappers.apply_masks(inventory.pruning)
    calibration = None
    if calibration_data is not None:
        for _ in kernels(inventory.candidates):
            pass  # complains of weights that are not finite before the model is run
        calibration = Calibration.of(
            inventory, calibration_data, keep=keep, verbose=verbose, stacklevel=stacklevel + 1
        )
        selection = selection.calibrated(calibration.collected(inventory, verbose=verbose))
    return Chosen(selection.plan(), inventory, calibration)


def selection_of(
    model: KerasModel, options: Options, *, verbose: int = 1, stacklevel: int = 1
) -> Selection:
    """Inspects a model and states what is to be solved; nothing is decomposed yet.

    Raises:
        ValueError: If the model cannot be compressed, or `cr` cannot be reached whatever its
            weights are.
    """
    inventory = candidates_of(
        Inventory.of(model, options.exclude), options, stacklevel=stacklevel + 1
    )
    resources = _resources(inventory, options, verbose)
    selection = Selection.of(inventory, resources, options)
    selection.warn_of_bounds(stacklevel=stacklevel + 1)
    return selection


def _resources(inventory: Inventory, options: Options, verbose: int) -> list[Resource]:
    """What the options limit."""
    if options.objective == "latency":
        from keras_alds.litert.latency import measured_latency

        return [
            measured_latency(
                inventory,
                options.latency,
                target=options.target or "litert",
                max_slices=options.max_slices,
                verbose=verbose,
            )
        ]
    known: dict[str, Resource] = {
        "params": Params(inventory, METHODS[options.method]),
        "macs": Macs(inventory, only=options.macs_cr is None),
    }
    return [known[name] for name in options.resources]


def checked_options(cr: Any, given: Mapping[str, Any], *, has_data: bool, caller: str) -> Options:
    """Checks options, alone and together; reads the latency table, if there is one.

    Raises:
        TypeError: If there is no option of such a name.
        ValueError: If they are not as `select` says.
    """
    options = Options.checked(cr, given, has_data=has_data, caller=caller)
    if options.objective != "latency":
        return options
    from keras_alds.litert.latency import check_table

    table = check_table(options.latency, options.target)
    return dataclasses.replace(options, latency=table)


def wants_data(plan: CompressionPlan) -> bool:
    """Whether a plan was chosen by a method that uses calibration data."""
    return plan.method in METHODS and METHODS[plan.method].needs_data
