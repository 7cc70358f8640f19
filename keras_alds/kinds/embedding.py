"""A factorized embedding: a narrow table, and a matrix that widens what is looked up."""

from __future__ import annotations

from typing import Any, ClassVar

import tensorflow as tf

from keras_alds.core.slicing import Unfolding, convolution_unfolding
from keras_alds.kinds.factorized import _PARTS, FactorizedMixin, _positive_int


class FactorizedEmbeddingMixin(FactorizedMixin):
    """An embedding table `[input_dim, output_dim]` in two factors; always one slice."""

    _parts = _PARTS[:2]
    _not_equal: ClassVar[Any] = staticmethod(tf.not_equal)

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        rank: int,
        mask_zero: bool = False,
        encoder_initializer: Any = "uniform",
        decoder_initializer: Any = "glorot_uniform",
        encoder_regularizer: Any = None,
        decoder_regularizer: Any = None,
        activity_regularizer: Any = None,
        encoder_constraint: Any = None,
        decoder_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(activity_regularizer=activity_regularizer, autocast=False, **kwargs)
        self.input_dim = _positive_int(input_dim, "input_dim")
        self.output_dim = _positive_int(output_dim, "output_dim")
        self._set_arguments(
            slices=1,
            rank=rank,
            encoder_form="auto",
            encoder_initializer=encoder_initializer,
            decoder_initializer=decoder_initializer,
            encoder_regularizer=encoder_regularizer,
            decoder_regularizer=decoder_regularizer,
            encoder_constraint=encoder_constraint,
            decoder_constraint=decoder_constraint,
        )
        self.mask_zero = bool(mask_zero)
        self.supports_masking = self.mask_zero

    @property
    def unfolding(self) -> Unfolding:
        """How the table is read: as the matrix that it is."""
        return convolution_unfolding(0)

    @property
    def embeddings(self) -> Any:
        """The table that the factors stand for, `[input_dim, output_dim]`; `kernel` by its name."""
        return self.kernel

    def build(self, input_shape: Any = None) -> None:
        """Create encoder and decoder."""
        if self.built:
            return
        self._add_factors((self.input_dim, self.output_dim))
        super().build(input_shape)

    def call(self, inputs: Any) -> Any:
        """Look rows of the encoder up and widen them.

        Args:
            inputs: tensor of non-negative integers below `input_dim`, of any shape.

        Returns:
            Tensor with one more axis, of length `output_dim`.
        """
        x = tf.convert_to_tensor(inputs)
        if x.dtype not in (tf.int32, tf.int64):
            x = tf.cast(x, tf.int32)
        encoder, decoder = self._factors(self.compute_dtype)
        rows = tf.gather(encoder, x)
        return tf.tensordot(rows, decoder, 1)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Return where the inputs are not 0 for `mask_zero=True`, else None."""
        return self._not_equal(inputs, 0) if self.mask_zero else None

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the output's shape for an input shape."""
        return self._shape_type([*tuple(input_shape), self.output_dim])

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        config = {**super().get_config(), **self._shared_config()}
        for name in ("slices", "activation", "use_bias", "encoder_form"):
            del config[name]
        return {
            **config,
            "input_dim": self.input_dim,
            "output_dim": self.output_dim,
            "mask_zero": self.mask_zero,
        }
