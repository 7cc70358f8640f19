"""Checks by a file's tensors that it is quantized as it was asked to be."""

from __future__ import annotations

from keras_alds.litert.files import LiteRTFile, Operator, Tensor

#: The converter's dynamic-range quantizer leaves tensors of fewer values in float.
DYNAMIC_MIN_VALUES = 1024
# What has kernels for float inputs and int8 weights.
_HYBRID = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL")
# What has kernels for float alone.
_FLOAT = ("CONV_3D", "CONV_3D_TRANSPOSE")


def check_quantized(file: LiteRTFile, quantize: str) -> list[str]:
    """Looks at the tensors of every convolution and dense layer of a file.

    Args:
        file: The file.
        quantize: `"int8"`: inputs, weights and outputs have to be int8; `"float16"`: weights
            have to be stored in float16; `"dynamic"`: weights have to be int8, but for those of
            fewer than 1024 values and of operators without such a kernel.

    Returns:
        What `"dynamic"` left in float, as text.

    Raises:
        ValueError: If a layer is not as asked for; the text names all of them.
    """
    wrong: list[str] = []
    left: list[str] = []
    for operator in file.weighted:
        weights = file.stored(_weights(operator))
        if not weights.constant:
            continue  # a product of two computed tensors is no dense layer
        if quantize == "int8":
            types = [operator.data, weights, operator.outputs[0]]
            if any(tensor is None or not _is_int8(tensor) for tensor in types):
                found = ", ".join("–" if t is None else t.dtype for t in types)
                wrong.append(f"{operator.label} (input, weights, output: {found})")
        elif quantize == "float16":
            if weights.dtype != "float16":
                wrong.append(f"{operator.label} (weights: {weights.dtype})")
        elif not _is_int8(weights):
            count = _count(weights)
            text = f"{operator.label} ({count} weights)"
            small = count < DYNAMIC_MIN_VALUES or operator.name not in _HYBRID
            (left if small else wrong).append(text)
    if wrong:
        remedy = (
            "`keras_alds.expand` the model before quantization-aware training, or quantize after "
            "training with `representative_data`; or take another `quantize`."
        )
        if never := {step.name for step in file.weighted if step.name in _FLOAT}:
            remedy = (
                f"take another `quantize`: LiteRT has no int8 form of {', '.join(sorted(never))}, "
                "which 'dynamic' leaves in float."
            )
        raise ValueError(
            f"Expected every convolution and dense layer to be quantized ({quantize}). Received: "
            f"{len(wrong)} that the converter left in float: {'; '.join(wrong)}. Remedy: {remedy}"
        )
    return left


def _weights(operator: Operator) -> Tensor:
    weights = operator.weights
    assert weights is not None  # `weighted` operators have them
    return weights


def _is_int8(tensor: Tensor) -> bool:
    return tensor.dtype == "int8" and tensor.quantized


def _count(tensor: Tensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count
