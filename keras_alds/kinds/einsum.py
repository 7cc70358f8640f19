"""A factorized einsum layer: inputs to rows, two matrix products, rows to outputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_alds.core.slicing import Unfolding, einsum_unfolding
from keras_alds.kinds import forms as _forms
from keras_alds.kinds.factorized import FactorizedMixin


class FactorizedEinsumDenseMixin(FactorizedMixin):
    """An einsum of inputs and a kernel that is read as one matrix, in two factors."""

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
        """How the dense kernel is read as a matrix, by the equation; see `core.slicing`."""
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
        given, kernel, result = re.split(",|->", re.sub(r"\s", "", self.equation))
        return given, kernel, result

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
        x = tf.cast(tf.convert_to_tensor(inputs), self.compute_dtype)
        given, kernel, result = self.terms
        unfolding = self.unfolding
        summed = "".join(kernel[axis] for axis in unfolding.channels)
        made = "".join(kernel[axis] for axis in unfolding.filters)
        kept = "".join(axis for axis in result if axis not in made)
        x = _einsum(f"{given}->{kept}{summed}", x)
        rows = tf.reshape(x, [-1, unfolding.shape(self.kernel_shape)[0]])
        form = self._form(
            channels=rows.shape[-1],
            filters=unfolding.shape(self.kernel_shape)[1],
            kernel_size=(),
            positions=_forms.count_positions(list(x.shape[: -len(summed)]) or [1]),
            training=training,
        )
        encoder, decoder = self._factors(x.dtype)
        y = _forms.factorized_matmul(rows, encoder, decoder, slices=self.slices, form=form)
        sizes = [self.kernel_shape[axis] for axis in unfolding.filters]
        y = tf.reshape(y, tf.concat([tf.shape(x)[: -len(summed)], sizes], axis=0))
        y.set_shape([*x.shape[: -len(summed)], *sizes])
        y = _einsum(f"{kept}{made}->{result}", y)
        if self.bias is not None:
            y += tf.cast(tf.convert_to_tensor(self.bias), y.dtype)
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
        del config["use_bias"]  # `bias_axes` says it
        return {
            **config,
            "equation": self.equation,
            "output_shape": self.partial_output_shape,
            "bias_axes": self.bias_axes,
        }


def _einsum(equation: str, x: Any) -> Any:
    source, target = equation.split("->")
    return x if source == target else tf.einsum(equation, x)
