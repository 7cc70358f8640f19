"""Factorizes the layers of a model in place: the same objects, names and graph, other weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds.core.calibration import SecondMoment, factorize_outputs
from keras_alds.core.methods import METHODS
from keras_alds.core.pca import factorize_pca
from keras_alds.core.spectra import factorize
from keras_alds.plan import CompressionPlan, LayerChoice
from keras_alds.rewrite import inspect, wrappers
from keras_alds.rewrite.kinds import Kind, attention_class, kernel_values, kind_of, projections
from keras_alds.rewrite.observe import CalibrationStats, calibration_stats
from keras_alds.rewrite.optimizer import carry_optimizers


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A layer, the factorized layer that it is to become, and the plan's choice for it.

    `bias` holds new values for the layer's bias, which stays the same variable; None keeps them.
    """

    layer: Any
    factorized: Any
    choice: LayerChoice
    kind: Kind
    bias: np.ndarray | None = None


def apply_plan(model: Any, plan: CompressionPlan, *, calibration_data: Any = None) -> None:
    """Factorizes the layers of `model` **in place**, as `plan` says.

    The model and its layers stay the same objects, and so do the variables of everything that is
    left alone. Built optimizers are built anew on the new variables: iterations, learning rate
    and the state of untouched variables carry on; see `ALDSCompress` for the rest. Compiled step
    functions are made anew. If anything fails, the model is left as it was.

    Use it to load the saved weights of a compressed *subclassed* model, which makes its original
    layers in code; everywhere else `compress`, which returns a new model, is what you want.

    Args:
        model: A built Keras 3 or tf_keras model.
        plan: A plan made for this model, or for one of the same architecture.
        calibration_data: Examples or `CalibrationStats` as for `select`: the factors then keep
            the layers' outputs on them best. Defaults to None: the factors are nearest to the
            kernels, also for a plan that was chosen with data.

    Raises:
        ValueError: If `plan` was made for another model, a kernel is not finite, or the
            calibration data do not fit the model.

    Example:
    ```python
    model = MyModel()
    model.build((None, 32, 32, 3))
    keras_alds.apply_plan(model, keras_alds.CompressionPlan.load("plan.json"))
    model.load_weights("compressed.weights.h5")
    ```
    """
    check_plan(plan)
    backend = _backend.backend_of(model)
    stats = None
    if calibration_data is not None:
        match(model, plan)
        stats = calibration_stats(model, calibration_data)
    wrappers.apply_masks(model)
    replacements = prepare(model, plan, stats)
    undo: list[Callable[[], None]] = []
    try:
        known = list(model.variables)
        kernels = [r.kind.variable(r.layer) for r in replacements]
        for r in replacements:  # one by one: a failure undoes those before it
            undo += [backend.transplant(r.layer, r.factorized, r.kind.kept)]
            if r.bias is not None:
                undo += [functools.partial(r.layer.bias.assign, backend.value(r.layer.bias))]
                r.layer.bias.assign(r.bias)
        undo += adopt_attentions(backend, model)
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


def adopt_attentions(backend: _backend.Backend, model: Any) -> list[Callable[[], None]]:
    """Makes attention layers with factorized projections such as save and load them.

    Returns:
        Functions that put everything back.
    """
    undo = []
    for _, layer in inspect.walk(model):
        found = {
            name: {"slices": dense.slices, "rank": dense.rank}
            for name, dense in projections(layer).items()
            if inspect.is_factorized(dense)
        }
        cls = attention_class(layer)
        if found and cls is not None:
            undo.append(backend.adopt(layer, cls, {"projections": found}))
    return undo


def prepare(
    model: Any, plan: CompressionPlan, stats: CalibrationStats | None = None
) -> list[Replacement]:
    """Makes the factorized layer of every layer that `plan` factorizes; changes nothing yet.

    Raises:
        ValueError: If `plan` was made for another model, or a kernel is not finite.
    """
    backend = _backend.backend_of(model)
    moments = {} if stats is None else stats.match(model)
    centred = plan.method in METHODS and METHODS[plan.method].centred
    with backend.creation_scope(model):
        return [
            replacement(spec.layer, choice, moments.get(id(spec.layer)), centred=centred)
            for spec, choice in match(model, plan)
            if choice.factorized
        ]


def check_plan(plan: Any) -> None:
    """Raises a ValueError unless `plan` is a `CompressionPlan`."""
    if not isinstance(plan, CompressionPlan):
        raise ValueError(
            "Expected `plan` to be a CompressionPlan (see `select` and `CompressionPlan.load`). "
            f"Received: plan={plan!r} of type {type(plan).__name__}"
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
        return spec is not None and (
            (spec.params, spec.kernel_shape) == (choice.params_before, choice.kernel_shape)
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
            f"{choice.kernel_shape}, where the model has "
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


def factorized_layer(layer: Any, choice: LayerChoice, moment: SecondMoment | None = None) -> Any:
    """A new factorized layer, built and holding the factors of `layer`, which is not changed.

    Settings carry over: regularizers apply to each factor. With the second moment of the layer's
    inputs the factors keep its outputs best, without it they are nearest to its kernel.
    """
    return replacement(layer, choice, moment).factorized


def replacement(
    layer: Any,
    choice: LayerChoice,
    moment: SecondMoment | None = None,
    *,
    centred: bool = False,
) -> Replacement:
    """As `factorized_layer`; `centred` asks for principal components, which need a bias."""
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
        "dtype": layer.dtype_policy if hasattr(layer, "dtype_policy") else layer._dtype_policy,
        **kind.arguments(layer),
    }
    if centred:
        arguments["use_bias"] = True
    if kind.max_slices != 1:
        arguments["slices"] = choice.slices
    factorized = backend.factorized_class(kind.name)(**arguments)
    with backend.name_scope(layer):
        factorized.build(kind.input_shape(layer))
    initializer = kind.setting(layer, "initializer")
    if not isinstance(initializer, keras.initializers.VarianceScaling):
        initializer = keras.initializers.get("glorot_uniform")
    factorized.encoder_initializer = factorized.decoder_initializer = initializer
    if layer.trainable:
        for factor in (factorized.encoder, factorized.decoder):
            backend.copy_trainable(kind.variable(layer), factor)
    kernel = kernel_values(layer)
    new_bias = None
    if centred and moment is not None:
        bias = backend.value(layer.bias) if layer.use_bias else None
        encoder, decoder, new_bias = factorize_pca(kernel, moment, choice.rank, bias)
    elif moment is None or choice.slices % moment.blocks.shape[0]:
        encoder, decoder = factorize(kernel, choice.slices, choice.rank)
    else:
        encoder, decoder = factorize_outputs(kernel, moment, choice.slices, choice.rank)
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
