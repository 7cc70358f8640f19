"""Factorizes the layers of a model in place: the same objects, names and graph, other weights."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.progress import Progress

from keras_alds import _backend
from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.calibration.refit import factorize_outputs
from keras_alds.core.methods import FactorizeWithBias
from keras_alds.core.spectra import factorize
from keras_alds.methods import METHODS
from keras_alds.plan import CompressionPlan, LayerChoice
from keras_alds.models import inspect, wrappers
from keras_alds.models.functions import forget_graphs
from keras_alds.models.observe import Calibration, CalibrationStats, KeptExamples
from keras_alds.models.optimizer import carry_optimizers
from keras_alds.models.sequential import Walk, most_reruns


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A layer, the factorized layer that it is to become, and the plan's choice for it.

    `bias` holds new values for the layer's bias, which stays the same variable; None keeps them.
    """

    layer: Any
    factorized: Any
    choice: LayerChoice
    kind: KernelKind
    bias: np.ndarray | None = None


#: Code in which more layers are factorized is run anew for each of them only if asked for.
MOST_RERUNS = 8


def apply_plan(
    model: Any,
    plan: CompressionPlan,
    *,
    calibration_data: Any = None,
    sequential: bool | None = None,
) -> None:
    """Factorizes the layers of `model` **in place**, as `plan` says.

    The model and its layers stay the same objects, and so do the variables of everything that is
    left alone. Built optimizers are built anew on the new variables: iterations, learning rate
    and the state of untouched variables carry on; see `ALDSCompress` for the rest. Compiled step
    functions are made anew. If anything fails, the model is left as it was.

    Use it to load the saved weights of a compressed model that makes its original layers in code:
    a *subclassed* one, or one that holds layers of your own (a warning names them). Everywhere
    else `compress`, which returns a new model, is what you want.

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
    apply_calibrated(model, plan, calibration_data, sequential)


def apply_calibrated(
    model: Any,
    plan: CompressionPlan,
    data: Any = None,
    sequential: bool | None = None,
    *,
    last: bool = False,
    verbose: int = 1,
) -> None:
    """`apply_plan` with arguments that are checked; `data` may be a `Calibration`.

    With `last` nobody asks for its statistics any more: they are dropped where examples serve.
    """
    check_folded(plan, data)
    backend = _backend.backend_of(model)
    calibration = None
    if data is not None:
        match(model, plan)
        calibration = Calibration.of(model, data, keep=sequential is not False, verbose=verbose)
    wrappers.apply_masks(model)
    if calibration is None:
        replacements = prepare(model, plan)
    elif calibration.examples is not None and _is_sequential(model, plan, sequential):
        if last:
            calibration.stats = None
        replacements = _prepare_sequentially(model, plan, calibration.examples, verbose)
    else:
        replacements = prepare(model, plan, calibration.collected(model, verbose=verbose))
    _warn_of_code(model, {id(r.layer) for r in replacements})
    undo: list[Callable[[], None]] = []
    try:
        known = list(model.variables)
        kernels = [r.kind.variable(r.layer) for r in replacements]
        for r in replacements:  # one by one: a failure undoes those before it
            undo += [backend.transplant(r.layer, r.factorized, r.kind.kept)]
            if r.bias is not None:
                undo += [functools.partial(r.layer.bias.assign, backend.value(r.layer.bias))]
                r.layer.bias.assign(r.bias)
        adopt(backend, model, undo)
        undo += [forget_graphs(model)]
        factorized = {
            id(kernel): replacement.layer
            for kernel, replacement in zip(kernels, replacements, strict=True)
        }
        layers = {id(replacement.layer) for replacement in replacements}
        with backend.creation_scope(model):
            for wrapper in wrappers.pruning(model):
                if id(wrapper.layer) in layers:
                    undo += [wrappers.renew_masks(backend, wrapper)]
            carry_optimizers(backend, model, known, factorized, undo)
        backend.reset_functions(model)
    except BaseException:
        for step in reversed(undo):
            step()
        backend.reset_functions(model)
        raise


def _warn_of_code(model: Any, layers: set[int]) -> None:
    """Warns if layers that are to be factorized will be made again by code when `model` is loaded.

    Args:
        model: The model.
        layers: The ids of these layers.
    """
    specs = [spec for spec in inspect.inspect_model(model)[0] if id(spec.layer) in layers]
    found = inspect.made_by_code(model, specs)
    if found:
        names = ", ".join(f"'{item.name}' ({type(item).__name__})" for item in found[:3])
        warnings.warn(
            f"The layers inside {names}{', …' if len(found) > 3 else ''} are made in code, which "
            "makes the original ones when a saved model is loaded: the weights of the factors do "
            "not fit these. Save the plan beside the model (`plan.save(path)`, with the plan of "
            "`select` or the callback's `plan`). To load, make the model by its code, build it, "
            "`apply_plan(model, plan)`, and then `load_weights`.",
            stacklevel=4,
        )


def adopt_attentions(backend: _backend.Backend, model: Any) -> list[Callable[[], None]]:
    """Makes attention layers with factorized projections such as save and load them.

    Args:
        backend: The model's backend.
        model: The model.
        undo: Functions that put everything back are added here.
    """
    for _, layer in reversed(list(inspect.walk(model))):  # cells before the layers that run them
        step = stock_kind(layer).adopt(backend, layer)
        if step is not None:
            undo.append(step)


def prepare(
    model: Any, plan: CompressionPlan, stats: CalibrationStats | None = None
) -> list[Replacement]:
    """Makes the factorized layer of every layer that `plan` factorizes; changes nothing yet.

    Raises:
        ValueError: If `plan` was made for another model, or a kernel is not finite.
    """
    backend = _backend.backend_of(model)
    moments = {} if stats is None else stats.match(model)
    make = factorize_with_bias(plan.method)
    with backend.creation_scope(model):
        return [
            replacement(spec.layer, choice, moments.get(id(spec.layer)), make=make)
            for spec, choice in match(model, plan)
            if choice.factorized
        ]


def check_sequential(sequential: Any, data: Any, method: str | None = None) -> None:
    """Raises a ValueError unless `sequential` is None or a boolean that fits data and method."""
    if sequential not in (None, True, False) or isinstance(sequential, int) != isinstance(
        sequential, bool
    ):
        raise ValueError(
            f"Expected `sequential` to be True, False or None. Received: sequential={sequential!r}"
        )
    if sequential and (data is None or isinstance(data, CalibrationStats)):
        raise ValueError(
            "Expected examples as `calibration_data` with sequential=True: the layers are run on "
            "them again, and statistics hold none. "
            f"Received: calibration_data={data!r}"
        )
    if sequential and factorize_with_bias(method):
        raise ValueError(
            f"Expected no sequential=True with the method {method!r}: its factors are those of "
            "the original outputs. Received: sequential=True"
        )


def factorize_with_bias(method: str | None) -> FactorizeWithBias | None:
    """What makes the factors and biases of a plan's method; None if it keeps the biases."""
    known = METHODS.get(method or "")
    return None if known is None else known.factorize_with_bias


def _is_sequential(model: Any, plan: CompressionPlan, sequential: bool | None) -> bool:
    """Whether to compress layer after layer; warns where it would take too long."""
    if factorize_with_bias(plan.method):
        return False
    if sequential is not None:
        return sequential
    layers = [spec.layer for spec, choice in match(model, plan) if choice.factorized]
    reruns = most_reruns(model, layers)
    if reruns > MOST_RERUNS:
        warnings.warn(
            f"{reruns} layers of the model '{model.name}' that are to be factorized are called in "
            "Python code, which would be run anew for each of them. Their factors are made from "
            "the original network's inputs instead. Pass sequential=True to have it run all the "
            "same (better factors), or sequential=False, which is what is done now.",
            stacklevel=4,
        )
    return reruns <= MOST_RERUNS


def _prepare_sequentially(
    model: Any, plan: CompressionPlan, examples: KeptExamples, verbose: int
) -> list[Replacement]:
    """`prepare` with every layer's factors made for what the factors before it give."""
    backend = _backend.backend_of(model)
    pairs = [(spec.layer, choice) for spec, choice in match(model, plan) if choice.factorized]
    choices = {id(layer): choice for layer, choice in pairs}
    made: dict[int, Replacement] = {}

    def decide(layer: Any, moment: SecondMoment, target: np.ndarray) -> Any:
        made[id(layer)] = replacement(layer, choices[id(layer)], moment, target)
        return made[id(layer)].factorized

    with (
        backend.creation_scope(model),
        Progress(transient=True, disable=not verbose) as progress,
    ):
        for layer, choice in pairs:
            if not observable(layer):
                made[id(layer)] = replacement(layer, choice)
        given = [(item.layer, item.factorized) for item in made.values()]
        task = progress.add_task("compression", total=len(pairs) - len(given))
        layers = [layer for layer, _ in pairs if id(layer) not in made]
        Walk(model, layers, examples, given=given).run(decide, lambda: progress.advance(task))
        for layer, choice in pairs:  # those that no example reaches
            if id(layer) not in made:
                made[id(layer)] = replacement(layer, choice)
    return [made[id(layer)] for layer, _ in pairs]


def check_plan(plan: Any) -> None:
    """Raises a ValueError unless `plan` is a `CompressionPlan`."""
    if not isinstance(plan, CompressionPlan):
        raise ValueError(
            "Expected `plan` to be a CompressionPlan (see `select` and `CompressionPlan.load`). "
            f"Received: plan={plan!r} of type {type(plan).__name__}"
        )


def check_folded(plan: CompressionPlan, data: Any) -> None:
    """Raises a ValueError if `plan` has fold schemes that factors are not made for on data."""
    if data is not None and plan.folded:
        raise ValueError(
            "Expected no `calibration_data` with a plan of other fold schemes than 0: factors are "
            f"made on data in scheme 0 only. Received: layer '{plan.folded[0].layer}' in scheme "
            f"{plan.folded[0].scheme}. Leave the data out, or make a plan with schemes=0."
        )


def match(model: Any, plan: CompressionPlan) -> list[tuple[inspect.LayerSpec, LayerChoice]]:
    """Pairs the layers of `model` with the choices of `plan`.

    Layers are found by name. Names that Keras numbers by itself differ between two models made
    by the same code; if the names do not fit, order and shapes decide.

    Raises:
        ValueError: If neither fits.
    """
    specs, _ = inspect.inspect_model(model)
    by_path = {spec.path: spec for spec in specs}

    def fits(spec: inspect.LayerSpec | None, choice: LayerChoice) -> bool:
        return (
            spec is not None
            and (spec.params, spec.kernel_shape) == (choice.params_before, choice.kernel_shape)
            and (not choice.scheme or choice.scheme in inspect.schemes(spec.layer))
        )

    if len(specs) == len(plan.choices):
        for pairs in (
            [(by_path.get(choice.layer), choice) for choice in plan.choices],
            list(zip(specs, plan.choices, strict=True)),
        ):
            if all(fits(*pair) for pair in pairs):
                return [(spec, choice) for spec, choice in pairs if spec is not None]
    if any(inspect.is_factorized(spec.layer) for spec in specs):
        raise ValueError(already_compressed(specs))
    wrong = next(
        (
            f"layer '{choice.layer}' with {choice.params_before} parameters and kernel "
            f"{choice.kernel_shape}{f' in fold scheme {choice.scheme}' if choice.scheme else ''}, "
            "where the model has "
            + (f"{spec.params} and {spec.kernel_shape} in '{spec.path}'" if spec else "none")
            for spec, choice in zip(
                [*specs, *[None] * len(plan.choices)], plan.choices, strict=False
            )
            if not fits(spec, choice)
        ),
        f"{len(plan.choices)} layers, where the model has {len(specs)}",
    )
    raise ValueError(
        f"Expected a plan made for the model '{model.name}', or for one of the same architecture. "
        f"Received: a plan for {wrong}. Make a plan for this model with `select`."
    )


def already_compressed(specs: list[inspect.LayerSpec]) -> str:
    """The error text for a model that holds factorized layers."""
    names = [spec.path for spec in specs if inspect.is_factorized(spec.layer)]
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return (
        "Expected a model that is not compressed yet. Received: a model with "
        f"{len(names)} factorized layers ({shown}). Compress the original model with a larger "
        "`cr` instead; or, if these layers are part of its design, leave them alone with "
        "`exclude=[type(layer), …]`."
    )


def factorized_layer(
    layer: Any,
    choice: LayerChoice,
    moment: SecondMoment | None = None,
    target: np.ndarray | None = None,
) -> Any:
    """A new factorized layer, built and holding the factors of `layer`, which is not changed.

    Settings carry over: regularizers apply to each factor. With the second moment of the layer's
    inputs the factors keep the outputs of its kernel, or of `target` in its place, best; without
    it they are nearest to its kernel.
    """
    return replacement(layer, choice, moment, target).factorized


def replacement(
    layer: Any,
    choice: LayerChoice,
    moment: SecondMoment | None = None,
    target: np.ndarray | None = None,
    *,
    make: FactorizeWithBias | None = None,
) -> Replacement:
    """As `factorized_layer`; `make` makes the factors and a bias, which every layer then has."""
    kind = kind_of(layer)
    if choice.slices is None or choice.rank is None or kind is None:
        raise ValueError(
            "Expected a layer that can be factorized, and a choice that does. "
            f"Received: layer={layer!r}, choice={choice!r}"
        )
    backend = _backend.backend_of(layer)
    keras = backend.keras
    regularizer = kind.setting(layer, "regularizer")
    arguments: dict[str, Any] = {
        "rank": choice.rank,
        # The values are assigned below; an initializer of the kernel may know its shape.
        "encoder_initializer": "zeros",
        "decoder_initializer": "zeros",
        "encoder_regularizer": regularizer,
        "decoder_regularizer": regularizer,
        "activity_regularizer": layer.activity_regularizer,
        "name": layer.name,
        "trainable": layer.trainable,
        "dtype": dtype_policy(layer),
        **kind.arguments(layer),
    }
    if make is not None:
        arguments["use_bias"] = True
    if kind.max_slices != 1:
        arguments["slices"] = choice.slices
    if choice.scheme:
        arguments["scheme"] = choice.scheme
    factorized = kind.layer_class(backend)(**arguments)
    with backend.name_scope(layer):
        factorized.build(kind.input_shape(layer))
    initializer = kind.setting(layer, "initializer")
    if not isinstance(initializer, keras.initializers.VarianceScaling):
        initializer = keras.initializers.get("glorot_uniform")
    factorized.encoder_initializer = factorized.decoder_initializer = initializer
    if layer.trainable:
        for factor in (factorized.encoder, factorized.decoder):
            backend.copy_trainable(kind.variable(layer), factor)
    read = functools.partial(kernel_values, layer, choice.scheme or 0)
    new_bias = None
    if make is not None and moment is not None:
        bias = backend.value(layer.bias) if layer.use_bias else None
        encoder, decoder, new_bias = make(read(), moment, choice.rank, bias)
    elif moment is None or choice.slices % moment.block_count:
        encoder, decoder = factorize(read(), choice.slices, choice.rank)
    else:
        target = read() if target is None else target
        encoder, decoder = factorize_outputs(target, moment, choice.slices, choice.rank)
    decoder = factorized.unfolding.write_decoder(decoder, kind.shape(layer))
    factorized.encoder.assign(np.reshape(encoder, tuple(factorized.encoder.shape)))
    factorized.decoder.assign(np.reshape(decoder, tuple(factorized.decoder.shape)))
    for theirs, ours in kind.kept.items():
        if getattr(layer, theirs) is not None:
            getattr(factorized, ours).assign(backend.value(getattr(layer, theirs)))
    if new_bias is None:
        return Replacement(layer, factorized, choice, kind)
    factorized.bias.assign(new_bias)
    return Replacement(layer, factorized, choice, kind, new_bias if layer.use_bias else None)
