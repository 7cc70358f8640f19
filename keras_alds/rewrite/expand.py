"""Writes factorized layers out as stock layers, by building the graph of a model anew."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

from keras_alds import _backend
from keras_alds.kinds.base import factorized_kind
from keras_alds.rewrite import inspect, recurrent, wrappers
from keras_alds.rewrite.rebuild import (
    GraphRebuilder,
    Piece,
    check_symbolic,
    first_tensor,
    policy,
)

# Where a stock layer's kernel has its output channels; the last weight before the bias has them.
_OUTPUT_AXIS = {
    "Dense": -1,
    **{f"Conv{n}D": -1 for n in (1, 2, 3)},
    **{f"Conv{n}DTranspose": -2 for n in (1, 2, 3)},
    **{f"SeparableConv{n}D": -1 for n in (1, 2)},
    **{f"DepthwiseConv{n}D": None for n in (1, 2)},  # the last two axes: channels, multiplier
}


def expand(model: Any, *, fold_batch_norm: bool = False) -> Any:
    """Returns a new model in which every factorized layer is written out as stock layers.

    The new model needs nothing of this package: it loads where `keras_alds` is not installed, and
    tools that know stock layers only (TF-MOT's quantization, converters) take it. `model` is
    untouched; outputs are equal to float rounding. Frozen layers stay frozen, a compiled model
    comes back compiled with a new optimizer of the same settings. A model without factorized
    layers comes back as an equal copy.

    A layer `name` with k slices of rank j becomes:

    - a convolution: `name_encoder`, a stock convolution with `groups=k` and k·j filters, without
      bias (k = 1: an ordinary one; k = channels in 2D: `DepthwiseConv2D` with
      `depth_multiplier=j`, unless the strides differ or the encoder has a constraint), then
      `name`, with the bias and the activation: a pointwise one, or in fold schemes 1 to 3 one
      with those axes of the window that the encoder leaves to it;
    - a transposed convolution: `name_encoder`, a pointwise one with `groups=k`, then `name`,
      a transposed one with the window, the bias and the activation;
    - a separable convolution: `name_depthwise`, `name_encoder` and `name`;
    - an embedding: `name_encoder`, an `Embedding` of length j, then `name`, a `Dense` without bias;
    - an LSTM, GRU or SimpleRNN layer: for an input kernel of one slice `name_encoder`, a `Dense`
      without bias, before `name`, the stock layer on j inputs (whose `dropout`, if it is trained
      on, then falls on those). No stock layer has a place for the other factors: recurrent kernels,
      kernels of several slices and those inside `Bidirectional` and `RNN` are multiplied out,
      and a warning says so;
    - an einsum layer: `name_encoder` and `name`, both `EinsumDense`. Einsum layers have no groups:
      for k > 1 the zeros of the encoder are written out, and a warning says so;
    - a dense layer: `name_encoder` and `name`, both `Dense`, for k = 1. Else `name_rows` (Reshape),
      `name_encoder` (a 1×1 `Conv2D` with `groups=k`), `name_ranks` (Reshape) and `name`
      (`Dense`); inputs of four axes need no Reshape. Where a Reshape cannot go (a Keras mask passes
      through, or several sizes besides the batch are unknown, on other than four axes),
      `name_encoder` is one `Dense` with its zeros written out, and a warning says so.

    So `get_layer(name)` still gives the layer whose output is that of the original. Inside
    `TimeDistributed` every stock layer gets a `TimeDistributed` of its own, named likewise. Shared
    layers stay shared; nested models are rebuilt at any depth.

    It is meant for deployment. Keras runs stock grouped convolutions through XLA, and their
    gradient is 10 to 60 times slower on a CPU than that of the factorized layer: train first,
    expand afterwards.

    Args:
        model: A built Functional or Sequential model of Keras 3 or tf_keras.
        fold_batch_norm: Boolean. Whether to multiply every BatchNormalization into the kernel and
            bias of the convolution or dense layer before it, for inference. It is folded if it
            directly follows a stock or factorized one without activation, whose output nothing
            else uses, both are called once, it works on the channels, and it is not what the
            model returns; a warning names those that stay, and why. Training such a model on is
            training without normalization. Defaults to `False`.

    Returns:
        A new model of the same Keras and, where its class is made from inputs and outputs, of the
        same class.

    Raises:
        ValueError: If `model` is not a built model, is a subclassed one, or holds a layer of
            another kind (a subclassed model, a custom layer) with factorized layers inside.

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
    backend.copy_compile_state(model, new)
    return new


class _Expander(GraphRebuilder):
    """Stock layers in place of factorized ones, and BatchNormalization folded if asked for."""

    def __init__(self, backend: _backend.Backend, model: Any, fold_batch_norm: bool) -> None:
        super().__init__(backend, backend)
        self._layers: dict[int, Any] = {}
        self._pairs: dict[int, tuple[Any, Any]] = {}
        self._written: dict[int, list[Piece]] = {}
        self._reshapes: dict[tuple, Any] = {}
        self._wrappers: dict[tuple[int, int], Any] = {}
        self._folded: dict[int, Any] = {}
        self._dropped: set[int] = set()
        if fold_batch_norm:
            self._plan_folding(model)

    # -- What takes a layer's place ----------------------------------------------------------

    def pieces(self, call: _backend.GraphCall) -> list[Piece]:
        if id(call.layer) in self._dropped:
            return []
        tensor = first_tensor(call)
        masked = getattr(tensor, "_keras_mask", None) is not None
        return self._pieces(call.layer, getattr(tensor, "shape", ()), masked)

    def _pieces(self, layer: Any, shape: Any, masked: bool) -> list[Piece]:
        if not isinstance(layer, self.source.keras.layers.Layer):
            return [self._operation(layer)]
        if self.source.is_symbolic(layer):
            return [self.model(layer)]
        if inspect.is_factorized(layer):
            shape = tuple(None if size is None else int(size) for size in shape)
            kind = factorized_kind(layer).name
            if kind == "Dense":
                return self._dense_layers(layer, shape, masked)
            if id(layer) not in self._written:
                self._written[id(layer)] = self._write(kind, layer, len(shape))
            return self._written[id(layer)]
        wrapper = self.source.keras.layers.TimeDistributed
        if isinstance(layer, wrapper) and (
            inspect.contains_factorized(layer.layer) or self.source.is_symbolic(layer.layer)
        ):
            inner = self._pieces(layer.layer, (shape[0], *tuple(shape)[2:]), masked)
            return [self._wrapped(layer, piece, piece is inner[-1]) for piece in inner]
        if recurrent.holds_factorized(layer):
            if id(layer) not in self._written:
                self._written[id(layer)] = self._recurrent_layers(layer)
            return self._written[id(layer)]
        if inspect.contains_factorized(layer):
            raise ValueError(
                "Expected factorized layers in Functional or Sequential models and in "
                f"TimeDistributed only, to write them out. Received: '{layer.name}' of type "
                f"{type(layer).__name__}, which calls them in Python code. Remedy: call its layers "
                "on a `keras.Input` and make it a functional model, or leave it alone with "
                f"`exclude=` when compressing."
            )
        if id(layer) not in self._layers:
            config = layer.get_config()
            values = layer.get_weights()
            if id(layer) in self._folded:
                config["use_bias"] = True
                values = self._fold(layer, values[: len(values) - bool(layer.use_bias)])
            self._layers[id(layer)] = type(layer).from_config(config)
            self.record(layer, self._layers[id(layer)], values)
        return [self._layers[id(layer)]]

    def _operation(self, operation: Any) -> Any:
        # An operation of Keras 3 that is no layer: `x + 1`, `keras.ops.mean(x)`.
        if id(operation) not in self._layers:
            self._layers[id(operation)] = type(operation).from_config(operation.get_config())
        return self._layers[id(operation)]

    def _wrapped(self, wrapper: Any, piece: Any, last: bool) -> Any:
        key = (id(wrapper), id(piece))
        if key not in self._wrappers:
            config = {key: value for key, value in wrapper.get_config().items() if key != "layer"}
            if not last:
                inner = wrapper.layer.name
                suffix = piece.name[len(inner) :] if piece.name.startswith(inner) else "_encoder"
                config["name"] = self.unique(wrapper.name + suffix)
            self._wrappers[key] = type(wrapper)(piece, **config)
        return self._wrappers[key]

    # -- A factorized layer as stock layers --------------------------------------------------

    def _write(self, kind: str, layer: Any, axes: int) -> list[Piece]:
        """The stock layers for a factorized layer that is not dense."""
        if kind == "EinsumDense":
            return self._einsum_layers(layer)
        if kind == "Embedding":
            return self._embedding_layers(layer)
        layers = self.source.keras.layers
        dimensions = len(layer.kernel_size)
        window = {
            "kernel_size": layer.kernel_size,
            "strides": layer.strides,
            "padding": layer.padding,
            "dilation_rate": layer.dilation_rate,
            "data_format": layer.data_format,
        }
        pointwise = {
            "kernel_size": (1,) * dimensions,
            "strides": (1,) * dimensions,
            "padding": "valid",
            "dilation_rate": (1,) * dimensions,
            "data_format": layer.data_format,
        }
        if kind.endswith("Transpose"):
            encoder = self._encoder(layer, axes, **pointwise)
            decoder = getattr(layers, kind)(
                layer.filters,
                output_padding=layer.output_padding,
                **window,
                **self._decoder_options(layer),
            )
            return self._keep_pair(layer, encoder, decoder)
        conv = getattr(layers, f"Conv{dimensions}D")
        if not kind.startswith("Separable"):
            decoder = conv(
                layer.filters, **layer.window(decoder=True), **self._decoder_options(layer)
            )
            encoder = self._encoder(layer, axes, **layer.window(decoder=False))
            return self._keep_pair(layer, encoder, decoder)
        decoder = conv(layer.filters, **pointwise, **self._decoder_options(layer))
        depthwise = getattr(layers, f"DepthwiseConv{dimensions}D")(
            depth_multiplier=layer.depth_multiplier,
            use_bias=False,
            depthwise_initializer=self._copied("initializers", layer.depthwise_initializer),
            depthwise_regularizer=layer.depthwise_regularizer,
            depthwise_constraint=layer.depthwise_constraint,
            trainable=layer.trainable,
            dtype=policy(layer),
            name=self.unique(f"{layer.name}_depthwise"),
            **window,
        )
        self.record(layer, depthwise, [self.source.value(layer.depthwise)])
        return [
            depthwise,
            *self._keep_pair(layer, self._encoder(layer, axes, **pointwise), decoder),
        ]

    def _embedding_layers(self, layer: Any) -> list[Piece]:
        layers = self.source.keras.layers
        options = self._encoder_options(layer)
        del options["use_bias"]
        for name in ("initializer", "regularizer", "constraint"):
            options[f"embeddings_{name}"] = options.pop(f"kernel_{name}")
        encoder = layers.Embedding(
            layer.input_dim, layer.rank, mask_zero=layer.mask_zero, **options
        )
        self.record(layer, encoder, [self.source.value(layer.encoder)])
        decoder = layers.Dense(
            layer.output_dim,
            use_bias=False,
            kernel_initializer=self._copied("initializers", layer.decoder_initializer),
            kernel_regularizer=layer.decoder_regularizer,
            kernel_constraint=layer.decoder_constraint,
            activity_regularizer=layer.activity_regularizer,
            trainable=layer.trainable,
            dtype=policy(layer),
            name=layer.name,
        )
        return self._keep_pair(layer, encoder, decoder)

    def _recurrent_layers(self, layer: Any) -> list[Piece]:
        layers = self.source.keras.layers
        cells = recurrent.cells(layer)
        kernels = [(name, k) for c in cells for name, k in recurrent.all_kernels(c).items()]
        factors = [(name, kernel) for name, kernel in kernels if inspect.is_factorized(kernel)]
        before: Any = None
        if hasattr(layer, "kernels") and factors[0][0] == "kernel" and factors[0][1].slices == 1:
            _, before = factors.pop(0)
        if factors:
            names = ", ".join(dict.fromkeys(name for name, _ in factors))
            whole = sum(math.prod(kernel.kernel_shape) for _, kernel in factors)
            self.warn(
                f"Factors of '{layer.name}' are multiplied out ({names}: {whole:,} weights for "
                f"{sum(inspect.kernel_weights(k) for _, k in factors):,}), because stock recurrent "
                "layers have no place for them, but for one slice of the inputs of a single layer."
            )
        values = []
        for cell in cells:
            for kernel in recurrent.all_kernels(cell).values():
                made = kernel.decoder if kernel is before else kernel.kernel
                values.append(tf.convert_to_tensor(made).numpy())
            if cell.use_bias:
                values.append(self.source.value(cell.bias))
        config = recurrent.stock_config(layer)
        stock = getattr(layers, config["class_name"]).from_config(config["config"])
        self.record(layer, stock, values)
        if before is None:
            return [stock]
        encoder = layers.Dense(
            before.rank,
            use_bias=False,
            kernel_initializer=self._copied("initializers", before.encoder_initializer),
            kernel_regularizer=before.encoder_regularizer,
            kernel_constraint=before.encoder_constraint,
            trainable=layer.trainable,
            dtype=policy(layer),
            name=self.unique(f"{layer.name}_encoder"),
        )
        self.record(layer, encoder, [self.source.value(before.encoder)])
        return [encoder, stock]

    def _einsum_layers(self, layer: Any) -> list[Piece]:
        EinsumDense = self.source.keras.layers.EinsumDense
        given, kernel, result = layer.terms
        unfolding, shape = layer.unfolding, layer.kernel_shape
        channels, filters = (
            "".join(kernel[axis] for axis in axes)
            for axes in (unfolding.channels, unfolding.filters)
        )
        ranks = next(n for n in "abcdefghijklmnopqrstuvwxyz" if n not in given + kernel + result)
        between = result.replace(next(n for n in result if n in filters), ranks)
        between = "".join(letter for letter in between if letter not in filters)
        named = between.replace("...", "")
        hidden = layer.slices * layer.rank
        values = self.source.value(layer.encoder)
        if layer.slices > 1:
            values = _block_diagonal(values, layer.slices)
            self._warn_of_zeros(
                layer, values, "EinsumDense", "einsum layers have no groups (max_slices=1)"
            )
        encoder = EinsumDense(
            f"{given},{channels}{ranks}->{between}",
            output_shape=[
                hidden if letter == ranks else None
                for letter in (named if result.startswith("...") else named[1:])
            ],
            **{k: v for k, v in self._encoder_options(layer).items() if k != "use_bias"},
        )
        sizes = [shape[axis] for axis in unfolding.channels]
        self.record(layer, encoder, [values.reshape(*sizes, hidden)])
        options = self._decoder_options(layer)
        del options["use_bias"]
        decoder = EinsumDense(
            f"{between},{ranks}{filters}->{result}",
            output_shape=layer.partial_output_shape,
            bias_axes=layer.bias_axes,
            **options,
        )
        sizes = [shape[axis] for axis in unfolding.filters]
        values = self.source.value(layer.decoder).reshape(hidden, *sizes)
        return self._keep_pair(layer, encoder, decoder, values)

    def _warn_of_zeros(self, layer: Any, values: np.ndarray, kind: str, why: str) -> None:
        self.warn(
            f"The encoder of '{layer.name}' is written out as one {kind} layer, its zeros included "
            f"({values.size:,} weights for {layer.encoder.shape[0]}×{layer.encoder.shape[1]}), "
            f"because {why}."
        )

    def _dense_layers(self, layer: Any, shape: tuple[int | None, ...], masked: bool) -> list[Any]:
        keras = self.source.keras
        hidden, channels = layer.slices * layer.rank, layer.slices * int(layer.encoder.shape[0])
        unknown = sum(size is None for size in shape[1:-1])
        mergeable = layer.slices > 1 and (masked or (unknown > 1 and len(shape) != 4))
        if id(layer) not in self._pairs:
            options = self._decoder_options(layer)
            decoder = keras.layers.Dense(layer.units, **options)
            if layer.slices == 1 or mergeable:
                values = self.source.value(layer.encoder)
                if mergeable:
                    values = _block_diagonal(values, layer.slices)
                    self._warn_of_zeros(
                        layer,
                        values,
                        "Dense",
                        "a mask or several unknown sizes leave no room for a Reshape",
                    )
                encoder = keras.layers.Dense(hidden, **self._encoder_options(layer))
                self.record(layer, encoder, [values])
                self._keep_pair(layer, encoder, decoder)
            else:
                if layer.encoder_constraint is not None:
                    self.warn(
                        f"The encoder_constraint of '{layer.name}' is not carried over: its "
                        "encoder becomes a convolution, whose kernel has other axes."
                    )
                encoder = self._encoder(
                    layer,
                    4,
                    kernel_size=(1, 1),
                    strides=(1, 1),
                    padding="valid",
                    dilation_rate=(1, 1),
                    data_format="channels_last",
                )
                self._keep_pair(layer, encoder, decoder)
        encoder, decoder = self._pairs[id(layer)]
        if isinstance(encoder, keras.layers.Dense) or len(shape) == 4:
            return [encoder, decoder]
        if mergeable:  # shared: called before where a Reshape fits
            raise ValueError(
                f"Expected the shared layer '{layer.name}' to be called with a mask everywhere or "
                "nowhere, to write it out. Received: both. Remedy: leave it alone with `exclude=` "
                "when compressing, or compress it with `max_slices=1`."
            )
        rows = (1 if len(shape) == 2 else -1, 1, channels)
        back = (*(-1 if size is None else size for size in shape[1:-1]), hidden)
        return [
            self._reshape(layer, "rows", rows),
            encoder,
            self._reshape(layer, "ranks", back),
            decoder,
        ]

    def _reshape(self, layer: Any, suffix: str, target: tuple[int, ...]) -> Any:
        key = (id(layer), suffix, target)
        if key not in self._reshapes:
            name = self.unique(f"{layer.name}_{suffix}")
            self._reshapes[key] = self.source.keras.layers.Reshape(
                target, name=name, dtype=policy(layer)
            )
        return self._reshapes[key]

    def _encoder(self, layer: Any, axes: int, **options: Any) -> Any:
        """The encoder as a convolution over `len(kernel_size)` axes, and its weights."""
        layers = self.source.keras.layers
        size = options["kernel_size"]
        values = self.source.value(layer.encoder)
        per_slice, hidden = values.shape[-2:]
        common = self._encoder_options(layer)
        is_dense = not hasattr(layer, "kernel_size")
        if is_dense:
            common["kernel_constraint"] = None
        if (
            len(size) == 2
            and axes == 4
            and 1 == per_slice < layer.slices
            and len(set(options["strides"])) == 1
            and common["kernel_constraint"] is None
        ):
            for name in ("initializer", "regularizer", "constraint"):
                common[f"depthwise_{name}"] = common.pop(f"kernel_{name}")
            encoder = layers.DepthwiseConv2D(depth_multiplier=layer.rank, **common, **options)
            shape: tuple[int, ...] = (*size, layer.slices, layer.rank)
        else:
            kind = getattr(layers, f"Conv{len(size)}D")
            encoder = kind(hidden, groups=layer.slices, **common, **options)
            shape = (*size, per_slice, hidden)
        self.record(layer, encoder, [values.reshape(shape)])
        return encoder

    def _encoder_options(self, layer: Any) -> dict[str, Any]:
        return {
            "name": self.unique(f"{layer.name}_encoder"),
            "use_bias": False,
            "kernel_initializer": self._copied("initializers", layer.encoder_initializer),
            "kernel_regularizer": layer.encoder_regularizer,
            "kernel_constraint": layer.encoder_constraint,
            "trainable": layer.trainable,
            "dtype": policy(layer),
        }

    def _decoder_options(self, layer: Any) -> dict[str, Any]:
        return {
            "name": layer.name,
            "use_bias": layer.use_bias or id(layer) in self._folded,
            "activation": layer.activation,
            "kernel_initializer": self._copied("initializers", layer.decoder_initializer),
            "bias_initializer": self._copied("initializers", layer.bias_initializer),
            "kernel_regularizer": layer.decoder_regularizer,
            "bias_regularizer": layer.bias_regularizer,
            "kernel_constraint": layer.decoder_constraint,
            "bias_constraint": layer.bias_constraint,
            "activity_regularizer": layer.activity_regularizer,
            "trainable": layer.trainable,
            "dtype": policy(layer),
        }

    def _copied(self, module: str, value: Any) -> Any:
        # tf_keras warns of an initializer object that is used twice.
        functions = getattr(self.source.keras, module)
        return functions.get(functions.serialize(value))

    def _keep_pair(
        self, layer: Any, encoder: Any, decoder: Any, kernel: np.ndarray | None = None
    ) -> list[Piece]:
        self._pairs[id(layer)] = (encoder, decoder)
        values = [self.source.value(layer.decoder) if kernel is None else kernel]
        if id(layer) in self._folded:
            values = self._fold(layer, values)
        elif layer.use_bias:
            values.append(self.source.value(layer.bias))
        self.record(layer, decoder, values)
        return [encoder, decoder]

    # -- BatchNormalization ------------------------------------------------------------------

    def _plan_folding(self, model: Any) -> None:
        """Finds the pairs to fold; warns of the BatchNormalization layers that stay."""
        graphs = [model, *(m for _, m in inspect.walk(model) if self.source.is_symbolic(m))]
        calls = [(graph, call) for graph in graphs for call in self.source.graph(graph)]
        count: dict[int, int] = {}
        for _, call in calls:
            count[id(call.layer)] = count.get(id(call.layer), 0) + 1
        stay = {}
        seen = set()
        for graph in graphs:
            inner = [call for owner, call in calls if owner is graph]
            for call in inner:
                if not isinstance(call.layer, self.source.keras.layers.BatchNormalization):
                    continue
                seen.add(id(call.layer))
                before, reason = self._foldable(graph, call, inner, count)
                if reason is None and graph is model:
                    outputs = tf.nest.flatten(self.source.graph_ends(model)[1])
                    if any(output is call.outputs[0] for output in outputs):
                        reason = "the model returns its output"
                if reason is None:
                    self._folded[id(before)] = call.layer
                    self._dropped.add(id(call.layer))
                else:
                    stay[call.layer.name] = reason
        for path, layer in inspect.walk(model):
            if (
                isinstance(layer, self.source.keras.layers.BatchNormalization)
                and id(layer) not in seen
            ):
                stay[path] = "it is inside a wrapper or custom layer"
        if stay:
            listed = "; ".join(f"'{name}': {reason}" for name, reason in stay.items())
            self.warn(
                f"{len(stay)} of {len(stay) + len(self._dropped)} BatchNormalization layers are "
                f"not folded: {listed}."
            )

    def _foldable(
        self, graph: Any, call: Any, calls: list[Any], count: dict[int, int]
    ) -> tuple[Any, str | None]:
        """The layer that a BatchNormalization can be folded into, or why it cannot."""
        tensor = first_tensor(call)
        (before,) = (c for c in calls if any(output is tensor for output in c.outputs))
        layer = before.layer
        kind = next(
            (name for cls in type(layer).__mro__ if (name := cls.__name__) in _OUTPUT_AXIS), None
        )
        if inspect.is_factorized(layer):
            if factorized_kind(layer).name not in _OUTPUT_AXIS:
                return None, f"'{layer.name}' before it is no convolution or dense layer"
        elif kind is None or type(layer) is not getattr(self.source.keras.layers, kind):
            return None, f"'{layer.name}' before it is no stock convolution or dense layer"
        if self.source.keras.activations.serialize(layer.activation) != "linear":
            return None, f"'{layer.name}' before it has an activation"
        if layer.activity_regularizer is not None:
            return None, f"'{layer.name}' before it has an activity regularizer"
        if count[id(layer)] > 1 or count[id(call.layer)] > 1:
            return None, f"it or '{layer.name}' before it is called several times"
        uses = sum(
            leaf is tensor
            for c in calls
            for leaf in tf.nest.flatten((c.args, list(c.kwargs.values())))
        )
        ends = tf.nest.flatten(self.source.graph_ends(graph)[1])
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
        if policy(layer).compute_dtype != policy(call.layer).compute_dtype:
            return None, f"'{layer.name}' before it computes in another dtype"
        return layer, None

    def _fold(self, layer: Any, kernels: list[np.ndarray]) -> list[np.ndarray]:
        """The weights of `layer`, given those but the bias, with its normalization folded in."""
        norm = self._folded[id(layer)]

        def value(variable: Any, default: float) -> np.ndarray:
            given = default if variable is None else self.source.value(variable)
            return np.asarray(given, np.float64)

        scale = value(norm.gamma, 1.0) / np.sqrt(value(norm.moving_variance, 1.0) + norm.epsilon)
        old_bias = value(layer.bias if layer.use_bias else None, 0.0)
        bias = value(norm.beta, 0.0) + (old_bias - value(norm.moving_mean, 0.0)) * scale
        axis = _OUTPUT_AXIS.get(type(layer).__name__.removeprefix("Factorized"), -1)
        kernel = kernels[-1].astype(np.float64)
        if axis is None:
            kernel *= scale.reshape(kernel.shape[-2:])
        else:
            kernel *= np.expand_dims(scale, -1) if axis == -2 else scale
        dtype = kernels[-1].dtype
        return [*kernels[:-1], kernel.astype(dtype), bias.astype(dtype)]


def _block_diagonal(encoder: np.ndarray, slices: int) -> np.ndarray:
    """A dense encoder `[c / k, k·j]` as one kernel `[c, k·j]`, zero off the blocks."""
    per_slice, hidden = encoder.shape
    rank = hidden // slices
    kernel = np.zeros((slices * per_slice, hidden), encoder.dtype)
    for i in range(slices):
        columns = slice(i * rank, (i + 1) * rank)
        kernel[i * per_slice : (i + 1) * per_slice, columns] = encoder[:, columns]
    return kernel
