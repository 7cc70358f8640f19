"""The interface of a kind of layer, with defaults, and the register of all kinds.

A `Kind` describes a class of stock layers: where its kernel is, how the kernel unfolds to
matrices, the arguments of its factorized layer, the cost of a call. Inspection, factorization,
calibration, counting and `expand` use only this interface. They know no kind by name.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast

import keras
import numpy as np

from keras_alds import _backend
from keras_alds._backend import tensors
from keras_alds._backend.calls import Replacement, StandIn, replaced_calls
from keras_alds._backend.layers import dtype_policy, like
from keras_alds._backend.loops import compiled_loops
from keras_alds.core.calibration.moments import moment_blocks
from keras_alds.core.calibration.patches import patch_chunks
from keras_alds.core.chains import CP, TUCKER, form_weights, hidden_channels, is_chain
from keras_alds.core.slicing import Array, Unfolding, distinct_schemes, divisors
from keras_alds.kinds.factorized import FactorizedLayer
from keras_alds.plan import Skip, Skipped

Shape = tuple[int | None, ...]
Undo = Callable[[], None]

#: Why a layer with an adapter is left alone. Keras merges it only into the weights that it saves.
HAS_LORA = (
    "LoRA is enabled on it; to merge it, `save_weights`, then `load_weights` into a new model "
    "without it"
)
#: The kinds by the names of their stock classes.
KINDS: dict[str, Kind] = {}
# The kinds by the classes that this package adds: factorized ones, and kernels as layers.
_OWN: dict[type, Kind] = {}

# The parts of a forward pass: a subclass that keeps all of them counts as its stock layer.
_FORWARD = ("call", "convolution_op", "build", "kernel", "embeddings", "compute_mask")


class Writer(Protocol):
    """Helpers that `expand` gives to a kind that replaces a layer by stock layers."""

    @property
    def layers(self) -> Any:
        """The module of stock layers."""

    def once(self, layer: Any, key: Any, make: Callable[[], Any]) -> Any:
        """The result of `make()`, called once for each layer and key."""

    def value(self, variable: Any) -> np.ndarray:
        """The values of a variable."""

    def record(
        self,
        old: Any,
        new: Any,
        values: list[np.ndarray] | None = None,
        origins: list[Any] | None = None,
    ) -> None:
        """Gives `new` the flags of `old`, and these weights, once all layers are built.

        `origins` are the old weights that the new ones replace, or None.
        """

    def unique(self, name: str) -> str:
        """A layer name, numbered if it is taken."""

    def warn(self, text: str) -> None:
        """Warns the user once the model is rebuilt."""

    def encoder_options(self, layer: Any, part: str = "encoder") -> dict[str, Any]:
        """The arguments, except sizes, of the stock layer that replaces an encoder.

        `part` ends its name.
        """

    def decoder_options(self, layer: Any) -> dict[str, Any]:
        """The arguments, except sizes, of the stock layer that replaces a decoder."""

    def copied(self, initializer: Any) -> Any:
        """A copy of an initializer."""

    def pair(
        self, layer: Any, encoder: Any, decoder: Any, kernel: np.ndarray | None = None
    ) -> list[Any]:
        """Both stock layers; the decoder gets its weights and the bias."""


class Kind:
    """A class of stock layers. The defaults are those of a layer that cannot be factorized.

    Attributes:
        name: Name of the stock class.
        layers: The factorized classes, by the name of their backend.
        in_tf_keras: Attributes that the factorized class has in tf_keras instead of those in
            Keras 3.
        bases_in_tf_keras: The same for its base classes.
        output_axes: The kernel's axes of output channels, if a BatchNormalization after the layer
            can be folded into the kernel.
        encodes: Whether a linear layer of the class may be the first of two stock layers whose
            middle channels can be scaled.
        decodes: Whether a layer of the class may be the second.
        chains: Kinds of the same stock class whose kernels are chains, by fold scheme; see
            `core.chains`.
    """

    bases_in_tf_keras: ClassVar[Mapping[type, type]] = {}
    chains: Mapping[int, KernelKind] = {}
    output_axes: tuple[int, ...] | None = None
    encodes: bool = False
    decodes: bool = False

    def __init__(
        self, name: str, layer: type | None = None, in_tf_keras: Mapping[str, Any] | None = None
    ) -> None:
        self.name = name
        self.layers: dict[str, type] = {}
        self.in_tf_keras = in_tf_keras or {}
        if layer is not None:
            self.add_layer(keras.__name__, layer)

    def add_layer(self, keras: str, layer: type) -> None:
        """Registers the factorized class for Keras 3 or tf_keras."""
        self.layers[keras] = layer
        _OWN[layer] = self

    def layer_class(self, backend: _backend.Backend) -> Any:
        """The factorized class for a backend, or None if the backend lacks the layer."""
        return self.layers.get(backend.name)

    def stock_class(self, backend: _backend.Backend) -> Any:
        """The stock class of a backend, or None if the backend lacks the layer."""
        return getattr(backend.keras.layers, self.name, None)

    def is_stock(self, layer: Any) -> bool:
        """Whether a layer is of the stock class, not of a subclass."""
        return type(layer) is self.stock_class(_backend.backend_of(layer))

    def is_encoder(self, layer: Any) -> bool:
        """Whether a layer is a stock layer that may be the first of two; see `encodes`."""
        linear = _backend.backend_of(layer).keras.activations.linear
        return (
            self.encodes
            and self.is_stock(layer)
            and layer.activation is linear
            and layer.activity_regularizer is None
        )

    def is_decoder(self, layer: Any, bias: bool) -> bool:
        """Whether a stock layer may be the second; `bias` says whether the first has a bias."""
        return self.decodes and self.is_stock(layer)

    def skipped(self, layer: Any) -> Skipped | None:
        """Why the layer cannot be factorized, or None."""
        detail = f"{type(layer).__name__} has no factorized form"
        return no_kernel(layer) or Skipped(Skip.NO_FORM, detail)

    def variable(self, layer: Any) -> Any:
        """The kernel's variable."""
        return layer.kernel

    # -- Counting ----------------------------------------------------------------------------

    def macs(self, layer: Any, inputs: Shape, outputs: Shape) -> int:
        """Multiply–accumulates of one call of the stock layer."""
        return 0

    # -- Layers that hold others -------------------------------------------------------------

    def kernels(self, layer: Any) -> dict[str, Any]:
        """Kernels of the layer that are treated as layers, by name."""
        return {}

    def obstacle(self, layer: Any, inner: Any, holders: Sequence[Any]) -> str | None:
        """Why the layer prevents the factorization of `inner`, or None.

        Args:
            layer: A layer of this kind.
            inner: A layer inside it, at any depth.
            holders: All layers around `inner`, the outermost first.
        """
        return None

    def adopt(self, backend: _backend.Backend, layer: Any) -> Undo | None:
        """Lets a layer save and load its factorized parts.

        Returns:
            A function that undoes the change, or None if there is nothing to do.
        """
        return None

    def release(self, backend: _backend.Backend, layer: Any) -> Undo | None:
        """The inverse of `adopt`, for a layer in which everything is to be dense again.

        Kernels in `kernels` are still factorized, and become dense here.

        Returns:
            A function that puts everything back, or None if there is nothing to do.
        """
        return None

    def running(self, layer: Any, values: bool) -> Replacement | None:
        """A replacement of the layer's call that calls its `kernels` as layers; see `running`."""
        return None

    # -- Replacement by stock layers ---------------------------------------------------------

    def is_written_out(self, layer: Any) -> bool:
        """Whether `expand` replaces a layer by its `pieces`."""
        return False

    def pieces(self, writer: Writer, layer: Any, shape: Shape, masked: bool) -> list[Any]:
        """The stock layers that replace a layer, in the order of their calls.

        Args:
            writer: Helper that collects weights and warnings.
            layer: The layer.
            shape: The shape of the input of one call.
            masked: Whether that input carries a Keras mask.
        """
        raise NotImplementedError

    def last_call(
        self, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the last of several `pieces`.

        Args:
            value: The output of the pieces before it.
            args: The arguments of the layer's own call.
            kwargs: Its keyword arguments.
        """
        return (value,), {}


class KernelKind(Kind):
    """A class of stock layers that has a factorized form.

    Attributes:
        kernel: Name of the attribute that holds the kernel.
        part: Prefix of the names of the kernel's initializer, regularizer and constraint.
        kept: Weights that the factorized layer takes over: `{stock attribute: its attribute}`.
        kept_back: The same for a stock layer in place of a factorized one, in the order of the
            stock layer's weights. The key None stands for its kernel, if that is not the first.
        copied: Constructor arguments to copy from the stock layer's attributes of that name.
        sample: Positional arguments that are valid for any layer of the class.
        max_slices: Largest number of slices, or None.
        principal: Whether the bias has one entry for each column of the unfolded kernel, as the
            method `"pca"` requires.
        lookup: Whether a call looks up rows of the kernel instead of multiplying by it.
        measured: Whether its latency in LiteRT is measured and targets know its sliced forms.
        equalized: Whether its middle channels can be scaled: they are the encoder's last axis and
            the decoder's second-to-last.
    """

    kernel: ClassVar[str] = "kernel"
    part: ClassVar[str] = "kernel"
    kept: ClassVar[dict[str, str]] = {"bias": "bias"}
    kept_back: ClassVar[dict[str | None, str]] = {"bias": "bias"}
    copied: ClassVar[tuple[str, ...]] = ()
    sample: ClassVar[tuple[Any, ...]] = (1, 1)
    max_slices: ClassVar[int | None] = None
    principal: ClassVar[bool] = True
    lookup: ClassVar[bool] = False
    measured: bool = False
    equalized: bool = False

    # -- The kernel --------------------------------------------------------------------------

    def variable(self, layer: Any) -> Any:
        return getattr(layer, self.kernel)

    def shape(self, layer: Any) -> tuple[int, ...]:
        """The kernel's shape in the stock layer's own layout."""
        if is_factorized(layer):
            return tuple(layer.kernel_shape)
        return tuple(int(size) for size in self.variable(layer).shape)

    def setting_name(self, layer: Any, name: str) -> str:
        """The layer's name for the kernel's `"initializer"`, `"regularizer"` or `"constraint"`."""
        return f"{self.part}_{name}"

    def setting(self, layer: Any, name: str) -> Any:
        """The kernel's `"initializer"`, `"regularizer"` or `"constraint"`."""
        return getattr(layer, self.setting_name(layer, name))

    def unfolding(self, layer: Any) -> Unfolding:
        """How the kernel unfolds to `[*spatial, c, f]` in fold scheme 0."""
        raise NotImplementedError

    def schemes(self, layer: Any) -> dict[int, int]:
        """The fold schemes of a layer's kernel; see `distinct_schemes`."""
        return distinct_schemes(())

    def chain_schemes(self, layer: Any) -> dict[int, int]:
        """The chains that stand for a layer's kernel; scheme 0 for one that is a matrix."""
        known = self.schemes(layer)
        matrix = len(set(known.values())) == 1 or not self.chains
        return dict.fromkeys((TUCKER, CP), 0) if matrix else {chain: chain for chain in self.chains}

    def folded(self, layer: Any, scheme: int) -> Unfolding:
        """How the kernel unfolds in a fold scheme, one of the values of `schemes`."""
        return self.unfolding(layer)

    def can_shrink(self, layer: Any, schemes: Iterable[int]) -> bool:
        """Whether a factorization in one of the fold schemes is smaller than the layer."""
        for scheme in schemes:
            shape = self.folded(layer, scheme).shape(self.shape(layer))
            slices = [k for k in divisors(shape[-2]) if k <= (self.max_slices or k)]
            if is_chain(scheme):
                slices = [1]
            if any(form_weights(shape, k, 1, scheme) < math.prod(shape) for k in slices):
                return True
        return False

    # -- Whether a layer can be factorized ---------------------------------------------------

    def keeps_forward_pass(self, layer: Any) -> bool:
        """Whether a layer has the forward pass of the stock class."""
        stock = self.stock_class(_backend.backend_of(layer))
        return all(
            getattr(type(layer), name, None) is getattr(stock, name, None) for name in _FORWARD
        )

    def own_code(self, layer: Any) -> list[str]:
        """What a user's subclass adds and a factorized layer would lose."""
        stock = self.stock_class(_backend.backend_of(layer))
        if type(layer) is stock:
            return []
        classes = type(layer).__mro__[: type(layer).__mro__.index(stock)]
        harmless = {"get_config", "from_config"}
        methods = {
            name
            for cls in classes
            for name in vars(cls)
            if not name.startswith("_") and name not in harmless
        }
        plain = stock(*self.sample)
        attributes = {name for name in vars(layer) if not name.startswith("_")}
        built = {"built", "full_output_shape", self.kernel, "bias", *self.kept}
        return sorted(methods | (attributes - set(vars(plain)) - built))

    def refusal(self, layer: Any) -> str | None:
        """Why the settings of a layer prevent its factorization, or None."""
        return None

    def skipped(self, layer: Any) -> Skipped | None:
        name = type(layer).__name__
        if not self.keeps_forward_pass(layer):
            detail = f"{name} changes the forward pass of {self.name}"
            return no_kernel(layer) or Skipped(Skip.OWN_CODE, detail)
        if own := self.own_code(layer):
            detail = f"{name} adds {', '.join(own[:3])} to {self.name}, which would be lost"
            return Skipped(Skip.OWN_CODE, detail)
        if getattr(layer, "lora_enabled", False):
            return Skipped(Skip.LORA, HAS_LORA)
        if getattr(layer, "quantization_mode", None):
            return Skipped(
                Skip.QUANTIZED,
                f"it is quantized ({layer.quantization_mode}); compress before `quantize`",
            )
        if (refusal := self.refusal(layer)) is not None:
            return Skipped(Skip.SETTINGS, refusal)
        if (constraint := self.setting(layer, "constraint")) is not None:
            setting = self.setting_name(layer, "constraint")
            return Skipped(
                Skip.CONSTRAINT,
                f"two factors cannot keep its {setting} {type(constraint).__name__}; set "
                f"`layer.{setting} = None` to factorize it",
            )
        if (error := self._error_on_factors(layer)) is not None:
            setting = self.setting_name(layer, "regularizer")
            return Skipped(
                Skip.SETTINGS, f"its {setting} does not take arrays of other shapes ({error})"
            )
        if not self.can_shrink(layer, set(self.schemes(layer).values())):
            detail = f"no factorization of its kernel {unfolded_shape(layer)} is smaller"
            return Skipped(Skip.TOO_SMALL, detail)
        return None

    def _error_on_factors(self, layer: Any) -> str | None:
        """The error of a user's regularizer on arrays in the shapes of factors, if there is one."""
        regularizer, shape = self.setting(layer, "regularizer"), self.shape(layer)
        home = type(regularizer).__module__.partition(".")[0]
        if regularizer is None or home in _backend.KERASES:
            return None
        rank = next(j for j in itertools.count(2) if j not in shape)
        ones, kernel = (1,) * (len(shape) - 2), self.variable(layer)
        try:
            regularizer(kernel)
        except Exception:  # the user's code: it fails without a compression too
            return None
        random = np.random.default_rng(0)
        try:
            for size in ((*shape[:-1], rank), (*ones, rank, shape[-1])):
                regularizer(tensors.variable_like(kernel, random.normal(scale=0.1, size=size)))
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return None

    # -- The factorized layer ----------------------------------------------------------------

    def arguments(self, layer: Any) -> dict[str, Any]:
        """The factorized layer's arguments besides slices, rank and those of every layer.

        A stock layer in place of a factorized one is made with the same.
        """
        return {
            **{name: getattr(layer, name) for name in self.copied},
            "activation": layer.activation,
            "use_bias": layer.use_bias,
            **bias_settings(layer),
        }

    def input_shape(self, layer: Any) -> Shape:
        """An input shape to build the factorized layer."""
        raise NotImplementedError

    def stock(self, layer: Any) -> Any:
        """A new built stock layer that does what a factorized layer does, bias and kernel aside."""
        backend = _backend.backend_of(layer)
        stock = self.stock_class(backend)(
            **self.arguments(layer),
            # The values are assigned later; tf_keras warns of an initializer that is used twice.
            **{f"{self.part}_initializer": "zeros"},
            **{f"{self.part}_regularizer": layer.encoder_regularizer},
            activity_regularizer=layer.activity_regularizer,
            name=layer.name,
            trainable=layer.trainable,
            dtype=dtype_policy(layer),
        )
        with backend.name_scope(layer):
            stock.build(self.input_shape(layer))
        setattr(stock, self.setting_name(stock, "initializer"), layer.encoder_initializer)
        if layer.trainable:
            backend.copy_trainable(layer.encoder, self.variable(stock))
        return stock

    def standing_for(self, layer: Any, factorized: Any) -> contextlib.AbstractContextManager[None]:
        """Within this context, the layer computes what a factorized one does, in this thread."""
        return replaced_calls({layer: StandIn(factorized)})

    def computing_with(self, layer: Any, kernel: Array) -> contextlib.AbstractContextManager[None]:
        """Within this context, the layer computes with another kernel, in this thread.

        Args:
            layer: A stock layer.
            kernel: A kernel of the shape of its own.
        """
        variable = self.variable(layer)
        # Of a tensor, unlike a variable, Keras makes no other precision by itself.
        tensor = tensors.cast(tensors.tensor(kernel), layer.compute_dtype)
        names = [name for name, held in vars(layer).items() if held is variable]
        return replaced_calls({layer: StandIn(like(layer, **dict.fromkeys(names, tensor)))})

    # -- Inputs of calls ---------------------------------------------------------------------

    def observable(self, layer: Any) -> bool:
        """Whether the second moment of the layer's inputs can be collected."""
        return True

    def patches(self, layer: Any, inputs: Array) -> Iterator[Array]:
        """The unfolded inputs of `[batch, *spatial, channels]`, in chunks."""
        return patch_chunks(inputs)

    def batches(self, layer: Any, inputs: Array) -> Array:
        """The inputs of one call as `[batch, *spatial, channels]`, or `[batch, channels]`."""
        return np.reshape(inputs, (-1, inputs.shape[-1]))

    def encoded(self, layer: Any, inputs: Array) -> Array:
        """The output of a factorized layer's encoder for a call's inputs, channels last."""
        raise NotImplementedError

    def timed_call(self, layer: Any, shape: Sequence[int]) -> dict[str, Any]:
        """The properties of a call that determine its time in LiteRT, for an input shape.

        Returns:
            The fields of a `litert.layer_files.LayerCall`.
        """
        raise NotImplementedError

    # -- Counting ----------------------------------------------------------------------------

    def positions(self, layer: Any, inputs: Shape, outputs: Shape) -> Shape:
        """The axes of a call's inputs or outputs over which the kernel is applied."""
        return outputs[:-1]

    def encoder_positions(self, layer: Any, scheme: int, inputs: Shape, outputs: Shape) -> Shape:
        """The axes over which the encoder of a fold scheme is applied."""
        return self.positions(layer, inputs, outputs)

    def earlier_positions(
        self, layer: Any, scheme: int, inputs: Shape, outputs: Shape
    ) -> list[Shape]:
        """The axes over which each part but the last is applied."""
        return [self.encoder_positions(layer, scheme, inputs, outputs)]

    def before_kernel(self, layer: Any, inputs: Shape, outputs: Shape) -> int:
        """Entries of the tensor in a call that the kernel is applied to; 0 if it is the input."""
        return 0

    def hidden_sizes(
        self, layer: Any, form: tuple[int, int, int], inputs: Shape, outputs: Shape
    ) -> list[int]:
        """Entries of the tensors between the parts of a factorized kernel in one call.

        Args:
            layer: The layer, stock or factorized.
            form: Fold scheme, slices k, and rank j, as for `core.chains.hidden_channels`.
            inputs: The shape of the call's input.
            outputs: The shape of its output.
        """
        positions = self.earlier_positions(layer, form[0], inputs, outputs)
        channels = hidden_channels(*form)
        return [size_of(layer, p) * c for p, c in zip(positions, channels, strict=True)]

    def weights_per_position(self, layer: Any) -> int:
        """The number of weights that each position is multiplied by, without biases."""
        return math.prod(self.shape(layer))

    def factor_weights_per_position(self, layer: Any) -> tuple[int, int]:
        """The same for a factorized layer: of the encoder, and of the rest."""
        return math.prod(layer.encoder.shape), math.prod(layer.decoder.shape)

    def macs(self, layer: Any, inputs: Shape, outputs: Shape) -> int:
        return size_of(layer, self.positions(layer, inputs, outputs)) * self.weights_per_position(
            layer
        )

    def factorized_macs(self, layer: Any, inputs: Shape, outputs: Shape) -> int:
        """Multiply–accumulates of one call of a factorized layer."""
        encoder, rest = self.factor_weights_per_position(layer)
        everywhere = size_of(layer, self.positions(layer, inputs, outputs))
        first = self.encoder_positions(layer, scheme_of(layer), inputs, outputs)
        return size_of(layer, first) * encoder + everywhere * rest

    # -- Replacement by stock layers ---------------------------------------------------------

    def is_written_out(self, layer: Any) -> bool:
        return is_factorized(layer)

    def pieces(self, writer: Writer, layer: Any, shape: Shape, masked: bool) -> list[Any]:
        return writer.once(layer, "pieces", lambda: self.written_out(writer, layer, len(shape)))

    def written_out(self, writer: Writer, layer: Any, axes: int) -> list[Any]:
        """The stock layers that replace a factorized layer, the same for all of its calls.

        Args:
            writer: Helper that collects weights and warnings.
            layer: The layer.
            axes: Number of axes of its input.
        """
        raise NotImplementedError


_NOTHING = Kind("")


# -- The register --------------------------------------------------------------------------------


def register(*kinds: Kind) -> None:
    """Registers kinds by the names of their stock classes."""
    KINDS.update((kind.name, kind) for kind in kinds)
    _stock_kinds.cache_clear()


def register_own(cls: type, kind: Kind) -> None:
    """Registers a kind for a layer class of this package."""
    _OWN[cls] = kind


def factorizable_names() -> tuple[str, ...]:
    """The names of the stock classes that have a factorized form."""
    return tuple(name for name, kind in KINDS.items() if kind.layers)


def stock_kind(layer: Any) -> Kind:
    """The kind of a layer's nearest stock class, or of the one whose factorized form it is."""
    stock = _stock_kinds(_backend.backend_of(layer))
    for cls in type(layer).__mro__:
        kind = _OWN.get(cls) or stock.get(cls)
        if kind is not None:
            return kind
    return _NOTHING


@functools.cache
def _stock_kinds(backend: _backend.Backend) -> dict[type, Kind]:
    """The kinds by the stock classes of a backend."""
    return {kind.stock_class(backend): kind for kind in KINDS.values()}


def kind_of(layer: Any) -> KernelKind | None:
    """The kind of a stock layer with a kernel, or of a layer that inherits its forward pass."""
    kind = stock_kind(layer)
    if isinstance(kind, KernelKind) and not is_factorized(layer) and kind.keeps_forward_pass(layer):
        return kind
    return None


def known_kind(layer: Any) -> KernelKind:
    """The kind of a layer that can be factorized.

    Raises:
        ValueError: If the layer is of another kind.
    """
    kind = kind_of(layer)
    if kind is None:
        raise ValueError(f"Expected a layer that can be factorized. Received: layer={layer!r}")
    return kind


def factorized_kind(layer: Any) -> KernelKind:
    """The kind of stock layer that a factorized layer replaces."""
    return cast(KernelKind, stock_kind(layer))


def is_own(layer: Any) -> bool:
    """Whether `layer` is of a class of this package: factorized, or a holder of such layers."""
    return any(cls in _OWN for cls in type(layer).__mro__)


def is_factorized(layer: Any) -> bool:
    """Whether `layer` is one of this package's factorized layers, of Keras 3 or tf_keras."""
    return isinstance(layer, FactorizedLayer)


# -- Questions about any layer -------------------------------------------------------------------


def skipped_by_kind(layer: Any) -> Skipped | None:
    """Why a layer cannot be factorized, regardless of the layers around it, or None."""
    if is_factorized(layer):
        return Skipped(Skip.FACTORIZED, "already factorized")
    return stock_kind(layer).skipped(layer)


def macs_of_call(layer: Any, inputs: Shape, outputs: Shape) -> int:
    """Multiply–accumulates of one call of a layer.

    Raises:
        ValueError: If a relevant axis has an unknown length.
    """
    if is_factorized(layer):
        return factorized_kind(layer).factorized_macs(layer, inputs, outputs)
    return stock_kind(layer).macs(layer, inputs, outputs)


def unfolded_shape(layer: Any, scheme: int = 0) -> tuple[int, ...]:
    """The unfolded shape `(*spatial, c, f)` of a stock layer's kernel in a fold scheme."""
    kind = known_kind(layer)
    return kind.folded(layer, scheme).shape(kind.shape(layer))


def kernel_values(layer: Any, scheme: int = 0) -> Array:
    """The unfolded kernel of a stock layer, `[*spatial, c, f]` in float32 or float64."""
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


def running(model: Any, *, values: bool = True) -> dict[Any, Replacement]:
    """How the recurrent layers of a model run, so that their kernels can be watched, and fast.

    The steps run as graphs. If a kernel is watched, its layer calls it as a layer. So an observer
    of layer calls gets the kernel's inputs.

    Args:
        model: The model.
        values: Whether values are needed, not only shapes. Defaults to True.

    Returns:
        Replacements of the layers' calls for one pass.
    """
    found = compiled_loops(model) if values else {}
    for layer in dict.fromkeys([model, *below(model)]):
        if (call := stock_kind(layer).running(layer, values)) is not None:
            found[layer] = call
    return found


def below(layer: Any) -> Iterator[Any]:
    """Every layer inside a layer, at any depth; a layer held twice is listed twice."""
    for child in _backend.backend_of(layer).children(layer):
        yield child
        yield from below(child)


# -- Helpers of kinds ----------------------------------------------------------------------------


def no_kernel(layer: Any) -> Skipped | None:
    """Why a layer without a kernel cannot be factorized; None for a layer with a kernel."""
    variables = _backend.backend_of(layer).own_variables(layer)
    if all(len(variable.shape) <= 1 for variable in variables):
        return Skipped(Skip.NO_KERNEL, f"{type(layer).__name__} has no kernel to factorize")
    return None


def bias_settings(layer: Any) -> dict[str, Any]:
    """Initializer, regularizer and constraint of a layer's bias, as arguments."""
    names = ("bias_initializer", "bias_regularizer", "bias_constraint")
    return {name: getattr(layer, name) for name in names}


def scheme_of(layer: Any) -> int:
    """The fold scheme of a factorized layer."""
    return int(getattr(layer, "scheme", 0))


def input_rank_of(layer: Any) -> int | None:
    """The rank of the input channels of a factorized layer that is a Tucker-2, or None."""
    return getattr(layer, "input_rank", None)


def without_channels(layer: Any, shape: Shape) -> Shape:
    """A shape without the channel axis, by the layer's `data_format`."""
    if layer.data_format == "channels_first":
        channels = len(shape) - 1 - len(layer.kernel_size)
        return (*shape[:channels], *shape[channels + 1 :])
    return shape[:-1]


def channels_last(layer: Any, values: Array) -> Array:
    """Inputs or outputs with the channel axis last, by the layer's `data_format`."""
    if getattr(layer, "data_format", None) != "channels_first":
        return values
    return np.moveaxis(values, -1 - len(layer.kernel_size), -1)


def size_of(layer: Any, shape: Shape) -> int:
    """The number of positions of a shape.

    Raises:
        ValueError: If an axis has an unknown length.
    """
    if None in shape:
        raise ValueError(
            "Expected a known input size, to count multiply–accumulates. Received: layer "
            f"'{layer.name}' works on the shape {shape}. Create the model again with a fixed "
            'shape (`Input(shape)` without None) and set its weights, or use objective="params".'
        )
    return math.prod(int(n or 0) for n in shape)


def block_diagonal(encoder: np.ndarray, slices: int) -> np.ndarray:
    """A dense encoder `[c / k, k·j]` as one kernel `[c, k·j]`, zero off the blocks."""
    per_slice, hidden = encoder.shape
    rank = hidden // slices
    kernel = np.zeros((slices * per_slice, hidden), encoder.dtype)
    for i in range(slices):
        columns = slice(i * rank, (i + 1) * rank)
        kernel[i * per_slice : (i + 1) * per_slice, columns] = encoder[:, columns]
    return kernel
