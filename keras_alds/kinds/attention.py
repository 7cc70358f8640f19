"""Attention layers, whose projections can be factorized einsum layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import keras
import numpy as np

from keras_alds import _backend
from keras_alds._backend.layers import dtype_policy
from keras_alds._backend.layers import projections as held_projections
from keras_alds.kinds.base import Kind, Shape, Undo, Writer, is_factorized, known_kind, register
from keras_alds.kinds.factorized import checked_factorizations

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object

#: The projections that an attention layer may have.
PROJECTIONS = ("query", "key", "value", "gate", "output")
#: What is multiplied within a head: queries with keys, and values with the output projection.
SCORES, VALUES = "scores", "values"


def projections(layer: Any) -> dict[str, Any]:
    """The projections that an attention layer has, by their names."""
    found = held_projections(layer, PROJECTIONS)
    return {name: dense for name, dense in found.items() if dense is not None}


class BaseFactorizedAttention(_Base):
    """A stock attention layer in which some projections are `FactorizedEinsumDense` layers.

    A subclass adds the stock layer as the last base.
    """

    def __init__(self, *args: Any, projections: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.projections = checked_factorizations("projections", projections, PROJECTIONS)

    def _factorize_projections(self) -> None:
        """Turns the new stock projections into factorized ones, in place."""
        backend, known = _backend.backend_of(self), projections(self)
        for name, choice in self.projections.items():
            if name not in known:
                raise ValueError(
                    f"Expected `projections` that layer {self.name!r} has. "
                    f"Received: projections={self.projections}, and it has no {name!r}"
                )
            dense = known[name]
            kind = known_kind(dense)
            settings = {
                f"{part}_{setting}": kind.setting(dense, setting)
                for part in ("encoder", "decoder")
                for setting in ("initializer", "regularizer", "constraint")
            }
            factorized = kind.layer_class(backend)(
                **choice,
                **settings,
                **kind.arguments(dense),
                activity_regularizer=dense.activity_regularizer,
                trainable=dense.trainable,
                name=dense.name,
                dtype=dtype_policy(dense),
            )
            if dense.built:  # tf_keras builds them in the first call
                given, kernel, _ = factorized.terms
                sizes = dict(zip(kernel, dense.kernel.shape, strict=True))
                factorized.build(tuple(sizes.get(letter) for letter in given))
            # The same object, because the layer orders its weights by projection.
            backend.transplant(dense, factorized, kind.kept)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "projections": dict(self.projections)}


class Keras3Attention(BaseFactorizedAttention):
    """Factorizes the projections where a Keras 3 layer creates them."""

    def build(self, query_shape: Any, value_shape: Any, key_shape: Any = None) -> None:
        """Create the stock layer's projections and factorize the chosen ones."""
        super().build(query_shape, value_shape, key_shape)
        self._factorize_projections()


class TfKerasAttention(BaseFactorizedAttention):
    """Factorizes the projections where a tf_keras layer creates them."""

    def _build_from_signature(self, query: Any, value: Any, key: Any = None) -> None:
        super()._build_from_signature(query, value, key)
        self._factorize_projections()


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedGroupQueryAttention(Keras3Attention, keras.layers.GroupQueryAttention):
    """A stock `GroupQueryAttention` in which some projections are `FactorizedEinsumDense` layers.

    Call, masks and other arguments are those of the stock layer. `compress` and `ALDSCompress`
    convert a stock layer to this class when they factorize one of its projections.

    Args:
        *args: The stock layer's arguments.
        projections: dict or None, slices and rank of every projection that is factorized, such as
            `{"query": {"slices": 1, "rank": 8}}`. Names are `"query"`, `"key"`, `"value"`,
            `"output"` and, where there is one, `"gate"`.
        **kwargs: The stock layer's keyword arguments.

    Raises:
        ValueError: If `projections` is not such a dict, or names one that the layer lacks.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedGroupQueryAttention
        >>> choice = {"slices": 1, "rank": 4}
        >>> layer = FactorizedGroupQueryAttention(8, 2, 1, projections={"query": choice})
        >>> x = np.ones((1, 5, 16), "float32")
        >>> layer(x, x).shape
        TensorShape([1, 5, 16])
        >>> type(layer._query_dense).__name__
        'FactorizedEinsumDense'
    """


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedMultiHeadAttention(Keras3Attention, keras.layers.MultiHeadAttention):
    """A stock `MultiHeadAttention` in which some projections are `FactorizedEinsumDense` layers.

    Call, masks and other arguments are those of the stock layer. `compress` and `ALDSCompress`
    convert a stock layer to this class when they factorize one of its projections.

    Args:
        *args: The stock layer's arguments.
        projections: dict or None, slices and rank of every projection that is factorized, such as
            `{"query": {"slices": 1, "rank": 8}}`. Names are `"query"`, `"key"`, `"value"`,
            `"output"` and, where there is one, `"gate"`.
        **kwargs: The stock layer's keyword arguments.

    Raises:
        ValueError: If `projections` is not such a dict, or names one that the layer lacks.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedMultiHeadAttention
        >>> choice = {"slices": 1, "rank": 4}
        >>> layer = FactorizedMultiHeadAttention(2, 8, projections={"query": choice})
        >>> x = np.ones((1, 5, 16), "float32")
        >>> layer(x, x).shape
        TensorShape([1, 5, 16])
        >>> type(layer._query_dense).__name__
        'FactorizedEinsumDense'
    """


class Attention(Kind):
    """`MultiHeadAttention` and `GroupQueryAttention`.

    Args:
        name: As for `Kind`.
        layer: As for `Kind`.
        widths: The constructor arguments for the width of a head, and what gets narrower with each.
    """

    bases_in_tf_keras: ClassVar[Mapping[type, type]] = {Keras3Attention: TfKerasAttention}

    def __init__(self, name: str, layer: type, widths: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__(name, layer)
        self._widths = widths

    def widths(self, layer: Any) -> Mapping[str, tuple[str, ...]]:
        """The arguments for the width of a layer's heads that can be smaller."""
        if "gate" not in projections(layer):
            return self._widths
        # A gate multiplies each value of a context, so that no other values can stand for them.
        return {name: parts for name, parts in self._widths.items() if VALUES not in parts}

    def keeps_heads(self, layer: Any) -> str | None:
        """Why the heads of a layer cannot be narrower, whatever its projections are; or None."""
        if not self.is_stock(layer):
            return f"{type(layer).__name__} is not the stock {self.name}"
        if not self.widths(layer):
            return "it has a gate"
        return None

    def obstacle(self, layer: Any, inner: Any, holders: Sequence[Any]) -> str | None:
        if self.is_stock(layer) or all(inner is not dense for dense in projections(layer).values()):
            return None
        return f"{type(layer).__name__} creates it in its own code when the model is loaded"

    def adopt(self, backend: _backend.Backend, layer: Any) -> Undo | None:
        found = {
            name: {"slices": dense.slices, "rank": dense.rank}
            for name, dense in projections(layer).items()
            if is_factorized(dense)
        }
        if not found or not self.is_stock(layer):
            return None
        return backend.adopt(layer, self.layer_class(backend), {"projections": found})

    # -- Replacement by stock layers ---------------------------------------------------------

    def is_written_out(self, layer: Any) -> bool:
        return isinstance(layer, BaseFactorizedAttention)

    def pieces(self, writer: Writer, layer: Any, shape: Shape, masked: bool) -> list[Any]:
        return writer.once(layer, "pieces", lambda: [self._stock(writer, layer)])

    def _stock(self, writer: Writer, layer: Any) -> Any:
        """The stock layer, with dense kernels."""
        factorized = {n: dense for n, dense in projections(layer).items() if is_factorized(dense)}
        encoders = {id(dense.encoder): dense for dense in factorized.values()}
        decoders = {id(dense.decoder) for dense in factorized.values()}
        values, origins = [], []
        for variable in layer.weights:
            if id(variable) not in decoders:
                dense = encoders.get(id(variable))
                values.append(writer.value(variable) if dense is None else np.asarray(dense.kernel))
                origins.append(variable)
        whole = sum(math.prod(dense.kernel_shape) for dense in factorized.values())
        factors = [f for dense in factorized.values() for f in (dense.encoder, dense.decoder)]
        kept = sum(math.prod(factor.shape) for factor in factors)
        writer.warn(
            f"'{layer.name}' gets dense kernels instead of factors ({', '.join(factorized)}: "
            f"{whole:,} weights, not {kept:,}). Stock attention layers keep what `narrow_heads` "
            "removes."
        )
        config = {name: x for name, x in layer.get_config().items() if name != "projections"}
        stock = getattr(writer.layers, self.name).from_config(config)
        writer.record(layer, stock, values, origins)
        return stock

    def release(self, backend: _backend.Backend, layer: Any) -> Undo | None:
        if type(layer) is not self.layer_class(backend):
            return None
        return backend.adopt(layer, self.stock_class(backend), {}, forget=("projections",))


register(
    Attention("GroupQueryAttention", FactorizedGroupQueryAttention, {"head_dim": (SCORES, VALUES)}),
    Attention(
        "MultiHeadAttention",
        FactorizedMultiHeadAttention,
        {"key_dim": (SCORES,), "value_dim": (VALUES,)},
    ),
)
