"""Makes the factorized layer for one choice, with the factors of the kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds._backend.layers import dtype_policy
from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.calibration.refit import SWEEPS, factorize_outputs
from keras_alds.core.chains import CHAINS, is_chain
from keras_alds.core.choices import Choice
from keras_alds.core.methods import FactorizeWithBias
from keras_alds.core.slicing import Array
from keras_alds.core.spectra import factorize
from keras_alds.kinds.base import KernelKind, kernel_values
from keras_alds.models.inventory import LayerRecord
from keras_alds.plan import LayerChoice


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A layer, and the factorized layer that replaces it.

    Attributes:
        layer: The layer.
        factorized: A built layer with its factors. Nothing else refers to it.
        kind: The layer's kind.
        bias: New values for the layer's bias variable, or None to keep the old ones.
    """

    layer: Any
    factorized: Any
    kind: KernelKind
    bias: np.ndarray | None = None


def replacement(
    record: LayerRecord,
    choice: LayerChoice,
    *,
    moment: SecondMoment | None = None,
    target: np.ndarray | None = None,
    make: FactorizeWithBias | None = None,
) -> Replacement:
    """Makes the factorized layer for a choice, without changing the layer.

    The layer's settings are kept; regularizers apply to each factor. With the second moment of the
    inputs, the factors minimise the output error with respect to `target`, or else to the kernel.
    Without it, they approximate the kernel.

    Args:
        record: The layer.
        choice: Slices, rank and fold scheme.
        moment: The second moment of the layer's unfolded inputs.
        target: Another kernel whose outputs the factors approximate.
        make: A function that makes the factors and a bias instead, so that every layer gets a bias.
    """
    layer, kind = record.layer, record.kind
    backend = _backend.backend_of(layer)
    factorized = _built(record, choice, with_bias=make is not None)
    parts, bias = _values(record, choice, moment, target, make)
    if not is_chain(choice.scheme):
        encoder, decoder = parts
        parts = encoder, factorized.unfolding.write_decoder(decoder, kind.shape(layer))
    for variable, part in zip(factorized.factors, parts, strict=True):
        variable.assign(np.reshape(part, tuple(variable.shape)))
    for theirs, ours in kind.kept.items():
        if getattr(layer, theirs) is not None:
            getattr(factorized, ours).assign(backend.value(getattr(layer, theirs)))
    if bias is not None:
        factorized.bias.assign(bias)
    return Replacement(
        layer, factorized, kind, bias if bias is not None and layer.use_bias else None
    )


def rebuilt(
    backend: _backend.Backend,
    record: LayerRecord,
    choice: LayerChoice,
    made: Replacement | None,
    *,
    with_bias: bool,
) -> Replacement:
    """A replacement like another one, with variables for all replicas of the model.

    Args:
        backend: The layer's backend.
        record: The layer.
        choice: Slices, rank and fold scheme.
        made: The other one. With None, the factors are 0.
        with_bias: Whether the method gives every layer a bias.
    """
    factorized = _built(record, choice, with_bias=with_bias)
    if made is not None:
        for variable, other in zip(factorized.weights, made.factorized.weights, strict=True):
            variable.assign(backend.value(other))
    bias = None if made is None else made.bias
    return Replacement(record.layer, factorized, record.kind, bias)


def _values(
    record: LayerRecord,
    choice: LayerChoice,
    moment: SecondMoment | None,
    target: np.ndarray | None,
    make: FactorizeWithBias | None,
) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
    """The factors of a choice, as of a kernel in its fold scheme, and a new bias or None."""
    layer, kind = record.layer, record.kind
    scheme = choice.scheme or 0
    kernel = kernel_values(layer, scheme)
    if make is not None and moment is not None:
        old = _backend.backend_of(layer).value(layer.bias) if layer.use_bias else None
        encoder, decoder, bias = make(kernel, moment, choice.rank or 1, old)
        return (encoder, decoder), bias
    if target is not None:
        whole = kind.folded(layer, 0).write(target, kind.shape(layer))
        kernel = kind.folded(layer, scheme).read(whole)
    return factors(record, choice, kernel, moment), None


def factors(
    record: LayerRecord,
    choice: Choice | LayerChoice,
    kernel: Array,
    moment: SecondMoment | None,
    *,
    sweeps: int = SWEEPS,
) -> tuple[Array, ...]:
    """The factors of a kernel, which is read in the choice's scheme; the moment is not folded."""
    slices, rank, scheme = choice.slices or 1, choice.rank or 1, choice.scheme or 0
    if is_chain(scheme):
        return CHAINS[scheme].factors(kernel, moment, choice.input_rank or 1, rank)
    if moment is None or slices % moment.block_count:
        return factorize(kernel, slices, rank)
    return factorize_outputs(kernel, record.fold(moment, scheme), slices, rank, sweeps=sweeps)


def _built(record: LayerRecord, choice: LayerChoice, *, with_bias: bool) -> Any:
    """A new built factorized layer with the layer's settings and zero weights."""
    layer = record.layer
    slices, rank, scheme = choice.slices or 1, choice.rank or 1, choice.scheme or 0
    kind = record.kind.chains.get(scheme, record.kind)
    backend = _backend.backend_of(layer)
    regularizer = kind.setting(layer, "regularizer")
    arguments: dict[str, Any] = {
        "rank": rank,
        # The values are assigned later; the kernel's initializer may depend on its shape.
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
    if with_bias:
        arguments["use_bias"] = True
    if kind.max_slices != 1:
        arguments["slices"] = slices
    if choice.input_rank is not None:
        arguments["input_rank"] = choice.input_rank
    if scheme and not is_chain(scheme):
        arguments["scheme"] = scheme
    factorized = kind.layer_class(backend)(**arguments)
    with backend.name_scope(layer):
        factorized.build(kind.input_shape(layer))
    initializers = backend.keras.initializers
    initializer = kind.setting(layer, "initializer")
    if not isinstance(initializer, initializers.VarianceScaling):
        initializer = initializers.get("glorot_uniform")
    factorized.encoder_initializer = factorized.decoder_initializer = initializer
    if layer.trainable:
        for factor in factorized.factors:
            backend.copy_trainable(kind.variable(layer), factor)
    return factorized
