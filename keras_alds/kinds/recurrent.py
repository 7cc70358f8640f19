"""Recurrent layers: the kernels of their cells are treated as layers and can be factorized.

A cell holds two kernels as variables, and every step multiplies by both. The package works on
layers, so a `CellKernel`, a linear layer, represents each kernel. In a factorized cell one kernel
or both are `FactorizedDense` layers instead of variables. A step multiplies by encoder and decoder;
everything else is the stock arithmetic.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import keras

from keras_alds import _backend
from keras_alds._backend import tensors
from keras_alds._backend.calls import Replacement, replacements_of
from keras_alds._backend.layers import dtype_policy
from keras_alds._backend.loops import InGraph, all_steps_of, restored, states_of
from keras_alds.kinds import forms
from keras_alds.kinds.base import (
    Kind,
    Shape,
    Undo,
    Writer,
    is_factorized,
    register,
    register_own,
    stock_kind,
)
from keras_alds.kinds.dense import DENSE, Dense
from keras_alds.kinds.factorized import checked_factorizations
from keras_alds.plan import Skip, Skipped

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object

#: The kernels of a recurrent cell, by the names of its attributes.
KERNELS = ("kernel", "recurrent_kernel")


# -- Factorized layers ---------------------------------------------------------------------------


class BaseFactorizedCell(_Base):
    """A stock recurrent cell in which some kernels are `FactorizedDense` layers.

    A subclass adds `Keras3Cell` or `TfKerasCell` and the stock cell as the last bases.
    """

    # Number of gates. Each has `units` columns of a kernel.
    _gates: ClassVar[int]

    def __init__(self, *args: Any, kernels: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernels = checked_factorizations("kernels", kernels, KERNELS)
        self._check_kernels()

    def _check_kernels(self) -> None:
        """Raise a ValueError if `kernels` do not fit the cell's other settings."""

    def add_weight(self, *args: Any, name: Any = None, **kwargs: Any) -> Any:
        """Create the variable that the stock cell asks for, or a factorized layer instead."""
        if name not in getattr(self, "kernels", {}):
            return super().add_weight(*args, name=name, **kwargs)
        rows, columns = kwargs["shape"]
        part = name.partition("_")[0]
        backend = _backend.backend_of(self)
        dense = DENSE.layer_class(backend)(
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
            dtype=dtype_policy(self),
        )
        with backend.name_scope(dense):
            dense.build((None, rows))
        return dense

    def _copied(self, module: str, name: str) -> Any:
        # tf_keras warns if an initializer object is used twice.
        functions = getattr(_backend.backend_of(self).keras, module)
        return functions.get(functions.serialize(getattr(self, name)))

    def _product(self, name: str, x: Any, training: Any, gate: int | None = None) -> Any:
        """`x` times a kernel, or times its columns for one gate."""
        kernel = getattr(self, name)
        columns = slice(None)
        if gate is not None:
            columns = slice(gate * self.units, (gate + 1) * self.units)
        if name not in self.kernels:
            return tensors.matmul(x, tensors.cast(tensors.tensor(kernel), x.dtype)[:, columns])
        encoder, decoder = kernel._factors(x.dtype)
        form = kernel._form(
            channels=x.shape[-1],
            filters=kernel.units,
            kernel_size=(),
            positions=forms.count_positions([x.shape[0]]),
            training=training,
        )
        return forms.factorized_matmul(
            x, encoder, decoder[:, columns], slices=kernel.slices, form=form
        )

    def _products(self, name: str, inputs: Sequence[Any], training: Any) -> Any:
        """One input, or one for every gate, times a kernel: `[batch, gates * units]`."""
        if len(inputs) == 1:
            return self._product(name, inputs[0], training)
        gates = [self._product(name, x, training, gate) for gate, x in enumerate(inputs)]
        return tensors.concat(gates, axis=-1)

    def _bias(self, dtype: Any) -> Any:
        return tensors.cast(tensors.tensor(self.bias), dtype)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "kernels": plain_kernels(self.kernels)}


class BaseFactorizedLSTMCell(BaseFactorizedCell):
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
        z_input, z_forget, z_new, z_output = tensors.split(z, 4, axis=-1)
        kept = self.recurrent_activation(z_forget) * c
        c = kept + self.recurrent_activation(z_input) * self.activation(z_new)
        h = self.recurrent_activation(z_output) * self.activation(c)
        return h, [h, c]


class BaseFactorizedGRUCell(BaseFactorizedCell):
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
        x_update, x_reset, x_new = tensors.split(x, 3, axis=-1)
        if self.reset_after:
            r = self._products("recurrent_kernel", hs, training)
            if self.use_bias:
                r += bias[1]
            r_update, r_reset, r_new = tensors.split(r, 3, axis=-1)
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


class BaseFactorizedSimpleRNNCell(BaseFactorizedCell):
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


class Keras3Cell(_Base):
    """Dropout as in Keras 3 cells."""

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


class TfKerasCell(_Base):
    """Dropout as in tf_keras cells."""

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
            masks = mask(value, training, count=self._gates)  # ones outside of training
            masks = masks if isinstance(masks, list) else [masks]
            each = getattr(self, "implementation", 2) == 1
            found.append([value * item for item in (masks if each else masks[:1])])
        return found[0], found[1]


class BaseFactorizedRecurrent(_Base):
    """A stock recurrent layer with a factorized cell, which runs in the ordinary loop.

    A subclass adds the stock layer as the last base.
    """

    def __init__(self, *args: Any, kernels: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # In place, because the layer already tracks the cell that it created.
        attributes = {"kernels": checked_factorizations("kernels", kernels, KERNELS)}
        backend = _backend.backend_of(self)
        backend.adopt(self.cell, stock_kind(self.cell).layer_class(backend), attributes)
        self.cell._check_kernels()

    def get_prunable_weights(self) -> list[Any]:
        """What TF-MOT's `prune_low_magnitude` prunes: dense kernels, and factors."""
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


class Keras3Recurrent(BaseFactorizedRecurrent):
    """The loop of Keras 3's `RNN`; cuDNN's loop needs dense kernels."""

    def inner_loop(
        self, sequences: Any, initial_state: Any, mask: Any, training: Any = False
    ) -> Any:
        """Run the cell over all time steps."""
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        return keras.layers.RNN.inner_loop(self, sequences, initial_state, mask, training=training)


class TfKerasRecurrent(BaseFactorizedRecurrent):
    """The loop of tf_keras's `RNN`; the fused loop needs dense kernels."""

    _could_use_gpu_kernel = property(lambda self: False, lambda self, value: None)


def plain_kernels(kernels: Any) -> dict[str, dict[str, int]]:
    """The argument `kernels` as plain dicts, without the wrappers of Keras."""
    return {name: dict(choice) for name, choice in dict(kernels).items()}


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedGRUCell(BaseFactorizedGRUCell, Keras3Cell, keras.layers.GRUCell):
    """A stock `GRUCell` in which one kernel or both are factorized.

    `cell.kernel` and `cell.recurrent_kernel` are `FactorizedDense` layers if they are
    factorized, and variables if not. Every step multiplies by encoder and decoder; the rest is the
    arithmetic of the stock cell.

    Args:
        *args: The stock cell's arguments.
        kernels: dict or None, slices and rank of every kernel that is factorized, such as
            `{"kernel": {"slices": 1, "rank": 8}}`. Names are `"kernel"` and, for
            `reset_after=True`, `"recurrent_kernel"`.
        **kwargs: The stock cell's keyword arguments.

    Raises:
        ValueError: If `kernels` is not such a dict, or does not fit the cell.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedGRUCell
        >>> cell = FactorizedGRUCell(8, kernels={"recurrent_kernel": {"slices": 2, "rank": 2}})
        >>> keras.layers.RNN(cell)(np.ones((1, 5, 4), "float32")).shape
        TensorShape([1, 8])
        >>> tuple(cell.recurrent_kernel.encoder.shape)
        (4, 4)
    """


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedLSTMCell(BaseFactorizedLSTMCell, Keras3Cell, keras.layers.LSTMCell):
    """A stock `LSTMCell` in which one kernel or both are factorized.

    `cell.kernel` and `cell.recurrent_kernel` are `FactorizedDense` layers if they are
    factorized, and variables if not. Every step multiplies by encoder and decoder; the rest is the
    arithmetic of the stock cell.

    Args:
        *args: The stock cell's arguments.
        kernels: dict or None, slices and rank of every kernel that is factorized, such as
            `{"kernel": {"slices": 1, "rank": 8}}`. Names are `"kernel"` and
            `"recurrent_kernel"`.
        **kwargs: The stock cell's keyword arguments.

    Raises:
        ValueError: If `kernels` is not such a dict.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedLSTMCell
        >>> cell = FactorizedLSTMCell(8, kernels={"kernel": {"slices": 1, "rank": 2}})
        >>> keras.layers.RNN(cell)(np.ones((1, 5, 4), "float32")).shape
        TensorShape([1, 8])
        >>> tuple(cell.kernel.encoder.shape)
        (4, 2)
    """


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedSimpleRNNCell(BaseFactorizedSimpleRNNCell, Keras3Cell, keras.layers.SimpleRNNCell):
    """A stock `SimpleRNNCell` in which one kernel or both are factorized.

    `cell.kernel` and `cell.recurrent_kernel` are `FactorizedDense` layers if they are
    factorized, and variables if not. Every step multiplies by encoder and decoder; the rest is the
    arithmetic of the stock cell.

    Args:
        *args: The stock cell's arguments.
        kernels: dict or None, slices and rank of every kernel that is factorized, such as
            `{"kernel": {"slices": 1, "rank": 8}}`. Names are `"kernel"` and
            `"recurrent_kernel"`.
        **kwargs: The stock cell's keyword arguments.

    Raises:
        ValueError: If `kernels` is not such a dict.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedSimpleRNNCell
        >>> cell = FactorizedSimpleRNNCell(8, kernels={"kernel": {"slices": 1, "rank": 2}})
        >>> keras.layers.RNN(cell)(np.ones((1, 5, 4), "float32")).shape
        TensorShape([1, 8])
    """


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedGRU(Keras3Recurrent, keras.layers.GRU):
    """A stock `GRU` in which one kernel or both are factorized; see `FactorizedGRUCell`.

    Call, masks, states and other arguments are those of the stock layer, but the steps run in the
    ordinary loop, never in cuDNN's. `compress` and `ALDSCompress` convert a stock layer to this
    class when they factorize one of its kernels.

    Args:
        *args: The stock layer's arguments.
        kernels: dict or None, slices and rank of every kernel that is factorized, such as
            `{"kernel": {"slices": 1, "rank": 8}}`. Names are `"kernel"` and, for
            `reset_after=True`, `"recurrent_kernel"`.
        **kwargs: The stock layer's keyword arguments.

    Raises:
        ValueError: If `kernels` is not such a dict, or does not fit the layer.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedGRU
        >>> layer = FactorizedGRU(8, kernels={"recurrent_kernel": {"slices": 1, "rank": 4}})
        >>> layer(np.ones((1, 5, 16), "float32")).shape
        TensorShape([1, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(16, 24), (2, 24), (8, 4), (4, 24)]
    """


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedLSTM(Keras3Recurrent, keras.layers.LSTM):
    """A stock `LSTM` in which one kernel or both are factorized; see `FactorizedLSTMCell`.

    Call, masks, states and other arguments are those of the stock layer, but the steps run in the
    ordinary loop, never in cuDNN's. `compress` and `ALDSCompress` convert a stock layer to this
    class when they factorize one of its kernels.

    Args:
        *args: The stock layer's arguments.
        kernels: dict or None, slices and rank of every kernel that is factorized, such as
            `{"kernel": {"slices": 1, "rank": 8}}`. Names are `"kernel"` and
            `"recurrent_kernel"`.
        **kwargs: The stock layer's keyword arguments.

    Raises:
        ValueError: If `kernels` is not such a dict.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedLSTM
        >>> layer = FactorizedLSTM(8, kernels={"kernel": {"slices": 2, "rank": 3}})
        >>> layer(np.ones((1, 5, 16), "float32")).shape
        TensorShape([1, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(8, 32), (32,), (8, 6), (6, 32)]
    """


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedSimpleRNN(Keras3Recurrent, keras.layers.SimpleRNN):
    """A stock `SimpleRNN` in which kernels are factorized; see `FactorizedSimpleRNNCell`.

    Call, masks, states and other arguments are those of the stock layer. `compress` and
    `ALDSCompress` convert a stock layer to this class when they factorize one of its kernels.

    Args:
        *args: The stock layer's arguments.
        kernels: dict or None, slices and rank of every kernel that is factorized, such as
            `{"kernel": {"slices": 1, "rank": 8}}`. Names are `"kernel"` and
            `"recurrent_kernel"`.
        **kwargs: The stock layer's keyword arguments.

    Raises:
        ValueError: If `kernels` is not such a dict.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedSimpleRNN
        >>> layer = FactorizedSimpleRNN(8, kernels={"kernel": {"slices": 1, "rank": 3}})
        >>> layer(np.ones((1, 5, 16), "float32")).shape
        TensorShape([1, 8])
    """


# -- Kernels as layers ---------------------------------------------------------------------------


class CellKernel(_Base):
    """A kernel of a recurrent cell as a linear layer that shares the cell's variable.

    Only `running` calls it. A subclass adds the `Layer` class as the last base.

    Args:
        cell: The built cell.
        name: Name of the cell's attribute that holds the kernel.
    """

    def __init__(self, cell: Any, name: str) -> None:
        super().__init__(name=name, dtype=dtype_policy(cell))
        self._cell = weakref.ref(cell)
        self.part = name.partition("_")[0]
        self.kernel = getattr(cell, name)
        self.built = True

    @property
    def cell(self) -> Any:
        """The cell."""
        return self._cell()

    @property
    def trainable(self) -> bool:
        """Whether the cell is trained."""
        return bool(self.cell.trainable) if hasattr(self, "_cell") else True

    @property
    def scope(self) -> str:
        """The name scope of the variable, or of the factors that replace it."""
        return (getattr(self.kernel, "path", None) or self.kernel.name).partition(":")[0]

    def call(self, inputs: Any) -> Any:
        """Multiply by the kernel.

        Args:
            inputs: tensor `[..., channels]`.
        """
        return tensors.tensordot(inputs, tensors.cast(tensors.tensor(self.kernel), inputs.dtype), 1)


# The kernels of a cell as layers, by name.
_KERNELS: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


@functools.cache
def _kernel_class(base: type, name: str) -> type:
    return type(name, (CellKernel, base), {"__doc__": CellKernel.__doc__})


def cell_kernels(cell: Any) -> dict[str, Any]:
    """The layers that represent the kernel variables of a built cell, by name.

    Returns the same objects as long as the cell holds the same variables. Factorized kernels are
    left out. Other layers have none.
    """
    if not is_cell(cell) or not cell.built:
        return {}
    known = _KERNELS.setdefault(cell, {})
    layers = _backend.backend_of(cell).keras.layers
    found = {}
    for name in KERNELS:
        variable = getattr(cell, name)
        if isinstance(variable, layers.Layer):
            continue
        if name not in known or known[name].__dict__.get("kernel") is not variable:
            known[name] = _kernel_class(layers.Layer, type(cell).__name__)(cell, name)
        found[name] = known[name]
    return found


def all_kernels(cell: Any) -> dict[str, Any]:
    """Both kernels of a built cell as layers: a `FactorizedDense` or a `CellKernel` each."""
    if not is_cell(cell) or not cell.built:
        return {}
    whole = cell_kernels(cell)
    return {name: whole.get(name) or getattr(cell, name) for name in KERNELS}


def is_cell(layer: Any) -> bool:
    """Whether `layer` is a stock recurrent cell, or the factorized form of one."""
    kind = stock_kind(layer)
    if not isinstance(kind, Cell):
        return False
    return kind.is_stock(layer) or type(layer) is kind.layer_class(_backend.backend_of(layer))


def cells(layer: Any) -> list[Any]:
    """The stock or factorized cells in a layer, at any depth, in order."""
    if is_cell(layer):
        return [layer]
    children = _backend.backend_of(layer).children(layer)
    return [cell for child in children for cell in cells(child)]


class CellKernelKind(Dense):
    """A kernel of a recurrent cell; a factorized dense layer in the cell replaces it."""

    kept: ClassVar[dict[str, str]] = {}
    principal = False
    output_axes = None  # no BatchNormalization follows a kernel
    measured = equalized = False

    def layer_class(self, backend: _backend.Backend) -> Any:
        return DENSE.layer_class(backend)

    def setting_name(self, layer: Any, name: str) -> str:
        return f"{layer.part}_{name}"

    def setting(self, layer: Any, name: str) -> Any:
        return getattr(layer.cell, self.setting_name(layer, name))

    def keeps_forward_pass(self, layer: Any) -> bool:
        return True

    def own_code(self, layer: Any) -> list[str]:
        return []

    def refusal(self, layer: Any) -> str | None:
        if layer.part == "recurrent" and not getattr(layer.cell, "reset_after", True):
            return "with reset_after=False every step multiplies two inputs by it"
        return None

    def arguments(self, layer: Any) -> dict[str, Any]:
        return {"units": self.shape(layer)[-1], "use_bias": False}

    @contextlib.contextmanager
    def standing_for(self, layer: Any, factorized: Any) -> Iterator[None]:
        # The cell multiplies by the variable itself.
        with restored([layer.kernel]):
            layer.kernel.assign(factorized.kernel)
            yield

    @contextlib.contextmanager
    def computing_with(self, layer: Any, kernel: Any) -> Iterator[None]:
        with restored([layer.kernel]):
            layer.kernel.assign(kernel)
            yield


# -- Cells ---------------------------------------------------------------------------------------


class Cell(Kind):
    """`GRUCell`, `LSTMCell` and `SimpleRNNCell`."""

    bases_in_tf_keras: ClassVar[Mapping[type, type]] = {Keras3Cell: TfKerasCell}

    def skipped(self, layer: Any) -> Skipped | None:
        if is_cell(layer):
            return Skipped(Skip.NO_KERNEL, "its kernels are listed separately")
        return super().skipped(layer)

    def kernels(self, layer: Any) -> dict[str, Any]:
        return all_kernels(layer)

    def obstacle(self, layer: Any, inner: Any, holders: Sequence[Any]) -> str | None:
        if not isinstance(inner, CellKernel) or inner.cell is not layer:
            return None
        if not self.is_stock(layer):
            return "its cell is factorized already"
        runners = [holder for holder in holders if getattr(holder, "cell", None) is layer]
        others = [holder for holder in runners if not _follows_steps(holder)]
        if runners and not others:
            return None
        others += [holder.cell for holder in holders if hasattr(holder, "cell")]
        name = type(others[0]).__name__ if others else "no recurrent layer"
        return f"its cell is run by {name}, whose steps cannot be followed"

    def adopt(self, backend: _backend.Backend, layer: Any) -> Undo | None:
        kernels = {n: k for n, k in _KERNELS.get(layer, {}).items() if is_factorized(k)}
        if not kernels or not self.is_stock(layer):
            return None
        found = {name: {"slices": k.slices, "rank": k.rank} for name, k in kernels.items()}
        new = _like(layer, self.layer_class(backend), {"kernels": found})
        for name, kernel in kernels.items():
            backend.transplant(getattr(new, name), kernel)
        kept = [name for name in (*KERNELS, "bias") if name not in kernels]
        return backend.transplant(layer, new, {name: name for name in kept})

    def release(self, backend: _backend.Backend, layer: Any) -> Undo | None:
        if type(layer) is not self.layer_class(backend):
            return None
        new = _like(layer, self.stock_class(backend))
        factorized = {n: k for n, k in all_kernels(layer).items() if is_factorized(k)}
        for name, kernel in factorized.items():
            getattr(new, name).assign(kernel.kernel)
        # The weights that are kept come last, so the recurrent kernel comes after a kept kernel.
        order: dict[str | None, str] = {
            None if name in factorized else name: name for name in (*KERNELS, "bias")
        }
        return backend.transplant(layer, new, order)


def _like(cell: Any, cls: type, more: Mapping[str, Any] | None = None) -> Any:
    """A new built cell of another class with the settings of `cell`, and `more`."""
    config = {name: value for name, value in cell.get_config().items() if name != "kernels"}
    new = cls.from_config({**config, **(more or {})})  # type: ignore[attr-defined]
    for name in ("implementation", "dropout_mask_count"):  # not in every config
        if name in cell.__dict__:
            setattr(new, name, cell.__dict__[name])
    kernel = cell.kernel
    rows = kernel.kernel_shape[0] if is_factorized(kernel) else kernel.shape[0]
    new.build((None, int(rows)))
    if hasattr(cell, "seed_generator"):
        new.seed_generator.state.assign(cell.seed_generator.state)
    return new


def _follows_steps(layer: Any) -> bool:
    """Whether a layer runs its cell as stock layers do, so that its steps can be followed."""
    kind = stock_kind(layer)
    return isinstance(kind, Running) and kind.is_stock(layer)


# -- Layers that run cells -----------------------------------------------------------------------


class Running(Kind):
    """`RNN`, and the base of all layers that run a cell over time steps."""

    bases_in_tf_keras: ClassVar[Mapping[type, type]] = {Keras3Recurrent: TfKerasRecurrent}

    def is_written_out(self, layer: Any) -> bool:
        return any(isinstance(cell, BaseFactorizedCell) for cell in cells(layer))

    def pieces(self, writer: Writer, layer: Any, shape: Shape, masked: bool) -> list[Any]:
        return writer.once(layer, "pieces", lambda: _written_out(writer, layer))

    def last_call(
        self, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Masks and initial states are those of the stock layer.
        if not args:
            return (value,), {}
        _, *states = _as_list(args[0])
        return ([value, *states] if states else value, *args[1:]), kwargs

    def running(self, layer: Any, values: bool) -> Replacement | None:
        cell = getattr(layer, "cell", None)
        return None if cell is None or not is_cell(cell) else _Run(layer, values)


class Recurrent(Running):
    """`GRU`, `LSTM` and `SimpleRNN`."""

    def adopt(self, backend: _backend.Backend, layer: Any) -> Undo | None:
        if not isinstance(layer.cell, BaseFactorizedCell) or not self.is_stock(layer):
            return None
        return backend.adopt(layer, self.layer_class(backend), {})

    def release(self, backend: _backend.Backend, layer: Any) -> Undo | None:
        if type(layer) is not self.layer_class(backend):
            return None
        # A layer that was loaded lacks what the loop of the stock layer has beside.
        cls = self.stock_class(backend)
        stock = cls.from_config(cls.get_config(layer))
        more = {name: v for name, v in vars(stock).items() if name not in vars(layer)}
        return backend.adopt(layer, cls, more)


class Bidirectional(Running):
    """`Bidirectional`."""

    def adopt(self, backend: _backend.Backend, layer: Any) -> Undo | None:
        return backend.renew_bidirectional(layer) if self.is_written_out(layer) else None

    def release(self, backend: _backend.Backend, layer: Any) -> Undo | None:
        return backend.renew_bidirectional(layer)


class ConvolutionalLSTM(Kind):
    """`ConvLSTM1D`, `ConvLSTM2D` and `ConvLSTM3D`."""

    def obstacle(self, layer: Any, inner: Any, holders: Sequence[Any]) -> str | None:
        return "its kernels convolve between its time steps" if inner is layer.cell else None


# -- Inputs of the kernels -----------------------------------------------------------------------


class _Run:
    """Runs a recurrent layer as a graph, and its watched kernels on all time steps at once.

    The hidden states that the recurrent kernel multiplies are the outputs of all steps.

    Args:
        layer: A layer with one cell, a stock one or a factorized one.
        values: Whether values are needed, not only shapes.
    """

    def __init__(self, layer: Any, values: bool) -> None:
        self._layer, self._values = layer, values
        self._time = 0 if getattr(layer, "time_major", False) else 1
        self._signature = inspect.signature(type(layer).call)
        self._in_graph = InGraph(layer)
        self._all_steps = all_steps_of(layer)

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = self._signature.bind(self._layer, *args, **kwargs)
        kernels = all_kernels(self._layer.cell)
        watched = [name for name in kernels if any(replacements_of([kernels[name]]))]
        x, mask = self._inputs(given)
        hidden: Any = None
        outputs: Any = None
        if not self._values:
            hidden = x[..., :1] * tensors.zeros([self._layer.cell.units], x.dtype)
            outputs, mask = call(*args, **kwargs), None
        elif "recurrent_kernel" in watched or self._derives_outputs(mask):
            hidden, outputs = self._followed(given, mask)
        if outputs is None:
            outputs = self._in_graph(call, *args, **kwargs)
        for name in watched:
            rows = x if name == "kernel" else hidden
            if mask is not None:
                rows = tensors.boolean_mask(rows, self._made(mask, name))
            if rows.shape.rank and rows.shape[0] != 0:
                kernels[name].call(rows)
        return outputs

    def _inputs(self, given: inspect.BoundArguments) -> tuple[Any, Any]:
        """The inputs as a dense tensor, and which of their steps are not masked (None for all)."""
        x = _as_list(given.args[1])[0]
        mask = given.arguments.get("mask")
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        if tensors.is_ragged(x):
            x, mask = tensors.dense(x), tensors.steps_of(x)
        return tensors.cast(tensors.tensor(x), self._layer.compute_dtype), mask

    def _derives_outputs(self, mask: Any) -> bool:
        """Whether the outputs of the layer follow from the outputs of all steps."""
        return mask is None and not self._layer.stateful

    def _followed(self, given: inspect.BoundArguments, mask: Any) -> tuple[Any, Any]:
        """The hidden states at the start of every step, and the outputs if they follow."""
        _, *initial = _as_list(given.args[1])
        initial = _as_list(given.arguments.get("initial_state")) or initial
        if not initial and (states := states_of(self._layer)):
            initial = given.arguments["initial_state"] = [tensors.tensor(s) for s in states]
        found = self._in_graph(self._all_steps, *given.args[1:], **given.kwargs)
        after, *last = found
        after = tensors.dense(after)
        hidden = self._before(after, initial[0] if initial else None, mask)
        if not self._derives_outputs(mask):
            return hidden, None
        if not self._layer.return_sequences:
            after = tensors.gather(after, tensors.shape(after)[self._time] - 1, axis=self._time)
        return hidden, type(found)((after, *last)) if self._layer.return_state else after

    def _before(self, after: Any, initial: Any, mask: Any) -> Any:
        """The hidden states at the start of every step, from those at its end."""
        steps = tensors.unstack(tensors.shape(after))
        steps[self._time] -= 1
        if initial is None:
            first = tensors.zeros_like(tensors.gather(after, 0, axis=self._time))
        else:
            first = tensors.cast(initial, after.dtype)
        first = tensors.expand_dims(first, self._time)
        earlier = tensors.slice_(after, [0, 0, 0], tensors.stack(steps))
        hidden = tensors.concat([first, earlier], self._time)
        if mask is None:
            return hidden
        # Before the first unmasked step the outputs are zeros, whatever the state is.
        made = tensors.cast(self._made(mask, "recurrent_kernel"), tensors.int32)
        begun = tensors.cumsum(made, self._time, exclusive=True) > 0
        return tensors.where(begun[..., None], hidden, first)

    def _made(self, mask: Any, name: str) -> Any:
        """Which steps are not masked, in the order in which a kernel sees them."""
        made = tensors.cast(tensors.tensor(mask), tensors.boolean)
        backwards = name == "recurrent_kernel" and self._layer.go_backwards
        return tensors.reverse(made, [self._time]) if backwards else made


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


# -- Replacement by stock layers -----------------------------------------------------------------


def _written_out(writer: Writer, layer: Any) -> list[Any]:
    """The stock layer, after a dense encoder if a single layer's input kernel has one slice."""
    held = cells(layer)
    kernels = [(name, k) for cell in held for name, k in all_kernels(cell).items()]
    factors = [(name, kernel) for name, kernel in kernels if is_factorized(kernel)]
    before: Any = None
    single = isinstance(layer, BaseFactorizedRecurrent)
    if single and factors[0][0] == "kernel" and factors[0][1].slices == 1:
        _, before = factors.pop(0)
    if factors:
        names = ", ".join(dict.fromkeys(name for name, _ in factors))
        whole = sum(math.prod(kernel.kernel_shape) for _, kernel in factors)
        weights = sum(sum(DENSE.factor_weights_per_position(kernel)) for _, kernel in factors)
        writer.warn(
            f"'{layer.name}' gets dense kernels instead of factors ({names}: {whole:,} weights, "
            f"not {weights:,}). Stock layers can keep only the factors of a single layer's input "
            "kernel, in one slice."
        )
    values, origins = [], []
    for cell in held:
        for kernel in all_kernels(cell).values():
            made = kernel.decoder if kernel is before else kernel.kernel
            values.append(tensors.tensor(made).numpy())
            origins.append(kernel.decoder if is_factorized(kernel) else made)
        if cell.use_bias:
            values.append(writer.value(cell.bias))
            origins.append(cell.bias)
    config = stock_config(layer)
    stock = getattr(writer.layers, config["class_name"]).from_config(config["config"])
    writer.record(layer, stock, values, origins)
    if before is None:
        return [stock]
    encoder = writer.layers.Dense(
        before.rank,
        use_bias=False,
        kernel_initializer=writer.copied(before.encoder_initializer),
        kernel_regularizer=before.encoder_regularizer,
        kernel_constraint=before.encoder_constraint,
        trainable=layer.trainable,
        dtype=dtype_policy(layer),
        name=writer.unique(f"{layer.name}_encoder"),
    )
    writer.record(layer, encoder, [writer.value(before.encoder)], [before.encoder])
    return [encoder, stock]


def stock_config(layer: Any) -> dict[str, Any]:
    """The class name and config of the stock layer that a recurrent layer replaces."""
    return _stock({"class_name": type(layer).__name__, "config": layer.get_config()})


def _stock(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_stock(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: _stock(item) for key, item in value.items()}
    name = str(value.get("class_name", "")).rpartition(">")[2]
    if not name.startswith("Factorized"):
        return value
    config = {key: item for key, item in value["config"].items() if key != "kernels"}
    stock = {"class_name": name.removeprefix("Factorized"), "config": config}
    return {"module": "keras.layers", "registered_name": None, **stock}


register(
    Cell("GRUCell", FactorizedGRUCell),
    Cell("LSTMCell", FactorizedLSTMCell),
    Cell("SimpleRNNCell", FactorizedSimpleRNNCell),
    Recurrent("GRU", FactorizedGRU),
    Recurrent("LSTM", FactorizedLSTM),
    Recurrent("SimpleRNN", FactorizedSimpleRNN),
    Running("RNN"),
    Bidirectional("Bidirectional"),
    *(ConvolutionalLSTM(f"ConvLSTM{n}D") for n in (1, 2, 3)),
)
register_own(CellKernel, CellKernelKind("kernel of a cell"))
