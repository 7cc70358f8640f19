"""The arithmetic of a factorized layer, and the choice among its equivalent forms.

A factorized layer computes `decoder(encoder(x))`; the encoder is block-diagonal over `slices`
groups of channels. Four *forms* compute the same numbers (to float rounding) at different speeds:

- `"grouped"`: one grouped convolution (a batched matrix product for dense layers), then the
  decoder.
- `"split"`: `slices` convolutions side by side, concatenated, then the decoder.
- `"merged"`: the encoder written as one dense, block-diagonal kernel, then the decoder.
- `"recomposed"`: encoder and decoder are multiplied first, inside the step, and one dense
  kernel is applied. Gradients flow to both factors.

Everything here works on plain tensors and knows nothing of Keras.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from keras_alds._backend import tensors
from keras_alds.core.slicing import Unfolding, convolution_unfolding, decoder_axes

FORMS = ("grouped", "split", "merged", "recomposed")
#: A form of dense layers that `"auto"` alone takes: the encoder is one grouped 1×1 convolution.
CONVOLUTION = "convolution"

_ASSUMED_BATCH = 32  # Keras's default, for a trace of unknown batch size
# Up to this many multiply-adds one product of the block-diagonal encoder (with its zeros) beats a
# batched product over slices with its two transpositions: 0.04 ms against 0.18 for 16 channels,
# even at about this size (64 channels, 2 to 8 slices), forward and gradients on two CPU cores.
_SMALL_PRODUCT = 2_500_000


def choose_form(
    *,
    slices: int,
    rank: int,
    channels: int,
    filters: int,
    kernel_size: Sequence[int],
    positions: int,
    training: bool,
    dtype: str,
    cpu: bool,
    xla: bool,
) -> str:
    """Choose the form of `encoder_form="auto"` for a device and a phase.

    The rules, and the measurements behind them (TensorFlow 2.21, two CPU cores, batch 64, half the
    parameters; figures are the time of forward and gradients relative to the dense convolution's):

    - **GPU, TPU**: `"grouped"`, which cuDNN runs. Not measured here.
    - **CPU, inference**: `"grouped"`. An exported graph keeps the small weights (a recomposed
      kernel would be folded back to the dense one). Sliced dense layers take `"convolution"`, one
      grouped 1×1 convolution: exported, a batched product is up to four times as slow in int8, and
      ai-edge-quantizer makes its output a constant. 3D convolutions take `"split"`: TensorFlow
      has no grouped ones. The choice does not depend on the machine's kernels, because an
      exported file runs on another one. (Without oneDNN the grouped convolution took 1.0 to 1.7
      times as long as `"split"`: 16 and 32 channels, 2 to 8 slices, on a CPU with AVX2.)
    - **CPU, training**: the cheapest by a small cost model. `"recomposed"` was 1.00–1.15 for every
      `slices` and size. `"grouped"` gets slower with more slices and faster with more channels:
      3×3, 64 channels at 32×32: 0.66, 0.80, 0.96, 1.18, 1.5, 1.8 for 1, 2, 4, 8, 16, 32 slices;
      256 channels at 14×14: 0.59, 0.59, 0.62, 0.72, 0.78, 0.77 for 1, 2, 4, 8, 16, 64 slices;
      16 channels at 32×32: 1.03 to 2.0. `"split"` was never much better than `"grouped"` and up to
      twice as slow for many slices. For pointwise kernels `"merged"` was 0.6–1.0 while the grouped
      one was 1.3–5. Recomposing costs about as much as `rank` / 2 more positions, so wide dense
      layers on few rows (2048 channels, 64 rows: 1.3–4.9) never use it. Never a grouped
      convolution if this machine's kernels cannot differentiate it
      (`grouped_convolution_trains`).
    - **XLA on CPU**: as in training, but never a grouped or depthwise convolution. Compiled, its
      gradient is 100 to 200 times slower than the dense one; its forward pass 1.5 to 14 times.

    Args:
        slices: int, number of channel slices (k).
        rank: int, rank per slice (j).
        channels: int, input channels.
        filters: int, output channels.
        kernel_size: sequence of int, the spatial kernel; empty for a dense layer.
        positions: int, rows that the kernel is applied to (batch times output pixels).
        training: bool, whether gradients will be computed.
        dtype: str, the compute dtype.
        cpu: bool, whether only CPUs are available.
        xla: bool, whether the trace is compiled by XLA.

    Returns:
        One of `"grouped"`, `"split"`, `"merged"`, `"recomposed"` and `"convolution"`.
    """
    if not cpu:
        return "grouped"
    convolution = len(kernel_size) > 0
    if not training and not xla:
        if slices > 1 and len(kernel_size) > 2:
            return "split"
        return "grouped" if convolution or slices == 1 else CONVOLUTION

    unsafe = (
        convolution
        and slices > 1
        and (xla or len(kernel_size) > 2 or not tensors.grouped_convolution_trains(dtype))
    )
    area = math.prod(kernel_size)
    dense = channels * area * filters
    width = min(channels, filters)
    # Costs relative to the dense kernel: multiply–adds, and the overhead of small matrices.
    costs = {"recomposed": 1.0 + 0.5 * rank / positions + (0.0 if convolution else 0.3)}
    if not unsafe and not (convolution and area == 1 and slices > 1):
        waste = 1.0 + 5.5 * slices**0.45 / width**0.6
        costs["grouped"] = rank * (channels * area + slices * filters) / dense * waste
    if area == 1 and slices > 1:
        costs["merged"] = slices * rank * (channels + filters) / dense + 2.4 / math.sqrt(width)
    best = min(costs, key=lambda form: costs[form])
    # A predicted gain below a tenth is noise; "recomposed" is known to match the dense speed.
    if convolution and costs[best] > 0.9 * costs["recomposed"]:
        return "recomposed"
    return best


def recompose(encoder: Any, decoder: Any, slices: int) -> Any:
    """Multiply a pair of factors back to the dense kernel, differentiably.

    Half-precision factors are multiplied in float32 and rounded once.

    Args:
        encoder: tensor `[*kernel_size, channels / slices, slices * rank]`.
        decoder: tensor `[*ones, slices * rank, filters]`.
        slices: int, number of channel slices.

    Returns:
        Tensor `[*kernel_size, channels, filters]` in the encoder's dtype.
    """
    *spatial, per_slice, width = encoder.shape
    filters = decoder.shape[-1]
    area, rank = math.prod(spatial), width // slices
    dtype = encoder.dtype
    if dtype in (tensors.float16, tensors.bfloat16):
        encoder, decoder = (
            tensors.cast(encoder, tensors.float32),
            tensors.cast(decoder, tensors.float32),
        )
    channels = slices * per_slice
    if slices == 1 or area * channels * width * filters <= _SMALL_PRODUCT:
        merged = tensors.reshape(merge(encoder, slices), [area * channels, width])
        product = tensors.matmul(merged, tensors.reshape(decoder, [width, filters]))
    else:
        left = tensors.transpose(
            tensors.reshape(encoder, [area * per_slice, slices, rank]), [1, 0, 2]
        )
        product = tensors.matmul(left, tensors.reshape(decoder, [slices, rank, filters]))
        product = tensors.reshape(product, [slices, area, per_slice, filters])
        product = tensors.transpose(product, [1, 0, 2, 3])
    return tensors.cast(tensors.reshape(product, [*spatial, channels, filters]), dtype)


def dense_kernel(
    encoder: Any, decoder: Any, slices: int, unfolding: Unfolding, kernel_shape: Sequence[int]
) -> Any:
    """Multiply a pair of factors back to the dense kernel in the stock layer's layout.

    Args:
        encoder: tensor, the layer's encoder.
        decoder: tensor, the layer's decoder.
        slices: int, number of channel slices.
        unfolding: how the dense kernel unfolds to `[*spatial, channels, filters]`.
        kernel_shape: sequence of int, the dense kernel's shape.

    Returns:
        Tensor of shape `kernel_shape` in the encoder's dtype, differentiable in both factors.
    """
    *spatial, channels, filters = unfolding.shape(kernel_shape)
    hidden = encoder.shape[-1]
    if unfolding.rank_axis:
        sizes = [kernel_shape[axis] for axis in unfolding.filters]
        sizes.insert(unfolding.rank_axis, hidden)
        others = [axis for axis in range(len(sizes)) if axis != unfolding.rank_axis]
        decoder = tensors.transpose(tensors.reshape(decoder, sizes), [unfolding.rank_axis, *others])
    kernel = recompose(
        tensors.reshape(encoder, [*spatial, channels // slices, hidden]),
        tensors.reshape(decoder, [*[1] * len(spatial), hidden, filters]),
        slices,
    )
    kernel = tensors.reshape(kernel, [kernel_shape[axis] for axis in unfolding.axes])
    order = sorted(range(len(unfolding.axes)), key=lambda n: unfolding.axes[n])
    return kernel if order == list(range(len(order))) else tensors.transpose(kernel, order)


def merge(encoder: Any, slices: int) -> Any:
    """Write a grouped encoder kernel as one dense, block-diagonal kernel.

    Args:
        encoder: tensor `[*kernel_size, channels / slices, slices * rank]`.
        slices: int, number of channel slices.

    Returns:
        Tensor `[*kernel_size, channels, slices * rank]`, zero off the blocks.
    """
    if slices == 1:
        return encoder
    *spatial, per_slice, width = encoder.shape
    blocks = tensors.reshape(encoder, [*spatial, 1, per_slice, slices, width // slices])
    blocks *= tensors.reshape(tensors.eye(slices, dtype=encoder.dtype), [slices, 1, slices, 1])
    return tensors.reshape(blocks, [*spatial, slices * per_slice, width])


def factorized_convolution(
    x: Any,
    encoder: Any,
    decoder: Any,
    *,
    slices: int,
    form: str,
    strides: Sequence[int],
    padding: str,
    dilation_rate: Sequence[int],
    data_format: str,
    scheme: int = 0,
) -> Any:
    """Apply encoder and decoder of a factorized convolution, without bias and activation.

    Each axis of the window belongs to one factor, which slides along it with its stride, padding
    and dilation; the other factor has length 1 there. Padding the encoder's output with zeros is
    exact, since the encoder has no bias.

    Args:
        x: tensor `[batch, *spatial, channels]`, or `[batch, channels, *spatial]`.
        encoder: tensor `[*encoder_window, channels / slices, slices * rank]`.
        decoder: tensor `[*decoder_window, slices * rank, filters]`.
        slices: int, number of channel slices.
        form: str, one of `FORMS`.
        strides: sequence of int.
        padding: `"valid"`, `"same"` or `"causal"`.
        dilation_rate: sequence of int.
        data_format: `"channels_last"` or `"channels_first"`.
        scheme: int, the fold scheme: which axes of the window are the decoder's.

    Returns:
        Tensor of the same layout as `x` with `filters` channels.
    """
    settings: dict[str, Any] = {
        "strides": strides,
        "padding": padding,
        "dilation_rate": dilation_rate,
        "data_format": data_format,
    }
    dimensions = len(strides)
    if form == "recomposed":
        sizes = [max(pair) for pair in zip(encoder.shape[:-2], decoder.shape[:-2], strict=True)]
        shape = (*sizes, slices * encoder.shape[-2], decoder.shape[-1])
        unfolding = convolution_unfolding(dimensions, scheme)
        kernel = dense_kernel(encoder, decoder, slices, unfolding, shape)
        return tensors.convolution(x, kernel, **settings)
    axes = decoder_axes(scheme, dimensions)
    first, second = (owned(settings, axes, decoder=part) for part in (False, True))
    hidden = convolve_encoder(x, encoder, slices=slices, form=form, **first)
    return tensors.convolution(hidden, decoder, **second)


def owned(settings: dict[str, Any], axes: Sequence[int], *, decoder: bool) -> dict[str, Any]:
    """The settings of one factor of a convolution, given which axes the decoder owns.

    Args:
        settings: the whole convolution's settings, `strides` and `dilation_rate` among them.
        axes: axes of the window that the decoder owns.
        decoder: bool, whether the factor is the decoder.

    Returns:
        The settings with strides and dilation 1 along the other factor's axes.
    """
    return {
        **settings,
        **{
            name: tuple(
                value if (axis in axes) == decoder else 1
                for axis, value in enumerate(settings[name])
            )
            for name in ("strides", "dilation_rate")
        },
    }


def convolve_encoder(
    x: Any,
    encoder: Any,
    *,
    slices: int,
    form: str,
    strides: Sequence[int],
    padding: str,
    dilation_rate: Sequence[int],
    data_format: str,
) -> Any:
    """Apply the encoder of a factorized convolution.

    Args:
        x: tensor `[batch, *spatial, channels]`, or `[batch, channels, *spatial]`.
        encoder: tensor `[*kernel_size, channels / slices, slices * rank]`.
        slices: int, number of channel slices.
        form: str, one of `FORMS` but `"recomposed"`.
        strides: sequence of int.
        padding: `"valid"`, `"same"` or `"causal"`.
        dilation_rate: sequence of int.
        data_format: `"channels_last"` or `"channels_first"`.

    Returns:
        Tensor of the same layout as `x` with `slices * rank` channels.
    """
    dimensions = len(strides)
    x, padding = tensors.padded(x, encoder, padding, dilation_rate, data_format)
    convolve = functools.partial(
        tensors.convolution,
        strides=strides,
        padding=padding,
        dilation_rate=dilation_rate,
        data_format=data_format,
    )
    if slices == 1:
        return convolve(x, encoder)
    if form == "merged":
        return convolve(x, merge(encoder, slices))
    if form == "split" or dimensions > 2:  # no grouped 3D convolution in TensorFlow
        axis = -1 if data_format == "channels_last" else 1
        parts = zip(
            tensors.split(x, slices, axis=axis),
            tensors.split(encoder, slices, axis=-1),
            strict=True,
        )
        return tensors.concat([convolve(part, kernel) for part, kernel in parts], axis=axis)
    if dimensions == 2 and encoder.shape[-2] == 1 and len(set(strides)) == 1:
        *spatial, _, width = encoder.shape
        kernel = tensors.reshape(encoder, [*spatial, slices, width // slices])
        return tensors.depthwise_convolution(
            x,
            kernel,
            strides=strides,
            padding=padding,
            dilation_rate=dilation_rate,
            data_format=data_format,
        )
    return convolve(x, encoder, groups=slices)


def factorized_matmul(x: Any, encoder: Any, decoder: Any, *, slices: int, form: str) -> Any:
    """Apply encoder and decoder of a factorized dense layer, without bias and activation.

    Args:
        x: tensor `[rows, channels]`, or sparse tensor `[..., channels]`.
        encoder: tensor `[channels / slices, slices * rank]`.
        decoder: tensor `[slices * rank, units]`.
        slices: int, number of channel slices.
        form: str, one of `FORMS`, of which `"grouped"` is one batched matrix product; or
            `CONVOLUTION`.

    Returns:
        Tensor `[rows, units]`.
    """
    if form == "recomposed" and not tensors.is_sparse(x):
        return tensors.matmul(x, recompose(encoder, decoder, slices))
    return tensors.matmul(encode(x, encoder, slices=slices, form=form), decoder)


def encode(x: Any, encoder: Any, *, slices: int, form: str) -> Any:
    """Apply a block-diagonal encoder to rows.

    Args:
        x: tensor `[rows, channels]`, or sparse tensor `[..., channels]`.
        encoder: tensor `[channels / slices, slices * rank]`.
        slices: int, number of channel slices.
        form: str, one of `FORMS` but `"recomposed"`, or `CONVOLUTION`. Sparse rows have a form of
            their own.

    Returns:
        Dense tensor `[rows, slices * rank]`.
    """
    if tensors.is_sparse(x):
        return tensors.encode_sparse(x, encoder, slices)
    per_slice, width = encoder.shape
    if slices == 1:
        return tensors.matmul(x, encoder)
    if form == "merged" or x.shape[0] == 0:  # a convolution needs a row
        return tensors.matmul(x, merge(encoder, slices))
    if form == CONVOLUTION:
        hidden = convolve_encoder(
            tensors.reshape(x, [1, -1, 1, slices * per_slice]),
            tensors.reshape(encoder, [1, 1, per_slice, width]),
            slices=slices,
            form="grouped",
            strides=(1, 1),
            padding="valid",
            dilation_rate=(1, 1),
            data_format="channels_last",
        )
        return tensors.reshape(hidden, [-1, width])
    if form == "split":
        parts = zip(
            tensors.split(x, slices, axis=-1), tensors.split(encoder, slices, axis=-1), strict=True
        )
        return tensors.concat([tensors.matmul(part, kernel) for part, kernel in parts], axis=-1)
    hidden = tensors.einsum(
        "nks,skj->nkj",
        tensors.reshape(x, [-1, slices, per_slice]),
        tensors.reshape(encoder, [per_slice, slices, width // slices]),
    )
    return tensors.reshape(hidden, [-1, width])


def count_positions(shape: Sequence[int | None], strides: Sequence[int] = ()) -> int:
    """Estimate the rows a kernel is applied to, from the known part of the input's shape.

    Args:
        shape: sequence of int or None, `[batch, *spatial]`.
        strides: sequence of int, one per spatial axis (none for dense layers).

    Returns:
        Positive int; an unknown batch counts as 32, another unknown axis as 1.
    """
    batch, *lengths = shape
    count = _ASSUMED_BATCH if batch is None else batch
    for axis, length in enumerate(lengths):
        step = strides[axis] if strides else 1
        count *= math.ceil((1 if length is None else length) / step)
    return max(1, count)
