"""Recurrent layers whose kernels are factorized: what both Kerases share.

The cells are stock cells in which a kernel, or both, is a `FactorizedDense` layer instead of a
variable. A step multiplies by encoder and decoder; everything else is the stock arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import tensorflow as tf

from keras_alds import _backend
from keras_alds.kinds import forms as _forms
from keras_alds.kinds.factorized import checked_factorizations

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object

#: The kernels of a recurrent cell, by the names of its attributes.
KERNELS = ("kernel", "recurrent_kernel")


class FactorizedCellMixin(_Base):
    """A stock recurrent cell in which some kernels are `FactorizedDense` layers.

    A subclass adds `FactorizedKeras3CellMixin` or `FactorizedTfKerasCellMixin` and the stock cell
    as the last bases.
    """

    _dense_class: ClassVar[type]
    # Columns of the kernels belong to so many gates, `units` each.
    _gates: ClassVar[int]

    def __init__(self, *args: Any, kernels: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernels = checked_factorizations("kernels", kernels, KERNELS)
        self._check_kernels()

    def _check_kernels(self) -> None:
        """Raise a ValueError if `kernels` do not fit the cell's other settings."""

    def add_weight(self, *args: Any, name: Any = None, **kwargs: Any) -> Any:
        """Create a variable as the stock cell asks for it, or a layer of factors in its place."""
        if name not in getattr(self, "kernels", {}):
            return super().add_weight(*args, name=name, **kwargs)
        rows, columns = kwargs["shape"]
        part = name.partition("_")[0]
        dense = self._dense_class(
            columns,
            **self.kernels[name],
            use_bias=False,
            **{
                f"{factor}_{setting}": self._copied(f"{setting}s", f"{part}_{setting}")
                for factor in ("encoder", "decoder")
                for setting in ("initializer", "regularizer", "constraint")
            },
            trainable=self.trainable,
            name=name,
            dtype=getattr(self, "dtype_policy", None) or self._dtype_policy,
        )
        with _backend.backend_of(self).name_scope(dense):
            dense.build((None, rows))
        return dense

    def _copied(self, module: str, name: str) -> Any:
        # tf_keras warns of an initializer object that is used twice.
        functions = getattr(_backend.backend_of(self).keras, module)
        return functions.get(functions.serialize(getattr(self, name)))

    def _product(self, name: str, x: Any, training: Any, gate: int | None = None) -> Any:
        """`x` times a kernel, or times its columns for one gate."""
        kernel = getattr(self, name)
        columns = slice(None)
        if gate is not None:
            columns = slice(gate * self.units, (gate + 1) * self.units)
        if name not in self.kernels:
            return tf.matmul(x, tf.cast(tf.convert_to_tensor(kernel), x.dtype)[:, columns])
        encoder, decoder = kernel._factors(x.dtype)
        form = kernel._form(
            channels=x.shape[-1],
            filters=kernel.units,
            kernel_size=(),
            positions=_forms.count_positions([x.shape[0]]),
            training=training,
        )
        return _forms.factorized_matmul(
            x, encoder, decoder[:, columns], slices=kernel.slices, form=form
        )

    def _products(self, name: str, inputs: Sequence[Any], training: Any) -> Any:
        """One input, or one for every gate, times a kernel: `[batch, gates * units]`."""
        if len(inputs) == 1:
            return self._product(name, inputs[0], training)
        gates = [self._product(name, x, training, gate) for gate, x in enumerate(inputs)]
        return tf.concat(gates, axis=-1)

    def _bias(self, dtype: Any) -> Any:
        return tf.cast(tf.convert_to_tensor(self.bias), dtype)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "kernels": plain_kernels(self.kernels)}


class FactorizedLSTMCellMixin(FactorizedCellMixin):
    """The arithmetic of a stock `LSTMCell`."""

    _gates = 4

    def call(self, inputs: Any, states: Any, training: Any = False) -> tuple[Any, list[Any]]:
        """Make one step.

        Args:
            inputs: tensor `[batch, channels]`.
            states: list of the hidden and the carry state, `[batch, units]` each.
            training: bool or None; filled in by Keras.

        Returns:
            The output and the list of new states.
        """
        h, c = states[0], states[1]
        xs, hs = self._dropped(inputs, h, training)
        z = self._products("kernel", xs, training)
        z += self._products("recurrent_kernel", hs, training)
        if self.use_bias:
            z += self._bias(z.dtype)
        z_input, z_forget, z_new, z_output = tf.split(z, 4, axis=-1)
        kept = self.recurrent_activation(z_forget) * c
        c = kept + self.recurrent_activation(z_input) * self.activation(z_new)
        h = self.recurrent_activation(z_output) * self.activation(c)
        return h, [h, c]


class FactorizedGRUCellMixin(FactorizedCellMixin):
    """The arithmetic of a stock `GRUCell`."""

    _gates = 3

    def _check_kernels(self) -> None:
        if "recurrent_kernel" in self.kernels and not self.reset_after:
            raise ValueError(
                "Expected `reset_after=True` for a factorized 'recurrent_kernel': without it a "
                "step multiplies two inputs by that kernel. "
                f"Received: kernels={plain_kernels(self.kernels)}, reset_after=False"
            )

    def call(self, inputs: Any, states: Any, training: Any = False) -> tuple[Any, Any]:
        """Make one step.

        Args:
            inputs: tensor `[batch, channels]`.
            states: the hidden state `[batch, units]`, or a list of it.
            training: bool or None; filled in by Keras.

        Returns:
            The output and the new state, as `states` are.
        """
        nested = isinstance(states, (list, tuple))
        h = states[0] if nested else states
        xs, hs = self._dropped(inputs, h, training)
        x = self._products("kernel", xs, training)
        if self.use_bias:
            bias = self._bias(x.dtype)
            x += bias[0] if self.reset_after else bias
        x_update, x_reset, x_new = tf.split(x, 3, axis=-1)
        if self.reset_after:
            r = self._products("recurrent_kernel", hs, training)
            if self.use_bias:
                r += bias[1]
            r_update, r_reset, r_new = tf.split(r, 3, axis=-1)
        else:
            r_update, r_reset = (
                self._product("recurrent_kernel", hs[gate % len(hs)], training, gate)
                for gate in (0, 1)
            )
        update = self.recurrent_activation(x_update + r_update)
        reset = self.recurrent_activation(x_reset + r_reset)
        if self.reset_after:
            r_new = reset * r_new
        else:
            r_new = self._product("recurrent_kernel", reset * hs[-1], training, 2)
        h = update * h + (1 - update) * self.activation(x_new + r_new)
        return h, [h] if nested else h


class FactorizedSimpleRNNCellMixin(FactorizedCellMixin):
    """The arithmetic of a stock `SimpleRNNCell`."""

    _gates = 1

    def call(self, inputs: Any, states: Any, training: Any = False) -> tuple[Any, Any]:
        """Make one step.

        Args:
            inputs: tensor `[batch, channels]`.
            states: the hidden state `[batch, units]`, or a list of it.
            training: bool or None; filled in by Keras.

        Returns:
            The output and the new state, as `states` are.
        """
        nested = isinstance(states, (list, tuple))
        xs, hs = self._dropped(inputs, states[0] if nested else states, training)
        h = self._products("kernel", xs, training)
        if self.use_bias:
            h += self._bias(h.dtype)
        h += self._products("recurrent_kernel", hs, training)
        if self.activation is not None:
            h = self.activation(h)
        return h, [h] if nested else h


class FactorizedKeras3CellMixin(_Base):
    """Dropout as the cells of Keras 3 have it."""

    def _dropped(self, x: Any, h: Any, training: Any) -> tuple[list[Any], list[Any]]:
        """Inputs and states under their dropout masks: one for all gates, or one for each."""
        pairs = (
            (x, self.dropout, self.get_dropout_mask),
            (h, self.recurrent_dropout, self.get_recurrent_dropout_mask),
        )
        found = []
        for value, rate, mask in pairs:
            if not training or not 0 < rate < 1:
                found.append([value])
                continue
            masks = mask(value)
            masks = masks if isinstance(masks, list) else [masks]
            found.append([value * item for item in masks])
        return found[0], found[1]


class FactorizedTfKerasCellMixin(_Base):
    """Dropout as the cells of tf_keras have it."""

    _gates: ClassVar[int]

    def _dropped(self, x: Any, h: Any, training: Any) -> tuple[list[Any], list[Any]]:
        """Inputs and states under their dropout masks: one for all gates, or one for each."""
        pairs = (
            (x, self.dropout, self.get_dropout_mask_for_cell),
            (h, self.recurrent_dropout, self.get_recurrent_dropout_mask_for_cell),
        )
        found = []
        for value, rate, mask in pairs:
            if not 0 < rate < 1:
                found.append([value])
                continue
            masks = mask(value, training, count=self._gates)  # ones but in training
            masks = masks if isinstance(masks, list) else [masks]
            each = getattr(self, "implementation", 2) == 1
            found.append([value * item for item in (masks if each else masks[:1])])
        return found[0], found[1]


class FactorizedRecurrentMixin(_Base):
    """A stock recurrent layer with a factorized cell, which is run in the ordinary loop.

    A subclass adds the stock layer as the last base.
    """

    _cell_class: ClassVar[type]

    def __init__(self, *args: Any, kernels: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # In place: the layer has made its cell already, and tracks it.
        attributes = {"kernels": checked_factorizations("kernels", kernels, KERNELS)}
        _backend.backend_of(self).adopt(self.cell, self._cell_class, attributes)
        self.cell._check_kernels()

    def get_prunable_weights(self) -> list[Any]:
        """What TF-MOT's `prune_low_magnitude` prunes: whole kernels, and both factors of others."""
        kernels = [(name, getattr(self.cell, name)) for name in KERNELS]
        return [
            weight
            for name, kernel in kernels
            for weight in ([kernel] if name not in self.kernels else kernel.get_prunable_weights())
        ]

    @property
    def kernels(self) -> Any:
        """Slices and rank of the cell's factorized kernels."""
        return self.cell.kernels

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "kernels": plain_kernels(self.kernels)}


class FactorizedKeras3RecurrentMixin(FactorizedRecurrentMixin):
    """The loop of Keras 3's `RNN`; cuDNN's takes whole kernels."""

    _loop: ClassVar[Any]

    def inner_loop(
        self, sequences: Any, initial_state: Any, mask: Any, training: Any = False
    ) -> Any:
        """Run the cell over all time steps."""
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        return type(self)._loop(self, sequences, initial_state, mask, training=training)


class FactorizedTfKerasRecurrentMixin(FactorizedRecurrentMixin):
    """The loop of tf_keras's `RNN`; the fused one takes whole kernels."""

    _could_use_gpu_kernel = property(lambda self: False, lambda self, value: None)


def plain_kernels(kernels: Any) -> dict[str, dict[str, int]]:
    """The argument `kernels` as dicts, whatever a Keras has wrapped them in."""
    return {name: dict(choice) for name, choice in dict(kernels).items()}
