"""Einsum layers: inputs to rows, two matrix products, rows to outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import keras
import numpy as np

from keras_alds._backend import tensors
from keras_alds.core.slicing import Array, Unfolding, einsum_terms, einsum_unfolding
from keras_alds.kinds import forms
from keras_alds.kinds.base import (
    KernelKind,
    Shape,
    Writer,
    bias_settings,
    block_diagonal,
    register,
    size_of,
)
from keras_alds.kinds.dense import warn_of_zeros
from keras_alds.kinds.factorized import FactorizedLayer


class BaseFactorizedEinsumDense(FactorizedLayer):
    """An einsum whose kernel unfolds to one matrix, held as two factors."""

    def __init__(
        self,
        equation: str,
        output_shape: int | Sequence[int | None],
        slices: int,
        rank: int,
        activation: Any = None,
        bias_axes: str | None = None,
        encoder_initializer: Any = "glorot_uniform",
        decoder_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        encoder_regularizer: Any = None,
        decoder_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        encoder_constraint: Any = None,
        decoder_constraint: Any = None,
        bias_constraint: Any = None,
        encoder_form: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        try:
            einsum_unfolding(equation)
        except (ValueError, TypeError) as error:
            raise ValueError(
                "Expected the `equation` of an EinsumDense layer whose kernel is a matrix from "
                f"inputs to outputs. Received: equation={equation!r} ({error})"
            ) from None
        self.equation = equation
        shape = output_shape if isinstance(output_shape, Sequence) else (output_shape,)
        self.partial_output_shape = tuple(shape)
        self.bias_axes = bias_axes
        self._set_arguments(
            slices=slices,
            rank=rank,
            activation=activation,
            use_bias=bool(bias_axes),
            encoder_form=encoder_form,
            encoder_initializer=encoder_initializer,
            decoder_initializer=decoder_initializer,
            bias_initializer=bias_initializer,
            encoder_regularizer=encoder_regularizer,
            decoder_regularizer=decoder_regularizer,
            bias_regularizer=bias_regularizer,
            encoder_constraint=encoder_constraint,
            decoder_constraint=decoder_constraint,
            bias_constraint=bias_constraint,
        )

    @property
    def unfolding(self) -> Unfolding:
        """How the dense kernel unfolds to a matrix, by the equation; see `core.slicing`."""
        return einsum_unfolding(self.equation)

    def _sizes(self, input_shape: Any) -> tuple[dict[str, Any], list[Any]]:
        """The length of every axis by its letter, and the axes that an ellipsis stands for."""
        shape = list(input_shape)
        given, _, result = self.terms
        letters = given.replace("...", "")
        elided = len(shape) - len(letters)
        if elided < 0 or (elided and "..." not in given):
            raise ValueError(
                f"Expected inputs of layer {self.name!r} to have the axes of its equation "
                f"{self.equation!r}. Received: input_shape={tuple(shape)}"
            )
        left = given.startswith("...")
        start, stop = (0, elided) if left else (len(letters), len(shape))
        hidden, named = shape[start:stop], shape[:start] + shape[stop:]
        sizes = dict(zip(letters, named, strict=True))
        # As in the stock layer `output_shape` has all axes but the batch.
        made = result.replace("...", "") if left else result.replace("...", "")[1:]
        if len(made) != len(self.partial_output_shape):
            raise ValueError(
                f"Expected `output_shape` to have one entry for every axis of {made!r}. "
                f"Received: output_shape={self.partial_output_shape}, equation={self.equation!r}"
            )
        for letter, size in zip(made, self.partial_output_shape, strict=True):
            sizes[letter] = sizes.get(letter) if size is None else size
        return sizes, hidden

    @property
    def terms(self) -> tuple[str, str, str]:
        """The terms of the equation: inputs, kernel, outputs."""
        return einsum_terms(self.equation)

    def build(self, input_shape: Any) -> None:
        """Create encoder, decoder and bias for inputs of `input_shape`."""
        sizes, elided = self._sizes(input_shape)
        given, kernel, result = self.terms
        self._add_factors(tuple(self._known_channels(sizes[letter]) for letter in kernel))
        if self.bias_axes:
            result = result.replace("...", "")
            result = result[min(result.index(letter) for letter in self.bias_axes) :]
            shape = [int(sizes[n]) if n in self.bias_axes else 1 for n in result]
            shape += [1] * (len(elided) if given.endswith("...") else 0)
            self._add_part("bias", tuple(shape))
        else:
            self.bias = None
        if not elided:
            self.input_spec = self._keras.layers.InputSpec(ndim=len(tuple(input_shape)))
        super().build(input_shape)

    def call(self, inputs: Any, training: Any = None) -> Any:
        """Apply encoder, decoder, bias and activation.

        Args:
            inputs: tensor of the equation's first term.
            training: bool or None; filled in by Keras. It changes the speed, never the result.

        Returns:
            Tensor of the equation's last term.
        """
        x = tensors.cast(tensors.tensor(inputs), self.compute_dtype)
        given, kernel, result = self.terms
        unfolding = self.unfolding
        summed = "".join(kernel[axis] for axis in unfolding.channels)
        made = "".join(kernel[axis] for axis in unfolding.filters)
        kept = "".join(axis for axis in result if axis not in made)
        x = _einsum(f"{given}->{kept}{summed}", x)
        rows = tensors.reshape(x, [-1, unfolding.shape(self.kernel_shape)[0]])
        form = self._form(
            channels=rows.shape[-1],
            filters=unfolding.shape(self.kernel_shape)[1],
            kernel_size=(),
            positions=forms.count_positions(list(x.shape[: -len(summed)]) or [1]),
            training=training,
        )
        encoder, decoder = self._factors(x.dtype)
        y = forms.factorized_matmul(rows, encoder, decoder, slices=self.slices, form=form)
        sizes = [self.kernel_shape[axis] for axis in unfolding.filters]
        y = tensors.reshape(y, tensors.concat([tensors.shape(x)[: -len(summed)], sizes], axis=0))
        y.set_shape([*x.shape[: -len(summed)], *sizes])
        y = _einsum(f"{kept}{made}->{result}", y)
        if self.bias is not None:
            y += tensors.cast(tensors.tensor(self.bias), y.dtype)
        return y if self.activation is None else self.activation(y)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the output's shape for an input shape."""
        sizes, elided = self._sizes(input_shape)
        *_, result = self.terms
        before, ellipsis, after = result.partition("...")
        middle = elided if ellipsis else []
        return self._shape_type([*map(sizes.get, before), *middle, *map(sizes.get, after)])

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        config = {**super().get_config(), **self._shared_config()}
        del config["use_bias"]  # `bias_axes` implies it
        return {
            **config,
            "equation": self.equation,
            "output_shape": self.partial_output_shape,
            "bias_axes": self.bias_axes,
        }


def _einsum(equation: str, x: Any) -> Any:
    source, target = equation.split("->")
    return x if source == target else tensors.einsum(equation, x)


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedEinsumDense(BaseFactorizedEinsumDense, keras.layers.Layer):
    """An einsum dense layer held as a block-diagonal encoder and a dense decoder.

    The kernel axes that the input has too are merged into one axis of inputs; those that the output
    has, into one of outputs. The layer computes `activation(decoder(encoder(x)) + bias)` on it. It
    equals a stock `EinsumDense` of the same equation with the kernel `layer.kernel`.

    Weights, in this order: `encoder` `[inputs / slices, slices * rank]` (slice i owns the columns
    `i * rank` to `(i + 1) * rank - 1`), `decoder` `[slices * rank, outputs]`, `bias` in the stock
    layer's shape. Inputs and outputs are in the order of the kernel's axes.

    Args:
        equation: str, `"inputs,kernel->outputs"`, with or without an ellipsis. Every axis of the
            kernel is in exactly one of inputs and outputs.
        output_shape: int or tuple of int and None, the output's shape without the batch axis and
            the axes of an ellipsis.
        slices: int, number of contiguous slices of the inputs, k. Must divide their number.
        rank: int, rank per slice, j; at most `min(inputs / slices, outputs)`.
        activation: str, callable or None, applied to the decoder's output.
        bias_axes: str or None, the axes of the output that the bias has; None for no bias.
        encoder_initializer: initializer of the encoder. Default `"glorot_uniform"`.
        decoder_initializer: initializer of the decoder. Default `"glorot_uniform"`.
        bias_initializer: initializer of the bias. Default `"zeros"`.
        encoder_regularizer: optional regularizer of the encoder.
        decoder_regularizer: optional regularizer of the decoder.
        bias_regularizer: optional regularizer of the bias.
        activity_regularizer: optional regularizer of the layer's output.
        encoder_constraint: optional constraint of the encoder.
        decoder_constraint: optional constraint of the decoder.
        bias_constraint: optional constraint of the bias.
        encoder_form: str, how the numbers are computed; see `FactorizedDense`. Default `"auto"`.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Input shape:
        As the equation says.

    Output shape:
        As the equation says.

    Raises:
        ValueError: If an argument is out of its range, if the kernel of `equation` is not a
            matrix from inputs to outputs, or if `slices` or `rank` do not fit the input.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedEinsumDense
        >>> layer = FactorizedEinsumDense("abc,cde->abde", (None, 2, 3), 2, rank=2, bias_axes="de")
        >>> layer(np.ones((1, 5, 4), "float32")).shape
        TensorShape([1, 5, 2, 3])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(2, 4), (4, 6), (2, 3)]
    """


class EinsumDense(KernelKind):
    """`EinsumDense`."""

    copied: ClassVar[tuple[str, ...]] = ("equation", "bias_axes")
    sample: ClassVar[tuple[Any, ...]] = ("ab,bc->ac", 1)
    principal = False

    def unfolding(self, layer: Any) -> Unfolding:
        return einsum_unfolding(layer.equation)

    def refusal(self, layer: Any) -> str | None:
        try:
            einsum_unfolding(layer.equation)
        except ValueError as error:
            return str(error)
        return None

    def arguments(self, layer: Any) -> dict[str, Any]:
        return {
            **{name: getattr(layer, name) for name in self.copied},
            "output_shape": tuple(layer.partial_output_shape),
            "activation": layer.activation,
            **bias_settings(layer),
        }

    def input_shape(self, layer: Any) -> Shape:
        given, kernel, result = einsum_terms(layer.equation)
        sizes = dict(zip(kernel, self.shape(layer), strict=True))
        shape = [sizes.get(letter) for letter in given.replace("...", "")]
        if given.startswith("..."):
            return (None, *shape)
        if not given.endswith("..."):
            return tuple(shape)
        elided = 1
        if layer.bias is not None:  # its last axes are those of the ellipsis
            result = result.replace("...", "")
            first = min(result.index(letter) for letter in layer.bias_axes)
            elided = len(layer.bias.shape) - len(result[first:])
        return (*shape, *(None,) * elided)

    def batches(self, layer: Any, inputs: Array) -> Array:
        given, kernel, result = einsum_terms(layer.equation)
        made = "".join(letter for letter in kernel if letter in given)
        kept = "".join(letter for letter in result if letter not in kernel)
        rows = np.einsum(f"{given}->{kept}{made}", inputs)
        return rows.reshape(-1, self.unfolding(layer).shape(self.shape(layer))[0])

    def positions(self, layer: Any, inputs: Shape, outputs: Shape) -> Shape:
        _, kernel, result = einsum_terms(layer.equation)
        before, _, after = result.partition("...")
        letters = [*before, *"." * (len(outputs) - len(before) - len(after)), *after]
        return tuple(
            size
            for letter, size in zip(letters, outputs, strict=True)
            if letter == "." or letter not in kernel
        )

    def macs(self, layer: Any, inputs: Shape, outputs: Shape) -> int:
        # Valid for any kernel: every output sums over the kernel axes that it lacks.
        _, kernel, result = einsum_terms(layer.equation)
        sizes = zip(kernel, self.shape(layer), strict=True)
        return size_of(layer, outputs) * math.prod(n for axis, n in sizes if axis not in result)

    def written_out(self, writer: Writer, layer: Any, axes: int) -> list[Any]:
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
        values = writer.value(layer.encoder)
        if layer.slices > 1:
            values = block_diagonal(values, layer.slices)
            why = "einsum layers have no groups (max_slices=1)"
            warn_of_zeros(writer, layer, values, "EinsumDense", why)
        options = writer.encoder_options(layer)
        del options["use_bias"]
        encoder = writer.layers.EinsumDense(
            f"{given},{channels}{ranks}->{between}",
            output_shape=[
                hidden if letter == ranks else None
                for letter in (named if result.startswith("...") else named[1:])
            ],
            **options,
        )
        sizes = [shape[axis] for axis in unfolding.channels]
        writer.record(layer, encoder, [values.reshape(*sizes, hidden)], [layer.encoder])
        options = writer.decoder_options(layer)
        del options["use_bias"]
        decoder = writer.layers.EinsumDense(
            f"{between},{ranks}{filters}->{result}",
            output_shape=layer.partial_output_shape,
            bias_axes=layer.bias_axes,
            **options,
        )
        sizes = [shape[axis] for axis in unfolding.filters]
        values = writer.value(layer.decoder).reshape(hidden, *sizes)
        return writer.pair(layer, encoder, decoder, values)


register(EinsumDense("EinsumDense", FactorizedEinsumDense))
