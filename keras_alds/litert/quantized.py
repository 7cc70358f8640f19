"""Checks a file's quantization from its tensors, and warns of slow int8 convolutions."""

from __future__ import annotations

import math
import warnings

from keras_alds.litert.files import File, LiteRTFile, Operator, Tensor, read_file

#: The converter's dynamic-range quantizer leaves tensors with fewer values in float.
DYNAMIC_MIN_VALUES = 1024
# Operators that have kernels for float inputs and int8 weights.
_HYBRID = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL")
# Operators that have kernels only for float.
_FLOAT = ("CONV_3D", "CONV_3D_TRANSPOSE")
#: Groups with fewer channels are thin.
THIN = 32
# Most layers that a warning names.
_NAMED = 3


def check_quantized(file: LiteRTFile, quantize: str) -> list[str]:
    """Checks the tensors of every convolution and dense layer of a file.

    Args:
        file: The file.
        quantize: `"int8"`: inputs, weights and outputs must be int8. `"float16"`: weights must be
            stored in float16. `"dynamic"`: weights must be int8, except tensors of fewer than
            1024 values and operators without such a kernel.

    Returns:
        What `"dynamic"` left in float, as text.

    Raises:
        ValueError: If a layer is not quantized as requested; the text names all such layers.
    """
    wrong: list[str] = []
    left: list[str] = []
    for operator in file.weighted:
        weights = file.stored(_weights(operator))
        if not weights.constant:
            continue  # a product of two computed tensors is not a dense layer
        if quantize == "int8":
            types = [operator.data, weights, operator.outputs[0]]
            if any(tensor is None or not _is_int8(tensor) for tensor in types):
                found = ", ".join("–" if t is None else t.dtype for t in types)
                wrong.append(f"{operator.label} (input, weights, output: {found})")
        elif quantize == "float16":
            if weights.dtype != "float16":
                wrong.append(f"{operator.label} (weights: {weights.dtype})")
        elif not _is_int8(weights):
            count = math.prod(weights.shape)
            text = f"{operator.label} ({count} weights)"
            small = count < DYNAMIC_MIN_VALUES or operator.name not in _HYBRID
            (left if small else wrong).append(text)
    if wrong:
        remedy = (
            "`keras_alds.expand` the model before quantization-aware training, or quantize after "
            "training with `representative_data`; or use another `quantize`."
        )
        if never := {step.name for step in file.weighted if step.name in _FLOAT}:
            remedy = (
                f"use another `quantize`: LiteRT has no int8 form of {', '.join(sorted(never))}, "
                "which 'dynamic' leaves in float."
            )
        raise ValueError(
            f"Expected every convolution and dense layer to be quantized ({quantize}). Received: "
            f"{len(wrong)} that the converter left in float: {'; '.join(wrong)}. Remedy: {remedy}"
        )
    return left


def warn_of_thin_groups(*files: File, stacklevel: int) -> None:
    """Warns once of all int8 convolutions in groups of fewer than 32 channels.

    Measurements show that processors with int8 matrix units run them far slower than dense ones.

    Args:
        *files: Bytes of the files, or their paths.
        stacklevel: As for `warnings.warn`: 2 is the line that calls this function.
    """
    thin = [step for file in files for step in read_file(file).weighted if _is_thin(step)]
    if not thin:
        return
    names = [f"{step.label} ({step.groups} groups of {_share(step)})" for step in thin[:_NAMED]]
    if len(thin) > _NAMED:
        names.append(f"{len(thin) - _NAMED} more")
    warnings.warn(
        f"{len(thin)} int8 convolution{'s' if len(thin) > 1 else ''} in groups of fewer than "
        f"{THIN} channels, which make a network up to 15 times slower on processors with int8 "
        f"matrix units: {', '.join(names)}. Remedy: compress with `max_slices=1`; or with "
        "`objective='latency'` and an int8 table that was measured on that processor. "
        "`target='litert'` allows groups of 16 channels and more, which were fast only on a "
        "processor without such units.",
        stacklevel=stacklevel,
    )


def _is_thin(operator: Operator) -> bool:
    """Whether it is an int8 convolution in thin groups, of more than one position.

    At one position, as in sliced dense layers, it is as fast as a batched product or faster.
    A depthwise convolution has its own kernels if it has one output per channel. Otherwise the
    runtime treats it as a convolution in groups of one channel.
    """
    data, weights = operator.data, _weights(operator)
    return (
        data is not None
        and _is_int8(data)
        and _is_int8(weights)
        and (operator.groups or 1) > 1
        and _share(operator) < THIN
        and operator.depth_multiplier != 1
        and math.prod(operator.outputs[0].shape[:-1]) > 1
    )


def _share(operator: Operator) -> int:
    """The number of channels per group."""
    assert operator.data is not None  # only of a convolution
    assert operator.groups is not None
    return operator.data.shape[-1] // operator.groups


def _weights(operator: Operator) -> Tensor:
    weights = operator.weights
    assert weights is not None  # `weighted` operators have them
    return weights


def _is_int8(tensor: Tensor) -> bool:
    return tensor.dtype == "int8" and tensor.quantized
