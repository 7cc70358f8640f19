"""`expand`: replaces factorized layers by stock layers in a rebuilt graph."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds._backend import tensors as nest
from keras_alds._backend import wrappers
from keras_alds._backend.graphs import is_ragged, is_sparse, mask_of
from keras_alds._backend.layers import KerasModel, dtype_policy
from keras_alds.kinds.base import is_factorized, stock_kind
from keras_alds.models.inventory import contains_factorized, walk
from keras_alds.models.rebuild import GraphRebuilder, Piece, check_symbolic, first_tensor


def expand(model: KerasModel, *, fold_batch_norm: bool = False) -> KerasModel:
    """Returns a new model with stock layers in place of every factorized layer.

    The new model loads without `keras_alds`, and works with tools that know only stock layers, such
    as converters and TF-MOT's quantization. `model` is not changed, and the outputs are equal up
    to float rounding. Frozen layers stay frozen. If `model` is compiled, so is the new model, with
    a new optimizer of the same settings. A model without factorized layers is copied.

    A layer `name` with k slices of rank j becomes:

    - a convolution: `name_encoder`, a convolution with `groups=k` and k·j filters, without
      bias (for k = channels in 2D a `DepthwiseConv2D` with `depth_multiplier=j`, unless the
      strides differ or the encoder has a constraint), then `name`, a convolution with the bias
      and the activation: pointwise in fold scheme 0, and with the decoder's part of the window
      in schemes 1 to 3;
    - a transposed convolution: `name_encoder`, a pointwise convolution with `groups=k`, then
      `name`, a transposed convolution with the window, the bias and the activation;
    - a separable convolution: `name_depthwise`, `name_encoder` and `name`;
    - an embedding: `name_encoder`, an `Embedding` of length j, then `name`, a `Dense` without bias;
    - an LSTM, GRU or SimpleRNN layer: for an input kernel of one slice, `name_encoder`, a `Dense`
      without bias, then `name`, the stock layer with j inputs (to which its `dropout` then
      applies). Stock layers cannot hold other factors: recurrent kernels, kernels of several
      slices, and kernels inside `Bidirectional` and `RNN` become dense again, with a warning;
    - an einsum layer: `name_encoder` and `name`, both `EinsumDense`. They have no groups: for
      k > 1 the encoder is a block-diagonal matrix stored with its zeros, with a warning;
    - a dense layer: `name_encoder` and `name`, both `Dense`, for k = 1. Otherwise `name_rows`
      (Reshape), `name_encoder` (a 1×1 `Conv2D` with `groups=k`), `name_ranks` (Reshape) and `name`
      (`Dense`); inputs of four axes need no Reshape. If a Reshape is impossible (other than four
      axes, with a Keras mask or several unknown sizes besides the batch), `name_encoder` is a
      block-diagonal `Dense` stored with its zeros, with a warning.

    So the output of `get_layer(name)` is still that of the original layer. Inside
    `TimeDistributed`, every stock layer gets its own `TimeDistributed`, with matching names. Shared
    layers stay shared, and nested models are rebuilt at any depth.

    Expand a model for deployment, after training: Keras runs grouped convolutions through XLA, and
    on a CPU their gradient is 10 to 60 times slower than that of the factorized layer.

    Args:
        model: A built Functional or Sequential model of Keras 3 or tf_keras.
        fold_batch_norm: Boolean. Whether to fold every BatchNormalization into the kernel and bias
            of the convolution or dense layer before it, for inference. The layer before it must
            be stock or factorized, without activation, and used by nothing else. Both must be
            called once, and the normalization must act on the channels and not be the model's
            output. A warning lists the layers that are not folded, and why. Further training then
            runs without normalization. Defaults to `False`.

    Returns:
        A new Keras 3 or tf_keras model, like `model`, of the same class if that can be constructed
        from inputs and outputs.

    Raises:
        ValueError: If `model` is not built or is a subclassed model, or if a subclassed model or
            custom layer inside it contains factorized layers.

    Example:
    ```python
    small = keras_alds.compress(model, cr=0.5)
    stock = keras_alds.expand(small)
    stock.save("stock.keras")
    ```

    References:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal
        Layer-wise Decomposition", NeurIPS 2021, arXiv:2107.11442, section 2: a slice-wise truncated
        kernel is a grouped convolution followed by a pointwise one.
    """
    backend = check_symbolic(model, "expand")
    wrappers.check_stripped(model, "expand")
    rebuilder = _Expander(backend, model, fold_batch_norm)
    new = rebuilder.rebuild(model)
    backend.copy_compile_state(model, new, rebuilder.pairs(), stacklevel=2)
    return new


class _Expander(GraphRebuilder):
    """Replaces factorized layers by stock layers, and folds BatchNormalization if requested."""

    def __init__(self, backend: _backend.Backend, model: Any, fold_batch_norm: bool) -> None:
        super().__init__(backend, backend)
        self._folded: dict[Any, Any] = {}
        self._dropped: set[Any] = set()
        if fold_batch_norm:
            self._plan_folding(model)

    # -- The replacements of a layer ---------------------------------------------------------

    def pieces(self, call: _backend.GraphCall) -> list[Piece]:
        if call.layer in self._dropped:
            return []
        tensor = first_tensor(call)
        # No Reshape fits where a mask has to pass, or where the tensor is sparse or ragged.
        masked = mask_of(tensor) is not None or is_sparse(tensor) or is_ragged(tensor)
        return self._pieces(call.layer, getattr(tensor, "shape", ()), masked)

    def last_call(
        self, call: _backend.GraphCall, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return stock_kind(call.layer).last_call(value, args, kwargs)

    def _pieces(self, layer: Any, shape: Any, masked: bool) -> list[Piece]:
        if not isinstance(layer, self.layers.Layer) or self.source.is_symbolic(layer):
            return [self.copied_piece(layer)]
        kind = stock_kind(layer)
        if kind.is_written_out(layer):
            shape = tuple(None if size is None else int(size) for size in shape)
            return kind.pieces(self, layer, shape, masked)
        if isinstance(layer, self.layers.TimeDistributed) and (
            contains_factorized(layer.layer) or self.source.is_symbolic(layer.layer)
        ):
            inner = self._pieces(layer.layer, (shape[0], *tuple(shape)[2:]), masked)
            return [self._wrapped(layer, piece, piece is inner[-1]) for piece in inner]
        if contains_factorized(layer):
            raise ValueError(
                "Expected factorized layers only in Functional or Sequential models and in "
                f"TimeDistributed. Received: '{layer.name}' of type "
                f"{type(layer).__name__}, which calls them in Python code. Remedy: call its layers "
                "on a `keras.Input` and make it a functional model, or skip it with "
                f"`exclude=` when compressing."
            )
        return [self.copied_piece(layer)]

    def changed(self, layer: Any) -> tuple[dict[str, Any], list[np.ndarray], list[Any]]:
        changes, values, origins = super().changed(layer)
        if layer in self._folded:
            changes["use_bias"] = True
            kernels = len(values) - bool(layer.use_bias)
            values = self._fold(layer, values[:kernels])
            origins = [*origins[:kernels], self._bias(layer)]
        return changes, values, origins

    def _wrapped(self, wrapper: Any, piece: Any, last: bool) -> Any:
        def make() -> Any:
            config = {key: value for key, value in wrapper.get_config().items() if key != "layer"}
            if not last:
                inner = wrapper.layer.name
                suffix = piece.name[len(inner) :] if piece.name.startswith(inner) else "_encoder"
                config["name"] = self.unique(wrapper.name + suffix)
            return type(wrapper)(piece, **config)

        return self.once(wrapper, piece, make)

    # -- What kinds use: `kinds.base.Writer` -------------------------------------------------

    @property
    def layers(self) -> Any:
        return self.source.keras.layers

    def value(self, variable: Any) -> np.ndarray:
        return self.source.value(variable)

    def encoder_options(self, layer: Any, part: str = "encoder") -> dict[str, Any]:
        return {
            "name": self.unique(f"{layer.name}_{part}"),
            "use_bias": False,
            "kernel_initializer": self.copied(layer.encoder_initializer),
            "kernel_regularizer": layer.encoder_regularizer,
            "kernel_constraint": layer.encoder_constraint,
            "trainable": layer.trainable,
            "dtype": dtype_policy(layer),
        }

    def decoder_options(self, layer: Any) -> dict[str, Any]:
        return {
            "name": layer.name,
            "use_bias": layer.use_bias or layer in self._folded,
            "activation": layer.activation,
            "kernel_initializer": self.copied(layer.decoder_initializer),
            "bias_initializer": self.copied(layer.bias_initializer),
            "kernel_regularizer": layer.decoder_regularizer,
            "bias_regularizer": layer.bias_regularizer,
            "kernel_constraint": layer.decoder_constraint,
            "bias_constraint": layer.bias_constraint,
            "activity_regularizer": layer.activity_regularizer,
            "trainable": layer.trainable,
            "dtype": dtype_policy(layer),
        }

    def copied(self, initializer: Any) -> Any:
        # tf_keras warns if one initializer object is used twice; a function can be.
        is_object = isinstance(initializer, self.source.keras.initializers.Initializer)
        return self.copy_of(initializer) if is_object else initializer

    def pair(
        self, layer: Any, encoder: Any, decoder: Any, kernel: np.ndarray | None = None
    ) -> list[Piece]:
        values = [self.value(layer.decoder) if kernel is None else kernel]
        if layer in self._folded:
            values = self._fold(layer, values)
        elif layer.use_bias:
            values.append(self.value(layer.bias))
        origins = [layer.decoder, self._bias(layer)]
        self.record(layer, decoder, values, origins[: len(values)])
        return [encoder, decoder]

    def _bias(self, layer: Any) -> Any:
        """The old weight that the new layer's bias replaces, or None."""
        norm = self._folded.get(layer)
        return getattr(layer, "bias", None) if layer.use_bias or norm is None else norm.beta

    # -- BatchNormalization ------------------------------------------------------------------

    def _plan_folding(self, model: Any) -> None:
        """Finds the pairs to fold, and warns of BatchNormalization layers that are not folded."""
        graphs = [model, *(m for _, m in walk(model) if self.source.is_symbolic(m))]
        calls = [(graph, call) for graph in graphs for call in self.source.graph(graph)]
        count: dict[Any, int] = {}
        for _, call in calls:
            count[call.layer] = count.get(call.layer, 0) + 1
        stay = {}
        seen = set()
        for graph in graphs:
            inner = [call for owner, call in calls if owner is graph]
            for call in inner:
                if not isinstance(call.layer, self.source.keras.layers.BatchNormalization):
                    continue
                seen.add(call.layer)
                before, reason = self._foldable(graph, call, inner, count)
                if reason is None and graph is model:
                    outputs = nest.flatten(self.source.graph_ends(model)[1])
                    if any(output is call.outputs[0] for output in outputs):
                        reason = "the model returns its output"
                if reason is None:
                    self._folded[before] = call.layer
                    self._dropped.add(call.layer)
                else:
                    stay[call.layer.name] = reason
        for path, layer in walk(model):
            if isinstance(layer, self.source.keras.layers.BatchNormalization) and layer not in seen:
                stay[path] = "it is inside a wrapper or custom layer"
        if stay:
            listed = "; ".join(f"'{name}': {reason}" for name, reason in stay.items())
            self.warn(
                f"{len(stay)} of {len(stay) + len(self._dropped)} BatchNormalization layers are "
                f"not folded: {listed}."
            )

    def _foldable(
        self, graph: Any, call: Any, calls: list[Any], count: dict[Any, int]
    ) -> tuple[Any, str | None]:
        """The layer that a BatchNormalization can be folded into, or why it cannot."""
        tensor = first_tensor(call)
        (before,) = (c for c in calls if any(output is tensor for output in c.outputs))
        layer = before.layer
        if not isinstance(layer, self.layers.Layer) or not _takes_scales(layer):
            return None, f"'{layer.name}' before it is not a stock convolution or dense layer"
        if self.source.keras.activations.serialize(layer.activation) != "linear":
            return None, f"'{layer.name}' before it has an activation"
        if layer.activity_regularizer is not None:
            return None, f"'{layer.name}' before it has an activity regularizer"
        if count[layer] > 1 or count[call.layer] > 1:
            return None, f"it or '{layer.name}' before it is called several times"
        uses = sum(
            leaf is tensor
            for c in calls
            for leaf in nest.flatten((c.args, list(c.kwargs.values())))
        )
        ends = nest.flatten(self.source.graph_ends(graph)[1])
        if uses + sum(end is tensor for end in ends) > 1:
            return None, f"the output of '{layer.name}' before it is used elsewhere too"
        axes = len(tensor.shape)
        axis = call.layer.axis
        (axis,) = axis if isinstance(axis, (list, tuple)) else (axis,)
        first = getattr(layer, "data_format", None) == "channels_first"
        if axis % axes != (1 if first else axes - 1):
            return None, f"it normalizes axis {axis}, which does not hold the channels"
        if call.kwargs.get("training"):
            return None, "it is called with `training=True`"
        if dtype_policy(layer).compute_dtype != dtype_policy(call.layer).compute_dtype:
            return None, f"'{layer.name}' before it computes in another dtype"
        return layer, None

    def _fold(self, layer: Any, kernels: list[np.ndarray]) -> list[np.ndarray]:
        """The weights of `layer` with its normalization folded in, from those without bias."""
        norm = self._folded[layer]

        def value(variable: Any, default: float) -> np.ndarray:
            given = default if variable is None else self.source.value(variable)
            return np.asarray(given, np.float64)

        scale = value(norm.gamma, 1.0) / np.sqrt(value(norm.moving_variance, 1.0) + norm.epsilon)
        old_bias = value(layer.bias if layer.use_bias else None, 0.0)
        bias = value(norm.beta, 0.0) + (old_bias - value(norm.moving_mean, 0.0)) * scale
        kernel = kernels[-1].astype(np.float64)
        along = [1] * kernel.ndim
        for axis in stock_kind(layer).output_axes or ():
            along[axis] = kernel.shape[axis]
        kernel *= scale.reshape(along)
        dtype = kernels[-1].dtype
        return [*kernels[:-1], kernel.astype(dtype), bias.astype(dtype)]


def _takes_scales(layer: Any) -> bool:
    """Whether scaling the kernel scales the outputs: in stock and factorized layers."""
    kind = stock_kind(layer)
    return kind.output_axes is not None and (is_factorized(layer) or kind.is_stock(layer))
