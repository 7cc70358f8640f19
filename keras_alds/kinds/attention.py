"""Attention layers whose projections are factorized: what both Kerases share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from keras_alds import _backend
from keras_alds.kinds.factorized import checked_factorizations

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object

#: The projections that an attention layer may have; it holds them as `_<name>_dense`.
PROJECTIONS = ("query", "key", "value", "gate", "output")


class FactorizedAttentionMixin(_Base):
    """A stock attention layer in which some projections are `FactorizedEinsumDense` layers.

    A subclass adds the stock layer as the last base.
    """

    _einsum_class: ClassVar[type]

    def __init__(self, *args: Any, projections: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.projections = checked_factorizations("projections", projections, PROJECTIONS)

    def _factorize_projections(self) -> None:
        """Turns the new stock projections into factorized ones, in place."""
        for name, choice in self.projections.items():
            dense = getattr(self, f"_{name}_dense", None)
            if dense is None:
                raise ValueError(
                    f"Expected `projections` that layer {self.name!r} has. "
                    f"Received: projections={self.projections}, and it has no {name!r}"
                )
            arguments = {
                f"{part}_{setting}": getattr(dense, f"kernel_{setting}")
                for part in ("encoder", "decoder")
                for setting in ("initializer", "regularizer", "constraint")
            }
            factorized = self._einsum_class(
                dense.equation,
                tuple(dense.partial_output_shape),
                **choice,
                **arguments,
                activation=dense.activation,
                bias_axes=dense.bias_axes,
                bias_initializer=dense.bias_initializer,
                bias_regularizer=dense.bias_regularizer,
                bias_constraint=dense.bias_constraint,
                activity_regularizer=dense.activity_regularizer,
                trainable=dense.trainable,
                name=dense.name,
                dtype=getattr(dense, "dtype_policy", None) or dense._dtype_policy,
            )
            backend = _backend.backend_of(self)
            if dense.built:  # tf_keras builds them in the first call
                given, kernel, _ = factorized.terms
                sizes = dict(zip(kernel, dense.kernel.shape, strict=True))
                factorized.build(tuple(sizes.get(letter) for letter in given))
            # The same object: the order of the layer's weights goes by its projections.
            backend.transplant(dense, factorized, {"bias": "bias"})

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "projections": dict(self.projections)}


class FactorizedKeras3AttentionMixin(FactorizedAttentionMixin):
    """Factorizes the projections where a layer of Keras 3 makes them."""

    def build(self, query_shape: Any, value_shape: Any, key_shape: Any = None) -> None:
        """Create the stock layer's projections and factorize those that are to be."""
        super().build(query_shape, value_shape, key_shape)
        self._factorize_projections()


class FactorizedTfKerasAttentionMixin(FactorizedAttentionMixin):
    """Factorizes the projections where a layer of tf_keras makes them."""

    def _build_from_signature(self, query: Any, value: Any, key: Any = None) -> None:
        super()._build_from_signature(query, value, key)
        self._factorize_projections()
