"""Embeddings: a narrow table, and a matrix that widens its rows."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import keras

from keras_alds._backend import tensors
from keras_alds._backend.layers import dtype_policy
from keras_alds.core.checks import positive_int
from keras_alds.core.slicing import Unfolding, convolution_unfolding
from keras_alds.kinds.base import KernelKind, Kind, Shape, Writer, register
from keras_alds.kinds.factorized import PARTS, FactorizedLayer
from keras_alds.plan import Skip, Skipped


class BaseFactorizedEmbedding(FactorizedLayer):
    """An embedding table `[input_dim, output_dim]` in two factors; always one slice."""

    _parts = PARTS[:2]

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
        self.input_dim = positive_int(input_dim, "input_dim")
        self.output_dim = positive_int(output_dim, "output_dim")
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
        """How the table unfolds: it is a matrix already."""
        return convolution_unfolding(0)

    @property
    def embeddings(self) -> Any:
        """The table that the factors represent, `[input_dim, output_dim]`; `kernel` by its name."""
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
            inputs: tensor of non-negative integers below `input_dim`, of any shape: dense, ragged,
                or sparse, whose gaps are 0.

        Returns:
            Tensor with one more axis, of length `output_dim`: ragged for ragged inputs, else dense.
        """
        if tensors.is_ragged(inputs):
            return tensors.on_rows(self.call, inputs)
        x = tensors.dense(inputs)
        if x.dtype not in (tensors.int32, tensors.int64):
            x = tensors.cast(x, tensors.int32)
        encoder, decoder = self._factors(self.compute_dtype)
        rows = tensors.gather(encoder, x)
        return tensors.tensordot(rows, decoder, 1)

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


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedEmbedding(BaseFactorizedEmbedding, keras.layers.Layer):
    """An embedding held as a narrow table and a matrix that widens its rows.

    The layer looks `rank` numbers up for every input and multiplies them by the decoder. It equals
    a stock `Embedding` with the table `layer.embeddings`. It always has one slice: the words of a
    vocabulary have no meaningful order to slice by.

    Weights, in this order: `encoder` `[input_dim, rank]`, `decoder` `[rank, output_dim]`.

    Args:
        input_dim: int, size of the vocabulary.
        output_dim: int, length of an embedding.
        rank: int, j; at most `min(input_dim, output_dim)`.
        mask_zero: bool, whether input 0 is padding that is masked. Default `False`.
        encoder_initializer: initializer of the encoder. Default `"uniform"`.
        decoder_initializer: initializer of the decoder. Default `"glorot_uniform"`.
        encoder_regularizer: optional regularizer of the encoder.
        decoder_regularizer: optional regularizer of the decoder.
        activity_regularizer: optional regularizer of the layer's output.
        encoder_constraint: optional constraint of the encoder.
        decoder_constraint: optional constraint of the decoder.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Input shape:
        Integers of any shape; dense, sparse and ragged tensors.

    Output shape:
        `(*input_shape, output_dim)`.

    Raises:
        ValueError: If an argument is out of its range, or `rank` exceeds the full rank.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2, for one slice.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedEmbedding
        >>> layer = FactorizedEmbedding(100, 16, rank=4)
        >>> layer(np.array([[1, 2, 3]])).shape
        TensorShape([1, 3, 16])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(100, 4), (4, 16)]
    """


class Embedding(KernelKind):
    """`Embedding`."""

    kernel: ClassVar[str] = "embeddings"
    part: ClassVar[str] = "embeddings"
    kept: ClassVar[dict[str, str]] = {}
    kept_back: ClassVar[dict[str | None, str]] = {}
    copied: ClassVar[tuple[str, ...]] = ("input_dim", "output_dim", "mask_zero")
    max_slices: ClassVar[int | None] = 1
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
        return False  # the second moment of word indices only counts how often each occurs

    def positions(self, layer: Any, inputs: Shape, outputs: Shape) -> Shape:
        return inputs

    def weights_per_position(self, layer: Any) -> int:
        return 0

    def factor_weights_per_position(self, layer: Any) -> tuple[int, int]:
        return 0, math.prod(layer.decoder.shape)

    def macs(self, layer: Any, inputs: Shape, outputs: Shape) -> int:
        return 0

    def written_out(self, writer: Writer, layer: Any, axes: int) -> list[Any]:
        options = writer.encoder_options(layer)
        del options["use_bias"]
        for name in ("initializer", "regularizer", "constraint"):
            options[f"embeddings_{name}"] = options.pop(f"kernel_{name}")
        encoder = writer.layers.Embedding(
            layer.input_dim, layer.rank, mask_zero=layer.mask_zero, **options
        )
        writer.record(layer, encoder, [writer.value(layer.encoder)], [layer.encoder])
        decoder = writer.layers.Dense(
            layer.output_dim,
            use_bias=False,
            kernel_initializer=writer.copied(layer.decoder_initializer),
            kernel_regularizer=layer.decoder_regularizer,
            kernel_constraint=layer.decoder_constraint,
            activity_regularizer=layer.activity_regularizer,
            trainable=layer.trainable,
            dtype=dtype_policy(layer),
            name=layer.name,
        )
        return writer.pair(layer, encoder, decoder)


class ReversibleEmbedding(Kind):
    """`ReversibleEmbedding` of Keras 3."""

    def skipped(self, layer: Any) -> Skipped | None:
        return Skipped(
            Skip.NO_FORM,
            "it reads its table in both directions, and a table of two factors has no inverse "
            "look-up",
        )


register(Embedding("Embedding", FactorizedEmbedding), ReversibleEmbedding("ReversibleEmbedding"))
