"""The base of all factorized layers: arguments, weights, forms, config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import keras

from keras_alds._backend import tensors
from keras_alds.core.checks import positive_int
from keras_alds.core.slicing import Unfolding
from keras_alds.kinds import forms

# The real bases are the `Layer` classes of Keras 3 and tf_keras, which a type checker cannot see.
if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object

PARTS = ("encoder", "decoder", "bias")


def checked_factorizations(
    argument: str, value: Any, names: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Slices and rank of some parts of a layer, `{name: {"slices": k, "rank": j}}`, checked.

    Args:
        argument: str, the constructor argument, for the error.
        value: its value; None means no parts.
        names: sequence of str, the parts that the layer has.

    Raises:
        ValueError: If `value` is not such a dict.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(
        name in names and isinstance(choice, Mapping) and set(choice) == {"slices", "rank"}
        for name, choice in value.items()
    ):
        raise ValueError(
            f'Expected `{argument}` to be a dict such as {{"{names[0]}": {{"slices": 1, "rank": '
            f"8}}}}, with names of {names}. Received: {argument}={value!r}"
        )
    return {
        name: {key: positive_int(choice[key], key) for key in ("slices", "rank")}
        for name, choice in value.items()
    }


class FactorizedLayer(_Base):
    """Arguments, weights and config that every factorized layer has.

    A subclass adds a Keras `Layer` as the last base.
    """

    # Where Keras 3 and tf_keras differ: these are Keras 3's, and `keras_alds.tf_keras` replaces
    # them. `compute_output_shape` returns a `_shape_type`.
    _keras: ClassVar[Any] = keras
    _shape_type: ClassVar[Any] = tuple
    _add: ClassVar[Any] = staticmethod(keras.ops.add)
    _not_equal: ClassVar[Any] = staticmethod(keras.ops.not_equal)
    # All weights that have an initializer, a regularizer and a constraint of their own.
    _parts: ClassVar[tuple[str, ...]] = PARTS
    #: The names of `factors`.
    factor_names: ClassVar[tuple[str, ...]] = ("encoder", "decoder")
    # Shape of the dense kernel that the factors represent, in the stock layer's layout.
    kernel_shape: tuple[int, ...]

    @property
    def unfolding(self) -> Unfolding:
        """How the dense kernel unfolds to a matrix for every slice; see `core.slicing`."""
        raise NotImplementedError

    def _set_arguments(
        self,
        *,
        slices: Any,
        rank: Any,
        encoder_form: str,
        activation: Any = None,
        use_bias: bool = False,
        **parts: Any,
    ) -> None:
        """Check and store the arguments that all layers share."""
        self.slices = positive_int(slices, "slices")
        self.rank = positive_int(rank, "rank")
        if encoder_form != "auto" and encoder_form not in forms.FORMS:
            raise ValueError(
                f"Expected `encoder_form` to be 'auto' or one of {forms.FORMS}. "
                f"Received: encoder_form={encoder_form!r}"
            )
        self.encoder_form = encoder_form
        self.use_bias = bool(use_bias)
        self.activation = self._keras.activations.get(activation)
        self._set_parts(parts)

    def _set_parts(self, settings: dict[str, Any]) -> None:
        """Store initializers, regularizers and constraints by their argument's name."""
        for name, value in settings.items():
            module = getattr(self._keras, f"{name.rpartition('_')[2]}s")
            setattr(self, name, module.get(value))

    def _known_channels(self, channels: Any) -> int:
        if channels is None:
            raise ValueError(
                f"Expected the channel axis of the input of layer {self.name!r} to be known. "
                "Received: channels=None"
            )
        return int(channels)

    def _add_factors(self, kernel_shape: tuple[int, ...]) -> None:
        """Check slices and rank, and create encoder and decoder for a kernel of some shape."""
        *spatial, channels, filters = self.unfolding.shape(kernel_shape)
        if channels % self.slices:
            raise ValueError(
                "Expected the number of input channels to be divisible by `slices`. "
                f"Received: slices={self.slices}, channels={channels}"
            )
        unfolded = math.prod(spatial) * channels // self.slices
        if self.rank > min(unfolded, filters):
            raise ValueError(
                f"Expected `rank` to be at most {min(unfolded, filters)}, the full rank of an "
                f"unfolded slice (the smaller of {unfolded} and {filters}). "
                f"Received: rank={self.rank}"
            )
        self.kernel_shape = kernel_shape
        hidden = self.slices * self.rank
        per_slice = channels // self.slices
        for part, shape in zip(PARTS, self._factor_shapes(per_slice, hidden), strict=False):
            self._add_part(part, shape)

    def _factor_shapes(
        self, per_slice: int, hidden: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of encoder and decoder."""
        *spatial, _, filters = self.unfolding.shape(self.kernel_shape)
        return (*spatial, per_slice, hidden), (hidden, filters)

    def _add_part(self, part: str, shape: tuple[int, ...], settings: str | None = None) -> None:
        initializer = getattr(self, f"{settings or part}_initializer")
        if settings not in (None, part):  # tf_keras warns of an initializer that is used twice
            functions = self._keras.initializers
            initializer = functions.get(functions.serialize(initializer))
        settings = settings or part
        weight = self.add_weight(
            name=part,
            shape=shape,
            initializer=initializer,
            regularizer=getattr(self, f"{settings}_regularizer"),
            constraint=getattr(self, f"{settings}_constraint"),
            trainable=True,
            dtype=self.dtype,
        )
        setattr(self, part, weight)

    def _add_bias(self, width: int) -> None:
        if self.use_bias:
            self._add_part("bias", (width,))
        else:
            self.bias = None

    @property
    def factors(self) -> tuple[Any, ...]:
        """The variables that the dense kernel is a product of, in the order of their use."""
        return tuple(getattr(self, name) for name in self.factor_names)

    @property
    def kernel(self) -> Any:
        """The dense kernel that the factors represent: a tensor of the stock kernel's shape.

        Every access multiplies the factors, in the variables' dtype. Gradients flow through it to
        both factors. To change it, assign to `encoder` and `decoder`.
        """
        if not self.built:
            raise AttributeError("You must build the layer before accessing `kernel`.")
        return self._recomposed(*map(tensors.tensor, self.factors))

    def _recomposed(self, *factors: Any) -> Any:
        encoder, decoder = factors
        return forms.dense_kernel(encoder, decoder, self.slices, self.unfolding, self.kernel_shape)

    # TF-MOT calls these methods of custom layers.

    def get_prunable_weights(self) -> list[Any]:
        """The weights that TF-MOT's `prune_low_magnitude` prunes: the factors."""
        return [*self.factors]

    def get_clusterable_weights(self) -> list[tuple[str, Any]]:
        """The weights that TF-MOT's `cluster_weights` clusters, by name: the factors."""
        return list(zip(self.factor_names, self.factors, strict=True))

    def get_clusterable_algorithm(self, weight_name: str) -> None:
        """None: TF-MOT's own algorithm fits any shape."""

    def quantize(self, mode: Any = None, **kwargs: Any) -> None:
        """Say why the layer stays in float; Keras 3's `model.quantize` prints it as a warning."""
        raise NotImplementedError(
            f"{type(self).__name__} '{self.name}' stays in float: Keras quantizes Dense, "
            "EinsumDense and Embedding layers, and no convolutions. Remedy: `keras_alds.expand` "
            "replaces factorized dense layers of one slice by two Dense layers, which Keras "
            "quantizes; for int8 convolutions see `keras_alds.litert.convert`."
        )

    def enable_lora(self, rank: int, **kwargs: Any) -> None:
        """Say that the layer takes no adapter, which Keras 3's stock layers take."""
        raise NotImplementedError(
            f"{type(self).__name__} '{self.name}' takes no LoRA adapter. Received: rank={rank!r}. "
            f"Remedy: train its factors of rank {self.rank}, which are small, and freeze the other "
            "layers; or name the layer in `exclude=` when compressing: then it stays a stock layer."
        )

    def _factors(self, dtype: Any) -> tuple[Any, Any]:
        # Keras casts variables that are read inside `call`. This cast is for direct calls.
        return (
            tensors.cast(tensors.tensor(self.encoder), dtype),
            tensors.cast(tensors.tensor(self.decoder), dtype),
        )

    def _form(
        self,
        *,
        channels: int,
        filters: int,
        kernel_size: tuple[int, ...],
        positions: int,
        training: Any,
    ) -> str:
        if self.encoder_form != "auto":
            return self.encoder_form
        return forms.choose_form(
            slices=self.slices,
            rank=self.rank,
            channels=channels,
            filters=filters,
            kernel_size=kernel_size,
            positions=positions,
            # A symbolic flag (TF1 learning phase) cannot choose a form; every form may be trained.
            training=not tensors.is_tensor(training) and bool(training),
            dtype=tensors.dtype_name(self.compute_dtype),
            cpu=tensors.on_cpu(),
            xla=tensors.in_xla_trace(),
        )

    def _shared_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "slices": self.slices,
            "rank": self.rank,
            "activation": self._keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "activity_regularizer": self._keras.regularizers.serialize(self.activity_regularizer),
            "encoder_form": self.encoder_form,
        }
        for part in self._parts:
            for kind in ("initializer", "regularizer", "constraint"):
                value = getattr(self, f"{part}_{kind}")
                config[f"{part}_{kind}"] = getattr(self._keras, f"{kind}s").serialize(value)
        return config
