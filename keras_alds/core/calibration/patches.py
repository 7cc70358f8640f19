"""The unfolded inputs of a layer: the patches that a convolution multiplies (im2col)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from keras_alds.core.slicing import Array

#: Rows of patches to collect before their product is worth computing.
CHUNK_ROWS = 2048
# Bytes of one chunk of patches.
_CHUNK_BYTES = 1 << 23


def patch_chunks(
    inputs: Array,
    kernel_size: Sequence[int] = (),
    *,
    strides: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    padding: str = "valid",
) -> Iterator[Array]:
    """Yields the patches that a convolution multiplies with its kernel (im2col), in chunks.

    Args:
        inputs: Array `[batch, *spatial, c]`.
        kernel_size: The kernel's size along each spatial axis; `()` for a dense layer, whose
            `inputs` are `[batch, c]`.
        strides: Strides along each spatial axis. Defaults to 1.
        dilation: Dilation along each spatial axis. Defaults to 1.
        padding: `"valid"`, `"same"` (zeros, as TensorFlow places them) or `"causal"`.

    Yields:
        Arrays `[m, κ, c]` of the inputs' dtype, spatial positions in the kernel's order.

    Raises:
        ValueError: If the numbers of axes do not match or the padding is unknown.

    Example:
        >>> [chunk.shape for chunk in patch_chunks(np.zeros((2, 5, 5, 3)), (3, 3))]
        [(18, 9, 3)]
    """
    dimensions = len(kernel_size)
    size = tuple(int(n) for n in kernel_size)
    stride = (1,) * dimensions if strides is None else tuple(strides)
    spread = (1,) * dimensions if dilation is None else tuple(dilation)
    if inputs.ndim != dimensions + 2 or len(stride) != dimensions or len(spread) != dimensions:
        raise ValueError(
            f"Expected inputs [batch, *spatial, channels] with {dimensions} spatial axes, and as "
            "many strides and dilations as the kernel has axes. Received: "
            f"inputs.shape={inputs.shape}, strides={stride}, dilation={spread}"
        )
    reach = [d * (k - 1) + 1 for d, k in zip(spread, size, strict=True)]
    lengths = inputs.shape[1:-1]
    pads = _pads(padding, lengths, reach, stride)
    outputs = [
        (n + sum(pad) - r) // s + 1
        for n, pad, r, s in zip(lengths, pads, reach, stride, strict=True)
    ]
    c, kappa = inputs.shape[-1], math.prod(size)
    limit = max(_CHUNK_BYTES // (kappa * c * inputs.itemsize), CHUNK_ROWS)
    per_line = math.prod(outputs[1:])
    lines = max(1, min(limit // max(per_line, 1), outputs[0])) if outputs else 1
    images = max(1, limit // max(lines * per_line, 1)) if lines == (outputs or [1])[0] else 1
    for first in range(0, inputs.shape[0], images):
        group = inputs[first : first + images]
        if any(map(any, pads)):
            group = np.pad(group, [(0, 0), *pads, (0, 0)])
        for top in range(0, outputs[0] if outputs else 1, lines):
            count = [min(lines, outputs[0] - top), *outputs[1:]] if outputs else []
            shape = (group.shape[0], *count, kappa, c)
            chunk = np.empty(shape, inputs.dtype)
            for position, offset in enumerate(np.ndindex(*size)):
                start = [o * d for o, d in zip(offset, spread, strict=True)]
                if start:
                    start[0] += top * stride[0]
                window = [slice(None)]
                window += [
                    slice(o, o + (n - 1) * s + 1, s)
                    for o, n, s in zip(start, count, stride, strict=True)
                ]
                chunk[..., position, :] = group[tuple(window)]
            yield chunk.reshape(-1, kappa, c)


def _pads(
    padding: str, lengths: Sequence[int], reach: Sequence[int], stride: Sequence[int]
) -> list[tuple[int, int]]:
    """The numbers of zeros before and after each spatial axis.

    Raises:
        ValueError: If the padding is unknown.
    """
    if padding == "valid":
        return [(0, 0) for _ in reach]
    if padding == "causal":
        return [(r - 1, 0) for r in reach]
    if padding != "same":
        raise ValueError(
            f"Expected padding to be 'valid', 'same' or 'causal'. Received: padding={padding!r}"
        )
    steps = zip(lengths, stride, reach, strict=True)
    totals = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in steps]
    return [(total // 2, total - total // 2) for total in totals]
