"""The kinds of stock layers that have a factorized form, each described in one place.

A `Kind` says where a layer keeps its kernel, how that kernel is read as a matrix for every slice,
what its factorized layer is made with, what its rows of inputs are, and how often a call applies
them. Inspection, factorization, calibration, optimizer state and counting all ask it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from keras_alds import _backend
from keras_alds.core.moments import moment_blocks
from keras_alds.core.patches import patch_chunks
from keras_alds.core.slicing import (
    Array,
    Unfolding,
    convolution_unfolding,
    decoder_axes,
    distinct_schemes,
    einsum_unfolding,
    transposed_unfolding,
)
from keras_alds.kinds.attention import PROJECTIONS
from keras_alds.rewrite.recurrent import CellKernel

Shape = tuple[int | None, ...]


class Kind:
    """A stock layer class and its factorized form.

    Attributes:
        name: Name of the stock class.
        form: Name of its factorized class without `Factorized`; that of the stock class.
        kernel: The layer's attribute that is its kernel.
        part: What initializer, regularizer and constraint of the kernel are named after.
        kept: Weights that the factorized layer takes over: `{stock attribute: its attribute}`.
        copied: Constructor arguments that are attributes of the stock layer of the same name.
        sample: Positional arguments that any layer of the class can be made with.
        max_slices: Largest number of slices, or None.
        principal: Whether the bias has one number for every column of the kernel as it is read,
            as the method `"pca"` needs.
        lookup: Whether the kernel is a table that a call reads from and does not multiply by.
    """

    kernel: ClassVar[str] = "kernel"
    part: str = "kernel"
    kept: ClassVar[dict[str, str]] = {"bias": "bias"}
    copied: ClassVar[tuple[str, ...]] = ()
    sample: ClassVar[tuple[Any, ...]] = (1, 1)
    max_slices: ClassVar[int | None] = None
    principal: ClassVar[bool] = True
    lookup: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        self.name = self.form = name

    def variable(self, layer: Any) -> Any:
        """The kernel's variable."""
        return getattr(layer, self.kernel)

    def shape(self, layer: Any) -> tuple[int, ...]:
        """The kernel's shape in the layer's own layout."""
        return tuple(int(size) for size in self.variable(layer).shape)

    def setting(self, layer: Any, name: str) -> Any:
        """The kernel's `"initializer"`, `"regularizer"` or `"constraint"`."""
        return getattr(layer, f"{self.part}_{name}")

    def unfolding(self, layer: Any) -> Unfolding:
        """How the kernel is read as `[*spatial, c, f]` in fold scheme 0."""
        raise NotImplementedError

    def schemes(self, layer: Any) -> dict[int, int]:
        """The fold schemes of a layer's kernel; see `distinct_schemes`."""
        return distinct_schemes(())

    def folded(self, layer: Any, scheme: int) -> Unfolding:
        """How the kernel is read in a fold scheme, one of the values of `schemes`."""
        return self.unfolding(layer)

    def refusal(self, layer: Any) -> str | None:
        """Why a layer of this kind cannot be factorized because of its settings, or None."""
        return None

    def arguments(self, layer: Any) -> dict[str, Any]:
        """What the factorized layer is made with, beside slices, rank and what every layer has."""
        return {
            **{name: getattr(layer, name) for name in self.copied},
            "activation": layer.activation,
            "use_bias": layer.use_bias,
            **{
                f"bias_{name}": getattr(layer, f"bias_{name}")
                for name in ("initializer", "regularizer", "constraint")
            },
        }

    def input_shape(self, layer: Any) -> Shape:
        """A shape that the factorized layer can be built on."""
        raise NotImplementedError

    def observable(self, layer: Any) -> bool:
        """Whether the second moment of the layer's inputs can be collected."""
        return True

    def patches(self, layer: Any, inputs: Array) -> Iterator[Array]:
        """The unfolded inputs of `[batch, *spatial, channels]`, in chunks."""
        return patch_chunks(inputs)

    def batches(self, layer: Any, inputs: Array) -> Array:
        """The inputs of one call as `[batch, *spatial, channels]`, or `[batch, channels]`."""
        return np.reshape(inputs, (-1, inputs.shape[-1]))

    def positions(self, layer: Any, inputs: Shape, outputs: Shape) -> Shape:
        """The axes of a call's inputs or outputs over which the kernel is applied."""
        return outputs[:-1]

    def encoder_positions(self, layer: Any, scheme: int, inputs: Shape, outputs: Shape) -> Shape:
        """The axes over which the encoder of a fold scheme is applied."""
        return self.positions(layer, inputs, outputs)

    def applied(self, layer: Any) -> int:
        """How many weights one position of a call multiplies by, biases aside."""
        return math.prod(self.shape(layer))

    def applied_factors(self, layer: Any) -> int:
        """The same for a factorized layer of this kind."""
        return math.prod(layer.encoder.shape) + math.prod(layer.decoder.shape)


class _Dense(Kind):
    copied = ("units",)
    sample = (1,)

    def unfolding(self, layer: Any) -> Unfolding:
        return convolution_unfolding(0)

    def input_shape(self, layer: Any) -> Shape:
        return (None, self.shape(layer)[0])


class _CellKernel(_Dense):
    """A kernel of a recurrent cell; its factors are a dense layer in the cell."""

    kept: ClassVar[dict[str, str]] = {}
    principal = False

    def __init__(self, part: str) -> None:
        super().__init__("cell kernel")
        self.form = "Dense"
        self.part = part

    def setting(self, layer: Any, name: str) -> Any:
        return super().setting(layer.cell, name)

    def refusal(self, layer: Any) -> str | None:
        if self.part == "recurrent" and not getattr(layer.cell, "reset_after", True):
            return "with reset_after=False every step multiplies two inputs by it"
        return None

    def arguments(self, layer: Any) -> dict[str, Any]:
        return {"units": self.shape(layer)[-1], "use_bias": False}


class _Convolution(Kind):
    copied: ClassVar[tuple[str, ...]] = (
        "filters",
        "kernel_size",
        "strides",
        "padding",
        "data_format",
        "dilation_rate",
    )

    folds: ClassVar[bool] = True

    def unfolding(self, layer: Any) -> Unfolding:
        return convolution_unfolding(len(layer.kernel_size))

    def schemes(self, layer: Any) -> dict[int, int]:
        return distinct_schemes(layer.kernel_size if self.folds else ())

    def folded(self, layer: Any, scheme: int) -> Unfolding:
        if not scheme:
            return self.unfolding(layer)
        return convolution_unfolding(len(layer.kernel_size), scheme)

    def channels(self, layer: Any) -> int:
        """The channels of the layer's input."""
        return self.shape(layer)[-2]

    def input_shape(self, layer: Any) -> Shape:
        spatial = (None,) * len(layer.kernel_size)
        if layer.data_format == "channels_first":
            return (None, self.channels(layer), *spatial)
        return (None, *spatial, self.channels(layer))

    def refusal(self, layer: Any) -> str | None:
        groups = getattr(layer, "groups", 1)
        return f"its convolution is already grouped (groups={groups})" if groups != 1 else None

    def patches(self, layer: Any, inputs: Array) -> Iterator[Array]:
        return patch_chunks(
            inputs,
            layer.kernel_size,
            strides=layer.strides,
            dilation=layer.dilation_rate,
            padding=layer.padding,
        )

    def batches(self, layer: Any, inputs: Array) -> Array:
        dimensions = len(layer.kernel_size)
        if layer.data_format == "channels_first":
            inputs = np.moveaxis(inputs, -1 - dimensions, -1)
        return np.reshape(inputs, (-1, *inputs.shape[inputs.ndim - 1 - dimensions :]))

    def positions(self, layer: Any, inputs: Shape, outputs: Shape) -> Shape:
        return _without_channels(layer, outputs)

    def encoder_positions(self, layer: Any, scheme: int, inputs: Shape, outputs: Shape) -> Shape:
        # Along the decoder's axes it works on the input as it is, along its own on the output.
        moved = decoder_axes(scheme, len(layer.kernel_size))
        found = list(self.positions(layer, inputs, outputs))
        before = _without_channels(layer, inputs)
        first = len(found) - len(layer.kernel_size)
        for axis in moved:
            found[first + axis] = before[first + axis]
        return tuple(found)


class _Transposed(_Convolution):
    folds = False
    principal = False
    copied = (*_Convolution.copied, "output_padding")

    def unfolding(self, layer: Any) -> Unfolding:
        return transposed_unfolding(len(layer.kernel_size))

    def channels(self, layer: Any) -> int:
        return self.shape(layer)[-1]

    def patches(self, layer: Any, inputs: Array) -> Iterator[Array]:
        return patch_chunks(np.reshape(inputs, (-1, inputs.shape[-1])))

    def positions(self, layer: Any, inputs: Shape, outputs: Shape) -> Shape:
        return _without_channels(layer, inputs)


class _Separable(_Convolution):
    folds = False
    kernel = "pointwise_kernel"
    part = "pointwise"
    kept: ClassVar[dict[str, str]] = {"depthwise_kernel": "depthwise", "bias": "bias"}
    copied = (
        *_Convolution.copied,
        "depth_multiplier",
        "depthwise_initializer",
        "depthwise_regularizer",
        "depthwise_constraint",
    )

    def channels(self, layer: Any) -> int:
        return int(layer.depthwise_kernel.shape[-2])

    def patches(self, layer: Any, inputs: Array) -> Iterator[Array]:
        # What the pointwise kernel sees: the depthwise outputs.
        kernel = _backend.backend_of(layer).value(layer.depthwise_kernel)
        *_, channels, multiplier = kernel.shape
        taps = kernel.reshape(-1, channels, multiplier).transpose(1, 0, 2).astype(inputs.dtype)
        for chunk in super().patches(layer, inputs):  # [rows, window, channels]
            outputs = chunk.transpose(2, 0, 1) @ taps
            yield outputs.transpose(1, 0, 2).reshape(len(chunk), 1, channels * multiplier)

    def applied(self, layer: Any) -> int:
        return super().applied(layer) + math.prod(layer.depthwise_kernel.shape)

    def applied_factors(self, layer: Any) -> int:
        return super().applied_factors(layer) + math.prod(layer.depthwise.shape)


class _Einsum(Kind):
    copied = ("equation", "bias_axes")
    sample = ("ab,bc->ac", 1)
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
        arguments = {name: getattr(layer, name) for name in self.copied}
        return {
            **arguments,
            "output_shape": tuple(layer.partial_output_shape),
            "activation": layer.activation,
            **{
                f"bias_{name}": getattr(layer, f"bias_{name}")
                for name in ("initializer", "regularizer", "constraint")
            },
        }

    def input_shape(self, layer: Any) -> Shape:
        given, kernel, result = _terms(layer)
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
        given, kernel, result = _terms(layer)
        made = "".join(letter for letter in kernel if letter in given)
        kept = "".join(letter for letter in result if letter not in kernel)
        rows = np.einsum(f"{given}->{kept}{made}", inputs)
        return rows.reshape(-1, self.unfolding(layer).shape(self.shape(layer))[0])

    def positions(self, layer: Any, inputs: Shape, outputs: Shape) -> Shape:
        _, kernel, result = _terms(layer)
        before, _, after = result.partition("...")
        letters = [*before, *"." * (len(outputs) - len(before) - len(after)), *after]
        return tuple(
            size
            for letter, size in zip(letters, outputs, strict=True)
            if letter == "." or letter not in kernel
        )


class _Embedding(Kind):
    kernel = part = "embeddings"
    kept: ClassVar[dict[str, str]] = {}
    copied = ("input_dim", "output_dim", "mask_zero")
    max_slices = 1
    principal = False
    lookup = True

    def unfolding(self, layer: Any) -> Unfolding:
        return convolution_unfolding(0)

    def refusal(self, layer: Any) -> str | None:
        if getattr(layer, "sparse", False):
            return "its output is sparse (sparse=True)"
        return None

    def arguments(self, layer: Any) -> dict[str, Any]:
        return {name: getattr(layer, name) for name in self.copied}

    def input_shape(self, layer: Any) -> Shape:
        return (None, None)

    def observable(self, layer: Any) -> bool:
        return False  # its input are words, whose second moment says how often each occurs

    def positions(self, layer: Any, inputs: Shape, outputs: Shape) -> Shape:
        return inputs

    def applied(self, layer: Any) -> int:
        return 0

    def applied_factors(self, layer: Any) -> int:
        return math.prod(layer.decoder.shape)


#: Every kind by the name of its stock class.
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        *(_Convolution(f"Conv{n}D") for n in (1, 2, 3)),
        _Dense("Dense"),
        *(_Transposed(f"Conv{n}DTranspose") for n in (1, 2, 3)),
        *(_Separable(f"SeparableConv{n}D") for n in (1, 2)),
        _Einsum("EinsumDense"),
        _Embedding("Embedding"),
    )
}

_CELL_KERNELS = {part: _CellKernel(part) for part in ("kernel", "recurrent")}

#: Stock layers that make projections in code, and have a form that makes factorized ones.
ATTENTIONS = ("GroupQueryAttention", "MultiHeadAttention")

_TIED = "it reads its table in both directions, and a table of two factors has no inverse look-up"
_CONVOLVED = "its kernels convolve between its time steps"
_DEPTHWISE = "its kernel filters every channel by itself: there is no matrix to cut the rank of"
#: Why layers of stock classes without a factorized form have none.
REASONS: dict[str, str] = {
    "ReversibleEmbedding": _TIED,
    "ConvLSTMCell": _CONVOLVED,
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _DEPTHWISE),
}

# What a forward pass consists of: a subclass that keeps all of it counts as its stock layer.
_FORWARD = ("call", "convolution_op", "build", "kernel", "embeddings", "compute_mask")


def kind_of(layer: Any) -> Kind | None:
    """The kind of a stock layer, or of a layer that inherits its forward pass; else None."""
    if isinstance(layer, CellKernel):
        return _CELL_KERNELS[layer.part]
    layers = _backend.backend_of(layer).keras.layers
    for kind in KINDS.values():
        stock = getattr(layers, kind.name)
        # In tf_keras transposed and depthwise convolutions derive from Conv2D: the forward pass
        # decides.
        if isinstance(layer, stock) and all(
            getattr(type(layer), name, None) is getattr(stock, name, None) for name in _FORWARD
        ):
            return kind
    return None


def projections(layer: Any) -> dict[str, Any]:
    """The projections that an attention layer has by their names; none of another layer."""
    layers = _backend.backend_of(layer).keras.layers
    if not isinstance(layer, tuple(getattr(layers, n) for n in ATTENTIONS if hasattr(layers, n))):
        return {}
    found = {name: getattr(layer, f"_{name}_dense", None) for name in PROJECTIONS}
    return {name: dense for name, dense in found.items() if dense is not None}


def attention_class(layer: Any) -> type | None:
    """The form of an attention layer that makes factorized projections, if it is a stock one."""
    backend = _backend.backend_of(layer)
    for name in ATTENTIONS:
        if type(layer) is getattr(backend.keras.layers, name, None):
            return backend.factorized_class(name)
    return None


def factorized_kind(layer: Any) -> Kind:
    """The kind of stock layer that a factorized layer stands for."""
    names = (cls.__name__.removeprefix("Factorized") for cls in type(layer).__mro__)
    return next(KINDS[name] for name in names if name in KINDS)


def unfolded_shape(layer: Any, scheme: int = 0) -> tuple[int, ...]:
    """The shape `(*spatial, c, f)` that a stock layer's kernel is read as in a fold scheme."""
    kind = known_kind(layer)
    return kind.folded(layer, scheme).shape(kind.shape(layer))


def kernel_values(layer: Any, scheme: int = 0) -> Array:
    """The kernel of a stock layer as it is read, `[*spatial, c, f]` in float32 or float64."""
    kind = known_kind(layer)
    kernel = _backend.backend_of(layer).value(kind.variable(layer))
    if kernel.dtype not in (np.float32, np.float64):
        kernel = kernel.astype(np.float32)
    return kind.folded(layer, scheme).read(kernel)


def observable(layer: Any) -> bool:
    """Whether a layer's choices can be measured on calibration data."""
    kind = known_kind(layer)
    *spatial, c, _ = unfolded_shape(layer)
    blocks = moment_blocks(c, math.prod(spatial))
    return kind.observable(layer) and (kind.max_slices is None or blocks <= kind.max_slices)


def known_kind(layer: Any) -> Kind:
    """The kind of a layer that can be factorized.

    Raises:
        ValueError: If it is of no such kind.
    """
    kind = kind_of(layer)
    if kind is None:
        raise ValueError(f"Expected a layer that can be factorized. Received: layer={layer!r}")
    return kind


def _without_channels(layer: Any, shape: Shape) -> Shape:
    if layer.data_format == "channels_first":
        channels = len(shape) - 1 - len(layer.kernel_size)
        return (*shape[:channels], *shape[channels + 1 :])
    return shape[:-1]


@functools.lru_cache
def _split(equation: str) -> tuple[str, str, str]:
    given, kernel, result = re.split(",|->", re.sub(r"\s", "", equation))
    return given, kernel, result


def _terms(layer: Any) -> tuple[str, str, str]:
    return _split(layer.equation)
